//! `cloakroom hash-password`: a password becomes what the users file keeps of it.

use std::fmt;
use std::io::{self, BufRead, IsTerminal};

use crate::login::hash::{PASSWORD_BYTES_MAX, hash};

/// Why there is no hash.
#[derive(Debug)]
pub enum HashPasswordError {
    Unreadable(io::Error),
    Empty,
    TooLong,
    NotText,
    /// A NUL, a tab, an escape: nothing that the field of the login page takes, so it got in by mistake.
    ControlCharacter,
    /// Typed twice, and not alike.
    Different,
    Hash(argon2::password_hash::Error),
}

/// Asks twice on a terminal, and reads one line from anything else. The hash is the caller's to print.
pub fn hash_password() -> Result<String, HashPasswordError> {
    let stdin = io::stdin();
    let password = if stdin.is_terminal() {
        let first = rpassword::prompt_password("Password: ").map_err(HashPasswordError::Unreadable)?;
        let second = rpassword::prompt_password("Once more: ").map_err(HashPasswordError::Unreadable)?;
        if first != second {
            return Err(HashPasswordError::Different);
        }
        first
    } else {
        first_line(stdin.lock())?
    };
    hash_of(&password)
}

/// The first line without its end, and otherwise untouched: a space may be a part of it.
fn first_line(input: impl BufRead) -> Result<String, HashPasswordError> {
    const LINE_END_BYTES_MAX: usize = 2;
    let mut line = Vec::new();
    let most = PASSWORD_BYTES_MAX + LINE_END_BYTES_MAX;
    input.take(most as u64).read_until(b'\n', &mut line).map_err(HashPasswordError::Unreadable)?;
    if line.last() == Some(&b'\n') {
        line.pop();
        if line.last() == Some(&b'\r') {
            line.pop();
        }
    }
    String::from_utf8(line).map_err(|_| HashPasswordError::NotText)
}

fn hash_of(password: &str) -> Result<String, HashPasswordError> {
    if password.is_empty() {
        return Err(HashPasswordError::Empty);
    }
    if PASSWORD_BYTES_MAX < password.len() {
        return Err(HashPasswordError::TooLong);
    }
    if password.chars().any(char::is_control) {
        return Err(HashPasswordError::ControlCharacter);
    }
    hash(password).map_err(HashPasswordError::Hash)
}

impl fmt::Display for HashPasswordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(_) => f.write_str("the password cannot be read"),
            Self::Empty => f.write_str("the password is empty"),
            Self::TooLong => write!(f, "the password is longer than {PASSWORD_BYTES_MAX} bytes"),
            Self::NotText => f.write_str("the password is not UTF-8"),
            Self::ControlCharacter => {
                f.write_str("the password contains a control character, such as NUL or tab; nobody could type it")
            }
            Self::Different => f.write_str("the two passwords differ"),
            Self::Hash(_) => f.write_str("the password cannot be hashed"),
        }
    }
}

impl std::error::Error for HashPasswordError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Unreadable(cause) => Some(cause),
            Self::Hash(cause) => Some(cause),
            Self::Empty | Self::TooLong | Self::NotText | Self::ControlCharacter | Self::Different => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_is_the_password_as_it_is() {
        let longest = "a".repeat(PASSWORD_BYTES_MAX);
        let cases = [
            ("secret\n", "secret"),
            ("secret\r\n", "secret"),
            ("secret", "secret"),
            (" with space \nsecond line\n", " with space "),
            ("tab\t\n", "tab\t"),
            ("\n", ""),
            ("", ""),
            (longest.as_str(), longest.as_str()),
        ];
        for (input, expected) in cases {
            assert_eq!(first_line(input.as_bytes()).unwrap(), expected, "{input:?}");
        }
        assert!(matches!(first_line(&b"\xff\n"[..]), Err(HashPasswordError::NotText)));
    }

    #[test]
    fn what_could_never_log_in_is_not_hashed() {
        assert!(matches!(hash_of(""), Err(HashPasswordError::Empty)));
        let too_long = first_line("a".repeat(PASSWORD_BYTES_MAX + 9).as_bytes()).unwrap();
        assert!(matches!(hash_of(&too_long), Err(HashPasswordError::TooLong)));
        for password in ["sec\0ret", "secret\t", "\x1b[A", "one\rtwo", "\u{85}"] {
            assert!(matches!(hash_of(password), Err(HashPasswordError::ControlCharacter)), "{password:?}");
        }
        assert!(hash_of(" sëcret 🔑").is_ok());
        assert!(hash_of("secret").unwrap().starts_with("$argon2id$v=19$m=19456,t=2,p=1$"));
    }
}
