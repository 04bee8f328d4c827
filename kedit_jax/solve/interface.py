"""One interface over both forms of the solver, chosen by shape: the dual below `CROSSOVER` * rank rows, the primal above.

Everything is computed in the dtype of the prior; `dtype` rounds the result once, at the end.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Real

from kedit_jax.errors import SolverError
from kedit_jax.solve import dual, primal
from kedit_jax.solve.arrays import AnyArray, compiled, matmul, precision_of, record
from kedit_jax.solve.constraints import Constraints, masked
from kedit_jax.solve.dual import DualState
from kedit_jax.solve.primal import PrimalState
from kedit_jax.solve.prior import Prior, unwhiten, whiten
from kedit_jax.solve.status import Status, check

Form = Literal["auto", "dual", "primal"]
State = DualState | PrimalState

CROSSOVER = 0.83
"""Rows per rank at which a primal step becomes the cheaper one."""

FIRST_CAPACITY = 128
"""Rows that a dual state starts with; `sequential` doubles them as needed."""


@record
class Step:
    """A low-rank update left @ right of a kernel [n, v]."""

    left: Float[AnyArray, "*layers n u"]
    right: Float[AnyArray, "*layers u v"]
    status: Status

    def dense(self) -> Float[Array, "*layers n v"]:
        """left @ right, in their dtype at full precision."""
        return _product(self.left, self.right)


@record
class Solution:
    """A dense update of a kernel [n, v]."""

    update: Float[AnyArray, "*layers n v"]
    status: Status


_product = compiled(matmul)


def choose_form(rows: int, rank: int, form: Form = "auto", *, equality: bool = False) -> Literal["dual", "primal"]:
    """The cheaper form for this many constraints under a prior of this rank; equality constraints need the dual."""
    if form == "auto":
        return "dual" if equality or rows <= CROSSOVER * rank else "primal"
    if form not in ("dual", "primal"):
        raise SolverError(f"unknown form {form!r}: use 'auto', 'dual' or 'primal'")
    if form == "primal" and equality:
        raise SolverError("the primal form divides by the noise, which is 0 for equality constraints: use form='dual'")
    return form


def one_time(prior: Prior, constraints: Constraints, *, form: Form = "auto", dtype: DTypeLike | None = None) -> Solution:
    """The one-time edit of a kernel for all constraints together.

        D* = argmin_D  sum_i |r_i - k_i D|^2 / noise_i  +  <D, A0 D>

    "The Labyrinth and the Thread", section 3. Pure; usable under `jax.jit` and `jax.vmap`.

    Args:
        prior: A0, factored; its dtype is the dtype of the work.
        constraints: keys [m, n] and residuals [m, v] against the ORIGINAL kernel, so that edits of a history can be
            solved again at any time. With residuals against the current kernel and no history this is the `unaligned`
            baseline.
        form: "dual" (m x m) or "primal" (r x r); "auto" takes the cheaper one.
        dtype: of the result; the prior's by default.

    Returns:
        The update [n, v] and its status; the update is exactly 0 where the status is not ok.

    Raises:
        SolverError: no constraints, keys that do not fit the prior, or an unknown form.
    """
    check_fits(prior, constraints)
    chosen = choose_form(constraints.size, prior.rank, form, equality=_any_zero(constraints.noise))
    solver = dual.solve if chosen == "dual" else primal.solve
    update, status = solver(*_whitened(prior, constraints))
    return Solution(_restored(prior, update, _result_dtype(prior, dtype)), status)


def solve_active(
    prior: Prior,
    constraints: Constraints,
    mask: Bool[AnyArray, "m"] | Real[AnyArray, "m"],
    *,
    form: Form = "auto",
    dtype: DTypeLike | None = None,
) -> Solution:
    """The one-time edit of the constraints whose mask is not 0, as if the others had never been there.

    Same shapes for every mask, so any retraction reuses one compilation. An empty mask gives exactly 0. Otherwise as
    `one_time`.
    """
    return one_time(prior, masked(constraints, mask), form=form, dtype=dtype)


def start(prior: Prior, n_values: int, *, capacity: int = FIRST_CAPACITY, form: Form = "auto") -> State:
    """The state of a sequence of edits before the first, for kernels [n, n_values] and up to `capacity` constraints.

    A primal state has no capacity. "auto" takes the form that is cheaper at that capacity; `sequential` grows and switches.
    """
    if n_values < 1 or capacity < 1:
        raise SolverError(f"n_values and capacity must be at least 1, got {n_values} and {capacity}")
    with precision_of(prior):
        if choose_form(capacity, prior.rank, form) == "dual":
            return dual.empty(prior.rank, n_values, capacity, prior.dtype)
        return primal.empty(prior.rank, n_values, prior.dtype)


def step(state: State, prior: Prior, block: Constraints, *, dtype: DTypeLike | None = None) -> tuple[State, Step]:
    """One sequential edit: the state with the block added, and the update that takes the kernel there.

    The update is the difference of the one-time edits with and without the block (Prop. 3.2 of "The Labyrinth and the
    Thread"), so updates of all steps sum to the one-time edit of all blocks. Its cost is that of the new block alone.

    Pure, with static shapes: one compilation for each block size (and capacity). On failure the state is unchanged and the
    update is 0; read `step.status`, or call `check` on it.

    Args:
        state: from `start`, an earlier step, or `refit`.
        prior: the one the state was started with.
        block: u constraints, residuals against the ORIGINAL kernel.
        dtype: of the step's factors; the prior's by default.

    Raises:
        SolverError: no constraints, keys that do not fit the prior, or a block larger than the state's capacity.
    """
    check_fits(prior, block)
    if isinstance(state, DualState) and block.size > state.capacity:
        raise SolverError(f"a block of {block.size} exceeds the capacity {state.capacity}: grow the state first")
    rows, out = _whitened(prior, block), _result_dtype(prior, dtype)
    new: State
    new, inner = dual.append(state, *rows) if isinstance(state, DualState) else primal.append(state, *rows)
    return new, Step(_restored(prior, inner.left, out), _rounded(inner.right, out), inner.status)


def sequential(state: State, prior: Prior, block: Constraints, *, dtype: DTypeLike | None = None) -> tuple[State, Step]:
    """`step` for a host loop: makes room first, and moves on to the primal form once that is the cheaper one.

    Capacity doubles, so n blocks compile about log2(n) times. Equality constraints stay in the dual form.

    Raises:
        SolverError: the step failed; the state passed in is still valid.
    """
    state, result = step(make_room(state, prior, block), prior, block, dtype=dtype)
    check(result.status)
    return state, result


def make_room(state: State, prior: Prior, block: Constraints) -> State:
    """The state, grown or turned primal as `sequential` does, so that it has room for the block."""
    if isinstance(state, PrimalState):
        return state
    rows = int(state.count) + block.size
    equality = _any_zero(block.noise) or _any_zero(state.noise)
    if choose_form(rows, prior.rank, equality=equality) == "primal":
        return to_primal(state)
    if rows <= state.capacity:
        return state
    doubled = state.capacity * 2 ** math.ceil(math.log2(rows / state.capacity))
    # Rows past the crossover would never be used: the next form has no rows.
    last = doubled if equality else max(rows, math.ceil(CROSSOVER * prior.rank))
    return grow(state, min(doubled, last))


def grow(state: DualState, capacity: int) -> DualState:
    """The same state with room for `capacity` constraints."""
    extra = capacity - state.capacity
    if extra < 0:
        raise SolverError(f"the state already has room for {state.capacity} constraints: grow to at least that")
    return dual.grow(state, extra)


def to_primal(state: DualState) -> PrimalState:
    """The primal state of the same constraints (all with noise > 0); r x r, whatever their number."""
    choose_form(state.capacity, state.whitened.shape[-1], "primal", equality=_any_zero(state.noise))
    built, status = primal.factored(state.whitened, state.residuals, state.noise)
    check(status)
    # The dual's own update goes over as it is, so that steps before and after still sum to the total.
    return PrimalState(built.inverse, dual.accumulated(state))


def refit(
    prior: Prior, constraints: Constraints, *, capacity: int | None = None, form: Form = "auto"
) -> tuple[State, Status]:
    """A state built from all its constraints in one go, as after a retraction: nothing of the history remains.

    `capacity` (the number of constraints by default) is the room of a dual state. No constraints give an empty state, for
    all of them may have been retracted. Pure.
    """
    _check_width(prior, constraints)
    room = constraints.size if capacity is None else capacity
    if room < constraints.size:
        raise SolverError(f"capacity {room} does not hold {constraints.size} constraints")
    chosen = choose_form(room, prior.rank, form, equality=_any_zero(constraints.noise))
    rows = _whitened(prior, constraints)
    return dual.factored(*rows, room) if chosen == "dual" else primal.factored(*rows)


def retract(state: DualState, keep: Bool[AnyArray, "M"]) -> tuple[DualState, Status]:
    """The state as if only the rows in `keep` had ever been edited; their order is kept and the others' room is free again.

    Reuses the whitened rows; static shapes. A primal state keeps no rows: use `refit` on the constraints that stay.
    """
    if isinstance(state, PrimalState):
        raise SolverError("a primal state keeps no single constraints: call refit on the constraints that stay")
    if keep.shape != (state.capacity,):
        raise SolverError(f"keep has shape {keep.shape}, but the state has capacity {state.capacity}: pad it with False")
    return dual.retain(state, keep)


def revalue(state: State, prior: Prior, constraints: Constraints) -> State:
    """New targets under unchanged keys and noise: `constraints` are all of the state's, in order. Nothing is factored."""
    _check_width(prior, constraints)
    if isinstance(state, DualState) and _known(state.count) and int(state.count) != constraints.size:
        raise SolverError(f"the state has {int(state.count)} constraints, {constraints.size} were given: pass all of them")
    if isinstance(state, PrimalState):
        choose_form(constraints.size, prior.rank, "primal", equality=_any_zero(constraints.noise))
    rows = _whitened(prior, constraints)
    return dual.revalue(state, rows[1]) if isinstance(state, DualState) else primal.revalue(state, *rows)


def total(state: State, prior: Prior, *, dtype: DTypeLike | None = None) -> Float[Array, "n v"]:
    """The update [n, v] of everything in the state: the one-time edit of all its constraints."""
    update = dual.accumulated(state) if isinstance(state, DualState) else state.update
    return _restored(prior, update, _result_dtype(prior, dtype))


# Calls are compositions of separately compiled parts: whitening and its inverse depend on the kind of prior and on the
# dtypes outside, the expensive part between them only on shapes, so that it is compiled once for all priors of a rank.


def _whiten_all(prior: Prior, stack: Constraints) -> tuple[Float[Array, "m r"], Float[Array, "m v"], Float[Array, "m"]]:
    return whiten(prior, stack.keys), jnp.asarray(stack.residuals, prior.dtype), jnp.asarray(stack.noise, prior.dtype)


def _unwhiten_all(prior: Prior, x: Float[AnyArray, "r v"], dtype: np.dtype) -> Float[Array, "n v"]:
    return unwhiten(prior, x).astype(dtype)


def _round(x: Float[AnyArray, "u v"], dtype: np.dtype) -> Float[Array, "u v"]:
    return jnp.asarray(x, dtype)


_whitened = compiled(_whiten_all)
_restored = compiled(_unwhiten_all, static=("dtype",))
_rounded = compiled(_round, static=("dtype",))


def _result_dtype(prior: Prior, dtype: DTypeLike | None) -> np.dtype:
    return prior.dtype if dtype is None else np.dtype(dtype)


def _any_zero(noise: Float[AnyArray, "m"]) -> bool:
    """Whether some noise is known to be 0; a traced one is not known, and its status tells afterwards."""
    return _known(noise) and bool((np.asarray(noise) == 0).any())


def _known(array: AnyArray) -> bool:
    return not isinstance(array, jax.core.Tracer)


def check_fits(prior: Prior, constraints: Constraints) -> None:
    """Raises SolverError for no constraints, or keys of another width than the prior's."""
    if not constraints.size:
        raise SolverError("no constraints to solve for: give at least one; the edit of none is 0, and needs no solver")
    _check_width(prior, constraints)


def _check_width(prior: Prior, constraints: Constraints) -> None:
    width = constraints.keys.shape[-1]
    if width != prior.n_keys:
        raise SolverError(f"keys have width {width}, the prior {prior.n_keys}: they belong to different layers or models")
