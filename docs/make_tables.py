"""Writes the parts of the documentation that are made from the code.

Between ``<!-- made from the code: NAME ARGUMENT -->`` and ``<!-- end -->`` stands what the
function NAME below returns. Run it after a change of messages, streams, settings or metrics:

    python docs/make_tables.py          # rewrites the pages
    python docs/make_tables.py --check  # exits with 1 if one is stale
"""

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from crashbus import layout, messages, parts, reasons, streams
from crashbus.message_base import Message
from services.common.bus_settings import BusSettings
from services.common.settings import Settings, variable_of
from services.shipper.destinations import file, s3_failures

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(
    ROOT / "docs" / f"{name}.md" for name in ("wire-contract", "operations", "reliability")
)
SERVICES = ("detector", "recorder", "collector", "shipper")

_PART = re.compile(
    r"(?P<begin><!-- made from the code: (?P<name>\w+) ?(?P<argument>\w*) -->\n)"
    r".*?(?P<end><!-- end -->)",
    re.DOTALL,
)


def made(page: str) -> str:
    """Return a page with all its made parts made anew."""

    def part(match: re.Match[str]) -> str:
        text = MAKERS[match["name"]](match["argument"])
        return f"{match['begin']}{text}\n{match['end']}"

    return _PART.sub(part, page)


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    cells = [list(headings)]
    cells += [["---"] * len(cells[0])]
    cells += [[_cell(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<").replace("\n", " ")


# The wire contract


def message_tables(_: str) -> str:
    """Return a section for every message."""
    return "\n\n".join(_section(kind, f"`{kind.SUBJECT}`. ") for kind in messages.ALL)


def part_tables(_: str) -> str:
    """Return a section for every part that messages are made of."""
    found: dict[str, type[BaseModel]] = {}
    for kind in messages.ALL:
        _collect(kind, found)
    parts = [one for one in found.values() if not issubclass(one, Message)]
    return "\n\n".join(_section(one) for one in sorted(parts, key=lambda one: one.__name__))


def _collect(kind: type[BaseModel], found: dict[str, type[BaseModel]]) -> None:
    for name in kind.model_json_schema(mode="serialization").get("$defs", {}):
        model = _named(name)
        if issubclass(model, BaseModel):
            found[name] = model


def _named(name: str) -> type[BaseModel] | type[StrEnum]:
    """Return what a schema has under ``$defs``: a message, a part of one, or an enumeration."""
    found: type[BaseModel] | type[StrEnum]
    (found,) = {vars(one)[name] for one in (messages, parts, layout) if name in vars(one)}
    return found


def _section(kind: type[BaseModel], before: str = "") -> str:
    about = " ".join((kind.__doc__ or "").split())
    return f"### {kind.__name__}\n\n{before}{about}\n\n{_fields(kind)}"


def _fields(kind: type[BaseModel]) -> str:
    schema = kind.model_json_schema(mode="serialization")
    properties = schema["properties"]
    rows = (
        (
            f"`{name}`",
            _type(properties[name]),
            "yes" if info.is_required() or name in _STAMPS else _default(info),
            info.description or properties[name].get("description", ""),
        )
        for name, info in _common_first(kind)
    )
    return table(("field", "type", "required, or default", "meaning"), rows)


_STAMPS = ("v", "time")  # filled in for our own messages, required in all


def _common_first(kind: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    common = ("v", "host", "time", "crash_id")
    items = list(kind.model_fields.items())
    return sorted(items, key=lambda item: common.index(item[0]) if item[0] in common else 9)


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        model = _named(name)
        return f"[{name}](#{name.lower()})" if issubclass(model, BaseModel) else _enumeration(model)
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f'`"{one}"`' for one in schema["enum"])
    if schema["type"] == "array":
        limits = _limits(schema, "minItems", "maxItems")
        return f"array of {_type(schema['items'])}{limits}"
    if "additionalProperties" in schema:
        limits = _limits(schema, "minProperties", "maxProperties")
        return f"map of text to {_type(schema['additionalProperties'])}{limits}"
    if schema.get("format") in ("binary", "base64url"):
        return "binary"
    return f"{_NAMES[schema['type']]}{_limits(schema)}"


_NAMES = {
    "string": "string",
    "integer": "integer",
    "number": "float",
    "boolean": "boolean",
    "null": "nil",
}
_SIGNS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"))


def _limits(schema: dict[str, Any], least: str = "minLength", most: str = "maxLength") -> str:
    words = [f"{sign} {schema[key]}" for key, sign in _SIGNS if key in schema]
    if least in schema or most in schema:
        words.append(f"{schema.get(least, 0)} to {schema.get(most, '∞')} long")
    if "pattern" in schema:
        words.append(f"`{schema['pattern']}`")
    return f" ({', '.join(words)})" if words else ""


def _enumeration(kind: type[StrEnum]) -> str:
    return ", ".join(f'`"{one}"`' for one in kind)


def _default(info: FieldInfo) -> str:
    default = info.get_default(call_default_factory=True)
    return {"None": "nil", "()": "empty", "{}": "empty", "False": "false"}.get(
        str(default), str(default)
    )


def reason_table(_: str) -> str:
    """Return why something may be given up or postponed."""
    return table(("reason", "meaning"), ((f"`{one}`", told) for one, told in reasons.ALL.items()))


def stream_table(_: str) -> str:
    """Return the streams and what limits them."""
    rows = []
    for stream in streams.all_streams(BusSettings.model_fields["chunk_store_bytes"].default):
        age = f"{stream.max_age / 86400:.0f} days" if stream.max_age else "no limit"
        rows.append(
            (
                f"`{stream.name}`",
                ", ".join(f"`{subject}`" for subject in stream.subjects or ()),
                str(stream.retention.value if stream.retention else ""),
                age,
                f"{(stream.max_bytes or 0) // 1024**2} MiB",
                "the oldest goes" if str(stream.discard.value) == "old" else "refuses new ones",  # type: ignore[union-attr]
            )
        )
    return table(("stream", "subjects", "retention", "age", "size", "when full"), rows)


# Operations


def settings_table(section: str) -> str:
    """Return the settings of a service, or those that all share."""
    (cls,) = [BusSettings] if section == "bus" else _settings_of(section)
    rows = (
        (f"`{_variable(cls, name, info)}`", _setting_default(info), info.description or "")
        for name, info in cls.model_fields.items()
    )
    return table(("variable", "default", "meaning"), rows)


def _settings_of(section: str) -> list[type[Settings]]:
    module = importlib.import_module(f"services.{section}.settings")
    return [one for one in _classes(module, Settings) if getattr(one, "SECTION", "") == section]


def _classes(module: ModuleType, base: type[Settings]) -> list[type[Settings]]:
    values = vars(module).values()
    return [one for one in values if isinstance(one, type) and issubclass(one, base)]


def _variable(cls: type[Settings], name: str, info: FieldInfo) -> str:
    secret = SecretStr in (info.annotation, *getattr(info.annotation, "__args__", ()))
    variable = variable_of(cls, name)
    return f"{variable}`, or `{variable}_FILE" if secret else variable


def _setting_default(info: FieldInfo) -> str:
    if info.default_factory is not None:
        return ""  # the description tells
    if info.default is None or info.default in ((), ""):
        return "none"
    if isinstance(info.default, bool):
        return f"`{str(info.default).lower()}`"
    shown = ",".join(map(str, info.default)) if isinstance(info.default, tuple) else info.default
    return f"`{str(shown).replace(f'{ROOT}/', '')}`"


def metrics_table(service: str) -> str:
    """Return the metrics of a service."""
    module = importlib.import_module(f"services.{service}.metrics")
    found = [one for one in vars(module).values() if isinstance(one, MetricWrapperBase)]
    return table(("metric", "type", "labels", "meaning"), (_metric(one) for one in found))


def _metric(metric: MetricWrapperBase) -> tuple[str, str, str, str]:
    (family,) = metric.describe()
    ending = {"counter": "_total", "info": "_info"}.get(family.type, "")
    labels = ", ".join(f"`{label}`" for label in metric._labelnames)
    return f"`{family.name}{ending}`", family.type, labels, family.documentation


def failure_table(_: str) -> str:
    """Return what the shippers' destinations answer, and whether it is tried again."""
    rows = [
        (f"`{reason}`", kind, "yes" if passes else "no", mend)
        for kind, module in (("s3", s3_failures), ("file", file))
        for passes, known in ((False, module.FINAL), (True, module.PASSING))
        for reason, mend in dict.fromkeys(known.values())  # type: ignore[attr-defined]
    ]
    return table(("reason", "destination", "tried again", "mend"), rows)


# What was tried


def fault_table(_: str) -> str:
    """Return a row for each fault of the last ``make test-faults``."""
    rows = json.loads((ROOT / "docs" / "reliability.json").read_text())
    return table(
        (
            "what is done",
            "what it hit",
            "crashes",
            "what became of them",
            "MiB of cores",
            "largest",
            "seconds",
            "seed",
        ),
        (
            (
                row["name"],
                row["hit"],
                str(row["crashes"]),
                row["ended"] if row["passed"] else "**not as it should be**",
                f"{row['mib']:.0f}",
                str(row["largest"]),
                f"{row['seconds']:.0f}",
                str(row["seed"]),
            )
            for row in rows
        ),
    )


MAKERS: dict[str, Callable[[str], str]] = {
    "failures": failure_table,
    "messages": message_tables,
    "parts": part_tables,
    "reasons": reason_table,
    "streams": stream_table,
    "settings": settings_table,
    "metrics": metrics_table,
    "faults": fault_table,
}


def main() -> None:
    """Rewrite the pages, or tell which are stale."""
    stale = []
    for page in PAGES:
        text = page.read_text()
        if made(text) != text:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv:
                page.write_text(made(text))
    if "--check" in sys.argv and stale:
        sys.exit(f"stale: {', '.join(stale)}; run python docs/make_tables.py")


if __name__ == "__main__":
    main()
