//! Which source file of a crate imports from which, and whether that goes in circles.
//!
//! A file imports from the file of the module that a path of it names: in `use`, in an expression, in a type. A parent that declares
//! a child with `mod` does not import from it by that. Tests are left out: they may look at anything.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemMod, ItemUse, Meta, UseTree};

/// A module's path in its crate; empty for the crate's root.
type Module = Vec<String>;

/// The imports of a crate, by file.
#[derive(Debug)]
pub struct Imports {
    /// Relative to the crate's folder of sources.
    files: BTreeMap<Module, PathBuf>,
    of: BTreeMap<Module, BTreeSet<Module>>,
}

/// Files that import from each other, all of them directly or by way of others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Circle {
    /// Each import within the circle: from which file, of which file.
    pub imports: Vec<(PathBuf, PathBuf)>,
}

impl fmt::Display for Circle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "these files import in a circle:")?;
        self.imports.iter().try_for_each(|(from, of)| writeln!(f, "  {} imports from {}", from.display(), of.display()))
    }
}

impl Imports {
    /// Reads all source files below a folder whose root is `lib.rs`.
    ///
    /// # Panics
    /// When a file cannot be read or parsed.
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
                let mut paths = Paths { module: module.clone(), found: BTreeSet::new() };
                paths.visit_file(&parsed);
                let named = paths.found.iter().filter_map(|path| file_of(path, &files));
                (module.clone(), named.filter(|other| other != module).collect())
            })
            .collect();
        Imports { files, of }
    }

    /// Every circle there is.
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
                let of = self.of[*from].iter().filter(|of| members.contains(of));
                of.map(|of| (self.files[*from].clone(), self.files[of].clone()))
            });
            circles.push(Circle { imports: imports.collect() });
        }
        circles
    }

    fn reached_from(&self, module: &Module) -> BTreeSet<Module> {
        let mut reached = BTreeSet::new();
        let mut ahead: Vec<_> = self.of[module].iter().collect();
        while let Some(next) = ahead.pop() {
            if reached.insert(next.clone()) {
                ahead.extend(&self.of[next]);
            }
        }
        reached
    }
}

/// All files of the crate that are no tests, by module.
fn collect(sources: &Path, folder: &Path, files: &mut BTreeMap<Module, PathBuf>) {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for path in entries.map(|entry| entry.unwrap_or_else(|error| panic!("{}: {error}", folder.display())).path()) {
        if path.is_dir() {
            collect(sources, &path, files);
            continue;
        }
        let file = path.strip_prefix(sources).unwrap_or(&path).to_owned();
        let module: Module = file.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
        match module.last().map(String::as_str) {
            Some("tests" | "main") => {}
            Some("lib") if module.len() == 1 => _ = files.insert(Vec::new(), file),
            _ if path.extension().is_some_and(|extension| extension == "rs") => _ = files.insert(module, file),
            _ => {}
        }
    }
}

/// The file that a path leads into: that of the longest module which it begins with.
fn file_of(path: &Module, files: &BTreeMap<Module, PathBuf>) -> Option<Module> {
    (0..=path.len()).rev().map(|len| path[..len].to_vec()).find(|module| files.contains_key(module))
}

/// Collects the paths that lead out of a module, from the crate's root.
struct Paths {
    module: Module,
    found: BTreeSet<Module>,
}

impl Paths {
    /// `None`: a path into another crate, or one of a name that is in scope.
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

    fn find(&mut self, path: &[String]) {
        let found = self.absolute(path.iter().map(String::as_str));
        // In a file of modules, `use child::Item` names a child.
        let relative = || [&self.module[..], path].concat();
        let found = found.unwrap_or_else(relative);
        self.found.insert(found);
    }

    fn tree(&mut self, before: &[String], tree: &UseTree) {
        match tree {
            UseTree::Path(path) => self.tree(&[before, &[path.ident.to_string()]].concat(), &path.tree),
            UseTree::Name(name) => self.find(&[before, &[name.ident.to_string()]].concat()),
            UseTree::Rename(name) => self.find(&[before, &[name.ident.to_string()]].concat()),
            UseTree::Glob(_) => self.find(before),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.tree(before, tree)),
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
        let segments: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if path.leading_colon.is_none() && segments.len() > 1 {
            self.find(&segments);
        }
        visit::visit_path(self, path);
    }

    /// `pub(super)` and `pub(in …)` import nothing.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}
}

/// `#[cfg(test)]`, `#[test]`.
fn is_for_tests(attribute: &Attribute) -> bool {
    match &attribute.meta {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(list) => list.path.is_ident("cfg") && list.tokens.to_string() == "test",
        Meta::NameValue(_) => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    fn circles(files: &[(&str, &str)]) -> Vec<Vec<(String, String)>> {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let name = |path: PathBuf| path.to_str().unwrap().to_owned();
        let circles = Imports::of_crate(folder.path()).circles();
        circles
            .into_iter()
            .map(|circle| circle.imports.into_iter().map(|(a, b)| (name(a), name(b))).collect())
            .collect()
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
}
