"""The premise of Self-Guide on a tiny model, measured: does it know progress, does it take the hint?

    python docs/dose.py --dose 1                       # builds the tiny model where it is not cached yet
    python docs/dose.py --model runs/self_guide-household-s0/model
    python docs/dose.py --rule                         # no model: a random player with right labels

Prints, as JSON: of the labels it gives while it plays, the share that are right (of three; what the exact
chance of a random player says), and how often it undoes a step that can be undone, by its label; success
with and without guidance. --rule plays 600 games of train by the rule that the corpus teaches: the ceiling of
guidance alone, without it, and with half of the labels drawn at random. Worlds with `snapshot`, `restore` and `possibilities` alone.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import envs
import self_guide as sg


def gates(model, chat, args, count) -> dict:
    """Over `count` guided episodes of train, at the training temperature."""
    seeds = range(10**7, 10**7 + count)
    played = sg.rollout(model, chat, args, "train", seeds, guided=True, temperature=args.temperature, stream=("gates",))
    right, undone, can = Counter(), Counter(), Counter()
    for episode in played:
        world = envs.make(args.env)
        world.reset(seed=episode.seed, options={"split": "train"})
        prospects = sg.Prospects(world)
        for action, label, following in zip(episode.actions, episode.labels, episode.actions[1:]):
            prospects.before(world)
            _, _, _, _, info = world.step(action)
            name = sg.LABELS[label + 1] if label is not None else "none"
            right[prospects.label(world, info["valid"]) == name] += 1
            undo = prospects.advised(world, "negative", info["admissible"])
            if undo:
                can[name] += 1
                undone[name] += following in undo
    plain = sg.rollout(model, chat, args, "test", range(count), guided=False,
                       temperature=args.eval_temperature, stream=("evaluate",))
    guided = sg.rollout(model, chat, args, "test", range(count), guided=True,
                        temperature=args.eval_temperature, stream=("evaluate",))
    success = {name: common.mean_se([float(e.won) for e in some]) for name, some in (("plain", plain), ("guided", guided))}
    return {"episodes": count, "labels": sum(right.values()), "right": right[True] / max(1, sum(right.values())),
            "undone": {name: round(undone[name] / n, 3) for name, n in can.items()}, "undo_possible": dict(can),
            "success": {name: [round(x, 3) for x in pair] for name, pair in success.items()}}


def rule(env, hinted, noise, count=600):
    """Success of a random player that takes the hints of labels, a share `noise` of which is random."""
    world, won = envs.make(env), []
    for seed in range(5 * 10**6, 5 * 10**6 + count):
        rng, label, over = random.Random(seed), "neutral", False
        _, info = world.reset(seed=seed, options={"split": "train"})
        prospects = sg.Prospects(world)
        while not over:
            actions = info["admissible"]
            if hinted and world.turns:
                actions = prospects.advised(world, label, actions) or actions
            prospects.before(world)
            _, _, terminated, truncated, info = world.step(rng.choice(rng.choice(sg.by_verb(actions))))
            over = terminated or truncated
            if not over:
                label = prospects.label(world, info["valid"])
                label = rng.choice(sg.LABELS) if rng.random() < noise else label
        won.append(float(info["won"]))
    return {"hinted": hinted, "noise": noise, "n": count, "success": [round(x, 3) for x in common.mean_se(won)]}


def main():
    if "--rule" in sys.argv:
        for hinted, noise in (False, 0.0), (True, 0.0), (True, 0.5):
            print(json.dumps({"env": "household", "rule": rule("household", hinted, noise)}))
        return
    args = common.parse_args(sg.Args, sg.TINY)
    world = sg.check_args(args)
    model, chat = sg.load(world, args)
    print(json.dumps(gates(model, chat, args, args.eval_episodes)))


if __name__ == "__main__":
    main()
