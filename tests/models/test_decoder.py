"""The decoder's own promises: segments, caches, padding, precision, cost."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from oracle_models import padded, quick_jit

from kedit_jax.errors import KeditError
from kedit_jax.models import KV, Decoder, ModelConfig, causal_mask, generate, gpt2_config, load_model, positions_of
from kedit_jax.models import layers as layers_module
from kedit_jax.models.config import LocalAttention
from kedit_jax.models.layers import attend, windowed
from kedit_jax.models.loading import abstract_decoder
from kedit_jax.models.parameters import named_parameters
from kedit_jax.models.registry import config_from_json


def _inputs(model: Decoder, side: str = "left") -> tuple[jax.Array, jax.Array, jax.Array, np.ndarray]:
    tokens, valid = padded(model.config.vocab_size, side)
    return jnp.asarray(tokens), positions_of(jnp.asarray(valid)), causal_mask(jnp.asarray(valid)), valid


def test_segments_compose_to_the_whole(gpt2):
    model = gpt2.model
    tokens, positions, mask, valid = _inputs(model)

    @quick_jit
    def both(model: Decoder) -> Any:
        h = model.embed(tokens, positions)
        whole = model.run_layers(h, 0, 3, positions=positions, mask=mask)
        lower, keys = model.run_layers(h, 0, 2, positions=positions, mask=mask)
        upper, more = model.run_layers(lower, 2, 3, positions=positions, mask=mask)
        nothing = model.run_layers(h, 1, 1, positions=positions, mask=mask)[0]
        return whole, (upper, jnp.concatenate([keys, more])), (h, nothing)

    whole, segments, (h, nothing) = both(model)
    for one, other in zip(whole, segments, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(h, nothing)
    assert np.abs(np.asarray(whole[0]) - np.asarray(h))[valid].max() > 0.1


@pytest.mark.parametrize("name", ["llama-3.1", "gemma3"])
def test_past_and_rest_equal_the_whole_pass(pairs, name):
    """With sliding windows, too, whose distances go back into the past."""
    model = pairs[name].model
    tokens, positions, mask, valid = _inputs(model)
    cut = 6

    @quick_jit
    def both(model: Decoder) -> Any:
        h = model.embed(tokens, positions)
        whole, keys, kv = model.prefill(h, 1, 3, positions=positions, mask=mask)
        _, _, past = model.prefill(h[:, :cut], 1, 3, positions=positions[:, :cut], mask=mask[:, :cut, :cut])
        rest = model.prefill(h[:, cut:], 1, 3, positions=positions[:, cut:], mask=mask[:, cut:], past=past)
        forgetful = model.run_layers(h[:, cut:], 1, 3, positions=positions[:, cut:], mask=mask[:, cut:, cut:])
        return (whole[:, cut:], keys[:, :, cut:], jax.tree.map(lambda part: part[:, :, cut:], kv)), rest, forgetful

    whole, rest, forgetful = both(model)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(rest), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(whole[0]) - np.asarray(forgetful[0]))[valid[:, cut:]].max() > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "llama-3.1", "gemma2", "gemma3"])
def test_causal_rows_attend_in_blocks(pairs, name, monkeypatch):
    """Rows of several blocks, the last one shorter; the negative control sees what is behind it, which blocks leave out."""
    monkeypatch.setattr(layers_module, "CAUSAL_BLOCK", 4)
    model = pairs[name].model
    tokens, positions, mask, valid = _inputs(model)
    assert tokens.shape[1] > 8
    assert tokens.shape[1] % 4

    @quick_jit
    def both(model: Decoder) -> Any:
        h = model.embed(tokens, positions)

        def run(mask: jax.Array, *, causal: bool) -> jax.Array:
            return model.run_layers(h, 0, 3, positions=positions, mask=mask, causal=causal)[0]

        everything = jnp.broadcast_to(jnp.asarray(valid)[:, None, :], mask.shape)
        return run(mask, causal=True), run(mask, causal=False), run(everything, causal=True), run(everything, causal=False)

    blocks, whole, cut, free = (np.asarray(h)[valid] for h in both(model))
    np.testing.assert_allclose(blocks, whole, rtol=1e-5, atol=1e-5)
    assert np.abs(cut - free).max() > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "gemma3"])
def test_the_last_layer_at_some_tokens(pairs, name):
    """`run_last` gives what the whole layer gives in these columns, behind a past or not."""
    model = pairs[name].model
    tokens, positions, mask, _ = _inputs(model, "right")
    at, cut = jnp.array([[8, 5], [4, 3], [1, 1]]), 1

    @quick_jit
    def both(model: Decoder) -> Any:
        h, _ = model.run_layers(model.embed(tokens, positions), 0, 2, positions=positions, mask=mask)
        whole, _ = model.run_layers(h, 2, 3, positions=positions, mask=mask)
        alone = model.run_last(h, positions=positions, mask=mask, at=at)
        _, _, past = model.prefill(h[:, :cut], 2, 3, positions=positions[:, :cut], mask=mask[:, :cut, :cut])
        behind = model.run_last(h[:, cut:], positions=positions[:, cut:], mask=mask[:, cut:], at=at - cut, past=past)
        return jnp.take_along_axis(whole, at[:, :, None], axis=1), alone, behind

    expected, alone, behind = both(model)
    np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(behind, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "gemma3"])
@pytest.mark.parametrize("layer", [1, 2])
def test_a_layer_some_of_whose_projections_are_known(pairs, name, layer):
    """`run_one` gives what the whole layer gives and uses what it is given; the other tokens' gradient is the same."""
    model = pairs[name].model
    tokens, positions, mask, _ = _inputs(model, "right")
    first = 2
    where = {"positions": positions, "mask": mask}

    @quick_jit
    def both(model: Decoder) -> Any:
        h, _ = model.run_layers(model.embed(tokens, positions), 0, layer, **where)
        known = model.projections(h, layer, positions=positions)
        known = jax.tree.map(lambda part: part[:, first:], known)

        def whole(begin: Any) -> Any:
            return model.run_layers(h.at[:, :first].set(begin), layer, layer + 1, **where)[0]

        def given(begin: Any, known: Any) -> Any:
            return model.run_one(h.at[:, :first].set(begin), layer, known=known, **where)

        found = [jax.vjp(run, h[:, :first]) for run in (whole, lambda begin: given(begin, known))]
        slopes = [to_begin(jnp.cos(7 * out))[0] for out, to_begin in found]
        other = given(h[:, :first], jax.tree.map(lambda part: part[::-1], known))
        return [out for out, _ in found], slopes, other

    (expected, out), (expected_slope, slope), other = both(model)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(other) - np.asarray(expected))[:, first:].max() > 1e-2


