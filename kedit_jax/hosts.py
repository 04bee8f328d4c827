"""Several processes that run one program: who they are, what they tell each other, and how they end together.

All run the same steps on the same arguments and hold the same session; arrays on devices are cut among them. What is read
from devices or from another process is read by all at the same place of the program (`to_host`, `gathered`, `on_first`), and
only the first process writes files, in a folder that all can read.
"""

import os
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Float

from kedit_jax import errors
from kedit_jax.errors import KeditError

TIMEOUT = 60
"""Seconds after which all processes end with an error when one of them no longer answers."""
PIECE = 2**26
"""Bytes of a matrix that are exchanged at once."""


def initialize(
    coordinator: str | None = None, count: int | None = None, number: int | None = None, *, timeout: int = TIMEOUT
) -> None:
    """Join the other processes, before anything else asks JAX for its devices.

    Args:
        coordinator: host:port of the first process; with `count` and `number` found out by JAX under Slurm, on TPU slices
            and under Open MPI.
        count: processes in all.
        number: of this one, from 0 on.
        timeout: seconds within which all must have come, and after which a silent process ends all others.

    Raises:
        KeditError: not all came in time, or nothing says which processes there are.
    """
    if coordinator is not None:
        _reach(coordinator, 0 if number == 0 else timeout)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            number,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
        jax.devices()  # where processes have met and their devices have not, the first product would wait for ever
    except (ValueError, RuntimeError) as error:
        raise KeditError(
            f"the processes cannot be brought together: {str(error).strip() or type(error).__name__}; start all of them "
            f"within {timeout} s, each with the coordinator's host:port, their number, and its own number from 0 on"
        ) from error


def _reach(coordinator: str, timeout: int) -> None:
    """Wait until the first process listens: JAX would wait as long, and then abort with a trace of its own."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise KeditError(f"coordinator {coordinator!r} is no host:port, as first-host:8476")
    until = time.monotonic() + timeout
    while timeout:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise KeditError(
                    f"no first process listens at {coordinator} after {timeout} s ({error}); start it within that time, and "
                    "check that this machine reaches it by that name"
                ) from error
            time.sleep(0.2)


def count() -> int:
    """Processes that run this program."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def number() -> int:
    """Which of them this is, from 0 on."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes files and talks."""
    return number() == 0


def leave(status: int) -> None:
    """End this process at once, so that those that wait for it learn of it; where there are others."""
    if count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # an orderly end would wait for the others, which wait for this one


def to_host(tree: Any) -> Any:
    """The arrays of a tree in NumPy, whole on every process, wherever their parts lie."""
    return jax.tree.map(_whole, tree)


def laid_out(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """An array that every process holds, on the devices; each hands over what its own ones hold."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def gathered(text: str) -> list[str]:
    """What each process says, in their order."""
    if count() == 1:
        return [text]
    said = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([said.size], np.int32)).reshape(-1)
    padded = multihost_utils.process_allgather(np.pad(said, (0, int(lengths.max()) - said.size)))
    return [bytes(row[:length]).decode() for row, length in zip(np.asarray(padded), lengths, strict=True)]


def first_says(text: str) -> str:
    """What the first process says."""
    return gathered(text if is_first() else "")[0]


def on_first(work: Callable[[], object]) -> str:
    """Have the first process alone do something; its result as text ("" for None), or its error, is every process's.

    Raises:
        KeditError: what `work` raised, of the same class, on all processes.
    """
    told, problem = "", None
    if is_first():
        try:
            result = work()
            told = f"done {'' if result is None else result}"
            if count() == 1:
                return told.removeprefix("done ")
        except KeditError as error:
            if count() == 1:
                raise
            told, problem = f"{type(error).__name__} {error}", error
    kind, _, rest = first_says(told).partition(" ")
    if kind != "done":
        raise getattr(errors, kind, KeditError)(rest) from problem
    return rest


def agree(problem: KeditError | None) -> None:
    """Raise on all processes what any of them met, so that none waits for one that gave up."""
    told = [said for said in gathered("" if problem is None else f"{type(problem).__name__} {problem}") if said]
    if told:
        kind, _, rest = told[0].partition(" ")
        raise getattr(errors, kind, KeditError)(rest) from problem


def total(part: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """The sum of every process's float64 array, added in float64 in the order of the processes; in place where there is one.

    The bits go through the devices as integers, which hold no float64.
    """
    if count() == 1:
        return part
    flat = np.ascontiguousarray(part).reshape(-1)
    result = np.empty_like(flat)
    for begin in range(0, flat.size, PIECE // flat.itemsize):
        some = flat[begin : begin + PIECE // flat.itemsize]
        every = np.asarray(multihost_utils.process_allgather(some.view(np.uint32)))
        rows = every.reshape(count(), -1).view(np.float64)
        result[begin : begin + some.size] = 0
        for row in rows:
            result[begin : begin + some.size] += row
    return result.reshape(part.shape)


@jax.jit
def one_of(stack: jax.Array, index: int) -> jax.Array:
    """One of the arrays that are stacked along the leading axis; one program for all of them, wherever they lie."""
    found: jax.Array = jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
    return found


def _whole(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        sharding = leaf.sharding
        if not isinstance(sharding, NamedSharding):
            raise TypeError(f"an array over several processes with {sharding} cannot be gathered")
        leaf = _everywhere(leaf, NamedSharding(sharding.mesh, PartitionSpec()))
    return np.asarray(leaf)


@partial(jax.jit, static_argnames="sharding")
def _everywhere(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, sharding)
