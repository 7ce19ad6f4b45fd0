"""docs/report.py and the figure on made-up runs; the kept runs; docs/experiments.sh, which names them."""

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

import learning_curves  # noqa: E402
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
    args = {"lr": lr, "out_dir": f"/elsewhere/{out.name}", "rrm": str(folder / "x" / "rrm")}
    settings = {"script": "nlac", "args": args, "git_commit": "c0ffee", "start": "abc"}
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
    runs.append(made_up(folder, "20q-nlac", 0, 0.5, env="twenty_questions:listed"))
    for seed, (ours, blind) in enumerate([(0.8, 0.1), (0.9, 0.1), (0.7, 0.2)]):
        runs.append(made_up(folder, "nlac", seed, ours))
        runs.append(made_up(folder, "blind-critic", seed, blind))
    for run in runs:
        add(folder, run)
    (folder / "ppo-s0").mkdir()  # unfinished
    return folder


# ------------------------------------------------------------------------------------- the tables


def test_tables(kept):
    text = report.tables(report.read_runs(kept))
    after = "0.100 ± 0.000 | **0.800 ± 0.058**"
    assert f"| nlac | 3 | 500 | {after} | 20,000 | 3,000,000 | 600 | 5.0 |" in text
    assert "20,000 + 123,456 simulated" in text
    assert "| nlac: after minus before | 3 | +0.700 ± 0.058 | yes |" in text
    assert "| nlac minus blind-critic | 3 | +0.667 ± 0.088 | yes |" in text
    assert "| nlac minus ceiling | 1 | -0.150 | one seed |" in text
    assert text.startswith("## NLAC and its rivals\n\n### repair\n\nA random player wins 0.125, the expert 1.000; cpu.")
    assert text.index("### repair") < text.index("### twenty_questions:listed") and text.count("## ") == 3
    assert "ppo" not in text and "ood" not in text
    assert {row.count("|") for row in text.split("\n\n")[3].splitlines()} == {10}


def test_arms_are_compared_within_their_family(tmp_path):
    after = {"full": 0.5, "grpo": 0.4, "dose-full": 0.9, "dose-zero": 0.7, "dose-grpo": 0.6}
    for arm, success in after.items():
        add(tmp_path, made_up(tmp_path, f"self-guide-{arm}", 0, success, after_ood={"success": 0.3}))
    text = report.tables(report.read_runs(tmp_path))
    rows = [row for row in text.splitlines() if "minus" in row]
    assert [row.split(" | ")[0].removeprefix("| ").replace("self-guide-", "") for row in rows] == [
        "full: after minus before", "full minus grpo", "dose-full: after minus before",
        "dose-full minus dose-grpo", "dose-full minus dose-zero", "dose-zero minus dose-grpo"]  # fmt: skip
    assert "| ood after |" in text and "| **0.500** | 0.300 |" in text


def test_tables_of_one_method(tmp_path):
    kept, runs = tmp_path / "kept", []
    for seed in 0, 1:
        runs.append(made_up(tmp_path, "act-act,il", seed, 0.5, env="household"))
        thoughts = {"stage": "1-act", "free": 0.7 + 0.1 * seed, "removed": 0.5, "wrong": 0.4}
        thoughts |= {"next_action": 0.5 + 0.2 * seed, "choice_first": 0.7, "choice_second": None}
        write(runs[-1] / "rationale.json", thoughts)
        numbers = {"judge_readable": 1.0, "judge_auc": 0.8, "auc_process": 0.9 - 0.1 * seed}
        numbers["error"] = None
        judge = {"before": {"agent": numbers}, "judge-sft": {"players": numbers}}
        runs.append(made_up(tmp_path, "reagent-U", seed, 0.6, env="search", judge=judge))
        labels = {"label_outcome_correlation": 0.4 + 0.2 * seed, "label_positive": 0.5}
        labels |= {"label_negative": 0.25, "label_malformed": 0.0}
        watched = {"before": {"test": {}}, "after": {"test": labels}}
        runs.append(made_up(tmp_path, "self-guide-full", seed, 0.6, env="household", watched=watched))

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
    text = report.tables(report.read_runs(kept))
    methods = re.findall("^## (.*)$", text, re.M)
    assert methods == ["Self-Guide", "ACT", "Reagent"]
    assert "| self-guide-full | 2 | - | 0.500 ± 0.100 | 0.500 ± 0.000 | 0.250 ± 0.000 |" in text
    choices = "0.600 ± 0.100 | 0.750 ± 0.050 | 0.700 ± 0.000 | - | 0.500 ± 0.000 | 0.400 ± 0.000"
    assert f"| act-act,il, 1-act | 2 | {choices} |" in text
    assert "| reagent-U | 1 | 0.800 | 0.500 | - | - | 0.100 | - | - |" in text
    assert "| reagent-U, first | 1 | 0.500 | - | - | - |" in text
    assert "| reagent-U, judge | 1 | 0.600 | 0.200 | 1.000 | 0.100 |" in text
    for row in "judge-sft, on players", "before, on agent":
        told = "1.000 ± 0.000 | 0.800 ± 0.000 | 0.850 ± 0.050 | -"
        assert f"| reagent-U, {row} | 2 | {told} |" in text
    assert "judge-grpo" not in text and "before, on players" not in text


