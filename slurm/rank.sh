#!/usr/bin/env bash
# One rank: runs a command and keeps its output, each line with its time, in the folder of the start.
# Rank 0 is also heard in the job's output. A rank that is killed leaves a word of it.
trap '' USR1 TERM # the command handles them; this shell has to live until its last line is written

rank=$(printf '%05d' "$SLURM_PROCID")
log=${LLAVA_DS_START:-.}/${LLAVA_STEP:+$LLAVA_STEP-}rank-$rank.log

stamp() {
  local line now
  while IFS= read -r line || [ -n "$line" ]; do
    now=${EPOCHREALTIME/,/.}
    printf '%(%Y-%m-%dT%H:%M:%S)T.%s %s\n' "${now%.*}" "${now#*.}" "$line"
  done
}

if [ "$SLURM_PROCID" = 0 ]; then
  "$@" 2>&1 | stamp | tee -a "$log"
else
  "$@" 2>&1 | stamp >>"$log"
fi
code=${PIPESTATUS[0]}
if [ "$code" -gt 128 ] && [ ! -e "$LLAVA_DS_START/failed-$rank.json" ] && [ -z "${LLAVA_STEP:-}" ]; then
  signal=$((code - 128)) why=
  [ $signal = 9 ] && why='; the machine was short of memory, or someone killed it'
  printf '{"rank": %d, "error": "Killed", "message": "killed by signal %d%s", "host": "%s", "time": %s}\n' \
    "$SLURM_PROCID" "$signal" "$why" "$(hostname)" "${EPOCHREALTIME/,/.}" >"$LLAVA_DS_START/failed-$rank.json"
fi
exit "$code"
