"""The solver that sessions run on a CPU: the same steps as the compiled one, nothing of size n factored, nothing copied."""

import tracemalloc
from collections.abc import Callable

import jax
import numpy as np
import pytest
import scipy.linalg
from solve_problems import EDITORS, N, V, one_time, problem, relative
from solve_problems import sequence as compiled_steps

from kedit_jax import solve
from kedit_jax.errors import SolverError
from kedit_jax.solve import host, sequences
from kedit_jax.solve.rows import Rows
from kedit_jax.verification import sums
from kedit_jax.verification.checks import Measured
from kedit_jax.verification.problems import Problem


def run(prior: solve.Prior, stack: solve.Constraints, size: int, start: host.HostSequence | None = None):
    """The sequence after all constraints, `size` at a time, and every step."""
    sequence, steps = start or host.begin(prior, stack.residuals.shape[1]), []
    for begin in range(0, stack.size, size):
        block = solve.take(stack, np.arange(begin, min(begin + size, stack.size)))
        sequence, step = host.advance(sequence, prior, block)
        steps.append(step)
    return sequence, steps


# --- the same edit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "size"), [*((family, 20) for family in EDITORS), ("power-law", 1)])
def test_steps_are_those_of_the_compiled_solver(family: str, size: int) -> None:
    """160 constraints, so that rows are multiplied out after 80 and again and again."""
    p = problem(family)
    sequence, steps = run(p.prior, p.all, size)
    assert sequence.solver.base is not None
    assert len(sequence.solver.rows) <= max(1, int(np.ceil(host.TAIL * p.prior.rank)))
    whole = one_time(p, p.all)
    assert relative(sequence.update, whole) <= 1e-10
    assert relative(sum(np.asarray(step.dense()) for step in steps), whole) <= 1e-10
    assert relative(host.total(sequence.solver, p.prior), whole) <= 1e-10
    assert relative(sequence.update, p.truth()) <= p.tau
    if (family, size) == ("power-law", 20):
        _, compiled = compiled_steps(p, [p.block(slice(begin, begin + size)) for begin in (0, 20)], form="primal")
        assert all(relative(ours.dense(), theirs.dense()) <= p.tau for ours, theirs in zip(steps, compiled, strict=False))


def test_a_sequence_whose_update_is_known_is_remembered_to_the_last_bit() -> None:
    """What a checkpoint needs not store: the rows, and after 80 of them the inverse that they are multiplied into."""
    p = problem("power-law")
    for count in (60, 160):
        stack = solve.take(p.all, np.arange(count))
        written, _ = run(p.prior, stack, 20)
        again = host.begin(p.prior, V, update=written.update)
        for begin in range(0, count, 20):
            again = host.remember(again, p.prior, solve.take(stack, np.arange(begin, begin + 20)))
        assert (again.solver.base is None) == (count == 60)
        for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(written), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(SolverError, match="no constraints"):
        host.remember(again, p.prior, solve.take(p.all, np.arange(0)))


def without_history(patch: pytest.MonkeyPatch) -> None:
    """Every step starts from the prior alone."""
    original = host.append

    def forgetful(state: host.HostState, *block: np.ndarray) -> tuple[host.HostState, solve.Status]:
        return original(host.HostState(Rows(state.rows.array[:0]), Rows(state.solved.array[:0]), None), *block)

    patch.setattr(host, "append", forgetful)


