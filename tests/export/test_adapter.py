"""LoRA adapters: what peft makes of the files is the edited model, and what truncation costs is known before."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from export_world import LAYERS, RANKS, TOLERANCE, jax_logits, prompts, read_json, snapshot, torch_logits, torch_model
from safetensors.numpy import load_file

from kedit_jax.delta import Dense, EditDelta, LowRank, apply_edits, relative_error
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import ExportError, KeditError, NonFiniteError
from kedit_jax.evaluation import PairScores, prepare_pairs, score_pairs
from kedit_jax.export import VLLM_RANKS, AdapterPlan, delta_of, efficacy_of, export_adapter, export_merged, plan_adapter
from kedit_jax.export.staging import MANIFEST
from kedit_jax.models import down_kernel_address, save_model


def with_adapter(base: Any, folder: Path) -> Any:
    """As a user of peft loads it; warnings of missing or unexpected weights fail the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(base, folder).eval()


def adapted(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def test_peft_loads_the_edited_model(family, tmp_path, record_property):
    plan = plan_adapter(family.edited)
    assert plan.exact
    assert plan.rank == VLLM_RANKS[0]
    export_adapter(plan, tmp_path / "adapter", base_model=family.directory)
    tokens = prompts(family.model)
    expected = jax_logits(family.edited_model, tokens)
    loaded = with_adapter(torch_model(family.directory), tmp_path / "adapter")
    difference = np.abs(torch_logits(loaded, tokens) - expected).max()
    record_property("logits", float(difference))
    assert difference <= TOLERANCE
    assert [int(name.rsplit(".", 3)[1]) for name in adapted(loaded)] == list(LAYERS), "no other module is touched"
    with loaded.disable_adapter():
        assert np.abs(torch_logits(loaded, tokens) - expected).max() > 1e-2, "the edits show"
    assert np.abs(torch_logits(loaded.merge_and_unload(), tokens) - expected).max() <= TOLERANCE


def test_peft_finds_the_base_model(gpt2, tmp_path):
    export_adapter(plan_adapter(gpt2.edited), tmp_path, base_model=gpt2.directory)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = prompts(gpt2.model)
    assert np.abs(torch_logits(loaded.eval(), tokens) - jax_logits(gpt2.edited_model, tokens)).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "module", "transposed"),
    [
        ("gpt2", "mlp.c_proj", True),  # its attention has a c_proj, too
        ("gptj", "fc_out", False),
        ("gpt-neox", "dense_4h_to_h", False),
        ("llama-3.1", "down_proj", False),
        ("phi3", "down_proj", False),
    ],
)
def test_configuration(checkpoint, tmp_path, name, module, transposed):
    given = checkpoint(name)
    export_adapter(plan_adapter(given.edited, 5), tmp_path / "adapter", base_model="hub/model")
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert config["target_modules"] == [module]
    assert config["fan_in_fan_out"] is transposed
    assert config["layers_to_transform"] == list(LAYERS)
    assert config["r"] == config["lora_alpha"] == 5
    assert config["base_model_name_or_path"] == "hub/model"
    known = peft.LoraConfig.from_pretrained(tmp_path / "adapter").to_dict()
    assert set(config) <= set(known)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(LAYERS)
    for (tensor, array), rank in zip(sorted(tensors.items()), [rank for rank in RANKS for _ in "AB"], strict=True):
        padding = array[rank:] if "lora_A" in tensor else array[:, rank:]
        assert array.dtype == np.float32
        assert padding.size
        assert not padding.any(), "zeros behind the update's own rank"


def test_an_exact_adapter_has_the_error_of_float32(family):
    plan = plan_adapter(family.edited, 3)
    assert plan.exact
    assert dict(plan.needed) == dict(zip(LAYERS, RANKS, strict=True))
    assert max(plan.errors.values()) < 1e-7
    assert relative_error(plan.delta, family.edited.delta) < 1e-7
    assert not plan_adapter(family.edited, 2).exact


