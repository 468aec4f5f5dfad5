"""The command itself: services, help, schema, what is not installed."""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from crashbus import messages, own_cores
from crashbus.cli.services import SERVICES
from crashbus.keys import USERS
from crashbus.message_base import VERSION, Message
from tests.cli.support import crashbus


@pytest.mark.parametrize("service", SERVICES)
async def test_a_service_explains_its_own_settings(service: str) -> None:
    result = await crashbus(service, "--help")
    assert result.status == 0, result.err
    assert f"CRASHBUS_{service.upper()}_HTTP" in result.out


async def test_a_service_gets_the_global_nats_url() -> None:
    """It gets so far as to reject another setting, which shows it was started."""
    env = {"CRASHBUS_COLLECTOR_RECHECK": "often"}
    result = await crashbus("--nats-url", "nats://127.0.0.1:1", "collector", env=env)
    assert result.status == 2
    assert "CRASHBUS_COLLECTOR_RECHECK" in result.err


async def test_help_lists_all_commands() -> None:
    result = await crashbus("--help")
    assert result.status == 0
    commands = ["run", "demo", "tail", "ls", "show", "get", "debug", "doctor", "schema"]
    for command in [*commands, *SERVICES]:
        assert f" {command} " in result.out


async def test_the_command_and_its_services_say_which_version_they_are() -> None:
    whole = await crashbus("--version")
    assert whole.out == f"crashbus {version('crashbus')}, wire contract {VERSION}\n"
    service = await crashbus("shipper", "--version")
    assert service.out == f"crashbus {version('crashbus')}\n"


async def test_a_shell_completes_commands() -> None:
    asked = {"_CRASHBUS_COMPLETE": "complete_bash", "COMP_WORDS": "crashbus re", "COMP_CWORD": "1"}
    result = await crashbus(env=asked)
    assert {"retry", "receive", "recorder"} == set(result.out.split())


async def test_keys_are_told_to_programs_too(tmp_path: Path) -> None:
    result = await crashbus("keys", str(tmp_path), "--json")
    told = [json.loads(line) for line in result.out.splitlines()]
    assert {one["user"] for one in told} == set(USERS)
    assert all(Path(one["file"]).read_text().startswith("SU") for one in told)
    users = (tmp_path / "server" / "users.conf").read_text()
    assert all(one["public_key"] in users for one in told)


async def test_a_wrong_setting_is_said_in_a_line() -> None:
    result = await crashbus("ls", env={"CRASHBUS_LOG_LEVEL": "loud"})
    assert result.status == 2
    assert result.err.startswith("crashbus: CRASHBUS_LOG_LEVEL: ")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("kind", messages.ALL)
async def test_schema_of_a_message(kind: type[Message]) -> None:
    if kind is not messages.ALL[0]:  # one by the command, the others by what it calls
        assert messages.json_schema(kind)["title"] == kind.__name__
        return
    result = await crashbus("schema", kind.__name__.lower())
    assert json.loads(result.out) == messages.json_schema(kind)


async def test_schemas_of_all_messages() -> None:
    result = await crashbus("schema")
    assert list(json.loads(result.out)) == [kind.__name__ for kind in messages.ALL]


async def test_schema_of_no_message() -> None:
    result = await crashbus("schema", "nope")
    assert result.status == 1
    assert result.err.startswith("crashbus: there is no message 'nope'; take one of SignalEvent")


def test_the_command_line_leaves_no_core_and_what_it_starts_is_not_taken_for_it() -> None:
    program = (
        "import resource, subprocess, sys\n"
        "from crashbus.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (4096, 4096))\n"
        "sys.argv = ['crashbus', 'schema', 'SignalEvent']\n"
        "try: main()\n"
        "finally:\n"
        "  print(resource.getrlimit(resource.RLIMIT_CORE))\n"
        "  print(open('/proc/self/comm').read(), end='', flush=True)\n"
        "  subprocess.run(['cat', '/proc/self/comm'])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.endswith(f"}}\n(0, 0)\n{own_cores.NAMES[0]}\ncat\n"), result.stderr


def without(modules: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command where some modules cannot be imported."""
    program = (
        "import sys\n"
        f"for name in {list(modules)!r}: sys.modules[name] = None\n"
        f"sys.argv = ['crashbus', *{list(arguments)!r}]\n"
        "from crashbus.cli import main\n"
        "main()\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("module", ["typer", "rich"])
def test_the_command_line_names_what_is_not_installed(module: str) -> None:
    result = without([module], "ls")
    assert result.returncode == 2
    assert f"needs {module}" in result.stderr
    assert "pip install 'crashbus[cli]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_service_runs_where_the_command_line_is_not_installed() -> None:
    result = without(["typer", "rich"], "collector", "--help")
    assert result.returncode == 0
    assert "CRASHBUS_COLLECTOR_HTTP" in result.stdout


def test_a_service_names_what_is_not_installed() -> None:
    result = without(["asyncinotify"], "collector")
    assert result.returncode == 2
    assert result.stderr == (
        "crashbus collector: not installed here: asyncinotify; pip install 'crashbus[collector]'\n"
    )


def test_the_package_itself_needs_no_extra() -> None:
    extras = "typer rich structlog prometheus_client pydantic_settings minio tenacity drgn"
    program = (
        "import sys\n"
        f"for name in {extras.split()!r}: sys.modules[name] = None\n"
        "import crashbus, crashbus.destination, crashbus.streams\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
