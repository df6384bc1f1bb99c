"""`quantization_config` of a config.json, read as hostile input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optc.compiler.diagnostics import InputError

KEY = "quantization_config"


class ConfigReader:
    """Typed reads of one JSON object; every refusal names the file and the key."""

    def __init__(self, values: Mapping[str, Any], path: Path, place: str = KEY) -> None:
        self._values, self._path, self._place = values, path, place

    def part(self, key: str) -> ConfigReader:
        """The object under a key that must be there."""
        value = self._values.get(key)
        if not isinstance(value, dict):
            raise self.refusal(f"'{key}' is not an object")
        return ConfigReader(value, self._path, f"{self._place}.{key}")

    def parts(self, key: str) -> dict[str, ConfigReader]:
        """The objects in the object under a key."""
        outer = self.part(key)
        return {name: outer.part(name) for name in outer._values}

    def keys(self) -> list[str]:
        """The keys that are there."""
        return list(self._values)

    def absent(self, key: str) -> bool:
        """Whether a key is missing, null, false or empty."""
        return not self._values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer of 64 bits; None as a default makes the key mandatory, null counts as missing."""
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refusal(f"'{key}' is {value!a}, not a whole number")
        if not -(1 << 63) <= value < 1 << 63:  # JSON has no bound, tensors do
            raise self.refusal(f"'{key}' is beyond 64 bits")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(f"'{key}' is {value!a}, not true or false")
        return value

    def text(self, key: str, default: str = "") -> str:
        """A string; null counts as missing."""
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.refusal(f"'{key}' is {value!a}, not a string")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; null counts as empty."""
        value = self._values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refusal(f"'{key}' is not a list of strings")
        return value

    def objects(self, key: str) -> list[ConfigReader]:
        """A list of objects; null counts as empty."""
        value = self._values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.refusal(f"'{key}' is not a list of objects")
        return [ConfigReader(item, self._path, f"{self._place}.{key}[{number}]") for number, item in enumerate(value)]

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers; null counts as empty."""
        value = self._values.get(key) or []
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.refusal(f"'{key}' is not a list of whole numbers")
        return value

    def choice(self, key: str, value: object, known: tuple[object, ...]) -> None:
        """Refuse a value that is not among those that optc takes."""
        if value not in known:
            taken = ", ".join(map(str, known))
            raise self.refusal(f"'{key}' is {value!a}", remedy=f"optc takes {taken}")

    def refusal(self, why: str, remedy: str | None = None) -> InputError:
        """The error for a config that optc cannot follow."""
        return InputError(
            "the model's quantization cannot be read",
            where=f"{self._path}: {self._place}",
            why=why,
            remedy=remedy or "use another quantized copy, or the unquantized model with --quant",
        )
