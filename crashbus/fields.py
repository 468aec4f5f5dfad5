"""Fields of messages, each with the range in which it is taken."""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from crashbus import names

# Linux cuts a path at 4096 bytes, and a byte that is no UTF-8 takes four characters.
MAX_PATH = 32 * 1024  # characters


def _file_name(value: str) -> str:
    if not names.is_file_name(value):
        raise ValueError("not a safe file name")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value) or not 0 <= value < 253402300800:
        raise ValueError("not a time between 1970 and 9999")
    return value


CrashId = Annotated[str, StringConstraints(pattern=r"^[0-9a-hjkmnp-tv-z]{16}$")]
FileName = Annotated[str, StringConstraints(max_length=255), AfterValidator(_file_name)]
Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
BuildId = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2}){2,64}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Host = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Time = Annotated[float, AfterValidator(_finite), Field(description="Unix time in seconds")]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Size = Annotated[int, Field(ge=0, lt=2**63, description="bytes")]
Pid = Annotated[int, Field(ge=0, lt=2**31)]
UserId = Annotated[int, Field(ge=0, lt=2**32)]
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Word = Annotated[int, Field(ge=0, lt=2**64, description="as the 64-bit machine has it")]
Path = Annotated[str, StringConstraints(max_length=MAX_PATH)]
Reason = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Url = Annotated[str, StringConstraints(min_length=1, max_length=2048)]
Encoding = Literal["zstd", "identity"]