@pytest.mark.parametrize("form", [Dense, LowRank])
def test_truncation_is_the_best_of_its_rank(gpt2, form):
    """Eckart and Young: what is lost is the rest of the singular values, from whichever form."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(45, 20)), rng.normal(size=(20, 35)) * np.logspace(0, -3, 20)[:, None]
    update = LowRank(left, right) if form is LowRank else Dense(left @ right)
    edited = delta_of(gpt2.model, EditDelta({down_kernel_address(1): update}))
    values = np.linalg.svd(left @ right, compute_uv=False)
    for rank in (1, 7, 19, 20, 64):
        plan = plan_adapter(edited, rank)
        expected = np.linalg.norm(values[rank:20]) / np.linalg.norm(values)
        assert plan.errors[1] == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert plan.exact is (rank >= 20)
        assert plan.needed == {1: 20}
        kept = plan.factors[down_kernel_address(1)]
        assert (kept.left.shape, kept.right.shape) == ((45, rank), (rank, 35))
    assert plan_adapter(edited).rank == 32
    assert plan_adapter(edited, error=0.5 * (plan.choices[8] + plan.choices[16])).rank == 16
    assert plan.choices[8] == pytest.approx(np.linalg.norm(values[8:20]) / np.linalg.norm(values))


def test_a_rank_must_be_named_where_none_is_exact(gpt2, monkeypatch):
    from kedit_jax.export import adapter

    monkeypatch.setattr(adapter, "VLLM_RANKS", (1, 2))
    with pytest.raises(ExportError, match=r"no rank that vLLM takes is exact \(exact is 3\): name a rank") as caught:
        plan_adapter(gpt2.edited)
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(ExportError, match="no rank that vLLM takes is within 1e-05"):
        plan_adapter(gpt2.edited, error=1e-5)
    plan = plan_adapter(gpt2.edited, 2)
    assert not plan.exact
    assert any("truncated; exact from rank 3" in line for line in plan.lines())
    assert plan.errors[0] < 1e-7 < 0.1 < plan.errors[2]


def test_a_truncated_adapter_is_what_the_plan_says(gpt2, tmp_path):
    plan = plan_adapter(gpt2.edited, 1)
    export_adapter(plan, tmp_path)
    tokens = prompts(gpt2.model)
    logits = torch_logits(with_adapter(torch_model(gpt2.directory), tmp_path), tokens)
    assert np.abs(logits - jax_logits(apply_edits(gpt2.model, plan.delta), tokens)).max() <= TOLERANCE
    assert np.abs(logits - jax_logits(gpt2.edited_model, tokens)).max() > 1e-2


def test_stored_dtype(gpt2, tmp_path):
    """The error is that of the factors as they are stored."""
    half = plan_adapter(gpt2.edited, 8, dtype=jnp.bfloat16)
    export_adapter(half, tmp_path / "half")
    assert {array.dtype for array in load_file(tmp_path / "half" / "adapter_model.safetensors").values()} == {
        np.dtype(jnp.bfloat16)
    }
    assert half.exact
    assert 1e-4 < max(half.errors.values()) < 1e-2
    with pytest.raises(ExportError, match="adapters cannot be stored as int8"):
        plan_adapter(gpt2.edited, 8, dtype="int8")
    with pytest.raises(NonFiniteError, match="not finite as float16"):
        plan_adapter(delta_of(gpt2.model, gpt2.edited.delta.scaled(1e12)), 8, dtype="float16")


def test_bad_ranks(gpt2):
    for rank in (0, -1):
        with pytest.raises(ExportError, match=f"rank is {rank}: it must be at least 1"):
            plan_adapter(gpt2.edited, rank)
    with pytest.raises(ExportError, match="rank and error are given"):
        plan_adapter(gpt2.edited, 8, error=0.1)
    with pytest.raises(ExportError, match="no edits"):
        plan_adapter(delta_of(gpt2.model, EditDelta({})))


def test_an_update_of_zeros(gpt2, tmp_path):
    """A session can come back to its base in one layer of several."""
    address, other = down_kernel_address(0), down_kernel_address(2)
    delta = EditDelta({address: Dense(np.zeros((45, 35))), other: gpt2.edited.delta[other]})
    plan = plan_adapter(delta_of(gpt2.model, delta))
    assert plan.exact
    assert plan.errors[0] == 0
    assert plan.needed[0] == 0
    export_adapter(plan, tmp_path / "adapter")


def test_what_truncation_costs_a_session(history: list[EditSession], tmp_path):
    """Reported before anything is written, and equal to what the scores of the models themselves say."""
    session = history[-1]
    exact, cut = plan_adapter(session), plan_adapter(session, 1)
    assert isinstance(exact, AdapterPlan)
    assert list(tmp_path.iterdir()) == []
    assert max(exact.needed.values()) <= len(session.facts)
    prepared = prepare_pairs([(fact.text, fact.target) for fact in session.facts], session.tokenizer)
    for plan in (exact, cut):
        told = plan.efficacy
        assert told is not None
        for answers, model in (
            (told.unedited, session.base),
            (told.full, session.model),
            (told.changed, apply_edits(session.base, plan.delta)),
        ):
            scores = score_pairs(model, prepared)
            assert answers.probability == pytest.approx(np.exp(-scores.nll).mean())
            assert answers.exact_match == scores.correct.mean()
        assert told.facts == len(session.facts)
        assert json.loads(json.dumps(plan.to_dict()))["efficacy"]["facts"] == told.facts
    full = exact.efficacy.full.probability
    costs = [abs(plan.efficacy.changed.probability - full) for plan in (exact, cut)]
    assert costs[0] < 1e-5 * full
    assert costs[1] > 1e-3 * full
    assert cut.efficacy.largest_drop > 100 * abs(exact.efficacy.largest_drop)
    assert "full delta" in "\n".join(cut.lines())
    nothing = efficacy_of(session, EditDelta({}))
    assert nothing.changed == nothing.unedited


def test_facts_that_are_lost(history: list[EditSession], monkeypatch):
    from kedit_jax.export import efficacy

    session, full, changed = history[-1], np.ones(12, bool), np.ones(12, bool)
    full[3] = changed[[3, 5, 7]] = False
    scores = iter(
        [PairScores(np.full(12, 3.0), ~full), PairScores(np.full(12, 0.5), full), PairScores(np.ones(12), changed)]
    )
    monkeypatch.setattr(efficacy, "score_pairs", lambda *_: next(scores))
    told = efficacy_of(session, EditDelta({}))
    assert told.lost == (session.facts[5].id, session.facts[7].id), "and not the one that was missed before"
    assert (told.unedited.exact_match, told.full.exact_match, told.changed.exact_match) == (1 / 12, 11 / 12, 9 / 12)
    assert told.largest_drop == pytest.approx(np.exp(-0.5) - np.exp(-1))
    assert told.lines()[-1] == "  lost: fact-6, fact-8"


def test_facts_that_cannot_be_scored(history: list[EditSession], monkeypatch):
    """Some tokenizers merge a blank at the end of a prompt with the target; such a fact stops no export."""
    from kedit_jax.export import efficacy

    def prepare(pairs: Any, tokenizer: Any) -> Any:
        if any("Alice" in prompt for prompt, _ in pairs):
            raise KeditError("these pairs cannot be scored")
        return prepare_pairs(pairs, tokenizer)

    session, alone = history[1], dataclasses.replace(history[1], facts=history[1].facts[:1])
    monkeypatch.setattr(efficacy, "prepare_pairs", prepare)
    told = efficacy_of(session, EditDelta({}))
    assert (told.facts, told.unscored) == (2, ("fact-1",))
    assert told.lines()[-1] == "  not scored: fact-1"
    with pytest.raises(KeditError, match="cannot be scored"):
        efficacy_of(alone, EditDelta({}))


def test_a_session_in_peft(history: list[EditSession], tmp_path):
    session = history[-1]
    save_model(session.base, tmp_path / "base")
    export_adapter(plan_adapter(session), tmp_path / "adapter", base_model=tmp_path / "base")
    tokens = prompts(session.base)
    loaded = with_adapter(torch_model(tmp_path / "base"), tmp_path / "adapter")
    assert np.abs(torch_logits(loaded, tokens) - jax_logits(session.model, tokens)).max() <= TOLERANCE
    assert np.abs(jax_logits(session.base, tokens) - jax_logits(session.model, tokens)).max() > 100 * TOLERANCE


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "killed"])
def test_a_failure_leaves_what_was_there(gpt2, tmp_path, monkeypatch, error):
    from kedit_jax.export import adapter

    plan = plan_adapter(gpt2.edited)
    export_adapter(plan, tmp_path / "adapter")
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match="exists and is not empty"):
        export_adapter(plan, tmp_path / "adapter")

    def fail(path: Path, _: Any) -> None:
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(adapter, "write_content", fail)
    for folder, overwrite in (("new", False), ("adapter", True)):
        with pytest.raises((ExportError, KeyboardInterrupt)):
            export_adapter(plan, tmp_path / folder, overwrite=overwrite)
        assert snapshot(tmp_path) == before
    monkeypatch.undo()
    export_adapter(plan_adapter(gpt2.edited, 3), tmp_path / "adapter", overwrite=True)
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["r"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_base_model_that_was_exported_is_not_replaced(gpt2, tmp_path):
    """An adapter would take the place of the model that it belongs to."""
    export_merged(gpt2.directory, gpt2.edited, tmp_path / "model")
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match="holds an export of the form 'merged', which 'adapter' does not replace"):
        export_adapter(plan_adapter(gpt2.edited), tmp_path / "model", overwrite=True)
    assert snapshot(tmp_path) == before


def test_an_adapter_somebody_trained_is_not_replaced(gpt2, tmp_path):
    plan = plan_adapter(gpt2.edited)
    export_adapter(plan, tmp_path / "adapter")
    assert read_json(tmp_path / "adapter" / MANIFEST)["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    (tmp_path / "adapter" / MANIFEST).unlink()
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match=r"it holds adapter_config\.json, adapter_model\.safetensors: give another folder"):
        export_adapter(plan, tmp_path / "adapter", overwrite=True)
    assert snapshot(tmp_path) == before


def test_what_the_plan_says_of_rounding(gpt2, history: list[EditSession]):
    kinds = [plan_adapter(gpt2.edited, 8, dtype=dtype).lines()[0] for dtype in ("float32", jnp.bfloat16, "float16")]
    assert kinds[0] == "LoRA adapter of rank 8, exact"
    for kind, name in zip(kinds[1:], ("bfloat16", "float16"), strict=True):
        assert re.fullmatch(rf"LoRA adapter of rank 8, exact but for rounding to {name} \(\d\.\de-0\d\)", kind)
    session = dataclasses.replace(
        history[-1], facts=tuple(dataclasses.replace(fact, id=f"{fact.id}-{'x' * 40}") for fact in history[-1].facts)
    )
    plan = plan_adapter(session, 1, dtype=jnp.bfloat16)
    assert plan.efficacy is not None
    lost = dataclasses.replace(plan.efficacy, lost=tuple(fact.id for fact in session.facts))
    lines = dataclasses.replace(plan, efficacy=lost, rank=VLLM_RANKS[-1]).lines()
    lines += dataclasses.replace(plan, exact=True, rank=VLLM_RANKS[-1]).lines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("  rank ") for line in lines) == 2 * len(VLLM_RANKS)
