"""reagent.py: flags, parsers, judge, loss, masks, leaks, warm-up, whole runs, bad input.

What all scripts promise is in test_contract.py.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
import random
import re
import shutil
import sys
import time
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import (
    LOG,
    PAD,
    SUMMARY,
    Bigram,
    everything_under,
    lines,
    random_episodes,
    random_table,
    refused,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import envs
import reagent as ra

torch.set_num_threads(1)
WORLD = envs.make("search")
# 2 updates of the cold start, 2 of the judge's SFT, 1 of its GRPO, 2 of learning: checkpoints stand
# in the middle of phases
SMALL = (
    "--model tiny:32x1 --examples 60 --steps 2 --batch-size 8 --micro-batch-size 4 --group-size 4 "
    "--eval-episodes 2 --eval-every 1 --save-every 3 --judged 16 --judge-steps 1 --judge-epochs 1 "
    "--cold-start 16 --cold-epochs 1 --max-new-tokens 12 --judge-tokens 32 --sft-batch-size 8 "
    "--kl 0.01"
)
AGENT = ["cold-start"] * 2 + ["learn"] * 2
STEPS = AGENT[:2] + ["judge-sft"] * 2 + ["judge-grpo"] + AGENT[2:]
TINY = dataclasses.replace(ra.Args(), **ra.TINY)
ARGS = dataclasses.replace(
    TINY, model="tiny:32x1", examples=60, max_new_tokens=12, judge_tokens=32, batch_size=8,
    group_size=4, micro_batch_size=4, updates=1, kl=0.0,
)  # fmt: skip
GOOD = "<think>No flaw.</think>\n<critique>Go on like this.</critique>\n<score>0.5</score>"
PAPER = {  # the sheet's hyperparameters; 32 questions of 8 first attempts
    "lr": 5e-7, "batch_size": 32 * 8, "temperature": 0.7, "eval_temperature": 0.6, "group_size": 8,
    "updates": 32 // 16, "clip": 0.2,
    "clip_high": 0.2, "score_weight": 0.3, "pool": "joint", "judge_epochs": 2, "cold_epochs": 2,
    "sft_batch_size": 32, "sft_lr": 1e-5,
}  # fmt: skip


# -------------------------------------------------------------------------------------------- flags


def test_the_defaults_are_the_papers():
    fields = {field.name: field for field in dataclasses.fields(ra.Args)}
    assert {name for name, field in fields.items() if "(paper)" in field.metadata["help"]} == set(
        PAPER
    )
    assert {name: fields[name].default for name in PAPER} == PAPER
    assert ra.Args().judged == 0 and ra.Args().micro_batch_size == 1 and set(ra.TINY) < set(fields)
    for field in fields.values():
        assert "=" not in field.metadata["help"] and len(field.metadata["help"]) < 130


@pytest.mark.parametrize(
    "model, judged, micro", [("tiny", 3000, 16), ("tiny:32x1", 3000, 16), ("smollm2", 0, 1)]
)
def test_a_tiny_model_has_defaults_of_its_own(monkeypatch, model, judged, micro):
    monkeypatch.setattr(sys, "argv", ["reagent.py"])
    args = common.parse_args(ra.Args, ra.TINY, ["--model", model])
    assert (args.judged, args.micro_batch_size) == (judged, micro)
    small = ra.quick(args)
    assert (
        small.steps == 2
        and small.judged <= 16
        and small.cold_start <= 4
        and small.eval_episodes <= 16
    )
    ra.check_args(dataclasses.replace(small, device="cpu"))


# ----------------------------------------------------------------------------------- what is parsed


def blocks(score, think="t", critique="c"):
    return f"<think>{think}</think>\n<critique>{critique}</critique>\n<score>{score}</score>"


WITHOUT_THINK, WITHOUT_CRITIQUE = (
    re.sub(rf"<{name}>.*</{name}>\n", "", GOOD) for name in ("think", "critique")
)


@pytest.mark.parametrize("text, score", [
    # numbers
    (blocks("0.7"), 0.7), (blocks("0"), 0), (blocks("1"), 1), (blocks("1.0"), 1), (blocks("1."), 1),
    (blocks(" 0.25\n"), 0.25),
    (blocks(".5"), 0.5), (blocks("0.5/1"), 0.5), (blocks("8/10"), 0.8), (blocks("7.5 / 10"), 0.75),
    (blocks("8 out of 10"), 0.8),
    (blocks("80%"), 0.8), (blocks("1/1"), 1), (blocks("0/10"), 0), (blocks("0%"), 0),
    (blocks("**0.7**"), 0.7), (blocks("`0.7`"), 0.7),
    (blocks("Score: 0.7"), 0.7), (blocks("0.7."), 0.7), (blocks("0.7 (good)"), 0.7),
    (blocks("0.7 - a good start"), 0.7),
    (blocks("\n\n**0.4**\nbecause of 3 repeated calls"), 0.4), (blocks("(0.7)"), 0.7),
    (blocks("0.7 (on a scale of 0 to 1)"), 0.7),
    (blocks("0." + "1" * 300), 1 / 9),
    (blocks("1.01"), None), (blocks("2"), None), (blocks("8"), None), (blocks("-0.1"), None),
    (blocks("\u22120.1"), None),
    (blocks("nan"), None), (blocks("inf"), None), (blocks("1e-3"), None), (blocks("9" * 400), None),
    (blocks("11/10"), None),
    (blocks("0.8/10"), None), (blocks("0.8%"), None), (blocks("120%"), None),
    (blocks("0.6-0.8"), None), (blocks("0.6 or 0.8"), None),
    (blocks("0.5/0"), None), (blocks("1/0.5"), None), (blocks("0,7"), None), (blocks("1.5"), None),
    (blocks("\u0661"), None),
    (blocks("0.\u0665"), None), (blocks(""), None), (blocks("high"), None), (blocks("0.7x"), None),
    (blocks("1.2.3"), None),
    # blocks and what stands around them
    (f" {GOOD}\n\n", 0.5), (f"```xml\n{GOOD}\n```", 0.5), (f"Here is my judgement:\n\n{GOOD}", 0.5),
    (GOOD + "\n\nI hope it helps!", 0.5),
    (GOOD.upper(), 0.5), (GOOD.replace("score", "Score"), 0.5),
    (GOOD.replace("<", "< ").replace("< /", "</ "), 0.5),
    (f"**1.** {GOOD}".replace("\n", "\n\n### Next\n"), 0.5), (GOOD.replace("</score>", ""), 0.5),
    (GOOD.replace("0.5</score>", "0.5\n"), 0.5),
    (GOOD.replace("</think>\n<critique>", "</think> and so <critique>"), 0.5),
    (blocks("0.1") + "\nNo, rather:\n" + GOOD, 0.5), (GOOD * 2, 0.5),
    (GOOD + " The <score> is high as nothing was repeated.", 0.5),
    (blocks("0.5", think="What a <score> would be fair?"), 0.5),
    (f"<think>a thinking model's own</think>\n\n{GOOD}", 0.5),
    (f"one that its template began</think>\n\n{GOOD}", 0.5), (f"</think>{GOOD}", 0.5),
    (f"a</think>b</think>{GOOD}", 0.5),
    (f"<think>First <think>, then <critique> and <score>.</think>\n\n{GOOD}", 0.5),
    (f"<think>Perhaps {blocks('0.9')}? No.</think>\n{GOOD}", 0.5),
    (f"<think>own</think>\n{WITHOUT_THINK}", 0.5),
    ("", None), ("0.5", None), (WITHOUT_THINK, None), (WITHOUT_CRITIQUE, None),
    (GOOD.split("<score>")[0], None),
    (GOOD.replace("</think>", ""), None), (GOOD.replace("</critique>", ""), None),
    (blocks("0.1") + blocks("2"), None),
    (blocks("0.5", critique="a</critique><critique>b"), None),
    ("<score>1</score><think>t</think><critique>c</critique>", None),
    ("Think: fine. Critique: go on. Score: 0.5", None),
])  # fmt: skip
def test_parse_judgement(text, score):
    found = ra.parse_judgement(text)
    assert (found and found["score"]) == (
        score if score is None else pytest.approx(score, abs=1e-9)
    )
    assert found is None or set(found) == {"think", "critique", "score"}


def test_parse_judgement_keeps_the_words():
    assert ra.parse_judgement(blocks("0.2", " a\nb ", "\nDo it again. ")) == {
        "think": "a\nb",
        "critique": "Do it again.",
        "score": 0.2,
    }
    assert ra.parse_judgement(f"<think>native</think>{GOOD}")["think"] == "No flaw."
    assert ra.parse_judgement(blocks("1", "", ""))["critique"] == ""
    assert ra.parse_judgement(blocks("0.1") + GOOD)["critique"] == "Go on like this."


SAID = envs.tool_call("search", "Mira Velden")
GO = "go to fridge 1"


@pytest.mark.parametrize("env, reply, action", [
    *(("search", reply, SAID) for reply in (
        SAID, f"I look her up.\n{SAID}", f"Action:\n{SAID}", f"**Action:** {SAID}",
        f"```\n{SAID}\n```", f"{SAID}\nThat should do.",
        f"<think>or {envs.tool_call('answer', 'Nobody')}</think>\n{SAID}",
        f"begun by the template</think>{SAID}",
        f"{envs.tool_call('answer', 'Nobody')}\nNo:\n{SAID}", SAID.replace("\n", ""),
        SAID.replace("</tool_call>", ""),
        SAID.upper().replace(SAID.upper()[12:-13], SAID[12:-13]))),
    *(("household", reply, GO) for reply in (
        f"Action: {GO}", GO, f"The fridge may hold food.\nAction: {GO}", f"**Action:** {GO}",
        f"Action:\n\n{GO}", f"action : {GO}",
        f"## Action\n{GO}", f"Action: `{GO}`", f"Action: **{GO}**",
        f"Action: look\nOn second thought:\nAction: {GO}",
        f"<think>Action: look</think>Action: {GO}", f"Action: {GO}\n",
        f"Action: {GO}\n\nThen I open it.")),
    ("household", "<think>Action: look", ""), ("search", "<think>I will " + SAID, ""),
    ("household", "", ""),
])  # fmt: skip
def test_what_is_read_in_a_reply(env, reply, action):
    world = envs.make(env)
    world.reset(seed=0)
    e = {"history": [], "actions": [], "valid": []}
    info = ra.take_turn(world, e, reply)
    assert (
        e["actions"] == [action] == [info["action"]] == [world.read(common.aloud(reply))]
        and e["history"][0] == reply
    )


@pytest.mark.parametrize("env", [*envs.WORLDS, "20q"])
def test_the_experts_action_as_the_agent_writes_it_wins(env):
    world = envs.make(env)
    for seed in range(10):
        _, e = (
            world.reset(seed=seed, options={"split": "train"}),
            {"history": [], "actions": [], "valid": [], "over": False},
        )
        while not e["over"]:
            ra.take_turn(world, e, ra.written(world, world.expert(), ra.expert_thought(world)))
        assert e["won"] and all(e["valid"]) and e["rule"] == 1
    asked, rubric = (
        ra.opening(world, "Q")[0]["content"],
        ra.judge_messages(world, ["Q"])[0]["content"],
    )
    assert ("Action:" in asked) == (not world.tools) and ("tools" in rubric) == bool(world.tools)


TAGS = [f"<{slash}{name}>" for name in ("think", "critique", "score") for slash in ("", "/")]
PIECES = st.sampled_from([
    *TAGS, "".join(TAGS[:4]), "".join(TAGS[:4]) + "<score>", "0.5", "1", "0", "1.0000001", "-1",
    "nan", "1e999", "9" * 50, "\u0663", "\n",
    "\x85", "\u2028", " ", "\x00", "\ud800", "\U0001f600", "<", "think", "Go on like this.",
    "{critique}", "<|im_end|>",
])  # fmt: skip


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=9).map("".join),
                 st.tuples(*[st.one_of(PIECES, st.text(max_size=5),
                     st.floats().map(str))] * 3).map(lambda x: blocks(*x))))  # fmt: skip
def test_no_string_upsets_a_parser(text):
    found = ra.parse_judgement(text)
    if found is not None:
        assert 0 <= found["score"] <= 1 and all(tag not in found["critique"] for tag in TAGS)
        assert "<think>" not in found["think"] and all(
            f"<{name}>" in text.lower() for name in ("think", "critique", "score")
        )
    assert 0 <= ra.judge_reward(text, 0.5) <= 1 and (ra.judge_reward(text, 0.5) == 0 or found)
    assert ra.transcript(["a", text, "the end"]) == f"Agent: {common.aloud(text)}"
    assert ra.opening(WORLD, text, (["a", text, "b"], text))[0]["content"].startswith(WORLD.system)


@pytest.mark.parametrize("unit",
    ["<think>", "</think><critique>", "</think><critique></critique>", "<think></think>", " ", "\n",
        "a", "0",
                                  "</critique> ", "<score>0.5</score>", "0.5 ",
                                  "</think><critique></critique><score>"])  # fmt: skip
def test_megabytes_take_bounded_time(unit):
    text, start = unit * (500_000 // len(unit)), time.process_time()
    for long in (
        text,
        "<think>" + text,
        "<think>a</think><critique>" + text,
        GOOD.replace("</score>", text),
    ):
        ra.parse_judgement(long)
        ra.parse_score(long)
        common.aloud(long)
    assert time.process_time() - start < 5


def test_transcript_by_hand():
    history = [
        "Who? 8 turns left.",
        "<think>hm</think>I go.\ngo",
        "A. 7 turns left.",
        " stop ",
        "That is it. You win after 2 turns.",
    ]
    seen = (
        "Agent: I go.\ngo\nObservation: A. 7 turns left.\nAgent: stop"  # how it ended is not in it
    )
    assert ra.transcript(history) == seen
    assert ra.transcript(history[:3]) == "Agent: I go.\ngo" and ra.transcript(history[:1]) == ""
    listed = [
        history[0] + envs.LISTING + "a\nb",
        history[1],
        history[2] + envs.LISTING + "c",
        *history[3:],
    ]
    assert ra.transcript(listed) == seen and ra.case(listed) == ra.case(history)
    cut = ["Who?", "<think>a</think>go<think>cut\noff", "A.", "<think>cut off", "B."]
    assert ra.transcript(cut) == "Agent: go\nObservation: A.\nAgent: "
    assert ra.transcript(["Who?", "the template began this\n</think>\ngo", "A."]) == "Agent: go"
    for env, rubric in ("search", ra.TOOLS), ("household", ra.ACTIONS):
        world = envs.make(env)
        system, user = ra.judge_messages(world, history)
        assert (
            user["content"]
            == f"The task:\nWho? 8 turns left.\n\nThe transcript:\n{seen}\n\n"
            "Now write the three blocks."
        )
        assert system["content"] == ra.JUDGE.format(rubric=rubric, system=world.system) and system[
            "content"
        ].endswith(world.system)


def test_spoken_by_hand():
    history = ["Who?", "go", "A. 7 turns left.", "stop", "You win after 2 turns."]
    said = [
        ("assistant", "go"),
        ("user", "A. 7 turns left."),
        ("assistant", "stop"),
    ]  # neither how it began nor how it ended
    assert ra.spoken(history) == [{"role": role, "content": text} for role, text in said]
    assert (
        ra.spoken(history[:3]) == [{"role": "assistant", "content": "go"}]
        and ra.spoken(history[:1]) == []
    )


# ----------------------------------------------------------------------------- the judge's training


def test_annotate_by_hand():
    flawless = "Every call was needed, and the answer follows from what was read."
    assert (
        ra.annotate([])
        == f"<think>{flawless}</think>\n<critique>Go on like this.</critique>\n<score>1.0</score>"
    )
    for n in range(len(ra.COSTS) + 1):
        for flaws in itertools.combinations(ra.COSTS, n):
            found = ra.parse_judgement(ra.annotate(flaws))
            assert found["score"] == pytest.approx(
                max(0, 1 - sum(ra.COSTS[flaw] for flaw in flaws)), abs=1e-9
            )
            assert [advice in found["critique"] for advice in ra.ADVICE.values()] == [
                flaw in flaws for flaw in ra.ADVICE
            ]
            assert [words in found["think"] for words in ra.FOUND.values()] == [
                flaw in flaws for flaw in ra.FOUND
            ]
    assert set(ra.COSTS) == set(ra.ADVICE) == set(ra.FOUND) and set(envs.FLAWS) - set(ra.COSTS) == {
        "lucky answer"
    }  # that one is told by the outcome


def test_the_annotator_sees_neither_outcome_nor_answer(monkeypatch):
    """With other right answers players and annotator say the same, though nobody wins."""
    seen, flaws = [], envs.search_flaws
    monkeypatch.setattr(
        envs,
        "search_flaws",
        lambda question, steps, **rest: (
            seen.append((question, str(steps), rest)) or flaws(question, steps, **rest)
        ),
    )
    found = ra.trajectories(ARGS, "train", range(40), "x")
    assert all(not rest for *_, rest in seen)  # the outcome is an option of search_flaws
    begin = envs.Search.begin
    monkeypatch.setattr(
        envs.Search,
        "begin",
        lambda self, *a: [begin(self, *a), vars(self).update(gold="Zyx Quux")][0],
    )
    other = ra.trajectories(ARGS, "train", range(40), "x")
    assert [e["flaws"] for e in found] == [e["flaws"] for e in other] and "Zyx" not in str(other)
    assert any(e["won"] for e in found) and not any(e["won"] for e in other)
    assert [ra.judge_messages(WORLD, e["history"]) for e in found] == [
        ra.judge_messages(WORLD, e["history"]) for e in other
    ]
    assert len({tuple(e["flaws"]) for e in found}) > 4 and [] in [e["flaws"] for e in found]
    assert {e["history"][0] for e in found}.isdisjoint(
        e["history"][0] for e in ra.trajectories(ARGS, "test", range(40), "x")
    )
    for e in found:
        assert ("no answer" in e["flaws"]) == (envs.read_call(e["history"][-2])[0] != "answer")


def test_judge_examples_are_of_players_and_of_the_agent(tiny):
    state = ra.State(ARGS, WORLD, tiny[1], tiny[0], tiny)
    found = ra.judge_examples(state, "train", range(70, 77), "x")
    players, own = ([e for e in found if e["who"] == who] for who in ("players", "agent"))
    assert players == ra.trajectories(ARGS, "train", range(70, 77, 2), "x") == found[::2]
    assert [e["seed"] for e in own] == [71, 73, 75] and found[1::2] == own
    for e in own:  # played again, the flaws are the same
        world, steps = envs.make("search"), []
        world.reset(seed=e["seed"], options={"split": "train"})
        for reply in e["history"][1::2]:
            observation, *_, info = world.step(reply)
            steps.append((reply, observation, info["valid"]))
        named = set(envs.search_flaws(world.task, steps)) & set(ra.COSTS)
        assert set(e["flaws"]) - {"no answer"} == named and ("no answer" in e["flaws"]) == (
            envs.read_call(steps[-1][0])[0] != "answer"
        )
    assert any(e["flaws"] for e in own) and ra.process_flaws(WORLD, ["Who? 8 turns left."], []) == [
        "no answer"
    ]


def test_flaws_are_of_what_was_said_aloud():
    e = envs.run_episode(WORLD, envs.expert_player, 3)
    history = [
        text
        for turn in itertools.zip_longest(e["observations"], e["actions"])
        for text in turn
        if text is not None
    ]
    valid = [True] * len(e["actions"])
    thought = f"<think>or {envs.tool_call('answer', 'Nobody')}</think>\n"
    thinking = [thought + text if i % 2 else text for i, text in enumerate(history)]
    assert e["won"] and ra.process_flaws(WORLD, history, valid) == [] == ra.process_flaws(
        WORLD, thinking, valid
    )
    cut = [*history[:-2], thought + "<think>" + history[-2], "."]
    assert "no answer" in ra.process_flaws(WORLD, cut, valid)
    refused = ra.process_flaws(WORLD, history, [*valid[:-1], False])
    assert "no answer" in refused and "wrong tool" in refused


def test_judge_reward_by_hand():
    assert (
        ra.judge_reward(blocks("0.3"), 0.5) == pytest.approx(0.8)
        and ra.judge_reward(blocks("0.5", "x", "y"), 0.5) == 1
    )
    assert (
        ra.judge_reward(blocks("1"), 0.0)
        == 0
        == ra.judge_reward("garbage", 0.5)
        == ra.judge_reward(blocks("nan"), 0.5)
    )


def test_auc_by_hand():
    assert (
        ra.auc([0.9, 0.1], [True, False]) == 1
        and ra.auc([0.9, 0.1], [0, 1]) == 0
        and ra.auc([0.5, 0.5], [0, 1]) == 0.5
    )
    assert ra.auc([0.8, 0.4, 0.4, 0.2], [1, 1, 0, 0]) == pytest.approx(3.5 / 4)
    assert ra.auc([1, 2], [1, 1]) is None is ra.auc([], [])


def test_watch_judge_by_hand(monkeypatch):
    scores = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.55]
    monkeypatch.setattr(
        ra,
        "judge",
        lambda rrm, world, args, histories, stream: [
            {"score": s, "parsed": s > 0, "asked": int(s > 0), "cut": int(s == 1)} for s in scores
        ],
    )
    flaws = [["no answer"], [], [], [], [], [], ["repeated call"]]
    found = ra.watch_judge(
        None, WORLD, ARGS, [{"history": [], "flaws": f, "won": i > 3} for i, f in enumerate(flaws)]
    )
    assert found["calibration"] == [
        [1, 0.0],
        [1, 0.0],
        [2, 0.5],
        [1, 0.0],
        [2, 1.0],
    ]  # each score in one fifth
    assert (
        found["parsed"] == 6 / 7
        and found["auc_process"] == pytest.approx(8 / 10)
        and found["auc_outcome"] == pytest.approx(11 / 12)
    )
    assert found["error"] == pytest.approx((0.5 + 0.8 + 0.6 + 0.4 + 0.2 + 0 + 0.25) / 7)
    assert found["cut_judge"] == 1 / 6 and found["not_judged"] == 1 / 7
    without = ra.watch_judge(
        None,
        envs.make("repair"),
        ARGS,
        [{"history": [], "flaws": None, "won": i > 3} for i in range(7)],
    )
    assert without == found | {"auc_process": None, "error": None}


# ------------------------------------------------------------------------------ advantages and loss


def test_pooled_advantages_by_hand():
    first, second = [0.0, 1.0, 0.3, 0.3], [1.0, 1.0, 1.3, 0.3]  # two questions, G = 2
    pooled = ra.interleaved(first, second, 2)
    assert pooled == [0.0, 1.0, 1.0, 1.0, 0.3, 0.3, 1.3, 0.3]
    # joint: 0 1 1 1 has mean 0.75 and deviation 0.5; .3 .3 1.3 .3 has mean 0.55 and deviation 0.5
    assert ra.group_advantages(pooled, 4) == pytest.approx(
        [-1.5, 0.5, 0.5, 0.5, -0.5, -0.5, 1.5, -0.5], abs=1e-5
    )
    half = 0.5**0.5  # separate: each pair by itself, nothing where both are equal
    assert ra.group_advantages(pooled, 2) == pytest.approx(
        [-half, half, 0, 0, 0, 0, half, -half], abs=1e-5
    )
    assert ra.without_spread(pooled, 4) == 0 and ra.without_spread(pooled, 2) == 2
    assert ra.group_advantages([0.1] * 8, 8) == [0.0] * 8  # exactly


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(2, 5), st.integers(1, 4), st.data())
def test_pools_against_another_derivation(size, questions, data):
    count = size * questions
    first, second = ([data.draw(st.floats(0, 1.3)) for _ in range(count)] for _ in range(2))
    order = ra.interleaved(list(range(count)), list(range(count, 2 * count)), size)
    assert sorted(order) == list(range(2 * count)) and ra.interleaved(first, [], size) == first
    assert [i % count // size for i in order] == [
        q for q in range(questions) for _ in range(2 * size)
    ]
    assert all(
        i < count for q in range(questions) for i in order[2 * q * size : (2 * q + 1) * size]
    )  # first attempts before second ones
    returns = ra.interleaved(first, second, size)
    for pool in 2 * size, size:
        found = ra.group_advantages(returns, pool)
        for g in range(0, 2 * count, pool):
            group = returns[g : g + pool]
            mean = math.fsum(group) / pool
            std = math.sqrt(math.fsum((x - mean) ** 2 for x in group) / (pool - 1))
            by_hand = [(x - mean) / (std + 1e-6) if max(group) > min(group) else 0 for x in group]
            assert found[g : g + pool] == pytest.approx(by_hand, abs=1e-6)


def test_rewards_by_hand():
    episodes, judged = (
        [{"rule": 1.0}, {"rule": 0.4}, {"rule": 0.0}],
        [{"score": 0.5}, {"score": 1.0}, {"score": 0.0}],
    )
    assert ra.attempt_rewards(TINY, episodes, judged) == pytest.approx(
        [1.15, 0.7, 0.0]
    )  # not a mix: 1 + 0.3 * 0.5
    assert (
        ra.attempt_rewards(TINY, episodes, None) == [1.0, 0.4, 0.0]
        and ra.attempt_rewards(TINY, [], []) == []
    )
    nothing = dataclasses.replace(TINY, score_weight=0.0)
    assert ra.attempt_rewards(nothing, episodes, judged) == ra.attempt_rewards(TINY, episodes, None)


def test_loss_by_hand():
    def t(*rows):
        return torch.tensor(rows, dtype=torch.float64)

    ratio, zero = t([0.5, 0.9, 1.0, 1.25, 1.5]).log(), t([0.0] * 5)
    torch.testing.assert_close(
        ra.surrogate(ratio, zero, t([2.0]), 0.2, 0.2), -t([1.0, 1.8, 2.0, 2.4, 2.4])
    )
    torch.testing.assert_close(
        ra.surrogate(ratio, zero, t([-2.0]), 0.2, 0.2), t([1.6, 1.8, 2.0, 2.5, 3.0])
    )
    torch.testing.assert_close(
        ra.surrogate(ratio, zero, t([2.0]), 0.2, 0.34), -t([1.0, 1.8, 2.0, 2.5, 2.68])
    )
    torch.testing.assert_close(
        ra.kl_estimate(t([0, 0, 0]), t([2.0, 1.0, 0.5]).log()),
        t([1 - math.log(2), 0, math.log(2) - 0.5]),
    )
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])  # the last: no room for a reply
    torch.testing.assert_close(
        ra.token_weights(mask, 4), t([0, 0.125, 0.125, 0], [0.25, 0, 0, 0], [0] * 4).float()
    )


def derived(table, reference, episodes, advantages, args, lr):
    """In float64, token by token: mean over attempts of the mean over their own tokens."""

    def logp(table, e):
        rows = torch.log_softmax(table[torch.tensor(e["ids"][:-1])] / args.temperature, -1)
        return {t: rows[t - 1, e["ids"][t]] for t in range(1, len(e["ids"])) if e["mask"][t]}

    table, reference = (torch.tensor(x, dtype=torch.float32).double() for x in (table, reference))
    old, ref = [[logp(x, e) for e in episodes] for x in (table, reference)]
    share, losses, norms, kls, outside = len(episodes) // args.updates, [], [], [], []
    for u in range(args.updates):
        theta, loss = table.clone().requires_grad_(), 0
        for i in range(u * share, (u + 1) * share):
            own = []
            for t, lp in logp(theta, episodes[i]).items():
                r, A, q = (lp - old[i][t]).exp(), advantages[i], ref[i][t] - lp
                objective = min(
                    r * A, min(max(r, 1 - args.clip), 1 + args.clip_high) * A, key=float
                )
                own.append(args.kl * (q.exp() - q - 1) - objective)
                kls.append(float(q.exp() - q - 1))
                outside.append(not 1 - args.clip <= float(r) <= 1 + args.clip_high)
            loss = loss + sum(own) / len(own) / share
        (g,) = (
            torch.autograd.grad(loss, theta) if loss.requires_grad else (torch.zeros_like(theta),)
        )
        norms.append(float(g.norm()))
        losses.append(float(loss))
        table = (theta - lr * g * min(1, 1 / (norms[-1] + 1e-6))).detach()
    mean = lambda x: sum(x) / len(x)  # noqa: E731
    return table, dict(
        loss=mean(losses),
        kl=mean(kls) if args.kl else 0,
        clipped=mean(outside),
        grad_norm=mean(norms),
    )


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.sampled_from([(0.2, 0.34), (0.02, 0.05), (0.1, 0.1)]),
    st.sampled_from([0.0, 0.3]),
       st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3, 100]),
       st.sampled_from([1.0, 0.7]))  # fmt: skip
def test_loss_and_gradient_against_another_derivation(seed, clips, kl, updates, micro, temperature):
    rng = random.Random(seed)
    table, reference, episodes = random_table(rng), random_table(rng), random_episodes(rng, 6)
    advantages = [rng.choice([0.0, rng.gauss(0, 1)]) for _ in episodes]
    args = dataclasses.replace(ARGS, clip=clips[0], clip_high=clips[1], kl=kl, updates=updates,
        micro_batch_size=micro,
                               temperature=temperature)  # fmt: skip
    model = Bigram(table)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    metrics = ra.update(
        model, Bigram(reference) if kl else None, PAD, args, optimizer, episodes, advantages
    )
    expected, numbers = derived(table, reference, episodes, advantages, args, 2.0)
    torch.testing.assert_close(model.table.detach().double(), expected, atol=2e-4, rtol=1e-4)
    for name, value in numbers.items():
        assert metrics[name] == pytest.approx(value, abs=2e-4), name
    assert updates > 1 or metrics["clipped"] == 0


IMITATED = [
    ([0, 1, 2, 3, 4, 1, 2, 4], [0, 0, 0, 1, 1, 0, 0, 1]),
    ([1, 2, 4], [0, 0, 1]),
    ([0, 0, 2, 4, 4, 3], [0, 0, 0, 1, 1, 1]),
]


@pytest.mark.parametrize("micro", [1, 2, 100])
def test_imitation_learns_all_that_the_assistant_says_and_nothing_else(micro):
    table, args = random_table(random.Random(1)), dataclasses.replace(ARGS, micro_batch_size=micro)
    chat, lr = SimpleNamespace(pad=0, dialogue_and_mask=lambda dialogue: dialogue), 0.5
    model = Bigram(table)
    model.max_context = 8
    optimizer, long = torch.optim.SGD(model.parameters(), lr=lr), ([1] * 9, [1] * 9)
    assert ra.imitate(model, chat, args, optimizer, [long]) == {
        "loss": 0.0,
        "too_long": 1.0,
    }  # skipped and counted
    metrics = ra.imitate(model, chat, args, optimizer, [*IMITATED, long])
    loss = metrics["loss"]
    assert metrics["too_long"] == 1 / 4
    start, total = torch.tensor(table, dtype=torch.float64), 0.0
    p, grad = torch.softmax(start / args.temperature, -1), torch.zeros_like(start)
    for ids, mask in IMITATED:
        for last, word, learnt in zip(ids, ids[1:], mask[1:]):
            if learnt:  # seven tokens: the second turn of a dialogue counts as the first does
                total -= math.log(p[last, word]) / 7
                grad[last] -= (torch.eye(len(p))[word] - p[last]) / args.temperature / 7
    assert (
        loss == pytest.approx(total, abs=1e-5) and not grad[:2].any() and grad[2:].any(1).all()
    )  # 0 and 1 are never learnt from
    step = lr * grad * min(1, 1 / (grad.norm() + 1e-6))
    torch.testing.assert_close(model.table.detach().double(), start - step, atol=1e-6, rtol=1e-4)
    assert model.table.grad is None


def test_what_the_supervised_phases_imitate(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(ra, "imitate", lambda *given: seen.append(given) or {})
    chat, e = tiny[1], envs.run_episode(WORLD, envs.expert_player, 3)
    history = [text for turn in zip(e["observations"], [*e["actions"], None]) for text in turn][:-1]
    state = ra.State(ARGS, WORLD, chat, "the agent", ("the judge", chat), "the optimizer")
    earlier = ["Q", "a call", "a reply", "another", "the end"]
    told = ra.AGAIN.format(
        transcript="Agent: a call\nObservation: a reply\nAgent: another", critique="nothing."
    )
    ra.cold_start(state, [{"history": history, "earlier": earlier}], ("cold-start", 1))
    ra.judge_sft(state, [{"history": history, "flaws": ["wrong tool"]}], ("judge-sft", 1))
    assert [given[0] for given in seen] == ["the agent", "the judge"] and all(
        given[3] == "the optimizer" for given in seen
    )
    [whole, again], [judged] = (given[-1] for given in seen)
    assert again[2:] == whole[2:] and again[1]["content"] == f"{history[0]}\n\n{told}"
    assert [m["role"] for m in whole] == [
        "system",
        *["user", "assistant"] * len(e["actions"]),
    ] and len(e["actions"]) > 1
    assert [m["content"] for m in whole] == [
        f"{WORLD.system}\n{ra.CALL}",
        *history[:-1],
    ]  # the last observation answers nothing any more
    assert judged == [
        *ra.judge_messages(WORLD, history),
        {"role": "assistant", "content": ra.annotate(["wrong tool"])},
    ]
    for messages, said in (whole, e["actions"]), (judged, [ra.annotate(["wrong tool"])]):
        ids, mask = chat.dialogue_and_mask(messages)
        assert chat.decode([id for id, learnt in zip(ids, mask) if learnt]) == "".join(said)


# -------------------------------------------------------------------------- a tiny model's attempts


CRITIQUES = [
    "Read every page that the question needs before you answer.",
    "",
    "Mind the {braces} <|im_end|>.",
    "Go on like this.",
] * 2


def play(tiny, seeds, before=None, args=ARGS, **settings):
    return ra.rollout(
        *tiny,
        args,
        "train",
        seeds,
        **dict(temperature=args.temperature, stream=("test",), before=before) | settings,
    )


@pytest.fixture(scope="module")
def attempts(tiny):
    """(first, second): two questions, four attempts at each, and as many second ones."""
    seeds = [0] * 4 + [1] * 4
    first = play(tiny, seeds)
    return first, play(
        tiny, seeds, [(e["history"], c) for e, c in zip(first, CRITIQUES)], stream=("test", 2)
    )


@pytest.fixture(scope="module")
def batch(attempts):
    return ra.interleaved(*attempts, 4)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(tiny, episodes, advantages, **settings):
    """(flat weights after one update by plain gradient descent, its metrics)"""
    model, args = copy.deepcopy(tiny[0]), dataclasses.replace(ARGS, **settings)
    metrics = ra.update(
        model,
        tiny[0],
        tiny[1],
        args,
        torch.optim.SGD(model.parameters(), lr=1.0),
        episodes,
        advantages,
    )
    return flat(model), metrics


ADVANTAGES = [1.0, -0.5, 0.25, -0.75, 0.3, 0.6, -1.2, 0.3, 1.5, -0.2, 0.4, 0.1, -0.9, 0.3, 0.2, 0.8]


@pytest.mark.parametrize("settings", [dict(kl=0.1), dict(updates=2, clip=0.01, kl=0.1)])
def test_the_step_does_not_depend_on_the_micro_batch(tiny, batch, settings):
    (whole, metrics), *others = [
        trained(tiny, batch, ADVANTAGES, micro_batch_size=size, **settings) for size in (16, 1, 3)
    ]
    moved = (whole - flat(tiny[0])).norm()
    assert moved > 0.001
    for weights, numbers in others:
        assert (weights - whole).norm() < 1e-3 * moved
        assert numbers == pytest.approx(metrics, rel=1e-3, abs=1e-5)


def test_before_the_first_update_the_ratio_is_one_in_each_attempts_own_context(
    tiny, batch, attempts
):
    _, metrics = trained(tiny, batch, ADVANTAGES, kl=0.5)
    assert metrics["clipped"] == 0 and metrics["loss"] == pytest.approx(
        -sum(ADVANTAGES) / 16, abs=1e-5
    )
    assert metrics["kl"] == pytest.approx(0, abs=1e-6) and abs(metrics["logprob_gap"]) < 1e-4
    old = ra.old_logprobs(*tiny, ARGS, batch)
    assert [row.sum().item() for row in old] == pytest.approx(
        [e["logprob"] for e in batch], abs=1e-3
    )  # what decoding saw
    bare = []
    for e in attempts[
        1
    ]:  # without the first attempt and the critique the second ones would have other likelihoods
        prompt, start = tiny[1].dialogue(ra.opening(WORLD, e["history"][0])), e["mask"].index(1)
        bare.append(
            e | {"ids": prompt + e["ids"][start:], "mask": [0] * len(prompt) + e["mask"][start:]}
        )
    other = ra.old_logprobs(*tiny, ARGS, bare)
    assert (
        sum(abs(row.sum().item() - e["logprob"]) > 1e-2 for row, e in zip(other, attempts[1])) >= 6
    )


def test_equal_rewards_teach_exactly_nothing(tiny, batch):
    weights, metrics = trained(
        tiny, batch, ra.group_advantages([0.3] * 8 + [1.3] * 8, 8), updates=2
    )
    assert torch.equal(weights, flat(tiny[0])) and metrics["grad_norm"] == 0


@pytest.mark.parametrize("limit", [3, 12])
def test_the_mask_is_what_was_sampled(tiny, limit):
    """Rebuilt from the texts. 0: prompts, tool outputs, forced ends; 1: replies, their own ends."""
    chat, args, cut = tiny[1], dataclasses.replace(ARGS, max_new_tokens=limit), 0
    first = play(tiny, range(4), args=args)
    before = [(e["history"], critique) for e, critique in zip(first, CRITIQUES)]
    for e, b in [*zip(first, [None] * 4), *zip(play(tiny, range(4), before, args=args), before)]:
        assert len(e["ids"]) == len(e["mask"]) and set(e["mask"]) == {0, 1} and not e["truncated"]
        position, given = 0, chat.dialogue(ra.opening(WORLD, e["history"][0], b))
        for t, reply in enumerate(e["history"][1::2]):
            assert e["ids"][position : position + len(given)] == given and not any(
                e["mask"][position : position + len(given)]
            )
            position += len(given)
            rest = e["ids"][position : position + limit]
            length = next((n + 1 for n, id in enumerate(rest) if id in chat.eos), limit)
            assert (
                all(e["mask"][position : position + length]) and chat.decode(rest[:length]) == reply
            )
            position += length
            forced = [] if rest[length - 1] in chat.eos else chat.eos[:1]
            cut += bool(forced)
            given = forced + (chat.turn(e["history"][2 * t + 2]) if t + 1 < len(e["valid"]) else [])
        assert position == len(e["ids"])  # nothing behind the last sampled token
    assert cut or limit == 12


def test_the_second_attempt_is_told_of_the_first(tiny, attempts):
    for one, two, critique in zip(*attempts, CRITIQUES):
        system, user = ra.opening(WORLD, one["history"][0], (one["history"], critique))
        assert (
            system == {"role": "system", "content": f"{WORLD.system}\n{ra.CALL}"}
            and one["history"][0] == two["history"][0]
        )
        assert (
            user["content"].startswith(one["history"][0])
            and ra.transcript(one["history"]) in user["content"]
        )
        assert f"A reviewer says: {critique or 'nothing.'}" in user["content"]
        assert one["history"][-1] not in user["content"]
        prompt = tiny[1].dialogue([system, user])
        assert two["ids"][: len(prompt)] == prompt and not any(two["mask"][: len(prompt)])
    assert ra.opening(WORLD, "Who?") == [
        {"role": "system", "content": f"{WORLD.system}\n{ra.CALL}"},
        {"role": "user", "content": "Who?"},
    ]


def test_attempts_do_not_depend_on_their_batch(tiny):
    texts = lambda episodes: [(e["history"], e["ids"], e["mask"]) for e in episodes]  # noqa: E731
    whole = play(tiny, [5, 5, 6, 6])
    assert texts(whole) == texts(play(tiny, [5, 5, 6, 6])) and texts(
        play(tiny, [5, 5, 6])
    ) == texts(whole[:3])
    for size in 1, 3:
        assert texts(
            play(tiny, [5, 5, 6, 6], args=dataclasses.replace(ARGS, rollout_batch_size=size))
        ) == texts(whole)
    assert texts(play(tiny, [5, 5, 6, 6], stream=("x",))) != texts(whole)
    assert (
        whole[0]["history"] != whole[1]["history"]
        and whole[0]["history"][0] == whole[1]["history"][0] != whole[2]["history"][0]
    )


def test_a_thought_is_not_acted_on(tiny, monkeypatch):
    """The world gets what is said aloud, the dialogue keeps what was sampled."""
    call = envs.tool_call("search", "Anything")
    text = f"<think>{envs.tool_call('answer', 'Nobody')}</think>{call}"

    def reply(dialogues, rows, *, max_new_tokens, temperature, seeds, prefill):
        for row in rows:
            dialogues._append(row, tiny[1].reply(text), 1)
        return common.Replies([], [], [text] * len(rows), [True] * len(rows))

    monkeypatch.setattr(common.Dialogues, "reply", reply)
    [e] = play(tiny, [0])
    assert (
        len(e["valid"]) == WORLD.max_turns and all(e["valid"]) and set(e["history"][1::2]) == {text}
    )
    assert ra.transcript(e["history"]).count(
        call
    ) == WORLD.max_turns and "Nobody" not in ra.transcript(e["history"])
    assert (
        tiny[1].decode([id for id, sampled in zip(e["ids"], e["mask"]) if sampled])
        == text * WORLD.max_turns
    )


def test_no_room_for_a_second_attempt(tiny, attempts):
    model, first = copy.deepcopy(tiny[0]), attempts[0]
    prompts = [
        len(tiny[1].dialogue(ra.opening(WORLD, e["history"][0], (e["history"], "x"))))
        for e in first
    ]
    model.max_context = min(prompts) + ARGS.max_new_tokens
    second = play((model, tiny[1]), [0] * 4 + [1] * 4, [(e["history"], "x") for e in first])
    for e, length in zip(second, prompts):
        unplayed = (
            e["truncated"] and len(e["history"]) == 1 and e["mask"] == [0] and len(e["ids"]) == 1
        )  # the loss reads no prompt
        assert len(e["ids"]) >= length == min(prompts) or unplayed
    assert ra.watch(second)["truncated"] >= 6 / 8
    weights, metrics = trained(
        tiny, second[:-1] + first[:1], ADVANTAGES[:8]
    )  # what has no tokens has no gradient
    assert math.isfinite(metrics["loss"]) and not torch.isnan(weights).any()


# --------------------------------------------------------------------- the judge at work, and leaks


class Puppet:
    """Stands where `common.generate` does, for the judge: notes what it was asked."""

    def __init__(self, *texts):
        self.texts, self.calls = texts, []

    def __call__(
        self, model, chat, prompts, *, max_new_tokens, temperature, seeds, samples=1, rows=None
    ):
        assert len(seeds) == len(set(seeds)) == len(prompts) * samples
        self.calls.append(([chat.tokenizer.decode(ids) for ids in prompts], temperature, seeds))
        texts = [self.texts[min(len(self.calls), len(self.texts)) - 1]] * len(seeds)
        texts = [
            text(prompt) if callable(text) else text
            for text, prompt in zip(texts, self.calls[-1][0])
        ]
        return common.Replies(
            [chat.encode(text) or [0] for text in texts],
            [[0.0]] * len(texts),
            texts,
            [True] * len(texts),
        )


JUDGE = ra.judge
HISTORIES = [
    ["Who wrote A? 8 turns left.", "x", "Nothing. 7 turns left."],
    ["Who wrote B? 8 turns left.", "y", "Nothing. 7 turns left."],
]
EMPTY = {
    "think": "",
    "critique": "",
    "score": 0.0,
    "parsed": False,
    "tokens": 0,
    "asked": 0,
    "cut": 0,
}


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_an_unreadable_judgement_is_retried_then_zero_and_empty(tiny, monkeypatch, retries):
    said = ["garbage", "<score>1</score>", blocks("0.1")]
    puppet = Puppet(lambda prompt: GOOD if "wrote A" in prompt else said[0], *said[1:])
    monkeypatch.setattr(common, "generate", puppet)
    a, b = ra.judge(
        tiny, WORLD, dataclasses.replace(ARGS, judge_retries=retries), HISTORIES, ("s",)
    )
    length, *spent = (
        len(tiny[1].encode(text)) for text in (GOOD, *said)
    )  # what was thrown away was sampled too
    assert a == EMPTY | {
        "think": "No flaw.",
        "critique": "Go on like this.",
        "score": 0.5,
        "parsed": True,
        "tokens": length,
        "asked": 1,
    }
    found = EMPTY | (
        {} if retries < 2 else {"think": "t", "critique": "c", "score": 0.1, "parsed": True}
    )
    assert (
        b == found | {"tokens": sum(spent[: 1 + retries]), "asked": 1 + retries}
        and length > spent[0] > 0
    )
    assert [len(prompts) for prompts, *_ in puppet.calls] == [2, 1, 1][: 1 + retries]
    assert [temperature for _, temperature, _ in puppet.calls] == [
        0.0,
        ARGS.temperature,
        ARGS.temperature,
    ][: 1 + retries]
    assert len({seed for *_, seeds in puppet.calls for seed in seeds}) == 2 + retries


def test_an_attempt_that_was_not_played_is_not_judged(tiny, monkeypatch):
    puppet = Puppet(GOOD)
    monkeypatch.setattr(common, "generate", puppet)
    judged = ra.judge(tiny, WORLD, ARGS, [HISTORIES[0], HISTORIES[1][:1]], ("s",))
    assert (
        judged[0]["parsed"]
        and judged[1] == EMPTY
        and [len(prompts) for prompts, *_ in puppet.calls] == [1]
    )


def test_a_transcript_beyond_the_judges_context_is_not_readable(tiny, monkeypatch):
    puppet, model = Puppet(GOOD), copy.deepcopy(tiny[0])
    monkeypatch.setattr(common, "generate", puppet)
    model.max_context = (
        len(tiny[1].prompt(ra.judge_messages(WORLD, HISTORIES[0]))) + ARGS.judge_tokens
    )
    long = [HISTORIES[0][0], "x", "word " * 50, "y", "."]
    judged = ra.judge((model, tiny[1]), WORLD, ARGS, [HISTORIES[0], long], ("s",))
    assert [j["parsed"] for j in judged] == [True, False] and judged[1] == EMPTY  # nobody was asked
    assert ra.judge_costs(judged) == {"cut_judge": 0, "not_judged": 0.5}


def test_the_judges_grpo_skips_what_does_not_fit(tiny, monkeypatch):
    """Of two transcripts one fits; nothing raises, the other has no gradient."""
    model, seen = copy.deepcopy(tiny[0]), []
    model.max_context = (
        len(tiny[1].dialogue(ra.judge_messages(WORLD, HISTORIES[0]))) + ARGS.judge_tokens
    )
    long = [HISTORIES[0][0], "x", "word " * 50, "y", "."]
    monkeypatch.setattr(ra, "update", lambda *given: seen.append(given) or {})
    state = ra.State(
        dataclasses.replace(ARGS, batch_size=8),
        WORLD,
        tiny[1],
        tiny[0],
        (model, tiny[1]),
        "the optimizer",
    )
    metrics = ra.judge_grpo(
        state,
        [{"history": long, "flaws": []}, {"history": HISTORIES[0], "flaws": ["wrong tool"]}],
        ("judge-grpo", 1),
    )
    [(*_, episodes, advantages)] = seen
    assert (
        metrics["too_long"] == 0.5
        and 0 <= metrics["cut_judge"] <= 1
        and len(episodes) == len(advantages) == 8
    )
    assert (
        all(e["mask"] == [0] and len(e["ids"]) == 1 for e in episodes[:4])
        and advantages[:4] == [0.0] * 4
    )
    prompt = tiny[1].dialogue(ra.judge_messages(WORLD, HISTORIES[0]))
    assert all(
        e["ids"][: len(prompt)] == prompt and e["mask"].index(1) == len(prompt)
        for e in episodes[4:]
    )
    assert metrics["tokens"] == sum(sum(e["mask"]) for e in episodes) > 0


def test_replies_that_the_limit_cuts_are_counted(tiny):
    first = play(tiny, [0, 1], args=dataclasses.replace(ARGS, max_new_tokens=1))
    assert ra.cut_share(first) > 0.9 and ra.watch(first)["cut_agent"] == ra.cut_share(first)
    judged = ra.judge(
        tiny,
        WORLD,
        dataclasses.replace(ARGS, judge_tokens=1),
        [e["history"] for e in first],
        ("s",),
    )
    assert ra.judge_costs(judged) == {"cut_judge": 1.0, "not_judged": 0.0} and not any(
        j["parsed"] for j in judged
    )


@pytest.mark.parametrize("env", ["search", "household"])
def test_worked_examples_and_forced_words(tiny, monkeypatch, env):
    """--shots, --prefill, --show-actions reach both parts; nothing of that is learnt from."""
    args = dataclasses.replace(ARGS, env=env, shots=2, prefill=True, show_actions=True)
    world, chat, asked = envs.make(env, show_actions=True), tiny[1], []
    word, judge_word = ra.forced(args, world)
    assert (word, judge_word) == ("<tool_call>" if env == "search" else "Action:", "<think>")
    acted, judged = ra.shots(args)
    assert ra.shots(ARGS) == ([], []) and len(acted) == len(judged) == 4
    assert [m["content"].startswith(word) for m in acted] == [False, True] * 2 and all(
        envs.LISTING in m["content"] for m in acted[::2]
    )
    said = [ra.parse_judgement(m["content"]) for m in judged[1::2]]
    assert said[0]["score"] < 0.5 < said[1]["score"] and all(
        m["content"].startswith(judge_word) and m["shot"] for m in judged[1::2]
    )
    [e] = play(tiny, [0], args=args)
    start = chat.dialogue(ra.opening(world, e["history"][0], None, acted), word)
    assert (
        envs.LISTING in e["history"][0]
        and e["ids"][: len(start)] == start
        and e["mask"].index(1) == len(start)
    )
    assert all(
        reply.startswith(word) for reply in e["history"][1::2]
    ) and envs.LISTING not in ra.transcript(e["history"])
    generate = common.generate
    monkeypatch.setattr(
        common,
        "generate",
        lambda model, chat, prompts, **more: (
            asked.extend(prompts) or generate(model, chat, prompts, **more)
        ),
    )
    ra.judge(tiny, world, args, [e["history"]], ("s",))
    assert asked[0] == chat.dialogue(ra.judge_messages(world, e["history"], judged), judge_word)
    dialogue = ra.opening(world, "Q", None, acted) + [{"role": "assistant", "content": "A"}]
    ids, mask = chat.dialogue_and_mask(dialogue)
    assert chat.decode([id for id, learnt in zip(ids, mask) if learnt]) == "A"


@pytest.mark.parametrize("env", ["search", "search-full"])
def test_no_prompt_depends_on_the_right_answer(tiny, monkeypatch, env):
    """The same calls in two worlds that differ in the right answer alone: one is won, one lost."""
    world, args = envs.make(env), dataclasses.replace(ARGS, env=env)
    seed = next(
        s
        for s in range(100)
        if world.reset(seed=s)[0].startswith("How many years after") == (env == "search-full")
    )
    script = envs.run_episode(world, envs.expert_player, seed)["actions"]

    def scripted(dialogues, rows, *, max_new_tokens, temperature, seeds, prefill):
        texts = [
            script[
                sum(
                    dialogues.mask[row][i : i + 2] == [1, 0]
                    for i in range(len(dialogues.mask[row]))
                )
            ]
            for row in rows
        ]
        for row, text in zip(rows, texts):
            dialogues._append(row, tiny[1].reply(text), 1)
        return common.Replies([], [], texts, [True] * len(texts))

    said, begin, encode = {}, envs.Search.begin, common.Chat._encode_rendered
    monkeypatch.setattr(common.Dialogues, "reply", scripted)
    for gold in None, "Zyx Quux":
        prompts, puppet = said.setdefault(gold, []), Puppet(GOOD)
        monkeypatch.setattr(common, "generate", puppet)
        monkeypatch.setattr(
            common.Chat,
            "_encode_rendered",
            lambda self, text, prompts=prompts: prompts.append(text) or encode(self, text),
        )
        if gold:
            monkeypatch.setattr(
                envs.Search,
                "begin",
                lambda self, *a: [begin(self, *a), vars(self).update(gold="Zyx Quux")][0],
            )
        model = copy.deepcopy(tiny[0])
        state = ra.State(
            dataclasses.replace(args, batch_size=4),
            world,
            tiny[1],
            model,
            tiny,
            torch.optim.SGD(model.parameters(), lr=0.1),
        )
        metrics = ra.learn(state, [seed], ("learn", 1))
        assert metrics["success"] == metrics["second_success"] == (gold is None)
        assert "Zyx" not in json.dumps(metrics["played"]) and metrics["leaks"] == 0
        monkeypatch.setattr(
            ra,
            "rollout",
            lambda m, c, a, split, seeds, r=ra.rollout, **k: r(
                m, c, a, "train", [seed] * len(seeds), **k
            ),
        )
        assert ra.evaluate(state, "test", 2, second=True)[0]["success"] == (gold is None)
        prompts += [prompt for call in puppet.calls for prompt in call[0]]
    assert said[None] == said["Zyx Quux"] and len(said[None]) > 10
    assert not any("win" in text.split() or "did not" in text for text in said[None])


def test_watch_by_hand():
    one = {"history": ["Q", "go", "o", "A thought.\ngo", "o", "stop", "o"],
        "actions": ["go", "go", "stop"],
           "valid": [True, False, True], "won": True, "rule": 1.0, "cut": 2}  # fmt: skip
    two = {"history": ["Q", "The critique says so.", "o"], "actions": ["The critique says so."],
        "valid": [True], "won": False,
           "rule": 0.5, "cut": 0}  # fmt: skip
    counted = ra.watch([one | {"truncated": False}, two | {"truncated": True}])
    assert counted == {"success": 0.5, "rule": 0.75, "calls": 2, "repeated_calls": 0.5,
        "invalid": 0.25, "truncated": 0.5,
                       "cut_agent": 0.5, "speaks_of_a_critique": 0.25}  # fmt: skip


def test_leaks_counts_critiques_that_name_the_answer():
    WORLD.reset(seed=3, options={"split": "train"})
    gold = WORLD.gold
    episodes = [{"seed": 3, "split": "train"}] * 4
    judged = [
        {"critique": c, "parsed": True}
        for c in (f"It is {gold.upper()}.", "Go on like this.", "", f"x{gold}x")
    ]
    assert (
        ra.leaks(WORLD, episodes, judged) == 1 / 4
        and ra.leaks(envs.make("repair"), episodes, judged) is None
    )
    judged[2]["parsed"] = judged[3]["parsed"] = False
    assert (
        ra.leaks(WORLD, episodes, judged) == 1 / 2
        and ra.leaks(WORLD, episodes[2:], judged[2:]) is None
    )


# ------------------------------------------------------------------------------------------ warm-up


def test_the_warm_up_asks_no_expert_and_sees_train_alone(monkeypatch):
    def asked(*_):
        raise AssertionError("the warm-up asked an expert")

    splits, reset = set(), envs.Search.reset
    monkeypatch.setattr(
        envs.Search,
        "reset",
        lambda self, **k: splits.add(k["options"]["split"]) or reset(self, **k),
    )
    experts = "expert_player", "thinking_player", "search_expert", "search_thought"
    for name in (
        *experts,
        "sloppy_player",
        "hasty_player",
        "muddled_player",
        "guess_player",
        "search_flaws",
    ):
        monkeypatch.setattr(envs, name, asked)
    monkeypatch.setattr(envs.Search, "expert", asked)
    begin, args = envs.Search.begin, dataclasses.replace(ARGS, examples=20)
    examples = ra.warmup(envs.make("search"), args)
    assert splits == {"train"} and examples == ra.warmup(
        envs.make("search"), args
    )  # the cache is named after it
    judged = [e for e in examples if isinstance(e, tuple)]
    dialogues = [e for e in examples if isinstance(e, list)]
    again = [e for e in dialogues if "You have tried this before:" in e[1]["content"]]
    copied = [e for e in dialogues if ra.NEXT in e[-2]["content"]]
    assert (
        len(judged) == len(again) == 10
        and 10 < len(copied) <= 20
        and len(dialogues) == 30 + len(copied)
    )
    assert (
        all(ra.parse_judgement(reply) for _, reply in judged)
        and len({reply for _, reply in judged}) > 3
    )
    for e in dialogues:
        assert [m["role"] for m in e[1:]] == ["user", "assistant"] * (len(e) // 2) and len(e) % 2
        assert all(envs.read_call(m["content"])[0] for m in e[2::2])
    for e in copied:
        calls = re.findall(r"<tool_call>.*?</tool_call>", e[-1]["content"], re.DOTALL)
        assert calls and all(envs.read_call(text)[1] in e[-2]["content"] for text in calls)
    for e in again:
        question = e[1]["content"].split("\n")[0]
        [first] = [
            d for d in dialogues if d[1]["content"] == question and d not in copied
        ]  # the attempt before was at the same question
        assert (
            "\n".join(f"Agent: {m['content']}" for m in first[2:3]) in e[1]["content"]
            and "A reviewer says: " in e[1]["content"]
        )
    monkeypatch.setattr(
        envs.Search,
        "begin",
        lambda self, *a: [begin(self, *a), vars(self).update(gold="Zyx Quux")][0],
    )
    assert (
        ra.warmup(envs.make("search"), args) == examples
    )  # nor does it depend on the right answers


def test_the_warm_up_of_a_world_without_tools():
    examples = ra.warmup(
        envs.make("household"), dataclasses.replace(ARGS, env="household", examples=20)
    )
    dialogues = [e for e in examples if isinstance(e, list)]
    assert 40 <= len(examples) <= 60 and all(m["content"] for e in dialogues for m in e)
    played = [e for e in dialogues if ra.NEXT not in e[-2]["content"]]
    assert len(played) == 30 and all("Action: " in m["content"] for e in played for m in e[2::2])


# ------------------------------------------------------------------------------- whole runs: set-up


@pytest.fixture(scope="module")
def environment(environment, tiny):
    return environment  # with the tiny model in the cache already


# What the process that runs the script does first: see `run_script` in conftest.py.
PREPARE = """
import envs, reagent
args = reagent.Args(**reagent.TINY | {"examples": 60})
reagent.warmup(envs.make("search"), args)
[reagent.trajectories(args, split, range(8), "any") for split in ("test",
    "ood")]  # the encyclopedias are cached
