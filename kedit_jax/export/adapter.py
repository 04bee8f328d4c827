"""The delta as a LoRA adapter, in the files that peft, transformers and vLLM read.

An adapter of rank r adds B A to a weight [out, in], A [r, in], B [out, r], scaled by lora_alpha / r, here 1. For a kernel
y = x W, W [in, out], and its update D, the best B A in the Frobenius norm is the transpose of the r largest terms of the
singular value decomposition D = U S V' (Eckart and Young): A = sqrt(S_r) U_r', B = V_r sqrt(S_r).
"""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import DTypeLike, Float

from kedit_jax.delta import EditDelta, LowRank, Update
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import ExportError, NonFiniteError
from kedit_jax.export.efficacy import Efficacy, efficacy_of
from kedit_jax.export.model_delta import ModelDelta, down_tensors, model_delta
from kedit_jax.export.staging import new_folder
from kedit_jax.export.tensors import Content, Tensor, size_of, storable, tensor_of, write_content
from kedit_jax.models import ModelConfig
from kedit_jax.models.registry import FAMILIES

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as its --max-lora-rank, and so the ranks worth choosing among."""

EXACT = 2.0**-24
"""Truncation of an update by no more than this share of its norm is exact: factors in float32 carry no more."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, eq=False)
class AdapterPlan:
    """An adapter as it would be written, and what it costs; `export_adapter` writes it.

    Attributes:
        rank: of all its layers; a layer with an update of lower rank is padded with zeros.
        model: what it belongs to, and the exact updates.
        factors: by address, what is written: the update as left @ right, left being A' and right B'.
        errors: by layer, |adapter - update| / |update| in the Frobenius norm, with the factors as they are stored.
        exact: whether truncation takes no more than `EXACT` of any layer.
        needed: by layer, the smallest rank that is exact.
        choices: for each of `VLLM_RANKS`, the error of the worst layer by truncation alone.
        efficacy: how the session's facts fare; None where a delta without a session was planned.
    """

    rank: int
    model: ModelDelta = field(repr=False)
    factors: Mapping[str, LowRank] = field(repr=False)
    errors: Mapping[int, float]
    exact: bool
    needed: Mapping[int, int]
    choices: Mapping[int, float]
    efficacy: Efficacy | None

    @property
    def delta(self) -> EditDelta:
        """The update that the adapter stands for."""
        return EditDelta(self.factors)

    @property
    def dtype(self) -> np.dtype:
        """Of the stored factors."""
        return np.asarray(next(iter(self.factors.values())).left).dtype

    def to_dict(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return {
            "rank": self.rank,
            "exact": self.exact,
            "errors": {str(layer): error for layer, error in self.errors.items()},
            "needed": {str(layer): rank for layer, rank in self.needed.items()},
            "choices": {str(rank): error for rank, error in self.choices.items()},
            "efficacy": None if self.efficacy is None else self.efficacy.to_dict(),
        }

    def lines(self) -> list[str]:
        """What a person should know before it is written, in lines of 80 columns."""
        told = [
            f"LoRA adapter of rank {self.rank}, {self._kind()}",
            f"relative error of the kernels, with factors in {self.dtype}:",
        ]
        told += [f"  layer {layer:<4} {error:.1e}" for layer, error in self.errors.items()]
        told += ["ranks that vLLM takes, with what truncation costs the worst layer:"]
        told += [f"  rank {rank:<5} {_words(error)}" for rank, error in self.choices.items()]
        return told if self.efficacy is None else told + self.efficacy.lines()

    def _kind(self) -> str:
        if not self.exact:
            return f"truncated; exact from rank {max(self.needed.values())}"
        if self.dtype == np.float32:
            return "exact"
        return f"exact but for rounding to {self.dtype} ({max(self.errors.values()):.1e})"


@dataclass(frozen=True)
class _Parts:
    """Singular value decomposition of one update, its largest `VLLM_RANKS[-1]` terms or more, and all singular values."""

    left: Float[np.ndarray, "k r"]
    values: Float[np.ndarray, "m"]
    right: Float[np.ndarray, "r v"]

    def error(self, rank: int) -> float:
        """|what lies beyond the rank| / |the whole|."""
        whole = float(np.linalg.norm(self.values))
        return float(np.linalg.norm(self.values[rank:])) / whole if whole else 0.0

    @property
    def needed(self) -> int:
        """The smallest rank that is exact; 0 for an update of zeros."""
        beyond = np.sqrt(np.cumsum(self.values[::-1] ** 2))[::-1]  # norm of the values from here on
        return int(np.sum(beyond > EXACT * np.linalg.norm(self.values)))


def plan_adapter(
    edited: EditSession | ModelDelta,
    rank: int | None = None,
    *,
    error: float | None = None,
    dtype: DTypeLike = np.float32,
) -> AdapterPlan:
    """The best adapter of some rank, with its errors and its effect on the session's facts; nothing is written.

    Each layer costs a singular value decomposition: 3.5 s for an update of [6400, 1600] on one core.

    Args:
        edited: a session, or a delta without one, whose plan says nothing of facts.
        rank: of the adapter; by default the smallest of `VLLM_RANKS` that is exact, or that meets `error`.
        error: largest relative error of a layer that is put up with.
        dtype: of the stored factors.

    Raises:
        ExportError: nothing to export, a rank below 1, or no rank of `VLLM_RANKS` is good enough: what each costs is listed.
        NonFiniteError: factors that are not finite in the dtype.
    """
    model = model_delta(edited)
    stored_as = storable(dtype, "adapters")
    keep = max(VLLM_RANKS[-1], rank or 0)
    layers = _by_layer(model)
    parts = {address: _decompose(model.delta[address], keep) for address in layers}
    choices = {choice: max(part.error(choice) for part in parts.values()) for choice in VLLM_RANKS}
    rank = _chosen(rank, error, choices, parts.values())
    factors = {address: _factors(part, rank, stored_as) for address, part in parts.items()}
    return AdapterPlan(
        rank=rank,
        model=model,
        factors=factors,
        errors={layer: _distance(factors[address], model.delta[address]) for address, layer in layers.items()},
        exact=all(part.error(rank) <= EXACT for part in parts.values()),
        needed={layer: parts[address].needed for address, layer in layers.items()},
        choices=choices,
        efficacy=efficacy_of(edited, EditDelta(factors)) if isinstance(edited, EditSession) else None,
    )


def export_adapter(
    plan: AdapterPlan,
    folder: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors; `check_target` says beforehand whether it may.

    Args:
        folder: made by this call; it appears whole or not at all.
        base_model: directory or hub id of the original model, for programs that load it by themselves.
        overwrite: replace an earlier adapter; a folder that holds anything else is still refused.

    Raises:
        ExportError: the folder exists, there is too little space, or writing failed. Nothing is left behind.
    """
    places, tensors = down_tensors(plan.model.config), []
    for address, update in plan.factors.items():
        module = f"base_model.model.{places[address].name.removesuffix('.weight')}"
        for part, factor in (("lora_A", update.left), ("lora_B", update.right)):
            tensors.append(_transposed(f"{module}.{part}.weight", np.asarray(factor)))
    content = Content(tuple(tensors), {"format": "pt", "model": plan.model.fingerprint})
    config = adapter_config(plan, base_model)
    with new_folder(folder, form="adapter", needed=size_of(content), overwrite=overwrite) as partial:
        write_content(partial / ADAPTER_WEIGHTS, content)
        (partial / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(folder).expanduser()


def adapter_config(plan: AdapterPlan, base_model: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """What adapter_config.json says."""
    down = next(iter(down_tensors(plan.model.config).values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base_model is None else str(base_model),
        "inference_mode": True,
        "r": plan.rank,
        "lora_alpha": plan.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [_target_module(plan.model.config, down.slot.row.name)],
        "layers_to_transform": sorted(plan.errors),
        "fan_in_fan_out": not down.slot.row.transpose,  # GPT-2's Conv1D keeps its weight as [in, out]
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _by_layer(model: ModelDelta) -> dict[str, int]:
    """The layers of the edited kernels by address, in rising order."""
    return {address: down.layer for address, down in down_tensors(model.config).items() if address in model.delta.updates}


def _transposed(name: str, factor: np.ndarray) -> Tensor:
    return tensor_of(name, factor.dtype, factor.shape[::-1], lambda: factor.T)


def _target_module(config: ModelConfig, row: str) -> str:
    """The end of the down projections' names that no other module shares: GPT-2 has a c_proj in its attention, too."""
    module = row.removesuffix(".weight")
    others = {row.name.rpartition(".")[0] for row in FAMILIES[config.family].weights(config)} - {module}
    parts = module.split(".")
    ends = [".".join(parts[-count:]) for count in range(1, len(parts))]
    return next(end for end in ends if not any(other.endswith(f".{end}") for other in others))


def _decompose(update: Update, keep: int) -> _Parts:
    if isinstance(update, LowRank):  # of the factors' size, not the kernel's
        left, upper = np.linalg.qr(np.asarray(update.left, np.float64))
        right, lower = np.linalg.qr(np.asarray(update.right, np.float64).T)
        u, values, vt = np.linalg.svd(upper @ lower.T, full_matrices=False)
        u, vt = left @ u, vt @ right.T
    else:
        u, values, vt = np.linalg.svd(np.asarray(update.dense(), np.float64), full_matrices=False)
    return _Parts(u[:, :keep].copy(), values, vt[:keep].copy())


def _chosen(rank: int | None, error: float | None, choices: Mapping[int, float], parts: Collection[_Parts]) -> int:
    if rank is not None:
        if error is not None:
            raise ExportError("rank and error are given; an adapter takes one of them")
        if rank < 1:
            raise ExportError(f"rank is {rank}: it must be at least 1")
        return rank
    limit = EXACT if error is None else error
    good = [choice for choice, cost in choices.items() if cost <= limit]
    if good:
        return good[0]
    wanted = "is exact" if error is None else f"is within {error:g}"
    raise ExportError.listing(
        f"no rank that vLLM takes {wanted} (exact is {max(part.needed for part in parts)}): name a rank, or the "
        "largest error to put up with; the worst layer's is",
        [f"rank {choice}: {cost:.1e}" for choice, cost in choices.items()],
    )


def _factors(part: _Parts, rank: int, dtype: np.dtype) -> LowRank:
    """The update's largest terms, and zeros behind those that it has."""
    used = min(rank, part.needed)
    root = np.sqrt(part.values[:used])
    left = np.zeros((part.left.shape[0], rank), dtype)
    right = np.zeros((rank, part.right.shape[1]), dtype)
    with np.errstate(over="ignore"):  # reported below
        left[:, :used], right[:used] = part.left[:, :used] * root, root[:, None] * part.right[:used]
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise NonFiniteError(f"the adapter's factors are not finite as {dtype}: choose a wider dtype")
    return LowRank(left, right)


def _distance(adapter: LowRank, update: Update) -> float:
    exact = np.asarray(update.dense(), np.float64)
    size = np.linalg.norm(exact)
    stored = np.asarray(adapter.left, np.float64) @ np.asarray(adapter.right, np.float64)
    return float(np.linalg.norm(stored - exact) / size) if size else 0.0


def _words(error: float) -> str:
    return "exact" if error <= EXACT else f"{error:.1e}"
