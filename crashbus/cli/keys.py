"""``crashbus keys``: make the keys of a secured bus."""

from pathlib import Path
from typing import Annotated

import typer

from crashbus import keys as of_bus


def keys(
    directory: Annotated[Path, typer.Argument(help="Where they go; what is there stays.")],
) -> None:
    """Make a key for each part of Crashbus, and the users that nats-server reads."""
    for user, public in of_bus.make_keys(directory).items():
        typer.echo(f"{user:10} {public}  {directory / user / of_bus.SEED}")
