"""What an editing session will hold in memory, from a model's configuration alone: nothing is loaded to find out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.typing import DTypeLike

from kedit_jax import solve
from kedit_jax.editing.settings import EditSettings
from kedit_jax.models import ModelConfig, abstract_decoder
from kedit_jax.solve.interface import FIRST_CAPACITY

WIDE = 8  # bytes of a float64
PROMPT, SUFFIX = 24, 8
"""Tokens up to the subject's last one, and behind it, that value optimisation is estimated for."""


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
    config: ModelConfig, settings: EditSettings, *, facts: int, batch: int, dtype: DTypeLike = np.float32
) -> list[Item]:
    """What a session of `facts` facts, written `batch` at a time, holds; in bytes.

    Where CPU is the device, host and device are the same memory.
    """
    layers, n, v = len(settings.layers), config.d_ff, config.d_model
    itemsize = np.dtype(dtype).itemsize
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_decoder(config)))
    return [
        Item("model", "device", parameters * itemsize),
        Item("edited kernels, all layers stacked", "device", config.n_layers * n * v * itemsize),
        Item(
            "value optimisation, a micro-batch", "device", _values(config, settings, min(batch, settings.micro_batch)), False
        ),
        Item("second moments", "host", layers * n * n * WIDE),
        Item("factors of the priors", "host", layers * n * n * WIDE),
        Item("solver's states", "host", layers * state_size(n, v, facts)),
        Item("recorded keys and targets", "host", layers * facts * (4 * n + WIDE * (v + 1))),
        Item("updates", "host", layers * n * v * WIDE),
        Item("a step's workspace, one layer", "host", 3 * n * v * WIDE + batch * (2 * n + v) * WIDE),
    ]


def state_size(n: int, v: int, facts: int) -> int:
    """Bytes of one layer's solver state after so many facts, as `solve.sequential` keeps it under a prior of full rank n."""
    if facts > solve.CROSSOVER * n:
        return (n * n + n * v) * WIDE
    capacity = FIRST_CAPACITY
    while capacity < facts:
        capacity = min(2 * capacity, max(facts, math.ceil(solve.CROSSOVER * n)))
    return (capacity * n + capacity * capacity + 2 * capacity * v + capacity) * WIDE + 4


def total(items: Sequence[Item], place: str | None = None) -> int:
    """Bytes of all items, or of those in one place."""
    return sum(item.size for item in items if place in (None, item.place))


def _values(config: ModelConfig, settings: EditSettings, requests: int) -> int:
    """Cached keys and values of the prompts, what the backward pass keeps, and scores over the vocabulary."""
    rows = requests * (settings.prefixes + 2)  # the bare prompt, the prefixed ones, and the one for the KL term
    above = max(1, config.n_layers - settings.layers[-1] - 1)
    cached = rows * PROMPT * 2 * config.n_kv_heads * config.head_dim * above
    kept = rows * SUFFIX * (above * config.d_model + 3 * config.d_ff + 4 * config.d_model)
    scores = 3 * rows * SUFFIX // 2 * config.vocab_size
    return 4 * (cached + kept + scores)
