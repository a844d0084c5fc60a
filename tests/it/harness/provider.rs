//! Who says who somebody is? An OpenID Connect provider that keeps the rules, until a test says which one it breaks.
//!
//! It signs real tokens with real keys, and checks what a provider checks: the client's secret, the redirect URI, PKCE,
//! and that a code is used once. What a person would do on its pages, [`FakeProvider::authorize`] does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::SystemTime;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use ring::rand::SystemRandom;
use ring::rsa::KeyPair as RsaPair;
use ring::signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair};
use serde_json::{Value, json};
use sha2::{Digest, Sha256, Sha384, Sha512};

use super::backend::{Answer, Backend, Request};

pub(crate) const CLIENT_ID: &str = "cloakroom-of-the-tests";
pub(crate) const CLIENT_SECRET: &str = "uZ3kq9-a-secret-of-the-tests-7Vb1";

/// What a test changes about an answer.
pub(crate) type Change = Arc<dyn Fn(&mut Value) + Send + Sync>;

/// How a token is signed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Signing {
    #[default]
    Es256,
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es384,
    EdDsa,
    /// `alg: none`, and no signature.
    None,
    /// With the client's secret as the key.
    Hs256,
    /// With the published key as a shared secret: the oldest trick against careless verifiers.
    Hs256OfPublicKey,
    /// By a key that nobody has published, under the published one's id.
    Impostor,
    /// One bit of a good signature is another.
    Damaged,
}

/// How this provider deviates from the rules. By default not at all.
#[derive(Clone, Default)]
pub(crate) struct Script {
    pub(crate) metadata: Option<Change>,
    pub(crate) keys: Option<Change>,
    pub(crate) header: Option<Change>,
    pub(crate) claims: Option<Change>,
    pub(crate) userinfo: Option<Change>,
    /// The UserInfo endpoint's answer is a token, signed like this.
    pub(crate) userinfo_signing: Option<Signing>,
    /// The token endpoint's answer, to a code or to a refresh.
    pub(crate) tokens: Option<Change>,
    /// The parameters of the callback, as an object.
    pub(crate) callback: Option<Change>,
    pub(crate) signing: Signing,
    /// How long ago the user logged in here, in s; whoever asks for a fresh login gets one.
    pub(crate) logged_in_ago: u64,
    /// All answers of these paths are this status with an empty object.
    pub(crate) failing: BTreeMap<&'static str, u16>,
    /// Answers of these paths come with a [`FakeProvider::step`] each.
    pub(crate) waiting: BTreeSet<&'static str>,
}

/// Runs until it is dropped.
pub(crate) struct FakeProvider {
    backend: Backend,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
}

struct State {
    script: Script,
    issuer: String,
    user: Value,
    keys: SigningKeys,
    /// By code.
    codes: BTreeMap<String, Value>,
    refresh_tokens: BTreeMap<String, Value>,
    counter: u64,
}

struct SigningKeys {
    es256: EcdsaKeyPair,
    es384: EcdsaKeyPair,
    impostor: EcdsaKeyPair,
    ed25519: Ed25519KeyPair,
    /// Changes with each rotation.
    generation: u64,
}

/// Made once per process: it takes a while.
static RSA: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let arguments = ["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-outform", "DER"];
    let made = std::process::Command::new("openssl").args(arguments).output().expect("openssl makes a key");
    assert!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
    made.stdout
});

