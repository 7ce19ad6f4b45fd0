"""Self-Guide (Wang et al., arXiv 2604.03098): the agent rates its own progress, acts on the rating, and earns it as reward.

One language model both rates and acts. Per step:

 1. Groups of episodes of the same task. Each turn the model first rates the episode so far, z_t ~ pi(. | h_{t-1}, o_t): a reason, a label;
 2. then it acts with its own rating in view, a_t ~ pi(. | h_{t-1}, o_t, z_t).
 3. R(tau) = R_env(tau) + lambda * sum_t g(z_t), with g = 0.1, 0, -0.1 for positive, neutral, negative: a sum over the trajectory.
 4. lambda follows a trust schedule over the run: 0 until 40% (ratings steer and earn nothing), up to 1 at 50%, 1 until 70%, down to
    0 at 80%. It ends at 0 because this shaping is not potential-based.
 5. A_i = (R_i - mean) / std within the group; the clipped surrogate over *all* sampled tokens, of ratings and of actions.

Arms, one run each: --guide off is plain GRPO, the baseline; --guide inference trains nothing and compares the start policy without and with
its ratings; --trust zero lets ratings steer but never earn. Guided arms are evaluated with guidance.

Departures from the paper, and why:
 1. Rating and acting are turns of one growing dialogue; the paper gives each call a prompt of its own over the trajectory so far. So the
    model sees its earlier ratings too, and a rollout encodes every token once: the cost of an episode grows with its length, not with the
    square. A full context ends the episode.
 2. The actions that are possible now are not listed: in a dialogue that only grows the lists would pile up. The world's system prompt says
    how to act.
 3. The system prompt explains rating and acting once, and what to do with a rating; a turn asks for one of them in a word.
 4. A rating that is not a reason and a label counts as neutral (the paper does not say), and is counted.
 5. A tiny model has been told beforehand what a rating looks like, that an action which did nothing deserves a negative one, and to try a
    possible action after that (`warmup`); only dialogues with ratings hold such actions. Its system prompt is a single token.
The paper leaves open: group size, learning rate and KL weight of its GRPO runs, the scale of R_env (10 here, after a public script: ratings
weigh less than as the paper writes it), if "full reward at once" ever ends.

    python self_guide.py                                        # household, tiny model: see README for minutes and numbers
    python self_guide.py --guide off --out-dir runs/grpo        # plain GRPO; every arm wants a directory of its own
    python self_guide.py --guide inference --out-dir runs/start # no training
    python self_guide.py --trust zero --out-dir runs/zero       # or immediate, no-anneal
    python self_guide.py --estimator dapo --out-dir runs/dapo
    python self_guide.py --guide off --token-budget 1800000 --out-dir runs/tokens # as many sampled tokens as a guided run had
    python self_guide.py --model Qwen/Qwen3-1.7B --env household-full --device cuda --lr 1e-6 --micro-batch-size 1 --max-new-tokens 512
    python self_guide.py --quick --out-dir runs/quick           # the whole path in under a minute
"""

