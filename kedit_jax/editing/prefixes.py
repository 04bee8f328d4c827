"""Context prefixes: short texts that the model itself writes, so that an edit holds behind other text, too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kedit_jax.editing.requests import SLOT
from kedit_jax.editing.tokens import Passage, encode
from kedit_jax.errors import KeditError
from kedit_jax.hosts import to_host
from kedit_jax.models import Decoder, generate

SEED_WORDS = ("The", "Therefore", "Because", "I", "You")  # MEMIT's


def sample_prefixes(
    model: Decoder, tokenizer: Any, *, count: int = 5, length: int = 10, seed: int = 0, top_k: int = 5
) -> tuple[str, ...]:
    """Sample `count` prefixes of `length` tokens, each ending in ". ", from the seed words in turn.

    The same model, tokenizer and seed give the same prefixes. Their text, not their tokens, goes before a prompt.
    """
    if count < 0 or length < 1:
        raise KeditError(f"cannot sample {count} prefixes of {length} tokens; ask for 0 or more, of 1 token or more")
    if count == 0:
        return ()
    starts = [SEED_WORDS[i % len(SEED_WORDS)] for i in range(count)]
    ids = [list(start.tokens) for start in encode(tokenizer, [Passage(SLOT, word) for word in starts])]  # without EOS
    width = max(map(len, ids))
    tokens, valid = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
    for row, start_ids in enumerate(ids):
        tokens[row, width - len(start_ids) :] = start_ids
        valid[row, width - len(start_ids) :] = True
    written = generate(
        model, jnp.asarray(tokens), jnp.asarray(valid), length, key=jax.random.key(seed), temperature=1.0, top_k=top_k
    )
    texts = [
        tokenizer.decode([*start_ids, *map(int, new)], skip_special_tokens=True)
        for start_ids, new in zip(ids, to_host(written), strict=True)
    ]
    return tuple(" ".join(text.split()).rstrip(" .") + ". " for text in texts)
