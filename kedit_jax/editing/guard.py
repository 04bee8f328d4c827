"""A guard against collapse: what must hold of a model after a step, or the step is not kept.

Sequential editing fails suddenly: a batch drives a kernel far from where it was, and the model's text falls apart with all
facts in it. A guard probes the session after every step, or every few, and gives back the one before where a number is out
of bounds. What is left of the step is an event that says why, and its facts among those that were skipped.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kedit_jax.delta import EditDelta
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, Event, difference_of
from kedit_jax.errors import KeditError, NonFiniteError


@dataclass(frozen=True)
class Probe:
    """A number of a session, and where it must lie. NaN lies nowhere.

    Attributes:
        name: of the number, as the history will say it.
        measure: of the session after a step; a NonFiniteError is a breach, too.
    """

    name: str
    measure: Callable[[EditSession], float]
    at_least: float = -math.inf
    at_most: float = math.inf

    def breach(self, session: EditSession) -> str | None:
        """What is out of bounds, in words; None where nothing is."""
        try:
            value = self.measure(session)
        except NonFiniteError as error:
            return f"{self.name}: {error}"
        if self.at_least <= value <= self.at_most:
            return None
        limit = f"at least {self.at_least:.4g}" if value < self.at_least else f"at most {self.at_most:.4g}"
        return f"{self.name} is {value:.4g}, and must be {limit}"


def finite() -> Probe:
    """That no update holds NaN or infinity: the number of those that do must be 0."""

    def measure(session: EditSession) -> float:
        return float(sum(np.size(held.update) - np.isfinite(held.update).sum() for held in session.layers.values()))

    return Probe("values of the update that are not finite", measure, at_most=0.0)


def relative_norm(at_most: float) -> Probe:
    """That no layer's update outgrows its kernel: the largest |update|_F / |original kernel|_F over the edited layers.

    Raises:
        KeditError: a limit that is not above 0.
    """
    if not at_most > 0:
        raise KeditError(f"the norm of an update must be allowed to be above 0, not {at_most}")

    def measure(session: EditSession) -> float:
        return max(
            float(np.linalg.norm(held.update) / np.linalg.norm(np.asarray(session.site(layer).kernel, np.float64)))
            for layer, held in session.layers.items()
        )

    return Probe("norm of the update over that of its kernel", measure, at_most=at_most)


def edit_guarded(
    session: EditSession,
    batches: Sequence[Sequence[EditRequest]],
    probes: Sequence[Probe],
    *,
    conflicts: str | None = None,
    similarity: float | None = None,
) -> tuple[EditSession, EditDelta, tuple[str, ...]]:
    """Write some batches, then probe; all of them stay, or none.

    Args:
        batches: several where probing costs more than a step, so that it is done every so many.
        probes: of the session after the last batch.
        conflicts, similarity: as for `EditSession.edit`.

    Returns:
        The session afterwards, this step's delta, and what was out of bounds. After a breach, or numbers of a step that are
        not finite, it is the session before with the event `rollback` and the facts among the skipped; the delta is empty.

    Raises:
        As `EditSession.edit`, but for what is not finite.
    """
    named = session._named([request for batch in batches for request in batch])
    after, breaches, begin = session, [], 0
    try:
        for batch in batches:
            after, _ = after.edit(named[begin : begin + len(batch)], conflicts=conflicts, similarity=similarity)
            begin += len(batch)
        breaches = [said for probe in probes if (said := probe.breach(after)) is not None]
    except NonFiniteError as error:
        breaches = [str(error)]
    if not breaches:
        return after, difference_of(session, after), ()
    event = Event("rollback", (), skipped=tuple(str(request.id) for request in named), reason="; ".join(breaches))
    kept = dataclasses.replace(session, events=(*session.events, event), skipped=(*session.skipped, *named))
    return kept, EditDelta({}), tuple(breaches)
