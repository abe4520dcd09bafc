#!/bin/sh
# Everything that needs a GPU, in at most 46 minutes: tests of the CUDA kernels, compute-sanitizer over them, benchmarks
# of operators and of models, inference and training, beside DeiT (eager, bf16, compiled). Run in the repository, after
# `make VRWKV_CUDA=1`:
#
#     tools/gpu_check.sh [FOLDER]     # default output/gpu_check
#
# One folder of results: a log for each part, CSV files, and summary.txt with the exit code of each. Exits with 1 if one
# failed, with 2 if there is no GPU or no kernels for it.
set -u
folder=${1:-output/gpu_check}
python=${PYTHON:-.venv/bin/python}
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PATH PYTHONUNBUFFERED=1 # a part that is stopped has written what it knew
mkdir -p "$folder"
: > "$folder/summary.txt"
failed=0

part() {  # NAME SECONDS COMMAND...
    name=$1 seconds=$2
    shift 2
    echo "$name: $*"
    begin=$(date +%s)
    timeout --kill-after=20 "$seconds" "$@" > "$folder/$name.log" 2>&1
    code=$?
    echo "$name: exit code $code after $(($(date +%s) - begin)) s" | tee -a "$folder/summary.txt"
    [ "$code" -eq 0 ] || failed=1
}

sanitize() {  # TOOL OPTIONS...
    tool=$1
    shift
    # Without torch's cache every tensor is an allocation of its own, and an access beside it is seen.
    part "$tool" 300 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" "$@" --error-exitcode 1 --print-limit 20 \
        "$python" -m pytest tests/cuda/test_device.py tests/ops/test_q_shift.py tests/ops/test_gating.py \
        -k "(against_the_reference and (initial or usual)) or (native-cuda and (test_mix or exact or against_float64))"
}

part machine 60 nvidia-smi
part environment 120 "$python" -m torch.utils.collect_env
part kernels 120 "$python" -c '
import torch
from vrwkv.ops import _extension
if not torch.cuda.is_available() or "cuda" not in _extension.NATIVE_DEVICES:
    raise SystemExit(f"needs a GPU and CUDA kernels: torch {torch.__version__} for CUDA {torch.version.cuda}, "
                     f"GPU {torch.cuda.is_available()}, kernels for {sorted(_extension.NATIVE_DEVICES)}")'
if [ "$code" -ne 0 ]; then
    cat "$folder/kernels.log"
    exit 2
fi
part tests 480 "$python" -m pytest -m cuda tests/cuda/test_device.py tests/ops
part ops 240 "$python" benchmarks/run_ops.py --device cuda --output "$folder"
part models 840 "$python" benchmarks/run_models.py --device cuda --output "$folder"
sanitize memcheck --report-api-errors no # torch asks the driver for functions that it may lack
sanitize racecheck
sanitize initcheck
exit "$failed"
