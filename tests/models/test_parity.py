"""Every family against transformers' own torch model of the same checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle_models
import pytest
import torch
from oracle_models import ONE_A_FAMILY, TOLERANCE, altered, padded, quick_jit, torch_layers, torch_outputs

from kedit_jax.models import (
    Decoder,
    causal_mask,
    generate,
    load_model,
    named_parameters,
    positions_of,
    save_model,
    with_parameters,
)


def outputs(model: Decoder, tokens: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    positions = positions_of(valid)
    h = model.embed(tokens, positions)
    h, keys = model.run_layers(h, 0, model.config.n_layers, positions=positions, mask=causal_mask(valid))
    return model.logits(h), keys


@quick_jit
def layer_outputs(model: Decoder, tokens: jax.Array, valid: jax.Array) -> jax.Array:
    """The residual stream after each layer, run one by one as an editor does."""
    positions, mask = positions_of(valid), causal_mask(valid)
    streams = [model.embed(tokens, positions)]
    for layer in range(model.config.n_layers):
        streams.append(model.run_layers(streams[-1], layer, layer + 1, positions=positions, mask=mask)[0])
    return jnp.stack(streams[1:])


jit_outputs = jax.jit(outputs)
quick_outputs = quick_jit(outputs)  # for the controls with another configuration, each of which compiles anew


def logit_difference(pair: Any, model: Decoder) -> float:
    tokens, valid = padded(model.config.vocab_size, "left")
    expected, _ = torch_outputs(pair.name, pair.oracle, tokens, valid)
    compiled = jit_outputs if model.config == pair.model.config else quick_outputs
    logits, _ = compiled(model, jnp.asarray(tokens), jnp.asarray(valid))
    return float(np.abs(np.asarray(logits) - expected)[valid].max())


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_keys(pair, side, record_property):
    tokens, valid = padded(pair.model.config.vocab_size, side)
    expected_logits, expected_keys = torch_outputs(pair.name, pair.oracle, tokens, valid)
    logits, keys = jit_outputs(pair.model, jnp.asarray(tokens), jnp.asarray(valid))
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    assert np.isfinite(keys).all()
    assert np.abs(expected_logits[valid]).max() > 1  # large enough for an absolute tolerance to mean something
    difference = np.abs(np.asarray(logits) - expected_logits)[valid].max()
    record_property("logits", float(difference))
    assert difference <= TOLERANCE
    assert keys.shape == expected_keys.shape
    difference = np.abs(np.asarray(keys) - expected_keys)[:, valid].max()
    record_property("keys", float(difference))
    assert difference <= TOLERANCE


@pytest.mark.parametrize("bos", [False, True])
def test_hidden_states_layer_by_layer(pair, bos, record_property):
    """And logits and keys behind a BOS token, in programs that are compiled anyway."""
    tokens, valid = padded(pair.model.config.vocab_size, "left", bos=bos)
    expected = torch_layers(pair.name, pair.oracle, tokens, valid)
    logits, keys = jit_outputs(pair.model, jnp.asarray(tokens), jnp.asarray(valid))
    hidden = layer_outputs(pair.model, jnp.asarray(tokens), jnp.asarray(valid))
    for name, found in (("logits", logits), ("keys", keys), ("hidden", hidden)):
        wanted = getattr(expected, name)
        assert found.shape == wanted.shape
        difference = np.abs(np.asarray(found) - wanted)[..., valid, :].max()
        record_property(name, float(difference))
        assert difference <= TOLERANCE, name


@pytest.mark.parametrize("bos", [False, True])
def test_padding_sides_give_the_same_scores(pair, bos):
    """The log probability of every next token of a prompt, however it is padded."""

    def scores(side: str) -> np.ndarray:
        tokens, valid = padded(pair.model.config.vocab_size, side, bos=bos)
        logits, _ = jit_outputs(pair.model, jnp.asarray(tokens), jnp.asarray(valid))
        log_p = jax.nn.log_softmax(logits[:, :-1], axis=-1)
        next_ones = np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], axis=-1)[..., 0]
        return next_ones[valid[:, :-1] & valid[:, 1:]]

    left, right = scores("left"), scores("right")
    assert left.size == 8 + 4 + 1
    np.testing.assert_allclose(left, right, atol=2e-5)
    assert np.ptp(left) > 1


def test_padding_does_not_reach_the_logits(gpt2):
    """Whatever the padding id is, even one outside the vocabulary."""
    tokens, valid = padded(gpt2.model.config.vocab_size, "left")
    logits, again = (gpt2.model(jnp.asarray(np.where(valid, tokens, pad)), jnp.asarray(valid)) for pad in (2, 61))
    np.testing.assert_array_equal(logits, again)
    new = [generate(gpt2.model, jnp.asarray(np.where(valid, tokens, pad)), jnp.asarray(valid), 8, key=jax.random.key(0),
                    temperature=0.0) for pad in (2, 61)]  # fmt: skip
    np.testing.assert_array_equal(*new)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_greedy_generation(pairs, name):
    pair = pairs[name]
    tokens, valid = padded(pair.model.config.vocab_size, "left")
    pair.oracle.generation_config.eos_token_id = None
    expected = pair.oracle.generate(
        torch.tensor(tokens).long(), attention_mask=torch.tensor(valid).long(), max_new_tokens=8, do_sample=False,
        pad_token_id=0,
    )[:, tokens.shape[1] :].numpy()  # fmt: skip
    assert len(set(expected.ravel().tolist())) > 2  # not one token over and over

    def greedy(model: Decoder, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        return generate(model, tokens, valid, 8, key=jax.random.key(0), temperature=0.0)

    compiled = greedy if name == "gpt2" else quick_jit(greedy)
    for side in ("left", "right"):
        tokens, valid = padded(pair.model.config.vocab_size, side)
        new = compiled(pair.model, jnp.asarray(tokens), jnp.asarray(valid))
        np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama-3.1", "gemma3"])
def test_gradient_of_the_down_kernels(pairs, name):
    pair = pairs[name]
    tokens, valid = padded(pair.model.config.vocab_size, "right")
    weight = np.random.default_rng(2).normal(size=(*tokens.shape, pair.model.config.vocab_size)) * valid[..., None]
    weight = weight.astype(np.float32)

    @quick_jit
    def gradient(model: Decoder) -> jax.Array:
        parameters = named_parameters(model)

        def loss(down: jax.Array) -> jax.Array:
            changed = with_parameters(model, {**parameters, "layers.mlp.down.kernel": down})
            return jnp.sum(changed(jnp.asarray(tokens), jnp.asarray(valid)) * weight)

        return jax.grad(loss)(parameters["layers.mlp.down.kernel"])

    downs = oracle_models.CASES[pair.name].down(pair.oracle)
    logits = pair.oracle(
        torch.tensor(tokens).long(), attention_mask=torch.tensor(valid).long(), position_ids=torch.tensor(
            np.maximum(valid.cumsum(-1) - 1, 0))
    ).logits  # fmt: skip
    expected = torch.stack(torch.autograd.grad((logits * torch.tensor(weight)).sum(), [down.weight for down in downs]))
    expected = expected.numpy() if pair.name.startswith("gpt2") else expected.numpy().swapaxes(1, 2)
    np.testing.assert_allclose(gradient(pair.model), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_round_trip_through_torch(pair, tmp_path):
    save_model(pair.model, tmp_path / "saved")
    reopened = type(pair.oracle).from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    for name, value in pair.oracle.state_dict().items():
        torch.testing.assert_close(reopened.state_dict()[name], value, rtol=0, atol=0)
    tokens, valid = padded(pair.model.config.vocab_size, "left")
    expected, _ = torch_outputs(pair.name, pair.oracle, tokens, valid)
    logits, _ = torch_outputs(pair.name, reopened, tokens, valid)
    np.testing.assert_allclose(logits[valid], expected[valid], atol=1e-6)


def _set(**values: Any) -> Any:
    return lambda config: config.update(values)


def _without(*names: str) -> Any:
    return lambda config: [config.pop(name) for name in names]


def _rope(**values: Any) -> Any:
    return lambda config: config["rope_parameters"].update(values)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt2", _set(layer_norm_epsilon=1e-5)),
        ("gpt2", _set(activation_function="gelu")),
        ("gptj", _set(rotary_dim=8)),
        ("llama-3.1", _rope(rope_theta=10000.0)),
        ("llama-3.1", _rope(rope_type="default")),
        ("llama-3.1", _rope(factor=4.0)),
        ("llama-3.1", _rope(low_freq_factor=1.1)),
        ("llama-3.1", _rope(high_freq_factor=4.0)),
        ("llama-3.1", _rope(original_max_position_embeddings=31)),
        ("qwen2", _set(rms_norm_eps=1e-6)),
        ("qwen2", _rope(rope_theta=10000.0)),
        ("gpt-neox", _rope(partial_rotary_factor=0.5)),
        ("gpt-neox", _set(use_parallel_residual=False)),
        ("mistral", _set(sliding_window=5)),
        ("mistral", _set(sliding_window=None)),
        ("qwen2-windowed", _set(layer_types=["full_attention", "full_attention", "sliding_attention"])),
        ("gemma2", _set(layer_types=["full_attention", "sliding_attention", "sliding_attention"])),
        ("gemma2", _set(query_pre_attn_scalar=10)),
        ("gemma2", _set(attn_logit_softcapping=None)),
        ("gemma2", _set(final_logit_softcapping=None)),
        ("gemma3", _rope(sliding_attention={"rope_type": "default", "rope_theta": 10000.0})),
        ("gemma3", _rope(full_attention={"rope_type": "default", "rope_theta": 7 * 777.0})),
        ("phi3-longrope", _rope(short_factor=[1.0, 1.3, 2.1, 3.5])),
        ("phi3-longrope", _set(original_max_position_embeddings=24)),
    ],
)
def test_control_a_changed_field_breaks_parity(pairs, tmp_path, name, change):
    pair = pairs[name]
    changed = load_model(altered(pair.directory, tmp_path / "changed", config=change))
    assert logit_difference(pair, changed) > 2 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama-3.1", _set(original_max_position_embeddings=9)),  # beside the 23 of rope_parameters
        ("phi3-longrope", _set(original_max_position_embeddings=31)),
        ("phi3-longrope", _without("original_max_position_embeddings")),
        ("qwen2-windowed", lambda config: config.update(sliding_window=None, layer_types=None)),
        ("qwen2-windowed", _without("max_window_layers", "layer_types")),
    ],
    ids=["llama3-beside", "longrope-beside", "longrope-inside-alone", "window-null", "window-default-layers"],
)
def test_a_config_is_read_as_torch_reads_it(pairs, tmp_path, name, change):
    """The change moves the logits of both alike."""
    pair = pairs[name]
    directory = altered(pair.directory, tmp_path / "changed", config=change)
    oracle = type(pair.oracle).from_pretrained(directory, attn_implementation="eager").eval()
    model = load_model(directory)
    assert logit_difference(dataclasses.replace(pair, oracle=oracle), model) < TOLERANCE
    assert logit_difference(pair, model) > 2 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("gpt2", "transformer.h.0.ln_1.weight", "transformer.h.0.ln_2.weight"),
        ("gptj", "transformer.h.1.attn.q_proj.weight", "transformer.h.1.attn.k_proj.weight"),
        ("qwen2", "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("llama-3.1", "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"),
        ("gpt-neox", "gpt_neox.layers.0.input_layernorm.weight", "gpt_neox.layers.0.post_attention_layernorm.weight"),
        ("qwen3", "model.layers.1.self_attn.q_norm.weight", "model.layers.1.self_attn.k_norm.weight"),
        (
            "gemma2",
            "model.layers.1.post_attention_layernorm.weight",
            "model.layers.1.post_feedforward_layernorm.weight",
        ),
    ],
)
def test_control_swapped_weights_break_parity(pairs, tmp_path, name, first, second):
    def swap(tensors: dict[str, np.ndarray]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    changed = load_model(altered(pairs[name].directory, tmp_path / "changed", tensors=swap))
    assert logit_difference(pairs[name], changed) > 2 * TOLERANCE
