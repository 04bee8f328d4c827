"""The solver as a session runs it where its prior lives on a CPU: in float64, by BLAS, without a copy of the history.

The same steps as `interface.step`, for a host loop: nothing is compiled or padded, and a state shares what it has in common
with the one before. With U, R0, N and M = N + U U' = T T' as in `dual`, it keeps Z = T^-1 U and c = T^-1 R0, and not T:

    E = Z U_t' ,  V = U_t' - Z' E ,  T_tt T_tt' = N_t + U_t U_t' - E' E ,  Z_t = T_tt^-1 V' ,  c_t = T_tt^-1 (R_t - E' c)

Rows of T follow from T Z = U, so this is the block Cholesky of `dual` with the same backward error, and P = I - Z'Z is the
inverse of `primal` in factors. Past `CROSSOVER` rows a rank they are multiplied out, P <- P - Z'Z, and rows are kept again
from there on (V = P U_t' - Z' E).

Floating-point operations of a step of u rows after m, for keys of width n = r and values of width v: 2 n^2 u to whiten and
back, 4 m n u + 2 m u v for the history, 2 n u v for the update. Beside P, once there is one: 2 n^2 u + 2 n u v more, and n^2
for each row that goes into it, at most TAIL n rows at once after the first time. Memory: `state_size` and `workspace`.
"""

import math

import numpy as np
import scipy.linalg.blas as blas
import scipy.linalg.lapack as lapack
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from kedit_jax.errors import SolverError
from kedit_jax.solve.arrays import AnyArray, record
from kedit_jax.solve.constraints import Constraints
from kedit_jax.solve.interface import CROSSOVER, Step, check_fits
from kedit_jax.solve.primal import PrimalState
from kedit_jax.solve.prior import Prior
from kedit_jax.solve.rows import Rows
from kedit_jax.solve.status import Status, check, judge

TAIL = 0.125
"""Rows per rank that are kept beside a P that was multiplied out, before they go into it."""

SLAB = 256
"""Rows of P that are made at once."""

WIDE = 8  # bytes of a float64


@record
class HostState:
    """The constraints so far, in whitened coordinates."""

    rows: Rows
    """Z [m, r]: those of the constraints that are not in `base`."""
    solved: Rows
    """c [m, v]."""
    base: PrimalState | None
    """P and the whitened update of the constraints that were multiplied out; None for I and 0."""


@record
class HostSequence:
    """A kernel [n, v] in the middle of a sequence of steps without post-processing; a pytree."""

    update: Float[np.ndarray, "n v"]
    """The sum of all steps as applied."""
    solver: HostState


def suits(prior: Prior) -> bool:
    """Whether sequences under this prior are run here: one layer in float64, whose factor is in the memory of CPUs."""
    factor = prior.factor
    here = not isinstance(factor, Array) or all(device.platform == "cpu" for device in factor.devices())
    return here and prior.dtype == np.float64 and factor.ndim <= 2


def begin(
    prior: Prior, n_values: int, *, base: PrimalState | None = None, update: Float[np.ndarray, "n v"] | None = None
) -> HostSequence:
    """A sequence before its first step, or after what `base` (`solve.from_statistics`) and `update` say.

    Raises:
        SolverError: n_values < 1, or a prior that does not suit.
    """
    if n_values < 1:
        raise SolverError(f"n_values must be at least 1, got {n_values}")
    if not suits(prior):
        raise SolverError(f"steps on the host need a float64 prior of one layer on a CPU, not one in {prior.dtype}")
    if base is not None:
        base = PrimalState(np.asarray(base.inverse), np.asarray(base.update))
    state = HostState(Rows(np.zeros((0, prior.rank))), Rows(np.zeros((0, n_values))), base)
    return HostSequence(np.zeros((prior.n_keys, n_values)) if update is None else update, state)


