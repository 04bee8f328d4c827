"""Folders that appear whole or not at all, whatever ends the writing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from export_world import snapshot

from kedit_jax.errors import ExportError
from kedit_jax.export import staging
from kedit_jax.export.staging import new_file, new_folder


def write(folder: Path, text: str, **kwargs: Any) -> None:
    with new_folder(folder, mark="mark", **{"needed": 0, "overwrite": False, **kwargs}) as partial:
        (partial / "mark").write_text(text)
        assert not folder.exists() or snapshot(folder) != snapshot(partial), "nothing appears before it is whole"


def test_replaced_as_a_whole(tmp_path):
    write(tmp_path / "deep" / "out", "first")
    (tmp_path / "deep" / "out" / "stale").touch()
    write(tmp_path / "deep" / "out", "second", overwrite=True)
    assert snapshot(tmp_path / "deep") == {"out": b"", "out/mark": b"second"}


def test_what_is_no_export_is_not_replaced(tmp_path):
    (tmp_path / "thesis").touch()
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match="holds no mark, so it is no earlier export and is not replaced"):
        write(tmp_path, "export", overwrite=True)
    assert snapshot(tmp_path) == before


def test_no_space_is_told_before_writing(tmp_path, monkeypatch):
    write(tmp_path / "out", "first")
    before, free = snapshot(tmp_path), 50 * 2**20
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30 - free, free))
    for attempt in (write, lambda *_, **options: new_file(tmp_path / "file", **options).__enter__()):
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
    sync, rename = staging._sync, os.rename
    monkeypatch.setattr(staging, "_sync", lambda path: (events.append(f"sync {path.name[:4]}"), sync(path)))
    monkeypatch.setattr(staging.os, "rename", lambda *paths: (events.append("rename"), rename(*paths)))
    write(tmp_path / "out", "text")
    assert events == ["sync mark", "sync .out", "rename", f"sync {tmp_path.name[:4]}"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="could not be written"):
        write(tmp_path / "file" / "out", "text")
    assert snapshot(tmp_path) == {"file": b""}
