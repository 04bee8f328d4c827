"""How much memory loading takes, and that a model can be spread over devices; each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from kedit_jax.models import named_parameters
from kedit_jax.models.loading import abstract_decoder
from kedit_jax.models.registry import config_from_json
from kedit_jax.models.table import slots

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model_type": "llama", "vocab_size": 40_000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16,
    "num_attention_heads": 12, "num_key_value_heads": 6, "hidden_act": "silu", "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
ONE_SHARD = 200 * 2**20


def write_shards(directory: Path, dtype: Any, shard_bytes: int) -> float:
    """A checkpoint of the configuration with random weights; the size of its largest shard in MiB."""
    config = config_from_json(CONFIG)
    shapes = {path: value.shape for path, value in named_parameters(abstract_decoder(config)).items()}
    rng = np.random.default_rng(0)
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, slot in slots(config, shapes).items():
        if shards[-1] and sum(value.nbytes for value in shards[-1].values()) >= 0.9 * shard_bytes:
            shards.append({})
        shards[-1][name] = rng.standard_normal(slot.shape, np.float32).astype(dtype)
    weight_map = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    assert len(shards) > 2
    return max(path.stat().st_size for path in directory.glob("*.safetensors")) / 2**20


def run(*command: str, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    directory = tmp_path_factory.mktemp("shards")
    return directory, write_shards(directory, ml_dtypes.bfloat16, ONE_SHARD // 2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured as Linux tells it")
@pytest.mark.parametrize("dtype", ["kept", "float32"])
def test_peak_memory_is_the_model_and_a_little_of_a_shard(checkpoint, dtype, record_property):
    directory, shard = checkpoint
    measured = run("tests/models/loading_memory.py", str(directory), dtype)
    record_property("peak", measured["peak"])
    assert measured["model"] > 3 * shard
    assert measured["peak"] <= measured["model"] + 1.2 * shard, measured


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured as Linux tells it")
def test_control_all_files_at_once_are_noticed(checkpoint):
    directory, shard = checkpoint
    measured = run("tests/models/loading_memory.py", str(directory), "kept", "whole")
    assert measured["peak"] > measured["model"] + 1.2 * shard


SPREAD = """
import json, sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from kedit_jax.models import load_model, named_parameters, reading
mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
def place(path, shape):
    wide = shape[-1] % 2 == 0 and len(shape) > 1
    return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "model") if wide else PartitionSpec())
alone = named_parameters(load_model(sys.argv[1]))
for block in (reading.BLOCK_BYTES, 512):
    reading.BLOCK_BYTES = block
    spread = named_parameters(load_model(sys.argv[1], placement=place))
    assert all(value.sharding == place(path, value.shape) for path, value in spread.items())
    assert all(np.array_equal(value, alone[path]) for path, value in spread.items())
print(json.dumps(sum(len({shard.device for shard in value.addressable_shards}) == 2 for value in spread.values())))
"""


def test_a_model_spread_over_two_devices(pairs):
    on_both = run("-c", SPREAD, str(pairs["llama-3.1"].directory), XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert on_both == len(named_parameters(pairs["llama-3.1"].model))
