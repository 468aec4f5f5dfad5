"""``crashbus get``: fetch a crash's files."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from crashbus.cli.download import refuse_to_overwrite, save
from crashbus.cli.errors import Trouble
from crashbus.cli.lookup import Found, files_of, find
from crashbus.cli.terminal import console, plain, print_json, size
from crashbus.parts import CrashFile

FromUrl = Annotated[
    str | None,
    typer.Option("--from", metavar="URL", help="Read this destination; then no bus is needed."),
]
CrashIdArgument = Annotated[str, typer.Argument(metavar="ID", help="A crash ID, or its beginning.")]


def get(
    crash: CrashIdArgument,
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="Names or kinds, such as core.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to; default: ./ID.")
    ] = None,
    from_url: FromUrl = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Fetch the files of a crash, verified and decompressed."""
    found = find(crash, from_url)
    wanted = files_of(found, files or [])
    directory = make_directory(output or Path(found.crash.crash_id))
    if not force:
        refuse_to_overwrite(directory, wanted)
    for file, path in zip(wanted, download(found, wanted, directory), strict=True):
        if as_json:
            print_json({"path": str(path), **file.model_dump(include={"kind", "size", "sha256"})})
        else:
            console().print(plain(str(path)), soft_wrap=True)


def make_directory(path: Path) -> Path:
    """Make a directory unless it is there."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Trouble(
            f"cannot make {path}: {error.strerror}", "take another directory with -o"
        ) from error
    return path


def download(found: Found, files: list[CrashFile], directory: Path) -> list[Path]:
    """Fetch files with a progress bar on standard error; return where they are."""
    paths = []
    with _progress() as progress:
        for file in files:
            task = progress.add_task(file.name, total=file.size)

            def on(done: int, task: object = task) -> None:
                progress.update(task, completed=done)  # type: ignore[arg-type]

            paths.append(save(found, file, directory, on))
            progress.console.print(f"{file.name}: {size(file.size)}, verified")
    return paths


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
