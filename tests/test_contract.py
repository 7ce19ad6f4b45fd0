"""What every script promises, of all four: runs and what they leave, bad input, kills and resume."""

import json
import re
import shutil
import signal
import sys
from dataclasses import dataclass
from functools import partial

import helpers
import pytest
import torch
from conftest import ROOT
from helpers import CHECKPOINT, LOG, SUMMARY, everything_under, lines, refused, without_seconds

import common
import envs

sys.path.insert(0, str(ROOT / "docs"))

import show_run  # noqa: E402

torch.set_num_threads(1)
FILES = {"args.json", "metrics.jsonl", "rollouts.jsonl", "checkpoint", "model", "summary.json"}

# ------------------------------------------------------------------ faults: code for `run_script`

IN_EVALUATION = "script.evaluate = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)"
HALF_A_LINE = """
def fatal(run, records):
    with open(run.dir / "rollouts.jsonl", "a") as file:
        file.write('{"step": ')
    os.kill(os.getpid(), signal.SIGKILL)
common.Run.write_rollouts = fatal
"""
AFTER_LINE = partial(LOG.format, name="SIGKILL")
IN_CHECKPOINT = CHECKPOINT.format(count=1)  # that a resumed run writes next
BEFORE_SUMMARY = "common.Run.finish = lambda *a: os.kill(os.getpid(), signal.SIGKILL)"
NAN = """
import torch
logprobs, log, logged, seen = common.token_logprobs, common.Run.log, [], []
def counted(run, *given):
    log(run, *given)
    logged.append(0)
def broken(*given, **how):
    found = logprobs(*given, **how)
    if torch.is_grad_enabled() and len(logged) == {step} - 1:
        seen.append(0)
    return found * (float("nan") if len(seen) >= 2 else 1)  # in the second micro-batch
common.Run.log, common.token_logprobs = counted, broken
"""
SIZES = """
decode, logprobs = common._decode, common.token_logprobs
def note(model, *numbers):
    if hasattr(model, "max_context"):  # what a load tries is not yet bounded
        with open("sizes", "a") as file:
            print(*numbers, file=file)
def decoded(model, chat, cache, mask, last, limit, *given):
    note(model, "sampled", len(last), mask.shape[1] + 1 + limit)
    return decode(model, chat, cache, mask, last, limit, *given)
def read(model, ids, mask, *given):
    note(model, "read", *ids.shape)
    return logprobs(model, ids, mask, *given)
common._decode, common.token_logprobs = decoded, read
"""
MUTE = """
import builtins
log = common.Run.log
def logged(run, *given):
    log(run, *given)
    builtins.print = broken
def broken(*words, **how):
    raise OSError("nobody hears this")
common.Run.log = logged
"""
ASCII = """
import io, sys
sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="ascii", line_buffering=True)
"""

# -------------------------------------------------------------------------------- the four scripts


@dataclass
class Own:
    """What differs from script to script."""

    env: str
    small: str  # flags of a small run
    steps: int  # lines of metrics that it leaves
    kills: list  # of one run, one after the other: (fault, lines of metrics by then)
    not_finite: int  # the step in which a loss is nan; the one before has a checkpoint
    other: str  # settings that a run may not be resumed with
    llama: str  # flags of a run with random weights
    clueless: dict  # what the last line of its metrics says
    learns: bool = True  # then, too
    fewer: str = ""  # flags of a run that more steps may follow
    data: tuple = ()  # files of a run that the others do not have
    models: tuple = ()
    world: str = ""  # flags for a world of one's own
    prepare: str = ""  # what the process that runs the script does first


