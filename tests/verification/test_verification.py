"""The verification verified: its tolerances, its oracle, its verdicts, and that it leaves the process as it was."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable

import jax
import numpy as np
import pytest

from kedit_jax import solve
from kedit_jax.editing.algebra import compact
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import SessionError, SolverError
from kedit_jax.verification import TOLERANCES, Check, verify_session, verify_solver
from kedit_jax.verification.checks import Measured, worst
from kedit_jax.verification.problems import F32, FAMILIES, Problem, oracle, problem, refined, relative
from kedit_jax.verification.solver import INVARIANTS, Invariant, generated, run

TAU = "tau"
PROMISED = {  # float64, float32; None where nothing is promised
    "1": (1e-10, 1e-5),
    "2": (TAU, 1e-5),
    "3": (1e-11, None),
    "4": (TAU, 2e-5),
    "5": (1e-11, 1e-5),
    "6": (1e-11, 1e-5),
    "7": (0.0, 0.0),
    "8": (1e-11, 1e-5),
    "9": (TAU, 1e-5),
    "10": (1e-10, 1e-5),
    "11": (1e-10, 5e-5),
    "12": (1e-10, None),
    "13a": (1e-10, 1e-5),
    "13b": (1e-12, 1e-5),
    "14": (1e-6, None),
    "15a": (1e-10, 1e-5),
    "15b": (1e-6, None),
    "15c": (1e-10, None),
    "15d": (1e-10, None),
    "session": (1e-10, None),
}


def test_the_tolerances_are_those_promised() -> None:
    assert {name: tuple(tolerance) for name, tolerance in TOLERANCES.items()} == PROMISED
    assert max(p.tau for p in generated()) < 5e-8, "tau is eps64 cond(A0), not a way out"


@pytest.fixture(scope="module")
def seen() -> list[tuple[int, int]]:
    """What progress reported."""
    return []


@pytest.fixture(scope="module")
def checks(seen: list[tuple[int, int]]) -> list[Check]:
    before = dict(jax.config.values)
    found = verify_solver(lambda done, total: seen.append((done, total)))
    assert dict(jax.config.values) == before, "no global setting is changed"
    assert jax.config.jax_enable_x64 is False
    assert jax.numpy.ones(1).dtype == np.float32
    return found


class TestSolver:
    def test_everything_holds(self, checks: list[Check]) -> None:
        assert [check for check in checks if not check.holds] == []

    def test_every_invariant_is_there_in_every_dtype_it_is_promised_in(self, checks: list[Check]) -> None:
        rows = [(name, dtype) for name in PROMISED if name != "session" for dtype in ("float64", "float32")]
        promised = [(name, dtype) for name, dtype in rows if PROMISED[name][dtype == "float32"] is not None]
        assert [(check.id, check.dtype) for check in checks] == promised

    def test_tolerances_are_the_promised_ones(self, checks: list[Check]) -> None:
        for check in checks:
            allowed = PROMISED[check.id][check.dtype == "float32"]
            assert check.tolerance == allowed if allowed != TAU else 1e-10 <= check.tolerance < 5e-8

    def test_every_check_has_a_control_that_fails(self, checks: list[Check]) -> None:
        assert all(check.control is not None and check.control > 1e-2 for check in checks)

    def test_errors_are_of_real_arithmetic(self, checks: list[Check]) -> None:
        """Retraction of everything is exact; in float64 nothing else is, or two sides of a comparison would be one."""
        exact = {check.id for check in checks if check.dtype == "float64" and check.error == 0}
        assert exact == {"7"}

    def test_progress_counts_every_problem(self, checks: list[Check], seen: list[tuple[int, int]]) -> None:
        total = seen[-1][1]
        assert checks
        assert seen == [(done, total) for done in range(1, total + 1)]

    def test_it_is_plain_data(self, checks: list[Check]) -> None:
        rows = json.loads(json.dumps([check.to_dict() for check in checks], allow_nan=False))
        assert list(rows[0]) == ["id", "name", "dtype", "error", "tolerance", "control", "holds"]


def check(error: float = 1e-12, tolerance: float = 1e-10, control: float | None = 0.5) -> Check:
    return Check("1", "name", "float64", error, tolerance, control)


@pytest.mark.parametrize(
    ("made", "holds"),
    [
        (check(), True),
        (check(error=1e-10), True),
        (check(error=1.1e-10), False),
        (check(error=0.0, tolerance=0.0), True),
        (check(error=1e-300, tolerance=0.0), False),
        (check(error=math.nan), False),
        (check(error=math.inf), False),
        (check(tolerance=math.nan), False),
        (check(control=None), True),
        (check(control=1e-2), False),
        (check(control=math.nan), False),
    ],
)
def test_a_check_holds_within_its_tolerance_and_with_a_control_that_fails(made: Check, holds: bool) -> None:
    assert made.holds is holds
    written = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert written["holds"] is holds
    assert all(written[name] is None or math.isfinite(written[name]) for name in ("error", "tolerance", "control"))


def test_the_worst_is_the_largest_error_and_the_weakest_control() -> None:
    assert worst([Measured(1.0, 3.0), Measured(2.0, 5.0), Measured(0.5, None)]) == Measured(2.0, 3.0)
    assert worst([Measured(1.0)]) == Measured(1.0, None)
    assert worst([Measured(math.nan, 3.0), Measured(2.0, math.nan)]) == Measured(math.inf, -math.inf)
    with pytest.raises(ValueError, match="unpack"):
        worst([])


def measured(*found: Measured | Exception) -> Check:
    """The check of an invariant "2" that finds these, on as many problems."""
    results = iter(found)

    def measure(p: Problem) -> Measured:
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    problems = [problem(family) for family in ("rank-deficient", "power-law")[: len(found)]]
    (made,) = run([Invariant("2", "name", measure, lambda p: True)], problems)
    return made


def test_the_error_furthest_into_its_tolerance_is_reported() -> None:
    """One problem's tau is the larger: its larger error is the lesser one."""
    assert problem("rank-deficient").tau > 1e-9
    made = measured(Measured(1e-10, 1.0), Measured(0.9e-10, 0.5))
    assert (made.error, made.tolerance, made.control) == (0.9e-10, 1e-10, 0.5)
    assert made.holds
    assert not measured(Measured(0.0, 1.0), Measured(1e-3, 1.0)).holds
    assert not measured(Measured(math.nan, 1.0), Measured(0.0, 1.0)).holds


