"""Folders that appear whole or not at all, whatever ends the writing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from export_world import snapshot

from kedit_jax import files
from kedit_jax.errors import ExportError
from kedit_jax.export import staging
from kedit_jax.export.staging import MANIFEST, new_file, new_folder


def write(folder: Path, text: str, **kwargs: Any) -> None:
    with new_folder(folder, form="merged", **{"needed": 0, "overwrite": False, **kwargs}) as partial:
        (partial / "mark").write_text(text)
        assert not folder.exists() or snapshot(folder) != snapshot(partial), "nothing appears before it is whole"


def test_replaced_as_a_whole(tmp_path):
    write(tmp_path / "deep" / "out", "first")
    with new_folder(tmp_path / "deep" / "out", form="merged", needed=0, overwrite=True) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").touch()
    manifest = tmp_path / "deep" / "out" / MANIFEST
    assert json.loads(manifest.read_text()) == {"format": "kedit_jax export 1", "form": "merged", "files": ["sub/file"]}
    write(tmp_path / "deep" / "out", "second", overwrite=True)
    found = snapshot(tmp_path / "deep")
    assert json.loads(found.pop(f"out/{MANIFEST}"))["files"] == ["mark"]
    assert found == {"out": b"", "out/mark": b"second"}


@pytest.mark.parametrize(
    "manifest",
    [
        None,
        "",
        "[]",
        "{}",
        '{"format": 1, "form": "merged", "files": []}',
        '{"format": "zip 1", "form": "merged", "files": []}',
    ],
)
def test_what_is_no_export_is_not_replaced(tmp_path, manifest):
    for name in ("config.json", "mark", "thesis"):
        (tmp_path / name).touch()
    if manifest is not None:
        (tmp_path / MANIFEST).write_text(manifest)
    before = snapshot(tmp_path)
    with pytest.raises(
        ExportError,
        match=r"holds no kedit_export\.json of this program.* it holds config\.json, (kedit_export\.json, )?mark",
    ):
        write(tmp_path, "export", overwrite=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["thesis", "session/manifest.json", "empty/"])
def test_an_export_with_something_else_beside_it_is_not_replaced(tmp_path, name):
    write(tmp_path / "out", "first")
    foreign = tmp_path / "out" / name
    (foreign if name.endswith("/") else foreign.parent).mkdir(exist_ok=True)
    if not foreign.exists():
        foreign.touch()
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match=f"holds more than the earlier export: {name.split('/')[0]}"):
        write(tmp_path / "out", "second", overwrite=True)
    assert snapshot(tmp_path) == before


def test_the_first_of_many_foreign_files_are_named(tmp_path):
    write(tmp_path / "out", "first")
    for letter in "edcba":
        (tmp_path / "out" / letter).touch()
    with pytest.raises(ExportError, match="the earlier export: a, b, c and 2 more; move that elsewhere"):
        write(tmp_path / "out", "second", overwrite=True)


def test_a_file_that_comes_while_writing_is_kept(tmp_path):
    write(tmp_path / "out", "first")
    writing = new_folder(tmp_path / "out", form="merged", needed=0, overwrite=True)
    (writing.__enter__() / "mark").write_text("second")
    (tmp_path / "out" / "thesis").touch()
    with pytest.raises(ExportError, match="holds more than the earlier export: thesis"):
        writing.__exit__(None, None, None)
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "mark", MANIFEST, "thesis"}
    assert (tmp_path / "out" / "mark").read_text() == "first"


@pytest.mark.parametrize("made", ["folder", "file"])
def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch, made):
    """Network ones answer EINVAL; what was written is there all the same, and nothing beside it."""
    write(tmp_path / "out", "first")
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(staging.os, "fsync", fsync)
    if made == "folder":
        write(tmp_path / "out", "second", overwrite=True)
        assert (tmp_path / "out" / "mark").read_text() == "second"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        return
    with new_file(tmp_path / "file", ours=lambda _: True, needed=0, overwrite=False) as partial:
        partial.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_a_file_that_cannot_be_synced_is_an_error(tmp_path, monkeypatch):
    def fsync(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(staging.os, "fsync", fsync)
    with pytest.raises(ExportError, match="could not be written"):
        write(tmp_path / "out", "text")
    assert snapshot(tmp_path) == {}


def test_an_interrupt_after_the_rename_leaves_nothing_aside(tmp_path, monkeypatch):
    write(tmp_path / "out", "first")

    def sync(path: Path) -> None:
        if path == tmp_path:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "sync", sync)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", "second", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mark").read_text() == "second"


def test_no_space_is_told_before_writing(tmp_path, monkeypatch):
    write(tmp_path / "out", "first")
    before, free = snapshot(tmp_path), 50 * 2**20
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30 - free, free))
    for attempt in (write, lambda *_, **options: new_file(tmp_path / "file", ours=bool, **options).__enter__()):
        with pytest.raises(ExportError, match=r"it takes 50 MiB in .* and 50 MiB are free; make room"):
            attempt(tmp_path / "out", "second", needed=free, overwrite=True)
    assert snapshot(tmp_path) == before
    write(tmp_path / "out", "second", needed=free - 2**20, overwrite=True)
    assert (tmp_path / "out" / "mark").read_text() == "second"


@pytest.mark.parametrize("failing", [1, 2])
def test_the_earlier_export_comes_back_when_a_rename_fails(tmp_path, monkeypatch, failing):
    write(tmp_path / "out", "first")
    before, real, count = snapshot(tmp_path), os.rename, 0

    def rename(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == failing:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(staging.os, "rename", rename)
    with pytest.raises(ExportError, match=r"could not be written: .*Input/output error; nothing was left there"):
        write(tmp_path / "out", "second", overwrite=True)
    assert snapshot(tmp_path) == before


def test_data_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    events: list[str] = []
    sync, rename = files.sync, os.rename
    monkeypatch.setattr(files, "sync", lambda path: (events.append(f"sync {path.name[:4]}"), sync(path)))
    monkeypatch.setattr(staging.os, "rename", lambda *paths: (events.append("rename"), rename(*paths)))
    write(tmp_path / "out", "text")
    assert set(events[:2]) == {"sync mark", f"sync {MANIFEST[:4]}"}
    assert events[2:] == ["sync .out", "rename", f"sync {tmp_path.name[:4]}"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="could not be written"):
        write(tmp_path / "file" / "out", "text")
    assert snapshot(tmp_path) == {"file": b""}