impl FakeProvider {
    pub(crate) fn start() -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                script: Script::default(),
                issuer: String::new(),
                user: json!({
                    "sub": "248289761001", "preferred_username": "ann", "name": "Ann Archer", "email": "ann@example.org",
                    "email_verified": true, "groups": ["staff"], "sid": "session-of-ann",
                }),
                keys: SigningKeys::generate(0),
                codes: BTreeMap::new(),
                refresh_tokens: BTreeMap::new(),
                counter: 0,
            }),
        });
        let answering = Arc::clone(&shared);
        let backend = Backend::answering(move |request| answering.answer(request));
        shared.state.lock().unwrap().issuer = format!("http://{}", backend.address());
        Self { backend, shared }
    }

    pub(crate) fn issuer(&self) -> String {
        self.shared.state.lock().unwrap().issuer.clone()
    }

    /// A table for the configuration; `keys` are further lines of it.
    pub(crate) fn table(&self, name: &str, keys: &str) -> String {
        format!(
            "[login.oidc.{name}]\nissuer = \"{}\"\nclient_id = \"{CLIENT_ID}\"\nclient_secret = \"{CLIENT_SECRET}\"\n{keys}\n",
            self.issuer()
        )
    }

    /// From now on it breaks these rules, and no others.
    pub(crate) fn play(&self, script: Script) {
        self.shared.state.lock().unwrap().script = script;
    }

    /// Changes who the user is, or what is known of them.
    pub(crate) fn with_user(&self, change: impl Fn(&mut Value)) {
        change(&mut self.shared.state.lock().unwrap().user);
    }

    /// New signing keys, under new ids; the old ones are not shown any more.
    pub(crate) fn rotate_keys(&self) {
        let keys = &mut self.shared.state.lock().unwrap().keys;
        *keys = SigningKeys::generate(keys.generation + 1);
    }

    /// Nobody answers any more, as if the machine were gone.
    pub(crate) fn go_away(&self) {
        self.backend.kill();
    }

    /// Lets one answer of [`Script::waiting`] go.
    pub(crate) fn step(&self) {
        self.backend.step();
    }

    pub(crate) fn come_back(&self) {
        self.backend.revive();
    }

    /// What the user does who is sent here: logs in, and is sent back. The address of the callback.
    #[track_caller]
    pub(crate) fn authorize(&self, location: &str) -> String {
        let query = location.split_once('?').unwrap_or_else(|| panic!("no query: {location}")).1;
        let asked: BTreeMap<String, String> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        assert!(location.starts_with(&format!("{}/authorize?", self.issuer())), "sent to the provider: {location}");
        for (name, value) in [("response_type", "code"), ("client_id", CLIENT_ID), ("code_challenge_method", "S256")] {
            assert_eq!(asked.get(name).map(String::as_str), Some(value), "the request says {name}: {location}");
        }
        assert!(asked["scope"].split(' ').any(|scope| scope == "openid"), "{location}");
        assert!(22 <= asked["state"].len() && 22 <= asked["nonce"].len(), "128 bits each: {location}");
        self.shared.state.lock().unwrap().send_back(&asked)
    }

    /// A token that says: this user, or this session of the provider's, has logged out.
    pub(crate) fn logout_token(&self, change: impl Fn(&mut Value)) -> String {
        let mut state = self.shared.state.lock().unwrap();
        let now = now();
        let mut claims = json!({
            "iss": state.issuer, "aud": CLIENT_ID, "iat": now, "exp": now + 120, "jti": state.next("jti"),
            "sub": state.user["sub"], "sid": state.user["sid"],
            "events": { "http://schemas.openid.net/event/backchannel-logout": {} },
        });
        change(&mut claims);
        state.sign("logout+jwt", &claims, state.script.signing)
    }

    /// How often a path was asked for, or a grant used, e.g. `grant_type=refresh_token`.
    pub(crate) fn count(&self, wanted: &str) -> usize {
        let has = |request: &Request| {
            request.target().starts_with(wanted) || String::from_utf8_lossy(&request.body).contains(wanted)
        };
        self.backend.requests().iter().filter(|request| has(request)).count()
    }
}

/// What was drawn changes the object: `set("sub", "x")`.
pub(crate) fn set(name: &'static str, value: impl Into<Value>) -> Option<Change> {
    let value = value.into();
    Some(Arc::new(move |object: &mut Value| object[name] = value.clone()))
}

pub(crate) fn remove(name: &'static str) -> Option<Change> {
    Some(Arc::new(move |object: &mut Value| drop(object.as_object_mut().unwrap().remove(name))))
}

impl Shared {
    fn answer(&self, request: &Request) -> Answer {
        let mut state = self.state.lock().unwrap();
        let path = request.target().split('?').next().unwrap_or_default().to_owned();
        let is_waiting = state.script.waiting.contains(path.as_str());
        let answer = state.answer(request, &path);
        if is_waiting { Answer::AfterStep(Box::new(answer)) } else { answer }
    }
}

