//! Writing a layout as TOML that people can read and change: comments, one key a line, empty keys left out.

use crate::model::{
    Content, DiskRule, Format, Group, Layout, Logical, Luks, Match, Partition, Pick, Raid, Subvolume,
    TableKind,
};
use std::fmt::Write;

/// `layout` as the text of a layout file. `comments` come first, each as a line with `#`.
#[must_use]
pub fn to_toml(layout: &Layout, comments: &[String]) -> String {
    let mut text = String::new();
    for comment in comments {
        for line in comment.lines() {
            text.push_str(format!("# {line}").trim_end());
            text.push('\n');
        }
    }
    line(&mut text, "version", &layout.version.to_string());
    for disk in &layout.disks {
        write_disk(&mut text, disk);
    }
    if !layout.partitions.is_empty() {
        text.push_str(
            "\n# Partitions lie on the disk in this order. size: \"512M\" exactly, \"4G-20G\" between, \"4G-\" at least,\n\
             # \"10%\" of the disk, or \"fill\". What is left over is shared by those that can grow.\n",
        );
    }
    for partition in &layout.partitions {
        write_partition(&mut text, partition);
    }
    for raid in &layout.raids {
        let Raid { name, level, members, metadata, .. } = raid;
        text.push_str("\n[[raid]]\n");
        line(&mut text, "name", &quoted(name));
        line(&mut text, "level", &level.to_string());
        line(&mut text, "members", &list(members));
        line(&mut text, "metadata", &quoted(metadata));
        write_content(&mut text, &raid.content());
    }
    for luks in &layout.luks {
        let Luks { name, on, version, crypttab, options, .. } = luks;
        text.push_str("\n[[luks]]\n");
        line(&mut text, "name", &quoted(name));
        line(&mut text, "on", &quoted(on));
        line(&mut text, "version", &version.to_string());
        if let Some(words) = crypttab {
            line(&mut text, "crypttab", &quoted(words));
        }
        if !options.is_empty() {
            line(&mut text, "options", &list(options));
        }
        write_content(&mut text, &luks.content());
    }
    for Group { name, on } in &layout.vgs {
        text.push_str("\n[[vg]]\n");
        line(&mut text, "name", &quoted(name));
        line(&mut text, "on", &list(on));
    }
    for lv in &layout.lvs {
        let Logical { vg, name, size, weight, .. } = lv;
        text.push_str("\n[[lv]]\n");
        line(&mut text, "vg", &quoted(vg));
        line(&mut text, "name", &quoted(name));
        line(&mut text, "size", &quoted(size));
        if let Some(weight) = weight {
            line(&mut text, "weight", &weight.to_string());
        }
        write_content(&mut text, &lv.content());
    }
    text
}

fn line(text: &mut String, key: &str, value: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{key} = {value}");
}

fn quoted(value: &str) -> String {
    // A value of type String always has a TOML form, with everything escaped that needs it.
    toml::Value::String(value.to_owned()).to_string()
}

fn list(values: &[String]) -> String {
    format!("[{}]", values.iter().map(|v| quoted(v)).collect::<Vec<_>>().join(", "))
}

fn table(pairs: &[(&str, Option<String>)]) -> String {
    let pairs: Vec<String> =
        pairs.iter().filter_map(|(key, value)| value.as_ref().map(|v| format!("{key} = {v}"))).collect();
    if pairs.is_empty() { "{}".into() } else { format!("{{ {} }}", pairs.join(", ")) }
}

fn write_disk(text: &mut String, disk: &DiskRule) {
    text.push_str("\n[[disk]]\n");
    line(text, "name", &quoted(&disk.name));
    let Match { size, transport, model, serial, wwn, path, rotational, removable } = &disk.matching;
    let string = |value: &Option<String>| value.as_deref().map(quoted);
    let matching = table(&[
        ("size", string(size)),
        ("transport", transport.as_deref().map(list)),
        ("model", string(model)),
        ("serial", string(serial)),
        ("wwn", string(wwn)),
        ("path", string(path)),
        ("rotational", rotational.map(|b| b.to_string())),
        ("removable", removable.map(|b| b.to_string())),
    ]);
    line(text, "match", &matching);
    match disk.pick {
        Pick::Only => {}
        Pick::Smallest => line(text, "pick", "\"smallest\""),
        Pick::Largest => line(text, "pick", "\"largest\""),
    }
    line(
        text,
        "table",
        match disk.table {
            TableKind::Gpt => "\"gpt\"",
            TableKind::Mbr => "\"mbr\"",
        },
    );
    if let Some(uuid) = &disk.uuid {
        line(text, "uuid", &quoted(uuid));
    }
}

fn write_partition(text: &mut String, partition: &Partition) {
    let Partition {
        disk,
        id,
        number,
        kind,
        size,
        start,
        weight,
        name,
        uuid,
        bootable,
        format: _,
        subvolumes: _,
        mount: _,
        preserve,
        raw,
    } = partition;
    text.push_str("\n[[partition]]\n");
    let mut optional = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            line(text, key, &value);
        }
    };
    optional("disk", disk.as_deref().map(quoted));
    optional("id", id.as_deref().map(quoted));
    optional("number", number.map(|n| n.to_string()));
    optional("type", Some(quoted(kind)));
    optional("size", Some(quoted(size)));
    optional("start", start.as_deref().map(quoted));
    optional("weight", weight.map(|w| w.to_string()));
    optional("name", name.as_deref().map(quoted));
    optional("uuid", uuid.as_deref().map(quoted));
    optional("bootable", bootable.then(|| "true".into()));
    write_content(text, &partition.content());
    let mut optional = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            line(text, key, &value);
        }
    };
    optional("preserve", preserve.then(|| "true".into()));
    optional("raw", raw.then(|| "true".into()));
}

