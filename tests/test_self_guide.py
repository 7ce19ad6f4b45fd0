"""self_guide.py: parser, trust schedule, advantages, loss, masks, warm-up, whole runs, arms, bad input, kills and resume."""

import copy
import dataclasses
import functools
import json
import math
import random
import re
import signal
import time
from collections import Counter, defaultdict
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import CHECKPOINT, LOG, PAD, SUMMARY, WORDS, Bigram, everything_under, lines, random_episodes, random_table, refused, same_run
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import envs
import self_guide as sg

torch.set_num_threads(1)
ENV = "repair"
WORLD = envs.make(ENV)
SMALL = (  # of the tiny model that --quick builds too; taught little, it writes unreadable things now and then
    f"--env {ENV} --model tiny --examples 1500 --steps 4 --batch-size 8 --micro-batch-size 4 --group-size 4 --updates 1 --eval-episodes 4 "
    "--eval-every 2 --save-every 2 --max-new-tokens 20"
)
ARGS = dataclasses.replace(
    sg.Args(), env=ENV, model="tiny", examples=1500, max_new_tokens=20, batch_size=8, group_size=4, micro_batch_size=4, updates=1, kl=0.0,
    temperature=1.0,
)


# ------------------------------------------------------------------------------------------------------------- parsers


@pytest.mark.parametrize("reply, label", [
    ("Reason: The case is open.\nLabel: positive", 1), ("Reason: Nothing new.\nLabel: neutral", 0),
    ("Reason: Stuck.\nLabel: negative", -1), ("reason: x\nlabel: Positive.", 1), ("Reason: x\nLABEL: NEGATIVE\n", -1),
    ("Reason: x\nLabel: **neutral**", 0), ("Label: positive", None), ("Reason: x\nLabel:positive", 1),
    ("Reason: x\nLabel: positively", None), ("Reason: x\nLabel: good", None), ("Reason: x\nLabel:", None), ("positive", None), ("", None),
    ("Reason: positive\n", None), ("Reason: x\nLabel: not positive", None), ("Reason: x\nLabel: po\u017fitive", None),
    ("Reason: x\nLabel: pos\u0131tive", None),
    (f"Reason: x\n{sg.GUIDED}", None),  # repeating the instructions is no rating, let alone a positive one
    ("Reason: x\nLabel: positive, neutral or negative.", None), ("Reason: x\nLabel: negative|neutral|positive", None),
])  # fmt: skip
def test_parse_rating(reply, label):
    assert sg.parse_rating(reply) == label


PIECES = st.sampled_from([
    "Label:", "label: ", "Reason: ", "positive", "neutral", "NEGATIVE", "po\u017fitive", "negat\u0130ve", "\n", "\r", "\x85", "\u2028",
    " ", "\t", "**", ".", "\x00", "\ud800", "\U0001f600", "<think>", "Label", "Label: positive\n",
])  # fmt: skip


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=8).map("".join), st.lists(st.one_of(PIECES, st.text(max_size=4)),
                                                                                            max_size=8).map("".join)))  # fmt: skip
def test_no_string_upsets_a_parser(text):
    assert sg.parse_rating(text) in (None, -1, 0, 1)
    action = sg.parse_action(text)
    assert len(action.splitlines()) <= 1 and action == action.strip()
    sg.event(text)


@pytest.mark.parametrize("unit", ["Label:", "Label: ", " ", "\n", "Label:\n", "a", "Label: positive", ". "])
def test_megabytes_take_bounded_time(unit):
    text, start = unit * (1_000_000 // len(unit)), time.process_time()
    for long in text, "Label:" + text:
        sg.parse_rating(long), sg.parse_action(long), sg.event(long)
    assert time.process_time() - start < 5


def test_parse_action():
    cases = {"open the case": "open the case", " open the case \nand more": "open the case", "": "", "\n\n": "", "\n go ": "go"}
    assert {text: sg.parse_action(text) for text in cases} == cases


def test_an_unreadable_rating_is_a_counted_neutral():
    episode = dict(score=1.0, labels=[None, 1, -1, None, 1], ratings=[""] * 5, valid=[True] * 5, history=["a. 5 turns left."] * 11,
                   won=True, truncated=False)  # fmt: skip
    assert sg.rewards(sg.Args(), episode) == (10.0, pytest.approx(0.1))
    assert sg.total_reward(sg.Args(), episode, 0.5) == pytest.approx(10.05) and sg.total_reward(sg.Args(), episode, 0.0) == 10.0
    seen = sg.watch([episode])
    assert seen["label_malformed"] == 2 / 5 and seen["label_positive"] == 2 / 5 and seen["label_negative"] == 1 / 5
    assert seen["label_neutral"] == 0 and seen["ratings_if_won"] == 1 and seen["ratings_if_lost"] is None


# ------------------------------------------------------------------------------------------------------- trust schedule


def test_trust_at_its_corners():
    args, tiny = sg.Args(), 1e-9
    corners = [sg.trust(args, point + d) for point in args.trust_points for d in (-tiny, 0.0)]
    assert corners == pytest.approx([0, 0, 1, 1, 1, 1, 0, 0], abs=1e-6)
    assert corners[0] == corners[1] == corners[7] == 0 and corners[3] == corners[4] == 1  # exactly
    assert sg.trust(args, 0.0) == sg.trust(args, 0.99) == 0 and sg.trust(args, 0.6) == 1
    run = [sg.trust(args, step / 100) for step in range(100)]  # the paper's 100 steps
    by_hand = [0] * 40 + [k / 10 for k in range(10)] + [1] * 20 + [1 - k / 10 for k in range(10)] + [0] * 20
    assert run == pytest.approx(by_hand, abs=1e-9)


def test_trust_of_the_other_arms():
    arm = lambda name: [sg.trust(dataclasses.replace(sg.Args(), trust=name), share / 100) for share in range(100)]  # noqa: E731
    assert arm("zero") == [0.0] * 100 and arm("immediate") == [1.0] * 100
    assert arm("no-anneal") == [*arm("schedule")[:70], *[1.0] * 30]
    edges = dataclasses.replace(sg.Args(), trust_points=[0.0, 0.25, 0.5, 1.0])
    assert [sg.trust(edges, share) for share in (0, 0.125, 0.25, 0.5, 0.75)] == pytest.approx([0, 0.5, 1, 1, 0.5])


# ----------------------------------------------------------------------------------------------------- advantages, loss


def test_group_advantages_by_hand():
    # 1, 2, 3: mean 2, sample deviation 1; 0, 0, 10: mean 10/3, deviation 10 / sqrt(3)
    found = sg.group_advantages([1, 2, 3, 0, 0, 10], 3)
    assert found == pytest.approx([-1, 0, 1, -1 / 3**0.5, -1 / 3**0.5, 2 / 3**0.5], abs=1e-5)
    assert sg.group_advantages([0.1] * 4 + [10.0] * 4, 4) == [0.0] * 8  # exactly, whatever rounding does to the mean
    assert sg.without_spread([0.1, 0.1, 0.1, 1, 0, 0, 2, 2, 2], 3) == 2
    assert sg.group_advantages([5, 1], 2) == pytest.approx([0.5**0.5, -(0.5**0.5)], abs=1e-5)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(2, 8), st.data())
