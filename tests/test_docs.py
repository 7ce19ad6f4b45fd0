"""docs/: every rival and the ceiling run, their formulas by hand numbers, the report on made-up results."""

import copy
import dataclasses
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import act
import common
import envs
import nlac
import reagent
import self_guide

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import _loop  # noqa: E402
import ceiling  # noqa: E402
import nlql  # noqa: E402
import ppo  # noqa: E402
import report  # noqa: E402
import self_distillation  # noqa: E402

RIVALS = {"ppo": "ppo", "nlql": "nlql", "self_distillation": "self-distillation", "ceiling": "ceiling"}  # file: method
SMALL = dict(model="tiny:32x1", examples=60, max_new_tokens=12, steps=2, episodes_per_step=8, updates_per_episode=0.125, batch_size=8,
             micro_batch_size=4, actor_states=6, eval_episodes=8, eval_every=1, critic_warmup=0, k=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def flags_of(**settings):
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def python(cache, script, **settings):
    return subprocess.run([sys.executable, str(ROOT / "docs" / script), *flags_of(**settings)], capture_output=True, text=True, timeout=120,
                          cwd=cache, env=os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"})


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --------------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def runs(cache):
    """A short run of every rival, by its file."""
    results = {}
    for script in RIVALS:
        out = cache / "runs" / f"{script}-s0"
        results[script] = out, python(cache, f"{script}.py", **SMALL, out_dir=out)
    return results


@pytest.mark.parametrize("script", RIVALS)
def test_a_rival_runs_and_leaves_what_nlac_leaves(runs, script):
    out, result = runs[script]
    assert result.returncode == 0, result.stderr
    assert {path.name for path in out.iterdir()} == {"args.json", "metrics.jsonl", "rollouts.jsonl", "summary.json", "model"}
    summary = json.loads((out / "summary.json").read_text())
    expected = """script method arm env model seed split eval_episodes before after random expert train_episodes env_steps generated_tokens
        gradient_steps seconds peak_memory_bytes device git_commit""".split()
    assert set(expected) <= set(summary) <= {*expected, "simulation_steps"}
    assert summary["method"] == RIVALS[script] and summary["script"] == f"docs/{script}.py"
    assert set(summary["after"]) == set(summary["expert"]) == {"success", "se"}
    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2] and metrics[-1]["eval_episodes"] == 8
    for key, name in ("env_steps", "env_steps"), ("tokens", "generated_tokens"), ("gradient_steps", "gradient_steps"):
        assert 0 < metrics[0][key] < metrics[1][key] == summary[name]
    played = [r for r in lines(out / "rollouts.jsonl") if "evaluation" not in r]
    assert len(played) == 16 == summary["train_episodes"]
    acting = sum(len(r["valid"]) for r in played)
    if script == "self_distillation":
        assert summary["env_steps"] > acting  # its rollouts are environment steps
    else:
        assert summary["env_steps"] == acting
    assert (summary.get("simulation_steps", 0) > 0) == (script == "ceiling")
    for text in "before", "after", "random", "expert", "whole episodes":
        assert text in result.stdout


def test_all_share_one_base_and_the_first_episodes(runs, cache):
    assert all(result.returncode == 0 for _, result in runs.values())
    assert len(list((cache / "tiny-models").iterdir())) == 1
    first = [lines(out / "rollouts.jsonl")[:8] for out, _ in runs.values()]
    assert all(episodes == first[0] for episodes in first)


def test_the_base_is_the_one_of_nlac(monkeypatch):
    """nlac.main and the rivals ask common.load for the same thing: the cache knows a base by its corpus and constants."""
    asked = []

    def load(name, *, corpus, constants, **options):
        asked.append((name, corpus(), constants, options))
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "load", load)
    monkeypatch.setattr(common, "Run", lambda *a: None)
    for main in nlac.main, lambda: _loop.main("ppo", ppo.Args, ppo.PPO):
        monkeypatch.setattr(sys, "argv", ["x", "--examples", "20"])
        with pytest.raises(KeyboardInterrupt):
            main()
    assert asked[0] == asked[1]