@pytest.mark.parametrize("family", ["power-law", "alphaedit"])
def test_negative_control_history_left_out(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_history(monkeypatch)
    p = problem(family)
    assert relative(run(p.prior, p.all, 20)[0].update, one_time(p, p.all)) > 1e-2


@pytest.mark.parametrize("check", [sums.steps_sum_to_the_one_time_edit, sums.steps_equal_an_independent_solve])
def test_verification_measures_these_steps(check: Callable[[Problem], Measured], monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem("power-law", m=64)
    monkeypatch.setattr(sums, "FORMS", ())  # the compiled solver's steps have their own tests
    assert check(p).error <= p.tau
    without_history(monkeypatch)
    assert check(p).error > 1e-2


@pytest.mark.parametrize("family", ["power-law", "alphaedit"])
def test_unaligned_steps_are_those_of_the_compiled_sequence(family: str) -> None:
    p = problem(family)
    ours, theirs = host.begin(p.prior, V), sequences.begin(p.prior, V, mode="unaligned")
    for begin in range(0, p.all.size, 40):
        block = p.block(slice(begin, begin + 40))
        ours, step = host.advance(ours, p.prior, block, aligned=False)
        theirs, taken = sequences.advance(theirs, p.prior, block, mode="unaligned")
        assert relative(step.dense(), np.asarray(taken.update)) <= p.tau
    assert relative(ours.update, np.asarray(theirs.update)) <= p.tau
    assert len(ours.solver.rows) == 0, "nothing is kept"
    assert relative(ours.update, one_time(p, p.all)) > 1e-2, "negative control: the history matters here"


def test_equality_constraints_are_met() -> None:
    p, rng = problem("ridge"), np.random.default_rng(0)
    stack = solve.constraints(p.kernel, rng.normal(size=(90, N)), rng.normal(size=(90, V)), noise=0.0)
    sequence, _ = run(p.prior, stack, 15)
    assert relative(stack.keys @ sequence.update, stack.residuals) <= 1e-10
    assert relative(sequence.update, one_time(p, stack)) <= 1e-10


def test_conflicting_duplicates_are_solved() -> None:
    p = problem("atypical")
    rows = np.tile(np.arange(p.size // 2), 2)
    stack = solve.constraints(p.kernel, p.keys[rows], p.values)
    assert relative(run(p.prior, stack, 20)[0].update, one_time(p, stack)) <= 1e-10


def test_a_step_that_cannot_be_solved_changes_nothing() -> None:
    p = problem("ridge")
    block = solve.constraints(p.kernel, p.keys[:3], p.values[:3], noise=0.0)
    sequence, _ = run(p.prior, block, 3)
    before = [np.array(leaf) for leaf in jax.tree.leaves(sequence)]
    for bad in (block, solve.Constraints(block.keys * np.nan, block.residuals, block.noise + 1)):
        with pytest.raises(SolverError, match="could not be solved"):
            host.advance(sequence, p.prior, bad)
    assert all(np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(sequence), strict=True))


def test_a_sequence_goes_on_from_statistics() -> None:
    p = problem("rank-deficient")
    held = solve.statistics(p.prior, p.block(slice(0, 60)))
    base, _ = solve.from_statistics(p.prior, held)
    begun = host.begin(p.prior, V, base=base, update=np.asarray(solve.total(base, p.prior)))
    sequence, _ = run(p.prior, p.block(slice(60, 160)), 20, begun)
    assert relative(sequence.update, one_time(p, p.all)) <= 1e-10


def test_priors_that_do_not_suit() -> None:
    p = problem("ridge")
    assert host.suits(p.prior)
    assert host.suits(solve.Prior(np.asarray(p.prior.factor)))
    assert not host.suits(solve.cast(p.prior, "float32"))
    with pytest.raises(SolverError, match="float64 prior of one layer"):
        host.begin(solve.cast(p.prior, "float32"), V)
    with pytest.raises(SolverError, match="at least 1"):
        host.begin(p.prior, 0)
    with pytest.raises(SolverError, match="keys have width"):
        host.advance(host.begin(solve.ridge(N + 1, 1.0), V), solve.ridge(N + 1, 1.0), p.all)


# --- what a step costs ----------------------------------------------------------------------------------------------


def test_no_step_factors_more_than_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    p, sizes, original = problem("power-law"), [], scipy.linalg.lapack.dpotrf

    def counted(matrix: np.ndarray, **options: int) -> object:
        sizes.append(len(matrix))
        return original(matrix, **options)

    monkeypatch.setattr(scipy.linalg.lapack, "dpotrf", counted)
    run(p.prior, p.all, 20)
    assert sizes == [20] * 8
    solve.memit(np.eye(N), 1.0)
    assert sizes[-1] == N, "negative control: a factorisation of the whole width is counted"


@pytest.mark.parametrize("written", [0, 200, 500])
def test_a_steps_memory_is_bounded(written: int) -> None:
    """What NumPy allocates in a step: the update, the new rows, and no more than `workspace` says."""
    n, v, u, rng = 400, 48, 10, np.random.default_rng(0)
    prior = solve.Prior(np.eye(n) * 2.0)

    def block(size: int) -> solve.Constraints:
        return solve.Constraints(rng.normal(size=(size, n)), rng.normal(size=(size, v)), np.ones(size))

    sequence = host.begin(prior, v)
    for size in [50] * (written // 50):
        sequence, _ = host.advance(sequence, prior, block(size))
    sequence, _ = host.advance(sequence, prior, block(u))  # whose buffers now have room
    new = block(u)
    tracemalloc.start()
    try:
        after, _ = host.advance(sequence, prior, new)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    allowed = host.workspace(n, n, v, written + u, u) + after.update.nbytes
    assert peak <= allowed + 100_000, "and some Python objects"
    held = sum(rows.array.nbytes for rows in (after.solver.rows, after.solver.solved))
    held += 0 if after.solver.base is None else sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(after.solver.base))
    assert held <= host.state_size(n, v, written + 2 * u)
    assert allowed < 8 * n * n or written == 500, "the history itself, or n x n numbers, would not fit in"


# --- arrays that grow -----------------------------------------------------------------------------------------------


def test_rows_grow_in_place_and_never_change() -> None:
    first = Rows(np.zeros((0, 3))).appended(np.ones((2, 3)))
    second = first.appended(np.full((2, 3), 2.0))
    other = first.appended(np.full((3, 3), 3.0))
    assert np.shares_memory(first.array, second.array)
    assert not np.shares_memory(first.array, other.array), "the room behind `first` was taken"
    assert first.array.tolist() == [[1.0] * 3] * 2
    assert second.array.tolist() == [[1.0] * 3] * 2 + [[2.0] * 3] * 2
    assert other.array.tolist() == [[1.0] * 3] * 2 + [[3.0] * 3] * 3
    assert len(other) == 5
    with pytest.raises(ValueError, match="read-only"):
        second.array[0] = 0


def test_rows_outgrow_their_room_and_widen() -> None:
    rows, whole = Rows(np.zeros((0, 2), np.float32)), np.random.default_rng(0).normal(size=(300, 2))
    for row in whole:
        rows = rows.appended(row[None])
    assert rows.array.dtype == np.float64
    np.testing.assert_array_equal(rows.array, whole)
    (leaf,) = jax.tree.leaves(rows)
    assert leaf is rows.array
    again = jax.tree.map(lambda array: array, rows).appended(whole[:1])
    np.testing.assert_array_equal(again.array, np.concatenate([whole, whole[:1]]))


def test_two_sequences_go_on_from_one() -> None:
    p = problem("power-law")
    trunk, _ = run(p.prior, p.block(slice(0, 40)), 20)
    one, _ = run(p.prior, p.block(slice(40, 60)), 20, trunk)
    other, _ = run(p.prior, p.block(slice(60, 100)), 20, trunk)
    again, _ = run(p.prior, p.block(slice(40, 60)), 20, trunk)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, again)), strict=True))
    chosen = np.r_[0:40, 60:100]
    assert relative(other.update, one_time(p, p.block(chosen))) <= 1e-10
