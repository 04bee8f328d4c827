"""Folders and files that appear whole or not at all.

What is written goes to a sibling with a hidden name, is flushed to the disk, and takes its own name by a rename. Whatever
ends the writing before, a full disk or an interrupt, the sibling is deleted and what was there before is untouched. (A
process that is killed outright deletes nothing: then a hidden `.NAME.partial-...` stays, and still nothing under the name.)
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from kedit_jax.errors import ExportError

_MIB = 2**20


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str], *, mark: str, needed: int, overwrite: bool) -> Iterator[Path]:
    """A folder to write in, which becomes `folder` when the body ends.

    An earlier export steps aside only for the rename, and comes back if that fails.

    Args:
        mark: a file that every export of this kind holds. With `overwrite`, a folder without it is still refused: it is
            no export, and replacing it would delete something else.
        needed: bytes that will be written.

    Raises:
        ExportError: `folder` exists and may not be replaced, there is too little space, or writing failed.
    """
    folder = check_folder(folder, mark=mark, overwrite=overwrite)
    with _partial(folder, needed) as partial:
        partial.mkdir()
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        _take_place(partial, folder)


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str], *, needed: int, overwrite: bool) -> Iterator[Path]:
    """A file to write, which becomes `path` when the body ends; arguments and errors as for `new_folder`."""
    path = Path(path).expanduser().resolve()
    if path.is_dir():
        raise ExportError(f"{path} is a folder: give the name of a file")
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists: give another name, or overwrite=True to replace it")
    with _partial(path, needed) as partial:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)


def check_folder(folder: str | os.PathLike[str], *, mark: str, overwrite: bool) -> Path:
    """The whole path of a folder that `new_folder` may make; for callers who have much to do before they write."""
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file: give a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not overwrite:
        raise ExportError(f"{folder} exists and is not empty: give another folder, or overwrite=True to replace an export")
    if not (folder / mark).is_file():
        raise ExportError(f"{folder} holds no {mark}, so it is no earlier export and is not replaced: give another folder")
    return folder


@contextlib.contextmanager
def _partial(target: Path, needed: int) -> Iterator[Path]:
    """A hidden name beside the target, deleted if anything is left there in the end."""
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(target.parent, needed)
        yield partial
    except OSError as error:
        raise ExportError(f"{target} could not be written: {error}; nothing was left there") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _check_space(folder: Path, needed: int) -> None:
    """Refuse before writing what cannot be written; an earlier export that is replaced stays until the new one is whole."""
    free = shutil.disk_usage(folder).free
    if free < needed + _MIB:
        raise ExportError(
            f"it takes {needed / _MIB:,.0f} MiB in {folder} and {free / _MIB:,.0f} MiB are free; "
            "make room or choose another disk"
        )


def _take_place(partial: Path, folder: Path) -> None:
    """Rename onto `folder`; no file system replaces a folder that is not empty in one step, so an earlier one is moved."""
    aside = None
    if folder.exists() and any(folder.iterdir()):
        aside = folder.with_name(f".{folder.name}.replaced-{secrets.token_hex(4)}")
        os.rename(folder, aside)
    try:
        os.rename(partial, folder)
    except BaseException:
        if aside is not None:
            os.rename(aside, folder)
        raise
    _sync(folder.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the disk hold it: a rename can outlive a power failure that the data do not."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # folders cannot be opened everywhere
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
