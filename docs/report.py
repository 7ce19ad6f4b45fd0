"""README's tables and the learning curves, from results.jsonl and curves.csv alone.

    python docs/report.py                       print the tables; draw docs/learning_curves.png
    python docs/report.py --write PAGE.md       the tables of each method in it, too, between
                                                <!-- results: METHOD --> and <!-- /results -->
    python docs/report.py add runs/nlac-s0      keep a finished run, in place of an older one
    python docs/report.py add runs/x --name nlac-s0     ... under another name
    python docs/report.py best ppo-search       the flags of PPO's search, of the best arm
    python docs/report.py tokens nlac-s0        what a kept run sampled

A run is named ARM-sSEED. Standard errors are over seeds. Runs of one design of the scripts are
never averaged or compared with those of another, and a name is unique within its design.

results.jsonl has a line per run: `design` (1 or 2), `name`, what summary.json says of the run
(`script` to `commit`; `n` test episodes), its resolved `args`, the rest of args.json (`setup`),
the rest of summary.json (`summary`), means of the `last_third` of the training metrics of its
last phase, and what `probes` beside them found (judge.json and the like, by their names).
curves.csv has a row per evaluation within a run. Floats have six digits (the lines of design 1
have all); what is not finite is null.
"""

import argparse
import contextlib
import csv
import fcntl
import io
import json
import math
import os
import re
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
DESIGN = 2  # of the scripts whose runs are added now
COLUMNS = "design", "run", "step", "env_steps", "tokens", "success", "se"  # of curves.csv
TOLD = "script", "method", "arm", "env", "model", "seed", "device"  # by each line itself
ENDS = "before", "after", "random", "expert"  # what a table cannot do without, in summary.json
NEEDED = *ENDS, "env_steps", "generated_tokens", "gradient_steps", "seconds"
COUNTS = "step", "stage_step", "phase_step", "env_steps", "tokens", "episodes", "gradient_steps"

METHODS = {  # by the beginning of a run's name; NLAC and rivals: no such
    "self-guide": "Self-Guide",
    "act": "ACT",
    "reagent": "Reagent",
    # The same arms from another tiny model: they are not averaged with the rest.
    "other-base-reagent": "Reagent, another base",
}
MAIN = "nlac", "full", "act,il", "U"  # what the other arms of a table are compared with
CLAIMS = (  # pairs of which the papers find, or one hopes for, a plus
    ("zero", "grpo"),
    ("zero", "immediate"),
    ("dapo", "grpo-dapo"),
    ("act,il,rl", "il,rl"),
    ("few-demos-act,il", "few-demos-il,il"),
    ("few-demos-act,il", "few-demos-il"),
    ("few-demos-act,il", "few-demos-sft-choice,il"),
    ("few-demos-act,il", "few-demos-no-reasoning,il"),
    ("many-demos-act,il", "many-demos-il,il"),
    ("128x2-act,il", "128x2-il,il"),
    ("k4", "il,il"),
    ("32x2", "32x2-il,il"),
    ("32x2-foreign", "32x2-il,il"),
    ("32x2-foreign", "32x2"),
    ("R", "none"),
    ("R-2G", "none-2G"),
    ("R-2G", "none"),
    ("none-2G", "none"),
    ("U-lambda0", "none"),
    ("U-annotator", "U-shuffled"),
    ("U-annotator", "R-2G"),
    ("U-shuffled", "none"),
)
FIRST = (  # arms in the order of the tables, before all others
    *("nlac", "frozen-critic", "blind-critic", "ceiling", "mc-backup", "ppo"),
    *("self-distillation", "nlql", "grpo", "full", "zero", "immediate", "no-anneal"),
    *("inference", "none", "R-2G", "U"),
)
FIGURE = {  # its panels: {arm: the words for it}, of the newest design
    "NLAC and its rivals, repair": {
        "nlac": "NLAC", "label-only": "its reasons cut away", "ppo": "PPO",
        "self-distillation": "self-distillation", "nlac-grpo": "GRPO",
        "blind-critic": "critic of other states", "frozen-critic": "critic that learns nothing"},
    "Self-Guide, household, --dose 1": {
        "self-guide-dose-full": "full method", "self-guide-dose-zero": "guidance alone",
        "self-guide-dose-grpo": "GRPO"},
    "Self-Guide, household": {
        "self-guide-full": "full method", "self-guide-zero": "guidance alone",
        "self-guide-grpo": "GRPO"},
    "Reagent, search, --dose 1": {
        "reagent-dose-U": "U: critique and score",
        "reagent-dose-R-2G": "R: score, twice the attempts", "reagent-dose-none": "no judge"},
}


