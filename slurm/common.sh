# shellcheck shell=bash
# What the scripts of this folder share; they source it. docs/slurm.md explains.
#
# A site's facts come from slurm/settings.sh (copy settings.example.sh) or from the environment, which wins.

set -uo pipefail
LLAVA_NOTICED='' LLAVA_CODE=0
if [ -n "${SLURM_JOB_ID:-}" ]; then
  trap '_llava_noticed USR1' USR1
  trap '_llava_noticed TERM' TERM
fi
_llava_noticed() { echo "$(date '+%F %T') signal $1: the ranks save and end"; LLAVA_NOTICED=$1; }

LLAVA_HOME=$(cd "$LLAVA_HOME" && pwd) || exit 1
cd "$LLAVA_HOME" || exit 1
export LLAVA_HOME

llava_load_settings() {
  local file=${LLAVA_SETTINGS:-slurm/settings.sh} name given=()
  for name in $(compgen -e LLAVA_); do given+=("$name=${!name}"); done
  if [ -f "$file" ]; then
    set -a +u # what others wrote may read variables that are not set
    # shellcheck source=/dev/null
    source "$file" || { echo "$file ended with an error; fix it" >&2; exit 1; }
    set +a -u
    for name in ${given[@]+"${given[@]}"}; do export "${name?}"; done
  elif [ -n "${LLAVA_SETTINGS:-}" ]; then
    echo "LLAVA_SETTINGS=$file: no such file" >&2
    exit 1
  fi
  mkdir -p "${LLAVA_RUNS:=runs}" || exit 1
  LLAVA_RUNS=$(cd "$LLAVA_RUNS" && pwd) # runs are told from one another by their paths
  export LLAVA_RUNS
  if [ -n "${LLAVA_DATA:-}" ] && [ ! "$LLAVA_DATA" -ef data ]; then
    ln -sn "$(cd "$LLAVA_DATA" && pwd)" data 2>/dev/null
    if [ ! "$LLAVA_DATA" -ef data ]; then
      echo "LLAVA_DATA=$LLAVA_DATA: recipes read $LLAVA_HOME/data, which is another folder; move that" >&2
      exit 1
    fi
  fi
}

# --- submitting ---------------------------------------------------------------------------------------------------

