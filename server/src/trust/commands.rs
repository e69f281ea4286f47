//! `ka-server init` makes the key, `ka-server token` makes tokens for people and boot media.

use super::gate::kind;
use super::token_file::TokenFile;
use super::{key_file, now_ms, secret_file};
use anyhow::{Context, Result};
use argh::FromArgs;
use ka_cli::exit::Exit;
use ka_cli::units::parse_time;
use std::path::{Path, PathBuf};

/// What `ka-server init` writes for people to edit.
const SETTINGS: &str = include_str!("server.toml");
/// Its name.
pub const SETTINGS_NAME: &str = "server.toml";
/// How long a token for one node is good when nobody says otherwise, in milliseconds.
const SINGLE_LIFE_MS: u64 = 24 * 60 * 60 * 1000;

/// make this server's key, and a file for its settings
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "init")]
pub struct InitArgs {
    /// where to (default /etc/ka)
    #[argh(option, arg_name = "DIR", default = "PathBuf::from(key_file::FOLDER)")]
    pub dir: PathBuf,
    /// make a new key although there is one: nodes and boot images that trust the old one will refuse this server
    #[argh(switch)]
    pub force: bool,
}

/// make a token that lets a node in; it is printed as one word
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "token")]
pub struct TokenArgs {
    /// for any number of nodes, never spent: for boot media that are kept in a safe
    #[argh(switch)]
    pub shared: bool,
    /// how long it is good (default: 24h; with --shared: for ever)
    #[argh(option, arg_name = "TIME")]
    pub expires: Option<String>,
    /// write it to this file, readable by its owner only, instead of printing it
    #[argh(option, arg_name = "FILE")]
    pub output: Option<PathBuf>,
    /// the state file of the deployments for which it is (default /var/lib/ka/nodes.json); tokens are kept beside it
    #[argh(option, arg_name = "FILE", default = "PathBuf::from(crate::boot::nodes::STATE_FILE)")]
    pub state: PathBuf,
}

/// The folder of the state files.
#[must_use]
pub fn state_folder(state: &Path) -> &Path {
    state.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Runs `ka-server init`.
///
/// # Errors
/// When the files cannot be written.
pub fn init(args: &InitArgs) -> Result<Exit> {
    let secret = args.dir.join(key_file::SECRET);
    if !args.force
        && let Some(key) = key_file::read(&secret)?
    {
        eprintln!(
            "ka-server: refused: {} is there (its public half is {}); --force makes a new one",
            secret.display(),
            key.public()
        );
        return Ok(Exit::Refused);
    }
    let key = key_file::make(&args.dir, args.force)?;
    let settings = args.dir.join(SETTINGS_NAME);
    if settings.exists() {
        eprintln!("{} is there and stays as it is", settings.display());
    } else {
        secret_file::write_public(&settings, SETTINGS, false)?;
    }
    eprintln!("made {}; its public half, which nodes must know:", secret.display());
    println!("{}", key.public());
    Ok(Exit::Done)
}

/// Runs `ka-server token`.
///
/// # Errors
/// When the token cannot be kept or written.
pub fn token(args: &TokenArgs) -> Result<Exit> {
    let life = match args.expires.as_deref().map(parse_time).transpose() {
        Ok(Some(time)) => Some(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        Ok(None) => (!args.shared).then_some(SINGLE_LIFE_MS),
        Err(e) => {
            eprintln!("ka-server: --expires: {e}");
            return Ok(Exit::Usage);
        }
    };
    let now = now_ms();
    let file = TokenFile::in_folder(state_folder(&args.state));
    let token = file.make(kind(args.shared), life.map(|l| now.saturating_add(l)), now)?;
    match &args.output {
        None => println!("{}", token.to_word()),
        Some(path) => {
            secret_file::write(path, &(token.to_word() + "\n"), true).context("keeping the token")?;
        }
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::gate::Gate;
    use ka_chain::keys::{SecretKey, Token};

    #[test]
    fn init_makes_a_key_once() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("ka");
        let run = |force| init(&InitArgs { dir: dir.clone(), force }).unwrap();
        assert_eq!(run(false), Exit::Done);
        let first = key_file::read(&dir.join(key_file::SECRET)).unwrap().unwrap();
        std::fs::write(dir.join(SETTINGS_NAME), "mine").unwrap();
        assert_eq!(run(false), Exit::Refused);
        assert_eq!(key_file::read(&dir.join(key_file::SECRET)).unwrap().unwrap(), first);
        assert_eq!(run(true), Exit::Done);
        assert_ne!(key_file::read(&dir.join(key_file::SECRET)).unwrap().unwrap(), first);
        assert_eq!(std::fs::read_to_string(dir.join(SETTINGS_NAME)).unwrap(), "mine");
    }

    #[test]
    fn tokens_are_known_to_a_deployment_with_the_same_state() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("token");
        let mut args = TokenArgs {
            shared: true,
            expires: Some("1h".into()),
            output: Some(output.clone()),
            state: folder.path().join("nodes.json"),
        };
        assert_eq!(token(&args).unwrap(), Exit::Done);
        let word = secret_file::read(&output).unwrap().unwrap();
        let id = word.parse::<Token>().unwrap().credential().id;
        let gate = Gate::new(SecretKey::generate().unwrap(), [1; 16], TokenFile::in_folder(folder.path()));
        assert!(gate.find(&id).is_ok());
        args.expires = Some("soon".into());
        assert_eq!(token(&args).unwrap(), Exit::Usage);
    }
}
