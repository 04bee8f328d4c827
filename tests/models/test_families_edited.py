"""Every family end to end on its tiny checkpoint: scores against torch whatever the padding, and an edit that arrives."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle_models import BOS, ONE_A_FAMILY
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kedit_jax.editing.moments import compute_moments
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, equivalence_error, start_session
from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.values import ValueSettings
from kedit_jax.errors import SessionError
from kedit_jax.evaluation import prepare_pairs, score_pairs
from kedit_jax.models import Decoder, causal_mask, positions_of

WORDS = [
    *("Ada", "Bob", "Carol", "was", "born", "in", "plays", "the", "cello", "violin", "Rome", "Oslo", "Lima"),
    *("old", "new", "house", "of", "stands", "and", "people", "speak"),
]
PAIRS = [
    ("Ada was born in", "Rome"),
    ("the old house of Bob stands in", "new Oslo"),
    ("Carol plays", "the cello and the violin"),
]
TEXTS = [" ".join(np.random.default_rng(seed).permutation(WORDS)) for seed in range(24)]
LAYER = 1


def tokenizer(side: str) -> Any:
    """A word a token, a BOS before every text; `side` is where the tokenizer would pad."""
    vocabulary = {"<pad>": 1, "<bos>": BOS, "<eos>": 4} | {word: 5 + i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, padding_side=side, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def torch_nll(oracle: Any, prompt: str, target: str) -> float:
    """Mean negative log-likelihood of the target, the text alone in its row."""
    ids = tokenizer("right")(f"{prompt} {target}")["input_ids"]
    assert ids[0] == BOS
    with torch.no_grad():
        logits = oracle(torch.tensor([ids])).logits[0].double()
    count = len(target.split())
    chosen = torch.log_softmax(logits[:-1], -1)[range(len(ids) - 1), ids[1:]]
    return float(-chosen[-count:].mean())


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_scores_are_torchs_on_either_padding_side(pairs: dict[str, Any], name: str) -> None:
    """The tokenizer's side is ignored by construction (it is never asked to pad); that scores are torch's can fail."""
    pair = pairs[name]
    scores = {side: score_pairs(pair.model, prepare_pairs(PAIRS, tokenizer(side))).nll for side in ("left", "right")}
    np.testing.assert_array_equal(scores["left"], scores["right"])
    expected = [torch_nll(pair.oracle, *texts) for texts in PAIRS]
    np.testing.assert_allclose(scores["left"], expected, rtol=0, atol=1e-4)
    assert np.abs(np.diff(expected)).min() > 1e-2, "the pairs differ, so that a mix-up would show"


def begin(model: Decoder, side: str = "left") -> EditSession:
    """Equality constraints on one layer: what was optimised has to come out exactly."""
    settings = EditSettings(
        layers=(LAYER,), editor="emmet", ridge=0.1, prefixes=0, values=ValueSettings(steps=6, learning_rate=0.3)
    )
    moments = compute_moments(model, tokenizer(side), TEXTS, (LAYER,), row_tokens=32, batch_tokens=256)
    return start_session(model, tokenizer(side), moments, settings)


REQUESTS = [EditRequest("{} was born in", "Ada", "old Lima"), EditRequest("the house of {} stands in", "Bob", "Oslo")]


@pytest.mark.parametrize("name", ["gpt-neox", "mistral", "qwen3", "phi3-longrope"])  # tests/editing has GPT-2 and Llama
def test_an_edit_arrives(pairs: dict[str, Any], name: str) -> None:
    """The edited layer puts out the optimised value at the subject's last token, and the targets become likelier."""
    model = pairs[name].model
    session, _ = begin(model).edit(REQUESTS)
    assert equivalence_error(session) < 1e-9
    assert session.reports is not None
    texts = [(request.text, request.target) for request in REQUESTS]
    before, after = (score_pairs(m, prepare_pairs(texts, tokenizer("left"))).nll for m in (model, session.model))
    assert (after < before).all()
    for request, z in zip(REQUESTS, session.reports.z, strict=True):
        out = output_at_subject(session.model, request)
        assert np.linalg.norm(out - z) < 1e-3 * np.linalg.norm(z)
        assert np.linalg.norm(output_at_subject(model, request) - z) > 1e-2 * np.linalg.norm(z)


def output_at_subject(model: Decoder, request: EditRequest) -> np.ndarray:
    """Of the edited layer, from a plain pass over the text up to the subject's end."""
    text = request.text[: request.text.index(request.subject) + len(request.subject)]
    tokens = jnp.asarray([tokenizer("right")(text)["input_ids"]])
    valid = jnp.ones(tokens.shape, bool)
    positions = positions_of(valid)
    run = jax.jit(
        lambda m: m.run_layers(m.embed(tokens, positions), 0, LAYER + 1, positions=positions, mask=causal_mask(valid))[0]
    )
    return np.asarray(run(model))[0, -1]


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_models_with_a_norm_behind_the_kernel_are_refused(pairs: dict[str, Any], name: str) -> None:
    with pytest.raises(SessionError, match="loaded, scored and run, but not edited"):
        begin(pairs[name].model)


def test_padding_side_changes_no_edit(pairs: dict[str, Any]) -> None:
    """By construction: the tokenizer is never asked to pad, and this fails only once something asks it to."""
    made = [begin(pairs["qwen2"].model, side).edit(REQUESTS)[0] for side in ("left", "right")]
    for left, right in zip(jax.tree.leaves(made[0].model), jax.tree.leaves(made[1].model), strict=True):
        np.testing.assert_array_equal(left, right)
    assert dataclasses.asdict(made[0].settings) == dataclasses.asdict(made[1].settings)
