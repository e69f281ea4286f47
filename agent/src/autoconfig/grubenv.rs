//! GRUB's environment block: a file of fixed size that GRUB itself rewrites in place, so it must be padded with `#` to
//! exactly the size that it has.

use anyhow::{Result, bail};

const HEADER: &str = "# GRUB Environment Block\n";
/// The size that `grub-editenv` gives it.
const SIZE: usize = 1024;

/// The lines `name=value` of a block; none when it is no block.
pub fn lines(text: &str) -> Option<Vec<&str>> {
    let rest = text.strip_prefix(HEADER)?;
    // Newer versions write a second line of comment below the first; the padding is one line of `#` without an end.
    Some(rest.lines().filter(|l| !l.starts_with('#') && !l.is_empty()).collect())
}

/// The block with each line replaced by what `change` makes of it, padded to the size that it had.
///
/// # Errors
/// When it does not fit any more.
pub fn rewrite(text: &str, mut change: impl FnMut(&str) -> Result<String>) -> Result<Option<String>> {
    if !text.starts_with(HEADER) {
        return Ok(None);
    }
    let size = text.len().max(SIZE);
    let mut new = String::with_capacity(size);
    for line in text.split_inclusive('\n') {
        let is_setting = line.ends_with('\n') && !line.starts_with('#') && line != "\n";
        if is_setting {
            new.push_str(&change(line.trim_end_matches('\n'))?);
            new.push('\n');
        } else if line.ends_with('\n') {
            new.push_str(line);
        }
    }
    if new.len() > size {
        bail!("its {size} bytes do not suffice");
    }
    new.push_str(&"#".repeat(size - new.len()));
    Ok(Some(new))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_size_stays_whatever_changes() {
        let mut block = format!("{HEADER}saved_entry=abc\nkernelopts=root=UUID=1 ro \n");
        block.push_str(&"#".repeat(1024 - block.len()));
        assert_eq!(lines(&block).unwrap(), ["saved_entry=abc", "kernelopts=root=UUID=1 ro "]);
        let new = rewrite(&block, |l| Ok(l.replace("UUID=1", "UUID=22222222"))).unwrap().unwrap();
        assert_eq!(new.len(), 1024);
        assert_eq!(lines(&new).unwrap()[1], "kernelopts=root=UUID=22222222 ro ");
        assert_eq!(rewrite(&block, |l| Ok(l.to_owned())).unwrap().unwrap(), block, "nothing else changes");
        assert!(rewrite(&block, |_| Ok("x".repeat(600))).is_err());
        assert_eq!(rewrite("a=b\n", |l| Ok(l.to_owned())).unwrap(), None);
        assert_eq!(lines("a=b\n"), None);
    }

    proptest! {
        #[test]
        fn any_block_keeps_its_settings(values in proptest::collection::vec("[a-z_]{1,8}=[ -~]{0,20}", 0..10)) {
            let mut block = HEADER.to_owned();
            for value in &values {
                block.push_str(value);
                block.push('\n');
            }
            block.push_str(&"#".repeat(1024 - block.len()));
            let new = rewrite(&block, |l| Ok(l.to_owned())).unwrap().unwrap();
            prop_assert_eq!(&new, &block);
            prop_assert_eq!(lines(&new).unwrap(), values);
        }

        #[test]
        fn no_text_breaks_the_reader(text in "(# GRUB Environment Block\n)?([#=\n]|[ -~]){0,40}") {
            if let Some(new) = rewrite(&text, |l| Ok(l.to_owned())).unwrap() {
                prop_assert_eq!(new.len(), 1024);
            }
        }
    }
}
