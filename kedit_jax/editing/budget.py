"""What an editing session will hold in memory, from a model's configuration alone: nothing is loaded to find out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Int, Shaped

from kedit_jax.editing.packed import Sizes, larger
from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.tokens import Encoded, Layout, align
from kedit_jax.models import Keep, ModelConfig, abstract_decoder, named_parameters
from kedit_jax.models.spread import Spread, share
from kedit_jax.solve import host

WIDE = 8  # bytes of a float64
DOWN = "layers.mlp.down.kernel"
GIB = 2**30
PROMPT, SUFFIX = 24, 8
"""Tokens up to the subject's last one, and behind it, that value optimisation is estimated for."""
LOOSE = 1.5
"""Arrays so many times larger than needed are not used once more, though a program costs seconds to compile."""
FEW = 8
"""With more requests at once than these, keeping what was computed is worth more than further requests."""

SMALL, LOOSER = 8, 3.0
"""Batches of at most so many requests are padded to an earlier one's number, and its arrays used once more up to so many
times what is needed. A size costs seconds to compile, and its five programs some 280 memory mappings each for as long as the
process lives, of which Linux gives 65,530: those of 47 sizes. 200 batches of one to five facts came to 126 sizes; now they
come to 7, and compute twice the tokens, milliseconds on a small model."""


@dataclass(frozen=True)
class Item:
    """One thing that takes memory.

    Attributes:
        place: "device" for what goes with the model, "host" for what the solver keeps in float64.
        exact: counted from shapes; otherwise an estimate, from typical prompt lengths.
    """

    what: str
    place: str
    size: int
    exact: bool = True


def memory_items(
    config: ModelConfig,
    settings: EditSettings,
    *,
    facts: int,
    batch: int,
    dtype: DTypeLike = np.float32,
    spread: Spread | None = None,
) -> list[Item]:
    """What a session of `facts` facts, written `batch` at a time, holds; in bytes.

    Where CPU is the device, host and device are the same memory. On a mesh, "device" is what one of its devices holds, and
    "host" what every process does.
    """
    layers, n, v = len(settings.layers), config.d_ff, config.d_model
    itemsize = np.dtype(dtype).itemsize
    stack = (config.n_layers, n, v)
    kernels = math.prod(stack) if spread is None else share(spread.mesh, spread.at_rest(DOWN, stack), stack)
    return [
        Item("model", "device", device_bytes(config, spread, itemsize)),
        Item("edited kernels, all layers stacked", "device", kernels * itemsize),
        Item("value optimisation, a micro-batch", "device", _values(config, settings, batch, itemsize, spread), False),
        Item("second moments, until their priors are factored", "host", layers * n * n * WIDE),
        Item("factors of the priors", "host", layers * n * n * WIDE),
        Item("solver's states", "host", layers * host.state_size(n, v, facts)),
        Item("recorded keys and targets", "host", layers * facts * (4 * n + WIDE * (v + 1))),
        Item("updates", "host", layers * n * v * WIDE),
        Item("a step's workspace, one layer", "host", host.workspace(n, n, v, facts, batch) + n * v * (WIDE + itemsize)),
    ]


def total(items: Sequence[Item], place: str | None = None) -> int:
    """Bytes of all items, or of those in one place."""
    return sum(item.size for item in items if place in (None, item.place))


def device_bytes(config: ModelConfig, spread: Spread | None, itemsize: int) -> int:
    """What the parameters take, on one device of the mesh if there is one."""
    parameters = named_parameters(abstract_decoder(config))
    if spread is None:
        return itemsize * sum(math.prod(leaf.shape) for leaf in parameters.values())
    return itemsize * sum(
        share(spread.mesh, spread.at_rest(path, leaf.shape), leaf.shape) for path, leaf in parameters.items()
    )


