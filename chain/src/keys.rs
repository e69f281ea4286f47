//! What proves who somebody is: the server's key pair, and the tokens that let nodes in. All of them are 32 bytes and are
//! written as 64 hexadecimal digits, one word that survives command lines, boot scripts and people. Secrets stay out of
//! every Debug text.

use crate::Error;
use crate::seal::random;
use snow::params::DHChoice;
use snow::resolvers::{CryptoResolver, DefaultResolver};
use std::fmt;
use std::str::FromStr;

/// Names a token or a session in clear; derived from the token, or random. It does not tell the secret.
pub type CredentialId = [u8; 16];

/// For BLAKE3's derivation: what the id of a token is made for.
const ID_CONTEXT: &str = "ka 2026-11 control token id";
/// For BLAKE3's derivation: what the pre-shared key of a token is made for.
const PSK_CONTEXT: &str = "ka 2026-11 control token psk";

/// What is wrong with a word that should be a key or a token. It never shows the word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} has 64 hexadecimal digits, this has {got}")]
pub struct BadKey {
    what: &'static str,
    got: Got,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Got {
    Length(usize),
    OtherCharacters,
}

impl fmt::Display for Got {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(n) => write!(f, "{n} characters"),
            Self::OtherCharacters => f.write_str("other characters"),
        }
    }
}

fn parse(what: &'static str, text: &str) -> Result<[u8; 32], BadKey> {
    let text = text.trim();
    if text.len() != 64 {
        return Err(BadKey { what, got: Got::Length(text.chars().count()) });
    }
    let mut bytes = [0; 32];
    let digit = |c: u8| char::from(c).to_digit(16).and_then(|d| u8::try_from(d).ok());
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        match (digit(pair[0]), digit(pair[1])) {
            (Some(high), Some(low)) => *byte = high << 4 | low,
            _ => return Err(BadKey { what, got: Got::OtherCharacters }),
        }
    }
    Ok(bytes)
}

/// Lower-case hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The public half of a server's key: what a node must know to trust it. No secret.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(pub(crate) [u8; 32]);

impl PublicKey {
    /// The key with these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl FromStr for PublicKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        parse("a server's key", text).map(Self)
    }
}

/// The secret half of a server's key (X25519), with its public half.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretKey {
    pub(crate) secret: [u8; 32],
    public: PublicKey,
}

impl SecretKey {
    /// A new key.
    ///
    /// # Errors
    /// When the kernel has no random numbers to give.
    pub fn generate() -> Result<Self, Error> {
        Self::from_bytes(random()?)
    }

    fn from_bytes(secret: [u8; 32]) -> Result<Self, Error> {
        let mut dh = DefaultResolver
            .resolve_dh(&DHChoice::Curve25519)
            .ok_or_else(|| Error::Malformed("this program was built without X25519".to_owned()))?;
        dh.set(&secret);
        let mut public = [0; 32];
        public.copy_from_slice(dh.pubkey());
        Ok(Self { secret, public: PublicKey(public) })
    }

    /// Reads what [`SecretKey::to_word`] wrote.
    ///
    /// # Errors
    /// [`Error::Malformed`], without the word.
    pub fn from_word(word: &str) -> Result<Self, Error> {
        Self::from_bytes(parse("a server's secret key", word).map_err(|e| Error::Malformed(e.to_string()))?)
    }

    /// The secret as one word, for its file and for nothing else.
    #[must_use]
    pub fn to_word(&self) -> String {
        hex(&self.secret)
    }

    /// Its public half.
    #[must_use]
    pub const fn public(&self) -> PublicKey {
        self.public
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretKey").field("public", &self.public).finish_non_exhaustive()
    }
}

/// What lets a node in: 32 random bytes. Whoever has it can register.
#[derive(Clone, PartialEq, Eq)]
pub struct Token([u8; 32]);

impl Token {
    /// A new token.
    ///
    /// # Errors
    /// When the kernel has no random numbers to give.
    pub fn generate() -> Result<Self, Error> {
        random().map(Self)
    }

