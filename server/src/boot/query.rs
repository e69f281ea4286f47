//! What an iPXE client says about itself in the query of `/node.ipxe`, checked before anything is done with it.

use crate::nodes::Mac;

/// The longest query that is looked at, in bytes.
const QUERY_LIMIT: usize = 1024;
/// The longest value that is kept, in bytes.
const VALUE_LIMIT: usize = 128;

/// The kind of firmware.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Platform {
    /// A PC BIOS.
    Bios,
    /// UEFI.
    Efi,
}

/// A node that asks for its script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asker {
    /// The network card that it boots from.
    pub mac: Mac,
    /// Its firmware.
    pub platform: Platform,
    /// The machine's UUID as its firmware tells it, when it does.
    pub uuid: Option<String>,
    /// The machine's serial number as its firmware tells it, when it does.
    pub serial: Option<String>,
}

/// What is wrong with a query.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Too long.
    #[error("the query is longer than {QUERY_LIMIT} bytes")]
    Long,
    /// Something that must be there is missing.
    #[error("the query has no `{0}`")]
    Missing(&'static str),
    /// Something is there twice.
    #[error("the query has two of `{0}`")]
    Twice(&'static str),
    /// A value that is not understood.
    #[error("{0}")]
    Value(String),
}

impl Asker {
    /// Reads the query (what stands behind `?`, still percent-encoded). Unknown keys are passed over.
    ///
    /// # Errors
    /// When it has no valid `mac` and `platform`, or is too long.
    pub fn parse(query: &str) -> Result<Self, Error> {
        if query.len() > QUERY_LIMIT {
            return Err(Error::Long);
        }
        let (mut mac, mut platform, mut uuid, mut serial) = (None, None, None, None);
        for pair in query.split('&') {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (slot, name) = match key {
                "mac" => (&mut mac, "mac"),
                "platform" => (&mut platform, "platform"),
                "uuid" => (&mut uuid, "uuid"),
                "serial" => (&mut serial, "serial"),
                _ => continue,
            };
            if slot.replace(decode(value)).is_some() {
                return Err(Error::Twice(name));
            }
        }
        let mac = mac.ok_or(Error::Missing("mac"))?;
        let platform = platform.ok_or(Error::Missing("platform"))?;
        Ok(Self {
            mac: mac.parse().map_err(|e: crate::nodes::Error| Error::Value(e.to_string()))?,
            platform: match platform.as_str() {
                "pcbios" => Platform::Bios,
                "efi" => Platform::Efi,
                _ => return Err(Error::Value(format!("`{platform}` is not a platform (pcbios or efi)"))),
            },
            uuid: uuid.filter(|v| !v.is_empty()),
            serial: serial.filter(|v| !v.is_empty()),
        })
    }
}

/// Undoes percent-encoding. What is not printable ASCII becomes `?`, so that the value can be logged and shown.
fn decode(text: &str) -> String {
    let mut bytes = text.bytes();
    let mut value = String::new();
    while let Some(byte) = bytes.next() {
        let byte = match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16));
                let mut ahead = bytes.clone();
                match (digit(ahead.next()), digit(ahead.next())) {
                    (Some(high), Some(low)) => {
                        bytes = ahead;
                        u8::try_from(high * 16 + low).unwrap_or(b'?')
                    }
                    _ => b'%',
                }
            }
            byte => byte,
        };
        if value.len() == VALUE_LIMIT {
            break;
        }
        value.push(if matches!(byte, b' '..=b'~') { char::from(byte) } else { '?' });
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_ipxe_sends_is_read() {
        let asker =
            Asker::parse("mac=52:54:00:12:34:56&platform=pcbios&uuid=4c4c4544-0000&serial=A%20b%2Fc&x=y")
                .unwrap();
        assert_eq!(asker.mac.to_string(), "52:54:00:12:34:56");
        assert_eq!(asker.platform, Platform::Bios);
        assert_eq!(asker.uuid.as_deref(), Some("4c4c4544-0000"));
        assert_eq!(asker.serial.as_deref(), Some("A b/c"));
        let asker = Asker::parse("platform=efi&mac=52%3a54%3A00%3a12:34:56&serial=").unwrap();
        assert_eq!((asker.platform, asker.serial), (Platform::Efi, None));
    }

    #[test]
    fn wrong_queries_are_refused() {
        for (query, error) in [
            ("", "the query has no `mac`"),
            ("mac=52:54:00:12:34:56", "the query has no `platform`"),
            ("mac=&platform=efi", "`` is not an Ethernet address (example: 52:54:00:12:34:56)"),
            ("mac=a&mac=b&platform=efi", "the query has two of `mac`"),
            ("mac=ff:ff:ff:ff:ff:ff&platform=efi", "ff:ff:ff:ff:ff:ff is not the address of one machine"),
            ("mac=52:54:00:12:34:56&platform=arm", "`arm` is not a platform (pcbios or efi)"),
        ] {
            assert_eq!(Asker::parse(query).unwrap_err().to_string(), error);
        }
        assert_eq!(Asker::parse(&"x".repeat(1025)), Err(Error::Long));
    }

    #[test]
    fn what_could_confuse_a_terminal_or_a_script_is_taken_out() {
        let asker = Asker::parse("mac=525400123456&platform=efi&serial=a%0Ab%1b%ff%zz%4").unwrap();
        assert_eq!(asker.serial.as_deref(), Some("a?b??%zz%4"));
    }

    proptest! {
        #[test]
        fn no_query_panics(query in ".{0,200}") {
            let _ = Asker::parse(&query);
        }

        #[test]
        fn values_are_printable_and_bounded(value in "[%0-9a-f+é]{0,300}") {
            let decoded = decode(&value);
            prop_assert!(decoded.len() <= VALUE_LIMIT && decoded.bytes().all(|b| matches!(b, b' '..=b'~')));
        }

        #[test]
        fn encoded_addresses_are_understood(bytes: [u8; 6]) {
            if let Ok(mac) = Mac::new(bytes) {
                let encoded = mac.to_string().replace(':', "%3A");
                let query = format!("mac={encoded}&platform=efi");
                prop_assert_eq!(Asker::parse(&query).unwrap().mac, mac);
            }
        }
    }
}