def test_group_advantages_against_another_derivation(size, data):
    values = data.draw(st.lists(st.floats(-20, 20), min_size=3 * size, max_size=3 * size))
    found = sg.group_advantages(values, size)
    for g in range(3):
        group, mine = values[g * size : (g + 1) * size], found[g * size : (g + 1) * size]
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
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    torch.testing.assert_close(sg.token_weights(mask, "grpo", 2, 3), torch.tensor([[0, 0.25, 0.25, 0], [0.5, 0, 0, 0]]))
    torch.testing.assert_close(sg.token_weights(mask, "dapo", 2, 3), mask / 3)
    torch.testing.assert_close(sg.token_weights(mask, "dapo", 2, 30), mask / 30)  # of the whole batch, not of what is at hand


def bigram_update(table, reference, episodes, advantages, args, lr):
    model = Bigram(table)
    metrics = sg.update(model, Bigram(reference), PAD, args, torch.optim.SGD(model.parameters(), lr=lr), episodes, advantages)
    return model.table.detach(), metrics


def test_the_first_step_by_hand():
    zeros = [[0.0] * WORDS] * WORDS
    episodes = [dict(ids=[1, 2, 3], mask=[0, 1, 1], logprob=2 * math.log(0.2)), dict(ids=[1, 4, 4], mask=[0, 0, 1], logprob=math.log(0.2))]

    def row(i):  # gradient of log p of word i
        return torch.eye(WORDS)[i] - 0.2

    for estimator, weights, loss in ("grpo", (0.25, 0.25, 0.5), 0.0), ("dapo", (1 / 3,) * 3, -1 / 3):
        args = dataclasses.replace(ARGS, estimator=estimator, temperature=1.0, micro_batch_size=1)
        after, metrics = bigram_update(zeros, zeros, episodes, [1.0, -1.0], args, 1.0)
        by_hand = torch.zeros(WORDS, WORDS)  # lr * weight * A * gradient; ratio 1
        for last, word, weight in (1, 2, weights[0]), (2, 3, weights[1]), (4, 4, -weights[2]):
            by_hand[last] += weight * row(word)
        torch.testing.assert_close(after, by_hand)
        assert metrics["loss"] == pytest.approx(loss, abs=1e-6) and metrics["clipped"] == 0 and metrics["grad_norm"] == pytest.approx(
            by_hand.norm().item())  # fmt: skip
        assert metrics["entropy"] == pytest.approx(math.log(5)) and metrics["logprob_gap"] == pytest.approx(0, abs=1e-6)


def derived(table, reference, episodes, advantages, args, lr):
    """The same steps in float64, token by token, from the paper's formulas."""
    def logp(table, e):
        rows = torch.log_softmax(table[torch.tensor(e["ids"][:-1])] / args.temperature, -1)
        return {t: rows[t - 1, e["ids"][t]] for t in range(1, len(e["ids"])) if e["mask"][t]}

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
        losses.append(float(loss))
        table = (theta - lr * g * min(1, 1 / (norms[-1] + 1e-6))).detach()
    mean = lambda x: sum(x) / len(x)  # noqa: E731
    return table, dict(loss=mean(losses), kl=mean(kls) if args.kl else 0, clipped=mean(outside), grad_norm=mean(norms))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.sampled_from(["grpo", "dapo"]), st.sampled_from([(0.2, 0.28), (0.02, 0.05), (0.1, 0.1)]),
       st.sampled_from([0.0, 0.3]), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3, 100]), st.sampled_from([1.0, 0.7]))  # fmt: skip
