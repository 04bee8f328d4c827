"""How a sequence of edits is run, whatever the editor: what each step claims to solve, and what post-processing does to it.

Batches B_1 .. B_t change a kernel W0 to W_t = W0 + D_1 + .. + D_t. With A(S) = A0 + K' Omega K over a set S of constraints,
R0 = V - K W0, and D*(S) = A(S)^-1 K' Omega R0 the one-time edit of S ("The Labyrinth and the Thread", arXiv 2605.26670):

| mode | a step solves | which claims to be |
| --- | --- | --- |
| `aligned` | A(B_1 + .. + B_t) D_t = K_t' Omega (V_t - K_t W_{t-1}) | D*(B_1 + .. + B_t): exact (Lemma 3.1, Prop. 3.2) |
| `unaligned` | A(B_t) D_t = K_t' Omega (V_t - K_t W_{t-1}) | the same, but history is left out: degrades |
| `latest` | A(B_t) D_t = K_t' Omega (V_t - K_t W_{t-1}) - A0 D_{<t} | D*(B_t): exact (Memorize-the-Latest) |
| `latest-simplified` | as `unaligned` | D*(B_t), as if A0 D_{<t} were 0: it is not, and accumulates |

All but `aligned` are baselines: they exist so that a user sees the difference. `run` measures it at every step.

A post-processor (see `postprocess`) replaces the solution `raw` by what is applied, D_t = post(raw). Compensated, the next
step aims at the exact target from wherever the kernel is,

    W_t = W_{t-1} + post(W*_t - W_{t-1}),   W*_t = W0 + D*(S_t)

which is Algorithm 1 without its stored error: by induction raw_t = A(S_t)^-1 (K_t' Omega (V_t - K_t W_{t-1}) - E_{t-1}) and
A(S_t) D_{<=t} = K' Omega R0 + E_t with E_t = A(S_t) (D_t - raw_t), so only the LAST step's post-processing is ever present.
Uncompensated, E_{t-1} is left out and the errors of all steps add up.
"""

import dataclasses
import math
from collections import abc
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from kedit_jax.errors import NonFiniteError, SolverError
from kedit_jax.solve import interface
from kedit_jax.solve.arrays import AnyArray, compiled, matmul, precision_of, record
from kedit_jax.solve.constraints import Constraints, concatenate
from kedit_jax.solve.dual import DualState
from kedit_jax.solve.interface import FIRST_CAPACITY, Form, State
from kedit_jax.solve.postprocess import Post, describe, process
from kedit_jax.solve.primal import PrimalState
from kedit_jax.solve.prior import Prior
from kedit_jax.solve.status import Status, check

Mode = Literal["aligned", "unaligned", "latest", "latest-simplified"]
MODES: tuple[Mode, ...] = get_args(Mode)


@record
class Sequence:
    """A kernel [n, v] in the middle of a sequence of edits; a pytree, in the dtype of its prior."""

    update: Float[AnyArray, "*layers n v"]
    """D_1 + .. + D_t, what has been applied."""
    solver: State | None
    """`aligned`: the exact state of all constraints so far, whatever post-processing did to `update`, so that
    `solve.total(solver, prior)` is D*(S_t). None in the other modes, which keep no history."""


@record
class Advance:
    """One step of a sequence. All of it is as if the step had not been taken where `status` is not ok."""

    update: Float[AnyArray, "*layers n v"]
    """D_t as applied; exactly 0 where the status is not ok."""
    raw: Float[AnyArray, "*layers n v"]
    """The solution before post-processing; exactly 0 where there is none."""
    status: Status
    """Of the solve; not ok, and not finite, also where the post-processor returned NaN or infinity."""
    processed: Bool[AnyArray, "*layers"]
    """The post-processor returned finite numbers."""


def begin(
    prior: Prior,
    n_values: int,
    *,
    mode: Mode = "aligned",
    post: Post | None = None,
    compensate: bool = True,
    capacity: int = FIRST_CAPACITY,
    form: Form = "auto",
) -> Sequence:
    """A sequence of edits before the first, for a kernel [prior.n_keys, n_values].

    Args:
        prior: A0, factored; its dtype is the dtype of the work.
        n_values: v, the width of the kernel's output.
        mode, post, compensate: as they will be given to `advance`; checked here, so that a contradiction shows at once.
        capacity, form: of the solver's state, as in `solve.start`; of no effect in modes without one.

    Raises:
        SolverError: an unknown mode, or post-processing that the mode cannot run as asked (see `advance`).
    """
    _check_recipe(mode, post, compensate)
    solver = interface.start(prior, n_values, capacity=capacity, form=form) if mode == "aligned" else None
    with precision_of(prior):
        return Sequence(jnp.zeros((prior.n_keys, n_values), prior.dtype), solver)


