#!/bin/sh
# plugins.sh DIRECTORY: puts docker compose and docker buildx there as plugins of the docker command.
#
# Debian 12 has neither; those of Debian 13 run there.
set -eu
. "$(dirname "$0")/../support/suite.sh"
directory=$(realpath -m "$1")
[ ! -x "$directory/docker-compose" ] || [ ! -x "$directory/docker-buildx" ] || exit 0
mkdir -p "$directory"
suite trixie
apt-get -qq download docker-compose docker-buildx
for package in *.deb; do dpkg-deb --extract "$package" "$work/root"; done
cp "$work"/root/usr/libexec/docker/cli-plugins/docker-* "$directory"
