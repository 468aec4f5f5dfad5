"""The shipper's settings."""

import math
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from services.common import s3_endpoint
from services.common.settings import Settings, prefix_of

MIB = 1024 * 1024
RETRY = ("first", "cap", "in_hand", "give_up")


class ShipperSettings(Settings):
    """Deliver crash files to their destinations, verify them, and publish receipts."""

    SECTION: ClassVar[str] = "shipper"
    model_config = SettingsConfigDict(env_prefix=prefix_of("shipper"))

    http: str = Field(
        "127.0.0.1:9604", description="host:port to serve health and metrics on; empty: do not"
    )
    concurrency: int = Field(
        4,
        ge=1,
        le=64,
        description="small files delivered at a time to each destination, "
        "and cores and binaries beside them",
    )
    ack_wait: float = Field(
        30,
        ge=1,
        le=3600,
        description="seconds without a sign of life after which the bus gives an item to another "
        "shipper; taken from the first shipper that ever connects",
    )
    unclaimed_after: float = Field(
        600,
        gt=0,
        description="seconds after which a work item of a destination that no shipper serves "
        "becomes a dead letter",
    )
    source_patience: float = Field(
        180,
        ge=0,
        description="seconds to wait for chunks that are not on the bus; longer than "
        "CRASHBUS_COLLECTOR_RECHECK, after which a collector publishes them again",
    )
    stall: float = Field(
        300, gt=0, description="seconds without a chunk delivered after which a try is broken off"
    )
    retry_first: float = Field(
        0.5, gt=0, description="seconds before the first retry; then doubled"
    )
    retry_cap: float = Field(60, gt=0, description="seconds between retries at most")
    retry_in_hand: float = Field(
        20, ge=0, description="seconds of retries before an item goes back to the bus for a while"
    )
    give_up: float = Field(
        86400,
        gt=0,
        description="seconds after its publication at which an item whose destination still fails "
        "becomes a dead letter",
    )
    retry_s3: Annotated[dict[str, float], NoDecode] = Field(
        default_factory=dict,
        description="for S3 servers alone, other values of RETRY_FIRST, RETRY_CAP, RETRY_IN_HAND "
        "and GIVE_UP: first=2,cap=300,in_hand=20,give_up=43200, or some of these",
    )
    retry_tcp: Annotated[dict[str, float], NoDecode] = Field(
        default_factory=dict, description="the same for tcp:// and tls:// receivers"
    )
    retry_file: Annotated[dict[str, float], NoDecode] = Field(
        default_factory=dict, description="the same for directories"
    )

    s3_endpoint: str = Field(
        "https://s3.amazonaws.com", description="the S3 server: http(s)://host[:port]"
    )
    s3_region: str = Field("us-east-1", min_length=1, description="region of the buckets")
    s3_access_key: SecretStr | None = Field(None, description="access key")
    s3_secret_key: SecretStr | None = Field(None, description="secret key")
    s3_create_bucket: bool = Field(False, description="make the bucket if there is none")
    s3_ca_file: Path | None = Field(
        None, description="CA certificates to check the S3 server with, instead of the usual ones"
    )
    s3_part_size: int = Field(
        8 * MIB,
        ge=5 * MIB,
        le=64 * MIB,
        description="larger objects are sent in parts of this size, in bytes",
    )
    s3_abandoned_after: float = Field(
        172800,
        gt=0,
        description="seconds after which an unfinished upload that no shipper goes on with is "
        "removed; longer than CRASHBUS_SHIPPER_GIVE_UP",
    )
    s3_connect_timeout: float = Field(5, gt=0, description="seconds to connect to the S3 server")
    s3_read_timeout: float = Field(
        30, gt=0, description="seconds the S3 server may be silent within a request"
    )

    tcp_connect_timeout: float = Field(5, gt=0, description="seconds to connect, TLS included")
    tcp_write_timeout: float = Field(
        30,
        gt=0,
        description="seconds for the receiver to take one line, or one chunk of a core, and what "
        "its size takes at CRASHBUS_SHIPPER_TCP_MIN_RATE",
    )
    tcp_close_timeout: float = Field(
        5,
        gt=0,
        description="seconds for the receiver to confirm all bytes, and then to close; more for "
        "what is not confirmed yet",
    )
    tcp_await_close: bool = Field(
        True,
        description="whether the receiver has to close the connection, too, when all was sent; "
        "false is for receivers that never do: then its kernel has confirmed all bytes and our end",
    )
    tcp_min_rate: int = Field(
        65536, ge=1, description="bytes a second that a receiver must take at least"
    )
    tcp_keep: bool = Field(
        False,
        description="keep a connection for further crashes; then only the receiver's kernel has "
        "confirmed what counts as delivered",
    )
    tls_ca_file: Path | None = Field(
        None,
        description="CA certificates to check tls:// receivers with, instead of the usual ones",
    )
    tls_server_name: str | None = Field(
        None, description="name the receiver's certificate must have, if not the URL's host"
    )
    tls_cert_file: Path | None = Field(
        None, description="certificate to show to tls:// receivers that ask for one"
    )
    tls_key_file: Path | None = Field(
        None, description="its private key, if that is not in the same file"
    )
    tls_verify: bool = Field(
        True, description="check the receiver's certificate; false lets anyone read along"
    )

    @field_validator("retry_s3", "retry_tcp", "retry_file", mode="before")
    @classmethod
    def _read_retry(cls, given: object) -> object:
        """Read ``name=value,…``; a table of the TOML file is one already."""
        if not isinstance(given, str):
            return given
        pairs = (pair.partition("=") for pair in given.split(",") if pair.strip())
        return {name.strip(): value.strip() for name, _, value in pairs}

    @field_validator("retry_s3", "retry_tcp", "retry_file")
    @classmethod
    def _is_retry(cls, given: dict[str, float]) -> dict[str, float]:
        strange = sorted(set(given) - set(RETRY))
        if strange:
            raise ValueError(f"has no {strange[0]!r}, only {', '.join(RETRY)}")
        # A retry at once, for ever, would be a loop; not to retry in hand is a choice.
        wrong = [name for name, value in given.items() if not _is_time(name, value)]
        if wrong:
            raise ValueError(f"{wrong[0]} must be a number of seconds above 0")
        return given

    @field_validator("s3_endpoint")
    @classmethod
    def _is_endpoint(cls, given: str) -> str:
        return s3_endpoint.checked(given)


def _is_time(name: str, value: float) -> bool:
    return math.isfinite(value) and (value > 0 or (name == "in_hand" and value == 0))