llava_submit() { # script, sbatch's options..., --, the script's arguments...; prints the id of the job
  local script=$1 options=()
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
  [ $# -gt 0 ] && shift
  _llava_clean LLAVA_SUBMITTED=1 sbatch --parsable --export=ALL --job-name="llava-$(basename "$script" .sh)" \
    --output="$LLAVA_RUNS/slurm-%j-%x.out" ${LLAVA_ACCOUNT:+--account="$LLAVA_ACCOUNT"} \
    ${LLAVA_PARTITION:+--partition="$LLAVA_PARTITION"} ${LLAVA_QOS:+--qos="$LLAVA_QOS"} \
    ${LLAVA_TIME:+--time="$LLAVA_TIME"} ${LLAVA_CONSTRAINT:+--constraint="$LLAVA_CONSTRAINT"} \
    --nodes="${LLAVA_NODES:-1}" --ntasks-per-node="$(_llava_tasks_wanted)" \
    ${LLAVA_GPUS_PER_NODE:+--gpus-per-node="$LLAVA_GPUS_PER_NODE"} ${LLAVA_MEM:+--mem="$LLAVA_MEM"} \
    ${LLAVA_CPUS_PER_TASK:+--cpus-per-task="$LLAVA_CPUS_PER_TASK"} ${LLAVA_SBATCH:-} \
    ${options[@]+"${options[@]}"} "$LLAVA_HOME/$script" "$@" | cut -d';' -f1
}

_llava_clean() { # runs a command without the variables of a surrounding job, which sbatch would hand on
  local name drop=()
  for name in $(compgen -e SLURM_ | grep -vx SLURM_CONF); do drop+=(-u "$name"); done
  env ${drop[@]+"${drop[@]}"} -u LLAVA_DS_START "$@"
}

_llava_tasks_wanted() { # a rank a GPU; "a100:8" names a type too
  local wanted=${LLAVA_TASKS_PER_NODE:-${LLAVA_GPUS_PER_NODE:-1}}
  echo "${wanted##*:}"
}

llava_enter() { # script, its arguments...: outside a job, and in a job without what the settings ask for, it is submitted
  llava_load_settings
  if [ -z "${SLURM_JOB_ID:-}" ] || { [ -z "${LLAVA_SUBMITTED:-}" ] && _llava_is_plain && _llava_wants_more; }; then
    local job
    job=$(llava_submit "$1" -- "${@:2}") && [ -n "$job" ] || exit 1
    echo "job $job: $1 on ${LLAVA_NODES:-1} node(s) with $(_llava_tasks_wanted) task(s) each; output in $LLAVA_RUNS/slurm-$job-*.out"
    exit 0
  fi
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    echo "this is a job array: Slurm would requeue and signal all of it together; submit single jobs" >&2
    exit 1
  fi
  set +u
  eval "${LLAVA_SETUP:-:}"
  set -u
}

_llava_is_plain() { # sbatch was given nothing that says how large the job is
  [ "${SLURM_JOB_NUM_NODES:-1}" = 1 ] && [ "${SLURM_NTASKS:-1}" = 1 ] && [ -z "${SLURM_GPUS_ON_NODE:-}" ]
}

_llava_wants_more() { [ "${LLAVA_NODES:-1}" -gt 1 ] || [ "$(_llava_tasks_wanted)" -gt 1 ] || [ -n "${LLAVA_GPUS_PER_NODE:-}" ]; }

# --- running ------------------------------------------------------------------------------------------------------

llava_python() { # on the batch script's own node
  if [ -n "${LLAVA_CONTAINER:-}" ]; then
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$(hostname -s)" "${LLAVA_CONTAINED[@]}" python "$@"
  else
    python "$@"
  fi
}

_llava_environment() { # the Python of the ranks, and what NCCL and OpenMP are told
  LLAVA_CONTAINED=()
  case ${LLAVA_CONTAINER:-} in
    "") local venv=${LLAVA_VENV:-.venv}
      [ -f "$venv/bin/activate" ] || { echo "LLAVA_VENV=$venv: no virtual environment there; make install creates .venv" >&2; exit 1; }
      set +u
      # shellcheck source=/dev/null
      source "$venv/bin/activate"
      set -u ;;
    *.sif) echo "LLAVA_CONTAINER=$LLAVA_CONTAINER: apptainer is not supported; give an image for pyxis, or LLAVA_VENV" >&2; exit 1 ;;
    *) LLAVA_CONTAINED=(--container-image="$LLAVA_CONTAINER" --container-workdir="$LLAVA_HOME"
      --container-mounts="$LLAVA_HOME:$LLAVA_HOME${LLAVA_CONTAINER_MOUNTS:+,$LLAVA_CONTAINER_MOUNTS}") ;;
  esac
  export PYTHONUNBUFFERED=1 PYTHONPATH=$LLAVA_HOME${PYTHONPATH:+:$PYTHONPATH}
  # One thread for each core of a rank's share; without it every rank starts one for each core of the node.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  # Says which interface and which transport were chosen when something is wrong, and nothing else.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # A collective that fails ends its process, so that srun ends the rest: not a hang.
  export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
  # Nodes with several networks: NCCL's and gloo's first choice may be one that does not reach the other nodes.
  [ -z "${LLAVA_INTERFACE:-}" ] || export NCCL_SOCKET_IFNAME=$LLAVA_INTERFACE GLOO_SOCKET_IFNAME=$LLAVA_INTERFACE
}

_llava_layout() { # how many ranks, and where they meet
  local tasks=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-$((${SLURM_NTASKS:-1} / SLURM_JOB_NUM_NODES))}}
  [ -z "${LLAVA_SUBMITTED:-}" ] || tasks=$(_llava_tasks_wanted)
  LLAVA_TASKS=$((tasks > 0 ? tasks : 1))
  if [ "$LLAVA_TASKS" -gt "${SLURM_CPUS_ON_NODE:-$LLAVA_TASKS}" ]; then
    echo "$LLAVA_TASKS ranks a node, but the job has $SLURM_CPUS_ON_NODE CPU(s) on $(hostname -s): submit it with --ntasks-per-node=$LLAVA_TASKS, --cpus-per-task or --exclusive" >&2
    exit 1
  fi
  export LLAVA_RANKS=$((SLURM_JOB_NUM_NODES * LLAVA_TASKS))
  LLAVA_HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
  export MASTER_ADDR=${LLAVA_HOSTS%%,*}
  # Another port for another job, and for another start of it: the last one's may not be free yet.
  export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0} * 2) % 20000))
}

