"""Edits under a convex regulariser: sum of steps = one-shot, the conditions of the minimum, and failure as a value."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from regularizer_cases import CASES, SIZE, blocks, in_sequence, one_shot, regularised
from solve_problems import F32, F64, N, V, problem, relative

from kedit_jax import solve
from kedit_jax.errors import SolverError

FAMILIES = ("atypical", "heavy-tailed", "alphaedit")
"""MEMIT's prior on keys the corpus has not seen, on heavy-tailed ones, and a prior with a basis."""

CONTROL = 1e-2
"""What a solve with a part of the formula left out must exceed."""

every_case = pytest.mark.parametrize("name", CASES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def made(family: str, name: str) -> solve.Regularizer:
    return CASES[name].make(regularised(family).strength(name))


def without_history(family: str):
    """A_t and B_t of the new block alone."""
    return lambda state: dataclasses.replace(state, statistics=solve.nothing(problem(family).prior, V))


def without_gradient(family: str):
    """The past taken for stationary, A_{t-1} D_<t = B_{t-1}, so that only the new block pulls: true without R alone."""
    prior = problem(family).prior

    def spoil(state: solve.RegularizedState) -> solve.RegularizedState:
        update = np.asarray(state.update)
        within = update if prior.basis is None else np.asarray(prior.basis).T @ update
        factor = np.asarray(prior.factor)
        x = factor[:, None] * within if factor.ndim == 1 else factor.T @ within
        with solve.float64():
            right = jnp.asarray(x + np.asarray(state.statistics.gram) @ x)
        return dataclasses.replace(state, statistics=dataclasses.replace(state.statistics, right=right))

    return spoil


@every_family
@every_case
class TestProposition34:
    def test_steps_sum_to_the_one_shot_solution(self, family, name):
        total, statuses = in_sequence(family, made(family, name))
        for status in statuses:
            solve.check_convergence(status, made(family, name))
        assert relative(total, one_shot(family, name).update) <= 1e-6

    def test_solution_meets_the_conditions_of_the_minimum(self, family, name):
        solution, truth = one_shot(family, name), regularised(family)
        assert truth.optimality(name, solution.update, solution.dual) <= 1e-6
        assert truth.optimality(name, truth.plain, solution.dual) > CONTROL
        assert truth.optimality(name, 0.9 * np.asarray(solution.update), solution.dual) > CONTROL
        assert relative(solution.update, truth.plain) > CONTROL

    def test_negative_control_history_left_out(self, family, name):
        total, _ = in_sequence(family, made(family, name), without_history(family), tolerance=1e-6)
        assert relative(total, one_shot(family, name).update) > CONTROL

    def test_negative_control_gradient_left_out(self, family, name):
        total, _ = in_sequence(family, made(family, name), without_gradient(family), tolerance=1e-6)
        assert relative(total, one_shot(family, name).update) > CONTROL


class TestSpecialCases:
    @every_family
    def test_squared_norm_is_a_stronger_prior(self, family):
        p, strength = problem(family), regularised(family).strength("squared norm")
        more = p.precision + strength * np.eye(len(p.precision))
        prior = solve.from_precision(more) if p.basis is None else solve.Prior(np.linalg.cholesky(more), p.basis)
        expected = solve.one_time(prior, p.block(slice(SIZE)))
        solve.check(expected.status)
        assert relative(one_shot(family, "squared norm").update, expected.update) <= 1e-7

    @pytest.mark.parametrize("inactive", [solve.SquaredNorm(0.0), solve.L1(0.0), solve.Box(-1e6, 1e6)], ids=repr)
    def test_inactive_regulariser_is_the_one_time_edit(self, inactive):
        """Y is 0 at the solution, and no scale for a residual: the floor of the scale has to do."""
        p = problem("atypical")
        solution = solve.regularized(p.prior, p.block(slice(SIZE)), inactive)
        solve.check_convergence(solution.status, inactive)
        assert relative(solution.update, solve.one_time(p.prior, p.block(slice(SIZE))).update) <= 1e-7

    def test_strong_enough_a_regulariser_gives_exactly_zero(self):
        """The update is no scale for a residual either."""
        p, truth = problem("atypical"), regularised("atypical")
        for name in ("l1", "groups of keys", "nuclear"):
            limit = CASES[name].dual_norm(2 * truth.b)
            solution = solve.regularized(p.prior, p.block(slice(SIZE)), CASES[name].make(1.01 * limit))
            solve.check_convergence(solution.status)
            assert (np.asarray(solution.update) == 0).all()
        weaker = solve.regularized(p.prior, p.block(slice(SIZE)), solve.Nuclear(0.9 * limit))
        assert (np.asarray(weaker.update) != 0).any()

    def test_structure_is_exact(self):
        update = {name: np.asarray(one_shot("atypical", name).update) for name in CASES}
        assert 0.5 < (update["l1"] == 0).mean() < 1
        dead = (update["groups of keys"] == 0).all(1)
        assert 0 < dead.sum() < N
        assert (update["groups of keys"][~dead] != 0).all()
        bound = regularised("atypical").strength("box")
        assert np.abs(update["box"]).max() == bound
        singular = np.linalg.svd(update["nuclear"], compute_uv=False)
        assert (singular < 1e-12 * singular[0]).any()

    def test_objective_is_lowest_at_the_solution(self):
        """The objective as written in the docstring, over the constraints themselves."""
        p, stack, rng = problem("heavy-tailed"), problem("heavy-tailed").block(slice(SIZE)), np.random.default_rng(0)
        strength, update = regularised("heavy-tailed").strength("l1"), np.asarray(one_shot("heavy-tailed", "l1").update)

        def objective(d: np.ndarray) -> float:
            misfit = ((stack.residuals - stack.keys @ d) ** 2 / stack.noise[:, None]).sum()
            return misfit + (d * (p.precision @ d)).sum() + strength * np.abs(d).sum()

        lowest = objective(update)
        for scale in (1e-4, 1e-2):
            change = scale * np.abs(update).max() * rng.normal(size=(20, *update.shape))
            assert all(objective(update + c) > lowest and objective(update + c * (update != 0)) > lowest for c in change)
        assert objective(0.99 * update) > lowest < objective(1.01 * update)


def test_users_own():
    """A function, and an object with `prox` alone: entries >= 0, as the library's box would have it."""

    def positive(x, step):
        return jnp.maximum(x, 0)

    @dataclasses.dataclass(frozen=True)
    class Positive:
        def prox(self, x, step):
            return positive(x, step)

    p = problem("atypical")
    expected = solve.regularized(p.prior, p.block(slice(SIZE)), solve.Box(0.0, np.inf))
    solve.check_convergence(expected.status)
    for own in (positive, Positive()):
        total, statuses = in_sequence("atypical", own)
        assert all(bool(status.ok) for status in statuses)
        assert relative(total, expected.update) <= 1e-6
    assert relative(np.maximum(regularised("atypical").plain, 0), expected.update) > CONTROL


class TestSequence:
    def test_memory_does_not_grow(self):
        p = problem("atypical")
        before = solve.start_regularized(p.prior, V)
        after, _ = solve.regularized_step(before, p.prior, blocks("atypical")[0], made("atypical", "l1"))
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(after)] == [(x.shape, x.dtype) for x in jax.tree.leaves(before)]
        assert int(after.statistics.count) == 24

    def test_step_that_did_not_converge_is_made_up_for(self):
        family, regularizer = "atypical", made("atypical", "groups of keys")
        state, prior, total = solve.start_regularized(problem(family).prior, V), problem(family).prior, 0.0
        for i, block in enumerate(blocks(family)):
            state, step = solve.regularized_step(state, prior, block, regularizer, max_iterations=2000 if i == 3 else 3)
            assert bool(step.status.finite)
            assert bool(step.status.converged) == bool(step.status.ok) == (i == 3)
            total = total + np.asarray(step.update)
        assert relative(total, one_shot(family, "groups of keys").update) <= 1e-6

    def test_warm_start_saves_iterations_and_changes_nothing(self):
        p, truth = problem("atypical"), regularised("atypical")
        stack, near = p.block(slice(SIZE)), solve.GroupLasso(1.02 * truth.strength("groups of keys"))
        cold = solve.regularized(p.prior, stack, near)
        warm = solve.regularized(p.prior, stack, near, start=one_shot("atypical", "groups of keys"))
        again = solve.regularized(p.prior, stack, near, start=cold)
        for solution in (cold, warm, again):
            solve.check_convergence(solution.status)
        assert int(again.status.iterations) < int(warm.status.iterations) < int(cold.status.iterations)
        assert relative(warm.update, cold.update) <= 1e-6


class TestFailureIsAValue:
    def test_too_few_iterations(self):
        p, regularizer = problem("atypical"), made("atypical", "l1")
        solution = solve.regularized(p.prior, p.block(slice(SIZE)), regularizer, max_iterations=30)
        status = solution.status
        assert (bool(status.ok), bool(status.converged), bool(status.finite)) == (False, False, True)
        assert int(status.iterations) == 30
        assert max(float(status.primal_residual), float(status.dual_residual)) > 1e-8
        assert (np.asarray(solution.update) != 0).any()
        with pytest.raises(
            SolverError, match=r"no convergence with L1\(strength=.*in 30 iterations: primal(.|\n)*max_iterations"
        ):
            solve.check_convergence(status, regularizer)
        assert bool(one_shot("atypical", "l1").status.ok)

    def test_bounds_that_nothing_in_the_subspace_meets(self):
        p = problem("alphaedit")
        solution = solve.regularized(p.prior, p.block(slice(SIZE)), solve.Box(0.5, 1.0), max_iterations=300)
        assert not bool(solution.status.converged)
        assert float(solution.status.primal_residual) > CONTROL
        with pytest.raises(SolverError, match="Bounds that no update in the prior's subspace meets never converge"):
            solve.check_convergence(solution.status)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_proximal_operator_that_is_not_finite(self, bad):
        def broken(x, step):
            return jnp.where(x > 0, x, bad)

        p = problem("atypical")
        before = solve.start_regularized(p.prior, V)
        state, step = solve.regularized_step(before, p.prior, blocks("atypical")[0], broken)
        assert not bool(step.status.proximal)
        assert not bool(step.status.finite)
        assert (np.asarray(step.update) == 0).all()
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True))
        with pytest.raises(SolverError, match=r"proximal operator of .*broken returned NaN or infinity in iteration 1"):
            solve.check_convergence(step.status, broken)

    @pytest.mark.parametrize("where", ["keys", "residuals", "noise"])
    def test_constraints_that_are_not_finite(self, where):
        p, good = problem("atypical"), blocks("atypical")[0]
        broken = dataclasses.replace(good, **{where: np.where(np.arange(24) == 3, np.nan, getattr(good, where).T).T})
        before = solve.start_regularized(p.prior, V)
        state, step = solve.regularized_step(before, p.prior, broken, solve.L1(1.0))
        assert not bool(step.status.finite)
        assert bool(step.status.proximal)
        assert (np.asarray(step.update) == 0).all()
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True))
        with pytest.raises(SolverError, match="not finite, or A is not positive definite"):
            solve.check_convergence(step.status)

    def test_weights_that_drown_the_prior(self):
        """Beside weights of 1e18 the prior is below rounding, and A as computed is indefinite."""
        p = problem("atypical")
        for weight, fine in ((1.0, True), (1e18, False)):
            stack = solve.constraints(p.kernel, p.keys[:24], p.values[:24], np.full(24, weight))
            solution = solve.regularized(p.prior, stack, solve.L1(1000.0))
            assert bool(solution.status.finite) == fine
            assert np.isfinite(np.asarray(solution.update)).all()
        assert (np.asarray(solution.update) == 0).all()
        with pytest.raises(SolverError, match="weights too large beside the prior"):
            solve.check_convergence(solution.status)


@pytest.mark.usefixtures("unchecked")
class TestMisuseIsNamed:
    def solved(self, regularizer=solve.L1(1.0), stack=None, prior=None, **options):  # noqa: B008
        p = problem("atypical")
        given = p.block(slice(24)) if stack is None else stack
        return solve.regularized(prior or p.prior, given, regularizer, **options)

    def test_shape_and_dtype_of_the_proximal_operator(self):
        def transposed(x, step):
            return x.T

        def rounded(x, step):
            return x.astype(jnp.float32)

        def nothing(x, step):
            return None

        with pytest.raises(SolverError, match=r"transposed turned float64 \(96, 16\) into float64 \(16, 96\)"):
            self.solved(transposed)
        with pytest.raises(SolverError, match=r"rounded turned float64 \(96, 16\) into float32 \(96, 16\)"):
            self.solved(rounded)
        with pytest.raises(SolverError, match=r"nothing returned NoneType, not an array: return u"):
            self.solved(nothing)

    def test_no_regulariser(self):
        prior = problem("atypical").prior
        state = solve.start_regularized(prior, V)
        for bad in (None, 0.1, solve.L1):
            with pytest.raises(SolverError, match="is no regulariser"):
                self.solved(bad)
            with pytest.raises(SolverError, match="is no regulariser"):
                solve.regularized_step(state, prior, blocks("atypical")[0], bad)

    def test_limits_are_named_together(self):
        with pytest.raises(
            SolverError, match=r"tolerance must be finite and at least 2.2e-15(.|\n)*max_iterations must be at"
        ):
            self.solved(tolerance=0.0, max_iterations=0)
        for bad in (np.nan, np.inf, -1.0):
            with pytest.raises(SolverError, match="tolerance must be finite"):
                self.solved(tolerance=bad)
        p = problem("heavy-tailed", dtype=F32)
        with pytest.raises(
            SolverError, match=r"at least 1.2e-06 for a prior in float32, got 1e-09: raise it, or use a float64"
        ):
            self.solved(prior=solve.cast(p.prior, F32), stack=p.block(slice(24)))

    def test_constraints(self):
        p = problem("atypical")
        equality = solve.constraints(p.kernel, p.keys[:24], p.values[:24], noise=0.0)
        with pytest.raises(SolverError, match="equality constraints"):
            self.solved(stack=equality)
        with pytest.raises(SolverError, match="no constraints"):
            self.solved(stack=p.block(slice(0)))
        with pytest.raises(SolverError, match="keys have width 96, the prior 97"):
            self.solved(prior=solve.ridge(N + 1, 1.0))
        with pytest.raises(SolverError, match="cannot be added"):
            solve.regularized_step(solve.start_regularized(p.prior, V + 1), p.prior, p.block(slice(24)), solve.L1(1.0))

    def test_start(self):
        other = solve.start_regularized(problem("atypical").prior, V + 1)
        with pytest.raises(SolverError, match=r"start has an update \(96, 17\).*this problem's are \(96, 16\)"):
            self.solved(start=other)


class TestTransformations:
    def test_layers_are_a_vmap(self):
        """Two layers that take different numbers of iterations, by jit and vmap, at once and in sequence."""
        regularizer, problems = solve.GroupLasso(200.0), [problem("atypical", seed) for seed in range(2)]
        with solve.float64():
            priors, first, both = (
                jax.tree.map(lambda *x: jnp.stack(x), *many)
                for many in (
                    [p.prior for p in problems],
                    [p.block(slice(24)) for p in problems],
                    [p.block(slice(48)) for p in problems],
                )
            )
            second = jax.tree.map(lambda x: x[:, 24:48], both)
            whole = jax.jit(jax.vmap(lambda prior, stack: solve.regularized(prior, stack, regularizer)))(priors, both)
            step = jax.jit(jax.vmap(lambda state, prior, block: solve.regularized_step(state, prior, block, regularizer)))
            states = jax.vmap(lambda prior: solve.start_regularized(prior, V))(priors)
            states, one = step(states, priors, first)
            states, two = step(states, priors, second)
        for status in (whole.status, one.status, two.status):
            solve.check_convergence(status)
        assert len(set(np.asarray(whole.status.iterations).tolist())) == 2
        for i, p in enumerate(problems):
            alone = solve.regularized(p.prior, p.block(slice(48)), regularizer)
            assert relative(whole.update[i], alone.update) <= 1e-6
            assert int(whole.status.iterations[i]) == int(alone.status.iterations)
            assert relative(np.asarray(one.update[i]) + np.asarray(two.update[i]), alone.update) <= 1e-6

    def test_failing_layers_are_named(self):
        p = problem("atypical")
        stacked = jax.tree.map(lambda x: np.stack([x, x]), p.block(slice(24)))
        stacked.residuals[1, 0, 0] = np.nan
        with solve.float64():
            status = jax.vmap(lambda stack: solve.regularized(p.prior, stack, solve.L1(1000.0)))(stacked).status
        with pytest.raises(SolverError) as error:
            solve.check_convergence(status)
        assert "layer 1: the numbers are not finite" in str(error.value)
        assert "layer 0" not in str(error.value)

    def test_equal_regularisers_compile_once(self):
        traces, p = [], problem("atypical")

        @dataclasses.dataclass(frozen=True)
        class Counted:
            strength: float

            def prox(self, x, step):
                traces.append(1)
                return solve.L1(self.strength).prox(x, step)

        state = solve.start_regularized(p.prior, V)
        for block in blocks("atypical")[:3]:
            state, _ = solve.regularized_step(state, p.prior, block, Counted(500.0), max_iterations=10)
        first = len(traces)
        solve.regularized_step(state, p.prior, blocks("atypical")[3], Counted(500.0), max_iterations=20, tolerance=1e-6)
        assert len(traces) == first
        solve.regularized_step(state, p.prior, blocks("atypical")[3], Counted(400.0), max_iterations=10)
        assert len(traces) > first


