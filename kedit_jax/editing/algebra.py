"""History as an algebra: sessions of one model are merged, subtracted, undone and compacted.

All of it follows from one fact: a session's update is the one-time edit of its SET of constraints, whatever the order in
which they came (Lemma 3.1 and Prop. 3.5 of "The Labyrinth and the Thread"). So the union of two sets is the merged session,
a set without some of its elements is the session that never had them, and no value is ever optimised anew.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from kedit_jax import solve
from kedit_jax.delta import EditDelta
from kedit_jax.editing import history as histories
from kedit_jax.editing.conflicts import Plan, find_conflicts, resolve
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, Event, difference_of, texts_of
from kedit_jax.errors import SessionError


def merge(
    first: EditSession, second: EditSession, *, conflicts: str | None = None, prefix: str | None = None
) -> tuple[EditSession, EditDelta]:
    """The one-time edit of the union of two sessions' constraints. Facts that both hold, as after a fork, count once.

    Without conflicts the order of the two does not matter (to rounding); where facts contradict each other, those of
    `second` count as the later ones. Facts keep the target values that they were recorded with.

    Args:
        first: goes on with its history.
        second: of the same model, moments, settings and prefixes.
        conflicts: a policy of `kedit_jax.editing.conflicts`; the settings' by default.
        prefix: put before ids of `second` that other facts of `first` bear.

    Returns:
        The merged session, and the delta that takes `first` to it.

    Raises:
        SessionError: sessions that do not fit together, history that is not aligned, a compacted `second`, or ids of
            different facts that clash; all are listed.
        RequestError: conflicts under the policy `reject`.
    """
    _check_pair(first, second)
    if second.compacted:
        raise SessionError(
            "the second session is compacted, so that its facts are known together only; merge into it instead"
        )
    new = np.array([not _holds(first, second, number) for number in range(len(second.facts))], bool)
    facts = _renamed(first, [fact for fact, is_new in zip(second.facts, new, strict=True) if is_new], prefix)
    plan = resolve(facts, find_conflicts(facts, first.facts), conflicts or first.settings.policy)
    first._check_plan(plan)
    merged = first._without(plan.replaced) if plan.replaced else first
    written = np.isin([str(fact.id) for fact in facts], [str(fact.id) for fact in plan.written])
    if written.any():
        merged = _with_rows(merged, second, np.flatnonzero(new)[written], plan)
    event = Event("merge", _ids(plan.written), plan.replaced, _ids(plan.skipped), texts=texts_of(plan.written))
    merged = dataclasses.replace(merged, events=(*first.events, event), skipped=(*first.skipped, *plan.skipped))
    return merged, difference_of(first, merged)


def difference(session: EditSession, other: EditSession) -> tuple[EditSession, EditDelta]:
    """The session without the facts that `other` holds as well, constraint for constraint.

    Raises:
        SessionError: sessions that do not fit together, or have nothing in common to take away.
    """
    _check_pair(session, other)
    common = [str(fact.id) for number, fact in enumerate(session.facts) if _holds(other, session, number)]
    if not common:
        raise SessionError("the two sessions have no fact in common, so there is nothing to take away")
    return session.retract(common)


def undo(session: EditSession) -> tuple[EditSession, EditDelta]:
    """The session before its last event; once more, the one before that.

    The history is not rewritten: undoing is an event of its own. An edit that replaced nothing is undone bit for bit.

    Raises:
        SessionError: nothing to undo, or an event that cannot be undone: `compact` gave up what it would take.
    """
    number = _last_standing(session.events)
    if number is None:
        raise SessionError("nothing to undo: every event of the session is undone already, or there is none")
    event = session.events[number]
    if event.kind == "compact":
        raise SessionError(
            f"event {number + 1} compacted the session and cannot be undone: single facts are not known any more"
        )
    came, went = (event.ids, event.replaced) if event.kind != "retract" else ((), event.ids)
    # Found before anything else is retired: an id that the event replaced by itself has two versions afterwards.
    places = [session._retired_at(name) for name in went]
    before = session._without(came) if came else session
    if came and event.kind != "restore":
        before, places = _set_aside(before, len(came)), [place + len(came) for place in places]
    if places:
        before = before._with_retired(places)
    undone = Event("undo", event.ids, event.replaced, undoes=number + 1)
    before = dataclasses.replace(before, events=(*session.events, undone))
    return before, difference_of(session, before)


def compact(session: EditSession) -> EditSession:
    """The same edit in memory that does not grow with the number of facts: constraints become sufficient statistics.

    The model stays as it is and can be edited further, still equal to the one-time edit of everything. What is given up, for
    good: the facts so far can no longer be retracted, replaced, restored or merged, nor their keys' drift be measured.

    Raises:
        SessionError: a history that is not aligned, nothing to compact, or equality constraints, which have no statistics.
    """
    if session.settings.history != "aligned":
        raise SessionError(f"a session with history {session.settings.history!r} keeps no history that could be compacted")
    if len(session.facts) == session.compacted:
        raise SessionError("the session has no facts that are not compacted already")
    if any(float(editor.noise) == 0 for editor in session.editors.values()):
        raise SessionError(
            "equality constraints (noise 0) weigh infinitely and have no sufficient statistics; keep the session"
        )
    with solve.float64():
        layers = {layer: histories.compacted(held, session.site(layer)) for layer, held in session.layers.items()}
    event = Event("compact", _ids(session.facts[session.compacted :]))
    return dataclasses.replace(
        session,
        layers=layers,
        batches=(),
        events=(*session.events, event),
        retired=(),
        compacted=len(session.facts),
    )


def _check_pair(first: EditSession, second: EditSession) -> None:
    same = {
        "model": first.moments.model == second.moments.model,
        "settings": first.settings == second.settings,
        "prefixes": first.prefixes == second.prefixes,
        "moments": first.moments.fingerprint(first.settings.layers) == second.moments.fingerprint(second.settings.layers),
    }
    different = [f"their {name} differ" for name, holds in same.items() if not holds]
    if first.settings.history != "aligned":
        different.append(f"their history is {first.settings.history!r}; only aligned sessions know their constraints")
    if different:
        raise SessionError.listing("the two sessions cannot be combined:", different)


def _holds(session: EditSession, other: EditSession, number: int) -> bool:
    """Whether the session holds fact `number` of the other one, with the same constraint in every layer."""
    fact = other.facts[number]
    here = [place for place, held in enumerate(session.facts) if held == fact]
    if not here or here[0] < session.compacted or number < other.compacted:
        return bool(here) and here[0] < session.compacted and number < other.compacted
    mine, theirs = here[0] - session.compacted, number - other.compacted
    return all(
        np.array_equal(ours, others)
        for layer, held in session.layers.items()
        for ours, others in zip(_row(held, mine), _row(other.layers[layer], theirs), strict=True)
    )


def _row(held: histories.LayerHistory, number: int) -> list[np.ndarray]:
    return jax.tree.leaves(solve.take(held.constraints, np.array([number])))


def _renamed(first: EditSession, facts: Sequence[EditRequest], prefix: str | None) -> list[EditRequest]:
    """The facts, none with an id of the first session."""
    taken = {str(fact.id) for fact in first.facts}
    clashing = [str(fact.id) for fact in facts if str(fact.id) in taken]
    if not clashing:
        return list(facts)
    if prefix is None:
        raise SessionError(
            f"different facts of both sessions are named {', '.join(clashing[:5])}{' ...' if len(clashing) > 5 else ''}; "
            "give a prefix for those of the second"
        )
    renamed = [dataclasses.replace(fact, id=f"{prefix}{fact.id}") if str(fact.id) in taken else fact for fact in facts]
    taken |= {str(fact.id) for fact in facts if str(fact.id) not in taken}
    still = sorted({str(fact.id) for fact in renamed} & {str(fact.id) for fact in first.facts})
    if still or len({fact.id for fact in renamed}) < len(renamed):
        raise SessionError(f"the prefix {prefix!r} does not tell the ids apart; choose another")
    return renamed


def _with_rows(merged: EditSession, second: EditSession, places: np.ndarray, plan: Plan) -> EditSession:
    """The session with these rows of the second one's constraints appended, as one batch of the plan's facts."""
    held = {str(fact.id): number for number, fact in enumerate(merged.facts[merged.compacted :])}
    batch = {name: number for number, name in enumerate(_ids(plan.written))}
    layers = {}
    with solve.float64():
        for layer, history in merged.layers.items():
            site = merged.site(layer)
            block = solve.take(second.layers[layer].constraints, places)
            keys = block.keys.copy()
            for new, old in plan.shared.items():
                source = np.asarray(history.constraints.keys)[held[old]] if old in held else keys[batch[old]]
                keys[batch[new]] = source
            # The target v = r + k W0 stays; under another key its residual is another one.
            residuals = block.residuals + (np.asarray(block.keys, np.float64) - keys) @ np.asarray(site.kernel, np.float64)
            layers[layer], _ = histories.extended(history, site, solve.Constraints(keys, residuals, block.noise))
    return dataclasses.replace(
        merged,
        layers=layers,
        facts=(*merged.facts, *plan.written),
        batches=(*merged.batches, len(plan.written)),
        reports=None,
    )._with_model()


def _set_aside(session: EditSession, count: int) -> EditSession:
    """The session whose last `count` retired facts are its first: they were written by an event that is undone.

    Where an earlier event took back a fact of the same id, that version stays the latest: undoing that event, and `restore`,
    bring it back, as they would have before.
    """
    order = np.roll(np.arange(len(session.retired)), count)
    layers = {
        layer: dataclasses.replace(held, retired=solve.take(held.retired, order)) for layer, held in session.layers.items()
    }
    return dataclasses.replace(session, layers=layers, retired=tuple(session.retired[place] for place in order))


def _last_standing(events: Sequence[Event]) -> int | None:
    """The last event that changed something and is neither an undo nor undone."""
    undone = {event.undoes for event in events}
    standing = [n for n, event in enumerate(events) if event.kind not in ("undo", "rollback") and n + 1 not in undone]
    return standing[-1] if standing else None


def _ids(facts: Sequence[EditRequest]) -> tuple[str, ...]:
    return tuple(str(fact.id) for fact in facts)
