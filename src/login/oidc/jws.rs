//! Did the provider sign this? Compact JWS with an asymmetric signature, under a key of the provider's own JWKS.
//!
//! Keys come from the `jwks_uri` alone: what a token says of its own key (`jwk`, `jku`, `x5u`, `x5c`) is not looked at.
//! `none` and the algorithms with a shared secret do not exist here.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::signature::{self, RsaPublicKeyComponents, UnparsedPublicKey};
use serde::Deserialize;
use serde_json::{Map, Value};

/// The public keys of a provider (RFC 7517).
#[derive(Debug, Default)]
pub(super) struct Keys(Vec<Key>);

/// A token whose signature is good; nothing else of it is known to be.
#[derive(Debug)]
pub(super) struct Signed {
    pub(super) algorithm: Algorithm,
    /// `typ`, in lower case and without `application/`.
    pub(super) kind: Option<String>,
    pub(super) claims: Map<String, Value>,
}

/// Why a token is not believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SignatureError {
    Malformed,
    /// `none`, a shared secret, or something unknown.
    Algorithm,
    /// The provider has no such key, as far as is known: it may have a new one.
    UnknownKey,
    /// Several keys would do, and the token does not say which.
    AmbiguousKey,
    Wrong,
}

/// RFC 7518, section 3.1, and RFC 8037.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    EdDsa,
}

#[derive(Debug)]
struct Key {
    id: Option<String>,
    /// The only one that it is for, where it says so.
    algorithm: Option<Algorithm>,
    material: Material,
}

#[derive(Debug)]
enum Material {
    Rsa { n: Vec<u8>, e: Vec<u8> },
    P256(Vec<u8>),
    P384(Vec<u8>),
    Ed25519(Vec<u8>),
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    typ: Option<String>,
    crit: Option<Value>,
}

/// Far more than an ID token with hundreds of groups.
const TOKEN_BYTES_MAX: usize = 64 * 1024;
const KEYS_MAX: usize = 64;

impl Keys {
    /// Those of a JWK Set that we can use; what is of no use here is left out (RFC 7517, section 5).
    pub(super) fn parse(set: &Map<String, Value>) -> Option<Self> {
        let keys = set.get("keys")?.as_array()?;
        Some(Self(keys.iter().take(KEYS_MAX).filter_map(Key::parse).collect()))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The claims of a token that one of these keys has signed.
    pub(super) fn verify(&self, token: &str) -> Result<Signed, SignatureError> {
        if TOKEN_BYTES_MAX < token.len() {
            return Err(SignatureError::Malformed);
        }
        let (message, signature) = token.rsplit_once('.').ok_or(SignatureError::Malformed)?;
        let (header, payload) = message.split_once('.').ok_or(SignatureError::Malformed)?;
        let header: Header = json_of(header)?;
        // None of the extensions that a token may insist on is known here (RFC 7515, section 4.1.11).
        if header.crit.is_some() {
            return Err(SignatureError::Malformed);
        }
        let algorithm = Algorithm::named(&header.alg).ok_or(SignatureError::Algorithm)?;
        let key = self.find(header.kid.as_deref(), algorithm)?;
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| SignatureError::Malformed)?;
        if !key.material.has_signed(algorithm, message.as_bytes(), &signature) {
            return Err(SignatureError::Wrong);
        }
        let kind = header.typ.map(|kind| {
            let kind = kind.to_ascii_lowercase();
            kind.strip_prefix("application/").map_or(kind.clone(), str::to_owned)
        });
        Ok(Signed { algorithm, kind, claims: json_of(payload)? })
    }

    /// Without a `kid` there must be one key only that fits (OpenID Connect Core 1.0, section 10.1).
    fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Result<&Key, SignatureError> {
        let fits = |key: &&Key| key.is_for(algorithm) && (id.is_none() || key.id.as_deref() == id);
        let mut fitting = self.0.iter().filter(fits);
        match (fitting.next(), fitting.next()) {
            (None, _) => Err(SignatureError::UnknownKey),
            (Some(key), None) => Ok(key),
            (Some(_), Some(_)) => Err(SignatureError::AmbiguousKey),
        }
    }
}

