#!/usr/bin/env bash
# Trains on whatever this machine has: TPUs, GPUs or only a CPU. The first run installs what it needs into .venv.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/tpu_or_gpu.sh [OPTIONS] [CONFIG] [key=value ...]

Installs jspec into .venv (the first time only) with JAX for what it finds, TPU, CUDA or CPU, and runs
`jspec train CONFIG key=value ...`. CONFIG is configs/quickstart.yaml unless given. The same command again resumes.

Several processes. On TPU pods, under srun (SLURM), mpirun and in indexed Kubernetes jobs, run this same command in
every task: the processes find each other. Otherwise:
  --processes N --coordinator HOST:PORT --id I
                    this is process I (from 0) of N; HOST is the machine of process 0
  --local N         N processes on this machine

Other options:
  --install-only    make .venv and stop
  --help            this text; `.venv/bin/jspec train --help` lists the keys that can be set

Environment: JSPEC_ACCELERATOR=cpu|cuda|cuda12|tpu (instead of looking), PYTHON=the Python (3.11 or newer) to use,
JSPEC_VENV=where the environment is instead of .venv
TEXT
}

need() { [ $# -ge 2 ] && [ -n "$2" ] || die "$1 needs a value; see --help"; }
number() { [[ $2 =~ ^[0-9]+$ ]] || die "$1 must be a whole number, not '$2'"; }

local_count='' install_only='' config='' processes='' coordinator='' id=''
overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    -h|--help) usage; exit 0;;
    --install-only) install_only=yes; shift;;
    --local) need "$@"; number "$1" "$2"; local_count=$2; shift 2;;
    --processes) need "$@"; number "$1" "$2"; processes=$2; shift 2;;
    --id) need "$@"; number "$1" "$2"; id=$2; shift 2;;
    --coordinator) need "$@"; coordinator=$2; shift 2;;
    -*) die "unknown option '$1'; see --help";;
    *=*) overrides+=("$1"); shift;;
    *) [ -z "$config" ] || die "two configs: '$config' and '$1'"; config=$1; shift;;
  esac
done

if [ -n "$processes$coordinator$id" ]; then
  [ -n "$processes" ] && [ -n "$coordinator" ] && [ -n "$id" ] || die "--processes, --coordinator and --id go together"
  [ -z "$local_count" ] || die "--local starts its own processes: leave --processes, --coordinator and --id out"
  export JAX_NUM_PROCESSES=$processes JAX_COORDINATOR_ADDRESS=$coordinator JAX_PROCESS_ID=$id
fi
if [ -n "$local_count" ] && [ "$local_count" -lt 1 ]; then die "--local needs at least 1 process"; fi

# Paths in configs are relative to the repository; a config may also lie where the caller stands.
if [ -n "$config" ] && [ -e "$config" ]; then config=$(cd "$(dirname "$config")" && pwd)/$(basename "$config"); fi
cd "$root"

accelerator=$(find_accelerator)
extras=$accelerator
if [ -n "${KUBERNETES_SERVICE_HOST:-}" ] && [ -n "${JOB_COMPLETION_INDEX:-}" ]; then extras+=,k8s; fi
prepare "$extras"
[ -z "$install_only" ] || exit 0

command=(-m jspec)
if [ -n "$local_count" ]; then
  [ "$accelerator" != tpu ] || die "--local is for CPUs and GPUs: one process drives all TPU chips of a machine"
  command=(-m jspec.local "$local_count")
fi
exec "$venv/bin/python" "${command[@]}" train "${config:-configs/quickstart.yaml}" ${overrides[@]+"${overrides[@]}"}
