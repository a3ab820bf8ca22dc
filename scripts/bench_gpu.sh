#!/usr/bin/env bash
# What is measured on a machine with a GPU, in pieces meant for less than nine minutes: each by itself, in any order, again.
#
#   scripts/bench_gpu.sh list                 names of the pieces
#   scripts/bench_gpu.sh PIECE [WHEELS]       one of them, or all
#   DRY_RUN=1 scripts/bench_gpu.sh all        every piece on a CPU: a pico model, a step or two, peers that are named
#   scripts/bench_gpu.sh table [FOLDER]       the table of the results in a folder
#
# A machine without a network takes packages as wheels: WHEELS/ours/*.whl, WHEELS/unsloth/*.whl, WHEELS/axolotl/*.whl,
# WHEELS/llama-factory/*.whl. Each folder is installed by itself into a folder of its own, on top of what PYTHON has; every
# piece installs what is not there yet. TRL is a package of ours. Peers that have a Python already: PEERS="NAME=PYTHON ...".
#
# The model has random weights at the shape SHAPE, stored in NF4. What a later piece goes on from is kept in BUILD; results
# go to RESULTS: $OUT where that is set, else benchmarks/results/gpu-DATE.
set -uo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)"
cd "$ROOT"
PIECES=(install model tests run kernels step peers memory)

PYTHON="${PYTHON:-python3}"
WHEELS="${WHEELS:-${2:-}}"
BUILD="${BUILD:-$ROOT/build/gpu${DRY_RUN:+-dry}}"
RESULTS="${RESULTS:-${OUT:-$ROOT/benchmarks/results/gpu-$(date -u +%F)}}"
SITE="$BUILD/site"
PEERS="${PEERS:-}"
if [ -n "${DRY_RUN:-}" ]; then
    SHAPE=pico LENGTH=256 MEDIAN=100 NUM_ROWS=120 STEPS=10 RATE=1e-2 ROUNDS=1 PEER_STEPS=2 BATCH=2 STEP_ROUNDS=1
    MEMORY=(--caps 8 --longest 32 --precision 1)
else
    SHAPE="${SHAPE:-llama-3.1-8b}" LENGTH=2048 MEDIAN=700 NUM_ROWS=2000 STEPS=16 RATE=5e-4 ROUNDS=2 PEER_STEPS=10 BATCH=2
    STEP_ROUNDS=6
    # shellcheck disable=SC2206 # several words
    MEMORY=(--caps ${CAPS:-8 12 16 24 48 80} --minutes "${MINUTES:-4}" --timeout "${TIMEOUT:-270}")
fi
MODEL="$BUILD/$SHAPE" ROWS="$BUILD/rows.jsonl" DONE="$BUILD/results"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" # one, before CUDA is initialised
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTHONPATH="$SITE/ours:$ROOT"
if [ -z "${DRY_RUN:-}" ]; then
    export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
fi

