"""Invented people and places, batches of requests about them, and how to make tokenizers and models of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.tokens import Encoded
from kedit_jax.models import Decoder, ModelConfig, named_parameters, with_parameters

PEOPLE = ("Alice Smith", "Bob Jones", "Carol White", "Dan Brown")
PLACES = ("Paris", "Rome", "Oslo", "Lima")
TEXTS = [
    f"{person} was born in {place} and plays the violin. In {place}, people speak old French. "
    f"The house of {person} stands in {place}. Old {place} is far from new {place}; {person} likes both."
    for person in PEOPLE
    for place in PLACES
]
BATCHES = [
    [
        EditRequest("{} was born in", "Alice Smith", "old Lima and Oslo"),
        EditRequest("In {}, people speak", "Paris", "violin"),
        EditRequest("The house of {} stands in", "Bob Jones", "new Rome is old"),
    ],
    [
        EditRequest("{} was born in", "Alice Smith", "far Rome, Paris"),
        EditRequest("In {}, people speak", "Paris", "French old"),
        EditRequest("The house of {} stands in", "Bob Jones", "Oslo and new Lima"),
    ],
    [
        EditRequest("{} was born in", "Carol White", "old Rome and Paris"),
        EditRequest("In {}, people speak", "Lima", "both"),
        EditRequest("The house of {} stands in", "Dan Brown", "Paris and old Lima"),
    ],
    [
        EditRequest("{} was born in", "Alice Smith", "both Paris and Lima"),
        EditRequest("In {}, people speak", "Paris", "new French"),
        EditRequest("The house of {} stands in", "Bob Jones", "far Paris is Rome"),
    ],
]


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """GPT-2's scheme: bytes, merged by BPE; any text can be encoded."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    return made


def many_requests(count: int, vocabulary: int = 5000) -> list[list[Encoded]]:
    """Prompts of 4 to 15 tokens, most of them with targets of one token, and five prefixes that all share; random tokens."""
    rng = np.random.default_rng(0)
    prefixes = [(), *(tuple(rng.integers(0, vocabulary, 10).tolist()) for _ in range(5))]

    def some(*lengths: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocabulary, rng.choice(lengths)).tolist())

    made = []
    for _ in range(count):
        subject, before, after, target = some(1, 2, 3, 4, 5), some(0, 1, 2, 4), some(3, 4, 5, 6), some(*[1] * 9, 2)
        prompt = before + subject + after
        rows = [
            Encoded(prefix + prompt + target, len(prefix + prompt), len(prefix + before + subject) - 1)
            for prefix in prefixes
        ]
        made.append([*rows, Encoded(subject, len(subject), len(subject) - 1)])
    return made


def random_model(config: ModelConfig, seed: int, *, scale: float, dtype: Any = np.float32) -> Decoder:
    """A model with random weights, biases and norms, made in NumPy: initialising one in JAX compiles for seconds.

    Matrices have a standard deviation of `scale`; 0.02, as before training, would not tell prompts apart.
    """
    rng = np.random.default_rng(seed)

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("scale"):
            return 1 + 0.1 * rng.normal(size=shape)
        small = 1 / np.sqrt(2 * config.n_layers) if "attn.o" in name or "mlp.down" in name else 1.0
        return (0.02 if name.endswith("bias") else scale * small) * rng.normal(size=shape)

    abstract = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    parameters = named_parameters(abstract)
    return with_parameters(
        abstract, {name: jnp.asarray(values(name, leaf.shape), dtype) for name, leaf in parameters.items()}
    )
