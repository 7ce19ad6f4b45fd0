"""What a chat model does in the four scripts before any training.

    python docs/zero_shot.py SCRIPT [its flags] --out-dir OUT
    python docs/zero_shot.py self_guide --model smollm2 --shots 2 --prefill --show-actions \\
        --eval-episodes 20 --max-new-tokens 24 --rate-tokens 48 --out-dir runs/zero-shot

Plays --eval-episodes episodes of `test` and asks every part of the script at the states that were
met. OUT/SCRIPT-ENV-SHOTS.json holds: `understood`, the share of actions that the world understood;
`parts`, of each part how many replies were asked for, which shares of them could be read and were
cut by the limit; `samples`, up to 50 of its replies; three whole `episodes`. Nothing is trained.
"""

import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import act
import common
import envs
import nlac
import reagent
import self_guide

SAMPLES = 50
STREAM = ("zero-shot",)  # of the random numbers


def of_self_guide(args):
    """Guided episodes, where step and rating alternate, and plain ones."""
    world = self_guide.check_args(args)
    model, chat = self_guide.load(world, args)
    found = {}
    for name, guided in ("plain", False), ("guided", True):
        played = self_guide.rollout(
            model, chat, args, "test", range(args.eval_episodes), guided=guided,
            temperature=args.eval_temperature, stream=STREAM)
        found[name] = self_guide.watch(played)
    plain, guided = found["plain"], found["guided"]
    ratings, labels = [], []
    for episode in played:
        ratings += [text for who, text in episode.said if who == "rate"]
        labels += episode.labels
    cut = sum(episode.cut["rate"] for episode in played)
    return {
        "understood": 1 - plain["invalid"],
        "understood_guided": 1 - guided["invalid"],
        "success": plain["success"],
        "success_guided": guided["success"],
        "parts": {"rate": part(len(ratings), len(labels) - labels.count(None), cut)},
        "shares": {name: guided[f"label_{name}"] for name in self_guide.LABELS} if labels else {},
        "samples": {"rate": ratings[:SAMPLES]},
        "episodes": [self_guide.record(episode) for episode in played[:3]]}


def of_nlac(args):
    """Plain episodes; then every part at up to 50 of the states that were met."""
    world = nlac.check_args(args)
    model, chat = nlac.load(world, args)
    parts = nlac.Parts(model, chat, world, args)
    played = nlac.rollout(model, chat, args, "test", range(args.eval_episodes),
                          temperature=args.eval_temperature, stream=STREAM)
    steps = [t for episode in played for t in nlac.transitions(episode)]
    steps = random.Random(0).sample(steps, min(SAMPLES, len(steps)))
    tries = nlac.refine(parts, [t.state for t in steps], STREAM, [t.reply for t in steps])
    targets = nlac.successor_targets(parts, [t for t in steps if not t.done], STREAM)
    said = {"successor": [future for some in tries for future in some[0].futures],
            "backup": targets, "evaluator": [some[0].critique for some in tries],
            "refiner": [some[-1].reply for some in tries]}
    counts = {}
    for name, seen in parts.counts.items():
        counts[name] = part(seen["asked"], seen["parse"], seen["cut"])
    return {
        "understood": common.mean(valid for episode in played for valid in episode.valid),
        "success": common.mean(episode.won for episode in played),
        "parts": counts,
        "refined_is_possible": share_possible(world, steps, tries),
        "samples": said,
        "episodes": [nlac.annotated(parts, episode, ("whole",)) for episode in played[:3]]}


def share_possible(world, steps, tries):
    """Of the refined actions, those that the world understands at their state."""
    valid = []
    for t, some in zip(steps, tries):
        envs.replay(world, t.seed, [common.aloud(reply) for reply in t.state[1::2]], "test")
        *_, info = world.step(common.aloud(some[-1].reply))
        valid.append(info["valid"])
    return common.mean(valid)