_llava_srun() { # ranks a node, command...: one task a rank, on all nodes
  local tasks=$1
  shift
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * tasks)) --ntasks-per-node="$tasks" --export=ALL \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} --kill-on-bad-exit=1 \
    ${LLAVA_CONTAINED[@]+"${LLAVA_CONTAINED[@]}"} \
    "$LLAVA_HOME/slurm/rank.sh" "$@"
}

_llava_wait() { # number of ranks, srun's pid; sets LLAVA_CODE. A signal that came is passed on until it is heeded
  local pid=$2 telling=
  while kill -0 "$pid" 2>/dev/null; do
    if [ -n "$LLAVA_NOTICED" ] && [ -z "$telling" ]; then
      _llava_tell "$1" "$pid" &
      telling=$!
    fi
    # Not for srun itself: a signal that comes just before a wait does not end it.
    sleep 1 &
    wait $!
  done
  wait "$pid"
  LLAVA_CODE=$?
  [ -z "$telling" ] || kill "$telling" 2>/dev/null
}

_llava_tell() { # number of ranks, srun's pid: signals the ranks, as long as they live
  while kill -0 "$2" 2>/dev/null; do
    # Before its log is there, a rank would die of a signal; and while it starts up, it does not listen yet.
    if [ "$(find "$LLAVA_DS_START" -name "${LLAVA_STEP:+$LLAVA_STEP-}rank-*.log" | wc -l)" -ge "$1" ]; then
      scancel --signal=USR1 "$SLURM_JOB_ID"
    fi
    sleep 3
  done
}

llava_train() { # name of the run's folder, recipe, --set key=value...
  local run=$LLAVA_RUNS/$1 recipe=$2 overrides
  shift 2
  overrides=("$@")
  while [ $# -gt 0 ]; do
    [ "$1" = --set ] && [ $# -gt 1 ] || { echo "$1: these scripts take --set KEY.PATH=VALUE, nothing else" >&2; exit 2; }
    shift 2
  done
  set -- ${overrides[@]+"${overrides[@]}"}
  _llava_environment
  _llava_layout
  [ ! -f "$run/FINISHED" ] || { echo "$run is finished"; exit 0; }
  LLAVA_DS_START=$(llava_python -m llava_ds.cluster.batch begin "$run") || exit 1
  export LLAVA_DS_START
  echo "$(date '+%F %T') job $SLURM_JOB_ID restart ${SLURM_RESTART_COUNT:-0}: $run, start $(basename "$LLAVA_DS_START") on $LLAVA_HOSTS, $LLAVA_TASKS rank(s) each"
  if [ "${LLAVA_PREFLIGHT:-1}" = 1 ]; then
    export LLAVA_STEP=preflight
    _llava_srun 1 python tools/preflight --recipe "$recipe" --run-dir "$run" --nodes "$LLAVA_HOSTS" \
      --report "$LLAVA_DS_START/preflight.json" ${LLAVA_PREFLIGHT_OPTIONS:-} ${overrides[@]+"${overrides[@]}"} &
    _llava_wait "$SLURM_JOB_NUM_NODES" $!
    unset LLAVA_STEP
    [ $LLAVA_CODE = 0 ] || llava_python -m llava_ds.cluster.batch preflight "$run" "$LLAVA_CODE"
  fi
  if [ $LLAVA_CODE = 0 ] && [ -z "$LLAVA_NOTICED" ]; then
    _llava_srun "$LLAVA_TASKS" python llava_ds/train.py --deepspeed "${LLAVA_DEEPSPEED:-ds_configs/zero3.json}" \
      --recipe "$recipe" --run-dir "$run" --resume "$@" &
    _llava_wait "$LLAVA_RANKS" $!
  fi
  _llava_after "$run"
}

llava_train_from_stage1() { # as llava_train, from what stage 1 left unless --set model.init_from names something else
  local name=$1 recipe=$2
  shift 2
  [[ " $* " == *" model.init_from="* ]] ||
    llava_require "$LLAVA_RUNS/$name" "$LLAVA_RUNS/stage1/FINISHED" "stage 1 is not finished"
  llava_train "$name" "$recipe" --set "model.init_from=$LLAVA_RUNS/stage1" "$@"
}

_llava_after() { # run folder: what has to be done now that srun has ended
  local decision nodes facts=()
  # A srun that is told to end does so before the ranks have saved.
  for _ in {1..15}; do
    [ "$LLAVA_NOTICED" = TERM ] && [ -e "$LLAVA_DS_START/rank-00000.log" ] && [ ! -e "$LLAVA_DS_START/end.json" ] || break
    sleep 1
  done
  [ -z "$LLAVA_NOTICED" ] || facts+=(--noticed)
  _llava_is_ours || facts+=(--left-to-slurm)
  read -r decision nodes < <(llava_python -m llava_ds.cluster.batch end "$1" "$LLAVA_CODE" ${facts[@]+"${facts[@]}"})
  if [ -z "${decision:-}" ] && { [ "$LLAVA_CODE" = 85 ] || [ -n "$LLAVA_NOTICED" ]; }; then
    decision=requeue # what there was to say could not be written, but the ranks were asked to end
  fi
  case ${decision:-stop} in
    done) exit 0 ;;
    requeue) _llava_requeue ;;
    resubmit) _llava_resubmit "$nodes" ;;
    *) exit 1 ;;
  esac
}

