//! Reads the sources: what the compiler does not check and reviewers should not have to.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
};

/// Places that may contain `unsafe`; growing the list is a design decision (docs/ARCHITECTURE.md).
const UNSAFE: &[&str] = &[
    "smc/src/sys.rs",
    "smc/src/rawsys.rs",
    "smc/src/section.rs",
    "smc/src/fd.rs",
    "smc/src/sync.rs",
    "smc/src/models.rs",
    "smc/src/models/",
    "smc/src/once.rs",
    "smc/src/alloc.rs",
    "smc/src/arena.rs",
    "smc/src/mem/",
    "smc/src/ring/",
    "smc/src/lgr/",
    "smc/src/handshake/",
    "smc/src/conn/",
    "preload/src/",
    "cli/src/bpf/kernel.rs",
    "rdma/src/completion.rs",
    "rdma/src/device.rs",
    "rdma/src/memory.rs",
    "rdma/src/queue_pair.rs",
    "rdma/src/service/abi.rs",
    "rdma/src/service/page.rs",
    "rdma/examples/",
    "rdma/tests/",
    "tests/",
    "benches/",
    "examples/",
];

fn sources() -> Vec<(String, String)> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut out = Vec::new();
    let mut todo: Vec<PathBuf> =
        ["smc/src", "preload/src", "cli/src", "xtask/src", "rdma/src", "rdma/tests", "tests"]
            .iter()
            .map(|d| root.join(d))
            .collect();
    while let Some(dir) = todo.pop() {
        for e in fs::read_dir(&dir).expect("a source folder").flatten() {
            let p = e.path();
            if p.is_dir() {
                todo.push(p);
            } else if p.extension().is_some_and(|x| x == "rs") {
                let name = p.strip_prefix(&root).expect("below the root").display().to_string();
                out.push((name, fs::read_to_string(&p).expect("utf-8")));
            }
        }
    }
    out
}

#[test]
fn unsafe_only_where_listed() {
    let bad: Vec<_> = sources()
        .into_iter()
        .filter(|(n, t)| {
            !UNSAFE.iter().any(|u| n.starts_with(u))
                && t.lines().any(|l| {
                    !l.trim_start().starts_with("//") && (l.contains("unsafe {") || l.contains("unsafe fn"))
                })
        })
        .map(|(n, _)| n)
        .collect();
    assert!(bad.is_empty(), "unsafe outside the listed places: {bad:?}");
}

#[test]
fn every_file_says_what_it_is_for() {
    let bad: Vec<_> =
        sources().into_iter().filter(|(_, t)| !t.trim_start().starts_with("//!")).map(|(n, _)| n).collect();
    assert!(bad.is_empty(), "files without a //! header: {bad:?}");
}

fn document(name: &str) -> String {
    fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name)).expect(name)
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The word that a text begins with.
fn word(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    &text[..end]
}

/// The names that libsmc.so exports: what the macros `hook!`, `alias!` and the like are given.
fn hooks() -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    for (_, text) in sources().into_iter().filter(|(n, _)| n.starts_with("preload/src/hooks/")) {
        for part in ["\nhook! {", "\nfd_hook! {"].iter().flat_map(|m| text.split(m).skip(1)) {
            let at = part.find("    fn ").expect("a function in hook!");
            out.insert(word(&part[at + 7..]).to_string());
        }
        // `name = …;` and `name => …;`, with comments between.
        let code: String =
            text.lines().filter(|l| !l.trim_start().starts_with("//")).map(|l| format!("{l}\n")).collect();
        for part in ["\nalias! {", "\nvariadic! {", "\nled! {"].iter().flat_map(|m| code.split(m).skip(1)) {
            let body = &part[..part.find('}').expect("an end")];
            out.extend(body.split(';').map(|l| word(l.trim()).to_string()).filter(|n| !n.is_empty()));
        }
    }
    out
}

/// The cells of the rows of a document's tables: no heads, no lines beneath them.
fn rows(text: &str) -> Vec<Vec<&str>> {
    let lines: Vec<_> = text.lines().collect();
    let is_rule = |l: Option<&&str>| l.is_some_and(|l| l.starts_with("| ---"));
    lines
        .iter()
        .enumerate()
        .filter(|(i, l)| l.starts_with("| ") && !is_rule(Some(l)) && !is_rule(lines.get(i + 1)))
        .map(|(_, l)| l.trim_matches('|').split('|').map(str::trim).collect())
        .collect()
}

