"""What a model says by itself, measured: free answers against objects, and the fluency and consistency of sampled text.

Teacher forcing shows a model the right answer so far; what it would have said by itself it need not be (`answers`). And an
edit that makes a model say its object can still make it say little else: repetition shows as a low fluency, text that is not
about the new object as a low consistency (Meng et al. 2022; `experiments/py/eval_utils_counterfact.py` of the MEMIT code).
A measure is averaged over a record's prompts first and over the records after that; percentages are 0 to 100.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from kedit_jax.errors import KeditError
from kedit_jax.evaluation.completions import complete_until, sample_texts
from kedit_jax.evaluation.metrics import percentage, record_means
from kedit_jax.evaluation.records import Record
from kedit_jax.evaluation.words import TfIdf, fluency
from kedit_jax.models import Decoder

STOPS = (".", ",", ";", ":", "!", "?", "\n")
"""Where an answer ends by nature, beside the end of a text: after a sentence, a clause or a line."""

KINDS = ("efficacy", "generalization", "specificity")


class Said(NamedTuple):
    """How a model goes on from a prompt by itself.

    Attributes:
        said: up to the natural stop, without it.
        exact: whether `said` is the object asked for, letter by letter.
        begins: whether it begins with it, as a whole word; what follows is the model's own.
    """

    said: str
    exact: bool
    begins: bool


@dataclass(frozen=True)
class Answer:
    """One prompt, freely continued.

    Attributes:
        record: position of the record that the prompt measures.
        kind: the measure that it belongs to, one of `KINDS`.
        prompt, wanted: what was asked, and the object that was to be said.
        said, exact, begins: as in `Said`.
    """

    record: int
    kind: str
    prompt: str
    wanted: str
    said: str
    exact: bool
    begins: bool


@dataclass(frozen=True)
class FreeAnswers:
    """Shares of prompts that a model answers freely with the object asked for, 0 to 100; None without such prompts.

    Attributes:
        efficacy, generalization: the new object on rewrite and paraphrase prompts.
        specificity: the true object on neighbourhood prompts, or a neighbourhood fact's own.
        efficacy_begins, generalization_begins, specificity_begins: the same where the answer may go on behind the object.
        n: number of records.
        answers: every prompt's.
    """

    efficacy: float | None
    generalization: float | None
    specificity: float | None
    efficacy_begins: float | None
    generalization_begins: float | None
    specificity_begins: float | None
    n: int
    answers: tuple[Answer, ...] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, float | int | None]:
        """The numbers alone, ready for JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "answers"}


@dataclass(frozen=True)
class Written:
    """What became of one record's generation prompts.

    Attributes:
        record: position of the record.
        texts: sampled, each with the prompt it begins with.
        fluency: mean of (2/3 H2 + 4/3 H3) / 2 over the texts, in bits.
        consistency: TF-IDF cosine of all of them with the reference texts, 0 to 1; None where there are none.
    """

    record: int
    texts: tuple[str, ...]
    fluency: float
    consistency: float | None


@dataclass(frozen=True)
class FreeText:
    """Fluency and consistency, times 100 as they are published; None where no record can be measured.

    Attributes:
        fluency: of records that have generation prompts, `n` of them.
        consistency: of those that have reference texts as well, `n_consistency` of them.
        written: every record's texts.
    """

    fluency: float | None
    consistency: float | None
    n: int
    n_consistency: int
    written: tuple[Written, ...] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, float | int | None]:
        """The numbers alone, ready for JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "written"}


def ask(model: Decoder, tokenizer: Any, asked: Sequence[tuple[str, str]], *, max_new_tokens: int = 50) -> list[Said]:
    """Let a model go on from prompts greedily, up to a natural stop (`STOPS`, or the end of a text).

    An object that holds such a sign itself, as "St. Gallen" does, is compared beyond it.

    Args:
        asked: pairs of a prompt and the object that it asks for.
        max_new_tokens: of an answer, or as many as the model has positions; one that does not stop is compared as far as
            it goes.

    Raises:
        KeditError: a prompt without tokens or too long for the model, or `max_new_tokens` below 1.
    """
    if max_new_tokens < 1:
        raise KeditError(f"max_new_tokens={max_new_tokens}: an answer needs at least one token; give 1 or more")
    unstopped = {prompt for prompt, wanted in asked if any(mark in wanted for mark in STOPS)}
    told: dict[str, str] = {}
    for prompts, marks in (({prompt for prompt, _ in asked} - unstopped, STOPS), (unstopped, ())):
        chosen = sorted(prompts)
        found = complete_until(model, tokenizer, chosen, marks, max_new_tokens=max_new_tokens)
        told |= dict(zip(chosen, found, strict=True))
    return [_said(told[prompt], wanted) for prompt, wanted in asked]


def answers(model: Decoder, tokenizer: Any, records: Sequence[Record], *, max_new_tokens: int = 50) -> FreeAnswers:
    """Let a model answer the prompts of records by itself (arguments and errors: see `ask`).

    Args:
        records: as they were, or would be, edited.
    """
    asked = [(i, *question) for i, record in enumerate(records) for question in _questions(record)]
    pairs = [(prompt, wanted) for _, _, prompt, wanted in asked]
    found = ask(model, tokenizer, pairs, max_new_tokens=max_new_tokens)
    marked = tuple(Answer(*question, *said) for question, said in zip(asked, found, strict=True))
    return FreeAnswers(**_shares(marked, len(records)), n=len(records), answers=marked)


def write_texts(
    model: Decoder,
    tokenizer: Any,
    records: Sequence[Record],
    references: "References",
    *,
    max_tokens: int = 100,
    top_k: int = 5,
    seed: int = 0,
) -> FreeText:
    """Let a model go on from the generation prompts of records, and measure what it writes.

    Args:
        references: texts about the new objects (`references_of`, `references_in`).
        max_tokens: of a text with its prompt, or as many as the model has positions.
        top_k, seed: of the sampling. Use the same seed for models that are compared.

    Raises:
        KeditError: see `sample_texts`.
    """
    asked = [(i, prompt) for i, record in enumerate(records) for prompt in record.generation_prompts]
    found = sample_texts(model, tokenizer, [prompt for _, prompt in asked], max_tokens=max_tokens, top_k=top_k, seed=seed)
    by_record: dict[int, list[str]] = defaultdict(list)
    for (number, _), text in zip(asked, found, strict=True):
        by_record[number].append(text)
    written = tuple(
        Written(
            number,
            tuple(texts),
            float(np.mean([fluency(text) for text in texts])),
            references.consistency(records[number], texts),
        )
        for number, texts in by_record.items()
    )
    known = [row.consistency for row in written if row.consistency is not None]
    return FreeText(
        fluency=100 * float(np.mean([row.fluency for row in written])) if written else None,
        consistency=100 * float(np.mean(known)) if known else None,
        n=len(written),
        n_consistency=len(known),
        written=written,
    )


@dataclass(frozen=True)
class References:
    """Texts about objects, and TF-IDF fitted to all of them.

    Attributes:
        texts: (relation, object) -> pairs of a subject ("" where it is not known) and a text that says so.
        tfidf: its documents are all the texts.
    """

    texts: Mapping[tuple[str | None, str], tuple[tuple[str, str], ...]]
    tfidf: TfIdf

    @classmethod
    def of(cls, found: Mapping[tuple[str | None, str], Iterable[tuple[str, str]]]) -> "References":
        """Each text once."""
        texts = {key: tuple(dict.fromkeys(pairs)) for key, pairs in found.items()}
        documents = list(dict.fromkeys(text for pairs in texts.values() for _, text in pairs))
        return cls(texts, TfIdf.of(documents))

    def about(self, record: Record) -> list[str]:
        """The texts about a record's new object that are not about its subject."""
        pairs = self.texts.get((record.relation_id, record.target_new), ())
        return list(dict.fromkeys(text for subject, text in pairs if record.subject not in (subject or text)))

    def consistency(self, record: Record, texts: Sequence[str]) -> float | None:
        """TF-IDF cosine of all texts together with all references together, as published; None without references."""
        about = self.about(record)
        return self.tfidf.similarity(" ".join(texts), " ".join(about)) if about else None


