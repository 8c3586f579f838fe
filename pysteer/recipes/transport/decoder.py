"""Generate texts of many prompts and strengths in one batch whose rows never wait for each other.

Every run of the model takes one token of every row: the next token of a prompt, or the one just drawn. A row whose text
is finished gets the next request at once, so the batch stays full however different the texts are in length. All keys
and values live in one static cache, steering stays attached, and a row's strength is an entry of a tensor. Prompts are
read token by token in the same runs: with many rows a run costs what its arithmetic costs, so that nothing is lost.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import pysteer
from pysteer.errors import InputError
from pysteer.methods.base import check_choice
from pysteer.models.language import LanguageModel
from pysteer.recipes.transport.row_cache import RowCache
from pysteer.recipes.transport.sampling import Sampling, draw
from pysteer.steering import Handle, Plan


@dataclass(frozen=True)
class Request:
    """A text to be generated.

    Attributes:
        prompt: token ids, at least one.
        strength: of the steering; 0 for none.
        seed: of the random numbers its tokens are drawn with.
    """

    prompt: tuple[int, ...]
    strength: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """What was generated for a request: new token ids, the end token not included."""

    request: Request
    tokens: tuple[int, ...]


@dataclass
class _Row:
    """A row at work: how many tokens it was fed, and the random numbers of its request."""

    index: int
    request: Request
    numbers: Tensor
    fed: int = 0
    new: list[int] = field(default_factory=list)


class RowDecoder:
    """Generates for a language model.

    Args:
        lm: the model; a decoder of transformers.
        rows: most texts in work at a time.
        max_new_tokens: of a text.
        sampling: how tokens are drawn.
        skip: first tokens of every text that are not steered; 1 leaves the attention sink alone.
        position: "all", or "last": the last token of a prompt and every new one are steered.
        steered_new: how many new tokens are drawn under steering, the first ones; 0 for all. A topic that is under way
            goes on by itself, at no further cost.
        stop_at_end: end a text at the model's end token; otherwise every text has `max_new_tokens`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        rows: int = 64,
        max_new_tokens: int = 48,
        sampling: Sampling | None = None,
        skip: int = 1,
        position: str = "all",
        steered_new: int = 0,
        stop_at_end: bool = True,
    ) -> None:
        check_choice("position", position, ("all", "last"))
        numbers = (("rows", rows, 1), ("max_new_tokens", max_new_tokens, 1), ("skip", skip, 0))
        for what, value, least in (*numbers, ("steered_new", steered_new, 0)):
            if type(value) is not int or value < least:
                raise InputError(what, value=value, allowed=f"a whole number, at least {least}")
        self.lm, self.rows, self.max_new_tokens, self.skip = lm, rows, max_new_tokens, skip
        self.sampling, self.position, self.steered_new = sampling or Sampling(), position, steered_new
        self.ends = _end_tokens(lm) if stop_at_end else frozenset()
        self.attention = str(getattr(lm.model.config, "_attn_implementation", "eager"))
        if self.attention not in ("sdpa", "eager"):
            fix = 'load the model with attn_implementation="sdpa"'
            raise InputError("attention of the model", value=self.attention, allowed="sdpa, eager", fix=fix)
        names = inspect.signature(type(lm.model).forward).parameters
        self.cache_name = next((name for name in ("cache", "past_key_values") if name in names), "")
        if not self.cache_name:
            raise InputError("model", value=type(lm.model).__name__, allowed="a decoder language model with a cache")

    def run(self, requests: Sequence[Request], plan: Plan | None = None) -> Iterator[Generated]:
        """Generate all requests; results come in the order in which they finish, see `in_order`.

        Raises:
            InputError: a request without tokens, or one that does not fit the model's context; a strength without plan.
        """
        requests = list(requests)
        self._check(requests, plan)
        if plan is None:
            yield from self._batch(requests, None)
            return
        rows = min(self.rows, len(requests))
        with pysteer.steer(self.lm, plan, strength=torch.zeros(rows), capacity=rows) as handle:
            yield from self._batch(requests, handle)

    def strength_at(self, request: Request, place: int) -> float:
        """How strongly token `place` of a text is steered."""
        last = len(request.prompt) - 1
        first = max(self.skip, last) if self.position == "last" else self.skip
        over = self.steered_new and place >= last + self.steered_new
        return 0.0 if place < first or over else request.strength

    def _check(self, requests: Sequence[Request], plan: Plan | None) -> None:
        config = _text_config(self.lm)
        # One mask serves all layers: those with a window must see a text whole.
        known = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
        room = min((size for size in known if isinstance(size, int)), default=None)
        for request in requests:
            length = len(request.prompt) + self.max_new_tokens
            if not request.prompt or (room is not None and length > room):
                allowed = f"1 to {room - self.max_new_tokens if room else 'any number of'} tokens"
                raise InputError("length of a prompt", value=len(request.prompt), allowed=allowed)
            if request.strength != 0 and plan is None:
                raise InputError("strength without a plan", value=request.strength, allowed="0")

    @torch.no_grad()
    def _batch(self, requests: list[Request], handle: Handle | None) -> Iterator[Generated]:
        if not requests:
            return
        waiting = iter(requests)
        size = min(self.rows, len(requests))
        state = _State(self, size, max(len(request.prompt) for request in requests), handle)
        for index in range(size):
            state.start(index, next(waiting))
        left = len(requests)
        while left:
            logits = state.advance()
            for row in state.finished(logits):
                yield Generated(row.request, tuple(row.new))
                left -= 1
                following = next(waiting, None)
                if following is None:
                    state.idle(row.index)
                else:
                    state.start(row.index, following)


