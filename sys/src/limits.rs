//! Limits that the system sets for a process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io;

/// As many files as this are enough, and programs that we start may close all that could be open, one by one.
const OPEN_FILES: u64 = 65536;

/// Lets this process, and those that it starts, have as many files open as the system allows, up to 65536. A limit that is higher
/// stays.
///
/// # Errors
/// What the kernel says.
pub fn raise_open_files() -> io::Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(OPEN_FILES, |maximum| maximum.min(OPEN_FILES));
    if current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    Ok(setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one_and_is_never_lowered() {
        let before = getrlimit(Resource::Nofile);
        let wanted = before.maximum.map_or(OPEN_FILES, |maximum| maximum.min(OPEN_FILES));
        // Other tests of this process are content with that.
        let low = Rlimit { current: Some(wanted.min(512)), maximum: before.maximum };
        setrlimit(Resource::Nofile, low).unwrap();
        raise_open_files().unwrap();
        assert_eq!(getrlimit(Resource::Nofile).current, Some(wanted));
        if before.maximum.is_none_or(|maximum| maximum > wanted) {
            let high = Rlimit { current: Some(wanted + 1), maximum: before.maximum };
            setrlimit(Resource::Nofile, high).unwrap();
            raise_open_files().unwrap();
            assert_eq!(getrlimit(Resource::Nofile).current, Some(wanted + 1));
        }
    }
}
