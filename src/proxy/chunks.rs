//! Who knows no chunks? A client of HTTP/1.0 (RFC 9112, section 6.1): for it the end of the connection ends a body
//! without a length.
//!
//! Pingora adds `Transfer-Encoding: chunked` to a response that came in HTTP/2 without a length after all filters of the
//! application; only its modules see the head as it is about to be written. A request has none of them by default.

use std::any::Any;

use async_trait::async_trait;
use http::header;
use pingora::Result;
use pingora::http::ResponseHeader;
use pingora::modules::http::{HttpModule, HttpModuleBuilder, HttpModuleCtx, HttpModules, Module};

/// The modules of a request in HTTP/1.0.
pub(super) fn taken_out() -> HttpModuleCtx {
    let mut modules = HttpModules::new();
    modules.add_module(Box::new(NoChunks));
    modules.build_ctx()
}

struct NoChunks;

impl HttpModuleBuilder for NoChunks {
    fn init(&self) -> Module {
        Box::new(Self)
    }
}

#[async_trait]
impl HttpModule for NoChunks {
    async fn response_header_filter(&mut self, response: &mut ResponseHeader, _: bool) -> Result<()> {
        response.remove_header(&header::TRANSFER_ENCODING);
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
