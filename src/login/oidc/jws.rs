//! Did the provider sign this? Compact JWS with an asymmetric signature, under a key of the provider's own JWKS.
//!
//! The crate `jsonwebtoken` reads tokens and keys; it comes without cryptography, and is lent that of `ring`, which TLS is
//! made with here anyway. Keys come from the `jwks_uri` alone: what a token says of its own key (`jwk`, `jku`, `x5u`,
//! `x5c`) is not looked at. `none` does not exist here, and a shared secret verifies nothing.

use std::fmt;

use jsonwebtoken::crypto::{CryptoProvider, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse};
use jsonwebtoken::signature::{Error as Unverified, Verifier};
use jsonwebtoken::{AlgorithmFamily, DecodingKey, DecodingKeyKind, TokenData, Validation, decode, decode_header};
use ring::signature::{self, RsaPublicKeyComponents, UnparsedPublicKey};
use serde::Deserialize;
use serde_json::{Map, Value};

pub(super) use jsonwebtoken::Algorithm;

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
    /// Or signed with `none`, or in a way that is not known.
    Malformed,
    SharedSecret,
    /// The provider has no such key, as far as is known: it may have a new one.
    UnknownKey,
    /// Several keys would do, and the token does not say which.
    AmbiguousKey,
    Wrong,
}

#[derive(Debug)]
struct Key {
    id: Option<String>,
    /// All that it may have signed with.
    algorithms: Vec<Algorithm>,
    material: DecodingKey,
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
        let header = decode_header(token)?;
        // None of the extensions that a token may insist on is known here (RFC 7515, section 4.1.11); the crate lets them be.
        if header.crit.is_some() {
            return Err(SignatureError::Malformed);
        }
        if header.alg.family() == AlgorithmFamily::Hmac {
            return Err(SignatureError::SharedSecret);
        }
        let key = self.find(header.kid.as_deref(), header.alg)?;
        // Kept for the whole process, and so every later time as well.
        let _: Result<(), &CryptoProvider> = RING.install_default();
        let TokenData { header, claims } = decode(token, &key.material, &signature_only(header.alg))?;
        let kind = header.typ.map(|kind| {
            let kind = kind.to_ascii_lowercase();
            kind.strip_prefix("application/").map_or(kind.clone(), str::to_owned)
        });
        Ok(Signed { algorithm: header.alg, kind, claims })
    }

    /// Without a `kid` there must be one key only that fits (OpenID Connect Core 1.0, section 10.1).
    fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Result<&Key, SignatureError> {
        let fits = |key: &&Key| key.algorithms.contains(&algorithm) && (id.is_none() || key.id.as_deref() == id);
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
        let key = Jwk::deserialize(key).ok()?;
        if key.common.public_key_use.as_ref().is_some_and(|usage| *usage != PublicKeyUse::Signature)
            || key.common.key_operations.as_ref().is_some_and(|known| !known.contains(&KeyOperations::Verify))
        {
            return None;
        }
        let of_its_kind = match &key.algorithm {
            AlgorithmParameters::RSA(_) => AlgorithmFamily::Rsa.algorithms(),
            AlgorithmParameters::EllipticCurve(point) if point.curve == EllipticCurve::P256 => &[Algorithm::ES256],
            AlgorithmParameters::EllipticCurve(point) if point.curve == EllipticCurve::P384 => &[Algorithm::ES384],
            AlgorithmParameters::OctetKeyPair(point) if point.curve == EllipticCurve::Ed25519 => &[Algorithm::EdDSA],
            _ => return None,
        };
        let is_meant = |algorithm: &Algorithm| key.common.key_algorithm.is_none_or(|only| only == (*algorithm).into());
        let algorithms: Vec<_> = of_its_kind.iter().copied().filter(is_meant).collect();
        let material = DecodingKey::from_jwk(&key).ok()?;
        (!algorithms.is_empty()).then_some(Self { id: key.common.key_id, algorithms, material })
    }
}

