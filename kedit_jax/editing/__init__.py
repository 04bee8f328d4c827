"""Editing a model: requests, target values, keys, and the session that accounts for all edits made so far."""

from kedit_jax.editing.algebra import compact, difference, merge, undo
from kedit_jax.editing.conflicts import Conflict, Plan
from kedit_jax.editing.drift import Drift, key_drift
from kedit_jax.editing.guard import Probe, edit_guarded, finite, relative_norm
from kedit_jax.editing.moments import Moments, compute_moments, read_moments
from kedit_jax.editing.presets import PRESETS, PUBLISHED, derive_settings, read_settings
from kedit_jax.editing.requests import EditRequest, read_requests, write_requests
from kedit_jax.editing.session import EditSession, Event, equivalence_error, relative_error, start_session
from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.values import Values, ValueSettings

__all__ = [
    "PRESETS",
    "PUBLISHED",
    "Conflict",
    "Drift",
    "EditRequest",
    "EditSession",
    "EditSettings",
    "Event",
    "Moments",
    "Plan",
    "Probe",
    "ValueSettings",
    "Values",
    "compact",
    "compute_moments",
    "derive_settings",
    "difference",
    "edit_guarded",
    "equivalence_error",
    "finite",
    "key_drift",
    "merge",
    "read_moments",
    "read_requests",
    "read_settings",
    "relative_error",
    "relative_norm",
    "start_session",
    "undo",
    "write_requests",
]
