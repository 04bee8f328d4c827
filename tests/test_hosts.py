"""What processes tell each other, with one process: the same calls, and nobody to wait for. Several processes are in
`tests/experiments/test_distributed.py`."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kedit_jax import hosts
from kedit_jax.errors import KeditError, SessionError


def test_alone_is_the_first_of_one() -> None:
    assert (hosts.count(), hosts.number(), hosts.is_first()) == (1, 0, True)
    assert hosts.gathered("here") == ["here"]
    assert hosts.first_says("here") == "here"


def test_what_the_first_does_comes_back_as_text() -> None:
    assert hosts.on_first(lambda: 3) == "3"
    assert hosts.on_first(lambda: None) == ""


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A second process that says what the test puts here."""
    said: list[str] = []
    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr(hosts, "gathered", lambda text: [text, *said])
    return said


def test_errors_keep_their_class_and_reach_everyone(two: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise SessionError("the disk is full")

    with pytest.raises(SessionError, match="the disk is full"):
        hosts.on_first(full)
    told: list[str] = []
    monkeypatch.setattr(hosts, "gathered", lambda text: [told.append(text) or "SessionError the disk is full", text])  # type: ignore[func-returns-value]
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    with pytest.raises(SessionError, match="the disk is full"):
        hosts.on_first(lambda: pytest.fail("the second process does not do it"))
    assert told == [""]


def test_all_agree_on_the_first_problem(two: list[str]) -> None:
    hosts.agree(None)
    two.append("SessionError its shard is cut")
    with pytest.raises(SessionError, match="its shard is cut"):
        hosts.agree(None)
    with pytest.raises(KeditError, match="mine"):
        hosts.agree(KeditError("mine"))


def test_sums_cross_devices_that_hold_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, and without losing a bit."""
    mine, theirs = np.random.default_rng(0).normal(size=(2, 37, 11))
    pieces = []

    def exchanged(bits: Any) -> Any:
        assert bits.dtype == np.uint32
        begin = sum(pieces)
        pieces.append(bits.size)
        other = np.ascontiguousarray(theirs).reshape(-1).view(np.uint32)[begin : begin + bits.size]
        return jnp.stack([bits, other])

    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr(hosts, "PIECE", 8 * 100)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", exchanged)
    assert (hosts.total(mine) == mine + theirs).all()
    assert len(pieces) == -(-37 * 11 // 100)


def test_to_host_takes_trees_of_anything() -> None:
    tree = {"a": jnp.arange(3), "b": (np.ones(2), 4)}
    found = hosts.to_host(tree)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    assert found["a"].tolist() == [0, 1, 2]


def test_a_first_process_that_does_not_come_is_an_error_in_time() -> None:
    begun = time.monotonic()
    with pytest.raises(KeditError, match="no first process listens at localhost:1 after 1 s"):
        hosts.initialize("localhost:1", 2, 1, timeout=1)
    assert time.monotonic() - begun < 10
    with pytest.raises(KeditError, match="'localhost' is no host:port"):
        hosts.initialize("localhost", 2, 1)
