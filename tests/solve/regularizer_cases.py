"""Regularisers of the library beside what they stand for in NumPy, and regularised problems of moderate strength."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from solve_problems import V, problem

from kedit_jax import solve

SIZE = 96
"""Constraints of a regularised problem."""


def shrink(x: np.ndarray, by: float, axis: int | None) -> np.ndarray:
    """Every entry, or every row or column, brought closer to 0."""
    length = np.abs(x) if axis is None else np.sqrt((x * x).sum(axis, keepdims=True))
    return np.where(length > by, x * (1 - by / np.where(length > 0, length, 1.0)), 0.0)


def shrink_singular(x: np.ndarray, by: float) -> np.ndarray:
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return u @ np.diag(np.maximum(s - by, 0)) @ vt


def norms(x: np.ndarray, axis: int) -> np.ndarray:
    return np.sqrt((x * x).sum(axis))


@dataclasses.dataclass(frozen=True)
class Case:
    """One regulariser: the library's of a strength s, and in NumPy its value, proximal operator and dual norm.

    The dual norm of 2 B is the strength at which the update becomes 0, where there is one.
    """

    make: Callable[[float], solve.Regularizer]
    value: Callable[[np.ndarray, float], float]
    prox: Callable[[np.ndarray, float, float], np.ndarray]
    """(x, step, strength)."""
    dual_norm: Callable[[np.ndarray], float] | None = None


CASES = {
    "l1": Case(
        solve.L1, lambda x, s: s * np.abs(x).sum(), lambda x, t, s: shrink(x, t * s, None), lambda g: np.abs(g).max()
    ),
    "groups of keys": Case(
        solve.GroupLasso,
        lambda x, s: s * norms(x, 1).sum(),
        lambda x, t, s: shrink(x, t * s, 1),
        lambda g: norms(g, 1).max(),
    ),
    "groups of values": Case(
        lambda s: solve.GroupLasso(s, over="values"),
        lambda x, s: s * norms(x, 0).sum(),
        lambda x, t, s: shrink(x, t * s, 0),
        lambda g: norms(g, 0).max(),
    ),
    "nuclear": Case(
        solve.Nuclear,
        lambda x, s: s * np.linalg.svd(x, compute_uv=False).sum(),
        lambda x, t, s: shrink_singular(x, t * s),
        lambda g: np.linalg.norm(g, 2),
    ),
    "squared norm": Case(solve.SquaredNorm, lambda x, s: s * (x * x).sum(), lambda x, t, s: x / (1 + 2 * t * s)),
    "box": Case(
        lambda s: solve.Box(-s, s),
        lambda x, s: 0.0 if (np.abs(x) <= s).all() else np.inf,
        lambda x, t, s: np.minimum(np.maximum(x, -s), s),
    ),
}


@dataclasses.dataclass(frozen=True)
class Regularised:
    """The first SIZE constraints of a family in NumPy: A, B and basis N, and the update without a regulariser."""

    a: np.ndarray
    b: np.ndarray
    basis: np.ndarray
    plain: np.ndarray

    def strength(self, name: str) -> float:
        """One that matters, and leaves something: a fifth of what makes the update 0; bounds that cut some of it off."""
        if name == "box":
            return 0.4 * float(np.abs(self.plain).max())
        if name == "squared norm":
            return 10 * float(np.linalg.eigvalsh(self.a)[0])
        return 0.2 * float(CASES[name].dual_norm(2 * self.basis @ self.b))

    def optimality(self, name: str, update: np.ndarray, dual: np.ndarray) -> float:
        """How far update and dual are from the conditions of the minimum, relatively; 0 at the minimum alone.

        dual is a subgradient of R at the update, the update is in the prior's subspace, and the gradient of L + R is 0
        there: in the norm of A^-1, half of it bounds the distance to the minimum in the norm of A.
        """
        update, dual = np.asarray(update, np.float64), np.asarray(dual, np.float64)
        step = np.linalg.norm(update) / max(np.linalg.norm(dual), 1e-300)
        fixed = CASES[name].prox(update + step * dual, step, self.strength(name))
        x = self.basis.T @ update
        slope = 2 * (self.a @ x - self.b) + self.basis.T @ dual
        distance = np.sqrt((slope * np.linalg.solve(self.a, slope)).sum()) / 2 / np.sqrt((x * (self.a @ x)).sum())
        length = np.linalg.norm(update)
        return max(
            float(np.linalg.norm(fixed - update) / length), float(np.linalg.norm(self.basis @ x - update) / length), distance
        )


@functools.lru_cache(maxsize=16)
def regularised(family: str) -> Regularised:
    p = problem(family)
    basis = np.eye(len(p.kernel)) if p.basis is None else p.basis
    keys, weights = p.keys[:SIZE] @ basis, p.weights[:SIZE, None]
    a = p.precision + keys.T @ (weights * keys)
    b = keys.T @ (weights * (p.values - p.keys @ p.kernel)[:SIZE])
    return Regularised(a, b, basis, basis @ np.linalg.solve(a, b))


def blocks(family: str, rows: int = 24) -> list[solve.Constraints]:
    """The constraints of `regularised(family)`, a few at a time."""
    return [problem(family).block(slice(i, i + rows)) for i in range(0, SIZE, rows)]


@functools.lru_cache(maxsize=64)
def one_shot(family: str, name: str) -> solve.RegularizedSolution:
    """All constraints together, checked."""
    regularizer = CASES[name].make(regularised(family).strength(name))
    solution = solve.regularized(problem(family).prior, problem(family).block(slice(SIZE)), regularizer)
    solve.check_convergence(solution.status, regularizer)
    return solution


def in_sequence(
    family: str,
    regularizer: solve.Regularizer,
    spoil: Callable[[solve.RegularizedState], solve.RegularizedState] = lambda state: state,
    **options,
) -> tuple[np.ndarray, list[solve.Convergence]]:
    """The sum of the steps and their statuses; `spoil` is done to the state before each step."""
    prior, total, statuses = problem(family).prior, 0.0, []
    state = solve.start_regularized(prior, V)
    for block in blocks(family):
        state, step = solve.regularized_step(spoil(state), prior, block, regularizer, **options)
        total = total + np.asarray(step.update)
        statuses.append(step.status)
    return total, statuses