def advance(
    sequence: HostSequence,
    prior: Prior,
    block: Constraints,
    *,
    dtype: DTypeLike = np.float64,
    aligned: bool = True,
) -> tuple[HostSequence, Step]:
    """One step, D_t = D*(S_t) - D*(S_{t-1}) (Prop. 3.2 of "The Labyrinth and the Thread"), added to the update.

    Args:
        sequence: from `begin` or an earlier step; stays as it is.
        prior: the one it was begun with.
        block: u constraints, residuals against the ORIGINAL kernel.
        aligned: False leaves the history out of the step, as the mode `unaligned` of `sequences` does: D_t is the one-time
            edit of the block alone, from where the kernel stands. Nothing of it is kept but the update.
        dtype: of the step's factors, rounded once. Where the update has it, too, it is the sum of rounded steps.

    Raises:
        SolverError: no constraints, keys that do not fit the prior, or a step that cannot be solved.
    """
    if aligned:
        state, status = _appended(sequence.solver, prior, block)
    else:
        nothing = begin(prior, sequence.update.shape[1]).solver
        state, status = _appended(nothing, prior, block, reached=sequence.update)
    new = slice(len(state.rows) - block.size, None)
    left = _unwhitened(prior, state.rows.array[new]).T.astype(dtype, copy=False)
    right = state.solved.array[new].astype(dtype, copy=False)
    solver = _folded(state) if aligned else sequence.solver
    return HostSequence(_plus(sequence.update, left, right), solver), Step(left, right, status)


def remember(sequence: HostSequence, prior: Prior, block: Constraints) -> HostSequence:
    """The sequence after an aligned step that is known to be in its update already: half of `advance`.

    Raises:
        SolverError: as for `advance`.
    """
    state, _ = _appended(sequence.solver, prior, block)
    return HostSequence(sequence.update, _folded(state))


def _appended(
    before: HostState, prior: Prior, block: Constraints, reached: Float[np.ndarray, "n v"] | None = None
) -> tuple[HostState, Status]:
    """The state with the block's constraints, nothing multiplied out; raises where there is none.

    Args:
        reached: an update after which the block's residuals are taken.
    """
    check_fits(prior, block)
    keys, residuals, noise = (np.asarray(x, np.float64) for x in (block.keys, block.residuals, block.noise))
    if reached is not None:
        residuals = residuals - keys @ reached
    state, status = append(before, _whitened(prior, keys), residuals, noise)
    check(status)
    return state, status


def append(
    state: HostState, rows: Float[np.ndarray, "u r"], residuals: Float[np.ndarray, "u v"], noise: Float[np.ndarray, "u"]
) -> tuple[HostState, Status]:
    """The state with u whitened constraints at the end of `rows` and `solved`; as it was where the status is not ok."""
    left_open, known = rows, np.zeros_like(residuals)
    if state.base is not None:
        left_open, known = rows @ state.base.inverse, rows @ state.base.update
    corner = np.diag(noise) + left_open @ rows.T
    if len(state.rows):
        cross = rows @ state.rows.array.T
        left_open = left_open - cross @ state.rows.array
        known = known + cross @ state.solved.array
        corner -= cross @ cross.T
    factor, failed = lapack.dpotrf(corner, lower=1)
    pivots = np.full(len(rows), np.nan) if failed else np.square(np.diagonal(factor)) / (noise + np.sum(rows * rows, axis=1))
    new_rows, new_solved = (
        blas.dtrsm(1.0, factor, x.T, side=1, lower=1, trans_a=1).T for x in (left_open, residuals - known)
    )
    status = judge(pivots, new_rows, new_solved)
    if not status.ok:
        return state, status
    return HostState(state.rows.appended(new_rows), state.solved.appended(new_solved), state.base), status


def total(state: HostState, prior: Prior) -> Float[np.ndarray, "n v"]:
    """The update [n, v] of everything in the state: the one-time edit of all its constraints."""
    return np.ascontiguousarray(_unwhitened(prior, np.ascontiguousarray(_accumulated(state).T)).T)