SCRIPTS = {
    "nlac": Own(
        env="repair", steps=4, fewer="--steps 3", not_finite=3,
        small="--model tiny --examples 600 --steps 4 --batch-size 8 --micro-batch-size 4 "
              "--eval-episodes 4 --eval-every 2 --save-every 2 --episodes-per-step 4 --updates 2 "
              "--actor-states 4 --critic-gate 0 --k 2 --distil all --max-new-tokens 24 "
              "--forecast-tokens 24 --critique-tokens 24",
        kills=[(IN_EVALUATION, 0), (HALF_A_LINE, 1), (AFTER_LINE(step=3), 3), (IN_CHECKPOINT, 4),
               (BEFORE_SUMMARY, 4)],
        other="--ablation mc-backup --k 3",
        llama="--steps 2 --eval-every 1 --max-new-tokens 12 --lr 1e-3 --prefill --anchor 0.3",
        clueless={"invalid": 1, "parse_successor": 0, "parse_evaluator": 0}),
    "self_guide": Own(
        env="repair", steps=4, fewer="--steps 3", not_finite=3,
        small="--model tiny --examples 1500 --steps 4 --batch-size 8 --micro-batch-size 4 "
              "--group-size 4 --updates 1 --eval-episodes 4 --eval-every 2 --save-every 2 "
              "--max-new-tokens 20 --rate-tokens 20 --kl 0.01 --trust immediate",
        kills=[(IN_EVALUATION, 0), (HALF_A_LINE, 1), (AFTER_LINE(step=3), 3), (IN_CHECKPOINT, 4),
               (BEFORE_SUMMARY, 4)],
        other="--trust zero --rating-reward 1",
        llama="--steps 2 --eval-every 1 --max-new-tokens 8 --rate-tokens 8 --lr 5e-4",
        clueless={"label_malformed": 1, "reward_guide": 0, "invalid": 1, "groups_flat": 2},
        learns=False),  # nothing was won and nobody was praised: no advantages
    "act": Own(
        env="repair", steps=9, not_finite=3,
        small="--model tiny --examples 400 --steps 3 --batch-size 8 --micro-batch-size 4 "
              "--group-size 4 --eval-episodes 4 --eval-every 2 --save-every 2 --max-new-tokens 28 "
              "--choice-tokens 28 --num-demos 5 --sft-batch-size 4 --pipeline act,il,rl",
        kills=[(IN_EVALUATION, 0), (HALF_A_LINE, 0), (AFTER_LINE(step=5), 5),  # within il
               (AFTER_LINE(step=7), 7), (IN_CHECKPOINT, 8), (BEFORE_SUMMARY, 9)],
        other="--pipeline il --candidates 3",
        llama="--steps 1 --max-new-tokens 8 --choice-tokens 8 --pairs {whole}/pairs.jsonl",
        clueless={},
        data=("demos.jsonl", "pairs.jsonl"), models=("1-act", "2-il")),
    "reagent": Own(
        env="search", steps=7, fewer="--steps 1", not_finite=7,
        # 2 updates of the cold start, 2 and 1 of the judge, 2 of learning; each phase ends in a checkpoint
        small="--model tiny:32x1 --examples 60 --steps 2 --batch-size 8 --micro-batch-size 4 "
              "--group-size 4 --eval-episodes 2 --eval-every 1 --save-every 3 --judged 20 "
              "--judge-steps 1 --judge-epochs 1 --cold-start 16 --cold-epochs 1 "
              "--max-new-tokens 12 --judge-tokens 64 --sft-batch-size 8 --kl 0.01",
        kills=[(IN_EVALUATION, 0), (AFTER_LINE(step=4), 4),  # the judge's data are made once more
               (IN_CHECKPOINT, 4), (AFTER_LINE(step=6), 6), (AFTER_LINE(step=7), 7),
               (BEFORE_SUMMARY, 7)],
        other="--variant R --score-weight 1",
        llama="--steps 1 --max-new-tokens 6 --judge-tokens 250 --judged 4 --cold-start 2 "
              "--eval-episodes 1",
        clueless={"judge_readable": 0, "return": 0, "invalid": 1, "groups_flat": 2},
        data=("judged.jsonl",), models=("rrm",), world="--judged 0 --cold-start 2"),
}  # fmt: skip


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def own(script):
    return SCRIPTS[script]


@pytest.fixture(scope="module")
def small(own):
    return f"--env {own.env} {own.small}"


@pytest.fixture(scope="module")
def prepare(own):
    return own.prepare


@pytest.fixture(scope="module")
def same_run(own, whole):
    """Asserts that a run is the same as the one that nothing disturbed."""
    return partial(helpers.same_run, whole, data=own.data, weights=("model", *own.models))


def save_llama(path, **how):
    """Its tokenizer knows the words of all prompts."""
    sources = [(ROOT / f"{name}.py").read_text() for name in SCRIPTS]
    return helpers.save_llama(path, text=sources, **{"context": 8192, **how})


def saved(run):
    """What a checkpoint holds, and after how many lines of metrics it was written."""
    found = torch.load(run / "checkpoint" / "state.pt", weights_only=True)
    logged = (run / "metrics.jsonl").read_bytes()[:found["offsets"]["metrics.jsonl"]]
    return found["state"], logged.count(b"\n")


