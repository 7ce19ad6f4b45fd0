"""Self-Guide (Wang et al., arXiv 2604.03098): an agent's ratings of its own steps guide and pay it.

One language model rates and acts. h_t is the history, u the share of the run that is done:

    rate       z_t ~ pi(. | h_{t-1}, o_t)       a reason and a label for the step just taken     (1)
    act        a_t ~ pi(. | h_{t-1}, o_t, z_t)  with the rating in view; the actor may think     (2)
    return     R(tau; u) = R_env(tau) + lambda(u) sum_t g(z_t),  g: +0.1, 0, -0.1 by label       (3)
    trust      lambda(u) = 0 until 40% of the run (ratings steer and earn nothing), up to 1 at
               50%, 1 until 70%, down to 0 at 80%, as this shaping is not potential-based        (4)
    advantage  A_i = (R_i - mean R) / std R, within a group of episodes of one task              (5)
    surrogate  min(rho A, clip(rho) A) over the tokens of ratings *and* of actions               (6)

The equation numbers are this file's. R_env is the world's score, 0 or 1 in most worlds.
Arms, one run each: --guide off is plain GRPO; --guide inference trains nothing and compares the
start policy without and with its ratings; --trust zero lets ratings steer but never earn.

Departures from the paper, and why:
 1. Rating and acting are turns of one growing dialogue; the paper gives each call a prompt of its
    own over the history, earlier ratings included. So a rollout encodes every token once, the model
    sees its earlier thoughts too, and labels are explained once. A full context ends the episode,
    with the score it has by then.
 2. What is possible now is not listed (lists would pile up in a dialogue); --show-actions does it,
    as the paper's prompts for ALFWorld and WebShop do (its SciWorld prompt does not).
 3. A rating without a label counts as neutral (the paper does not say), and is counted.
 4. A label is of the step just taken, as in the prompt of the paper's figure 7, so that their sum
    adds up steps: the first turn has no step to rate, and the last step is never rated.
 5. Turn limits are the worlds' own (household 12, household-full 30; paper: 50, 30 and 15).
The paper leaves open: group size, learning rate and KL weight of its GRPO runs (here: those of its
DAPO runs); AdamW's betas, warm-up, no weight decay and gradient clipping (at 1); how the loss is
averaged over tokens; the scale of R_env (1 as written; a public script and TINY have 10); which std
(the sample's); gradient steps per batch; whether DAPO's sampling looks at R or at R_env (here: R,
so where ratings earn few groups are replaced).
Plain GRPO at equal tokens is --guide off with more --steps: metrics.jsonl counts `tokens`.

    python self_guide.py                                   # household, tiny: .06 -> .58, minutes
    python self_guide.py --guide off --out-dir runs/grpo   # an arm wants its own directory
    python self_guide.py --model smollm2 --shots 2 --prefill --show-actions --guide inference \\
        --eval-episodes 20 --max-new-tokens 24 --rate-tokens 48  # a chat model on a laptop
    python self_guide.py --model Qwen/Qwen3-1.7B --env household-full
"""

import dataclasses
import functools
import itertools
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
    steps: int = flag(100, "passes of the loop: a batch of episodes, an update (paper)")
    lr: float = flag(1e-6, "AdamW's rate (paper, for DAPO), constant after 5 steps")
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
    group_size: int = flag(8, "episodes of one task (paper, for DAPO)")
    updates: int = flag(1, "gradient steps per step, each on its share of the groups; with 1 no ratio is clipped (not in the paper)")
    estimator: str = flag("grpo", "dapo: asymmetric clip, token-mean loss and dynamic sampling, as DAPO has them (paper: both)",
                          choices=["grpo", "dapo"])
    clip: float = flag(0.2, "rho counts as at least 1 - clip, with grpo as at most 1 + clip (paper, for DAPO)")
    clip_high: float = flag(0.28, "with dapo rho counts as at most 1 + clip_high (paper)")
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
    # a tiny model
    dose: float = flag(0.0, "share of a tiny model's warm-up that rates rightly and takes the hint (not in the paper)")
    examples: int = flag(10000, "episodes that make a tiny model")