def references_of(records: Sequence[Record]) -> References:
    """What records themselves say of objects: facts of other subjects, with the object that the world has there.

    They stand in for CounterFact's Wikipedia snippets, which are a data set of their own: the rewrite prompts with their
    true object, the neighbourhood prompts with it, and the attribute prompts, about subjects that have the new object.
    Consistency against them is to be compared with consistency against them alone.
    """
    found: dict[tuple[str | None, str], list[tuple[str, str]]] = defaultdict(list)
    for record in records:
        if record.target_true is not None:
            true = found[record.relation_id, record.target_true]
            true.append((record.subject, f"{record.rewrite_prompt} {record.target_true}."))
            true += [("", f"{prompt} {record.target_true}.") for prompt in record.neighborhood_prompts]
        new = found[record.relation_id, record.target_new]
        new += [("", f"{prompt} {record.target_new}.") for prompt in record.attribute_prompts]
    return References.of(found)


def references_in(texts: Iterable[str], records: Sequence[Record]) -> References:
    """Sentences of a corpus that mention the new objects of records, as whole words."""
    wanted = {record.target_new for record in records}
    if not wanted:
        return References.of({})
    mention = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, sorted(wanted, key=len, reverse=True))) + r")(?!\w)")
    sentences: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for text in texts:
        for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
            for target in set(mention.findall(sentence)):
                sentences[target].append(("", sentence))
    return References.of({(r.relation_id, r.target_new): sentences.get(r.target_new, ()) for r in records})


def _questions(record: Record) -> list[tuple[str, str, str]]:
    """Kind, prompt and object of everything that is asked about a record."""
    found = [("efficacy", record.rewrite_prompt, record.target_new)]
    found += [("generalization", prompt, record.target_new) for prompt in record.paraphrase_prompts]
    if record.target_true is not None:
        found += [("specificity", prompt, record.target_true) for prompt in record.neighborhood_prompts]
    return found + [("specificity", fact.prompt, fact.target) for fact in record.neighborhood_facts]


def _said(text: str, wanted: str) -> Said:
    """What was said, of a text that may go beyond the natural stop, compared with the object."""
    text, wanted = text.lstrip(), wanted.strip()
    begins = text.startswith(wanted) and not re.match(r"\w", text[len(wanted) :])
    beyond = len(wanted) if begins else 0
    said = text[: min((text.index(mark, beyond) for mark in STOPS if mark in text[beyond:]), default=len(text))].strip()
    return Said(said, said == wanted, begins)


def _shares(marked: Sequence[Answer], n: int) -> dict[str, float | None]:
    shares: dict[str, float | None] = {}
    for kind in KINDS:
        chosen = [answer for answer in marked if answer.kind == kind]
        record: Int[np.ndarray, " p"] = np.array([answer.record for answer in chosen], np.int64)
        for name, values in ((kind, [a.exact for a in chosen]), (f"{kind}_begins", [a.begins for a in chosen])):
            held: Bool[np.ndarray, " p"] = np.array(values, bool)
            means: Float[np.ndarray, " r"] = record_means(held, record, n)
            shares[name] = percentage(means)
    return shares
