"""Editing sessions on disk: an Orbax checkpoint a version, written whole or not at all, by one process at a time.

A session folder holds `00000001/`, `00000002/` ... A version is written under a hidden name, gets the checksums of its
files, is flushed to the disk (Orbax flushes the arrays, but neither what it says of them, nor the manifest, nor the folders
above), and takes its own name by a rename; only then is the version before it deleted. The highest complete one is the
session. Orbax is used nowhere else in the package: its v1 API still moves.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from kedit_jax import files, hosts, solve
from kedit_jax.editing.history import Compacted
from kedit_jax.editing.moments import Moments
from kedit_jax.editing.packed import Sizes
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, Event, StoredLayer, restore_session
from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.stored import manifest_problems
from kedit_jax.errors import KeditError, SessionError, shown
from kedit_jax.models import Decoder, model_fingerprint

FORMAT = 3
"""2 added facts taken back or skipped, compaction and times; sessions of format 1 are read as if they had none. 3 added
checksums of the files, without which damage shows in the arrays alone, and the reasons of steps rolled back."""
_VERSION_DIGITS = 8
_MANIFEST = "_CHECKPOINT_METADATA"  # where Orbax keeps it
_WRITING, _REMOVED = ".writing-", ".removed-"  # a version that is not yet, and one that is no longer
_PRIOR_TOLERANCE = 1e-9  # relative; moments recomputed elsewhere differ by rounding, some 1e-15

Read = TypeVar("Read")


@dataclass(frozen=True)
class SessionLock:
    """That this process alone writes the session in a folder, for as long as `lock_session` holds."""

    folder: Path


@contextlib.contextmanager
def lock_session(folder: str | Path) -> Iterator[SessionLock]:
    """Be the one that changes a session, from loading it to saving it, so that no edit made in between is lost.

    Hand the lock to `save_session`. It ends with the process, however that ends. Reading needs none.

    Raises:
        SessionError: another process holds it; it is named.
    """
    folder = Path(folder).absolute()
    with contextlib.ExitStack() as held:

        def lock() -> None:
            try:
                held.enter_context(files.locked(folder))
            except BlockingIOError as error:
                raise SessionError(
                    f"the session in {str(folder)!r} is being written by {error}; end it or wait until it is done"
                ) from None
            except OSError as error:
                raise SessionError(f"cannot save the session to {str(folder)!r}: {error}; nothing was stored") from error

        hosts.on_first(lock)
        yield SessionLock(folder)


def save_session(
    session: EditSession, folder: str | Path, *, overwrite: bool = False, lock: SessionLock | None = None
) -> Path:
    """Store a session as the newest version in `folder`; until that is complete, the version before it stays.

    Stored are the delta and constraints, the facts, settings, prefixes, history, and the fingerprints of the
    model and the moments; neither the model nor the moments themselves.

    Args:
        overwrite: also where the folder holds a session that this one does not continue.
        lock: what `lock_session` gave for this folder; without it, the folder is locked while the session is written.

    Returns:
        The folder of the version written.

    Raises:
        SessionError: no space, no permission, another process writing there, another session in the folder, or a newer
            state of this one; what was there is untouched.
    """
    folder = Path(folder).absolute()
    if lock is not None and lock.folder != folder:
        raise SessionError(f"the lock is on {str(lock.folder)!r}, not on {str(folder)!r}; lock the folder that is written")
    arrays = _arrays(session)
    saving = _Saving(folder, arrays, _manifest(session) | {"arrays": _digest(arrays)})
    with contextlib.nullcontext() if lock is not None else lock_session(folder):
        partial = hosts.on_first(saving.told(lambda: saving.begin(session, overwrite)))
        saving.store(Path(partial))
        return Path(hosts.on_first(saving.told(saving.finish)))


@dataclass
class _Saving:
    """A version being written in a folder that is locked: the first process makes room for it, all hand their arrays to
    Orbax, which waits for all, and the first one gives the version its name."""

    folder: Path
    arrays: dict[str, Any]
    manifest: dict[str, Any]
    before: list[Path] = dataclasses.field(default_factory=list)
    target: Path | None = None

    def told(self, work: Callable[[], Path]) -> Callable[[], Path]:
        """Work with errors that say where the session stands, whatever the storage layers raise."""

        def guarded() -> Path:
            try:
                return work()
            except Exception as error:
                _sweep(self.folder)
                if isinstance(error, SessionError):
                    raise
                kept = f"version {self.before[-1].name} is intact" if self.before else "nothing was stored"
                raise SessionError(f"cannot save the session to {str(self.folder)!r}: {error}; {kept}") from error

        return guarded

    def begin(self, session: EditSession, overwrite: bool) -> Path:
        """Room for the next version."""
        self.before = _versions(self.folder)
        stored = _read_manifest(self.before[-1]) if self.before else None
        if stored is not None and not overwrite:
            _check_continues(stored, session, self.manifest, self.folder)
        self.manifest["times"] = _times(session, stored)
        number = 1 + max((int(path.name) for path in _numbered(self.folder)), default=0)
        self.target = self.folder / f"{number:0{_VERSION_DIGITS}d}"
        _sweep(self.folder)
        _check_space(self.folder, sum(a.nbytes for a in jax.tree.leaves(self.arrays)))
        return self.folder / f"{_WRITING}{self.target.name}"

    def store(self, partial: Path) -> None:
        """The version's files, under a name that is none of a version."""
        problem: SessionError | None = None

        def write() -> Path:
            ocp.save_checkpointables(partial, {"arrays": self.arrays}, custom_metadata=self.manifest)
            return partial

        try:
            self.told(write)()
        except SessionError as error:
            problem = error
        hosts.agree(problem)

    def finish(self) -> Path:
        """On the disk before those before it are deleted."""
        if self.target is None:
            raise SessionError("a version is finished that was not begun")
        partial = self.folder / f"{_WRITING}{self.target.name}"
        files.write_sums(partial)
        files.sync_tree(partial)
        os.rename(partial, self.target)
        files.sync(self.folder)
        files.sync(self.folder.parent)
        for old in self.before:  # renamed first, so that one that is half deleted does not bear its name
            with contextlib.suppress(OSError):
                os.rename(old, self.folder / f"{_REMOVED}{old.name}")
        _sweep(self.folder)
        return self.target


