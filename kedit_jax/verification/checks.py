"""What a check is, and the one table of tolerances."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

CONTROL = 1e-2
"""What every negative control must exceed: errors of real mistakes were 0.06 to 3.3."""


@dataclass(frozen=True)
class Check:
    """One invariant in one dtype: its worst error, and proof that the comparison would notice.

    Attributes:
        id: the invariant's number as in `TOLERANCES`, or the layer of a session.
        name: what is claimed.
        dtype: of the model. float32 means that keys, targets and kernel are float32 and each update is rounded to float32;
            the solver's factors stay float64.
        error: relative Frobenius distance, the worst over all problems; infinite where a solve failed.
        tolerance: what the error may be; for the problem of that error where it depends on the problem.
        control: the negative control, the same comparison with the thing it protects taken away, the weakest over all
            problems; None where there is none.
    """

    id: str
    name: str
    dtype: str
    error: float
    tolerance: float
    control: float | None

    @property
    def holds(self) -> bool:
        """The error is within the tolerance, and the comparison sees the mistake that it is there for."""
        return self.error <= self.tolerance and (self.control is None or self.control > CONTROL)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity and no NaN: they become None, and the check does not hold."""
        return {
            "id": self.id,
            "name": self.name,
            "dtype": self.dtype,
            "error": finite(self.error),
            "tolerance": finite(self.tolerance),
            "control": finite(self.control),
            "holds": self.holds,
        }


def finite(value: float | None) -> float | None:
    """The number as JSON can hold it: None unless finite."""
    return float(value) if value is not None and math.isfinite(value) else None


class Measured(NamedTuple):
    """What an invariant found on one problem."""

    error: float
    control: float | None = None


def worst(found: Iterable[Measured]) -> Measured:
    """The largest error and the weakest control. NaN is worse than any number, and no result at all is no proof."""
    errors, controls = zip(*found, strict=True)
    seen = [control for control in controls if control is not None]
    return Measured(_largest(errors), -_largest([-control for control in seen]) if seen else None)


def _largest(values: Iterable[float]) -> float:
    return max(math.inf if math.isnan(value) else value for value in values)


Tau = Literal["tau"]
"""max(1e-10, eps64 cond(A0)): all that float64 can promise against another algorithm."""


class Tolerance(NamedTuple):
    """By dtype of the model; None where the invariant is about float64 alone."""

    float64: float | Tau
    float32: float | None

    def concerns(self, dtype: str) -> bool:
        """Whether the invariant is claimed in this dtype."""
        return dtype == "float64" or self.float32 is not None

    def of(self, dtype: str, tau: float) -> float:
        """The tolerance in this dtype for a problem with this tau; NaN, which nothing meets, where none is claimed."""
        chosen = self.float64 if dtype == "float64" else self.float32
        if chosen is None:
            return math.nan
        return tau if chosen == "tau" else chosen


TOLERANCES: Mapping[str, Tolerance] = {
    "1": Tolerance(1e-10, 1e-5),
    "2": Tolerance("tau", 1e-5),
    "3": Tolerance(1e-11, None),
    "4": Tolerance("tau", 2e-5),
    "5": Tolerance(1e-11, 1e-5),
    "6": Tolerance(1e-11, 1e-5),
    "7": Tolerance(0.0, 0.0),
    "8": Tolerance(1e-11, 1e-5),
    "9": Tolerance("tau", 1e-5),
    "10": Tolerance(1e-10, 1e-5),
    "11": Tolerance(1e-10, 5e-5),
    "12": Tolerance(1e-10, None),
    "13a": Tolerance(1e-10, 1e-5),
    "13b": Tolerance(1e-12, 1e-5),
    "14": Tolerance(1e-6, None),
    # The rows of 15 are there for their controls; their errors are those of the run that leaves nothing out: 1, 14 and 12.
    "15a": Tolerance(1e-10, 1e-5),
    "15b": Tolerance(1e-6, None),
    "15c": Tolerance(1e-10, None),
    "15d": Tolerance(1e-10, None),
    "session": Tolerance(1e-10, None),
}
"""Every tolerance of the verification, by the number of the invariant. A stored session's is that of 1."""
