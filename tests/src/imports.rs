//! Reads the imports between the source files of a crate and finds circles among them.
//!
//! A file imports from the file of each module that one of its paths names: in `use`, in an expression, in a type. The
//! `mod` item with which a parent declares a child is not an import. Test code is left out: it may use anything.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use proc_macro2::{Ident, TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemMod, ItemUse, Macro, Meta, UseTree};

/// A module's path in its crate; empty for the crate root.
type Module = Vec<String>;

/// The imports of a crate, by source file.
#[derive(Debug)]
pub struct Imports {
    /// Paths relative to the crate's source directory.
    files: BTreeMap<Module, PathBuf>,
    /// With the first place where each file is imported.
    of: BTreeMap<Module, BTreeMap<Module, Place>>,
}

/// Where a file imports.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Place {
    line: usize,
    /// From the crate's root.
    path: Module,
}

/// One import.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Import {
    /// The file that imports.
    pub from: PathBuf,
    /// The line of it, from 1.
    pub line: usize,
    /// What it imports, from the crate's root.
    pub path: String,
    /// The file that it imports from.
    pub of: PathBuf,
}

impl fmt::Display for Import {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{} imports {}, from {}", self.from.display(), self.line, self.path, self.of.display())
    }
}

/// A set of files that import from each other, directly or indirectly.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Circle {
    /// Each import within the circle.
    pub imports: Vec<Import>,
}

impl fmt::Display for Circle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "these files import in a circle:")?;
        self.imports.iter().try_for_each(|import| writeln!(f, "  {import}"))
    }
}

/// What is wrong with the order of a crate's rooms.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Disorder {
    /// A room that stands in no place of the order.
    Unlisted(String),
    /// The order names a room that there is not.
    Missing(String),
    /// A room imports from one above it.
    Upwards(Import),
}

impl fmt::Display for Disorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unlisted(room) => {
                write!(f, "the room {room} is not in the list: add it above all rooms that it imports")
            }
            Self::Missing(room) => write!(f, "the list names the room {room}, which is not there"),
            Self::Upwards(import) => write!(f, "{import}, which is in a room above"),
        }
    }
}

impl Imports {
    /// Reads all source files below a directory whose root is `lib.rs`.
    ///
    /// # Panics
    /// If a file cannot be read or parsed.
    #[must_use]
    pub fn of_crate(sources: &Path) -> Self {
        let mut files = BTreeMap::new();
        collect(sources, sources, &mut files);
        let of = files
            .iter()
            .map(|(module, file)| {
                let path = sources.join(file);
                let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                let parsed = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                let mut paths = Paths { module: module.clone(), found: Vec::new() };
                paths.visit_file(&parsed);
                let mut of = BTreeMap::new();
                for place in paths.found {
                    if let Some(other) = file_of(&place.path, &files).filter(|other| other != module) {
                        of.entry(other).or_insert(place);
                    }
                }
                (module.clone(), of)
            })
            .collect();
        Imports { files, of }
    }

    /// Returns all circles.
    #[must_use]
    pub fn circles(&self) -> Vec<Circle> {
        let reached: BTreeMap<_, _> = self.of.keys().map(|module| (module, self.reached_from(module))).collect();
        let mut seen = BTreeSet::new();
        let mut circles = Vec::new();
        for module in self.of.keys() {
            let in_circle = |other: &&Module| reached[module].contains(*other) && reached[*other].contains(module);
            let members: BTreeSet<&Module> = self.of.keys().filter(in_circle).collect();
            if members.is_empty() || !seen.insert(members.clone()) {
                continue;
            }
            let imports = members.iter().flat_map(|from| {
                let of = self.of[*from].keys().filter(|of| members.contains(of));
                of.map(|of| self.import(from, of))
            });
            circles.push(Circle { imports: imports.collect() });
        }
        circles
    }

    /// What is wrong if these are the rooms from top to bottom, each of which may import those after it. The root of the crate may
    /// import all of them.
    #[must_use]
    pub fn disorder(&self, rooms: &[&str]) -> Vec<Disorder> {
        let place = |module: &Module| module.first().map(|room| rooms.iter().position(|listed| listed == room));
        let there: BTreeSet<&str> = self.files.keys().filter_map(|module| module.first().map(String::as_str)).collect();
        let unlisted =
            there.iter().filter(|room| !rooms.contains(room)).map(|room| Disorder::Unlisted((*room).to_owned()));
        let missing =
            rooms.iter().filter(|room| !there.contains(*room)).map(|room| Disorder::Missing((*room).to_owned()));
        let all = self.of.iter().flat_map(|(from, of)| of.keys().map(move |of| (from, of)));
        let upwards = all.filter(|(from, of)| match (place(from), place(of)) {
            (Some(Some(from)), Some(Some(of))) => of < from,
            _ => false,
        });
        let upwards = upwards.map(|(from, of)| Disorder::Upwards(self.import(from, of)));
        unlisted.chain(missing).chain(upwards).collect()
    }

    fn import(&self, from: &Module, of: &Module) -> Import {
        let place = &self.of[from][of];
        Import {
            from: self.files[from].clone(),
            line: place.line,
            path: format!("crate::{}", place.path.join("::")),
            of: self.files[of].clone(),
        }
    }

    fn reached_from(&self, module: &Module) -> BTreeSet<Module> {
        let mut reached = BTreeSet::new();
        let mut ahead: Vec<_> = self.of[module].keys().collect();
        while let Some(next) = ahead.pop() {
            if reached.insert(next.clone()) {
                ahead.extend(self.of[next].keys());
            }
        }
        reached
    }
}

/// Collects all source files of the crate except tests, by module.
fn collect(sources: &Path, folder: &Path, files: &mut BTreeMap<Module, PathBuf>) {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for path in entries.map(|entry| entry.unwrap_or_else(|error| panic!("{}: {error}", folder.display())).path()) {
        if path.is_dir() {
            collect(sources, &path, files);
            continue;
        }
        let file = path.strip_prefix(sources).unwrap_or(&path).to_owned();
        let module: Module = file.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
        if module.iter().any(|part| ["tests", "testing"].contains(&&**part)) {
            continue;
        }
        match module.last().map(String::as_str) {
            Some("main") => {}
            Some("lib") if module.len() == 1 => _ = files.insert(Vec::new(), file),
            _ if path.extension().is_some_and(|extension| extension == "rs") => _ = files.insert(module, file),
            _ => {}
        }
    }
}

/// Returns the file that a path leads to: that of the longest module path that is a prefix of it.
fn file_of(path: &Module, files: &BTreeMap<Module, PathBuf>) -> Option<Module> {
    (0..=path.len()).rev().map(|len| path[..len].to_vec()).find(|module| files.contains_key(module))
}

/// Collects the paths that lead out of a module, relative to the crate root.
struct Paths {
    module: Module,
    found: Vec<Place>,
}

