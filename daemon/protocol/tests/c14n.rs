//! Compares canonical form and strictness of the parser with libxml2.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::HashSet;
use std::fmt::Write;
use std::fs;

use claviger_protocol::{c14n, xml};
use common::{Rng, xmllint_c14n};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// The canonical form that this crate writes.
fn ours(document: &[u8]) -> Result<String, String> {
    let text = xml::decode(document).map_err(|e| e.to_string())?;
    let parsed = xml::parse(&text).map_err(|e| e.to_string())?;
    c14n::document(&parsed).map_err(|e| e.to_string())
}

fn same(document: &[u8]) {
    let shown = String::from_utf8_lossy(document);
    let ours = ours(document).unwrap_or_else(|e| panic!("{e}: {shown}"));
    let theirs = xmllint_c14n(document).unwrap_or_else(|e| panic!("{e}: {shown}"));
    assert_eq!(ours, String::from_utf8(theirs).unwrap(), "{shown}");
}

/// Documents without comments, because xmllint would keep the comments.
const DOCUMENTS: &[&str] = &[
    "<a/>",
    "<a></a>",
    "<a ></a >",
    "<a\n\t/>",
    // Prefixes: unused, used late, redeclared with the same or another name, shadowed.
    "<a xmlns:p='urn:p' xmlns:q='urn:q'><b><p:c/></b><p:d><p:e q:f='1'/></p:d></a>",
    "<p:a xmlns:p='urn:p'><p:b xmlns:p='urn:p'/></p:a>",
    "<p:a xmlns:p='urn:p'><p:b xmlns:p='urn:q'><p:c xmlns:p='urn:p'/></p:b><p:d/></p:a>",
    "<p:a xmlns:p='urn:p'><b xmlns:p='urn:q'><p:c/></b><p:d/></p:a>",
    "<p:a xmlns:p='urn:p' xmlns:q='urn:p'><q:b><p:c/></q:b></p:a>",
    "<a xmlns:p='urn:p'><b p:x='1'><c p:x='2'/></b><c p:x='3'/></a>",
    // Default namespace: undeclared where there is none, undeclared and redeclared, unused.
    "<a xmlns=''><b xmlns=''/></a>",
    "<a xmlns='urn:a'><b xmlns=''><c xmlns='urn:a'/><c/></b><b/></a>",
    "<a xmlns='urn:a'><p:b xmlns:p='urn:b' xmlns=''><c/></p:b></a>",
    "<p:a xmlns:p='urn:p' xmlns='urn:a'><b/><p:c><b xmlns='urn:a'/></p:c></p:a>",
    "<p:a xmlns:p='urn:p' xmlns='urn:a'><p:b xmlns=''><p:c xmlns='urn:c'><d/></p:c></p:b></p:a>",
    "<a xmlns='urn:a' xmlns:p='urn:a' x='1' p:x='2'/>",
    // Attributes are sorted by namespace name, then by local name; declarations are sorted by prefix.
    "<a xmlns:z='urn:1' xmlns:y='urn:2' z:b='1' y:a='2' c='3' z:a='4' a='5'/>",
    "<z:a xmlns:z='urn:9' xmlns:b='urn:8' xmlns:aa='urn:7' xmlns:a='urn:6' b:a='1' aa:a='2' a:a='3'/>",
    "<a xmlns:p='urn:b' xmlns:q='urn:a' p:x='1' q:x='2' X='3' x='4' _='5' \u{e9}='6' \u{10000}='7' \u{fffd}='8'/>",
    "<a xml:lang='en' b='1' xml:space='preserve' xmlns:x='urn:x' x:y='2'><b xml:lang='de'/></a>",
    "<a xmlns:xml='http://www.w3.org/XML/1998/namespace' xml:id='x'/>",
    "<a xmlns:p='urn:&#x70;&#113;'><p:b p:c=''/></a>",
    // Attribute values.
    "<a b='1\t2\n3\r4\r\n5' c='&#9;&#10;&#13;&#x20;'/>",
    "<a b='  x  y ' c='&quot;&apos;&lt;&gt;&amp;' d=\"'\" e='\"' f='>'/>",
    "<a b='\r\r\n&#13;\n'/>",
    "<a b='&#x0a;&#x0D;&#0009;'/>",
    // Text: line ends, references, CDATA.
    "<a>1\r2\r\n3\n4\r\r\n5\n\r6</a>",
    "<a>\r&#13;\r\n&#13;\n&#10;\r&#10;</a>",
    "<a>\r&amp;\r&lt;\r</a>",
    "<a>&#13;&#10;&#9;&#32;\t \n</a>",
    "<a>x&#13;</a>",
    "<a>&#13;&#13;\n</a>",
    "<a>&lt;&gt;&amp;&quot;&apos;'\"></a>",
    "<a><![CDATA[<&>\"'\r\n\r]]>&#13;<![CDATA[\n]]></a>",
    "<a>x<![CDATA[]]>y<![CDATA[&amp;]]><![CDATA[]]]]><![CDATA[>]]></a>",
    "<a>]]&gt;<b/>]]<b/>></a>",
    "<a>\r<b/>\r</a>",
    // Characters beyond ASCII.
    "<\u{e4}:\u{f6} xmlns:\u{e4}='urn:x' \u{e4}:\u{fc}='\u{20ac}'>\u{1f512}&#x1F512;&#128274;\u{2028}\u{85}\u{7f}</\u{e4}:\u{f6}>",
    "<a b='\u{1f512}\u{fffd}'>\u{e000}\u{d7ff}\u{10fffd}</a>",
    // Content around the root.
    "<?xml version='1.0'?><a/>",
    "<?xml\tversion = '1.0'\n encoding =\r\n\"uTf-8\" standalone='no' ?>\n\n<a/>\r\n \t",
    "\u{feff}<?xml version=\"1.0\" encoding=\"utf-8\"?><a>\u{feff}</a>",
    "\u{feff}<a/>",
    "\r\n<a/>",
];

