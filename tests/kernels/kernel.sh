#!/bin/sh
# kernel.sh RELEASE DIRECTORY: unpacks there the kernel of a Debian release, as built for clouds:
# small, with the drivers of virtual machines.
set -eu
. "$(dirname "$0")/../support/suite.sh"
directory=$(realpath -m "$2")
[ ! -d "$directory" ] || exit 0
mkdir -p "$(dirname "$directory")"
suite "$1"
# The package of that name holds nothing but the name of the newest.
apt-get -qq download "$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: //p')"
rm -rf "$directory.new"
dpkg-deb --extract ./*.deb "$directory.new"
mv "$directory.new" "$directory"
