"""Multiple-choice tasks: their files, their prompts, and their scores against a plain computation."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from evaluation_world import plain_nll

from kedit_jax import assets
from kedit_jax.errors import KeditError
from kedit_jax.evaluation import Record, ability
from kedit_jax.evaluation.ability import Question, Task
from kedit_jax.models import Decoder

Raw = dict[str, Any]
Write = Callable[[list[Raw]], Path]

LONG = "The town of Oslo, which lies far in the north, saw the first snow of that long winter on a Monday."


def pairs(labels: tuple[Any, Any], first: str, second: str) -> list[Raw]:
    return [{"sentence1": first, "sentence2": second, "label": labels[i % 2], "idx": i} for i in range(4)]


FILES: dict[str, list[Raw]] = {
    "sst2": [{"sentence": f"film number {i} was good ", "label": i % 2, "idx": i} for i in range(4)],
    "cola": [{"sentence": f"The {i} dogs barks.", "label": i % 2, "idx": i} for i in range(4)],
    "mrpc": pairs((0, 1), "Ada saw Rome .", "Rome was seen by Ada ."),
    "rte": pairs((0, 1), LONG, "It snowed."),
    "nli": pairs(("entailment", "not_entailment"), LONG, "It snowed."),
    "mmlu": [{"question": "Which?", "subject": "towns", "choices": list("wxyz"), "answer": i} for i in range(4)],
}
"""Small files of the layouts of published ones."""

PROMPTS = {
    "sst2": "film number 1 was good\nQuestion: Is this sentence positive or negative?\nAnswer: positive",
    "cola": "The 1 dogs barks.\nQuestion: Does this sentence make sense?\nAnswer: yes",
    "mrpc": (
        "Sentence 1: Ada saw Rome .\nSentence 2: Rome was seen by Ada .\n"
        "Question: Do both sentences mean the same thing?\nAnswer: yes"
    ),
    "rte": f"{LONG}\nQuestion: It snowed. True or False?\nAnswer: False",
    "nli": f"{LONG}\nQuestion: It snowed. True or False?\nAnswer: False",
    "mmlu": "Which?\nA. w\nB. x\nC. y\nD. z\nAnswer: B",
}
"""The second question of each, with its gold choice."""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def run(raws: list[Raw]) -> Path:
        path = tmp_path / "some.jsonl"
        path.write_text("".join(json.dumps(raw) + "\n" for raw in raws), encoding="utf-8")
        return path

    return run


def shown(question: Question) -> str:
    return f"{question.context} {question.choices[question.gold]}"


@pytest.mark.parametrize("name", FILES)
def test_a_published_task_is_recognised_by_its_content(name: str, write: Write) -> None:
    task = ability.read_task(write(FILES[name]))
    assert task.name == name
    assert len(task.questions) == 4
    assert shown(task.questions[1]) == PROMPTS[name]
    assert set(FILES) == set(ability.TASKS)


def test_a_task_can_be_named(write: Write) -> None:
    mixed = [*FILES["sst2"], FILES["cola"][0]]
    with pytest.raises(KeditError, match=r"20% of the sentences have capitals.* name the task, as sst2=FILE"):
        ability.read_task(write(mixed))
    assert ability.read_task(write(mixed), task="sst2").name == "sst2"
    with pytest.raises(KeditError, match="50% of the pairs are of about one length"):
        ability.read_task(write([*FILES["rte"], *FILES["mrpc"]]))
    with pytest.raises(KeditError, match="no task 'glue'; there are sst2, cola"):
        ability.read_task(write(mixed), task="glue")


def test_the_common_form_round_trips(tmp_path: Path) -> None:
    task = Task(
        "towns", (Question("Ada was born in {x}", ("Oslo", "New {x} Haven"), 1), Question("Émile", ("a", "b", "c"), 0))
    )
    ability.write_task(tmp_path / "towns.jsonl", task)
    assert ability.read_task(tmp_path / "towns.jsonl") == task
    packed = tmp_path / "towns.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "towns.jsonl").read_bytes()))
    assert ability.read_task(packed) == task


def test_all_problems_of_a_file_at_once(write: Write, tmp_path: Path) -> None:
    good = {"context": "Ada", "choices": ["a", "b"], "gold": 0}
    bad = [good, good | {"gold": 2}, good | {"choices": ["a"]}, good | {"choices": ["a", " "]}, good | {"context": ""}]
    with pytest.raises(KeditError) as found:
        ability.read_task(write([*bad, good | {"gold": True}]))
    for words in ("gold is 2; give the position of the right choice, 0 to 1", "['a']; give a list of two", "hold ' '",
                  "context is ''; give a text", "gold is True"):  # fmt: skip
        assert words in str(found.value)
    path = tmp_path / "half.jsonl"
    path.write_text(json.dumps(good) + '\n{"context": "Ad', encoding="utf-8")
    with pytest.raises(KeditError, match="line 2"):
        ability.read_task(path)


@pytest.mark.parametrize(
    ("raws", "words"),
    [
        ([], "holds no questions"),
        ([{"text": "x", "class": 1}], "'text', 'class' are of no known task; give context, choices and gold"),
        ([*FILES["sst2"], {"sentence": "bad", "label": 2}], "label is 2; give one of 0, 1"),
        ([*FILES["sst2"], {"sentence": 3, "label": 1}], "sentence is 3; give a text"),
        ([*FILES["nli"], {"sentence1": "a"}], "no sentence2, label; a record has sentence1, sentence2, label"),
        ([*FILES["nli"], FILES["nli"][0] | {"label": "maybe"}], "'maybe'; give one of 'entailment', 'not_entailment'"),
        ([*FILES["mmlu"], FILES["mmlu"][0] | {"choices": ["a", "b"]}], "2 choices; give 4"),
    ],
)
def test_bad_files(raws: list[Raw], words: str, write: Write) -> None:
    with pytest.raises(KeditError, match=words):
        ability.read_task(write(raws))


def test_some_questions_are_taken_evenly() -> None:
    task = Task("t", tuple(Question(str(i), ("a", "b"), 0) for i in range(10)))
    assert [question.context for question in task.some(3).questions] == ["0", "3", "6"]
    assert task.some(None) is task
    assert task.some(10) is task


def test_weighted_f1_by_hand() -> None:
    """Gold 0 0 0 1, said 0 0 1 1: F1 of class 0 is 4/5, of class 1 it is 2/3."""
    assert ability.weighted_f1(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])) == pytest.approx(0.75 * 0.8 + 0.25 * 2 / 3)
    assert ability.weighted_f1(np.array([0, 1, 2]), np.array([0, 1, 2])) == 1
    assert ability.weighted_f1(np.array([0, 1]), np.array([1, 0])) == 0
    assert ability.weighted_f1(np.array([0, 1]), np.array([0, 0])) == pytest.approx(0.5 * 2 / 3), "always the same answer"


@pytest.fixture(scope="module")
def task() -> Task:
    towns, people = ("Oslo", "Port Royal", "New {x} Haven", "Rome"), ("Ada Quill", "Bram", "Cora", "Dov {} Marsh")
    return Task("towns", tuple(Question(f"{who} saw", towns[: 2 + i % 3], i % 2) for i, who in enumerate(people * 2)))


def test_equals_a_plain_evaluation(model: Decoder, tokenizer: Any, task: Task) -> None:
    found = ability.score_task(model, ability.prepare_task(task, tokenizer))
    hits = []
    for question in task.questions:
        before = tokenizer(question.context).input_ids
        nll = [plain_nll(model, before + tokenizer(f" {c}").input_ids)[len(before) - 1 :].mean() for c in question.choices]
        hits.append(int(np.argmin(nll)) == question.gold)
    assert found.accuracy == pytest.approx(100 * np.mean(hits))
    assert found.chance == pytest.approx(100 * np.mean([1 / len(question.choices) for question in task.questions]))
    assert found.to_dict() == {"accuracy": found.accuracy, "f1": found.f1, "chance": found.chance, "n": 8}


def test_a_model_that_says_one_thing_is_right_where_that_is_gold(model: Decoder, tokenizer: Any) -> None:
    """Negative control: its accuracy is that choice's share, and its F1 well below."""
    token = tokenizer(" Lima").input_ids
    final = model.final_norm.bias[...] + 100 * model.embedding[...][token[0]]
    stuck = jax.tree_util.tree_map_with_path(
        lambda path, leaf: final if "final_norm" in str(path) and "bias" in str(path) else leaf, model
    )
    asked = Task("t", tuple(Question(f"{i} saw", ("Oslo", "Lima"), int(i < 2)) for i in range(8)))
    found = ability.score_task(stuck, ability.prepare_task(asked, tokenizer))
    assert found.accuracy == 25
    assert found.f1 == pytest.approx(100 * 0.25 * 2 * 2 / (2 + 8))