impl State {
    fn answer(&mut self, request: &Request, path: &str) -> Answer {
        if let Some(status) = self.script.failing.get(path) {
            return json_answer(*status, &json!({ "error": "invalid_grant" }));
        }
        match path {
            "/.well-known/openid-configuration" => json_answer(200, &self.metadata()),
            "/jwks" => json_answer(200, &self.published_keys()),
            "/token" => self.token(request),
            "/authorize" => {
                let query = request.target().split_once('?').unwrap_or_default().1;
                let asked: BTreeMap<String, String> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
                if asked.contains_key("max_age") && !asked.contains_key("proved") {
                    let page = format!(
                        "<!DOCTYPE html><html lang=\"en\"><title>The provider</title><h1>Is it you?</h1>\
                         <a href=\"/authorize?{}&amp;proved=yes\">It is me</a></html>",
                        query.replace('&', "&amp;")
                    );
                    return Answer::response(200, &[("content-type", "text/html")], page);
                }
                Answer::response(303, &[("location", &self.send_back(&asked))], "")
            }
            "/userinfo" => {
                let mut user = self.user.clone();
                if self.script.userinfo_signing.is_some() {
                    (user["iss"], user["aud"]) = (self.issuer.clone().into(), CLIENT_ID.into());
                }
                if !request.head.values("authorization").iter().any(|value| value.starts_with("Bearer access-")) {
                    return json_answer(401, &json!({}));
                }
                if let Some(change) = &self.script.userinfo {
                    change(&mut user);
                }
                match self.script.userinfo_signing {
                    Some(signing) => {
                        let signed = self.sign("JWT", &user, signing);
                        Answer::response(200, &[("content-type", "application/jwt")], signed)
                    }
                    None => json_answer(200, &user),
                }
            }
            _ => json_answer(404, &json!({})),
        }
    }

    fn next(&mut self, what: &str) -> String {
        self.counter += 1;
        format!("{what}-{}", self.counter)
    }

    /// The address of the callback that this request is answered with.
    fn send_back(&mut self, asked: &BTreeMap<String, String>) -> String {
        let code = self.next("code");
        let mut parameters = json!({ "code": code, "state": asked["state"] });
        self.codes.insert(code, json!(asked));
        if let Some(change) = &self.script.callback {
            change(&mut parameters);
        }
        let mut query = form_urlencoded::Serializer::new(String::new());
        for (name, value) in parameters.as_object().unwrap() {
            let several = value.as_array().cloned().unwrap_or_else(|| vec![value.clone()]);
            query.extend_pairs(several.iter().filter_map(Value::as_str).map(|value| (name, value)));
        }
        format!("{}?{}", asked["redirect_uri"], query.finish())
    }

    fn metadata(&self) -> Value {
        let issuer = &self.issuer;
        let mut metadata = json!({
            "issuer": issuer,
            "authorization_endpoint": format!("{issuer}/authorize"),
            "token_endpoint": format!("{issuer}/token"),
            "jwks_uri": format!("{issuer}/jwks"),
            "userinfo_endpoint": format!("{issuer}/userinfo"),
            "end_session_endpoint": format!("{issuer}/end-session"),
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            "code_challenge_methods_supported": ["S256"],
            "scopes_supported": ["openid", "profile", "email", "offline_access"],
            "id_token_signing_alg_values_supported": ["ES256", "RS256", "EdDSA"],
            "backchannel_logout_supported": true,
        });
        if let Some(change) = &self.script.metadata {
            change(&mut metadata);
        }
        metadata
    }

