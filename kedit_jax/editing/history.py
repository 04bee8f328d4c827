"""One edited kernel's share of a session: the constraints that stand, those taken back, and the update they amount to.

Arrays and the solver alone, no model: a session does for every edited layer what the functions here do for one.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from kedit_jax import solve
from kedit_jax.delta import Dense, LowRank, Update
from kedit_jax.editing.packed import room
from kedit_jax.editing.settings import Procedure
from kedit_jax.errors import NonFiniteError
from kedit_jax.solve import host, sequences
from kedit_jax.solve.rows import Rows

LEAST, STEPS = 64, 8
"""Rows that a fresh fit is computed with at least, and sizes an octave from there on: at most an eighth too many."""


@dataclass(frozen=True, eq=False)
class Site:
    """What an edited kernel is edited with, the same for the whole life of a session.

    Attributes:
        prior: of the layer's editor.
        noise: 1 / weight of a fact of weight 1.
        kernel: [k, v] the original one, in the model's dtype; whoever computes with it widens it.
        procedure: how the sequence is run.
    """

    prior: solve.Prior
    noise: float
    kernel: Float[np.ndarray, "k v"]
    procedure: Procedure


@dataclass(frozen=True, eq=False)
class Compacted:
    """Facts that can no longer be told apart: their sufficient statistics, and the update as it was after them."""

    statistics: solve.Statistics
    update: Float[np.ndarray, "k v"]


@dataclass(frozen=True, eq=False)
class LayerHistory:
    """One layer's constraints, a row a fact in the session's order, and the solver's state after them.

    Keys are recorded as they were solved with. They equal those read again once the whole batch is written, which published
    code records: a layer's keys depend on lower layers only, and those are edited first. Later batches move the lower
    layers, and the keys of upper layers with them (`kedit_jax.editing.drift` measures how far); the session's claim is about
    the recorded ones.

    Attributes:
        constraints: keys [m, k] as the model gave them, at least float32; residuals [m, v] against the original kernel and
            noise [m], float64; read-only.
        retired: the constraints of facts taken back, from which they can be restored.
        sequence: the update as deployed, and what the solver keeps; always the fold of `extended` over the session's
            batches, so that a reloaded or retracted session continues with the same numbers as one that got there directly.
        base: what was compacted before the first of `constraints`.
        recorded: the memory that `constraints` lie in, with room for more.
    """

    constraints: solve.Constraints
    retired: solve.Constraints
    sequence: sequences.Sequence | host.HostSequence
    base: Compacted | None = None
    recorded: "Recorded | None" = None

    @property
    def update(self) -> Float[np.ndarray, "k v"]:
        """The sum of all steps."""
        return np.asarray(self.sequence.update)


@dataclass(frozen=True, eq=False)
class Recorded:
    """Constraints to which a batch is appended without copying those before."""

    rows: tuple[Rows, ...]
    constraints: solve.Constraints

    @classmethod
    def of(cls, history: LayerHistory) -> "Recorded":
        """The history's own, unless its constraints were exchanged for others."""
        held, stack = history.recorded, history.constraints
        if held is not None and held.constraints is stack:
            return held
        return cls(tuple(Rows(np.asarray(part)) for part in (stack.keys, stack.residuals, stack.noise)), stack)

    def appended(self, block: solve.Constraints) -> "Recorded":
        new = (block.keys, block.residuals, block.noise)
        rows = tuple(old.appended(np.asarray(part)) for old, part in zip(self.rows, new, strict=True))
        return Recorded(rows, solve.Constraints(*(part.array for part in rows)))


def empty_history(site: Site, base: Compacted | None = None) -> LayerHistory:
    """No constraints yet, beside those that were compacted."""
    keys, values = site.kernel.shape
    nothing = solve.Constraints(np.zeros((0, keys), np.float32), np.zeros((0, values)), np.zeros(0))
    state, update = None, None
    if base is not None:
        state, status = solve.from_statistics(site.prior, base.statistics)
        solve.check(status)
        update = base.update
    sequence: sequences.Sequence | host.HostSequence
    if site.procedure.post is None and site.procedure.mode in ("aligned", "unaligned") and host.suits(site.prior):
        sequence = host.begin(site.prior, values, base=state, update=update)
    elif base is not None:
        sequence = sequences.Sequence(update=base.update, solver=state)
    else:
        sequence = sequences.begin(site.prior, values, **site.procedure._asdict())
    return LayerHistory(nothing, nothing, sequence, base)


def extended(
    history: LayerHistory, site: Site, block: solve.Constraints, dtype: str = "float64"
) -> tuple[LayerHistory, Update]:
    """The history with a batch written, and the step that takes the kernel there.

    Args:
        block: residuals against the ORIGINAL kernel.
        dtype: each step is rounded to it.

    Raises:
        SolverError: the step cannot be solved.
        NonFiniteError: the update is not finite.
    """
    sequence, step = _moved(history.sequence, site, block, dtype)
    if not np.isfinite(sequence.update).all():
        raise NonFiniteError("the update is not finite; raise the ridge or the noise, or drop facts")
    if site.procedure.mode not in ("aligned", "unaligned"):
        return dataclasses.replace(history, constraints=solve.concatenate([block]), sequence=sequence), step
    recorded = Recorded.of(history).appended(block)
    return dataclasses.replace(history, constraints=recorded.constraints, recorded=recorded, sequence=sequence), step