    /// The token as one word, for the node that it is made for.
    #[must_use]
    pub fn to_word(&self) -> String {
        hex(&self.0)
    }

    /// What is used on the wire in its place.
    #[must_use]
    pub fn credential(&self) -> Credential {
        let mut id = [0; 16];
        id.copy_from_slice(&blake3::derive_key(ID_CONTEXT, &self.0)[..16]);
        Credential { id, psk: blake3::derive_key(PSK_CONTEXT, &self.0) }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(secret)")
    }
}

impl FromStr for Token {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        parse("a token", text).map(Self)
    }
}

/// What both ends of a control connection share before it: an id that is said in clear, and a secret. It comes from a
/// [`Token`] the first time and is given by the server for every later connection.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential {
    /// Said in clear.
    pub id: CredentialId,
    pub(crate) psk: [u8; 32],
}

impl Credential {
    /// Bytes of a credential inside a session.
    pub(crate) const LEN: usize = 48;

    /// A new one, made of random bytes.
    ///
    /// # Errors
    /// When the kernel has no random numbers to give.
    pub fn generate() -> Result<Self, Error> {
        Ok(Self { id: random()?, psk: random()? })
    }

    pub(crate) fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..16].copy_from_slice(&self.id);
        bytes[16..].copy_from_slice(&self.psk);
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let (mut id, mut psk) = ([0; 16], [0; 32]);
        id.copy_from_slice(&bytes[..16]);
        psk.copy_from_slice(&bytes[16..]);
        Self { id, psk }
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential").field("id", &hex(&self.id)).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn words_are_read_back_and_say_what_is_wrong() {
        let secret = SecretKey::generate().unwrap();
        assert_eq!(SecretKey::from_word(&(secret.to_word() + "\n")).unwrap(), secret);
        assert_eq!(secret.public().to_string().parse::<PublicKey>().unwrap(), secret.public());
        let token = Token::generate().unwrap();
        assert_eq!(token.to_word().parse::<Token>().unwrap(), token);
        assert_eq!(
            "abc".parse::<Token>().unwrap_err().to_string(),
            "a token has 64 hexadecimal digits, this has 3 characters"
        );
        let wrong = "z".repeat(64).parse::<PublicKey>().unwrap_err().to_string();
        assert_eq!(wrong, "a server's key has 64 hexadecimal digits, this has other characters");
    }

    #[test]
    fn the_public_half_is_that_of_rfc_7748() {
        // Section 5.2, after one iteration: the base point as the scalar.
        let secret = SecretKey::from_word(&format!("09{}", "0".repeat(62))).unwrap();
        assert_eq!(
            secret.public().to_string(),
            "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
        );
    }

    #[test]
    fn tokens_have_different_ids_and_the_id_is_not_the_secret() {
        let (a, b) = (Token::generate().unwrap(), Token::generate().unwrap());
        assert_eq!(a.credential(), a.clone().credential());
        assert_ne!(a.credential().id, b.credential().id);
        assert_ne!(a.credential().psk, a.0);
        assert_ne!(a.credential().psk[..16], a.credential().id);
    }

    #[test]
    fn no_debug_text_holds_a_secret() {
        let secret = SecretKey::generate().unwrap();
        let token = Token::generate().unwrap();
        let credential = token.credential();
        let text = format!(
            "{secret:?} {token:?} {credential:?} {:?}",
            secret.to_word().parse::<Token>().map(|_| ())
        );
        for hidden in [secret.to_word(), token.to_word(), hex(&credential.psk)] {
            assert!(!text.contains(&hidden[..16]), "{text}");
        }
        // Arrays of numbers would give it away just as well.
        for bytes in [&secret.secret, &token.0, &credential.psk] {
            assert!(!text.contains(&format!("{}, {}, {}", bytes[0], bytes[1], bytes[2])), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_word_panics_and_no_error_shows_it(word in ".{0,80}") {
            if let Err(e) = word.parse::<Token>() {
                prop_assert!(word.trim().len() < 8 || !e.to_string().contains(word.trim()));
            }
            let _ = word.parse::<PublicKey>();
            let _ = SecretKey::from_word(&word);
        }
    }
}