def test_loss_and_gradient_against_another_derivation(seed, estimator, clips, kl, updates, micro, temperature):
    rng = random.Random(seed)
    table, reference, episodes = random_table(rng), random_table(rng), random_episodes(rng, 6)
    advantages = [rng.choice([0.0, rng.gauss(0, 1)]) for _ in episodes]
    args = dataclasses.replace(ARGS, estimator=estimator, clip=clips[0], clip_high=clips[1], kl=kl, updates=updates, micro_batch_size=micro,
                               temperature=temperature)  # fmt: skip
    after, metrics = bigram_update(table, reference, episodes, advantages, args, 2.0)
    expected, numbers = derived(table, reference, episodes, advantages, args, 2.0)
    torch.testing.assert_close(after.double(), expected, atol=2e-4, rtol=1e-4)
    for name, value in numbers.items():
        assert metrics[name] == pytest.approx(value, abs=2e-4), name
    if updates == 1:
        assert metrics["clipped"] == 0


# ------------------------------------------------------------------------------------------------------- a tiny model


def play(model, chat, seeds, guided=True, args=ARGS, **settings):
    return sg.rollout(model, chat, args, "train", seeds, guided=guided, **dict(temperature=1.0, stream=("test",)) | settings)


@pytest.fixture(scope="module")
def batch(tiny):
    return play(*tiny, [0] * 4 + [1] * 4)


def trained(tiny, episodes, advantages, **settings):
    """(flat weights after one update by plain gradient descent, its metrics)"""
    model, args = copy.deepcopy(tiny[0]), dataclasses.replace(ARGS, **settings)
    metrics = sg.update(model, tiny[0], tiny[1], args, torch.optim.SGD(model.parameters(), lr=1.0), episodes, advantages)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), metrics


ADVANTAGES = [1.0, -0.5, 0.25, -0.75, 0.3, 0.6, -1.2, 0.3]


@pytest.mark.parametrize("settings", [dict(kl=0.1), dict(estimator="dapo"), dict(updates=2, clip=0.01, kl=0.1)])
def test_the_step_does_not_depend_on_the_micro_batch(tiny, batch, settings):
    start = torch.cat([p.detach().flatten() for p in tiny[0].parameters()])
    (whole, metrics), *others = [trained(tiny, batch, ADVANTAGES, micro_batch_size=size, **settings) for size in (8, 1, 3)]
    assert (whole - start).norm() > 0.01
    for weights, numbers in others:
        assert (weights - whole).norm() < 1e-4 * (whole - start).norm()
        assert numbers == pytest.approx(metrics, rel=1e-3, abs=1e-6)


def test_before_the_first_update_the_ratio_is_one(tiny, batch):
    lengths = [sum(e["mask"]) for e in batch]
    _, metrics = trained(tiny, batch, ADVANTAGES)
    assert metrics["clipped"] == 0 and metrics["loss"] == pytest.approx(-sum(ADVANTAGES) / 8, abs=1e-5)
    _, metrics = trained(tiny, batch, ADVANTAGES, estimator="dapo", kl=0.5)
    assert metrics["loss"] == pytest.approx(-sum(a * n for a, n in zip(ADVANTAGES, lengths)) / sum(lengths), abs=1e-5)
    assert metrics["clipped"] == 0 and metrics["kl"] == pytest.approx(0, abs=1e-6) and abs(metrics["logprob_gap"]) < 1e-4


def test_equal_rewards_teach_exactly_nothing(tiny, batch):
    for estimator in "grpo", "dapo":
        weights, metrics = trained(tiny, batch, sg.group_advantages([0.3] * 4 + [10.0] * 4, 4), estimator=estimator, updates=2)
        assert torch.equal(weights, torch.cat([p.detach().flatten() for p in tiny[0].parameters()])) and metrics["grad_norm"] == 0


def test_decoding_and_the_training_forward_agree(tiny, monkeypatch):
    kept = []
    init = common.Dialogues.__init__
    monkeypatch.setattr(common.Dialogues, "__init__", lambda self, *a: kept.append(self) or init(self, *a))
    for temperature in 1.0, 0.7:
        episodes = play(*tiny, [3] * 4, temperature=temperature)
        args = dataclasses.replace(ARGS, temperature=temperature)
        for i, row in enumerate(sg.old_logprobs(*tiny, args, episodes)):
            assert (row - torch.tensor(kept[-1].logprobs[i][1:len(episodes[i]["ids"])])).abs().max() < 1e-4
            assert episodes[i]["logprob"] == pytest.approx(row.sum().item(), abs=1e-3)
    with pytest.raises(AssertionError):  # and the temperature matters
        assert (sg.old_logprobs(*tiny, ARGS, episodes)[0] - torch.tensor(kept[-1].logprobs[0][1:])).abs().max() < 1e-4


