"""self_guide.py: ratings, prompts, what is trained on, trust, advantages, loss, warm-up, whole runs, arms, bad input.

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
import shlex
import signal
import time
from collections import Counter, defaultdict
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import LOG, PAD, SUMMARY, WORDS, Bigram, everything_under, lines, random_episodes, random_table, refused, same_run, trained_on
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import envs
import self_guide as sg

torch.set_num_threads(1)
ENV = "repair"
WORLD = envs.make(ENV)
SMALL = (  # taught little, the model writes unreadable things now and then
    f"--env {ENV} --model tiny --examples 1500 --steps 4 --batch-size 8 --micro-batch-size 4 --group-size 4 --updates 1 --eval-episodes 4 "
    "--eval-every 2 --save-every 2 --max-new-tokens 20 --rate-tokens 20 --kl 0.01"
)
ARGS = dataclasses.replace(common.parse_args(sg.Args, sg.TINY, SMALL.split()), kl=0.0)
ALL_WORLDS = [*envs.WORLDS, "20q"]


def changed(**settings):
    return dataclasses.replace(ARGS, **settings)


# ------------------------------------------------------------------------------------------------------- ratings, as words


RATINGS = {
    # as it was asked for
    "Reason: The case is open.\nLabel: positive": 1,
    "Reason: Nothing new.\nLabel: neutral": 0,
    "Reason: I am stuck.\nLabel: negative": -1,
    "Reason: x\nLabel: Positive.": 1,
    "reason: x\nlabel: NEGATIVE\n": -1,
    "Reason: x\n\nLabel:\npositive\n": 1,
    # as chat models write it
    "**Reason:** The screw was found.\n**Label:** positive": 1,
    "**Reason**: It failed again.\n**Label**: **negative**": -1,
    "## Reason\nIt helped.\n\n## Label: \n\n- Positive": 1,
    "- Reason: It helped.\n- Label: `positive`": 1,
    "Reason: x\nLabel: *neutral*": 0,
    "Reason: x\nLabel: \"negative\"": -1,
    "Reason: x\nLabel: [positive]": 1,
    "> Reason: x\n> Label: neutral": 0,
    "```\nReason: x\nLabel: positive\n```": 1,
    "{\"reason\": \"It helped.\", \"label\": \"positive\"}": 1,
    "Reason: x Label: positive": 1,
    "Label: positive": 1,
    "positive": 1,
    "**Neutral.**": 0,
    "Label: positive\nReason: the label comes first here.": 1,
    "Sure! Here is my rating.\n\nReason: x\nLabel: neutral\n\nLet me know what comes next.": 0,
    "Reason: x\nLabel: positive (the gears were found)": 1,
    "Reason: x\nLabel: Negative - nothing was found, so it is not positive.": -1,
    "Reason: x\nLabel: positive, not neutral": 1,
    "Reason: x\nMy final Label: the step was negative": -1,
    "Reason: x\nLABEL\uff1a positive": 1,
    "Reason: x\nLabel: POSITIVE \u2705": 1,
    # reasons over several lines, labels that are spoken of before
    "Reason: First, the case.\nThen the gears.\nA positive thing, all in all? No.\n\nLabel: negative": -1,
    "Reason: The last Label: positive was too kind.\nLabel: neutral": 0,
    "Reason: x\nLabel: neutral\nOn second thought:\nLabel: positive": 1,
    "Reason: x\nLabel: negative\nLabel:": -1,  # cut amid a repetition
    # native thoughts
    "<think>Label: negative?</think>\nReason: x\nLabel: positive": 1,
    "Well...</think>Reason: x\nLabel: negative": -1,  # opened by the template
    "<think>\n\n</think>\n\nReason: x\nLabel: neutral": 0,
    "<think>I would say Label: positive": None,  # cut inside it
    # none, or all of them
    "": None,
    "Reason: positive\n": None,
    "The step was positive.": None,
    "Reason: x\nLabel:": None,
    "Reason: x\nLab": None,
    "Reason: x\nLabel: pos": None,  # cut
    "Reason: x\nLabel: good": None,
    "Reason: x\nLabel: positively": None,
    "Reason: x\nLabel: not positive": None,
    "Reason: x\nLabel: neither positive nor negative": None,
    "Reason: x\nLabel: po\u017fitive": None,
    "Reason: x\nLabel: pos\u0131tive": None,
    "Reason: x\nLabel: positive, neutral or negative.": None,
    "Reason: x\nLabel: negative|neutral|positive": None,
    "Reason: x\nLabel: **positive** / **neutral** / **negative**": None,
    "Reason: x\nLabel: <positive, neutral, or negative>": None,
    "Action: open the case": None,
    sg.RATE: None,  # repeating the instructions is no rating, let alone a positive one
    f"Reason: x\n{sg.GUIDED}": None,
}


@pytest.mark.parametrize("reply", RATINGS)
def test_parse_rating(reply):
    assert sg.parse_rating(reply) == RATINGS[reply] and len(RATINGS) > 40
    if "\u0131" not in reply and "\u017f" not in reply:
        assert sg.parse_rating(reply.upper()) == RATINGS[reply]


PIECES = st.sampled_from([
    "Label:", "label: ", "Reason: ", "positive", "neutral", "NEGATIVE", "po\u017fitive", "negat\u0130ve", "\n", "\r", "\x85", "\u2028",
    " ", "\t", "**", ".", "\x00", "\ud800", "\U0001f600", "<think>", "</think>", "Label", "Label: positive\n", "Action:",
    "<tool_call>", "{",
])  # fmt: skip


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(st.one_of(st.text(max_size=40), st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=10).map("".join)))
def test_no_string_raises(text):
    assert sg.parse_rating(text) in (None, -1, 0, 1)
    assert sg.to_act(text).startswith(sg.ACT) and sg.to_rate(text).endswith(sg.RATE)
    sg.event(text)
    world, episode = envs.make(ENV), sg.Episode("train", 0)
    world.reset(seed=0)
    sg.take_turn(world, episode, text)
    assert sg.watch([episode])["turns"] == 1 and json.dumps(sg.record(episode))


@pytest.mark.parametrize("unit", ["Label:", "Label: ", " ", "\n", "Label:\n", "a", "Label: positive", ". ", "<think>", "positive/"])
def test_megabytes_take_bounded_time(unit):
    text, start = unit * (1_000_000 // len(unit)), time.process_time()
    for long in text, "Label:" + text:
        sg.parse_rating(long), sg.event(long)
    assert time.process_time() - start < 5


# --------------------------------------------------------------------------------------------------- prompts, in all worlds


def said_to(world, reply):
    """A turn in which the policy says this."""
    episode = sg.Episode("test", 0)
    sg.take_turn(world, episode, reply)
    return episode


@pytest.mark.parametrize("env", ALL_WORLDS)
def test_the_experts_action_as_the_policy_writes_it_wins(env):
    world = envs.make(env)
    thoughts = ("", ""), ("I could say Action: look, but this is better:\n", ""), ("<think>Hm.</think>", "\n<think>Action: no")
    for seed in range(10):
        world.reset(seed=seed, options={"split": "test"})
        over, actions = False, itertools.cycle(thoughts)
        while not over:
            before, behind = next(actions)
            episode = said_to(world, before + sg.written(world.expert()) + behind)
            over = episode.over
            assert episode.valid == [True]
        assert episode.won and episode.score == 1, (env, seed)


@pytest.mark.parametrize("env", ALL_WORLDS)
def test_listed_actions_are_shown_when_an_action_is_asked_for_and_can_be_said_back(env):
    args = changed(env=env, show_actions=True)
    world, rng = envs.make(env, show_actions=True), random.Random(env)
    for seed in range(2):
        observation, info = world.reset(seed=seed, options={"split": "train"})
        for guided in True, False:
            assert envs.LISTING in sg.opening(world, args, guided)[-1]["content"]
        while not world.over:
            ask, rate = sg.to_act(observation), sg.to_rate(observation)
            assert ask == sg.ACT + envs.LISTING + "\n".join(map(envs.one_line, info["admissible"]))
            assert rate == f"{envs.bare(observation)}\n{sg.RATE}" and envs.LISTING not in rate
            listing = ask.split(envs.LISTING)[1].splitlines()
            for line in rng.sample(listing, min(4, len(listing))):
                assert said_to(copy.deepcopy(world), sg.written(line)).valid == [True], (env, line)
            observation, *_, info = world.step(envs.random_player(world, info, rng))
    assert sg.to_act("It is open. 3 turns left.") == sg.ACT


@pytest.mark.parametrize("env", ALL_WORLDS)
def test_worked_examples_are_random_play_on_train_and_true(env, monkeypatch):
    world, splits = envs.make(env), set()
    reset = type(world).reset
    monkeypatch.setattr(type(world), "expert", lambda self: pytest.fail("the expert was asked"))
    monkeypatch.setattr(type(world), "reset", lambda self, **k: splits.add(k["options"]["split"]) or reset(self, **k))
    sg.worked_examples.cache_clear()
    world.reset(seed=0, options={"split": "train"})
    args = changed(env=env, shots=4, show_actions=True)
    for guided in True, False:
        system, *shots, first = sg.opening(world, args, guided)
        assert [system, first] == sg.opening(world, changed(env=env), guided) and all(m["shot"] for m in shots)
        assert [m["role"] for m in shots] == ["user", "assistant"] * (len(shots) // 2)
        texts, labels = iter([m["content"] for m in shots]), []
        for n in range(4):
            asked, said = next(texts), next(texts)
            played = envs.make(env, show_actions=True)
            assert asked == reset(played, seed=10**6 + n, options={"split": "train"})[0]
            step = said_to(played, said)
            if guided and not step.over:  # the last step is never rated
                rate, rating, act, action = itertools.islice(texts, 4)
                assert rate == sg.to_rate(played.observation) and act == sg.to_act(played.observation)
                labels.append(sg.parse_rating(rating))
                assert labels[-1] == (1 if step.valid[0] else -1) and rating.startswith("Reason: ")
                assert said_to(played, action).valid == [True]
        assert set(labels) == ({1, -1} if guided else set()) and len(labels) >= 3 * guided
        assert not list(texts)
    assert splits == {"train"}


# ---------------------------------------------------------------------------------------------- episodes, in scripted words


def play(model, chat, seeds, guided=True, args=ARGS, **settings):
    return sg.rollout(model, chat, args, "train", seeds, guided=guided, **dict(temperature=1.0, stream=("test",)) | settings)


@pytest.fixture
def speak(monkeypatch):
    """speak(says) has every reply be says(row, turn, part): decoding apart, all is real -> what was asked for, and all Dialogues."""
    seen = SimpleNamespace(asked=[], dialogues=[], read=0)
    init = common.Dialogues.__init__
    monkeypatch.setattr(common.Dialogues, "__init__", lambda self, *a: seen.dialogues.append(self) or init(self, *a))
    parts = itertools.product(range(8), range(20), ("rate", "act"))
    names = {common.row_seed(ARGS.seed, "test", *name): name for name in parts}

    def scripted(says):
        def decode(model, chat, cache, mask, last, limit, temperature, seeds):
            told = [names[seed] for seed in seeds]
            seen.asked += [(*name, model, limit) for name in told]
            seen.read = max(seen.read, int(mask.sum(1).max()) + limit)  # what a reply of full length reads
            ids = [[*chat.encode(says(*name)), chat.eos[0]][:limit] for name in told]
            texts, complete = [chat.decode(row) for row in ids], [row[-1] in chat.eos for row in ids]
            return common.Replies(ids, [[-1.0] * len(row) for row in ids], texts, complete), 0  # nothing is in the cache

        monkeypatch.setattr(common, "_decode", decode)
        return seen

    return scripted


WORDS_OF_LABELS = ["positive", "negative", "nothing", "neutral"]


def hesitant(row, turn, part):
    """Five steps that cannot be done; the ratings say which turn it is."""
    if part == "rate":
        return f"Reason: turn {turn}\nLabel: {WORDS_OF_LABELS[turn - 1]}"
    return f"Action: I think, or {row}? No.\nAction: sing {turn}"


LONG = changed(max_new_tokens=200, rate_tokens=300)


@pytest.mark.parametrize("guided", [True, False])
def test_ratings_label_the_step_just_taken_and_the_actor_may_think(tiny, speak, guided):
    seen = speak(hesitant)
    episodes = play(*tiny, [0, 0, 1], guided, LONG)
    chat = tiny[1]
    for row, e in enumerate(episodes):
        assert e.actions == [f"sing {turn}" for turn in range(5)] and e.valid == [False] * 5 and e.over and not e.won
        assert e.labels == ([1, -1, None, 0] if guided else [])  # of the steps 0 to 3: the last is never rated
        order = "world act" + " world rate act" * 4 if guided else "world act" + " world act" * 4
        assert [who for who, _ in e.said] == [*order.split(), "world"]
        if guided:  # the rating of turn t comes behind what step t - 1 did, and before step t
            assert [text for who, text in e.said if who == "rate"] == [hesitant(row, turn, "rate") for turn in range(1, 5)]
        replies = [text for who, text in e.said if who != "world"]
        sampled = [id for id, m in zip(e.ids, e.mask) if m]
        assert sampled == [id for text in replies for id in chat.reply(text)]  # thoughts are trained on like all that was said
        assert e.logprob == -len(sampled) and e.cut == {"act": 0, "rate": 0}
    seen = sg.watch(episodes)
    assert seen.get("unrated_steps") == (3 if guided else None) and seen["cut_act"] == 0 and seen.get("cut_rate") == (0 if guided else None)
    logprobs, mask = sg.sampled_logprobs(*tiny, episodes, 1.0)
    assert torch.equal(logprobs != 0, mask == 1) and mask.sum() == sum(sum(e.mask) for e in episodes)


def test_each_part_has_a_limit_of_its_own_and_its_cuts_are_counted(tiny, speak):
    seen = speak(lambda row, turn, part: "check " * (30 if row == 0 else 2) if part == "act" else "is " * (60 if turn > 2 else 2))
    args = changed(max_new_tokens=25, rate_tokens=30)
    episodes = play(*tiny, [0, 1], args=args)
    assert {part: {row[-1] for row in seen.asked if row[2] == part} for part in ("act", "rate")} == {"act": {25}, "rate": {30}}
    assert [e.cut for e in episodes] == [{"act": 5, "rate": 2}, {"act": 0, "rate": 2}]
    found = sg.watch(episodes)
    assert found["cut_act"] == 5 / 10 and found["cut_rate"] == 4 / 8 and found["label_malformed"] == 1
    assert json.loads(json.dumps(sg.record(episodes[0])))["cut"] == {"act": 5, "rate": 2}
    for e in episodes:  # of 9 replies
        assert sum(m for id, m in zip(e.ids, e.mask) if id in tiny[1].eos) == 9 - sum(e.cut.values())  # a forced end has mask 0


@pytest.mark.parametrize("prefill", [False, True])
def test_a_frozen_rater_is_heard_and_not_trained(tiny, speak, prefill):
    model, chat = tiny
    rater = copy.deepcopy(model)
    seen = speak(lambda *name: hesitant(*name).removeprefix("Reason:") if prefill else hesitant(*name))
    [e] = play(model, chat, [0], args=dataclasses.replace(LONG, prefill=prefill), rater=rater)
    assert all(speaker is (rater if part == "rate" else model) for _, _, part, speaker, _ in seen.asked) and len(seen.asked) == 9
    [actors] = seen.dialogues  # which the rater reads
    assert actors.model is model
    assert e.ids == actors.ids[0][:len(e.ids)] and e.labels == [1, -1, None, 0]
    text = chat.tokenizer.decode(e.ids)
    assert all(hesitant(0, turn, "rate") in text for turn in range(1, 5))  # the actor has it in view
    spoken = [id for turn in range(5) for id in chat.reply(hesitant(0, turn, "act"))]
    assert [id for id, m in zip(e.ids, e.mask) if m] == spoken  # what was forced is not trained, either


@pytest.mark.parametrize("guided", [True, False])
def test_nothing_is_read_beyond_the_context(tiny, speak, guided):
    """Replies as long as they may be, with forced words before and a forced end behind each."""
    seen = speak(lambda row, turn, part: "is " * 30)
    model, chat = copy.deepcopy(tiny[0]), tiny[1]
    args, turns = changed(max_new_tokens=5, rate_tokens=6, prefill=True), set()
    for context in range(20, 180):
        model.max_context, seen.read = context, 0
        [e] = play(model, chat, [0], guided, args)
        turns.add(len(e.valid))
        assert seen.read <= context and e.truncated
    assert {0, 1, 2} <= turns


def test_the_same_rater_frozen_says_the_same(tiny):
    plain, frozen = play(*tiny, [0, 1, 2]), play(*tiny, [0, 1, 2], rater=copy.deepcopy(tiny[0]))
    assert any(e.labels for e in plain)
    for a, b in zip(plain, frozen):
        assert (a.ids, a.said, a.labels) == (b.ids, b.said, b.labels) and all(x >= y for x, y in zip(a.mask, b.mask))
        assert (sum(a.mask) > sum(b.mask)) == (a.logprob < b.logprob) == bool(a.labels)


def test_prompts_do_not_change_with_what_is_hidden(tiny, speak, monkeypatch):
    speak(lambda row, turn, part: "Reason: x\nLabel: neutral" if part == "rate" else "Action: check the power")  # the wrong test
    seed = next(seed for seed in range(99) if "is too loud" in WORLD.reset(seed=seed, options={"split": "train"})[0])
    for guided, shots in (True, 0), (False, 2):
        seen = set()
        for number in range(3):
            monkeypatch.setattr(envs.RepairShop, "resample", lambda self, rng, number=number: vars(self).update(
                finding=list(self.faults[self.symptom][1])[number]))
            [e] = play(*tiny, [seed], guided, changed(max_new_tokens=200, rate_tokens=200, shots=shots))
            seen.add((str(e.said), str(e.ids)))
        assert len(seen) == 1 and "Nothing unusual" in seen.pop()[0]


def test_a_system_prompt_states_the_game_and_then_the_form():
    WORLD.reset(seed=0)
    [guided, first], [plain, same] = (sg.opening(WORLD, ARGS, on) for on in (True, False))
    assert first == same == {"role": "user", "content": WORLD.observation}
    assert plain["content"] == f"{WORLD.system}\n{sg.POLICY}" and guided["content"] == f"{plain['content']}\n{sg.GUIDED}"


# ---------------------------------------------------------------------------------- error patterns, counts, returns by hand


def episode(said="", actions=(), **more):
    """An episode of observations (separated by /) and of actions."""
    worlds = [["world", text.strip()] for text in said.split("/")]
    return sg.Episode("train", 0, said=worlds, actions=list(actions), **{"valid": [True] * len(actions)} | more)


@pytest.mark.parametrize("found, given", [
    ([], episode("a 3 turns left/b 2 turns left/c 1 turn left", "xy")),
    (["looping"], episode("a 9 turns left/a 8 turns left/a 1 turn left/b", "xxx", valid=[False] * 3)),  # turns left do not count
    ([], episode("a/a/a/b", "xxy", valid=[False] * 3)),  # twice is none yet
    ([], episode("a/b/c/d", "xxx")),  # nor is one action on three observations
    ([], episode("a/a/a/a", "xyz", valid=[False] * 3)),  # nothing happened: that is no exploration
    (["redundant_exploration"], episode("s/a/b/a/b/a", "vwxyz")),  # a, b, a met again
    ([], episode("s/a/b/a/b/c", "vwxyz")),
    (["looping", "redundant_exploration"], episode("a/a/a/a/a", "xxxx")),
    (["wrong_object"], episode("a/b", "x", wrong=True)),
])
def test_error_patterns_by_hand(found, given):
    assert sg.errors(given) == found
    seen = sg.watch([given, dataclasses.replace(given, won=True)])  # counted among those that were lost
    assert [name for name in ("looping", "redundant_exploration", "wrong_object") if seen[f"lost_by_{name}"] == 1] == found


def test_a_wrong_object_is_what_the_world_says():
    world, rng, seen = envs.make("household"), random.Random(0), set()
    for seed in range(20):
        _, info = world.reset(seed=seed)
        while not world.over:
            e = said_to(world, sg.written(envs.random_player(world, info, rng)))
            info = world.info(True)
            assert e.wrong == world.wrong_object
            seen.add(e.wrong)
    assert seen == {True, False}


def test_counts_by_hand():
    won = episode("a/b/c", "xy", labels=[1], won=True, score=1.0, cut={"act": 1, "rate": 1})
    lost = episode("a/b/c/d/e", "wxyz", labels=[-1, None, 0], valid=[True, False, True, False], score=0.5, truncated=True)
    never = sg.Episode("train", 0, truncated=True)  # its first prompt was too long
    seen = sg.watch([won, lost, never, never])
    expected = dict(
        success=1 / 4, score=1.5 / 4, turns=6 / 4, invalid=2 / 6, truncated=3 / 4, cut_act=1 / 6, cut_rate=1 / 4, unrated_steps=2,
        label_positive=1 / 4, label_neutral=1 / 4, label_negative=1 / 4, label_malformed=1 / 4, ratings_if_won=1, ratings_if_lost=-1,
        label_outcome_correlation=1)  # fmt: skip
    assert {name: seen[name] for name in expected} == pytest.approx(expected)
    alone = sg.watch([won])
    assert alone["label_outcome_correlation"] is None
    assert math.isnan(alone["ratings_if_lost"]) and math.isnan(alone["lost_by_looping"])
    assert not any(name.startswith(("label", "ratings", "unrated", "cut_rate")) for name in sg.watch([never]))


def test_returns_by_hand():
    e = episode("a/b/c/d/e", "wxyz", labels=[1, None, 1, 1], valid=[True, False, True, False], score=0.5)
    args = sg.Args()
    assert sg.environment_return(args, e) == 0.5 and sg.rating_return(args, e) == pytest.approx(0.3)  # without a label: neutral
    assert [sg.total_return(args, e, weight) for weight in (0.0, 0.5, 1.0)] == pytest.approx([0.5, 0.65, 0.8])
    public = dataclasses.replace(args, reward_scale=10.0, invalid_penalty=0.1)
    assert sg.environment_return(public, e) == pytest.approx(4.8)
    assert sg.rating_return(dataclasses.replace(args, mean_rating=True), e) == pytest.approx(0.3 / 4)
    assert sg.rating_return(dataclasses.replace(args, mean_rating=True), episode("a/b", "x")) == 0
    assert sg.rating_return(dataclasses.replace(args, rating_reward=2.0), dataclasses.replace(e, labels=[-1, -1, 0])) == -4


def test_flat_groups_by_hand():
    """In a group whose R_env are equal the ratings alone make advantages, whatever their weight, unless that is switched off."""
    scores, labels = [0, 0, 0, 1, 0, 0], [[1], [-1], [0], [1], [1], [0]]
    episodes = [episode("a/b", "x", labels=label, score=float(score)) for score, label in zip(scores, labels)]
    args = dataclasses.replace(sg.Args(), group_size=3)

    def found(args, group, trust):
        sg.guided_advantages(args, group, trust)
        return [e.advantage for e in group]

    mended = dataclasses.replace(args, flat_groups=False)
    for trust in 1.0, 0.1:
        assert found(args, episodes[:3], trust) == pytest.approx([1, -1, 0], abs=1e-3)
        assert found(mended, episodes[:3], trust) == [0.0, 0.0, 0.0]
        returns = [score + trust * 0.1 * sum(label) for score, label in zip(scores, labels)]
        for some in args, mended:
            assert found(some, episodes[3:], trust) == sg.group_advantages(returns[3:])
    assert found(args, episodes[:3], 0.0) == [0.0] * 3
    only_scores = dataclasses.replace(mended, invalid_penalty=0.1)  # a penalty is a part of R_env
    assert any(found(only_scores, [dataclasses.replace(episodes[0], valid=[False]), *episodes[1:3]], 1.0))


# ------------------------------------------------------------------------------------------------------- trust schedule


def test_trust_at_its_corners():
    args, tiny = sg.Args(), 1e-9
    corners = [sg.trust_schedule(args, point + d) for point in args.trust_points for d in (-tiny, 0.0)]
    assert corners == pytest.approx([0, 0, 1, 1, 1, 1, 0, 0], abs=1e-6)
    assert corners[0] == corners[1] == corners[7] == 0 and corners[3] == corners[4] == 1  # exactly
    assert sg.trust_schedule(args, 0.0) == sg.trust_schedule(args, 0.99) == 0 and sg.trust_schedule(args, 0.6) == 1
    run = [sg.trust_schedule(args, step / 100) for step in range(100)]  # the paper's 100 steps
    by_hand = [0] * 40 + [k / 10 for k in range(10)] + [1] * 20 + [1 - k / 10 for k in range(10)] + [0] * 20
    assert run == pytest.approx(by_hand, abs=1e-9) and all(0 <= weight <= 1 for weight in run)


def test_trust_of_the_other_arms():
    def arm(name):
        return [sg.trust_schedule(dataclasses.replace(sg.Args(), trust=name), share / 100) for share in range(100)]

    assert arm("zero") == [0.0] * 100 and arm("immediate") == [1.0] * 100
    assert arm("no-anneal") == [*arm("schedule")[:70], *[1.0] * 30]
    edges = dataclasses.replace(sg.Args(), trust_points=[0.0, 0.25, 0.5, 1.0])
    assert [sg.trust_schedule(edges, share) for share in (0, 0.125, 0.25, 0.5, 0.75)] == pytest.approx([0, 0.5, 1, 1, 0.5])


# ----------------------------------------------------------------------------------------------------- advantages, loss


def test_group_advantages_by_hand():
    # 1, 2, 3: mean 2, sample deviation 1; 0, 0, 10: mean 10/3, deviation 10 / sqrt(3)
    assert sg.group_advantages([1, 2, 3]) == pytest.approx([-1, 0, 1], abs=1e-5)
    assert sg.group_advantages([0, 0, 10]) == pytest.approx([-1 / 3**0.5, -1 / 3**0.5, 2 / 3**0.5], abs=1e-5)
    assert sg.group_advantages([0.1] * 4) == [0.0] * 4  # exactly, whatever rounding does to the mean
    assert sg.without_spread([0.1, 0.1, 0.1, 1, 0, 0, 2, 2, 2], 3) == 2
    assert sg.group_advantages([5, 1]) == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=1e-5)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(2, 8), st.data())
def test_group_advantages_against_another_derivation(size, data):
    values = data.draw(st.lists(st.floats(-20, 20), min_size=3 * size, max_size=3 * size))
    for group in sg.groups(values, size):
        mine = sg.group_advantages(group)
        mean = math.fsum(group) / size
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in group) / (size - 1))
        assert mine == pytest.approx([(x - mean) / (std + 1e-6) if max(group) > min(group) else 0 for x in group], abs=1e-6)
        assert abs(sum(mine)) < 1e-6


def test_loss_by_hand():
    def t(*rows):
        return torch.tensor(rows, dtype=torch.float64)

    ratio, plus, minus = t([0.5, 0.9, 1.0, 1.25, 1.5]).log(), t([2.0]), t([-2.0])
    zero = torch.zeros_like(ratio)
    torch.testing.assert_close(sg.surrogate(ratio, zero, plus, 0.2, 0.2), -t([1.0, 1.8, 2.0, 2.4, 2.4]))
    torch.testing.assert_close(sg.surrogate(ratio, zero, minus, 0.2, 0.2), t([1.6, 1.8, 2.0, 2.5, 3.0]))
    torch.testing.assert_close(sg.surrogate(ratio, zero, plus, 0.2, 0.28), -t([1.0, 1.8, 2.0, 2.5, 2.56]))
    torch.testing.assert_close(sg.kl_estimate(t([0, 0, 0]), t([2.0, 1.0, 0.5]).log()), t([1 - math.log(2), 0, math.log(2) - 0.5]))
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])  # two, one and, of an episode never played, none
    torch.testing.assert_close(sg.token_weights(mask, 2), torch.tensor([[0, 0.25, 0.25, 0], [0.5, 0, 0, 0], [0, 0, 0, 0]]))
    torch.testing.assert_close(sg.token_weights(mask, 2, 3), mask / 3)
    torch.testing.assert_close(sg.token_weights(mask, 2, 30), mask / 30)  # of the whole batch, not of what is at hand


def learn(model, reference, chat, args, lr, episodes, advantages):
    """One update by plain gradient descent, as main calls it -> metrics."""
    for episode, advantage in zip(episodes, advantages):
        episode.advantage = advantage
    clip = (args.clip, args.clip_high if args.estimator == "dapo" else args.clip)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return sg.update(model, reference, chat, args, optimizer, episodes, clip, token_mean=args.estimator == "dapo")


def bigram_update(table, reference, episodes, advantages, args, lr):
    model = Bigram(table)
    metrics = learn(model, Bigram(reference), PAD, args, lr, episodes, advantages)
    return model.table.detach(), metrics


def tokens(ids, mask, logprob=0.0):
    return sg.Episode("train", 0, ids=ids, mask=mask, logprob=logprob)


def test_the_first_step_by_hand():
    zeros = [[0.0] * WORDS] * WORDS
    episodes = [tokens([1, 2, 3], [0, 1, 1], 2 * math.log(0.2)), tokens([1, 4, 4], [0, 0, 1], math.log(0.2))]

    def row(i):  # gradient of log p of word i
        return torch.eye(WORDS)[i] - 0.2

    for estimator, weights, loss in ("grpo", (0.25, 0.25, 0.5), 0.0), ("dapo", (1 / 3,) * 3, -1 / 3):
        after, metrics = bigram_update(zeros, zeros, episodes, [1.0, -1.0], changed(estimator=estimator, micro_batch_size=1), 1.0)
        by_hand = torch.zeros(WORDS, WORDS)  # lr * weight * A * gradient; ratio 1
        for last, word, weight in (1, 2, weights[0]), (2, 3, weights[1]), (4, 4, -weights[2]):
            by_hand[last] += weight * row(word)
        torch.testing.assert_close(after, by_hand)
        assert metrics["loss"] == pytest.approx(loss, abs=1e-6) and metrics["clipped"] == 0 and metrics["grad_norm"] == pytest.approx(
            by_hand.norm().item())  # fmt: skip
        assert metrics["entropy"] == pytest.approx(math.log(5)) and metrics["logprob_gap"] == pytest.approx(0, abs=1e-6)


def derived(table, reference, episodes, advantages, args, lr):
    """The same steps in float64, token by token, from the paper's formulas; the ratio is always to log-probs kept beforehand."""
    def logp(table, e):
        rows = torch.log_softmax(table[torch.tensor(e.ids[:-1])] / args.temperature, -1)
        return {t: rows[t - 1, e.ids[t]] for t in range(1, len(e.ids)) if e.mask[t]}

    table, reference = (torch.tensor(x, dtype=torch.float32).double() for x in (table, reference))
    old, ref = [[logp(x, e) for e in episodes] for x in (table, reference)]
    share, losses, norms, kls, outside = len(episodes) // args.updates, [], [], [], []
    high = 1 + (args.clip_high if args.estimator == "dapo" else args.clip)
    for u in range(args.updates):
        theta, terms = table.clone().requires_grad_(), []
        for i in range(u * share, (u + 1) * share):
            own = []
            for t, lp in logp(theta, episodes[i]).items():
                r, A, q = (lp - old[i][t]).exp(), advantages[i], ref[i][t] - lp
                objective = min(r * A, min(max(r, 1 - args.clip), high) * A, key=float)
                own.append(args.kl * (q.exp() - q - 1) - objective)
                kls.append(float(q.exp() - q - 1))
                outside.append(not 1 - args.clip <= float(r) <= high)
            terms.append(own)
        if args.estimator == "grpo":
            loss = sum(sum(own) / len(own) for own in terms) / share
        else:
            loss = sum(sum(own) for own in terms) / sum(map(len, terms))
        g, = torch.autograd.grad(loss, theta) if loss.requires_grad else (torch.zeros_like(theta),)
        norms.append(float(g.norm()))
        losses += [float(loss)] * sum(map(len, terms))  # metrics are per sampled token
        table = (theta - lr * g * min(1, 1 / (norms[-1] + 1e-6))).detach()

    def mean(x):
        return sum(x) / len(x)

    return table, dict(loss=mean(losses), clipped=mean(outside), grad_norm=max(norms)) | ({"kl": mean(kls)} if args.kl else {})


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.sampled_from(["grpo", "dapo"]), st.sampled_from([(0.2, 0.28), (0.02, 0.05), (0.1, 0.1)]),
       st.sampled_from([0.0, 0.3]), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3, 100]), st.sampled_from([1.0, 0.7]))  # fmt: skip