import copy
import dataclasses
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
    """The command line. "not in the paper" marks what the paper leaves open."""

    # shared by all scripts
    model: str = common.flag("tiny", "tiny, tiny:WIDTHxLAYERS, a local directory or a hub id")
    env: str = common.flag("household", "a world of envs.py")
    seed: int = common.flag(0, "of everything sampled; the tiny model is built with seed 0")
    steps: int = common.flag(100, "updates (paper: 100)")
    lr: float = common.flag(5e-4, "AdamW, constant after 5 steps (paper: 1e-6, for DAPO)")
    batch_size: int = common.flag(128, "episodes per step: groups x --group-size (public script: 128)")
    micro_batch_size: int = common.flag(16, "episodes per backward pass; changes memory and speed, not the gradient")
    max_new_tokens: int = common.flag(16, "of one rating or action (paper: 1024)")
    temperature: float = common.flag(1.0, "while training, and of the log-probs (paper)")
    eval_temperature: float = common.flag(0.4, "in evaluation (paper)")
    eval_episodes: int = common.flag(500, "per split, of the first and the last evaluation; a fifth of them, of `test`, in between")
    eval_every: int = common.flag(20, "steps between evaluations")
    eval_only: bool = common.flag(False, "evaluate --model and stop; writes nothing")
    save_every: int = common.flag(20, "steps between checkpoints")
    out_dir: str = common.flag("", "default: runs/self_guide-ENV-sSEED")
    resume: bool = common.flag(False, "continue the run in --out-dir")
    device: str = common.flag("cpu", "cpu, cuda, cuda:1, mps")
    dtype: str = common.flag("auto", "auto (float32 weights; bfloat16 compute on a GPU), float32, bfloat16")
    quick: bool = common.flag(False, "a small run through every line, to see that it works; overrides the sizes")
    # group-relative policy optimisation
    group_size: int = common.flag(8, "episodes of one task (paper: 8 for DAPO)")
    updates: int = common.flag(4, "gradient steps per step, each on its share of the groups (not in the paper)")
    estimator: str = common.flag("grpo", "dapo: asymmetric clip, token-mean loss, dynamic sampling (paper: both)", choices=["grpo", "dapo"])
    clip: float = common.flag(0.2, "the ratio counts as at least 1 - clip, and with grpo as at most 1 + clip (paper, for DAPO)")
    clip_high: float = common.flag(0.28, "with dapo as at most 1 + clip_high (paper)")
    kl: float = common.flag(0.03, "weight of the KL to the start policy; 0 switches it off (paper: 0.01 for DAPO)")
    resample: int = common.flag(2, "dapo: times that groups without spread in R are replaced, per step (not in the paper)")
    # Self-Guide
    guide: str = common.flag("on", "off: plain GRPO; inference: ratings steer an untrained policy (paper: all three)",
                             choices=["on", "off", "inference"])
    trust: str = common.flag("schedule", "lambda over the run, with --guide on (paper: the schedule and, as ablations, the others)",
                             choices=["schedule", "zero", "immediate", "no-anneal"])
    trust_points: list[float] = dataclasses.field(default_factory=lambda: [0.4, 0.5, 0.7, 0.8], metadata={
        "help": "shares of --steps: ratings start to earn, earn fully, start to earn less, earn nothing (paper)"})
    rating_reward: float = common.flag(0.1, "g of a positive rating; a negative one is its opposite (paper)")
    reward_scale: float = common.flag(10.0, "R_env is this times the world's score, 1 for success (paper: 1; public script: 10)")
    invalid_penalty: float = common.flag(0.0, "taken from R_env for each invalid action (public script: 0.1; paper: unclear)")
    token_budget: int = common.flag(0, "with --guide off: stop after so many sampled tokens, not after --steps (not in the paper)")
    examples: int = common.flag(10000, "episodes that make a tiny model")


# ------------------------------------------------------------------------------------------------------ prompts and parsers
# The labels, their meanings and the two lines of a rating are the paper's; the wording is ours. A world's own system prompt comes first.

POLICY = "Reply with your next action and nothing else."
GUIDED = """You are asked by turns to rate and to act.
Rate: judge the episode so far, before you act. Reply with two lines. Reason: one sentence. Label: positive, neutral or negative.
Positive is closer to the goal, or information of use later. Neutral is neither.
Negative is wasted turns, a step back, contradiction, being stuck.
Act: reply with your next action and nothing else. Your rating is a hint: go on if it is positive, try something else if it is negative."""
RATE, ACT, READ = "Rate.", "Act.", "Repeat the task, and what the last action brought."  # READ: in the warm-up of a tiny model only
LABELS = ["negative", "neutral", "positive"]


def spoken(reply):
    """A reply without the native thought of a thinking model."""
    return re.sub(r"^\s*<think>.*?</think>", "", reply, flags=re.DOTALL).strip()


