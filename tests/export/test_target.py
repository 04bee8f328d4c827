"""`check_target` says beforehand what the function that writes would say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from export_world import Checkpoint, snapshot

from kedit_jax.errors import ExportError
from kedit_jax.export import FORMS, check_target, export_adapter, export_merged, plan_adapter, save_delta

WRITE: dict[str, Callable[..., object]] = {
    "merged": lambda given, path, **options: export_merged(given.directory, given.edited, path, **options),
    "adapter": lambda given, path, **options: export_adapter(plan_adapter(given.edited), path, **options),
    "delta": lambda given, path, **options: save_delta(given.edited, path, **options),
}


def refusal(call: Callable[[], object]) -> str | None:
    try:
        call()
    except ExportError as error:
        return str(error)
    return None


@pytest.mark.parametrize("form", FORMS)
def test_it_says_what_writing_says(gpt2: Checkpoint, tmp_path: Path, form: str):
    assert check_target(tmp_path / "new", form) == tmp_path / "new"
    assert snapshot(tmp_path) == {}
    for other in FORMS:
        WRITE[other](gpt2, tmp_path / other)
    (tmp_path / "link").symlink_to(tmp_path / "delta")
    (tmp_path / "folder").mkdir()
    for name in ("thesis", "folder/config.json"):
        (tmp_path / name).touch()
    accepted = set()
    for name in (*FORMS, "link", "folder", "thesis"):
        for overwrite in (False, True):
            said = refusal(lambda: check_target(tmp_path / name, form, overwrite=overwrite))  # noqa: B023, called at once
            if said is None:
                accepted.add((name, overwrite))
            else:
                assert said == refusal(lambda: WRITE[form](gpt2, tmp_path / name, overwrite=overwrite))  # noqa: B023
    assert accepted == {(form, True)}


def test_an_unknown_form(tmp_path: Path):
    with pytest.raises(ExportError, match="form is 'zip': give one of merged, adapter, delta"):
        check_target(tmp_path, "zip")
