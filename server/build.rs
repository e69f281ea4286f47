//! Makes the musl build a static-pie that runs: musl-gcc names a dynamic linker even for a static program, and a kernel
//! then looks for that file instead of starting the program ("Failed to execute /init (error -2)").

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "musl") {
        println!("cargo::rustc-link-arg=-Wl,--no-dynamic-linker");
    }
}
