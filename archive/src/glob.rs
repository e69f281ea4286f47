//! Globs on paths, as bytes: `*` and `?` stop at a slash, `**` as a whole component is any number of components, `[a-z]` and
//! `[!a-z]` are one byte of ASCII and never a slash, `{a,b}` is either, and `\` takes a sign's meaning away. Braces are
//! taken apart first, as a shell does it, so that every glob becomes a list of patterns without them. Matching takes no
//! memory, and its time is bounded by the lengths of pattern and path multiplied. There is no regex engine below it, which
//! would be larger than all the rest of what matches globs.

/// Longest glob, in bytes: the longest path that the kernel takes, with each byte escaped.
const MAX_GLOB: usize = 8192;
/// Most patterns that the braces of one glob may stand for.
const MAX_ALTERNATIVES: usize = 1000;
/// Deepest braces.
const MAX_NESTING: usize = 16;
/// Most bytes of patterns in one list.
const MAX_LIST: usize = 4 << 20;

/// What is wrong with a glob.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the glob `{}`: {what}", glob.escape_debug())]
pub struct GlobError {
    glob: String,
    what: &'static str,
}

fn wrong<T>(glob: &str, what: &'static str) -> Result<T, GlobError> {
    Err(GlobError { glob: glob.chars().take(200).collect(), what })
}

/// A glob that matches `text` and nothing else.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if "\\?*[]{},".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// The patterns without braces that a glob stands for: `/a/{b,c/d}` means `/a/b` and `/a/c/d`.
pub(crate) fn alternatives(glob: &str) -> Result<Vec<String>, GlobError> {
    if glob.len() > MAX_GLOB {
        return wrong(glob, "too long");
    }
    let mut braces = Braces { glob, rest: glob.chars() };
    braces.sequence(0)
}

struct Braces<'g> {
    glob: &'g str,
    rest: std::str::Chars<'g>,
}

impl Braces<'_> {
    /// All that a sequence stands for, up to its end: the glob's, or the comma or brace that ends a choice, which is left.
    fn sequence(&mut self, depth: usize) -> Result<Vec<String>, GlobError> {
        let mut all = vec![String::new()];
        loop {
            let before = self.rest.as_str();
            match self.rest.next() {
                None if depth > 0 => return wrong(self.glob, "a `{` without its `}`"),
                None => return Ok(all),
                Some(',' | '}') if depth > 0 => {
                    self.rest = before.chars();
                    return Ok(all);
                }
                Some('}') => return wrong(self.glob, "a `}` without its `{`"),
                Some('{') => all = self.product(&all, depth + 1)?,
                Some(c) => {
                    if c == '\\' {
                        match self.rest.next() {
                            None => return wrong(self.glob, "nothing follows the `\\` at its end"),
                            Some('/') => return wrong(self.glob, "a `\\` before a slash"),
                            Some(_) => {}
                        }
                    }
                    if c == '[' {
                        self.class()?;
                    }
                    let taken = &before[..before.len() - self.rest.as_str().len()];
                    all.iter_mut().for_each(|one| one.push_str(taken));
                }
            }
        }
    }

    /// Each of `starts` with each of the choices of the brace that was opened.
    fn product(&mut self, starts: &[String], depth: usize) -> Result<Vec<String>, GlobError> {
        if depth > MAX_NESTING {
            return wrong(self.glob, "braces in braces, too deep");
        }
        let mut choices = Vec::new();
        loop {
            choices.append(&mut self.sequence(depth)?);
            if choices.len() * starts.len() > MAX_ALTERNATIVES {
                return wrong(self.glob, "its braces stand for too many paths");
            }
            if self.rest.next() == Some('}') {
                break;
            }
        }
        let pairs = starts.iter().flat_map(|start| choices.iter().map(move |choice| (start, choice)));
        Ok(pairs.map(|(start, choice)| format!("{start}{choice}")).collect())
    }

    /// Goes behind the bracket that closes a class.
    fn class(&mut self) -> Result<(), GlobError> {
        match class_length(self.rest.as_str()) {
            Some(length) => {
                self.rest = self.rest.as_str()[length..].chars();
                Ok(())
            }
            None => wrong(self.glob, "a `[` without its `]`"),
        }
    }
}

/// Bytes of a class behind its `[`, with its `]`. A `]` that stands first is one of its signs, and `\` is a sign like others.
fn class_length(rest: &str) -> Option<usize> {
    let signs = rest.strip_prefix(['!', '^']).unwrap_or(rest);
    let start = rest.len() - signs.len();
    let first = usize::from(signs.starts_with(']'));
    signs[first..].find(']').map(|at| start + first + at + 1)
}