"""


@pytest.fixture
def main_here(monkeypatch, run_here):
    """reagent.main() in this process, its functions watched; some training rewards are made 1."""
    seen, real = (
        SimpleNamespace(rollouts=[], updates=[], judged=[]),
        {name: getattr(ra, name) for name in ("rollout", "judge", "update")},
    )

    def rolling(model, chat, args, split, seeds, **rest):
        episodes = real["rollout"](model, chat, args, split, seeds, **rest)
        for i, e in enumerate(episodes):
            if rest["stream"][0] == "learn":
                e["rule"] = float((i + rest["stream"][2]) % 3 == 0)
        seen.rollouts.append((split, list(seeds), rest, episodes))
        return episodes

    def judging(rrm, world, args, histories, stream):
        judged = real["judge"](rrm, world, args, histories, stream)
        for i, j in enumerate(judged):
            j.update(
                score=i % 2 / 2 if stream[0] == "learn" else j["score"], critique="Go on like this."
            )
        seen.judged.append((stream, histories, judged))
        return judged

    def updating(model, reference, chat, args, optimizer, episodes, advantages):
        before = common.fingerprint(model)
        metrics = real["update"](model, reference, chat, args, optimizer, episodes, advantages)
        seen.updates.append((before, common.fingerprint(model), episodes, advantages))
        return metrics

    for name, function in ("rollout", rolling), ("judge", judging), ("update", updating):
        monkeypatch.setattr(ra, name, function)

    def run(flags):
        for store in vars(seen).values():
            store.clear()
        run_here(flags)
        return seen

    return run


# ---------------------------------------------------------------------------- whole runs: as a user


def test_phases_come_in_order_and_episodes_are_kept_whole(whole, tiny):
    metrics, rollouts = lines(whole / "metrics.jsonl"), lines(whole / "rollouts.jsonl")
    assert [row["phase"] for row in metrics] == STEPS and [
        row["phase_step"] for row in metrics
    ] == [1, 2, 1, 2, 1, 1, 2]
    assert [row["gradient_steps"] for row in metrics] == [1, 2, 3, 4, 6, 8, 10]
    assert [row["episodes"] for row in metrics] == [0, 0, 9, 9, 9, 25, 41]
    for row in metrics[5:]:
        episodes = [e for e in rollouts if e["step"] == row["step"]]
        first, second = (
            list(itertools.chain(*(episodes[i : i + 4] for i in (k, k + 8)))) for k in (0, 4)
        )
        assert len(episodes) == 16 and all(
            len({e["seed"] for e in episodes[i : i + 8]}) == 1 for i in (0, 8)
        )
        assert (
            row["success"] == sum(e["won"] for e in first) / 8
            and row["second_success"] == sum(e["won"] for e in second) / 8
        )
        assert row["judge_parsed"] == sum(e["judgement"]["parsed"] for e in episodes) / 16
        assert (
            row["reward_rule"] == pytest.approx(sum(e["rule"] for e in episodes) / 16)
            and row["groups"] == 2
        )
        assert row["reward"] == pytest.approx(
            sum(e["rule"] + 0.3 * e["judgement"]["score"] for e in episodes) / 16
        )
        assert (
            abs(row["logprob_gap"]) < 1e-4
            and row["entropy"] > 0
            and {"judge_auc", "leaks", "second_calls", "kl"} <= set(row)
        )
    assert len({e["seed"] for e in rollouts}) == 4 and {e["split"] for e in rollouts} == {
        "train"
    }  # no question twice
    assert all(
        {"history", "valid", "rule", "won", "judgement"} <= set(e)
        and not {"ids", "mask", "gold"} & set(e)
        for e in rollouts
    )
    assert [e["attempt"] for e in rollouts] == ([1] * 4 + [2] * 4) * 4
    judged = [
        sum(e["judgement"]["tokens"] for e in rollouts if e["step"] == step) for step in (6, 7)
    ]
    assert all(n > 16 for n in judged) and all(
        metrics[i]["tokens"] - metrics[i - 1]["tokens"] > n for i, n in zip((5, 6), judged)
    )
    assert "eval_success" in metrics[5] and "eval_success" not in metrics[6]
    summary = json.loads((whole / "summary.json").read_text())
    assert {"before_ood", "after_ood", "cold_start"} <= set(summary) and summary["arm"] == "U"
    assert set(summary["judge"]) == {"before", "judge-sft", "judge-grpo"}
    assert summary["train_episodes"] == metrics[-1]["episodes"] == 32 + 9  # 9: half of the judge's
    trained, rrm = (common.load(str(whole / name))[0] for name in ("model", "rrm"))
    for name, p in tiny[0].named_parameters():  # every parameter moved
        assert not torch.equal(p, trained.get_parameter(name)) and not torch.equal(
            p, rrm.get_parameter(name)
        )


def test_the_judge_is_frozen_while_the_agent_learns_and_the_other_way_round(
    main_here, tiny, monkeypatch, tmp_path
):
    both, examples = [], ra.judge_examples
    monkeypatch.setattr(
        ra,
        "judge_examples",
        lambda state, *given: (
            both.append([common.fingerprint(state.model), common.fingerprint(state.rrm[0])])
            or examples(state, *given)
        ),
    )
    seen = main_here(f"{SMALL} --out-dir run")
    start, (judge, *agent) = common.fingerprint(tiny[0]), seen.updates
    rrm = common.load(str(tmp_path / "run" / "rrm"))[0]
    assert (
        both == [[agent[0][0], start]] * 2
    )  # the judge starts from the base, its trajectories are of the cold-started agent
    assert judge[1] == common.fingerprint(rrm) != start
    saved = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["state"][
        "rrm"
    ]
    assert all(torch.equal(value, saved[name]) for name, value in rrm.state_dict().items())
    assert len(agent) == 2 and agent[0][0] not in (start, judge[1]) and agent[1][0] == agent[0][1]
    assert agent[1][1] == common.fingerprint(common.load(str(tmp_path / "run" / "model"))[0])
    assert len(judge[2]) == 8 and all(
        set(e["mask"]) == {0, 1} and e["mask"] == sorted(e["mask"]) for e in judge[2]
    )


def test_learning_rates_of_the_phases(main_here, monkeypatch):
    seen = []
    monkeypatch.setattr(
        ra,
        "PHASES",
        {
            name: lambda state, *given, name=name, phase=phase: (
                seen.append((name, state.optimizer.param_groups[0]["lr"])) or phase(state, *given)
            )
            for name, phase in ra.PHASES.items()
        },
    )
    main_here(f"{SMALL} --lr 0.001 --sft-lr 0.005 --eval-episodes 1 --out-dir run")
    rates = {"cold-start": 0.005, "judge-sft": 0.005, "judge-grpo": 0.001, "learn": 0.001}
    assert seen == [
        (name, pytest.approx(rates[name] * step / 5))
        for name, step in zip(STEPS, [1, 2, 1, 2, 1, 1, 2])
    ]


# ----------------------------------------------------------------------------------------- variants


def tokens(episodes):
    return sum(sum(e["mask"]) for e in episodes)


def test_none_never_asks_a_judge_and_no_weight_on_its_score_is_the_same(main_here, whole, tmp_path):
    seen = main_here(f"{SMALL} --variant none --out-dir none")
    assert not seen.judged and not (tmp_path / "none" / "rrm").exists() and len(seen.updates) == 2
    assert all(rest.get("before") is None for *_, rest, _ in seen.rollouts)
    metrics, rollouts = (
        lines(tmp_path / "none" / "metrics.jsonl"),
        lines(tmp_path / "none" / "rollouts.jsonl"),
    )
    assert (
        [row["phase"] for row in metrics] == AGENT
        and "judge_parsed" not in metrics[-1]
        and "second_success" not in metrics[-1]
    )
    assert len(rollouts) == 16 and all(
        e["attempt"] == 1 and e["judgement"] is None for e in rollouts
    )
    assert [row["tokens"] for row in metrics] == [
        0,
        0,
        *itertools.accumulate(tokens(episodes) for *_, episodes, _ in seen.updates),
    ]
    summary = json.loads((tmp_path / "none" / "summary.json").read_text())
    assert set(summary) >= set(SUMMARY) and summary["arm"] == "none" and summary["judge"] == {}
    none = [
        (ids["ids"], advantage)
        for *_, episodes, advantages in seen.updates
        for ids, advantage in zip(episodes, advantages)
    ]
    seen = main_here(f"{SMALL} --variant R --score-weight 0 --rrm {whole}/rrm --out-dir zero")
    zero = [
        (ids["ids"], advantage)
        for *_, episodes, advantages in seen.updates
        for ids, advantage in zip(episodes, advantages)
    ]
    assert zero == none and len({advantage for _, advantage in none}) > 1
    model = [
        (tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("none", "zero")
    ]
    assert model[0] == model[1] and {stream[0] for stream, *_ in seen.judged} >= {"learn", "watch"}


def test_the_cold_start_is_what_the_expert_said_to_the_end(main_here, monkeypatch, tmp_path):
    seen, imitate = [], ra.imitate
    monkeypatch.setattr(ra, "imitate", lambda *given: seen.append(given[-1]) or imitate(*given))
    main_here(f"{SMALL} --variant none --steps 1 --eval-episodes 1 --out-dir run")
    assert [len(dialogues) for dialogues in seen] == [
        16,
        16,
    ]  # --cold-start 16 by --sft-batch-size 8, each as a second attempt too
    dialogues = sorted([m["content"] for m in dialogue] for step in seen for dialogue in step[::2])
    again = sorted([m["content"] for m in dialogue] for step in seen for dialogue in step[1::2])
    assert all(
        two[2:] == one[2:]
        and two[1].startswith(one[1])
        and "\nA reviewer says: nothing.\n" in two[1]
        for one, two in zip(dialogues, again)
    )
    expert = [envs.run_episode(WORLD, envs.thinking_player, 500_000_000 + i) for i in range(16)]
    assert dialogues == sorted(
        [
            f"{WORLD.system}\n{ra.CALL}",
            *[text for turn in zip(e["observations"], e["actions"]) for text in turn],
        ]
        for e in expert
    )
    assert all(e["won"] and envs.read_call(e["actions"][-1])[0] == "answer" for e in expert)


def test_r_has_no_second_attempts(main_here, whole, tmp_path):
    seen = main_here(f"{SMALL} --variant R --rrm {whole}/rrm --steps 1 --out-dir run")
    assert all(rest.get("before") is None for *_, rest, _ in seen.rollouts)
    [(_, _, episodes, advantages)], rollouts = (
        seen.updates,
        lines(tmp_path / "run" / "rollouts.jsonl"),
    )
    assert (
        len(episodes) == len(rollouts) == 8
        and "second_success" not in lines(tmp_path / "run" / "metrics.jsonl")[-1]
    )
    [(_, histories, judged)] = [found for found in seen.judged if found[0][0] == "learn"]
    assert (
        histories == [e["history"] for e in episodes]
        and [e["judgement"] for e in rollouts] == judged
    )
    assert all(e["attempt"] == 1 for e in rollouts)
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["tokens"] == tokens(episodes) + sum(
        j["tokens"] for j in judged
    )
    by_hand = [e["rule"] + 0.3 * j["score"] for e, j in zip(episodes, judged)]
    assert advantages == ra.group_advantages(by_hand, 4) and len(set(by_hand)) == 4
    assert [row["phase"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == AGENT[:3]


@pytest.mark.parametrize("pool", ["joint", "separate"])
def test_u_has_both_and_doubles_the_batch(main_here, whole, tmp_path, pool):
    seen = main_here(f"{SMALL} --pool {pool} --rrm {whole}/rrm --steps 1 --out-dir run")
    [(_, _, episodes, advantages)] = seen.updates
    (_, seeds, one, first), (_, again, two, second) = [
        found for found in seen.rollouts if found[2]["stream"][0] == "learn"
    ]
    judged, judged_again = [found[2] for found in seen.judged if found[0][0] == "learn"]
    assert (
        len(first) == len(second) == 8
        and len(episodes) == len(advantages) == 16
        and seeds == again
        and one.get("before") is None
    )
    assert two["before"] == [(e["history"], j["critique"]) for e, j in zip(first, judged)]
    assert [
        e is f for e, f in zip(episodes, [*first[:4], *second[:4], *first[4:], *second[4:]])
    ] == [True] * 16
    r1, r2 = (
        [e["rule"] + 0.3 * j["score"] for e, j in zip(*pair)]
        for pair in ((first, judged), (second, judged_again))
    )
    pools = (
        [r1[:4] + r2[:4], r1[4:] + r2[4:]] if pool == "joint" else [r1[:4], r2[:4], r1[4:], r2[4:]]
    )
    assert advantages == [a for group in pools for a in ra.group_advantages(group, len(group))]
    kept, verdicts = (
        lines(tmp_path / "run" / "rollouts.jsonl"),
        [*judged[:4], *judged_again[:4], *judged[4:], *judged_again[4:]],
    )
    assert [e["return"] for e in kept] == r1[:4] + r2[:4] + r1[4:] + r2[4:] and [
        e["advantage"] for e in kept
    ] == advantages
    assert [e["attempt"] for e in kept] == ([1] * 4 + [2] * 4) * 2 and [
        e["judgement"] for e in kept
    ] == verdicts
    evaluated = [rest for split, _, rest, _ in seen.rollouts if rest["stream"][0] == "evaluate"]
    assert evaluated and all(
        rest.get("before") is None for rest in evaluated
    )  # at test time: the first attempt alone
    assert not any(stream[0] == "evaluate" for stream, *_ in seen.judged)
    last, summary = (
        lines(tmp_path / "run" / "metrics.jsonl")[-1],
        json.loads((tmp_path / "run" / "summary.json").read_text()),
    )
    assert last["groups"] == len(pools) and len(kept) == 16
    assert (
        last["tokens"]
        == summary["generated_tokens"]
        == tokens(episodes) + sum(j["tokens"] for j in verdicts)
    )


def test_c_trains_nothing_and_counts_second_attempts(main_here, whole, tiny, tmp_path):
    seen = main_here(f"{SMALL} --variant C --rrm {whole}/rrm --out-dir run")
    assert not seen.updates and {rest["stream"][0] for *_, rest, _ in seen.rollouts} == {"evaluate"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary) >= set(SUMMARY) and summary["arm"] == "C"
    assert summary["gradient_steps"] == summary["train_episodes"] == summary["cold_start"] == 0
    assert common.fingerprint(
        common.load(str(tmp_path / "run" / "model"))[0]
    ) == common.fingerprint(tiny[0])
    evaluated = [found for found in seen.rollouts if found[2]["stream"][0] == "evaluate"]
    alone, plays = (
        evaluated[:2],
        iter(evaluated[2:]),
    )  # before: first attempts; after: with second ones
    assert [(split, rest.get("before")) for split, _, rest, _ in alone] == [
        ("test", None),
        ("ood", None),
    ]
    for (split, seeds, one, first), (split_again, again, two, _) in zip(plays, plays):
        told = [e["history"] for e in first]
        judged = next(
            j
            for stream, histories, j in seen.judged
            if stream == ("evaluate", split) and histories == told
        )
        assert (split, seeds) == (split_again, again) and one.get("before") is None
        assert two["before"] == [(e["history"], j["critique"]) for e, j in zip(first, judged)]


def test_c_counts_the_second_attempt(tiny, monkeypatch):
    def won(model, chat, args, split, seeds, *, before=None, **rest):
        return [{"split": split, "seed": seed, "won": before is not None, "rule": 0.0,
            "valid": [True], "history": ["", "", ""],
                 "actions": [""], "cut": 0, "truncated": False} for seed in seeds]  # fmt: skip

    def names_the_answer(
        rrm, world, args, histories, stream
    ):  # of seed 0, and unreadably of seed 299
        return [
            EMPTY | {"parsed": i < 4, "critique": answers.get(i, "")} for i in range(len(histories))
        ]

    answers = {
        seed: [WORLD.reset(seed=seed, options={"split": "test"}), f"It is {WORLD.gold}."][1]
        for seed in (0, 299)
    }
    monkeypatch.setattr(ra, "rollout", won)
    monkeypatch.setattr(ra, "judge", names_the_answer)
    state = ra.State(ARGS, WORLD, tiny[1], tiny[0], tiny)
    for second in True, False:
        numbers, counted = ra.evaluate(state, "test", 300, second)
        assert numbers["success"] == second and [e["seed"] for e in counted] == list(range(300))
        assert numbers.get("leaks") == (0.25 if second else None) and numbers.get(
            "judge_parsed"
        ) == (4 / 300 if second else None)


def test_a_judge_of_another_run_is_used_as_it_is(main_here, whole, tmp_path):
    seen = main_here(f"{SMALL} --rrm {whole}/rrm --out-dir run")
    assert [row["phase"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == AGENT and not (
        tmp_path / "run" / "rrm"
    ).exists()
    assert (
        torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["state"]["rrm"]
        is None
    )  # it stays where it is
    judge = common.load(str(whole / "rrm"))[0]
    assert json.loads((tmp_path / "run" / "args.json").read_text())["judge"] == common.fingerprint(
        judge
    )
    quality = json.loads((tmp_path / "run" / "summary.json").read_text())["judge"]
    assert (
        seen.judged[0][0] == ("watch",)
        and set(quality) == {"before"}
        and set(quality["before"]) == {"players", "agent"}
    )


def test_the_agent_learns_the_same_with_the_judge_of_a_finished_run(run_script, whole, tmp_path):
    """So arms that are given a judge can be compared with the run that trained it."""
    assert run_script(f"{SMALL} --rrm {whole}/rrm --out-dir run", tmp_path).status == 0
    learnt = [
        [{**e, "step": None} for e in lines(run / "rollouts.jsonl")]
        for run in (whole, tmp_path / "run")
    ]
    assert learnt[0] == learnt[1] and len(learnt[0]) == 32
    models = [common.load(str(run / "model"))[0].state_dict() for run in (whole, tmp_path / "run")]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_training_goes_on_with_a_judge_that_writes_garbage(main_here, whole, monkeypatch, tmp_path):
    puppet = Puppet("garbage")
    monkeypatch.setattr(common, "generate", puppet)
    monkeypatch.setattr(ra, "judge", JUDGE)
    seen = main_here(f"{SMALL} --rrm {whole}/rrm --judge-retries 2 --out-dir run")
    metrics, rollouts = (
        lines(tmp_path / "run" / "metrics.jsonl"),
        lines(tmp_path / "run" / "rollouts.jsonl"),
    )
    assert (
        all(row["judge_parsed"] == row["reward_model"] == 0 for row in metrics[2:])
        and len(seen.updates) == 2
    )
    spent = 3 * len(common.load(str(whole / "rrm"))[1].encode("garbage"))  # the retries too
    assert (
        all(e["judgement"] == EMPTY | {"tokens": spent, "asked": 3} for e in rollouts)
        and len(puppet.calls) % 3 == 0
        and puppet.calls
    )
    told = [rest["before"] for *_, rest, _ in seen.rollouts if rest.get("before")]
    assert told and all(critique == "" for before in told for _, critique in before)
    assert seen.updates[0][0] != seen.updates[0][1]  # the rule's reward still teaches


# --------------------------------------------------------------- whole runs: a model from elsewhere

save_llama = functools.partial(
    helpers.save_llama, text=[WORLD.system, ra.JUDGE, ra.AGAIN, *ra.ADVICE.values()], context=8192
)


def test_a_model_from_elsewhere_is_its_own_judge(main_here, llama, tmp_path):
    """Frozen as the run found it, prompted, not saved; in a world with an outcome alone."""
    (tmp_path / "worlds.py").write_text(NO_EXPERT)
    world = f"{tmp_path / 'worlds.py'}:NoExpert"
    short = "--judged 0 --cold-start 0 --max-new-tokens 6 --judge-tokens 8"
    flags = f"{SMALL} --model {llama} --env {world} {short} --shots 2 --show-actions"
    seen = main_here(f"{flags} --steps 2")
    [run] = (tmp_path / "runs").iterdir()
    assert (
        run.name.startswith("reagent-")
        and run.name.endswith("worlds.py-NoExpert-s0")
        and not (run / "rrm").exists()
    )
    metrics, summary = lines(run / "metrics.jsonl"), json.loads((run / "summary.json").read_text())
    assert (
        [row["phase"] for row in metrics] == ["learn"] * 2
        and metrics[0]["cut_judge"] > 0
        and metrics[0]["leaks"] is None
    )
    assert (
        set(summary["judge"]) == {"before"} and summary["judge"]["before"]["agent"]["error"] is None
    )
    assert (
        summary["expert"] == {"success": None, "se": None}
        and 0 <= summary["random"]["success"] <= 1
    )
    start, chat = common.load(str(llama))
    judged = [found for found in seen.judged if found[0][0] == "learn"]
    told = ra.judge_messages(
        envs.make(world),
        judged[-1][1][0],
        ra.shots(ra.Args(env=world, shots=2, show_actions=True))[1],
    )
    assert [m.get("shot") for m in told] == [None, None, True, None, True, None] and len(
        judged
    ) == 4
    assert common.fingerprint(common.load(str(run / "model"))[0]) != common.fingerprint(start)
    assert torch.load(run / "checkpoint" / "state.pt", weights_only=True)["state"]["rrm"] is None


def test_the_frozen_judge_is_the_start_model_after_a_resume_too(run_script, llama, tmp_path):
    short = "--judged 0 --cold-start 2 --eval-episodes 1 --max-new-tokens 6 --judge-tokens 8"
    flags = f"{SMALL} --model {llama} {short} --save-every 1 --out-dir"
    assert run_script(f"{flags} one", tmp_path).status == 0
    assert run_script(f"{flags} two", tmp_path, LOG.format(step=2, name="SIGTERM")).status == 143
    assert run_script(f"{flags} two --resume", tmp_path).status == 0
    helpers.same_run(tmp_path / "one", tmp_path / "two")


def test_prompts_beyond_the_context_are_skipped(run_script, whole, tiny, tmp_path):
    """In a context where first attempts fit, but longer ones and most demonstrations do not."""
    first = max(
        len(tiny[1].dialogue(ra.opening(WORLD, WORLD.reset(seed=seed)[0]))) for seed in range(20)
    )
    judged = len(tiny[1].dialogue(ra.judge_messages(WORLD, [WORLD.reset(seed=0)[0]])))
    flags = f"--variant U --max-context {max(first + 13, judged + 33)} --out-dir run"
    result = run_script(f"{SMALL} {flags}", tmp_path)
    assert result.status == 0, result.stderr
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert (
        metrics[0]["too_long"] > 0
        and metrics[-1]["truncated"] > 0
        and metrics[-1]["not_judged"] > 0
    )


def test_a_judge_with_another_tokenizer(run_script, llama, tmp_path):
    result = run_script(
        f"{SMALL} --rrm {llama} --judge-tokens 4 --steps 1 --eval-episodes 1 --out-dir run",
        tmp_path,
    )
    assert result.status == 0, result.stderr
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["judge_parsed"] == 0
    assert "\n    judge: 0.0." in result.stdout


# ---------------------------------------------------------------------------------------- bad input


NO_EXPERT = """
import envs
class NoExpert(envs.World):
    name, system, max_turns = "no-expert", "Say yes.", 2
    def begin(self, rng, split):
        return f"Number {rng.randrange(1000)}. What do you say?"
    def admissible(self):
        return ["yes", "no"]
    def act(self, text):
        self.won = text == "yes"
        return "Heard.", text in ("yes", "no")