#[test]
fn canonical_forms_are_xmllints() {
    for document in DOCUMENTS {
        same(document.as_bytes());
    }
}

#[test]
fn comments_are_left_out() {
    for (with, canonical) in [
        ("<!--a--><!---->\n<a>x<!-- <b>&amp; ]]> -->y<!----></a><!--z-->\n", "<a>xy</a>"),
        ("<a><!--x--></a>", "<a></a>"),
        ("<a>\r<!--x-->\n</a>", "<a>\n\n</a>"),
        ("<a>1<b/><!--2--> <!--3--><b/>4</a>", "<a>1<b></b> <b></b>4</a>"),
    ] {
        assert_eq!(ours(with.as_bytes()).unwrap(), canonical);
    }
}

/// libxml2 does not escape an ampersand in a namespace name, so its output is not XML. The recommendation requires the
/// same escaping as in an attribute.
#[test]
fn namespace_names_are_escaped() {
    let document = "<a xmlns:p='http://example.test/?a=1&amp;b=&quot;'><p:b/></a>";
    let canonical = "<a><p:b xmlns:p=\"http://example.test/?a=1&amp;b=&quot;\"></p:b></a>";
    assert_eq!(ours(document.as_bytes()).unwrap(), canonical);
}

/// The example in Exclusive XML Canonicalization 1.0, section 2.2.
#[test]
fn the_recommendations_example_comes_out() {
    let inner = "<n1:elem2 xmlns:n1=\"http://example.net\" xml:lang=\"en\">\
                 <n3:stuff xmlns:n3=\"ftp://example.org\"></n3:stuff></n1:elem2>";
    for outer in [
        format!("<n0:pdu xmlns:n0='http://a.example' xmlns:n3='ftp://x.example'>{inner}</n0:pdu>"),
        format!("<n2:pdu xmlns:n1='http://example.com' xmlns:n2='http://foo.example' xml:lang='fr'>{inner}</n2:pdu>"),
    ] {
        let parsed = xml::parse(&outer).unwrap();
        let node = parsed.root_element().first_element_child().unwrap();
        assert_eq!(c14n::element(node).unwrap(), inner);
    }
}

