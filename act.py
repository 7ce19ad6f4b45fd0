"""Agentic Critical Training (Liu et al., arXiv 2603.08706): judge, then imitate, then reinforce.

A demonstration says what to do, never why. ACT asks: here is a state of it and two actions, the
expert's and one of your own; which is better? The model reasons freely, only its choice is paid.

    pairs  D_critic = {(s_i, a_i+, a_i-)}: at states s_i of demonstrations, the expert's action a_i+
           and what the start policy proposes, a_i-, where it is another                         (1)
    act    GRPO on D_critic, both actions in random order, R = R_acc + R_adm + R_fmt: 1 for the
           expert's action, 0.1 for another possible one, 0 for an impossible one, -0.5 without
           <action> tags                                                                         (2)
    il     imitation of the expert's replies, whole demonstrations                               (3)
    rl     GRPO at the states s_i, asked for an action, the same R                               (4)
    advantage  A_i = (R_i - mean R) / std R, within a group of replies to one prompt             (5)
    surrogate  min(rho A, clip(rho) A) - beta KL over the tokens of replies, thoughts included   (6)

--pipeline names the stages; each starts from the model of the one before and passes --epochs times
over its data, pairs being the start policy's throughout. Version 2 of the paper has act,il and
act,il,rl, with the controls il; il,il; il,rl; il,rl,rl; act; version 1 has act,il and act,rl, with
il and rl. What replaces act (the choice imitated, DPO, no reasoning) is docs/act_controls.py; Early
Experience, a rival, is docs/early_experience.py.

Departures from the paper, and why:
 1. The policy acts in one growing dialogue, so that every token is encoded once, and without a list
    of possible actions, as lists would pile up (--show-actions has them). A question about two
    actions shows that dialogue and the list, once. While training, earlier turns are the expert's
    bare actions; in evaluation they are the policy's own replies.
 2. A candidate without tags, or with nothing in them, makes no pair, and those that are alike make
    one; a question or a state that does not fit the context is left out, a demonstration cut short.
    A question shows actions as they are listed; tool calls, and all where nothing is, in one form:
    a spelling would tell whose it is.
 3. A choice may be named by its number, where the paper wants the action. Possible is what the
    world lists: what else it understands earns 0. Where it lists nothing, the candidate counts as
    possible. A candidate that is not listed needs no thought: right_if_possible leaves those out.
 4. A reply that the limit cut off before its tags has no part in its group's advantages: paid -0.5
    it would teach brevity, paid 0 it would teach never to end. Logs count it (outcome_cut).
 5. The last batch of a stage is filled up from one more pass: all gradient steps are of one size.
The table of R is version 1's for act, as third parties report it; of rl the paper says only that
what the expert does is rewarded: the same table is our choice. Demonstrations have no thoughts, so
il teaches to act at once. The prompts and the settings of GRPO are not public: these are ours, as
are AdamW's betas, no weight decay, 5 steps of warm-up, and gradients clipped to norm 1.

    python act.py                                        # tiny, household: .07 -> .43, minutes
    python act.py --pipeline il,il --out-dir runs/il,il  # a control with equal epochs
    python act.py --pairs runs/act-household-s0/pairs.jsonl --model tiny:32x2 --out-dir runs/small
    python act.py --model smollm2 --pipeline il --num-demos 20
    python act.py --model Qwen/Qwen3-4B --env household-full
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
    """Defaults are the paper's; "not in the paper": left open there. TINY has a tiny model's."""

    # shared by all scripts
    model: str = flag("tiny", "tiny, tiny:WIDTHxLAYERS, smollm2, a .gguf file, a local directory or a hub id")
    env: str = flag("household", "a world: a name, NAME:ARGUMENT, or path/to/file.py:Class")
    seed: int = flag(0, "of everything sampled; the tiny model is built with seed 0")
    steps: int | None = flag(None, "updates of each stage; default: as many as --epochs need")
    lr: float = flag(1e-6, "AdamW, of act and rl, constant after 5 steps (not in the paper)")
    batch_size: int = flag(64, "replies per step of act and rl: questions x --group-size (not in the paper)")
    micro_batch_size: int = flag(1, "sequences per backward pass; changes memory and speed, not the gradient")
    rollout_batch_size: int = flag(64, "episodes or replies sampled side by side; changes memory and speed alone")
    max_new_tokens: int = flag(512, "of one action with its thought (not in the paper)")
    max_context: int | None = flag(None, "tokens of a prompt with its reply; default: what the model can read")
    temperature: float = flag(1.0, "of the candidates, while training, and of the log-probs (not in the paper)")
    eval_temperature: float = flag(0.4, "in evaluation (not in the paper)")
    eval_episodes: int = flag(140, "per split, before and after each stage (paper: 140, and 134 of the other split)")
    eval_every: int = flag(20, "steps of a stage between evaluations on a fifth of the episodes of `test`")
    eval_only: bool = flag(False, "evaluate --model and stop; writes nothing")
    save_every: int = flag(20, "steps between checkpoints")
    out_dir: str = flag("", "default: runs/act-ENV-sSEED")
    resume: bool = flag(False, "continue the run in --out-dir")
    device: str = flag(common.default_device(), "cpu, cuda, cuda:1, mps")
    dtype: str = flag("auto", "mixed: float32 weights, bfloat16 compute; auto: mixed on a GPU, else float32; bfloat16: --eval-only")
    gradient_checkpointing: bool = flag(False, "compute layers again in the backward pass: less memory, about a third more time")
    lora_rank: int = flag(0, "above 0: adapters of this rank learn (peft; all linear layers but the head), over one copy of the weights")
    thinking: bool = flag(False, "let a thinking model think natively before each reply")
    shots: int = flag(0, "worked examples before the first turn of every part, by a random player on train")
    prefill: bool = flag(False, "begin every reply with its marked word, <action> (no room to reason before it)")
    show_actions: bool = flag(False, "list what is possible now in every observation (one more departure)")
    quick: bool = flag(False, "a small run through every line, to see that it works; overrides the sizes")
    track: str = flag("none", "metrics go there, too (an extra to install)", choices=["none", "tensorboard", "wandb"])
    # group-relative policy optimisation
    group_size: int = flag(8, "replies to one question (not in the paper)")
    updates: int = flag(1, "gradient steps per step, each on its share of the groups; with 1 no ratio is clipped (not in the paper)")
    clip: float = flag(0.2, "the ratio counts as at least 1 - clip, at most 1 + clip (not in the paper)")
    kl: float = flag(0.1, "beta, the weight of the KL to the policy at the start of the stage; 0 switches it off (not in the paper)")
    # ACT
    pipeline: str = flag("act,il", "stages in their order, of act, il and rl (paper)")
    epochs: int = flag(3, "passes of every stage over its data (paper)")
    num_demos: int = flag(1000, "episodes of the world's expert (paper: about 10 thousand pairs)")
    candidates: int = flag(1, "actions that the start policy proposes per state (paper; version 1: several)")
    demos: str = flag("", "demonstrations from elsewhere: a JSON lines file, or what datasets.load_dataset takes")
    pairs: str = flag("", "pairs from elsewhere, such as pairs.jsonl of another model's run")
    choice_tokens: int = flag(1024, "of one reply to which of two actions is better (not in the paper)")
    sft_lr: float = flag(1e-5, "AdamW, of il (not in the paper)")
    sft_batch_size: int = flag(16, "episodes per step of il (not in the paper)")
    dose: float = flag(0.0, "share of a tiny model's warm-up that knows what actions bring about (not in the paper)")
    examples: int = flag(8000, "rounds of examples that make a tiny model")


@dataclass
class Job:
    """What the stages work on, and how far they are."""

    args: Args
    world: envs.World
    chat: common.Chat
    model: torch.nn.Module
    run: common.Run | None = None
    optimizer: torch.optim.Optimizer | None = None
    # the model as its stage began, in stages with a KL; else one without weights
    reference: torch.nn.Module = field(default_factory=torch.nn.Module)
    progress: dict = field(default_factory=lambda: {"step": 0, "stages": {}, "shown": {}})
    demos: list = field(default_factory=list)  # episodes
    states: list = field(default_factory=list)  # theirs
    pairs: list = field(default_factory=list)
    stage: str = "before"  # then such as 1-act
    last: int = 0  # the step of the run that ends the stage


# ------------------------------------------------------------------------------------------ prompts
# The wording is ours. A world's own system prompt comes first: it states the game, these state the
# form of a reply. No example stands between the tags: small models copy it.

TAG = "<action>"
LISTED = "Possible actions:"
PROPOSED = "Two actions are proposed."
FORCED = 16  # tokens, room for the words of --prefill and the end of a reply that was cut


def written(action):
    """An action as the policy writes it."""
    return f"<action>{action}</action>"


def user(text):
    """A message of the world."""
    return {"role": "user", "content": text}


def assistant(text):
    """A message of the policy or the expert."""
    return {"role": "assistant", "content": text}


def write(what, reasons=True):
    """What every prompt asks for; without reasons where there is no room for them."""
    begin = "Think as long as you need. Then write" if reasons else "Write"
    return f"{begin} {what} between <action> and </action>."


def choose(reasons=True):
    """The end of a question about two actions."""
    return "Which of the two is better now? " + write("the better one, word for word,", reasons)


def system(world, reasons=True):
    """The system prompt of the policy and of a question."""
    what = "your next tool call" if world.tools else "your next action"
    return {"role": "system", "content": f"{world.system}\n{write(what, reasons)}"}


def in_tags(messages):
    """Observations and actions by turns, the actions as the policy writes them."""
    found = []
    for message in messages:
        if message["role"] == "assistant":
            message = {**message, "content": written(message["content"])}
        found.append(message)
    return found


def dialogue(world, args, messages):
    """The policy's view of a state, or a demonstration."""
    shots = worked_examples(args.env, args.shots, args.show_actions)
    return [system(world, not args.prefill), *shots, *in_tags(messages)]


