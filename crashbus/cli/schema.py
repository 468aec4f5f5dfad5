"""``crashbus schema``: the messages of the wire contract as JSON Schema."""

import json
from typing import Annotated

import typer

from crashbus import messages
from crashbus.cli.errors import Trouble
from crashbus.cli.terminal import plain

_KINDS = {kind.__name__: kind for kind in messages.ALL}


def schema(
    message: Annotated[
        str | None, typer.Argument(help=f"{', '.join(_KINDS)}; all without one.")
    ] = None,
) -> None:
    """Print the JSON Schema of a message."""
    wanted = {name.lower(): kind for name, kind in _KINDS.items()}
    if message is None:
        shown = {name: messages.json_schema(kind) for name, kind in _KINDS.items()}
    elif kind := wanted.get(message.lower()):
        shown = messages.json_schema(kind)
    else:
        raise Trouble(f"there is no message {plain(message)!r}", f"take one of {', '.join(_KINDS)}")
    typer.echo(json.dumps(shown, indent=2))
