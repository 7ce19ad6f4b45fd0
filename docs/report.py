"""Keeps runs in results.jsonl and curves.csv, and makes the tables of results.md from them alone.

    python docs/report.py                       print the tables
    python docs/report.py --write docs/results.md       ... to a page, below its mark
    python docs/report.py add runs/nlac-s0      keep a finished run, in place of an older one
    python docs/report.py add runs/x --name nlac-s0     ... under another name

A run is named ARM-sSEED. results.jsonl has a line per run: the `design` of the scripts, `name`,
what summary.json says of the run (`script` to `commit`; `n` test episodes), its resolved `args`,
the rest of args.json (`setup`) and of summary.json (`summary`), means over the `last_third` of the
training metrics of its last phase, and what `probes` found out (judge.json and the like, by their
names). curves.csv has a row per evaluation within a run; docs/learning_curves.py draws them. Floats
have six digits; what is not finite is null.
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
import statistics
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
DESIGN = 2  # of the scripts; runs of the first one are in git's history alone: docs/design1.md
COLUMNS = "design", "run", "step", "env_steps", "tokens", "success", "se"  # of curves.csv
TOLD = "script", "method", "arm", "env", "model", "seed", "device"  # by each line itself
ENDS = "before", "after", "random", "expert"  # what a table cannot do without, in summary.json
NEEDED = *ENDS, "env_steps", "generated_tokens", "gradient_steps", "seconds"
COUNTS = "step", "stage_step", "phase_step", "env_steps", "tokens", "episodes", "gradient_steps"

METHODS = {"": "NLAC and its rivals", "self-guide-": "Self-Guide", "act-": "ACT",
           "reagent-": "Reagent"}  # by the beginning of a run's name
FAMILIES = {  # what can be compared begins alike: the rest of the name of the method's own arm
    "": "nlac", "20q-": "nlac", "nlac-smollm2": "",
    "self-guide-": "full", "self-guide-dose-": "full", "self-guide-smollm2-": "full",
    "act-": "act,il", "act-dose-": "act,il", "act-dose20k-": "act,il", "act-smollm2-": "act,il",
    "act-few-demos-": "act,il", "act-many-demos-": "act,il", "act-128x2-": "act,il", "act-32x2": "",
    "reagent-": "U", "reagent-dose-": "U"}
PAIRS = (  # compared besides, within each family
    ("zero", "grpo"), ("act,il,rl", "il,rl"), ("R-2G", "none"), ("U-annotator", "R-2G"))
MARK = "<!-- below: docs/report.py -->\n"  # what stands above it in the page is written by hand


# ------------------------------------------------------------------------------ the two files


def read_runs(folder):
    """The kept runs: the lines of results.jsonl, each with its rows of curves.csv as `curve`."""
    curves, runs = defaultdict(list), []
    for row in read_curves(folder):
        curves[row["run"]].append(row)
    for count, line in enumerate(read_lines(folder / "results.jsonl"), start=1):
        try:
            run = json.loads(line)
        except ValueError as error:
            refuse(f"{folder}/results.jsonl, line {count} cannot be read: {error}")
        runs.append(run | {"curve": curves[run["name"]]})
    return runs


def read_lines(path):
    """The lines of a file; none where there is no such file."""
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def read_curves(folder):
    """The rows of curves.csv, all of it text; none where there is no such file."""
    return list(csv.DictReader(read_lines(folder / "curves.csv")))


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


def add(directory, folder, name=""):
    """Keeps a finished run under its name, which it returns, in place of what had that name."""
    directory = directory.resolve()
    name = name or directory.name
    if not (directory / "summary.json").is_file():
        refuse(f"{directory}: no finished run there (no summary.json)")
    try:
        metrics = [json.loads(line) for line in read_lines(directory / "metrics.jsonl")]
        line = run_line(directory, name, metrics)
        curve = curve_rows(name, metrics)
        text = json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        for place in directory, Path(line["args"].get("out_dir", "")):
            if place.is_absolute():  # where it lies, or lay, says nothing
                text = text.replace(str(place.parent), "runs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(f"{directory} cannot be read ({type(error).__name__}: {error})")
    if not re.fullmatch(rf"\S+-s{line['seed']}", name):
        refuse(f"{name} is no name for this run: NAME-s{line['seed']} is (--name)")

    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        known = read_lines(folder / "results.jsonl")
        lines = [old for old in known if json.loads(old)["name"] != name]
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in read_curves(folder) if row["run"] != name)
        writer.writerows(curve)
        write_atomically(folder / "curves.csv", table.getvalue())
        write_atomically(folder / "results.jsonl", "\n".join([*lines, text]) + "\n")
    return name


def run_line(directory, name, metrics):
    """What results.jsonl keeps of a run."""
    files = {path.name: read_json(path) for path in sorted(directory.glob("*.json"))}
    summary, settings = files.pop("summary.json"), files.pop("args.json")
    line = {"design": DESIGN, "name": name}
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
    probes = {name.removesuffix(".json"): found for name, found in files.items()}
    measured = {"summary": summary, "last_third": last_third(metrics), "probes": probes}
    return line | shortened(measured)


def last_third(metrics):
    """Means of the last third of the training metrics, of the last phase or stage of a run."""
    if not metrics:
        return {}
    phases = [step.get("phase", step.get("stage")) for step in metrics]
    steps = [step for step, phase in zip(metrics, phases) if phase == phases[-1]]
    steps = steps[-max(1, len(steps) // 3):]
    values = defaultdict(list)
    for step in steps:
        for key, value in step.items():
            measured = isinstance(value, (int, float)) and math.isfinite(value)
            if measured and key not in COUNTS and not key.startswith("eval_"):
                values[key].append(value)
    means = {key: sum(some) / len(some) for key, some in values.items()}
    return {"phase": phases[-1], "lines": len(steps)} | means


def curve_rows(name, metrics):
    """The evaluations within a run, as rows of curves.csv."""
    rows = []
    for step in metrics:
        if shortened(step.get("eval_success")) is not None:
            row = {"design": DESIGN, "run": name}
            row |= {key: step[key] for key in ("step", "env_steps", "tokens")}
            row |= {key: f"{step[f'eval_{key}']:.6g}" for key in ("success", "se")}
            rows.append(row)
    return rows


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


# ----------------------------------------------------------------------------- arms and seeds


def arm_of(run):
    """The name of a run without its seed."""
    return run["name"].rpartition("-s")[0]


def beginning(name, known):
    """The longest of the `known` beginnings that a name has."""
    return max(filter(name.startswith, known), key=len)


def place(run):
    """What the tables are sorted by: a family's own arm goes first."""
    arm = arm_of(run)
    method, family = beginning(arm, METHODS), beginning(arm, FAMILIES)
    order = [*METHODS].index(method), run["env"], [*FAMILIES].index(family)
    return *order, arm != family + FAMILIES[family], arm


