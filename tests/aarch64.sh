#!/usr/bin/env bash
# Builds the CPU engine for Linux on aarch64 by a cross compiler, and runs its tests emulated (QEMU, user mode).
#
#   tests/aarch64.sh ROOT [pytest's arguments]
#
# By default the tests of the backend cpu in tests/test_engines.py run, about 40 minutes. It prints each test's result.
# It needs aarch64-linux-gnu-g++, QEMU registered for aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user-static), `make
# setup`, and the right to chroot. ROOT: a root directory of Debian for arm64 that has Python of .venv's version,
# its headers, and from pip torch, numpy and the libraries of the extra [test]; PYTHONPATH names folders in ROOT where
# they are, if Python does not find them itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=${1:?the root directory of an aarch64 system}
shift
[ $# -gt 0 ] || set -- tests/test_engines.py -k "cpu and not cuda and not triton" -m "not slow"

bin=.venv/bin
version=$($bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
include=$(realpath "$root/usr/include/python$version")
suffix=.cpython-${version/./}-aarch64-linux-gnu.so
# Python's pyconfig.h is where Debian keeps that of each architecture.
mkdir -p build
$bin/cmake -S . -B build/aarch64 -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/$bin/ninja" -DNPERF_CUDA=OFF -DNPERF_CPU=ON \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_CXX_FLAGS="-isystem $(dirname "$include")" -DPython_EXECUTABLE="$PWD/$bin/python" \
  -DPython_INCLUDE_DIR="$include" -DPYTHON_MODULE_EXTENSION="$suffix" -DPYTHON_MODULE_DEBUG_POSTFIX="" \
  -Dpybind11_DIR="$($bin/python -m pybind11 --cmakedir)" > build/aarch64.log || { cat build/aarch64.log; exit 1; }
$bin/cmake --build build/aarch64 | tail -n 1

rm -rf "$root/opt/noetherperf" && mkdir -p "$root/opt/noetherperf"
git archive HEAD | tar -x -C "$root/opt/noetherperf"
cp "build/aarch64/_cpu$suffix" "$root/opt/noetherperf/noetherperf/"
run() {
  chroot "$root" env PYTHONPATH="/opt/noetherperf:${PYTHONPATH:-}" PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=2 \
    sh -c 'cd /opt/noetherperf && exec "$@"' sh "python$version" -m "$@"
}
run noetherperf info
run pytest -p no:cacheprovider -v "$@"
