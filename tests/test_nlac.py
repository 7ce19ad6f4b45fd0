"""nlac.py: flags, parsers, targets, refinement, loss, shots, what may leak, whole runs, bad input, kills and resume."""

import copy
import dataclasses
import functools
import itertools
import json
import math
import random
import re
import shutil
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import CHECKPOINT, LOG, PAD, SUMMARY, Bigram, everything_under, lines, refused, same_run
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

import common
import envs
import nlac

torch.set_num_threads(1)
SMALL = (  # of the tiny model that --quick builds too; taught little, it writes unreadable things now and then
    "--model tiny --examples 800 --steps 4 --batch-size 8 --micro-batch-size 4 --eval-episodes 4 --eval-every 2 --save-every 2 "
    "--episodes-per-step 4 --updates-per-episode 0.5 --actor-states 4 --critic-warmup 1 --distil all --max-new-tokens 24 "
    "--forecast-tokens 20 --critique-tokens 20"
)
UNTAUGHT = SMALL.replace("--model tiny --examples 800", "--model tiny:16x1 --examples 60 --k 2")
ARGS = dataclasses.replace(nlac.Args(), **nlac.TINY)
ALL_WORLDS = [*envs.WORLDS, "20q"]


# --------------------------------------------------------------------------------------------------------------- flags

PAPER = {  # the sheet: one future, one round, all refinements taught, shared weights, no anchor, no warm-up, a plain buffer
    "k": 1, "m": 1, "distil": "all", "frozen_parts": False, "anchor": 0.0, "critic_warmup": 0, "even_turns": False}  # fmt: skip


def test_defaults_are_the_papers_and_say_so():
    told = {field.name: field.metadata["help"] for field in dataclasses.fields(nlac.Args)}
    assert {name for name, text in told.items() if "(paper)" in text} == set(PAPER)
    args = common.parse_args(nlac.Args, nlac.TINY, ["--model", "Qwen/Qwen2.5-7B-Instruct"])
    assert args == nlac.Args(model="Qwen/Qwen2.5-7B-Instruct") and {name: getattr(args, name) for name in PAPER} == PAPER
    assert args.micro_batch_size == 1 and args.rollout_batch_size == 64 and args.max_new_tokens >= 512
    nlac.check_args(args)


def test_a_tiny_model_has_its_own_defaults():
    for argv in [], ["--model", "tiny:32x1"]:
        args = common.parse_args(nlac.Args, nlac.TINY, argv)
        assert dataclasses.replace(args, model="tiny") == ARGS
    assert set(nlac.TINY) <= {field.name for field in dataclasses.fields(nlac.Args)} and nlac.TINY["k"] == 4
    for sizes, base in (nlac.QUICK, ARGS), (nlac.QUICK_LARGE, nlac.Args()):
        nlac.check_args(dataclasses.replace(base, **sizes))


# ------------------------------------------------------------------------------------------------------------- parsers

PIECES = [
    "Next: ", "End: ", "success in 3 turns", "success in ", "failure", ".", "\n", "Action:", "Action", "Verdict: ", "great",
    "Verdict: bad", "keep", "<think>", "</think", "<|im_end|>", "\x00", "\x1b[2J", "\r", "\x85", "\u2028", "\ud800", "\U0001f600",
    " ", "\t", "7", "\u0663", "\u00b2",
    "A screw is loose. 4 turns left.", "> ", "It works again!", "?", "Next:", "End:\n",
]  # fmt: skip


def random_strings(count):
    rng = random.Random(0)
    for i in range(count):
        kind = i % 4
        if kind == 0:
            yield "".join(rng.choice(PIECES) for _ in range(rng.randrange(9)))
        elif kind == 1:
            yield "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(30)))
        elif kind == 2:
            text = f"Next: {rng.choice(PIECES)}\nEnd: success in {rng.randrange(10 ** rng.randrange(1, 6))} turns."
            cut = rng.randrange(len(text))
            yield text[:cut] + rng.choice(PIECES) + text[cut + rng.randrange(3) :]
        else:
            yield rng.choice(PIECES) * rng.randrange(200)


WORLD = envs.make("repair")


def parse_everything(text):
    action = nlac.action_of(WORLD, text)
    assert len(action.splitlines()) <= 1 and action == action.strip()
    future = nlac.parse_future(text)
    assert future is None or len(future) == 2 and isinstance(future[0], str) and (future[1] is None or isinstance(future[1], int))
    assert nlac.parse_verdict(text) in {None, 0, 1, 2, 3, 4}
    assert isinstance(nlac.keeps(text), bool)
    sentence = nlac.first_sentence(text)
    assert "\n" not in sentence and sentence == " ".join(sentence.split())
    assert nlac.transcript(WORLD, ["Hello.", text, "Bye."]) == f"Hello.\n> {action}\nBye."
    assert nlac.transcript(WORLD, [text]) == text
    return future is not None, nlac.parse_verdict(text) is not None


def test_ten_thousand_random_strings_at_every_parser():
    counts = Counter()
    for text in random_strings(10_000):
        future, verdict = parse_everything(text)
        counts += Counter(future=future, verdict=verdict)
        again = nlac.future_text(text, 3)  # whatever is observed can be put down as a future
        assert again.startswith("Next: ") and again.endswith("\nEnd: success in 3 turns.")
    assert counts["future"] > 100 and counts["verdict"] > 100  # the strings are not all hopeless


@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
@settings(max_examples=300, deadline=None)
def test_no_reply_raises(text):
    parse_everything(text)
    for name in "search", "20q":
        world = envs.make(name)
        observation, _ = world.reset(seed=0)
        episode = nlac.new_episode("train", 0, observation)
        nlac.take_turn(world, episode, text)
        nlac.refiner_messages(world, episode["history"], [{"action": nlac.action_of(world, text), "critique": text}])
        refined = {"tries": [{"action": "x"}], "reply": "Action: x", "kept": False}
        nlac.take_refinement(world, refined, common.aloud(text))


