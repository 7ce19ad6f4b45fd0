"""docs/: rivals, baselines and probes run, and their formulas by hand numbers."""

import copy
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import SUMMARY, everything_under, lines, trained_on

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
import early_experience  # noqa: E402
import judge  # noqa: E402
import nlql  # noqa: E402
import other_judge  # noqa: E402
import other_rater  # noqa: E402
import ppo  # noqa: E402
import rationale  # noqa: E402
import second_attempts  # noqa: E402
import self_distillation  # noqa: E402
import self_guide_dose  # noqa: E402
import world_scores  # noqa: E402
import zero_shot  # noqa: E402

RIVALS = {"ppo": ppo.PPO, "nlql": nlql.NLQL, "self_distillation": self_distillation.SelfDistillation, "ceiling": ceiling.Ceiling}
SMALL = dict(model="tiny:32x1", examples=60, max_new_tokens=12, forecast_tokens=12, critique_tokens=12, steps=2, episodes_per_step=8,
             updates=1, batch_size=8, micro_batch_size=4, actor_states=6, eval_episodes=8, eval_every=1, k=2, critic_gate=0.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def put_back(monkeypatch):
    """What programs of docs/ replace in a script, for the tests that come after."""
    for owner, *names in ((act, "Args", "load"), (reagent, "Args", "review"), (common.Dialogues, "read_by"),
                          (self_guide, "Args", "side_by_side", "take_turn")):  # fmt: skip
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))
    for name in "STAGES", "PAIRED", "AT_LEAST":
        monkeypatch.setattr(act, name, getattr(act, name).copy())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def flags_of(**settings):
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def python(cache, script, **settings):
    return subprocess.run([sys.executable, str(ROOT / "docs" / script), *flags_of(**settings)], capture_output=True, text=True, timeout=120,
                          cwd=cache, env=os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"})


@pytest.fixture
def call(monkeypatch, cache):
    """call(main, words...) runs a program in this process, with the tiny models of these tests."""

    def run(main, *words):
        monkeypatch.setattr(sys, "argv", ["x", *map(str, words)])
        monkeypatch.setattr(signal, "signal", lambda *a: None)  # the tests' own handlers stay
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        main()

    return run


@pytest.fixture
def refusal(call, capsys):
    """refusal(main, words...): the one line in which a program refuses them."""

    def run(main, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            call(main, *words)
        out, err = capsys.readouterr()
        assert end.value.code == 2 and not out and re.fullmatch(r"error: [^\n]+\n", err)
        return err

    return run


def rival(script):
    """The main of a rival."""
    module = sys.modules[script]
    return lambda: _loop.main(script, module.Args, RIVALS[script], getattr(module, "TINY", None))


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
    assert {*SUMMARY} <= {*summary} <= {*SUMMARY, "simulation_steps", "watched"}
    assert summary["method"] == script.replace("_", "-") and summary["script"] == f"docs/{script}.py"
    assert set(summary["after"]) == set(summary["expert"]) == {"success", "se"}
    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2] and metrics[-1]["eval_n"] == 8
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
    assert len(list((cache / "tiny-models").glob("[!.]*"))) == 1
    first = [lines(out / "rollouts.jsonl")[:8] for out, _ in runs.values()]
    assert all(episodes == first[0] for episodes in first)


def test_the_base_is_the_one_of_nlac(call, monkeypatch):
    """nlac.main and the rivals ask common.load for the same thing: the cache knows a base by its corpus and constants."""
    asked = []

    def load(name, *, corpus, constants, **options):
        asked.append((name, corpus(), constants, options))
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "load", load)
    monkeypatch.setattr(common, "Run", lambda *a, **k: None)
    for main in nlac.main, rival("ppo"):
        with pytest.raises(KeyboardInterrupt):
            call(main, "--examples", 20)
    assert asked[0] == asked[1]


def test_match_stops_at_the_steps_of_another_run(runs, cache, call):
    other, _ = runs["self_distillation"]
    limit = json.loads((other / "summary.json").read_text())["env_steps"]
    out = cache / "runs" / "matched-s0"
    call(rival("ppo"), *flags_of(**SMALL | {"steps": 1, "eval_every": 100}, match=other, out_dir=out))
    metrics = lines(out / "metrics.jsonl")
    assert metrics[-2]["env_steps"] < limit <= metrics[-1]["env_steps"] and metrics[-1]["eval_n"] == 8


@pytest.mark.parametrize("script, flag, value", [
    ("ppo", "--gamma", 1.5), ("ppo", "--batch-size", 48), ("nlql", "--candidates", 1), ("ceiling", "--match", "nowhere"),
    ("self_distillation", "--resume", True), ("ceiling", "--verdicts", "mine"), ("early", "--resume", True),
    ("early", "--sft-batch-size", 0), ("early", "--env", "chess"), ("early", "--demos", "./nowhere.jsonl")])  # fmt: skip
def test_bad_settings_are_refused_and_nothing_is_written(tmp_path, refusal, script, flag, value):
    refusal(early_experience.main if script == "early" else rival(script), flag, value, "--out-dir", tmp_path / "run")
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


