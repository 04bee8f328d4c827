"""Memory that compiling left free goes back to the system, once something was compiled and not otherwise."""

import ctypes
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from kedit_jax.editing import leftovers


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What glibc would have been asked for."""
    asked: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=asked.append))
    monkeypatch.setattr(leftovers.sys, "platform", "linux")
    return asked


def test_memory_goes_back_after_a_compilation_alone(trims: list[int]) -> None:
    program = jax.jit(lambda x: x + 1)
    ones = jnp.ones(7)
    for asked in ([0], [0]):  # the second time the program is there
        with leftovers.handed_back():
            program(ones)
        assert trims == asked


def test_where_the_c_library_cannot_nothing_is_done(monkeypatch: pytest.MonkeyPatch, trims: list[int]) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    with leftovers.handed_back():
        jax.jit(lambda x: x + 2)(jnp.ones(7))
    monkeypatch.setattr(leftovers.sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", None)
    with leftovers.handed_back():
        jax.jit(lambda x: x + 3)(jnp.ones(7))
    assert not trims
