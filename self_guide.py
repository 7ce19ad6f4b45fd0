"""Self-Guide (Wang et al., arXiv 2604.03098): an agent rates its own steps, acts on it, earns it.

One language model rates and acts. With h_t for the history, u for the share of the run that is done:

    rate       z_t ~ pi(. | h_{t-1}, o_t)         a reason and a label for the step just taken     (1)
    act        a_t ~ pi(. | h_{t-1}, o_t, z_t)    with the rating in view; the actor may think     (2)
    return     R(tau; u) = R_env(tau) + lambda(u) sum_t g(z_t),  g: +0.1, 0, -0.1 by label         (3)
    trust      lambda(u) = 0 until 40% of the run (ratings steer and earn nothing), up to 1 at
               50%, 1 until 70%, down to 0 at 80%: this shaping is not potential-based             (4)
    advantage  A_i = (R_i - mean R) / std R, within a group of episodes of one task                (5)
    surrogate  min(rho A, clip(rho) A) over the tokens of ratings *and* of actions                 (6)

The numbers are this file's. The first turn has no step to rate; the last step is never rated.
Arms, one run each: --guide off is plain GRPO; --guide inference trains nothing and compares the
start policy without and with its ratings; --trust zero lets ratings steer but never earn.

Departures from the paper, and why:
 1. Rating and acting are turns of one growing dialogue; the paper gives each call a prompt of its
    own over the history, earlier ratings included. So a rollout encodes every token once, the model
    sees its earlier thoughts too, and the labels are explained once. A full context ends the episode.
 2. What is possible now is not listed, as lists would pile up in a dialogue; --show-actions does it,
    as the paper's prompts for ALFWorld and WebShop do (its SciWorld prompt does not).
 3. A rating without a label counts as neutral (the paper does not say), and is counted.
The paper leaves open: group size, learning rate and KL weight of its GRPO runs (here: those of its
DAPO runs), the scale of R_env (1 as written; a public script has 10), gradient steps per batch.

    python self_guide.py                                         # household, tiny model: minutes
    python self_guide.py --guide off --out-dir runs/grpo         # an arm wants its own directory
    python self_guide.py --model smollm2 --shots 2 --prefill --show-actions --guide inference \\
        --eval-episodes 20 --max-new-tokens 24 --rate-tokens 48  # a chat model on a laptop
    python self_guide.py --model Qwen/Qwen3-1.7B --env household-full
"""

import copy
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
    """The paper's setting. "not in the paper" marks what it leaves open; TINY has a tiny model's."""

    # shared by all scripts
    model: str = flag("tiny", "tiny, tiny:WIDTHxLAYERS, smollm2, a .gguf file, a local directory or a hub id")
    env: str = flag("household", "a world: a name, NAME:ARGUMENT, or path/to/file.py:Class")
    seed: int = flag(0, "of everything sampled; the tiny model is built with seed 0")
    steps: int = flag(100, "passes of the loop: a batch of episodes, an update (paper)")
    lr: float = flag(1e-6, "AdamW, constant after 5 steps (paper, for DAPO)")
    batch_size: int = flag(128, "episodes per step (public script: 16 tasks x 8)")
    micro_batch_size: int = flag(1, "sequences per backward pass; changes memory and speed, not the gradient")
    rollout_batch_size: int = flag(64, "episodes or replies sampled side by side; changes memory and speed alone")
    max_new_tokens: int = flag(1024, "of one action with its thought (paper)")
    max_context: int | None = flag(None, "tokens of a prompt with its reply; default: what the model can read")
    temperature: float = flag(1.0, "while training, and of the log-probs (paper)")
    eval_temperature: float = flag(0.4, "in evaluation (paper)")
    eval_episodes: int = flag(100, "per split, first and last; a fifth of them, of `test`, in between")
    eval_every: int = flag(20, "steps between evaluations")
    eval_only: bool = flag(False, "evaluate --model and stop; writes nothing")
    save_every: int = flag(20, "steps between checkpoints")
    out_dir: str = flag("", "default: runs/self_guide-ENV-sSEED")
    resume: bool = flag(False, "continue the run in --out-dir")
    device: str = flag(common.default_device(), "cpu, cuda, cuda:1, mps")
    dtype: str = flag("auto", "auto (float32 weights; bfloat16 compute on a GPU), float32, bfloat16")
    thinking: bool = flag(False, "let a thinking model think natively before each reply")
    shots: int = flag(0, "worked examples before the first turn of every part, by a random player on train")
    prefill: bool = flag(False, "begin every reply with its marked word, such as Action: (no room to reason before it)")
    show_actions: bool = flag(False, "list what is possible now in every observation (one more departure)")
    quick: bool = flag(False, "a small run through every line, to see that it works; overrides the sizes")
    # group-relative policy optimisation
    group_size: int = flag(8, "episodes of one task (paper, for DAPO)")
    updates: int = flag(1, "gradient steps per step, each on its share of the groups (not in the paper)")
    estimator: str = flag("grpo", "dapo: asymmetric clip, token-mean loss, dynamic sampling (paper: both)", choices=["grpo", "dapo"])
    clip: float = flag(0.2, "the ratio counts as at least 1 - clip, with grpo as at most 1 + clip (paper, for DAPO)")
    clip_high: float = flag(0.28, "with dapo as at most 1 + clip_high (paper)")
    kl: float = flag(0.01, "weight of the KL to the start policy; 0 switches it off (paper, for DAPO)")
    resample: int = flag(2, "dapo: times that groups without spread in R are replaced, per step (not in the paper)")
    # Self-Guide
    guide: str = flag("on", "off: plain GRPO; inference: ratings steer an untrained policy (paper: all three)",
                             choices=["on", "off", "inference"])
    rate_tokens: int = flag(1024, "of one rating (paper)")
    trust: str = flag("schedule", "lambda over the run (paper: the schedule and, as ablations, the others)",
                             choices=["schedule", "zero", "immediate", "no-anneal"])
    trust_points: list[float] = field(default_factory=lambda: [0.4, 0.5, 0.7, 0.8], metadata={
        "help": "shares of --steps: ratings start to earn, earn fully, start to earn less, earn nothing (paper)"})
    rating_reward: float = flag(0.1, "g of a positive rating; a negative one is its opposite (paper)")
    reward_scale: float = flag(1.0, "R_env is this times the world's score (paper, as written; public script: 10)")
    invalid_penalty: float = flag(0.0, "taken from R_env for each invalid action (not in the paper; public script: 0.1)")
    # departures that can be switched on
    mean_rating: bool = flag(False, "the mean of a trajectory's g in place of their sum (not in the paper)")
    flat_groups: bool = flag(True, "ratings earn where all R_env of a group are equal, too (paper)")
    frozen_rater: bool = flag(False, "the start policy rates, and is not trained to (not in the paper)")
    dose: float = flag(0.0, "share of a tiny model's warm-up that rates rightly and takes the hint (not in the paper)")
    examples: int = flag(10000, "episodes that make a tiny model")


