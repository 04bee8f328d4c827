"""Invariants 14 and 15: steps under a convex regulariser sum to the one-shot solution, by the full gradient (Prop. 3.4)."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from kedit_jax import solve
from kedit_jax.solve import L1, Box, GroupLasso, Nuclear
from kedit_jax.solve.arrays import AnyArray
from kedit_jax.verification.checks import Measured, worst
from kedit_jax.verification.problems import Problem, relative
from kedit_jax.verification.runs import batches

TOLERANCE = 1e-9
"""Of the iterations; the update is within 1 to 100 times of it."""

MAX_ITERATIONS = 5000


@dataclasses.dataclass(frozen=True)
class Quarters:
    """A regulariser of one's own: another one on each quarter of an update's columns, so that one compilation has them all.

    The loss is a sum over columns, so this is four problems, solved together.
    """

    parts: tuple[L1 | GroupLasso | Nuclear | Box, ...]

    def prox(self, x: Float[AnyArray, "n v"], step: Float[AnyArray, ""] | float) -> Float[Array, "n v"]:
        """Each part's operator on its columns."""
        quarters = jnp.split(x, len(self.parts), axis=1)
        return jnp.concatenate(
            [part.prox(quarter, step) for part, quarter in zip(self.parts, quarters, strict=True)], axis=1
        )


WEIGHTED = Quarters((L1(0.2), GroupLasso(0.5, "keys"), GroupLasso(0.5, "values"), Nuclear(1.0)))
RESTRICTED = Quarters((L1(0.2), GroupLasso(0.5, "values"), Nuclear(1.0), Box(-0.05, 0.05)))

FAMILIES: Mapping[str, Quarters] = {
    "power-law": WEIGHTED,
    "rank-deficient": WEIGHTED,
    "heavy-tailed": WEIGHTED,
    "alphaedit": RESTRICTED,
}
"""Strengths are for residuals scaled so that the loss has a largest slope of 1 at 0: l1 of strength 1 makes the update 0."""

Forget = Callable[[Problem, solve.RegularizedState], solve.RegularizedState]


def steps_sum_to_the_one_shot_solution(p: Problem) -> Measured:
    """14. sum_t D_t = argmin L_T + R. Control: history left out of A_t and B_t."""
    return worst(_compared(p, _without_history))


def gradient_is_needed(p: Problem) -> Measured:
    """15. As 14, and with the gradient of the past left out, as if the past were stationary without R."""
    return worst(_compared(p, _without_gradient))


def _compared(p: Problem, forget: Forget) -> Iterator[Measured]:
    """For each part of the regulariser."""
    stack, regularizer = _scaled(p), FAMILIES[p.family]
    solution = solve.regularized(p.prior, stack, regularizer, tolerance=TOLERANCE, max_iterations=MAX_ITERATIONS)
    solve.check_convergence(solution.status, regularizer)
    updates = np.asarray(solution.update), _summed(p, stack, regularizer), _summed(p, stack, regularizer, forget)
    for whole, ours, control in zip(*(np.split(each, len(regularizer.parts), axis=1) for each in updates), strict=True):
        yield Measured(relative(ours, whole), relative(control, whole))


def _scaled(p: Problem) -> solve.Constraints:
    """The constraints with residuals for which the largest entry of the loss's gradient at D = 0 is 1."""
    keys = p.reduced()
    slope = 2 * (keys.T * p.weights) @ p.all.residuals
    largest = np.abs(slope if p.basis is None else p.basis @ slope).max()
    return dataclasses.replace(p.all, residuals=p.all.residuals / largest)


def _summed(
    p: Problem, stack: solve.Constraints, regularizer: Quarters, forget: Forget | None = None
) -> Float[np.ndarray, "n v"]:
    state, steps = solve.start_regularized(p.prior, p.kernel.shape[1]), []
    for rows in batches(p):
        block = solve.take(stack, rows)
        known = state if forget is None else forget(p, state)
        state, step = solve.regularized_step(
            known, p.prior, block, regularizer, tolerance=TOLERANCE, max_iterations=MAX_ITERATIONS
        )
        steps.append(step)
    solve.check_convergence(jax.tree.map(lambda *leaves: np.stack(leaves), *[step.status for step in steps]), regularizer)
    return np.sum([np.asarray(step.update) for step in steps], axis=0)


def _without_history(p: Problem, state: solve.RegularizedState) -> solve.RegularizedState:
    return dataclasses.replace(state, statistics=solve.nothing(p.prior, p.kernel.shape[1]))


def _without_gradient(p: Problem, state: solve.RegularizedState) -> solve.RegularizedState:
    """The same A_t, and a B_t for which what is in the kernel would be the past's solution without R: A_t D_<t = B_t."""
    reduced = np.asarray(state.update) if p.basis is None else p.basis.T @ np.asarray(state.update)
    factor, known = np.asarray(p.prior.factor), state.statistics
    whitened = factor[:, None] * reduced if factor.ndim == 1 else factor.T @ reduced
    right = whitened + np.asarray(known.gram) @ whitened
    return dataclasses.replace(state, statistics=dataclasses.replace(known, right=right))
