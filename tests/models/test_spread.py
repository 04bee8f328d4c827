"""Where parameters lie on a mesh, without any device: an abstract mesh says as much."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from kedit_jax.errors import KeditError
from kedit_jax.models import ModelConfig, Spread, abstract_decoder, make_mesh, named_parameters
from kedit_jax.models.registry import config_from_json
from kedit_jax.models.spread import apart, leading, share, together

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 8192, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def abstract(data: int, model: int) -> AbstractMesh:
    return AbstractMesh((data, model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


@pytest.fixture(scope="module")
def llama() -> ModelConfig:
    return config_from_json(LLAMA, "llama")


def held(config: ModelConfig, spread: Spread) -> int:
    shapes = {path: leaf.shape for path, leaf in named_parameters(abstract_decoder(config)).items()}
    return sum(share(spread.mesh, spread.at_rest(path, shape), shape) for path, shape in shapes.items())


@pytest.mark.parametrize(("data", "model"), [(1, 16), (4, 4), (2, 8), (16, 1)])
def test_a_chip_holds_its_share_of_the_model(llama: ModelConfig, data: int, model: int) -> None:
    whole = sum(leaf.size for leaf in named_parameters(abstract_decoder(llama)).values())
    assert held(llama, Spread(abstract(data, model), llama)) == pytest.approx(whole / 16, rel=1e-3)


def test_every_kernel_is_cut_along_both_axes(llama: ModelConfig) -> None:
    spread = Spread(abstract(4, 4), llama)
    for path, leaf in named_parameters(abstract_decoder(llama)).items():
        axes = {axis for axis in spread.at_rest(path, leaf.shape) if axis}
        assert axes == ({"data", "model"} if leaf.ndim > 1 and "norm" not in path else set()), path


def test_keys_are_cut_along_their_width(llama: ModelConfig) -> None:
    spread = Spread(abstract(4, 4), llama)
    assert spread.at_rest("layers.mlp.down.kernel", (32, 14336, 4096)) == P(None, "model", "data")
    assert spread.at_rest("layers.mlp.up.kernel", (32, 4096, 14336)) == P(None, "data", "model")


def test_what_an_axis_does_not_divide_stays_whole() -> None:
    heads = {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 128}
    odd = config_from_json(LLAMA | {"vocab_size": 50257} | heads, "odd")
    spread = Spread(abstract(2, 8), odd)
    assert spread.at_rest("embedding", (50257, 4096)) == P(None, "data")
    assert spread._heads_divide() == (False, False)


def test_more_devices_than_there_are_is_an_error_that_says_so() -> None:
    with pytest.raises(KeditError, match=r"data=64, model=2 has 128 devices, but there are \d+"):
        make_mesh(64, 2)
    with pytest.raises(KeditError, match="data=0"):
        make_mesh(0)


def test_parts_are_stacked_and_taken_apart(llama: ModelConfig) -> None:
    """On a mesh of one device; the stack of three parts on two shares ends in a copy."""

    @dataclasses.dataclass(frozen=True)
    class Two(Spread):
        @property
        def data(self) -> int:
            return 2

    spread = Two(make_mesh(1, 1, jax.devices()[:1]), llama)
    parts: list[Any] = [{"a": np.full(3, number), "b": np.float32(number)} for number in range(3)]
    stacks = together(spread, parts)
    assert [stack["a"].shape for stack in stacks] == [(2, 3), (2, 3)]
    assert np.asarray(stacks[1]["b"]).tolist() == [2, 2]
    again = apart(spread, stacks, 3)
    assert [part["a"].tolist() for part in again] == [[0] * 3, [1] * 3, [2] * 3]
    assert together(None, parts) == parts


def test_rows_are_filled_up_with_zeros() -> None:
    assert leading(np.ones((3, 2)), 4).tolist() == [[1, 1]] * 3 + [[0, 0]]
    assert leading(np.ones((4, 2)), 4).shape == (4, 2)


def test_a_model_on_no_mesh_is_as_it_was(model: Any) -> None:
    assert model.spread is None
    assert jnp.asarray(model.embedding[...]).sharding.device_set == {jax.devices()[0]}
