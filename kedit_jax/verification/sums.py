"""Invariants 1 to 5, 10, 11 and 13: steps in any order, form and dtype sum to the one-time edit.

Lemma 3.1 and Prop. 3.2 of "The Labyrinth and the Thread" (arXiv 2605.26670).
"""

from collections.abc import Iterator

import numpy as np

from kedit_jax import solve
from kedit_jax.solve import host
from kedit_jax.verification.checks import Measured, worst
from kedit_jax.verification.problems import Problem, oracle, problem, relative
from kedit_jax.verification.runs import (
    FORMS,
    MANY,
    at_once,
    batches,
    every_way,
    grown,
    in_steps,
    on_host,
    product,
    single_edits,
    summed,
    total,
    without_history,
)


def steps_sum_to_the_one_time_edit(p: Problem) -> Measured:
    """1. sum_t D_t = D*(S_T), same factor. Control: history left out."""
    control = without_history(p, _batches(p))

    def compared() -> Iterator[Measured]:
        for form, updates in _histories(p):
            whole = at_once(p, p.all, form)
            for update in updates:
                yield Measured(relative(update, whole), relative(control, whole))

    return worst(compared())


def steps_equal_an_independent_solve(p: Problem) -> Measured:
    """2. Steps and one-time edit = primal normal equations in NumPy, refined. Control: residuals of the edited kernel."""
    truth = p.truth()
    updates = [update for _, found in _histories(p) for update in found]
    updates += [at_once(p, p.all, form) for form in FORMS if form == "primal" or not _is_long(p)]
    edited = p.kernel + at_once(p, p.block(slice(p.size // 8)))
    control = at_once(p, solve.constraints(edited, p.keys, p.values, p.weights))
    return worst(Measured(relative(update, truth), relative(control, truth)) for update in updates)


def normal_equations_hold(p: Problem) -> Measured:
    """3. A_T D = K' Omega R0, over its right side. Control: history left out."""
    keys, basis = p.reduced(), np.eye(len(p.kernel)) if p.basis is None else p.basis
    right = (keys.T * p.weights) @ p.all.residuals

    def gap(update: np.ndarray) -> float:
        x = basis.T @ update
        return relative(p.precision @ x + (keys.T * p.weights) @ (keys @ x), right)

    control = gap(without_history(p, _batches(p)))
    return worst(Measured(gap(update), control) for _, updates in _histories(p) for update in updates)


def steps_have_their_closed_form(p: Problem) -> Measured:
    """4. D_t = A(S_t)^-1 K_t' Omega_t (V_t - K_t W_{t-1}), of rank <= u. Control: residuals of the original kernel."""
    rows = batches(p)

    def compared() -> Iterator[Measured]:
        for steps in every_way(p, rows):
            current = np.zeros(p.kernel.shape, p.dtype)
            for t, step in enumerate(steps):
                update = product(step)
                if t in (1, len(rows) // 2, len(rows) - 1):  # an early, a middle and the last one: the oracle is slow
                    history = np.concatenate(rows[: t + 1])
                    formula = oracle(p, history, rows[t], p.values, p.kernel + current.astype(np.float64))
                    yield Measured(max(relative(update, formula), _beyond_rank(update, len(rows[t]))))
                current = current + update
            unmoved = oracle(p, np.arange(p.size), rows[-1], p.values, p.kernel)
            yield Measured(0.0, relative(update, unmoved))

    return worst(compared())


def order_and_split_do_not_matter(p: Problem) -> Measured:
    """5. Any order of the constraints in any batches gives the same sum. Control: history left out, in the two orders."""
    order = np.random.default_rng(p.size).permutation(p.size)
    ours, theirs = batches(p), [order[rows] for rows in batches(p)[::-1]]
    control = relative(without_history(p, theirs), without_history(p, ours))

    def compared() -> Iterator[Measured]:
        for first, second in zip(every_way(p, ours), every_way(p, theirs), strict=True):
            yield Measured(relative(summed(second), summed(first)), control)

    return worst(compared())


def duplicates_are_solved(p: Problem) -> Measured:
    """10. Every key twice with conflicting targets and weight 1 = once with the mean and weight 2; pivots >= 1; invariant 1.

    Control: the second targets left out.
    """
    half = p.size // 2
    rows = np.tile(np.arange(half), 2)
    stack = solve.constraints(p.kernel, p.keys[rows], p.values)
    means = (p.values[:half] + p.values[half : 2 * half]) / 2
    merged = at_once(p, solve.constraints(p.kernel, p.keys[:half], means, np.full(half, 2.0)))

    def compared() -> Iterator[Measured]:
        for form in FORMS:
            whole = at_once(p, stack, form)
            state, steps = in_steps(p, batches(p), form, stack)
            stable = not isinstance(state, solve.DualState) or bool((np.diagonal(np.asarray(state.factor)) >= 1).all())
            error = max(relative(summed(steps), whole), relative(whole, merged)) if stable else np.inf
            yield Measured(error, relative(at_once(p, solve.take(stack, np.arange(half)), form), whole))

    return worst(compared())


def dual_equals_primal(p: Problem) -> Measured:
    """11. Both forms of the solver agree, below and above their crossover. Control: weights dropped from one of them."""

    def compared() -> Iterator[Measured]:
        for m in (p.size // 4, p.size):
            block = p.block(slice(m))
            dual = at_once(p, block, "dual")
            equal = solve.Constraints(block.keys, block.residuals, np.ones(m))
            yield Measured(relative(dual, at_once(p, block, "primal")), relative(dual, at_once(p, equal, "primal")))

    return worst(compared())


def updates_stay_in_the_null_space(p: Problem) -> Measured:
    """13. AlphaEdit: D (I - P) = 0. Control: the same edits under MEMIT's prior, which protects directions by weight."""
    basis = np.eye(len(p.kernel)) if p.basis is None else p.basis
    updates = [at_once(p, p.all), *(update for _, found in _histories(p) for update in found)]
    other = at_once(problem("atypical", m=p.size, dtype=p.dtype), p.all)

    def outside(update: np.ndarray) -> float:
        return relative(basis @ (basis.T @ update.astype(np.float64)), update)

    return worst(Measured(outside(update), outside(other)) for update in updates)


def _is_long(p: Problem) -> bool:
    return p.size > 10 * MANY


def _batches(p: Problem) -> list[np.ndarray]:
    return [np.arange(i, i + MANY) for i in range(0, p.size, MANY)] if _is_long(p) else batches(p)


def _histories(p: Problem) -> Iterator[tuple[solve.Form, list[np.ndarray]]]:
    """The sum of the steps and what the state amounts to, in each form; thousands of edits in the ways made for them."""
    if host.suits(p.prior):
        rows = [np.array([row]) for row in range(p.size)] if _is_long(p) else batches(p)
        sequence, steps = on_host(p, rows)
        yield "primal", [summed(steps), host.total(sequence.solver, p.prior).astype(p.dtype)]
    if _is_long(p):
        yield "primal", [single_edits(p), grown(p)]
        return
    for form in FORMS:
        state, steps = in_steps(p, batches(p), form)
        yield form, [summed(steps), total(p, state)]


def _beyond_rank(update: np.ndarray, rank: int) -> float:
    """Relative distance (spectral) of the update from the nearest one of this rank."""
    values = np.linalg.svd(update, compute_uv=False)
    return float(values[rank] / values[0]) if rank < len(values) else 0.0