# ------------------------------------------------------------------------------ the two files


def read_runs(folder):
    """The kept runs: the lines of results.jsonl, each with its rows of curves.csv as `curve`."""
    curves = defaultdict(list)
    for row in read_curves(folder):
        curves[row["design"], row["run"]].append(row)
    runs = []
    for count, line in enumerate(read_lines(folder), start=1):
        try:
            run = json.loads(line)
        except ValueError as error:
            refuse(f"{folder}/results.jsonl, line {count} cannot be read: {error}")
        runs.append(run | {"curve": curves[str(run["design"]), run["name"]]})
    return runs


def read_lines(folder):
    """The lines of results.jsonl; none where there is no such file."""
    path = Path(folder, "results.jsonl")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def read_curves(folder):
    """The rows of curves.csv, all of it text; none where there is no such file."""
    path = Path(folder, "curves.csv")
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_atomically(path, text):
    """Replaces a file at once: whoever reads it sees the old text or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def locked(folder):
    """One `add` at a time: runs that end together do not lose each other's lines."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------------------- keep a run


def add(directory, folder, name="", design=DESIGN):
    """Keeps a finished run under its name, which it returns.

    Its line and its curve replace those of that name and design.
    """
    directory, folder = Path(directory).resolve(), Path(folder)
    name = name or directory.name
    if not (directory / "summary.json").is_file():
        refuse(f"{directory}: no finished run there (no summary.json)")
    try:
        metrics = read_metrics(directory / "metrics.jsonl")
        line = run_line(directory, name, design, metrics)
        curve = curve_rows(name, design, metrics)
        text = json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text = text.replace(str(directory.parent), "runs")  # where it lies says nothing
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(f"{directory} cannot be read ({type(error).__name__}: {error})")
    if not re.fullmatch(rf"\S+-s{line['seed']}", name):
        refuse(f"{name} is no name for this run: NAME-s{line['seed']} is (--name)")

    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        curves = [row for row in read_curves(folder) if not same(row["run"], row["design"], line)]
        lines = []
        for old in read_lines(folder):
            known = json.loads(old)
            if not same(known["name"], known["design"], line):
                lines.append(old)
        write_atomically(folder / "curves.csv", csv_text(curves + curve))
        write_atomically(folder / "results.jsonl", "\n".join([*lines, text]) + "\n")
    return name


def same(name, design, line):
    """Whether a kept line or row is of this run."""
    return name == line["name"] and int(design) == line["design"]


def run_line(directory, name, design, metrics):
    """What results.jsonl keeps of a run."""
    summary = read_json(directory / "summary.json")
    settings = read_json(directory / "args.json")
    line = {"design": design, "name": name}
    for key in TOLD:
        line[key] = summary.pop(key)
    line["n"] = summary.pop("eval_episodes")
    line["commit"] = settings.pop("git_commit")  # when it began: of the code that ran
    if summary["git_commit"] == line["commit"]:
        del summary["git_commit"]
    for key in NEEDED:
        if not math.isfinite(summary[key]["success"] if key in ENDS else summary[key]):
            raise ValueError(f"{key} of summary.json is not a number")
    line["args"] = settings.pop("args")
    line["setup"] = {key: value for key, value in settings.items() if key not in line}
    line["summary"] = shortened(summary)
    line["last_third"] = shortened(last_third(metrics))
    line["probes"] = {}
    for path in sorted(directory.glob("*.json")):
        if path.stem not in ("args", "summary"):
            line["probes"][path.stem] = shortened(read_json(path))
    return line


