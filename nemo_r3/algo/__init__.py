"""From rewards to a loss: pure Python and torch, runs anywhere."""
