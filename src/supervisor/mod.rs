//! Who started this process, and who comes after it? Sockets that were bound before us, what systemd is told of us, and
//! the successor that takes the sockets over.
//!
//! One protocol serves both: systemd hands its sockets to us as `sd_listen_fds(3)` says, and so do we to a successor.

pub mod sockets;
pub mod notify;
pub mod successor;
