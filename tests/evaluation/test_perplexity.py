from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_world import plain_nll, random_model

from kedit_jax.errors import KeditError, NonFiniteError
from kedit_jax.evaluation import perplexity, prepare_texts
from kedit_jax.evaluation.scoring import _score_batch
from kedit_jax.models import Decoder, ModelConfig

TEXTS = ["Ada Quill was born in Oslo.", "A", "Cora saw Rome, a town. " * 4, "Émile {} was born in Port Royal " * 2, ""]


def reference(model: Decoder, tokenizer: Any, texts: list[str], max_length: int) -> float:
    """One window at a time in float64."""
    nlls: list[float] = []
    for text in texts:
        ids = tokenizer(text).input_ids
        for start in range(0, max(0, len(ids) - 1), max_length):
            nlls += plain_nll(model, ids[start : start + max_length + 1]).tolist()
    return float(np.exp(np.mean(nlls)))


@pytest.mark.parametrize("max_length", [70, 7])
def test_equals_plain_reference(model: Decoder, tokenizer: Any, max_length: int) -> None:
    prepared = prepare_texts(TEXTS, tokenizer, max_length=max_length)
    expected = reference(model, tokenizer, TEXTS, max_length)
    assert perplexity(model, prepared) == pytest.approx(expected, rel=1e-5)
    assert prepared.packed.longest <= max_length
    assert prepared.n_tokens == sum(max(0, len(tokenizer(text).input_ids) - 1) for text in TEXTS)


def test_weighs_tokens_not_texts(model: Decoder, tokenizer: Any) -> None:
    """Negative control: the mean of the texts' own perplexities is something else."""
    together = reference(model, tokenizer, TEXTS, 70)
    apart = np.mean([reference(model, tokenizer, [text], 70) for text in (TEXTS[0], TEXTS[2], TEXTS[3])])
    assert abs(together - apart) > 1e-3 * together


def test_batching_changes_nothing(model: Decoder, tokenizer: Any) -> None:
    texts = [*(f"{n} {text}" for n in range(9) for text in TEXTS[:2]), TEXTS[2]]
    prepared = prepare_texts(texts, tokenizer, max_length=20, batch_tokens=20)
    assert len(prepared.packed.batches) > 2
    assert perplexity(model, prepared) == pytest.approx(reference(model, tokenizer, texts, 20), rel=1e-5)


def test_texts_said_twice_count_twice(model: Decoder, tokenizer: Any) -> None:
    texts = [*TEXTS, TEXTS[0], TEXTS[0]]
    prepared = prepare_texts(texts, tokenizer, max_length=70)
    assert prepared.packed.nodes == prepare_texts(TEXTS, tokenizer, max_length=70).packed.nodes
    assert perplexity(model, prepared) == pytest.approx(reference(model, tokenizer, texts, 70), rel=1e-5)


def test_one_program_and_none_for_edited_weights(config: ModelConfig, tokenizer: Any) -> None:
    texts = [f"{number} " + "Ada was born in " * (1 + number % 4) for number in range(240)]
    prepared = prepare_texts(texts, tokenizer, max_length=32)
    assert len(prepared.packed.batches) > 2
    _score_batch.clear_cache()
    first = perplexity(random_model(config, seed=1), prepared)
    second = perplexity(random_model(config, seed=2), prepared)
    assert _score_batch._cache_size() == 1
    assert first != pytest.approx(second, rel=1e-2)


def test_texts_fill_the_arrays(tokenizer: Any) -> None:
    """Lengths that leave half of the narrowest array empty are laid side by side in a wider one."""
    prepared = prepare_texts([f"{number} " + "was " * 35 for number in range(100)], tokenizer, max_length=70)
    filled = prepared.packed.nodes / sum(batch.tokens.size for batch in prepared.packed.batches)
    assert 32 < prepared.packed.longest < 40
    assert filled > 0.8


def test_nonfinite_scores_name_the_text(model: Decoder, tokenizer: Any) -> None:
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), model)
    with pytest.raises(NonFiniteError, match=r"1 of 2 held-out texts.*(?s:.*)text 2 'Ada was born'"):
        perplexity(broken, prepare_texts(["A", "Ada was born"], tokenizer, max_length=70))


def test_bad_input(model: Decoder, tokenizer: Any) -> None:
    with pytest.raises(KeditError, match="max_length=0"):
        prepare_texts(TEXTS, tokenizer, max_length=0)
    with pytest.raises(KeditError, match="none of the 2 held-out texts has two tokens"):
        prepare_texts(["A", ""], tokenizer, max_length=8)
    with pytest.raises(KeditError, match="none of the 0 held-out texts"):
        prepare_texts([], tokenizer, max_length=8)
    with pytest.raises(KeditError, match="the model takes 70; give prepare_texts a smaller max_length"):
        perplexity(model, prepare_texts(["Ada " * 99], tokenizer, max_length=71))
