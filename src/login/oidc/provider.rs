//! What do we know of a provider, and what does it answer? Its metadata and keys, fetched when somebody needs them.
//!
//! Nothing is fetched at the start: a provider that is away stops neither the gateway nor who is logged in. What was
//! fetched is used for an hour; after that whoever needs it has it fetched anew, and does not wait for that. A signature
//! under an unknown key fetches the keys anew, at most once a minute, so that nobody can make us ask without end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use form_urlencoded::Serializer;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::sync::Mutex;
use tracing::warn;

use super::ProviderError;
use super::attempt::Seal;
use super::claims::{Mapping, add_userinfo};
use super::fetch::{Answer, Fetcher};
use super::jws::{self, Keys, SignatureError, Signed};
use super::token::{Asked, IdToken, LogoutToken, Parties};
use crate::config::confidential_url;
use crate::config::model::{self, UserInfo};
use crate::config::value::Secret;

/// One provider, as the operator describes it and as it describes itself.
#[derive(Debug)]
pub(super) struct Provider {
    pub(super) name: String,
    pub(super) title: String,
    pub(super) issuer: String,
    pub(super) client_id: String,
    client_secret: Option<Secret>,
    scope: String,
    prompt: Option<String>,
    parameters: Vec<(String, String)>,
    pub(super) mapping: Mapping,
    userinfo: UserInfo,
    /// Keep access and refresh tokens.
    pub(super) keeps_tokens: bool,
    pub(super) logs_out: bool,
    pub(super) frontchannel_logout: bool,
    pub(super) seal: Seal,
    fetcher: Fetcher,
    known: ArcSwapOption<Known>,
    asking: Arc<Mutex<Asking>>,
    /// As the operator wrote it: a reload that leaves it as it is leaves all of this as it is.
    pub(super) config: model::OidcLogin,
}

/// What a provider says of itself.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) metadata: Metadata,
    keys: Keys,
    since: Instant,
}

/// OpenID Connect Discovery 1.0, section 3; RFC 9207, section 3; RP-Initiated Logout 1.0, section 2.1.
#[derive(Debug, Deserialize)]
pub(super) struct Metadata {
    issuer: String,
    pub(super) authorization_endpoint: String,
    token_endpoint: String,
    jwks_uri: String,
    userinfo_endpoint: Option<String>,
    pub(super) end_session_endpoint: Option<String>,
    #[serde(default)]
    pub(super) authorization_response_iss_parameter_supported: bool,
    #[serde(default)]
    token_endpoint_auth_methods_supported: Vec<String>,
    code_challenge_methods_supported: Option<Vec<String>>,
    scopes_supported: Option<Vec<String>>,
    id_token_signing_alg_values_supported: Option<Vec<String>>,
    #[serde(default)]
    backchannel_logout_supported: bool,
}

/// The token endpoint's answer (RFC 6749, section 5.1).
#[derive(Deserialize)]
pub(super) struct Tokens {
    pub(super) id_token: Option<String>,
    pub(super) access_token: Option<String>,
    pub(super) refresh_token: Option<String>,
    token_type: Option<String>,
    expires_in: Option<Value>,
}

/// What an authorization request says besides who we are.
pub(super) struct Authorization<'a> {
    pub(super) redirect_uri: &'a str,
    pub(super) state: &'a str,
    pub(super) nonce: &'a str,
    pub(super) code_challenge: &'a str,
    pub(super) acr: &'a [String],
    /// In s.
    pub(super) max_age: Option<u64>,
}

/// When the provider was asked last, and how that went.
#[derive(Debug, Default)]
struct Asking {
    failed: Option<Instant>,
    keys_renewed: Option<Instant>,
}

/// How long metadata and keys are used before they are asked for again.
const FRESH: Duration = Duration::from_secs(3600);
/// After a failure, everybody gets it for so long: a provider that comes back is not met by all who waited.
const FAILURE_KEPT: Duration = Duration::from_secs(2);
/// Between two fetches of keys because of an unknown one.
const KEYS_PAUSE: Duration = Duration::from_secs(60);

