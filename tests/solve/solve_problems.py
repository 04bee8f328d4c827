"""What the solver's tests share: the generated problems of `kedit_jax.verification` and its independent oracle."""

import functools
from collections.abc import Sequence

import numpy as np
from hypothesis import settings

from kedit_jax import solve
from kedit_jax.verification import problems
from kedit_jax.verification.problems import F32, F64, N, V, oracle, refined, relative

__all__ = [
    "DTYPES",
    "EDITORS",
    "F32",
    "F64",
    "PROPERTY",
    "N",
    "V",
    "one_time",
    "oracle",
    "problem",
    "refined",
    "relative",
    "sequence",
    "summed",
]

EDITORS = problems.FAMILIES
"""Families of priors and keys; the last three are spectra with another editor's prior."""

PROPERTY = settings(max_examples=8, derandomize=True, deadline=None, database=None)
"""Deterministic, and few examples, for every new shape is a compilation."""

DTYPES = (F64, F32)

Problem = problems.Problem
problem = functools.lru_cache(maxsize=64)(problems.problem)
"""Problems are immutable, and many tests ask for the same ones."""


def sequence(
    p: Problem, blocks: Sequence[solve.Constraints], dtype: np.dtype = F64, *, form: str = "dual", capacity: int = 160
) -> tuple[solve.State, list[solve.Step]]:
    """State and steps after adding the blocks one by one."""
    state = solve.start(p.prior, p.kernel.shape[1], capacity=capacity, form=form)
    steps = []
    for block in blocks:
        state, step = solve.step(state, p.prior, block, dtype=dtype)
        solve.check(step.status)
        steps.append(step)
    return state, steps


def summed(steps: Sequence[solve.Step]) -> np.ndarray:
    """The steps' sum in their own dtype, as a kernel would see them."""
    return sum(np.asarray(step.left) @ np.asarray(step.right) for step in steps)


def one_time(p: Problem, stack: solve.Constraints, dtype: np.dtype = F64, **options) -> np.ndarray:
    """The checked one-time update."""
    solution = solve.one_time(p.prior, stack, dtype=dtype, **options)
    solve.check(solution.status)
    update = np.asarray(solution.update)
    assert update.dtype == dtype
    return update
