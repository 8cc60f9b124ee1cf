"""Dr. GRPO (arXiv 2503.20783): GRPO whose loss and advantages are not divided by lengths and spreads."""

from nemo_r3.algo.advantages import Advantage
from nemo_r3.algo.aggregation import Aggregation
from nemo_r3.algo.losses.grpo import policy_loss as policy_loss

AGGREGATION = Aggregation.LIMIT_MEAN
ADVANTAGE = Advantage.CENTRED
CLIP = (0.2, 0.2)
