"""Files: recognised by content, read in bounded memory, refused when broken; tables; checksums and the hub."""

import builtins
import csv
import gzip
import hashlib
import io
import json
import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from dataset_world import EASYEDIT, REQUEST, ZSRE, changed
from huggingface_hub.errors import LocalEntryNotFoundError

from kedit_jax.evaluation import RecordError, fetch, parse_records, read_records
from kedit_jax.evaluation.datasets import files

RAWS = [changed(EASYEDIT, case_id=i, rephrase_prompt=f"Ada Quill\u2028\x85 {i} é😀") for i in range(5)]


def table(rows: list[list[str]], delimiter: str = ",") -> str:
    made = io.StringIO(newline="")
    csv.writer(made, delimiter=delimiter).writerows(rows)
    return made.getvalue()


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["bare", "gzip"])
@pytest.mark.parametrize("form", ["list", "pretty", "lines", "blank lines"])
@pytest.mark.parametrize("name", ["data", "data.csv"])  # a name that says nothing, and one that lies
def test_forms(tmp_path: Path, name: str, form: str, pack: Any, bom: bytes) -> None:
    lines = [json.dumps(raw, ensure_ascii=False) for raw in RAWS]
    text = {
        "list": json.dumps(RAWS, ensure_ascii=False),
        "pretty": "\n\n " + json.dumps(RAWS, indent=2) + "\n",
        "lines": "\n".join(lines),
        "blank lines": "\r\n\r\n".join(["", *lines, ""]),
    }[form]
    (tmp_path / name).write_bytes(pack(bom + text.encode()))
    assert read_records(tmp_path / name) == parse_records(RAWS)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_the_window_moves_over_any_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    values = [{"a": [1, ']},{\\"', None]}, -12.5e3, "x", [], True, 123456]
    (tmp_path / "list.json").write_text(json.dumps(values, indent=1))
    monkeypatch.setattr(files, "CHUNK", chunk)
    assert [value for _, value in files.raw_records(tmp_path / "list.json")] == values


def test_memory_is_that_of_the_records(tmp_path: Path) -> None:
    """10 MB of which little is kept; negative control: the whole text at once takes more."""
    padded = [changed(ZSRE, pred="x", cond="y") | {"subject": "Cora Vantongeren"} for _ in range(50)]
    with (tmp_path / "big.json").open("w") as file:
        file.write("[" + (",\n" + " " * 200_000).join(json.dumps(raw) for raw in padded) + "]")
    tracemalloc.start()
    try:
        assert len(read_records(tmp_path / "big.json")) == 50
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert len(json.loads((tmp_path / "big.json").read_text())) == 50
        whole = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6
    assert whole > 9e6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "holds no records; give at least one", id="empty"),
        pytest.param(b"\xef\xbb\xbf \n\t", "holds no records; give at least one", id="blank"),
        pytest.param(b" [ ] ", "holds no records; give at least one", id="empty list"),
        pytest.param(b"[{},]", "not valid JSON .Expecting value: line 1 column 5.", id="comma at the end"),
        pytest.param(b'[{"a": 1}\n{"a": 2}]', "Expecting ',': line 2 column 1", id="comma left out"),
        pytest.param(b'[\n{"a": 1},\n {"a', "Unterminated string.*line 3 column 3", id="cut off in a text"),
        pytest.param(b'[{"a": 1}', r"Expecting ',': line 1 column 10", id="cut off behind a record"),
        pytest.param(b"[] []", "Extra data: line 1 column 4", id="two lists"),
        pytest.param(b"[\x00]", "Expecting value: line 1 column 2", id="NUL"),
        pytest.param(pickle.dumps([REQUEST]), "cannot read records from", id="pickle"),
        pytest.param("[]".encode("utf-16"), "cannot read records from", id="UTF-16"),
        pytest.param(b"PK\x03\x04rest", "cannot be read as a table", id="zip"),
        pytest.param(b"<!DOCTYPE html><p>\n", "JSON begins with", id="a page"),
        pytest.param(gzip.compress(json.dumps(RAWS).encode())[:-9], "cannot read records from", id="cut off gzip"),
        pytest.param(gzip.compress(b"x" * 99)[:12] + b"rest", "cannot read records from", id="damaged gzip"),
        pytest.param(b'"text"', "cannot be read as a table", id="a text"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=f"(?s){message}") as error:
        read_records(path)
    assert "broken.json" in str(error.value)


