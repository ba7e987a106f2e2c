#!/usr/bin/env bash
#SBATCH --job-name=llava-generate
#SBATCH --requeue
#SBATCH --open-mode=append
# The data and models of the recipes, made or looked for on one node: sbatch slurm/generate.sh.
# LLAVA_GENERATE is a command that makes the data first. Writes $LLAVA_RUNS/prepared.json.

LLAVA_HOME=${LLAVA_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
source "$LLAVA_HOME/slurm/common.sh" || { echo "call sbatch from the repository, or set LLAVA_HOME to it" >&2; exit 1; }
LLAVA_SELF=(slurm/generate.sh "$@")
llava_enter "${LLAVA_SELF[@]}"

llava_step "$LLAVA_RUNS/prepared.json" bash -c 'set -e; eval "${LLAVA_GENERATE:-:}"; exec python tools/prepare --json "$@"' _ \
  "$LLAVA_RUNS/prepared.json" "${LLAVA_STAGE1_RECIPE:-quickstart_stage1}" "${LLAVA_STAGE2_RECIPE:-quickstart_stage2}"
