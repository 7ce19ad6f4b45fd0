"""What a second attempt of Reagent owes to the critique it is given.

The agent of finished runs of reagent.py attempts questions of the `test` split, then each of them
again, in ways that differ in one thing:

  judge      its own attempt and the judge's critique of it: a second attempt as in training
  annotator  ... and the critique of the program that a judge is trained by: without error
  other      ... and the judge's critique of the attempt at the next question: beside the point
  nothing    ... and no critique
  afresh     neither: another first attempt

    python docs/second_attempts.py runs/reagent-search-s0  # second_attempts.json there, and a table
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from judge import state_of

import common
import reagent

WAYS = "judge", "annotator", "other", "nothing", "afresh"


def attempts(state, split, seeds):
    """[won at first], and {way: [won at the second attempt]}, an entry per seed."""

    def won_again(critiques):
        told = [dataclasses.replace(e, critique=words) for e, words in zip(first, critiques)]
        return won(reagent.attempt(state, split, seeds, ("evaluate", "second"), told))

    def won(episodes):
        return [episode.won for episode in episodes]

    first = reagent.attempt(state, split, seeds, ("evaluate", "first"))
    reagent.review(state, first, ("second attempts",))
    said = [episode.critique for episode in first]
    again = {
        "judge": won_again(said),
        "annotator": won_again([reagent.annotate(episode.flaws)[1] for episode in first]),
        "other": won_again([*said[1:], said[0]]),
        "nothing": won_again([""] * len(first)),
        "afresh": won(reagent.attempt(state, split, seeds, ("evaluate", "second")))}
    return won(first), again


def summary(first, again):
    """Success as (mean, standard error, n): of all, of what was lost at first, of what was won.

    And what differs from `nothing`, paired.
    """

    def cell(values):
        mean, se = common.mean_se(values)
        return {"success": mean, "se": se, "n": len(values)}

    rows = {"first": {"all": cell(first)}}
    for way, second in again.items():
        rows[way] = {"all": cell(second)}
        for name, side in ("lost", False), ("won", True):
            rows[way][name] = cell([now for now, before in zip(second, first) if before == side])
        mean, se = common.mean_se(now - bare for now, bare in zip(second, again["nothing"]))
        rows[way]["minus_nothing"] = {"difference": mean, "se": se}
    return rows


def table(rows):
    """The lines of a table."""
    yield f"{'':10}{'all':>7}{'lost':>7}{'won':>7}{'minus nothing':>16}"
    for way, row in rows.items():
        cells = [f"{row[name]['success']:7.3f}" for name in ("all", "lost", "won") if name in row]
        told = row.get("minus_nothing")
        yield f"{way:10}{''.join(cells)}" + (
            f"{told['difference']:+9.3f} ({told['se']:.3f})" if told else "")


def main():
    """The command line above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--episodes", type=int, default=500)
    given = parser.parse_args()
    for run in given.run:
        seeds = range(30_000, 30_000 + given.episodes)
        rows = summary(*attempts(state_of(run), "test", seeds))
        text = json.dumps(rows, indent=1) + "\n"
        (run / "second_attempts.json").write_text(text, encoding="utf-8")
        print(run, *table(rows), sep="\n")


if __name__ == "__main__":
    main()
