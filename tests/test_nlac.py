"""nlac.py: flags, words, targets, refinement, the comparison, the gate, the loss, leaks, the warm-up, worked examples."""

import copy
import dataclasses
import itertools
import math
import random
import re
import shlex
import time
from collections import Counter, defaultdict
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import PAD, Bigram, lines, trained_on
from transformers import Qwen3Config, Qwen3ForCausalLM

import common
import envs
import nlac

torch.set_num_threads(1)
WORLD = envs.make("repair")
ARGS = dataclasses.replace(nlac.Args(), **nlac.TINY)
ALL_WORLDS = [*envs.WORLDS, "20q", "twenty_questions:listed"]
SMALL = (
    "--model tiny:16x1 --examples 60 --steps 3 --batch-size 8 --micro-batch-size 4 --eval-episodes 4 --eval-every 2 --save-every 2"
    " --episodes-per-step 4 --updates 2 --actor-states 4 --critic-gate 0 --k 2 --max-new-tokens 24 --forecast-tokens 20"
    " --critique-tokens 20"
)

# --------------------------------------------------------------------------------------------------------------- flags

PAPER = {  # the sheet: one future, one round, every refinement taught, shared weights; no anchor, no gate, a plain buffer
    "k": 1, "m": 1, "distil": "all", "frozen_parts": False, "anchor": 0.0, "critic_gate": 0.0, "even_turns": False}  # fmt: skip


def test_defaults_are_the_papers_and_say_so():
    told = {field.name: field.metadata["help"] for field in dataclasses.fields(nlac.Args)}
    assert {name for name, text in told.items() if "(paper)" in text} == set(PAPER)
    args = common.parse_args(nlac.Args, nlac.TINY, ["--model", "Qwen/Qwen2.5-7B-Instruct"])
    assert args == nlac.Args(model="Qwen/Qwen2.5-7B-Instruct") and {name: getattr(args, name) for name in PAPER} == PAPER
    assert args.ablation == "none" and args.micro_batch_size == 1 and args.max_new_tokens >= 512
    nlac.check_args(args)


def test_a_tiny_model_has_its_own_defaults():
    for argv in [], ["--model", "tiny:32x1"], ["--quick"]:
        args = common.parse_args(nlac.Args, nlac.TINY, argv, quick=nlac.QUICK)
        own = nlac.TINY | (nlac.QUICK if args.quick else {})
        assert {name: getattr(args, name) for name in own} == own
        nlac.check_args(args)


def test_the_commands_of_the_docstring_are_accepted():
    commands = re.findall(r"python nlac\.py(.*?)(?:#.*)?$", nlac.__doc__.replace("\\\n", ""), re.M)
    assert len(commands) == 4
    for command in commands:
        nlac.check_args(common.parse_args(nlac.Args, nlac.TINY, shlex.split(command), quick=nlac.QUICK))


BAD = {
    "--k": "0", "--m": "0", "--ema": "1 -0.1 nan", "--buffer-size": "0", "--episodes-per-step": "0", "--updates": "0",
    "--actor-states": "0", "--actor-weight": "-1 inf", "--anchor": "-1 nan", "--critic-gate": "-0.1 1.1 nan", "--margin": "0 5",
    "--reader-temperature": "-1", "--forecast-tokens": "0", "--critique-tokens": "0",
    "--distil": "kept", "--ablation": "none-such", "--frozen-parts": "maybe",
}  # fmt: skip


@pytest.mark.parametrize("flag, value", [(flag, value) for flag, values in BAD.items() for value in values.split()])
def test_impossible_values_are_refused(capsys, flag, value):
    with pytest.raises(SystemExit) as refusal:
        nlac.check_args(common.parse_args(nlac.Args, nlac.TINY, [flag, value]))
    assert refusal.value.code == 2 and flag in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- words

PIECES = [
    "Next: ", " Then: ", "End: ", "success in 3 turns", "failure", ".", "\n", "Action:", "Verdict: ", "great", "Best: 2", "Verdict: bad",
    "<think>", "</think", "<|im_end|>", "\x00", "\x1b[2J", "\r", "\x85", "\u2028", "\ud800", "\U0001f600", " ", "7", "\u0663",
    "A screw is loose. 4 turns left.", "> ", "</episode>", "?", "End:\n",
]  # fmt: skip


def best_reply(tries, named, margin):
    """What nlac.best_replies takes of one state's tries, where the comparison says `named`."""
    parts = SimpleNamespace(world=WORLD, args=nlac.Args(margin=margin), ask=lambda *asked: [named])
    return nlac.best_replies(parts, [["Hello."]], [tries], ())[0]


def read_everything(text):
    """All that is read in a reply, in bounded time and without an exception."""
    action = nlac.action_of(WORLD, text)
    assert len(action.splitlines()) <= 1 and action == action.strip()
    assert nlac.rank(text) in {None, 0, 1, 2, 3, 4} and nlac.foresees_success(text) in {None, False, True}
    sentence = nlac.first_sentence(text)
    assert "\n" not in sentence and sentence == " ".join(sentence.split())
    assert nlac.transcript(WORLD, ["Hello.", text, "Bye."]) == ["Hello.", f"> {action}", "Bye."]
    tries = [nlac.Try(text, action, [text], text), nlac.Try("Action: x", "x", [], "Verdict: bad")]
    assert best_reply(tries, text, 1) in ("", *(t.reply for t in tries)) and nlac.is_whole(WORLD, text) in (True, False)
    form = nlac.in_form(WORLD, text)
    assert not form or nlac.action_of(WORLD, form) == action and form.endswith(nlac.written(action))
    assert all(nlac.is_readable(WORLD, mark, text) in (True, False) for _, mark, *_ in nlac.PARTS.values())
    for message in (nlac.refiner_messages(WORLD, ["Hello."], tries), nlac.evaluator_messages(WORLD, ["Hello."], action, [text])):
        assert message is None or message[-1]["content"].startswith("<episode>\nHello.\n</episode>\n")
    return nlac.rank(text) is not None, nlac.foresees_success(text) is not None


def test_ten_thousand_random_strings_are_read():
    rng, found = random.Random(0), Counter()
    for i in range(10_000):
        if i % 3 == 0:
            text = "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(30)))
        else:
            text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(9)))
        verdict, end = read_everything(text)
        found += Counter(verdict=verdict, end=end)
        assert nlac.in_hindsight(nlac.Future(text, text, None)).startswith("Next: ")
    assert min(found.values()) > 100  # the strings are not all hopeless


