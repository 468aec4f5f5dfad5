"""An image holds what its service's extra names: each service needs nothing beyond that."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
OURS = ("crashbus", "services", "bpf")
OF_THE_DISTRIBUTION = {"bcc"}  # no package of PyPI; the detector's image has Debian's


def distributions_of(extra: str, *others: str) -> set[str]:
    """Return the names of what an extra and other distributions bring, and what that brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = project["optional-dependencies"]
    wanted = [Requirement(one) for one in (*project["dependencies"], f"crashbus[{extra}]", *others)]
    found: set[tuple[str, str]] = set()
    while wanted:
        one = wanted.pop()
        name = canonicalize_name(one.name)
        for option in ("", *one.extras):
            if (name, option) in found:
                continue
            found.add((name, option))
            needs = ours.get(option, ()) if name == "crashbus" else requires(name) or ()
            wanted += [
                need
                for need in map(Requirement, needs)
                if not need.marker or need.marker.evaluate({"extra": option})
            ]
    return {name for name, _ in found}


def file_of(module: str) -> Path | None:
    place = ROOT / module.replace(".", "/")
    for path in (place / "__init__.py", place.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def imports_in(path: Path) -> Iterator[str]:
    """Give what a file imports, also within its functions; not what is for the type checker."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{one.name}" for one in node.names)


def foreign_imports(package: str) -> set[str]:
    """Return the foreign top-level modules that a package, and what it imports of ours, import."""
    wanted = list((ROOT / package.replace(".", "/")).glob("*.py"))
    seen, foreign = set(wanted), set()
    while wanted:
        for name in imports_in(wanted.pop()):
            top = name.partition(".")[0]
            if top not in OURS:
                foreign.add(top)
            elif (file := file_of(name)) and file not in seen:
                seen.add(file)
                wanted.append(file)
    return foreign - sys.stdlib_module_names


@pytest.mark.parametrize("service", ["detector", "recorder", "collector", "shipper"])
def test_service_imports_nothing_that_its_extra_does_not_bring(service: str) -> None:
    brought, known = distributions_of(service), packages_distributions()
    missing = {
        module
        for module in foreign_imports(f"services.{service}") - OF_THE_DISTRIBUTION
        if not brought & {canonicalize_name(one) for one in known.get(module, ())}
    }
    assert not missing


def locked(name: str) -> dict[str, str]:
    """Return what a lock file says of each package."""
    parts = re.split(r"\n(?=[a-z])", (ROOT / name).read_text().rstrip())
    return {canonicalize_name(part.partition("==")[0].partition("[")[0]): part for part in parts}


def test_services_are_installed_with_what_was_tested_and_no_more() -> None:
    whole, services = locked("requirements.lock"), locked("requirements-services.lock")

    assert services.items() <= whole.items()
    elsewhere = {name for name, part in services.items() if "sys_platform == 'win32'" in part}
    # hatchling builds crashbus itself, as pyproject.toml says.
    assert services.keys() - elsewhere == distributions_of("all", "hatchling") - {"crashbus"}