def parse_rating(reply):
    """A rating -> -1, 0 or 1 for its label, or None if it is not a reason and a label."""
    label = r"(?a:(negative|neutral|positive))"  # ASCII: or a dotless i would count as an i
    found = re.fullmatch(rf"\W*Reason:[^\n]*\w[^\n]*\n\W*Label:\W*{label}\W*", spoken(reply), re.IGNORECASE)
    return LABELS.index(found[1].lower()) - 1 if found else None


def parse_action(reply):
    """The first line of a reply."""
    return (spoken(reply).splitlines() or [""])[0].strip()


def opening(world, observation, guided):
    """The messages that a dialogue starts with."""
    return [{"role": "system", "content": f"{world.system}\n{GUIDED if guided else POLICY}"},
            {"role": "user", "content": f"{observation}\n{RATE}" if guided else observation}]


# ------------------------------------------------------------------------------------------------------------------ rollout


@torch.no_grad()
def rollout(model, chat, args, split, seeds, *, guided, temperature, stream, first=0):
    """Plays an episode per seed, all at once: rate and act by turns, or act only. Returns dicts; `ids` and `mask` are for the loss.

    `stream` names the randomness: a row's replies depend on (--seed, stream, row, turn) and on nothing else; rows count from `first`.
    """
    worlds, episodes = [envs.make(args.env) for _ in seeds], []
    for world, seed in zip(worlds, seeds):
        observation, _ = world.reset(seed=seed, options={"split": split})
        episodes.append({"split": split, "seed": seed, "history": [observation], "ratings": [], "labels": [], "valid": [],
                         "reward": 0.0, "won": False, "score": 0.0, "over": False, "truncated": False})
    dialogues = common.Dialogues(model, chat, [chat.dialogue(opening(w, e["history"][0], guided)) for w, e in zip(worlds, episodes)])
    context = model.config.max_position_embeddings - (2 if guided else 1) * (args.max_new_tokens + len(chat.turn(ACT)))

    def say(rows, part):
        return dialogues.reply(rows, max_new_tokens=args.max_new_tokens, temperature=temperature, seeds=[
            common.row_seed(args.seed, *stream, first + i, len(episodes[i]["history"]), part) for i in rows])

    live = list(range(len(episodes)))
    while live := [i for i in live if not episodes[i]["over"] and not episodes[i]["truncated"]]:
        if guided:
            for i, rating in zip(live, say(live, "rate")):  # z_t
                episodes[i]["ratings"].append(rating)
                episodes[i]["labels"].append(parse_rating(rating))
            dialogues.extend(live, [ACT] * len(live))
        for i, reply in zip(live, say(live, "act")):  # a_t
            e = episodes[i]
            observation, reward, terminated, truncated, info = worlds[i].step(parse_action(reply))
            e["history"] += [reply, observation]
            e["valid"].append(info["valid"])
            e["reward"] += reward
            e.update(won=info["won"], score=info["score"], over=terminated or truncated)
        live = [i for i in live if not episodes[i]["over"]]
        dialogues.extend(live, [f"{episodes[i]['history'][-1]}\n{RATE}" if guided else episodes[i]["history"][-1] for i in live])
        for i in live:  # a full context ends the episode; old turns are never dropped
            episodes[i]["truncated"] = len(dialogues.ids[i]) > context
    for world in worlds:
        world.close()
    for i, e in enumerate(episodes):
        e["ids"], e["mask"], e["logprob"] = dialogues.sampled(i)
    return episodes


# ----------------------------------------------------------------------------------------------------- rewards and advantages


def trust(args, share):
    """lambda(u) when `share` of the run is done, in [0, 1): the four phases of the schedule, or an arm of the ablation."""
    start, full, fade, end = args.trust_points
    if args.trust in ("zero", "immediate"):
        return float(args.trust == "immediate")
    if share < full:
        return max(0.0, (share - start) / (full - start))
    if share < fade or args.trust == "no-anneal":
        return 1.0
    return max(0.0, (end - share) / (end - fade))


def rewards(args, episode):
    """(R_env, sum_t g(z_t)) of a trajectory. Not divided by its length, as in the paper: long self-praise pays."""
    env = args.reward_scale * episode["score"] - args.invalid_penalty * episode["valid"].count(False)
    return env, args.rating_reward * sum(label or 0 for label in episode["labels"])


