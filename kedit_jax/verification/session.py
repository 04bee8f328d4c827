"""A stored session against its claim: what its kernels were changed by is the one-time edit of the constraints it holds."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from kedit_jax import solve
from kedit_jax.editing import history
from kedit_jax.editing.history import LayerHistory, Site
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import SessionError
from kedit_jax.verification.checks import TOLERANCES, Check

Progress = Callable[[int, int], None]
Update = Float[np.ndarray, "k v"]


def verify_session(session: EditSession, progress: Progress | None = None) -> list[Check]:
    """Whether each edited kernel's stored update is the one-time edit of the layer's stored constraints, in float64.

    That is what a session promises whose history is `aligned` or `latest`. An aligned one with compensated post-processing
    promises that its update is what its steps, taken again, lead to, and is checked for that. The baselines (`unaligned`,
    `latest-simplified`, post-processing otherwise) promise nothing, and do not hold; see `is_exact`.

    The negative control of a layer is the same comparison without the last batch, or without half of the facts where there
    is only one; it is None where all facts were compacted.

    Args:
        session: as `checkpoint.load_session` gives it.
        progress: called with (done, total) layers.

    Raises:
        SessionError: the session holds no facts.
    """
    if not session.facts:
        raise SessionError("the session holds no facts, so there is nothing to verify; write some first")
    checks = []
    for done, (layer, held) in enumerate(session.layers.items(), 1):
        with solve.float64():
            checks.append(_layer_check(session, layer, held))
        if progress is not None:
            progress(done, len(session.layers))
    return checks


def is_exact(session: EditSession) -> bool:
    """Whether the way that the session was run promises anything that can be checked on what it stores."""
    mode, post, compensate = session.settings.procedure()
    return mode == "aligned" and compensate if post is not None else mode in ("aligned", "latest")


def _layer_check(session: EditSession, layer: int, held: LayerHistory) -> Check:
    site, sizes = session.site(layer), session.batches
    if site.procedure.post is not None and is_exact(session):
        name, reference = (
            "stored update = its steps again",
            history.replayed(site, held.constraints, sizes, held.base).update,
        )
    else:
        name, reference = "stored update = one-time edit", history.one_time(held, site)
    size = float(np.linalg.norm(reference))
    error = float(np.linalg.norm(held.update - reference)) / size if size else float(np.abs(held.update).max())
    without = _shortened(held, site, sizes)
    control = None if without is None else float(np.linalg.norm(held.update - without)) / size
    tolerance = TOLERANCES["session"].of("float64", 0.0)
    return Check(f"layer {layer}", name, "float64", error, tolerance, control)


def _shortened(held: LayerHistory, site: Site, sizes: tuple[int, ...]) -> Update | None:
    """The one-time edit of the layer without its last batch."""
    rows = held.constraints.size
    if not rows:
        return None
    kept = rows - sizes[-1] if len(sizes) > 1 else rows // 2
    shorter = dataclasses.replace(held, constraints=solve.take(held.constraints, np.arange(kept)))
    if not kept and held.base is None:
        return np.zeros_like(held.update)
    return history.one_time(shorter, site)
