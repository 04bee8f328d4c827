"""Tiny random torch models of every family, with odd configuration values: a field that nobody reads breaks parity."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

BOS = 3
TOLERANCE = 1e-4  # of logits, float32
EPS, THETA = 3e-4, 777.0

# Compiling takes most of the time of these tests; unoptimized code takes half of it.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

_IDS = {"bos_token_id": BOS, "eos_token_id": 4}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 5.0,
    "low_freq_factor": 1.3,
    "high_freq_factor": 3.7,
    "original_max_position_embeddings": 23,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """How to build one torch model, and the paths of its blocks and, in a block, of its down projection."""

    build: Callable[[], Any]
    blocks_path: str = "model.layers"
    down_path: str = "mlp.down_proj"

    def blocks(self, model: Any) -> list[Any]:
        return list(operator.attrgetter(self.blocks_path)(model))

    def down(self, model: Any) -> list[Any]:
        return [operator.attrgetter(self.down_path)(block) for block in self.blocks(model)]


def _gpt2(**kwargs: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=35, n_head=5, n_layer=3, n_positions=40, layer_norm_epsilon=EPS, **_IDS, **kwargs
    )
    return transformers.GPT2LMHeadModel(config)


def _gptj() -> Any:
    config = transformers.GPTJConfig(
        vocab_size=67, n_embd=44, n_head=4, n_layer=3, n_positions=37, rotary_dim=6, n_inner=50,
        layer_norm_epsilon=EPS, **_IDS,
    )  # fmt: skip
    return transformers.GPTJForCausalLM(config)


def _gpt_neox(share: float, **kwargs: Any) -> Any:
    config = transformers.GPTNeoXConfig(
        vocab_size=61, hidden_size=48, num_attention_heads=3, intermediate_size=47, num_hidden_layers=3,
        max_position_embeddings=71, layer_norm_eps=EPS,
        rope_parameters={"rope_theta": THETA, "partial_rotary_factor": share}, **_IDS, **kwargs,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


_GATED = {"num_hidden_layers": 3, "max_position_embeddings": 71, "rms_norm_eps": EPS, **_IDS}
_ROPE = {"rope_theta": THETA}


def _llama(**kwargs: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=59, hidden_size=40, num_attention_heads=4, num_key_value_heads=2, intermediate_size=53, **_GATED, **kwargs
    )
    return transformers.LlamaForCausalLM(config)


def _mistral(**kwargs: Any) -> Any:
    config = transformers.MistralConfig(
        vocab_size=57, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, intermediate_size=43, head_dim=10,
        rope_parameters=_ROPE, **_GATED, **kwargs,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config)


def _qwen2(**kwargs: Any) -> Any:
    config = transformers.Qwen2Config(
        vocab_size=73, hidden_size=36, num_attention_heads=6, num_key_value_heads=3, intermediate_size=51,
        rope_parameters=_ROPE, tie_word_embeddings=True, **_GATED, **kwargs,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def _qwen3(**kwargs: Any) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=63, hidden_size=38, num_attention_heads=4, num_key_value_heads=2, intermediate_size=45, head_dim=14,
        rope_parameters=_ROPE, **_GATED, **kwargs,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config)


def _gemma2() -> Any:
    """Caps of the size of the scores and logits: larger ones would hardly show."""
    config = transformers.Gemma2Config(
        vocab_size=61, hidden_size=36, num_attention_heads=4, num_key_value_heads=2, intermediate_size=41, head_dim=10,
        rope_parameters=_ROPE, query_pre_attn_scalar=13, sliding_window=4, attn_logit_softcapping=1.7,
        final_logit_softcapping=2.9, pad_token_id=0, **_GATED,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


def _gemma3() -> Any:
    config = transformers.Gemma3TextConfig(
        vocab_size=67, hidden_size=34, num_attention_heads=2, num_key_value_heads=1, intermediate_size=43, head_dim=14,
        query_pre_attn_scalar=11, sliding_window=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 7 * THETA},
            "sliding_attention": {"rope_type": "default", "rope_theta": THETA},
        },
        pad_token_id=0, **_GATED,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config)


def _phi3(**kwargs: Any) -> Any:
    config = transformers.Phi3Config(
        vocab_size=59, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, intermediate_size=45,
        pad_token_id=0, **_GATED, **kwargs,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config)


_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": THETA,
    "partial_rotary_factor": 0.7,
    "short_factor": [1.0, 1.3, 2.1, 3.7],
    "long_factor": [1.1, 2.3, 5.1, 9.7],
}
_WINDOWED = {"sliding_window": 4}

ONE_A_FAMILY = (
    "gpt2", "gptj", "gpt-neox", "llama-3.1", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3-longrope",
)  # fmt: skip

CASES = {
    "gpt2": Case(lambda: _gpt2(n_inner=45), "transformer.h", "mlp.c_proj"),
    "gpt2-untied-erf": Case(
        lambda: _gpt2(activation_function="gelu", tie_word_embeddings=False), "transformer.h", "mlp.c_proj"
    ),
    "gptj": Case(_gptj, "transformer.h", "mlp.fc_out"),
    "gpt-neox": Case(lambda: _gpt_neox(0.65), "gpt_neox.layers", "mlp.dense_4h_to_h"),
    "gpt-neox-sequential": Case(
        lambda: _gpt_neox(1.0, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True),
        "gpt_neox.layers",
        "mlp.dense_4h_to_h",
    ),
    "llama-3.1": Case(lambda: _llama(head_dim=14, rope_parameters=_LLAMA3)),
    "llama-3.2-biased": Case(
        lambda: _llama(rope_parameters=_ROPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    ),
    "mistral": Case(lambda: _mistral(**_WINDOWED)),
    "qwen2": Case(_qwen2),
    "qwen2-windowed": Case(lambda: _qwen2(use_sliding_window=True, max_window_layers=1, **_WINDOWED)),
    "qwen3": Case(_qwen3),
    "gemma2": Case(_gemma2),
    "gemma3": Case(_gemma3),
    "phi3": Case(lambda: _phi3(rope_parameters=_ROPE, **_WINDOWED)),
    "phi3-longrope": Case(lambda: _phi3(rope_parameters=_LONG_ROPE, original_max_position_embeddings=23)),
}


def build(name: str) -> Any:
    """A torch model whose every parameter is random, of a size that lets errors show in the logits."""
    torch.manual_seed(17)
    model = CASES[name].build().eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim == 2:
                embedding = any(part in path for part in ("wte", "wpe", "embed_tokens", "embed_in"))
                parameter.normal_(std=0.3 if embedding else 1.2 / math.sqrt(min(parameter.shape)))
            elif path.endswith("weight"):
                centre = 0 if name.startswith("gemma") else 1  # Gemma multiplies by 1 + weight
                parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.3)
    model.config._attn_implementation = "eager"
    return model


def save(model: Any, directory: Path, **kwargs: Any) -> Path:
    model.save_pretrained(directory, **kwargs)
    return directory


def padded(vocab_size: int, side: str, *, bos: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Three prompts of 9, 5 and 2 tokens in 9 columns, and their validity; `bos` puts that token first in each."""
    rng = np.random.default_rng(5)
    tokens, valid = np.full((3, 9), 1, np.int32), np.zeros((3, 9), bool)
    for row, length in enumerate((9, 5, 2)):
        where = slice(9 - length, 9) if side == "left" else slice(0, length)
        tokens[row, where] = rng.integers(5, vocab_size, length)
        valid[row, where] = True
        if bos:
            tokens[row, where.start] = BOS
    return tokens, valid


