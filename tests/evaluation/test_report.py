import io
import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_world import plain_nll, random_model
from rich.console import Console

from kedit_jax.errors import KeditError, NonFiniteError
from kedit_jax.evaluation import Evaluation, Fact, Record, RecordError, evaluate, perplexity, prepare, prepare_texts, table
from kedit_jax.evaluation.scoring import _score_batch
from kedit_jax.models import Decoder, ModelConfig

HELDOUT = ["Ada Quill was born in Oslo.", "Cora saw Rome, a town."]


@pytest.fixture(scope="module")
def evaluation(model: Decoder, tokenizer: Any, records: list[Record]) -> Evaluation:
    heldout = prepare_texts(HELDOUT, tokenizer, max_length=70)
    return evaluate(model, prepare(records, tokenizer), heldout=heldout, first=3)


def plain_shares(model: Decoder, tokenizer: Any, record: Record) -> tuple[float, float, float]:
    """Efficacy, generalization and specificity of one record, pair by pair."""

    def nll(prompt: str, target: str) -> float:
        before, after = tokenizer(prompt).input_ids, tokenizer(" " + target).input_ids
        return float(plain_nll(model, before + after)[len(before) - 1 :].mean())

    def new_wins(prompt: str) -> bool:
        return nll(prompt, record.target_new) < nll(prompt, record.target_true)

    return (
        float(new_wins(record.prompt.replace("{}", record.subject))),
        float(np.mean([new_wins(prompt) for prompt in record.paraphrase_prompts])),
        float(np.mean([not new_wins(prompt) for prompt in record.neighborhood_prompts])),
    )


def test_equals_plain_evaluation(model: Decoder, tokenizer: Any, records: list[Record], evaluation: Evaluation) -> None:
    shares = np.array([plain_shares(model, tokenizer, record) for record in records])
    expected = 100 * shares.mean(0)
    assert [evaluation.efficacy, evaluation.generalization, evaluation.specificity] == pytest.approx(expected)
    assert evaluation.retention == pytest.approx(100 * shares[:3, 0].mean())
    rows = evaluation.details.rows()
    assert [row["case_id"] for row in rows] == [record.case_id for record in records]
    assert [row["specificity"] for row in rows] == pytest.approx(shares[:, 2])
    assert 0 < evaluation.efficacy < 100  # neither measure is trivial here
    assert 0 < evaluation.specificity < 100


def test_swapping_the_objects_gives_the_complement(
    model: Decoder, tokenizer: Any, records: list[Record], evaluation: Evaluation
) -> None:
    """Negative control: a record that asks for what the model says already."""
    swapped = [replace(record, target_new=record.target_true, target_true=record.target_new) for record in records]
    found = evaluate(model, prepare(swapped, tokenizer))
    for name in ("efficacy", "generalization", "specificity"):
        assert getattr(found, name) == pytest.approx(100 - getattr(evaluation, name))
    assert found.perplexity is None


def test_to_dict(model: Decoder, tokenizer: Any, evaluation: Evaluation) -> None:
    found = json.loads(json.dumps(evaluation.to_dict()))
    assert set(found) == {
        "efficacy", "generalization", "specificity", "score", "efficacy_accuracy", "generalization_accuracy",
        "specificity_accuracy", "same_subject_accuracy", "retention", "retention_accuracy", "perplexity", "n",
    }  # fmt: skip
    assert found["n"] == 10
    assert found["perplexity"] == perplexity(model, prepare_texts(HELDOUT, tokenizer, max_length=70))


def test_editing_moves_the_measures(model: Decoder, tokenizer: Any, records: list[Record]) -> None:
    """A model that always says one object has full efficacy for it, and none of the specificity."""
    chosen = [replace(record, target_new="Lima", target_true="Oslo") for record in records]
    token = tokenizer(" Lima").input_ids
    assert len(token) == 1
    final = model.final_norm.bias[...] + 100 * model.embedding[...][token[0]]
    biased = jax.tree_util.tree_map_with_path(
        lambda path, leaf: final if "final_norm" in str(path) and "bias" in str(path) else leaf, model
    )
    found = evaluate(biased, prepare(chosen, tokenizer))
    assert (found.efficacy, found.generalization, found.efficacy_accuracy) == (100, 100, 100)
    assert (found.specificity, found.specificity_accuracy, found.score) == (0, 0, 0)
    assert found.same_subject_accuracy == 100  # its object is Lima too


def test_another_model_compiles_nothing(config: ModelConfig, tokenizer: Any, records: list[Record]) -> None:
    prepared = prepare(records, tokenizer)
    evaluate(random_model(config, seed=1), prepared)
    compiled = _score_batch._cache_size()
    evaluate(random_model(config, seed=2), prepared)
    assert _score_batch._cache_size() == compiled


def test_nan_is_an_error_not_a_percentage(model: Decoder, tokenizer: Any, records: list[Record]) -> None:
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), model)
    with pytest.raises(NonFiniteError, match="prompt 'Ada Quill was born in', target 'Port Royal': NLL nan"):
        evaluate(broken, prepare(records, tokenizer))


def test_no_records(tokenizer: Any) -> None:
    with pytest.raises(RecordError, match="there are no records"):
        prepare([], tokenizer)


def test_records_without_some_prompts(model: Decoder, tokenizer: Any, records: list[Record]) -> None:
    bare = [replace(record, neighborhood_prompts=(), same_subject=()) for record in records]
    found = evaluate(model, prepare(bare, tokenizer))
    assert (found.specificity, found.score, found.same_subject_accuracy) == (None, None, None)
    assert {row["specificity"] for row in found.details.rows()} == {None}
    assert "-" in rendered({"unedited": found})


def test_records_without_a_true_object(
    model: Decoder, tokenizer: Any, records: list[Record], evaluation: Evaluation
) -> None:
    """What needs the true object is None; exact match is what it was, for a neighbour of its own object."""
    facts = [tuple(Fact(prompt, str(record.target_true)) for prompt in record.neighborhood_prompts) for record in records]
    bare = [
        replace(record, target_true=None, neighborhood_prompts=(), neighborhood_facts=own)
        for record, own in zip(records, facts, strict=True)
    ]
    found = evaluate(model, prepare(bare, tokenizer))
    assert {found.efficacy, found.generalization, found.specificity, found.score, found.retention} == {None}
    for name in ("efficacy", "generalization", "specificity", "same_subject", "retention"):
        assert getattr(found, f"{name}_accuracy") == getattr(evaluation, f"{name}_accuracy")
    mixed = evaluate(model, prepare([*records[:5], *bare[5:]], tokenizer))
    assert mixed.efficacy == evaluate(model, prepare(records[:5], tokenizer)).efficacy
    assert mixed.efficacy_accuracy == evaluation.efficacy_accuracy
    assert "-" in rendered({"unedited": found})


def rendered(rows: dict[str, Evaluation]) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(rows, title="an edit"))
    return console.export_text()


def test_table_begins_with_the_unedited_model(evaluation: Evaluation) -> None:
    text = rendered({"edited": replace(evaluation, efficacy=99.0), "unedited": evaluation})
    lines = text.splitlines()
    first, second = (next(i for i, line in enumerate(lines) if line.startswith(name)) for name in ("unedited", "edited"))
    assert first < second
    assert "99.0" in lines[second]
    assert "an edit" in text


def test_table_needs_the_unedited_model(evaluation: Evaluation) -> None:
    with pytest.raises(KeditError, match=r"\['edited'\] lack 'unedited'"):
        table({"edited": evaluation})
