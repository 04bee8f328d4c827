"""Typed configs from YAML: every key declared, every problem of a file named at once.

An experiment's config is a frozen dataclass whose fields are the file's keys. A section `quick` holds what other keys become
in a quick run.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from kedit_jax.errors import KeditError

FOLDER = Path(__file__).resolve().parent
QUICK = "quick"

T = TypeVar("T")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises KeditError."""
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise KeditError(f"cannot read {path.name}: {error}") from error
    if not isinstance(stored, dict):
        raise KeditError(f"{path.name} holds {type(stored).__name__}, not names and values")
    return stored


def read_config(kind: type[T], path: Path, *, quick: bool = False) -> T:
    """A config of this kind from a file.

    Raises:
        KeditError: listing unknown and missing keys, values of the wrong type, and what the config itself objects to.
    """
    stored = read_yaml(path)
    changes = stored.pop(QUICK, {})
    problems = []
    if not isinstance(changes, Mapping):
        problems.append(f"{QUICK} is {changes!r}; write the keys that change under it")
        changes = {}
    problems += [f"{QUICK}.{name} changes nothing: there is no such key" for name in changes if name not in _fields(kind)]
    made, found = built(kind, {**stored, **changes} if quick else stored)
    problems += found
    if not quick:  # what a quick run would be is checked, too, or it would break unnoticed
        known = {name: value for name, value in changes.items() if name in _fields(kind)}
        problems += [f"{QUICK}: {problem}" for problem in built(kind, {**stored, **known})[1] if problem not in found]
    if problems:
        raise KeditError.listing(f"{path.name}: unusable config:", problems)
    assert made is not None  # noqa: S101
    return made


def built(kind: type[T], stored: Mapping[str, Any], where: str = "") -> tuple[T | None, list[str]]:
    """The dataclass made of a mapping, or None and all that is wrong with it."""
    declared = _fields(kind)
    problems = [
        f"unknown key {where}{name}; there are {', '.join(declared)}, {QUICK}" if not where else f"unknown key {where}{name}"
        for name in stored
        if name not in declared
    ]
    values = {}
    hints = get_type_hints(kind)
    for name, item in declared.items():
        if name in stored:
            values[item.name], found = _value(hints[item.name], stored[name], f"{where}{name}")
            problems += found
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            problems.append(f"{where}{name} is missing")
    if problems:
        return None, problems
    try:
        return kind(**values), []
    except KeditError as error:
        return None, [str(error)]


def _fields(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    """Fields by the key that they have in a file, their own name but for reserved words."""
    return {item.metadata.get("key", item.name): item for item in dataclasses.fields(kind)}


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _value(kind: Any, value: Any, where: str) -> tuple[Any, list[str]]:
    """The value as its field declares it, and what is wrong with it."""
    if kind is Any:
        return value, []
    if isinstance(kind, UnionType):
        if value is None and NoneType in get_args(kind):
            return None, []
        return _value(next(option for option in get_args(kind) if option is not NoneType), value, where)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            return None, [f"{where} is {value!r}; it must be a list"]
        inner = get_args(kind)[0]
        parts = [_value(inner, part, f"{where}[{number}]") for number, part in enumerate(value)]
        return tuple(part for part, _ in parts), [problem for _, found in parts for problem in found]
    if get_origin(kind) is Mapping or get_origin(kind) is dict:
        if not isinstance(value, dict):
            return None, [f"{where} is {value!r}; it must hold names and values"]
        inner = get_args(kind)[1]
        pairs = {str(name): _value(inner, part, f"{where}.{name}") for name, part in value.items()}
        return {name: part for name, (part, _) in pairs.items()}, [p for _, found in pairs.values() for p in found]
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            return None, [f"{where} is {value!r}; it must hold names and values"]
        return built(kind, value, f"{where}.")  # type: ignore[arg-type]
    right = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value), []
    return (value, []) if right else (None, [f"{where} is {value!r}; it must be {_NAMES.get(kind, kind.__name__)}"])


def check(*rules: tuple[bool, str]) -> None:
    """Raise a KeditError that lists the rules (holds, what to say otherwise) that do not hold."""
    broken = [text for holds, text in rules if not holds]
    if broken:
        raise KeditError("; ".join(broken))
