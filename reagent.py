r"""Reagent (Fan et al., arXiv 2601.22154): an agent that learns from a judge's words and score.

Agent-RRM, a reward model that explains itself, reads the whole transcript of an episode, never the
right answer, and writes three blocks: <think> an analysis, <critique> a few words to the agent,
<score> a number in [0, 1]. Ways to use it:

 C  text only, the agent is not trained: attempt, critique, second attempt with the critique in
    view; the second one counts.
 R  score only: GRPO with R = R_rule + lambda * score.
 U  both: G first attempts at a question are judged, each is attempted once more with its critique
    in view, the second ones are judged too, both get R, and advantages are normalised over the pool
    of all 2G. Each attempt's ratio is taken in its own context: the second stays conditioned on the
    first and its critique, whose tokens are not trained there. At test time: the first alone.
 none  lambda = 0, first attempts only.
The control that the paper lacks is R with --batch-size and --group-size twice as large: as many
attempts at as many questions as U.

One run: 1. cold start of the agent on correct trajectories; 2. judged trajectories, half of players
of different strength, half of the agent as it is then; 3. the judge learns them (SFT), then GRPO,
paid for how close its score is to the reference, with nothing for what cannot be read; 4. the
agent's own learning. C skips 1 and 4; none skips 2 and 3, and so does whatever has a judge: any
model can be one without training (--rrm), and --model itself is it by default.

Departures from the paper, and why:
 1. Without --rrm the judge is --model as the run finds it, frozen and prompted: one GPU trains one
    model a day. --judged N trains it, as the paper does, where a program can name the flaws of a
    process (`annotate`); the paper's reference judgements come from a model of 120 billion
    parameters. The agent never meets the program: it works with the trained judge. Of the agent's
    own trajectories only first attempts are judged there. (The warm-up of a tiny model contains
    judgements of random flaws, which teach the form only.)
 2. The reward of the judge's GRPO and the prompt of the second attempt are unpublished; those below
    are ours, and the words of a critique earn nothing. A judgement that cannot be read is tried
    again at --temperature (paper's script: once more at 0). A second attempt is judged by itself,
    without the first. In worlds without tools the rubric speaks of actions.
 3. Cold-start trajectories come from the world's expert, with thoughts where there are any,
    --cold-start of them (paper: 55.6 thousand of a stronger model). Each is imitated twice, the
    second time below another player's attempt at the same question, as a second attempt without a
    critique (paper: unstated); without that, a small model forgets the form of second attempts.
 4. Transcripts lack native thoughts (off without --thinking), lists of possible actions, and the
    last observation, in which our worlds say how the game ended: neither judge nor second attempt
    may know. An attempt whose first prompt does not fit the context is a lost one.
 5. No KL term by default, as in the paper's script; --kl has the equation's. Learning rates rise
    over the first 5 steps of each phase, gradients are clipped to norm 1; evaluation without top-p;
    SFT at --temperature, so that what imitates is the policy that samples; as many turns as the
    world allows (paper: 13). R_rule is the world's own score: of `search`, the paper's rule.

    python reagent.py  # everything, on search, with the tiny model: see README
    python reagent.py --variant none --out-dir runs/none  # or C
    python reagent.py --rrm runs/reagent-search-s0/rrm --out-dir runs/U  # with an existing judge
    python reagent.py --variant R --batch-size 256 --group-size 16 \
        --rrm runs/reagent-search-s0/rrm --out-dir runs/R  # as many attempts as U
    python reagent.py --model Qwen/Qwen3-1.7B --env search-full  # the paper's settings, zero-shot
        # judge; float32 weights, gradients and moments 28 GB, the judge 3.5 GB; not run by us yet
    python reagent.py --quick --out-dir runs/quick  # the whole path in under a minute
"""

import copy
import dataclasses
import functools
import itertools
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import common
import envs


@dataclass
class Args:
    """The command line: the paper's algorithm, in sizes that one GPU does in a day."""

    # shared by all scripts
    model: str = common.flag("tiny", "tiny, tiny:WIDTHxLAYERS, smollm2, a .gguf file, a local directory or a hub id")
    env: str = common.flag("search", "a world: a name, NAME:ARGUMENT, or path/to/file.py:Class")
    seed: int = common.flag(0, "of everything sampled; the tiny model is built with seed 0")
    steps: int = common.flag(100, "of the agent's learning (paper: 300)")
    lr: float = common.flag(5e-7, "AdamW, of GRPO, the agent's and the judge's (paper)")
    batch_size: int = common.flag(256, "first attempts per step: questions x --group-size (paper)")
    micro_batch_size: int = common.flag(1, "sequences per backward pass; changes memory and speed, not the gradient")
    rollout_batch_size: int = common.flag(64, "episodes or replies sampled side by side; changes memory and speed alone")
    max_new_tokens: int = common.flag(512, "of one reply of the agent (not in the paper)")
    max_context: int | None = common.flag(None, "tokens of a prompt with its reply; default: what the model can read")
    temperature: float = common.flag(0.7, "while training, and of the log-probs (paper)")
    eval_temperature: float = common.flag(0.6, "in evaluation (paper)")
    eval_episodes: int = common.flag(200, "per split, at both ends and after the cold start; a fifth, of `test`, in between")
    eval_every: int = common.flag(20, "steps between evaluations")
    eval_only: bool = common.flag(False, "evaluate --model and stop; writes nothing")
    save_every: int = common.flag(10, "steps of any phase between checkpoints")
    out_dir: str = common.flag("", "default: runs/reagent-ENV-sSEED")
    resume: bool = common.flag(False, "continue the run in --out-dir")
    device: str = common.flag(common.default_device(), "cpu, cuda, cuda:1, mps")
    dtype: str = common.flag("auto", "auto (float32 weights; bfloat16 compute on a GPU), float32, bfloat16")
    thinking: bool = common.flag(False, "let a thinking model think natively before each reply")
    shots: int = common.flag(0, "worked examples before the first turn of every part, by a random player on train")
    prefill: bool = common.flag(False, "begin every reply with its marked word, such as Action: (no room to reason before it)")
    show_actions: bool = common.flag(False, "list what is possible now in every observation (one more departure)")
    quick: bool = common.flag(False, "a small run through every line, to see that it works; overrides the sizes")
    # group-relative policy optimisation
    group_size: int = common.flag(8, "first attempts at one question (paper)")
    updates: int = common.flag(2, "gradient steps that a step's questions are split into (paper)")
    clip: float = common.flag(0.2, "the ratio counts as at least 1 - clip (paper)")
    clip_high: float = common.flag(0.2, "and as at most 1 + clip_high (paper); its script: 0.34")
    kl: float = common.flag(0.0, "weight of the KL to the policy at the start of the phase (not in the paper; its script: no KL)")
    # Reagent
    variant: str = common.flag("U", "how the judge is used", choices=["U", "R", "C", "none"])
    score_weight: float = common.flag(0.3, "lambda, of the judge's score beside the rule's reward (paper)")
    pool: str = common.flag("joint", "U: advantages over all 2G attempts (paper), or over each G", choices=["joint", "separate"])
    rrm: str = common.flag("", "the judge, any model as in --model; default: --model, trained if there is --judged, else as it is")
    judge_tokens: int = common.flag(1024, "of one judgement (not in the paper)")
    judge_retries: int = common.flag(1, "of a judgement that cannot be read, then it is 0 and empty (not in the paper; its script: 1)")
    judged: int = common.flag(0, "trajectories for the judge's SFT, half the agent's own; 0: no training (paper: 28 thousand)")
    judge_epochs: int = common.flag(2, "of its SFT (paper)")
    judge_steps: int = common.flag(20, "of its GRPO, on as many fresh trajectories as a step has questions (paper: 90 thousand)")
    cold_start: int = common.flag(2000, "correct trajectories of the expert that the agent imitates first; 0: none (paper: 55.6 thousand)")
    cold_epochs: int = common.flag(2, "of the cold start (paper)")
    sft_batch_size: int = common.flag(32, "trajectories per gradient step of judge SFT and cold start (paper)")
    sft_lr: float = common.flag(1e-5, "AdamW, of judge SFT and cold start (paper)")
    examples: int = common.flag(10000, "rounds of warm-up examples that make a tiny model")


# ------------------------------------------------------------------------------ prompts and forms
# The three blocks are the paper's, the rubric is its script's; the wording is ours. A world's own
# system prompt states the game, these state the form of a reply.

