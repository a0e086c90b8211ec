#!/usr/bin/env bash
# Every check and test, each step with its seconds: scripts/test.sh [--quick]
#   --quick  leaves out what starts whole hierarchies (tests/e2e, tests/lab) or needs the SDKs
#
# Needs a Debian 12 with cargo; everything else it installs (packages through apt when it may, tools
# and RocksDB into ~/.cache/edgehub, the SDKs into the checkout) or names. Idempotent.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
cd "$ROOT"

quick=
for argument in "$@"; do
  case "$argument" in
    --quick) quick=1 ;;
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit ;;
    *) die "unknown option: $argument (see --help)" ;;
  esac
done

export PATH="$PATH:$EDGEHUB_CACHE/tools/bin"
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}
# All compiler steps name the same features, so that nothing is built twice: fault injection is on
# wherever tests run.
selection=(--workspace --features edgehub/faults)

check_shell() {
  if command -v shellcheck > /dev/null; then
    shellcheck .ci/run scripts/*.sh scripts/lib/*.sh
    return
  fi
  say "shellcheck is not on this machine: scripts were parsed, not linted"
  local file
  for file in .ci/run scripts/*.sh scripts/lib/*.sh; do bash -n "$file"; done
}

check_licences() { cargo deny --log-level error check bans licenses sources; }

check_advisories() {
  # The database is a git repository, which many build machines cannot reach.
  if ! timeout 60 cargo deny --log-level error fetch db > /dev/null 2>&1; then
    say "advisories were NOT checked: their database cannot be fetched here (cargo deny fetch db)"
    return
  fi
  cargo deny --log-level error check advisories
}

check_tls_stack() {
  local tree
  tree=$(cargo tree "${selection[@]}" --target all --edges normal,build,dev --prefix none --format '{p}')
  [ -n "$tree" ] || die "cargo tree says nothing"
  if grep -E '^(aws-lc-sys|aws-lc-rs|openssl-sys|native-tls) ' <<< "$tree" | sort -u; then
    die "these crates bring a second TLS stack; find out who asks with: cargo tree -i NAME"
  fi
}

# Fault injection must not get into a product: the compiler has to refuse it with our words. What
# makes a build one for release is here that our crates have no debug assertions (`tidy` looks that
# the release profile has none); so that everything else need not be built a second time.
check_no_faults_in_release() {
  local crate output without=()
  for crate in edgehub edgehub-broker edgehub-storage; do
    without+=(--config "profile.dev.package.$crate.debug-assertions=false")
  done
  if output=$(cargo check "${selection[@]}" --all-targets "${without[@]}" 2>&1); then
    die "a release build with the feature \`faults\` compiles"
  fi
  grep -q 'faults.*release' <<< "$output" || {
    printf '%s\n' "$output" >&2
    die "a release build with \`faults\` fails, but not with our text"
  }
}

documentation() {
  RUSTDOCFLAGS="-D warnings" cargo doc "${selection[@]}" --no-deps --document-private-items --quiet
  cargo test --quiet --doc "${selection[@]}"
}

tests() {
  local filter=()
  [ -z "$quick" ] || filter=(-E 'not (package(edgehub-tests) and not binary(tidy)) and not (package(edgehub-lab) and kind(test))
    and not (package(edgehub-amqp) and binary(interop))')
  # Seeded mutation of the fuzz corpora, all targets together.
  EDGEHUB_FUZZ_SECONDS=${EDGEHUB_FUZZ_SECONDS:-10} cargo nextest run "${selection[@]}" "${filter[@]}"
}

purposes=(build lint)
[ -n "$quick" ] || purposes+=(clients python proton node)
step "system packages" scripts/lib/system.sh "${purposes[@]}"
step "tools" scripts/lib/tools.sh
step "RocksDB" scripts/lib/rocksdb.sh
[ -n "$quick" ] || step "SDKs" scripts/lib/sdks.sh

step "format" cargo fmt --all --check
step "scripts" check_shell
step "licences, bans, sources" check_licences
step "advisories" check_advisories
step "unused dependencies" cargo machete
step "one TLS stack" check_tls_stack
step "clippy" cargo clippy "${selection[@]}" --all-targets --quiet -- -D warnings
step "no faults in release" check_no_faults_in_release
step "documentation" documentation
step "tests" tests
say "everything passed in $(elapsed)${quick:+ (quick: the end-to-end tests did not run)}"
