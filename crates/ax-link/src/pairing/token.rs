//! The one-time token: a single word a person can carry.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use data_encoding::BASE32_NOPAD;
use sha2::{Digest, Sha256};

use crate::{Fingerprint, LinkError, tls};

/// Bytes of the secret: 160 bits.
pub(super) const SECRET: usize = 20;
const PREFIX: &str = "axpair-";
const FORMAT: u8 = 1;
const CHECK: usize = 4;
const MAX_ADDRS: usize = 8;

/// Where to go, whom to expect there, and the secret to say. Shown once; not stored.
///
/// `Display` writes the whole token; `Debug` leaves the secret out.
#[derive(Clone)]
pub struct Token {
    pub(super) addrs: Vec<SocketAddr>,
    pub(super) fingerprint: Fingerprint,
    pub(super) secret: [u8; SECRET],
}

/// Why text is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not look like one.
    #[error("this is no pairing token: it should begin with {PREFIX:?} as `axd pair` printed it")]
    Shape,
    /// Characters are missing or wrong.
    #[error("the token is damaged (missing or wrong characters); copy it again, whole")]
    Damaged,
    /// Made by another version.
    #[error(
        "the token is of format {0}, this build knows {FORMAT}; use the same AX version on both hosts"
    )]
    Format(u8),
    /// Too many addresses, or none.
    #[error("a token holds 1 to {MAX_ADDRS} addresses")]
    Addresses,
}

impl Token {
    pub(super) fn new(
        addrs: Vec<SocketAddr>,
        fingerprint: Fingerprint,
    ) -> Result<Token, LinkError> {
        let mut secret = [0; SECRET];
        tls::random(&mut secret)?;
        Ok(Token {
            addrs,
            fingerprint,
            secret,
        })
    }

    /// Where the offering side listens.
    pub fn addrs(&self) -> &[SocketAddr] {
        &self.addrs
    }

    /// The offering side's certificate.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = vec![FORMAT, u8::try_from(self.addrs.len()).unwrap_or(0)];
        for addr in &self.addrs {
            match addr.ip() {
                IpAddr::V4(ip) => {
                    out.push(4);
                    out.extend(ip.octets());
                }
                IpAddr::V6(ip) => {
                    out.push(6);
                    out.extend(ip.octets());
                }
            }
            out.extend(addr.port().to_be_bytes());
        }
        out.extend(self.fingerprint.0);
        out.extend(self.secret);
        let check = Sha256::digest(&out);
        out.extend(&check[..CHECK]);
        out
    }
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{PREFIX}{}",
            BASE32_NOPAD.encode(&self.bytes()).to_lowercase()
        )
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token")
            .field("addrs", &self.addrs)
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Token, TokenError> {
        let text = text.trim().strip_prefix(PREFIX).ok_or(TokenError::Shape)?;
        if text.len() > 1024 {
            return Err(TokenError::Damaged);
        }
        let bytes = BASE32_NOPAD
            .decode(text.to_uppercase().as_bytes())
            .map_err(|_| TokenError::Damaged)?;
        let at = bytes.len().checked_sub(CHECK).ok_or(TokenError::Damaged)?;
        let (content, check) = bytes.split_at(at);
        if Sha256::digest(content)[..CHECK] != *check {
            return Err(TokenError::Damaged);
        }
        let mut rest = Rest(content);
        let [format] = rest.take()?;
        if format != FORMAT {
            return Err(TokenError::Format(format));
        }
        let [count] = rest.take()?;
        if count == 0 || usize::from(count) > MAX_ADDRS {
            return Err(TokenError::Addresses);
        }
        let addrs = (0..count).map(|_| rest.addr()).collect::<Result<_, _>>()?;
        let token = Token {
            addrs,
            fingerprint: Fingerprint(rest.take()?),
            secret: rest.take()?,
        };
        if rest.0.is_empty() {
            Ok(token)
        } else {
            Err(TokenError::Damaged)
        }
    }
}

struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], TokenError> {
        let (head, tail) = self.0.split_first_chunk().ok_or(TokenError::Damaged)?;
        self.0 = tail;
        Ok(*head)
    }

    fn addr(&mut self) -> Result<SocketAddr, TokenError> {
        let [family] = self.take()?;
        let ip = match family {
            4 => IpAddr::from(Ipv4Addr::from(self.take::<4>()?)),
            6 => IpAddr::from(Ipv6Addr::from(self.take::<16>()?)),
            _ => return Err(TokenError::Damaged),
        };
        Ok(SocketAddr::new(ip, u16::from_be_bytes(self.take()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token() -> Token {
        let addrs = vec![
            "10.0.0.1:7700".parse().unwrap(),
            "[fe80::1]:7700".parse().unwrap(),
        ];
        Token::new(addrs, Fingerprint([7; 32])).unwrap()
    }

    #[test]
    fn tokens_read_back() {
        let made = token();
        let read: Token = format!("  {made}\n").parse().unwrap();
        assert_eq!(read.addrs, made.addrs);
        assert_eq!(read.fingerprint, made.fingerprint);
        assert_eq!(read.secret, made.secret);
    }

    #[test]
    fn secrets_differ_and_stay_out_of_debug_output() {
        let (a, b) = (token(), token());
        assert_ne!(a.secret, b.secret);
        let debug = format!("{a:?}");
        assert!(!debug.contains(&format!("{:?}", a.secret)) && !debug.contains("secret"));
    }

    #[test]
    fn what_is_no_token_says_so() {
        assert_eq!("hello".parse::<Token>().unwrap_err(), TokenError::Shape);
        let text = token().to_string();
        assert_eq!(
            text[..text.len() - 2].parse::<Token>().unwrap_err(),
            TokenError::Damaged
        );
    }

    proptest! {
        #[test]
        fn a_wrong_character_is_noticed(at in 0usize..100, c in "[a-z2-7]") {
            let text = token().to_string();
            let at = PREFIX.len() + at.min(text.len() - PREFIX.len() - 1);
            prop_assume!(text[at..=at] != c);
            let wrong = format!("{}{c}{}", &text[..at], &text[at + 1..]);
            prop_assert!(wrong.parse::<Token>().is_err());
        }

        #[test]
        fn hostile_text_never_panics(text in ".{0,200}", tail in "[a-z2-7]{0,300}") {
            let _ = text.parse::<Token>();
            let _ = format!("{PREFIX}{tail}").parse::<Token>();
        }
    }
}
