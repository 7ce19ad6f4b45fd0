"""What a trained judge of Reagent is worth: calibration, lucky answers, transcripts with its words.

Of finished runs of reagent.py that trained their judge (RUN/rrm), on trajectories of the `test`
split that no judge has seen: of players, and of the run's agent after its training. A lucky answer
is right although a page was skipped or the value had not been read; an outcome reward cannot tell
it from a sound one.

    python docs/judge.py runs/reagent-search-s0  # writes judge.json there, prints the rest
    python docs/judge.py runs/reagent-U-s* --figure docs/judge.png
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

LUCK = {"skipped lookup", "unsupported guess"}  # of an answer that is right


def judged_trajectories(run, episodes):
    """`episodes` trajectories of players and as many of a run's agent.

    With its judge's judgement and the annotator's score (`reference`).
    """
    common.check((run / "args.json").is_file(), f"{run}: no run of reagent.py there")
    try:
        args = reagent.Args(**json.loads((run / "args.json").read_text(encoding="utf-8"))["args"])
    except (ValueError, KeyError, TypeError) as error:
        why = f"not the settings of a run of reagent.py ({type(error).__name__}: {error})"
        common.refuse(f"{run / 'args.json'}: {why}")
    for name, what in ("rrm", "trained no judge"), ("model", "has no trained agent"):
        common.check(
            (run / name / "config.json").is_file(), f"{run}: it {what} ({name}/ is missing)"
        )
    args = dataclasses.replace(args, device="cpu")
    world = envs.make(args.env, show_actions=args.show_actions)
    common.check(reagent.annotated(world), f"{run}: --env {args.env} has no annotator")
    loaded = {}
    for name in "model", "rrm":
        loaded[name] = common.load(
            str(run / name), dtype=args.dtype, thinking=args.thinking, max_context=args.max_context
        )
    (agent, chat), rrm = loaded["model"], loaded["rrm"]
    state = reagent.State(args, world, chat, agent, rrm)
    found = reagent.judge_examples(state, "test", range(20_000, 20_000 + 2 * episodes), "judge")
    judgements = reagent.judge(rrm, state.world, args, [e["history"] for e in found], ("judge",))
    judged = [
        {**e, **j, "reference": reagent.process_score(e["flaws"])}
        for e, j in zip(found, judgements)
    ]
    return {who: [e for e in judged if e["who"] == who] for who in ("players", "agent")}


def fifths(found):
    """Per fifth of the judge's score: how many, and the means of score, reference and success."""
    rows = []
    for i in range(5):
        some = [e for e in found if min(int(5 * e["score"]), 4) == i]
        mean = lambda values: common.mean(values) if some else None  # noqa: E731, B023
        rows.append(
            {
                "episodes": len(some),
                "score": mean(e["score"] for e in some),
                "reference": mean(e["reference"] for e in some),
                "success": mean(e["won"] for e in some),
            }
        )
    return rows


def lucky(found):
    """The scores of right answers, sound and lucky ones; how often the judge tells them apart."""
    sound, luck = (
        [e["score"] for e in found if e["won"] and bool(LUCK & set(e["flaws"])) == side]
        for side in (False, True)
    )
    return {
        "sound": {"episodes": len(sound), "score": common.mean(sound) if sound else None},
        "lucky": {"episodes": len(luck), "score": common.mean(luck) if luck else None},
        "auc": reagent.auc(sound + luck, [1] * len(sound) + [0] * len(luck)),
    }


def show(e):
    """A trajectory and what the judge says to it."""
    lines = [e["history"][0]]
    for reply, observation in zip(e["history"][1::2], e["history"][2::2]):
        lines += [f"> {' '.join(reply.split())}", observation]
    scores = f"{e['score']:.1f} (annotator: {e['reference']:.1f})"
    return "\n".join([*lines, f"    judge: {e['think']} {e['critique']} {scores}"])


def draw(runs, path):
    """Mean reference score and success against the judge's score, per fifth, over all runs."""
    try:
        import matplotlib
    except ImportError:
        print(
            "no figure: it needs matplotlib (pip install -r requirements-dev.txt)", file=sys.stderr
        )
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for panel, who, title in zip(
        panels,
        ("players", "agent"),
        ("players of different strength", "the agent after its training"),
    ):
        rows = [row for row in fifths([e for found in runs for e in found[who]]) if row["episodes"]]
        panel.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
        for key, label in ("reference", "annotator's score"), ("success", "success"):
            panel.plot(
                [row["score"] for row in rows], [row[key] for row in rows], marker="o", label=label
            )
        for row in rows:
            panel.annotate(row["episodes"], (row["score"], 0.02), ha="center", fontsize=8)
        panel.set(
            xlabel="judge's score, means of its fifths (below: episodes)",
            xlim=(-0.05, 1.05),
            ylim=(0, 1.05),
            title=title,
        )
    panels[0].set_ylabel(f"mean, {len(runs)} judges")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--figure", default="")
    given = parser.parse_args()
    runs = []
    for run in given.run:
        runs.append(found := judged_trajectories(run, given.episodes))
        numbers = {
            who: {
                "episodes": len(some),
                "parsed": common.mean(e["parsed"] for e in some),
                "fifths": fifths(some),
                **lucky(some),
            }
            for who, some in found.items()
        }
        (run / "judge.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        print(f"{run}: {json.dumps(numbers)}")
    players = runs[0]["players"]
    right = [e for e in players if e["won"]]
    for title, some in (
        ("sound", [e for e in right if not e["flaws"]]),
        ("lucky", [e for e in right if LUCK & set(e["flaws"])]),
        ("lost", [e for e in players if not e["won"] and e["flaws"]]),
        ("lost by the agent", [e for e in runs[0]["agent"] if not e["won"]]),
    ):
        if some:
            print(f"\n{title}\n{show(some[0])}")
    if given.figure:
        draw(runs, given.figure)


if __name__ == "__main__":
    main()