def make_room(sequence: Sequence, prior: Prior, block: Constraints) -> Sequence:
    """The sequence with room for the block, for a host loop: shapes change as in `solve.make_room`, numbers do not."""
    if sequence.solver is None:
        return sequence
    return Sequence(sequence.update, interface.make_room(sequence.solver, prior, block))


def advance(
    sequence: Sequence,
    prior: Prior,
    block: Constraints,
    kernel: Float[AnyArray, "n v"] | None = None,
    *,
    mode: Mode = "aligned",
    post: Post | None = None,
    compensate: bool = True,
    dtype: DTypeLike | None = None,
) -> tuple[Sequence, Advance]:
    """One step: D_t = post(raw_t), where raw_t solves what the mode says (see the table of this module).

        aligned, no post           raw_t = D*(S_t) - D*(S_{t-1}), the step of `solve.step`        (Prop. 3.2)
        aligned, compensated       raw_t = D*(S_t) - D_{<t}                                       (Algorithm 1)
        aligned, uncompensated     raw_t = A(S_t)^-1 K_t' Omega (R0_t - K_t D_{<t})
        latest                     raw_t = D*(B_t) - D_{<t}
        unaligned, latest-simplified   raw_t = A(B_t)^-1 K_t' Omega (R0_t - K_t D_{<t})

    Pure, with static shapes; usable under `jax.jit` and `jax.vmap` over stacked layers (inside `solve.float64()` for a
    float64 prior), with `mode`, `post`, `compensate` and `dtype` static. On failure nothing changes and the update is 0:
    read `status`, or call `check_advance`.

    Args:
        sequence: from `begin` or an earlier step, in the same mode.
        prior: the one the sequence was begun with.
        block: B_t, u constraints, residuals R0_t against the ORIGINAL kernel in every mode.
        kernel: W0, the ORIGINAL kernel; the post-processor is shown W0 + D_{<t}. May be None without a post-processor.
        mode: one of `MODES`.
        post: a post-processor, or None to apply the solution as it is.
        compensate: whether earlier post-processing errors are undone by this step; of no effect without `post`.
        dtype: of the step's `update` and `raw`, rounded once, at the end; the prior's by default. The sequence keeps its
            sum in the prior's dtype.

    Raises:
        SolverError: an unknown mode; compensation in `unaligned` or `latest-simplified`, which have no exact target to
            return to; `latest` without it, whose equations are read off the actual kernel; no kernel for the
            post-processor; arrays that do not fit each other; a post-processor that returns another shape.
    """
    _check_recipe(mode, post, compensate)
    _check_arrays(sequence, block, kernel, mode, post)
    solver, raw, status = _propose(sequence, prior, block, mode, actual=post is not None, compensate=compensate)
    update = raw if post is None or kernel is None else process(post, raw, _current(raw, sequence.update, kernel))
    total, step = _settled(sequence.update, raw, update, status, prior.dtype if dtype is None else np.dtype(dtype))
    if post is not None:  # the solve keeps its own state on failure; what it cannot know is that the post-processor failed
        solver = _chosen(step.status.ok, solver, sequence.solver)
    return Sequence(total, solver), step


