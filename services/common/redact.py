"""Secrets are taken out of environment variables and arguments before anything is written."""

import re

REDACTED = "<redacted>"

# What this host's settings add: names of secrets, and forms that they have.
_more_names: re.Pattern[str] | None = None
_more_forms: re.Pattern[str] | None = None


def also(names: str, forms: str) -> None:
    """Take out further secrets, from now on and in the whole process.

    Args:
        names: regular expression that is searched in names of variables, options and keys,
            whatever their case; empty: no further ones.
        forms: regular expression of values that are secrets wherever they stand; likewise.

    Raises:
        re.error: one is no regular expression.
    """
    global _more_names, _more_forms
    _more_names = re.compile(names, re.IGNORECASE) if names else None
    _more_forms = re.compile(forms) if forms else None


_NAMES = (
    r"KEY|SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|(?:^|_)PASS(?:_|$)|_PWD|CREDENTIAL|AUTH"
    r"|COOKIE|SESSION|PRIVATE|SIGNATURE"
)
_SECRET_NAME = re.compile(_NAMES, re.IGNORECASE)
# --password=x, -Dpassword=x, PASSWORD=x, Authorization: x
_NAMED_VALUE = re.compile(r"(-{0,2}[\w.-]{1,256}?)([=:])(.*)", re.DOTALL)
_OPTION = re.compile(r"--?[\w.-]{1,256}")
# password=x in the middle of a connection string, of a URL's query, of a shell command
_INNER_VALUE = re.compile(r"(?<![\w.-])([\w.-]{1,64})=([^\s&;,\"']+)")
_JSON_VALUE = re.compile(r'''"([\w.-]{1,64})"(\s{0,4}:\s{0,4})"(?:[^"\\]|\\.)*"''', re.DOTALL)
# What its issuer made so that it can be recognised anywhere. Each begins where none of its own
# characters stands before it, so that long hostile text is gone over once.
_TOKEN = re.compile(
    r"(?<![\w-])(?:"
    r"(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS access key ID
    r"|gh[oprsu]_[0-9A-Za-z]{20,255}|github_pat_\w{20,255}|glpat-[\w-]{20,255}"  # forges
    r"|xox[a-z]-[\w-]{10,255}"  # Slack
    r"|[rs]k_(?:live|test)_[0-9A-Za-z]{16,255}|sk-[\w-]{20,255}"  # Stripe, OpenAI, Anthropic
    r"|AIza[\w-]{35}|npm_[0-9A-Za-z]{36}|hvs\.[\w-]{24,255}"  # Google, npm, Vault
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JSON Web Token, RFC 7519
    r"|S[UAOCNX][A-Z2-7]{56}(?!\w)"  # NATS seed
    r")"
)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*", re.DOTALL)  # RFC 7468
_BEARER = re.compile(r"(?<!\w)(bearer\s{1,4})[^\s\"',]+", re.IGNORECASE)  # RFC 6750
_URL_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,31}://)[^/?#\s@]{1,4096}@")


def is_secret(name: str) -> bool:
    """Tell whether the value of something with this name is nobody's business."""
    plain = name.replace("-", "_").replace(".", "_")
    if _SECRET_NAME.search(plain):
        return True
    return _more_names is not None and _more_names.search(plain.strip("_")) is not None


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
    return f"{name}{sign}{text(value)}"


def _argument(argument: str) -> str:
    match = _NAMED_VALUE.match(argument)
    if match and match[3] and not match[3].startswith("//") and is_secret(match[1]):
        return f"{match[1]}{match[2]}{REDACTED}"
    return text(argument)


def text(value: str) -> str:
    """Return text without what has the form of a secret, wherever it stands in it."""
    if _more_forms is not None:
        value = _more_forms.sub(REDACTED, value)
    value = _PRIVATE_KEY.sub(REDACTED, value)
    value = _URL_USER.sub(rf"\g<1>{REDACTED}@", value)
    value = _TOKEN.sub(REDACTED, value)
    value = _BEARER.sub(rf"\g<1>{REDACTED}", value)
    value = _INNER_VALUE.sub(_inner, value)
    return _JSON_VALUE.sub(_json, value)


def _inner(match: re.Match[str]) -> str:
    return f"{match[1]}={REDACTED}" if is_secret(match[1]) else match[0]


def _json(match: re.Match[str]) -> str:
    return f'"{match[1]}"{match[2]}"{REDACTED}"' if is_secret(match[1]) else match[0]
