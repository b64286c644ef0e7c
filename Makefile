# Each target does its own set-up and is safe to repeat.
.PHONY: demo demo-vm test coverage bench bench-instructions bench-instructions-accept count-instructions soak fuzz lint deny deb sbom lint-deb setup setup-demo help

PACKAGES_DEMO = softhsm2
# A machine with Secure Boot and a TPM, all in software, and what it boots. The kernel is downloaded, and not installed.
PACKAGES_VM = swtpm swtpm-tools tpm2-tools qemu-system-x86 ovmf sbsigntool systemd-boot-efi busybox-static binutils cpio openssl
PACKAGES_TEST = $(PACKAGES_DEMO) opencryptoki opensc p11-kit p11-kit-modules xmlsec1 libxml2-utils openssl curl \
  python3-cryptography python3-jsonschema python3-lxml python3-yaml logrotate strace systemd iproute2 jq \
  libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients $(PACKAGES_VM)
# Installed after qemu-system-x86, which removes another version of it.
PACKAGES_DISKS = qemu-utils
# Only their programs are wanted.
PACKAGES_WATCH = prometheus prometheus-alertmanager
# Counts instructions.
PACKAGES_COUNT = $(PACKAGES_DEMO) valgrind
PACKAGES_NODES = etcd-server etcd-client faketime
# C code of the cryptographic and database libraries is compiled; the client of etcd is generated from protocol descriptions.
PACKAGES_BUILD = gcc libc6-dev make protobuf-compiler

help:
	@echo "make demo   build, make a lab with soft tokens, release keys end to end, keep serving"
	@echo "make demo-vm  a virtual machine starts with its key: QEMU without KVM, Secure Boot, a virtual TPM; some minutes"
	@echo "make test   format check, clippy, documentation and every test"
	@echo "make coverage  the share of lines that the tests run, for each crate; TESTS='…' for some, as cargo nextest takes them"
	@echo "make bench  what a release costs, and the daemon beside the raw token, in one table; best on an idle machine"
	@echo "make bench-instructions         instructions of each part of a release, and the change since they were accepted"
	@echo "make bench-instructions-accept  accepts them as they are now"
	@echo "make soak   half an hour of faults of every kind under load; MINUTES=N for another time"
	@echo "make fuzz   a minute of each fuzz target; SECONDS=N for another time, FUZZ_JOBS=N at a time, FUZZ_TARGETS=… for some"
	@echo "make lint   the checks without the tests"
	@echo "make deny   licences, origins and known advisories of the dependencies; a part of make lint"
	@echo "make deb    Debian packages of the program, the service, a host and the load generator, in target/debian"
	@echo "make lint-deb  checks these packages with lintian"
	@echo "make sbom   lists what the programs contain, in target/release/sbom; a part of make deb"

# Says no to every service that a package wants to start (Debian's policy-rc.d).
POLICY = /usr/sbin/policy-rc.d

