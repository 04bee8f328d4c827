"""The rules about subjects, one test each."""

from collections.abc import Sequence
from typing import Any

import pytest
from dataset_world import EASYEDIT, REQUEST, changed

from kedit_jax.evaluation import RecordError, longest_shared_span, parse_records, place_subject


@pytest.mark.parametrize(
    ("prompt", "subject", "template", "spelled"),
    [
        pytest.param("{} met Ada in", "Ada", "{} met Ada in", "Ada", id="a template stands"),
        pytest.param(
            "{} was born in", "Dov {} Marsh", "{} was born in", "Dov {} Marsh", id="a template, braces in the subject"
        ),
        pytest.param(
            "Dov {} Marsh was born in", "Dov {} Marsh", "{} was born in", "Dov {} Marsh", id="braces of the subject"
        ),
        pytest.param("Ada was born in", " Ada ", "{} was born in", "Ada", id="blanks around it"),
        pytest.param(
            "Ann met Anna, Ann's cousin, in", "Ann", "Ann met Anna, {}'s cousin, in", "Ann", id="the last of several"
        ),
        pytest.param(
            "Annabel, says Ann, lives with Joanna in", "Ann", "Annabel, says {}, lives with Joanna in", "Ann", id="whole"
        ),
        pytest.param("The USS ADA sailed to", "Uss Ada", "The {} sailed to", "USS ADA", id="the prompt's spelling"),
        pytest.param("ada met Ada, not ADA, in", "Ada", "ada met {}, not ADA, in", "Ada", id="spelled as given first"),
        pytest.param("U.S. (1), U.S. (2) is", "U.S.", "U.S. (1), {} (2) is", "U.S.", id="punctuation is literal"),
        pytest.param("東京都の知事は", "東京", "{}都の知事は", "東京", id="a script without blanks"),
        pytest.param("In 1987 and 19 more", "19", "In 1987 and {} more", "19", id="numbers are whole"),
        pytest.param("In {name} is {0}, Ada is", "Ada", "In {name} is {0}, {} is", "Ada", id="other braces are literal"),
    ],
)
def test_place(prompt: str, subject: str, template: str, spelled: str) -> None:
    assert place_subject(prompt, subject) == (template, spelled)
    assert template.replace("{}", spelled) == prompt or prompt == template


@pytest.mark.parametrize(
    ("prompt", "subject", "message"),
    [
        (
            "Annabel was born in",
            "Ann",
            "the subject 'Ann' is not in the prompt 'Annabel was born in'; spell it as the prompt",
        ),
        ("Ada was {} born {} in", "Ada", r"has 2 \{\} beside the subject 'Ada'; leave them out"),
        ("Nobody was {} born {} in", "Ada", "the subject 'Ada' is not in the prompt"),
        ("Who was born in", "", "the subject '' is not in the prompt"),
    ],
)
def test_no_place(prompt: str, subject: str, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        place_subject(prompt, subject)


@pytest.mark.parametrize(
    ("prompt", "paraphrases", "found"),
    [
        pytest.param("Ada Quill plays the", ["The favourite of Ada Quill is"], "Ada Quill", id="shared"),
        pytest.param("Which tool does Ada use?", ["Which tool is that of Ada?"], "Ada", id="a name before a longer span"),
        pytest.param(
            "the old king plays the", ["we hear the old king on the"], "the old king", id="no capitals: the longest"
        ),
        pytest.param("In Oslo they speak", ["In the town they say Oslo is"], "Oslo", id="the first word last"),
        pytest.param(
            "Ada Quill met Otto Ngata in", ["Otto Ngata saw", "that Otto Ngata"], "Otto Ngata", id="in all of them"
        ),
        pytest.param("Ada Quill plays", ["Ada Quillfeather plays"], "Ada", id="whole words"),
        pytest.param("Ada plays", ["ada plays"], "plays", id="case counts"),
        pytest.param("She saw USS Ada (12) sail", ["The USS Ada (12) is"], "USS Ada (12)", id="brackets"),
        pytest.param("Ada Quill", ["Ada Quill is"], "Quill", id="not the whole prompt"),
        pytest.param("Ada plays", [], None, id="no paraphrases"),
        pytest.param("Ada plays", ["something else"], None, id="nothing shared"),
        pytest.param("!", ["!"], None, id="no words"),
        pytest.param("Ada " * 600, ["Ada"], None, id="too long to search"),
    ],
)
def test_finder(prompt: str, paraphrases: list[str], found: str | None) -> None:
    assert longest_shared_span(prompt, paraphrases) == found


def test_two_spans_equally_good() -> None:
    with pytest.raises(RecordError, match="the subject could be 'Ada' or 'Bob'; name it"):
        longest_shared_span("when Ada met Bob in", ["once Bob knew Ada"])
    assert longest_shared_span("when Ada met Bobby in", ["once Bobby knew Ada"]) == "Bobby"


def test_records_without_a_subject() -> None:
    bare = changed(EASYEDIT, subject=...)
    (record,) = parse_records([bare])
    assert (record.subject, record.prompt, record.subject_proposed) == ("Ada Quill", "{} was born in the town of", True)
    with pytest.raises(RecordError, match="'subject' is missing, and none can be proposed for 'Ada Quill was"):
        parse_records([bare], finder=None)
    with pytest.raises(RecordError, match="'subject' is missing, and none can be proposed"):
        parse_records([changed(bare, rephrase_prompt=...)])
    with pytest.raises(RecordError, match=r"record 1 \(case_id 4\): the subject could be 'Ada' or 'Bob'; name it"):
        parse_records([changed(bare, prompt="when Ada met Bob in", rephrase_prompt="once Bob knew Ada")])


def test_a_function_of_ones_own() -> None:
    seen = []

    def first_word(prompt: str, paraphrases: Sequence[str]) -> str | None:
        seen.append((prompt, tuple(paraphrases)))
        return prompt.split()[0]

    (record,) = parse_records([{"prompt": "Ada plays the", "target": "harp"}], finder=first_word)
    assert (record.subject, record.prompt, record.subject_proposed) == ("Ada", "{} plays the", True)
    assert seen == [("Ada plays the", ())]
    (given,) = parse_records([REQUEST], finder=first_word)
    assert not given.subject_proposed
    assert len(seen) == 1  # not asked where there is a subject


@pytest.mark.parametrize("answer", ["Nobody", " ", 7, b"Ada"])
def test_a_function_that_answers_something_else(answer: Any) -> None:
    with pytest.raises(RecordError, match=r"the finder proposed .*, which is no part of 'Ada plays the'; give 'subject'"):
        parse_records([{"prompt": "Ada plays the", "target": "harp"}], finder=lambda prompt, paraphrases: answer)