def _moved(
    sequence: sequences.Sequence | host.HostSequence, site: Site, block: solve.Constraints, dtype: str
) -> tuple[sequences.Sequence | host.HostSequence, Update]:
    """The sequence one step further, and the step."""
    if isinstance(sequence, host.HostSequence):
        moved, found = host.advance(sequence, site.prior, block, dtype=dtype, aligned=site.procedure.mode == "aligned")
        return moved, LowRank(np.asarray(found.left), np.asarray(found.right))
    if sequence.solver is not None and _is_exact(site):
        solver, found = solve.sequential(sequence.solver, site.prior, block, dtype=dtype)
        step = LowRank(np.asarray(found.left), np.asarray(found.right))
        return sequences.Sequence(update=np.asarray(sequence.update) + step.dense(), solver=solver), step
    ready, kernel = sequences.make_room(sequence, site.prior, block), np.asarray(site.kernel, np.float64)
    after, taken = sequences.advance(ready, site.prior, block, kernel, dtype=dtype, **site.procedure._asdict())
    sequences.check_advance(taken, site.procedure.post)
    return dataclasses.replace(after, update=np.asarray(after.update)), Dense(np.asarray(taken.update))


def _is_exact(site: Site) -> bool:
    """Whether each step is the difference of two one-time edits."""
    return site.procedure.mode == "aligned" and site.procedure.post is None


def replayed(
    site: Site, constraints: solve.Constraints, sizes: Sequence[int], base: Compacted | None = None, dtype: str = "float64"
) -> LayerHistory:
    """The history that writing these constraints in batches of these sizes gives, and nothing else but the base before."""
    history = empty_history(site, base)
    if base is None:
        history = dataclasses.replace(history, sequence=_in_dtype(history.sequence, dtype))
    for block in _blocks(constraints, sizes):
        history, _ = extended(history, site, block, dtype)
    return history


def _blocks(constraints: solve.Constraints, sizes: Sequence[int]) -> Iterator[solve.Constraints]:
    """The constraints in batches of these sizes, without the empty ones."""
    begin = 0
    for size in sizes:
        if size:
            yield solve.take(constraints, np.arange(begin, begin + size))
        begin += size


def restored(
    site: Site,
    constraints: solve.Constraints,
    retired: solve.Constraints,
    sizes: Sequence[int],
    update: Float[np.ndarray, "k v"],
    base: Compacted | None = None,
) -> LayerHistory:
    """The history that these parts, as a checkpoint keeps them, were taken from; the solver's state is built anew."""
    sequence = empty_history(site, base).sequence
    if site.procedure.mode == "aligned" and isinstance(sequence, host.HostSequence):
        for block in _blocks(constraints, sizes):
            sequence = host.remember(sequence, site.prior, block)
    elif site.procedure.mode == "aligned":
        sequence = replayed(site, constraints, sizes, base).sequence
    return LayerHistory(constraints, retired, dataclasses.replace(sequence, update=update), base)


def one_time(history: LayerHistory, site: Site, dtype: str = "float64") -> Float[np.ndarray, "k v"]:
    """The one-time edit of everything the history holds, computed anew."""
    if history.base is None:
        solution = solve.one_time(site.prior, _few_sizes(history.constraints), dtype=dtype)
    else:
        held = history.base.statistics
        if history.constraints.size:
            held = solve.add(held, solve.statistics(site.prior, _few_sizes(history.constraints)))
        solution = solve.solve_statistics(site.prior, held, dtype=dtype)
    solve.check(solution.status)
    return np.asarray(solution.update)


def compacted(history: LayerHistory, site: Site) -> LayerHistory:
    """The same update in memory that no longer grows with the number of facts; single ones cannot be told apart any more.

    Raises:
        SolverError: equality constraints (noise 0), which have no finite statistics.
    """
    held = solve.nothing(site.prior, site.kernel.shape[1]) if history.base is None else history.base.statistics
    if history.constraints.size:
        held = solve.add(held, solve.statistics(site.prior, _few_sizes(history.constraints)))
    return empty_history(site, Compacted(held, history.update))


def _few_sizes(constraints: solve.Constraints) -> solve.Constraints:
    """The constraints with no-op rows up to one of a few sizes: each size is a program, kept as long as the process."""
    size = constraints.size
    return solve.padded(constraints, room(max(size, LEAST), STEPS)) if size else constraints


def _in_dtype(sequence: sequences.Sequence | host.HostSequence, dtype: str) -> sequences.Sequence | host.HostSequence:
    return dataclasses.replace(sequence, update=np.asarray(sequence.update).astype(dtype))