CALL = "Give your reasons first if it helps, then make one tool call."
ACT = "Give your reasons, then write Action: and your next action on a line of its own."
TOOLS = """Were tools called where they were needed? Was a call misused, made up or repeated?
Were the limits of the tools respected? Did the agent get better as it went on?
Was anything guessed without being checked, or made up?"""
ACTIONS = """Did every action serve the task? Was an action impossible, pointless or repeated?
Were the rules respected? Did the agent get better as it went on?
Was anything guessed without being checked, or made up?"""
JUDGE = """You judge how an agent worked on a task. You read the task and the whole transcript.
Nobody tells you whether the agent succeeded.
{rubric}
Reply with three blocks, in this order:
<think>your analysis</think>
<critique>to the agent: what to do differently, without the answer or a hint to it</critique>
<score>one number from 0, harmful, to 1, flawless</score>

This is what the agent was told:
{system}"""
CASE = """The task:
{task}

The transcript:
{transcript}

Now write the three blocks."""
AGAIN = """You have tried this before:
{transcript}

A reviewer says: {critique}

Try again from the start, with your first turn."""


def written(world, action, thought="") -> str:
    """A reply as the agent writes it: a thought, if any, and the action in the form it was told."""
    said = action if world.tools else f"Action: {action}"
    return f"{thought}\n{said}" if thought else said


def opening(world, observation, before=None, examples=()) -> list[dict]:
    """The messages that an attempt starts with.

    `before`: the history of the first attempt and its critique.
    """
    system = {"role": "system", "content": f"{world.system}\n{CALL if world.tools else ACT}"}
    if before:
        history, critique = before
        told = AGAIN.format(transcript=transcript(history), critique=critique or "nothing.")
        observation = f"{observation}\n\n{told}"
    return [system, *examples, {"role": "user", "content": observation}]


def transcript(history) -> str:
    """What was said and seen after the first observation of [observation, reply, ..., observation].

    Left out: native thoughts, lists of possible actions, and the last observation, which tells how
    the game ended: nobody who reads a transcript may know whether the answer was right.
    """
    lines = []
    for reply, observation in zip(history[1::2], history[2::2]):
        lines += [f"Agent: {common.aloud(reply)}", f"Observation: {envs.bare(observation)}"]
    return "\n".join(lines[:-1])


def spoken(history) -> list[dict]:
    """The messages behind an opening, up to the agent's last reply."""
    return [
        {"role": ("assistant", "user")[i % 2], "content": text}
        for i, text in enumerate(history[1:-1])
    ]


def judge_messages(world, history, examples=()) -> list[dict]:
    """A call of its own over the whole transcript, with what the agent was told, tools and all."""
    system = JUDGE.format(rubric=TOOLS if world.tools else ACTIONS, system=world.system)
    return [{"role": "system", "content": system}, *examples, case(history)]


def case(history) -> dict:
    """The message that shows a transcript to the judge."""
    text = CASE.format(task=envs.bare(history[0]), transcript=transcript(history))
    return {"role": "user", "content": text}


def forced(args, world) -> tuple[str, str]:
    """How every reply of the agent and of the judge begins: empty without --prefill."""
    if not args.prefill:
        return "", ""
    return "<tool_call>" if world.tools else "Action:", "<think>"


MARKDOWN = " \t*_`#>"
TAG = re.compile(r"<\s{0,9}(/?)\s{0,9}(think|critique|score)\s{0,9}>", re.IGNORECASE)
NUMBER = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
SCORE = re.compile(  # words, the number, perhaps of how many, words
    rf"[^0-9]*?(?<![\w.,+\-\u2212]){NUMBER}(?:\s*(?:/|out of)\s*{NUMBER}|\s*(%))?"
    r"(?![\w/+-]|[.,]\w)[^0-9]*",
    re.IGNORECASE,
)


def parse_judgement(text) -> dict | None:
    """The last three blocks -> {"think", "critique", "score"}; None where one is missing.

    None, too, where the score is no number in [0, 1]. What stands before, between and behind the
    blocks is skipped, and so is a thinking model's own thought.
    """
    tags = list(TAG.finditer(text))
    names = [(tag[1] + tag[2]).lower() for tag in tags]
    ends = ["/think", "critique", "/critique", "score"]
    for i in range(len(tags) - 1, 3, -1):
        if names[i - 3 : i + 1] != ends:
            continue
        if "think" not in names[: i - 3]:
            return None
        start = i - 4 - names[: i - 3][::-1].index("think")
        words = {
            "think": text[tags[start].end() : tags[i - 3].start()],
            "critique": text[tags[i - 2].end() : tags[i - 1].start()],
        }
        last = text[tags[i].end() : tags[i + 1].start() if i + 1 < len(tags) else len(text)]
        score = parse_score(last)
        return (
            None if score is None else {k: v.strip() for k, v in words.items()} | {"score": score}
        )
    return None


def parse_score(text) -> float | None:
    """The one number in the first line that is not empty: 0.8, .8, 8/10, 80%.

    None where it is not sure to be meant in [0, 1].
    """
    line = next((line for line in text.splitlines() if line.strip(MARKDOWN)), "").strip(MARKDOWN)[
        :300
    ]
    found = SCORE.fullmatch(line) or SCORE.fullmatch(re.sub(r"\([^()]*\)", "", line))
    if not found:
        return None
    number, scale = float(found[1]), 100.0 if found[3] else float(found[2] or 1)
    if scale < 1 or scale > 1 and 0 < number < 1:  # 0.8/10, 0.8%: what is meant?
        return None
    return number / scale if number <= scale else None


# -------------------------------------------------------------------------------- worked examples


def worked_examples(args, write):
    """--shots dialogues of one turn: what a random player met and did on train; `write`: the form of the reply."""
    world, messages = envs.make(args.env, show_actions=args.show_actions), []
    for seed in range(10**6, 10**6 + args.shots):  # far from the seeds that are learnt from
        observation, info = world.reset(seed=seed, options={"split": "train"})
        action = envs.random_player(world, info, random.Random(seed))
        messages.append({"role": "user", "content": observation})
        messages.append({"role": "assistant", "content": write(action), "shot": True})
    world.close()
    return messages


def worked_judgements(args) -> list[dict]:
    """--shots judgements of random play on train, in good form, as messages.

    By turns of play that was lost and of play that was won, as far as there is any.
    """
    world, plays = envs.make(args.env), {False: [], True: []}
    for i in range(40):
        play = random_play(world, 2 * 10**6 + i, turns=12)
        plays[play["won"]].append(play)
        if i >= 10 and min(map(len, plays.values())) * 2 >= args.shots:
            break
    world.close()
    lost, won = (
        sorted(plays[side], key=lambda play: len(str(play["history"]))) for side in (False, True)
    )
    turns = itertools.zip_longest(lost, won)
    chosen = [play for pair in turns for play in pair if play][: args.shots]
    messages = []
    for play in chosen:
        messages.append(case(play["history"]))
        messages.append({"role": "assistant", "content": remark(play), "shot": True})
    return messages


def random_play(world, seed, turns) -> dict:
    """So many turns of a random player on train."""
    rng = random.Random(seed)
    observation, info = world.reset(seed=seed, options={"split": "train"})
    play, over = {"history": [observation], "actions": [], "refused": 0}, False
    while not over and len(play["actions"]) < turns:
        reply = written(world, envs.random_player(world, info, rng))
        observation, _, terminated, truncated, info = world.step(reply)
        play["history"] += [reply, observation]
        play["actions"].append(info["action"])
        play["refused"] += not info["valid"]
        over = terminated or truncated
    return play | {"won": bool(info["won"])}


def remark(play) -> str:
    """What can be said of a play by counting: a judgement in good form."""
    turns, repeated = len(play["actions"]), len(play["actions"]) - len(set(play["actions"]))
    spoilt = min(1.0, (repeated + play["refused"]) / turns)
    last = envs.one_line(play["actions"][-1])
    think = (
        f"The agent took {envs.count(turns, 'turn')}; {play['refused']} of its actions were refused,"
        f" {repeated} repeated an earlier one. "
    )
    critique = "Do not do again what you have done already. " if repeated else ""
    if play["won"]:
        think += f'Its last action was "{last}". That did what the task asked for.'
        critique += "Go on like this, and let every step serve the task."
    else:
        think += f'Its last action was "{last}". That did not do what the task asked for.'
        critique += "Before each step, ask what the task still needs, and do that."
    return judgement(think, critique, (0.9 if play["won"] else 0.3) - 0.3 * spoilt)


