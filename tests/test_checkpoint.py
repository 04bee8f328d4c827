"""Sessions on disk: a stored one goes on with the bits of one that never stopped; what fails leaves the last one whole."""

import dataclasses
import gc
import json
import shutil
import subprocess
import sys
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kedit_jax import checkpoint, files, solve
from kedit_jax.checkpoint import FORMAT, has_session, load_session, newest_version, read_manifest, save_session
from kedit_jax.delta import relative_error
from kedit_jax.editing.algebra import compact, undo
from kedit_jax.editing.moments import Moments, moments_path, read_moments
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, start_session
from kedit_jax.errors import SessionError
from kedit_jax.models import Decoder, named_parameters, save_model, with_parameters

Batches = Sequence[Sequence[EditRequest]]
Reload = Callable[[EditSession, Path], EditSession]


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def numbers(session: EditSession) -> list[bytes]:
    """Every number that decides how a session goes on."""
    histories = [
        (h.constraints, h.retired, h.sequence, h.base and (h.base.statistics, h.base.update))
        for h in session.layers.values()
    ]
    return bits((session.base, session.model, histories, session.delta))


def words(session: EditSession) -> tuple[Any, ...]:
    texts = (session.facts, session.retired, session.skipped, session.compacted)
    return *texts, session.batches, session.events, session.settings, session.prefixes


@pytest.fixture
def orbax_fails() -> Iterator[None]:
    """Orbax leaves unfinished asyncio tasks behind a failure; collected at a bad moment (in `ast.parse`) they end Python."""
    yield
    gc.collect()


def edit_all(session: EditSession, batches: Batches) -> EditSession:
    for batch in batches:
        session, _ = session.edit(batch)
    return session


def versions(folder: Path) -> list[str]:
    """Whatever is there, but for the lock, which stays."""
    return sorted(path.name for path in folder.iterdir() if path.name != files.LOCK)


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches_before", [0, 1, 3])
def test_a_reloaded_session_goes_on_as_if_it_had_never_stopped(
    history: list[EditSession], batches: Batches, tmp_path: Path, batches_before: int, reload: Reload
) -> None:
    session = history[batches_before]
    path = save_session(session, tmp_path / "new" / "folder")
    assert path == newest_version(tmp_path / "new" / "folder")
    loaded = reload(session, tmp_path / "new" / "folder")
    assert numbers(loaded) == numbers(session)
    assert words(loaded) == words(session)
    assert all(h.update.dtype == h.constraints.residuals.dtype == np.float64 for h in loaded.layers.values())
    assert all(h.constraints.keys.dtype == np.float32 for h in loaded.layers.values())  # as the model gave them
    on, _ = loaded.edit(batches[batches_before])
    assert numbers(on) == numbers(history[batches_before + 1])
    assert words(on) == words(history[batches_before + 1])


def test_so_does_one_that_retracted_before_and_after(
    history: list[EditSession], batches: Batches, tmp_path: Path, reload: Reload
) -> None:
    gone = [str(history[3].facts[i].id) for i in (0, 4, 5, 3)]  # the whole second batch among them
    direct, _ = history[3].retract(gone)
    save_session(direct, tmp_path)
    loaded = reload(direct, tmp_path)
    assert numbers(loaded) == numbers(direct)
    for step in (lambda s: s.edit(batches[3]), lambda s: s.retract(["fact-2", "fact-10"])):
        (direct, _), (loaded, _) = step(direct), step(loaded)
        assert numbers(loaded) == numbers(direct)
        assert words(loaded) == words(direct)


def test_so_does_an_unaligned_one(
    fresh: EditSession, batches: Batches, tmp_path: Path, moments: Moments, reload: Reload
) -> None:
    settings = dataclasses.replace(fresh.settings, history="unaligned")
    first, _ = start_session(fresh.base, fresh.tokenizer, moments, settings).edit(batches[0])
    save_session(first, tmp_path)
    assert numbers(reload(first, tmp_path).edit(batches[1])[0]) == numbers(first.edit(batches[1])[0])


@pytest.mark.parametrize("history_mode", ["latest", "latest-simplified"])
def test_so_does_one_that_memorizes_the_latest(
    fresh: EditSession, batches: Batches, tmp_path: Path, history_mode: str, moments: Moments, reload: Reload
) -> None:
    settings = dataclasses.replace(fresh.settings, history=history_mode)
    first = edit_all(start_session(fresh.base, fresh.tokenizer, moments, settings), batches[:2])
    save_session(first, tmp_path)
    assert numbers(reload(first, tmp_path).edit(batches[2])[0]) == numbers(first.edit(batches[2])[0])


