"""reagent.py: judgements as words, prompts, judge, pool, data, warm-up, whole runs, bad input.

What all scripts promise is in test_contract.py. Loss and advantages are twins of self_guide.py's:
what they compute is in test_self_guide.py.
"""

import copy
import dataclasses
import itertools
import json
import random
import re
import shlex
from collections import Counter
from functools import partial
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import LOG, SUMMARY, everything_under, lines, refused
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import envs
import reagent as ra

torch.set_num_threads(1)
WORLD = envs.make("search")
SMALL = (  # 2 updates of the cold start, 2 and 1 of the judge, 2 of learning
    "--model tiny:32x1 --examples 60 --steps 2 --batch-size 8 --micro-batch-size 4 --group-size 4 "
    "--eval-episodes 2 --eval-every 1 --save-every 3 --judged 20 --judge-steps 1 --judge-epochs 1 "
    "--cold-start 16 --cold-epochs 1 --max-new-tokens 12 --judge-tokens 64 --sft-batch-size 8 "
    "--kl 0.01"
)
STEPS = ["cold-start"] * 2 + ["judge-sft"] * 2 + ["judge-grpo"] + ["learn"] * 2
ARGS = dataclasses.replace(common.parse_args(ra.Args, ra.TINY, SMALL.split()), kl=0.0)
ALL_WORLDS = [*envs.WORLDS, "20q"]
GOOD = "<think>No flaw.</think>\n<critique>Go on like this.</critique>\n<score>0.5</score>"
OWN_WORLDS = """
import envs

class Plain(envs.World):
    name, system, max_turns = "plain", "Say yes.", 2
    def begin(self, rng, split):
        return f"Number {rng.randrange(1000)}. What do you say?"
    def admissible(self):
        return ["yes", "no"]
    def act(self, text):
        self.won = text == "yes"
        return "Heard.", text in ("yes", "no")

class Expert(Plain):
    def expert(self):
        return "yes"
"""


def changed(**settings):
    return dataclasses.replace(ARGS, **settings)


def other_answers(monkeypatch):
    """From now on the right answer to every question is another."""
    begin = envs.Search.begin
    monkeypatch.setattr(envs.Search, "begin", lambda self, *given: [
        begin(self, *given), vars(self).update(gold="Zyx Quux")][0])


def blocks(score, think="t", critique="c"):
    return f"<think>{think}</think>\n<critique>{critique}</critique>\n<score>{score}</score>"


# -------------------------------------------------------------------------------------------- flags

PAPER = {  # the sheet's; 32 questions of 8 first attempts
    "lr": 5e-7, "batch_size": 32 * 8, "temperature": 0.7, "eval_temperature": 0.6, "group_size": 8,
    "updates": 32 // 16, "clip": 0.2, "clip_high": 0.2, "variant": "U", "score_weight": 0.3,
    "cold_epochs": 2, "judge_epochs": 2, "sft_lr": 1e-5, "sft_batch_size": 32,
}  # fmt: skip
STATED = {  # the paper's number is in the help, the default is another
    "steps": "300", "kl": "0", "judge_retries": "retries", "cold_start": "55.6 thousand",
    "judged": "28 thousand", "judge_steps": "90 thousand",
}  # fmt: skip


def test_the_defaults_are_the_papers():
    told = {field.name: field.metadata["help"] for field in dataclasses.fields(ra.Args)}
    marked = {name for name, text in told.items() if re.search(r"\((not in the )?paper", text)}
    assert marked >= {*PAPER, *STATED} and set(ra.TINY) | set(ra.QUICK) < set(told)
    assert {name: getattr(ra.Args(), name) for name in PAPER} == PAPER
    assert all("paper" in told[name] and number in told[name] for name, number in STATED.items())
    own = {name for name, text in told.items() if "not in the paper" in text}
    assert own == {"max_new_tokens", "judge_tokens", "judge_retries", "cold_again", "dose"}


def test_quick_is_small_and_the_commands_of_the_docstring_are_accepted(monkeypatch):
    monkeypatch.setattr(common, "_device_exists", lambda name: True)
    for model in "tiny", "smollm2":
        args = common.parse_args(ra.Args, ra.TINY, ["--model", model, "--quick"], ra.QUICK)
        ra.check_args(args)
        assert max(args.batch_size, args.eval_episodes, args.judged, args.cold_start) <= 16
    commands = ra.__doc__.replace("\\\n", " ").split("    python reagent.py")[1:]
    assert len(commands) == 4
    for command in commands:
        line = shlex.split(command.split("\n")[0], comments=True)
        ra.check_args(common.parse_args(ra.Args, ra.TINY, line))


# ------------------------------------------------------------------------------ judgements as words

WITHOUT_THINK, WITHOUT_CRITIQUE = (
    re.sub(rf"<{name}>.*</{name}>\n", "", GOOD) for name in ("think", "critique"))
SCORES = {
    0.7: ["0.7", " 0.7\n", "**0.7**", "`0.7`", "Score: 0.7", "0.7.", "0.7 (good)", "(0.7)", "0.7/1",
          "0.7 / 1.0", "0.7/1.00", "0.7 - a good start", "0.7 out of 1", "0.7 out of 1.0 (good)"],
    0.5: [".5", "0.5/1"], 0.0: ["0", "0.0", "0."], 1.0: ["1", "1.", "1.0", "1/1"],
    None: ["1.01", "2", "8", "10", "-0.1", "\u22120.1", "nan", "inf", "1e-3", "9" * 400, "11/10", "0,7",
           "7/10", "1/10", "1 out of 10", "0.7 out of 1.5", "70%", "0%", "0.6-0.8", "0.6 or 0.8", "0.5/0", "1/0.5", "0.3/0.5", "", "v2",
           "high", "0.7x", "1.2.3", "1/10/2020", "1/1/2", "0.7 from 0 to 1", "zero"],
}  # fmt: skip
READ = [
    f" {GOOD}\n\n", f"```xml\n{GOOD}\n```", f"Here it is:\n\n{GOOD}", GOOD + "\n\nI hope it helps!",
    GOOD.upper(), GOOD.replace("score", "Score"), f"**1.** {GOOD}".replace("\n", "\n\n### Next\n"),
    GOOD.replace("</think>\n<critique>", "</think> and so <critique>"),
    GOOD * 2, blocks("0.1") + "\nNo, rather:\n" + GOOD, GOOD + " The <score> is high.",
    blocks("0.5", think="What a <score> would be fair?"),
    f"<think>a thinking model's own</think>\n\n{GOOD}", f"its template began</think>\n\n{GOOD}",
    GOOD.removeprefix("<think>"), f"</think>{GOOD}", f"a</think>b</think>{GOOD}",
    f"<think>First <think>, then <critique> and <score>.</think>\n\n{GOOD}",
    f"<think>Perhaps {blocks('0.9')}? No.</think>\n{GOOD}", f"<think>own</think>\n{WITHOUT_THINK}",
    blocks("0.5", "", ""), blocks("0.5", critique="Call <open> with 1 < 2."),
]  # fmt: skip
UNREADABLE = [
    "", "0.5", GOOD.split("5</score>")[0], WITHOUT_THINK, WITHOUT_CRITIQUE, GOOD.split("<score>")[0],
    GOOD.replace("</think>", ""), GOOD.replace("</critique>", ""), blocks("0.1") + blocks("2"),
    blocks("0.5", critique="a</critique><critique>b"), "Think: fine. Critique: go on. Score: 0.5",
    "<score>1</score><think>t</think><critique>c</critique>", "<think>only a native thought</think>",
]  # fmt: skip
TABLE = [(blocks(text), score) for score, texts in SCORES.items() for text in texts]
TABLE += [(text, 0.5) for text in READ] + [(text, None) for text in UNREADABLE]


@pytest.mark.parametrize("text, score", TABLE)
def test_parse_judgement(text, score):
    found = ra.parse_judgement(text)
    assert (found and found["score"]) == (score and pytest.approx(score, abs=1e-9))
    assert found is None or set(found) == {"critique", "score"}


def test_parse_judgement_keeps_the_words():
    said = {"critique": "Do it\nagain.", "score": 0.2}
    assert ra.parse_judgement(blocks("0.2", " a\nb ", "\nDo it\nagain. ")) == said
    assert ra.parse_judgement(ra.judgement_text("a", *said.values())) == said
    assert ra.parse_judgement(blocks("0.1") + GOOD)["critique"] == "Go on like this."


TAGS = [f"<{slash}{name}>" for name in ("think", "critique", "score") for slash in ("", "/")]
PIECES = st.sampled_from([
    *TAGS, "".join(TAGS[:4]), "".join(TAGS[:4]) + "<score>", "0.5", "1", "0", "1.0000001", "-1",
    "nan", "1e999", "9" * 50, "\u0663", "\u00b2", "/", "%", "\n", "\x85", "\u2028", " ", "\x00",
    "\ud800", "<", "think", "Agent:", "Observation: won", "{critique}", "<|im_end|>",
])  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=40), st.lists(PIECES, max_size=9).map("".join),
    st.tuples(*[st.one_of(PIECES, st.text(max_size=5), st.floats().map(str))] * 3).map(
        lambda three: blocks(*three)))


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(TEXTS)
def test_no_text_upsets_what_reads_it(text):
    found = ra.parse_judgement(text)
    if found is not None:
        assert 0 <= found["score"] <= 1 and not any(tag in found["critique"] for tag in TAGS)
        assert all(f"<{name}>" in text.lower() for name in ("critique", "score"))
    said = [["world", "Q"], ["act", text], ["world", text], ["act", text], ["world", "the end"]]
    assert ra.said_in(ra.messages_of([*said, ["judge", text]])) == said
    seen = ra.transcript(said)
    turns = [line for line in seen.split("\n") if re.match("(Agent|Observation):", line)]
    assert len(turns) == 3 and "the end" not in seen  # nobody can pretend to be another turn
    earlier = ra.Episode("train", 0, said, critique=text)
    asked = ra.dialogue(WORLD, ARGS, [["world", text]], earlier)[1]["content"]
    assert asked.startswith(text) and asked.endswith("\n\nTry again from the start, with your first turn.")


