#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: installs, tests, benches; writes bench/results/<date>-<gpu>.json.
#   bench/gpu.sh
# No network is needed: $PYTHON (default python3) already has what pyproject.toml's build-system, dependencies and
# extra "test" name, torch with CUDA among them. Exits 3 where there is no GPU, else non-zero if any part fails.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if ! gpus=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null) || [ -z "$gpus" ]; then
    echo "bench/gpu.sh: this machine has no NVIDIA GPU (nvidia-smi lists none), so there is nothing to measure." >&2
    exit 3
fi
echo "GPU, driver, memory: $gpus"
"$python" - <<'PY'
import platform, sys
import numpy, torch

print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, numpy {numpy.__version__}")
if not torch.cuda.is_available():
    sys.exit(f"bench/gpu.sh: torch {torch.__version__} cannot use the GPU; install a torch built with CUDA for this driver.")
PY

"$python" -m pip install -e . --no-build-isolation --no-deps
"$python" -m pytest # nothing is timed while a test is red
gpu=$("$python" -c 'import re, torch; print(re.sub("[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-"))')
report=bench/results/$(date -u +%Y-%m-%d)-$gpu.json
"$python" -m pytest bench/ --benchmark-only --device cuda --bench-json "$report"
echo "written: $report"