@pytest.mark.parametrize("compensate", [True, False])
def test_so_does_a_post_processed_one(
    fresh: EditSession, batches: Batches, tmp_path: Path, compensate: bool, moments: Moments, reload: Reload
) -> None:
    settings = dataclasses.replace(fresh.settings, post="rect:0.5", compensate=compensate)
    first = edit_all(start_session(fresh.base, fresh.tokenizer, moments, settings), batches[:2])
    save_session(first, tmp_path)
    assert numbers(reload(first, tmp_path).edit(batches[2])[0]) == numbers(first.edit(batches[2])[0])


def test_so_does_one_with_a_long_history(
    history: list[EditSession], batches: Batches, tmp_path: Path, reload: Reload
) -> None:
    """Retracted, restored, replaced, undone and with facts left out: what can be taken back or restored stays so."""
    session, _ = history[2].retract(["fact-2", "fact-5"])
    session, _ = session.restore(["fact-5"])
    session, _ = session.replace([dataclasses.replace(session.facts[0], target="Oslo")])
    session, _ = session.edit([dataclasses.replace(batches[3][1], id=None)], conflicts="first")
    session, _ = session.edit(batches[3][:1], conflicts="latest")
    session, _ = undo(session)
    save_session(session, tmp_path)
    loaded = reload(session, tmp_path)
    assert numbers(loaded) == numbers(session)
    assert words(loaded) == words(session)
    for _ in range(2):
        (session, _), (loaded, _) = undo(session), undo(loaded)
        assert numbers(loaded) == numbers(session)
        assert words(loaded) == words(session)


def test_so_does_a_compacted_one(history: list[EditSession], batches: Batches, tmp_path: Path, reload: Reload) -> None:
    for number, session in enumerate((compact(history[2]), compact(history[2]).edit(batches[2])[0])):
        save_session(session, tmp_path / str(number))
        loaded = reload(session, tmp_path / str(number))
        assert numbers(loaded) == numbers(session)
        assert words(loaded) == words(session)
        assert numbers(loaded.edit(batches[3])[0]) == numbers(session.edit(batches[3])[0])


def test_an_emptied_session_keeps_what_can_be_restored(history: list[EditSession], tmp_path: Path, reload: Reload) -> None:
    empty, _ = history[1].retract([str(fact.id) for fact in history[1].facts])
    save_session(empty, tmp_path)
    loaded = reload(empty, tmp_path)
    assert numbers(loaded) == numbers(empty)
    assert relative_error(loaded.restore(["fact-1", "fact-2", "fact-3"])[0].delta, history[1].delta) <= 1e-11


@pytest.mark.parametrize("editor", solve.EDITORS)
def test_no_session_holds_the_arrays_of_its_moments(
    fresh: EditSession, moments: Moments, tmp_path: Path, editor: str
) -> None:
    """Begun or reloaded, with priors factored or read: neither the session itself has them, nor does a factor share them."""
    settings = dataclasses.replace(fresh.settings, editor=editor, prefixes=0)
    model, folder, priors = (fresh.base, fresh.tokenizer), tmp_path / "session", tmp_path / "priors"
    save_session(start_session(*model, moments, settings), folder)
    for make in (
        lambda given: start_session(*model, given, settings),
        lambda given: start_session(*model, given, settings, priors=priors),
        lambda given: load_session(folder, *model, given),
        lambda given: load_session(folder, *model, given, priors=priors),
    ):
        given = dataclasses.replace(moments, by_layer={layer: c0.copy() for layer, c0 in moments.by_layer.items()})
        arrays = [weakref.ref(c0) for c0 in given.by_layer.values()]
        session = make(given)
        assert not session.moments.by_layer
        assert session.moments.fingerprint(settings.layers) == moments.fingerprint(settings.layers)
        assert all(array() is not None for array in arrays), "the caller has them"
        del given
        gc.collect()
        assert not any(array() is not None for array in arrays)


def test_events_keep_the_time_they_were_first_stored_at(history: list[EditSession], tmp_path: Path) -> None:
    save_session(history[1], tmp_path)
    rewrite(newest_version(tmp_path), lambda manifest: manifest | {"times": ["2026-01-02T03:04:05+00:00"]})
    save_session(history[2], tmp_path)
    first, second = read_manifest(tmp_path)["times"]
    assert first == "2026-01-02T03:04:05+00:00"
    assert second > first