def test_a_solve_that_fails_is_a_check_that_does_not_hold() -> None:
    made = measured(Measured(0.0, 1.0), SolverError("not finite"))
    assert made.error == math.inf
    assert not made.holds


class TestProblems:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_they_are_the_same_every_time_and_differ_by_seed(self, family: str) -> None:
        first, again, other = problem(family), problem(family), problem(family, 1)
        np.testing.assert_array_equal(first.keys, again.keys)
        np.testing.assert_array_equal(first.values, again.values)
        assert relative(other.keys, first.keys) > 0.1

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_fifth_of_the_keys_are_near_duplicates_with_conflicting_targets(self, family: str) -> None:
        p = problem(family)
        lengths = np.linalg.norm(p.keys, axis=1)
        cosines = p.keys @ p.keys.T / np.outer(lengths, lengths)
        np.fill_diagonal(cosines, 0)
        close = np.argwhere(np.triu(cosines) > 1 - 1e-6)
        assert len(set(close[:, 1])) == p.size // 5
        targets = [np.linalg.norm(p.all.residuals[i] - p.all.residuals[j]) for i, j in close]
        assert min(targets) > 1

    def test_there_are_thousands_of_edits_and_more_than_the_crossover(self) -> None:
        sizes = {p.size for p in generated()}
        assert max(sizes) >= 2000
        assert min(sizes) > solve.CROSSOVER * max(p.prior.rank for p in generated())

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_oracle_is_the_least_squares_solution(self, family: str) -> None:
        """Of the stacked system [sqrt(W) K; L'] D = [sqrt(W) R; 0], by LAPACK: no normal equations."""
        p = problem(family)
        keys, root = p.reduced(), np.sqrt(p.weights)[:, None]
        system = np.concatenate([root * keys, np.linalg.cholesky(p.precision).T])
        right = np.concatenate([root * p.all.residuals, np.zeros((len(p.precision), p.values.shape[1]))])
        expected = np.linalg.lstsq(system, right, rcond=None)[0]
        expected = expected if p.basis is None else p.basis @ expected
        assert relative(p.truth(), expected) <= p.tau
        assert relative(p.truth(slice(0, 140)), expected) > 1e-2
        assert relative(oracle(p, slice(0, 140), slice(None), p.values, p.kernel), expected) > 1e-2

    @pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="no extended precision on this platform")
    def test_refinement_gains_the_digits_that_a_solve_loses(self) -> None:
        rng = np.random.default_rng(0)
        q, _ = np.linalg.qr(rng.normal(size=(40, 40)))
        a, x = np.asarray((q * np.logspace(0, -6, 40)) @ q.T, np.longdouble), rng.normal(size=(40, 3))
        b = a @ np.asarray(x, np.longdouble)
        assert relative(refined(a, b).astype(float), x) < 1e-13
        assert relative(np.linalg.solve(a.astype(float), b.astype(float)), x) > 1e-12


