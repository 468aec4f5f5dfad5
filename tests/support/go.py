"""Compilers of Go: Debian's, and the newest."""

import os
import subprocess
from pathlib import Path

from tests.support.requirements import lacking, need_program

NEWEST = "newest"
COMPILERS = ("debian", NEWEST)
_BUILD = Path(__file__).parents[2] / "build"
_NEWEST = _BUILD / "go/go/bin/go"  # where deploy/setup.sh puts it


def build(compiler: str, program: Path, source: Path, *options: str) -> Path:
    """Compile a program, by itself."""
    if compiler == NEWEST and not _NEWEST.exists():
        lacking("needs the newest Go: CI=true deploy/setup.sh")
    go = str(_NEWEST) if compiler == NEWEST else need_program("go")
    own = {
        "GOCACHE": str(_BUILD / "go-cache"),  # it compiles its library once, for 10 s and more
        "GOPATH": str(_BUILD / "go-path"),
        "GO111MODULE": "off",
        "GOTOOLCHAIN": "local",
    }
    command = [go, "build", "-buildvcs=false", *options, "-o", str(program), str(source)]
    subprocess.run(command, check=True, env=os.environ | own)
    return program
