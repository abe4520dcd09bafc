#!/bin/sh
# Everything that needs a GPU, in about 45 minutes: tests of the CUDA kernels, compute-sanitizer over them, benchmarks of
# operators and models beside DeiT (eager, compiled, bf16). Run in the repository, after `make VRWKV_CUDA=1`:
#
#     tools/gpu_check.sh [FOLDER]     # default output/gpu_check
#
# One folder of results: a log for each part, CSV files, and summary.txt with the exit code of each. Exits with 1 if one
# failed.
set -u
folder=${1:-output/gpu_check}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder"
: > "$folder/summary.txt"
failed=0

part() {  # NAME SECONDS COMMAND...
    name=$1 seconds=$2
    shift 2
    echo "$name: $*"
    timeout "$seconds" "$@" > "$folder/$name.log" 2>&1
    code=$?
    echo "$name: exit code $code" | tee -a "$folder/summary.txt"
    [ "$code" -eq 0 ] || failed=1
}

part machine 60 nvidia-smi
part environment 60 "$python" -m torch.utils.collect_env
part tests 600 "$python" -m pytest -q tests/cuda/test_device.py
for tool in memcheck racecheck initcheck; do
    part "$tool" 400 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q -x \
        tests/cuda/test_device.py -k "against_the_reference and initial"
done
part ops 300 "$python" benchmarks/run_ops.py --device cuda --output "$folder"
part models 900 "$python" benchmarks/run_models.py --device cuda --output "$folder"
exit "$failed"
