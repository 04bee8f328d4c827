"""The script that checks subjects on published data finds what it should find, on invented records."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from dataset_world import EASYEDIT, ZSRE, changed

from experiments.datasets.check_subjects import Counts, count, heads_of, is_last, main, proposals
from kedit_jax.evaluation import parse_records

RAWS = [
    changed(
        EASYEDIT, case_id=i, subject=subject, prompt=f"The home of {subject}{behind} the town of", rephrase_prompt=rephrase
    )
    for i, (subject, behind, rephrase) in enumerate(
        [
            ("Ada Quill", " is", "Ada Quill is at home in"),
            ("Émile Ōta", ", that is,", "Where is Émile Ōta?"),
            ("東京 Hall (1)", ").", "東京 Hall (1) is in"),
            ("Bram", "", "Bram, by the way, is from"),
        ]
    )
]


@pytest.mark.parametrize("prefix", ["", "It rains. "])
def test_right_everywhere(tokenizer: Any, prefix: str) -> None:
    found = count(tokenizer, parse_records(RAWS), heads_of(RAWS, "prompt"), prefix)
    assert (found.right, found.earlier, found.later) == (4, 0, 0)


def test_negative_control_other_subjects_are_not_found(tokenizer: Any) -> None:
    """Heads that end one word earlier or later than the subject the library was given."""
    records = parse_records(RAWS)
    for wrong in ("The home", "The home of Ada Quill is the"):
        assert count(tokenizer, records[:1], [wrong], "") == Counts()
    tokens = tokenizer("The home of Ada Quill is")["input_ids"]
    passing = [place for place in range(len(tokens)) if is_last(tokenizer, tokens, place, "The home of Ada Quill")]
    assert len(passing) == 1


def test_proposals() -> None:
    right, wrong, none, by_length = proposals(RAWS[:2], "prompt", "rephrase_prompt")
    assert (right, wrong, none) == (2, 0, 0)
    assert by_length == 1  # "Ada Quill is" is longer
    misleading = [changed(RAWS[0], rephrase_prompt="The home of Ada Quill has")]
    assert proposals(misleading, "prompt", "rephrase_prompt") == (0, 1, 0, 0)


def test_tables(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "one.json").write_text(json.dumps(RAWS))
    (tmp_path / "two.json").write_text(json.dumps([ZSRE]))
    arguments = ["check", "--tokenizer", str(tmp_path), str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| one.json | 4 of 4 |") for line in printed) == 2
    assert "| two.json | 1 | 1 | 0 | 0 | 1 |" in printed