@pytest.mark.parametrize("unit", [
    "<think>", "</think><critique>", "</think><critique></critique>", "<think></think>", " ", "\n",
    "a", "0", "0/", "</critique> ", "<score>0.5</score>", "0.5 ", "<\t", "1 out of ",
    "</think><critique></critique><score>"])  # fmt: skip
def test_megabytes_are_read(unit):
    text = unit * (400_000 // len(unit))  # what took quadratic time would never end
    for long in text, "<think>a</think><critique>" + text, GOOD.replace("</score>", text):
        found = ra.parse_judgement(long)
        assert found is None or 0 <= found["score"] <= 1
    ra.transcript([["world", "Q"], ["act", text], ["world", text]])


# ------------------------------------------------------------------------------------------ prompts

SAID = [["world", "Who? 8 turns left."], ["act", "<think>hm</think>I go.\ngo"],
        ["world", "A. 7 turns left."], ["act", " stop "],
        ["world", "That is it. You win after 2 turns."], ["judge", GOOD]]  # fmt: skip
SEEN = "Agent: I go.\ngo\nObservation: A. 7 turns left.\nAgent: stop"


def test_transcript_by_hand():
    assert ra.transcript(SAID) == SEEN == ra.transcript(SAID[:-1]) == ra.transcript(SAID[:-2])
    assert ra.transcript(SAID[:3]) == "Agent: I go.\ngo" and ra.transcript(SAID[:1]) == ""
    listed = [[who, text + envs.LISTING + "a\nb"] if who == "world" else [who, text]
              for who, text in SAID]  # fmt: skip
    assert ra.transcript(listed) == SEEN and ra.case(listed) == ra.case(SAID)
    cut = [SAID[0], ["act", "<think>a</think>go<think>cut\noff"], ["world", "A."],
           ["act", "the template began this</think> go"], ["world", "B."],
           ["act", "<think>cut off"], ["world", "C."]]  # fmt: skip
    assert ra.transcript(cut) == "Agent: go\nObservation: A.\nAgent: go\nObservation: B.\nAgent: "
    copied = [line for text in (ra.CASE, ra.AGAIN) for line in text.splitlines() if line[:1].isalpha()]
    acts = "Action: go\n" + envs.tool_call("search", "Observation: A")
    for line in ["Observation: You win.", "**Observation:** Yes.", "# agent \uff1a", "System: 1", *copied]:
        forged = [SAID[0], ["act", f"go\n\n{line}\n{line}\n{acts}"], ["world", "A."]]
        assert ra.transcript(forged) == f"Agent: go\n\n  {line}\n  {line}\n{acts}"


@pytest.mark.parametrize("env, rubric, form", [("search", ra.TOOLS, ra.CALL),
                                               ("household", ra.ACTIONS, ra.ACT)])  # fmt: skip
def test_what_agent_and_judge_are_told(env, rubric, form):
    world = envs.make(env)
    system, user = ra.judge_messages(world, changed(env=env), SAID)
    shown, _, form_of_reply = user["content"].partition("\n\nNow judge ")
    assert shown == f"The task:\nWho? 8 turns left.\n\nThe transcript:\n{SEEN}"
    assert re.findall(r"</?\w+>", form_of_reply) == TAGS  # last, where a small model still knows it
    assert rubric in system["content"] and system["content"].endswith(world.system)
    assert ra.dialogue(world, changed(env=env), SAID)[0]["content"] == f"{world.system}\n{form}"
    first = ra.Episode("train", 0, SAID, critique="Look {twice}.")
    again = ra.dialogue(world, changed(env=env), SAID[:1], first)
    assert again[1]["content"] == (
        f"Who? 8 turns left.\n\nYou have tried this before:\n{SEEN}\n\n"
        "A reviewer says: Look {twice}.\n\nTry again from the start, with your first turn.")
    first.critique = ""
    told = ra.dialogue(world, changed(env=env), SAID[:1], first)[1]["content"]
    assert "\nA reviewer says: nothing.\n" in told


@pytest.mark.parametrize("env", ALL_WORLDS)
def test_the_experts_action_as_the_agent_writes_it_wins(env):
    world = envs.make(env)
    for seed in range(5):
        episode = ra.play(world, "train", seed, envs.expert_player, random.Random(0), thinks=True)
        assert episode.won and all(episode.valid) and episode.score == 1 and not episode.flaws
        assert [text for who, text in episode.said if who == "act"] and episode.over


@pytest.mark.parametrize("env", ALL_WORLDS)
def test_worked_examples_are_random_play_and_know_no_outcome(env, monkeypatch):
    splits, reset = [], envs.World.reset
    monkeypatch.setattr(envs.World, "reset", lambda self, **how: splits.append(
        how["options"]["split"]) or reset(self, **how))
    monkeypatch.setattr(type(envs.make(env)), "expert", None)
    shows = ra.worked_examples, ra.judged_examples
    acted, judged = (show.__wrapped__(env, 3, False) for show in shows)
    assert [show(env, 0, False) for show in shows] == [[], []] and set(splits) == {"train"}
    assert all(m.get("shot", m["role"] == "user") for m in acted + judged)
    world = envs.make(env)
    plays = [ra.play(world, "train", seed, envs.random_player, random.Random(seed))
             for seed in range(10**6, 10**6 + 30)]
    told = {ra.case(e.said)["content"]: ra.annotate(e.flaws) for e in plays}
    assert [(q["content"], a["content"]) for q, a in zip(acted[::2], acted[1::2], strict=True)] == [
        (e.said[0][1], e.said[1][1]) for e in plays[:3]]
    assert all(("<tool_call>" in m["content"]) == bool(world.tools) for m in acted[1::2])
    found = [told[m["content"]] for m in judged[::2]]
    assert [m["content"] for m in judged[1::2]] == [ra.judgement_text(*each) for each in found]
    scores, every = [score for *_, score in found], [score for *_, score in told.values()]
    assert scores == sorted(scores) and [scores[0], scores[-1]] == [min(every), max(every)]
    assert len(found) == 3 and not re.search(r"\b(win|won)\b", str(judged))
    shown = ra.judge_messages(world, changed(env=env, shots=3), SAID)
    assert shown[1:-1] == judged and shown[-1] == ra.case(SAID)


# ------------------------------------------------------------------------------------ set-up: parts


class Run:
    """Stands where common.Run does: keeps what a phase leaves."""

    def __init__(self, path=None):
        self.dir, self.logged, self.episodes, self.counted, self.warned = path, [], [], Counter(), set()
        self.write_rollouts, self.count = self.episodes.extend, self.counted.update

    def steps(self, done, last):
        for self.step in range(done + 1, last + 1):
            yield self.step

    def log(self, record, limits):
        self.logged.append(record)

    def lap(self, *given, **parts):
        pass

    save_if_due = lap


def state_of(tiny, path=None, world=WORLD, **settings):
    args = changed(eval_every=100, **settings)
    agent, rrm = (ra.trained(args, copy.deepcopy(tiny[0]), tiny[1]) for _ in range(2))
    return ra.State(args, world, Run(path), agent, rrm)


@pytest.fixture
def judge_says(monkeypatch):
    """judge_says(text, text, ...): the judge's replies, call by call -> the calls. A text may be a
    function of the prompt."""
    calls = []

    def begin(*texts):
        def generate(model, chat, prompts, *, max_new_tokens, temperature, seeds, samples, rows):
            assert len(seeds) == len(set(seeds)) == len(prompts) * samples
            asked = [chat.tokenizer.decode(ids) for ids in prompts for _ in range(samples)]
            if not asked:
                return common.Replies([], [], [], [])
            text = texts[min(len(calls), len(texts) - 1)]
            calls.append(SimpleNamespace(asked=asked, temperature=temperature, seeds=seeds))
            said = [text(prompt) if callable(text) else text for prompt in asked]
            ids = [chat.encode(words) or [0] for words in said]
            return common.Replies(ids, [[-0.5] * len(row) for row in ids], said, [True] * len(said))

        monkeypatch.setattr(common, "generate", generate)
        return calls

    return begin


@pytest.fixture
def agent_says(monkeypatch):
    """agent_says(say): the agent's replies are say(what it reads, its turn) -> their temperatures."""
    temperatures = []

    def begin(say):
        def reply(self, rows, *, max_new_tokens, temperature, seeds, prefill):
            temperatures.append(temperature)
            turns, texts = self.__dict__.setdefault("turns", Counter()), []
            for row in rows:
                texts.append(say(self.chat.tokenizer.decode(self.ids[row]), turns[row]))
                self._append(row, self.chat.reply(texts[-1]), 1)
                turns[row] += 1
            return common.Replies([], [], texts, [True] * len(rows))

        monkeypatch.setattr(common.Dialogues, "reply", reply)
        return temperatures

    return begin


# ---------------------------------------------------------------------------------------- the judge

A, B = ([["world", f"Who wrote {name}? 8 turns left."], ["act", name], ["world", "Nothing."]]
        for name in ("A", "B"))  # fmt: skip


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_an_unreadable_judgement_is_asked_for_again_then_zero(tiny, judge_says, retries):
    said = ["garbage", "<score>1</score>", blocks("0.1")]
    calls = judge_says(lambda prompt: GOOD if "wrote A" in prompt else said[0], *said[1:])
    state = state_of(tiny, judge_retries=retries)
    a, b = ra.judge(state, [A, B], ("s",))
    good, *spent = (len(tiny[1].encode(text)) for text in (GOOD, *said))
    assert (a.critique, a.score) == ("Go on like this.", 0.5)
    assert (a.readable, a.asked, a.tokens, a.text) == (True, 1, good, GOOD)
    last = ("c", 0.1, True) if retries == 2 else ("", 0.0, False)
    assert (b.critique, b.score, b.readable) == last and b.text == said[retries]
    assert (b.asked, b.tokens) == (1 + retries, sum(spent[:1 + retries]))  # all was sampled
    assert [len(call.asked) for call in calls] == [2, 1, 1][:1 + retries]
    assert [call.temperature for call in calls] == [0.0, 0.7, 0.7][:1 + retries]
    assert len({seed for call in calls for seed in call.seeds}) == 2 + retries
    counted = ra.watch_judgements([], [a, b])
    assert counted["judge_readable"] == (1 if retries == 2 else 0.5) and counted["not_judged"] == 0


def test_what_is_too_long_or_was_not_played_is_not_judged(tiny, judge_says):
    state, calls = state_of(tiny), judge_says(GOOD)
    room = len(tiny[1].dialogue(ra.judge_messages(WORLD, ARGS, A)))
    state.rrm.model.max_context = room + ra.FORCED + ARGS.judge_tokens
    long = [A[0], ["act", "word " * 50], ["world", "."]]
    episodes = [ra.Episode("train", 0, copy.copy(said)) for said in (A, long, B[:1], [*B])]
    judgements = ra.review(state, episodes, ("s",))
    assert [judgement.asked for judgement in judgements] == [1, 0, 0, 1] == [
        int(not episode.left_out) for episode in episodes]
    assert [e.judge_score for e in episodes] == [0.5, 0, 0, 0.5]
    assert [e.critique for e in episodes] == ["Go on like this.", "", "", "Go on like this."]
    assert episodes[0].said[-1] == ["judge", GOOD] and [len(c.asked) for c in calls] == [2]
    episodes[0].won = True
    counted = ra.watch_judgements(episodes, judgements)
    assert (counted["not_judged"], counted["judge_auc"]) == (0.5, 0.5)  # of those that were judged
    assert (counted["judge_readable"], counted["judge_score"], counted["critiques"]) == (1, 0.5, 1)
    assert ra.watch_judgements(episodes[1:3], judgements[1:3]) == {"not_judged": 1}


def test_a_judgement_knows_what_was_sampled(tiny):
    state = state_of(tiny, judge_tokens=5)
    prompts = [ra.judge_prompt(state, said) for said in (A, B)]
    found = ra.ask_judge(state, prompts, ("s",), 0.7, samples=3)
    for i, judgement in enumerate(found):
        prompt = prompts[i // 3]
        assert judgement.ids[:len(prompt)] == prompt and judgement.asked == 1
        assert judgement.mask == [0] * len(prompt) + [1] * judgement.tokens
        assert tiny[1].decode(judgement.ids[len(prompt):]) == judgement.text
        assert judgement.cut == (judgement.ids[-1] not in tiny[1].eos) and judgement.tokens <= 5
    assert any(judgement.cut for judgement in found) and len({j.text for j in found}) > 2
    [[old]] = ra.forward_logprobs(*tiny, state.args, [[found]])
    assert old.sum(1).tolist() == pytest.approx([j.logprob for j in found], abs=1e-3)
    assert ra.watch_judgements([], found)["cut_judge"] == common.mean(j.cut for j in found)
    state = state_of(tiny, prefill=True)
    assert ra.judge_prompt(state, A) == prompts[0] + tiny[1].encode("<think>")
    [judgement] = ra.ask_judge(state, [ra.judge_prompt(state, A)], ("s",), 0.7)
    assert judgement.text.startswith("<think>")


# ---------------------------------------------------------------------------- process and reference


def test_what_anybody_can_count_by_hand():
    shop = envs.make("repair")
    flaw = partial(ra.Episode, "train", 0, [])
    assert ra.process_flaws(shop, flaw(actions=["a", "b", "a"], valid=[True] * 3)) == []
    impossible, repeated = ra.process_flaws(
        shop, flaw(actions=["a", "fly\naway", "b", "b"], valid=[True, False, True, True]))
    assert impossible == ("impossible", 0.4, "This could not be done: fly away.", "Do without: fly away.")
    assert repeated == ("repeated", 0.4, "This was done twice in a row: b.", "Do not repeat: b.")
    think, critique, score = ra.annotate([impossible, repeated])
    assert think == f"{impossible.found} {repeated.found}" and score == pytest.approx(0.2)
    assert critique == "Do without: fly away. Do not repeat: b."
    assert ra.annotate([]) == ("Every step was needed.", "Go on like this.", 1.0)
    assert ra.annotate([impossible] * 3)[2] == 0
    searched = ra.play(WORLD, "train", 3, envs.guess_player, random.Random(0))
    assert searched.flaws == WORLD.flaws() and searched.flaws  # what the world itself says


@pytest.mark.parametrize("env", ["search", "search-full"])
def test_annotations_know_neither_outcome_nor_answer(env, monkeypatch):
    """With other right answers players and the program say the same, though nobody wins."""

    def played():
        world = envs.make(env)
        return [ra.play(world, "train", seed, ra.players_of(world)[seed % 6], random.Random(seed))
                for seed in range(60)]

    found = played()
    other_answers(monkeypatch)
    other = played()
    assert [e.flaws for e in found] == [e.flaws for e in other] and "Zyx" not in str(
        [(e.said, e.flaws) for e in other])
    assert any(e.won for e in found) and not any(e.won for e in other)
    assert [ra.judge_messages(WORLD, ARGS, e.said) for e in found] == [
        ra.judge_messages(WORLD, ARGS, e.said) for e in other]
    assert len({flaw.name for e in found for flaw in e.flaws}) >= 5
    assert len({ra.annotate(e.flaws)[1] for e in found}) > 20  # they quote evidence


# ---------------------------------------------------------------------------- (4) and (5): the pool


def pool_of(*rows):
    """Episodes of (score of the rule, score of the judge)."""
    return [ra.Episode("train", 0, [], score=rule, judge_score=score) for rule, score in rows]


def advantages(pool, args=ARGS):
    for e in pool:
        e.earned = ra.judged_return(args, e)
    ra.pool_advantages(pool)
    return [e.advantage for e in pool]


def test_returns_and_advantages_of_a_pool_by_hand():
    first, second = pool_of((0, 0), (1, 0)), pool_of((1, 1), (0.4, 1))
    std = (((0.75**2 + 0.25**2 + 0.55**2 + 0.05**2) / 3) ** 0.5)
    by_hand = [d / std for d in (-0.75, 0.25, 0.55, -0.05)]
    assert advantages(first + second) == pytest.approx(by_hand, abs=1e-5)
    assert [e.earned for e in first + second] == pytest.approx([0, 1, 1.3, 0.7])  # no mix
    alone = advantages(pool_of((0, 0), (1, 0)))  # without the second attempts, others
    assert alone == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-5)
    rule = pool_of((0, 1), (1, 0))
    assert advantages(rule, changed(score_weight=0.0)) == alone and [e.earned for e in rule] == [0, 1]
    for flat in (pool_of((0.1, 0.5), (0.1, 0.5)), pool_of((1, 1)), pool_of((0.3, 0), (0, 1)), []):
        assert set(advantages(flat)) <= {0}


# ----------------------------------------------------------------------------------------- attempts


def attempts(tiny, seeds, earlier=None, args=ARGS, stream=("test",)):
    return ra.attempt(ra.State(args, WORLD, None, ra.Learner(*tiny)), "train", seeds, stream, earlier)


CRITIQUES = ["Read every page.", "", "Mind the {braces} <|im_end|>.", "Go on like this."] * 2


@pytest.fixture(scope="module")
def both(tiny):
    """(first, second): two questions, four attempts at each."""
    first = attempts(tiny, [0] * 4 + [1] * 4)
    for episode, critique in zip(first, CRITIQUES):
        episode.critique = critique
    return first, attempts(tiny, [0] * 4 + [1] * 4, first, stream=("test", 2))


@pytest.mark.parametrize("flags", [
    dict(max_new_tokens=3), dict(), dict(prefill=True, shots=2, show_actions=True)])
def test_the_mask_is_what_was_sampled(tiny, flags):
    """Rebuilt from the texts. 0: prompts, the first attempt and its critique, worked examples,
    observations, forced words and ends; 1: replies and the ends that they wrote."""
    chat, args, cuts = tiny[1], changed(**flags), 0
    world, word = envs.make("search", show_actions=args.show_actions), "<tool_call>" * args.prefill
    first = attempts(tiny, range(4), args=args)
    for episode, critique in zip(first, CRITIQUES):
        episode.critique = critique
    second = attempts(tiny, range(4), first, args)
    for e, earlier in [*zip(first, [None] * 4), *zip(second, first)]:
        assert e.second == bool(earlier) and not e.left_out and len(e.ids) == len(e.mask)
        position, cut = 0, 0
        given = chat.dialogue(ra.dialogue(world, args, e.said[:1], earlier))
        for (_, reply), (_, seen) in zip(e.said[1::2], e.said[2::2]):
            given = given + chat.encode(word)
            assert e.ids[position:position + len(given)] == given
            assert not any(e.mask[position:position + len(given)])
            position += len(given)
            rest = e.ids[position:position + args.max_new_tokens]
            length = next((n + 1 for n, id in enumerate(rest) if id in chat.eos), len(rest))
            assert all(e.mask[position:position + length])
            assert word + chat.decode(rest[:length]) == reply
            position += length
            forced = [] if rest[length - 1] in chat.eos else chat.eos[:1]
            cut += len(forced)
            given = forced + chat.turn(seen)
        assert position == len(e.ids) and cut == e.cut  # nothing behind the last sampled token
        cuts += cut
        assert (envs.LISTING in e.said[0][1]) == args.show_actions
    assert cuts or args.max_new_tokens > 3


def test_second_attempts_are_weighed_below_the_first_and_its_critique(tiny, both):
    """The ratio is 1 before the first update, in each attempt's own context."""
    first, second = both
    batch = first + second
    [[old]] = ra.forward_logprobs(*tiny, ARGS, [[batch]])
    assert old.sum(1).tolist() == pytest.approx([e.logprob for e in batch], abs=1e-3)
    bare = []
    for e in second:
        prompt = tiny[1].dialogue(ra.dialogue(WORLD, ARGS, e.said[:1]))
        start = e.mask.index(1)
        bare.append(ra.Episode("train", 0, [], ids=prompt + e.ids[start:],
                               mask=[0] * len(prompt) + e.mask[start:]))
    [[other]] = ra.forward_logprobs(*tiny, ARGS, [[bare]])
    assert sum(abs(row.sum().item() - e.logprob) > 1e-2 for row, e in zip(other, second)) >= 6
    for e, advantage in zip(batch, itertools.cycle([1.0, -0.5, 0.2])):
        e.advantage = advantage
    model, args = copy.deepcopy(tiny[0]), changed(updates=1, kl=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = ra.update(model, tiny[0], tiny[1], args, optimizer, batch, (0.2, 0.2))
    assert metrics["clipped"] == 0 and metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert abs(metrics["logprob_gap"]) < 1e-4 and metrics["grad_norm"] > 0


def test_attempts_depend_on_their_stream_row_and_turn_alone(tiny, both):
    first, second = both
    for size in 1, 3:
        args = changed(rollout_batch_size=size)
        assert attempts(tiny, [0] * 4 + [1] * 4, args=args)[3].said == first[3].said
        again = attempts(tiny, [0] * 4 + [1] * 4, first, args, ("test", 2))
        assert [(e.said, e.ids, e.mask) for e in again] == [(e.said, e.ids, e.mask) for e in second]
    assert len({str(e.said) for e in first[:4]}) > 1 and len({e.said[0][1] for e in first}) == 2
    assert [e.said for e in attempts(tiny, [0] * 4, stream=("x",))] != [e.said for e in first[:4]]


def test_a_thought_is_kept_but_not_acted_on(tiny, agent_says):
    call = envs.tool_call("search", "Anything")
    text = f"<think>{envs.tool_call('answer', 'Nobody')}</think>{call}"
    temperatures = agent_says(lambda seen, turn: text)
    ra.attempt(state_of(tiny), "test", [0], ("test",))
    [e] = attempts(tiny, [0])
    assert temperatures == [0.6] * WORLD.max_turns + [0.7] * WORLD.max_turns
    assert len(e.valid) == WORLD.max_turns and all(e.valid) and e.actions == [call] * WORLD.max_turns
    assert "Nobody" not in ra.transcript(e.said) and "no answer" in [flaw.name for flaw in e.flaws]
    assert tiny[1].decode([i for i, m in zip(e.ids, e.mask) if m]) == text * WORLD.max_turns


def test_an_attempt_without_room_is_left_out(tiny, both):
    model, first = copy.deepcopy(tiny[0]), both[0]
    lengths = [len(tiny[1].dialogue(ra.dialogue(WORLD, ARGS, e.said[:1], e))) for e in first]
    model.max_context = min(lengths) + ra.FORCED + ARGS.max_new_tokens
    second = attempts((model, tiny[1]), [0] * 4 + [1] * 4, first)
    for e, length in zip(second, lengths):
        assert e.left_out == (length > min(lengths)) and e.truncated and e.second
        assert (len(e.ids), e.mask, e.actions) == (1, [0], []) or not e.left_out
    assert ra.watch(second)["truncated"] == 1 and 0 < sum(e.left_out for e in second) < 8


# ----------------------------------------------------------------------------------------- learning


@pytest.fixture
def updates(monkeypatch):
    """What `update` is given: (model, batch, clip). It changes nothing."""
    seen = []
    monkeypatch.setattr(ra, "update", lambda model, reference, chat, args, optimizer, batch, clip: (
        seen.append((model, batch, clip)) or {"loss": 0.0}))
    return seen


@pytest.fixture
def luck(monkeypatch):
    """The attempts in the order in which they were played; every third one gets 1 from the rule."""
    played, attempt = [], ra.attempt

    def attempting(state, split, seeds, stream, earlier=None):
        episodes = attempt(state, split, seeds, stream, earlier)
        for i, episode in enumerate(episodes):
            episode.score = float((i + len(played)) % 3 == 0)
        played.append(((split, seeds), {"stream": stream, "earlier": earlier}, episodes))
        return episodes

    monkeypatch.setattr(ra, "attempt", attempting)
    return played


def test_u_learns_from_first_and_second_attempts_in_one_pool(tiny, judge_says, updates, luck):
    count = itertools.count()
    calls = judge_says(lambda prompt: blocks(next(count) % 5 / 4, critique=f"Number {next(count)}."))
    state = state_of(tiny, steps=2, variant="U", clip_high=0.34)
    ra.learn(state)
    assert len(luck) == 4 and len(calls) == 4 and len(updates) == 2
    asked = [("train", [0] * 4 + [1] * 4), ("train", [2] * 4 + [3] * 4)]
    assert [given for given, *_ in luck[::2]] == asked
    for step, (model, batch, clip) in enumerate(updates):
        (_, how, first), (_, again, second) = luck[2 * step:2 * step + 2]
        assert model is state.agent.model and clip == (0.2, 0.34)
        assert how["earlier"] is None and again["earlier"] is first and how["stream"] != again["stream"]
        pools = [first[:4] + second[:4], first[4:] + second[4:]]
        assert all(x is y for x, y in zip(batch, pools[0] + pools[1], strict=True))
        for pool in pools:
            assert [e.earned for e in pool] == [e.score + 0.3 * e.judge_score for e in pool]
            assert [e.advantage for e in pool] == ra.group_advantages([e.earned for e in pool])
            assert len({e.seed for e in pool}) == 1 and len({e.judge_score for e in pool}) > 1
        for one, two in zip(first, second):
            prompt = tiny[1].dialogue(ra.dialogue(WORLD, state.args, two.said[:1], one))
            assert one.critique.startswith("Number ") and two.ids[:len(prompt)] == prompt
            assert not any(two.mask[:len(prompt)])
        metrics = state.run.logged[step]
        assert metrics["success"] == common.mean(e.won for e in first)
        assert metrics["second_turns"] == common.mean(len(e.valid) for e in second)
        assert metrics["return"] == pytest.approx(common.mean(e.earned for e in batch))
        assert metrics["judge_readable"] == 1 and metrics["critiques"] == 16
        assert (metrics["groups_flat"], metrics["phase"], metrics["phase_step"]) == (0, "learn", step + 1)
    assert state.run.counted["episodes"] == 32 and state.run.counted["gradient_steps"] == 4
    spoken = [text for e in state.run.episodes for who, text in e["said"] if who == "judge"]
    assert len(spoken) == 32 and all(map(ra.parse_judgement, spoken))
    assert state.run.counted["tokens"] == sum(sum(e.mask) for *_, some in luck for e in some) + sum(
        len(tiny[1].encode(text)) for text in spoken)


def test_what_is_left_out_moves_nobodys_advantage(tiny, updates, luck, monkeypatch):
    def review(state, episodes, stream):
        episodes[1].left_out, episodes[1].score = True, 9.0
        return []

    monkeypatch.setattr(ra, "review", review)
    ra.learn(state_of(tiny, steps=1))
    [(_, batch, _)] = updates
    kept = [e for e in batch[:8] if not e.left_out]
    assert [i for i, e in enumerate(batch) if e.left_out] == [1, 5] and batch[1].earned == 9
    assert [e.advantage for e in kept] == ra.group_advantages([e.earned for e in kept])
    assert batch[1].advantage == batch[5].advantage == 0 and any(e.advantage for e in kept)


@pytest.mark.parametrize("variant, says, added", [
    ("R", GOOD, 0.15), ("none", GOOD, 0), ("R", "garbage", 0)])  # fmt: skip
def test_r_and_none_have_no_second_attempts_and_garbage_leaves_the_rule(
    tiny, judge_says, updates, luck, variant, says, added
):
    calls = judge_says(says)
    state = state_of(tiny, steps=1, variant=variant)
    ra.learn(state)
    [(_, batch, _)], [(_, how, first)], [metrics] = updates, luck, state.run.logged
    assert how["earlier"] is None and batch == first and bool(calls) == (variant == "R")
    assert [e.earned for e in batch] == pytest.approx([e.score + added for e in batch])
    assert metrics.get("judge_readable") == (None if variant == "none" else says == GOOD)
    assert "second_success" not in metrics and batch[0].advantage != 0
    assert not any(e.left_out for e in batch) and {bool(e.critique) for e in batch} == {added > 0}


@pytest.mark.parametrize("env", ["search", "search-full"])
def test_no_prompt_depends_on_the_right_answer(
    tiny, judge_says, agent_says, updates, monkeypatch, env
):
    """The same calls in two worlds that differ in the right answer alone: one is won, one lost."""
    world = envs.make(env)
    seed = next(s for s in range(100) if (world.reset(seed=s)[0].startswith("How many years after")
                                          == (env == "search-full")))
    script = envs.run_episode(world, envs.expert_player, seed)["actions"]
    read, said, side_by_side = [], [], ra.side_by_side

    def say(seen, turn):
        read.append(seen)
        return script[turn]

    agent_says(say)
    calls = judge_says(GOOD)
    monkeypatch.setattr(ra, "side_by_side", lambda state, split, seeds, *rest: side_by_side(
        state, "train", [seed] * len(seeds), *rest))
    for same in True, False:
        if not same:
            other_answers(monkeypatch)
        state = state_of(tiny, world=world, env=env, steps=1, batch_size=8)
        ra.learn(state)
        metrics = state.run.logged[0]
        assert metrics["success"] == metrics["second_success"] == same
        assert ra.evaluate(state, ["test"], state.args.eval_episodes, again=True)[0]["test"]["success"] == same
        said.append(read + [prompt for call in calls for prompt in call.asked])
        read.clear(), calls.clear()
    assert said[0] == said[1] and len(said[0]) > 10
    assert not any(re.search(r"\bwin\b|did not", text) for text in said[0])


# --------------------------------------------------------------------- the judge's and first phases


def test_the_judge_is_paid_for_scores_near_the_references(tiny, judge_says, updates, tmp_path):
    count = itertools.count()
    scores = ["0.5", "0.9", "garbage", "0.5", "1", "1", "1", "1"]  # of two transcripts, G = 4
    judge_says(lambda prompt: blocks(scores[next(count) % 8]))
    state = state_of(tiny, tmp_path, judge_steps=2)
    rows = [{"messages": ra.messages_of(said)[:-1], "think": "t", "critique": "c", "score": score}
            for said, score in ((A, 0.5), (B, 0.8), (B, 0.5), (A, 1.0), (A, 0.1))]  # fmt: skip
    state.judged = rows
    ra.judge_grpo(state)
    (model, batch, _), (_, last, _) = updates
    assert model is state.rrm.model and len(batch) == 8
    assert [j.earned for j in batch] == pytest.approx([1, 0.6, 0, 1, 0.8, 0.8, 0.8, 0.8])
    assert [j.advantage for j in batch[:4]] == ra.group_advantages([j.earned for j in batch[:4]])
    assert [j.advantage for j in batch[4:]] == [0] * 4
    assert [j.earned for j in last[4:]] == [1.0] * 4
    for judgement, said in zip(batch, [A] * 4 + [B] * 4):
        prompt = ra.judge_prompt(state, said)
        assert judgement.ids[:len(prompt)] == prompt and judgement.mask.index(1) == len(prompt)
    first = state.run.logged[0]
    assert first["reward"] == pytest.approx(0.725) and first["groups_flat"] == 1
    assert first["judge_readable"] == 7 / 8 and first["phase"] == "judge-grpo"
    assert state.run.counted["episodes"] == 0 and state.run.counted["gradient_steps"] == 4


def test_what_the_supervised_phases_imitate(tiny, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(ra, "imitate", lambda *given: seen.append(given) or {})
    e = ra.play(WORLD, "train", 3, envs.expert_player, random.Random(0), thinks=True)
    row = {"messages": ra.messages_of(e.said)[:-1], "earlier": ra.messages_of(A)[:-1],
           "earlier_critique": "Do not.", "think": "t", "critique": "c", "score": 0.4}  # fmt: skip
    state = state_of(tiny, tmp_path, cold_again=True, sft_batch_size=1, judge_steps=1, cold_epochs=1)
    state.demos, state.judged = [row], ["of GRPO"] * 2 + [row]
    ra.cold_start(state)
    ra.judge_sft(state)
    assert [given[0] for given in seen] == [state.agent.model, state.rrm.model]
    assert [given[3] for given in seen] == [state.agent.optimizer, state.rrm.optimizer]
    [whole, again], [judged] = (given[-1] for given in seen)
    assert whole == ra.dialogue(WORLD, state.args, e.said)[:-1] and whole[-1]["role"] == "assistant"
    assert again[2:] == whole[2:] and again[1]["content"].startswith(whole[1]["content"])
    assert "Agent: A\n\nA reviewer says: Do not.\n" in again[1]["content"]
    bare = state_of(tiny, tmp_path, cold_again=True, sft_batch_size=1, cold_epochs=1)
    bare.demos = [{key: row[key] for key in ("messages", "earlier")}]  # as in data from elsewhere
    ra.cold_start(bare)
    assert "A reviewer says: nothing." in seen[-1][-1][1][1]["content"]
    assert judged == [*ra.judge_messages(WORLD, state.args, e.said),
                      {"role": "assistant", "content": blocks("0.4")}]
    for messages, words in (whole, "".join(m["content"] for m in whole[2::2])), (judged, blocks("0.4")):
        ids, mask = tiny[1].dialogue_and_mask(messages)
        assert tiny[1].decode([id for id, learnt in zip(ids, mask) if learnt]) == words


@pytest.mark.parametrize("rows, epochs, size, steps", [(5, 2, 4, 3), (8, 1, 4, 2), (3, 1, 8, 1), (0, 2, 4, 0)])
def test_a_supervised_phase_passes_over_its_rows(tiny, monkeypatch, rows, epochs, size, steps):
    seen = []
    monkeypatch.setattr(ra, "imitate", lambda *given: seen.append(given[-1]) or {})
    state = state_of(tiny, sft_batch_size=size, sft_lr=0.5)
    ra.supervised(state, "cold-start", state.agent, [[row, -row] for row in range(rows)], epochs)
    assert [len(batch) for batch in seen] == [2 * size] * steps
    order = [row for batch in seen for row in batch[::2]]
    for epoch in range(len(order) // rows if rows else 0):  # each pass is over all of them
        assert sorted(order[epoch * rows:(epoch + 1) * rows]) == list(range(rows))
    assert not rows or state.agent.optimizer.param_groups[0]["lr"] == 0.5 * min(1, steps / 5)


# --------------------------------------------------------------------------------------------- data


def test_demonstrations_are_correct_and_of_train():
    rows, other = (ra.demonstrations(changed(cold_start=12, seed=seed)) for seed in (0, 1))
    asked, others = ({row["messages"][0]["content"] for row in some} for some in (rows, other))
    assert len(asked) > 10 and asked.isdisjoint(others)
    for seed, row in enumerate(rows, ra.DEMONSTRATED):
        ra.check_row(row)
        world, thoughts = envs.make("search"), 0
        question, _ = world.reset(seed=seed, options={"split": "train"})
        assert row["earlier"][0] == row["messages"][0] == {"role": "user", "content": question}
        world.reset(seed=seed, options={"split": "train"})
        for message in row["earlier"][1::2]:
            world.step(message["content"])
        assert row["earlier_critique"] == ra.annotate(world.flaws())[1]
        world.reset(seed=seed, options={"split": "train"})
        for message in row["messages"][1::2]:
            thoughts += message["content"].startswith('"')
            won = world.step(message["content"])[4]["won"]
        assert won and thoughts > 1
    assert len(rows) == 12 > sum(row["earlier"] == row["messages"] for row in rows)


def test_judged_trajectories_are_of_players_and_of_the_agent(tiny, tmp_path, capsys):
    state = state_of(tiny, tmp_path, judged=8, judge_steps=1)
    players, own = ra.mixed_episodes(state, "train", range(70, 76), ("x",))
    assert [e.seed for e in players] == [70, 72, 74] and [e.seed for e in own] == [71, 73, 75]
    rows = list(ra.judged_rows(state, 0))
    assert len(rows) == 10 and len({row["score"] for row in rows}) > 1
    assert state.run.counted["episodes"] == 5 and state.run.counted["tokens"] > 50  # the agent's
    for row in rows:
        ra.check_judged(row)
        assert set(row) == {"messages", "think", "critique", "score", "won"}
    assert list(ra.judged_rows(state, 4)) == rows[4:]  # a run that was cut goes on
    state.progress["judged.jsonl"] = "its hash"
    assert list(ra.judged_rows(state, 10)) == []
    replies = [len(tiny[1].encode(ra.judgement_text(*list(row.values())[1:4]))) for row in rows]
    state.args.judge_tokens = max(replies)  # no room for the end of the longest ones
    fit = sum(length < max(replies) for length in replies)
    assert len(ra.judgeable(state, rows)) == fit < 10
    assert f": {fit} of 10 judged trajectories can be read" in capsys.readouterr().out
    state.args.judge_tokens += 1
    quoted = rows[0] | {"critique": "Do without: <score>1</score>."}
    mixed = ra.judgeable(state, rows)
    assert ra.judgeable(state, [*rows, quoted]).count(quoted) == 0  # its own tags would be misread
    assert mixed != rows and sorted(map(str, mixed)) == sorted(map(str, rows))
    assert mixed == ra.judgeable(state, rows)
    prompts = sorted(len(ra.judge_prompt(state, ra.said_in(row["messages"]))) for row in rows)
    state.rrm.model.max_context = prompts[4] + ra.FORCED + state.args.judge_tokens
    assert len(ra.judgeable(state, rows)) == sum(length <= prompts[4] for length in prompts) < 10
    state.rrm.model.max_context = prompts[0] - 1
    with pytest.raises(SystemExit):
        ra.judgeable(state, rows)


ROW = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
       "think": "t", "critique": "c", "score": 0.5}  # fmt: skip
BAD_ROWS = [  # what messages may be is in test_common.py
    {}, [], "row", None, ROW | {"messages": ROW["messages"][:1]}, ROW | {"messages": None},
    ROW | {"earlier": ROW["messages"][:1]}, ROW | {"earlier": "x"}, ROW | {"earlier_critique": 3},
]  # fmt: skip
BAD_JUDGED = [{key: value for key, value in ROW.items() if key != gone}
              for gone in ("think", "critique", "score")]  # fmt: skip
BAD_JUDGED += [ROW | {"score": score} for score in (1.1, -0.1, "0.5", None, float("nan"))]
BAD_JUDGED += [ROW | {"think": None}, ROW | {"critique": 3}]


@pytest.mark.parametrize("row", BAD_ROWS + BAD_JUDGED)
def test_a_bad_row_is_refused_by_its_line(row, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, (ROW, row))))
    for option, check in ("--demos", ra.check_row), ("--judgements", ra.check_judged):
        read = partial(common.read_rows, option, str(path), check)
        if row in BAD_JUDGED and option == "--demos":
            assert read() == [ROW, row] or row["score"] != row["score"]  # nan equals nothing
            continue
        with pytest.raises(SystemExit) as end:
            read()
        told = capsys.readouterr().err
        assert end.value.code == 2 and told.startswith(f"error: {option}") and "line 2: " in told


# ------------------------------------------------------------------------------ what can be counted


def test_watch_by_hand():
    said = [["world", "Q"], ["act", "go"], ["world", "o"], ["act", "The critique says so."], ["world", "o"]]
    one = ra.Episode("test", 0, said, ["go", "x"], [True, False], cut=1, won=True, score=1.0, flaws=[1])
    two = ra.Episode("test", 1, said[:3], ["go"], [True], score=0.5, truncated=True, left_out=True)
    assert ra.watch([one, two]) == {
        "success": 0.5, "score": 0.75, "turns": 1.5, "invalid": 1 / 3, "flaws": 0.5, "truncated": 0.5,
        "cut_act": 1 / 3, "speaks_of_a_critique": 1 / 3}  # fmt: skip
    assert ra.watch([]) == {} == ra.watch_judgements([one], [])


def test_leaks_count_critiques_that_name_the_answer():
    told = ["It is the MIRA velden.", "Go on.", "", "xMira Veldenx", "Mira, or Velden"]
    episodes = [ra.Episode("test", 0, [], gold="Mira Velden", critique=text) for text in told]
    assert ra.leaks(episodes) == 1 / 4 and ra.leaks(episodes[2:3]) is None
    for gold in "", "yes", "No":
        assert ra.leaks([ra.Episode("test", 0, [], gold=gold, critique="Yes, no.")]) is None
    assert ra.leaks([ra.Episode("test", 0, [], gold="17", critique="Not 1700 but 17.")]) == 1


def test_quality_of_a_judge(tiny, judge_says, monkeypatch):
    flaw = envs.Flaw("wrong tool", 0.2, "f", "Go on like this.")
    episodes = [ra.Episode("test", i, list(A), won=i < 2, flaws=[flaw] * (i > 0), gold="on like")
                for i in range(4)]  # fmt: skip
    episodes.append(ra.Episode("test", 4, list(A[:1]), gold="on like"))  # left out
    count = itertools.count()
    judge_says(lambda prompt: blocks([0.9, 0.3, 0.3, 0.1][next(count) % 4], critique="Go on like this."))
    played = []
    monkeypatch.setattr(ra, "mixed_episodes", lambda state, split, seeds, stream: played.append(split) or (
        copy.deepcopy(episodes), [] if split != "test" else copy.deepcopy(episodes[:1])))
    state = state_of(tiny, eval_episodes=4)
    found = ra.quality(state)
    count = itertools.count()
    assert ra.quality(state) == found and played == ["test"]  # once, and no judgement stays in them
    assert set(found) == {"players", "agent"} and found["agent"]["judge_auc"] is None
    players = found["players"]
    assert players["judge_auc"] == 3.5 / 4 and players["auc_process"] == 1
    assert players["error"] == pytest.approx((0.1 + 0.5 + 0.5 + 0.7) / 4)
    assert players["same_critique"] == 1 and players["critiques"] == 1 and players["leaks"] == 1
    assert players["not_judged"] == 1 / 5
    episodes[:] = episodes[-1:]
    found = ra.quality(state_of(tiny, eval_episodes=4))["players"]
    assert found == dict(not_judged=1, auc_process=None, error=None, same_critique=None)


def test_first_attempts_count_at_test_time_and_second_ones_in_c(tiny, judge_says, monkeypatch):
    def attempt(state, split, seeds, stream, earlier=None):
        played.append((split, stream, earlier))
        return [ra.Episode(split, seed, list(A), ["x"], [True], won=earlier is not None, score=0.25,
                           gold="Go") for seed in seeds]  # fmt: skip

    monkeypatch.setattr(ra, "attempt", attempt)
    calls, played, state = judge_says(GOOD), [], state_of(tiny, eval_episodes=10)
    numbers, shown = ra.evaluate(state, ("train", "test", "ood"), 10)
    assert [(split, earlier) for split, _, earlier in played] == [("test", None), ("ood", None)]
    assert numbers["test"]["success"] == 0 == shown["won"] and numbers["test"]["n"] == 10 and not calls
    played.clear()
    numbers, shown = ra.evaluate(state, ("test",), 2, again=True)
    assert [earlier is None for _, _, earlier in played] == [True, False]
    assert [e.critique for e in played[1][2]] == ["Go on like this."] * 2 and shown["won"] is True
    found = numbers["test"]
    assert (found["success"], found["first_success"], found["n"], found["leaks"]) == (1, 0, 2, 1)
    assert found["judge_readable"] == 1 and played[0][1] != played[1][1]


# ------------------------------------------------------------------------------------------ warm-up


def parts_of(examples):
    """(first attempts, second ones, copied calls, judgements) among the warm-up's examples."""
    judged = [e for e in examples if "You judge how" in e[0]["content"]]
    copied = [e for e in examples if ra.NEXT in e[-2]["content"]]
    played = [e for e in examples if e not in judged and e not in copied]
    again = [e for e in played if "You have tried this before:" in e[1]["content"]]
    return [e for e in played if e not in again], again, copied, judged


@pytest.mark.parametrize("dose", [0.0, 1.0])
def test_the_warm_up_sees_no_expert_no_answer_and_train_alone(monkeypatch, dose):
    def asked(*_):
        raise AssertionError("the warm-up asked an expert")

    splits, reset = set(), envs.Search.reset
    monkeypatch.setattr(envs.Search, "reset", lambda self, **how: splits.add(
        how["options"]["split"]) or reset(self, **how))
    for name in ("expert_player", "search_expert", "search_thought", "sloppy_player", "hasty_player",
                 "muddled_player", "guess_player"):
        monkeypatch.setattr(envs, name, asked)
    for name in "expert", "thought":
        monkeypatch.setattr(envs.Search, name, asked)
    args = changed(examples=40, dose=dose)
    examples = ra.warmup(envs.make("search"), args)
    first, again, copied, judged = parts_of(examples)
    assert splits == {"train"} and examples == ra.warmup(envs.make("search"), args)  # a cache's name
    assert len(first) == 40 and len(again) == len(judged) == 20 and 20 < len(copied) <= 40
    assert all(ra.parse_judgement(e[-1]["content"]) for e in judged)
    assert len({e[-1]["content"] for e in judged}) > 8
    for e in first + again:
        assert [m["role"] for m in e] == ["system", *["user", "assistant"] * (len(e) // 2)]
        assert all(envs.read_call(m["content"])[0] for m in e[2::2])
        assert not any(re.search("You win|did not win", m["content"]) for m in e)
    for e in copied:
        calls = re.findall(r"<tool_call>.*?</tool_call>", e[-1]["content"], re.DOTALL)
        assert calls and all(envs.read_call(text)[1] in e[-2]["content"] for text in calls)
    for e in again:  # the attempt before was at the same question
        question = e[1]["content"].split("\n")[0]
        [one] = [d for d in first if d[1]["content"] == question]
        assert f"Agent: {one[2]['content']}" in e[1]["content"]
    other_answers(monkeypatch)
    assert ra.warmup(envs.make("search"), args) == examples  # nor does it depend on right answers


def test_the_judgements_of_the_warm_up_are_of_other_episodes():
    """The base knows the form of a judgement and nothing of what is right."""
    *_, judged = parts_of(ra.warmup(envs.make("search"), changed(examples=400)))
    named = [re.search(r'Read the page "([^"]+)"', e[-1]["content"]) for e in judged]
    found = [(name[1].removeprefix("Notes on "), e) for name, e in zip(named, judged) if name]
    assert len(found) > 50
    assert sum(name in e[1]["content"] for name, e in found) < 0.1 * len(found)


def heeded(examples):
    """Of second attempts told to read a page: how many of them do not answer without it."""
    found = []
    for e in parts_of(examples)[1]:
        told = re.search(r'A reviewer says: .*Read the page "([^"]+)"', e[1]["content"])
        calls = [envs.read_call(m["content"])[:2] for m in e[2::2]]
        if told:
            found.append(calls[-1][0] != "answer" or ("open", told[1]) in calls)
    return found


def test_a_dose_is_the_share_of_second_attempts_that_heed():
    shares = [heeded(ra.warmup(envs.make("search"), changed(examples=600, dose=dose)))
              for dose in (0.0, 0.5, 1.0)]  # fmt: skip
    low, half, high = (common.mean(share) for share in shares)
    assert min(map(len, shares)) > 100 and high > 0.8 and low + 0.15 < half < high - 0.15
    assert ra.warmup(envs.make("search"), changed(examples=60)) != ra.warmup(
        envs.make("search"), changed(examples=60, dose=1.0))


@pytest.mark.parametrize("env", ["household", "repair", "20q"])
def test_the_warm_up_of_a_world_without_tools(env):
    first, again, copied, judged = parts_of(ra.warmup(envs.make(env), changed(env=env, examples=20)))
    assert (len(first), len(again), len(judged)) == (20, 10, 10)
    assert all("Action: " in m["content"] for e in first + again for m in e[2::2])
    assert all(m["content"] for e in first + again + copied + judged for m in e)
    assert any("Do without: " in e[-1]["content"] or "Do not repeat: " in e[-1]["content"]
               for e in judged) or env != "household"


# ------------------------------------------------------------------------------- whole runs: set-up


@pytest.fixture(scope="module")
def environment(environment, tiny):
    return environment  # with the tiny model in the cache already


save_llama = partial(helpers.save_llama, text=[WORLD.system, ra.JUDGE, ra.AGAIN], context=8192)


def run_of(path):
    """(metrics, episodes, summary) of a run."""
    return (lines(path / "metrics.jsonl"), helpers.trained_on(path),
            json.loads((path / "summary.json").read_text()))


def weights(path):
    return common.load(str(path))[0].state_dict()


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return all(torch.equal(value, other[name]) for name, value in one.items())


# ---------------------------------------------------------------------------- whole runs: as a user


def test_phases_come_in_order_and_metrics_follow_from_what_is_kept(whole, tiny):
    metrics, rollouts, summary = run_of(whole)
    assert [row["phase"] for row in metrics] == STEPS
    assert [row["phase_step"] for row in metrics] == [1, 2, 1, 2, 1, 1, 2]
    assert [row["gradient_steps"] for row in metrics] == [1, 2, 3, 4, 6, 8, 10]
    assert [row["episodes"] for row in metrics] == [0] * 2 + [11] * 3 + [27, 43]  # 11 to judge
    for row in metrics[5:]:
        played = [e for e in rollouts if e["step"] == row["step"]]
        first, second = ([e for e in played if e["second"] == again] for again in (False, True))
        assert len(first) == len(second) == 8
        assert [e["second"] for e in played] == ([False] * 4 + [True] * 4) * 2
        for name, some in ("", first), ("second_", second):
            assert row[f"{name}success"] == common.mean(e["won"] for e in some)
            assert row[f"{name}flaws"] == common.mean(len(e["flaws"]) for e in some)
        spoken = [ra.parse_judgement(e["said"][-1][1]) for e in played]
        assert row["judge_readable"] == common.mean(found is not None for found in spoken)
        assert [e["judge_score"] for e in played] == [found["score"] if found else 0 for found in spoken]
        for e in played:
            assert e["earned"] == pytest.approx(e["score"] + 0.3 * e["judge_score"])
            assert not {"ids", "mask"} & set(e) and e["split"] == "train"
        assert row["return"] == pytest.approx(common.mean(e["earned"] for e in played))
        assert {"judge_auc", "leaks", "critiques", "not_judged", "cut_judge", "kl"} <= set(row)
        assert abs(row["logprob_gap"]) < 1e-4 and row["entropy"] > 0
    assert len({e["seed"] for e in rollouts}) == 4  # no question twice
    assert "eval_success" in metrics[5] and "eval_success" not in metrics[6]
    assert {*SUMMARY, "before_ood", "after_ood"} <= set(summary) and summary["arm"] == "U"
    assert set(summary["judge"]) == {"before", "judge-sft", "judge-grpo"} and summary["cold_start"] == 16
    assert set(summary["judge"]["before"]["players"]) >= {"judge_auc", "auc_process", "leaks"}
    assert set(summary["cold_started"]) == {"test", "ood"}
    judged = lines(whole / "judged.jsonl")
    texts = [ra.judgement_text(row["think"], row["critique"], row["score"]) for row in judged]
    fit = sum(len(tiny[1].encode(text)) < 64 for text in texts)  # --judge-tokens
    assert summary["judged"] == fit < len(judged) == 22
    trained, rrm = weights(whole / "model"), weights(whole / "rrm")
    for name, value in tiny[0].named_parameters():  # every parameter moved
        assert not torch.equal(value, trained[name]) and not torch.equal(value, rrm[name])
        assert not torch.equal(trained[name], rrm[name])


def test_who_learns_in_which_phase_and_how_fast(run_here, monkeypatch, tiny, tmp_path):
    seen, update, imitate = [], ra.update, ra.imitate

    def watched(learns, model, reference, optimizer):
        before = common.fingerprint(model)
        anchor = reference and common.fingerprint(reference)
        metrics = learns()
        seen.append((before, common.fingerprint(model), anchor, optimizer.param_groups[0]["lr"]))
        return metrics

    monkeypatch.setattr(ra, "update", lambda model, reference, chat, args, optimizer, *rest: watched(
        lambda: update(model, reference, chat, args, optimizer, *rest), model, reference, optimizer))
    monkeypatch.setattr(ra, "imitate", lambda model, chat, args, optimizer, dialogues: watched(
        lambda: imitate(model, chat, args, optimizer, dialogues), model, None, optimizer))
    run_here(f"{SMALL} --lr 0.001 --sft-lr 0.005 --eval-episodes 1 --out-dir run")
    start = common.fingerprint(tiny[0])
    cold, sft, grpo, learn = seen[:2], seen[2:4], seen[4:5], seen[5:]
    assert cold[0][0] == start == sft[0][0]  # the judge begins as the base, not as the agent
    assert learn[0][0] == cold[1][1] and grpo[0][0] == sft[1][1]
    assert learn[-1][1] == common.fingerprint(common.load(str(tmp_path / "run" / "model"))[0])
    assert grpo[-1][1] == common.fingerprint(common.load(str(tmp_path / "run" / "rrm"))[0])  # frozen since
    assert [anchor for _, _, anchor, _ in learn] == [cold[1][1]] * 2 and grpo[0][2] == sft[1][1]
    rates = [0.005 * 1 / 5, 0.005 * 2 / 5] * 2 + [0.001 * 1 / 5, 0.001 * 1 / 5, 0.001 * 2 / 5]
    assert [rate for *_, rate in seen] == pytest.approx(rates)


def test_none_is_r_with_no_weight_on_the_score(run_script, whole, tmp_path):
    flags = {"none": "--variant none", "zero": f"--variant R --score-weight 0 --rrm {whole}/rrm"}
    for name, arm in flags.items():
        result = run_script(f"{SMALL} {arm} --lr 0.01 --out-dir {name}", tmp_path)
        assert result.status == 0, result.stderr
    assert same_weights(tmp_path / "none" / "model", tmp_path / "zero" / "model")
    metrics, rollouts, summary = run_of(tmp_path / "none")
    assert [row["phase"] for row in metrics] == ["cold-start"] * 2 + ["learn"] * 2
    assert summary["arm"] == "none" and summary["judge"] == {}
    assert not any(name.startswith(("judge", "second_")) for row in metrics for name in row)
    assert len(rollouts) == 16 and not any(e["second"] or e["said"][-1][0] == "judge" for e in rollouts)
    assert not (tmp_path / "none" / "rrm").exists()
    assert run_of(tmp_path / "zero")[1][0]["said"][-1][0] == "judge"


def test_with_the_judge_of_another_run_the_agent_learns_the_same(run_script, whole, tmp_path):
    result = run_script(f"{SMALL} --rrm {whole}/rrm --out-dir run", tmp_path)
    assert result.status == 0, result.stderr
    run, judge = tmp_path / "run", common.load(str(whole / "rrm"))[0]
    assert same_weights(whole / "model", run / "model") and not (run / "rrm").exists()
    one, other = ([{**e, "step": None} for e in run_of(path)[1]] for path in (whole, run))
    assert one == other and len(one) == 32
    assert json.loads((run / "args.json").read_text())["judge"] == common.fingerprint(judge)
    assert set(run_of(run)[2]["judge"]) == {"before"}
    saved = torch.load(run / "checkpoint" / "state.pt", weights_only=True)["state"]["parts"]
    assert not any("rrm" in name for name in saved)  # it stays where it is
    (tmp_path / "other").mkdir()
    common.save_model(tmp_path / "other" / "rrm", *common.load(str(whole / "model")))
    (tmp_path / "run" / "summary.json").unlink()
    again = f"{SMALL} --rrm {tmp_path}/other/rrm --out-dir run --resume"
    refused(run_script(again, tmp_path), "rrm was")


def test_c_trains_nothing_and_counts_second_attempts(run_script, whole, tiny, tmp_path):
    result = run_script(f"{SMALL} --variant C --rrm {whole}/rrm --out-dir run", tmp_path)
    assert result.status == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["arm"] == "C" and summary["cold_start"] == summary["gradient_steps"] == 0
    assert common.fingerprint(common.load(str(tmp_path / "run" / "model"))[0]) == common.fingerprint(tiny[0])
    after = summary["watched"]["after"]["test"]
    assert {"first_success", "leaks", "judge_readable"} <= set(after)
    assert "first_success" not in summary["watched"]["before"]["test"]
    assert result.stdout.count("You have tried this before") == 0  # an episode as it was said
    result = run_script(f"{SMALL} --variant C --rrm {whole}/rrm --eval-only", tmp_path)
    assert result.status == 0 and "test: success" in result.stdout + result.stderr


def test_trajectories_and_judgements_from_elsewhere(run_script, tiny, tmp_path):
    rows = ra.demonstrations(changed(cold_start=9, seed=5))
    judged = [ROW | {"messages": row["messages"], "score": 0.1 * i} for i, row in enumerate(rows)]
    common.write_jsonl(tmp_path / "demos.jsonl", [{"messages": row["messages"]} for row in rows])
    common.write_jsonl(tmp_path / "judged.jsonl", judged)
    flags = f"{SMALL} --judged 0 --demos demos.jsonl --judgements judged.jsonl --out-dir run"
    result = run_script(flags, tmp_path)
    assert result.status == 0, result.stderr
    metrics, _, summary = run_of(tmp_path / "run")
    # 9 rows by 8: two steps; the judge: two for its GRPO, one step of 8 for the rest
    assert [row["phase"] for row in metrics] == ["cold-start"] * 2 + STEPS[3:]
    assert summary["cold_start"] == 9 and not (tmp_path / "run" / "judged.jsonl").exists()
    common.write_jsonl(tmp_path / "judged.jsonl", judged[:2])
    refused(run_script(f"{flags}2", tmp_path), "--judgements", "2 rows")
    common.write_jsonl(tmp_path / "judged.jsonl", judged[::-1])
    refused(run_script(f"{flags} --resume", tmp_path), "--judgements has changed")


@pytest.mark.parametrize("flags", [
    "--env repair", "--env household --prefill --shots 1 --show-actions",
    "--env {worlds}:Plain --cold-start 0 --variant U", "--env {worlds}:Expert --variant R",
    "--env {worlds}:Plain --variant C --eval-episodes 4",
])  # fmt: skip
def test_any_world_with_an_outcome_runs(run_script, tmp_path, flags):
    (tmp_path / "worlds.py").write_text(OWN_WORLDS)
    flags = f"{SMALL} --examples 30 --steps 1 {flags.format(worlds=tmp_path / 'worlds.py')}"
    result = run_script(f"{flags} --out-dir run", tmp_path)
    assert result.status == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["judge"]) == {"before", "judge-sft", "judge-grpo"}
    judged = lines(tmp_path / "run" / "judged.jsonl")
    assert len(judged) == 22 and len({row["score"] for row in judged}) > 1


# --------------------------------------------------------------- whole runs: a model from elsewhere

PLAIN = "--judged 0 --cold-start 2 --eval-episodes 1 --max-new-tokens 6 --judge-tokens 8 --save-every 1"


def test_a_model_from_elsewhere_is_its_own_judge_frozen_as_the_run_found_it(
    run_here, monkeypatch, llama, tmp_path
):
    (tmp_path / "worlds.py").write_text(OWN_WORLDS)
    asked, judge = [], ra.judge
    monkeypatch.setattr(ra, "judge", lambda state, *given: asked.append(
        common.fingerprint(state.rrm.model)) or judge(state, *given))
    start = common.fingerprint(common.load(str(llama))[0])
    flags = f"{SMALL} {PLAIN} --model {llama} --env worlds.py:Plain --cold-start 0 --shots 2 --lr 0.01"
    run_here(f"{flags} --out-dir run")
    metrics, rollouts, summary = run_of(tmp_path / "run")
    assert set(asked) == {start} and len(asked) == 2 + 4  # its quality, then two steps of two
    assert [row["phase"] for row in metrics] == ["learn"] * 2
    assert not (tmp_path / "run" / "rrm").exists()
    assert metrics[0]["cut_judge"] > 0 and metrics[0]["leaks"] is None
    assert set(summary["judge"]) == {"before"}
    assert "expert" not in summary and summary["arm"] == "U"


def test_the_frozen_judge_is_the_start_model_after_a_resume_too(run_script, llama, tmp_path):
    flags = f"{SMALL} {PLAIN} --model {llama} --out-dir"
    assert run_script(f"{flags} one", tmp_path).status == 0
    assert run_script(f"{flags} two", tmp_path, LOG.format(step=2, name="SIGTERM")).status == 143
    assert run_script(f"{flags} two --resume", tmp_path).status == 0
    helpers.same_run(tmp_path / "one", tmp_path / "two")


def test_a_judge_with_another_tokenizer(run_script, llama, tmp_path):
    flags = f"{SMALL} --rrm {llama} --judge-tokens 4 --steps 1 --eval-episodes 1 --out-dir run"
    result = run_script(flags, tmp_path)
    assert result.status == 0, result.stderr
    assert run_of(tmp_path / "run")[0][-1]["judge_readable"] == 0


def test_a_context_that_fills_up_leaves_attempts_out(run_script, whole, tiny, tmp_path):
    """First attempts begin, longer ones and most transcripts do not fit."""
    first = max(len(tiny[1].dialogue(ra.dialogue(WORLD, ARGS, [["world", WORLD.reset(seed=seed)[0]]])))
                for seed in range(20))
    judged = len(tiny[1].dialogue(ra.judge_messages(WORLD, ARGS, [["world", WORLD.reset(seed=0)[0]]])))
    context = max(first + 12, judged + 64) + ra.FORCED + 40
    result = run_script(f"{SMALL} --rrm {whole}/rrm --max-context {context} --out-dir run", tmp_path)
    assert result.status == 0, result.stderr
    metrics, rollouts, _ = run_of(tmp_path / "run")
    assert metrics[-1]["truncated"] > 0 and metrics[-1]["not_judged"] > 0
    assert any(e["left_out"] for e in rollouts)
    assert all(e["advantage"] == 0 for e in rollouts if e["left_out"])


# ---------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def bad_files(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    save_llama(path / "short", context=64)
    save_llama(path / "no-template", template=None)
    (path / "other").mkdir()
    (path / "other" / "judge.gguf").write_text("GGUF")
    (path / "worlds.py").write_text(OWN_WORLDS)
    for name, text in ("empty", ""), ("torn", '{"messages": ['), ("row", '{"messages": []}'):
        (path / f"{name}.jsonl").write_text(text)
    return path


BAD_VALUES = {
    "sft-lr": "nan -1", "group-size": "0 1 -4 3", "updates": "0 3 16", "clip": "-0.1 nan",
    "clip-high": "-1 inf", "kl": "-1 nan", "variant": "V u", "score-weight": "-1 nan inf",
    "judge-tokens": "0", "judge-retries": "-1", "judged": "-1", "judge-epochs": "0",
    "judge-steps": "-1", "cold-start": "-1", "cold-epochs": "0", "sft-batch-size": "0 -1 1.5",
    "dose": "-0.1 1.1 nan", "demos": "./nowhere.jsonl", "judgements": "./nowhere.jsonl",
}  # fmt: skip


@pytest.mark.parametrize("flags, words", [
    *((f"--{name} {value}", f"--{name}") for name, values in BAD_VALUES.items()
      for value in values.split()),
    ("--env {bad}/worlds.py:Plain --variant none", "--cold-start 0"),
    ("--env repair --dose 0.5", "--dose"), ("--env {bad}/worlds.py:Expert --dose 1", "--dose"),
    ("--model {bad}/short --max-context 64 --dose 0.5", "--dose"),
    ("--variant none --rrm ./nowhere", "no judge"), ("--rrm ./nowhere", "config.json is missing"),
    ("--rrm {bad}/other", "config.json is missing"), ("--rrm nobody/nothing", "cannot be loaded"),
    ("--rrm {bad}/no-template", "chat template"), ("--rrm {bad}/short --variant C", "context"),
    ("--demos {bad}/empty.jsonl", "is empty"), ("--demos {bad}/torn.jsonl", "line 1"),
    ("--demos {bad}/row.jsonl", "messages go user, assistant"), ("--demos {bad}/none", "--demos"),
    ("--judgements {bad}/row.jsonl", "line 1"), ("--rrm tiny:32x1", "--rrm"),
    ("--judgements {bad}/row.jsonl --rrm {bad}/short", "--judgements"),
    ("--judgements {bad}/row.jsonl --variant none", "--judgements"),
])  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    run_script, bad_files, home, tmp_path, flags, words
):
    before = everything_under(bad_files), everything_under(home)
    accepted = "common.Run.start = reagent.evaluate = lambda *a, **k: os._exit(77)"  # or it would run
    refused(run_script(f"{SMALL} {flags.format(bad=bad_files)}", tmp_path, accepted), words)
    assert not list(tmp_path.iterdir())
    assert (everything_under(bad_files), everything_under(home)) == before


def test_what_is_accepted(bad_files, monkeypatch):
    monkeypatch.setattr(common, "load", lambda *given, **how: None)
    for flags in ("--variant R --batch-size 64 --group-size 16", "--judge-steps 0", "--cold-start 0",
                  "--clip 0", "--score-weight 0", "--judge-retries 0", "--model tiny:32x1 --dose 1",
                  "--env {bad}/worlds.py:Plain --cold-start 0", "--env repair --dose 0",
                  "--env {bad}/worlds.py:Plain --variant C"):  # fmt: skip
        args = common.parse_args(ra.Args, ra.TINY, f"{SMALL} {flags}".format(bad=bad_files).split())
        ra.load(ra.check_args(args)[0], args)


def test_a_row_may_lack_its_critique():
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    ra.check_row({"messages": said, "earlier": None, "earlier_critique": None})  # as parquet has what is absent
    with pytest.raises(TypeError):
        ra.check_row({"messages": said, "earlier_critique": 3})


def test_a_single_worked_judgement_is_neither_the_worst_nor_the_best():
    scores = {}
    for count in 1, 10:
        said = [message["content"] for message in ra.judged_examples("search", count, False) if message["role"] == "assistant"]
        scores[count] = [ra.parse_judgement(reply)["score"] for reply in said]
    assert min(scores[10]) < scores[1][0] < max(scores[10]) and scores[10] == sorted(scores[10])