@pytest.mark.parametrize("content", ['[{"a": "%s"}]', '{"a": "%s"}', 'prompt,target\n"%s'], ids=["list", "line", "table"])
def test_endless_records_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(files, "MAX_RECORD", 1000)
    monkeypatch.setattr(files, "CHUNK", 100)
    (tmp_path / "long").write_text(content % ("x" * 10_000))
    with pytest.raises(RecordError, match="of more than 1,000 characters"):
        read_records(tmp_path / "long")


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(RecordError, match="cannot read records from"):
            read_records(path)


def test_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"prompt": "{} is", "subject": "A", "target": "b"}\n\n{"target": "b"\n')
    with pytest.raises(RecordError, match=r"line 3: not valid JSON \(Expecting ',' delimiter: column 15\); write one whole"):
        read_records(tmp_path / "r.jsonl")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
def test_tables(tmp_path: Path, delimiter: str) -> None:
    rows = [
        ["prompt", "subject", "target", "weight", "note"],
        ["{} plays the", "Ada Quill", 'harp, or\nlyre; \t "bow"', "2.5", "kept out"],
        ["Bram Osterly lives in", "Bram Osterly", "Lima", "", ""],
        ["", " ", "", "", ""],
    ]
    (tmp_path / "t").write_text("\ufeff" + table(rows, delimiter), encoding="utf-8", newline="")
    first, second = read_records(tmp_path / "t")
    assert (first.prompt, first.subject, first.target_new) == ("{} plays the", "Ada Quill", 'harp, or\nlyre; \t "bow"')
    assert (first.weight, first.case_id, first.target_true) == (2.5, 0, None)
    assert (second.prompt, second.weight, second.case_id) == ("{} lives in", 1.0, 1)
    assert [record.request().id for record in (first, second)] == [None, None], "a place in a file is no name of a fact"


COLUMNS = {
    "id": "Ticket",
    "prompt": "Sentence",
    "target": "Correct",
    "old_target": "Was",
    "paraphrases": ("Also 1", "Also 2"),
}


def test_tables_with_columns_of_ones_own(tmp_path: Path) -> None:
    rows = [
        ["Ticket", "Sentence", "Was", "Correct", "Also 1", "Also 2"],
        ["T-1", "The harp of Ada Quill is", "old", "new", "Ada Quill has a harp that is", ""],
    ]
    (tmp_path / "t.csv").write_text(table(rows))
    (record,) = read_records(tmp_path / "t.csv", columns=COLUMNS)
    assert (record.case_id, record.subject, record.subject_proposed) == ("T-1", "Ada Quill", True)
    assert (record.target_new, record.target_true) == ("new", "old")
    assert record.paraphrase_prompts == ("Ada Quill has a harp that is",)


@pytest.mark.parametrize(
    ("columns", "problems"),
    [
        (None, ["which columns hold 'prompt' and 'target'? the first row has ['Ticket', 'Sentence', 'Sentence']"]),
        ({"prompt": "Sentence", "target": "Ticket"}, ["'prompt': column 'Sentence' is in the table 2 times"]),
        (
            {"prompt": "Satz", "object": "Ticket", "id": ["Ticket", "Ticket"]},
            [
                "there is no field 'object'; there are id, prompt",
                "'prompt': column 'Satz' is in the table 0 times",
                "'id' needs one column, not 2",
                "which columns hold 'target'?",
            ],
        ),
    ],
)
def test_columns_that_do_not_fit(tmp_path: Path, columns: Any, problems: list[str]) -> None:
    (tmp_path / "t.csv").write_text("Ticket,Sentence,Sentence\n1,2,3\n")
    with pytest.raises(RecordError) as error:
        read_records(tmp_path / "t.csv", columns=columns)
    assert str(error.value).count("\n  - ") == len(problems)
    for problem in problems:
        assert problem in str(error.value)


def test_rows_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "prompt,subject,target,weight\n{} is,Ada,b,heavy\n{} is,Ada,b\n\n{} is,,b,1\nno,Ada,,1\n"
    )
    with pytest.raises(RecordError) as error:
        read_records(tmp_path / "t.csv")
    assert str(error.value).splitlines()[1:] == [
        "  - row 2: 'weight' must be a number > 0, not 'heavy'; leave a fact out to give it no weight",
        "  - row 3: 3 cells, but 4 columns are named; put cells that hold the delimiter in quotes",
        "  - row 5: 'subject' is missing; give what belongs into the {} of '{} is'",
        "  - row 6: 'target' is missing",
    ]
    (tmp_path / "t.csv").write_text('prompt,subject,target\n"{} is"x,Ada,b\n')
    with pytest.raises(RecordError, match="is no table that can be read: row 2: '"):
        read_records(tmp_path / "t.csv")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_checksums_of_paths(tmp_path: Path) -> None:
    content = json.dumps([ZSRE]).encode()
    (tmp_path / "z.json").write_bytes(content)
    assert len(read_records(tmp_path / "z.json", sha256=sha256(content).upper())) == 1
    with pytest.raises(RecordError, match=f"is not the file that was asked for: its SHA-256 is {sha256(content)}, not 00"):
        read_records(tmp_path / "z.json", sha256="0" * 64)
    with pytest.raises(RecordError, match="needs its sha256, 64 hexadecimal digits, not 'abc'"):
        read_records(tmp_path / "z.json", sha256="abc")
    with pytest.raises(RecordError, match="cannot read records from"):
        read_records(tmp_path / "none.json", sha256="0" * 64)