def test_windows_go_by_position():
    """Not by column: the past may lie anywhere before, and padding takes no place."""
    mask = np.ones((1, 2, 5), bool)
    seen = windowed(jnp.asarray(mask), jnp.array([[7, 8]]), jnp.array([[6, 2, 5, 7, 8]]), 3)
    np.testing.assert_array_equal(seen, [[[1, 0, 1, 1, 1], [1, 0, 0, 1, 1]]])


def test_a_window_needs_the_positions_of_the_past(pairs):
    model = pairs["gemma3"].model
    tokens, positions, mask, _ = _inputs(model)
    h = model.embed(tokens, positions)
    past = KV(*2 * [jnp.zeros((1, 3, 2, 1, 14))])
    mask = jnp.ones((3, 9, 11), bool)
    with pytest.raises(KeditError, match="`past` holds no positions, which sliding windows need: take it from `prefill`"):
        model.run_layers(h, 0, 1, positions=positions, mask=mask, past=past)
    model.run_layers(h, 1, 2, positions=positions, mask=mask, past=past)  # a global layer
    empty = KV(*2 * [jnp.zeros((0, 3, 2, 1, 14))], positions=jnp.zeros((0, 3, 2), jnp.int32))
    same, _ = model.run_layers(h, 1, 1, positions=positions, mask=mask, past=empty)
    np.testing.assert_array_equal(same, h)