impl Paths {
    /// Returns the absolute path; `None` for a path into another crate or for a name in scope.
    fn absolute<'a>(&self, mut segments: impl Iterator<Item = &'a str>) -> Option<Module> {
        let mut absolute = match segments.next()? {
            "crate" => Vec::new(),
            "self" => self.module.clone(),
            "super" => self.module.split_last()?.1.to_vec(),
            _ => return None,
        };
        for segment in segments {
            if segment == "super" {
                absolute.pop()?;
            } else {
                absolute.push(segment.to_owned());
            }
        }
        Some(absolute)
    }

    fn find(&mut self, path: &[&Ident]) {
        let Some(last) = path.last() else { return };
        let path: Module = path.iter().map(ToString::to_string).collect();
        let found = self.absolute(path.iter().map(String::as_str));
        // In a file of modules, `use child::Item` names a child.
        let relative = || [&self.module[..], &path[..]].concat();
        let found = found.unwrap_or_else(relative);
        self.found.push(Place { line: last.span().start().line, path: found });
    }

    fn tree<'a>(&mut self, before: &[&'a Ident], tree: &'a UseTree) {
        match tree {
            UseTree::Path(path) => self.tree(&[before, &[&path.ident]].concat(), &path.tree),
            UseTree::Name(name) => self.find(&[before, &[&name.ident]].concat()),
            UseTree::Rename(name) => self.find(&[before, &[&name.ident]].concat()),
            UseTree::Glob(_) => self.find(before),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.tree(before, tree)),
        }
    }

    /// The arguments of a macro are not parsed; paths in them that begin with a keyword are found all the same.
    fn tokens(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut rest = tokens.as_slice();
        while let Some((first, after)) = rest.split_first() {
            rest = after;
            match first {
                TokenTree::Group(group) => self.tokens(group.stream()),
                TokenTree::Ident(start) if ["crate", "self", "super"].iter().any(|keyword| start == keyword) => {
                    let mut path = vec![start];
                    while let [TokenTree::Punct(one), TokenTree::Punct(two), TokenTree::Ident(next), after @ ..] = rest
                        && (one.as_char(), two.as_char()) == (':', ':')
                    {
                        path.push(next);
                        rest = after;
                    }
                    if path.len() > 1 {
                        self.find(&path);
                    }
                }
                _ => {}
            }
        }
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item(&mut self, item: &'ast Item) {
        let attributes = match item {
            Item::Mod(item) => &item.attrs,
            Item::Use(item) => &item.attrs,
            Item::Fn(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            _ => return visit::visit_item(self, item),
        };
        if !attributes.iter().any(is_for_tests) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        self.module.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.module.pop();
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        if item.leading_colon.is_none() {
            self.tree(&[], &item.tree);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<_> = path.segments.iter().map(|segment| &segment.ident).collect();
        if path.leading_colon.is_none() && segments.len() > 1 {
            self.find(&segments);
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast Macro) {
        self.tokens(call.tokens.clone());
        visit::visit_macro(self, call);
    }

    /// `pub(super)` and `pub(in …)` import nothing.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}
}

/// Returns true for `#[cfg(test)]` and `#[test]`.
fn is_for_tests(attribute: &Attribute) -> bool {
    let with_feature = "any (test , feature = \"testing\")";
    match &attribute.meta {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(list) => list.path.is_ident("cfg") && ["test", with_feature].contains(&&*list.tokens.to_string()),
        Meta::NameValue(_) => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    fn imports(files: &[(&str, &str)]) -> Imports {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Imports::of_crate(folder.path())
    }

    fn circles(files: &[(&str, &str)]) -> Vec<Vec<(String, String)>> {
        let name = |path: PathBuf| path.to_str().unwrap().to_owned();
        let circles = imports(files).circles();
        circles
            .into_iter()
            .map(|circle| circle.imports.into_iter().map(|import| (name(import.from), name(import.of))).collect())
            .collect()
    }

    fn disorder(files: &[(&str, &str)], rooms: &[&str]) -> Vec<String> {
        imports(files).disorder(rooms).iter().map(ToString::to_string).collect()
    }

    fn pair(one: &str, other: &str) -> (String, String) {
        (one.to_owned(), other.to_owned())
    }

    #[test]
    fn imports_downwards_are_no_circle() {
        let files = [
            ("lib.rs", "mod a; mod b; pub use a::A; pub use b::inner::C;"),
            ("a.rs", "use crate::b::{self, B}; use std::fmt; pub struct A(B);"),
            ("b.rs", "pub mod inner; pub use inner::C; pub struct B(C);"),
            ("b/inner.rs", "#[cfg(test)] mod tests { use super::super::B; use crate::a::A; } pub struct C;"),
        ];
        assert_eq!(circles(&files), Vec::<Vec<_>>::new());
    }

    #[test]
    fn a_circle_is_named_by_its_imports() {
        let files = [
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use crate::b::B; pub struct A;"),
            ("b.rs", "pub struct B; fn f() { let _ = crate::c::C; }"),
            ("c.rs", "pub struct C; fn f(_: super::a::A) {}"),
        ];
        let expected = vec![pair("a.rs", "b.rs"), pair("b.rs", "c.rs"), pair("c.rs", "a.rs")];
        assert_eq!(circles(&files), [expected]);
    }

    #[test]
    fn a_child_that_imports_from_its_parent_is_a_circle_where_the_parent_uses_it() {
        let child = "use super::Parent; pub struct Child;";
        let unused =
            [("lib.rs", "mod parent;"), ("parent.rs", "mod child; pub struct Parent;"), ("parent/child.rs", child)];
        assert_eq!(circles(&unused), Vec::<Vec<_>>::new());
        let used = [
            ("lib.rs", "mod parent;"),
            ("parent.rs", "mod child; use child::Child; pub struct Parent(Child);"),
            ("parent/child.rs", child),
        ];
        assert_eq!(circles(&used), [vec![pair("parent.rs", "parent/child.rs"), pair("parent/child.rs", "parent.rs")]]);
    }

    #[test]
    fn a_path_in_the_arguments_of_a_macro_is_an_import() {
        let files = [
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "pub struct A; fn f() { println!(\"{}\", [crate::b::N]); }"),
            ("b.rs", "use crate::a::A; pub const N: u8 = 1; fn f(_: A) {}"),
        ];
        assert_eq!(circles(&files), [vec![pair("a.rs", "b.rs"), pair("b.rs", "a.rs")]]);
    }

    /// Three rooms, of which `store` is the lowest.
    fn house(store: &'static str) -> Vec<(&'static str, &'static str)> {
        vec![
            ("lib.rs", "mod http; mod release; mod store; pub use store::Table;"),
            ("http.rs", "pub mod routes;"),
            ("http/routes.rs", "use crate::release::roll; pub struct Route;"),
            ("release.rs", "#[cfg(test)] mod tests;\nuse crate::store::{self, table::Row}; pub fn roll(_: Row) {}"),
            ("release/tests.rs", "use crate::http::routes::Route;"),
            ("store.rs", "pub mod table; pub struct Table;"),
            ("store/table.rs", store),
        ]
    }

    #[test]
    fn imports_of_rooms_below_are_in_order() {
        let rooms = ["http", "release", "store"];
        let fine = "pub struct Row; #[cfg(any(test, feature = \"testing\"))] pub mod testing { use crate::http::routes::Route; }";
        assert_eq!(disorder(&house(fine), &rooms), Vec::<String>::new());
    }

    #[test]
    fn an_import_from_a_room_above_is_named_with_its_file_and_line() {
        let rooms = ["http", "release", "store"];
        let used = "//! Rows.\n\nuse std::fmt;\nuse crate::http::{\n    routes::Route,\n};\npub struct Row;";
        let told = "store/table.rs:5 imports crate::http::routes::Route, from http/routes.rs, which is in a room above";
        assert_eq!(disorder(&house(used), &rooms), [told]);
        let called = "pub struct Row;\nfn f() { super::super::release::roll(Row) }";
        let told = "store/table.rs:2 imports crate::release::roll, from release.rs, which is in a room above";
        assert_eq!(disorder(&house(called), &rooms), [told]);
    }

    #[test]
    fn the_list_of_rooms_and_the_tree_agree() {
        let files = house("pub struct Row;");
        let told = "the room store is not in the list: add it above all rooms that it imports";
        assert_eq!(disorder(&files, &["http", "release"]), [told]);
        let told = "the list names the room cellar, which is not there";
        assert_eq!(disorder(&files, &["http", "release", "store", "cellar"]), [told]);
    }
}
