"""Proof on the spot: the solver's invariants on generated problems, and a stored session against its constraints.

    for check in verify_solver():
        print(check.id, check.error, check.tolerance, check.control, check.holds)

Every check carries its negative control, the same comparison with the thing that it protects taken away: a check whose
control does not fail proves nothing, and does not hold. The tolerances are one table, `TOLERANCES`. How a session came to
be what it is, step by step, is `course`.
"""

from kedit_jax.verification.checks import CONTROL, TOLERANCES, Check, Tolerance, finite
from kedit_jax.verification.course import BatchScores, Norms, batch_scores, can_be_replayed, norms_over_steps
from kedit_jax.verification.session import is_exact, verify_session
from kedit_jax.verification.solver import verify_solver

__all__ = [
    "CONTROL",
    "TOLERANCES",
    "BatchScores",
    "Check",
    "Norms",
    "Tolerance",
    "batch_scores",
    "can_be_replayed",
    "finite",
    "is_exact",
    "norms_over_steps",
    "verify_session",
    "verify_solver",
]
