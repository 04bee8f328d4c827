"""Keys and current values at the subject's last token, layer by layer as the layers below are being edited.

One pass over a batch's contexts: it stops at each edited layer before the down projection, whose input are the keys, and
goes on from there once the kernel is written. Common beginnings are computed once (see `kedit_jax.editing.packed`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kedit_jax.editing.packed import Part
from kedit_jax.editing.tokens import Layout
from kedit_jax.models import Decoder, Packing, causal_mask, pack, positions_of, single_tokens
from kedit_jax.models.spread import on_shares


class Stream(NamedTuple):
    """The packed tokens of a batch's contexts, up to the subjects' last ones, before some layer or within it.

    Attributes:
        h: the residual stream; within a layer, what the output of its down projection will be added to.
        keys: the input of that projection; None before a layer.
        rows, bare: how tokens stand in the rows of all contexts, and those of the bare prompts in rows of their own.
    """

    h: Float[Array, "1 n d"]
    keys: Float[Array, "1 n k"] | None
    positions: Int[Array, "1 n"]
    mask: Bool[Array, "rows t t"]
    rows: Packing
    bare: Part


class Reading(NamedTuple):
    """What one layer shows of R requests.

    Attributes:
        keys: [R, k] input of the layer's down projection; the bare prompt counts one half, the prefixed ones together
            the other.
        top: [R, d] output of the top edited layer for the bare prompt.
    """

    keys: Float[Array, "r k"]
    top: Float[Array, "r d"]


@jax.jit
def enter(model: Decoder, layout: Layout) -> Stream:
    """The stream before the first layer: all contexts, without what follows the subject and without the KL prompts.

    Of a model on a mesh, that of layouts stacked by `kedit_jax.models.spread.together`.
    """
    if model.spread is None:
        return _enter(model, layout)
    return on_shares(model.spread, partial(_enter, model), layout, read=False)


def _enter(model: Decoder, layout: Layout) -> Stream:
    prompts, columns = slice(layout.n_prompts), slice(layout.n_prefix + 1)
    tokens, valid = (jnp.asarray(part)[prompts, columns] for part in (layout.tokens, layout.valid))
    rows = layout.packed.contexts
    positions = pack(rows, positions_of(valid))
    return Stream(model.embed(pack(rows, tokens), positions), None, positions, causal_mask(valid), rows, layout.packed.bare)


@partial(jax.jit, static_argnames=("at", "layer", "top", "n_contexts"))
def read(model: Decoder, stream: Stream, at: int, layer: int, top: int, n_contexts: int) -> tuple[Stream, Reading]:
    """Carry the stream from before layer 0, or from within layer `at`, into `layer` and read there, with the kernels as
    they now are.

    Every layer below `layer` must already be edited; those from `layer` on run as they stand to see the top's output. In the
    top layer nothing but the subjects' last tokens is left of the stream, which ends there.

    Of a model on a mesh, of a stack of streams.
    """

    def one(stream: Stream) -> tuple[Stream, Reading]:
        return _read(model, stream, at, layer, top, n_contexts)

    if model.spread is None:
        return one(stream)
    after, reading = on_shares(model.spread, one, stream, read=False)
    return after, model.spread.everywhere(reading)


def _read(model: Decoder, stream: Stream, at: int, layer: int, top: int, n_contexts: int) -> tuple[Stream, Reading]:
    h, begin = stream.h, 0
    if stream.keys is not None:
        h, begin = model.after_down(h, stream.keys, at), at + 1
    seen: dict[str, Any] = {"positions": stream.positions, "packing": stream.rows}
    h, _ = model.run_layers(h, begin, layer, mask=stream.mask, **seen)
    ends = jnp.asarray(stream.rows.slots)[:, -1]
    if layer == top:
        last: dict[str, Any] = {"mask": stream.mask[:, -1:], "at": ends[None], "queries": single_tokens(len(ends))}
        h, keys = model.before_down(h, layer, **seen, **last)
        found = keys[0]
        present = model.after_down(h[:, ::n_contexts], keys[:, ::n_contexts], layer)[0]
    else:
        h, keys = model.before_down(h, layer, mask=stream.mask, **seen)
        found = keys[0, ends]
        present = _top(model, stream, h, keys, layer, top, n_contexts)
    by_request = found.reshape(-1, n_contexts, keys.shape[-1])
    return stream._replace(h=h, keys=keys), Reading(_equal_groups(by_request), present)


def _top(
    model: Decoder,
    stream: Stream,
    h: Float[Array, "1 n d"],
    keys: Float[Array, "1 n k"],
    layer: int,
    top: int,
    n_contexts: int,
) -> Float[Array, "r d"]:
    """Output of a later layer `top` at the end of the bare prompts, from within `layer`."""
    places, rows = stream.bare
    mask = stream.mask[::n_contexts]
    seen: dict[str, Any] = {"positions": stream.positions[:, places], "packing": rows}
    h = model.after_down(h[:, places], keys[:, places], layer)
    h, _ = model.run_layers(h, layer + 1, top, mask=mask, **seen)
    at = jnp.asarray(rows.slots)[None, :, -1]
    last: dict[str, Any] = {"mask": mask[:, -1:], "at": at, "queries": single_tokens(at.shape[1])}
    return model.after_down(*model.before_down(h, top, **seen, **last), top)[0]


def _equal_groups(keys: Float[Array, "r c k"]) -> Float[Array, "r k"]:
    """Mean over the contexts, the bare one weighing as much as all prefixed ones together (published code's groups)."""
    wide = keys.astype(jnp.promote_types(keys.dtype, jnp.float32))
    if keys.shape[1] == 1:
        return wide[:, 0]
    return (wide[:, 0] + wide[:, 1:].mean(1)) / 2
