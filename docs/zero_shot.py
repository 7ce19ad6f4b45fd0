"""What a chat model does in the four scripts before any training: python docs/zero_shot.py SCRIPT [its flags] --out-dir OUT

    python docs/zero_shot.py self_guide --model smollm2 --shots 2 --prefill --show-actions --eval-episodes 20 \\
        --max-new-tokens 24 --rate-tokens 48 --out-dir runs/zero-shot

Plays --eval-episodes episodes of `test` and asks every part of the script at the states that were met.
OUT/SCRIPT-ENV.json holds: `understood`, the share of actions that the world understood; `parts`, of each
part how many replies were read and how many the limit cut; `samples`, up to 50 of its replies; three
whole `episodes`. Nothing is trained.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import envs

SAMPLES = 50


def self_guide(script, args):
    """Guided episodes, where step and rating alternate, and plain ones."""
    world = script.check_args(args)
    model, chat = script.load(world, args)
    found = {}
    for name, guided in ("plain", False), ("guided", True):
        played = script.rollout(model, chat, args, "test", range(args.eval_episodes), guided=guided,
                                temperature=args.eval_temperature, stream=("zero-shot",))
        found[name] = script.watch(played)
    ratings = [text for episode in played for who, text in episode.said if who == "rate"]
    labels = [label for episode in played for label in episode.labels]
    cut = sum(episode.cut["rate"] for episode in played)
    return {
        "understood": 1 - found["plain"]["invalid"], "understood_guided": 1 - found["guided"]["invalid"],
        "success": found["plain"]["success"], "success_guided": found["guided"]["success"],
        "parts": {"rate": part(len(ratings), len(labels) - labels.count(None), cut)},
        "shares": {name: found["guided"][f"label_{name}"] for name in script.LABELS} if labels else {},
        "samples": {"rate": ratings[:SAMPLES]},
        "episodes": [script.record(episode) for episode in played[:3]]}


def nlac(script, args):
    """Plain episodes; then every part at up to 50 of the states that were met."""
    world = script.check_args(args)
    model, chat = script.load(world, args)
    parts = script.Parts(model, chat, world, args)
    played = script.rollout(model, chat, args, "test", range(args.eval_episodes),
                            temperature=args.eval_temperature, stream=("zero-shot",))
    steps = [t for episode in played for t in script.transitions(episode)]
    steps = random.Random(0).sample(steps, min(SAMPLES, len(steps)))
    tries = script.refine(parts, [t.state for t in steps], ("zero-shot",), [t.reply for t in steps])
    targets = script.successor_targets(parts, [t for t in steps if not t.done], ("zero-shot",))
    said = {"successor": [future for some in tries for future in some[0].futures],
            "backup": targets, "evaluator": [some[0].critique for some in tries],
            "refiner": [some[-1].reply for some in tries]}
    counts = {}
    for name, seen in parts.counts.items():
        counts[name] = part(seen["asked"], seen["parse"], seen["cut"])
    return {
        "understood": common.mean(valid for episode in played for valid in episode.valid),
        "success": common.mean(episode.won for episode in played), "parts": counts,
        "refined_is_possible": share_possible(world, steps, tries), "samples": said,
        "episodes": [script.annotated(parts, episode, ("whole",)) for episode in played[:3]]}


def share_possible(world, steps, tries):
    """Of the refined actions, those that the world understands at their state."""
    valid = []
    for t, some in zip(steps, tries):
        envs.replay(world, t.seed, [common.aloud(reply) for reply in t.state[1::2]], "test")
        *_, info = world.step(common.aloud(some[-1].reply))
        valid.append(info["valid"])
    return common.mean(valid)


def act(script, args):
    """Plain episodes; then proposals and choices at up to 50 of the expert's states on `test`."""
    world, *_ = script.check_args(args)
    model, chat = script.load(world, args)
    job = script.Job(args, world, chat, model)
    played = script.rollout(model, chat, args, "test", range(args.eval_episodes),
                            temperature=args.eval_temperature, stream=("zero-shot",))
    states = script.states_of(script.demonstrations(args, "test", range(args.eval_episodes)))
    states = random.Random(0).sample(states, min(SAMPLES, len(states)))
    said = script.ask(job, states, ("proposals",))
    tagged = [script.parse_action(reply.text) for reply in said]
    pairs = script.pairs_of(world, script.propose(job, states))
    pairs = [pair | {"expert_second": i % 2 == 1} for i, pair in enumerate(pairs)]
    chosen = script.ask(job, pairs, ("choices",)) if pairs else []
    outcomes = [reply.outcome for reply in chosen]
    return {
        "understood": common.mean(valid for episode in played for valid in episode.valid),
        "success": common.mean(episode.won for episode in played),
        "parts": {
            "proposal": part(len(said), sum(map(bool, tagged)), count_cut(said)),
            "choice": part(len(chosen), sum(name not in ("untagged", "cut") for name in outcomes), count_cut(chosen))},
        "right_choice": outcomes.count("right") / max(1, len(outcomes)),
        "samples": {"proposal": [reply.text for reply in said], "choice": [reply.text for reply in chosen]},
        "episodes": [script.record(episode) for episode in played[:3]]}


