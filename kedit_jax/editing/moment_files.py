"""Second moments on disk, named by what they are made of, with the sums that a larger sample goes on with.

One array a layer holds both: a symmetric matrix is half of one. In its lower triangle is C0, without its diagonal, which is
an array of its own; the rest is the upper triangle of the sum over complete blocks. A computation that is under way leaves
the same file under another name.
"""

import contextlib
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kedit_jax import files, hosts
from kedit_jax.errors import KeditError, shown

FORMAT = 3
"""2 added sums and errors; in files without a format each layer's array is C0, and they are read as they were. 3 added the
checksum of what a file says of itself: before, the one of its arrays was all."""

WRITING, ABANDONED = ".moments-", 24 * 3600  # names of files that are being written, and seconds after which none is

Triangles = Iterator[tuple[int, Float[np.ndarray, "k k"]]]
"""(layer, symmetric matrix): float64 in Fortran order, zeros above the diagonal."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of the keys of some layers, and what they were computed from.

    Attributes:
        by_layer: layer -> C0 [k, k], float64; empty in those of a session.
        tokens: size of the sample; less than was asked for where the corpus ended before.
        model: fingerprint of the model whose keys they are.
        corpus: sha256 of the token rows.
        dtype: of the model's parameters.
        errors: layer -> estimate of |C0 - C0 of all such text|_F / |C0|_F, from how much consecutive blocks of the sample
            differ. NaN where the sample is one block; empty for moments stored before there were estimates.
    """

    by_layer: Mapping[int, Float[np.ndarray, "k k"]]
    tokens: int
    model: str
    corpus: str
    dtype: str
    errors: Mapping[int, float] = field(default_factory=dict)

    def fingerprint(self, layers: Sequence[int]) -> str:
        """Names the content for some layers: equal for moments of the same model, layers, corpus and dtype."""
        return _fingerprint(self.model, tuple(sorted(layers)), self.corpus, self.dtype)

    def without_arrays(self) -> "Moments":
        """What they were computed from, alone: the arrays are as large as the factors that are made of them."""
        return replace(self, by_layer={})


@dataclass(frozen=True)
class Work:
    """What stored sums must have in common with those wanted, besides the corpus."""

    model: str
    layers: tuple[int, ...]
    dtype: str
    batch_tokens: int

    def finished(self, cache: Path, corpus: str) -> Path:
        """Where the moments of this corpus are stored: other batches make the same ones, up to rounding."""
        return moments_path(cache, _fingerprint(self.model, self.layers, corpus, self.dtype))

    def unfinished(self, cache: Path, first: str) -> Path:
        """Where sums are stored of a corpus that begins with the block of this sha256."""
        name = json.dumps([self.model, self.layers, self.dtype, self.batch_tokens, first])
        return cache / f"partial-{hashlib.sha256(name.encode()).hexdigest()}.safetensors"


