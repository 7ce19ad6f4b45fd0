"""docs/report.py on made-up runs; the kept results; docs/experiments.sh, which names them."""

import csv
import dataclasses
import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import lines

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import report  # noqa: E402


def made_up(folder, name, seed, after, env="repair", lr=1e-3, **more):
    """A finished run in folder/NAME-sSEED, which it returns."""
    out = folder / f"{name}-s{seed}"
    out.mkdir(parents=True)
    ends = {"before": 0.1, "after": after, "random": 0.125, "expert": 1.0}
    summary = {who: {"success": value, "se": 0.0} for who, value in ends.items()}
    summary |= {"script": "nlac", "method": name, "arm": "none", "env": env, "model": "tiny"}
    summary |= {"seed": seed, "split": "test", "eval_episodes": 500, "env_steps": 20000}
    summary |= {"generated_tokens": 3000000, "gradient_steps": 600, "seconds": 300.0}
    summary |= {"device": "cpu", "git_commit": "c0ffee"}
    write(out / "summary.json", summary | more)
    settings = {"script": "nlac", "args": {"lr": lr}, "git_commit": "c0ffee", "start": "abc"}
    write(out / "args.json", settings)
    metrics = []
    for step in range(1, 201):
        line = {"step": step, "env_steps": 100 * step, "tokens": 7 * step, "loss": step / 200}
        if step % 25 == 0:
            line |= {"eval_success": after * step / 200, "eval_se": 0.01}
        metrics.append(line)
    write(out / "metrics.jsonl", *metrics)
    write(out / "rollouts.jsonl", {})
    return out


