#!/bin/bash
# Prepare a kernel header tree that out-of-tree Rust modules can be built against.
# Debian's headers lack the Rust metadata; it is made from the same version's
# source with the stock config, which needs no kernel build. Prints nothing and
# does nothing when that is done.
#
#   KDIR=DIR   use your own kernel tree instead (built on this host, by its compilers)
#   KSRC=DIR   …whose source is there, when KDIR is only its headers or its O= tree
#
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

if [ -n "${KDIR:-}" ]; then
	[ -f "$KDIR/Makefile" ] || die "KDIR=$KDIR is not a kernel tree: it has no Makefile"
	config=$KDIR/.config
	[ -f "$config" ] || die "KDIR=$KDIR has no .config: configure and build that kernel first"
	grep -q '^CONFIG_RUST=y' "$config" ||
		die "KDIR=$KDIR was configured without CONFIG_RUST: the module needs a kernel with Rust"
	if ! ls "$KDIR"/rust/*.rmeta >/dev/null 2>&1; then
		src=${KSRC:-$KDIR}
		[ -f "$src/rust/kernel/lib.rs" ] ||
			die "KDIR=$KDIR has no Rust metadata (rust/*.rmeta): set KSRC= to that kernel's source"
		if [ "$src" -ef "$KDIR" ]; then
			step "prepare Rust metadata in $KDIR (2 minutes)" "$CACHE/log/kernel-tree.log" \
				make -C "$KDIR" rustavailable prepare
		else
			out=$CACHE/ksrc-$(hash_of "$config" "$src")
			mkdir -p "$out"
			cp "$config" "$out/.config"
			step "prepare Rust metadata from $src (2 minutes)" "$CACHE/log/kernel-tree.log" \
				make -C "$src" O="$out" rustavailable olddefconfig prepare
			[ -w "$KDIR" ] || die "KDIR=$KDIR cannot be written: copy $out/rust/*.rmeta and *.so to its rust/ as root"
			mkdir -p "$KDIR/rust" "$KDIR/scripts"
			cp "$out"/rust/*.rmeta "$out"/rust/*.so "$KDIR/rust/"
			cp "$out/scripts/target.json" "$KDIR/scripts/"
		fi
	fi
	[ -n "${KSRC:-}" ] || [ -f "$KDIR/drivers/net/bonding/bond_main.c" ] ||
		die "KDIR=$KDIR has no source of the bonding driver: set KSRC= to that kernel's source"
	exit 0
fi

"$TOP/scripts/buildroot.sh"
root=$(root_dir)
stamp=$root/etc/cpubond/tree-$(hash_of "$TOP/scripts/kernel-tree.sh")
[ ! -e "$stamp" ] || exit 0

lock_cache
[ ! -e "$stamp" ] || exit 0
need_space 3000
kernel=$(root_fact kernel)
series=$(root_fact series)

# The stamp is written last, and a tree without one is thrown away: an interrupted
# run leaves nothing that a later one would trust.
IN_ROOT_USER=root step "prepare kernel $kernel for Rust modules (2 to 3 minutes)" \
	"$CACHE/log/kernel-tree.log" in_root bash -euc '
		kernel=$1 series=$2 stamp=$3
		rm -f /etc/cpubond/tree-*
		cd /usr/src
		rm -rf "linux-source-$series"
		tar -xf "linux-source-$series.tar.xz"
		cd "linux-source-$series"
		cp "/boot/config-$kernel" .config
		make -j"$(nproc)" CC=gcc-14 HOSTCC=gcc-14 rustavailable olddefconfig prepare
		headers=/usr/src/linux-headers-$kernel
		mkdir -p "$headers/rust" "$headers/scripts"
		cp rust/*.rmeta rust/*.so "$headers/rust/"
		cp scripts/target.json "$headers/scripts/"
		# For C=1, which the packaged headers cannot do without it.
		cp scripts/checker-valid.sh "$headers/scripts/"
		touch "$stamp"
	' kernel-tree "$kernel" "$series" "${stamp#"$root"}"
