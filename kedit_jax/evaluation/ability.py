"""What editing costs a model elsewhere: multiple-choice tasks, the way general ability is measured.

A question is a context and choices, of which one is gold; the model's answer is the choice with the lowest mean NLL per
token after the context, zero-shot. A task is measured by its accuracy and by the weighted F1: the F1 of each class, weighted
by how often it is gold. Classes are the positions of the choices, which for a task of fixed labels are the labels; of a task
whose choices differ from question to question look at the accuracy.

A file is JSON Lines in one of these forms, told by what it holds and not by its name:

| task | fields | gold |
| --- | --- | --- |
| any | `context`, `choices`, `gold` | position of the right choice, from 0 |
| MMLU | `question`, `choices` (four), `answer` | position, from 0 |
| SST-2 | `sentence`, all in lower case, `label` | 1: positive |
| CoLA | `sentence`, with capitals, `label` | 1: acceptable |
| MRPC | `sentence1`, `sentence2` of about one length, `label` | 1: they mean the same |
| RTE | `sentence1`, `sentence2`, at most half as long, `label` | 0: entailment, as in GLUE |
| NLI | `sentence1`, `sentence2`, `label` a text | `entailment`, `not_entailment` |

SST-2 and CoLA, MRPC and RTE have the same fields; where a file fits neither, the error says so, and the task can be named.
The prompts (`TASKS`) are those that EleutherAI's lm-evaluation-harness asks zero-shot.
"""

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from kedit_jax import assets
from kedit_jax.errors import KeditError, shown
from kedit_jax.evaluation.datasets.files import raw_records
from kedit_jax.evaluation.datasets.reading import parse_records
from kedit_jax.evaluation.packing import BATCH_TOKENS
from kedit_jax.evaluation.records import Record
from kedit_jax.evaluation.scoring import PreparedPairs, prepare_pairs, score_pairs
from kedit_jax.models import Decoder

CHOICES = 4
"""Of a question made from facts."""

SHOWN = 20
"""Problems of a file that an error lists."""