/// What one byte of a path may be, or some.
enum Token {
    Byte(u8),
    Any,
    Star,
    Class(Box<[bool; 256]>),
}

enum Component {
    /// Any number of components, also none.
    Deep,
    Literal(Box<[u8]>),
    Tokens(Box<[Token]>),
}

/// A glob without braces.
struct Pattern {
    components: Box<[Component]>,
    /// What a path must begin and end with, so that nearly all paths are told apart at once.
    head: Box<[u8]>,
    tail: Box<[u8]>,
    /// The head is all there is.
    literal: bool,
}

impl Pattern {
    /// One of [`alternatives`]. Without a leading slash it means a path at any depth.
    fn new(text: &str) -> Result<Self, GlobError> {
        let mut components = Vec::new();
        let mut rest = match text.strip_prefix('/') {
            Some(rest) => Some(rest),
            None => {
                components.push(Component::Deep);
                Some(text)
            }
        };
        while let Some(name) = rest {
            let (component, tail) = component(name)?;
            rest = tail;
            if let Component::Literal(bytes) = &component
                && [&b""[..], b".", b".."].contains(&&**bytes)
                && text != "/"
            {
                return wrong(text, "an empty name, `.` or `..` in it, which no path has");
            }
            if !matches!((&component, components.last()), (Component::Deep, Some(Component::Deep))) {
                components.push(component);
            }
        }
        if let Some(Component::Deep) = components.last() {
            // At an end it is what is below, not the thing itself.
            components.push(Component::Tokens(Box::new([Token::Star])));
        }
        let head = head(&components);
        let tail = match components.last() {
            Some(Component::Literal(bytes)) => bytes.clone(),
            Some(Component::Tokens(tokens)) => {
                let mut bytes: Vec<u8> = tokens.iter().rev().map_while(byte).collect();
                bytes.reverse();
                bytes.into()
            }
            _ => Box::default(),
        };
        let literal = components.iter().all(|c| matches!(c, Component::Literal(_)));
        Ok(Self { components: components.into(), head, tail, literal })
    }

    /// `path` is relative to the root.
    fn matches(&self, path: &[u8]) -> bool {
        if !path.starts_with(&self.head) || !path.ends_with(&self.tail) {
            return false;
        }
        if self.literal {
            return path.len() == self.head.len();
        }
        let (mut at, mut rest) = (0, Some(path));
        // Behind the last `**`, and what is left of the path when that takes as little as it can.
        let mut again: Option<(usize, &[u8])> = None;
        loop {
            match (self.components.get(at), rest) {
                (None, None) => return true,
                (Some(Component::Deep), _) => {
                    at += 1;
                    again = rest.map(|rest| (at, rest));
                    continue;
                }
                (Some(component), Some(text)) => {
                    let (name, tail) = split(text);
                    let same = match component {
                        Component::Literal(bytes) => **bytes == *name,
                        Component::Tokens(tokens) => matches(tokens, name),
                        Component::Deep => false,
                    };
                    if same {
                        (at, rest) = (at + 1, tail);
                        continue;
                    }
                }
                _ => {}
            }
            let Some((behind, Some(tail))) = again.map(|(behind, text)| (behind, split(text).1)) else {
                return false;
            };
            (at, rest, again) = (behind, Some(tail), Some((behind, tail)));
        }
    }
}

/// The first name of a path and what follows the slash behind it.
fn split(path: &[u8]) -> (&[u8], Option<&[u8]>) {
    match path.iter().position(|&b| b == b'/') {
        Some(at) => (&path[..at], Some(&path[at + 1..])),
        None => (path, None),
    }
}

fn byte(token: &Token) -> Option<u8> {
    match token {
        Token::Byte(byte) => Some(*byte),
        _ => None,
    }
}

fn head(components: &[Component]) -> Box<[u8]> {
    let mut head = Vec::new();
    for (number, component) in components.iter().enumerate() {
        if number > 0 {
            head.push(b'/');
        }
        match component {
            Component::Literal(bytes) => head.extend_from_slice(bytes),
            Component::Tokens(tokens) => {
                head.extend(tokens.iter().map_while(byte));
                break;
            }
            Component::Deep => break,
        }
    }
    head.into()
}

