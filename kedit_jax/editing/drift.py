"""How far keys have moved since they were recorded: the part of sequential editing that no solve can account for.

The keys of an edited layer depend on the layers below it. The first edited layer's never move; those of the others do
whenever a later batch edits a lower layer, and their recorded constraints then hold at keys that the model no longer makes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from kedit_jax.editing import keys as reading
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import SessionError
from kedit_jax.models.spread import apart, together


@dataclass(frozen=True, eq=False)
class Drift:
    """One layer's keys now, against the recorded ones.

    Attributes:
        ids: the facts, in the session's order; those that were compacted have no recorded key.
        relative: [m] |k_now - k_recorded| / |k_recorded| for each fact.
        cosine: [m] of both keys.
    """

    ids: tuple[str, ...]
    relative: Float[np.ndarray, " m"]
    cosine: Float[np.ndarray, " m"]

    @property
    def mean(self) -> float:
        return float(self.relative.mean())

    @property
    def largest(self) -> float:
        return float(self.relative.max())


def key_drift(session: EditSession) -> Mapping[int, Drift]:
    """Read the keys of all facts in the edited model and compare them with the recorded ones, for every edited layer.

    A fact that was merged or replaced is recorded under another fact's key, or an earlier one, and shows that as drift.

    Raises:
        SessionError: no fact with a recorded key.
    """
    ids = tuple(str(fact.id) for fact in session.facts[session.compacted :])
    return {
        layer: _compare(ids, now, np.asarray(session.layers[layer].constraints.keys))
        for layer, now in keys_now(session).items()
    }


def keys_now(session: EditSession) -> Mapping[int, Float[np.ndarray, "m k"]]:
    """The keys that the edited model makes of the recorded facts, for every edited layer, float64.

    Raises:
        SessionError: no fact with a recorded key.
    """
    facts = session.facts[session.compacted :]
    if not facts:
        raise SessionError("the session records no keys: it holds no facts, or all of them were compacted")
    batches, model, top = session._micro_batches(facts), session.model, session.settings.layers[-1]
    spread, layouts = model.spread, batches.layouts
    streams, at, found = [reading.enter(model, stack) for stack in together(spread, layouts)], 0, {}
    for layer in session.settings.layers:
        read = [reading.read(model, stream, at, layer, top, layouts[0].n_contexts) for stream in streams]
        streams, at = [stream for stream, _ in read], layer
        found[layer] = batches.gathered(apart(spread, [r.keys for _, r in read], len(layouts))).astype(np.float64)
    return found


def _compare(ids: tuple[str, ...], now: np.ndarray, recorded: np.ndarray) -> Drift:
    before = np.asarray(recorded, np.float64)
    length, length_now = np.linalg.norm(before, axis=1), np.linalg.norm(now, axis=1)
    cosine = np.sum(now * before, axis=1) / (length * length_now)
    return Drift(ids, np.linalg.norm(now - before, axis=1) / length, cosine)
