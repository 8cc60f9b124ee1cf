"""The model families that count as supported: one line each, which the tests of actor, refit and README.md read.

Every line becomes two tiny checkpoints of random weights with 131 tokens, which tensor parallelism has to pad: one with
a tied and one with a head of its own. `python tests/families.py` rewrites the table in README.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"
MARKS = "<!-- families: begin -->", "<!-- families: end -->"
VOCAB = 131
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
    "original_max_position_embeddings": 64
}
LONG = {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 64}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
NOPE = {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 0, 1]}  # on each of two stages in another place
IDS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
"""For classes whose own are beyond so small a vocabulary."""
SHORT = {"max_position_embeddings": 512, "original_max_position_embeddings": 256}


def longrope(pairs: int) -> dict[str, Any]:
    """Short and long factors that no position could take for each other."""
    return {
        "rope_type": "longrope",
        "short_factor": [1 + pair / 8 for pair in range(pairs)],
        "long_factor": [1.5**pair for pair in range(pairs)],
    }


@dataclass(frozen=True)
class Family:
    """A family's rotary positions and what else is its own."""

    name: str  # of its checkpoints, with "_tied" appended for the tied one
    hf: str  # how transformers calls it
    models: str  # the published ones that it stands for
    rope: str  # its rotary positions, in words
    settings: dict[str, Any]  # what its config.json has beside `TINY`


FAMILIES = (
    Family("llama", "Llama", "Llama 2 and 3, and what else is saved as such", "plain", {"num_hidden_layers": 4}),
    Family("llama3", "Llama", "Llama 3.1, 3.2 and 3.3", "llama3", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    Family("mistral", "Mistral", "Mistral 7B", "plain", {"rope_theta": 1e6, "sliding_window": 256}),
    Family("phi3_short", "Phi3", "Phi-3, Phi-3.5", "longrope, short", {"rope_scaling": longrope(16)} | IDS | SHORT),
    Family("phi3_long", "Phi3", "Phi-3, 3.5, 4 mini", "longrope, long", {"rope_scaling": longrope(8)} | IDS | LONG),
    Family("qwen2", "Qwen2", "Qwen2, Qwen2.5", "plain", {"rope_theta": 1e6}),
    Family("qwen3", "Qwen3", "Qwen3 without experts", "plain", {"rope_theta": 1e6, "head_dim": 64}),
    Family("qwen3_moe", "Qwen3Moe", "Qwen3 with experts", "plain", {"rope_theta": 1e6, "head_dim": 64} | EXPERTS),
    Family("smollm3", "SmolLM3", "SmolLM3", "plain, none in some layers", NOPE | IDS),
)
KINDS = {f"{family.name}{head}": family for family in FAMILIES for head in ("", "_tied")}
IN_FULL = ("llama_tied", "llama", "qwen2_tied", "qwen2", "qwen3_moe")
TRIED = {"one": IN_FULL, "tp2": IN_FULL, "tp2pp2": ("llama_tied", "qwen2")}
"""By layout, the kinds of which actor/test_policy.py tries all that actor/test_families.py asks of the others."""
UNTRIED = [(layout, kind) for layout, tried in TRIED.items() for kind in KINDS if kind not in tried]


def make_checkpoint(path: Path, kind: str) -> torch.nn.Module:
    """Writes the tiny checkpoint of a kind and returns transformers' model of it."""
    import transformers  # slow

    family = KINDS[kind]
    settings = TINY | family.settings | {"tie_word_embeddings": kind.endswith("_tied")}
    hf_config = getattr(transformers, f"{family.hf}Config")(**settings)
    torch.manual_seed(list(KINDS).index(kind))
    model = transformers.AutoModelForCausalLM.from_config(
        hf_config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2 if parameter.ndim == 1 else 0.1)
    model.save_pretrained(path)
    return model


def table() -> str:
    lines = ["| in `architectures` | models | rotary positions |", "|---|---|---|"]
    lines += [f"| `{family.hf}ForCausalLM` | {family.models} | {family.rope} |" for family in FAMILIES]
    return "\n".join(lines)


def rewritten(readme: str) -> str:
    begin, end = MARKS
    before, rest = readme.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{table()}\n{end}{after}"


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
