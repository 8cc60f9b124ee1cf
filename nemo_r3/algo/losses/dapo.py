"""DAPO (arXiv 2503.14476, equation 8): GRPO's loss with a wider clip above 1, every token alike.

Its overlong masking is `algo.mask_truncated`. Its dynamic sampling is not here: it samples until the batch is full of
groups with both outcomes, whereas `build_update` leaves the other groups out and trains on fewer.
"""

from nemo_r3.algo.advantages import Advantage
from nemo_r3.algo.aggregation import Aggregation
from nemo_r3.algo.losses.grpo import policy_loss as policy_loss

AGGREGATION = Aggregation.TOKEN_MEAN
ADVANTAGE = Advantage.STD
CLIP = (0.2, 0.28)
