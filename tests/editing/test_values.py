"""Target values against the plain float64 procedure, which optimises one request at a time through the whole model."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from editing_reference import PlainValue, largest_error, plain_value
from editing_world import random_model

from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.tokens import Layout, lay_out
from kedit_jax.editing.values import Values, ValueSettings, optimise_values
from kedit_jax.models import Biases, Decoder, ModelConfig, RotaryConfig

LAYER = 2
PREFIXES = ("The old house of Rome stands. ", "New people. ")
REQUESTS = [
    EditRequest("{} was born in", "Alice Smith", "old Lima and Oslo"),
    EditRequest("In {}, people speak", "Paris", "violin"),
    EditRequest("The house of {}", "Bob Jones", "is new"),
]
SETTINGS = ValueSettings(steps=8, learning_rate=0.5, clamp=0.9, kl_factor=1.5, decay=4.0)


@pytest.fixture(scope="module", autouse=True)
def wide() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def llama(vocabulary: int) -> ModelConfig:
    """Rotary positions, shared key heads, a gated MLP: what GPT-2 lacks."""
    return ModelConfig(
        family="llama", vocab_size=vocabulary, n_layers=4, d_model=16, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24,
        max_positions=64, norm="rms", norm_eps=1e-5, activation="silu", gated_mlp=True, biases=Biases(),
        rotary=RotaryConfig(dim=4, theta=777.0),
    )  # fmt: skip


@partial(jax.jit, static_argnums=2)
def optimise(model: Decoder, layout: Layout, layer: int, numbers: Mapping[str, Any]) -> Values:
    """`optimise_values` with traced settings: one compilation for all of these tests. Sessions compile them in."""
    settings = object.__new__(ValueSettings)
    for name, value in numbers.items():
        object.__setattr__(settings, name, value)
    return optimise_values.__wrapped__(model, layout, layer, settings)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, the batched optimisation of `REQUESTS` in a padded micro-batch, and the plain one."""

    model: Decoder
    tokenizer: Any
    layout: Layout
    values: Values
    plain: list[PlainValue]

    def again(self, *, layout: Layout | None = None, **changes: Any) -> Values:
        """The same with another layout or other settings."""
        return optimise(self.model, layout or self.layout, LAYER, dataclasses.asdict(SETTINGS) | changes)

    def plainly(self, request: EditRequest, **changes: Any) -> PlainValue:
        settings = dataclasses.replace(SETTINGS, **changes)
        return plain_value(self.model, self.tokenizer, PREFIXES, request, LAYER, settings)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def case(request: pytest.FixtureRequest, wide: None, wide_model: Decoder, tokenizer: Any) -> Case:
    model = wide_model
    if request.param == "llama":
        model = random_model(llama(len(tokenizer)), 1, scale=0.25, dtype=np.float64)
    layout = lay_out(tokenizer, REQUESTS, PREFIXES, max_positions=64, size=4)
    values = optimise(model, layout, LAYER, dataclasses.asdict(SETTINGS))
    plain = [plain_value(model, tokenizer, PREFIXES, request, LAYER, SETTINGS) for request in REQUESTS]
    return Case(model, tokenizer, layout, values, plain)


def test_batched_values_are_those_of_one_request_at_a_time(case: Case) -> None:
    assert case.values.z.dtype == np.float64
    assert largest_error(case.values.z[:3], [one.z for one in case.plain]) < 1e-10  # 1e-5 is promised
    np.testing.assert_allclose(case.values.nll_before[:3], [one.losses[0] for one in case.plain], rtol=1e-12)
    np.testing.assert_allclose(case.values.loss[:3], [one.losses[-1] for one in case.plain], rtol=1e-9)
    np.testing.assert_allclose(case.values.nll_before[:3], [one.nlls[0] for one in case.plain], rtol=1e-12)
    np.testing.assert_allclose(case.values.nll[:3], [one.nlls[-1] for one in case.plain], rtol=1e-9)
    assert case.values.updates[:3].tolist() == [one.updates for one in case.plain] == [7, 7, 7]
    moved = [np.linalg.norm(one.z - one.origin) / np.linalg.norm(one.origin) for one in case.plain]
    np.testing.assert_allclose(case.values.moved[:3], moved, rtol=1e-9)


def test_the_comparison_has_something_to_compare(case: Case) -> None:
    """The optimisation moves, lowers the NLL, and both KL and decay have their share of the loss."""
    assert (case.values.moved > 0.02).all()
    assert float((case.values.nll_before - case.values.nll).max()) > 0.1
    assert (case.values.loss - case.values.nll > 1e-3).all()


def test_rows_of_padding_repeat_the_first_request_and_disturb_nothing(case: Case) -> None:
    np.testing.assert_array_equal(case.values.z[3], case.values.z[0])


