# Everything from a bare Debian with cargo and apt: each target makes what it needs.
# Big downloads and built trees are cached in ${XDG_CACHE_HOME:-~/.cache}/cpubond.
#
#   make demo     real TCP load over cpu_bound and balance-rr, side by side
#   make test     all tests, on this host and in the lab
#   make modules  bonding.ko and bond_cpu_bound.ko into target/modules (KDIR=, KSRC=)
#   make helper   the static binary `cpubond`
#   make man      the manual pages into target/man
#   make lint     formatting, clippy, shellcheck, checkpatch, sparse
#   make vm       a shell in the server VM
#   make clean    what was built here; the cache stays
#
# MIRROR=URL takes Debian packages from there.

CPUBOND := target/x86_64-unknown-linux-gnu/release/cpubond
export MIRROR KDIR KSRC

all: modules helper

demo: modules helper
	$(CPUBOND) vm demo

test: modules helper
	scripts/test.sh $(CPUBOND)

modules:
	scripts/modules.sh

helper:
	scripts/helper.sh

man: helper
	$(CPUBOND) man target/man

lint: modules
	scripts/lint.sh

vm: modules helper
	$(CPUBOND) vm shell

clean:
	rm -rf target

.PHONY: all demo test modules helper man lint vm clean
# Each part uses all cores by itself.
.NOTPARALLEL:
