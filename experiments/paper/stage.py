"""What experiments run on: a model, its facts, second moments, held-out text, and how it is edited.

The embedded model needs nothing. The others are those that settings were published for; their weights and data are looked
for where they were named, or in `data/MODEL` beside this file, and what is missing is listed with where it can be had.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.machine import cores, processor
from experiments.paper.config import FOLDER, built, read_yaml
from kedit_jax import assets
from kedit_jax.cli.common import lines
from kedit_jax.editing import PRESETS, EditSession, EditSettings, Moments, compute_moments, start_session
from kedit_jax.editing.prefixes import sample_prefixes
from kedit_jax.editing.presets import check_preset, overridden
from kedit_jax.errors import KeditError
from kedit_jax.evaluation import (
    PreparedPairs,
    PreparedTask,
    PreparedTexts,
    Record,
    References,
    Task,
    embedded_tasks,
    parse_records,
    prepare_pairs,
    prepare_task,
    prepare_texts,
    read_records,
    read_task,
    references_of,
)
from kedit_jax.models import Decoder, load, model_fingerprint

EMBEDDED = "embedded"
CONTROLS = 300
"""Facts of each kind that no edit is about, asked as a measure of general ability."""
QUESTIONS = 150
"""Of each task of general ability, evenly spaced."""

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Choice:
    """How one model is edited, from `configs/models.yaml`.

    Attributes:
        preset: name of published settings; or
        settings: all of them.
        moment_tokens: size of the second moments' sample; the whole corpus by default.
        heldout_texts: how many held-out texts the perplexity is of.
        assets: of a model of an invented world, the folder in the repository that `made_by` writes.
        made_by: the command.
        editors: name of an editor -> what it changes in the settings.
        why: where choices that nobody published come from.
    """

    editors: Mapping[str, dict[str, Any]]
    why: str
    preset: str | None = None
    settings: dict[str, Any] | None = None
    moment_tokens: int | None = None
    heldout_texts: int | None = None
    assets: str | None = None
    made_by: str | None = None

    def base(self) -> EditSettings:
        if self.preset is not None:
            return PRESETS[self.preset].settings
        return overridden(EditSettings((0,)), self.settings or {})


def read_choices(path: Path = FOLDER / "configs" / "models.yaml") -> dict[str, Choice]:
    """Every model by name. Raises KeditError listing all problems of the file."""
    choices, problems = {}, []
    for name, stored in read_yaml(path).items():
        choice, found = built(Choice, stored, f"{name}.")
        problems += found
        if choice is None:
            continue
        if (choice.preset is None) == (choice.settings is None):
            problems.append(f"{name}: give either preset or settings")
        elif choice.preset is not None and choice.preset not in PRESETS:
            problems.append(f"{name}: preset {choice.preset!r} is unknown; there are {', '.join(PRESETS)}")
        else:
            choices[name] = choice
            for editor, changes in choice.editors.items():
                try:
                    overridden(choice.base(), changes)
                except KeditError as error:
                    problems.append(f"{name}.editors.{editor}: {error}")
    if problems:
        raise KeditError.listing(f"{path.name}: unusable:", problems)
    return choices


@dataclass(frozen=True)
class Sources:
    """Where the weights and data of a model lie; None for the usual place."""

    weights: Path | None = None
    records: Path | None = None
    corpus: Path | None = None
    heldout: Path | None = None
    ability: tuple[Path, ...] = ()


@dataclass(frozen=True, eq=False)
class Stage:
    """A model with all that experiments need of it.

    Attributes:
        records: the facts that can be edited.
        heldout: texts for the perplexity; None where there are none.
        base: settings of the model's own, before an editor's.
        editors: name of an editor -> what it changes in them.
        folder: of the moments, and what is factored of them.
        untouched: name -> facts that no edit is about, as a measure of general ability.
        tasks: of general ability, multiple choice.
        references: texts about new objects, for the consistency of free text; None where there are none.
    """

    name: str
    model: Decoder
    tokenizer: Any
    records: tuple[Record, ...]
    heldout: PreparedTexts | None
    base: EditSettings
    editors: Mapping[str, Mapping[str, Any]]
    moments: Moments
    folder: Path
    untouched: Mapping[str, PreparedPairs] = dataclasses.field(default_factory=dict)
    tasks: Sequence[PreparedTask] = ()
    references: References | None = None

    def settings(self, editor: str, seed: int, **changes: Any) -> EditSettings:
        """Settings of an editor by name; the seed is that of the prefixes.

        Raises:
            KeditError: an editor that the model's config does not name, or settings that cannot be used.
        """
        if editor not in self.editors:
            raise KeditError(f"editor {editor!r} is none of those configured for {self.name}: {', '.join(self.editors)}")
        return overridden(self.base, {**self.editors[editor], "seed": seed, **changes})

    def start(self, settings: EditSettings, *, kept: bool = True) -> EditSession:
        """A session without edits; `kept` stores the factored moments, for editors that come back."""
        return start_session(self.model, self.tokenizer, self.moments, settings, priors=self.folder if kept else None)

    def chosen(self, seed: int, count: int) -> list[Record]:
        """The seed's facts in its order, each of another subject where there are so many.

        Two facts of one subject have one key, and an edit can meet only what lies between their targets.
        """
        if count > len(self.records):
            raise KeditError(
                f"{count} edits, but {self.name} has {len(self.records)} facts that can be edited; ask for fewer"
            )
        order = [self.records[place] for place in np.random.default_rng(seed).permutation(len(self.records))]
        others = list({record.subject: record for record in reversed(order)}.values())[::-1]
        return (others if count <= len(others) else order)[:count]

    def header(self, settings: EditSettings, records: Sequence[Record]) -> dict[str, Any]:
        """All that decides the result of editing these records in this order."""
        return {
            "model": self.name,
            "weights": self.weights,
            "data": fingerprint([record.to_dict() for record in records]),
            "heldout": None if self.heldout is None else fingerprint(list(self.heldout.texts)),
            "tasks": {
                task.task.name: fingerprint([vars(question) for question in task.task.questions]) for task in self.tasks
            },
            "moments": self.moments.fingerprint(settings.layers),
            "settings": {**settings.to_dict(), "layers": list(settings.layers)},
            "prefixes": list(self.prefixes(settings.prefixes, settings.prefix_tokens, settings.seed)),
            "versions": versions(),
            "hardware": hardware(),
        }

    @functools.cached_property
    def weights(self) -> str:
        return model_fingerprint(self.model)

    @functools.cached_property
    def _prefixes(self) -> dict[tuple[int, int, int], tuple[str, ...]]:
        return {}

    def prefixes(self, count: int, length: int, seed: int) -> tuple[str, ...]:
        """What the model writes before prompts, as sessions do."""
        if (count, length, seed) not in self._prefixes:
            made = sample_prefixes(self.model, self.tokenizer, count=count, length=length, seed=seed)
            self._prefixes[count, length, seed] = made
        return self._prefixes[count, length, seed]


def open_stage(name: str, choice: Choice, sources: Sources, folder: Path, progress: Progress | None = None) -> Stage:
    """Load a model and its data, and compute its second moments unless they are in `folder`.

    Raises:
        KeditError: weights or data that are not there (what to fetch and where to put it), or do not fit.
    """
    invented = name == EMBEDDED or choice.assets is not None
    if invented:
        made = None if choice.assets is None else FOLDER.parents[1] / choice.assets
        weights: Path = assets.model_dir(made)
        if not weights.exists():
            raise KeditError(f"{name} cannot be run: there is no {choice.assets}/model; `{choice.made_by}` trains it")
        records = tuple(parse_records(assets.records(made)))
        corpus, heldout, tasks = assets.corpus(made), assets.heldout(made), embedded_tasks(made)
    else:
        weights, paths = _found(name, choice, sources)
        records = tuple(read_records(paths["records"]))
        corpus = list(lines(paths["corpus"]))
        heldout = list(lines(paths["heldout"])) if "heldout" in paths else []
        tasks = [read_task(path) for path in sources.ability or sorted((FOLDER / "data" / name / "ability").glob("*.json*"))]
    model, tokenizer = load(weights, dtype=np.float32 if invented else None)
    if choice.preset is not None:
        check_preset(choice.preset, model.config)
    base = choice.base()
    moments = compute_moments(
        model, tokenizer, corpus, base.layers, max_tokens=choice.moment_tokens or math.inf, cache=folder, progress=progress
    )
    length = min(model.config.max_positions, 512)
    texts = prepare_texts(heldout[: choice.heldout_texts], tokenizer, max_length=length) if heldout else None
    asked = [prepare_task(Task(task.name, tuple(spread(task.questions, QUESTIONS))), tokenizer) for task in tasks]
    return Stage(
        name,
        model,
        tokenizer,
        records,
        texts,
        base,
        choice.editors,
        moments,
        folder,
        untouched(records, tokenizer),
        asked,
        references_of(records),
    )


def untouched(records: Sequence[Record], tokenizer: Any, count: int = CONTROLS) -> dict[str, PreparedPairs]:
    """Facts that no edit is about: of subjects that are never edited, and what edited subjects are ("X is a").

    The first are the neighbourhood prompts of all records that can be edited, whichever a seed edits.
    """
    neighbours = [(text, r.target_true) for r in records if r.target_true is not None for text in r.neighborhood_prompts]
    types = [(f.prompt, f.target) for r in records for f in r.same_subject if f.prompt.endswith((" is a", " is an"))]
    kinds = {"untouched_accuracy": neighbours, "type_accuracy": types}
    return {name: prepare_pairs(spread(list(dict.fromkeys(p)), count), tokenizer) for name, p in kinds.items() if p}


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[place] for place in np.linspace(0, len(items) - 1, count).round().astype(int)]


def _found(name: str, choice: Choice, sources: Sources) -> tuple[Path, dict[str, Path]]:
    """The folder of weights and the files of data, or a KeditError that lists what is missing."""
    usual = FOLDER / "data" / name
    hub = PRESETS[choice.preset].checkpoint if choice.preset else name
    wanted = {
        "weights": (sources.weights, "weights", f"the checkpoint {hub} of the Hugging Face hub", "--model-dir"),
        "records": (sources.records, "records.json", "CounterFact (rome.baulab.info/data/dsets), or zsRE", "--records"),
        "corpus": (sources.corpus, "corpus.txt", "text such as Wikipedia's, a document a line", "--corpus"),
    }
    found, problems = {}, []
    for what, (given, usually, fetch, option) in wanted.items():
        path = given or usual / usually
        if path.exists():
            found[what] = path
        else:
            place = "experiments/paper" / (usual / usually).relative_to(FOLDER)
            problems.append(
                f"{what}: nothing at {str(path)!r}; fetch {fetch}, and put it at {place} or name it with {option}"
            )
    if problems:
        raise KeditError.listing(f"{name} cannot be run:", problems)
    heldout = sources.heldout or usual / "heldout.txt"
    if heldout.exists():
        found["heldout"] = heldout
    elif sources.heldout is not None:
        raise KeditError(f"no held-out text at {str(heldout)!r}; leave --heldout out to go without the perplexity")
    return found.pop("weights"), found


def fingerprint(content: Any) -> str:
    """sha256 of anything that JSON holds."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def versions() -> dict[str, str]:
    names = ("kedit-jax", "jax", "jaxlib", "numpy", "scipy", "transformers")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def hardware() -> dict[str, Any]:
    """Processor, cores and accelerator; never the machine's name."""
    import jax

    return {"processor": processor(), "cores": cores(), "device": jax.devices()[0].device_kind}