def test_numbers_by_hand():
    mean, se = report.mean_se([0.7, 0.8, 0.5])
    variance = ((1 / 30) ** 2 + (2 / 15) ** 2 + (1 / 6) ** 2) / 2
    assert mean == pytest.approx(2 / 3) and se == pytest.approx(math.sqrt(variance / 3))
    assert math.isnan(report.mean_se([1.0])[1])
    assert report.cell([0.5, None]) == "0.500" and report.cell([None]) == "-"
    assert report.number(0.5, 0.25, sign="+") == "+0.500 ± 0.250"

    runs = {}
    for seed, points in enumerate([[(10, 0.2), (20, 0.4)], [(20, 0.8), (40, 1.0)]]):
        curve = [{"env_steps": str(x), "success": str(y)} for x, y in points]
        summary = {"before": {"success": 0.0}, "after": {"success": 0.6}, "env_steps": 30}
        runs[seed] = {"summary": summary, "curve": curve}
    means = [(x, round(y, 6)) for x, y, _ in learning_curves.curve(runs)]
    assert means == [(0, 0.0), (10, 0.3), (20, 0.6), (30, 0.75), (40, 0.8)]


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


def test_it_writes_below_the_mark(kept, tmp_path, capsys):
    page = tmp_path / "results.md"
    page.write_text(f"by hand\n{report.MARK}old\n")
    for _ in range(2):  # writing again changes nothing
        report.main(["--results", str(kept), "--write", str(page)])
        told = report.tables(report.read_runs(kept))
        assert page.read_text() == f"by hand\n{report.MARK}\n{told}"
    report.main(["--results", str(kept)])
    assert capsys.readouterr().out == f"{told}\n"
    page.write_text("no mark")
    for path in page, tmp_path / "none.md":
        assert report.MARK.strip() in refused(capsys, "--results", kept, "--write", path)
    assert page.read_text() == "no mark" and not path.exists()


def test_refusals(kept, tmp_path, capsys):
    assert "no run is kept" in refused(capsys, "--results", tmp_path / "nothing")
    (kept / "results.jsonl").write_text('{"name": \n')
    assert "line 1" in refused(capsys, "--results", kept)
    for given in ["keep", "runs"], ["add"], ["--fast"]:
        refused(capsys, *given)