def last_third(metrics):
    """Means of the last third of the training metrics, of the run's last phase or stage."""
    if not metrics:
        return {}
    phase = phase_of(metrics[-1])
    steps = [step for step in metrics if phase_of(step) == phase]
    steps = steps[-max(1, len(steps) // 3) :]
    values = defaultdict(list)
    for step in steps:
        for key, value in step.items():
            measured = isinstance(value, (int, float)) and math.isfinite(value)
            if measured and key not in COUNTS and not key.startswith("eval_"):
                values[key].append(value)
    means = {key: sum(some) / len(some) for key, some in values.items()}
    return {"phase": phase, "lines": len(steps)} | means


def phase_of(step):
    """The part of a run that a line of metrics is of; None in runs of one part."""
    return step.get("phase", step.get("stage"))


def curve_rows(name, design, metrics):
    """The evaluations within a run, as rows of curves.csv."""
    rows = []
    for step in metrics:
        if shortened(step.get("eval_success")) is None:
            continue
        row = {"design": design, "run": name}
        for key in "step", "env_steps", "tokens":
            row[key] = step[key]
        for key in "success", "se":
            row[key] = f"{step[f'eval_{key}']:.6g}"
        rows.append(row)
    return rows


def csv_text(rows):
    """curves.csv as text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def shortened(value):
    """The same with floats of six digits, and with None for what is not finite."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    return [shortened(item) for item in value] if isinstance(value, list) else value


def read_json(path):
    """What a file of a run says."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_metrics(path):
    """The lines of metrics.jsonl; none where there is none, as of a run that trains nothing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------- arms, seeds, tables


def arm_of(run):
    """The name of a run without its seed."""
    return run["name"].rpartition("-s")[0]


def label(arm):
    """The name of an arm without its method and world."""
    return re.sub(r"^(20q(-full)?|self-guide|act|(other-base-)?reagent)-", "", arm)


def method_of(run):
    """The method whose tables show a run."""
    for start, method in METHODS.items():
        if run["name"].startswith(f"{start}-"):
            return method
    return "NLAC"


def by_table(runs):
    """{(method, world, design): {arm: {seed: run}}}: NLAC and its rivals first, 20q last."""

    def place(run):
        name, method, env = arm_of(run), method_of(run), run["env"]
        order = FIRST.index(label(name)) if label(name) in FIRST else len(FIRST)
        return method != "NLAC", method, -run["design"], "20q" in env, env, order, name

    tables = defaultdict(dict)
    for run in sorted(runs, key=place):
        arms = tables[method_of(run), run["env"], run["design"]]
        arms.setdefault(arm_of(run), {})[run["seed"]] = run
    return tables


def mean_se(values):
    """Mean and standard error over seeds; the latter is nan for a single one."""
    values = list(values)
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def number(mean, se, signed=False):
    """0.500 ± 0.010, or without the error where it is not known."""
    text = f"{mean:+.3f}" if signed else f"{mean:.3f}"
    return text if math.isnan(se) else f"{text} ± {se:.3f}"


def cell(values, signed=False):
    """Mean and standard error of the values that are known; a dash without any."""
    known = [value for value in values if value is not None]
    return number(*mean_se(known), signed=signed) if known else "-"


def markdown(head, rows):
    """A table, "" without rows; `head` is the text of its first line."""
    if not rows:
        return ""
    columns = head.count("|") + 1
    lines = [f"| {head} |", "|" + "---|" * columns]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def tables(runs):
    """{method: markdown}: per world and design the tables, and what only one method has."""
    texts = defaultdict(list)
    for (method, env, design), arms in by_table(runs).items():
        texts[method].append(heading(env, design, arms))
        texts[method] += [text for table in TABLES if (text := table(arms))]
    return {method: "\n\n".join(parts) for method, parts in texts.items()}


def heading(env, design, arms):
    """What the numbers of a table are."""
    runs = [run for seeds in arms.values() for run in seeds.values()]
    players = runs[0]["summary"]
    ends = "; ".join(f"{who} {players[who]['success']:.3f}" for who in ("random", "expert"))
    episodes = "/".join(str(n) for n in sorted({run["n"] for run in runs}))
    devices = ", ".join(sorted({str(run["device"]) for run in runs}))
    return (
        f"**{env}, design {design}** (success on {episodes} test episodes per run; "
        f"mean ± standard error over seeds; {ends} player; {devices})"
    )


def result_table(arms):
    """A row per arm: everything by which runs can be compared, as means over seeds."""
    head = (
        "arm | seeds | before | after | ood, after | of the expert's | environment steps | "
        "generated tokens | gradient steps | minutes"
    )
    rows = []
    for arm, runs in arms.items():
        rows.append(result_row(arm, [run["summary"] for run in runs.values()]))
    if all(row[4] == "-" for row in rows):  # this world has no such split
        head = head.replace(" ood, after |", "")
        rows = [row[:4] + row[5:] for row in rows]
    return markdown(head, rows)


def result_row(arm, summaries):
    """The cells of an arm."""

    def mean(key):
        return sum(summary.get(key, 0) for summary in summaries) / len(summaries)

    def share(summary):
        return summary["after"]["success"] / (summary["expert"]["success"] or math.nan)

    after = cell(summary["after"]["success"] for summary in summaries)
    steps = f"{mean('env_steps'):,.0f}"
    if mean("simulation_steps"):
        steps += f" + {mean('simulation_steps'):,.0f} simulated"
    return [
        arm,
        str(len(summaries)),
        cell(summary["before"]["success"] for summary in summaries),
        f"**{after}**",
        cell(summary.get("after_ood", {}).get("success") for summary in summaries),
        f"{mean_se(share(summary) for summary in summaries)[0]:.0%}",
        steps,
        f"{mean('generated_tokens'):,.0f}",
        f"{mean('gradient_steps'):,.0f}",
        f"{mean('seconds') / 60:.1f}",
    ]


def success(runs, when="after"):
    """{seed: success} of an arm."""
    return {seed: run["summary"][when]["success"] for seed, run in runs.items()}


def difference(name, one, other):
    """Rows, one or none: `one` minus `other`, {seed: success} each, paired over shared seeds."""
    shared = sorted(set(one) & set(other))
    if not shared:
        return []
    mean, se = mean_se(one[seed] - other[seed] for seed in shared)
    told = "yes" if abs(mean) > 2 * se else "no"
    told = "one seed" if math.isnan(se) else told
    return [[name, str(len(shared)), number(mean, se, signed=True), told]]


def difference_table(arms):
    """The method minus its own base, and minus each other arm."""
    mine = next((arm for arm in arms if label(arm) in MAIN), None)
    if mine is None:
        return ""
    after = success(arms[mine])
    rows = difference("its base", after, success(arms[mine], "before"))
    for arm, runs in arms.items():
        if arm != mine:
            rows += difference(arm, after, success(runs))
    return markdown(f"{label(mine)} minus | seeds | difference | beyond 2 standard errors", rows)


def claim_table(arms):
    """Other pairs of arms."""
    known = {label(arm): success(runs) for arm, runs in arms.items()}
    rows = []
    for one, other in CLAIMS:
        rows += difference(f"{one} minus {other}", known.get(one, {}), known.get(other, {}))
    head = "other pairs of arms | seeds | difference | beyond 2 standard errors"
    return markdown(head, rows)


def rating_table(arms):
    """Of arms that rate themselves: what ratings say, and whether they tell success from failure.

    Means over seeds, on `test`.
    """
    rows = []
    for arm, runs in arms.items():
        watched = [run["summary"].get("watched", {}) for run in runs.values()]
        before = [ends.get("before", {}).get("test", {}) for ends in watched]
        after = [ends.get("after", {}).get("test", {}) for ends in watched]
        if not any("label_positive" in numbers for numbers in after):
            continue
        row = [arm]
        for key, ends in (
            ("label_outcome_correlation", before),
            ("label_outcome_correlation", after),
            ("label_positive", after),
            ("label_negative", after),
            ("label_malformed", after),
            ("looping", before),
            ("looping", after),
        ):
            row.append(cell(numbers.get(key) for numbers in ends))
        rows.append(row)
    head = (
        "arm | correlation of ratings with success, before | after | positive, after | "
        "negative | malformed | looping, before | after"
    )
    return markdown(head, rows)


def stage_table(arms):
    """Of ACT's pipelines: what docs/rationale.py found on held-out states of the expert."""
    rows, keys = [], ("next_action", "free", "choice_first", "choice_second")
    for arm, runs in arms.items():
        found = probes(runs, "rationale")
        if found:
            cells = [cell(one.get(key) for one in found) for key in keys]
            rows.append([arm, found[0]["stage"], *cells])
    head = (
        "arm | stage | the expert's action | the right one of two | "
        "if shown first | if shown second"
    )
    return markdown(head, rows)


def probes(runs, name):
    """What a file of docs/ found out about the runs of an arm, where it was asked."""
    return [run["probes"][name] for run in runs.values() if run["probes"].get(name)]


def rationale_table(arms):
    """What docs/rationale.py found: how often the right action is chosen, by the thought."""
    rows = []
    for arm, runs in arms.items():
        found = probes(runs, "rationale")
        if found:
            cells = [cell(one[key] for one in found) for key in ("free", "removed", "wrong")]
            rows.append([arm, found[0]["stage"], *cells])
    head = (
        "arm | stage | right one of two, free thought | no thought | the thought of another state"
    )
    return markdown(head, rows)


def attempt_table(arms):
    """Of Reagent's runs: what the attempts of the last third of the updates were like."""
    keys = (
        *(["success"], ["second_success"], ["judge_score", "reward_model"], ["judge_auc"], ["leaks"]),
        *(["flaws", "repeated_calls"], ["second_flaws", "second_repeated_calls"]),
    )
    rows = []
    for arm, runs in arms.items():
        last = [run["last_third"] for run in runs.values()]
        last = [means for means in last if means.get("phase") == "learn"]
        if last:
            rows.append([arm, *(cell(of_either(means, key) for means in last) for key in keys)])
    head = (
        "arm, last third of training | first attempts won | second attempts won | "
        "judge's score | its AUC for success | critiques that name the answer | "
        "flaws (design 1: repeated calls), first | second"
    )
    return markdown(head, rows)


def second_attempt_table(arms):
    """What docs/second_attempts.py found: how often they win, by what they are told."""
    rows = []
    for arm, runs in arms.items():
        found = probes(runs, "second_attempts")
        for way in found[0] if found else ():
            told = [one[way] for one in found]
            row = [f"{arm}, {way}", str(len(found))]
            for part in "all", "lost", "won":
                row.append(cell(one.get(part, {}).get("success") for one in told))
            paired = [one.get("minus_nothing", {}).get("difference") for one in told]
            rows.append([*row, cell(paired, signed=True)])
    head = (
        "arm after training, attempt | seeds | won | where the first was lost | "
        "where it was won | minus `nothing`, paired"
    )
    return markdown(head, rows)


def of_either(numbers, names):
    """What has one of the names: the second design's, then the first's."""
    return next((numbers[name] for name in names if name in numbers), None)


def judge_table(arms):
    """Of judges trained in a run: their quality on trajectories of the test split."""
    keys = ["judge_readable", "parsed"], ["judge_auc", "auc_outcome"], ["auc_process"], ["error"]
    rows = []
    for arm, runs in arms.items():
        judges = [run["summary"].get("judge") or {} for run in runs.values()]
        judges = [judge for judge in judges if "judge-sft" in judge]
        for when in "before", "judge-sft", "judge-grpo":
            for who in "players", "agent":
                seen = [judge[when][who] for judge in judges if who in judge.get(when, {})]
                if seen:
                    cells = [cell(of_either(judge, names) for judge in seen) for names in keys]
                    rows.append([f"{arm}, {when}, on {who}", *cells])
    head = (
        "judge | readable | AUC of its score for success | for a process without flaws | "
        "distance to the reference score"
    )
    return markdown(head, rows)


TABLES = (
    *(result_table, difference_table, claim_table, rating_table, stage_table, rationale_table),
    *(attempt_table, second_attempt_table, judge_table),
)


def write_between_marks(path, texts):
    """Each method's tables, in a page that has the marks for them."""
    page = Path(path).read_text(encoding="utf-8")
    for method, text in texts.items():
        start, end = f"<!-- results: {method} -->", "<!-- /results -->"
        places = re.findall(rf"{start}\n(?:(?!<!-- results).)*?{end}", page, flags=re.DOTALL)
        if len(places) != 1:
            refuse(f"{path} needs one {start} and, behind it, one {end}")
        page = page.replace(places[0], f"{start}\n{text}\n{end}")
    write_atomically(Path(path), page)


# --------------------------------------------------------------------------------- the figure


def curve(runs):
    """(environment steps, mean success, standard error) over the seeds of an arm.

    Each seed's evaluations are interpolated linearly. The first is of the model that learning
    starts from, after a cold start where there is one; the last is of the trained model.
    """
    lines = []
    for run in runs.values():
        start = run["summary"].get("cold_started", {}).get("test") or run["summary"]["before"]
        points = [(0, start["success"])]
        for row in run["curve"]:
            points.append((int(row["env_steps"]), float(row["success"])))
        steps = run["summary"]["env_steps"]
        if steps > points[-1][0]:
            points.append((steps, run["summary"]["after"]["success"]))
        if len(points) > 1:
            lines.append(points)
    if not lines:
        return []
    end = min(points[-1][0] for points in lines)
    steps = {step for points in lines for step, _ in points if step <= end}
    return [(step, *mean_se(at(points, step) for points in lines)) for step in sorted(steps)]


def at(points, x):
    """The height at x of the line through these points."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / ((x1 - x0) or 1)
    return points[-1][1]


def draw(runs, path):
    """Test success against environment steps: the panels of FIGURE that have curves."""
    try:
        import matplotlib
    except ImportError:
        message = "no figure: it needs matplotlib (pip install -r requirements-dev.txt)"
        return print(message, file=sys.stderr)
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms, newest = defaultdict(dict), max(run["design"] for run in runs)
    for run in runs:
        if run["design"] == newest:
            arms[arm_of(run)][run["seed"]] = run
    shown = {}
    for title, names in FIGURE.items():
        curves = {words: arms[arm] for arm, words in names.items() if curve(arms[arm])}
        if curves:
            shown[title] = curves
    height = max(1, math.ceil(len(shown) / 2))
    figure, panels = plt.subplots(height, 2, figsize=(12.8, 4.4 * height), squeeze=False)
    for panel in panels.flat[len(shown) :]:
        panel.axis("off")
    for panel, (title, curves) in zip(panels.flat, shown.items()):
        draw_panel(panel, title, curves)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def draw_panel(panel, title, curves):
    """Curves {words: {seed: run}} between their base and the expert; the first is the method's."""
    for number, (words, runs) in enumerate(curves.items()):
        steps, means, errors = zip(*curve(runs))
        seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
        width = 1.3 if number else 2.2
        panel.plot(steps, means, color=f"C{number}", label=f"{words} ({seeds})", linewidth=width)
        errors = [0 if math.isnan(se) else se for se in errors]
        low = [mean - se for mean, se in zip(means, errors)]
        high = [mean + se for mean, se in zip(means, errors)]
        panel.fill_between(steps, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
    summaries = [run["summary"] for runs in curves.values() for run in runs.values()]
    expert = mean_se(summary["expert"]["success"] for summary in summaries)[0]
    panel.axhline(expert, color="grey", linestyle="--", linewidth=1, label="expert")
    panel.set(title=title, xlabel="environment steps", ylabel="success on test episodes")
    panel.set(ylim=(-0.02, 1.05))
    panel.legend(fontsize=8)


# ------------------------------------------------------------------------------- command line


def best(runs, prefix):
    """Learning rate and entropy bonus, as flags, of the best arm whose name begins so, or None.

    Of the newest design that has such arms.
    """
    arms = defaultdict(list)
    for run in runs:
        if run["name"].startswith(prefix):
            arms[run["design"], arm_of(run)].append(run)
    if not arms:
        return None

    def rank(key):
        mean, _ = mean_se(run["summary"]["after"]["success"] for run in arms[key])
        return key[0], mean

    args = arms[max(arms, key=rank)][0]["args"]
    flags = {"--lr": args.get("lr"), "--entropy-coef": args.get("entropy_coef")}
    return " ".join(f"{flag} {value}" for flag, value in flags.items() if value is not None)


def tokens(runs, name):
    """What a run sampled, in the newest design that has it; None where it is not kept."""
    found = sorted((run for run in runs if run["name"] == name), key=lambda run: run["design"])
    return found[-1]["summary"]["generated_tokens"] if found else None


def refuse(message):
    """Ends the program: one line, exit status 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


class OneLineParser(argparse.ArgumentParser):
    """Its errors are one line each."""

    def error(self, message):
        """See refuse."""
        refuse(message)


def parse(argv):
    """The command line above."""
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--results", default=str(HERE), help="the folder of the two files")
    parser.add_argument("--figure", default=str(HERE / "learning_curves.png"))
    parser.add_argument("--write", default="", metavar="FILE", help="a page with these marks")
    parser.add_argument("--design", type=int, help="only runs of this design")
    commands = parser.add_subparsers(dest="command")
    adding = commands.add_parser("add", help="keep a finished run")
    adding.add_argument("run", metavar="RUN_DIR")
    adding.add_argument("--name", default="", help="NAME-sSEED; default: RUN_DIR's own")
    commands.add_parser("best").add_argument("prefix", help="beginning of the arms' names")
    commands.add_parser("tokens").add_argument("run", help="NAME-sSEED")
    return parser.parse_args(argv)


def main(argv=None):
    """The command line above."""
    args = parse(argv)
    if args.command == "add":
        name = add(args.run, args.results, args.name)
        return print(f"{name} is kept in {args.results}")
    runs = [run for run in read_runs(args.results) if args.design in (None, run["design"])]
    if args.command == "best":
        told = best(runs, args.prefix)
        missing = f"no run kept in {args.results} begins with {args.prefix}"
        return print(told) if told is not None else refuse(missing)
    if args.command == "tokens":
        told = tokens(runs, args.run)
        missing = f"no run {args.run} is kept in {args.results}"
        return print(told) if told is not None else refuse(missing)
    if not runs:
        refuse(f"no run is kept in {args.results}: see docs/experiments.sh")
    texts = tables(runs)
    print("\n\n".join(f"{method}\n{text}" for method, text in texts.items()))
    if args.write:
        write_between_marks(args.write, texts)
    draw(runs, args.figure)


if __name__ == "__main__":
    main()
