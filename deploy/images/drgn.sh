#!/bin/sh
# drgn.sh: makes drgn's wheel for arm64 in /wheels, with Debian's libdw, on a machine of any kind; leaves
# in requirements-services.lock what is still to be had.
set -eu
compiler=aarch64-linux-gnu

dpkg --add-architecture arm64
apt-get update -qq
apt-get install -y -qq --no-install-recommends gcc-$compiler make pkgconf:arm64 python3-pip \
  libc6-dev:arm64 libdw-dev:arm64 libpython3-dev:arm64

one='/^drgn==/,/[^\]$/'
sed -n "$one p" requirements-services.lock >drgn.lock
sed -i "$one d" requirements-services.lock
# Python says of its platform what arm64's would, and names extensions so.
export _PYTHON_HOST_PLATFORM=linux-aarch64 _PYTHON_SYSCONFIGDATA_NAME=_sysconfigdata__$compiler
CONFIGURE_FLAGS=--host=$compiler pip wheel --quiet --no-cache-dir --no-deps --require-hashes \
  --wheel-dir /wheels -r drgn.lock