class _State:
    """The batch: cache, positions and the rows at work."""

    def __init__(self, decoder: RowDecoder, size: int, longest_prompt: int, handle: Handle | None) -> None:
        self.decoder, self.handle = decoder, handle
        lm = decoder.lm
        room = longest_prompt + decoder.max_new_tokens
        self.cache = RowCache(_text_config(lm).num_hidden_layers, size, room, lm.device)
        # Plain attention adds its mask to the scores.
        self.added = next(lm.model.parameters()).dtype if decoder.attention == "eager" else None
        self.rows: list[_Row | None] = [None] * size
        self.tokens = torch.zeros(size, room, dtype=torch.int64)  # on the CPU: written one by one
        self.steered: Tensor | None = None

    def start(self, index: int, request: Request) -> None:
        """Give row `index` a request."""
        generator = torch.Generator().manual_seed(request.seed)
        self.rows[index] = _Row(index, request, torch.rand(self.decoder.max_new_tokens, generator=generator))
        # Filled up with its own first token, so that the whole row can stand for the tokens it holds.
        self.tokens[index] = request.prompt[0]
        self.tokens[index, : len(request.prompt)] = torch.tensor(request.prompt)

    def idle(self, index: int) -> None:
        """Nothing is left for row `index`; it repeats its last place."""
        self.rows[index] = None

    def advance(self) -> Tensor:
        """Run the model over the next token of every row: logits `[R, V]` as the model gives them."""
        lm, device = self.decoder.lm, self.decoder.lm.device
        fed = torch.tensor([0 if row is None else row.fed for row in self.rows])
        self._steer(fed)
        ids = self.tokens.gather(1, fed[:, None]).to(device)
        positions = fed.to(device)
        self.cache.at(positions, int(fed.max()))
        given: dict[str, Any] = {self.decoder.cache_name: self.cache, "use_cache": True}
        out = lm.model(ids, attention_mask=self.cache.mask(self.added), position_ids=positions[:, None], **given)
        return out.logits[:, -1]

    def _steer(self, fed: Tensor) -> None:
        """Write the strengths where they changed: a row's own once its first tokens have passed."""
        if self.handle is None:
            return
        own = [0.0 if row is None else self.decoder.strength_at(row.request, row.fed) for row in self.rows]
        wanted = torch.tensor(own)
        if self.steered is None or not torch.equal(wanted, self.steered):
            self.handle.strength = self.steered = wanted

    def finished(self, logits: Tensor) -> list[_Row]:
        """Take the next token of every row that has read its prompt; the rows whose texts end with it."""
        drawing = [row for row in self.rows if row is not None and row.fed >= len(row.request.prompt) - 1]
        done = []
        if drawing:
            places = torch.tensor([row.index for row in drawing])
            numbers = torch.stack([row.numbers[len(row.new)] for row in drawing])
            chosen_logits = logits[places.to(logits.device)] if len(drawing) < len(self.rows) else logits
            device = logits.device
            held = self.tokens[places].to(device)
            drawn = draw(chosen_logits, held, numbers.to(device), self.decoder.sampling).tolist()
            done = [row for row, token in zip(drawing, drawn, strict=True) if self._take(row, token)]
        for row in self.rows:
            if row is not None:
                row.fed += 1
        return done

    def _take(self, row: _Row, token: int) -> bool:
        """Add a token to a row; whether its text is finished."""
        if token in self.decoder.ends:
            return True
        row.new.append(token)
        if len(row.new) == self.decoder.max_new_tokens:
            return True
        self.tokens[row.index, row.fed + 1] = token
        return False


def _text_config(lm: LanguageModel) -> Any:
    config = lm.model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _end_tokens(lm: LanguageModel) -> frozenset[int]:
    config = getattr(lm.model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    own = lm.tokenizer.eos_token_id
    return frozenset([*ends, *([] if own is None else [own])])


def in_order(
    decoder: RowDecoder,
    requests: Sequence[Request],
    plan: Plan | None = None,
    *,
    done: Callable[[int], object] | None = None,
) -> list[Generated]:
    """All requests generated, in their own order.

    Args:
        decoder: generates.
        requests: what.
        plan: steering; strengths are those of the requests.
        done: called with the number of finished texts, one by one.
    """
    places: dict[int, int] = {id(request): i for i, request in enumerate(requests)}
    if len(places) != len(requests):
        requests = [Request(r.prompt, r.strength, r.seed) for r in requests]
        places = {id(request): i for i, request in enumerate(requests)}
    found: list[Generated | None] = [None] * len(requests)
    for count, generated in enumerate(decoder.run(requests, plan), start=1):
        found[places[id(generated.request)]] = generated
        if done is not None:
            done(count)
    return [one for one in found if one is not None]
