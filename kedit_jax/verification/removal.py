"""Invariants 6 to 9: what is taken back was never there, what is replaced was always so (Prop. 3.5)."""

from collections.abc import Iterator
from typing import cast

import numpy as np

from kedit_jax import solve
from kedit_jax.verification.checks import Measured, worst
from kedit_jax.verification.problems import Problem, relative
from kedit_jax.verification.runs import BLOCK, FORMS, at_once, batches, check_all, in_steps, total

ROUNDS = 100
ACTIVE = 60


def any_subset_can_be_retracted(p: Problem) -> Measured:
    """6. Retracting any subset = a fresh fit on the rest. Control: nothing removed."""
    rng, (state, _) = np.random.default_rng(p.size), in_steps(p, batches(p))

    def compared() -> Iterator[Measured]:
        for share in (0.05, 0.5, 0.95):
            keep = rng.random(p.size) < share
            keep[0] = True
            fresh = at_once(p, p.block(keep))
            control = relative(at_once(p, p.all), fresh)
            yield Measured(relative(_total_of(p, state, keep), fresh), control)
            for form in FORMS:
                masked = solve.solve_active(p.prior, p.all, keep, form=form, dtype=p.dtype)
                yield Measured(relative(masked.update, at_once(p, p.block(keep), form)), control)

    return worst(compared())


def retracting_all_leaves_nothing(p: Problem) -> Measured:
    """7. Retracting everything gives exactly 0, over the update that was there. Control: one batch left in."""
    nothing, one_batch = np.zeros(p.size, bool), np.arange(p.size) < BLOCK
    size = np.linalg.norm(at_once(p, p.all))
    state, _ = in_steps(p, batches(p))

    def left(keep: np.ndarray) -> Iterator[float]:
        for form in FORMS:
            yield float(np.linalg.norm(solve.solve_active(p.prior, p.all, keep, form=form, dtype=p.dtype).update) / size)
        yield float(np.linalg.norm(_total_of(p, state, keep)) / size)

    return worst(Measured(*both) for both in zip(left(nothing), left(one_batch), strict=True))


def a_hundred_rounds_leave_no_trace(p: Problem) -> Measured:
    """8. 100 rounds of remove 20, add 20 = a fresh fit on what is left. Control: the last 20 not removed."""
    rng, active = np.random.default_rng(p.size), np.arange(ACTIVE)
    state, _ = in_steps(p, [active[i : i + BLOCK] for i in range(0, ACTIVE, BLOCK)])
    statuses = []
    for _ in range(ROUNDS):
        keep = np.ones(ACTIVE, bool)
        keep[rng.choice(ACTIVE, BLOCK, replace=False)] = False
        state, kept = _retained(state, np.pad(keep, (0, p.size - ACTIVE)))
        added = rng.choice(np.setdiff1d(np.arange(p.size), active), BLOCK, replace=False)
        gone, active = active[~keep], np.concatenate([active[keep], added])
        state, step = solve.step(state, p.prior, p.block(added), dtype=p.dtype)
        statuses += [kept, step.status]
    check_all(statuses)
    fresh = at_once(p, p.block(active))
    larger = at_once(p, p.block(np.concatenate([active, gone])))
    return Measured(relative(total(p, state), fresh), relative(larger, fresh))


def replacing_equals_refitting(p: Problem) -> Measured:
    """9. New values under old keys, and removing and adding again, = a fit of the new values. Control: the old values."""
    rows = batches(p)
    values = p.values.copy()
    values[-BLOCK:] += np.random.default_rng(p.size).normal(size=values[-BLOCK:].shape).astype(p.dtype)
    changed = solve.constraints(p.kernel, p.keys, values, p.weights)
    truth = p.truth(values=values)
    control = relative(at_once(p, p.all), truth)

    def compared() -> Iterator[Measured]:
        for form in FORMS:
            state, _ = in_steps(p, rows, form)
            replaced = total(p, solve.revalue(state, p.prior, changed))
            yield Measured(max(relative(replaced, at_once(p, changed, form)), relative(replaced, truth)), control)
        state, _ = in_steps(p, rows)
        shorter, kept = _retained(state, np.arange(p.size) < p.size - BLOCK)
        again, step = solve.step(shorter, p.prior, solve.take(changed, rows[-1]), dtype=p.dtype)
        check_all([kept, step.status])
        yield Measured(relative(total(p, again), truth), control)

    return worst(compared())


def _total_of(p: Problem, state: solve.State, keep: np.ndarray) -> np.ndarray:
    """The update of the state without the rows that are not kept."""
    retained, status = _retained(state, keep)
    solve.check(status)
    return total(p, retained)


def _retained(state: solve.State, keep: np.ndarray) -> tuple[solve.DualState, solve.Status]:
    return solve.retract(cast(solve.DualState, state), keep)  # dual is the form that `in_steps` takes by default
