#!/usr/bin/env bash
#SBATCH --job-name=llava-evaluate
#SBATCH --requeue
#SBATCH --open-mode=append
# Scores of the merged model, or of the checkpoint $LLAVA_EVALUATE: sbatch slurm/evaluate.sh [options of tools/evaluate].
# All ranks of the job share the questions. Writes $LLAVA_RUNS/predictions.jsonl, from which a job that starts again goes
# on, and $LLAVA_RUNS/scores.json; their names also have the checkpoint's and the task's, where these are given:
# scores-scienceqa-scienceqa.json of LLAVA_EVALUATE=runs/scienceqa and --task scienceqa.

LLAVA_HOME=${LLAVA_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}
source "$LLAVA_HOME/slurm/common.sh" || { echo "call sbatch from the repository, or set LLAVA_HOME to it" >&2; exit 1; }
LLAVA_SELF=(slurm/evaluate.sh "$@")
llava_enter "${LLAVA_SELF[@]}"

of=${LLAVA_EVALUATE:+-$(basename "$LLAVA_EVALUATE")}
[[ " $* " =~ \ --task[\ =]([a-z_]+)\  ]] && of+=-${BASH_REMATCH[1]}
[ -n "${LLAVA_EVALUATE:-}" ] ||
  llava_require "$LLAVA_RUNS/stage2" "$LLAVA_RUNS/merged/COMPLETE" "nothing is merged (slurm-*-llava-merge.out says why)"
llava_step_on_all "$LLAVA_RUNS/scores$of.json" python tools/evaluate "${LLAVA_EVALUATE:-$LLAVA_RUNS/merged}" \
  --predictions "$LLAVA_RUNS/predictions$of.jsonl" --json "$LLAVA_RUNS/scores$of.json" "$@"
