"""A stage of the tests' small random world: its programs are those of the other tests."""

from pathlib import Path
from typing import Any

import pytest
from editing_world import PEOPLE, PLACES

from experiments.paper.measures import Quality
from experiments.paper.stage import Stage, untouched
from kedit_jax.editing import EditSettings, Moments
from kedit_jax.evaluation import Fact, Record, prepare_texts
from kedit_jax.models import Decoder


@pytest.fixture(scope="session")
def stage(
    model: Decoder,
    tokenizer: Any,
    moments: Moments,
    settings: EditSettings,
    texts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Stage:
    """Twelve facts: three relations of four subjects each."""
    records = []
    for number, (person, place) in enumerate(zip(PEOPLE, PLACES, strict=True)):
        other, third = PLACES[(number + 1) % 4], PLACES[(number + 2) % 4]
        for prompt, subject, new, true in (
            ("{} was born in", person, other, place),
            ("The house of {} stands in", person, third, place),
            ("In {}, people speak", place, "violin", "French"),
        ):
            records.append(
                Record(
                    case_id=len(records),
                    prompt=prompt,
                    subject=subject,
                    target_new=new,
                    target_true=true,
                    paraphrase_prompts=(f"Old {subject} plays the",),
                    neighborhood_prompts=(f"The house of {PEOPLE[number - 1]} is far from",),
                    same_subject=(Fact(f"{subject} is a", true), Fact(f"{subject} likes", other)),
                    relation_id=prompt,
                )
            )
    heldout = prepare_texts(texts[:2], tokenizer, max_length=32)
    editors = {"memit": {}, "rect": {"post": "rect:0.4"}, "ridge": {"editor": "ridge", "ridge": 1.0}}
    return Stage(
        "small",
        model,
        tokenizer,
        tuple(records),
        heldout,
        settings,
        editors,
        moments,
        Path(tmp_path_factory.mktemp("priors")),
        untouched(records, tokenizer, 8),
    )


@pytest.fixture(scope="session")
def quality(stage: Stage) -> Quality:
    return Quality(stage, stage.chosen(0, 12), 3)