@pytest.mark.parametrize("unit", ["a", "\n", "Next: a\nEnd: success in 1", "Verdict: x", "not bad ", ". ", "  ", "Best: 9", "Action: a\n"])
def test_megabytes_take_bounded_time(unit):
    start = time.perf_counter()
    read_everything(unit * (1_000_000 // len(unit)))
    assert time.perf_counter() - start < 8


def test_ends_and_verdicts_as_models_write_them():
    ends = {"Next: x.\nEnd: success in 2 turns.": True, "**End:** **failure**": False, "End: The player fails": False,
            "End: failure\nNo:\nEnd: success": True, "End: No success in the turns left.": False,
            "": None, "failure": False, "End:": None, "End: success or failure": None,
            "In the end it is a success": None}  # fmt: skip
    assert {text: nlac.foresees_success(text) for text in ends} == ends
    verdicts = {"Futures: 4 of 4 succeed. Verdict: great.": 4, "## Verdict:\n\nfair": 2, "Verdict: good, not great": 3,
                "Verdict: bad\nNo.\nVerdict: good": 3, "": None, "The action is good.": None, "Verdict: so-so": None,
                "Verdict: good or fair": None}  # fmt: skip
    assert {text: nlac.rank(text) for text in verdicts} == verdicts
    for mark, texts in ("End", ends), ("Verdict", verdicts):
        assert {text: nlac.is_readable(WORLD, mark, text) for text in texts} == {text: value is not None for text, value in texts.items()}
    actions = {"action: x": True, "Action:": False, "Let me think of it.": False}
    assert {text: nlac.is_readable(WORLD, "Action", text) for text in actions} == actions
    search = envs.make("search")
    search.reset(seed=0)
    assert nlac.is_readable(search, "Action", f"I must look.\n{search.expert()}")  # a tool call needs no mark
    best = {"It is worse. Best: 1": True, "Best: the first": False, "Best:": False, "Try 2": False}
    assert {text: nlac.is_readable(WORLD, "Best", text) for text in best} == best


def test_what_is_taught_ends_with_the_action():
    thought, act = "<think>Hm. Action: wait</think>", "I test.\nAction: check the power"
    taught = {
        act: act, "Action: check the power": "Action: check the power", f"{thought}\n{act}": f"{thought}\n{act}",
        "I test.\n\n**Action:** `check the power`\nThat is safe.\nIt helps.": act, "I test.\n## Action\n\ncheck the power": act,
        "Action: wait\nNo.\nAction: check the power.": "Action: wait\nNo.\nAction: check the power.",
        "**check the power**": "Action: check the power", f"{thought}check the power": f"{thought}Action: check the power",
        "check the power\nor not": "", "": "", "Action:": "", "I think so. Action:\n": "", thought: ""}  # fmt: skip
    assert {reply: nlac.in_form(WORLD, reply) for reply in taught} == taught
    search, form = envs.make("search"), f"I look.\n{nlac.written(CALL)}"
    joined = CALL.replace("\n", "")
    bare = CALL.split("\n")[1]
    assert nlac.in_form(search, f"I look.\n```json\n{bare}\n```") == f"I look.\nAction: {bare}"
    for reply in f"{form}\nThen I read it.", f"I look.\n{CALL}\nSo.", f"I look. {CALL}\nAction: as above", f"I look.\n{joined}":
        assert nlac.in_form(search, reply) == form


def test_an_action_that_a_limit_cut_is_whole_where_its_line_had_ended():
    whole = {"I test.\nAction: check the power\nTh": True, "Action: check the power\n": False, "Action: check the po": False,
             "I test.\nAction:": False, "I test.\nAnd": False, "": False, "Action: wait\nNo. Action: che": False}  # fmt: skip
    assert {reply: nlac.is_whole(WORLD, reply) for reply in whole} == whole
    search = envs.make("search")
    for call in CALL, nlac.written(CALL):
        assert nlac.is_whole(search, f"{call}\nTh") and nlac.is_whole(search, call[:-3])  # all but its tag
        assert not nlac.is_whole(search, call[:-20])


CALL = envs.tool_call("search", "Mira Velden")


@pytest.mark.parametrize("name", ALL_WORLDS)
def test_the_experts_actions_as_the_policy_writes_them_win(name):
    """Whatever stands before Action:, in every world, and through the rollout's own turn."""
    world = envs.make(name)
    for seed in range(10):
        episode = nlac.begin(world, "test", seed)
        while not episode.over:
            thought = ("", "I think this helps.\n", "<think>Action: wait</think>")[seed % 3]
            nlac.take_turn(world, episode, thought + nlac.written(world.expert()))
        assert episode.won and all(episode.valid)
        *steps, last = nlac.transitions(episode)
        assert last.done and last.turns == 1 and not last.then and not any(t.done for t in steps)
        for t, after in zip(steps, [*steps[1:], last]):
            assert t.next_state == after.state and t.then == after.action and t.turns == after.turns + 1
        shown = [line for line in nlac.transcript(world, last.state) if line.startswith("> ")]
        assert shown == [f"> {envs.one_line(action)}" for action in episode.actions[:-1]]


def test_transcripts_show_only_the_last_list_and_no_thought():
    world = envs.make("repair", show_actions=True)
    episode = nlac.begin(world, "train", 0)
    nlac.take_turn(world, episode, "<think>Hm.</think>I look.\nAction: open the case")
    [t] = nlac.transitions(episode)
    text = "\n".join(nlac.transcript(world, t.next_state))
    assert text.count("Possible actions:") == 1 == t.state[0].count("Possible actions:") and text.endswith("renew the belt")
    assert "\n> open the case\n" in text and "Hm" not in text and "I look" not in text


def test_prompts_do_not_contradict_the_world():
    """A tool world asks for a call: it may go on lines of its own behind Action:, and no other part writes one."""
    world = envs.make("search")
    world.reset(seed=0)
    assert nlac.policy_messages(world, ["x"])[0]["content"] == f"{world.system}\n{nlac.POLICY}" and "line" not in nlac.POLICY
    system, user = nlac.successor_messages(world, ["Who?"], CALL)
    assert system["content"] == f"This is what the player of a game is told:\n<game>\n{world.system}\n</game>\n{nlac.SUCCESSOR}"
    assert user["content"] == f"<episode>\nWho?\n</episode>\nNext action: {envs.one_line(CALL)}"


# ------------------------------------------------------------------------------------- the parts, with canned replies

PROMPTS = {part: getattr(nlac, part.upper()) for part in nlac.PARTS}
CHAT = common.Chat(common.tiny_tokenizer(["system\nuser\nassistant\n"], list(PROMPTS.values())))


class Puppet:
    """Stands where `common.generate` does: answers by part, and notes which weights were asked what. `cut`: parts whose limit cuts."""

    def __init__(self, cut=(), **replies):
        self.replies, self.calls, self.limits, self.cut, self.heat = replies, [], {}, cut, {}

    def __call__(self, model, chat, prompts, *, max_new_tokens, temperature, seeds, samples=1, rows=None):
        assert len(seeds) == len(set(seeds)) == len(prompts) * samples and rows
        texts, complete = [], []
        for ids in prompts:
            prompt = chat.tokenizer.decode(ids)
            [part] = [name for name, text in PROMPTS.items() if text in prompt]
            self.calls.append((part, model.name, prompt))
            self.limits[part], self.heat[part] = max_new_tokens, temperature
            reply = self.replies[part]
            texts += [reply(prompt) if callable(reply) else reply for _ in range(samples)]
            complete += [part not in self.cut] * samples
        return common.Replies([chat.encode(text) for text in texts], [], texts, complete)

    def asked(self, part):
        return [prompt for name, _, prompt in self.calls if name == part]


class Weights(SimpleNamespace):
    def __deepcopy__(self, memo):
        copies = self.copies
        return Weights(name=copies.pop(0), max_context=self.max_context, copies=copies)

    def parameters(self):
        return []


@pytest.fixture
def parts_of(monkeypatch):
    def build(puppet, world=WORLD, context=4096, **settings):
        monkeypatch.setattr(common, "generate", puppet)
        model = Weights(name="theta", max_context=context, copies=["bar", "start"])
        return nlac.Parts(model, CHAT, world, dataclasses.replace(nlac.Args(), **settings))

    return build


def played(actions, seed=0, world="repair", **hidden):
    """(transitions, world) after `actions`, (reply, complete) or replies; `hidden` is put in place after the reset."""
    env = envs.make(world)
    episode = nlac.begin(env, "train", seed)
    vars(env).update(hidden)
    for action in actions:
        nlac.take_turn(env, episode, *((action,) if isinstance(action, str) else action))
    return nlac.transitions(episode), env


LOUD = dict(symptom="is too loud", finding="A screw is loose.")
FORECAST = "Next: It works again. End: success in 1 turn."


def test_successor_targets(parts_of):
    won, _ = played(["open the case", "tighten the screw"], **LOUD)
    lost, _ = played(["check the power", "clean the gears"], **LOUD)
    timeout, _ = played(["check the power"] * 5, **LOUD)
    merged = "Next: A screw is loose.\nWhoever sees that tightens it.\nEnd: success in 2 turns."
    puppet = Puppet(policy="I see it.\nAction: tighten the screw", successor=FORECAST, backup=f"\n{merged} ")
    parts = parts_of(puppet, forecast_tokens=31, max_new_tokens=33, reader_temperature=0.2)
    assert nlac.successor_targets(parts, [won[0], won[1], lost[1], timeout[4]], ("b", 1)) == [
        merged, "Next: It works again. End: success in 1 turn.",  # the reward, in words
        "Next: It is still broken. End: failure.", "Next: Nothing unusual. End: failure."]  # fmt: skip
    assert nlac.ending(dataclasses.replace(lost[1], score=0.25)) == "failure, with a score of 0.25 of 1"
    # a' at s', d' after it, and both the seen result and d' at the backup: in that order, all by theta_bar
    assert [call[:2] for call in puppet.calls] == [("policy", "bar"), ("successor", "bar"), ("backup", "bar")]
    assert puppet.limits == {"policy": 33, "successor": 31, "backup": 31}
    assert puppet.heat == {"policy": 0.7, "successor": 0.7, "backup": 0.2}
    (policy,), (successor,), (backup,) = (puppet.asked(part) for part in ("policy", "successor", "backup"))
    s, a, s1 = won[0].state[0], "open the case", "A screw is loose. 4 turns left."
    assert s in policy and a in policy and policy.rstrip().endswith(f"user\n{s1}<|im_end|>\n<|im_start|>assistant")
    assert f"<episode>\n{s}\n> {a}\n{s1}\n</episode>\nNext action: tighten the screw<|im_end|>" in successor
    told = f"Next action: {a}\nSeen after it: {s1}\nThen the player does: tighten the screw\nForecast from there: {FORECAST}<|im_end|>"
    assert f"<episode>\n{s}\n</episode>\n{told}" in backup
    counts = {f"{what}_{part}": value for part in ("policy", "successor", "backup")
              for what, value in (("parse", 1), ("cut", 0), ("lost", 0), ("overlong", 0))}  # fmt: skip
    assert nlac.watch_parts(parts).items() >= counts.items()
    assert parts.counts["successor"]["tokens"] == len(CHAT.encode(FORECAST))


@pytest.mark.parametrize("empty, asked", [
    ("policy", ["policy"]), ("successor", ["policy", "successor"]), ("backup", ["policy", "successor", "backup"])])  # fmt: skip
@pytest.mark.parametrize("text", ["", " \n", "<think>I am not done"])
def test_nothing_comes_of_nothing(parts_of, empty, asked, text):
    """A target from an action or a forecast that came back empty is dropped; nobody is asked about it."""
    steps, _ = played(["open the case", "tighten the screw"], **LOUD)
    puppet = Puppet(**{"policy": "x", "successor": FORECAST, "backup": FORECAST} | {empty: text})
    parts = parts_of(puppet)
    assert nlac.successor_targets(parts, steps, ("b",)) == ["", FORECAST]
    assert [call[0] for call in puppet.calls] == asked
    assert len(nlac.successor_lessons(parts, steps, ("b",))) == 1


def test_what_a_limit_cut(parts_of):
    """A backup is dropped; an action is lost where it was not written yet; a forecast is what it is, but for d' of (2)."""
    steps, _ = played(["open the case", "tighten the screw"], **LOUD)
    for cut, action, kept in ("backup", "Action: x", ""), ("successor", "Action: x", FORECAST), ("policy", "I think", ""), (
        "policy", "I think.\nAction: x", ""), ("policy", "I think.\nAction: x\nAs", FORECAST):  # fmt: skip
        parts = parts_of(Puppet(cut=[cut], policy=action, successor=FORECAST, backup=FORECAST))
        assert nlac.successor_targets(parts, steps, ("b",))[0] == kept
        assert nlac.watch_parts(parts)[f"cut_{cut}"] == 1 and nlac.watch_parts(parts)[f"lost_{cut}"] == (not kept)
    said = dict(policy="Action: x", successor="Next: it", backup=FORECAST, evaluator="Verdict: bad", refiner="y")
    parts = parts_of(Puppet(cut=["successor"], **said))
    assert nlac.successor_targets(parts, steps, ("b",))[0] == ""  # d' without an end says nothing of r
    assert nlac.refine(parts, STATES[:1], ("r",))[0][0].futures == ["Next: it"]
    for said, taught in ("A reason.\nAction: check the pow", []), ("Action: check the power\nTh", ["Action: check the power"]):
        parts = parts_of(Puppet(cut=["refiner"], policy="Action: x", successor=FORECAST, evaluator="Fine.", refiner=said))
        pairs = nlac.policy_lessons(parts, STATES[:1], nlac.refine(parts, STATES[:1], ("r",)), ("c",))
        assert [CHAT.decode(target) for _, target in pairs] == taught and nlac.watch_parts(parts)["lost_refiner"] == (not taught)


def test_a_verdict_that_cannot_be_read_is_none(parts_of):
    """It is counted as unreadable; it lowers no sentiment and is compared with nothing."""
    critiques = {"Ada": "Verdict: great", "Ben": "Verdict: failure", "Cleo": "Well."}
    parts = parts_of(Puppet(policy="Action: x", successor=FORECAST, refiner="Action: y", evaluator=lambda prompt: critiques[who(prompt)]))
    tries = nlac.refine(parts, STATES[:3], ("r",))
    assert nlac.watch_parts(parts)["parse_evaluator"] == pytest.approx(1 / 3)
    assert nlac.watch_refinement(tries) == {"changed": 1, "better": None, "sentiment": 1}
    some = [judged("a", "bad"), judged("b", "great")], [judged("a", "good"), judged("a", "weak")], [judged("a", "?"), judged("b", "great")]
    found = {"changed": pytest.approx(2 / 3), "better": 0.5, "sentiment": pytest.approx((0 + 4 + 3 + 1 + 4) / 20)}
    assert nlac.watch_refinement(some) == found


def test_a_part_that_cannot_be_read_is_named_once(parts_of, capsys):
    parts = parts_of(Puppet(policy="Action: x", successor="Hm.", evaluator="Verdict: bad", refiner="Action: y"))
    for _ in range(2):
        nlac.refine(parts, STATES, ("r",))
        nlac.warn_forgotten(parts)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "0 of 6 replies of successor" in told
    parts.counts["evaluator"].update(asked=20, overlong=20)
    nlac.warn_forgotten(parts)
    assert "prompts of evaluator have no room in the context: see --max-context, --critique-tokens" in capsys.readouterr().err
    parts.counts["refiner"].clear()
    assert "parse_refiner" not in nlac.watch_parts(parts)


def test_a_prompt_beyond_the_context_is_an_empty_reply(parts_of):
    puppet = Puppet(policy="x", successor=FORECAST, backup=FORECAST)
    parts = parts_of(puppet, context=1200)
    steps, _ = played(["y" * 900, "open the case"], **LOUD)
    assert nlac.successor_targets(parts, steps[:1], ("b",)) == [""] and not puppet.calls
    assert nlac.watch_parts(parts)["overlong_policy"] == 1 and nlac.watch_parts(parts)["parse_policy"] == 0
    parts.ask("policy", [nlac.policy_messages(WORLD, [text]) for text in ("x", "y" * 900, "z")], ("p",), samples=2)
    assert nlac.watch_parts(parts)["overlong_policy"] == pytest.approx(3 / 7)  # of replies that were wanted
    terminal = [dataclasses.replace(steps[1], done=True)]  # composed, and too long to be learnt
    assert nlac.successor_lessons(parts, terminal, ("b",)) == []


def test_a_long_observation_leaves_room_for_the_end(parts_of):
    """It is shortened, and what M may still not write to its end is counted."""
    [t], _ = played(["x"])
    t = dataclasses.replace(t, result="word " * 1000, done=True, then="y" * 4000)
    parts = parts_of(Puppet())
    assert len(nlac.in_hindsight(t)) < 700 and nlac.in_hindsight(t).endswith(" ... Then: " + "y" * 300 + " .... End: failure.")
    for limit, overlong in (2000, 0), (20, 1):
        parts.args.forecast_tokens = limit
        found = nlac.watch_lessons(parts, [t], nlac.successor_lessons(parts, [t], ("b",)), [], [])
        assert found == {"lessons": 0, "targets_dropped": 0, "targets_overlong": overlong, "targets_terminal": 1}


def test_mc_backup_asks_nobody(parts_of):
    won, _ = played(["nonsense", "open the case", "tighten the screw"], **LOUD)
    puppet = Puppet()
    targets = nlac.successor_targets(parts_of(puppet, ablation="mc-backup"), won[1:], ("b",))
    assert targets == ["Next: A screw is loose. Then: tighten the screw. End: success in 2 turns.", FORECAST] and not puppet.calls


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("arm", ["none", "mc-backup", "blind-critic", "frozen-critic", "label-only"])
def test_which_weights_answer(parts_of, frozen, arm):
    parts = parts_of(Puppet(), frozen_parts=frozen, ablation=arm)
    theta, bar = ("start", "start") if arm == "frozen-critic" else ("theta", "bar")
    readers = dict.fromkeys(["backup", "evaluator", "refiner", "chooser"], "start" if frozen else "theta")
    expected = {"policy": "theta", "successor": theta} | readers | ({} if frozen else {"backup": "bar"})
    assert {part: parts.weights(part).name for part in nlac.PARTS} == expected
    assert {part: parts.weights(part, True).name for part in ("policy", "successor")} == {"policy": "bar", "successor": bar}


def test_no_copy_of_weights_that_a_setting_does_not_use(parts_of):
    for kept, frozen in (False, {}), (True, {"frozen_parts": True}), (True, {"critic_gate": 0.6}), (True, {"ablation": "frozen-critic"}):
        parts = parts_of(Puppet(), **frozen)
        assert (parts.start is not None) == kept and parts.average is not parts.model
    assert parts_of(Puppet(), ema=0.0).average.name == "theta"


# ---------------------------------------------------------------------------------------------------- critique and refine

NAMES = "Ada Ben Cleo Dina Emil Fay".split()
STATES = [[f"{name} brings a red kettle that is too loud. 5 turns left."] for name in NAMES]


def who(prompt):
    return re.findall(r"(\w+) brings", prompt)[-1]


@pytest.mark.parametrize("m, distil", [(1, "all"), (1, "best"), (3, "all"), (3, "best")])
def test_rounds_of_refinement(parts_of, m, distil):
    """Each try is judged before the next is made, earlier ones are shown; with best the last is judged as well."""
    def refiner(prompt):
        return f"A reason.\nAction: {WORLD.repairs[prompt.count('Try ') % 6]}"

    def evaluator(prompt):
        return f"Seen:\n  {re.findall('Next action: (.+)', prompt)[-1]}. Verdict: bad"

    puppet = Puppet(policy=f"<think>Hm.</think>Well.\nAction: {WORLD.repairs[0]}", successor="Next: x.\nEnd: failure",
                    evaluator=evaluator, refiner=refiner)  # fmt: skip
    tries = nlac.refine(parts_of(puppet, m=m, k=2, distil=distil, critique_tokens=17), STATES, ("r",))
    for some in tries:
        assert [t.action for t in some] == [WORLD.repairs[i % 6] for i in range(m + 1)]
        assert some[0].reply == f"<think>Hm.</think>Well.\nAction: {WORLD.repairs[0]}" and some[1].reply.startswith("A reason.\n")
        judged = [t for t in some if t.critique]
        assert len(judged) == m + (distil == "best") and all(t.futures == ["Next: x.\nEnd: failure"] * 2 for t in judged)
    assert puppet.limits["evaluator"] == 17
    for prompt in puppet.asked("evaluator"):
        assert "Future 1: Next: x. End: failure\nFuture 2: Next: x. End: failure<|im_end|>" in prompt
    prompts = [prompt for prompt in puppet.asked("refiner") if who(prompt) == "Ada"]
    assert len(prompts) == m
    for n, prompt in enumerate(prompts, 1):
        told = []
        for i, a in enumerate(WORLD.repairs[:n], 1):
            told += [f"Try {i}: {a}", *(f"Future {j}: Next: x. End: failure" for j in (1, 2)), f"Critique: Seen: {a}. Verdict: bad"]
        assert prompt.count("</episode>\n" + "\n".join(told) + "<|im_end|>") == 1


def test_an_empty_action_is_not_judged_and_not_taught(parts_of):
    replies = ("", "Action: x"), ("Action: x", ""), ("Action: x", "Action:")
    for (policy, refiner), arm in itertools.product(replies, ("none", "label-only", "blind-critic")):
        puppet = Puppet(policy=policy, successor=FORECAST, evaluator="Verdict: bad", refiner=refiner)
        parts = parts_of(puppet, ablation=arm)
        tries = nlac.refine(parts, STATES, ("r",))
        assert nlac.policy_lessons(parts, STATES, tries, ("c",)) == [] and bool(puppet.asked("refiner")) == bool(policy)


@pytest.mark.parametrize("native", ["", "<think>Hm.</think>\n"])
def test_every_refinement_is_taught_with_its_thoughts_and_so_is_what_was_played(parts_of, native):
    form = f"{native}I test.\nAction: check the power"
    puppet = Puppet(policy="Well.\nAction: x", successor=f"{native}Fine.", evaluator=f"{native}Good.", refiner=f"{form}\nI hope so.",
                    backup=f"{native}{FORECAST}")  # fmt: skip
    parts = parts_of(puppet, anchor=0.3)
    pairs = nlac.policy_lessons(parts, STATES, nlac.refine(parts, STATES, ("r",)), ("c",))
    assert [who(CHAT.tokenizer.decode(prompt)) for prompt, _ in pairs] == NAMES and not puppet.asked("chooser")
    steps, _ = played([f"{form}\nI hope so.", "x"], **LOUD)
    pairs += nlac.anchor_lessons(parts, steps[:1], random.Random(0))
    assert {CHAT.decode(target) for _, target in pairs} == {form}
    [(_, target)] = nlac.successor_lessons(parts, steps[:1], ("b",))  # B_L's thought is not M's, nor does anybody read one
    assert CHAT.decode(target) == FORECAST and not any("Hm." in prompt for part, _, prompt in puppet.calls if part != "policy")


def test_a_try_without_a_critique_is_not_shown(parts_of):
    replies = iter(["Action: y", "Action: z"])
    puppet = Puppet(policy="Action: x", successor=FORECAST, evaluator=lambda prompt: "" if "Next action: y" in prompt else "Verdict: bad",
                    refiner=lambda prompt: next(replies))  # fmt: skip
    [tries] = nlac.refine(parts_of(puppet, m=2), STATES[:1], ("r",))
    assert [one.action for one in tries] == ["x", "y", "z"] and not any("Try 2" in prompt for prompt in puppet.asked("refiner"))


def test_label_only_shows_the_verdict_alone(parts_of):
    puppet = Puppet(policy="Action: x", successor=FORECAST, evaluator="reasons.\nVerdict: Bad, I say", refiner="Action: y", chooser="")
    parts = parts_of(puppet, ablation="label-only", distil="best")
    nlac.policy_lessons(parts, STATES, nlac.refine(parts, STATES, ("r",)), ("c",))
    assert all("\nTry 1: x\nCritique: Verdict: bad.<|im_end|>" in prompt for prompt in puppet.asked("refiner"))
    for prompt in puppet.asked("refiner") + puppet.asked("chooser"):
        assert "reasons" not in prompt and "Next: It works" not in prompt


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_blind_critic_reads_futures_of_others(parts_of, count):
    puppet = Puppet(policy="open the case", successor=lambda prompt: who(prompt), evaluator="Verdict: bad", refiner="check the power")
    for trial in range(8):
        tries = nlac.refine(parts_of(puppet, ablation="blind-critic", k=2, m=2), STATES[:count], ("r", trial))
        for turn in range(2):
            if count == 1:  # there are no others
                assert tries[0][turn].futures == [] and not tries[0][turn].critique
                continue
            read = [some[turn].futures[0] for some in tries]
            assert sorted(read) == sorted(NAMES[:count]) and all(one != name for one, name in zip(read, NAMES))


# ------------------------------------------------------------------------------------------------ the best of judged tries


def judged(action, verdict, words=""):
    return nlac.Try(f"Action: {action}", action, ["x"], f"Futures: {words or action}. Verdict: {verdict}.")


def test_the_try_that_is_named():
    tries = [judged("a", "weak"), judged("b", "great"), judged("c", "great")]
    said = {"Best: 2": 1, "It is sooner.\n**Best:** try 3.": 2, "Best: Try 2, as try 1 fails.": 1,
            "Best: 1 or 2": None, "Best: 4": None, "": None, "b": None}
    for reply, index in said.items():
        assert best_reply(tries, reply, -4) == ("" if index is None else tries[index].reply)
    tied = [judged("a", "great", "same"), judged("b", "weak"), judged("c", "great", "same")]
    assert best_reply(tied, "Best: 3", 1) == tied[0].reply  # the policy's own


def gap(tries, number):
    """The largest margin at which the try with this number is a lesson; None: at no margin."""
    return max((margin for margin in range(-4, 5) if best_reply(tries, f"Best: {number}", margin)), default=None)


def test_gaps_by_hand():
    a, b, c = judged("a", "weak"), judged("b", "great"), judged("c", "bad")
    assert [gap([a, b, c], number) for number in (1, 2, 3)] == [1, 4, -1] and gap([a, b], 2) == 3 and gap([a, b], 1) == -3
    assert gap([b, judged("b", "good")], 1) == 3  # the same action, judged twice: the worse counts, against a bad one
    assert gap([b, judged("b", "bad"), a], 1) == -1 and gap([judged("b", "bad")] * 2, 1) == 0
    assert gap([judged("d", "unclear"), b], 2) is None and gap([b, judged("d", "unclear")], 1) is None


def test_the_best_is_taught_where_it_is_clearly_better(parts_of):
    """At m = 1: the policy's action against one proposal, whichever is better."""
    verdicts = {"Ada": ("bad", "great"), "Ben": ("great", "bad"), "Cleo": ("great", "great"), "Dina": ("fair", "good"),
                "Emil": ("bad", "bad"), "Fay": ("unclear", "great")}  # fmt: skip

    def evaluator(prompt):
        return f"Verdict: {verdicts[who(prompt)]['Next action: check' in prompt]}"

    def chooser(prompt):
        first, second = re.findall(r"Verdict: (\w+)", prompt.split("</episode>")[-1])
        return "Best: 2" if nlac.VERDICTS.index(second) > (nlac.rank(f"Verdict: {first}") or 0) else "Best: 1"

    puppet = Puppet(policy="Mine.\nAction: open the case", successor=FORECAST, evaluator=evaluator,
                    refiner="Better.\nAction: check the power", chooser=chooser)  # fmt: skip
    clear, every = ["Ada better", "Ben mine"], ["Ada better", "Ben mine", "Dina better"]
    for margin, expected in (3, clear), (1, every):
        parts = parts_of(puppet, distil="best", margin=margin)
        pairs = nlac.policy_lessons(parts, STATES, nlac.refine(parts, STATES, ("r",)), ("c",))
        found = [(who(CHAT.tokenizer.decode(prompt)), CHAT.decode(target)) for prompt, target in pairs]
        assert [f"{name} {text.split('.')[0].lower()}" for name, text in found] == expected


def test_what_is_shown_of_an_episode_has_no_empty_critique(parts_of):
    """With --distil all the last refinement is not judged."""
    env = envs.make("repair")
    episode = nlac.begin(env, "train", 0)
    nlac.take_turn(env, episode, "Action: open the case")
    replies = dict(successor=FORECAST, evaluator="Verdict: bad", refiner="Action: y")
    for distil, critiques in ("all", 1), ("best", 2):
        said = nlac.annotated(parts_of(Puppet(**replies), distil=distil), episode, ("s",))["said"]
        assert [text for who, text in said if who == "critique"] == ["Verdict: bad"] * critiques
        assert [who for who, _ in said if who not in ("critique", "future")] == ["world", "act", "refined", "world"]


# ------------------------------------------------------------------------------------------------------- gate and buffer


def test_auc_by_hand():
    one, zero = [[1.0, True, 2], [0.5, True, 2]], [[0.0, False, 2], [0.5, False, 2]]
    assert nlac.auc_by_turn([]) is None and nlac.auc_by_turn(one) is None and nlac.auc_by_turn([[0.5, True, 0], [0.5, False, 0]]) == 0.5
    assert nlac.auc_by_turn([one[0], zero[0]]) == 1 and nlac.auc_by_turn([[0.0, True, 1], [1.0, False, 1]]) == 0
    assert nlac.auc_by_turn(one + zero) == pytest.approx(3.5 / 4)
    late = [[turn / 4, i % 4 < turn, turn] for turn in range(1, 4) for i in range(40)]  # M knows the turn, nothing of the action
    assert nlac.auc_by_turn(late) == 0.5 and nlac.auc_by_turn([[share, came, 0] for share, came, _ in late]) > 0.65  # over all turns


def opens(told, **settings):
    """Whether L2 learns after M told this."""
    return nlac.opens(dataclasses.replace(nlac.Args(), **settings), told, nlac.auc_by_turn(told))


def test_the_gate_opens_when_m_tells_actions_apart():
    good = [[1.0, True, 0], [0.0, False, 0]] * (nlac.WINDOW // 2)
    assert opens(good, critic_gate=0.7) and not opens(good[:-1], critic_gate=0.7)  # a whole window
    assert not opens([[0.5, *rest] for _, *rest in good], critic_gate=0.7) and not opens([[0.5, False, 0]] * nlac.WINDOW, critic_gate=0.7)
    assert opens([]) and not opens([], critic_gate=0.7)  # off: the paper
    assert opens([], critic_gate=1.0, ablation="frozen-critic")  # nobody waits for a critic that never learns


def test_what_m_foretells_and_its_calibration(parts_of):
    won, _ = played(["open the case", "tighten the screw"], **LOUD)
    lost, _ = played(["charge the battery"], **LOUD)
    ends = iter(["End: success", "End: failure", "?", "End: failure", "?", "?"])
    parts = parts_of(Puppet(successor=lambda prompt: next(ends)), k=2)
    rng = SimpleNamespace(choices=lambda some, weights, k: some)
    before = [[1.0, False, 3]]
    found = nlac.foretell(parts, before, won[:1] + lost + won[1:], ("f",), rng)
    assert found == [[1.0, False, 3], [0.5, True, 0], [0.0, False, 0]] and before == found[:1]
    assert nlac.foretell(parts, found * 100, [], ("f",), random.Random(0)) == (found * 100)[-nlac.WINDOW:]
    assert nlac.watch_foretold(found) == {"auc": 1.0, "foretold": 0.5, "came": pytest.approx(1 / 3)}
    assert nlac.watch_foretold([]) == {"auc": None}


def test_the_buffer_is_plain_or_even():
    buffer = [SimpleNamespace(state=[""] * n) for n in [1] * 90 + [3] * 10]
    for even, low, high in (False, 0.07, 0.13), (True, 0.32, 0.41):  # even: by the fourth root of the counts, 3.08 to 1.78
        drawn = nlac.sample(buffer, dataclasses.replace(nlac.Args(), even_turns=even), random.Random(0), 4000)
        assert low < sum(len(t.state) == 3 for t in drawn) / 4000 < high
    assert nlac.sample([], ARGS, random.Random(0), 5) == []


def test_what_was_played_is_imitated_where_no_limit_cut_it(parts_of):
    steps, _ = played([("Action: open the ca", False), ("Action: open the case\nNow", False), "Well.\nAction: x"], **LOUD)
    assert [t.cut for t in steps] == [True, False, False]
    pairs = nlac.anchor_lessons(parts_of(Puppet(), anchor=0.3), steps, random.Random(0))
    assert sorted(CHAT.decode(target) for _, target in pairs) == ["Action: open the case", "Well.\nAction: x"]
    assert nlac.anchor_lessons(parts_of(Puppet()), steps, random.Random(0)) == []


# ---------------------------------------------------------------------------------------------------------------- loss


def loss_of(model, micro, **settings):
    """Parts, as far as a loss needs them."""
    args = dataclasses.replace(nlac.Args(), micro_batch_size=micro, temperature=1.0, **settings)
    return SimpleNamespace(model=model, average=copy.deepcopy(model), chat=PAD, args=args)


def test_nll_by_hand():
    model = Bigram([[0.0] * 4] * 4)
    with torch.no_grad():
        model.table[0] = torch.tensor([1.0, 5.0, 1.0, 1.0]).log()  # after 0: 1/8, 5/8, 1/8, 1/8
    pairs = [([0], [1, 2]), ([3, 3, 0], [0]), ([3, 3], [3])]  # -log p: 5/8 and 1/4; 1/8; 1/4: the prompts do not count
    expected = -(math.log(5 / 8) + math.log(1 / 4) + math.log(1 / 8) + math.log(1 / 4)) / 4
    for micro in 1, 2, 3:
        model.table.grad = None
        assert nlac.nll(loss_of(model, micro), pairs, 0.5) == pytest.approx(expected)  # unweighted
        by_hand = torch.tensor([  # weight / tokens * (p - onehot), summed over the targets that follow this token
            [2 / 8 - 1, 10 / 8 - 1, 2 / 8, 2 / 8], [1 / 4, 1 / 4, -3 / 4, 1 / 4], [0] * 4, [1 / 4, 1 / 4, 1 / 4, -3 / 4]])  # fmt: skip
        torch.testing.assert_close(model.table.grad, 0.5 / 4 * by_hand)


def test_gradient_does_not_depend_on_the_micro_batch():
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=100, initializer_range=0.3, **size)).eval()
    rng, model.max_context = random.Random(0), 100
    pairs = [([rng.randrange(100) for _ in range(rng.randrange(1, 40))], [rng.randrange(100) for _ in range(rng.randrange(1, 9))])
             for _ in range(11)]  # fmt: skip
    total = sum(len(target) for _, target in pairs)
    for prompt, target in pairs:  # from full sequences, one by one
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        (torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum") / total).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for micro, weight in (11, 1.0), (1, 1.0), (4, 0.25):
        model.zero_grad()
        nlac.nll(loss_of(model, micro), pairs, weight)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]) / weight
        assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_an_update_by_hand():
    """SGD on L1 + weight x share of states x L2 + the anchor, then the average."""
    theta = Bigram([[0.0] * 4] * 4)
    parts = loss_of(theta, 1, updates=1, actor_states=4, actor_weight=2.0, anchor=0.5, ema=0.9)
    bar = parts.average
    optimizer = torch.optim.SGD(theta.parameters(), lr=1.0)
    found = nlac.update(parts, optimizer, [([0], [1])], [([1], [2])], [([2], [3])])
    by_hand = torch.full((4, 4), 0.25)
    by_hand[0, 1], by_hand[1, 2], by_hand[2, 3], by_hand[3] = -0.75, -0.75, -0.75, 0.0
    by_hand *= torch.tensor([1.0, 2.0 * 1 / 4, 0.5, 0.0])[:, None]  # one of four states has a lesson
    norm = by_hand.norm().item()
    torch.testing.assert_close(theta.table.detach(), -by_hand / max(1.0, norm))
    torch.testing.assert_close(bar.table.detach(), 0.1 * theta.table.detach())
    assert found["l1"] == found["l2"] == found["anchor"] == pytest.approx(math.log(4)) and found["grad_norm"] == pytest.approx(norm)
    before = theta.table.clone()
    assert nlac.update(parts, optimizer, [], [], []) == {"grad_norm": 0} and torch.equal(before, theta.table)
    parts = loss_of(Bigram([[0.0] * 4] * 4), 1, updates=4, actor_states=4, ema=0.0)  # the mean of those that had lessons
    found = nlac.update(parts, torch.optim.SGD(parts.model.parameters(), lr=0.0), [([0], [1])] * 8, [([1], [2])], [])
    assert found["l1"] == found["l2"] == pytest.approx(math.log(4)) and "anchor" not in found


