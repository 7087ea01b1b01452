#!/bin/bash
# Run all tests: cargo's on this host, those of the built modules in the build root,
# those of the running kernel in the lab. The last line counts all of them.
#
# usage: scripts/test.sh CPUBOND
#
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

cpubond=$1
cd "$TOP"
passed=0 failed=0 skipped=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# A runner that failed with no failed test to show for it is a failure itself.
count() {
	local what=$1 rc=$2 p=$3 f=$4 s=$5
	if [ "$rc" != 0 ] && [ "$f" = 0 ] || [ $((p + f + s)) = 0 ]; then
		say "$what: ended with exit code $rc, $p passed, $f failed, $s skipped"
		f=$((f + 1))
	fi
	passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
}

# ktap_counts FILE: passed, failed, skipped; a short plan is a failure.
ktap_counts() {
	awk '
		/^1\.\./ { plan = substr($1, 4); if (plan == 0 && /SKIP/) s++ }
		/^ok [0-9]/ { n++; if (/ # SKIP/) s++; else p++ }
		/^not ok [0-9]/ { n++; f++ }
		END { if (plan == "" || plan != n + 0) f++; print p + 0, f + 0, s + 0 }' "$1"
}

say "tests on this host"
rc=0
cargo test --quiet --locked --workspace --no-fail-fast 2>&1 | tee "$log" || rc=$?
read -r p f s < <(awk '$1 == "test" && $2 == "result:" { p += $4; f += $6; s += $8 }
	END { print p + 0, f + 0, s + 0 }' "$log")
count "cargo test" "$rc" "$p" "$f" "$s"

kernel=$(root_fact kernel)
for test in tests/host/*.sh; do
	[ -e "$test" ] || continue
	say "$test"
	rc=0
	in_root env KDIR="/usr/src/linux-headers-$kernel" KSRC="/usr/src/linux-source-$(root_fact series)" \
		STOCK="/lib/modules/$kernel/kernel/drivers/net/bonding/bonding.ko.xz" \
		MAKEFLAGS="-j$(nproc) CC=gcc-14" bash "$test" 2>&1 | tee "$log" || rc=$?
	[ "$rc" != 4 ] || rc=0
	read -r p f s < <(ktap_counts "$log")
	count "$test" "$rc" "$p" "$f" "$s"
done

say "tests in the lab"
rc=0
"$cpubond" vm test 2>&1 | tee "$log" || rc=$?
read -r p f s < <(awk '/^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$/ { print $1, $3, $5; found = 1 }
	END { if (!found) print 0, 0, 0 }' "$log")
count "guest tests" "$rc" "$p" "$f" "$s"

say "what sending costs, as ratios"
rc=0
"$cpubond" bench tx --quick --check 2>&1 | tee "$log" || rc=$?
read -r p f s < <(ktap_counts "$log")
count "bench tx --quick --check" "$rc" "$p" "$f" "$s"

say "what serving costs, as ratios"
rc=0
"$cpubond" bench system --quick --check 2>&1 | tee "$log" || rc=$?
read -r p f s < <(ktap_counts "$log")
count "bench system --quick --check" "$rc" "$p" "$f" "$s"

echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
