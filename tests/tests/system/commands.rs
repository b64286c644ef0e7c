//! Tests of what spares an administrator typing: the daemon that commands find, several names at once, tips, completions,
//! manual pages, and questions before what keeps machines from starting.

use std::path::Path;
use std::process::{Command, Output};

use claviger_protocol::rsa_key::RsaPrivateKey;
use claviger_tests::{Administrator, HOST, Lab, Options, claviger, loadgen, run, said, tool};
use serde_json::{Value, json};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a command in which nothing but these variables says where the daemon is.
fn with(variables: &[(&str, &Path)], arguments: &[&str]) -> Output {
    let mut command = Command::new(claviger());
    command.args(arguments).env_remove("CLAVIGER_SOCKET").env_remove("CLAVIGER_CONFIG");
    command.envs(variables.iter().copied()).output().unwrap()
}

#[test]
fn a_daemon_is_found_by_option_or_environment() {
    let (_daemon, lab) = Lab::start(Options::default());
    let (socket, config, wrong) = (lab.socket(), lab.config_file(), lab.file("nowhere"));
    let list = ["hosts", "list"];
    let works = |variables: &[(&str, &Path)], arguments: &[&str]| {
        let output = with(variables, arguments);
        assert!(output.status.success() && said(&output).contains(HOST), "{}", said(&output));
    };
    works(&[("CLAVIGER_SOCKET", &socket)], &list);
    works(&[("CLAVIGER_CONFIG", &config)], &list);
    works(&[("CLAVIGER_SOCKET", &socket), ("CLAVIGER_CONFIG", &wrong)], &list);
    works(&[("CLAVIGER_SOCKET", &wrong)], &["hosts", "list", "--config", text(&config)]);
    works(&[], &["hosts", "list", "--socket", text(&socket), "--config", text(&wrong)]);
    let refused = with(&[("CLAVIGER_SOCKET", &wrong)], &list);
    assert!(said(&refused).contains("there is no administrators' socket at"), "{}", said(&refused));
    // The doctor and the file's own commands follow the variable, too.
    let shown = with(&[("CLAVIGER_CONFIG", &config)], &["config", "show", "--json"]);
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["release"]["queue"], 4096);
    let checked = with(&[("CLAVIGER_CONFIG", &config)], &["config", "check"]);
    assert!(said(&checked).contains("is valid: 1 HSMs"), "{}", said(&checked));
    std::fs::write(&wrong, "[server]\nlisten = 1\n").unwrap();
    let checked = with(&[("CLAVIGER_CONFIG", &wrong)], &["config", "check"]);
    assert_eq!(checked.status.code(), Some(1));
    assert!(said(&checked).contains("server.listen"), "{}", said(&checked));
}