# ------------------------------------------------------------------------------------------ prompts
# Labels, their meanings and the two lines of a rating are the paper's; the wording is ours. A world's
# own system prompt comes first: it states the game, these state the form of a reply.

POLICY = "Think first if it helps. Then write Action: and your next action, on a line of its own."
GUIDED = """You also rate your own steps. When you are asked to rate, judge the step you have just taken in the light
of the whole episode so far. Reply with two lines. Reason: one sentence. Label: positive, neutral or negative.
Positive: the step moved closer to the goal, or found what will be of use. Neutral: neither.
Negative: it was wasted, a step back, a contradiction, or you are stuck.
Your rating is a hint for your next action: go on after a positive one, try something else after a negative one."""
RATE = "Rate your last step. Reason: one sentence. Label: positive, neutral or negative."
ACT = "Now your next action."
LABELS = ["negative", "neutral", "positive"]
FORCED = 16  # tokens, room for the words of --prefill and the end of a reply that was cut


def written(action) -> str:
    """An action as the policy writes it."""
    return f"Action: {action}"


def parse_rating(reply) -> int | None:
    """A rating's label as -1, 0 or 1: the last `Label:` counts; None where there is none."""
    label = common.chosen(common.aloud(reply), "Label", LABELS)
    return None if label is None else label - 1


def to_rate(observation) -> str:
    """The user turn that asks for a rating."""
    return f"{envs.bare(observation)}\n{RATE}"


def to_act(observation) -> str:
    """The user turn that asks for an action after a rating; what is possible stands here."""
    return ACT + observation.removeprefix(envs.bare(observation))


def opening(world, args, guided) -> list[dict]:
    """The messages that a dialogue starts with; the first turn has no step to rate."""
    system = "\n".join([world.system, POLICY, GUIDED] if guided else [world.system, POLICY])
    first = {"role": "user", "content": world.observation}
    shots = worked_examples(args.env, args.shots, args.show_actions, guided)
    return [{"role": "system", "content": system}, *shots, first]


@functools.lru_cache(maxsize=8)
def worked_examples(env, count, show_actions, guided) -> list[dict]:
    """--shots: what a random player met and did on train; with guidance also how a step is rated.

    Every other rated step cannot be done, so that both labels are seen; none of them ends a game.
    """
    world, messages = envs.make(env, show_actions=show_actions), []
    for seed in range(10**6, 10**6 + count):  # far from the seeds that are learnt from
        rng = random.Random(seed)
        for _ in range(20):
            observation, info = world.reset(seed=seed, options={"split": "train"})
            wasted = guided and seed % 2 == 1
            step = "sing a song" if wasted else envs.random_player(world, info, rng)
            seen, _, over, _, info = world.step(step)
            if not over:  # the last step is never rated
                break
        said = [observation, written(step)]
        if guided and not over:
            reason = f"I have learnt this: {event(seen)}" if info["valid"] else "It changed nothing."
            rating = f"Reason: {reason}\nLabel: {'positive' if info['valid'] else 'negative'}"
            action = envs.random_player(world, info, rng)
            said += [to_rate(seen), rating, to_act(seen), written(action)]
        for role, text in zip(itertools.cycle(["user", "assistant"]), said):
            messages.append({"role": role, "content": text, "shot": True})
    world.close()
    return messages


def event(observation) -> str:
    """What an observation says first."""
    return re.split(r"(?<=[.?!])\s", observation.strip(), maxsplit=1)[0]


# ------------------------------------------------------------------------------------------ rollout


@dataclass
class Episode:
    """One trajectory. `ids`, `mask` (1: sampled by the policy) and `logprob` are for the loss."""

    split: str
    seed: int
    said: list = field(default_factory=list)  # [who, text]: world, act or rate
    actions: list[str] = field(default_factory=list)  # as the world read them
    labels: list[int | None] = field(default_factory=list)  # of all steps but the last
    valid: list[bool] = field(default_factory=list)
    cut: dict = field(default_factory=lambda: {"act": 0, "rate": 0})  # replies that the limit cut off
    won: bool = False
    score: float = 0.0
    over: bool = False
    truncated: bool = False  # the context was full
    wrong: bool = False  # the world's word on a wrong object, where it has one
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprob: float = 0.0  # of all sampled tokens, in decoding


def rollout(model, chat, args, split, seeds, **how) -> list[Episode]:
    """Plays an episode per seed, --rollout-batch-size at once; `how`: see `side_by_side`."""
    episodes, size = [], args.rollout_batch_size
    for first in range(0, len(seeds), size):
        some = seeds[first:first + size]
        episodes += side_by_side(model, chat, args, split, some, first, **how)
    return episodes


@torch.no_grad()
def side_by_side(model, chat, args, split, seeds, first, *, guided, temperature, stream, rater=None):
    """Episodes that share a cache; their rows count from `first`.

    `stream` names the randomness: a row's replies depend on (--seed, stream, row, turn, part) alone.
    `rater`: other weights that rate (--frozen-rater); what they say is not trained.
    """
    worlds = [envs.make(args.env, show_actions=args.show_actions) for _ in seeds]
    episodes = [Episode(split, seed) for seed in seeds]
    for world, episode in zip(worlds, episodes):
        observation, _ = world.reset(seed=episode.seed, options={"split": split})
        episode.said.append(["world", observation])
    prompts = [chat.dialogue(opening(world, args, guided)) for world in worlds]
    actors = common.Dialogues(model, chat, prompts)
    raters = common.Dialogues(rater, chat, prompts) if rater else actors

    def tell(texts):
        for dialogues in {actors, raters}:
            dialogues.extend(live, texts)

    def ask(part, speakers, limit, word):
        seeds = [common.row_seed(args.seed, *stream, first + i, turn, part) for i in live]
        replies = speakers.reply(live, max_new_tokens=limit, temperature=temperature,
                                 seeds=seeds, prefill=word if args.prefill else "")
        for i, text, complete in zip(live, replies.texts, replies.complete):
            episodes[i].said.append([part, text])
            episodes[i].cut[part] += not complete
            for listeners in (actors, raters):  # whoever has not heard it yet
                listeners.append(i, speakers.ids[i][len(listeners.ids[i]):])
        return replies.texts

    for turn in itertools.count():
        live = [i for i, e in enumerate(episodes) if not e.over and not e.truncated]
        rating = guided and turn > 0
        if turn:
            tell([to_rate(worlds[i].observation) if guided else worlds[i].observation for i in live])
        for i in live:  # a full context ends the episode; no turn is ever dropped
            room = FORCED + args.max_new_tokens + (args.rate_tokens if rating else 0)
            room += len(chat.turn(to_act(worlds[i].observation))) if rating else 0
            episodes[i].truncated = len(actors.ids[i]) + room > model.max_context
        live = [i for i in live if not episodes[i].truncated]
        if not live:
            break
        if rating:
            for i, reply in zip(live, ask("rate", raters, args.rate_tokens, "Reason:")):  # (1)
                episodes[i].labels.append(parse_rating(reply))
            tell([to_act(worlds[i].observation) for i in live])
        for i, reply in zip(live, ask("act", actors, args.max_new_tokens, "Action:")):  # (2)
            take_turn(worlds[i], episodes[i], reply)
    for i, episode in enumerate(episodes):
        worlds[i].close()
        episode.ids, episode.mask, episode.logprob = actors.sampled(i)
    return episodes