/// The tests that a document may name: `file::name`. False: a scenario that is known to fail.
fn tests() -> BTreeMap<String, bool> {
    let mut out = BTreeMap::new();
    for (file, text) in sources() {
        let Some(name) = file.strip_prefix("tests/").and_then(|n| n.strip_suffix(".rs")) else { continue };
        if let Some(file) = name.strip_prefix("sockets/") {
            // A table's line, or lines: `s!(name).procs().open("why"),`
            for part in text.split("    s!(").skip(1) {
                let line = part.split("    s!(").next().and_then(|p| p.split("];").next()).unwrap_or(part);
                out.insert(format!("{file}::{}", word(part)), !line.contains(".open("));
            }
        } else if name == "programs/bodies" {
            let named = text.split(" p(\"").skip(1).filter_map(|p| p.split('"').next());
            out.extend(named.map(|n| (format!("programs::{n}"), true)));
        } else {
            out.extend(text.split("\nfn ").skip(1).map(|p| (format!("{name}::{}", word(p)), true)));
        }
    }
    out
}

#[test]
fn the_table_of_calls_has_every_hook() {
    let text = document("docs/SOCKET_API.md");
    let mut told = BTreeMap::new();
    for row in rows(&text) {
        for call in quoted(row[0]) {
            told.entry(word(call).to_string()).or_insert(row[1]);
        }
    }
    let hooks = hooks();
    assert!(hooks.len() > 80, "hooks are not found in the sources any more: {hooks:?}");
    let wanting: Vec<_> = hooks.iter().filter(|h| !told.contains_key(*h)).collect();
    assert!(wanting.is_empty(), "hooks in no table of docs/SOCKET_API.md: {wanting:?}");
    // And the other way: what libsmc has a part in it must see.
    let is_call = |n: &str| n.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    let unseen: Vec<_> =
        told.iter().filter(|(n, how)| is_call(n) && **how != "kernel" && !hooks.contains(*n)).collect();
    assert!(unseen.is_empty(), "said to be served, and no hook: {unseen:?}");
}

#[test]
fn the_table_of_calls_names_tests_that_exist_and_pass() {
    let text = document("docs/SOCKET_API.md");
    let tests = tests();
    for name in quoted(&text).filter(|n| n.contains("::")) {
        assert!(tests.contains_key(name), "docs/SOCKET_API.md names {name}, which is no test");
    }
    for row in rows(&text) {
        let (how, shown) = (row[1], row[row.len() - 1]);
        for name in quoted(shown) {
            assert_ne!(tests.get(name), Some(&false), "{name} is an open scenario: it shows nothing");
        }
        let same = how == "the same function" || how.starts_with('`') || row[0].starts_with("others (");
        assert!(same || shown.contains("::"), "no test shows the row of {}", row[0]);
    }
    // Each scenario that is open is owned up to.
    let differs = text.split("## What differs from TCP").nth(1).expect("the section");
    for (name, _) in tests.iter().filter(|(_, passes)| !**passes) {
        assert!(
            differs.contains(name.as_str()),
            "{name} is open, and not told under \"What differs from TCP\""
        );
    }
}

/// The tags of the ORDERING comments: where each stands, and whether it says that it pairs with itself.
fn edges() -> BTreeMap<String, (usize, bool)> {
    let mut out = BTreeMap::new();
    for (_, text) in sources().into_iter().filter(|(n, _)| !n.starts_with("tests/")) {
        for part in text.split("// ORDERING [").skip(1) {
            let (tag, rest) = part.split_once(']').expect("a tag ends");
            let e: &mut (usize, bool) = out.entry(tag.to_string()).or_default();
            e.0 += 1;
            e.1 |= rest.split("\n\n").next().is_some_and(|c| c.contains("pairs with itself"));
        }
    }
    out
}

#[test]
fn edges_stand_at_both_ends_and_in_the_table() {
    let text = document("docs/ARCHITECTURE.md");
    let table =
        text.split("\n## Orderings").nth(1).and_then(|t| t.split("\n## ").next()).expect("the section");
    let told: BTreeMap<_, _> =
        rows(table).into_iter().map(|r| (r[0].trim_matches('`').to_string(), r[4].to_string())).collect();
    let edges = edges();
    assert!(!edges.is_empty());
    for (tag, (places, alone)) in &edges {
        assert!(told.contains_key(tag), "[{tag}] is not in the table of docs/ARCHITECTURE.md");
        assert!(*places > 1 || *alone, "[{tag}] stands at one end only");
    }
    let unknown: Vec<_> = told.keys().filter(|t| !edges.contains_key(*t)).collect();
    assert!(unknown.is_empty(), "edges of docs/ARCHITECTURE.md that no source names: {unknown:?}");
    // The models: those named exist, and those that exist are named.
    let all: BTreeSet<String> = sources()
        .into_iter()
        .filter(|(n, _)| n.starts_with("smc/src/"))
        .flat_map(|(_, t)| {
            t.split("fn loom_").skip(1).map(|p| format!("loom_{}", word(p))).collect::<Vec<_>>()
        })
        .collect();
    let named: BTreeSet<String> =
        quoted(table).filter(|q| q.starts_with("loom_")).map(str::to_string).collect();
    assert_eq!(named, all);
}

