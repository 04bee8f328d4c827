"""Every schema: what it becomes, and what is said about records that are wrong."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dataset_world import EASYEDIT, EASYEDIT_ZSRE, KNOWEDIT, MQUAKE, REQUEST, WIKIBIO, ZSRE, changed
from evaluation_world import raw_record

from kedit_jax.editing.requests import EditRequest, read_requests, write_requests
from kedit_jax.evaluation import Fact, Record, RecordError, parse_records, read_records, write_records


def one(raw: dict[str, Any], **options: Any) -> Record:
    (record,) = parse_records([raw], **options)
    return record


def test_multicounterfact_has_the_schema_of_counterfact() -> None:
    raws = [changed(raw_record(i), same_subject=..., generation_prompts=[]) for i in (7, 3)]
    assert [record.case_id for record in parse_records(raws)] == [7, 3]


def test_easyedit_counterfact() -> None:
    record = one(EASYEDIT)
    assert (record.case_id, record.prompt, record.subject) == (4, "{} was born in the town of", "Ada Quill")
    assert (record.target_new, record.target_true) == ("Port Royal", "Paris")
    assert record.paraphrase_prompts == ("The home of Ada Quill is",)
    assert record.neighborhood_prompts == ("Vera Lund was born in the town of",)  # the same true object: a neighbour
    assert record.neighborhood_facts == ()
    assert (record.subject_proposed, record.extra) == (False, {})


def test_easyedit_zsre() -> None:
    record = one(EASYEDIT_ZSRE)
    assert (record.case_id, record.prompt) == (0, "Which town was {} born in?")
    assert (record.target_new, record.target_true) == ("Lima", "Rome")
    assert record.neighborhood_prompts == ()  # an object of its own: a fact
    assert record.neighborhood_facts == (Fact("nq question: who wrote the long song", "Otto Ngata"),)
    assert record.portability_facts == (Fact("Which country was Bram Osterly born in?", "Peru"),)
    assert list(record.extra) == ["cond"]


def test_zsre_writes_the_answer() -> None:
    record = one(ZSRE)
    assert (record.prompt, record.subject) == ("What does {} play?", "Cora Vantongeren")
    assert (record.target_new, record.target_true) == ("violin", None)
    assert record.neighborhood_facts == (Fact("nq question: who paints the tall tower?", "Vera Lund"),)
    assert record.extra == {"pred": "harp", "alt": "drum", "cond": ZSRE["cond"], "answers": ["violin", "fiddle"]}
    assert record.request().old_target is None


def test_zsre_writes_the_alternative_on_request() -> None:
    record = one(ZSRE, zsre_target="alt")
    assert (record.target_new, record.target_true) == ("drum", "violin")
    with pytest.raises(RecordError, match="zsre_target 'alternative' is not known; give one of answers, alt"):
        one(ZSRE, zsre_target="alternative")


def test_zsre_alternatives_that_cannot_be_written() -> None:
    raws = [ZSRE, changed(ZSRE, alt=""), changed(ZSRE, alt="violin")]
    assert len(parse_records(raws)) == 3
    with pytest.raises(RecordError, match=r"(?s)record 2: 'alt' is empty.*record 3: 'alt' 'violin' is also the true object"):
        parse_records(raws, zsre_target="alt")


def test_mquake_is_one_record_an_edit() -> None:
    first, last = parse_records([MQUAKE])
    assert (first.case_id, last.case_id) == ("9.1", "9.2")
    assert (first.prompt, first.subject, first.target_new, first.target_true) == (
        "{} plays the",
        "Dov Marsh",
        "drum",
        "violin",
    )
    assert (first.relation_id, first.target_new_id, first.target_true_id) == ("R1", "D", "V")
    assert first.paraphrase_prompts == ("What does Dov Marsh play?",)
    assert (first.portability_facts, first.extra) == ((), {})
    assert last.portability_facts == tuple(Fact(question, "Oslo", ("Oslo town",)) for question in MQUAKE["questions"])
    assert set(last.extra) == {"answer", "answer_alias", "single_hops"}
    assert one(changed(MQUAKE, requested_rewrite=MQUAKE["requested_rewrite"][:1])).case_id == 9


def test_knowedit() -> None:
    record = one(KNOWEDIT)
    assert (record.case_id, record.prompt, record.target_new) == (0, "The sister of {} is", "Vera Lund")
    assert record.target_true == "Cora Vantongeren"
    assert record.paraphrase_prompts == ("Ada Quill is the brother of",)
    assert record.same_subject == (
        Fact("The town of Ada Quill is", "Paris"),
        Fact("The sister of Ada Quill, who is not Vera, is", "Cora"),
    )
    assert record.neighborhood_facts == (Fact("The town of Otto Ngata is", "Lima"),)
    assert record.portability_facts == (  # the one without an answer is left out
        Fact("The sister of Ada Quill was born in", "Rome", ("Roma",)),
        Fact("The sister of A. Quill is", "Vera Lund"),
    )
    bare = one(changed(KNOWEDIT, ground_truth=..., rephrase=..., portability=None, locality={}))
    assert (bare.target_true, bare.paraphrase_prompts, bare.same_subject) == (None, (), ())


def test_knowedit_biographies() -> None:
    record = one(WIKIBIO)
    assert record.prompt == "This is a passage about {}. Dov Marsh was a painter."  # spelled as given, so not the second
    assert (record.subject, record.target_new, record.target_true) == ("dov marsh", "He was born in Oslo.", None)
    assert record.same_subject == (Fact("Dov Marsh worked in", "Rome"),)


def test_requests() -> None:
    record = one(REQUEST | {"id": "ada", "relation": "plays", "old_target": "drum", "weight": 2})
    assert record.request() == EditRequest("{} plays the", "Ada Quill", "harp", "ada", "plays", "drum", 2.0)
    assert one(changed(REQUEST, prompt="Ada Quill plays the")).prompt == "{} plays the"
    assert one(REQUEST).case_id == 0
    assert one(REQUEST | {"paraphrases": ["She, Ada Quill, plays the"]}).paraphrase_prompts == ("She, Ada Quill, plays the",)


def test_requests_survive_both_ways(tmp_path: Path) -> None:
    """What `write_requests` writes is read by both readers, into the same requests."""
    requests = [
        EditRequest("{} plays the", "Dov {} Marsh", "harp", id="dov", relation="plays", old_target="drum", weight=0.5),
        EditRequest("{}\u2028says\x85", "line\u2029break", 'quo"te\\ \n tab\t', id="x", old_target="{}"),
    ]
    write_requests(tmp_path / "requests.jsonl", requests)
    requests[1] = replace(requests[1], target=requests[1].target.strip())  # no blanks around a record's targets
    records = read_records(tmp_path / "requests.jsonl")
    assert [record.request() for record in records] == requests
    write_requests(tmp_path / "again.jsonl", [record.request() for record in records])
    assert read_requests(tmp_path / "again.jsonl") == requests


@pytest.mark.parametrize("raw", [EASYEDIT, EASYEDIT_ZSRE, ZSRE, MQUAKE, KNOWEDIT, WIKIBIO, REQUEST, raw_record(3)])
def test_records_survive_writing(raw: dict[str, Any], tmp_path: Path) -> None:
    records = [replace(record, weight=1.5) for record in parse_records([raw])]
    write_records(tmp_path / "records.jsonl", records)
    assert read_records(tmp_path / "records.jsonl") == records


def test_a_proposed_subject_stays_marked(tmp_path: Path) -> None:
    records = parse_records([changed(EASYEDIT, subject=...), changed(EASYEDIT, case_id=5)])
    assert [record.subject_proposed for record in records] == [True, False]
    assert records[0] == replace(records[1], case_id=4, subject_proposed=True)
    write_records(tmp_path / "records.jsonl", records)
    assert read_records(tmp_path / "records.jsonl") == records


MISSING = {
    "easyedit target": (changed(EASYEDIT, target_new=None), "'target_new' is missing"),
    "easyedit prompt": (changed(EASYEDIT, prompt=...), "'prompt' is missing"),
    "knowedit prompt": (changed(KNOWEDIT, prompt=...), "'prompt' is missing"),
    "zsre src empty": (changed(ZSRE, src=" "), "'src' is empty"),
    "zsre answers": (changed(ZSRE, answers=...), "'answers' must be a list with at least one text"),
    "zsre answers empty": (changed(ZSRE, answers=[" "]), "'answers' must be a list with at least one text"),
    "zsre loc_ans": (changed(ZSRE, loc_ans=...), "'loc_ans' is missing"),
    "mquake no edits": (changed(MQUAKE, requested_rewrite=[]), "'requested_rewrite' is empty; give at least one edit"),
    "mquake case": (changed(MQUAKE, case_id=...), "'case_id' must be a number or a name, not None"),
    "mquake answer": (changed(MQUAKE, new_answer=...), "'new_answer' is missing"),
    "request prompt": (changed(REQUEST, prompt=...), "'prompt' is missing"),
    "request subject": (
        changed(REQUEST, subject=...),
        r"'subject' is missing; give what belongs into the {} of '{} plays the'",
    ),
}
WRONG = {
    "easyedit subject elsewhere": (changed(EASYEDIT, subject="Vera Lund"), "the subject 'Vera Lund' is not in the prompt"),
    "easyedit subject empty": (changed(EASYEDIT, subject=""), "'subject' is empty"),
    "easyedit true": (changed(EASYEDIT, ground_truth={"str": "Paris"}), "'ground_truth' must be text or lists of texts"),
    "easyedit new is true": (changed(EASYEDIT, target_new=" Paris "), "'target_new' 'Paris' is also the true object"),
    "easyedit list": (changed(EASYEDIT, rephrase_prompt=7), "'rephrase_prompt' must be a list"),
    "easyedit item": (changed(EASYEDIT, rephrase_prompt=["x", 7]), r"'rephrase_prompt[1]' must be text, not 7"),
    "easyedit counts": (
        changed(EASYEDIT, locality_prompt=["a", "b"]),
        "'locality_prompt' has 2 texts and 'locality_ground_truth' has 1; give one for each",
    ),
    "zsre answers": (changed(ZSRE, answers=[7]), "'answers' must be text or lists of texts, not 7"),
    "mquake edit": (changed(MQUAKE, requested_rewrite=["x"]), "'requested_rewrite[0]' must be an object"),
    "mquake slots": (
        changed(MQUAKE, requested_rewrite=[MQUAKE["requested_rewrite"][0] | {"prompt": "plays"}]),
        "'requested_rewrite[0].prompt' 'plays' has 0 slots; put exactly one {} at the subject",
    ),
    "knowedit group": (changed(KNOWEDIT, locality={"Others": "x"}), "'locality.Others' must be a list, not 'x'"),
    "knowedit item": (changed(KNOWEDIT, locality={"Others": ["x"]}), "'locality.Others[0]' must be an object"),
    "knowedit groups": (changed(KNOWEDIT, portability=[1]), "'portability' must be an object with lists"),
    "request field": (REQUEST | {"object": "x"}, "unknown field 'object'; known are id, prompt"),
    "request weight": (REQUEST | {"weight": 10**400}, "'weight' must be a number > 0, not 1000"),
    "request weight nan": (REQUEST | {"weight": float("nan")}, "'weight' must be a number > 0, not nan"),
    "request weight 0": (REQUEST | {"weight": 0}, "'weight' must be a number > 0, not 0; leave a fact out"),
    "request id": (REQUEST | {"id": 7}, "'id' must be text, not 7"),
    "half a character": (REQUEST | {"target": "x\ud800"}, "holds half a character (a lone surrogate); write it as UTF-8"),
    "flag": (raw_record(0, subject_proposed="yes"), "'subject_proposed' must be true or false, not 'yes'"),
    "neighbours of nothing": (
        raw_record(0, requested_rewrite=raw_record(0)["requested_rewrite"] | {"target_true": None}),
        "'neighborhood_prompts' need 'target_true', their object",
    ),
    "true left out": (
        raw_record(0, requested_rewrite=changed(raw_record(0)["requested_rewrite"], target_true=...)),
        "'requested_rewrite.target_true' must be an object",
    ),
    "nothing known": ({"question": "x", "answer": "y"}, "no known schema: none of the fields ['question', 'answer'] is one"),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in (MISSING | WRONG).items()])
def test_one_problem(case: tuple[dict[str, Any], str]) -> None:
    raw, message = case
    with pytest.raises(RecordError) as error:
        parse_records([raw], "set")
    assert str(error.value).count("\n  - ") == 1
    assert message in str(error.value)
    assert "\n  - record 1" in str(error.value)


def test_all_problems_of_a_file() -> None:
    raws = [changed(ZSRE, src=3, alt=4, answers=[], rephrase=[""]), ZSRE, changed(ZSRE, subject="Nobody")]
    with pytest.raises(RecordError) as error:
        parse_records(raws, "zsre.json", zsre_target="alt")
    assert str(error.value).splitlines() == [
        "zsre.json: nothing was read, mend these first:",
        "  - record 1: 'answers' must be a list with at least one text",
        "  - record 1: 'alt' must be text, not 4",
        "  - record 1: 'rephrase[0]' is empty",
        "  - record 1: 'src' must be text, not 3",
        "  - record 3: the subject 'Nobody' is not in the prompt 'What does Cora Vantongeren play?'; "
        "spell it as the prompt does, or put one {} there",
    ]


@pytest.mark.parametrize(
    ("raws", "message"),
    [
        ((EASYEDIT, ZSRE), "record 2: in the schema of zsRE, but the records before it in that of EasyEdit; split the file"),
        (
            (raw_record(0), MQUAKE),
            "record 2 (case_id 9): in the schema of MQuAKE, but the records before it in that of Counter",
        ),
        (({"x": 1}, ZSRE, REQUEST), "record 3: in the schema of requests, but the records before it in that of zsRE"),
    ],
)
def test_mixed_schemas_are_refused(raws: Sequence[dict[str, Any]], message: str) -> None:
    with pytest.raises(RecordError) as error:
        parse_records(raws)
    assert message in str(error.value)


def test_negative_control_one_schema_with_other_fields_is_no_mixture() -> None:
    """KnowEdit's records have groups at will, and are in EasyEdit's schema."""
    raws = [changed(KNOWEDIT, portability=...), changed(KNOWEDIT, locality=..., portability=...), EASYEDIT]
    assert [record.case_id for record in parse_records(raws)] == [0, 1, 4]


def test_records_with_problems_can_be_left_out() -> None:
    left_out: list[str] = []
    records = parse_records([changed(ZSRE, alt=""), ZSRE], zsre_target="alt", left_out=left_out)
    assert [record.case_id for record in records] == [1]  # positions count as in the file
    assert left_out == ["record 1: 'alt' is empty"]
    with pytest.raises(RecordError, match="nothing was read"):
        parse_records([changed(ZSRE, alt="")], zsre_target="alt", left_out=left_out)


def test_ids_of_several_kinds_are_compared() -> None:
    with pytest.raises(RecordError, match=r"record 2: 'case_id' is already used by record 1"):
        parse_records([REQUEST | {"id": "1"}, REQUEST])  # the second is called 1 after its position
    with pytest.raises(RecordError, match=r"record 2 \(case_id 9\): 'case_id' is already used by record 1"):
        parse_records([MQUAKE, MQUAKE])


def test_very_many_problems_are_counted() -> None:
    with pytest.raises(RecordError, match=r"and 500 more$"):
        parse_records([{"x": 1}] * 1500)


def test_deep_nesting_is_a_problem_not_a_crash(tmp_path: Path) -> None:
    deep: Any = "Rome"
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(RecordError, match=r"record 1 \(case_id 4\): nested too deeply"):
        parse_records([changed(EASYEDIT, ground_truth=deep)])
    text = json.dumps(changed(EASYEDIT, ground_truth="X")).replace('"X"', "[" * 200_000 + "]" * 200_000)
    for name, content in (("a.json", f"[{text}]"), ("a.jsonl", text)):
        (tmp_path / name).write_text(content)
        with pytest.raises(RecordError, match=r"not valid JSON|nested too deeply"):
            read_records(tmp_path / name)
