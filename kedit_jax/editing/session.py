"""An editing session: a model, the facts written into it, and all it takes to write more or take some back.

Sessions are immutable: every operation returns a new session and the delta between the two; the old one stays valid. Per
layer the session holds the accumulated constraints (key, residual against the ORIGINAL kernel, noise), so that at any time
its delta is the one-time edit of the facts it holds (Lemma 3.1, Prop. 3.2 and 3.5 of arXiv 2605.26670). What one layer does
is `kedit_jax.editing.history`; whole sessions are merged, undone and compacted in `kedit_jax.editing.algebra`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from kedit_jax import solve
from kedit_jax.delta import Dense, EditDelta, Update, add_on_host, host_kernel, relative_error, write_kernels
from kedit_jax.editing import history as histories
from kedit_jax.editing import keys as reading
from kedit_jax.editing import leftovers
from kedit_jax.editing.budget import MicroBatches, micro_batches, sizes_for, what_to_keep
from kedit_jax.editing.conflicts import Plan, find_conflicts, resolve
from kedit_jax.editing.history import LayerHistory, Site
from kedit_jax.editing.moments import Moments, check_layers
from kedit_jax.editing.packed import Sizes
from kedit_jax.editing.prefixes import sample_prefixes
from kedit_jax.editing.requests import EditRequest, check_unique_ids
from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.tokens import Encoded, encode_requests
from kedit_jax.editing.values import Values, optimise_in_rounds
from kedit_jax.errors import KeditError, NonFiniteError, RequestError, SessionError
from kedit_jax.models import Decoder, ModelConfig, down_kernel_address, model_fingerprint
from kedit_jax.models.spread import apart, together

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Event:
    """One line of a session's history.

    Attributes:
        kind: `edit`, `replace`, `retract`, `restore`, `merge`, `compact`, `undo` or `rollback`, a step that a guard
            (`kedit_jax.editing.guard`) did not keep.
        ids: the facts that it wrote, took back, restored or compacted.
        replaced: the facts that left for those, under the policy on conflicts or because their target was replaced.
        skipped: the facts that the policy, or a guard, left out.
        undoes: number of the event, counted from 1, that an `undo` took back.
        texts: what each of `ids` said, where the event wrote them; a fact's target can be replaced later.
        reason: why a guard rolled the step back.
    """

    kind: str
    ids: tuple[str, ...]
    replaced: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    undoes: int | None = None
    texts: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, eq=False)
class EditSession:
    """A model being edited. Make one with `start_session`.

    Attributes:
        base: the model before any edit.
        model: the model with all facts of the session written in.
        moments: what the second moments were computed from. Their arrays are not kept: all that edits need of them is in
            the factors of `editors`. Another session is started with those that `compute_moments` returned.
        editors: each edited layer's prior and noise.
        layers: each edited layer's constraints and update.
        facts: the facts it holds, in order; every one has an id.
        batches: how many of them each batch wrote, those that were compacted left out.
        events: what was done, in order.
        retired: facts that were taken back and can be restored, the latest last; an id can have several versions.
        skipped: facts that a policy on conflicts, or a guard, left out.
        compacted: how many of `facts`, the first ones, are kept as statistics alone.
        reports: how the last batch's target values came out.
        sizes: of the last batch's arrays, used once more by batches that fit, so that few programs are compiled.
    """

    base: Decoder
    model: Decoder
    tokenizer: Any
    settings: EditSettings
    prefixes: tuple[str, ...]
    moments: Moments
    editors: Mapping[int, solve.Editor]
    layers: Mapping[int, LayerHistory]
    facts: tuple[EditRequest, ...] = ()
    batches: tuple[int, ...] = ()
    events: tuple[Event, ...] = ()
    retired: tuple[EditRequest, ...] = ()
    skipped: tuple[EditRequest, ...] = ()
    compacted: int = 0
    reports: Values | None = None
    sizes: Sizes | None = None

    @property
    def delta(self) -> EditDelta:
        """All edits together, float64: `apply_edits(session.base, session.delta)` is `session.model`."""
        if not self.facts:
            return EditDelta({})
        return EditDelta({down_kernel_address(n): Dense(layer.update) for n, layer in self.layers.items()})

    def edit(
        self,
        requests: Sequence[EditRequest],
        *,
        conflicts: str | None = None,
        similarity: float | None = None,
        progress: Progress | None = None,
    ) -> tuple["EditSession", EditDelta]:
        """Write a batch of facts (MEMIT's procedure, with the session's editor and history).

        Args:
            requests: the facts; one without an id gets `fact-N`.
            conflicts: what to do about facts that contradict those before them, a policy of
                `kedit_jax.editing.conflicts`; the settings' by default.
            similarity: cosine of two keys from which on their facts conflict, too; the settings' by default.
            progress: called with (stage, done, total).

        Returns:
            The session afterwards and this step's delta; `self` is unchanged.

        Raises:
            RequestError: a request that cannot be used, or a conflict that the policy rejects; all of them are listed.
            SessionError: a conflict whose policy the session cannot follow.
            NonFiniteError: values, keys or updates that are not finite; the requests are named.
        """
        plan = self.plan(requests, conflicts=conflicts, similarity=similarity)
        session = self._without(plan.replaced) if plan.replaced else self
        steps: dict[str, Update] = {}
        if plan.written:
            session, steps = session._written(plan.written, _rows_of(plan, session), progress)
        event = Event("edit", _ids(plan.written), plan.replaced, _ids(plan.skipped), texts=texts_of(plan.written))
        session = dataclasses.replace(session, events=(*self.events, event), skipped=(*self.skipped, *plan.skipped))
        return session, difference_of(self, session) if plan.replaced else EditDelta(steps)

    def sized_for(self, batches: Sequence[Sequence[EditRequest]]) -> "EditSession":
        """The same session with arrays that hold each of these batches, for a stream that is known ahead.

        Sizes are otherwise found as batches come, and a batch of longer prompts than those before costs programs of its own,
        seconds of compiling each. Nothing is computed on the model. Batches of other sizes than the largest keep their own.

        Raises:
            RequestError: requests that cannot be used; all of them are listed.
        """
        rows = iter(self._encoded([request for batch in batches for request in batch]))
        sizes = sizes_for(
            self.base.config, self.settings, [[next(rows) for _ in batch] for batch in batches],
            itemsize=self.base.dtype.itemsize, held=self.sizes, spread=self.base.spread,
        )  # fmt: skip
        return dataclasses.replace(self, sizes=sizes)

    def plan(
        self, requests: Sequence[EditRequest], *, conflicts: str | None = None, similarity: float | None = None
    ) -> Plan:
        """What `edit` would do about contradictions, without doing it: a dry run that optimises and solves nothing.

        Raises:
            As `edit`, but for what is not finite.
        """
        if not requests:
            raise KeditError("no requests to edit; give at least one")
        requests = self._named(requests)
        policy = conflicts or self.settings.policy
        similarity = self.settings.similarity if similarity is None else similarity
        self._check_weights(requests)
        close: dict[str, Any] = {}
        if similarity is not None:
            close = {"batch_keys": self._first_keys(requests), "held_keys": self._held_keys()}
        found = find_conflicts(requests, self.facts, similarity=similarity, **close)
        plan = resolve(requests, found, policy)
        self._check_plan(plan)
        return plan

    def replace(
        self, requests: Sequence[EditRequest], *, progress: Progress | None = None
    ) -> tuple["EditSession", EditDelta]:
        """Give facts that the session holds, named by their ids, new targets under their recorded keys.

        Raises:
            SessionError: an id the session does not hold, or a session that cannot take anything back.
            RequestError, NonFiniteError: as `edit`.
        """
        ids = _ids(requests)
        check_unique_ids(requests)
        before = self._without(ids)
        self._check_weights(requests)
        rows = {number: _Row("retired", before._retired_at(str(request.id))) for number, request in enumerate(requests)}
        after, _ = before._written(tuple(requests), rows, progress)
        after = dataclasses.replace(after, events=(*self.events, Event("replace", ids, ids, texts=texts_of(requests))))
        return after, difference_of(self, after)

    def retract(self, ids: Sequence[str]) -> tuple["EditSession", EditDelta]:
        """Take facts back: afterwards the kernels are as if they had never been edited (Prop. 3.5).

        Retracting the last fact gives the original model back bit for bit. What was taken back is kept for `restore`.

        Raises:
            SessionError: an id the session does not hold or has compacted, or a history that is not aligned, which cannot
                take anything back.
        """
        session = self._without(ids)
        session = dataclasses.replace(session, events=(*self.events, Event("retract", tuple(dict.fromkeys(ids)))))
        return session, difference_of(self, session)

    def restore(self, ids: Sequence[str]) -> tuple["EditSession", EditDelta]:
        """Write facts that were taken back once more, from their recorded constraints: no value is optimised.

        Raises:
            SessionError: an id that was never taken back, or that a fact of the session bears.
        """
        ids = tuple(dict.fromkeys(ids))
        session = self._with_retired([self._retired_at(name) for name in ids])
        session = dataclasses.replace(session, events=(*self.events, Event("restore", ids)))
        return session, difference_of(self, session)

    def one_time(self, dtype: str = "float64") -> EditDelta:
        """The one-time edit of everything the session holds, computed anew from its stored constraints.

        What `delta` must equal when the session is aligned and without post-processing; see `equivalence_error`.
        """
        if not self.facts:
            return EditDelta({})
        with solve.float64():
            updates = {layer: histories.one_time(held, self.site(layer), dtype) for layer, held in self.layers.items()}
        return EditDelta({down_kernel_address(layer): Dense(update) for layer, update in updates.items()})

    def replayed(self, dtype: str = "float64") -> EditDelta:
        """The sum of the sequential steps over the stored constraints, made anew with every step rounded to this dtype."""
        if self.settings.history != "aligned":
            raise SessionError(
                f"the steps of a session with history {self.settings.history!r} are not those of the aligned sequence; "
                "compare its `delta`"
            )
        updates: dict[str, Update] = {}
        with solve.float64():
            for layer, held in self.layers.items():
                again = histories.replayed(self.site(layer), held.constraints, self.batches, held.base, dtype)
                updates[down_kernel_address(layer)] = Dense(again.update)
        return EditDelta(updates)

    def site(self, layer: int) -> Site:
        """What an edited layer is edited with."""
        kernel, editor = host_kernel(self.base, down_kernel_address(layer)), self.editors[layer]
        return Site(editor.prior, float(editor.noise), kernel, self.settings.procedure())

    @leftovers.handed_back()
    def _written(
        self, requests: Sequence[EditRequest], shared: Mapping[int, "_Row"], progress: Progress | None
    ) -> tuple["EditSession", dict[str, Update]]:
        """The session with a batch written, and each kernel's step.

        Args:
            shared: by position in the batch, whose key a fact is written under instead of its own.
        """
        rows = self._encoded(requests)
        batches = self._arranged(rows)
        values = self._values(rows, batches, progress)
        _require_finite("target values", np.asarray(values.z), requests)
        steps: dict[str, Update] = {}
        layers, model = dict(self.layers), self.model
        spread, count, n_contexts = model.spread, len(batches.layouts), batches.layouts[0].n_contexts
        streams, at = [reading.enter(model, layouts) for layouts in together(spread, batches.layouts)], 0
        weights, top = np.array([request.weight for request in requests]), self.settings.layers[-1]
        for left, layer in zip(range(len(layers), 0, -1), self.settings.layers, strict=True):
            read = [reading.read(model, stream, at, layer, top, n_contexts) for stream in streams]
            streams, at = [stream for stream, _ in read], layer
            seen = apart(spread, [r for _, r in read], count)
            keys, present = batches.gathered([r.keys for r in seen]), batches.gathered([r.top for r in seen])
            residuals = (np.asarray(values.z, np.float64) - present) / left
            _require_finite(f"keys of layer {layer}", keys, requests)
            keys = _under_shared(keys, shared, layers[layer])
            with solve.float64():
                site = self.site(layer)
                block = solve.Constraints(keys, residuals + keys @ layers[layer].update, site.noise / weights)
                layers[layer], step = _extended(layer, layers[layer], site, block)
                steps[down_kernel_address(layer)] = step
                model = self._apply(model, layer, layers[layer])
            if progress is not None:
                progress("layers", len(self.layers) - left + 1, len(self.layers))
        keeps = self.settings.history in ("aligned", "unaligned")
        session = dataclasses.replace(
            self,
            model=model,
            layers=layers,
            facts=(*self.facts, *requests) if keeps else tuple(requests),
            batches=(*self.batches, len(requests)) if keeps else (len(requests),),
            reports=values,
            sizes=batches.layouts[-1].sizes,
        )
        return session, steps

    def _without(self, ids: Sequence[str]) -> "EditSession":
        """The session as if these facts had never been edited; they are retired. No event is recorded."""
        self._check_can_lose(ids)
        keep = np.array([fact.id not in set(ids) for fact in self.facts[self.compacted :]])
        sizes = [int(part.sum()) for part in np.split(keep, np.cumsum(self.batches)[:-1])]
        layers = {}
        with solve.float64():
            for layer, held in self.layers.items():
                stays, leaves = solve.take(held.constraints, keep), solve.take(held.constraints, ~keep)
                again = histories.replayed(self.site(layer), stays, sizes, held.base)
                layers[layer] = dataclasses.replace(again, retired=solve.concatenate([held.retired, leaves]))
        gone = set(ids)
        return dataclasses.replace(
            self,
            model=self.base,
            layers=layers,
            facts=tuple(fact for fact in self.facts if fact.id not in gone),
            retired=(*self.retired, *(fact for fact in self.facts if fact.id in gone)),
            batches=tuple(size for size in sizes if size),
            reports=None,
        )._with_model()

    def _with_retired(self, places: Sequence[int]) -> "EditSession":
        """The session with these of its retired facts written again, as one batch. No event is recorded."""
        chosen = np.isin(np.arange(len(self.retired)), places)
        back = [fact for fact, is_back in zip(self.retired, chosen, strict=True) if is_back]
        taken = sorted({str(fact.id) for fact in self.facts} & {str(fact.id) for fact in back})
        if taken:
            raise SessionError(
                f"the session holds other facts named {', '.join(taken)}; retract those before restoring these"
            )
        layers = {}
        with solve.float64():
            for layer, held in self.layers.items():
                rows = solve.take(held.retired, chosen)
                grown, _ = _extended(layer, held, self.site(layer), rows)
                layers[layer] = dataclasses.replace(grown, retired=solve.take(held.retired, ~chosen))
        return dataclasses.replace(
            self,
            layers=layers,
            facts=(*self.facts, *back),
            retired=tuple(fact for fact, is_back in zip(self.retired, chosen, strict=True) if not is_back),
            batches=(*self.batches, len(back)),
            reports=None,
        )._with_model()

    def _with_model(self) -> "EditSession":
        """The session with its model made of the base and every layer's update; without facts, the base itself."""
        model = self.base
        if self.facts:
            for layer, held in self.layers.items():
                model = self._apply(model, layer, held)
        return dataclasses.replace(self, model=model)

    def _named(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """The requests, each with an id; ids already taken are an error."""
        taken = {str(fact.id) for fact in self.facts}
        check_unique_ids(requests, taken)
        # A retired fact's id may be given anew by the user, but is not given out: it still names that fact in the history.
        taken |= {str(fact.id) for fact in (*requests, *self.retired, *self.skipped) if fact.id is not None}
        number, named = sum(len(e.ids) for e in self.events if e.kind == "edit"), []
        for request in requests:
            number += 1
            if request.id is None:
                while f"fact-{number}" in taken:
                    number += 1
                request = dataclasses.replace(request, id=f"fact-{number}")
            named.append(request)
        return named

    def _micro_batches(self, requests: Sequence[EditRequest]) -> MicroBatches:
        """The requests in micro-batches of one size."""
        return self._arranged(self._encoded(requests))

    def _encoded(self, requests: Sequence[EditRequest]) -> list[list[Encoded]]:
        return encode_requests(self.tokenizer, requests, self.prefixes, max_positions=self.base.config.max_positions)

    def _arranged(self, rows: Sequence[Sequence[Encoded]]) -> MicroBatches:
        return micro_batches(
            self.base.config, self.settings, rows,
            itemsize=self.base.dtype.itemsize, held=self.sizes, spread=self.base.spread,
        )  # fmt: skip

    def _values(self, rows: Sequence[Sequence[Encoded]], batches: MicroBatches, progress: Progress | None) -> Values:
        parts: list[Values] = []
        done, settings, spread = 0, self.settings, self.model.spread
        at_once = 1 if spread is None else spread.data
        for begin in range(0, len(batches.layouts), at_once):
            layouts = batches.layouts[begin : begin + at_once]
            places = batches.places[begin : begin + at_once]
            keep = what_to_keep(self.base.config, settings, layouts[0], itemsize=self.base.dtype.itemsize, spread=spread)
            parts += optimise_in_rounds(
                self.model,
                [[rows[place] for place in at.tolist()] for at in places],
                layouts,
                settings.layers[-1],
                settings.values,
                keep,
                settings.compute_dtype,
            )
            done += sum(map(len, places))
            if progress is not None:
                progress("target values", done, len(rows))
        values: Values = jax.tree.map(lambda *found: batches.gathered(found), *parts)
        return values

    def _first_keys(self, requests: Sequence[EditRequest]) -> Float[np.ndarray, "u k"]:
        """Keys in the first edited layer, which no edit of the session moves."""
        first, read, batches = self.settings.layers[0], [], self._micro_batches(requests)
        spread, layouts = self.base.spread, batches.layouts
        for stack in together(spread, layouts):
            stream = reading.enter(self.base, stack)
            read.append(reading.read(self.base, stream, 0, first, first, layouts[0].n_contexts)[1].keys)
        return batches.gathered(apart(spread, read, len(layouts)))

    def _held_keys(self) -> Float[np.ndarray, "m k"]:
        """Recorded keys of the first edited layer, a row a fact; compacted facts have none, so 0."""
        keys = self.layers[self.settings.layers[0]].constraints.keys
        return np.concatenate([np.zeros((self.compacted, keys.shape[1]), keys.dtype), np.asarray(keys)])

    def _retired_at(self, name: str) -> int:
        """Where the latest retired version of a fact stands."""
        places = [place for place, fact in enumerate(self.retired) if fact.id == name]
        if not places:
            raise SessionError(f"cannot restore {name}: it is not among the {len(self.retired)} facts that were taken back")
        return places[-1]

    def _check_weights(self, requests: Sequence[EditRequest]) -> None:
        weighted = [str(request.id) for request in requests if request.weight != 1]
        if weighted and any(float(editor.noise) == 0 for editor in self.editors.values()):
            raise RequestError(
                f"facts with a weight ({', '.join(weighted[:5])}), but the editor {self.settings.editor!r} meets every "
                "constraint exactly: leave the weights out, or set noise > 0"
            )

    def _check_plan(self, plan: Plan) -> None:
        if plan.policy in ("latest", "merge") and self.settings.history != "aligned":
            raise SessionError(f"conflicts {plan.policy!r} needs history 'aligned', not {self.settings.history!r}")
        if plan.replaced:
            self._check_can_lose(plan.replaced)
        gone = {str(fact.id) for fact in self.facts[: self.compacted]} & set(plan.shared.values())
        if gone:
            raise SessionError(
                f"cannot merge with {', '.join(sorted(gone))}: compacted, so that their keys are no longer known"
            )
        if plan.shared and any(float(editor.noise) == 0 for editor in self.editors.values()):
            raise SessionError("facts merged under one key contradict each other exactly with noise 0; set noise > 0")

    def _check_can_lose(self, ids: Sequence[str]) -> None:
        """Raise unless these facts can be taken out of the session."""
        if self.settings.history != "aligned":
            raise SessionError(
                f"a session with history {self.settings.history!r} left its history out and cannot retract; "
                "edit with history='aligned'"
            )
        gone, known = set(ids), {str(fact.id) for fact in self.facts}
        if not gone or not gone <= known:
            missing = sorted(gone - known) or ["(none given)"]
            raise SessionError(f"cannot retract {', '.join(missing)}: not among the session's {len(known)} facts")
        blurred = sorted(gone & {str(fact.id) for fact in self.facts[: self.compacted]})
        if blurred:
            raise SessionError(
                f"cannot retract {', '.join(blurred)}: compacted into statistics, which gave up retraction for constant "
                "memory"
            )

    def _apply(self, model: Decoder, layer: int, held: LayerHistory) -> Decoder:
        """`model` with this layer's kernel at original + total update: one rounding, however many steps.

        A model that is neither the session's nor its base is given up, as a step's are before its last layer.
        """
        address = down_kernel_address(layer)
        kernel = add_on_host(host_kernel(self.base, address), held.update)
        return write_kernels(model, {address: kernel}, donate=model is not self.model and model is not self.base)


@dataclass(frozen=True)
class _Row:
    """A recorded key: `held` or `retired` row of a layer, or row of the `batch` that is being written."""

    where: str
    number: int


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """What a checkpoint keeps of a layer's history."""

    constraints: solve.Constraints
    retired: solve.Constraints
    update: Float[np.ndarray, "k v"]
    base: histories.Compacted | None = None


def check_editable(config: ModelConfig) -> None:
    """Raise a SessionError for models whose down projections do not write into the residual stream directly."""
    if config.post_norms:
        raise SessionError(
            f"{config.family} norms what a down projection puts out before it joins the residual stream, so a kernel alone "
            "cannot reach the change that an edit needs: such models are loaded, scored and run, but not edited"
        )


def start_session(
    model: Decoder, tokenizer: Any, moments: Moments, settings: EditSettings, *, priors: str | Path | None = None
) -> EditSession:
    """A session without any edit.

    Args:
        model: the model to edit; it is never changed.
        tokenizer: its fast tokenizer.
        moments: from `compute_moments` on this very model, at least for `settings.layers`. The session holds none of their
            arrays: a caller who lets go of them frees their memory.
        settings: the editor and all its numbers.
        priors: folder in which factored moments are looked for, and kept; None factors them anew.

    Raises:
        SessionError: moments of another model, or without a layer that is to be edited; a model whose down projections do
            not write into the residual stream directly (Gemma 2 and 3).
        SolverError: moments that the editor's prior cannot be made of.
    """
    check_editable(model.config)
    settings = dataclasses.replace(settings, layers=check_layers(model, settings.layers))
    found = model_fingerprint(model)
    if moments.model != found:
        raise SessionError(
            f"the moments are of model {moments.model[:12]}, not of this one ({found[:12]}); compute them anew"
        )
    prefixes = sample_prefixes(model, tokenizer, count=settings.prefixes, length=settings.prefix_tokens, seed=settings.seed)
    return _empty_session(model, tokenizer, moments, settings, prefixes, priors)


def restore_session(
    model: Decoder,
    tokenizer: Any,
    moments: Moments,
    settings: EditSettings,
    *,
    prefixes: tuple[str, ...],
    layers: Mapping[int, StoredLayer],
    priors: str | Path | None = None,
    **parts: Any,
) -> EditSession:
    """The session that these parts, as a checkpoint keeps them, were taken from. The solver's states are built anew.

    Args:
        priors: as for `start_session`.
        parts: the fields of `EditSession` from `facts` to `compacted`.
    """
    session = dataclasses.replace(_empty_session(model, tokenizer, moments, settings, prefixes, priors), **parts)
    held = dict(session.layers)
    with solve.float64():
        for layer, stored in layers.items():
            held[layer] = histories.restored(
                session.site(layer), stored.constraints, stored.retired, session.batches, stored.update, stored.base
            )
        return dataclasses.replace(session, layers=held)._with_model()


def _empty_session(
    model: Decoder,
    tokenizer: Any,
    moments: Moments,
    settings: EditSettings,
    prefixes: tuple[str, ...],
    priors: str | Path | None,
) -> EditSession:
    missing = [layer for layer in settings.layers if layer not in moments.by_layer]
    if missing:
        raise SessionError(f"no moments for layers {missing}, only for {sorted(moments.by_layer)}; compute them first")
    with solve.float64():
        editors = {layer: settings.build(moments.by_layer[layer], priors) for layer in settings.layers}
        session = EditSession(model, model, tokenizer, settings, prefixes, moments.without_arrays(), editors, {})
        layers = {layer: histories.empty_history(session.site(layer)) for layer in settings.layers}
    return dataclasses.replace(session, layers=layers)


def difference_of(before: EditSession, after: EditSession) -> EditDelta:
    """The delta that takes the kernels of one session to those of another of the same model and layers."""
    return EditDelta(
        {down_kernel_address(n): Dense(held.update - before.layers[n].update) for n, held in after.layers.items()}
    )


def equivalence_error(session: EditSession, dtype: str = "float64") -> float:
    """Relative Frobenius distance, over all layers, of the sum of the session's steps from the one-time edit of its facts.

    In float64 the steps are those the session made. In float32 every step, their sum and the one-time edit are made anew
    and rounded to float32, as the kernels of a float32 model see them; factors and residuals stay float64.
    """
    steps = session.delta if dtype == "float64" else session.replayed(dtype)
    return relative_error(steps, session.one_time(dtype))


def texts_of(facts: Sequence[EditRequest]) -> tuple[str, ...]:
    """Each fact as a line of the history."""
    return tuple(f"{fact.text} -> {fact.target}" for fact in facts)


def _ids(facts: Sequence[EditRequest]) -> tuple[str, ...]:
    return tuple(str(fact.id) for fact in facts)


def _rows_of(plan: Plan, session: EditSession) -> dict[int, _Row]:
    """By position in the batch, the row of the key that a merged fact shares."""
    held = {str(fact.id): number for number, fact in enumerate(session.facts[session.compacted :])}
    batch = {name: number for number, name in enumerate(_ids(plan.written))}
    return {
        batch[new]: _Row("held", held[old]) if old in held else _Row("batch", batch[old]) for new, old in plan.shared.items()
    }


def _under_shared(
    keys: Float[np.ndarray, "u k"], shared: Mapping[int, _Row], held: LayerHistory
) -> Float[np.ndarray, "u k"]:
    """The batch's keys, with those of facts that share another's replaced by it."""
    if not shared:
        return keys
    sources = {"held": held.constraints.keys, "retired": held.retired.keys, "batch": keys}
    moved = keys.copy()
    for number, row in shared.items():
        moved[number] = sources[row.where][row.number]
    return moved


def _extended(layer: int, held: LayerHistory, site: Site, block: solve.Constraints) -> tuple[LayerHistory, Update]:
    """`histories.extended`, with errors that name the layer."""
    try:
        return histories.extended(held, site, block)
    except KeditError as error:
        raise type(error)(f"layer {layer}: {error}") from error


def _require_finite(what: str, rows: Float[np.ndarray, "r n"], requests: Sequence[EditRequest]) -> None:
    """Raise a NonFiniteError that names the requests whose rows hold NaN or infinity."""
    bad = [str(r.id) for r, row in zip(requests, rows, strict=True) if not np.isfinite(row).all()]
    if bad:
        raise NonFiniteError(
            f"{what} are not finite for {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}; "
            "check the model's weights, or lower the learning rate or the clamp"
        )
