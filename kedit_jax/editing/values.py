"""Target values: what the top edited layer must put out at the subject's last token for the model to say the target.

For a batch of requests at once, with delta one vector a request,

    z = h + delta,   delta = argmin  mean NLL of the target over the contexts
                                     + kl_factor KL(edited || original) at the subject's last token of "{subject} is a"
                                     + decay |delta| / |h|^2            subject to  |delta| <= clamp |h|

(MEMIT, arXiv 2210.07229). Published code runs the whole model on one request at a time. Here only blocks above the edited
layer run, on packed tokens from the subjects' last ones on: nothing before those depends on delta, so its keys and values
are computed once, and common beginnings of prompts once for all of them. The last block and the head run at scored tokens
alone, and what the loss gives back to the head is written down rather than derived, which would keep several arrays as
large as the logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from kedit_jax.editing.packed import Sizes, larger
from kedit_jax.editing.tokens import Encoded, Layout, align
from kedit_jax.models import Decoder, Keep, Past, Projections, causal_mask, pack, positions_of, unpack
from kedit_jax.models.spread import apart, on_shares, together

SHARE = 4
"""A batch goes on with the requests that are left once they are one in so many."""
FEW = 16
"""Batches of so few requests are optimised to their end: smaller ones cost a program and save little."""


@dataclass(frozen=True)
class ValueSettings:
    """How target values are optimised; the defaults are MEMIT's for GPT2-XL and GPT-J.

    Attributes:
        steps: evaluations of the loss; one update fewer is made, as in published code.
        learning_rate: of Adam, in units of the hidden state.
        clamp: largest |delta| as a share of |h|.
        kl_factor: weight of the KL term.
        decay: weight of |delta| / |h|^2.
        stop_loss: a request whose loss is below stays as it is.
    """

    steps: int = 25
    learning_rate: float = 0.5
    clamp: float = 0.75
    kl_factor: float = 0.0625
    decay: float = 0.5
    stop_loss: float = 0.05


class Values(NamedTuple):
    """Optimised target values of R requests and how the optimisation went.

    Attributes:
        z: [R, d] the target values.
        nll_before, nll: [R] mean NLL of the target, over contexts and its tokens, at delta = 0 and at z.
        loss: [R] the whole loss at z; at delta = 0 it is `nll_before`.
        updates: [R] updates made before the request's loss fell below `stop_loss` or the steps ran out.
        moved: [R] |delta| / |h|.
    """

    z: Float[Array, "r d"]
    nll_before: Float[Array, " r"]
    nll: Float[Array, " r"]
    loss: Float[Array, " r"]
    updates: Int[Array, " r"]
    moved: Float[Array, " r"]


class _Problem(NamedTuple):
    """What the optimisation needs and delta does not change."""

    suffix: Float[Array, "1 n d"]  # output of the edited layer from the subjects' last tokens on, those first
    origin: Float[Array, "r d"]  # the same at those of the bare prompts
    past: tuple[Past, Past, Past]  # attention of the tokens before them: in the block above, in those behind, in the last
    known: Projections | None  # in the block above, of the tokens that delta is not added to; None where that is the last
    positions: Int[Array, "1 n"]
    mask: Bool[Array, "rows s ps"]
    scored_at: Int[Array, "1 m"]  # which of the suffix's tokens are scored, those of the KL prompts first
    scored_mask: Bool[Array, "rows a ps"]
    targets: Int[Array, " m"]
    weights: Float[Array, " m"]  # of each scored token's NLL in its request's loss; 0 for those of the KL prompts


class _Score(NamedTuple):
    """The loss at some delta, but for the decay."""

    loss: Float[Array, " r"]
    nll: Float[Array, " r"]
    original: Float[Array, "r vocabulary"]  # log probabilities at the KL prompts at delta = 0


class _Progress(NamedTuple):
    """The optimisation after some steps; a request that is done keeps its delta."""

    step: Int[Array, ""]
    delta: Float[Array, "r d"]
    adam: optax.OptState
    done: Bool[Array, " r"]
    updates: Int[Array, " r"]
    loss: Float[Array, " r"]  # at delta as it was before the last step, which is delta where done
    nll: Float[Array, " r"]
    nll_before: Float[Array, " r"]
    original: Float[Array, "r vocabulary"]  # as in `_Score`

    def of(self, places: Int[np.ndarray, " n"]) -> "_Progress":
        """That of some of the requests."""
        progress: _Progress = jax.tree.map(lambda leaf: leaf[places] if np.ndim(leaf) else leaf, self)
        return progress


class _Round:
    """One part's requests that are still being optimised, and what was found for all of them."""

    def __init__(self, requests: Sequence[Sequence[Encoded]], layout: Layout) -> None:
        self.requests, self.layout = requests, layout
        self.here: Int[np.ndarray, " n"] = np.arange(len(requests))
        self.state: _Progress | None = None
        self.found: Values | None = None
        self.left = 0

    def take(self, values: Values, after: _Progress) -> None:
        """What a round found for the requests that were here; `left` of them go on."""
        if self.found is None:
            self.found = jax.tree.map(lambda rows: np.array(rows[: len(self.requests)]), values)
        for whole, some in zip(self.found, values, strict=True):
            whole[self.here] = some[: len(self.here)]
        left = np.flatnonzero(~after.done[: len(self.here)])
        self.left = len(left)
        kept = left if self.left else np.zeros(1, np.int64)  # one that is done, where others on the mesh go on
        self.here, self.state = self.here[kept], after.of(kept)

    def shrink(self, sizes: Sizes) -> None:
        """Lay those out that go on."""
        self.layout = align([self.requests[i] for i in self.here.tolist()], sizes.requests, sizes)

    def begun(self) -> _Progress | None:
        """The state of the layout's requests, those that pad it included."""
        if self.state is None:
            return None
        places = np.arange(self.layout.n_requests)
        return self.state.of(np.where(places < len(self.here), places, 0))


