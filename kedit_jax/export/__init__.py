"""Edited models in the forms that others load: a merged checkpoint, a LoRA adapter, the delta alone."""

from kedit_jax.export.adapter import VLLM_RANKS, AdapterPlan, export_adapter, plan_adapter
from kedit_jax.export.delta_file import load_delta, save_delta
from kedit_jax.export.efficacy import Efficacy, efficacy_of
from kedit_jax.export.merged import Merged, export_merged
from kedit_jax.export.model_delta import ModelDelta, delta_of
from kedit_jax.export.target import FORMS, check_target

__all__ = [
    "FORMS",
    "VLLM_RANKS",
    "AdapterPlan",
    "Efficacy",
    "Merged",
    "ModelDelta",
    "check_target",
    "delta_of",
    "efficacy_of",
    "export_adapter",
    "export_merged",
    "load_delta",
    "plan_adapter",
    "save_delta",
]
