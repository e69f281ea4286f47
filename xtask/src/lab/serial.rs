//! What a virtual machine writes on its serial port: kept as plain text to be searched, and logged line by line with
//! the time. Terminal control sequences (firmware and GRUB draw with them) are taken out of both.

use std::io::{self, Write};
use std::time::Instant;

/// Bytes of text kept for searching; older ones are forgotten.
const KEPT: usize = 1 << 20;

/// The text of a serial port.
#[derive(Debug, Default)]
pub struct Text {
    /// What is kept.
    text: Vec<u8>,
    /// How many bytes were forgotten before it.
    forgotten: usize,
    escape: Escape,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Escape {
    #[default]
    None,
    Started,
    Sequence,
}

impl Text {
    /// Adds raw bytes; returns the plain ones among them.
    pub fn add(&mut self, raw: &[u8]) -> Vec<u8> {
        let mut plain = Vec::with_capacity(raw.len());
        for &byte in raw {
            self.escape = match (self.escape, byte) {
                (_, 0x1b) => Escape::Started,
                (Escape::Started, b'[') => Escape::Sequence,
                (Escape::Sequence, 0x40..=0x7e) | (Escape::Started, _) => Escape::None,
                (Escape::Sequence, _) => Escape::Sequence,
                (Escape::None, b'\n' | b'\t' | 0x20..) => {
                    plain.push(byte);
                    Escape::None
                }
                (Escape::None, _) => Escape::None,
            };
        }
        self.text.extend_from_slice(&plain);
        if self.text.len() > 2 * KEPT {
            let cut = self.text.len() - KEPT;
            self.text.drain(..cut);
            self.forgotten += cut;
        }
        plain
    }

    #[cfg(test)]
    fn end(&self) -> usize {
        self.forgotten + self.text.len()
    }

    /// The text from a position on.
    #[must_use]
    pub fn since(&self, position: usize) -> String {
        let start = position.saturating_sub(self.forgotten).min(self.text.len());
        String::from_utf8_lossy(&self.text[start..]).into_owned()
    }

    /// The first of `patterns` that stands behind `position`, and the position behind it.
    #[must_use]
    pub fn find(&self, position: usize, patterns: &[&str]) -> Option<(usize, usize)> {
        let start = position.saturating_sub(self.forgotten).min(self.text.len());
        let text = &self.text[start..];
        patterns
            .iter()
            .enumerate()
            .filter_map(|(i, p)| Some((find(text, p.as_bytes())?, i, p.len())))
            .min()
            .map(|(at, i, length)| (i, self.forgotten + start + at + length))
    }
}

fn find(text: &[u8], pattern: &[u8]) -> Option<usize> {
    text.windows(pattern.len().max(1)).position(|window| window == pattern)
}

/// Writes lines, each with the seconds since it was made.
#[derive(Debug)]
pub struct TimedLog<W> {
    to: W,
    start: Instant,
    at_line_start: bool,
}

impl<W: Write> TimedLog<W> {
    /// Starts the clock.
    pub fn new(to: W) -> Self {
        Self { to, start: Instant::now(), at_line_start: true }
    }

    /// Writes plain bytes.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write(&mut self, plain: &[u8]) -> io::Result<()> {
        let mut out = Vec::with_capacity(plain.len() + 16);
        for &byte in plain {
            if self.at_line_start {
                write!(out, "[{:8.2}] ", self.start.elapsed().as_secs_f64())?;
            }
            out.push(byte);
            self.at_line_start = byte == b'\n';
        }
        self.to.write_all(&out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_sequences_are_taken_out() {
        let mut text = Text::default();
        text.add(b"\x1b[2J\x1b[0;37mGRUB\r\nlog");
        text.add(b"in: \x1b[");
        text.add(b"1mroot");
        assert_eq!(text.since(0), "GRUB\nlogin: root");
    }

    #[test]
    fn the_earliest_pattern_is_found_and_positions_go_on() {
        let mut text = Text::default();
        text.add(b"one two one");
        let (which, behind) = text.find(0, &["two", "one"]).unwrap();
        assert_eq!((which, behind), (1, 3));
        assert_eq!(text.find(behind, &["two", "one"]), Some((0, 7)));
        assert_eq!(text.find(text.end(), &["two", "one"]), None);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut text = Text::default();
        let line = vec![b'x'; 4096];
        for _ in 0..1024 {
            text.add(&line);
        }
        text.add(b"end");
        assert!(text.text.len() <= 2 * KEPT);
        assert_eq!(text.end(), 1024 * 4096 + 3);
        assert_eq!(text.since(text.end() - 3), "end");
        assert!(text.find(0, &["end"]).is_some());
    }

    #[test]
    fn lines_carry_times() {
        let mut log = TimedLog::new(Vec::new());
        log.write(b"a\nb").unwrap();
        log.write(b"c\n").unwrap();
        let text = String::from_utf8(log.to).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert!(text.lines().all(|line| line.starts_with("[    0.0")), "{text}");
        assert!(text.ends_with("bc\n"));
    }
}
