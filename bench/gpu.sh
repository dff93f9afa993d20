#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: checks, benches, tests, profiles, looks for bad memory accesses and races, trains.
#   bench/gpu.sh first              what works and how fast, from the first half minute on; 195 s
#   bench/gpu.sh tests bench        those parts alone, which then have all the time (540 s) to themselves
#   bench/gpu.sh                    everything
#   bench/gpu.sh report REPORT      what a report says, in short
#   bench/gpu.sh --help             the parts, --seconds for another limit, --tests-from REPORT, --sizes 256,1
# Into $OUT (default bench/results/): <date>-<gpu>.json, the one report, and packed beside it logs, built objects, Triton's
# cache and the training run. What fails or runs out of time stops nothing else, and is in the report.
# Exits 0 if all parts passed, 1 if one did not, 2 for a wrong argument or a Python without torch, 3 without a GPU.
#
# Nothing is installed and no network is needed. $PYTHON (default python3) has torch with CUDA, Triton, numpy, safetensors,
# pytest with pytest-benchmark, pytest-timeout and pytest-xdist; for the CUDA kernels setuptools, nvcc and a C++ compiler.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2> /dev/null; then
    echo "bench/gpu.sh: $python has no torch, or does not run; set PYTHON to one that has." >&2
    exit 2
fi
if [ "${1:-}" = report ]; then exec "$python" -m gpu.report "${@:2}"; fi
case " $* " in
*" --help "* | *" -h "* | *" --device cpu "*) ;;
*)
    if ! gpus=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null) || [ -z "$gpus" ]; then
        echo "bench/gpu.sh: this machine has no NVIDIA GPU (nvidia-smi lists none), so there is nothing to measure." >&2
        exit 3
    fi
    echo "GPU, driver, memory: $gpus"
    ;;
esac
exec "$python" -m gpu.run "$@"
