# shellcheck shell=bash
# What every script here shares: where the caches are, how a step is shown, how
# the build root is entered. Sourced, never run.

set -euo pipefail

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/cpubond

# Where the checkout appears inside the build root. Fixed, so that what is built
# there (debug info, dependency files) does not depend on where it was cloned.
IN_ROOT_TOP=/cpubond

export LC_ALL=C DEBIAN_FRONTEND=noninteractive

say() { printf 'cpubond: %s\n' "$*" >&2; }
die() { printf 'cpubond: error: %s\n' "$*" >&2; exit 1; }

as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	else
		command -v sudo >/dev/null ||
			die "root is needed for '$1' and there is no sudo: run as root, or install sudo"
		sudo -- "$@"
	fi
}

# hash_of FILE|STRING...: a short key for a cache directory, from what makes it.
# Comments are not a part of that.
hash_of() {
	local x
	for x in "$@"; do
		if [ -f "$x" ]; then grep -vE '^[[:space:]]*(#|$)' "$x"; else printf '%s\n' "$x"; fi
	done | sha256sum | cut -c1-12
}

# step WHAT LOG CMD...: run CMD with its output in LOG; show what is done and how
# long it took, and on failure the end of the log and one clear line.
step() {
	local what=$1 log=$2 rc=0 t=$SECONDS ticker
	shift 2
	mkdir -p "$(dirname "$log")"
	say "$what"
	# The ticker ends by itself should this shell be killed.
	(
		exec 9>&-
		while sleep 30 && kill -0 "$$" 2>/dev/null; do
			say "  … $((SECONDS - t)) s"
		done
	) </dev/null &
	ticker=$!
	"$@" >"$log" 2>&1 </dev/null || rc=$?
	{ kill "$ticker" && wait "$ticker"; } 2>/dev/null || :
	if [ "$rc" != 0 ]; then
		tail -n 25 "$log" | sed 's/^/    /' >&2
		if grep -q 'No space left on device' "$log"; then
			die "the disk of $CACHE is full: free some space or set XDG_CACHE_HOME (log: $log)"
		fi
		if grep -qE 'Failed to fetch|Could not (resolve|connect)|Connection timed out|Temporary failure resolving|Connection failed' "$log"; then
			die "a Debian mirror cannot be reached: check the network, or set MIRROR= (log: $log)"
		fi
		die "this failed: ${what%% (*} (log: $log)"
	fi
	say "  done in $((SECONDS - t)) s"
}

# need TOOL PACKAGE...: install PACKAGEs by apt when TOOL is missing.
need() {
	local tool=$1
	shift
	if command -v "$tool" >/dev/null || [ -e "$tool" ]; then
		return
	fi
	command -v apt-get >/dev/null ||
		die "'$tool' is missing and there is no apt-get: install it by hand (Debian: $*)"
	if ! apt-cache show "$@" >/dev/null 2>&1; then
		step "apt-get update" "$CACHE/log/apt.log" as_root apt-get -q update
	fi
	step "install $* (for $tool)" "$CACHE/log/apt.log" \
		as_root apt-get -qy --no-install-recommends install "$@"
}

# need_space MB: refuse early, rather than fail late with a half-full disk.
need_space() {
	local free
	mkdir -p "$CACHE" || die "cannot make $CACHE: set XDG_CACHE_HOME to a place you can write"
	free=$(df -Pm "$CACHE" | awk 'NR == 2 { print $4 }')
	[ "$free" -ge "$1" ] ||
		die "$CACHE has $free MB free, $1 MB are needed: free some space or set XDG_CACHE_HOME"
}

# Only one script at a time makes something in the cache; a second one waits.
lock_cache() {
	mkdir -p "$CACHE" || die "cannot make $CACHE: set XDG_CACHE_HOME to a place you can write"
	[ -z "${CPUBOND_LOCKED:-}" ] || return 0
	exec 9>"$CACHE/lock"
	if ! flock -n 9; then
		say "waiting for another cpubond build that holds $CACHE/lock"
		flock 9
	fi
	export CPUBOND_LOCKED=1
}

# The kernel series a patch series exists for, oldest first.
supported_series() {
	local d
	for d in "$TOP"/module/patches/*/; do
		[ -d "$d" ] && basename "$d"
	done | sort -V
}

# A changed list of packages, another mirror or another set of supported kernels
# makes another root.
root_dir() {
	if [ -n "${CPUBOND_ROOT:-}" ]; then
		echo "$CPUBOND_ROOT"
	else
		echo "$CACHE/root-$(hash_of "$TOP/scripts/buildroot.sh" "${MIRROR:-}" "$(supported_series)")"
	fi
}

# root_fact NAME: what buildroot.sh found out: kernel (release), series, source.
root_fact() {
	local file
	file=$(root_dir)/etc/cpubond/$1
	[ -r "$file" ] || die "there is no build root yet: run scripts/buildroot.sh"
	cat "$file"
}

# in_root CMD...: run CMD in the build root as the calling user, in the checkout.
# The mounts are made in a mount namespace of its own: whatever happens, nothing
# stays mounted. Set IN_ROOT_USER=root for what needs it, IN_ROOT_BIND=HOST:INSIDE
# for one more directory.
in_root() {
	local root user
	root=$(root_dir)
	user=${IN_ROOT_USER:-$(id -u):$(id -g)}
	[ -x "$root/bin/bash" ] || die "there is no build root yet: run scripts/buildroot.sh"
	as_root unshare --mount --propagation private bash -euc '
		root=$1 top=$2 at=$3 user=$4 bind=$5
		shift 5
		mkdir -p "$root$at"
		mount --bind "$top" "$root$at"
		mount -t proc proc "$root/proc"
		mount --rbind /dev "$root/dev"
		if [ -n "$bind" ]; then
			mkdir -p "$root${bind#*:}"
			mount --bind "${bind%%:*}" "$root${bind#*:}"
		fi
		exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LC_ALL=C TERM="${TERM:-dumb}" \
			chroot ${user:+--userspec="$user"} "$root" \
			/bin/bash -c "cd \"\$1\" && shift && exec \"\$@\"" in_root "$at" "$@"
	' in_root "$root" "$TOP" "$IN_ROOT_TOP" "$user" "${IN_ROOT_BIND:-}" "$@"
}
