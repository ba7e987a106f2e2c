#!/usr/bin/env bash
#SBATCH --job-name=llava-stage2
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# Stage 2, end to end, from what stage 1 left: sbatch slurm/stage2.sh [--set key=value ...]. Writes $LLAVA_RUNS/stage2.

LLAVA_HOME=${LLAVA_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
source "$LLAVA_HOME/slurm/common.sh" || { echo "call sbatch from the repository, or set LLAVA_HOME to it" >&2; exit 1; }
LLAVA_SELF=(slurm/stage2.sh "$@")
llava_enter "${LLAVA_SELF[@]}"

llava_train_from_stage1 stage2 "${LLAVA_STAGE2_RECIPE:-quickstart_stage2}" "$@"
