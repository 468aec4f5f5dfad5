#!/bin/sh
# Starts SeaweedFS as an S3 server that knows one pair of keys, and nobody without.
set -eu
access=$(cat /run/secrets/s3_access_key) secret=$(cat /run/secrets/s3_secret_key)
if [ -z "$access" ] || [ -z "$secret" ]; then
  echo "storage: no keys; make them with store-keys.sh" >&2
  exit 2
fi
umask 077
printf '{"identities": [{"name": "crashbus", "credentials": [{"accessKey": "%s", "secretKey": "%s"}],
  "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}' "$access" "$secret" >/tmp/s3.json
# All but S3 on loopback: those ports ask nobody for a key.
exec weed server -dir=/data -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.volumeSizeLimitMB=1024 -volume.max=0 -volume.preStopSeconds=1 \
  -s3 -s3.ip.bind=0.0.0.0 -s3.port=8333 -s3.config=/tmp/s3.json -s3.port.iceberg=0 -s3.port.lance=0
