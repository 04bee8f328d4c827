"""Where settings come from: published for a checkpoint, derived for others, or read from a file.

Files are YAML or JSON, in this package's own names (those of `EditSettings`) or in EasyEdit's, recognised by `alg_name`;
what a file of EasyEdit says that has no counterpart here is listed, never silently dropped.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.values import ValueSettings
from kedit_jax.errors import KeditError, shown
from kedit_jax.models import ModelConfig


@dataclass(frozen=True)
class Preset:
    """Hyperparameters published for one checkpoint.

    Attributes:
        settings: for MEMIT; the numbers of AlphaEdit beside them hold once `editor` says so.
        checkpoint: where its weights are found on the Hugging Face hub.
        family, n_layers, d_ff: the checkpoint's shape, so that a preset is not used on another model unnoticed.
        source: who published them. Moments were taken over 100,000 Wikipedia texts throughout.
    """

    settings: EditSettings
    checkpoint: str
    family: str
    n_layers: int
    d_ff: int
    source: str


MAX_SETTINGS = 2**16
"""Bytes of a file of settings; EasyEdit's have some 600. PyYAML reads 40 KB in a second."""

_MEMIT, _ALPHAEDIT = "MEMIT (arXiv 2210.07229)", "AlphaEdit (arXiv 2410.02355)"
_EASYEDIT = "EasyEdit (arXiv 2308.07269), hparams/MEMIT"
_VALUES = ValueSettings(steps=25, learning_rate=0.5, clamp=0.75, kl_factor=0.0625, decay=0.5)
_NULL = 0.02

PRESETS: Mapping[str, Preset] = {
    "gpt2-xl": Preset(
        EditSettings(
            (13, 14, 15, 16, 17), moment_weight=20000.0, null_threshold=_NULL, values=dataclasses.replace(_VALUES, steps=20)
        ),
        "openai-community/gpt2-xl",
        "gpt2",
        48,
        6400,
        f"{_MEMIT}, {_ALPHAEDIT}",
    ),
    "gpt-j-6b": Preset(
        EditSettings((3, 4, 5, 6, 7, 8), null_threshold=_NULL, values=_VALUES),
        "EleutherAI/gpt-j-6b",
        "gptj",
        28,
        16384,
        f"{_MEMIT}, {_ALPHAEDIT}",
    ),
    "llama-3-8b": Preset(
        EditSettings((4, 5, 6, 7, 8), null_threshold=_NULL, values=dataclasses.replace(_VALUES, learning_rate=0.1)),
        "meta-llama/Meta-Llama-3-8B",
        "llama",
        32,
        14336,
        _ALPHAEDIT,
    ),
    "qwen2.5-7b": Preset(
        EditSettings(
            (4, 5, 6, 7, 8), null_threshold=_NULL, l2=1.0, values=dataclasses.replace(_VALUES, clamp=4.0, decay=0.001)
        ),
        "Qwen/Qwen2.5-7B",
        "qwen2",
        28,
        18944,
        f"{_EASYEDIT} and hparams/AlphaEdit",
    ),
    "mistral-7b": Preset(
        EditSettings((4, 5, 6, 7, 8), values=dataclasses.replace(_VALUES, clamp=4.0, decay=0.001)),
        "mistralai/Mistral-7B-v0.1",
        "mistral",
        32,
        14336,
        _EASYEDIT,
    ),
}

PUBLISHED: Mapping[str, EditSettings] = {name: preset.settings for name, preset in PRESETS.items()}


def check_preset(name: str, config: ModelConfig) -> None:
    """Raise a KeditError where a preset is meant for a model of another shape."""
    preset = PRESETS[name]
    found, wanted = (config.n_layers, config.d_ff, config.family), (preset.n_layers, preset.d_ff, preset.family)
    if found != wanted:
        raise KeditError(
            f"preset {name!r} is for {preset.checkpoint} ({wanted[2]}, {wanted[0]} layers of key width {wanted[1]}); this "
            f"model is {found[2]} with {found[0]} of {found[1]}: leave the preset out; settings are then derived"
        )


