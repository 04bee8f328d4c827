"""Edits with any convex regulariser, at once or in sequence (Prop. 3.4 of "The Labyrinth and the Thread", arXiv 2605.26670).

    D* = argmin_D  L(D) + R(D),    L(D) = sum_i |r_i - k_i D|^2 / noise_i + <D, A0 D> = <D, A D> - 2 <D, B> + const

with A = A0 + K' Omega K, B = K' Omega R0 of all constraints so far, and R given by its proximal operator (see `proximal`). A
sequential step minimises over what it adds, from the update D_<t that is already in the kernel:

    D_t = argmin_D  <D, A_t D> + <grad L_t(D_<t), D> + R(D_<t + D),    grad L_t(D_<t) = 2 (A_t D_<t - B_t)

and the steps sum to D* of all constraints. Two things are easily left out, and each spoils the sum by more than 1e-2 in the
tests: the history in A_t, and the gradient, which without R is that of the new block alone (the past is stationary), but
with R is not: there the past's gradient balances a subgradient of R.

The solver is ADMM on the splitting D = N X (N the prior's basis), Z = N X:

    X = argmin  L(N X) + beta/2 |N X - Z + Y/beta|^2     diagonal in the eigenvectors of A: one eigendecomposition a solve
    Z = prox of R at  (over-relaxed N X) + Y/beta,  step 1/beta
    Y = Y + beta (over-relaxed N X - Z)                  a subgradient of R at Z

Since A is diagonalised, changing beta costs nothing, so it follows the ratio of the residuals. Measured at the default
tolerance over the families of the tests (96 constraints in 4 blocks, condition numbers of A from 2 to 1e7) and every
regulariser at a fifth of the strength that makes the update 0: 14 to 330 iterations, steps against one-shot 1e-7 at most.
Slower are weak regularisers of many constraints on heavy-tailed keys (160 constraints and l1 at a hundredth: 2,100, so raise
`max_iterations`), and l1 in a null space, which is nearly a linear program: 160 to 880, and for one family 2,000 without
convergence in the steps of few constraints. The sum was as exact all the same, for a later step makes up for an earlier one.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kedit_jax.errors import SolverError
from kedit_jax.solve.arrays import AnyArray, compiled, matmul, precision_of, record
from kedit_jax.solve.constraints import Constraints
from kedit_jax.solve.prior import Prior
from kedit_jax.solve.proximal import Proximal, Regularizer, describe, proximal
from kedit_jax.solve.statistics import Statistics, add, nothing, statistics

RELAXATION = 1.6
"""Over-relaxation of N X; 1 is plain ADMM. 1.8 was as good on average, and worse at its worst."""

REBALANCE_EVERY = 10
"""Iterations between changes of the penalty; 5 was no faster, 20 slower."""

REBALANCE_UNTIL = 500
"""ADMM is sure to converge only under a penalty that stops changing."""

PENALTY_RANGE = 1e3
"""The penalty stays within this factor of the curvatures: rounding that keeps a residual up, or bounds that cannot be met,
would otherwise drive it until it overflows."""

FINEST = 10.0
"""A tolerance below FINEST * eps of the working dtype asks for digits that it does not have."""


@record
class Convergence:
    """How an iterative solve ended. Residuals are relative, and both at most the tolerance where it converged."""

    ok: Bool[AnyArray, "*layers"]
    """Converged, to finite numbers."""
    converged: Bool[AnyArray, "*layers"]
    """The residuals fell below the tolerance."""
    finite: Bool[AnyArray, "*layers"]
    """All numbers are finite, and A is positive definite in the working dtype."""
    proximal: Bool[AnyArray, "*layers"]
    """The proximal operator made no NaN or infinity out of finite numbers."""
    iterations: Int[AnyArray, "*layers"]
    primal_residual: Float[AnyArray, "*layers"]
    """|N X - Z| / |Z|: how far the minimiser of L is from that of R."""
    dual_residual: Float[AnyArray, "*layers"]
    """|N' (grad L(N X) + Y)| / |Y|, Y a subgradient of R at Z: how far the two are from balance."""


@record
class RegularizedSolution:
    """A dense update of a kernel [n, v] under a regulariser, and where to start a related solve from."""

    update: Float[AnyArray, "*layers n v"]
    """Z, so the zeros and bounds that the proximal operator sets are exact; it lies in the subspace of a prior with a basis
    to the tolerance. Of a step: D_t. Exactly 0 where the status is not finite; the last iterate without convergence."""
    dual: Float[AnyArray, "*layers n v"]
    """Y: the subgradient of R at the update (of a step: at the sum of all steps) that balances the gradient of L."""
    status: Convergence