# ------------------------------------------------------------------------------------------ prompts
# Labels, their meanings and the two lines of a rating are the paper's; the wording is ours. A
# world's own system prompt comes first: it states the game, these state the form of a reply.

POLICY = "Think first if it helps. Then write Action: and your next action, on a line of its own."
GUIDED = (
    "You also rate your own steps. When you are asked to rate, judge the step you have just "
    "taken in the light\nof the whole episode so far. Reply with two lines. Reason: one sentence. "
    "Label: positive, neutral or negative.\n"
    "Positive: the step moved closer to the goal, or found what will be of use. Neutral: neither.\n"
    "Negative: it was wasted, a step back, a contradiction, or you are stuck.\n"
    "Your rating is a hint for your next action: go on after a positive one, try something else "
    "after a negative one.")
RATE = "Rate your last step. Reason: one sentence. Label: positive, neutral or negative."
ACT = "Now your next action."
LABELS = ["negative", "neutral", "positive"]
FORCED = 16  # tokens that a turn may add unsampled: --prefill's words, ends of cut replies


def written(action):
    """An action as the policy writes it."""
    return f"Action: {action}"


def parse_rating(reply) -> int | None:
    """A rating's label as -1, 0 or 1: the last `Label:` counts; None where there is none."""
    label = common.chosen(common.aloud(reply), "Label", LABELS)
    return None if label is None else label - 1


def to_rate(observation):
    """The user turn that asks for a rating."""
    return f"{envs.bare(observation)}\n{RATE}"


def to_act(observation):
    """The user turn that asks for an action after a rating; what is possible stands here."""
    return ACT + observation.removeprefix(envs.bare(observation))


def opening(world, args, guided):
    """The messages that a dialogue starts with; the first turn has no step to rate."""
    system = "\n".join([world.system, POLICY] + [GUIDED] * guided)
    shots = worked_examples(args.env, args.shots, args.show_actions, guided)
    first = {"role": "user", "content": world.observation}
    return [{"role": "system", "content": system}, *shots, first]


# ------------------------------------------------------------------------------------------ rollout


@dataclass
class Episode:
    """One trajectory. `ids` and `mask` (1: sampled by the policy) are for the loss."""

    split: str
    seed: int
    said: list = field(default_factory=list)  # [who, text]: world, act or rate
    actions: list[str] = field(default_factory=list)  # as the world read them
    labels: list[int | None] = field(default_factory=list)  # of all steps but the last
    valid: list[bool] = field(default_factory=list)
    cut: dict = field(default_factory=lambda: {"act": 0, "rate": 0})  # replies cut by the limit
    won: bool = False
    score: float = 0.0
    over: bool = False
    truncated: bool = False  # the context was full
    wrong: bool = False  # the world's word on a wrong object, where it has one
    tokens: int = 0  # sampled, by whatever weights
    earned: float = 0.0  # R (3), as far as it counted
    advantage: float = 0.0
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprob: float = 0.0  # of all tokens under the mask, in decoding


def rollout(model, chat, args, split, seeds, **how) -> list[Episode]:
    """Plays an episode per seed, --rollout-batch-size at once; `how`: see `side_by_side`."""
    episodes, size = [], args.rollout_batch_size
    for first in range(0, len(seeds), size):
        some = seeds[first:first + size]
        episodes += side_by_side(model, chat, args, split, some, first, **how)
    return episodes


