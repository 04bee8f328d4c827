"""What a stored session says of itself, checked before anything is made of it: it may come from anyone."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from kedit_jax.editing.packed import Sizes
from kedit_jax.editing.requests import encodable, request_problems
from kedit_jax.editing.settings import EditSettings
from kedit_jax.errors import KeditError, shown

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_MOST = 2**31

KINDS = ("edit", "replace", "retract", "restore", "merge", "compact", "undo", "rollback")
"""Of events."""


def manifest_problems(manifest: Mapping[str, Any]) -> list[str]:
    """Everything because of which no session, and no history, can be read from a manifest; of any format."""
    found = _Problems(manifest, "")
    _check_model(found)
    found.check("moments", _is_fingerprint, "a sha256, which names a file")
    found.check("arrays", _is_text, "a text")
    found.check("prefixes", _list_of(_is_text), "a list of texts")
    count = {which: _check_facts(found, which) for which in ("facts", "retired", "skipped")}["facts"]
    found.check("compacted", lambda value: _whole(value, count), f"a number from 0 to {count}", optional=True)
    fits = _list_of(_whole)
    found.check("batches", lambda value: fits(value) and sum(value) <= count, f"numbers that add up to at most {count}")
    found.check("sizes", _are_sizes, f"null, or numbers named {', '.join(Sizes._fields)}", optional=True)
    events = _check_events(found)
    found.check(
        "times",
        lambda value: _list_of(_is_text)(value) and len(value) == events,
        f"a list of {events} texts, one for each event",
        optional=True,
    )
    _check_settings(found)
    return found.said


class _Problems:
    """The fields of an object, and what is wrong with them."""

    def __init__(self, content: Mapping[str, Any], where: str, said: list[str] | None = None) -> None:
        self.content, self.where = content, where
        self.said: list[str] = [] if said is None else said

    def check(self, name: str, good: Callable[[Any], bool], what: str, *, optional: bool = False) -> bool:
        """Whether a field is there and good; an optional one may be missing."""
        if name not in self.content:
            if not optional:
                self.said.append(f"{self.where}{name} is missing")
            return optional
        if good(self.content[name]):
            return True
        self.said.append(f"{self.where}{name} is {shown(self.content[name])}; it must be {what}")
        return False

    def within(self, content: Mapping[str, Any], where: str) -> "_Problems":
        """The fields of an object inside this one; problems are noted here."""
        return _Problems(content, where, self.said)


def _check_model(found: _Problems) -> None:
    if found.check("model", _is_object, "an object"):
        model = found.within(found.content["model"], "model.")
        for name in ("fingerprint", "family", "dtype"):
            model.check(name, _is_text, "a text")
        model.check("n_layers", _whole, "a whole number")
        model.check("kernel", lambda value: _list_of(_whole)(value) and len(value) == 2, "two whole numbers")
    if found.check("priors", _is_object, "an object"):
        for layer in found.content["priors"]:
            if found.within(found.content["priors"], "priors.").check(layer, _is_object, "an object"):
                prior = found.within(found.content["priors"][layer], f"priors.{shown(layer)}.")
                prior.check("fingerprint", _is_text, "a text")
                prior.check("norm", _is_size, "a number > 0")


def _check_facts(found: _Problems, which: str) -> int:
    """How many there are."""
    if which not in found.content and which != "facts":  # which came with format 2
        return 0
    if not found.check(which, lambda value: isinstance(value, list), "a list"):
        return 0
    facts = found.content[which]
    for number, fact in enumerate(facts, 1):
        if not isinstance(fact, Mapping):
            found.said.append(f"{which}: number {number} is {shown(fact)}; it must be an object")
            continue
        found.said += [f"{which}: number {number}: {problem}" for problem in request_problems(fact)]
        if not isinstance(fact.get("id"), str):
            found.said.append(f"{which}: number {number} has no id")
    return len(facts)


def _check_events(found: _Problems) -> int:
    """How many there are."""
    if not found.check("events", lambda value: isinstance(value, list), "a list"):
        return 0
    texts = _list_of(_is_text)
    for number, content in enumerate(found.content["events"], 1):
        if not isinstance(content, Mapping):
            found.said.append(f"event {number} is {shown(content)}; it must be an object")
            continue
        event = found.within(content, f"event {number}: ")
        event.check("kind", lambda value: isinstance(value, str) and value in KINDS, f"one of {', '.join(KINDS)}")
        event.check("ids", texts, "a list of texts")
        for name in ("replaced", "skipped", "texts"):
            event.check(name, texts, "a list of texts", optional=True)
        event.check("reason", _is_text, "a text", optional=True)
        earlier = number - 1
        undone = event.content.get("undoes")
        if not (undone is None or (_whole(undone, earlier) and undone > 0)):
            found.said.append(f"event {number}: undoes is {shown(undone)}; it must be null or from 1 to {earlier}")
    return len(found.content["events"])


def _check_settings(found: _Problems) -> None:
    if found.check("settings", _is_object, "an object"):
        try:
            settings = EditSettings.from_dict(found.content["settings"])
        except KeditError as error:
            found.said.append(f"settings: {error}")
            return
        priors = found.content.get("priors")
        if isinstance(priors, Mapping):
            lacking = [str(layer) for layer in settings.layers if str(layer) not in priors]
            found.said += [f"priors lack layer {layer}, which the settings name" for layer in lacking]


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and encodable(value)


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, str) and _FINGERPRINT.fullmatch(value) is not None


def _whole(value: Any, most: int = _MOST) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_size(value: Any) -> bool:
    return (type(value) is int and 0 < value < _MOST) or (type(value) is float and math.isfinite(value) and value > 0)


def _list_of(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(good, value))


def _are_sizes(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, Mapping) and set(value) == set(Sizes._fields) and all(map(_whole, value.values()))