def inside(value):
    """A container, what is in it, and what is in that."""
    yield value
    items = value.values() if isinstance(value, dict) else value
    for item in items if isinstance(items, (list, tuple, type({}.values()))) else ():
        yield from inside(item)


# -------------------------------------------------------------------------- whole runs: as a user


def test_quick_by_subprocess(run_as_user, own, script, tmp_path):
    result = run_as_user(f"--quick --env {own.env}", tmp_path, timeout=120)
    assert result.status == 0 and "Traceback" not in result.stderr, result.stderr
    run = tmp_path / "runs" / f"{script}-{own.env}-s0"
    assert list(tmp_path.iterdir()) == [run.parent] and list(run.parent.iterdir()) == [run]
    assert FILES <= {path.name for path in run.iterdir()}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["expert"] == {"success": 1, "se": 0} and summary["gradient_steps"] > 0
    directory = str(run.relative_to(tmp_path))
    for piece in "\nbefore", "\nafter\n", "\n> ", "\nrandom ", "\nexpert ", directory:
        assert piece in result.stdout, piece
    assert result.stdout.endswith(f"python docs/show_run.py {directory}\n")
    shows_all_words(run)


def shows_all_words(run):
    """The page of a run holds every text of its episodes; a quick run fits whole."""
    found = re.sub("<[^>]*>", "\n", show_run.page([run]))  # what was said is escaped: no tag is lost
    rows = lines(run / "rollouts.jsonl")
    texts = {text for row in rows for text in inside(row) if isinstance(text, str)} - {""}
    assert f"All {len(rows)}." in found and len(texts) > 20
    for text in texts:
        assert show_run.safe(text) in found, text


