"""Typed reading of a config.json, which collects every problem before it raises."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from kedit_jax.errors import CheckpointError, shown
from kedit_jax.models.config import Activation

T = TypeVar("T")
_REQUIRED: Any = object()

MAX_SIZE, MAX_LAYERS = 2**31 - 1, 10_000
"""Of any whole number, as arrays are indexed with 32 bits, and of layers, of which lists are made before any weight is seen.
A file that asks for more is broken or meant to exhaust the memory."""

ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",  # the same function with its constants rounded differently
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
ACTIVATION_NAMES: Mapping[Activation, str] = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}


class Fields:
    """The fields of one config.json.

    A method that finds a problem notes it and returns a stand-in, so that one reading meets all problems; `finish`
    raises them together. A field that is absent or null takes the default; without a default it must be there.
    """

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self._raw = raw
        self._source = source
        self._problems: list[str] = []

    def integer(self, name: str, default: int = _REQUIRED, *, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        value = self._value(name, default)
        if value is _REQUIRED:
            return 1
        if type(value) is not int or value < minimum:
            self.problem(f"{name} is {shown(value)}: it must be an integer of at least {minimum}")
            return 1
        if value > maximum:
            self.problem(f"{name} is {shown(value)}: it must be an integer of at most {maximum}")
            return 1
        return value

    def layers(self, name: str) -> int:
        """How many blocks there are."""
        return self.integer(name, maximum=MAX_LAYERS)

    def number(self, name: str, default: float = _REQUIRED, *, maximum: float = sys.float_info.max) -> float:
        """A positive number."""
        value = self._value(name, default)
        if value is _REQUIRED:
            return 1.0
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:  # integers may be larger
            self.problem(f"{name} is {shown(value)}: it must be a positive number")
            return 1.0
        if value > maximum:
            self.problem(f"{name} is {shown(value)}: it must be at most {maximum:g}")
            return 1.0
        return float(value)

    def integer_or_none(self, name: str, absent: int | None) -> int | None:
        """null is None; a field that is not there takes the value of `absent`."""
        if self._raw.get(name, _REQUIRED) is _REQUIRED:
            return absent
        return self.integer(name) if self.has(name) else None

    def number_or_none(self, name: str, absent: float | None) -> float | None:
        """null is None; a field that is not there takes the value of `absent`."""
        if self._raw.get(name, _REQUIRED) is _REQUIRED:
            return absent
        return self.number(name) if self.has(name) else None

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of positive numbers."""
        value = self._value(name, _REQUIRED)
        if value is _REQUIRED:
            return ()
        if not isinstance(value, list) or not all(
            type(one) in (int, float) and 0 < one <= sys.float_info.max for one in value
        ):
            self.problem(f"{name} is {shown(value)}: it must be a list of positive numbers")
            return ()
        return tuple(float(one) for one in value)

    def flag(self, name: str, default: bool = _REQUIRED) -> bool:
        value = self._value(name, default)
        if value is _REQUIRED:
            return False
        if type(value) is not bool:
            self.problem(f"{name} is {shown(value)}: it must be true or false")
            return False
        return value

    def choice(self, name: str, choices: Mapping[str, T], default: str = _REQUIRED) -> T:
        value = self._value(name, default)
        if isinstance(value, str) and value in choices:  # a list or an object has no hash to look it up by
            return choices[value]
        if value is not _REQUIRED:
            self.problem(f"{name} is {shown(value)}: supported are {', '.join(choices)}")
        return next(iter(choices.values()))

    def choices(self, name: str, choices: Mapping[str, T], default: Sequence[T]) -> tuple[T, ...]:
        """A list of as many entries as the default, which is taken where the field is absent or null."""
        value = self._value(name, None)
        if value is None:
            return tuple(default)
        if not isinstance(value, list) or any(not isinstance(one, str) or one not in choices for one in value):
            self.problem(f"{name} is {shown(value)}: it must be a list of {' and '.join(choices)}")
            return tuple(default)
        if len(value) != len(default):
            self.problem(f"{name} has {len(value)} entries: there must be {len(default)}")
            return tuple(default)
        return tuple(choices[one] for one in value)

    def token_id(self, name: str) -> int | None:
        ids = self.token_ids(name)
        if len(ids) > 1:
            self.problem(f"{name} is {list(ids)}: it must be one token id")
        return ids[0] if ids else None

    def token_ids(self, name: str) -> tuple[int, ...]:
        """None, one id or several; -1 means none, as in some old files."""
        value = self._raw.get(name)
        ids = value if isinstance(value, list) else [value]
        if not all(one is None or (type(one) is int and -1 <= one <= MAX_SIZE) for one in ids):
            self.problem(f"{name} is {shown(value)}: it must be a token id or null")
            return ()
        return tuple(one for one in ids if one is not None and one >= 0)

    def section(self, name: str) -> Fields | None:
        """A nested object, read with the same care; its problems are noted here."""
        value = self._raw.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.problem(f"{name} is {shown(value)}: it must be an object")
            return None
        nested = Fields(value, f"{self._source}: {name}")
        nested._problems = self._problems
        return nested

    def has(self, name: str) -> bool:
        return self._raw.get(name) is not None

    def must_be(self, name: str, *allowed: Any, why: str) -> None:
        """Refuse a field that changes the computation in a way that is not implemented; absent and null are allowed."""
        value = self._raw.get(name)
        if value is not None and value not in allowed:
            expected = " or ".join(repr(one) for one in allowed) or "absent"
            self.problem(f"{name} is {shown(value)}, but only {expected} is supported: {why}")

    def must_be_all(self, name: str, allowed: Any, *, why: str) -> None:
        """`must_be` for every entry of a list."""
        value = self._raw.get(name)
        if value is not None and (not isinstance(value, list) or any(one != allowed for one in value)):
            self.problem(f"{name} is {shown(value)}, but only {allowed!r} throughout is supported: {why}")

    def problem(self, message: str) -> None:
        if message not in self._problems:  # a field may be read twice
            self._problems.append(message)

    def finish(self) -> None:
        if self._problems:
            raise CheckpointError.listing(f"{self._source} describes a model that cannot be loaded:", self._problems)

    def _value(self, name: str, default: Any) -> Any:
        value = self._raw.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            self.problem(f"{name} is missing")
        return default
