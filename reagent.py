r"""Reagent (Fan et al., arXiv 2601.22154): an agent that learns from a judge's words and score.

Agent-RRM, a reward model that explains itself, reads the transcript of a whole attempt, never the
right answer, and writes <think> an analysis, <critique> a few words to the agent, <score> a number
in [0, 1].

    attempt    o1 ~ pi(. | q), G of them at each question q                                      (1)
    judge      think, critique, score ~ RRM(. | q, o)                                            (2)
    again      o2 ~ pi(. | q, o1, critique), one below each o1                                   (3)
    reward     R(q, o) = R_rule(q, o) + lambda score                                             (4)
    advantage  A = (R - mean R) / std R, over the pool of all 2G attempts at q                   (5)
    objective  J = 1/(2G) sum over the pool of the mean over an attempt's sampled tokens of
               min(rho A, clip(rho) A) - beta KL, each attempt in its own context: o2 below q,
               o1 and the critique, of which nothing is trained there                            (6)

--variant U is all of it; at test time the first attempt alone counts. R has no second attempts, and
none no judge either: all its scores are 0. C trains no agent: (1), (2), (3), and the second attempt
counts. The control that the paper lacks is R with --batch-size and --group-size twice as large: as
many attempts at as many questions as U.

A run has four phases: the agent's cold start on correct trajectories, the judge's SFT and its GRPO
where --judged or --judgements ask for a judge of its own, and learning. The judge is --rrm, any
model at all; by default --model as the run finds it, prompted and frozen.

Departures from the paper, and why:
 1. The paper's judge learns from judgements by a model of 120 billion parameters, the agent's
    cold start imitates a stronger model. Here they come from --judgements and --demos, or from
    programs: one names the flaws of a process, from what was read there (`annotate`; of it the
    agent meets critiques, with --cold-again, and all in a tiny model's warm-up, which agent and
    judge share), the other is the world's expert. Half of what is judged for the judge is the
    agent's own, the others are by players of different strength.
 2. The reward of the judge's GRPO is unpublished: here 1 - |score - the data's score|, 0 where
    nothing can be read; the words of a critique earn nothing. So is the prompt of the second
    attempt. What cannot be read is asked again at --temperature (the paper's script: at 0).
 3. An attempt that the context leaves no room to begin or to judge has no part in its pool, as a
    score of 0 would teach brevity: its advantage is 0, though it counts in 1/(2G) and in the KL.
    One that the context ends midway keeps the score that it has by then.
 4. Transcripts lack native thoughts, lists of possible actions, and the last observation, in which
    our worlds say how it ended: neither judge nor second attempt may know. The judge reads o2 as it
    reads o1, beside q alone: R(q, o2), not whether the critique was heeded.
 5. No KL by default, as in the paper's script. Learning rates rise over 5 steps of each phase;
    evaluation is without top-p; SFT at temperature 1; as many turns as the world allows (paper:
    13). R_rule is the world's own score: of `search`, the paper's rule.
 6. Smaller by default: 100 steps, 2,000 demonstrations, no training of the judge, which is the base
    as it is (--judged trains it).
 7. TINY is smaller still, learns faster, and trains its judge. Its cold start also imitates second
    attempts, below another player's first one and the program's critique of it (--cold-again), or a
    small model forgets what a critique is for.

    python reagent.py                            # tiny, search: success .16 -> .89, minutes
    python reagent.py --variant R --batch-size 256 --group-size 16 --out-dir runs/R \
        --rrm runs/reagent-search-s0/rrm         # as many attempts as U, the same judge
    python reagent.py --variant C --model smollm2 --shots 1 --eval-episodes 20
    python reagent.py --model Qwen/Qwen3-1.7B --env search-full
"""

import dataclasses
import functools
import itertools
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

import common
import envs
from common import flag


@dataclass
class Args:
    """The paper's setting, smaller; "not in the paper": left open. TINY has a tiny model's."""

    # shared by all scripts
    model: str = flag("tiny", "tiny, tiny:WIDTHxLAYERS, smollm2, a .gguf file, a local directory or a hub id")
    env: str = flag("search", "a world: a name, NAME:ARGUMENT, or path/to/file.py:Class")
    seed: int = flag(0, "of everything sampled; the tiny model is built with seed 0")
    steps: int = flag(100, "passes of the loop of learning: attempts, judgements, an update (paper: 300)")
    lr: float = flag(5e-7, "AdamW, of GRPO, constant after 5 steps (paper; its script: 5e-6; the judge's is unpublished)")
    batch_size: int = flag(256, "first attempts per step (paper: 32 questions x 8; an appendix: 64)")
    micro_batch_size: int = flag(1, "sequences per backward pass; changes memory and speed, not the gradient")
    rollout_batch_size: int = flag(64, "episodes or replies sampled side by side; changes memory and speed alone")
    max_new_tokens: int = flag(512, "of one action with its thought (not in the paper)")
    max_context: int | None = flag(None, "tokens of a prompt with its reply; default: what the model can read")
    temperature: float = flag(0.7, "while training, and of the log-probs (paper)")
    eval_temperature: float = flag(0.6, "in evaluation (paper)")
    eval_episodes: int = flag(200, "per split, first and last and after the cold start; a fifth, of `test`, in between")
    eval_every: int = flag(20, "steps of learning between evaluations")
    eval_only: bool = flag(False, "evaluate --model and stop; writes nothing")
    save_every: int = flag(10, "steps of any phase between checkpoints")
    out_dir: str = flag("", "default: runs/reagent-ENV-sSEED")
    resume: bool = flag(False, "continue the run in --out-dir")
    device: str = flag(common.default_device(), "cpu, cuda, cuda:1, mps")
    dtype: str = flag("auto", "mixed: float32 weights, bfloat16 compute; auto: mixed on a GPU, else float32; bfloat16: --eval-only")
    gradient_checkpointing: bool = flag(False, "compute layers again in the backward pass: less memory, about a third more time")
    lora_rank: int = flag(0, "above 0: adapters of this rank learn (peft; all linear layers but the head), over one copy of the weights")
    thinking: bool = flag(False, "let a thinking model think natively before each reply")
    shots: int = flag(0, "worked examples before the first turn of every part, by a random player on train")
    prefill: bool = flag(False, "begin every reply with its marked word, such as Action: (no room to reason before it)")
    show_actions: bool = flag(False, "list what is possible now in every observation (one more departure)")
    quick: bool = flag(False, "a small run through every line, to see that it works; overrides the sizes")
    track: str = flag("none", "metrics go there, too (an extra to install)", choices=["none", "tensorboard", "wandb"])
    # group-relative policy optimisation
    group_size: int = flag(8, "first attempts at one question (paper); judgements of one transcript in the judge's GRPO")
    updates: int = flag(2, "gradient steps per step, each on its share of the questions (paper)")
    clip: float = flag(0.2, "the ratio counts as at least 1 - clip (paper)")
    clip_high: float = flag(0.2, "the ratio counts as at most 1 + clip_high (paper; its script: 0.34)")
    kl: float = flag(0.0, "weight of the KL to the start of the phase; 0 switches it off (paper: unpublished; its script: 0)")
    # Reagent
    variant: str = flag("U", "how the judge is used (paper)", choices=["U", "R", "C", "none"])
    score_weight: float = flag(0.3, "lambda, of the judge's score beside the rule's (paper)")
    rrm: str = flag("", "the judge: any model, as in --model, never trained; default: --model, trained if --judged or --judgements")
    judge_tokens: int = flag(1024, "of one judgement (not in the paper)")
    judge_retries: int = flag(1, "of a judgement that cannot be read; then its score is 0 (not in the paper; its script retries)")
    demos: str = flag("", "correct trajectories from elsewhere: a JSON lines file, or what datasets.load_dataset takes")
    cold_start: int = flag(2000, "episodes of the expert that the agent imitates first, without --demos (paper: 55.6 thousand)")
    cold_epochs: int = flag(2, "of the cold start (paper)")
    cold_again: bool = flag(False, "imitate each as a second attempt, too (not in the paper)")
    judgements: str = flag("", "judged trajectories for the judge's SFT and GRPO from elsewhere, as in judged.jsonl of a run; all are used")
    judged: int = flag(0, "trajectories for the judge's SFT where no --judgements are; 0: no training (paper: 28 thousand)")
    judge_epochs: int = flag(2, "of its SFT (paper)")
    judge_steps: int = flag(20, "of its GRPO, on --batch-size / --group-size more trajectories each (paper: 90 thousand in all)")
    sft_lr: float = flag(1e-5, "AdamW, of cold start and judge SFT (paper)")
    sft_batch_size: int = flag(32, "trajectories per step of cold start and judge SFT (paper)")
    dose: float = flag(0.0, "share of a tiny model's second attempts in its warm-up that follow a critique (not in the paper)")
    examples: int = flag(10000, "rounds of examples that make a tiny model")


