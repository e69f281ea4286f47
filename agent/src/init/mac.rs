//! Ethernet addresses as people, iPXE and sysfs write them.

use std::fmt;
use std::str::FromStr;

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    /// Reads six hexadecimal octets that are separated by `:` or `-`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not an Ethernet address (example: 52:54:00:12:34:56)");
        let mut octets = [0; 6];
        let mut parts = text.split([':', '-']);
        for octet in &mut octets {
            let part = parts.next().ok_or_else(wrong)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() { Err(wrong()) } else { Ok(Self(octets)) }
    }
}

impl Mac {
    /// Reads what PXE loaders give as `BOOTIF`: an ARP hardware type (`01` is Ethernet) before the address.
    ///
    /// # Errors
    /// When `text` is not such a value or not of type Ethernet.
    pub fn from_bootif(text: &str) -> Result<Self, String> {
        let separators = text.bytes().filter(|b| matches!(b, b':' | b'-')).count();
        match text.split_once([':', '-']) {
            Some(("01", mac)) if separators == 6 => mac.parse(),
            _ if separators == 5 => text.parse(),
            _ => Err(format!("`{text}` is not an Ethernet BOOTIF (example: 01-52-54-00-12-34-56)")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown() {
        let mac = Mac([0x52, 0x54, 0, 0x12, 0xab, 0xff]);
        assert_eq!(mac.to_string(), "52:54:00:12:ab:ff");
        assert_eq!("52:54:00:12:AB:ff".parse(), Ok(mac));
        assert_eq!(Mac::from_bootif("01-52-54-00-12-ab-ff"), Ok(mac));
        assert_eq!(Mac::from_bootif("52:54:00:12:ab:ff"), Ok(mac));
        for text in
            ["", "52:54:00:12:ab", "52:54:00:12:ab:ff:00", "5:54:00:12:ab:ff", "+5:54:00:12:ab:ff", "é"]
        {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
        assert!(Mac::from_bootif("20-52-54-00-12-ab-ff").is_err(), "InfiniBand is not Ethernet");
    }
}
