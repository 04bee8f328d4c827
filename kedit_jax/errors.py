"""What kedit_jax raises on bad input: each message names the offending value and the mend."""

import reprlib
from collections.abc import Sequence
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlist, _SHORT.maxtuple = 3, 300, 300, 20, 20


def shown(value: Any) -> str:
    """`repr` for messages about values that others wrote: short, and of any depth, where `repr` itself would recurse."""
    return _SHORT.repr(value)


class KeditError(ValueError):
    """Bad input; nothing was changed."""

    @classmethod
    def listing(cls, heading: str, problems: Sequence[str]) -> "KeditError":
        """One error for all problems of a file, so that they can be mended in one go."""
        return cls(heading + "".join(f"\n  - {problem}" for problem in problems))


class RequestError(KeditError):
    """An edit request, or a file of them, that cannot be used."""


class CheckpointError(KeditError):
    """A Hugging Face checkpoint that cannot be loaded as it is."""


class SessionError(KeditError):
    """A stored editing session that cannot be read, written, or used with this model."""


class ExportError(KeditError):
    """An export that cannot be made as asked, or cannot be written; nothing of it stays behind."""


class SolverError(KeditError):
    """An edit problem without a well-defined solution."""


class NonFiniteError(KeditError):
    """NaN or infinity where numbers are needed."""
