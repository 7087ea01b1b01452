#!/bin/bash
# Build bonding.ko and bond_cpu_bound.ko below target/modules.
#
# usage: scripts/modules.sh                                 for the lab's kernel
#        KDIR=DIR [KSRC=DIR] scripts/modules.sh             for your own kernel
#        scripts/modules.sh KDIR KSRC [make argument...]    just the build
#
# KDIR is a kernel build tree (headers) with Rust metadata, KSRC the source of
# the same kernel, for the bonding driver that gets patched.
#
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

if [ $# -lt 2 ]; then
	"$TOP/scripts/kernel-tree.sh"
	if [ -n "${KDIR:-}" ]; then
		exec "$0" "$KDIR" "${KSRC:-$KDIR}" "$@"
	fi
	kernel=$(root_fact kernel)
	step "build the modules for kernel $kernel (half a minute)" "$CACHE/log/modules.log" \
		in_root scripts/modules.sh "/usr/src/linux-headers-$kernel" \
		"/usr/src/linux-source-$(root_fact series)" -j"$(nproc)" CC=gcc-14 "$@"
	exit 0
fi

kdir=$1 ksrc=$2
shift 2

out=$TOP/target/modules
series=$(make -s -C "$kdir" kernelversion | cut -d. -f1-2)
patches=$TOP/module/patches/$series
[ -d "$patches" ] ||
	die "$kdir is Linux $series; module/patches/ supports $(supported_series | tr '\n' ' ')"

# The driver is patched anew when the series or the kernel source changes, and
# only then: make goes by time stamps.
id=$(cat "$patches"/*.patch "$ksrc"/drivers/net/bonding/*.[ch] \
	"$ksrc"/include/net/bond*.h | sha256sum | cut -c1-16)
if [[ ! -e $out/.patched-$id ]]; then
	rm -rf "$out"
	mkdir -p "$out"/include/net "$out"/include/uapi/linux "$out"/drivers/net
	cp -r "$ksrc"/drivers/net/bonding "$out"/drivers/net/
	cp "$ksrc"/include/net/bond*.h "$out"/include/net/
	cp "$ksrc"/include/uapi/linux/if_bonding.h "$out"/include/uapi/linux/
	for p in "$patches"/*.patch; do
		# Documentation and the like are not here to be patched. Kept
		# from finding our own repository, git applies to what is here.
		(cd "$out" && GIT_CEILING_DIRECTORIES=$TOP/target git apply \
			--include='drivers/net/bonding/*' --include='include/*' "$p")
	done
	mv "$out"/drivers/net/bonding "$out"/bonding
	rm -r "$out"/drivers
	ln -s ../../Kbuild "$out"/
	touch "$out/.patched-$id"
fi

# Links to the files, not to their directory: objects go beside what they are
# made from, as make sees it.
mkdir -p "$out"/module
(cd "$out"/module && ln -sf ../../../module/*.rs .)

exec make -C "$kdir" M="$out" modules "$@"
