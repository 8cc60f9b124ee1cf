#!/usr/bin/env bash
# What train.sh's srun starts on the nodes: a rank, or with cluster.launcher=torchrun a node's torchrun, which starts
# this again for each of its ranks. Beside a rank's log it leaves its exit code, host and time: srun's own exit code
# mixes those of all ranks, and torchrun's says nothing.
set -u
trap '' USR1 TERM # Slurm signals every process of a step; the rank, once it listens, is the one to act

if [ "$LAUNCHER" = torchrun ] && [ -z "${RANK:-}" ]; then
    exec python3 -m torch.distributed.run --no-python \
        --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$RANKS_PER_NODE" \
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" bash slurm/rank.sh "$@"
fi

rank=${RANK:-$SLURM_PROCID}
python3 -m slurm.rank "$@" >>"$LOGS/rank_$rank.log" 2>&1
code=$?
echo "$code $SLURMD_NODENAME $(date +%s.%N)" >"$LOGS/rank_$rank.exit"
exit "$code"
