#!/bin/sh
# Makes the keys of an S3 store of your own (docker compose --profile storage), and a .env that
# sends crashes there, if there is none yet. Run it as root.
set -eu
umask 077
cd "$(dirname "$0")"
mkdir -p secrets
for name in s3_access_key s3_secret_key; do
  [ -e secrets/$name ] || od -An -N20 -tx1 /dev/urandom | tr -d ' \n' >secrets/$name
  # Shipper and storage run as this user.
  chown 10001:10001 secrets/$name
  chmod 400 secrets/$name
done
chmod 711 secrets
[ -e .env ] || cat >.env <<END
CRASHBUS_DESTINATIONS=s3://crashes/$(uname -n)
CRASHBUS_S3_ACCESS_KEY_FILE=./secrets/s3_access_key
CRASHBUS_S3_SECRET_KEY_FILE=./secrets/s3_secret_key
END
echo "keys are in $(pwd)/secrets; next: docker compose --profile storage up -d --build"