@record
class RegularizedState:
    """A sequence of regularised edits so far, in memory that does not grow with it."""

    statistics: Statistics
    """A_t and B_t, whitened."""
    update: Float[AnyArray, "*layers n v"]
    """D_1 + ... + D_t."""
    dual: Float[AnyArray, "*layers n v"]
    """A subgradient of R there."""


def regularized(
    prior: Prior,
    constraints: Constraints,
    regularizer: Regularizer,
    *,
    tolerance: float = 1e-9,
    max_iterations: int = 2000,
    start: RegularizedSolution | RegularizedState | None = None,
    dtype: DTypeLike | None = None,
) -> RegularizedSolution:
    """The one-time edit of a kernel for all constraints together, under a convex regulariser R.

        D* = argmin_D  sum_i |r_i - k_i D|^2 / noise_i  +  <D, A0 D>  +  R(D)

    Prop. 3.4 of "The Labyrinth and the Thread". Pure; usable under `jax.jit` (regularizer, tolerance and max_iterations
    static, or closed over) and `jax.vmap`, not under reverse-mode differentiation. Compiled once for each regulariser and
    shape. Non-convergence is `status.converged`; `check_convergence` raises on it.

    Args:
        prior: A0, factored; its dtype is the dtype of the work. float32 is for well-conditioned problems: at a condition
            number of 1e6, rounding A alone moved updates by 1e-4 (l1) to 6e-2 (box).
        constraints: keys [m, n], residuals [m, v] against the ORIGINAL kernel, noise > 0.
        regularizer: an object with `prox(x, step)` such as `L1(0.1)`, or that function.
        tolerance: for both relative residuals (see `Convergence`); the update is then within 1 to 100 times of it. 1e-8
            left steps of l1 at up to 1e-6 of their one-shot solution, for a sixth fewer iterations.
        max_iterations: when to give up.
        start: a solution (or state) of a related problem of the same shapes, to start the iterations from: fewer of them,
            the same result.
        dtype: of the result's update; the prior's by default.

    Returns:
        The update [n, v], its dual, and how the iterations ended.

    Raises:
        SolverError: no constraints, keys that do not fit the prior, equality constraints (noise 0), a regulariser without
            a usable proximal operator or one that changes shape or dtype, a tolerance that the prior's dtype cannot
            resolve, max_iterations < 1, or a start of other shapes.
    """
    limits = _limits(prior, tolerance, max_iterations)
    proximal(regularizer)
    stats = statistics(prior, constraints)
    empty = _started(prior, nothing(prior, stats.right.shape[-1]))
    guess = _guess(empty, start)
    return _one_time(prior, stats, guess, limits, regularizer=regularizer, dtype=_dtype(prior, dtype))


def start_regularized(prior: Prior, n_values: int) -> RegularizedState:
    """The state of a sequence of regularised edits before the first, for kernels [n, n_values]."""
    return _started(prior, nothing(prior, n_values))


def regularized_step(
    state: RegularizedState,
    prior: Prior,
    block: Constraints,
    regularizer: Regularizer,
    *,
    tolerance: float = 1e-9,
    max_iterations: int = 2000,
    dtype: DTypeLike | None = None,
) -> tuple[RegularizedState, RegularizedSolution]:
    """One sequential edit under a convex regulariser: the state with the block added, and the update D_t.

        D_t = argmin_D  <D, A_t D> + <grad L_t(D_<t), D> + R(D_<t + D)

    Prop. 3.4 of "The Labyrinth and the Thread": the updates of all steps sum to `regularized` of all blocks, as long as the
    regulariser stays the same. Its cost is that of one eigendecomposition of A_t and the iterations, whatever the history.
    Pure; transformations as for `regularized`.

    A step that did not converge is in the state all the same: the next one starts from where it stopped, with the full
    gradient there, and makes up for it. A step that is not finite leaves the state as it was, and its update is 0.

    Args:
        state: from `start_regularized` or an earlier step.
        prior: the one the state was started with.
        block: u constraints, residuals against the ORIGINAL kernel, noise > 0.
        regularizer, tolerance, max_iterations: as for `regularized`.
        dtype: of the update D_t; the prior's by default. The state keeps the prior's.

    Raises:
        SolverError: as `regularized`; or values of another width than the state's.
    """
    limits = _limits(prior, tolerance, max_iterations)
    proximal(regularizer)
    stats = add(state.statistics, statistics(prior, block))
    return _next(prior, state, stats, limits, regularizer=regularizer, dtype=_dtype(prior, dtype))