CONTENT = json.dumps([ZSRE]).encode()
NAME = "hf://datasets/someone/some-set@v1.0/sub folder/zsre.json"


class Hub:
    """Stands for the hub: serves one content, counts, and refuses what it does not have."""

    def __init__(self, content: bytes | Exception) -> None:
        self.content, self.calls = content, []

    def download(self, repo: str, file: str, *, repo_type: str, revision: str | None, local_dir: str) -> str:
        self.calls.append((repo, file, repo_type, revision))
        path = Path(local_dir) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        (Path(local_dir) / ".cache").mkdir()
        path.write_bytes(b"partial" if isinstance(self.content, Exception) else self.content)
        if isinstance(self.content, Exception):
            raise self.content
        return str(path)


def use(monkeypatch: pytest.MonkeyPatch, content: bytes | Exception) -> Hub:
    hub = Hub(content)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    return hub


def kept(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, CONTENT)
    path = fetch(NAME, sha256=sha256(CONTENT), cache=tmp_path)
    assert path.read_bytes() == CONTENT
    assert hub.calls == [("someone/some-set", "sub folder/zsre.json", "dataset", "v1.0")]
    assert kept(tmp_path) == [sha256(CONTENT), f"{sha256(CONTENT)}/zsre.json"]
    assert fetch(NAME, sha256=sha256(CONTENT), cache=tmp_path) == path
    assert len(hub.calls) == 1  # the copy is used, so no hub is needed any more
    path.write_bytes(b"damaged")
    assert fetch(NAME, sha256=sha256(CONTENT), cache=tmp_path).read_bytes() == CONTENT
    assert len(hub.calls) == 2


def test_by_name_through_read_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, CONTENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_records("hf://datasets/someone/set/zsre.json", sha256=sha256(CONTENT)) == parse_records([ZSRE])
    assert hub.calls == [("someone/set", "zsre.json", "dataset", None)]
    assert (tmp_path / "kedit_jax" / "datasets" / sha256(CONTENT) / "zsre.json").is_file()
    with pytest.raises(RecordError, match="needs its sha256, 64 hexadecimal digits, not None; the hub shows it"):
        read_records("hf://datasets/someone/set/zsre.json")
    assert len(hub.calls) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT + b" ", f"is not the file that was asked for: its SHA-256 is {sha256(CONTENT + b' ')}, not"),
        (LocalEntryNotFoundError("no network"), "could not be fetched from the Hugging Face hub: no network"),
        (OSError(28, "No space left on device"), "could not be fetched .*No space left on device"),
    ],
    ids=["another file", "no network", "no space"],
)
def test_nothing_is_kept_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | Exception, message: str
) -> None:
    use(monkeypatch, content)
    with pytest.raises(RecordError, match=message):
        fetch(NAME, sha256=sha256(CONTENT), cache=tmp_path)
    assert kept(tmp_path) == []


def test_an_interrupt_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, CONTENT)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, sha256=sha256(CONTENT), cache=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "name",
    [
        "hf://datasets/someone/zsre.json",
        "hf://datasets/someone/set/",
        "hf://datasets/someone/set/../../../etc/passwd",
        "hf://datasets/someone/set//etc/passwd",
        "hf://datasets/some one/set/zsre.json",
    ],
)
def test_names_of_another_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    hub = use(monkeypatch, CONTENT)
    with pytest.raises(RecordError, match="names no file of a data set; write hf://datasets/OWNER/NAME/FILE"):
        fetch(name, sha256=sha256(CONTENT), cache=tmp_path)
    assert (hub.calls, kept(tmp_path)) == ([], [])


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, CONTENT)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecordError, match=r"cannot store .*; give another cache folder"):
        fetch(NAME, sha256=sha256(CONTENT), cache=tmp_path / "file")


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading imports nothing that the content names, whatever it is."""

    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return builtins.exec, ("raise SystemExit",)

    (tmp_path / "trap.json").write_bytes(pickle.dumps(Trap()))
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    with pytest.raises(RecordError, match="cannot read records"):
        read_records(tmp_path / "trap.json")
