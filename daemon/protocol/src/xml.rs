//! A strict XML reader for this protocol. Limits bound the cost before a tree is built.
//!
//! `roxmltree` builds the tree. Before that, `guard` scans the bytes once and rejects what the protocol forbids (DTDs,
//! processing instructions, encodings other than UTF-8, deep nesting) and what would make the parser slow (thousands of
//! attributes or of namespace declarations in scope). A hostile document therefore costs one pass over its bytes.

use std::borrow::Cow;

use data_encoding::BASE64;
use memchr::{memchr, memchr_iter, memmem};
use roxmltree::{Document, Node, ParsingOptions};

use crate::encoding;
use crate::pem;

/// Namespace `K`: protectors, metadata, crypto types.
pub(crate) const KPS_NS: &str = "http://schemas.microsoft.com/kps/2014/07";
/// Namespace `S`: requests, replies, errors.
pub(crate) const SERVICE_NS: &str = "http://schemas.microsoft.com/kps/2014/07/service";
/// Namespace `DS`: XML signatures.
pub(crate) const DSIG_NS: &str = "http://www.w3.org/2000/09/xmldsig#";
/// XML Schema's instance namespace. Two of its attributes are allowed on any element.
const XSI_NS: &str = "http://www.w3.org/2001/XMLSchema-instance";

/// Deepest nesting of elements; the root counts as 1.
pub(crate) const MAX_DEPTH: usize = 32;
/// Most attributes of one element, including namespace declarations. The schema needs one; content of `Parameters`
/// needs a few.
const MAX_ATTRIBUTES: usize = 32;
/// Longest name of an element or an attribute, in bytes. The parser keeps the length of a name in 16 bits.
const MAX_NAME: usize = 1024;
/// Longest namespace name, in bytes. Each use of a name costs a comparison and a copy of this length.
const MAX_NAMESPACE_NAME: usize = 256;
/// Most namespace declarations in scope at one element, and in a document. The cost of resolving names is the product
/// of the two.
const MAX_NAMESPACES_IN_SCOPE: usize = 64;
const MAX_NAMESPACES: usize = 4_096;
/// Most elements, and most attributes, in a document. A protector with 64 wrappings has fewer than 2,000 of each.
const MAX_ELEMENTS: usize = 16_384;
const MAX_ALL_ATTRIBUTES: usize = 32_768;
/// Most nodes of a tree: elements, texts and comments.
const MAX_NODES: u32 = 100_000;
/// Most '<' characters, and most '=' characters, in a document. A document within the other limits needs fewer.
const MAX_MARKS: usize = 200_000;

/// Why a document was rejected: one sentence for people.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct XmlError(pub String);

impl XmlError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

type Result<T> = std::result::Result<T, XmlError>;

/// Decodes a document: UTF-8, with the byte order mark removed and line ends normalised (XML 1.0, section 2.11).
///
/// # Errors
/// The bytes are not UTF-8.
pub fn decode(octets: &[u8]) -> Result<Cow<'_, str>> {
    let text = std::str::from_utf8(octets).map_err(|_| {
        XmlError::new(if pem::is_utf16(octets) {
            "the document is UTF-16, not UTF-8"
        } else {
            "the document is not UTF-8"
        })
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    // Normalise here, not in the parser: a carriage return before a character reference is easy to get wrong.
    if text.contains('\r') {
        Ok(Cow::Owned(text.replace("\r\n", "\n").replace('\r', "\n")))
    } else {
        Ok(Cow::Borrowed(text))
    }
}

/// Parses the result of [`decode`], within the limits.
///
/// # Errors
/// The document is not well-formed, uses a forbidden construct, or exceeds a limit.
pub fn parse(text: &str) -> Result<Document<'_>> {
    guard(text)?;
    let options = ParsingOptions { allow_dtd: false, nodes_limit: MAX_NODES, ..ParsingOptions::default() };
    Document::parse_with_options(text, options)
        .map_err(|e| XmlError(format!("the document is not well-formed XML: {e}")))
}