# --------------------------------------------------------------------------------------------------------------- leaks


@pytest.mark.parametrize("settings", [{}, {"distil": "best", "k": 2}, {"shots": 2, "prefill": True}, {"ablation": "blind-critic"}])
def test_prompts_do_not_change_with_what_is_hidden(parts_of, settings):
    cases = [
        (("repair", ["check the power", "nonsense", "check the power"]), dict(symptom="is too loud", finding="A screw is loose."),
         dict(symptom="is too loud", finding="The gears are dusty.")),
        (("20q", ["Is it an animal?", "Is it a cat?", "nonsense", "Does it fit in a shoebox?"]), dict(hidden="coat"), dict(hidden="piano")),
    ]  # fmt: skip
    for (world, actions), one, other in cases:
        seen = []
        for hidden in one, other:
            steps, env = played(actions, world=world, **hidden)
            puppet = Puppet(policy="open the case", successor=FORECAST, backup=FORECAST, evaluator="Verdict: bad",
                            refiner="check the power", chooser="Best: 1")  # fmt: skip
            parts, states = parts_of(puppet, world=env, env=world, **settings), [t.state for t in steps]
            nlac.successor_targets(parts, [dataclasses.replace(t, done=False) for t in steps], ("b",))
            nlac.policy_lessons(parts, states, nlac.refine(parts, states, ("r",)), ("c",))
            nlac.foretell(parts, [], steps, ("f",), random.Random(0))
            seen.append([(part, prompt) for part, _, prompt in puppet.calls])
        assert seen[0] == seen[1] and {part for part, _ in seen[0]} >= set(PROMPTS) - {"chooser"}