impl Key {
    fn parse(key: &Value) -> Option<Self> {
        let text = |name: &str| key.get(name).and_then(Value::as_str);
        let bytes = |name: &str| URL_SAFE_NO_PAD.decode(text(name)?).ok();
        if text("use").is_some_and(|usage| usage != "sig") {
            return None;
        }
        if let Some(operations) = key.get("key_ops").and_then(Value::as_array)
            && !operations.iter().any(|operation| operation == "verify")
        {
            return None;
        }
        // RFC 7518, section 6.2.1.2: each coordinate has its full length.
        let point = |length: usize| {
            let (x, y) = (bytes("x")?, bytes("y")?);
            (x.len() == length && y.len() == length).then(|| [&[4][..], &x, &y].concat())
        };
        let material = match (text("kty")?, text("crv")) {
            ("RSA", _) => Material::Rsa { n: bytes("n")?, e: bytes("e")? },
            ("EC", Some("P-256")) => Material::P256(point(32)?),
            ("EC", Some("P-384")) => Material::P384(point(48)?),
            ("OKP", Some("Ed25519")) => Material::Ed25519(bytes("x")?),
            (_, _) => return None,
        };
        let algorithm = match text("alg") {
            Some(name) => Some(Algorithm::named(name)?),
            None => None,
        };
        Some(Self { id: text("kid").map(str::to_owned), algorithm, material })
    }

    fn is_for(&self, algorithm: Algorithm) -> bool {
        self.algorithm.is_none_or(|only| only == algorithm) && self.material.verification(algorithm).is_some()
    }
}

/// What checks a signature of one algorithm.
enum Verification {
    Rsa(&'static signature::RsaParameters),
    Other(&'static dyn signature::VerificationAlgorithm),
}

impl Material {
    /// Nothing, when keys of this kind do not sign like that.
    fn verification(&self, algorithm: Algorithm) -> Option<Verification> {
        use Algorithm::{EdDsa, Es256, Es384, Ps256, Ps384, Ps512, Rs256, Rs384, Rs512};
        match (self, algorithm) {
            (Self::Rsa { .. }, Rs256) => Some(Verification::Rsa(&signature::RSA_PKCS1_2048_8192_SHA256)),
            (Self::Rsa { .. }, Rs384) => Some(Verification::Rsa(&signature::RSA_PKCS1_2048_8192_SHA384)),
            (Self::Rsa { .. }, Rs512) => Some(Verification::Rsa(&signature::RSA_PKCS1_2048_8192_SHA512)),
            (Self::Rsa { .. }, Ps256) => Some(Verification::Rsa(&signature::RSA_PSS_2048_8192_SHA256)),
            (Self::Rsa { .. }, Ps384) => Some(Verification::Rsa(&signature::RSA_PSS_2048_8192_SHA384)),
            (Self::Rsa { .. }, Ps512) => Some(Verification::Rsa(&signature::RSA_PSS_2048_8192_SHA512)),
            (Self::P256(_), Es256) => Some(Verification::Other(&signature::ECDSA_P256_SHA256_FIXED)),
            (Self::P384(_), Es384) => Some(Verification::Other(&signature::ECDSA_P384_SHA384_FIXED)),
            (Self::Ed25519(_), EdDsa) => Some(Verification::Other(&signature::ED25519)),
            (Self::Rsa { .. } | Self::P256(_) | Self::P384(_) | Self::Ed25519(_), _) => None,
        }
    }

    fn has_signed(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        match (self, self.verification(algorithm)) {
            (Self::Rsa { n, e }, Some(Verification::Rsa(parameters))) => {
                RsaPublicKeyComponents { n, e }.verify(parameters, message, signature).is_ok()
            }
            (Self::P256(point) | Self::P384(point) | Self::Ed25519(point), Some(Verification::Other(how))) => {
                UnparsedPublicKey::new(how, point).verify(message, signature).is_ok()
            }
            (_, _) => false,
        }
    }
}

impl Algorithm {
    pub(super) const ALL: [(&'static str, Self); 9] = [
        ("RS256", Self::Rs256),
        ("RS384", Self::Rs384),
        ("RS512", Self::Rs512),
        ("PS256", Self::Ps256),
        ("PS384", Self::Ps384),
        ("PS512", Self::Ps512),
        ("ES256", Self::Es256),
        ("ES384", Self::Es384),
        ("EdDSA", Self::EdDsa),
    ];

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(known, _)| *known == name).map(|(_, algorithm)| algorithm)
    }
}

fn json_of<T: serde::de::DeserializeOwned>(part: &str) -> Result<T, SignatureError> {
    let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_| SignatureError::Malformed)?;
    serde_json::from_slice(&bytes).map_err(|_| SignatureError::Malformed)
}

impl fmt::Display for SignatureError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "it is no signed token",
            Self::Algorithm => "it is not signed with a public key",
            Self::UnknownKey => "it is signed with a key that the provider does not show",
            Self::AmbiguousKey => "it does not say which of several keys has signed it",
            Self::Wrong => "its signature is wrong",
        })
    }
}