def check_advance(step: Advance, post: Post | None = None) -> None:
    """Raises unless the step succeeded (for every layer, if stacked).

    Raises:
        SolverError: the solve failed; names what failed and the mend.
        NonFiniteError: the post-processor, named if it is given, returned NaN or infinity.
    """
    processed = np.asarray(step.processed)
    if not processed.all():
        where = f" in layers {', '.join(map(str, np.flatnonzero(~processed)))}" if processed.ndim else ""
        raise NonFiniteError(
            f"post-processor {describe(post) if post else 'of this step'} returned NaN or infinity{where}, and nothing was "
            "changed: check its parameters, and that the kernel is neither zero nor beyond the range of the number format"
        )
    check(step.status)


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What one step left behind, in plain numbers. Norms are Frobenius; A, D* and R0 as in the module's docstring.

    S_t is what the mode CLAIMS to hold after step t: all blocks so far for `aligned` and `unaligned`, block t alone for
    `latest` and `latest-simplified`. Under a prior with a basis, A and K' are taken along the basis, where they are defined.
    """

    step: int
    """t, from 1."""
    constraints: int
    """Size of S_t."""
    drift: float
    """|A(S_t) D_{<=t} - K' Omega R0| / |K' Omega R0|: how far the kernel is from solving what the mode claims to solve. NaN
    with equality constraints, whose Omega is infinite."""
    distance: float
    """|D_{<=t} - D*(S_t)| / |D*(S_t)|."""
    post_error: float
    """|D_t - raw_t| / |raw_t|."""
    invariant: float
    """|A(S_t) D_{<=t} - K' Omega R0 - E_t| / |K' Omega R0|, with E_t = A(S_t) (D_t - raw_t): what is wrong beyond the last
    step's post-processing. NaN with equality constraints."""
    excess: float
    """|D_{<=t} - D*(S_t) - (D_t - raw_t)| / |D*(S_t)|: the same in the update's own units."""
    outside: float
    """Share of |D_{<=t}| outside the prior's subspace, where post-processing may have put it; 0 without a basis."""
    step_norm: float
    """|D_t|."""
    update_norm: float
    """|D_{<=t}|."""
    kernel_norm: float
    """|W_t|."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A whole sequence of edits, measured at every step."""

    mode: Mode
    post: str
    compensate: bool
    """Whether post-processing errors were compensated; False without a post-processor."""
    update: Float[np.ndarray, "n v"]
    """The sum of all steps as applied."""
    steps: tuple[StepReport, ...]

    def series(self, name: str) -> list[float]:
        """One field of `StepReport` over the steps, for a plot."""
        names = [field.name for field in dataclasses.fields(StepReport)]
        if name not in names:
            raise SolverError(f"no series {name!r}: one of {', '.join(names)}")
        return [getattr(step, name) for step in self.steps]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the update, ready for JSON: numbers that are not finite become None."""
        steps = [
            {
                name: None if isinstance(x, float) and not math.isfinite(x) else x
                for name, x in dataclasses.asdict(step).items()
            }
            for step in self.steps
        ]
        return {"mode": self.mode, "post": self.post, "compensate": self.compensate, "steps": steps}


def run(
    prior: Prior,
    kernel: Float[AnyArray, "n v"],
    blocks: abc.Sequence[Constraints],
    *,
    mode: Mode = "aligned",
    post: Post | None = None,
    compensate: bool = True,
    dtype: DTypeLike | None = None,
) -> Run:
    """Runs the blocks one after another from the original kernel, and measures every step (see `StepReport`).

    For comparisons: a host loop over `advance` for one layer. The measurements are made in NumPy float64 from the
    definitions, apart from D*(S_t), and cost about as much as the steps. Blocks of equal size share one compilation.

    Args:
        prior, mode, post, compensate: as for `advance`.
        kernel: W0, the ORIGINAL kernel.
        blocks: B_1 .. B_t, each with residuals against the ORIGINAL kernel.
        dtype: of `Run.update`, rounded once, at the end; the prior's by default.

    Raises:
        SolverError: as `advance`; no blocks, or an empty one; a step that failed.
        NonFiniteError: a post-processor that returned NaN or infinity.
    """
    _check_blocks(blocks)
    options: dict[str, Any] = {"mode": mode, "post": post, "compensate": compensate}
    whole, ends = concatenate(blocks), np.cumsum([block.size for block in blocks])
    form: Form = "dual" if (np.asarray(whole.noise) == 0).any() else "auto"
    sequence = begin(prior, kernel.shape[1], capacity=whole.size, form=form, **options)
    exact = begin(prior, kernel.shape[1], capacity=whole.size, form=form) if mode == "unaligned" else sequence
    reports = []
    for number, (block, end) in enumerate(zip(blocks, ends, strict=True), 1):
        sequence, step = advance(sequence, prior, block, kernel, **options)
        check_advance(step, post)
        if mode == "unaligned":
            exact, aligned = advance(exact, prior, block)
            check_advance(aligned)
        else:
            exact = sequence
        claimed = block if mode.startswith("latest") else jax.tree.map(lambda leaf, end=end: leaf[:end], whole)
        target = _target(prior, exact, block)
        reports.append(_report(number, prior, claimed, target, kernel, sequence.update, step))
    update = np.asarray(sequence.update).astype(prior.dtype if dtype is None else np.dtype(dtype))
    return Run(mode, describe(post), post is not None and compensate, update, tuple(reports))


def _propose(
    sequence: Sequence, prior: Prior, block: Constraints, mode: Mode, *, actual: bool, compensate: bool
) -> tuple[State | None, Float[Array, "n v"], Status]:
    """The solver's next state, raw_t and its status; `actual` if the kernel may be elsewhere than at the exact target."""
    if mode == "latest":
        solution = interface.one_time(prior, block)
        return None, _difference(solution.update, sequence.update), solution.status
    if sequence.solver is None:
        solution = interface.one_time(prior, _against(prior, block, sequence.update))
        return None, jnp.asarray(solution.update), solution.status
    solver, step = interface.step(sequence.solver, prior, block)
    if not actual:
        return solver, step.dense(), step.status
    if compensate:
        return solver, _difference(interface.total(solver, prior), sequence.update), step.status
    # With all earlier residuals 0, a step with residuals X is A(S_t)^-1 K_t' Omega X (Prop. 3.2), here for an X that the
    # exact state has never seen.
    _, step = interface.step(_silent(sequence.solver), prior, _against(prior, block, sequence.update))
    return solver, step.dense(), step.status