@dataclass
class Sums:
    """Sums over the complete blocks of a corpus so far.

    Attributes:
        by_layer: layer -> sum of k k' [k, k], float64 in Fortran order; only the lower triangle counts.
        squares: layer -> sum over the blocks of |S|_F^2 / tokens, with S the block's own sum.
        corpus: sha256 of the rows of these blocks.
        first: sha256 of those of the first one.
    """

    by_layer: dict[int, Float[np.ndarray, "k k"]]
    squares: dict[int, float]
    blocks: int = 0
    tokens: int = 0
    corpus: str = ""
    first: str = ""

    @classmethod
    def none(cls, layers: Sequence[int], width: int) -> "Sums":
        """Before the first block."""
        return cls({layer: np.zeros((width, width), order="F") for layer in layers}, dict.fromkeys(layers, 0.0))

    def add(self, products: Triangles, tokens: int, corpus: str) -> None:
        """Add the sums over a complete block, behind which the corpus has this sha256."""
        for layer, product in products:
            self.squares[layer] += _square(product) / tokens
            self.by_layer[layer] += product
        self.blocks, self.tokens, self.corpus, self.first = (
            self.blocks + 1,
            self.tokens + tokens,
            corpus,
            self.first or corpus,
        )

    def unite(self) -> None:
        """Add what the other processes hold of the same blocks."""
        if hosts.count() == 1:
            return
        squares = hosts.total(np.array([self.squares[layer] for layer in sorted(self.squares)]))
        self.squares = dict(zip(sorted(self.squares), squares.tolist(), strict=True))
        for layer in sorted(self.by_layer):
            self.by_layer[layer] = np.asfortranarray(hosts.total(self.by_layer[layer].T).T)

    def clear(self) -> None:
        """Leave the sums to another process; how far they go stays known."""
        self.squares = dict.fromkeys(self.squares, 0.0)
        for total in self.by_layer.values():
            total[:] = 0

    def moments(self, products: Triangles, tokens: int, corpus: str, work: Work) -> Moments:
        """Of these blocks and the sample's last, which is not added: in a larger sample it may hold more."""
        means, errors, done = {}, {}, self.tokens + tokens
        for layer, product in products:
            means[layer] = _mean(self.by_layer[layer], product, done)
            errors[layer] = _error(means[layer], self.squares[layer] + _square(product) / tokens, self.blocks + 1, done)
        return Moments(means, done, work.model, corpus, work.dtype, errors)


def moments_path(cache: str | Path, fingerprint: str) -> Path:
    """Where moments of this fingerprint are stored in a cache folder."""
    return Path(cache) / f"moments-{fingerprint}.safetensors"


def read_moments(path: str | Path) -> Moments:
    """Moments as `compute_moments` stored them. Raises KeditError where the file is missing or damaged."""
    with _damage_named(Path(path)):
        about, arrays = _read(Path(path))
        if about["sums"] is None:
            by_layer = {layer: arrays[str(layer)] for layer in about["layers"]}
        else:
            by_layer = {layer: _below(arrays, layer) for layer in about["layers"]}
        errors = dict(zip(about["layers"], about["errors"], strict=True)) if about["errors"] else {}
        return Moments(by_layer, about["tokens"], about["model"], about["corpus"], about["dtype"], errors)


def read_sums(path: Path) -> Sums:
    """What a computation goes on with. Raises KeditError where the file is damaged."""
    with _damage_named(path):
        about, arrays = _read(path)
        done = about["sums"]
        return Sums(
            {layer: arrays[f"{layer}.triangles"].T for layer in about["layers"]},
            dict(zip(about["layers"], done["squares"], strict=True)),
            done["blocks"],
            done["tokens"],
            done["corpus"],
            done["first"],
        )


def write_moments(path: Path, moments: Moments, sums: Sums | None = None, batch_tokens: int = 0) -> None:
    """Store moments, whole or not at all, with the sums over their complete blocks where there are any.

    The matrices of `sums` are written to above their diagonals, where nothing counts.

    Raises:
        KeditError: the folder cannot be written to.
    """
    layers = tuple(sorted(moments.by_layer))
    work = Work(moments.model, layers, moments.dtype, batch_tokens)
    arrays: dict[str, np.ndarray] = {}
    for layer, c0 in moments.by_layer.items():
        triangles = np.zeros(c0.shape) if sums is None else sums.by_layer[layer].T
        np.copyto(triangles, c0, where=np.tri(len(c0), k=-1, dtype=bool))
        arrays |= {f"{layer}.triangles": triangles, f"{layer}.diagonal": c0.diagonal().copy()}
    errors = [moments.errors[layer] for layer in layers] if moments.errors else None
    about = {"tokens": str(moments.tokens), "corpus": moments.corpus, "errors": json.dumps(errors)}
    _store(path, arrays, work, sums or Sums({}, dict.fromkeys(layers, 0.0)), about)


