"""What a solve reports about itself: numerical failure is a value that the caller reads, never a silent NaN."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from kedit_jax.errors import SolverError
from kedit_jax.solve.arrays import AnyArray, record

LOST = 1e4
"""A pivot at or below LOST * eps leaves an update fewer than four digits: the row is numerically a combination of the
others. Exact dependence was seen to leave rounding of up to 700 eps."""


@record
class Status:
    """Whether a solve succeeded. One that did not leaves the state as it was and returns an update of exactly 0."""

    ok: Bool[AnyArray, "*layers"]
    """The other fields say that the result can be used."""
    finite: Bool[AnyArray, "*layers"]
    """The factorisation went through and all numbers are finite."""
    fits: Bool[AnyArray, "*layers"]
    """The state had room for the block."""
    pivot: Float[AnyArray, "*layers"]
    """Smallest share of a row's variance that the rows before it leave open, in (0, 1]; 0 if not finite. The relative
    error of the update is roughly eps / pivot. In the dual form and in a step a row is a constraint; in the one-time primal
    form it is a whitened coordinate."""
    row: Int[AnyArray, "*layers"]
    """The row with that pivot, counted within the block that was solved; -1 if not finite."""


def judge(
    pivots: Float[AnyArray, "rows"],
    *results: Float[AnyArray, "..."],
    fits: Bool[AnyArray, ""] | bool = True,
) -> Status:
    """Status of a factorisation with the given relative pivots (squared pivot / diagonal entry) and results.

    By NumPy if the pivots are NumPy's.
    """
    xp: Any = np if isinstance(pivots, np.ndarray) else jnp
    open_share = xp.nan_to_num(pivots, nan=0.0, posinf=0.0)
    pivot = xp.min(open_share, initial=1.0)
    finite = xp.isfinite(pivots).all()
    for result in results:
        finite = finite & xp.isfinite(result).all()
    determined = pivot > LOST * float(jnp.finfo(pivots.dtype).eps)
    row = xp.asarray(xp.where(finite, xp.argmin(open_share), -1) if pivots.size else -1, xp.int32)
    return Status(
        ok=xp.asarray(finite & determined & fits),
        finite=xp.asarray(finite),
        fits=xp.asarray(fits),
        pivot=xp.where(finite, pivot, 0.0),
        row=row,
    )


def check(status: Status) -> None:
    """Raises SolverError, naming what failed and the mend, unless the solve succeeded (for every layer, if stacked)."""
    ok = np.atleast_1d(np.asarray(status.ok)).ravel()
    if ok.all():
        return
    fields = {name: np.atleast_1d(np.asarray(getattr(status, name))).ravel() for name in ("finite", "fits", "pivot", "row")}
    stacked = np.ndim(status.ok) > 0
    problems = [
        (f"layer {i}: " if stacked else "") + _problem(*(fields[name][i] for name in ("finite", "fits", "pivot", "row")))
        for i in np.flatnonzero(~ok)
    ]
    raise SolverError.listing("the edit could not be solved, and nothing was changed:", problems)


def _problem(finite: np.bool_, fits: np.bool_, pivot: np.floating, row: np.integer) -> str:
    if not fits:
        return "the state has no room for the block: grow it first (`grow`), or use `sequential`, which does"
    if not finite:
        return (
            "the factorisation broke down (NaN): equality constraints (noise 0) that repeat or outnumber the rank of the "
            "prior, or keys that are not finite; give the constraints weights (noise > 0), or drop the repeated ones"
        )
    return (
        f"row {row} is numerically a combination of the others (it leaves {pivot:.1e} of its variance open): drop it, give "
        f"it noise > 0 or less weight, raise the prior's ridge, or solve in float64 if the prior is float32"
    )