def check_convergence(status: Convergence, regularizer: Regularizer | None = None) -> None:
    """Raises SolverError, naming what failed and the mend, unless the solve converged (for every layer, if stacked).

    `regularizer` is for the message alone.
    """
    ok = np.atleast_1d(np.asarray(status.ok)).ravel()
    if ok.all():
        return
    names = ("finite", "proximal", "iterations", "primal_residual", "dual_residual")
    columns = [np.atleast_1d(np.asarray(getattr(status, name))).ravel() for name in names]
    stacked = np.ndim(status.ok) > 0
    problems = [
        (f"layer {i}: " if stacked else "") + _problem(regularizer, *(column[i] for column in columns))
        for i in np.flatnonzero(~ok)
    ]
    raise SolverError.listing("the regularised edit could not be solved:", problems)


def _problem(
    regularizer: Regularizer | None,
    finite: np.bool_,
    proper: np.bool_,
    iterations: np.integer,
    primal: np.floating,
    dual: np.floating,
) -> str:
    named = "the regulariser" if regularizer is None else describe(regularizer)
    if not proper:
        return (
            f"the proximal operator of {named} returned NaN or infinity in iteration {iterations}: make it finite for every "
            f"finite x and step > 0 (a group of norm 0 divided by its norm is the usual cause)"
        )
    if not finite:
        return (
            "the numbers are not finite, or A is not positive definite in the working dtype: keys, residuals or noise that "
            "are NaN or infinite, or weights too large beside the prior; check them, or raise the prior's ridge"
        )
    return (
        f"no convergence with {named} in {iterations} iterations: primal residual {primal:.1e}, dual residual {dual:.1e}; "
        f"raise max_iterations or the tolerance, start from this solution, or strengthen the prior (its ridge). Bounds that "
        f"no update in the prior's subspace meets never converge"
    )


# What follows works in the prior's subspace (X, [r, v]) and in the kernel's coordinates (Z and Y, [n, v]).


@record
class _Limits:
    tolerance: Float[AnyArray, ""]
    iterations: Int[AnyArray, ""]


@record
class _Smooth:
    """<T, A T> - <linear, T> of an update T = axes @ x, with A diagonal: its gradient in x is curvature x - linear."""

    curvature: Float[Array, "r"]
    """Eigenvalues of 2 A, ascending."""
    axes: Float[Array, "n r"]
    """Eigenvectors of A, in the kernel's coordinates."""
    linear: Float[Array, "r v"]


@record
class _Iterate:
    update: Float[Array, "n v"]
    """Z."""
    dual: Float[Array, "n v"]
    """Y, unscaled: it means the same under every penalty."""
    penalty: Float[Array, ""]
    proximal: Bool[Array, ""]
    iteration: Int[Array, ""]
    primal_residual: Float[Array, ""]
    dual_residual: Float[Array, ""]


@partial(compiled, static=("regularizer", "dtype"))
def _one_time(
    prior: Prior,
    stats: Statistics,
    guess: RegularizedState,
    limits: _Limits,
    regularizer: Regularizer,
    dtype: np.dtype,
) -> RegularizedSolution:
    """The first step from nothing, D_<1 = 0, with its iterations started from the guess."""
    at = jnp.zeros_like(guess.update)
    end, status = _minimised(_smooth(prior, stats, at), proximal(regularizer), guess, limits)
    return _solution(end, at, status, dtype)


@partial(compiled, static=("regularizer", "dtype"))
def _next(
    prior: Prior,
    state: RegularizedState,
    stats: Statistics,
    limits: _Limits,
    regularizer: Regularizer,
    dtype: np.dtype,
) -> tuple[RegularizedState, RegularizedSolution]:
    """The step from D_<t = state.update to the minimiser under `stats`, all constraints with the new ones."""
    end, status = _minimised(_smooth(prior, stats, state.update), proximal(regularizer), state, limits)
    new = RegularizedState(stats, end.update, end.dual)
    kept = jax.tree.map(lambda a, b: jnp.where(status.finite, a, b), new, state)
    return kept, _solution(end, state.update, status, dtype)