/// Rejects, in one pass, what is forbidden or expensive, and three errors that the parser accepts: names that start
/// with a colon, `p:xmlns` as a declaration, and references to characters that do not exist. The parser checks all
/// other rules of well-formedness.
fn guard(text: &str) -> Result<()> {
    if text.starts_with('\u{feff}') {
        return Err(XmlError::new("the document has two byte order marks"));
    }
    let octets = text.as_bytes();
    // The parser allocates a node for every '<' and an attribute for every '=', wherever they occur.
    let marks = |mark| memchr_iter(mark, octets).count();
    if marks(b'<').max(marks(b'=')) > MAX_MARKS {
        return Err(XmlError::new("too many '<' or '='"));
    }
    let mut at = 0;
    if text.starts_with("<?xml") && octets.get(5).is_some_and(|b| is_space(*b)) {
        let end = find(octets, 5, b"?>")?;
        declaration(&text[5..end])?;
        at = end + 2;
    }
    let mut scopes: Vec<usize> = Vec::with_capacity(MAX_DEPTH);
    let (mut in_scope, mut declared) = (0, 0);
    let (mut elements, mut attributes) = (0, 0);
    while let Some(next) = memchr(b'<', &octets[at..]) {
        let start = at + next;
        references(&octets[at..start])?;
        match octets.get(start + 1) {
            Some(b'?') => return Err(XmlError::new("processing instructions are not allowed")),
            Some(b'!') if octets[start..].starts_with(b"<!--") => at = find(octets, start + 4, b"-->")? + 3,
            Some(b'!') if octets[start..].starts_with(b"<![CDATA[") => at = find(octets, start + 9, b"]]>")? + 3,
            Some(b'!') => return Err(XmlError::new("a document type declaration is not allowed")),
            Some(b'/') => {
                name(&octets[start + 2..])?;
                at = find(octets, start, b">")? + 1;
                in_scope -= scopes.pop().unwrap_or(0);
            }
            _ => {
                let tag = tag(octets, start)?;
                if scopes.len() >= MAX_DEPTH {
                    return Err(XmlError(format!("elements are nested deeper than {MAX_DEPTH}")));
                }
                elements += 1;
                attributes += tag.attributes;
                if elements > MAX_ELEMENTS || attributes > MAX_ALL_ATTRIBUTES {
                    return Err(XmlError::new("too many elements or attributes"));
                }
                declared += tag.namespaces;
                if in_scope + tag.namespaces > MAX_NAMESPACES_IN_SCOPE || declared > MAX_NAMESPACES {
                    return Err(XmlError::new("too many namespace declarations"));
                }
                if !tag.empty {
                    in_scope += tag.namespaces;
                    scopes.push(tag.namespaces);
                }
                at = tag.end;
            }
        }
    }
    Ok(())
}

/// Validates the content of an XML declaration: version 1.0, and no encoding except UTF-8.
fn declaration(inside: &str) -> Result<()> {
    let broken = || XmlError::new("the XML declaration cannot be read");
    // The names have to come in this order. Only the first is required.
    let mut names = ["version", "encoding", "standalone"].into_iter();
    let mut rest = inside;
    loop {
        let pseudo_attribute = trim_start(rest);
        if pseudo_attribute.is_empty() {
            break;
        }
        let (name, after) = pseudo_attribute.split_once('=').ok_or_else(broken)?;
        let name = token(name);
        let separated = pseudo_attribute.len() < rest.len();
        if !separated || !names.by_ref().any(|expected| expected == name) {
            return Err(broken());
        }
        let after = trim_start(after);
        let quote = after.chars().next().filter(|c| *c == '"' || *c == '\'').ok_or_else(broken)?;
        let (value, after) = after[1..].split_once(quote).ok_or_else(broken)?;
        match name {
            "version" if value == "1.0" => {}
            "version" => return Err(XmlError::new("the XML version is not 1.0")),
            "encoding" if value.eq_ignore_ascii_case("utf-8") => {}
            "encoding" => return Err(XmlError::new("the declared encoding is not UTF-8")),
            _ if value == "yes" || value == "no" => {}
            _ => return Err(broken()),
        }
        rest = after;
    }
    // The first pseudo-attribute consumed "version" from `names`, even if it had another name; so check the text
    // itself.
    if trim_start(inside).starts_with("version") { Ok(()) } else { Err(XmlError::new("the XML version is not 1.0")) }
}

