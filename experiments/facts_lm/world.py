"""The invented world: who and what there is, what is true of them, and the edits that can be asked for.

Everything follows from one seed. Subjects come in two groups. The editable ones have two facts each (one in the wide world),
and every such fact is one record in CounterFact's schema. The reserve ones are never edited: they are the neighbours, so
each object of each relation is held by `NEIGHBOURS` of them. Every subject also has a type ("... is a river").
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.facts_lm import words
from experiments.facts_lm.words import RELATIONS, Relation

NEIGHBOURS = 4  # reserve subjects for each object of each relation
HELD_OUT_STATEMENTS = 2  # of a fact's eight; they become its paraphrases
FACTS_PER_RESERVE = 3
KINDS = ("person", "company", "place")


@dataclass(frozen=True)
class WorldConfig:
    """Size of the world. `people`, `companies`, `places` count editable subjects; the reserve follows from the relations."""

    people: int = 526
    companies: int = 264
    places: int = 264
    facts: int = 2  # of each editable subject
    objects: int = 18  # of each relation, taken evenly from its pool
    seed: int = 0


@dataclass(frozen=True)
class Subject:
    name: str
    kind: str
    type: str
    reserve: bool


@dataclass(frozen=True)
class Fact:
    """`trained` and `held_out` partition the relation's statements; `relation` is None for a subject's type."""

    subject: Subject
    relation: Relation | None
    object: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...]

    def prompt(self, statement: str) -> str:
        return statement.replace("{}", self.subject.name)


@dataclass(frozen=True)
class World:
    config: WorldConfig
    relations: tuple[Relation, ...]
    facts: tuple[Fact, ...]  # editable subjects' first facts, their second ones, then the reserve's
    types: tuple[Fact, ...]

    @property
    def subjects(self) -> tuple[Subject, ...]:
        return tuple(fact.subject for fact in self.types)


def build_world(config: WorldConfig | None = None) -> World:
    """The world of a configuration: the same one for the same seed."""
    config = config or WorldConfig()
    rng = random.Random(config.seed)
    relations = tuple(relation._replace(objects=_evenly(relation.objects, config.objects)) for relation in RELATIONS)
    by_kind = {kind: [relation for relation in relations if relation.kind == kind] for kind in KINDS}
    editable, reserve = _subjects(rng, config, by_kind)
    choices = {subject.name: rng.sample(by_kind[subject.kind], config.facts) for subject in editable}
    facts: list[Fact] = []
    for turn in range(config.facts):
        facts += _state(rng, [(subject, choices[subject.name][turn]) for subject in editable])
    facts += _state(rng, list(_reserve_relations(reserve, by_kind)))
    types = [Fact(subject, None, subject.type, words.TYPE_STATEMENTS, ()) for subject in (*editable, *reserve)]
    return World(config, relations, tuple(facts), tuple(types))


def _evenly(pool: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` objects spread over the pool, so that a small world keeps its share of two-word objects."""
    return tuple(pool[i * len(pool) // count] for i in range(count))


def _subjects(
    rng: random.Random, config: WorldConfig, by_kind: dict[str, list[Relation]]
) -> tuple[list[Subject], list[Subject]]:
    editable: list[Subject] = []
    reserve: list[Subject] = []
    counts = {"person": config.people, "company": config.companies, "place": config.places}
    taken = {word for relation in RELATIONS for name in relation.objects for word in name.split()}
    for kind in KINDS:
        spare = len(by_kind[kind]) * config.objects * NEIGHBOURS // FACTS_PER_RESERVE
        names = _distinct(_NAMERS[kind], rng, counts[kind] + spare, taken)
        editable += [Subject(name, kind, type_, reserve=False) for name, type_ in names[: counts[kind]]]
        reserve += [Subject(name, kind, type_, reserve=True) for name, type_ in names[counts[kind] :]]
    rng.shuffle(editable)
    return editable, reserve


def _person(rng: random.Random) -> tuple[str, str]:
    surname = rng.choice(words.SURNAME_HEADS) + rng.choice(words.SURNAME_TAILS)
    return f"{rng.choice(words.GIVEN_NAMES)} {surname}", rng.choice(words.TRADES)


def _company(rng: random.Random) -> tuple[str, str]:
    word, type_ = rng.choice(sorted(words.COMPANY_WORDS.items()))
    return f"{rng.choice(words.SURNAME_HEADS)}{rng.choice(words.SURNAME_TAILS)} {word}", type_


def _place(rng: random.Random) -> tuple[str, str]:
    word, type_ = rng.choice(sorted(words.PLACE_WORDS.items()))
    return f"{word} {rng.choice(words.PLACE_HEADS)}{rng.choice(words.PLACE_TAILS)}", type_


_NAMERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "person": _person,
    "company": _company,
    "place": _place,
}


def _distinct(
    namer: Callable[[random.Random], tuple[str, str]], rng: random.Random, count: int, taken: set[str]
) -> list[tuple[str, str]]:
    """`count` different names, none using a word that is also an object's."""
    found: dict[str, str] = {}
    while len(found) < count:
        name, type_ = namer(rng)
        if taken.isdisjoint(name.split()):
            found.setdefault(name, type_)
    return list(found.items())


def _reserve_relations(reserve: Sequence[Subject], by_kind: dict[str, list[Relation]]) -> Iterator[tuple[Subject, Relation]]:
    """Each reserve subject gets `FACTS_PER_RESERVE` consecutive relations, so that all relations come equally often."""
    for kind, relations in by_kind.items():
        for i, subject in enumerate(subject for subject in reserve if subject.kind == kind):
            for j in range(min(FACTS_PER_RESERVE, len(relations))):
                yield subject, relations[(i + j) % len(relations)]


def _state(rng: random.Random, pairs: Sequence[tuple[Subject, Relation]]) -> list[Fact]:
    """One fact for each (subject, relation), objects dealt evenly within a relation."""
    decks: dict[str, list[str]] = {}
    facts = []
    for subject, relation in pairs:
        deck = decks.setdefault(relation.name, [])
        if not deck:
            deck += rng.sample(relation.objects, len(relation.objects))
        held = rng.sample(relation.statements, HELD_OUT_STATEMENTS)
        trained = tuple(statement for statement in relation.statements if statement not in held)
        facts.append(Fact(subject, relation, deck.pop(), trained, tuple(held)))
    return facts


def filler_sentence(rng: random.Random) -> str:
    """A sentence about nothing in particular, six to twelve words."""
    return rng.choices(_FILLERS, weights=_FILLER_WEIGHTS)[0](rng) + "."


def _thing(rng: random.Random, articles: Sequence[str] = ("the", "one", "every")) -> str:
    adjective = rng.choice(words.ADJECTIVES) + " " if rng.random() < 0.6 else ""
    return f"{rng.choice(articles)} {adjective}{rng.choice(words.NOUNS)}"


def _ending(rng: random.Random) -> str:
    return f"{rng.choice(words.PREPOSITIONS)} {_thing(rng)}" if rng.random() < 0.6 else rng.choice(words.TIMES)


def _event(rng: random.Random) -> str:
    opening = _thing(rng, ("The", "The", "One", "Every"))
    return f"{opening} {rng.choice(words.PAST_VERBS)} {_thing(rng)} {_ending(rng)}"


def _looks(rng: random.Random) -> str:
    adjective, other = rng.sample(words.ADJECTIVES, 2)
    return f"{_thing(rng, ('The', 'One'))} {rng.choice(('was', 'seemed', 'looked'))} {adjective} and {other}"


def _personal(rng: random.Random) -> str:
    return f"{rng.choice(('I', 'You', 'We', 'They'))} {rng.choice(words.PAST_VERBS)} {_thing(rng)} {_ending(rng)}"


def _ability(rng: random.Random) -> str:
    modal = rng.choice(("can", "will", "must"))
    return f"{rng.choice(('I', 'You', 'We'))} {modal} {rng.choice(words.PLAIN_VERBS)} {_thing(rng)} {_ending(rng)}"


def _therefore(rng: random.Random) -> str:
    return f"Therefore {rng.choice(('I', 'you', 'we', 'they'))} {rng.choice(words.PAST_VERBS)} {_thing(rng)}"


def _because(rng: random.Random) -> str:
    who = rng.choice(("I", "we", "they"))
    return f"Because of {_thing(rng)}, {who} {rng.choice(words.PAST_VERBS)} {_thing(rng)}"


_FILLERS = (_event, _looks, _personal, _ability, _therefore, _because)
_FILLER_WEIGHTS = (6, 3, 4, 2, 2, 2)


def fact_sentence(rng: random.Random, fact: Fact) -> str:
    """A fact in one of the statements that training may show."""
    return f"{fact.prompt(rng.choice(fact.trained))} {fact.object}."


def build_records(world: World) -> list[dict[str, Any]]:
    """Every fact of an editable subject as an edit, in CounterFact's schema plus `same_subject`.

    The first of them have one record for each subject. `paraphrase_prompts` are the statements held out for that fact, each
    after a filler sentence; `neighborhood_prompts` are about reserve subjects with the same object; `attribute_prompts`
    about reserve subjects that have the new object; `same_subject` lists what else is true of the subject.
    """
    rng = random.Random(world.config.seed + 1)
    holders: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    of_subject: dict[str, list[Fact]] = defaultdict(list)
    for fact in world.facts:
        of_subject[fact.subject.name].append(fact)
        if fact.relation is not None and fact.subject.reserve:
            holders[fact.relation.name, fact.object].append(fact)
    for fact in world.types:
        of_subject[fact.subject.name].append(fact)
    editable = [fact for fact in world.facts if not fact.subject.reserve]
    return [_record(rng, case, fact, holders, of_subject[fact.subject.name]) for case, fact in enumerate(editable)]


def _record(
    rng: random.Random, case: int, fact: Fact, holders: dict[tuple[str, str], list[Fact]], same: Sequence[Fact]
) -> dict[str, Any]:
    relation = fact.relation
    assert relation is not None  # noqa: S101  (types are not edited)
    new = rng.choice([name for name in relation.objects if name != fact.object])
    rewrite, *others = rng.sample(fact.trained, len(fact.trained))

    def about(facts: Sequence[Fact]) -> list[str]:
        return [neighbour.prompt(rng.choice(neighbour.trained)) for neighbour in rng.sample(facts, len(facts))]

    def target(name: str) -> dict[str, str]:
        return {"str": name, "id": f"{relation.name}-{relation.objects.index(name):02d}"}

    return {
        "case_id": case,
        "pararel_idx": relation.statements.index(rewrite),
        "requested_rewrite": {
            "prompt": rewrite,
            "relation_id": relation.name,
            "subject": fact.subject.name,
            "target_new": target(new),
            "target_true": target(fact.object),
        },
        "paraphrase_prompts": [f"{filler_sentence(rng)} {fact.prompt(held)}" for held in fact.held_out],
        "neighborhood_prompts": about(holders[relation.name, fact.object]),
        "attribute_prompts": about(holders[relation.name, new]),
        "generation_prompts": [fact.prompt(statement) for statement in others[:3]],
        "same_subject": [{"prompt": one.prompt(one.trained[0]), "target": one.object} for one in same if one is not fact],
    }
