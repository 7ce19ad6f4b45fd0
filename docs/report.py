"""README's tables and the learning curves, from the kept result files alone.

    python docs/report.py                        print the tables; write docs/learning_curves.png
    python docs/report.py --write README.md      each method's tables between <!-- results: METHOD --> and <!-- /results --> in it, too
    python docs/report.py keep runs              copy the finished runs in runs/ to docs/results: summary, settings, thinned metrics
    python docs/report.py best ppo-search        the flags of PPO's search, from the best arm whose name begins so
    python docs/report.py tokens nlac-s0         what a run sampled

A run is a directory NAME-sSEED with summary.json, args.json and metrics.jsonl; an arm is what shares NAME. Standard errors are over seeds.
"""

import argparse
import itertools
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
METHODS = {  # by the beginning of a run's name; NLAC and rivals: no such
    "self-guide": "Self-Guide", "act": "ACT", "reagent": "Reagent",
    "other-base-reagent": "Reagent, another base"}  # the same arms from another tiny model: they are not averaged with the rest
MAIN = "nlac", "full", "act,il", "U"  # what the other arms of a table are compared with
CLAIMS = (  # pairs of which the papers find, or one hopes for, a plus
    ("zero", "grpo"), ("zero", "immediate"), ("dapo", "grpo-dapo"), ("act,il,rl", "il,rl"),
    *(("few-demos-act,il", f"few-demos-{other}") for other in ("il,il", "il", "sft-choice,il", "no-reasoning,il")),
    ("many-demos-act,il", "many-demos-il,il"), ("128x2-act,il", "128x2-il,il"), ("k4", "il,il"),
    ("32x2", "32x2-il,il"), ("32x2-foreign", "32x2-il,il"), ("32x2-foreign", "32x2"),
    ("R", "none"), ("R-2G", "none-2G"), ("R-2G", "none"), ("none-2G", "none"), ("U-lambda0", "none"),
    ("U-annotator", "U-shuffled"), ("U-annotator", "R-2G"), ("U-shuffled", "none"))
CURVES = ("nlac", "frozen-critic", "blind-critic", "ceiling", "mc-backup", "ppo", "self-distillation", "nlql", "grpo", "full", "zero",
          "immediate", "no-anneal", "inference", "none", "R-2G", "U")  # arms of the figure


def read_runs(results):
    """{name: {seed: {"summary", "args", "metrics"}}} of the finished runs in a directory; what cannot be read is skipped, with a word."""
    arms = defaultdict(dict)
    for path in sorted(Path(results).glob("*/summary.json")):
        found = re.fullmatch(r"(.+)-s(\d+)", path.parent.name)
        if not found:
            print(f"{path.parent} is not named NAME-sSEED: skipped", file=sys.stderr)
            continue
        try:
            settings, curve = path.with_name("args.json"), path.with_name("metrics.jsonl")
            beside = {name: path.with_name(f"{name}.json") for name in ("rationale", "second_attempts")}  # what other files of docs/ found
            arms[found[1]][int(found[2])] = {
                "summary": json.loads(path.read_text(encoding="utf-8")),
                "args": json.loads(settings.read_text(encoding="utf-8"))["args"] if settings.exists() else {},
                **{name: json.loads(other.read_text(encoding="utf-8")) for name, other in beside.items() if other.exists()},
                "metrics": read_jsonl(curve)}
        except (ValueError, KeyError) as error:
            print(f"{path.parent} cannot be read ({type(error).__name__}): skipped", file=sys.stderr)
    return dict(arms)