    fn published_keys(&self) -> Value {
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let generation = self.keys.generation;
        let point = self.keys.es256.public_key().as_ref();
        let mut keys = vec![
            json!({ "kty": "EC", "crv": "P-256", "kid": format!("es-{generation}"), "use": "sig", "alg": "ES256",
                    "x": encode(&point[1..33]), "y": encode(&point[33..]) }),
            json!({ "kty": "OKP", "crv": "Ed25519", "kid": format!("ed-{generation}"), "use": "sig",
                    "x": encode(self.keys.ed25519.public_key().as_ref()) }),
        ];
        if self.script.signing.rsa_padding().is_some() {
            let pair = rsa_pair();
            let public = signature::RsaPublicKeyComponents::<Vec<u8>>::from(pair.public());
            keys.push(
                json!({ "kty": "RSA", "kid": "rsa", "use": "sig", "n": encode(&public.n), "e": encode(&public.e) }),
            );
        }
        if self.script.signing == Signing::Es384 {
            let point = self.keys.es384.public_key().as_ref();
            keys.push(json!({ "kty": "EC", "crv": "P-384", "kid": "es384", "x": encode(&point[1..49]),
                              "y": encode(&point[49..]) }));
        }
        let mut set = json!({ "keys": keys });
        if let Some(change) = &self.script.keys {
            change(&mut set);
        }
        set
    }

    fn token(&mut self, request: &Request) -> Answer {
        let expected = format!("Basic {}", STANDARD.encode(format!("{CLIENT_ID}:{CLIENT_SECRET}")));
        if request.head.values("authorization") != [expected.as_str()] {
            return json_answer(401, &json!({ "error": "invalid_client" }));
        }
        let form: BTreeMap<String, String> = form_urlencoded::parse(&request.body).into_owned().collect();
        let refused = json_answer(400, &json!({ "error": "invalid_grant" }));
        let field = |name: &str| form.get(name).cloned().unwrap_or_default();
        let asked = match field("grant_type").as_str() {
            "authorization_code" => {
                let Some(asked) = self.codes.remove(&field("code")) else { return refused };
                let challenge = URL_SAFE_NO_PAD.encode(Sha256::digest(field("code_verifier")));
                if asked["code_challenge"] != challenge || asked["redirect_uri"] != field("redirect_uri") {
                    return refused;
                }
                asked
            }
            "refresh_token" => {
                // Each is good for once (RFC 9700, section 4.14).
                let Some(asked) = self.refresh_tokens.remove(&field("refresh_token")) else { return refused };
                asked
            }
            _ => return refused,
        };
        let is_refresh = field("grant_type") == "refresh_token";
        let (access, refresh) = (self.next("access"), self.next("refresh"));
        let now = now();
        let mut claims = self.user.clone();
        let is_fresh = asked.get("max_age").is_some();
        let standard = json!({
            "iss": self.issuer, "aud": CLIENT_ID, "exp": now + 300, "iat": now,
            "auth_time": if is_fresh { now } else { now - self.script.logged_in_ago },
            "at_hash": self.script.signing.half_of_hash(&access),
        });
        for (name, value) in standard.as_object().unwrap() {
            claims[name] = value.clone();
        }
        if !is_refresh {
            claims["nonce"] = asked["nonce"].clone();
        }
        if let Some(acr) = asked["acr_values"].as_str() {
            claims["acr"] = acr.split(' ').next().into();
        }
        if let Some(change) = &self.script.claims {
            change(&mut claims);
        }
        let mut answer = json!({
            "access_token": access, "token_type": "Bearer", "expires_in": 3600, "refresh_token": refresh,
            "id_token": self.sign("JWT", &claims, self.script.signing),
        });
        self.refresh_tokens.insert(refresh, asked);
        if let Some(change) = &self.script.tokens {
            change(&mut answer);
        }
        json_answer(200, &answer)
    }

