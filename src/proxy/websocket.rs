//! Where in a WebSocket may somebody else say a word? Between two frames of the backend.

/// The end of a WebSocket whose session has ended: a close frame with status 1008, "policy violation", and a reason for
/// people (RFC 6455, sections 5.5.1 and 7.4.1).
pub(super) const SESSION_ENDED: &[u8] = b"\x88\x0f\x03\xf0session ended";

/// Follows the frames in what a server sends (RFC 6455, section 5.2). Only their heads are looked at; nothing is kept of
/// what they carry.
#[derive(Debug, Default)]
pub(super) struct Frames {
    head: [u8; HEAD_BYTES_MAX],
    /// So many bytes of the head are here; none between two frames.
    head_bytes: usize,
    /// What is still to come of the frame, when the head is whole.
    payload_bytes: u64,
    is_closed: bool,
}

/// Two, eight for a long length, four for a mask (which no server should use).
const HEAD_BYTES_MAX: usize = 14;

const OPCODE_CLOSE: u8 = 8;

impl Frames {
    /// All of these bytes go to the client.
    pub(super) fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let ends = self.frame_end(bytes);
            bytes = &bytes[ends..];
        }
    }

    /// Only what is missing of the current frame goes to the client: so many of these bytes.
    pub(super) fn pass_rest(&mut self, bytes: &[u8]) -> usize {
        if self.is_between() { 0 } else { self.frame_end(bytes) }
    }

    /// Whether the client has whole frames.
    pub(super) fn is_between(&self) -> bool {
        self.head_bytes == 0
    }

    /// Whether the backend has said its last word: after a close frame there is none.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// Goes on to the end of the current frame, or of the bytes.
    fn frame_end(&mut self, bytes: &[u8]) -> usize {
        let mut passed = 0;
        while passed < bytes.len() {
            if self.payload_bytes == 0 {
                self.head[self.head_bytes] = bytes[passed];
                self.head_bytes += 1;
                passed += 1;
                let Some(length) = self.payload_of_whole_head() else { continue };
                self.is_closed |= self.head[0] & 0xf == OPCODE_CLOSE;
                self.payload_bytes = length;
            } else {
                let rest = (bytes.len() - passed) as u64;
                let taken = rest.min(self.payload_bytes);
                self.payload_bytes -= taken;
                passed += taken as usize;
            }
            if self.payload_bytes == 0 {
                self.head_bytes = 0;
                return passed;
            }
        }
        passed
    }

    /// The length that the head says, when it is whole.
    fn payload_of_whole_head(&self) -> Option<u64> {
        let head = &self.head[..self.head_bytes];
        let second = *head.get(1)?;
        let (short, mask_bytes) = (second & 0x7f, if second & 0x80 == 0 { 0 } else { 4 });
        let length_bytes = match short {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        if head.len() < 2 + length_bytes + mask_bytes {
            return None;
        }
        let long = head[2..2 + length_bytes].iter().fold(0, |length, byte| length << 8 | u64::from(*byte));
        Some(if length_bytes == 0 { short.into() } else { long })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(first: u8, length: usize) -> Vec<u8> {
        let mut bytes = vec![first];
        match length {
            0..126 => bytes.push(length as u8),
            126..65536 => bytes.extend([&[126][..], &(length as u16).to_be_bytes()].concat()),
            _ => bytes.extend([&[127][..], &(length as u64).to_be_bytes()].concat()),
        }
        bytes.resize(bytes.len() + length, 0x81); // looks like a head
        bytes
    }

    #[test]
    fn frames_of_all_lengths_end_where_they_end_however_they_are_cut_up() {
        let lengths = [0, 1, 125, 126, 127, 300, 65_535, 65_536, 70_000];
        for step in [1, 2, 3, 7, 1000, usize::MAX] {
            let mut frames = Frames::default();
            for length in lengths {
                let bytes = frame(0x82, length);
                let mut passed = 0;
                for part in bytes.chunks(step.min(bytes.len())) {
                    assert_eq!(passed == 0, frames.is_between(), "{length} by {step}: {passed} have passed");
                    frames.pass(part);
                    passed += part.len();
                }
                assert!(frames.is_between() && !frames.is_closed(), "{length} by {step}");
            }
        }
    }

    #[test]
    fn of_what_comes_only_the_rest_of_the_frame_passes() {
        let (one, other) = (frame(0x01, 300), frame(0x80, 5));
        for begun in 0..one.len() {
            let mut frames = Frames::default();
            frames.pass(&one[..begun]);
            let coming = [&one[begun..], &other].concat();
            let expected = if begun == 0 { 0 } else { one.len() - begun };
            assert_eq!(frames.pass_rest(&coming), expected, "{begun} have passed before");
            assert!(frames.is_between());
            assert_eq!(frames.pass_rest(&other), 0);
        }
    }

    #[test]
    fn a_masked_head_is_as_long_as_it_is() {
        let mut frames = Frames::default();
        frames.pass(&[0x82, 0x80, 1, 2, 3]);
        assert!(!frames.is_between());
        frames.pass(&[4]);
        assert!(frames.is_between());
    }

    #[test]
    fn after_a_close_frame_nothing_is_said() {
        let mut frames = Frames::default();
        frames.pass(&frame(0x81, 3));
        assert!(!frames.is_closed());
        frames.pass(SESSION_ENDED);
        assert!(frames.is_closed() && frames.is_between());
    }

    #[test]
    fn a_length_beyond_all_measure_is_a_frame_without_end() {
        let mut frames = Frames::default();
        frames.pass(&[&[0x82, 127][..], &[0xff; 8], &[0; 1000]].concat());
        assert!(!frames.is_between());
    }
}
