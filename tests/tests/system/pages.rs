//! Tests of the commands in the pages: each block of commands is executed on a machine on which nothing is installed, or says
//! why it cannot be.
//!
//! A block of `sh` is executed by a test. The exception is a comment above it: `<!-- not executed: REASON -->`. Blocks without a
//! language, and of `text`, are not commands.

use std::path::{Path, PathBuf};

use claviger_tests::{said, sandbox};

/// The root of the sources.
pub(super) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A block of a page.
struct Block {
    page: String,
    line: usize,
    language: String,
    /// Why it is not executed.
    reason: Option<String>,
    text: String,
}

impl Block {
    fn is_executed(&self) -> bool {
        self.language == "sh" && self.reason.is_none()
    }
}

/// The blocks of a page, in order.
fn blocks(page: &str) -> Vec<Block> {
    let text = std::fs::read_to_string(root().join(page)).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    let mut at = 0;
    while at < lines.len() {
        if let Some(language) = lines[at].strip_prefix("```") {
            let end = (at + 1..lines.len()).find(|end| lines[*end] == "```").unwrap_or_else(|| panic!("{page}:{at}"));
            let above = at.checked_sub(1).map_or("", |above| lines[above]);
            let reason = above.strip_prefix("<!-- not executed: ").and_then(|rest| rest.strip_suffix(" -->"));
            found.push(Block {
                page: page.to_owned(),
                line: at + 1,
                language: language.to_owned(),
                reason: reason.map(str::to_owned),
                text: lines[at + 1..end].join("\n") + "\n",
            });
            at = end;
        }
        at += 1;
    }
    found
}

/// The commands of a page that are executed.
fn script(page: &str) -> String {
    blocks(page).into_iter().filter(Block::is_executed).map(|block| block.text).collect()
}

/// The commands of a page that are executed, from a heading on.
pub(super) fn script_after(page: &str, heading: &str) -> String {
    let text = std::fs::read_to_string(root().join(page)).unwrap();
    let from = text.lines().position(|line| line == heading).unwrap();
    blocks(page)
        .into_iter()
        .filter(|block| block.line > from)
        .filter(Block::is_executed)
        .map(|block| block.text)
        .collect()
}

/// All pages for users.
fn pages() -> Vec<String> {
    let mut pages = vec!["README.md".to_owned(), "dashboards/README.md".to_owned()];
    for folder in ["docs", "docs/hsm", "docs/wire"] {
        let Ok(entries) = std::fs::read_dir(root().join(folder)) else { continue };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        pages.extend(names.filter(|name| name.ends_with(".md")).map(|name| format!("{folder}/{name}")));
    }
    pages.sort();
    pages
}

/// The pages with executed blocks, and where they are executed.
const EXECUTED: [(&str, &str); 4] = [
    ("docs/install.md", "here"),
    ("docs/operations.md", "here"),
    ("docs/linux.md", "linux_page.rs"),
    ("docs/tenant.md", "tenant.rs"),
];

/// The programs whose lines are commands.
const PROGRAMS: [&str; 13] = [
    "claviger",
    "claviger-loadgen",
    "systemctl",
    "openssl",
    "install",
    "make",
    "curl",
    "cargo",
    "apt-get",
    "softhsm2-util",
    "promtool",
    "docker",
    "sudo",
];

