#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# What `make install` installs, and what systemd and udev think of it.
#
# Runs in the build root, after the helper was built.
. "$(dirname "$0")/../lib.sh"

top=$(dirname "$0")/../..
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
units=$dir/lib/systemd/system

installs() {
	make -s -C "$top" install DESTDIR="$dir/dest" PREFIX=/opt
	cmp "$top/target/x86_64-unknown-linux-gnu/release/cpubond" "$dir/dest/opt/sbin/cpubond"
	check_ge "manual pages" "$(find "$dir/dest/opt/share/man/man8" -name 'cpubond*.8' | wc -l)" 10
	check_eq "the rest" "$(cd "$dir/dest" && find . -type f | grep -v -e /sbin/ -e /man8/ | sort)" "$(printf '%s\n' \
		./opt/lib/systemd/system/{cpubond-run@.service,cpubond.service,irqbalance.service.d/50-cpubond.conf} \
		./opt/lib/udev/rules.d/90-cpubond.rules)"
	check_eq "programs that the units name" \
		"$(sed -nE 's/^Exec(Start|Reload|Stop)=([^ ]*).*/\2/p' "$dir"/dest/opt/lib/systemd/system/*.service | sort -u)" \
		/opt/sbin/cpubond
	make -s -C "$top" install PREFIX="$dir"
}

# verify UNIT...: what systemd has to say about them, found where they were installed.
verify() {
	SYSTEMD_UNIT_PATH=$units: systemd-analyze --man=no verify "$@" 2>&1
}

units() {
	local said
	said=$(verify cpubond.service cpubond-run@web.service irqbalance.service) || fail "$said"
	check_eq "complaints" "$said" ""
}

# That it complains of what is wrong, and looks at each of them.
complains() {
	local file
	for file in cpubond.service cpubond-run@.service irqbalance.service.d/50-cpubond.conf; do
		cp "$units/$file" "$dir/good"
		sed -i 's/^\[Service\]/&\nNonsense=yes/' "$units/$file"
		check_match "complaints" "$(verify cpubond.service cpubond-run@web.service irqbalance.service || :)" \
			"$units/$file:[0-9]+: Unknown key 'Nonsense'"
		cp "$dir/good" "$units/$file"
	done
}

# The helper takes every command line that the units have.
commands() {
	local line n=0
	while read -r line; do
		# shellcheck disable=SC2086 # a list of words
		"$dir/sbin/cpubond" $line --help >/dev/null || fail "cpubond $line"
		n=$((n + 1))
	done < <(sed -nE "s,^Exec(Start|Reload|Stop)=$dir/sbin/cpubond (.*),\2,p" "$units"/*.service)
	check_eq "command lines" "$n" 4
	check_fails "$dir/sbin/cpubond" apply --nonsense --help
}

rules() {
	udevadm verify "$dir/lib/udev/rules.d/90-cpubond.rules" >"$dir/said" 2>&1 || fail "$(<"$dir/said")"
	sed 's/ACTION==/ACTON==/' "$dir/lib/udev/rules.d/90-cpubond.rules" >"$dir/90-bad.rules"
	check_fails udevadm verify "$dir/90-bad.rules"
}

ktap_plan 5
ktap_run "make install puts everything where systemd and udev look" installs
ktap_run "systemd has nothing to say about the units" units
ktap_run "and would" complains
ktap_run "the helper knows the units' command lines" commands
ktap_run "udev has nothing to say about the rule" rules
ktap_finished
