"""The settings that every service shares: the bus, this host, its spool, the destinations."""

import os
import re
import ssl
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from crashbus import layout
from crashbus.destination import DestinationError, parse
from services.common import redact
from services.common.settings import Settings, SettingsError, prefix_of, variable_of


class BusSettings(Settings):
    """Settings that every service shares."""

    SECTION: ClassVar[str] = "bus"
    model_config = SettingsConfigDict(env_prefix=prefix_of("bus"))

    nats_url: str = Field("nats://127.0.0.1:4222", description="NATS servers, separated by commas")
    nats_user: str | None = Field(None, description="NATS user name")
    nats_password: SecretStr | None = Field(None, description="NATS password")
    nats_nkey: SecretStr | None = Field(
        None, description="seed of the nkey that names us to NATS (SU…)"
    )
    nats_credentials: Path | None = Field(None, description="NATS credentials file (.creds)")
    nats_ca_file: Path | None = Field(
        None,
        description="CA certificates to check NATS servers with, instead of the usual ones; "
        "with it, or a server given as tls://, nothing is said to a server without TLS",
    )
    nats_cert_file: Path | None = Field(
        None, description="our certificate, where NATS servers want one, with its chain"
    )
    nats_key_file: Path | None = Field(None, description="private key of that certificate")
    nats_server_name: str | None = Field(
        None, description="name that NATS servers' certificates must have, if not the URL's host"
    )
    host: str = Field(
        default_factory=lambda: os.uname().nodename,
        min_length=1,
        max_length=253,
        description="name of this host in subjects and at destinations (default: the host name)",
    )
    state: Path = Field(
        Path("/var/lib/crashbus"), description="directory for what must outlive a restart"
    )
    spool: Path = Field(Path(layout.SPOOL), description="directory of the crash files")
    destinations: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="where crash files go, separated by commas: s3://bucket/prefix, "
        "tcp://host:port, tls://host:port (?core=ndjson or ?core=binary for core dumps too), file:///path",
    )
    chunk_store_bytes: int = Field(
        8 * 1024**3,
        ge=64 * 1024**2,
        description="room on the bus for chunks not yet delivered, in bytes",
    )
    nats_replicas: int = Field(
        1,
        ge=1,
        le=5,
        description="servers of a JetStream cluster that each keep what is on the bus; 3 survive "
        "the loss of any one; taken when the streams are made",
    )
    redact_names: str = Field(
        "",
        description="regular expression: variables, options and keys whose name it is found in "
        "(with _ for - and ., none around it) are secrets too, and their values are never shown",
    )
    redact_forms: str = Field(
        "",
        description="regular expression: text that it fits is a secret, wherever it stands, if it "
        "is seen to fit within 256 characters; one with a repetition in a repetition, (a+)+, would "
        "let hostile arguments stop the services",
    )
    log_level: str = Field(
        "info", pattern="^(debug|info|warning|error)$", description="debug, info, warning, error"
    )
    log_format: str = Field("text", pattern="^(text|json)$", description="text or json")

    @field_validator("redact_names", "redact_forms")
    @classmethod
    def _is_expression(cls, given: str) -> str:
        try:
            re.compile(given)
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        return given

    @field_validator("nats_url")
    @classmethod
    def _servers(cls, given: str) -> str:
        for one in given.split(","):
            parts = urlsplit(one.strip() if "://" in one else f"nats://{one.strip()}")
            if parts.scheme not in ("nats", "tls") or not parts.hostname:
                raise ValueError("a server is given as nats://host:4222 or tls://host:4222")
            _need_port(parts)
        return given

    @field_validator("destinations", mode="before")
    @classmethod
    def _canonical_urls(cls, given: Any) -> tuple[str, ...]:
        """Bring every URL into its one form, so that all services mean the same by it."""
        urls = given.split(",") if isinstance(given, str) else given
        try:
            # Not a ValueError: pydantic would show the input, which may hold a password.
            found = [parse(str(url)).url for url in urls if str(url).strip()]
        except DestinationError as error:
            said = redact.whole_urls(str(error))
            raise SettingsError(f"{variable_of(cls, 'destinations')}: {said}") from None
        return tuple(dict.fromkeys(found))

    def connection_options(self, name: str) -> dict[str, Any]:
        """Return what `crashbus.connect` needs beside the URL.

        Args:
            name: how the NATS server shall call the connection.

        Raises:
            SettingsError: a key, certificate or credentials cannot be used, or what reads them is
                not installed.
        """
        options: dict[str, Any] = {"name": name}
        if self.nats_user:
            options["user"] = self.nats_user
        if self.nats_password:
            options["password"] = self.nats_password.get_secret_value()
        if self.nats_credentials:
            _need_nkeys("nats_credentials")
            options["user_credentials"] = str(self.nats_credentials)
        if self.nats_nkey:
            options["nkeys_seed_str"] = _checked_seed(self.nats_nkey.get_secret_value())
        if self.nats_ca_file or self.nats_cert_file or self.nats_key_file:
            options["tls"] = self._tls()
        if self.nats_server_name:
            options["tls_hostname"] = self.nats_server_name
        return options

    def _tls(self) -> ssl.SSLContext:
        if self.nats_key_file and not self.nats_cert_file:
            variable = variable_of(BusSettings, "nats_key_file")
            raise SettingsError(f"{variable} is the key of a certificate: set its CERT_FILE, too")
        variable = variable_of(BusSettings, "nats_ca_file")
        try:
            context = ssl.create_default_context(cafile=self.nats_ca_file)
            if self.nats_cert_file:
                variable = variable_of(BusSettings, "nats_cert_file")
                # Without a password of its own OpenSSL would ask for one at the terminal.
                context.load_cert_chain(self.nats_cert_file, self.nats_key_file, password="")
        except (OSError, ValueError) as error:  # SSLError is an OSError
            raise SettingsError(f"{variable}: cannot use it: {error}") from None
        return context


def _need_port(parts: SplitResult) -> None:
    try:
        _ = parts.port
    except ValueError:  # it shows what stands there, which may be of a password that holds a /
        raise ValueError("a server's port is a number up to 65535") from None


def _need_nkeys(field: str) -> None:
    if find_spec("nkeys") is None:
        variable = variable_of(BusSettings, field)
        raise SettingsError(f"{variable} needs the package nkeys: pip install 'crashbus[nkeys]'")


def _checked_seed(seed: str) -> str:
    """Return the seed if it is one; what is wrong with it is said without showing it.

    Raises:
        SettingsError: it is none, or what reads it is not installed.
    """
    _need_nkeys("nats_nkey")
    import nkeys

    try:
        nkeys.from_seed(bytearray(seed.strip().encode())).wipe()
    except Exception:  # noqa: BLE001 - binascii's, struct's, its own
        variable = variable_of(BusSettings, "nats_nkey")
        raise SettingsError(
            f"{variable} is no seed of a user's nkey: SU and 56 more characters"
        ) from None
    return seed.strip()
