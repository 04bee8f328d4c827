"""Editors kept on disk by content, so that a moment is factored once: n^3 work, minutes at n = 14336.

A file is named by what the editor was made of: the moment's dtype, shape and bytes, the kind of editor and its numbers. Its
arrays must have the checksum that they were written with under that name. A file that was cut, changed or renamed is made
anew, since all that it should hold can be.
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kedit_jax import files
from kedit_jax.errors import SolverError
from kedit_jax.solve.arrays import AnyArray
from kedit_jax.solve.editors import EDITORS, Editor
from kedit_jax.solve.prior import Prior, on_device, prior_fingerprint

FORMAT = "1"
"""Goes into every name: raise it when the same numbers come to mean another factor."""


def cached_editor(folder: str | Path, name: str, moment: Float[AnyArray, "n n"], **numbers: Any) -> Editor:
    """`EDITORS[name](moment, **numbers)`, from the folder if it was made before, and stored there otherwise.

    Reading costs n^2 instead of n^3. The arrays are bit for bit those that were stored. A damaged file is made anew.

    Args:
        folder: made if it is missing; delete files in it at will.

    Raises:
        SolverError: an unknown editor, a folder that cannot be written, or as the editor itself.
        NonFiniteError: as the editor itself.
    """
    if name not in EDITORS:
        raise SolverError(f"unknown editor {name!r}: one of {', '.join(EDITORS)}")
    path = Path(folder) / f"prior-{_content(name, moment, numbers)}.safetensors"
    stored = _read(path, np.shape(moment)[-1])
    if stored is not None:
        return stored
    editor = EDITORS[name](moment, **numbers)
    try:
        _write(path, editor)
    except OSError as error:
        raise SolverError(f"cannot store priors in {str(folder)!r}: {error}; choose another folder, or none") from error
    return editor


def _content(name: str, moment: Float[AnyArray, "n n"], numbers: Mapping[str, Any]) -> str:
    """sha256 (hex) of all that decides what the editor is; numbers that are None are those that were not given."""
    array = np.ascontiguousarray(moment)
    given = {key: number for key, number in sorted(numbers.items()) if number is not None}
    about = json.dumps([FORMAT, name, given, array.dtype.str, array.shape])
    digest = hashlib.sha256(about.encode())
    digest.update(array.data)
    return digest.hexdigest()


def _read(path: Path, width: int) -> Editor | None:
    """What is stored there; None if nothing is, or, with a warning, where it no longer has its checksum or is no editor for
    keys of this width: whoever can write the file can compute its checksum."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        prior, noise = Prior(arrays["factor"], arrays.get("basis")), float(arrays["noise"])
        if about["checksum"] != _checksum(path, prior, noise):
            raise ValueError("its numbers are not those that were written")
        _check_usable(prior, noise, width)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        warnings.warn(f"the factored prior in {str(path)!r} is damaged ({error}) and is made anew", stacklevel=3)
        return None
    return Editor(on_device(arrays["factor"], arrays.get("basis")), noise)


def _check_usable(prior: Prior, noise: float, width: int) -> None:
    """Raise a ValueError where the arrays are none that a factored prior has."""
    factor, basis = np.asarray(prior.factor), None if prior.basis is None else np.asarray(prior.basis)
    if factor.dtype != np.float64 or factor.ndim not in (1, 2) or len(set(factor.shape)) > 1 or not factor.size:
        raise ValueError(f"its factor is {factor.dtype} of shape {factor.shape}")
    if (factor.shape[0], width) != (width, width) if basis is None else basis.shape != (width, factor.shape[0]):
        raise ValueError(f"its factor of shape {factor.shape} does not fit keys of width {width}")
    diagonal = factor if factor.ndim == 1 else factor.diagonal()
    if not np.isfinite(factor).all() or not (diagonal > 0).all() or not (basis is None or np.isfinite(basis).all()):
        raise ValueError("its numbers are none of a factor")
    if not (np.isfinite(noise) and noise >= 0):
        raise ValueError(f"its noise is {noise}")


def _write(path: Path, editor: Editor) -> None:
    """Store under the final name only what is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prior, noise = editor.prior, float(editor.noise)
    arrays = {"factor": prior.factor, "noise": np.float64(noise)} | ({} if prior.basis is None else {"basis": prior.basis})
    about = {"checksum": _checksum(path, prior, noise)}
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".prior-")
    os.close(handle)
    try:
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, partial, metadata=about)
        files.sync(Path(partial))
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _checksum(path: Path, prior: Prior, noise: float) -> str:
    return hashlib.sha256(f"{path.name} {prior_fingerprint(prior)} {noise!r}".encode()).hexdigest()
