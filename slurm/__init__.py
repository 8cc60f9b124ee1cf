"""Slurm: `train.sh` is the batch script, `rank.sh` what srun starts; `launch` chains jobs to a whole experiment."""
