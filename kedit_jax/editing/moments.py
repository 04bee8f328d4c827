"""Second moments of keys, C0 = mean of k k' over a corpus: what a model's MLPs see, and edits should leave alone.

One pass over the corpus serves all edited layers and stops above the last. Products are made and summed in float64 on
the host: C0's spectrum spans eight orders of magnitude, and rounding it to float32 moved solutions by up to 7e-2. Sums grow
by blocks of the corpus (`kedit_jax.editing.corpus`), so that an interrupted computation, or one for a larger sample, goes on
from what is stored (`kedit_jax.editing.moment_files`) with the same result, bit for bit.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.linalg.blas import dsyrk

from kedit_jax import hosts
from kedit_jax.editing.corpus import Block, HeldBlocks, Row, read_blocks
from kedit_jax.editing.moment_files import (
    Moments,
    Sums,
    Triangles,
    Work,
    check_writable,
    moments_path,
    read_moments,
    read_sums,
    stored_prefixes,
    write_moments,
    write_sums,
)
from kedit_jax.errors import KeditError, NonFiniteError
from kedit_jax.models import Decoder, ModelConfig, causal_mask, model_fingerprint
from kedit_jax.models.spread import DATA, leading

__all__ = ["Moments", "check_layers", "compute_moments", "default_tokens", "moments_path", "read_moments"]

Progress = Callable[[int, int | None], None]

BLOCK_TOKENS = 4096
"""No more tokens are multiplied at once, unless one forward pass has them: their float64 keys stay small beside C0, and
adding the product to the sum costs a few percent of making it."""
SAMPLE = 10  # tokens for each component of the keys: serves nearly as well as millions (FastMEMIT)
SHORTEST = 32  # columns of a batch
SAVING = 0.05  # share of the time that may go into saving what is unfinished


def compute_moments(
    model: Decoder,
    tokenizer: Any,
    texts: Iterable[str],
    layers: Sequence[int],
    *,
    max_tokens: int | float | None = None,
    row_tokens: int = 512,
    batch_tokens: int = 1024,
    cache: str | Path | None = None,
    save_every: int | float = 60,
    progress: Progress | None = None,
) -> Moments:
    """Second moments of all `layers` over a corpus, in one pass; read from `cache` where the same are stored.

    With a `cache`, an interrupted computation goes on where it was last saved, and one for more tokens of the same corpus
    begins with what a smaller sample left: with the result, bit for bit on the same machine, of one from the start. The
    corpus is read and tokenised from its beginning either way.

    On a mesh, texts are spread over `data`. Of several processes each multiplies the blocks that fall to it, and their sums
    are added in float64; all must be given the same texts and the same `cache`, in which the first one writes.

    Args:
        texts: documents, of which only a few are held at a time; each is cut into rows of at most `row_tokens` tokens (and
            the model's positions), which see nothing of each other.
        max_tokens: stop after so many tokens; ten times the key width by default (`default_tokens`). math.inf asks for the
            whole corpus.
        batch_tokens: tokens of one forward pass; 4096 were slower on a CPU, whose caches they leave (1.4 against 1.1 ms a
            token at GPT-2-small shape).
        cache: folder of stored moments, named by their content; None neither reads nor writes.
        save_every: seconds between two savings of what is unfinished; more where a saving takes long.
        progress: called with (tokens done, tokens in all, or None where the corpus decides).

    Raises:
        KeditError: no text, a layer the model does not have, a damaged stored file, or a cache that cannot be written.
        NonFiniteError: the model's keys hold NaN or infinity.
    """
    layers, width = check_layers(model, layers), model.config.d_ff
    for what, number in (("max_tokens", max_tokens), ("row_tokens", row_tokens), ("batch_tokens", batch_tokens)):
        if number is not None and not number >= 1:
            raise KeditError(f"{what} is {number}; it must be at least 1")
    most = default_tokens(model.config) if max_tokens is None else _count(max_tokens)
    row_tokens = min(row_tokens, model.config.max_positions, model.config.position_limit or row_tokens)
    block_tokens = max(batch_tokens, min(BLOCK_TOKENS, width))
    blocks = read_blocks(tokenizer, texts, width=row_tokens, size=block_tokens, most=most)
    work = Work(model_fingerprint(model), layers, str(model.dtype), batch_tokens)
    saver = _Saver(None if cache is None else Path(cache), work, save_every)
    start = saver.look_up(blocks, math.inf if most is None else most)
    if start.same is not None:
        return read_moments(start.same)
    sums, digest = Sums.none(layers, width) if start.stored is None else read_sums(start.stored), start.digest
    product = np.zeros((width, width), order="F")
    if not hosts.is_first():
        sums.clear()  # the first process holds what was stored
    for block, keys in _keys_ahead(model, start.blocks, layers, batch_tokens):
        digest.update(block.content)
        done, products = sums.tokens + block.tokens, _products(keys, layers, product)
        if block.last:
            sums.unite()
            moments = sums.moments(products, block.tokens, digest.hexdigest(), work)
            saver.finish(moments, sums)
        else:
            falls_here = sums.blocks % hosts.count() == hosts.number()
            sums.add(products if falls_here else iter(()), block.tokens, digest.hexdigest())
            saver.now_and_then(sums)
        if progress is not None:
            progress(done, done if block.last else most)
    return moments


def default_tokens(config: ModelConfig) -> int:
    """Size of the sample where none is asked for."""
    return SAMPLE * config.d_ff


def check_layers(model: Decoder, layers: Sequence[int]) -> tuple[int, ...]:
    """The layers in rising order, or a KeditError that names those the model does not have."""
    n_layers = model.config.n_layers
    wrong = [layer for layer in layers if not 0 <= layer < n_layers]
    if wrong or not layers or len(set(layers)) != len(layers):
        raise KeditError(f"layers {list(layers)} cannot be edited: name each once, from 0 to {n_layers - 1}")
    return tuple(sorted(layers))


def _count(max_tokens: int | float) -> int | None:
    if math.isinf(max_tokens):
        return None
    if max_tokens != int(max_tokens):
        raise KeditError(f"max_tokens is {max_tokens}; give a whole number, or math.inf for the whole corpus")
    return int(max_tokens)


# --- keys and products ----------------------------------------------------------------------------------------------

_Keys = list[tuple[Bool[np.ndarray, "_ _"], list[Float[Array | np.ndarray, "_ _ k"]]]]
"""For each batch, where its tokens are real, and the keys by layer."""


def _keys_ahead(
    model: Decoder, blocks: Iterable[Block], layers: tuple[int, ...], batch_tokens: int
) -> Iterator[tuple[Block, _Keys]]:
    """Each block with its keys, by batch and layer; the device is at work on the next while the host multiplies one."""
    ready: tuple[Block, _Keys] | None = None
    for block in blocks:
        started = block, [_started(model, *batch, layers) for batch in _batches(block.rows, batch_tokens)]
        if ready is not None:
            yield ready
        ready = started
    if ready is not None:
        yield ready


def _batches(rows: Sequence[Row], size: int) -> Iterator[tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b t"]]]:
    """Rows packed into batches of about `size` tokens, longest first, each where it fits first.

    A batch is as wide as its longest row, and as high as it has lines, both in powers of two, so that few programs are
    compiled. Beside the tokens come the numbers of their rows, from 1 on in each line; 0 is padding.
    """
    left = sorted(rows, key=len, reverse=True)
    while left:
        width = max(SHORTEST, 1 << (len(left[0]) - 1).bit_length())
        most = max(1, size // width)
        lines: list[list[Row]] = []
        free: list[int] = []
        later = []
        for row in left:
            at = next((i for i, room in enumerate(free) if room >= len(row)), len(lines))
            if at == most:
                later.append(row)
                continue
            if at == len(lines):
                lines.append([])
                free.append(width)
            lines[at].append(row)
            free[at] -= len(row)
        shape = (min(most, 1 << (len(lines) - 1).bit_length()), width)
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for i, line in enumerate(lines):
            used = width - free[i]
            tokens[i, :used] = np.concatenate(line)
            segments[i, :used] = np.repeat(np.arange(1, len(line) + 1), [len(row) for row in line])
        yield tokens, segments
        left = later


def _started(
    model: Decoder, tokens: Int[np.ndarray, "b t"], segments: Int[np.ndarray, "b t"], layers: tuple[int, ...]
) -> tuple[Bool[np.ndarray, "_ t"], list[Float[Array | np.ndarray, "_ t _"]]]:
    """Where a batch's tokens are real, and their keys, which are being computed."""
    if model.spread is None:
        return segments > 0, _keys(model, tokens, segments, layers)
    tokens, segments = (leading(rows, model.spread.data) for rows in (tokens, segments))
    return segments > 0, _keys(model, *model.spread.put((tokens, segments), DATA), layers)


@partial(jax.jit, static_argnames="layers")
def _keys(
    model: Decoder, tokens: Int[Array, "b t"], segments: Int[Array, "b t"], layers: tuple[int, ...]
) -> list[Float[Array, "b t k"]]:
    """The keys of each layer; nothing above the last runs. Tokens see those before them in their own segment alone."""
    same = segments[:, :, None] == segments[:, None, :]
    mask = causal_mask(segments > 0) & same
    # A segment lies in one piece. Padding is at 0: past a table of positions it would be NaN, which no weight of 0 undoes.
    positions = jnp.where(segments > 0, jnp.tril(same).sum(-1) - 1, 0)
    h, at = model.embed(jnp.asarray(tokens), positions), 0
    found: list[Array] = []
    for first, stop in _consecutive(layers):
        if at < first:
            h, _ = model.run_layers(h, at, first, positions=positions, mask=mask, causal=True)
        h, keys = model.run_layers(h, first, stop, positions=positions, mask=mask, causal=True)
        found.extend(keys)
        at = stop
    return found if model.spread is None else model.spread.everywhere(found)


def _consecutive(layers: tuple[int, ...]) -> list[tuple[int, int]]:
    """Runs first <= layer < stop of consecutive layers; the last layer by itself, since nobody reads its output."""
    bounds = [0, *(i for i in range(1, len(layers)) if layers[i] > layers[i - 1] + 1 or i == len(layers) - 1), len(layers)]
    return [(layers[i], layers[j - 1] + 1) for i, j in itertools.pairwise(bounds)]


def _products(batches: _Keys, layers: tuple[int, ...], into: Float[np.ndarray, "k k"]) -> Triangles:
    """Each layer's sum of k k' over a block, float64: the lower triangle of `into`, which the next layer overwrites.

    Raises:
        NonFiniteError: keys that are not finite.
    """
    ends = np.cumsum([valid.sum() for valid, _ in batches]).tolist()
    rows = np.empty((ends[-1], len(into)))  # once for all layers: what is new must be mapped first, 2 % of the whole
    for place, layer in enumerate(layers):
        for (valid, by_layer), end in zip(batches, ends, strict=True):
            rows[end - valid.sum() : end] = np.asarray(by_layer[place])[valid]
        product = dsyrk(1.0, rows.T, beta=0.0, c=into, lower=1, overwrite_c=1)
        if not np.isfinite(product.diagonal()).all():
            raise NonFiniteError(f"layer {layer} puts out NaN or infinite keys on the corpus; check the weights")
        yield layer, product


# --- what is stored -------------------------------------------------------------------------------------------------


class _Start(NamedTuple):
    """Where a computation begins.

    Attributes:
        blocks: what has not been summed.
        digest: of the corpus before those.
        stored: file of the sums over what is before them; None where that is nothing.
        same: file of the very moments that are wanted, where there is one.
    """

    blocks: Iterable[Block]
    digest: Any
    stored: Path | None = None
    same: Path | None = None


@dataclass
class _Saver:
    """Finds sums to go on with, stores them now and then, and the moments in the end; where there is no cache, nothing."""

    cache: Path | None
    work: Work
    every: int | float
    saved: float = field(default_factory=time.monotonic)
    pause: float = 0.0

    def look_up(self, blocks: Iterator[Block], most: int | float) -> _Start:
        """Read the corpus as far as anything stored could be made of it, and find the furthest that is.

        Raises:
            KeditError: there is something to compute, and no way to store it.
        """
        known = hashlib.sha256()
        if self.cache is None:
            return _Start(blocks, known)
        prefixes, furthest = stored_prefixes(self.cache, self.work, most)
        digest, seen, held, stored = known.copy(), 0, HeldBlocks(), None
        while seen < furthest:
            block = next(blocks)
            held.append(block)
            seen += block.tokens
            digest.update(block.content)
            if block.last:
                same = self.work.finished(self.cache, digest.hexdigest())
                if same.exists():
                    return _Start(held, known, stored, same)
                break
            if digest.hexdigest() in prefixes:
                stored, known = prefixes[digest.hexdigest()], digest.copy()
                held.clear()
        cache = self.cache
        hosts.on_first(lambda: check_writable(cache))
        if len(set(hosts.gathered(known.hexdigest()))) > 1:
            raise KeditError(f"the processes do not find the same in {str(cache)!r}: give a folder that all of them share")
        return _Start(itertools.chain(held, blocks), known, stored)

    def now_and_then(self, sums: Sums) -> None:
        begun, cache = time.monotonic(), self.cache
        if cache is None or hosts.first_says(str(begun - self.saved < max(self.every, self.pause))) == "True":
            return
        sums.unite()
        hosts.on_first(lambda: write_sums(self.work.unfinished(cache, sums.first), sums, self.work))
        if not hosts.is_first():
            sums.clear()
        self.saved = time.monotonic()
        self.pause = (self.saved - begun) / SAVING

    def finish(self, moments: Moments, sums: Sums) -> None:
        cache = self.cache
        if cache is None:
            return

        def write() -> None:
            write_moments(self.work.finished(cache, moments.corpus), moments, sums, self.work.batch_tokens)
            self.work.unfinished(cache, sums.first).unlink(missing_ok=True)

        hosts.on_first(write)
