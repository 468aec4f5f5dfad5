"""The collector's settings."""

from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.common.settings import Settings, prefix_of


class CollectorSettings(Settings):
    """Gather crash files, cut them into chunks, and put them on the bus."""

    SECTION: ClassVar[str] = "collector"
    model_config = SettingsConfigDict(env_prefix=prefix_of("collector"))

    http: str = Field(
        "127.0.0.1:9603", description="host:port to serve health and metrics on; empty: do not"
    )
    compression: int = Field(
        1, ge=0, le=19, description="zstd level for core dumps, 1 to 19; 0 ships them as they are"
    )
    keep_delivered: float = Field(
        86400,
        ge=0,
        description="seconds to keep crash files here once every destination has confirmed them",
    )
    recheck: float = Field(
        30,
        gt=0,
        le=3600,
        description="seconds between comparisons of unfinished deliveries with the bus",
    )
    max_file_bytes: int = Field(
        256 * 1024**3,
        gt=0,
        description="a crash file larger than this is cut, and flagged as truncated, in bytes",
    )
