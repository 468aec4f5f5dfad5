"""What has no wheel for arm64 is made for it on a machine of another kind, without emulation."""

import zipfile

import pytest
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

from tests.compose.stack import BASE_IMAGE, BUILD_WITHIN, Stack

# What the recorder's image installs for it, and a C library.
LIBRARIES = {"libdw.so.1", "libelf.so.1", "libgomp.so.1", "liblzma.so.5", "libc.so.6"}


@pytest.mark.timeout(BUILD_WITHIN)
def test_drgn_is_built_for_arm64(built: Stack) -> None:
    options = ("--network", "host", "--secret", f"id=ca,src={built.ca_file}")
    built.docker(
        *("build", "--quiet", *options, "--build-arg", f"BASE_IMAGE={BASE_IMAGE}"),
        *("--platform", "linux/arm64", "--target", "drgn", "--tag", "drgn:test"),
        *("--file", str(built.clone / "deploy/Dockerfile"), str(built.clone)),
        within=BUILD_WITHIN,
    )
    container = built.docker("create", "--platform", "linux/arm64", "drgn:test", "nothing").strip()
    built.docker("cp", f"{container}:/wheels", str(built.directory))
    built.docker("rm", container)

    (wheel,) = (built.directory / "wheels").iterdir()
    assert wheel.name.endswith("-cp311-cp311-linux_aarch64.whl")
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (one for one in opened.namelist() if one.endswith(".so"))
        assert name == "_drgn.cpython-311-aarch64-linux-gnu.so"
        with opened.open(name) as extension:
            elf = ELFFile(extension)
            assert elf.get_machine_arch() == "AArch64"
            (needed,) = (one for one in elf.iter_sections() if isinstance(one, DynamicSection))
            tags = needed.iter_tags("DT_NEEDED")
            assert {tag.needed for tag in tags} <= LIBRARIES  # type: ignore[attr-defined]