# ------------------------------------------------------------------------------------------------------------- warm-up


def close_to(observed, expected):
    """Pearson's chi-square of counts, within five standard deviations of its mean."""
    keys = [key for key in expected if expected[key] >= 3]
    assert len(keys) > 5 and not [key for key in observed if not expected.get(key)]
    statistic = sum((observed[key] - expected[key]) ** 2 / expected[key] for key in keys)
    assert statistic < len(keys) + 5 * math.sqrt(2 * len(keys)), (statistic, len(keys))


def corpus(name, **settings):
    world, by_part = envs.make(name), defaultdict(list)
    for messages, reply in nlac.warmup(world, dataclasses.replace(ARGS, **settings)):
        system = messages[0]["content"]
        part = next((part for part, text in PROMPTS.items() if system.endswith(f"\n{text}")), "other")
        by_part[part].append((messages, reply))
    return world, by_part


@pytest.fixture(scope="module", params=["repair", "20q"])
def taught(request):
    return corpus(request.param, examples=3000)


def told_futures(text):
    """[(seen, then, turns)] of the lines that tell futures."""
    form = r"Future \d+: Next: (.+?)(?: Then: (.+?)[.])? End: (?:failure|success in (\d+) turns?)[.]$"
    return [(seen, then, int(turns) if turns else None) for seen, then, turns in re.findall(form, text, re.M)]


