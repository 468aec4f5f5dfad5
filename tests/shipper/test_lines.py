"""The lines that go over TCP, against what AppScope's daemon sends.

Its rule (cli/daemon, Go): a file that json.Unmarshal takes is sent as that value, any other as
its lines; then json.Marshal of a map from the file's base name.
"""

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashbus import names
from services.shipper.destinations import lines

SAMPLES = Path(__file__).parent.parent / "support" / "samples"
MIB = 1024 * 1024


def whole(name: str, content: bytes) -> bytes:
    return b"".join(lines.small_file(name, content))


def test_text_becomes_its_lines_with_an_empty_last_one_after_a_final_newline() -> None:
    assert whole("info_1", b"a: 1\nb: 2") == b'{"info_1":["a: 1","b: 2"]}\n'
    assert whole("backtrace_1", b"#0 main\n") == b'{"backtrace_1":["#0 main",""]}\n'


def test_json_becomes_the_value_with_sorted_keys_and_no_blanks() -> None:
    content = b'{\n  "Pid": 7,\n  "Arch": "amd64",\n  "a": [ {"z": null, "b": true} ]\n}\n'
    assert whole("snapshot_1", content) == (
        b'{"snapshot_1":{"Arch":"amd64","Pid":7,"a":[{"b":true,"z":null}]}}\n'
    )


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", rb'{"f_1":[""]}'),
        (b"5", rb'{"f_1":5}'),
        (b"12345678901234567890", rb'{"f_1":12345678901234567890}'),
        (b"NaN", rb'{"f_1":["NaN"]}'),
        (b"1e999", rb'{"f_1":["1e999"]}'),
        (b"9" * 400, b'{"f_1":["' + b"9" * 400 + b'"]}'),
        (b"1.5", rb'{"f_1":1.5}'),
        (b"<a & b>", rb'{"f_1":["\u003ca \u0026 b\u003e"]}'),
        ("\u2028é".encode(), rb'{"f_1":["\u2028' + "é".encode() + rb'"]}'),
        (b'a\rb\tc\0"\\', rb'{"f_1":["a\rb\tc\u0000\"\\"]}'),
        (b"bad \xff byte", rb'{"f_1":["bad \\xff byte"]}'),
        (rb'"\ud800"', b'{"f_1":"\xef\xbf\xbd"}'),
        (b"[" * 100_000, b'{"f_1":["' + b"[" * 100_000 + b'"]}'),
        (b"9" * 5000, b'{"f_1":["' + b"9" * 5000 + b'"]}'),
    ],
)
def test_odd_content_becomes_what_go_would_write(content: bytes, line: bytes) -> None:
    assert whole("f_1", content) == line + b"\n"


@given(st.binary(max_size=200))
def test_any_content_is_one_line_of_json_that_keeps_every_line(content: bytes) -> None:
    line = whole("info_1", content)

    assert line.count(b"\n") == 1
    value = json.loads(line)["info_1"]
    if isinstance(value, list) and not content.lstrip().startswith(b"["):
        assert "\n".join(value) == content.decode("utf-8", "backslashreplace")


@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode), st.integers(1, 9))
def test_slices_make_the_line_that_all_at_once_would(content: bytes, size: int) -> None:
    expected = lines._line({"info_1": names.text(content).split("\n")})

    assert b"".join(lines._text_line("info_1", content, size)) == expected


@pytest.mark.parametrize(
    "content",
    [b"[" + b"[]," * (2 * MIB) + b"[]]", b"\n" * (2 * MIB), b"\xff" * (2 * MIB)],
    ids=["JSON", "line feeds", "not UTF-8"],
)
def test_large_file_goes_as_lines_in_little_memory(content: bytes) -> None:
    tracemalloc.start()
    try:
        size = sum(len(piece) for piece in lines.small_file("info_1", content))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert size > len(content)
    assert peak < 8 * MIB


def test_json_of_up_to_a_mebibyte_is_a_value_and_a_larger_one_lines() -> None:
    at_most = b'"' + b"a" * (MIB - 2) + b'"'

    assert json.loads(whole("info_1", at_most))["info_1"] == "a" * (MIB - 2)
    assert json.loads(whole("info_1", b" " + at_most))["info_1"] == [f" {at_most.decode()}"]


@pytest.mark.parametrize("case", ["segv", "mt", "nginx_bus_master"])
def test_samples_become_the_lines_of_the_daemon(case: str) -> None:
    for path in sorted((SAMPLES / case).iterdir()):
        line = whole(path.name, path.read_bytes())
        if path.name.startswith("cfg_"):
            value = json.loads(path.read_bytes())
            assert json.loads(line) == {path.name: value}
            # AppScope writes no blanks itself, so only the order of keys may differ.
            assert len(line) == len(path.read_bytes()) + len(path.name) + len('{"":}\n')
        else:
            inner = path.read_text().replace("\n", '","')
            assert line == f'{{"{path.name}":["{inner}"]}}\n'.encode()
