"""The models that the probe's engine and its references read."""

from __future__ import annotations

from pathlib import Path

import torch
from byte_level import CHAT, trained
from families import TINY
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_models(home: Path) -> None:
    """Two tied Llamas, a and b, with 307 rows in the embedding: more than tokens, and a multiple of nothing."""
    special = ("<|end|>", "<|user|>", "<|assistant|>", "<|pad|>")
    tokenizer = trained(["say one two three, what went wrong? try again"] * 5, 300, special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT
    sizes = TINY | {"vocab_size": 307, "max_position_embeddings": 512, "eos_token_id": 0, "pad_token_id": 3}
    shape = LlamaConfig(**sizes, tie_word_embeddings=True, initializer_range=0.15)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        LlamaForCausalLM(shape).float().save_pretrained(home / name)
        fast.save_pretrained(home / name)