def write(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def add(folder, *arguments):
    report.main(["--results", str(folder), "add", *map(str, arguments)])


def refused(capsys, *arguments):
    """What report says when it refuses: one line, exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        report.main([str(argument) for argument in arguments])
    out, error = capsys.readouterr()
    assert end.value.code == 2 and not out and re.fullmatch(r"error: [^\n]+\n", error)
    return error


@pytest.fixture
def kept(tmp_path):
    """A folder with a few runs and, of those that are finished, the two files."""
    folder = tmp_path / "kept"
    runs = [made_up(folder, "ceiling", 0, 0.95, simulation_steps=123456)]
    runs.append(made_up(folder, "20q-nlac", 0, 0.5, env="20q"))
    for seed, (ours, blind) in enumerate([(0.8, 0.1), (0.9, 0.1), (0.7, 0.2)]):
        runs.append(made_up(folder, "nlac", seed, ours))
        runs.append(made_up(folder, "blind-critic", seed, blind))
    for run in runs:
        add(folder, run)
    (folder / "ppo-s0").mkdir()  # unfinished
    return folder


# ------------------------------------------------------------------------------------- the tables


def test_tables(kept):
    text = report.tables(report.read_runs(kept))["NLAC"]
    after = "0.100 ± 0.000 | **0.800 ± 0.058** | 80%"
    assert f"| nlac | 3 | {after} | 20,000 | 3,000,000 | 600 | 5.0 |" in text
    assert "20,000 + 123,456 simulated" in text
    assert "| its base | 3 | +0.700 ± 0.058 | yes |" in text
    assert "| blind-critic | 3 | +0.667 ± 0.088 | yes |" in text
    assert "| ceiling | 1 | -0.150 | one seed |" in text
    assert text.index("**repair, design 2**") < text.index("**20q, design 2**")
    assert "ppo" not in text and "ood" not in text
    assert {row.count("|") for row in text.split("\n\n")[1].splitlines()} == {10}


def test_designs_are_kept_apart(kept):
    old = made_up(kept.parent / "old", "nlac", 0, 0.3)
    report.add(old, kept, design=1)
    lines_before = lines(kept / "results.jsonl")
    assert [line["design"] for line in lines_before if line["name"] == "nlac-s0"] == [2, 1]
    text = report.tables(report.read_runs(kept))["NLAC"]
    new, old = text.split("**repair, design 1**")
    assert "| nlac | 3 |" in new and "**0.800 ± 0.058**" in new and "| blind-critic |" in new
    assert "| nlac | 1 | 0.100 | **0.300** |" in old and "blind-critic" not in old
    assert len(report.read_runs(kept)[-1]["curve"]) == 8  # its own


def test_one_design_alone(kept, tmp_path, capsys):
    report.add(made_up(tmp_path / "old", "nlac", 0, 0.3), kept, design=1)
    arguments = ["--results", kept, "--figure", tmp_path / "x.png", "--design"]
    capsys.readouterr()
    report.main([str(argument) for argument in (*arguments, 1)])
    out = capsys.readouterr().out
    assert "**0.300**" in out and "design 2" not in out
    assert "no run" in refused(capsys, *arguments, 3)


def test_tables_of_one_method(tmp_path):
    kept, runs = tmp_path / "kept", []
    for seed in 0, 1:
        runs.append(made_up(tmp_path, "act-act,il", seed, 0.5, env="household"))
        thoughts = {"stage": "1-act", "free": 0.7 + 0.1 * seed, "removed": 0.5, "wrong": 0.4}
        thoughts |= {"next_action": 0.5 + 0.2 * seed, "choice_first": 0.7, "choice_second": None}
        write(runs[-1] / "rationale.json", thoughts)
        runs.append(made_up(tmp_path, "act-il,il", seed, 0.4 + 0.1 * seed, env="household"))
        numbers = {"parsed": 1.0, "auc_outcome": 0.8, "auc_process": 0.9 - 0.1 * seed}
        numbers["error"] = None
        judge = {"before": {"agent": numbers}, "judge-sft": {"players": numbers}}
        runs.append(made_up(tmp_path, "reagent-U", seed, 0.6, env="search", judge=judge))
    runs.append(made_up(tmp_path, "other-base-reagent-U", 0, 0.9, env="search"))
    runs.append(made_up(tmp_path, "other-base-reagent-R", 0, 0.7, env="search"))

    judged = {"all": {"success": 0.6}, "lost": {"success": 0.2}, "won": {"success": 1.0}}
    judged["minus_nothing"] = {"difference": 0.1}
    second = {"first": {"all": {"success": 0.5}}, "judge": judged}
    write(tmp_path / "reagent-U-s1" / "second_attempts.json", second)
    attempts = [{"phase": "judge-sft", "success": 9.0}]
    for n in range(1, 10):
        attempt = {"phase": "learn", "success": n / 10, "second_success": 0.5}
        attempts.append(attempt | {"leaks": None if n < 9 else 0.1})
    write(tmp_path / "reagent-U-s0" / "metrics.jsonl", *attempts)

    for run in runs:
        add(kept, run)
    texts = report.tables(report.read_runs(kept))
    assert list(texts) == ["ACT", "Reagent", "Reagent, another base"]
    assert "reagent" not in texts["ACT"]
    other = texts.pop("Reagent, another base")  # neither averaged nor paired with the rest
    assert "| other-base-reagent-U | 1 | 0.100 | **0.900** |" in other
    assert "| other-base-reagent-R | 1 | +0.200 | one seed |" in other
    text = "\n".join(texts.values())
    assert "| act-act,il | 1-act | 0.600 ± 0.100 | 0.750 ± 0.050 | 0.700 ± 0.000 | - |" in text
    assert "| act-act,il | 1-act | 0.750 ± 0.050 | 0.500 ± 0.000 | 0.400 ± 0.000 |" in text
    assert "| act-il,il | 2 | +0.050 ± 0.050 | no |" in text
    assert "| reagent-U | 0.800 | 0.500 | - | - | 0.100 | - | - |" in text
    assert "| reagent-U, first | 1 | 0.500 | - | - | - |" in text
    assert "| reagent-U, judge | 1 | 0.600 | 0.200 | 1.000 | +0.100 |" in text
    for row in "judge-sft, on players", "before, on agent":
        assert f"| reagent-U, {row} | 1.000 ± 0.000 | 0.800 ± 0.000 | 0.850 ± 0.050 | - |" in text
    assert "judge-grpo" not in text and "before, on players" not in text


def test_numbers_by_hand():
    mean, se = report.mean_se([0.7, 0.8, 0.5])
    variance = ((1 / 30) ** 2 + (2 / 15) ** 2 + (1 / 6) ** 2) / 2
    assert mean == pytest.approx(2 / 3) and se == pytest.approx(math.sqrt(variance / 3))
    assert math.isnan(report.mean_se([1.0])[1])
    assert report.cell([0.5, None]) == "0.500" and report.cell([None]) == "-"
    assert report.cell([0.25, 0.75], signed=True) == "+0.500 ± 0.250"

    runs = {}
    for seed, points in enumerate([[(10, 0.2), (20, 0.4)], [(20, 0.8), (40, 1.0)]]):
        curve = [{"env_steps": str(x), "success": str(y)} for x, y in points]
        summary = {"before": {"success": 0.0}, "after": {"success": 0.6}, "env_steps": 30}
        runs[seed] = {"summary": summary, "curve": curve}
    means = [(x, round(y, 6)) for x, y, _ in report.curve(runs)]
    assert means == [(0, 0.0), (10, 0.3), (20, 0.6), (30, 0.75)]


def test_the_last_third_is_of_the_last_phase():
    steps = [{"phase": "one", "loss": 100.0}] * 50
    for n in range(1, 7):
        steps.append({"phase": "two", "step": n, "loss": n, "kl": None, "eval_success": 0.5})
    steps[-1] |= {"kl": 0.5, "stage": "x", "tokens": 9, "won": math.nan}
    assert report.last_third(steps) == {"phase": "two", "lines": 2, "loss": 5.5, "kl": 0.5}
    assert report.last_third(steps[:1]) == {"phase": "one", "lines": 1, "loss": 100.0}
    assert report.last_third([{"loss": 1}, {"loss": 3}])["phase"] is None
    assert report.last_third([]) == {}


# -------------------------------------------------------------------------- the page, the figure


def test_it_writes_between_the_marks_and_draws(kept, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    page, figure = tmp_path / "README.md", tmp_path / "curves.png"
    other = "<!-- results: Reagent -->\nnot of these runs\n<!-- /results -->\n"
    start = f"head\n{other}<!-- results: NLAC -->\n"
    page.write_text(f"{start}old\n<!-- /results -->\ntail\n")
    arguments = ["--results", kept, "--figure", figure, "--write", page]
    for _ in range(2):  # writing again changes nothing
        report.main([str(argument) for argument in arguments])
        text = page.read_text()
        assert text.startswith(f"{start}**repair, design 2**") and "old" not in text
        assert text.endswith("|\n<!-- /results -->\ntail\n")
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page.write_text("no marks")
    assert "<!-- results: NLAC -->" in refused_after_tables(capsys, arguments)
    assert page.read_text() == "no marks"


def refused_after_tables(capsys, arguments):
    """The tables come first, then the refusal."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        report.main([str(argument) for argument in arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_without_matplotlib_or_results(kept, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    figure = tmp_path / "x.png"
    report.main(["--results", str(kept), "--figure", str(figure)])
    assert "pip install" in capsys.readouterr().err and not figure.exists()
    assert "no run is kept" in refused(capsys, "--results", tmp_path / "nothing")
    (kept / "results.jsonl").write_text('{"name": \n')
    assert "line 1" in refused(capsys, "--results", kept)


# ------------------------------------------------------------------------------ what add keeps


def test_add_keeps_a_line_and_a_curve(tmp_path, capsys):
    kept, run = tmp_path / "kept", made_up(tmp_path, "nlac", 3, 0.123456789)
    write(run / "judge.json", {"auc": 0.123456789, "error": math.nan})
    add(kept, run)
    assert "nlac-s3" in capsys.readouterr().out
    assert {path.name for path in kept.iterdir()} == {"results.jsonl", "curves.csv"}
    [line] = lines(kept / "results.jsonl")
    summary = line.pop("summary")
    third = {"phase": None, "lines": 66, "loss": pytest.approx(167.5 / 200)}
    assert line == {
        "design": 2, "name": "nlac-s3", "script": "nlac", "method": "nlac", "arm": "none",
        "env": "repair", "model": "tiny", "seed": 3, "device": "cpu", "n": 500, "commit": "c0ffee",
        "args": {"lr": 0.001}, "setup": {"start": "abc"}, "last_third": third,
        "probes": {"judge": {"auc": 0.123457, "error": None}},
    }  # fmt: skip
    assert summary["after"] == {"success": 0.123457, "se": 0.0} and summary["env_steps"] == 20000
    assert "git_commit" not in summary
    told = (kept / "results.jsonl").read_text()
    assert told.startswith('{"design":2,"name":"nlac-s3",')  # what docs/experiments.sh may look for

    rows = list(csv.reader((kept / "curves.csv").open(newline="")))
    assert rows[0] == list(report.COLUMNS) and len(rows) == 9
    assert rows[1] == ["2", "nlac-s3", "25", "2500", "175", "0.0154321", "0.01"]
    [read] = report.read_runs(kept)
    assert [row["step"] for row in read["curve"]] == [str(n) for n in range(25, 201, 25)]


def test_add_replaces_by_name_and_leaves_the_rest(kept, tmp_path):
    before = (kept / "results.jsonl").read_text().splitlines()
    rows = (kept / "curves.csv").read_text().splitlines()
    again = made_up(tmp_path, "search-again", 1, 0.4)
    add(kept, again, "--name", "nlac-s1")
    after = (kept / "results.jsonl").read_text().splitlines()
    assert set(after[:-1]) < set(before) and len(after) == len(before)
    assert json.loads(after[-1])["summary"]["after"]["success"] == 0.4
    new = (kept / "curves.csv").read_text().splitlines()
    assert len(new) == len(rows) and len(set(rows) - set(new)) == 8
    add(kept, again, "--name", "nlac-s1")  # once more changes nothing
    assert (kept / "results.jsonl").read_text().splitlines() == after
    add(kept, again)
    assert len(lines(kept / "results.jsonl")) == len(before) + 1


def test_the_commit_is_that_of_the_start(tmp_path):
    run = made_up(tmp_path, "nlac", 0, 0.1)
    broken(run / "summary.json", lambda summary: summary | {"git_commit": "later"})
    add(tmp_path / "kept", run)
    [line] = lines(tmp_path / "kept" / "results.jsonl")
    assert line["commit"] == "c0ffee" and line["summary"]["git_commit"] == "later"


def test_add_of_a_run_that_trained_nothing(tmp_path):
    run = made_up(tmp_path, "untrained", 0, 0.1)
    (run / "metrics.jsonl").unlink()
    add(tmp_path / "kept", run)
    [read] = report.read_runs(tmp_path / "kept")
    assert read["last_third"] == {} and read["curve"] == []
    assert "untrained" in report.tables([read])["NLAC"]


def broken(path, change):
    write(path, change(json.loads(path.read_text())))


@pytest.mark.parametrize("damage, words", [
    (lambda run: (run / "summary.json").unlink(), "no finished run"),
    (lambda run: (run / "summary.json").write_text("{"), "cannot be read"),
    (lambda run: (run / "args.json").unlink(), "args.json"),
    (lambda run: (run / "metrics.jsonl").write_text("{"), "cannot be read"),
    (lambda run: (run / "judge.json").write_text("{"), "cannot be read"),
    (lambda run: broken(run / "summary.json", lambda summary: {"seed": 1}), "script"),
    (lambda run: broken(run / "summary.json", lambda s: s | {"after": None}), "cannot be read"),
    (lambda run: broken(run / "summary.json", lambda s: s | {"seconds": math.nan}), "seconds"),
    (lambda run: broken(run / "summary.json", lambda s: s | {"seed": 5}), "--name"),
])  # fmt: skip
def test_add_refuses_in_one_line_and_changes_nothing(kept, tmp_path, capsys, damage, words):
    run = made_up(tmp_path, "nlac", 1, 0.4)
    damage(run)
    names = "results.jsonl", "curves.csv"
    before = [(kept / name).read_text() for name in names]
    assert words in refused(capsys, "--results", kept, "add", run)
    assert [(kept / name).read_text() for name in names] == before
    assert words in refused(capsys, "--results", tmp_path / "new", "add", run)
    assert not (tmp_path / "new").exists()


def test_a_name_ends_in_the_seed(kept, tmp_path, capsys):
    run = made_up(tmp_path, "nlac", 1, 0.4)
    for name in "nlac", "nlac-s2", "two words-s1", "-s1":
        assert "--name" in refused(capsys, "--results", kept, "add", run, f"--name={name}")


def test_a_write_that_fails_leaves_the_old_files(kept, tmp_path, monkeypatch):
    before = {path: path.read_text() for path in kept.glob("*.*") if path.is_file()}

    def full(*given):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        add(kept, made_up(tmp_path, "nlac", 1, 0.4))
    assert all(path.read_text() == text for path, text in before.items())


def test_runs_that_end_together_are_all_kept(tmp_path):
    command = [sys.executable, ROOT / "docs" / "report.py", "--results", tmp_path / "kept", "add"]
    runs = [made_up(tmp_path, "nlac", seed, 0.4) for seed in range(6)]
    together = [subprocess.Popen([*command, run], stdout=subprocess.DEVNULL) for run in runs]
    assert [process.wait(timeout=60) for process in together] == [0] * 6
    found = report.read_runs(tmp_path / "kept")
    assert {run["seed"] for run in found} == set(range(6))
    assert all(len(run["curve"]) == 8 for run in found)


def test_best_and_tokens(tmp_path, capsys):
    kept = tmp_path / "kept"
    arms = ("ppo-lr1e-4", 100, 0.3, 1e-4), ("ppo-lr3e-4", 100, 0.6, 3e-4), ("ppo", 0, 0.9, 1.0)
    for name, seed, after, lr in arms:
        add(kept, made_up(tmp_path, name, seed, after, lr=lr))
    older = made_up(tmp_path / "old", "ppo-lr1e-2", 100, 0.99, lr=1e-2)
    report.add(older, kept, design=1)
    capsys.readouterr()
    report.main(["--results", str(kept), "best", "ppo-lr"])
    assert capsys.readouterr().out == "--lr 0.0003\n"  # of the newest design
    report.main(["--results", str(kept), "tokens", "ppo-lr1e-2-s100"])
    assert capsys.readouterr().out == "3000000\n"
    assert "begins with x" in refused(capsys, "--results", kept, "best", "x")
    assert "no run ppo-s1" in refused(capsys, "--results", kept, "tokens", "ppo-s1")
    refused(capsys, "--results", kept, "keep", "runs")


# ----------------------------------------------------------------------- the results themselves


@pytest.fixture(scope="module")
def results():
    return report.read_runs(ROOT / "docs")


def test_the_kept_files_are_small_and_whole(results):
    def refuse_constant(name):
        raise AssertionError(name)

    paths = ROOT / "docs" / "results.jsonl", ROOT / "docs" / "curves.csv"
    assert sum(path.stat().st_size for path in paths) <= 1_200_000
    for line in paths[0].read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=refuse_constant)  # no nan, no infinity
    assert not list(paths[0].parent.glob("*.tmp"))
    names = [(run["design"], run["name"]) for run in results]
    assert len(set(names)) == len(names)
    assert sum(design == 1 for design, _ in names) == 218
    rows = report.read_curves(ROOT / "docs")
    assert {(int(row["design"]), row["run"]) for row in rows} <= set(names)
    for row in rows:
        assert 0 <= float(row["success"]) <= 1 and 0 <= float(row["se"]) <= 0.5
        assert int(row["step"]) > 0 and int(row["env_steps"]) >= 0 and int(row["tokens"]) >= 0
    places = [(row["design"], row["run"], row["step"]) for row in rows]
    assert len(set(places)) == len(places)


