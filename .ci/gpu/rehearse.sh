#!/usr/bin/env bash
# trapo.py's CUDA path without a GPU: bash .ci/gpu/rehearse.sh [WHAT [ITS ARGUMENTS]]; README.md
# says what. Needs g++ and a python with the requirements (PY=..., default python3). Two small
# libraries are built once, into PRETEND_GPU or a folder for temporary files.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
python=${PY:-python3} what=${1:-sample}
shift || true
export PRETEND_GPU=${PRETEND_GPU:-${TMPDIR:-/tmp}/pretend-gpu-$(id -u)}
if [ ! -e "$PRETEND_GPU/pre.so" ]; then
    mkdir -p "$PRETEND_GPU"
    torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
    abi=$("$python" -c 'import torch; print(int(torch._C._GLIBCXX_USE_CXX11_ABI))')
    build() {
        g++ -O1 -std=c++20 -fPIC -shared -D_GLIBCXX_USE_CXX11_ABI="$abi" "$here/$1.cpp" \
            -o "$PRETEND_GPU/$1.so" -I"$torch/include" -I"$torch/include/torch/csrc/api/include" \
            "${@:2}"
    }
    build fakecuda -L"$torch/lib" -Wl,-rpath,"$torch/lib" -lc10 -ltorch_cpu
    build pre
fi
export LD_PRELOAD="$PRETEND_GPU/pre.so" OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 PYTHONPATH=$here:$PWD
case $what in
    check) exec "$python" -W ignore "$here/gpu_check.py" --pretend "$@" ;;
    *) exec "$python" -W ignore "$here/rehearse_$what.py" "$@" ;;
esac