def test_match_stops_at_the_steps_of_another_run(runs, cache, monkeypatch):
    other, _ = runs["self_distillation"]
    limit = json.loads((other / "summary.json").read_text())["env_steps"]
    out = cache / "runs" / "matched-s0"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(sys, "argv", ["ppo.py", *flags_of(**SMALL | {"steps": 1, "eval_every": 100}, match=other, out_dir=out)])
    monkeypatch.setattr(signal, "signal", lambda *a: None)  # the tests' own handlers stay
    _loop.main("ppo", ppo.Args, ppo.PPO)
    steps = [m["env_steps"] for m in lines(out / "metrics.jsonl")]
    assert steps[-2] < limit <= steps[-1] and lines(out / "metrics.jsonl")[-1]["eval_episodes"] == 8


@pytest.mark.parametrize("script, flags", [
    ("ppo.py", ["--gamma", "1.5"]), ("ppo.py", ["--batch-size", "48"]), ("nlql.py", ["--candidates", "1"]),
    ("ceiling.py", ["--match", "nowhere"]), ("self_distillation.py", ["--resume"]), ("ceiling.py", ["--verdicts", "mine"])])
def test_bad_settings_are_refused_and_nothing_is_written(tmp_path, monkeypatch, capsys, script, flags):
    monkeypatch.setattr(sys, "argv", [script, *flags, "--out-dir", str(tmp_path / "run")])
    module = sys.modules[script[:-3]]
    learner = {"ppo": ppo.PPO, "nlql": nlql.NLQL, "ceiling": ceiling.Ceiling, "self_distillation": self_distillation.SelfDistillation}
    with pytest.raises(SystemExit) as end:
        _loop.main("x", module.Args, learner[script[:-3]])
    assert end.value.code == 2 and re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)
    assert not any(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------------- PPO


def test_gae_by_hand():
    advantages, returns = ppo.gae([0.0, 0.0, 1.0], [0.5, 0.25, 0.5], gamma=0.5, lam=0.5)
    # deltas: 0.5 * 0.25 - 0.5 = -0.375; 0.5 * 0.5 - 0.25 = 0; 1 - 0.5 = 0.5. gamma * lam = 0.25
    assert advantages == [-0.375 + 0.25 * (0.0 + 0.25 * 0.5), 0.125, 0.5]
    assert returns == [0.15625, 0.375, 1.0]
    assert ppo.gae([0.0, 1.0], [0.3, 0.6], 1.0, 1.0)[1] == pytest.approx([1.0, 1.0])  # lambda 1: Monte-Carlo
    assert ppo.gae([0.0, 1.0], [0.3, 0.6], 0.9, 0.0)[1] == pytest.approx([0.54, 1.0])  # lambda 0: one step
    assert ppo.gae([2.0], [0.5], 0.9, 0.9) == ([1.5], [2.0])


def test_clipped_loss_by_hand():
    ratio, advantages = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]), torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    logprobs = torch.log(ratio).requires_grad_()
    loss = ppo.clipped_loss(logprobs, torch.zeros(5), advantages, 0.2)
    # min(r A, clip(r) A): 1.2, -1.5, 0.5, -0.8, 2.2
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8 + 2.2))
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0, -2.2])  # no gradient where it is clipped


def small_model(vocabulary=40):
    import transformers
    config = transformers.Qwen3Config(vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16,
                                      num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=128)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.Qwen3ForCausalLM(config).eval()


def test_look_sees_each_turn_where_it_starts():
    model, head = small_model(), torch.nn.Linear(32, 1)
    rng = random.Random(0)
    masks = [[0, 0, 0, 1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 1, 1]]
    rows = [([rng.randrange(40) for _ in mask], mask) for mask in masks]
    assert [ppo.reply_lengths(mask) for mask in masks] == [[2, 3], [1, 2]]
    logprobs, entropies, values = ppo.look(model, head, SimpleNamespace(pad=0), rows, 0.7)
    expected, expected_entropies, expected_values = [], [], []
    for (ids, mask), starts in zip(rows, ([2, 6], [1, 4])):
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        logp = torch.log_softmax(out.logits[0] / 0.7, -1)
        for t in (t for t, m in enumerate(mask) if m):
            expected.append(logp[t - 1, ids[t]].item())
            expected_entropies.append(-(logp[t - 1].exp() * logp[t - 1]).sum().item())
        expected_values += [head(out.hidden_states[-1][0, t]).item() for t in starts]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-5)
    assert entropies.tolist() == pytest.approx(expected_entropies, abs=1e-4)
    assert values.tolist() == pytest.approx(expected_values, abs=1e-5)


