#!/usr/bin/env bash
#SBATCH --job-name=llava-merge
#SBATCH --requeue
#SBATCH --open-mode=append
# What stage 2 trained, as one folder: sbatch slurm/merge.sh. Writes $LLAVA_RUNS/merged.

LLAVA_HOME=${LLAVA_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
source "$LLAVA_HOME/slurm/common.sh" || { echo "call sbatch from the repository, or set LLAVA_HOME to it" >&2; exit 1; }
LLAVA_SELF=(slurm/merge.sh "$@")
llava_enter "${LLAVA_SELF[@]}"

llava_require "$LLAVA_RUNS/stage2" "$LLAVA_RUNS/stage2/FINISHED" "stage 2 is not finished"
llava_step "$LLAVA_RUNS/merged/COMPLETE" python tools/merge_ckpt "$LLAVA_RUNS/stage2" "$LLAVA_RUNS/merged"
