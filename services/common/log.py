"""Logs: structured, one line an event, on standard error."""

import logging
import sys

import structlog

from crashbus import names


def configure(level: str, form: str, service: str) -> None:
    """Send our and the libraries' logs to standard error.

    Args:
        level: debug, info, warning or error.
        form: ``text`` for people, ``json`` for machines.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if form == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _disarm,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # The client reports every failed reconnect; the bus module says it once.
    logging.getLogger("nats").setLevel(logging.CRITICAL)
    structlog.contextvars.bind_contextvars(service=service)


def _disarm(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Show control characters instead of sending them: names and errors come from attackers."""
    return {
        key: names.printable(value) if isinstance(value, str) else value
        for key, value in event.items()
    }
