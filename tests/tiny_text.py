"""A tiny random language model with a tokenizer of words, in a folder that any recipe can load."""

from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

FILLERS = [f"w{i}" for i in range(40)]
SUBJECTS = [f"s{i}" for i in range(8)]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *FILLERS, *SUBJECTS, "football", "stadium", "once", "there", "the"]


def save_tiny_model(folder: Path) -> Path:
    """Write the model and its tokenizer into `folder`."""
    torch.manual_seed(3)
    config = tf.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = tf.LlamaForCausalLM(config)
    model.lm_head.weight.data.mul_(20)  # so that tokens are told apart as by a trained model
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tf.PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(folder)
    return folder


def sentences(count: int, about: str, seed: int) -> list[str]:
    """Sentences of random words; those about something hold it twice."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(4, 9, (1,), generator=generator))
        picks = torch.randint(len(FILLERS), (length,), generator=generator).tolist()
        words = [FILLERS[i] for i in picks]
        found.append(" ".join([words[0], about, *words[1:], about] if about else words))
    return found