def _sweep(folder: Path) -> None:
    """Delete what is no version: of this process, and of those that were killed while they wrote."""
    for prefix in (_WRITING, _REMOVED):
        for left in folder.glob(f"{prefix}*"):
            if left.is_symlink():  # never ours, and not followed
                left.unlink(missing_ok=True)
            shutil.rmtree(left, ignore_errors=True)


def load_session(
    folder: str | Path, model: Decoder, tokenizer: Any, moments: Moments, *, priors: str | Path | None = None
) -> EditSession:
    """The newest complete session of a folder, ready to continue as if it had never been stored.

    Args:
        model: the ORIGINAL model, as it was before any edit.
        moments: of the same model and corpus as when the session was started; as there, none of their arrays is kept.
        priors: folder of factored moments, as for `start_session`.

    Raises:
        SessionError: no session there, one of a newer format, or another model, dtype, layer or corpus than it was made
            with: everything that differs is listed.
    """
    return _of_newest(folder, lambda version: _load(version, model, tokenizer, moments, priors))


def _load(version: Path, model: Decoder, tokenizer: Any, moments: Moments, priors: str | Path | None) -> EditSession:
    manifest = _read_manifest(version)
    settings = EditSettings.from_dict(manifest["settings"])
    problems = [
        f"{what}: the session has {stored}, given is {given}"
        for what, stored, given in (
            ("layers of the model", manifest["model"]["n_layers"], model.config.n_layers),
            ("kernel shape", tuple(manifest["model"]["kernel"]), (model.config.d_ff, model.config.d_model)),
            ("dtype", manifest["model"]["dtype"], str(model.dtype)),
            ("model weights", manifest["model"]["fingerprint"][:16], model_fingerprint(model)[:16]),
            ("moments", manifest["moments"][:16], moments.fingerprint(settings.layers)[:16]),
        )
        if stored != given
    ]
    if problems:
        raise SessionError.listing(f"the session in {str(version)!r} was made with something else:", problems)
    if (version / files.SUMS).is_file():
        _check_undamaged(version, files.check_sums(version))
    try:
        _check_sizes(version, manifest)
        arrays = ocp.load_checkpointables(version)["arrays"]
        _check_finite(arrays)
        if _digest(arrays) != manifest["arrays"]:
            raise ValueError("its arrays are not those that were saved")
        kernel = (model.config.d_ff, model.config.d_model)
        layers = {layer: _stored_layer(arrays.get("layers", {}).get(str(layer), {}), kernel) for layer in settings.layers}
        session = restore_session(
            model,
            tokenizer,
            moments,
            settings,
            prefixes=tuple(manifest["prefixes"]),
            layers=layers,
            priors=priors,
            facts=_facts(manifest, "facts"),
            batches=tuple(manifest["batches"]),
            sizes=None if manifest.get("sizes") is None else Sizes(**manifest["sizes"]),
            events=read_events(manifest),
            retired=_facts(manifest, "retired"),
            skipped=_facts(manifest, "skipped"),
            compacted=manifest.get("compacted", 0),
        )
    except KeditError:
        raise
    except Exception as error:  # any of Orbax's layers can meet the damage, and arrays may not fit what is said of them
        raise _damaged(version, [str(error) or type(error).__name__]) from error
    _check_priors({layer: editor.prior for layer, editor in session.editors.items()}, manifest["priors"], version)
    return session


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What a stored session says of itself, without its arrays: facts, settings, prefixes, events, fingerprints.

    Raises:
        SessionError: no session there, or one of a newer format.
    """
    return _of_newest(folder, _read_manifest)


def read_events(manifest: Mapping[str, Any]) -> tuple[Event, ...]:
    """The history in a stored session's manifest."""
    return tuple(
        Event(
            event["kind"],
            tuple(event["ids"]),
            tuple(event.get("replaced", ())),
            tuple(event.get("skipped", ())),
            event.get("undoes"),
            tuple(event.get("texts", ())),
            event.get("reason", ""),
        )
        for event in manifest["events"]
    )