    fn sign(&self, kind: &str, claims: &Value, signing: Signing) -> String {
        let keys = &self.keys;
        let (algorithm, id) = match signing {
            Signing::Es256 | Signing::Impostor | Signing::Damaged => ("ES256", format!("es-{}", keys.generation)),
            Signing::Rs256 => ("RS256", "rsa".to_owned()),
            Signing::Rs384 => ("RS384", "rsa".to_owned()),
            Signing::Rs512 => ("RS512", "rsa".to_owned()),
            Signing::Ps256 => ("PS256", "rsa".to_owned()),
            Signing::Ps384 => ("PS384", "rsa".to_owned()),
            Signing::Ps512 => ("PS512", "rsa".to_owned()),
            Signing::Es384 => ("ES384", "es384".to_owned()),
            Signing::EdDsa => ("EdDSA", format!("ed-{}", keys.generation)),
            Signing::None => ("none", String::new()),
            Signing::Hs256 | Signing::Hs256OfPublicKey => ("HS256", format!("es-{}", keys.generation)),
        };
        let mut header = json!({ "alg": algorithm, "typ": kind, "kid": id });
        if let Some(change) = &self.script.header {
            change(&mut header);
        }
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(&header), part(claims));
        let random = SystemRandom::new();
        let mac = |key: &[u8]| {
            let mac = Hmac::<Sha256>::new_from_slice(key).unwrap().chain_update(message.as_bytes());
            mac.finalize().into_bytes().to_vec()
        };
        let signature = match signing {
            Signing::Es256 => keys.es256.sign(&random, message.as_bytes()).unwrap().as_ref().to_vec(),
            Signing::Impostor => keys.impostor.sign(&random, message.as_bytes()).unwrap().as_ref().to_vec(),
            Signing::Damaged => {
                let mut signature = keys.es256.sign(&random, message.as_bytes()).unwrap().as_ref().to_vec();
                signature[10] ^= 1;
                signature
            }
            Signing::EdDsa => keys.ed25519.sign(message.as_bytes()).as_ref().to_vec(),
            Signing::Es384 => keys.es384.sign(&random, message.as_bytes()).unwrap().as_ref().to_vec(),
            Signing::Rs256 | Signing::Rs384 | Signing::Rs512 | Signing::Ps256 | Signing::Ps384 | Signing::Ps512 => {
                let (pair, padding) = (rsa_pair(), signing.rsa_padding().unwrap());
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(padding, &random, message.as_bytes(), &mut signature).unwrap();
                signature
            }
            Signing::None => Vec::new(),
            Signing::Hs256 => mac(CLIENT_SECRET.as_bytes()),
            Signing::Hs256OfPublicKey => mac(keys.es256.public_key().as_ref()),
        };
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

impl Signing {
    fn rsa_padding(self) -> Option<&'static dyn signature::RsaEncoding> {
        match self {
            Self::Rs256 => Some(&signature::RSA_PKCS1_SHA256),
            Self::Rs384 => Some(&signature::RSA_PKCS1_SHA384),
            Self::Rs512 => Some(&signature::RSA_PKCS1_SHA512),
            Self::Ps256 => Some(&signature::RSA_PSS_SHA256),
            Self::Ps384 => Some(&signature::RSA_PSS_SHA384),
            Self::Ps512 => Some(&signature::RSA_PSS_SHA512),
            _ => None,
        }
    }

    /// `at_hash` of an access token.
    fn half_of_hash(self, token: &str) -> String {
        let hash = match self {
            Self::Rs384 | Self::Ps384 | Self::Es384 => Sha384::digest(token).to_vec(),
            Self::Rs512 | Self::Ps512 | Self::EdDsa => Sha512::digest(token).to_vec(),
            _ => Sha256::digest(token).to_vec(),
        };
        URL_SAFE_NO_PAD.encode(&hash[..hash.len() / 2])
    }
}

impl SigningKeys {
    fn generate(generation: u64) -> Self {
        let random = SystemRandom::new();
        let ecdsa = |algorithm| {
            let document = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
            EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random).unwrap()
        };
        let document = Ed25519KeyPair::generate_pkcs8(&random).unwrap();
        let ed25519 = Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap();
        let [es256, impostor] = [(); 2].map(|()| ecdsa(&signature::ECDSA_P256_SHA256_FIXED_SIGNING));
        Self { es256, es384: ecdsa(&signature::ECDSA_P384_SHA384_FIXED_SIGNING), impostor, ed25519, generation }
    }
}

/// Versions of openssl differ in how they write a key.
fn rsa_pair() -> RsaPair {
    RsaPair::from_pkcs8(&RSA).or_else(|_| RsaPair::from_der(&RSA)).unwrap()
}

fn json_answer(status: u16, body: &Value) -> Answer {
    Answer::response(status, &[("content-type", "application/json"), ("cache-control", "no-store")], body.to_string())
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}
