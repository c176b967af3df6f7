"""Reading a config.json field by field, so that nothing in it is accepted and ignored.

Whatever a family asks for is noted; `finish` refuses every field that nobody asked for,
unless it is known to change no number of the forward pass or asks for nothing (null,
false, empty).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from model.config import ConfigError

# Far above any published model; they keep a corrupt file from building a billion layers.
MAX_INTEGER = 2**24
MAX_LAYERS = 10_000
MAX_POSITIONS = 2**24


class UnsupportedConfigError(ConfigError):
    """The config asks for something this server does not do."""

    def __init__(self, field: str, value: object, supported: str) -> None:
        super().__init__(f"{field} is {show(value)}, which is not supported: {supported}")
        self.field, self.value, self.supported = field, value, supported


def show(value: object) -> str:
    """A value in an error message: its repr on one line, at most about 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def field_name(name: str, section: str = "") -> str:
    """`factor` of the section `rope_scaling` is called rope_scaling.factor."""
    return f"{section}.{name}" if section else name


class ConfigFields:
    """The fields of one JSON object, typed on reading.

    Every getter raises `ConfigError` naming the field and its value when the type or the
    bounds are wrong, or when a field without a default is missing. null counts as missing.
    """

    def __init__(self, values: Mapping[str, object], section: str = "") -> None:
        self._values = values
        self._section = section
        self._asked: set[str] = set()

    def name(self, name: str) -> str:
        """The full name of a field, for messages."""
        return field_name(name, self._section)

    def get(self, name: str) -> object:
        """The raw value, None when absent."""
        self._asked.add(name)
        return self._values.get(name)

    def has(self, name: str) -> bool:
        """Whether the field is there at all, null included."""
        return name in self._values

    def integer(
        self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_INTEGER
    ) -> int:
        """A whole number within the bounds; without a default the field is required."""
        value = self.optional_integer(name, minimum=minimum, maximum=maximum)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(f"{self.name(name)} is missing")
        return default

    def optional_integer(
        self, name: str, *, minimum: int = 1, maximum: int = MAX_INTEGER
    ) -> int | None:
        """A whole number within the bounds, or None when absent or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{self.name(name)} must be a whole number, got {show(value)}")
        if not minimum <= value <= maximum:
            raise ConfigError(
                f"{self.name(name)} must lie between {minimum} and {maximum}, got {show(value)}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; without a default the field is required."""
        value = self.optional_number(name)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(f"{self.name(name)} is missing")
        return default

    def optional_number(self, name: str) -> float | None:
        """A finite number, or None when absent or null."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{self.name(name)} must be a number, got {show(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ConfigError(f"{self.name(name)} must be finite, got {show(value)}")
        return number

    def flag(self, name: str, *, default: bool) -> bool:
        """true or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"{self.name(name)} must be true or false, got {show(value)}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string; without a default the field is required."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if value is None:
            raise ConfigError(f"{self.name(name)} is missing")
        if not isinstance(value, str):
            raise ConfigError(f"{self.name(name)} must be a string, got {show(value)}")
        return value

    def texts(self, name: str) -> tuple[str, ...] | None:
        """A list of strings, or None when absent or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise ConfigError(f"{self.name(name)} must be a list of strings, got {show(value)}")
        return tuple(value)

    def section(self, name: str) -> ConfigFields | None:
        """A nested object, or None when absent, null or empty."""
        value = self.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise ConfigError(f"{self.name(name)} must be an object, got {show(value)}")
        return ConfigFields(value, self.name(name))

    def require(self, name: str, supported: object, *, absent: object = None) -> None:
        """The field must hold the one value that is implemented; `absent` is what its
        absence means (default: that same value)."""
        value = self.get(name)
        meant = (supported if absent is None else absent) if value is None else value
        if meant != supported or isinstance(meant, bool) != isinstance(supported, bool):
            raise UnsupportedConfigError(self.name(name), meant, f"only {supported!r} is")

    def finish(self, harmless: Sequence[str] | frozenset[str] = ()) -> None:
        """Refuse what nobody asked for. Raises `UnsupportedConfigError`."""
        for name, value in self._values.items():
            known = name in self._asked or name in harmless or name.startswith("_")
            # `is False`, because 0 == False, and a 0 may well ask for something.
            asks_nothing = value is None or value is False or value in ("", [], {})
            if not known and not asks_nothing:
                raise UnsupportedConfigError(
                    self.name(name), value, "no field of that name is known here"
                )