def _values(config: ModelConfig, settings: EditSettings, batch: int, itemsize: int, spread: Spread | None) -> int:
    """What value optimisation will take: all that it may, or less where the batch is small."""
    batch = batch if spread is None else -(-batch // spread.data)
    size = typical_sizes(min(batch, settings.micro_batch or batch), settings.prefixes)
    return min(int(settings.memory * GIB), values_bytes(config, size, settings.layers[-1], "products", itemsize, spread))


class MicroBatches(NamedTuple):
    """Requests cut into parts that are computed one after another.

    Attributes:
        layouts: of the parts, all of one size; padded where they hold fewer requests.
        places: which of the requests each part holds, in its order.
    """

    layouts: list[Layout]
    places: list[Int[np.ndarray, " r"]]

    def gathered(self, parts: Sequence[ArrayLike]) -> Shaped[np.ndarray, "r *rest"]:
        """A row for each request, in the order of the requests, from what was computed for the parts."""
        order = np.concatenate(self.places)
        rows = np.concatenate([np.asarray(part)[: len(at)] for part, at in zip(parts, self.places, strict=True)])
        return rows[np.argsort(order)]


def micro_batches(
    config: ModelConfig,
    settings: EditSettings,
    requests: Sequence[Sequence[Encoded]],
    *,
    itemsize: int,
    held: Sizes | None = None,
    spread: Spread | None = None,
) -> MicroBatches:
    """Requests from `encode_requests` in as few parts of one size as `settings.memory` allows.

    Parts get about as many tokens each, as all are computed at the size of the largest. One request is taken as it is, even
    where it needs more memory. On a mesh there is a part for each share of `data`, and the memory is that of one device.
    `held` are the sizes of an earlier part: they are used once more by those with as many requests, or fewer where they are
    few (`SMALL`), and each part's by the next.
    """
    shares = min(1 if spread is None else spread.data, len(requests))
    size = min(-(-len(requests) // shares), settings.micro_batch or len(requests))
    if held is not None and size == len(requests) and size < held.requests <= SMALL:
        layouts = _arranged([requests], held.requests, held)
        if _least(config, settings, layouts[0].sizes, itemsize, spread) <= settings.memory * GIB:
            return MicroBatches(layouts, [np.arange(size)])
    while True:
        count = shares * -(-len(requests) // (size * shares))  # as many in each share
        size = -(-len(requests) // count)  # as even as the number of parts allows
        places = _dealt(requests, -(-len(requests) // size))
        parts = [[requests[i] for i in at.tolist()] for at in places]
        layouts = _arranged(parts, size, held if held is not None and held.requests == size else None)
        if len({layout.sizes for layout in layouts}) > 1:
            layouts = _arranged(parts, size, layouts[-1].sizes)  # the first may have grown to those of the last
        largest = max(_least(config, settings, layout.sizes, itemsize, spread) for layout in layouts)
        if size == 1 or largest <= settings.memory * GIB:
            return MicroBatches(layouts, places)
        size = max(1, min(size - 1, int(size * settings.memory * GIB / largest)))


def sizes_for(
    config: ModelConfig,
    settings: EditSettings,
    batches: Sequence[Sequence[Sequence[Encoded]]],
    *,
    itemsize: int,
    held: Sizes | None = None,
    spread: Spread | None = None,
) -> Sizes | None:
    """Sizes that hold the parts of each of these batches, or of all but the longest where memory has no room for those.

    They are of parts with as many requests as any batch's; `held` are those known before.
    """
    for requests in batches:
        found = micro_batches(config, settings, requests, itemsize=itemsize, held=held, spread=spread).layouts[-1].sizes
        both = found if held is None or found.requests > held.requests else larger(held, found)
        if both.requests == found.requests and _least(config, settings, both, itemsize, spread) <= settings.memory * GIB:
            held = both
    return held


def _dealt(requests: Sequence[Sequence[Encoded]], count: int) -> list[Int[np.ndarray, " r"]]:
    """The requests dealt to `count` parts, as many to each and with as many tokens; which is which, in each part.

    Forth and back, shortest first; then the parts with most and fewest tokens swap two requests as long as that evens them.
    A part that is one request short counts its first one, a short one, twice, for that is what `align` pads it with.
    """
    if count == 1:
        return [np.arange(len(requests))]
    lengths = np.array([_suffix_tokens(rows) for rows in requests])
    order = np.argsort(lengths, kind="stable")
    turns, place = np.divmod(np.arange(len(requests)), count)
    part = np.where(turns % 2 == 0, place, count - 1 - place)
    parts = [order[part == number] for number in range(count)]
    size = max(map(len, parts))
    sums = np.array([lengths[at].sum() + (lengths[at[0]] if len(at) < size else 0) for at in parts])
    for _ in requests:
        most, fewest = int(sums.argmax()), int(sums.argmin())
        (long, i), (short, j) = (np.unique(lengths[parts[at][1:]], return_index=True) for at in (most, fewest))
        gains, uneven = long[:, None] - short, sums[most] - sums[fewest]
        if not gains.size:
            break
        best = np.unravel_index(np.abs(2 * gains - uneven).argmin(), gains.shape)
        gain, here, there = gains[best], 1 + i[best[0]], 1 + j[best[1]]
        if not 0 < gain < uneven:
            break
        parts[most][here], parts[fewest][there] = parts[fewest][there], parts[most][here]
        sums[[most, fewest]] += [-gain, gain]
    return parts


def _suffix_tokens(rows: Sequence[Encoded]) -> int:
    """Of a request: from the subjects' last tokens on, without the last one of each target, which is no input."""
    return sum(len(row.tokens) - row.subject_last - bool(row.target) for row in rows[:-1])


def _arranged(parts: Sequence[Sequence[Sequence[Encoded]]], size: int, held: Sizes | None) -> list[Layout]:
    layouts: list[Layout] = []
    loose = LOOSER if size <= SMALL else LOOSE
    for part in parts:
        layout = align(part, size, layouts[-1].sizes if layouts else held)
        if layout.sizes.after > loose * layout.packed.after.packing.used.sum():
            layout = align(part, size)
        layouts.append(layout)
    return layouts


def what_to_keep(
    config: ModelConfig, settings: EditSettings, layout: Layout, *, itemsize: int, spread: Spread | None = None
) -> Keep:
    """What blocks keep for the backward pass of a micro-batch: everything that was dear, where memory allows."""
    needed = values_bytes(config, layout.sizes, settings.layers[-1], "products", itemsize, spread)
    return "products" if needed <= settings.memory * GIB else "inputs"


def _least(config: ModelConfig, settings: EditSettings, sizes: Sizes, itemsize: int, spread: Spread | None) -> int:
    """What a micro-batch must have: blocks recompute only where few requests would fit otherwise."""
    keep: Keep = "products" if sizes.requests > FEW else "inputs"
    return values_bytes(config, sizes, settings.layers[-1], keep, itemsize, spread)


def typical_sizes(requests: int, prefixes: int) -> Sizes:
    """Those of so many requests of usual length, rather too much: their prefixes alone are shared."""
    rows = requests * (prefixes + 2)
    own = 6 * rows  # of the tokens before the subject's last one
    return Sizes(requests, rows, PROMPT, SUFFIX, 2, own + 5 * rows, own, 5 * rows, 2 * rows, own + rows, 8 * requests)


def values_bytes(
    config: ModelConfig, sizes: Sizes, layer: int, keep: Keep, itemsize: int, spread: Spread | None = None
) -> int:
    """What `optimise_values` takes beside its arguments, checked against XLA's own analysis: at most so much on one device,
    within 15 % either way on a mesh, where activations stay in the model's dtype between products.

    Args:
        layer: the top edited one.
        itemsize: bytes of the model's numbers.
        spread: the mesh of one of whose devices this is the memory; the sizes are of its share.
    """
    s, d = sizes, config.d_model
    heads, kv_heads, ff, vocabulary = _cut(config, spread)
    q, kv = heads * config.head_dim, kv_heads * config.head_dim
    wide = ff * (2 if config.gated_mlp else 1)
    above = max(0, config.n_layers - layer - 1)
    scores = s.rows * heads * s.suffix * (s.prefix + s.suffix)
    products = s.after * (q + 2 * kv + 2 * d + wide) + 2 * scores + s.rows * s.suffix * q
    kept = max(0, above - 1) * (s.after * d + (products if keep == "products" else 0))
    working = s.after * (2 * wide + 4 * d) + 4 * s.rows * s.suffix * q + 3 * scores
    columns = s.prefix + s.suffix
    below = s.whole * (2 * wide + 6 * d) + 4 * s.rows * columns * q + 2 * s.rows * heads * columns**2
    block = d * (2 * q + 2 * kv) + d * (wide + ff)
    past = 2 * s.rows * s.prefix * kv * above + 2 * s.after * (q + 2 * kv)
    head = 3 * s.scored * vocabulary + 4 * s.requests * vocabulary
    whole = 0 if spread is None else vocabulary * d  # the head's kernel, gathered over `data`
    wide_size = max(itemsize, 4)
    between = wide_size if spread is None else itemsize
    upwards = wide_size * head + between * working + itemsize * kept  # what is kept has the model's dtype
    return max(between * below, upwards) + between * (past + 3 * s.after * d) + itemsize * (2 * block + whole)


def _cut(config: ModelConfig, spread: Spread | None) -> tuple[int, int, int, int]:
    """Of heads, those of keys and values, key width and vocabulary, how much one device computes."""
    whole = (config.n_heads, config.n_kv_heads, config.d_ff, config.vocab_size)
    if spread is None:
        return whole
    heads, kv_heads, ff, vocabulary = (size // spread.model if size % spread.model == 0 else size for size in whole)
    return heads, kv_heads, ff, vocabulary
