#!/usr/bin/env bash
#SBATCH --job-name=qlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8  # one process per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@600  # all processes, 10 minutes before the limit: longer than a step and a checkpoint
#SBATCH --requeue  # after preemption or a node failure, Slurm itself restarts the job
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# sbatch recipes/cluster/slurm.sh CONFIG [section.key=value ...]
#
# A run that takes longer than --time: SIGUSR1 saves a checkpoint and ends every process with status 75, for which this
# script requeues the job; the next start resumes. Every node must see the run folder, the model and the data.

set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# the first process that ends must not kill one that still writes the checkpoint
srun --kill-on-bad-exit=0 qlora-train "$@"
status=$?

if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