def state_size(rank: int, n_values: int, rows: int) -> int:
    """Bytes of a state after so many constraints written in small blocks, at most.

    Buffers are larger by what they have room for (`rows.GROWTH`); when one is outgrown, it and the next stand side by side.
    """
    first, later = _room(rank, None), _room(rank, rows)
    kept, base = (rows, 0) if rows <= first else (min(rows - first, later), rank * (rank + n_values))
    return WIDE * (kept * (rank + n_values) + base)


def workspace(n_keys: int, rank: int, n_values: int, rows: int, block: int) -> int:
    """Bytes that a step of `block` rows after `rows` others takes for itself, beside the states before and after, at most.

    Rows of keys, whitened, left open and solved, of the block against the history, and corners; P in slabs when it is made.
    """
    kept = min(rows, _room(rank, None))
    step = block * (2 * n_keys + 4 * rank + kept + 4 * n_values + 3 * block)
    return WIDE * max(step, SLAB * (rank + n_values) if rows + block > _room(rank, None) else 0)


def _room(rank: int, base: object) -> int:
    """Rows that are kept beside P before they are multiplied out."""
    return math.ceil((CROSSOVER if base is None else TAIL) * rank)


def _folded(state: HostState) -> HostState:
    """The same state, its rows multiplied out if they are many."""
    rows, base = state.rows.array, state.base
    rank = rows.shape[1]
    if len(rows) <= _room(rank, base):
        return state
    inverse = np.eye(rank) if base is None else np.array(base.inverse)
    for begin in range(0, rank, SLAB):
        slab, left = slice(begin, begin + SLAB), slice(0, begin + SLAB)
        inverse[slab, left] -= rows[:, slab].T @ rows[:, left]
        inverse[left, slab] = inverse[slab, left].T  # symmetric to the last bit
    return HostState(
        Rows(np.zeros((0, rank))), Rows(np.zeros_like(state.solved.array[:0])), PrimalState(inverse, _accumulated(state))
    )


def _accumulated(state: HostState) -> Float[np.ndarray, "r v"]:
    """Z' c and what is in the base: the update of all rows, whitened."""
    update = state.rows.array.T @ state.solved.array
    return update if state.base is None else update + state.base.update


def _plus(
    update: Float[np.ndarray, "n v"], left: Float[np.ndarray, "n u"], right: Float[np.ndarray, "u v"]
) -> Float[np.ndarray, "n v"]:
    """update + left @ right; in float64 without writing the product out."""
    if update.dtype != np.float64 or left.dtype != np.float64:
        return update + left @ right
    return blas.dgemm(1.0, right.T, left, beta=1.0, c=update.copy().T, trans_b=1, overwrite_c=1).T


def _whitened(prior: Prior, keys: Float[AnyArray, "u n"]) -> Float[np.ndarray, "u r"]:
    """U = K basis L^-T."""
    rows, factor = np.asarray(keys, np.float64), np.asarray(prior.factor)
    if prior.basis is not None:
        rows = rows @ np.asarray(prior.basis)
    return rows / factor if factor.ndim == 1 else _solved(factor, rows, transpose=True)


def _unwhitened(prior: Prior, rows: Float[np.ndarray, "u r"]) -> Float[np.ndarray, "u n"]:
    """Rows of whitened coordinates in the kernel's: rows L^-1 basis'."""
    factor = np.asarray(prior.factor)
    found = rows / factor if factor.ndim == 1 else _solved(factor, rows, transpose=False)
    return found if prior.basis is None else found @ np.asarray(prior.basis).T


def _solved(
    factor: Float[np.ndarray, "r r"], rows: Float[np.ndarray, "u r"], *, transpose: bool
) -> Float[np.ndarray, "u r"]:
    """rows L^-T, or rows L^-1. BLAS reads rows as columns, so it is shown L' and solves L x' = row', or L' x' = row'.

    A single row has its own routine: at width 3072 it takes 2.6 ms, the one for many 4.4.
    """
    if len(rows) == 1:
        return blas.dtrsv(factor.T, rows[0], lower=0, trans=int(transpose))[None]
    return blas.dtrsm(1.0, factor.T, rows.T, lower=0, trans_a=int(transpose)).T
