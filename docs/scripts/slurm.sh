#!/bin/bash
# Two nodes of eight GPUs train one recipe:  sbatch docs/scripts/slurm.sh my-sae.yaml
#SBATCH --job-name=sparsary
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Before the time limit, or when the job is preempted, SIGTERM goes to all steps: the run saves and ends; then it is queued again.
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
recipe=${1:?usage: sbatch docs/scripts/slurm.sh RECIPE [key=value ...]}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One launcher on each node, which starts a process for each GPU. The first node is the meeting point.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node 8 \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$first:29500" \
    --max-restarts 3 \
    -m sparsary train "$recipe" "${@:2}"
