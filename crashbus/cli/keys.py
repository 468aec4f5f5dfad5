"""``crashbus keys``: make the keys of a secured bus."""

from pathlib import Path
from typing import Annotated

import typer

from crashbus import keys as of_bus
from crashbus.cli.terminal import print_json


def keys(
    directory: Annotated[Path, typer.Argument(help="Where they go; what is there stays.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Make a key for each part of Crashbus, and the users that nats-server reads."""
    for user, public in of_bus.make_keys(directory).items():
        seed = directory / user / of_bus.SEED
        if as_json:
            print_json({"user": user, "public_key": public, "file": str(seed)})
        else:
            typer.echo(f"{user:10} {public}  {seed}")
