"""(d) How far from the floor: measured time over what the arithmetic of an edit takes on this core at its measured rates.

Counted are the floating-point operations of the matrix products that the results need, for real tokens without padding, and
the bytes of the weights that must be read; the rates are those of large products and copies measured in the same run.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.edits import PARTS, QUICK_SHAPE_NAMES, SHAPE_NAMES, Ours, Preparation
from experiments.benchmarks.measuring import Child, medians, seconds_of
from experiments.benchmarks.plots import figure, stacked
from experiments.benchmarks.problem import SHAPES, Problem, Shape, read
from kedit_jax.editing import values as editing_values
from kedit_jax.editing.tokens import KL_PROMPT, Encoded, Passage, encode

SEED = 2
COUNT, QUICK_COUNT = 20, 3
REPEATS = 3


class Work(NamedTuple):
    """Of a part of a batch's edit: operations in float32 and float64, and bytes of weights that are read."""

    flops32: float = 0.0
    flops64: float = 0.0
    bytes: float = 0.0


class Rates(NamedTuple):
    """Of the core: operations and bytes a second."""

    flops32: float
    flops64: float
    bytes: float


def measure(*, quick: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Rates of the core, and for each shape the counted work and the measured time of its parts."""
    count = QUICK_COUNT if quick else COUNT
    found: dict[str, Any] = {"seed": SEED, "count": count, "shapes": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in QUICK_SHAPE_NAMES if quick else SHAPE_NAMES:
            made = Path(folder) / name
            with Child(Preparation) as preparation:
                preparation("run", made, SHAPES[name], count, SEED)
            report(name)
            with Child(Counted, made) as ours:
                rates = Rates(*ours("rates", 256 if quick else 2048))
                ours("edit", count)
                rows = [ours("edit", count) for _ in range(REPEATS)]
                work = ours("work", count)
                compiled = ours("compiled_flops", count)
            found["shapes"][name] = _against_floor(medians(rows), work, rates) | {"xla": compiled}
    return found


def _against_floor(seconds: Mapping[str, float], work: Mapping[str, Work], rates: Rates) -> dict[str, Any]:
    """A part can be no faster than its operations, nor than its bytes."""
    parts = {}
    for part, counted in work.items():
        arithmetic = counted.flops32 / rates.flops32 + counted.flops64 / rates.flops64
        floor = max(arithmetic, counted.bytes / rates.bytes)
        parts[part] = {
            **counted._asdict(),
            "arithmetic_seconds": arithmetic,
            "bytes_seconds": counted.bytes / rates.bytes,
            "floor_seconds": floor,
            "seconds": seconds[part],
            "over_floor": seconds[part] / floor,
        }
    total, floor = sum(seconds[part] for part in PARTS), sum(part["floor_seconds"] for part in parts.values())
    return {"rates": rates._asdict(), "parts": parts, "other_seconds": seconds["other"], "over_floor": total / floor}


class Counted(Ours):
    """The library on a problem, with its work counted."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._encoded = _Tokens(read(folder), self._session.tokenizer)

    def rates(self, size: int) -> Rates:
        """By square products of this size, and a copy of 64 such matrices."""
        wide = np.random.default_rng(0).normal(size=(size, size))
        narrow, product = jnp.asarray(wide, jnp.float32), jax.jit(jnp.matmul)
        copied = np.tile(wide, (16, 1))
        target = np.empty_like(copied)
        flops = 2 * size**3
        return Rates(
            flops / seconds_of(lambda: product(narrow, narrow).block_until_ready()),
            flops / seconds_of(lambda: wide @ wide),
            2 * copied.nbytes / seconds_of(lambda: np.copyto(target, copied)),
        )

    def work(self, count: int) -> dict[str, Work]:
        """Counted work of the first `count` requests' edit."""
        return count_work(self._problem.shape, self._encoded, count)

    def compiled_flops(self, count: int) -> dict[str, float] | None:
        """What XLA counts in the program of the target values, a loop's body once; None where it is not one program."""
        calls: list[tuple[Any, Any]] = []
        program = editing_values._advanced

        def spy(*args: Any, **options: Any) -> Any:
            calls.append((args, options))
            return program(*args, **options)

        with mock.patch.object(editing_values, "_advanced", spy):
            self.edit(count)
        if not hasattr(program, "lower"):
            return None
        analyses = [program.lower(*args, **options).compile().cost_analysis() for args, options in calls]
        shape, tokens = self._problem.shape, self._encoded
        once = values_work(dataclasses.replace(shape, steps=1), tokens, count).flops32
        slope = values_work(dataclasses.replace(shape, steps=2), tokens, count).flops32 - once
        return {"xla": sum(analysis["flops"] for analysis in analyses), "counted": once + slope}


class _Tokens:
    """The requests of a problem as tokens: each in its contexts with the target, and its KL prompt."""

    def __init__(self, problem: Problem, tokenizer: Any) -> None:
        self.contexts: list[list[Encoded]] = []
        self.kl: list[Encoded] = []
        for request in problem.requests:
            passages = [Passage(request.prompt, request.subject, request.target, p) for p in ("", *problem.prefixes)]
            *contexts, kl = encode(tokenizer, [*passages, Passage(KL_PROMPT, request.subject)])
            self.contexts.append(contexts)
            self.kl.append(kl)

    def rows(self, request: int) -> list[tuple[int, int]]:
        """(tokens before the subject's last, tokens from it on) of each row; the KL prompt ends there."""
        rows = [(e.subject_last, len(e.tokens) - 1 - e.subject_last) for e in self.contexts[request]]
        return [*rows, (self.kl[request].subject_last, 1)]


def block_flops(shape: Shape) -> float:
    """Of the projections of one block for one token; attention's own products add less than 1 % at these lengths."""
    kv = shape.d_model * shape.n_kv_heads // shape.n_heads
    mlp = (2 if shape.family == "gpt2" else 3) * shape.d_model * shape.d_ff
    return 2.0 * (2 * shape.d_model**2 + 2 * shape.d_model * kv + mlp)


def distinct(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that differ in themselves or in what stands before them: the nodes of the rows' prefix tree."""
    return len({tuple(row[: end + 1]) for row in rows for end in range(len(row))})


def count_work(shape: Shape, tokens: _Tokens, count: int) -> dict[str, Work]:
    """Of each part of an edit of the first `count` requests."""
    return {
        "values": values_work(shape, tokens, count),
        "keys": keys_work(shape, tokens, count),
        "solve": solve_work(shape, count),
    }


def values_work(shape: Shape, tokens: _Tokens, count: int) -> Work:
    """Once, all distinct tokens up to the top edited layer, and those before the subject's last through the blocks above;
    then `steps` forward passes of the tokens from it on, the head at scored tokens, and one backward pass fewer, each as
    costly: weights have no gradients. In the last block only scored tokens need more than keys and values.
    """
    top, block = shape.layers[-1], block_flops(shape)
    above, passes = shape.n_layers - top - 1, 2 * shape.steps - 1
    whole = [e.tokens[:-1] for r in range(count) for e in tokens.contexts[r]]
    whole += [tokens.kl[r].tokens[: tokens.kl[r].subject_last + 1] for r in range(count)]
    before = [row[:begin] for row, (begin, _) in zip(whole, _in_order(tokens, count), strict=True)]
    suffix = sum(size for r in range(count) for _, size in tokens.rows(r))
    scored = sum(len(e.target) for r in range(count) for e in tokens.contexts[r]) + count
    last = 4.0 * shape.d_model**2 * shape.n_kv_heads / shape.n_heads  # keys and values alone
    step = suffix * ((above - 1) * block + last) + scored * (block - last + 2.0 * shape.d_model * shape.vocab_size)
    once = distinct(whole) * (top + 1) * block + distinct(before) * ((above - 1) * block + last)
    read = 4.0 * passes * (above * block / 2 + shape.d_model * shape.vocab_size)
    return Work(flops32=once + passes * step, bytes=read + 4.0 * shape.n_layers * block / 2)


def _in_order(tokens: _Tokens, count: int) -> list[tuple[int, int]]:
    """The rows as `values_work` lists them: all contexts, then all KL prompts."""
    rows = [tokens.rows(r) for r in range(count)]
    return [row for request in rows for row in request[:-1]] + [request[-1] for request in rows]


def keys_work(shape: Shape, tokens: _Tokens, count: int) -> Work:
    """Distinct tokens up to the subject's last through the blocks up to the top edited one; for the current values, bare
    prompts from each edited layer to the top.
    """
    top, block = shape.layers[-1], block_flops(shape)
    bare = [tokens.contexts[r][0] for r in range(count)]
    rows = [e.tokens[: e.subject_last + 1] for r in range(count) for e in tokens.contexts[r]]
    again = distinct([e.tokens[: e.subject_last + 1] for e in bare]) * sum(top - layer for layer in shape.layers)
    return Work(flops32=block * (distinct(rows) * (top + 1) + again), bytes=4.0 * (top + 1) * block / 2)


def solve_work(shape: Shape, count: int) -> Work:
    """For the first batch: keys whitened by a triangular solve, the update brought back by another, both in float64, and the
    update's product; m x m work is small. The factor and the kernel are read and the kernel is written."""
    size, width = shape.d_ff, shape.d_model
    flops = count * (2.0 * size**2 + 2.0 * size * width * 2)
    moved = 8.0 * (2 * size**2 / 2 + 2 * size * width)
    return Work(flops64=flops * len(shape.layers), bytes=moved * len(shape.layers))


def plot(result: Mapping[str, Any], folder: Path) -> None:
    """Measured time of each shape beside its floor, by part."""
    shapes = result["shapes"]
    title = f"An edit of {result['count']} requests over the floor of its arithmetic"
    with figure(folder / "roofline.png", title, columns=len(shapes)) as axes:
        for place, (name, found) in zip(axes, shapes.items(), strict=True):
            parts = found["parts"]
            floor = {part: row["floor_seconds"] for part, row in parts.items()}
            spent = {part: row["seconds"] for part, row in parts.items()} | {"other": found["other_seconds"]}
            stacked(place, {"measured": spent, "floor": floor})
            overs = ", ".join(f"{part} {row['over_floor']:.1f}" for part, row in parts.items())
            place.set_title(f"{name}: {found['over_floor']:.1f} times the floor\n{overs}")
            place.set_ylabel("CPU seconds")
