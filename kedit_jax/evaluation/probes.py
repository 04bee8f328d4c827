"""Probes for `kedit_jax.editing.guard` that run the model: its text, and what it was taught first."""

from collections.abc import Sequence

from kedit_jax.editing.guard import Probe
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import KeditError
from kedit_jax.evaluation.perplexity import perplexity, prepare_texts
from kedit_jax.evaluation.scoring import prepare_pairs, score_pairs


def text_probe(session: EditSession, texts: Sequence[str], at_most: float) -> Probe:
    """That the perplexity of texts is at most so many times what it is before any edit.

    Raises:
        KeditError: a limit below 1, which the unedited model would not keep, or texts that cannot be scored.
    """
    if not at_most >= 1:
        raise KeditError(f"the perplexity must be allowed to be at least 1 time that of the unedited model, not {at_most}")
    config = session.base.config
    window = min(config.max_positions, config.position_limit or config.max_positions, 512)
    prepared = prepare_texts(texts, session.tokenizer, max_length=window)
    unedited = perplexity(session.base, prepared)
    return Probe(
        "perplexity over that of the unedited model", lambda s: perplexity(s.model, prepared) / unedited, at_most=at_most
    )


def retention_probe(at_least: float, first: int = 100) -> Probe:
    """That of the first facts that a session holds, at least this share is still what the model says (all target tokens).

    Raises:
        KeditError: a share outside 0 to 1.
    """
    if not 0 <= at_least <= 1:
        raise KeditError(f"the share of early facts that must be retained is {at_least}; give a number from 0 to 1")

    def measure(session: EditSession) -> float:
        pairs = [(fact.text, fact.target) for fact in session.facts[:first]]
        if not pairs:
            return 1.0
        return float(score_pairs(session.model, prepare_pairs(pairs, session.tokenizer)).correct.mean())

    return Probe(f"share of the first {first} facts that the model says", measure, at_least=at_least)
