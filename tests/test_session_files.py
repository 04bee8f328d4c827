"""A session's files against crashes, other writers and bit rot: one version or the other, and what is damaged is named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedit_jax import checkpoint, files
from kedit_jax.checkpoint import has_session, lock_session, newest_version, read_manifest, save_session
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import SessionError

Reload = Callable[[EditSession, Path], EditSession]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what a power cut leaves ------------------------------------------------------------------------------------------


def test_everything_is_on_the_disk_before_the_version_before_goes(
    history: list[EditSession], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_session(history[1], tmp_path)
    events: list[tuple[str, str]] = []
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(("sync", os.readlink(f"/proc/self/fd/{handle}"))), fsync(handle))
    )
    monkeypatch.setattr(os, "rename", lambda *paths: (events.append(("rename", str(paths[1]))), rename(*paths)))
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **options: (events.append(("delete", str(path))), rmtree(path, **options))
    )
    new = save_session(history[2], tmp_path)
    named = events.index(("rename", str(new)))
    writing = str(tmp_path / ".writing-00000002")
    wanted = {writing, *(str(Path(writing, path.relative_to(new))) for path in new.rglob("*"))}
    assert wanted <= {path for what, path in events[:named] if what == "sync"}
    assert events[named + 1] == ("sync", str(tmp_path))
    assert events[-1] == ("delete", str(tmp_path / ".removed-00000001"))
    assert events.index(("rename", str(tmp_path / ".removed-00000001"))) > named + 1


def test_what_killed_writers_left_is_swept_by_the_next(history: list[EditSession], tmp_path: Path, reload: Reload) -> None:
    save_session(history[1], tmp_path)
    for name in (".writing-00000002", ".writing-00000002.orbax-checkpoint-tmp", ".removed-00000000"):
        (tmp_path / name / "arrays").mkdir(parents=True)
    assert len(reload(history[1], tmp_path).facts) == 3
    save_session(history[2], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "00000002"]


def test_a_reader_goes_on_with_the_version_that_replaced_the_one_it_read(
    history: list[EditSession], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reload: Reload
) -> None:
    save_session(history[1], tmp_path)
    load, calls = checkpoint.ocp.load_checkpointables, []

    def replaced_meanwhile(version: Path) -> Any:
        calls.append(version.name)
        if len(calls) == 1:
            save_session(history[2], tmp_path)
        return load(version)

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", replaced_meanwhile)
    assert len(reload(history[2], tmp_path).facts) == 6
    assert calls == ["00000001", "00000002"]


# --- two writers ------------------------------------------------------------------------------------------------------

HOLD = "import sys, pathlib; from kedit_jax import files\nwith files.locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"  # noqa: E501


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes in the folder until its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_told_who_is_the_first(
    holder: subprocess.Popen[str], history: list[EditSession], tmp_path: Path
) -> None:
    for write in (lambda: save_session(history[1], tmp_path), lambda: lock_session(tmp_path).__enter__()):
        with pytest.raises(
            SessionError, match=rf"{tmp_path}.* written by process {holder.pid} on .* since .*wait"
        ) as caught:
            write()
        assert os.uname().nodename in str(caught.value)
    assert not has_session(tmp_path)


def test_a_second_writer_touches_nothing_of_the_first(
    holder: subprocess.Popen[str], history: list[EditSession], tmp_path: Path
) -> None:
    unfinished = tmp_path / ".writing-00000001" / "arrays"
    unfinished.mkdir(parents=True)
    with pytest.raises(SessionError, match="wait"):
        save_session(history[1], tmp_path)
    assert unfinished.is_dir(), "the first is still writing it"


@pytest.mark.parametrize("end", ["killed", "done"])
def test_a_lock_ends_with_its_process(
    holder: subprocess.Popen[str], history: list[EditSession], tmp_path: Path, end: str
) -> None:
    if end == "killed":
        holder.send_signal(signal.SIGKILL)
    else:
        holder.communicate("")
    holder.wait()
    save_session(history[1], tmp_path)
    assert (tmp_path / files.LOCK).read_text() == "", "nobody holds it"


def test_a_lock_holds_within_a_process_too_and_is_handed_on(
    history: list[EditSession], tmp_path: Path, reload: Reload
) -> None:
    with lock_session(tmp_path / "a") as lock:
        with pytest.raises(SessionError, match=f"process {os.getpid()} "):
            save_session(history[1], tmp_path / "a")
        with pytest.raises(SessionError, match=r"the lock is on .*a', not on .*b'"):
            save_session(history[1], tmp_path / "b", lock=lock)
        save_session(history[1], tmp_path / "a", lock=lock)
        assert len(reload(history[1], tmp_path / "a").facts) == 3, "reading needs no lock"
    save_session(history[2], tmp_path / "a")


def test_where_there_are_no_locks_is_a_warning(
    history: list[EditSession], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="No locks available.*one process at a time"):
        save_session(history[1], tmp_path)
    assert has_session(tmp_path)


def test_an_edit_made_elsewhere_since_loading_is_not_lost(
    history: list[EditSession], tmp_path: Path, reload: Reload
) -> None:
    """Two load the same version, both write: the second is refused, whether it is behind or went another way."""
    save_session(history[1], tmp_path)
    mine, theirs = reload(history[1], tmp_path), reload(history[1], tmp_path)
    theirs, _ = theirs.retract(["fact-1"])
    save_session(theirs, tmp_path)
    kept = contents(newest_version(tmp_path))
    for stale in (mine, mine.retract(["fact-2"])[0]):
        with pytest.raises(SessionError, match=r"2 facts after 2 steps.*load it again and repeat your step"):
            save_session(stale, tmp_path)
    assert contents(newest_version(tmp_path)) == kept
    save_session(theirs.retract(["fact-2"])[0], tmp_path)  # the control: what continues it is stored
    assert len(read_manifest(tmp_path)["facts"]) == 1


# --- bit rot ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(history: list[EditSession], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    session, _ = history[2].retract(["fact-2"])
    save_session(session, folder)
    return folder


def every_damage(version: Path) -> Iterator[tuple[str, str]]:
    """Each stored file, in each way that it can go wrong."""
    for path in sorted(path for path in version.rglob("*") if path.is_file()):
        name, size = str(path.relative_to(version)), path.stat().st_size
        yield name, "gone"
        if size:
            yield name, "cut"
            yield from ((name, f"bit {8 * at + bit}") for at, bit in ((0, 0), (size // 2, 5), (size - 1, 7)))


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        bit = int(how.split()[1])
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)


def test_any_damage_to_any_file_is_found_and_named(
    pristine: Path, history: list[EditSession], tmp_path: Path, reload: Reload
) -> None:
    found = list(every_damage(newest_version(pristine)))
    assert len(found) > 40
    for number, (name, how) in enumerate(found):
        folder = tmp_path / str(number)
        shutil.copytree(pristine, folder)
        damage(newest_version(folder) / name, how)
        with pytest.raises(SessionError, match="is damaged; bring the folder back from a copy") as caught:
            reload(history[2], folder)
        if name != files.SUMS:
            assert name in str(caught.value), (name, how)
        with warnings.catch_warnings():  # nothing is written over what is damaged where that can be told without the arrays
            warnings.simplefilter("error")
            if name == "_CHECKPOINT_METADATA":
                with pytest.raises(SessionError, match="_CHECKPOINT_METADATA"):
                    save_session(history[3], folder)
        assert has_session(folder)
        shutil.rmtree(folder)
    assert len(reload(history[2], pristine).facts) == 5, "the control: what is not damaged is read"


def test_all_that_is_damaged_is_listed_and_what_systems_hide_is_not(
    pristine: Path, history: list[EditSession], tmp_path: Path, reload: Reload
) -> None:
    shutil.copytree(pristine, tmp_path / "s")
    version = newest_version(tmp_path / "s")
    (version / ".DS_Store").write_text("mine")
    reload(history[2], tmp_path / "s")
    (version / "arrays" / "_METADATA").write_text("{}")
    (version / "commit_success.txt").unlink()
    (version / "foreign").write_text("mine")
    with pytest.raises(SessionError) as caught:
        reload(history[2], tmp_path / "s")
    assert [line.strip(" -") for line in str(caught.value).splitlines()[1:]] == [
        "arrays/_METADATA does not have the checksum that it was written with",
        "commit_success.txt is missing",
        "foreign is not in SHA256SUMS",
    ]


def test_a_damaged_version_is_never_passed_over_silently(
    pristine: Path, history: list[EditSession], tmp_path: Path, reload: Reload
) -> None:
    """The version before may still be there: it is offered, not taken."""
    save_session(history[1], tmp_path)
    shutil.copytree(newest_version(pristine), tmp_path / "00000002")
    damage(tmp_path / "00000002" / "_CHECKPOINT_METADATA", "bit 100")
    for act in (lambda: reload(history[1], tmp_path), lambda: read_manifest(tmp_path)):
        with pytest.raises(SessionError, match="00000002' is damaged; delete it to go on with version 00000001"):
            act()
    shutil.rmtree(tmp_path / "00000002")
    assert len(reload(history[1], tmp_path).facts) == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_without_checksums_changed_numbers_are_an_error_still(
    pristine: Path, history: list[EditSession], tmp_path: Path, reload: Reload
) -> None:
    """As sessions of format 2 are, whatever Orbax meets. The control: damage that only the checksums find."""
    shutil.copytree(pristine, tmp_path / "old")
    version = newest_version(tmp_path / "old")
    (version / files.SUMS).unlink()
    about = json.loads((version / "_CHECKPOINT_METADATA").read_text())
    about["custom_metadata"]["format"] = 2
    (version / "_CHECKPOINT_METADATA").write_text(json.dumps(about))
    same, errors, unnoticed = reload(history[2], tmp_path / "old"), [], 0
    for name, how in every_damage(version):
        if not name.startswith("arrays/") or how == "gone":
            continue
        content = (version / name).read_bytes()
        damage(version / name, how)
        try:
            read = reload(history[2], tmp_path / "old")
        except SessionError as error:
            errors.append(str(error))
        else:
            unnoticed += 1
            for layer, held in read.layers.items():
                np.testing.assert_array_equal(held.update, same.layers[layer].update)
                np.testing.assert_array_equal(held.constraints.keys, same.layers[layer].constraints.keys)
        (version / name).write_bytes(content)
    assert errors
    assert all("is damaged" in error for error in errors)
    assert unnoticed