def test_long_rope_ends_where_its_short_factors_do(pairs):
    """Beyond, other factors hold for all of the sequence: NaN rather than a wrong answer; `generate` says so before."""
    model = pairs["phi3-longrope"].model
    limit = model.config.position_limit
    assert limit == 23
    tokens = jnp.asarray(np.random.default_rng(0).integers(5, 59, (1, limit + 1)), jnp.int32)
    assert np.isfinite(model(tokens[:, :limit])).all()
    assert np.isnan(model(tokens)).all()
    with pytest.raises(KeditError, match="25 positions are needed, but the model computes LongRoPE for 23"):
        generate(model, tokens[:, :limit], jnp.ones((1, limit), bool), 3, key=jax.random.key(0))


def test_gradient_through_segments_is_that_of_the_whole(gpt2):
    """One sequence is nothing but padding: its attention rows are empty, and must not give NaN."""
    tokens, positions, mask, _ = _inputs(gpt2.model, "right")
    mask = mask.at[2].set(False)

    @quick_jit
    def gradients(model: Decoder) -> tuple[Decoder, Decoder]:
        def loss(model: Decoder, bounds: list[int]) -> jax.Array:
            h = model.embed(tokens, positions)
            for start, stop in itertools.pairwise(bounds):
                h, _ = model.run_layers(h, start, stop, positions=positions, mask=mask)
            return jnp.square(model.logits(h)).mean()

        return jax.grad(loss)(model, [0, 3]), jax.grad(loss)(model, [0, 1, 3])

    whole, segments = gradients(gpt2.model)
    for path, value in named_parameters(whole).items():
        assert np.isfinite(value).all(), path
        assert np.abs(value).max() > 0, path
        np.testing.assert_allclose(
            value, named_parameters(segments)[path], rtol=1e-4, atol=1e-6 * float(jnp.abs(value).max()) + 1e-9, err_msg=path
        )


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4), (4, 4)])
def test_layers_that_do_not_exist(gpt2, start, stop):
    tokens, positions, mask, _ = _inputs(gpt2.model)
    h = gpt2.model.embed(tokens, positions)
    with pytest.raises(KeditError, match=rf"layers {start}:{stop} do not exist.*<= 3"):
        gpt2.model.run_layers(h, start, stop, positions=positions, mask=mask)


def test_shapes_that_do_not_fit(gpt2):
    tokens, positions, mask, _ = _inputs(gpt2.model)
    h = gpt2.model.embed(tokens, positions)
    with pytest.raises(KeditError, match="mask covers 8 attended tokens, but there are 0 past and 9 new"):
        gpt2.model.run_layers(h, 0, 3, positions=positions, mask=mask[:, :, 1:])
    past = KV(*2 * [jnp.zeros((2, 3, 4, 5, 7))])
    with pytest.raises(KeditError, match="holds 2 layers, but layers 0:3 run"):
        gpt2.model.run_layers(h, 0, 3, positions=positions, mask=jnp.ones((3, 9, 13), bool), past=past)


def test_out_of_range_lookups_are_seen_not_clamped(gpt2):
    tokens, positions, _, _ = _inputs(gpt2.model)
    h = gpt2.model.embed(tokens.at[0, 0].set(61), positions.at[1, 1].set(40))
    assert np.isnan(h[0, 0]).all()
    assert np.isnan(h[1, 1]).all()
    assert np.isfinite(h[2]).all()


def test_mask_and_positions():
    valid = jnp.array([[False, True, True], [True, True, False], [False, False, False]])
    np.testing.assert_array_equal(positions_of(valid), [[0, 0, 1], [0, 1, 1], [0, 0, 0]])
    mask = np.asarray(causal_mask(valid))
    np.testing.assert_array_equal(mask[0], [[0, 0, 0], [0, 1, 0], [0, 1, 1]])
    np.testing.assert_array_equal(mask[1], [[1, 0, 0], [1, 1, 0], [1, 1, 0]])
    assert not mask[2].any()


