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
    keep_delivered_bytes: int = Field(
        0,
        ge=0,
        description="bytes of such files to keep at most, the oldest go first; 0: any number",
    )
    spool_bytes: int = Field(
        0,
        ge=0,
        description="bytes that all crash files may take here; above it files go, delivered "
        "ones first; 0: any number",
    )
    disk_reserve: float = Field(
        6,
        ge=0,
        le=100,
        description="percent of the spool's disk below which files go in the same way, and that "
        "cores brought out of containers leave free; more than CRASHBUS_RECORDER_DISK_RESERVE, so "
        "that the next core finds room",
    )
    drop_after: float = Field(
        60,
        ge=0,
        description="seconds that an undelivered file is kept whatever the room: it is on its way",
    )
    recorder_patience: float = Field(
        60,
        ge=0,
        description="seconds to wait for a recorder that finishes what a killed one had in hand; "
        "then what there is of such a crash is delivered as it lies",
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
