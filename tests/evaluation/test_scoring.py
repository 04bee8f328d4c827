import string
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_world import plain_logits, plain_nll, random_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kedit_jax.errors import KeditError, NonFiniteError
from kedit_jax.evaluation import Pair, prepare_pairs, score_pairs
from kedit_jax.evaluation.batching import bucket, power_of_two
from kedit_jax.evaluation.packing import CANDIDATES
from kedit_jax.evaluation.scoring import _score_batch
from kedit_jax.models import Decoder, ModelConfig

PROMPTS = [
    "Ada Quill was born in",
    "Bram Osterly was born in",
    "Ada",
    "The home of Émile Ōta, who {was} a {} painter all his life, is",
    "Ada Quill was born in Oslo. Oslo is a town. Cora Vantongeren was born in",
]
TARGETS = ["Paris", "Rome", "Lima", "Oslo", "Port Royal", "Port Rogue", "New {x} Haven", "{}", "Ōsaka"]
PAIRS = [Pair(prompt, target) for prompt in PROMPTS for target in TARGETS]


def reference(model: Decoder, tokenizer: Any, pair: Pair, shift: int = 0) -> tuple[float, bool]:
    """One pair at a time in float64, unpadded, prompt and target encoded apart. A shift reads the wrong positions."""
    prompt, target = tokenizer(pair.prompt).input_ids, tokenizer(" " + pair.target).input_ids
    scored = slice(len(prompt) - 1 + shift, len(prompt) - 1 + len(target) + shift)
    correct = plain_logits(model, (prompt + target)[:-1])[scored].argmax(-1) == target
    return float(plain_nll(model, prompt + target)[scored].mean()), bool(correct.all())