def total_reward(args, episode, weight):
    """R(tau; u) = R_env(tau) + lambda(u) sum_t g(z_t)"""
    env, guide = rewards(args, episode)
    return env + weight * guide


def group_advantages(returns, group_size):
    """A_i = (R_i - mean) / std over each group of consecutive episodes; exactly 0 where all of a group's R are equal."""
    advantages = []
    for i in range(0, len(returns), group_size):
        group = np.array(returns[i:i + group_size])
        spread = group.max() > group.min()
        advantages += ((group - group.mean()) / (group.std(ddof=1) + 1e-6)).tolist() if spread else [0.0] * len(group)
    return advantages


def without_spread(returns, group_size):
    """How many groups have no advantages, as all of their episodes got the same."""
    groups = [returns[i:i + group_size] for i in range(0, len(returns), group_size)]
    return sum(max(group) == min(group) for group in groups)


# --------------------------------------------------------------------------------------------------------------------- loss


def sampled_logprobs(model, chat, episodes, temperature):
    """log pi of the sampled tokens of some episodes, 0 at all others, and the mask that tells them apart: both [B, T - 1]."""
    ids = common.pad_rows([e["ids"] for e in episodes], chat.pad)  # [B, T]
    mask = common.pad_rows([e["mask"] for e in episodes], 0).to(model.device)[:, 1:]
    return common.token_logprobs(model, ids, temperature) * mask, mask


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


def token_weights(mask, estimator, episodes, tokens):
    """What a token counts in the loss -> [B, T - 1]. The divisors, `episodes` and `tokens`, are those of the whole gradient step.

    grpo: mean over trajectories of the mean over their tokens; dapo: mean over all tokens.
    """
    return mask / (episodes * mask.sum(1, keepdim=True).clamp(min=1)) if estimator == "grpo" else mask / tokens


def surrogate(logprobs, old, advantages, low, high):
    """- min(r A, clip(r, 1 - low, 1 + high) A) per token, with r = exp(logprobs - old); advantages [B, 1]."""
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def kl_estimate(logprobs, reference):
    """KL(pi || reference) per sampled token, the estimator of low variance: e^d - d - 1 with d = log reference - log pi."""
    d = reference - logprobs
    return d.exp() - d - 1


def update(model, reference, chat, args, optimizer, episodes, advantages):
    """--updates gradient steps on a batch of episodes, each on its share of the groups. Returns metrics."""
    old = old_logprobs(model, chat, args, episodes)
    ref = old_logprobs(reference, chat, args, episodes) if args.kl else None
    pad = lambda store, rows: torch.nn.utils.rnn.pad_sequence([store[i] for i in rows], batch_first=True)  # noqa: E731
    total, entropy = sum(sum(e["mask"]) for e in episodes), -sum(row.sum().item() for row in old)
    high, share = args.clip if args.estimator == "grpo" else args.clip_high, len(episodes) // args.updates
    metrics = Counter(loss=0.0, kl=0.0, clipped=0.0, grad_norm=0.0)
    for start in range(0, len(episodes), share):
        part = range(start, start + share)
        tokens = sum(sum(episodes[i]["mask"]) for i in part)
        for rows in micro_batches(episodes, part, args.micro_batch_size):
            logprobs, mask = sampled_logprobs(model, chat, [episodes[i] for i in rows], args.temperature)  # [B, T - 1]
            before, scale = pad(old, rows), torch.tensor([advantages[i] for i in rows], device=logprobs.device)[:, None]
            loss = surrogate(logprobs, before, scale, args.clip, high)
            if args.kl:
                kl = kl_estimate(logprobs, pad(ref, rows))
                loss = loss + args.kl * kl
                metrics["kl"] += (kl.detach() * mask).sum().item() / total
            weights = token_weights(mask, args.estimator, len(part), tokens)
            (loss * weights).sum().backward()
            metrics["loss"] += (loss.detach() * weights).sum().item() / args.updates
            ratio = (logprobs.detach() - before).exp()
            metrics["clipped"] += ((ratio < 1 - args.clip) | (ratio > 1 + high)).sum().item() / total
        metrics["grad_norm"] += torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item() / args.updates
        optimizer.step()
        optimizer.zero_grad()
    gap = (sum(e["logprob"] for e in episodes) + entropy) / total  # of decoding to the training forward, per token
    return dict(metrics) | {"entropy": entropy / total, "logprob_gap": gap}