def optimise_in_rounds(
    model: Decoder,
    requests: Sequence[Sequence[Sequence[Encoded]]],
    layouts: Sequence[Layout],
    layer: int,
    settings: ValueSettings,
    keep: Keep = "products",
    dtype: str | None = None,
) -> list[Values]:
    """`optimise_values` for the host: once few requests are left to optimise, those go on in a batch of their own.

    Requests end after 5 to 25 steps; of the embedded model's 1,000, half after 10 and nine tenths after 13.

    Args:
        model: as for `optimise_values`; or one on a mesh, which optimises several parts at once.
        requests: of each part, the rows from `encode_requests` that its layout was made of.
        layouts: one, or as many of one size as the mesh has shares of `data`, or fewer.

    Returns:
        NumPy values of each part's requests, without those that pad its layout.
    """
    parts = [_Round(rows, layout) for rows, layout in zip(requests, layouts, strict=True)]
    while True:
        smaller = parts[0].layout.sizes.fraction(SHARE, parts[0].layout.n_contexts)
        leave = smaller.requests if parts[0].layout.n_requests > FEW else 0
        begun = [(part.layout, part.begun()) for part in parts]
        (stack,) = together(model.spread, begun)
        after = _advanced(model, *stack, layer, settings, keep, dtype, leave)
        for part, (values, state) in zip(parts, apart(model.spread, [after], len(parts)), strict=True):
            part.take(values, state)
        if not any(part.left for part in parts):
            return [part.found for part in parts if part.found is not None]
        for part in parts:
            part.shrink(smaller)
        common = larger(*(part.layout.sizes for part in parts))
        for part in parts:
            if part.layout.sizes != common:
                part.shrink(common)


@partial(jax.jit, static_argnames=("layer", "settings", "keep", "dtype"))
def optimise_values(
    model: Decoder,
    layout: Layout,
    layer: int,
    settings: ValueSettings,
    keep: Keep = "products",
    dtype: str | None = None,
) -> Values:
    """Target values for the output of block `layer`, all requests of a layout together, in one program.

    Args:
        model: the model as it stands before this batch.
        layout: rows of the batch, from `kedit_jax.editing.tokens.lay_out`.
        layer: the top edited layer.
        settings: how to optimise; compiled in, as a session keeps its settings.
        keep: what each block keeps for the backward pass; "inputs" takes less memory and half a forward pass more.
        dtype: what the blocks above the edited layer multiply in, as "bfloat16" on accelerators; the model's own by default.
            Sums, norms, the loss and delta itself stay at least float32.

    Returns:
        Values for the requests in the layout's order. Non-finite numbers are left in place: the caller names requests.
    """
    return _advance(model, layout, None, layer, settings, keep, dtype, 0)[0]