def test_loss_and_gradient_against_another_derivation(seed, estimator, clips, kl, updates, micro, temperature):
    rng = random.Random(seed)
    table, reference = random_table(rng), random_table(rng)
    episodes = [tokens(**e) for e in random_episodes(rng, 6)]
    advantages = [rng.choice([0.0, rng.gauss(0, 1)]) for _ in episodes]
    args = changed(estimator=estimator, clip=clips[0], clip_high=clips[1], kl=kl, updates=updates, micro_batch_size=micro,
                   temperature=temperature)  # fmt: skip
    after, metrics = bigram_update(table, reference, episodes, advantages, args, 2.0)
    expected, numbers = derived(table, reference, episodes, advantages, args, 2.0)
    torch.testing.assert_close(after.double(), expected, atol=2e-4, rtol=1e-4)
    for name, value in numbers.items():
        assert metrics[name] == pytest.approx(value, abs=2e-4), name
    assert ("kl" in metrics) == bool(kl)
    if updates == 1:
        assert metrics["clipped"] == 0


# ------------------------------------------------------------------------------------------------------- a tiny model


@pytest.fixture(scope="module")
def batch(tiny):
    return play(*tiny, [0] * 4 + [1] * 4)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(tiny, episodes, advantages, **settings):
    """(flat weights after one update by plain gradient descent, its metrics)"""
    model = copy.deepcopy(tiny[0])
    metrics = learn(model, tiny[0], tiny[1], changed(**settings), 1.0, episodes, advantages)
    return flat(model), metrics


ADVANTAGES = [1.0, -0.5, 0.25, -0.75, 0.3, 0.6, -1.2, 0.3]


@pytest.mark.parametrize("settings", [dict(kl=0.1), dict(estimator="dapo"), dict(updates=2, clip=0.01, kl=0.1)])
def test_the_step_does_not_depend_on_the_micro_batch(tiny, batch, settings):
    start = flat(tiny[0])
    (whole, metrics), *others = [trained(tiny, batch, ADVANTAGES, micro_batch_size=size, **settings) for size in (8, 1, 3)]
    assert (whole - start).norm() > 0.01
    for weights, numbers in others:
        assert (weights - whole).norm() < 1e-4 * (whole - start).norm()
        assert numbers == pytest.approx(metrics, rel=1e-3, abs=1e-6)


def test_before_the_first_update_the_ratio_is_one(tiny, batch):
    lengths = [sum(e.mask) for e in batch]
    _, metrics = trained(tiny, batch, ADVANTAGES)
    assert metrics["clipped"] == 0 and metrics["loss"] == pytest.approx(-sum(ADVANTAGES) / 8, abs=1e-5)
    _, metrics = trained(tiny, batch, ADVANTAGES, estimator="dapo", kl=0.5)
    assert metrics["loss"] == pytest.approx(-sum(a * n for a, n in zip(ADVANTAGES, lengths)) / sum(lengths), abs=1e-5)
    assert metrics["clipped"] == 0 and metrics["kl"] == pytest.approx(0, abs=1e-6) and abs(metrics["logprob_gap"]) < 1e-4


def test_one_gradient_step_is_that_of_kept_logprobs(tiny, batch, monkeypatch):
    """The old log-probs of the first step are those of its own forward, those of later ones are computed beforehand: of the same weights,
    it is the same gradient. And the first step makes no forward of its own for them."""
    gradients, forwards = [], []

    def keep(model, optimizer, loss, batch):
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.zero_grad()
        return 0.0

    monkeypatch.setattr(common, "gradient_step", keep)  # the weights stay
    old = sg.forward_logprobs
    monkeypatch.setattr(sg, "forward_logprobs", lambda *a: forwards.append(len(a[-1])) or old(*a))  # of how many steps
    for kl in 0.0, 0.1:
        trained(tiny, batch, ADVANTAGES, kl=kl, updates=2)
        kept = list(forwards)
        trained(tiny, batch[:4], ADVANTAGES[:4], kl=kl)
        trained(tiny, batch[4:], ADVANTAGES[4:], kl=kl)
        assert kept == [1, 2][:1 + bool(kl)] and forwards[len(kept):] == [0, 1][:1 + bool(kl)] * 2
        for several, one in zip(gradients[:2], gradients[2:]):
            assert (several - one).norm() < 1e-5 * one.norm() and one.norm() > 0.01
        gradients.clear(), forwards.clear()


def test_equal_rewards_teach_exactly_nothing(tiny, batch):
    for estimator in "grpo", "dapo":
        advantages = [*sg.group_advantages([0.3] * 4), *sg.group_advantages([10.0] * 4)]
        weights, metrics = trained(tiny, batch, advantages, estimator=estimator, updates=2)
        assert torch.equal(weights, flat(tiny[0])) and metrics["grad_norm"] == 0


def test_decoding_and_the_training_forward_agree(tiny, monkeypatch):
    kept = []
    init = common.Dialogues.__init__
    monkeypatch.setattr(common.Dialogues, "__init__", lambda self, *a: kept.append(self) or init(self, *a))

    def gap(row, i, length):
        return (row - torch.tensor(kept[-1].logprobs[i][1:length])).abs().max()

    for temperature in 1.0, 0.7:
        episodes = play(*tiny, [3] * 4, temperature=temperature)
        for i, episode in enumerate(episodes):
            [[row]] = sg.forward_logprobs(*tiny, changed(temperature=temperature), [[[episode]]])
            assert gap(row[0], i, len(episode.ids)) < 1e-4
            assert episode.logprob == pytest.approx(row.sum().item(), abs=1e-3)
    [[row]] = sg.forward_logprobs(*tiny, ARGS, [[episodes[:1]]])
    assert gap(row[0], 0, len(episodes[0].ids)) > 1e-4  # and the temperature matters


# --------------------------------------------------------------------------------------------------- what is trained on


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("settings", [dict(max_new_tokens=3, rate_tokens=5), dict(), dict(prefill=True, shots=2, show_actions=True)])
def test_the_mask_is_what_was_sampled(tiny, guided, settings):
    """Rebuilt from the texts: prompts, worked examples, observations, forced words and ends are under mask 0, replies and the ends that
    they wrote under 1."""
    (model, chat), args, cut = tiny, changed(**settings), Counter()
    for e in play(model, chat, range(6), guided, args):
        assert len(e.ids) == len(e.mask) and set(e.mask) <= {0, 1} and not e.truncated
        position = 0

        def take(mask, length, e=e):
            nonlocal position
            assert e.mask[position : position + length] == [mask] * length
            position += length
            return e.ids[position - length : position]

        world = envs.make(ENV, show_actions=args.show_actions)
        world.reset(seed=e.seed, options={"split": "train"})
        given, asked = chat.dialogue(sg.opening(world, args, guided)), False
        for who, text in e.said[1:-1]:
            if who == "world":
                observation, asked = text, False
                given = given + chat.turn(sg.to_rate(text) if guided else text)
                continue
            given = given + (chat.turn(sg.to_act(observation)) if asked else [])
            asked = who == "rate"
            limit, word = (args.rate_tokens, "Reason:") if asked else (args.max_new_tokens, "Action:")
            if args.prefill:
                given, text = given + chat.encode(word), text.removeprefix(word)
            assert take(0, len(given)) == given
            length = next((n for n in range(limit) if e.mask[position + n : position + n + 1] != [1]), limit)
            length = next((n + 1 for n in range(length) if e.ids[position + n] in chat.eos), length)  # what follows an end is not it
            reply = take(1, length)
            assert length >= 1 and chat.decode(reply) == text
            given = [] if reply[-1] in chat.eos else chat.eos[:1]  # a forced end token
            cut[who] += bool(given)
            assert given == [] or length == limit
        assert position == len(e.ids)  # nothing behind the last sampled token
        assert e.labels == [sg.parse_rating(text) for who, text in e.said if who == "rate"]
        assert len(e.labels) == guided * (len(e.valid) - 1) and len(e.valid) == len(e.actions)
    assert cut["act"] and (cut["rate"] or not guided) or args.max_new_tokens > 3


def test_other_positions_do_not_matter(tiny, batch):
    plain, metrics = trained(tiny, batch, ADVANTAGES, updates=2)
    for sampled in False, True:
        other, seen = copy.deepcopy(tiny[0]), {}

        def disturb(head, inputs, sampled=sampled, seen=seen):
            noise = torch.zeros_like(inputs[0])
            for row, out in zip(seen["ids"], noise):
                found = max((e for e in batch if row[: len(e.ids)] == e.ids), key=lambda e: len(e.ids))
                for t in range(len(row)):
                    here = t + 1 < len(found.ids) and found.mask[t + 1] == 1
                    if here == sampled:
                        out[t, t % out.shape[1]] = 7.0
            return (inputs[0] + noise,)

        other.register_forward_pre_hook(lambda _, args, given, seen=seen: seen.update(ids=given["input_ids"].tolist()), with_kwargs=True)
        other.get_output_embeddings().register_forward_pre_hook(disturb)
        weights, numbers = trained((other, tiny[1]), batch, ADVANTAGES, updates=2)
        assert torch.equal(weights, plain) == (not sampled) and (numbers == metrics) == (not sampled)


def test_episodes_do_not_depend_on_their_batch(tiny):
    seeds = [5, 5, 6, 6, 7, 7]

    def texts(episodes):
        return [(e.said, e.ids, e.mask) for e in episodes]

    for guided in True, False:
        whole = play(*tiny, seeds, guided)
        assert texts(whole) == texts(play(*tiny, seeds, guided)) == texts(play(*tiny, seeds, guided, changed(rollout_batch_size=4)))
        for count in 1, 3, 5:
            assert texts(play(*tiny, seeds[:count], guided)) == texts(whole[:count])
        assert whole[0].said != whole[1].said  # two episodes of one task
        assert whole[0].said[0] == whole[1].said[0] != whole[2].said[0]
        assert texts(play(*tiny, seeds, guided, stream=("other",))) != texts(whole)


@pytest.mark.parametrize("guided, prefill", [(True, False), (False, False), (True, True)])
def test_a_full_context_ends_the_episode(tiny, monkeypatch, guided, prefill):
    kept, init, args = [], common.Dialogues.__init__, changed(prefill=prefill)
    monkeypatch.setattr(common.Dialogues, "__init__", lambda self, *a: kept.append(self) or init(self, *a))
    model, chat = copy.deepcopy(tiny[0]), tiny[1]
    full = play(model, chat, range(12), guided, args)
    longest = max(len(e.ids) for e in full)
    for less in 0, 7, 14, 28, 56:
        model.max_context = longest - less
        ended = play(model, chat, range(12), guided, args)
        for row, (one, other) in enumerate(zip(ended, full)):
            said = len(one.said)
            assert one.said == other.said[:said] and one.ids == other.ids[: len(one.ids)] and (one.truncated or said == len(other.said))
            assert one.truncated or len(kept[-1].ids[row]) <= model.max_context + 1  # whatever is forced; an end is not read again
            assert len(one.ids) <= model.max_context
    assert any(e.truncated for e in ended) and sg.watch(ended)["truncated"] == sum(e.truncated for e in ended) / 12
    model.max_context = 9  # not even a first prompt
    none = play(model, chat, range(8), guided, args)
    assert all(e.truncated and not e.valid and not any(e.mask) for e in none)
    weights, metrics = trained((model, chat), none, ADVANTAGES, updates=2, kl=0.1)
    assert torch.equal(weights, flat(model)) and metrics["loss"] == 0 and sg.watch(none)["turns"] == 0
    trained((model, chat), [*full[:4], *none[:4]], ADVANTAGES, micro_batch_size=3)


# -------------------------------------------------------------------------------------------------------- groups of a step


def planned(monkeypatch, plan):
    """sg.rollout that plays nothing: `plan` says, attempt by attempt, whose groups have spread -> its calls."""
    calls = []

    def rollout(model, chat, args, split, seeds, **how):
        spread = plan[len(calls)]
        calls.append((split, list(seeds), how))
        assert len(seeds) == args.group_size * len(spread)
        scores = [float(won and i == 0) for won in spread for i in range(args.group_size)]
        return [sg.Episode(split, seed, score=score) for seed, score in zip(seeds, scores)]

    monkeypatch.setattr(sg, "rollout", rollout)
    return calls


def test_dapo_replaces_groups_without_spread(monkeypatch):
    calls = planned(monkeypatch, [[0, 1, 0, 0], [1, 0, 0], [0, 0]])  # the last attempt is taken as it is
    args = changed(seed=3, estimator="dapo", batch_size=16, group_size=4, resample=2, temperature=0.9)
    batch, played = sg.sample_groups("model", "chat", args, 7, 40, 0.5, guided=True, rater="rater")
    scores = [e.score for e in batch[::4]]
    assert sorted(scores) == [0, 0, 1, 1] and scores != [1, 1, 0, 0]  # the flat ones are not all in the last of --updates
    assert len(batch) == 16 and len(played) == 36 and all(len({e.seed for e in group}) == 1 for group in sg.groups(batch, 4))
    assert [how for *_, how in calls] == [
        dict(temperature=0.9, stream=("train", 7, attempt), guided=True, rater="rater") for attempt in range(3)]
    assert {split for split, *_ in calls} == {"train"}
    tried = [seed - 3 * 1_000_000_007 for _, seeds, _ in calls for seed in seeds]
    assert tried == [40 + i // 4 for i in range(36)]  # every replacement is another task
    assert sorted(e.seed for e in batch) == [e.seed for e in played if e.seed - 3 * 1_000_000_007 in (41, 44, 47, 48)]


def test_dapo_stops_when_the_batch_is_full_and_grpo_takes_what_it_gets(monkeypatch):
    args = changed(estimator="dapo", batch_size=8, group_size=4, resample=5)
    calls = planned(monkeypatch, [[1, 0], [1]])
    batch, played = sg.sample_groups(None, None, args, 1, 0, 0.0, guided=False)
    assert len(batch) == 8 and len(played) == 12 and len(calls) == 2
    for other in dataclasses.replace(args, estimator="grpo"), dataclasses.replace(args, resample=0):
        calls = planned(monkeypatch, [[0, 0]])
        batch, played = sg.sample_groups(None, None, other, 1, 0, 0.0, guided=False)
        assert batch == played and len(batch) == 8 and len(calls) == 1


def test_ratings_make_spread_when_they_earn(monkeypatch):
    args = changed(estimator="dapo", batch_size=2, group_size=2, resample=1)
    for weight, count in (0.0, 2), (1.0, 1):
        calls = planned(monkeypatch, [[0], [0]])

        def rated(*a, rollout=sg.rollout, **how):
            return [dataclasses.replace(e, labels=[i]) for i, e in enumerate(rollout(*a, **how))]

        monkeypatch.setattr(sg, "rollout", rated)
        sg.sample_groups(None, None, args, 1, 0, weight, guided=True)
        assert len(calls) == count


# -------------------------------------------------------------------------------------------------------------- warm-up


class Shelf(envs.World):
    """Three of six things are there; anything else does nothing. Every episode has a name of its own."""

    name, max_turns, task = "shelf", 4, "Take the right thing."
    system = "There is a shelf."
    things = "lamp box cup book vase coin".split()

    def __init__(self):
        self.splits_seen, self.won_in = set(), {}

    def reset(self, *, seed=None, options=None):
        self.splits_seen.add((options or {}).get("split", "train"))
        return super().reset(seed=seed, options=options)

    def begin(self, rng, split):
        self.label, self.rng = f"Shelf {rng.randrange(10**12)}.", rng
        self.here, self.right = rng.sample(self.things, 3), rng.choice(self.things)
        return f"{self.label} {self.listing()}"

    def listing(self):
        return f"Here: {', '.join(sorted(self.here))}."

    def admissible(self):
        return [f"take {thing}" for thing in self.here]

    def act(self, text):
        thing = text.removeprefix("take ")
        if thing not in self.here:
            return f"Nothing happens. {self.listing()}", False
        self.won = thing == self.right
        self.here = self.rng.sample(self.things, 3)
        return f"That was a {thing}. {self.listing()}", True

    def step(self, action):
        out = super().step(action)
        if self.over:
            self.won_in[self.label] = self.won
        return out

    def expert(self):
        raise AssertionError("the warm-up asked an expert")


@pytest.fixture(scope="module")
def taught():
    world = Shelf()
    examples = sg.warmup(world, changed(examples=3000))
    return world, examples


def test_warm_up_sees_train_alone_and_no_expert(taught, monkeypatch):
    world, examples = taught
    assert world.splits_seen == {"train"} and 0.02 < sum(world.won_in.values()) / 3000 < 0.98
    small = changed(examples=20)
    assert sg.warmup(Shelf(), small) == sg.warmup(Shelf(), small)  # the cache is named after it
    for name in "repair", "20q":
        real = envs.make(name)
        monkeypatch.setattr(type(real), "expert", Shelf.expert)
        reset, splits = real.reset, set()
        monkeypatch.setattr(real, "reset", lambda s=splits, r=reset, **k: s.add(k["options"]["split"]) or r(**k))
        assert sg.warmup(real, changed(env=name, examples=50)) and splits == {"train"}


def test_warm_up_shows_nothing_of_the_test_split():
    test = {envs.make("repair").reset(seed=seed, options={"split": "test"})[0].split(" that ")[0] for seed in range(2000)}
    text = str(sg.warmup(envs.make("repair"), changed(examples=600)))
    openings = set(re.findall(r"\w+ brings a \w+ \w+", text))
    assert len(openings) > 100 and len(test) > 80 and not openings & test


def test_warm_up_ratings_are_negative_where_nothing_happened_and_else_know_nothing(taught):
    world, examples = taught
    by_outcome, after, count, ends = defaultdict(list), Counter(), 0, Counter()
    for dialogue in examples:
        guided = sg.GUIDED in dialogue[0]["content"]
        said = [m["content"] for m in dialogue]
        assert [m["role"] for m in dialogue] == ["system", *["user", "assistant"] * (len(dialogue) // 2)]
        name = re.match(r"Shelf \d+\.", said[1])[0]
        last = said[-2].removesuffix(f"\n{sg.READ}")  # reading is practised at the end
        assert last != said[-2] and said[-1] == f"{world.task}\n{sg.event(last)}" and sg.RATE not in last
        ends[guided, "turn left" in last or "turns left" in last] += 1
        body, each = said[2:-2], 4 if guided else 2
        for n in range(0, len(body), each):
            assert body[n].startswith("Action: take ")
            if not guided:
                assert n + 1 == len(body) or sg.RATE not in body[n + 1]
                continue
            if n + 1 == len(body):
                break
            observation, rating = body[n + 1].removesuffix(f"\n{sg.RATE}"), body[n + 2]
            assert body[n + 1] == sg.to_rate(observation) and body[n + 3] == sg.ACT  # the first turn is not rated
            label = sg.parse_rating(rating)
            assert rating == f"Reason: {' '.join(sg.event(observation).split()[-3:])}\nLabel: {sg.LABELS[label + 1]}"
            nothing = observation.startswith("Nothing happens.")
            after["nothing" if nothing else "something", label] += 1
            if not nothing:
                by_outcome[label, world.won_in[name]].append(rating)
            if n + 4 < len(body):  # the action that answers a rating
                possible = [f"take {thing}" for thing in re.search(r"Here: (.+?)\.", observation)[1].split(", ")]
                action = world.read(body[n + 4])
                assert label != -1 or action in possible
                count += label != -1 and action not in possible
    assert count > 5 and min(ends[key] for key in [(True, True), (False, True), (True, False), (False, False)]) > 50
    assert after["nothing", 0] == after["nothing", 1] == 0 and after["nothing", -1] > 8
    total = sum(after["something", label] for label in (-1, 0, 1))
    for label in -1, 0, 1:
        assert abs(after["something", label] / total - 1 / 3) < 4 * math.sqrt(2 / 9 / total)
        won, lost = ([row == label for row in (-1, 0, 1) for _ in by_outcome[row, end]] for end in (True, False))
        assert helpers.rates_differ(won, lost) < 4


def test_warm_up_in_worlds_with_and_without_a_list(monkeypatch):
    for env in "household", "search":
        args = changed(env=env, examples=12, show_actions=True)
        said = [m["content"] for dialogue in sg.warmup(envs.make(env, show_actions=True), args) for m in dialogue]
        assert any(envs.LISTING in text for text in said) and not any(envs.LISTING in text for text in said if text.endswith(sg.RATE))
    monkeypatch.setattr(Shelf, "admissible", lambda self: None)
    assert len(sg.warmup(Shelf(), changed(examples=4))) == 4


class Walk(envs.World):
    """Two steps to the left or to the right, within three turns; which of them wins is hidden."""

    name, max_turns, task, system = "walk", 3, "Get there.", "You are on a road."

    def begin(self, rng, split):
        self.place, self.goal = 0, rng.choice([-2, 2])
        return "Here."

    def admissible(self):
        return ["left", "right"]

    def act(self, text):
        self.place += {"left": -1, "right": 1}.get(text, 0)
        self.won = self.place == self.goal
        return f"{self.place}.", text in self.admissible()

    def snapshot(self):
        return self.place, self.goal

    def restore(self, snapshot):
        (self.place, self.goal), self.won = snapshot, False

    def possibilities(self):
        return [(self.place, goal) for goal in (-2, 2)]


def test_prospects_by_hand():
    world = Walk()
    world.reset(seed=0)
    prospects = sg.Prospects(world)
    # to win from a place, goal 2, within turns: 1 from 1 in one; 1, 1 from 0 or 1 and back and 1 ...
    by_hand = {(1, 0): 0, (1, 1): 1 / 2, (1, 2): 1 / 2, (1, 3): 5 / 8, (0, 1): 0, (0, 2): 1 / 4, (0, 3): 1 / 4, (-1, 3): 1 / 8}
    for (place, turns), chance in by_hand.items():
        assert prospects.chance((place, 2), turns) == prospects.chance((-place, -2), turns) == chance
    for seed in range(4):  # either goal
        world.reset(seed=seed)
        labels = []
        for action in "right", "left":
            prospects.before(world)
            assert world.step(action)[-1]["valid"]
            labels.append(prospects.label(world, True))
        # turns apart: from (1/4 + 1/4) / 2 to (1/2 + 0) / 2, from (1/2 + 0) / 2 to 0: the goal decides nothing
        assert labels == ["neutral", "negative"]
        assert prospects.label(world, False) == "negative"
        assert prospects.advised(world, "negative", world.admissible()) == ["right"]  # undoes it
        assert prospects.advised(world, "positive", world.admissible()) == ["left"]
        assert prospects.advised(world, "neutral", world.admissible()) == []


def test_warm_up_with_a_dose_sees_train_alone_and_no_expert(monkeypatch):
    world = envs.make("household")
    monkeypatch.setattr(type(world), "expert", Shelf.expert)
    reset, splits = world.reset, set()
    monkeypatch.setattr(world, "reset", lambda **k: splits.add(k["options"]["split"]) or reset(**k))
    args = changed(env="household", dose=1.0, examples=40)
    examples = sg.warmup(world, args)
    assert splits == {"train"} and len(examples) > 40
    labels, undone = Counter(), 0
    for example in examples:
        if isinstance(example, tuple):  # a hint that was taken
            messages, reply = example
            assert messages[-1]["content"] == sg.ACT and reply.startswith("Action: ")
            labels[sg.parse_rating(messages[-2]["content"])] += 1
            if labels_before := "Reason: better " in messages[-2]["content"]:  # what would undo the step
                assert reply == sg.written(messages[-2]["content"].removeprefix("Reason: better ").partition("\n")[0])
            undone += labels_before
    assert set(labels) == {-1, 1} and undone > 5


# --------------------------------------------------------------------------------------------------------- the defaults

PAPER = {  # shared/papers/self_guide.md
    "steps": 100, "lr": 1e-6, "max_new_tokens": 1024, "temperature": 1.0, "eval_temperature": 0.4, "group_size": 8, "estimator": "grpo",
    "clip": 0.2, "clip_high": 0.28, "kl": 0.01, "guide": "on", "rate_tokens": 1024, "trust": "schedule",
    "trust_points": [0.4, 0.5, 0.7, 0.8], "rating_reward": 0.1, "reward_scale": 1.0, "flat_groups": True}  # fmt: skip
PUBLIC_SCRIPT = {"batch_size": 16 * 8}  # verl-agent's
OPEN = {"updates", "resample", "invalid_penalty", "mean_rating", "frozen_rater", "dose"}


def test_the_defaults_are_the_papers():
    args, told = sg.Args(), {field.name: field.metadata["help"] for field in dataclasses.fields(sg.Args)}
    assert {name for name, text in told.items() if "(paper" in text} == set(PAPER)
    assert {name for name, text in told.items() if "(public script" in text} == set(PUBLIC_SCRIPT)
    assert {name for name, text in told.items() if "not in the paper" in text} == OPEN
    stated = PAPER | PUBLIC_SCRIPT | {"invalid_penalty": 0.0, "mean_rating": False, "frozen_rater": False, "dose": 0.0,
                                      "updates": 1, "shots": 0,
                                      "prefill": False, "show_actions": False, "thinking": False, "micro_batch_size": 1,
                                      "rollout_batch_size": 64}  # fmt: skip
    assert {name: getattr(args, name) for name in stated} == stated
    assert set(sg.TINY) < set(told) and sg.TINY["device"] == "cpu" and sg.TINY["rollout_batch_size"] == 256
    for argv in [], ["--model", "tiny"], ["--model", "tiny:32x1"]:
        tiny = common.parse_args(sg.Args, sg.TINY, argv)
        assert tiny == dataclasses.replace(args, **sg.TINY, model=(argv or [0, "tiny"])[1])
    given = common.parse_args(sg.Args, sg.TINY, ["--model", "smollm2", "--lr", "1"])
    assert given == dataclasses.replace(args, model="smollm2", lr=1.0)
    assert common.parse_args(sg.Args, sg.TINY, ["--lr", "1"]).lr == 1  # what is given wins
    before = dict(steps=100, lr=5e-4, batch_size=128, group_size=8, updates=4, kl=0.03, reward_scale=10.0, eval_episodes=500)
    assert {name: getattr(tiny, name) for name in before} == before  # as in the first design


def test_quick_is_small_for_any_model():
    for model in "tiny", "smollm2":
        args = dataclasses.replace(common.parse_args(sg.Args, sg.TINY, ["--model", model]), **sg.QUICK)
        sg.check_args(args)
        assert max(args.eval_episodes, args.batch_size) <= 16 and args.steps <= 4


def test_the_commands_of_the_docstring_are_accepted():
    commands = sg.__doc__.replace("\\\n", " ").split("    python self_guide.py")[1:]
    assert len(commands) >= 3
    for command in commands:
        sg.check_args(common.parse_args(sg.Args, sg.TINY, shlex.split(command.split("\n")[0], comments=True)))


# ---------------------------------------------------------------------------------------------------- whole runs: set-up


@pytest.fixture(scope="module")
def environment(environment, tiny):
    return environment  # with the tiny model in the cache already


@pytest.fixture
def main_here(monkeypatch, run_here):
    """self_guide.main() in this process, so that its functions can be watched -> what `evaluate`, `rollout`, `update` were given."""
    seen = SimpleNamespace(guided=[], rollouts=[], updates=[])
    evaluate, rollout, update = sg.evaluate, sg.rollout, sg.update

    def evaluating(model, chat, args, splits, count, guided, *rest):
        seen.guided.append(guided)
        return evaluate(model, chat, args, splits, count, guided, *rest)

    def rolling(model, chat, args, split, seeds, **how):
        seen.rollouts.append((split, list(seeds), how))
        return rollout(model, chat, args, split, seeds, **how)

    def updating(model, reference, chat, args, optimizer, episodes, clip, token_mean):
        seen.updates.append((episodes, [e.advantage for e in episodes], clip, token_mean))
        return update(model, reference, chat, args, optimizer, episodes, clip, token_mean)

    for name, function in ("evaluate", evaluating), ("rollout", rolling), ("update", updating):
        monkeypatch.setattr(sg, name, function)

    def run(flags):
        run_here(flags)
        return seen

    return run


# ------------------------------------------------------------------------------------------------ whole runs: as a user


def test_metrics_follow_from_the_rollouts(whole, tiny):
    metrics, rollouts = lines(whole / "metrics.jsonl"), trained_on(whole)
    assert [row["trust"] for row in metrics] == pytest.approx([0, 0, 1, 0.5])  # shares 0, 0.25, 0.5, 0.75 of four steps
    seeds = []
    for row in metrics:
        episodes = [e for e in rollouts if e["step"] == row["step"]]
        seeds += [e["seed"] for e in episodes]
        assert all(len({e["seed"] for e in episodes[g : g + 4]}) == 1 for g in (0, 4))  # a group is one task
        env = [10 * e["score"] for e in episodes]
        guide = [0.1 * sum(label or 0 for label in e["labels"]) for e in episodes]
        labels = [label for e in episodes for label in e["labels"]]
        assert row["success"] == sum(e["won"] for e in episodes) / 8 and row["reward_env"] == pytest.approx(sum(env) / 8)
        assert row["reward_guide"] == pytest.approx(sum(guide) / 8)
        assert row["return"] == pytest.approx(row["reward_env"] + row["trust"] * row["reward_guide"])
        assert row["label_malformed"] == labels.count(None) / len(labels) and row["unrated_steps"] == 8
        assert sum(row[f"label_{name}"] for name in (*sg.LABELS, "malformed")) == pytest.approx(1)
        assert row["cut_act"] == sum(e["cut"]["act"] for e in episodes) / sum(len(e["valid"]) for e in episodes)
        assert row["cut_rate"] == sum(e["cut"]["rate"] for e in episodes) / len(labels)
        assert row["groups_flat_env"] == sg.without_spread(env, 4)
        assert row["groups_flat"] == sg.without_spread([a + row["trust"] * b for a, b in zip(env, guide)], 4)
        assert abs(row["logprob_gap"]) < 1e-4 and row["entropy"] > 0 and row["groups_replaced"] == 0
        assert {"ratings_if_won", "ratings_if_lost", "label_outcome_correlation", "lost_by_looping", "invalid", "turns", "kl"} <= set(row)
    assert len(set(seeds)) == 8  # no task twice
    assert any(label is not None for e in rollouts for label in e["labels"])  # or this file tests no ratings at all
    assert "eval_success" in metrics[1] and "eval_success" not in metrics[0] and "eval_success" not in metrics[3]
    trained, _ = common.load(str(whole / "model"))
    assert all(not torch.equal(a, b) for a, b in zip(trained.parameters(), tiny[0].parameters()))  # every parameter moved
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["arm"] == "schedule" and summary["train_episodes"] == len(rollouts) == 4 * 8 and summary["gradient_steps"] == 4
    assert summary["env_steps"] == sum(len(row["valid"]) for row in rollouts) and {row["split"] for row in rollouts} == {"train"}


def test_a_schedule_is_of_all_steps(run_script, whole, tmp_path):
    refused(run_script(f"{SMALL} --steps 5 --out-dir {whole} --resume", tmp_path), "steps was 4 and is 5")


# ----------------------------------------------------------------------------------------------------------------- arms


@pytest.mark.parametrize("flags, guided, arm", [
    ("", True, "schedule"), ("--trust zero", True, "zero"), ("--trust immediate", True, "immediate"),
    ("--trust no-anneal --estimator dapo --resample 0", True, "no-anneal-dapo"), ("--guide off", False, "grpo"),
    ("--guide off --estimator dapo --resample 0", False, "dapo"),
    ("--trust immediate --mean-rating --flat-groups False --reward-scale 1 --invalid-penalty 0.05", True,
     "immediate-mean-rating-flat-groups"),
])  # fmt: skip
def test_arms_differ_in_guidance_and_trust(main_here, tmp_path, flags, guided, arm):
    seen = main_here(f"{SMALL} --steps 2 --trust-points 0 0.2 0.4 0.5 --out-dir run {flags}")
    assert len(seen.guided) == 2 and set(seen.guided) == {guided}  # guided arms are evaluated with guidance
    assert {how["guided"] for *_, how in seen.rollouts} == {guided} and {how["rater"] for *_, how in seen.rollouts} == {None}
    assert {split for split, _, how in seen.rollouts if how["stream"][0] == "train"} == {"train"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["arm"] == arm
    (episodes, advantages, clip, token_mean), row = seen.updates[-1], lines(tmp_path / "run" / "metrics.jsonl")[-1]
    weight = int(arm.startswith(("immediate", "no-anneal")))
    assert row["trust"] == weight and (clip, token_mean) == (((0.2, 0.28), True) if "dapo" in flags else ((0.2, 0.2), False))
    returns = [10 * e.score + weight * 0.1 * sum(label or 0 for label in e.labels) for e in episodes]
    if "mean-rating" in flags:
        environment = [e.score - 0.05 * e.valid.count(False) for e in episodes]
        returns = [r + 0.1 * sum(label or 0 for label in e.labels) / max(1, len(e.labels)) for r, e in zip(environment, episodes)]
    expected = [a for group in sg.groups(returns, 4) for a in sg.group_advantages(group)]
    if "flat-groups" in flags:
        expected = [a if len(set(environment[i // 4 * 4 : i // 4 * 4 + 4])) > 1 else 0 for i, a in enumerate(expected)]
    assert advantages == pytest.approx(expected)
    assert all(bool(e.labels) == (guided and len(e.valid) > 1) for e in episodes)


@pytest.mark.parametrize("guide, compared", [("on", [True]), ("off", [False]), ("inference", [False, True])])
def test_evaluating_alone_shows_what_the_arm_compares(main_here, tmp_path, capsys, guide, compared):
    flags = "--eval-only --max-new-tokens 1 --rate-tokens 1"
    assert main_here(f"{SMALL} --guide {guide} {flags}").guided == compared and not list(tmp_path.glob("run*"))
    told = capsys.readouterr()
    names = [line for line in told.out.splitlines() if line.endswith(" ratings:")]
    assert names == [("with" if on else "without") + " ratings:" for on in compared]
    assert ("--rate-tokens" in told.err) == (True in compared) and told.err.count("--max-new-tokens") == 1  # cut, told once


def test_a_frozen_rater_stays_the_start_policy(main_here, monkeypatch, tiny, tmp_path):
    start, spoken = common.fingerprint(tiny[0]), []
    reply = common.Dialogues.reply
    monkeypatch.setattr(common.Dialogues, "reply", lambda self, *a, **k: spoken.append(
        (k["max_new_tokens"], common.fingerprint(self.model))) or reply(self, *a, **k))
    main_here(f"{SMALL} --steps 2 --lr 1e-2 --trust immediate --frozen-rater --kl 0 --rate-tokens 19 --out-dir run")
    assert {weights for limit, weights in spoken if limit == 19} == {start}  # in evaluation, too
    actors = list(dict.fromkeys(weights for limit, weights in spoken if limit == 20))
    assert len(actors) == 3 and actors[0] == start
    rows = lines(tmp_path / "run" / "rollouts.jsonl")
    assert any(row["labels"] for row in rows)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["args"]["frozen_rater"] is True


def test_guidance_at_inference_trains_nothing(main_here, tiny, tmp_path):
    seen = main_here(f"{SMALL} --guide inference --out-dir run")
    assert seen.guided == [False, True] and not seen.updates and all(how["stream"][0] == "evaluate" for *_, how in seen.rollouts)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["arm"] == "inference" and summary["gradient_steps"] == summary["generated_tokens"] == summary["train_episodes"] == 0
    assert set(summary) >= set(SUMMARY)
    assert common.fingerprint(common.load(str(tmp_path / "run" / "model"))[0]) == common.fingerprint(tiny[0])


def test_dapo_keeps_full_batches_by_itself(run_script, tmp_path):
    flags = f"{SMALL} --estimator dapo --trust immediate --steps 2 --save-every 1 --updates 2"
    result = run_script(f"{flags} --out-dir run", tmp_path)
    assert result.status == 0, result.stderr
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [sum(e["step"] == row["step"] for e in trained_on(tmp_path / "run")) for row in rows] == [
        8 + 4 * row["groups_replaced"] for row in rows]
    assert rows[0]["groups_replaced"] and len({e["seed"] for e in trained_on(tmp_path / "run")}) == rows[-1]["episodes"] / 4
    assert rows[-1]["episodes"] == 16 + 4 * sum(row["groups_replaced"] for row in rows) and rows[-1]["gradient_steps"] == 4
    assert run_script(f"{flags} --out-dir killed", tmp_path, LOG.format(step=2, name="SIGKILL")).status == -signal.SIGKILL
    assert run_script(f"{flags} --out-dir killed --resume", tmp_path).status == 0
    same_run(tmp_path / "run", tmp_path / "killed")


# ------------------------------------------------------------------------------------- whole runs: a model from elsewhere

save_llama = functools.partial(helpers.save_llama, text=[WORLD.system, sg.POLICY, sg.GUIDED])


@pytest.mark.parametrize("env", ["household", "search"])
def test_what_helps_a_small_chat_model(run_script, llama, tmp_path, env):
    flags = SMALL.replace("--model tiny", f"--model {llama} --device cpu").replace(f"--env {ENV}", f"--env {env}")
    flags += " --steps 1 --batch-size 4 --micro-batch-size 2 --eval-episodes 1 --max-new-tokens 8 --rate-tokens 8"
    result = run_script(f"{flags} --shots 2 --prefill --show-actions --frozen-rater --max-context 4000 --out-dir run", tmp_path)
    assert result.status == 0, result.stderr
    said = [(who, text) for row in lines(tmp_path / "run" / "rollouts.jsonl") for who, text in row["said"]]
    assert all(text.startswith({"act": "Action:", "rate": "Reason:"}[who]) for who, text in said if who != "world")
    assert any(envs.LISTING in text for who, text in said if who == "world")


def test_a_context_that_fills_up_ends_episodes(run_script, llama, tmp_path):
    chat = common.load(str(llama))[1]
    WORLD.reset(seed=0)
    room = len(chat.dialogue(sg.opening(WORLD, ARGS, True))) + 100
    flags = SMALL.replace("--model tiny", f"--model {llama} --device cpu") + " --steps 1 --max-new-tokens 8 --rate-tokens 8"
    result = run_script(f"{flags} --max-context {room} --out-dir run", tmp_path)
    assert result.status == 0, result.stderr
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["truncated"] == 1


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def bad_models(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    chat = common.load(str(llama))[1]
    WORLD.reset(seed=0)
    guided, plain = (len(chat.dialogue(sg.opening(WORLD, ARGS, on))) for on in (True, False))
    save_llama(path / "between", context=(guided + plain) // 2 + 40)  # room for the plain prompt only
    return path


BETWEEN = "--model {bad}/between --max-new-tokens 8 --rate-tokens 8"


@pytest.mark.parametrize("flags, words", [
    ("--model {bad}/between --guide off --max-context 100", "context"), (BETWEEN, "context"),
    (f"{BETWEEN} --guide inference", "context"),  # its second evaluation is guided
    (f"{BETWEEN} --guide inference --eval-only", "context"), (f"{BETWEEN} --guide off --shots 9", "context"),
    ("--rate-tokens 0", "--rate-tokens"), ("--group-size 0", "--group-size"), ("--group-size 1", "--group-size"),
    ("--group-size -4", "--group-size"), ("--batch-size 16 --group-size 3", "--batch-size"), ("--updates 0", "--updates"),
    ("--updates 3", "--batch-size"),
    ("--updates 32", "--batch-size"), ("--estimator ppo", "--estimator"), ("--clip -0.1", "--clip"), ("--clip nan", "--clip"),
    ("--clip-high -1", "--clip-high"), ("--clip-high inf", "--clip-high"), ("--kl -1", "--kl"), ("--kl nan", "--kl"),
    ("--resample -1", "--resample"), ("--guide maybe", "--guide"), ("--trust blind", "--trust"),
    ("--trust-points 0.4 0.5 0.7", "--trust-points"), ("--trust-points 0.4 0.5 0.7 0.8 0.9", "--trust-points"),
    ("--trust-points 0.5 0.4 0.7 0.8", "--trust-points"), ("--trust-points 0.4 0.4 0.7 0.8", "--trust-points"),
    ("--trust-points 0.4 0.5 0.7 1.2", "--trust-points"), ("--trust-points -0.1 0.5 0.7 0.8", "--trust-points"),
    ("--trust-points 0.4 nan 0.7 0.8", "--trust-points"), ("--trust-points a b c d", "--trust-points"),
    ("--trust-points", "--trust-points"), ("--guide off --trust zero", "--guide on"), ("--guide off --frozen-rater", "--guide on"),
    ("--guide off --mean-rating", "--mean-rating"), ("--guide off --flat-groups False", "--flat-groups"),
    ("--guide inference --frozen-rater", "--guide on"), ("--frozen-rater --eval-only", "--frozen-rater"),
    ("--prefill --thinking", "--prefill"), ("--rating-reward nan", "--rating-reward"),
    ("--rating-reward inf", "--rating-reward"), ("--reward-scale 0", "--reward-scale"), ("--reward-scale -1", "--reward-scale"),
    ("--reward-scale inf", "--reward-scale"), ("--invalid-penalty -1", "--invalid-penalty"), ("--invalid-penalty nan", "--invalid-penalty"),
    ("--dose 1.1", "--dose"), ("--dose nan", "--dose"), ("--dose 0.5", "--dose"),
])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(run_script, bad_models, home, tmp_path, flags, words):
    before = everything_under(bad_models), everything_under(home)
    accepted = "common.Run.start = self_guide.evaluate = lambda *a, **k: os._exit(77)"  # or a full run would follow
    refused(run_script(f"--env {ENV} --device cpu {flags.format(bad=bad_models)}", tmp_path, accepted), words)
    assert not list(tmp_path.iterdir()) and (everything_under(bad_models), everything_under(home)) == before