# --------------------------------------------------------------------------------------------------- what is trained on


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("limit", [3, 20])
def test_the_mask_is_what_was_sampled(tiny, guided, limit):
    """Rebuilt from the texts: prompts, observations and forced end tokens are under mask 0, replies and their own ends under 1."""
    model, chat = tiny
    cut = 0
    for e in play(model, chat, range(6), guided, dataclasses.replace(ARGS, max_new_tokens=limit)):
        assert len(e["ids"]) == len(e["mask"]) and set(e["mask"]) <= {0, 1} and not e["truncated"]
        position = 0

        def take(mask, length, e=e):
            nonlocal position
            assert e["mask"][position : position + length] == [mask] * length
            position += length
            return e["ids"][position - length : position]

        given = chat.dialogue(sg.opening(WORLD, e["history"][0], guided))
        for t in range(len(e["valid"])):
            replies = [e["ratings"][t]] if guided else []
            for text in [*replies, e["history"][2 * t + 1]]:
                assert take(0, len(given)) == given
                length = next((n for n in range(limit) if e["mask"][position + n : position + n + 1] != [1]), limit)
                length = next((n + 1 for n in range(length) if e["ids"][position + n] in chat.eos), length)  # what follows an end is not it
                reply = take(1, length)
                assert length >= 1 and chat.decode(reply) == text
                given = [] if reply[-1] in chat.eos else chat.eos[:1]  # a forced end token
                cut += bool(given)
                assert given == [] or length == limit
                given = given + (chat.turn(sg.ACT) if guided and text is e["ratings"][t] else [])
            if t + 1 < len(e["valid"]):
                given = given + chat.turn(e["history"][2 * t + 2] + (f"\n{sg.RATE}" if guided else ""))
        assert position == len(e["ids"])  # nothing behind the last sampled token
        assert len(e["labels"]) == len(e["ratings"]) == guided * len(e["valid"])
        assert e["labels"] == [sg.parse_rating(rating) for rating in e["ratings"]]
    assert cut or limit == 20


def test_other_logits_do_not_matter(tiny, batch):
    plain, metrics = trained(tiny, batch, ADVANTAGES, kl=0.0, updates=2)
    for sampled in False, True:

        def disturb(module, _, kwargs, output, sampled=sampled):
            ids, noise = kwargs["input_ids"], torch.zeros_like(output.logits)
            for row, out in zip(ids.tolist(), noise):
                found = max((e for e in batch if row[: len(e["ids"])] == e["ids"]), key=lambda e: len(e["ids"]))
                for t in range(len(row)):
                    here = t + 1 < len(found["ids"]) and found["mask"][t + 1] == 1
                    if here == sampled:
                        out[t, t % out.shape[1]] = 7.0
            output.logits = output.logits + noise
            return output

        other = copy.deepcopy(tiny[0])
        other.register_forward_hook(disturb, with_kwargs=True)
        weights, numbers = trained((other, tiny[1]), batch, ADVANTAGES, kl=0.0, updates=2)
        assert torch.equal(weights, plain) == (not sampled) and (numbers == metrics) == (not sampled)


def test_episodes_do_not_depend_on_their_batch(tiny):
    seeds = [5, 5, 6, 6, 7, 7]
    for guided in True, False:
        whole = play(*tiny, seeds, guided)
        texts = lambda episodes: [(e["history"], e["ratings"], e["ids"], e["mask"]) for e in episodes]  # noqa: E731
        assert texts(whole) == texts(play(*tiny, seeds, guided))
        for count in 1, 3, 5:
            assert texts(play(*tiny, seeds[:count], guided)) == texts(whole[:count])
        assert whole[0]["history"] != whole[1]["history"]  # two episodes of one task
        assert whole[0]["history"][0] == whole[1]["history"][0] != whole[2]["history"][0]
        assert texts(play(*tiny, seeds, guided, stream=("other",))) != texts(whole)


@pytest.mark.parametrize("guided", [True, False])
def test_a_full_context_ends_the_episode(tiny, guided):
    model, chat = copy.deepcopy(tiny[0]), tiny[1]
    full = play(model, chat, range(12), guided)
    long = max(full, key=lambda e: len(e["ids"]))
    model.config.max_position_embeddings = len(long["ids"]) - 10
    ended = play(model, chat, range(12), guided)
    assert any(e["truncated"] for e in ended) and sg.watch(ended)["truncated"] == sum(e["truncated"] for e in ended)
    for one, other in zip(ended, full):
        assert len(one["ids"]) <= model.config.max_position_embeddings or not one["truncated"]
        assert one["history"] == other["history"][: len(one["history"])] and (one["truncated"] or one["history"] == other["history"])
    assert all(len(e["ids"]) <= model.config.max_position_embeddings for e in ended)


def test_prompts_do_not_change_with_what_is_hidden():
    for guided in True, False:
        seen = set()
        for finding in WORLD.faults["is too loud"][1]:
            world = envs.make("repair")
            observation, _ = world.reset(seed=0)
            vars(world).update(symptom="is too loud", finding=finding)
            seen.add(str(sg.opening(world, observation, guided)))
        assert len(seen) == 1 and (sg.GUIDED in str(sg.opening(WORLD, "x", True)[0]["content"])) and sg.POLICY not in sg.GUIDED


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
    examples = sg.warmup(world, dataclasses.replace(ARGS, examples=3000))
    return world, examples


def test_warm_up_sees_train_alone_and_no_expert(taught, monkeypatch):
    world, examples = taught
    assert world.splits_seen == {"train"} and 0.02 < sum(world.won_in.values()) / 3000 < 0.98
    small = dataclasses.replace(ARGS, examples=20)
    assert sg.warmup(Shelf(), small) == sg.warmup(Shelf(), small)  # the cache is named after it
    for name in "repair", "20q":
        real = envs.make(name)
        monkeypatch.setattr(type(real), "expert", Shelf.expert)
        reset, splits = real.reset, set()
        monkeypatch.setattr(real, "reset", lambda s=splits, r=reset, **k: s.add(k["options"]["split"]) or r(**k))
        assert sg.warmup(real, dataclasses.replace(ARGS, examples=50)) and splits == {"train"}


def test_warm_up_shows_nothing_of_the_test_split():
    test = {envs.make("repair").reset(seed=seed, options={"split": "test"})[0].split(" that ")[0] for seed in range(2000)}
    text = str(sg.warmup(envs.make("repair"), dataclasses.replace(ARGS, examples=600)))
    openings = set(re.findall(r"\w+ brings a \w+ \w+", text))
    assert len(openings) > 100 and len(test) > 80 and not openings & test