def in_order(pair):
    """The two actions of a pair as they are shown."""
    both = [pair["expert"], pair["candidate"]]
    return both[::-1] if pair["expert_second"] else both


def question(world, args, pair, reasons=True):
    """Which of two actions? The dialogue so far, without lists, and one list at its end."""
    reasons = reasons and not args.prefill
    before = [{**message, "content": envs.bare(message["content"])} for message in pair["messages"]]
    lines = [before.pop()["content"]]
    listed = pair["admissible"] or []
    if listed:
        lines += [LISTED, *map(envs.one_line, listed)]
    lines.append(PROPOSED)
    for number, action in enumerate(in_order(pair), 1):
        shown = as_listed(world, action, listed) or world.read(action)
        if world.tools or not listed:  # a spelling would tell whose it is
            shown = world.canonical(shown)
        lines.append(f"Action {number}: {envs.one_line(shown)}")
    lines.append(choose(reasons))
    shots = worked_examples(args.env, args.shots, False, True, reasons)
    return [system(world, reasons), *shots, *in_tags(before), user("\n".join(lines))]


# --------------------------------------------------------------------- demonstrations and pairs (1)
# A row of demonstrations is an episode: `messages`, observations (user) and actions (assistant) by
# turns up to the last action, and `admissible`, what was possible at each turn, or null. A row of
# pairs is a state: `messages` up to an observation, what is `admissible`, the `expert`'s action,
# and `candidates`, others.


