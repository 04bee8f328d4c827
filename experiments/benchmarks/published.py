"""MEMIT with a history as it is published, in torch: what the library's speed is measured against.

Written from the descriptions (MEMIT, arXiv 2210.07229; the history of keys as AlphaEdit, arXiv 2410.02355, and arXiv
2605.26670 run it). The costs are the published ones:

- target values: one request after another; every step runs the whole model over the contexts and the KL prompt, computes
  the logits of all tokens, and those of the contexts a second time from the last block's output;
- keys: the whole model over all contexts, once for every edited layer, and once more for the history when all are written;
- current values: the whole model over the bare prompts, once for every edited layer;
- solve: a dense n x n system in float64 for every layer and batch, summed anew.

Faults of published code are not reproduced (`kedit_jax.editing` names them): rows are padded on the right, the subject is
found by character offsets. Attention is torch's fused one and no attention keys are kept, which is faster than published.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from experiments.benchmarks.measuring import Clock
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.tokens import KL_PROMPT, Encoded, Passage, encode

READ_ROWS = 128  # contexts in one forward pass when keys are read, as published


class Places(NamedTuple):
    """Where a family keeps its blocks, its last norm and, in a block, the down projection; is the kernel stored [v, k]?"""

    blocks: str
    norm: str
    down: str
    transposed: bool


PLACES: Mapping[str, Places] = {
    "gpt2": Places("transformer.h", "transformer.ln_f", "mlp.c_proj", False),
    "llama": Places("model.layers", "model.norm", "mlp.down_proj", True),
}


@dataclass(frozen=True)
class Value:
    """A request's target value, and the loss and the target's NLL there."""

    z: torch.Tensor
    loss: float
    nll: float


@dataclass(eq=False)
class Published:
    """A torch model that is edited in place.

    Attributes:
        model: of `PLACES`' families, as transformers loads it.
        settings: those of MEMIT are read, without ridge, noise or weights.
        moments: layer -> C0 [k, k], in the model's dtype as published files hold it.
        history: layer -> sum of k k' over all facts written so far, [k, k].
        clock: seconds in "values", "keys" and "solve".
    """

    model: Any
    tokenizer: Any
    prefixes: Sequence[str]
    settings: EditSettings
    moments: Mapping[int, torch.Tensor]
    clock: Clock = field(default_factory=Clock)
    history: dict[int, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        self.history = {layer: torch.zeros_like(self.moments[layer]) for layer in self.settings.layers}
        self._places = PLACES[self.model.config.model_type]
        self._blocks = operator.attrgetter(self._places.blocks)(self.model)

    def edit(self, requests: Sequence[EditRequest]) -> list[Value]:
        """Write a batch of facts."""
        values = [self.value(request) for request in requests]
        self.write(requests, torch.stack([value.z for value in values]))
        return values

    def value(self, request: EditRequest) -> Value:
        """The target value of one request: `compute_z`."""
        with self.clock.part("values"):
            return self._value(request)

    def write(self, requests: Sequence[EditRequest], z: torch.Tensor) -> None:
        """Solve for every layer, the lowest first, and read all keys once more for the history."""
        for index, layer in enumerate(self.settings.layers):
            with self.clock.part("keys"):
                keys, present = self.keys(requests, layer), self._present(requests)
            with self.clock.part("solve"):
                update = self.solved(layer, keys, (z - present) / (len(self.settings.layers) - index))
                self.kernel(layer).add_(update)
        with self.clock.part("keys"):
            for layer in self.settings.layers:
                keys = self.keys(requests, layer)
                self.history[layer] += keys.T @ keys

    def solved(self, layer: int, keys: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        """(lambda C0 + history + K'K)^-1 K' R, [k, v]: a system of the key's width whatever the batch."""
        wide = keys.double()
        precision = self.settings.moment_weight * self.moments[layer].double() + self.history[layer].double() + wide.T @ wide
        return torch.linalg.solve(precision, wide.T) @ residuals.double()

    def kernel(self, layer: int) -> torch.Tensor:
        """A view [k, v] of a layer's down projection."""
        weight: torch.Tensor = self._down(layer).weight
        return weight.T if self._places.transposed else weight

    def _down(self, layer: int) -> Any:
        return operator.attrgetter(self._places.down)(self._blocks[layer])

    # --- target values ---

    def _value(self, request: EditRequest) -> Value:
        settings = self.settings.values
        contexts = encode(self.tokenizer, self._passages(request, request.target))
        rows = self._rows([*contexts, *encode(self.tokenizer, [Passage(KL_PROMPT, request.subject)])], cut=len(contexts))
        wanted = self._wanted(contexts, rows.tokens.shape[1])
        share = (wanted >= 0) / (wanted >= 0).sum(-1, keepdim=True)
        top, head = self.settings.layers[-1], self.model.get_output_embeddings()
        last_norm = operator.attrgetter(self._places.norm)(self.model)
        wide = torch.promote_types(self.model.dtype, torch.float32)
        delta = torch.zeros(self.model.config.hidden_size, dtype=wide, device=self.model.device, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=settings.learning_rate)
        origin = original = torch.empty(0)

        for step in range(settings.steps):
            adam.zero_grad()
            seen: dict[str, torch.Tensor] = {}
            with self._shifted(top, rows.subject_last, delta, seen), self._watched(self._blocks[-1], "last", seen):
                logits = self.model(input_ids=rows.tokens, attention_mask=rows.mask, use_cache=False).logits
            log_q = torch.log_softmax(logits[-1, rows.subject_last[-1]].to(wide), -1)
            if step == 0:
                origin, original = seen["origin"], log_q.detach()
            log_p = torch.log_softmax(head(last_norm(seen["last"][: len(contexts)])).to(wide), -1)
            token_nll = -log_p.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
            nll = (token_nll * share).sum(-1).mean()
            kl = (log_q.exp() * (log_q - original)).sum()
            loss = nll + settings.kl_factor * kl + settings.decay * delta.norm() / origin.norm() ** 2
            if loss < settings.stop_loss or step == settings.steps - 1:
                break
            loss.backward()
            adam.step()
            longest = settings.clamp * origin.norm()
            if delta.norm() > longest:
                with torch.no_grad():
                    delta.mul_(longest / delta.norm())
        return Value(origin + delta.detach(), float(loss.detach()), float(nll.detach()))

    @contextlib.contextmanager
    def _shifted(self, layer: int, at: torch.Tensor, delta: torch.Tensor, seen: dict[str, torch.Tensor]) -> Iterator[None]:
        """Block `layer` puts out `delta` more at each row's column `at`; the first row's output there is the origin."""

        def shift(_module: Any, _inputs: Any, output: Any) -> None:
            h = output[0] if isinstance(output, tuple) else output
            seen["origin"] = h[0, at[0]].to(delta.dtype, copy=True)
            h[torch.arange(len(at)), at] += delta.to(h.dtype)

        with _hooked(self._blocks[layer].register_forward_hook, shift):
            yield

    def _wanted(self, contexts: Sequence[Encoded], width: int) -> torch.Tensor:
        """[contexts, width] the next token where it is the target's, -1 elsewhere."""
        wanted = np.full((len(contexts), width), -1)
        for row, context in zip(wanted, contexts, strict=True):
            row[context.n_prompt - 1 : len(context.tokens) - 1] = context.target
        return torch.as_tensor(wanted, device=self.model.device)

    # --- keys ---

    @torch.no_grad()
    def keys(self, requests: Sequence[EditRequest], layer: int) -> torch.Tensor:
        """[R, k] inputs of a layer's down projection; the bare prompt counts one half, the prefixed ones the other."""
        passages = [passage for request in requests for passage in self._passages(request)]
        found = self._read(passages, self._down(layer).register_forward_pre_hook)
        found = found.reshape(len(requests), -1, found.shape[-1])
        if not self.prefixes:
            return found[:, 0]
        return torch.stack([found[:, 0], found[:, 1:].mean(1)]).mean(0)

    @torch.no_grad()
    def _present(self, requests: Sequence[EditRequest]) -> torch.Tensor:
        """[R, d] output of the top edited layer for the bare prompts."""
        passages = [Passage(request.prompt, request.subject) for request in requests]
        return self._read(passages, self._blocks[self.settings.layers[-1]].register_forward_hook)

    def _read(self, passages: Sequence[Passage], register: Callable[..., Any]) -> torch.Tensor:
        """What a hook sees last of its arguments, at the subject's last token, by passes of the whole model."""
        found = []
        for begin in range(0, len(passages), READ_ROWS):
            rows = self._rows(encode(self.tokenizer, passages[begin : begin + READ_ROWS]))
            seen: dict[str, torch.Tensor] = {}
            with _hooked(register, lambda *arguments, seen=seen: _keep(seen, "read", arguments[-1])):
                self.model(input_ids=rows.tokens, attention_mask=rows.mask, use_cache=False)
            found.append(seen["read"][torch.arange(len(rows.tokens)), rows.subject_last])
        return torch.cat(found)

    # --- rows ---

    def _passages(self, request: EditRequest, target: str | None = None) -> list[Passage]:
        """The bare prompt, then one for each prefix."""
        return [Passage(request.prompt, request.subject, target, prefix) for prefix in ("", *self.prefixes)]

    def _rows(self, encoded: Sequence[Encoded], cut: int = 0) -> "_Rows":
        """Token rows padded on the right; the first `cut` without their last token, after which nothing is predicted."""
        texts = [e.tokens[:-1] if number < cut else e.tokens for number, e in enumerate(encoded)]
        tokens, mask = np.zeros((2, len(texts), max(map(len, texts))), np.int64)
        for row, text in enumerate(texts):
            tokens[row, : len(text)], mask[row, : len(text)] = text, 1
        last = np.array([e.subject_last for e in encoded])
        return _Rows(*(torch.as_tensor(array, device=self.model.device) for array in (tokens, mask, last)))

    @contextlib.contextmanager
    def _watched(self, module: Any, name: str, seen: dict[str, torch.Tensor]) -> Iterator[None]:
        """Keep a module's output in `seen`."""
        with _hooked(module.register_forward_hook, lambda *arguments: _keep(seen, name, arguments[-1])):
            yield


class _Rows(NamedTuple):
    tokens: torch.Tensor
    mask: torch.Tensor
    subject_last: torch.Tensor


def _keep(seen: dict[str, torch.Tensor], name: str, value: Any) -> None:
    seen[name] = value[0] if isinstance(value, tuple) else value


@contextlib.contextmanager
def _hooked(register: Callable[..., Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()