/// Rejects references to characters that do not exist, which the parser would replace by U+FFFD.
fn references(text: &[u8]) -> Result<()> {
    let mut rest = text;
    while let Some(at) = memchr(b'&', rest) {
        rest = &rest[at + 1..];
        let Some(number) = rest.strip_prefix(b"#") else { continue };
        let (number, radix) = number.strip_prefix(b"x").map_or((number, 10), |hex| (hex, 16));
        let digits = number.iter().take_while(|b| b.is_ascii_hexdigit()).count();
        let number = std::str::from_utf8(&number[..digits]).ok().and_then(|d| u32::from_str_radix(d, radix).ok());
        // The parser rejects references that are not 32-bit numbers.
        if number.is_some_and(|n| char::from_u32(n).is_none()) {
            return Err(XmlError::new("a character reference names no character"));
        }
    }
    Ok(())
}

/// The name at the start of `octets`. Rejects names that are too long or start with a colon.
fn name(octets: &[u8]) -> Result<&[u8]> {
    let end = octets.iter().position(|b| is_space(*b) || matches!(b, b'/' | b'>' | b'=')).unwrap_or(octets.len());
    match &octets[..end] {
        [b':', ..] => Err(XmlError::new("a name starts with a colon")),
        name if name.len() > MAX_NAME => Err(XmlError::new("a name is too long")),
        name => Ok(name),
    }
}

/// The facts about a start tag that [`guard`] needs.
struct Tag {
    /// Position after the closing `>`.
    end: usize,
    empty: bool,
    /// Number of attributes, including namespace declarations.
    attributes: usize,
    namespaces: usize,
}

/// Scans the start tag at `start`. Each quoted value counts as one attribute.
fn tag(octets: &[u8], start: usize) -> Result<Tag> {
    let broken = || XmlError::new("a tag does not end");
    name(&octets[start + 1..])?;
    let (mut at, mut attribute_start) = (start + 1, start + 1);
    let mut attributes: Vec<&[u8]> = Vec::new();
    let mut namespaces = 0;
    loop {
        match *octets.get(at).ok_or_else(broken)? {
            b'>' => {
                return Ok(Tag {
                    end: at + 1,
                    empty: octets[at - 1] == b'/',
                    attributes: attributes.len(),
                    namespaces,
                });
            }
            b'<' => return Err(broken()),
            quote @ (b'"' | b'\'') => {
                let end = find(octets, at + 1, &[quote])?;
                if attributes.len() == MAX_ATTRIBUTES {
                    return Err(XmlError::new("an element has too many attributes"));
                }
                let name = name(attribute_name(&octets[attribute_start..at]))?;
                if attributes.contains(&name) {
                    return Err(XmlError::new("an element has an attribute twice"));
                }
                attributes.push(name);
                references(&octets[at + 1..end])?;
                if name == b"xmlns" || name.starts_with(b"xmlns:") {
                    namespaces += 1;
                    if end - at > MAX_NAMESPACE_NAME {
                        return Err(XmlError::new("a namespace name is too long"));
                    }
                    if name != b"xmlns" && end == at + 1 {
                        return Err(XmlError::new("a namespace prefix cannot be undeclared"));
                    }
                }
                // The parser would read "xmlns" with any prefix as a declaration of the default namespace.
                if name.ends_with(b":xmlns") {
                    return Err(XmlError::new("xmlns is reserved"));
                }
                at = end + 1;
                attribute_start = at;
            }
            _ => at += 1,
        }
    }
}

