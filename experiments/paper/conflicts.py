"""Conflicts [d]: facts that are corrected, contradicted within a batch, or taken back, under each policy.

What should hold in the end is worked out here from the stream alone, and a fresh one-time edit of just that, from the
constraints that the session stored, is what its kernels are compared with.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from experiments.paper.config import check
from experiments.paper.measures import accuracy, check_columns, cost
from experiments.paper.results import Log
from experiments.paper.running import UNEDITED, Run, Step, Tick, run_steps, unedited
from experiments.paper.stage import Stage
from kedit_jax import solve
from kedit_jax.delta import Dense, EditDelta, relative_error
from kedit_jax.editing import EditRequest, EditSession, EditSettings
from kedit_jax.evaluation import Record, prepare_pairs, score_pairs
from kedit_jax.models import Decoder, down_kernel_address

POLICIES = ("latest", "first", "merge", "reject", "keep")
UNALIGNED = "unaligned"
"""No policy: naive repetition, which keeps no history that anything could be taken out of."""


@dataclass(frozen=True)
class ConflictsConfig:
    """Of the streams.

    Attributes:
        facts: how many facts there are; each is stated 1 to `most` times, with another object each time.
        within: share of the facts with several statements whose first two come in one batch.
        retracted: share of the facts that are taken back at the end.
        steps: batches of the stream.
        policies: of `POLICIES`, and `unaligned`.
    """

    seeds: tuple[int, ...]
    facts: int
    most: int
    within: float
    retracted: float
    steps: int
    editor: str
    policies: tuple[str, ...]
    save_every: int
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [name for name in self.policies if name not in (*POLICIES, UNALIGNED)]
        check(
            (not unknown, f"policies {', '.join(unknown)} are none of {', '.join((*POLICIES, UNALIGNED))}"),
            (1 <= self.most <= self.steps, f"most is {self.most}; it must be from 1 to the number of steps, {self.steps}"),
            (0 <= self.within <= 1, f"within is {self.within}; it is a share"),
            (0 <= self.retracted <= 1, f"retracted is {self.retracted}; it is a share"),
        )
        check_columns(self.columns)


@dataclass(frozen=True)
class Stream:
    """Statements of facts in batches, and which facts are taken back afterwards.

    Attributes:
        batches: requests with ids FACT.VERSION, versions from 0.
        statements: by fact, its statements in the order of the stream.
        retracted: facts that are taken back.
        original: by fact, the object that it had at first.
    """

    batches: tuple[tuple[EditRequest, ...], ...]
    statements: dict[str, list[EditRequest]]
    retracted: frozenset[str]
    original: dict[str, str]


def stream_of(records: Sequence[Record], config: ConflictsConfig, seed: int) -> Stream:
    """A stream over the records, decided by the seed."""
    rng = np.random.default_rng((seed, 1))
    objects: dict[str | None, set[str]] = defaultdict(set)
    for record in records:
        objects[record.relation_id] |= {record.target_new, record.target_true or record.target_new}
    batches: list[list[EditRequest]] = [[] for _ in range(config.steps)]
    statements, original = {}, {}
    for number, record in enumerate(records):
        others = sorted(objects[record.relation_id] - {record.target_new, record.target_true})
        count = min(1 + number % config.most, 1 + len(others))
        targets = [record.target_new, *rng.permutation(others)[: count - 1].tolist()]
        places = np.sort(rng.choice(config.steps, count, replace=False))
        if count > 1 and rng.random() < config.within:
            places[1] = places[0]
        request = record.request()
        fact = request.id or str(record.case_id)
        stated = [replace(request, target=target, id=f"{fact}.{version}") for version, target in enumerate(targets)]
        statements[fact], original[fact] = stated, record.target_true or ""
        for place, one in zip(places, stated, strict=True):
            batches[place].append(one)
    gone = rng.choice(list(statements), round(config.retracted * len(statements)), replace=False)
    kept = tuple(tuple(batch) for batch in batches if batch)
    return Stream(kept, statements, frozenset(gone.tolist()), original)


def standing(stream: Stream, policy: str) -> dict[str, list[EditRequest]]:
    """By fact, the statements that a policy should leave before anything is taken back."""
    if policy in ("latest", UNALIGNED):
        return {fact: stated[-1:] for fact, stated in stream.statements.items()}
    if policy in ("first", "reject"):
        return {fact: stated[:1] for fact, stated in stream.statements.items()}
    return dict(stream.statements)


def runs(config: ConflictsConfig, stage: Stage, seed: int) -> list[Run]:
    """One stream under every policy."""
    records, made = stage.chosen(seed, config.facts), []
    stream = stream_of(records, config, seed)
    protocol = {"most": config.most, "within": config.within, "retracted": config.retracted, "steps": config.steps}

    def before() -> dict[str, Any]:
        should = {fact: stated for fact, stated in standing(stream, "latest").items() if fact not in stream.retracted}
        originals = [(stream.statements[fact][0].text, stream.original[fact]) for fact in sorted(stream.retracted)]
        return {
            "holding_accuracy": _any_said(stage, stage.model, should),
            "restored_accuracy": accuracy(stage, stage.model, originals),
            **cost(stage, stage.model),
        }

    header = stage.header(stage.settings(config.editor, seed), records)
    made.append(unedited({"policy": UNEDITED, **protocol, **header}, before))
    for policy in config.policies:
        history = {"history": UNALIGNED} if policy == UNALIGNED else {"conflicts": policy}
        settings = stage.settings(config.editor, seed, compensate=False, **history)
        what = {
            "policy": policy,
            **protocol,
            **stage.header(settings, records),
        }
        work = sum(len(batch) for batch in stream.batches)
        made.append(Run(policy, what, work, partial(_edited, config, stage, stream, policy, settings)))
    return made


def _edited(
    config: ConflictsConfig, stage: Stage, stream: Stream, policy: str, settings: EditSettings, log: Log, tick: Tick
) -> None:
    should = standing(stream, policy)
    if policy != UNALIGNED:
        gone = tuple(str(one.id) for fact in sorted(stream.retracted) for one in should[fact])
        steps = [*(Step(batch) for batch in stream.batches), Step(retracted=gone)]
        if not gone:
            steps.pop()
        should = {fact: stated for fact, stated in should.items() if fact not in stream.retracted}
    else:
        steps = [Step(batch) for batch in stream.batches]

    def measure(session: EditSession, step: EditDelta, number: int) -> dict[str, Any]:
        line: dict[str, Any] = {"facts": len(session.facts)}
        if number < len(steps):
            return line
        return line | judged(stage, session, stream, should, policy) | cost(stage, session.model)

    run_steps(stage, settings, steps, log, measure, tick, save_every=config.save_every)
    log.finish()


def judged(
    stage: Stage, session: EditSession, stream: Stream, should: dict[str, list[EditRequest]], policy: str
) -> dict[str, float | None]:
    """The final state against what should hold.

    `holding_accuracy` counts a fact whose answer is one that should hold; `outdated_accuracy` one, of those that were
    corrected, whose answer is a statement that should not.
    """
    wanted = [str(one.id) for stated in should.values() for one in stated]
    outdated = {
        fact: [one for one in stream.statements[fact] if one.target not in {good.target for good in stated}]
        for fact, stated in should.items()
    }
    held = {str(fact.id) for fact in session.facts}
    restored = []
    if policy != UNALIGNED:
        restored = [(stream.statements[fact][0].text, stream.original[fact]) for fact in sorted(stream.retracted)]
    return {
        "holding_accuracy": _any_said(stage, session.model, should),
        "outdated_accuracy": _any_said(stage, session.model, {fact: stated for fact, stated in outdated.items() if stated}),
        "restored_accuracy": accuracy(stage, session.model, restored),
        "inconsistency": inconsistency(session, wanted),
        "wrong_facts": len(held ^ set(wanted)) if policy != UNALIGNED else None,
    }


def inconsistency(session: EditSession, wanted: Sequence[str]) -> float:
    """Distance of the session's update from the one-time edit of just the wanted facts, at the constraints it stored.

    Infinite where it stored none of them.
    """
    rows = np.array([str(fact.id) in set(wanted) for fact in session.facts[session.compacted :]], bool)
    if not rows.any():
        return float("inf")
    updates = {}
    with solve.float64():
        for layer, held in session.layers.items():
            solution = solve.one_time(session.editors[layer].prior, solve.take(held.constraints, rows))
            solve.check(solution.status)
            updates[down_kernel_address(layer)] = Dense(np.asarray(solution.update))
    return relative_error(session.delta, EditDelta(updates))


def _any_said(stage: Stage, model: Decoder, answers: dict[str, list[EditRequest]]) -> float | None:
    """Percent of facts for which one of the statements is met exactly; None for no facts."""
    facts = [fact for fact, stated in answers.items() for _ in stated]
    if not facts:
        return None
    pairs = [(one.text, one.target) for stated in answers.values() for one in stated]
    correct = score_pairs(model, prepare_pairs(pairs, stage.tokenizer)).correct
    said = {fact for fact, right in zip(facts, correct, strict=True) if right}
    return 100 * len(said) / len(answers)
