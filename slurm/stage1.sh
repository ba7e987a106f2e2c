#!/usr/bin/env bash
#SBATCH --job-name=llava-stage1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# Stage 1, feature alignment: sbatch slurm/stage1.sh [--set key=value ...]. Writes $LLAVA_RUNS/stage1.

LLAVA_HOME=${LLAVA_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
source "$LLAVA_HOME/slurm/common.sh" || { echo "call sbatch from the repository, or set LLAVA_HOME to it" >&2; exit 1; }
LLAVA_SELF=(slurm/stage1.sh "$@")
llava_enter "${LLAVA_SELF[@]}"

[ -z "${LLAVA_CHAIN:-}" ] || llava_require "$LLAVA_RUNS/stage1" "$LLAVA_RUNS/prepared.json" "the data are not prepared (slurm-*-llava-generate.out says why)"
llava_train stage1 "${LLAVA_STAGE1_RECIPE:-quickstart_stage1}" "$@"