install_wheels() { # into a folder for each folder of wheels, with a python that sees it
    [ -n "$WHEELS" ] || return 0
    local folder name
    for folder in "$WHEELS"/*/; do
        name="$(basename "$folder")"
        [ -f "$SITE/$name.installed" ] && continue
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
            --target "$SITE/$name" "$folder"*.whl || return 1
        printf '#!/bin/sh\nPYTHONPATH="%s${PYTHONPATH:+:$PYTHONPATH}" exec "%s" "$@"\n' \
            "$SITE/$name" "$(command -v "$PYTHON")" >"$SITE/$name.python"
        chmod +x "$SITE/$name.python"
        touch "$SITE/$name.installed"
    done
}

make_model() {
    [ -f "$MODEL/config.json" ] || "$PYTHON" scripts/random_model.py "$SHAPE" "$MODEL" --nf4 || return 1
    [ -f "$ROWS" ] || "$PYTHON" scripts/bench_rows.py "$ROWS" --rows "$NUM_ROWS" --median "$MEDIAN" --longest "$LENGTH"
}

peer_options() { # a --peer for each Python that a peer is installed for
    local python name peer
    for peer in $PEERS; do printf -- '--peer\n%s\n' "$peer"; done
    [ -f "$SITE/ours.python" ] && printf -- '--peer\ntrl=%s\n' "$SITE/ours.python"
    for python in "$SITE"/*.python; do
        name="$(basename "$python" .python)"
        [ -f "$python" ] && [ "$name" != ours ] && printf -- '--peer\n%s=%s\n' "$name" "$python"
    done
    return 0
}

free_name() { # the first of NAME-1.json, NAME-2.json, ... that is not there
    local number=1
    while [ -f "$DONE/$1-$number.json" ]; do number=$((number + 1)); done
    echo "$1-$number.json"
}

piece() { # NAME: does it; the names of its files of results are in FILES afterwards
    FILES=()
    install_wheels || return 1
    case "$1" in
    install)
        FILES=(machine.txt)
        local names="'torch', 'transformers', 'peft', 'trl', 'bitsandbytes'"
        { nvidia-smi 2>/dev/null; lscpu | grep '^Model name'; "$PYTHON" -VV; "$PYTHON" -c \
            "from importlib.metadata import version; print(*((n, version(n)) for n in ($names)), sep='\n')"; } \
            >"$DONE/machine.txt" 2>&1
        ;;
    model) make_model ;;
    tests)
        FILES=(tests.txt)
        local where # these files alone: others ask for packages that only they need
        mapfile -t where < <(grep -rlE --include='*.py' 'mark\.gpu' tests)
        "$PYTHON" -m pytest -m gpu "${where[@]}" 2>&1 | tee "$DONE/tests.txt"
        ;;
    run)
        FILES=(run.json)
        make_model && "$PYTHON" scripts/bench_run.py "$MODEL" "$ROWS" --steps "$STEPS" --max-length "$LENGTH" \
            --output "$DONE/run.json" train.learning_rate="$RATE"
        ;;
    kernels)
        FILES=(kernels.txt)
        "$PYTHON" scripts/bench_kernels.py ${DRY_RUN:+--dry-run --tokens 128} 2>&1 | tee "$DONE/kernels.txt"
        ;;
    step)
        FILES=(step.json)
        printf 'data:\n  packing: true\n' >"$BUILD/step.yaml"
        make_model && "$PYTHON" scripts/bench_step.py "$BUILD/step.yaml" --rounds "$STEP_ROUNDS" --output "$DONE/step.json" \
            model.model_name_or_path="$MODEL" data.train="$ROWS" data.max_length="$LENGTH" train.gradient_checkpointing=false
        ;;
    peers)
        FILES=("$(free_name peers)")
        printf 'train:\n  group_by_length: true\n  gradient_accumulation_steps: 1\n' >"$BUILD/peers.yaml"
        local peers
        mapfile -t peers < <(peer_options)
        make_model && "$PYTHON" scripts/bench.py --model "$MODEL" --rows "$ROWS" --config "$BUILD/peers.yaml" \
            --max-length "$LENGTH" --batch-size "$BATCH" --rounds "$ROUNDS" --steps "$PEER_STEPS" \
            --output "$DONE/${FILES[0]}" "${peers[@]}"
        ;;
    memory)
        FILES=(memory.jsonl)
        make_model && "$PYTHON" scripts/bench_memory.py "$MODEL" --trials "$DONE/memory.jsonl" "${MEMORY[@]}"
        ;;
    *)
        echo "$1: no such piece; there are: ${PIECES[*]}, table, all" >&2
        return 2
        ;;
    esac
}

run_piece() { # NAME: does it, and keeps its results whether it went well or not
    local began=$SECONDS status
    mkdir -p "$DONE" "$RESULTS"
    echo "== $1"
    piece "$1"
    status=$?
    echo "$1 status $status $((SECONDS - began)) s" | tee -a "$DONE/pieces.txt"
    FILES+=(pieces.txt)
    local file
    for file in "${FILES[@]}"; do
        [ -f "$DONE/$file" ] && [ "$DONE" != "$RESULTS" ] && cp "$DONE/$file" "$RESULTS/"
    done
    return "$status"
}

table() { # FOLDER
    mkdir -p "$RESULTS"
    "$PYTHON" scripts/bench_gpu_table.py "$1" | tee "$RESULTS/table.md"
}

case "${1:-}" in
list) printf '%s\n' "${PIECES[@]}" ;;
table) table "${2:-$DONE}" ;;
all)
    failed=0
    for name in "${PIECES[@]}"; do run_piece "$name" || failed=1; done
    table "$DONE" || failed=1
    exit "$failed"
    ;;
"")
    sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
    exit 2
    ;;
*) run_piece "$1" ;;
esac