/// The name in `<element name =` or ` name=`.
fn attribute_name(before_value: &[u8]) -> &[u8] {
    let name = before_value.trim_ascii_end();
    let name = name.strip_suffix(b"=").unwrap_or(name).trim_ascii_end();
    let start = name.iter().rposition(|b| is_space(*b)).map_or(0, |at| at + 1);
    &name[start..]
}

fn find(octets: &[u8], from: usize, what: &[u8]) -> Result<usize> {
    let rest = octets.get(from..).unwrap_or_default();
    memmem::find(rest, what)
        .map(|at| from + at)
        .ok_or_else(|| XmlError::new("the document ends in the middle of its mark-up"))
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}

fn trim_start(text: &str) -> &str {
    text.trim_start_matches(|c: char| c.is_ascii() && is_space(c as u8))
}

fn is_blank(text: &str) -> bool {
    text.bytes().all(is_space)
}

/// Iterates over the child elements of an element whose content model is a sequence.
pub(crate) struct Sequence<'a, 'i> {
    parent: Node<'a, 'i>,
    elements: std::iter::Peekable<std::vec::IntoIter<Node<'a, 'i>>>,
    namespace: &'static str,
}

impl<'a, 'i> Sequence<'a, 'i> {
    /// Reads the content of `parent`: elements, white space and comments only.
    pub(crate) fn of(parent: Node<'a, 'i>, namespace: &'static str) -> Result<Self> {
        Ok(Self { parent, elements: child_elements(parent)?.into_iter().peekable(), namespace })
    }

    /// Returns the next element, which must be `name`.
    pub(crate) fn required(&mut self, name: &str) -> Result<Node<'a, 'i>> {
        self.optional(name).ok_or_else(|| {
            XmlError(match self.elements.peek() {
                Some(found) => {
                    format!("{}: {name} is expected where {} stands", local(self.parent), local(*found))
                }
                None => format!("{}: {name} is missing", local(self.parent)),
            })
        })
    }

    /// Returns the next element if it is `name`.
    pub(crate) fn optional(&mut self, name: &str) -> Option<Node<'a, 'i>> {
        self.elements.next_if(|e| is_named(*e, self.namespace, name))
    }

    /// Fails if elements are left.
    pub(crate) fn end(mut self) -> Result<()> {
        match self.elements.next() {
            Some(extra) => Err(XmlError(format!("{}: unexpected {}", local(self.parent), local(extra)))),
            None => Ok(()),
        }
    }
}

/// The child elements of `parent`, which may not contain other text.
pub(crate) fn child_elements<'a, 'i>(parent: Node<'a, 'i>) -> Result<Vec<Node<'a, 'i>>> {
    let mut elements = Vec::new();
    for child in parent.children() {
        if child.is_element() {
            elements.push(child);
        } else if child.is_text() && !child.text().is_none_or(is_blank) {
            return Err(XmlError(format!("{}: unexpected text", local(parent))));
        }
    }
    Ok(elements)
}

/// Whether `node` is the element `name` of `namespace`.
pub(crate) fn is_named(node: Node<'_, '_>, namespace: &str, name: &str) -> bool {
    node.is_element() && node.tag_name().name() == name && node.tag_name().namespace() == Some(namespace)
}

/// The local name of an element, for messages.
pub(crate) fn local<'i>(node: Node<'_, 'i>) -> &'i str {
    node.tag_name().name()
}

/// The root element, which must be `name`.
pub(crate) fn root<'a, 'i>(document: &'a Document<'i>, namespace: &str, name: &str) -> Result<Node<'a, 'i>> {
    let root = document.root_element();
    if is_named(root, namespace, name) { Ok(root) } else { Err(XmlError(format!("the document is not a {name}"))) }
}

