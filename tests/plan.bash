# shellcheck shell=bash
# What the tests of `cpubond plan` share. Sourced after lib.sh.

DIR=/tmp/plan
mkdir -p "$DIR"

# plan ARG...: what it proposes, and, in $DIR/warnings, what it warns of.
plan() { cpubond plan "$@" 2>"$DIR/warnings"; }

# Files that a plan might have touched, and what they hold; interrupts that are to be
# put back.
state() {
	local nic irq
	for nic in $(nics); do
		for irq in $(nic_irqs "$nic"); do
			echo "irq $nic $irq $(<"/proc/irq/$irq/smp_affinity_list")"
		done
		find "$SYS/$nic/" -path '*/queues/*' -name '*ps_cpus' | sort | while read -r file; do
			# There is no XPS where there is one queue.
			echo "$file $(cat "$file" 2>/dev/null || :)"
		done
	done
}

# bare FILE: the configuration without its comments, in FILE.bare.
bare() { sed '/^#/d; /^$/d' "$1" >"$1.bare"; }

# predicted [FILE]: the map in the comments of a plan.
predicted() { sed -n 's/^#   \([0-9]\)/\1/p' "${1:-$DIR/config.toml}"; }

# slaves_of KEY: what the plan has for each slave.
slaves_of() {
	jq -r --arg key "$1" '[.bonds[0].slaves[][$key]] | join(" ")' "$DIR/plan.json"
}

# propose: a plan in $DIR/config.toml and, of the same machine, $DIR/plan.json.
propose() {
	state >"$DIR/before"
	plan --address "$SERVER_IP/24" >"$DIR/config.toml"
	plan --address "$SERVER_IP/24" -j >"$DIR/plan.json"
	state | diff "$DIR/before" - || fail "a plan has changed something (< before, > after)"
	check_eq "keys" "$(jq -r 'keys | join(" ")' "$DIR/plan.json")" "bonds host map schema warnings"
	check_eq "schema" "$(jq .schema "$DIR/plan.json")" 1
	check_eq "CPUs in the map" "$(predicted | wc -l)" "$(nproc --all)"
	check_eq "map in JSON and in comments" \
		"$(jq -r '.map[] | "\(.cpu) \(.slaves | join(",")) \(.reason)"' "$DIR/plan.json")" \
		"$(predicted)"
}

# Two plans of one machine, the second by nobody: with other capabilities, the same text.
repeats() {
	plan >"$DIR/root"
	setpriv --reuid=65534 --regid=65534 --clear-groups cpubond plan >"$DIR/nobody" 2>/dev/null
	diff "$DIR/root" "$DIR/nobody" || fail "plans differ (< root, > nobody)"
	[ -s "$DIR/root" ] || fail "there is no plan"
}

# predicts COUNT: the kernel's map after an apply, which makes COUNT changes at least.
predicts() {
	local changes
	changes=$(cpubond apply --wait 20 --config "$DIR/config.toml" | sed -n 's/ changes made$//p')
	note "$changes changes made"
	check_ge "changes made" "$changes" "$1"
	predicted >"$DIR/map"
	# It is for a bond whose slaves all have a link.
	(wait_for 20 diff "$DIR/map" "$SYS/$BOND/bonding/cpu_bound_map") ||
		diff "$DIR/map" "$SYS/$BOND/bonding/cpu_bound_map" ||
		fail "the map is not what was predicted (< predicted, > the kernel's)"
}

again() {
	plan >"$DIR/again.toml"
	bare "$DIR/config.toml"
	bare "$DIR/again.toml"
	[ -s "$DIR/again.toml.bare" ] || fail "there is no second plan"
	diff "$DIR/config.toml.bare" "$DIR/again.toml.bare" ||
		fail "the second plan differs (< first, > second)"
	predicted "$DIR/again.toml" | diff "$DIR/map" - ||
		fail "the second prediction differs (< first, > second)"
	cpubond verify --wait 20 --config "$DIR/config.toml"
	check_eq "apply of the second plan" "$(cpubond apply --config "$DIR/again.toml")" \
		"nothing to change"
}

# Both NICs on one CPU each, of one socket, one of them by hand.
by_config() {
	cat >"$DIR/config.toml" <<-END
		[[bond]]
		name = "$BOND"
		[[bond.slave]]
		name = "eth1"
		cpus = "0"
		[[bond.slave]]
		name = "eth0"
		cpus = "1"
		set_cpus = true
	END
	plan --config "$DIR/config.toml" --address "$SERVER_IP/24" >"$DIR/new.toml"
	mv "$DIR/new.toml" "$DIR/config.toml"
	predicted | while read -r line; do note "$line"; done
	check_match "CPU 0 and 1" "$(predicted | head -n 2 | xargs)" "^0 eth1 irq 1 eth0 set$"
	predicts 5
}

undone() {
	cpubond undo
	[ ! -e "$SYS/$BOND" ] || fail "$BOND is still there"
	state | diff "$DIR/before" - || fail "not as it was (< before, > after)"
}
