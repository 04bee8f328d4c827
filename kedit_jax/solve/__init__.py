"""Solves edit problems: arrays only, knows no model.

One objective (see `prior`), a stack of constraints, and two ways to add to it that give the same sum:

    prior = solve.memit(moment, 15000.0, ridge=1.0)                  # factored once, in float64, on the host
    stack = solve.constraints(kernel, keys, values)                  # residuals against the original kernel
    update = solve.one_time(prior, stack).update                     # all at once ...

    state = solve.start(prior, kernel.shape[1])
    state, step = solve.sequential(state, prior, block)              # ... or block by block: step.left @ step.right

    editor = solve.EDITORS["emmet"](moment, noise=0.5)               # a published editor: a prior and a noise
    held = solve.add(held, solve.statistics(prior, block))           # constant memory; `solve_statistics` gives the edit

    sequence = host.begin(prior, kernel.shape[1])                    # the same steps in float64 on a CPU, without compiling
    sequence, step = host.advance(sequence, prior, block)            # or copying: what an editing session runs there

    editor = solve.cached_editor("priors", "memit", moment)          # factored once, then read from disk

What does the work is the dtype of the prior, float64 as constructed, whether or not the process has enabled float64;
`dtype=` rounds a result once, at its end. Results in float64 are for `numpy.asarray` or for code inside `solve.float64()`:
elsewhere `jax.numpy` turns them into float32 without a word. Under `jax.jit`, `jax.vmap` or `jax.grad`, enter
`solve.float64()` around the transformed call.

Largest relative errors over the families of the tests (power-law, rank-deficient and heavy-tailed moments, near-duplicate
keys with conflicting targets; 160 constraints, rank 96), in both forms:

| prior | result | steps against one-time | against a refined primal solve |
| --- | --- | --- | --- |
| float64 | float64 | 1.9e-13 | 0.07 max(1e-10, eps cond(A0)) |
| float64 | float32 (what "float32" means: a float32 model, factors in float64) | 3.8e-7 | 1.4e-7 |
| float32 (`cast(prior, "float32")`; no float64 anywhere) | float32 | 1.1e-4 | 1.1e-4 |

The last is for machines without float64: rounding the prior's factor alone moves the solution by eps32 times the square
root of its condition number, so it does not hold the 1e-5 that float32 results promise otherwise.
"""

from kedit_jax.solve.arrays import float64
from kedit_jax.solve.cache import cached_editor
from kedit_jax.solve.constraints import Constraints, concatenate, constraints, masked, padded, take
from kedit_jax.solve.dual import DualState
from kedit_jax.solve.editors import EDITORS, Editor
from kedit_jax.solve.host import HostSequence, HostState
from kedit_jax.solve.interface import (
    CROSSOVER,
    Form,
    Solution,
    State,
    Step,
    choose_form,
    grow,
    make_room,
    one_time,
    refit,
    retract,
    revalue,
    sequential,
    solve_active,
    start,
    step,
    to_primal,
    total,
)
from kedit_jax.solve.postprocess import POSTS, Post, parse_post
from kedit_jax.solve.primal import PrimalState
from kedit_jax.solve.prior import (
    Prior,
    alphaedit,
    cast,
    combine,
    from_precision,
    memit,
    null_space,
    precision,
    prior_fingerprint,
    restricted,
    ridge,
    unwhiten,
    whiten,
)
from kedit_jax.solve.proximal import L1, Box, GroupLasso, Nuclear, Regularizer, SquaredNorm
from kedit_jax.solve.regularized import (
    Convergence,
    RegularizedSolution,
    RegularizedState,
    check_convergence,
    regularized,
    regularized_step,
    start_regularized,
)
from kedit_jax.solve.sequences import MODES, Advance, Mode, Run, Sequence, StepReport, advance, begin, check_advance, run
from kedit_jax.solve.sequences import make_room as make_sequence_room
from kedit_jax.solve.statistics import Statistics, add, from_statistics, nothing, solve_statistics, statistics
from kedit_jax.solve.status import Status, check

__all__ = [
    "CROSSOVER",
    "EDITORS",
    "L1",
    "MODES",
    "POSTS",
    "Advance",
    "Box",
    "Constraints",
    "Convergence",
    "DualState",
    "Editor",
    "Form",
    "GroupLasso",
    "HostSequence",
    "HostState",
    "Mode",
    "Nuclear",
    "Post",
    "PrimalState",
    "Prior",
    "RegularizedSolution",
    "RegularizedState",
    "Regularizer",
    "Run",
    "Sequence",
    "Solution",
    "SquaredNorm",
    "State",
    "Statistics",
    "Status",
    "Step",
    "StepReport",
    "add",
    "advance",
    "alphaedit",
    "begin",
    "cached_editor",
    "cast",
    "check",
    "check_advance",
    "check_convergence",
    "choose_form",
    "combine",
    "concatenate",
    "constraints",
    "float64",
    "from_precision",
    "from_statistics",
    "grow",
    "make_room",
    "make_sequence_room",
    "masked",
    "memit",
    "nothing",
    "null_space",
    "one_time",
    "padded",
    "parse_post",
    "precision",
    "prior_fingerprint",
    "refit",
    "regularized",
    "regularized_step",
    "restricted",
    "retract",
    "revalue",
    "ridge",
    "run",
    "sequential",
    "solve_active",
    "solve_statistics",
    "start",
    "start_regularized",
    "statistics",
    "step",
    "take",
    "to_primal",
    "total",
    "unwhiten",
    "whiten",
]