def test_attention_against_its_definition():
    """Grouped heads, two sources, an empty row; float64, so that nothing but the formula is tested."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(1, 3, 4, 5)), rng.normal(size=(1, 6, 2, 5)), rng.normal(size=(1, 6, 2, 5))
    mask = np.array([[[1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]], bool)
    expected = np.zeros((1, 3, 4, 5))
    for t in range(2):
        for head in range(4):
            scores = k[0, mask[0, t], head // 2] @ q[0, t, head] / np.sqrt(5)
            weights = np.exp(scores) / np.exp(scores).sum()
            expected[0, t, head] = weights @ v[0, mask[0, t], head // 2]
    with jax.enable_x64(True):
        sources = tuple(KV(jnp.asarray(k[:, part]), jnp.asarray(v[:, part])) for part in (slice(0, 2), slice(2, 6)))
        out = np.asarray(attend(jnp.asarray(q), sources, jnp.asarray(mask)))
    assert out.dtype == np.float64
    np.testing.assert_allclose(out[:, :2], expected[:, :2], atol=1e-14)
    assert not out[:, 2].any()


def _dtypes(jaxpr: Any) -> set[str]:
    """Floating dtypes of everything that a program computes, inside its loops, too."""
    seen = set()
    for equation in jaxpr.eqns:
        seen |= {str(var.aval.dtype) for var in equation.outvars if jnp.issubdtype(var.aval.dtype, jnp.floating)}
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            seen |= _dtypes(inner)
    return seen


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama-3.1", "gemma2", "gemma3", "phi3-longrope"])
def test_a_float64_model_is_float64_throughout(pairs, name):
    with jax.enable_x64(True):
        model = load_model(pairs[name].directory, dtype=jnp.float64)
        tokens, _ = padded(model.config.vocab_size, "left")
        program = jax.make_jaxpr(lambda model: model(jnp.asarray(tokens)))(model)
        assert _dtypes(program.jaxpr) == {"float64"}
    tokens32 = jnp.asarray(tokens)
    assert _dtypes(jax.make_jaxpr(lambda model: model(tokens32))(pairs[name].model).jaxpr) == {"float32"}


@pytest.mark.parametrize("name", ["llama-3.1", "gemma2"])
def test_bfloat16_products_accumulate_in_float32(pairs, name):
    model = load_model(pairs[name].directory, dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    tokens, positions, mask, valid = _inputs(model)

    def forward(model: Decoder) -> tuple[jax.Array, jax.Array]:
        h, keys = model.run_layers(model.embed(tokens, positions), 0, 3, positions=positions, mask=mask)
        return model.logits(h), keys

    accumulated = set()

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive is lax.dot_general_p:
                assert {str(var.aval.dtype) for var in equation.invars} == {"bfloat16"}
                accumulated.add(str(equation.outvars[0].aval.dtype))
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(forward)(model).jaxpr)
    assert accumulated == {"float32"}
    logits, keys = quick_jit(forward)(model)
    assert (logits.dtype, keys.dtype) == (jnp.float32, jnp.bfloat16)
    wide, _ = quick_jit(forward)(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model))
    error = np.linalg.norm((logits - wide)[valid]) / np.linalg.norm(np.asarray(wide)[valid])
    assert error < 0.03  # a residual stream of 8 bits


@pytest.mark.parametrize("windows", [False, True])
def test_unused_outputs_and_weights_cost_no_memory(windows):
    """The gradient in h of a suffix holds neither the layers' keys nor a copy of their weights, with or without windows."""
    config = gpt2_config(vocab_size=64, n_layers=4, d_model=64, n_heads=4, d_ff=1024, max_positions=32)
    if windows:
        config = dataclasses.replace(config, local=LocalAttention(3, (True, False, True, False)), one_plus_scale=True)
    model = abstract_decoder(config)
    tokens = jnp.ones((4, 16), jnp.int32)
    valid = jnp.ones(tokens.shape, bool)
    positions, mask = positions_of(valid), causal_mask(valid)

    def loss(h: jax.Array, model: Decoder) -> jax.Array:
        h, _ = model.run_layers(h, 1, 4, positions=positions, mask=mask)
        return jnp.square(h).sum()

    h = jax.ShapeDtypeStruct((*tokens.shape, config.d_model), jnp.float32)
    program = quick_jit(jax.grad(loss)).lower(h, model).compile()
    one_layer = sum(
        4 * value.size // config.n_layers for path, value in named_parameters(model).items() if path.startswith("layers.")
    )
    one_layer += 6 * tokens.size * config.d_ff * 4  # activations of one MLP and their cotangents
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * one_layer