/// Whether keys can be meant that sign like this.
pub(super) fn is_known(algorithm: &str) -> bool {
    algorithm.parse::<Algorithm>().is_ok_and(|algorithm| algorithm.family() != AlgorithmFamily::Hmac)
}

/// The rules for claims are in `token`: they are stricter, and differ between kinds of tokens.
fn signature_only(algorithm: Algorithm) -> Validation {
    let mut validation = Validation::new(algorithm);
    validation.required_spec_claims.clear();
    (validation.validate_exp, validation.validate_aud) = (false, false);
    validation
}

/// What `jsonwebtoken` verifies with. It is asked for nothing else.
static RING: CryptoProvider = CryptoProvider {
    signer_factory: |_, _| Err(ErrorKind::UnsupportedAlgorithm.into()),
    verifier_factory: |algorithm, key| Ok(Box::new(Verification { algorithm: *algorithm, key: key.clone() })),
    key_utils: KeyUtils::new_unimplemented(),
};

/// Of signatures of one algorithm by one key.
struct Verification {
    algorithm: Algorithm,
    key: DecodingKey,
}

impl JwtVerifier for Verification {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

impl Verifier<Vec<u8>> for Verification {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), Unverified> {
        let verified = match self.key.kind() {
            DecodingKeyKind::RsaModulusExponent { n, e } => {
                let how = match self.algorithm {
                    Algorithm::RS256 => &signature::RSA_PKCS1_2048_8192_SHA256,
                    Algorithm::RS384 => &signature::RSA_PKCS1_2048_8192_SHA384,
                    Algorithm::RS512 => &signature::RSA_PKCS1_2048_8192_SHA512,
                    Algorithm::PS256 => &signature::RSA_PSS_2048_8192_SHA256,
                    Algorithm::PS384 => &signature::RSA_PSS_2048_8192_SHA384,
                    Algorithm::PS512 => &signature::RSA_PSS_2048_8192_SHA512,
                    _ => return Err(Unverified::new()),
                };
                RsaPublicKeyComponents { n, e }.verify(how, message, signature)
            }
            DecodingKeyKind::SecretOrDer(point) => {
                let how: &dyn signature::VerificationAlgorithm = match self.algorithm {
                    Algorithm::ES256 => &signature::ECDSA_P256_SHA256_FIXED,
                    Algorithm::ES384 => &signature::ECDSA_P384_SHA384_FIXED,
                    Algorithm::EdDSA => &signature::ED25519,
                    _ => return Err(Unverified::new()),
                };
                UnparsedPublicKey::new(how, point).verify(message, signature)
            }
        };
        verified.map_err(|_| Unverified::new())
    }
}

impl From<jsonwebtoken::errors::Error> for SignatureError {
    fn from(error: jsonwebtoken::errors::Error) -> Self {
        match error.kind() {
            ErrorKind::InvalidSignature => Self::Wrong,
            _ => Self::Malformed,
        }
    }
}