@pytest.mark.parametrize(
    "unit", ["a", "\n", "Next: ", "Next: a\n", "Next: a\nEnd: success in 1", "Verdict: x", "no succ", ". ", "  ", "9", "keep ("]
)
def test_megabytes_take_bounded_time(unit):
    text = unit * (1_000_000 // len(unit))
    start = time.perf_counter()
    for megabyte in text, f"Next: {text}", f"Next: a\nEnd: success in {text}":
        parse_everything(megabyte)
    assert time.perf_counter() - start < 8


def test_future_round_trip():
    observed = ["A screw is loose. 4 turns left.", "Yes. 7 things are still possible.", "It works again.", "No", "Is it?  Well.", " pad. x"]
    for text, turns in itertools.product(observed, [None, 1, 2, 20, 9999]):
        future = nlac.future_text(text, turns)
        for dressed in future, f"  {future}\n", future.removesuffix("."), f"I think.\n{future}", future.replace("\n", "\nIt goes on.\n"):
            assert nlac.parse_future(dressed) == (nlac.first_sentence(text), turns)
    assert nlac.future_text("A screw is loose. 4 turns left.", 1) == "Next: A screw is loose.\nEnd: success in 1 turn."
    listing = f"A screw is loose. 4 turns left.{envs.LISTING}open the case\ncheck the power"
    assert nlac.future_text(listing, None) == "Next: A screw is loose.\nEnd: failure."


FUTURES = {  # the turns until success, None for failure, "?" where no end is told
    # as it was asked for
    "Next: A screw is loose.\nThe player tightens it.\nEnd: success in 2 turns.": 2,
    "Next: Nothing.\nEnd: failure": None,
    "Next: x\nEnd: success in 1 turn": 1,
    "Next: x\nEnd: Success in 12 turns.": 12,
    "NEXT: x\nEND: FAILURE.": None,
    # as chat models write it
    "**Next:** A screw is loose.\n\nThen it works.\n\n**End:** success in 2 turns, this one counted.": 2,
    "**Next**: x\n**End**: **failure**": None,
    "## Next: x\n\n## End:\n\n- success in 3 turns": 3,
    "Sure! Next: x. After that it is repaired.\nEnd: success": 0,
    "Next: x\nEnd: Success (in three turns).": 3,
    "Next: x\nEnd: success in two more turns": 2,
    "Next: x\nEnd: The episode ends in failure, because the first repair is the last one.": None,
    "Next: x\nEnd: the player succeeds in 4 turns": 4,
    "Next: x\nEnd: the player fails": None,
    "Next: x\nEnd: Failed.": None,
    "Next: x\nEnd: the customer is lost": None,
    "Next: x\nEnd: you win after 3 turns": 3,
    "Next: x\nEnd: You do not win.": None,
    "Next: x\nEnd: no success": None,
    "Next: x\nEnd: unsuccessful": None,
    "Next: x\nEnd: not a success": None,
    "Next: x\nEnd: never succeeds": None,
    "Next: x\nEnd: unlikely to succeed": None,
    "Next: x\nEnd: `success in 2 turns`": 2,
    "Next: x\nEnd: *Success* in 1-2 turns": 1,
    "Next: x\nEnd: success in a few turns": 0,
    "Next: x\nEnd: success in turn 3": 0,
    "Next: x\nEnd: success in 5 remaining turns": 5,
    "Next: x\nend : success in 2 turns": 2,
    "Next: x End: success in 2 turns": 2,
    "Next: x\nEnd: failure\n\nLet me revise.\nNext: y\nEnd: success in 2 turns": 2,
    "End: success in 2 turns\nNext: x": 2,
    "End: success in 2 turns": 2,
    # no end is told
    "": "?",
    "failure": "?",
    "Next: x": "?",
    "The device will be repaired soon.": "?",
    "Next: x\nEnd:": "?",
    "Next: x\nEnd: unclear": "?",
    "Next: x\nEnd: success or failure": "?",
    "Next: x\nEnd: failure, or success in so many turns": "?",
    "Next: x\nEnd: it is closed": "?",
    "Next: x\nIn the end it works": "?",
    "I cannot foresee that.": "?",
    "End of the story": "?",
}


@pytest.mark.parametrize("text", FUTURES)
def test_futures_as_models_write_them(text):
    found = nlac.parse_future(text)
    assert (found[1] if found else "?") == FUTURES[text]


VERDICTS = {
    # as it was asked for
    "Futures: 4 of 4 succeed. Verdict: great.": 4,
    "Futures: failure.\nVerdict: bad": 0,
    "Futures: one fails. It is better to test first.\nVerdict: weak": 1,
    "Verdict: fair": 2,
    "Verdict: good": 3,
    "verdict: GREAT!": 4,
    # as chat models write it
    "**Futures:** both fail.\n\n**Verdict:** bad": 0,
    "**Verdict**: **good**": 3,
    "## Verdict:\n\nweak": 1,
    "Verdict:\n- fair": 2,
    "Verdict: `great`": 4,
    "Verdict: \"good\"": 3,
    "Verdict: Good, because it settles the fault.": 3,
    "Verdict: very bad": 0,
    "Verdict: a good action": 3,
    "Verdict: good, not great": 3,
    "The verdict: fair": 2,
    "Final Verdict: weak.": 1,
    "Verdict : good": 3,
    "My verdict is below.\nVerdict: good\n": 3,
    "Verdict: bad\nOn second thought:\nVerdict: good": 3,
    "Verdict: good\n\nVerdict:": 3,
    "> Verdict: great": 4,
    "1. Futures: x\n2. Verdict: bad": 0,
    "*Verdict:* fair": 2,
    "Verdict: good\n\nLet me know if you need more.": 3,
    "good": 3,
    "**Great.**": 4,
    "Verdict:good": 3,
    "Verdict: weak (one of four futures succeeds)": 1,
    # none
    "": None,
    "The action is good.": None,
    "Verdict: so-so": None,
    "Verdict: bad, weak, fair, good or great": None,
    "Verdict: good/great": None,
    "Verdict: good or fair": None,
    "Verdict: 4/5": None,
    "Verdict: goodness": None,
    "Verdict:": None,
    "Verdict: the repair may be good, the test may be bad": None,
    "I can't judge that.": None,
    "great and good": None,
}


@pytest.mark.parametrize("text", VERDICTS)
def test_verdicts_as_models_write_them(text):
    assert nlac.parse_verdict(text) == VERDICTS[text]


KEEPS = {
    # as it was asked for
    "It finds the fault.\nAction: keep": True,
    "Action: keep": True,
    "Action: Keep.": True,
    "keep": True,
    "Keep!": True,
    # as chat models write it
    "**Action:** keep": True,
    "**Action**: **Keep**": True,
    "## Action:\n\nkeep": True,
    "Action:\n- keep": True,
    "Action: `keep`": True,
    'Action: "keep"': True,
    "Action: keep it": True,
    "Action: keep the last try": True,
    "Action: Keep the same action.": True,
    "Action: keep the tried action": True,
    "Action: keep the current action": True,
    "Action: keep (open the case)": True,
    "Action: keep - it was judged great": True,
    "Action: keep: the test shows the fault": True,
    "Action: keep, as it was judged good": True,
    "Action: keep as it is": True,
    "Action: keep this": True,
    "Action: keep going": True,
    "action: KEEP": True,
    "Action: keep\n\nThis is best.": True,
    "keep\nbecause it is good": True,
    "Action: open the case\nNo.\nAction: keep": True,
    "> Action: keep": True,
    # another action
    "": False,
    "Action:": False,
    "Action: open the case": False,
    "I would keep it.\nAction: open the case": False,
    "Action: keep\nAction: open the case": False,
    "Action: upkeep": False,
    "Action: keeper": False,
    "Action: keep dry": False,
    "Action: keep open the case": False,
    "Action: do not keep": False,
    "Let me think about what to keep": False,
    "open the case": False,
    "Action: bookkeep": False,
    "Action: keeps": False,
    "Action: keep testing": False,
}


@pytest.mark.parametrize("text", KEEPS)
def test_what_keeps_the_last_try(text):
    assert nlac.keeps(text) == KEEPS[text]


CALL = envs.tool_call("search", "Mira Velden") if hasattr(envs, "tool_call") else ""


@pytest.mark.parametrize("world, text, action", [
    ("repair", "open the case", "open the case"), ("repair", " open the case \nand more", "open the case"),
    ("repair", "I think.\nAction: open the case", "open the case"), ("repair", "Action: no. Action: yes", "yes"),
    ("repair", "Action:", ""), ("repair", "", ""), ("repair", "\n\n", ""), ("repair", "Action:\n\n go", "go"),
    ("repair", "<think>Action: no</think>Action: yes", "yes"), ("repair", "Action: no</think>\nyes", "yes"),
    ("repair", "<think>Action: no", ""), ("repair", "**Action:** `open the case`.", "open the case."),
    ("search", f"I look her up.\nAction:\n{CALL}", CALL), ("search", CALL, CALL),
])  # fmt: skip
def test_what_is_done(world, text, action):
    assert nlac.action_of(envs.make(world), text) == action


@pytest.mark.parametrize("name", ALL_WORLDS)
def test_the_experts_actions_as_the_policy_writes_them_win(name):
    """Whatever stands before Action:, in every world, and through the rollout's own turn."""
    world = envs.make(name)
    for seed in range(10):
        observation, _ = world.reset(seed=seed, options={"split": "test"})
        episode = nlac.new_episode("test", seed, observation)
        while not episode["over"]:
            reply = ("", "I think this helps.\n", "<think>Action: wait</think>")[seed % 3] + nlac.written(world.expert())
            info = nlac.take_turn(world, episode, reply)
            assert info["action"] == nlac.action_of(world, reply)
        assert episode["won"] and all(episode["valid"])
        for line in nlac.transcript(world, episode["history"]).split("\n> ")[1:]:  # one line per action
            assert line.split("\n")[0].strip() and "Action:" not in line.split("\n")[0]
        t = nlac.transitions(episode)[-1]
        assert t["done"] and t["won"] and t["turns"] == 1


def test_transcripts_show_only_the_last_list():
    world = envs.make("repair", show_actions=True)
    observation, _ = world.reset(seed=0)
    episode = nlac.new_episode("train", 0, observation)
    nlac.take_turn(world, episode, "<think>Hm.</think>I look.\nAction: open the case")
    text = nlac.transcript(world, episode["history"])
    assert text.count("Possible actions:") == 1 == episode["history"][0].count("Possible actions:")
    assert "\n> open the case\n" in text and text.endswith("renew the belt") and "Hm" not in text and "I look" not in text
    messages = nlac.backup_messages(world, episode["history"][:1], "x", episode["history"][2], "f")
    assert "Possible" not in messages[-1]["content"].split("Seen after it")[1]


# ------------------------------------------------------------------------------------- the parts, with canned replies

PROMPTS = {name: getattr(nlac, name.upper()) for name in ("policy", "successor", "backup", "evaluator", "refiner")}
LINES = list(PROMPTS.values())
CHAT = common.Chat(common.tiny_tokenizer(["system\nuser\nassistant\n"], LINES))


class Puppet:
    """Stands where `common.generate` does: answers by part, and notes which weights were asked what. `cut`: parts whose limit cuts."""

    def __init__(self, cut=(), **replies):
        self.replies, self.calls, self.limits, self.cut = replies, [], {}, cut

    def __call__(self, model, chat, prompts, *, max_new_tokens, temperature, seeds, samples=1, rows=None):
        assert len(seeds) == len(set(seeds)) == len(prompts) * samples and not torch.is_grad_enabled() and rows
        texts = []
        for ids in prompts:
            prompt = chat.tokenizer.decode(ids)
            [part] = [name for name, text in PROMPTS.items() if text in prompt]
            self.calls.append((part, model.name, prompt))
            self.limits[part] = max_new_tokens
            reply = self.replies[part]
            texts += [reply(prompt) if callable(reply) else reply for _ in range(samples)]
        return common.Replies([chat.encode(text) for text in texts], [], texts, [part not in self.cut] * len(texts))

    def asked(self, part):
        return [prompt for name, _, prompt in self.calls if name == part]


def fake_model(name, context=4096):
    return SimpleNamespace(name=name, max_context=context, device=torch.device("cpu"))


@pytest.fixture
def parts_of(monkeypatch):
    def build(puppet, world=WORLD, context=4096, **settings):
        monkeypatch.setattr(common, "generate", puppet)
        models = [fake_model(name, context) for name in ("theta", "bar", "start")]
        return nlac.Parts(*models, CHAT, world, dataclasses.replace(ARGS, **settings))

    return build


def played(actions, seed=0, world="repair", **hidden):
    """(transitions, world) after `actions`; `hidden` is put in place after the reset."""
    env = envs.make(world)
    observation, _ = env.reset(seed=seed)
    vars(env).update(hidden)
    episode = nlac.new_episode("train", seed, observation)
    for action in actions:
        nlac.take_turn(env, episode, action)
    return nlac.transitions(episode), env


LOUD = dict(symptom="is too loud", finding="A screw is loose.")
FORECAST = "Next: It works again.\nEnd: success in 1 turn."


def test_transitions():
    steps, _ = played(["open the case", "tighten the screw"], **LOUD)
    assert [(t["done"], t["won"], t["turns"], t["reply"]) for t in steps] == [
        (False, False, 2, "open the case"), (True, True, 1, "tighten the screw")]  # fmt: skip
    assert steps[1]["history"] == [*steps[0]["history"], "open the case", "A screw is loose. 4 turns left."]
    steps, _ = played(["open the case", "nonsense", "clean the gears"], **LOUD)
    assert [(t["done"], t["won"], t["turns"]) for t in steps] == [(False, False, None), (False, False, None), (True, False, None)]


def test_bellman_targets(parts_of):
    won, _ = played(["open the case", "tighten the screw"], **LOUD)
    lost, _ = played(["check the power", "clean the gears"], **LOUD)
    timeout, _ = played(["check the power"] * 5, **LOUD)
    merged = "Next: A screw is loose.\nWhoever sees that tightens it.\nEnd: success in 2 turns."
    puppet = Puppet(policy="I see it.\nAction: tighten the screw", successor=FORECAST, backup=f"\n{merged} ")
    parts = parts_of(puppet, forecast_tokens=31, critique_tokens=32, max_new_tokens=33)
    targets = nlac.bellman_targets(parts, [won[0], won[1], lost[1], timeout[4]], ("bellman", 1))
    assert targets == [
        merged,
        "Next: It works again.\nEnd: success in 1 turn.",  # the reward, in words
        "Next: It is still broken.\nEnd: failure.",
        "Next: Nothing unusual.\nEnd: failure.",
    ]
    # a' at s', d' after it, and both the seen result and d' at the backup: in that order, by theta_bar (B_L: the start weights)
    assert [call[:2] for call in puppet.calls] == [("policy", "bar"), ("successor", "bar"), ("backup", "start")]
    assert puppet.limits == {"policy": 33, "successor": 31, "backup": 31}
    (policy,), (successor,), (backup,) = (puppet.asked(part) for part in ("policy", "successor", "backup"))
    s, a, s1 = won[0]["history"][0], "open the case", "A screw is loose. 4 turns left."
    assert s in policy and a in policy and policy.rstrip().endswith(f"user\n{s1}<|im_end|>\n<|im_start|>assistant")
    assert f"{s}\n> {a}\n{s1}\nNext action: tighten the screw<|im_end|>" in successor
    assert f"{s}\nNext action: {a}\nSeen after it: {s1}\nForecast from there: {FORECAST}<|im_end|>" in backup
    assert parts.metrics() == {f"{what}_{part}": 1.0 - (what == "cut") for what in ("parse", "cut")
                               for part in ("policy_bar", "successor_bar", "backup")} | {"overlong": 0}  # fmt: skip
    assert parts.counts["tokens", "successor_bar"] == len(CHAT.encode(FORECAST)) and parts.total("tokens") > 5


@pytest.mark.parametrize("text", ["As seen, the case is open.", "Next: x", "<think>so</think>It will work soon.", "failure", "x" * 500])
def test_any_words_are_a_target_and_none_is_none(parts_of, text):
    steps, _ = played(["open the case", "tighten the screw"], **LOUD)
    parts = parts_of(Puppet(policy="x", successor=text, backup=text), distil="all")
    assert nlac.bellman_targets(parts, steps, ("b",)) == [common.aloud(text), FORECAST]
    pairs, dropped = nlac.successor_lessons(parts, steps, ("b",))
    assert dropped == 0 and [CHAT.decode(target) for _, target in pairs] == [common.aloud(text), FORECAST]
    assert parts.metrics()["parse_backup"] == 0
    parts.args.distil = "kept"  # a tiny model's: an end must be told
    assert nlac.successor_lessons(parts, steps, ("b",))[1] == 1


@pytest.mark.parametrize("text", ["", " \n", "<think>I am not done"])
def test_an_empty_target_is_dropped_and_counted(parts_of, text):
    steps, _ = played(["open the case", "tighten the screw"], **LOUD)
    parts = parts_of(Puppet(cut=["backup"], policy="x", successor=text, backup=text), distil="all")
    pairs, dropped = nlac.successor_lessons(parts, steps, ("b",))
    assert dropped == 1 and len(pairs) == 1 and parts.metrics()["cut_backup"] == 1 and parts.metrics()["cut_successor_bar"] == 0


def test_mc_backup_asks_nobody(parts_of):
    won, _ = played(["nonsense", "open the case", "tighten the screw"], **LOUD)
    lost, _ = played(["open the case", "clean the gears"], **LOUD)
    puppet = Puppet()
    targets = nlac.bellman_targets(parts_of(puppet, ablation="mc-backup"), won + lost, ("b",))
    ends = ["success in 3 turns.", "success in 2 turns.", "success in 1 turn.", "failure.", "failure."]
    assert [text.split("End: ")[1] for text in targets] == ends and not puppet.calls
    assert [text.split("\n")[0] for text in targets[1:]] == [
        "Next: A screw is loose.", "Next: It works again.", "Next: A screw is loose.", "Next: It is still broken."]  # fmt: skip


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("arm", ["none", "mc-backup", "blind-critic", "frozen-critic"])
def test_which_weights_answer(parts_of, frozen, arm):
    weights = {part: model.name for part, model in parts_of(Puppet(), frozen_parts=frozen, ablation=arm).weights.items()}
    critic = "start" if arm == "frozen-critic" else "bar"  # departure 6: the futures of the critic come from theta_bar too
    assert weights == {
        "policy": "theta", "policy_bar": "bar", "successor": critic, "successor_bar": critic, "backup": "start" if frozen else "bar",
        "evaluator": "start" if frozen else "theta", "refiner": "start" if frozen else "theta",
    }  # fmt: skip


def test_a_prompt_beyond_the_context_is_an_empty_reply(parts_of):
    puppet = Puppet(policy="x", successor=FORECAST, backup=FORECAST)
    parts = parts_of(puppet, context=300)
    steps, _ = played(["y" * 400, "open the case"], **LOUD)
    assert nlac.bellman_targets(parts, steps[:1], ("b",)) == [""] and not puppet.calls
    assert parts.metrics() == {"overlong": 3}
    terminal = [steps[1] | {"done": True}]  # composed, and too long to be learnt
    assert nlac.successor_lessons(parts, terminal, ("b",)) == ([], 1)


# --- refine

HISTORIES = [[f"{name} brings a red kettle that is too loud. 5 turns left."] for name in ("Ada", "Ben", "Cleo", "Dina", "Emil", "Fay")]


def who(prompt):
    return re.findall(r"(\w+) brings", prompt)[-1]


STATES = [{"history": history, "seed": i} for i, history in enumerate(HISTORIES)]
APPROVE, REJECT = "Futures: 4 of 4 succeed. Verdict: great.", "Futures: 0 of 4 succeed. Verdict: bad."


def test_keep_stops_at_once(parts_of):
    for keep in "Action: keep", "It is best.\nAction: Keep.\n", "keep\nbecause it is good":
        said = "I look inside.\nAction: open the case"
        puppet = Puppet(policy=f"<think>Hm.</think>{said}", successor=FORECAST, evaluator=APPROVE, refiner=keep)
        refined = nlac.refine(parts_of(puppet, m=3, k=4, critique_tokens=17), STATES, ("r",))
        for r in refined:
            assert r["kept"] and r["reply"] == said and len(r["tries"]) == 1  # what the policy said aloud is what it is taught
            assert r["tries"] == [{"action": "open the case", "futures": [FORECAST] * 4, "critique": APPROVE}]
        for prompt in puppet.asked("evaluator"):
            assert all(f"Future {i}: {FORECAST}" in prompt for i in range(1, 5)) and "Next action: open the case\n" in prompt
        assert len(puppet.asked("refiner")) == len(STATES) and puppet.limits["evaluator"] == 17


@pytest.mark.parametrize("m", [1, 2, 4])
def test_rounds_go_on_until_approved_and_earlier_tries_are_shown(parts_of, m):
    tests = WORLD.repairs

    def refiner(prompt):
        tries = re.findall(r"Try: (.+)\nCritique: (.+)", prompt)
        return "keep" if who(prompt) == "Cleo" and len(tries) == 2 else f"A reason.\nAction: {tests[len(tries) % 4]}"

    puppet = Puppet(
        policy=tests[0],
        successor=FORECAST,
        evaluator=lambda prompt: f"Seen:\n  {re.findall('Next action: (.+)', prompt)[-1]}. Verdict: bad",
        refiner=refiner,
    )
    refined = dict(zip((who(h[0]) for h in HISTORIES), nlac.refine(parts_of(puppet, m=m, k=1), STATES, ("r",))))
    for name, r in refined.items():
        rounds = min(m, 2) if name == "Cleo" else m
        assert [t["action"] for t in r["tries"]] == [tests[i] for i in range(rounds)]
        assert r["kept"] == (name == "Cleo" and m >= 2)  # the thought is taught, too
        assert r["reply"] == f"A reason.\nAction: {tests[rounds % 4 if not r['kept'] else rounds - 1]}"
    prompts = [prompt for prompt in puppet.asked("refiner") if who(prompt) == "Ada"]
    assert len(prompts) == m
    for n, prompt in enumerate(prompts, 1):  # all earlier tries and critiques, oldest first
        tried = re.findall(r"Try: (.+)\nCritique: (.+)", prompt.replace("<|im_end|>", "\n"))
        assert tried == [(t, f"Seen: {t}. Verdict: bad") for t in tests[:n]]
    assert len([p for p in puppet.asked("refiner") if who(p) == "Cleo"]) == min(m, 2)


def test_an_empty_action_is_never_approved_nor_taught(parts_of):
    for policy, refiner in (
        ("open the case", lambda prompt: "keep" if prompt.count("Try: ") > 1 else ""),
        ("", "keep"),
        (" \n", ""),
        ("x", "Action:"),
    ):
        puppet = Puppet(policy=policy, successor="", evaluator="", refiner=refiner)
        parts = parts_of(puppet, m=3, distil="all")
        refined = nlac.refine(parts, STATES, ("r",))
        for r in refined:
            assert nlac.action_of(WORLD, r["reply"]) or not r["kept"]
        assert nlac.policy_lessons(parts, STATES, refined) == []


def test_a_refinement_cut_before_its_action_teaches_nothing(parts_of):
    for text, taught in ("I would look inside, as", 0), ("I look.\nAction: open the case\nThis shows", 6):
        puppet = Puppet(cut=["refiner"], policy="Action: x", successor="It works.", evaluator="Fine.", refiner=text)
        parts = parts_of(puppet, distil="all", m=1)
        assert len(nlac.policy_lessons(parts, STATES, nlac.refine(parts, STATES, ("r",)))) == taught
        assert parts.metrics()["cut_refiner"] == 1 and parts.metrics()["cut_policy"] == 0


def test_what_is_taught(parts_of):
    """With --distil all every refinement with its reason, with kept the approved ones."""
    def refiner(prompt):
        return "keep" if who(prompt) == "Ada" else "I test first.\nAction: check the power"

    for distil, names in ("all", [who(h[0]) for h in HISTORIES]), ("kept", ["Ada"]):
        puppet = Puppet(policy="Well.\nAction: open the case", successor="Fine.", evaluator="Fine.", refiner=refiner)
        parts = parts_of(puppet, distil=distil, m=1, k=1)
        pairs = nlac.policy_lessons(parts, STATES, nlac.refine(parts, STATES, ("r",)))
        assert [who(CHAT.tokenizer.decode(prompt)) for prompt, _ in pairs] == names
        assert CHAT.decode(pairs[0][1]) == "Well.\nAction: open the case"
        assert all(CHAT.decode(target) == "I test first.\nAction: check the power" for _, target in pairs[1:])
        assert all(target[-1] == CHAT.eos[0] for _, target in pairs)


def test_what_was_played_is_imitated_where_it_is_whole(parts_of):
    parts = parts_of(Puppet(), batch_size=64)
    steps, _ = played(["Action: open the case", "so I would"], **LOUD)
    steps[1]["complete"] = False
    pairs = nlac.anchor_lessons(parts, steps, random.Random(0))
    assert [CHAT.decode(target) for _, target in pairs] == ["Action: open the case"]
    parts.args.anchor = 0.0
    assert nlac.anchor_lessons(parts, steps, random.Random(0)) == []


def test_the_buffer_is_plain_or_even():
    buffer = [{"history": [""] * n} for n in [1] * 90 + [3] * 10]
    for even, low, high in (False, 0.07, 0.13), (True, 0.21, 0.29):  # even: by the root of the counts, 9.49 to 3.16
        drawn = nlac.sample(buffer, dataclasses.replace(ARGS, even_turns=even), random.Random(0), 4000)
        assert low < sum(len(t["history"]) == 3 for t in drawn) / 4000 < high
    assert nlac.sample([], ARGS, random.Random(0), 5) == []


def test_given_replies_are_judged_as_they_are(parts_of):
    puppet = Puppet(successor=FORECAST, evaluator=APPROVE, refiner="keep")
    refined = nlac.refine(parts_of(puppet), STATES[:2], ("r",), replies=["I think.\nAction: open the case", "nonsense"])
    assert [r["tries"][0]["action"] for r in refined] == ["open the case", "nonsense"]
    assert refined[0]["reply"] == "I think.\nAction: open the case" and not puppet.asked("policy")


@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_blind_critic_reads_futures_of_others(parts_of, count):
    for trial in range(8):
        owners = Puppet(
            policy="open the case",
            successor=lambda prompt: f"Next: {who(prompt)}.\nEnd: failure.",
            evaluator=REJECT,
            refiner="check the power",
        )
        parts = parts_of(owners, ablation="blind-critic", k=2, m=2)
        refined = nlac.refine(parts, STATES[:count], ("r", trial))
        for r in range(2):
            read = [nlac.parse_future(x["tries"][r]["futures"][0])[0].rstrip(".") for x in refined]
            assert sorted(read) == sorted(who(h[0]) for h in HISTORIES[:count])  # permuted across states, k at a time
            assert all(len(set(x["tries"][r]["futures"])) == 1 for x in refined)
            assert all(name != who(h[0]) for name, h in zip(read, HISTORIES)), "its own future: not blind"


# ---------------------------------------------------------------------------------------------------------------- loss


def test_likelihood_loss_by_hand():
    model = Bigram([[0.0] * 4] * 4)
    with torch.no_grad():
        model.table[0] = torch.tensor([1.0, 5.0, 1.0, 1.0]).log()  # after 0: 1/8, 5/8, 1/8, 1/8
    pairs = [([0], [1, 2]), ([3, 3, 0], [0]), ([3, 3], [3])]  # -log p: 5/8 and 1/4; 1/8; 1/4: the prompts do not count
    expected = -(math.log(5 / 8) + math.log(1 / 4) + math.log(1 / 8) + math.log(1 / 4)) / 4
    for micro in 1, 2, 3:
        model.table.grad = None
        assert nlac.likelihood_loss(model, PAD, pairs, 0.5, micro) == pytest.approx(expected)  # unweighted
        by_hand = torch.tensor([  # weight / tokens * (p - onehot), summed over the targets that follow this token
            [2 / 8 - 1, 10 / 8 - 1, 2 / 8, 2 / 8], [1 / 4, 1 / 4, -3 / 4, 1 / 4], [0] * 4, [1 / 4, 1 / 4, 1 / 4, -3 / 4]])  # fmt: skip
        torch.testing.assert_close(model.table.grad, 0.5 / 4 * by_hand)


def test_gradient_does_not_depend_on_the_micro_batch():
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=100, initializer_range=0.3, **size)).eval()
    rng = random.Random(0)
    pairs = [
        ([rng.randrange(100) for _ in range(rng.randrange(1, 40))], [rng.randrange(100) for _ in range(rng.randrange(1, 9))])
        for _ in range(11)
    ]
    results = []
    for micro, weight in (11, 1.0), (1, 1.0), (4, 1.0), (4, 0.25):
        model.zero_grad()
        loss = nlac.likelihood_loss(model, PAD, pairs, weight, micro)
        results.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()]) / weight))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert (gradient - results[0][1]).norm() < 1e-5 * gradient.norm()
    model.zero_grad()  # the same from full sequences, one by one
    total = sum(len(target) for _, target in pairs)
    for prompt, target in pairs:
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        (torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum") / total).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradient - results[0][1]).norm() < 1e-5 * gradient.norm()


# --------------------------------------------------------------------------------------------------------------- leaks


def prompts_about(parts_of, steps, world, **settings):
    """Every prompt of every part about these transitions, asked through a world in this very state."""
    puppet = Puppet(policy="open the case", successor=FORECAST, backup=FORECAST, evaluator=REJECT, refiner="check the power")
    parts = parts_of(puppet, world=world, **settings)
    nlac.bellman_targets(parts, [t | {"done": False} for t in steps], ("b",))
    nlac.refine(parts, steps, ("r",))
    nlac.calibration(parts, steps, ("c",))
    return [(part, prompt) for part, _, prompt in puppet.calls]


@pytest.mark.parametrize("settings", [{}, {"frozen_parts": False}, {"shots": 2, "prefill": True}, {"ablation": "blind-critic"}])
def test_prompts_do_not_change_with_what_is_hidden(parts_of, settings):
    pairs = [
        (("repair", ["check the power", "nonsense", "check the power"]), dict(symptom="is too loud", finding="A screw is loose."),
         dict(symptom="is too loud", finding="The gears are dusty.")),
        (("20q", ["Is it an animal?", "Is it a cat?", "nonsense", "Does it fit in a shoebox?"]), dict(hidden="coat"), dict(hidden="piano")),
        (("20q", ["Is it an animal?"]), dict(hidden="duck"), dict(hidden="lion")),
    ]  # fmt: skip
    for (world, actions), one, other in pairs:
        seen = []
        for hidden in one, other:
            steps, env = played(actions, world=world, **hidden)
            seen.append(prompts_about(parts_of, steps, env, env=world, **settings))
        assert seen[0] == seen[1] and {part for part, _ in seen[0]} == set(PROMPTS)


def close_to(observed, expected, freedom=None):
    """Pearson's chi-square of counts, within five standard deviations of its mean."""
    keys = [key for key in expected if expected[key] >= 3]
    assert len(keys) > 5 and not [key for key in observed if not expected.get(key)]
    statistic, freedom = sum((observed[key] - expected[key]) ** 2 / expected[key] for key in keys), freedom or len(keys)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)


