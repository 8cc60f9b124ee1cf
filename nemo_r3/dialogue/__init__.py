"""The turns of a trajectory as token ids, spliced around what vLLM sampled.

    [system, user turn, generation prompt] sampled [close, user turn, generation prompt] sampled ...
     `-- text, tokenised once -----------'          `-- text, tokenised once ---------'

Text comes from the model's own chat template. Sampled ids are never decoded and tokenised again, so a longer trajectory
begins with exactly the ids of the shorter one. Whether a template allows that is found out at set-up, by rendering
marked turns. No torch, no vLLM.
"""

from nemo_r3.dialogue.tokenizer import read_tokenizer
from nemo_r3.dialogue.turns import Dialogue, stop_token_ids

__all__ = ["Dialogue", "read_tokenizer", "stop_token_ids"]
