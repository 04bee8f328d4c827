"""What is edited: random models of known shapes, generated requests with CounterFact's lengths, second moments.

Everything is made from a seed and stored in a folder, from which both procedures read the same: a Hugging Face checkpoint
with a tokenizer, moments, requests and prefixes. Weights are random: an edit costs what a real one does and means nothing.
"""

import dataclasses
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kedit_jax.editing.moments import Moments, compute_moments
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, start_session
from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.values import ValueSettings
from kedit_jax.models import load, model_fingerprint


@dataclass(frozen=True)
class Shape:
    """Of a model, and how it is edited.

    Attributes:
        std: of the weights, larger than before training: a fifth of that tells prompts hardly apart.
        dtype: of the weights while they are edited; the checkpoint of a float64 model is float32.
    """

    name: str
    family: str
    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    layers: tuple[int, ...]
    learning_rate: float
    moment_weight: float
    std: float
    dtype: str = "float32"
    steps: int = 25

    def settings(self) -> EditSettings:
        """Published numbers, but that no request stops early: every procedure makes all its steps."""
        return EditSettings(
            self.layers,
            moment_weight=self.moment_weight,
            values=ValueSettings(steps=self.steps, learning_rate=self.learning_rate, stop_loss=0.0),
            prefixes=0,
            conflicts="keep",
            memory=MEMORY,
        )


_GPT2, _LLAMA = ("gpt2", 12, 768, 3072, 12, 12, 50257), ("llama", 16, 512, 1408, 8, 8, 32000)
_LLAMA3 = ("llama", 32, 4096, 14336, 32, 8, 128256)
SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("gpt2-small", *_GPT2, (3, 4, 5, 6, 7), learning_rate=0.5, moment_weight=20000.0, std=0.05),
        Shape("llama-16", *_LLAMA, (4, 5, 6, 7, 8), learning_rate=0.1, moment_weight=15000.0, std=0.05),
        Shape("llama-3-8b", *_LLAMA3, (4, 5, 6, 7, 8), 0.1, moment_weight=15000.0, std=0.02, dtype="bfloat16"),
        Shape("tiny-gpt2", "gpt2", 4, 32, 96, 2, 2, 2048, (1, 2), learning_rate=0.1, moment_weight=20.0, std=0.1, steps=6),
        Shape("tiny-llama", "llama", 4, 32, 80, 4, 2, 2048, (1, 2), learning_rate=0.1, moment_weight=20.0, std=0.1, steps=6),
    )
}

LENGTHS: Mapping[str, tuple[int, ...]] = {
    "before": (7991, 219, 118, 699, 818, 59, 96),
    "subject": (0, 203, 1290, 2583, 2457, 1642, 920, 446, 213, 116, 58, 36, 14, 9, 7, 4, 1, 0, 1),
    "after": (0, 1558, 1826, 3152, 1491, 1538, 364, 71),
}
"""How many of 10,000 CounterFact records (arXiv 2202.05262) have 0, 1, 2 ... tokens, as GPT-2's tokenizer cuts them, before
the subject, in it, and between it and the target. The target is one token in all of them."""

PREFIXES, PREFIX_WORDS = 5, 9  # and a full stop: ten tokens, as published
N_WORDS = 400
MOMENT_TOKENS = 4096
MEMORY = 0.25
"""GiB that target values may take beside the model: half the default. A CPU is no slower for it, and peaks are lower."""
END = "<|endoftext|>"


@dataclass(frozen=True)
class Problem:
    """A problem as it lies in its folder."""

    folder: Path
    shape: Shape
    seed: int
    requests: tuple[EditRequest, ...]
    prefixes: tuple[str, ...]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def moments(self) -> dict[int, np.ndarray]:
        """Layer -> C0 [k, k] in float32, as published files hold it."""
        return {layer: np.load(_moment_file(self.folder, layer)) for layer in self.shape.layers}


