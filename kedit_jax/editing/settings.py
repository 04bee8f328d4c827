"""How to edit: one frozen record, the editors it can name, and the values published for known checkpoints."""

import dataclasses
import math
import numbers
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, cast, get_args

import numpy as np
from jaxtyping import Float

from kedit_jax import solve
from kedit_jax.editing.values import ValueSettings
from kedit_jax.errors import KeditError, shown
from kedit_jax.solve.postprocess import Post, parse_post
from kedit_jax.solve.sequences import MODES, Mode

POLICIES = ("keep", "latest", "first", "merge", "reject")
"""What may be done about facts that contradict each other; `kedit_jax.editing.conflicts` says how."""

COMPUTE_DTYPES = (None, "bfloat16", "float16", "float32", "float64")

MOST: Mapping[str, int] = {
    "prefixes": 10_000,
    "prefix_tokens": 10_000,
    "micro_batch": 2**31 - 1,
    "null_rank": 2**31 - 1,
    "seed": 2**63 - 1,
    "values.steps": 1_000_000,
}
"""Beyond these a file of settings is broken, or meant to keep a machine busy."""
LARGEST = int(sys.float_info.max)  # of whole numbers that stand for floats

UNCOMPENSATED = ("unaligned", "latest-simplified")
"""Histories without a solution of their own that a step's post-processing error could be measured against."""