@pytest.fixture(scope="module")
def base(cache):
    """The small base model in this process: model, chat, world, args."""
    args = nlac.Args(**SMALL)
    world = envs.make("repair")
    known, os.environ["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME"), str(cache)
    try:
        return *nlac.load(world, args), world, args
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if known is not None:
            os.environ["XDG_CACHE_HOME"] = known


def ppo_step(base, **settings):
    model, chat, world, args = base
    args = ppo.Args(**SMALL | settings)
    learner = ppo.PPO(copy.deepcopy(model), chat, world, args)
    episodes = learner.act(1, range(8))
    for i, episode in enumerate(episodes):
        episode["reward"] = float(i % 2)  # something to learn from, whatever the small model plays
    clock = SimpleNamespace(lap=lambda name: None)
    return learner, episodes, learner.learn(10, episodes, random.Random(0), clock)


def test_ppo_starts_at_ratio_one_and_moves_every_parameter(base):
    learner, episodes, metrics = ppo_step(base, epochs=1)
    assert abs(metrics["logprob_gap"]) < 1e-4  # rollout and training forward agree
    assert abs(metrics["kl"]) < 1e-6 and metrics["policy_loss"] != 0  # one gradient step: ratio 1 throughout
    assert learner.extra["gradient_steps"] == 1
    for (name, new), old in zip(learner.model.named_parameters(), base[0].parameters()):
        assert not torch.equal(new, old), name
    assert learner.head.weight.abs().sum() > 0 and learner.head.bias.item() != 0
    for episode, (_, mask) in zip(episodes, learner.rows):
        assert len(ppo.reply_lengths(mask)) == len(episode["valid"]) and sum(mask) == episode["tokens"]


