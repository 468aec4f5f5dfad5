"""What reads small processes, in C and as root, bears whatever they left."""

import subprocess
from pathlib import Path

import pytest

from tests.support.requirements import need_program, need_root

HARNESS = Path(__file__).with_name("hostile_taker.c")
ROUNDS = 1000


@pytest.fixture(scope="session")
def hostile_taker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_program("gcc")
    need_root()
    program = tmp_path_factory.mktemp("taker") / "hostile_taker"
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    command = [
        "gcc",
        "-g",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        *sanitizers,
        "-o",
        str(program),
        str(HARNESS),
    ]
    subprocess.run(command, check=True)
    return program


@pytest.mark.parametrize("seed", range(2))
def test_no_length_or_number_leads_out_of_bounds(
    hostile_taker: Path, tmp_path: Path, seed: int
) -> None:
    command = [str(hostile_taker), str(tmp_path), str(ROUNDS), str(seed)]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    assert told.returncode == 0, told.stderr
    assert 1 <= int(told.stdout) < ROUNDS  # itself, and not all that was changed