class Outputs(NamedTuple):
    """What a model puts out: logits [B, T, V], and by layer the inputs of down projections and the residual stream."""

    logits: np.ndarray
    keys: np.ndarray
    hidden: np.ndarray


def torch_layers(name: str, model: Any, tokens: np.ndarray, valid: np.ndarray) -> Outputs:
    """The outputs of a torch model, those by layer through forward hooks."""
    keys: list[torch.Tensor] = []
    hidden: list[torch.Tensor] = []
    hooks = [
        *(part.register_forward_pre_hook(lambda _, given: keys.append(given[0])) for part in CASES[name].down(model)),
        *(
            block.register_forward_hook(lambda _, __, out: hidden.append(out[0] if isinstance(out, tuple) else out))
            for block in CASES[name].blocks(model)
        ),
    ]
    positions = np.maximum(valid.cumsum(-1) - 1, 0)
    with torch.no_grad():
        logits = model(
            torch.tensor(tokens).long(), attention_mask=torch.tensor(valid).long(), position_ids=torch.tensor(positions)
        ).logits
    for hook in hooks:
        hook.remove()
    by_layer = (torch.stack(found).reshape(len(found), *tokens.shape, -1).numpy() for found in (keys, hidden))
    return Outputs(logits.numpy(), *by_layer)


def torch_outputs(name: str, model: Any, tokens: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, T, V], and the inputs of all down projections [layers, B, T, d_ff]."""
    return torch_layers(name, model, tokens, valid)[:2]


def altered(
    source: Path,
    target: Path,
    *,
    config: Callable[[dict[str, Any]], object] | None = None,
    tensors: Callable[[dict[str, np.ndarray]], object] | None = None,
) -> Path:
    """A copy of a checkpoint directory with its config.json or tensors changed in place by the functions given."""
    shutil.copytree(source, target)
    if config is not None:
        content = json.loads((target / "config.json").read_text())
        config(content)
        (target / "config.json").write_text(json.dumps(content))
    if tensors is not None:
        held = load_file(target / "model.safetensors")
        tensors(held)
        save_file(held, target / "model.safetensors")
    return target
