"""nlac.py: parsers, targets, refinement, loss, what may leak, whole runs, bad input, kills and resume."""

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
from transformers import Qwen3Config, Qwen3ForCausalLM

import common
import envs
import nlac

torch.set_num_threads(1)
SMALL = (  # of the tiny model that --quick builds too; taught little, it writes unreadable things now and then
    "--model tiny --examples 800 --steps 4 --batch-size 8 --micro-batch-size 4 --eval-episodes 4 --eval-every 2 --save-every 2 "
    "--episodes-per-step 4 --updates-per-episode 0.5 --actor-states 4 --critic-warmup 1 --distil all --max-new-tokens 20"
)
UNTAUGHT = SMALL.replace("--model tiny --examples 800", "--model tiny:16x1 --examples 60 --k 2")


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


def parse_everything(text):
    action = nlac.parse_action(text)
    assert len(action.splitlines()) <= 1 and action == action.strip()
    future = nlac.parse_future(text)
    assert future is None or len(future) == 2 and isinstance(future[0], str) and (future[1] is None or isinstance(future[1], int))
    assert nlac.parse_verdict(text) in {None, 0, 1, 2, 3, 4}
    assert text.strip().startswith(nlac.first_sentence(text))
    assert nlac.transcript(["Hello.", text, "Bye."]) == f"Hello.\n> {action}\nBye."
    assert nlac.transcript([text]) == text
    return future is not None, nlac.parse_verdict(text) is not None


def test_ten_thousand_random_strings_at_every_parser():
    counts = Counter()
    for text in random_strings(10_000):
        future, verdict = parse_everything(text)
        counts += Counter(future=future, verdict=verdict)
        again = nlac.future_text(text, 3)  # whatever is observed can be put down as a future
        assert again.startswith("Next: ") and again.endswith("\nEnd: success in 3 turns.")
    assert counts["future"] > 100 and counts["verdict"] > 100  # the strings are not all hopeless


