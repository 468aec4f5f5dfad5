#!/bin/sh
# Makes the keys of an S3 store of your own, and a .env that starts it (the profile "storage") and sends
# crashes there, if there is none yet. Run it as root.
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
umask 022  # whoever may call docker compose reads this one
wanted="COMPOSE_PROFILES=storage
CRASHBUS_DESTINATIONS=s3://crashes/$(uname -n)
CRASHBUS_S3_ACCESS_KEY_FILE=./secrets/s3_access_key
CRASHBUS_S3_SECRET_KEY_FILE=./secrets/s3_secret_key"
[ -e .env ] || echo "$wanted" >.env
echo "keys are in $(pwd)/secrets"
grep -q '^COMPOSE_PROFILES=.*storage' .env ||
  printf 'there is a .env already, which does not start the store; it takes, with a directory of your own:\n\n%s\n\n' "$wanted"
echo "next: docker compose up -d --build --wait"
