"""Configs and the command line: what is wrong with them is said at once, before anything is loaded."""

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from experiments.paper import __main__ as runner
from experiments.paper.config import FOLDER, read_config
from experiments.paper.main_table import MainConfig
from experiments.paper.measures import COLUMNS, check_columns
from experiments.paper.registry import EXPERIMENTS
from experiments.paper.report import CHAPTERS
from experiments.paper.stage import Sources, open_stage, read_choices
from kedit_jax.errors import KeditError

CONFIGS = FOLDER / "configs"


@pytest.mark.parametrize("name", list(EXPERIMENTS))
@pytest.mark.parametrize("quick", [False, True])
def test_every_experiment_has_a_config_that_reads(name: str, quick: bool) -> None:
    config = read_config(EXPERIMENTS[name].config, CONFIGS / f"{name}.yaml", quick=quick)
    assert config.columns
    assert name in CHAPTERS


def test_no_config_is_left_over() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*EXPERIMENTS, "models"}


def changed(tmp_path: Path, **changes: object) -> Path:
    stored = yaml.safe_load((CONFIGS / "main.yaml").read_text()) | changes
    path = tmp_path / "main.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in stored.items() if value != "absent"}))
    return path


def test_all_problems_of_a_config_are_named_at_once(tmp_path: Path) -> None:
    path = changed(tmp_path, edits="many", batches=3, sample="absent", seeds=[0, True], quick={"colour": "red"})
    with pytest.raises(KeditError) as error:
        read_config(MainConfig, path)
    for words in (
        "main.yaml",
        "edits is 'many'; it must be a whole number",
        "unknown key batches",
        "sample is missing",
        "seeds[1] is True",
        "quick.colour changes nothing",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"columns": ["efficacy", "efficcy"]}, "unknown metric efficcy; there are efficacy,"),
        ({"variants": ["aligned", "sideways"]}, "variants sideways are none of aligned"),
        ({"evaluate_at": [150]}, "falls between steps of 100"),
        ({"edits": 50}, "at least one batch of 100"),
        ({"quick": {"batch": 0}}, "quick: "),
    ],
)
def test_what_a_config_itself_objects_to(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(KeditError, match=re.escape(words)):
        read_config(MainConfig, changed(tmp_path, **changes))


def test_known_metrics_are_accepted() -> None:
    check_columns(list(COLUMNS))


def test_models_with_problems_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "both": {"preset": "gpt2-xl", "settings": {}, "editors": {}, "why": ""},
                "unknown": {"preset": "gpt-9", "editors": {}, "why": ""},
                "wrong": {"preset": "gpt2-xl", "editors": {"memit": {"lambda": 3}}, "why": "", "speed": 1},
                "editor": {"preset": "gpt2-xl", "editors": {"memit": {"lambda": 3}}, "why": ""},
            }
        )
    )
    with pytest.raises(KeditError) as error:
        read_choices(path)
    for words in ("both: give either", "gpt-9", "unknown key wrong.speed", "editor.editors.memit: unknown settings lambda"):
        assert words in str(error.value)


@pytest.mark.parametrize("name", ["gpt2-xl", "gpt-j", "llama-3-8b", "qwen2.5-7b"])
def test_missing_weights_and_data_say_what_to_fetch_and_where_to_put_it(name: str, tmp_path: Path) -> None:
    sources = Sources(tmp_path / "w", tmp_path / "r.json", tmp_path / "c.txt")
    with pytest.raises(KeditError) as error:
        open_stage(name, read_choices()[name], sources, tmp_path)
    for words in (
        "the checkpoint",
        "Hugging Face",
        "--model-dir",
        "CounterFact",
        "--records",
        "--corpus",
        f"data/{name}/weights",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mian"], "no experiment mian; there are main"),
        (["main", "--model", "gpt-5"], "'gpt-5' is not in configs/models.yaml"),
        (["main", "--model", "gpt2-xl", "--model-dir", "nowhere"], "nothing at 'nowhere'"),
        (["--report"], "no results in"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(runner.app, [*arguments, "--out", str(tmp_path), "--cache", str(tmp_path)])
    assert done.exit_code == 1
    assert words in " ".join(done.output.split())
