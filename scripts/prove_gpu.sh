#!/usr/bin/env bash
# Prove on one GPU that the package works, and measure it: tests, the real command, training at 8B shapes, kernels.
#
#   scripts/prove_gpu.sh wheels [FOLDER]  gather the packages that a machine with torch and Transformers lacks (wheels/)
#   scripts/prove_gpu.sh                  every part: less than 590 s
#   scripts/prove_gpu.sh again            the parts `main` and `levels` alone, shortened: less than 200 s
#   scripts/prove_gpu.sh list [again]     the parts and their time limits in seconds; those of a line run side by side
#   DRY_RUN=1 scripts/prove_gpu.sh        every part on the CPU with a pico model
#
# No network is needed. Packages are installed from WHEELS (default: wheels/) into BUILD, if the folder exists. Each part has
# a time limit; the others run whether or not it succeeds. PARTS="NAME ..." runs some parts only, LIMITS="NAME=SECONDS ..."
# changes limits. Three files are written to RESULTS ($OUT if set, else benchmarks/results/) while parts run: log.txt (all
# output), summary.txt (the end of each part's output) and results.jsonl (numbers).
set -uo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
SELF="$ROOT/scripts/prove_gpu.sh"
cd "$ROOT" || exit 1

MODE=all
[[ "${*: -1}" == again ]] && MODE=again
if [[ $MODE == again ]]; then
    GROUPS_OF_PARTS=(install model main levels)
    declare -A LIMIT=([install]=12 [model]=25 [main]=103 [levels]=60)
else
    GROUPS_OF_PARTS=(install "model tests command" main levels trl kernels) # a group runs side by side
    declare -A LIMIT=([install]=30 [model]=140 [tests]=140 [command]=140 [main]=140 [levels]=100 [trl]=115 [kernels]=60)
