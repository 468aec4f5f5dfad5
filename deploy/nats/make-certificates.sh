#!/bin/sh
# Makes a CA of your own and a server certificate, for development and for small sites, and
# switches TLS on for nats.conf. For production take certificates that are renewed.
#
#   make-certificates.sh DIRECTORY [NAME…]
#
# DIRECTORY  where crashbus keys put its keys; there is a directory `server` in it
# NAME       by which clients call the server: host names or addresses; localhost always is one
#
# Environment: SEEN_AT, the path of DIRECTORY as nats-server will see it, if that is another, as in
# a container: once is enough, server/tls.conf keeps it; DAYS the certificate lasts (365), CA_DAYS a new CA does (3650); NEW_CA=yes makes another
# CA and nothing else: ca.pem then holds both, and is to be handed out before the next certificate is made.
#
# Clients take DIRECTORY/ca.pem (CRASHBUS_NATS_CA_FILE). A CA that is there signs all further
# certificates: keep ca.key, best not on a host that others use.
set -eu
umask 077
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
directory=$1 days=${DAYS:-365} ca_days=${CA_DAYS:-3650} new_ca=${NEW_CA:-}
shift
[ -d "$directory/server" ] || { echo "make-certificates: no $directory/server; run crashbus keys $directory first" >&2; exit 1; }

names=DNS:localhost,IP:127.0.0.1,IP:::1
for name; do
  case $name in
    *:*) names=$names,IP:$name ;;
    *[!0-9.]*) names=$names,DNS:$name ;;
    *) names=$names,IP:$name ;;
  esac
done

cd "$directory"
fail() { echo "make-certificates: $1" >&2; exit 1; }
# openssl tells of its progress where it tells of errors.
quietly() { said=$("$@" 2>&1) || fail "$said"; }

# A run that was broken off between the two moves below: the key is the new one already.
if [ -e ca.pem.new ] && [ ! -e ca.key.new ]; then mv ca.pem.new ca.pem; fi
if [ ! -e ca.pem ] || [ -n "$new_ca" ]; then
  # A name of its own: clients find a certificate's CA by that, and may trust two for a while.
  quietly openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -sha256 -days "$ca_days" \
    -subj "/CN=Crashbus CA $(openssl rand -hex 4)" -addext keyUsage=critical,keyCertSign,cRLSign \
    -keyout ca.key.new -out ca.pem.new
  # The new one first: it is the one that signs.
  if [ -e ca.pem ]; then cat ca.pem >>ca.pem.new; fi
  chmod 644 ca.pem.new
  mv ca.key.new ca.key
  mv ca.pem.new ca.pem
fi
if [ -n "$new_ca" ]; then
  echo "$directory/ca.pem has a new CA beside what was there: hand it out and start those anew who take it;"
  echo "after that make-certificates.sh without NEW_CA"
  exit
fi
[ -e ca.key ] || fail "$directory/ca.pem is there, its ca.key is not: put it back, or make another CA with NEW_CA=yes"
openssl x509 -in ca.pem -noout -checkend $((days * 86400)) >/dev/null ||
  fail "the CA ends within the certificate's $days days, and all clients would refuse it: make another CA with NEW_CA=yes, or set DAYS"
quietly openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj '/CN=crashbus-nats' \
  -keyout server/tls.key.new -out server/request.pem
extensions=$(mktemp)
trap 'rm -f "$extensions"' EXIT
printf 'subjectAltName=%s\nbasicConstraints=critical,CA:false\nextendedKeyUsage=serverAuth\n' "$names" >"$extensions"
quietly openssl x509 -req -sha256 -days "$days" -in server/request.pem -CA ca.pem -CAkey ca.key \
  -CAcreateserial -extfile "$extensions" -out server/tls.pem
mv server/tls.key.new server/tls.key
rm -f server/request.pem
if [ -n "${SEEN_AT:-}" ] || ! grep -qs cert_file: server/tls.conf; then
  cat >server/tls.conf <<END
tls {
  cert_file: "${SEEN_AT:-$PWD}/server/tls.pem"
  key_file: "${SEEN_AT:-$PWD}/server/tls.key"
  timeout: 5
}
END
else
  echo "$directory/server/tls.conf stays as it is; SEEN_AT would change the paths in it"
fi
# The server may run as another user than whoever made the keys: what it reads belongs to the
# owner of its directory.
if [ "$(id -u)" = 0 ]; then chown "$(stat -c %u:%g server)" server/*; fi
chmod 644 server/tls.pem server/tls.conf
echo "TLS is on at the next start of nats-server, for $names"
echo "clients: CRASHBUS_NATS_URL=tls://…:4222 CRASHBUS_NATS_CA_FILE=$directory/ca.pem"