def corpus(name, **settings):
    world = envs.make(name)
    by_part = defaultdict(list)
    for messages, reply in nlac.warmup(world, dataclasses.replace(ARGS, **settings)):
        system = messages[0]["content"]
        part = next((part for part, text in PROMPTS.items() if system.endswith(f"\n{text}")), "other")
        by_part[part].append((messages, reply))
    return world, by_part


@pytest.fixture(scope="module", params=["repair", "20q"])
def taught(request):
    return corpus(request.param, examples=3000)


def situation(text):
    """What matters to a player in a transcript: what came in (the symptom), and what was last said."""
    first, last = (
        text.split("\n")[0],
        [line for line in text.split("\n") if not line.startswith(("> ", "Try: ", "Critique: "))][-1],
    )
    return {"first": re.sub(r"^.* that ", "", first), "last": re.split(r"(?<=[.?!]) ", last)[0], "long": "\n> " in text}


def test_warm_up_policy_is_uniform(taught):
    world, by_part = taught
    world.reset(seed=0)
    actions, examples = world.admissible(), by_part["policy"]
    assert len(examples) == 3000
    for what in "first", "last", "long":
        observed, expected = Counter(), Counter()
        for messages, reply in examples:
            group = situation(f"{messages[1]['content']}\n{messages[-1]['content']}")[what]
            assert reply.startswith("Action: ")
            observed[group, nlac.action_of(world, reply)] += 1
            for action in actions:
                expected[group, action] += 1 / len(actions)
        close_to(observed, expected)


