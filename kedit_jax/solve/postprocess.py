"""What editors do to an update before it is applied: PRUNE, RECT, clipping, truncation, rounding, or a user's function.

A post-processor is any function of the update and of the kernel that the update meets, both [n, v], that returns what is
applied instead. Those here are frozen dataclasses, so that `jax.jit` caches by their values; each works in the dtype of the
update, under `jax.jit` and `jax.vmap`, and leaves what it does not change exactly as it was.

A post-processed update is no longer the solution of its edit problem. Whether the next step takes that into account is
decided in `sequences` ("The Labyrinth and the Thread", arXiv 2605.26670, Algorithm 1), not here.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kedit_jax.errors import SolverError
from kedit_jax.solve.arrays import AnyArray, compiled, matmul, precision_of

Post = Callable[[AnyArray, AnyArray], AnyArray]
"""(update [n, v], kernel [n, v]) -> what is applied, [n, v]. `kernel` is the CURRENT one, W_{t-1}, that the update meets."""

RoundedFormat = Literal["bfloat16", "float16", "float32"]


@dataclasses.dataclass(frozen=True)
class Prune:
    """PRUNE (arXiv 2405.16821): singular values s of the update above the kernel's largest, s_max, are compressed.

        s -> log s - log s_max + s_max   where s > s_max,   s elsewhere

    Undefined for a kernel of zeros: the result is then not finite, which the step's status reports.
    """

    def __call__(self, update: Float[AnyArray, "n v"], kernel: Float[AnyArray, "n v"]) -> Float[Array, "n v"]:
        """What is applied, in the update's dtype."""
        return _prune(update, kernel)


@dataclasses.dataclass(frozen=True)
class Rect:
    """RECT (arXiv 2401.04700): keeps the entries with the largest relative change |update / kernel|, zeroes the others.

    An entry that changes a weight of 0 counts as infinitely large; entries equal to the smallest one kept are kept too.

    Raises:
        SolverError: a share outside (0, 1].
    """

    share: float = 0.4
    """Of all entries, the share that is kept: 0.4 in one published code, 0.2 in another."""

    def __post_init__(self) -> None:
        _require(0 < self.share <= 1, "share", self.share, "in (0, 1]")

    def __call__(self, update: Float[AnyArray, "n v"], kernel: Float[AnyArray, "n v"]) -> Float[Array, "n v"]:
        """What is applied, in the update's dtype."""
        return _rect(update, kernel, share=self.share)


@dataclasses.dataclass(frozen=True)
class ClipNorm:
    """Scales the update down to Frobenius norm `limit` where it is larger. Raises SolverError unless limit > 0."""

    limit: float

    def __post_init__(self) -> None:
        _require(0 < self.limit < math.inf, "limit", self.limit, "finite and > 0")

    def __call__(self, update: Float[AnyArray, "n v"], kernel: Float[AnyArray, "n v"]) -> Float[Array, "n v"]:
        """What is applied, in the update's dtype."""
        return _clip(update, limit=self.limit)


@dataclasses.dataclass(frozen=True)
class Truncate:
    """The best approximation of the update of the given rank (Frobenius). Raises SolverError unless rank >= 1."""

    rank: int

    def __post_init__(self) -> None:
        _require(self.rank >= 1 and self.rank == int(self.rank), "rank", self.rank, "an integer of at least 1")

    def __call__(self, update: Float[AnyArray, "n v"], kernel: Float[AnyArray, "n v"]) -> Float[Array, "n v"]:
        """What is applied, in the update's dtype."""
        return _truncate(update, rank=self.rank)


@dataclasses.dataclass(frozen=True)
class Rounded:
    """The kernel is stored in a narrow format after every step: round(kernel + update) - kernel.

    A weight beyond the format's range becomes infinite (float16: 65504), which the step's status reports.

    Raises:
        SolverError: a format other than bfloat16, float16 or float32.
    """

    format: RoundedFormat = "bfloat16"

    def __post_init__(self) -> None:
        formats = get_args(RoundedFormat)
        _require(self.format in formats, "format", repr(self.format), f"one of {', '.join(formats)}")

    def __call__(self, update: Float[AnyArray, "n v"], kernel: Float[AnyArray, "n v"]) -> Float[Array, "n v"]:
        """What is applied, in the update's dtype."""
        return _round(update, kernel, format=self.format)


@dataclasses.dataclass(frozen=True)
class Quantized:
    """The kernel is stored as integers after every step: symmetric, one scale (largest magnitude) for each output column.

    Raises:
        SolverError: bits that are no integer in 2 .. 16.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        _require(2 <= self.bits <= 16 and self.bits == int(self.bits), "bits", self.bits, "an integer in 2 .. 16")

    def __call__(self, update: Float[AnyArray, "n v"], kernel: Float[AnyArray, "n v"]) -> Float[Array, "n v"]:
        """What is applied, in the update's dtype."""
        return _quantize(update, kernel, bits=self.bits)


POSTS: Mapping[str, type[Any]] = MappingProxyType(
    {"prune": Prune, "rect": Rect, "clip": ClipNorm, "truncate": Truncate, "round": Rounded, "quantize": Quantized}
)
"""Post-processors by name; each takes one parameter at most."""


