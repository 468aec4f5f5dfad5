# shellcheck shell=sh
# To be sourced: packages of another Debian release, to be unpacked and never installed.
#
# suite NAME goes to $work/packages, removed at the end; apt knows that release alone from then on,
# by a list of sources of its own, so that nothing else of it is ever installed.
suite() {
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/packages"
  chmod 755 "$work"
  # The mirror that this host uses.
  mirror=$(apt-get indextargets --format '$(CODENAME) $(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' |
    sed -n 's/^[a-z]* \(.*\/debian\/\)$/\1/p' | head -n 1)
  cat >"$work/sources.sources" <<SOURCES
Types: deb
URIs: ${mirror:?no Debian mirror is configured}
Suites: $1
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
  cat >"$work/apt.conf" <<CONFIG
Dir::Etc::SourceList "$work/sources.sources";
Dir::Etc::SourceParts "/dev/null";
Dir::State::Lists "$work/lists";
Dir::Cache "$work/cache";
Acquire::Languages "none";
Acquire::Retries "3";
APT::Sandbox::User "root";
CONFIG
  export APT_CONFIG="$work/apt.conf"
  apt-get -qq update
  cd "$work/packages"
}