impl Provider {
    pub(super) fn new(name: &str, config: &model::OidcLogin, seal: Seal, fetcher: Fetcher) -> Self {
        let scopes = config.scopes.iter().map(|scope| scope.get_ref().as_str());
        let parameters: BTreeMap<_, _> =
            config.parameters.iter().map(|(name, value)| (name.get_ref().clone(), value.clone())).collect();
        Self {
            name: name.to_owned(),
            title: config.title.clone().unwrap_or_else(|| name.to_owned()),
            issuer: config.issuer.get_ref().clone(),
            client_id: config.client_id.get_ref().clone(),
            client_secret: config.client_secret.as_ref().map(|secret| secret.get_ref().clone()),
            scope: scopes.collect::<Vec<_>>().join(" "),
            prompt: config.prompt.as_ref().map(|prompt| prompt.get_ref().clone()),
            parameters: parameters.into_iter().collect(),
            mapping: Mapping::new(config),
            userinfo: config.userinfo,
            keeps_tokens: config.tokens,
            logs_out: config.logout,
            frontchannel_logout: config.frontchannel_logout,
            seal,
            fetcher,
            known: ArcSwapOption::empty(),
            asking: Arc::default(),
            config: config.clone(),
        }
    }

    /// Its metadata and keys. Only who is the first to need them waits; older ones are fetched anew meanwhile.
    pub(super) async fn known(self: &Arc<Self>) -> Result<Arc<Known>, ProviderError> {
        let Some(known) = self.known.load_full() else {
            let mut asking = self.asking.lock().await;
            return match self.known.load_full() {
                Some(known) => Ok(known),
                None => self.learn(&mut asking).await,
            };
        };
        if FRESH <= known.since.elapsed()
            && let Ok(mut asking) = Arc::clone(&self.asking).try_lock_owned()
        {
            let provider = Arc::clone(self);
            tokio::spawn(async move { provider.learn(&mut asking).await });
        }
        Ok(known)
    }

    async fn learn(&self, asking: &mut Asking) -> Result<Arc<Known>, ProviderError> {
        if asking.failed.is_some_and(|failed| failed.elapsed() < FAILURE_KEPT) {
            return Err(ProviderError::Away("it failed a moment ago".to_owned()));
        }
        match self.fetch().await {
            Ok(known) => {
                asking.failed = None;
                let known = Arc::new(known);
                self.known.store(Some(Arc::clone(&known)));
                Ok(known)
            }
            Err(error) => {
                asking.failed = Some(Instant::now());
                let has_older = self.known.load().is_some();
                warn!(provider = self.name, %error, has_older, "provider does not say what it is");
                Err(error)
            }
        }
    }

    /// Where the browser is sent for a login (OpenID Connect Core 1.0, section 3.1.2.1; RFC 7636, section 4.3).
    pub(super) fn authorization_url(&self, known: &Known, asked: &Authorization<'_>) -> String {
        let mut query = Serializer::new(String::new());
        query.extend_pairs([
            ("response_type", "code"),
            ("client_id", &self.client_id),
            ("redirect_uri", asked.redirect_uri),
            ("scope", &self.scope),
            ("state", asked.state),
            ("nonce", asked.nonce),
            ("code_challenge", asked.code_challenge),
            ("code_challenge_method", "S256"),
        ]);
        if let Some(prompt) = &self.prompt {
            query.append_pair("prompt", prompt);
        }
        if !asked.acr.is_empty() {
            query.append_pair("acr_values", &asked.acr.join(" "));
        }
        if let Some(max_age) = asked.max_age {
            query.append_pair("max_age", &max_age.to_string());
        }
        query.extend_pairs(&self.parameters);
        with_query(&known.metadata.authorization_endpoint, &query.finish())
    }

    /// Redeems a code (OpenID Connect Core 1.0, section 3.1.3).
    pub(super) async fn redeem(
        self: &Arc<Self>,
        code: &str,
        redirect_uri: &str,
        verifier: &str,
    ) -> Result<Tokens, ProviderError> {
        let grant = [
            ("grant_type", "authorization_code"),
            ("code", code),
            ("redirect_uri", redirect_uri),
            ("code_verifier", verifier),
        ];
        self.tokens(&grant).await
    }

    /// New tokens for a refresh token (OpenID Connect Core 1.0, section 12).
    pub(super) async fn refresh(self: &Arc<Self>, refresh_token: &str) -> Result<Tokens, ProviderError> {
        self.tokens(&[("grant_type", "refresh_token"), ("refresh_token", refresh_token)]).await
    }

    /// An ID token that keeps every rule.
    pub(super) async fn id_token(
        self: &Arc<Self>,
        token: &str,
        now: u64,
        asked: &Asked<'_>,
    ) -> Result<IdToken, ProviderError> {
        let signed = self.verify(token).await?;
        IdToken::check(signed, &self.parties(now), asked).map_err(ProviderError::Token)
    }

