//! How `libsmc.so` is linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // A program may have functions of these names itself, and call libc's by another (`__read`, `__sigaction`): what calls a
    // hook in here means that hook, not the program's function, which would call us again.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-Bsymbolic-functions");
}
