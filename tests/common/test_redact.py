"""Secrets are recognised by name and by form."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.redact import REDACTED, arguments, environment, is_secret


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


@settings(deadline=None)
@given(st.lists(st.text(max_size=50), max_size=8).map(tuple))
def test_whatever_comes_keeps_its_number(raw: tuple[str, ...]) -> None:
    assert len(arguments(raw)) == len(raw)
    assert len(environment(raw)) == len(raw)


def test_long_argument_takes_no_long_time() -> None:
    long = "a://" + "b" * 1_000_000

    assert arguments((long, "-" * 1_000_000, "x" * 1_000_000)) is not None
