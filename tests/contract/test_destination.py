"""Destination URLs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashbus.destination import DestinationError, parse


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("s3://crashes", "s3://crashes"),
        (" s3://crashes//a/b/ ", "s3://crashes/a/b"),
        ("tcp://Collector.Example:10060/", "tcp://collector.example:10060"),
        ("tls://[::1]:443?core=true", "tls://[::1]:443?core=true"),
        ("tcp://h:1?core=false", "tcp://h:1"),
        ("tcp://my_host.example.:1", "tcp://my_host.example.:1"),
        ("tcp://[fe80::1%eth0]:1", "tcp://[fe80::1%eth0]:1"),
        ("tcp://h:1?core=ndjson", "tcp://h:1?core=true"),
        ("tcp://h:1?core=binary", "tcp://h:1?core=binary"),
        ("file:///var//crash/", "file:///var/crash"),
        ("file://localhost/a%20b", "file:///a%20b"),
    ],
)
def test_every_destination_has_one_url(url: str, canonical: str) -> None:
    assert parse(url).url == canonical
    assert parse(canonical).url == canonical


def test_parts_are_what_they_say() -> None:
    s3 = parse("s3://crashes/a/b")
    assert (s3.bucket, s3.prefix, s3.ships_together, s3.wants_core) == (
        "crashes",
        "a/b",
        False,
        True,
    )
    tcp = parse("tcp://h:10060")
    assert (tcp.host, tcp.port, tcp.ships_together, tcp.wants_core) == ("h", 10060, True, False)
    assert parse("tls://h:1?core=true").wants_core is True
    assert parse("file:///a%20b").path == "/a b"


@pytest.mark.parametrize(
    ("url", "mend"),
    [
        ("gopher://x", "begin it with s3://"),
        ("/var/crash", "begin it with s3://"),
        ("", "begin it with s3://"),
        ("s3:///x", "the bucket is missing"),
        ("s3://A_", "3 to 63"),
        ("s3://ab", "3 to 63"),
        ("s3://a..b", "no '.' beside"),
        ("s3://a.-b", "no '.' beside"),
        ("s3://10.0.0.1", "no IP address"),
        ("s3://abc/../x", "not allowed"),
        ("s3://abc?x=1", "no option 'x'"),
        ("s3://abc#x", "'#'"),
        ("tcp://h", "host and port are needed"),
        ("tcp://:1", "host and port are needed"),
        ("tcp://a..b:1", "host and port are needed"),
        (f"tcp://{'a' * 64}.example:1", "host and port are needed"),
        ("tcp://h:0", "host and port are needed"),
        ("tcp://h:99999", "such as tcp://"),
        ("tcp://h:x", "such as tcp://"),
        ("tcp://h:1/x", "nothing may follow"),
        ("tcp://h:1?core=maybe", "true or false or ndjson or binary"),
        ("tcp://[::1:5", "such as tcp://"),
        ("file://var/crash", "three slashes"),
        ("file:///", "the directory is missing"),
        ("file:///a%2f..%2fb", "not allowed"),
        ("file:///a\nb", "unprintable"),
        ("file:///" + "a" * 600, "512"),
    ],
)
def test_wrong_url_names_the_mend(url: str, mend: str) -> None:
    with pytest.raises(DestinationError, match=mend.replace("?", r"\?")):
        parse(url)


@pytest.mark.parametrize("url", ["s3://user:hush@abc", "tcp://user:hush@h:x", "tls://hush@h:1"])
def test_password_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(DestinationError) as caught:
        parse(url)
    assert "hush" not in str(caught.value)


@given(st.one_of(st.text(), st.text().map("s3://".__add__), st.text().map("tcp://".__add__)))
def test_any_text_is_a_destination_or_a_named_error(text: str) -> None:
    try:
        found = parse(text)
    except DestinationError:
        return
    assert parse(found.url) == found or found.options == {"core": "false"}