impl fmt::Display for SignatureError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "it is no token that is signed in a way that we know",
            Self::SharedSecret => "it is not signed with a public key",
            Self::UnknownKey => "it is signed with a key that the provider does not show",
            Self::AmbiguousKey => "it does not say which of several keys has signed it",
            Self::Wrong => "its signature is wrong",
        })
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
    use serde_json::json;

    use super::*;

    struct Provider(EcdsaKeyPair);

    impl Provider {
        fn new() -> Self {
            let (how, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
            let document = EcdsaKeyPair::generate_pkcs8(how, &random).unwrap();
            Self(EcdsaKeyPair::from_pkcs8(how, document.as_ref(), &random).unwrap())
        }

        /// Its public key, with this changed.
        fn key(&self, change: &Value) -> Value {
            let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
            let point = self.0.public_key().as_ref();
            let mut key = json!({ "kty": "EC", "crv": "P-256", "kid": "1", "x": encode(&point[1..33]), "y": encode(&point[33..]) });
            for (name, value) in change.as_object().unwrap() {
                key[name] = value.clone();
            }
            key
        }

        fn sign(&self, header: &str, payload: &str) -> String {
            let message = [header, payload].map(|part| URL_SAFE_NO_PAD.encode(part)).join(".");
            let signature = self.0.sign(&SystemRandom::new(), message.as_bytes()).unwrap();
            format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
        }
    }

    fn keys(keys: &[Value]) -> Keys {
        Keys::parse(json!({ "keys": keys }).as_object().unwrap()).unwrap()
    }

    #[test]
    fn a_header_that_could_mean_something_else_is_refused() {
        let provider = Provider::new();
        let keys = keys(&[provider.key(&json!({}))]);
        let claims = r#"{"sub":"ann"}"#;
        for (header, expected) in [
            (r#"{"alg":"ES256","kid":"1"}"#, None),
            (r#"{"alg":"ES256"}"#, None),
            (r#"{"alg":"ES256","kid":"1","jku":"https://evil.example","x5u":"https://evil.example"}"#, None),
            (r#"{"alg":"ES256","kid":"2"}"#, Some(SignatureError::UnknownKey)),
            (r#"{"alg":"ES384","kid":"1"}"#, Some(SignatureError::UnknownKey)),
            (r#"{"alg":"RS256","kid":"1"}"#, Some(SignatureError::UnknownKey)),
            (r#"{"alg":"HS256","kid":"1"}"#, Some(SignatureError::SharedSecret)),
            (r#"{"alg":"none"}"#, Some(SignatureError::Malformed)),
            (r#"{"alg":"es256","kid":"1"}"#, Some(SignatureError::Malformed)),
            (r#"{"alg":["ES256"],"kid":"1"}"#, Some(SignatureError::Malformed)),
            (r#"{"kid":"1"}"#, Some(SignatureError::Malformed)),
            (r#"{"alg":"HS256","alg":"ES256","kid":"1"}"#, Some(SignatureError::Malformed)),
            (r#"{"alg":"ES256","kid":"2","kid":"1"}"#, Some(SignatureError::Malformed)),
            (r#"{"alg":"ES256","kid":1}"#, Some(SignatureError::Malformed)),
            (r#"{"alg":"ES256","kid":"1","crit":["b64"],"b64":false}"#, Some(SignatureError::Malformed)),
            (r#"{"alg":"ES256","kid":"1","crit":[]}"#, Some(SignatureError::Malformed)),
            (r#"{"alg":"ES256","kid":"1","crit":"exp"}"#, Some(SignatureError::Malformed)),
            ("[]", Some(SignatureError::Malformed)),
            ("", Some(SignatureError::Malformed)),
        ] {
            assert_eq!(keys.verify(&provider.sign(header, claims)).err(), expected, "{header}");
        }
    }

    #[test]
    fn a_token_has_one_form_and_says_each_thing_once() {
        let provider = Provider::new();
        let keys = keys(&[provider.key(&json!({}))]);
        const HEADER: &str = r#"{"alg":"ES256","typ":"application/JWT"}"#;
        let good = provider.sign(HEADER, r#"{"sub":"ann"}"#);
        let signed = keys.verify(&good).unwrap();
        assert_eq!((signed.kind.as_deref(), &signed.claims["sub"]), (Some("jwt"), &json!("ann")));
        let (message, signature) = good.rsplit_once('.').unwrap();
        let (header, payload) = message.split_once('.').unwrap();
        let padded = URL_SAFE.encode(URL_SAFE_NO_PAD.decode(signature).unwrap());
        let again = URL_SAFE_NO_PAD.encode(r#"{"sub":"bob"}"#);
        for (what, token, expected) in [
            ("empty", String::new(), SignatureError::Malformed),
            ("two parts", message.to_owned(), SignatureError::Malformed),
            ("four parts", format!("{good}.{signature}"), SignatureError::Malformed),
            ("a part in front", format!("{header}.{good}"), SignatureError::Malformed),
            ("signature with padding", format!("{message}.{padded}"), SignatureError::Malformed),
            ("signature in other letters", format!("{message}.{}", "+".repeat(86)), SignatureError::Malformed),
            ("no signature", format!("{message}."), SignatureError::Wrong),
            ("cut signature", format!("{message}.{}", &signature[..64]), SignatureError::Wrong),
            ("another payload", format!("{header}.{again}.{signature}"), SignatureError::Wrong),
            ("payload of no signature", format!("{header}.{payload}.{}", "A".repeat(86)), SignatureError::Wrong),
            ("no object", provider.sign(HEADER, "[]"), SignatureError::Malformed),
            ("no JSON", provider.sign(HEADER, "sub=ann"), SignatureError::Malformed),
            ("no UTF-8 by escape", provider.sign(HEADER, r#"{"sub":"\ud800"}"#), SignatureError::Malformed),
            ("two subjects", provider.sign(HEADER, r#"{"sub":"bob","sub":"ann"}"#), SignatureError::Malformed),
            ("two ends", provider.sign(HEADER, r#"{"exp":1,"exp":9}"#), SignatureError::Malformed),
            ("two issuers", provider.sign(HEADER, r#"{"iss":"a","iss":"b"}"#), SignatureError::Malformed),
            ("two audiences", provider.sign(HEADER, r#"{"aud":"a","aud":"b"}"#), SignatureError::Malformed),
            ("too large", provider.sign(HEADER, &format!("{{{}}}", " ".repeat(50_000))), SignatureError::Malformed),
        ] {
            assert_eq!(keys.verify(&token).err(), Some(expected), "{what}");
        }
    }

    #[test]
    fn a_key_verifies_what_it_is_meant_for_and_nothing_else() {
        let provider = Provider::new();
        let token = |header: &str| provider.sign(header, "{}");
        let (named, unnamed) = (token(r#"{"alg":"ES256","kid":"1"}"#), token(r#"{"alg":"ES256"}"#));
        for (change, is_good) in [
            (json!({}), true),
            (json!({ "use": "sig", "alg": "ES256", "key_ops": ["verify"] }), true),
            (json!({ "x5t": "of-no-matter", "x5c": ["AAAA"], "further": { "a": 1 } }), true),
            (json!({ "use": "enc" }), false),
            (json!({ "use": "SIG" }), false),
            (json!({ "key_ops": ["sign", "encrypt"] }), false),
            (json!({ "key_ops": [] }), false),
            (json!({ "alg": "ES384" }), false),
            (json!({ "alg": "ECDH-ES" }), false),
            (json!({ "alg": "ES256K" }), false),
            (json!({ "crv": "P-384" }), false),
            (json!({ "crv": "secp256k1" }), false),
            (json!({ "kty": "OKP", "crv": "Ed25519" }), false),
            (json!({ "kty": "RSA", "n": "AQAB", "e": "AQAB" }), false),
            (json!({ "kty": "oct", "k": "AAAA" }), false),
            (json!({ "kty": "AKP" }), false),
            (json!({ "x": "not/base64" }), false),
            (json!({ "y": "AAAA" }), false),
            (json!({ "kid": "2" }), false),
            (json!({ "kid": 1 }), false),
        ] {
            let keys = keys(&[provider.key(&change)]);
            assert_eq!(keys.verify(&named).is_ok(), is_good, "{change}");
        }
        let other = Provider::new();
        let beside = [provider.key(&json!({})), other.key(&json!({ "kid": "2" }))];
        assert!(keys(&beside).verify(&named).is_ok());
        assert_eq!(keys(&beside).verify(&unnamed).err(), Some(SignatureError::AmbiguousKey));
        let twins = [other.key(&json!({})), provider.key(&json!({}))];
        assert_eq!(keys(&twins).verify(&named).err(), Some(SignatureError::AmbiguousKey), "two keys of one name");
        let further = [json!("no key"), json!({}), other.key(&json!({ "crv": "P-384" })), provider.key(&json!({}))];
        assert!(keys(&further).verify(&unnamed).is_ok(), "what is of no use here is left out");
    }
}