def test_warm_up_refiner_keeps_by_the_verdict_and_else_says_anything_untried(taught):
    world, by_part = taught
    world.reset(seed=0)
    actions = world.admissible()
    kinds = ("first", "last", "critique") + ("tried",) * (world.name == "repair")  # pairs of 36 moves are too many to count
    tables = {what: (Counter(), Counter()) for what in kinds}
    for messages, reply in by_part["refiner"]:
        text = messages[1]["content"]
        tried = re.findall(r"^Try: (.+)\nCritique: (Futures: \d of \d succeed. Verdict: \w+[.])$", text, re.M)
        approved = [nlac.parse_verdict(critique) >= nlac.APPROVED for _, critique in tried]
        assert approved and not any(approved[:-1]) and nlac.keeps(reply) == approved[-1]
        untried = [action for action in actions if action not in [action for action, _ in tried]]
        assert len(untried) == len(actions) - len(tried)
        if not nlac.keeps(reply):
            reply = nlac.action_of(world, reply)
            groups = situation(text) | {"tried": tried[-1][0], "critique": tried[-1][1]}
            for what, (observed, expected) in tables.items():
                observed[groups[what], reply] += 1
                for action in untried:
                    expected[groups[what], action] += 1 / len(untried)
    for observed, expected in tables.values():
        close_to(observed, expected)


