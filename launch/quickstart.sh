#!/usr/bin/env bash
# From nothing to a trained, evaluated and exported model on the demo data set.
#
#   bash launch/quickstart.sh [--fresh] [overrides for training, for example --steps=50]
#
# Makes .venv, installs, makes demo-data/, trains with the deepspeed launcher (every NVIDIA GPU that torch can use, or
# two CPU ranks where there is none or DS_ACCELERATOR=cpu is set), exports one plain model per task, draws
# the routes and prints the results. Run again it reuses what is there; --fresh makes data and run anew (.venv stays).

source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

RUN=runs/demo
LOG=runs/demo.log
RECIPE=ds_configs/recipes/demo.yaml

usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

# Arguments for the deepspeed launcher, into the array LAUNCH: which ranks to start on this machine.
choose_ranks() {
    local gpus cores
    gpus=$(count_gpus)
    if ((gpus > 0)); then
        # Without --num_gpus the launcher starts one rank per visible GPU and respects CUDA_VISIBLE_DEVICES.
        [[ ${CUDA_VISIBLE_DEVICES:-} =~ ^[0-9,]*$ ]] ||
            die "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES must list device numbers; the deepspeed launcher reads no others."
        say "training on $gpus NVIDIA GPU(s)"
        LAUNCH=()
    else
        cores=$(nproc)
        export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}
        say "training on the CPU: 2 ranks of $OMP_NUM_THREADS thread(s)"
        LAUNCH=(--num_accelerators 2)
    fi
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Trains, or goes on from the run's last checkpoint. When it fails, the cause that the first failing rank left comes last
# on the screen, because the launcher and the other ranks go on talking after it.
train() {
    local rc=0 cause=$RUN/cause.txt
    choose_ranks
    rm -f "$cause"
    # Through the pipe below the progress bar cannot see that there is a terminal.
    if [[ -t 1 ]]; then
        export GPPF_DS_TERMINAL=1 COLUMNS=${COLUMNS:-$(tput cols 2>/dev/null || echo 120)}
    fi
    # A hostfile of the cluster must not turn this into a run on many machines, hence /dev/null.
    deepspeed --hostfile /dev/null --log_level error --master_port "${MASTER_PORT:-$(free_port)}" "${LAUNCH[@]}" \
        --no_local_rank --module gppf_ds train --config "$RECIPE" --output "$RUN" "$@" 2>&1 | tee "$LOG" || rc=$?
    ((rc == 0)) && return
    {
        printf '\nTraining failed (exit code %s, log: %s).\n' "$rc" "$LOG"
        if [[ -f $cause ]]; then
            sed -e 1d -e '/^$/d' "$cause" # the first line only names the launch
        else
            grep -E '^error:|^[A-Za-z_.]+(Error|Exception):' "$LOG" || tail -n 1 "$LOG"
        fi
    } >&2
    exit "$rc"
}

fresh=no
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
elif [[ ${1:-} == --fresh ]]; then
    fresh=yes
    shift
fi

cd "$ROOT"
setup_environment
gppf-ds doctor
if [[ $fresh == yes ]]; then
    rm -rf demo-data "$RUN"
fi

# Written into the run when everything below it is done; it holds the overrides that the run was trained with.
finished=$RUN/.quickstart
overrides=${*@Q}
if [[ -f $finished && $(<"$finished") != "$overrides" ]]; then
    die "$RUN was trained with other overrides ($(<"$finished")); add --fresh to train it anew."
fi
if [[ ! -f $finished ]]; then
    mkdir -p runs
    say "making the demo data"
    gppf-ds demo-data demo-data
    train "$@"
    say "exporting one plain model per task"
    gppf-ds export --run "$RUN"
    say "drawing the routes"
    gppf-ds analyze routes "$RUN"
    printf '%s\n' "$overrides" >"$finished"
fi
gppf-ds summary --run "$RUN"
