#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that only a GPU can tell, in one command without network, for a machine that is there
# for an hour: CUDA torch, nvcc, g++ and the test dependencies installed, the sources, nothing else.
#
#   tools/gpu_hour.sh                 all steps; one that has passed is not run again
#   tools/gpu_hour.sh graph bench     these steps, again if need be
#   tools/gpu_hour.sh --dry-run       says what it would run
#
# Every step takes at most ten minutes. Results are JSON in benchmarks/results/gpu/, logs and the
# marks of passed steps in build/gpu_hour/. A failed step does not stop the others.
# SPARSE_ATTN_CUTLASS_DIR: headers of CUTLASS 4.2, where PyPI is out of reach.
set -uo pipefail
cd "$(dirname "$0")/.."

readonly limit=600 marks=build/gpu_hour results=benchmarks/results/gpu
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
python=${PYTHON:-python3}

declare -A steps=(
  [build]="cmake -S . -B build/gpu -DSPARSE_ATTN_CUDA=ON -DPython_EXECUTABLE=$(command -v "$python")
           ${SPARSE_ATTN_CUTLASS_DIR:+-DSPARSE_ATTN_CUTLASS_DIR=$SPARSE_ATTN_CUTLASS_DIR}
           && cmake --build build/gpu --parallel"
  [environment]="$python -m sparse_attn env | tee $results/environment.txt"
  [suite]="SPARSE_ATTN_TEST_CUDA=device $python -m pytest -q -p no:cacheprovider
           tests/test_cuda_prefill.py tests/test_cuda_decode.py"
  [graph]="$python tools/gpu/graph_replay.py --json $results/graph_replay.json"
  [bench]="$python tools/gpu/benchmark.py --json $results/attention.json"
  [compare]="$python tools/gpu/compare.py --json $results/compare.json"
  [opcodes]="$python tools/gpu/opcodes.py --json $results/opcodes.json"
  [sanitizer]="for tool in memcheck racecheck initcheck synccheck; do
           SPARSE_ATTN_TEST_CUDA=device timeout 140 compute-sanitizer --tool \$tool
           --error-exitcode 9 $python -m pytest -q -x -p no:cacheprovider -k 'bf16 and 64'
           tests/test_cuda_prefill.py tests/test_cuda_decode.py || exit; done"
)
readonly order=(build environment suite graph bench compare opcodes sanitizer)

dry_run=false
chosen=()
for argument in "$@"; do
  if [ "$argument" = --dry-run ]; then
    dry_run=true
  elif [ -n "${steps[$argument]+known}" ]; then
    chosen+=("$argument")
  else
    echo "tools/gpu_hour.sh: no step $argument; steps: ${order[*]}" >&2
    exit 2
  fi
done

$dry_run || mkdir -p "$marks" "$results"
failed=()
for step in "${order[@]}"; do
  if [ ${#chosen[@]} -gt 0 ] && [[ " ${chosen[*]} " != *" $step "* ]]; then continue; fi
  command=$(tr -s '\n ' ' ' <<<"${steps[$step]}")
  if $dry_run; then
    printf '%-12s %s\n' "$step" "$command"
    continue
  fi
  if [ ${#chosen[@]} -eq 0 ] && [ -e "$marks/$step.passed" ]; then
    echo "=== $step: passed before"
    continue
  fi
  if [ "$step" = sanitizer ] && ! command -v compute-sanitizer >/dev/null; then
    echo "=== $step: compute-sanitizer is not here"
    continue
  fi
  echo "=== $step ($(date +%T))"
  begin=$SECONDS
  if timeout "$limit" bash -euo pipefail -c "$command" >"$marks/$step.log" 2>&1; then
    touch "$marks/$step.passed"
    echo "    passed in $((SECONDS - begin)) s"
  else
    failed+=("$step")
    echo "    FAILED ($?) after $((SECONDS - begin)) s; the end of $marks/$step.log:"
    tail -n 12 "$marks/$step.log"
  fi
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
