#!/usr/bin/env bash
# Installs the wheel of dist/ beside one torch after another, each in a fresh environment, and runs the tests
# that a built wheel can fail there: import, ABI, what was built, opcheck. A torch that the package index does
# not have for this Python is skipped, with the reason. Arguments: torch requirements. Variables: PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCHES=("$@")
((${#TORCHES[@]})) || TORCHES=("$(grep '^torch==' constraints.txt)" "torch==2.14.1" "torch==2.11.0")
PYTHON=${PYTHON:-.venv/bin/python}
TESTS=(tests/test_binary.py tests/ops)
CHOICE="opcheck or test_abi or test_build_info or test_exports or test_architectures"

say() { echo "wheel-check: $*"; }
fail() { echo "wheel-check failed: $*" >&2; exit 1; }

wheels=(dist/pymend_editor-*-cp310-abi3-*.whl)
[[ -f ${wheels[0]} && ${#wheels[@]} == 1 ]] || fail "expected one wheel in dist/, found: ${wheels[*]}"
contents=$("$PYTHON" -m zipfile -l "${wheels[0]}")
for file in _C.abi3.so py.typed data/facts.json presets/default.yaml presets/models.json reproduce/mini.yaml; do
  grep -q "^pymend/$file " <<<"$contents" || fail "the wheel lacks pymend/$file"
done
if grep -q -e '^tests/' -e '_emu' <<<"$contents"; then fail "the wheel holds tests"; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The tests alone, so that nothing but the installed package can be imported as pymend.
cp -r tests pyproject.toml "$work"
rm -f "$work"/tests/*.so
grep -v -e '^torch==' -e '^nvidia-' constraints.txt >"$work/pins.txt"

check() {
  local torch=$1 venv=$work/venv python=$work/venv/bin/python
  rm -rf "$venv"
  "$PYTHON" -m venv "$venv"
  if ! "$python" -m pip install --quiet --disable-pip-version-check "$torch" 2>"$work/pip.log"; then
    say "$torch: skipped, pip could not install it: $(grep ERROR "$work/pip.log" | tail -n 1)"
    return
  fi
  # Pinned, or pip would rather take another torch than say that a requirement does not go with this one.
  local installed
  installed=$("$python" -c 'from importlib.metadata import version; print(version("torch"))')
  echo "torch==$installed" | cat "$work/pins.txt" - >"$work/pins-here.txt"
  "$python" -m pip install --quiet --disable-pip-version-check -c "$work/pins-here.txt" "${wheels[0]}" \
    pytest hypothesis abi3audit || fail "$torch: pip could not install the wheel"
  cd "$work"
  "$python" - "$installed" <<'CODE'
import importlib.metadata, sys, torch
import pymend._lib as lib

assert lib.__file__.startswith(sys.prefix), lib.__file__
assert importlib.metadata.version("torch") == sys.argv[1], (torch.__version__, sys.argv[1])
print("wheel-check: torch", torch.__version__, "with", lib.build_info())
CODE
  PYMEND_REQUIRE_KERNELS=1 "$python" -m pytest -q -p no:cacheprovider "${TESTS[@]}" -k "$CHOICE" ||
    fail "$torch: the tests above failed"
  cd - >/dev/null
  say "$torch: passed"
}

for torch in "${TORCHES[@]}"; do
  check "$torch"
done