def test_warm_up_ratings_are_negative_where_nothing_happened_and_else_know_nothing(taught):
    world, examples = taught
    by_outcome, after, count = defaultdict(list), Counter(), 0
    for dialogue in examples:
        guided = sg.GUIDED in dialogue[0]["content"]
        name = re.match(r"Shelf \d+\.", dialogue[1]["content"])[0]
        for asked, said in zip(dialogue[1::2], dialogue[2::2]):
            assert asked["role"] == "user" and said["role"] == "assistant"
            if guided and asked["content"].endswith(f"\n{sg.RATE}"):
                observation, said = asked["content"].removesuffix(f"\n{sg.RATE}"), said["content"]
                label = sg.parse_rating(said)
                assert said == f"Reason: {' '.join(sg.event(observation).split()[-3:])}\nLabel: {sg.LABELS[label + 1]}"
                after["nothing" if observation.startswith("Nothing happens.") else "something", label] += 1
                if not observation.startswith("Nothing"):
                    by_outcome[label, world.won_in[name]].append(said)
        for shown, rating, asked, said in zip(dialogue[1::2], dialogue[2::2], dialogue[3::2], dialogue[4::2]):
            if guided and asked["content"] == sg.ACT:  # the action that answers a rating
                observation, label = shown["content"], sg.parse_rating(rating["content"])
                possible = [f"take {thing}" for thing in re.search(r"Here: (.+?)\.", observation)[1].split(", ")]
                assert label != -1 or said["content"] in possible
                count += label != -1 and said["content"] not in possible
    assert count > 20  # mistakes are in it
    assert after["nothing", 0] == after["nothing", 1] == 0 and after["nothing", -1] > 8
    total = sum(after["something", label] for label in (-1, 0, 1))
    for label in -1, 0, 1:
        assert abs(after["something", label] / total - 1 / 3) < 4 * math.sqrt(2 / 9 / total)
        won, lost = ([row == label for row in (-1, 0, 1) for _ in by_outcome[row, end]] for end in (True, False))
        assert helpers.rates_differ(won, lost) < 4


# ---------------------------------------------------------------------------------------------------- whole runs: set-up


@pytest.fixture(scope="module")
def environment(environment, tiny):
    return environment  # with the tiny model in the cache already


@pytest.fixture
def main_here(monkeypatch, run_here):
    """self_guide.main() in this process, so that its functions can be watched -> what `evaluate` and `update` were given."""
    seen = SimpleNamespace(guided=[], rollouts=[], updates=[])
    evaluate, rollout, update = sg.evaluate, sg.rollout, sg.update

    def evaluating(model, chat, args, split, episodes, guided):
        seen.guided.append(guided)
        return evaluate(model, chat, args, split, episodes, guided)

    def rolling(model, chat, args, split, seeds, **rest):
        seen.rollouts.append((split, list(seeds), rest))
        return rollout(model, chat, args, split, seeds, **rest)

    def updating(model, reference, chat, args, optimizer, episodes, advantages):
        seen.updates.append((episodes, advantages))
        return update(model, reference, chat, args, optimizer, episodes, advantages)

    for name, function in ("evaluate", evaluating), ("rollout", rolling), ("update", updating):
        monkeypatch.setattr(sg, name, function)

    def run(flags):
        run_here(flags)
        return seen

    return run


# ------------------------------------------------------------------------------------------------ whole runs: as a user