def _advance(
    model: Decoder,
    layout: Layout,
    begun: _Progress | None,
    layer: int,
    settings: ValueSettings,
    keep: Keep,
    dtype: str | None,
    leave: int,
) -> tuple[Values, _Progress]:
    """Optimise until at most `leave` requests are not done."""
    problem = _prepare(model, layout, layer)
    if dtype is not None:
        model, problem = _narrowed(model, problem, jnp.dtype(dtype))
    adam = optax.adam(settings.learning_rate)
    norm = jnp.linalg.norm(problem.origin, axis=-1)

    def advance(state: _Progress) -> _Progress:
        score, uphill = _score(model, layout, problem, layer, keep, state, settings)
        loss = score.loss + settings.decay * _length(state.delta) / norm**2
        done = state.done | (loss < settings.stop_loss) | (state.step == settings.steps - 1)
        slope = _unless(done.all(), uphill, state.delta, always=model.spread is not None)  # not of losses that end it all
        slope += settings.decay * _direction(state.delta) / norm[:, None] ** 2
        change, adam_state = adam.update(slope, state.adam)
        moved = _clamp(optax.apply_updates(state.delta, change), settings.clamp * norm)
        return _Progress(
            step=state.step + 1,
            delta=jnp.where(done[:, None], state.delta, moved),
            adam=adam_state,
            done=done,
            updates=state.updates + ~done,
            loss=loss,
            nll=score.nll,
            nll_before=jnp.where(state.step == 0, score.nll, state.nll_before),
            original=score.original,
        )

    start = _start(adam, problem.origin, model.config.vocab_size) if begun is None else begun
    end = jax.lax.while_loop(lambda state: (~state.done).sum() > leave, advance, start)
    z = problem.origin + end.delta
    return Values(z, end.nll_before, end.nll, end.loss, end.updates, _length(end.delta) / norm), end


def _advance_all(model: Decoder, layouts: Layout, begun: _Progress | None, *rest: Any) -> tuple[Values, _Progress]:
    """`_advance` of a layout; of a model on a mesh, of stacked ones, each on its share, until all are where it would end."""

    def one(layout: Layout, begun: _Progress | None) -> tuple[Values, _Progress]:
        return _advance(model, layout, begun, *rest)

    return one(layouts, begun) if model.spread is None else on_shares(model.spread, one, layouts, begun)


_advanced = jax.jit(_advance_all, static_argnums=range(3, 8))


def _unless(
    ended: Bool[Array, ""], uphill: Callable[[], Float[Array, "r d"]], delta: Float[Array, "r d"], *, always: bool
) -> Float[Array, "r d"]:
    """The gradient unless all have ended; of parts that end at different steps always: a choice for each part would give
    each a copy of the model."""
    return uphill() if always else jax.lax.cond(ended, lambda: jnp.zeros_like(delta), uphill)


def _start(adam: optax.GradientTransformation, origin: Float[Array, "r d"], vocabulary: int) -> _Progress:
    zero, nothing = jnp.zeros_like(origin), jnp.zeros_like(origin[:, 0])
    return _Progress(
        step=jnp.int32(0),
        delta=zero,
        adam=adam.init(zero),
        done=jnp.zeros(nothing.shape, bool),
        updates=jnp.zeros(nothing.shape, jnp.int32),
        loss=nothing,
        nll=nothing,
        nll_before=nothing,
        original=jnp.zeros((len(origin), vocabulary), origin.dtype),
    )


def _prepare(model: Decoder, layout: Layout, layer: int) -> _Problem:
    """Run what does not depend on delta: all blocks up to the edited one, those above on what precedes the subject's end."""
    packed, above, cut = layout.packed, layer + 1, layout.n_prefix
    valid = jnp.asarray(layout.valid)
    mask, whole = causal_mask(valid), packed.whole
    positions = pack(whole, positions_of(valid))
    h = model.embed(pack(whole, jnp.asarray(layout.tokens)), positions)
    h, _ = model.run_layers(h, 0, above, positions=positions, mask=mask, packing=whole)

    before, last = packed.before, max(above, model.config.n_layers - 1)
    where, seen = positions[:, before.places], mask[:, :cut, :cut]
    left, _, past = model.prefill(h[:, before.places], above, last, positions=where, mask=seen, packing=before.packing)
    _, _, past_last = model.prefill(
        left, last, model.config.n_layers, positions=where, mask=seen, packing=before.packing
    )  # fmt: skip

    after, scored = packed.after, packed.scored
    # before the targets' columns stands that of the KL prompts, the subjects' last tokens: of weight 0, its column 0
    columns, targets, weights = (
        jnp.pad(jnp.asarray(part), ((0, 0), (1, 0)))
        for part in (layout.target_columns, layout.targets, layout.target_weights)
    )
    scored_at = pack(scored, jnp.take_along_axis(jnp.asarray(after.packing.slots), columns, axis=1))
    suffix, where, rows = h[:, after.places], positions[:, after.places], len(valid)
    origin = suffix[0, : layout.n_prompts : layout.n_contexts]
    origin = origin.astype(jnp.promote_types(h.dtype, jnp.float32))  # delta is optimised in no less
    return _Problem(
        suffix=suffix,
        origin=origin,
        past=(jax.tree.map(lambda kv: kv[:1], past), jax.tree.map(lambda kv: kv[1:], past), past_last),
        known=None if above == last else model.projections(suffix[:, rows:], above, positions=where[:, rows:]),
        positions=where,
        mask=mask[:, cut:],
        scored_at=scored_at,
        scored_mask=jnp.take_along_axis(mask[:, cut:], columns[:, :, None], axis=1),
        targets=pack(scored, targets)[0],
        weights=(pack(scored, weights)[0] / layout.n_contexts).astype(origin.dtype),
    )