def side_by_side(
        model, chat, args, split, seeds, first, *, guided, temperature, stream, rater=None):
    """Episodes that share a cache; their rows count from `first`.

    `stream` names the randomness: a reply depends on (--seed, stream, row, turn, part) alone.
    `rater`: other weights that rate (--frozen-rater); what they say is not trained.
    """
    worlds, episodes, prompts = [], [], []
    for seed in seeds:
        world = envs.make(args.env, show_actions=args.show_actions)
        observation, _ = world.reset(seed=seed, options={"split": split})
        worlds.append(world)
        episodes.append(Episode(split, seed, said=[["world", observation]]))
        prompts.append(chat.dialogue(opening(world, args, guided)))
    actors = common.Dialogues(model, chat, prompts)
    raters = actors.read_by(rater) if rater else actors  # the same dialogues, other weights
    limits = {"rate": args.rate_tokens, "act": args.max_new_tokens}

    def ask(part, dialogues, rows, turn, word):
        """A reply of each row, which --prefill begins with `word` -> (row, reply) pairs."""
        row_seeds = [common.row_seed(args.seed, *stream, first + row, turn, part) for row in rows]
        replies = dialogues.reply(
            rows, max_new_tokens=limits[part], temperature=temperature, seeds=row_seeds,
            prefill=word if args.prefill else "")
        for row, ids, text, complete in zip(rows, replies.ids, replies.texts, replies.complete):
            episodes[row].said.append([part, text])
            episodes[row].tokens += len(ids)
            episodes[row].cut[part] += not complete
        return zip(rows, replies.texts)

    for turn in itertools.count():
        rating = guided and turn > 0  # the first turn has no step to rate
        live = [row for row, episode in enumerate(episodes) if not episode.over]
        if turn:
            seen = [worlds[row].observation for row in live]
            actors.extend(live, [to_rate(text) for text in seen] if guided else seen)
        for row in live:
            needed = FORCED + args.max_new_tokens
            if rating:
                needed += args.rate_tokens + len(chat.turn(to_act(worlds[row].observation)))
            if len(actors.ids[row]) + needed > model.max_context:  # it ends; no turn is dropped
                episodes[row].truncated = episodes[row].over = True
        live = [row for row in live if not episodes[row].over]
        if not live:
            break
        if rating:
            for row, reply in ask("rate", raters, live, turn, "Reason:"):  # (1)
                episodes[row].labels.append(parse_rating(reply))
            actors.extend(live, [to_act(worlds[row].observation) for row in live])
        for row, reply in ask("act", actors, live, turn, "Action:"):  # (2)
            take_turn(worlds[row], episodes[row], reply)
    for row, episode in enumerate(episodes):
        worlds[row].close()
        episode.ids, episode.mask, episode.logprob = actors.sampled(row)
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


