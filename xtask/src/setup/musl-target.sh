# Builds the Rust standard library for x86_64-unknown-linux-musl from Debian's rust-src package of the same version as
# rustc, and puts it into rustc's sysroot. For machines that reach a Debian mirror but no rustup server.
# $1: address of the Debian archive. Needs root.
set -euo pipefail
target=x86_64-unknown-linux-musl
mirror=$1
version=$(rustc --version | cut -d' ' -f2)
dest=$(rustc --print sysroot)/lib/rustlib/$target/lib
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
unwind=$(apt-cache search --names-only '^libunwind-[0-9]+-dev$' | cut -d' ' -f1 | sort -V | awk -F- '$2 >= 14 {print; exit}')
apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends musl-tools gcc "$unwind"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A private apt, so that the machine's own sources stay as they are. One suite after the other until the version fits.
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
options=(-o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$work/lists"
  -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root -o Acquire::Languages=none)
found=
for suite in bookworm bookworm-backports trixie trixie-backports forky sid; do
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" > "$work/sources.list"
  apt-get "${options[@]}" update || continue
  found=$(apt-cache "${options[@]}" madison rust-src | awk -F'|' '{gsub(/ /, "", $2); print $2}' |
    grep -m1 "^${version//./\\.}+" || true)
  [ -n "$found" ] && break
done
[ -n "$found" ] || { echo "no rust-src $version in the Debian archive" >&2; exit 1; }
cd "$work"
apt-get "${options[@]}" download "rust-src=$found"
dpkg-deb -x rust-src_*.deb src
cd src/usr/src/rustc-*/library
RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zforce-unstable-if-unmarked -Cembed-bitcode=yes" CARGO_TARGET_DIR=$work/target \
  cargo build --quiet --release --manifest-path sysroot/Cargo.toml --target $target --features panic-unwind,backtrace

mkdir -p "$dest/self-contained"
cp /usr/lib/x86_64-linux-musl/{crt1.o,crti.o,crtn.o,rcrt1.o,Scrt1.o,libc.a} "$dest/self-contained/"
for o in crtbegin.o crtbeginS.o crtend.o crtendS.o; do cp "$(gcc -print-file-name=$o)" "$dest/self-contained/"; done
# LLVM's static unwinder was built against glibc's fortified headers: give it the one symbol that musl lacks.
install -m644 "$(dpkg -L "$unwind" | grep '/libunwind\.a$' | sed -n 1p)" "$work/libunwind.a"
cat > "$work/shim.c" <<'C'
#include <stdarg.h>
#include <stdio.h>
int __fprintf_chk(FILE *f, int flag, const char *fmt, ...)
{ va_list ap; (void)flag; va_start(ap, fmt); int n = vfprintf(f, fmt, ap); va_end(ap); return n; }
C
musl-gcc -O2 -c "$work/shim.c" -o "$work/shim.o"
ar r "$work/libunwind.a" "$work/shim.o"
cp "$work/libunwind.a" "$dest/self-contained/"
cp "$work/target/$target/release/deps/"*.rlib "$dest/"
echo "installed $target for rustc $version"