def derive_settings(config: ModelConfig) -> EditSettings:
    """Settings for a model that nobody has published any for, from its shape alone; a start, not a tuned choice.

    Published layers end between 0.25 and 0.35 of the depth and are five in most cases, so the layers here are the (at most)
    five up to 0.28 of it. The null space of AlphaEdit is relative to the largest eigenvalue, as an absolute threshold
    depends on the scale of a model's activations. All else is as published for GPT-J.
    """
    top = max(0, min(config.n_layers - 1, round(0.28 * config.n_layers)))
    count = max(1, min(5, config.n_layers // 4))
    return EditSettings(tuple(range(max(0, top - count + 1), top + 1)), null_relative=1e-3, values=_VALUES)


def overridden(settings: EditSettings, changes: Mapping[str, Any]) -> EditSettings:
    """The settings with others in their place, by name; `values.NAME` is one of `settings.values`.

    Raises:
        KeditError: names that are no settings, or settings that cannot be used.
    """
    stored = settings.to_dict()
    for name, value in changes.items():
        if name.startswith("values."):
            stored["values"][name.removeprefix("values.")] = value
        else:
            stored[name] = value
    return EditSettings.from_dict(_plain(stored))


def assigned(texts: Sequence[str]) -> dict[str, Any]:
    """Changes written as NAME=VALUE, values as in YAML. Raises KeditError."""
    changes = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            changes[name.strip()] = _number(_yaml(value))
        except Exception as error:  # PyYAML's constructors raise whatever they meet
            raise KeditError(f"{text!r:.200} has no value that can be read: {error}") from error
        if not (name.strip() and equals):
            raise KeditError(f"{text!r} is no setting; write it as NAME=VALUE, as values.learning_rate=0.1")
    return changes


@dataclass(frozen=True)
class ReadSettings:
    """What a file says.

    Attributes:
        settings: in this package's terms.
        unused: names and values in the file that mean nothing here.
    """

    settings: EditSettings
    unused: Mapping[str, Any]


def read_settings(path: str | Path) -> ReadSettings:
    """Settings from a YAML or JSON file, in our names or EasyEdit's (ROME, MEMIT, EMMET, AlphaEdit).

    Raises:
        KeditError: a file that cannot be read, or settings that cannot be used: all problems at once.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_SETTINGS + 1)
        if len(text) > MAX_SETTINGS:
            raise ValueError(f"it has more than {MAX_SETTINGS:,} bytes")
        stored = _number(_parsed(text.decode("utf-8-sig")))
    except Exception as error:  # PyYAML's constructors raise whatever they meet: `!!timestamp x` an AttributeError
        raise KeditError(f"{str(path)!r} is no YAML or JSON file of settings: {error}") from error
    if not isinstance(stored, dict):
        raise KeditError(f"{str(path)!r} holds {type(stored).__name__}, not names and values of settings")
    stored = {str(name): value for name, value in stored.items()}
    try:
        return _from_easyedit(stored) if "alg_name" in stored else ReadSettings(EditSettings.from_dict(_plain(stored)), {})
    except KeditError as error:
        raise KeditError(f"{str(path)!r}: {error}") from error
    except TypeError as error:
        raise KeditError(f"{str(path)!r}: a setting has the wrong type: {error}") from error


class _Loader(yaml.SafeLoader):
    """YAML without aliases: nine lines of them can stand for a billion values, and no settings need any."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias (*){self.peek_event().start_mark}; write the value out")
        return super().compose_node(parent, index)


def _parsed(text: str) -> Any:
    return json.loads(text) if text.lstrip().startswith("{") else _yaml(text)


def _yaml(text: str) -> Any:
    return yaml.load(text, _Loader)  # a SafeLoader, which makes plain values alone


_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def _number(value: Any) -> Any:
    """YAML 1.1 reads 5e-1, without a point, as text; nobody means that."""
    if isinstance(value, dict):
        return {name: _number(inner) for name, inner in value.items()}
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


def _plain(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Whole numbers where a float is meant, as files write them."""
    floats = {field.name for field in dataclasses.fields(EditSettings) if field.type in (float, float | None)}
    inner = {field.name for field in dataclasses.fields(ValueSettings) if field.type is float}
    plain = {name: _as_float(value) if name in floats else value for name, value in stored.items()}
    if isinstance(plain.get("values"), dict):
        plain["values"] = {name: _as_float(value) if name in inner else value for name, value in plain["values"].items()}
    return plain


def _as_float(value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf  # which the settings refuse by name


_VALUE_NAMES = {
    "v_num_grad_steps": "steps",
    "v_lr": "learning_rate",
    "clamp_norm_factor": "clamp",
    "kl_factor": "kl_factor",
    "v_weight_decay": "decay",
}
_PRIOR_NAMES: Mapping[str, Mapping[str, str]] = {
    "ROME": {},
    "MEMIT": {"mom2_update_weight": "moment_weight"},
    "EMMET": {"mom2_update_weight": "moment_weight", "update_norm_lambda": "ridge", "emmet_lambda": "noise"},
    "AlphaEdit": {"nullspace_threshold": "null_threshold", "L2": "l2"},
}
_FIXED = {"layer_selection": "all", "fact_token": "subject_last"}
"""What this package does in one way only; a file that asks for another is refused."""


def _from_easyedit(stored: Mapping[str, Any]) -> ReadSettings:
    """Settings from EasyEdit's names. Source: the hparams folder of github.com/zjunlp/EasyEdit."""
    algorithm = stored["alg_name"]
    problems = []
    if not isinstance(algorithm, str) or algorithm not in _PRIOR_NAMES:
        problems.append(f"alg_name {shown(algorithm)} is not one of {', '.join(_PRIOR_NAMES)}")
    if "layers" not in stored:
        problems.append("layers are missing")
    elif not isinstance(stored["layers"], list):
        problems.append(f"layers is {shown(stored['layers'])}; it must be a list of whole numbers")
    problems += [
        f"{name} {shown(stored[name])} is not supported, only {only!r}"
        for name, only in _FIXED.items()
        if name in stored and stored[name] != only
    ]
    if problems:
        raise KeditError.listing("settings of EasyEdit that cannot be used:", problems)
    own = _PRIOR_NAMES[algorithm]
    settings = {"editor": algorithm.lower(), "layers": tuple(stored["layers"])}
    settings |= {ours: _as_float(stored[theirs]) for theirs, ours in own.items() if theirs in stored}
    values = {ours: stored[theirs] for theirs, ours in _VALUE_NAMES.items() if theirs in stored}
    settings["values"] = {name: value if name == "steps" else _as_float(value) for name, value in values.items()}
    used = {"alg_name", "layers", *own, *_VALUE_NAMES, *_FIXED}
    if algorithm == "ROME":
        used.add("mom2_adjustment")
        if stored.get("mom2_adjustment") is False:  # equality constraints under the identity instead of C0
            settings |= {"editor": "ridge", "ridge": 1.0, "noise": 0.0}
    unused = {name: value for name, value in stored.items() if name not in used}
    return ReadSettings(EditSettings.from_dict(settings), unused)
