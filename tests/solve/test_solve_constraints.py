"""Stacks of constraints: residuals, checks, and no-op rows."""

import jax.numpy as jnp
import numpy as np
import pytest
from solve_problems import one_time, problem, relative

from kedit_jax import solve
from kedit_jax.errors import KeditError, NonFiniteError, SolverError

RNG = np.random.default_rng(0)
KERNEL, KEYS, VALUES = RNG.normal(size=(6, 3)), RNG.normal(size=(5, 6)), RNG.normal(size=(5, 3))


def test_residuals_are_float64_against_the_kernel_whatever_its_dtype():
    stack = solve.constraints(KERNEL, KEYS, VALUES)
    assert relative(stack.residuals, VALUES - KEYS @ KERNEL) <= 1e-15
    kernel, keys, values = (jnp.asarray(x, jnp.bfloat16) for x in (KERNEL, KEYS, VALUES))
    rounded = solve.constraints(kernel, keys, values)
    assert rounded.residuals.dtype == np.float64
    assert rounded.keys.dtype == np.float32
    k, x, y = (np.asarray(a.astype(jnp.float32), np.float64) for a in (kernel, keys, values))
    assert relative(rounded.residuals, y - x @ k) <= 1e-15


def test_weights_are_inverse_noise():
    weights = np.array([0.5, 1, 2, 4, 8])
    assert (solve.constraints(KERNEL, KEYS, VALUES, weights).noise == 1 / weights).all()
    assert (solve.constraints(KERNEL, KEYS, VALUES, noise=1 / weights).noise == 1 / weights).all()
    assert (solve.constraints(KERNEL, KEYS, VALUES).noise == 1).all()
    assert (solve.constraints(KERNEL, KEYS, VALUES, noise=0.0).noise == 0).all()
    with pytest.raises(SolverError, match="give one"):
        solve.constraints(KERNEL, KEYS, VALUES, weights, noise=1.0)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.usefixtures("unchecked")
def test_weights_that_are_none(bad):
    weights = np.array([1, 1, bad, 1, bad])
    with pytest.raises(SolverError, match=rf"weights must be finite and > 0.*got {bad} at 2, {bad} at 4"):
        solve.constraints(KERNEL, KEYS, VALUES, weights)
    if bad != 0:
        with pytest.raises(SolverError, match=r"noise must be finite and >= 0"):
            solve.constraints(KERNEL, KEYS, VALUES, noise=weights)
    with pytest.raises(SolverError, match=r"weights has shape \(4,\), but there are 5 keys"):
        solve.constraints(KERNEL, KEYS, VALUES, np.ones(4))


def test_nan_and_infinity_are_all_named():
    keys, values = KEYS.copy(), VALUES.copy()
    keys[1, 2], keys[4, 0], values[3, 1] = np.nan, np.inf, -np.inf
    with pytest.raises(NonFiniteError) as error:
        solve.constraints(KERNEL, keys, values)
    assert "keys: 2 of 30 numbers, in rows 1, 4" in str(error.value)
    assert "values: 1 of 15 numbers, in rows 3" in str(error.value)
    with pytest.raises(NonFiniteError, match="kernel: 18 of 18"):
        solve.constraints(KERNEL * np.nan, KEYS, VALUES)


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit():
    for keys, values in ((KEYS[:, :5], VALUES), (KEYS, VALUES[:4]), (KEYS, VALUES[:, :2]), (KEYS[0], VALUES[0])):
        with pytest.raises(SolverError, match=r"keys \[m, n\]"):
            solve.constraints(KERNEL, keys, values)


def test_concatenate_take_and_pad():
    stack = solve.constraints(KERNEL, KEYS, VALUES, np.arange(1.0, 6))
    parts = [solve.take(stack, np.array([0, 1])), solve.take(stack, np.arange(5) >= 2)]
    again = solve.concatenate(parts)
    assert all((a == b).all() for a, b in zip((again.keys, again.noise), (stack.keys, stack.noise), strict=True))
    assert solve.padded(stack, 8).size == 8
    with pytest.raises(SolverError, match="5 constraints do not fit into 4 rows"):
        solve.padded(stack, 4)
    with pytest.raises(KeditError, match="no blocks"):
        solve.concatenate([])


@pytest.mark.parametrize("family", ["rank-deficient", "alphaedit"])
@pytest.mark.parametrize("form", ["dual", "primal"])
def test_no_op_rows_do_nothing(family, form):
    p = problem(family)
    block = p.block(slice(0, 15))
    plain = one_time(p, block, form=form)
    assert relative(one_time(p, solve.padded(block, 20), form=form), plain) <= 1e-11
    state = solve.start(p.prior, plain.shape[1], capacity=160, form=form)
    state, step = solve.step(state, p.prior, solve.padded(block, 20))
    assert relative(step.dense(), plain) <= 1e-11
    spread = np.zeros(160, bool)
    spread[:15] = True
    masked = solve.masked(p.all, spread)
    assert (np.asarray(masked.keys)[15:] == 0).all()
    assert (np.asarray(masked.noise)[15:] == 1).all()
    assert relative(one_time(p, masked, form=form), plain) <= 1e-11


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_no_constraints_left_are_no_edit(form):
    """All taken back: a state without any, and a mask that keeps none, both exactly 0."""
    p = problem("atypical")
    nothing = p.block(slice(0, 0))
    state, status = solve.refit(p.prior, nothing, capacity=20, form=form)
    solve.check(status)
    assert (np.asarray(solve.total(state, p.prior)) == 0).all()
    masked = solve.solve_active(p.prior, p.block(slice(0, 20)), np.zeros(20), form=form)
    assert (np.asarray(masked.update) == 0).all()


@pytest.mark.parametrize("form", ["dual", "primal"])
def test_an_empty_set_is_named_where_an_edit_is_asked_for(form):
    p = problem("atypical")
    nothing, state = p.block(slice(0, 0)), solve.start(p.prior, p.kernel.shape[1], capacity=20, form=form)
    with pytest.raises(SolverError, match=r"no constraints: give at least one key.*keys \(0, 96\)"):
        solve.constraints(p.kernel, p.keys[:0], p.values[:0])
    for call in (
        lambda: solve.one_time(p.prior, nothing, form=form),
        lambda: solve.solve_active(p.prior, nothing, np.zeros(0), form=form),
        lambda: solve.step(state, p.prior, nothing),
        lambda: solve.sequential(state, p.prior, nothing),
        lambda: solve.statistics(p.prior, nothing),
    ):
        with pytest.raises(SolverError, match="no constraints to solve for: give at least one"):
            call()
