"""Slurm: `train.sh` is the batch script, `rank.sh` what srun starts, the modules what needs more than shell."""
