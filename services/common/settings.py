"""Settings: declared beside their user, read from the environment or one TOML file.

A field ``nats_url`` of a class with the section ``bus`` is read, first found first taken, from

1. the environment variable (``CRASHBUS_NATS_URL`` for the section ``bus``,
   ``CRASHBUS_SHIPPER_…`` for the section ``shipper``),
2. the file named by the same variable with ``_FILE`` behind it, for secrets,
3. the table ``[bus]`` of the TOML file named by ``CRASHBUS_CONFIG``.
"""

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from crashbus.errors import CrashbusError
from services.common import redact

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
