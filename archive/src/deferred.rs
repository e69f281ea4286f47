//! What directories get only when all of their content stands: times (every new entry would change them), modes that
//! would lock their content away, and default ACLs (new entries would inherit them). One byte buffer holds it all, a few
//! dozen bytes a directory, and is read from its end, so that content comes before what holds it.

use std::collections::HashSet;

/// One directory's record.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Record<'a> {
    /// Relative to the root, empty for the root.
    pub path: &'a [u8],
    /// The final mode, where it differs from the one that the directory has now.
    pub mode: Option<u16>,
    pub mtime: (i64, u32),
    pub default_acl: Option<&'a [u8]>,
}

#[derive(Default)]
pub(crate) struct Deferred {
    bytes: Vec<u8>,
    /// Directories of which records before the last may be there, or that are none any more.
    again: HashSet<Vec<u8>>,
}

/// Stands for "no mode", which has 12 bits only.
const NO_MODE: u16 = u16::MAX;
const NO_ACL: u32 = u32::MAX;
const FIXED: usize = 2 + 8 + 4 + 4 + 4;

impl Deferred {
    /// Adds a record. `seen_before` says that the directory was there already, so that an older record may be, too.
    pub(crate) fn push(&mut self, record: &Record<'_>, seen_before: bool) {
        let acl = record.default_acl.unwrap_or_default();
        // Both are far below 4 GiB: the decoder's limits see to that.
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX - 1);
        self.bytes.extend_from_slice(record.path);
        self.bytes.extend_from_slice(acl);
        self.bytes.extend_from_slice(&record.mode.unwrap_or(NO_MODE).to_le_bytes());
        self.bytes.extend_from_slice(&record.mtime.0.to_le_bytes());
        self.bytes.extend_from_slice(&record.mtime.1.to_le_bytes());
        self.bytes.extend_from_slice(&length(record.path).to_le_bytes());
        let acl_length = if record.default_acl.is_some() { length(acl) } else { NO_ACL };
        self.bytes.extend_from_slice(&acl_length.to_le_bytes());
        if seen_before {
            self.again.insert(record.path.to_vec());
        }
    }

    /// The directory at `path` has given way to something else: its records so far mean nothing.
    pub(crate) fn forget(&mut self, path: &[u8]) {
        // A mark without a record of its own would swallow a later, valid one.
        let kept = self.take_all(path);
        self.bytes = kept;
        self.again.remove(path);
    }

    /// Everything but the records of `path`. Replaced directories are rare, so that this may take its time.
    fn take_all(&self, path: &[u8]) -> Vec<u8> {
        let mut kept = Vec::with_capacity(self.bytes.len());
        let mut end = self.bytes.len();
        let mut spans = Vec::new();
        while let Some((record, start)) = read(&self.bytes, end) {
            if record.path != path {
                spans.push(start..end);
            }
            end = start;
        }
        for span in spans.into_iter().rev() {
            kept.extend_from_slice(&self.bytes[span]);
        }
        kept
    }

    /// Hands out the records, the last one first; of several for one directory only the last.
    pub(crate) fn finish<E>(mut self, mut apply: impl FnMut(&Record<'_>) -> Result<(), E>) -> Result<(), E> {
        let mut done: HashSet<Vec<u8>> = HashSet::new();
        let mut end = self.bytes.len();
        while let Some((record, start)) = read(&self.bytes, end) {
            let again = !self.again.is_empty() && self.again.contains(record.path);
            if !again || done.insert(record.path.to_vec()) {
                apply(&record)?;
            }
            end = start;
            // The memory goes back as the work goes on.
            if end < self.bytes.capacity() / 2 {
                self.bytes.truncate(end);
                self.bytes.shrink_to_fit();
            }
        }
        Ok(())
    }
}

/// The record that ends at `end`, and where it starts.
fn read(bytes: &[u8], end: usize) -> Option<(Record<'_>, usize)> {
    let fixed = &bytes[end.checked_sub(FIXED)?..end];
    let number = |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
    let mode = u16::from_le_bytes([fixed[0], fixed[1]]);
    let seconds =
        i64::from_le_bytes([fixed[2], fixed[3], fixed[4], fixed[5], fixed[6], fixed[7], fixed[8], fixed[9]]);
    let acl_length = match number(18) {
        NO_ACL => None,
        length => Some(length as usize),
    };
    let acl_start = (end - FIXED).checked_sub(acl_length.unwrap_or(0))?;
    let start = acl_start.checked_sub(number(14) as usize)?;
    let record = Record {
        path: &bytes[start..acl_start],
        mode: (mode != NO_MODE).then_some(mode),
        mtime: (seconds, number(10)),
        default_acl: acl_length.map(|_| &bytes[acl_start..end - FIXED]),
    };
    Some((record, start))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(path: &[u8], seconds: i64) -> Record<'_> {
        Record { path, mode: None, mtime: (seconds, 7), default_acl: None }
    }

    fn collect(deferred: Deferred) -> Vec<(Vec<u8>, i64)> {
        let mut out = Vec::new();
        deferred
            .finish(|r| {
                out.push((r.path.to_vec(), r.mtime.0));
                Ok::<(), ()>(())
            })
            .unwrap();
        out
    }

    #[test]
    fn records_come_back_whole_and_in_reverse() {
        let mut deferred = Deferred::default();
        let first =
            Record { path: b"", mode: Some(0o555), mtime: (-5, 999_999_999), default_acl: Some(b"acl") };
        let second = Record { path: b"a/b", mode: None, mtime: (i64::MAX, 0), default_acl: Some(b"") };
        deferred.push(&first, false);
        deferred.push(&second, false);
        let mut turn = 0;
        deferred
            .finish(|r| {
                assert_eq!(*r, *[&second, &first][turn]);
                turn += 1;
                Ok::<(), ()>(())
            })
            .unwrap();
        assert_eq!(turn, 2);
    }

    #[test]
    fn the_last_record_of_a_directory_counts() {
        let mut deferred = Deferred::default();
        deferred.push(&record(b"a", 1), false);
        deferred.push(&record(b"b", 2), false);
        deferred.push(&record(b"a", 3), true);
        assert_eq!(collect(deferred), [(b"a".to_vec(), 3), (b"b".to_vec(), 2)]);
    }

    #[test]
    fn a_directory_that_gave_way_is_forgotten() {
        let mut deferred = Deferred::default();
        deferred.push(&record(b"a", 1), true);
        deferred.push(&record(b"b", 2), false);
        deferred.forget(b"a");
        deferred.push(&record(b"a", 9), false);
        assert_eq!(collect(deferred), [(b"a".to_vec(), 9), (b"b".to_vec(), 2)]);
    }
}