def has_session(folder: str | Path) -> bool:
    """Whether a session is stored there, or parts of one, which `read_manifest` then names."""
    return bool(_numbered(Path(folder).absolute()))


def newest_version(folder: str | Path) -> Path:
    """The folder of the newest complete version. Raises SessionError when there is none."""
    versions = _versions(Path(folder).absolute())
    if not versions:
        partial = ", ".join(path.name for path in _numbered(Path(folder).absolute()))
        found = (
            f"no complete session in {str(folder)!r}, only parts of {partial}"
            if partial
            else f"no session in {str(folder)!r}"
        )
        raise SessionError(f"{found}; write one with `kedit edit` or `save_session`")
    return versions[-1]


def _of_newest(folder: str | Path, read: Callable[[Path], Read]) -> Read:
    """What is read of the newest version; of the next one where a process that writes has replaced it meanwhile."""
    version = newest_version(folder)
    while True:
        try:
            return read(version)
        except SessionError:
            version, before = newest_version(folder), version
            if version == before:
                raise


def _versions(folder: Path) -> list[Path]:
    """Complete versions, oldest first. What was not finished bears another name, what was half copied may have no mark."""
    return [path for path in _numbered(folder) if _is_complete(path)]


def _is_complete(version: Path) -> bool:
    if (version / files.SUMS).is_file():  # the last to be written; what else is missing is damage, and is named
        return True
    try:  # `ocp.is_orbax_checkpoint` is content with an empty folder
        return bool(ocp.checkpointables_metadata(version).custom_metadata)
    except Exception:  # whatever Orbax meets in files that anyone may have written
        return False


def _numbered(folder: Path) -> list[Path]:
    """Whatever bears the name of a version, complete or not, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if len(path.name) == _VERSION_DIGITS and path.name.isdigit())


def _arrays(session: EditSession) -> dict[str, Any]:
    """Everything numeric. Orbax stores no empty trees and no empty arrays, so what is empty is left out."""
    layers = {}
    for layer, history in session.layers.items():
        held: dict[str, Any] = _rows(history.constraints) | {"retired": _rows(history.retired)}
        if session.facts:
            held["update"] = history.update
        if history.base is not None:
            held["base"] = {
                "gram": np.asarray(history.base.statistics.gram),
                "right": np.asarray(history.base.statistics.right),
                "count": np.array([int(history.base.statistics.count)]),
                "update": history.base.update,
            }
        layers[str(layer)] = {name: value for name, value in held.items() if not isinstance(value, dict) or value}
    size = np.array([len(session.facts)])
    return {"size": size} | ({"layers": layers} if all(layers.values()) else {})


def _rows(stack: solve.Constraints) -> dict[str, np.ndarray]:
    if not stack.size:
        return {}
    return {name: np.asarray(getattr(stack, name)) for name in ("keys", "residuals", "noise")}


def _digest(arrays: dict[str, Any]) -> str:
    """sha256 of every array's path, dtype, shape and bytes: Orbax notices a missing file, not a changed byte."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        host = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {host.dtype} {host.shape}\n".encode() + host.tobytes())
    return digest.hexdigest()


