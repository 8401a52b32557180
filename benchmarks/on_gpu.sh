#!/usr/bin/env bash
# Builds, checks, tunes and measures on a machine with an NVIDIA GPU in under 10 minutes, without network; needs torch >= 2.11,
# triton >= 3.6, nvcc, cmake, ninja, pybind11, scikit-build-core, numpy, pillow, pyyaml, safetensors, huggingface_hub, typer, rich,
# pytest, pytest-benchmark, hypothesis; matplotlib for the plots. Installs nothing but this project.
#
#   benchmarks/on_gpu.sh [--out DIR] [STAGE...]      stages, by default those of the first line:
#                                                      build tests tune ops objective models pixels profile sanitizer
#                                                      compiled (plain under torch.compile too), shapes (operators at
#                                                      all their shapes), inspect (kernels compiled for three GPUs)
#
# A stage is cut off at its own time limit and a failing one does not stop the rest; the exit code is 1 when one failed. DIR (default:
# on_gpu_out) holds what stages print (STAGE.log), CSV, JSON, PNG, profile.txt, the tuned configs and the table at the end (stages.txt).
# shellcheck disable=SC2329  # stages are called by name
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

usage() { sed -n '2,/^# shellcheck/{/^# shellcheck/!s/^# \{0,1\}//p}' "$0"; }
OUT=on_gpu_out
case "${1:-}" in
  --out) OUT=${2:?--out needs a folder}; shift 2 ;;
  -h | --help) usage; exit 0 ;;
esac
ALL=(build tests tune ops objective models pixels profile sanitizer)
declare -A LIMIT_S=([build]=100 [tests]=120 [sanitizer]=55 [tune]=75 [ops]=45 [objective]=40 [models]=60 [pixels]=25 [profile]=25
  [compiled]=300 [shapes]=120 [inspect]=120)
STAGES=("${@:-${ALL[@]}}")
for stage in "${STAGES[@]}"; do
  [[ -n "${LIMIT_S[$stage]:-}" ]] || { echo "unknown stage $stage; stages: ${ALL[*]} compiled shapes inspect" >&2; exit 2; }
done
mkdir -p "$OUT"
export OUT PYTHON=${PYTHON:-python3}

run() { "$PYTHON" benchmarks/run.py --device cuda --out "$OUT" "$@"; }
stage_build() { # for the present GPU alone: 9.0 as 90a, whose instructions the kernels use
  local architecture
  architecture=$("$PYTHON" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + "a" * ((major, minor) == (9, 0)) + "-real")') || return 1
  "$PYTHON" -m pip install --no-deps --no-build-isolation -C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$architecture" -e . &&
    "$PYTHON" -m stellar_fast.native && "$PYTHON" -m stellar_fast.cli info
}
stage_tests() { "$PYTHON" -m pytest -m cuda -q --durations=10; }
stage_sanitizer() { # the CUDA C++ under memcheck; without torch's caching a block ends where its tensor does
  local tool source op tests=()
  tool=$(command -v compute-sanitizer || echo "$(dirname "$(readlink -f "$(command -v nvcc)")")/compute-sanitizer")
  for source in csrc/*/*_cuda.cu; do
    op=$(basename "$source" _cuda.cu)
    [[ -f tests/ops/test_$op.py ]] && tests+=("tests/ops/test_$op.py")
  done
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --error-exitcode 1 --print-limit 20 \
    "$PYTHON" -m pytest -m cuda -q -x -k "cuda-cuda and not registration" "${tests[@]}"
}
stage_tune() { # keeps what it found in time; --commit writes kernels/<op>/configs/<device>.json
  local code
  touch -d '1 second ago' "$OUT/.before"
  "$PYTHON" -m stellar_fast.cli tune --preset b16 --batch 128 --dtype bf16 --device cuda --budget 60 --commit
  code=$?
  mkdir -p "$OUT/configs"
  find kernels -path '*/configs/*.json' -newer "$OUT/.before" -exec cp --parents {} "$OUT/configs" \;
  return "$code"
}
stage_ops() { run --suite ops --dtype bf16 --provider stellar_fast,libraries --budget 35; }
stage_objective() {
  local code=0
  run --suite objective --batch 128 --dtype bf16 --provider stellar_fast --budget 15 || code=1
  run --suite memory --dtype bf16 || code=1
  return "$code"
}
stage_models() { run --suite encode,step --batch 128 --dtype bf16 --provider stellar_fast --budget 35; }
stage_pixels() { run --suite codes,decode --batch 32 --dtype bf16 --provider stellar_fast --budget 15; }
stage_profile() { "$PYTHON" -m benchmarks.model.profile_step --batch 128 --dtype bf16 --device cuda --out "$OUT"; }
stage_compiled() {
  run --suite objective,encode,step --batch 128 --dtype bf16 --provider plain_compiled,stellar_fast --budget 90
}
stage_shapes() { run --suite ops --shapes all --dtype bf16 --provider stellar_fast,libraries --budget 100; }
stage_inspect() { "$PYTHON" -m stellar_fast.cli inspect; }

failed=0
printf '%-10s %9s %7s\n' stage "exit code" seconds > "$OUT/stages.txt"
for stage in "${STAGES[@]}"; do
  start=$SECONDS
  echo "== $stage"
  export -f run "stage_$stage"
  timeout -s INT -k 5 "${LIMIT_S[$stage]}" bash -uo pipefail -c "stage_$stage" 2>&1 | tee "$OUT/$stage.log"
  code=${PIPESTATUS[0]}
  note=
  [[ $code -eq 124 || $code -eq 137 ]] && note="  cut off at ${LIMIT_S[$stage]} s"
  [[ $code -eq 0 ]] || failed=1
  printf '%-10s %9d %7d%s\n' "$stage" "$code" $((SECONDS - start)) "$note" >> "$OUT/stages.txt"
done
cat "$OUT/stages.txt"
exit $failed