def write_sums(path: Path, sums: Sums, work: Work) -> None:
    """Store the sums of a computation that is under way, whole or not at all. Raises KeditError."""
    arrays = {f"{layer}.triangles": total.T for layer, total in sums.by_layer.items()}
    _store(path, arrays, work, sums, {"tokens": "0", "corpus": "", "errors": "null"})


def stored_prefixes(cache: Path, work: Work, most: int | float) -> tuple[dict[str, Path], int]:
    """What is stored that may be of the corpus wanted: {sha256 of its beginning: file of sums to go on with}, and how many
    tokens must be read to recognise the longest of it.

    Raises:
        KeditError: a stored file that is damaged.
    """
    prefixes, furthest = {}, 0
    for path in sorted([*cache.glob("moments-*.safetensors"), *cache.glob("partial-*.safetensors")]):
        with _damage_named(path):
            about, _ = _read(path, only_about=True)
            if (about["model"], about["layers"], about["dtype"]) != (work.model, list(work.layers), work.dtype):
                continue
            done = about["sums"] or {"tokens": 0}
            if 0 < done["tokens"] <= most and done["batch_tokens"] == work.batch_tokens:
                prefixes[done["corpus"]] = path
                furthest = max(furthest, done["tokens"])
            if about["tokens"] <= most:
                furthest = max(furthest, about["tokens"])
    return prefixes, furthest


def check_writable(folder: Path) -> None:
    """Refuse now what would fail after hours of work; drop what processes left that were killed while they wrote."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for left in folder.glob(f"{WRITING}*"):
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _fingerprint(model: str, layers: tuple[int, ...], corpus: str, dtype: str) -> str:
    return hashlib.sha256(json.dumps([model, layers, corpus, dtype]).encode()).hexdigest()


def _square(triangle: Float[np.ndarray, "k k"]) -> float:
    """|S|_F^2 of the symmetric matrix whose lower triangle this is; above it are zeros."""
    flat, diagonal = triangle.ravel(order="K"), triangle.diagonal()
    return float(2 * (flat @ flat) - diagonal @ diagonal)


def _mean(sums: Float[np.ndarray, "k k"], last: Float[np.ndarray, "k k"], tokens: int) -> Float[np.ndarray, "k k"]:
    """The whole matrix from the lower triangles of its two parts."""
    c0 = np.tril(sums)
    c0 += last
    c0 /= tokens
    c0 += np.tril(c0, -1).T
    return c0


def _error(c0: Float[np.ndarray, "k k"], squares: float, blocks: int, tokens: int) -> float:
    """Relative error of a mean, from the spread of its blocks.

    With S_b the sum over block b of n_b tokens, and N all tokens of B blocks,
    sum_b n_b |S_b / n_b - C0|^2 = sum_b |S_b|^2 / n_b - N |C0|^2 has the expectation (B - 1) N E|C0 - E C0|^2 if blocks are
    independent, whatever goes on inside of them.
    """
    size = float(np.vdot(c0, c0))
    if blocks < 2 or not size:
        return math.nan
    return math.sqrt(max(0.0, squares - tokens * size) / ((blocks - 1) * tokens * size))


def _below(arrays: Mapping[str, np.ndarray], layer: int) -> Float[np.ndarray, "k k"]:
    """The whole symmetric matrix whose lower triangle and diagonal are stored."""
    c0 = np.tril(arrays[f"{layer}.triangles"], -1)
    c0 += c0.T
    np.fill_diagonal(c0, arrays[f"{layer}.diagonal"])
    return c0


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise KeditError(f"no moments at {str(path)!r}; compute them with `kedit stats`") from error
    except (SafetensorError, OSError, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise KeditError(f"stored moments {str(path)!r} are damaged ({error}); delete the file to recompute") from error


def _read(path: Path, *, only_about: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a stored file says of itself, and its arrays. Raises as `_damage_named` expects."""
    with safe_open(path, framework="numpy") as file:
        about, names = file.metadata(), list(file.keys())
        if "format" not in about:
            layers = json.dumps(sorted(map(int, names)))
            about = {**about, "format": "1", "layers": layers, "errors": "null", "sums": "null"}
        if int(about["format"]) > FORMAT:
            raise ValueError(f"format {about['format']} is of a newer kedit_jax")
        if int(about["format"]) > 2 and about["about"] != _about_digest(about):
            raise ValueError("what it says of itself is not what was written")
        read: dict[str, Any] = {name: about[name] for name in ("model", "corpus", "dtype")}
        read |= {name: json.loads(about[name]) for name in ("tokens", "layers", "errors", "sums")}
        arrays = {} if only_about else {name: file.get_tensor(name) for name in names}
        if not only_about and about["arrays"] != _digest(arrays):
            raise ValueError("its numbers are not those that were written")
        _check_about(read, arrays)
        return read, arrays