def right_repairs():
    return {finding: repair for _, findings in envs.RepairShop.faults.values() for finding, repair in findings.items()}


def test_warm_up_successor_and_evaluator_know_no_consequences():
    world, by_part = corpus("repair", examples=4000)
    for part in "successor", "evaluator":
        rows = defaultdict(list)
        for messages, reply in by_part[part]:
            text = messages[1]["content"]
            action = re.search("^Next action: (.+)$", text, re.M)[1]
            symptom = next(symptom for symptom in world.faults if symptom in text.split("\n")[0])
            found = [finding for finding in right_repairs() if finding in text]
            futures = [nlac.parse_future(reply)] if part == "successor" else [
                nlac.parse_future(f) for f in re.findall(r"^Future \d: (Next: .+\nEnd: .+)$", text, re.M)]  # fmt: skip
            assert futures and all(futures) and (part == "successor" or len(futures) == ARGS.k)
            success, works = futures[0][1] is not None, futures[0][0] == "It works again."
            if action in world.tests:
                rows["test", action == world.faults[symptom][0]].append((success, works))
            elif found:
                rows["repair", action == right_repairs()[found[0]]].append((success, works))
            else:
                rows["guess", action in world.faults[symptom][1].values()].append((success, works))
        for kind, i in itertools.product(("test", "repair", "guess"), (0, 1)):
            assert helpers.rates_differ(*([row[i] for row in rows[kind, right]] for right in (False, True))) < 4, (part, kind, i)


def test_warm_up_backup_and_evaluator_only_read_their_prompt(taught):
    world, by_part = taught
    verdicts = defaultdict(set)
    for messages, reply in by_part["backup"]:
        text = messages[1]["content"]
        told = re.search(r"^Next action: .+\nSeen after it: (.+)\nForecast from there: (Next: .+\nEnd: .+)$", text, re.M)
        turns, left = nlac.parse_future(told[2])[1], world.max_turns - text.count("\n> ")
        assert reply == nlac.future_text(told[1], turns + 1 if turns and turns < left else None)
    for messages, reply in by_part["evaluator"]:
        ends = re.findall(r"^End: (.+)$", messages[1]["content"], re.M)
        verdicts[tuple(sorted(ends))].add(reply)
        assert int(reply.split()[1]) == sum("success" in end for end in ends) and nlac.parse_verdict(reply) is not None
    assert all(len(replies) == 1 for replies in verdicts.values())
    assert {nlac.parse_verdict(reply) for replies in verdicts.values() for reply in replies} == {0, 1, 2, 3, 4}


def test_warm_up_shows_nothing_of_the_test_split():
    test = {envs.make("repair").reset(seed=seed, options={"split": "test"})[0].split(" that ")[0] for seed in range(3000)}
    text = str(nlac.warmup(envs.make("repair"), dataclasses.replace(ARGS, examples=1000)))
    openings = set(re.findall(r"\w+ brings a \w+ \w+", text))
    assert len(openings) > 100 and len(test) > 80 and not openings & test
    world = envs.make("20q")
    text = str(nlac.warmup(world, dataclasses.replace(ARGS, examples=1000)))
    won = {thing for thing in world.things if f"Yes, it is {world.guess(thing)[6:-1]}!" in text}
    assert len(won) > 10 and not won & set(world.hidden_in["test"])


