#!/usr/bin/env bash
# Every experiment behind the tables, a line per arm: NAME, its seeds, the command.
#
#   bash docs/experiments.sh                 all of it, a day on two cores
#   bash docs/experiments.sh '^nlac-s0$'     the runs whose NAME-sSEED matches (a bash regular expression)
#   DRY=1 bash docs/experiments.sh           only says what it would run
#
# Each run leaves runs/NAME-sSEED (RESULTS=elsewhere), which is not for git; `docs/report.py add` keeps its line in
# docs/results.jsonl and its curve in docs/curves.csv (KEPT=elsewhere). Kept runs are skipped; unfinished ones are named
# and left alone: remove them, or continue them with --resume.
# @ in a command stands for the seed. --match makes a rival stop at the environment steps of the nlac run of that seed,
# which comes first. `python docs/report.py --write docs/results.md` and `python docs/learning_curves.py` then make tables and figure.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} results=${RESULTS:-runs} kept=${KEPT:-docs} pattern=${1:-} failed=0

keep() { "$python" docs/report.py --results "$kept" add "$1"; }

runs() { # NAME "SEEDS" SCRIPT [FLAGS...]
    local name=$1 seeds=$2 seed out
    shift 2
    for seed in $seeds; do
        out=$results/$name-s$seed
        [[ $name-s$seed =~ $pattern ]] || continue
        if grep -qsF "{\"design\":2,\"name\":\"$name-s$seed\"," "$kept/results.jsonl"; then continue; fi
        if [[ -f $out/summary.json ]]; then continue; fi
        if [[ -e $out ]]; then echo "$out is unfinished: skipped" >&2; continue; fi
        echo "== $python ${*//@/$seed} --seed $seed --out-dir $out"
        [[ -n ${DRY:-} ]] && continue
        "$python" "${@//@/$seed}" --seed "$seed" --out-dir "$out" && keep "$out" || failed=1
    done
}

probe() { # NAME "SEEDS" PROGRAM: what finished runs are asked besides; the answer is kept with the run
    local name=$1 seeds=$2 program=$3 seed out
    for seed in $seeds; do
        out=$results/$name-s$seed
        [[ $name-s$seed =~ $pattern && -f $out/summary.json ]] || continue
        if [[ -f $out/$(basename "$program" .py).json ]]; then continue; fi
        echo "== $python $program $out"
        [[ -n ${DRY:-} ]] && continue
        "$python" "$program" "$out" && keep "$out" || failed=1
    done
}

# the claim: the learned language critic does it
runs nlac               "0 1 2 3 4" nlac.py
# the paper's setting as it is, and two floors: their critics never tell actions apart, so no gate would ever open
runs nlac-paper         "0" nlac.py --k 1 --m 1 --distil all --frozen-parts False --anchor 0 --critic-gate 0 --even-turns False
runs frozen-critic      "0 1 2" nlac.py --ablation frozen-critic --critic-gate 0
runs blind-critic       "0 1 2" nlac.py --ablation blind-critic --critic-gate 0
runs label-only         "0 1 2" nlac.py --ablation label-only # the same critic, its reasons cut away
runs nlac-gate75        "0 1 2 3 4" nlac.py --critic-gate 0.75
runs label-only-gate75  "0" nlac.py --ablation label-only --critic-gate 0.75

# the ceiling, and the ladder from there: one learned part at a time
runs ceiling            "0 1 2" docs/ceiling.py --match "$results/nlac-s@"
runs ceiling-rules      "0 1 2" docs/ceiling.py --refiner rule --match "$results/nlac-s@"
runs ceiling-evaluator  "0 1 2" docs/ceiling.py --verdicts model --match "$results/nlac-s@"

# rivals at equal environment steps; PPO's learning rate and entropy bonus are searched on a seed of their own, and the best on the test episodes is
# taken; GRPO's 75 steps of 128 episodes are as many as nlac's 150 of 64
runs nlac-grpo          "0 1 2" self_guide.py --env repair --guide off --steps 75
for lr in 1e-4 3e-4 1e-3 3e-3; do
    runs "ppo-search-lr$lr"        "100" docs/ppo.py --lr "$lr" --entropy-coef 0 --match "$results/nlac-s0"
    runs "ppo-search-lr$lr-e0.01"  "100" docs/ppo.py --lr "$lr" --entropy-coef 0.01 --match "$results/nlac-s0"
done
runs ppo                "0 1 2" docs/ppo.py --lr 1e-3 --entropy-coef 0 --match "$results/nlac-s@"
runs self-distillation  "0 1 2" docs/self_distillation.py --eval-every 4 --match "$results/nlac-s@"
runs nlql               "0 1 2" docs/nlql.py --match "$results/nlac-s@"
runs mc-backup          "0 1 2" nlac.py --ablation mc-backup