def _stored_layer(arrays: Mapping[str, Any], kernel: tuple[int, int]) -> StoredLayer:
    base, update = None, np.asarray(arrays["update"]) if "update" in arrays else np.zeros(kernel)
    if "base" in arrays:
        count = np.asarray(arrays["base"]["count"], np.int32)[0]
        gram, right, then = (np.asarray(arrays["base"][name]) for name in ("gram", "right", "update"))
        base = Compacted(solve.Statistics(gram, right, np.asarray(count)), then)
    return StoredLayer(_stack(arrays, kernel), _stack(arrays.get("retired", {}), kernel), update, base)


def _stack(arrays: Mapping[str, Any], kernel: tuple[int, int]) -> solve.Constraints:
    if "keys" not in arrays:
        return solve.Constraints(np.zeros((0, kernel[0]), np.float32), np.zeros((0, kernel[1])), np.zeros(0))
    return solve.Constraints(*(np.asarray(arrays[name]) for name in ("keys", "residuals", "noise")))


def _facts(manifest: Mapping[str, Any], which: str) -> tuple[EditRequest, ...]:
    return tuple(EditRequest(**fact) for fact in manifest.get(which, ()))


def _times(session: EditSession, stored: Mapping[str, Any] | None) -> list[str]:
    """When each event was first stored, in UTC. Sessions themselves read no clock: the same edits give the same session."""
    known: list[str] = []
    if stored is not None and read_events(stored) == session.events[: len(stored["events"])]:
        known = list(stored.get("times", [""] * len(stored["events"])))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return known + [now] * (len(session.events) - len(known))


def _manifest(session: EditSession) -> dict[str, Any]:
    config = session.base.config
    return {
        "format": FORMAT,
        "kedit_jax": metadata.version("kedit-jax"),
        "model": {
            "fingerprint": session.moments.model,
            "family": config.family,
            "n_layers": config.n_layers,
            "kernel": [config.d_ff, config.d_model],
            "dtype": str(session.base.dtype),
        },
        "moments": session.moments.fingerprint(session.settings.layers),
        "priors": {str(layer): _prior_mark(editor.prior) for layer, editor in session.editors.items()},
        "settings": session.settings.to_dict() | {"layers": list(session.settings.layers)},
        "prefixes": list(session.prefixes),
        "facts": [fact.to_dict() for fact in session.facts],
        "batches": list(session.batches),
        "sizes": None if session.sizes is None else session.sizes._asdict(),
        "events": [dataclasses.asdict(event) for event in session.events],
        "retired": [fact.to_dict() for fact in session.retired],
        "skipped": [fact.to_dict() for fact in session.skipped],
        "compacted": session.compacted,
    }


def _prior_mark(prior: solve.Prior) -> dict[str, Any]:
    """What a prior is recognised by: its exact fingerprint, and a size that survives another machine's rounding."""
    return {"fingerprint": solve.prior_fingerprint(prior), "norm": float(np.linalg.norm(np.asarray(prior.factor)))}


def _check_priors(priors: Mapping[int, solve.Prior], stored: dict[str, Any], folder: str | Path) -> None:
    """Raise unless the priors made of the given moments are those of the session, up to rounding."""
    problems = []
    for layer, prior in priors.items():
        mark, was = _prior_mark(prior), stored[str(layer)]
        if mark["fingerprint"] != was["fingerprint"] and abs(mark["norm"] / was["norm"] - 1) > _PRIOR_TOLERANCE:
            problems.append(
                f"prior of layer {layer}: norm {was['norm']:.9g} in the session, {mark['norm']:.9g} from these moments"
            )
    if problems:
        raise SessionError.listing(f"the moments are not those that the session in {str(folder)!r} was made with:", problems)