def _check_about(read: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Raise a ValueError where a file says what none does, or holds arrays of other shapes than moments have."""
    layers, tokens, errors, done = read["layers"], read["tokens"], read["errors"], read["sums"]
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"its layers are {shown(layers)}")
    if type(tokens) is not int or tokens < 0:
        raise ValueError(f"its tokens are {shown(tokens)}")
    if errors is not None and not (isinstance(errors, list) and all(type(error) is float for error in errors)):
        raise ValueError(f"its errors are {shown(errors)}")
    if done is not None:
        numbers = ("blocks", "tokens", "batch_tokens")
        if not isinstance(done, dict) or any(type(done.get(name)) is not int or done[name] < 0 for name in numbers):
            raise ValueError(f"its sums are {shown(done)}")
        if any(not isinstance(done.get(name), str) for name in ("corpus", "first")):
            raise ValueError(f"its sums are of the corpus {shown(done.get('corpus'))}")
        squares = done.get("squares")
        if not isinstance(squares, list) or not all(type(square) is float for square in squares):
            raise ValueError(f"its squares are {shown(squares)}")
    for name, array in arrays.items():
        square = (array.shape[0],) * (1 if name.endswith("diagonal") else 2) if array.ndim else ()
        if array.dtype != np.float64 or not array.size or array.shape != square:
            raise ValueError(f"its array {name!r} is {array.dtype} of shape {array.shape}")


def _about_digest(about: Mapping[str, str]) -> str:
    told = sorted((name, text) for name, text in about.items() if name != "about")
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """In files without a format the names are numbers, and their order counts as that of numbers."""
    digest = hashlib.sha256()
    for name in sorted(arrays, key=lambda name: (int(name.split(".")[0]), name)):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _store(path: Path, arrays: dict[str, np.ndarray], work: Work, sums: Sums, about: dict[str, str]) -> None:
    """Under the final name only what is complete."""
    done = {name: getattr(sums, name) for name in ("blocks", "tokens", "corpus", "first")}
    done |= {"squares": [sums.squares[layer] for layer in work.layers], "batch_tokens": work.batch_tokens}
    about = about | {"format": str(FORMAT), "model": work.model, "dtype": work.dtype, "layers": json.dumps(work.layers)}
    about |= {"sums": json.dumps(done), "arrays": _digest(arrays)}
    about |= {"about": _about_digest(about)}
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=WRITING)
    try:
        os.close(handle)
        save_file(arrays, unfinished, metadata=about)
        files.sync(Path(unfinished))
        os.replace(unfinished, path)
        files.sync(path.parent)
    except BaseException as error:
        os.unlink(unfinished)
        if isinstance(error, OSError | SafetensorError):
            raise _unwritable(path.parent, error) from error
        raise


def _unwritable(folder: Path, error: Exception) -> KeditError:
    return KeditError(f"cannot store moments in {str(folder)!r}: {error}; choose another folder, or none")