def _solution(end: _Iterate, at: Float[AnyArray, "n v"], status: Convergence, dtype: np.dtype) -> RegularizedSolution:
    """What the last iterate adds to the update `at`."""
    added, dual = (jnp.where(status.finite, x, jnp.zeros_like(x)) for x in (end.update - at, end.dual))
    return RegularizedSolution(added.astype(dtype), dual, status)


def _smooth(prior: Prior, stats: Statistics, at: Float[AnyArray, "n v"]) -> _Smooth:
    """Prop. 3.4's smooth part, <D, A D> + <grad L(at), D>, as a function of the sum T = at + D.

    It is <T, A T> - <2 A at - grad L(at), T> up to a constant. `at` counts with its part in the prior's subspace, in which T
    lies: the rest, of the size of the tolerance, is what Z was off by.
    """
    hessian = 2 * _coloured(prior, _coloured(prior, stats.gram + jnp.eye(prior.rank, dtype=prior.dtype)).T)
    within = at if prior.basis is None else matmul(prior.basis.T, at)
    pull = matmul(hessian, within)
    gradient = pull - 2 * _coloured(prior, stats.right)
    curvature, vectors = jnp.linalg.eigh(hessian)
    axes = vectors if prior.basis is None else matmul(prior.basis, vectors)
    return _Smooth(curvature, axes, matmul(vectors.T, pull - gradient))


def _coloured(prior: Prior, x: Float[AnyArray, "r c"]) -> Float[Array, "r c"]:
    """L x: from whitened right sides to those of the prior's basis."""
    factor = jnp.asarray(prior.factor)
    return factor[:, None] * x if factor.ndim == 1 else matmul(factor, x)


def _minimised(smooth: _Smooth, prox: Proximal, guess: RegularizedState, limits: _Limits) -> tuple[_Iterate, Convergence]:
    """argmin_T smooth(T) + R(T) by ADMM from the guess, and how the iterations ended."""
    # The best penalty for a quadratic of this spectrum. That of a related problem, balanced there, was up to 5 times slower.
    # A that rounding has made indefinite has no minimiser: NaN ends the iterations at the first.
    penalty = jnp.sqrt(smooth.curvature[0] * smooth.curvature[-1])
    penalty = jnp.where(smooth.curvature[0] > 0, penalty, jnp.nan)
    unknown = jnp.full((), jnp.inf, penalty.dtype)
    begin = _Iterate(
        update=jnp.asarray(guess.update),
        dual=jnp.asarray(guess.dual),
        penalty=penalty,
        proximal=jnp.ones((), bool),
        iteration=jnp.zeros((), jnp.int32),
        primal_residual=unknown,
        dual_residual=unknown,
    )
    end = jax.lax.while_loop(
        lambda now: _unfinished(now, limits), lambda now: _rebalanced(smooth, _iterated(smooth, prox, now)), begin
    )
    return end, _judged(end, limits)


def _iterated(smooth: _Smooth, prox: Proximal, now: _Iterate) -> _Iterate:
    """One iteration of ADMM and its residuals."""
    beta, curvature = now.penalty, smooth.curvature[:, None]
    x = (smooth.linear + matmul(smooth.axes.T, beta * now.update - now.dual)) / (curvature + beta)
    dense = matmul(smooth.axes, x)
    shifted = RELAXATION * dense + (1 - RELAXATION) * now.update + now.dual / beta
    update = prox(shifted, 1 / beta)
    dual = beta * (shifted - update)
    slope = curvature * x - smooth.linear + matmul(smooth.axes.T, dual)
    primal_residual, dual_residual = _residuals(smooth, dense, update, dual, slope)
    return _Iterate(
        update=update,
        dual=dual,
        penalty=beta,
        proximal=now.proximal & (_all_finite(update) | ~_all_finite(shifted)),
        iteration=now.iteration + 1,
        primal_residual=primal_residual,
        dual_residual=dual_residual,
    )