def test_the_figure(kept, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    learning_curves.draw(report.read_runs(kept), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["learning_curves.py", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit) as end:
        learning_curves.main()
    assert end.value.code == 2 and "pip install" in capsys.readouterr().err


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
        "args": {"lr": 0.001, "out_dir": "runs/nlac-s3", "rrm": "runs/x/rrm"}, "setup": {"start": "abc"}, "last_third": third,
        "probes": {"judge": {"auc": 0.123457, "error": None}},
    }  # fmt: skip
    assert summary["after"] == {"success": 0.123457, "se": 0.0} and summary["env_steps"] == 20000
    assert "git_commit" not in summary
    told = (kept / "results.jsonl").read_text()
    assert told.startswith('{"design":2,"name":"nlac-s3",')  # what docs/experiments.sh may look for

    rows = (kept / "curves.csv").read_text().splitlines()
    assert rows[0] == ",".join(report.COLUMNS) and len(rows) == 9
    assert rows[1] == "2,nlac-s3,25,2500,175,0.0154321,0.01"
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


def test_add_of_a_run_that_trained_nothing_and_ended_at_another_commit(tmp_path):
    run = made_up(tmp_path, "untrained", 0, 0.1)
    (run / "metrics.jsonl").unlink()
    broken(run / "summary.json", lambda summary: summary | {"git_commit": "later"})
    add(tmp_path / "kept", run)
    [read] = report.read_runs(tmp_path / "kept")
    assert read["last_third"] == {} and read["curve"] == [] and "| untrained | 1 |" in report.tables([read])
    assert read["commit"] == "c0ffee" and read["summary"]["git_commit"] == "later"  # that of the start counts


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
    names = [run["name"] for run in results]
    assert len(set(names)) == len(names)
    rows = report.read_curves(ROOT / "docs")
    assert {row["run"] for row in rows} <= set(names) and {row["design"] for row in rows} == {"2"}
    for row in rows:
        assert 0 <= float(row["success"]) <= 1 and 0 <= float(row["se"]) <= 0.5
        assert int(row["step"]) > 0 and int(row["env_steps"]) >= 0 and int(row["tokens"]) >= 0
    places = [(row["run"], row["step"]) for row in rows]
    assert len(set(places)) == len(places)
    for run in results:
        name, args, summary = run["name"], run["args"], run["summary"]
        assert re.fullmatch(rf"\S+-s{run['seed']}", name) and run["design"] == 2, name
        assert run["n"] > 0 and re.fullmatch(r"[0-9a-f]{40}(-dirty)?", run["commit"]), name
        for key in *report.TOLD, "args", "summary", "last_third", "probes", "setup":
            assert run[key] is not None, (name, key)
        for key, value in ("seed", run["seed"]), ("eval_episodes", run["n"]), ("env", run["env"]), ("model", run["model"]):
            assert args[key] == value, name
        for end in report.ENDS:
            assert 0 <= summary[end]["success"] <= 1 and summary[end]["se"] >= 0, (name, end)


def test_pages_say_what_the_results_say(results):
    told = report.tables(results)
    head, _, shown = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").partition(report.MARK)
    assert head and shown == f"\n{told}", "python docs/report.py --write docs/results.md mends it"
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            for number in re.findall(r"[+-]?\d\.\d{3} ± \d\.\d{3}", line):
                assert number in told, line


def test_every_drawn_arm_has_its_curve(results):
    for arm in itertools.chain(*learning_curves.PANELS.values()):
        runs = {run["seed"]: run for run in results if report.arm_of(run) == arm}
        assert learning_curves.curve(runs), arm
    assert (ROOT / "docs" / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------- experiments.sh


def dry(folder, results, *pattern):
    """What docs/experiments.sh would run, {NAME-sSEED: words}, and what it says besides."""
    where = {"RESULTS": str(results), "KEPT": str(folder), "DRY": "1", "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "docs" / "experiments.sh"), *pattern]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | where)
    assert done.returncode == 0, done.stderr
    told = [line.split()[2:] for line in done.stdout.splitlines() if line.startswith("==")]
    runs = {Path(words[-1]).name: words for words in told}
    assert len(runs) == len(told)  # each is named once
    return runs, done.stderr


def test_experiments_skips_what_is_finished(kept):
    thoughtful = made_up(kept, "act-act,il", 0, 0.5)
    made_up(kept, "act-act,il", 1, 0.5)
    (thoughtful / "rationale.json").write_text("{}")
    runs, errors = dry(kept, kept)
    assert len(runs) > 60 and "ppo-s0 is unfinished" in errors
    assert "act-act,il-s0" not in runs and runs["act-act,il-s1"] == ["docs/rationale.py", f"{kept}/act-act,il-s1"]
    assert {"nlac-s3", "nlac-s4", "frozen-critic-s2", "ppo-s1", "m2-s0", "no-ema-s0"} <= set(runs)
    assert "nlac-s0" not in runs and "ppo-s0" not in runs  # finished, unfinished
    assert runs["nlql-s1"] == [
        "docs/nlql.py", "--match", f"{kept}/nlac-s1", "--seed", "1", "--out-dir", f"{kept}/nlql-s1"
    ]  # fmt: skip
    assert list(dry(kept, kept, "^k1-")[0]) == [f"k1-s{seed}" for seed in range(3)]


ELSEWHERE = {"out_dir", "match", "rrm", "pairs"}  # directories
SPEED = {"micro_batch_size", "rollout_batch_size"}  # change memory and speed alone
SINCE = {"act-smollm2-il-s0": {"held_out", "rl", "dpo_beta", "pair_batch_size"}}  # flags that are gone


def test_every_kept_run_is_what_experiments_would_run(results, tmp_path):
    """Every command can be parsed, and gives the settings of the kept run of that name."""
    commands, _ = dry(tmp_path, "runs")
    kept = {run["name"]: run["args"] for run in results}
    assert set(kept) <= set(commands)
    for name, (script, *flags) in commands.items():
        args = settings(Path(script).stem, flags)
        for key, value in kept.get(name, {}).items():
            if key not in ELSEWHERE | SPEED | SINCE.get(name, set()):
                assert value == args[key], f"{name}: --{key} was {value}, not {args[key]}"


def settings(script, flags):
    """The resolved Args of a command."""
    module = importlib.import_module(script)
    base = next(importlib.import_module(cls.__module__) for cls in module.Args.__mro__
                if cls.__module__ in ("act", "nlac", "reagent", "self_guide"))  # fmt: skip
    tiny = base.TINY | getattr(module, "TINY", {})
    return dataclasses.asdict(importlib.import_module("common").parse_args(module.Args, tiny, flags))