_llava_is_ours() { # whether the job goes on unless it is ended here; Slurm ends it when it is cancelled or a node fails
  local shown
  for _ in {1..60}; do
    shown=" $(scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null) "
    case $shown in
      *" JobState="*) break ;;
    esac
    sleep 5 # slurmctld is silent
  done
  case $shown in
    *" Restarts=${SLURM_RESTART_COUNT:-0} "*) ;;
    *) return 1 ;; # a later start of the job runs elsewhere
  esac
  case $shown in
    *" JobState=RUNNING "* | *" Reason=TimeLimit "*) ;;
    *) return 1 ;;
  esac
}

_llava_requeue() { # asks until Slurm has begun to; it may be silent for a while
  trap '' TERM USR1
  if scontrol show job -o "$SLURM_JOB_ID" | grep -q ' Requeue=0 '; then
    echo "Slurm does not requeue this job; it is submitted anew"
    _llava_resubmit ""
  fi
  for _ in {1..20}; do
    _llava_is_ours || break
    scontrol requeue "$SLURM_JOB_ID" && break
    sleep 10
  done
  trap - TERM USR1
  sleep 120 # Slurm ends this script meanwhile
  exit 1
}

_llava_resubmit() { # nodes to leave out
  local job
  _llava_is_ours || exit 1
  job=$(python3 -m llava_ds.cluster.slurm_jobs "$SLURM_JOB_ID" ${1:+--exclude "$1"} "${LLAVA_SELF[@]}") || exit 1
  echo "job $job goes on in its place${1:+, without $1}"
  exit 0
}

llava_require() { # run folder that needs it, file, what it says
  [ -e "$2" ] && return
  _llava_environment
  echo "$3: there is no $2" >&2
  llava_python -m llava_ds.cluster.batch refuse "$1" "$3: there is no $2"
  exit 1
}

llava_step() { # file that is there when it is done, command...: one task on one node
  _llava_environment
  _llava_step "$1" --nodes=1 --ntasks=1 -- "${@:2}"
}

llava_step_on_all() { # the same, a task for each rank of the job
  _llava_environment
  _llava_layout
  _llava_step "$1" --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$LLAVA_RANKS" --ntasks-per-node="$LLAVA_TASKS" \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} --kill-on-bad-exit=1 -- "${@:2}"
}

_llava_step() { # marker, options of srun..., --, command...
  local marker=$1 options=()
  shift
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  [ ! -e "$marker" ] || { echo "$marker is there already; remove it to do this again"; exit 0; }
  srun "${options[@]}" --export=ALL ${LLAVA_CONTAINED[@]+"${LLAVA_CONTAINED[@]}"} "$@" &
  while kill -0 $! 2>/dev/null; do wait $!; done
  # It can be done again from its beginning, as its marker is written last.
  [ -e "$marker" ] || [ -z "$LLAVA_NOTICED" ] || _llava_requeue
  [ -e "$marker" ] || { echo "$1 ended without $marker" >&2; exit 1; }
}