@pytest.mark.parametrize(
    "unit", ["a", "\n", "Next: ", "Next: a\n", "Next: a\nEnd: success in 1", "Action:", "Verdict: ", "Verdict: x", ". ", "  ", "9"]
)
def test_megabytes_take_bounded_time(unit):
    text = unit * (3_000_000 // len(unit))
    start = time.perf_counter()
    for megabytes in text, f"Next: {text}", f"Next: a\nEnd: success in {text}":
        parse_everything(megabytes)
    assert time.perf_counter() - start < 5


def test_future_round_trip():
    observed = [
        "A screw is loose. 4 turns left.",
        "Yes. 7 things are still possible.",
        "It works again.",
        "No",
        "Is it?  Well.",
        "  padded. x",
    ]
    for text, turns in itertools.product(observed, [None, 1, 2, 20, 9999]):
        future = nlac.future_text(text, turns)
        for dressed in future, f"  {future}\n", future.removesuffix("."):
            assert nlac.parse_future(dressed) == (nlac.first_sentence(text), turns)
    assert nlac.future_text("A screw is loose. 4 turns left.", 1) == "Next: A screw is loose.\nEnd: success in 1 turn."
    assert nlac.parse_future("Next: x\nEnd: failure.") == ("x", None)


@pytest.mark.parametrize("text", [
    "", "failure", "Next: x", "Next: x\nEnd: success", "Next: x\nEnd: success in many turns.", "Next: \nEnd: failure.",
    "End: failure.\nNext: x", "Next: x\nEnd: failure. And more", "Well.\nNext: x\nEnd: failure.", "Next: x\n\nEnd: failure.",
    "Next: x\nEnd: success in -1 turns.", "Next: x\nEnd: success in 12345 turns.",
])  # fmt: skip
def test_unreadable_futures(text):
    assert nlac.parse_future(text) is None


@pytest.mark.parametrize("text, action", [
    ("open the case", "open the case"), (" open the case \nand more", "open the case"),
    ("I think.\nAction: open the case", "open the case"), ("Action: no. Action: yes", "yes"), ("Action:", ""), ("", ""), ("\n\n", ""),
    ("a\x85b", "a"), ("Action:\n\n go", "go"),
])  # fmt: skip
def test_parse_action(text, action):
    assert nlac.parse_action(text) == action


def test_parse_verdict():
    assert [nlac.parse_verdict(f"2 of 4 futures succeed. Verdict: {word}.") for word in nlac.VERDICTS] == [0, 1, 2, 3, 4]
    assert nlac.parse_verdict("Verdict: GREAT") == 4
    assert nlac.parse_verdict("Verdict: so-so") is nlac.parse_verdict("great") is nlac.parse_verdict("") is None


# ------------------------------------------------------------------------------------- the parts, with canned replies

PROMPTS = {name: getattr(nlac, name.upper()) for name in ("policy", "successor", "backup", "evaluator", "refiner")}
WORLD = envs.make("repair")
LINES = [f"{envs.make(name).system}\n{text}" for name in ("repair", "20q") for text in PROMPTS.values()]
CHAT = common.Chat(common.tiny_tokenizer(["system\nuser\nassistant\n"], LINES))


class Puppet:
    """Stands where `common.generate` does: answers by part, and notes which weights were asked what."""

    def __init__(self, **replies):
        self.replies, self.calls = replies, []

    def __call__(self, model, chat, prompts, *, max_new_tokens, temperature, seeds, samples=1, rows=None):
        assert len(seeds) == len(set(seeds)) == len(prompts) * samples and not torch.is_grad_enabled()
        texts = []
        for ids in prompts:
            prompt = chat.tokenizer.decode(ids)
            [part] = [name for name, text in PROMPTS.items() if text in prompt]
            self.calls.append((part, model.name, prompt))
            reply = self.replies[part]
            texts += [reply(prompt) if callable(reply) else reply for _ in range(samples)]
        return common.Replies([chat.encode(text) for text in texts], [], texts, [True] * len(texts))

    def asked(self, part):
        return [prompt for name, _, prompt in self.calls if name == part]


def fake_model(name, context=4096):
    return SimpleNamespace(name=name, config=SimpleNamespace(max_position_embeddings=context), device=torch.device("cpu"))


@pytest.fixture
def parts_of(monkeypatch):
    def build(puppet, world=WORLD, context=4096, **settings):
        monkeypatch.setattr(common, "generate", puppet)
        models = [fake_model(name, context) for name in ("theta", "bar", "start")]
        return nlac.Parts(*models, CHAT, world, dataclasses.replace(nlac.Args(), **settings))

    return build


def played(actions, seed=0, world="repair", **hidden):
    """(transitions, world) after `actions`; `hidden` is put in place after the reset."""
    env = envs.make(world)
    observation, _ = env.reset(seed=seed)
    vars(env).update(hidden)
    episode = {"seed": seed, "history": [observation], "valid": [], "reward": 0.0, "won": False, "over": False}
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
    merged = "Next: A screw is loose.\nEnd: success in 2 turns."
    puppet = Puppet(policy="tighten the screw", successor=FORECAST, backup=f"\n{merged} ")
    parts = parts_of(puppet)
    targets = nlac.bellman_targets(parts, [won[0], won[1], lost[1], timeout[4]], ("bellman", 1))
    assert targets == [
        merged,
        "Next: It works again.\nEnd: success in 1 turn.",  # the reward, in words
        "Next: It is still broken.\nEnd: failure.",
        "Next: Nothing unusual.\nEnd: failure.",
    ]
    # a' at s', d' after it, and both the seen result and d' at the backup: in that order, by theta_bar (B_L: the start weights)
    assert [call[:2] for call in puppet.calls] == [("policy", "bar"), ("successor", "bar"), ("backup", "start")]
    (policy,), (successor,), (backup,) = (puppet.asked(part) for part in ("policy", "successor", "backup"))
    s, a, s1 = won[0]["history"][0], "open the case", "A screw is loose. 4 turns left."
    assert s in policy and a in policy and policy.rstrip().endswith(f"user\n{s1}<|im_end|>\n<|im_start|>assistant")
    assert f"{s}\n> {a}\n{s1}\n> tighten the screw<|im_end|>" in successor
    assert f"{s}\n> {a}\n{s1}\nForecast: {FORECAST}<|im_end|>" in backup
    assert parts.asked == {"policy_bar": 1, "successor_bar": 1, "backup": 1} == parts.parsed
    assert parts.tokens["successor_bar"] == len(CHAT.encode(FORECAST))


@pytest.mark.parametrize(
    "bad", ["", "Next: x", "failure", "As seen, the case is open.", "Next: x\nEnd: success in 2 turns. Then more", "<think>"]
)
def test_malformed_merged_text_is_dropped_and_counted(parts_of, bad):
    steps, _ = played(["open the case", "tighten the screw"], **LOUD)
    parts = parts_of(Puppet(policy="x", successor=bad, backup=bad))
    assert nlac.bellman_targets(parts, steps, ("b",)) == [None, FORECAST]
    assert parts.asked["backup"] == parts.asked["successor_bar"] == 1 and not parts.parsed["backup"] and not parts.parsed["successor_bar"]


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
    assert nlac.bellman_targets(parts, steps[:1], ("b",)) == [None] and not puppet.calls
    assert parts.asked["backup"] == 1 and not any(parts.parsed.values())


# --- refine

HISTORIES = [[f"{name} brings a red kettle that is too loud. 5 turns left."] for name in ("Ada", "Ben", "Cleo", "Dina", "Emil", "Fay")]


def who(prompt):
    return re.findall(r"(\w+) brings", prompt)[-1]


APPROVE, REJECT = "4 of 4 futures succeed. Verdict: great.", "0 of 4 futures succeed. Verdict: bad."


def test_keep_stops_at_once(parts_of):
    for keep in "keep", " Keep.\n", "keep\nbecause it is good":
        puppet = Puppet(policy="open the case", successor=FORECAST, evaluator=APPROVE, refiner=keep)
        refined = nlac.refine(parts_of(puppet, m=3, k=4), HISTORIES, ("r",))
        for r in refined:
            assert r["kept"] and r["reply"] == "open the case" and len(r["tries"]) == 1
            assert r["tries"] == [{"action": "open the case", "futures": [FORECAST] * 4, "critique": APPROVE}]
        for prompt in puppet.asked("evaluator"):
            assert prompt.count(f"Future: {FORECAST}") == 4 and "> open the case\n" in prompt
        assert len(puppet.asked("refiner")) == len(HISTORIES)


@pytest.mark.parametrize("m", [1, 2, 4])
def test_rounds_go_on_until_approved_and_earlier_tries_are_shown(parts_of, m):
    tests = WORLD.repairs

    def refiner(prompt):
        tries = re.findall(r"Try: (.+?)\. (.+)", prompt)
        return "keep" if who(prompt) == "Cleo" and len(tries) == 2 else f"{tests[len(tries) % 4]}"

    puppet = Puppet(
        policy=tests[0],
        successor=FORECAST,
        evaluator=lambda prompt: f"Seen:\n  {re.findall('> (.+)', prompt)[-1]}. Verdict: bad",
        refiner=refiner,
    )
    refined = dict(zip((who(h[0]) for h in HISTORIES), nlac.refine(parts_of(puppet, m=m, k=1), HISTORIES, ("r",))))
    for name, r in refined.items():
        rounds = min(m, 2) if name == "Cleo" else m
        assert [t["action"] for t in r["tries"]] == [tests[i] for i in range(rounds)]
        assert r["kept"] == (name == "Cleo" and m >= 2) and r["reply"] == tests[rounds % 4 if not r["kept"] else rounds - 1]
    prompts = [prompt for prompt in puppet.asked("refiner") if who(prompt) == "Ada"]
    assert len(prompts) == m
    for n, prompt in enumerate(prompts, 1):  # all earlier tries and critiques, oldest first, each on one line
        assert re.findall(r"Try: (.+)", prompt.replace("<|im_end|>", "\n")) == [f"{t}. Seen: {t}. Verdict: bad" for t in tests[:n]]
    assert len([p for p in puppet.asked("refiner") if who(p) == "Cleo"]) == min(m, 2)


def test_an_empty_action_is_never_approved(parts_of):
    for policy, refiner in (
        ("open the case", lambda prompt: "keep" if prompt.count("Try: ") > 1 else ""),
        ("", "keep"),
        (" \n", ""),
        ("x", "Action:"),
    ):
        puppet = Puppet(policy=policy, successor="", evaluator="", refiner=refiner)
        for r in nlac.refine(parts_of(puppet, m=3), HISTORIES, ("r",)):
            assert nlac.parse_action(r["reply"]) or not r["kept"]


def test_given_replies_are_judged_as_they_are(parts_of):
    puppet = Puppet(successor=FORECAST, evaluator=APPROVE, refiner="keep")
    refined = nlac.refine(parts_of(puppet), HISTORIES[:2], ("r",), replies=["I think.\nAction: open the case", "nonsense"])
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
        refined = nlac.refine(parts, HISTORIES[:count], ("r", trial))
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


def prompts_about(parts_of, steps, env, **settings):
    """Every prompt of every part about these transitions, asked through a world in this very state."""
    puppet = Puppet(policy="open the case", successor=FORECAST, backup=FORECAST, evaluator=REJECT, refiner="check the power")
    parts = parts_of(puppet, world=env, **settings)
    nlac.bellman_targets(parts, [t | {"done": False} for t in steps], ("b",))
    nlac.refine(parts, [t["history"] for t in steps], ("r",))
    nlac.calibration(parts, steps, ("c",))
    return [(part, prompt) for part, _, prompt in puppet.calls]


@pytest.mark.parametrize("settings", [{}, {"frozen_parts": False}, {"react": True}, {"ablation": "blind-critic"}])
def test_prompts_do_not_change_with_what_is_hidden(parts_of, monkeypatch, settings):
    if settings.get("react"):
        monkeypatch.setitem(PROMPTS, "policy", nlac.POLICY_REACT)
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
            seen.append(prompts_about(parts_of, steps, env, **settings))
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
    for messages, reply in nlac.warmup(world, dataclasses.replace(nlac.Args(), **settings)):
        system = messages[0]["content"]
        part = next((part for part, text in PROMPTS.items() if system == f"{world.system}\n{text}"), "other")
        by_part[part].append((messages, reply))
    return world, by_part


@pytest.fixture(scope="module", params=["repair", "20q"])
def taught(request):
    return corpus(request.param, examples=3000)


def situation(text):
    """What matters to a player in a transcript: what came in (the symptom), and what was last said."""
    first, last = (
        text.split("\n")[0],
        [line for line in text.split("\n") if not line.startswith(("> ", "Try: ", "Future: ", "Forecast: "))][-1],
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
            observed[group, reply] += 1
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
        tried = re.findall(r"^Try: (.+?)[.] (\d of \d futures succeed. Verdict: \w+[.])$", text, re.M)
        approved = [nlac.parse_verdict(critique) >= nlac.APPROVED for _, critique in tried]
        assert approved and not any(approved[:-1]) and (reply == "keep") == approved[-1]
        untried = [action for action in actions if action not in [action for action, _ in tried]]
        assert len(untried) == len(actions) - len(tried)
        if reply != "keep":
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
            text, action = messages[1]["content"], re.findall("^> (.+)$", messages[1]["content"], re.M)[-1]
            symptom = next(symptom for symptom in world.faults if symptom in text.split("\n")[0])
            found = [finding for finding in right_repairs() if finding in text]
            futures = [nlac.parse_future(reply)] if part == "successor" else [
                nlac.parse_future(f) for f in re.findall(r"^Future: (Next: .+\nEnd: .+)$", text, re.M)]  # fmt: skip
            assert futures and all(futures) and (part == "successor" or len(futures) == nlac.Args().k)
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
        told = re.search(r"^> (?:.+)\n(.+)\nForecast: (Next: .+\nEnd: .+)$", text, re.M)
        turns, left = nlac.parse_future(told[2])[1], world.max_turns - text.count("\n> ") + 1
        assert reply == nlac.future_text(told[1], turns + 1 if turns and turns < left else None)
    for messages, reply in by_part["evaluator"]:
        ends = re.findall(r"^End: (.+)$", messages[1]["content"], re.M)
        verdicts[tuple(sorted(ends))].add(reply)
        assert int(reply[0]) == sum("success" in end for end in ends) and nlac.parse_verdict(reply) is not None
    assert all(len(replies) == 1 for replies in verdicts.values())
    assert {nlac.parse_verdict(reply) for replies in verdicts.values() for reply in replies} == {0, 1, 2, 3, 4}


def test_warm_up_shows_nothing_of_the_test_split():
    test = {envs.make("repair").reset(seed=seed, options={"split": "test"})[0].split(" that ")[0] for seed in range(3000)}
    text = str(nlac.warmup(envs.make("repair"), dataclasses.replace(nlac.Args(), examples=1000)))
    openings = set(re.findall(r"\w+ brings a \w+ \w+", text))
    assert len(openings) > 100 and len(test) > 80 and not openings & test
    world = envs.make("20q")
    text = str(nlac.warmup(world, dataclasses.replace(nlac.Args(), examples=1000)))
    won = {thing for thing in world.things if f"Yes, it is {envs.PHRASES[thing]}!" in text}
    assert len(won) > 10 and not won & set(world.hidden_in["test"])


def test_warm_up_formats_are_what_the_parts_write():
    for settings in {"react": True}, {"k": 1, "m": 1}, {"m": 40}:
        _, by_part = corpus("repair", examples=200, **settings)
        assert set(by_part) >= {"successor", "backup", "evaluator", "refiner", "other"}
        for part, parse in nlac.Parts.PARSERS.items():
            assert all(parse(reply) is not None for _, reply in by_part.get(part, []))
    examples = dataclasses.replace(nlac.Args(), examples=100)
    assert nlac.warmup(envs.make("repair"), examples) == nlac.warmup(envs.make("repair"), examples)  # the cache is named after it


# ---------------------------------------------------------------------------------------------------- whole runs: set-up


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
    for piece in "before: success", "\nbefore\n", "\nafter\n", "critique:", "random", "expert", "rollouts.jsonl", "success":
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


def test_the_same_seed_gives_the_same_metrics_and_another_does_not(run_script, whole, tmp_path):
    assert run_script(f"{SMALL} --out-dir again", tmp_path).status == 0
    same_run(whole, tmp_path / "again")
    assert run_script(f"{SMALL} --out-dir other --seed 9223372036854775807 --steps 1", tmp_path).status == 0
    assert lines(tmp_path / "other" / "rollouts.jsonl")[0]["history"] != lines(whole / "rollouts.jsonl")[0]["history"]


def test_other_settings_run(run_script, tmp_path):
    small = UNTAUGHT.replace("--steps 4", "--steps 2").replace("--eval-every 2", "--eval-every 1")
    for i, (flags, arm) in enumerate([
        ("--env 20q --ablation blind-critic --distil kept", "blind-critic"), ("--react True --frozen-parts False --ema 0", "none"),
        ("--ablation mc-backup --k 1 --m 1", "mc-backup"),
    ]):  # fmt: skip
        result = run_script(f"{small} --out-dir {i} {flags}", tmp_path)
        assert result.status == 0, result.stderr
        assert json.loads((tmp_path / str(i) / "summary.json").read_text())["arm"] == arm
    assert all(row["targets_dropped"] == 0 for row in lines(tmp_path / "2" / "metrics.jsonl"))


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
    assert all(row["l1"] == 0 for row in lines("b/metrics.jsonl")) and lines("b/metrics.jsonl")[-1]["l2"] > 0
    prompts = [nlac.successor_messages(WORLD, history, "open the case") for history in HISTORIES]
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
    text=[WORLD.system, nlac.SUCCESSOR, nlac.BACKUP, nlac.EVALUATOR, nlac.REFINER, FORECAST, *envs.make("20q").moves],
)


def test_a_llama_without_a_clue_runs_through_every_line(run_script, llama, tmp_path):
    flags = SMALL.replace("--model tiny", "--model " + str(llama)).replace("--steps 4", "--steps 2") + " --max-new-tokens 12"
    result = run_script(f"{flags} --out-dir run --eval-every 1", tmp_path)
    assert result.status == 0, result.stderr
    metrics, rollouts = lines(tmp_path / "run" / "metrics.jsonl"), lines(tmp_path / "run" / "rollouts.jsonl")
    parsed = {key: value for key, value in metrics[-1].items() if key.startswith("parse_")}
    assert set(parsed) == {f"parse_{p}" for p in ("policy", "policy_bar", "successor", "successor_bar", "backup", "evaluator", "refiner")}
    assert parsed["parse_successor"] == parsed["parse_backup"] == parsed["parse_evaluator"] == 0  # generated, read, counted as malformed
    assert metrics[-1]["targets_dropped"] > 0 and metrics[-1]["valid"] == 0 and metrics[-1]["l2"] > 0 and metrics[-1]["tokens"] > 0
    assert all(len(row["valid"]) == 5 for row in rollouts)
    trained, chat = common.load(str(tmp_path / "run" / "model"))
    start, _ = common.load(str(llama))
    assert all(not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters()))
    assert chat.prompt([{"role": "user", "content": "Hi"}]) == common.Chat(chat.tokenizer).prompt([{"role": "user", "content": "Hi"}])