@pytest.mark.parametrize("number", [1, 2])
def test_a_session_of_an_older_format_is_read(
    history: list[EditSession], batches: Batches, tmp_path: Path, number: int, reload: Reload
) -> None:
    """What later formats added is left out, as older versions of this package wrote it."""

    def older(manifest: dict[str, Any]) -> dict[str, Any]:
        if number == 2:
            return manifest | {"format": 2}
        events = [{"kind": event["kind"], "ids": event["ids"]} for event in manifest["events"]]
        added = ("retired", "skipped", "compacted", "times")
        kept = {name: value for name, value in manifest.items() if name not in added} | {"format": 1, "events": events}
        new = ("null_relative", "null_rank", "post", "compensate", "similarity")
        kept["settings"] = {name: value for name, value in manifest["settings"].items() if name not in new} | {"noise": 1.0}
        return kept

    save_session(history[2], tmp_path)
    rewrite(newest_version(tmp_path), older)
    (newest_version(tmp_path) / files.SUMS).unlink()
    loaded = reload(history[2], tmp_path)
    assert numbers(loaded) == numbers(history[2])
    on, _ = loaded.edit(batches[2])
    save_session(on, tmp_path)
    assert read_manifest(tmp_path)["format"] == FORMAT
    assert numbers(reload(history[2], tmp_path)) == numbers(history[3])


