"""Settings from the published table, from a model's shape, and from files of ours and of EasyEdit's."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedit_jax.editing.presets import PRESETS, PUBLISHED, check_preset, derive_settings, read_settings
from kedit_jax.editing.settings import EditSettings
from kedit_jax.errors import KeditError
from kedit_jax.models import gpt2_config

EASYEDIT = """
alg_name: "{algorithm}"
model_name: "./models/some-model"
device: 0
layers: [4, 5]
clamp_norm_factor: 4
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 20
v_lr: 5e-1
v_loss_layer: 31
v_weight_decay: 1e-3
kl_factor: 0.0625
mom2_adjustment: true
mom2_update_weight: 15000
mom2_dataset: "wikipedia"
"""


def config(n_layers: int, d_ff: int) -> Any:
    return dataclasses.replace(
        gpt2_config(vocab_size=10, n_layers=2, d_model=4, n_heads=2, max_positions=8), n_layers=n_layers, d_ff=d_ff
    )


def test_the_published_table() -> None:
    """The numbers of the papers, once more, so that a slip of the hand shows."""
    table = {
        name: (
            s.layers[0],
            s.layers[-1],
            s.moment_weight,
            s.values.learning_rate,
            s.values.steps,
            s.values.clamp,
            s.values.decay,
        )
        for name, s in PUBLISHED.items()
    }
    assert table == {
        "gpt2-xl": (13, 17, 20000, 0.5, 20, 0.75, 0.5),
        "gpt-j-6b": (3, 8, 15000, 0.5, 25, 0.75, 0.5),
        "llama-3-8b": (4, 8, 15000, 0.1, 25, 0.75, 0.5),
        "qwen2.5-7b": (4, 8, 15000, 0.5, 25, 4, 0.001),
        "mistral-7b": (4, 8, 15000, 0.5, 25, 4, 0.001),
    }
    for name, preset in PRESETS.items():
        assert preset.source
        assert preset.settings.values.kl_factor == 0.0625
        if name != "mistral-7b":
            assert (preset.settings.null_threshold, preset.settings.l2) == (0.02, 1 if name == "qwen2.5-7b" else 10)


def test_a_preset_is_for_its_checkpoint() -> None:
    check_preset("gpt2-xl", config(48, 6400))
    with pytest.raises(KeditError, match=r"48 layers of key width 6400.*; this model is gpt2 with 12 of 3072"):
        check_preset("gpt2-xl", config(12, 3072))


@pytest.mark.parametrize(("n_layers", "layers"), [(1, (0,)), (2, (1,)), (6, (2,)), (12, (1, 2, 3)), (32, (5, 6, 7, 8, 9))])
def test_derived_layers(n_layers: int, layers: tuple[int, ...]) -> None:
    settings = derive_settings(config(n_layers, 64))
    assert settings.layers == layers
    assert settings.null_relative is not None


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.checkpoint)
def test_derived_layers_are_near_the_published_ones(preset: Any) -> None:
    derived, published = derive_settings(config(preset.n_layers, preset.d_ff)).layers, preset.settings.layers
    assert abs(derived[-1] - published[-1]) <= 4
    assert len(set(derived) & set(published)) >= 1


class TestOurFiles:
    def test_yaml_and_json_read_the_same(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("layers: [1, 2]\nmoment_weight: 2e4\nvalues: {learning_rate: 5e-1, steps: 7}\n")
        (tmp_path / "a.json").write_text(
            '{"layers": [1, 2], "moment_weight": 20000, "values": {"learning_rate": 0.5, "steps": 7}}'
        )
        read = [read_settings(tmp_path / name) for name in ("a.yaml", "a.json")]
        assert read[0] == read[1]
        assert read[0].settings.moment_weight == 20000
        assert read[0].settings.values.steps == 7
        assert read[0].unused == {}

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("layers: [1", "no YAML or JSON file"),
            ("- 1\n- 2", "holds list"),
            ("layers: [1]\nlearning_rate: 1", "unknown settings learning_rate"),
            ("editor: memit", "settings without layers"),
            ("layers: [1]\neditor: meme\nridge: -1", "editor 'meme' is unknown"),
            ("layers: 3", "wrong type"),
            ("layers: [1]\nridge: much", "ridge is 'much'; it must be a number"),
            ("!!python/object/apply:os.getcwd []", "no YAML or JSON file"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, text: str, words: str) -> None:
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(KeditError) as caught:
            read_settings(tmp_path / "bad.yaml")
        assert words in str(caught.value)
        assert "bad.yaml" in str(caught.value)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(KeditError, match=r"none\.yaml"):
            read_settings(tmp_path / "none.yaml")


class TestEasyEdit:
    def read(self, tmp_path: Path, algorithm: str, more: str = "") -> Any:
        (tmp_path / "h.yaml").write_text(EASYEDIT.format(algorithm=algorithm) + more)
        return read_settings(tmp_path / "h.yaml")

    def test_memit(self, tmp_path: Path) -> None:
        read = self.read(tmp_path, "MEMIT")
        s = read.settings
        assert (s.editor, s.layers, s.moment_weight, s.noise) == ("memit", (4, 5), 15000.0, None)
        assert dataclasses.asdict(s.values) == {
            "steps": 20, "learning_rate": 0.5, "clamp": 4.0, "kl_factor": 0.0625, "decay": 0.001, "stop_loss": 0.05
        }  # fmt: skip
        assert set(read.unused) == {"model_name", "device", "v_loss_layer", "mom2_adjustment", "mom2_dataset"}

    def test_alphaedit(self, tmp_path: Path) -> None:
        read = self.read(tmp_path, "AlphaEdit", "nullspace_threshold: 2e-2\nL2: 1\nP_loc: p.pt\n")
        assert (read.settings.editor, read.settings.null_threshold, read.settings.l2) == ("alphaedit", 0.02, 1.0)
        assert {"P_loc", "mom2_update_weight"} <= set(read.unused), "AlphaEdit reads no weight of the moments"

    def test_emmet(self, tmp_path: Path) -> None:
        read = self.read(tmp_path, "EMMET", "update_norm_lambda: 0\nemmet_lambda: 0.1\n")
        assert (read.settings.editor, read.settings.noise, read.settings.ridge) == ("emmet", 0.1, 0.0)
        assert read.settings.build(np.eye(3)).noise == 0.1

    def test_rome(self, tmp_path: Path) -> None:
        read = self.read(tmp_path, "ROME", "context_template_length_params: [[5, 10], [10, 10]]\n")
        assert read.settings.build(np.diag([1.0, 2.0, 3.0])).noise == 0
        assert "context_template_length_params" in read.unused
        plain = EASYEDIT.format(algorithm="ROME").replace("mom2_adjustment: true", "mom2_adjustment: false")
        (tmp_path / "h.yaml").write_text(plain)
        editor = read_settings(tmp_path / "h.yaml").settings.build(np.diag([1.0, 2.0, 3.0]))
        assert editor.noise == 0
        np.testing.assert_array_equal(np.asarray(editor.prior.factor), 1.0)

    def test_what_cannot_be_done_is_refused_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "h.yaml").write_text("alg_name: PMET\nfact_token: last\n")
        with pytest.raises(KeditError) as caught:
            read_settings(tmp_path / "h.yaml")
        for words in ("'PMET' is not one of ROME, MEMIT", "layers are missing", "fact_token 'last' is not supported"):
            assert words in str(caught.value)


def test_settings_are_overridden_from_python() -> None:
    assert dataclasses.replace(PUBLISHED["gpt2-xl"], layers=(3,)).layers == (3,)
    assert isinstance(PUBLISHED["gpt2-xl"], EditSettings)