/// The first component of a pattern, and what follows the slash behind it.
fn component(pattern: &str) -> Result<(Component, Option<&str>), GlobError> {
    let mut tokens = Vec::new();
    let mut rest = pattern.chars();
    let tail = loop {
        match rest.next() {
            None => break None,
            Some('/') => break Some(rest.as_str()),
            Some('?') => tokens.push(Token::Any),
            Some('*') => tokens.push(Token::Star),
            Some('[') => {
                let text = rest.as_str();
                let Some(length) = class_length(text) else { return wrong(pattern, "a `[` without its `]`") };
                tokens.push(Token::Class(class(&text[..length - 1])?));
                rest = text[length..].chars();
            }
            Some(c) => {
                let c = if c == '\\' { rest.next().unwrap_or(c) } else { c };
                tokens.extend(c.encode_utf8(&mut [0; 4]).bytes().map(Token::Byte));
            }
        }
    };
    if let [Token::Star, Token::Star] = tokens[..] {
        return Ok((Component::Deep, tail));
    }
    let literal: Option<Vec<u8>> = tokens.iter().map(byte).collect();
    Ok((
        literal.map_or_else(|| Component::Tokens(tokens.into()), |bytes| Component::Literal(bytes.into())),
        tail,
    ))
}

/// The pattern for the directory in which one of [`alternatives`] lies; none where that is any, nor for the root.
pub(crate) fn parent(alternative: &str) -> Result<Option<&str>, GlobError> {
    let Some(mut rest) = alternative.strip_prefix('/').filter(|rest| !rest.is_empty()) else {
        return Ok(None);
    };
    while let (_, Some(tail)) = component(rest)? {
        rest = tail;
    }
    let above = &alternative[..alternative.len() - rest.len()];
    Ok(Some(above.strip_suffix('/').filter(|above| !above.is_empty()).unwrap_or("/")))
}

/// The bytes that the signs between brackets mean.
fn class(signs: &str) -> Result<Box<[bool; 256]>, GlobError> {
    if !signs.is_ascii() {
        return wrong(signs, "only signs of ASCII can stand in brackets; braces take others");
    }
    let inner = signs.strip_prefix(['!', '^']).unwrap_or(signs);
    let negated = inner.len() < signs.len();
    let mut set = Box::new([negated; 256]);
    let mut rest = inner.as_bytes();
    while let [low, tail @ ..] = rest {
        let (high, tail) = match tail {
            [b'-', high, tail @ ..] => (high, tail),
            tail => (low, tail),
        };
        if low > high {
            return wrong(signs, "a range in brackets that runs backwards");
        }
        set[usize::from(*low)..=usize::from(*high)].fill(!negated);
        rest = tail;
    }
    // As nothing but `**` does.
    set[usize::from(b'/')] = false;
    Ok(set)
}

/// Whether tokens match a name, which has no slash.
fn matches(tokens: &[Token], name: &[u8]) -> bool {
    let (mut at, mut position) = (0, 0);
    // Behind the last star, and where it ends when it takes as little as it can.
    let mut again: Option<(usize, usize)> = None;
    loop {
        match (tokens.get(at), name.get(position)) {
            (None, None) => return true,
            (Some(Token::Star), _) => {
                at += 1;
                again = Some((at, position));
                continue;
            }
            (Some(token), Some(&byte)) => {
                let same = match token {
                    Token::Byte(wanted) => *wanted == byte,
                    Token::Class(set) => set[usize::from(byte)],
                    Token::Any | Token::Star => true,
                };
                if same {
                    (at, position) = (at + 1, position + 1);
                    continue;
                }
            }
            _ => {}
        }
        match again {
            Some((behind, end)) if end < name.len() => {
                (at, position, again) = (behind, end + 1, Some((behind, end + 1)));
            }
            _ => return false,
        }
    }
}

/// Patterns, each with a number of the caller's.
#[derive(Default)]
pub(crate) struct Patterns {
    list: Vec<(usize, Pattern)>,
    bytes: usize,
}

impl Patterns {
    /// Adds one of [`alternatives`].
    ///
    /// # Errors
    /// When it is none, or there are too many.
    pub(crate) fn add(&mut self, number: usize, alternative: &str) -> Result<(), GlobError> {
        self.bytes += alternative.len();
        if self.bytes > MAX_LIST {
            return wrong(alternative, "too many globs");
        }
        self.list.push((number, Pattern::new(alternative)?));
        Ok(())
    }

    /// Whether any of them matches `path`, which is relative to the root.
    pub(crate) fn any(&self, path: &[u8]) -> bool {
        self.list.iter().any(|(_, pattern)| pattern.matches(path))
    }

