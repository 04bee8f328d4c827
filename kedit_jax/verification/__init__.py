"""Proof on the spot: the solver's invariants on generated problems, and a stored session against its constraints.

    for check in verify_solver():
        print(check.id, check.error, check.tolerance, check.control, check.holds)

Every check carries its negative control, the same comparison with the thing that it protects taken away: a check whose
control does not fail proves nothing, and does not hold. The tolerances are one table, `TOLERANCES`.
"""

from kedit_jax.verification.checks import CONTROL, TOLERANCES, Check, Tolerance, finite
from kedit_jax.verification.session import is_exact, verify_session
from kedit_jax.verification.solver import verify_solver

__all__ = ["CONTROL", "TOLERANCES", "Check", "Tolerance", "finite", "is_exact", "verify_session", "verify_solver"]
