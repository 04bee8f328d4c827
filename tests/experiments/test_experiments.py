"""What the experiments compute, on the small world, each measure against its definition."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.paper import conflicts, horizon, latest, measures, necessity
from experiments.paper.__main__ import _header
from experiments.paper.conflicts import ConflictsConfig
from experiments.paper.main_table import reread
from experiments.paper.measures import Quality
from experiments.paper.necessity import NecessityConfig, Sweep
from experiments.paper.results import Log, Result, read_results
from experiments.paper.running import Run, accepted
from experiments.paper.shift import hidden_states, principal, shift
from experiments.paper.stage import Stage
from kedit_jax import solve
from kedit_jax.delta import relative_error
from kedit_jax.editing import EditRequest, EditSession
from kedit_jax.errors import KeditError
from kedit_jax.evaluation import score_pairs
from kedit_jax.models import Decoder


def computed(name: str, runs: list[Run], folder: Path) -> dict[str, Result]:
    for run in runs:
        header = {"experiment": name, "model": "small", "seed": 0, "run": run.name, "what": run.what}
        run.go(Log.open(folder / f"{run.name}.jsonl", _header(header)), lambda _: None)
    return {result.name: result for result in read_results(folder)}


@pytest.fixture(scope="module")
def policies(stage: Stage, batches: list[list[EditRequest]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Three facts, corrected once, of which one is taken back."""
    versions = [
        tuple(dataclasses.replace(request, id=f"{fact}.{version}") for fact, request in enumerate(batch))
        for version, batch in enumerate(batches[:2])
    ]
    statements = {str(fact): [batch[fact] for batch in versions] for fact in range(3)}
    stream = conflicts.Stream(tuple(versions), statements, frozenset({"1"}), dict.fromkeys(statements, "Rome"))
    few = ConflictsConfig((0,), 3, 2, 0.0, 0.3, 2, "memit", ("latest", "keep", "unaligned"), 0, ("inconsistency",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conflicts, "stream_of", lambda *_: stream)
        runs = conflicts.runs(few, stage, 0)
    return computed("conflicts", runs, tmp_path_factory.mktemp("conflicts"))


@pytest.mark.parametrize(("policy", "facts"), [("latest", 2), ("keep", 4)])
def test_the_final_state_is_a_fresh_edit_of_what_should_hold(policies: dict[str, Result], policy: str, facts: int) -> None:
    last = policies[policy].lines[-1]
    assert last["facts"] == facts
    assert last["wrong_facts"] == 0
    assert last["inconsistency"] < 1e-10


def test_negative_control_naive_repetition_is_not(policies: dict[str, Result]) -> None:
    assert policies["unaligned"].lines[-1]["inconsistency"] > 1e-3
    assert policies["unedited"].complete


def test_a_stream_states_every_fact_and_contradicts_itself_within_a_batch(stage: Stage) -> None:
    config = ConflictsConfig((0,), 12, 3, 1.0, 0.25, 4, "memit", ("latest",), 0, ("inconsistency",))
    stream = conflicts.stream_of(stage.chosen(0, 12), config, 0)
    stated = [request for batch in stream.batches for request in batch]
    assert len(stated) == len({request.id for request in stated}) == sum(map(len, stream.statements.values()))
    assert max(map(len, stream.statements.values())) > 1
    assert len(stream.retracted) == 3
    for requests in stream.statements.values():
        assert len({request.target for request in requests}) == len(requests)
        assert [request.id for request in stated if request in requests] == [request.id for request in requests]
    contradicted = [batch for batch in stream.batches if len({r.text for r in batch}) < len(batch)]
    assert contradicted
    assert conflicts.stream_of(stage.chosen(0, 12), config, 0) == stream
    corrected = next(fact for fact, requests in stream.statements.items() if len(requests) > 1)
    versions = {
        policy: [str(request.id)[-1] for request in conflicts.standing(stream, policy)[corrected]]
        for policy in conflicts.POLICIES
    }
    every = [str(request.id)[-1] for request in stream.statements[corrected]]
    assert versions == {"latest": every[-1:], "first": ["0"], "reject": ["0"], "merge": every, "keep": every}


def test_reject_drops_what_it_refuses(stage: Stage, batches: list[list[EditRequest]]) -> None:
    session = stage.start(stage.settings("memit", 0, conflicts="reject"))
    named = [dataclasses.replace(request, id=str(number)) for number, request in enumerate([*batches[0], *batches[1]])]
    assert [fact.id for fact in accepted(session, named)] == ["0", "1", "2"]
    assert accepted(session, named[:3]) == named[:3]


def test_the_simplification_drifts_and_the_full_equations_do_not(stage: Stage, tmp_path: Path) -> None:
    config = latest.LatestConfig((0,), 9, 3, 3, ("memit",), latest.HISTORIES, 0, ("drift",))
    found = computed("latest", latest.runs(config, stage, 0), tmp_path)
    full, simplified = (found[f"memit-{history}"].series("drift")[1] for history in latest.HISTORIES)
    assert max(full) < 1e-8
    assert simplified[0] < 1e-8
    assert min(simplified[1:]) > 1e-3


def test_a_strength_without_solution_is_told_and_others_go_on(stage: Stage, tmp_path: Path) -> None:
    sweep = Sweep("lambda", "memit", "moment_weight", (0.0, 20.0), ("aligned",))
    config = NecessityConfig((0,), 6, 3, 4, 2, (sweep,), ("score",))
    found = computed("necessity", necessity.runs(config, stage, 0), tmp_path)
    assert "weight" in found["lambda-00-aligned"].lines[-1]["failed"]
    assert found["lambda-00-aligned"].complete
    assert found["lambda-01-aligned"].last("distance") < 1e-10  # type: ignore[operator]


def test_the_horizon_continues_and_keeps_the_first_constraints_when_aligned(stage: Stage, tmp_path: Path) -> None:
    end = horizon.EndToEnd(3, 3, 1, 3, 0)
    config = horizon.HorizonConfig((0,), "memit", 6, 3, 40, 10, 3, ("aligned", "unaligned"), end, ("first_residual",))
    runs = [run for run in horizon.runs(config, stage, 0) if run.name.startswith("solver")]
    found = computed("horizon", runs, tmp_path)
    aligned, unaligned = (found[f"solver-{variant}"].series("first_residual")[1] for variant in ("aligned", "unaligned"))
    assert len(aligned) == 4
    assert all(a < b for a, b in zip(aligned, unaligned, strict=True))
    path = tmp_path / "solver-aligned.jsonl"
    whole = path.read_text().splitlines()
    path.write_text("\n".join(whole[:3]) + "\n")
    again = computed("horizon", runs, tmp_path)["solver-aligned"]
    assert again.series("first_residual")[1] == aligned


def test_the_unaligned_step_is_the_library_s(stage: Stage, history: list[EditSession], tmp_path: Path) -> None:
    """The horizon takes its unaligned steps on the host; `solve.run` takes them as the modes are defined."""
    settings = stage.settings("memit", 0)
    layer = settings.layers[-1]
    stack, site = history[2].layers[layer].constraints, stage.start(settings).site(layer)
    with solve.float64():
        blocks = [solve.take(stack, np.array([row])) for row in range(stack.size)]
        wanted = solve.run(site.prior, np.asarray(site.kernel, np.float64), blocks, mode="unaligned")
    end = horizon.EndToEnd(3, 3, 1, 3, 0)
    config = horizon.HorizonConfig(
        (0,), "memit", stack.size, 3, stack.size, stack.size, 3, ("unaligned",), end, ("first_residual",)
    )
    log = Log.open(tmp_path / "run.jsonl", {"run": "x"})
    horizon._solved(config, stage, settings, lambda: stack, 0, "unaligned", log, lambda _: None)
    assert log.lines[-1]["update_norm"] == pytest.approx(np.linalg.norm(wanted.update), rel=1e-5)


def test_drawn_constraints_have_the_stored_ones_mean_and_covariance() -> None:
    rng = np.random.default_rng(0)
    stored = solve.Constraints(rng.normal(2.0, 1.0, (50, 4)) * [1, 2, 3, 4], rng.normal(size=(50, 3)), np.ones(50))
    drawn = horizon.streamed(stored, 20_050, 1)
    assert np.array_equal(drawn.keys[:50], stored.keys)
    keys = drawn.keys[50:]
    assert np.allclose(keys.mean(0), stored.keys.mean(0), atol=0.1)
    wanted = np.cov(stored.keys.T, bias=True)
    assert np.abs(np.cov(keys.T) - wanted).max() < 0.05 * wanted.max()
    assert {tuple(row) for row in drawn.residuals[50:]} <= {tuple(row) for row in stored.residuals}
    assert horizon.streamed(stored, 20, 1).size == 20


def test_keys_read_again_change_nothing_where_they_did_not_move(history: list[EditSession]) -> None:
    """After one batch the upper layer's keys are those recorded; after more they have moved."""
    assert relative_error(reread(history[1]), history[1].one_time()) < 1e-4
    assert relative_error(reread(history[4]), history[4].one_time()) > 1e-2
    with pytest.raises(KeditError, match="record all"):
        reread(history[0])


def test_facts_that_are_edited_themselves_do_not_count_as_other_facts(stage: Stage) -> None:
    records = list(stage.records)
    few, all_of = (Quality(stage, records, 3)._of(edits, 12)[0] for edits in (3, 12))
    assert [len(record.same_subject) for record in few.records] == [2] * 3
    edited = {(record.subject, record.target_true) for record in records}
    for record, asked in zip(records, all_of.records, strict=True):
        also = (record.subject, record.same_subject[1].target) in edited
        assert len(asked.same_subject) == (1 if also else 2)
    assert any(len(asked.same_subject) == 1 for asked in all_of.records)


def test_quality_is_that_of_the_evaluation(stage: Stage, quality: Quality, model: Decoder) -> None:
    from kedit_jax.evaluation import evaluate, prepare

    found = quality(model, 12, 12)
    wanted = evaluate(model, prepare(stage.chosen(0, 12), stage.tokenizer), first=3)
    for name in ("efficacy", "generalization", "specificity", "score", "efficacy_accuracy", "retention"):
        assert found[name] == pytest.approx(getattr(wanted, name))


def test_costs_are_those_of_the_untouched_facts(stage: Stage, model: Decoder) -> None:
    found = measures.cost(stage, model)
    pairs = stage.untouched["type_accuracy"]
    assert found["type_accuracy"] == 100 * score_pairs(model, pairs).correct.mean()
    assert found["perplexity"] > 1


def test_free_text_is_asked_of_evenly_spaced_records(stage: Stage, monkeypatch: pytest.MonkeyPatch, model: Decoder) -> None:
    asked: list[Any] = []

    def answers(_model: Decoder, _tokenizer: Any, records: Any) -> Any:
        asked.extend(records)
        return type("Said", (), {"efficacy": 1.0, "generalization": 2.0, "specificity": None})()

    monkeypatch.setattr(measures, "answers", answers)
    assert measures.freely(stage, model, stage.records, 0) == {}
    found = measures.freely(stage, model, stage.records, 3)
    assert found == {"generation_efficacy": 1.0, "generation_generalization": 2.0, "generation_specificity": None}
    assert [record.case_id for record in asked] == [0, 6, 11]
    assert set(found) <= set(measures.COLUMNS)


def test_shift_is_zero_for_the_same_states_and_known_for_moved_ones() -> None:
    states = np.random.default_rng(0).normal(size=(30, 5))
    assert shift(states, states) == {"shift": 0.0, "centre_shift": 0.0}
    assert shift(states, 1.5 * states)["shift"] == pytest.approx(0.5)
    spread = np.sqrt(np.mean(np.sum(np.square(states - states.mean(0)), axis=1)))
    assert shift(states, states + np.array([2 * spread, 0, 0, 0, 0]))["centre_shift"] == pytest.approx(2.0)
    before, after = principal(states, states + 1.0)
    assert np.allclose(before.mean(0), 0)
    assert before[:, 0].var() >= before[:, 1].var()
    assert np.allclose(after - before, (after - before)[0])


def test_hidden_states_are_what_the_head_reads(stage: Stage, model: Decoder) -> None:
    found = hidden_states(model, stage.tokenizer, stage.records[:3])
    ids = stage.tokenizer([record.rewrite_prompt for record in stage.records[:3]])["input_ids"]
    for number, row in enumerate(ids):
        logits = np.asarray(model(jax.numpy.asarray([row])))[0, -1]
        ours = np.asarray(model.logits(jax.numpy.asarray(found["prompt"][number], np.float32)))
        assert np.allclose(ours, logits, atol=1e-4)
