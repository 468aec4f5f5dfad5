"""Secrets are taken out of environment variables and arguments before anything is written."""

import re

REDACTED = "<redacted>"

_NAMES = (
    r"KEY|SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|(?:^|_)PASS(?:_|$)|_PWD|CREDENTIAL|AUTH"
    r"|COOKIE|SESSION|PRIVATE|SIGNATURE"
)
_SECRET_NAME = re.compile(_NAMES, re.IGNORECASE)
# --password=x, -Dpassword=x, PASSWORD=x, Authorization: x
_NAMED_VALUE = re.compile(r"(-{0,2}[\w.-]{1,256}?)([=:])(.*)", re.DOTALL)
_OPTION = re.compile(r"--?[\w.-]{1,256}")
_URL_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31}://)[^/?#\s@]{1,4096}@")


def is_secret(name: str) -> bool:
    """Tell whether the value of something with this name is nobody's business."""
    return _SECRET_NAME.search(name.replace("-", "_").replace(".", "_")) is not None


def environment(entries: tuple[str, ...]) -> tuple[str, ...]:
    """Return ``NAME=value`` entries without the values of secrets."""
    return tuple(_entry(entry) for entry in entries)


def arguments(given: tuple[str, ...]) -> tuple[str, ...]:
    """Return arguments without secrets: ``--password=x``, ``--password x``, ``http://u:p@h``."""
    shown = []
    follows = False
    for argument in given:
        value_of_option = follows and not argument.startswith("-")
        shown.append(REDACTED if value_of_option else _argument(argument))
        follows = _OPTION.fullmatch(argument) is not None and is_secret(argument)
    return tuple(shown)


def _entry(entry: str) -> str:
    name, sign, value = entry.partition("=")
    if sign and value and is_secret(name):
        return f"{name}={REDACTED}"
    return f"{name}{sign}{_without_users(value)}"


def _argument(argument: str) -> str:
    match = _NAMED_VALUE.match(argument)
    if match and match[3] and not match[3].startswith("//") and is_secret(match[1]):
        return f"{match[1]}{match[2]}{REDACTED}"
    return _without_users(argument)


def _without_users(value: str) -> str:
    return _URL_USER.sub(rf"\g<1>{REDACTED}@", value)
