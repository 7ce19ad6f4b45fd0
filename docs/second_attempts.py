"""What a second attempt of Reagent owes to the critique it is given.

The agent of finished runs of reagent.py attempts questions of the `test` split, then each of them
again, in ways that differ in one thing:

  judge      its own attempt and the judge's critique of it: a second attempt as in training
  annotator  ... and the critique of the program that the judge was trained by: without error
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

import common  # noqa: E402
import envs  # noqa: E402
import reagent  # noqa: E402

WAYS = "judge", "annotator", "other", "nothing", "afresh"


def attempts(state, split, seeds):
    """[won at first], and {way: [won at the second attempt]}, an entry per seed."""
    args, world = state.args, state.world

    def play(stream, before=None):
        return reagent.rollout(
            state.model,
            state.chat,
            args,
            split,
            seeds,
            temperature=args.eval_temperature,
            stream=stream,
            before=before,
        )

    def critiqued(critiques):
        return play(
            ("second attempts", 2),
            [(e["history"], critique) for e, critique in zip(first, critiques)],
        )

    first = play(("second attempts", 1))
    said = [
        j["critique"]
        for j in reagent.judge(
            state.rrm, world, args, [e["history"] for e in first], ("second attempts",)
        )
    ]
    right = []
    for e in first:
        world.reset(seed=e["seed"], options={"split": split})
        flaws = reagent.process_flaws(world, e["history"], e["valid"])
        right.append(reagent.parse_judgement(reagent.annotate(flaws))["critique"])
    again = {
        "judge": critiqued(said),
        "annotator": critiqued(right),
        "other": critiqued([*said[1:], said[0]]),
        "nothing": critiqued([""] * len(first)),
        "afresh": play(("second attempts", 2)),
    }
    return [e["won"] for e in first], {way: [e["won"] for e in again[way]] for way in WAYS}


def summary(first, again):
    """Success as (mean, standard error, n): of all, of what was lost at first, of what was won.

    And what differs from `nothing`, paired.
    """

    def cell(values):
        mean, se = common.mean_se(values)
        return {"success": mean, "se": se, "n": len(values)}

    rows = {"first": {"all": cell([float(won) for won in first])}}
    for way, second in again.items():
        rows[way] = {"all": cell([float(won) for won in second])}
        for name, side in ("lost", False), ("won", True):
            rows[way][name] = cell(
                [float(won) for won, before in zip(second, first) if before == side]
            )
        mean, se = common.mean_se(
            [float(won) - float(bare) for won, bare in zip(second, again["nothing"])]
        )
        rows[way]["minus_nothing"] = {"difference": mean, "se": se}
    return rows


def load(run):
    """The state of a finished run: its agent and its judge."""
    common.check((run / "args.json").is_file(), f"{run}: no run of reagent.py there")
    try:
        args = reagent.Args(**json.loads((run / "args.json").read_text(encoding="utf-8"))["args"])
    except (ValueError, KeyError, TypeError) as error:
        why = f"not the settings of a run of reagent.py ({type(error).__name__}: {error})"
        common.refuse(f"{run / 'args.json'}: {why}")
    args = dataclasses.replace(args, device="cpu")
    world = envs.make(args.env, show_actions=args.show_actions)
    common.check(reagent.annotated(world), f"{run}: --env {args.env} has no annotator")
    common.check(
        (run / "model" / "config.json").is_file(),
        f"{run}: it has no trained agent (model/ is missing)",
    )
    common.check(
        args.rrm or args.judged, f"{run}: its judge was the start model itself: give it --rrm"
    )
    settings = {"dtype": args.dtype, "thinking": args.thinking, "max_context": args.max_context}
    model, chat = common.load(str(run / "model"), **settings)
    rrm = common.load(args.rrm or str(run / "rrm"), option="--rrm", **settings)
    return reagent.State(args, world, chat, model, rrm)


def main():
    """The command line above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--episodes", type=int, default=500)
    given = parser.parse_args()
    for run in given.run:
        rows = summary(*attempts(load(run), "test", range(30_000, 30_000 + given.episodes)))
        (run / "second_attempts.json").write_text(
            json.dumps(rows, indent=1) + "\n", encoding="utf-8"
        )
        print(f"{run}\n{'':10}{'all':>7}{'lost':>7}{'won':>7}{'minus nothing':>16}")
        for way, row in rows.items():
            cells = "".join(
                f"{row[name]['success']:7.3f}" if name in row else f"{'':7}"
                for name in ("all", "lost", "won")
            )
            told = row.get("minus_nothing", {"difference": float("nan"), "se": float("nan")})
            print(f"{way:10}{cells}{told['difference']:+9.3f} ({told['se']:.3f})")


if __name__ == "__main__":
    main()
