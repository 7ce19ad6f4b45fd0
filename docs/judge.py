"""What a trained judge of Reagent is worth: calibration, the lucky answer, three transcripts with its words.

Of finished runs of reagent.py that trained their judge (RUN/rrm), on trajectories of the `test` split that no judge has seen. A lucky
answer is right although a page was skipped or the value had not been read; an outcome reward cannot tell it from a sound one.

    python docs/judge.py runs/reagent-search-s0                 # writes judge.json there, prints the rest
    python docs/judge.py docs/results/reagent-U-s* --figure docs/judge.png
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
    """`episodes` trajectories of the test split with the judgement of a run's judge and the annotator's score: a list of dicts."""
    common.check((run / "args.json").is_file(), f"{run}: no run of reagent.py there")
    try:
        args = reagent.Args(**json.loads((run / "args.json").read_text(encoding="utf-8"))["args"])
    except (ValueError, KeyError, TypeError) as error:
        common.refuse(f"{run / 'args.json'}: not the settings of a run of reagent.py ({type(error).__name__}: {error})")
    common.check((run / "rrm" / "config.json").is_file(), f"{run}: it trained no judge (rrm/ is missing)")
    args = dataclasses.replace(args, device="cpu")
    rrm, world = common.load(str(run / "rrm"), device=args.device, dtype=args.dtype), envs.make(args.env)
    found = reagent.trajectories(args, "test", range(20_000, 20_000 + episodes), "judge")
    judged = reagent.judge(rrm, world, args, [e["history"] for e in found], ("judge",))
    return [{**e, **j, "reference": reagent.process_score(e["flaws"])} for e, j in zip(found, judged)]


def fifths(found):
    """Per fifth of the judge's score: how many, their mean reference score, their success."""
    rows = []
    for i in range(5):
        some = [e for e in found if min(int(5 * e["score"]), 4) == i]
        rows.append({"episodes": len(some), "reference": common.mean(e["reference"] for e in some) if some else None,
                     "success": common.mean(e["won"] for e in some) if some else None})
    return rows


def lucky(found):
    """The scores of right answers, sound ones and lucky ones; and how often the judge tells them apart."""
    sound, luck = ([e["score"] for e in found if e["won"] and bool(LUCK & set(e["flaws"])) == side] for side in (False, True))
    return {"sound": {"episodes": len(sound), "score": common.mean(sound) if sound else None},
            "lucky": {"episodes": len(luck), "score": common.mean(luck) if luck else None},
            "auc": reagent.auc(sound + luck, [1] * len(sound) + [0] * len(luck))}


def show(e):
    """A trajectory and what the judge says to it."""
    lines = [e["history"][0]]
    for reply, observation in zip(e["history"][1::2], e["history"][2::2]):
        lines += [f"> {' '.join(reply.split())}", observation]
    return "\n".join([*lines, f"    judge: {e['think']} {e['critique']} {e['score']:.1f} (annotator: {e['reference']:.1f})"])


def draw(runs, path):
    """Mean reference score and success per fifth of the judge's score, over all runs."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: it needs matplotlib (pip install -r requirements-dev.txt)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, middles = fifths([e for found in runs for e in found]), [0.1 + 0.2 * i for i in range(5)]
    figure, panel = plt.subplots(figsize=(5, 4))
    panel.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
    for key in "reference", "success":
        points = [(x, row[key]) for x, row in zip(middles, rows) if row[key] is not None]
        panel.plot(*zip(*points), marker="o", label={"reference": "annotator's score", "success": "success"}[key])
    for x, row in zip(middles, rows):
        panel.annotate(row["episodes"], (x, 0.02), ha="center", fontsize=8)
    panel.set(xlabel="judge's score, by fifths (below: episodes)", ylabel="mean", ylim=(0, 1.05), title=f"{len(runs)} judges, test split")
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--figure", default="")
    given = parser.parse_args()
    runs = []
    for run in given.run:
        runs.append(found := judged_trajectories(run, given.episodes))
        numbers = {"episodes": len(found), "parsed": common.mean(e["parsed"] for e in found), "fifths": fifths(found), **lucky(found)}
        (run / "judge.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        print(f"{run}: {json.dumps(numbers)}")
    right = [e for e in runs[0] if e["won"]]
    for title, some in (("sound", [e for e in right if not e["flaws"]]), ("lucky", [e for e in right if LUCK & set(e["flaws"])]),
                        ("lost", [e for e in runs[0] if not e["won"] and e["flaws"]])):
        if some:
            print(f"\n{title}\n{show(some[0])}")
    if given.figure:
        draw(runs, given.figure)


if __name__ == "__main__":
    main()