/// Rejects attributes that are not in `allowed` (names without a namespace). XML Schema allows `xsi:schemaLocation` and
/// `xsi:noNamespaceSchemaLocation` on every element.
pub(crate) fn attributes(node: Node<'_, '_>, allowed: &[&str]) -> Result<()> {
    for attribute in node.attributes() {
        let known = match attribute.namespace() {
            None => allowed.contains(&attribute.name()),
            Some(XSI_NS) => matches!(attribute.name(), "schemaLocation" | "noNamespaceSchemaLocation"),
            Some(_) => false,
        };
        if !known {
            return Err(XmlError(format!("{}: unexpected attribute {}", local(node), attribute.name())));
        }
    }
    Ok(())
}

/// The text of an element with simple content. Child elements are an error; comments are skipped.
pub(crate) fn text<'a>(node: Node<'a, '_>) -> Result<Cow<'a, str>> {
    let mut out = Cow::Borrowed("");
    for child in node.children() {
        if child.is_element() {
            return Err(XmlError(format!("{}: unexpected {}", local(node), local(child))));
        }
        if let (true, Some(part)) = (child.is_text(), child.text()) {
            if out.is_empty() {
                out = Cow::Borrowed(part);
            } else {
                out.to_mut().push_str(part);
            }
        }
    }
    Ok(out)
}

/// Text of a simple type whose white space collapses (anyURI, numbers).
pub(crate) fn token(value: &str) -> &str {
    value.trim_matches(|c: char| c.is_ascii() && is_space(c as u8))
}

/// Decodes an `xs:base64Binary`, which may not be empty.
pub(crate) fn base64(node: Node<'_, '_>) -> Result<Vec<u8>> {
    attributes(node, &[])?;
    let text = text(node)?;
    // Try the usual form first: base64 without white space.
    let octets = encoding::strict_base64(text.as_bytes()).or_else(|| {
        let dense: String = text.chars().filter(|c| !c.is_ascii() || !is_space(*c as u8)).collect();
        encoding::strict_base64(dense.as_bytes())
    });
    match octets {
        Some(octets) if octets.is_empty() => Err(XmlError(format!("{} is empty", local(node)))),
        Some(octets) => Ok(octets),
        None => Err(XmlError(format!("{} is not base64", local(node)))),
    }
}

/// An `xs:unsignedInt`.
pub(crate) fn unsigned_int(value: &str, what: &str) -> Result<u32> {
    let value = token(value);
    let digits = value.strip_prefix('+').unwrap_or(value);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(XmlError(format!("{what} is not a number")));
    }
    digits.parse().map_err(|_| XmlError(format!("{what} is not a number of 32 bits")))
}

/// A required attribute without a namespace.
pub(crate) fn attribute<'a>(node: Node<'a, '_>, name: &str) -> Result<&'a str> {
    node.attribute(name).ok_or_else(|| XmlError(format!("{}: the attribute {name} is missing", local(node))))
}

/// The algorithm of an element that has the attribute `Algorithm` and no content.
pub(crate) fn bare_algorithm<'a>(element: Node<'a, '_>) -> Result<&'a str> {
    attributes(element, &["Algorithm"])?;
    if let Some(child) = child_elements(element)?.first() {
        return Err(XmlError(format!("unexpected {}", local(*child))));
    }
    Ok(token(attribute(element, "Algorithm")?))
}

/// Writes character data, escaped as Canonical XML does.
pub(crate) fn escape_text(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\r' => out.push_str("&#xD;"),
            // XML 1.0 cannot represent these characters; they would make the reply unreadable.
            '\0'..='\x08' | '\x0b' | '\x0c' | '\x0e'..='\x1f' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
}

/// Writes `<name>base64</name>`.
pub(crate) fn write_base64(name: &str, octets: &[u8], out: &mut String) {
    out.push('<');
    out.push_str(name);
    out.push('>');
    BASE64.encode_append(octets, out);
    out.push_str("</");
    out.push_str(name);
    out.push('>');
}