def _residuals(
    smooth: _Smooth,
    dense: Float[Array, "n v"],
    update: Float[Array, "n v"],
    dual: Float[Array, "n v"],
    slope: Float[Array, "r v"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """|N X - Z| and |N' (grad L + Y)|, each over the larger of the terms that should agree.

    Each scale has a floor, for a term may be 0 at the solution. |linear| / largest curvature is a lower bound of the update
    without R, against which an update of exactly 0 counts. Where R is inactive and Y is 0, a slope of
    tolerance * smallest curvature * |update| moves the update by no more than tolerance * |update|.
    """
    tiny = float(jnp.finfo(update.dtype).tiny)
    size = jnp.maximum(jnp.linalg.norm(dense), jnp.linalg.norm(update))
    floor = jnp.linalg.norm(smooth.linear) / smooth.curvature[-1]
    force = jnp.maximum(jnp.linalg.norm(dual), smooth.curvature[0] * size)
    return (
        jnp.linalg.norm(dense - update) / jnp.maximum(jnp.maximum(size, floor), tiny),
        jnp.linalg.norm(slope) / jnp.maximum(force, tiny),
    )


def _rebalanced(smooth: _Smooth, now: _Iterate) -> _Iterate:
    """The penalty moved towards equal residuals, by at most 10 and not for less than a factor of 2."""
    tiny = float(jnp.finfo(now.penalty.dtype).tiny)
    ratio = jnp.clip(jnp.sqrt((now.primal_residual + tiny) / (now.dual_residual + tiny)), 0.1, 10.0)
    due = (now.iteration % REBALANCE_EVERY == 0) & (now.iteration <= REBALANCE_UNTIL)
    changed = due & ((ratio > 2) | (ratio < 0.5))
    low, high = smooth.curvature[0] / PENALTY_RANGE, smooth.curvature[-1] * PENALTY_RANGE
    penalty = jnp.where(changed, jnp.clip(now.penalty * ratio, low, high), now.penalty)
    return _Iterate(now.update, now.dual, penalty, now.proximal, now.iteration, now.primal_residual, now.dual_residual)


def _unfinished(now: _Iterate, limits: _Limits) -> Bool[Array, ""]:
    sound = now.proximal & ((now.iteration == 0) | (jnp.isfinite(now.primal_residual) & jnp.isfinite(now.dual_residual)))
    return sound & ~_settled(now, limits) & (now.iteration < limits.iterations)


def _settled(now: _Iterate, limits: _Limits) -> Bool[Array, ""]:
    return (now.primal_residual <= limits.tolerance) & (now.dual_residual <= limits.tolerance)


def _judged(end: _Iterate, limits: _Limits) -> Convergence:
    finite = end.proximal & jnp.isfinite(end.penalty) & jnp.isfinite(end.primal_residual)
    finite = finite & jnp.isfinite(end.dual_residual) & _all_finite(end.update) & _all_finite(end.dual)
    converged = finite & _settled(end, limits)
    return Convergence(
        ok=converged,
        converged=converged,
        finite=finite,
        proximal=end.proximal,
        iterations=end.iteration,
        primal_residual=end.primal_residual,
        dual_residual=end.dual_residual,
    )


def _all_finite(x: Float[Array, "..."]) -> Bool[Array, ""]:
    return jnp.isfinite(x).all()


def _started(prior: Prior, stats: Statistics) -> RegularizedState:
    with precision_of(prior):
        zeros = jnp.zeros((prior.n_keys, stats.right.shape[-1]), prior.dtype)
        return RegularizedState(stats, zeros, zeros)


def _guess(empty: RegularizedState, start: RegularizedSolution | RegularizedState | None) -> RegularizedState:
    """The empty state with the iterates of `start`, in the working dtype."""
    if start is None:
        return empty
    shapes = start.update.shape, start.dual.shape
    if shapes != (empty.update.shape,) * 2:
        raise SolverError(
            f"start has an update {shapes[0]} and a dual {shapes[1]}, this problem's are {empty.update.shape}: start from a "
            f"solution for the same kernel, or from none"
        )
    with precision_of((empty, start)):
        wanted = (jnp.asarray(x, empty.update.dtype) for x in (start.update, start.dual))
        return RegularizedState(empty.statistics, *wanted)


def _limits(prior: Prior, tolerance: float, max_iterations: int) -> _Limits:
    finest = FINEST * float(jnp.finfo(prior.dtype).eps)
    problems = []
    if not (math.isfinite(tolerance) and tolerance >= finest):
        problems.append(
            f"tolerance must be finite and at least {finest:.1e} for a prior in {prior.dtype}, got {tolerance}: raise it"
            + ("" if prior.dtype == np.float64 else ", or use a float64 prior")
        )
    if max_iterations < 1:
        problems.append(f"max_iterations must be at least 1, got {max_iterations}")
    if problems:
        raise SolverError.listing("the iterations cannot be limited so:", problems)
    return _Limits(np.asarray(tolerance, prior.dtype), np.asarray(max_iterations, np.int32))


def _dtype(prior: Prior, dtype: DTypeLike | None) -> np.dtype:
    return prior.dtype if dtype is None else np.dtype(dtype)