def prepare(folder: Path, shape: Shape, count: int, seed: int) -> None:
    """Write a problem with `count` requests; to be run in a process whose memory is not measured."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    words = _words(rng)
    tokenizer = _tokenizer(words)
    tokenizer.save_pretrained(folder / "checkpoint")
    torch.manual_seed(seed)
    stored = torch.float32 if shape.dtype == "float64" else getattr(torch, shape.dtype)
    _torch_model(shape).to(stored).save_pretrained(folder / "checkpoint")
    prefixes = [" ".join(rng.choices(words, k=PREFIX_WORDS)) + ". " for _ in range(PREFIXES)]
    requests = [_request(rng, words, number) for number in range(count)]
    model, fast = load(folder / "checkpoint")
    texts = [" ".join(rng.choices(words, k=128)) for _ in range(MOMENT_TOKENS // 128)]
    found = compute_moments(model, fast, texts, shape.layers)
    for layer, moment in found.by_layer.items():
        np.save(_moment_file(folder, layer), _regular(moment))
    about = {
        "shape": dataclasses.asdict(shape),
        "seed": seed,
        "prefixes": prefixes,
        "requests": [r.to_dict() for r in requests],
    }
    (folder / "problem.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def read(folder: Path) -> Problem:
    """The problem that `prepare` wrote."""
    about = json.loads((folder / "problem.json").read_text(encoding="utf-8"))
    shape = Shape(**{**about["shape"], "layers": tuple(about["shape"]["layers"])})
    requests = tuple(EditRequest(**request) for request in about["requests"])
    return Problem(folder, shape, about["seed"], requests, tuple(about["prefixes"]))


def start(problem: Problem) -> EditSession:
    """The library's session on a problem, before any edit."""
    model, tokenizer = load(problem.checkpoint, dtype=problem.shape.dtype)
    by_layer = {layer: moment.astype(np.float64) for layer, moment in problem.moments().items()}
    moments = Moments(by_layer, MOMENT_TOKENS, model_fingerprint(model), "generated", str(model.dtype))
    session = start_session(model, tokenizer, moments, problem.shape.settings())
    return dataclasses.replace(session, prefixes=problem.prefixes)


def _moment_file(folder: Path, layer: int) -> Path:
    return folder / f"moment-{layer}.npy"


def _regular(moment: np.ndarray) -> np.ndarray:
    """A tenth of its mean eigenvalue on the diagonal: 4,096 tokens do not fill a moment of thousands of keys."""
    size = len(moment)
    return (0.9 * moment + 0.1 * np.trace(moment) / size * np.eye(size)).astype(np.float32)


def _words(rng: random.Random) -> list[str]:
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    return sorted({"".join(rng.choices(syllables, k=3)) for _ in range(2 * N_WORDS)})[:N_WORDS]


def _tokenizer(words: list[str]) -> Any:
    """Byte-level BPE as GPT-2's, in which every word is one token, at the start of a text, too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([END, *alphabet])}
    merges = []
    for word in words:
        left = "Ġ"  # byte-level BPE's space; every merge lengthens a word from its left end, so that none can interfere
        for letter in word:
            if left + letter not in vocabulary:
                merges.append((left, letter))
                vocabulary[left + letter] = len(vocabulary)
            left += letter
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END, add_prefix_space=True)


def _request(rng: random.Random, words: list[str], number: int) -> EditRequest:
    """A fact of random words; subject and prompt have CounterFact's lengths."""
    before, subject, after = (rng.choices(words, k=_draw(rng, LENGTHS[part])) for part in ("before", "subject", "after"))
    return EditRequest(" ".join([*before, "{}", *after]), " ".join(subject), rng.choice(words), id=f"fact-{number}")


def _draw(rng: random.Random, counts: tuple[int, ...]) -> int:
    return rng.choices(range(len(counts)), counts)[0]


def _torch_model(shape: Shape) -> Any:
    import torch
    import transformers

    shared = {"vocab_size": shape.vocab_size, "initializer_range": shape.std, "bos_token_id": None, "eos_token_id": 0}
    if shape.family == "gpt2":
        config = transformers.GPT2Config(
            n_layer=shape.n_layers, n_embd=shape.d_model, n_inner=shape.d_ff, n_head=shape.n_heads, **shared
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        num_hidden_layers=shape.n_layers,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        **shared,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for block in model.model.layers:  # what GPT2LMHeadModel does by itself: no block drowns what those below it say
            for residual in (block.self_attn.o_proj, block.mlp.down_proj):
                residual.weight.div_((2 * shape.n_layers) ** 0.5)
    return model
