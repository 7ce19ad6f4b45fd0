"""Reagent with another judge: the two ends between which the trained one stands.

 annotator  the ceiling: the program that a judge is trained by judges the agent's attempts
            itself. Not the method: there the agent never meets it.
 shuffled   the floor: the judge's critique and score of an attempt go to the attempt at another
            question.

    python docs/other_judge.py --judging annotator --rrm runs/reagent-search-s0/rrm \\
        --out-dir runs/U-annotator
    python docs/other_judge.py --judging shuffled --rrm runs/reagent-search-s0/rrm \\
        --out-dir runs/U-shuffled

All flags of reagent.py. --rrm keeps its judge from being trained anew; of the annotator's arm it
judges nothing but the episodes of its `quality`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import reagent

REVIEW = reagent.review


@dataclass
class Args(reagent.Args):
    __doc__ = reagent.Args.__doc__
    judging: str = common.flag(
        "annotator", "who judges the attempts of training", choices=["annotator", "shuffled"])


def review(state, episodes, stream):
    """reagent.review, with another judge where the agent learns."""
    if stream[0] != "learn":
        return REVIEW(state, episodes, stream)
    if state.args.judging == "annotator":
        return by_reference(episodes)
    judgements, size = REVIEW(state, episodes, stream), state.args.group_size
    told = [(e.critique, e.judge_score, e.said[-1]) for e in episodes]
    for episode, another in zip(episodes, told[size:] + told[:size]):  # a group is one question
        episode.critique, episode.judge_score, episode.said[-1] = another
    return judgements


def by_reference(episodes):
    """The reference judgements of episodes, written down in them, too."""
    found = []
    for episode in episodes:
        think, critique, score = reagent.annotate(episode.flaws)
        text = reagent.judgement_text(think, critique, score)
        episode.critique, episode.judge_score = critique, score
        episode.said.append(["judge", text])
        found.append(reagent.Judgement(text, critique, score, readable=True, asked=1))
    return found


def main():
    """Cold start and learning, as reagent.py does them."""
    reagent.Args, reagent.review = Args, review
    reagent.main()


if __name__ == "__main__":
    main()
