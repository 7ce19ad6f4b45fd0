"""act.py: reward table, questions, pairs, losses, schedule, stages, warm-up, whole runs, data files, bad input, kills and resume."""

import copy
import dataclasses
import functools
import json
import math
import random
import re
import time
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import helpers
import pytest
import torch
from helpers import (
    CHECKPOINT,
    LOG,
    PAD,
    SUMMARY,
    WORDS,
    Bigram,
    everything_under,
    lines,
    random_episodes,
    random_table,
    refused,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import act
import common
import envs

torch.set_num_threads(1)
ENV = "repair"
WORLD = envs.make(ENV)
SMALL = (  # of the tiny model that --quick builds too
    f"--env {ENV} --model tiny --examples 400 --steps 3 --batch-size 8 --micro-batch-size 4 --group-size 4 --eval-episodes 4 "
    "--eval-every 2 --save-every 2 --max-new-tokens 28 --choice-tokens 28 --held-out 4 --num-demos 5 --sft-batch-size 4 "
    "--pair-batch-size 8 --pipeline act,il,rl"
)
ARGS = dataclasses.replace(
    act.Args(),
    **act.TINY
    | dict(
        env=ENV,
        model="tiny",
        examples=400,
        max_new_tokens=28,
        choice_tokens=28,
        batch_size=8,
        group_size=4,
        micro_batch_size=4,
        num_demos=5,
        kl=0.0,
    ),
)
PROMPTS = act.make_prompts(WORLD, ARGS)


def prompts_of(world):
    return dataclasses.replace(PROMPTS, system=world.system)


def state_of(model, reference=None, chat=PAD, args=ARGS, lr=1.0):
    """What the stages work on, with an optimizer that steps by the gradient itself."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr) if model is not None else None
    return act.State(args, PROMPTS, chat, model, reference, optimizer)


@pytest.fixture
def no_step():
    """Losses leave their gradient, instead of stepping by it."""
    with mock.patch.object(common, "gradient_step", return_value=0.0) as step:
        yield step


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# --------------------------------------------------------------------------------------------------- parsers and the reward


CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "Mira"}}\n</tool_call>'
REPLIES = [  # as chat models write them
    ("<action>open the case</action>", "open the case"),
    ("It is loud. <action> open the case \n</action> so", "open the case"),
    ("<action>a</action> no, <action>b</action>", "b"),
    ("<action></action>", ""),
    ("<action>a<action>b</action>", "b"),
    ("<action>a</action></action>", "a"),
    ("<Action>a</Action>", "a"),
    ("<ACTION>\nA\n</ACTION>", "A"),
    ("<action >a</action >", "a"),
    ("**<action>a</action>**", "a"),
    ("`<action>a</action>`", "a"),
    ("```xml\n<action>a</action>\n```", "a"),
    ("## Thought\nIt is loud.\n\n## Action\n<action>a</action>", "a"),
    ("Thought: it is loud.\nAction: <action>a</action>", "a"),
    ("- <action>a</action>", "a"),
    ("I write it as <action>the action</action>: <action>a</action>.", "a"),
    ("<action>put mug 1 in/on desk 2</action>", "put mug 1 in/on desk 2"),
    ("<action>a < b > c</action>", "a < b > c"),
    ("<action>print('<b>')</action>", "print('<b>')"),
    ("<action>line one\nline two</action>", "line one\nline two"),
    (f"I search.\n<action>{CALL}</action>", CALL),
    (f"<action>\n{CALL}\n</action>", CALL),
    ("<think>open it</think><action>a</action>", "a"),
    ("<think>either <action>a</action> or</think><action>b</action>", "b"),
    ("so <action>a</action> or</think> <action>b</action>", "b"),  # the template had opened it
    ("<think>I could <action>a</action>", None),  # cut off in a thought
    ("<think>I could <action>a</action></think>", None),
    ("<thinking>x</thinking>\n<action>a</action>", "a"),
    ("\u3010\u3011<action>\u00e9t\u00e9</action>", "\u00e9t\u00e9"),
    ("<action>a</action>" + " and more" * 50, "a"),
    ("open the case", None), ("", None), ("Action: open the case", None),
    ("<action>open the case", None), ("open the case</action>", None),
    ("</action>open the case<action>", None), ("<actions>a</actions>", None),
    ("<action>a</act>", None), ("[action]a[/action]", None), ("< action>a</ action>", None),
    ("<action/>a", None), (CALL, None),
]  # fmt: skip


@pytest.mark.parametrize("reply, action", REPLIES)
def test_parse_action(reply, action):
    assert act.parse_action(reply) == action


EITHER = "open the case", "clean the gears"
CHOICES = [  # what stands in the tags, and which of EITHER that is, or what else
    ("open the case", 0), ("Clean the gears.", 1), ("**open the case**", 0), ('"open the case"', 0),
    ("`clean the gears`", 1), ("'open  the\ncase'", 0), ("1", 0), ("2", 1), ("2.", 1), ("#2", 1),
    ("Action 1", 0), ("action 2", 1), ("ACTION 2.", 1), ("Action #1", 0), ("Action: 2", 1),
    ("**Action 2**", 1), ("option 2", 1), ("Option one", 0), ("action two", 1), ("number 2", 1),
    ("choice 1", 0), ("first", 0), ("the second", 1), ("The first action", 0), ("second one", 1),
    ("I choose Action 2", 1), ("Action 2 is better than the other", 1),
    ("Action 1: open the case", 0), ("1. open the case", 0), ("2) clean the gears", 1),
    ("Option 2 - clean the gears", 1), ("Action 1: clean the gears", 1),  # its words
    ("Action 1\nopen the case", 0),
    ("Action 1 or Action 2", "Action 1 or Action 2"), ("Action 3", "Action 3"), ("3", "3"),
    ("check the power", "check the power"), ("", ""), ("dance", "dance"), ("both", "both"),
    ("Action 12", "Action 12"), ("the better action", "the better action"),
    ("first check the power", "first check the power"),
]  # fmt: skip


@pytest.mark.parametrize("said, chosen", CHOICES)
def test_parse_choice(said, chosen):
    found = act.parse_choice(f"Because. <action>{said}</action>", *EITHER)
    assert act.normal(found) == act.normal(EITHER[chosen] if isinstance(chosen, int) else chosen)
    assert act.parse_choice(said, *EITHER) is None  # without tags


def test_an_action_that_looks_like_a_number_is_taken_at_its_word():
    assert act.parse_choice("<action>1</action>", "2", "1") == "1"
    assert act.parse_choice("<action>Action 2</action>", "action 2", "sing") == "Action 2"


def test_a_choice_between_tool_calls():
    other = CALL.replace("Mira", "Velden")
    compact = '{"arguments":{"query":"Mira"},"name":"search"}'
    for said, row in (
        (CALL, "right"),
        (compact, "right"),
        (other, "possible"),
        ("Action 2", "right"),
    ):
        pair = {"expert": CALL, "candidate": other, "admissible": None}
        found = act.parse_choice(act.tagged(said), *act.in_order(pair, True))
        assert act.choice_reward(found, pair)[1] == row


def test_what_the_policy_writes_is_what_is_read():
    assert all(
        act.parse_action(f"Hm. {act.tagged(action)}") == action for action in WORLD.admissible()
    )


@pytest.mark.parametrize("env", [*envs.WORLDS, "20q", "20q-full"])
def test_the_experts_action_in_tags_wins(env):
    world = envs.make(env)
    for seed in range(10):
        _, info = world.reset(seed=seed, options={"split": "test"})
        over = False
        while not over:
            reply = f"I think of <this>.\n**{act.tagged(world.expert())}**"
            episode = {"history": [], "valid": [], "complete": [], "reward": 0.0}
            act.take_turn(world, episode, reply, True)
            over = episode["over"]
            assert episode["valid"] == [True]
        assert episode["won"], (env, seed)


@pytest.mark.parametrize("other", [
    "open the case", "Open The Case", " open  the\tcase\n", "open the case.", "OPEN THE CASE .", "open the case..",
    "**open the case**", "`open the case`", '"Open the case."', "_open the case_",
])  # fmt: skip
def test_actions_that_mean_the_same(other):
    assert act.normal(other) == act.normal("open the case")
    example = {
        "expert": "open the case",
        "candidate": "clean the gears",
        "admissible": WORLD.admissible(),
    }
    assert act.choice_reward(other, example) == (1.0, "right")
    assert act.choice_reward("clean the gears", example | {"expert": other}) == (0.1, "possible")


@pytest.mark.parametrize(
    "other",
    [
        "open the cases",
        "open case",
        "close the case",
        "",
        ".",
        "open the case now",
        "the case open",
    ],
)
def test_actions_that_mean_something_else(other):
    assert act.normal(other) != act.normal("open the case")


ACTIONS = st.lists(
    st.sampled_from(
        [
            "go",
            "To",
            "mug",
            "1",
            ".",
            "..",
            " ",
            "\t",
            "\n",
            "\u0130",
            "\x85",
            "{",
            "}",
            '"a": 1',
            "*",
            "`",
        ]
    ),
    max_size=6,
).map("".join)
TAGGISH = st.lists(st.sampled_from([
    "<action>", "</action>", "<ACTION>", "<think>", "</think>", "<", ">", "Action 1", "2", "first", " ", "\n", "a", "{", '"', ":"]),
    max_size=12).map("".join)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.one_of(ACTIONS, TAGGISH, st.text(max_size=20)))
def test_bad_output_never_raises_and_normal_is_done_after_one_go(text):
    assert act.normal(act.normal(text)) == act.normal(text)
    act.event(text)
    for reply in text, act.tagged(text), text + act.tagged(text) + text:
        for complete in True, False:
            for second in True, False:
                reward, row = act.paid_choice({"text": reply, "complete": [complete]}, PAIR, second)
                assert row in ("right", "possible", "impossible", "untagged", "cut")
                assert row != "untagged" or complete and reward == -0.5
                assert row != "cut" or not complete and reward == 0
        episode = {"history": [], "valid": [], "complete": [], "reward": 0.0}
        WORLD.reset(seed=0)
        act.take_turn(WORLD, episode, reply, True)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=30), st.text(max_size=10))
def test_any_action_survives_its_tags(action, words):
    assert act.parse_action(f"{words} {act.tagged(action)} {words}") == action.strip()


@pytest.mark.parametrize(
    "unit", ["<action>", "</action>", "<action>a</action>", "a", " ", ".", "<", ". "]
)
def test_megabytes_take_bounded_time(unit):
    text, start = unit * (1_000_000 // len(unit)), time.process_time()
    act.parse_action(text), act.parse_action("<action>" + text), act.normal(text), act.event(text)
    act.parse_choice(act.tagged(text), *EITHER)
    assert time.process_time() - start < 5


POSSIBLE = ["open the case", "check the power", "clean the gears"]
PAIR = {"expert": "open the case", "candidate": "clean the gears", "admissible": POSSIBLE}
ODD = PAIR | {"candidate": "dance"}  # what the policy proposed cannot be done


@pytest.mark.parametrize("example, reply, reward, row", [
    (PAIR, "<action>open the case</action>", 1.0, "right"),  # the expert's
    (PAIR, "I think. <action>Open the case.</action>", 1.0, "right"),
    (PAIR, "<action>clean the gears</action>", 0.1, "possible"),  # the candidate
    (PAIR, "<action>check the power</action>", 0.1, "possible"),  # a third one that is possible
    (PAIR, "<action> CHECK  the power. </action>", 0.1, "possible"),
    (PAIR, "<action>dance</action>", 0.0, "impossible"),
    (PAIR, "<action></action>", 0.0, "impossible"), (PAIR, "<action>.</action>", 0.0, "impossible"),
    (PAIR, "<action>Action 1</action>", 1.0, "right"), (PAIR, "<action>Action 2</action>", 0.1, "possible"),
    (ODD, "<action>2</action>", 0.0, "impossible"), (PAIR, "<action>Action 3</action>", 0.0, "impossible"),
    (PAIR, "open the case", -0.5, "untagged"), (PAIR, "", -0.5, "untagged"), (PAIR, "<action>open the case", -0.5, "untagged"),
    (PAIR, "Action 1", -0.5, "untagged"),
    (PAIR, "<action>open the case</action><action>dance</action>", 0.0, "impossible"),  # the last one counts
    (ODD, "<action>dance</action>", 0.0, "impossible"),  # a candidate is not possible for having been proposed
    (ODD, "<action>open the case</action>", 1.0, "right"), (ODD, "<action>clean the gears</action>", 0.1, "possible"),
    (PAIR | {"admissible": None}, "<action>open the case</action>", 1.0, "right"),  # a world without lists
    (PAIR | {"admissible": None}, "<action>clean the gears</action>", 0.1, "possible"),
    (PAIR | {"admissible": None}, "<action>dance</action>", 0.0, "impossible"),
    (PAIR | {"admissible": ["check the power"]}, "<action>open the case</action>", 1.0, "right"),  # the expert's first, listed or not
])  # fmt: skip
def test_every_row_of_the_reward_table(example, reply, reward, row):
    assert act.paid_choice({"text": reply, "complete": [True]}, example, False) == (reward, row)
    cut = act.paid_choice({"text": reply, "complete": [False]}, example, False)
    assert cut == (
        (0.0, "cut") if row == "untagged" else (reward, row)
    )  # what it says in tags counts
    swapped = (
        reply.replace("Action 1", "Action x")
        .replace("Action 2", "Action 1")
        .replace("Action x", "Action 2")
        .replace(">2<", ">1<")
    )
    assert act.paid_choice({"text": swapped, "complete": [True]}, example, True) == (reward, row)


def test_a_state_without_a_candidate_has_the_same_table():
    state = {key: PAIR[key] for key in ("expert", "admissible")}
    replies = [
        "<action>open the case</action>",
        "<action>clean the gears</action>",
        "<action>dance</action>",
        "<action></action>",
        "dance",
    ]
    for admissible, second in (POSSIBLE, "possible"), (None, "impossible"):
        rows = f"right {second} impossible impossible untagged"
        example = state | {"admissible": admissible}
        assert [
            act.choice_reward(act.parse_action(reply), example)[1] for reply in replies
        ] == rows.split()
        paid = [act.paid_action({"text": reply, "complete": [True]}, example) for reply in replies]
        assert paid == [(float(row == "right"), row) for row in rows.split()]


# ------------------------------------------------------------------------------------------------ demonstrations, questions


@pytest.fixture(scope="module")
def chores():
    """States of one episode of the household."""
    return act.demonstrations(dataclasses.replace(ARGS, env="household"), "train", [3])


def test_demonstrations_replay(chores):
    states = act.demonstrations(ARGS, "train", range(3)) + chores
    assert {(s["env"], s["split"]) for s in states} == {(ENV, "train"), ("household", "train")}
    for s in states:
        world = envs.make(s["env"])
        done = [m["content"] for m in s["messages"] if m["role"] == "assistant"]
        observation, _, over, _, info = envs.replay(world, s["seed"], done, s["split"])
        assert s["messages"][-1] == {"role": "user", "content": observation} and not over
        assert (
            len(done) == s["turn"]
            and s["admissible"] == info["admissible"]
            and s["expert"] == world.expert() in s["admissible"]
        )
        assert set(s) == set(act.STATE)
    assert [s["turn"] for s in chores] == list(range(len(chores))) and len(chores) > 2
    last = envs.make("household")
    envs.replay(last, 3, [s["expert"] for s in chores])
    assert last.won


def listed(states):
    """States as --show-actions has them."""

    def shown(m, n):
        return (
            m | {"content": m["content"] + envs.LISTING + f"go to mug {n}\nlook"}
            if m["role"] == "user"
            else m
        )

    return [s | {"messages": [shown(m, n) for n, m in enumerate(s["messages"])]} for s in states]


def test_a_question_shows_each_action_where_it_says(chores):
    world = envs.make("household")
    prompts = prompts_of(world)
    for state, with_lists in zip(chores, listed(chores)):
        pair = state | {"candidate": next(a for a in state["admissible"] if a != state["expert"])}
        for order, first, second in (False, "expert", "candidate"), (True, "candidate", "expert"):
            for instruction in act.CHOOSE, act.CHOOSE_NOW:
                messages = act.question(prompts, pair, order, instruction)
                assert (
                    messages[:-1] == act.dialogue(prompts, pair["messages"])[:-1]
                    and messages[-1]["role"] == "user"
                )
                assert messages[-1]["content"].splitlines() == [
                    *pair["messages"][-1]["content"].splitlines(),
                    "Possible actions:",
                    *pair["admissible"],
                    act.PROPOSED,
                    f"Action 1: {pair[first]}",
                    f"Action 2: {pair[second]}",
                    instruction,
                ]
                shown = pair | {"messages": with_lists["messages"]}
                assert (
                    act.question(prompts, shown, order, instruction) == messages
                )  # one list, the last
    assert "Possible" not in str(act.question(prompts, pair | {"admissible": None}, False))


def test_the_policy_sees_its_dialogue_and_nothing_else(chores):
    prompts = prompts_of(envs.make("household"))
    for state in chores + listed(chores):
        before = copy.deepcopy(state)
        system, *said = act.dialogue(prompts, state["messages"])
        assert system == {"role": "system", "content": f"{prompts.system}\n{act.POLICY}"}
        assert [m["role"] for m in said] == [m["role"] for m in state["messages"]]
        for shown, kept in zip(said, state["messages"]):
            assert shown["content"] == (
                act.tagged(kept["content"]) if kept["role"] == "assistant" else kept["content"]
            )
        assert "Action 1" not in str(said) and state == before  # nothing is changed in place
        assert ("Possible" in str(said)) == ("Possible" in str(state["messages"]))


@pytest.mark.parametrize("env", ["repair", "household", "20q", "search"])
@pytest.mark.parametrize("prefill", [False, True])
def test_worked_examples_are_random_play_on_train(env, prefill, monkeypatch):
    world, splits = envs.make(env), set()
    reset = type(world).reset
    monkeypatch.setattr(type(world), "expert", lambda self: pytest.fail("the expert was asked"))
    monkeypatch.setattr(
        type(world),
        "reset",
        lambda self, **k: splits.add(k["options"]["split"]) or reset(self, **k),
    )
    args = dataclasses.replace(ARGS, env=env, shots=4, prefill=prefill, show_actions=True)
    prompts = act.make_prompts(world, args)
    assert splits == {"train"} and prompts == act.make_prompts(world, args)
    state = [{"role": "user", "content": "Hm."}]
    for shots, seen in (
        (prompts.acts, act.dialogue(prompts, state)),
        (
            prompts.choices[act.CHOOSE],
            act.question(
                prompts,
                {"messages": state, "expert": "a", "candidate": "b", "admissible": None},
                False,
            ),
        ),
    ):
        assert (
            seen[1:-1] == shots
            and len(shots) == 8
            and [m["role"] for m in shots] == ["user", "assistant"] * 4
        )
        assert all(m["shot"] for m in shots[1::2])
    for asked, reply in zip(prompts.acts[::2], prompts.acts[1::2]):
        listing = asked["content"].split(envs.LISTING)[1].splitlines()
        assert envs.one_line(act.parse_action(reply["content"])) in listing
        assert reply["content"] == act.tagged(act.parse_action(reply["content"]))
    for instruction, shots in prompts.choices.items():
        better = []
        for n, (asked, reply) in enumerate(zip(shots[::2], shots[1::2])):
            one, two = re.search(
                r"Action 1: (.*)\nAction 2: (.*)\n" + re.escape(instruction), asked["content"], re.S
            ).groups()
            good = act.parse_action(reply["content"])
            better.append(good == two)
            for action in one, two:  # carried out: what the reason says is true
                reset(world, seed=10**6 + n, options={"split": "train"})
                assert world.step(action)[-1]["valid"] == (action == good)
            bare = prefill or instruction == act.CHOOSE_NOW
            assert (reply["content"] == act.tagged(good)) == bare
            assert bare or reply["content"].startswith(
                f"Action {1 + better[-1]} can be done now, and action {2 - better[-1]} cannot"
            )
        assert better == [False, True] * 2  # in balance
    plain = act.make_prompts(world, dataclasses.replace(args, shots=0))
    assert plain.acts == [] and set(map(len, plain.choices.values())) == {0}


def test_lessons_are_whole_episodes_with_a_mask_for_what_is_taught(tiny):
    states, chat = act.demonstrations(ARGS, "train", range(3)), tiny[1]
    rng = random.Random(0)

    def taught(some):
        """(prompt, reply) of what the masks of some lessons let through."""
        found = []
        for lesson in act.lessons(some):
            ids, mask = chat.dialogue_and_mask(act.dialogue(PROMPTS, lesson))
            for i in range(1, len(ids)):
                if mask[i] and not mask[i - 1]:
                    end = next((j for j in range(i, len(ids)) if not mask[j]), len(ids))
                    found.append((ids[:i], ids[i:end]))
        return sorted(found)

    def wanted(some):
        return sorted(
            (
                chat.dialogue(act.dialogue(PROMPTS, s["messages"])),
                chat.reply(act.tagged(s["expert"])),
            )
            for s in some
        )

    assert len(act.lessons(states)) == 3 < len(states) and taught(states) == wanted(states)
    before = copy.deepcopy(states)
    for _ in range(20):
        some = [s for s in states if rng.random() < 0.6]
        rng.shuffle(some)
        assert taught(some) == wanted(some) and len(act.lessons(some)) == len(
            {s["seed"] for s in some}
        )
    other = [s | {"expert": "dance"} for s in states[:1]]  # of another player, at the same state
    assert (
        taught(states + other) == wanted(states + other) and len(act.lessons(states + other)) == 4
    )
    assert taught(states * 2) == wanted(states * 2) and states == before


def test_prompts_do_not_change_with_what_is_hidden():
    seen = set()
    for finding in WORLD.faults["is too loud"][1]:
        world = envs.make("repair")
        observation, info = world.reset(seed=0)
        vars(world).update(symptom="is too loud", finding=finding)
        messages = [{"role": "user", "content": observation}]
        pair = {
            "messages": messages,
            "admissible": info["admissible"],
            "expert": world.expert(),
            "candidate": "clean the gears",
        }
        seen.add(str([act.dialogue(PROMPTS, messages), act.question(PROMPTS, pair, False)]))
    assert len(seen) == 1


# ------------------------------------------------------------------------------------------------------------------ schedule


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(act.STAGES)), st.integers(1, 40), st.integers(1, 4), st.integers(0, 5), st.integers(1, 9),
       st.sampled_from([(8, 4), (12, 2), (2, 2)]))  # fmt: skip
def test_each_example_exactly_epochs_times(stage, examples, epochs, index, supervised, sizes):
    args = dataclasses.replace(ARGS, epochs=epochs, steps=None, sft_batch_size=supervised, pair_batch_size=supervised + 1,
                               batch_size=sizes[0], group_size=sizes[1])  # fmt: skip
    plan = act.schedule(args, stage, examples, index)
    size = {"il": supervised, "sft-choice": supervised + 1, "dpo": supervised + 1}.get(
        stage, sizes[0] // sizes[1]
    )
    seen = [i for batch, _ in plan for i in batch]
    for epoch in range(epochs):  # one pass after the other, each complete
        assert sorted(seen[epoch * examples : (epoch + 1) * examples]) == list(range(examples))
    assert len(seen) == epochs * examples and len(plan) == epochs * math.ceil(examples / size)
    assert all(len(batch) == len(coins) <= size for batch, coins in plan) and len(
        plan[0][0]
    ) == min(size, examples)
    assert plan == act.schedule(args, stage, examples, index)


def test_steps_cut_a_stage_or_prolong_it():
    args = dataclasses.replace(ARGS, epochs=2, sft_batch_size=8)

    def sizes(steps):
        plan = act.schedule(dataclasses.replace(args, steps=steps), "il", 12, 0)
        return [len(batch) for batch, _ in plan]

    assert (
        sizes(None) == [8, 4] * 2
        and sizes(3) == [8, 4, 8]
        and sizes(1) == [8]
        and sizes(7) == [8, 4] * 3 + [8]
    )


def test_orders_are_fair_coins():
    args = dataclasses.replace(ARGS, epochs=1, steps=None)
    coins, again, other = ([coin for _, coins in act.schedule(dataclasses.replace(args, seed=seed), "act", 4000, index) for coin in coins]
                           for seed, index in ((0, 0), (0, 1), (1, 0)))  # fmt: skip
    for some in coins, again, other:
        assert (
            len(some) == 4000
            and set(some) == {False, True}
            and abs(sum(some) - 2000) < 4 * math.sqrt(1000)
        )
    for some in again, other:  # drawn anew for each stage and seed
        assert abs(sum(a == b for a, b in zip(coins, some)) - 2000) < 4 * math.sqrt(1000)
    first = act.schedule(dataclasses.replace(args, epochs=20), "act", 50, 0)
    shown = Counter(i for batch, row in first for i, coin in zip(batch, row) if coin)
    assert (
        0 < min(shown.values()) and max(shown.values()) < 20
    )  # and anew for each epoch, not once per pair


# --------------------------------------------------------------------------------------------------------- losses by hand


def test_group_advantages_by_hand():
    # 1, 0.1, -0.5: mean 0.2, sample deviation sqrt(0.57); 0, 0, 1: mean 1/3, deviation 1 / sqrt(3)
    found = act.group_advantages([1, 0.1, -0.5, 0, 0, 1], 3)
    by_hand = [
        0.8 / 0.57**0.5,
        -0.1 / 0.57**0.5,
        -0.7 / 0.57**0.5,
        -1 / 3**0.5,
        -1 / 3**0.5,
        2 / 3**0.5,
    ]
    assert found == pytest.approx(by_hand, abs=1e-5)
    assert (
        act.group_advantages([0.1] * 4 + [-0.5] * 4, 4) == [0.0] * 8
    )  # exactly, whatever rounding does to the mean
    assert act.without_spread([0.1, 0.1, 0.1, 1, 0, 0, 1, 1, 1], 3) == 2


def test_a_cut_reply_is_left_out_of_its_group():
    paid = [(1, "right"), (0, "cut"), (0.1, "possible"), (-0.5, "untagged"),
            (0, "cut"), (1, "right"), (0, "cut"), (0, "cut"), *[(0, "cut")] * 4,
            (1, "right"), (1, "right"), (0, "cut"), (1, "right")]  # fmt: skip
    found = act.advantages_of_read(paid, 4)
    # as of the three others alone
    by_hand = [0.8 / 0.57**0.5, 0.0, -0.1 / 0.57**0.5, -0.7 / 0.57**0.5]
    assert found == pytest.approx(by_hand + [0.0] * 12, abs=1e-5) and found[1] == 0
    assert found[4:] == [0.0] * 12 and act.without_spread(found, 4) == 3
    all_read = [(r, "right") for r in (1, 0.1, 0.1, 0)]
    assert act.advantages_of_read(all_read, 4) == act.group_advantages([1, 0.1, 0.1, 0], 4)


def test_loss_by_hand():
    def t(*rows):
        return torch.tensor(rows, dtype=torch.float64)

    torch.testing.assert_close(
        act.kl_estimate(t([0, 0, 0]), t([2.0, 1.0, 0.5]).log()),
        t([1 - math.log(2), 0, math.log(2) - 0.5]),
    )
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    torch.testing.assert_close(
        act.token_weights(mask, 2), torch.tensor([[0, 0.25, 0.25, 0], [0.5, 0, 0, 0]])
    )
    torch.testing.assert_close(
        act.token_weights(mask, 8), act.token_weights(mask, 2) / 4
    )  # of the whole step, not of what is at hand


def test_dpo_loss_by_hand():
    chosen, rejected = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True)
        for x in ([-1.0, -3.0, -3.0], [-2.0, -3.0, -1.0])
    )
    loss = act.dpo_loss(
        chosen, rejected, torch.tensor([-1.5, -3.0, -2.0]), torch.tensor([-1.5, -3.0, -2.0]), 0.5
    )
    # beta times the margins 1, 0, -2: log(1 + e^-0.5), log 2, log(1 + e)
    by_hand = torch.tensor(
        [0.4740769841801067, 0.6931471805599453, 1.3132616875182228], dtype=torch.float64
    )
    torch.testing.assert_close(loss, by_hand)
    loss.sum().backward()
    slope = 0.5 * torch.tensor(
        [0.3775406687981454, 0.5, 0.7310585786300049], dtype=torch.float64
    )  # beta sigmoid(-beta margin)
    torch.testing.assert_close(
        chosen.grad, -slope
    )  # less loss with a likelier chosen action and a less likely rejected one
    torch.testing.assert_close(rejected.grad, slope)


# ------------------------------------------------------------------------------------- whole steps against other derivations


def softmax(table, temperature):
    rows = [
        [math.exp(x / temperature) for x in row]
        for row in torch.tensor(table, dtype=torch.float32).tolist()
    ]
    return [[x / sum(row) for x in row] for row in rows]


def derived_grpo(table, reference, episodes, advantages, kl, temperature):
    """Gradient and numbers from the formulas, token by token, in Python's floats; the ratio is 1, so its derivative is that of log p."""
    p, q = softmax(table, temperature), softmax(reference, temperature)
    grad, out = [[0.0] * WORDS for _ in range(WORDS)], Counter(loss=0.0, kl=0.0, entropy=0.0)
    total = sum(sum(e["mask"]) for e in episodes)
    for e, advantage in zip(episodes, advantages):
        weight = 1 / (len(episodes) * sum(e["mask"]))
        for last, word, sampled in zip(e["ids"], e["ids"][1:], e["mask"][1:]):
            if sampled:
                d = math.log(q[last][word] / p[last][word])
                estimate = math.exp(d) - d - 1
                out["loss"] += weight * (kl * estimate - advantage * math.log(p[last][word]))
                out["kl"] += estimate / total if kl else 0
                out["entropy"] -= math.log(p[last][word]) / total
                slope = weight * (kl * (1 - math.exp(d)) - advantage)  # of the loss in log p(word)
                for j in range(WORDS):
                    grad[last][j] += slope * ((j == word) - p[last][j]) / temperature
    return torch.tensor(grad), out


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([1, 2, 3, 100]),
    st.sampled_from([1.0, 0.7]),
)
def test_a_grpo_step_against_another_derivation(no_step, seed, kl, micro, temperature):
    rng = random.Random(seed)
    table, reference, episodes = random_table(rng), random_table(rng), random_episodes(rng, 6)
    advantages = [rng.choice([0.0, rng.gauss(0, 1)]) for _ in episodes]
    model, args = (
        Bigram(table),
        dataclasses.replace(ARGS, kl=kl, micro_batch_size=micro, temperature=temperature),
    )
    metrics = act.grpo_step(state_of(model, Bigram(reference), args=args), episodes, advantages)
    loss, batch = no_step.call_args[0][2:]
    assert (
        loss == metrics["loss"]
        and batch["advantages"] == advantages
        and batch["ids"] == [e["ids"] for e in episodes]
    )
    grad, numbers = derived_grpo(table, reference, episodes, advantages, kl, temperature)
    torch.testing.assert_close(model.table.grad, grad, atol=1e-5, rtol=1e-4)
    for name, value in numbers.items():
        assert metrics[name] == pytest.approx(value, abs=1e-5), name
    assert metrics["logprob_gap"] == pytest.approx(
        metrics["entropy"], abs=1e-6
    )  # as these episodes claim a log-prob of 0