# one axis at a time (k = 4, m = 1 and frozen parts are nlac itself); the base model's corpus speaks of k futures and of up to m tries, so where
# these differ it is another base
runs k1                 "0 1 2" nlac.py --k 1
runs m2                 "0 1 2" nlac.py --m 2
runs no-ema             "0 1 2" nlac.py --ema 0
runs distil-all         "0 1 2" nlac.py --distil all
runs unfrozen-parts     "0 1 2" nlac.py --frozen-parts False

# twenty questions, the things in question listed: where the random policy wins one time in ten. Its gate never opens (the true chances would give it
# 0.6 in the first turn), so one run is without; the ceilings say whether true futures would help
listed="--env twenty_questions:listed"
runs 20q-nlac              "0 1" nlac.py $listed
runs 20q-nlac-gate0        "0" nlac.py $listed --critic-gate 0
runs 20q-blind-critic      "0" nlac.py $listed --critic-gate 0 --ablation blind-critic
runs 20q-grpo              "0 1" self_guide.py $listed --guide off --steps 75 # as many episodes as nlac's
runs 20q-ceiling           "0" docs/ceiling.py $listed --match "$results/20q-nlac-s@"
runs 20q-ceiling-m1        "0" docs/ceiling.py $listed --margin 1 --match "$results/20q-nlac-s@"
runs 20q-ceiling-rules-m1  "0" docs/ceiling.py $listed --margin 1 --refiner rule --match "$results/20q-nlac-s@"
runs 20q-ceiling-rules-m1-k16 "1" docs/ceiling.py $listed --margin 1 --refiner rule --k 16 --match "$results/20q-nlac-s@"
runs 20q-imitation       "0" act.py --pipeline il $listed --num-demos 6000 --epochs 4 # what a tiny model can learn there

# Self-Guide and its arms, all from one base
runs self-guide-full       "0 1 2 3 4" self_guide.py
runs self-guide-zero       "0 1 2 3 4" self_guide.py --trust zero
runs self-guide-grpo       "0 1 2 3 4" self_guide.py --guide off
runs self-guide-inference  "0 1 2" self_guide.py --guide inference
runs self-guide-immediate  "0 1 2" self_guide.py --trust immediate
runs self-guide-no-anneal  "0 1 2" self_guide.py --trust no-anneal
runs self-guide-dapo       "0 1 2" self_guide.py --estimator dapo
runs self-guide-grpo-dapo  "0 1 2" self_guide.py --estimator dapo --guide off
runs self-guide-grpo-long  "0 1 2" self_guide.py --guide off --steps 250 # its curve reaches the full method's sampled tokens

# the same with the paper's premise: a base that knows progress and takes its hints
dosed="--dose 1 --examples 20000"
runs self-guide-dose-full       "0 1 2" self_guide.py $dosed
runs self-guide-dose-zero       "0 1 2" self_guide.py $dosed --trust zero
runs self-guide-dose-grpo       "0 1 2" self_guide.py $dosed --guide off
runs self-guide-dose-inference  "0" self_guide.py $dosed --guide inference
runs self-guide-dose-grpo-long  "0" self_guide.py $dosed --guide off --steps 210 # as many sampled tokens as the full method
# which link fails: ratings that are right by construction, those of another task, those of the start policy
runs self-guide-dose-exact        "0" docs/other_rater.py --rating exact $dosed
runs self-guide-dose-shuffled     "0" docs/other_rater.py --rating shuffled $dosed
runs self-guide-dose-frozen-rater "0" self_guide.py $dosed --frozen-rater

# the same code with a real chat model on a laptop (SmolLM2-135M-Instruct): demonstrations first, then ten small steps from there; NLAC from
# the model as it comes
small="--prefill --show-actions --eval-episodes 20"
runs act-smollm2-il "0" act.py --model smollm2 --shots 2 $small --pipeline il --num-demos 20 --epochs 3 --sft-batch-size 2 \
    --sft-lr 5e-5 --micro-batch-size 2 --max-new-tokens 20 --choice-tokens 24
small_grpo="--shots 2 $small --dtype mixed --temperature 1 --kl 0 --lr 1e-5 --steps 10 --batch-size 16 --group-size 4
    --micro-batch-size 2 --max-new-tokens 24 --rate-tokens 40 --eval-every 100 --save-every 1"
runs self-guide-smollm2-full "0" self_guide.py --model "$results/act-smollm2-il-s0/model" $small_grpo
runs self-guide-smollm2-grpo "0" self_guide.py --model "$results/act-smollm2-il-s0/model" $small_grpo --guide off
runs nlac-smollm2 "0" nlac.py --model smollm2 --shots 1 $small --lr 1e-5 --steps 12 --episodes-per-step 8 --updates 1 \
    --batch-size 8 --actor-states 8 --max-new-tokens 24 --forecast-tokens 64 --critique-tokens 96 --eval-every 6 --save-every 3

# the minutes that README tells: default runs alone on both cores, which the others share (OMP_NUM_THREADS=2)
for script in nlac self_guide act reagent; do runs "${script//_/-}-two-threads" "0" "$script.py"; done