def by_table(runs):
    """{(method, world): {arm: {seed: run}}}, in the order of the page."""
    tables = defaultdict(dict)
    for run in sorted(runs, key=place):
        method = METHODS[beginning(run["name"], METHODS)]
        tables[method, run["env"]].setdefault(arm_of(run), {})[run["seed"]] = run
    return tables


def success(runs, when="after"):
    """{seed: success} of an arm."""
    return {seed: run["summary"][when]["success"] for seed, run in runs.items()}


def mean_se(values):
    """Mean and standard error over seeds; the latter is nan for a single one."""
    values = list(values)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), spread / math.sqrt(len(values))


# --------------------------------------------------------------------------------- the tables


def tables(runs):
    """All of them, as markdown."""
    parts, shown = [], ""
    for (method, env), arms in by_table(runs).items():
        parts += [f"## {method}\n"] * (method != shown)
        shown = method
        parts += [heading(env, arms), result_table(arms), difference_table(arms)]
        parts += [detail_table(arms, title, told) for title, told in DETAILS.items()]
    return "\n".join(filter(None, parts))


def heading(env, arms):
    """The world, who bounds what can be won in it, and where the runs were."""
    runs = [run for seeds in arms.values() for run in seeds.values()]
    most = max(runs, key=lambda run: run["n"])["summary"]
    random, expert = most["random"]["success"], most["expert"]["success"]
    devices = ", ".join(sorted({run["device"] for run in runs}))
    return f"### {env}\n\nA random player wins {random:.3f}, the expert {expert:.3f}; {devices}.\n"