def test_equal_rewards_teach_exactly_nothing(no_step):
    rng = random.Random(0)
    table, episodes = random_table(rng), random_episodes(rng, 8)
    model = Bigram(table)
    act.grpo_step(state_of(model), episodes, act.group_advantages([0.1] * 4 + [-0.5] * 4, 4))
    assert not model.table.grad.any()
    with_kl = dataclasses.replace(ARGS, kl=0.5)
    act.grpo_step(
        state_of(model, Bigram(table), args=with_kl), episodes, [0.0] * 8
    )  # the reference is itself
    assert model.table.grad.abs().max() < 1e-6
    act.grpo_step(state_of(model, Bigram(random_table(rng)), args=with_kl), episodes, [0.0] * 8)
    assert model.table.grad.abs().max() > 1e-3


TALKS = [  # ids and masks of dialogues: 2 stands before each reply and nowhere else
    ([0, 1, 2, 3, 4, 0, 2, 4], [0, 0, 0, 1, 1, 0, 0, 1]), ([1, 2, 4, 4, 3], [0, 0, 1, 1, 1])]  # fmt: skip


@pytest.mark.parametrize("micro", [1, 2, 100])
def test_imitation_learns_the_replies_alone(no_step, micro):
    table, args = (
        random_table(random.Random(1)),
        dataclasses.replace(ARGS, micro_batch_size=micro, temperature=0.7),
    )
    chat = SimpleNamespace(pad=0, dialogue_and_mask=lambda talk: talk)

    def imitate(table):
        model = Bigram(table)
        model.max_context = 8
        return model, act.imitate(model, chat, args, None, TALKS)["loss"]

    model, loss = imitate(table)
    p, grad, total = softmax(table, 0.7), torch.zeros(WORDS, WORDS), 0.0
    for ids, mask in TALKS:
        for last, word, learnt in zip(ids, ids[1:], mask[1:]):
            if learnt:  # six tokens in all
                total -= math.log(p[last][word]) / 6
                grad[last] -= (torch.eye(WORDS)[word] - torch.tensor(p[last])) / 0.7 / 6
    assert loss == pytest.approx(total, abs=1e-5)
    torch.testing.assert_close(model.table.grad, grad, atol=1e-6, rtol=1e-4)
    assert (
        not model.table.grad[:2].any() and model.table.grad[2:].any(1).all()
    )  # 0 and 1 stand in prompts alone
    for row, same in (
        (0, True),
        (1, True),
        (2, False),
        (3, False),
    ):  # other logits in the prompt are another model, but no other loss
        other = copy.deepcopy(table)
        other[row] = [7.0, -3.0, 0.0, 5.0, -5.0]
        assert (imitate(other)[1] == loss) == same


