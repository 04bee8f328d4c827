"""`kedit inspect` and `kedit doctor`: what they say, and that they notice what is wrong."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kedit_jax import assets, cli
from kedit_jax.cli import machine

Kedit = Callable[..., str]


@pytest.fixture
def kedit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kedit:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["kedit", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert ended.value.code in ((0, None) if status == 0 else (status,)), printed.out + printed.err
        return printed.out + printed.err

    return run


def test_inspect_says_what_would_be_edited(kedit: Kedit) -> None:
    said = kedit("inspect", str(assets.model_dir()), "--facts", "5000")
    assert "gpt2: 6 layers of width 128" in said
    assert "edited: layers 2 (from the model's depth; nothing published), kernels [2048, 128]" in said
    assert "5000 facts, 100 a step" in said
    assert "fits" in said
    assert "layers 1, 2 (as asked)" in kedit("inspect", str(assets.model_dir()), "--layers", "1,2")


def test_inspect_reads_the_configuration_alone(kedit: Kedit, tmp_path: Path) -> None:
    """A model of 8 billion parameters of which nothing but config.json is there."""
    config = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = kedit("inspect", str(tmp_path))
    assert "8.03 billion parameters" in said
    assert "layers 4, 5, 6, 7, 8 (published for llama-3-8b, of the same shape: --preset llama-3-8b)" in said
    assert "15.0 GiB" in said  # the weights in bfloat16
    assert "7.7 GiB" in said  # five moments of 14336 x 14336 in float64


def test_inspect_plans_for_a_mesh_that_is_not_here(kedit: Kedit) -> None:
    alone = kedit("inspect", str(assets.model_dir()))
    said = kedit("inspect", str(assets.model_dir()), "--mesh", "data=2,model=4")
    assert "2 x 4 devices" in said
    assert "of 8 alike" in said
    assert "fits" not in said, "nothing is known of devices that are elsewhere"
    model = [line.split() for line in (*alone.splitlines(), *said.splitlines()) if line.split()[:2] == ["model", "device"]]
    whole, cut = (float(words[2]) for words in model)
    assert whole / 8 <= cut <= 1.2 * whole / 8, "all but norms and positions is cut"
    uneven = kedit("inspect", str(assets.model_dir()), "--mesh", "model=3")
    assert "model=3 does not divide the attention heads and the key width" in uneven


@pytest.mark.parametrize("mesh", ["8", "data=2,tensor=4", "data=0", "data=2,data=4", "model=x", ""])
def test_a_mesh_that_cannot_be_read_is_named(kedit: Kedit, mesh: str) -> None:
    stats = ("stats", "m", "--corpus", "c", "--layers", "1")
    for words in (("--mesh", mesh, *stats), ("inspect", str(assets.model_dir()), "--mesh", mesh)):
        assert f"mesh {mesh!r} must be written as data=2,model=4" in kedit(*words, status=1)


def test_who_is_one_of_several_says_which(kedit: Kedit) -> None:
    said = kedit("--coordinator", "localhost:1", "--processes", "2", "doctor", status=1)
    assert "give all three" in said


def test_inspect_lists_what_a_file_of_settings_says_in_vain(kedit: Kedit, tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_text("alg_name: MEMIT\nlayers: [4, 5]\ndevice: 0\n")
    said = kedit("inspect", str(assets.model_dir()), "--settings", str(tmp_path / "h.yaml"))
    assert "device=0" in said
    assert "edited: layers 4, 5 (from" in said
    both = kedit("inspect", str(assets.model_dir()), "--settings", str(tmp_path / "h.yaml"), "--layers", "3")
    assert "edited: layers 3 (as asked)" in both


def test_inspect_does_not_promise_what_cannot_be_edited(kedit: Kedit, tmp_path: Path) -> None:
    config = {
        "model_type": "gemma2", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 8,
        "query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "loaded, scored and run, but not edited" in " ".join(kedit("inspect", str(tmp_path), status=1).split())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--layers", "9"), "the model has layers from 0 to 5"),
        (("--layers", "a"), "no list of layers"),
        (("--layers", "3,3"), "name one twice"),
        (("--dtype", "int8"), "none of float32, bfloat16, float16"),
        (("--settings", "none.yaml"), "none.yaml"),
    ],
)
def test_inspect_on_bad_input(kedit: Kedit, args: tuple[str, ...], words: str) -> None:
    assert words in kedit("inspect", str(assets.model_dir()), *args, status=1)


def test_the_doctor_finds_this_machine_fit(kedit: Kedit) -> None:
    said = kedit("doctor")
    for words in (
        "jax ",
        "orbax-checkpoint",
        "device 0:",
        "float64 solve against NumPy",
        "float32 product at highest precision",
    ):
        assert words in said
    assert "bad" not in said


def test_the_doctor_notices_wrong_numbers(kedit: Kedit, monkeypatch: pytest.MonkeyPatch) -> None:
    solve_right = machine.solve.one_time

    def wrong(*args: object, **options: object) -> object:
        solution = solve_right(*args, **options)  # type: ignore[arg-type]
        return type(solution)(np.asarray(solution.update) * (1 + 1e-6), solution.status)

    monkeypatch.setattr(machine.solve, "one_time", wrong)
    said = kedit("doctor", status=1)
    assert "bad  a float64 solve against NumPy: error 1.0e-06" in said
