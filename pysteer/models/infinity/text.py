"""Text conditioning with a T5 encoder from transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pysteer.errors import InputError
from pysteer.models.infinity.transformer import TextCondition


@torch.no_grad()
def encode_text(encoder: Any, tokenizer: Any, prompts: Sequence[str], max_length: int) -> TextCondition:
    """Hidden states of a T5 encoder for ``prompts``: fp32 ``[B, T, C]``, T = the longest prompt's tokens.

    The tokenizer appends its end token; longer prompts are cut to ``max_length`` tokens, as the published code does.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise InputError("prompts", value=prompts, allowed="a list with at least one string")
    device = next(encoder.parameters()).device
    batch = tokenizer(list(prompts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    return TextCondition(hidden, mask.sum(-1).to(torch.int64))
