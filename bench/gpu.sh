#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds, tests, benches, profiles, looks for bad memory accesses and races, trains.
#   bench/gpu.sh                    everything, in 9 minutes
#   bench/gpu.sh tests sanitize     those parts alone, which then have the 9 minutes to themselves; install always runs
#   bench/gpu.sh --help             the parts, and --seconds for another limit
# Into $OUT (default bench/results/), three files: <date>-<gpu>.json, the one report; <date>-<gpu>-logs.tar.gz; and
# <date>-<gpu>-run.tar.gz, the training run. What fails or runs out of time stops nothing else, and is in the report.
# Exits 0 if all parts passed, 1 if one did not, 2 for a wrong argument, 3 where there is no GPU.
#
# No network is needed. $PYTHON (default python3) has torch with CUDA, numpy, setuptools and pip; what else is missing
# comes from bench/wheels/, which `bench/wheels.py` fills on a machine with a network. nvcc and a C++ compiler build the
# CUDA kernels: without them install is red, and the backend "cuda" is left out of the rest. pytest-xdist and
# pytest-timeout are used where they are there: tests spread over the cores, a kernel that hangs costs one test.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
if [[ " $* " != *" --help "* && " $* " != *" -h "* ]]; then
    if ! gpus=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null) || [ -z "$gpus" ]; then
        echo "bench/gpu.sh: this machine has no NVIDIA GPU (nvidia-smi lists none), so there is nothing to measure." >&2
        exit 3
    fi
    echo "GPU, driver, memory: $gpus"
    "$python" - <<'PY' || exit 3
import os, platform, sys
import numpy, torch

print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, numpy {numpy.__version__}, "
      f"{os.cpu_count()} CPUs")
if not torch.cuda.is_available():
    sys.exit(f"bench/gpu.sh: torch {torch.__version__} cannot use the GPU; install a torch built with CUDA for this driver.")
PY
fi
exec "$python" bench/gpu_run.py "$@"
