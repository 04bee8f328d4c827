"""Folders and files that appear whole or not at all.

What is written goes to a sibling with a hidden name, is flushed to the disk, and takes its own name by a rename. Whatever
ends the writing before, a full disk or an interrupt, the sibling is deleted and what was there before is untouched. (A
process that is killed outright deletes nothing: then a hidden `.NAME.partial-...` stays, and still nothing under the name.)

What is replaced is an earlier export and nothing else: every folder lists its files in a manifest, and one that holds
anything beside them stays as it is.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from kedit_jax import files
from kedit_jax.errors import ExportError

MANIFEST = "kedit_export.json"
"""What each exported folder says of itself: `format`, `form`, and the `files` written. Nobody else reads that name."""

FORMAT = "kedit_jax export 1"

_KIND = FORMAT.rpartition(" ")[0]
_MIB = 2**20
_SHOWN = 3  # files that an error names
_TO_REPLACE = "pass overwrite=True (--overwrite) to replace"


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str], *, form: str, needed: int, overwrite: bool) -> Iterator[Path]:
    """A folder to write in, which gets its manifest and becomes `folder` when the body ends.

    An earlier export steps aside only for the rename, and comes back if that fails.

    Args:
        form: of the export. With `overwrite`, what is replaced is an earlier export of this form, as `check_folder` says.
        needed: bytes that will be written.

    Raises:
        ExportError: `folder` exists and may not be replaced, there is too little space, or writing failed.
    """
    folder = check_folder(folder, form, overwrite=overwrite)
    with _partial(folder, needed) as partial:
        partial.mkdir()
        yield partial
        _write_manifest(partial, form)
        files.sync_tree(partial)
        check_folder(folder, form, overwrite=overwrite)  # writing takes minutes, in which others may have put files there
        _take_place(partial, folder)


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str], *, ours: Callable[[Path], bool], needed: int, overwrite: bool) -> Iterator[Path]:
    """A file to write, which becomes `path` when the body ends.

    Args:
        ours: whether a file is an earlier export; with `overwrite`, any other is still refused.
        needed: bytes that will be written.

    Raises:
        ExportError: as for `new_folder`, or `path` is a symbolic link.
    """
    path = check_file(path, ours=ours, overwrite=overwrite)
    with _partial(path, needed) as partial:
        yield partial
        files.sync(partial)
        check_file(path, ours=ours, overwrite=overwrite)
        os.replace(partial, path)
        files.sync(path.parent)


def check_folder(folder: str | os.PathLike[str], form: str, *, overwrite: bool) -> Path:
    """The whole path of a folder that `new_folder` may make; for callers who have much to do before they write.

    Raises:
        ExportError: it is a file, or a folder that holds something; with `overwrite`, something other than an earlier
            export of the same form: the model that an adapter belongs to may itself be a merged export.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file: give a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    if not overwrite:
        raise ExportError(f"{folder} exists and is not empty: give another folder, or {_TO_REPLACE} an earlier export")
    found, listed = _read_manifest(folder)
    foreign = _beyond(folder, listed)
    if found is None:
        raise ExportError(
            f"{folder} holds no {MANIFEST} of this program, so it is no earlier export and is not replaced; "
            f"it holds {_some(foreign)}: give another folder"
        )
    if found != form:
        raise ExportError(
            f"{folder} holds an export of the form {found!r}, which {form!r} does not replace: give another folder"
        )
    if foreign:
        raise ExportError(
            f"{folder} is not replaced, for it holds more than the earlier export: {_some(foreign)}; "
            "move that elsewhere, or give another folder"
        )
    return folder


def check_file(path: str | os.PathLike[str], *, ours: Callable[[Path], bool], overwrite: bool) -> Path:
    """The whole path of a file that `new_file` may make; arguments and errors as there."""
    path = Path(path).expanduser()
    path = path.parent.resolve() / path.name
    if path.is_symlink():
        raise ExportError(f"{path} is a symbolic link, which is neither followed nor replaced: give the name of a file")
    if path.is_dir():
        raise ExportError(f"{path} is a folder: give the name of a file")
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists: give another name, or {_TO_REPLACE} an earlier export")
    if path.exists() and not (path.is_file() and ours(path)):
        raise ExportError(f"{path} is no earlier export and is not replaced: give another name")
    return path


def _write_manifest(folder: Path, form: str) -> None:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    manifest = {"format": FORMAT, "form": form, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_manifest(folder: Path) -> tuple[str | None, set[str]]:
    """Form and files; no form where there is no manifest, or one that is damaged or somebody else's."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"].rpartition(" ")[0] == _KIND:
            return str(manifest["form"]), {MANIFEST, *map(str, manifest["files"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None, set()


def _beyond(folder: Path, listed: set[str]) -> list[str]:
    """What lies in the folder and is neither a file that is listed nor a folder that holds one."""
    folders = {parent.as_posix() for name in listed for parent in Path(name).parents}
    return sorted(
        name
        for path in folder.rglob("*")
        if (name := path.relative_to(folder).as_posix()) not in (folders if path.is_dir() else listed)
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


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
    try:
        files.sync(folder.parent)
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