def demonstrations(args, split, seeds) -> list[dict]:
    """Episodes of the world's expert."""
    world, episodes = envs.make(args.env, show_actions=args.show_actions), []
    for seed in seeds:
        observation, info = world.reset(seed=seed, options={"split": split})
        messages, admissible, over = [], [], False
        while not over:
            action = world.expert()
            messages += [user(observation), assistant(action)]
            admissible.append(info["admissible"])
            observation, _, terminated, truncated, info = world.step(action)
            over = terminated or truncated
        episodes.append({"env": args.env, "split": split, "seed": seed,
                         "messages": messages, "admissible": admissible})
    world.close()
    return episodes


def states_of(episodes) -> list[dict]:
    """The states s_i of demonstrations, and what the expert does there, a_i+."""
    states = []
    for episode in episodes:
        messages = episode["messages"]
        lists = episode.get("admissible") or [None] * len(messages)
        for turn, action in enumerate(messages[1::2]):
            states.append({
                **episode,
                "turn": turn,
                "messages": messages[:2 * turn + 1],
                "admissible": lists[turn],
                "expert": action["content"]})
    return states


def propose(job, states, done=0):
    """(1) The policy's own actions at states, --candidates each: yields rows of pairs.

    The first `done` states have theirs already; what is sampled depends on a state's number and on
    --seed alone.
    """
    count = job.args.candidates
    size = max(1, job.args.rollout_batch_size // count)
    for start in range(done, len(states), size):
        some = states[start:start + size]
        replies = ask(job, some, ("pairs",), count, first=start * count)
        for state, group in zip(some, groups(replies, count)):
            proposed = Counter(reply.outcome for reply in group)
            proposed["tokens"] = count_tokens(group)
            candidates = others(job.world, group, state["admissible"] or [])
            yield {**state, "candidates": candidates, "proposed": proposed}


def others(world, replies, listed):
    """The actions of replies that are not the expert's, each once, as they are `listed`."""
    found = {}
    for reply in replies:
        action = parse_action(reply.text) or ""
        key = normal(world, action)
        if key and reply.outcome != "right":
            found[key] = as_listed(world, action, listed) or action
    return [*found.values()]


def pairs_of(world, rows) -> list[dict]:
    """(1) D_critic: a pair for each candidate of each state; `possible`: as the expert's action."""
    pairs = []
    for row in rows:
        listed = row.get("admissible")
        for action in row["candidates"]:
            possible = not listed or as_listed(world, action, listed) is not None
            pairs.append({"admissible": None, **row, "candidate": action, "possible": possible,
                          "expert_second": False})
    return pairs


# ------------------------------------------------------- what a reply says, and what it is paid (2)

REWARDS = {  # R = R_acc + R_adm + R_fmt
    "right": 1.0,
    "possible": 0.1,  # another one that is admissible
    "impossible": 0.0,
    "untagged": -0.5,
    "cut": 0.0}
BETWEEN_TAGS = re.compile(r"<action\s{0,9}>((?:(?!</?action\s{0,9}>).)*)</action\s{0,9}>",
                          re.DOTALL | re.IGNORECASE)


def outcome_of(world, reply, example):
    """(2) What a reply to a pair or a state amounts to, a key of REWARDS."""
    said = parse_action(reply.text)
    if said is None:
        return "untagged" if reply.complete else "cut"
    listed = [normal(world, other) for other in example["admissible"] or []]
    action = normal(world, said)
    if is_pair(example):
        listed = listed or [normal(world, example["candidate"])]  # departure 3
        if action not in listed:  # else a 2 may be an action, not the second one
            action = normal(world, chosen_of_two(world, said, *in_order(example)))
    if not action:
        return "impossible"
    if action == normal(world, example["expert"]):
        return "right"
    return "possible" if action in listed else "impossible"


def is_pair(example):
    """Whether an example is a pair, for act; else it is a state, for rl."""
    return "candidate" in example


def parse_action(reply) -> str | None:
    """What stands in the last pair of tags of what is said aloud; None without tags."""
    found = BETWEEN_TAGS.findall(common.aloud(reply))
    return found[-1].strip() if found else None


def normal(world, action):
    """Equal for actions that mean the same to the world."""
    return world.canonical(world.read(action)).lower()


def as_listed(world, action, listed) -> str | None:
    """An action as a list spells it; None where it is not there."""
    if action in listed:
        return action
    key = normal(world, action)
    return next((other for other in listed if normal(world, other) == key), None)


# --------------------------------------------------------------------------- the stages (2) (3) (4)


def critical_training(job):
    """(2) Which of two actions is better?"""
    grpo(job, job.pairs)


def imitation(job):
    """(3) What the expert says, in whole demonstrations."""
    args = job.args
    for step, episodes in stage_steps(job, job.demos, args.sft_batch_size, args.sft_lr):
        dialogues = [dialogue(job.world, args, episode["messages"]) for episode in episodes]
        metrics = imitate(job.model, job.chat, args, job.optimizer, dialogues)
        end_step(job, step, metrics)


def reinforcement(job):
    """(4) What would you do at a state of the expert's?"""
    grpo(job, job.states)


STAGES = {"act": critical_training, "il": imitation, "rl": reinforcement}
PAIRED = {"act"}  # stages that learn from pairs


def grpo(job, examples, reasons=True):
    """GRPO on what is said to pairs or states: ask, pay (2), advantages (5), update (6).

    Without `reasons` it is a control, in docs/act_controls.py.
    """
    args = job.args
    for step, batch in stage_steps(
            job, examples, args.batch_size // args.group_size, args.lr, refers=args.kl > 0):
        if is_pair(batch[0]):
            batch = in_random_order(job, step, batch)
        replies = ask(job, batch, (job.stage, step), args.group_size, reasons=reasons)
        set_advantages(replies, args.group_size)
        job.run.lap("rollout")
        metrics = update(job.model, job.reference, job.chat, args, job.optimizer, replies,
                         (args.clip, args.clip))
        end_step(job, step, metrics | watch_replies(replies, args.group_size), replies)


def in_random_order(job, step, pairs):
    """The pairs of a step, the two actions of each in random order."""
    rng = random.Random(f"{job.args.seed} {job.stage} {step}")
    return [pair | {"expert_second": rng.random() < 0.5} for pair in pairs]


def stage_steps(job, examples, size, lr, refers=False):
    """The steps of a stage, (number, batch) each: --epochs passes over its examples, or --steps.

    It begins with a fresh optimizer and, where it `refers` to it, a copy of the model as it is; a
    resumed run goes on where it stopped.
    """
    args = job.args
    done, start = job.progress["step"], job.last
    count = args.steps or math.ceil(args.epochs * len(examples) / size)
    job.last = start + count
    if done >= job.last:
        return
    if done == start:  # else the checkpoint had the moments and the reference of this stage
        job.optimizer.state.clear()
    if done == start or not refers:
        job.reference = torch.nn.Module()  # lets the old one go: two need not fit into memory
        if refers:
            job.reference = common.frozen_copy(job.model)
    rng = random.Random(f"{args.seed} {job.stage}")
    order = []
    while len(order) < count * size:
        order += rng.sample(examples, len(examples))
    for step in job.run.steps(done, job.last):
        number = step - start
        common.set_rate(job.optimizer, lr * min(1, number / 5))
        yield number, order[(number - 1) * size:number * size]


# ----------------------------------------------------------------------------------- advantages (5)


def groups(items, size):
    """Consecutive items, `size` in each."""
    return [items[start:start + size] for start in range(0, len(items), size)]


def group_advantages(returns):
    """(5) A_i = (R_i - mean) / std within one group; 0 where all R are equal."""
    if max(returns) == min(returns):  # not std == 0: rounding would make advantages of nothing
        return [0.0] * len(returns)
    centred = np.array(returns) - np.mean(returns)
    return (centred / (np.std(returns, ddof=1) + 1e-6)).tolist()


def without_spread(values, group_size):
    """How many groups have one value throughout, so that nothing is learnt from them."""
    return sum(max(group) == min(group) for group in groups(values, group_size))


def set_advantages(replies, group_size):
    """Writes the advantages (5) into replies; those that were cut off stay out of their group."""
    for group in groups(replies, group_size):
        counted = [reply for reply in group if reply.outcome != "cut"]
        advantages = group_advantages([reply.reward for reply in counted]) if counted else []
        for reply, advantage in zip(counted, advantages):
            reply.advantage = advantage


# ----------------------------------------------------------------------------- losses, updates (6)


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


def count_tokens(replies):
    """How many tokens of replies were sampled."""
    return sum(sum(reply.mask) for reply in replies)


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


# ------------------------------------------------------------------------------------------ replies

# of an example in rollouts.jsonl
KEPT = "split", "seed", "turn", "expert", "candidate", "possible", "expert_second"


@dataclass
class Reply:
    """A reply to one prompt. `ids` and `mask` (1: sampled), prompt and all, are for the loss."""

    text: str
    complete: bool  # ended by itself, not by the limit
    ids: list[int]
    mask: list[int]
    logprob: float = 0.0  # of all tokens under the mask, in decoding
    about: dict = field(default_factory=dict)  # what it was asked, for rollouts.jsonl
    reward: float = 0.0
    outcome: str = ""  # of REWARDS
    advantage: float = 0.0


def asked_of(job, example, reasons=True):
    """The messages that ask for a reply to a pair or a state, and how many tokens it may have."""
    args = job.args
    if is_pair(example):
        return question(job.world, args, example, reasons), args.choice_tokens
    return dialogue(job.world, args, example["messages"]), args.max_new_tokens


def that_fit(job, examples) -> list[dict]:
    """Those pairs or states whose prompt leaves room for a reply."""
    found = []
    for example in examples:
        messages, limit = asked_of(job, example)
        if len(job.chat.dialogue(messages)) + FORCED + limit <= job.model.max_context:
            found.append(example)
    return found


def ask(job, examples, stream, samples=1, first=0, reasons=True) -> list[Reply]:
    """`samples` paid replies to each of some pairs or of some states, numbered from `first`.

    `stream` names the randomness: a reply depends on its prompt and (--seed, stream, number) alone.
    """
    args = job.args
    word = TAG * args.prefill
    prompts = []
    for example in examples:
        messages, limit = asked_of(job, example, reasons)
        prompts += [job.chat.dialogue(messages, word)] * samples
    numbers = range(first, first + len(prompts))
    sampled = common.generate(
        job.model, job.chat, prompts, max_new_tokens=limit, temperature=args.temperature,
        seeds=[common.row_seed(args.seed, *stream, number) for number in numbers],
        rows=args.rollout_batch_size)
    replies = []
    for i, (prompt, ids) in enumerate(zip(prompts, sampled.ids)):
        example = examples[i // samples]
        reply = Reply(
            text=word + sampled.texts[i],
            complete=sampled.complete[i],
            ids=prompt + ids,
            mask=[0] * len(prompt) + [1] * len(ids),
            logprob=sum(sampled.logprobs[i]),
            about={name: example[name] for name in KEPT if name in example})
        reply.outcome = outcome_of(job.world, reply, example)
        reply.reward = REWARDS[reply.outcome]
        replies.append(reply)
    return replies


# --------------------------------------------------------------------------------------- evaluation


@dataclass
class Episode:
    """One episode of an evaluation."""

    split: str
    seed: int
    said: list = field(default_factory=list)  # [who, text]: world or act
    actions: list[str] = field(default_factory=list)  # as the world read them
    valid: list[bool] = field(default_factory=list)
    cut: int = 0  # replies that the limit cut off
    won: bool = False
    score: float = 0.0
    over: bool = False
    truncated: bool = False  # the context was full


def evaluate(job, splits, count):
    """`count` fixed episodes of each split -> ({split: metrics}, the episodes)."""
    args = job.args
    found, episodes = {}, []
    for split in [split for split in ("test", "ood") if split in splits]:
        played = rollout(job.model, job.chat, args, split, range(count),
                         temperature=args.eval_temperature, stream=("evaluate",))
        found[split] = watch(played)
        common.warn_cut(found[split], LIMITS)
        episodes += played
        tqdm.write(common.result_line(split, found[split]))
    return found, episodes


def rollout(model, chat, args, split, seeds, **how) -> list[Episode]:
    """Plays an episode per seed, --rollout-batch-size at once; `how`: see `side_by_side`."""
    episodes, size = [], args.rollout_batch_size
    for first in range(0, len(seeds), size):
        some = seeds[first:first + size]
        episodes += side_by_side(model, chat, args, split, some, first, **how)
    return episodes


def side_by_side(model, chat, args, split, seeds, first, *, temperature, stream):
    """Episodes that share a cache; their rows count from `first`.

    `stream` names the randomness: a row's replies depend on (--seed, stream, row, turn) alone.
    """
    worlds, episodes, prompts = [], [], []
    for seed in seeds:
        world = envs.make(args.env, show_actions=args.show_actions)
        observation, _ = world.reset(seed=seed, options={"split": split})
        prompts.append(chat.dialogue(dialogue(world, args, [user(observation)])))
        episodes.append(Episode(split, seed, said=[["world", observation]]))
        worlds.append(world)
    actors = common.Dialogues(model, chat, prompts)
    room = model.max_context - FORCED - args.max_new_tokens
    for turn in itertools.count():
        for ids, episode in zip(actors.ids, episodes):
            if not episode.over and len(ids) > room:  # it ends; no turn is ever dropped
                episode.truncated = episode.over = True
        live = [i for i, episode in enumerate(episodes) if not episode.over]
        if not live:
            break
        replies = actors.reply(
            live, max_new_tokens=args.max_new_tokens, temperature=temperature,
            seeds=[common.row_seed(args.seed, *stream, first + i, turn) for i in live],
            prefill=TAG * args.prefill)
        for i, reply, complete in zip(live, replies.texts, replies.complete):
            episodes[i].cut += not complete
            take_turn(worlds[i], episodes[i], reply)
            actors.extend([i], [worlds[i].observation])
    for world in worlds:
        world.close()
    return episodes


def take_turn(world, episode, reply):
    """One step of the world, written down in `episode`."""
    observation, _, terminated, truncated, info = world.step(parse_action(reply) or "")
    episode.said += [["act", reply], ["world", observation]]
    episode.actions.append(info["action"])
    episode.valid.append(info["valid"])
    episode.won, episode.score = info["won"], info["score"]
    episode.over = terminated or truncated


# --------------------------------------------------------------------------------------------- main


def main():
    """Demonstrations, pairs, the stages."""
    args = common.parse_args(Args, TINY, quick=QUICK)
    world, stages, files = check_args(args)
    run = common.Run("act", args, fixed=("steps",))
    model, chat = load(world, args)
    job = Job(args, world, chat, model, run)
    if args.eval_only:
        return evaluate(job, world.splits, args.eval_episodes)
    run.start(model=model)

    job.optimizer = torch.optim.AdamW(  # the rate: stage_steps
        model.parameters(), betas=(0.9, 0.95), weight_decay=0,
        fused=True)  # no copies of the weights in the step
    if args.resume and args.kl:
        job.reference = common.frozen_copy(model)  # for weights that the checkpoint may have
    job.progress = run.resume(**parts(job)) or job.progress
    counts = gather(job, files, bool(PAIRED & {*stages}))
    results = job.progress["stages"]  # `examine` fills it
    if not results:
        run.count(episodes=len(job.demos), env_steps=0, tokens=counts.get("tokens", 0))
        examine(job)
    for number, stage in enumerate(stages, 1):
        job.stage = f"{number}-{stage}"
        STAGES[stage](job)
        if number < len(stages):  # model/ is of the last one
            save_stage(job)

    ends = envs.ends(args.env, args.eval_episodes)
    run.complete(
        model, chat, "act", args.pipeline, results["before"], results[job.stage], ends,
        shown=[job.progress["shown"][stage] for stage in ("before", job.stage)], written=True,
        stages=results,
        expert_states=len(job.states),
        pairs=len(job.pairs),
        pair_counts=counts)


def gather(job, files, paired):
    """Demonstrations, their states and pairs, of `files` or made -> counts of what was proposed.

    A resumed run reads again what it proposed.
    """
    args, run = job.args, job.run
    demos, rows = files
    counts = Counter()
    seed = args.seed * common.SEEDS_APART
    job.demos = demos or demonstrations(args, "train", range(seed, seed + args.num_demos))
    common.write_jsonl(run.dir / "demos.jsonl", job.demos)
    job.states = that_fit(job, states_of(job.demos))
    if rows:
        common.write_jsonl(run.dir / "pairs.jsonl", rows)
    elif paired:
        make = functools.partial(propose, job, job.states)
        rows = run.collect("pairs.jsonl", job.progress, make)
        for row in rows:
            counts.update(row["proposed"])
    pairs = pairs_of(job.world, rows or [])
    job.pairs = that_fit(job, pairs)
    check_data(job, paired, counts, len(pairs))
    return dict(counts)


# -------------- beside the paper: what is refused, what is written down, worked examples (--shots),
# and what is only for --model tiny

AT_LEAST = {"updates": 1, "choice_tokens": 1, "sft_batch_size": 1, "epochs": 1, "num_demos": 1,
            "candidates": 1, "examples": 1, "group_size": 2, "clip": 0, "kl": 0, "sft_lr": 0}


def check_args(args):
    """Everything that can be refused before a model is loaded -> (world, stages, files)."""
    common.check_common(args)
    common.check_at_least(args, AT_LEAST)
    common.check_multiple(args, "batch_size", "group_size", "updates")
    stages = [stage.strip() for stage in args.pipeline.split(",")]
    for stage in stages:
        common.check(stage in STAGES, f"--pipeline: unknown stage {stage!r}; "
                                      f"there are: {', '.join(STAGES)}")
    common.check(not args.pairs or PAIRED & {*stages},
                 f"--pairs: no stage of --pipeline {args.pipeline} is about pairs")
    world = common.checked(envs.make, args.env, show_actions=args.show_actions)
    listed = world.reset(seed=0)[1]["admissible"]
    common.check(listed or not args.shots, f"--shots: nothing to play at random in {args.env}")
    expert = type(world).expert is not envs.World.expert
    common.check(expert or args.demos or args.eval_only,
                 f"--env {args.env} has no expert: give --demos")
    return world, stages, read_files(world, args)


def read_files(world, args):
    """The rows of --demos and --pairs, without columns of another form; None: not given."""
    found = []
    for option, path in ("--demos", args.demos), ("--pairs", args.pairs):
        paired = option == "--pairs"
        check = functools.partial(check_row, world, args, paired)
        rows = common.read_rows(option, path, check) if path else None
        known = {*ROW, *PAIR} if paired else ROW
        found.append(rows and [{key: row[key] for key in row if key in known} for row in rows])
    return found


ROW = {"env", "split", "seed", "messages", "admissible"}
PAIR = {"turn", "expert", "candidates", "proposed"}


def check_row(world, args, paired, row):
    """ValueError, TypeError or LookupError unless a row is of the form above, and for this run."""
    common.check_messages(row["messages"], "user" if paired else "assistant")
    texts = row.get("admissible") or []
    if paired:
        texts = [texts, [row["expert"]], row["candidates"]]
    elif texts and len(texts) != len(row["messages"]) // 2:
        raise ValueError(f"{len(texts)} lists in admissible, not one for each action")
    for some in texts:
        common.check_texts(some or [])
    origin = row.get("env") or args.env, row.get("split") or "train"
    if origin != (args.env, "train"):
        raise ValueError(f"of {origin}, not of {args.env} and train")
    actions = [message["content"] for message in row["messages"][1::2]]
    for action in [*actions, row["expert"]] if paired else actions:  # of the expert
        if not normal(world, action) or envs.TAGS.search(action):
            raise ValueError(f"the expert's action {action[:60]!r} is empty or has tags")
    if paired:
        candidates = {normal(world, action) for action in row["candidates"]}
        if candidates & {"", normal(world, row["expert"])}:
            raise ValueError("a candidate is empty, or the expert's action")


def check_room(args, chat, model, messages, room):
    """Refuses a first prompt without room for `room` more tokens, and words before a thought."""
    length = len(chat.dialogue(messages))
    common.check(length + room <= model.max_context,
                 f"the first prompt has {length} tokens, replies may have {room}: "
                 f"beyond the context of {model.max_context}")
    common.check(not args.prefill or not chat.opened,
                 "--prefill: the chat template of this model opens a thought before each reply")


def check_data(job, paired, counts, pairs):
    """Tells what the stages have to work on, and refuses what is not enough.

    `pairs`: how many there are; those without room in the context are counted, and states likewise.
    """
    left_out = {"states_left_out": len(states_of(job.demos)) - len(job.states),
                "pairs_left_out": pairs - len(job.pairs)}
    counts.update({name: count for name, count in left_out.items() if count})
    possible = sum(pair["possible"] for pair in job.pairs)
    summary = (f"{len(job.states)} states, {len(job.pairs)} pairs, {possible} of them of two "
               f"possible actions {dict(counts)}")
    common.check(job.states, f"no expert state fits the context of {job.model.max_context}")
    common.check(job.pairs or not paired, f"no action but the expert's to make pairs of: {summary}")
    tqdm.write(summary)


# ---------------------------------------------------------------------------- which of two is meant

NUMBERED = re.compile(  # "Action 1", "the second one"; what stands behind "Option 2:"
    r"\W{0,9}(?:i (?:choose|pick|prefer|take) )?(?:the )?(?:action|option|choice|number)?\W{0,9}"
    r"(?:(1|one|first)|2|two|second)\b(?: (?:action|option|one))?\W{0,9}"
    r"(?:(?:[:\n]\s*|[.)-]\s+)(.*))?",
    re.DOTALL | re.IGNORECASE)


def chosen_of_two(world, text, one, two) -> str:
    """Which of two actions is meant by the text in the tags; the text where neither is.

    By its words, or by its number and nothing but that: "not Action 1" is no choice of 1.
    """
    number = NUMBERED.fullmatch(text)
    behind = (number[2] or "").strip() if number else ""
    for words in text, behind:
        if words and normal(world, words) in (normal(world, one), normal(world, two)):
            return words
    if number and not behind:
        return one if number[1] else two
    return text


# ----------------------------------------------------------------------------- what is written down

LIMITS = {"act": "--max-new-tokens", "choice": "--choice-tokens"}


def end_step(job, step, metrics, replies=()):
    """Evaluates where that is due, and writes everything down."""
    args, run = job.args, job.run
    run.lap("update")
    job.progress["step"] = run.step
    run.count(tokens=count_tokens(replies), gradient_steps=args.updates if replies else 1)
    write_down(job, replies)
    numbers = {}
    if run.step == job.last:
        numbers = examine(job)
    elif step % args.eval_every == 0:
        numbers, _ = evaluate(job, ["test"], max(1, args.eval_episodes // 5))
    for name, value in numbers.get("test", {}).items():
        metrics[f"eval_{name}"] = value
    if run.step == 1:  # the evaluation before any has no line of its own
        for name, value in job.progress["stages"]["before"]["test"].items():
            metrics[f"before_{name}"] = value
    run.log({"stage": job.stage, "stage_step": step, **metrics}, LIMITS)
    run.save_if_due(job.progress, **parts(job))


def save_stage(job):
    """Saves what a stage ends with; a run that is resumed in a later stage has it already."""
    path = job.run.dir / job.stage
    if job.progress["step"] == job.last and not path.exists():
        common.save_model(path, job.model, job.chat)


def examine(job):
    """The evaluation of what a stage has made, whole episodes and all -> {split: metrics}."""
    numbers, episodes = evaluate(job, job.world.splits, job.args.eval_episodes)
    when = "before" if job.stage == "before" else "after"
    write_down(job, episodes, evaluation=when)
    job.progress["stages"][job.stage] = numbers
    job.progress["shown"][job.stage] = record(episodes[-1])
    return numbers


def write_down(job, items, **more):
    """Episodes or replies, as lines of rollouts.jsonl."""
    more |= {"step": job.run.step, "stage": job.stage}
    job.run.write_rollouts([{**more, **record(each)} for each in items])


def record(episode):
    """An episode as rollouts.jsonl keeps it: words, not ids."""
    return {name: value for name, value in vars(episode).items() if name not in ("ids", "mask")}


def parts(job):
    """What a checkpoint keeps the weights of."""
    return {"model": job.model, "optimizer": job.optimizer, "reference": job.reference}


def watch_replies(replies, group_size):
    """The metrics of what was said and paid."""
    cut = common.mean(not reply.complete for reply in replies)
    found = {
        "reward": common.mean(reply.reward for reply in replies),
        "groups_flat": without_spread([reply.advantage for reply in replies], group_size),
        "length": count_tokens(replies) / len(replies)}
    for outcome in REWARDS:
        found[f"outcome_{outcome}"] = common.mean(reply.outcome == outcome for reply in replies)
    if not is_pair(replies[0].about):
        return found | {"cut_act": cut}
    for name, key, value in (("first", "expert_second", False), ("second", "expert_second", True),
                             ("possible", "possible", True)):
        right = [reply.outcome == "right" for reply in replies if reply.about[key] == value]
        found[f"right_if_{name}"] = common.mean_se(right)[0]  # nan of nothing
    return found | {"cut_choice": cut}


def watch(episodes):
    """The metrics of an evaluation."""
    valid = [ok for episode in episodes for ok in episode.valid]
    success, se = common.mean_se(episode.won for episode in episodes)
    return {
        "success": success,
        "se": se,
        "n": len(episodes),
        "score": common.mean(episode.score for episode in episodes),
        "turns": len(valid) / len(episodes),
        "invalid": common.mean(not ok for ok in valid),
        "truncated": common.mean(episode.truncated for episode in episodes),
        "cut_act": sum(episode.cut for episode in episodes) / max(1, len(valid))}


# ---------------------------------------------------------------------------------- worked examples


@functools.lru_cache(maxsize=8)
def worked_examples(env, count, show_actions, choice=False, reasons=False):
    """--shots: what a random player met and did on train.

    With `choice`, questions: what can be done is better than what cannot, first and second in turn.
    """
    world, messages = envs.make(env, show_actions=show_actions), []
    for seed in range(10**6, 10**6 + count):  # far from the seeds that are learnt from
        observation, info = world.reset(seed=seed, options={"split": "train"})
        action = envs.random_player(world, info, random.Random(seed))
        asked, reply = user(observation), written(action)
        if choice:
            second = seed % 2 == 1
            pair = {"messages": [asked], "admissible": info["admissible"], "expert": action,
                    "candidate": "sing a song", "expert_second": second}
            asked = question(world, Args(env=env, prefill=not reasons), pair)[-1]
            reply = written(envs.one_line(action))
        if choice and reasons:
            good, bad = (2, 1) if second else (1, 2)
            reply = f"Action {good} can be done now, and action {bad} cannot. {reply}"
        messages += [asked, assistant(reply) | {"shot": True}]
    world.close()
    return messages


# --------------------------------------------------------------------------------- the tiny model
# What a model made from nothing is taught before it learns by itself; the defaults that suit it.

TINY = dict(
    lr=3e-4, sft_lr=3e-4, micro_batch_size=16, rollout_batch_size=256, max_new_tokens=48,
    choice_tokens=64, eval_episodes=500, device="cpu", num_demos=40, candidates=2, sft_batch_size=3)
QUICK = dict(
    steps=3, batch_size=16, group_size=4, eval_episodes=7, eval_every=2, save_every=2, num_demos=4,
    examples=400)
READ = "Repeat the task, and what the last action brought."  # practises reading
FORESEE = "Say what each possible action would lead to."  # practises outlooks
OUTLOOKS = ["away", "nowhere", "closer"]


def load(world, args, corpus=None, more=()):
    """The model and its chat, with room for a first reply.

    A tiny one is made from `corpus` (default: `warmup`), with `more` lines that are one token each.
    """
    common.check(0 <= args.dose <= 1, f"--dose must be between 0 and 1, not {args.dose}")
    common.check(not args.dose or common.is_tiny(args.model), "--dose is of a tiny model's warm-up")
    common.check(not args.dose or hasattr(world, "possibilities"),
                 f"--dose: --env {args.env} cannot say what an action brings about")
    if common.is_tiny(args.model) and args.device == "cpu":
        torch.set_num_threads(min(2, torch.get_num_threads()))  # more only wait for each other
    corpus_args = Args(  # all that the corpus depends on, code apart
        env=args.env, show_actions=args.show_actions, dose=args.dose, examples=args.examples)
    known_by = None
    # Code that was imported may be patched by now, and other worlds may read files.
    if __name__ == "__main__" and args.env in envs.WORLDS:
        known_by = [vars(corpus_args), *map(common.content_hash, (__file__, envs.__file__))]
    constants = []
    for reasons in True, False:
        constants += [system(world, reasons)["content"], choose(reasons)]
    constants += [LISTED, PROPOSED, READ, TAG, "</action>", *common.CHANGES_OF_SPEAKER, *more]
    constants += [FORESEE] * bool(args.dose)
    model, chat = common.load(
        args.model,
        corpus=corpus or functools.partial(warmup, world, corpus_args),
        known_by=known_by,
        constants=constants,
        device=args.device,
        dtype=args.dtype,
        thinking=args.thinking,
        max_context=args.max_context,
        gradient_checkpointing=args.gradient_checkpointing,
        lora_rank=args.lora_rank)
    observation, _ = world.reset(seed=0)
    opening = dialogue(world, args, [user(observation)])
    check_room(args, chat, model, opening, FORCED + args.max_new_tokens)
    return model, chat


def warmup(world, args):
    """The world's language, the forms of replies, and with --dose what actions bring about.

    Episodes come from a random player on the train split, unfiltered. The policy imitates it, half
    of the time after a thought that repeats the task and what happened last; asked to, it writes
    that alone. Asked for one of two actions, which are random ones, it picks either.
    With --dose, the thought before a choice also says of both actions how a random player's chance
    to win would move: with probability --dose as it would (`outlook`), and then the choice
    follows; else anything. The choice is a number there: to copy an action is harder for so small a
    model. Outlooks are practised apart, too, of all that is possible. No part sees an expert.
    """
    rng, examples = random.Random("warm-up"), []
    args = dataclasses.replace(args, shots=0, prefill=False)
    for seed in range(args.examples):
        play = random_play(world, rng, seed, bool(args.dose))
        turns = [early_turn(rng, play) for _ in range(4)]
        examples += [
            game(world, args, rng, play, turns[0]),
            choice(world, args, rng, play, turns[1], True),
            choice(world, args, rng, play, turns[2], False),
            other_request(world, args, play, turns[3], READ, play.facts[turns[3]])]
        for _ in range(2 if args.dose else 0):
            turn = early_turn(rng, play)
            examples.append(choice(world, args, rng, play, turn, True))
            turn = early_turn(rng, play)
            marks = marks_of(args, rng, play, turn, play.possible[turn])
            thought = foreseen(play.possible[turn], marks)
            examples.append(other_request(world, args, play, turn, FORESEE, thought))
    rng.shuffle(examples)
    return examples


def early_turn(rng, play):
    """Mostly early ones: more of them in the same time."""
    return rng.randrange(rng.randint(1, len(play.possible)))


def game(world, args, rng, play, turn):
    """A game of the policy up to a turn, half of the time with a thought."""
    said = dialogue(world, args, play.messages[:2 * turn + 2])
    for fact, message in zip(play.facts, said[2::2]):
        if rng.random() < 0.5:
            message["content"] = f"{fact} {message['content']}"
    return said


def choice(world, args, rng, play, turn, reasons):
    """A question about two actions that were possible, and a reply."""
    possible = play.possible[turn]
    both = rng.sample(possible, 2) if len(possible) > 1 else possible * 2
    pair = {"messages": play.messages[:2 * turn + 1], "admissible": possible,
            "expert": both[0], "candidate": both[1], "expert_second": False}
    reply = written(rng.choice(both))
    if reasons and args.dose:
        marks = marks_of(args, rng, play, turn, both)
        if marks[0] == marks[1]:
            number = rng.choice([1, 2])
        else:
            number = 1 + (marks[1] > marks[0])
        reply = f"{foreseen(both, marks)} {written(f'Action {number}')}"
    if reasons:
        reply = f"{play.facts[turn]} {reply}"
    return [*question(world, args, pair, reasons), assistant(reply)]


def other_request(world, args, play, turn, line, reply):
    """A game up to a turn, where a line asks for something else than an action."""
    *before, last = dialogue(world, args, play.messages[:2 * turn + 1])
    asked = user(f"{last['content']}\n{line}")
    return [*before, asked, assistant(reply)]


def foreseen(actions, marks):
    """What actions would bring about, in words."""
    said = [f"{action} would lead {OUTLOOKS[mark]}." for action, mark in zip(actions, marks)]
    return " ".join(said)


def marks_of(args, rng, play, turn, actions):
    """Indices of OUTLOOKS, one for each action: with probability --dose as they are, else any."""
    if rng.random() < args.dose:
        return [play.outlooks[turn][action] for action in actions]
    return [rng.randrange(len(OUTLOOKS)) for _ in actions]


@dataclass
class Play:
    """A game of a random player; lists by turn, `messages` apart."""

    messages: list[dict]
    possible: list[list[str]]
    facts: list[str]  # the thought that the task and the observation allow
    outlooks: list[dict[str, int]]  # of what was possible; empty where nobody asks


def random_play(world, rng, seed, foresee=False) -> Play:
    """A game on train; with `foresee` its outlooks, too."""
    observation, info = world.reset(seed=seed, options={"split": "train"})
    messages, possible, outlooks, over = [user(observation)], [], [], False
    chances = envs.RandomPlay(world) if foresee else None
    while not over:
        possible.append(info["admissible"] or [envs.random_player(world, info, rng)])
        if foresee:
            outlooks.append({a: outlook(chances, world, a) for a in possible[-1]})
        action = possible[-1][0]
        if info["admissible"]:
            action = rng.choice(rng.choice(envs.by_verb(info["admissible"])))
        observation, _, terminated, truncated, info = world.step(action)
        messages += [assistant(action), user(observation)]
        over = terminated or truncated
    facts = [f"{world.task} {event(message['content'])}" for message in messages[::2]]
    return Play(messages, possible, facts, outlooks)


def outlook(chances, world, action) -> int:
    """How an action moves a random player's chance to win within a whole game's turns.

    `chances`: envs.RandomPlay. An index of OUTLOOKS.
    """
    now = chances.expected(world, world.max_turns)
    then = chances.expected_after(world, action, world.max_turns)
    return 1 + envs.moved(now, then)


def event(observation):
    """What an observation says first."""
    return re.split(r"(?<=[.?!])\s", observation.strip(), maxsplit=1)[0]


if __name__ == "__main__":
    main()