# ----------------------------------------------------------------------------------------------------- evaluation and records


def watch(episodes):
    """What can be counted over episodes; of the ratings, whether they tell success from failure."""
    turns = [(e, t) for e in episodes for t in range(len(e["valid"]))]
    seen = [(id(e), re.sub(r"\d+ turns? left", "", e["history"][2 * t]), parse_action(e["history"][2 * t + 1])) for e, t in turns]
    out = {"success": common.mean(e["won"] for e in episodes), "score": common.mean(e["score"] for e in episodes),
           "turns": len(turns) / len(episodes),
           "invalid": common.mean(not e["valid"][t] for e, t in turns),
           "looping": 1 - len(set(seen)) / len(seen),  # the same action on the same observation, once more
           "truncated": sum(e["truncated"] for e in episodes)}
    labels = [label for e in episodes for label in e["labels"]]
    if labels:
        sums = {won: [sum(label or 0 for label in e["labels"]) for e in episodes if e["won"] == won] for won in (True, False)}
        out |= {f"label_{name}": labels.count(i - 1) / len(labels) for i, name in enumerate(LABELS)}
        out |= {"label_malformed": labels.count(None) / len(labels), "label_outcome_correlation": correlation(episodes),
                "ratings_if_won": common.mean(sums[True]) if sums[True] else None,
                "ratings_if_lost": common.mean(sums[False]) if sums[False] else None}
    return out


def correlation(episodes):
    """Pearson's, of an episode's mean rating with its success; None where one of them does not vary."""
    x = [common.mean(label or 0 for label in e["labels"]) for e in episodes]
    y = [float(e["won"]) for e in episodes]
    return float(np.corrcoef(x, y)[0, 1]) if min(x) < max(x) and min(y) < max(y) else None


AT_ONCE = 256  # episodes of an evaluation that share a cache: what bounds its memory


def evaluate(model, chat, args, split, episodes, guided):
    """The policy on fixed episodes of a split. Returns ({"success", "se", ...}, episodes)."""
    played = []
    for i in range(0, episodes, AT_ONCE):
        played += rollout(model, chat, args, split, range(i, min(i + AT_ONCE, episodes)), guided=guided, temperature=args.eval_temperature,
                          stream=("evaluate",), first=i)
    return watch(played) | {"se": common.mean_se([float(e["won"]) for e in played])[1]}, played


def record(episode):
    """An episode as rollouts.jsonl keeps it: words, not ids."""
    return {key: value for key, value in episode.items() if key not in ("ids", "mask")}


def show(episode):
    """An episode as a person reads it."""
    line = lambda text: "".join(c if c.isprintable() else " " for c in text)[:140]  # noqa: E731
    lines = [line(episode["history"][0])]
    for t in range(len(episode["valid"])):
        lines += [f"    {line(rating)}" for rating in episode["ratings"][t:t + 1]]
        lines += [f"> {line(episode['history'][2 * t + 1])}", line(episode["history"][2 * t + 2])]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- warm-up of a tiny model


