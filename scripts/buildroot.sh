#!/bin/bash
# Make the build root: Debian trixie with the backports kernel, its compilers and
# rustc, QEMU, and what the guests run. Prints nothing and does nothing when it is
# there already.
#
#   MIRROR=URL   take packages from there (default: this machine's own apt mirror)
#
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

SUITE=trixie
PACKAGES=(
	# The kernel is built with this gcc and this very rustc; out-of-tree Rust
	# modules must match it.
	gcc-14 make bc bison flex cpio kmod pahole libelf-dev libssl-dev libdw-dev
	zlib1g-dev xz-utils patch git perl python3 rustc rust-src rust-clippy rustfmt
	bindgen clang libclang-dev
	# Lint.
	sparse codespell shellcheck
	# iproute2, whose patch is built by the tests.
	dpkg-dev libmnl-dev libbpf-dev libcap-dev pkgconf
	# The lab: QEMU from trixie (the one in backports wants a newer seabios).
	qemu-system-x86 seabios ipxe-qemu
	# What runs in the guests.
	bash coreutils procps util-linux iproute2 ethtool iputils-ping lighttpd
	apache2-utils nginx nftables irqbalance udev tcpdump jq iperf3 strace bpftool
	# What reads our units.
	systemd
)

root=$(root_dir)
if [ -r "$root/etc/cpubond/kernel" ]; then
	touch -c "$CACHE/.used-$(basename "$root")" 2>/dev/null || :
	exit 0
fi
[ -z "${CPUBOND_ROOT:-}" ] || die "CPUBOND_ROOT=$root is not a build root made by this script"

[ "$(uname -m)" = x86_64 ] || die "the lab runs x86-64 kernels; this machine is $(uname -m)"
command -v apt-get >/dev/null || die "there is no apt-get: a Debian 12 or 13 host is needed"
[ -n "$(supported_series)" ] || die "module/patches/ holds no series: the checkout is incomplete"

lock_cache
[ ! -r "$root/etc/cpubond/kernel" ] || exit 0 # made while we waited
need_space 8000
need mmdebstrap mmdebstrap

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
need "$keyring" debian-archive-keyring

mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' \
	'Origin: Debian' 'Label: Debian' | head -1)}
[ -n "$mirror" ] || die "no Debian mirror in this machine's apt configuration: run 'apt-get update' or set MIRROR="

tmp=$root.tmp
log=$CACHE/log/buildroot.log
as_root rm -rf --one-file-system "$tmp" "$root"
trap 'as_root rm -rf --one-file-system "$tmp" "$CACHE/apt.tmp"' EXIT

# Which kernels are there? Asked with an apt state of our own, which needs no root
# and leaves the host's as it is.
apt_dir=$CACHE/apt.tmp
rm -rf "$apt_dir"
mkdir -p "$apt_dir"/{state/lists/partial,cache/archives/partial,etc}
echo "deb [arch=amd64 signed-by=$keyring] $mirror $SUITE-backports main" >"$apt_dir/etc/sources.list"
apt_opts=(
	-o Dir::State="$apt_dir/state" -o Dir::State::status=/dev/null -o Dir::Cache="$apt_dir/cache"
	-o Dir::Etc::SourceList="$apt_dir/etc/sources.list" -o Dir::Etc::SourceParts=/dev/null
	-o Dir::Etc::PreferencesParts=/dev/null -o Acquire::Languages=none
	-o APT::Architecture=amd64 -o APT::Sandbox::User= -o Acquire::Retries=2
	-o APT::Update::Error-Mode=any
)
step "look for kernels in $SUITE-backports (10 MB)" "$CACHE/log/kernels.log" \
	apt-get "${apt_opts[@]}" -q update
apt-cache "${apt_opts[@]}" pkgnames linux-image- |
	sed -nE 's/^linux-image-([0-9]+\.[0-9]+\.[0-9]+\+[a-z0-9.]+-amd64)$/\1/p' | sort -V >"$apt_dir/kernels"
kernel=
for series in $(supported_series | sort -rV); do
	kernel=$(grep -F "$series." "$apt_dir/kernels" | grep "^$series\\." | tail -1 || :)
	[ -z "$kernel" ] || break
done
[ -n "$kernel" ] ||
	die "$SUITE-backports has kernels $(sed 's/-amd64//' "$apt_dir/kernels" | tr '\n' ' ')but module/patches/ supports $(supported_series | tr '\n' ' '): add a series or set KDIR="
rm -rf "$apt_dir"

# linux-base must come from backports with the kernel; the rest is trixie's.
printf -v include '%s,' "${PACKAGES[@]}" \
	"linux-image-$kernel" "linux-headers-$kernel" "linux-source-$series"
include+=linux-base/$SUITE-backports

# A mirror may hold no sources: iproute2's serves only the test of its patch.
# INITRD=No: the hooks would only build an initramfs that nothing boots.
step "make the build root with kernel $kernel (about 700 MB to fetch, 3 GB on disk, 2 to 4 minutes)" "$log" \
	as_root env INITRD=No mmdebstrap --variant=apt --mode=root --architectures=amd64 \
	--keyring="$keyring" \
	--aptopt='Acquire::Languages "none"' \
	--aptopt='APT::Install-Recommends "false"' \
	--aptopt='Acquire::Retries "3"' \
	--dpkgopt='path-exclude=/usr/share/man/*' \
	--dpkgopt='path-exclude=/usr/share/locale/*' \
	--dpkgopt='path-exclude=/usr/share/doc/*' \
	--customize-hook='chroot "$1" sh -c "cd /usr/src && apt-get -q source iproute2 || rm -rf iproute2*"' \
	--customize-hook="mkdir -p \"\$1/etc/cpubond\" \"\$1$IN_ROOT_TOP\"
		echo '$series' >\"\$1/etc/cpubond/series\"
		echo '$kernel' >\"\$1/etc/cpubond/kernel.new\"
		chmod 755 \"\$1\"" \
	--include="$include" \
	"$SUITE" "$tmp" \
	"deb $mirror $SUITE main" "deb $mirror $SUITE-backports main" "deb-src $mirror $SUITE main"

as_root mv "$tmp/etc/cpubond/kernel.new" "$tmp/etc/cpubond/kernel"
as_root mv "$tmp" "$root"

# A root is big: drop those of earlier recipes that nothing used for two weeks.
touch "$CACHE/.used-$(basename "$root")"
find "$CACHE" -maxdepth 1 -name '.used-root-*' -mtime +14 | while read -r used; do
	say "remove $(basename "${used/.used-/}"), unused for two weeks"
	as_root rm -rf --one-file-system "${used/.used-/}" "$used"
done