def parse_post(text: str) -> Post:
    """A post-processor written NAME or NAME:PARAMETER, as "prune", "rect:0.4", "truncate:8" or "round:float16".

    Raises:
        SolverError: a name that is not in `POSTS`, or a parameter that is missing, not wanted, or out of range.
    """
    name, colon, parameter = text.partition(":")
    if name not in POSTS:
        raise SolverError(f"post-processor {text!r} is unknown: one of {', '.join(map(_usage, POSTS))}")
    fields = dataclasses.fields(POSTS[name])
    wanted = bool(fields) and fields[0].default is dataclasses.MISSING
    if (colon and not fields) or (wanted and not parameter) or (colon and not parameter):
        raise SolverError(f"post-processor {text!r} is incomplete or says too much: write {_usage(name)}")
    if not colon:
        return POSTS[name]()
    read = fields[0].type if fields[0].type in (int, float) else str
    try:
        return POSTS[name](read(parameter))
    except SolverError as error:
        raise SolverError(f"post-processor {text!r}: {error}") from error
    except ValueError as error:
        raise SolverError(f"post-processor {text!r}: {parameter!r} is no {read.__name__}; write {_usage(name)}") from error


def _usage(name: str) -> str:
    """NAME, NAME:PARAMETER, or NAME[:PARAMETER]."""
    fields = dataclasses.fields(POSTS[name])
    if not fields:
        return name
    parameter = f":{fields[0].name.upper()}"
    return name + (parameter if fields[0].default is dataclasses.MISSING else f"[{parameter}]")


def process(post: Post, update: Float[AnyArray, "n v"], kernel: Float[AnyArray, "n v"]) -> Float[Array, "n v"]:
    """post(update, kernel) in the dtype of the update.

    Outside `jax.jit` and `jax.vmap` a post-processor may be written in plain NumPy.

    Raises:
        SolverError: it returned something other than floating-point numbers of the update's shape.
    """
    with precision_of((update, kernel)):
        result: Any = post(update, kernel)
        shape = getattr(result, "shape", None)
        if shape != update.shape or not jnp.issubdtype(result.dtype, jnp.floating):
            given = type(result).__name__ if shape is None else f"shape {shape} of {result.dtype}"
            raise SolverError(
                f"post-processor {describe(post)} returned {given} for an update of shape {update.shape}: return floating-"
                "point numbers of the update's shape"
            )
        return jnp.asarray(result, update.dtype)


def describe(post: Post | None) -> str:
    """How a post-processor is called in reports and errors: "none", a dataclass as written, a function by its name."""
    return "none" if post is None else str(getattr(post, "__qualname__", post))


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise SolverError(f"{name} must be {rule}, got {value}")


@compiled
def _prune(update: Float[AnyArray, "n v"], kernel: Float[AnyArray, "n v"]) -> Float[Array, "n v"]:
    update = jnp.asarray(update)
    largest = jnp.linalg.svd(jnp.asarray(kernel, update.dtype), compute_uv=False)[0]
    left, s, right = jnp.linalg.svd(update, full_matrices=False)
    excess = jnp.where(s > largest, s - (jnp.log(s) - jnp.log(largest) + largest), jnp.zeros_like(s))
    # The excess is taken away, rather than the rest put together again: an update below s_max stays as it is, bit by bit.
    return update - matmul(left * excess, right)


@partial(compiled, static=("share",))
def _rect(update: Float[AnyArray, "n v"], kernel: Float[AnyArray, "n v"], share: float) -> Float[Array, "n v"]:
    update = jnp.asarray(update)
    change = jnp.where(update == 0, jnp.zeros_like(update), jnp.abs(update / jnp.asarray(kernel, update.dtype)))
    kept = max(1, round(share * update.size))
    smallest = jnp.sort(change, axis=None)[update.size - kept]
    return jnp.where(change >= smallest, update, jnp.zeros_like(update))


@partial(compiled, static=("limit",))
def _clip(update: Float[AnyArray, "n v"], limit: float) -> Float[Array, "n v"]:
    update = jnp.asarray(update)
    norm = jnp.linalg.norm(update)
    return jnp.where(norm > limit, update * (limit / norm), update)


@partial(compiled, static=("rank",))
def _truncate(update: Float[AnyArray, "n v"], rank: int) -> Float[Array, "n v"]:
    update = jnp.asarray(update)
    if rank >= min(update.shape):
        return update
    left, s, right = jnp.linalg.svd(update, full_matrices=False)
    return matmul(left[:, :rank] * s[:rank], right[:rank])


@partial(compiled, static=("format",))
def _round(update: Float[AnyArray, "n v"], kernel: Float[AnyArray, "n v"], format: str) -> Float[Array, "n v"]:
    kernel = jnp.asarray(kernel, update.dtype)
    # Without the barrier a compiler that allows excess precision may drop the two conversions as a pair.
    narrow = jax.lax.optimization_barrier((kernel + update).astype(format))
    return narrow.astype(update.dtype) - kernel


@partial(compiled, static=("bits",))
def _quantize(update: Float[AnyArray, "n v"], kernel: Float[AnyArray, "n v"], bits: int) -> Float[Array, "n v"]:
    kernel = jnp.asarray(kernel, update.dtype)
    weights = kernel + update
    scale = jnp.max(jnp.abs(weights), axis=0) / (2 ** (bits - 1) - 1)
    scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    return jnp.round(weights / scale) * scale - kernel