def number(mean, se, sign=""):
    """0.500 ± 0.010, or without the error where it is not known."""
    return f"{mean:{sign}.3f}" + ("" if math.isnan(se) else f" ± {se:.3f}")


def cell(values):
    """Mean and standard error of the values that are known; a dash without any."""
    known = [value for value in values if value is not None]
    return number(*mean_se(known)) if known else "-"


def markdown(head, rows):
    """A table, "" without rows; `head`: the cells of its first line."""
    lines = [f"| {' | '.join(line)} |\n" for line in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head) + "\n")
    return "".join(lines) if rows else ""


def result_table(arms):
    """A row per arm: everything by which runs can be compared, as means over seeds."""
    head = ("arm,seeds,n,before,after,ood after,environment steps,generated tokens,"
            "gradient steps,minutes").split(",")
    rows = [result_row(arm, [*runs.values()]) for arm, runs in arms.items()]
    if all(row[5] == "-" for row in rows):  # this world has no such split
        head, *rows = [row[:5] + row[6:] for row in (head, *rows)]
    return markdown(head, rows)


def result_row(arm, runs):
    """The cells of an arm."""
    summaries = [run["summary"] for run in runs]
    cost = {}
    for key in "env_steps", "simulation_steps", "generated_tokens", "gradient_steps", "seconds":
        cost[key] = statistics.fmean(summary.get(key, 0) for summary in summaries)
    simulated = f" + {cost['simulation_steps']:,.0f} simulated" if cost["simulation_steps"] else ""
    return [
        arm, str(len(runs)), str(runs[0]["n"]),
        cell(summary["before"]["success"] for summary in summaries),
        f"**{cell(summary['after']['success'] for summary in summaries)}**",
        cell(summary.get("after_ood", {}).get("success") for summary in summaries),
        f"{cost['env_steps']:,.0f}{simulated}",
        f"{cost['generated_tokens']:,.0f}",
        f"{cost['gradient_steps']:,.0f}",
        f"{cost['seconds'] / 60:.1f}"]


def difference_table(arms):
    """Of each family: its own arm after minus before and minus all others, then PAIRS."""
    after = {arm: success(runs) for arm, runs in arms.items()}
    rows = []
    for family, rest in FAMILIES.items():
        own = family + rest
        if own in arms:
            before = success(arms[own], "before")
            rows += difference(f"{own}: after minus before", after[own], before)
        others = [arm for arm in arms if beginning(arm, FAMILIES) == family and arm != own]
        pairs = [(own, arm) for arm in others]
        pairs += [(family + one, family + other) for one, other in PAIRS]
        for one, other in pairs:
            rows += difference(f"{one} minus {other}", after.get(one, {}), after.get(other, {}))
    return markdown(["difference", "seeds", "mean", "beyond 2 standard errors"], rows)


def difference(name, one, other):
    """Rows, one or none: `one` minus `other`, {seed: success} each, paired over shared seeds."""
    shared = sorted(set(one) & set(other))
    if not shared:
        return []
    mean, se = mean_se(one[seed] - other[seed] for seed in shared)
    told = "one seed" if math.isnan(se) else "yes" if abs(mean) > 2 * se else "no"
    return [[name, str(len(shared)), number(mean, se, sign="+"), told]]


def detail_table(arms, title, told):
    """What one method alone has: `told` a run, {row: {column: number}}, as means over seeds."""
    found = defaultdict(list)
    for arm, runs in arms.items():
        for run in runs.values():
            for row, numbers in told(run).items():
                found[f"{arm}{row}"].append(numbers)
    head, rows = [title, "seeds"], []
    for name, seeds in found.items():
        head[2:] = seeds[0]
        cells = [cell(numbers[column] for numbers in seeds) for column in seeds[0]]
        rows.append([name, str(len(seeds)), *cells])
    return markdown(head, rows)


