"""`read_tokenizer`: the tokenizer of a checkpoint, or a one-line error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemo_r3.errors import UserError, describe
from nemo_r3.imports import importing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "tokenizer.model*", "vocab.*", "tekken.json", "*.tiktoken")
"""A checkpoint with a tokenizer has one of these; without any, transformers would make an empty tokenizer."""
SENTENCE = "What is broken may show only here."
"""A tokenizer has to give it back as it is. Of a byte-level tokenizer.json whose class is LlamaTokenizer, transformers
before 5.22 makes a tokenizer that drops all white space. Of a tokenizer.model alone it makes one that cuts texts into
other tokens than SentencePiece does, which the model was trained with."""


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Reads the tokenizer of a Hugging Face checkpoint directory; the network is never asked, and no Python of the
    checkpoint's runs: transformers would offer that at a terminal.

    Decoding leaves spaces as they are, even if the tokenizer's config asks to clean them up: "a , b" would become
    "a, b", and a verifier would judge what the model never said.

    Raises:
        UserError: the directory has none, or transformers cannot make one of its files that is true to text and tokens.
    """
    with importing():
        import transformers  # slow

    if not any(file for pattern in FILES for file in path.glob(pattern)):
        raise UserError(
            f"model.path: {path} has no tokenizer (no tokenizer.json, tokenizer.model or vocab.json); copy those of "
            "the model that it was made from"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False, clean_up_tokenization_spaces=False
        )
        ids = tokenizer.encode(SENTENCE, add_special_tokens=False, verbose=False)
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
    except Exception as error:  # of any type: transformers and tokenizers check little of what is in the files
        raise UserError(f"model.path: {path} has no tokenizer that can be read: {describe(error)}") from error
    if decoded != SENTENCE:
        raise UserError(
            f"model.path: {path} has a tokenizer that transformers misreads: it makes {decoded!r} of {SENTENCE!r}; if "
            'there is a tokenizer.json, try "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json'
        )
    model = path / "tokenizer.model"
    if model.exists() and not (path / "tokenizer.json").exists() and _ids_of_sentencepiece(model) not in (ids, None):
        raise UserError(
            f"model.path: transformers {transformers.__version__} does not cut texts as {model} says; put the "
            "tokenizer.json of the model that it was made from beside it"
        )
    return tokenizer


def _ids_of_sentencepiece(model: Path) -> list[int] | None:
    """What SentencePiece itself makes of the sentence; None if the file is of another kind."""
    from sentencepiece import SentencePieceProcessor

    try:
        ids: list[int] = SentencePieceProcessor(model_file=str(model)).encode(SENTENCE)
    except (OSError, RuntimeError):
        return None
    return ids
