#!/usr/bin/env bash
#SBATCH --job-name=llava-evaluate
#SBATCH --requeue
#SBATCH --open-mode=append
# Scores of the merged model: sbatch slurm/evaluate.sh [options of tools/evaluate]. Writes $LLAVA_RUNS/scores.json.

LLAVA_HOME=${LLAVA_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
source "$LLAVA_HOME/slurm/common.sh"
LLAVA_SELF=(slurm/evaluate.sh "$@")
llava_enter "${LLAVA_SELF[@]}"

llava_require "$LLAVA_RUNS/stage2" "$LLAVA_RUNS/merged/COMPLETE" "there is no merged model"
llava_step "$LLAVA_RUNS/scores.json" python tools/evaluate "$LLAVA_RUNS/merged" --json "$LLAVA_RUNS/scores.json" "$@"
