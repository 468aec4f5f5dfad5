"""What is known of a crash besides its core and its record, as bytes for the next recorder."""

import os
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, ValidationError

from services.common.capture import CaptureRecord
from services.recorder import facts
from services.recorder.facts import Facts
from services.recorder.modules import Identity


class Known(BaseModel):
    """All that is read while the process is held.

    Attributes:
        files: of the modules, in their order; None: it was not opened.
        code: as in `Recording`, like `fault`.
    """

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    facts: Facts
    files: tuple[Identity | None, ...] = ()
    code: bytes | None = None
    fault: str | None = None


def encoded(known: Facts, code: bytes | None, fault: str | None) -> bytes:
    """Return it as bytes; the mappings are told by the modules."""
    files = tuple(_identity(module.file) for module in known.modules)
    said = Known(facts=replace(known, maps=b""), files=files, code=code, fault=fault)
    return said.model_dump_json().encode()


def decoded(raw: bytes, record: CaptureRecord) -> Known:
    """Return it again, its modules not open, whatever their descriptors tell.

    Args:
        raw: as `encoded` made it; what is empty or torn tells nothing.
        record: which tells who crashed.
    """
    known = _read(raw)
    if known is None:
        return Known(facts=_nothing(record))
    facts_now = replace(known.facts, process=record.process)
    return known.model_copy(update={"facts": facts_now})


def is_whole(raw: bytes) -> bool:
    """Tell whether this is what `encoded` made."""
    return _read(raw) is not None


def _read(raw: bytes) -> Known | None:
    try:
        return Known.model_validate_json(raw)
    except ValidationError:
        return None


def _identity(file: int) -> Identity | None:
    if file < 0:
        return None
    status = os.fstat(file)
    return status.st_dev, status.st_ino


def _nothing(record: CaptureRecord) -> Facts:
    return Facts(
        process=record.process,
        username=facts.username(record.process.uid),
        raw_environment=b"",
        cwd=None,
        root=None,
        limits={},
        threads=(),
        modules=(),
        notes=("the recorder was killed before it had read more of the process",),
    )
