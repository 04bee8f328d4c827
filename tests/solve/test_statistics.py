"""Sufficient statistics: constant memory, the same edit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solve_problems import EDITORS, F32, F64, N, V, one_time, problem, relative

from kedit_jax import solve
from kedit_jax.errors import SolverError

CONTROL = 1e-2
"""What a negative control must exceed."""


def solved(p, stats: solve.Statistics, **options) -> np.ndarray:
    solution = solve.solve_statistics(p.prior, stats, **options)
    solve.check(solution.status)
    return np.asarray(solution.update)


def parts(p, sizes: tuple[int, ...] = (40, 80, 40)) -> list[solve.Statistics]:
    ends = list(itertools.accumulate(sizes))
    return [solve.statistics(p.prior, p.block(slice(end - size, end))) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("family", EDITORS)
class TestTheSameEdit:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (F32, 1e-5)], ids=["float64", "float32"])
    def test_as_of_the_constraints(self, family, dtype, tolerance):
        p = problem(family, dtype=dtype)
        stats = solve.statistics(p.prior, p.all)
        assert int(stats.count) == 160
        update = solved(p, stats, dtype=dtype)
        assert update.dtype == dtype
        for form in ("dual", "primal"):
            assert relative(update, one_time(p, p.all, dtype, form=form)) <= tolerance
        assert relative(update, p.truth()) <= {F64: p.tau, F32: 1e-5}[dtype]

    def test_sums_in_any_order(self, family):
        p = problem(family)
        for order in itertools.permutations(parts(p)):
            total = solve.nothing(p.prior, V)
            for part in order:
                total = solve.add(total, part)
            assert int(total.count) == 160
            assert relative(solved(p, total), one_time(p, p.all)) <= 1e-10
        first, second, _ = parts(p)
        assert relative(solved(p, solve.add(first, second)), one_time(p, p.all)) > CONTROL
        twice = solve.add(total, first)
        assert relative(solved(p, twice), one_time(p, p.all)) > CONTROL

    def test_a_state_goes_on_from_them(self, family):
        p = problem(family)
        first, second, _ = parts(p)
        state, status = solve.from_statistics(p.prior, solve.add(first, second))
        solve.check(status)
        assert isinstance(state, solve.PrimalState)
        before = np.asarray(solve.total(state, p.prior))
        state, step = solve.step(state, p.prior, p.block(slice(120, 160)))
        solve.check(step.status)
        assert relative(solve.total(state, p.prior), one_time(p, p.all)) <= 1e-10
        assert relative(before + np.asarray(step.dense()), one_time(p, p.all)) <= 1e-10
        unaware, _ = solve.from_statistics(p.prior, first)
        _, step = solve.step(unaware, p.prior, p.block(slice(120, 160)))
        assert relative(before + np.asarray(step.dense()), one_time(p, p.all)) > CONTROL


def test_none_of_them_is_exactly_no_edit():
    p = problem("alphaedit")
    empty = solve.nothing(p.prior, V)
    assert int(empty.count) == 0
    assert empty.gram.dtype == F64
    assert (solved(p, empty) == 0).all()
    stats = solve.statistics(p.prior, p.all)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(solve.add(stats, empty)), jax.tree.leaves(stats), strict=True))


def test_memory_does_not_grow_with_the_constraints():
    p = problem("rank-deficient")
    few, many = (solve.statistics(p.prior, p.block(slice(m))) for m in (5, 160))
    assert jax.tree.map(jnp.shape, few) == jax.tree.map(jnp.shape, many)
    assert few.gram.shape == (N, N)
    assert few.right.shape == (N, V)


def test_no_op_rows_count_for_nothing():
    p = problem("atypical")
    block = p.block(slice(0, 15))
    padded, plain = (solve.statistics(p.prior, stack) for stack in (solve.padded(block, 20), block))
    assert int(padded.count) == 15
    assert relative(padded.gram, plain.gram) <= 1e-14
    assert relative(padded.right, plain.right) <= 1e-14


def test_layers_are_a_jit_of_a_vmap():
    problems = [problem("rank-deficient", seed) for seed in range(3)]
    with solve.float64():
        priors, blocks = (
            jax.tree.map(lambda *x: jnp.stack(x), *many) for many in ([p.prior for p in problems], [p.all for p in problems])
        )

        def compacted(prior, block):
            stats = solve.add(solve.nothing(prior, V), solve.statistics(prior, block))
            return stats, solve.solve_statistics(prior, stats)

        stats, solutions = jax.jit(jax.vmap(compacted))(priors, blocks)
    solve.check(solutions.status)
    assert (np.asarray(stats.count) == 160).all()
    for i, p in enumerate(problems):
        assert relative(solutions.update[i], one_time(p, p.all)) <= 1e-10


def test_a_float32_prior_never_meets_float64():
    p = problem("heavy-tailed", dtype=F32)
    prior, stack = solve.cast(p.prior, F32), jax.tree.map(lambda x: x.astype(F32), p.all)
    stats = solve.add(solve.nothing(prior, V), solve.statistics(prior, stack))
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {F32, np.dtype(np.int32)}
    update = np.asarray(solve.solve_statistics(prior, stats).update)
    assert update.dtype == F32
    assert relative(update, p.truth()) <= 1e-5
    with pytest.raises(SolverError, match="in float32 do not fit the prior of rank 96 in float64"):
        solve.solve_statistics(p.prior, stats)


def test_strict_promotion():
    p = problem("alphaedit", dtype=F32)
    with solve.float64(), jax.numpy_dtype_promotion("strict"):
        for cast in (F32, F64):
            prior = solve.cast(p.prior, cast)
            update = jax.eval_shape(
                lambda prior, stack: solve.solve_statistics(prior, solve.statistics(prior, stack)).update, prior, p.all
            )
            assert update.dtype == cast


class TestRefused:
    def test_equality_constraints(self):
        p = problem("atypical")
        pinned = solve.Constraints(p.all.keys, p.all.residuals, np.where(np.arange(160) == 7, 0.0, p.all.noise))
        with pytest.raises(SolverError, match=r"noise 0.* infinite weight and no statistics: give them noise > 0"):
            solve.statistics(p.prior, pinned)
        with solve.float64():  # not known under a trace, so told by the status
            solution = jax.jit(lambda s: solve.solve_statistics(p.prior, solve.statistics(p.prior, s)))(pinned)
        assert not bool(solution.status.ok)
        assert (np.asarray(solution.update) == 0).all()

    def test_nan_never_spreads(self):
        p = problem("atypical")
        residuals = p.all.residuals.copy()
        residuals[3, 3] = np.nan
        stats = solve.statistics(p.prior, solve.Constraints(p.all.keys, residuals, p.all.noise))
        solution = solve.solve_statistics(p.prior, stats)
        assert not bool(solution.status.finite)
        assert (np.asarray(solution.update) == 0).all()
        with pytest.raises(SolverError, match="nothing was changed"):
            solve.check(solution.status)

    @pytest.mark.usefixtures("unchecked")
    def test_what_does_not_fit(self):
        p, other = problem("atypical"), problem("alphaedit")
        stats = solve.statistics(p.prior, p.all)
        with pytest.raises(SolverError, match="keys have width 96, the prior 97"):
            solve.statistics(solve.ridge(N + 1, 1.0), p.all)
        with pytest.raises(SolverError, match="do not fit the prior of rank"):
            solve.from_statistics(other.prior, stats)
        with pytest.raises(SolverError, match="cannot be added"):
            solve.add(stats, solve.statistics(other.prior, other.all))
        with pytest.raises(SolverError, match="cannot be added"):
            solve.add(stats, solve.nothing(p.prior, V + 1))
        with pytest.raises(SolverError, match="n_values must be at least 1"):
            solve.nothing(p.prior, 0)
