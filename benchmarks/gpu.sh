#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one, nvcc, and a Python with PyTorch, pybind11,
# scikit-build-core and what clafusion depends on: builds, runs the CUDA tests, compute-sanitizer
# where it works, and the benchmark, whose table it prints and whose figures go to
# benchmarks/results/gpu.json.
#   PYTHON            the interpreter; default python3
#   CLAFUSION_WHEELS  a folder of wheels for what is missing, where no index can be reached
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
failed=()

echo "--- the machine"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true
nvcc --version | tail -n 2

echo "--- the build"
venv=build/gpu/venv
"$python" -m venv --system-site-packages "$venv"
python=$venv/bin/python
needed=(numpy scipy ot safetensors rich typer matplotlib pytest hypothesis)
packages=(numpy scipy pot safetensors rich typer matplotlib pytest hypothesis)
missing=()
for i in "${!needed[@]}"; do
  "$python" -c "import ${needed[i]}" 2>/dev/null || missing+=("${packages[i]}")
done
if ((${#missing[@]})); then
  source=()
  if [[ -n ${CLAFUSION_WHEELS:-} ]]; then source=(--no-index --find-links "$CLAFUSION_WHEELS"); fi
  "$python" -m pip install --quiet --disable-pip-version-check "${source[@]}" "${missing[@]}" || {
    echo "gpu.sh: install ${missing[*]} first, or name their wheels' folder in CLAFUSION_WHEELS" >&2
    exit 2
  }
fi
CLAFUSION_CUDA=ON "$python" -m pip install --quiet --disable-pip-version-check \
  --no-build-isolation --no-deps --config-settings=build-dir=build/gpu/build .
"$venv/bin/clafusion" doctor

echo "--- the tests that need a GPU"
# A library of another release may warn of its own: here only answers count.
"$python" -m pytest -m cuda -W default -p no:cacheprovider || failed+=(tests)

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    echo "--- compute-sanitizer $tool"
    log=build/gpu/$tool.log
    code=0
    compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      --kernel-regex kns=sinkhorn "$python" -m benchmarks.gpu_rows --small >"$log" 2>&1 || code=$?
    tail -n 12 "$log"
    if ((code == 9)) || { ((code)) && grep -q "ERROR SUMMARY: [1-9]" "$log"; }; then
      failed+=("$tool")
    elif ((code)); then
      echo "$tool does not work here (exit code $code); see $log"
    fi
  done
else
  echo "--- compute-sanitizer is not installed: skipped"
fi

echo "--- the benchmark"
"$python" -m benchmarks.gpu_rows || failed+=(benchmark)

if ((${#failed[@]})); then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