# ------------------------------------------------------------------------ the method: U, R and none


def learn(state):
    """GRPO on attempts at questions of the train split, no seed twice.

    At --seed 0 they are not new to a tiny model: its warm-up shows random play at the same ones.
    """
    args, agent, size = state.args, state.agent, state.args.group_size
    for step in phase(state, "learn", args.steps, args.lr, agent):
        question = args.seed * common.SEEDS_APART + (step - 1) * args.batch_size // size
        seeds = [question + i // size for i in range(args.batch_size)]
        first = attempt(state, "train", seeds, ("learn", step, 1))  # (1)
        second, judgements = [], []
        if args.variant != "none":
            judgements += review(state, first, ("learn", step, 1))  # (2)
        if args.variant == "U":
            second = attempt(state, "train", seeds, ("learn", step, 2), first)  # (3)
            judgements += review(state, second, ("learn", step, 2))  # (2)
        # by question, so that a pool is of neighbours and lies within one gradient step
        batch = sorted(first + second, key=lambda episode: episode.seed)
        for episode in batch:
            episode.earned = judged_return(args, episode)  # (4)
        pool_size = 2 * size if second else size
        metrics = learn_from_pools(state, agent, batch, pool_size)  # (5), (6)
        metrics |= watch(first) | watch(second, "second_")
        metrics |= watch_judgements(batch, judgements)
        metrics["return"] = common.mean(episode.earned for episode in batch)
        if step % args.eval_every == 0 and step < args.steps:
            numbers, _ = evaluate(state, ["test"], max(1, args.eval_episodes // 5))
            metrics |= {f"eval_{name}": value for name, value in numbers["test"].items()}
        end_step(state, step, metrics, batch, judgements)


def attempt(state, split, seeds, stream, earlier=None):
    """(1) Attempts, one per seed; (3) second ones, below `earlier` ones and their critiques."""
    episodes = []
    for some in groups(seeds, state.args.rollout_batch_size):
        episodes += side_by_side(state, split, some, len(episodes), stream, earlier)
    return episodes


def review(state, episodes, stream):
    """(2) The judgements of episodes, written down in them, too."""
    judgements = judge(state, [episode.said for episode in episodes], stream)
    for episode, judgement in zip(episodes, judgements):
        episode.critique, episode.judge_score = judgement.critique, judgement.score
        episode.left_out = not judgement.asked  # too long to judge, or never played
        episode.said.append(["judge", judgement.text])
    return judgements


def judged_return(args, episode):
    """(4) R(q, o) = R_rule(q, o) + lambda score"""
    return episode.score + args.score_weight * episode.judge_score


# ----------------------------------------------------------------------- the method: C, no training


def critique_only(state, split, seeds):
    """Second attempts -> (episodes, metrics). One that has no room counts as not won."""
    first = attempt(state, split, seeds, ("evaluate",))  # (1)
    judgements = review(state, first, ("evaluate", split))  # (2)
    second = attempt(state, split, seeds, ("evaluate", 2), first)  # (3)
    metrics = watch(second) | watch(first, "first_")
    return second, metrics | watch_judgements(first, judgements)


# --------------------------------------------------------------------- the method: what comes first


def cold_start(state):
    """The agent imitates correct trajectories."""
    args, world, rows = state.args, state.world, []
    for row in state.demos:
        said = said_in(row["messages"])
        rows.append([dialogue(world, args, said)])
        if args.cold_again and row.get("earlier"):
            critique = row.get("earlier_critique") or ""
            earlier = Episode("train", 0, said_in(row["earlier"]), critique=critique)
            rows[-1].append(dialogue(world, args, said, earlier))
    supervised(state, "cold-start", state.agent, rows, args.cold_epochs)


def judge_sft(state):
    """The judge imitates judgements by others."""
    args, rows = state.args, []
    for row in state.judged[judge_grpo_rows(args):]:
        messages = judge_messages(state.world, args, said_in(row["messages"]))
        reply = judgement_text(row["think"], row["critique"], row["score"])
        rows.append([[*messages, {"role": "assistant", "content": reply}]])
    supervised(state, "judge-sft", state.rrm, rows, args.judge_epochs)


def supervised(state, name, learner, rows, epochs):
    """A phase of imitation: passes over rows, each a list of dialogues, in random order.

    The last batch is filled up from one more pass, so that all steps are of one size.
    """
    args, rng, order = state.args, random.Random(f"{name} {state.args.seed}"), []
    count = math.ceil(epochs * len(rows) / args.sft_batch_size)
    while len(order) < count * args.sft_batch_size:
        order += rng.sample(rows, len(rows))
    for step in phase(state, name, count, args.sft_lr, learner):
        batch = order[(step - 1) * args.sft_batch_size:step * args.sft_batch_size]
        dialogues = list(itertools.chain(*batch))
        metrics = imitate(learner.model, learner.chat, args, learner.optimizer, dialogues)
        state.run.lap("update")
        end_step(state, step, metrics)


def judge_grpo(state):
    """GRPO of the judge: --group-size judgements of a transcript, paid by `judge_reward`."""
    args, rrm, size = state.args, state.rrm, state.args.group_size
    batches = groups(state.judged[:judge_grpo_rows(args)], args.batch_size // size)
    for step in phase(state, "judge-grpo", args.judge_steps, args.lr, rrm):
        rows = batches[step - 1]
        prompts = [judge_prompt(state, said_in(row["messages"])) for row in rows]
        batch = ask_judge(state, prompts, ("judge-grpo", step), args.temperature, size)
        for row, group in zip(rows, groups(batch, size)):
            for judgement in group:
                judgement.earned = judge_reward(judgement, row["score"])
        metrics = learn_from_pools(state, rrm, batch, size) | watch_judgements([], batch)
        metrics["reward"] = common.mean(judgement.earned for judgement in batch)
        end_step(state, step, metrics, judgements=batch)


def judge_reward(judgement, reference):
    """1 - |its score - the data's score|, 0 where nothing can be read: ours."""
    return 1 - abs(judgement.score - reference) if judgement.readable else 0.0


# ------------------------------------------------------------------------------------------ prompts
# The three blocks are the paper's, the rubric is its script's, the wording is ours. A world's own
# system prompt comes first: it states the game, these state the form of a reply.

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

This is what the agent was told:
{system}"""
CASE = """The task:
{task}

The transcript:
{transcript}

Now judge how the agent worked. Write three blocks, in this order:
<think>your analysis</think>
<critique>to the agent, in a few words: what to do differently, if anything, without the answer or \
a hint to it</critique>
<score>one number from 0, harmful, to 1, flawless</score>"""
AGAIN = """You have tried this before:
{transcript}

A reviewer says: {critique}

Try again from the start, with your first turn."""
PRETENCE = re.compile(  # a line that begins, whatever its marks, as a speaker's or as one of ours
    r"\n(?=[^\w\n]*(?:agent|observation|system|user|assistant|(?:a )?reviewer|the task|"
    r"the transcript|this is what|you have tried|now judge|try again)\b)", re.IGNORECASE)
FORCED = 16  # tokens, room for the words of --prefill and the end of a reply that was cut


def dialogue(world, args, said, earlier=None) -> list[dict]:
    """The policy's view of an episode; (3) below an earlier attempt with its critique."""
    system = f"{world.system}\n{CALL if world.tools else ACT}"
    shots = worked_examples(args.env, args.shots, args.show_actions)
    messages = messages_of(said)
    if earlier:
        seen, critique = transcript(earlier.said), earlier.critique or "nothing."
        messages[0]["content"] += "\n\n" + AGAIN.format(transcript=seen, critique=critique)
    return [{"role": "system", "content": system}, *shots, *messages]


def judge_messages(world, args, said) -> list[dict]:
    """(2) The judge's view of an episode: task, transcript, and what the world tells the agent.

    That has the rules and the tools; the form of a reply (CALL, ACT) is nothing to judge.
    """
    rubric = TOOLS if world.tools else ACTIONS
    system = JUDGE.format(rubric=rubric, system=world.system)
    shots = judged_examples(args.env, args.shots, args.show_actions)
    return [{"role": "system", "content": system}, *shots, case(said)]


def case(said) -> dict:
    """The message that shows a transcript to the judge."""
    task = envs.bare(said[0][1])
    return {"role": "user", "content": CASE.format(task=task, transcript=transcript(said))}


def transcript(said) -> str:
    """What was said and seen after the first observation.

    The last one tells the outcome: left out. A line that looks like a speaker's or like one of our
    prompts is indented: no turn can pose as another, or as us.
    """
    turns = [turn for turn in said[1:] if turn[0] != "judge"]
    if turns and turns[-1][0] == "world":
        turns.pop()
    lines = []
    for who, text in turns:
        name = "Observation" if who == "world" else "Agent"
        text = envs.bare(text) if who == "world" else common.aloud(text)
        text = PRETENCE.sub("\n  ", "\n".join(text.splitlines()))
        lines.append(f"{name}: {text}")
    return "\n".join(lines)


def messages_of(said) -> list[dict]:
    """The turns of an episode as messages."""
    roles = {"world": "user", "act": "assistant"}
    return [{"role": roles[who], "content": text}
            for who, text in said if who in roles]


# -------------------------------------------------------------------------------------- a judgement


@dataclass(kw_only=True)
class Sampled:
    """What GRPO needs of what a model wrote: here of an attempt, or of a judgement."""

    ids: list[int] = field(default_factory=list)  # the prompt's, too
    mask: list[int] = field(default_factory=list)  # 1: sampled
    logprob: float = 0.0  # of all tokens under the mask, in decoding
    earned: float = 0.0  # R (4), or `judge_reward`
    advantage: float = 0.0
    left_out: bool = False  # of an attempt: no room to play or to judge it


@dataclass
class Judgement(Sampled):
    """A reply of the judge."""

    text: str = ""
    critique: str = ""
    score: float = 0.0
    readable: bool = False
    asked: int = 0  # how often; 0: the transcript was too long
    cut: int = 0  # of its replies, by the limit
    tokens: int = 0  # sampled


BLOCKS = re.compile(  # from the end of the analysis on; no tag stands within the critique, and the
    # score has its end: of a reply that was cut, 0. may be the beginning of 0.8
    r"</think>[^<]*<critique>(?P<critique>(?:(?!</?(?:think|critique|score)>).)*)</critique>"
    r"[^<]*<score>(?P<score>[^<]*)</score>", re.DOTALL | re.IGNORECASE)
SCORE = re.compile(  # one number in [0, 1], "/1" or "out of 1", and words: not 8/10, 80%, 0.6-0.8
    r"[^\d.,\u2212-]*(\.\d+|0(?:\.\d*)?|1(?:\.0*)?)(?:\s*(?:/|out of)\s*1(?:\.0*)?)?"
    r"(?:[^\w/%][^\d/%]*)?")


def parse_judgement(reply) -> dict | None:
    """The last three blocks -> {"critique", "score"}; None where one cannot be read.

    Whatever stands before and behind them is skipped, such as a native thought, and between them
    what has no tag; a <think> that the chat template opened has no opening tag.
    """
    found = [*BLOCKS.finditer(reply)]
    score = SCORE.fullmatch(found[-1]["score"]) if found else None
    if not score:
        return None
    return {"critique": found[-1]["critique"].strip(), "score": float(score[1])}


def judgement_text(think, critique, score) -> str:
    """The three blocks."""
    score = f"<score>{round(float(score), 2)}</score>"
    return f"<think>{think}</think>\n<critique>{critique}</critique>\n{score}"


def judge_prompt(state, said) -> list[int]:
    """The ids that the judge is asked with."""
    messages = judge_messages(state.world, state.args, said)
    return state.rrm.chat.dialogue(messages, "<think>" * state.args.prefill)


def judge(state, all_said, stream) -> list[Judgement]:
    """(2) Agent-RRM on [[who, text], ...] of each episode, greedily.

    What cannot be read is asked again at --temperature, and at last has score 0 and no critique.
    What is too long, or was never played, is not asked.
    """
    args, judgements = state.args, [Judgement() for _ in all_said]
    prompts = [judge_prompt(state, said) for said in all_said]
    room = longest_prompt(state.rrm, args.judge_tokens)
    left = [i for i, prompt in enumerate(prompts)
            if len(prompt) <= room and any(who == "act" for who, _ in all_said[i])]
    for retry in range(1 + args.judge_retries):
        temperature = args.temperature if retry else 0.0  # greedily it would repeat itself
        some = [prompts[i] for i in left]
        for i, judgement in zip(left, ask_judge(state, some, (*stream, retry), temperature)):
            judgement.asked += judgements[i].asked
            judgement.cut += judgements[i].cut
            judgement.tokens += judgements[i].tokens
            judgements[i] = judgement
        left = [i for i in left if not judgements[i].readable]
    return judgements


def ask_judge(state, prompts, stream, temperature, samples=1) -> list[Judgement]:
    """`samples` judgements of each prompt (ids)."""
    args, rrm, judgements = state.args, state.rrm, []
    numbers = range(len(prompts) * samples)
    replies = common.generate(
        rrm.model, rrm.chat, prompts, max_new_tokens=args.judge_tokens, temperature=temperature,
        seeds=[common.row_seed(args.seed, *stream, "judge", number) for number in numbers],
        samples=samples, rows=args.rollout_batch_size)
    for i, ids in enumerate(replies.ids):
        prompt = prompts[i // samples]
        text = "<think>" * args.prefill + replies.texts[i]
        blocks = parse_judgement(text)
        judgements.append(Judgement(
            text, **(blocks or {}),
            readable=blocks is not None,
            asked=1,
            cut=int(not replies.complete[i]),
            tokens=len(ids),
            ids=prompt + ids,
            mask=[0] * len(prompt) + [1] * len(ids),
            logprob=sum(replies.logprobs[i])))
    return judgements


# ------------------------------------------------------------------------------------------ rollout


@dataclass
class Episode(Sampled):
    """One attempt."""

    split: str
    seed: int
    said: list  # [who, text]: world, act or judge
    actions: list[str] = field(default_factory=list)  # as the world read them
    valid: list[bool] = field(default_factory=list)
    cut: int = 0  # replies that the limit cut off
    won: bool = False
    score: float = 0.0  # R_rule
    over: bool = False
    truncated: bool = False  # the context was full
    second: bool = False
    flaws: list[envs.Flaw] = field(default_factory=list)  # for `annotate` and metrics alone
    gold: str = ""  # the right answer, where there is one: to count leaks
    critique: str = ""
    judge_score: float = 0.0


def side_by_side(state, split, seeds, start, stream, earlier):
    """Episodes that share a cache, numbered from `start`.

    `stream` names the randomness: replies depend on (--seed, stream, number, turn) alone.
    `earlier`: first attempts, to which these are the second ones, by number.
    """
    args, model, chat = state.args, state.agent.model, state.agent.chat
    temperature = args.temperature if split == "train" else args.eval_temperature
    worlds, episodes, prompts = [], [], []
    for number, seed in enumerate(seeds, start):
        world = envs.make(args.env, show_actions=args.show_actions)
        observation, _ = world.reset(seed=seed, options={"split": split})
        said = [["world", observation]]
        messages = dialogue(world, args, said, earlier[number] if earlier else None)
        prompts.append(chat.dialogue(messages))
        episodes.append(Episode(split, seed, said, second=bool(earlier)))
        worlds.append(world)
    dialogues = common.Dialogues(model, chat, prompts)
    room = longest_prompt(state.agent, args.max_new_tokens)
    word = "<tool_call>" if worlds[0].tools else "Action:"
    for turn in itertools.count():
        for ids, episode in zip(dialogues.ids, episodes):
            if not episode.over and len(ids) > room:  # it ends; no turn is ever dropped
                episode.truncated = episode.over = True
        live = [i for i, episode in enumerate(episodes) if not episode.over]
        if not live:
            break
        row_seeds = [common.row_seed(args.seed, *stream, start + i, turn) for i in live]
        replies = dialogues.reply(live, max_new_tokens=args.max_new_tokens, temperature=temperature,
                                  seeds=row_seeds, prefill=word * args.prefill)
        for i, reply, complete in zip(live, replies.texts, replies.complete):
            episodes[i].said.append(["act", reply])
            episodes[i].cut += not complete
            take_turn(worlds[i], episodes[i], reply)
            dialogues.extend([i], [worlds[i].observation])
    for i, episode in enumerate(episodes):
        episode.ids, episode.mask, episode.logprob = dialogues.sampled(i)
        if episode.actions:
            look_back(worlds[i], episode)
        else:  # the loss need not read its prompt
            episode.ids, episode.mask, episode.left_out = episode.ids[:1], [0], True
        worlds[i].close()
    return episodes


def take_turn(world, episode, reply):
    """One step of the world, written down in `episode` -> info."""
    observation, _, terminated, truncated, info = world.step(common.aloud(reply))
    episode.said.append(["world", observation])
    episode.actions.append(info["action"])
    episode.valid.append(info["valid"])
    episode.won, episode.score = info["won"], info["score"]
    episode.over = terminated or truncated
    return info


def look_back(world, episode):
    """Notes flaws and right answer of an episode that is over, for metrics and `annotate`."""
    episode.flaws = process_flaws(world, episode)
    episode.gold = getattr(world, "gold", "")


# ------------------------------------------------------------------------ group-relative advantages


def learn_from_pools(state, learner, batch, pool_size) -> dict:
    """(5) and (6) on attempts or judgements, pools side by side in `batch` -> metrics."""
    args = state.args
    for pool in groups(batch, pool_size):
        pool_advantages(pool)  # (5)
    state.run.lap("rollout")  # all since the step began
    metrics = update(learner.model, learner.reference, learner.chat, args, learner.optimizer,
                     batch, (args.clip, args.clip_high))  # (6)
    state.run.lap("update")
    return metrics | {"groups_flat": without_spread([item.advantage for item in batch], pool_size)}


def pool_advantages(pool):
    """(5) Writes the advantages of attempts at one question, or judgements of one transcript.

    What is left out of the pool keeps 0.
    """
    counted = [item for item in pool if not item.left_out]
    returns = [item.earned for item in counted]
    for item, advantage in zip(counted, group_advantages(returns) if counted else []):
        item.advantage = advantage


def groups(items, size):
    """Consecutive items, `size` in each."""
    return [items[start:start + size] for start in range(0, len(items), size)]


def group_advantages(returns):
    """(5) A_i = (R_i - mean) / std within one group; 0 where all R are equal."""
    if max(returns) == min(returns):  # not std == 0: rounding would make advantages of nothing
        return [0.0] * len(returns)
    centred = np.array(returns) - np.mean(returns)
    return (centred / (np.std(returns, ddof=1) + 1e-6)).tolist()


# --------------------------------------------------------------------------------------------- loss


def sampled_logprobs(model, chat, episodes, temperature):
    """log pi of the sampled tokens, 0 at all others, and the mask of them: both [B, T - 1]."""
    ids = common.pad_rows([episode.ids for episode in episodes], chat.pad)  # [B, T]
    mask = common.pad_rows([episode.mask for episode in episodes], 0)  # [B, T]
    return common.token_logprobs(model, ids, mask, temperature), mask[:, 1:].to(model.device)


def micro_batches(episodes, args):
    """The micro-batches of each gradient step; neighbours of one length need little padding."""
    shares = groups(episodes, len(episodes) // args.updates)
    by_length = [sorted(share, key=lambda episode: len(episode.ids)) for share in shares]
    return [groups(share, args.micro_batch_size) for share in by_length]


@torch.no_grad()
def forward_logprobs(model, chat, args, steps):
    """`sampled_logprobs` of all `micro_batches` by these weights, without a gradient."""
    found = []
    for batches in steps:
        found.append([])
        for batch in batches:
            found[-1].append(sampled_logprobs(model, chat, batch, args.temperature)[0])
    return found


def token_weights(mask, count):
    """What a token counts in the loss, [B, T - 1]; divisors are those of the whole gradient step.

    The mean over `count` trajectories of the mean over their tokens.
    """
    return mask / (count * mask.sum(1, keepdim=True).clamp(min=1))


def surrogate(logprobs, old, advantages, low, high):
    """(6) - min(rho A, clip(rho, 1 - low, 1 + high) A) per token, rho = pi / pi_old; A [B, 1]."""
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def kl_estimate(logprobs, reference):
    """KL(pi || reference) per token, low in variance: e^d - d - 1, d = log reference - log pi."""
    d = reference - logprobs
    return d.exp() - d - 1


def update(model, reference, chat, args, optimizer, episodes, clip):
    """--updates gradient steps, each on its share of the groups -> metrics per sampled token.

    `clip`: (low, high). In the first of them rho is 1: pi_old is its own forward, detached.
    """
    shares = micro_batches(episodes, args)
    old = [None, *forward_logprobs(model, chat, args, shares[1:])]
    ref = forward_logprobs(reference, chat, args, shares) if args.kl else None
    sums, norms = Counter(), []
    for u, batches in enumerate(shares):
        share = [episode for batch in batches for episode in batch]
        tokens = max(1, sum(sum(episode.mask) for episode in share))
        share_loss = 0.0
        for i, batch in enumerate(batches):
            logprobs, mask = sampled_logprobs(model, chat, batch, args.temperature)  # [B, T - 1]
            old_i = old[u][i] if u else logprobs.detach()
            ref_i = ref[u][i] if ref else None
            advantages = torch.tensor([[e.advantage] for e in batch], device=mask.device)  # [B, 1]
            loss = surrogate(logprobs, old_i, advantages, *clip)
            if ref:
                loss = loss + args.kl * kl_estimate(logprobs, ref_i)
            loss = (loss * token_weights(mask, len(share))).sum()
            loss.backward()
            share_loss += loss.item()
            sums.update(watch_tokens(logprobs.detach(), old_i, ref_i, batch, clip))
        kept = [(episode.ids, episode.mask, episode.advantage) for episode in share]
        norms.append(common.gradient_step(model, optimizer, share_loss, kept))
        sums.update(tokens=tokens, loss=share_loss * tokens)
    tokens = sums.pop("tokens")
    return {name: value / tokens for name, value in sums.items()} | {"grad_norm": max(norms)}


def watch_tokens(logprobs, old, ref, batch, clip) -> dict:
    """Sums over the sampled tokens of a micro-batch: every term is 0 where the mask is 0."""
    ratio = (logprobs - old).exp()
    found = {"kl": kl_estimate(logprobs, ref).sum().item()} if ref is not None else {}
    decoded = sum(episode.logprob for episode in batch)
    return found | {
        "clipped": ((ratio < 1 - clip[0]) | (ratio > 1 + clip[1])).sum().item(),
        "entropy": -old.sum().item(),  # an estimate, from what was sampled
        "logprob_gap": decoded - old.sum().item()}  # signed: what differs at random cancels


@dataclass
class Lesson:
    """A dialogue to imitate; `mask`: 1 on what the assistant says."""

    ids: list[int]
    mask: list[int]


def imitate(model, chat, args, optimizer, dialogues):
    """One gradient step on -log p of what the assistant says in dialogues (lists of messages).

    A mean over its tokens, one forward per dialogue; what does not fit the context is cut off.
    """
    lessons, loss = [], 0.0
    for messages in dialogues:
        ids, mask = chat.dialogue_and_mask(messages)
        lessons.append(Lesson(ids[:model.max_context], mask[:model.max_context]))
    lessons.sort(key=lambda lesson: len(lesson.ids))  # neighbours need little padding
    tokens = max(1, sum(sum(lesson.mask) for lesson in lessons))
    for batch in groups(lessons, args.micro_batch_size):
        logprobs, _ = sampled_logprobs(model, chat, batch, 1.0)  # [B, T - 1]
        part = -logprobs.sum() / tokens
        part.backward()
        loss += part.item()
    kept = [(lesson.ids, lesson.mask) for lesson in lessons]
    return {"loss": loss, "grad_norm": common.gradient_step(model, optimizer, loss, kept)}


# ------------------------------------------------------------------------------------ state, phases


@dataclass
class Learner:
    """A model, and what trains it."""

    model: torch.nn.Module
    chat: common.Chat
    optimizer: torch.optim.Optimizer | None = None
    reference: torch.nn.Module | None = None  # the model as its phase began, where there is a KL


@dataclass
class State:
    """What the phases work on."""

    args: Args
    world: envs.World
    run: common.Run
    agent: Learner
    rrm: Learner | None = None  # the judge
    progress: dict = field(default_factory=lambda: {"step": 0, "judge": {}})  # for checkpoints
    demos: list = field(default_factory=list)  # rows
    judged: list = field(default_factory=list)  # rows, those of its GRPO first
    sides: tuple = ()  # what `quality` judges: while the judge learns, the agent stays as it is
    phase: str = ""
    last: int = 0  # the step of the run that ends the phase


def phase(state, name, count, lr, learner):
    """The steps of a phase that are left, counted from 1.

    Each phase has an optimizer without a past: moments of another loss are of no use to this one.
    """
    begun, done = state.last, state.progress["step"]
    state.phase, state.last = name, begun + count
    if done <= begun and learner.reference:  # later its checkpoint has it
        learner.reference.load_state_dict(learner.model.state_dict())
    if done < state.last:
        for step in state.run.steps(max(done, begun), state.last):
            common.set_rate(learner.optimizer, lr * min(1, (step - begun) / 5))
            yield step - begun
    if done <= state.last:  # else a resumed run is in a later phase, and these moments are its own
        learner.optimizer.state.clear()


# --------------------------------------------------------------------------------------- evaluation


def evaluate(state, splits, count, again=False):
    """The agent on `count` fixed episodes of each split -> ({split: metrics}, one of the last).

    Its first attempts; with `again`, variant C, the second ones.
    """
    found = {}
    for split in [split for split in ("test", "ood") if split in splits]:
        if again:
            played, metrics = critique_only(state, split, range(count))
        else:
            played = attempt(state, split, range(count), ("evaluate",))
            metrics = watch(played)
        _, se = common.mean_se([episode.won for episode in played])
        found[split] = metrics | {"se": se, "n": count}
        common.warn_cut(metrics, LIMITS)
        tqdm.write(common.result_line(split, found[split]))
    return found, record(played[0])


# --------------------------------------------------------------------------------------------- main


def judge_of(args, agent) -> Learner | None:
    """The judge, if any: --rrm or the model as it is, frozen; or a copy that will be trained."""
    if args.variant == "none" or args.eval_only and args.variant != "C":
        return None
    model, chat = agent.model, agent.chat
    if args.rrm:
        dtype = "bfloat16" if model.compute_dtype else args.dtype  # it is never trained
        return Learner(*common.load(
            args.rrm, option="--rrm", device=args.device, dtype=dtype,
            thinking=args.thinking, max_context=args.max_context))
    if trains_judge(args) and not args.eval_only:
        return trained(args, common.copy_of(model), chat)
    return Learner(common.frozen_copy(model), chat)


def trained(args, model, chat) -> Learner:
    """A model that will be trained."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0,
        fused=True)  # no copies of the weights in the step
    reference = common.frozen_copy(model) if args.kl else None
    return Learner(model, chat, optimizer, reference)


def main():
    """Cold start, the judge's SFT and GRPO, learning."""
    args = common.parse_args(Args, TINY, quick=QUICK)
    world, demos, judgements = check_args(args)
    run = common.Run("reagent", args)
    agent = trained(args, *load(world, args))
    rrm = judge_of(args, agent)
    state = State(args, world, run, agent, rrm)
    check_rooms(state)
    if args.eval_only:
        return evaluate(state, world.splits, args.eval_episodes, again=args.variant == "C")
    judge_is = {"judge": common.fingerprint(rrm.model)} if args.rrm else None
    run.start(judge_is, model=agent.model)

    state.progress = progress = run.resume(**parts(state)) or state.progress
    if not progress["step"]:
        progress["before"], progress["shown"] = evaluate(state, world.splits, args.eval_episodes)
    learns = args.variant != "C"
    if learns and (args.cold_start or demos):
        state.demos = demos or demonstrations(args)
        cold_start(state)
        if "cold_started" not in progress:  # a resumed run may be in a later phase
            progress["cold_started"], _ = evaluate(state, world.splits, args.eval_episodes)
    if rrm and "before" not in progress["judge"]:
        progress["judge"]["before"] = quality(state)
    if rrm and rrm.optimizer:
        make = functools.partial(judged_rows, state)
        rows = judgements or run.collect("judged.jsonl", progress, make)
        state.judged = judgeable(state, rows)
        judge_sft(state)
        keep_judge(state, "judge-sft")
        if args.judge_steps:
            judge_grpo(state)
            keep_judge(state, "judge-grpo")
    if learns:
        learn(state)

    after, last = evaluate(state, world.splits, args.eval_episodes, again=not learns)
    ends = envs.ends(args.env, args.eval_episodes)
    run.complete(
        agent.model, agent.chat, "reagent", args.variant, progress["before"], after, ends,
        shown=[progress["shown"], last],
        judge=progress["judge"],
        judged=len(state.judged),
        cold_start=len(state.demos),
        cold_started=progress.get("cold_started"))


# ---------------------------------------- beside the paper, and at the end only for --model tiny
# What is refused, what is written down, and what stands in place of a stronger model.

AT_LEAST = {"updates": 1, "judge_tokens": 1, "judge_epochs": 1, "cold_epochs": 1, "examples": 1,
            "sft_batch_size": 1, "group_size": 2, "clip": 0, "clip_high": 0, "kl": 0, "sft_lr": 0,
            "score_weight": 0, "judge_retries": 0, "judge_steps": 0, "judged": 0, "cold_start": 0}


def trains_judge(args):
    """Whether a run trains a judge of its own: TINY sets --judged, so --rrm overrides it."""
    return bool(args.judged or args.judgements) and not args.rrm


def check_args(args):
    """Everything that can be refused before a model is loaded -> (world, demos, judgements)."""
    common.check_common(args)
    common.check_at_least(args, AT_LEAST)
    common.check_multiple(args, "batch_size", "group_size", "updates")
    judging = args.variant != "none"
    common.check(judging or not args.rrm, "--variant none has no judge: --rrm is of no use")
    common.check(args.rrm.split(":")[0] != "tiny",
                 "--rrm: tiny must learn to judge first: give the rrm/ of a run with --judged")
    common.check(not args.judgements or judging and not args.rrm,
                 "--judgements are for the training of a judge (without --rrm, --variant none)")
    learns = args.variant != "C"
    common.check(learns or not args.demos, "--variant C imitates nothing: no --demos")
    world = common.checked(envs.make, args.env, show_actions=args.show_actions)
    listed = world.reset(seed=0)[1]["admissible"]
    common.check(listed or not args.shots, f"--shots: nothing to play at random in {args.env}")
    if learns and args.cold_start and not args.demos and not args.eval_only:
        common.check(type(world).expert is not envs.World.expert,
                     f"--env {args.env} has no expert: give --demos, or --cold-start 0")
    demos = judgements = None
    if args.demos:
        demos = common.read_rows("--demos", args.demos, check_row)
    if args.judgements:
        judgements = common.read_rows("--judgements", args.judgements, check_judged)
        needed = judge_grpo_rows(args) + 1
        common.check(len(judgements) >= needed,
                     f"--judgements: {len(judgements)} rows, --judge-steps need {needed}")
    return world, demos, judgements


def check_room(args, chat, model, messages, room):
    """Refuses a first prompt without room for `room` more tokens, and words before a thought."""
    length = len(chat.dialogue(messages))
    common.check(length + room <= model.max_context,
                 f"the first prompt has {length} tokens, replies may have {room}: "
                 f"beyond the context of {model.max_context}")
    common.check(not args.prefill or not chat.opened,
                 "--prefill: the chat template of this model opens a thought before each reply")


def longest_prompt(learner, reply_tokens):
    """The tokens that a prompt may have, with a reply of `reply_tokens` to come."""
    return learner.model.max_context - FORCED - reply_tokens


def check_rooms(state):
    """`check_room` for a first attempt, and for the judge of one that has just begun."""
    args, agent, rrm = state.args, state.agent, state.rrm
    said = [["world", state.world.reset(seed=0)[0]]]
    asked = dialogue(state.world, args, said)
    check_room(args, agent.chat, agent.model, asked, FORCED + args.max_new_tokens)
    if rrm:
        asked = judge_messages(state.world, args, said)
        check_room(args, rrm.chat, rrm.model, asked, FORCED + args.judge_tokens)


LIMITS = {"act": "--max-new-tokens", "judge": "--judge-tokens"}


def without_spread(values, group_size):
    """How many groups have one value throughout, so that nothing is learnt from them."""
    return sum(max(group) == min(group) for group in groups(values, group_size))


def end_step(state, step, metrics, episodes=(), judgements=()):
    """Writes everything down."""
    run = state.run
    state.progress["step"] = run.step
    tokens = sum(sum(episode.mask) for episode in episodes)
    tokens += sum(judgement.tokens for judgement in judgements)
    run.count(
        episodes=len(episodes),
        env_steps=sum(len(episode.actions) for episode in episodes),
        tokens=tokens,
        gradient_steps=state.args.updates if episodes or judgements else 1)
    run.write_rollouts([{"step": run.step, **record(episode)} for episode in episodes])
    run.log({"phase": state.phase, "phase_step": step, **metrics}, LIMITS)
    run.save_if_due(state.progress, **parts(state))


def keep_judge(state, name):
    """Measures and saves what a phase has made of the judge, once."""
    if name not in state.progress["judge"]:
        state.progress["judge"][name] = quality(state)
        common.save_model(state.run.dir / "rrm", state.rrm.model, state.rrm.chat)


def parts(state):
    """What a checkpoint keeps the weights of."""
    found = {}
    for who, learner in ("agent", state.agent), ("rrm", state.rrm):
        if learner and learner.optimizer:
            found |= {who: learner.model, f"{who}_optimizer": learner.optimizer}
        if learner and learner.reference:
            found[f"{who}_reference"] = learner.reference
    return found


def record(episode):
    """An episode as rollouts.jsonl keeps it: words, not ids."""
    kept = {name: value for name, value in vars(episode).items() if name not in ("ids", "mask")}
    return kept | {"flaws": [list(flaw) for flaw in episode.flaws]}  # plain, for checkpoints


def watch(episodes, prefix="") -> dict:
    """What can be counted over episodes; `prefix` begins each name."""
    if not episodes:
        return {}
    valid = [ok for episode in episodes for ok in episode.valid]
    said = [turn for episode in episodes for turn in episode.said]
    words = [text.lower() for who, text in said if who == "act"]
    counted = {
        "success": [episode.won for episode in episodes],
        "score": [episode.score for episode in episodes],
        "turns": [len(episode.valid) for episode in episodes],
        "invalid": [not ok for ok in valid],
        "flaws": [len(episode.flaws) for episode in episodes],
        "truncated": [episode.truncated for episode in episodes],
        "speaks_of_a_critique": ["reviewer" in text or "critique" in text for text in words]}
    found = {f"{prefix}{name}": common.mean(values) for name, values in counted.items()}
    cut = sum(episode.cut for episode in episodes)
    found[f"{prefix}cut_act"] = cut / max(1, len(valid))
    return found


def watch_judgements(episodes, judgements) -> dict:
    """What can be counted over judgements, and over the episodes, second ones too, they are about.

    Of those that the judge was asked for; without any, `not_judged` alone.
    """
    if not judgements:
        return {}
    found = {"not_judged": common.mean(not judgement.asked for judgement in judgements)}
    if asked := [judgement for judgement in judgements if judgement.asked]:
        found |= {
            "judge_readable": common.mean(judgement.readable for judgement in asked),
            "judge_score": common.mean(judgement.score for judgement in asked),
            "critiques": len({judgement.critique for judgement in asked}),
            "cut_judge": sum(j.cut for j in asked) / sum(j.asked for j in asked)}
    if kept := [episode for episode in episodes if not episode.left_out]:
        found["judge_auc"] = auroc([(e.judge_score, e.won) for e in kept])
        found["leaks"] = leaks(kept)
    return found


def auroc(labelled) -> float | None:
    """How often a (score, True) is above a (score, False), ties count half; None without both."""
    above = [score for score, label in labelled if label]
    below = [score for score, label in labelled if not label]
    if not above or not below:
        return None
    pairs = itertools.product(above, below)
    return common.mean((a > b) + (a == b) / 2 for a, b in pairs)


def leaks(episodes) -> float | None:
    """The share of critiques that contain the right answer, where there is one but yes and no."""
    found = []
    for episode in episodes:
        gold = envs.plain_words(str(episode.gold or ""))
        if gold and gold not in (["yes"], ["no"]) and episode.critique:
            critique = " ".join(envs.plain_words(episode.critique))
            found.append(f" {' '.join(gold)} " in f" {critique} ")
    return mean_or_none(found)


def mean_or_none(values) -> float | None:
    """None of nothing."""
    return common.mean(values) if values else None


def quality(state) -> dict:
    """What the judge is worth on trajectories of the test split, of players and of the agent apart.

    `auc_process`: of its score against a process without flaws (`judge_auc`: against success);
    `error`: mean distance to the program's score; `same_critique`: share equal to the program's.
    """
    count, found = min(200, state.args.eval_episodes), {}
    seeds = range(10_000, 10_000 + 2 * count)
    state.sides = state.sides or mixed_episodes(state, "test", seeds, ("quality",))
    for who, played in zip(("players", "agent"), state.sides):
        episodes = [dataclasses.replace(episode, said=[*episode.said]) for episode in played]
        judgements = review(state, episodes, ("quality", who))
        kept = [episode for episode in episodes if not episode.left_out]
        errors, same = [], []
        for episode in kept:
            _, critique, score = annotate(episode.flaws)
            errors.append(abs(episode.judge_score - score))
            same.append(episode.critique == critique)
        found[who] = watch_judgements(kept, judgements) | {
            "auc_process": auroc([(e.judge_score, not e.flaws) for e in kept]),
            "error": mean_or_none(errors), "same_critique": mean_or_none(same)}
    return found


# ------------------------------------------------ data, in place of a stronger model where need be
# Trajectories come from the worlds' players, judgements from a program that names the flaws of a
# process. Who brings --demos and --judgements needs of it the examples of --shots, and what
# `quality` compares a judge with.
#
# A row is a trajectory: `messages`, observations (user) and replies (assistant) by turns, up to the
# last reply. One of --judgements also has `think`, `critique` and `score`; --demos may have
# `earlier`, messages of an attempt that it comes after, and `earlier_critique` (--cold-again).

# Seeds of train: learning counts from --seed times SEEDS_APART, a warm-up from 0, worked examples
# from 10**6, the data from these. Of test: evaluation from 0, `quality` from 10,000.
JUDGED, DEMONSTRATED = 300_000_000, 500_000_000


def said_in(messages) -> list[list[str]]:
    """The turns in messages, [who, text] each."""
    return [["world" if m["role"] == "user" else "act", m["content"]] for m in messages]


def judge_grpo_rows(args):
    """How many judged trajectories are kept for the judge's GRPO."""
    return args.judge_steps * (args.batch_size // args.group_size)


def check_row(row):
    """ValueError, TypeError or KeyError unless it is a trajectory."""
    common.check_messages(row["messages"], "assistant")
    common.check_messages(row.get("earlier") or row["messages"], "assistant")
    common.check_texts([row.get("earlier_critique") or ""])


def check_judged(row):
    """ValueError, TypeError or KeyError unless it is a judged trajectory."""
    check_row(row)
    common.check_texts([row["think"], row["critique"]])
    if not 0 <= row["score"] <= 1:
        raise ValueError(f"score {row['score']} is not in [0, 1]")


def judgeable(state, rows) -> list[dict]:
    """Those that can be read and that the judge has room for, in random order; says how many."""
    args, fit = state.args, []
    room = longest_prompt(state.rrm, args.judge_tokens)
    for row in random.Random(f"judged {args.seed}").sample(rows, len(rows)):
        prompt = judge_prompt(state, said_in(row["messages"]))
        reply = judgement_text(row["think"], row["critique"], row["score"])
        length = len(state.rrm.chat.encode(reply)) + 1  # with its end
        readable = parse_judgement(reply)  # no tag of ours in an action that the critique quotes
        if readable and len(prompt) <= room and length <= args.judge_tokens:
            fit.append(row)
    told = f"{len(fit)} of {len(rows)} judged trajectories can be read and fit its limits"
    common.check(len(fit) > judge_grpo_rows(args), f"the judge: {told}, too few for GRPO and SFT")
    scores = [row["score"] for row in fit]
    tqdm.write(f"the judge: {told}, scores {min(scores):.2f} to {max(scores):.2f}")
    return fit


def process_flaws(world, episode) -> list[envs.Flaw]:
    """What a program finds wrong with a process: what the world says, or what anybody can count.

    It reads what the agent could read, never the answer.
    """
    if hasattr(world, "flaws"):
        return world.flaws()
    actions, found = episode.actions, []
    impossible = [not ok for ok in episode.valid]
    meant = [world.canonical(action) for action in actions]
    repeated = [action == last for action, last in zip(meant[1:], meant)]
    for name, wrong, said, advice in (
            ("impossible", impossible, "could not be done", "Do without"),
            ("repeated", repeated, "was done twice in a row", "Do not repeat")):
        if any(wrong):
            action = envs.one_line(actions[wrong.index(True)])[:100]
            found.append(envs.Flaw(name, 0.4, f"This {said}: {action}.", f"{advice}: {action}."))
    return found


def annotate(flaws) -> tuple[str, str, float]:
    """The judgement that follows from the flaws of a process: think, critique, score."""
    think = " ".join(flaw.found for flaw in flaws) or "Every step was needed."
    critique = " ".join(flaw.advice for flaw in flaws) or "Go on like this."
    return think, critique, max(0.0, 1.0 - sum(flaw.cost for flaw in flaws))


def written(world, action, thought="") -> str:
    """A reply as the policy writes it: a thought, if any, and the action."""
    reply = action if world.tools else f"Action: {action}"
    return f"{thought}\n{reply}" if thought else reply


def play(world, split, seed, player, rng, thinks=False):
    """An episode of a player; with `thinks`, thoughts stand before its actions."""
    observation, info = world.reset(seed=seed, options={"split": split})
    episode = Episode(split, seed, [["world", observation]])
    while not episode.over:
        action = player(world, info, rng)
        reply = written(world, action, world.thought(action) if thinks else "")
        episode.said.append(["act", reply])
        info = take_turn(world, episode, reply)
    look_back(world, episode)
    return episode


def players_of(world):
    """Players of different strength."""
    experts = [envs.expert_player] if type(world).expert is not envs.World.expert else []
    return [*experts, *world.players, envs.random_player]


@functools.lru_cache(maxsize=8)
def worked_examples(env, count, show_actions):
    """--shots: what a random player met and did on train. The judge's: `judged_examples`."""
    world, messages = envs.make(env, show_actions=show_actions), []
    for seed in range(10**6, 10**6 + count):  # far from what is learnt from
        episode = play(world, "train", seed, envs.random_player, random.Random(seed))
        messages += [message | {"shot": True} for message in messages_of(episode.said[:2])]
    world.close()
    return messages


@functools.lru_cache(maxsize=8)
def judged_examples(env, count, show_actions):
    """--shots of the judge: a random player's episodes on train, judged by the program.

    Nobody knows the outcome. Of ten times as many episodes, those that spread most in score; a
    single one is of the middle.
    """
    world, plays, messages = envs.make(env, show_actions=show_actions), [], []
    for seed in range(10**6, 10**6 + 10 * count):
        plays.append(play(world, "train", seed, envs.random_player, random.Random(seed)))
    world.close()
    plays.sort(key=lambda episode: annotate(episode.flaws)[2])
    spread = np.linspace(0, len(plays) - 1, count, dtype=int)
    for i in [len(plays) // 2] if count == 1 else spread:
        reply = judgement_text(*annotate(plays[i].flaws))
        messages += [case(plays[i].said), {"role": "assistant", "content": reply, "shot": True}]
    return messages


def demonstrations(args):
    """Rows of the expert's correct trajectories, each below another player's, with a critique."""
    world, rows = envs.make(args.env, show_actions=args.show_actions), []
    start = args.seed * common.SEEDS_APART + DEMONSTRATED
    for seed in range(start, start + args.cold_start):
        rng = random.Random(f"demonstrations {seed}")
        expert = play(world, "train", seed, envs.expert_player, rng, thinks=True)
        other = play(world, "train", seed, rng.choice(players_of(world)), rng, rng.random() < 0.5)
        if expert.won:
            rows.append({"messages": messages_of(expert.said)[:-1],
                         "earlier": messages_of(other.said)[:-1],
                         "earlier_critique": annotate(other.flaws)[1]})
    world.close()
    return rows


def mixed_episodes(state, split, seeds, stream):
    """Episodes of players of different strength, and as many of the agent as it is now."""
    world, players = envs.make(state.args.env, show_actions=state.args.show_actions), []
    for seed in seeds[::2]:
        rng = random.Random(f"players {split} {seed}")
        player = rng.choice(players_of(world))
        players.append(play(world, split, seed, player, rng, thinks=rng.random() < 0.5))
    world.close()
    return players, attempt(state, split, seeds[1::2], stream)


def judged_rows(state, done):
    """What the judge learns from: rows but the first `done`, which judged.jsonl has already."""
    args = state.args
    if "judged.jsonl" in state.progress:  # the file is whole
        return
    start = args.seed * common.SEEDS_APART + JUDGED
    seeds = range(start, start + args.judged + judge_grpo_rows(args))
    players, agent = mixed_episodes(state, "train", seeds, ("judged",))
    state.run.count(episodes=len(agent), env_steps=sum(len(e.actions) for e in agent),
                    tokens=sum(sum(e.mask) for e in agent))
    mixed = itertools.chain(*itertools.zip_longest(players, agent))
    for episode in [episode for episode in mixed if episode and episode.actions][done:]:
        think, critique, score = annotate(episode.flaws)
        yield {"messages": messages_of(episode.said)[:-1], "think": think, "critique": critique,
               "score": score, "won": episode.won}


# ---------------------------------------------------------------------------- only for --model tiny
# What a model made from nothing is taught before it learns by itself; defaults that suit it.

TINY = dict(
    steps=50, lr=5e-4, batch_size=128, micro_batch_size=8, rollout_batch_size=256,
    max_new_tokens=32, eval_episodes=500, save_every=20, device="cpu", judge_tokens=80,
    cold_again=True, judged=3000, sft_batch_size=16, sft_lr=5e-4)
QUICK = dict(
    steps=2, batch_size=16, group_size=4, eval_episodes=16, eval_every=1, save_every=2,
    cold_start=8, cold_epochs=1, sft_batch_size=8, judged=16, judge_steps=1, judge_epochs=1,
    examples=150)
NEXT = "Write all the calls that take up what you see here."  # practises copying


def load(world, args):
    """The model that acts, and its chat; a tiny one is made from `warmup`."""
    common.check(0 <= args.dose <= 1, f"--dose must be between 0 and 1, not {args.dose}")
    common.check(not args.dose or common.is_tiny(args.model), "--dose is of a tiny model's warm-up")
    common.check(not args.dose or hasattr(world, "heeding"),
                 f"--dose: --env {args.env} cannot say which actions follow a critique")
    if common.is_tiny(args.model) and args.device == "cpu":
        torch.set_num_threads(min(2, torch.get_num_threads()))  # more only wait for each other
    return common.load(
        args.model, corpus=lambda: warmup(world, args), constants=constants_of(world),
        device=args.device, dtype=args.dtype, thinking=args.thinking,
        max_context=args.max_context, lora_rank=args.lora_rank,
        gradient_checkpointing=args.gradient_checkpointing)


def constants_of(world):
    """Lines that are one token of a tiny model."""
    rubric = TOOLS if world.tools else ACTIONS
    texts = [world.system, CALL, ACT, JUDGE.format(rubric=rubric, system=""), NEXT]
    for text in CASE, AGAIN:
        texts += re.split(r"{\w+}|\n", text)
    texts += re.split("\0|0.0", judgement_text("\0", "\0", 0.0))
    texts += [*annotate([])[:2], "\nAgent: ", "\nObservation: ", *common.CHANGES_OF_SPEAKER]
    if world.tools:
        for name in envs.TOOLS:
            texts += envs.tool_call(name, "\0").split("\\u0000")
        for relation in envs.RELATIONS.values():
            texts.append(re.split(r"{\w}", relation.sentence)[1])
        for _, *told in envs.FLAWS.values():
            texts += [part for text in told for part in text.split("{}")]
    return texts


def warmup(world, args):
    """The world's language, the forms of replies, and with --dose what to do with a critique.

    Episodes come from a random player on the train split, unfiltered, who mostly takes up something
    it sees, half of the time repeats the sentence before its action, and sometimes acts as in
    another episode; the agent imitates it, in second attempts as in first ones. Of the second ones,
    a share of --dose follows the critique, as far as a random player can. Copying is practised
    apart: all actions that take up what is seen. The judge learns its form from judgements of other
    episodes than the one it reads. No part sees an expert.
    """
    rng, examples, done = random.Random("warm-up"), [], []
    judgement = annotate([])
    args = dataclasses.replace(args, shots=0)
    for seed in range(args.examples):
        first, taken_up = warmup_play(world, seed, rng, done)
        messages = dialogue(world, args, first.said)[:-1]
        examples.append(messages)
        turn = rng.randrange(len(taken_up))
        if taken_up[turn]:
            *above, last = messages[:2 + 2 * turn]
            asked = {"role": "user", "content": f"{last['content']}\n{NEXT}"}
            reply = {"role": "assistant", "content": "\n".join(taken_up[turn])}
            examples.append([*above, asked, reply])
        if seed % 2:
            of_another, judgement = judgement, annotate(first.flaws)
            reply = {"role": "assistant", "content": judgement_text(*of_another)}
            examples.append([*judge_messages(world, args, first.said), reply])
            _, first.critique, _ = judgement
            heeded = first.critique if rng.random() < args.dose else None
            second, _ = warmup_play(world, seed, rng, done, heeded)
            examples.append(dialogue(world, args, second.said, first)[:-1])
    rng.shuffle(examples)
    return examples


def warmup_play(world, seed, rng, done, critique=None):
    """An episode, and for each observation the actions that take up its words.

    `done`: all actions so far, in whatever episode. With a `critique`, the player follows it.
    """

    def topic(action):
        return envs.read_call(action)[1] or action

    observation, info = world.reset(seed=seed, options={"split": "train"})
    episode, taken_up = Episode("train", seed, [["world", observation]]), []
    while not episode.over:
        seen, possible = envs.bare(world.observation), info["admissible"] or [""]
        taken_up.append([action for action in possible if topic(action) in seen])
        actions = possible
        if taken_up[-1] and rng.random() < 0.8:
            actions = taken_up[-1]
        if done and rng.random() < 0.03:
            actions = done[-1000:]
        if critique is not None:
            heeding = world.heeding(critique)
            actions = [action for action in actions if action in heeding] or heeding
        action = rng.choice(rng.choice(by_tool(actions)))
        done.append(action)
        about_it = [s for s in re.split(r"(?<=[.?]) ", seen) if topic(action) in s]
        thought = rng.choice(about_it) if about_it and rng.random() < 0.5 else ""
        reply = written(world, action, thought)
        episode.said.append(["act", reply])
        info = take_turn(world, episode, reply)
    episode.flaws = process_flaws(world, episode)
    return episode, taken_up


def by_tool(calls):
    """Lists of calls of one tool. Drawn first among these, rare kinds of call are practised too."""
    tools = {}
    for call in calls:
        tools.setdefault(envs.read_call(call)[0], []).append(call)
    return list(tools.values())


if __name__ == "__main__":
    main()
