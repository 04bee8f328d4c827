"""Checkpoints to export from, deltas for them, and what transformers and peft make of the result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors import safe_open

from kedit_jax.delta import Dense, EditDelta, LowRank, apply_edits
from kedit_jax.export import ModelDelta, delta_of
from kedit_jax.models import Decoder, down_kernel_address, load_model
from tests.models import oracle_models
from tests.models.oracle_models import quick_jit

TOLERANCE = oracle_models.TOLERANCE  # of logits, float32
FAMILIES = (
    *("gpt2", "gptj", "gpt-neox", "llama-3.1", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"),
    "llama-3.2-biased",  # tied embeddings, biases
)
LAYERS = (0, 2)  # of three
RANKS = (2, 3)  # of their updates

_logits = quick_jit(lambda model, tokens, valid: model(tokens, valid))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A directory as transformers writes it, the model in it, and a delta of that model."""

    directory: Path
    model: Decoder
    edited: ModelDelta

    @property
    def edited_model(self) -> Decoder:
        return apply_edits(self.model, self.edited.delta)


def make(name: str, directory: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB") -> Checkpoint:
    torch_model = oracle_models.build(name).to(dtype)
    torch_model.save_pretrained(directory, max_shard_size=max_shard_size)
    (directory / "tokenizer.json").write_text('{"any": "tokenizer"}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "README.md").write_text("the card of the original model")
    (directory / "modeling.py").write_text("raise RuntimeError")
    model = load_model(directory)
    return Checkpoint(directory, model, delta_of(model, random_delta(model)))


def random_delta(model: Decoder, seed: int = 3) -> EditDelta:
    """Float64 updates of rank 2 and 3 that change the logits plainly: one as factors, one written out."""
    rng = np.random.default_rng(seed)
    keys, values = model.config.d_ff, model.config.d_model
    updates: dict[str, Any] = {}
    for layer, rank in zip(LAYERS, RANKS, strict=True):
        left, right = rng.normal(size=(keys, rank)), rng.normal(size=(rank, values)) / np.sqrt(keys)
        updates[down_kernel_address(layer)] = LowRank(left, right) if layer else Dense(left @ right)
    return EditDelta(updates)


def prompts(model: Decoder) -> np.ndarray:
    return np.random.default_rng(5).integers(5, model.config.vocab_size, (2, 7)).astype(np.int32)


def jax_logits(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(_logits(model, jnp.asarray(tokens), jnp.ones(tokens.shape, bool)), np.float32)


def torch_model(directory: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    """As a user of transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.float().numpy()


def raw_tensors(directory: Path) -> dict[str, tuple[str, bytes]]:
    """Every tensor's dtype and bytes, by safetensors' own reader and torch."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, not a mapping
                tensor = file.get_tensor(name)
                found[name] = (str(tensor.dtype), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found


def snapshot(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, hidden names included."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