def judgement(think, critique, score) -> str:
    """The three blocks."""
    return f"<think>{think}</think>\n<critique>{critique}</critique>\n<score>{score:.1f}</score>"


@functools.lru_cache(maxsize=8)
def shots_of(env, show_actions, count) -> tuple[list[dict], list[dict]]:
    """The worked examples of the agent and of the judge, made once."""
    if not count:
        return [], []
    args = Args(env=env, show_actions=show_actions, shots=count)
    world = envs.make(env)
    acted = worked_examples(args, functools.partial(written, world))
    world.close()
    return acted, worked_judgements(args)


def shots(args) -> tuple[list[dict], list[dict]]:
    """The worked examples of the agent and of the judge: none by default."""
    return shots_of(args.env, args.show_actions, args.shots)


# ---------------------------------------------------------------------------------------- rollout


def rollout(model, chat, args, split, seeds, *, temperature, stream, before=None):
    """Plays an episode per seed, --rollout-batch-size at once -> a dict each.

    `ids` and `mask` are for the loss, `rule` is R_rule. `before`: (history, critique) of an earlier
    attempt per episode, for second attempts. `stream` names the randomness: a row's depends on
    (--seed, stream, row, turn) and on nothing else. What does not fit the context is not played
    and scores 0.
    """
    episodes, size = [], args.rollout_batch_size
    for i in range(0, len(seeds), size):
        streams = [(*stream, row) for row in range(i, min(i + size, len(seeds)))]
        told = before[i : i + size] if before else [None] * len(streams)
        episodes += side_by_side(
            model, chat, args, split, seeds[i : i + size], streams, temperature, told
        )
    return episodes


@torch.no_grad()
def side_by_side(model, chat, args, split, seeds, streams, temperature, before):
    """The `rollout` of episodes that share a cache, a stream for each."""
    worlds, episodes, prompts = [], [], []
    for seed, told in zip(seeds, before):
        world = envs.make(args.env, show_actions=args.show_actions)
        observation, _ = world.reset(seed=seed, options={"split": split})
        worlds.append(world)
        prompts.append(chat.dialogue(opening(world, observation, told, shots(args)[0])))
        episodes.append(
            {
                "split": split,
                "seed": seed,
                "history": [observation],
                "actions": [],
                "valid": [],
                "cut": 0,
                "won": False,
                "rule": 0.0,
                "over": False,
                "truncated": False,
            }
        )
    dialogues = common.Dialogues(model, chat, prompts)
    word, _ = forced(args, worlds[0])
    room = model.max_context - args.max_new_tokens - len(chat.encode(word))
    live = list(range(len(episodes)))
    while True:
        for i in live:  # a full context ends the episode; old turns are never dropped
            episodes[i]["truncated"] = len(dialogues.ids[i]) > room
        live = [i for i in live if not episodes[i]["truncated"]]
        if not live:
            break
        row_seeds = [
            common.row_seed(args.seed, *streams[i], len(episodes[i]["history"])) for i in live
        ]
        replies = dialogues.reply(
            live,
            max_new_tokens=args.max_new_tokens,
            temperature=temperature,
            seeds=row_seeds,
            prefill=word,
        )
        for i, reply, complete in zip(live, replies.texts, replies.complete):
            take_turn(worlds[i], episodes[i], reply)
            episodes[i]["cut"] += not complete
        live = [i for i in live if not episodes[i]["over"]]
        dialogues.extend(live, [episodes[i]["history"][-1] for i in live])
    for i, e in enumerate(episodes):
        worlds[i].close()
        e["ids"], e["mask"], e["logprob"] = dialogues.sampled(i)
        if not any(e["mask"]):  # never played: the loss need not read the prompt
            e["ids"], e["mask"] = e["ids"][:1], [0]
    return episodes


def take_turn(world, episode, reply):
    """One turn of an episode; the world meets what was said aloud. Returns its info."""
    observation, _, terminated, truncated, info = world.step(common.aloud(reply))
    episode["history"] += [reply, observation]
    episode["actions"].append(info["action"])
    episode["valid"].append(info["valid"])
    episode.update(won=info["won"], rule=info["score"], over=terminated or truncated)
    return info


# -------------------------------------------------------------------------------------- Agent-RRM


def judge(rrm, world, args, histories, stream):
    """Agent-RRM on whole transcripts -> {"think", "critique", "score", "parsed", ...} each.

    Unreadable after the retries, too long to judge or not played: 0 and empty. `tokens` of all its
    replies; `asked`: how many; `cut`: how many the limit cut off. `stream` is that of `rollout`.
    """
    model, chat = rrm
    _, word = forced(args, world)
    prompts = [
        chat.dialogue(judge_messages(world, history, shots(args)[1]), word) for history in histories
    ]
    out = [
        {
            "think": "",
            "critique": "",
            "score": 0.0,
            "parsed": False,
            "tokens": 0,
            "asked": 0,
            "cut": 0,
        }
        for _ in histories
    ]
    room = model.max_context - args.judge_tokens
    left = [i for i, prompt in enumerate(prompts) if len(prompt) <= room and len(histories[i]) > 1]
    for attempt in range(1 + args.judge_retries):
        if not left:
            break
        replies = common.generate(
            model,
            chat,
            [prompts[i] for i in left],
            max_new_tokens=args.judge_tokens,
            temperature=args.temperature
            if attempt
            else 0.0,  # greedily it would only repeat itself
            rows=args.rollout_batch_size,
            seeds=[common.row_seed(args.seed, *stream, "judge", attempt, i) for i in left],
        )
        for i, text, ids, complete in zip(left, replies.texts, replies.ids, replies.complete):
            found = parse_judgement(word + text)
            out[i] |= (found or {}) | {"parsed": found is not None}
            out[i]["tokens"] += len(ids)
            out[i]["asked"] += 1
            out[i]["cut"] += not complete
        left = [i for i in left if not out[i]["parsed"]]
    return out


COSTS = {
    "skipped lookup": 0.4,
    "unsupported guess": 0.4,
    "wrong conclusion": 0.4,
    "repeated call": 0.2,
    "wrong tool": 0.2,
    "no answer": 0.5,
}
FOUND = {
    "skipped lookup": "Not every page that the question needs was read.",
    "unsupported guess": "The answer does not come from what was read.",
    "wrong conclusion": "All was read, but something else follows from it.",
    "repeated call": "A call was made twice.",
    "wrong tool": "A tool was not used as it is described.",
    "no answer": "There is no answer."}  # fmt: skip
ADVICE = {
    "skipped lookup": "Read every page that the question needs before you answer.",
    "unsupported guess": "Answer with what you have read.",
    "wrong conclusion": "Answer what was asked.",
    "repeated call": "Do not call the same tool with the same words twice.",
    "wrong tool": "Use tools as they are described.",
    "no answer": "Give an answer before the turns run out."}  # fmt: skip
FLAWLESS = "Every call was needed, and the answer follows from what was read.", "Go on like this."


def has_expert(world) -> bool:
    """Whether the world knows what to do."""
    try:
        world.reset(seed=0, options={"split": "train"})
        world.expert()
    except (NotImplementedError, AttributeError):
        return False
    return True


def annotated(world) -> bool:
    """Whether a program can name the flaws of a process, from what the agent could know."""
    return isinstance(world, envs.Search)


def process_score(flaws) -> float:
    """1 for a flawless process."""
    return max(0.0, 1.0 - sum(COSTS[flaw] for flaw in flaws))


def annotate(flaws) -> str:
    """The reference judgement for the flaws of a process; the right answer is not asked."""
    think = " ".join(FOUND[flaw] for flaw in flaws) or FLAWLESS[0]
    critique = " ".join(ADVICE[flaw] for flaw in flaws) or FLAWLESS[1]
    return judgement(think, critique, process_score(flaws))


def process_flaws(world, history, valid) -> list[str] | None:
    """The flaws of a process that have a cost; None in a world without an annotator.

    They follow from what was read, never from the right answer. `world` is at the episode of
    `history`; `valid`: of each turn.
    """
    if not annotated(world):
        return None
    actions = [world.read(common.aloud(reply)) for reply in history[1::2]]
    steps = list(zip(actions, history[2::2], valid))
    flaws = [flaw for flaw in envs.search_flaws(world.task, steps) if flaw in COSTS]
    answered = valid[-1:] == [True] and envs.read_call(actions[-1])[0] == "answer"
    return flaws if answered else [*flaws, "no answer"]