fi
for pair in ${LIMITS:-}; do LIMIT[${pair%=*}]=${pair#*=}; done

export PYTHON="${PYTHON:-python3}"
export WHEELS="${WHEELS:-$ROOT/wheels}"
export BUILD="${BUILD:-$ROOT/build/prove${DRY_RUN:+-dry}}"
results="$ROOT/benchmarks/results/gpu-$(date -u +%F-%H%M)"
if [[ -n "${DRY_RUN:-}" ]]; then
    results="$BUILD/dry-run" # measures nothing
    export CUDA_VISIBLE_DEVICES="" # also where there is a GPU
    SHAPE=pico LENGTH=256 MEDIAN=100 NUM_ROWS=160 STEPS=10 RATE=1e-2 ROUNDS=2 TRL_STEPS=2 TEST_PROCESSES=0
else
    export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" # one, before CUDA is initialised
    SHAPE=llama-3.1-8b LENGTH=2048 MEDIAN=700 NUM_ROWS=2000 STEPS=16 RATE=5e-4 ROUNDS=5 TRL_STEPS=10 TEST_PROCESSES=12
    [[ $MODE == again ]] && STEPS=8 ROUNDS=3
fi
export RESULTS="${RESULTS:-${OUT:-$results}}"
MODEL="$BUILD/$SHAPE" ROWS="$BUILD/rows.jsonl" SITE="$BUILD/site" DONE="$BUILD/results"
export HF_HUB_OFFLINE=1 HF_HOME="$BUILD/cache/hf" XDG_CACHE_HOME="$BUILD/cache" TRITON_CACHE_DIR="$BUILD/cache/triton"
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
[[ "${PYTHONPATH:-}" == "$SITE:$ROOT"* ]] || export PYTHONPATH="$SITE:$ROOT${PYTHONPATH:+:$PYTHONPATH}"

do_part() { # NAME: its last lines of output go into the summary
    local training=(train.per_device_train_batch_size=4 train.gradient_accumulation_steps=1)
    case "$1" in
    install)
        rm -rf "$SITE"
        if compgen -G "$WHEELS/*.whl" >/dev/null; then
            "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
                --target "$SITE" "$WHEELS"/*.whl || return 1
        fi
        "$PYTHON" -m pip check --disable-pip-version-check
        command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
        "$PYTHON" -c 'import platform; from importlib.metadata import version
names = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")
print("python " + platform.python_version(), *(f"{name} {version(name)}" for name in names), sep="\n")
import bitsandbytes, torch, trl, qlora_train.pipeline
print("CUDA", torch.version.cuda, "is available" if torch.cuda.is_available() else "is not available")'
        ;;
    model)
        "$PYTHON" scripts/random_model.py "$SHAPE" "$MODEL" --nf4 &&
            "$PYTHON" scripts/bench_rows.py "$ROWS" --rows "$NUM_ROWS" --median "$MEDIAN" --longest "$LENGTH"
        ;;
    tests)
        local processes=()
        "$PYTHON" -c 'import xdist' 2>/dev/null && processes=(--numprocesses "$TEST_PROCESSES" --dist worksteal)
        "$PYTHON" -m pytest -m gpu -vv --tb=short -rfE -p no:cacheprovider "${processes[@]}" tests
        ;;
    command) "$PYTHON" scripts/prove_command.py "$BUILD/command" ;;
    main)
        "$PYTHON" scripts/bench_run.py "$MODEL" "$ROWS" --steps "$STEPS" --max-length "$LENGTH" --output "$DONE/main.json" \
            "${training[@]}" train.learning_rate="$RATE"
        ;;
    levels)
        printf 'data:\n  packing: true\n' >"$BUILD/levels.yaml"
        "$PYTHON" scripts/bench_levels.py "$BUILD/levels.yaml" --rounds "$ROUNDS" --output "$DONE/levels.json" \
            model.model_name_or_path="$MODEL" data.train="$ROWS" data.max_length="$LENGTH" "${training[@]}"
        ;;
    trl)
        printf 'train:\n  group_by_length: true\n  gradient_accumulation_steps: 1\n' >"$BUILD/trl.yaml"
        PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True "$PYTHON" scripts/bench.py --model "$MODEL" --rows "$ROWS" \
            --config "$BUILD/trl.yaml" --max-length "$LENGTH" --batch-size 4 --rounds 1 --steps "$TRL_STEPS" \
            --output "$DONE/trl.json" --peer trl="$("$PYTHON" -c 'import sys; print(sys.executable)')"
        ;;
    kernels) "$PYTHON" scripts/bench_kernels.py ${DRY_RUN:+--dry-run --tokens 128} ;;
    *) echo "$1: no such part" >&2 && return 2 ;;
    esac
}

run_part() { # NAME: under its limit, in a process group of its own; called in a subshell
    local name=$1 began=$SECONDS limit=${LIMIT[$1]} output="$DONE/$1.txt" log child status how
    rm -f "$DONE/$name.json"
    exec {log}> >(tee "$output" | sed -u "s/^/$name| /" >>"$RESULTS/log.txt")
    local writer=$!
    # SIGINT, which background jobs ignore unless it is reset, lets Python and pytest report what they have
    timeout --signal=INT --kill-after=5 $((limit - 5)) env --default-signal=INT bash "$SELF" part "$name" $MODE \
        </dev/null >&$log 2>&1 {log}>&- &
    child=$!
    exec {log}>&-
    trap 'kill -TERM $child' TERM
    wait $child
    status=$?
    timeout 2 tail --pid=$writer -f /dev/null # a process that is left over may hold the output open
    case $status in 0) how=ok ;; 124 | 137) how="TIMED OUT" ;; *) how="FAILED, status $status" ;; esac
    [[ -s "$DONE/$name.json" ]] &&
        printf '{"part": "%s", "result": %s}\n' "$name" "$(tr -d '\n' <"$DONE/$name.json")" >>"$RESULTS/results.jsonl"
    printf '## %s: %s, %d of %d s\n%s\n\n' "$name" "$how" $((SECONDS - began)) $limit "$(tail -n 32 "$output")" |
        tee -a "$RESULTS/summary.txt"
}

run_all() {
    local parts name
    mkdir -p "$DONE" "$RESULTS"
    rm -f "$RESULTS"/{log.txt,summary.txt,results.jsonl}
    trap 'kill -TERM $(jobs -p) 2>/dev/null; wait; exit 143' INT TERM
    for parts in "${GROUPS_OF_PARTS[@]}"; do
        for name in $parts; do
            [[ " ${PARTS:-$name} " == *" $name "* ]] && run_part "$name" &
        done
        wait
    done
    grep '^## ' "$RESULTS/summary.txt"
    ! grep -qE '^## \w+: (FAILED|TIMED OUT)' "$RESULTS/summary.txt"
}

case "${1:-all}" in
all | again) run_all ;;
part) do_part "$2" ;;
list) for parts in "${GROUPS_OF_PARTS[@]}"; do for name in $parts; do printf '%s=%s ' "$name" "${LIMIT[$name]}"; done; echo; done ;;
wheels) "$PYTHON" scripts/gpu_wheels.py "${2:-$WHEELS}" ;;
*)
    sed -n '2,/^set /p' "$SELF" | sed '$d; s/^# \{0,1\}//'
    exit 2
    ;;
esac