    /// A logout token that keeps every rule. Whether it came before is for the store to say.
    pub(super) async fn logout_token(self: &Arc<Self>, token: &str, now: u64) -> Result<LogoutToken, ProviderError> {
        let signed = self.verify(token).await?;
        LogoutToken::check(signed, &self.parties(now)).map_err(ProviderError::Token)
    }

    /// All claims of the user `subject`: those that the ID token `said`, and where that is asked for those of the UserInfo
    /// endpoint that the ID token lacks (OpenID Connect Core 1.0, section 5.3).
    pub(super) async fn claims(
        self: &Arc<Self>,
        subject: &str,
        said: &Map<String, Value>,
        access_token: Option<&str>,
        now: u64,
    ) -> Result<Map<String, Value>, ProviderError> {
        let mut claims = said.clone();
        let asks = match self.userinfo {
            UserInfo::Never => false,
            UserInfo::WhenMissing => self.mapping.lacks(&claims),
            UserInfo::Always => true,
        };
        let known = self.known().await?;
        let (true, Some(endpoint), Some(token)) = (asks, &known.metadata.userinfo_endpoint, access_token) else {
            return Ok(claims);
        };
        let answer = self.fetcher.get(endpoint, Some(token)).await?;
        let further = match answer.jwt() {
            Some(signed) => {
                let further = self.verify(signed).await?.claims;
                self.parties(now).check_names(&further).map_err(ProviderError::Token)?;
                further
            }
            None => answer.json()?,
        };
        // Section 5.3.2: else one user's token could bring another user's claims.
        if further.get("sub").and_then(Value::as_str) != Some(subject) {
            return Err(ProviderError::Wrong("UserInfo is about another user".to_owned()));
        }
        add_userinfo(&mut claims, further);
        Ok(claims)
    }

    /// What is wrong or odd with the provider, asked now; and what was found.
    pub(super) async fn inspect(&self) -> Result<Vec<String>, ProviderError> {
        let Known { metadata, keys, .. } = self.fetch().await?;
        let mut remarks = Vec::new();
        match &metadata.code_challenge_methods_supported {
            Some(methods) if methods.iter().any(|method| method == "S256") => {}
            Some(_) | None => remarks.push("it does not say that it knows PKCE with S256".to_owned()),
        }
        if keys.is_empty() {
            remarks.push("it shows no key that we can use".to_owned());
        }
        if let Some(algorithms) = &metadata.id_token_signing_alg_values_supported
            && !algorithms.iter().any(|name| jws::is_known(name))
        {
            remarks.push(format!("it signs in none of the ways that we know: {}", algorithms.join(", ")));
        }
        if let Some(known) = &metadata.scopes_supported {
            let unknown = self.scope.split(' ').filter(|scope| !known.iter().any(|other| other == scope));
            remarks.extend(unknown.map(|scope| format!("it does not know the scope {scope:?}")));
        }
        self.show_ourselves(&metadata, &mut Vec::new())?;
        if self.logs_out && metadata.end_session_endpoint.is_none() {
            remarks.push("it has no end_session_endpoint: a logout ends our session only".to_owned());
        }
        if !metadata.backchannel_logout_supported {
            remarks.push("it does not offer back-channel logout: a logout elsewhere is not heard of".to_owned());
        }
        Ok(remarks)
    }