def tampered(session: EditSession, layer: int, share: float) -> EditSession:
    """The session with one weight of the layer's stored update off by this share of the update's norm."""
    held = session.layers[layer]
    update = np.array(held.update)
    update[0, 0] += share * np.linalg.norm(update)
    sequence = dataclasses.replace(held.sequence, update=update)
    return dataclasses.replace(session, layers={**session.layers, layer: dataclasses.replace(held, sequence=sequence)})


@pytest.fixture(scope="module")
def edited(
    fresh: EditSession, batches: list[list[EditRequest]], another: Callable[..., EditSession]
) -> Callable[..., EditSession]:
    """Makes a session with other settings and two batches."""

    def make(**changes: object) -> EditSession:
        session = another(fresh, **changes)
        for batch in (batches[0], batches[2]):
            session, _ = session.edit(batch)
        return session

    return make


class TestSession:
    def test_every_layer_holds(self, history: list[EditSession]) -> None:
        seen: list[tuple[int, int]] = []
        for session in history[1:]:
            checks = verify_session(session, lambda done, total: seen.append((done, total)))
            assert [check.id for check in checks] == ["layer 0", "layer 2"]
            assert all(check.holds and check.tolerance == 1e-10 and check.dtype == "float64" for check in checks)
            assert all(check.control is not None and check.control > 1e-2 for check in checks)
        assert seen == list(itertools.product((1, 2), (2,))) * 4
        assert jax.config.jax_enable_x64 is False

    def test_after_retraction_and_compaction(self, history: list[EditSession]) -> None:
        shorter, _ = history[-1].retract([str(history[-1].facts[1].id)])
        assert all(check.holds for check in verify_session(shorter))
        dense = compact(history[-1])
        checks = verify_session(dense)
        assert all(check.holds and check.control is None for check in checks)
        assert not verify_session(tampered(dense, 0, 1e-8))[0].holds

    def test_one_changed_weight_is_seen_in_its_layer(self, history: list[EditSession]) -> None:
        assert [check.holds for check in verify_session(tampered(history[-1], 2, 1e-9))] == [True, False]

    def test_one_changed_constraint_is_seen(self, history: list[EditSession]) -> None:
        session = history[-1]
        held = session.layers[0]
        for changed in (
            dataclasses.replace(held.constraints, residuals=held.constraints.residuals * (1 + 1e-8)),
            dataclasses.replace(held.constraints, keys=held.constraints.keys[::-1]),
            dataclasses.replace(held.constraints, noise=held.constraints.noise * 1.01),
        ):
            layers = {**session.layers, 0: dataclasses.replace(held, constraints=changed)}
            assert [check.holds for check in verify_session(dataclasses.replace(session, layers=layers))] == [False, True]

    def test_a_baseline_does_not_hold(self, edited: Callable[..., EditSession]) -> None:
        for changes in ({"history": "unaligned"}, {"post": "rect:0.4", "compensate": False}):
            assert not any(check.holds for check in verify_session(edited(**changes)))

    def test_compensated_post_processing_is_checked_against_its_steps(self, edited: Callable[..., EditSession]) -> None:
        session = edited(post="rect:0.4")
        assert all(check.holds for check in verify_session(session))
        assert not verify_session(tampered(session, 0, 1e-8))[0].holds

    def test_the_latest_batch_alone_can_be_promised(self, edited: Callable[..., EditSession]) -> None:
        assert all(check.holds for check in verify_session(edited(history="latest")))
        assert not any(check.holds for check in verify_session(edited(history="latest-simplified")))

    def test_nothing_to_verify_is_an_error(self, fresh: EditSession) -> None:
        with pytest.raises(SessionError, match="no facts"):
            verify_session(fresh)


def test_every_invariant_names_problems_of_each_of_its_dtypes() -> None:
    problems = generated()
    for invariant in INVARIANTS:
        for dtype in ("float64", "float32"):
            if TOLERANCES[invariant.id].concerns(dtype):
                assert any(p.dtype.name == dtype and invariant.concerns(p) for p in problems)
    assert {p.dtype for p in problems} == {np.dtype(np.float64), F32}
