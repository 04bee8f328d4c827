"""Arrays on the host that grow by rows: appending copies the new rows, not those before.

A history of m rows that were concatenated anew at each step would be copied m times: at 2,000 keys of width 3072 that was
a fifth of a step.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

GROWTH = 1.5
"""Room of a new buffer over the rows that it is made for. The system gives no memory to rows that were never written."""

LEAST = 64
"""Rows that a buffer has room for at least."""


@jax.tree_util.register_pytree_node_class
class Rows:
    """An immutable array [m, ...]; several share a buffer, each the beginning of the next. A pytree of one leaf, `array`.

    Only the newest of a buffer's arrays is extended in place, behind its last row. Any other, as that of a session that two
    go on from, is copied first, so that no array ever changes.
    """

    __slots__ = ("_buffer", "array")

    array: Shaped[np.ndarray, "m *rest"]
    """The rows, read-only."""

    def __init__(self, array: Shaped[np.ndarray, "m *rest"]) -> None:
        self._attach(_Buffer(array, len(array)), len(array))

    def __len__(self) -> int:
        return len(self.array)

    def appended(self, new: Shaped[np.ndarray, "u *rest"]) -> "Rows":
        """These rows with the new ones behind them, in the wider of the two dtypes."""
        count, end = len(self), len(self) + len(new)
        dtype, buffer = np.promote_types(self.array.dtype, new.dtype), self._buffer
        if buffer.memory.dtype != dtype or end > len(buffer.memory) or not buffer.claim(count, end):
            memory = np.empty((max(LEAST, int(GROWTH * end)), *self.array.shape[1:]), dtype)
            memory[:count] = self.array
            buffer = _Buffer(memory, end)
        buffer.memory[count:end] = new
        rows: Rows = object.__new__(Rows)
        rows._attach(buffer, end)
        return rows

    def _attach(self, buffer: "_Buffer", count: int) -> None:
        self._buffer, self.array = buffer, buffer.memory[:count]
        self.array.flags.writeable = False

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any]) -> "Rows":
        rows = object.__new__(cls)
        rows.array = children[0]  # JAX rebuilds trees with placeholders as leaves
        rows._buffer = _Buffer(rows.array, 0)
        return rows


class _Buffer:
    """Memory, and the number of its rows that belong to some array."""

    __slots__ = ("memory", "used")

    def __init__(self, memory: Any, used: int) -> None:
        self.memory, self.used = memory, {used}

    def claim(self, count: int, end: int) -> bool:
        """Take the rows from count to end, if nobody has; of several threads one succeeds."""
        try:
            self.used.remove(count)
        except KeyError:
            return False
        self.used.add(end)
        return True