def read_jsonl(path):
    """The lines of a file; none where there is none, as of a run that trains nothing."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()] if path.exists() else []


def mean_se(values):
    """Mean and standard error over seeds; the latter is nan for a single one."""
    values = list(values)
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def number(mean, se, signed=False):
    return f"{mean:{'+' if signed else ''}.3f}" + ("" if math.isnan(se) else f" ± {se:.3f}")


def label(name):
    return re.sub(r"^(20q(-full)?|self-guide|act|(other-base-)?reagent)-", "", name)


def order(name):
    return CURVES.index(label(name)) if label(name) in CURVES else len(CURVES), name


def by_table(arms):
    """{(method, world): {name: runs}}: NLAC and its rivals by world, each other method in a table of its own."""
    tables = defaultdict(dict)
    for name in sorted(arms, key=order):
        for env in sorted({run["summary"]["env"] for run in arms[name].values()}):
            method = next((METHODS[start] for start in METHODS if name.startswith(f"{start}-")), "NLAC")
            tables[method, env][name] = {seed: run for seed, run in arms[name].items() if run["summary"]["env"] == env}
    return dict(sorted(tables.items(), key=lambda item: (item[0][0] != "NLAC", item[0][0], "20q" in item[0][1], item[0][1])))


def result_table(arms):
    """A row per arm: everything by which runs can be compared, as means over seeds."""
    ood = any("after_ood" in run["summary"] for runs in arms.values() for run in runs.values())
    lines = [f"| arm | seeds | before | after | {'ood, after | ' * ood}of the expert's | environment steps | generated tokens | "
             "gradient steps | minutes |", "|---|---|---|---|" + "---|" * ood + "---|---|---|---|---|"]
    for name, runs in arms.items():
        s = [run["summary"] for run in runs.values()]
        after, share = (mean_se([f(x) for x in s]) for f in (
            lambda x: x["after"]["success"], lambda x: x["after"]["success"] / (x["expert"]["success"] or math.nan)))
        mean = {key: sum(x[key] for x in s) / len(s) for key in ("env_steps", "generated_tokens", "gradient_steps", "seconds")}
        simulated = [x["simulation_steps"] for x in s if x.get("simulation_steps")]
        more = f" + {sum(simulated) / len(simulated):,.0f} simulated" if simulated else ""
        before = number(*mean_se([x["before"]["success"] for x in s]))
        other = f"{number(*mean_se([x['after_ood']['success'] for x in s if 'after_ood' in x] or [math.nan]))} | " if ood else ""
        lines.append(f"| {name} | {len(s)} | {before} | **{number(*after)}** | {other}{share[0]:.0%} | "
                     f"{mean['env_steps']:,.0f}{more} | {mean['generated_tokens']:,.0f} | {mean['gradient_steps']:,.0f} | "
                     f"{mean['seconds'] / 60:.1f} |")
    return lines


def success(runs, when="after"):
    return {seed: run["summary"][when]["success"] for seed, run in runs.items()}


def difference(name, one, other):
    """The row of a table: `one` minus `other`, {seed: success} each, paired over the seeds that both have; none without such seeds."""
    shared = sorted(set(one) & set(other))
    if not shared:
        return []
    mean, se = mean_se([one[seed] - other[seed] for seed in shared])
    told = "one seed" if math.isnan(se) else "yes" if abs(mean) > 2 * se else "no"
    return [f"| {name} | {len(shared)} | {number(mean, se, signed=True)} | {told} |"]


def difference_table(arms):
    """The method minus each other arm, and minus its own base; then other pairs of arms."""
    mine, main = next(((label(name), runs) for name, runs in arms.items() if label(name) in MAIN), (None, None))
    rows = difference("its base", success(main), success(main, "before")) if main else []
    rows += [row for name, runs in arms.items() if main and runs is not main for row in difference(name, success(main), success(runs))]
    lines = [f"| {mine} minus | seeds | difference | beyond 2 standard errors |", "|---|---|---|---|", *rows] if rows else []
    known = {label(name): success(runs) for name, runs in arms.items()}
    rows = [row for one, other in CLAIMS for row in difference(f"{one} minus {other}", known.get(one, {}), known.get(other, {}))]
    head = ["", "| other pairs of arms | seeds | difference | beyond 2 standard errors |", "|---|---|---|---|"]
    return lines + (head + rows if rows else [])


def rating_table(arms):
    """Of the arms that rate themselves: whether ratings tell success from failure, and what they say; means over seeds, on `test`."""
    rows = []
    for name, runs in arms.items():
        ends = [run["summary"].get("watched", {}) for run in runs.values()]
        before, after = ([end.get(when, {}).get("test", {}) for end in ends] for when in ("before", "after"))
        if not any("label_positive" in numbers for numbers in after):
            continue

        def cell(numbers, key):
            values = [x[key] for x in numbers if x.get(key) is not None]
            return number(*mean_se(values)) if values else "-"

        rows.append("| " + " | ".join([name, cell(before, "label_outcome_correlation"), cell(after, "label_outcome_correlation"), *(
            cell(after, key) for key in ("label_positive", "label_negative", "label_malformed")), cell(before, "looping"),
            cell(after, "looping")]) + " |")
    return ["", "| arm | correlation of ratings with success, before | after | positive, after | negative | malformed | looping, before | "
            "after |", "|---|---|---|---|---|---|---|---|", *rows] if rows else []


def stage_table(arms):
    """Of ACT's pipelines: what their last model does on held-out states of the expert; means over seeds."""
    keys = "next_action", "choice", "choice_first", "choice_second"
    rows = []
    for name, runs in arms.items():
        last = [run["summary"]["stages"][-1] for run in runs.values() if run["summary"].get("stages")]
        if last:
            rows.append("| " + " | ".join([name, *(number(*mean_se([x[key] for x in last if x[key] is not None] or [math.nan]))
                                                   for key in keys)]) + " |")
    return ["", "| arm, after its last stage | the expert's action | the right one of two | if shown first | if shown second |",
            "|---|---|---|---|---|", *rows] if rows else []