def count_cut(said):
    """How many of act.py's answers the limit cut off."""
    return sum(not reply.complete for reply in said)


def reagent(script, args):
    """First attempts, judgements of them by the same model, second attempts with the critique in view."""
    world, *_ = script.check_args(args)
    both = script.Learner(*script.load(world, args))
    state, seeds = script.State(args, world, None, both, both), range(args.eval_episodes)
    first = script.attempt(state, "test", seeds, ("evaluate", "first"))
    judged = script.review(state, first, ("zero-shot",))
    second = script.attempt(state, "test", seeds, ("evaluate", "second"), first)
    pairs = [(j.score, episode.won) for episode, j in zip(first, judged) if j.readable]
    return {
        "understood": common.mean(valid for episode in first for valid in episode.valid),
        "understood_second": common.mean(valid for episode in second for valid in episode.valid),
        "success": common.mean(e.won for e in first), "success_second": common.mean(e.won for e in second),
        "parts": {"judge": part(len(judged), len(pairs), sum(j.cut for j in judged))},
        "auc": script.auroc(pairs), "scores": sorted(score for score, _ in pairs),
        "samples": {"judge": [j.text for j in judged[:SAMPLES]]},
        "episodes": [[script.record(a), script.record(b)] for a, b in zip(first[:3], second[:3])]}


def part(asked, read, cut):
    """How a part did: the number of replies, the share that was read, the share that the limit cut."""
    return {"asked": asked, "read": read / max(1, asked), "cut": cut / max(1, asked)}


def main():
    name = sys.argv[1] if sys.argv[1:] else ""
    if name not in globals() or name not in ("self_guide", "nlac", "act", "reagent"):
        common.refuse("the first argument is one of self_guide, nlac, act, reagent")
    script = __import__(name)
    args = common.parse_args(script.Args, script.TINY, sys.argv[2:])
    found = globals()[name](script, args)
    told = {key: getattr(args, key) for key in ("model", "env", "shots", "prefill", "show_actions", "max_new_tokens", "eval_temperature")}
    found = {"script": name, **told, "n": args.eval_episodes, "device": common.device_name(args.device),
             **found}
    out = Path(args.out_dir or "runs/zero-shot")
    out.mkdir(parents=True, exist_ok=True)
    variant = f"{args.shots}{'-prefill' * args.prefill}{'-list' * args.show_actions}"
    path = out / f"{name}-{envs.ALIASES.get(args.env, args.env).replace(':', '-').replace('/', '-')}-{variant}.json"
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    short = {key: value for key, value in found.items() if key not in ("samples", "episodes")}
    print(json.dumps(short), flush=True)


if __name__ == "__main__":
    main()