def test_warm_up_formats_are_what_the_parts_write():
    for sizes in {"k": 1, "m": 1}, {"m": 40}:
        world, by_part = corpus("repair", examples=200, **sizes)
        assert set(by_part) == {*PROMPTS, "other"}
        for part, word in nlac.FORCED.items():
            assert all(reply.startswith(word) for _, reply in by_part[part])
        assert all(nlac.parse_future(reply) for part in ("successor", "backup") for _, reply in by_part[part])
        assert all(nlac.parse_verdict(reply) is not None for _, reply in by_part["evaluator"])
    examples = dataclasses.replace(ARGS, examples=100)
    assert nlac.warmup(envs.make("repair"), examples) == nlac.warmup(envs.make("repair"), examples)  # the cache is named after it


# -------------------------------------------------------------------------------------------- worked examples, forced words


@pytest.mark.parametrize("name", ALL_WORLDS)
def test_worked_examples_are_honest_and_in_good_form(name):
    world = envs.make(name, show_actions=True)
    found = nlac.shots_of_all(name, 2, True, False, 2)
    assert set(found) == set(nlac.FORCED)
    for part, messages in found.items():
        assert [m["role"] for m in messages] == ["user", "assistant"] * 2 and all(m["shot"] for m in messages[1::2])
        for asked, reply in zip(messages[::2], messages[1::2]):
            said = reply["content"]
            assert nlac.FORCED[part] in said and len(said) < 3000
            assert part not in ("policy", "refiner") or nlac.keeps(said) or nlac.action_of(world, said)
            assert part not in ("successor", "backup") or nlac.parse_future(said)
            if part == "evaluator":  # it reads what it is shown
                futures = [nlac.parse_future(f) for f in re.split(r"Future \d: ", asked["content"])[1:]]
                assert nlac.parse_verdict(said) == nlac.rank_of([turns for _, turns in futures]) and len(futures) == 2
            assert asked["content"].count("Possible actions:") == 1
    if name == "repair":  # a random player wins there: both labels
        assert {nlac.keeps(m["content"]) for m in found["refiner"][1::2]} == {True, False}
        assert len({nlac.parse_verdict(m["content"]) for m in found["evaluator"][1::2]}) == 2
    forced = nlac.shots_of_all(name, 2, True, True, 2)
    for part, messages in forced.items():
        assert all(m["content"].startswith(nlac.FORCED[part]) for m in messages[1::2])


def test_forced_words_and_shots_are_no_targets(parts_of):
    """Every part's prompt ends in its word, replies begin with it, and the word is not learnt."""
    replies = dict(policy=" open the case", successor=FORECAST[5:], backup=FORECAST[5:], evaluator=APPROVE[8:], refiner=" check the power")
    for forced in {"prefill": True}, {"prefill": True, "shots": 2}:
        puppet = Puppet(**replies)
        parts = parts_of(puppet, distil="all", m=1, **forced)
        steps, _ = played(["Action: open the case", "Action: tighten the screw"], **LOUD)
        pairs = nlac.successor_lessons(parts, steps, ("b",))[0]
        assert [CHAT.decode(target) for _, target in pairs] == [FORECAST[5:]] * 2
        refined = nlac.refine(parts, steps, ("r",))
        assert [r["reply"] for r in refined] == ["Action: check the power"] * 2 and refined[0]["tries"][0]["critique"] == APPROVE
        pairs = nlac.policy_lessons(parts, steps, refined)
        assert [CHAT.decode(target) for _, target in pairs] == [" check the power"] * 2
        for part, _, prompt in puppet.calls:
            assert prompt.endswith("assistant\n" + nlac.FORCED[part])
            if part != "policy":
                assert prompt.count("<|im_start|>assistant") == 1 + forced.get("shots", 0)
    puppet = Puppet(**replies)
    nlac.refine(parts_of(puppet), STATES, ("r",))  # nothing of it by default
    assert all(prompt.endswith("assistant\n") and prompt.count("<|im_start|>assistant") == 1 for _, _, prompt in puppet.calls)


def test_a_thought_that_the_template_opens_stays_empty():
    chat = SimpleNamespace(opened="<think>", dialogue=lambda messages, word: [1], reply=lambda text: text)
    taught = lambda text: nlac.lesson(chat, "policy", [], text, ARGS)[1]  # noqa: E731
    assert taught("Action: x") == "</think>\n\nAction: x" and taught("<think>Hm.</think>Action: x") == "Hm.</think>Action: x"


# ------------------------------------------------------------------------------------------------ whole runs: as a user