def test_every_kept_run_says_what_it_is(results):
    for run in results:
        name, args, summary = run["name"], run["args"], run["summary"]
        assert re.fullmatch(rf"\S+-s{run['seed']}", name) and run["design"] in (1, 2), name
        assert run["n"] > 0 and re.fullmatch(r"[0-9a-f]{40}(-dirty)?", run["commit"]), name
        for key in *report.TOLD, "args", "summary", "last_third", "probes", "setup":
            assert run[key] is not None, (name, key)
        assert args["seed"] == run["seed"] and args["eval_episodes"] == run["n"], name
        assert args["env"] == run["env"] and args["model"] == run["model"], name
        for end in report.ENDS:
            assert 0 <= summary[end]["success"] <= 1 and summary[end]["se"] >= 0, (name, end)


@pytest.mark.parametrize("page", ["README.md", "docs/design1.md"])
def test_pages_say_what_the_results_say(results, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    told = "\n".join(report.tables(results).values())
    rows = set(told.splitlines())
    blocks = re.findall(r"<!-- results: [^>]+ -->\n(.*?)<!-- /results -->", text, re.DOTALL)
    shown = [row for block in blocks for row in block.splitlines() if row.startswith("|")]
    assert not [row for row in shown if row not in rows]  # `report.py --write PAGE` mends it
    for line in text.splitlines():
        if line.startswith("|"):
            for number in re.findall(r"[+-]?\d\.\d{3} ± \d\.\d{3}", line):
                assert number in told, line


def test_every_method_has_its_table_and_every_drawn_arm_its_curve(results):
    methods = {method for method, _, _ in report.by_table(results)}
    assert methods == {"NLAC", *report.METHODS.values()}
    for arm in itertools.chain(*report.FIGURE.values()):
        runs = {run["seed"]: run for run in results if run["design"] == 2 and report.arm_of(run) == arm}
        assert report.curve(runs), arm
    for name, count in ("judge", 5), ("rationale", 5), ("second_attempts", 2):
        assert sum(name in run["probes"] for run in results if run["design"] == 1) == count
    assert (ROOT / "docs" / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------- experiments.sh


@pytest.fixture
def dry(kept):
    """dry("PATTERN") -> what docs/experiments.sh would run, a line each, and what it says."""
    for lr, after in (1e-4, 0.4), (3e-3, 0.2):
        add(kept, made_up(kept, f"ppo-search-lr{lr:g}", 100, after, lr=lr))
    where = {"RESULTS": str(kept), "KEPT": str(kept)}
    environment = os.environ | where | {"DRY": "1", "PYTHON": sys.executable}

    def run(*pattern):
        command = ["bash", str(ROOT / "docs" / "experiments.sh"), *pattern]
        options = {"capture_output": True, "text": True, "timeout": 60, "env": environment}
        done = subprocess.run(command, **options)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("==")], done.stderr

    return run


def test_experiments_names_every_run_once_and_skips_what_is_finished(dry, kept):
    told, errors = dry()
    outs = [line.split()[-1] for line in told]
    assert len(set(outs)) == len(outs) > 60 and "ppo-s0 is unfinished" in errors
    names = {Path(out).name for out in outs}
    assert {"nlac-s3", "nlac-s4", "frozen-critic-s2", "ppo-s1", "m2-s0", "no-ema-s0"} <= names
    assert {"self-distillation-s2", "ceiling-s2"} <= names
    assert "nlac-s0" not in names and "ppo-s0" not in names  # finished, unfinished
    [nlql] = [line for line in told if line.endswith("/nlql-s1")]
    assert nlql.split()[2:] == [
        "docs/nlql.py", "--match", f"{kept}/nlac-s1", "--seed", "1", "--out-dir", f"{kept}/nlql-s1"
    ]  # fmt: skip
    [ppo] = [line for line in told if line.endswith("/ppo-s1")]
    assert ppo.split()[2:5] == ["docs/ppo.py", "--lr", "0.0001"]
    outs = [line.split()[-1] for line in dry("^k1-")[0]]
    assert outs == [f"{kept}/k1-s{seed}" for seed in range(3)]


def test_every_command_of_experiments_can_be_parsed(dry):
    common = importlib.import_module("common")
    for line in dry()[0]:
        script, *flags = line.split()[2:]
        name = Path(script).stem.replace("early_experience", "act")  # it has the flags of act.py
        args = common.parse_args(importlib.import_module(name).Args, argv=flags)
        assert dataclasses.is_dataclass(args)