def test_each_request_comes_out_the_same_in_any_row(case: Case) -> None:
    """Row 0 above all: gradients of padding slots would end there. The first request comes twice, as padding has it."""
    compiled = optimise._cache_size()
    for first in (1, 2):
        order = [first, *(i for i in range(3) if i != first), 0]
        layout = lay_out(case.tokenizer, [REQUESTS[i] for i in order], PREFIXES, max_positions=64)
        values = case.again(layout=layout)
        assert largest_error(values.z, [case.plain[i].z for i in order]) < 1e-10
    assert optimise._cache_size() == compiled


def test_each_request_comes_out_the_same_in_any_company(case: Case) -> None:
    """Others in its stead, of the same lengths, so that no program is compiled: a request sees nothing of them."""
    others = [("{} was born in", "Carol White", "old Oslo and Lima"), ("In {}, people speak", "Rome", "violin")]
    compiled = optimise._cache_size()
    for kept in range(2):
        requests = [r if i == kept else EditRequest(*others[i]) if i < 2 else r for i, r in enumerate(REQUESTS)]
        values = case.again(layout=lay_out(case.tokenizer, requests, PREFIXES, max_positions=64, size=4))
        assert largest_error(values.z[kept : kept + 1], case.values.z[kept : kept + 1]) < 1e-12
        assert largest_error(values.z[1 - kept : 2 - kept], case.values.z[1 - kept : 2 - kept]) > 1e-3
    assert optimise._cache_size() == compiled


@pytest.mark.parametrize("changes", [{"kl_factor": 0.0}, {"decay": 0.0}, {"learning_rate": 0.1}], ids=str)
def test_negative_control_each_term_matters(case: Case, changes: dict[str, float]) -> None:
    assert largest_error(case.again(**changes).z, case.values.z) > 1e-3


@pytest.mark.parametrize("part", ["target_columns", "target_weights", "n_prefix"])
def test_negative_control_a_wrong_place_is_noticed(case: Case, part: str) -> None:
    layout = case.layout
    if part == "target_columns":  # every logit read one token late
        late = np.where(layout.target_weights > 0, layout.target_columns + 1, 0)
        wrong = dataclasses.replace(layout, target_columns=late)
    elif part == "target_weights":  # tokens of the first context only
        kept = np.arange(len(layout.tokens)) % layout.n_contexts == 0
        wrong = dataclasses.replace(layout, target_weights=layout.target_weights * kept[:, None])
    else:  # the subject's last token taken to be one column further left
        wrong = dataclasses.replace(layout, tokens=np.roll(layout.tokens, 1, axis=1), valid=np.roll(layout.valid, 1, axis=1))
    assert largest_error(case.again(layout=wrong).z[:3], [one.z for one in case.plain]) > 1e-3


def test_delta_is_clamped_to_a_share_of_the_hidden_state(case: Case) -> None:
    changes = {"clamp": 0.02, "kl_factor": 0.0, "decay": 0.0}
    values = case.again(**changes)
    np.testing.assert_allclose(values.moved, 0.02, rtol=1e-9)
    assert largest_error(values.z[:1], [case.plainly(REQUESTS[0], **changes).z]) < 1e-10


def test_a_request_stops_where_its_loss_is_low_and_the_others_go_on(case: Case) -> None:
    bar = float(np.sort([one.losses[3] for one in case.plain])[0]) + 1e-6
    plain = [case.plainly(request, stop_loss=bar) for request in REQUESTS]
    assert min(one.updates for one in plain) < 7, "no request stops early: the test shows nothing"
    values = case.again(stop_loss=bar)
    assert values.updates[:3].tolist() == [one.updates for one in plain]
    assert largest_error(values.z[:3], [one.z for one in plain]) < 1e-10


def test_nothing_moves_when_every_loss_is_low_at_once(case: Case) -> None:
    values = case.again(stop_loss=1e9)
    assert values.updates.tolist() == [0, 0, 0, 0]
    np.testing.assert_array_equal(values.moved, 0)
    np.testing.assert_allclose(values.z[:3], [one.origin for one in case.plain], rtol=1e-12)


def test_decay_alone_has_no_gradient_at_zero(case: Case) -> None:
    """|delta| has a kink at 0; a NaN there would spoil the first update."""
    one = case.again(decay=1e3)
    assert np.isfinite(one.z).all()
    assert largest_error(one.z[:1], [case.plainly(REQUESTS[0], decay=1e3).z]) < 1e-10


def test_infinity_stays_in_its_own_row(case: Case) -> None:
    """An overflowing learning rate is visible in the values; the session turns it into an error."""
    assert not np.isfinite(case.again(learning_rate=float("inf")).z).any()