def told_tries(text):
    """[(action, futures, critique)] of a prompt of pi_r."""
    parts = re.split(r"^Try \d+: ", text.split("</episode>\n")[1], flags=re.M)[1:]
    return [(part.split("\n")[0], told_futures(part), part.split("Critique: ")[1].strip()) for part in parts]


def test_the_policy_imitates_a_random_player(taught):
    world, by_part = taught
    world.reset(seed=0)
    actions, examples = world.admissible(), by_part["policy"]
    assert len(examples) == 3000
    groups = {"first": lambda m: re.sub("^.* that ", "", m[1]["content"]), "last": lambda m: m[-1]["content"], "long": len}
    for group in groups.values():
        observed, expected = Counter(), Counter()
        for messages, reply in examples:
            observed[group(messages), nlac.action_of(world, reply)] += 1
            for action in actions:
                expected[group(messages), action] += 1 / len(actions)
        close_to(observed, expected)
    refused = world.step("say the wings")[0].split(".")[0]  # is met, and never imitated
    assert 10 < sum(refused in messages[-1]["content"] for messages, _ in examples) < 1000


def test_the_readers_only_read_their_prompt(taught):
    """B_L counts one turn on, E counts and quotes, pi_r repeats, follows a hint or does anything untried, and compares."""
    world, by_part = taught
    world.reset(seed=0)
    actions, kinds = world.admissible(), Counter()
    for messages, reply in by_part["backup"]:
        text = messages[1]["content"]
        seen, then, forecast = re.search(r"Seen after it: (.+)\nThen the player does: (.+)\nForecast from there: (.+)$", text).groups()
        [(_, _, turns)] = told_futures(f"Future 1: {forecast}")
        left = world.max_turns - text.count("\n> ")
        assert reply == nlac.in_hindsight(nlac.Future(seen, then, turns + 1 if turns and turns < left else None))
    for messages, reply in by_part["evaluator"]:
        futures = told_futures(messages[1]["content"])
        turns = [n for _, _, n in futures if n]
        hints = [then for _, then, n in futures if n and then]
        assert len(futures) == ARGS.k and reply.startswith(f"Futures: {len(turns)} of {ARGS.k} succeed")
        assert nlac.rank(reply) == len(turns) and (f", at best in {min(turns or [0])} turn" in reply) == bool(turns)
        assert (f"goes on with: {hints[0]}." if hints else "One fails: " if len(turns) < 4 else "succeed") in reply
    for messages, reply in by_part["refiner"]:
        tries, said = told_tries(messages[1]["content"]), nlac.action_of(world, reply)
        action, futures, critique = tries[-1]
        hint = re.search("goes on with: (.+?)[.] Verdict", critique)
        untried = [a for a in actions if a not in [t[0] for t in tries]]
        if nlac.rank(critique) >= 3:
            kinds["repeated"] += said == action
        elif hint and hint[1] in untried:
            kinds["followed"] += said == hint[1]
        else:
            kinds["other"] += said in untried
        assert bool(futures) == critique.startswith("Futures")  # --ablation label-only is practised, too
    assert sum(kinds.values()) == len(by_part["refiner"]) == 3000 and min(kinds.values()) > 200
    for messages, reply in by_part["chooser"]:
        tries = told_tries(messages[1]["content"])
        values = [(len(turns := [n for _, _, n in futures if n]), -min(turns, default=0)) if futures else nlac.rank(critique)
                  for _, futures, critique in tries]  # fmt: skip
        assert values.count(max(values)) == 1 and reply == f"Best: {values.index(max(values)) + 1}"