@pytest.mark.parametrize("micro", [1, 2, 100])
def test_a_dpo_step_against_another_derivation(no_step, micro):
    rng = random.Random(2)
    table, reference = random_table(rng), random_table(rng)
    triples = [([0, 1, 2], [3, 4], [4]), ([1, 2], [4, 4, 3], [1, 3]), ([0, 2], [4], [3, 3, 3])]
    model, args = Bigram(table), dataclasses.replace(ARGS, micro_batch_size=micro, dpo_beta=0.4)
    metrics = act.dpo_step(state_of(model, Bigram(reference), args=args), triples)
    p, q = softmax(table, 1.0), softmax(reference, 1.0)

    def ratio(prompt, said):
        return sum(math.log(p[a][b] / q[a][b]) for a, b in zip([prompt[-1], *said], said))

    margins, grad = (
        [ratio(prompt, chosen) - ratio(prompt, rejected) for prompt, chosen, rejected in triples],
        torch.zeros(WORDS, WORDS),
    )
    for (prompt, *replies), margin in zip(triples, margins):
        for said, sign in zip(replies, (-1, 1)):
            for last, word in zip([prompt[-1], *said], said):
                grad[last] += (
                    sign
                    * 0.4
                    / (1 + math.exp(0.4 * margin))
                    / 3
                    * (torch.eye(WORDS)[word] - torch.tensor(p[last]))
                )
    assert metrics["loss"] == pytest.approx(
        sum(math.log(1 + math.exp(-0.4 * m)) for m in margins) / 3, abs=1e-5
    )
    assert metrics["chosen_gained_more"] == pytest.approx(sum(m > 0 for m in margins) / 3)
    torch.testing.assert_close(model.table.grad, grad, atol=1e-6, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------- a tiny model


@pytest.fixture(scope="module")
def demos():
    return act.demonstrations(ARGS, "train", range(5))


@pytest.fixture(scope="module")
def pairs(tiny, demos):
    return act.make_pairs(*tiny, ARGS, PROMPTS, demos, ("pairs",))


def test_pairs_of_a_real_model(tiny, demos, pairs):
    rows, counts = pairs
    assert (
        counts["proposed"]
        == 2 * len(demos)
        == sum(counts.get(kind, 0) for kind in ("untagged", "cut", "equal", "repeated", "kept"))
    )
    assert len(rows) == counts["kept"] > 3  # or this file tests little
    assert counts["proposed"] < counts["tokens"] <= counts["proposed"] * ARGS.max_new_tokens
    seen = [(row["seed"], row["turn"], act.normal(row["candidate"])) for row in rows]
    assert len(set(seen)) == len(seen) and all(
        act.normal(row["candidate"]) != act.normal(row["expert"]) for row in rows
    )
    for row in rows:
        state = {key: row[key] for key in act.STATE}
        assert state in demos and row == state | {"candidate": row["candidate"], "model": "tiny"}
    apart = dataclasses.replace(ARGS, rollout_batch_size=3)
    assert act.make_pairs(*tiny, apart, PROMPTS, demos, ("pairs",)) == pairs
    assert (
        act.make_pairs(*tiny, dataclasses.replace(ARGS, seed=1), PROMPTS, demos, ("pairs",))
        != pairs
    )


def test_no_negative_is_the_experts_action(tiny, demos, monkeypatch):
    said = ["<action>{expert}</action>", "<action> {EXPERT}.</action>", "Hm. <action>{expert} .</action>", "{expert}", "",
            "<action></action>", "<action>dance</action>", "<action>Dance.</action>", "<action>clean the gears </action>"]  # fmt: skip
    states = [s for s in demos if s["expert"] != "clean the gears"][:2]
    texts = [
        text.format(expert=s["expert"], EXPERT=s["expert"].upper().replace(" ", "  "))
        for s in states
        for text in said
    ]
    asked = []

    def generate(model, chat, prompts, **rest):
        asked.append((prompts, rest))
        ids = [[0] * (n + 1) for n in range(len(texts))]
        return common.Replies(ids, [[0.0]] * len(ids), texts, [text != "" for text in texts])

    monkeypatch.setattr(common, "generate", generate)
    rows, counts = act.make_pairs(
        *tiny, dataclasses.replace(ARGS, candidates=9), PROMPTS, states, ("pairs",)
    )
    assert [(row["seed"], row["turn"], row["candidate"]) for row in rows] == [
        (s["seed"], s["turn"], action) for s in states for action in ("dance", "clean the gears")
    ]
    assert counts == {"proposed": 18, "equal": 6, "untagged": 4, "cut": 2, "repeated": 2, "kept": 4, "tokens": 18 * 19 // 2,
                      "cut_action": pytest.approx(1 / 9)}  # fmt: skip
    [(prompts, rest)] = asked  # of the policy as it acts: the candidates are its own
    assert prompts == [tiny[1].dialogue(act.dialogue(PROMPTS, s["messages"])) for s in states]
    assert (
        rest["rows"] == ARGS.rollout_batch_size
        and rest["max_new_tokens"] == 28
        and rest["samples"] == 9
        and len(set(rest["seeds"])) == 18
        and rest["temperature"] == 1.0
    )


def test_an_answer_is_masked_as_it_was_sampled(tiny, pairs):
    model, chat = tiny
    prompts = [
        chat.dialogue(act.question(PROMPTS, pair, coin))
        for pair, coin in zip(pairs[0][:3], (False, True, False))
    ]
    episodes = act.answer(model, chat, ARGS, prompts, (0, 1), 20, 4)
    assert len(episodes) == 12 and len({e["text"] for e in episodes}) > 1
    for i, e in enumerate(episodes):
        n = len(prompts[i // 4])
        assert e["ids"][:n] == prompts[i // 4] and e["mask"] == [0] * n + [1] * (len(e["ids"]) - n)
        assert chat.decode(e["ids"][n:]) == e["text"] and 1 <= len(e["ids"]) - n <= 20
        assert e["complete"] == [e["ids"][-1] in chat.eos]
    with torch.no_grad():
        rows, _ = act.sampled_logprobs(model, chat, episodes, ARGS.temperature)
    for row, e in zip(rows, episodes):  # decoding and the training forward agree
        assert row.sum().item() == pytest.approx(e["logprob"], abs=1e-3)
    apart = dataclasses.replace(ARGS, rollout_batch_size=3)
    fewer = act.answer(
        model, chat, apart, prompts[:2], (0, 1), 20, 4
    )  # whatever else is in the batch
    assert [(e["ids"], e["mask"], e["text"]) for e in fewer] == [
        (e["ids"], e["mask"], e["text"]) for e in episodes[:8]
    ]
    assert [e["text"] for e in act.answer(model, chat, ARGS, prompts, (0, 2), 20, 4)] != [
        e["text"] for e in episodes
    ]
    forced = act.answer(
        model, chat, dataclasses.replace(ARGS, prefill=True), prompts, (0, 1), 20, 4
    )
    tag = chat.encode(act.TAG)
    for i, e in enumerate(forced):
        n = len(prompts[i // 4]) + len(tag)
        assert (
            e["ids"][:n] == prompts[i // 4] + tag
            and e["mask"][:n] == [0] * n
            and all(e["mask"][n:])
        )
        assert e["text"] == act.TAG + chat.decode(e["ids"][n:])


def test_episodes_do_not_depend_on_what_is_played_beside_them(tiny):
    seeds = range(7)
    whole, apart = (
        act.rollout(
            *tiny,
            dataclasses.replace(ARGS, rollout_batch_size=size),
            PROMPTS,
            "test",
            seeds,
            temperature=1.0,
            stream=("x",),
        )
        for size in (256, 3)
    )
    assert [e["ids"] for e in whole] == [e["ids"] for e in apart] and [
        e["seed"] for e in apart
    ] == list(seeds)
    assert [e["history"] for e in whole] == [e["history"] for e in apart]
    assert all(len(e["valid"]) == len(e["complete"]) == len(e["history"]) // 2 > 0 for e in whole)
    model = copy.deepcopy(tiny[0])
    model.max_context = (
        len(
            tiny[1].dialogue(
                act.dialogue(PROMPTS, [{"role": "user", "content": whole[0]["history"][0]}])
            )
        )
        + 40
    )
    played = act.rollout(
        model, tiny[1], ARGS, PROMPTS, "test", seeds, temperature=1.0, stream=("x",)
    )
    assert any(e["truncated"] for e in played) and all(
        len(e["ids"]) <= model.max_context for e in played
    )
    model.max_context = 30  # not even the first prompt: counted as lost, never an error
    played = act.rollout(
        model, tiny[1], ARGS, PROMPTS, "test", seeds, temperature=1.0, stream=("x",)
    )
    assert all(e["truncated"] and not e["valid"] and not e["won"] for e in played)
    forced = act.rollout(
        *tiny,
        dataclasses.replace(ARGS, prefill=True),
        PROMPTS,
        "test",
        seeds,
        temperature=1.0,
        stream=("x",),
    )
    assert all(reply.startswith(act.TAG) for e in forced for reply in e["history"][1::2])


def test_what_does_not_fit_the_context_is_left_out(tiny, demos, pairs):
    model, chat = copy.deepcopy(tiny[0]), tiny[1]
    asked = [len(chat.dialogue(act.dialogue(PROMPTS, s["messages"]))) + 28 for s in demos]
    model.max_context = min(asked)
    left = act.that_fit(model, chat, ARGS, PROMPTS, demos)
    assert left == [s for s, n in zip(demos, asked) if n <= model.max_context] and 0 < len(
        left
    ) < len(demos)
    chosen = [len(chat.dialogue(act.question(PROMPTS, p, False))) + 28 for p in pairs[0]]
    model.max_context = min(chosen)
    left = act.that_fit(model, chat, ARGS, PROMPTS, pairs[0])
    assert left == [p for p, n in zip(pairs[0], chosen) if n <= model.max_context] and 0 < len(
        left
    ) < len(pairs[0])
    found, counts = act.make_pairs(model, chat, ARGS, PROMPTS, demos, ("pairs",))
    assert found == left and counts["too long"] == len(pairs[0]) - len(left)


def act_gradient(tiny, pairs, **changes):
    model, args = copy.deepcopy(tiny[0]), dataclasses.replace(ARGS, **changes)
    model.zero_grad()
    metrics = act.act_stage(
        state_of(model, tiny[0], tiny[1], args), pairs[0][:4], [False, True, True, False], (0, 1)
    )
    return gradient(model), metrics


def test_an_act_step_does_not_depend_on_the_micro_batch(no_step, tiny, pairs, monkeypatch):
    reward = act.choice_reward  # whatever the model says, there is spread
    monkeypatch.setattr(
        act,
        "choice_reward",
        lambda action, example, complete: (len(action or "") % 7 / 7, reward(action, example)[1]),
    )
    (whole, metrics), *others = [
        act_gradient(tiny, pairs, micro_batch_size=size, kl=0.1) for size in (16, 1, 3)
    ]
    assert (
        whole.norm() > 0.01
        and metrics["groups_without_spread"] < 4
        and 0 <= metrics["cut_choice"] < 1
    )
    rows, rollouts = metrics.pop("rows"), metrics.pop("rollouts")
    assert len(rollouts) == 16
    for grad, numbers in others:
        assert (
            (grad - whole).norm() < 1e-4 * whole.norm()
            and numbers.pop("rows") == rows
            and numbers.pop("rollouts") == rollouts
        )
        assert numbers == pytest.approx(metrics, rel=1e-3, abs=1e-5, nan_ok=True)
    monkeypatch.setattr(act, "choice_reward", lambda action, example, complete: (0.1, "possible"))
    grad, metrics = act_gradient(tiny, pairs)
    assert (
        not grad.any()
        and metrics["groups_without_spread"] == metrics["groups"] == 4
        and metrics["loss"] == 0
    )
    assert metrics["reward"] == pytest.approx(0.1) and metrics["rows"] == {"possible": 1.0}


def test_cut_replies_teach_nothing_and_are_counted(no_step, tiny, pairs):
    grad, metrics = act_gradient(tiny, pairs, choice_tokens=2)  # not long enough for tags
    assert (
        not grad.any()
        and metrics["rows"] == {"cut": 1.0}
        and metrics["cut_choice"] == 1
        and metrics["reward"] == 0
    )
    told, said = set(), mock.Mock()
    with mock.patch.object(common.tqdm, "write", said):
        for _ in range(2):
            common.warn_cut(metrics, act.LIMITS, told)
    assert said.call_count == 1 and "--choice-tokens" in said.call_args[0][0]


def test_accuracy_by_position(tiny, pairs, monkeypatch):
    """A policy that always names Action 1 is right if the expert's action is shown first, and only then."""

    def answer(model, chat, args, prompts, stream, limit, samples):
        assert limit == args.choice_tokens
        said = [
            re.search(r"Action 1: (.*)", chat.decode(prompt))[1].removesuffix("assistant").strip()
            for prompt in prompts
        ]
        return [
            {"text": act.tagged(action), "complete": [True]}
            for action in said
            for _ in range(samples)
        ]

    monkeypatch.setattr(act, "answer", answer)
    monkeypatch.setattr(
        act, "reinforce", lambda state, episodes, paid, asked, part: {"paid": paid, "asked": asked}
    )
    for order in [False, True, False], [True] * 3, [False] * 3:
        out = act.act_stage(state_of(None, chat=tiny[1]), pairs[0][:3], order, (0, 1))
        assert [row == "right" for _, row in out["paid"]] == [
            not coin for coin in order for _ in range(4)
        ]
        assert out["asked"] == [
            {**pair, "expert_second": coin} for pair, coin in zip(pairs[0], order) for _ in range(4)
        ]
        assert out["right_if_first"] == 1 or all(order) and math.isnan(out["right_if_first"])
        assert out["right_if_second"] == 0 or not any(order) and math.isnan(out["right_if_second"])


def test_what_the_stages_train_on(tiny, pairs, monkeypatch):
    chat, batch, order, seen = tiny[1], pairs[0][:2], [True, False], {}
    for name in "imitate", "dpo_step", "reinforce":
        monkeypatch.setattr(act, name, lambda *given, name=name: seen.update({name: given}) or {})
    state = [chat.dialogue(act.dialogue(PROMPTS, pair["messages"])) for pair in batch]
    right, wrong = (
        [chat.reply(act.tagged(pair[key])) for pair in batch] for key in ("expert", "candidate")
    )

    def stage(name, batch=batch):
        return act.STAGES[name](state_of(None, chat=chat), batch, order, (0, 1))

    whole = act.lessons(batch)
    stage("il", whole)
    assert seen["imitate"][-1] == [act.dialogue(PROMPTS, lesson) for lesson in whole]
    stage("sft-choice")
    for messages, pair, coin, reply in zip(seen["imitate"][-1], batch, order, right, strict=True):
        ids, mask = chat.dialogue_and_mask(messages)  # the last reply alone
        asked = chat.dialogue(act.question(PROMPTS, pair, coin))
        assert ids == asked + reply and mask == [0] * len(asked) + [1] * len(reply)
    stage("dpo")
    assert seen["dpo_step"][-1] == list(zip(state, right, wrong))
    asked = []
    texts = [
        "Hm. <action>{expert}</action>",
        "<action>{candidate}</action>",
        "<action>x</action>",
        "nothing",
    ]

    def answer(model, chat, args, prompts, stream, limit, samples):
        asked.append(prompts)
        return [
            {"text": text.format(**pair), "complete": [True]} for pair in batch for text in texts
        ]

    monkeypatch.setattr(act, "answer", answer)
    for name, prompts in {
        "act": [chat.dialogue(act.question(PROMPTS, pair, coin, act.CHOOSE)) for pair, coin in zip(batch, order)],
        "no-reasoning": [chat.dialogue(act.question(PROMPTS, pair, coin, act.CHOOSE_NOW)) for pair, coin in zip(batch, order)],
        "rl": state,
    }.items():  # fmt: skip
        stage(name)
        assert asked[-1] == prompts
        wrong = 0.1 if batch[0]["candidate"] in batch[0]["admissible"] else 0.0
        *_, paid, about, part = seen["reinforce"]
        assert part == ("action" if name == "rl" else "choice")
        assert [reward for reward, _ in paid][:4] == (
            [1, 0, 0, 0] if name == "rl" else [1, wrong, 0, -0.5]
        )
        assert about == [
            pair | ({} if name == "rl" else {"expert_second": coin})
            for pair, coin in zip(batch, order)
            for _ in texts
        ]


def test_every_answer_is_kept_with_what_was_asked(monkeypatch):
    monkeypatch.setattr(act, "grpo_step", lambda *given: {})
    args, about = dataclasses.replace(ARGS, group_size=2), {"split": "train", "seed": 3, "turn": 1}
    state = {**about, "env": ENV, "messages": [], "admissible": POSSIBLE, "expert": "open the case"}
    said = [
        {"text": text, "ids": [], "mask": [0, 1], "complete": [False]}
        for text in ("Hm. <action>open the case</action>", "nothing")
    ]
    paid = [(1.0, "right"), (-0.5, "untagged")]
    for extra in {}, {"candidate": "clean the gears", "model": "tiny", "expert_second": True}:
        metrics = act.reinforce(
            state_of(None, args=args), said, paid, [state | extra] * 2, "choice"
        )
        rows = metrics["rollouts"]
        assert metrics["cut_choice"] == 1
        known = (
            about
            | {"expert": "open the case"}
            | {key: value for key, value in extra.items() if key != "model"}
        )
        assert rows == [
            known | {"reply": e["text"], "paid": reward, "row": row}
            for e, (reward, row) in zip(said, paid)
        ]
    played = [{"split": "train", "seed": 3, "history": ["o", "a", "p"], "valid": [True], "ids": [], "mask": [0, 1],
               "complete": [True]}] * 2  # fmt: skip
    rows = act.reinforce(
        state_of(None, args=args), played, [(1.0, "right"), (0.0, "lost")], played, "action"
    )["rollouts"]
    assert [row["history"] for row in rows] == [["o", "a", "p"]] * 2 and [
        row["row"] for row in rows
    ] == ["right", "lost"]
    assert all(
        {"split", "seed", "history", "paid", "row"} <= set(row) and not {"ids", "mask"} & set(row)
        for row in rows
    )


# ---------------------------------------------------------------------------------------------------------------- warm-up


@pytest.mark.parametrize("name", ["repair", "household", "20q"])
def test_warm_up_sees_train_alone_and_no_expert(name, monkeypatch):
    world, splits, possible = envs.make(name), set(), set()

    def forbidden(self):
        raise AssertionError("the warm-up asked the expert")

    monkeypatch.setattr(type(world), "expert", forbidden)
    reset, step = world.reset, world.step
    keep = lambda out: possible.update(out[-1]["admissible"]) or out  # noqa: E731
    monkeypatch.setattr(
        world, "reset", lambda **k: splits.add(k["options"]["split"]) or keep(reset(**k))
    )
    monkeypatch.setattr(world, "step", lambda action: keep(step(action)))
    args = dataclasses.replace(ARGS, env=name, examples=20)
    examples = act.warmup(world, args)
    assert splits == {"train"} and examples == act.warmup(
        envs.make(name), args
    )  # the cache is named after it
    kinds, thoughtful = Counter(), Counter()
    for system, *messages in examples:
        assert system == {"role": "system", "content": f"{world.system}\n{act.POLICY}"}
        assert [m["role"] for m in messages] == ["user", "assistant"] * (
            len(messages) // 2
        )  # it ends with the assistant
        asked, said = ([m["content"] for m in messages[start::2]] for start in (0, 1))
        ask, reply, action = asked[-1], said[-1], act.parse_action(said[-1])
        kind = (
            "choose"
            if act.CHOOSE in ask
            else "now"
            if act.CHOOSE_NOW in ask
            else "read"
            if act.READ in ask
            else "act"
        )
        kinds[kind] += 1
        assert not any(
            words in text for words in (act.CHOOSE, act.CHOOSE_NOW, act.READ) for text in asked[:-1]
        )  # once, at the end
        for text in (
            said if kind == "act" else said[:-1]
        ):  # imitated, or told in a question: actions of the world, tagged
            assert act.parse_action(text) in possible
            assert kind == "act" or text == act.tagged(act.parse_action(text))
        if (
            kind == "act"
        ):  # each turn after a thought or without, and the thought is what the observation said first
            for told, text in zip(asked, said):
                thought = text.removesuffix(act.tagged(act.parse_action(text)))
                thoughtful[bool(thought)] += 1
                assert not thought or thought.endswith(f" {act.event(told)} ")
        elif kind == "read":
            assert action is None and reply.endswith(f" {act.event(ask)}")
        else:
            listing = (
                ask.split("\nPossible actions:\n")[1].split(f"\n{act.PROPOSED}")[0].splitlines()
            )
            proposed = re.search(r"Action 1: (.*)\nAction 2: (.*)", ask).groups()
            assert (
                action in proposed
                and action in possible
                and set(proposed) <= set(listing) <= possible
            )
            assert (reply == act.tagged(action)) == (kind == "now") and (
                kind == "now" or f" {act.event(ask)} " in reply
            )
    assert len(kinds) == 4 and set(kinds.values()) == {20} and min(thoughtful.values()) > 5


@pytest.mark.parametrize("env", ["search", "household"])
def test_warm_up_in_every_world(env):
    """A world of tool calls, and one that lists nothing."""
    args = dataclasses.replace(ARGS, env=env, examples=6)
    world = envs.make(env, show_actions=True)
    if env == "household":
        world.admissible = lambda: None
    examples = act.warmup(world, args)
    assert len(examples) == 24
    said = [act.parse_action(messages[-1]["content"]) for messages in examples]
    assert (
        any("<tool_call>" in action for action in said if action) == (env == "search")
        and "" in said
        or env == "search"
    )


def test_warm_up_practises_rare_verbs_too():
    assert act.by_verb(["go to a", "open b", "go to c", "look"]) == [
        ["go to a", "go to c"],
        ["open b"],
        ["look"],
    ]
    assert act.by_verb([]) == []
    drawn, offered = (
        Counter(),
        Counter(),
    )  # verbs of the first turn, of the player and of what it could do
    for example in act.warmup(
        envs.make("household"), dataclasses.replace(ARGS, env="household", examples=300)
    ):
        said = [m["content"] for m in example if m["role"] == "assistant"]
        if act.parse_action(said[0]) and not any(
            words in str(example) for words in ("Action 1:", act.READ)
        ):
            drawn[act.parse_action(said[0]).split()[0]] += 1
    world = envs.make("household")
    for seed in range(300):
        verbs = [
            action.split()[0]
            for action in world.reset(seed=seed, options={"split": "train"})[1]["admissible"]
        ]
        for verb in set(verbs):
            offered[verb] += 1 / len(set(verbs))
    assert sum(drawn.values()) == 300 == pytest.approx(sum(offered.values()))
    for verb, expected in offered.items():
        assert abs(drawn[verb] - expected) < 4 * math.sqrt(expected) + 1, verb


def test_warm_up_prefers_neither_position_nor_winner():
    first = right = count = 0
    for *_, asked, reply in act.warmup(envs.make(ENV), dataclasses.replace(ARGS, examples=600)):
        if found := re.search(r"Action 1: (.*)\nAction 2: (.*)", asked["content"]):
            one, two = found.groups()
            count, first = count + 1, first + (act.parse_action(reply["content"]) == one)
            right += one < two
    assert (
        count > 1000
        and abs(first - count / 2) < 4 * math.sqrt(count) / 2
        and abs(right - count / 2) < 4 * math.sqrt(count) / 2
    )


def test_warm_up_shows_nothing_of_the_test_split():
    test = {
        envs.make("repair").reset(seed=seed, options={"split": "test"})[0].split(" that ")[0]
        for seed in range(2000)
    }
    openings = set(re.findall(r"\w+ brings a \w+ \w+", str(act.warmup(envs.make("repair"), ARGS))))
    assert len(openings) > 100 and len(test) > 80 and not openings & test


# ---------------------------------------------------------------------------------------------------- whole runs: set-up


@pytest.fixture(scope="module")
def environment(environment, tiny):
    return environment  # with the tiny model in the cache already


STAGED = "1-act", "2-il", "3-rl"
same_run = functools.partial(
    helpers.same_run, data=("demos.jsonl", "pairs.jsonl"), weights=(*STAGED, "model")
)


@pytest.fixture
def main_here(monkeypatch, run_here):
    """act.main() in this process, so that its functions can be watched -> what stages, rollouts and pairs were given."""
    seen = SimpleNamespace(stages=[], rollouts=[], pairs=[])
    rollout, make_pairs = act.rollout, act.make_pairs

    def watched(name, stage):
        def run(state, batch, order, stream):
            before = [p.detach().clone() for p in state.model.parameters()]
            weights = [
                common.fingerprint(m) if m is not None else None
                for m in (state.model, state.reference)
            ]
            metrics = stage(state, batch, order, stream)
            moved = [not torch.equal(a, b) for a, b in zip(before, state.model.parameters())]
            seen.stages.append(
                SimpleNamespace(name=name, weights=weights, batch=batch, stream=stream, moved=moved)
            )
            return metrics

        return run

    def rolling(model, chat, args, prompts, split, seeds, **rest):
        episodes = rollout(model, chat, args, prompts, split, seeds, **rest)
        seen.rollouts.append((split, list(seeds), rest, episodes))
        return episodes

    def pairing(model, chat, args, prompts, states, stream):
        seen.pairs.append((states, stream))
        return make_pairs(model, chat, args, prompts, states, stream)

    for name, stage in act.STAGES.items():
        monkeypatch.setitem(act.STAGES, name, watched(name, stage))
    monkeypatch.setattr(act, "rollout", rolling)
    monkeypatch.setattr(act, "make_pairs", pairing)

    def run(flags):
        run_here(flags)
        return seen

    return run


# ------------------------------------------------------------------------------------------------ whole runs: as a user

FILES = {
    "args.json",
    "metrics.jsonl",
    "rollouts.jsonl",
    "checkpoint",
    "model",
    "summary.json",
    "demos.jsonl",
    "pairs.jsonl",
}


def test_quick_by_subprocess(run_as_user, tmp_path):
    result = run_as_user(f"--quick --env {ENV}", tmp_path, timeout=300)
    assert result.status == 0 and "Traceback" not in result.stderr, result.stderr
    run = tmp_path / "runs" / f"act-{ENV}-s0"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"] and list(
        (tmp_path / "runs").iterdir()
    ) == [run]
    assert {path.name for path in run.iterdir()} == FILES | {"1-act", "2-il"}
    args, summary = (json.loads((run / name).read_text()) for name in ("args.json", "summary.json"))
    assert (
        args["script"] == "act"
        and args["args"]["env"] == ENV
        and {"versions", "device", "git_commit"} <= set(args)
    )
    assert (
        set(summary) >= set(SUMMARY) and summary["arm"] == "act,il" and summary["script"] == "act"
    )
    assert (
        summary["expert"] == {"success": 1.0, "se": 0.0}
        and summary["gradient_steps"] == 2 * args["args"]["steps"]
    )
    for piece in "\nbefore", "\nafter\n", "random", "expert", "next", "choice":
        assert piece in result.stdout
    model, _ = common.load(str(run / "model"))  # in the Hugging Face format
    saved = torch.load(run / "checkpoint" / "state.pt", weights_only=True)["state"]["model"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_a_run_and_its_summary(whole, tiny):
    assert {path.name for path in whole.iterdir()} == FILES | set(STAGED)
    summary, metrics = (
        json.loads((whole / "summary.json").read_text()),
        lines(whole / "metrics.jsonl"),
    )
    demos, rollouts = lines(whole / "demos.jsonl"), lines(whole / "rollouts.jsonl")
    assert set(summary) >= set(SUMMARY)
    assert all(
        set(summary[key]) == {"success", "se"} for key in ("before", "after", "random", "expert")
    )
    assert [row["stage"] for row in summary["stages"]] == ["before", "act", "il", "rl"]
    assert summary["held_out_states"] == 4 and summary["too_long"] == 0
    for row in summary["stages"]:
        assert 0 <= row["cut_choice"] <= 1 and 0 <= row["test"]["cut_action"] <= 1
        assert {"test", "next_action", "choice", "choice_first", "choice_second"} <= set(row)
        assert row["choice"] == pytest.approx((row["choice_first"] + row["choice_second"]) / 2)
    for when, row in ("before", summary["stages"][0]), ("after", summary["stages"][-1]):
        assert summary[when] == {key: row["test"][key] for key in ("success", "se")}
    assert [row["step"] for row in metrics] == list(range(1, 10)) and [
        row["stage_step"] for row in metrics
    ] == [1, 2, 3] * 3
    assert [row["stage"] for row in metrics] == [stage for stage in STAGED for _ in range(3)]
    for row in metrics:
        assert (
            row.get("grad_norm", 0) >= 0
            and row["gradient_steps"] == row["step"]
            and math.isfinite(row["loss"])
        )
        assert ("eval_success" in row) == (
            row["stage_step"] == 2
        )  # after the last step of a stage everything is evaluated
        assert ("right_if_first" in row) == (row["stage"] == "1-act")
        if row["stage"] != "2-il":
            assert 0 <= row["cut_choice" if row["stage"] == "1-act" else "cut_action"] <= 1
            assert (
                row["groups"] == 2
                and 0 <= row["groups_without_spread"] <= 2
                and abs(row["logprob_gap"]) < 1e-4
            )
            assert sum(row["rows"].values()) == pytest.approx(1) and -0.5 <= row["reward"] <= 1
    for row in metrics[
        :3
    ]:  # accuracy by position; null where a batch shows no question of that order
        worth = {"right": 1, "possible": 0.1, "impossible": 0, "cut": 0, "untagged": -0.5}
        assert row["reward"] == pytest.approx(
            sum(worth[kind] * part for kind, part in row["rows"].items())
        )
        assert all(
            row[key] is None or 0 <= row[key] <= 1 for key in ("right_if_first", "right_if_second")
        )
        assert row["right_if_first"] is not None or row["right_if_second"] is not None
    assert summary["train_episodes"] == len({row["seed"] for row in demos}) == 5 and summary[
        "expert_states"
    ] == len(demos)
    assert summary["pairs"] == len(lines(whole / "pairs.jsonl")) == summary["pair_counts"]["kept"]
    assert (
        summary["generated_tokens"] == metrics[-1]["tokens"]
        and summary["env_steps"] == 0
        and summary["gradient_steps"] == 9
    )
    said = [round(row.get("length", 0) * 8) for row in metrics]
    assert (
        metrics[-1]["tokens"] == summary["pair_counts"]["tokens"] + sum(said)
        and summary["pair_counts"]["tokens"] > 0
    )
    assert [row["tokens"] for row in metrics] == [
        metrics[-1]["tokens"] - sum(said[n:]) for n in range(1, 10)
    ]
    watched = [
        row for row in rollouts if "step" not in row
    ]  # an episode of the evaluation after each stage
    assert [row["stage"] for row in watched] == list(STAGED) and all(
        row["split"] == "test" for row in watched
    )
    assert all("history" in row and not {"ids", "mask", "expert"} & set(row) for row in watched)
    assert rollouts[-1] in watched and not any("rollouts" in row for row in metrics)
    trained, _ = common.load(str(whole / "model"))
    assert all(
        not torch.equal(a, b) for a, b in zip(trained.parameters(), tiny[0].parameters())
    )  # every parameter moved


def test_what_was_answered_agrees_with_the_metrics(whole):
    pairs, demos = lines(whole / "pairs.jsonl"), lines(whole / "demos.jsonl")
    args = act.Args(**json.loads((whole / "args.json").read_text())["args"])
    found = [row for row in lines(whole / "rollouts.jsonl") if "step" in row]
    metrics = [
        row for row in lines(whole / "metrics.jsonl") if row["stage"] != "2-il"
    ]  # nothing is sampled there
    assert [(row["stage"], row["step"]) for row in found] == [
        (row["stage"], row["stage_step"]) for row in metrics for _ in range(8)
    ]
    plan = [
        batch
        for index, stage, rows in ((0, "act", pairs), (2, "rl", demos))
        for batch in act.schedule(args, stage, len(rows), index)
    ]
    seen = Counter()
    for row, (batch, coins) in zip(metrics, plan, strict=True):
        said = [e for e in found if (e["stage"], e["step"]) == (row["stage"], row["stage_step"])]
        about = [(pairs if row["stage"] == "1-act" else demos)[i] for i in batch for _ in range(4)]
        assert len(said) == len(about) == 8 and row["rows"] == {
            kind: n / 8 for kind, n in Counter(e["row"] for e in said).items()
        }
        assert row["reward"] == pytest.approx(sum(e["paid"] for e in said) / 8)
        for e, example, coin in zip(said, about, [coin for coin in coins for _ in range(4)]):
            assert all(e[key] == example[key] for key in ("split", "seed", "turn", "expert"))
            read = act.paid_choice if row["stage"] == "1-act" else act.paid_action
            reward, kind = read(
                {"text": e["reply"], "complete": [e["row"] != "cut"]},
                example,
                *([coin] if read == act.paid_choice else []),
            )
            if row["stage"] == "1-act":
                assert (
                    e["candidate"] == example["candidate"]
                    and e["expert_second"] is coin
                    and (e["paid"], e["row"]) == (reward, kind)
                )
            else:
                assert not {"candidate", "expert_second"} & set(e) and (e["paid"], e["row"]) == (
                    float(kind == "right"),
                    kind,
                )
        if row["stage"] == "1-act":
            for place, second in ("first", False), ("second", True):
                right = [e["row"] == "right" for e in said if e["expert_second"] == second]
                seen[place] += len(right)
                assert row[f"right_if_{place}"] == (
                    pytest.approx(sum(right) / len(right)) if right else None
                )
        else:
            assert not {"right_if_first", "right_if_second"} & set(row)
    assert len(seen) == 2 and min(seen.values()) > 0  # both orders were shown


def test_no_state_of_the_test_split_is_trained_on(main_here, tmp_path):
    seen = main_here(
        f"{SMALL} --steps 1 --pipeline act,sft-choice,dpo,no-reasoning,il,rl --out-dir run"
    )
    customer = lambda s: s["messages"][0]["content"].split(" that ")[0]  # noqa: E731
    held_out = {
        customer(s) for states, stream in seen.pairs if "held out" in stream for s in states
    }
    rows = lines(tmp_path / "run" / "pairs.jsonl") + lines(tmp_path / "run" / "demos.jsonl")
    taught = [example for at in seen.stages for example in at.batch]
    rows += [example for example in taught if isinstance(example, dict)]
    rows += [
        {"split": "train", "messages": example} for example in taught if isinstance(example, list)
    ]
    assert {row["split"] for row in rows} == {"train"} and len(held_out) > 1
    assert {
        row["split"] for row in lines(tmp_path / "run" / "rollouts.jsonl") if "step" in row
    } == {"train"}
    test = {
        envs.make(ENV).reset(seed=seed, options={"split": "test"})[0].split(" that ")[0]
        for seed in range(1000)
    }
    assert held_out <= test and not test & {customer(row) for row in rows}
    assert all(
        split == "test" and rest["stream"][0] == "evaluate" for split, _, rest, _ in seen.rollouts
    )
    assert [states for states, stream in seen.pairs if stream == ("pairs",)] == [
        lines(tmp_path / "run" / "demos.jsonl")
    ]

    # each stage starts from what the one before has saved, and so does its reference
    start, names = json.loads((tmp_path / "run" / "args.json").read_text())["start"], []
    for index, at in enumerate(seen.stages):
        assert at.weights == [start, start] and at.stream == (index, 1)
        names.append(f"{index + 1}-{at.name}")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "run" / names[-1], dtype=torch.float32
        )
        assert AutoTokenizer.from_pretrained(tmp_path / "run" / names[-1]).chat_template
        assert common.fingerprint(model) != start or at.name in (
            "act",
            "no-reasoning",
            "rl",
        )  # a step may meet no spread
        start = common.fingerprint(model)
        assert at.name not in ("il", "sft-choice", "dpo") or all(at.moved)
    assert [at.name for at in seen.stages] == "act,sft-choice,dpo,no-reasoning,il,rl".split(",")
    assert common.fingerprint(common.load(str(tmp_path / "run" / "model"))[0]) == start
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES | set(names)


def test_a_reference_stays_while_its_stage_runs(main_here, tmp_path):
    seen = main_here(f"{SMALL} --pipeline il --steps 1 --out-dir plain")
    assert seen.stages.pop().weights[1] is None  # nobody needs a copy
    seen = main_here(f"{SMALL} --pipeline il,dpo --steps 2 --out-dir run")
    (a, b), (c, d) = (
        [at.weights for at in seen.stages if at.name == name] for name in ("il", "dpo")
    )
    assert a[1] == b[1] == a[0] != b[0] and c[1] == d[1] == c[0] != d[0] and b[0] != c[0]
    assert (
        "choice_first" in json.loads((tmp_path / "run" / "summary.json").read_text())["stages"][1]
    )


def test_reinforcement_on_episodes(main_here, tmp_path):
    seen = main_here(f"{SMALL} --pipeline rl --rl episodes --steps 2 --out-dir run")
    assert not [stream for _, stream in seen.pairs if stream == ("pairs",)]  # nobody needs them
    played = [
        (seeds, episodes) for split, seeds, rest, episodes in seen.rollouts if split == "train"
    ]
    metrics, summary = (
        lines(tmp_path / "run" / "metrics.jsonl"),
        json.loads((tmp_path / "run" / "summary.json").read_text()),
    )
    assert len(played) == 2 and len({seed for seeds, *_ in played for seed in seeds}) == 4
    kept = [row for row in lines(tmp_path / "run" / "rollouts.jsonl") if "step" in row]
    assert [(row["step"], row["seed"], row["history"], row["paid"], row["row"]) for row in kept] == [
        (step, e["seed"], e["history"], e["reward"], "right" if e["won"] else "lost")
        for step, (_, episodes) in enumerate(played, 1) for e in episodes]  # fmt: skip
    assert {row["stage"] for row in kept} == {"1-rl"} and not any(
        {"ids", "mask", "expert", "candidate"} & set(row) for row in kept
    )
    for (seeds, episodes), row in zip(played, metrics):
        assert (
            seeds[0] == seeds[3] != seeds[4] == seeds[7] and len(seeds) == 8
        )  # a group is one task
        assert (
            row["reward"] == pytest.approx(sum(e["score"] for e in episodes) / 8)
            and row["groups"] == 2
        )
        assert row["rows"].get("right", 0) == sum(e["won"] for e in episodes) / 8
        assert all(len(e["ids"]) == len(e["mask"]) and set(e["mask"]) == {0, 1} for e in episodes)
    assert (
        summary["env_steps"]
        == sum(len(e["valid"]) for *_, episodes in played for e in episodes)
        > 0
    )
    assert summary["generated_tokens"] == sum(
        sum(e["mask"]) for *_, episodes in played for e in episodes
    )
    assert summary["train_episodes"] == 5 + 16


def test_the_pairs_file_holds_no_rendered_prompt(whole):
    rows = lines(whole / "pairs.jsonl")
    text = (whole / "pairs.jsonl").read_text() + (whole / "demos.jsonl").read_text()
    assert rows and all(set(row) == {*act.STATE, "candidate", "model"} for row in rows)
    for words in (
        *WORLD.system.splitlines(),
        act.POLICY,
        act.PROPOSED,
        act.CHOOSE,
        "Action 1",
        "Possible",
        "<action>",
        "</action>",
        *common.CONTROL,
    ):
        assert json.dumps(words)[1:-1] not in text, words
    for row in rows + lines(whole / "demos.jsonl"):
        assert {m["role"] for m in row["messages"]} <= {"user", "assistant"} and all(
            set(m) == {"role", "content"} for m in row["messages"]
        )


def test_eval_only_writes_nothing(run_script, whole, tmp_path):
    before = everything_under(whole)
    result = run_script(
        f"{SMALL.replace('--model tiny', f'--model {whole}/2-il')} --eval-only", tmp_path
    )
    assert result.status == 0 and re.search(
        r"test: success \d\.\d+ \(se .*n 4\)", result.stdout + result.stderr
    ), result.stderr
    assert not list(tmp_path.iterdir()) and everything_under(whole) == before


def test_the_same_seed_gives_the_same_metrics_and_another_does_not(run_script, whole, tmp_path):
    assert run_script(f"{SMALL} --out-dir again", tmp_path).status == 0
    same_run(whole, tmp_path / "again")
    assert (
        run_script(f"{SMALL} --out-dir other --seed 9223372036854775807 --steps 1", tmp_path).status
        == 0
    )
    assert (
        lines(tmp_path / "other" / "demos.jsonl")[0]["messages"]
        != lines(whole / "demos.jsonl")[0]["messages"]
    )
    result = run_script(
        f"{SMALL} --steps 1 --pipeline act --demos other/demos.jsonl --pairs other/pairs.jsonl --out-dir third",
        tmp_path,
    )
    assert result.status == 0, result.stderr  # such large seeds are read back as they were
    assert (tmp_path / "third" / "pairs.jsonl").read_bytes() == (
        tmp_path / "other" / "pairs.jsonl"
    ).read_bytes()


# ------------------------------------------------------------------------------------------------- demonstrations and pairs


def test_files_of_another_run_take_the_place_of_its_data(run_script, whole, tmp_path):
    result = run_script(
        f"{SMALL} --demos {whole}/demos.jsonl --pairs {whole}/pairs.jsonl --out-dir run", tmp_path
    )
    assert result.status == 0, result.stderr
    one, two = (json.loads((run / "summary.json").read_text()) for run in (whole, tmp_path / "run"))
    spent = one["pair_counts"]["tokens"]  # what a run with a file of pairs need not sample
    assert (
        two["pair_counts"] == {} and one["generated_tokens"] - two["generated_tokens"] == spent > 0
    )
    metrics = [
        row | {"tokens": row["tokens"] + spent} for row in lines(tmp_path / "run" / "metrics.jsonl")
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in metrics)
    )
    same_run(whole, tmp_path / "run", apart=["pair_counts", "generated_tokens"])


def test_states_without_a_list_and_with_further_keys(run_script, whole, tmp_path):
    rows = [row | {"admissible": None, "note": [n, str(n)][n % 2], "expert": "2020-01-01"}
            for n, row in enumerate(lines(whole / "pairs.jsonl"))]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_script(
        f"{SMALL} --steps 1 --pipeline sft-choice --pairs pairs.jsonl --out-dir run", tmp_path
    )
    assert result.status == 0, result.stderr
    assert lines(tmp_path / "run" / "pairs.jsonl") == rows  # a date stays a text


def test_demonstrations_of_a_file_are_what_is_imitated(main_here, whole, tmp_path):
    rows = lines(whole / "demos.jsonl")[:3]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = main_here(f"{SMALL} --steps 1 --pipeline il --demos some.jsonl --out-dir run")
    [at] = seen.stages
    assert lines(tmp_path / "run" / "demos.jsonl") == rows and sorted(at.batch, key=str) == sorted(
        act.lessons(rows), key=str
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["expert_states"] == 3 and summary["train_episodes"] == len(
        {row["seed"] for row in rows}
    )


# ------------------------------------------------------------------------------------- whole runs: a model from elsewhere

save_llama = functools.partial(helpers.save_llama, text=[WORLD.system, act.POLICY, act.CHOOSE])


def test_a_llama_learns_from_the_pairs_of_another_model(run_script, llama, whole, tmp_path):
    flags = (
        SMALL.replace("--model tiny", f"--model {llama}")
        + " --pipeline act,sft-choice,dpo,no-reasoning,il,rl --max-new-tokens 8 --choice-tokens 8"
    )
    result = run_script(
        f"{flags} --steps 1 --kl 0 --eval-episodes 2 --pairs {whole}/pairs.jsonl --out-dir run",
        tmp_path,
    )
    assert result.status == 0, result.stderr
    metrics, summary = (
        lines(tmp_path / "run" / "metrics.jsonl"),
        json.loads((tmp_path / "run" / "summary.json").read_text()),
    )
    assert (
        set(metrics[0]["rows"]) <= {"untagged", "cut"} and metrics[0]["grad_norm"] == 0
    )  # 8 tokens of noise
    assert (
        metrics[0]["groups_without_spread"] == metrics[0]["groups"] == 2
        and metrics[2]["grad_norm"] > 0
    )
    assert lines(tmp_path / "run" / "pairs.jsonl") == lines(whole / "pairs.jsonl")
    assert (
        summary["stages"][0]["choice"] is None and summary["stages"][0]["next_action"] == 0
    )  # it proposed nothing to choose from
    saved = llama, tmp_path / "run" / "1-act", tmp_path / "run" / "2-sft-choice"
    weights = [common.fingerprint(common.load(str(path))[0]) for path in saved]
    assert weights[0] == weights[1] != weights[2]  # equal rewards teach exactly nothing
    chat = common.load(str(tmp_path / "run" / "model"))[1]
    assert chat.prompt([{"role": "user", "content": "Hi"}]) == common.load(str(llama))[1].prompt(
        [{"role": "user", "content": "Hi"}]
    )


def test_a_model_that_proposes_nothing_is_told_so(run_script, llama, tmp_path):
    flags = SMALL.replace("--model tiny", f"--model {llama}") + " --max-new-tokens 8"
    result = run_script(f"{flags} --out-dir run", tmp_path)
    assert result.status == 2 and "stage act" in result.stderr and "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------------------------------ bad input


ACCEPTED = "common.Run.start = act.evaluate = lambda *a: os._exit(77)"  # or a full run would follow


PAPER = {  # shared/papers/act.md: version 2
    "pipeline": "act,il",
    "epochs": 3,
    "candidates": 1,
}
PAPER_SIZES = {"num_demos": "10 thousand pairs", "eval_episodes": "140, and 134"}


def test_the_defaults_are_the_papers():
    told = {field.name: field.metadata["help"] for field in dataclasses.fields(act.Args)}
    stated = {name for name, text in told.items() if "(paper)" in text or "(paper;" in text}
    assert stated == set(PAPER) and {name: getattr(act.Args, name) for name in PAPER} == PAPER
    assert {name for name, text in told.items() if "(paper:" in text} == set(PAPER_SIZES)
    assert all(words in told[name] for name, words in PAPER_SIZES.items())
    assert (
        set(act.TINY) <= set(told)
        and act.TINY["device"] == "cpu"
        and act.TINY["rollout_batch_size"] == 256
    )
    assert common.parse_args(act.Args, act.TINY, []) == dataclasses.replace(act.Args(), **act.TINY)
    given = common.parse_args(act.Args, act.TINY, ["--model", "smollm2", "--lr", "1"])
    assert given == dataclasses.replace(act.Args(), model="smollm2", lr=1.0)
    before = {"lr": 3e-4, "sft_lr": 3e-4, "batch_size": 64, "micro_batch_size": 16, "max_new_tokens": 48, "choice_tokens": 48,
              "eval_episodes": 500, "num_demos": 40, "candidates": 2, "epochs": 3, "kl": 0.1, "group_size": 8}  # fmt: skip
    tiny = common.parse_args(act.Args, act.TINY, [])
    assert {name: getattr(tiny, name) for name in before} == before


def test_quick_is_small_for_any_model():
    for model in "tiny", "smollm2":
        args = act.quick(dataclasses.replace(act.Args(), model=model))
        assert (
            args.eval_episodes <= 16
            and args.num_demos <= 4
            and args.held_out <= 20
            and args.steps <= 3
            and args.batch_size <= 16
        )
        assert args.batch_size % args.micro_batch_size == args.batch_size % args.group_size == 0


@pytest.fixture(scope="module")
def bad_models(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    save_llama(path / "short", context=64)
    save_llama(path / "no-template", template=None)
    (path / "file").write_text("")
    return path


@pytest.mark.parametrize("flags, words", [
    ("--model ./nowhere", "config.json is missing"), ("--model nobody/nothing", "cannot be loaded"), ("--model tiny:10x1", "multiple"),
    ("--model {bad}/no-template", "chat template"), ("--model {bad}/short", "context"), ("--model {bad}/short --eval-only", "context"),
    ("--env chess", "unknown world 'chess'"), ("--steps 0", "--steps"), ("--lr nan", "--lr"), ("--lr -1", "--lr"), ("--lr inf", "--lr"),
    ("--batch-size 0", "--batch-size"), ("--micro-batch-size 0", "--micro-batch-size"), ("--micro-batch-size 5", "--micro-batch-size"),
    ("--max-new-tokens 0", "--max-new-tokens"), ("--temperature 0", "--temperature"), ("--temperature nan", "--temperature"),
    ("--eval-temperature -1", "--eval-temperature"), ("--eval-episodes 0", "--eval-episodes"), ("--eval-every 0", "--eval-every"),
    ("--save-every -1", "--save-every"), ("--seed -1", "--seed"), ("--group-size 0", "--group-size"), ("--group-size 1", "--group-size"),
    ("--group-size -4", "--group-size"), ("--batch-size 16 --group-size 3", "--group-size"),
    ("--kl -1", "--kl"), ("--kl nan", "--kl"), ("--kl inf", "--kl"), ("--dpo-beta -1", "--dpo-beta"),
    ("--dpo-beta nan", "--dpo-beta"), ("--epochs 0", "--epochs"), ("--epochs -1", "--epochs"), ("--num-demos 0", "--num-demos"),
    ("--sft-batch-size 0", "--sft-batch-size"), ("--sft-batch-size -16", "--sft-batch-size"),
    ("--sft-batch-size 1.5", "--sft-batch-size"), ("--sft-batch-size", "--sft-batch-size"),
    ("--pair-batch-size 0", "--pair-batch-size"), ("--choice-tokens 0", "--choice-tokens"), ("--held-out -1", "--held-out"),
    ("--sft-lr -1", "--sft-lr"), ("--sft-lr nan", "--sft-lr"), ("--rollout-batch-size 0", "--rollout-batch-size"),
    ("--max-context 0", "--max-context"), ("--model {bad}/short --max-context 40", "context of 40"), ("--shots -1", "--shots"),
    ("--env nowhere.py:World", "nowhere.py"),
    ("--candidates 0", "--candidates"), ("--examples 0", "--examples"), ("--rl both", "--rl"), ("--epochs 1.5", "--epochs"),
    ("--pipeline il,sing", "'sing'"), ("--pipeline act,,il", "--pipeline"), ("--pipeline ,", "--pipeline"), ("--pipeline ACT", "'ACT'"),
    ("--pipeline il, --rl states", "--pipeline"), ("--pipeline act;il", "'act;il'"), ("--pipeline il --pairs {bad}/file", "no stage"),
    ("--demos nowhere.jsonl", "nowhere.jsonl: no such file"), ("--pairs nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("--demos {bad}/file", "file is empty"), ("--pairs {bad}/file", "file is empty"), ("--pairs {bad}", "no such file"),
    ("--nonsense 1", "--nonsense"), ("--device warp", "--device"), ("--dtype float16", "--dtype"), ("--resume", "no run"),
    ("--out-dir {bad}/short", "exists"), ("--out-dir {bad}/file", "exists"), ("--out-dir {bad}/file/run", "--out-dir"),
])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    run_script, bad_models, home, tmp_path, flags, words
):
    before = everything_under(bad_models), everything_under(home)
    refused(run_script(f"--env {ENV} {flags.format(bad=bad_models)}", tmp_path, ACCEPTED), words)
    assert (
        not list(tmp_path.iterdir())
        and (everything_under(bad_models), everything_under(home)) == before
    )


USER, ASSISTANT = {"role": "user", "content": "Hm."}, {"role": "assistant", "content": "look"}
BAD_LINES = {  # what the third line is, in place of a good row; and what the message says of it
    "broken": ('{"env": "repair", ', "JSONDecodeError"), "blank": ("", "JSONDecodeError"), "two rows": ("{} {}", "JSONDecodeError"),
    "a list": ("[]", "'env'"), "a number": ("3", "TypeError"), "null": ("null", "TypeError"), "a text": ('"env"', "TypeError"),
    "deep": ("[" * 100_000, "RecursionError"), "another world": ({"env": "20q"}, "'20q'"), "env": ({"env": 3}, "'env'"),
    "split": ({"split": None}, "'split'"), "seed": ({"seed": 1.5}, "'seed'"), "turn": ({"turn": "1"}, "'turn'"),
    "admissible": ({"admissible": "look"}, "'admissible'"), "an admissible number": ({"admissible": ["look", 1]}, "'admissible'"),
    "expert": ({"expert": None}, "'expert'"), "expert list": ({"expert": ["look"]}, "'expert'"),
    "messages": ({"messages": {}}, "'messages'"),
    "no message": ({"messages": []}, "by turns"), "assistant first": ({"messages": [ASSISTANT, USER]}, "by turns"),
    "assistant last": ({"messages": [USER, ASSISTANT]}, "by turns"), "user twice": ({"messages": [USER, USER]}, "by turns"),
    "a system prompt": ({"messages": [{"role": "system", "content": "x"}, USER]}, "by turns"),
    "a text for a message": ({"messages": ["Hm."]}, "TypeError"), "no role": ({"messages": [{"content": "Hm."}]}, "KeyError"),
    "no content": ({"messages": [{"role": "user"}]}, "KeyError"), "content": ({"messages": [{"role": "user", "content": 3}]}, "by turns"),
    "half a character": ({"expert": "\ud800"}, "surrogates"),
}  # fmt: skip


@pytest.mark.parametrize("flag", ["--demos", "--pairs"])
def test_a_bad_line_is_named(run_script, demos, tmp_path, flag):
    good = demos[0] | ({"candidate": "clean the gears"} if flag == "--pairs" else {})
    bad = dict(BAD_LINES) | {f"without {key}": ({key: ...}, repr(key)) for key in act.STATE}
    if flag == "--pairs":
        bad |= {
            "without candidate": ({"candidate": ...}, "'candidate'"),
            "candidate": ({"candidate": 3}, "'candidate'"),
        }
    for name, (line, words) in bad.items():
        if isinstance(line, dict):
            line = json.dumps(
                {key: value for key, value in (good | line).items() if value is not ...}
            )
        (tmp_path / "data.jsonl").write_text(
            f"{json.dumps(good)}\n{json.dumps(good)}\n{line}\n{json.dumps(good)}\n"
        )
        refused(
            run_script(f"--env {ENV} {flag} data.jsonl", tmp_path, ACCEPTED),
            "data.jsonl, line 3",
            words,
        )
        assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"], name
    (tmp_path / "data.jsonl").write_text(
        json.dumps(good)
    )  # and what is good is accepted, without a last line break too
    flags = f"--env {ENV} --examples 400 --pipeline {'il' if flag == '--demos' else 'act'} {flag} data.jsonl"
    assert run_script(flags, tmp_path, ACCEPTED).status == 77


def test_a_file_with_other_observations_is_named(run_script, demos, tmp_path):
    shown = act.demonstrations(dataclasses.replace(ARGS, show_actions=True), "train", [0])
    assert all(envs.LISTING in s["messages"][-1]["content"] for s in shown)
    for rows, flag, words in (
        (shown, "", "with a list"),
        (demos, "--show-actions", "without a list"),
    ):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = run_script(
            f"--env {ENV} --pipeline il --demos data.jsonl {flag}", tmp_path, ACCEPTED
        )
        refused(result, "data.jsonl, line 1", words, "--show-actions")


def test_what_is_too_long_is_left_out_and_counted(run_script, tiny, demos, tmp_path):
    length = lambda s: len(tiny[1].dialogue(act.dialogue(PROMPTS, s["messages"])))  # noqa: E731
    context = tiny[0].max_context
    rows = [s | {"candidate": "dance"} for s in demos]
    long = rows[0] | {"candidate": "word " * context}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, long]))
    limit = min(map(length, demos)) + 28
    flags = f"{SMALL} --steps 1 --pairs pairs.jsonl --demos demos.jsonl --pipeline sft-choice,il"
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demos))
    result = run_script(f"{flags} --out-dir run", tmp_path)
    assert result.status == 0, result.stderr
    assert (
        lines(tmp_path / "run" / "pairs.jsonl") == rows
        and json.loads((tmp_path / "run" / "summary.json").read_text())["too_long"] == 1
    )
    result = run_script(
        f"{flags.replace('sft-choice,il', 'il').replace('--pairs pairs.jsonl', '')} --max-context {limit} --out-dir short",
        tmp_path,
    )
    assert result.status == 0, result.stderr
    left = [s for s in demos if length(s) + 28 <= limit]
    summary = json.loads((tmp_path / "short" / "summary.json").read_text())
    assert (
        lines(tmp_path / "short" / "demos.jsonl") == left
        and summary["too_long"] >= len(demos) - len(left) > 0
    )


def test_bad_input_by_subprocess(run_as_user, tmp_path):
    refused(run_as_user(f"--env {ENV} --pipeline sing", tmp_path), "--pipeline")
    assert not list(tmp_path.iterdir())


def test_a_run_is_never_overwritten_and_resumed_only_as_it_was(run_script, whole, tmp_path):
    before = everything_under(whole)
    refused(run_script(f"{SMALL} --out-dir {whole}", tmp_path), "--resume", "--out-dir")
    refused(
        run_script(f"{SMALL} --out-dir {whole} --resume --pipeline il --candidates 3", tmp_path),
        "pipeline was",
        "candidates was",
    )
    assert everything_under(whole) == before and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ kills and resume

AT = {  # where the run is killed: code, and how many lines of metrics it had written by then; checkpoints: after 2, 4, 6, 8, 9
    "within a stage": (LOG.format(step=5, name="SIGKILL"), 5),  # il, step 2; from its step 1
    "after a stage": (LOG.format(step=7, name="SIGKILL"), 7),  # rl, step 1; from the end of il
    "amid the second checkpoint": (CHECKPOINT.format(count=2), 4),
    "before the summary": ("common.Run.finish = lambda *a: os.kill(os.getpid(), signal.SIGKILL)", 9),
}  # fmt: skip


@pytest.mark.parametrize("where", AT)
def test_killed_anywhere_and_resumed(killed_and_resumed, whole, where):
    same_run(whole, killed_and_resumed(*AT[where]))


def test_asked_to_stop_keeps_the_step_and_resumes(run_script, whole, tmp_path):
    result = run_script(f"{SMALL} --out-dir run", tmp_path, LOG.format(step=1, name="SIGTERM"))
    assert result.status == 143 and "Traceback" not in result.stderr
    assert (
        torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["state"]["done"]
        == 1
    )
    other = run_script(
        f"{SMALL} --steps 4 --out-dir run --resume", tmp_path
    )  # other stages would end elsewhere
    assert other.status == 2 and "--steps" in other.stderr and "Traceback" not in other.stderr
    assert run_script(f"{SMALL} --out-dir run --resume", tmp_path).status == 0
    same_run(whole, tmp_path / "run")


NAN = """
import torch
loss, seen = act.kl_estimate, []
def broken(*given):
    seen.append(0)
    return loss(*given) * (float("nan") if len(seen) == {count} else 1)
act.kl_estimate = broken
"""


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(run_script, whole, tmp_path):
    flags = f"{SMALL} --save-every 1 --out-dir run"
    result = run_script(
        flags, tmp_path, NAN.format(count=3)
    )  # two micro-batches a step: in the second one
    run = tmp_path / "run"
    told = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert (
        result.status == 1
        and len(told) == 1
        and "Traceback" not in result.stderr
        and "nan" in told[0]
    )
    assert len(lines(run / "metrics.jsonl")) == 1 and {"ids", "mask", "advantages"} <= set(
        torch.load(run / "not_finite.pt")
    )
    saved = torch.load(run / "checkpoint" / "state.pt", weights_only=True)["state"]
    assert saved["done"] == 1 and all(
        torch.isfinite(value).all() for value in saved["model"].values()
    )
    assert run_script(f"{flags} --resume", tmp_path).status == 0
    for name in (*STAGED, "model"):
        assert (run / name / "model.safetensors").read_bytes() == (
            whole / name / "model.safetensors"
        ).read_bytes()


WORLD_FILE = """
import envs

class Caf\u00e9(envs.RepairShop):
    name = "Caf\u00e9"
    def observe(self, words):
        return super().observe(words + " \u2615")
"""


def test_a_world_of_ones_own_and_a_terminal_that_cannot_print(run_script, tmp_path):
    (tmp_path / "my worlds.py").write_text(WORLD_FILE)
    (tmp_path / "shop.py").write_text(WORLD_FILE)
    fault = "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='ascii', line_buffering=True)\n"
    flags = f"{SMALL} --pipeline il --steps 1 --env shop.py:Caf\u00e9 --show-actions --shots 1 --prefill --held-out 0"
    fault += "act.print = lambda *a: print(*(w.replace('\\u00e9', 'e') if 'updates' in w else w for w in a))"
    result = run_script(flags, tmp_path, fault)
    assert result.status == 1 and "UnicodeEncodeError" in result.stderr
    [run] = (tmp_path / "runs").iterdir()
    assert (
        re.fullmatch(r"act-[\w.-]+-s0", run.name)
        and json.loads((run / "summary.json").read_text())["expert"]["success"] == 1
    )
    assert common.load(str(run / "model"))[0].config.tiny
    assert envs.LISTING in lines(run / "demos.jsonl")[0]["messages"][0]["content"]
    assert run_script(f"{flags} --out-dir whole", tmp_path).status == 0
