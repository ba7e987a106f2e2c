#!/usr/bin/env bash
# One rank: runs a command and keeps its output, each line with its time, in the folder of the start.
# Rank 0 is also heard in the job's output. A rank that is killed leaves a word of it.
ulimit -Sn "$(ulimit -Hn)" # rank 0 holds some connections of every rank
trap '' USR1 TERM # the command handles them; this shell has to live until its last line is written

rank=$(printf '%05d' "$SLURM_PROCID")
log=${LLAVA_DS_START:-.}/${LLAVA_STEP:+$LLAVA_STEP-}rank-$rank.log

moment() { # seconds since 1970 with six digits after the point
  local now=${EPOCHREALTIME:-}
  [ -n "$now" ] || printf -v now '%(%s)T.000000' -1 # bash before 5.0
  moment=${now/,/.}
}

stamp() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    moment
    printf -v line '%(%Y-%m-%dT%H:%M:%S)T.%s %s' "${moment%.*}" "${moment#*.}" "$line"
    echo "$line" >&3
    [ "$SLURM_PROCID" != 0 ] || echo "$line"
  done
}

if ! { exec 3>>"$log"; } 2>/dev/null; then
  echo "rank $SLURM_PROCID on $(hostname): $log cannot be written; LLAVA_RUNS has to be a folder that all nodes see" >&2
  exit 1
fi
exec {out}> >(stamp 2>/dev/null)
stamper=$!
"$@" >&"$out" 2>&1 3>&- &
exec 3>&- {out}>&-
wait $!
code=$?
if [ "$code" -gt 128 ] && [ ! -e "$LLAVA_DS_START/failed-$rank.json" ] && [ -z "${LLAVA_STEP:-}" ]; then
  signal=$((code - 128)) why=
  moment
  [ $signal = 9 ] && why='; the machine was short of memory, or someone killed it'
  printf '{"rank": %d, "error": "Killed", "message": "killed by signal %d%s", "host": "%s", "time": %s}\n' \
    "$SLURM_PROCID" "$signal" "$why" "$(hostname)" "$moment" >"$LLAVA_DS_START/failed-$rank.json"
fi
# A process that the command left may hold its output open: it is not waited for.
for _ in {1..20}; do
  kill -0 "$stamper" 2>/dev/null || break
  sleep 0.1
done
kill -KILL "$stamper" 2>/dev/null
exit "$code"