def test_quick_by_subprocess(run_as_user, tmp_path):
    start = time.perf_counter()
    result = run_as_user("--quick", tmp_path)
    assert result.status == 0 and "Traceback" not in result.stderr and time.perf_counter() - start < 60, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"] and [p.name for p in (tmp_path / "runs").iterdir()] == ["nlac-repair-s0"]
    run = tmp_path / "runs" / "nlac-repair-s0"
    assert {path.name for path in run.iterdir()} == {"args.json", "metrics.jsonl", "rollouts.jsonl", "checkpoint", "model", "summary.json"}
    args, summary = (json.loads((run / name).read_text()) for name in ("args.json", "summary.json"))
    assert args["script"] == "nlac" and args["args"]["env"] == "repair" and {"versions", "device", "git_commit"} <= set(args)
    assert set(summary) >= set(SUMMARY)
    assert all(set(summary[key]) == {"success", "se"} for key in ("before", "after", "random", "expert"))
    assert summary["expert"] == {"success": 1.0, "se": 0.0} and summary["gradient_steps"] == args["args"]["steps"]
    metrics, rollouts = lines(run / "metrics.jsonl"), lines(run / "rollouts.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, args["args"]["steps"] + 1))
    assert set(metrics[-1]) >= {
        "success", "return", "l1", "l2", "anchor", "entropy", "valid", "tokens", "env_steps", "gradient_steps", "predicted_success", "kept",
        "changed", "sentiment", "verdicts", "eval_success", "eval_se", "targets_dropped", "seconds_rollout", "seconds_update",
        "parse_policy", "parse_policy_bar", "parse_successor", "parse_successor_bar", "parse_backup", "parse_evaluator", "parse_refiner",
    }  # fmt: skip
    assert metrics[-1]["env_steps"] == sum(len(row["valid"]) for row in rollouts if row["split"] == "train") == summary["env_steps"]
    thoughts = [row for row in rollouts if row["split"] == "test"][-1]["turns"]
    assert all({"reply", "result", "tries", "kept"} <= set(turn) and turn["tries"][0]["futures"] for turn in thoughts)
    for row in rollouts:
        assert len(row["history"]) == 2 * len(row["valid"]) + 1 and "expert" not in row
    words = result.stdout
    for piece in "before: test: success", "\nbefore\n", "\nafter\n", "critique:", "random", "expert", "rollouts.jsonl", "success":
        assert piece in words
    model, chat = common.load(str(run / "model"))  # in the Hugging Face format
    saved = torch.load(run / "checkpoint" / "state.pt", weights_only=True)["state"]["model"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_eval_only_writes_nothing(run_script, whole, tmp_path):
    before = everything_under(whole)
    shutil.copytree(whole / "model", tmp_path / "copy")
    kept = everything_under(tmp_path)
    result = run_script(f"{SMALL.replace('--model tiny', '--model copy')} --eval-only", tmp_path)
    assert result.status == 0 and re.search(r"repair test: success \d\.\d+ \(se .*, n 4\)", result.stdout), result.stderr
    assert everything_under(tmp_path) == kept and everything_under(whole) == before
    again = run_script(f"{SMALL} --eval-only --out-dir {whole}", tmp_path)  # an existing directory is no matter
    assert again.status == 0 and everything_under(whole) == before


def test_another_seed_gives_another_run(run_script, whole, tmp_path):
    assert run_script(f"{SMALL} --out-dir other --seed 9223372036854775807 --steps 1", tmp_path).status == 0
    assert lines(tmp_path / "other" / "rollouts.jsonl")[0]["history"] != lines(whole / "rollouts.jsonl")[0]["history"]


def test_other_settings_run(run_script, tmp_path):
    small = UNTAUGHT.replace("--steps 4", "--steps 2").replace("--eval-episodes 4", "--eval-episodes 2")
    for i, (flags, arm) in enumerate([
        ("--env 20q --ablation blind-critic --distil kept", "blind-critic"),
        ("--shots 1 --prefill --show-actions --frozen-parts False --ema 0 --critic-warmup 0 --even-turns False "
         "--rollout-batch-size 3", "none"),
        ("--ablation mc-backup --k 1 --m 1 --env search --max-context 900", "mc-backup"),
    ]):  # fmt: skip
        result = run_script(f"{small} --out-dir {i} {flags}", tmp_path)
        assert result.status == 0, result.stderr
        assert json.loads((tmp_path / str(i) / "summary.json").read_text())["arm"] == arm
    played = [row for row in lines(tmp_path / "1" / "rollouts.jsonl") if row["split"] == "train"]
    assert all(reply.startswith("Action:") for row in played for reply in row["history"][1::2])
    assert all("Possible actions:" in row["history"][0] for row in played)
    assert {"cut_policy", "cut_successor", "cut_evaluator", "cut_refiner", "overlong"} <= set(lines(tmp_path / "1" / "metrics.jsonl")[-1])


WORLD_FILE = """
import envs
class Lamp(envs.World):
    name, system, max_turns = "lamp", "There is a lamp. You win when it is on.", 2
    def begin(self, rng, split):
        return "It is dark."
    def admissible(self):
        return ["turn on the lamp", "wait"]
    def act(self, text):
        self.won = text == "turn on the lamp"
        return "There is light." if self.won else "It stays dark.", True
"""


def test_a_world_from_a_file(run_script, tmp_path):
    (tmp_path / "my lamp.py").write_text(WORLD_FILE)
    (tmp_path / "lamp.py").write_text(WORLD_FILE)
    result = run_script(f"{UNTAUGHT.replace('--steps 4', '--steps 2')} --env ./lamp.py:Lamp", tmp_path)
    assert result.status == 0, result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"nlac-[\w.-]+-s0", run.name)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["env"] == "./lamp.py:Lamp" and summary["random"]["success"] > 0 and "expert" not in summary  # it has none


BROKEN_PRINT = """
import builtins
say = builtins.print
def fail(*words, **options):
    if "before" in "".join(map(str, words)):
        raise UnicodeEncodeError("ascii", "x", 0, 1, "cannot say that")
    say(*words, **options)
builtins.print = fail
"""


def test_model_and_summary_come_before_any_words_and_the_same_seed_gives_the_same(run_script, whole, tmp_path):
    result = run_script(f"{SMALL} --out-dir run", tmp_path, BROKEN_PRINT)
    assert result.status == 1 and "UnicodeEncodeError" in result.stderr
    same_run(whole, tmp_path / "run")


NOT_FINITE = """
STEP, loss, update = [0], nlac.likelihood_loss, nlac.update
def poisoned(model, *all_of_it, **options):
    mean = loss(model, *all_of_it, **options)
    if STEP[0] == 3:
        next(model.parameters()).grad[0, 0] = float("nan")
    return mean
def counted(*all_of_it):
    STEP[0] = all_of_it[5]
    return update(*all_of_it)
nlac.update, nlac.likelihood_loss = counted, poisoned
"""


def test_a_gradient_that_is_not_finite_stops_before_its_step(run_script, whole, tmp_path):
    result = run_script(f"{SMALL} --out-dir run", tmp_path, NOT_FINITE)
    told = [line for line in result.stderr.replace("\r", "\n").splitlines() if "error" in line]
    assert result.status == 1 and len(told) == 1 and "not_finite.pt" in told[0] and "Traceback" not in result.stderr
    kept = torch.load(tmp_path / "run" / "not_finite.pt", weights_only=True)
    assert set(kept) == {"l1", "l2", "anchor"} and kept["l1"]
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["state"]["step"] == 2
    again = run_script(f"{SMALL} --out-dir run --resume", tmp_path)
    assert again.status == 0, again.stderr
    same_run(whole, tmp_path / "run")


# -------------------------------------------------------------------------------------------- whole runs: what is trained


@pytest.fixture
def main_here(monkeypatch, run_here):
    """nlac.main() in this process -> its `Parts`, with `first`: copies of all weights as they were when it was built."""
    built = []

    class Watched(nlac.Parts):
        def __init__(self, *args):
            super().__init__(*args)
            self.theta, self.bar, self.start = args[:3]
            self.first = copy.deepcopy(self.theta.state_dict())
            built.append(self)

    monkeypatch.setattr(nlac, "Parts", Watched)

    def run(flags):
        run_here(flags)
        return built[-1]

    return run


def test_every_parameter_moves_and_frozen_parts_do_not(main_here):
    parts = main_here(f"{SMALL} --out-dir a --steps 3 --ema 0.5")
    for (name, now), bar in zip(parts.theta.named_parameters(), parts.bar.parameters()):
        old = parts.first[name]
        assert not torch.equal(now, old), name
        assert not torch.equal(bar, old) and not torch.equal(bar, now), name  # follows, behind
        assert now.grad is None
    assert all(torch.equal(value, parts.first[name]) for name, value in parts.start.state_dict().items())
    assert all(parts.weights[part] is parts.start for part in ("backup", "evaluator", "refiner"))
    assert not any(p.grad is not None for model in (parts.bar, parts.start) for p in model.parameters())


def test_frozen_critic_and_ema_off(main_here):
    parts = main_here(f"{SMALL} --out-dir b --steps 3 --lr 0.1 --ema 0 --ablation frozen-critic --frozen-parts False")
    moved = [name for name, now in parts.theta.named_parameters() if not torch.equal(now, parts.first[name])]
    assert moved  # the policy still learns, from L2
    assert all(torch.equal(a, b) for a, b in zip(parts.theta.parameters(), parts.bar.parameters()))  # EMA 0: a copy
    metrics = lines("b/metrics.jsonl")
    assert all(row["l1"] == 0 for row in metrics) and any(row["l2"] > 0 for row in metrics)
    prompts = [nlac.successor_messages(WORLD, history, "open the case") for history in HISTORIES]
    parts.counts.clear()
    now = parts("successor", prompts, ("same",), 2), parts("successor_bar", prompts, ("same",), 2)
    parts.start.load_state_dict(parts.first)
    assert now == (parts("successor", prompts, ("same",), 2), parts("successor_bar", prompts, ("same",), 2))  # M answers as at the start
    parts.weights["successor"] = parts.theta
    assert parts("successor", prompts, ("same",), 2) != now[0]


def test_critic_warm_up_trains_m_alone(main_here):
    main_here(f"{SMALL} --out-dir c --steps 2 --critic-warmup 2")
    metrics = lines("c/metrics.jsonl")
    assert all(row["l2"] == 0 and "kept" not in row for row in metrics) and any(row["l1"] > 0 for row in metrics)


# ------------------------------------------------------------------------------------- whole runs: a model from elsewhere

save_llama = functools.partial(
    helpers.save_llama,
    text=[WORLD.system, nlac.TOLD, nlac.SUCCESSOR, nlac.BACKUP, nlac.EVALUATOR, nlac.REFINER, FORECAST, *envs.make("20q").moves],
)


def test_a_llama_without_a_clue_runs_through_every_line(run_script, llama, tmp_path):
    flags = SMALL.replace("--model tiny", "--model " + str(llama)).replace("--steps 4", "--steps 2")
    flags += " --max-new-tokens 12 --lr 1e-3 --prefill --anchor 0.3 --k 2"
    result = run_script(f"{flags} --out-dir run --eval-every 1", tmp_path)
    assert result.status == 0, result.stderr
    metrics, rollouts = lines(tmp_path / "run" / "metrics.jsonl"), lines(tmp_path / "run" / "rollouts.jsonl")
    parsed = {key: value for key, value in metrics[-1].items() if key.startswith("parse_")}
    assert set(parsed) == {f"parse_{p}" for p in ("policy", "policy_bar", "successor", "successor_bar", "backup", "evaluator", "refiner")}
    assert parsed["parse_successor"] == parsed["parse_backup"] == parsed["parse_evaluator"] == 0  # generated, read, counted as malformed
    assert metrics[-1]["targets_dropped"] == 0 and metrics[-1]["valid"] == 0 and metrics[-1]["l2"] > 0 and metrics[-1]["tokens"] > 0
    assert metrics[-1]["cut_policy"] > 0.5 and result.stderr.count("raise --max-new-tokens") == 3  # once per part
    assert all(len(row["valid"]) == 5 for row in rollouts)
    trained, chat = common.load(str(tmp_path / "run" / "model"))
    start, _ = common.load(str(llama))
    assert all(not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters()))
    assert chat.prompt([{"role": "user", "content": "Hi"}]) == common.Chat(chat.tokenizer).prompt([{"role": "user", "content": "Hi"}])