#[test]
fn several_hosts_are_shown_changed_and_removed_at_once() {
    let (_daemon, lab) = Lab::start(Options::default());
    let administrator = Administrator(&lab);
    let key = |name: &str| {
        let path = lab.file(name);
        std::fs::write(&path, RsaPrivateKey::generate(2048).unwrap().public().to_pem()).unwrap();
        path
    };
    let [one, other] = ["one.pem", "other.pem"].map(key);
    let add = |name: &str, key: &Path, more: &[&str]| {
        administrator.run(&[&["hosts", "add", name, "--public-key", text(key)], more].concat())
    };
    assert!(add("one", &one, &["--label", "tenant=acme", "--if-absent"]).status.success());
    let again = add("ONE", &one, &["--if-absent"]);
    assert!(again.status.success() && said(&again).contains("registered already: host one"), "{}", said(&again));
    let labelled = add("one", &one, &["--if-absent", "--label", "gpu"]);
    assert!(said(&labelled).contains("registered without all of these labels"), "{}", said(&labelled));
    let taken = add("one", &other, &["--if-absent"]);
    assert!(!taken.status.success() && said(&taken).contains("with another key"), "{}", said(&taken));
    assert!(!add("one", &one, &[]).status.success(), "without --if-absent it is an error");
    assert!(add("two", &other, &[]).status.success());

    let names = |listed: &Value| -> Vec<String> {
        listed.as_array().unwrap().iter().map(|host| host["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&administrator.json(&["hosts", "list", "--label", "tenant=acme"])), ["one"]);
    assert_eq!(names(&administrator.json(&["hosts", "list", "--label", "tenant"])), Vec::<String>::new());
    let labelled = administrator.json(&["hosts", "label", "one", "site-north", "--host", "two"]);
    assert_eq!(names(&labelled), ["one", "two"]);
    assert_eq!(names(&administrator.json(&["hosts", "list", "--label", "site-north"])), ["one", "two"]);
    assert_eq!(names(&administrator.json(&["hosts", "show", "TWO", "one"])), ["two", "one"]);
    let shown = said(&administrator.run(&["hosts", "show", "one"]));
    assert!(shown.contains("labels            site-north tenant=acme"), "{shown}");
    let missing = administrator.run(&["hosts", "show", "one", "nobody"]);
    assert!(!missing.status.success() && said(&missing).contains("not registered: nobody"), "{}", said(&missing));

    let disabled = administrator.json(&["hosts", "disable", "one", "two"]);
    assert_eq!(disabled.as_array().unwrap().iter().map(|host| &host["enabled"]).collect::<Vec<_>>(), [false, false]);
    // One that fails does not keep the others.
    let removed = administrator.run(&["hosts", "remove", "one", "nobody", "two"]);
    let text = said(&removed);
    assert!(!removed.status.success() && text.contains("1 of 3 hosts failed: nobody:"), "{text}");
    assert_eq!(names(&administrator.json(&["hosts", "list"])), [HOST]);
}

#[test]
fn a_key_is_limited_from_its_first_moment_and_spare_keys_go() {
    let (_daemon, lab) = Lab::start(Options::default());
    let administrator = Administrator(&lab);
    let made = administrator.json(&["keys", "generate", "--kind", "encryption", "--bits", "2048", "--name", "acme"]);
    let id = made["hsm_key"].as_str().unwrap();

    // A whole name, and names for the subjectAltName.
    let request = lab.file("acme.csr");
    let subject = "CN=HGS\\, north,OU=Keys,O=Acme Ltd,L=Berlin,C=DE";
    let names = ["--dns", "hgs.example", "--dns", "*.hgs.example"];
    let written =
        [&["keys", "csr", "--hsm-key", id, "--subject", subject, "--out", text(&request)][..], &names].concat();
    assert!(administrator.run(&written).status.success());
    let openssl = ["req", "-verify", "-noout", "-text", "-nameopt", "RFC2253", "-in", text(&request)];
    let shown = said(&tool("openssl", Command::new("openssl").args(openssl)));
    assert!(shown.contains("self-signature verify OK"), "{shown}");
    assert!(shown.contains("CN=HGS\\, north,OU=Keys,O=Acme Ltd,L=Berlin,C=DE"), "{shown}");
    assert!(shown.contains("DNS:hgs.example, DNS:*.hgs.example"), "{shown}");
    let wrong = administrator.fault(&["keys", "csr", "--hsm-key", id, "--subject", "O=Acme"]);
    assert!(wrong.contains("CN=… is missing") || wrong.contains("(CN=…) is missing"), "{wrong}");
    let wrong = administrator.fault(&["keys", "csr", "--hsm-key", id, "--subject", "x", "--dns", "a b"]);
    assert!(wrong.contains("is not a DNS name"), "{wrong}");

    let certificate = lab.file("acme.pem");
    let sign = ["keys", "self-sign", "--hsm-key", id, "--subject", "acme", "--out", text(&certificate)];
    assert!(administrator.run(&sign).status.success());
    let added = administrator.json(&[
        "keys",
        "add",
        "--kind",
        "encryption",
        "--certificate",
        text(&certificate),
        "--label",
        "tenant=acme",
    ]);
    assert_eq!(added["labels"], json!(["tenant=acme"]));
    let change = lab.trail().into_iter().rfind(|line| line["event"] == "keys.add").unwrap();
    assert_eq!(change["change"], "encryption certificate, hosts with tenant=acme");

    // A thumbprint as other programs show it.
    let thumbprint = added["thumbprint"].as_str().unwrap().to_ascii_uppercase();
    let colons: Vec<_> = thumbprint.as_bytes().chunks(2).map(|two| std::str::from_utf8(two).unwrap()).collect();
    let limited = administrator.json(&["keys", "limit", &colons.join(":"), "--none"]);
    assert_eq!(limited["thumbprint"], added["thumbprint"]);

    let on_tokens = |id: &str| {
        let listed = administrator.json(&["keys", "list", "--hsm"]);
        listed.as_array().unwrap().iter().find(|key| key["hsm_key"] == id).cloned()
    };
    let spare = administrator.json(&["keys", "generate", "--kind", "signing", "--bits", "2048"]);
    let spare = spare["hsm_key"].as_str().unwrap();
    assert_eq!(on_tokens(spare).unwrap()["needed_by"], json!([]));
    let needed = on_tokens(id).unwrap();
    assert_eq!(
        needed["needed_by"],
        json!([format!("encryption certificate {}", added["thumbprint"].as_str().unwrap())])
    );
    assert_eq!((&needed["name"], &needed["members"]), (&json!("acme"), &json!(["hsm-a"])));
    let refused = administrator.fault(&["keys", "destroy", id]);
    assert!(refused.contains("is needed by the encryption certificate"), "{refused}");
    administrator.json(&["keys", "destroy", spare]);
    assert!(on_tokens(spare).is_none() && on_tokens(id).is_some());
    assert!(administrator.fault(&["keys", "destroy", spare]).contains("no HSM has a key"));
    administrator.json(&["keys", "remove", &thumbprint[..16]]);
    administrator.json(&["keys", "destroy", id]);
    assert!(on_tokens(id).is_none());
    let trail = lab.trail();
    let destroyed: Vec<_> = trail.iter().filter(|line| line["event"] == "keys.destroy").collect();
    assert_eq!(destroyed.iter().map(|line| &line["outcome"]).collect::<Vec<_>>(), ["requested", "success"].repeat(2));
    assert_eq!(destroyed[0]["change"], format!("key {spare} on hsm-a"));
}

#[test]
fn the_last_member_that_serves_is_drained_at_a_terminal_by_force_only() {
    let (_daemon, lab) = Lab::start(Options { hsms: 2, ..Options::default() });
    let administrator = Administrator(&lab);
    administrator.json(&["hsm", "drain", "hsm-a"]);
    // `script` gives the command a terminal.
    let drain =
        format!("{} hsm drain hsm-b --config {}", claviger_tests::claviger().display(), lab.config_file().display());
    let mut command = std::process::Command::new("script");
    command.args(["-qec", &drain, "/dev/null"]).stdin(std::process::Stdio::null());
    let refused = claviger_tests::tool("bsdutils", &mut command);
    let text = claviger_tests::said(&refused);
    assert!(!refused.status.success() && text.contains("no other HSM serves") && text.contains("--force"), "{text}");
    // A script is taken at its word.
    let drained = administrator.json(&["hsm", "drain", "hsm-b"]);
    assert!(drained["state"].as_str().unwrap().starts_with("drain"), "{drained}");
    administrator.json(&["hsm", "resume", "hsm-a"]);
}

#[test]
fn a_command_of_the_other_noun_gets_a_tip() {
    let wrong = said(&run(["host", "list"]));
    assert!(wrong.contains("claviger hosts list exists"), "{wrong}");
    let wrong = said(&run(["hosts", "unwrap"]));
    assert!(wrong.contains("claviger host unwrap exists"), "{wrong}");
    let wrong = said(&run(["hosts", "lst"]));
    assert!(wrong.contains("'list'") && !wrong.contains("exists: `"), "{wrong}");
}

#[test]
fn shells_complete_and_manual_pages_describe_every_command() {
    let folder = tempfile::tempdir().unwrap();
    for (program, pages) in [
        (claviger(), &["claviger.1", "claviger-hosts-add.1", "claviger-keys-destroy.1", "claviger.toml.5"][..]),
        (loadgen(), &["claviger-loadgen.1", "claviger-loadgen-plan.1"]),
    ] {
        let written = Command::new(program).arg("manual").arg(folder.path()).output().unwrap();
        assert!(written.status.success(), "{}", said(&written));
        for page in pages {
            let page = std::fs::read_to_string(folder.path().join("man").join(page)).unwrap();
            assert!(page.contains(".TH"), "{page}");
        }
        let name = program.file_name().unwrap().to_str().unwrap();
        let script = Command::new(program).args(["completions", "bash"]).output().unwrap();
        assert_eq!(std::fs::read(folder.path().join("completions").join(name)).unwrap(), script.stdout);
        // What bash itself offers.
        let ask = format!(
            "source {}; COMP_WORDS=({name} ''); COMP_CWORD=1; _{name} {name} '' {name} 2>/dev/null || _{} {name} '' {name}; \
             echo \"${{COMPREPLY[@]}}\"",
            folder.path().join("completions").join(name).display(),
            name.replace('-', "__"),
        );
        let offered = said(&Command::new("bash").arg("-c").arg(ask).output().unwrap());
        let wanted = if name == "claviger" { "hosts" } else { "capacity" };
        assert!(offered.split_whitespace().any(|word| word == wanted), "{offered}");
    }
}
