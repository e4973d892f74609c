#!/usr/bin/env bash
# Trains a recipe on the machines of a hostfile, through the deepspeed launcher (pdsh and password-less ssh).
#
#   bash launch/train.sh HOSTFILE RECIPE [overrides, for example --steps=1000]
#
# See hostfile.example for what the machines need, and `gppf-ds doctor --hostfile` for whether they have it. MASTER_PORT
# chooses another port than 29500. It is no more than
#
#   deepspeed --hostfile HOSTFILE --no_local_rank --module gppf_ds train --config RECIPE [overrides]
#
# with the hostfile checked first, words that a remote shell would split or read carried in one that it cannot, and ssh
# told to notice a machine that is gone.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
PLAIN='^[A-Za-z0-9_@+=:,./-]+$'

die() {
    printf 'train.sh: %s\n' "$1" >&2
    exit 2
}

(($# >= 2)) || die "say which machines and what to train: bash launch/train.sh HOSTFILE RECIPE [overrides]."
hostfile=$1 recipe=$2
shift 2
[[ -f $recipe ]] || die "the recipe $recipe does not exist; ds_configs/recipes holds those that come with gppf_ds."
[[ -d $ROOT/.venv/bin ]] && PATH=$ROOT/.venv/bin:$PATH
command -v deepspeed >/dev/null || die "the deepspeed launcher was not found; run 'bash launch/quickstart.sh' first."
# The launcher would silently train on this machine alone where there is no hostfile.
hosts=$(python -m gppf_ds.hostfile "$hostfile") || exit 2
((hosts == 1)) || command -v pdsh >/dev/null || die "pdsh, which starts the ranks on $hosts machines, is not installed."

# A remote shell gets the path of Python, and these variables, from the launcher's hands.
python=$(command -v python)
[[ $python =~ $PLAIN ]] || die "the launcher cannot start $python elsewhere; move .venv to a path without odd characters."
for name in $(compgen -e | grep -E '^(NCCL|LD_LIBRARY|PATH|PYTHON|UCX|MV2|MLFLOW)' || true); do
    [[ ${!name} != *[\"\$\`\\]* ]] || die "the variable $name holds a character that a remote shell would read; unset it."
done

launch=(deepspeed --hostfile "$(realpath "$hostfile")" --master_port "${MASTER_PORT:-29500}" --no_local_rank --module)
words=(train --config "$recipe" "$@")
# Without this the job would wait for ever for a machine that is gone. What the user sets comes first, and counts.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -oBatchMode=yes -oConnectTimeout=30 -oServerAliveInterval=15"

for word in "$PWD" "${words[@]}"; do
    [[ $word =~ $PLAIN ]] && continue
    encoded=$(python -m gppf_ds.launched --encode "${words[@]}")
    export DS_ENV_FILE="${DS_ENV_FILE:-$PWD/.deepspeed_env}"
    cd /  # where the launcher is, ranks start; they go to the real folder themselves
    exec "${launch[@]}" gppf_ds.launched "$encoded"
done
exec "${launch[@]}" gppf_ds "${words[@]}"
