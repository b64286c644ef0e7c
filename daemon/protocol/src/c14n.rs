//! Exclusive XML Canonicalization 1.0 without comments (`http://www.w3.org/2001/10/xml-exc-c14n#`).
//!
//! The signed bytes are written from the same tree from which the values are read, so the signed content and the used
//! content cannot differ. This is our own code, not a library, because a hostile document can make the canonical form
//! grow a thousandfold (one long namespace name, used by many siblings), and the writer must stop at a limit.

use roxmltree::{Document, Node, NodeId};

use crate::xml::XmlError;

/// Most bytes of a canonical form. The largest real document (a protector of 512 KiB) stays far below.
pub const MAX_OCTETS: usize = 1024 * 1024;

const XML_NS: &str = "http://www.w3.org/XML/1998/namespace";

/// The canonical form of the element `node` and its content, as if it stood alone.
///
/// # Errors
/// The canonical form would be larger than [`MAX_OCTETS`].
pub fn element(node: Node<'_, '_>) -> Result<String, XmlError> {
    element_within(node, "")
}

/// The same without the child element `left_out`: the result of the enveloped-signature transform of XML-DSig.
pub(crate) fn element_without(node: Node<'_, '_>, left_out: Node<'_, '_>) -> Result<String, XmlError> {
    let mut writer = Writer::new(node, "");
    writer.left_out = Some(left_out.id());
    writer.element(node)?;
    Ok(writer.out)
}

/// The same as [`element`], at a place where the default namespace `default` is already declared.
///
/// # Errors
/// See [`element`].
pub(crate) fn element_within<'a>(node: Node<'a, '_>, default: &'a str) -> Result<String, XmlError> {
    let mut writer = Writer::new(node, default);
    writer.element(node)?;
    Ok(writer.out)
}

/// The canonical form of a whole document. Comments outside the root are dropped, together with the white space around
/// them.
///
/// # Errors
/// See [`element`].
pub fn document(document: &Document<'_>) -> Result<String, XmlError> {
    element(document.root_element())
}

struct Writer<'a> {
    out: String,
    /// Namespaces that the open elements declare: (prefix, name). The default namespace starts as "none".
    rendered: Vec<(&'a str, &'a str)>,
    left_out: Option<NodeId>,
}

impl<'a> Writer<'a> {
    fn new(node: Node<'_, '_>, default: &'a str) -> Self {
        Self { out: String::with_capacity(node.range().len()), rendered: vec![("", default)], left_out: None }
    }

    fn element<'i: 'a>(&mut self, node: Node<'a, 'i>) -> Result<(), XmlError> {
        if self.out.len() > MAX_OCTETS {
            return Err(XmlError::new("the canonical form of the document is too large"));
        }
        let name = qualified_name(node);
        let outer = self.rendered.len();
        self.out.push('<');
        self.out.push_str(name);
        self.namespaces(node, prefix(name));
        self.attributes(node);
        self.out.push('>');
        for child in node.children() {
            if Some(child.id()) == self.left_out {
                continue;
            }
            if child.is_element() {
                self.element(child)?;
            } else if child.is_text() {
                escape(child.text().unwrap_or_default(), &mut self.out, text_escape);
            }
        }
        self.out.push_str("</");
        self.out.push_str(name);
        self.out.push('>');
        self.rendered.truncate(outer);
        Ok(())
    }

    /// Declares the namespaces of the element's own name and attributes that no open element declares.
    fn namespaces<'i: 'a>(&mut self, node: Node<'a, 'i>, element_prefix: &'a str) {
        let mut used: Vec<(&'a str, &'a str)> = vec![(element_prefix, node.tag_name().namespace().unwrap_or_default())];
        for attribute in node.attributes() {
            let prefix = prefix(attribute_name(node, &attribute));
            if !prefix.is_empty() {
                used.push((prefix, attribute.namespace().unwrap_or_default()));
            }
        }
        used.sort_unstable();
        used.dedup();
        for (prefix, name) in used {
            if prefix == "xml" && name == XML_NS {
                continue;
            }
            let current = self.rendered.iter().rev().find(|(p, _)| *p == prefix).map(|(_, n)| *n);
            if current == Some(name) {
                continue;
            }
            self.out.push_str(if prefix.is_empty() { " xmlns" } else { " xmlns:" });
            self.out.push_str(prefix);
            self.out.push_str("=\"");
            escape(name, &mut self.out, attribute_escape);
            self.out.push('"');
            self.rendered.push((prefix, name));
        }
    }

    /// Writes the attributes in the order of (namespace name, local name).
    fn attributes(&mut self, node: Node<'_, '_>) {
        let mut attributes: Vec<_> = node.attributes().collect();
        attributes.sort_unstable_by_key(|a| (a.namespace().unwrap_or_default(), a.name()));
        for attribute in attributes {
            self.out.push(' ');
            self.out.push_str(attribute_name(node, &attribute));
            self.out.push_str("=\"");
            escape(attribute.value(), &mut self.out, attribute_escape);
            self.out.push('"');
        }
    }
}

/// The name of an element in the source. The tree keeps only the namespace, but canonical XML needs the prefix.
fn qualified_name<'i>(node: Node<'_, 'i>) -> &'i str {
    let source = &source(node)[node.range().start + 1..];
    let end = source.find([' ', '\t', '\n', '\r', '/', '>']).unwrap_or(source.len());
    &source[..end]
}

fn attribute_name<'i>(node: Node<'_, 'i>, attribute: &roxmltree::Attribute<'_, 'i>) -> &'i str {
    &source(node)[attribute.range_qname()]
}

fn source<'i>(node: Node<'_, 'i>) -> &'i str {
    node.document().input_text()
}

fn prefix(name: &str) -> &str {
    name.split_once(':').map_or("", |(prefix, _)| prefix)
}

fn text_escape(octet: u8) -> Option<&'static str> {
    match octet {
        b'&' => Some("&amp;"),
        b'<' => Some("&lt;"),
        b'>' => Some("&gt;"),
        b'\r' => Some("&#xD;"),
        _ => None,
    }
}

fn attribute_escape(octet: u8) -> Option<&'static str> {
    match octet {
        b'&' => Some("&amp;"),
        b'<' => Some("&lt;"),
        b'"' => Some("&quot;"),
        b'\t' => Some("&#x9;"),
        b'\n' => Some("&#xA;"),
        b'\r' => Some("&#xD;"),
        _ => None,
    }
}

/// Copies `text` in runs between the bytes that need escaping; base64 has none.
fn escape(text: &str, out: &mut String, escape: impl Fn(u8) -> Option<&'static str>) {
    // No early exit: then the compiler can vectorise the loop.
    if !text.bytes().fold(false, |found, octet| found | escape(octet).is_some()) {
        out.push_str(text);
        return;
    }
    let mut from = 0;
    for (at, octet) in text.bytes().enumerate() {
        if let Some(escaped) = escape(octet) {
            out.push_str(&text[from..at]);
            out.push_str(escaped);
            from = at + 1;
        }
    }
    out.push_str(&text[from..]);
}
