"""The families whose turns are held in golden files: a template as each documents it, and a tokenizer of bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

JSON_CALLS = '[{"name": "get_time", "arguments": {"city": "Oslo"}}]'
HERMES_CALLS = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Oslo"}}\n</tool_call>'
LLAMA_CALLS = '{"name": "get_time", "parameters": {"city": "Oslo"}}'


@dataclass(frozen=True)
class Family:
    template: str  # a file of templates/
    end: str  # the token that ends an assistant's turn
    eos: str | None = None  # the tokenizer's end of sequence, where it is another one
    bos: str | None = None
    special: tuple[str, ...] = ()  # further special tokens
    added: tuple[str, ...] = ()  # added tokens that are not special: decoding keeps them
    settings: dict[str, Any] = field(default_factory=dict)  # of `dialogue`
    way: str = "plain"  # how tools are offered
    calls: str = JSON_CALLS  # how the model calls a function when they are
    space: str = ""  # what a model writes first in a turn

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Bytes, and the family's own tokens."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([self.end, *self.special])
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in self.added])
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=self.eos or self.end, bos_token=self.bos)
        made.chat_template = (HERE / "templates" / f"{self.template}.jinja").read_text()
        return made


CALLS_IN_TAGS: dict[str, Any] = {"way": "template", "calls": HERMES_CALLS}
TOOL_CALL = ("<tool_call>", "</tool_call>")
CHATML = ("<|im_start|>", "<|endoftext|>")
HERMES = str(ROOT / "configs" / "templates" / "hermes.jinja")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>")

FAMILIES = {
    "qwen2": Family("qwen2", "<|im_end|>", special=CHATML),
    "qwen2-hermes": Family("qwen2", "<|im_end|>", special=CHATML, settings={"chat_template": HERMES}, **CALLS_IN_TAGS),
    "qwen2.5": Family("qwen2.5", "<|im_end|>", special=CHATML, added=TOOL_CALL, **CALLS_IN_TAGS),
    "qwen3": Family(
        *("qwen3", "<|im_end|>"),
        special=CHATML,
        added=(*TOOL_CALL, "<think>", "</think>"),
        settings={"template_options": {"enable_thinking": False}},
        **CALLS_IN_TAGS,
    ),
    "qwen3-thinks": Family(
        *("qwen3", "<|im_end|>"),
        special=CHATML,
        added=(*TOOL_CALL, "<think>", "</think>"),
        settings={"chat_template": HERMES, "system": "Think first."},
        space="<think>\nLet me see.\n</think>\n\n",
        **CALLS_IN_TAGS,
    ),
    "llama3": Family(
        "llama3", "<|eot_id|>", bos="<|begin_of_text|>", special=LLAMA3, way="template", calls=LLAMA_CALLS
    ),
    "phi3.5": Family(
        "phi3.5", "<|end|>", eos="<|endoftext|>", special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>")
    ),
    "mistral": Family("mistral", "</s>", bos="<s>", special=("<s>", "[INST]", "[/INST]", "[TOOL_CALLS]"), space=" "),
    "plain": Family("plain", "</s>"),
}
