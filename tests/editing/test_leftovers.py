"""Free memory goes back to the system after long work, and not otherwise."""

import ctypes
from types import SimpleNamespace

import pytest

from kedit_jax.editing import leftovers


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What glibc was asked for."""
    asked: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=asked.append))
    monkeypatch.setattr(leftovers.sys, "platform", "linux")
    return asked


def work() -> None:
    with leftovers.handed_back():
        pass


def test_memory_goes_back_after_long_work_alone(monkeypatch: pytest.MonkeyPatch, trims: list[int]) -> None:
    work()
    assert not trims
    monkeypatch.setattr(leftovers, "LONG", 0)
    work()
    assert trims == [0]


def test_where_the_c_library_cannot_nothing_is_done(monkeypatch: pytest.MonkeyPatch, trims: list[int]) -> None:
    monkeypatch.setattr(leftovers, "LONG", 0)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    work()
    monkeypatch.setattr(leftovers.sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", None)
    work()
    assert not trims
