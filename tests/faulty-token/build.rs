//! Links the module so that it is never unmapped: it has a thread of its own, and calls may hang in it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