@dataclass(frozen=True)
class Question:
    """After `context` and a space one of the `choices` follows; `gold` is the position of the right one."""

    context: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """Questions under one name."""

    name: str
    questions: tuple[Question, ...]

    def some(self, limit: int | None) -> "Task":
        """At most `limit` of its questions, taken evenly from the whole; the same for every model."""
        count = len(self.questions)
        if limit is None or limit >= count:
            return self
        return Task(self.name, tuple(self.questions[i * count // limit] for i in range(limit)))


@dataclass(frozen=True)
class PreparedTask:
    """A task, tokenised once, to be scored on any model that the tokenizer belongs to.

    Attributes:
        begins: where the choices of each question begin among the pairs.
    """

    task: Task
    pairs: PreparedPairs
    begins: Int[np.ndarray, " q"]


@dataclass(frozen=True)
class AbilityScore:
    """How well a model answers a task, 0 to 100.

    Attributes:
        accuracy: share of questions whose gold choice is the likeliest.
        f1: weighted by how often each class is gold.
        chance: accuracy to be expected of guessing.
        n: number of questions.
    """

    accuracy: float
    f1: float
    chance: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """Ready for JSON."""
        return {"accuracy": self.accuracy, "f1": self.f1, "chance": self.chance, "n": self.n}


class Form(NamedTuple):
    """How a published task is asked.

    Attributes:
        fields: of a record.
        prompt: with the fields in braces.
        choices: what may follow it.
        gold: label -> position of the right choice.
    """

    fields: tuple[str, ...]
    prompt: str
    choices: tuple[str, ...]
    gold: Mapping[Any, int]


_IS_A = re.compile(r"(?:^|(?<=[.!?] ))([^.!?]+?) is (an?) ([\w ]+)\.")
_PAIR = ("sentence1", "sentence2", "label")
_ENTAILS = "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:"

TASKS: Mapping[str, Form] = {
    "sst2": Form(
        ("sentence", "label"),
        "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
        ("negative", "positive"),
        {0: 0, 1: 1},
    ),
    "cola": Form(
        ("sentence", "label"),
        "{sentence}\nQuestion: Does this sentence make sense?\nAnswer:",
        ("no", "yes"),
        {0: 0, 1: 1},
    ),
    "mrpc": Form(
        _PAIR,
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nQuestion: Do both sentences mean the same thing?\nAnswer:",
        ("no", "yes"),
        {0: 0, 1: 1},
    ),
    "rte": Form(_PAIR, _ENTAILS, ("True", "False"), {0: 0, 1: 1}),
    "nli": Form(_PAIR, _ENTAILS, ("True", "False"), {"entailment": 0, "not_entailment": 1}),
    "mmlu": Form(
        ("question", "choices", "answer"),
        "{question}\nA. {0}\nB. {1}\nC. {2}\nD. {3}\nAnswer:",
        ("A", "B", "C", "D"),
        {0: 0, 1: 1, 2: 2, 3: 3},
    ),
}
"""Published tasks, by name."""


def read_task(path: str | Path, *, task: str | None = None) -> Task:
    """Read a task from JSON Lines (or a JSON list), plain or gzipped; see above for the forms.

    Args:
        task: one of `TASKS`, where a file is not to be told by its content.

    Raises:
        KeditError: the file cannot be read, is of no known form, or has problems: all are listed.
    """
    if task is not None and task not in TASKS:
        raise KeditError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    raws = list(raw_records(Path(path)))
    if not raws:
        raise KeditError(f"{path} holds no questions; give at least one")
    problems, read = [], []
    good = [(place, raw) for place, raw in raws if isinstance(raw, Mapping)]
    problems += [f"{place}: {raw if isinstance(raw, Exception) else 'no JSON object'}" for place, raw in raws
                 if not isinstance(raw, Mapping)]  # fmt: skip
    name = task or (_recognised([raw for _, raw in good], str(path)) if good else None)
    for place, raw in good:
        found = _own(raw) if name is None else _published(raw, TASKS[name])
        if isinstance(found, str):
            problems.append(f"{place}: {found}")
        else:
            read.append(found)
    if problems:
        more = [f"and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else []
        raise KeditError.listing(f"{path}: nothing was read, mend these first:", problems[:SHOWN] + more)
    return Task(name or Path(path).name.split(".")[0], tuple(read))


def write_task(path: str | Path, task: Task) -> None:
    """Write a task as JSON Lines that `read_task` reads back."""
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for question in task.questions:
            content = {"context": question.context, "choices": list(question.choices), "gold": question.gold}
            file.write(json.dumps(content, ensure_ascii=False) + "\n")


def prepare_task(task: Task, tokenizer: Any, *, batch_tokens: int = BATCH_TOKENS) -> PreparedTask:
    """Tokenise a task.

    Raises:
        KeditError: it has no questions, or a choice cannot be told from its context by tokens.
    """
    if not task.questions:
        raise KeditError(f"task {task.name!r} has no questions; give at least one")
    pairs = [(question.context, choice) for question in task.questions for choice in question.choices]
    begins = np.cumsum([0, *(len(question.choices) for question in task.questions[:-1])])
    return PreparedTask(task, prepare_pairs(pairs, tokenizer, batch_tokens=batch_tokens), begins)


def score_task(model: Decoder, prepared: PreparedTask) -> AbilityScore:
    """Answer a task's questions with a model (errors: see `score_pairs`). Of choices equally likely the first is taken."""
    questions = prepared.task.questions
    nll: Sequence[Float[np.ndarray, " c"]] = np.split(score_pairs(model, prepared.pairs).nll, prepared.begins[1:])
    said = np.array([int(np.argmin(row)) for row in nll])
    gold = np.array([question.gold for question in questions])
    return AbilityScore(
        accuracy=100 * float(np.mean(said == gold)),
        f1=100 * weighted_f1(gold, said),
        chance=100 * float(np.mean([1 / len(question.choices) for question in questions])),
        n=len(questions),
    )


def weighted_f1(gold: Int[np.ndarray, " q"], said: Int[np.ndarray, " q"]) -> float:
    """sum over classes of (share of gold) 2 TP / (2 TP + FP + FN), 0 to 1."""
    total = 0.0
    for label in np.unique(gold):
        hits = np.sum((gold == label) & (said == label))
        total += np.mean(gold == label) * 2 * hits / (np.sum(gold == label) + np.sum(said == label))
    return float(total)


def facts_task(records: Sequence[Record], *, choices: int = CHOICES, seed: int = 0, name: str = "facts") -> Task:
    """Facts of subjects that are not edited, as multiple choice among objects of the same relation.

    The facts are the neighbourhood prompts of records with their true object; the other choices are drawn from the objects
    that the records have for that relation. A prompt about a subject that some record edits is left out, as is a relation
    with too few objects.

    Raises:
        KeditError: no question can be made.
    """
    rng, edited = random.Random(seed), {record.subject for record in records}
    objects: dict[str | None, set[str]] = defaultdict(set)
    for record in records:
        objects[record.relation_id] |= {record.target_new, *([record.target_true] if record.target_true else [])}
    found: dict[str, Question] = {}
    for record in records:
        others = sorted(objects[record.relation_id] - {record.target_true})
        if record.target_true is None or len(others) < choices - 1:
            continue
        for prompt in record.neighborhood_prompts:
            if prompt not in found and not any(subject in prompt for subject in edited):
                found[prompt] = _shuffled(rng, prompt, record.target_true, rng.sample(others, choices - 1))
    if not found:
        raise KeditError(
            f"no question can be made of {len(records)} records: it takes neighbourhood prompts about subjects that none of "
            f"them edits, a true object, and {choices} objects of one relation"
        )
    return Task(name, tuple(found.values()))


def kinds_task(
    texts: Iterable[str], *, without: Iterable[str] = (), choices: int = CHOICES, seed: int = 0, name: str = "is-a"
) -> Task:
    """'X is a Y' sentences of a corpus, as multiple choice among all the Y.

    Args:
        without: subjects to leave out, such as edited ones.

    Raises:
        KeditError: the texts hold too few such sentences.
    """
    stated = dict.fromkeys(match.groups() for text in texts for match in _IS_A.finditer(text))
    kinds, rng, edited = sorted({kind for *_, kind in stated}), random.Random(seed), set(without)
    left = {(f"{subject} is {article}", kind) for subject, article, kind in stated if subject not in edited}
    if len(kinds) < choices or not left:
        raise KeditError(
            f"the texts say of {len(left)} subjects, and with {len(kinds)} words, what they are; there must be sentences "
            f"such as 'Rome is a city.' with {choices} words or more"
        )
    questions = [
        _shuffled(rng, context, kind, rng.sample([other for other in kinds if other != kind], choices - 1))
        for context, kind in sorted(left)
    ]
    return Task(name, tuple(questions))


def embedded_tasks(folder: Path | None = None) -> list[Task]:
    """Tasks of the embedded model's world: facts of its reserve subjects, which no record edits, and what they are.

    `folder` is that of other assets, as for the functions of `kedit_jax.assets`.
    """
    records = parse_records(assets.records(folder))
    edited = {record.subject for record in records}
    return [facts_task(records, name="world-facts"), kinds_task(assets.corpus(folder), without=edited, name="world-is-a")]


def _shuffled(rng: random.Random, context: str, right: str, wrong: Sequence[str]) -> Question:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return Question(context, tuple(choices), choices.index(right))


def _recognised(raws: Sequence[Mapping[str, Any]], path: str) -> str | None:
    """Which published task the records are of; None for the common form."""
    first = raws[0]
    if "context" in first:
        return None
    if "question" in first:
        return "mmlu"
    if "sentence" in first:
        capital = _share(raws, lambda raw: raw["sentence"] != raw["sentence"].lower())
        if not 0 < capital < 0.5:
            return "cola" if capital else "sst2"
        raise KeditError(f"{path}: {capital:.0%} of the sentences have capitals, SST-2 has none and CoLA nearly everywhere; "
                         "name the task, as sst2=FILE")  # fmt: skip
    if "sentence1" in first:
        if isinstance(first.get("label"), str):
            return "nli"
        if "sentence2" not in first:
            return "rte"  # or MRPC: what is missing is said of either
        alike = _share(raws, lambda raw: len(raw["sentence1"]) < 2 * len(raw["sentence2"]))
        if not 0.3 < alike < 0.7:
            return "mrpc" if alike > 0.5 else "rte"
        raise KeditError(f"{path}: {alike:.0%} of the pairs are of about one length, in MRPC nearly all and in RTE few; "
                         "name the task, as mrpc=FILE")  # fmt: skip
    raise KeditError(
        f"{path}: records with {', '.join(map(repr, list(first)[:8]))} are of no known task; give context, choices and gold"
    )


def _share(raws: Sequence[Mapping[str, Any]], holds: Callable[[Mapping[str, Any]], bool]) -> float:
    """Of the records whose texts are there; whatever else is wrong with the others is said later."""
    usable = [raw for raw in raws if all(isinstance(v, str) for k, v in raw.items() if k.startswith("sentence"))]
    usable = [raw for raw in usable if set(raws[0]) <= set(raw)]
    return sum(map(holds, usable)) / max(1, len(usable))


def _own(raw: Mapping[str, Any]) -> Question | str:
    """A question in the common form, or what is wrong with it."""
    context, choices, gold = raw.get("context"), raw.get("choices", []), raw.get("gold")
    if not isinstance(context, str) or not context.strip():
        return f"context is {shown(context):.60}; give a text"
    wrong = _choices_problem(choices)
    if wrong:
        return wrong
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        return f"gold is {shown(gold):.60}; give the position of the right choice, 0 to {len(choices) - 1}"
    return Question(context, tuple(choices), gold)


def _published(raw: Mapping[str, Any], form: Form) -> Question | str:
    """A question of a published task, or what is wrong with it."""
    missing = [name for name in form.fields if name not in raw]
    if missing:
        return f"no {', '.join(missing)}; a record has {', '.join(form.fields)}"
    *texts, label = form.fields
    words: dict[str, str] = {}
    for name in texts:
        value = raw[name]
        if name == "choices":
            wrong = _choices_problem(value) or (f"{len(value)} choices; give {len(form.choices)}"
                                                if len(value) != len(form.choices) else None)  # fmt: skip
            if wrong:
                return wrong
        elif not isinstance(value, str) or not value.strip():
            return f"{name} is {shown(value):.60}; give a text"
        else:
            words[name] = value.strip()
    gold = raw[label]
    if isinstance(gold, bool | float | list | dict) or gold not in form.gold:
        return f"{label} is {shown(gold):.60}; give one of {', '.join(map(repr, form.gold))}"
    choices = raw["choices"] if "choices" in texts else ()
    context = form.prompt.format(*(choice.strip() for choice in choices), **words)
    return Question(context, form.choices, form.gold[gold])


def _choices_problem(choices: Any) -> str | None:
    if not isinstance(choices, list) or len(choices) < 2:
        return f"choices is {shown(choices):.60}; give a list of two or more texts"
    empty = [choice for choice in choices if not isinstance(choice, str) or not choice.strip()]
    return f"choices hold {shown(empty[0]):.60}; give texts" if empty else None
