#!/bin/sh
# plugins.sh DIRECTORY: puts docker compose and docker buildx there as plugins of the docker command.
#
# Debian 12 has neither; those of Debian 13 run there. Its packages are fetched with a list of
# their own, so that nothing else of that suite is ever installed.
set -eu
directory=$1
[ ! -x "$directory/docker-compose" ] || [ ! -x "$directory/docker-buildx" ] || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/packages" "$directory"
chmod 755 "$work"
# The mirror that this host uses.
mirror=$(apt-get indextargets --format '$(CODENAME) $(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' |
  sed -n 's/^[a-z]* \(.*\/debian\/\)$/\1/p' | head -n 1)
cat >"$work/sources.sources" <<END
Types: deb
URIs: ${mirror:?no Debian mirror is configured}
Suites: trixie
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
END
apt() {
  apt-get -qq -o Dir::Etc::SourceList="$work/sources.sources" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" -o Acquire::Languages=none \
    -o APT::Sandbox::User=root "$@"
}
apt update
cd "$work/packages"
apt download docker-compose docker-buildx
for package in *.deb; do dpkg-deb --extract "$package" "$work/root"; done
cp "$work"/root/usr/libexec/docker/cli-plugins/docker-* "$directory"
