"""The fields of one raw record, read one by one; everything that is wrong with them is collected, with its mend."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kedit_jax.editing.requests import SLOT, encodable
from kedit_jax.errors import shown
from kedit_jax.evaluation.records import Fact

Raw = Mapping[str, Any]


class Fields:
    """Reads fields of raw records. What is wrong goes to `problems`, and something of the right type comes back."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def text(self, raw: Raw, key: str, name: str | None = None) -> str:
        """A text with something other than blanks in it."""
        name, value = name or key, raw.get(key)
        if value is None:
            self.problems.append(f"{name!r} is missing")
        elif not isinstance(value, str):
            self.problems.append(f"{name!r} must be text, not {shown(value):.60}")
        elif not value.strip():
            self.problems.append(f"{name!r} is empty")
        elif not encodable(value):
            self.problems.append(f"{name!r} {shown(value):.60} holds half a character (a lone surrogate); write it as UTF-8")
        return value if isinstance(value, str) else ""

    def optional_text(self, raw: Raw, key: str, name: str | None = None) -> str | None:
        """A text as `text` reads it, or None where the record has none."""
        return None if raw.get(key) is None else self.text(raw, key, name)

    def optional(self, raw: Raw, key: str, name: str, kind: type) -> Any:
        """A value of `kind`, or None where the record has none."""
        value = raw.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            self.problems.append(f"{name!r} must be {kind.__name__} or left out, not {shown(value):.60}")
            return None
        return value

    def flag(self, raw: Raw, key: str) -> bool:
        """A truth value; False where the record has none."""
        value = raw.get(key, False)
        if not isinstance(value, bool):
            self.problems.append(f"{key!r} must be true or false, not {shown(value):.60}")
        return value is True

    def weight(self, raw: Raw) -> float:
        """A number > 0; 1 where the record has none."""
        value = raw.get("weight")
        if value is None:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            self.problems.append(
                f"'weight' must be a number > 0, not {shown(value):.60}; leave a fact out to give it no weight"
            )
            return 1.0
        return float(value)

    def mapping(self, raw: Raw, key: str, name: str, holds: str) -> Raw | None:
        """A nested object; None after a problem, so that its fields are not reported as missing too."""
        value = raw.get(key)
        if isinstance(value, Mapping):
            return value
        self.problems.append(f"{name!r} must be an object with {holds}, not {shown(value):.60}")
        return None

    def items(self, raw: Raw, key: str, required: bool = False) -> Sequence[Any]:
        """A list; an absent one is empty unless `required`."""
        value = raw.get(key)
        if value is None:
            if required:
                self.problems.append(f"{key!r} is missing; give a list of prompts (an empty one is not scored)")
            return ()
        if isinstance(value, str) or not isinstance(value, Sequence):
            self.problems.append(f"{key!r} must be a list, not {shown(value):.60}")
            return ()
        return value

    def prompts(self, raw: Raw, key: str, required: bool = False) -> tuple[str, ...]:
        """A list of non-empty texts."""
        found = self.items(raw, key, required)
        return tuple(self.text({"item": item}, "item", f"{key}[{i}]") for i, item in enumerate(found))

    def one_or_more(self, raw: Raw, key: str) -> tuple[str, ...]:
        """A non-empty text or a list of them; none where it is absent."""
        return (self.text(raw, key),) if isinstance(raw.get(key), str) else self.prompts(raw, key)

    def facts(self, raw: Raw, key: str) -> tuple[Fact, ...]:
        """A list of {prompt, target}, with aliases at will."""
        facts = []
        for i, item in enumerate(self.items(raw, key)):
            value = self.mapping({"item": item}, "item", f"{key}[{i}]", "'prompt' and 'target'")
            if value is not None:
                prompt, target = (self.text(value, name, f"{key}[{i}].{name}") for name in ("prompt", "target"))
                facts.append(Fact(prompt, target.strip(), self.prompts(value, "aliases")))
        return tuple(facts)

    def answers(self, raw: Raw, key: str, name: str | None = None, required: bool = False) -> tuple[str, ...]:
        """All texts of a text, a list, or a list of lists, without blanks around them; empty ones are left out."""
        name, found, leaves = name or key, [], list(_leaves(raw.get(key)))
        if required and all(isinstance(leaf, str) and not leaf.strip() for leaf in leaves):
            self.problems.append(f"{name!r} must be a list with at least one text")
        for leaf in leaves:
            if isinstance(leaf, str) and leaf.strip():
                found.append(self.text({"leaf": leaf}, "leaf", name).strip())
            elif not isinstance(leaf, str):
                self.problems.append(f"{name!r} must be text or lists of texts, not {shown(leaf):.60}")
        return tuple(dict.fromkeys(found))

    def template(self, raw: Raw, name: str) -> str:
        """A prompt with exactly one slot."""
        prompt = self.text(raw, "prompt", name)
        if prompt.strip() and prompt.count(SLOT) != 1:
            self.problems.append(
                f"{name!r} {prompt!r} has {prompt.count(SLOT)} slots; put exactly one {SLOT} at the subject"
            )
        return prompt

    def different(self, new: str, true: str | None, name: str) -> None:
        """Whether there is anything to write."""
        if new and new == true:
            self.problems.append(f"{name!r} {new!r} is also the true object; give another, or drop the record")

    def case_id(self, raw: Raw) -> int | str:
        """The record's name."""
        value = raw.get("case_id")
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            self.problems.append(f"'case_id' must be a number or a name, not {shown(value):.60}")
            return ""
        if isinstance(value, str) and not encodable(value):
            self.problems.append(f"'case_id' {value!r:.60} holds half a character (a lone surrogate); write it as UTF-8")
            return ""
        return value


def _leaves(value: Any) -> Iterator[Any]:
    """What stands in a value or in the lists in it."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value
