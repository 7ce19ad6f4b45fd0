"""The premise of Self-Guide on a tiny model, measured: does it know progress, does it take hints?

    python docs/self_guide_dose.py --dose 1         # builds the tiny model where it is not cached
    python docs/self_guide_dose.py --model runs/self_guide-household-s0/model
    python docs/self_guide_dose.py --rule           # no model: a random player with right labels

Prints, as JSON: of the labels it gives while it plays, the share that are right (of three; what the
exact chance of a random player says), and how often it undoes a step that can be undone, by its
label; success with and without guidance. --rule plays 600 games of train in `household` by the rule
that the corpus teaches, which is the ceiling of guidance alone: without hints, with them, and with
half of the labels drawn at random. Worlds with `snapshot`, `restore` and `possibilities` alone.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import envs
import self_guide


def gates(model, chat, args, count) -> dict:
    """Over `count` guided episodes of train, at the training temperature; success on test."""
    seeds = range(10**7, 10**7 + count)
    played = self_guide.rollout(model, chat, args, "train", seeds, guided=True,
                                temperature=args.temperature, stream=("gates",))
    right, undone, possible = Counter(), Counter(), Counter()
    for episode in played:
        for name, is_right, undo, following in labelled_steps(args.env, episode):
            right[is_right] += 1
            if undo:
                possible[name] += 1
                undone[name] += following in undo
    success = {}
    for name, guided in ("plain", False), ("guided", True):
        episodes = self_guide.rollout(model, chat, args, "test", range(count), guided=guided,
                                      temperature=args.eval_temperature, stream=("evaluate",))
        success[name] = rounded(episode.won for episode in episodes)
    return {"episodes": count, "labels": sum(right.values()),
            "right": right[True] / max(1, sum(right.values())),
            "undone": {name: round(undone[name] / n, 3) for name, n in possible.items()},
            "undo_possible": dict(possible), "success": success}


def labelled_steps(env, episode):
    """(label or "none", whether it is right, actions that would undo the step, what was done then)
    of each step that was rated, by a replay of the episode."""
    world = envs.make(env)
    world.reset(seed=episode.seed, options={"split": "train"})
    prospects = self_guide.Prospects(world)
    for action, label, following in zip(episode.actions, episode.labels, episode.actions[1:]):
        prospects.before(world)
        *_, info = world.step(action)
        name = self_guide.LABELS[label + 1] if label is not None else "none"
        is_right = prospects.label(world, info["valid"]) == name
        yield name, is_right, prospects.advised(world, "negative", info["admissible"]), following


def rounded(won):
    """[mean, standard error] of successes."""
    return [round(number, 3) for number in common.mean_se([float(one) for one in won])]


def rule(env, hinted, noise, count=600):
    """Success of a random player that takes the hints of labels, a share `noise` of them random."""
    world, won = envs.make(env), []
    for seed in range(5 * 10**6, 5 * 10**6 + count):
        rng, label, over = random.Random(seed), "neutral", False
        _, info = world.reset(seed=seed, options={"split": "train"})
        prospects = self_guide.Prospects(world)
        while not over:
            actions = info["admissible"]
            if hinted and world.turns:
                actions = prospects.advised(world, label, actions) or actions
            prospects.before(world)
            action = rng.choice(rng.choice(envs.by_verb(actions)))
            _, _, terminated, truncated, info = world.step(action)
            over = terminated or truncated
            if not over:
                label = prospects.label(world, info["valid"])
                label = rng.choice(self_guide.LABELS) if rng.random() < noise else label
        won.append(info["won"])
    return {"hinted": hinted, "noise": noise, "n": count, "success": rounded(won)}


def main():
    """The command line above."""
    if "--rule" in sys.argv:
        for hinted, noise in (False, 0.0), (True, 0.0), (True, 0.5):
            found = rule("household", hinted, noise)
            print(json.dumps({"env": "household", "rule": found}))
        return
    args = common.parse_args(self_guide.Args, self_guide.TINY)
    world = self_guide.check_args(args)
    model, chat = self_guide.load(world, args)
    print(json.dumps(gates(model, chat, args, args.eval_episodes)))


if __name__ == "__main__":
    main()
