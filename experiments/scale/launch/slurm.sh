#!/bin/sh
#SBATCH --job-name=kedit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
# One process a node, each with all GPUs of its node: 16 devices, which --mesh lays out. Submit with
#
#   sbatch experiments/scale/launch/slurm.sh --mesh data=2,model=8 edit MODEL facts.jsonl --session SHARED/session ...
#
# JAX finds the processes in Slurm's variables. A job that is preempted is queued again (--requeue) and runs this same command,
# which goes on where the session was saved; so does one that you submit once more.
set -eu
srun "${KEDIT:-kedit}" --hosts "$@"