/// A document as a tree. It can be written with or without its comments.
#[derive(Clone, Debug)]
enum Content {
    Element(Element),
    Text(Vec<&'static str>),
    Cdata(&'static str),
    Comment(&'static str),
}

#[derive(Clone, Debug)]
struct Element {
    prefix: &'static str,
    name: &'static str,
    declarations: Vec<(&'static str, &'static str)>,
    attributes: Vec<(&'static str, &'static str, Vec<&'static str>)>,
    content: Vec<Content>,
    /// Selects the white space inside tags, the quotes, and the form of an empty element.
    form: u8,
}

const PREFIXES: [&str; 5] = ["", "", "p", "q", "r\u{e9}"];
const URIS: [&str; 5] = ["urn:a", "urn:b", "http://example.test/?x=1", "urn:&#99;", "urn:c"];
const NAMES: [&str; 6] = ["a", "b", "A", "_a", "a-1.\u{b7}", "\u{10400}"];
/// Pieces of text and of attribute values. A raw line end always has neighbours within its piece, so removing a comment
/// cannot join a carriage return with a line feed.
const PIECES: [&str; 22] = [
    "x",
    "\u{20ac}",
    "\u{1f512}",
    " ",
    "\t",
    ".\r.",
    ".\r\n.",
    ".\n.",
    ".\r\r\n\n.",
    "&#13;",
    "&#10;",
    "&#9;",
    "&#x20;",
    "&amp;",
    "&lt;",
    "&gt;",
    "&quot;",
    "&apos;",
    ".]].",
    ".>.",
    ".\r&#13;.",
    "&#xd;\n.",
];
const CDATA: [&str; 6] = ["", "x", "<&>'\"", "]]", ".\r\n\r.", "<!--x-->"];
const COMMENTS: [&str; 5] = ["", "c", " <a>&amp; ", "]]>", "\r\n"];

fn pieces() -> impl Strategy<Value = Vec<&'static str>> {
    prop::collection::vec(prop::sample::select(&PIECES[..]), 0..5)
}

fn element(content: impl Strategy<Value = Vec<Content>>) -> impl Strategy<Value = Element> {
    let prefix = || prop::sample::select(&PREFIXES[..]);
    let attribute_prefix = prop::sample::select(&["", "p", "q", "xml", "r\u{e9}"][..]);
    let declaration = (prefix(), prop::sample::select(&["", "urn:a", "urn:b", URIS[2], URIS[3], "urn:c"][..]));
    let attribute = (attribute_prefix, prop::sample::select(&NAMES[..]), pieces());
    (
        (prefix(), prop::sample::select(&NAMES[..])),
        prop::collection::vec(declaration, 0..4),
        prop::collection::vec(attribute, 0..4),
        content,
        any::<u8>(),
    )
        .prop_map(|((prefix, name), declarations, attributes, content, form)| Element {
            prefix,
            name,
            declarations,
            attributes,
            content,
            form,
        })
}

fn tree() -> impl Strategy<Value = Element> {
    let leaf = prop_oneof![
        3 => pieces().prop_map(Content::Text),
        1 => prop::sample::select(&CDATA[..]).prop_map(Content::Cdata),
        2 => prop::sample::select(&COMMENTS[..]).prop_map(Content::Comment),
    ];
    let content =
        leaf.prop_recursive(5, 40, 6, |inner| element(prop::collection::vec(inner, 0..6)).prop_map(Content::Element));
    element(prop::collection::vec(content, 0..6))
}

impl Element {
    fn write(&self, scope: &[(&'static str, String)], comments: bool, out: &mut String) {
        let mut scope = scope.to_vec();
        let quote = if self.form & 1 == 0 { '"' } else { '\'' };
        let space = [" ", "\n", "\t ", "\r\n"][usize::from(self.form >> 1 & 3)];
        let (mut declared, mut attributes) = (HashSet::new(), String::new());
        let mut declare = |prefix: &'static str, uri: &str, scope: &mut Vec<_>, attributes: &mut String| {
            if (prefix.is_empty() || !uri.is_empty()) && declared.insert(prefix) {
                scope.retain(|(p, _)| *p != prefix);
                scope.push((prefix, uri.replace("&#99;", "c")));
                let colon = if prefix.is_empty() { "" } else { ":" };
                write!(attributes, "{space}xmlns{colon}{prefix}={quote}{uri}{quote}").unwrap();
            }
        };
        for (prefix, uri) in &self.declarations {
            declare(prefix, uri, &mut scope, &mut attributes);
        }
        let needed = self.attributes.iter().map(|a| a.0).chain([self.prefix]);
        for prefix in needed.filter(|p| !p.is_empty() && *p != "xml") {
            if !scope.iter().any(|(p, _)| *p == prefix) {
                declare(prefix, "urn:a", &mut scope, &mut attributes);
            }
        }
        let mut seen = HashSet::new();
        for (prefix, name, value) in &self.attributes {
            let namespace = if prefix.is_empty() {
                String::new()
            } else {
                scope.iter().find(|(p, _)| p == prefix).map_or("xml".to_owned(), |(_, uri)| uri.clone())
            };
            if seen.insert((namespace, *name)) {
                let colon = if prefix.is_empty() { "" } else { ":" };
                write!(attributes, "{space}{prefix}{colon}{name}{space}={quote}{}{quote}", value.concat()).unwrap();
            }
        }
        let colon = if self.prefix.is_empty() { "" } else { ":" };
        let name = format!("{}{colon}{}", self.prefix, self.name);
        let mut content = String::new();
        for child in &self.content {
            match child {
                Content::Element(element) => element.write(&scope, comments, &mut content),
                Content::Text(pieces) => content.push_str(&pieces.concat()),
                Content::Cdata(text) => write!(content, "<![CDATA[{text}]]>").unwrap(),
                Content::Comment(text) if comments => write!(content, "<!--{text}-->").unwrap(),
                // An empty CDATA section adds nothing and keeps its neighbours apart.
                Content::Comment(_) => content.push_str("<![CDATA[]]>"),
            }
        }
        let tail = if self.form & 8 == 0 { "" } else { space };
        if content.is_empty() && self.form & 16 == 0 {
            write!(out, "<{name}{attributes}{tail}/>").unwrap();
        } else {
            write!(out, "<{name}{attributes}{tail}>{content}</{name}{tail}>").unwrap();
        }
    }

    fn document(&self, comments: bool) -> String {
        let mut out = ["", "\u{feff}", "<?xml version='1.0'?>\r\n"][usize::from(self.form >> 5) % 3].to_owned();
        let comment = if comments { "<!-- x -->\n" } else { "" };
        out.push_str(comment);
        self.write(&[], comments, &mut out);
        out.push_str(comment);
        out
    }
}

#[test]
fn random_documents_have_xmllints_canonical_form() {
    let mut runner = TestRunner::new(Config { cases: 400, failure_persistence: None, ..Config::default() });
    runner
        .run(&tree(), |tree| {
            let without = tree.document(false);
            let theirs =
                xmllint_c14n(without.as_bytes()).map_err(|e| TestCaseError::fail(format!("{e}: {without}")))?;
            let theirs = String::from_utf8(theirs).unwrap();
            prop_assert_eq!(ours(without.as_bytes()), Ok(theirs.clone()));
            let with = tree.document(true);
            prop_assert_eq!(ours(with.as_bytes()), Ok(theirs.clone()), "{}", with);
            // Canonical documents are not changed.
            prop_assert_eq!(ours(theirs.as_bytes()), Ok(theirs.clone()));
            Ok(())
        })
        .unwrap();
}

/// Indices and messages of the documents that libxml2 rejects as not well-formed or not conforming to Namespaces in
/// XML.
fn refused_by_xmllint(documents: &[Vec<u8>]) -> Vec<(usize, String)> {
    let directory = tempfile::tempdir().unwrap();
    let mut refused = Vec::new();
    for (chunk, start) in documents.chunks(400).zip((0..).step_by(400)) {
        let names: Vec<String> = (start..start + chunk.len()).map(|i| format!("{i}.xml")).collect();
        for (document, name) in chunk.iter().zip(&names) {
            fs::write(directory.path().join(name), document).unwrap();
        }
        let mut arguments = vec!["--noout", "--nonet"];
        arguments.extend(names.iter().map(String::as_str));
        // Namespace errors do not change the exit status, so read the messages.
        let output = std::process::Command::new("xmllint").args(&arguments).current_dir(directory.path()).output();
        let output = output.unwrap_or_else(|e| panic!("xmllint ({e}): install the package libxml2-utils"));
        for line in String::from_utf8_lossy(&output.stderr).lines() {
            let Some((name, message)) = line.split_once(".xml:") else { continue };
            let is_error = message.contains("parser error") || message.contains("namespace error");
            // Ignore the complaint that a namespace name is not a URI: names are only compared, never resolved.
            if let (Ok(index), true) = (name.parse(), is_error && !message.contains("is not a valid URI")) {
                refused.push((index, message.to_owned()));
            }
        }
    }
    refused
}

/// Checks that libxml2 accepts every document that this crate accepts.
fn accepted_only_if_well_formed(candidates: impl IntoIterator<Item = Vec<u8>>) -> Vec<Vec<u8>> {
    let accepted: Vec<Vec<u8>> = candidates.into_iter().filter(|d| ours(d).is_ok()).collect();
    let refused = refused_by_xmllint(&accepted);
    let shown: Vec<_> = refused
        .iter()
        .take(20)
        .map(|(i, why)| format!("{why}: {:?}", String::from_utf8_lossy(&accepted[*i])))
        .collect();
    assert!(shown.is_empty(), "{} of {} accepted ones:\n{}", refused.len(), accepted.len(), shown.join("\n"));
    accepted
}

const SEEDS: [&str; 4] = [
    "<?xml version=\"1.0\" encoding=\"utf-8\" standalone=\"yes\"?>\n<a xmlns=\"urn:a\" xmlns:p='urn:p'>\
     <p:b p:c=\"1\" d='2'>x &amp; &#13;</p:b><![CDATA[y]]><!--z--><e/></a>",
    "<?xml\tversion='1.0'\n?>\r\n<p:a xmlns:p=\"urn:&#112;\"><b xmlns=\"\" p:x=\"&lt;&#9;\"/>]] ></p:a>\n<!-- - -->",
    "\u{feff}<\u{e4} xml:lang='de' \u{f6}='\u{1f512}'>\u{fffd}&#x1F512;</\u{e4}>",
    "<a xmlns:p='urn:p' xmlns:q='urn:p' p:a='1' q:b='2'><p:c/><q:c></q:c></a>",
];

const TOKENS: [&str; 66] = [
    " ",
    "\n",
    "\t",
    "\r",
    "\u{c}",
    "\u{85}",
    "\u{a0}",
    "x",
    ":",
    ":x",
    "x:",
    "p:",
    "q:",
    "xml:",
    "xmlns:",
    "-",
    "--",
    "-->",
    "<!--",
    "<!---->",
    "<!--->",
    "<![CDATA[",
    "]]>",
    "<![CDATA[]]>",
    "<",
    ">",
    "/",
    "/>",
    "<x>",
    "</x>",
    "<x/>",
    "</a>",
    "&",
    "&#",
    ";",
    "&#0;",
    "&#8;",
    "&#xD800;",
    "&#xDFFF;",
    "&#xFFFE;",
    "&#x110000;",
    "&#x100000041;",
    "&#X41;",
    "&#;",
    "&#x;",
    "&#-1;",
    "&#+65;",
    "&nbsp;",
    "&amp ;",
    "\"",
    "'",
    "=",
    " x='1'",
    " p:x='1'",
    " q:x='1'",
    " xmlns='urn:z'",
    " xmlns:p='urn:z'",
    " xmlns:x=''",
    " xmlns:xmlns='urn:z'",
    " xmlns:xml='urn:z'",
    " p:xmlns='urn:z'",
    " :xmlns='urn:z'",
    "\u{feff}",
    "\u{fffe}",
    "\u{0}",
    "\u{1}",
];

const MORE_TOKENS: [&str; 18] = [
    "<?xml version='1.0'?>",
    "<?x?>",
    "<!DOCTYPE a>",
    " xmlns:xml='http://www.w3.org/XML/1998/namespace'",
    " xmlns:x='http://www.w3.org/XML/1998/namespace'",
    " xmlns='http://www.w3.org/XML/1998/namespace'",
    " xmlns:x='http://www.w3.org/2000/xmlns/'",
    " xmlns='http://www.w3.org/2000/xmlns/'",
    " version='1.0'",
    " encoding='utf-8'",
    " standalone='no'",
    " encoding='latin1'",
    "1",
    "\u{b7}",
    "\u{300}",
    "\u{37e}",
    "\u{2fff}",
    "\u{f0000}",
];

#[test]
fn nothing_is_accepted_with_a_token_where_none_may_be() {
    let tokens = || TOKENS.into_iter().chain(MORE_TOKENS);
    let mut candidates = Vec::new();
    for seed in SEEDS {
        for (at, _) in seed.char_indices().chain([(seed.len(), ' ')]) {
            candidates.extend(tokens().map(|token| [&seed[..at], token, &seed[at..]].concat().into_bytes()));
        }
    }
    let accepted = accepted_only_if_well_formed(candidates);
    assert!(accepted.len() > 4_000, "{}", accepted.len());
    // Accepted documents also have the same canonical form. (libxml2 refuses to canonicalise relative namespace names,
    // and keeps comments.)
    let mut compared = 0;
    for document in accepted.iter().filter(|d| !d.windows(4).any(|w| w == b"<!--")).step_by(5) {
        if let Ok(theirs) = xmllint_c14n(document) {
            compared += 1;
            assert_eq!(ours(document).unwrap().as_bytes(), theirs, "{}", String::from_utf8_lossy(document));
        }
    }
    assert!(compared > 100, "{compared}");
}

#[test]
fn nothing_is_accepted_that_is_not_well_formed() {
    let mut rng = Rng::new(0x1234_5678_9abc_def1);
    let mut candidates = Vec::new();
    let seeds: Vec<&str> = SEEDS.into_iter().chain(DOCUMENTS.iter().copied()).collect();
    for _ in 0..12_000 {
        let mut document = seeds[rng.below(seeds.len())].as_bytes().to_vec();
        for _ in 0..=rng.below(2) {
            let (at, len) = (rng.below(document.len()), rng.below(12) + 1);
            let end = (at + len).min(document.len());
            match rng.below(5) {
                0 => document[at] ^= 1 << rng.below(8),
                1 => drop(document.drain(at..end)),
                2 => {
                    let copy = document[at..end].to_vec();
                    let to = rng.below(document.len());
                    document.splice(to..to, copy);
                }
                3 => document.swap(at, end - 1),
                _ => {
                    let token = TOKENS[rng.below(TOKENS.len())].as_bytes();
                    document.splice(at..end, token.iter().copied());
                }
            }
            if document.is_empty() {
                document.push(b'<');
            }
        }
        candidates.push(document);
    }
    let accepted = accepted_only_if_well_formed(candidates);
    assert!(accepted.len() > 1_000, "{}", accepted.len());
}

/// The same checks with expected results, so that they do not depend on the version of libxml2.
#[test]
fn leniencies_of_the_parser_underneath_are_closed() {
    for document in [
        // References to characters that do not exist.
        "<a>&#xD800;</a>",
        "<a>&#xDFFF;</a>",
        "<a>&#x110000;</a>",
        "<a b='&#55296;'/>",
        "<a b='&#1114112;'/>",
        // A prefixed "xmlns" is an ordinary attribute, not a declaration.
        "<a xmlns:p='urn:p' p:xmlns='urn:z'/>",
        "<a :xmlns='urn:z'/>",
        "<a xml:xmlns='urn:z'/>",
        // Reserved names.
        "<a xmlns:xmlns='urn:z'/>",
        "<a xmlns:xml='http://www.w3.org/XML/1998/namespace' xmlns:xml='http://www.w3.org/XML/1998/namespace'/>",
        // A colon must follow a prefix.
        "<:a/>",
        "<a><:b></:b></a>",
        "<a :b='1'/>",
        // Two byte order marks are an error.
        "\u{feff}\u{feff}<a/>",
        // A declaration may also follow a tab.
        "<?xml\tversion='1.0'encoding='utf-8'?><a/>",
        "<?xml\tencoding='utf-8' version='1.0'?><a/>",
        "<?xml\tversion='1.0' version='1.0'?><a/>",
        "<?xml\nversion='1.0' standalone='yes' encoding='utf-8'?><a/>",
        "<?xml\nversion='1.0' encoding='utf-8' encoding='utf-8'?><a/>",
        "<?xml\nversion='1.0' standalone='maybe'?><a/>",
    ] {
        assert!(ours(document.as_bytes()).is_err(), "{document}");
    }
    // In CDATA and comments, a reference is plain text.
    assert_eq!(ours(b"<a><![CDATA[&#xD800;]]><!--&#xD800;--></a>").unwrap(), "<a>&amp;#xD800;</a>");
}

#[test]
fn a_long_name_neither_panics_nor_is_cut() {
    for len in [1000, 40_000, 65_535, 65_536, 65_537, 70_000] {
        for letter in ["n", "\u{e9}", "\u{10400}"] {
            let name: String = letter.repeat(len);
            for document in [
                format!("<a {name}='1'/>"),
                format!("<{name}/>"),
                format!("<a xmlns:{name}='urn:x' {name}:b='1'/>"),
                format!("<a xmlns:p='urn:x' p:{name}='1'/>"),
            ] {
                if let Ok(canonical) = ours(document.as_bytes()) {
                    assert!(canonical.contains(&name), "{len}");
                }
            }
        }
    }
}

#[test]
fn depth_and_numbers_are_limited() {
    let nested = |depth: usize| format!("{}{}", "<a>".repeat(depth), "</a>".repeat(depth));
    assert!(ours(nested(32).as_bytes()).is_ok());
    assert!(ours(nested(33).as_bytes()).is_err());
    let nested = |depth: usize| format!("{}<b/>{}", "<a>".repeat(depth), "</a>".repeat(depth));
    assert!(ours(nested(31).as_bytes()).is_ok());
    assert!(ours(nested(32).as_bytes()).is_err());
    let attributes = |n: usize| (0..n).map(|i| format!(" a{i}=''")).collect::<String>();
    assert!(ours(format!("<a{}/>", attributes(32)).as_bytes()).is_ok());
    assert!(ours(format!("<a{}/>", attributes(33)).as_bytes()).is_err());
}
