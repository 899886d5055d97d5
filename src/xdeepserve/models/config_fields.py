"""ConfigFields: typed, bounded reads from an untrusted config.json.

Every read names the field and the value when it is missing, ill-typed or out of range, so that a
damaged or hostile configuration ends in one clear `ModelFormatError` and nowhere else.
"""

from __future__ import annotations

import math
from typing import Any

from xdeepserve.errors import ModelFormatError

REQUIRED: Any = object()
"""Default of a field that has none."""


class ConfigFields:
    """A read-only view of one JSON object.

    A field whose value is null counts as absent, as Hugging Face configurations use it.
    """

    def __init__(self, values: Any, *, where: str = "config.json") -> None:
        if not isinstance(values, dict):
            raise ModelFormatError(f"{where} must be a JSON object, not {_show(values)}")
        self._values: dict[str, Any] = values
        self._where = where

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def integer(
        self, name: str, default: int = REQUIRED, *, low: int = 1, high: int = 1 << 20
    ) -> int:
        """The integer field `name`, within [low, high]."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, "must be an integer")
        if not low <= value <= high:
            raise self.error(name, f"must be between {low} and {high}")
        return value

    def number(
        self, name: str, default: float = REQUIRED, *, low: float = 0.0, high: float = 1e12
    ) -> float:
        """The finite number `name`, within (low, high]."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, "must be a number")
        if not (math.isfinite(value) and low < value <= high):
            raise self.error(name, f"must be above {low} and at most {high:g}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """The boolean field `name`."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def choice(self, name: str, allowed: tuple[str, ...], default: str = REQUIRED) -> str:
        """The string field `name`, one of `allowed`."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.error(name, f"is not supported; supported: {', '.join(allowed)}")
        return value

    def integers(self, name: str, *, high: int, scalar: bool = False) -> tuple[int, ...]:
        """A list of at most 1024 integers in [0, high); absent = empty; a scalar if allowed."""
        value = self._get(name, [])
        items = [value] if scalar and isinstance(value, int) else value
        if not isinstance(items, list) or len(items) > 1024:
            raise self.error(name, "must be a list of at most 1024 integers")
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < high:
                raise self.error(name, f"must hold integers between 0 and {high - 1}")
        return tuple(items)

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of strings; absent = empty."""
        value = self._get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, "must be a list of strings")
        return tuple(value)

    def child(self, name: str) -> ConfigFields:
        """The nested object `name`; absent = empty."""
        return ConfigFields(self._get(name, {}), where=f"{self._where}: {name}")

    def merged(self, **extra: Any) -> ConfigFields:
        """A copy in which fields that are absent here take the values of `extra`."""
        present = {name: value for name, value in self._values.items() if value is not None}
        return ConfigFields({**extra, **present}, where=self._where)

    def get(self, name: str) -> Any:
        """The raw value, None when absent. For handing on, not for trusting."""
        return self._values.get(name)

    def error(self, name: str, problem: str) -> ModelFormatError:
        """The error to raise about `name`, with its value."""
        return ModelFormatError(f"{self._where}: {name}={_show(self._values.get(name))} {problem}")

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ModelFormatError(f"{self._where}: field {name!r} is missing")
        return default


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