def test_random_initialisation():
    config = gpt2_config(vocab_size=300, n_layers=8, d_model=64, n_heads=4, max_positions=32, eos_id=2)
    build = quick_jit(lambda key: Decoder(config, rngs=nnx.Rngs(key)))
    parameters, again, other = (named_parameters(build(jax.random.key(seed))) for seed in (3, 3, 4))
    for path, value in parameters.items():
        np.testing.assert_array_equal(value, again[path])
        std = 0.02 / 4 if path.endswith(("o.kernel", "down.kernel")) else 0.02
        if path.endswith(("kernel", "embedding")):
            assert abs(float(value.std()) / std - 1) < 0.03, path
        else:
            assert np.unique(value).tolist() == [float(path.endswith("scale"))], path
    assert not np.array_equal(parameters["embedding"], other["embedding"])
    half = abstract_decoder(config, jnp.bfloat16)
    assert {value.dtype for value in named_parameters(half).values()} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(KeditError, match=r"d_model is 66.*n_heads, 4"):
        gpt2_config(vocab_size=300, n_layers=8, d_model=66, n_heads=4, max_positions=32)


LLAMA3_SCALING = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2-xl": (
        {
            "model_type": "gpt2", "vocab_size": 50257, "n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024,
            "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
        },
        1_557_611_200,
    ),
    "gpt-j-6b": (
        {
            "model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048,
            "rotary_dim": 64, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "rotary": True,
            "tie_word_embeddings": False,
        },
        6_050_882_784,
    ),
    "llama-3-8b": (
        {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": None,
            "tie_word_embeddings": False,
        },
        8_030_261_248,
    ),
    "llama-3.1-70b": (
        {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
            "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_act": "silu",
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "rope_scaling": LLAMA3_SCALING, "tie_word_embeddings": False,
        },
        70_553_706_496,
    ),
    "pythia-6.9b": (
        {
            "model_type": "gpt_neox", "vocab_size": 50432, "hidden_size": 4096, "intermediate_size": 16384,
            "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "gelu", "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True,
            "tie_word_embeddings": False,
        },
        6_857_302_016,
    ),
    "mistral-7b": (
        {
            "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
        7_241_732_096,
    ),
    "qwen3-8b": (
        {
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "hidden_act": "silu", "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
            "rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 36,
            "attention_bias": False, "tie_word_embeddings": False,
        },
        8_190_735_360,
    ),
    "gemma-2-9b": (
        {
            "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336,
            "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "query_pre_attn_scalar": 256, "sliding_window": 4096,
            "sliding_window_size": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
            "attention_bias": False, "cache_implementation": "hybrid",
        },
        9_241_705_984,
    ),
    "gemma-3-1b": (
        {
            "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
            "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
            "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None, "query_pre_attn_scalar": 256,
            "sliding_window": 512, "sliding_window_pattern": 6, "attn_logit_softcapping": None,
            "final_logit_softcapping": None, "attention_bias": False,
        },
        999_885_952,
    ),
    "phi-3-mini-4k": (
        {
            "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu",
            "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 2047, "tie_word_embeddings": False,
        },
        3_821_079_552,
    ),
    "llama-3.1-8b": (
        {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "rope_scaling": LLAMA3_SCALING, "tie_word_embeddings": False,
        },
        8_030_261_248,
    ),
    "qwen2.5-7b": (
        {
            "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_act": "silu",
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 131072,
            "use_sliding_window": False, "tie_word_embeddings": False,
        },
        7_615_616_512,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_models_by_shape_alone(name):
    raw, count = PUBLISHED[name]
    config: ModelConfig = config_from_json(raw)
    model = abstract_decoder(config, jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    assert sum(int(np.prod(value.shape)) for value in named_parameters(model).values()) == count
    logits = jax.eval_shape(lambda model: model(jnp.ones((2, 5), jnp.int32)), model)
    assert (logits.shape, logits.dtype) == ((2, 5, config.vocab_size), jnp.float32)
