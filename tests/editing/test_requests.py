"""Requests: what cannot be edited is refused before any model runs, all of it at once."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedit_jax.editing.requests import EditRequest, check_unique_ids, parse_requests, read_requests, write_requests
from kedit_jax.errors import KeditError, RequestError

GOOD = {"prompt": "{} was born in", "subject": "Alice", "target": "Oslo"}


def jsonl(path: Path, *lines: Any) -> Path:
    """A file of these lines; what is not text is written as JSON."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_request_knows_its_text() -> None:
    request = EditRequest(**GOOD)
    assert request.text == "Alice was born in"
    assert request.to_dict() == GOOD
    assert EditRequest(**GOOD, id="a", relation="born", old_target="Rome").to_dict() == {
        **GOOD, "id": "a", "relation": "born", "old_target": "Rome",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "was born in"}, "0 slots"),
        ({"prompt": "{} and {} were born in"}, "2 slots"),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"subject": ""}, "'subject' is empty"),
        ({"subject": " \n"}, "'subject' is empty"),
        ({"target": ""}, "'target' is empty"),
        ({"target": "  "}, "'target' is empty"),
        ({"target": None}, "'target' is missing"),
        ({"subject": 7}, "'subject' must be text, not 7"),
        ({"id": 7}, "'id' must be text, not 7"),
        ({"weight": 0}, "weight 0 must be a number > 0"),
        ({"weight": -1.5}, "weight -1.5 must be"),
        ({"weight": True}, "weight True must be"),
        ({"weight": "2"}, "weight '2' must be"),
        ({"weight": 10**400}, "must be a number > 0"),
        ({"weight": float("nan")}, "weight nan must be"),
    ],
)
def test_unusable_fields_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=words):
        read_requests(jsonl(tmp_path / "r.jsonl", GOOD | change))
    if "weight" not in change and all(isinstance(value, str) for value in change.values()):
        with pytest.raises(RequestError, match=words):
            EditRequest(**(GOOD | change))


def test_everything_wrong_with_one_request_is_in_one_error() -> None:
    with pytest.raises(RequestError) as caught:
        EditRequest("no slot", " ", "", id="fact-9")
    message = str(caught.value)
    assert "fact-9" in message
    assert all(words in message for words in ("0 slots", "'subject' is empty", "'target' is empty"))


def test_braces_are_literal() -> None:
    request = EditRequest("The {} of {a}", "{} {b} {{c}}", "{} {0} {name}")
    assert request.text == "The {} {b} {{c}} of {a}"
    assert request.target == "{} {0} {name}"


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(subject=st.text(min_size=1).filter(str.strip), before=st.text(), after=st.text())
def test_the_subject_replaces_the_slot_whatever_it_holds(subject: str, before: str, after: str) -> None:
    prompt = before.replace("{}", "") + "{}" + after.replace("{}", "")
    if prompt.count("{}") == 1:
        assert EditRequest(prompt, subject, "x").text == prompt.partition("{}")[0] + subject + prompt.partition("{}")[2]


def test_a_file_is_read_in_order_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "r.jsonl", GOOD, "", "   ", GOOD | {"subject": "Bob", "id": "b", "relation": None})
    assert read_requests(path) == [EditRequest(**GOOD), EditRequest("{} was born in", "Bob", "Oslo", id="b")]


def test_requests_survive_writing(tmp_path: Path) -> None:
    """Also line separators that JSON leaves as they are and `str.splitlines` would cut at."""
    requests = [
        EditRequest("{} was born in", "Émile Ōta", "東京 \U0001f600", id="1"),
        EditRequest(
            "{}\u2028says\x85", "line\u2029break", 'quo"te\\ \n tab\t', relation="says", old_target="{}", weight=2.5
        ),
    ]
    path = tmp_path / "r.jsonl"
    write_requests(path, requests)
    assert read_requests(path) == requests


def test_all_bad_lines_are_reported_with_their_numbers(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "r.jsonl",
        GOOD | {"id": "a"},
        "{not json",
        GOOD | {"prompt": "no slot", "target": " "},
        "",
        [1, 2],
        GOOD | {"colour": "red", "id": "a"},
        '"text"',
        {"prompt": "{} is"},
        "[" * 100_000,
        '{"prompt": "{} is", "subject": ' + "9" * 5000 + "}",
    )
    with pytest.raises(RequestError) as caught:
        read_requests(path)
    message = str(caught.value)
    assert str(path) in message
    problems = message.splitlines()[1:]
    assert [problem.split(":")[0].strip(" -") for problem in problems] == [
        "line 2", "line 3", "line 3", "line 5", "line 6", "line 6", "line 7", "line 8", "line 8", "line 9", "line 10",
    ]  # fmt: skip
    for line, words in (
        ("line 2", "not valid JSON"),
        ("line 3", "0 slots"),
        ("line 3", "'target' is empty"),
        ("line 5", "must be an object"),
        ("line 6", "unknown field 'colour'"),
        ("line 6", "id 'a' is already used at line 1"),
        ("line 7", "must be an object"),
        ("line 8", "'subject' is missing"),
        ("line 9", "not valid JSON"),
        ("line 10", "not valid JSON"),
    ):
        assert any(problem.strip(" -").startswith(line) and words in problem for problem in problems), (line, words)


def test_negative_control_the_same_file_without_its_bad_lines_is_read(tmp_path: Path) -> None:
    assert len(read_requests(jsonl(tmp_path / "r.jsonl", GOOD | {"id": "a"}, GOOD | {"id": "b"}))) == 2


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe not UTF-8"], ids=["missing", "empty", "blank", "bytes"])
def test_a_file_without_requests_is_an_error_that_names_it(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=r"r\.jsonl"):
        read_requests(path)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot read"):
        read_requests(tmp_path)


def test_duplicate_ids_are_listed() -> None:
    requests = [EditRequest(**GOOD, id=name) for name in ("a", "b", "a", "c", "b")] + [EditRequest(**GOOD)] * 2
    with pytest.raises(RequestError) as caught:
        check_unique_ids(requests, taken=["c"])
    assert [line.split(":")[0].strip(" -") for line in str(caught.value).splitlines()[1:]] == [
        "request 3", "request 4", "request 5",
    ]  # fmt: skip
    check_unique_ids([*requests[:2], *requests[5:]])


def test_errors_are_value_errors_of_the_package() -> None:
    with pytest.raises(KeditError):
        parse_requests([("here", None)], "somewhere")
    assert issubclass(RequestError, ValueError)
