#!/bin/bash
# Make what the guests boot: the stock kernel and a base initramfs with a real
# shell and tools, from the build root. The harness appends what changes (our
# modules, the helper, the tests) as a second archive. Prints the directory that
# holds `vmlinuz`, `base.cpio`, `kernel` (its release) and `root` (the build root).
#
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

# Every program of these packages, for the guests' shell and tests. No BusyBox: its
# shell runs its own `ip` ahead of iproute2's and makes tests pass or fail for
# nothing.
PACKAGES=(
	bash dash coreutils sed grep mawk findutils diffutils hostname procps util-linux mount kmod
	iproute2 ethtool iputils-ping lighttpd nginx nftables irqbalance udev tcpdump jq iperf3
	strace bpftool
)
PROGRAMS=(/usr/bin/ab /usr/bin/systemctl /usr/lib/systemd/systemd{,-executor,-udevd})

# Units for tests that have systemd in a container.
UNITS=('*.target' irqbalance.service 'systemd-udevd*')

# Modules by name, or whole folders below the modules' `kernel/`; what they depend
# on comes along.
MODULES=(
	virtio_net virtio_console virtio_rng tun tap veth dummy ifb pktgen tls 8021q bridge tcp_diag udp_diag
	drivers/net/bonding drivers/net/team net/sched net/netfilter net/ipv4/netfilter
)

"$TOP/scripts/buildroot.sh"
root=$(root_dir)
image=$CACHE/guest-$(hash_of "$TOP/scripts/guest-image.sh" "$root")
if [ ! -d "$image" ]; then
	lock_cache
fi
if [ ! -d "$image" ]; then
	need_space 500
	kernel=$(root_fact kernel)
	tmp=$image.tmp
	rm -rf "$tmp"
	mkdir -p "$tmp"
	trap 'rm -rf "$tmp"' EXIT
	IN_ROOT_BIND=$tmp:/mnt step "make the guest image (half a minute, 100 MB)" "$CACHE/log/guest-image.log" \
		in_root bash -euo pipefail -c '
			kernel=$1 packages=$2 programs=$3 modules=$4 units=$5
			stage=$(mktemp -d)
			trap "rm -rf \"\$stage\"" EXIT
			cd "$stage"
			mkdir -p usr/{bin,sbin,lib,lib64} etc proc sys dev run tmp root var/{log,tmp} mnt
			ln -s usr/bin usr/sbin usr/lib usr/lib64 .
			ln -s ../run var/run

			list=$(mktemp -p "$stage")
			{
				printf "%s\n" $programs
				for p in $packages; do
					dpkg -L "$p" | grep -E "^(/usr)?/s?bin/." || :
				done
				ls /usr/lib/lighttpd/*.so
				(cd /usr/lib/systemd/system && ls -d $units) | sed s,^,/usr/lib/systemd/system/,
			} | sed -E "s,^/(s?bin)/,/usr/\1/," | sort -u >"$list"
			{
				cat "$list"
				# Libraries, and the loader itself.
				{ xargs -d "\n" ldd <"$list" 2>/dev/null || :; } |
					sed -nE "s,^.*(=> |\t)(/[^ ]+) \(.*,\2,p" | sort -u
			} | while read -r f; do
				# Both the link (as named) and what it points to.
				[ -e "$f" ] || continue
				cp -a --parents "$f" . 2>/dev/null || cp -a --parents "/usr$f" .
				t=$(readlink -f "$f")
				[ -e ".$t" ] || cp -a --parents "$t" .
			done
			rm "$list"
			# The name comes from update-alternatives, which no package lists.
			ln -s mawk usr/bin/awk

			dir=/usr/lib/modules/$kernel
			for m in $modules; do
				case $m in
				*/*) find "$dir/kernel/$m" -name "*.ko*" | sed "s,.*/,,; s,\.ko.*,," ;;
				*) echo "$m" ;;
				esac
			done | sort -u | while read -r m; do
				modprobe -d / -S "$kernel" --show-depends "$m" | sed -n "s/^insmod \([^ ]*\).*/\1/p"
			done | sort -u | while read -r f; do
				f=$(readlink -f "$f")
				mkdir -p ".$(dirname "$f")"
				# Unpacked here once, rather than by an emulated CPU at every boot.
				case $f in
				*.xz) xz -dc "$f" >".${f%.xz}" ;;
				*) cp "$f" ".$f" ;;
				esac
			done
			cp "$dir"/modules.{order,builtin,builtin.modinfo} ".$dir/"
			depmod -b . "$kernel"

			printf "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/false\n" >etc/passwd
			printf "root:x:0:\nnogroup:x:65534:\n" >etc/group
			printf "127.0.0.1 localhost\n" >etc/hosts
			cp /etc/mime.types etc/ 2>/dev/null || :
			cp /etc/protocols /etc/services etc/ 2>/dev/null || :
			du -sh .
			find . -mindepth 1 | sort | cpio --quiet -o -H newc -R 0:0 --reproducible >/mnt/base.cpio
			cp "/boot/vmlinuz-$kernel" /mnt/vmlinuz
		' guest-image "$kernel" "${PACKAGES[*]}" "${PROGRAMS[*]}" "${MODULES[*]}" "${UNITS[*]}"
	echo "$kernel" >"$tmp/kernel"
	echo "$root" >"$tmp/root"
	mv "$tmp" "$image"
	trap - EXIT
fi
echo "$image"
