"""Data sets by name from the Hugging Face hub: a file is used only if its checksum is the one that was asked for."""

import hashlib
import os
import re
import tempfile
from pathlib import Path

from kedit_jax.evaluation.records import RecordError

HUB = "hf://datasets/"
_NAME = re.compile(rf"{HUB}(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?/(?P<file>[\w. +/-]+)")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def fetch(name: str, *, sha256: str | None, cache: str | Path | None = None) -> Path:
    """The local copy of a file of a data set on the hub, downloaded when it is not there yet.

    A file with another checksum is not kept, and neither is a download that was interrupted.

    Args:
        name: `hf://datasets/OWNER/NAME/FILE`, with `@REVISION` behind the data set's name at will.
        sha256: the file's SHA-256, 64 hexadecimal digits: what a hub serves under a name may change.
        cache: folder of the copies, by checksum; by default `kedit_jax/datasets` in the user's cache folder.

    Raises:
        RecordError: a name or checksum of another form, a file that cannot be fetched or stored, or another file.
    """
    found = _NAME.fullmatch(name)
    if found is None or any(part in ("", ".", "..") for part in found["file"].split("/")):
        raise RecordError(
            f"{name!r} names no file of a data set; write {HUB}OWNER/NAME/FILE or {HUB}OWNER/NAME@REVISION/FILE"
        )
    wanted = _digest(sha256, name)
    folder = Path(cache) if cache is not None else _default_cache()
    target = folder / wanted / Path(found["file"]).name
    try:
        if target.is_file() and _sum_of(target) == wanted:
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as place:
            path = _download(found["repo"], found["file"], found["revision"], place, name)
            check_sum(path, wanted, name)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)  # within one file system, so whole or not at all
    except OSError as error:
        raise RecordError(f"cannot store {name!r} in {str(folder)!r}: {error}; give another cache folder") from error
    return target


def check_sum(path: Path, sha256: str, name: str | None = None) -> None:
    """Raise a RecordError where a file does not have the checksum, or cannot be read."""
    name = name or str(path)
    wanted = _digest(sha256, name)
    try:
        found = _sum_of(path)
    except OSError as error:
        raise RecordError(f"cannot read records from {name!r}: {error}") from error
    if found != wanted:
        raise RecordError(
            f"{name!r} is not the file that was asked for: its SHA-256 is {found}, not {wanted}; nothing was kept or read"
        )


def _digest(sha256: str | None, name: str) -> str:
    if sha256 is None or not _SHA256.fullmatch(sha256):
        raise RecordError(
            f"{name!r} needs its sha256, 64 hexadecimal digits, not {sha256!r:.80}; the hub shows it beside the file"
        )
    return sha256.lower()


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kedit_jax" / "datasets"


def _download(repo: str, file: str, revision: str | None, place: str, name: str) -> Path:
    import huggingface_hub  # only for names on the hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset", revision=revision, local_dir=place))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise RecordError(
            f"{name!r} could not be fetched from the Hugging Face hub: {error}; without a hub, give a path"
        ) from error
