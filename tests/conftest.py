"""A small world for tests of editing: a byte-level tokenizer, random GPT-2s, moments, and sessions; nothing is downloaded.

The fixtures are made once and shared: models and sessions are immutable. Every batch of requests has the same layout, so
that all sessions of one dtype share their compiled programs; `editing/test_session.py` holds that. What is float32 is made
outside `jax.enable_x64`, whichever test asks first.
"""

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from editing_world import BATCHES, TEXTS, random_model, train_tokenizer
from transformers import PreTrainedTokenizerFast

from kedit_jax.checkpoint import load_session
from kedit_jax.editing.moments import Moments, compute_moments
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, start_session
from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.values import ValueSettings
from kedit_jax.models import Decoder, ModelConfig, gpt2_config

MANY_MAPS = 20_000  # Linux allows a process 65,530; XLA's compiler crashes where it gets no more


def pytest_configure(config: pytest.Config) -> None:
    """Each of several processes gets its own share of the cores, before JAX counts them: they would wait for each other."""
    worker = getattr(config, "workerinput", None)
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    number, count = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
    share = sorted(os.sched_getaffinity(0))[number::count]
    if share:
        os.sched_setaffinity(0, share)


@pytest.fixture(autouse=True, scope="module")
def room_for_programs() -> Iterator[None]:
    """Every compiled program holds some memory mappings, and one process runs all tests: forget programs now and then."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(TEXTS), eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return list(TEXTS)


@pytest.fixture(scope="session")
def batches() -> list[list[EditRequest]]:
    """Four batches of three; the second and the last contradict the first."""
    return BATCHES


@pytest.fixture(scope="session")
def config(tokenizer: Any) -> ModelConfig:
    """160 keys: enough for the solver to choose its dual form."""
    return gpt2_config(vocab_size=len(tokenizer), n_layers=4, d_model=16, n_heads=2, d_ff=160, max_positions=64)


@pytest.fixture(scope="session")
def model(config: ModelConfig) -> Decoder:
    with jax.enable_x64(False):
        return random_model(config, 0, scale=0.08)


@pytest.fixture(scope="session")
def wide_model(tokenizer: Any) -> Decoder:
    """In float64; 24 keys, so few that the solver chooses its primal form. Use it inside `jax.enable_x64`."""
    config = gpt2_config(vocab_size=len(tokenizer), n_layers=4, d_model=16, n_heads=2, d_ff=24, max_positions=64)
    with jax.enable_x64(True):
        return random_model(config, 1, scale=0.16, dtype=np.float64)


@pytest.fixture(scope="session")
def moments(model: Decoder, tokenizer: Any, texts: list[str]) -> Moments:
    with jax.enable_x64(False):
        return compute_moments(model, tokenizer, texts, (0, 1, 2), batch_tokens=512)


@pytest.fixture(scope="session")
def settings() -> EditSettings:
    """Two layers with one between them."""
    return EditSettings(
        layers=(0, 2),
        moment_weight=20.0,
        ridge=0.01,
        null_threshold=1e-3,
        l2=0.1,
        values=ValueSettings(steps=6, learning_rate=0.3),
        prefixes=2,
        prefix_tokens=4,
        conflicts="keep",  # the batches contradict each other, and accumulate
        seed=3,
    )


@pytest.fixture(scope="session")
def fresh(model: Decoder, tokenizer: Any, moments: Moments, settings: EditSettings) -> EditSession:
    """A session without edits."""
    with jax.enable_x64(False):
        return start_session(model, tokenizer, moments, settings)


@pytest.fixture(scope="session")
def history(fresh: EditSession, batches: list[list[EditRequest]]) -> list[EditSession]:
    """The session after 0, 1, 2, 3 and 4 batches."""
    sessions = [fresh]
    with jax.enable_x64(False):
        for batch in batches:
            sessions.append(sessions[-1].edit(batch)[0])
    return sessions


@pytest.fixture(scope="session")
def another(moments: Moments) -> Callable[..., EditSession]:
    """Makes a fresh session like the given one, with other settings and the same prefixes."""

    def make(session: EditSession, **changes: Any) -> EditSession:
        settings = dataclasses.replace(session.settings, prefixes=0, **changes)
        made = start_session(session.base, session.tokenizer, moments, settings)
        return dataclasses.replace(made, prefixes=session.prefixes)

    return make


@pytest.fixture(scope="session")
def reload(moments: Moments) -> Callable[[EditSession, Path], EditSession]:
    """Reads the session of a folder, as one that goes on with the given one would."""
    return lambda session, folder: load_session(folder, session.base, session.tokenizer, moments)
