"""Prop. 3.5 as the paper writes it: one step that takes facts out and puts others in, against retract and step."""

import numpy as np
import pytest
from solve_problems import problem, relative, sequence

from kedit_jax import solve

OUT, IN = np.arange(20, 40), np.arange(100, 120)


def gram(p, rows) -> np.ndarray:
    """K' Omega K in the prior's basis."""
    keys = reduced(p, rows)
    return (keys.T * p.weights[rows]) @ keys


def pull(p, rows, kernel) -> np.ndarray:
    """K' Omega (V - K W), in the prior's basis."""
    keys = p.keys[rows]
    return (reduced(p, rows).T * p.weights[rows]) @ (p.values[rows] - keys @ kernel)


def reduced(p, rows) -> np.ndarray:
    return p.keys[rows] if p.basis is None else p.keys[rows] @ p.basis


def paper(p, before: np.ndarray, *, removal: bool = True) -> np.ndarray:
    """A(S_t) D_t = K_t' Omega_t (V_t - K_t W) - K_O' Omega_O (V_O - K_O W), W the kernel before."""
    kernel, held = p.kernel + before, np.arange(80)
    a = p.precision + gram(p, held) + gram(p, IN) - gram(p, OUT)
    right = pull(p, IN, kernel) - (pull(p, OUT, kernel) if removal else 0)
    step = np.linalg.solve(a, right)
    return before + (step if p.basis is None else p.basis @ step)


@pytest.mark.parametrize("family", ["rank-deficient", "heavy-tailed", "atypical", "alphaedit", "ridge"])
def test_retract_and_step_are_the_papers_single_step(family: str) -> None:
    p = problem(family)
    state, _ = sequence(p, [p.block(slice(i, i + 20)) for i in range(0, 80, 20)])
    before = np.asarray(solve.total(state, p.prior))
    state, status = solve.retract(state, ~np.isin(np.arange(160), OUT))
    solve.check(status)
    state, step = solve.step(state, p.prior, p.block(IN))
    solve.check(step.status)
    after = np.asarray(solve.total(state, p.prior))
    assert relative(paper(p, before), after) <= p.tau
    assert relative(after, p.truth(np.r_[0:20, 40:80, 100:120])) <= p.tau
    assert relative(paper(p, before, removal=False), after) > 1e-2