@pytest.fixture(scope="module")
def references(model: Decoder, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    nll, correct = zip(*(reference(model, tokenizer, pair) for pair in PAIRS), strict=True)
    return np.array(nll), np.array(correct)


def tokens_of(tokenizer: Any, pairs: Any) -> set[tuple[int, ...]]:
    """Every distinct beginning of what the pairs need as input: the least that has to be computed."""
    rows = [tokenizer(f"{prompt} {target}").input_ids[:-1] for prompt, target in pairs]
    return {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}


def test_targets_have_one_and_several_tokens(tokenizer: Any) -> None:
    lengths = {target: len(tokenizer(" " + target).input_ids) for target in TARGETS}
    assert lengths["Paris"] == lengths["Rome"] == 1
    assert lengths["Port Royal"] >= 2
    assert max(lengths.values()) >= 5


def test_scores_equal_plain_reference(model: Decoder, tokenizer: Any, references: Any) -> None:
    scores = score_pairs(model, prepare_pairs(PAIRS, tokenizer))
    assert scores.nll.dtype == np.float64
    np.testing.assert_allclose(scores.nll, references[0], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(scores.correct, references[1])
    assert references[0].std() > 0.1  # the pairs differ by far more than the tolerance


def test_reference_notices_a_shift(model: Decoder, tokenizer: Any) -> None:
    """Negative control: positions off by one are not within the tolerance."""
    scores = score_pairs(model, prepare_pairs(PAIRS, tokenizer))
    wrong = [reference(model, tokenizer, pair, shift=-1)[0] for pair in PAIRS[::5] if pair.prompt != "Ada"]
    right = [nll for nll, pair in zip(scores.nll[::5], PAIRS[::5], strict=True) if pair.prompt != "Ada"]
    assert np.median(np.abs(np.subtract(wrong, right))) > 1e-2


def test_correct_is_the_argmax_of_every_token(model: Decoder, tokenizer: Any) -> None:
    """Greedy continuations of one and three tokens are correct; one wrong token among three is not."""
    prompt = "Ada Quill was born in"
    ids = tokenizer(prompt).input_ids
    for _ in range(3):
        ids = [*ids, int(plain_logits(model, ids)[-1].argmax())]
    n = len(ids) - 3
    rows = {"one": ids[: n + 1], "three": ids, "wrong": [*ids[: n + 1], (ids[n + 1] + 1) % 256, ids[n + 2]]}
    tokens = _FixedTokens(tokenizer, {f"{prompt} {name}": (row, n, len(prompt)) for name, row in rows.items()})
    scores = score_pairs(model, prepare_pairs([(prompt, name) for name in rows], tokens))
    assert scores.correct.tolist() == [True, True, False]


class _FixedTokens:
    """A tokenizer that gives chosen ids for chosen texts: greedy continuations need not survive encoding."""

    is_fast = True

    def __init__(self, tokenizer: Any, rows: dict[str, tuple[list[int], int, int]]) -> None:
        self.rows = rows

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[Any]]:
        chosen = [self.rows[text] for text in texts]
        offsets = [[(0, 1)] * n + [(end, end + 2)] * (len(row) - n) for row, n, end in chosen]
        return {"input_ids": [row for row, _, _ in chosen], "offset_mapping": offsets}


@pytest.mark.parametrize("batch_tokens", [1, 20])
def test_batching_changes_no_score(model: Decoder, tokenizer: Any, references: Any, batch_tokens: int) -> None:
    chosen = [i for i, pair in enumerate(PAIRS) if pair.prompt in PROMPTS[:2] and pair.target in TARGETS[:6]]
    prepared = prepare_pairs([PAIRS[i] for i in chosen], tokenizer, batch_tokens=batch_tokens)
    assert len(prepared.packed.batches) > 1
    scores = score_pairs(model, prepared)
    np.testing.assert_allclose(scores.nll, references[0][chosen], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(scores.correct, references[1][chosen])


def test_padding_changes_no_score(model: Decoder, tokenizer: Any) -> None:
    """A short pair beside one that pads it to the model's last position and past it."""
    short, long = Pair("Ada", "Rome"), Pair("Ada" + " was" * 68, "Lima")
    prepared = prepare_pairs([long, short], tokenizer)
    (batch,) = prepared.packed.batches
    assert 60 < prepared.packed.longest <= model.config.max_positions < batch.tokens.shape[1]
    expected = [reference(model, tokenizer, pair)[0] for pair in (long, short)]
    np.testing.assert_allclose(score_pairs(model, prepared).nll, expected, rtol=0, atol=1e-5)


def test_order_and_repetition(model: Decoder, tokenizer: Any, references: Any) -> None:
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(PAIRS)), 2))
    prepared = prepare_pairs([PAIRS[i] for i in order], tokenizer)
    assert prepared.packed.nodes == prepare_pairs(PAIRS, tokenizer).packed.nodes
    np.testing.assert_allclose(score_pairs(model, prepared).nll, references[0][order], rtol=0, atol=1e-5)


def test_every_beginning_is_computed_once(tokenizer: Any) -> None:
    packed, least = prepare_pairs(PAIRS, tokenizer).packed, len(tokens_of(tokenizer, PAIRS))
    assert least <= packed.nodes <= 1.1 * least  # a tree wider than the array is cut, its trunk repeated
    assert packed.nodes < 0.6 * sum(len(row) for row in {row for row, _, _ in packed.wanted})
    (batch,) = packed.batches
    used = np.count_nonzero(batch.positions.any(axis=1))
    assert packed.nodes > 0.7 * used * batch.tokens.shape[1]


def test_one_token_objects_add_nothing(tokenizer: Any) -> None:
    one, both = ([(prompt, target) for prompt in PROMPTS for target in targets] for targets in (["Rome"], ["Paris", "Rome"]))
    assert prepare_pairs(both, tokenizer).packed.nodes == prepare_pairs(one, tokenizer).packed.nodes


def test_rows_that_begin_other_rows_are_part_of_them(model: Decoder, tokenizer: Any) -> None:
    pairs = [Pair("Ada Quill", "was"), Pair("Ada Quill was born", "in"), Pair("Ada Quill was born in", "Port Royal")]
    prepared = prepare_pairs(pairs, tokenizer)
    assert prepared.packed.nodes == prepared.packed.longest
    expected = [reference(model, tokenizer, pair)[0] for pair in pairs]
    np.testing.assert_allclose(score_pairs(model, prepared).nll, expected, rtol=0, atol=1e-5)