def test_a_context_that_fills_up_ends_episodes(run_script, llama, tmp_path):
    room = len(common.load(str(llama))[1].prompt(nlac.policy_messages(WORLD, [WORLD.reset(seed=0)[0]], nlac.Args()))) + 60
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
    ("--reader-temperature -1", "--reader-temperature"), ("--eval-episodes 0", "--eval-episodes"), ("--eval-every 0", "--eval-every"),
    ("--save-every -1", "--save-every"), ("--seed -1", "--seed"), ("--k 0", "--k"), ("--m -1", "--m"), ("--ema 1", "--ema"),
    ("--ema -0.1", "--ema"), ("--ema nan", "--ema"), ("--buffer-size 0", "--buffer-size"),
    ("--episodes-per-step 0", "--episodes-per-step"), ("--actor-states 0", "--actor-states"), ("--actor-weight -1", "--actor-weight"),
    ("--actor-weight inf", "--actor-weight"), ("--anchor -1", "--anchor"), ("--anchor nan", "--anchor"),
    ("--critic-warmup -1", "--critic-warmup"), ("--examples 0", "--examples"), ("--updates-per-episode 0", "--updates-per-episode"),
    ("--updates-per-episode -1", "--updates-per-episode"), ("--updates-per-episode nan", "--updates-per-episode"),
    ("--episodes-per-step 3 --updates-per-episode 0.5", "whole number"), ("--ablation none-such", "--ablation"),
    ("--distil some", "--distil"), ("--frozen-parts maybe", "--frozen-parts"), ("--nonsense 1", "--nonsense"),
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
