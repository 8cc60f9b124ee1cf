#!/usr/bin/env bash
# What train.sh's srun starts on the nodes: a rank, or with cluster.launcher=torchrun a node's torchrun, which starts
# this again for each of its ranks. Beside a rank's log it leaves its exit code, host and time: srun's own exit code
# mixes those of all ranks, and torchrun's says nothing.
#
# Slurm signals this script alone, or every process of a step, by its proctrack plugin. So a signal is passed on, and a
# rank takes two within seconds for one. One that comes before the rank listens is in $LOGS/stop, where it looks.
set -u

child='' launches=
[ "$LAUNCHER" = torchrun ] && [ -z "${RANK:-}" ] && launches=yes

forward() {
    : >"$LOGS/stop"
    [ -n "$child" ] || return
    local ranks=$child
    [ -z "$launches" ] || ranks=$(cat "/proc/$child/task/$child/children" 2>/dev/null)
    # shellcheck disable=SC2086  # several process ids
    [ -z "$ranks" ] || kill -USR1 $ranks 2>/dev/null
}
trap forward USR1 TERM

run() { # a command that does not hear the signals until it listens itself; its exit code
    (trap '' USR1 TERM && exec "$@") &
    child=$!
    while wait "$child"; kill -0 "$child" 2>/dev/null; do :; done # a signal ends a wait early
    wait "$child"
}

if [ -n "$launches" ]; then
    # what torchrun starts inherits its ignored signals, which no shell could trap
    run python3 -m torch.distributed.run --no-python \
        --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$RANKS_PER_NODE" \
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
        env --default-signal=USR1,TERM bash slurm/rank.sh "$@"
    exit
fi

rank=${RANK:-$SLURM_PROCID}
{ # bash reads a block whole: the file may be edited while the rank runs
    run python3 -m slurm.rank "$@" >>"$LOGS/rank_$rank.log" 2>&1
    code=$?
    echo "$code $SLURMD_NODENAME $(date +%s.%N)" >"$LOGS/rank_$rank.exit"
    exit "$code"
}
