"""Sampling: seeds, top-k, temperature, stopping, and what is refused. Greedy parity is in test_parity.py."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle_models import padded, quick_jit

from kedit_jax.errors import KeditError
from kedit_jax.models import Decoder, generate
from kedit_jax.models.generation import _generate


def quick_generate(model: Decoder, prompts: tuple[jax.Array, jax.Array], n_new: int, seed: int, **kwargs: Any) -> Any:
    """`generate` compiled in less time. Under an outer `jit` it does not check the prompts."""
    return _program(n_new, tuple(kwargs.items()))(model, *prompts, jax.random.key(seed))


@functools.cache
def _program(n_new: int, settings: tuple[tuple[str, Any], ...]) -> Any:
    return quick_jit(lambda model, tokens, valid, key: generate(model, tokens, valid, n_new, key=key, **dict(settings)))


@pytest.fixture(scope="module")
def prompts(pairs):
    tokens, valid = padded(pairs["gpt2"].model.config.vocab_size, "left")
    return jnp.asarray(tokens), jnp.asarray(valid)


def test_the_key_decides(gpt2, prompts):
    one, same, other = (quick_generate(gpt2.model, prompts, 6, seed) for seed in (1, 1, 2))
    assert one.shape == (3, 6)
    assert one.dtype == jnp.int32
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_samples_follow_the_distribution(gpt2, prompts):
    """4,000 samples of the first token against the softmax; top-k keeps exactly the k likeliest."""
    many = tuple(jnp.tile(part[:1], (4000, 1)) for part in prompts)
    logits = np.asarray(quick_jit(lambda model: model(prompts[0][:1]))(gpt2.model))[0, -1] / 1.7

    def frequencies(top_k: int | None) -> np.ndarray:
        new = quick_generate(gpt2.model, many, 1, 0, temperature=1.7, top_k=top_k)
        return np.bincount(np.asarray(new)[:, 0], minlength=logits.size) / 4000

    likelihood = np.exp(logits - logits.max())
    likelihood /= likelihood.sum()
    assert np.abs(frequencies(None) - likelihood).max() < 0.03  # about 4 standard errors
    kept = np.argsort(logits)[-5:]
    sampled = frequencies(5)
    assert set(np.flatnonzero(sampled)) <= set(kept.tolist())
    assert np.abs(sampled[kept] - likelihood[kept] / likelihood[kept].sum()).max() < 0.03


def test_one_likeliest_token_is_greedy(gpt2, prompts):
    greedy = quick_generate(gpt2.model, prompts, 6, 0, temperature=0.0)
    narrow = quick_generate(gpt2.model, prompts, 6, 9, temperature=0.8, top_k=1)
    np.testing.assert_array_equal(greedy, narrow)


def test_a_stop_token_repeats(gpt2, prompts):
    free = np.asarray(quick_generate(gpt2.model, prompts, 6, 1))
    stop = int(free[0, 2])
    stopped = np.asarray(quick_generate(gpt2.model, prompts, 6, 1, stop_ids=(stop, 60)))
    for before, after in zip(free, stopped, strict=True):
        first = next((i for i, token in enumerate(before) if token in (stop, 60)), 6)
        np.testing.assert_array_equal(after[: first + 1], before[: first + 1])
        assert set(after[first:].tolist()) <= {stop, 60}
    assert stopped[0, 3:].tolist() == 3 * [stop]


@pytest.mark.parametrize("stop", [None, 2])
def test_nothing_is_computed_once_all_have_stopped(gpt2, prompts, stop):
    """Every head that runs is counted; negative control: without a stop token all six do."""
    one = tuple(part[:1] for part in prompts)
    free = np.asarray(quick_generate(gpt2.model, one, 6, 1))[0]
    ids = () if stop is None else (int(free[stop]),)
    steps = []
    probe = jax.tree.map(lambda leaf: leaf, gpt2.model)
    probe.logits = lambda h: (jax.debug.callback(lambda: steps.append(1)), type(probe).logits(probe, h))[1]
    new = jax.jit(lambda *args: generate(probe, *args, 6, key=jax.random.key(1), stop_ids=ids))(*one)
    jax.effects_barrier()
    first = 6 if stop is None else free.tolist().index(ids[0]) + 1
    assert len(steps) == first
    np.testing.assert_array_equal(new[0], [*free[:first], *(6 - first) * ids])


def test_one_program_for_any_prompts_of_a_shape(gpt2, prompts):
    tokens, valid = prompts
    _generate.clear_cache()
    for shift in range(3):
        generate(gpt2.model, (tokens + shift) % 61, valid, 5, key=jax.random.key(shift), temperature=0.5 + shift)
    assert _generate._cache_size() == 1


def test_nothing_to_add(gpt2, prompts):
    assert generate(gpt2.model, *prompts, 0, key=jax.random.key(0)).shape == (3, 0)


def test_bad_settings_all_at_once(gpt2, prompts):
    with pytest.raises(KeditError) as error:
        generate(gpt2.model, *prompts, -1, key=jax.random.key(0), temperature=-0.5, top_k=62)
    for part in ("n_new is -1", "temperature is -0.5", "top_k is 62", "61"):
        assert part in str(error.value)


def test_bad_prompts_all_at_once(gpt2, prompts):
    tokens, valid = prompts
    with pytest.raises(KeditError) as error:
        generate(gpt2.model, tokens.at[0, 4].set(61), valid.at[1].set(False), 33, key=jax.random.key(0))
    for part in ("prompts [1] are empty", "tokens [61] lie outside", "41 positions are needed", "learned 40"):
        assert part in str(error.value)


def test_padding_takes_no_positions(gpt2, prompts):
    """36 columns and 8 new tokens pass 40 positions, but the prompts hold at most 9 tokens."""
    tokens, valid = (jnp.pad(part, ((0, 0), (27, 0))) for part in prompts)
    wide = generate(gpt2.model, tokens, valid, 8, key=jax.random.key(0), temperature=0.0)
    narrow = generate(gpt2.model, *prompts, 8, key=jax.random.key(0), temperature=0.0)
    np.testing.assert_array_equal(wide, narrow)