fn write_content(text: &mut String, content: &Content<'_>) {
    let mut optional = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            line(text, key, &value);
        }
    };
    optional(
        "format",
        content.format.map(|Format { fs, label, uuid, options }| {
            table(&[
                ("fs", Some(quoted(fs.name()))),
                ("uuid", uuid.as_deref().map(quoted)),
                ("label", label.as_deref().map(quoted)),
                ("options", (!options.is_empty()).then(|| list(options))),
            ])
        }),
    );
    optional("subvolumes", (!content.subvolumes.is_empty()).then(|| subvolume_list(content.subvolumes)));
    optional(
        "mount",
        content.mount.map(|m| {
            table(&[("path", Some(quoted(&m.path))), ("options", m.options.as_deref().map(quoted))])
        }),
    );
}

fn subvolume_list(subvolumes: &[Subvolume]) -> String {
    let one = |Subvolume { name, path, options, default }: &Subvolume| {
        table(&[
            ("name", Some(quoted(name))),
            ("path", path.as_deref().map(quoted)),
            ("options", options.as_deref().map(quoted)),
            ("default", default.then(|| "true".into())),
        ])
    };
    let lines: String = subvolumes.iter().map(|s| format!("  {},\n", one(s))).collect();
    format!("[\n{lines}]")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Fs, Mount};
    use proptest::option::of;
    use proptest::prelude::*;

    fn text() -> impl Strategy<Value = String> {
        "\\PC{0,12}"
    }

    prop_compose! {
        fn matching()(size in of(text()), transport in of(proptest::collection::vec(text(), 0..3)), model in of(text()),
            serial in of(text()), wwn in of(text()), path in of(text()), rotational in of(any::<bool>()),
            removable in of(any::<bool>())) -> Match {
            Match { size, transport, model, serial, wwn, path, rotational, removable }
        }
    }

    prop_compose! {
        fn disk()(name in text(), matching in matching(), pick in 0..3, gpt in any::<bool>(), uuid in of(text())) -> DiskRule {
            DiskRule {
                name,
                matching,
                pick: [Pick::Only, Pick::Smallest, Pick::Largest][usize::try_from(pick).unwrap()],
                table: if gpt { TableKind::Gpt } else { TableKind::Mbr },
                uuid,
            }
        }
    }

    fn fs() -> impl Strategy<Value = Fs> {
        use Fs::{Btrfs, Ext2, Ext3, Ext4, Swap, Vfat, Xfs};
        proptest::sample::select(vec![Ext2, Ext3, Ext4, Xfs, Btrfs, Vfat, Swap])
    }

    prop_compose! {
        fn format()(fs in fs(), label in of(text()), uuid in of(text()), options in proptest::collection::vec(text(), 0..3))
            -> Format {
            Format { fs, label, uuid, options }
        }
    }

    prop_compose! {
        fn subvolume()(name in text(), path in of(text()), options in of(text()), default in any::<bool>()) -> Subvolume {
            Subvolume { name, path, options, default }
        }
    }

    prop_compose! {
        fn partition()(disk in of(text()), id in of(text()), number in of(any::<u32>()), kind in text(), size in text(), start in of(text()),
            weight in of(any::<u32>()), name in of(text()), uuid in of(text()), format in of(format()),
            subvolumes in proptest::collection::vec(subvolume(), 0..3), mount in of((text(), of(text()))),
            flags in any::<[bool; 3]>()) -> Partition {
            let mount = mount.map(|(path, options)| Mount { path, options });
            let [bootable, preserve, raw] = flags;
            Partition {
                disk, id, number, kind, size, start, weight, name, uuid, bootable, format, subvolumes, mount, preserve, raw,
            }
        }
    }

    prop_compose! {
        fn volumes()(names in proptest::collection::vec(text(), 4), list in proptest::collection::vec(text(), 0..3),
            number in any::<u32>(), some in of(text()), weight in of(any::<u32>()), format in of(format()),
            subvolumes in proptest::collection::vec(subvolume(), 0..2), mount in of((text(), of(text())))) -> Layout {
            let mount = mount.map(|(path, options)| Mount { path, options });
            let [name, on, metadata, size] = [0, 1, 2, 3].map(|i: usize| names[i].clone());
            Layout {
                raids: vec![Raid {
                    name: name.clone(), level: number, members: list.clone(), metadata, format: format.clone(),
                    subvolumes: subvolumes.clone(), mount: mount.clone(),
                }],
                luks: vec![Luks {
                    name: name.clone(), on: on.clone(), version: number, crypttab: some, options: list.clone(),
                    format: format.clone(), subvolumes: subvolumes.clone(), mount: mount.clone(),
                }],
                vgs: vec![Group { name: name.clone(), on: list }],
                lvs: vec![Logical { vg: on, name, size, weight, format, subvolumes, mount }],
                ..Layout::default()
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(volumes in volumes(), version in any::<u32>(), disks in proptest::collection::vec(disk(), 1..3),
            partitions in proptest::collection::vec(partition(), 0..4), comment in "\\PC{0,40}") {
            let layout = Layout { version, disks, partitions, ..volumes };
            let text = to_toml(&layout, &[comment]);
            prop_assert_eq!(toml::from_str::<Layout>(&text).map_err(|e| format!("{e}\n{text}")), Ok(layout));
        }
    }
}