def expert_thought(world) -> str:
    """What the expert thinks before its next action; empty where it has no thoughts."""
    return envs.search_thought(world.task, world.record) if annotated(world) else ""


def players_of(world):
    """Players of different strength."""
    experts = [envs.expert_player] if has_expert(world) else []
    if annotated(world):
        experts += [envs.sloppy_player, envs.hasty_player, envs.muddled_player, envs.guess_player]
    return [*experts, envs.random_player]


def trajectories(args, split, seeds, name):
    """Episodes of players of different strength, half with the expert's thoughts; their flaws."""
    world, episodes = envs.make(args.env, show_actions=args.show_actions), []
    players = players_of(world)
    for seed in seeds:
        rng = random.Random(f"{name} {args.seed} {seed}")
        observation, info = world.reset(seed=seed, options={"split": split})
        e = {"history": [observation], "actions": [], "valid": [], "over": False}
        player, thinks = rng.choice(players), rng.random() < 0.5
        while not e["over"]:
            action = player(world, info, rng)
            info = take_turn(
                world, e, written(world, action, expert_thought(world) if thinks else "")
            )
        flaws = process_flaws(world, e["history"], e["valid"])
        episodes.append(
            {"history": e["history"], "flaws": flaws, "won": e["won"], "who": "players"}
        )
    world.close()
    return episodes


def judge_examples(state, split, seeds, name):
    """What a judge is trained and measured on, an episode per seed.

    By turns one of the players and one of the agent as it is now.
    """
    args, found = state.args, [None] * len(seeds)
    found[::2] = trajectories(args, split, seeds[::2], name)
    found[1::2] = rollout(
        state.model,
        state.chat,
        args,
        split,
        seeds[1::2],
        temperature=args.temperature,
        stream=(name,),
    )
    for e in found[1::2]:
        if annotated(state.world):
            state.world.reset(seed=e["seed"], options={"split": split})
        e |= {"who": "agent", "flaws": process_flaws(state.world, e["history"], e["valid"])}
    return found


def demonstrations(args, seeds):
    """The expert's correct trajectories, with its thoughts.

    Each beside another player's attempt at the same question (`earlier`).
    """

    def thinking_expert(world, info, rng):
        return written(world, world.expert(), expert_thought(world))

    if not seeds:
        return []
    world, found = envs.make(args.env, show_actions=args.show_actions), []
    for seed, other in zip(seeds, trajectories(args, "train", seeds, "earlier")):
        e = envs.run_episode(world, thinking_expert, seed)
        if e["won"]:
            turns = itertools.zip_longest(e["observations"], e["actions"])
            history = [text for turn in turns for text in turn if text is not None]
            found.append({"history": history, "earlier": other["history"]})
    world.close()
    return found


def judge_reward(text, reference) -> float:
    """1 - |score - the annotator's score| for three readable blocks, else 0: ours."""
    found = parse_judgement(text)
    return 1 - abs(found["score"] - reference) if found else 0.0


def auc(scores, labels) -> float | None:
    """The chance that a positive one has the higher score, ties counting half.

    None if all labels are equal.
    """
    positive, negative = (
        [s for s, label in zip(scores, labels) if bool(label) == side] for side in (True, False)
    )
    if not positive or not negative:
        return None
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def watch_judge(rrm, world, args, episodes):
    """How good a judge is on trajectories it was not trained on.

    Against the outcome and, where there is an annotator, against the process.
    """
    judgements = judge(rrm, world, args, [e["history"] for e in episodes], ("watch",))
    scores = [j["score"] for j in judgements]
    bins = [
        [e["won"] for s, e in zip(scores, episodes) if min(int(5 * s), 4) == fifth]
        for fifth in range(5)
    ]
    found = {
        "parsed": common.mean(j["parsed"] for j in judgements),
        "auc_outcome": auc(scores, [e["won"] for e in episodes]),
        "auc_process": None,
        "error": None,
        # per fifth of the score: episodes, success
        "calibration": [[len(some), common.mean(some)] for some in bins],
        **judge_costs(judgements),
    }
    if annotated(world):
        errors = [abs(score - process_score(e["flaws"])) for score, e in zip(scores, episodes)]
        found["auc_process"] = auc(scores, [not e["flaws"] for e in episodes])
        found["error"] = common.mean(errors)
    return found


def judge_costs(judgements) -> dict:
    """The shares of the judge's replies that were cut, and of what it was never asked about."""
    asked = max(1, sum(j["asked"] for j in judgements))
    return {
        "cut_judge": sum(j["cut"] for j in judgements) / asked,
        "not_judged": common.mean(j["asked"] == 0 for j in judgements),
    }


# ------------------------------------------------------------------------- rewards and advantages


def attempt_rewards(args, episodes, judgements):
    """R = R_rule + lambda * score, for attempts and their judgements (or None: lambda = 0)."""
    if judgements is None:
        return [e["rule"] for e in episodes]
    return [e["rule"] + args.score_weight * j["score"] for e, j in zip(episodes, judgements)]


def group_advantages(returns, group_size):
    """A_i = (R_i - mean) / std over each group of consecutive episodes; exactly 0 where all of a group's R are equal."""
    advantages = []
    for i in range(0, len(returns), group_size):
        group = np.array(returns[i:i + group_size])
        spread = group.max() > group.min()
        advantages += ((group - group.mean()) / (group.std(ddof=1) + 1e-6)).tolist() if spread else [0.0] * len(group)
    return advantages


def interleaved(first, second, group_size):
    """Question by question: its G first attempts, then its G second ones if there are any.

    So a pool of 2G is consecutive.
    """
    if not second:
        return list(first)
    pooled = []
    for i in range(0, len(first), group_size):
        pooled += [*first[i : i + group_size], *second[i : i + group_size]]
    return pooled


def without_spread(returns, group_size):
    """How many groups have no advantages, as all of their episodes got the same."""
    groups = [returns[i:i + group_size] for i in range(0, len(returns), group_size)]
    return sum(max(group) == min(group) for group in groups)


# ------------------------------------------------------------------------------------------- loss


def sampled_logprobs(model, chat, episodes, temperature):
    """log pi of the sampled tokens of some episodes, 0 at all others, and the mask that tells them apart: both [B, T - 1]."""
    ids = common.pad_rows([e["ids"] for e in episodes], chat.pad)  # [B, T]
    mask = common.pad_rows([e["mask"] for e in episodes], 0)  # [B, T]
    return common.token_logprobs(model, ids, mask, temperature), mask[:, 1:].to(model.device)


def micro_batches(episodes, rows, size):
    """The indices `rows` of episodes in batches of `size`; neighbours of one length need little padding."""
    rows = sorted(rows, key=lambda i: len(episodes[i]["ids"]))
    return [rows[i:i + size] for i in range(0, len(rows), size)]


@torch.no_grad()
def old_logprobs(model, chat, args, episodes):
    """`sampled_logprobs` by these weights, without gradient: a tensor [T_i - 1] per episode. From a training forward, not from decoding."""
    out = [None] * len(episodes)
    for rows in micro_batches(episodes, range(len(episodes)), args.micro_batch_size):
        logprobs, _ = sampled_logprobs(model, chat, [episodes[i] for i in rows], args.temperature)
        for i, row in zip(rows, logprobs):
            out[i] = row[:len(episodes[i]["ids"]) - 1]
    return out


def padded(rows, logprobs):
    """The listed rows of [T_i - 1] tensors as one tensor [B, T - 1]."""
    return torch.nn.utils.rnn.pad_sequence([logprobs[i] for i in rows], batch_first=True)


def token_weights(mask, count):
    """The mean over trajectories of the mean over their tokens, as weights [B, T - 1].

    `count`: trajectories of the whole gradient step, or the micro-batches would change the loss.
    """
    return mask / (count * mask.sum(1, keepdim=True).clamp(min=1))


def surrogate(logprobs, old, advantages, low, high):
    """- min(r A, clip(r, 1 - low, 1 + high) A) per token, with r = exp(logprobs - old); advantages [B, 1]."""
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def kl_estimate(logprobs, reference):
    """KL(pi || reference) per sampled token, the estimator of low variance: e^d - d - 1 with d = log reference - log pi."""
    d = reference - logprobs
    return d.exp() - d - 1


