//! `POST /reload`: the file is read again, as at SIGHUP, and whoever asked is told how it went.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use http::request::Parts;
use http::{Method, Response, StatusCode};
use serde_json::{Value, json};

use super::problem::Problem;
use super::token::Token;
use super::{JSON, reply};
use crate::config::changes::Changes;
use crate::config::error::ConfigError;

/// For whoever has the token.
pub struct ReloadApi {
    token: Token,
    file: PathBuf,
    reload: Arc<dyn Fn() -> Outcome + Send + Sync>,
}

type Outcome = Result<Changes, ConfigError>;

pub(super) const RELOAD: &str = "/reload";

impl ReloadApi {
    /// `reload` may block. `file` is what it reads, for the answer.
    pub fn new(token: Token, file: PathBuf, reload: impl Fn() -> Outcome + Send + Sync + 'static) -> Self {
        Self { token, file, reload: Arc::new(reload) }
    }

    /// 200 with what has changed; 422 with all that is wrong, when nothing has.
    pub(super) async fn answer(&self, request: &Parts) -> Response<Vec<u8>> {
        match self.reload(request).await {
            Ok(report) => reply(StatusCode::OK, JSON, report.to_string().into_bytes()),
            Err(problem) => problem.reply(),
        }
    }

    async fn reload(&self, request: &Parts) -> Result<Value, Problem> {
        if !self.token.is_shown_by(request) {
            return Err(Problem::NoToken);
        }
        if request.method != Method::POST {
            return Err(Problem::Method { allowed: "POST" });
        }
        // Beside the runtime, which also tells health and metrics.
        let reload = Arc::clone(&self.reload);
        let outcome = tokio::task::spawn_blocking(move || reload()).await.map_err(|_| Problem::Failed)?;
        let Changes { at_once, at_restart, kept, dropped } = outcome.map_err(Problem::Refused)?;
        let file = &self.file;
        Ok(json!({ "file": file, "applied": at_once, "restart": at_restart, "kept": kept, "dropped": dropped }))
    }
}

impl fmt::Debug for ReloadApi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReloadApi")
    }
}