    fn parties(&self, now: u64) -> Parties<'_> {
        Parties { issuer: &self.issuer, client_id: &self.client_id, now }
    }

    async fn fetch(&self) -> Result<Known, ProviderError> {
        // Discovery 1.0, section 4: a final slash of the issuer is not doubled.
        let url = format!("{}/.well-known/openid-configuration", self.issuer.trim_end_matches('/'));
        let metadata = self.fetcher.get(&url, None).await?.json()?;
        let metadata = Metadata::deserialize(Value::Object(metadata))
            .map_err(|error| ProviderError::Wrong(format!("its metadata: {error}")))?;
        // Section 4.3: else anybody's metadata could pass for this provider's.
        if metadata.issuer != self.issuer {
            return Err(ProviderError::Wrong(format!("it calls itself {:?}, not {:?}", metadata.issuer, self.issuer)));
        }
        let Metadata { authorization_endpoint, token_endpoint, jwks_uri, .. } = &metadata;
        let endpoints = [authorization_endpoint, token_endpoint, jwks_uri].into_iter();
        for url in endpoints.chain(&metadata.userinfo_endpoint).chain(&metadata.end_session_endpoint) {
            confidential_url(url).map_err(|fault| ProviderError::Wrong(format!("its endpoint {url:?}: {fault}")))?;
        }
        let keys = self.fetch_keys(&metadata).await?;
        Ok(Known { metadata, keys, since: Instant::now() })
    }

    async fn fetch_keys(&self, metadata: &Metadata) -> Result<Keys, ProviderError> {
        let answer = self.fetcher.get(&metadata.jwks_uri, None).await?;
        // `application/jwk-set+json` by RFC 7517, and in practice whatever the file server says.
        let set = Answer { content_type: "application/json".to_owned(), ..answer }.json()?;
        Keys::parse(&set).ok_or_else(|| ProviderError::Wrong("its keys are no JWK Set".to_owned()))
    }

    /// Whoever has signed with a key that is not known may have a new one.
    async fn verify(self: &Arc<Self>, token: &str) -> Result<Signed, ProviderError> {
        let known = self.known().await?;
        let error = match known.keys.verify(token) {
            // The second, because a provider without key ids changes its key unnoticed.
            Err(error @ (SignatureError::UnknownKey | SignatureError::Wrong)) => error,
            verified => return verified.map_err(ProviderError::Signature),
        };
        match self.renew_keys(&known).await {
            Ok(Some(renewed)) => renewed.keys.verify(token).map_err(ProviderError::Signature),
            Ok(None) if error == SignatureError::Wrong => Err(ProviderError::Signature(error)),
            // Whether there is such a key by now, nobody has seen: no reason to believe the token, nor to call it bad.
            Ok(None) => Err(ProviderError::Away("a key is unknown, and others were a moment ago".to_owned())),
            Err(error) => Err(ProviderError::Away(format!("a key is unknown, and its keys cannot be had: {error}"))),
        }
    }

    /// Newer keys than these; none when they were renewed a moment ago.
    async fn renew_keys(&self, known: &Arc<Known>) -> Result<Option<Arc<Known>>, ProviderError> {
        let mut asking = self.asking.lock().await;
        if let Some(newer) = self.known.load_full().filter(|newer| !Arc::ptr_eq(newer, known)) {
            return Ok(Some(newer));
        }
        if asking.keys_renewed.is_some_and(|renewed| renewed.elapsed() < KEYS_PAUSE) {
            return Ok(None);
        }
        let renewed = self.learn(&mut asking).await?;
        asking.keys_renewed = Some(Instant::now());
        Ok(Some(renewed))
    }

    async fn tokens(self: &Arc<Self>, grant: &[(&str, &str)]) -> Result<Tokens, ProviderError> {
        let known = self.known().await?;
        let mut form = grant.to_vec();
        let authorization = self.show_ourselves(&known.metadata, &mut form)?;
        let answer = self.fetcher.post(&known.metadata.token_endpoint, &form, authorization).await?;
        if (400..500).contains(&answer.status) {
            // RFC 6749, section 5.2.
            let said = serde_json::from_slice::<Value>(&answer.body).unwrap_or_default();
            let error = said.get("error").and_then(Value::as_str).unwrap_or_default();
            return Err(ProviderError::Refused(super::error_code(error)));
        }
        let tokens = Tokens::deserialize(Value::Object(answer.json()?))
            .map_err(|error| ProviderError::Wrong(format!("its token answer: {error}")))?;
        // A token of another kind would be no use as one that its bearer may use.
        if tokens.access_token.is_some()
            && !tokens.token_type.as_deref().is_some_and(|kind| kind.eq_ignore_ascii_case("bearer"))
        {
            return Err(ProviderError::Wrong("its access token is no bearer token".to_owned()));
        }
        Ok(tokens)
    }

    /// How the token endpoint knows us: the value of `Authorization`, or fields of the form (OpenID Connect Core 1.0,
    /// section 9; where the provider says nothing, it is the first of these).
    fn show_ourselves<'f>(
        &'f self,
        metadata: &Metadata,
        form: &mut Vec<(&'f str, &'f str)>,
    ) -> Result<Option<String>, ProviderError> {
        let Some(secret) = &self.client_secret else {
            form.push(("client_id", &self.client_id));
            return Ok(None);
        };
        let methods = &metadata.token_endpoint_auth_methods_supported;
        let knows = |wanted: &str| methods.iter().any(|method| method == wanted);
        if methods.is_empty() || knows("client_secret_basic") {
            // RFC 6749, section 2.3.1: both encoded as in a form, before they are joined.
            let encoded = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
            let pair = format!("{}:{}", encoded(&self.client_id), encoded(secret.expose()));
            Ok(Some(format!("Basic {}", STANDARD.encode(pair))))
        } else if knows("client_secret_post") {
            form.extend([("client_id", self.client_id.as_str()), ("client_secret", secret.expose())]);
            Ok(None)
        } else {
            Err(ProviderError::Wrong(format!("it takes no client secret, but {}", methods.join(", "))))
        }
    }
}

