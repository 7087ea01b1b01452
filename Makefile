# Everything from a bare Debian with cargo and apt: each target makes what it needs.
# Big downloads and built trees are cached in ${XDG_CACHE_HOME:-~/.cache}/cpubond.
#
#   make demo     the paper's system under real TCP load, beside the usual one
#   make test     all tests, on this host and in the lab
#   make bench    what sending and serving cost, beside every other way; figures and docs/results.md
#                 (an hour and a half; QUICK=1: a few minutes, for ratios)
#   make modules  bonding.ko and bond_cpu_bound.ko into target/modules (KDIR=, KSRC=)
#   make helper   the static binary `cpubond`
#   make profiler the plugin that counts, for `cpubond bench`
#   make man      the manual pages into target/man
#   make install  the helper, its manual, units and udev rule (PREFIX=/usr/local, DESTDIR=)
#   make lint     formatting, clippy, shellcheck, checkpatch, sparse
#   make vm       a shell in the server VM
#   make clean    what was built here; the cache stays
#
# MIRROR=URL takes Debian packages from there.

CPUBOND := target/x86_64-unknown-linux-gnu/release/cpubond
# systemd and udev look in /usr and /usr/local only.
PREFIX ?= /usr/local
UNITS := $(PREFIX)/lib/systemd/system
export MIRROR KDIR KSRC

all: modules helper

demo: modules helper
	$(CPUBOND) vm demo

test: modules helper profiler
	scripts/test.sh $(CPUBOND)

bench: modules helper profiler
	$(CPUBOND) bench all $(if $(QUICK),--quick)

modules:
	scripts/modules.sh

helper:
	scripts/helper.sh

profiler:
	scripts/profiler.sh

man: helper
	$(CPUBOND) man target/man

# What `make helper` made; nothing is built here, so that root needs no cargo.
install:
	install -Dm755 $(CPUBOND) $(DESTDIR)$(PREFIX)/sbin/cpubond
	$(CPUBOND) man $(DESTDIR)$(PREFIX)/share/man/man8
	install -d $(DESTDIR)$(UNITS)/irqbalance.service.d
	for unit in cpubond.service cpubond-run@.service; do \
		sed 's,=cpubond ,=$(PREFIX)/sbin/cpubond ,' dist/$$unit >$(DESTDIR)$(UNITS)/$$unit || exit; \
	done
	install -m644 dist/irqbalance.conf $(DESTDIR)$(UNITS)/irqbalance.service.d/50-cpubond.conf
	install -Dm644 -t $(DESTDIR)$(PREFIX)/lib/udev/rules.d dist/90-cpubond.rules

lint: modules
	scripts/lint.sh

vm: modules helper
	$(CPUBOND) vm shell

clean:
	rm -rf target

.PHONY: all demo test bench modules helper profiler man install lint vm clean
# Each part uses all cores by itself.
.NOTPARALLEL:
