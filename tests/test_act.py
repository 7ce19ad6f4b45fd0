"""act.py: what replies say and are paid, questions, data files, losses, stages, warm-up, whole runs; docs/act_controls.py."""

import copy
import dataclasses
import functools
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import helpers
import pytest
import torch
from conftest import ROOT
from helpers import PAD, WORDS, Bigram, lines, random_episodes, random_table, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import act
import common
import envs

sys.path.insert(0, str(ROOT / "docs"))
import act_controls  # noqa: E402
import act_dose  # noqa: E402

torch.set_num_threads(1)
ENV = "repair"
WORLD = envs.make(ENV)
SMALL = (
    f"--env {ENV} --model tiny --examples 400 --steps 3 --batch-size 8 --micro-batch-size 4 "
    "--group-size 4 --eval-episodes 4 --eval-every 2 --save-every 2 --max-new-tokens 28 "
    "--choice-tokens 28 --num-demos 5 --sft-batch-size 4 --pipeline act,il,rl"
)
ARGS = dataclasses.replace(
    act.Args(),
    **act.TINY | dict(env=ENV, examples=400, max_new_tokens=28, choice_tokens=28, batch_size=8,
                      group_size=4, micro_batch_size=4, num_demos=5, kl=0.0))  # fmt: skip
FAST = settings(max_examples=200, deadline=None, derandomize=True, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


def save_llama(path):
    return helpers.save_llama(path, text=[(ROOT / "act.py").read_text()], context=8192)


def args_of(**changes):
    return dataclasses.replace(ARGS, **changes)


def state_of(model=None, chat=PAD, args=ARGS, world=WORLD, **more):
    return act.Job(args, world, chat, model, **more)


def reply_of(text, complete=True):
    return act.Reply(text, complete, [], [])


def row_of(example, text, complete=True, world=WORLD):
    return act.outcome_of(world, reply_of(text, complete), example)


@pytest.fixture
def no_step():
    """Losses leave their gradient, instead of stepping by it."""
    with mock.patch.object(common, "gradient_step", return_value=0.0) as step:
        yield step


@pytest.fixture(scope="module")
def demos():
    return act.demonstrations(ARGS, "train", range(5))


@pytest.fixture(scope="module")
def states(demos):
    return act.states_of(demos)


@pytest.fixture(scope="module")
def rows(tiny, states):
    return [*act.propose(state_of(*tiny), states)]


@pytest.fixture(scope="module")
def pairs(rows):
    return act.pairs_of(WORLD, rows)


# ---------------------------------------------------------------------- what a reply says

CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "Mira"}}\n</tool_call>'
REPLIES = [  # as chat models write them
    ("<action>open the case</action>", "open the case"),
    ("It is loud. <action> open the case \n</action> so", "open the case"),
    ("<action>a</action> no, <action>b</action>", "b"),
    ("<action></action>", ""), ("<action>a<action>b</action>", "b"), ("<action>a</action></action>", "a"),
    ("<Action>a</Action>", "a"), ("<action >a</action >", "a"), ("**<action>a</action>**", "a"),
    ("```xml\n<action>a</action>\n```", "a"), ("## Action\n<action>a</action>", "a"),
    ("I write it as <action>the action</action>: <action>a</action>.", "a"),
    ("<action>put mug 1 in/on desk 2</action>", "put mug 1 in/on desk 2"),
    ("<action>a < b > c</action>", "a < b > c"), ("<action>print('<b>')</action>", "print('<b>')"),
    ("<action>line one\nline two</action>", "line one\nline two"),
    (f"I search.\n<action>{CALL}</action>", CALL), (f"<action>\n{CALL}\n</action>", CALL),
    ("<think>either <action>a</action> or</think><action>b</action>", "b"),
    ("so <action>a</action> or</think> <action>b</action>", "b"),  # the template had opened it
    ("<think>I could <action>a</action>", None),  # cut off in a thought
    ("\u3010\u3011<action>\u00e9t\u00e9</action>", "\u00e9t\u00e9"),
    ("open the case", None), ("", None), ("Action: open the case", None),
    ("<action>open the case", None), ("open the case</action>", None),
    ("</action>open the case<action>", None), ("<actions>a</actions>", None),
    ("[action]a[/action]", None), ("< action>a</ action>", None), (CALL, None),
]  # fmt: skip


@pytest.mark.parametrize("reply, action", REPLIES)
def test_parse_action(reply, action):
    assert act.parse_action(reply) == action


EITHER = "open the case", "clean the gears"
CHOICES = [  # what stands in the tags, and which of EITHER that is, or what else
    ("open the case", 0), ("Clean the gears.", 1), ("**open the case**", 0), ('"open the case"', 0),
    ("`clean the gears`", 1), ("Action: open the case", 0), ("1", 0), ("2", 1), ("2.", 1), ("#2", 1),
    ("Action 1", 0), ("action 2", 1), ("ACTION 2.", 1), ("Action #1", 0), ("Action: 2", 1),
    ("**Action 2**", 1), ("option 2", 1), ("Option one", 0), ("action two", 1), ("number 2", 1),
    ("choice 1", 0), ("first", 0), ("the second", 1), ("The first action", 0), ("second one", 1),
    ("I choose Action 2", 1), ("Action 1: open the case", 0), ("1. open the case", 0),
    ("2) clean the gears", 1), ("Option 2 - clean the gears", 1), ("Action 1\nopen the case", 0),
    ("Action 1: clean the gears", 1),  # its words
    ("not Action 1", None), ("not 2", None), ("Action 1 is worse", None), ("neither", None),
    ("Action 1 or Action 2", None), ("Action 1. Action 2", None), ("Action 3", None), ("3", None),
    ("1 - open the case", 0), ("Option 2:clean the gears", 1), ("**Action 2**: clean the gears", 1),
    ("check the power", None), ("", None), ("both", None), ("Action 12", None), ("1.5", None),
    ("the better action", None), ("first check the power", None), ("any action but 1", None),
]  # fmt: skip


@pytest.mark.parametrize("said, chosen", CHOICES)
def test_which_of_two_is_chosen(said, chosen):
    found = act.chosen_of_two(WORLD, said, *EITHER)
    assert found == said if chosen is None else act.normal(WORLD, found) == EITHER[chosen]


def test_a_number_that_is_an_action_is_taken_at_its_word():
    for said, *both in ("1", "2", "1"), ("Action 2", "action 2", "sing"), ("1.5", "5", "15"), ("2-15", "5", "15"):
        assert act.chosen_of_two(WORLD, said, *both) == said
    menu = {"expert": "0", "candidate": "3", "admissible": ["0", "1", "2", "3"], "expert_second": True}
    for said, row in ("2", "possible"), ("Action 2", "right"), ("4", "impossible"), ("0", "right"):
        assert row_of(menu, act.written(said)) == row, said


PUT, QUOTED = "put tomato 1 in/on garbagecan 1", json.dumps({"name": "search", "arguments": '{"query": " Mira "}'})
SAME = {  # what means the same in a world, and what does not
    "repair": (["Open The Case", " open  the\tcase\n", "open the case.", "**open the case**", '"Open the case."',
                "Action: open the case\nbecause it is loud", "- open the case"],
               ["open the cases", "open case", "", ".", "open the case now", "open the case _", ".open the case"]),
    "household": ([PUT, "Put the tomato 1 on a garbagecan 1.", "move tomato 1 to garbagecan 1", "> put tomato 1 into garbagecan 1"],
                  ["put tomato 1 garbagecan 1", "take tomato 1 from garbagecan 1", f"{PUT} _"]),
    "search": ([CALL, '{"arguments":{"query":"Mira"},"name":"search"}', f"I search. {CALL}", CALL.replace("\n", " "), QUOTED],
               [CALL.replace("Mira", "Velden"), CALL.replace("search", "open"), CALL[:-20]]),
}  # fmt: skip


@pytest.mark.parametrize("env", SAME)
def test_actions_are_equal_as_the_world_understands_them(env):
    world, (same, others) = envs.make(env), SAME[env]
    pair = {"expert": same[0], "candidate": others[0], "admissible": None, "expert_second": True}
    for said in same:
        assert row_of(pair, act.written(said), world=world) == row_of(pair, "<action>Action 2</action>", world=world) == "right", said
        assert act.as_listed(world, said, [others[0], same[0]]) == same[0]
    for said in others:
        assert act.normal(world, said) != act.normal(world, same[0]) and act.as_listed(world, said, same) is None, said


def test_no_spelling_tells_whose_an_action_is():
    compact = '{"arguments":{"query":"Velden"},  "name":"search"}'
    for env, listed, actions in ("search", [QUOTED], (CALL, compact)), ("repair", None, ("Open the case.", "**dance**")):
        world, shown = envs.make(env), []
        for expert, candidate in actions, actions[::-1]:
            pair = PAIR | {"expert": expert, "candidate": candidate, "expert_second": expert == actions[1], "admissible": listed}
            shown.append(act.question(world, ARGS, pair)[-1]["content"].splitlines()[-3:-1])
        forms = [world.canonical(world.read(action)) for action in actions]
        assert shown[0] == shown[1] == [f"Action {n}: {envs.one_line(form)}" for n, form in enumerate(forms, 1)]
    assert forms == ["open the case", "dance"]
    listed = PAIR | {"expert": "OPEN the case.", "candidate": "Clean the gears."}
    assert act.question(WORLD, ARGS, listed) == act.question(WORLD, ARGS, PAIR)  # as they are listed
    rows = [PAIR | {"candidates": ["clean the gears", "Clean the gears.", "dance"]}, BARE | {"candidates": ["dance"]}]
    assert [pair["possible"] for pair in act.pairs_of(WORLD, rows)] == [True, True, False, True]


@pytest.mark.parametrize("env", [*envs.WORLDS, "20q", "20q-full"])
def test_the_experts_action_in_tags_wins(env):
    world = envs.make(env)
    for seed in range(5):
        world.reset(seed=seed, options={"split": "test"})
        episode = act.Episode("test", seed)
        while not episode.over:
            action = world.expert()
            reply = f"I think of <this>.\n**{act.written(action)}**"
            assert act.normal(world, act.parse_action(reply)) == act.normal(world, action)
            act.take_turn(world, episode, reply)
        assert episode.won and all(episode.valid), (env, seed)


PIECES = ["<action>", "</action>", "<ACTION>", "<think>", "</think>", "<", ">", "Action 1", "2",
          "first", " ", "\n", ".", "a", "{", '"', ":", "\u0130", "\x85", "*", "`"]  # fmt: skip
TEXTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.text(max_size=20))


@FAST
@given(TEXTS)
def test_bad_output_never_raises(text):
    for reply in text, act.written(text), text + act.written(text) + text:
        for complete in True, False:
            row = row_of(PAIR, reply, complete)
            assert row in act.REWARDS and row != ("cut" if complete else "untagged")
        WORLD.reset(seed=0)
        act.take_turn(WORLD, act.Episode("train", 0), reply)


# ------------------------------------------------------------------------------ the table of rewards

POSSIBLE = ["open the case", "check the power", "clean the gears"]
PAIR = {"messages": [act.user("It is loud.")], "expert": "open the case", "expert_second": False,
        "candidate": "clean the gears", "admissible": POSSIBLE}  # fmt: skip
ODD, BARE = PAIR | {"candidate": "dance"}, PAIR | {"admissible": None}


@pytest.mark.parametrize("pair, reply, row", [
    (PAIR, "I think. <action>Open the case.</action>", "right"),  # the expert's
    (PAIR, "<action>clean the gears</action>", "possible"),  # the candidate
    (PAIR, "<action> CHECK  the power. </action>", "possible"),  # a third one that is possible
    (PAIR, "<action>dance</action>", "impossible"), (PAIR, "<action>.</action>", "impossible"),
    (PAIR, "<action>Action 1</action>", "right"), (PAIR, "<action>2</action>", "possible"),
    (ODD, "<action>2</action>", "impossible"), (PAIR, "<action>not 1</action>", "impossible"),
    (PAIR, "open the case", "untagged"), (PAIR, "", "untagged"), (PAIR, "<action>open the case", "untagged"),
    (PAIR, "<action>open the case</action><action>dance</action>", "impossible"),  # the last
    (ODD, "<action>dance</action>", "impossible"),  # not possible for having been proposed
    (BARE, "<action>open the case</action>", "right"),  # a world without lists
    (BARE, "<action>clean the gears</action>", "possible"), (BARE, "<action>dance</action>", "impossible"),
])  # fmt: skip
def test_every_row_of_the_table(pair, reply, row):
    assert row_of(pair, reply) == row
    # cut off, it never earns the -0.5; what it had said in tags counts
    assert row_of(pair, reply, complete=False) == ("cut" if row == "untagged" else row)
    numbers = {"Action 1": "Action 2", ">2<": ">1<", "not 1": "not 2"}
    swapped = next((reply.replace(a, b) for a, b in numbers.items() if a in reply), reply)
    assert row_of(pair | {"expert_second": True}, swapped) == row


def test_rl_has_the_same_table_for_an_action():
    state = {"expert": "open the case", "admissible": POSSIBLE}
    said = ["<action>open the case</action>", "<action>clean the gears</action>",
            "<action>dance</action>", "<action>Action 1</action>", "dance"]  # fmt: skip
    assert [act.REWARDS[row_of(state, text)] for text in said] == [1, 0.1, 0, 0, -0.5]
    assert act.REWARDS[row_of(state, "I thi", complete=False)] == 0
    bare = state | {"admissible": None}  # of no action it is known that it is possible
    for text in "<action>.</action>", "<action></action>", "<action>clean the gears</action>":
        assert row_of(bare, text) == row_of(bare | {"expert": ""}, text) == "impossible"


def replies_of(*told):
    replies = [reply_of("") for _ in told]
    for reply, (reward, row) in zip(replies, told):
        reply.reward, reply.outcome = reward, row
    return replies


def test_a_cut_reply_is_left_out_of_its_group():
    told = [(1, "right"), (0, "cut"), (0.1, "possible"), (-0.5, "untagged"),
            (0, "cut"), (1, "right"), (0, "cut"), (0, "cut"), *[(0, "cut")] * 4,
            (1, "right"), (1, "right"), (0, "cut"), (1, "right")]  # fmt: skip
    replies = replies_of(*told)
    act.set_advantages(replies, 4)
    found = [reply.advantage for reply in replies]
    # as of the three others alone: mean 0.2, sample deviation sqrt(0.57)
    by_hand = [0.8 / 0.57**0.5, 0.0, -0.1 / 0.57**0.5, -0.7 / 0.57**0.5]
    assert found == pytest.approx(by_hand + [0.0] * 12, abs=1e-5)
    assert found[1] == 0 and found[4:] == [0.0] * 12 and act.without_spread(found, 4) == 3


# ------------------------------------------------------------------------------ prompts


def listed(state):
    """A state as --show-actions has it."""
    shown = [{**m, "content": m["content"] + envs.LISTING + f"go to mug {n}\nlook"}
             if m["role"] == "user" else m for n, m in enumerate(state["messages"])]  # fmt: skip
    return {**state, "messages": shown}


@pytest.fixture(scope="module")
def chores():
    """States of one episode of the household."""
    return act.states_of(act.demonstrations(args_of(env="household"), "train", [3]))


def test_demonstrations_replay(demos, chores):
    for demo in demos:
        world = envs.make(ENV)
        observation, info = world.reset(seed=demo["seed"], options={"split": "train"})
        said = demo["messages"]
        assert [m["role"] for m in said] == ["user", "assistant"] * len(demo["admissible"])
        for asked, done, listing in zip(said[::2], said[1::2], demo["admissible"]):
            assert asked["content"] == observation and listing == info["admissible"]
            assert done["content"] == world.expert() in listing
            observation, _, _, _, info = world.step(done["content"])
        assert info["won"]
    assert [state["turn"] for state in chores] == list(range(len(chores))) and len(chores) > 2
    for state in chores:
        done = [m["content"] for m in state["messages"][1::2]]
        world = envs.make("household")
        observation, *_, info = envs.replay(world, 3, done)
        assert state["messages"][-1] == act.user(observation)
        assert (state["expert"], state["admissible"]) == (world.expert(), info["admissible"])


def test_a_question_shows_each_action_where_it_says(chores):
    world = envs.make("household")
    for state in chores:
        other = next(a for a in state["admissible"] if a != state["expert"])
        [pair] = act.pairs_of(world, [state | {"candidate": "", "candidates": [other]}])
        before = copy.deepcopy(pair)
        for second in False, True:
            pair = before | {"expert_second": second}
            for reasons in True, False:
                system, *said, last = act.question(world, ARGS, pair, reasons)
                assert said == act.dialogue(world, ARGS, pair["messages"])[1:-1]
                both = [state["expert"], other]
                one, two = both[::-1] if second else both
                assert last["content"].splitlines() == [
                    *state["messages"][-1]["content"].splitlines(), "Possible actions:",
                    *state["admissible"], act.PROPOSED, f"Action 1: {one}", f"Action 2: {two}",
                    act.choose(reasons)]  # fmt: skip
                shown = listed(pair)
                assert act.question(world, ARGS, shown, reasons) == [system, *said, last]  # one list
    assert "Possible" not in str(act.question(world, ARGS, pair | {"admissible": None}))


def test_the_policy_sees_its_dialogue_and_nothing_else(chores):
    world = envs.make("household")
    for state in [*chores, *map(listed, chores)]:
        before = copy.deepcopy(state)
        system, *said = act.dialogue(world, ARGS, state["messages"])
        assert system == act.system(world) and system["content"].startswith(world.system)
        for shown, kept in zip(said, state["messages"], strict=True):
            own = kept["role"] == "assistant"
            assert shown["content"] == (act.written(kept["content"]) if own else kept["content"])
        assert "Action 1" not in str(said) and state == before  # nothing is changed in place
        assert ("Possible" in str(said)) == ("Possible" in str(state["messages"]))


def test_who_is_to_answer_at_once_is_not_asked_for_reasons():
    search = envs.make("search")
    for world, what in (WORLD, "your next action"), (search, "your next tool call"):
        assert what in act.system(world)["content"].removeprefix(world.system)
        for args, reasons in (ARGS, False), (args_of(prefill=True), True):
            for shots in 0, 2:
                asked = act.question(world, dataclasses.replace(args, shots=shots, env=world.name), PAIR, reasons)
                assert "Think" not in str(asked) and str(asked).count("Which of the two") == 1 + shots
        assert "Think" in act.system(world)["content"] and "Think" in act.question(world, ARGS, PAIR)[-1]["content"]
    assert "Think" not in str(act.dialogue(WORLD, args_of(prefill=True), PAIR["messages"]))


@pytest.mark.parametrize("env", ["repair", "household", "20q", "search"])
@pytest.mark.parametrize("prefill", [False, True])
def test_worked_examples_are_random_play_on_train(env, prefill, monkeypatch):
    world, splits = envs.make(env), set()
    reset = type(world).reset
    monkeypatch.setattr(type(world), "expert", lambda self: pytest.fail("the expert was asked"))
    monkeypatch.setattr(type(world), "reset",
                        lambda self, **k: splits.add(k["options"]["split"]) or reset(self, **k))  # fmt: skip
    act.worked_examples.cache_clear()
    args = args_of(env=env, shots=4, prefill=prefill, show_actions=True)
    _, *acts, last = act.dialogue(world, args, PAIR["messages"])
    assert last == PAIR["messages"][0] and splits == {"train"}
    _, *choices, _ = act.question(world, args, PAIR)
    for shots in acts, choices:
        assert [m["role"] for m in shots] == ["user", "assistant"] * 4
        assert all(m["shot"] for m in shots[1::2])
    for asked, reply in zip(acts[::2], acts[1::2]):
        listing = asked["content"].split(envs.LISTING)[1].splitlines()
        action = act.parse_action(reply["content"])
        assert envs.one_line(action) in listing and reply["content"] == act.written(action)
    better = []
    for seed, asked, reply in zip(range(10**6, 10**6 + 4), choices[::2], choices[1::2]):
        one, two = re.search(r"Action 1: (.*)\nAction 2: (.*)\nWhich", asked["content"], re.S).groups()
        good = act.parse_action(reply["content"])
        better.append(good == two)
        for action in one, two:  # carried out: what the reason says is true
            reset(world, seed=seed, options={"split": "train"})
            assert world.step(action)[-1]["valid"] == (action == good)
        reason = f"Action {1 + better[-1]} can be done now, and action {2 - better[-1]} cannot. "
        assert reply["content"] == reason * (not prefill) + act.written(good)
    assert better == [False, True] * 2  # in balance


# --------------------------------------------------------------------------- losses by hand


def softmax(table):
    return torch.softmax(torch.tensor(table, dtype=torch.float32).double(), -1).tolist()


def logprobs_of(table, reply):
    """Of the sampled words, at temperature 0.7."""
    rows = torch.log_softmax(table / 0.7, -1)
    return [rows[a, b] for a, b, own in zip(reply.ids, reply.ids[1:], reply.mask[1:]) if own]


@pytest.mark.parametrize("micro", [1, 3, 100])
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_grpo_against_another_derivation(kl, updates, micro):
    """In float64, word by word; the ratio is always to log-probs kept beforehand."""
    rng = random.Random(updates)
    tables = random_table(rng), random_table(rng)
    replies = [act.Reply("", True, **each, advantage=rng.gauss(0, 1)) for each in random_episodes(rng, 6)]
    args = args_of(kl=kl, updates=updates, micro_batch_size=micro, temperature=0.7, clip=0.1)
    model, reference = map(Bigram, tables)
    metrics = act.update(model, reference, PAD, args, torch.optim.SGD(model.parameters(), lr=2.0), replies, (0.1, 0.1))
    theta, reference = (torch.tensor(table, dtype=torch.float32).double() for table in tables)
    kept = [[float(x) for x in logprobs_of(theta, reply)] for reply in replies]
    losses, norms, kls, outside = [], [], [], []
    for share in act.groups([*zip(replies, kept)], 6 // updates):
        theta, loss = theta.detach().requires_grad_(), 0.0
        for reply, old in share:
            terms, A = [], reply.advantage
            for now, before, ref in zip(logprobs_of(theta, reply), old, logprobs_of(reference, reply)):
                ratio, d = (now - before).exp(), ref - now
                kls.append(d.exp() - d - 1)
                outside.append(not 0.9 <= ratio <= 1.1)
                terms.append(kl * kls[-1] - torch.minimum(ratio * A, ratio.clamp(0.9, 1.1) * A))
            loss = loss + sum(terms) / len(terms) / len(share)  # of a reply, then over replies
        grad, = torch.autograd.grad(loss, theta)
        norms.append(grad.norm().item())
        losses += [loss.item()] * sum(len(old) for _, old in share)
        theta = theta - 2.0 * grad * min(1, 1 / (norms[-1] + 1e-6))
    torch.testing.assert_close(model.table.detach().double(), theta.detach(), atol=2e-4, rtol=1e-4)
    by_hand = {"loss": sum(losses) / len(losses), "grad_norm": max(norms), "clipped": common.mean(outside)}
    by_hand["entropy"] = by_hand["logprob_gap"] = -sum(map(sum, kept)) / len(losses)  # decoding said 0
    if kl:
        by_hand["kl"] = sum(kls).item() / len(kls)
    assert metrics == pytest.approx(by_hand, abs=2e-4) and any(outside) == (updates > 1)


TALKS = [  # ids and masks of dialogues: 2 stands before each reply and nowhere else
    ([0, 1, 2, 3, 4, 0, 2, 4], [0, 0, 0, 1, 1, 0, 0, 1]), ([1, 2, 4, 4, 3], [0, 0, 1, 1, 1])]  # fmt: skip


@pytest.mark.parametrize("micro", [1, 2, 100])
@pytest.mark.parametrize("context", [8, 4])
def test_imitation_learns_the_replies_alone(no_step, micro, context):
    table, args = random_table(random.Random(1)), args_of(micro_batch_size=micro, temperature=0.7)
    model, chat = Bigram(table), SimpleNamespace(pad=0, dialogue_and_mask=lambda talk: talk)
    model.max_context = context
    loss = act.imitate(model, chat, args, None, TALKS)["loss"]
    p, grad, found = softmax(table), torch.zeros(WORDS, WORDS), []  # whatever --temperature
    for ids, mask in TALKS:
        for last, word, learnt in list(zip(ids, ids[1:], mask[1:]))[:context - 1]:
            if learnt:
                found.append(-math.log(p[last][word]))
                grad[last] -= torch.eye(WORDS)[word] - torch.tensor(p[last])
    assert len(found) == (6 if context == 8 else 3)  # what does not fit is cut off
    assert loss == pytest.approx(sum(found) / len(found), abs=1e-5)
    torch.testing.assert_close(model.table.grad, grad / len(found), atol=1e-6, rtol=1e-4)
    assert not model.table.grad[:2].any()  # 0 and 1 stand in prompts alone


def test_one_pass_over_a_demonstration_is_one_over_each_of_its_states(tiny, demos, states):
    _, chat = tiny

    def taught(messages):
        """(prompt, reply) of what the mask lets through."""
        ids, mask = chat.dialogue_and_mask(messages)
        starts = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
        ends = [next((j for j in range(i, len(ids)) if not mask[j]), len(ids)) for i in starts]
        return [(ids[:i], ids[i:j]) for i, j in zip(starts, ends)]

    for args in ARGS, args_of(shots=2):
        found = [each for demo in demos for each in taught(act.dialogue(WORLD, args, demo["messages"]))]
        assert found == [(chat.dialogue(act.dialogue(WORLD, args, state["messages"])),
                          chat.reply(act.written(state["expert"]))) for state in states]  # fmt: skip


def test_dpo_by_hand(no_step):
    given = [torch.tensor(x, dtype=torch.float64) for x in ([-1, -3, -3.0], [-2, -3, -1.0], [-1.5, -3, -2.0], [-1.5, -3, -2.0])]
    # beta times the margins 1, 0, -2: log(1 + e^-0.5), log 2, log(1 + e)
    by_hand = torch.tensor([0.4740769841801067, 0.6931471805599453, 1.3132616875182228], dtype=torch.float64)
    torch.testing.assert_close(act_controls.dpo_loss(*given, 0.5), by_hand)
    rng = random.Random(2)
    table, reference = random_table(rng), random_table(rng)
    triples = [([0, 1, 2], [3, 4], [4]), ([1, 2], [4, 4, 3], [1, 3]), ([0, 2], [4], [3, 3, 3])]
    p, q, grad, margins = softmax(table), softmax(reference), torch.zeros(WORDS, WORDS), []
    for prompt, *replies in triples:
        ratio = [sum(math.log(p[a][b] / q[a][b]) for a, b in zip([prompt[-1], *said], said)) for said in replies]
        margins.append(ratio[0] - ratio[1])
        for said, sign in zip(replies, (-1, 1)):
            for last, word in zip([prompt[-1], *said], said):
                slope = sign * 0.4 / (1 + math.exp(0.4 * margins[-1])) / 3
                grad[last] += slope * (torch.eye(WORDS)[word] - torch.tensor(p[last]))
    for micro in 1, 2, 100:
        model = Bigram(table)
        args = act_controls.Args(**vars(args_of(micro_batch_size=micro)), dpo_beta=0.4)
        metrics = act_controls.dpo_step(state_of(model, args=args, reference=Bigram(reference)), triples)
        assert metrics["loss"] == pytest.approx(sum(math.log(1 + math.exp(-0.4 * m)) for m in margins) / 3, abs=1e-5)
        assert metrics["chosen_gained_more"] == pytest.approx(sum(m > 0 for m in margins) / 3)
        torch.testing.assert_close(model.table.grad, grad, atol=1e-6, rtol=1e-4)


# --------------------------------------------------------------------------------- the steps of a stage


def steps_of(examples, size, done=0, last=0, refers=False, **changes):
    """What `stage_steps` gives, with the state it leaves."""
    asked = []
    run = SimpleNamespace(steps=lambda a, b: asked.append((a, b)) or range(a + 1, b + 1))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    optimizer.state["moments"] = 1
    state = state_of(args=args_of(**changes), run=run, optimizer=optimizer, progress={"step": done}, last=last,
                     reference=torch.nn.Linear(1, 1), stage="1-act")  # fmt: skip
    state.model = torch.nn.Linear(1, 1)
    steps = act.stage_steps(state, examples, size, 0.5, refers)
    return [(number, batch, optimizer.param_groups[0]["lr"]) for number, batch in steps], state, asked


@FAST
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 9), st.integers(0, 3))
def test_every_example_in_every_pass(examples, epochs, size, seed):
    found, state, asked = steps_of(range(examples), size, epochs=epochs, seed=seed)
    seen = [i for _, batch, _ in found for i in batch]
    assert all(len(batch) == size for _, batch, _ in found) and len(found) == state.last
    assert epochs * examples <= len(seen) < epochs * examples + size
    for start in range(0, len(seen), examples):  # one pass after the other; the last may fill a batch up
        some = seen[start:start + examples]
        assert sorted(some) == list(range(examples)) or start + examples > len(seen) and len(set(some)) == len(some)
    assert [number for number, *_ in found] == list(range(1, len(found) + 1)) and asked == [(0, len(found))]
    assert found == steps_of(range(examples), size, epochs=epochs, seed=seed)[0]


def test_a_stage_begins_afresh_and_is_gone_on_with_where_it_stopped():
    whole, state, _ = steps_of(range(10), 4, epochs=2, last=7, done=7)  # after a stage of 7 steps
    assert state.last == 12 and not state.optimizer.state
    assert [rate for *_, rate in whole] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    for done, refers in itertools.product((7, 8, 11, 12, 20), (True, False)):
        found, state, asked = steps_of(range(10), 4, epochs=2, last=7, done=done, refers=refers)
        assert found == whole[done - 7:] and state.last == 12  # with its rate and its batches
        assert asked == ([(done, 12)] if done < 12 else [])
        assert bool(state.optimizer.state) == (done > 7)
        held = getattr(state.reference, "weight", None)  # a copy as it began, or what the checkpoint had, or none
        assert (held is not None) == (refers or done >= 12) and state.reference is not state.model
        assert held is None or torch.equal(held, state.model.weight) == (done == 7)
    assert [len(steps_of(range(10), 4, steps=steps)[0]) for steps in (1, 3, 9)] == [1, 3, 9]


# ------------------------------------------------------------------------------------ a tiny model


def test_proposals_of_a_real_model(tiny, states, rows, pairs):
    assert len(rows) == len(states) and len(pairs) > 3  # or this file tests little
    for state, row in zip(states, rows):
        candidates = [act.normal(WORLD, action) for action in row["candidates"]]
        assert len(set(candidates)) == len(candidates) <= 2
        assert act.normal(WORLD, state["expert"]) not in candidates
        assert {name: row[name] for name in state} == state
        told = dict(row["proposed"])
        assert 2 < told.pop("tokens") <= 56 and sum(told.values()) == 2
    assert [*act.propose(state_of(*tiny, args=args_of(rollout_batch_size=6)), states)] == rows
    assert [*act.propose(state_of(*tiny, args=args_of(seed=1)), states)] != rows


def test_no_candidate_is_the_experts_action(tiny, states, monkeypatch):
    said = ["<action>{0}</action>", "<action> {1}.</action>", "{0}", "", "<action></action>", "I thi",
            "<action>dance</action>", "<action>Dance.</action>", "<action>clean the gears </action>"]  # fmt: skip
    some = [state for state in states if state["expert"] != "clean the gears"][:2]

    def generate(model, chat, prompts, **how):
        assert prompts == [chat.dialogue(act.dialogue(WORLD, ARGS, state["messages"])) for state in some for _ in said]
        assert how["max_new_tokens"] == 28 and how["temperature"] == 1 and len(set(how["seeds"])) == 18
        texts = [text.format(s["expert"], s["expert"].upper()) for s in some for text in said]
        complete = [text != "I thi" for text in texts]
        return common.Replies([[0]] * 18, [[0.0]] * 18, texts, complete)

    monkeypatch.setattr(common, "generate", generate)
    for row in act.propose(state_of(*tiny, args=args_of(candidates=9)), some):
        assert [act.normal(WORLD, action) for action in row["candidates"]] == ["dance", "clean the gears"]
        assert row["proposed"] == {"right": 2, "untagged": 2, "cut": 1, "impossible": 3, "possible": 1, "tokens": 9}


def test_an_answer_is_masked_as_it_was_sampled(tiny, pairs):
    model, chat = tiny
    some = [pair | {"expert_second": second} for pair, second in zip(pairs, (False, True, False))]
    for prefill in False, True:
        args = args_of(prefill=prefill)
        prompts = [act.question(WORLD, args, pair) for pair in some]
        replies = act.ask(state_of(*tiny, args=args), some, (0, 1), 4)
        assert len(replies) == 12 and len({reply.text for reply in replies}) > 1
        for i, reply in enumerate(replies):
            ids = chat.dialogue(prompts[i // 4], act.TAG * prefill)
            n, sampled = len(ids), reply.ids[len(ids):]
            assert reply.ids[:n] == ids and reply.mask == [0] * n + [1] * len(sampled) and 1 <= len(sampled) <= 28
            assert reply.text == act.TAG * prefill + chat.decode(sampled)
            assert reply.complete == (sampled[-1] in chat.eos)
            pair = some[i // 4]
            assert reply.outcome == act.outcome_of(WORLD, reply, pair) and reply.reward == act.REWARDS[reply.outcome]
            assert reply.about == {name: pair[name] for name in act.KEPT}
        with torch.no_grad():
            found, _ = act.sampled_logprobs(model, chat, replies, args.temperature)
        for row, reply in zip(found, replies):  # decoding and the training forward agree
            assert row.sum().item() == pytest.approx(reply.logprob, abs=1e-3)
        fewer = act.ask(state_of(*tiny, args=dataclasses.replace(args, rollout_batch_size=3)), some[:2], (0, 1), 4)
        later = act.ask(state_of(*tiny, args=args), some[1:2], (0, 1), 4, first=4)
        assert [reply.ids for reply in fewer] == [reply.ids for reply in replies[:8]]  # whatever else
        assert [reply.ids for reply in later] == [reply.ids for reply in replies[4:8]]  # is in the batch


def test_episodes_do_not_depend_on_what_is_played_beside_them(tiny):
    play = functools.partial(act.rollout, split="test", seeds=range(7), temperature=1.0, stream=("x",))
    whole, apart = (play(*tiny, args_of(rollout_batch_size=size)) for size in (256, 3))
    assert whole == apart and [episode.seed for episode in apart] == list(range(7))
    for episode in whole:
        assert [who for who, _ in episode.said] == ["world", *["act", "world"] * len(episode.valid)]
    model = copy.deepcopy(tiny[0])
    model.max_context = 30  # not even the first prompt: counted as lost, never an error
    assert all(episode.truncated and not episode.valid and not episode.won for episode in play(model, tiny[1], ARGS))
    forced = play(*tiny, args_of(prefill=True))
    assert all(text.startswith(act.TAG) for episode in forced for who, text in episode.said if who == "act")


def test_what_does_not_fit_the_context_is_left_out(tiny, states, pairs):
    state = state_of(copy.deepcopy(tiny[0]), tiny[1])
    for examples in states, pairs:
        lengths = [len(tiny[1].dialogue(act.asked_of(state, example)[0])) + 28 + act.FORCED for example in examples]
        for limit in {*lengths, min(lengths) - 1}:
            state.model.max_context = limit
            assert act.that_fit(state, examples) == [e for e, n in zip(examples, lengths) if n <= limit]


@pytest.fixture
def stage(tiny, demos, states, pairs, monkeypatch):
    """stage(function, **changes) runs two steps of a stage on a copy -> its state, what it was told of each."""

    def run(function, **changes):
        told = []
        args = args_of(steps=2, **changes)
        model = copy.deepcopy(tiny[0])
        state = state_of(model, tiny[1], args, demos=demos, states=states, pairs=pairs, stage="1-x",
                         run=SimpleNamespace(steps=lambda a, b: range(a + 1, b + 1), lap=lambda name: None),
                         optimizer=torch.optim.AdamW(model.parameters(), weight_decay=0))  # fmt: skip
        monkeypatch.setattr(act, "end_step", lambda state, *given: told.append(given))
        function(state)
        return state, told

    return run


def test_what_the_stages_train_on(stage, pairs, states, demos, monkeypatch):
    seen = {"act": [], "il": []}
    monkeypatch.setattr(act, "update", lambda *given: seen["act"].append(given[5]) or {})
    monkeypatch.setattr(act, "imitate", lambda *given: seen["il"].append(given[4]) or {"loss": 0})
    state, told = stage(act.critical_training)
    for (_, metrics, replies), updated in zip(told, seen["act"]):
        assert replies is updated and len(replies) == 8
        for group in act.groups(replies, 4):
            about = group[0].about
            assert all(reply.about == about for reply in group)
            [pair] = [p for p in pairs if all(p[name] == about[name] for name in ("seed", "turn", "candidate"))]
            pair |= {"expert_second": about["expert_second"]}
            prompt = state.chat.dialogue(act.question(WORLD, ARGS, pair))
            assert all(reply.ids[:len(prompt)] == prompt for reply in group)
        assert metrics["reward"] == pytest.approx(sum(reply.reward for reply in replies) / 8)
        assert metrics["cut_choice"] == sum(not reply.complete for reply in replies) / 8
        for name, key, wanted in ("first", "expert_second", False), ("second", "expert_second", True), ("possible", "possible", True):
            right, found = [reply.outcome == "right" for reply in replies if reply.about[key] == wanted], metrics[f"right_if_{name}"]
            assert found == pytest.approx(common.mean(right)) if right else math.isnan(found)
    assert abs(common.mean(pair["expert_second"] for pair in act.in_random_order(state, 1, pairs[:1] * 1000)) - 0.5) < 0.05
    state, told = stage(act.reinforcement)
    for _, metrics, replies in told:
        assert "cut_act" in metrics and not {"candidate", "expert_second"} & set(replies[0].about)
        for group in act.groups(replies, 4):
            [at] = [s for s in states if all(s[name] == group[0].about[name] for name in ("seed", "turn"))]
            prompt = state.chat.dialogue(act.dialogue(WORLD, ARGS, at["messages"]))
            assert all(reply.ids[:len(prompt)] == prompt for reply in group)
    stage(act.imitation)
    whole = [act.dialogue(WORLD, ARGS, demo["messages"]) for demo in demos]
    assert [len(some) for some in seen["il"]] == [3, 3] and all(d in whole for some in seen["il"] for d in some)


def test_what_the_controls_train_on(stage, pairs, monkeypatch):
    seen = {}
    monkeypatch.setattr(act, "imitate", lambda *given: seen.update(sft=given[4]) or {"loss": 0})
    monkeypatch.setattr(act_controls, "dpo_step", lambda state, triples: seen.update(dpo=triples) or {})
    monkeypatch.setattr(act, "ask", lambda state, some, *given, **how: seen.update(ask=(some, how)) or replies_of((1, "right")))
    monkeypatch.setattr(act, "update", lambda *given: {})
    monkeypatch.setattr(act, "in_random_order", lambda state, step, pairs: pairs)

    def run(function):
        return stage(lambda state: [setattr(state, "args", act_controls.Args(**vars(state.args))),
                                    setattr(state, "reference", copy.deepcopy(state.model)), function(state)])[0].chat  # fmt: skip

    chat = run(act_controls.sft_choice)
    asked = {tuple(chat.dialogue(act.question(WORLD, ARGS, pair))): pair for pair in pairs}
    assert len(seen["sft"]) == 16
    for messages in seen["sft"]:
        pair = asked[tuple(chat.dialogue(messages[:-1]))]
        ids, mask = chat.dialogue_and_mask(messages)  # the last reply alone
        reply = chat.reply(act.written(pair["expert"]))
        assert ids[-len(reply):] == reply and mask == [0] * (len(ids) - len(reply)) + [1] * len(reply)
    run(act_controls.dpo)
    triples = [(chat.dialogue(act.dialogue(WORLD, ARGS, pair["messages"])),
                *(chat.reply(act.written(pair[which])) for which in ("expert", "candidate"))) for pair in pairs]  # fmt: skip
    assert len(seen["dpo"]) == 16 and all(triple in triples for triple in seen["dpo"])
    run(act_controls.no_reasoning)
    assert seen["ask"][1] == {"reasons": False}


def test_cut_replies_teach_nothing_and_are_counted(stage, tiny, capsys):
    state, told = stage(act.critical_training, choice_tokens=2, eval_episodes=2)  # not long enough for tags
    assert common.fingerprint(state.model) == common.fingerprint(tiny[0])
    for _, metrics, _ in told:
        assert metrics["outcome_cut"] == metrics["cut_choice"] == 1 and metrics["reward"] == 0
    common._told.clear()
    common.warn_cut(metrics, act.LIMITS)
    assert "--choice-tokens" in capsys.readouterr().err
    state.args.max_new_tokens = 1
    for told in 1, 0:  # in evaluations, too, and once
        found, _ = act.evaluate(state, ["test"], state.args.eval_episodes)
        assert found["test"]["cut_act"] == 1 and capsys.readouterr().err.count("--max-new-tokens") == told


# ----------------------------------------------------------------------------------------- warm-up


def kind_of(messages):
    ask = messages[-2]["content"]
    if act.READ in ask:
        return "read"
    return {True: "choose", False: "now"}.get(next((r for r in (True, False) if act.choose(r) in ask), None), "act")


@pytest.mark.parametrize("name", ["repair", "household", "20q"])
def test_warm_up_sees_train_alone_and_no_expert(name, monkeypatch):
    world, splits, possible = envs.make(name), set(), set()
    monkeypatch.setattr(type(world), "expert", lambda self: pytest.fail("the warm-up asked the expert"))
    reset, step = world.reset, world.step

    def keep(out):
        possible.update(out[-1]["admissible"])
        return out

    monkeypatch.setattr(world, "reset", lambda **k: splits.add(k["options"]["split"]) or keep(reset(**k)))
    monkeypatch.setattr(world, "step", lambda action: keep(step(action)))
    args = args_of(env=name, examples=20)
    examples = act.warmup(world, args)
    assert splits == {"train"} and examples == act.warmup(envs.make(name), args)  # the cache is named after it
    kinds, thoughtful = Counter(), Counter()
    for system, *messages in examples:
        kind = kind_of(messages)
        kinds[kind] += 1
        assert system == act.system(world, kind != "now")
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        asked, said = ([m["content"] for m in messages[start::2]] for start in (0, 1))
        ask, reply, action = asked[-1], said[-1], act.parse_action(said[-1])
        for text in said if kind == "act" else said[:-1]:  # actions of the world, tagged
            assert act.parse_action(text) in possible
            assert kind == "act" or text == act.written(act.parse_action(text))
        if kind == "act":  # each turn after a thought or without
            for told, text in zip(asked, said):
                thought = text.removesuffix(act.written(act.parse_action(text)))
                thoughtful[bool(thought)] += 1
                assert not thought or thought.endswith(f" {act.event(told)} ")
        elif kind == "read":
            assert action is None and reply.endswith(f" {act.event(ask)}")
        else:
            listing = ask.split("\nPossible actions:\n")[1].split(f"\n{act.PROPOSED}")[0].splitlines()
            proposed = re.search(r"Action 1: (.*)\nAction 2: (.*)", ask).groups()
            assert action in proposed and set(proposed) <= set(listing) <= possible
            assert (reply == act.written(action)) == (kind == "now")
    assert len(kinds) == 4 and set(kinds.values()) == {20} and min(thoughtful.values()) > 5


def test_warm_up_in_a_world_of_tool_calls_and_in_one_that_lists_nothing():
    calls = act.warmup(envs.make("search"), args_of(env="search", examples=6))
    assert len(calls) == 24 and any("<tool_call>" in (act.parse_action(e[-1]["content"]) or "") for e in calls)
    world = envs.make("household", show_actions=True)
    world.admissible = lambda: None
    assert len(act.warmup(world, args_of(env="household", examples=6))) == 24


def test_warm_up_prefers_neither_position_nor_winner_and_shows_nothing_of_test():
    first = right = count = 0
    examples = act.warmup(envs.make(ENV), args_of(examples=600))
    for *_, asked, reply in examples:
        if found := re.search(r"Action 1: (.*)\nAction 2: (.*)", asked["content"]):
            one, two = found.groups()
            count, first = count + 1, first + (act.parse_action(reply["content"]) == one)
            right += one < two
    assert count > 1000 and max(abs(n - count / 2) for n in (first, right)) < 2 * math.sqrt(count)
    test = {envs.make(ENV).reset(seed=seed, options={"split": "test"})[0].split(" that ")[0] for seed in range(2000)}
    openings = set(re.findall(r"\w+ brings a \w+ \w+", str(examples)))
    assert len(openings) > 100 and len(test) > 80 and not openings & test


# -------------------------------------------------------------------------------------------- dose

FORESEEN = re.compile(r"([^.<>]+?) would lead (\w+)\. ")


def after(seed, rng, turns):
    """A game of a random player, and what it knows of outlooks."""
    world = envs.make("household")
    _, info = world.reset(seed=seed, options={"split": "train"})
    for _ in range(turns):
        _, _, over, _, info = world.step(rng.choice(rng.choice(envs.by_verb(info["admissible"]))))
        if over:
            return after(seed + 1000, rng, turns)
    return world, envs.RandomPlay(world)


def test_chances_and_outlooks_are_what_random_play_wins():
    """Against another derivation: many random games."""
    rng, seen = random.Random(0), Counter()
    for seed in range(8):
        world, play = after(seed, rng, 3)
        states = world.possibilities()

        def won(state, turns, start=world):
            game = copy.deepcopy(start)
            game.restore(state)
            for _ in range(turns):
                game.act(rng.choice(rng.choice(envs.by_verb(game.admissible()))))
                if game.won:
                    return True
            return False

        for turns in 2, world.max_turns:
            found = common.mean(won(state, turns) for state in states for _ in range(300))
            exact = common.mean(play.chance(state, turns) for state in states)
            assert abs(found - exact) < 5 * math.sqrt((exact + 0.001) / 300 / len(states)), (seed, turns)
            seen["chances"] += found > 0.05
        now = common.mean(play.chance(state, world.max_turns) for state in states)
        for action in world.admissible():
            worlds = [copy.deepcopy(world) for _ in states]
            for game, state in zip(worlds, states):
                game.restore(state)
                game.act(action)
            then = common.mean(1 if game.won else play.chance(game.snapshot(), game.max_turns) for game in worlds)
            ratio = (then + 0.003) / (now + 0.003)
            mark = act.OUTLOOKS[act.outlook(play, world, action)]
            assert mark == ("closer" if ratio > math.exp(0.15) else "away" if ratio < math.exp(-0.15) else "nowhere")
            seen[mark] += 1
    assert seen["chances"] > 5 and min(seen[mark] for mark in act.OUTLOOKS) > 2, seen


def test_outlooks_do_not_depend_on_what_is_hidden():
    rng = random.Random(1)
    for seed in range(10):
        world, play = after(seed, rng, 2)
        other = copy.deepcopy(world)
        other.resample(random.Random(seed))
        actions = [action for action in world.admissible() if action in other.admissible()]
        assert [act.outlook(play, world, action) for action in actions] == [
            act.outlook(envs.RandomPlay(other), other, action) for action in actions]  # fmt: skip


@pytest.mark.parametrize("dose", [0.0, 0.5, 1.0])
def test_dose_is_the_share_of_thoughts_that_are_right(monkeypatch, dose):
    monkeypatch.setattr(envs.Household, "expert", lambda self: pytest.fail("the expert was asked"))
    monkeypatch.setattr(act, "outlook", lambda chances, world, action: len(action) % 3)
    examples = act.warmup(envs.make("household"), args_of(env="household", examples=100, dose=dose))
    right, followed, apart = [], [], []
    for *before, asked, reply in examples:
        assert act.FORESEE not in str(before) and "would lead" not in str(before)  # nothing to copy
        told = FORESEEN.findall(f"{reply['content']} ")
        marks = [act.OUTLOOKS.index(word) for _, word in told]
        correct = [mark == len(action.strip()) % 3 for mark, (action, _) in zip(marks, told)]
        if act.FORESEE in asked["content"]:
            assert "Possible" not in asked["content"] and act.parse_action(reply["content"]) is None
            assert told and reply["content"].count("would lead") == len(told)
            apart.append(all(correct))
        elif told:  # in thoughts before a choice alone
            shown = re.search(r"Action 1: (.*)\nAction 2: (.*)", asked["content"]).groups()
            assert [action.strip() for action, _ in told] == [*shown]
            right.append(all(correct))
            if marks[0] != marks[1]:
                number = f"<action>Action {1 + (marks[1] > marks[0])}</action>"
                followed.append(reply["content"].endswith(number))
    assert len(right) == (300 if dose else 0) and len(apart) == (200 if dose else 0)
    if dose == 1:
        assert all(right) and all(apart)
    elif dose:
        assert abs(common.mean(right) - (0.5 + 0.5 / 9)) < 0.1 and abs(common.mean(apart) - 0.53) < 0.12
    assert all(followed) and len(followed) >= (100 if dose else 0)


@pytest.mark.parametrize("knows, follows", [(True, True), (True, False), (False, True)])
def test_the_gates_of_a_dose(monkeypatch, knows, follows):
    """By a model that knows what actions lead to, or says the same of all, and chooses by it or against it."""
    world, spoken = envs.make("household"), []

    def propose(state, states):
        for some in states:
            others = [action for action in some["admissible"] if action != some["expert"]]
            yield some | {"candidates": [*others[:1], "dance"]}

    def ask(state, pairs, stream):
        replies = []
        for pair in pairs:
            both = act.in_order(pair)
            world = envs.make("household")
            envs.replay(world, pair["seed"], [m["content"] for m in pair["messages"][1::2]], "test")
            possible = [action in world.admissible() for action in both]
            marks = [act.outlook(envs.RandomPlay(world), world, action) if can else 1 for action, can in zip(both, possible)]
            marks = marks if knows else [2, 2]
            spoken.append(marks)
            better = marks[1] > marks[0]
            chosen = both[better] if follows else both[not better]
            replies.append(reply_of(f"So. {act.foreseen(both, marks)} {act.written(chosen)}"))
            replies[-1].outcome = act.outcome_of(state.world, replies[-1], pair)
        return replies

    monkeypatch.setattr(act, "propose", propose)
    monkeypatch.setattr(act, "that_fit", lambda state, examples: [*examples])
    monkeypatch.setattr(act, "ask", ask)
    found = act_dose.gates(state_of(args=args_of(env="household"), world=world), 20)
    differ = [marks for marks in spoken if marks[0] != marks[1]]
    assert found["questions"] == len(spoken) > 60 and found["outlooks"] == 2 * len(spoken)
    assert bool(differ) == knows and found["followed"] == (float(follows) if knows else None)
    if knows:  # the expert's action leads closer, nearly always
        assert found["ideal"] > 0.9 and (found["rows"]["right"] > 0.85) == follows and found["right"] == 1
        assert {*found["right_of"].values()} <= {1.0, None}
    else:
        assert found["right_of"]["closer"] == 1 and found["right_of"]["nowhere"] == 0 and 0.3 < found["right"] < 0.7


# -------------------------------------------------------------------------------- whole runs

STAGED = "1-act", "2-il", "3-rl"
same_run = functools.partial(helpers.same_run, data=("demos.jsonl", "pairs.jsonl"), weights=(*STAGED[:2], "model"))


def replayed(episode):
    """What the world says to the actions of a recorded episode."""
    world = envs.make(ENV)
    observations = [world.reset(seed=episode["seed"], options={"split": episode["split"]})[0]]
    for who, text in episode["said"]:
        if who == "act":
            observations.append(world.step(act.parse_action(text) or "")[0])
    return observations


def test_a_run_and_its_summary(whole):
    summary = json.loads((whole / "summary.json").read_text())
    metrics, rollouts, demos, rows = (lines(whole / f"{name}.jsonl") for name in ("metrics", "rollouts", "demos", "pairs"))
    assert list(summary["stages"]) == ["before", *STAGED]
    assert all(0 <= found["test"]["cut_act"] <= 1 for found in summary["stages"].values())
    assert summary["after"] == {key: summary["stages"]["3-rl"]["test"][key] for key in ("success", "se")}
    assert [row["stage"] for row in metrics] == [name for name in STAGED for _ in range(3)]
    assert [row["stage_step"] for row in metrics] == [1, 2, 3] * 3
    worth = {"right": 1, "possible": 0.1, "impossible": 0, "cut": 0, "untagged": -0.5}
    for row in metrics:
        assert ("eval_success" in row) == (row["stage_step"] > 1) and ("right_if_first" in row) == (row["stage"] == "1-act")
        shown = [("before", "before")] * (row["step"] == 1) + [("eval", row["stage"])] * (row["stage_step"] == 3)
        for prefix, name in shown:  # to --track, too
            assert all(row[f"{prefix}_{key}"] == value for key, value in summary["stages"][name]["test"].items())
        assert ("before_success" in row) == (row["step"] == 1)
        said = [reply for reply in rollouts if reply["step"] == row["step"] and "evaluation" not in reply]
        assert len(said) == (0 if row["stage"] == "2-il" else 8)
        if said:
            shares = {kind: row[f"outcome_{kind}"] for kind in worth}
            assert shares == {kind: common.mean(reply["outcome"] == kind for reply in said) for kind in worth}
            assert row["reward"] == pytest.approx(sum(worth[kind] * share for kind, share in shares.items()))
            assert all("split" in r["about"] and r["about"]["split"] == "train" for r in said)
    for number, name in enumerate(["before", *STAGED]):  # whole episodes, with every word of them
        played = [episode for episode in rollouts if "evaluation" in episode and episode.get("stage") == name]
        assert len(played) == 4 * len(summary["stages"][name]) and {episode["step"] for episode in played} == {3 * number}
        for split, found in summary["stages"][name].items():
            some = [episode for episode in played if episode["split"] == split]
            assert found["success"] == sum(episode["won"] for episode in some) / 4
            assert found["score"] == sum(episode["score"] for episode in some) / 4
            assert [episode["seed"] for episode in some] == [0, 1, 2, 3]
        for episode in played:
            assert [text for who, text in episode["said"] if who == "world"] == replayed(episode)
    counts = summary["pair_counts"]
    assert summary["train_episodes"] == len(demos) == 5 and summary["expert_states"] == len(rows)
    assert summary["pairs"] == sum(len(row["candidates"]) for row in rows) > 3
    assert sum(counts.values()) - counts["tokens"] == 2 * len(rows)
    assert summary["generated_tokens"] == counts["tokens"] + round(sum(row.get("length", 0) * 8 for row in metrics))
    test = {envs.make(ENV).reset(seed=seed, options={"split": "test"})[0].split(" that ")[0] for seed in range(1000)}
    assert not test & {row["messages"][0]["content"].split(" that ")[0] for row in demos + rows}
    text = (whole / "pairs.jsonl").read_text() + (whole / "demos.jsonl").read_text()
    for words in act.system(WORLD)["content"], act.PROPOSED, "Action 1", "Possible", "<action>", *common.CONTROL:
        assert json.dumps(words)[1:-1] not in text, words  # no rendered prompt


def test_each_stage_starts_from_the_one_before_and_so_does_its_reference(run_here, monkeypatch, tmp_path):
    seen, update, imitate, save = [], act.update, act.imitate, common.Run.save
    parts, NOTHING = [], common.fingerprint(torch.nn.Module())

    def updating(model, reference, *given):
        seen.append((common.fingerprint(model), common.fingerprint(reference)))
        return update(model, reference, *given)

    def imitating(model, *given):
        seen.append((common.fingerprint(model), NOTHING))
        return imitate(model, *given)

    monkeypatch.setattr(act, "update", updating)
    monkeypatch.setattr(act, "imitate", imitating)
    monkeypatch.setattr(common.Run, "save", lambda self, state: parts.append(bool(state["parts"]["reference"])) or save(self, state))
    run_here(f"{SMALL} --steps 2 --kl 0.1 --pipeline rl,il,rl --out-dir run")
    start = json.loads((tmp_path / "run" / "args.json").read_text())["start"]
    after = [common.fingerprint(common.load(str(tmp_path / "run" / name))[0]) for name in ("1-rl", "2-il")]
    assert [model for model, _ in seen[::2]] == [start, *after]
    assert [reference for _, reference in seen] == [start, start, NOTHING, NOTHING, after[1], after[1]]
    assert parts == [True, False, True] and not (tmp_path / "run" / "3-rl").exists()  # it is model/
    seen.clear()
    run_here(f"{SMALL} --steps 1 --kl 0 --pipeline rl --out-dir plain")
    assert seen == [(start, NOTHING)]  # nobody needs a copy


def test_files_of_another_run_take_the_place_of_its_data(run_script, whole, tmp_path):
    result = run_script(f"{SMALL} --demos {whole}/demos.jsonl --pairs {whole}/pairs.jsonl --out-dir run", tmp_path)
    assert result.status == 0, result.stderr
    one, two = (json.loads((run / "summary.json").read_text()) for run in (whole, tmp_path / "run"))
    spent = one["pair_counts"]["tokens"]  # what a run with a file of pairs need not sample
    assert two["pair_counts"] == {} and one["generated_tokens"] - two["generated_tokens"] == spent > 0
    metrics = [row | {"tokens": row["tokens"] + spent} for row in lines(tmp_path / "run" / "metrics.jsonl")]
    common.write_jsonl(tmp_path / "run" / "metrics.jsonl", metrics)
    same_run(whole, tmp_path / "run", apart=["pair_counts", "generated_tokens"])


def read(path, paired):
    """The rows of --demos, or of --pairs."""
    given = args_of(pairs=str(path)) if paired else args_of(demos=str(path))
    _, _, (demos, pairs) = act.check_args(given)
    return pairs if paired else demos


@pytest.mark.parametrize("how", ["parquet", "directory", "hub"])
@pytest.mark.parametrize("name", ["demos", "pairs"])
def test_data_from_anything_that_datasets_takes(whole, tmp_path, monkeypatch, name, how):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{key: row[key] for key in row if key != "proposed"} for row in lines(whole / f"{name}.jsonl")]
    path = tmp_path / "data" / "train.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    if how == "hub":
        stored = list(datasets.load_dataset("parquet", data_files=str(path), split="train"))
        monkeypatch.setattr(datasets, "load_dataset", lambda path, split: stored)
    given = {"parquet": path, "directory": path.parent, "hub": "somebody/data"}[how]
    assert read(given, name == "pairs") == rows


def test_trajectories_need_no_more_than_their_messages(run_script, whole, tmp_path):
    for name, kept in ("demos", ["messages"]), ("pairs", ["messages", "expert", "candidates"]):
        rows = [{key: row[key] for key in kept} for row in lines(whole / f"{name}.jsonl")]
        common.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    result = run_script(f"{SMALL} --steps 1 --demos demos.jsonl --pairs pairs.jsonl --out-dir run", tmp_path)
    assert result.status == 0, result.stderr
    assert lines(tmp_path / "run" / "demos.jsonl") == lines(tmp_path / "demos.jsonl")
    about = next(row["about"] for row in lines(tmp_path / "run" / "rollouts.jsonl") if "about" in row)
    assert about.keys() == {"expert", "candidate", "possible", "expert_second"}


USER, ASSISTANT = act.user("Hm."), act.assistant("look")
BAD = {  # what the third line is, in place of a good row; and what the message says of it
    "broken": ('{"env": "repair", ', "double quotes"), "a list": ("[]", "TypeError"),
    "another world": ({"env": "20q"}, "'20q'"), "another split": ({"split": "test"}, "'test'"),
    "admissible": ({"admissible": "look"}, ""), "an admissible number": ({"admissible": [1]}, ""),
    "no messages": ({"messages": ...}, "'messages'"), "assistant first": ({"messages": [ASSISTANT, USER]}, "messages go"),
}  # fmt: skip
BAD_DEMOS = {"user last": ({"messages": [USER, ASSISTANT, USER]}, "messages go"),
             "too many lists": ({"admissible": [["look"]] * 99}, "99 lists"),
             "tags": ({"messages": [USER, act.assistant("<action>look</action>")], "admissible": None}, "has tags"),
             "nothing done": ({"messages": [USER, act.assistant(" . ")], "admissible": None}, "is empty or")}  # fmt: skip
BAD_PAIRS = {"assistant last": ({"messages": [USER, ASSISTANT]}, "messages go"),
             "no expert": ({"expert": ...}, "'expert'"), "expert": ({"expert": None}, "TypeError"),
             "no candidates": ({"candidates": ...}, "'candidates'"), "null": ({"candidates": None}, "TypeError"),
             "a candidate": ({"candidates": [3]}, "TypeError"), "a text": ({"candidates": "look"}, "TypeError"),
             "an empty candidate": ({"candidates": [""]}, "is empty"), "an empty expert": ({"expert": "."}, "is empty or"),
             "tags": ({"expert": "go <action >look</action>"}, "has tags"),
             "tags before": ({"messages": [USER, act.assistant("<action>look"), USER]}, "has tags"),
             "the expert's": ({"expert": "Clean it.", "candidates": ["look", "**clean  it**"]}, "the expert's action")}  # fmt: skip


@pytest.mark.parametrize("paired", [False, True])
def test_a_bad_line_is_named(demos, rows, tmp_path, capsys, paired):
    """(What is no JSON and no dialogue: tests/test_common.py.)"""
    good, path = (rows if paired else demos)[0], tmp_path / "data.jsonl"
    common.write_jsonl(path, [good] * 3)
    assert read(path, paired) == [good] * 3 == lines(path)
    foreign = {"time": "noon", "candidate": "x"} | ({} if paired else {"expert": "x", "candidates": ["y"]})
    common.write_jsonl(path, [good | foreign])  # columns of another form
    assert read(path, paired) == [good]
    for name, (line, words) in (BAD | (BAD_PAIRS if paired else BAD_DEMOS)).items():
        if isinstance(line, dict):
            line = json.dumps({key: value for key, value in (good | line).items() if value is not ...})
        path.write_text(f"{json.dumps(good)}\n{json.dumps(good)}\n{line}\n{json.dumps(good)}\n")
        with pytest.raises(SystemExit) as end:
            read(path, paired)
        told = capsys.readouterr().err
        assert end.value.code == 2 and told.count("\n") == 1 and len(told) < 500, name
        assert "data.jsonl, line 3: " in told and words in told, (name, told)


ACCEPTED = "common.Run.start = act.evaluate = lambda *a, **k: os._exit(77)"  # or a full run would follow


@pytest.mark.parametrize("flags, words", [
    ("--group-size 1", "--group-size"), ("--group-size -4", "--group-size"), ("--batch-size 16 --group-size 3", "--group-size"),
    ("--updates 3", "--updates"), ("--clip -1", "--clip"), ("--kl -1", "--kl"), ("--kl nan", "--kl"), ("--epochs 0", "--epochs"),
    ("--epochs 1.5", "--epochs"), ("--num-demos 0", "--num-demos"), ("--candidates 0", "--candidates"),
    ("--choice-tokens 0", "--choice-tokens"), ("--sft-lr -1", "--sft-lr"), ("--sft-lr nan", "--sft-lr"),
    ("--sft-batch-size 0", "--sft-batch-size"), ("--dose 1.5", "--dose"), ("--dose -1", "--dose"), ("--dose nan", "--dose"),
    ("--dose 1 --env search", "--dose"), ("--dose 1 --model nobody/nothing", "--dose"),
    ("--pipeline il,sing", "'sing'"), ("--pipeline act,,il", "--pipeline"), ("--pipeline ACT", "'ACT'"), ("--pipeline dpo", "'dpo'"),
    ("--pipeline il --pairs {tmp}/file.jsonl", "about pairs"), ("--demos nowhere.jsonl", "--demos nowhere.jsonl"),
    ("--pairs nowhere.json", "--pairs nowhere.json"), ("--demos {tmp}/file.jsonl", "is empty"),
    ("--demos nowhere.parquet", "cannot be read"), ("--demos somebody/nothing", "cannot be read"), ("--pairs {tmp}", "cannot be read"),
])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(run_script, tmp_path, flags, words):
    (tmp_path / "file.jsonl").write_text("")
    refused(run_script(f"--env {ENV} {flags.format(tmp=tmp_path)}", tmp_path, ACCEPTED), words)
    assert [path.name for path in tmp_path.iterdir()] == ["file.jsonl"]


def commands():
    """Of the docstrings: (script, flags)."""
    for path in ROOT / "act.py", ROOT / "docs" / "act_controls.py":
        for flags in re.findall(rf"\n    python (?:docs/)?{path.name}([^\n#]*)", path.read_text()):
            yield path, flags.split()


def test_the_commands_of_the_docstrings_are_accepted(monkeypatch):
    found = list(commands())
    assert len(found) == 6
    for path, flags in found:
        args = common.parse_args(act_controls.Args if "docs" in path.parts else act.Args, act.TINY, flags)
        monkeypatch.setattr(act, "STAGES", act.STAGES | act_controls.STAGES)
        monkeypatch.setattr(act, "PAIRED", act.PAIRED | {*act_controls.STAGES})
        monkeypatch.setattr(common, "read_rows", lambda *given: [])
        act.check_args(dataclasses.replace(args, device="cpu"))


PAPER = {"pipeline": "act,il", "epochs": 3, "candidates": 1}  # version 2
PAPER_SIZES = {"num_demos": "10 thousand pairs", "eval_episodes": "140, and 134"}


def test_the_defaults_are_the_papers():
    told = {field.name: field.metadata["help"] for field in dataclasses.fields(act.Args)}
    stated = {name for name, text in told.items() if "(paper)" in text or "(paper;" in text}
    assert stated == set(PAPER) and {name: getattr(act.Args, name) for name in PAPER} == PAPER
    assert {name for name, text in told.items() if "(paper:" in text} == set(PAPER_SIZES)
    assert all(words in told[name] for name, words in PAPER_SIZES.items())
    assert common.parse_args(act.Args, act.TINY, []) == dataclasses.replace(act.Args(), **act.TINY)
    given = common.parse_args(act.Args, act.TINY, ["--model", "smollm2", "--lr", "1"])
    assert given == dataclasses.replace(act.Args(), model="smollm2", lr=1.0)


# -------------------------------------------------------------------------------- kills and resume

AMID_PROPOSALS = """
generate, seen = common.generate, []
def fatal(*given, **how):
    seen.append(0)
    len(seen) == 2 and os.kill(os.getpid(), signal.SIGKILL)
    return generate(*given, **how)
common.generate = fatal
"""


def test_killed_while_proposing_and_resumed(run_script, whole, tmp_path):
    flags = f"{SMALL} --rollout-batch-size 8 --out-dir run"
    result = run_script(flags, tmp_path, AMID_PROPOSALS)
    assert result.status == -9 and len(lines(tmp_path / "run" / "pairs.jsonl")) == 4
    assert run_script(f"{flags} --resume", tmp_path).status == 0
    same_run(whole, tmp_path / "run")


def test_a_model_that_proposes_nothing_is_told_so(run_script, llama, tmp_path):
    flags = SMALL.replace("--model tiny", f"--model {llama}")
    result = run_script(f"{flags} --max-new-tokens 8 --out-dir run", tmp_path)
    assert result.status == 2 and "pairs" in result.stderr and "Traceback" not in result.stderr


def test_dpo_without_a_reference_is_refused(environment, tmp_path):
    command = [sys.executable, ROOT / "docs" / "act_controls.py", "--pipeline", "il,dpo", "--kl", "0"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    helpers.refused_process(result, "--kl")
    assert not any(tmp_path.iterdir())


def test_the_controls_run(whole, environment, tmp_path):
    flags = SMALL.replace("act,il,rl", "sft-choice,dpo,no-reasoning") + f" --pair-batch-size 4 --pairs {whole}/pairs.jsonl"
    command = [sys.executable, ROOT / "docs" / "act_controls.py", *flags.split(), "--steps", "1", "--out-dir", "run"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    metrics, summary = lines(tmp_path / "run" / "metrics.jsonl"), json.loads((tmp_path / "run" / "summary.json").read_text())
    names = ["1-sft-choice", "2-dpo", "3-no-reasoning"]
    assert [row["stage"] for row in metrics] == names and list(summary["stages"]) == ["before", *names]
    weights = [common.fingerprint(common.load(str(tmp_path / "run" / name))[0]) for name in names[:2]]
    assert len({json.loads((tmp_path / "run" / "args.json").read_text())["start"], *weights}) == 3
    assert metrics[1]["chosen_gained_more"] == 0 and metrics[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