def _read_manifest(version: Path) -> dict[str, Any]:
    if (version / files.SUMS).is_file():
        _check_undamaged(version, files.check_sums(version, only=_MANIFEST))
    _check_undamaged(version, files.irregular(version))
    try:
        json.loads((version / _MANIFEST).read_bytes())  # or Orbax would log all that it holds, escape sequences included
        manifest = ocp.checkpointables_metadata(version).custom_metadata
    except Exception as error:  # whatever Orbax meets in files that anyone may have written
        raise _damaged(version, [str(error) or type(error).__name__]) from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise SessionError(f"{str(version)!r} is an Orbax checkpoint, but no editing session")
    if type(manifest["format"]) is not int or manifest["format"] < 1:
        raise _damaged(version, [f"its format is {shown(manifest['format'])}; it must be a number from 1 to {FORMAT}"])
    if manifest["format"] > FORMAT:
        raise SessionError(
            f"{str(version)!r} has session format {shown(manifest['format'])}, newer than {FORMAT}, the newest known here; "
            "upgrade kedit-jax"
        )
    if manifest["format"] > 2 and not (version / files.SUMS).is_file():
        raise _damaged(version, [f"{files.SUMS} is missing"])
    _check_undamaged(version, manifest_problems(manifest))
    return manifest


def _check_sizes(version: Path, manifest: Mapping[str, Any]) -> None:
    """Raise before memory is allocated for more than a session of so many facts can hold: zeros compress to nothing."""
    width, out = manifest["model"]["kernel"]
    rows = width + sum(len(manifest.get(which, ())) for which in ("facts", "retired"))
    stored = (ocp.checkpointables_metadata(version).metadata or {}).get("arrays")
    leaves = jax.tree_util.tree_leaves_with_path(stored, is_leaf=lambda node: hasattr(node, "shape"))
    if len(leaves) > 1 + 12 * len(manifest["priors"]):  # a layer has at most three arrays of each of three stacks
        raise ValueError(f"it holds {len(leaves)} arrays, more than any session of its layers")
    for path, leaf in leaves:
        chunk = getattr(getattr(leaf, "storage_metadata", None), "chunk_shape", None) or ()
        for shape in (getattr(leaf, "shape", None) or (), chunk):
            if math.prod(shape) > rows * max(width, out):
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} has shape {shape}, more than {rows} rows of a kernel's width"
                )


def _check_finite(arrays: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        bad = np.size(leaf) - np.count_nonzero(np.isfinite(leaf))
        if bad:
            raise ValueError(f"{jax.tree_util.keystr(path)} has {bad} entries that are NaN or infinite")


def _check_undamaged(version: Path, problems: list[str]) -> None:
    if problems:
        raise _damaged(version, problems)


def _damaged(version: Path, problems: list[str]) -> KeditError:
    others = [path.name for path in _versions(version.parent) if path.name < version.name]
    mend = f"delete it to go on with version {others[-1]}" if others else "bring the folder back from a copy"
    return SessionError.listing(f"the session in {str(version)!r} is damaged; {mend}:", problems)


def _check_continues(stored: dict[str, Any], session: EditSession, manifest: dict[str, Any], folder: Path) -> None:
    """Raise unless the stored session is an earlier state of the one to be saved."""
    events = read_events(stored)
    same = all(stored[name] == manifest[name] for name in ("model", "moments", "prefixes"))
    same = same and EditSettings.from_dict(stored["settings"]) == session.settings
    if not same or session.events[: len(events)] != events:
        raise SessionError(
            f"{str(folder)!r} holds another session, of {len(stored['facts'])} facts after {len(events)} steps, which this "
            f"one, after {len(session.events)}, does not continue; if it was changed since you loaded it, load it again and "
            "repeat your step; otherwise choose another folder, or pass overwrite=True to replace it"
        )


def _check_space(folder: Path, size: int) -> None:
    """Refuse before writing what cannot be written: Orbax reports it late, with a traceback for each of its threads."""
    needed, free = int(1.1 * size) + 2**20, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"it takes {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free; make room or choose another disk"
        )
    with tempfile.TemporaryFile(dir=folder) as probe:  # quotas and read-only disks show in writing alone
        for begin in range(0, needed, 2**20):
            probe.write(bytes(min(2**20, needed - begin)))
