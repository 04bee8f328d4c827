"""How the invariants run a problem: in steps, all at once, and with the history left out."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float

from kedit_jax import solve
from kedit_jax.solve import host
from kedit_jax.solve.arrays import AnyArray, compiled
from kedit_jax.verification.problems import Problem

FORMS: tuple[solve.Form, ...] = ("dual", "primal")

BLOCK = 20
"""Rows of a batch. Single edits and this size only: every size is compiled anew, for each kind of prior and both forms."""

SINGLES = 4
"""Single edits before the first batch."""

MANY = 100
"""Rows of a batch where there are thousands."""


def batches(p: Problem) -> list[np.ndarray]:
    """Rows of consecutive batches: a few single edits, then batches of `BLOCK`."""
    first = [np.array([i]) for i in range(SINGLES)]
    return [*first, *(np.arange(i, i + BLOCK) for i in range(SINGLES, p.size, BLOCK))]


def in_steps(
    p: Problem, rows: Sequence[np.ndarray], form: solve.Form = "dual", stack: solve.Constraints | None = None
) -> tuple[solve.State, list[solve.Step]]:
    """State and steps after editing the rows batch by batch, with steps rounded to the dtype of the model."""
    state = solve.start(p.prior, p.kernel.shape[1], capacity=p.size, form=form)
    steps = []
    for chosen in rows:
        state, step = solve.step(state, p.prior, solve.take(p.all if stack is None else stack, chosen), dtype=p.dtype)
        steps.append(step)
    check_all([step.status for step in steps])
    return state, steps


def on_host(p: Problem, rows: Sequence[np.ndarray]) -> tuple[solve.HostSequence, list[solve.Step]]:
    """The same by the solver that a session runs on a CPU."""
    sequence, steps = host.begin(p.prior, p.kernel.shape[1]), []
    for chosen in rows:
        sequence, step = host.advance(sequence, p.prior, p.block(chosen), dtype=p.dtype)
        steps.append(step)
    return sequence, steps


def every_way(p: Problem, rows: Sequence[np.ndarray]) -> Iterator[list[solve.Step]]:
    """The steps in each form, and on the host where a session would run them there."""
    for form in FORMS:
        yield in_steps(p, rows, form)[1]
    if host.suits(p.prior):
        yield on_host(p, rows)[1]


def check_all(statuses: Sequence[solve.Status]) -> None:
    """`solve.check` of all at once, after the last has been asked for: waiting for each would take longer than the work."""
    solve.check(jax.tree.map(lambda *leaves: np.stack(leaves), *statuses))


def product(step: solve.Step) -> Float[np.ndarray, "n v"]:
    """The step's update on the host, in the dtype of the model."""
    return np.asarray(step.left) @ np.asarray(step.right)


def summed(steps: Sequence[solve.Step]) -> Float[np.ndarray, "n v"]:
    """The steps' sum in their own dtype, as a kernel would see them."""
    total = product(steps[0])
    for step in steps[1:]:
        total = total + product(step)
    return total


def at_once(p: Problem, stack: solve.Constraints, form: solve.Form = "auto") -> Float[np.ndarray, "n v"]:
    """The one-time edit of the stack. It is padded to the problem's size, so that all share one compilation."""
    padded = stack if stack.size > p.size else solve.padded(stack, p.size)
    solution = solve.one_time(p.prior, padded, form=form, dtype=p.dtype)
    solve.check(solution.status)
    return np.asarray(solution.update)


def total(p: Problem, state: solve.State) -> Float[np.ndarray, "n v"]:
    """The update that the state amounts to, in the dtype of the model."""
    return np.asarray(solve.total(state, p.prior, dtype=p.dtype))


def single_edits(p: Problem) -> Float[np.ndarray, "n v"]:
    """The sum of one step for every constraint, thousands of them, in the dtype of the model."""
    keys = np.asarray(p.all.keys, np.float64)  # exactly, so that one compilation serves both dtypes
    lefts, rights, status = _scanned(p.prior, solve.Constraints(keys, p.all.residuals, p.all.noise))
    solve.check(status)
    return np.asarray(lefts, p.dtype)[:, :, 0].T @ np.asarray(rights, p.dtype)[:, 0]


@compiled
def _scanned(
    prior: solve.Prior, stack: solve.Constraints
) -> tuple[Float[AnyArray, "m n 1"], Float[AnyArray, "m 1 v"], solve.Status]:
    """The factors of all steps, in one compiled loop on the primal state."""

    def edit(state: solve.State, one: solve.Constraints) -> tuple[solve.State, solve.Step]:
        return solve.step(state, prior, one)

    ones = jax.tree.map(lambda leaf: leaf[:, None], stack)
    _, steps = jax.lax.scan(edit, solve.start(prior, stack.residuals.shape[1], form="primal"), ones)
    return steps.left, steps.right, steps.status


def grown(p: Problem) -> Float[np.ndarray, "n v"]:
    """The sum of the steps of large batches, by a host loop that grows the dual state and then turns it primal."""
    state, steps = solve.start(p.prior, p.kernel.shape[1], capacity=32), []
    for i in range(0, p.size, MANY):
        state, step = solve.sequential(state, p.prior, p.block(slice(i, i + MANY)), dtype=p.dtype)
        steps.append(step)
    return summed(steps)


def without_history(p: Problem, rows: Sequence[np.ndarray]) -> Float[np.ndarray, "n v"]:
    """The mistake that all of this is about: each batch solved alone, against the kernel as it then is."""
    update = np.zeros(p.kernel.shape)
    for chosen in rows:
        block = p.block(chosen)
        current = solve.Constraints(block.keys, block.residuals - block.keys @ update, block.noise)
        update = update + at_once(p, current)
    return update