def test_the_warm_up_knows_no_consequences():
    world, by_part = corpus("repair", examples=4000)
    right = {finding: repair for _, findings in world.faults.values() for finding, repair in findings.items()}
    for part in "successor", "evaluator":
        rows = defaultdict(list)
        for messages, reply in by_part[part]:
            text = messages[1]["content"]
            action = re.search("^Next action: (.+)$", text, re.M)[1]
            symptom = next(symptom for symptom in world.faults if symptom in text.split("\n")[1])
            found = [finding for finding in right if finding in text.split("</episode>")[0]]
            seen, _, turns = told_futures(f"Future 1: {reply}" if part == "successor" else text)[0]
            outcome = turns is not None, seen == "It works again."
            if action in world.tests:
                rows["test", action == world.faults[symptom][0]].append(outcome)
            elif found:
                rows["repair", action == right[found[0]]].append(outcome)
            else:
                rows["guess", action in world.faults[symptom][1].values()].append(outcome)
        for kind, i in itertools.product(("test", "repair", "guess"), (0, 1)):
            assert helpers.rates_differ(*([row[i] for row in rows[kind, good]] for good in (False, True))) < 4, (part, kind, i)


def test_the_warm_up_shows_nothing_of_the_test_split():
    test = {envs.make("repair").reset(seed=seed, options={"split": "test"})[0].split(" that ")[0] for seed in range(3000)}
    text = str(nlac.warmup(envs.make("repair"), dataclasses.replace(ARGS, examples=1000)))
    openings = set(re.findall(r"\w+ brings a \w+ \w+", text))
    assert len(openings) > 100 and len(test) > 80 and not openings & test
    world = envs.make("20q")
    text = str(nlac.warmup(world, dataclasses.replace(ARGS, examples=1000)))
    won = {thing for thing in world.things if f"Yes, it is {world.guess(thing)[6:-1]}!" in text}
    assert len(won) > 10 and not won & set(world.hidden_in["test"])