def test_ppo_does_not_depend_on_the_micro_batch(base):
    models = [ppo_step(base, micro_batch_size=n)[0].model for n in (2, 8)]
    for a, b in zip(*(model.parameters() for model in models)):
        assert torch.allclose(a, b, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ NLQL, played parts


def test_nlql_takes_the_best_and_skips_ties():
    assert nlql.best([1, 3, 3, 0]) == 1
    assert nlql.best([2, 2, 2, 2]) is None and nlql.best([None, None]) is None
    assert nlql.best([None, 0]) == 1


def played_state(seed, actions, env="repair"):
    world = envs.make(env)
    history = [world.reset(seed=seed, options={"split": "train"})[0]]
    for action in actions:
        history += [action, world.step(action)[0]]
    return {"seed": seed, "history": history}


def twins(env):
    """Two train seeds that open with the same words and hide different answers."""
    seen = {}
    for seed in range(5000):
        world = envs.make(env)
        opening, _ = world.reset(seed=seed, options={"split": "train"})
        hidden = world.finding if env == "repair" else world.hidden
        if opening in seen and seen[opening][1] != hidden:
            return seen[opening][0], seed
        seen[opening] = seed, hidden
    raise AssertionError("none")


def parts_for(cls, base, module, **settings):
    model, chat, _, _ = base
    args = module.Args(**SMALL | settings)
    world = envs.make(args.env)
    return cls(model, model, model, chat, world, args)


@pytest.mark.parametrize("env", ["repair", "20q"])
def test_the_ceiling_does_not_know_what_is_hidden(base, env):
    """Two episodes with one dialogue and different hidden answers: the same futures, critiques, refinements and prompts, draw for draw."""
    first, second = twins(env)
    action = "charge the battery" if env == "repair" else "Is it an animal?"
    outcomes = []
    for seed in first, second:
        parts = parts_for(ceiling.Parts, base, ceiling, env=env, refiner="rule")
        state, prompts = played_state(seed, [], env), []
        plain = parts.answer
        parts.answer = lambda part, messages, *rest: prompts.append(messages) or plain(part, messages, *rest)  # noqa: B023
        parts.live = [state] * 3
        refined = nlac.refine(parts, [state["history"]] * 3, ("test",), replies=[action] * 3)
        outcomes.append((state["history"], refined, prompts, [e["history"] for e in parts.play([(state, action)] * 40, ("futures",))]))
    assert outcomes[0] == outcomes[1]


def test_the_ceiling_draws_all_that_fits_the_dialogue(base):
    parts = parts_for(ceiling.Parts, base, ceiling)
    world = envs.make("repair")
    seed = next(s for s in range(100) if "does not start" in world.reset(seed=s, options={"split": "train"})[0])
    won = [e["won"] for e in parts.play([(played_state(seed, []), "charge the battery")] * 200, ("a",))]
    assert 35 < sum(won) < 100  # three faults fit, whatever is hidden
    seen = played_state(seed, ["check the power"])
    right = next(repair for finding, repair in envs.make("repair").faults["does not start"][1].items() if finding in seen["history"][-1])
    assert all(e["won"] for e in parts.play([(seen, right)] * 20, ("b",)))  # a finding that was seen stays
    game = ceiling.restored("20q", played_state(3, ["Is it an animal?"], "20q"), random.Random(0))
    assert game.hidden in game.consistent()
    assert {ceiling.restored("20q", played_state(3, ["Is it an animal?"], "20q"), random.Random(i)).hidden for i in range(400)} == set(
        game.consistent())


def test_the_rules_of_the_ceiling_are_what_the_warm_up_teaches(base):
    parts = parts_for(ceiling.Parts, base, ceiling, refiner="rule", k=4, examples=200)  # with 2 futures, none is ever "good"
    asked = {"evaluator": 0, "refiner": 0}
    for messages, reply in nlac.warmup(parts.world, parts.args):
        part = next((p for p in asked if messages[0]["content"].endswith(getattr(nlac, p.upper()))), None)
        if part:
            asked[part] += 1
            parts.live = [None]
            assert (parts(part, [messages], ("x",))[0] == reply) or (part == "refiner" and reply != "keep" and parts.live == [None])
    assert min(asked.values()) == 200


def test_the_rules_of_the_ceiling(base):
    assert nlac.critique_text([1, 1, 1, 1]) == "4 of 4 futures succeed. Verdict: great."
    assert nlac.critique_text([None, None]) == "0 of 2 futures succeed. Verdict: bad."
    assert nlac.parse_verdict(nlac.critique_text([2, None, 1, None])) == 2
    parts = parts_for(ceiling.Parts, base, ceiling, refiner="rule")
    state = played_state(0, [])
    futures = [nlac.future_text("It works again. You win.", 1), nlac.future_text("It is still broken.", None)]
    message = nlac.evaluator_messages(parts.world, state["history"], "swap the fuse", futures)
    assert parts("evaluator", [message], ("x",)) == ["1 of 2 futures succeed. Verdict: fair."]
    tries = [{"action": "swap the fuse", "critique": "0 of 2 futures succeed. Verdict: bad."}]
    parts.live = [state] * 50
    replies = parts("refiner", [nlac.refiner_messages(parts.world, state["history"], tries)] * 50, ("x",))
    assert set(replies) <= set(parts.actions) - {"swap the fuse"} and len(set(replies)) > 5
    parts.live = [state]
    tries.append({"action": "open the case", "critique": "2 of 2 futures succeed. Verdict: great."})
    assert parts("refiner", [nlac.refiner_messages(parts.world, state["history"], tries)], ("x",)) == ["keep"] and parts.live == []


def test_self_distillation_plays_the_world_as_it_is(base):
    """Its futures are real continuations: same hidden answer, told in the words of a future, and counted."""
    parts = parts_for(self_distillation.Parts, base, self_distillation)
    for seed in twins("repair"):
        world = envs.make("repair")
        state = played_state(seed, [])
        world.reset(seed=seed, options={"split": "train"})
        right = world.faults[world.symptom][1][world.finding]
        wrong = next(r for r in world.repairs if r != right)
        parts.live, parts.extra["env_steps"] = [state, state], 0
        messages = [nlac.successor_messages(parts.world, state["history"], a) for a in (right, wrong)]
        won, lost = nlac.future_text("It works again.", 1), nlac.future_text("It is still broken.", None)
        assert parts("successor", messages, ("x",), 3) == [won] * 3 + [lost] * 3
        assert parts.extra["env_steps"] == 6
    episode = {"history": ["o", "a", "p. q", "b", "r"], "won": True}
    assert parts.describe({"history": ["o"]}, episode) == "Next: p.\nEnd: success in 2 turns."


def test_played_parts_notice_a_mix_up(base):
    parts = parts_for(self_distillation.Parts, base, self_distillation)
    a, b = (played_state(seed, []) for seed in (0, 1))
    parts.live = [a]
    with pytest.raises(RuntimeError):
        parts("successor", [nlac.successor_messages(parts.world, b["history"], "swap the fuse")], ("x",))


def test_refine_keeps_track_of_the_states_of_later_rounds(base):
    parts = parts_for(ceiling.Parts, base, ceiling, refiner="rule", m=4)
    states = [played_state(seed, ["check the power"]) for seed in range(20)]
    refined = parts.refine(states, ("x",))
    assert len(refined) == 20 and any(len(r["tries"]) > 1 for r in refined)
    assert len(parts.live) == sum(not r["kept"] for r in refined)


# ----------------------------------------------------------------------------------------------------------------- report


def made_up(results, name, seed, after, env="repair", **more):
    out = results / f"{name}-s{seed}"
    out.mkdir(parents=True)
    ends = {who: {"success": value, "se": 0.0} for who, value in (("before", 0.1), ("after", after), ("random", 0.125), ("expert", 1.0))}
    summary = {"method": name, "env": env, "seed": seed, "eval_episodes": 500, "env_steps": 20000, "generated_tokens": 3000000,
               "gradient_steps": 600, "seconds": 300.0, "device": "cpu"} | ends | more
    (out / "summary.json").write_text(json.dumps(summary))
    (out / "args.json").write_text(json.dumps({"args": {"lr": more.get("lr", 1e-3)}}))
    metrics = [{"step": i, "env_steps": 100 * i} | ({"eval_success": after * i / 200} if i % 25 == 0 else {}) for i in range(1, 201)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    (out / "rollouts.jsonl").write_text("{}\n")


@pytest.fixture
def results(tmp_path):
    results = tmp_path / "results"
    for seed, (ours, blind) in enumerate([(0.8, 0.1), (0.9, 0.1), (0.7, 0.2)]):
        made_up(results, "nlac", seed, ours)
        made_up(results, "blind-critic", seed, blind)
    made_up(results, "ceiling", 0, 0.95, simulation_steps=123456)
    made_up(results, "20q-nlac", 0, 0.5, env="20q")
    (results / "ppo-s0").mkdir()  # unfinished
    (results / "nlql-s0").mkdir()
    (results / "nlql-s0" / "summary.json").write_text("{")  # broken
    return results


def test_report_tables(results, capsys):
    text = report.tables(report.read_runs(results))
    assert "nlql-s0 cannot be read" in capsys.readouterr().err
    assert "| nlac | 3 | 0.100 ± 0.000 | **0.800 ± 0.058** | 80% | 20,000 | 3,000,000 | 600 | 5.0 |" in text
    assert "20,000 + 123,456 simulated" in text
    assert "| its base | 3 | +0.700 ± 0.058 | yes |" in text
    assert "| blind-critic | 3 | +0.667 ± 0.088 | yes |" in text
    assert "| ceiling | 1 | -0.150 | one seed |" in text
    assert text.index("**repair**") < text.index("**20q**") and "ppo" not in text


def test_report_numbers():
    mean, se = report.mean_se([0.7, 0.8, 0.5])
    assert mean == pytest.approx(2 / 3) and se == pytest.approx(math.sqrt(((1 / 30) ** 2 + (2 / 15) ** 2 + (1 / 6) ** 2) / 2 / 3))
    assert math.isnan(report.mean_se([1.0])[1])
    runs = {seed: {"summary": {"before": {"success": 0.0}}, "metrics": [{"env_steps": x, "eval_success": y} for x, y in points]}
            for seed, points in enumerate([[(10, 0.2), (20, 0.4)], [(20, 0.8), (40, 1.0)]])}
    assert [(x, round(y, 6)) for x, y, _ in report.curve(runs)] == [(0, 0.0), (10, 0.3), (20, 0.6)]


def test_report_writes_between_the_marks_and_draws(results, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "README.md"
    page.write_text("head\n<!-- results -->\nold\n<!-- /results -->\ntail\n")
    figure = tmp_path / "curves.png"
    for _ in range(2):  # writing again changes nothing
        report.main(["--results", str(results), "--figure", str(figure), "--write", str(page)])
        text = page.read_text()
        assert text.startswith("head\n<!-- results -->\n**repair**") and text.endswith("<!-- /results -->\ntail\n") and "old" not in text
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        report.main(["--results", str(results), "--figure", str(figure), "--write", str(page)])
    assert page.read_text() == "no marks"


def test_report_without_matplotlib_or_results(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.main(["--results", str(results), "--figure", str(tmp_path / "x.png")])
    assert "pip install" in capsys.readouterr().err and not (tmp_path / "x.png").exists()
    with pytest.raises(SystemExit) as end:
        report.main(["--results", str(tmp_path / "nothing")])
    assert end.value.code == 2


def test_report_keep_and_best(results, tmp_path, capsys):
    for name, seed, after, lr in ("ppo-lr1e-4", 100, 0.3, 1e-4), ("ppo-lr3e-4", 100, 0.6, 3e-4), ("ppo", 0, 0.9, 1.0):
        made_up(tmp_path / "runs", name, seed, after, lr=lr)
    (tmp_path / "runs" / "unfinished-s0").mkdir()
    kept = tmp_path / "kept"
    report.main(["--results", str(kept), "keep", str(tmp_path / "runs")])
    assert {path.name for path in kept.iterdir()} == {"ppo-lr1e-4-s100", "ppo-lr3e-4-s100", "ppo-s0"}
    assert {path.name for path in (kept / "ppo-s0").iterdir()} == {"summary.json", "args.json", "metrics.jsonl"}
    thinned = lines(kept / "ppo-s0" / "metrics.jsonl")
    assert len(thinned) < 90 and [m["step"] for m in thinned if "eval_success" in m] == list(range(25, 201, 25))
    report.main(["--results", str(kept), "keep", str(kept)])  # onto itself
    assert [m["step"] for m in lines(kept / "ppo-s0" / "metrics.jsonl") if "eval_success" in m] == list(range(25, 201, 25))
    capsys.readouterr()
    report.main(["--results", str(kept), "best", "ppo-lr"])
    assert capsys.readouterr().out == "--lr 0.0003\n"


def test_experiments_names_every_run_once_and_skips_what_is_finished(results, tmp_path):
    made_up(results, "ppo-search-lr1e-4", 100, 0.4, lr=1e-4)
    made_up(results, "ppo-search-lr3e-3", 100, 0.2, lr=3e-3)

    def dry(*pattern):
        done = subprocess.run(["bash", str(ROOT / "docs" / "experiments.sh"), *pattern], capture_output=True, text=True, timeout=60,
                              env=os.environ | {"DRY": "1", "RESULTS": str(results), "PYTHON": sys.executable})
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("==")], done.stderr

    told, errors = dry()
    outs = [line.split()[-1] for line in told]
    assert len(set(outs)) == len(outs) > 60 and "ppo-s0 is unfinished" in errors
    names = {Path(out).name for out in outs}
    assert {"nlac-s3", "nlac-s4", "frozen-critic-s4", "ppo-s1", "self-distillation-s2", "ceiling-s2", "m4-s0", "no-ema-s0"} <= names
    assert "nlac-s0" not in names and "ppo-s0" not in names  # finished, unfinished
    assert [line for line in told if line.endswith("nlql-s1")][0].split()[2:] == [
        "docs/nlql.py", "--match", f"{results}/nlac-s1", "--seed", "1", "--out-dir", f"{results}/nlql-s1"]
    assert [line for line in told if line.endswith("/ppo-s1")][0].split()[2:5] == ["docs/ppo.py", "--lr", "0.0001"]
    assert [line.split()[-1] for line in dry("^k1-")[0]] == [f"{results}/k1-s{s}" for s in range(3)]
    for line in told:  # every command can be parsed
        script, *flags = line.split()[2:]
        module = {"nlac.py": nlac, "docs/ppo.py": ppo, "docs/nlql.py": nlql, "docs/ceiling.py": ceiling,
                  "docs/self_distillation.py": self_distillation, "self_guide.py": self_guide, "act.py": act,
                  "docs/early_experience.py": act, "reagent.py": reagent}[script]
        assert dataclasses.is_dataclass(common.parse_args(module.Args, flags))
