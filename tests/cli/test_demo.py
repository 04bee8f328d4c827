"""The demo on the embedded model, in small: its claims hold, and its JSON is what it says.

The full demo (1,000 edits) is `make demo`; what it measured is recorded in experiments/demo.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kedit_jax import assets, cli

EDITS, BATCHES = 120, 4


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the demo wrote, in a process whose code XLA optimises: the suite's does not, and took twice as long."""
    home = tmp_path_factory.mktemp("demo")
    args = ["--edits", str(EDITS), "--batches", str(BATCHES), "--folder", str(home / "s"), "--json", str(home / "demo.json")]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([Path(sys.executable).with_name("kedit"), "demo", *args], env=environment, check=True)
    written = json.loads((home / "demo.json").read_text())
    return written | {"home": home}


@pytest.fixture(scope="module")
def rows(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {row["editor"]: row for row in result["rows"]}


def test_json_is_as_documented(result: dict[str, Any], rows: dict[str, dict[str, float]]) -> None:
    assert (result["edits"], result["batches"]) == (EDITS, BATCHES)
    assert list(rows) == ["unedited", "memit-sequential", "memit-one-time", "memit-unaligned", "alphaedit-sequential"]
    measures = {"efficacy", "generalization", "specificity", "score", "efficacy_accuracy", "retention", "perplexity"}
    for row in rows.values():
        assert measures <= set(row)
        assert all(0 <= row[name] <= 100 for name in measures - {"perplexity"})
    assert result["equivalence"]["dtype"] == "float64"
    assert result["seconds"] > 0


def test_the_unedited_model_knows_the_old_facts_and_none_of_the_new(rows: dict[str, dict[str, float]]) -> None:
    assert rows["unedited"]["efficacy"] <= 2
    assert rows["unedited"]["specificity"] >= 98


@pytest.mark.parametrize("editor", ["memit-sequential", "memit-one-time", "alphaedit-sequential"])
def test_aligned_editors_edit_and_spare_the_rest(rows: dict[str, dict[str, float]], editor: str) -> None:
    row = rows[editor]
    assert row["efficacy"] >= 97
    assert row["generalization"] >= 95
    assert row["specificity"] >= 90
    assert abs(row["perplexity"] / rows["unedited"]["perplexity"] - 1) <= 0.05


def test_the_sequence_is_the_one_time_edit_and_can_be_taken_back(result: dict[str, Any]) -> None:
    assert 0 < result["equivalence"]["relative_error"] <= 1e-10
    assert 0 < result["equivalence_float32"]["relative_error"] <= 1e-5
    assert result["retraction"]["relative_error"] <= 1e-11
    assert result["retraction"]["all_retracted_bit_for_bit"] is True


def test_what_is_recorded_of_the_whole_demo_meets_what_is_claimed() -> None:
    """The full demo is no test: its result is recorded by `make demo ARGS='--json experiments/demo/results.json'`."""
    recorded = json.loads((Path(__file__).resolve().parents[2] / "experiments" / "demo" / "results.json").read_text())
    rows = {row["editor"]: row for row in recorded["rows"]}
    aligned, unaligned, unedited = (rows[name] for name in ("memit-sequential", "memit-unaligned", "unedited"))
    assert recorded["edits"] >= 1000
    assert recorded["batches"] >= 20
    assert aligned["efficacy"] >= 97
    assert aligned["generalization"] >= 95
    assert aligned["specificity"] >= 90
    assert abs(aligned["perplexity"] / unedited["perplexity"] - 1) <= 0.05
    assert unaligned["efficacy_accuracy"] <= aligned["efficacy_accuracy"] - 5
    assert unaligned["specificity"] < aligned["specificity"]
    assert recorded["equivalence"]["relative_error"] <= 1e-10
    assert recorded["equivalence_float32"]["relative_error"] <= 1e-5
    assert recorded["retraction"]["relative_error"] <= 1e-11
    assert recorded["retraction"]["relative_error_float32"] <= 1e-5
    assert recorded["retraction"]["all_retracted_bit_for_bit"] is True
    assert recorded["seconds"] <= 300
    assert recorded["peak_memory_mib"] <= 2048


def test_the_command_to_try_next_works(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        args = ["retract", str(assets.model_dir()), "0", "--session", str(result["home"] / "s")]
        patch.setattr(sys, "argv", ["kedit", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    assert f"took back 1; {EDITS - 1} facts" in " ".join(capsys.readouterr().out.split())


def test_the_session_is_stored(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kedit", "log", "--session", str(result["home"] / "s")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    assert f"{EDITS - 1} facts stand" in " ".join(capsys.readouterr().out.split())