#[test]
fn the_map_shows_places_that_exist() {
    let text = document("docs/ARCHITECTURE.md");
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let files: Vec<_> = sources().into_iter().map(|(n, _)| n).collect();
    let mut seen = 0;
    for name in text.split(|c: char| c.is_whitespace() || "`(),|".contains(c)) {
        if name.ends_with(".rs") || name.ends_with('/') && name.len() > 1 && !name.starts_with('/') {
            seen += 1;
            let known =
                files.iter().any(|f| f == name || f.ends_with(&format!("/{name}")) || f.contains(name));
            assert!(known || root.join(name).exists(), "docs/ARCHITECTURE.md: no {name}");
        }
    }
    assert!(seen > 20);
}

#[test]
fn every_reason_has_a_remedy() {
    let text = document("docs/TROUBLESHOOTING.md");
    let told: BTreeMap<_, _> =
        rows(&text).into_iter().filter(|r| r.len() == 3).map(|r| (r[0].trim_matches('`'), r)).collect();
    let code: String = sources()
        .into_iter()
        .filter(|(n, _)| n != "smc/src/reason.rs" && !n.starts_with("tests/") && !n.ends_with("_tests.rs"))
        .map(|(_, t)| t.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default().to_string())
        .collect();
    for r in smc::reason::Reason::ALL {
        let row = told.get(r.name()).unwrap_or_else(|| panic!("{r} is not in docs/TROUBLESHOOTING.md"));
        assert!(row[1..].iter().all(|c| !c.is_empty()), "{r}: no remedy");
        // `Reason::Splice` alone, not as the start of a longer name.
        let given = code.split(&format!("Reason::{r:?}")).skip(1).any(|rest| word(rest).is_empty());
        assert_eq!(row[1].contains("Not given by this version"), !given, "{r}: is it given?");
    }
    let unknown: Vec<_> =
        told.keys().filter(|n| !smc::reason::Reason::ALL.iter().any(|r| r.name() == **n)).collect();
    assert!(unknown.is_empty(), "no reasons: {unknown:?}");
}

/// std's owners of descriptors panic when another thread of the program has closed theirs, and a panic in the
/// program's own call ends it.
#[test]
fn no_std_files_inside_a_program() {
    let owners = ["std::fs", "std::net::Tcp", "std::os::unix::net", "OwnedFd"];
    let bad: Vec<_> = sources()
        .into_iter()
        .filter(|(n, _)| n.starts_with("preload/src/"))
        .filter(|(_, t)| {
            t.lines().any(|l| !l.trim_start().starts_with("//") && owners.iter().any(|o| l.contains(o)))
        })
        .map(|(n, _)| n)
        .collect();
    assert!(bad.is_empty(), "descriptors of std's in the shim: {bad:?}");
}

#[test]
fn promises_name_tests_that_exist() {
    let text = document("SECURITY.md");
    let promises =
        text.split("## What is promised").nth(1).and_then(|t| t.split("\n## ").next()).expect("promises");
    let mut all: Vec<_> = sources().into_iter().map(|(_, t)| t).collect();
    all.extend(["rendezvous", "any_input"].map(|n| document(&format!("smc/tests/{n}.rs"))));
    let is_test = |name: &str| {
        all.iter().any(|t| t.contains(&format!("fn {name}(")) || t.contains(&format!("\"{name}\"")))
    };
    let rows: Vec<_> = rows(promises).into_iter().filter(|r| r.len() == 3).collect();
    assert!(rows.len() > 8, "a table of promises");
    for row in rows {
        let mut names = quoted(row[2]).filter(|n| n.contains('_') && !n.contains('/')).peekable();
        assert!(names.peek().is_some() || row[2].contains("each test"), "no test shows that {}", row[0]);
        for name in names {
            assert!(is_test(name), "SECURITY.md names {name}, which is no test");
        }
    }
}