def rationale_table(arms):
    """What docs/rationale.py found: how often the right action is chosen, with the thought, without it, behind a wrong one."""
    rows = []
    for name, runs in arms.items():
        found = [run["rationale"] for run in runs.values() if run.get("rationale")]
        if found:
            rows.append("| " + " | ".join([name, found[0]["stage"], *(number(*mean_se([x[key] for x in found]))
                                                                      for key in ("free", "removed", "wrong"))]) + " |")
    return ["", "| arm | stage | right one of two, free thought | no thought | the thought of another state |", "|---|---|---|---|---|",
            *rows] if rows else []


def attempt_table(arms):
    """Of Reagent's runs: what the attempts of the last third of the updates were like; means over seeds."""
    keys = "success", "second_success", "reward_model", "judge_auc", "leaks", "repeated_calls", "second_repeated_calls"
    rows = []

    def cell(last, key):
        values = [[m[key] for m in steps if m.get(key) is not None] for steps in last]
        means = [sum(v) / len(v) for v in values if v]
        return number(*mean_se(means)) if means else "-"

    for name, runs in arms.items():
        learnt = [[m for m in run["metrics"] if m.get("phase") == "learn"] for run in runs.values()]
        last = [steps[-max(1, len(steps) // 3):] for steps in learnt if steps]
        if last:
            rows.append("| " + " | ".join([name, *(cell(last, key) for key in keys)]) + " |")
    return ["", "| arm, last third of training | first attempts won | second attempts won | judge's score | its AUC for success | "
            "critiques that name the answer | repeated calls, first | second |", "|---|---|---|---|---|---|---|---|", *rows] if rows else []


def second_attempt_table(arms):
    """What docs/second_attempts.py found: how often second attempts win, by what they are told; means over seeds."""
    rows = []
    for name, runs in arms.items():
        found = [run["second_attempts"] for run in runs.values() if run.get("second_attempts")]
        for way in found[0] if found else ():
            cells = [number(*mean_se([x[way][part]["success"] for x in found])) if part in found[0][way] else "-"
                     for part in ("all", "lost", "won")]
            if "minus_nothing" in found[0][way]:
                cells.append(number(*mean_se([x[way]["minus_nothing"]["difference"] for x in found]), signed=True))
            rows.append("| " + " | ".join([f"{name}, {way}", str(len(found)), *cells, *["-"] * (4 - len(cells))]) + " |")
    return ["", "| arm after training, attempt | seeds | won | where the first was lost | where it was won | minus `nothing`, paired |",
            "|---|---|---|---|---|---|", *rows] if rows else []


def judge_table(arms):
    """Of judges trained in a run: their quality on trajectories of the test split, of players and of the agent; means over seeds."""
    rows = []
    for name, runs in arms.items():
        judges = [run["summary"]["judge"] for run in runs.values() if "judge-sft" in (run["summary"].get("judge") or {})]
        for when, who in itertools.product(("before", "judge-sft", "judge-grpo"), ("players", "agent")):
            seen = [judge[when][who] for judge in judges if who in judge.get(when, ())]
            if seen:
                rows.append("| " + " | ".join([f"{name}, {when}, on {who}", *(
                    number(*mean_se([x[key] for x in seen if x[key] is not None] or [math.nan]))
                    for key in ("parsed", "auc_outcome", "auc_process", "error"))]) + " |")
    return ["", "| judge | readable | AUC of its score for success | for a process without flaws | distance to the reference score |",
            "|---|---|---|---|---|", *rows] if rows else []


def tables(arms):
    """{method: markdown}: for each of its worlds the two tables, and what only one method has."""
    blocks = defaultdict(list)
    for (method, env), chosen in by_table(arms).items():
        s = [run["summary"] for runs in chosen.values() for run in runs.values()]
        ends = "; ".join(f"{who} {s[0][who]['success']:.3f}" for who in ("random", "expert"))
        episodes = "/".join(map(str, sorted({x["eval_episodes"] for x in s})))
        devices = ", ".join(sorted({str(x["device"]) for x in s}))
        blocks[method] += [
            f"**{env}** (success on {episodes} test episodes per run; mean ± standard error over seeds; {ends} player; {devices})", "",
            *result_table(chosen), "", *difference_table(chosen), *rating_table(chosen), *stage_table(chosen), *rationale_table(chosen),
            *attempt_table(chosen), *second_attempt_table(chosen), *judge_table(chosen), ""]
    return {method: "\n".join(lines).strip() for method, lines in blocks.items()}


def curve(runs):
    """(environment steps, mean success, standard error) over seeds, each seed's evaluations interpolated linearly."""
    lines = []
    for run in runs.values():
        points = [(0, run["summary"]["before"]["success"])]
        points += [(m["env_steps"], m["eval_success"]) for m in run["metrics"] if m.get("eval_success") is not None]
        if len(points) > 1:
            lines.append(points)
    if not lines:
        return []
    end = min(points[-1][0] for points in lines)
    grid = sorted({x for points in lines for x, _ in points if x <= end})
    return [(x, *mean_se([at(points, x) for points in lines])) for x in grid]


def at(points, x):
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / ((x1 - x0) or 1)
    return points[-1][1]


def draw(arms, path):
    """Test success against environment steps, a panel per table that has curves."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: it needs matplotlib (pip install -r requirements-dev.txt)", file=sys.stderr)
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    worlds = {}
    for title, chosen in by_table(arms).items():
        if shown := {label(name): runs for name, runs in chosen.items() if label(name) in CURVES and curve(runs)}:
            worlds[", ".join(title)] = shown
    figure, panels = plt.subplots(-(-len(worlds) // 2) or 1, 2, figsize=(12.8, 4.4 * (-(-len(worlds) // 2) or 1)), squeeze=False)
    for panel in panels.flat[len(worlds):]:
        panel.axis("off")
    for panel, (env, shown) in zip(panels.flat, worlds.items()):
        for i, name in enumerate(CURVES):  # a colour belongs to an arm, whichever others are there
            points = curve(shown.get(name, {}))
            if points:
                x, y, se = zip(*points)
                panel.plot(x, y, color=f"C{i}", label=f"{name} ({len(shown[name])})", linewidth=2.2 if name in MAIN else 1.3)
                wide = [0 if math.isnan(e) else e for e in se]
                low, high = [a - e for a, e in zip(y, wide)], [a + e for a, e in zip(y, wide)]
                panel.fill_between(x, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        s = [run["summary"] for runs in shown.values() for run in runs.values()]
        for height, text, style in ((sum(x["expert"]["success"] for x in s) / len(s), "expert", "--"),
                                    (sum(x["before"]["success"] for x in s) / len(s), "base", ":")):
            panel.axhline(height, color="grey", linestyle=style, linewidth=1, label=text)
        panel.set(title=env, xlabel="environment steps", ylabel="success on test episodes", ylim=(-0.02, 1.05))
        panel.legend(fontsize=8)
    figure.suptitle("mean over seeds (their number in brackets), band: standard error", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return True


def keep(source, results, lines=60):
    """Copies finished runs: summary.json, args.json, what docs/rationale.py, docs/judge.py and docs/second_attempts.py found, and of
    metrics.jsonl the evaluations and about `lines` more. Nothing else."""
    kept = []
    for path in sorted(Path(source).glob("*/summary.json")):
        target = Path(results, path.parent.name)
        names = "summary.json", "args.json", "rationale.json", "judge.json", "second_attempts.json"
        texts = {name: path.with_name(name).read_text(encoding="utf-8") for name in names if path.with_name(name).exists()}
        metrics = read_jsonl(path.with_name("metrics.jsonl"))
        every = max(1, len(metrics) // lines)
        thinned = [m for i, m in enumerate(metrics) if i % every == 0 or m.get("eval_success") is not None]
        texts["metrics.jsonl"] = "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in thinned)
        target.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (target / name).write_text(text, encoding="utf-8")
        kept.append(target)
    return kept


def best(arms, prefix):
    """Learning rate and entropy bonus, as flags, of the arm with the highest mean success among those whose name begins so, or None."""
    found = {name: mean_se(run["summary"]["after"]["success"] for run in runs.values())[0] for name, runs in arms.items()
             if name.startswith(prefix)}
    if not found:
        return None
    args = next(iter(arms[max(found, key=found.get)].values()))["args"]
    return " ".join(f"--{key.replace('_', '-')} {args[key]}" for key in ("lr", "entropy_coef") if key in args)


def write_between_marks(path, texts):
    page = Path(path).read_text(encoding="utf-8")
    for method, text in texts.items():
        place = rf"(<!-- results: {method} -->\n)(?:(?!<!-- results).)*?(<!-- /results -->)"
        page, places = re.subn(place, lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page, flags=re.DOTALL)
        if places != 1:
            refuse(f"{path} needs one <!-- results: {method} --> and, behind it, one <!-- /results -->")
    Path(path).write_text(page, encoding="utf-8")


def refuse(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        refuse(" ".join(message.split()))


def main(argv=None):
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--results", default=str(HERE / "results"), help="where the kept runs are")
    parser.add_argument("--figure", default=str(HERE / "learning_curves.png"), help="where the figure goes")
    parser.add_argument("--write", default="", metavar="FILE", help="a markdown file with these marks")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("keep").add_argument("runs", help="directory that holds the runs")
    commands.add_parser("best").add_argument("prefix", help="beginning of the arms' names")
    commands.add_parser("tokens").add_argument("run", help="NAME-sSEED")
    args = parser.parse_args(argv)
    if args.command == "keep":
        kept = keep(args.runs, args.results)
        return print(f"{len(kept)} finished runs kept in {args.results}")
    arms = read_runs(args.results)
    if args.command == "tokens":
        name, _, seed = args.run.rpartition("-s")
        run = arms.get(name, {}).get(int(seed) if seed.isdigit() else None)
        return print(run["summary"]["generated_tokens"]) if run else refuse(f"no finished run {args.run} in {args.results}")
    if args.command == "best":
        flags = best(arms, args.prefix)
        return print(flags) if flags is not None else refuse(f"no finished run in {args.results} begins with {args.prefix}")
    if not arms:
        refuse(f"no finished run in {args.results}: see docs/experiments.sh")
    texts = tables(arms)
    print("\n\n".join(f"{method}\n{text}" for method, text in texts.items()))
    if args.write:
        write_between_marks(args.write, texts)
    draw(arms, args.figure)


if __name__ == "__main__":
    main()