#[test]
fn every_block_of_commands_is_executed_or_says_why_not() {
    let mut faults = Vec::new();
    for block in pages().iter().flat_map(|page| blocks(page)) {
        let place = format!("{}:{}", block.page, block.line);
        let first = |line: &str| line.trim_start_matches("$ ").split_whitespace().next().unwrap_or_default().to_owned();
        let has_commands = block.text.lines().any(|line| PROGRAMS.contains(&first(line).as_str()));
        if has_commands && !["sh", "text"].contains(&block.language.as_str()) {
            faults.push(format!("{place}: commands in a block that is not sh"));
        }
        if block.is_executed() && !EXECUTED.iter().any(|(page, _)| *page == block.page) {
            faults.push(format!("{place}: no test executes this page, and the block does not say why"));
        }
        if block.reason.as_ref().is_some_and(|reason| reason.split(' ').count() < 3) {
            faults.push(format!("{place}: the reason is no sentence"));
        }
        // Two on one line are taken for one when they are pasted.
        let are_two = |line: &&str| block.language == "sh" && line.trim_start().contains("  claviger ");
        let several = block.text.lines().filter(are_two);
        faults.extend(several.map(|line| format!("{place}: two commands on a line: {line}")));
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// The release build of which the page speaks.
const BUILT: &str = "mkdir -p target/release\ncp /tmp/claviger-bin/claviger target/release/\n";
/// What a person would do who sees a failure.
pub(super) const ON_FAILURE: &str =
    "trap 'status=$?; [ $status = 0 ] || cat /tmp/journal || true; exit $status' EXIT\nset -x\n";

#[test]
fn the_install_page_leads_from_nothing_to_a_release() {
    if !sandbox::is_possible() {
        return;
    }
    let page = script("docs/install.md");
    let ran = sandbox::run(&format!("{ON_FAILURE}{BUILT}{page}"));
    let said = said(&ran);
    assert!(ran.status.success(), "{said}");
    for expected in ["made      2 soft tokens", "ready     keys are released", "added host node-1", "0 errors"] {
        assert!(said.contains(expected), "no {expected:?} in\n{said}");
    }
    // From the installed program to the first release.
    let second = page.split_once("claviger init").map(|(_, rest)| format!("claviger init{rest}")).unwrap();
    let checks = ["curl", "claviger doctor", "cmp"];
    let commands = second.lines().filter(|line| !checks.iter().any(|check| line.starts_with(check)));
    let commands: Vec<&str> = commands.filter(|line| !line.is_empty()).collect();
    assert!(commands.len() <= 12, "{commands:#?}");
}

/// A service on one soft token, set up as the page on installation says, and the files that the page on operations speaks of.
const SERVICE: &str = r#"
install -m 0755 /tmp/claviger-bin/claviger /usr/bin/claviger
install -D -m 0644 daemon/packaging/systemd/claviger.service /usr/lib/systemd/system/claviger.service
install -D -m 0644 daemon/packaging/sysusers.d/claviger.conf /usr/lib/sysusers.d/claviger.conf
install -D -m 0644 daemon/packaging/tmpfiles.d/claviger.conf /usr/lib/tmpfiles.d/claviger.conf
systemd-sysusers claviger.conf
systemd-tmpfiles --create claviger.conf
claviger init --soft-tokens 1 --certificates lab --bits 2048
printf '\n[audit]\ncheckpoint_seconds = 1\n' >>/etc/claviger/claviger.toml
systemctl enable --now claviger
claviger init --certificates lab --bits 2048
cd "$(mktemp -d)"
openssl req -x509 -newkey rsa:2048 -nodes -days 900 -subj /CN=CA -keyout ca.key -out ca.pem
for node in 17 18; do
  openssl genrsa -out key.pem 2048
  openssl rsa -in key.pem -pubout -out node-$node.pub.pem
done
umask 077
echo a-password >pfx.password
echo a-long-passphrase >export.passphrase
for name in tenant acme-signing acme-encryption; do
  openssl req -x509 -newkey rsa:2048 -nodes -days 900 -subj /CN=$name -addext keyUsage=digitalSignature,dataEncipherment \
    -keyout key.pem -out crt.pem
  openssl pkcs12 -export -inkey key.pem -in crt.pem -passout file:pfx.password -out $name.pfx
done
"#;

const LOSS: &str = "systemctl stop claviger\n\
    rm /var/lib/claviger/*.db*\n\
    systemctl start claviger\n\
    if claviger hosts list | grep node-18; then exit 9; fi\n\
    systemctl stop claviger\n";

#[test]
fn the_commands_of_the_page_on_operations_work() {
    if !sandbox::is_possible() {
        return;
    }
    let page = script("docs/operations.md");
    // Before the restore, the state is lost. Tokens and configuration stay.
    let (before, restore) = page.split_once("systemctl enable --now claviger\n").unwrap();
    let page = format!("{before}{LOSS}systemctl enable --now claviger\n{restore}");
    let ran = sandbox::run(&format!("{ON_FAILURE}{SERVICE}{page}"));
    let said = said(&ran);
    assert!(ran.status.success(), "{said}");
    for expected in [
        "self-signature verify OK",
        "primary now: signing certificate",
        "removed host node-17",
        "revoked: health certificates",
        "nothing to change",
        "host node-18 is added, labels tenant=acme",
        "becomes the primary one",
        "are one chain",
    ] {
        assert!(said.contains(expected), "no {expected:?} in\n{said}");
    }
}