/// What a table of docs/PROTOCOL.md whose head names `what` has: offsets and bytes.
fn fields(what: &str) -> Vec<(usize, usize)> {
    let text = document("docs/PROTOCOL.md");
    let named = |l: &&str| l.starts_with("| offset") && l.contains(what);
    let at = text.lines().position(|l| named(&l)).unwrap_or_else(|| panic!("no table of {what}"));
    let rows = text.lines().skip(at + 2).take_while(|l| l.starts_with("| "));
    let number = |cell: Option<&str>| cell.and_then(|c| c.trim().parse().ok());
    let row = |l: &str| (number(l.split('|').nth(1)), number(l.split('|').nth(2)));
    rows.map(row).map(|r| (r.0.expect("an offset"), r.1.expect("bytes"))).collect()
}

#[test]
fn the_protocol_document_has_the_places_of_the_code() {
    use smc::handshake::Side;
    use smc::wire::clc::{Accept, Confirm, Decline, Message, Proposal, Sender, encode};
    let sender = Sender {
        layout_version: smc::mem::layout::LAYOUT_VERSION,
        role: Side::Accept,
        instance: 0x0101_0101_0101_0101,
        pid: 0x0202_0202,
        cookie: 0x0303_0303_0303_0303,
    };
    let four = |n: u8| u64::from(u32::from_ne_bytes([n; 4]));
    let eight = |n: u8| u64::from_ne_bytes([n; 8]);
    let proposal = Proposal {
        sender,
        ring_size: four(4) as u32,
        known_instance: eight(5),
        known_lgr: eight(6),
        known_segments: eight(7),
    };
    let accept = Accept {
        sender,
        lgr: eight(4),
        segment: 5,
        first_contact: true,
        segment_size: eight(7),
        page: eight(8),
        rings: [eight(9), eight(10)],
        ring_size: four(6) as u32,
    };
    let confirm = Confirm { sender, lgr: eight(4), segment: four(5) as u32 };
    let decline = Decline { instance: eight(4), diagnosis: four(5) as u32, out_of_sync: false };
    // The last byte of each field in turn.
    let last: [(&str, Message, &[u8]); 5] = [
        ("`sender`", Message::Confirm(confirm), &[smc::mem::layout::LAYOUT_VERSION as u8, 1, 0, 1, 2, 3]),
        ("`Proposal`", Message::Proposal(proposal), &[4, 5, 6, 7]),
        ("`Accept`", Message::Accept(accept), &[4, 5, 6, 7, 8, 9, 10]),
        ("`Confirm`", Message::Confirm(confirm), &[4, 5]),
        ("`Decline`", Message::Decline(decline), &[4, 5, 0]),
    ];
    let text = document("docs/PROTOCOL.md");
    for (what, message, values) in last {
        let encoded = encode(&message);
        let bytes = encoded.as_bytes();
        let told = fields(what);
        let found: Vec<u8> = told.iter().map(|(at, n)| bytes[at + n - 1]).collect();
        assert_eq!(found, values, "{what}: docs/PROTOCOL.md has its fields elsewhere");
        assert!(told.windows(2).all(|w| w[0].0 + w[0].1 == w[1].0), "{what}: gaps in docs/PROTOCOL.md");
        if what != "`sender`" {
            let end = told.last().map_or(0, |(at, n)| at + n + 4);
            assert_eq!(bytes.len(), end, "{what}: other fields than in docs/PROTOCOL.md");
            assert!(text.contains(&format!("{what}, {end} bytes")), "{what}: its length");
        }
    }

    let version = smc::mem::layout::LAYOUT_VERSION;
    assert!(text.contains(&format!("version of the page's layout, {version};")), "the layout's version");
    use smc::mem::layout::{CONN_PAGE_SIZE, HintLine, RxLine, SidePage, TxLine};
    use std::mem::offset_of;
    let (rx, ctl, hint) = (offset_of!(SidePage, rx), offset_of!(SidePage, ctl), offset_of!(SidePage, hint));
    let page = [
        (offset_of!(TxLine, prod), 8),
        (offset_of!(TxLine, switch_at), 8),
        (offset_of!(TxLine, origin), 8),
        (offset_of!(TxLine, rang), 4),
        (offset_of!(TxLine, sndbuf), 4),
        (rx + offset_of!(RxLine, cons), 8),
        (rx + offset_of!(RxLine, stop_at), 8),
        (rx + offset_of!(RxLine, ready), 4),
        (rx + offset_of!(RxLine, rcvbuf), 4),
        (ctl, 4),
        (hint + offset_of!(HintLine, cpu), 4),
        (hint + offset_of!(HintLine, detached), 4),
    ];
    assert_eq!(fields("`page`"), page, "the page in docs/PROTOCOL.md");
    assert!(text.contains(&format!("{CONN_PAGE_SIZE} bytes, {} for each end", size_of::<SidePage>())));
}
