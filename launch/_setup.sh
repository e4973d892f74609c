# shellcheck shell=bash
# Sourced by the scripts beside it: makes .venv in the checkout and installs gppf_ds into it. Needs no root and writes
# only inside the checkout. Whatever stops it is said in one sentence on stderr, with exit code 2.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
INSTALL_LOG=$VENV/install.log
CONSTRAINTS=$ROOT/launch/constraints.txt
NEEDED_GIB=8  # torch with its CUDA libraries takes about 5, the downloads on the way about 3

# What the user's shell may set for other projects must not leak into this environment.
unset PYTHONHOME PYTHONPATH
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
# pip's cache would lie in the home folder; it is used only where the user says where it is.
[[ -n ${PIP_CACHE_DIR:-} ]] || export PIP_NO_CACHE_DIR=1

die() {
    printf '%s: %s\n' "$(basename "$0")" "$1" >&2
    exit 2
}

say() { printf '== %s\n' "$1"; }

is_supported_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

# Prints the interpreter to build .venv with: $PYTHON where that is set, otherwise the first that fits.
find_python() {
    local candidate found="" candidates=(python3.12 python3.11 python3)
    [[ -n ${PYTHON:-} ]] && candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if is_supported_python "$candidate"; then
            found=$candidate
            break
        fi
    done
    if [[ -z $found && -n ${PYTHON:-} ]]; then
        die "PYTHON=$PYTHON is not a working Python 3.11 or 3.12; point PYTHON at one."
    elif [[ -z $found ]]; then
        die "no Python 3.11 or 3.12 was found; install one (Debian, Ubuntu: python3 and python3-venv) or set PYTHON."
    fi
    "$found" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        die "$found cannot make virtual environments; install its venv package (Debian, Ubuntu: python3-venv)."
    printf '%s\n' "$found"
}

check_disk() {
    local needed=$1 free_kib
    free_kib=$(df -Pk "$ROOT" | awk 'NR == 2 { print $4 }')
    ((free_kib >= needed * 1024 * 1024)) ||
        die "$((free_kib / 1024 / 1024)) GiB are free on the disk of $ROOT and the installation needs $needed; free some space."
}

# .checkout names the folder that .venv was made in: a moved environment has stale paths and is made anew.
make_venv() {
    local python made_in=""
    [[ -f $VENV/.checkout ]] && made_in=$(<"$VENV/.checkout")
    if [[ $made_in == "$ROOT" && -x $VENV/bin/python ]]; then
        check_disk 1
        return
    fi
    python=$(find_python)
    { mkdir -p "$VENV" && : >"$INSTALL_LOG"; } 2>/dev/null || die "cannot write to $VENV; use a checkout that you own."
    check_disk "$NEEDED_GIB"
    say "making .venv with $("$python" --version)"
    "$python" -m venv ${made_in:+--clear} "$VENV" >&2 || die "$python could not make the virtual environment $VENV."
    is_supported_python "$VENV/bin/python" ||
        die "$VENV holds another Python than 3.11 or 3.12; remove that folder and start again."
    printf '%s\n' "$ROOT" >"$VENV/.checkout"
}

# pip with the pinned versions. Unpacks beside the environment, because /tmp may be small and is not ours.
pip_install() {
    local rc=0
    mkdir -p "$VENV/tmp"
    TMPDIR=$VENV/tmp MMCV_WITH_OPS=0 DS_BUILD_OPS=0 \
        "$VENV/bin/python" -m pip install --constraint "$CONSTRAINTS" "$@" >>"$INSTALL_LOG" 2>&1 || rc=$?
    rm -rf "$VENV/tmp"
    ((rc == 0)) || die "$(explain_pip_failure)"
}

explain_pip_failure() {
    local log
    log=$(tail -n 60 "$INSTALL_LOG")
    if grep -qi 'no space left' <<<"$log"; then
        printf 'the disk ran full during the installation; free some space (log: %s).' "$INSTALL_LOG"
    elif grep -qiE 'name resolution|connection (error|broken)|ConnectionError|max retries|timed out|proxy' <<<"$log"; then
        printf 'pip cannot reach the package registry; check the network and the proxy (log: %s).' "$INSTALL_LOG"
    else
        log=$(grep -oE '[A-Za-z]+Error: .*' <<<"$log" || grep -oiE 'error: .*' <<<"$log") || true
        printf 'pip failed: %s (log: %s).' "$(tail -n 1 <<<"${log:-no reason was given}")" "$INSTALL_LOG"
    fi
}

# mmcv, mmseg and imaug pull in opencv-python, imaug opencv-python-headless too, and both own the folder cv2. The former
# needs libGL and X11, which a server lacks, so the latter's files go on top. Both stay registered: with either removed,
# the next pip run would bring it back.
use_headless_opencv() {
    "$VENV/bin/python" -c 'import cv2, re, sys; sys.exit(not re.search(r"GUI: +NONE", cv2.getBuildInformation()))' \
        >/dev/null 2>&1 || pip_install --force-reinstall --no-deps opencv-python-headless
}

environment_key() {
    { printf '%s\n' "$ROOT" && cat "$ROOT/pyproject.toml" "$CONSTRAINTS" "${BASH_SOURCE[0]}"; } | sha256sum
}

# setup_environment [EXTRA]: .venv with gppf_ds (editable) and one extra of pyproject.toml. A stamp keyed by the files
# that decide what is installed makes every later call return at once.
setup_environment() {
    local extra=${1:-} key stamp
    stamp=$VENV/.installed${extra:+-$extra}
    key=$(environment_key)
    if [[ ! -x $VENV/bin/python || ! -f $stamp || $(<"$stamp") != "$key" ]]; then
        make_venv
        say "installing (a few minutes the first time; log: $INSTALL_LOG)"
        : >"$INSTALL_LOG"
        pip_install torch torchvision
        pip_install --editable "$ROOT${extra:+[$extra]}"
        use_headless_opencv
        printf '%s\n' "$key" >"$stamp"
    fi
    use_environment
}

# Every cache that would land in the home folder goes into .venv instead.
use_environment() {
    local cache=$VENV/cache
    mkdir -p "$cache" 2>/dev/null || die "cannot write to $VENV; use a checkout that you own."
    export PATH=$VENV/bin:$PATH XDG_CACHE_HOME=$cache MPLCONFIGDIR=$cache/matplotlib CUDA_CACHE_PATH=$cache/cuda
    export TORCH_EXTENSIONS_DIR=$cache/torch_extensions TORCHINDUCTOR_CACHE_DIR=$cache/inductor
    export TRITON_HOME=$cache TRITON_CACHE_DIR=$cache/triton
}

# The number of NVIDIA GPUs that torch can use here; DS_ACCELERATOR=cpu asks for none.
count_gpus() {
    if [[ ${DS_ACCELERATOR:-} == cpu ]]; then
        echo 0
    else
        python -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)' 2>/dev/null ||
            die "torch cannot be imported from $VENV; remove that folder and start again."
    fi
}