def update(model, reference, chat, args, optimizer, episodes, advantages):
    """--updates gradient steps, each on its share of the questions. Returns metrics."""
    old = old_logprobs(model, chat, args, episodes)
    ref = old_logprobs(reference, chat, args, episodes) if args.kl else None
    total = max(1, sum(sum(e["mask"]) for e in episodes))
    metrics, share = (
        Counter(loss=0.0, kl=0.0, clipped=0.0, grad_norm=0.0),
        len(episodes) // args.updates,
    )
    for start in range(0, len(episodes), share):
        part, step_loss = range(start, start + share), 0.0
        for rows in micro_batches(episodes, part, args.micro_batch_size):
            some = [episodes[i] for i in rows]
            logprobs, mask = sampled_logprobs(model, chat, some, args.temperature)  # [B, T - 1]
            before = padded(rows, old)
            scale = torch.tensor([advantages[i] for i in rows], device=logprobs.device)[
                :, None
            ]  # [B, 1]
            loss = surrogate(logprobs, before, scale, args.clip, args.clip_high)
            if args.kl:
                kl = kl_estimate(logprobs, padded(rows, ref))
                loss = loss + args.kl * kl
                metrics["kl"] += (kl.detach() * mask).sum().item() / total
            weights = token_weights(mask, len(part))
            (loss * weights).sum().backward()
            step_loss += (loss.detach() * weights).sum().item()
            ratio = (logprobs.detach() - before).exp()
            outside = (ratio < 1 - args.clip) | (ratio > 1 + args.clip_high)
            metrics["clipped"] += outside.sum().item() / total
        batch = [
            {"ids": episodes[i]["ids"], "mask": episodes[i]["mask"], "advantage": advantages[i]}
            for i in part
        ]
        norm = common.gradient_step(model, optimizer, step_loss, batch)
        metrics["grad_norm"] += norm / args.updates
        metrics["loss"] += step_loss / args.updates
    said = sum(
        row.sum().item() for row in old
    )  # by the weights that sampled: an estimate of the entropy
    gap = sum(e["logprob"] for e in episodes) - said  # of decoding to the training forward
    return dict(metrics) | {"entropy": -said / total, "logprob_gap": gap / total}


def imitate(model, chat, args, optimizer, dialogues):
    """One gradient step on -log p of what the assistant says in dialogues (lists of messages).

    A mean over all its tokens. What is longer than the context is skipped, and its share told.
    """
    episodes = [
        dict(zip(("ids", "mask"), chat.dialogue_and_mask(messages))) for messages in dialogues
    ]
    fitting = [e for e in episodes if len(e["ids"]) <= model.max_context]
    metrics = {"loss": 0.0, "too_long": 1 - len(fitting) / len(episodes)}
    if not fitting:
        return metrics
    total = sum(sum(e["mask"]) for e in fitting)
    for rows in micro_batches(fitting, range(len(fitting)), args.micro_batch_size):
        some = [fitting[i] for i in rows]
        logprobs, _ = sampled_logprobs(model, chat, some, args.temperature)  # [B, T - 1]
        loss = -logprobs.sum() / total
        loss.backward()
        metrics["loss"] += loss.item()
    common.gradient_step(model, optimizer, metrics["loss"], fitting)
    return metrics


# ----------------------------------------------------------------------------------------- phases
# A step of a phase is a function (run state, batch, stream) -> metrics that does its updates.


@dataclass
class State:
    """What the phases work on."""

    args: Args
    world: envs.World
    chat: common.Chat
    model: torch.nn.Module  # the agent
    rrm: tuple | None  # the judge and its chat
    optimizer: torch.optim.Optimizer = None
    reference: torch.nn.Module = None  # the model of this phase as the phase began


def judge_sft(state, batch, stream):
    """The judge imitates the annotator."""
    rrm, chat = state.rrm
    dialogues = []
    for e in batch:
        asked = judge_messages(state.world, e["history"], shots(state.args)[1])
        dialogues.append([*asked, {"role": "assistant", "content": annotate(e["flaws"])}])
    return imitate(rrm, chat, state.args, state.optimizer, dialogues)


def judge_grpo(state, batch, stream):
    """The judge's own judgements, paid for how close their score is to the annotator's."""
    args, world, (rrm, chat) = state.args, state.world, state.rrm
    _, word = forced(args, world)
    prompts = [
        chat.dialogue(judge_messages(world, e["history"], shots(args)[1]), word) for e in batch
    ]
    fits = [
        i for i, prompt in enumerate(prompts) if len(prompt) + args.judge_tokens <= rrm.max_context
    ]
    rows = [(i, n) for i in fits for n in range(args.group_size)]
    replies = common.generate(
        rrm,
        chat,
        [prompts[i] for i in fits],
        max_new_tokens=args.judge_tokens,
        temperature=args.temperature,
        samples=args.group_size,
        rows=args.rollout_batch_size,
        seeds=[common.row_seed(args.seed, *stream, i * args.group_size + n) for i, n in rows],
    )
    # what does not fit is not judged: it keeps its place, without a token
    episodes = [
        {"ids": prompt[:1], "mask": [0], "logprob": 0.0}
        for prompt in prompts
        for _ in range(args.group_size)
    ]
    returns = [0.0] * len(episodes)
    for k, (i, n) in enumerate(rows):
        ids = replies.ids[k]
        episodes[i * args.group_size + n] = {
            "ids": prompts[i] + ids,
            "mask": [0] * len(prompts[i]) + [1] * len(ids),
            "logprob": sum(replies.logprobs[k]),
        }
        reference = process_score(batch[i]["flaws"])
        returns[i * args.group_size + n] = judge_reward(word + replies.texts[k], reference)
    advantages = group_advantages(returns, args.group_size)
    losses = update(rrm, state.reference, chat, args, state.optimizer, episodes, advantages)
    return losses | {
        "reward": common.mean(returns),
        "groups_without_spread": without_spread(returns, args.group_size),
        "cut_judge": common.mean(not complete for complete in replies.complete),
        "too_long": 1 - len(fits) / len(prompts),
        "tokens": sum(map(len, replies.ids)),
    }


def cold_start(state, batch, stream):
    """The agent imitates correct trajectories, as first attempts and as second ones."""
    dialogues = []
    for e in batch:
        for before in None, (e["earlier"], ""):
            start = opening(state.world, e["history"][0], before, shots(state.args)[0])
            dialogues.append(start + spoken(e["history"]))
    return imitate(state.model, state.chat, state.args, state.optimizer, dialogues)


