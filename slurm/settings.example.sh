# shellcheck shell=bash disable=SC2034
# A site's facts: copy this file to slurm/settings.sh and edit it. A variable of the environment of the same name wins.

# LLAVA_ACCOUNT=my_project
# LLAVA_PARTITION=gpu
# LLAVA_QOS=
# LLAVA_CONSTRAINT=a100
# LLAVA_TIME=12:00:00            # a job saves and starts again when its time is over
LLAVA_NODES=2
LLAVA_GPUS_PER_NODE=8            # or a100:8; a rank for each; without GPUs give LLAVA_TASKS_PER_NODE
# LLAVA_CPUS_PER_TASK=8
# LLAVA_MEM=0                    # of a node; 0 is all of it
# LLAVA_SBATCH="--exclusive"     # what else sbatch should be given; --signal=B:USR1@600 where a save takes minutes

LLAVA_VENV=.venv                 # or a container: an image for pyxis
# LLAVA_CONTAINER=registry/image:tag
# LLAVA_CONTAINER_MOUNTS=/scratch
# LLAVA_SETUP="module load cuda"

# LLAVA_DATA=/scratch/me/data    # recipes read data/, which becomes a link to it
# LLAVA_RUNS=/scratch/me/runs    # seen by all nodes

# LLAVA_STAGE1_RECIPE=paper_stage1_7b
# LLAVA_STAGE2_RECIPE=paper_stage2_7b
# LLAVA_DEEPSPEED=ds_configs/zero3.json
# LLAVA_EVALUATE=runs/scienceqa  # what slurm/evaluate.sh evaluates, instead of runs/merged

# LLAVA_INTERFACE=ib0            # where nodes have several networks: the one that reaches the other nodes
# LLAVA_EXCLUDE_BAD_NODES=1      # a node that the preflight names is left out, and the job submitted again
# LLAVA_PREFLIGHT=0              # no preflight
