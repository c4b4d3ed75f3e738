#!/usr/bin/env bash
# sanitize.sh PYTHON SANITIZERS TESTS...: builds the package with GCC's sanitizers beside the
# installed one and runs the C backend's share of the tests on it. Threads share work in the same way
# on every instruction set, so for data races the best one is enough.
set -euo pipefail
python=$1 sanitizers=$2
shift 2
folder=build/sanitize-${sanitizers%%,*}
export FASTCONV_OPENMP=0
if [[ $sanitizers == address* ]]; then
    FASTCONV_OPENMP=1
fi
# A build with other flags would pass for this one, and this one for others.
clear_build() { rm -rf build/lib.* build/temp.*; }
trap clear_build EXIT
clear_build
rm -rf "$folder" && mkdir -p "$folder"
CFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=$sanitizers -fno-sanitize-recover=all" \
    LDFLAGS="-fsanitize=$sanitizers" \
    "$python" -m pip install --disable-pip-version-check --quiet --no-index --no-deps \
    --no-build-isolation --target "$folder" .
chosen="not numba"
if [[ $sanitizers == thread ]]; then
    chosen="$chosen and not c-avx2 and not c-plain"
fi
library=$(gcc -print-file-name="lib${sanitizers:0:1}san.so")
# What Python keeps for ever is no leak of ours, NumPy's own threads are not looked at, and a report
# ends the process.
FASTCONV_TEST_BACKENDS=c OPENBLAS_NUM_THREADS=1 PYTHONSAFEPATH=1 PYTHONPATH=$folder LD_PRELOAD=$library \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
    UBSAN_OPTIONS=print_stacktrace=1 \
    TSAN_OPTIONS=halt_on_error=1:report_signal_unsafe=0 \
    "$python" -m pytest --capture=no -q -x -k "$chosen" "$@"
