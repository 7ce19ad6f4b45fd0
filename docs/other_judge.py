"""Reagent with another judge: the two ends between which the trained one stands.

 annotator  the ceiling: the program that the judge is trained by judges the agent's attempts
            itself. Not the method: there the agent never meets it.
 shuffled   the floor: the trained judge, but its critique and its score of an attempt go to the
            attempt at another question.

    python docs/other_judge.py --judging annotator --rrm runs/reagent-search-s0/rrm \\
        --out-dir runs/U-annotator
    python docs/other_judge.py --judging shuffled --rrm runs/reagent-search-s0/rrm \\
        --out-dir runs/U-shuffled

All flags of reagent.py. --rrm keeps its judge from being trained anew; of the annotator's arm it
judges nothing but the episodes shown.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import envs  # noqa: E402
import reagent  # noqa: E402

TRAINED, ROLLOUT = reagent.judge, reagent.rollout
FLAWS = {}  # of every attempt at its last rollout, by its history


@dataclass
class Args(reagent.Args):
    __doc__ = reagent.Args.__doc__
    judging: str = common.flag(
        "annotator", "who judges the attempts of training", choices=["annotator", "shuffled"]
    )


def rollout(model, chat, args, split, seeds, **rest):
    """reagent.rollout, which also notes the flaws of what was played."""
    episodes = ROLLOUT(model, chat, args, split, seeds, **rest)
    world = envs.make(args.env)
    common.check(
        reagent.annotated(world) or args.judging != "annotator",
        f"--env {args.env} has no annotator",
    )
    FLAWS.clear()
    for e in episodes:
        world.reset(seed=e["seed"], options={"split": split})
        FLAWS[tuple(e["history"])] = reagent.process_flaws(world, e["history"], e["valid"])
    return episodes


def judge(rrm, world, args, histories, stream):
    """reagent.judge, with another judge where the agent learns."""
    if stream[0] != "learn":
        return TRAINED(rrm, world, args, histories, stream)
    if args.judging == "annotator":
        free = {"parsed": True, "tokens": 0, "asked": 0, "cut": 0}
        return [
            reagent.parse_judgement(reagent.annotate(FLAWS[tuple(history)])) | free
            for history in histories
        ]
    said = TRAINED(rrm, world, args, histories, stream)
    return said[args.group_size :] + said[: args.group_size]  # a group is one question


def main():
    """Cold start and learning, as reagent.py does them."""
    reagent.Args, reagent.judge, reagent.rollout = Args, judge, rollout
    reagent.main()


if __name__ == "__main__":
    main()
