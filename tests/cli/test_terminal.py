"""Nothing that a crashed process wrote is obeyed by the terminal."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from crashbus.cli.tail import line
from crashbus.cli.terminal import plain, print_json, size
from tests.cli.support import make

HOSTILE = "\x1b]0;owned\x07\x1b[31m[bold red]x[/] \u202egpj.exe\x9b2J\r\n:bomb:"


@given(st.text(st.characters()))
def test_plain_text_holds_nothing_a_terminal_obeys(text: str) -> None:
    assert plain(text).isprintable()


@given(st.text(st.characters()))
def test_plain_lines_hold_nothing_but_line_feeds_and_tabs(text: str) -> None:
    kept = plain(text, lines=True)
    assert kept.replace("\n", "").replace("\t", "").isprintable()
    assert kept.count("\n") == text.count("\n")


def test_plain_text_of_people_stays_as_it_is() -> None:
    assert plain("Müller [x] /usr/bin/日本 :bomb:") == "Müller [x] /usr/bin/日本 :bomb:"


def test_plain_shows_what_it_took() -> None:
    assert plain("a\x1b[31m\u202e\ud800") == "a\\x1b[31m\\u202e\\ud800"


def test_markup_in_a_process_name_is_shown_not_interpreted() -> None:
    event = make(name=HOSTILE).event
    file = io.StringIO()
    Console(file=file, force_terminal=True, markup=True, width=500).print(line(event))
    shown = file.getvalue()
    assert "\\x1b]0;owned\\x07\\x1b[31m[bold red]x[/] \\u202egpj.exe\\x9b2J\\r\\n:bomb:" in shown
    assert "\x9b" not in shown
    assert "\x1b]" not in shown


def test_json_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"comm": HOSTILE})
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert "\x1b" not in shown
    assert json.loads(shown) == {"comm": HOSTILE}


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 1024**4, "5.0 TiB")],
)
def test_sizes(count: int, shown: str) -> None:
    assert size(count) == shown


def test_a_size_beyond_all_units_is_shown() -> None:
    assert size(2048 * 1024**4) == "2048.0 TiB"