@dataclass(frozen=True)
class EditSettings:
    """Everything that decides what an edit does, beside the model, the requests and the moments.

    Attributes:
        layers: the blocks whose down projections are edited; target values are those of the last.
        editor: a name in `kedit_jax.solve.EDITORS`; `USES` says which of the numbers below it reads.
        moment_weight: lambda, the weight of C0 (a mean second moment) in the prior's precision.
        ridge: rho, the weight of the identity beside it.
        null_threshold, null_relative, null_rank: AlphaEdit's null space is that of C0's eigenvalues below the threshold,
            below this share of the largest, or of this many smallest ones; one of the three, a threshold of 0.02 by default.
        l2: AlphaEdit's ridge within the null space.
        noise: 1 / weight of each edit; 0 makes edits equality constraints (EMMET, ROME). The editor's own by default.
        history: how a sequence is run, a name in `kedit_jax.solve.sequences.MODES`. "aligned" accounts for all earlier
            edits, so that the sequence equals the one-time edit; the others are baselines.
        post: what is done to each step: a name in `kedit_jax.solve.postprocess.POSTS`, with its parameter behind a colon
            where it has one, as "prune" or "rect:0.4".
        compensate: make up for the post-processing of a step in the next one (Algorithm 1); needs an aligned history.
        conflicts: what to do about facts that contradict each other, one of `POLICIES`; by default "latest" where the
            history is aligned and "keep" where it is not.
        similarity: also take facts for contradicting whose keys in the first edited layer have at least this cosine.
        values: how target values are optimised.
        prefixes, prefix_tokens: how many context prefixes the model writes, and how long.
        seed: of the prefixes, the only random choice.
        memory: GiB that the optimisation of target values may take beside the model; the requests are split accordingly,
            which changes no result but by round-off. A CPU takes 20 requests at once as fast as 100; accelerators want more.
        micro_batch: at most so many requests at once, whatever the memory.
        compute_dtype: what the blocks above the edited layers multiply in while values are optimised, as "bfloat16" on
            accelerators (with sums, norms and losses in float32); the model's own by default.
    """

    layers: tuple[int, ...]
    editor: str = "memit"
    moment_weight: float = 15000.0
    ridge: float = 0.0
    null_threshold: float | None = None
    null_relative: float | None = None
    null_rank: int | None = None
    l2: float = 10.0
    noise: float | None = None
    history: str = "aligned"
    post: str | None = None
    compensate: bool = True
    conflicts: str | None = None
    similarity: float | None = None
    values: ValueSettings = field(default_factory=ValueSettings)
    prefixes: int = 5
    prefix_tokens: int = 10
    seed: int = 0
    memory: float = 0.5
    micro_batch: int | None = None
    compute_dtype: str | None = None

    def __post_init__(self) -> None:
        problems = [*self._unknown_names(), *self._unusable_numbers()]
        if problems:
            raise KeditError.listing("unusable settings:", problems)

    @property
    def policy(self) -> str:
        """What is done about conflicts."""
        return self.conflicts or ("latest" if self.history == "aligned" else "keep")

    def build(self, moment: Float[np.ndarray, "k k"], priors: str | Path | None = None) -> solve.Editor:
        """The editor for a layer whose keys have this second moment, with the noise of its constraints.

        `priors` is a folder in which the factored moment is looked for, and kept (see `kedit_jax.solve.cache`).
        """
        numbers = {name: getattr(self, own) for name, own in USES[self.editor].items()}
        if priors is None:
            editor = solve.EDITORS[self.editor](moment, **numbers)
        else:
            editor = solve.cached_editor(priors, self.editor, moment, **numbers)
        return editor if self.noise is None else dataclasses.replace(editor, noise=self.noise)

    def procedure(self) -> "Procedure":
        """How a sequence of edits is run."""
        post = None if self.post is None else parse_post(self.post)
        return Procedure(cast(Mode, self.history), post, self.compensate and post is not None)

    def _unknown_names(self) -> list[str]:
        named = (("editor", self.editor, solve.EDITORS), ("history", self.history, MODES))
        problems = [
            f"{what} {name!r} is unknown; there are {', '.join(known)}" for what, name, known in named if name not in known
        ]
        if self.compute_dtype not in COMPUTE_DTYPES:
            there = ", ".join(name for name in COMPUTE_DTYPES if name)
            problems.append(f"compute_dtype {self.compute_dtype!r} is none; there are {there}, or None for the model's own")
        if self.conflicts is not None and self.conflicts not in POLICIES:
            problems.append(f"conflicts {self.conflicts!r} is no policy; there are {', '.join(POLICIES)}")
        elif self.conflicts in ("latest", "merge") and self.history != "aligned":
            problems.append(
                f"conflicts {self.conflicts!r} needs history 'aligned', not {self.history!r}; use keep, first or reject"
            )
        try:
            post = None if self.post is None else parse_post(self.post)
        except KeditError as error:
            problems.append(str(error))
        else:
            if post is not None and self.compensate and self.history in UNCOMPENSATED:
                problems.append(f"history {self.history!r} has no solution to compensate towards; set compensate=False")
        return problems

    def _unusable_numbers(self) -> list[str]:
        problems = []
        if not self.layers or any(type(layer) is not int for layer in self.layers):
            problems.append(f"layers {shown(list(self.layers))} must be whole numbers, at least one")
        chosen = [name for name in ("null_threshold", "null_relative", "null_rank") if getattr(self, name) is not None]
        if len(chosen) > 1:
            problems.append(f"{' and '.join(chosen)} are given; a null space takes one of them")
        if self.micro_batch is not None:
            chosen.append("micro_batch")
        positive = {name: getattr(self, name) for name in ("memory", "prefix_tokens", "l2", *chosen)}
        positive |= {f"values.{name}": getattr(self.values, name) for name in ("steps", "learning_rate", "clamp")}
        problems += [f"{name} is {value}; it must be positive" for name, value in positive.items() if not value > 0]
        least_zero = {name: getattr(self, name) for name in ("ridge", "moment_weight", "prefixes")}
        least_zero |= {"noise": 0.0 if self.noise is None else self.noise}
        least_zero |= {f"values.{name}": getattr(self.values, name) for name in ("kl_factor", "decay")}
        problems += [f"{name} is {value}; it must not be negative" for name, value in least_zero.items() if not value >= 0]
        values = {f"values.{item.name}": getattr(self.values, item.name) for item in dataclasses.fields(ValueSettings)}
        every = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)} | values
        problems += [f"{name} is {shown(every[name])}; it must be at most {most}" for name, most in MOST.items()
                     if every[name] is not None and every[name] > most]  # fmt: skip
        if self.seed < -MOST["seed"]:
            problems.append(f"seed is {shown(self.seed)}; it must be at least {-MOST['seed']}")
        problems += [f"{name} is {value}; it must be finite" for name, value in every.items() if value == math.inf]
        if self.similarity is not None and not 0 < self.similarity <= 1:
            problems.append(f"similarity is {self.similarity}; a cosine threshold lies in (0, 1], as 0.9")
        return problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "EditSettings":
        """Settings from plain values; an unknown name is an error rather than ignored."""
        if not isinstance(stored, Mapping) or not isinstance(stored.get("values", {}), Mapping):
            raise KeditError(
                f"settings must be an object of names and values (and `values` within it), not {shown(stored):.60}"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        known |= {f"values.{f.name}" for f in dataclasses.fields(ValueSettings)}
        unknown = sorted({*map(str, stored), *(f"values.{name}" for name in stored.get("values", ()))} - known)
        if unknown:
            raise KeditError(f"unknown settings {', '.join(unknown):.300}; there are {', '.join(sorted(known))}")
        if "layers" not in stored:
            raise KeditError("settings without layers; name the blocks to edit")
        layers, problems = stored["layers"], []
        if not isinstance(layers, list | tuple) or any(type(layer) is not int for layer in layers):
            problems.append(f"layers is {shown(layers)}, which has the wrong type; it must be a list of whole numbers")
        problems += [*_wrong_types(cls, stored), *_wrong_types(ValueSettings, stored.get("values", {}), "values.")]
        if problems:
            raise KeditError.listing("unusable settings:", problems)
        changes = _with_floats(cls, stored)
        if "values" in changes:
            changes["values"] = ValueSettings(**_with_floats(ValueSettings, changes["values"]))
        return cls(**{**changes, "layers": tuple(stored["layers"])})


def _kinds(declared: Any) -> tuple[Any, ...]:
    """The types that a field is declared with."""
    return get_args(declared) if isinstance(declared, UnionType) else (declared,)


def _with_floats(declaring: type[Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with whole numbers made floats where those are declared."""
    floats = {item.name for item in dataclasses.fields(declaring) if float in _kinds(item.type)}
    return {name: float(value) if name in floats and value is not None else value for name, value in stored.items()}


def _wrong_types(declaring: type[Any], stored: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Values of another type than their field is declared with; a whole number is fine where a float is meant."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    accepted = {int: numbers.Integral, float: numbers.Real, bool: bool, str: str}
    problems = []
    for item in dataclasses.fields(declaring):
        if item.name not in stored:
            continue
        value, declared = stored[item.name], item.type
        options = _kinds(declared)
        kinds = [kind for kind in options if kind in names]
        if not kinds or (value is None and type(None) in options):
            continue
        if not isinstance(value, accepted[kinds[0]]) or (isinstance(value, bool) and kinds[0] is not bool):
            problems.append(f"{prefix}{item.name} is {shown(value)}; it must be {names[kinds[0]]}")
        elif kinds[0] is float and isinstance(value, numbers.Integral) and abs(int(value)) > LARGEST:
            problems.append(f"{prefix}{item.name} is {shown(value)}, which no float holds")
    return problems


class Procedure(NamedTuple):
    """How a sequence of edits is run; what `kedit_jax.solve.advance` takes by these names."""

    mode: Mode
    post: Post | None
    compensate: bool


USES: Mapping[str, Mapping[str, str]] = {
    "memit": {"weight": "moment_weight", "ridge": "ridge"},
    "alphaedit": {"threshold": "null_threshold", "relative": "null_relative", "rank": "null_rank", "l2": "l2"},
    "emmet": {"weight": "moment_weight", "ridge": "ridge"},
    "rome": {"ridge": "ridge"},
    "ridge": {"rho": "ridge"},
}
"""Editor -> its own name of a number -> the setting that holds it. Other settings of a prior mean nothing to it."""
