"""What a model family states about itself: how to read its config.json, and where its weights go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from kedit_jax.models.config import ModelConfig
from kedit_jax.models.fields import Fields


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row of a weight table: a checkpoint tensor and the parameters that it fills.

    `name` holds `{layer}` where the parameters are stacked over layers. Several `paths` share the tensor's last axis
    (after transposing), in their order, once or in `groups` equal runs (GPT-NeoX: query, key and value of one head after
    another). `copy` marks a tensor which may be absent and, where present, must equal the parameter (the output
    projection of a tied model). `alias` is another name that files may give the tensor.
    """

    name: str
    paths: tuple[str, ...]
    transpose: bool = False
    copy: bool = False
    groups: int = 1
    alias: str | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family of the Hugging Face hub.

    `prefix` begins the tensor names of the model with a head and is absent from those of the bare model; both load.
    `buffers` are tensors of old checkpoints that hold no parameters.
    """

    model_type: str
    architecture: str
    prefix: str
    read_config: Callable[[Fields], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    weights: Callable[[ModelConfig], list[Weight]]
    buffers: tuple[str, ...] = ()


def linear(name: str, path: str, *, bias: bool) -> list[Weight]:
    """A torch Linear, whose weight is [out, in]."""
    rows = [Weight(f"{name}.weight", (f"{path}.kernel",), transpose=True)]
    return [*rows, Weight(f"{name}.bias", (f"{path}.bias",))] if bias else rows


def norm(name: str, path: str, *, bias: bool) -> list[Weight]:
    """A norm's scale, and its bias where it has one."""
    rows = [Weight(f"{name}.weight", (f"{path}.scale",))]
    return [*rows, Weight(f"{name}.bias", (f"{path}.bias",))] if bias else rows


def head(config: ModelConfig, name: str = "lm_head", *, alias: str | None = None) -> list[Weight]:
    """The output projection; `alias` is the full name of the same tensor in other files."""
    if config.tie_embeddings:
        kernel = Weight(f"{name}.weight", ("embedding",), copy=True, alias=alias)
    else:
        kernel = Weight(f"{name}.weight", ("head.kernel",), transpose=True, alias=alias)
    return [kernel, Weight(f"{name}.bias", ("head.bias",))] if config.biases.head else [kernel]


def special_ids(config: ModelConfig) -> dict[str, Any]:
    """Written even when None: an absent field would take the default of the family's transformers class."""
    eos: int | list[int] | None = list(config.eos_ids) or None
    if len(config.eos_ids) == 1:
        eos = config.eos_ids[0]
    return {"bos_token_id": config.bos_id, "eos_token_id": eos, "pad_token_id": config.pad_id}