def test_a_node_sees_its_own_beginning_alone(model: Decoder, tokenizer: Any, references: Any) -> None:
    """Negative control: were the whole row of the array before a node seen, scores would be others."""
    prepared = prepare_pairs(PAIRS, tokenizer)
    width = prepared.packed.batches[0].tokens.shape[1]
    causal = tuple(batch._replace(end=np.full_like(batch.end, width)) for batch in prepared.packed.batches)
    wrong = score_pairs(model, replace(prepared, packed=replace(prepared.packed, batches=causal)))
    assert np.median(np.abs(wrong.nll - references[0])) > 1e-2


def test_more_objects_than_a_slot_holds(model: Decoder, tokenizer: Any) -> None:
    """One prompt with 52 letters behind it is one row; a slot has room for a few of them."""
    pairs = [Pair("Ada Quill was born in", letter) for letter in string.ascii_letters]
    prepared = prepare_pairs(pairs, tokenizer)
    slots = np.unique(prepared.packed.place // CANDIDATES)
    assert len(slots) >= len(pairs) / CANDIDATES
    expected = [reference(model, tokenizer, pair)[0] for pair in pairs]
    np.testing.assert_allclose(score_pairs(model, prepared).nll, expected, rtol=0, atol=1e-5)


def test_special_tokens_belong_to_the_prompt(model: Decoder, tokenizer: Any) -> None:
    """A tokenizer that begins and ends texts with special tokens: the first is context, the last is not scored."""
    end = tokenizer.eos_token_id

    def wrapped(texts: list[str], **options: Any) -> dict[str, Any]:
        found = tokenizer(texts, **options)
        return {
            "input_ids": [[end, *ids, end] for ids in found["input_ids"]],
            "offset_mapping": [[(0, 0), *offsets, (0, 0)] for offsets in found["offset_mapping"]],
        }

    wrapped.is_fast = True  # type: ignore[attr-defined]
    (score,) = score_pairs(model, prepare_pairs([("Ada Quill was born in", "Port Royal")], wrapped)).nll
    expected, _ = reference(model, tokenizer, Pair("<end>Ada Quill was born in", "Port Royal"))
    without, _ = reference(model, tokenizer, Pair("Ada Quill was born in", "Port Royal"))
    assert abs(score - expected) <= 1e-5
    assert abs(score - without) > 1e-3


def test_one_program_and_none_for_edited_weights(config: ModelConfig, tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    words = np.array(["Ada", "Quill", "Bram", "Osterly", "was", "born", "in", "Oslo", "is", "a", "town", "The"])
    prompts = [" ".join(rng.choice(words, rng.integers(2, 8))) for _ in range(1000)]
    prepared = prepare_pairs([(prompt, target) for prompt in prompts for target in ("Rome", "Port Royal")], tokenizer)
    assert len(prepared.pairs) == 2000
    assert len(prepared.packed.batches) > 4
    _score_batch.clear_cache()
    first = score_pairs(random_model(config, seed=1), prepared)
    assert _score_batch._cache_size() == 1
    second = score_pairs(random_model(config, seed=2), prepared)
    assert _score_batch._cache_size() == 1
    assert np.abs(first.nll - second.nll).max() > 0.1  # the weights are not baked into the program


def test_buckets() -> None:
    padded = [bucket(length) for length in range(1, 513)]
    assert all(length <= size for length, size in enumerate(padded, start=1))
    assert all(size / length <= 1.25 for length, size in enumerate(padded, start=1) if length > 16)
    assert sorted(set(padded))[:9] == [4, 8, 12, 16, 20, 24, 28, 32, 40]
    assert len(set(padded)) == 24
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 8]


def test_nonfinite_scores_name_the_prompt(model: Decoder, tokenizer: Any) -> None:
    def spoil(leaf: Any) -> Any:
        """Infinite weights in one token's embedding: prompts with that token have no score."""
        return leaf.at[token].set(jnp.inf) if leaf.shape == (model.config.vocab_size, model.config.d_model) else leaf

    token = tokenizer(" Bram").input_ids[0]
    prepared = prepare_pairs([("Ada was", "Rome"), ("So Bram was", "Rome")], tokenizer)
    with pytest.raises(NonFiniteError, match=r"2 of 2 .*(?s:.*)'Ada was'.*(?s:.*)'So Bram was'"):
        score_pairs(jax.tree.map(spoil, model), prepared)


def test_nonfinite_scores_spoil_no_neighbour(model: Decoder, tokenizer: Any) -> None:
    """Rows stand side by side in one array, where a mask keeps no NaN out: 0 * NaN. Only the guilty prompt is named."""
    limit = tokenizer(" Bram").input_ids
    broken = jax.tree.map(lambda leaf: leaf, model)
    broken.position_embedding[...] = broken.position_embedding[...].at[6].set(jnp.nan)
    pairs = [("Ada was", "Rome"), ("So" + " was" * 8, "Rome"), ("The", "Lima")]
    assert len(limit) < 6 < len(tokenizer(pairs[1][0]).input_ids)
    prepared = prepare_pairs(pairs, tokenizer)
    assert len(prepared.packed.batches) == 1
    with pytest.raises(NonFiniteError, match="1 of 3 scores") as error:
        score_pairs(broken, prepared)
    assert "So was was" in str(error.value)
    assert "Ada" not in str(error.value)
    nll, _ = jax.device_get(_score_batch(broken, prepared.packed.batches[0]))
    assert not np.isfinite(nll.ravel()[prepared.packed.place]).all()


def test_unusable_pairs_are_listed(tokenizer: Any) -> None:
    with pytest.raises(KeditError, match=r"(?s)'Ada'.*'': the target is empty.*prompt ''.*: no token stands before"):
        prepare_pairs([("Ada", "Rome"), ("Ada", ""), ("", "Rome"), ("Ada", "  ")], tokenizer)


def test_token_across_the_boundary() -> None:
    tokens = _FixedTokens(None, {"Ada  Rome": ([1, 2], 1, 3)})
    with pytest.raises(KeditError, match="one token covers '  ', the end of the prompt and the beginning"):
        prepare_pairs([("Ada ", "Rome")], tokens)


def test_slow_tokenizer() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(KeditError, match="Slow gives no offsets; load a fast tokenizer"):
        prepare_pairs([("Ada", "Rome")], Slow())


def test_pairs_that_do_not_fit_the_model(model: Decoder, tokenizer: Any) -> None:
    limit = model.config.max_positions
    with pytest.raises(KeditError, match=rf"longest row has \d+ tokens, the model takes {limit}"):
        score_pairs(model, prepare_pairs([("Ada" * 60, "Rome")], tokenizer))
    tokens = _FixedTokens(None, {"Ada Rome": ([1, 9999], 1, 3)})
    with pytest.raises(KeditError, match="token 9999 is past the model's"):
        score_pairs(model, prepare_pairs([("Ada", "Rome")], tokens))


def test_no_pairs(model: Decoder, tokenizer: Any) -> None:
    assert score_pairs(model, prepare_pairs([], tokenizer)).nll.shape == (0,)


@pytest.mark.parametrize("space", ["kept", "dropped"])
def test_targets_that_tokenize_to_nothing(space: str) -> None:
    """A soft hyphen that the normaliser removes; the space before it may stay as a token of its own."""
    made = Tokenizer(models.WordLevel({"Ada": 0, "is": 1, "here": 2, "▁": 3}, unk_token="here"))
    made.normalizer = normalizers.Replace("\u00ad", "")
    split = pre_tokenizers.Split(" ", "isolated") if space == "kept" else pre_tokenizers.WhitespaceSplit()
    made.pre_tokenizer = pre_tokenizers.Sequence([split])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    with pytest.raises(KeditError, match=r"target '\\xad': the target has no tokens; use text the tokenizer knows"):
        prepare_pairs([("Ada is", "\u00ad")], tokenizer)
    packed = prepare_pairs([("Ada is", "here\u00ad")], tokenizer).packed
    assert len(packed.place) == (2 if space == "kept" else 1)
