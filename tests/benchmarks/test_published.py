"""The procedure as published, in torch, against the library: values, keys and updates of two batches, in float64."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from experiments.benchmarks import problem
from experiments.benchmarks.published import Published
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession

TOLERANCE = {"gpt2": 1e-8, "llama": 1e-6}  # transformers' RMS norm and rotary angles are float32 in any model


class OneGroup(Published):
    """Without the prefixed contexts' keys."""

    def keys(self, requests: Sequence[EditRequest], layer: int) -> torch.Tensor:
        bare = copy.copy(self)
        bare.prefixes = ()
        return Published.keys(bare, requests, layer)


@dataclasses.dataclass(frozen=True)
class World:
    """A problem, and the library's session before and after two batches of three."""

    problem: problem.Problem
    sessions: list[EditSession]

    @property
    def batches(self) -> list[list[EditRequest]]:
        """The second gives the first's facts each other's targets: the same layout, and keys with a history."""
        first = self.problem.requests
        targets = [request.target for request in first]
        moved = zip(first, [*targets[1:], targets[0]], strict=True)
        return [list(first), [dataclasses.replace(r, target=target, id=f"{r.id} again") for r, target in moved]]

    def published(self, kind: type[Published] = Published) -> Published:
        model = transformers.AutoModelForCausalLM.from_pretrained(self.problem.checkpoint, dtype=torch.float64)
        moments = {layer: torch.tensor(moment).double() for layer, moment in self.problem.moments().items()}
        return kind(model, self.sessions[0].tokenizer, self.problem.prefixes, self.problem.shape.settings(), moments)

    def step(self, batch: int, layer: int) -> np.ndarray:
        """The library's update of a batch."""
        after, before = (self.sessions[number].layers[layer].update for number in (batch + 1, batch))
        return np.asarray(after - before)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def world(request: Any, quick_compilation: None, folder_of: Callable[[str], Path]) -> World:
    found = problem.read(folder_of(request.param))
    world = World(found, [problem.start(found)])
    for batch in world.batches:
        world.sessions.append(world.sessions[-1].edit(batch)[0])
    return world


def relative(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def steps_of(published: Published, batches: Sequence[Sequence[EditRequest]]) -> list[dict[int, np.ndarray]]:
    """Every layer's update of each batch."""
    steps = []
    for batch in batches:
        before = {layer: published.kernel(layer).clone() for layer in published.settings.layers}
        published.edit(batch)
        steps.append({layer: (published.kernel(layer) - kernel).numpy() for layer, kernel in before.items()})
    return steps


def test_values_keys_and_updates_agree_over_two_batches(world: World) -> None:
    published, tolerance = world.published(), TOLERANCE[world.problem.shape.family]
    for number, batch in enumerate(world.batches):
        reports = world.sessions[number + 1].reports
        assert reports is not None
        values = [published.value(request) for request in batch]
        assert relative(torch.stack([value.z for value in values]), reports.z) < tolerance
        assert relative([value.loss for value in values], reports.loss) < tolerance
        assert relative([value.nll for value in values], reports.nll) < tolerance
        (step,) = steps_of(published, [batch])
        for layer, update in step.items():
            assert relative(update, world.step(number, layer)) < tolerance
    for layer in published.settings.layers:
        keys = np.asarray(world.sessions[-1].layers[layer].constraints.keys)
        assert relative(published.history[layer], keys.T @ keys) < tolerance


def test_negative_control_a_history_left_out_is_noticed(world: World) -> None:
    published = world.published()
    published.edit(world.batches[0])
    for history in published.history.values():
        history.zero_()
    (step,) = steps_of(published, [world.batches[1]])
    assert min(relative(update, world.step(1, layer)) for layer, update in step.items()) > 1e-3


def test_negative_control_a_group_of_keys_left_out_is_noticed(world: World) -> None:
    (step,) = steps_of(world.published(OneGroup), world.batches[:1])
    assert min(relative(update, world.step(0, layer)) for layer, update in step.items()) > 1e-3


def test_as_many_whole_passes_as_published(world: World) -> None:
    """For a batch of two with two edited layers: steps for each request, then keys, current values and history's keys."""
    published = world.published()
    passes = []
    published.model.register_forward_hook(lambda *_: passes.append(1))
    published.edit(world.batches[0][:2])
    assert len(passes) == 2 * world.problem.shape.steps + 3 * len(published.settings.layers)
