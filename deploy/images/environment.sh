#!/bin/sh
# environment.sh EXTRA[,EXTRA…] [OPTION OF VENV…]: makes /opt/crashbus with what these extras name,
# from /wheels alone, and as small as it can be.
set -eu
extras=$1 images=$(dirname "$0")
shift

# No pip in it: nothing is installed there later.
python3 -m venv --without-pip "$@" /opt/crashbus
pip --python /opt/crashbus/bin/python install --quiet --root-user-action ignore \
  --no-index --find-links /wheels "crashbus[$extras]"
packages=$(echo /opt/crashbus/lib/python3*/site-packages)

needed() { readelf -d "$@" 2>/dev/null | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | sort -u; }

# Puts no_debuginfod.c in its place, and removes the libraries that only the real one needs.
without_debuginfod() {
  client=$(cd "$packages/drgn.libs" && echo libdebuginfod-*.so*)
  gcc -shared -O2 -Wall -Wextra -Werror -Wl,-soname,"$client" \
    -Wl,--version-script,"$images/no_debuginfod.map" \
    -o "$packages/drgn.libs/$client" "$images/no_debuginfod.c"
  cd "$packages/drgn.libs"
  found='' new=$(needed "$packages"/_drgn*.so)
  while [ -n "$new" ]; do
    found=$(printf '%s\n%s\n' "$found" "$new" | sort -u)
    # shellcheck disable=SC2046,SC2086 # a name a word
    new=$(needed $(ls -d $new 2>/dev/null) | grep -vxF "$found" || true)
  done
  for library in *; do
    printf '%s\n' "$found" | grep -qxF "$library" || rm "$library"
  done
}
[ ! -d "$packages/drgn.libs" ] || without_debuginfod

find "$packages" -name '*.so*' -type f -exec strip --strip-unneeded {} +
