import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_world import raw_record

from kedit_jax.errors import KeditError
from kedit_jax.evaluation import Fact, Record, RecordError, parse_records, read_records


def changed(number: int = 0, **fields: Any) -> dict[str, Any]:
    """A raw record with fields of its `requested_rewrite` replaced."""
    raw = copy.deepcopy(raw_record(number))
    raw["requested_rewrite"].update(fields)
    return raw


def test_fields_are_read() -> None:
    (record,) = parse_records([raw_record(1, note="kept")])
    assert (record.case_id, record.pararel_idx, record.relation_id) == (1, 7, "born")
    assert record.rewrite_prompt == "Bram Osterly was born in"
    assert (record.target_new, record.target_true) == ("New {x} Haven", "Rome")
    assert record.same_subject == (Fact("Bram Osterly works in", "Lima"),)
    assert len(record.neighborhood_prompts) == 3
    assert record.extra == {"note": "kept"}


def test_round_trip() -> None:
    raw = raw_record(3, note={"any": ["thing"]})
    assert parse_records([raw])[0].to_dict() == raw
    assert parse_records([parse_records([raw])[0].to_dict()]) == parse_records([raw])


def test_request() -> None:
    request = parse_records([raw_record(2)])[0].request()
    assert (request.id, request.relation, request.target, request.old_target) == ("2", "born", "Paris", "Oslo")
    assert request.text == "Cora Vantongeren was born in"


def test_braces_are_literal() -> None:
    raw = changed(subject="{0} {} %s", target_new={"str": "{new}", "id": None})
    (record,) = parse_records([raw])
    assert record.rewrite_prompt == "{0} {} %s was born in"
    assert record.target_new == "{new}"
    assert record.request().text == record.rewrite_prompt


def test_blanks_around_targets_are_removed() -> None:
    (record,) = parse_records([changed(target_new={"str": " Lima\n", "id": None})])
    assert record.target_new == "Lima"


@pytest.mark.parametrize("name", ["r.json", "r.json.gz", "r.jsonl", "r.jsonl.gz"])
def test_files(tmp_path: Path, name: str) -> None:
    raws = [raw_record(i, note="line\u2028separator\x85") for i in range(3)]
    lines = "\n\n".join(json.dumps(raw, ensure_ascii=False) for raw in raws)
    data = (lines if ".jsonl" in name else json.dumps(raws)).encode()
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    assert read_records(tmp_path / name) == parse_records(raws)


BAD = {
    "two slots": (changed(prompt="{} was {}"), "2 slots"),
    "no slot": (changed(prompt="Ada was"), "0 slots"),
    "slot with a name": (changed(prompt="{name} was"), "0 slots"),
    "empty subject": (changed(subject="  "), "'requested_rewrite.subject' is empty"),
    "missing subject": (changed(subject=None), "'requested_rewrite.subject' is missing"),
    "empty target": (changed(target_new={"str": " ", "id": "Q"}), "'requested_rewrite.target_new.str' is empty"),
    "target not an object": (changed(target_true="Rome"), "'requested_rewrite.target_true' must be an object"),
    "target id": (changed(target_true={"str": "Rome", "id": 3}), "'requested_rewrite.target_true.id' must be str"),
    "new is true": (changed(target_new={"str": " Paris", "id": "Q"}), "is also the true object"),
    "no rewrite": (raw_record(0, requested_rewrite=None), "'requested_rewrite' must be an object"),
    "no case id": (raw_record(0, case_id=None), "'case_id' must be a number or a name"),
    "case id a truth value": (raw_record(0, case_id=True), "'case_id' must be a number or a name"),
    "one string for a list": (raw_record(0, paraphrase_prompts="Ada"), "'paraphrase_prompts' must be a list"),
    "missing list": (raw_record(0, neighborhood_prompts=None), "'neighborhood_prompts' is missing"),
    "number among prompts": (raw_record(0, neighborhood_prompts=["a", 3]), r"'neighborhood_prompts\[1\]' must be text"),
    "empty prompt": (raw_record(0, attribute_prompts=[""]), r"'attribute_prompts\[0\]' is empty"),
    "fact without target": (raw_record(0, same_subject=[{"prompt": "x"}]), r"'same_subject\[0\].target' is missing"),
    "fact not an object": (raw_record(0, same_subject=["x"]), r"'same_subject\[0\]' must be an object"),
    "pararel_idx": (raw_record(0, pararel_idx="7"), "'pararel_idx' must be int"),
    "not an object": (["x"], "must be an object with the fields of a record"),
}


@pytest.mark.parametrize("raw", [pytest.param(case, id=name) for name, case in BAD.items()])
def test_one_problem(raw: tuple[Any, str]) -> None:
    bad, message = raw
    with pytest.raises(RecordError, match=message) as error:
        parse_records([bad])
    assert str(error.value).count("\n  - ") == 1


def test_all_problems_at_once() -> None:
    bad = [raw_record(0), *(case for case, _ in BAD.values()), raw_record(0), raw_record(5)]
    with pytest.raises(KeditError) as error:
        parse_records(bad, "facts.json")
    message = str(error.value)
    assert message.startswith("facts.json: nothing was read")
    for number, (_, expected) in enumerate(BAD.values(), start=2):
        assert f"record {number}" in message
        assert expected.replace("\\", "") in message
    assert "record 2 (case_id 0): 'requested_rewrite.prompt'" in message
    assert f"record {len(bad)} " not in message


def test_duplicate_ids() -> None:
    with pytest.raises(RecordError, match=r"record 3 \(case_id '1'\): 'case_id' is already used by record 1"):
        parse_records([raw_record(1), raw_record(2), raw_record(1, case_id="1")])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.json", b"[{]", r"r.json' is not valid JSON \(Expecting property name.*line 1 column 3"),
        ("r.json", b'{"case_id": 1}', r"line 1 \(case_id 1\): no known schema: none of the fields"),
        ("r.json", b"[]", "holds no records"),
        ("r.jsonl", b"\n", "holds no records"),
        ("r.jsonl", b"{\n[1]\n{", "(?s)line 1: not valid JSON.*line 2: must be an object.*line 3: not valid JSON"),
        ("r.json", b"\xff\xfe", "cannot read records"),
        ("r.json.gz", b"plain", "cannot be read as a table"),
        ("r.json.gz", gzip.compress(b"[1, 2, 3]" * 99, mtime=0)[:-9], "cannot read records"),
        ("missing.json", None, "cannot read records"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(RecordError, match=message):
        read_records(tmp_path / name)


def test_record_is_plain() -> None:
    record = Record(case_id="a", prompt="{} is", subject="x", target_new="b", target_true="c")
    assert (record.paraphrase_prompts, record.same_subject, record.extra) == ((), (), {})
