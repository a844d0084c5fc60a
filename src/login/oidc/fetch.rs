//! How is a provider asked? Over HTTPS, without following redirects, each answer limited in time and size.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use ureq::Agent;

use super::ProviderError;
use crate::config::confidential_url;
use crate::outgoing;

/// Asks one provider.
pub(super) struct Fetcher {
    agent: Agent,
    places: Arc<Semaphore>,
}

/// What a provider answered.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) content_type: String,
    pub(super) body: Vec<u8>,
}

/// For all of one answer, from the look-up of the name to its last byte.
const TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// Questions to one provider at a time: one that hangs takes so many threads, and none from another.
const PLACES: usize = 32;
/// For one of them.
const PLACE_WAIT_MAX: Duration = Duration::from_secs(2);

impl Fetcher {
    /// What several may share. `is_needed`: else no authorities are read.
    pub(super) fn agent(is_needed: bool) -> Agent {
        outgoing::agent(is_needed, TIMEOUT)
    }

    pub(super) fn new(agent: Agent) -> Self {
        Self { agent, places: Arc::new(Semaphore::new(PLACES)) }
    }

    /// `bearer`: an access token.
    pub(super) async fn get(&self, url: &str, bearer: Option<&str>) -> Result<Answer, ProviderError> {
        let mut request = self.agent.get(url).header("Accept", "application/json");
        if let Some(token) = bearer {
            request = request.header("Accept", "application/jwt").header("Authorization", format!("Bearer {token}"));
        }
        self.ask(url, move || request.call()).await
    }

    /// `authorization`: the value of that field, where the client shows who it is in it.
    pub(super) async fn post(
        &self,
        url: &str,
        form: &[(&str, &str)],
        authorization: Option<String>,
    ) -> Result<Answer, ProviderError> {
        let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
        let mut request = self
            .agent
            .post(url)
            .header("Accept", "application/json")
            .header("Content-Type", "application/x-www-form-urlencoded");
        if let Some(value) = authorization {
            request = request.header("Authorization", value);
        }
        self.ask(url, move || request.send(body)).await
    }

    async fn ask(
        &self,
        url: &str,
        question: impl FnOnce() -> Result<ureq::http::Response<ureq::Body>, ureq::Error> + Send + 'static,
    ) -> Result<Answer, ProviderError> {
        confidential_url(url).map_err(|fault| ProviderError::Wrong(format!("the URL {url:?}: {fault}")))?;
        let place = tokio::time::timeout(PLACE_WAIT_MAX, Arc::clone(&self.places).acquire_owned()).await;
        let Ok(Ok(place)) = place else {
            return Err(ProviderError::Away("too many questions at a time".to_owned()));
        };
        let asked = tokio::task::spawn_blocking(move || {
            let _place = place;
            let mut response = question()?;
            let content_type = response.headers().get("content-type").and_then(|value| value.to_str().ok());
            let content_type = content_type.unwrap_or_default().to_ascii_lowercase();
            let body = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec()?;
            Ok::<_, ureq::Error>(Answer { status: response.status().as_u16(), content_type, body })
        });
        match asked.await {
            Ok(Ok(answer)) => match answer.status {
                429 | 500..=599 => Err(ProviderError::Away(format!("it answers {}", answer.status))),
                _ => Ok(answer),
            },
            Ok(Err(ureq::Error::BodyExceedsLimit(_))) => {
                Err(ProviderError::Wrong("its answer is too large".to_owned()))
            }
            Ok(Err(error)) => Err(ProviderError::Away(error.to_string())),
            Err(error) => Err(ProviderError::Away(error.to_string())),
        }
    }
}

impl Answer {
    /// The body, where the answer is 200 and says that it is a signed token.
    pub(super) fn jwt(&self) -> Option<&str> {
        let is_signed = self.status == 200 && self.kind() == "application/jwt";
        std::str::from_utf8(&self.body).ok().filter(|_| is_signed)
    }

    fn kind(&self) -> &str {
        self.content_type.split(';').next().unwrap_or_default().trim()
    }

    /// The body, where the answer is 200 and says that it is JSON.
    pub(super) fn json(&self) -> Result<serde_json::Map<String, serde_json::Value>, ProviderError> {
        if self.status != 200 {
            return Err(ProviderError::Wrong(format!("it answers {}", self.status)));
        }
        let kind = self.kind();
        if kind != "application/json" && !(kind.starts_with("application/") && kind.ends_with("+json")) {
            return Err(ProviderError::Wrong("its answer is not JSON".to_owned()));
        }
        serde_json::from_slice(&self.body)
            .map_err(|_| ProviderError::Wrong("its answer is not a JSON object".to_owned()))
    }
}

impl std::fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Fetcher")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_provider_that_hangs_takes_no_places_from_another() {
        let agent = Fetcher::agent(false);
        let (hanging, other) = (Fetcher::new(agent.clone()), Fetcher::new(agent));
        let _taken = hanging.places.acquire_many(PLACES as u32).await.unwrap();
        let why = |answer: Result<Answer, ProviderError>| answer.err().unwrap().to_string();
        assert!(why(hanging.get("http://127.0.0.1:1/", None).await).contains("too many questions"));
        assert!(!why(other.get("http://127.0.0.1:1/", None).await).contains("too many questions"), "it is asked");
    }
}