@compiled
def _against(prior: Prior, block: Constraints, update: Float[AnyArray, "n v"]) -> Constraints:
    """The block with residuals against the kernel as it is now, V_t - K_t W_{t-1}."""
    keys, residuals = (jnp.asarray(x, prior.dtype) for x in (block.keys, block.residuals))
    return Constraints(keys, residuals - matmul(keys, jnp.asarray(update, prior.dtype)), block.noise)


@compiled
def _silent(state: State) -> State:
    """The same keys with all residuals 0."""
    if isinstance(state, PrimalState):
        return PrimalState(state.inverse, jnp.zeros_like(state.update))
    zero = jnp.zeros_like(state.residuals)
    return DualState(state.whitened, state.factor, zero, zero, state.noise, state.count)


@compiled
def _difference(a: Float[AnyArray, "n v"], b: Float[AnyArray, "n v"]) -> Float[Array, "n v"]:
    return jnp.asarray(a) - jnp.asarray(b, a.dtype)


@compiled
def _current(
    raw: Float[AnyArray, "n v"], update: Float[AnyArray, "n v"], kernel: Float[AnyArray, "n v"]
) -> Float[Array, "n v"]:
    """W_{t-1}, in the dtype of the step."""
    return jnp.asarray(kernel, raw.dtype) + jnp.asarray(update, raw.dtype)


@partial(compiled, static=("dtype",))
def _settled(
    before: Float[AnyArray, "n v"],
    raw: Float[AnyArray, "n v"],
    update: Float[AnyArray, "n v"],
    status: Status,
    dtype: np.dtype,
) -> tuple[Float[Array, "n v"], Advance]:
    """D_{<=t} and the step, both as if nothing had happened unless all went well."""
    processed = jnp.isfinite(update).all()
    ok = status.ok & processed
    total, raw = jnp.asarray(before, raw.dtype), jnp.where(status.ok, raw, jnp.zeros_like(raw))
    update = jnp.where(ok, update, jnp.zeros_like(update))
    status = Status(
        ok, status.finite & processed, jnp.asarray(status.fits), jnp.asarray(status.pivot), jnp.asarray(status.row)
    )
    return total + update, Advance(update.astype(dtype), raw.astype(dtype), status, processed)


@compiled
def _chosen(ok: Bool[AnyArray, ""], new: State | None, old: State | None) -> State | None:
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def _target(prior: Prior, exact: Sequence, block: Constraints) -> Float[np.ndarray, "n v"]:
    """D*(S_t): of everything if an exact state of it is kept, else of the block."""
    if exact.solver is not None:
        return np.asarray(interface.total(exact.solver, prior), np.float64)
    return np.asarray(interface.one_time(prior, block).update, np.float64)


class _Normal(NamedTuple):
    """The normal equations of a set of constraints as they are defined, in NumPy float64: shares nothing with the solver."""

    factor: Float[np.ndarray, "..."]
    basis: Float[np.ndarray, "n r"] | None
    keys: Float[np.ndarray, "m n"]
    residuals: Float[np.ndarray, "m v"]
    weights: Float[np.ndarray, "m"]

    def along(self, x: Float[np.ndarray, "n v"]) -> Float[np.ndarray, "r v"]:
        """Coordinates in the prior's subspace."""
        return x if self.basis is None else self.basis.T @ x

    def pulled(self, y: Float[np.ndarray, "m v"]) -> Float[np.ndarray, "r v"]:
        """K' Omega y."""
        return self.along(self.keys.T @ (self.weights[:, None] * y))

    def gradient(self, x: Float[np.ndarray, "n v"], residuals: Float[np.ndarray, "m v"] | float) -> Float[np.ndarray, "r v"]:
        """A0 x + K' Omega (K x - residuals). Residuals come off before the product, for K x is close to them."""
        reduced = self.along(x)
        if self.factor.ndim == 1:
            weighted = np.square(self.factor)[:, None] * reduced
        else:
            weighted = self.factor @ (self.factor.T @ reduced)
        return weighted + self.pulled(self.keys @ x - residuals)