def sample_groups(model, chat, args, step, task, trust, **how):
    """The groups of one step, from task number `task` on -> (batch, all that was played).

    DAPO's dynamic sampling: groups without advantages are replaced by others, --resample times;
    what is left of them fills the batch up in the end. Writes `Episode.advantage`.
    """
    kept, played = [], []
    first = args.seed * common.SEEDS_APART + task
    last = args.resample if args.estimator == "dapo" else 0
    for attempt in range(last + 1):
        start = len(played)
        missing = args.batch_size - args.group_size * len(kept)
        seeds = [first + i // args.group_size for i in range(start, start + missing)]
        played += rollout(
            model, chat, args, "train", seeds, temperature=args.temperature,
            stream=("train", step, attempt), **how)
        for group in groups(played[start:], args.group_size):
            guided_advantages(args, group, trust)
            if attempt == last or any(episode.advantage for episode in group):
                kept.append(group)
        if args.group_size * len(kept) == args.batch_size:
            break
    if last:  # else the last of --updates gets all groups that have no advantages
        random.Random(step).shuffle(kept)
    return list(itertools.chain(*kept)), played


# ------------------------------------------------------------------------------ returns, advantages

TRUST = {  # lambda at the four --trust-points: a line between them, level before and after
    "schedule": [0, 1, 1, 0],
    "zero": [0, 0, 0, 0],  # this and the next: the paper's ablations
    "immediate": [1, 1, 1, 1],
    "no-anneal": [0, 1, 1, 1],
}


def trust_schedule(args, share):
    """(4) lambda(u); u = (step - 1) / steps, the share of the run that is over as a step begins."""
    return float(np.interp(share, args.trust_points, TRUST[args.trust]))


def environment_return(args, episode):
    """R_env(tau)"""
    return args.reward_scale * episode.score - args.invalid_penalty * episode.valid.count(False)


def rating_return(args, episode):
    """sum_t g(z_t): a sum, as in the paper, so that long self-praise pays; or --mean-rating."""
    total = sum(label or 0 for label in episode.labels)  # departure 3: None counts as 0
    if args.mean_rating:
        total /= max(1, len(episode.labels))
    return args.rating_reward * total


def total_return(args, episode, trust):
    """(3) R(tau; u) = R_env(tau) + lambda(u) sum_t g(z_t)"""
    return environment_return(args, episode) + trust * rating_return(args, episode)


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


def guided_advantages(args, group, trust):
    """Writes the advantages (5) of the returns (3) into the episodes of one group.

    Where all R_env of a group are equal, (5) divides by the spread of the ratings alone: they get
    full-size advantages, however small lambda > 0 is (metric groups_flat_env). With --flat-groups
    False they earn nothing there.
    """
    environment = [environment_return(args, episode) for episode in group]
    if not args.flat_groups and max(environment) == min(environment):
        trust = 0.0
    returns = [total_return(args, episode, trust) for episode in group]
    for episode, earned, advantage in zip(group, returns, group_advantages(returns)):
        episode.earned, episode.advantage = earned, advantage


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


def token_weights(mask, count, tokens=None):
    """What a token counts in the loss, [B, T - 1]; divisors are those of the whole gradient step.

    GRPO: the mean over `count` trajectories of the mean over their tokens. DAPO: the mean over
    `tokens`.
    """
    if tokens is not None:
        return mask / tokens
    return mask / (count * mask.sum(1, keepdim=True).clamp(min=1))


def surrogate(logprobs, old, advantages, low, high):
    """(6) - min(rho A, clip(rho, 1 - low, 1 + high) A) per token, rho = pi / pi_old; A [B, 1]."""
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def kl_estimate(logprobs, reference):
    """KL(pi || reference) per token, low in variance: e^d - d - 1, d = log reference - log pi."""
    d = reference - logprobs
    return d.exp() - d - 1


def update(model, reference, chat, args, optimizer, episodes, clip, token_mean=False):
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
            loss = (loss * token_weights(mask, len(share), tokens if token_mean else None)).sum()
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


# --------------------------------------------------------------------------------------- evaluation


def evaluate(model, chat, args, splits, count, guided, rater=None):
    """`count` fixed episodes of each split -> ({split: metrics}, an episode of the last)."""
    found = {}
    for split in splits:
        played = rollout(
            model, chat, args, split, range(count), guided=guided, rater=rater,
            temperature=args.eval_temperature, stream=("evaluate",))
        found[split] = watch(played) | {"n": count}
        common.warn_cut(found[split], LIMITS)
        tqdm.write(common.result_line(split, found[split]))
    return found, record(played[0])


def record(episode):
    """An episode as rollouts.jsonl keeps it: words, not ids."""
    return {name: value for name, value in vars(episode).items() if name not in ("ids", "mask")}


# --------------------------------------------------------------------------------------------- main


def main():
    """The loop of the docstring."""
    args = common.parse_args(Args, TINY, quick=QUICK)
    world = check_args(args)
    guided = args.guide == "on"
    guided_after = args.guide != "off"  # in the last evaluation
    scheduled = guided and args.trust in ("schedule", "no-anneal")  # lambda is of shares of --steps
    run = common.Run("self_guide", args, fixed=("steps",) if scheduled else ())
    model, chat = load(world, args)
    splits = [split for split in ("test", "ood") if split in world.splits]
    if args.eval_only:
        for with_ratings in sorted({guided, guided_after}):  # inference compares both
            print("with ratings:" if with_ratings else "without ratings:")
            evaluate(model, chat, args, splits, args.eval_episodes, with_ratings)
        return
    run.start(model=model)

    steps = 0 if args.guide == "inference" else args.steps
    needed = steps and (args.kl or args.frozen_rater)
    reference = common.frozen_copy(model) if needed else None  # before resuming: the start policy
    rater = reference if args.frozen_rater else None
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0,
        fused=True)  # no copies of the weights in the step
    progress = run.resume(model=model, optimizer=optimizer)
    if not progress:
        before, episode = evaluate(model, chat, args, splits, args.eval_episodes, guided)
        progress = {"step": 0, "task": 0, "before": before, "episode": episode}
    dapo = args.estimator == "dapo"
    clip = (args.clip, args.clip_high if dapo else args.clip)
    for step in run.steps(progress["step"], steps):
        trust = trust_schedule(args, (step - 1) / steps) if guided else 0.0  # (4)
        batch, played = sample_groups(
            model, chat, args, step, progress["task"], trust,
            guided=guided, rater=rater)  # (1), (2), and within each group (3), (5)
        run.lap("rollout")
        common.set_rate(optimizer, args.lr * min(1, step / 5))
        losses = update(model, reference, chat, args, optimizer, batch, clip, dapo)  # (6)
        run.lap("update")

        next_task = progress["task"] + len(played) // args.group_size
        progress |= {"step": step, "task": next_task}
        metrics = watch(played) | watch_rewards(args, batch, trust) | losses
        metrics["groups_replaced"] = (len(played) - len(batch)) // args.group_size
        if step % args.eval_every == 0 and step < steps:
            count = max(1, args.eval_episodes // 5)
            numbers, _ = evaluate(model, chat, args, ["test"], count, guided, rater)
            metrics |= {f"eval_{name}": value for name, value in numbers["test"].items()}
        end_step(run, args, metrics, played)
        run.save_if_due(progress, model=model, optimizer=optimizer)

    after, last = evaluate(model, chat, args, splits, args.eval_episodes, guided_after, rater)
    ends = envs.ends(args.env, args.eval_episodes)
    run.complete(
        model, chat, "self-guide", arm_of(args), progress["before"], after, ends,
        shown=[progress["episode"], last])


# ---------------------------------------- beside the paper, and at the end only for --model tiny
# What is refused and logged, worked examples.

LIMITS = {"act": "--max-new-tokens", "rate": "--rate-tokens"}
AT_LEAST = {
    "updates": 1, "rate_tokens": 1, "examples": 1, "group_size": 2,
    "clip": 0, "clip_high": 0, "kl": 0, "resample": 0, "invalid_penalty": 0}


def check_args(args) -> envs.World:
    """Everything that can be refused before a model is loaded."""
    common.check_common(args)
    common.check_at_least(args, AT_LEAST)
    common.check_multiple(args, "batch_size", "group_size", "updates")
    points = args.trust_points
    common.check(len(points) == 4 and 0 <= points[0] < points[1] < points[2] < points[3] <= 1,
                 f"--trust-points must be four growing shares of --steps, not {points}")
    common.check(args.reward_scale > 0, f"--reward-scale must be above 0, not {args.reward_scale}")
    for name, value in {"trust": "schedule", **DEPARTURES}.items():
        common.check(args.guide == "on" or getattr(args, name) == value,
                     f"--{name.replace('_', '-')} belongs to --guide on")
    common.check(not (args.frozen_rater and args.eval_only),
                 "--frozen-rater: --eval-only knows no weights but those of --model")
    world = common.checked(envs.make, args.env, show_actions=args.show_actions)
    listed = world.reset(seed=0)[1]["admissible"]
    common.check(listed or not args.shots, f"--shots: nothing to play at random in {args.env}")
    return world


def check_room(args, chat, model, messages, room):
    """Refuses a first prompt without room for `room` more tokens, and words before a thought."""
    length = len(chat.dialogue(messages))
    common.check(length + room <= model.max_context,
                 f"the first prompt has {length} tokens, replies may have {room}: "
                 f"beyond the context of {model.max_context}")
    common.check(not args.prefill or not chat.opened,
                 "--prefill: the chat template of this model opens a thought before each reply")


def watch_rewards(args, batch, trust):
    """Both parts of (3), and how many groups have no advantages by each."""
    returns = [episode.earned for episode in batch]
    environment = [environment_return(args, episode) for episode in batch]
    return {
        "trust": trust,
        "return": common.mean(returns),
        "reward_env": common.mean(environment),
        "reward_guide": common.mean(rating_return(args, episode) for episode in batch),
        "groups_flat": without_spread(returns, args.group_size),
        "groups_flat_env": without_spread(environment, args.group_size),
    }


DEPARTURES = {"mean_rating": False, "flat_groups": True, "frozen_rater": False}


def arm_of(args):
    """What the settings are called in summary.json."""
    if args.guide == "off":
        return args.estimator
    if args.guide == "inference":
        return "inference"
    own = [name.replace("_", "-") for name, value in DEPARTURES.items()
           if getattr(args, name) != value]
    return "-".join([args.trust, *["dapo"] * (args.estimator == "dapo"), *own])


def end_step(run, args, metrics, played):
    """Writes everything down."""
    run.count(
        episodes=len(played),
        env_steps=sum(len(episode.valid) for episode in played),
        tokens=sum(episode.tokens for episode in played),
        gradient_steps=args.updates)
    run.log(metrics, LIMITS)
    run.write_rollouts([{"step": run.step, **record(episode)} for episode in played])


def watch(episodes):
    """What can be counted over episodes: outcome, validity, cuts, error patterns, labels."""
    valid = [ok for episode in episodes for ok in episode.valid]
    labels = [label for episode in episodes for label in episode.labels]
    lost = [errors(episode) for episode in episodes if not episode.won]
    success, se = common.mean_se(episode.won for episode in episodes)
    cut = Counter()
    for episode in episodes:
        cut.update(episode.cut)
    found = {
        "success": success,
        "se": se,
        "score": common.mean(episode.score for episode in episodes),
        "turns": len(valid) / len(episodes),
        "invalid": valid.count(False) / max(1, len(valid)),
        "truncated": common.mean(episode.truncated for episode in episodes),
        "cut_act": cut["act"] / max(1, len(valid)),
    }
    for pattern in ("looping", "redundant_exploration", "wrong_object"):
        found[f"lost_by_{pattern}"] = common.mean_se(pattern in seen for seen in lost)[0]
    if labels:
        found["unrated_steps"] = len(valid) - len(labels)  # the last of each episode
        found["cut_rate"] = cut["rate"] / len(labels)
        for label, name in zip([None, -1, 0, 1], ["malformed", *LABELS]):
            found[f"label_{name}"] = labels.count(label) / len(labels)
        found |= watch_outcomes([episode for episode in episodes if episode.labels])
    return found


def watch_outcomes(episodes):
    """How the ratings go with the outcome: their sum by outcome, the correlation of their mean."""
    won = np.array([episode.won for episode in episodes], dtype=bool)
    sums = np.array([sum(label or 0 for label in episode.labels) for episode in episodes])
    means = sums / [len(episode.labels) for episode in episodes]
    correlation = None
    if len({*won}) > 1 and len({*means}) > 1:  # not std > 0: rounding
        correlation = np.corrcoef(means, won)[0, 1].item()
    return {
        "ratings_if_won": common.mean_se(sums[won])[0],
        "ratings_if_lost": common.mean_se(sums[~won])[0],
        "label_outcome_correlation": correlation,
    }


def errors(episode):
    """The error patterns of the paper's appendix B that an episode shows; how to tell them is ours.

    looping: one action three times on one observation; redundant exploration: three observations
    met again after a valid action; wrong object: what the world says. Turns left do not count. The
    appendix has more of them, for shops.
    """
    seen = [re.sub(r"\d+ turns? left", "", text) for who, text in episode.said if who == "world"]
    done = Counter(zip(seen, episode.actions))
    again = [text for text, ok in zip(seen[1:], episode.valid) if ok]
    found = {
        "looping": max(done.values(), default=0) > 2,
        "redundant_exploration": len(again) - len(set(again)) > 2,
        "wrong_object": episode.wrong,
    }
    return [name for name, shown in found.items() if shown]


@functools.lru_cache(maxsize=8)
def worked_examples(env, count, show_actions, guided):
    """--shots: what a random player met and did on train; with guidance also how a step is rated.

    Possible steps, rated positive, and impossible ones, rated negative, take turns: --shots 2 shows
    both.
    """
    world, messages = envs.make(env, show_actions=show_actions), []
    for seed in range(10**6, 10**6 + count):  # far from the seeds that are learnt from
        rng = random.Random(seed)
        observation, info = world.reset(seed=seed, options={"split": "train"})
        wasted = guided and seed % 2 == 1
        step = "sing a song" if wasted else envs.random_player(world, info, rng)
        seen, _, over, _, info = world.step(step)
        said = [observation, written(step)]
        if guided and not over:  # the last step is never rated
            rating = f"Reason: I have learnt this: {event(seen)}\nLabel: positive"
            if not info["valid"]:
                rating = "Reason: It changed nothing.\nLabel: negative"
            action = envs.random_player(world, info, rng)
            said += [to_rate(seen), rating, to_act(seen), written(action)]
        for role, text in zip(itertools.cycle(["user", "assistant"]), said):
            messages.append({"role": role, "content": text, "shot": True})
    world.close()
    return messages


def event(observation):
    """What an observation says first."""
    return re.split(r"(?<=[.?!])\s", observation.strip(), maxsplit=1)[0]


# ---------------------------------------------------------------------------- only for --model tiny
# What a model made from nothing is taught before it learns, and the defaults that suit it.

TINY = dict(
    device="cpu",
    lr=5e-4, batch_size=128, updates=4, kl=0.03, reward_scale=10.0,
    micro_batch_size=16, rollout_batch_size=256,
    max_new_tokens=16, rate_tokens=16,
    eval_episodes=500)
QUICK = dict(
    steps=4, batch_size=16, group_size=4, updates=2,
    eval_episodes=16, eval_every=2, save_every=2,
    examples=600)
HINTS = 2  # per episode and label: actions that took its hint, as examples of their own
READ = "Repeat the task, and what the last action brought."  # practises reading


def load(world, args):
    """The model that rates and acts, and its chat; a tiny one is made from `warmup`."""
    common.check(0 <= args.dose <= 1, f"--dose must be between 0 and 1, not {args.dose}")
    common.check(not args.dose or common.is_tiny(args.model), "--dose is of a tiny model's warm-up")
    common.check(not args.dose or hasattr(world, "possibilities"),
                 f"--dose: --env {args.env} cannot say what a step was worth")
    if common.is_tiny(args.model) and args.device == "cpu":
        torch.set_num_threads(min(2, torch.get_num_threads()))  # more only wait for each other
    told = Args(  # all that the corpus depends on, code apart
        env=args.env, show_actions=args.show_actions, dose=args.dose, examples=args.examples)
    known_by = None
    # Code that was imported may be patched by now, and other worlds may read files.
    if __name__ == "__main__" and args.env in envs.WORLDS:
        known_by = [vars(told), *map(common.content_hash, (__file__, envs.__file__))]
    plain = f"{world.system}\n{POLICY}"
    constants = [plain, f"{plain}\n{GUIDED}", RATE, ACT, READ, "Action: ", "Reason: ", "\nLabel: ",
                 *common.CHANGES_OF_SPEAKER]
    model, chat = common.load(
        args.model, corpus=lambda: warmup(world, told), known_by=known_by, constants=constants,
        device=args.device, dtype=args.dtype,
        thinking=args.thinking, max_context=args.max_context,
        gradient_checkpointing=args.gradient_checkpointing, lora_rank=args.lora_rank)
    guided = args.guide != "off"
    room = FORCED + args.max_new_tokens + args.rate_tokens * guided
    world.reset(seed=0)
    check_room(args, chat, model, opening(world, args, guided), room)
    return model, chat


def warmup(world, args):
    """The world's language, the form of a rating; with --dose what labels mean and ask for.

    Episodes are a random player's on the train split, unfiltered; the policy imitates it. In half
    of them it rates its steps as well, and tries something impossible once in a while: the
    reason is the end of what was observed last, the label is negative where nothing happened and
    random everywhere else. After a negative label the action is a possible one.
    With probability --dose, a label says how a random player's chance to win moved (`Prospects`),
    and the player takes the hint: it undoes its step after a negative label, and does not after a
    positive one; these acts are practised apart as well. No part sees an expert.
    """
    rng, examples, known = random.Random("warm-up"), [], []  # known: actions possible lately
    args = dataclasses.replace(args, shots=0)
    for seed in range(args.examples):
        guided = seed % 2 == 1
        messages, hints = warmup_game(world, args, rng, seed, guided, known)
        for acts in hints["negative"], hints["positive"]:
            examples += rng.sample(acts, min(HINTS, len(acts)))
        examples.append(read_back(world, rng, messages, guided))
    rng.shuffle(examples)
    return examples


def warmup_game(world, args, rng, seed, guided, known):
    """A random player's episode -> its messages, and {label: the acts that took its hint}."""
    observation, info = world.reset(seed=seed, options={"split": "train"})
    messages, hints = opening(world, args, guided), {label: [] for label in LABELS}
    prospects = Prospects(world) if guided and args.dose else None
    over, label = False, "positive"  # of the step before; no step yet
    while not over:
        possible = info["admissible"] or [envs.random_player(world, info, rng)]
        known[:] = (known + possible)[-1000:]
        hinted = prospects and world.turns and rng.random() < args.dose
        if hinted:
            possible = prospects.advised(world, label, possible) or possible
        impossible = guided and label != "negative" and rng.random() < 0.03
        action = rng.choice(known if impossible else rng.choice(envs.by_verb(possible)))
        if hinted and not impossible:  # a pair: of it the reply alone is learnt
            hints[label].append((list(messages), written(action)))
        messages.append({"role": "assistant", "content": written(action)})
        if prospects:
            prospects.before(world)
        observation, _, terminated, truncated, info = world.step(action)
        over = terminated or truncated
        asked = to_rate(observation) if guided else observation
        messages.append({"role": "user", "content": asked})
        if guided and not over:
            label = rng.choice(LABELS) if info["valid"] else "negative"
            if prospects and rng.random() < args.dose:
                label = prospects.label(world, info["valid"])
            messages += [
                {"role": "assistant", "content": rating_text(world, prospects, label)},
                {"role": "user", "content": to_act(observation)}]
    return messages, hints


def read_back(world, rng, messages, guided):
    """An episode up to some turn, where it is asked to repeat the task and the last event."""
    each = 4 if guided else 2  # messages per turn; the first one has 2, after system and opening
    further = (len(messages) - 4) // each
    messages = messages[:4 + each * rng.randint(0, further)]
    last = messages.pop()["content"].removesuffix(f"\n{RATE}")
    return [
        *messages,
        {"role": "user", "content": f"{last}\n{READ}"},
        {"role": "assistant", "content": f"{world.task}\n{event(last)}"}]


def rating_text(world, prospects, label):
    """A rating of the step just taken, as a tiny model learns to write it.

    Its reason: what would undo a negative step, where `prospects` knows of something; else the end
    of what was observed.
    """
    undo = []
    if prospects and label == "negative":
        undo = prospects.advised(world, label, world.admissible())
    reason = f"better {undo[0]}" if undo else " ".join(event(world.observation).split()[-3:])
    return f"Reason: {reason}\nLabel: {label}"


class Prospects(envs.RandomPlay):
    """What a step did to a random player's chance to win, and what would undo it."""

    def before(self, world):
        """Remembers the state that the next step starts from, and what it is worth a turn later."""
        left = world.max_turns - world.turns - 1
        self.state, self.value = world.snapshot(), self.expected(world, left)

    def label(self, world, valid) -> str:
        """How the step since `before` moved the chance, apart from the turn that it took."""
        now = self.expected(world, world.max_turns - world.turns)
        return LABELS[1 + envs.moved(self.value, now)] if valid else "negative"

    def advised(self, world, label, actions) -> list[str]:
        """Of the actions those that take the hint: undo a negative step, keep a positive one."""
        now, undo = world.snapshot(), []
        if now != self.state:  # else the step changed nothing
            undo = [action for action in actions if self.result(now, action)[1] == self.state]
        if label == "negative":
            return undo
        if label == "positive":
            return [action for action in actions if action not in undo]
        return []


if __name__ == "__main__":
    main()
