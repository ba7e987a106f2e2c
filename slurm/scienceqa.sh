#!/usr/bin/env bash
#SBATCH --job-name=llava-scienceqa
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# The ScienceQA run, from what stage 1 left: sbatch slurm/scienceqa.sh [--set key=value ...]. Writes $LLAVA_RUNS/scienceqa.

LLAVA_HOME=${LLAVA_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
source "$LLAVA_HOME/slurm/common.sh" || { echo "call sbatch from the repository, or set LLAVA_HOME to it" >&2; exit 1; }
LLAVA_SELF=(slurm/scienceqa.sh "$@")
llava_enter "${LLAVA_SELF[@]}"

llava_train_from_stage1 scienceqa "${LLAVA_SCIENCEQA_RECIPE:-paper_scienceqa_7b}" "$@"
