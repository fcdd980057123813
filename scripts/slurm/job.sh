# shellcheck shell=bash
# What run.sbatch and array.sbatch share: where the ranks meet, srun, and what an exit code asks for.
root=${VLP_ROOT:-$PWD}

fail() {
  echo "$1" >&2
  exit 78
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "This is a batch script: sbatch [options] scripts/slurm/run.sbatch +experiment=NAME ..."
python=${VLP_PYTHON:-$root/.venv/bin/python}
[ -x "$(command -v "$python")" ] || fail "There is no Python at '$python': run 'make setup' once, or set VLP_PYTHON."

# An element of an array has a job id of its own, and one of them has the array's: only this form means one element.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}

set_meeting_point() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  if [ -z "${MASTER_ADDR:-}" ]; then  # the address by which SLURM itself reaches the node
    MASTER_ADDR=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
  fi
  export MASTER_ADDR=${MASTER_ADDR:-$first}
  export MASTER_PORT=${VLP_MASTER_PORT:-$((12000 + SLURM_JOB_ID % 20000))}  # below the ports that systems hand out
}

set_end_of_time() {  # older versions of SLURM do not say it
  local end
  [ -z "${SLURM_JOB_END_TIME:-}" ] || return 0
  end=$(SLURM_TIME_FORMAT=standard squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) || return 0
  if end=$(date -d "$end" +%s 2>/dev/null); then export SLURM_JOB_END_TIME=$end; fi
}

# train ARGUMENTS...: run train.py on every task of the job; leaves its exit code in $code.
train() {
  local nodes=$SLURM_JOB_NUM_NODES tasks=${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}
  [ $((tasks % nodes)) -eq 0 ] || fail "$tasks tasks cannot be spread evenly over $nodes nodes; use --ntasks-per-node."
  set_meeting_point
  set_end_of_time
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not inherit it
  echo "job $job, restart ${SLURM_RESTART_COUNT:-0}: $tasks tasks on $SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT"
  # A rank that saved and left with 75 must not take the others with it while they are still writing.
  srun --ntasks="$tasks" --kill-on-bad-exit=0 "$python" "$root/train.py" \
    "trainer.num_nodes=$nodes" "trainer.devices=$((tasks / nodes))" "$@" && code=0 || code=$?
}

# finish CODE ARGUMENTS...: queue the job again where the exit code asks for it, and leave with the code.
finish() {
  local code=$1
  shift
  case $code in
    0) ;;
    75) requeue "stopped by a signal, state saved" ;;
    138) requeue "stopped by USR1 before the first step" ;;
    80) if PYTHONPATH=$root "$python" -m vlp.training.requeue "$@"; then requeue "the ranks lost each other"; fi ;;
    *) echo "exit code $code: not queued again; docs/cluster.md says what it means." >&2 ;;
  esac
  exit "$code"
}

requeue() {
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "${VLP_MAX_REQUEUES:-100}" ]; then
    echo "$1; not queued again: that was restart ${SLURM_RESTART_COUNT:-0}, the most that VLP_MAX_REQUEUES allows." >&2
  elif scontrol requeue "$job"; then
    echo "$1; job $job is queued again."
  else
    echo "$1; SLURM does not queue job $job again; submit it again, the run continues." >&2
  fi
}
