#!/bin/bash
# Execute one run directory in this allocation: one python per rank. What every job of this project ends in.
#
#   bash slurm/execute.sh runs/dev/beta=0.1 [python, or what runs it in a container]
#
# A run that is told to stop (SIGUSR1 before the time limit, SIGTERM when the scheduler wants the nodes) saves and exits
# with 75: the job goes back to the queue, RESTARTS times at most, and resumes. All that it says is in log.txt.
set -u
directory=$1
shift
[ -f "$directory/config.yaml" ] || { echo "$directory must be a run directory, it has no config.yaml" >&2; exit 1; }
exec >> "$directory/log.txt" 2>&1
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"

# SLURM_JOB_ID is another one for each task of an array, and so is the port.
[ "${SLURM_JOB_NUM_NODES:-1}" -eq 1 ] && MASTER_ADDR=127.0.0.1
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
for name in OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS RAYON_NUM_THREADS; do
    export $name="${!name:-${SLURM_CPUS_PER_TASK:-1}}"
done

# The signals are for the ranks. Bash must outlive them to requeue, and runs a trap once srun has ended; python must
# not die of one before it listens.
trap : TERM USR1
rm -f "$directory/error.json" # of a former attempt; the ranks cannot tell it from one that another of them just wrote
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 bash -c '
    trap "" USR1
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS PYTHONUNBUFFERED=1
    exec "$@"' _ "${@:-python}" -m dpo.sweep.execute "$directory"
code=$?

# The highest exit code is srun's: that of a rank which was still ending when it was killed, maybe.
if [ $code -eq 75 ] || { [ $code -gt 128 ] && grep -qs '"type": "Stopped"' "$directory/error.json"; }; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${RESTARTS:-100}" ]; then
        echo "not requeued: ${RESTARTS:-100} restarts are enough; submit it again to go on"
    elif scontrol show job --oneliner "$SLURM_JOB_ID" | grep -qE "JobState=(RUNNING|PREEMPTED)" \
            && scontrol requeue "$SLURM_JOB_ID"; then # what was cancelled stays so
        sleep 60 # until Slurm ends this script, which must not end before
    fi
elif [ $code -ne 0 ] && [ $code -ne 73 ] && [ ! -e "$directory/error.json" ]; then
    why="exit code $code, and it did not say why"
    [ $code -gt 128 ] && why="killed by signal $((code - 128))"
    [ $code -eq 137 ] && why="$why (out of memory?)"
    echo "{\"type\": \"Killed\", \"message\": \"$why\", \"traceback\": \"\"}" > "$directory/error.json"
fi
exit $code
