"""A stage of the tests' small random world, whose batches are those of the other tests and share their compiled programs."""

from pathlib import Path
from typing import Any

import pytest

from experiments.paper.measures import Quality
from experiments.paper.stage import Stage, untouched
from kedit_jax.editing import EditRequest, EditSettings, Moments
from kedit_jax.evaluation import Fact, Record, prepare_texts
from kedit_jax.models import Decoder


class OrderedStage(Stage):
    """Gives facts out in their own order, whatever the seed."""

    def chosen(self, seed: int, count: int) -> list[Record]:
        return list(self.records[:count])


@pytest.fixture(scope="session")
def records(batches: list[list[EditRequest]]) -> tuple[Record, ...]:
    """The twelve requests of the four batches. Every subject has two other facts, one of which is another record's."""
    requests = [request for batch in batches for request in batch]
    true = [f"object {number}" for number in range(len(requests))]
    return tuple(
        Record(
            case_id=number,
            prompt=request.prompt,
            subject=request.subject,
            target_new=request.target,
            target_true=true[number],
            paraphrase_prompts=(f"Old {request.subject} plays the",),
            neighborhood_prompts=(f"The house of {requests[number - 1].subject} is far from",),
            same_subject=(
                Fact(f"{request.subject} is a", "both"),
                Fact(f"{request.subject} likes", true[(number + 6) % 12]),
            ),
            relation_id="same",
        )
        for number, request in enumerate(requests)
    )


@pytest.fixture(scope="session")
def stage(
    model: Decoder,
    tokenizer: Any,
    moments: Moments,
    settings: EditSettings,
    texts: list[str],
    records: tuple[Record, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> Stage:
    heldout = prepare_texts(texts[:2], tokenizer, max_length=32)
    editors = {"memit": {}, "rect": {"post": "rect:0.4"}, "ridge": {"editor": "ridge", "ridge": 1.0}}
    folder = Path(tmp_path_factory.mktemp("priors"))
    asked = untouched(records, tokenizer, 8)
    return OrderedStage(
        "small", model, tokenizer, records, heldout, settings, editors, moments, folder, asked
    )  # fmt: skip


@pytest.fixture(scope="session")
def quality(stage: Stage) -> Quality:
    return Quality(stage, stage.chosen(0, 12), 3)
