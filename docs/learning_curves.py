"""The learning curves of README: docs/learning_curves.png, from results.jsonl and curves.csv.

    python docs/learning_curves.py [FIGURE]
"""

import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import report
from report import HERE, arm_of, mean_se, success

PANELS = {  # of each, {arm: the words for it}
    "NLAC, repair": {
        "nlac": "NLAC", "label-only": "NLAC, verdicts without reasons", "ppo": "PPO",
        "self-distillation": "self-distillation", "nlac-grpo": "GRPO",
        "blind-critic": "blind critic (futures of other states)",
        "frozen-critic": "frozen critic (learns nothing)"},
    "Self-Guide, household, --dose 1": {
        "self-guide-dose-full": "Self-Guide", "self-guide-dose-zero": "ratings earn nothing",
        "self-guide-dose-grpo": "GRPO, no ratings"},
    "ACT, household": {
        "act-act,il": "ACT, then imitation", "act-act,il,rl": "ACT, imitation, RL",
        "act-il,il": "imitation, twice as long", "act-il,rl": "imitation, RL"},
    "Reagent, search, --dose 1": {
        "reagent-dose-U": "U: critique and score",
        "reagent-dose-R-2G": "R: score alone, as many attempts",
        "reagent-dose-none-2G": "no judge, as many attempts",
        "reagent-dose-none": "no judge, half the attempts"},
}


def axis_of(runs):
    """What the curves of an arm run over, as summary.json and curves.csv name it, and in words.

    ACT learns from stored pairs: it has no environment steps, and one gradient step in each of its
    own steps.
    """
    if any(run["summary"]["env_steps"] for run in runs.values()):
        return "env_steps", "env_steps", "environment steps"
    return "gradient_steps", "step", "gradient steps"


def curve(runs):
    """(x of `axis_of`, mean success, standard error) over the seeds of an arm.

    Each seed's evaluations are interpolated linearly; a seed that ends earlier keeps its last one.
    The first is of the model that learning starts from, after a cold start where there is one; the
    last is of the trained model.
    """
    lines = []
    total, column, _ = axis_of(runs)
    for run in runs.values():
        start = run["summary"].get("cold_started", {}).get("test") or run["summary"]["before"]
        points = [(0, start["success"])]
        points += [(int(row[column]), float(row["success"])) for row in run["curve"]]
        steps = run["summary"][total]
        if steps > points[-1][0]:
            points.append((steps, run["summary"]["after"]["success"]))
        lines += [points] * (len(points) > 1)
    steps = {step for points in lines for step, _ in points}
    return [(step, *mean_se(at(points, step) for points in lines)) for step in sorted(steps)]


def at(points, x):
    """The height at x of the line through these points, level behind the last."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / ((x1 - x0) or 1)
    return points[-1][1]


def draw(runs, path):
    """Test success over a run: the panels of PANELS that have curves."""
    try:
        import matplotlib
    except ImportError:
        report.refuse("the figure needs matplotlib: pip install -r requirements-dev.txt")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms, shown = defaultdict(dict), {}
    for run in runs:
        arms[arm_of(run)][run["seed"]] = run
    for title, names in PANELS.items():
        curves = {words: arms[arm] for arm, words in names.items() if curve(arms[arm])}
        shown |= {title: curves} if curves else {}
    height = max(1, math.ceil(len(shown) / 2))
    figure, panels = plt.subplots(height, 2, figsize=(12.8, 4.4 * height), squeeze=False)
    for panel in panels.flat[len(shown):]:
        panel.axis("off")
    for panel, (title, curves) in zip(panels.flat, shown.items()):
        draw_panel(panel, title, curves)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def draw_panel(panel, title, curves):
    """Curves {words: {seed: run}} between their base and the expert; the first is the method's."""
    experts = []
    for place, (words, runs) in enumerate(curves.items()):
        steps, means, errors = zip(*curve(runs))
        seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
        width = 1.3 if place else 2.2
        panel.plot(steps, means, color=f"C{place}", label=f"{words} ({seeds})", linewidth=width)
        errors = [0 if math.isnan(se) else se for se in errors]
        low = [mean - se for mean, se in zip(means, errors)]
        high = [mean + se for mean, se in zip(means, errors)]
        panel.fill_between(steps, low, high, color=f"C{place}", alpha=0.15, linewidth=0)
        experts += success(runs, "expert").values()
    expert = statistics.fmean(experts)
    panel.axhline(expert, color="grey", linestyle="--", linewidth=1, label="scripted expert")
    panel.set(title=title, xlabel=axis_of(runs)[2], ylabel="success on test episodes")
    panel.set(ylim=(-0.02, 1.05))
    panel.legend(fontsize=8)


def main():
    """The command line above."""
    runs = report.read_runs(HERE)
    draw(runs, Path(sys.argv[1]) if sys.argv[1:] else HERE / "learning_curves.png")


if __name__ == "__main__":
    main()
