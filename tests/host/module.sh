#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# What the built bond_cpu_bound.ko must and must not have in it. A Rust panic is
# BUG(), so no code of the module may refer to one; and what spread(), which
# runs for every packet of a CPU with a choice, does without may not creep in.
#
# Runs in the build root, after the modules were built.
. "$(dirname "$0")/../lib.sh"

ko=$(dirname "$0")/../../target/modules/bond_cpu_bound.ko

# code SYMBOL-PATTERN: disassembly of the functions whose name matches
code() {
	objdump -dr --no-show-raw-insn "$ko" |
		awk -v name="$1" '/^[0-9a-f]+ </ { on = $2 ~ name && $2 !~ /__pfx/ } on'
}

no_panic() {
	local found
	# proof that there are symbols to look at
	nm "$ko" | grep -q ' U bond_xmit_register$' || fail "$ko: not the module"
	found=$(nm "$ko" | grep -E 'panic|unwrap_failed|expect_failed|slice_.*_fail' || :)
	check_eq "panics the module can call" "$found" ""
}

# What the packet path may not do has instructions that give it away.
lean_spread() {
	local asm
	asm=$(code '7AdapterN.*6spreadB')
	check_ge "instructions of spread" "$(wc -l <<<"$asm")" 10
	check_le "instructions of spread" "$(wc -l <<<"$asm")" 90
	check_eq "locked instructions in spread" "$(grep -E '\block\b|xchg' <<<"$asm" || :)" ""
	check_eq "calls in spread" "$(grep -E '\bcall\b' <<<"$asm" || :)" ""
	check_eq "divisions in spread" "$(grep -E '\bi?div' <<<"$asm" || :)" ""
}

is_alias() {
	check_match "aliases" "$(modinfo -F alias "$ko")" 'bond-xmit-cpu_bound'
	check_match "dependencies" "$(modinfo -F depends "$ko")" '^bonding$'
}

ktap_plan 3
ktap_run "no panic can be reached" no_panic
ktap_run "spread takes no lock, calls nothing, divides nothing" lean_spread
ktap_run "the module is found by the policy's alias" is_alias
ktap_finished