class TestDtypes:
    def test_float32_results_of_float64_work(self):
        p = problem("atypical", dtype=F32)
        regularizer = made("atypical", "l1")
        wide = solve.regularized(p.prior, p.block(slice(24)), regularizer)
        narrow = solve.regularized(p.prior, p.block(slice(24)), regularizer, dtype=F32)
        state, step = solve.regularized_step(
            solve.start_regularized(p.prior, V), p.prior, p.block(slice(24)), regularizer, dtype=F32
        )
        assert (wide.update.dtype, narrow.update.dtype, step.update.dtype, state.update.dtype) == (F64, F32, F32, F64)
        for update in (narrow.update, step.update):
            assert relative(update, wide.update) <= 1e-6
        assert not jax.config.jax_enable_x64

    def narrow(self, family: str, name: str) -> solve.RegularizedSolution:
        """With a float32 prior: no float64 at all."""
        p = problem(family, dtype=F32)
        prior, stack = solve.cast(p.prior, F32), jax.tree.map(lambda x: x.astype(F32), p.block(slice(SIZE)))
        return solve.regularized(prior, stack, made(family, name), tolerance=1e-5)

    @pytest.mark.parametrize("name", ["l1", "nuclear"])
    @pytest.mark.parametrize("family", ["heavy-tailed", "alphaedit"])
    def test_pure_float32(self, family, name):
        solution = self.narrow(family, name)
        solve.check_convergence(solution.status)
        assert {x.dtype for x in (solution.update, solution.dual)} == {F32}
        assert relative(solution.update, one_shot(family, name).update) <= 1e-4

    def test_pure_float32_says_when_it_cannot(self):
        """Weakly regularised and ill-conditioned: rounding keeps the residuals up, and the penalty must not run away."""
        solution = self.narrow("heavy-tailed", "box")
        assert not bool(solution.status.converged)
        assert bool(solution.status.finite)
        assert int(solution.status.iterations) == 2000

    @pytest.mark.parametrize("cast", [F32, F64], ids=str)
    def test_strict_promotion(self, cast):
        p = problem("alphaedit", dtype=F32)
        prior = solve.cast(p.prior, cast)
        with solve.float64(), jax.numpy_dtype_promotion("strict"):
            for name in CASES:
                regularizer = made("alphaedit", name)

                def both(prior, stack, regularizer=regularizer):
                    state, step = solve.regularized_step(
                        solve.start_regularized(prior, V), prior, stack, regularizer, tolerance=1e-5
                    )
                    return step.update, solve.regularized(prior, stack, regularizer, start=state, tolerance=1e-5).update

                updates = jax.eval_shape(both, prior, p.block(slice(24)))
                assert {update.dtype for update in updates} == {cast}


def test_process_without_float64_keeps_its_setting():
    code = (
        "import jax, numpy as np; import kedit_jax.solve as s;"
        "stack = s.constraints(np.zeros((4, 2)), np.eye(4), np.ones((4, 2)));"
        "d = s.regularized(s.ridge(4, 1.0), stack, s.L1(0.4)); s.check_convergence(d.status);"
        "assert d.update.dtype == 'float64' and np.allclose(d.update, 0.4, atol=1e-8);"  # (1 - strength / 2) / 2
        "assert not jax.config.jax_enable_x64"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
