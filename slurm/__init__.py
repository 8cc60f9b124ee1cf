"""Slurm: `train.sh` is the batch script, `rank.sh` is what srun starts; `launch` chains jobs to a whole experiment."""
