"""The premise of ACT on a tiny model, measured: does it know outcomes, does its choice follow them?

    python docs/act_dose.py --dose 1          # builds the tiny model where it is not cached yet
    python docs/act_dose.py --dose 1 --model runs/act-household-s0/1-act

Prints, as JSON, of held-out questions (the expert's states of `test`, its action and one that the
start policy proposes, in both orders; the training temperature): how often each row of the table
of rewards is earned, and the choice is right where the expert's stands first and second; of the
outlooks that are spoken of the two actions, the share that are right (of three), by what they
should be; what always saying the commonest would get; how often the choice follows outlooks that
differ; and what right outlooks, always followed, would get. Worlds with `snapshot`, `restore` and
`possibilities` alone.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rationale import held_out_states

import act
import common
import envs

SPOKEN = re.compile(rf"would lead ({'|'.join(act.OUTLOOKS)})\.")


def held_out_pairs(job, count):
    """Pairs at the first `count` states of the expert's episodes on `test`, in both orders."""
    states = act.that_fit(job, held_out_states(job.args, count))
    pairs = act.that_fit(job, act.pairs_of(job.world, act.propose(job, states)))
    return pairs + [pair | {"expert_second": True} for pair in pairs]


def true_outlooks(args, pair):
    """Of the two actions as they are shown: indices of OUTLOOKS; the impossible leads nowhere."""
    world = envs.make(args.env)
    done = [m["content"] for m in pair["messages"][1::2]]
    envs.replay(world, pair["seed"], done, pair["split"])
    play, possible = envs.RandomPlay(world), world.admissible()
    both = act.in_order(pair)
    return [act.outlook(play, world, action) if action in possible else 1 for action in both]


def share(part, whole):
    """Rounded; None of nothing."""
    return round(part / whole, 3) if whole else None


def gates(job, count) -> dict:
    """Over the pairs of `count` states."""
    pairs = held_out_pairs(job, count)
    replies = act.ask(job, pairs, ("gates",))
    outcomes, said, right, follow = Counter(), Counter(), Counter(), Counter()
    ideal = 0.0
    for pair, reply in zip(pairs, replies):
        truth = true_outlooks(job.args, pair)
        better = pair["expert_second"]
        outcomes[reply.outcome, better] += 1
        expert, other = truth[better], truth[not better]
        ideal += 0.5 if expert == other else expert > other
        marks = [act.OUTLOOKS.index(word) for word in SPOKEN.findall(reply.text)]
        if len(marks) != 2:
            continue
        for mark, true in zip(marks, truth):
            said[true] += 1
            right[true] += mark == true
        if marks[0] != marks[1]:
            both = act.in_order(pair)
            chosen = act.parse_action(reply.text)
            if chosen is not None:
                chosen = act.chosen_of_two(job.world, chosen, *both)
            follow[chosen == both[marks[1] > marks[0]]] += 1
    n, spoken = len(pairs), sum(said.values())
    rows = {}
    for name in act.REWARDS:
        rows[name] = share(outcomes[name, False] + outcomes[name, True], n)
    return {"questions": n, "outlooks": spoken, "right": share(sum(right.values()), spoken),
            "right_of": {act.OUTLOOKS[i]: share(right[i], said[i]) for i in range(3)},
            "commonest": share(max(said.values(), default=0), spoken),
            "followed": share(follow[True], sum(follow.values())), "rows": rows,
            "right_if_first": share(outcomes["right", False], n / 2),
            "right_if_second": share(outcomes["right", True], n / 2), "ideal": share(ideal, n)}


def main():
    """The command line above."""
    args = common.parse_args(act.Args, act.TINY)
    world, *_ = act.check_args(args)
    model, chat = act.load(world, args)
    print(json.dumps(gates(act.Job(args, world, chat, model), args.eval_episodes)))


if __name__ == "__main__":
    main()