def test_the_warm_up_is_the_same_twice_and_fits_any_size():
    for sizes in {"k": 1, "m": 1}, {"m": 40}:
        _, by_part = corpus("repair", examples=100, **sizes)
        assert set(by_part) == {*PROMPTS, "other"} and by_part == corpus("repair", examples=100, **sizes)[1]  # the cache is named after it
        assert all(reply.startswith(nlac.PARTS[part][0]) for part in PROMPTS for _, reply in by_part[part])


def test_reasons_move_the_refiner(tiny):
    """After the whole warm-up (minutes): the same futures and verdict, two reasons; the action follows the reason."""
    model, chat = tiny
    parts = nlac.Parts(model, chat, WORLD, dataclasses.replace(ARGS, temperature=0.2))
    states = [[WORLD.reset(seed=seed, options={"split": "train"})[0]] for seed in range(60)]
    failed = [nlac.Future("It is still broken.", "", None)] * 3
    futures, followed, said = [], [], []
    for hint in "charge the battery", "renew the belt":
        futures.append([nlac.Future("Nothing unusual.", hint, 2), *failed])
        told = nlac.tried("check the power", futures[0])
        told.critique = nlac.critique_text(futures[-1])
        assert nlac.rank(told.critique) == 1
        asked = [nlac.refiner_messages(WORLD, state, [told]) for state in states]
        said.append([nlac.action_of(WORLD, reply) for reply in parts.ask("refiner", asked, ("same",))])
        followed.append(said[-1].count(hint) / len(states))
    assert min(followed) > 0.6 and sum(a != b for a, b in zip(*said)) > 40, followed


# -------------------------------------------------------------------------------------------- worked examples, forced words


@pytest.mark.parametrize("name, prefill", [*((name, False) for name in ALL_WORLDS), ("repair", True)])
def test_worked_examples_are_honest_and_in_good_form(name, prefill):
    world = envs.make(name, show_actions=True)
    found = nlac.worked_examples(name, 2, True, 2, 1, prefill, "none")
    assert set(found) == set(nlac.PARTS)
    for part, messages in found.items():
        word, mark, *_ = nlac.PARTS[part]
        lost = part == "chooser" and "full" in name  # nobody wins there by chance: nothing to compare
        assert [m["role"] for m in messages] == ["user", "assistant"] * 2 and all(m["shot"] for m in messages[1::2]) or lost
        for asked, reply in zip(messages[::2], messages[1::2]):
            said, told = reply["content"], asked["content"]
            reasoned = part in ("policy", "refiner", "chooser") and not prefill  # a sentence, as the prompt asks for
            assert said.startswith(word) != reasoned and word in said and len(said) < 3000 and nlac.is_readable(world, mark, said)
            assert part not in ("policy", "refiner") or nlac.action_of(world, said)
            assert part != "evaluator" or "succeeds more often" in said or "as good as any" in said
            assert told.count("Possible actions:") == 1
            if part == "backup":  # a turn that is not the last, and the forecast of the next one, with its own action
                action, forecast = re.search("Then the player does: (.+)\nForecast from there: (.+)$", told).groups()
                [[(_, then, turns)], [(_, _, later)]] = [told_futures(f"Future 1: {text}") for text in (said, forecast)]
                assert then == action and turns == (later and later + 1) and "The game is over" not in told
    if name == "repair":  # a random player wins there: both labels
        for part, read in ("evaluator", nlac.rank), ("backup", nlac.foresees_success):
            assert len({read(m["content"]) for m in found[part][1::2]}) == 2