"""


@pytest.fixture(scope="module")
def bad_models(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    save_llama(path / "short", context=64)
    save_llama(path / "no-template", template=None)
    shutil.copytree(llama, path / "garbage")
    (path / "garbage" / "config.json").write_text('{"model_type": ')
    (path / "other").mkdir()
    (path / "other" / "judge.gguf").write_text("GGUF")
    (path / "worlds.py").write_text(NO_EXPERT)
    return path


BAD_VALUES = {
    "sft-lr": "nan -1", "group-size": "0 1 -4 3", "updates": "0 3 16", "clip": "-0.1 nan",
    "clip-high": "-1 inf", "kl": "-1 nan",
    "variant": "V u", "score-weight": "-1 nan inf", "pool": "both", "judge-tokens": "0",
    "judge-retries": "-1", "judged": "-1",
    "judge-epochs": "0", "judge-steps": "-1", "cold-start": "-1", "cold-epochs": "0",
    "sft-batch-size": "0 -1 1.5", "rrm": "tiny tiny:16x1",
}  # fmt: skip


@pytest.mark.parametrize("flags, words", [
    *((f"--{name} {value}", f"--{name}") for name,
    values in BAD_VALUES.items() for value in values.split()),
    ("--env repair", "--judged 0"),
    ("--env {bad}/worlds.py:NoExpert --variant none", "--cold-start 0"),
    ("--prefill --thinking", "--prefill"),
    ("--variant R --pool separate", "--pool"), ("--variant none --rrm ./nowhere", "no --rrm"),
    ("--rrm ./nowhere", "config.json is missing"), ("--rrm {bad}/other", "config.json is missing"),
    ("--rrm {bad}/garbage", "cannot be loaded"), ("--rrm nobody/nothing", "cannot be loaded"),
    ("--rrm {bad}/no-template", "chat template"), ("--rrm {bad}/short --variant C", "context"),
])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    run_script, bad_models, home, tmp_path, flags, words
):
    before = everything_under(bad_models), everything_under(home)
    # or a full run would follow
    accepted = "common.Run.start = reagent.evaluate = lambda *a: os._exit(77)"
    refused(run_script(f"{SMALL} {flags.format(bad=bad_models)}", tmp_path, accepted), words)
    assert (
        not list(tmp_path.iterdir())
        and (everything_under(bad_models), everything_under(home)) == before
    )


@pytest.mark.parametrize("flags", ["--variant R --batch-size 64 --group-size 16", "--judge-steps 0",
                                   "--cold-start 0", "--score-weight 0", "--clip 0",
                                   "--judge-retries 0"])  # fmt: skip
def test_what_is_accepted(run_script, bad_models, tmp_path, flags):
    accepted = "common.Run.start = lambda *a: os._exit(77)"
    assert run_script(f"{SMALL} {flags.format(bad=bad_models)}", tmp_path, accepted).status == 77
