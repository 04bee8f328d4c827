"""Checkpoints of every layout load; everything else is refused by name, all problems at once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle_models
import pytest
import torch
import transformers
from oracle_models import altered
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from kedit_jax.errors import CheckpointError, KeditError
from kedit_jax.models import (
    gpt2_config,
    load,
    load_model,
    load_tokenizer,
    model_fingerprint,
    named_parameters,
    read_config,
    reading,
)
from kedit_jax.models.checkpoint_files import read_header
from kedit_jax.models.config import Llama3Scaling, LocalAttention, as_record
from kedit_jax.models.family import Weight
from kedit_jax.models.registry import FAMILIES, config_from_json
from kedit_jax.models.table import slots


def same(one: Any, other: Any) -> bool:
    one, other = named_parameters(one), named_parameters(other)
    return list(one) == list(other) and all(np.array_equal(one[path], other[path]) for path in one)


def refusal(directory: Any, **kwargs: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(directory, **kwargs)
    return str(error.value)


# ---- layouts


def test_indexed_shards(pair, tmp_path):
    oracle_models.save(pair.oracle, tmp_path, max_shard_size="15KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same(load_model(tmp_path), pair.model)


@pytest.mark.parametrize("name", ["gpt2", "gptj"])
def test_names_without_the_prefix_and_old_buffers(pairs, tmp_path, name):
    def age(tensors: dict[str, np.ndarray]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        for layer in range(3):
            tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 40, 40), np.float32))
            tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e9, np.float32)

    assert same(load_model(altered(pairs[name].directory, tmp_path / "old", tensors=age)), pairs[name].model)


def test_a_bare_model_without_its_tied_head(pairs, tmp_path):
    pairs["qwen2"].oracle.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    assert same(load_model(tmp_path), pairs["qwen2"].model)


def test_a_tied_head_may_be_stored_too_but_not_differ(gpt2, tmp_path):
    def add(offset: float) -> Any:
        return lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + np.float32(offset)})

    assert same(load_model(altered(gpt2.directory, tmp_path / "equal", tensors=add(0.0))), gpt2.model)
    message = refusal(altered(gpt2.directory, tmp_path / "differs", tensors=add(1e-3)))
    assert "lm_head.weight differs from the embedding" in message


def test_configs_of_earlier_transformers(pairs, tmp_path):
    """rope_theta and rope_scaling at the top level, "type" for "rope_type", heads' sizes left to their defaults."""

    def age(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = None if rope["type"] == "default" else rope
        config["torch_dtype"] = config.pop("dtype")
        if config["head_dim"] == config["hidden_size"] // config["num_attention_heads"]:
            del config["head_dim"]

    for name in ("llama-3.1", "llama-3.2-biased"):
        model = load_model(altered(pairs[name].directory, tmp_path / name, config=age))
        assert model.config == pairs[name].model.config
        assert model.config.rotary is not None
        assert (model.config.rotary.scaling is None) == (name == "llama-3.2-biased")


def test_names_of_gpt_neox(pairs, tmp_path):
    """Its head has two names; each loads, alone."""
    pair, names = pairs["gpt-neox"], ("embed_out.weight", "lm_head.weight")
    held = next(name for name in names if name in load_file(pair.directory / "model.safetensors"))
    other = names[1 - names.index(held)]

    def rename(tensors: dict[str, np.ndarray]) -> None:
        tensors[other] = tensors.pop(held)

    def double(tensors: dict[str, np.ndarray]) -> None:
        tensors[other] = tensors[held]

    assert same(load_model(altered(pair.directory, tmp_path / "renamed", tensors=rename)), pair.model)
    assert "belongs to no parameter" in refusal(altered(pair.directory, tmp_path / "both", tensors=double))


def test_earlier_configs_of_other_families(pairs, tmp_path):
    """Spellings before transformers 5, and fields that are left to the family's defaults."""

    def neox(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}

    def gemma3(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope["full_attention"].pop("rope_theta")
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["rope_scaling"] = rope["full_attention"]

    def phi3(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"], config["partial_rotary_factor"] = rope["rope_theta"], rope["partial_rotary_factor"]
        config["rope_scaling"] = {"type": "su", **{name: rope[name] for name in ("short_factor", "long_factor")}}

    for name, age in (("gpt-neox", neox), ("gemma3", gemma3), ("phi3-longrope", phi3)):
        raw = json.loads((pairs[name].directory / "config.json").read_text())
        age(raw)
        assert config_from_json(raw) == pairs[name].model.config, name


def test_windows_by_default(pairs):
    def read(name: str, **changes: Any) -> Any:
        raw = json.loads((pairs[name].directory / "config.json").read_text())
        return config_from_json({key: value for key, value in (raw | changes).items() if value != "absent"}).local

    assert read("mistral", sliding_window="absent") == LocalAttention(4096, (True, True, True))
    assert read("mistral", sliding_window=None) is None
    assert read("gemma2", layer_types="absent") == LocalAttention(4, (True, False, True))
    assert read("gemma3", layer_types="absent", sliding_window_pattern=2).layers == (True, False, True)
    assert read("gemma3", layer_types="absent", num_hidden_layers=7).layers == (*5 * [True], False, True)
    assert read("qwen2", use_sliding_window=False) is None
    switched_on = {"use_sliding_window": True, "layer_types": "absent", "num_hidden_layers": 30}
    for name in ("qwen2", "qwen3"):
        upper = LocalAttention(4096, (*28 * [False], True, True))
        assert read(name, **switched_on, sliding_window="absent", max_window_layers="absent") == upper
        assert read(name, **switched_on, sliding_window=None) is None
    soft = config_from_json({
        name: value for name, value in json.loads((pairs["gemma2"].directory / "config.json").read_text()).items()
        if not name.endswith("softcapping")
    })  # fmt: skip
    assert (soft.attention_soft_cap, soft.logit_soft_cap) == (50.0, 30.0)


# ---- placement


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "qwen2", "phi3"])
def test_large_parameters_are_written_in_place(pairs, tmp_path, monkeypatch, name):
    """By blocks of rows and layer by layer, as small ones are not: the same model, and the same findings."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", 512)
    assert same(load_model(pairs[name].directory), pairs[name].model)
    half = load_model(pairs[name].directory, dtype=jnp.bfloat16)
    assert {value.dtype for value in named_parameters(half).values()} == {np.dtype(ml_dtypes.bfloat16)}

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        embedding = next(key for key in tensors if "wte" in key or "embed_" in key)
        tensors[embedding] = tensors[embedding].copy()
        tensors[embedding][[0, 20, 50], 1] = np.nan
        tensors[embedding][40, :2] = 1e5

    message = refusal(altered(pairs[name].directory, tmp_path / "spoiled", tensors=spoil), dtype=jnp.float16)
    assert "weight holds 3 NaN or infinite values" in message
    assert "weight holds 2 values too large for float16" in message


def test_a_place_for_every_parameter(gpt2, monkeypatch):
    device, asked = jax.devices()[0], {}

    def place(path: str, shape: tuple[int, ...]) -> Any:
        asked[path] = shape
        return jax.sharding.SingleDeviceSharding(device)

    for block in (reading.BLOCK_BYTES, 512):
        monkeypatch.setattr(reading, "BLOCK_BYTES", block)
        assert same(load_model(gpt2.directory, placement=place), gpt2.model)
        assert same(load_model(gpt2.directory, placement=device), gpt2.model)
    assert asked == {path: value.shape for path, value in named_parameters(gpt2.model).items()}


# ---- dtypes


@pytest.mark.parametrize(("kind", "numpy_kind"), [(torch.bfloat16, ml_dtypes.bfloat16), (torch.float16, np.float16)])
def test_sixteen_bit_weights_are_kept_or_cast(gpt2, tmp_path, kind, numpy_kind):
    oracle = oracle_models.build("gpt2").to(kind)
    oracle_models.save(oracle, tmp_path)
    model = load_model(tmp_path)
    assert {value.dtype for value in named_parameters(model).values()} == {np.dtype(numpy_kind)}
    expected = oracle.transformer.h[1].mlp.c_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(model.layers.mlp.down.kernel[...][1].astype(jnp.float32), expected)
    wide = load_model(tmp_path, dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide.layers.mlp.down.kernel[...][1], expected)
    assert not np.array_equal(wide.layers.mlp.down.kernel[...], gpt2.model.layers.mlp.down.kernel[...])


def test_mixed_dtypes_take_the_widest(gpt2, tmp_path):
    def mix(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float16 if "mlp" in name else ml_dtypes.bfloat16)

    model = load_model(altered(gpt2.directory, tmp_path / "mixed", tensors=mix))
    assert {value.dtype for value in named_parameters(model).values()} == {np.dtype(np.float32)}


def test_dtypes_that_cannot_be_had(gpt2, tmp_path):
    assert "dtype is int32" in refusal(gpt2.directory, dtype=jnp.int32)
    assert "enable_x64" in refusal(gpt2.directory, dtype=jnp.float64)
    with jax.enable_x64(True):
        assert load_model(gpt2.directory, dtype=jnp.float64).dtype == np.float64

    def enlarge(tensors: dict[str, np.ndarray]) -> None:
        tensors["transformer.h.1.mlp.c_fc.weight"][0, :2] = 1e5

    large = altered(gpt2.directory, tmp_path / "large", tensors=enlarge)
    assert load_model(large).dtype == np.float32
    assert "transformer.h.1.mlp.c_fc.weight holds 2 values too large for float16" in refusal(large, dtype=jnp.float16)


# ---- weights that do not fit


def test_all_structural_problems_at_once(gpt2, tmp_path):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        del tensors["transformer.h.1.attn.c_attn.bias"]
        del tensors["transformer.ln_f.weight"]
        tensors["transformer.h.3.ln_1.weight"] = np.ones(35, np.float32)
        tensors["score.weight"] = np.ones((2, 35), np.float32)
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:39]
        tensors["transformer.h.0.mlp.c_fc.weight"] = np.ones((45, 35), np.float32)
        tensors["transformer.h.2.mlp.c_fc.bias"] = np.ones(45, np.int32)

    message = refusal(altered(gpt2.directory, tmp_path / "spoiled", tensors=spoil))
    for part in (
        "transformer.h.1.attn.c_attn.bias [105] is missing",
        "transformer.ln_f.weight [35] is missing",
        "transformer.h.3.ln_1.weight [35] belongs to no parameter",
        "score.weight [2, 35] belongs to no parameter",
        "transformer.wpe.weight has shape [39, 35], but config.json asks for [40, 35]",
        "transformer.h.0.mlp.c_fc.weight has shape [45, 35], but config.json asks for [35, 45]",
        "transformer.h.2.mlp.c_fc.bias is stored as I32",
    ):
        assert part in message
    assert message.count("\n") == 7


def test_all_non_finite_weights_at_once(pairs, tmp_path):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = np.nan
        tensors["model.norm.weight"][:2] = np.inf

    message = refusal(altered(pairs["llama-3.1"].directory, tmp_path / "spoiled", tensors=spoil))
    assert "model.layers.1.mlp.down_proj.weight holds 1 NaN or infinite" in message
    assert "model.norm.weight holds 2 NaN or infinite" in message
    assert message.count("\n") == 2


def test_a_table_that_misses_or_repeats_a_parameter(monkeypatch, gpt2):
    shapes = {path: value.shape for path, value in named_parameters(gpt2.model).items()}
    rows = FAMILIES["gpt2"].weights(gpt2.model.config)
    for changed, named in ((rows[1:], "embedding"), ([*rows, Weight("again", ("final_norm.scale",))], "final_norm.scale")):
        family = FAMILIES["gpt2"].__class__(**{**vars(FAMILIES["gpt2"]), "weights": lambda config, rows=changed: rows})
        monkeypatch.setattr("kedit_jax.models.table.FAMILIES", {"gpt2": family})
        with pytest.raises(KeditError, match=rf"does not fill each parameter once: {named}$"):
            slots(gpt2.model.config, shapes)


# ---- files


def test_pickled_weights_are_refused(gpt2, tmp_path):
    shutil.copy(gpt2.directory / "config.json", tmp_path)
    assert "neither model.safetensors nor" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    message = refusal(tmp_path)
    assert "pytorch_model.bin" in message
    assert "AutoModelForCausalLM" in message
    assert f"from_pretrained({str(tmp_path)!r}).save_pretrained('converted')" in message


def test_a_hub_repository_of_pickled_weights(gpt2, tmp_path, monkeypatch):
    shutil.copy(gpt2.directory / "config.json", tmp_path)
    files = ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "original/x.pth"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_: files)
    message = refusal("some-one/some.model")
    assert "pytorch_model-00001-of-00002.bin, pytorch_model-00002-of-00002.bin)" in message
    assert "from_pretrained('some-one/some.model').save_pretrained('converted')" in message
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_: ["config.json"])
    assert "some-one/some.model holds no safetensors" in refusal("some-one/some.model")


def test_a_truncated_file(gpt2, tmp_path):
    broken = altered(gpt2.directory, tmp_path / "broken")
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "not a readable safetensors file" in refusal(broken)


@pytest.mark.parametrize("damage", ["empty", "header", "length", "not json"])
def test_a_corrupted_file(gpt2, tmp_path, damage):
    broken = altered(gpt2.directory, tmp_path / "broken") / "model.safetensors"
    content = bytearray(broken.read_bytes())
    match damage:
        case "empty":
            content = bytearray()
        case "header":
            at = content.index(b"data_offsets")
            content[at : at + 4] = b"xxxx"
        case "length":
            content[:8] = (2**62).to_bytes(8, "little")
        case "not json":
            content[8:12] = b"\xff\xfe\x00{"
    broken.write_bytes(content)
    message = refusal(broken.parent)
    assert "not a readable safetensors file" in message
    assert "download it again" in message


def test_a_file_cut_while_it_is_read(gpt2, tmp_path):
    path = altered(gpt2.directory, tmp_path / "cut") / "model.safetensors"
    tensors = read_header(path)
    path.write_bytes(path.read_bytes()[:-8])
    last = max(tensors.values(), key=lambda tensor: tensor.offset)
    with pytest.raises(CheckpointError, match="ends before its last tensor: download it again"):
        last.read()


def test_damaged_shards_and_misfits_in_one_error(gpt2, tmp_path):
    """What is wrong with files is no reason to keep silent about what is wrong with weights."""
    oracle_models.save(gpt2.oracle, tmp_path, max_shard_size="15KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    (tmp_path / shards[0]).unlink()
    content = (tmp_path / shards[1]).read_bytes()
    (tmp_path / shards[1]).write_bytes(content[: len(content) // 2])
    held = load_file(tmp_path / shards[2])
    wrong = next(name for name, value in held.items() if value.ndim == 2)
    held[wrong] = held[wrong][:-1].copy()
    save_file(held, tmp_path / shards[2])
    lost = next(name for name, file in index["weight_map"].items() if file == shards[0])
    message = refusal(tmp_path)
    assert f"{shards[0]} does not exist, but model.safetensors.index.json places" in message
    assert f"{shards[1]} is not a readable safetensors file" in message
    assert f"{wrong} has shape" in message
    assert message.count("\n") == 3
    assert lost not in message  # its file is named


def test_an_index_that_disagrees_with_its_shards(gpt2, tmp_path):
    oracle_models.save(gpt2.oracle, tmp_path, max_shard_size="15KB")
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    (tmp_path / shards[0]).unlink()
    held = load_file(tmp_path / shards[1])
    moved = next(iter(held))
    held["stray"] = held.pop(moved)
    save_file(held, tmp_path / shards[1])
    outside = next(name for name, file in index["weight_map"].items() if file == shards[2])
    index["weight_map"][outside] = "../elsewhere.safetensors"
    index_path.write_text(json.dumps(index))
    message = refusal(tmp_path)
    for part in (
        f"{shards[0]} does not exist",
        f"{shards[1]} lacks {moved}",
        f"{shards[1]} holds stray",
        "../elsewhere.safetensors: shards must lie beside the index",
    ):
        assert part in message
    index_path.write_text("{}")
    assert "has no weight_map" in refusal(tmp_path)


def test_directories_and_files_that_are_not_models(gpt2, tmp_path):
    assert "holds no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert "cannot be read as JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "holds no JSON object" in refusal(tmp_path)
    assert "there is no directory" in refusal(tmp_path / "absent")
    assert "there is no directory" in refusal("./absent")
    assert "is a file" in refusal(gpt2.directory / "config.json")


def test_hub_ids(gpt2, tmp_path, monkeypatch):
    asked: dict[str, Any] = {}

    def download(hub_id: str, **kwargs: Any) -> str:
        asked.update(kwargs, hub_id=hub_id)
        return str(gpt2.directory)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", download)
        assert same(load_model("some-one/some.model"), gpt2.model)
        assert asked["hub_id"] == "some-one/some.model"
        assert asked["ignore_patterns"] == ["*/*", "consolidated*"]
        assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked["allow_patterns"])
        assert read_config("some-one/some.model") == gpt2.model.config
        assert asked["allow_patterns"] == "config.json"  # and no weights
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("some-one/some.model")
    assert "'some-one/some.model' is no directory here" in message
    assert "could not be fetched" in message


# ---- configurations


def test_an_unknown_model_type(gpt2, tmp_path):
    for value, shown in (("mamba", "'mamba'"), (None, "None")):
        raw = {"model_type": value, "vocab_size": 3}
        known = "gemma2, gemma3_text, gpt2, gpt_neox, gptj, llama, mistral, phi3, qwen2, qwen3"
        with pytest.raises(CheckpointError, match=rf"model_type is {shown}; supported are {known}$"):
            config_from_json(raw)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "'mixtral', a mixture of experts (num_local_experts is 8)"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "'qwen3_moe', a mixture of experts (num_experts is 128)"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "a mixture of experts (n_routed_experts is 256)"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "text_config is 'gemma3_text'"),
    ],
)
def test_models_that_are_more_than_a_dense_decoder(raw, expected):
    with pytest.raises(CheckpointError) as error:
        config_from_json(raw)
    assert expected in str(error.value)
    assert "supported are gemma2, gemma3_text, gpt2" in str(error.value)


def test_missing_fields_all_at_once(pair, tmp_path):
    """Each field without which the model is not determined, and nothing else, is asked for."""
    with pytest.raises(CheckpointError) as error:
        config_from_json({"model_type": pair.model.config.family})
    needed = [line.split()[1] for line in str(error.value).splitlines()[1:]]
    assert all(line.endswith("is missing") for line in str(error.value).splitlines()[1:])
    raw = json.loads((pair.directory / "config.json").read_text())
    assert len(needed) >= 7
    assert set(needed) <= set(raw)
    config_from_json({name: raw[name] for name in ("model_type", *needed)})


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    ("gpt2", {"activation_function": "quick_gelu"}, "activation_function is 'quick_gelu': supported are gelu"),
    ("gpt2", {"activation_function": ["gelu"]}, "activation_function is ['gelu']: supported are gelu"),
    ("gpt2", {"activation_function": 3}, "activation_function is 3: supported are gelu"),
    ("gpt2", {"layer_norm_epsilon": 10**400}, "it must be a positive number"),
    ("gpt2", {"n_head": 4}, "n_embd is 35: it must be a multiple of n_head, 4"),
    ("gpt2", {"n_layer": "3"}, "n_layer is '3': it must be an integer"),
    ("gpt2", {"n_layer": True}, "n_layer is True: it must be an integer"),
    ("gpt2", {"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon is -1e-05: it must be a positive number"),
    ("gpt2", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1: it must be true or false"),
    ("gpt2", {"eos_token_id": "x"}, "eos_token_id is 'x'"),
    ("gpt2", {"bos_token_id": [1, 2]}, "bos_token_id is [1, 2]: it must be one token id"),
    ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    ("gpt2", {"compression_config": {"format": "fp8"}}, "load the unquantized checkpoint, stored as float32, bfloat16"),
    ("llama-3.1", {"num_local_experts": 4}, "num_local_experts is 4, but only 0 or 1 is supported"),
    ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads is"),
    ("gptj", {"rotary_dim": 7}, "7 rotary components"),
    ("gptj", {"rotary_dim": 12}, "12 rotary components"),
    ("gptj", {"rotary_dim": None}, "rotary_dim is missing"),
    ("gptj", {"rotary": False}, "rotary is False"),
    ("llama-3.1", {"num_key_value_heads": 3}, "4 heads cannot share 3 key/value heads"),
    ("llama-3.1", {"hidden_act": "xielu"}, "hidden_act is 'xielu'"),
    ("llama-3.1", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn': supported are default"),
    ("llama-3.1", {"rope_parameters": {"rope_type": {}}}, "rope_type is {}: supported are default"),
    ("phi3", {"rope_parameters": {"type": []}}, "type is []: supported are default, longrope, su"),
    ("llama-3.1", {"original_max_position_embeddings": "9"}, "original_max_position_embeddings is '9'"),
    ("llama-3.1", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type is 'dynamic'"),
    ("llama-3.1", {"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
    ("llama-3.1", {"rope_parameters": {"rope_type": "llama3"}}, "original_max_position_embeddings is missing"),
    ("llama-3.1", {"rope_parameters": "llama3"}, "rope_parameters is 'llama3': it must be an object"),
    ("llama-3.1", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ("llama-3.1", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama-3.1", {"rope_scaling": {"type": "default"}}, "both rope_parameters and rope_scaling"),
    ("llama-3.1", {"head_dim": 7}, "7 rotary components"),
    ("llama-3.1", {"head_dim": None, "num_attention_heads": 6}, "hidden_size is 40: without head_dim"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "use_sliding_window is not set"),
    (
        "qwen2-windowed",
        {"sliding_window": None},
        "only 'full_attention' throughout is supported: use_sliding_window is not set, or sliding_window is null",
    ),
    (
        "qwen2-windowed",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types has 2 entries: there must be 3",
    ),
    ("qwen2-windowed", {"layer_types": 3 * ["chunked_attention"]}, "layer_types is ['chunked_attention'"),
    ("qwen3", {"head_dim": None}, "head_dim is missing"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0: it must be an integer of at least 1"),
    ("mistral", {"layer_types": 3 * ["full_attention"]}, "this family attends alike in all layers, and sliding_window is 4"),
    ("gpt-neox", {"num_attention_heads": 5}, "hidden_size is 48: it must be a multiple of num_attention_heads, 5"),
    ("gpt-neox", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type is 'dynamic': supported are default, linear"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0: it must be a positive number"),
    ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0, but only absent is supported"),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type is 'yarn'"),
    ("phi3", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3': supported are default, longrope, su"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "long_factor is missing"),
    (
        "phi3-longrope",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [-1]}},
        "long_factor is [-1]: it must be a list of positive numbers",
    ),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "short_factor has 1 entries: 12 rotary components need half as many",
    ),
]


@pytest.mark.parametrize(("name", "change", "expected"), REFUSED, ids=[f"{row[0]}-{next(iter(row[1]))}" for row in REFUSED])
def test_what_is_not_implemented_is_refused(pairs, name, change, expected):
    raw = json.loads((pairs[name].directory / "config.json").read_text())
    config_from_json(raw)
    with pytest.raises(CheckpointError) as error:
        config_from_json(raw | change)
    assert expected in str(error.value)


def test_original_positions_of_gemma3_stand_in_their_section(pairs):
    """transformers overrides them by the field beside `rope_parameters` only where all layers share one section."""
    raw = json.loads((pairs["gemma3"].directory / "config.json").read_text())
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    raw["rope_parameters"]["full_attention"] = {**scaled, "original_max_position_embeddings": 32}
    config = config_from_json(raw | {"original_max_position_embeddings": 16})
    assert config.rotary is not None
    assert config.rotary.scaling == Llama3Scaling(8.0, 1.0, 4.0, 32)


def test_scaling_factors_out_of_order(pairs):
    raw = json.loads((pairs["llama-3.1"].directory / "config.json").read_text())
    raw["rope_parameters"]["low_freq_factor"] = 4.0
    with pytest.raises(CheckpointError, match=r"low_freq_factor is 4.0: it must be below high_freq_factor, 3.7"):
        config_from_json(raw)


# Fields of transformers' configurations that do not change the logits of a pretrained model.
INERT = {
    "architectures", "chunk_size_feed_forward", "dtype", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "max_window_layers", "output_attentions", "output_hidden_states", "pretraining_tp",
    "problem_type", "reorder_and_upcast_attn", "return_dict", "sliding_window", "transformers_version", "use_cache",
    "_name_or_path", "classifier_dropout", "hidden_dropout",
    "_sliding_window_pattern",  # what layer_types were made of
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
}  # fmt: skip


class _Recording(dict[str, Any]):
    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def test_every_field_of_transformers_is_read_or_known_to_be_inert(pair):
    raw = _Recording(pair.oracle.config.to_dict())
    config_from_json(raw)
    assert set(raw) - raw.read - INERT == set()


# ---- tokenizers


def _save_tokenizer(directory: Path) -> None:
    words = Tokenizer(WordLevel({"[unk]": 0, "Paris": 1, "lies": 2}, unk_token="[unk]"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[unk]").save_pretrained(directory)


def test_model_and_tokenizer(gpt2, tmp_path):
    directory = altered(gpt2.directory, tmp_path / "both")
    _save_tokenizer(directory)
    model, tokenizer = load(directory)
    assert same(model, gpt2.model)
    encoded = tokenizer("Paris lies", return_offsets_mapping=True)
    assert encoded["input_ids"] == [1, 2]
    assert [tuple(pair) for pair in encoded["offset_mapping"]] == [(0, 5), (6, 10)]


def test_no_tokenizer_or_a_slow_one(tmp_path):
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is slow and gives no character offsets"):
        load_tokenizer(tmp_path)


def test_no_padding_token_is_needed(tmp_path):
    """Rows are padded by their validity, so a tokenizer without such a token stays without."""
    _save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token is None
    assert tokenizer(["Paris", "Paris lies"], padding=False)["input_ids"] == [[1], [1, 2]]


# ---- identity


def test_a_younger_field_at_its_default_changes_no_fingerprint():
    """Sessions and moments that were stored before there was such a field name their model by it."""
    config = gpt2_config(vocab_size=9, n_layers=2, d_model=6, n_heads=3, max_positions=5, eos_id=1)
    assert json.dumps(as_record(config), sort_keys=True) == (
        '{"activation": "gelu_tanh", "biases": {"attn_out": true, "head": false, "mlp": true, "qkv": true}, "bos_id": 1, '
        '"d_ff": 24, "d_model": 6, "eos_ids": [1], "family": "gpt2", "gated_mlp": false, "head_dim": 2, "max_positions": 5, '
        '"n_heads": 3, "n_kv_heads": 3, "n_layers": 2, "norm": "layer", "norm_eps": 1e-05, "pad_id": null, '
        '"parallel_block": false, "rotary": null, "tie_embeddings": true, "vocab_size": 9}'
    )
    windowed = dataclasses.replace(config, local=LocalAttention(3, (True, False)))
    assert as_record(windowed)["local"] == {"window": 3, "layers": (True, False), "rotary": None}


def test_fingerprint(gpt2, pairs, tmp_path):
    fingerprint = model_fingerprint(gpt2.model)
    assert fingerprint == model_fingerprint(load_model(gpt2.directory))
    assert len(fingerprint) == 64

    def nudge(tensors: dict[str, np.ndarray]) -> None:
        tensors["transformer.h.2.mlp.c_proj.weight"].view(np.int32)[0, 0] ^= 1

    one_bit = load_model(altered(gpt2.directory, tmp_path / "bit", tensors=nudge))
    one_field = load_model(altered(gpt2.directory, tmp_path / "field", config=lambda c: c.update(layer_norm_epsilon=4e-4)))
    cast = load_model(gpt2.directory, dtype=jnp.bfloat16)
    others = [model_fingerprint(model) for model in (one_bit, one_field, cast, pairs["qwen2"].model)]
    assert len({fingerprint, *others}) == 5
