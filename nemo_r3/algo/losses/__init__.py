"""Policy losses, one file each, found by the name in `algo.loss`."""
