"""Secrets are taken out of environment variables and arguments before anything is written."""

import re
from collections.abc import Collection, Iterator, Sequence

from services.common import named_values

REDACTED = "<redacted>"

# What this host's settings add: names of secrets, and forms that they have.
_more_names: re.Pattern[str] | None = None
_more_forms: re.Pattern[str] | None = None
# Such expressions are ordinary ones, whose cost grows with the square of the text. So they are
# tried on pieces of it, which overlap by half.
PIECE = 512  # characters
LONGEST = 8192  # to which a match that does not end with its piece may go on


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


_TOKENS = r"(?<!MAX_)TOKEN(?!IZ)"
_NAMES = (
    rf"(?<!SORT_)KEY(?!BOARD)|SECRET|{_TOKENS}|PASSWORD|PASSWD|PASSPHRASE|PASSCODE"
    r"|(?<!BY)(?<!COM)(?<!SUR)(?<!TRES)PASS(?:_|\d|$)|_PWD|(?:^|_)PW$|CREDENTIAL"
    r"|AUTH(?!OR(?!I)|_SOCK$)|COOKIE|(?<!XDG_)SESSION|PRIVATE|SIGNATURE"
    r"|(?:^|_)SIG$|(?:^|_)PSK(?:_|$)|JWT|_SALT"
)
_SECRET_NAME = re.compile(_NAMES, re.IGNORECASE)
# --password=x, -Dpassword=x, PASSWORD=x, Authorization: x
_NAMED_VALUE = re.compile(r"(-{0,2}[\w.-]{1,256}?)([=:])(.*)", re.DOTALL)
_OPTION = re.compile(r"--?[\w.-]{1,256}")
# What comes behind an option and is another one, not its value.
_NEXT_OPTION = re.compile(r"-[A-Za-z]|--(?:[A-Za-z][\w.-]*(?:=.*)?)?", re.DOTALL)
# Names that are hardly anything else: auth:8080 is a host, key:value an example.
_SURE_NAME = re.compile(
    rf"PASSWORD|PASSWD|PASSPHRASE|PASSCODE|(?:^|_)PASS$|SECRET|{_TOKENS}|CREDENTIAL"
    r"|(?:API|ACCESS|PRIVATE)_?KEY|AUTHORIZATION|COOKIE",
    re.IGNORECASE,
)
# PWD is a directory, but not in "Server=db;Uid=me;Pwd=x".
_CONNECTION_VALUE = re.compile(
    r"(;\s{0,4}pwd=)[^;\"']+|(?<![\w.-])(pwd=)[^;\"'\s]{1,256}+(?=;)", re.IGNORECASE
)
# "user:x@tcp(db:3306)/name", as Go's driver for MySQL has it.
_GO_DSN = re.compile(
    r"(?<![^\s\"'=])([^\s\"'=:@]{1,64}+:)[^\s\"'@]{1,128}+(?:@[^\s\"'@(]{1,128}+)?"
    r"@(?=(?:tcp|udp|unix)\d?\()"
)
# What its issuer made so that it can be recognised anywhere. So that long hostile text is gone over
# once, those that may be found to be none only at their end begin where none of their own
# characters stands before them; also one that is a part of ordinary names.
_TOKEN = re.compile(
    r"(?<![\w-])(?:"
    r"sk-(?=[A-Za-z_-]*+\d)[\w-]{20,}"  # OpenAI, Anthropic
    r"|SG\.[\w-]{16,}\.[\w-]{16,}|key-[0-9a-f]{32}"  # SendGrid, Mailgun
    r"|eyJ[\w-]{8,}(?:\.[\w-]*){2,4}"  # JSON Web Token and Encryption, RFC 7519 and 7516
    r")|(?<![0-9A-Za-z])(?:"
    r"(?:AKIA|ASIA)[0-9A-Z]{16}|ABSK[0-9A-Za-z+/]{40,}"  # AWS
    r"|gh[oprsu]_[0-9A-Za-z]{20,}|github_pat_\w{20,}"  # GitHub
    r"|gl(?:pat|rt|dt|cbt|ptt|oas|ft|soat|imt|agent)-[\w-]{16,}"  # GitLab
    r"|ATATT3[\w=-]{40,}|ATBB[0-9A-Za-z]{32}"  # Atlassian, Bitbucket
    r"|xox[a-z](?:\.xox[a-z])?-[\w-]{10,}|xapp-[\w-]{20,}|hooks\.slack\.com/services/[\w/]{10,}"
    r"|discord(?:app)?\.com/api/webhooks/\d{1,20}/[\w-]{10,}|\d{8,10}:AA[\w-]{33}"  # Telegram
    r"|[rs]k_(?:live|test)_[0-9A-Za-z]{16,}|whsec_[\w+/=]{20,}"  # Stripe
    r"|hf_[0-9A-Za-z]{30,}|r8_[0-9A-Za-z]{30,}|gsk_[0-9A-Za-z]{40,}"  # Hugging Face, …, Groq
    r"|AIza[\w-]{35}|GOCSPX-[\w-]{20,}|ya29\.[\w-]{20,}|1//0[\w-]{20,}"  # Google
    r"|npm_[0-9A-Za-z]{36,}|pypi-AgE[\w-]{40,}|rubygems_[0-9a-f]{48}|cio[0-9A-Za-z]{32}"
    r"|dckr_[a-z]{3}_[\w-]{20,}"  # Docker Hub
    r"|hv[sbr]\.[\w-]{24,}|[0-9A-Za-z]{14}\.atlasv1\.[\w-]{40,}"  # Vault, Terraform
    r"|do[opr]_v1_[0-9a-f]{64}|gl(?:sa|c)_[\w+/=]{32,}|dapi[0-9a-f]{32}"  # …, Grafana, Databricks
    r"|sntry[su]_[\w+/=]{40,}|sbp_[0-9a-f]{40}|nfp_[0-9A-Za-z]{36}"  # Sentry, Supabase, Netlify
    r"|tskey-[a-z]{2,16}-[\w-]{16,}|figd_[\w-]{30,}|ntn_[0-9A-Za-z]{40,}"  # Tailscale, …, Notion
    r"|shp[a-z]{2}_[0-9a-fA-F]{32}|sq0[a-z]{3}-[\w-]{20,}"  # Shopify, Square
    r"|lin_[a-z]{3,5}_\w{32,}|NRAK-[0-9A-Z]{27}"  # Linear, New Relic
    r"|AGE-SECRET-KEY-1[0-9A-Z]{58}|S[UAOCNX][A-Z2-7]{56}(?!\w)"  # age; NATS seed
    r")"
)
_PRIVATE_KEY = re.compile(  # RFC 7468, RFC 4880
    r"(?:-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----|PuTTY-User-Key-File-\d).*", re.DOTALL
)
_BEARER = re.compile(r"(?<!\w)(bearer\s{1,4})[^\s\"',]+", re.IGNORECASE)  # RFC 6750
# What can only be hosts and ports, RFC 3986, 3.2, also several of them as databases have it: behind
# these comes a path, which may hold an @. What is none of that is a user and password, however
# many / ? # it holds that should have been escaped. (Of u:12/x@h nobody can tell; it is a path.)
_HOST = r"(?:\[[^\]/?#@\s]{1,64}\]|[^:/?#@\s\[\],]{1,255})(?::\d{0,5})?"
_URL_USER = re.compile(
    rf"(?<=[A-Za-z0-9+.-])(://)(?!(?:{_HOST}(?:,{_HOST})*)?(?:[/?#\s]|$))"
    r"[^\s@]++@(?:[^/?#\s@]*+@)*"
)
# Where it is looked for: a word as far as an @ comes, so that none is looked for in vain.
_BEFORE_AT = re.compile(r"(?<!\S)[^\s@]*+@(?:[^\s@]*+@)*")
# A token that was cut has nothing by which it is known for one.
_CUT_WORD = re.compile(r"(?<![\w-])[\w-]{12,}\Z")