class Dwindling(envs.RepairShop):
    """Lists what is possible in the first turn alone, and nothing that would end the episode."""

    def admissible(self):
        return [] if self.turns else self.tests


def test_where_nothing_is_listed_a_random_player_says_what_it_read(monkeypatch):
    monkeypatch.setitem(envs.WORLDS, "dwindling", Dwindling)
    found = nlac.worked_examples("dwindling", 2, False, 1, 1, False, "none")
    assert all(len(found[part]) == 4 for part in found if part != "chooser")  # nobody wins
    monkeypatch.setattr(Dwindling, "admissible", lambda self: None)
    _, by_part = corpus("dwindling", examples=60)
    said = {reply.removeprefix("Action: ") for part in ("policy", "refiner") for _, reply in by_part[part]}
    assert len(said) > 10 and "" not in said and all(word in str(by_part["policy"]) for word in said)


def test_forced_words_and_shots_are_no_targets(parts_of):
    """Every part's prompt ends in its word, replies begin with it, and the word is not learnt."""
    replies = dict(policy=" open the case", successor=FORECAST[5:], backup=FORECAST[5:], evaluator=" Verdict: bad",
                   refiner=" check the power")  # fmt: skip
    for forced in {"prefill": True}, {"prefill": True, "shots": 2}:
        puppet = Puppet(**replies)
        parts = parts_of(puppet, **forced)
        steps, _ = played(["Action: open the case", "Action: tighten the screw"], **LOUD)
        pairs = nlac.successor_lessons(parts, steps, ("b",))
        assert [CHAT.decode(target) for _, target in pairs] == [FORECAST[5:]] * 2
        states = [t.state for t in steps]
        tries = nlac.refine(parts, states, ("r",))
        assert [some[-1].reply for some in tries] == ["Action: check the power"] * 2 and tries[0][0].critique == "Futures: Verdict: bad"
        pairs = nlac.policy_lessons(parts, states, tries, ("c",))
        assert [CHAT.decode(target) for _, target in pairs] == [" check the power"] * 2
        for part, _, prompt in puppet.calls:
            assert prompt.endswith("assistant\n" + nlac.PARTS[part][0])
            if part != "policy":
                assert prompt.count("<|im_start|>assistant") == 1 + forced.get("shots", 0)
    puppet = Puppet(**replies)
    nlac.refine(parts_of(puppet), STATES, ("r",))  # nothing of it by default
    assert all(prompt.endswith("assistant\n") and prompt.count("<|im_start|>assistant") == 1 for _, _, prompt in puppet.calls)


class Opened(SimpleNamespace):
    """A chat whose template opens a thought; ids are characters, and the end is a dollar."""

    opened, eos, reply = "<think>", ["$"], common.Chat.reply

    def encode(self, text):
        return list(text)

    def dialogue(self, messages, word):
        return [1]


def test_a_thought_that_the_template_opens_stays_empty():
    """As a template that leaves one empty writes it: an empty line, the tag, an empty line. One that is cut stays a thought."""
    parts = SimpleNamespace(chat=Opened(), args=nlac.Args(), model=SimpleNamespace(max_context=999))
    for text, taught in ("Action: x", "\n</think>\n\nAction: x$"), ("<think>Hm", "Hm$"), (
        "<think>Hm.</think>Action: x", "Hm.</think>Action: x$"):  # fmt: skip
        [(prompt, target)] = nlac.lessons(parts, "policy", [["asked"], None, ["asked"]], [text, text, ""])
        assert prompt == [1] and "".join(target) == taught


# ------------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def main_here(monkeypatch, run_here):
    """nlac.main() in this process -> its `Parts`, with `first`: the weights as they were when it was built."""
    built = []

    class Watched(nlac.Parts):
        def __init__(self, *given):
            super().__init__(*given)
            self.first = copy.deepcopy(self.model.state_dict())
            built.append(self)

    monkeypatch.setattr(nlac, "Parts", Watched)

    def run(flags):
        run_here(flags)
        return built[-1]

    return run


def test_every_parameter_moves_and_frozen_parts_do_not(main_here):
    parts = main_here(f"{SMALL} --out-dir a --ema 0.5 --distil all")
    for (name, now), bar in zip(parts.model.named_parameters(), parts.average.parameters()):
        old = parts.first[name]
        assert not torch.equal(now, old) and not torch.equal(bar, old) and not torch.equal(bar, now), name  # follows, behind
    assert all(torch.equal(value, parts.first[name]) for name, value in parts.start.state_dict().items())
    assert not any(p.grad is not None for model in (parts.average, parts.start) for p in model.parameters())
    episodes = trained_on("a")
    words = Counter(who for row in episodes for who, _ in row["said"])
    assert {"world", "act", "future", "critique", "refined"} == set(words)
    assert len(episodes) == 3 * 4 + 1 and all(len(row["said"]) == 1 + 2 * len(row["valid"]) for row in episodes if row["split"] == "train")


def test_a_frozen_critic_and_no_average(main_here):
    parts = main_here(f"{SMALL} --out-dir b --lr 0.1 --ema 0 --ablation frozen-critic --frozen-parts False --distil all --prefill")
    assert parts.average is parts.model and parts.weights("successor") is parts.weights("successor", True) is parts.start
    assert any(not torch.equal(now, parts.first[name]) for name, now in parts.model.named_parameters())  # L2 still teaches
    assert all(torch.equal(value, parts.first[name]) for name, value in parts.start.state_dict().items())
    metrics = lines("b/metrics.jsonl")
    assert not any({"l1", "targets_dropped"} & set(row) for row in metrics) and any(row.get("l2", 0) > 0 for row in metrics)


def test_a_closed_gate_trains_m_alone_and_the_start_policy_acts(main_here, monkeypatch, capsys):
    actors, rollout = [], nlac.rollout
    monkeypatch.setattr(nlac, "rollout", lambda model, *given, **how: actors.append(model) or rollout(model, *given, **how))
    parts = main_here(f"{SMALL} --out-dir c --critic-gate 1".replace("--critic-gate 0", ""))
    metrics = lines("c/metrics.jsonl")
    assert all(row["lessons"] == 0 and not {"l2", "changed"} & set(row) for row in metrics) and metrics[-1]["l1"] > 0
    assert "warning: --critic-gate 1.0 never opened" in capsys.readouterr().err
    assert sum(actor is parts.start for actor in actors) == 3 and "auc" in metrics[-1]


@pytest.mark.parametrize("flags", [
    "--env 20q --ablation blind-critic", "--ablation mc-backup --k 1 --env search --max-context 1400", "--ablation label-only --m 2",
    "--shots 1 --prefill --show-actions --frozen-parts False --even-turns False --rollout-batch-size 3 --distil all"])  # fmt: skip
def test_other_settings_run(main_here, flags):
    main_here(f"{SMALL} --out-dir d --steps 2 {flags}")
    assert (len(lines("d/metrics.jsonl"))) == 2


def test_eval_only_copies_no_weights_and_shown_episodes_cost_nothing(run_here, monkeypatch):
    run_here(f"{SMALL} --out-dir e --eval-every 1 --distil all --steps 2")
    run_here(f"{SMALL} --out-dir f --eval-every 9 --distil all --steps 2")
    shown, quiet = (lines(f"{name}/metrics.jsonl") for name in "ef")
    assert [row["tokens"] for row in shown] == [row["tokens"] for row in quiet] and "eval_success" in shown[0]
    monkeypatch.setattr(nlac, "Parts", None)  # no copies of weights that nobody asks
    run_here(f"{SMALL} --eval-only")
