#!/usr/bin/env bash
# Everything, one job after the other: slurm/pipeline.sh (data, stage 1, stage 2, merge, evaluation).
#
# A job starts when the one before has ended, however that was, and looks for the file that the other writes last. An exit
# code would not do: a launcher may return 0 for a run that was killed, and a job that is requeued has not ended.
LLAVA_HOME=${LLAVA_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
source "$LLAVA_HOME/slurm/common.sh" || { echo "call sbatch from the repository, or set LLAVA_HOME to it" >&2; exit 1; }
llava_load_settings

submitted=()
after() { # script, further settings...: submits it after the one before
  local script=$1 job
  shift
  job=$(env "$@" LLAVA_HOME="$LLAVA_HOME" bash -c 'source "$LLAVA_HOME/slurm/common.sh"; llava_load_settings
    llava_submit "$@"' _ "slurm/$script.sh" ${submitted[@]+--dependency=afterany:${submitted[-1]}})
  [ -n "$job" ] || { echo "$script was not submitted; cancel the others with: scancel ${submitted[*]-}" >&2; exit 1; }
  submitted+=("$job")
  echo "job $job: $script"
}

one=(LLAVA_NODES=1 LLAVA_TASKS_PER_NODE=1)
after generate "${one[@]}" LLAVA_GPUS_PER_NODE="${LLAVA_GPUS_OF_SMALL_JOBS-}"
after stage1 LLAVA_CHAIN=1
after stage2
after merge "${one[@]}" LLAVA_GPUS_PER_NODE="${LLAVA_GPUS_OF_SMALL_JOBS-}"
after evaluate LLAVA_EVALUATE= # of what it merged
echo "tools/jobs $LLAVA_RUNS shows how they go"