def test_facts_of_subjects_that_are_not_edited(records: list[Record]) -> None:
    edited = records[1].subject
    some = [replace(records[0], neighborhood_prompts=("Vera Lund was born in", f"{edited} was born in")), *records[1:]]
    found = ability.facts_task(some)
    assert found == ability.facts_task(some), "the same questions each time"
    contexts = [question.context for question in found.questions]
    assert len(contexts) == len(set(contexts))
    assert "Vera Lund was born in" in contexts
    assert not [context for context in contexts if edited in context]
    truth = {prompt: record.target_true for record in some[::-1] for prompt in record.neighborhood_prompts}
    for question in found.questions:
        assert question.choices[question.gold] == truth[question.context]
        assert len(set(question.choices)) == ability.CHOICES
    assert len({question.gold for question in found.questions}) > 1
    with pytest.raises(KeditError, match="no question can be made of 1 records"):
        ability.facts_task(records[:1])


def test_what_subjects_are() -> None:
    texts = ["Ann is a nurse. Bob Lee is a baker! Bob saw a cat. Oslo is a town.", "Eve is an actor. Dov is a small island."]
    found = ability.kinds_task(texts, without=["Ann"])
    assert {shown(question) for question in found.questions} == {
        "Oslo is a town", "Eve is an actor", "Dov is a small island",
    }  # fmt: skip
    assert all(len(set(question.choices)) == 4 for question in found.questions)
    with pytest.raises(KeditError, match="of 1 subjects, and with 1 words"):
        ability.kinds_task(["Ann is a nurse."])


def test_tasks_of_the_embedded_world() -> None:
    edited = {record["requested_rewrite"]["subject"] for record in assets.records()}
    facts, kinds = ability.embedded_tasks()
    assert (facts.name, kinds.name) == ("world-facts", "world-is-a")
    assert len(facts.questions) > 1000
    assert len(kinds.questions) > 100
    asked = " | ".join(question.context for question in (*facts.questions, *kinds.questions))
    assert not [subject for subject in edited if subject in asked]


def test_no_questions(tokenizer: Any) -> None:
    with pytest.raises(KeditError, match="task 'empty' has no questions"):
        ability.prepare_task(Task("empty", ()), tokenizer)