def test_quick_by_subprocess(run_as_user, tmp_path):
    result = run_as_user(f"--quick --env {ENV}", tmp_path, timeout=120)
    assert result.status == 0 and "Traceback" not in result.stderr, result.stderr
    run = tmp_path / "runs" / f"self_guide-{ENV}-s0"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"] and list((tmp_path / "runs").iterdir()) == [run]
    assert {path.name for path in run.iterdir()} == {"args.json", "metrics.jsonl", "rollouts.jsonl", "checkpoint", "model", "summary.json"}
    args, summary = (json.loads((run / name).read_text()) for name in ("args.json", "summary.json"))
    assert args["script"] == "self_guide" and args["args"]["env"] == ENV and {"versions", "device", "git_commit"} <= set(args)
    assert set(summary) >= set(SUMMARY) and summary["arm"] == "schedule" and summary["script"] == "self_guide"
    assert all(set(summary[key]) == {"success", "se"} for key in ("before", "after", "random", "expert"))
    assert summary["expert"] == {"success": 1.0, "se": 0.0}
    metrics, rollouts = lines(run / "metrics.jsonl"), lines(run / "rollouts.jsonl")
    steps = args["args"]["steps"]
    assert [row["step"] for row in metrics] == list(range(1, steps + 1)) and summary["gradient_steps"] == steps * args["args"]["updates"]
    assert summary["train_episodes"] == len(rollouts) == steps * args["args"]["batch_size"]
    assert summary["env_steps"] == sum(len(row["valid"]) for row in rollouts) == metrics[-1]["env_steps"]
    assert summary["generated_tokens"] == metrics[-1]["tokens"] > 0
    assert all("ids" not in row and "expert" not in row and row["split"] == "train" for row in rollouts)
    for piece in "\nbefore\n", "\nafter\n", "random", "expert", "rollouts.jsonl", "success", "> ":
        assert piece in result.stdout
    model, _ = common.load(str(run / "model"))  # in the Hugging Face format
    saved = torch.load(run / "checkpoint" / "state.pt", weights_only=True)["state"]["model"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_metrics_follow_from_the_rollouts(whole, tiny):
    metrics, rollouts = lines(whole / "metrics.jsonl"), lines(whole / "rollouts.jsonl")
    assert [row["trust"] for row in metrics] == pytest.approx([0, 0, 1, 0.5])  # shares 0, 0.25, 0.5, 0.75 of four steps
    seeds = []
    for row in metrics:
        episodes = [e for e in rollouts if e["step"] == row["step"]]
        seeds += [e["seed"] for e in episodes]
        assert all(len({e["seed"] for e in episodes[g : g + 4]}) == 1 for g in (0, 4))  # a group is one task
        env = [10 * e["won"] for e in episodes]
        guide = [0.1 * sum(label or 0 for label in e["labels"]) for e in episodes]
        labels = [label for e in episodes for label in e["labels"]]
        assert row["success"] == sum(e["won"] for e in episodes) / 8 and row["reward_env"] == pytest.approx(sum(env) / 8)
        assert row["reward_guide"] == pytest.approx(sum(guide) / 8)
        assert row["return"] == pytest.approx(row["reward_env"] + row["trust"] * row["reward_guide"])
        assert row["label_malformed"] == labels.count(None) / len(labels)
        assert sum(row[f"label_{name}"] for name in (*sg.LABELS, "malformed")) == pytest.approx(1)
        assert abs(row["logprob_gap"]) < 1e-4 and row["entropy"] > 0 and row["groups"] == 2
        assert {"ratings_if_won", "ratings_if_lost", "label_outcome_correlation", "looping", "invalid", "turns", "kl"} <= set(row)
    assert len(set(seeds)) == 8  # no task twice
    assert any(label is not None for e in rollouts for label in e["labels"])  # or this file tests no ratings at all
    assert "eval_success" in metrics[1] and "eval_success" not in metrics[0] and "eval_success" not in metrics[3]
    trained, _ = common.load(str(whole / "model"))
    assert all(not torch.equal(a, b) for a, b in zip(trained.parameters(), tiny[0].parameters()))  # every parameter moved


def test_eval_only_writes_nothing(run_script, whole, tmp_path):
    before = everything_under(whole)
    result = run_script(f"{SMALL.replace('--model tiny', f'--model {whole}/model')} --eval-only", tmp_path)
    assert result.status == 0 and re.search(r"test: success \d\.\d+ \(se .*n 4\)", result.stdout + result.stderr), result.stderr
    assert not list(tmp_path.iterdir()) and everything_under(whole) == before


def test_the_same_seed_gives_the_same_metrics_and_another_does_not(run_script, whole, tmp_path):
    assert run_script(f"{SMALL} --out-dir again", tmp_path).status == 0
    same_run(whole, tmp_path / "again")
    assert run_script(f"{SMALL} --out-dir other --seed 9223372036854775807 --steps 1", tmp_path).status == 0
    assert lines(tmp_path / "other" / "rollouts.jsonl")[0]["history"] != lines(whole / "rollouts.jsonl")[0]["history"]


# ----------------------------------------------------------------------------------------------------------------- arms


@pytest.mark.parametrize("flags, guided, arm", [
    ("", True, "schedule"), ("--trust zero", True, "zero"), ("--trust immediate", True, "immediate"),
    ("--trust no-anneal", True, "no-anneal"), ("--guide off", False, "grpo"),
])  # fmt: skip
def test_arms_differ_in_guidance_and_trust(main_here, tmp_path, flags, guided, arm):
    seen = main_here(f"{SMALL} --steps 2 --trust-points 0 0.2 0.4 0.5 --out-dir run {flags}")
    assert len(seen.guided) == 2 and set(seen.guided) == {guided}  # guided arms are evaluated with guidance
    assert {rest["guided"] for _, _, rest in seen.rollouts} == {guided}
    assert {split for split, _, rest in seen.rollouts if rest["stream"][0] == "train"} == {"train"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["arm"] == arm
    weight = {"immediate": 1, "no-anneal": 1}.get(arm, 0)
    (episodes, advantages), row = seen.updates[-1], lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["trust"] == weight or not guided
    returns = [10 * e["won"] + weight * 0.1 * sum(label or 0 for label in e["labels"]) for e in episodes]
    assert advantages == pytest.approx(sg.group_advantages(returns, 4))
    assert all(bool(e["labels"]) == guided for e in episodes)


def test_guidance_at_inference_trains_nothing(main_here, tiny, tmp_path):
    seen = main_here(f"{SMALL} --guide inference --out-dir run")
    assert seen.guided == [False, True] and not seen.updates and all(rest["stream"][0] == "evaluate" for _, _, rest in seen.rollouts)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["arm"] == "inference" and summary["gradient_steps"] == summary["generated_tokens"] == summary["train_episodes"] == 0
    assert set(summary) >= set(SUMMARY)
    assert common.fingerprint(common.load(str(tmp_path / "run" / "model"))[0]) == common.fingerprint(tiny[0])


def test_dapo_replaces_groups_without_spread(main_here, monkeypatch, tmp_path):
    plan = [[0, 1, 0, 0], [1, 0, 0], [0, 0]]  # which groups have spread, attempt by attempt; the last attempt is taken as it is
    rollout = sg.rollout

    def planned(model, chat, args, split, seeds, **rest):
        episodes = rollout(model, chat, args, split, seeds, **rest)
        if rest["stream"][0] == "train":
            spread = plan[rest["stream"][2]]
            assert len(seeds) == 4 * len(spread)
            for i, e in enumerate(episodes):
                e["score"] = float(spread[i // 4] and i % 4 == 0)
        return episodes

    seen = main_here  # installs its watchers on evaluate, rollout, update first
    monkeypatch.setattr(sg, "rollout", planned)
    seen = main_here(f"{SMALL} --guide off --estimator dapo --batch-size 16 --steps 1 --resample 2 --out-dir run")
    [(episodes, advantages)], [row] = seen.updates, lines(tmp_path / "run" / "metrics.jsonl")
    assert len(episodes) == len(advantages) == 16 and row["groups"] == 4 and row["groups_replaced"] == 5
    assert row["groups_without_spread"] == 2 and [e["score"] for e in episodes[::4]] == [1, 1, 0, 0]
    assert row["episodes"] == 4 * (4 + 3 + 2) and row["env_steps"] > sum(len(e["valid"]) for e in episodes)  # what was thrown away counts
    tried = [seed for split, seeds, rest in seen.rollouts if rest["stream"][0] == "train" for seed in seeds]
    assert len(tried) == 36 and len(set(tried)) == 9  # every replacement is another task
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["arm"] == "dapo"


def test_dapo_keeps_full_batches_by_itself(run_script, tmp_path):
    result = run_script(f"{SMALL} --estimator dapo --trust immediate --steps 2 --out-dir run", tmp_path)
    assert result.status == 0, result.stderr
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [sum(e["step"] == row["step"] for e in lines(tmp_path / "run" / "rollouts.jsonl")) for row in rows] == [
        8 + 4 * row["groups_replaced"] for row in rows]
    assert rows[-1]["episodes"] == 16 + 4 * sum(row["groups_replaced"] for row in rows)


def test_a_token_budget_stops_the_run(run_script, tmp_path):
    result = run_script(f"{SMALL} --guide off --token-budget 700 --steps 1 --out-dir run", tmp_path)
    assert result.status == 0, result.stderr
    tokens = [row["tokens"] for row in lines(tmp_path / "run" / "metrics.jsonl")]
    assert len(tokens) > 1 and tokens[-1] >= 700 > tokens[-2]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["generated_tokens"] == tokens[-1]


# ------------------------------------------------------------------------------------- whole runs: a model from elsewhere

save_llama = functools.partial(helpers.save_llama, text=[WORLD.system, sg.POLICY, sg.GUIDED])


def test_a_llama_without_a_clue_runs_through_every_line(run_script, llama, tmp_path):
    flags = SMALL.replace("--model tiny", f"--model {llama}") + " --steps 2 --eval-every 1 --max-new-tokens 8 --trust immediate"
    result = run_script(f"{flags} --out-dir run", tmp_path)
    assert result.status == 0, result.stderr
    metrics, rollouts = lines(tmp_path / "run" / "metrics.jsonl"), lines(tmp_path / "run" / "rollouts.jsonl")
    assert metrics[-1]["label_malformed"] == 1 and metrics[-1]["reward_guide"] == 0 and metrics[-1]["invalid"] == 1
    assert all(len(row["valid"]) == len(row["ratings"]) == 5 for row in rollouts) and abs(metrics[-1]["logprob_gap"]) < 1e-4
    trained, chat = common.load(str(tmp_path / "run" / "model"))
    start, _ = common.load(str(llama))  # nothing was won, nobody was praised: no spread, no advantage; the KL is 0 as well
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(trained.parameters(), start.parameters()))
    assert chat.prompt([{"role": "user", "content": "Hi"}]) == common.Chat(chat.tokenizer).prompt([{"role": "user", "content": "Hi"}])


def test_a_context_that_fills_up_ends_episodes(run_script, llama, tmp_path):
    chat = common.load(str(llama))[1]
    room = len(chat.dialogue(sg.opening(WORLD, WORLD.reset(seed=0)[0], True))) + 100
    save_llama(tmp_path / "short", context=room)
    flags = SMALL.replace("--model tiny", "--model short") + " --steps 1 --max-new-tokens 8"
    result = run_script(f"{flags} --out-dir run", tmp_path)
    assert result.status == 0, result.stderr
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["truncated"] == 8


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def bad_models(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    chat = common.load(str(llama))[1]
    guided, plain = (len(chat.dialogue(sg.opening(WORLD, WORLD.reset(seed=0)[0], on))) for on in (True, False))
    save_llama(path / "short", context=64)
    save_llama(path / "between", context=(guided + plain) // 2 + 40)  # room for the plain prompt only
    save_llama(path / "no-template", template=None)
    (path / "file").write_text("")
    return path


@pytest.mark.parametrize("flags, words", [
    ("--model ./nowhere", "config.json is missing"), ("--model nobody/nothing", "cannot be loaded"), ("--model tiny:10x1", "multiple"),
    ("--model {bad}/no-template", "chat template"), ("--model {bad}/short", "context"), ("--model {bad}/short --guide off", "context"),
    ("--model {bad}/between --max-new-tokens 8", "context"),
    ("--model {bad}/between --max-new-tokens 8 --guide inference", "context"),  # its second evaluation is guided
    ("--model {bad}/between --max-new-tokens 8 --guide inference --eval-only", "context"),
    ("--env chess", "unknown world 'chess'"), ("--steps 0", "--steps"), ("--lr nan", "--lr"), ("--lr -1", "--lr"), ("--lr inf", "--lr"),
    ("--batch-size 0", "--batch-size"), ("--micro-batch-size 0", "--micro-batch-size"), ("--micro-batch-size 5", "--micro-batch-size"),
    ("--max-new-tokens 0", "--max-new-tokens"), ("--temperature 0", "--temperature"), ("--temperature nan", "--temperature"),
    ("--eval-temperature -1", "--eval-temperature"), ("--eval-episodes 0", "--eval-episodes"), ("--eval-every 0", "--eval-every"),
    ("--save-every -1", "--save-every"), ("--seed -1", "--seed"), ("--group-size 0", "--group-size"), ("--group-size 1", "--group-size"),
    ("--group-size -4", "--group-size"), ("--batch-size 16 --group-size 3", "--group-size"), ("--updates 0", "--updates"),
    ("--updates 3", "--updates"), ("--updates 32", "--updates"), ("--estimator ppo", "--estimator"), ("--clip -0.1", "--clip"),
    ("--clip nan", "--clip"), ("--clip-high -1", "--clip-high"), ("--clip-high inf", "--clip-high"), ("--kl -1", "--kl"),
    ("--kl nan", "--kl"), ("--resample -1", "--resample"), ("--guide maybe", "--guide"), ("--trust blind", "--trust"),
    ("--trust-points 0.4 0.5 0.7", "--trust-points"), ("--trust-points 0.4 0.5 0.7 0.8 0.9", "--trust-points"),
    ("--trust-points 0.5 0.4 0.7 0.8", "--trust-points"), ("--trust-points 0.4 0.4 0.7 0.8", "--trust-points"),
    ("--trust-points 0.4 0.5 0.7 1.2", "--trust-points"), ("--trust-points -0.1 0.5 0.7 0.8", "--trust-points"),
    ("--trust-points 0.4 nan 0.7 0.8", "--trust-points"), ("--trust-points a b c d", "--trust-points"),
    ("--trust-points", "--trust-points"), ("--guide off --trust zero", "--guide on"),
    ("--rating-reward nan", "--rating-reward"), ("--rating-reward inf", "--rating-reward"), ("--reward-scale 0", "--reward-scale"),
    ("--reward-scale -1", "--reward-scale"), ("--reward-scale inf", "--reward-scale"), ("--token-budget -1", "--token-budget"),
    ("--token-budget 100", "--guide off"), ("--token-budget 100 --guide inference", "--guide off"), ("--examples 0", "--examples"),
    ("--nonsense 1", "--nonsense"), ("--device warp", "--device"), ("--dtype float16", "--dtype"), ("--resume", "no run"),
    ("--out-dir {bad}/short", "exists"), ("--out-dir {bad}/file", "exists"), ("--out-dir {bad}/file/run", "--out-dir"),
])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(run_script, bad_models, home, tmp_path, flags, words):
    before = everything_under(bad_models), everything_under(home)
    accepted = "common.Run.start = self_guide.evaluate = lambda *a: os._exit(77)"  # or a full run would follow
    refused(run_script(f"--env {ENV} {flags.format(bad=bad_models)}", tmp_path, accepted), words)
    assert not list(tmp_path.iterdir()) and (everything_under(bad_models), everything_under(home)) == before


def test_bad_input_by_subprocess(run_as_user, tmp_path):
    refused(run_as_user(f"--env {ENV} --kl nan", tmp_path), "--kl")
    assert not list(tmp_path.iterdir())


def test_a_run_is_never_overwritten_and_resumed_only_as_it_was(run_script, whole, tmp_path):
    before = everything_under(whole)
    refused(run_script(f"{SMALL} --out-dir {whole}", tmp_path), "--resume", "--out-dir")
    refused(run_script(f"{SMALL} --out-dir {whole} --resume --trust zero --rating-reward 1", tmp_path), "trust was", "rating_reward was")
    assert everything_under(whole) == before and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ kills and resume

AT = {  # where the run is killed: code, and how many lines of metrics it had written by then
    "in the first evaluation": ("self_guide.evaluate = lambda *a: os.kill(os.getpid(), signal.SIGKILL)", 0),
    "between metrics and rollouts": (LOG.format(step=3, name="SIGKILL"), 3),
    "amid the second checkpoint": (CHECKPOINT.format(count=2), 4),
    "before the summary": ("common.Run.finish = lambda *a: os.kill(os.getpid(), signal.SIGKILL)", 4),
}  # fmt: skip


@pytest.mark.parametrize("where", AT)
def test_killed_anywhere_and_resumed(killed_and_resumed, whole, where):
    same_run(whole, killed_and_resumed(*AT[where]))


def test_asked_to_stop_keeps_the_step_and_resumes(run_script, whole, tmp_path):
    result = run_script(f"{SMALL} --out-dir run", tmp_path, LOG.format(step=1, name="SIGTERM"))
    assert result.status == 143 and "Traceback" not in result.stderr
    assert torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["state"]["step"] == 1
    assert run_script(f"{SMALL} --out-dir run --resume", tmp_path).status == 0
    same_run(whole, tmp_path / "run")


def test_a_budgeted_dapo_run_resumes_too(run_script, tmp_path):
    flags = f"{SMALL} --guide off --estimator dapo --token-budget 2000 --save-every 1"
    assert run_script(f"{flags} --out-dir whole", tmp_path).status == 0
    assert run_script(f"{flags} --out-dir run", tmp_path, LOG.format(step=2, name="SIGKILL")).status == -signal.SIGKILL
    assert run_script(f"{flags} --out-dir run --resume", tmp_path).status == 0
    same_run(tmp_path / "whole", tmp_path / "run")
