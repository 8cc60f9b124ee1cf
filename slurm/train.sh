#!/usr/bin/env bash
#SBATCH --job-name=nemo_r3
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600

# Trains on Slurm; run it from the repository's root. docs/slurm.md says more.
#   sbatch [OPTIONS] slurm/train.sh [CONFIG.yaml key=value ...]
#   bash slurm/train.sh --print CONFIG.yaml key=value ...      the sbatch line for a config: #SBATCH cannot read one
set -uo pipefail

printing=
[ "${1-}" = --print ] && printing=yes && shift
[ $# -gt 0 ] || set -- configs/quickstart.yaml

# sbatch runs a copy of this file, so $0 does not say where the repository is
[ -n "$printing" ] || cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
if [ ! -f slurm/train.sh ]; then
    echo "error: $PWD is not the repository's root: go there, then run or submit slurm/train.sh" >&2
    exit 2
fi
[ ! -x .venv/bin/python3 ] || PATH=$PWD/.venv/bin:$PATH
python=${BATCH_PYTHON:-python3} # a chain's jobs go on with the Python that launched it
if ! wrong=$("$python" -c 'import sys, omegaconf; sys.exit(sys.version_info < (3, 11))' 2>&1); then
    echo "error: $(command -v "$python" || echo "$python") needs to be Python 3.11 or later with omegaconf: activate such an" \
        "environment before you submit; cluster.setup prepares the ranks alone${wrong:+ (${wrong##*$'\n'})}" >&2
    exit 2
fi
[ -z "$printing" ] || exec "$python" -m slurm.job print "$@"
if [ -z "${SLURM_JOB_ID-}" ]; then
    echo "error: there is no Slurm job around this: submit it with sbatch, or use --print" >&2
    exit 2
fi

RECIPE=${RECIPE:-train} # a chain's other stages name theirs
if [ ! -f "recipes/$RECIPE.py" ]; then
    echo "error: RECIPE=$RECIPE: there is no recipes/$RECIPE.py" >&2
    exit 2
fi

step='' stop=''
forward() { # once: a second signal ends a rank before it has saved
    [ -z "$stop" ] || return
    stop=yes
    [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null
}
trap forward USR1 TERM

# LOGS LAUNCHER RANKS_PER_NODE THREADS SETUP CONTAINER NODE_STEP RANK_STEP HEALTH_MINUTES HEALTH, quoted for the shell
settings=$("$python" -m slurm.job begin "$@") || exit 2
eval "$settings"

unset RANK LOCAL_RANK WORLD_SIZE
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # below the ports that Linux gives to clients
export RECIPE LOGS LAUNCHER RANKS_PER_NODE MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$THREADS}" NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

prepared=(bash -ec "$SETUP"$'\nexec "$@"' setup) # runs a command after the line of cluster.setup
srun=(srun --export=ALL "${CONTAINER[@]}")

code=0
timeout "${HEALTH_MINUTES}m" "${srun[@]}" "${NODE_STEP[@]}" \
    "${prepared[@]}" python3 -m slurm.health "${HEALTH[@]}" >"$LOGS/health.log" || code=$?

if [ -n "$stop" ]; then
    code=75
elif [ "$code" = 0 ]; then
    "${srun[@]}" --kill-on-bad-exit=1 --distribution=block "${RANK_STEP[@]}" "${prepared[@]}" bash slurm/rank.sh "$@" &
    step=$!
    [ -z "$stop" ] || kill -USR1 "$step" 2>/dev/null # it came between the check and here
    tail -n +1 -F --pid="$step" "$LOGS/rank_0.log" 2>/dev/null &
    shown=$!
    while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done # a signal ends a wait early
    wait "$step"
    code=$?
    wait "$shown"
    # in cluster.setup a signal ends a task that is not a rank yet
    [ -z "$stop" ] || compgen -G "$LOGS/rank_*.exit" >/dev/null || code=75
fi

trap '' USR1 TERM
if [ "${#CONTAINER[@]}" -gt 0 ]; then # pyxis by itself keeps what has a name, beyond the job
    timeout 60 srun "${NODE_STEP[@]}" enroot remove --force "pyxis_nemo_r3_$SLURM_JOB_ID" >/dev/null 2>&1
fi
"$python" -m slurm.job end "$code" "$LOGS/config.yaml"
