//! Content that is sent block for block, on real loop devices that are full of something else: a file system comes out as it
//! was, byte for byte, and nothing is written behind it. Needs root and the tools of the other loop tests.

use super::assemble::Keys;
use super::loop_tests::{Loop, blkid, possible, says};
use super::plan::compute;
use super::raw::Filling;
use ka_layout::order::{Golden, RawContent};
use std::fs::{self, File};
use std::io::BufReader;
use std::os::unix::fs::FileExt;

/// The raw partition lies between others.
const LAYOUT: &str = r#"version = 1
[[disk]]
name = "system"
table = "gpt"
[[partition]]
type = "linux"
size = "64M"
format = { fs = "ext4" }
mount = { path = "/" }
[[partition]]
number = 7
type = "data"
size = "32M"
raw = true
[[partition]]
type = "linux"
size = "fill"
"#;
const UUID: &str = "eeeeeeee-1111-4222-8333-444455556666";
const DIRT: u8 = 0xa5;

fn way(sector: u32) {
    if !possible() {
        return;
    }
    let disk = Loop::new(160, sector);
    let old = vec![DIRT; 1 << 20];
    let file = File::options().read(true).write(true).open(&disk.device).unwrap();
    for mib in 0..160 {
        file.write_all_at(&old, mib << 20).unwrap();
    }
    file.sync_all().unwrap();
    // A file system of another life, with files in it, mostly zeros, and a few odd bytes behind it.
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    fs::create_dir(folder.path().join("tree")).unwrap();
    fs::write(folder.path().join("tree/file"), vec![7; 3_000_001]).unwrap();
    File::create(&image).unwrap().set_len(24 << 20).unwrap();
    let (tree, path) = (folder.path().join("tree").display().to_string(), image.display().to_string());
    // Blocks that no disk's sectors are bigger than: else it could not be mounted there.
    says("mke2fs", &["-q", "-t", "ext4", "-b", "4096", "-U", UUID, "-L", "tools", "-d", &tree, &path]);
    let mut content = fs::read(&image).unwrap();
    content.extend([1, 0, 3]);
    fs::write(&image, &content).unwrap();

    let raw = RawContent {
        index: 1,
        part: "[[partition]] #2 (data)".into(),
        bytes: content.len() as u64,
        uuid: Some(UUID.into()),
        label: Some("tools".into()),
    };
    let golden = Golden { raw: vec![raw.clone()], ..Golden::default() };
    let plan = compute(&disk.layout(LAYOUT), &[disk.disk()], &golden).unwrap();
    let mut formatted = plan.partition(&disk.record(), &Keys::new()).unwrap().format(&disk.target()).unwrap();
    let places = formatted.raw_places();
    let mut filling = Filling::new(&places);
    let place = filling.next(&raw.part).unwrap();
    let part = disk.part(7);
    assert_eq!((place.device.display().to_string(), place.bytes), (part.clone(), content.len() as u64));
    let mut stream = BufReader::with_capacity(256 << 10, File::open(&image).unwrap());
    place.fill(&mut stream, &mut ()).unwrap();
    filling.end().unwrap();
    let volumes = formatted.volumes();
    let sent = volumes.iter().find(|v| v.number == 7).unwrap();
    assert_eq!((sent.fs, sent.uuid.as_deref(), sent.label.as_deref()), (None, Some(UUID), Some("tools")));
    assert!(sent.mount.is_none() && volumes.len() == 3);
    formatted.commit_table().unwrap();
    formatted.finish().unwrap();

    assert!(says("sgdisk", &["--verify", &disk.name()]).contains("No problems found"));
    ka_sys::block::flush_buffers(&file).unwrap();
    let start = 65 << 20;
    let mut now = vec![0; 32 << 20];
    file.read_exact_at(&mut now, start).unwrap();
    assert!(now[..content.len()] == content, "the content is another");
    // Behind it all is as it was but for the end, which is wiped of signatures.
    assert!(
        now[content.len()..30 << 20].iter().all(|b| *b == DIRT),
        "something was written behind the content"
    );
    assert!(now[30 << 20..].iter().all(|b| *b == 0));
    file.read_exact_at(&mut now[..4096], start + (32 << 20) + (6 << 20)).unwrap();
    assert!(now[..4096].iter().all(|b| *b == DIRT), "something was written into the next partition");
    assert_eq!((blkid(&part, "UUID"), blkid(&part, "LABEL")), (UUID.into(), "tools".into()));
    says("e2fsck", &["-fn", &part]);

    // A partition that somebody mounts is not written to, nor one that is too small.
    let place = place.clone();
    says("mount", &["-o", "ro", &part, &disk.target().display().to_string()]);
    let busy = place.fill(&mut &content[..], &mut ());
    says("umount", &[&disk.target().display().to_string()]);
    let busy = format!("{:#}", busy.unwrap_err());
    assert!(
        busy.starts_with(&format!("writing [[partition]] #2 (data) to {part}: ")) && busy.contains("busy"),
        "{busy}"
    );
    let big = super::raw::RawPlace { bytes: (32 << 20) + 1, ..place };
    let error = format!("{:#}", big.fill(&mut &content[..], &mut ()).unwrap_err());
    assert!(error.ends_with("33554433 bytes do not fit into its 33554432"), "{error}");
}

#[test]
fn content_comes_out_byte_for_byte_on_512_byte_sectors() {
    way(512);
}

#[test]
fn content_comes_out_byte_for_byte_on_4096_byte_sectors() {
    way(4096);
}