def ratings(run):
    """Of a run that rates itself: what its ratings on `test` say, and how they go with success."""
    watched = run["summary"].get("watched", {})
    before, after = (watched.get(when, {}).get("test", {}) for when in ("before", "after"))
    told = {"correlation with success, before": before.get("label_outcome_correlation"),
            "after": after.get("label_outcome_correlation")}
    told |= {label: after.get(f"label_{label}") for label in ("positive", "negative", "malformed")}
    return {"": told} if "label_positive" in after else {}


def choices(run):
    """What docs/rationale.py found of one of ACT's."""
    found = run["probes"].get("rationale", {})
    columns = {
        "next_action": "the expert's action", "free": "the right one of two",
        "choice_first": "if shown first", "choice_second": "if shown second",
        "removed": "without a thought", "wrong": "behind the thought of another state"}
    told = {name: found.get(key) for key, name in columns.items()}
    return {f", {found['stage']}": told} if found else {}


def attempts(run):
    """Of one of Reagent's: what the attempts of the last third of the updates were like."""
    means = run["last_third"]
    columns = {
        "success": "first attempts won", "second_success": "second ones",
        "judge_score": "judge's score", "judge_auc": "its AUC for success",
        "leaks": "critiques that name the answer",
        "flaws": "flaws of a first attempt", "second_flaws": "of a second one"}
    told = {name: means.get(key) for key, name in columns.items()}
    return {"": told} if means.get("phase") == "learn" else {}


def second_attempts(run):
    """What docs/second_attempts.py found: how often they win, by what they are told."""
    rows = {}
    for way, found in run["probes"].get("second_attempts", {}).items():
        columns = {"all": "won", "lost": "where the first was lost", "won": "where it was won"}
        told = {name: found.get(part, {}).get("success") for part, name in columns.items()}
        paired = found.get("minus_nothing", {}).get("difference")
        rows[f", {way}"] = told | {"minus nothing, paired": paired}
    return rows


def judges(run):
    """Of a run that trained a judge: its quality on trajectories of `test`."""
    judge = run["summary"].get("judge") or {}
    columns = {
        "judge_readable": "readable", "judge_auc": "AUC of its score for success",
        "auc_process": "for a process without flaws", "error": "distance to the reference score"}
    rows = {}
    for when in judge if "judge-sft" in judge else ():
        for who, found in judge[when].items():
            rows[f", {when}, on {who}"] = {name: found[key] for key, name in columns.items()}
    return rows


DETAILS = {  # what the rows of each table are of
    "ratings": ratings, "choices, held out": choices, "last third of training": attempts,
    "attempts after training": second_attempts, "judge": judges}


# ------------------------------------------------------------------------------- command line


def refuse(message):
    """Ends the program: one line, exit status 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def parse(argv):
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=HERE, help="the folder of the two files")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="where the tables go")
    commands = parser.add_subparsers(dest="command")
    adding = commands.add_parser("add", help="keep a finished run")
    adding.add_argument("run", metavar="RUN_DIR", type=Path)
    adding.add_argument("--name", default="", help="NAME-sSEED; default: RUN_DIR's own")
    parser.error = adding.error = refuse
    return parser.parse_args(argv)


def main(argv=None):
    """The command line above."""
    args = parse(argv)
    if args.command == "add":
        name = add(args.run, args.results, args.name)
        return print(f"{name} is kept in {args.results}")
    runs = read_runs(args.results)
    if not runs:
        refuse(f"no run is kept in {args.results}: see docs/experiments.sh")
    if not args.write:
        return print(tables(runs))
    page = args.write.read_text(encoding="utf-8") if args.write.exists() else ""
    head, mark, _ = page.partition(MARK)
    if not mark:
        refuse(f"{args.write} needs the line {MARK}")
    write_atomically(args.write, f"{head}{MARK}\n{tables(runs)}")


if __name__ == "__main__":
    main()
