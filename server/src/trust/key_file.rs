//! The server's key in its file, and its public half beside it. `ka-server init` makes it in `/etc/ka`; who never ran
//! that gets one with the state files, made at the first deployment and used for all that follow.

use super::secret_file;
use anyhow::{Context, Result, bail};
use ka_chain::keys::SecretKey;
use std::path::{Path, PathBuf};

/// Where `ka-server init` puts it.
pub const FOLDER: &str = "/etc/ka";
/// The secret half.
pub const SECRET: &str = "server.key";
/// The public half.
pub const PUBLIC: &str = "server.pub";

/// Makes a key in `folder`; returns it. Without `replace`, a key that is there stays.
///
/// # Errors
/// When one is there already, or the files cannot be written.
pub fn make(folder: &Path, replace: bool) -> Result<SecretKey> {
    let key = SecretKey::generate().context("making a key")?;
    let secret = format!("# The secret key of this ka-server. Nobody else may read it.\n{}\n", key.to_word());
    secret_file::write(&folder.join(SECRET), &secret, replace)?;
    write_public(folder, &key)?;
    Ok(key)
}

fn write_public(folder: &Path, key: &SecretKey) -> Result<()> {
    secret_file::write_public(&folder.join(PUBLIC), &format!("{}\n", key.public()), true)
}

/// Reads the key in `path`; `None` when there is none.
///
/// # Errors
/// When the file cannot be read, others can read it, or it holds no key.
pub fn read(path: &Path) -> Result<Option<SecretKey>> {
    let Some(text) = secret_file::read(path)? else { return Ok(None) };
    let mut words = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    let (Some(word), None) = (words.next(), words.next()) else {
        bail!("{} must hold one line with a key", path.display());
    };
    SecretKey::from_word(word).map(Some).with_context(|| path.display().to_string())
}

/// The key to use: of the file that is named; else of [`FOLDER`]; else of the state folder, where one is made when there
/// is none. Returns the file too.
///
/// # Errors
/// When a file that is named is not there, or as [`read`] and [`make`].
pub fn find_or_make(named: Option<&Path>, state_folder: &Path) -> Result<(SecretKey, PathBuf)> {
    if let Some(path) = named {
        let key =
            read(path)?.with_context(|| format!("--key-file {}: there is no such file", path.display()))?;
        return Ok((key, path.to_path_buf()));
    }
    find_in(Path::new(FOLDER), state_folder)
}

fn find_in(folder: &Path, state_folder: &Path) -> Result<(SecretKey, PathBuf)> {
    let path = folder.join(SECRET);
    if let Some(key) = read(&path)? {
        return Ok((key, path));
    }
    let path = state_folder.join(SECRET);
    if let Some(key) = read(&path)? {
        return Ok((key, path));
    }
    match make(state_folder, false) {
        Ok(key) => {
            log::info!("made a key for this server: {}", path.display());
            Ok((key, path))
        }
        // Another ka-server was quicker.
        Err(e) => match read(&path) {
            Ok(Some(key)) => Ok((key, path)),
            _ => Err(e),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_that_of_the_operator_goes_first() {
        let folder = tempfile::tempdir().unwrap();
        let (etc, state) = (folder.path().join("etc"), folder.path().join("state"));
        let (first, path) = find_in(&etc, &state).unwrap();
        assert_eq!(path, state.join(SECRET));
        assert_eq!(find_in(&etc, &state).unwrap().0, first);
        let public = std::fs::read_to_string(state.join(PUBLIC)).unwrap();
        assert_eq!(public.trim(), first.public().to_string());
        let own = make(&etc, false).unwrap();
        assert!(make(&etc, false).is_err());
        assert_eq!(find_in(&etc, &state).unwrap(), (own.clone(), etc.join(SECRET)));
        assert_ne!(make(&etc, true).unwrap(), own);
        assert_eq!(find_or_make(Some(&state.join(SECRET)), &etc).unwrap().0, first);
        assert!(find_or_make(Some(&state.join("none")), &etc).is_err());
    }

    #[test]
    fn a_broken_file_is_an_error_that_does_not_show_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SECRET);
        for text in ["", "# only words\n", "0123456789abcdef\n", "a\nb\n"] {
            secret_file::write(&path, text, true).unwrap();
            let error = format!("{:#}", read(&path).unwrap_err());
            assert!(error.contains(SECRET) && !error.contains("0123456789abcdef"), "{error}");
        }
        // Nothing is made in its place.
        assert!(find_in(&folder.path().join("etc"), folder.path()).is_err());
    }
}
