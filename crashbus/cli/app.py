"""The commands of ``crashbus``, all registered here."""

import os
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from crashbus.cli import services, site
from crashbus.cli.debug import debug
from crashbus.cli.demo import demo
from crashbus.cli.doctor import doctor
from crashbus.cli.errors import EXIT_SETTINGS, Trouble
from crashbus.cli.get import get
from crashbus.cli.keys import keys
from crashbus.cli.ls import ls
from crashbus.cli.receive import receive
from crashbus.cli.retry import retry
from crashbus.cli.run import run
from crashbus.cli.schema import schema
from crashbus.cli.show import show
from crashbus.cli.snapshot import snapshot
from crashbus.cli.tail import tail
from crashbus.cli.terminal import plain, show_warnings
from crashbus.errors import CrashbusError
from crashbus.message_base import VERSION as WIRE_VERSION
from services.common.settings import SettingsError

_NOT_OF_THIS_HOST = {"demo", "receive", "keys", "schema"}  # they have all that they need


class _Commands(TyperGroup):
    """Turns what can be foreseen to go wrong into one line and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CrashbusError as error:
            wrong_settings = isinstance(error, SettingsError)  # told one a line
            typer.echo(f"crashbus: {plain(str(error), lines=wrong_settings)}", err=True)
            status = EXIT_SETTINGS if wrong_settings else getattr(error, "STATUS", Trouble.STATUS)
            raise typer.Exit(status) from error
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"crashbus {version('crashbus')}, wire contract {WIRE_VERSION}")
        raise typer.Exit


@app.callback()
def crashbus(
    ctx: typer.Context,
    nats_url: Annotated[
        str | None,
        typer.Option(
            envvar="CRASHBUS_NATS_URL",
            help="NATS servers, separated by commas.",
            show_default=False,
        ),
    ] = None,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Say which version this is.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Every crash on a Linux host, captured whole and delivered.

    Further settings of the bus are environment variables: CRASHBUS_NATS_NKEY_FILE,
    CRASHBUS_NATS_USER, CRASHBUS_NATS_PASSWORD_FILE, CRASHBUS_NATS_CREDENTIALS and, for TLS,
    CRASHBUS_NATS_CA_FILE.
    """
    if nats_url:
        os.environ["CRASHBUS_NATS_URL"] = nats_url  # for services started from here, too
    if ctx.invoked_subcommand not in _NOT_OF_THIS_HOST | services.SERVICES.keys():
        site.take_settings()
        site.take_keys()
    show_warnings()


def _register_service(name: str, summary: str) -> None:
    @app.command(
        name,
        help=summary,
        rich_help_panel="Services",
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def service(ctx: typer.Context) -> None:
        services.become(name, ctx.args)


for command in (
    run,
    demo,
    tail,
    ls,
    show,
    get,
    debug,
    retry,
    receive,
    snapshot,
    doctor,
    keys,
    schema,
):
    app.command()(command)
for service_name, service_summary in services.SERVICES.items():
    _register_service(service_name, service_summary)