    /// The numbers of those that match `path`, which is relative to the root, in the order in which they were added.
    pub(crate) fn all<'p>(&'p self, path: &'p [u8]) -> impl Iterator<Item = usize> + 'p {
        self.list.iter().filter(|(_, pattern)| pattern.matches(path)).map(|(number, _)| *number)
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;
    use std::time::{Duration, Instant};

    use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;
    use crate::exclude::default_excludes;

    fn patterns(globs: &[impl AsRef<str>]) -> Result<Patterns, GlobError> {
        let mut all = Patterns::default();
        for (number, glob) in globs.iter().enumerate() {
            for one in alternatives(glob.as_ref())? {
                all.add(number, &one)?;
            }
        }
        Ok(all)
    }

    fn globset(globs: &[impl AsRef<str>]) -> Result<GlobSet, globset::Error> {
        let mut set = GlobSetBuilder::new();
        for glob in globs {
            set.add(GlobBuilder::new(glob.as_ref()).literal_separator(true).empty_alternates(true).build()?);
        }
        set.build()
    }

    fn theirs(set: &GlobSet, path: &[u8]) -> bool {
        set.is_match(Path::new(OsStr::from_bytes(&[b"/", path].concat())))
    }

    /// Pieces of names; negated classes only with the slash in them, which globset would let them match.
    const PIECES: [&str; 26] = [
        "a", "b", "aa", "\u{e9}", ".", "-", ",", "!", "]", "*", "**", "***", "?", "[ab]", "[!a/]", "[^b/]",
        "[a-c]", "[]a]", "[!]/]", "[a-]", "[\\]", "[*?]", "\\*", "\\a", "\\\\", "\\{",
    ];
    /// Braces, alone in what they say of `**`, which globset sees otherwise.
    const BRACES: [&str; 8] =
        ["{a,b}", "{,x}", "{*,b}c", "{a,{b,cc}}", "{a,b/c}", "{[,]a],\\,}", "{a}", "{?b,/**/a}"];

    fn any_glob() -> impl Strategy<Value = String> {
        let name = vec(prop_oneof![9 => select(&PIECES[..]), 2 => select(&BRACES[..])], 1..4)
            .prop_map(|v| v.concat());
        let component = prop_oneof![3 => name, 1 => Just("**".to_owned()), 1 => Just("*".to_owned())];
        vec(component, 1..6)
            .prop_map(|all| format!("/{}", all.join("/")))
            .prop_filter("`**` at a brace", |glob| {
                !["**{", "}**", "}{,x}*", "*{,x}*"].iter().any(|odd| glob.contains(odd))
            })
    }

    fn any_path() -> impl Strategy<Value = Vec<u8>> {
        let signs: [&[u8]; 14] = [
            b"a",
            b"b",
            b"c",
            b"x",
            b"a",
            b"b",
            b"*",
            b"]",
            b"{",
            b"\\",
            b"\n",
            b"\xff",
            "\u{e9}".as_bytes(),
            b",",
        ];
        let name = vec(select(signs.to_vec()), 1..4).prop_map(|signs| signs.concat());
        vec(name, 0..5).prop_map(|names| names.join(&b'/'))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]
        #[test]
        fn globs_mean_what_they_mean_to_globset(glob in any_glob(), paths in vec(any_path(), 20)) {
            let odd = |one: &String| one != "/" && one.split('/').skip(1).any(|name| ["", ".", ".."].contains(&name));
            if alternatives(&glob).is_ok_and(|all| all.iter().any(odd)) {
                let error = patterns(&[&glob]).err().map(|e| e.to_string()).unwrap_or_default();
                prop_assert!(error.contains("which no path has"), "{}: {}", glob, error);
                return Ok(());
            }
            let (ours, set) = (patterns(&[&glob]), globset(&[&glob]));
            prop_assert_eq!(ours.is_ok(), set.is_ok(), "{} {:?}", glob, ours.err());
            if let (Ok(ours), Ok(set)) = (ours, set) {
                for path in paths {
                    prop_assert_eq!(ours.any(&path), theirs(&set, &path), "{} {}", glob, path.escape_ascii());
                }
            }
        }

        #[test]
        fn what_was_escaped_means_itself_alone(text in "[^\0]{0,20}", other in "[^\0]{0,20}") {
            let text = text.trim_matches('/');
            prop_assume!(text.is_empty() || !text.split('/').any(|name| ["", ".", ".."].contains(&name)));
            let all = patterns(&[format!("/{}", escape(text))]).unwrap();
            prop_assert!(all.any(text.as_bytes()));
            prop_assert_eq!(all.any(other.as_bytes()), other == text);
        }
    }

    proptest! {
        #[test]
        fn no_glob_panics_and_all_end_soon(
            glob in "[/a*?,\\[\\]{}!\\\\-]{0,40}", path in any_path(), long in "[/a*?{},]{0,3000}",
        ) {
            let start = Instant::now();
            for glob in [glob, long] {
                if let Ok(all) = patterns(&[&glob]) {
                    let _ = (all.any(&path), all.any(&[b'a'; 4000]), all.any(&b"a/".repeat(2000)));
                }
                for one in alternatives(&glob).unwrap_or_default() {
                    let _ = parent(&one);
                }
            }
            prop_assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        }
    }

