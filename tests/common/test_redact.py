"""Secrets are recognised by name and by form."""

import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common import redact
from services.common.redact import REDACTED, arguments, environment, is_secret, text


@pytest.mark.parametrize(
    "name",
    [
        *("API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DB_PASSWORD", "PGPASSWORD"),
        *("MYSQL_PWD", "SMTP_PASS", "SSH_AUTH_SOCK", "COOKIE", "session_id", "PRIVATE"),
        *("--api-key", "spring.datasource.password", "Authorization"),
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["PATH", "HOME", "PWD", "OLDPWD", "LANG", "BYPASS", "--verbose"])
def test_names_of_no_secrets(name: str) -> None:
    assert not is_secret(name)


def test_environment() -> None:
    given_ = ("A=1", "DB_PASSWORD=x=y", "EMPTY_TOKEN=", "NOTHING", "URL=amqp://u:p@mq/v@x")

    assert environment(given_) == (
        "A=1",
        f"DB_PASSWORD={REDACTED}",
        "EMPTY_TOKEN=",
        "NOTHING",
        f"URL=amqp://{REDACTED}@mq/v@x",
    )


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (("--password=x",), (f"--password={REDACTED}",)),
        (("--password", "x", "y"), ("--password", REDACTED, "y")),
        (("--auth", "--verbose"), ("--auth", "--verbose")),
        (("-Dx.trustStorePassword=x",), (f"-Dx.trustStorePassword={REDACTED}",)),
        (("PASSWORD=x", "make"), (f"PASSWORD={REDACTED}", "make")),
        (("-H", "Authorization: Bearer x"), ("-H", f"Authorization:{REDACTED}")),
        (("https://u:p@host/a?b=c",), (f"https://{REDACTED}@host/a?b=c",)),
        (("--url=https://u:p@host",), (f"--url=https://{REDACTED}@host",)),
        (("key://host/path",), ("key://host/path",)),
        (("--token",), ("--token",)),
        ((), ()),
    ],
)  # fmt: skip
def test_arguments(raw: tuple[str, ...], shown: tuple[str, ...]) -> None:
    assert arguments(raw) == shown


# Made up, in the forms that their issuers document.
TOKENS = [
    "AKIA" + "Q3EGRIUXBZLEXAMP",
    "ghp_" + "16C7e42F292c6912E7710c838347Ae178B4a",
    "github_pat_" + "11ABCDEFG0123456789_abcdefgh",
    "glpat-" + "abcdefghij0123456789",
    "xoxb-" + "123456789012-abcdefghijkl",
    "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc",
    "sk-" + "proj-abcdefghijklmnopqrstuvwx",
    "AIza" + "SyA1234567890abcdefghijklmnopqrstuv",
    "hvs." + "CAESIJabcdefghijklmnopqrstuv",
    "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    "SUAC" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567ABCDEFGHIJKLMNOPQRSTUV",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----",
]
_WORDS = st.lists(st.text("abc /:,;'\"", min_size=1, max_size=8), max_size=3)


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("around", ["{}", "a {} b", "url?x={}&y=1", '{{"x": "{}"}}', "/a/{}/b"])
def test_well_known_token_is_found_wherever_it_stands(token: str, around: str) -> None:
    value = around.format(token)

    assert token not in environment((f"HARMLESS={value}",))[0]
    assert token not in arguments((value,))[0]
    assert REDACTED in text(value)


@settings(deadline=None)
@given(st.sampled_from(TOKENS), _WORDS, _WORDS)
def test_planted_token_never_comes_through(token: str, before: list[str], after: list[str]) -> None:
    planted = " ".join([*before, token, *after])

    assert token not in " ".join(environment((f"X={planted}",)) + arguments(("x", planted)))


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("host=db password=x user=me", f"host=db password={REDACTED} user=me"),
        ("Server=db;Pwd=1;Auth_Key=x;A=b", f"Server=db;Pwd=1;Auth_Key={REDACTED};A=b"),
        ("http://h/p?q=1&access_token=x&b=2", f"http://h/p?q=1&access_token={REDACTED}&b=2"),
        ('{"user": "a", "password" : "x\\"y"}', f'{{"user": "a", "password" : "{REDACTED}"}}'),
        ("curl -H 'X: bearer abc' h", f"curl -H 'X: bearer {REDACTED}' h"),
        ("a task-runner, risk-based", "a task-runner, risk-based"),
    ],
)
def test_secrets_in_the_middle_of_text(raw: str, shown: str) -> None:
    assert text(raw) == shown


@pytest.mark.parametrize(
    "part", ["eyJaaaaaaaa-", "-eyJ", "eyJaaaaaaaa.", 'a"b":"', "sk-", "a=", "://"]
)
def test_hostile_text_takes_no_long_time(part: str) -> None:
    began = time.process_time()

    text(part * (256 * 1024 // len(part)))

    assert time.process_time() - began < 10  # what grows with the square takes minutes


@pytest.fixture
def more() -> Iterator[None]:
    redact.also("^ssn$|kundennr", r"EMP-\d{6}")
    yield
    redact.also("", "")


@pytest.mark.usefixtures("more")
def test_rules_of_this_host_come_on_top() -> None:
    given = ("SSN=1", "KundenNr_2=7", "SSNX=1", "NOTE=of EMP-123456, EMP-12", "DB_PASSWORD=x")

    assert environment(given) == (
        *(f"SSN={REDACTED}", f"KundenNr_2={REDACTED}", "SSNX=1"),
        *(f"NOTE=of {REDACTED}, EMP-12", f"DB_PASSWORD={REDACTED}"),
    )
    assert arguments(("--ssn", "1", "--kundennr=2")) == (
        "--ssn",
        REDACTED,
        f"--kundennr={REDACTED}",
    )


@settings(deadline=None)
@given(st.lists(st.text(max_size=50), max_size=8).map(tuple))
def test_whatever_comes_keeps_its_number(raw: tuple[str, ...]) -> None:
    assert len(arguments(raw)) == len(raw)
    assert len(environment(raw)) == len(raw)


def test_long_argument_takes_no_long_time() -> None:
    long = "a://" + "b" * 1_000_000

    assert arguments((long, "-" * 1_000_000, "x" * 1_000_000)) is not None
