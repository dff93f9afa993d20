#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: installs, tests, benches, looks for bad memory accesses and races.
#   bench/gpu.sh                    everything: install doctor tests bench update sanitize races kernels suite
#   bench/gpu.sh tests              those parts alone; install always runs. Of the longer parts one takes up to 8 minutes
# Into $OUT (default bench/results/): a log of each part, kernels.json and cuda_build.json (registers and shared memory),
# <date>-<gpu>.json with all times, the machine and the versions, <date>-<gpu>-update.json with those of training.
# A part that fails or runs out of its time does not stop the others, but `bench` and `update` are left out while
# `tests` is red; the last lines say how each went. Exits 3 where there is no GPU, 2 for an unknown part, 1 if any part failed.
#
# No network is needed: $PYTHON (default python3) already has what pyproject.toml's build-system, dependencies and
# extra "test" name, torch with CUDA among them. `tests` and `bench` do with torch, triton, numpy, safetensors, pytest,
# pytest-benchmark and hypothesis. nvcc and a C++ compiler are needed too: without them install is red, and the backend
# "cuda" is left out of the rest. DQL_CUDA_ARCHS names its architectures (80 and 90 by default). pytest-xdist, where it is
# there, spreads the tests and the kernels' compilation over the cores.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
all=(doctor tests bench update sanitize races kernels suite)
chosen=("${@:-${all[@]}}")

for name in "${chosen[@]}"; do
    if [[ " install ${all[*]} " != *" $name "* ]]; then
        echo "bench/gpu.sh: there is no part $name; there are install ${all[*]}" >&2
        exit 2
    fi
done
if ! gpus=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null) || [ -z "$gpus" ]; then
    echo "bench/gpu.sh: this machine has no NVIDIA GPU (nvidia-smi lists none), so there is nothing to measure." >&2
    exit 3
fi
out=${OUT:-bench/results}
mkdir -p "$out"
echo "GPU, driver, memory: $gpus"
"$python" - <<'PY' || exit 1
import os, platform, sys
import numpy, torch

try:
    from triton import __version__ as triton
except ImportError:
    triton = "none"
print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton}, "
      f"numpy {numpy.__version__}, {os.cpu_count()} CPUs")
if not torch.cuda.is_available():
    sys.exit(f"bench/gpu.sh: torch {torch.__version__} cannot use the GPU; install a torch built with CUDA for this driver.")
PY
gpu=$("$python" -c 'import re, torch; print(re.sub("[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-"))')
arch=$("$python" -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())')
report=$out/$(date -u +%Y-%m-%d)-$gpu.json

has() { "$python" -c "import $1" 2>/dev/null; }
workers=()
if has xdist; then workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))"); fi

names=() outcomes=() failed=0
wanted() { [[ " ${chosen[*]} " == *" $1 "* ]]; }
went() { # NAME OUTCOME: remembers it, and whether it counts as a failure
    names+=("$1") outcomes+=("$2")
    case $2 in passed* | skipped*) ;; *) failed=1 ;; esac
    echo "== $1: $2"
}
part() { # NAME SECONDS COMMAND...: its output goes to $out/NAME.log, the end of it here
    local name=$1 limit=$2 code=0 start=$SECONDS
    shift 2
    echo "== $name"
    # an interrupt, so that pytest still writes its report; after 20 s more it is killed
    timeout --signal=INT --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    tail -n 25 "$out/$name.log" | cut -c 1-200
    local last
    last=$(tail -n 1 "$out/$name.log")
    [ -s "$out/$name.log" ] || rm "$out/$name.log"
    case $code in
        0) went "$name" "passed in $((SECONDS - start)) s" ;;
        77) went "$name" "skipped: $last" ;;
        124 | 137) went "$name" "not done after $limit s" ;;
        *) went "$name" "failed with exit code $code after $((SECONDS - start)) s" ;;
    esac
    return "$code"
}
install=("$python" -m pip install -e . --no-build-isolation --no-deps)
if ! DQL_REQUIRE_CUDA=1 part install 300 "${install[@]}"; then # which is red; the rest can do without
    DQL_NO_CUDA=1 part install-without-cuda 180 "${install[@]}"
fi
if [ -f kernels/_cuda_build.json ]; then cp kernels/_cuda_build.json "$out/cuda_build.json"; fi
if ! has dql.kernels; then
    echo "bench/gpu.sh: dql cannot be imported, see $out/install.log" >&2
    exit 1
fi

# What cannot run is skipped, not failed: it is said here at least.
"$python" -c 'import dql; print(*(f"backend {name}: {reason}" for name, reason in dql.backends().items()), sep="\n")'

# `dql doctor --json` and `dql kernels --json`, without the packages that only the command line needs
if wanted doctor; then
    part doctor 60 "$python" -c 'import json, dql.doctor; print(json.dumps(dql.doctor.examine(), indent=1))'
fi

red=0 # only of tests in this very run
if wanted tests; then
    part tests 475 "$python" -m pytest "${workers[@]}" tests/test_gpu*.py tests/test_device.py || red=1
fi

timed() { # NAME SECONDS REPORT BENCH.py: not while tests is red
    if [ $red -ne 0 ]; then
        went "$1" "not run: tests is red, and nothing is timed while it is"
        return
    fi
    part "$1" "$2" "$python" -m pytest "bench/$4" --benchmark-only --device cuda --bench-json "$3"
    if [ -f "$3" ]; then "$python" bench/table.py "$3" >>"$out/$1.log"; fi
}
if wanted bench; then
    timed bench 475 "$report" bench_gpu.py
    if [ -f "$report" ]; then
        "$python" bench/table.py "$report" | grep -E '^\| (B|1|256|2,500|65,536) \|.*(triton|cuda|graph)' | cut -d '|' -f 2-6,9-10,12
    fi
fi
if wanted update; then timed update 240 "${report%.json}-update.json" bench_update.py; fi

# Two tools at a time, for what one call may take.
if wanted sanitize; then part sanitize 475 "$python" bench/sanitize.py memcheck initcheck; fi
if wanted races; then part races 475 "$python" bench/sanitize.py racecheck synccheck; fi

if wanted kernels; then
    part kernels 240 "$python" -c '
import contextlib, sys
from dql.kernel_table import kernels

with open(sys.argv[2], "w") as file, contextlib.redirect_stdout(file):
    code = kernels(sys.argv[1], as_json=True)
sys.exit(code)' "$arch" "$out/kernels.json"
fi

if wanted suite; then
    part suite 475 "$python" -m pytest "${workers[@]}" tests \
        --ignore-glob='*/test_gpu*.py' --ignore=tests/test_device.py --continue-on-collection-errors
fi

echo "== in short, logs in $out:"
for i in "${!names[@]}"; do echo "${names[$i]}: ${outcomes[$i]}"; done
if [ -f "$report" ]; then
    "$python" - "$report" "${names[@]}" -- "${outcomes[@]}" <<'PY'
import json, sys
from pathlib import Path

path, rest = Path(sys.argv[1]), sys.argv[2:]
half = rest.index("--")
report = json.loads(path.read_text())
report["parts"] = report.get("parts", {}) | dict(zip(rest[:half], rest[half + 1 :]))
path.write_text(json.dumps(report, indent=1) + "\n")
print(f"written: {path}")
PY
fi
exit $failed