def of_act(args):
    """Plain episodes; then proposals and choices at up to 50 of the expert's states on `test`."""
    world, *_ = act.check_args(args)
    model, chat = act.load(world, args)
    job, seeds = act.Job(args, world, chat, model), range(args.eval_episodes)
    played = act.rollout(model, chat, args, "test", seeds, temperature=args.eval_temperature,
                         stream=STREAM)
    states = act.states_of(act.demonstrations(args, "test", seeds))
    states = random.Random(0).sample(states, min(SAMPLES, len(states)))
    proposed = act.ask(job, states, ("proposals",))
    tagged = [act.parse_action(reply.text) for reply in proposed]
    pairs = act.pairs_of(world, act.propose(job, states))
    pairs = [pair | {"expert_second": i % 2 == 1} for i, pair in enumerate(pairs)]
    chosen = act.ask(job, pairs, ("choices",)) if pairs else []
    outcomes = [reply.outcome for reply in chosen]
    readable = sum(name not in ("untagged", "cut") for name in outcomes)
    return {
        "understood": common.mean(valid for episode in played for valid in episode.valid),
        "success": common.mean(episode.won for episode in played),
        "parts": {
            "proposal": part(len(proposed), sum(map(bool, tagged)), count_cut(proposed)),
            "choice": part(len(chosen), readable, count_cut(chosen))},
        "right_choice": outcomes.count("right") / max(1, len(outcomes)),
        "samples": {"proposal": [reply.text for reply in proposed],
                    "choice": [reply.text for reply in chosen]},
        "episodes": [act.record(episode) for episode in played[:3]]}


def count_cut(said):
    """How many of act.py's answers the limit cut off."""
    return sum(not reply.complete for reply in said)


def of_reagent(args):
    """First attempts, judgements of them by the same model, second attempts with the critique."""
    world, *_ = reagent.check_args(args)
    both = reagent.Learner(*reagent.load(world, args))
    state, seeds = reagent.State(args, world, None, both, both), range(args.eval_episodes)
    first = reagent.attempt(state, "test", seeds, ("evaluate", "first"))
    judged = reagent.review(state, first, STREAM)
    second = reagent.attempt(state, "test", seeds, ("evaluate", "second"), first)
    scored = [(j.score, episode.won) for episode, j in zip(first, judged) if j.readable]
    return {
        "understood": common.mean(valid for episode in first for valid in episode.valid),
        "understood_second": common.mean(valid for episode in second for valid in episode.valid),
        "success": common.mean(episode.won for episode in first),
        "success_second": common.mean(episode.won for episode in second),
        "parts": {"judge": part(len(judged), len(scored), sum(j.cut for j in judged))},
        "auc": reagent.auroc(scored),
        "scores": sorted(score for score, _ in scored),
        "samples": {"judge": [j.text for j in judged[:SAMPLES]]},
        "episodes": [[reagent.record(a), reagent.record(b)] for a, b in zip(first[:3], second)]}


def part(asked, read, cut):
    """How a part did: the number of replies, which shares were read and were cut by the limit."""
    return {"asked": asked, "read": read / max(1, asked), "cut": cut / max(1, asked)}


SCRIPTS = {"self_guide": (self_guide, of_self_guide), "nlac": (nlac, of_nlac), "act": (act, of_act),
           "reagent": (reagent, of_reagent)}
TOLD = "model env shots prefill show_actions max_new_tokens eval_temperature".split()


def main():
    """The command line above."""
    name, *flags = sys.argv[1:] or [""]
    common.check(name in SCRIPTS, f"the first argument is one of {', '.join(SCRIPTS)}")
    script, look_at = SCRIPTS[name]
    args = common.parse_args(script.Args, script.TINY, flags)
    found = {"script": name} | {key: getattr(args, key) for key in TOLD}
    found |= {"n": args.eval_episodes, "device": common.device_name(args.device)}
    print(f"{args.eval_episodes} episodes, and up to {SAMPLES} replies of each part; no bar until "
          "the line of JSON that ends it", file=sys.stderr, flush=True)
    found |= look_at(args)
    out = Path(args.out_dir or "runs/zero-shot")
    out.mkdir(parents=True, exist_ok=True)
    env = re.sub("[:/]", "-", envs.ALIASES.get(args.env, args.env))
    shown = f"{args.shots}{'-prefill' * args.prefill}{'-list' * args.show_actions}"
    text = json.dumps(found, indent=1, ensure_ascii=False)
    path = out / f"{name}-{env}-{shown}.json"
    path.write_text(text, encoding="utf-8")
    print(f"replies and episodes: {path}", file=sys.stderr)
    short = {key: value for key, value in found.items() if key not in ("samples", "episodes")}
    print(json.dumps(short), flush=True)


if __name__ == "__main__":
    main()
