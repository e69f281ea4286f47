//! Unified kernel images: UEFI programs that hold kernel, initramfs and command line in one. The command line inside cannot
//! be rewritten (it would break the signature), so it is read and judged, and the image is built anew where it must be.

use super::{Context, entries};
use anyhow::{Context as _, Result, bail};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// More than any kernel takes.
const CMDLINE_LIMIT: u32 = 64 << 10;
/// More sections than any image has.
const SECTIONS_LIMIT: u16 = 96;

/// The unified kernel images of the clone, each with the command line inside.
///
/// # Errors
/// When one cannot be read or is no UEFI program.
pub fn images(context: &Context) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for dir in entries::boot_dirs(context) {
        for path in context.root.matching(&format!("{dir}/EFI/Linux"), "", ".efi")? {
            let name = path.to_string_lossy().into_owned();
            let file =
                context.root.open_file(&path)?.with_context(|| format!("opening {name}: it is gone"))?;
            let options =
                section(&file, b".cmdline").with_context(|| format!("reading {name} of the clone"))?;
            let options = options.unwrap_or_default();
            found.push((name, String::from_utf8_lossy(&options).trim_end_matches(['\0', '\n']).to_owned()));
        }
    }
    Ok(found)
}

/// The content of a section of a PE file; none when it has no such section.
fn section(file: &File, name: &[u8]) -> Result<Option<Vec<u8>>> {
    let at = |offset: u64, buffer: &mut [u8]| file.read_exact_at(buffer, offset);
    let mut dos = [0; 64];
    at(0, &mut dos)?;
    let pe = u64::from(u32::from_le_bytes([dos[60], dos[61], dos[62], dos[63]]));
    let mut coff = [0; 24];
    at(pe, &mut coff)?;
    if !dos.starts_with(b"MZ") || !coff.starts_with(b"PE\0\0") {
        bail!("it is no UEFI program");
    }
    let count = u16::from_le_bytes([coff[6], coff[7]]).min(SECTIONS_LIMIT);
    let table = pe + 24 + u64::from(u16::from_le_bytes([coff[20], coff[21]]));
    for n in 0..u64::from(count) {
        let mut header = [0; 40];
        at(table + 40 * n, &mut header)?;
        let word = |i: usize| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
        let own = &header[..8];
        if own.strip_prefix(name).is_some_and(|rest| rest.iter().all(|&b| b == 0)) {
            let length = word(8).min(word(16)).min(CMDLINE_LIMIT);
            let mut content = vec![0; usize::try_from(length)?];
            at(u64::from(word(20)), &mut content)?;
            return Ok(Some(content));
        }
    }
    Ok(None)
}

/// A PE file with one section, for tests.
#[cfg(test)]
pub fn image(name: &str, content: &str) -> Vec<u8> {
    let mut pe = vec![0; 64];
    pe[..2].copy_from_slice(b"MZ");
    pe[60..64].copy_from_slice(&64u32.to_le_bytes());
    pe.extend(b"PE\0\0");
    pe.extend([0; 20]);
    pe[64 + 6] = 2;
    pe.extend([0; 40]);
    let start = pe.len();
    pe.extend([0; 40]);
    pe[start..start + name.len()].copy_from_slice(name.as_bytes());
    let length = u32::try_from(content.len()).unwrap().to_le_bytes();
    pe[start + 8..start + 12].copy_from_slice(&length);
    pe[start + 16..start + 20].copy_from_slice(&length);
    let end = u32::try_from(pe.len()).unwrap().to_le_bytes();
    pe[start + 20..start + 24].copy_from_slice(&end);
    pe.extend(content.as_bytes());
    pe
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_command_line_inside_is_read() {
        let lab = Lab::new();
        lab.file("/boot/efi/EFI/Linux/x", "");
        std::fs::write(
            lab.target.join("boot/efi/EFI/Linux/arch.efi"),
            image(".cmdline", "root=UUID=1 rw\n\0"),
        )
        .unwrap();
        std::fs::write(lab.target.join("boot/efi/EFI/Linux/bare.efi"), image(".linux", "x")).unwrap();
        let found = images(&lab.context()).unwrap();
        let wanted =
            [("/boot/efi/EFI/Linux/arch.efi", "root=UUID=1 rw"), ("/boot/efi/EFI/Linux/bare.efi", "")];
        assert_eq!(found, wanted.map(|(a, b)| (a.to_owned(), b.to_owned())));
        lab.file("/boot/efi/EFI/Linux/none.efi", "MZ");
        assert!(images(&lab.context()).is_err());
    }

    proptest! {
        #[test]
        fn no_file_breaks_the_reader(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), pe in 0u32..200, good in any::<bool>()) {
            if good && bytes.len() > 64 {
                bytes[..2].copy_from_slice(b"MZ");
                bytes[60..64].copy_from_slice(&pe.to_le_bytes());
                let at = pe as usize;
                if bytes.len() > at + 4 {
                    bytes[at..at + 4].copy_from_slice(b"PE\0\0");
                }
            }
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x");
            std::fs::write(&path, &bytes).unwrap();
            let _ = section(&File::open(&path).unwrap(), b".cmdline");
        }
    }
}