def warmup(world, args):
    """What a model made from nothing is taught before it learns by itself: the world's language, the form of a rating, how to take one.

    Episodes come from a random player on the train split, unfiltered, and the policy imitates it. In half of them it rates as well, and
    tries something impossible once in a while: the reason is the end of what was observed last, the label is negative where nothing
    happened and random everywhere else; no plan and no success stands behind it. After a negative label the action is a possible one. No
    part sees an expert.
    """
    rng, examples, said = random.Random("warm-up"), [], []
    for seed in range(args.examples):
        observation, info = world.reset(seed=seed, options={"split": "train"})
        guided, over = seed % 2 == 1, False
        messages = opening(world, observation, guided)
        while not over:
            label = rng.choice(LABELS) if info["valid"] else "negative"
            said = (said + info["admissible"])[-1000:]
            impossible = guided and label != "negative" and rng.random() < 0.03
            action = rng.choice(said) if impossible else rng.choice(rng.choice(by_verb(info["admissible"])))
            words = [f"Reason: {' '.join(event(observation).split()[-3:])}\nLabel: {label}", ACT, action] if guided else [action]
            observation, _, terminated, truncated, info = world.step(action)
            over = terminated or truncated
            words.append(f"{observation}\n{RATE}" if guided else observation)
            messages += [{"role": role, "content": text} for role, text in zip(itertools.cycle(["assistant", "user"]), words)]
        each = 4 if guided else 2  # messages per turn
        messages = messages[:2 + each * rng.randint(1, (len(messages) - 2) // each)]
        last = messages.pop()["content"].removesuffix(f"\n{RATE}")
        messages += [{"role": "user", "content": f"{last}\n{READ}"}, {"role": "assistant", "content": f"{world.task}\n{event(last)}"}]
        examples.append(messages)
    rng.shuffle(examples)
    return examples


def by_verb(actions):
    """Lists of actions that share their first word. Drawn first among these, rare kinds of action are practised too."""
    verbs = {}
    for action in actions:
        verbs.setdefault(action.split()[0], []).append(action)
    return list(verbs.values())


def event(observation):
    """What an observation says first."""
    return re.split(r"(?<=[.?!])\s", observation.strip(), maxsplit=1)[0]


# --------------------------------------------------------------------------------------------------------------------- main


def check_args(args):
    """Everything that can be refused before a model is loaded. Returns the world."""
    common.check_common(args)
    for name in "updates", "examples":
        common.check(getattr(args, name) >= 1, f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in "clip", "clip_high", "kl", "resample", "invalid_penalty", "token_budget":
        common.check(getattr(args, name) >= 0, f"--{name.replace('_', '-')} must be at least 0, not {getattr(args, name)}")
    common.check(args.group_size > 1, "--group-size must be at least 2: an advantage is a difference within a group")
    common.check(args.batch_size % args.group_size == 0, f"--batch-size must be a multiple of --group-size, not {args.batch_size}")
    common.check(args.batch_size // args.group_size % args.updates == 0,
                 f"--updates must divide the {args.batch_size // args.group_size} groups of a step, not {args.updates}")
    points = [0.0, *args.trust_points, 1.0]
    common.check(len(points) == 6 and points == sorted(points) and len(set(args.trust_points)) == 4,
                 f"--trust-points must be four growing shares of --steps, not {args.trust_points}")
    common.check(args.reward_scale > 0, f"--reward-scale must be above 0, not {args.reward_scale}")
    common.check(not args.token_budget or args.guide == "off", "--token-budget belongs to --guide off")
    common.check(args.trust == "schedule" or args.guide == "on", f"--trust {args.trust} belongs to --guide on")
    try:
        return envs.make(args.env)
    except ValueError as error:
        common.refuse(error)


def load(world, args):
    """The model that rates and acts, and its chat; a tiny one is made from `warmup`."""
    if args.model.startswith("tiny") and args.device == "cpu":
        torch.set_num_threads(min(2, torch.get_num_threads()))  # small tensors: more threads only wait for each other
    constants = [f"{world.system}\n{POLICY}", f"{world.system}\n{GUIDED}", RATE, ACT, READ, "Reason: ", "\nLabel: ",
                 *common.CHANGES_OF_SPEAKER]
    return common.load(args.model, corpus=lambda: warmup(world, args), constants=constants, device=args.device, dtype=args.dtype)


def main():
    """The loop of the docstring."""
    args = common.parse_args(Args)
    if args.quick:
        args = dataclasses.replace(args, steps=4, batch_size=16, micro_batch_size=8, group_size=4, updates=2, eval_episodes=16,
                                   eval_every=2, save_every=2, examples=600, token_budget=0)
    world = check_args(args)
    guided, groups = args.guide == "on", args.batch_size // args.group_size
    out_dir = args.out_dir or f"runs/self_guide-{args.env.replace(':', '-')}-s{args.seed}"
    run = None if args.eval_only else common.Run("self_guide", args, out_dir)
    model, chat = load(world, args)
    first = chat.dialogue(opening(world, world.reset(seed=0)[0], args.guide != "off"))
    replies = 1 if args.guide == "off" else 2
    common.check(len(first) + replies * (args.max_new_tokens + len(chat.turn(ACT))) <= model.config.max_position_embeddings,
                 f"the first prompt has {len(first)} tokens and --max-new-tokens is {args.max_new_tokens}: "
                 f"beyond the model's context of {model.config.max_position_embeddings}")
    splits = [split for split in ("test", "ood") if split in world.splits]

    def evaluations(guided):
        """{split: numbers} and an episode of `test`."""
        found = {split: evaluate(model, chat, args, split, args.eval_episodes, guided) for split in splits}
        if run and run.stopping:
            sys.exit(run.stopping)
        for split, (numbers, _) in found.items():
            tqdm.write(f"{split}: success {numbers['success']:.3f} (se {numbers['se']:.3f}, n {args.eval_episodes})")
        return {split: numbers for split, (numbers, _) in found.items()}, record(found["test"][1][0])

    if args.eval_only:
        return evaluations(args.guide != "off")
    run.start({"parameters": common.count_parameters(model), "start": common.fingerprint(model)})
    print(f"{args.env}: {common.count_parameters(model):,} parameters on {common.device_name(args.device)}; a step plays {groups} groups "
          f"of {args.group_size} episodes and takes {args.updates} gradient steps of {args.batch_size // args.updates} episodes")

    reference = copy.deepcopy(model) if args.kl else None  # the start policy
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    totals, seconds, step, task = Counter(), Counter(), 0, 0
    if state := run.resume():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        common.check(not guided or args.trust in ("zero", "immediate") or state["steps"] == args.steps,
                     f"--resume: the trust schedule is made of shares of --steps, which was {state['steps']}")
        totals, seconds, step, task = Counter(state["totals"]), Counter(state["seconds"]), state["step"], state["task"]
        before, before_episode = state["before"], state["before_episode"]
    else:
        before, before_episode = evaluations(guided)

    def checkpoint(step):
        run.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "steps": args.steps, "task": task,
                  "totals": dict(totals), "seconds": dict(seconds), "before": before, "before_episode": before_episode})

    def finished(step):
        return totals["tokens"] >= args.token_budget if args.token_budget else step >= args.steps or args.guide == "inference"

    bar = tqdm(initial=totals["tokens"] if args.token_budget else step, total=args.token_budget or args.steps, desc="self_guide",
               unit="token" if args.token_budget else "step", dynamic_ncols=True, disable=args.guide == "inference")
    while not finished(step):
        step += 1
        clock = common.Clock(seconds)

        # 4. lambda, and 1, 2. groups of episodes; dapo plays others in place of those without spread in R
        weight = trust(args, (step - 1) / args.steps) if guided else 0.0
        batch, all_played, replaced = [], [], 0
        for attempt in range(1 + (args.resample if args.estimator == "dapo" else 0)):
            missing = groups - len(batch) // args.group_size
            seeds = [args.seed * 1_000_000_007 + task + g for g in range(missing) for _ in range(args.group_size)]
            task += missing
            episodes = rollout(model, chat, args, "train", seeds, guided=guided, temperature=args.temperature,
                               stream=("train", step, attempt))
            all_played += episodes
            played = [episodes[i:i + args.group_size] for i in range(0, len(episodes), args.group_size)]
            if args.estimator == "dapo" and attempt < args.resample:
                spread = [group for group in played if without_spread([total_reward(args, e, weight) for e in group], args.group_size) == 0]
                replaced, played = replaced + len(played) - len(spread), spread
            batch += [e for group in played for e in group]
            if len(batch) == args.batch_size:
                break
        totals.update(episodes=len(all_played), env_steps=sum(len(e["valid"]) for e in all_played),
                      tokens=sum(sum(e["mask"]) for e in all_played))
        clock.lap("rollout")

        # 3, 5. rewards, advantages, gradient steps
        parts = [rewards(args, e) for e in batch]
        returns = [total_reward(args, e, weight) for e in batch]
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 5)
        losses = update(model, reference, chat, args, optimizer, batch, group_advantages(returns, args.group_size))
        totals["gradient_steps"] += args.updates
        clock.lap("update")

        metrics = {"step": step, **watch(all_played), **losses, "trust": weight,
                   "reward_env": common.mean(env for env, _ in parts),
                   "reward_guide": common.mean(guide for _, guide in parts), "return": common.mean(returns), "groups": groups,
                   "groups_without_spread": without_spread(returns, args.group_size), "groups_replaced": replaced,
                   "groups_without_spread_env": without_spread([env for env, _ in parts], args.group_size)}
        if step % args.eval_every == 0 and not finished(step):
            n = max(1, args.eval_episodes // 5)
            numbers, _ = evaluate(model, chat, args, "test", n, guided)
            metrics |= {"eval_episodes": n} | {f"eval_{key}": value for key, value in numbers.items()}
            tqdm.write(f"step {step}: test success {numbers['success']:.3f} (se {numbers['se']:.3f}, n {n}), {totals['env_steps']} "
                       f"environment steps")
        clock.lap("watching")
        run.log(metrics | dict(totals) | {f"seconds_{name}": round(value, 2) for name, value in clock.laps.items()})
        run.write_rollouts([{"step": step, **record(e)} for e in all_played])
        bar.update((totals["tokens"] if args.token_budget else step) - bar.n)
        bar.set_postfix(success=f"{metrics['success']:.2f}", trust=f"{weight:.2f}")
        if step % args.save_every == 0 or finished(step) or run.stopping:
            checkpoint(step)
        if run.stopping:
            sys.exit(run.stopping)
    bar.close()

    after, after_episode = evaluations(args.guide != "off")
    ends = {name: envs.mean_score(envs.make(args.env), player, args.eval_episodes, key="won") for name, player in
            (("random", envs.random_player), ("expert", envs.expert_player))}
    print(f"\nbefore\n{show(before_episode)}\n\nafter\n{show(after_episode)}\n")
    arm = {"off": args.estimator, "inference": "inference", "on": args.trust + "-dapo" * (args.estimator == "dapo")}[args.guide]
    score = lambda numbers: {"success": numbers["success"], "se": numbers["se"]}  # noqa: E731
    run.finish({"script": "self_guide", "method": "self-guide", "arm": arm, "env": args.env, "model": args.model, "seed": args.seed,
                "split": "test", "eval_episodes": args.eval_episodes, "before": score(before["test"]), "after": score(after["test"]),
                **{f"{when}_{split}": score(found[split]) for split in splits[1:]
                   for when, found in (("before", before), ("after", after))},
                **{name: {"success": value, "se": se} for name, (value, se) in ends.items()},
                "watched": {"before": before, "after": after}, "train_episodes": totals["episodes"], "env_steps": totals["env_steps"],
                "generated_tokens": totals["tokens"], "gradient_steps": totals["gradient_steps"],
                "seconds": round(sum(seconds.values()), 1),
                "peak_memory_bytes": common.peak_memory_bytes(args.device), "device": common.device_name(args.device),
                "git_commit": common.git_commit()}, model, chat)
    print(f"{'':10}{'success':>9}{'se':>8}   (n {args.eval_episodes})")
    for split in splits:
        for when, found in ("before", before), ("after", after):
            print(f"{when} {split:10}{found[split]['success']:9.3f}{found[split]['se']:8.3f}")
    for name, (value, se) in ends.items():
        print(f"{name:17}{value:9.3f}{se:8.3f}")
    print(f"whole episodes: {run.dir / 'rollouts.jsonl'}")


if __name__ == "__main__":
    main()
