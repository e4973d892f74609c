#!/usr/bin/env bash
# Trains a recipe on the machines of a hostfile, through the deepspeed launcher (pdsh and password-less ssh).
#
#   bash launch/train.sh HOSTFILE RECIPE [overrides, for example --steps=1000]
#
# See hostfile.example for what the machines need. MASTER_PORT chooses another port than 29500.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

die() {
    printf 'train.sh: %s\n' "$1" >&2
    exit 2
}

(($# >= 2)) || die "say which machines and what to train: bash launch/train.sh HOSTFILE RECIPE [overrides]."
hostfile=$1 recipe=$2
shift 2
# The launcher would silently train on this machine alone.
[[ -f $hostfile ]] || die "the hostfile $hostfile does not exist; copy hostfile.example and name your machines."
[[ -f $recipe ]] || die "the recipe $recipe does not exist; ds_configs/recipes holds those that come with gppf_ds."
[[ -d $ROOT/.venv/bin ]] && PATH=$ROOT/.venv/bin:$PATH
command -v deepspeed >/dev/null || die "the deepspeed launcher was not found; run 'bash launch/quickstart.sh' first."
hosts=$(grep -cE '^[^#[:space:]]' "$hostfile") || die "the hostfile $hostfile names no machine."
((hosts == 1)) || command -v pdsh >/dev/null || die "pdsh, which starts the ranks on $hosts machines, is not installed."

# The launcher hands these words to a shell on every machine without quoting them, so only plain ones are let through.
for word in "$PWD" "$recipe" "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] ||
        die "'$word' holds a character that a remote shell would read as its own; put that value into the recipe."
done

exec deepspeed --hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}" --no_local_rank \
    --module gppf_ds train --config "$recipe" "$@"
