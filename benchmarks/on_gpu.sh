#!/usr/bin/env bash
# Builds, checks and measures on a machine with an NVIDIA GPU, without network; needs torch >= 2.11, triton >= 3.6, nvcc, cmake,
# ninja, pybind11, scikit-build-core, numpy, pillow, pyyaml, safetensors, huggingface_hub, typer, rich, pytest, pytest-benchmark,
# hypothesis. Installs nothing but this project.
#
#   benchmarks/on_gpu.sh [--out DIR] [STAGE...]      stages: build tests sanitizer inspect attention lowrank ops objective pixels
#                                                      models profile (default: all)
#
# Each stage reports and a failing one does not stop the rest; the exit code is 1 when one failed. What a stage prints and measures is
# left in DIR (default: on_gpu_out).
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=on_gpu_out
if [[ "${1:-}" == --out ]]; then OUT=$2; shift 2; fi
mkdir -p "$OUT"
ALL=(build tests sanitizer inspect attention lowrank ops objective pixels models profile)
STAGES=("${@:-${ALL[@]}}")
PYTHON=${PYTHON:-python3}
run=("$PYTHON" benchmarks/run.py --device cuda --out "$OUT")

stage_build() {
  "$PYTHON" -m pip install --no-deps --no-build-isolation -e . && "$PYTHON" -m stellar_fast.native && "$PYTHON" -m stellar_fast.cli info
}
stage_tests() { "$PYTHON" -m pytest -m cuda -q --durations=10; }
stage_sanitizer() { # the CUDA C++ under memcheck
  local tool
  tool=$(command -v compute-sanitizer || echo "$(dirname "$(readlink -f "$(command -v nvcc)")")/compute-sanitizer")
  timeout 180 "$tool" --error-exitcode 1 --print-limit 20 "$PYTHON" -m pytest -m cuda -q -x -k "cuda-cuda and not registration" \
    tests/ops/test_{upsample_conv2x,group_norm_silu,patch_unembed,nearest_code}.py
}
stage_inspect() { "$PYTHON" -m stellar_fast.cli inspect; }
stage_attention() { "${run[@]}" --suite ops --op token_attention --op-shape all --dtype bf16 --budget 40; }
stage_lowrank() { "${run[@]}" --suite ops --op lowrank_product --op-shape all --dtype bf16,fp32 --budget 30; }
stage_ops() { "${run[@]}" --suite ops --dtype bf16 --budget 40; }
stage_objective() {
  "${run[@]}" --suite objective --batch 128 --dtype bf16 --providers plain,plain_compiled,stellar_fast --budget 30 &&
    "${run[@]}" --suite memory --dtype bf16
}
stage_pixels() {
  "${run[@]}" --suite codes,decode --batch 32 --dtype bf16 --providers plain,plain_compiled,stellar_fast --budget 40
}
stage_models() {
  local code=0
  "${run[@]}" --suite encode --batch 128 --dtype bf16 --providers plain,plain_compiled,stellar_fast --budget 30 || code=1
  "${run[@]}" --suite step --batch 128 --dtype bf16 --providers plain,plain_compiled,stellar_fast --budget 60 || code=1
  return $code
}
stage_profile() {
  "$PYTHON" - "$OUT/profile.txt" <<'PROFILE'
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.model import pair, step
from benchmarks.shapes import model_shape

device, shape = torch.device("cuda"), model_shape("b16")
model = pair.build_stellar_fast(shape, pair.build_plain(shape, device)).train()
call = step.training_step(model, step.step_forward(shape, 128, device), torch.bfloat16)
for _ in range(3):
    call()
torch.cuda.synchronize()
with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
    call()
    torch.cuda.synchronize()
table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90)
open(sys.argv[1], "w").write(table)
print(table)
PROFILE
}

failed=()
for stage in "${STAGES[@]}"; do
  if ! declare -F "stage_$stage" > /dev/null; then
    echo "unknown stage $stage; stages: ${ALL[*]}" >&2
    exit 2
  fi
  start=$SECONDS
  echo "== $stage"
  "stage_$stage" 2>&1 | tee "$OUT/$stage.log"
  code=${PIPESTATUS[0]}
  [[ $code -eq 0 ]] || failed+=("$stage")
  echo "== $stage: exit code $code after $((SECONDS - start)) s"
done
[[ ${#failed[@]} -eq 0 ]] || { echo "failed: ${failed[*]}"; exit 1; }
