#!/usr/bin/env bash
# Installs what the tests need and runs them.
#
#   bash launch/test.sh [--checks] [pytest arguments]
#
# --checks runs ruff and mypy first. Without an NVIDIA GPU everything runs on the CPU.

source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

checks=no
if [[ ${1:-} == --checks ]]; then
    checks=yes
    shift
fi

cd "$ROOT"
if [[ $checks == yes ]]; then
    setup_environment dev
    say "ruff and mypy"
    ruff check .
    ruff format --check .
    mypy
else
    setup_environment test
fi

gpus=$(count_gpus)
((gpus > 0)) || export DS_ACCELERATOR=cpu
# A process for every two cores, since many tests start two ranks, and every file in one of them; "-n 0" after this turns
# that off. Asked before the variables below, which nproc heeds.
workers=$(($(nproc) / 2))
# Many small processes: more threads than one each only wait for each other.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
say "pytest"
exec python -m pytest -n $((workers < 1 ? 1 : workers > 8 ? 8 : workers)) --dist loadfile "$@"