def test_what_a_run_leaves(own, script, small, whole):
    assert {path.name for path in whole.iterdir()} == FILES | {*own.data, *own.models}
    args, summary = (json.loads((whole / f"{name}.json").read_text()) for name in ("args", "summary"))
    assert args["script"] == summary["script"] == script and args["args"]["env"] == own.env
    assert {"versions", "device", "git_commit", "parameters", "start"} <= set(args)
    assert set(SUMMARY) <= set(summary)
    for when in "before", "after", "random", "expert":
        assert set(summary[when]) == {"success", "se"}
    metrics, rollouts = lines(whole / "metrics.jsonl"), lines(whole / "rollouts.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, own.steps + 1))
    for row, later in zip(metrics, [*metrics[1:], metrics[-1]]):
        assert row["gradient_steps"] > 0 and abs(row.get("logprob_gap", 0)) < 1e-4
        assert all(row[name] <= later[name] for name in ("tokens", "env_steps", "gradient_steps"))
        assert any(name.startswith("seconds_") for name in row)
    assert summary["generated_tokens"] == metrics[-1]["tokens"] > 0
    assert all(summary[name] == metrics[-1][name] for name in ("env_steps", "gradient_steps"))
    assert any("eval_success" in row for row in metrics)
    assert rollouts and not any({"ids", "mask"} & set(row) for row in rollouts)
    model, chat = common.load(str(whole / "model"))
    assert model.config.tiny and chat.prompt([{"role": "user", "content": "Hi"}])
    assert common.fingerprint(model) != args["start"]
    state, logged = saved(whole)
    found = [part for part in inside(state) if isinstance(part, dict)]
    assert logged == own.steps and any(
        all(name in part and torch.equal(part[name], value)
            for name, value in model.state_dict().items()) for part in found)  # fmt: skip


def test_eval_only_writes_nothing(run_script, own, small, whole, tmp_path):
    before = everything_under(whole)
    result = run_script(f"{small} --model {whole}/model --out-dir {whole} --eval-only", tmp_path)
    assert result.status == 0, result.stderr
    assert re.search(r"test: success \d\.\d+ \(se .*n \d", result.stdout + result.stderr)
    assert everything_under(whole) == before and not list(tmp_path.iterdir())


def test_the_same_seed_gives_the_same_run_though_nobody_hears_of_it(
    run_script, same_run, small, tmp_path
):
    result = run_script(f"{small} --out-dir run", tmp_path, MUTE)
    assert result.status == 1 and "nobody hears this" in result.stderr
    same_run(tmp_path / "run")


def test_another_seed_gives_another_run(run_script, small, whole, tmp_path):
    result = run_script(f"{small} --seed {2**63 - 1} --steps 1 --out-dir run", tmp_path)
    assert result.status == 0, result.stderr
    one, other = (lines(run / "metrics.jsonl")[0] for run in (whole, tmp_path / "run"))
    assert without_seconds(one) != without_seconds(other)


def test_a_model_from_elsewhere_runs_through_every_line(
    run_script, llama, bad_models, own, small, whole, tmp_path
):
    shutil.copytree(llama, tmp_path / "model")
    flags = f"{small} --device cpu --model ./model --out-dir run {own.llama.format(whole=whole)}"
    result = run_script(flags, tmp_path)
    assert result.status == 0, result.stderr
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert {name: last[name] for name in own.clueless} == own.clueless
    assert abs(last.get("logprob_gap", 0)) < 1e-4
    told = re.findall(r"of the replies of (\w+) were cut: raise --[\w-]+-tokens", result.stderr)
    assert told and len(told) == len(set(told)) == result.stderr.count("were cut: raise ")
    (start, _), (trained, chat) = (
        common.load(str(tmp_path / name)) for name in ("model", "run/model"))  # fmt: skip
    assert (common.fingerprint(start) != common.fingerprint(trained)) == own.learns
    asked = [{"role": "user", "content": "Hi"}]
    assert chat.prompt(asked) == common.load(str(llama))[1].prompt(asked)

    shutil.rmtree(tmp_path / "model")
    shutil.copytree(bad_models / "wide", tmp_path / "model")
    before = everything_under(tmp_path)
    result = run_script(f"{flags} --resume", tmp_path)
    assert result.status == 2 and "another" in result.stderr and result.stderr.count("\n") == 1
    assert everything_under(tmp_path) == before


WORLD = """
import envs

class Shop(envs.RepairShop):
    name = "Caf\u00e9"
    def observe(self, words):
        return super().observe(words + " \u2615")
"""


def test_a_world_of_ones_own_on_a_terminal_that_cannot_print_it(
    run_script, own, script, small, tmp_path
):
    (tmp_path / "shop.py").write_text(WORLD)
    flags = f"--env shop.py:Shop --examples 60 --steps 1 {own.world}"
    shown = "--show-actions --shots 1 --prefill"
    result = run_script(f"{small} {flags} {shown}", tmp_path, ASCII)
    assert result.status == 0, result.stderr
    assert r"\u2615" in result.stdout and envs.LISTING.strip() in result.stdout
    [run] = (tmp_path / "runs").iterdir()
    assert run.name == f"{script}-shop.py-Shop-s0"
    assert json.loads((run / "summary.json").read_text())["expert"]["success"] == 1
    assert common.load(str(run / "model"))[0].config.tiny
    assert any("\u2615" in file.read_text() for file in run.glob("*.jsonl"))


# -------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def bad_models(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    for name in "no-config", "garbage", "torn", "no-tokenizer":
        shutil.copytree(llama, path / name)
    (path / "no-config" / "config.json").unlink()
    (path / "garbage" / "config.json").write_text('{"model_type": ')
    weights = path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for file in (path / "no-tokenizer").glob("token*"):
        file.unlink()
    save_llama(path / "no-template", template=None)
    save_llama(path / "short", context=64)
    save_llama(path / "wide", width=64)
    (path / "file").write_text("")
    (path / "world.py").write_text(WORLD)
    return path


BAD_VALUES = {
    "steps": "0 -3", "lr": "nan -1 inf", "batch-size": "0", "micro-batch-size": "0",
    "rollout-batch-size": "0", "max-new-tokens": "0", "max-context": "0", "temperature": "0 nan",
    "eval-temperature": "-1 nan", "eval-episodes": "0", "eval-every": "0", "save-every": "0 -1",
    "seed": f"-1 {2**63}", "shots": "-1", "thinking": "maybe", "quick": "maybe", "device": "warp", "track": "tensorbord",
    "dtype": "float16", "examples": "0", "nonsense": "1",
}  # fmt: skip
BAD_INPUT = [(f"--{name} {value}", f"--{name}")
             for name, values in BAD_VALUES.items() for value in values.split()]  # fmt: skip
BAD_INPUT += [
    ("--model ./nowhere", "config.json is missing"), ("--model nobody/nothing", "cannot be loaded"),
    ("--model tiny:10x1", "multiple of 16"), ("--model tiny:16x0", "tiny"),
    ("--model {bad}/no-config", "config.json is missing"),
    ("--model {bad}/file", "config.json is missing"),
    ("--model {bad}/garbage", "cannot be loaded"), ("--model {bad}/torn", "cannot be loaded"),
    ("--model {bad}/no-tokenizer", "--model"), ("--model {bad}/no-template", "chat template"),
    ("--model {bad}/short", "context of 64"), ("--model {bad}/short --eval-only", "context of 64"),
    ("--model {bad}/wide --max-context 40", "context of 40"),
    ("--env chess", "unknown world 'chess'"), ("--env {bad}/nothing.py:Shop", "no file"),
    ("--env {bad}/world.py:Nothing", "no such class"),
    ("--resume", "no run"), ("--out-dir {bad}/short", "exists"), ("--out-dir {bad}/file", "exists"),
    ("--out-dir {bad}/file/run", "--out-dir"),
]  # fmt: skip


@pytest.mark.parametrize("flags, words", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(
    run_script, bad_models, home, small, tmp_path, flags, words
):
    before = everything_under(bad_models), everything_under(home)
    accepted = "common.Run.start = script.evaluate = lambda *a, **k: os._exit(77)"
    unmade = "--examples 61 --device cpu"  # or nobody would see a tiny model made too early
    result = run_script(f"{small} {unmade} {flags.format(bad=bad_models)}", tmp_path, accepted)
    refused(result, words)
    assert not list(tmp_path.iterdir())
    assert (everything_under(bad_models), everything_under(home)) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_one(run_script, small, tmp_path):
    refused(run_script(f"{small} --device cuda", tmp_path), "--device")
    assert not list(tmp_path.iterdir())


def test_bad_input_by_subprocess(run_as_user, tmp_path):
    refused(run_as_user("--lr nan", tmp_path), "--lr")
    assert not list(tmp_path.iterdir())


def test_a_run_is_never_overwritten_and_resumed_only_as_it_was(
    run_script, own, small, whole, tmp_path
):
    def after(flags, words, damage=lambda run: None):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "run")
        damage(tmp_path / "run")
        before = everything_under(tmp_path)
        refused(run_script(f"{small} --out-dir run {flags}", tmp_path), *words)
        assert everything_under(tmp_path) == before

    def junk(run):
        (run / "checkpoint" / "state.pt").write_bytes(b"junk")

    def another(run):
        record = json.loads((run / "args.json").read_text()) | {"script": "another"}
        (run / "args.json").write_text(json.dumps(record))

    other = f"--lr 0.5 --seed 3 {own.other}"
    names = [name.replace("-", "_") for name in re.findall(r"--([\w-]+)", other)]
    after("", ["--resume", "--out-dir"])
    after(f"--resume {other}", [f"{name} was" for name in names])
    after("--resume", ["damaged"], junk)
    after("--resume", ["metrics.jsonl"], lambda run: (run / "metrics.jsonl").write_text(""))
    after("--resume", ["a run of another"], another)


# --------------------------------------------------------------------------- failures in the midst


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(
    run_script, own, same_run, small, tmp_path
):
    result = run_script(f"{small} --out-dir run", tmp_path, NAN.format(step=own.not_finite))
    run, told = tmp_path / "run", result.stderr.replace("\r", "\n").splitlines()
    [told] = [line for line in told if "error" in line.lower()]
    assert result.status == 1 and "Traceback" not in result.stderr
    assert "nan" in told and "not_finite.pt" in told
    assert len(lines(run / "metrics.jsonl")) == own.not_finite - 1
    assert not (run / "summary.json").exists()
    batch = inside(torch.load(run / "not_finite.pt", weights_only=True))
    ids = [row for row in batch if isinstance(row, list) and row and isinstance(row[0], int)]
    assert sum(max(row) > 1 for row in ids) >= 8  # of all sequences of the step; masks are 0 and 1
    state, logged = saved(run)
    tensors = [value for value in inside(state) if isinstance(value, torch.Tensor)]
    assert logged == own.not_finite - 1 and tensors
    assert all(torch.isfinite(value).all() for value in tensors)
    assert run_script(f"{small} --out-dir run --resume", tmp_path).status == 0
    (run / "not_finite.pt").unlink()
    same_run(run)


def test_rows_and_context_are_bounded_everywhere(run_script, small, tmp_path):
    """In evaluation and in what judges and critics read and say, too: replies are never given less room than they may need."""

    def sizes(flags):
        (tmp_path / "sizes").unlink(missing_ok=True)
        result = run_script(f"{small} --rollout-batch-size 3 --micro-batch-size 2 {flags}", tmp_path, SIZES)
        assert result.status == 0, result.stderr
        found = {"sampled": [], "read": []}
        for line in (tmp_path / "sizes").read_text().splitlines():
            kind, rows, length = line.split()
            found[kind].append((int(rows), int(length)))
        return found

    found = sizes("--out-dir free")
    lengths = sorted(length for _, length in found["sampled"])
    bound = lengths[len(lengths) * 3 // 4]
    assert bound < lengths[-1], "the bound would change nothing"
    found = sizes(f"--out-dir bounded --max-context {bound}")
    for kind, most in ("sampled", 3), ("read", 2):
        assert max(rows for rows, _ in found[kind]) == most
        assert max(length for _, length in found[kind]) <= bound


def test_adapters_and_checkpointing_through_every_line(run_script, own, script, small, tmp_path):
    """And a run that was killed goes on from its adapters."""
    flags = f"{small} --lora-rank 2 --gradient-checkpointing --lr 1e-2"
    for name, fault, status in ("run", "", 0), ("cut", own.kills[2][0], -signal.SIGKILL), ("cut --resume", "", 0):
        result = run_script(f"{flags} --out-dir {name}", tmp_path, fault)
        assert result.status == status, result.stderr
    run = tmp_path / "run"
    helpers.same_run(run, tmp_path / "cut", data=own.data, weights=("model", *own.models))
    model, _ = common.load(str(run / "model"))  # refuses what has no place
    assert common.fingerprint(model) != json.loads((run / "args.json").read_text())["start"]
    state, _ = saved(run)
    names = {name for part in inside(state) if isinstance(part, dict) for name in part if str(name).endswith(".weight")}
    assert names and all(".lora_" in name for name in names)


def test_killed_again_and_again_and_resumed(run_script, own, same_run, small, tmp_path):
    flags, run = f"{small} --out-dir run", tmp_path / "run"
    for fault, written in own.kills:
        result = run_script(flags, tmp_path, fault)
        assert result.status == -signal.SIGKILL, result.stderr
        metrics = run / "metrics.jsonl"
        assert (len(lines(metrics)) if metrics.exists() else 0) == written
        assert not (run / "summary.json").exists()
        flags = f"{small} --out-dir run --resume"
    result = run_script(flags, tmp_path)
    assert result.status == 0, result.stderr
    same_run(run)


def test_asked_to_stop_it_keeps_the_step_and_resumes(run_script, own, same_run, small, tmp_path):
    flags, run = f"{small} --out-dir run", tmp_path / "run"
    for step, name, status in (1, "SIGTERM", 143), (own.steps, "SIGINT", 130):
        result = run_script(flags, tmp_path, LOG.format(step=step, name=name))
        assert result.status == status and "Traceback" not in result.stderr, result.stderr
        assert saved(run)[1] == len(lines(run / "metrics.jsonl")) == step
        assert not (run / "summary.json").exists()
        flags = f"{small} --out-dir run --resume"
    result = run_script(flags, tmp_path)
    assert result.status == 0, result.stderr
    same_run(run)


def test_more_steps_after_a_finished_run(run_script, own, same_run, small, whole, tmp_path):
    run = tmp_path / "run"
    if not own.fewer:  # they would change the steps that were done
        shutil.copytree(whole, run)
        refused(run_script(f"{small} --steps 9 --out-dir run --resume", tmp_path), "steps was")
        return
    assert run_script(f"{small} {own.fewer} --out-dir run", tmp_path).status == 0
    last = len(lines(run / "metrics.jsonl"))  # what is evaluated in the last step differs
    assert last < own.steps
    for _ in range(2):  # the second time, nothing is left to do
        result = run_script(f"{small} --out-dir run --resume", tmp_path)
        assert result.status == 0, result.stderr
        same_run(run, data=(), steps={*range(1, own.steps + 1)} - {last})
        one, other = (json.loads((path / "summary.json").read_text()) for path in (whole, run))
        for name in "before", "after", "train_episodes", "env_steps", "gradient_steps":
            assert one[name] == other[name], name
        for name in "model", *own.models:
            weights = (path / name / "model.safetensors" for path in (whole, run))
            assert next(weights).read_bytes() == next(weights).read_bytes()