def take_turn(world, episode, reply):
    """One step of the world, written down in `episode`."""
    observation, _, terminated, truncated, info = world.step(common.aloud(reply))
    episode.said.append(["world", observation])
    episode.actions.append(info["action"])
    episode.valid.append(info["valid"])
    episode.won, episode.score = info["won"], info["score"]
    episode.over = terminated or truncated
    episode.wrong = bool(getattr(world, "wrong_object", False))


def sample_groups(model, chat, args, step, task, weight, **how):
    """The groups of one step, from task number `task` on -> (batch, all that was played).

    DAPO's dynamic sampling: groups without spread in R are replaced by others, --resample times;
    what is left of them fills the batch up in the end.
    """
    batch, played = [], []
    for attempt in range(1 + args.resample * (args.estimator == "dapo")):
        missing = (args.batch_size - len(batch)) // args.group_size
        first = args.seed * 1_000_000_007 + task + len(played) // args.group_size
        seeds = [first + i // args.group_size for i in range(missing * args.group_size)]
        fresh = rollout(model, chat, args, "train", seeds, temperature=args.temperature,
                        stream=("train", step, attempt), **how)
        played += fresh
        for start in range(0, len(fresh), args.group_size):
            group = fresh[start:start + args.group_size]
            last = args.estimator == "grpo" or attempt == args.resample
            if last or any(guided_advantages(args, group, weight)):
                batch += group
        if len(batch) == args.batch_size:
            break
    return batch, played


# ------------------------------------------------------------------------------ returns, advantages


def trust(args, share) -> float:
    """(4) lambda(u) when `share` of the run is done, in [0, 1), or an arm of the ablation.

    In a group whose R_env are all equal, (5) divides by the spread of the ratings alone: there they
    get full-size advantages whatever lambda > 0 or --reward-scale (metric groups_flat_env).
    """
    start, full, fade, end = args.trust_points
    if args.trust in ("zero", "immediate"):
        return float(args.trust == "immediate")
    if share < full:
        return max(0.0, (share - start) / (full - start))
    if share < fade or args.trust == "no-anneal":
        return 1.0
    return max(0.0, (end - share) / (end - fade))


def environment_return(args, episode) -> float:
    """R_env(tau)"""
    return args.reward_scale * episode.score - args.invalid_penalty * episode.valid.count(False)


def rating_return(args, episode) -> float:
    """sum_t g(z_t). Not divided by its length, as in the paper: long self-praise pays."""
    total = args.rating_reward * sum(label or 0 for label in episode.labels)
    return total / max(1, len(episode.labels)) if args.mean_rating else total


def total_return(args, episode, weight) -> float:
    """(3) R(tau; u) = R_env(tau) + lambda(u) sum_t g(z_t)"""
    return environment_return(args, episode) + weight * rating_return(args, episode)


def group_advantages(returns, group_size) -> list[float]:
    """A_i = (R_i - mean) / std over each group of consecutive episodes; 0 where all its R are equal."""
    advantages = []
    for start in range(0, len(returns), group_size):
        group = np.array(returns[start:start + group_size])
        spread = group.max() > group.min()  # not std > 0: rounding would make advantages of nothing
        scaled = (group - group.mean()) / (group.std(ddof=1) + 1e-6)
        advantages += scaled.tolist() if spread else [0.0] * len(group)
    return advantages


def without_spread(returns, group_size) -> int:
    """How many groups have no advantages, as all of their episodes got the same."""
    groups = [returns[i:i + group_size] for i in range(0, len(returns), group_size)]
    return sum(max(group) == min(group) for group in groups)


def guided_advantages(args, episodes, weight) -> list[float]:
    """(5) of the returns (3); with --flat-groups False, 0 in groups whose R_env are all equal."""
    size = args.group_size
    advantages = group_advantages([total_return(args, e, weight) for e in episodes], size)
    for start in range(0, len(episodes), size):
        rewards = [environment_return(args, e) for e in episodes[start:start + size]]
        if not args.flat_groups and max(rewards) == min(rewards):
            advantages[start:start + size] = [0.0] * size
    return advantages


# --------------------------------------------------------------------------------------------- loss


def sampled_logprobs(model, chat, episodes, temperature):
    """log pi of the sampled tokens, 0 at all others, and the mask of them: both [B, T - 1]."""
    ids = common.pad_rows([episode.ids for episode in episodes], chat.pad)  # [B, T]
    mask = common.pad_rows([episode.mask for episode in episodes], 0)  # [B, T]
    return common.token_logprobs(model, ids, mask, temperature), mask[:, 1:].to(model.device)


def micro_batches(episodes, rows, size) -> list[list[int]]:
    """The indices `rows` in batches of `size`; neighbours of one length need little padding."""
    rows = sorted(rows, key=lambda i: len(episodes[i].ids))
    return [rows[i:i + size] for i in range(0, len(rows), size)]


@torch.no_grad()
def old_logprobs(model, chat, args, episodes) -> list[torch.Tensor]:
    """`sampled_logprobs` by these weights, a [T_i - 1] per episode: a training forward, no decoding."""
    out = [None] * len(episodes)
    for rows in micro_batches(episodes, range(len(episodes)), args.micro_batch_size):
        some = [episodes[i] for i in rows]
        logprobs, _ = sampled_logprobs(model, chat, some, args.temperature)
        for i, row in zip(rows, logprobs):
            out[i] = row[:len(episodes[i].ids) - 1]
    return out


def token_weights(mask, count, tokens=None) -> torch.Tensor:
    """What a token counts in the loss, [B, T - 1]; the divisors are those of the whole gradient step.

    GRPO: the mean over `count` trajectories of the mean over their tokens. DAPO: the mean over
    `tokens`.
    """
    if tokens is not None:
        return mask / tokens
    return mask / (count * mask.sum(1, keepdim=True).clamp(min=1))


def surrogate(logprobs, old, advantages, low, high) -> torch.Tensor:
    """- min(rho A, clip(rho, 1 - low, 1 + high) A) per token, rho = exp(logprobs - old); A [B, 1]."""
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def kl_estimate(logprobs, reference) -> torch.Tensor:
    """KL(pi || reference) per token, of low variance: e^d - d - 1 with d = log reference - log pi."""
    d = reference - logprobs
    return d.exp() - d - 1


def update(model, reference, chat, args, optimizer, episodes, advantages, clip, token_mean=False):
    """--updates gradient steps, each on its share of the groups -> metrics per sampled token.

    `clip`: (low, high). With one step the ratio is 1, and the old log-probs are those of its forward.
    """
    old = old_logprobs(model, chat, args, episodes) if args.updates > 1 else None
    ref = old_logprobs(reference, chat, args, episodes) if args.kl else None
    sums, norms, share = Counter(), [], len(episodes) // args.updates
    for start in range(0, len(episodes), share):
        part, step_loss = range(start, start + share), 0.0
        tokens = max(1, sum(sum(episodes[i].mask) for i in part))
        for rows in micro_batches(episodes, part, args.micro_batch_size):
            some = [episodes[i] for i in rows]
            logprobs, mask = sampled_logprobs(model, chat, some, args.temperature)  # [B, T - 1]
            before = padded(old, rows) if old else logprobs.detach()
            scale = torch.tensor([advantages[i] for i in rows], device=mask.device)[:, None]
            loss = surrogate(logprobs, before, scale, *clip)
            if args.kl:
                kl = kl_estimate(logprobs, padded(ref, rows))  # 0 where the mask is 0
                loss = loss + args.kl * kl
                sums["kl"] += kl.sum().item()
            loss = (loss * token_weights(mask, share, tokens if token_mean else None)).sum()
            loss.backward()
            step_loss += loss.item()
            ratio = (logprobs.detach() - before).exp()
            sums["clipped"] += ((ratio < 1 - clip[0]) | (ratio > 1 + clip[1])).sum().item()
            sums["entropy"] -= before.sum().item()  # an estimate, from what was sampled
            sums["logprob_gap"] += sum(e.logprob for e in some) - before.sum().item()  # of decoding
        sums["tokens"] += tokens
        batch = [(episodes[i].ids, episodes[i].mask, advantages[i]) for i in part]
        norms.append(common.gradient_step(model, optimizer, step_loss, batch))
        sums["loss"] += step_loss * tokens
    tokens = sums.pop("tokens")
    return {name: value / tokens for name, value in sums.items()} | {"grad_norm": max(norms)}


def padded(store, rows) -> torch.Tensor:
    """Some of `old_logprobs`, [B, T - 1]."""
    return torch.nn.utils.rnn.pad_sequence([store[i] for i in rows], batch_first=True)


# --------------------------------------------------------------------------------------- evaluation


def watch(episodes) -> dict:
    """What can be counted over episodes: outcome, validity, error patterns, cuts, labels."""
    turns = sum(len(episode.valid) for episode in episodes)
    ratings = sum(len(episode.labels) for episode in episodes)
    lost = [episode for episode in episodes if not episode.won]
    found = {"success": common.mean(episode.won for episode in episodes),
             "score": common.mean(episode.score for episode in episodes),
             "turns": turns / len(episodes),
             "invalid": sum(episode.valid.count(False) for episode in episodes) / max(1, turns),
             "truncated": common.mean(episode.truncated for episode in episodes),
             "cut_act": sum(episode.cut["act"] for episode in episodes) / max(1, turns)}
    for pattern in ("looping", "redundant_exploration", "wrong_object"):
        share = common.mean(pattern in errors(episode) for episode in lost)
        found[f"lost_by_{pattern}"] = share if lost else None
    if ratings:
        found["unrated_steps"] = turns - ratings  # the last of each episode
        found["cut_rate"] = sum(episode.cut["rate"] for episode in episodes) / ratings
        found |= watch_labels([episode for episode in episodes if episode.labels])
    return found


def watch_labels(episodes) -> dict:
    """The shares of the labels, and how they go with the outcome."""
    labels = [label for episode in episodes for label in episode.labels]
    found = {f"label_{name}": labels.count(i - 1) / len(labels) for i, name in enumerate(LABELS)}
    found["label_malformed"] = labels.count(None) / len(labels)
    sums = [sum(label or 0 for label in episode.labels) for episode in episodes]
    means = [total / len(episode.labels) for total, episode in zip(sums, episodes)]
    won = [episode.won for episode in episodes]
    for name, side in ("won", True), ("lost", False):
        some = [total for total, w in zip(sums, won) if w == side]
        found[f"ratings_if_{name}"] = common.mean(some) if some else None
    varied = len(set(means)) > 1 and len(set(won)) > 1
    found["label_outcome_correlation"] = float(np.corrcoef(means, won)[0, 1]) if varied else None
    return found


def errors(episode) -> list[str]:
    """The error patterns of the paper's appendix B that an episode shows; how to tell them is ours.

    looping: one action three times on one observation; redundant exploration: three observations met
    again after a valid action; wrong object: what the world says. Turns left do not count.
    """
    seen = [re.sub(r"\d+ turns? left", "", text) for who, text in episode.said if who == "world"]
    done = Counter(zip(seen, episode.actions))
    again = [text for text, ok in zip(seen[1:], episode.valid) if ok]
    found = ["looping"] * (max(done.values(), default=0) > 2)
    found += ["redundant_exploration"] * (len(again) - len(set(again)) > 2)
    return found + ["wrong_object"] * episode.wrong


def evaluate(model, chat, args, splits, count, guided, rater=None):
    """The policy on `count` fixed episodes of each split -> ({split: metrics}, an episode of the first)."""
    found, first = {}, None
    for split in splits:
        played = rollout(model, chat, args, split, range(count), guided=guided, rater=rater,
                         temperature=args.eval_temperature, stream=("evaluate",))
        _, se = common.mean_se([float(episode.won) for episode in played])
        found[split] = watch(played) | {"se": se, "n": count}
        first = first or record(played[0])
        tqdm.write(common.result_line(split, found[split]))
    return found, first


def record(episode) -> dict:
    """An episode as rollouts.jsonl keeps it: words, not ids."""
    fields = dataclasses.asdict(episode)
    return {name: value for name, value in fields.items() if name not in ("ids", "mask")}


# --------------------------------------------------------------------------------------------- main

LIMITS = {"act": "--max-new-tokens", "rate": "--rate-tokens"}
AT_LEAST = {"updates": 1, "rate_tokens": 1, "examples": 1, "group_size": 2, "clip": 0, "clip_high": 0,
            "kl": 0, "resample": 0, "invalid_penalty": 0}


def check_args(args) -> envs.World:
    """Everything that can be refused before a model is loaded."""
    common.check_common(args)
    common.check_at_least(args, AT_LEAST)
    common.check_multiple(args, "batch_size", "group_size", "updates")
    points = [0.0, *args.trust_points, 1.0]
    common.check(len(points) == 6 and points == sorted(points) and len(set(args.trust_points)) == 4,
                 f"--trust-points must be four growing shares of --steps, not {args.trust_points}")
    common.check(args.reward_scale > 0, f"--reward-scale must be above 0, not {args.reward_scale}")
    common.check(0 <= args.dose <= 1, f"--dose must be between 0 and 1, not {args.dose}")
    for name, default in ("trust", "schedule"), ("frozen_rater", False):
        common.check(args.guide == "on" or getattr(args, name) == default,
                     f"--{name.replace('_', '-')} belongs to --guide on")
    try:
        world = envs.make(args.env, show_actions=args.show_actions)
    except ValueError as error:
        common.refuse(error)
    common.check(not args.dose or common.is_tiny(args.model), "--dose is of a tiny model's warm-up")
    common.check(not args.dose or hasattr(world, "possibilities"),
                 f"--dose: --env {args.env} cannot say what a step was worth")
    return world


def check_room(chat, model, messages, room):
    """Refuses a first prompt that leaves no room for `room` more tokens."""
    length = len(chat.dialogue(messages))
    common.check(length + room <= model.max_context,
                 f"the first prompt has {length} tokens, replies may have {room}: "
                 f"beyond the context of {model.max_context}")


def main():
    """The loop of the docstring."""
    args = common.parse_args(Args, TINY)
    args = dataclasses.replace(args, **QUICK) if args.quick else args
    world = check_args(args)
    training, ending = args.guide == "on", args.guide != "off"  # guidance while, and after
    scheduled = training and args.trust in ("schedule", "no-anneal")  # lambda is of shares of --steps
    run = common.Run("self_guide", args, fixed=("steps",) if scheduled else ())
    model, chat = load(world, args)
    world.reset(seed=0)
    room = FORCED + args.max_new_tokens + (args.rate_tokens if ending else 0)
    check_room(chat, model, opening(world, args, ending), room)
    splits = [split for split in ("test", "ood") if split in world.splits]
    if args.eval_only:
        return evaluate(model, chat, args, splits, args.eval_episodes, ending)
    run.start(model=model)
    print(f"{args.batch_size // args.group_size} groups of {args.group_size} episodes a step, "
          f"{args.updates} gradient steps")

    started = args.guide != "inference" and (args.kl or args.frozen_rater)
    reference = copy.deepcopy(model) if started else None  # the policy as it began
    rater = reference if args.frozen_rater else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0)
    state = run.resume(model=model, optimizer=optimizer)
    if not state:
        before, episode = evaluate(model, chat, args, splits, args.eval_episodes, training)
        state = {"step": 0, "task": 0, "before": before, "episode": episode}
    steps = 0 if args.guide == "inference" else args.steps
    clip = (args.clip, args.clip_high if args.estimator == "dapo" else args.clip)
    for step in run.steps(state["step"], steps):
        weight = trust(args, (step - 1) / args.steps) if training else 0.0
        batch, played = sample_groups(model, chat, args, step, state["task"], weight,
                                      guided=training, rater=rater)
        state["task"] += len(played) // args.group_size
        run.lap("rollout")
        common.set_rate(optimizer, args.lr * min(1, step / 5))
        advantages = guided_advantages(args, batch, weight)
        losses = update(model, reference, chat, args, optimizer, batch, advantages, clip,
                        token_mean=args.estimator == "dapo")
        run.lap("update")

        returns = [total_return(args, e, weight) for e in batch]
        environment = [environment_return(args, e) for e in batch]
        metrics = watch(played) | losses | {
            "trust": weight, "return": common.mean(returns), "reward_env": common.mean(environment),
            "reward_guide": common.mean(rating_return(args, e) for e in batch),
            "groups_replaced": (len(played) - len(batch)) // args.group_size,
            "groups_flat": without_spread(returns, args.group_size),
            "groups_flat_env": without_spread(environment, args.group_size)}
        if step % args.eval_every == 0 and step < steps:
            fewer = max(1, args.eval_episodes // 5)
            numbers, _ = evaluate(model, chat, args, ["test"], fewer, training, rater)
            metrics |= {f"eval_{name}": value for name, value in numbers["test"].items()}
        run.count(episodes=len(played), env_steps=sum(len(e.valid) for e in played),
                  tokens=sum(sum(e.mask) for e in played), gradient_steps=args.updates)
        run.log(metrics, LIMITS)
        run.write_rollouts([{"step": step, **record(e)} for e in played])
        state["step"] = step
        run.save_if_due(state, model=model, optimizer=optimizer)

    after, last = evaluate(model, chat, args, splits, args.eval_episodes, ending, rater)
    arm = {"off": args.estimator, "inference": "inference"}.get(args.guide, args.trust)
    ends = envs.ends(args.env, args.eval_episodes)
    run.complete(model, chat, "self-guide", arm, state["before"], after, ends)
    print(f"\nbefore\n{common.show(state['episode'])}\n\nafter\n{common.show(last)}")


# ---------------------------------------------------------------------------- only for --model tiny
# What a model made from nothing is taught before it learns by itself, and the defaults that suit it.

TINY = dict(
    lr=5e-4, batch_size=128, micro_batch_size=16, rollout_batch_size=256, max_new_tokens=16, rate_tokens=16, eval_episodes=500,
    device="cpu", updates=4, kl=0.03, reward_scale=10.0)
QUICK = dict(
    steps=4, batch_size=16, group_size=4, updates=2, eval_episodes=16, eval_every=2, save_every=2, examples=600)
HINTS = 3  # acts after a label that are practised apart, of each episode
READ = "Repeat the task, and what the last action brought."  # practises reading


def load(world, args):
    """The model that rates and acts, and its chat; a tiny one is made from `warmup`."""
    if common.is_tiny(args.model) and args.device == "cpu":
        torch.set_num_threads(min(2, torch.get_num_threads()))  # small tensors: more threads only wait for each other
    constants = [f"{world.system}\n{POLICY}", f"{world.system}\n{POLICY}\n{GUIDED}", RATE, ACT, READ, "Action: ", "Reason: ",
                 "\nLabel: ", *common.CHANGES_OF_SPEAKER]
    return common.load(args.model, corpus=lambda: warmup(world, args), constants=constants, device=args.device, dtype=args.dtype,
                       thinking=args.thinking, max_context=args.max_context)


def warmup(world, args):
    """The world's language, the form of a rating, and with --dose what a label means and how to take it.

    Episodes come from a random player on the train split, unfiltered, and the policy imitates it. In
    half of them it rates its steps as well, and tries something impossible once in a while: the
    reason is the end of what was observed last, the label is negative where nothing happened and
    random everywhere else. After a negative label the action is a possible one.
    With probability --dose, a label says how a random player's chance to win has moved (`Prospects`),
    and the player takes the hint: it undoes its step after a negative label, and does not after a
    positive one; these acts are practised apart as well. No part sees an expert.
    """
    rng, examples, said = random.Random("warm-up"), [], []
    args = dataclasses.replace(args, shots=0)
    for seed in range(args.examples):
        observation, info = world.reset(seed=seed, options={"split": "train"})
        guided, over, label, hints = seed % 2 == 1, False, "positive", []
        prospects = Prospects(world) if guided and args.dose else None
        messages = opening(world, args, guided)
        each = 4 if guided else 2  # messages per turn, but for the first, which has no rating
        while not over:
            possible = info["admissible"] or [""]  # as a random player, where a world has no list
            said = (said + possible)[-1000:]
            impossible = guided and label != "negative" and rng.random() < 0.03
            actions = said if impossible else rng.choice(by_verb(possible))
            if prospects and world.turns and rng.random() < args.dose:
                actions = prospects.advised(world, label, info["admissible"]) or actions
                hints.append((list(messages), written(rng.choice(actions))))
            action = rng.choice(actions)
            messages.append({"role": "assistant", "content": written(action)})
            if prospects:
                prospects.before(world)
            observation, _, terminated, truncated, info = world.step(action)
            over = terminated or truncated
            messages.append({"role": "user", "content": to_rate(observation) if guided else observation})
            if guided and not over:
                label = rng.choice(LABELS) if info["valid"] else "negative"
                if prospects and rng.random() < args.dose:
                    label = prospects.label(world, info["valid"])
                reason = " ".join(event(observation).split()[-3:])
                messages.append({"role": "assistant", "content": f"Reason: {reason}\nLabel: {label}"})
                messages.append({"role": "user", "content": to_act(observation)})
        examples += rng.sample(hints, min(HINTS, len(hints)))
        messages = messages[:4 + each * rng.randint(0, (len(messages) - 4) // each)]
        last = messages.pop()["content"].removesuffix(f"\n{RATE}")
        messages += [{"role": "user", "content": f"{last}\n{READ}"},
                     {"role": "assistant", "content": f"{world.task}\n{event(last)}"}]
        examples.append(messages)
    rng.shuffle(examples)
    return examples


class Prospects:
    """How likely a random player (who draws the verb first) is to win, exactly: by dynamic programming.

    Works in worlds with `snapshot`, `restore` and `possibilities`. What was never seen is averaged
    over, so nothing hidden decides a label.
    """

    def __init__(self, world):
        self.world, self.moves, self.known = copy.deepcopy(world), {}, {}

    def chance(self, state, turns) -> float:
        """To win from a snapshot within so many turns."""
        if not turns:
            return 0.0
        if (state, turns) not in self.known:
            total = 0.0
            for share, won, after in self.moves_from(state):
                total += share * (1.0 if won else self.chance(after, turns - 1))
            self.known[state, turns] = total
        return self.known[state, turns]

    def moves_from(self, state) -> list[tuple]:
        """(probability, won, next snapshot) of each action."""
        if state not in self.moves:
            self.world.restore(state)
            verbs, self.moves[state] = by_verb(self.world.admissible()), []
            for actions in verbs:
                for action in actions:
                    share = 1 / len(verbs) / len(actions)
                    self.moves[state].append((share, *self.result(state, action)))
        return self.moves[state]

    def result(self, state, action) -> tuple:
        """(won, next snapshot)"""
        self.world.restore(state)
        self.world.act(action)
        return self.world.won, self.world.snapshot()

    def of(self, world) -> float:
        """Averaged over what was never seen, with the turns that are left."""
        left = world.max_turns - world.turns
        return common.mean(self.chance(state, left) for state in world.possibilities())

    def before(self, world):
        """Remembers the state that the next step starts from."""
        self.state, self.value = world.snapshot(), self.of(world)

    def label(self, world, valid) -> str:
        """Of the step from `before` to now: the logarithm of the chance moved by more than 0.15."""
        moved = math.log((self.of(world) + 0.003) / (self.value + 0.003))
        if not valid or moved < -0.15:
            return "negative"
        return "positive" if moved > 0.15 else "neutral"

    def advised(self, world, label, actions) -> list[str]:
        """Of the possible actions those that take the hint: undo a negative step, keep a positive one."""
        now = world.snapshot()
        undo = [action for action in actions if self.result(now, action)[1] == self.state != now]
        if label == "negative":
            return undo
        return [action for action in actions if action not in undo] if label == "positive" else []


def by_verb(actions):
    """Lists of actions that share their first word. Drawn first among these, rare kinds of action are practised too."""
    verbs = {}
    for action in actions:
        verbs.setdefault(action.partition(" ")[0], []).append(action)
    return list(verbs.values())


if __name__ == "__main__":
    main()
