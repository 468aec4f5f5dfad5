"""The keys that name each part of Crashbus to a secured bus.

``python -m crashbus.keys DIRECTORY [USER=UID…]`` makes them where there is no ``crashbus`` command.

An nkey is an Ed25519 key pair: its owner keeps the seed, the server knows the public key alone.
"""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from crashbus.errors import CrashbusError

USERS = ("detector", "recorder", "collector", "shipper", "consumer", "operator")
SEED = "nkey"  # in a directory for each user, so that each can be given its own alone
SERVER = "server"  # what nats-server reads: public keys, and how it does TLS

_HEADER = "# Made by crashbus keys: public keys, and where answers to their owners go.\n"
_NO_TLS = "# No TLS. deploy/nats/make-certificates.sh replaces this file.\n"


class KeysError(CrashbusError):
    """Keys cannot be made or read."""


def make_keys(directory: Path, owners: Mapping[str, int] | None = None) -> dict[str, str]:
    """Make a key for each user that has none yet, and what the server needs to know of all.

    Seeds are written as ``<directory>/<user>/nkey`` for the owner of ``<directory>/<user>``
    alone, who may be another than ours.

    Args:
        owners: users' directories, or `SERVER`, to UIDs that they are given to.

    Returns:
        user to public key.

    Raises:
        KeysError: a file cannot be read or written, or the package nkeys is not installed.
    """
    try:
        for name in (*USERS, SERVER):
            mode = 0o755 if name == SERVER else 0o700
            (directory / name).mkdir(mode=mode, parents=True, exist_ok=True)
            if owners and name in owners:
                os.chown(directory / name, owners[name], owners[name])
        public = {user: _key_of(directory / user) for user in USERS}
        server = directory / SERVER
        (server / "users.conf").write_text(_HEADER + "".join(map(_lines, public, public.values())))
        if not (server / "tls.conf").exists():
            (server / "tls.conf").write_text(_NO_TLS)
    except OSError as error:
        raise KeysError(f"cannot make keys in {directory}: {error}; name another") from error
    return public


def _lines(user: str, public_key: str) -> str:
    inbox = f'"_INBOX.{public_key}.>"'
    return f'{user.upper()}_KEY: "{public_key}"\n{user.upper()}_INBOX: {inbox}\n'


def _key_of(directory: Path) -> str:
    """Return the public key of the seed in a directory, made if there is none."""
    try:
        import nkeys
    except ImportError:
        raise KeysError("the package nkeys is not installed: pip install nkeys") from None
    path = directory / SEED
    if not path.exists():
        _write_private(path, nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER) + b"\n")
    try:
        pair = nkeys.from_seed(bytearray(path.read_bytes().strip()))
        return str(pair.public_key.decode())
    except Exception as error:
        raise KeysError(f"{path} is no seed of an nkey; remove it to have another made") from error


def _write_private(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, for the owner of its directory."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            owner = path.parent.stat()
            if owner.st_uid != os.geteuid():
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            file.flush()
            os.fsync(descriptor)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def main(arguments: list[str] | None = None) -> int:
    """Make keys and say what was made."""
    given = sys.argv[1:] if arguments is None else arguments
    owners = dict(re.findall(r"^(\w+)=(\d+)$", "\n".join(given[1:]), re.MULTILINE))
    if not given or given[0].startswith("-") or len(owners) != len(given) - 1:
        sys.stderr.write("usage: python -m crashbus.keys DIRECTORY [USER=UID…]\n")
        return 2
    try:
        public = make_keys(Path(given[0]), {user: int(uid) for user, uid in owners.items()})
    except KeysError as error:
        sys.stderr.write(f"crashbus keys: {error}\n")
        return 1
    for user, key in public.items():
        sys.stdout.write(f"{user:10} {key}  {Path(given[0]) / user / SEED}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
