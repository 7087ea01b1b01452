#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# The patch series as a reviewer takes it: each patch by itself is clean and
# builds, with no warning.
#
# Runs in the build root. KDIR: header tree. KSRC: source of the same kernel.
. "$(dirname "$0")/../lib.sh"

series=$(make -s -C "$KDIR" kernelversion | cut -d. -f1-2)
patches=("$(cd "$(dirname "$0")/../../module/patches/$series" && pwd)"/*.patch)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

mkdir -p "$tmp"/include/{net,uapi/linux} "$tmp"/drivers/net
cp -r "$KSRC"/drivers/net/bonding "$tmp"/drivers/net/
cp "$KSRC"/include/net/bond*.h "$tmp"/include/net/
cp "$KSRC"/include/uapi/linux/if_bonding.h "$tmp"/include/uapi/linux/
cat >"$tmp"/Kbuild <<'EOF'
obj-m := drivers/net/bonding/
LINUXINCLUDE := -I$(src)/include -I$(src)/include/uapi $(LINUXINCLUDE)
EOF
# The driver's own Makefile counts on these being seen from below.
printf '%s\n' 'subdir-ccflags-y += -Werror' >>"$tmp"/Kbuild

checkpatch() {
	(cd "$KSRC" && perl scripts/checkpatch.pl --strict --quiet --codespell "$1") ||
		fail "checkpatch --strict complains"
}

builds() {
	git -C "$tmp" apply --include='drivers/net/bonding/*' --include='include/*' "$1"
	make -j"$(nproc)" -C "$KDIR" M="$tmp" W=1 CONFIG_BONDING=m modules >"$tmp/log" 2>&1 || {
		tail -n 20 "$tmp/log"
		fail "does not build"
	}
	check_eq "warnings" "$(grep -i 'warning:' "$tmp/log" || :)" ""
	note "built: $(grep -c ' CC \[M\]' "$tmp/log") objects"
}

ktap_plan $((2 * ${#patches[@]}))
for patch in "${patches[@]}"; do
	name=$(basename "$patch" .patch)
	ktap_run "$name: checkpatch" checkpatch "$patch"
	ktap_run "$name: builds" builds "$patch"
done
ktap_finished
