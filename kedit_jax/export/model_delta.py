"""A delta and the model that it belongs to: what every export is made of."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kedit_jax.delta import EditDelta
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import ExportError
from kedit_jax.models import Decoder, ModelConfig, down_kernel_address, model_fingerprint, named_parameters
from kedit_jax.models.loading import abstract_decoder
from kedit_jax.models.table import Slot, slots


@dataclass(frozen=True, eq=False)
class ModelDelta:
    """Updates of a model's down projections.

    Attributes:
        delta: the updates, each against the model's own kernel.
        config: of the model.
        fingerprint: of the model before any edit (`kedit_jax.models.model_fingerprint`).
        dtype: that the model had; its fingerprint holds in this one alone.
    """

    delta: EditDelta
    config: ModelConfig
    fingerprint: str
    dtype: str

    def check(self, model: Decoder) -> None:
        """Raise an ExportError unless this is the model that was edited, before its edits."""
        problems = [
            f"{what}: the edited model has {ours}, given is {theirs}"
            for what, ours, theirs in (
                ("family", self.config.family, model.config.family),
                ("layers", self.config.n_layers, model.config.n_layers),
                ("down projection", _kernel(self.config), _kernel(model.config)),
                ("dtype", self.dtype, str(model.dtype)),
                ("weights", self.fingerprint[:16], model_fingerprint(model)[:16]),
            )
            if ours != theirs
        ]
        if problems:
            raise ExportError.listing("the delta belongs to another model:", problems)


class DownTensor(NamedTuple):
    """The tensor of a layer's down projection in the weight table, and how it is stored."""

    layer: int
    name: str
    slot: Slot


def model_delta(edited: EditSession | ModelDelta) -> ModelDelta:
    """The delta of a session with what it belongs to; a `ModelDelta` is given back as it is.

    Raises:
        ExportError: there are no edits, or an update is not one of a down projection of the model, or not finite; all
            such updates are listed.
    """
    if isinstance(edited, EditSession):
        base = edited.base
        edited = ModelDelta(edited.delta, base.config, edited.moments.model, str(base.dtype))
    if not edited.delta.updates:
        raise ExportError("there are no edits to export; write facts first")
    known, problems = down_tensors(edited.config), []
    for address, update in edited.delta.updates.items():
        if address not in known:
            problems.append(f"{address}: not a down projection, whose names are {down_kernel_address(0)} and so on")
        elif update.shape != _kernel(edited.config):
            problems.append(f"{address}: update of shape {update.shape}, kernel of shape {_kernel(edited.config)}")
        elif not np.isfinite(np.asarray(update.dense())).all():
            problems.append(f"{address}: holds NaN or infinite values")
    if problems:
        raise ExportError.listing("these updates cannot be exported:", problems)
    return edited


def delta_of(model: Decoder, delta: EditDelta) -> ModelDelta:
    """A delta and the unedited model that it belongs to."""
    return ModelDelta(delta, model.config, model_fingerprint(model), str(model.dtype))


def layout(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, Slot]]:
    """The shape of every parameter by its path, and the tensors of the model's checkpoints by name."""
    shapes = {path: tuple(value.shape) for path, value in named_parameters(abstract_decoder(config)).items()}
    return shapes, slots(config, shapes)


def down_tensors(config: ModelConfig) -> dict[str, DownTensor]:
    """Where the model's checkpoints keep each down projection, by its address, in order of the layers."""
    path = down_kernel_address(0).removesuffix("[0]")
    found = {slot.layer: (name, slot) for name, slot in layout(config)[1].items() if slot.row.paths == (path,)}
    return {down_kernel_address(layer): DownTensor(layer, *found[layer]) for layer in range(config.n_layers)}


def _kernel(config: ModelConfig) -> tuple[int, int]:
    return (config.d_ff, config.d_model)
