"""What can never become a connection is told at once, with what would mend it."""

from pathlib import Path
from typing import Any

import pytest

from crashbus import CrashbusError, connect, connecting
from crashbus.errors import BusUnreachable


async def refusal(url: str, **options: Any) -> str:
    with pytest.raises(CrashbusError) as refused:
        async with connect(url, **options):
            pass
    assert not isinstance(refused.value, BusUnreachable)  # which services try again for ever
    return str(refused.value)


@pytest.mark.parametrize("url", ["ws://127.0.0.1:1", "nats://127.0.0.1:1, WSS://me:secret@h"])
async def test_web_sockets_are_not_spoken(url: str) -> None:
    said = await refusal(url)
    assert "give nats:// or tls://" in said
    assert "secret" not in said


async def test_key_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    said = await refusal("nats://127.0.0.1:1", nkeys_seed=str(tmp_path / "nkey"))
    assert said == f"cannot read the key {tmp_path}/nkey: No such file or directory"


async def test_key_without_the_package_for_it_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connecting, "find_spec", lambda _: None)
    said = await refusal("nats://127.0.0.1:1", nkeys_seed_str="SU")
    assert "pip install 'crashbus[nkeys]'" in said
