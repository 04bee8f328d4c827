"""A corpus as a stream: documents are tokenised in chunks, cut into rows and gathered into blocks; no more is held.

Where a block ends depends on the rows before and just behind it alone, never on the size of the sample: what was done for
a smaller sample of the same corpus is what a larger one begins with.
"""

import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from kedit_jax.errors import KeditError

Row = Int[np.ndarray, "_"]
DOCUMENTS = 32  # given to the tokenizer at once
IN_MEMORY = 1 << 26  # bytes of held blocks, beyond which they go to a temporary file


class Block(NamedTuple):
    """Rows that are worked on together. The sample's last block may be cut short by its end, and is never complete."""

    rows: list[Row]
    last: bool

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def content(self) -> bytes:
        """Tells these rows from any others, the same tokens in other rows included."""
        return b"".join(len(row).to_bytes(4, "little") + row.tobytes() for row in self.rows)


def read_blocks(tokenizer: Any, texts: Iterable[str], *, width: int, size: int, most: int | None) -> Iterator[Block]:
    """The first `most` tokens of a corpus, in its order: rows of at most `width` tokens in blocks of at most `size`.

    Raises:
        KeditError: there is no text at all, or `texts` is one string.
    """
    rows: list[Row] = []
    held = 0
    for row in _rows(tokenizer, texts, width, most):
        if rows and held + len(row) > size:
            yield Block(rows, last=False)
            rows, held = [], 0
        rows.append(row)
        held += len(row)
    if not rows:
        raise KeditError("the corpus holds no text; give documents such as the model was trained on")
    yield Block(rows, last=True)


def _rows(tokenizer: Any, texts: Iterable[str], width: int, most: int | None) -> Iterator[Row]:
    if isinstance(texts, str):
        raise KeditError(f"the corpus is one string, {texts[:40]!r} ...; give documents, as [text] where there is one")
    left = most
    for ids in _tokenised(tokenizer, texts):
        for begin in range(0, len(ids), width):
            row = ids[begin : begin + width][:left]
            yield np.asarray(row, np.int32)
            if left is not None:
                left -= len(row)
                if left == 0:
                    return


def _tokenised(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    documents = (text for text in texts if text.strip())
    while chunk := list(islice(documents, DOCUMENTS)):
        yield from tokenizer(chunk)["input_ids"]


class HeldBlocks:
    """Blocks that may be needed once more, in memory up to a size and then in a temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115, closed when it is forgotten
        self._last: list[bool] = []

    def append(self, block: Block) -> None:
        np.save(self._file, np.concatenate(block.rows))
        np.save(self._file, np.asarray([len(row) for row in block.rows]))
        self._last.append(block.last)

    def clear(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._last.clear()

    def __iter__(self) -> Iterator[Block]:
        self._file.seek(0)
        for last in self._last:
            tokens, lengths = np.load(self._file), np.load(self._file)
            yield Block(np.split(tokens, np.cumsum(lengths)[:-1]), last)
