"""What a set of constraints amounts to, in memory that does not grow with their number.

With whitened keys U = K basis L^-T (see `prior`) and weights Omega = diag(1 / noise), the normal equations of the one-time
edit are (I + U' Omega U) X = U' Omega R0, D* = basis L^-T X. Their two matrices are sums over constraints, so they can be
added across batches, sessions and machines, in any order:

    total = statistics(prior, first)
    total = add(total, statistics(prior, second))
    update = solve_statistics(prior, total).update          # the one-time edit of both

The price: nothing can be taken out again. Subtracting a constraint would lose its digits to cancellation, and a single one
is kept nowhere; keep `Constraints` to retract, replace or merge under a policy.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from kedit_jax.errors import SolverError
from kedit_jax.solve import primal
from kedit_jax.solve.arrays import AnyArray, compiled, precision_of, record
from kedit_jax.solve.constraints import Constraints
from kedit_jax.solve.interface import Solution, check_fits, total
from kedit_jax.solve.primal import PrimalState
from kedit_jax.solve.prior import Prior, whiten
from kedit_jax.solve.status import Status


@record
class Statistics:
    """Sufficient statistics of constraints under one prior, in its whitened coordinates and its dtype.

    They mean nothing under another prior: keep its `prior_fingerprint` beside stored ones.
    """

    gram: Float[AnyArray, "*layers r r"]
    """U' Omega U."""
    right: Float[AnyArray, "*layers r v"]
    """U' Omega R0."""
    count: Int[AnyArray, "*layers"]
    """Constraints in them, no-op rows (key 0) left out. For people to read; no solution depends on it."""


def statistics(prior: Prior, constraints: Constraints) -> Statistics:
    """U' Omega U [r, r] and U' Omega R0 [r, v] of m constraints, in the prior's dtype. Usable under `jax.jit`, `jax.vmap`.

    Raises:
        SolverError: no constraints (`nothing` stands for those), keys that do not fit the prior, or equality constraints
            (noise 0), whose weight is infinite. Noise that is 0 under a trace shows in the status of the solution.
    """
    _check(prior, constraints)
    return _statistics(prior, constraints)


@compiled
def _statistics(prior: Prior, constraints: Constraints) -> Statistics:
    rows, residuals = whiten(prior, constraints.keys), jnp.asarray(constraints.residuals, prior.dtype)
    gram, right = primal.normal(rows, residuals, jnp.asarray(constraints.noise, prior.dtype))
    real = jnp.any(jnp.asarray(constraints.keys) != 0, axis=-1)
    return Statistics((gram + gram.T) / 2, right, jnp.sum(real, dtype=jnp.int32))


def nothing(prior: Prior, n_values: int) -> Statistics:
    """The statistics of no constraints, for kernels [n, n_values]. Raises SolverError unless n_values >= 1."""
    if n_values < 1:
        raise SolverError(f"n_values must be at least 1, got {n_values}")
    with precision_of(prior):
        return Statistics(
            jnp.zeros((prior.rank, prior.rank), prior.dtype),
            jnp.zeros((prior.rank, n_values), prior.dtype),
            jnp.zeros((), jnp.int32),
        )


def add(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of the constraints of both, which must have been taken under the same prior.

    Raises:
        SolverError: different ranks, value widths or dtypes, so certainly not the same prior and kernel.
    """
    ours, theirs = ((x.gram.shape, x.right.shape, np.dtype(x.gram.dtype)) for x in (a, b))
    if ours != theirs:
        raise SolverError(
            f"statistics of different priors or kernels cannot be added: gram {ours[0]}, right {ours[1]}, {ours[2]} and "
            f"gram {theirs[0]}, right {theirs[1]}, {theirs[2]}; take both under the same prior"
        )
    return _added(a, b)


@compiled
def _added(a: Statistics, b: Statistics) -> Statistics:
    return jax.tree.map(jnp.add, a, b)


def from_statistics(prior: Prior, stats: Statistics) -> tuple[PrimalState, Status]:
    """A primal state from which `step` goes on as if all the constraints had been edited one by one.

    The state is empty where the status is not ok. Raises SolverError for statistics that do not fit the prior.
    """
    _check_rank(prior, stats)
    return primal.from_normal(stats.gram, stats.right)


def solve_statistics(prior: Prior, stats: Statistics, *, dtype: DTypeLike | None = None) -> Solution:
    """The one-time edit of all constraints in the statistics: argmin_D sum_i |r_i - k_i D|^2 / noise_i + <D, A0 D>.

    What `one_time` gives for the constraints themselves, at a cost that does not depend on how many there were.

    Args:
        prior: the one that the statistics were taken under.
        stats: from `statistics`, `add` or `nothing`.
        dtype: of the result; the prior's by default.

    Returns:
        The update [n, v] and its status; the update is exactly 0 where the status is not ok, and for no constraints.

    Raises:
        SolverError: statistics that do not fit the prior.
    """
    state, status = from_statistics(prior, stats)
    return Solution(total(state, prior, dtype=dtype), status)


def _check(prior: Prior, constraints: Constraints) -> None:
    check_fits(prior, constraints)
    noise = constraints.noise
    if not isinstance(noise, jax.core.Tracer) and (np.asarray(noise) == 0).any():
        raise SolverError(
            "equality constraints (noise 0) have infinite weight and no statistics: give them noise > 0, or keep the "
            "constraints themselves"
        )


def _check_rank(prior: Prior, stats: Statistics) -> None:
    rank, dtype = stats.gram.shape[-1], np.dtype(stats.gram.dtype)
    if (rank, dtype) != (prior.rank, prior.dtype):
        raise SolverError(
            f"statistics of rank {rank} in {dtype} do not fit the prior of rank {prior.rank} in {prior.dtype}: take them "
            f"under this prior"
        )