def learn(state, batch, stream):
    """First attempts, judgements, second attempts, judgements, GRPO. `batch`: a seed a question."""
    args, size = state.args, state.args.group_size
    seeds = [seed for seed in batch for _ in range(size)]

    def play(attempt, before=None):
        return rollout(
            state.model, state.chat, args, "train", seeds,
            temperature=args.temperature, stream=(*stream, attempt), before=before,
        )  # fmt: skip

    def review(episodes, attempt):
        histories = [e["history"] for e in episodes]
        return judge(state.rrm, state.world, args, histories, (*stream, attempt))

    first = play(1)  # o1 ~ pi(. | q)
    second, first_judged, second_judged = [], None, []
    if args.variant != "none":
        first_judged = review(first, 1)  # critique, score ~ RRM(q, o1)
    if args.variant == "U":
        told = [(e["history"], j["critique"]) for e, j in zip(first, first_judged)]
        second = play(2, told)  # o2 ~ pi(. | q, o1, critique)
        second_judged = review(second, 2)
    episodes = interleaved(first, second, size)
    first_returns = attempt_rewards(args, first, first_judged)
    returns = interleaved(first_returns, attempt_rewards(args, second, second_judged), size)
    pool = 2 * size if second and args.pool == "joint" else size
    advantages = group_advantages(returns, pool)
    metrics = update(
        state.model, state.reference, state.chat, args, state.optimizer, episodes, advantages
    )
    metrics |= {
        "reward": common.mean(returns),
        "reward_rule": common.mean(e["rule"] for e in episodes),
        "groups_without_spread": without_spread(returns, pool),
        "groups": len(returns) // pool,
        **watch(first), **spent(episodes), "cut_agent": cut_share(episodes),
    }  # fmt: skip
    metrics |= {f"second_{key}": value for key, value in watch(second).items()} if second else {}
    if first_judged is not None:
        metrics |= watch_judgements(state.world, first, first_judged, second, second_judged)
        metrics["tokens"] += sum(j["tokens"] for j in [*first_judged, *second_judged])
    judged = interleaved(first_judged or [None] * len(first), second_judged, size)
    for i, (e, j, value) in enumerate(zip(episodes, judged, returns)):
        attempt = 1 + (bool(second) and i // size % 2)
        e |= {"attempt": attempt, "judgement": j, "return": value, "advantage": advantages[i]}
    return metrics | {"played": [record(e) for e in episodes]}


# ------------------------------------------------------------------------- evaluation and records


def spent(episodes) -> dict:
    """What rollouts cost; judgements apart."""
    return {
        "tokens": sum(sum(e["mask"]) for e in episodes),
        "env_steps": sum(len(e["valid"]) for e in episodes),
        "episodes": len(episodes),
    }


def cut_share(episodes) -> float:
    """The share of the agent's replies that the limit cut off."""
    return sum(e["cut"] for e in episodes) / max(1, sum(len(e["valid"]) for e in episodes))


def watch(episodes) -> dict:
    """What can be counted over episodes."""
    repeated, speaks, valid = 0, [], []
    for e in episodes:
        repeated += len(e["actions"]) - len(set(e["actions"]))
        valid += e["valid"]
        for reply in map(common.aloud, e["history"][1::2]):
            speaks.append("critique" in reply or "reviewer" in reply)
    return {
        "success": common.mean(e["won"] for e in episodes),
        "rule": common.mean(e["rule"] for e in episodes),
        "calls": len(valid) / len(episodes),
        "repeated_calls": repeated / len(episodes),
        "invalid": common.mean(not v for v in valid),
        "cut_agent": cut_share(episodes),
        "truncated": common.mean(e["truncated"] for e in episodes),
        "speaks_of_a_critique": common.mean(speaks),
    }


def watch_judgements(world, first, first_judged, second, second_judged) -> dict:
    """What can be counted over the judgements of a step."""
    judged = [*first_judged, *second_judged]
    won = [e["won"] for e in [*first, *second]]
    return {
        "reward_model": common.mean(j["score"] for j in judged),
        "judge_parsed": common.mean(j["parsed"] for j in judged),
        "judge_auc": auc([j["score"] for j in judged], won),
        "leaks": leaks(world, first, first_judged),
        **judge_costs(judged),
    }


def leaks(world, episodes, judgements) -> float | None:
    """The share of the readable critiques that contain the right answer.

    It is looked up here alone, where the world has one (`gold`); yes and no, which any critique may
    contain, are skipped. None if nothing is left.
    """
    found = []
    for e, j in zip(episodes, judgements):
        if not hasattr(world, "gold"):
            return None
        world.reset(seed=e["seed"], options={"split": e["split"]})
        if j["parsed"] and world.gold not in ("yes", "no"):
            gold, said = (
                f" {' '.join(envs.plain_words(text))} " for text in (world.gold, j["critique"])
            )
            found.append(gold in said)
    return common.mean(found) if found else None


def evaluate(state, split, count, second=False):
    """First attempts on fixed episodes of a split -> (numbers, episodes).

    With `second`, what variant C is about, the second ones after them.
    """
    args, seeds, reviewed = state.args, range(count), {}

    def play(stream, before=None):
        return rollout(
            state.model,
            state.chat,
            args,
            split,
            seeds,
            temperature=args.eval_temperature,
            stream=stream,
            before=before,
        )

    played = play(("evaluate",))
    if second:
        judged = judge(
            state.rrm, state.world, args, [e["history"] for e in played], ("evaluate", split)
        )
        reviewed = {
            "judge_parsed": common.mean(j["parsed"] for j in judged),
            "leaks": leaks(state.world, played, judged),
            **judge_costs(judged),
        }
        played = play(
            ("evaluate", 2), [(e["history"], j["critique"]) for e, j in zip(played, judged)]
        )
    return watch(played) | {
        "se": common.mean_se([float(e["won"]) for e in played])[1]
    } | reviewed, played


def record(episode):
    """An episode as rollouts.jsonl keeps it: words, not ids."""
    return {key: value for key, value in episode.items() if key not in ("ids", "mask")}


def show(state, episode) -> str:
    """An episode as a person reads it, with what the judge says."""

    def line(text):
        return "".join(c if c.isprintable() else " " for c in text)[:300]

    lines = [line(episode["history"][0])]
    for reply, observation in zip(episode["history"][1::2], episode["history"][2::2]):
        lines += [f"> {line(reply)}", line(observation)]
    if state.rrm:
        j = judge(state.rrm, state.world, state.args, [episode["history"]], ("show",))[0]
        lines.append(f"    judge: {j['score']:.1f}. {line(j['think'])} {line(j['critique'])}")
    return "\n".join(lines)


# --------------------------------------------------------------------------- only for --model tiny
# The defaults that it replaces, and what a model made from nothing is taught before it learns.

TINY = dict(
    steps=50,
    lr=5e-4,
    batch_size=128,
    micro_batch_size=16,
    rollout_batch_size=256,
    max_new_tokens=32,
    eval_episodes=500,
    save_every=20,
    device="cpu",
    judge_tokens=40,
    judged=3000,
    sft_batch_size=16,
    sft_lr=5e-4,
)
NEXT = "Write all the calls that take up what you see here."


def warmup(world, args):
    """The world's language, and the forms of replies: what any language model brings along.

    Episodes come from a random player on the train split, unfiltered, who mostly takes up something
    it sees, half of the time repeats the sentence before its action, and sometimes acts as in
    another episode; the agent imitates it, in second attempts as in first ones. To copy is
    practised apart: all actions that take up what is seen. The judge learns its form from
    judgements of *random* flaws, whatever the transcript. No part sees an expert.
    """
    rng, examples, said = random.Random("warm-up"), [], []
    for seed in range(args.examples):
        first, recent = warmup_play(world, seed, rng, said)
        dialogue, turn = opening(world, first[0]) + spoken(first), rng.randrange(len(recent))
        examples.append(dialogue)
        if recent[turn]:
            *earlier, last = dialogue[: 2 + 2 * turn]
            asked = {**last, "content": f"{last['content']}\n{NEXT}"}
            examples.append(
                [*earlier, asked, {"role": "assistant", "content": "\n".join(recent[turn])}]
            )
        if seed % 2:
            reply = annotate(rng.sample(list(COSTS), rng.choice([0, 0, 1, 1, 2])))
            examples.append((judge_messages(world, first), reply))
            second, _ = warmup_play(world, seed, rng, said)
            told = first, parse_judgement(reply)["critique"]
            examples.append(opening(world, first[0], told) + spoken(second))
    rng.shuffle(examples)
    return examples


def warmup_play(world, seed, rng, said):
    """The history of an episode, and for each observation the actions that take up its words.

    `said`: all actions so far.
    """

    def topic(action):
        return envs.read_call(action)[1] or action

    observation, info = world.reset(seed=seed, options={"split": "train"})
    history, recent, over = [observation], [], False
    while not over:
        seen, possible = envs.bare(observation), info["admissible"] or [""]
        recent.append([action for action in possible if topic(action) in seen])
        actions = recent[-1] if recent[-1] and rng.random() < 0.8 else possible
        actions = said[-1000:] if said and rng.random() < 0.03 else actions
        said.append(rng.choice(rng.choice(by_tool(actions))))
        thoughts = [s for s in re.split(r"(?<=[.?]) ", seen) if topic(said[-1]) in s]
        thought = rng.choice(thoughts) if thoughts and rng.random() < 0.5 else ""
        observation, _, terminated, truncated, info = world.step(said[-1])
        history += [written(world, said[-1], thought), observation]
        over = terminated or truncated
    return history, recent


def by_tool(calls):
    """Lists of calls of one tool. Drawn first among these, rare kinds of call are practised too."""
    tools = {}
    for call in calls:
        tools.setdefault(envs.read_call(call)[0], []).append(call)
    return list(tools.values())


def constants_of(world):
    """Lines that are one token of a tiny model."""
    calls = [part for name in envs.TOOLS for part in envs.tool_call(name, "\0").split("\\u0000")]
    facts = [
        re.split(r"{\w}", relation.sentence)[1] for relation in envs.RELATIONS.values()
    ]  # '" was written by "'
    prompts = [part for text in (CASE, AGAIN) for part in re.split(r"{\w+}|\n", text)]
    system = JUDGE.format(rubric=TOOLS if world.tools else ACTIONS, system="")
    return [
        world.system,
        CALL,
        ACT,
        system,
        NEXT,
        *calls,
        *facts,
        *prompts,
        *FOUND.values(),
        *ADVICE.values(),
        *FLAWLESS,
        "\nAgent: ",
        "\nObservation: ",
        "<think>",
        "</think>\n<critique>",
        "</critique>\n<score>",
        "</score>",
        *common.CHANGES_OF_SPEAKER,
    ]


def load(world, args):
    """The model that acts, and its chat; a tiny one is made from `warmup`."""
    if common.is_tiny(args.model) and args.device == "cpu":
        torch.set_num_threads(
            min(2, torch.get_num_threads())
        )  # small tensors: more threads only wait for each other
    return common.load(
        args.model,
        corpus=lambda: warmup(world, args),
        constants=constants_of(world),
        device=args.device,
        dtype=args.dtype,
        thinking=args.thinking,
        max_context=args.max_context,
    )


# ------------------------------------------------------------------------------------------- main


AT_LEAST = {
    "updates": 1,
    "judge_tokens": 1,
    "judge_epochs": 1,
    "cold_epochs": 1,
    "sft_batch_size": 1,
    "examples": 1,
    "clip": 0,
    "clip_high": 0,
    "kl": 0,
    "score_weight": 0,
    "judge_retries": 0,
    "judge_steps": 0,
    "judged": 0,
    "cold_start": 0,
    "sft_lr": 0,
}
FLAGS = {"agent": "--max-new-tokens", "judge": "--judge-tokens"}  # the limits of the two parts
LEARN, JUDGED, DEMONSTRATED = 0, 300_000_000, 500_000_000  # where the seeds of the phases begin


def check_args(args):
    """Everything that can be refused before a model is loaded. Returns the world."""
    common.check_common(args)
    common.check_at_least(args, AT_LEAST)
    common.check(
        args.group_size > 1,
        "--group-size must be at least 2: an advantage is a difference within a group",
    )
    questions, left = divmod(args.batch_size, args.group_size)
    common.check(
        not left, f"--batch-size must be a multiple of --group-size, not {args.batch_size}"
    )
    common.check(
        questions % args.updates == 0,
        f"--updates must divide the {questions} questions of a step, not {args.updates}",
    )
    common.check(
        args.variant == "U" or args.pool == "joint",
        f"--pool {args.pool} is about --variant U, not {args.variant}",
    )
    common.check(not args.rrm or args.variant != "none", "--variant none asks no judge: no --rrm")
    common.check(
        args.rrm.split(":")[0] != "tiny", f"--rrm is a model from elsewhere, not {args.rrm}"
    )
    common.check(
        not args.prefill or not args.thinking,
        "--prefill leaves no room to think: not with --thinking",
    )
    try:
        world = envs.make(args.env, show_actions=args.show_actions)
    except ValueError as error:
        common.refuse(error)
    trained = args.judged and not args.rrm and args.variant != "none"
    common.check(
        not trained or not args.eval_only or args.variant != "C",
        "--eval-only --variant C needs a judge: give --rrm",
    )
    common.check(
        not trained or annotated(world) or args.eval_only,
        f"--env {args.env} has no annotator to train a judge with: give --rrm, or --judged 0",
    )
    needs_expert = args.cold_start and args.variant != "C" and not args.eval_only
    common.check(
        not needs_expert or has_expert(world),
        f"--env {args.env} has no expert for a cold start: --cold-start 0",
    )
    return world


def check_room(chat, model, messages, room):
    """Refuses a first prompt that leaves no room for a reply of `room` tokens."""
    length = len(chat.dialogue(messages))
    common.check(length + room <= model.max_context, f"the first prompt has {length} tokens and its reply may have {room}: "
                 f"beyond the context of {model.max_context}")


def quick(args):
    """The sizes of --quick."""
    tiny = common.is_tiny(args.model)
    return dataclasses.replace(
        args,
        steps=2,
        batch_size=8,
        micro_batch_size=4 if tiny else 1,
        group_size=4,
        updates=min(2, args.updates),
        eval_episodes=16 if tiny else 2,
        eval_every=1,
        save_every=2,
        judged=min(16, args.judged),
        judge_steps=1,
        judge_epochs=1,
        cold_start=min(4, args.cold_start),
        cold_epochs=1,
        examples=150,
    )


def frozen_dtype(args) -> str:
    """What a judge that nobody trains is kept in: what it computes in."""
    return (
        "bfloat16"
        if args.dtype == "auto" and torch.device(args.device).type == "cuda"
        else args.dtype
    )


def load_judge(args):
    """The judge of --rrm, and its chat."""
    return common.load(
        args.rrm,
        option="--rrm",
        device=args.device,
        dtype=frozen_dtype(args),
        thinking=args.thinking,
        max_context=args.max_context,
    )


def own_judge(model, chat, args):
    """The agent's model as it is now, as the judge: trained if there is --judged, else frozen."""
    rrm = copy.deepcopy(model)
    if not args.judged and frozen_dtype(args) == "bfloat16":
        rrm.to(torch.bfloat16).compute_dtype = None
    return rrm, chat


def plan_of(args, correct, judged):
    """[(phase, update, how many, its batch)], the whole run.

    Epochs over data at first, --steps at last. `correct`: trajectories to imitate; `judged`: how
    many the judge's SFT has. A batch of the judge holds indices into `judge_examples`, which the
    agent plays after its cold start; SFT and GRPO have different ones.
    """
    questions = args.batch_size // args.group_size

    def epochs(phase, data, count):
        rng = random.Random(
            f"plan {phase} {args.seed}"
        )  # its own: the cold start is the same in all variants
        order = [i for _ in range(count) for i in rng.sample(range(len(data)), len(data))]
        size = args.sft_batch_size
        return [[data[i] for i in order[j : j + size]] for j in range(0, len(order), size)]

    def consecutive(first, count):
        return [range(i, i + questions) for i in range(first, first + count * questions, questions)]

    plan = []
    if correct:
        plan.append(("cold-start", epochs("cold-start", correct, args.cold_epochs)))
    if judged:
        plan.append(("judge-sft", epochs("judge-sft", range(judged), args.judge_epochs)))
        plan.append(("judge-grpo", consecutive(judged, args.judge_steps)))
    if args.variant != "C":
        plan.append(("learn", consecutive(args.seed * 1_000_000_007 + LEARN, args.steps)))
    return [
        (phase, i, len(batches), batch)
        for phase, batches in plan
        for i, batch in enumerate(batches, 1)
    ]


PHASES = {
    "cold-start": cold_start,
    "judge-sft": judge_sft,
    "judge-grpo": judge_grpo,
    "learn": learn,
}
SUPERVISED = "cold-start", "judge-sft"


def begin(state, phase, step, saved):
    """The optimizer and, for the KL, the reference of a phase. `saved`: the last checkpoint."""
    args = state.args
    learner = state.rrm[0] if phase.startswith("judge") else state.model
    if step == 1 or state.optimizer is None:
        state.optimizer = torch.optim.AdamW(
            learner.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        state.reference = copy.deepcopy(learner) if args.kl and phase not in SUPERVISED else None
        if step > 1:  # resumed within a phase
            state.optimizer.load_state_dict(saved["optimizer"])
            if state.reference:
                state.reference.load_state_dict(saved["reference"])
    for group in state.optimizer.param_groups:
        group["lr"] = (args.sft_lr if phase in SUPERVISED else args.lr) * min(1, step / 5)


def evaluations(state, second):
    """{split: numbers} and an episode of `test`."""
    found, shown = {}, None
    for split in ("test", "ood"):
        if split in state.world.splits:
            found[split], played = evaluate(state, split, state.args.eval_episodes, second)
            shown = shown or record(played[0])
    return found, shown


def result(name, numbers, n) -> str:
    """A line about an evaluation."""
    return f"{name}: success {numbers['success']:.3f} (se {numbers['se']:.3f}, n {n})"


def headline(numbers) -> dict:
    """What summary.json says of an evaluation."""
    return {"success": numbers["success"], "se": numbers["se"]}


def ends_of(args) -> dict:
    """The success of a random player and of the expert; nan where the world has none."""
    found = {}
    for name, player in ("random", envs.random_player), ("expert", envs.expert_player):
        world = envs.make(args.env)
        if name == "random" or has_expert(world):
            value, se = envs.mean_score(world, player, args.eval_episodes, key="won")
        else:
            value = se = float("nan")
        world.close()
        found[name] = {"success": value, "se": se}
    return found


def table(args, ends, watched) -> str:
    """The end of a run, as a person reads it."""
    lines = [f"{'':22}{'success':>9}{'se':>8}   (n {args.eval_episodes})"]
    for split in watched["before"]:
        for when, numbers in watched.items():
            if numbers:
                name, row = f"{when.replace('_', ' ')}, {split}", numbers[split]
                lines.append(f"{name:22}{row['success']:9.3f}{row['se']:8.3f}")
    for name, row in ends.items():
        lines.append(f"{name:22}{row['success']:9.3f}{row['se']:8.3f}")
    return "\n".join(lines)


def quality(state, episodes) -> dict:
    """`watch_judge` on trajectories of players and of the agent apart."""
    found = {}
    for who in "players", "agent":
        some = [e for e in episodes if e["who"] == who]
        found[who] = watch_judge(state.rrm, state.world, state.args, some)
    return found


def machine(args) -> dict:
    """What summary.json says of where a run was made."""
    return {
        "peak_memory_bytes": common.peak_memory_bytes(args.device),
        "device": common.device_name(args.device),
        "git_commit": common.git_commit(),
    }


def announce(args, model, plan):
    """The first line of a run."""
    phases = ", ".join(f"{n} {phase}" for phase, n in Counter(phase for phase, *_ in plan).items())
    questions, twice = args.batch_size // args.group_size, " x 2" if args.variant == "U" else ""
    print(
        f"{args.env}: {common.count_parameters(model):,} parameters on "
        f"{common.device_name(args.device)}; updates: {phases or 'none'}; "
        f"{questions} questions x {args.group_size}{twice} attempts a step",
        flush=True,
    )


def prepare(args, world):
    """The state of a run: models loaded, first prompts checked."""
    # at test time U and R need no judge
    judging = args.variant == "C" if args.eval_only else args.variant != "none"
    rrm = load_judge(args) if args.rrm and judging else None
    model, chat = load(world, args)
    if judging and not rrm:
        rrm = own_judge(model, chat, args)
    acted, judged = shots(args)
    observation, _ = world.reset(seed=0, options={"split": "train"})
    check_room(chat, model, opening(world, observation, None, acted), args.max_new_tokens)
    thinks = args.prefill and (chat.opened or rrm and rrm[1].opened)
    common.check(not thinks, "--prefill: a chat template begins every reply with a thought")
    if rrm:
        asked = judge_messages(world, [observation], judged)
        check_room(rrm[1], rrm[0], asked, args.judge_tokens)
    return State(args, world, chat, model, rrm)


def main():
    """Cold start, judge, learning."""
    args = common.parse_args(Args, TINY)
    args = quick(args) if args.quick else args
    world = check_args(args)
    run = None
    if not args.eval_only:
        run = common.Run("reagent", args, common.run_directory("reagent", args))
    state = prepare(args, world)
    model, rrm, told = state.model, state.rrm, set()  # told: the parts that were reported as cut
    if args.eval_only:
        found, _ = evaluations(state, args.variant == "C")
        for split, numbers in found.items():
            print(result(split, numbers, args.eval_episodes))
            common.warn_cut(numbers, FLAGS, told)
        return

    training = bool(rrm and args.judged and not args.rrm)  # the judge
    extra = {"parameters": common.count_parameters(model), "start": common.fingerprint(model)}
    if args.rrm:
        extra["judge"] = common.fingerprint(rrm[0])
    run.start(extra)
    offset, questions = args.seed * 1_000_000_007, args.batch_size // args.group_size

    def seeds(first, count):
        return range(offset + first, offset + first + count)

    # C is frozen from the start
    correct = demonstrations(args, seeds(DEMONSTRATED, args.cold_start * (args.variant != "C")))
    plan = plan_of(args, correct, args.judged if training else 0)
    announce(args, model, plan)

    @functools.cache
    def judge_data():
        # made when first asked for, by the agent after its cold start; after --resume, too: it
        # does not learn while the judge does
        count = args.judged + args.judge_steps * questions
        return judge_examples(state, "train", seeds(JUDGED, count), "judged")

    @functools.cache
    def held_out():
        count = min(400, 2 * args.eval_episodes)
        return judge_examples(state, "test", range(10_000, 10_000 + count), "held out")

    totals, seconds, done = Counter(), Counter(), 0
    # evaluations and how good the judge is, as the run goes on
    watched, judge_quality, shown = {"before": None, "cold_started": None}, {}, {}
    saved = run.resume()
    if saved:
        model.load_state_dict(saved["model"])
        if training:
            rrm[0].load_state_dict(saved["rrm"])
        totals, seconds, done = Counter(saved["totals"]), Counter(saved["seconds"]), saved["done"]
        watched, judge_quality, shown = saved["watched"], saved["judge_quality"], saved["shown"]
    else:
        watched["before"], shown["before"] = evaluations(state, False)
        numbers = watched["before"]["test"]
        tqdm.write(result("before, test", numbers, args.eval_episodes), file=sys.stderr)
        common.warn_cut(numbers, FLAGS, told)

    bar = tqdm(plan[done:], initial=done, total=len(plan), desc="reagent", dynamic_ncols=True)
    for phase, step, steps, batch in bar:
        clock = common.Clock(seconds)
        if phase != "cold-start" and rrm and not judge_quality:
            judge_quality["before"] = quality(state, held_out())
            clock.lap("watching")
        if phase.startswith("judge"):
            batch = [judge_data()[i] for i in batch]
        if (phase, step) == ("judge-sft", 1):
            totals.update(spent([e for e in judge_data() if e["who"] == "agent"]))
        clock.lap("trajectories")
        begin(state, phase, step, saved)
        saved = None
        metrics = PHASES[phase](state, batch, (phase, step))
        played = metrics.pop("played", [])
        totals.update({key: metrics.pop(key, 0) for key in ("tokens", "env_steps", "episodes")})
        totals["gradient_steps"] += 1 if phase in SUPERVISED else args.updates
        common.warn_cut(metrics, FLAGS, told)
        clock.lap(phase)
        if step == steps and phase.startswith("judge"):
            judge_quality[phase] = quality(state, held_out())
            common.save_model(run.dir / "rrm", *rrm)
        if step == steps and phase == "cold-start":
            watched["cold_started"], _ = evaluations(state, False)
        if phase == "learn" and step % args.eval_every == 0 and step < steps:
            metrics["eval_episodes"] = n = max(1, args.eval_episodes // 5)
            numbers, _ = evaluate(state, "test", n)
            metrics |= {f"eval_{key}": value for key, value in numbers.items()}
            tqdm.write(result(f"step {step}, test", numbers, n), file=sys.stderr)
        clock.lap("watching")
        done += 1
        laps = {f"seconds_{name}": round(value, 2) for name, value in clock.laps.items()}
        line = {"step": done, "phase": phase, "phase_step": step, **metrics, **totals, **laps}
        run.log(line)
        run.write_rollouts([{"step": done, **e} for e in played])
        postfix = {key: f"{metrics[key]:.2f}" for key in ("loss", "success") if key in metrics}
        bar.set_postfix({"phase": phase} | postfix)
        if done % args.save_every == 0 or done == len(plan) or run.stopping:
            run.save({
                "model": model.state_dict(), "rrm": rrm[0].state_dict() if training else None,
                "optimizer": state.optimizer.state_dict(),
                "reference": state.reference and state.reference.state_dict(),
                "done": done, "totals": dict(totals), "seconds": dict(seconds),
                "watched": watched, "judge_quality": judge_quality, "shown": shown,
            })  # fmt: skip
        if run.stopping:
            sys.exit(run.stopping)

    watched["after"], shown["after"] = evaluations(state, args.variant == "C")
    ends = ends_of(args)
    summary = {
        "script": "reagent", "method": "reagent", "arm": args.variant, "env": args.env,
        "model": args.model, "seed": args.seed, "split": "test",
        "eval_episodes": args.eval_episodes, **ends, "watched": watched, "judge": judge_quality,
        "cold_start": len(correct), "train_episodes": totals["episodes"],
        "env_steps": totals["env_steps"], "generated_tokens": totals["tokens"],
        "gradient_steps": totals["gradient_steps"],
        "seconds": round(sum(seconds.values()), 1), **machine(args),
    }  # fmt: skip
    for when in "before", "after":
        for split, numbers in watched[when].items():
            summary[when if split == "test" else f"{when}_{split}"] = headline(numbers)
    run.finish(summary, model, state.chat)  # first: a print may fail
    common.warn_cut(watched["after"]["test"], FLAGS, told)
    for when in "before", "after":
        print(f"\n{when}\n{show(state, shown[when])}")
    print(f"\n{table(args, ends, watched)}")
    print(f"whole episodes: {run.dir / 'rollouts.jsonl'}")


if __name__ == "__main__":
    main()