def is_secret(name: str) -> bool:
    """Tell whether the value of something with this name is nobody's business."""
    plain = _plain(name)
    return _SECRET_NAME.search(plain) is not None or _is_of_this_host(plain)


def _is_inner_secret(name: str, how: named_values.How) -> bool:
    if how is named_values.How.QUOTED and name in ("pwd", "Pwd"):  # PWD is a directory
        return True
    if how is not named_values.How.VAGUE:
        return is_secret(name)
    plain = _plain(name)
    return _SURE_NAME.search(plain) is not None or _is_of_this_host(plain)


def _plain(name: str) -> str:
    return name.replace("-", "_").replace(".", "_")


def _is_of_this_host(plain: str) -> bool:
    return _more_names is not None and any(_matches(_more_names, plain.strip("_")))


def _matches(expression: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """Give what an expression of this host's matches; what overlaps may come twice."""
    done = 0
    for begin in range(0, max(1, len(text) - PIECE // 2), PIECE // 2):
        end = begin + PIECE
        if end <= done:
            continue
        for found in expression.finditer(text, begin, end):
            if found.end() == end:
                longer = expression.match(text, found.start(), found.start() + LONGEST)
                found = longer or found
            done = found.end()
            yield found


def environment(entries: tuple[str, ...]) -> tuple[str, ...]:
    """Return ``NAME=value`` entries without the values of secrets."""
    return tuple(_entry(entry) for entry in entries)


def arguments(given: Sequence[str], cut: Collection[int] = ()) -> Iterator[str]:
    """Give arguments without secrets: ``--password=x``, ``--password x``, ``http://u:p@h``.

    Args:
        cut: the numbers, from 0, of those that had more, see `text`.
    """
    follows = False
    for number, argument in enumerate(given):
        value_of_option = follows and not _NEXT_OPTION.fullmatch(argument)
        yield REDACTED if value_of_option else _argument(argument, number in cut)
        follows = _OPTION.fullmatch(argument) is not None and is_secret(argument)


def _entry(entry: str) -> str:
    name, sign, value = entry.partition("=")
    if sign and value and is_secret(name):
        return f"{name}={REDACTED}"
    return f"{name}{sign}{text(value)}"


def _argument(argument: str, is_cut: bool) -> str:
    match = _NAMED_VALUE.match(argument)
    if match and match[3] and not match[3].startswith("//") and is_secret(match[1]):
        return f"{match[1]}{match[2]}{REDACTED}"
    return text(argument, is_cut)


def text(value: str, is_cut: bool = False) -> str:
    """Return text without what has the form of a secret, wherever it stands in it.

    Args:
        is_cut: it had more. What may be the beginning of a secret is one: a URL's user without
            the @ that makes it one, and a word without its end.
    """
    if _more_forms is not None:
        value = _without_forms(_more_forms, value)
    value = _PRIVATE_KEY.sub(REDACTED, value)
    value = _without_users(value + "@")[:-1] if is_cut else _without_users(value)
    value = _GO_DSN.sub(rf"\g<1>{REDACTED}@", value)
    value = _TOKEN.sub(REDACTED, value)
    value = _BEARER.sub(rf"\g<1>{REDACTED}", value)
    value = _CONNECTION_VALUE.sub(rf"\g<1>\g<2>{REDACTED}", value)
    value = _without_named(value)
    return _CUT_WORD.sub(REDACTED, value) if is_cut else value


def _without_forms(forms: re.Pattern[str], value: str) -> str:
    shown: list[str] = []
    at = 0
    for start, stop in sorted(found.span() for found in _matches(forms, value) if found[0]):
        if start >= at:
            shown += (value[at:start], REDACTED)
        at = max(at, stop)
    return "".join((*shown, value[at:]))


def _without_users(value: str) -> str:
    return _BEFORE_AT.sub(lambda word: _URL_USER.sub(rf"\g<1>{REDACTED}@", word[0]), value)


def _without_named(value: str) -> str:
    shown: list[str] = []
    at = 0
    for found in named_values.found(value, _is_inner_secret):
        shown += (value[at : found.start], REDACTED)
        at = found.stop
    return "".join((*shown, value[at:]))


def whole_urls(value: str) -> str:
    """Return text without anything that stands before an @ in a URL, be it a path.

    For what may be no URL at all: a password can hold what ends one, such as / or #.
    """
    return re.sub(r"\S+", _whole_url, value)


def _whole_url(word: re.Match[str]) -> str:
    before, slashes, rest = word[0].partition("//")
    _, sign, after = rest.rpartition("@")
    return f"{before}{slashes}{REDACTED}@{after}" if sign else word[0]
