"""The invariants in order, each with the problems it is checked on, and the loop over them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kedit_jax.errors import KeditError
from kedit_jax.verification import methods, regularizers, removal, sums
from kedit_jax.verification.checks import TOLERANCES, Check, Measured, worst
from kedit_jax.verification.problems import ALPHAEDIT, F32, F64, FAMILIES, Problem, problem
from kedit_jax.verification.runs import BLOCK, SINGLES

SIZE = SINGLES + 8 * BLOCK
THOUSANDS = 2000

Progress = Callable[[int, int], None]
Problems = Sequence[Problem]


@dataclass(frozen=True)
class Invariant:
    """A claim, how it is measured on one problem, and which problems it is about."""

    id: str
    name: str
    measure: Callable[[Problem], Measured]
    concerns: Callable[[Problem], bool]


def _short(p: Problem) -> bool:
    return p.size < THOUSANDS


def _any(p: Problem) -> bool:
    return True


def _alphaedit(p: Problem) -> bool:
    return p.family in ALPHAEDIT


def _regularized(p: Problem) -> bool:
    return p.family in regularizers.FAMILIES and _short(p)


def _everything_above(p: Problem) -> Measured:
    """13. All of 1 to 11 hold with AlphaEdit's H, at one tolerance."""
    return worst(invariant.measure(p) for invariant in _GENERAL)


_GENERAL = (
    Invariant("1", "sum of steps = one-time edit", sums.steps_sum_to_the_one_time_edit, _any),
    Invariant("2", "the same in independent NumPy", sums.steps_equal_an_independent_solve, _any),
    Invariant("3", "normal equations hold", sums.normal_equations_hold, _any),
    Invariant("4", "step = closed form, rank <= u", sums.steps_have_their_closed_form, _short),
    Invariant("5", "order and split do not matter", sums.order_and_split_do_not_matter, _short),
    Invariant("6", "retract any subset = fresh fit", removal.any_subset_can_be_retracted, _short),
    Invariant("7", "retract all = exactly 0", removal.retracting_all_leaves_nothing, _short),
    Invariant("8", "100 x remove, add = fresh fit", removal.a_hundred_rounds_leave_no_trace, _short),
    Invariant("9", "replaced values = fresh fit", removal.replacing_equals_refitting, _short),
    Invariant("10", "duplicate keys, other targets", sums.duplicates_are_solved, _short),
    Invariant("11", "dual form = primal form", sums.dual_equals_primal, _short),
)

INVARIANTS = (
    *_GENERAL,
    Invariant("12", "compensated: A D - B = E_t", methods.compensation_leaves_one_error, _short),
    Invariant("13a", "AlphaEdit: all of 1 to 11", _everything_above, _alphaedit),
    Invariant("13b", "AlphaEdit: D (I - P) = 0", sums.updates_stay_in_the_null_space, _alphaedit),
    Invariant("14", "convex R: sum = one-shot", regularizers.steps_sum_to_the_one_shot_solution, _regularized),
    Invariant("15a", "history left out is seen", methods.history_is_needed, _short),
    Invariant("15b", "gradient left out is seen", regularizers.gradient_is_needed, _regularized),
    Invariant("15c", "PRUNE uncompensated is seen", methods.prune_needs_compensation, _short),
    Invariant("15d", "RECT uncompensated is seen", methods.rect_needs_compensation, _short),
)


def generated() -> list[Problem]:
    """Every family in both dtypes, and one history of thousands."""
    short = [problem(family, m=SIZE, dtype=dtype) for dtype in (F64, F32) for family in FAMILIES]
    return [*short, *(problem("heavy-tailed", m=THOUSANDS, dtype=dtype) for dtype in (F64, F32))]


def verify_solver(progress: Progress | None = None) -> list[Check]:
    """The 15 invariants of the solver on generated problems, in float64 and float32, negative controls included.

    The work is float64 wherever the solver's is, whether or not the process has enabled it.

    Args:
        progress: called with (done, total).

    Returns:
        A check for each invariant and dtype that it has a tolerance in, in order; read `holds`.
    """
    return run(INVARIANTS, generated(), progress)


def run(invariants: Sequence[Invariant], problems: Problems, progress: Progress | None = None) -> list[Check]:
    """The checks of these invariants on those of the problems that each is about."""
    jobs = [
        (invariant, dtype.name, chosen)
        for invariant in invariants
        for dtype in (F64, F32)
        if TOLERANCES[invariant.id].concerns(dtype.name)
        and (chosen := [p for p in problems if p.dtype == dtype and invariant.concerns(p)])
    ]
    done, total = 0, sum(len(chosen) for _, _, chosen in jobs)
    checks = []
    for invariant, dtype, chosen in jobs:
        found = []
        for p in chosen:
            found.append(_measured(invariant, p))
            done += 1
            if progress is not None:
                progress(done, total)
        checks.append(_check(invariant, dtype, chosen, found))
    return checks


def _measured(invariant: Invariant, p: Problem) -> Measured:
    try:
        return invariant.measure(p)
    except (KeditError, np.linalg.LinAlgError):
        # A solve that reports failure is a check that does not hold, and the others still have something to say.
        return Measured(np.inf)


def _check(invariant: Invariant, dtype: str, problems: Problems, found: Sequence[Measured]) -> Check:
    """The error furthest beyond, or closest to, its tolerance, and the weakest control."""
    tolerances = [TOLERANCES[invariant.id].of(dtype, p.tau) for p in problems]
    errors = [each.error for each in found]
    error, tolerance = max(zip(errors, tolerances, strict=True), key=lambda pair: _strain(*pair))
    return Check(invariant.id, invariant.name, dtype, error, tolerance, worst(found).control)


def _strain(error: float, tolerance: float) -> float:
    """How much of the tolerance an error takes up."""
    if np.isnan(error):
        return np.inf
    if tolerance == 0:
        return 0.0 if error == 0 else np.inf
    return error / tolerance
