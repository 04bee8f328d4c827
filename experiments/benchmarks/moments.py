"""Second moments of five layers: one pass per layer as published, against one pass for all of them.

The published procedure, written here in torch from its description: for each layer, documents in groups of 100 are sorted
by length and padded into batches of at most 3,072 tokens; a forward pass stops at the layer's down projection, and float32
products of the real tokens' keys are added up. Both read the same weights and the same rows of tokens, and run in turn in
this process: hold it to one core. CPU seconds, compilation apart.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers

from kedit_jax.editing.moments import Moments, compute_moments
from kedit_jax.models import load_model

GROUP, BATCH_TOKENS = 100, 3 * 1024  # of the published procedure
MEDIAN, SPREAD, LONGEST = 80, 0.8, 512  # tokens of a document: log-normal, like paragraphs of an encyclopaedia
TOLERANCE = 1e-4  # relative; the published sums are float32
VOCABULARY = 5000


@dataclass(frozen=True)
class Shape:
    """A model with random weights, and the layers whose moments are asked for.

    Attributes:
        build: makes the torch model.
        blocks, down: paths of its blocks, and of a block's down projection.
    """

    build: Callable[[], Any]
    blocks: str
    down: str
    layers: tuple[int, ...]


def gpt2(layers: int, width: int, heads: int) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_layer=layers, n_embd=width, n_head=heads, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama(layers: int, width: int, heads: int, inner: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=inner,
    )
    return transformers.LlamaForCausalLM(config)


SHAPES = {
    "gpt2-small": Shape(lambda: gpt2(12, 768, 12), "transformer.h", "mlp.c_proj", (3, 4, 5, 6, 7)),
    "llama-16": Shape(lambda: llama(16, 512, 8, 1408), "model.layers", "mlp.down_proj", (4, 5, 6, 7, 8)),
}
QUICK_SHAPES = {
    "tiny-gpt2": Shape(lambda: gpt2(4, 32, 2), "transformer.h", "mlp.c_proj", (1, 2, 3)),
    "tiny-llama": Shape(lambda: llama(4, 32, 2, 96), "model.layers", "mlp.down_proj", (1, 2, 3)),
}


def measure(*, quick: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Both procedures on every shape, in turn."""
    shapes, tokens, pairs = (QUICK_SHAPES, 2000, 2) if quick else (SHAPES, 9000, 3)
    documents = make_documents(tokens)
    return {
        "tokens": sum(map(len, documents)),
        "published_padding": 1 - sum(map(len, documents)) / sum(tokens.numel() for tokens, _ in padded(documents)),
        "documents": {"count": len(documents), "median": statistics.median(map(len, documents)), "longest": LONGEST},
        "cores": sorted(os.sched_getaffinity(0)),
        "tolerance": TOLERANCE,
        "shapes": {name: compare(name, shape, documents, pairs, report) for name, shape in shapes.items()},
    }


def compare(
    name: str, shape: Shape, documents: list[list[int]], pairs: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """CPU seconds of each procedure on one shape, their ratios, and how far the results are apart."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    oracle = shape.build().eval()
    with tempfile.TemporaryDirectory() as folder:
        oracle.save_pretrained(folder)
        model = load_model(folder)
    ours_seconds, published_seconds = [], []

    def ours() -> Moments:
        texts = [str(number) for number in range(len(documents))]
        return compute_moments(model, Documents(documents), texts, shape.layers, max_tokens=float("inf"))

    report(f"{name}: compiling")
    begin = time.process_time()
    found = ours()
    first = time.process_time() - begin
    expected: dict[int, np.ndarray] = {}
    for pair in range(pairs):
        report(f"{name}: pair {pair + 1} of {pairs}")
        begin = time.process_time()
        expected = {layer: published(oracle, shape, documents, layer) for layer in shape.layers}
        published_seconds.append(time.process_time() - begin)
        begin = time.process_time()
        found = ours()
        ours_seconds.append(time.process_time() - begin)
    ratios = [there / here for there, here in zip(published_seconds, ours_seconds, strict=True)]
    difference = max(
        float(np.linalg.norm(found.by_layer[layer] - c0) / np.linalg.norm(c0)) for layer, c0 in expected.items()
    )
    return {
        "layers": shape.layers,
        "published_cpu_seconds": published_seconds,
        "ours_cpu_seconds": ours_seconds,
        "compilation_cpu_seconds": first - statistics.median(ours_seconds),
        "ratio": statistics.median(ratios),
        "difference": difference,
        "agree": difference <= TOLERANCE,
        "estimated_error": dict(found.errors),
    }


def make_documents(tokens: int) -> list[list[int]]:
    """Random tokens in documents of random length."""
    rng = np.random.default_rng(0)
    made: list[list[int]] = []
    while sum(map(len, made)) < tokens:
        length = int(np.clip(rng.lognormal(np.log(MEDIAN), SPREAD), 8, LONGEST))
        made.append(rng.integers(0, VOCABULARY, length).tolist())
    return made


class Documents:
    """Stands in for a tokenizer: a text is the number of its document."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents = documents

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.documents[int(text)] for text in texts]}


class StopForward(Exception):  # noqa: N818, no error
    """Ends a forward pass at the module that is watched."""


@torch.no_grad()
def published(oracle: Any, shape: Shape, documents: list[list[int]], layer: int) -> np.ndarray:
    """C0 of one layer by its own pass over the corpus."""
    down = oracle.get_submodule(f"{shape.blocks}.{layer}.{shape.down}")
    seen: list[torch.Tensor] = []

    def stop(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise StopForward

    total, count = 0.0, 0
    handle = down.register_forward_pre_hook(stop)
    for tokens, mask in padded(documents):
        try:
            oracle(input_ids=tokens, attention_mask=mask, use_cache=False)
        except StopForward:
            keys = seen.pop()[mask.bool()]
            total, count = total + keys.T @ keys, count + len(keys)
    handle.remove()
    return (total / count).double().numpy()


def padded(documents: list[list[int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of a group's documents, longest first, padded on the right."""
    left = iter(documents)
    while group := sorted(islice(left, GROUP), key=len, reverse=True):
        while group:
            width = len(group[0])
            batch, group = group[: BATCH_TOKENS // width], group[BATCH_TOKENS // width :]
            tokens, mask = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width, dtype=torch.long)
            for i, row in enumerate(batch):
                tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
            yield tokens, mask


def plot(result: dict[str, Any], folder: Path) -> None:
    """Bars of CPU milliseconds a token, with the ratio above."""
    fig, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for place, found in enumerate(result["shapes"].values()):
        for offset, which, colour in ((-0.2, "published", "tab:gray"), (0.2, "ours", "tab:blue")):
            height = 1000 * statistics.median(found[f"{which}_cpu_seconds"]) / result["tokens"]
            axes.bar(place + offset, height, 0.38, color=colour, label=which if place == 0 else None)
        axes.text(place + 0.2, height, f"{found['ratio']:.1f}x", ha="center", va="bottom")
    axes.set_xticks(range(len(result["shapes"])), list(result["shapes"]))
    axes.set_ylabel("CPU ms a token, one core")
    axes.set_title("second moments of five layers")
    axes.legend()
    fig.savefig(folder / "moments.png", dpi=150)
    plt.close(fig)
