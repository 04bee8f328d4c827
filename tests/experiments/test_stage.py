"""Which facts a seed edits."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from experiments.paper.stage import Stage
from kedit_jax.errors import KeditError


def test_facts_are_of_different_subjects_where_there_are_so_many() -> None:
    records = [SimpleNamespace(subject=subject, number=number) for number, subject in enumerate("aabbccdd")]
    stage = cast(Any, SimpleNamespace(records=records, name="small"))
    for seed in range(5):
        few = Stage.chosen(stage, seed, 4)
        assert sorted(fact.subject for fact in few) == list("abcd")
        assert Stage.chosen(stage, seed, 4) == few
        many = Stage.chosen(stage, seed, 6)
        assert len({fact.number for fact in cast(Any, many)}) == 6
    assert len({tuple(fact.number for fact in cast(Any, Stage.chosen(stage, seed, 4))) for seed in range(5)}) > 1
    with pytest.raises(KeditError, match="9 edits, but small has 8 facts"):
        Stage.chosen(stage, 0, 9)
