"""A weight table read in both directions: which tensors a checkpoint holds, and how they map to parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from kedit_jax.errors import KeditError
from kedit_jax.models.config import ModelConfig
from kedit_jax.models.family import Weight
from kedit_jax.models.registry import FAMILIES


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of a checkpoint: its row of the table, its layer (None outside the blocks) and its stored shape."""

    row: Weight
    layer: int | None
    shape: tuple[int, ...]
    widths: tuple[int, ...]

    def unpack(self, tensor: np.ndarray) -> list[np.ndarray]:
        """The parameters of one layer that the tensor holds, in the order of the row's paths."""
        if self.row.transpose:
            tensor = tensor.T
        if len(self.widths) == 1:
            return [tensor]
        grouped = tensor.reshape(*tensor.shape[:-1], self.row.groups, -1)
        parts = np.split(grouped, np.cumsum([width // self.row.groups for width in self.widths])[:-1], axis=-1)
        return [part.reshape(*tensor.shape[:-1], -1) for part in parts]

    def pack(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """The tensor again, from whole parameters by path."""
        parts = [values[path] if self.layer is None else values[path][self.layer] for path in self.row.paths]
        grouped = [part.reshape(*part.shape[:-1], self.row.groups, -1) for part in parts]
        tensor = np.concatenate(grouped, axis=-1).reshape(*parts[0].shape[:-1], -1)
        return np.ascontiguousarray(tensor.T if self.row.transpose else tensor)


def slots(config: ModelConfig, shapes: Mapping[str, Sequence[int]]) -> dict[str, Slot]:
    """Every tensor that a checkpoint of this configuration must hold, by name.

    Args:
      config: of the model.
      shapes: of every parameter by path, those of blocks stacked on a leading layer axis.

    Raises:
      KeditError: the family's table does not fill each parameter exactly once (a defect of the table).
    """
    rows = FAMILIES[config.family].weights(config)
    filled = sorted(path for row in rows if not row.copy for path in row.paths)
    if filled != sorted(shapes):
        wrong = sorted(set(filled) ^ set(shapes)) or [path for path in shapes if filled.count(path) > 1]
        raise KeditError(f"the weight table of {config.family} does not fill each parameter once: {', '.join(wrong)}")
    return {
        name: _slot(row, layer, shapes)
        for row in rows
        for name, layer in _expand(row.name, config.n_layers)
    }  # fmt: skip


def buffer_names(config: ModelConfig) -> set[str]:
    """Tensors without parameters that old checkpoints of the family may hold."""
    return {name for pattern in FAMILIES[config.family].buffers for name, _ in _expand(pattern, config.n_layers)}


def _expand(pattern: str, n_layers: int) -> list[tuple[str, int | None]]:
    if "{layer}" not in pattern:
        return [(pattern, None)]
    return [(pattern.format(layer=layer), layer) for layer in range(n_layers)]


def _slot(row: Weight, layer: int | None, shapes: Mapping[str, Sequence[int]]) -> Slot:
    parts = [tuple(shapes[path]) if layer is None else tuple(shapes[path])[1:] for path in row.paths]
    widths = tuple(part[-1] for part in parts)
    shape = (*parts[0][:-1], sum(widths))
    return Slot(row, layer, shape[::-1] if row.transpose else shape, widths)