def test_a_fresh_process_continues_the_same(
    history: list[EditSession], batches: Batches, tmp_path: Path, tokenizer: Any, model: Decoder, moments: Moments
) -> None:
    """Another machine has the files alone: model and tokenizer in Hugging Face's layout, moments, session."""
    save_model(model, tmp_path / "model", dtype=jnp.float32)
    tokenizer.save_pretrained(tmp_path / "model")
    session = history[1]
    stored = moments_path(tmp_path, "here")
    from kedit_jax.editing.moment_files import write_moments

    write_moments(stored, moments)
    save_session(session, tmp_path / "session")
    script = f"""
import sys, pathlib
import numpy as np
from kedit_jax.checkpoint import load_session, save_session
from kedit_jax.editing.moments import read_moments
from kedit_jax.editing.requests import EditRequest
from kedit_jax.models import load
model, tokenizer = load({str(tmp_path / "model")!r})
session = load_session({str(tmp_path / "session")!r}, model, tokenizer, read_moments({str(stored)!r}))
session, _ = session.edit([EditRequest(**raw) for raw in {[request.to_dict() for request in batches[1]]!r}])
save_session(session, {str(tmp_path / "session")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert versions(tmp_path / "session") == ["00000002"]
    back = load_session(tmp_path / "session", model, tokenizer, read_moments(stored))
    assert words(back) == words(history[2])
    for layer, there in back.layers.items():
        here = history[2].layers[layer]
        assert np.linalg.norm(there.update - here.update) <= 1e-5 * np.linalg.norm(here.update)
    assert numbers(back) == numbers(history[2]), "the same programs on the same kind of machine: the same bits"


# --- the wrong company ----------------------------------------------------------------------------------------------


@pytest.fixture
def stored(history: list[EditSession], tmp_path: Path) -> Path:
    save_session(history[1], tmp_path / "session")
    return tmp_path / "session"


def changed(model: Decoder) -> Decoder:
    values = named_parameters(model)
    return with_parameters(model, {**values, "final_norm.bias": values["final_norm.bias"] + 1e-3})


def test_another_model_is_refused(stored: Path, model: Decoder, tokenizer: Any, moments: Moments) -> None:
    with pytest.raises(SessionError, match="model weights: the session has") as caught:
        load_session(stored, changed(model), tokenizer, moments)
    assert "dtype" not in str(caught.value)


def test_the_edited_model_is_not_the_original(
    stored: Path, history: list[EditSession], tokenizer: Any, moments: Moments
) -> None:
    with pytest.raises(SessionError, match="model weights"):
        load_session(stored, history[1].model, tokenizer, moments)


def test_everything_that_differs_is_listed(
    stored: Path, model: Decoder, wide_model: Decoder, tokenizer: Any, moments: Moments
) -> None:
    with pytest.raises(SessionError) as caught:
        load_session(stored, wide_model, tokenizer, dataclasses.replace(moments, corpus="another"))
    problems = str(caught.value).splitlines()[1:]
    assert [problem.split(":")[0].strip(" -") for problem in problems] == [
        "kernel shape", "dtype", "model weights", "moments",
    ]  # fmt: skip
    assert "the session has (160, 16), given is (24, 16)" in problems[0]
    assert "the session has float32, given is float64" in problems[1]


def test_another_dtype_is_refused(stored: Path, model: Decoder, tokenizer: Any, moments: Moments) -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    with pytest.raises(SessionError, match="dtype: the session has float32, given is bfloat16"):
        load_session(stored, half, tokenizer, moments)


@pytest.mark.parametrize("change", [{"corpus": "another"}, {"model": "another"}, {"dtype": "bfloat16"}], ids=str)
def test_other_moments_are_refused(
    stored: Path, model: Decoder, tokenizer: Any, moments: Moments, change: dict[str, str]
) -> None:
    with pytest.raises(SessionError, match="moments: the session has"):
        load_session(stored, model, tokenizer, dataclasses.replace(moments, **change))


def test_moments_without_an_edited_layer_are_refused(stored: Path, model: Decoder, tokenizer: Any, moments: Moments) -> None:
    with pytest.raises(SessionError, match=r"no moments for layers \[2\]"):
        load_session(stored, model, tokenizer, dataclasses.replace(moments, by_layer={0: moments.by_layer[0]}))


# --- versions -------------------------------------------------------------------------------------------------------


def test_a_new_version_replaces_the_one_before(history: list[EditSession], tmp_path: Path, reload: Reload) -> None:
    for number, session in enumerate(history, start=1):
        assert save_session(session, tmp_path).name == f"{number:08d}"
        assert versions(tmp_path) == [f"{number:08d}"]
        assert words(reload(session, tmp_path)) == words(session)
    manifest = read_manifest(tmp_path)
    assert len(manifest["facts"]) == 12
    assert manifest["format"] == FORMAT


def test_the_newest_complete_version_counts(history: list[EditSession], tmp_path: Path, reload: Reload) -> None:
    """As after a crash between writing the new and removing the old."""
    old = save_session(history[1], tmp_path)
    shutil.copytree(old, tmp_path / "kept")
    save_session(history[2], tmp_path)
    (tmp_path / "kept").rename(old)
    assert versions(tmp_path) == ["00000001", "00000002"]
    assert words(reload(history[2], tmp_path)) == words(history[2])
    save_session(history[3], tmp_path)
    assert versions(tmp_path) == ["00000003"]


@pytest.mark.parametrize("half", ["temporary name", "no metadata", "empty", "a file"])
def test_a_half_written_version_is_passed_over(
    history: list[EditSession], tmp_path: Path, half: str, reload: Reload
) -> None:
    complete = save_session(history[1], tmp_path)
    unfinished = tmp_path / ("00000002.orbax-checkpoint-tmp" if half == "temporary name" else "00000002")
    if half == "a file":
        unfinished.write_text("")
    elif half == "empty":
        unfinished.mkdir()
    else:
        shutil.copytree(complete, unfinished)
        if half == "no metadata":
            for name in ("_CHECKPOINT_METADATA", files.SUMS):
                (unfinished / name).unlink()
    assert newest_version(tmp_path) == complete
    assert words(reload(history[1], tmp_path)) == words(history[1])
    save_session(history[2], tmp_path)
    assert words(reload(history[2], tmp_path)) == words(history[2])


def test_a_session_is_not_written_over_another(
    history: list[EditSession], stored: Path, moments: Moments, reload: Reload
) -> None:
    settings = dataclasses.replace(history[0].settings, ridge=0.5)
    session = history[0]
    other = start_session(session.base, session.tokenizer, moments, settings)
    earlier, _ = history[2].retract([str(fact.id) for fact in history[2].facts])
    for stranger in (other, history[0]):
        with pytest.raises(SessionError, match="another session, of 3 facts"):
            save_session(stranger, stored)
    assert words(reload(history[1], stored)) == words(history[1])
    save_session(earlier, stored)  # what retracted its facts continues it
    save_session(other, stored, overwrite=True)
    assert words(reload(other, stored)) == words(other)
    assert versions(stored) == ["00000003"]


# --- failing --------------------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_leaves_the_earlier_session(
    history: list[EditSession], stored: Path, monkeypatch: pytest.MonkeyPatch, reload: Reload
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 30, (1 << 30) - 1000, 1000))
    with pytest.raises(SessionError, match=r"0 MiB are free.*version 00000001 is intact"):
        save_session(history[2], stored)
    assert versions(stored) == ["00000001"]
    assert words(reload(history[1], stored)) == words(history[1])


def test_a_write_that_fails_midway_leaves_the_earlier_session(
    history: list[EditSession], stored: Path, monkeypatch: pytest.MonkeyPatch, reload: Reload
) -> None:
    def fail(path: Path, *_: Any, **__: Any) -> None:
        part = path.with_name(path.name + ".orbax-checkpoint-tmp")
        part.mkdir()
        (part / "half").write_text("half")
        raise ValueError("OUT_OF_RANGE: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp, "save_checkpointables", fail)
        with pytest.raises(SessionError, match=r"No space left.*version 00000001 is intact"):
            save_session(history[2], stored)
        with pytest.raises(SessionError, match="nothing was stored"):
            save_session(history[2], stored.parent / "elsewhere")
    assert versions(stored) == ["00000001"]
    assert words(reload(history[1], stored)) == words(history[1])
    save_session(history[2], stored)
    assert words(reload(history[2], stored)) == words(history[2])


@pytest.mark.usefixtures("orbax_fails")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("when", ["before", "while"])
def test_a_file_system_that_refuses_leaves_the_earlier_session(
    history: list[EditSession], stored: Path, monkeypatch: pytest.MonkeyPatch, when: str, reload: Reload
) -> None:
    """Honestly: files may not grow beyond 4 kB. Once as the check in advance sees it, once as Orbax meets it."""
    import resource

    if when == "while":
        monkeypatch.setattr(checkpoint, "_check_space", lambda folder, size: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(SessionError, match="version 00000001 is intact"):
            save_session(history[2], stored)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert versions(stored) == ["00000001"]
    assert numbers(reload(history[1], stored)) == numbers(history[1])
    save_session(history[2], stored)
    assert numbers(reload(history[2], stored)) == numbers(history[2])


def test_a_folder_that_cannot_be_made_is_a_clear_error(history: list[EditSession], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "session"):
        with pytest.raises(SessionError, match=r"cannot save the session to .*file.*; nothing was stored"):
            save_session(history[1], folder)
    assert (tmp_path / "file").read_text() == "mine"


# --- what is no session ---------------------------------------------------------------------------------------------


def test_an_empty_or_missing_folder_holds_no_session(tmp_path: Path, history: list[EditSession], reload: Reload) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert not has_session(folder)
        with pytest.raises(SessionError, match="no session in"):
            read_manifest(folder)
        with pytest.raises(SessionError, match="no session in"):
            reload(history[0], folder)
    (tmp_path / "00000001").mkdir()
    with pytest.raises(SessionError, match="only parts of 00000001"):
        read_manifest(tmp_path)


def test_garbage_beside_the_versions_is_left_alone(history: list[EditSession], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "12345").mkdir()
    (tmp_path / "0000000x").mkdir()
    save_session(history[1], tmp_path)
    save_session(history[2], tmp_path)
    assert versions(tmp_path) == ["00000002", "0000000x", "12345", "notes.txt"]
    assert has_session(tmp_path)


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.usefixtures("orbax_fails")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damaged_arrays_are_noticed(history: list[EditSession], stored: Path, damage: str, reload: Reload) -> None:
    path = largest_file(newest_version(stored))
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    if damage == "gone":
        path.unlink()
    with pytest.raises(SessionError, match="is damaged"):
        reload(history[1], stored)


def rewrite(version: Path, change: Any) -> None:
    """Edit the manifest where Orbax keeps it."""
    path = version / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["custom_metadata"] = change(content["custom_metadata"])
    path.write_text(json.dumps(content))
    files.write_sums(version)


def test_a_newer_format_is_refused(history: list[EditSession], stored: Path, reload: Reload) -> None:
    rewrite(newest_version(stored), lambda manifest: manifest | {"format": FORMAT + 1})
    for act in (lambda: reload(history[1], stored), lambda: read_manifest(stored), lambda: save_session(history[2], stored)):
        with pytest.raises(SessionError, match=f"format {FORMAT + 1}, newer than {FORMAT}"):
            act()
    assert versions(stored) == ["00000001"]


@pytest.mark.parametrize("other", [{}, {"something": "else"}], ids=str)
def test_another_orbax_checkpoint_is_no_session(
    history: list[EditSession], stored: Path, other: dict[str, str], reload: Reload
) -> None:
    rewrite(newest_version(stored), lambda _: other)
    (newest_version(stored) / files.SUMS).unlink()
    with pytest.raises(SessionError, match="no editing session" if other else "only parts of 00000001"):
        reload(history[1], stored)
