#!/usr/bin/env bash
# Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, apart from any other
# build, and runs the kernels' tests on them: tests/sanitize.sh [arguments of pytest]
# Needs GCC and the environment in which the tests run; PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

site=build/sanitize/site
rm -rf "$site"
isolation=()
if "$python" -c 'import scikit_build_core, pybind11' 2>/dev/null; then
  isolation=(--no-build-isolation)
fi
CXXFLAGS="-g1 ${CXXFLAGS:-}" "$python" -m pip install --quiet --disable-pip-version-check --no-deps "${isolation[@]}" \
  --target "$site" --config-settings=build-dir=build/sanitize/build --config-settings=cmake.build-type=Release \
  --config-settings=cmake.define.CLAFUSION_SANITIZE=ON --config-settings=cmake.define.CLAFUSION_CUDA=OFF .

# The runtime must be there before Python. Python itself leaks at exit, so leaks are not looked for.
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)" \
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  "$python" - "$site" "$@" <<'PY'
import sys
from pathlib import Path

site = Path(sys.argv[1]).resolve()
# An editable installation would answer for the package before the path is searched.
sys.meta_path = [one for one in sys.meta_path if "ScikitBuild" not in type(one).__name__]
sys.path.insert(0, str(site))
import pytest

from clafusion import _core

assert Path(_core.__file__).is_relative_to(site), _core.__file__
assert b"__asan_init" in Path(_core.__file__).read_bytes()
names = ["alignment/test_dynamic_program", "alignment/test_layer_costs", "transport/test_solve"]
names += [f"kernels/test_{name}" for name in ("assignment", "fuzz", "gram", "moments", "parallel")]
files = [f"tests/{name}.py" for name in names]
sys.exit(
    pytest.main(
        [*files, "-q", "-p", "no:cacheprovider", "--hypothesis-profile=ci"]
        + sys.argv[2:]
    )
)
PY

echo "--- the GPU's inner loops, their teams' threads under ThreadSanitizer"
CXXFLAGS="-g1 -fsanitize=thread ${CXXFLAGS:-}" TSAN_OPTIONS="halt_on_error=1 exitcode=66" \
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libtsan.so)" \
  setarch -R "$python" -m pytest -q -p no:cacheprovider tests/kernels/test_sinkhorn_block.py \
  -k "bytes_each_time or stopped_anywhere or warm_start or not_finite" "$@"