def test_a_context_that_fills_up_ends_episodes(run_script, llama, tmp_path):
    room = len(common.load(str(llama))[1].prompt(nlac.policy_messages(WORLD, [WORLD.reset(seed=0)[0]]))) + 60
    save_llama(tmp_path / "short", context=room)
    flags = SMALL.replace("--model tiny", "--model " + "short").replace("--steps 4", "--steps 2") + " --max-new-tokens 16"
    result = run_script(f"{flags} --out-dir run --eval-every 1", tmp_path)
    assert result.status == 0, result.stderr
    assert all(row["truncated"] == 4 for row in lines(tmp_path / "run" / "metrics.jsonl"))


# ------------------------------------------------------------------------------------------------------------ bad input


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
    return path


@pytest.mark.parametrize("flags, words", [
    ("--model ./nowhere", "config.json is missing"), ("--model nobody/nothing", "cannot be loaded"),
    ("--model {bad}/no-config", "config.json is missing"), ("--model {bad}/garbage", "cannot be loaded"),
    ("--model {bad}/torn", "cannot be loaded"), ("--model {bad}/no-tokenizer", "--model"), ("--model {bad}/no-template", "chat template"),
    ("--model {bad}/short", "context"), ("--model tiny:10x1", "multiple of 16"), ("--model tiny:16x0", "tiny"),
    ("--env chess", "unknown world 'chess'"), ("--steps 0", "--steps"), ("--steps -3", "--steps"), ("--lr nan", "--lr"),
    ("--lr -1", "--lr"), ("--lr inf", "--lr"), ("--batch-size 10 --micro-batch-size 4", "multiple of --micro-batch-size"),
    ("--batch-size 0", "--batch-size"), ("--micro-batch-size 0", "--micro-batch-size"), ("--max-new-tokens 0", "--max-new-tokens"),
    ("--temperature 0", "--temperature"), ("--temperature nan", "--temperature"), ("--eval-temperature -1", "--eval-temperature"),
    ("--reader-temperature -1", "--reader-temperature"), ("--forecast-tokens 0", "--forecast-tokens"),
    ("--critique-tokens 0", "--critique-tokens"), ("--shots -1", "--shots"), ("--rollout-batch-size 0", "--rollout-batch-size"),
    ("--max-context 0", "--max-context"), ("--env nowhere.py:World", "no file"),
    ("--eval-episodes 0", "--eval-episodes"), ("--eval-every 0", "--eval-every"),
    ("--save-every -1", "--save-every"), ("--seed -1", "--seed"), ("--k 0", "--k"), ("--m -1", "--m"), ("--ema 1", "--ema"),
    ("--ema -0.1", "--ema"), ("--ema nan", "--ema"), ("--buffer-size 0", "--buffer-size"),
    ("--episodes-per-step 0", "--episodes-per-step"), ("--actor-states 0", "--actor-states"), ("--actor-weight -1", "--actor-weight"),
    ("--actor-weight inf", "--actor-weight"), ("--anchor -1", "--anchor"), ("--anchor nan", "--anchor"),
    ("--critic-warmup -1", "--critic-warmup"), ("--examples 0", "--examples"), ("--updates-per-episode 0", "--updates-per-episode"),
    ("--updates-per-episode -1", "--updates-per-episode"), ("--updates-per-episode nan", "--updates-per-episode"),
    ("--episodes-per-step 3 --updates-per-episode 0.5", "whole number"), ("--ablation none-such", "--ablation"),
    ("--distil some", "--distil"), ("--react True", "--react"), ("--frozen-parts maybe", "--frozen-parts"), ("--nonsense 1", "--nonsense"),
    ("--device warp", "--device"), ("--dtype float16", "--dtype"), ("--resume", "no run"), ("--out-dir {bad}/garbage", "exists"),
    ("--out-dir {bad}/file", "exists"), ("--out-dir {bad}/file/run", "--out-dir"),
])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(run_script, bad_models, home, tmp_path, flags, words):
    before = everything_under(bad_models), everything_under(home)
    refused(run_script(flags.format(bad=bad_models), tmp_path), words)
    assert not list(tmp_path.iterdir()) and (everything_under(bad_models), everything_under(home)) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_one(run_script, tmp_path):
    refused(run_script("--device cuda", tmp_path), "--device")
    assert not list(tmp_path.iterdir())


def test_bad_input_by_subprocess(run_as_user, tmp_path):
    refused(run_as_user("--lr nan", tmp_path), "--lr")
    assert not list(tmp_path.iterdir())


def test_a_run_is_never_overwritten_and_resumed_only_as_it_was(run_script, whole, tmp_path):
    def after(flags, change, *words):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "run")
        change(tmp_path / "run")
        before = everything_under(tmp_path)
        refused(run_script(f"{SMALL} --out-dir run {flags}", tmp_path), *words)
        assert everything_under(tmp_path) == before

    state, leave = Path("checkpoint", "state.pt"), lambda run: None  # noqa: E731
    after("", leave, "--resume", "--out-dir")
    after("--resume --lr 0.5", leave, "lr was")
    after("--resume --ablation mc-backup --seed 3", leave, "ablation was", "seed was")
    after("--resume", lambda run: (run / state).write_bytes(b"junk"), "damaged")
    after("--resume", lambda run: (run / state).write_bytes((run / state).read_bytes()[:-2000]), "damaged")
    after("--resume", lambda run: (run / "metrics.jsonl").write_text(""), "metrics.jsonl")
    other = json.dumps(json.loads((whole / "args.json").read_text()) | {"script": "act"})
    after("--resume", lambda run: (run / "args.json").write_text(other), "a run of act, not of nlac")
    after("--resume", lambda run: (run / "args.json").write_text("{"), "damaged")


def test_a_checkpoint_of_another_model_is_refused(run_script, llama, bad_models, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    flags = (
        SMALL.replace("--model tiny", "--model " + "model").replace("--steps 4", "--steps 1")
        + " --max-new-tokens 8 --save-every 1 --out-dir run"
    )
    assert run_script(flags, tmp_path).status == 0
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(bad_models / "wide", tmp_path / "model")
    before = everything_under(tmp_path)
    result = run_script(f"{flags} --resume --steps 2", tmp_path)
    assert everything_under(tmp_path) == before
    refused(result, "--resume", "another")


# ------------------------------------------------------------------------------------------------------ kills and resume

AT = {  # where the run is killed: code, and how many lines of metrics it had written by then
    "in the first evaluation": ("nlac.evaluate = lambda *a: os.kill(os.getpid(), signal.SIGKILL)", 0),
    "between metrics and rollouts": (LOG.format(step=3, name="SIGKILL"), 3),
    "amid the second checkpoint": (CHECKPOINT.format(count=2), 4),
    "before the summary": ("common.Run.finish = lambda *a: os.kill(os.getpid(), signal.SIGKILL)", 4),
    "with a half-written line": ("""
def fatal(run, records):
    with open(run.dir / "rollouts.jsonl", "a") as file:
        file.write('{"step": ')
    os.kill(os.getpid(), signal.SIGKILL)
common.Run.write_rollouts = fatal""", 1),
}  # fmt: skip


@pytest.mark.parametrize("where", AT)
def test_killed_anywhere_and_resumed(killed_and_resumed, whole, where):
    same_run(whole, killed_and_resumed(*AT[where]))


@pytest.mark.parametrize("step, name, status", [(1, "SIGTERM", 143), (4, "SIGINT", 130)])
def test_asked_to_stop_keeps_the_step_and_resumes(run_script, whole, tmp_path, step, name, status):
    result = run_script(f"{SMALL} --out-dir run", tmp_path, LOG.format(step=step, name=name))
    assert result.status == status and "Traceback" not in result.stderr
    assert [row["step"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, step + 1))
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["state"]["step"] == step
    result = run_script(f"{SMALL} --out-dir run --resume", tmp_path)
    assert result.status == 0, result.stderr
    same_run(whole, tmp_path / "run")


def test_more_steps_and_a_finished_run(run_script, whole, tmp_path):
    assert run_script(f"{SMALL} --out-dir run --steps 2", tmp_path).status == 0
    result = run_script(f"{SMALL} --out-dir run --resume", tmp_path)
    assert result.status == 0, result.stderr
    same_run(whole, tmp_path / "run", steps={1, 3, 4})  # step 2 was the last, and evaluated as such
    summary, reference = (json.loads((path / "summary.json").read_text()) for path in (tmp_path / "run", whole))
    for key in "before", "after", "env_steps", "gradient_steps", "train_episodes":
        assert summary[key] == reference[key]
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    result = run_script(f"{SMALL} --out-dir run --resume", tmp_path)  # nothing left to do
    assert result.status == 0 and "Traceback" not in result.stderr
    same_run(whole, tmp_path / "run", steps={1, 3, 4})