    #[test]
    fn what_is_no_glob_is_named() {
        for (glob, cause) in [
            ("/a[".to_owned(), "a `[` without its `]`"),
            ("/[]".to_owned(), "a `[` without its `]`"),
            ("/{a,b".to_owned(), "a `{` without its `}`"),
            ("/a}".to_owned(), "a `}` without its `{`"),
            ("/a\\".to_owned(), "nothing follows"),
            ("/a\\/b".to_owned(), "before a slash"),
            ("/a/".to_owned(), "which no path has"),
            ("/a//b".to_owned(), "which no path has"),
            ("/a/./b".to_owned(), "which no path has"),
            ("/a/\\..".to_owned(), "which no path has"),
            ("../b".to_owned(), "which no path has"),
            ("".to_owned(), "which no path has"),
            ("/b{/a,/}".to_owned(), "which no path has"),
            ("/[c-a]".to_owned(), "runs backwards"),
            ("/[\u{e9}]".to_owned(), "only signs of ASCII"),
            ("/{a,b}".repeat(10), "too many paths"),
            ("{".repeat(1000), "too deep"),
            ("a".repeat(9000), "too long"),
        ] {
            let error = patterns(&[&glob]).err().unwrap().to_string();
            assert!(error.contains(cause) && error.len() < 400, "{glob}: {error}");
        }
        let many = vec!["a".repeat(8000); 600];
        assert!(patterns(&many).err().unwrap().to_string().contains("too many globs"));
    }

    #[test]
    fn brackets_never_match_a_slash_and_braces_are_taken_apart() {
        let all = patterns(&["/a[!b]c", "/x[/]y"]).unwrap();
        assert!(all.any(b"a-c") && !all.any(b"a/c") && !all.any(b"x/y"));
        assert_eq!(alternatives("/{a,b{c,}}[{,}]\\{").unwrap(), ["/a[{,}]\\{", "/bc[{,}]\\{", "/b[{,}]\\{"]);
        for (one, above) in [("/a/b[/]", Some("/a")), ("/a", Some("/")), ("/", None), ("a/b", None)] {
            assert_eq!(parent(one).unwrap(), above, "{one}");
        }
        assert_eq!(patterns(&["/a*", "/b", "/*b"]).unwrap().all(b"ab").collect::<Vec<_>>(), [0, 2]);
    }

    /// 100,000 paths, as in a tree with the usual system directories, and twenty patterns.
    #[test]
    fn as_fast_as_globset() {
        let mut globs = default_excludes(&["/".to_owned(), "/home".to_owned(), "/var".to_owned()]);
        globs.extend(
            ["*.bak", "/home/*/.cache/**", "/srv/**/tmp", "*~", "/var/log/*.[0-9].gz", "/opt/{a,b}*/core"]
                .map(str::to_owned),
        );
        let rooted: Vec<String> = globs
            .iter()
            .map(|glob| if glob.starts_with('/') { glob.clone() } else { format!("/**/{glob}") })
            .collect();
        assert_eq!(globs.len(), 20);
        let tops = [
            "usr/share/doc/package",
            "usr/lib/modules/6.1.0/kernel",
            "var/lib/dpkg/info",
            "home/ann/.cache/x",
            "srv/a",
        ];
        let paths: Vec<Vec<u8>> = (0..100_000)
            .map(|i| {
                format!("{}{}/some-file-{i}.{}", tops[i % 5], i / 500, ["txt", "bak", "gz"][i % 3])
                    .into_bytes()
            })
            .collect();
        let (ours, set) = (patterns(&globs).unwrap(), globset(&rooted).unwrap());
        let time = |matcher: &dyn Fn(&[u8]) -> bool| {
            let run = || {
                let start = Instant::now();
                (paths.iter().filter(|path| matcher(path)).count(), start.elapsed())
            };
            (0..7).map(|_| run()).min_by_key(|(_, time)| *time).unwrap()
        };
        let (old, new) = (time(&|path| theirs(&set, path)), time(&|path| ours.any(path)));
        eprintln!("100,000 paths, 20 patterns: globset {:?}, this {:?}", old.1, new.1);
        assert!(old.0 == new.0 && old.0 > 30_000, "{} {}", old.0, new.0);
        assert!(new.1 < 2 * old.1, "{:?} {:?}", old.1, new.1);
    }
}
