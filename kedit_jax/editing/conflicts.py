"""Facts that contradict each other: found before any value is optimised, resolved under a policy that the user names.

Two facts conflict when they give the same subject, under the same relation or prompt, different targets; or, where a
threshold is stated, when their keys in the first edited layer are that close and their targets differ. (That layer's keys
depend on no edited kernel, so they never drift.) What is done about it (Prop. 3.5 of "The Labyrinth and the Thread"):

| policy | the fact there is | the new fact |
| --- | --- | --- |
| `keep` | stays | is written beside it; the solve finds a compromise |
| `latest` | leaves the set of constraints | is written |
| `first` | stays | is skipped |
| `merge` | stays | is written under the key of the first, so that the value there is their weighted mean |
| `reject` | stays | is an error that names both |
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Float

from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.settings import POLICIES
from kedit_jax.errors import RequestError


@dataclass(frozen=True)
class Conflict:
    """A new fact and one before it, in the history or in the same batch, that it contradicts.

    Attributes:
        cosine: of their keys, where that is how the conflict was found.
    """

    new: EditRequest
    old: EditRequest
    in_batch: bool
    cosine: float | None = None

    def __str__(self) -> str:
        how = "the same subject and relation" if self.cosine is None else f"keys of cosine {self.cosine:.4f}"
        where = "of the same batch" if self.in_batch else "of the session"
        return (
            f"{self.new.id}: {self.new.text!r} -> {self.new.target!r} contradicts {self.old.id} {where}: "
            f"{self.old.text!r} -> {self.old.target!r} ({how})"
        )


@dataclass(frozen=True)
class Plan:
    """What editing a batch would do, decided before anything is computed.

    Attributes:
        policy: by which conflicts are resolved.
        conflicts: all that were found, in the order of the batch.
        written: the facts that would be written.
        replaced: ids of the session's facts that would leave.
        skipped: facts of the batch that would not be written.
        shared: id of a written fact -> id of the fact under whose key it would be written.
    """

    policy: str
    conflicts: tuple[Conflict, ...]
    written: tuple[EditRequest, ...]
    replaced: tuple[str, ...]
    skipped: tuple[EditRequest, ...]
    shared: Mapping[str, str]

    def lines(self) -> list[str]:
        """What would happen, a sentence a conflict, for a person to read."""
        done = {"keep": "both stand", "latest": "the earlier one leaves", "first": "the new one is skipped"}
        done |= {"merge": "both share the earlier one's key", "reject": "refused"}
        return [f"{conflict}: {done[self.policy]}" for conflict in self.conflicts]


def find_conflicts(
    batch: Sequence[EditRequest],
    held: Sequence[EditRequest],
    *,
    similarity: float | None = None,
    batch_keys: Float[np.ndarray, "u k"] | None = None,
    held_keys: Float[np.ndarray, "m k"] | None = None,
) -> list[Conflict]:
    """Every pair of a new fact and one before it that contradict each other.

    Args:
        batch: new facts; each is compared with those of the history and with those before it in the batch.
        held: the history's facts.
        similarity: cosine from which on keys count as the same; needs the keys of both, row by row.
    """
    before = [*held, *batch]
    close = _cosines(batch_keys, held_keys) if similarity is not None else None
    by_name: dict[tuple[str, str, str], list[int]] = {}
    for position, fact in enumerate(held):
        _index(by_name, fact, position)
    found = []
    for number, new in enumerate(batch):
        position = len(held) + number
        named = set(chain.from_iterable(by_name.get(name, ()) for name in _names(new)))
        near: set[int] = set()
        if close is not None and similarity is not None:
            near = set(np.flatnonzero(close[number, :position] >= similarity).tolist())
        for other in sorted(named | near):
            if before[other].target.strip() != new.target.strip():
                cosine = float(close[number, other]) if close is not None and other not in named else None
                found.append(Conflict(new, before[other], other >= len(held), cosine))
        _index(by_name, new, position)
    return found


def resolve(batch: Sequence[EditRequest], conflicts: Sequence[Conflict], policy: str) -> Plan:
    """What to write, replace and skip under a policy.

    Raises:
        RequestError: an unknown policy, or `reject` and there are conflicts: all of them are listed.
    """
    if policy not in POLICIES:
        raise RequestError(f"conflicts {policy!r} is no policy; there are {', '.join(POLICIES)}")
    if policy == "reject" and conflicts:
        raise RequestError.listing(
            "facts that contradict each other; drop one of each two, or choose another policy:", [str(c) for c in conflicts]
        )
    skipped: set[str] = set()
    replaced: dict[str, None] = {}
    shared: dict[str, str] = {}
    for conflict in conflicts:
        new, old = str(conflict.new.id), str(conflict.old.id)
        if policy == "latest" and conflict.in_batch:
            skipped.add(old)
        elif policy == "latest":
            replaced[old] = None
        elif policy == "first" and old not in skipped:
            skipped.add(new)
        elif policy == "merge":
            shared.setdefault(new, shared.get(old, old))
    return Plan(
        policy,
        tuple(conflicts),
        tuple(fact for fact in batch if str(fact.id) not in skipped),
        tuple(replaced),
        tuple(fact for fact in batch if str(fact.id) in skipped),
        shared,
    )


def _names(fact: EditRequest) -> Iterable[tuple[str, str, str]]:
    """What a fact is about; two facts that share one of these are about the same."""
    yield ("prompt", fact.prompt.strip(), fact.subject.strip())
    if fact.relation is not None:
        yield ("relation", fact.relation.strip(), fact.subject.strip())


def _index(by_name: dict[tuple[str, str, str], list[int]], fact: EditRequest, position: int) -> None:
    for name in _names(fact):
        by_name.setdefault(name, []).append(position)


def _cosines(batch: Float[np.ndarray, "u k"] | None, held: Float[np.ndarray, "m k"] | None) -> Float[np.ndarray, "u mu"]:
    """Cosines of the batch's keys with those of the history and of the batch itself."""
    if batch is None or held is None:
        raise RequestError("a similarity threshold needs the keys of the batch and of the history")
    every = np.concatenate([held, batch]).astype(np.float64)
    unit = every / np.maximum(np.linalg.norm(every, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return unit[len(held) :] @ unit.T
