//! The module has a thread of its own and may have calls that hang: it must never be unmapped under them.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