def _narrowed(model: Decoder, problem: _Problem, dtype: np.dtype) -> tuple[Decoder, _Problem]:
    """What the optimisation computes with, in another dtype; the hidden state that delta is added to keeps its own."""

    def narrow(leaf: Array) -> Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    narrowed = {name: jax.tree.map(narrow, getattr(problem, name)) for name in ("suffix", "past", "known")}
    return jax.tree.map(narrow, model), problem._replace(**narrowed)


def _hidden(
    model: Decoder, layout: Layout, problem: _Problem, layer: int, keep: Keep, delta: Float[Array, "r d"]
) -> Float[Array, "1 m d"]:
    """The last block's output at the scored tokens, with delta added to block `layer`'s at the subjects' last tokens."""
    above, n_layers, after = layer + 1, model.config.n_layers, layout.packed.after.packing
    rows = layout.tokens.shape[0]
    added = jnp.concatenate([jnp.repeat(delta, layout.n_contexts, axis=0), delta[jnp.asarray(layout.owners)]])
    added = added.astype(problem.suffix.dtype)
    h = jnp.concatenate([problem.suffix[:, :rows] + added, problem.suffix[:, rows:]], axis=1)
    if above == n_layers:
        return h[:, problem.scored_at[0]]
    first, between, last = problem.past
    at = problem.positions
    if problem.known is not None:
        h = model.run_one(
            h, above, known=problem.known, positions=at, mask=problem.mask, past=first, packing=after, keep=keep
        )
        h, _ = model.run_layers(
            h, above + 1, n_layers - 1, positions=at, mask=problem.mask, past=between, packing=after, keep=keep
        )
    return model.run_last(
        h, positions=at, mask=problem.scored_mask, at=problem.scored_at, past=last,
        packing=after, queries=layout.packed.scored,
    )  # fmt: skip


def _score(
    model: Decoder, layout: Layout, problem: _Problem, layer: int, keep: Keep, state: _Progress, settings: ValueSettings
) -> tuple[_Score, Callable[[], Float[Array, "r d"]]]:
    """The loss but for the decay, and what computes its gradient. At delta = 0 the KL is 0 and has no gradient.

    The gradient in the logits is p - 1 at the target for an NLL, and p (log p - log p0 - KL) for a KL.
    """
    hidden, to_delta = jax.vjp(partial(_hidden, model, layout, problem, layer, keep), state.delta)
    logits, to_hidden = jax.vjp(model.logits, hidden[0])
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    n_kl = len(state.delta)

    log_q = logits[:n_kl] - log_z[:n_kl]
    original = jnp.where(state.step == 0, log_q, state.original)
    gap = log_q - original
    q = jnp.exp(log_q)
    kl = (q * gap).sum(-1, keepdims=True)

    token_nll = log_z[:, 0] - jnp.take_along_axis(logits, problem.targets[:, None], axis=-1)[:, 0]
    terms = unpack(layout.packed.scored, (token_nll * problem.weights)[None])
    nll = jnp.where(layout.packed.scored.used, terms, 0)[: layout.n_prompts].reshape(n_kl, -1).sum(-1)

    def uphill() -> Float[Array, "r d"]:
        weights, targets = problem.weights[n_kl:, None], problem.targets[n_kl:, None]
        is_target = targets == jnp.arange(logits.shape[-1], dtype=targets.dtype)
        of_nll = weights * (jnp.exp(logits[n_kl:] - log_z[n_kl:]) - is_target)
        of_kl = settings.kl_factor * q * (gap - kl)
        (at_hidden,) = to_hidden(jnp.concatenate([of_kl, of_nll]).astype(logits.dtype))
        (slope,) = to_delta(at_hidden[None])
        return slope

    return _Score(nll + settings.kl_factor * kl[:, 0], nll, original), uphill


def _length(delta: Float[Array, "r d"]) -> Float[Array, " r"]:
    return jnp.linalg.norm(delta, axis=-1)


def _direction(delta: Float[Array, "r d"]) -> Float[Array, "r d"]:
    """The gradient of |delta|, taken for 0 at 0, where there is none."""
    length = _length(delta)[:, None]
    return jnp.where(length > 0, delta / jnp.where(length > 0, length, 1), 0)


def _clamp(delta: Float[Array, "r d"], limit: Float[Array, " r"]) -> Float[Array, "r d"]:
    """delta, shortened to at most `limit`."""
    length = _length(delta)
    return delta * jnp.where(length > limit, limit / jnp.where(length > 0, length, 1), 1)[:, None]