impl Tokens {
    /// When the access token ends, Unix time in ms.
    pub(super) fn access_ends(&self, now: u64) -> Option<u64> {
        self.access_token.as_ref()?;
        let seconds = match self.expires_in.as_ref()? {
            Value::String(text) => text.parse().ok()?, // as Entra once wrote it
            number => number.as_u64()?,
        };
        Some(now.saturating_mul(1000).saturating_add(seconds.saturating_mul(1000)))
    }
}

/// An endpoint may have a query of its own (RFC 6749, section 3.1).
pub(super) fn with_query(endpoint: &str, query: &str) -> String {
    let separator = if endpoint.contains('?') { '&' } else { '?' };
    format!("{endpoint}{separator}{query}")
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tokens(..)")
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::sync::mpsc;

    use super::*;

    fn provider(issuer: &str) -> Arc<Provider> {
        let config = toml::from_str(&format!("issuer = {issuer:?}\nclient_id = \"us\"")).unwrap();
        let fetcher = Fetcher::new(Fetcher::agent(false));
        Arc::new(Provider::new("p", &config, Seal::new(None, None).unwrap(), fetcher))
    }

    fn known(issuer: &str, since: Instant) -> Arc<Known> {
        let metadata = serde_json::json!({
            "issuer": issuer, "authorization_endpoint": issuer, "token_endpoint": issuer, "jwks_uri": issuer,
        });
        Arc::new(Known { metadata: Metadata::deserialize(metadata).unwrap(), keys: Keys::default(), since })
    }

    #[tokio::test]
    async fn nobody_waits_for_newer_metadata_and_one_asks_for_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let issuer = format!("http://{}", listener.local_addr().unwrap());
        let provider = provider(&issuer);
        let older = known(&issuer, Instant::now().checked_sub(FRESH).unwrap());
        provider.known.store(Some(Arc::clone(&older)));
        for _ in 0..10 {
            // Nobody answers yet.
            assert!(Arc::ptr_eq(&provider.known().await.unwrap(), &older));
        }
        let (told, questions) = mpsc::channel();
        let answering = std::thread::spawn(move || {
            for _ in 0..2 {
                let (mut connection, _) = listener.accept().unwrap();
                let mut head = [0; 4096];
                let read = connection.read(&mut head).unwrap();
                told.send(String::from_utf8_lossy(&head[..read]).lines().next().unwrap().to_owned()).unwrap();
                let url = format!("http://{}", listener.local_addr().unwrap());
                let body = serde_json::json!({
                    "issuer": url, "authorization_endpoint": url, "token_endpoint": url, "jwks_uri": url, "keys": [],
                })
                .to_string();
                let head = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length";
                write!(connection, "{head}: {}\r\n\r\n{body}", body.len()).unwrap();
            }
        });
        while Arc::ptr_eq(&provider.known().await.unwrap(), &older) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        answering.join().unwrap();
        let questions: Vec<_> = questions.iter().collect();
        assert_eq!(questions, ["GET /.well-known/openid-configuration HTTP/1.1", "GET / HTTP/1.1"]);
    }

    #[tokio::test]
    async fn keys_that_cannot_be_had_condemn_no_token() {
        let nobody = "http://127.0.0.1:1";
        let provider = provider(nobody);
        provider.known.store(Some(known(nobody, Instant::now())));
        // {"alg":"ES256","kid":"k"}
        let verified = provider.verify("eyJhbGciOiJFUzI1NiIsImtpZCI6ImsifQ.e30.AAAA").await;
        assert!(matches!(verified, Err(ProviderError::Away(_))), "{verified:?}");
        provider.asking.lock().await.keys_renewed = Some(Instant::now());
        let verified = provider.verify("eyJhbGciOiJFUzI1NiIsImtpZCI6ImsifQ.e30.AAAA").await;
        assert!(matches!(verified, Err(ProviderError::Away(_))), "{verified:?}");
    }
}