@pytest.fixture(scope="module")
def base(cache):
    """The small base model in this process: model, chat, world, args."""
    args = nlac.Args(**nlac.TINY | SMALL)
    world = envs.make("repair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return *nlac.load(world, args), world, args


def test_look_sees_each_turn_where_it_starts(base):
    model, chat, *_ = base
    head, rng = torch.nn.Linear(32, 1), random.Random(0)
    masks = [[0, 0, 0, 1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 1, 1]]
    rows = [([rng.randrange(40) for _ in mask], mask) for mask in masks]
    assert [ppo.reply_lengths(mask) for mask in masks] == [[2, 3], [1, 2]]
    logprobs, entropies, values = ppo.look(model, head, chat, rows, 0.7)
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


def ppo_step(base, **settings):
    model, chat, world, args = base
    args = ppo.Args(**nlac.TINY | ppo.TINY | SMALL | settings)
    learner = ppo.PPO(copy.deepcopy(model), chat, world, args)
    episodes = learner.act(1, range(8))
    for i, episode in enumerate(episodes):
        episode.score = float(i % 2)  # something to learn from, whatever the small model plays
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
        assert len(ppo.reply_lengths(mask)) == len(episode.valid) and sum(mask) == episode.tokens


def test_ppo_does_not_depend_on_micro_batch_and_rollout_batch(base):
    models = [ppo_step(base, micro_batch_size=n, rollout_batch_size=m)[0].model for n, m in ((2, 3), (8, 256))]
    for a, b in zip(*(model.parameters() for model in models)):
        assert torch.allclose(a, b, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ NLQL, played parts


def test_nlql_takes_the_best_and_skips_ties():
    assert nlql.best([1, 3, 3, 0]) == 1
    assert nlql.best([2, 2, 2, 2]) is None and nlql.best([None, None]) is None
    assert nlql.best([None, 0]) == 1


def played_state(seed, actions, env="repair"):
    """A transition from where these actions lead."""
    world = envs.make(env)
    episode = nlac.begin(world, "train", seed)
    for action in [*actions, "nonsense"]:
        nlac.take_turn(world, episode, action)
    return nlac.transitions(episode)[-1]


def refine(parts, states, action):
    """nlac.refine from this action on, as a played learner asks for it."""
    parts.asked = states
    return nlac.refine(parts, [t.state for t in states], ("test",), replies=[action] * len(states))


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
    args = module.Args(**nlac.TINY | getattr(module, "TINY", {}) | SMALL | settings)
    world = envs.make(args.env)
    return cls(model, chat, world, args)


@pytest.mark.parametrize("env", ["repair", "20q"])
def test_the_ceiling_does_not_know_what_is_hidden(base, env):
    """Two episodes with one dialogue and different hidden answers: the same futures, critiques, refinements and prompts, draw for draw."""
    first, second = twins(env)
    action = "charge the battery" if env == "repair" else "Is it an animal?"
    outcomes = []
    for seed in first, second:
        parts = parts_for(ceiling.Parts, base, ceiling, env=env, refiner="rule")
        state, prompts = played_state(seed, [], env), []

        class Watched(type(parts)):
            def ask(self, part, messages, *rest):
                prompts.append(messages)  # noqa: B023
                return super().ask(part, messages, *rest)

        parts.__class__ = Watched
        refined = refine(parts, [state] * 3, action)
        outcomes.append((state.state, refined, prompts, [e.said for e in parts.play([(state, action)] * 40, ("futures",))]))
    assert outcomes[0] == outcomes[1]


def test_the_ceiling_draws_all_that_fits_the_dialogue(base):
    parts = parts_for(ceiling.Parts, base, ceiling)
    world = envs.make("repair")
    seed = next(s for s in range(100) if "does not start" in world.reset(seed=s, options={"split": "train"})[0])
    won = [e.won for e in parts.play([(played_state(seed, []), "charge the battery")] * 200, ("a",))]
    assert 35 < sum(won) < 100  # three faults fit, whatever is hidden
    seen = played_state(seed, ["check the power"])
    right = next(repair for finding, repair in envs.make("repair").faults["does not start"][1].items() if finding in seen.state[-1])
    assert all(e.won for e in parts.play([(seen, right)] * 20, ("b",)))  # a finding that was seen stays
    args, state = dataclasses.replace(parts.args, env="20q"), played_state(3, ["Is it an animal?"], "20q")
    possible = set(ceiling.restored(args, state, random.Random(0)).consistent())
    assert {ceiling.restored(args, state, random.Random(i)).hidden for i in range(400)} == possible
    few = parts_for(ceiling.Parts, base, ceiling, rollout_batch_size=7)  # changes nothing
    rows = [(played_state(seed, []), "check the power") for seed in range(20)]
    assert [e.said for e in few.play(rows, ("c",))] == [e.said for e in parts.play(rows, ("c",))]


def test_the_rules_of_the_ceiling_are_what_the_warm_up_teaches(base):
    parts = parts_for(ceiling.Parts, base, ceiling, refiner="rule", k=4, examples=200)  # with 2 futures, none is ever "good"
    asked = {"evaluator": 0, "refiner": 0}
    for messages, reply in nlac.warmup(parts.world, parts.args):
        part = next((p for p in asked if messages[0]["content"].endswith(getattr(nlac, p.upper()))), None)
        if part:
            asked[part] += 1
            [said] = parts.ask(part, [messages], ("x",))
            drawn = part == "refiner" and nlac.rank(messages[-1]["content"]) < 3 and "goes on with" not in messages[-1]["content"]
            assert said == reply or drawn or part == "refiner" and reply not in messages[-1]["content"]
    assert min(asked.values()) == 200


def test_the_rules_of_the_ceiling(base):
    parts = parts_for(ceiling.Parts, base, ceiling, refiner="rule")
    t, lost = played_state(0, []), nlac.Future("It is still broken.", "", None)

    def refined(*futures):
        asked = nlac.refiner_messages(parts.world, t.state, [nlac.tried("swap the fuse", futures)])
        return {nlac.action_of(parts.world, reply) for reply in parts.ask("refiner", [asked] * 50, ("x",))}

    assert refined(lost, lost) <= set(parts.actions) - {"swap the fuse"} and len(refined(lost, lost)) > 5
    assert refined(lost, lost, nlac.Future("Nothing unusual.", "open the case", 2)) == {"open the case"}
    assert refined(*[nlac.Future("It works again.", "", 1)] * 2) == {"swap the fuse"}


def test_self_distillation_plays_the_world_as_it_is(base):
    """Its futures are real continuations: same hidden answer, told in the words of a future, and counted."""
    parts = parts_for(self_distillation.Parts, base, self_distillation)
    for seed in twins("repair"):
        world, t = envs.make("repair"), played_state(seed, [])
        world.reset(seed=seed, options={"split": "train"})
        right = world.faults[world.symptom][1][world.finding]
        wrong = next(r for r in world.repairs if r != right)
        parts.asked, parts.extra["env_steps"] = [t, t, t], 0
        won, lost = "Next: It works again. End: success in 1 turn.", "Next: It is still broken. End: failure."
        assert parts.foresee([t.state] * 3, [right, "", wrong], ("x",), 3) == [won] * 3 + [""] * 3 + [lost] * 3
        assert parts.extra["env_steps"] == 6


def test_played_futures_are_of_the_states_that_are_asked_about(base):
    """In later rounds, too: behind one dialogue there can be different hidden answers."""
    parts = parts_for(ceiling.Parts, base, ceiling, refiner="rule", m=3)
    states, asked = [played_state(seed, ["check the power"]) for seed in range(20)], []
    plain = parts.play
    parts.play = lambda rows, stream: asked.append(rows) or plain(rows, stream)
    tries = refine(parts, states, "open the case")
    assert len(asked) == 3 + (parts.args.distil == "best")
    for r, rows in enumerate(asked):
        wanted = [(t.seed, some[r].action) for t, some in zip(states, tries) for _ in range(parts.args.k)]
        assert [(t.seed, action) for t, action in rows] == wanted


# ------------------------------------------------------------------------------------- Early Experience, a baseline of ACT


EARLY = dict(env="repair", num_demos=8, eval_episodes=24, max_new_tokens=28, choice_tokens=40)
EARLY_ARGS = dataclasses.replace(act.Args(), **act.TINY | EARLY)


def expert_states(env="repair", split="train", seeds=range(8)):
    return act.states_of(act.demonstrations(dataclasses.replace(EARLY_ARGS, env=env), split, seeds))


@pytest.fixture(scope="module")
def reflected(cache):
    """A small run of docs/early_experience.py, with a tiny model that can do what it is told."""
    (cache / "early").mkdir()  # the rivals' cache holds their base alone
    out = cache / "early" / "run"
    return out, python(cache / "early", "early_experience.py", **EARLY, examples=600, steps=3, out_dir=out)


def customer(state):
    return state["messages"][0]["content"].split(" that ")[0]


def test_early_experience_runs_and_says_what_actions_led_to(reflected):
    out, result = reflected
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert {path.name for path in out.iterdir()} == {
        "args.json", "metrics.jsonl", "reflections.jsonl", "rollouts.jsonl", "summary.json", "model", "checkpoint", "demos.jsonl",
        "pairs.jsonl"}  # fmt: skip
    summary, told = json.loads((out / "summary.json").read_text()), lines(out / "reflections.jsonl")
    assert {*json.loads((out / "args.json").read_text())["args"]} == {
        field.name for field in dataclasses.fields(early_experience.Args)}  # fmt: skip
    assert {*SUMMARY} <= {*summary} and summary["arm"] == "early-experience" and summary["expert"]["success"] == 1
    counts, metrics = summary["pair_counts"], lines(out / "metrics.jsonl")
    assert metrics[0]["reflections_reflections"] == len(told) > 3
    assert counts["tokens"] + metrics[0]["reflections_tokens"] == summary["generated_tokens"]
    assert [row["step"] for row in metrics] == [1, 2, 3] and summary["gradient_steps"] == 3
    demos, test = expert_states(), expert_states(split="test", seeds=range(500))
    assert len(demos) == summary["expert_states"] and summary["train_episodes"] == 8
    for row in told:  # the train split alone: its seeds, its customers
        state = {key: value for key, value in row.items() if key != "reply"}
        assert state in demos and row["split"] == "train" and act.parse_action(row["reply"]) == row["expert"]
        words, action = row["reply"].split("<action>")
        assert words.strip() and "</action>" not in words and action == f"{row['expert']}</action>"
    assert not {customer(row) for row in told} & {customer(state) for state in test}
    assert f"test: success {summary['before']['success']:.3f}" in result.stdout + result.stderr
    assert len(common.load(str(out / "model"))[1].encode(early_experience.REFLECT)) == 1  # a line of its prompt is one token


@pytest.mark.parametrize("env", ["repair", "household"])
def test_outcomes_by_replay_are_what_the_world_says(env):
    world, other, count = envs.make(env), envs.make(env), 0
    for split in "train", "test":
        for state in expert_states(env, split, [3, 4]):
            earlier = [m["content"] for m in state["messages"][1::2]]
            actions = [state["expert"], *reversed(state["admissible"]), "dance", state["expert"]]
            found = early_experience.outcomes(world, state, actions)
            assert found == [envs.replay(other, state["seed"], [*earlier, action], split)[0] for action in actions]
            count += len(set(found))
        _, _, over, *_ = envs.replay(other, state["seed"], [*earlier, state["expert"]], split)
        assert over and other.won and found[0] == found[-1] == other.observation  # the expert's last action
    assert count > 20


def test_a_world_that_does_not_repeat_itself_is_noticed(refusal):
    first, second = expert_states(seeds=[3])
    other = second | {"messages": [*second["messages"][:2], {"role": "user", "content": "Hm."}]}
    for state in first | {"seed": 4}, first | {"split": "test"}, other:
        assert "does not repeat itself" in refusal(lambda: early_experience.outcomes(
            envs.make("repair"), state, ["check the power"]))  # noqa: B023


def test_a_reflection_is_the_models_own_words_and_the_experts_action(monkeypatch):
    world, asked, states = envs.make("repair"), [], expert_states(seeds=range(5))
    said = {  # what the model says: the words of it
        "It helps. <action>dance</action>": "It helps.", "no tags": "no tags", "": "", "<action>dance</action>": "",
        "a < b, so </action> it is <action>": "a < b, so", " <ACTION>": "", "**Because** <Action>x</Action> y": "**Because**",
        "<think>hm</think> So. <action>x</action>": "So."}  # fmt: skip
    candidates = [["check the power", "dance"], *[["swap the fuse"]] * (len(said) - 1)]  # of the last state: none
    pairs = [state | {"candidate": action} for state, actions in zip(states, candidates) for action in actions]

    def generate(model, chat, prompts, **how):
        asked.extend(prompts)
        assert how["max_new_tokens"] == state.args.choice_tokens
        return common.Replies(*zip(*[([4, 4], [-1, -1], text, True) for text in said])) if prompts else common.Replies([], [], [], [])

    monkeypatch.setattr(common, "generate", generate)
    model, chat = SimpleNamespace(max_context=4096), SimpleNamespace(dialogue=lambda messages: messages)
    args = dataclasses.replace(EARLY_ARGS, prefill=True, shots=2)
    state = act.Job(args, world, chat, model, states=states, pairs=pairs)
    told, counts = early_experience.reflect(state)
    wanted = [(state, words) for state, words in zip(states, said.values()) if words]
    assert len(states) > len(said) == len(asked)
    assert [row["reply"] for row in told] == [f"{words} {act.written(state['expert'])}" for state, words in wanted]
    assert [{key: value for key, value in row.items() if key != "reply"} for row in told] == [state for state, _ in wanted]
    steps = sum((len(actions) + 1) * (state["turn"] + 1) for state, actions in zip(states, candidates))  # of the replays
    assert counts == {"tokens": 2 * len(said), "reflections": 5, "unreadable": 3, "env_steps": steps, "cut_choice": 0,
                      "reflections too long": 0}  # fmt: skip
    for prompt, each, actions in zip(asked, states, candidates):
        system, *before, last = act.dialogue(world, EARLY_ARGS, each["messages"])  # without worked examples
        actions = [*actions, each["expert"]]  # the last one is the one to be praised
        results = [envs.replay(world, each["seed"], [*(m["content"] for m in each["messages"][1::2]), a])[0] for a in actions]
        assert prompt == [system, *before, {"role": "user", "content": "\n".join([
            last["content"], *(f"{a}: {result}" for a, result in zip(actions, results)), early_experience.REFLECT])}]
    model.max_context = 0  # nothing fits: nothing is asked
    told, counts = early_experience.reflect(state)
    assert told == [] and counts["reflections too long"] == len(candidates)


def test_words_that_were_cut_off_before_the_action_are_no_reflection():
    for text, complete, words in ("So it", False, ""), ("So it", True, "So it"), ("So. <action>x", False, "So."):
        assert early_experience.words_of(act.Reply(text, complete, [], [])) == words


def test_its_warm_up_sees_train_alone_and_no_expert(monkeypatch):
    def forbidden(self):
        raise AssertionError("the warm-up asked the expert")

    world, splits, args = envs.make("household"), set(), dataclasses.replace(EARLY_ARGS, env="household", examples=20)
    monkeypatch.setattr(type(world), "expert", forbidden)
    reset = world.reset
    monkeypatch.setattr(world, "reset", lambda **k: splits.add(k["options"]["split"]) or reset(**k))
    examples = early_experience.warmup(world, args)
    assert splits == {"train"} and examples == early_experience.warmup(envs.make("household"), args)
    own = [messages for messages in examples if early_experience.REFLECT in messages[-2]["content"]]
    rest = [messages for messages in examples if messages not in own]
    plain = act.warmup(world, args)
    assert len(own) == 20 and len(rest) == len(plain) and all(messages in plain for messages in rest)
    for *_, asked, reply in own:  # what it says of two random actions is what it was told
        one, two = asked["content"].split("\n")[-3:-1]
        assert reply == {"role": "assistant", "content": f"{one} {two} {act.written(two.split(':')[0])}"}


# ----------------------------------------------------------------------------------------------------- ACT's rationale test


@pytest.fixture(scope="module")
def acted(reflected, cache):
    """A small run of act.py, greedy in evaluation, that starts from the model at hand."""
    out = cache / "early" / "act"
    flags = flags_of(**EARLY | {"eval_temperature": 0, "choice_tokens": 28}, model=reflected[0] / "model", batch_size=8,
                     micro_batch_size=4, group_size=4, pipeline="act,il", steps=1, out_dir=out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *a: None)  # the tests' own handlers stay
        patch.setattr(sys, "argv", ["act.py", *flags])
        act.main()
    return out


@pytest.mark.parametrize("stage", ["", "model"])
def test_rationale_of_a_finished_run(call, acted, tmp_path, capsys, stage):
    run = tmp_path / "run"
    shutil.copytree(acted, run)
    call(rationale.main, run, "--states", 12, *(["--stage", stage] if stage else []))
    out, found = capsys.readouterr().out, json.loads((run / "rationale.json").read_text())
    assert json.loads(out) == found and set(found) == {
        "stage", "choices", "thought", "free", "removed", "wrong", "choice_first", "choice_second", "next_action"}  # fmt: skip
    (run / "rationale.json").unlink()
    assert everything_under(run) == everything_under(acted)
    assert found["stage"] == (stage or "1-act") and found["choices"] % 2 == 0 and found["choices"] >= 6
    assert found["free"] == pytest.approx((found["choice_first"] + found["choice_second"]) / 2)
    assert 0 <= found["next_action"] <= 1
    for key in "thought", "free", "removed", "wrong":
        assert 0 <= found[key] <= 1 and found[key] * found["choices"] == pytest.approx(round(found[key] * found["choices"])), key


def test_a_reply_begins_with_the_thought_it_is_given(monkeypatch):
    asked, chat = [], SimpleNamespace(dialogue=lambda messages, start: [*messages, start])
    pairs = [{"expert": action, "candidate": "dance", "admissible": None, "expert_second": second}
             for action, second in (("look", False), ("go", True), ("sing", False))]  # fmt: skip
    state = act.Job(EARLY_ARGS, envs.make("repair"), chat, None)

    def generate(model, chat, prompts, **how):
        asked.append((prompts, how["max_new_tokens"], how["temperature"]))
        return common.Replies([[0]] * 3, [[0.0]] * 3, answers, [True] * 3)

    def accuracy(thoughts):
        share, replies = rationale.accuracy(state, [["a"], ["b"], ["c"]], thoughts, pairs)
        return share, [reply.text for reply in replies]

    monkeypatch.setattr(common, "generate", generate)
    answers = ["Hm. <action>look</action>", "<action>Action 1</action>", "sing"]
    assert accuracy([None] * 3) == (1 / 3, answers)
    assert asked.pop() == ([["a", ""], ["b", ""], ["c", ""]], 40, 0)
    answers = ["look</action>", "Action 2</action>", "sing"]  # what follows the tag
    found = accuracy(["", "x ", "Hm. "])
    assert found == (2 / 3, ["<action>look</action>", "x <action>Action 2</action>", "Hm. <action>sing"])
    assert asked.pop() == ([["a", "<action>"], ["b", "x <action>"], ["c", "Hm. <action>"]], 40, 0)


@pytest.mark.parametrize("count", [2, 3, 7, 30])
def test_a_wrong_thought_is_about_another_state(call, acted, tmp_path, monkeypatch, count):
    shutil.copytree(acted, tmp_path / "run")
    states, asked = expert_states(split="test", seeds=range(count))[::2], []

    def accuracy(state, prompts, thoughts, of):
        asked.append((prompts, thoughts, of))
        return 0.5, [act.Reply(f"{n} {pair['seed']} <action>dance</action>", True, [], []) for n, pair in enumerate(of)]

    monkeypatch.setattr(act, "propose", lambda state, some: [each | {"candidates": ["dance"]} for each in states])
    monkeypatch.setattr(rationale, "accuracy", accuracy)
    call(rationale.main, tmp_path / "run", "--states", 4)
    (free, _, _), (removed, _, _), (wrong, thoughts, of) = asked
    assert len(states) == count and len(of) == 2 * count and free == removed == wrong
    assert all(one != two for one, two in zip(free[:count], free[count:], strict=True))  # both orders
    assert [thoughts for _, thoughts, _ in asked[:2]] == [[None] * 2 * count, [""] * 2 * count]
    assert len(set(thoughts)) == 2 * count  # each is used once
    assert all(int(thought.split()[1]) != pair["seed"] for thought, pair in zip(thoughts, of))


@pytest.mark.parametrize("arguments, words", [
    (["{tmp}/nowhere"], "no run of act.py"), (["{tmp}"], "no run of act.py"), (["{run}/model"], "no run of act.py"),
    (["{run}", "--stage", "3-rl"], "no model there"), (["{reflected}", "--stage", "2-il"], "no model there")])  # fmt: skip
def test_rationale_refuses_in_one_line(refusal, acted, reflected, tmp_path, arguments, words):
    before = [everything_under(path) for path in (tmp_path, acted, reflected[0])]
    arguments = [argument.format(tmp=tmp_path, run=acted, reflected=reflected[0]) for argument in arguments]
    assert words in refusal(rationale.main, *arguments)
    assert [everything_under(path) for path in (tmp_path, acted, reflected[0])] == before


# --------------------------------------------------------------------------------------------------- what a judge is worth


def judged_episode(score, won, *names):
    """Of an attempt with these flaws, which the judge gives this score."""
    flaws = [envs.Flaw(name, envs.FLAWS[name][0], "", "") for name in names]
    return reagent.Episode("test", 0, [["world", "Q"], ["act", "A"], ["judge", ""]], won=won, judge_score=score, flaws=flaws)


def test_calibration_and_lucky_answers_by_hand():
    found = [judged_episode(1.0, True), judged_episode(0.8, True, "repeated call"), judged_episode(0.85, True, "skipped lookup"),
             judged_episode(0.2, True, "unsupported guess"), judged_episode(0.19, False), judged_episode(0.0, False, "no answer")]
    rows = judge.fifths(found)
    assert [row["episodes"] for row in rows] == [2, 1, 0, 0, 3]  # the highest score is within the last fifth
    assert rows[0] == {"episodes": 2, "score": pytest.approx(0.095), "reference": pytest.approx(0.75), "success": 0.0}
    assert rows[4] == {"episodes": 3, "score": pytest.approx(2.65 / 3), "reference": pytest.approx(0.8), "success": 1.0}
    assert rows[2] == {"episodes": 0, "score": None, "reference": None, "success": None}
    assert judge.lucky(found) == {
        "sound": {"episodes": 2, "score": pytest.approx(0.9)}, "lucky": {"episodes": 2, "score": pytest.approx(0.525)},
        "auc": 0.75}  # 0.8 is below the lucky 0.85  # fmt: skip
    nothing = {"episodes": 0, "score": None}
    assert judge.lucky(found[4:]) == {"sound": nothing, "lucky": nothing, "auc": None}
    assert judge.numbers_of(found)["readable"] == 0


@pytest.fixture(scope="module")
def trained(cache):
    """What is read of a finished run: settings, a judge and an agent."""
    args, out = reagent.Args(**reagent.TINY | {"model": "tiny:32x1", "examples": 60, "judge_tokens": 60}), cache / "trained"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        model = reagent.load(envs.make(args.env), args)
        common.save_model(out / "rrm", *model)
        common.save_model(out / "model", *model)
    (out / "args.json").write_text(json.dumps({"args": dataclasses.asdict(args)}))
    return out


def test_judge_of_a_finished_run(trained, call, monkeypatch, capsys):
    reviewed, review = [], reagent.review
    monkeypatch.setattr(reagent, "review", lambda state, episodes, stream: reviewed.append(episodes) or review(
        state, episodes, stream))
    call(judge.main, trained, "--episodes", 40)
    numbers, out = json.loads((trained / "judge.json").read_text()), capsys.readouterr().out
    for who, episodes in zip(("players", "agent"), reviewed, strict=True):
        assert numbers[who]["episodes"] == 40 == sum(row["episodes"] for row in numbers[who]["fifths"])
        assert {e.split for e in episodes} == {"test"} and numbers[who] == judge.numbers_of(episodes)
    assert out.count("    judge: ") >= 2 and "\nlost, " in out and "\nlost by the agent, " in out


@pytest.mark.parametrize("script", [judge, second_attempts])
@pytest.mark.parametrize("damage, words", [
    ("args.json", "no run of reagent.py"), ("rrm", "its judge is missing"), ("model", "its trained agent is missing"),
    ("junk", "not the settings"), ("none", "it had no judge")])
def test_what_is_no_finished_run_is_refused_in_one_line(trained, tmp_path, refusal, script, damage, words):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    own = {"junk": {"pool": "joint"}, "none": {"variant": "none"}}.get(damage)
    if own:
        with_settings(run, **own)
    else:
        (run / damage).rename(tmp_path / "away")
    before = everything_under(run)
    assert words in refusal(script.main, run)
    assert everything_under(run) == before


def with_settings(run, **own):
    """Changes settings of a run."""
    args = json.loads((run / "args.json").read_text())["args"]
    (run / "args.json").write_text(json.dumps({"args": args | own}))


def test_the_judge_of_a_run_is_trained_given_or_the_start_model(trained, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "rrm").rename(tmp_path / "elsewhere")
    start = common.load(str(trained / "model"))[0]
    for own in {"rrm": str(tmp_path / "elsewhere")}, {"rrm": "", "judged": 0}:
        with_settings(run, **own)
        state = judge.state_of(run)
        assert common.fingerprint(state.rrm.model) == common.fingerprint(start) and state.rrm.optimizer is None


# ------------------------------------------------------------------------------- Reagent's second attempts, and other judges


def test_second_attempts_by_hand():
    again = {"judge": [True, True, False, True], "nothing": [True, False, False, False]}
    rows = second_attempts.summary([True, False, False, False], again)
    assert rows["first"]["all"] == {"success": 0.25, "se": pytest.approx(0.25), "n": 4}
    assert rows["judge"]["all"]["success"] == 0.75 and rows["judge"]["won"]["n"] == 1
    assert rows["judge"]["lost"] == {"success": pytest.approx(2 / 3), "se": pytest.approx(1 / 3), "n": 3}
    assert rows["judge"]["minus_nothing"] == {"difference": 0.5, "se": pytest.approx(math.sqrt(1 / 12))}
    assert rows["nothing"]["minus_nothing"] == {"difference": 0.0, "se": 0.0}
    assert list(second_attempts.table(rows))[2].split() == ["judge", "0.750", "0.667", "1.000", "+0.500", "(0.289)"]


def test_second_attempts_differ_in_the_critique_alone(trained, call, monkeypatch, capsys):
    played, attempt = [], reagent.attempt
    monkeypatch.setattr(reagent, "attempt", lambda state, split, seeds, stream, earlier=None: played.append(
        (earlier, stream, attempt(state, split, seeds, stream, earlier))) or played[-1][2])
    monkeypatch.setattr(reagent, "judge", lambda state, transcripts, stream: [
        reagent.Judgement(critique=f"Number {i}.", asked=1) for i in range(len(transcripts))])
    call(second_attempts.main, trained, "--episodes", 6)
    (none, _, first), *again = played
    assert none is None is again[4][0] and len(again) == 5
    assert len({stream for _, stream, _ in again}) == 1  # the same random numbers
    assert all([e.said for e in before] == [e.said for e in first] for before, *_ in again[:4])
    by_judge, by_annotator, other, nothing = ([e.critique for e in before] for before, *_ in again[:4])
    assert by_judge == [f"Number {i}." for i in range(6)] and other == by_judge[1:] + by_judge[:1] and nothing == [""] * 6
    assert by_annotator == [reagent.annotate(e.flaws)[1] for e in first] and all(e.flaws and e.split == "test" for e in first)
    rows = json.loads((trained / "second_attempts.json").read_text())
    assert tuple(rows) == ("first", *second_attempts.WAYS) and rows["judge"]["all"]["n"] == 6
    assert "annotator" in capsys.readouterr().out


GRPO = dict(model="tiny:32x1", examples=60, max_new_tokens=12, steps=1, batch_size=8, group_size=4, micro_batch_size=4, eval_episodes=2)


@pytest.mark.parametrize("judging", ["annotator", "shuffled"])
def test_other_judges_of_the_agents_attempts(trained, call, tmp_path, monkeypatch, judging):
    streams = []

    def numbered(state, transcripts, stream):
        streams.append(stream[0])
        texts = [f"Number {i}." for i in range(len(transcripts))]
        return [reagent.Judgement(text, critique=text, score=i / 100, asked=1) for i, text in enumerate(texts)]

    monkeypatch.setattr(reagent, "judge", numbered)
    call(other_judge.main, *flags_of(**GRPO, judge_tokens=60, cold_start=4, cold_epochs=1, rrm=trained / "rrm", judging=judging,
                                     out_dir=tmp_path / "run"))  # fmt: skip
    rollouts = trained_on(tmp_path / "run")
    sides = [[e for e in rollouts if e["second"] == again] for again in (False, True)]
    assert json.loads((tmp_path / "run" / "args.json").read_text())["args"]["judging"] == judging
    assert streams == ["quality"] * 2 + ["learn"] * 2 * (judging == "shuffled")
    for episodes in sides:
        assert len(episodes) == 8
        for i, e in enumerate(episodes):
            reference = reagent.annotate([envs.Flaw(*flaw) for flaw in e["flaws"]])
            number = (i + 4) % 8  # of the other question
            text, score = ((reagent.judgement_text(*reference), reference[2]) if judging == "annotator"
                           else (f"Number {number}.", number / 100))
            assert e["said"][-1] == ["judge", text] and e["judge_score"] == pytest.approx(score)
            assert e["critique"] == (reference[1] if judging == "annotator" else text)
            assert e["earned"] == pytest.approx(e["score"] + 0.3 * score)


@pytest.mark.parametrize("rating", ["exact", "shuffled"])
def test_other_raters_are_right_or_of_another_task_and_never_trained(call, tmp_path, monkeypatch, rating):
    batches, update = [], self_guide.update
    monkeypatch.setattr(self_guide, "update", lambda *args, **how: batches.append(args[5]) or update(*args, **how))
    call(other_rater.main, *flags_of(**GRPO, rate_tokens=12, updates=1, rating=rating, out_dir=tmp_path / "run"))
    [batch] = batches
    right = [exact_ratings(episode) for episode in batch]
    for row, episode in enumerate(batch):
        rated = [text for who, text in episode.said if who == "rate"]
        assert len(rated) == len(episode.actions) - 1 == len(episode.labels) and None not in episode.labels
        given = right[row if rating == "exact" else (row + 4) % 8]  # the other group is another task
        assert rated[:len(given) - 1] == given[:len(rated)]
        assert sum(episode.mask) <= 12 * len(episode.actions)  # only what the policy sampled to act


def exact_ratings(episode):
    """The ratings of an episode's steps that a random player's chances make right, by a fresh replay."""
    world = envs.make("household")
    world.reset(seed=episode.seed, options={"split": episode.split})
    prospects, found = self_guide.Prospects(world), []
    for action in episode.actions:
        prospects.before(world)
        info = world.step(action)[4]
        found.append(self_guide.rating_text(world, prospects, prospects.label(world, info["valid"])))
    return found


# --------------------------------------------------------------------------------- what players and untrained models do


def test_the_gates_of_self_guides_dose(monkeypatch):
    """Of a played episode, the labels that are right and the hints that are taken, by hand."""
    world = envs.make("household")
    _, info = world.reset(seed=3, options={"split": "train"})
    prospects, action = self_guide.Prospects(world), info["admissible"][0]
    prospects.before(world)
    *_, info = world.step(action)
    name = prospects.label(world, info["valid"])
    undo = prospects.advised(world, "negative", info["admissible"])
    episode = self_guide.Episode("train", 3, actions=[action, "nonsense", "nonsense"], won=True,
                                 labels=[self_guide.LABELS.index(name) - 1, None])  # fmt: skip
    first, second = self_guide_dose.labelled_steps("household", episode)
    assert first == (name, True, undo, "nonsense") and second[:2] == ("none", False)
    monkeypatch.setattr(self_guide, "rollout", lambda *a, **k: [episode] * 4)
    found = self_guide_dose.gates(None, None, self_guide.Args(), 4)
    assert found["labels"] == 8 and found["right"] == 0.5 and found["success"] == {"plain": [1.0, 0.0], "guided": [1.0, 0.0]}
    assert set(found["undone"].values()) <= {0.0} and set(found["undo_possible"].values()) <= {4}


def test_hints_help_a_random_player_and_half_of_them_less():
    plain, hinted, noisy = (self_guide_dose.rule("household", *how, count=60)["success"][0]
                            for how in ((False, 0.0), (True, 0.0), (True, 1.0)))  # fmt: skip
    assert hinted > plain + 0.1 and noisy < hinted


@pytest.mark.parametrize("script, parts", [
    ("nlac", {"policy", "successor", "backup", "evaluator", "refiner"}), ("act", {"proposal", "choice"}), ("reagent", {"judge"}),
    ("self_guide", {"rate"})])  # fmt: skip
def test_zero_shot_asks_every_part(call, refusal, tmp_path, capsys, script, parts):
    assert script in refusal(zero_shot.main, "ppo")
    short = {"forecast_tokens": 12, "critique_tokens": 12, "k": 1, "m": 1} if script == "nlac" else {}
    call(zero_shot.main, script, *flags_of(**short, model="tiny:32x1", examples=60, eval_episodes=4, max_new_tokens=12,
                                           out_dir=tmp_path))  # fmt: skip
    [path] = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert path.name == f"{script}-{found['env']}-0.json" and found["n"] == 4 and len(found["episodes"]) == 3
    assert parts >= set(found["parts"]) and {name for name in parts if name in found["samples"]} == parts - {"policy"}
    for told in found["parts"].values():
        assert 0 <= told["read"] <= 1 and 0 <= told["cut"] <= 1
    short = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert short.items() <= found.items() and "samples" not in short


def test_scores_of_players(call, refusal, tmp_path, capsys):
    out = tmp_path / "worlds.json"
    out.write_text(json.dumps([{"world": "search", "won": 1}, {"world": "repair", "won": 9}]))
    call(world_scores.main, "repair", "household", "--episodes", 8, "--out", out)
    found = json.loads(out.read_text())
    assert [(row["world"], row.get("split"), row.get("player")) for row in found] == [
        ("search", None, None), ("repair", "test", "random"), ("repair", "test", "expert"), ("household", "test", "random"),
        ("household", "test", "expert"), ("household", "ood", "random"), ("household", "ood", "expert"),
        ("household, all verbs offered", "test", "random")]  # fmt: skip
    assert found[2]["won"] == 1.0 and found[2]["turns"] == 2.0 and found[2]["invalid"] == 0.0
    mean, se = envs.mean_score(envs.make("household"), envs.random_player, 8, "ood")
    assert found[5]["score"] == round(mean, 4) and found[5]["score_se"] == round(se, 4)
    capsys.readouterr()
    call(world_scores.main, "search", "--player", "guess", "--split", "ood", "--episodes", 4)
    assert json.loads(capsys.readouterr().out)["longest"] == 1 and len(json.loads(out.read_text())) == 8
    for words in ["chess", "--player", "random"], ["repair", "--player", "nobody"]:
        refusal(world_scores.main, *words)