# Installs what is missing of the Debian packages $(1); without root it says what to install. The services of $(2) are neither
# started nor enabled.
define install
	@missing=$$(for p in $(1); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  if ! command -v apt-get >/dev/null; then echo "please install:" $$missing; exit 1; fi; \
	  if [ "$$(id -u)" != 0 ]; then echo "please run: sudo apt-get install" $$missing; exit 1; fi; \
	  echo "installing:" $$missing; \
	  $(if $(2),if [ ! -e $(POLICY) ]; then trap 'rm -f $(POLICY)' EXIT; printf '#!/bin/sh\nexit 101\n' >$(POLICY); chmod 755 $(POLICY); fi;) \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null \
	  $(if $(2),&& if command -v systemctl >/dev/null; then systemctl disable --quiet $(2) 2>/dev/null || true; fi); \
	fi
endef

# Tools that are used for seconds are built without optimisation, and without what debuggers know of them.
INSTALL = CARGO_PROFILE_DEV_DEBUG=0 cargo install --locked --debug
# Without its own updates, for which another cryptographic library in C would be built.
NEXTEST = cargo nextest --version >/dev/null 2>&1 || $(INSTALL) cargo-nextest --no-default-features --features default-no-update

setup-demo:
	$(call install,$(PACKAGES_BUILD) $(PACKAGES_DEMO))

setup:
	$(call install,$(PACKAGES_BUILD) $(PACKAGES_TEST))
	$(call install,$(PACKAGES_DISKS))
	$(call install,$(PACKAGES_WATCH),$(PACKAGES_WATCH))
	$(call install,$(PACKAGES_NODES),etcd)

demo: setup-demo
	cargo build --release --locked --bin claviger
	./target/release/claviger demo --dir target/lab

demo-vm: setup-demo
	$(call install,$(PACKAGES_VM))
	cargo build --release --locked --bin claviger
	CLAVIGER=target/release/claviger tests/demo-vm/run --dir target/demo-vm

# The features of dependencies follow from the targets that are built, and those of tests ask for more. Here and below, each build has
# a test or an example in it, so that no dependency is built or checked twice.
lint: setup deny
	cargo fmt --all --check
	cargo fmt --manifest-path tests/fuzz/Cargo.toml --check
	cargo fmt --manifest-path bench/instructions/Cargo.toml --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --lib --examples

# Licences, origins and banned crates are always judged. The advisories are judged by a database that has to be fetched: where it
# cannot be, and none was fetched before, they are skipped, and that is said.
deny:
	cargo deny --version >/dev/null 2>&1 || $(INSTALL) cargo-deny
	cargo deny --locked check bans licenses sources
	@if cargo deny --locked fetch db >/dev/null 2>&1 || cargo deny --offline fetch db >/dev/null 2>&1; then \
	  echo "cargo deny --offline check advisories"; cargo deny --offline check advisories; \
	else \
	  echo "SKIPPED: advisories were not checked, because the RustSec advisory database cannot be fetched from here;"; \
	  echo "         run make deny where it can be"; \
	fi

# The system tests run the program that is built here; by themselves they would build it, too.
test: lint
	$(NEXTEST)
	cargo deb --version >/dev/null 2>&1 || $(INSTALL) cargo-deb
	cargo build --workspace --locked --lib --bins --tests --examples
	CLAVIGER_BIN=$(CURDIR)/target/debug/claviger CLAVIGER_LOADGEN_BIN=$(CURDIR)/target/debug/claviger-loadgen \
	  cargo nextest run --workspace --locked
	$(MAKE) bench-instructions

# Reads the counts by the LLVM of the compiler's version.
LLVM = $(shell rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
TESTS =
coverage: setup
	$(call install,llvm-$(LLVM))
	$(NEXTEST)
	tests/coverage/run $(TESTS)

# In one go, so that the benches run the very program that is built here. MODULE=FILE measures on another token than SoftHSM2. The
# targets are of RSA-2048 and the default numbers; STORM=N and IDLE=N measure less in less time.
MODULE =
STORM = 10000
IDLE = 10000
ceiling = CLAVIGER_BIN=$(CURDIR)/target/release/claviger ./target/release/ceiling $(if $(MODULE),--module $(MODULE))
bench: setup-demo
	$(call install,$(PACKAGES_NODES),etcd)
	rm -rf target/figures && mkdir -p target/figures
	cargo build --release --locked -p claviger -p claviger-bench --bins
	CLAVIGER_BIN=$(CURDIR)/target/release/claviger $(if $(MODULE),CLAVIGER_SOFTHSM2=$(MODULE)) \
	  cargo bench --locked -p claviger-bench --bench '*' -- --warm-up-time 1 --measurement-time 3
	$(ceiling) --json target/figures/ceiling.json > target/figures/ceiling.txt
	$(ceiling) --callers 64 --rounds 3 --json target/figures/ceiling-64.json > target/figures/ceiling-64.txt
	$(ceiling) --stock-mib 64 --rounds 3 --json target/figures/ceiling-stock.json > target/figures/ceiling-stock.txt
	$(ceiling) --storm $(STORM) --owners 100 --rounds 2 --json target/figures/storm.json > target/figures/storm.txt
	$(ceiling) --rtt 20ms --sessions 1 --hsms 1,4,16 --rounds 3 --json target/figures/scaling.json > target/figures/scaling.txt
	$(ceiling) --idle $(IDLE) --rounds 3 --json target/figures/idle.json > target/figures/idle.txt
	CLAVIGER_BIN=$(CURDIR)/target/release/claviger ./target/release/nodes --json target/figures/nodes.json > target/figures/nodes.txt
	@echo; ./target/release/table; for f in ceiling ceiling-64 ceiling-stock storm scaling idle nodes; do cat target/figures/$$f.txt; done

# Counts instructions with the version of gungraun that bench/instructions/Cargo.toml asks for. What was counted before goes first, so
# that a part that is gone is seen to be gone.
GUNGRAUN = $(shell sed -n 's/^gungraun = "=\(.*\)"/\1/p' bench/instructions/Cargo.toml)
count-instructions:
	$(call install,$(PACKAGES_BUILD) $(PACKAGES_COUNT))
	@gungraun-runner --version 2>/dev/null | grep -qF ' $(GUNGRAUN)' || $(INSTALL) gungraun-runner --version $(GUNGRAUN)
	rm -rf target/gungraun/claviger-instructions
	GUNGRAUN_HOME=$(CURDIR)/target/gungraun cargo bench --locked --manifest-path bench/instructions/Cargo.toml --target-dir target \
	  --bench release -- --save-summary=json --nosummary

# Fails when a part grew by more than 3 %. As a part of the whole workspace, with the smallest test in it, the comparison is built of
# what `make test` has built.
INSTRUCTIONS = cargo build --quiet --locked --workspace --bin instructions --test generated && ./target/debug/instructions
bench-instructions: count-instructions
	@$(INSTRUCTIONS)

bench-instructions-accept: count-instructions
	@$(INSTRUCTIONS) --accept

MINUTES = 30
soak: setup-demo
	cargo build --locked --workspace --bin claviger --bin soak
	CLAVIGER_BIN=$(CURDIR)/target/debug/claviger ./target/debug/soak --minutes $(MINUTES)

# Ends with an error when a target finds something. libFuzzer is C++.
SECONDS = 60
FUZZ_JOBS = 1
FUZZ_TARGETS =
fuzz:
	$(call install,$(PACKAGES_BUILD) g++)
	tests/fuzz/run --seconds $(SECONDS) --jobs $(FUZZ_JOBS) $(FUZZ_TARGETS)

# The packages have the time of the last commit, so that the same sources make the same packages.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
deb: sbom
	$(call install,$(PACKAGES_BUILD))
	command -v cargo-deb >/dev/null || $(INSTALL) cargo-deb
	cargo build --release --locked -p claviger -p claviger-loadgen --bins
	rm -rf target/release/manual target/debian
	for program in claviger claviger-loadgen; do ./target/release/$$program manual target/release/manual/$$program || exit 1; done
	gzip -9n target/release/manual/*/man/*
	cargo deb --locked --no-build -p claviger
	cargo deb --locked --no-build -p claviger --variant server
	cargo deb --locked --no-build -p claviger --variant host
	cargo deb --locked --no-build -p claviger-loadgen

# What the programs contain, as CycloneDX documents. The tool writes one for each program of the workspace, beside its Cargo.toml.
sbom:
	command -v cargo-cyclonedx >/dev/null || $(INSTALL) cargo-cyclonedx
	rm -rf target/release/sbom && mkdir -p target/release/sbom
	cargo cyclonedx --quiet --format json --spec-version 1.5 --describe binaries --no-build-deps
	for program in daemon/claviger loadgen/claviger-loadgen; do \
	  sed 's,file://$(CURDIR)/,file:///,g' $${program}_bin.cdx.json >target/release/sbom/$${program#*/}.cdx.json || exit 1; \
	done
	find . -path ./target -prune -o -name '*.cdx.json' -exec rm {} +

# Debian's own checks of the packages that `make deb` made. Nobody has asked Debian to take them, so they close no bug there.
lint-deb:
	$(call install,lintian)
	lintian --fail-on error,warning --suppress-tags initial-upload-closes-no-bugs --allow-root --tag-display-limit 0 target/debian/*_$(VERSION)-1_*.deb