def _normal(prior: Prior, claimed: Constraints) -> _Normal | None:
    """None with equality constraints: their weights are infinite."""
    noise = np.asarray(claimed.noise, np.float64)
    if (noise == 0).any():
        return None
    factor, keys, residuals = (np.asarray(x, np.float64) for x in (prior.factor, claimed.keys, claimed.residuals))
    return _Normal(factor, _basis(prior), keys, residuals, 1 / noise)


def _basis(prior: Prior) -> Float[np.ndarray, "n r"] | None:
    return None if prior.basis is None else np.asarray(prior.basis, np.float64)


def _report(
    number: int,
    prior: Prior,
    claimed: Constraints,
    target: Float[np.ndarray, "n v"],
    kernel: Float[AnyArray, "n v"],
    total: Float[AnyArray, "n v"],
    step: Advance,
) -> StepReport:
    """Measures a step against S_t (`claimed`) and D*(S_t) (`target`)."""
    applied, update, raw, original = (np.asarray(x, np.float64) for x in (total, step.update, step.raw, kernel))
    normal, basis = _normal(prior, claimed), _basis(prior)
    drift = invariant = math.nan
    if normal is not None:
        right = normal.pulled(normal.residuals)
        left_over = normal.gradient(applied, normal.residuals)
        drift = _share(left_over, right)
        invariant = _share(left_over - normal.gradient(update - raw, 0.0), right)
    return StepReport(
        step=number,
        constraints=claimed.size,
        drift=drift,
        distance=_share(applied - target, target),
        post_error=_share(update - raw, raw),
        invariant=invariant,
        excess=_share(applied - target - (update - raw), target),
        outside=0.0 if basis is None else _share(applied - basis @ (basis.T @ applied), applied),
        step_norm=float(np.linalg.norm(update)),
        update_norm=float(np.linalg.norm(applied)),
        kernel_norm=float(np.linalg.norm(original + applied)),
    )


def _share(part: Float[np.ndarray, "i j"], whole: Float[np.ndarray, "i j"]) -> float:
    """|part| / |whole|; 0 for nothing of nothing."""
    size, scale = float(np.linalg.norm(part)), float(np.linalg.norm(whole))
    return size / scale if scale else (0.0 if size == 0 else math.inf)


def _check_recipe(mode: Mode, post: Post | None, compensate: bool) -> None:
    if mode not in MODES:
        raise SolverError(f"unknown mode {mode!r}: one of {', '.join(MODES)}")
    if post is not None and not callable(post):
        raise SolverError(f"post must be a function of the update and the kernel, got {post!r}: see `solve.POSTS`")
    if post is None or mode == "aligned":
        return
    if mode == "latest" and not compensate:
        raise SolverError(
            "mode 'latest' takes its equations from the actual kernel, so its post-processing is always compensated: leave "
            "compensate=True, or use mode 'aligned' to see post-processing without compensation"
        )
    if mode != "latest" and compensate:
        raise SolverError(
            f"mode {mode!r} has no exact solution that compensation could return to: pass compensate=False, or use mode "
            "'aligned'"
        )


def _check_arrays(
    sequence: Sequence, block: Constraints, kernel: Float[AnyArray, "n v"] | None, mode: Mode, post: Post | None
) -> None:
    problems, width = [], sequence.update.shape[-1]
    if (sequence.solver is None) == (mode == "aligned"):
        kind = "no history" if sequence.solver is None else "a history"
        problems.append(f"the sequence keeps {kind}, which mode {mode!r} cannot go on from: begin it in that mode")
    if block.residuals.shape[-1] != width:
        problems.append(f"residuals have width {block.residuals.shape[-1]}, the sequence's kernel {width}")
    if post is not None and kernel is None:
        problems.append(f"post-processor {describe(post)} needs the original kernel: pass kernel=")
    if kernel is not None and kernel.shape != sequence.update.shape:
        problems.append(f"the kernel has shape {kernel.shape}, the sequence {sequence.update.shape}")
    if problems:
        raise SolverError.listing("the step cannot be taken:", problems)


def _check_blocks(blocks: abc.Sequence[Constraints]) -> None:
    if not blocks:
        raise SolverError("no blocks to run: give at least one")
    empty = [f"block {number}" for number, block in enumerate(blocks, 1) if not block.size]
    if empty:
        raise SolverError.listing("blocks without constraints; leave them out:", empty)
