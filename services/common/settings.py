"""Settings: declared beside their user, read from the environment or one TOML file.

A field ``nats_url`` of a class with the section ``bus`` is read, first found first taken, from

1. the environment variable (``CRASHBUS_NATS_URL`` for the section ``bus``,
   ``CRASHBUS_SHIPPER_…`` for the section ``shipper``),
2. the file named by the same variable with ``_FILE`` behind it, for secrets,
3. the table ``[bus]`` of the TOML file named by ``CRASHBUS_CONFIG``.
"""

import difflib
import os
import re
import ssl
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from crashbus import layout
from crashbus.destination import DestinationError, parse
from crashbus.errors import CrashbusError
from services.common import redact

__all__ = ["BusSettings", "NoDecode", "Settings", "SettingsError", "prefix_of"]

CONFIG_VARIABLE = "CRASHBUS_CONFIG"
SECTIONS = ("bus", "detector", "recorder", "collector", "shipper")


class SettingsError(CrashbusError):
    """A setting is missing or wrong; the message names the variable and the mend."""


class _SecretFiles(PydanticBaseSettingsSource):
    """Reads secrets from the files that ``<VARIABLE>_FILE`` names, as container secrets come."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        variable = f"{self.config['env_prefix']}{field_name}_FILE".upper()
        path = os.environ.get(variable)
        if not path or not _is_secret(field):
            return None, field_name, False
        try:
            # An empty one stands for none: containers and units name files that need not be given.
            return Path(path).read_text().rstrip("\r\n") or None, field_name, False
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{variable} names {path}, which cannot be read: {error}") from None

    def __call__(self) -> dict[str, Any]:
        fields = self.settings_cls.model_fields
        values = {name: self.get_field_value(field, name)[0] for name, field in fields.items()}
        return {name: value for name, value in values.items() if value is not None}


class _TomlTable(PydanticBaseSettingsSource):
    """Reads this class's table of the configuration file, if one is named."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        path = os.environ.get(CONFIG_VARIABLE)
        if not path:
            return {}
        try:
            table = tomllib.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise SettingsError(f"{CONFIG_VARIABLE} names {path}: {error}") from None
        section = getattr(self.settings_cls, "SECTION")  # noqa: B009 - not on the base class
        strange = sorted(set(table) - set(SECTIONS))
        if strange:
            known = ", ".join(SECTIONS)
            raise SettingsError(f"{path}: there is no table [{strange[0]}], only {known}")
        values = table.get(section, {})
        if not isinstance(values, dict):
            raise SettingsError(f"{path}: {section} must be a table: [{section}]")
        unknown = sorted(set(values) - set(self.settings_cls.model_fields))
        if unknown:
            raise SettingsError(f"{path}: [{section}] has no setting {', '.join(unknown)}")
        return dict(values)


class Settings(BaseSettings):
    """Base of all settings.

    Class attributes:
        SECTION: the table of the TOML file, and the middle of the variables' names.
    """

    SECTION: ClassVar[str]

    model_config = SettingsConfigDict(frozen=True, extra="ignore", validate_default=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, _SecretFiles(settings_cls), _TomlTable(settings_cls)

    @classmethod
    def _refuse_unknown_variables(cls) -> None:
        """A misspelt setting would otherwise be a default in silence."""
        prefix = prefix_of(cls.SECTION)
        others = tuple(prefix_of(one) for one in SECTIONS if one not in (cls.SECTION, "bus"))
        fields = cls.model_fields.items()
        known = {variable_of(cls, field) for field, _ in fields}
        known |= {f"{variable_of(cls, field)}_FILE" for field, info in fields if _is_secret(info)}
        for name in sorted(os.environ):
            ours = name.startswith(prefix) and (cls.SECTION != "bus" or not name.startswith(others))
            if ours and name != CONFIG_VARIABLE and name not in known:
                raise SettingsError(f"{name}: there is no such setting{_closest(name, known)}")

    @classmethod
    def load(cls) -> Self:
        """Read the settings.

        Raises:
            SettingsError: with one line for each setting that is wrong.
        """
        cls._refuse_unknown_variables()
        try:
            return cls()
        except ValidationError as error:
            lines = [_fault(cls, fault) for fault in error.errors(include_url=False)]
            raise SettingsError("\n".join(lines)) from None


def _need_port(parts: SplitResult) -> None:
    try:
        _ = parts.port
    except ValueError:  # it shows what stands there, which may be of a password that holds a /
        raise ValueError("a server's port is a number up to 65535") from None


def _closest(name: str, known: set[str]) -> str:
    found = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {found[0]}?" if found else ""


def _fault(cls: type[Settings], fault: Any) -> str:
    field = str(fault["loc"][0]) if fault["loc"] else ""
    info = cls.model_fields.get(field)
    # Whoever put a password into a URL shall not find it in a log. What is cut off before that
    # could be the @ which tells that there is one.
    shown = redact.whole_urls(repr(fault.get("input")))
    given = "" if info is None or _is_secret(info) else f" (given: {shown:.200})"
    place = f"{variable_of(cls, field)}: " if field else ""  # several at once name themselves
    return f"{place}{redact.whole_urls(fault['msg'].removeprefix('Value error, '))}{given}"


def _is_secret(field: FieldInfo) -> bool:
    return SecretStr in (field.annotation, *getattr(field.annotation, "__args__", ()))


def prefix_of(section: str) -> str:
    """Return the prefix of a section's environment variables."""
    return "CRASHBUS_" if section == "bus" else f"CRASHBUS_{section.upper()}_"


def variable_of(cls: type[Settings], field: str) -> str:
    """Return the environment variable of one setting."""
    return f"{prefix_of(cls.SECTION)}{field.upper()}"


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
        "", description="regular expression: text that it fits is a secret, wherever it stands"
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
            if parts.scheme not in ("nats", "tls", "ws", "wss") or not parts.hostname:
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


def _need_nkeys(field: str) -> None:
    if find_spec("nkeys") is None:
        variable = variable_of(BusSettings, field)
        raise SettingsError(f"{variable} needs the package nkeys: pip install nkeys")


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
