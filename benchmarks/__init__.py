"""What nemo_r3 costs, measured."""