# ACT: the pipelines at equal epochs, the baseline of another paper, and pairs that another size of model proposed
for pipeline in act,il il,il il,rl act,il,rl; do runs "act-$pipeline" "0 1 2 3 4" act.py --pipeline "$pipeline"; done
for pipeline in il act act,rl il,rl,rl; do runs "act-$pipeline" "0 1 2" act.py --pipeline "$pipeline"; done
for pipeline in sft-choice,il dpo,il no-reasoning,il; do runs "act-$pipeline" "0 1 2" docs/act_controls.py --pipeline "$pipeline"; done
runs act-early-experience  "0 1 2" docs/early_experience.py
for pipeline in act,il il,il; do # where could ACT help? each setting beside its own control
    runs "act-few-demos-$pipeline"  "0 1 2 3 4" act.py --num-demos 20 --epochs 10 --pipeline "$pipeline"
    runs "act-many-demos-$pipeline" "0 1 2" act.py --num-demos 100 --pipeline "$pipeline"
    runs "act-128x2-$pipeline"      "0 1 2" act.py --model tiny:128x2 --pipeline "$pipeline"
done
for pipeline in il sft-choice,il no-reasoning,il; do # is it the thought, or only that imitation overfits less?
    runs "act-few-demos-$pipeline" "0 1 2 3 4" docs/act_controls.py --num-demos 20 --epochs 10 --pipeline "$pipeline"
done
for pipeline in act,il il,il act,il,rl il,rl; do # a base whose thoughts say what either action would bring about
    runs "act-dose-$pipeline" "0 1 2" act.py --dose 1 --pipeline "$pipeline"
done
for pipeline in act,il il,il; do # one whose outlooks are better than the commonest
    runs "act-dose20k-$pipeline" "0 1" act.py --dose 1 --examples 20000 --pipeline "$pipeline"
done
runs act-il-family      "0 1 2" act.py --env rg:family_relationships --pipeline il --examples 3000 --num-demos 12000 --epochs 4 \
    --sft-batch-size 32 --micro-batch-size 32 --sft-lr 2e-3 --choice-tokens 48 --eval-every 500 --save-every 1000
runs act-k4             "0 1 2" act.py --candidates 4
runs act-32x2           "0 1 2" act.py --model tiny:32x2
runs act-32x2-il,il     "0 1 2" act.py --model tiny:32x2 --pipeline il,il
runs act-32x2-foreign   "0 1 2" act.py --model tiny:32x2 --pairs "$results/act-act,il-s@/pairs.jsonl"

# Reagent: U trains the judge that the other arms of its seed use
runs reagent-U             "0 1 2 3 4" reagent.py
runs reagent-none          "0 1 2 3 4" reagent.py --variant none
runs reagent-R-2G          "0 1 2 3 4" reagent.py --variant R --batch-size 256 --group-size 16 --rrm "$results/reagent-U-s@/rrm"
runs reagent-none-2G       "0 1 2" reagent.py --variant none --batch-size 256 --group-size 16
runs reagent-R             "0 1 2" reagent.py --variant R --rrm "$results/reagent-U-s@/rrm"
runs reagent-C             "0 1 2" reagent.py --variant C --rrm "$results/reagent-U-s@/rrm"
for weight in 0 0.1 0.5; do
    runs "reagent-U-lambda$weight" "0 1 2" reagent.py --score-weight "$weight" --rrm "$results/reagent-U-s@/rrm"
done
for judging in annotator shuffled; do # the two ends between which the trained judge stands
    runs "reagent-U-$judging" "0 1 2" docs/other_judge.py --judging "$judging" --rrm "$results/reagent-U-s@/rrm"
done
# the same with the premise that second attempts follow a critique
runs reagent-dose-U        "0 1 2 3 4" reagent.py --dose 1
runs reagent-dose-none     "0 1 2 3 4" reagent.py --dose 1 --variant none
runs reagent-dose-R-2G     "0 1 2 3 4" reagent.py --dose 1 --variant R --batch-size 256 --group-size 16 --rrm "$results/reagent-dose-U-s@/rrm"
runs reagent-dose-none-2G  "0 1 2" reagent.py --dose 1 --variant none --batch-size 256 --group-size 16
runs reagent-dose-C        "0 1 2" reagent.py --dose 1 --variant C --rrm "$results/reagent-dose-U-s@/rrm"
# judges from the floor to the ceiling: of other attempts, one that has learnt from four times as many trajectories, the program
runs reagent-dose-U-shuffled   "0" docs/other_judge.py --judging shuffled --dose 1 --rrm "$results/reagent-dose-U-s@/rrm"
runs reagent-dose-U-judge12000 "1 2" reagent.py --dose 1 --judged 12000
runs reagent-dose-U-annotator  "0 1" docs/other_judge.py --judging annotator --dose 1 --rrm "$results/reagent-dose-U-s0/rrm"

# does ACT's choice hang on its thought? what is the judge worth, what the critique?
probe act-act,il           "0 1 2" docs/rationale.py
probe reagent-dose-U       "0 1 2" docs/judge.py
probe reagent-dose-U       "0 1 2" docs/second_attempts.py
exit $failed
