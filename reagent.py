r"""Reagent (Fan et al., arXiv 2601.22154): a reward model that explains itself, and an agent that learns from its words and its score.

Agent-RRM reads the whole transcript of an episode, never the right answer, and writes three blocks: <think> an analysis, <critique> a few
words to the agent, <score> a number in [0, 1]. Three ways to use it:

 C  text only, the agent is not trained: attempt, critique, second attempt with the critique in view; the second one counts.
 R  score only: GRPO with R = R_rule + lambda * score.
 U  both: G first attempts at a question are judged, each is attempted once more with its critique in view, the second ones are judged too,
    both get R, and advantages are normalised over the pool of all 2G. Each attempt's ratio is taken in its own context: the second stays
    conditioned on the first and its critique, whose tokens are not trained there. At test time: the first attempt alone.
 none  lambda = 0, first attempts only.
The control that the paper lacks is R with --batch-size and --group-size twice as large: as many attempts at as many questions as U.

One run: 1. cold start of the agent on correct trajectories; 2. judged trajectories, half of players of different strength, half of the
agent as it is then; 3. the judge learns them (SFT), then GRPO, paid for how close its score is to the reference, with nothing for what
cannot be read; 4. the agent's own learning. C skips 1 and 4; none skips 2 and 3, and so does any arm that is given a judge (--rrm).

Departures from the paper, and why:
 1. The judgements that train the judge are written by a program that names flaws of the process (`annotate`); the paper's come from a
    model of 120 billion parameters. The agent never meets them: it works with the trained judge. (The warm-up of a tiny model contains
    judgements of random flaws, which teach the form only.) Of the agent's own trajectories only first attempts are judged there.
 2. The reward of the judge's GRPO and the prompt of the second attempt are unpublished; those below are ours, and the words of a critique
    earn nothing. A judgement that cannot be read is tried again at --temperature (paper's script: once more at 0). A second attempt is
    judged by itself, without the first. The judge is not shown the descriptions of the tools.
 3. Cold-start trajectories, with thoughts, come from the world's expert, --cold-start of them (paper: 55.6 thousand of a stronger model).
    Each is imitated twice, the second time below an attempt that one of the judge's players made at the same question, as a second attempt
    without a critique (paper: unstated); without that, a small model forgets the form of second attempts.
 4. Transcripts lack native thoughts (off without --thinking), and the last observation, in which our worlds say how the game ended:
    neither judge nor second attempt may know. An attempt whose first prompt does not fit the context is a lost one.
 5. No KL term by default, as in the paper's script; --kl has the equation's. Learning rates rise over the first 5 steps of each phase,
    gradients are clipped to norm 1; evaluation without top-p; SFT at --temperature, so that what imitates is the policy that samples; as
    many turns as the world allows (paper: 13). R_rule is the world's own score: of `search`, the paper's rule.

    python reagent.py                                     # cold start, judge, variant U on search with the tiny model: see README
    python reagent.py --variant none --out-dir runs/none  # or C
    python reagent.py --rrm runs/reagent-search-s0/rrm --out-dir runs/U # with an existing judge
    python reagent.py --variant R --batch-size 256 --group-size 16 --rrm runs/reagent-search-s0/rrm --out-dir runs/R # attempts as U
    python reagent.py --model Qwen/Qwen3-1.7B --env search-full --device cuda --lr 5e-7 --sft-lr 1e-5 --micro-batch-size 2 \
        --rollout-batch-size 32 --max-new-tokens 512 --judge-tokens 512 # not run by us yet; float32 weights, gradients, moments: 34 GB
    python reagent.py --quick --out-dir runs/quick        # the whole path in under a minute
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
    """The command line. "not in the paper" marks what the paper leaves open."""

    # shared by all scripts
    model: str = common.flag("tiny", "tiny, tiny:WIDTHxLAYERS, a local directory or a hub id")
    env: str = common.flag("search", "a world of envs.py")
    seed: int = common.flag(0, "of everything sampled; the tiny model is built with seed 0")
    steps: int = common.flag(50, "of the agent's learning (paper: 300)")
    lr: float = common.flag(5e-4, "AdamW, of GRPO, the agent's and the judge's (paper: 5e-7; its script: 5e-6)")
    batch_size: int = common.flag(128, "first attempts per step: questions x --group-size (paper: 32 questions, 64 in an appendix)")
    micro_batch_size: int = common.flag(16, "sequences per backward pass; changes memory and speed, not the gradient")
    rollout_batch_size: int = common.flag(256, "episodes that are played side by side; changes memory and speed, not the episodes")
    max_new_tokens: int = common.flag(32, "of one reply of the agent (not in the paper)")
    temperature: float = common.flag(0.7, "while training, and of the log-probs (paper)")
    eval_temperature: float = common.flag(0.6, "in evaluation (paper, with top-p 0.95)")
    eval_episodes: int = common.flag(500, "per split, before, after the cold start and at the end; a fifth of them, of `test`, in between")
    eval_every: int = common.flag(20, "steps between evaluations")
    eval_only: bool = common.flag(False, "evaluate --model and stop; writes nothing")
    save_every: int = common.flag(20, "steps of any phase between checkpoints")
    out_dir: str = common.flag("", "default: runs/reagent-ENV-sSEED")
    resume: bool = common.flag(False, "continue the run in --out-dir")
    device: str = common.flag("cpu", "cpu, cuda, cuda:1, mps")
    dtype: str = common.flag("auto", "auto (float32 weights; bfloat16 compute on a GPU), float32, bfloat16")
    quick: bool = common.flag(False, "a small run through every line, to see that it works; overrides the sizes")
    # group-relative policy optimisation
    group_size: int = common.flag(8, "first attempts at one question (paper)")
    updates: int = common.flag(2, "gradient steps that a step's questions are split into (paper: 2, batches of 32 in halves)")
    clip: float = common.flag(0.2, "the ratio counts as at least 1 - clip (paper)")
    clip_high: float = common.flag(0.2, "and as at most 1 + clip_high (paper: 0.2; its script: 0.34)")
    kl: float = common.flag(0.0, "weight of the KL to the policy at the start of the phase (paper: unstated; its script: no KL)")
    # Reagent
    variant: str = common.flag("U", "how the judge is used", choices=["U", "R", "C", "none"])
    score_weight: float = common.flag(0.3, "lambda, of the judge's score beside the rule's reward (paper)")
    pool: str = common.flag("joint", "U: advantages over all 2G attempts (paper), or over each G", choices=["joint", "separate"])
    rrm: str = common.flag("", "the judge: a local directory or a hub id; default: it is trained, after the cold start")
    judge_tokens: int = common.flag(40, "of one judgement (not in the paper)")
    judge_retries: int = common.flag(1, "of a judgement that cannot be read, then it is 0 and empty (its script)")
    judged: int = common.flag(3000, "trajectories for the judge's SFT, half of them the agent's own (paper: 28 thousand)")
    judge_epochs: int = common.flag(2, "of its SFT (paper)")
    judge_steps: int = common.flag(20, "of its GRPO, on as many fresh trajectories as a step has questions (paper: 90 thousand)")
    cold_start: int = common.flag(2000, "correct trajectories of the expert that the agent imitates first; 0: none (paper: 55.6 thousand)")
    cold_epochs: int = common.flag(2, "of the cold start (paper)")
    sft_batch_size: int = common.flag(16, "trajectories per gradient step of judge SFT and cold start (paper: 32)")
    sft_lr: float = common.flag(5e-4, "AdamW, of judge SFT and cold start (paper: 1e-5)")
    thinking: bool = common.flag(False, "let a thinking model think natively before each reply (paper: unstated)")
    examples: int = common.flag(10000, "rounds of warm-up examples that make a tiny model")


# ------------------------------------------------------------------------------------------------------ prompts and parsers
# The three blocks are the paper's, the rubric is its script's; the wording is ours. The agent's system prompt is the world's.

JUDGE = """You judge how an agent worked on a task. Read the task and the whole transcript. Were tools called where they were needed? Was a
call wrong or repeated? Were the limits of the tools respected? Did it get better as it went on? Was the answer found, guessed or made up?
Reply with three blocks:
<think>your analysis</think>
<critique>what the agent should do differently, to the agent, without the answer or a hint to it</critique>
<score>a number from 0, harmful, to 1, flawless</score>"""
NEXT = "Write all the calls that take up what you see here."  # in the warm-up of a tiny model only
AGAIN = "You have tried this before:\n{transcript}\nA reviewer says: {critique}\nTry again from the start."


def parse_judgement(text):
    """The three blocks -> {"think", "critique", "score"}, or None where one is missing or the score is no number in [0, 1]."""
    inside = r"(?:(?!</?(?:think|critique|score)>).)*"  # without tags: exactly three blocks, after a thinking model's own thought
    blocks = rf"(?:(?:<think>)?{inside}</think>\s*)??<think>({inside})</think>\s*<critique>({inside})</critique>"
    found = re.fullmatch(blocks + r"\s*<score>\s*([01](?:\.[0-9]{1,9})?)\s*</score>", text.strip(), re.DOTALL)
    score = found and float(found[3])
    return {"think": found[1].strip(), "critique": found[2].strip(), "score": score} if found and 0 <= score <= 1 else None


def aloud(reply):
    """A reply without native thoughts: whole ones, one that is cut off, and one that the chat template itself began."""
    return re.sub(r"(?:<think>|\A)(?:(?!<think>).)*?</think>|<think>.*", "", reply, flags=re.DOTALL).strip()


def transcript(history):
    """`history` is [observation, reply, observation, ..., observation]. Left out: native thoughts, and the last observation, which tells
    how the game ended: nobody who reads a transcript may know whether the answer was right."""
    said = map(aloud, history[1::2])
    return "\n".join(f"> {reply}\n{observation}" for reply, observation in zip(said, [*history[2:-1:2], ""])).strip()


def opening(world, observation, before=None):
    """The messages that an attempt starts with. `before`: the first attempt's history and its critique."""
    again = "\n" + AGAIN.format(transcript=transcript(before[0]), critique=before[1] or "nothing.") if before else ""
    return [{"role": "system", "content": world.system}, {"role": "user", "content": observation + again}]


def spoken(history):
    """The messages behind an opening, up to the agent's last reply."""
    return [{"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(history[1:-1])]


def judge_messages(world, history):
    """A call of its own over the whole transcript."""
    return [{"role": "system", "content": JUDGE}, {"role": "user", "content": f"{history[0]}\n{transcript(history)}"}]


# ------------------------------------------------------------------------------------------------------------------ rollout


def rollout(model, chat, args, split, seeds, *, temperature, stream, before=None):
    """Plays an episode per seed, --rollout-batch-size at once. Returns dicts; `ids` and `mask` are for the loss, `rule` is R_rule.

    `before`: (history, critique) of an earlier attempt per episode, for second attempts. `stream` names the randomness: a row's depends on
    (--seed, stream, row, turn) and on nothing else. What does not fit the context is not played and scores 0.
    """
    episodes, size = [], args.rollout_batch_size
    for i in range(0, len(seeds), size):
        streams = [(*stream, row) for row in range(i, min(i + size, len(seeds)))]
        episodes += side_by_side(model, chat, args, split, seeds[i:i + size], streams, temperature, before[i:i + size] if before else None)
    return episodes


@torch.no_grad()
def side_by_side(model, chat, args, split, seeds, streams, temperature, before):
    """The `rollout` of episodes that share a cache, a stream for each."""
    worlds, episodes = [envs.make(args.env) for _ in seeds], []
    for world, seed in zip(worlds, seeds):
        observation, _ = world.reset(seed=seed, options={"split": split})
        episodes.append({"split": split, "seed": seed, "history": [observation], "valid": [], "won": False, "rule": 0.0,
                         "over": False, "truncated": False})
    dialogues = common.Dialogues(model, chat, [
        chat.dialogue(opening(w, e["history"][0], b)) for w, e, b in zip(worlds, episodes, before or [None] * len(episodes))])
    context = model.config.max_position_embeddings - args.max_new_tokens
    for i, e in enumerate(episodes):
        e["truncated"] = len(dialogues.ids[i]) > context
    live = list(range(len(episodes)))
    while live := [i for i in live if not episodes[i]["over"] and not episodes[i]["truncated"]]:
        replies = dialogues.reply(live, max_new_tokens=args.max_new_tokens, temperature=temperature, seeds=[
            common.row_seed(args.seed, *streams[i], len(episodes[i]["history"])) for i in live])
        for i, reply in zip(live, replies):
            e = episodes[i]
            observation, _, terminated, truncated, info = worlds[i].step(aloud(reply))
            e["history"] += [reply, observation]
            e["valid"].append(info["valid"])
            e.update(won=info["won"], rule=info["score"], over=terminated or truncated)
        live = [i for i in live if not episodes[i]["over"]]
        dialogues.extend(live, [episodes[i]["history"][-1] for i in live])
        for i in live:  # a full context ends the episode; old turns are never dropped
            episodes[i]["truncated"] = len(dialogues.ids[i]) > context
    for world in worlds:
        world.close()
    for i, e in enumerate(episodes):
        e["ids"], e["mask"], e["logprob"] = dialogues.sampled(i)
    return episodes


# --------------------------------------------------------------------------------------------------------------- Agent-RRM


def judge(rrm, world, args, histories, stream):
    """Agent-RRM on whole transcripts: a dict of think, critique, score and `parsed` each. Unreadable after the retries, too long to judge
    or not played: 0 and empty. `stream` is that of `rollout`."""
    model, chat = rrm
    room = model.config.max_position_embeddings - args.judge_tokens
    prompts = [chat.prompt(judge_messages(world, history)) for history in histories]
    out = [{"think": "", "critique": "", "score": 0.0, "parsed": False, "tokens": 0} for _ in histories]
    left = [i for i, prompt in enumerate(prompts) if len(prompt) <= room and len(histories[i]) > 1]
    for attempt in range(1 + args.judge_retries):
        if not left:
            break
        replies = common.generate(model, chat, [prompts[i] for i in left], max_new_tokens=args.judge_tokens,
                                  temperature=args.temperature if attempt else 0.0,  # greedily it would only repeat itself
                                  rows=min(64, args.rollout_batch_size),
                                  seeds=[common.row_seed(args.seed, *stream, "judge", attempt, i) for i in left])
        for i, text, ids in zip(left, replies.texts, replies.ids):
            found = parse_judgement(text)
            out[i] |= (found or {}) | {"parsed": found is not None, "tokens": out[i]["tokens"] + len(ids)}
        left = [i for i in left if not out[i]["parsed"]]
    return out


COSTS = {"skipped lookup": 0.4, "unsupported guess": 0.4, "wrong conclusion": 0.4, "repeated call": 0.2, "wrong tool": 0.2,
         "no answer": 0.5}
ADVICE = {
    "skipped lookup": "Read every page that the question needs before you answer.", "unsupported guess": "Answer with what you have read.",
    "wrong conclusion": "Answer what was asked.", "repeated call": "Do not call the same tool with the same words twice.",
    "wrong tool": "Use tools as they are described.", "no answer": "Give an answer before the turns run out."}  # fmt: skip


def process_score(flaws):
    """1 for a flawless process."""
    return max(0.0, 1.0 - sum(COSTS[flaw] for flaw in flaws))


def annotate(flaws):
    """The reference judgement for the flaws of a process, which follow from the pages read: the right answer is not asked."""
    think = f"Flaws: {', '.join(flaws)}." if flaws else "No flaw."
    critique = " ".join(ADVICE[flaw] for flaw in flaws) or "Go on like this."
    return f"<think>{think}</think>\n<critique>{critique}</critique>\n<score>{process_score(flaws):.1f}</score>"


def process_flaws(question, history, valid):
    """The flaws of a process that have a cost, deduced from what was read, never from the right answer."""
    said = [aloud(reply) for reply in history[1::2]]
    flaws = [flaw for flaw in envs.search_flaws(question, list(zip(said, history[2::2], valid))) if flaw in COSTS]
    answered = valid[-1:] == [True] and envs.read_call(said[-1])[0] == "answer"
    return flaws if answered else [*flaws, "no answer"]


def trajectories(args, split, seeds, name):
    """Episodes of players of different strength, half of them with the expert's thoughts, and the flaws of their process."""
    players = (envs.expert_player, envs.sloppy_player, envs.hasty_player, envs.muddled_player, envs.guess_player, envs.random_player)
    world, episodes = envs.make(args.env), []
    for seed in seeds:
        rng = random.Random(f"{name} {args.seed} {seed}")
        observation, info = world.reset(seed=seed, options={"split": split})
        history, valid, player, thinks, over = [observation], [], rng.choice(players), rng.random() < 0.5, False
        while not over:
            action = player(world, info, rng)
            if thinks:
                action = f"{envs.search_thought(world.task, world.record)}\n{action}"
            observation, _, terminated, truncated, info = world.step(action)
            history += [action, observation]
            valid.append(info["valid"])
            over = terminated or truncated
        episodes.append({"history": history, "flaws": process_flaws(world.task, history, valid), "won": info["won"], "who": "players"})
    return episodes


def judge_examples(state, split, seeds, name):
    """What a judge is trained and measured on, an episode per seed: by turns one of the players and one of the agent as it is now."""
    found = [None] * len(seeds)
    found[::2] = trajectories(state.args, split, seeds[::2], name)
    found[1::2] = rollout(state.model, state.chat, state.args, split, seeds[1::2], temperature=state.args.temperature, stream=(name,))
    for e in found[1::2]:
        state.world.reset(seed=e["seed"], options={"split": split})
        e |= {"who": "agent", "flaws": process_flaws(state.world.task, e["history"], e["valid"])}
    return found


def demonstrations(args, seeds):
    """The expert's correct trajectories, with its thoughts, each beside an attempt of any player at the same question (`earlier`)."""
    world, found = envs.make(args.env), []
    for seed, other in zip(seeds, trajectories(args, "train", seeds, "earlier")):
        e = envs.run_episode(world, envs.thinking_player, seed)
        turns = itertools.zip_longest(e["observations"], e["actions"])
        if e["won"]:
            found.append({"history": [text for turn in turns for text in turn if text is not None], "earlier": other["history"]})
    return found


def judge_reward(text, reference):
    """Not published by the paper: 1 - |score - the annotator's score| for three readable blocks, else 0."""
    found = parse_judgement(text)
    return 1 - abs(found["score"] - reference) if found else 0.0


def auc(scores, labels):
    """The chance that a positive one has the higher score, ties counting half; None if all labels are equal."""
    positive, negative = ([s for s, label in zip(scores, labels) if bool(label) == side] for side in (True, False))
    if not positive or not negative:
        return None
    return sum((p > n) + 0.5 * (p == n) for p in positive for n in negative) / (len(positive) * len(negative))


def watch_judge(rrm, world, args, episodes):
    """How good a judge is on trajectories it was not trained on: against the outcome, and against the process."""
    judgements = judge(rrm, world, args, [e["history"] for e in episodes], ("watch",))
    scores, references = [j["score"] for j in judgements], [process_score(e["flaws"]) for e in episodes]
    bins = [[e for s, e in zip(scores, episodes) if min(int(5 * s), 4) == fifth] for fifth in range(5)]
    return {"parsed": common.mean(j["parsed"] for j in judgements), "auc_outcome": auc(scores, [e["won"] for e in episodes]),
            "auc_process": auc(scores, [not e["flaws"] for e in episodes]),
            "error": common.mean(abs(s - r) for s, r in zip(scores, references)),
            "calibration": [[len(b), common.mean(e["won"] for e in b)] for b in bins]}  # per fifth of the score: episodes, success


# ----------------------------------------------------------------------------------------------------- rewards and advantages


def attempt_rewards(args, episodes, judgements):
    """R = R_rule + lambda * score, for attempts and their judgements (or None: lambda = 0)."""
    return [e["rule"] + (args.score_weight * j["score"] if j else 0.0) for e, j in zip(episodes, judgements or [None] * len(episodes))]


def group_advantages(returns, group_size):
    """A_i = (R_i - mean) / std over each group of consecutive episodes; exactly 0 where all of a group's R are equal."""
    advantages = []
    for i in range(0, len(returns), group_size):
        group = np.array(returns[i:i + group_size])
        spread = group.max() > group.min()
        advantages += ((group - group.mean()) / (group.std(ddof=1) + 1e-6)).tolist() if spread else [0.0] * len(group)
    return advantages


def interleaved(first, second, group_size):
    """Question by question: its G first attempts, then its G second ones if there are any, so that a pool of 2G is consecutive."""
    if not second:
        return list(first)
    return [x for i in range(0, len(first), group_size) for x in (*first[i:i + group_size], *second[i:i + group_size])]


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


def token_weights(mask, count):
    """The mean over trajectories of the mean over their tokens, as weights [B, T - 1]. `count`: trajectories of the gradient step."""
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
    """--updates gradient steps on a batch of episodes, each on its share of the questions. Returns metrics."""
    old = old_logprobs(model, chat, args, episodes)
    ref = old_logprobs(reference, chat, args, episodes) if args.kl else None
    pad = lambda store, rows: torch.nn.utils.rnn.pad_sequence([store[i] for i in rows], batch_first=True)  # noqa: E731
    total, entropy = max(1, sum(sum(e["mask"]) for e in episodes)), -sum(row.sum().item() for row in old)
    metrics, share = Counter(loss=0.0, kl=0.0, clipped=0.0, grad_norm=0.0), len(episodes) // args.updates
    for start in range(0, len(episodes), share):
        part = range(start, start + share)
        for rows in micro_batches(episodes, part, args.micro_batch_size):
            logprobs, mask = sampled_logprobs(model, chat, [episodes[i] for i in rows], args.temperature)  # [B, T - 1]
            logprobs_old, A = pad(old, rows), torch.tensor([advantages[i] for i in rows], device=logprobs.device)[:, None]  # A: [B, 1]
            loss = surrogate(logprobs, logprobs_old, A, args.clip, args.clip_high)
            if args.kl:
                kl = kl_estimate(logprobs, pad(ref, rows))
                loss = loss + args.kl * kl
                metrics["kl"] += (kl.detach() * mask).sum().item() / total
            weights = token_weights(mask, len(part))
            (loss * weights).sum().backward()
            metrics["loss"] += (loss.detach() * weights).sum().item() / args.updates
            ratio = (logprobs.detach() - logprobs_old).exp()
            metrics["clipped"] += ((ratio < 1 - args.clip) | (ratio > 1 + args.clip_high)).sum().item() / total
        metrics["grad_norm"] += torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item() / args.updates
        optimizer.step()
        optimizer.zero_grad()
    gap = (sum(e["logprob"] for e in episodes) + entropy) / total  # of decoding to the training forward, per token
    return dict(metrics) | {"entropy": entropy / total, "logprob_gap": gap}  # the entropy is estimated from the samples


def imitate(model, chat, args, optimizer, dialogues):
    """One gradient step on -log p of all that the assistant says in some dialogues (lists of messages), a mean over all its tokens."""
    episodes = [dict(zip(("ids", "mask"), chat.dialogue_and_mask(messages))) for messages in dialogues]
    total, loss = sum(sum(e["mask"]) for e in episodes), 0.0
    for rows in micro_batches(episodes, range(len(episodes)), args.micro_batch_size):
        logprobs, _ = sampled_logprobs(model, chat, [episodes[i] for i in rows], args.temperature)  # [B, T - 1]
        part = -logprobs.sum() / total
        part.backward()
        loss += part.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss}


# ------------------------------------------------------------------------------------------------------------------- phases
# A step of a phase is a function (run state, batch, stream) -> metrics that takes its gradient steps.


@dataclass
class State:
    """What the phases work on."""

    args: Args
    world: envs.World
    chat: common.Chat
    model: torch.nn.Module  # the agent
    rrm: tuple  # the judge and its chat
    optimizer: torch.optim.Optimizer = None
    reference: torch.nn.Module = None  # the model of this phase as the phase began


def judge_sft(state, batch, stream):
    """The judge imitates the annotator."""
    rrm, chat = state.rrm
    return imitate(rrm, chat, state.args, state.optimizer, [
        [*judge_messages(state.world, e["history"]), {"role": "assistant", "content": annotate(e["flaws"])}] for e in batch])


def judge_grpo(state, batch, stream):
    """The judge's own judgements, paid for how close the score is to the annotator's, with nothing for what cannot be read."""
    args, (rrm, chat) = state.args, state.rrm
    prompts = [chat.prompt(judge_messages(state.world, e["history"])) for e in batch]
    replies = common.generate(rrm, chat, prompts, max_new_tokens=args.judge_tokens, temperature=args.temperature, samples=args.group_size,
                              seeds=[common.row_seed(args.seed, *stream, i) for i in range(len(prompts) * args.group_size)])
    episodes = [{"ids": prompts[i // args.group_size] + ids, "mask": [0] * len(prompts[i // args.group_size]) + [1] * len(ids),
                 "logprob": sum(logprobs)} for i, (ids, logprobs) in enumerate(zip(replies.ids, replies.logprobs))]
    returns = [judge_reward(text, process_score(batch[i // args.group_size]["flaws"])) for i, text in enumerate(replies.texts)]
    losses = update(rrm, state.reference, chat, args, state.optimizer, episodes, group_advantages(returns, args.group_size))
    return losses | {"reward": common.mean(returns), "groups_without_spread": without_spread(returns, args.group_size),
                     "tokens": sum(map(len, replies.ids))}


def cold_start(state, batch, stream):
    """The agent imitates correct trajectories, as first attempts and as second ones."""
    return imitate(state.model, state.chat, state.args, state.optimizer, [
        opening(state.world, e["history"][0], before) + spoken(e["history"]) for e in batch for before in (None, (e["earlier"], ""))])


def learn(state, batch, stream):
    """First attempts, judgements, second attempts, judgements, one GRPO update. `batch`: a seed per question."""
    args, size = state.args, state.args.group_size
    seeds = [seed for seed in batch for _ in range(size)]
    play = functools.partial(rollout, state.model, state.chat, args, "train", seeds, temperature=args.temperature)
    review = functools.partial(judge, state.rrm, state.world, args)
    first = play(stream=(*stream, 1))  # o1 ~ pi(. | q)
    second, first_judged, second_judged = [], None, []
    if args.variant != "none":
        first_judged = review([e["history"] for e in first], (*stream, 1))  # critique, score ~ RRM(q, o1)
    if args.variant == "U":
        told = [(e["history"], j["critique"]) for e, j in zip(first, first_judged)]
        second = play(stream=(*stream, 2), before=told)  # o2 ~ pi(. | q, o1, critique)
        second_judged = review([e["history"] for e in second], (*stream, 2))
    episodes = interleaved(first, second, size)
    returns = interleaved(attempt_rewards(args, first, first_judged), attempt_rewards(args, second, second_judged), size)
    pool = 2 * size if second and args.pool == "joint" else size
    advantages = group_advantages(returns, pool)
    losses = update(state.model, state.reference, state.chat, args, state.optimizer, episodes, advantages)
    both = [*(first_judged or ()), *second_judged]
    metrics = losses | {"reward": common.mean(returns), "reward_rule": common.mean(e["rule"] for e in episodes),
                        "groups_without_spread": without_spread(returns, pool), "groups": len(returns) // pool,
                        **watch(first), **spent(episodes)}
    if both:
        metrics["tokens"] += sum(j["tokens"] for j in both)
        metrics |= {"reward_model": common.mean(j["score"] for j in both),
                    "judge_parsed": common.mean(j["parsed"] for j in both),
                    "judge_auc": auc([j["score"] for j in both], [e["won"] for e in [*first, *second]]),
                    "leaks": leaks(state.world, first, first_judged)}
    if second:
        metrics |= {f"second_{key}": value for key, value in watch(second).items()}
    for attempt, some, given in (1, first, first_judged or [None] * len(first)), (2, second, second_judged):
        for e, j in zip(some, given):
            e |= {"attempt": attempt, "judgement": j}
    for e, value, advantage in zip(episodes, returns, advantages):
        e |= {"return": value, "advantage": advantage}
    return metrics | {"played": [record(e) for e in episodes]}


# ----------------------------------------------------------------------------------------------------- evaluation and records


def spent(episodes):
    """What rollouts cost; judgements apart."""
    return {"tokens": sum(sum(e["mask"]) for e in episodes), "env_steps": sum(len(e["valid"]) for e in episodes),
            "episodes": len(episodes)}


def watch(episodes):
    """What can be counted over episodes."""
    turns = [(e, t) for e in episodes for t in range(len(e["valid"]))]
    said = [(id(e), aloud(e["history"][2 * t + 1])) for e, t in turns]
    calls = {(id_, reply[max(0, reply.find("<tool_call>")):]) for id_, reply in said}  # without the thought before them
    return {"success": common.mean(e["won"] for e in episodes), "rule": common.mean(e["rule"] for e in episodes),
            "calls": len(turns) / len(episodes), "repeated_calls": (len(said) - len(calls)) / len(episodes),
            "invalid": common.mean(not e["valid"][t] for e, t in turns), "truncated": common.mean(e["truncated"] for e in episodes),
            "speaks_of_a_critique": common.mean("critique" in reply or "reviewer" in reply for _, reply in said)}


def leaks(world, episodes, judgements):
    """The share of the readable critiques that contain the right answer. It is looked up here alone, and only `search` has one to look up;
    yes and no, which any critique may contain, are skipped. None if nothing is left."""
    if not isinstance(world, envs.Search):
        return None
    found = []
    words = lambda text: f" {' '.join(envs.plain_words(text))} "  # noqa: E731
    for e, j in zip(episodes, judgements):
        world.reset(seed=e["seed"], options={"split": e["split"]})
        if j["parsed"] and world.gold not in ("yes", "no"):
            found.append(words(world.gold) in words(j["critique"]))
    return common.mean(found) if found else None


def evaluate(state, split, count, second=False):
    """First attempts on fixed episodes of a split, without judge and critique; or the second ones after them, what variant C is about.
    Returns numbers and the episodes."""
    args, seeds, reviewed = state.args, range(count), {}
    play = functools.partial(rollout, state.model, state.chat, args, split, seeds, temperature=args.eval_temperature)
    played = play(stream=("evaluate",))
    if second:
        judged = judge(state.rrm, state.world, args, [e["history"] for e in played], ("evaluate", split))
        reviewed = {"judge_parsed": common.mean(j["parsed"] for j in judged), "leaks": leaks(state.world, played, judged)}
        played = play(stream=("evaluate", 2), before=[(e["history"], j["critique"]) for e, j in zip(played, judged)])
    return watch(played) | {"se": common.mean_se([float(e["won"]) for e in played])[1]} | reviewed, played


def record(episode):
    """An episode as rollouts.jsonl keeps it: words, not ids."""
    return {key: value for key, value in episode.items() if key not in ("ids", "mask")}


def show(state, episode):
    """An episode as a person reads it, with what the judge says."""
    line = lambda text: "".join(c if c.isprintable() else " " for c in text)[:140]  # noqa: E731
    turns = zip(episode["history"][1::2], episode["history"][2::2])
    lines = [line(episode["history"][0]), *(f"> {line(reply)}\n{line(observation)}" for reply, observation in turns)]
    if state.rrm:
        j = judge(state.rrm, state.world, state.args, [episode["history"]], ("show",))[0]
        lines.append(f"    judge: {j['score']:.1f}. {line(j['think'])} {line(j['critique'])}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- warm-up of a tiny model


def warmup(world, args):
    """What a model made from nothing is taught before it learns by itself: the world's language, and the forms of its replies.

    Episodes come from a random player on the train split, unfiltered, who mostly takes up something it sees, half of the time repeats the
    sentence before its call, and sometimes makes a call of another episode; the agent imitates it, in second attempts as in first ones. To
    copy is practised apart: all calls that take up what is seen. The judge learns its form from judgements of *random* flaws, whatever the
    transcript. No part sees an expert.
    """
    rng, examples, said = random.Random("warm-up"), [], []
    topic = lambda call: envs.read_call(call)[1] or call  # noqa: E731

    def play(seed):
        """Its history, and for each observation the calls that take up a word of it."""
        observation, info = world.reset(seed=seed, options={"split": "train"})
        history, recent, over = [observation], [], False
        while not over:
            recent.append([call for call in info["admissible"] if topic(call) in observation])
            calls = recent[-1] if recent[-1] and rng.random() < 0.8 else info["admissible"]
            calls = said[-1000:] if said and rng.random() < 0.03 else calls
            said.append(rng.choice(rng.choice(by_tool(calls))))
            thoughts = [s for s in re.split(r"(?<=[.?]) ", observation) if topic(said[-1]) in s]
            action = f"{rng.choice(thoughts)}\n{said[-1]}" if thoughts and rng.random() < 0.5 else said[-1]
            observation, _, terminated, truncated, info = world.step(action)
            history += [action, observation]
            over = terminated or truncated
        return history, recent

    for seed in range(args.examples):
        first, recent = play(seed)
        dialogue, turn = opening(world, first[0]) + spoken(first), rng.randrange(len(recent))
        examples.append(dialogue)
        if recent[turn]:
            *earlier, last = dialogue[:2 + 2 * turn]
            examples.append([*earlier, {**last, "content": f"{last['content']}\n{NEXT}"},
                             {"role": "assistant", "content": "\n".join(recent[turn])}])
        if seed % 2:
            judgement = annotate(rng.sample(list(COSTS), rng.choice([0, 0, 1, 1, 2])))
            examples.append((judge_messages(world, first), judgement))
            second, _ = play(seed)
            examples.append(opening(world, first[0], (first, parse_judgement(judgement)["critique"])) + spoken(second))
    rng.shuffle(examples)
    return examples


def by_tool(calls):
    """Lists of calls of one tool. Drawn first among these, rare kinds of call are practised too."""
    tools = {}
    for call in calls:
        tools.setdefault(envs.read_call(call)[0], []).append(call)
    return list(tools.values())


# --------------------------------------------------------------------------------------------------------------------- main


def check_args(args):
    """Everything that can be refused before a model is loaded. Returns the world."""
    common.check_common(args)
    for name in "updates", "rollout_batch_size", "judge_tokens", "judged", "judge_epochs", "cold_epochs", "sft_batch_size", "examples":
        common.check(getattr(args, name) >= 1, f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in "clip", "clip_high", "kl", "score_weight", "judge_retries", "judge_steps", "cold_start", "sft_lr":
        common.check(getattr(args, name) >= 0, f"--{name.replace('_', '-')} must be at least 0, not {getattr(args, name)}")
    common.check(args.group_size > 1, "--group-size must be at least 2: an advantage is a difference within a group")
    common.check(args.batch_size % args.group_size == 0, f"--batch-size must be a multiple of --group-size, not {args.batch_size}")
    common.check(args.batch_size // args.group_size % args.updates == 0,
                 f"--updates must divide the {args.batch_size // args.group_size} questions of a step, not {args.updates}")
    common.check(args.rrm or not args.eval_only or args.variant != "C", "--eval-only --variant C needs a judge: give --rrm")
    common.check(args.variant == "U" or args.pool == "joint", f"--pool {args.pool} is about --variant U, not {args.variant}")
    common.check(not args.rrm or args.variant != "none", "--variant none asks no judge: no --rrm")
    common.check(args.rrm.split(":")[0] != "tiny", f"--rrm is a local directory or a hub id, not {args.rrm}")
    try:
        world = envs.make(args.env)
    except ValueError as error:
        common.refuse(error)
    annotated = isinstance(world, envs.Search)
    common.check(annotated or args.rrm or args.variant == "none" or args.eval_only,
                 f"--env {args.env} has no annotator to train a judge with: give --rrm")
    common.check(annotated or not args.cold_start or args.eval_only or args.variant == "C",
                 f"--env {args.env} has no trajectories for a cold start: --cold-start 0")
    return world


def load(world, args):
    """The model that acts, and its chat; a tiny one is made from `warmup`."""
    if args.model.startswith("tiny") and args.device == "cpu":
        torch.set_num_threads(min(2, torch.get_num_threads()))  # small tensors: more threads only wait for each other
    calls = [part for name in envs.TOOLS for part in envs.tool_call(name, "\0").split("\\u0000")]
    facts = [re.split(r"{\w}", relation.sentence)[1] for relation in envs.RELATIONS.values()]  # '" was written by "'
    constants = [world.system, JUDGE, NEXT, *calls, *facts, *re.split(r"{\w+}|\n", AGAIN), *ADVICE.values(),
                 "<think>", "</think>\n<critique>", "</critique>\n<score>", "</score>", *common.CHANGES_OF_SPEAKER]
    return common.load(args.model, corpus=lambda: warmup(world, args), constants=constants, device=args.device, dtype=args.dtype,
                       thinking=args.thinking)


PHASES = {"cold-start": cold_start, "judge-sft": judge_sft, "judge-grpo": judge_grpo, "learn": learn}
SUPERVISED = "cold-start", "judge-sft"


def plan_of(args, correct, judged):
    """[(phase, update, how many, its batch)], the whole run: epochs over data for the first three phases, --steps for the last.

    correct: trajectories to imitate; judged: how many the judge's SFT has. A batch of the judge holds indices into `judge_examples`, which
    the agent plays after its cold start; SFT and GRPO have different ones.
    """
    plan, questions = [], args.batch_size // args.group_size

    def epochs(phase, data, count, size):
        rng = random.Random(f"plan {phase} {args.seed}")  # its own: the cold start is the same in all variants
        order = [i for _ in range(count) for i in rng.sample(range(len(data)), len(data))]
        return [[data[i] for i in order[j:j + size]] for j in range(0, len(order), size)]

    if correct:
        plan.append(("cold-start", epochs("cold-start", correct, args.cold_epochs, args.sft_batch_size)))
    if judged:
        plan.append(("judge-sft", epochs("judge-sft", range(judged), args.judge_epochs, args.sft_batch_size)))
        plan.append(("judge-grpo", [range(judged + i * questions, judged + (i + 1) * questions) for i in range(args.judge_steps)]))
    if args.variant != "C":
        plan.append(("learn", [[args.seed * 1_000_000_007 + i * questions + g for g in range(questions)] for i in range(args.steps)]))
    return [(phase, i, len(batches), batch) for phase, batches in plan for i, batch in enumerate(batches, 1)]


def main():
    """Cold start, judge, learning."""
    args = common.parse_args(Args)
    if args.quick:
        args = dataclasses.replace(args, steps=2, batch_size=8, micro_batch_size=4, group_size=4, eval_episodes=16, eval_every=1,
                                   save_every=2, judged=16, judge_steps=1, judge_epochs=1, cold_start=min(args.cold_start, 4),
                                   cold_epochs=1, examples=150)
    world = check_args(args)
    out_dir = args.out_dir or f"runs/reagent-{args.env.replace(':', '-')}-s{args.seed}"
    run = None if args.eval_only else common.Run("reagent", args, out_dir)
    judging = args.variant == "C" if args.eval_only else args.variant != "none"  # at test time U and R need no judge
    rrm = None
    if args.rrm and judging:
        rrm = common.load(args.rrm, option="--rrm", device=args.device, dtype=args.dtype, thinking=args.thinking)
    model, chat = load(world, args)
    first = chat.dialogue(opening(world, world.reset(seed=0)[0]))
    common.check(len(first) + args.max_new_tokens <= model.config.max_position_embeddings,
                 f"the first prompt has {len(first)} tokens and --max-new-tokens is {args.max_new_tokens}: "
                 f"beyond the model's context of {model.config.max_position_embeddings}")
    splits = [split for split in ("test", "ood") if split in world.splits]
    if judging:
        rrm = rrm or (copy.deepcopy(model), chat)
        prompt = rrm[1].prompt(judge_messages(world, [world.observation]))
        common.check(len(prompt) + args.judge_tokens <= rrm[0].config.max_position_embeddings,
                     f"the judge's first prompt has {len(prompt)} tokens and --judge-tokens is {args.judge_tokens}: "
                     f"beyond its context of {rrm[0].config.max_position_embeddings}")
    state = State(args, world, chat, model, rrm)

    def evaluations(second):
        """{split: numbers} and an episode of `test`."""
        found = {split: evaluate(state, split, args.eval_episodes, second) for split in splits}
        for split, (numbers, _) in found.items():
            tqdm.write(f"{split}: success {numbers['success']:.3f} (se {numbers['se']:.3f}, n {args.eval_episodes})")
        return {split: numbers for split, (numbers, _) in found.items()}, record(found["test"][1][0])

    if args.eval_only:
        return evaluations(args.variant == "C")
    run.start({"parameters": common.count_parameters(model), "start": common.fingerprint(model)})
    annotated = isinstance(world, envs.Search)
    start = args.seed * 1_000_000_007  # of the seeds that `learn` plays; the others are far from there (but the warm-up's, with --seed 0)
    seeds = lambda offset, count: range(start + offset, start + offset + count)  # noqa: E731
    correct = demonstrations(args, seeds(500_000_000, args.cold_start if args.variant != "C" else 0))  # C is frozen from the start
    plan = plan_of(args, correct, args.judged if judging and not args.rrm else 0)
    phases = ", ".join(f"{n} {phase}" for phase, n in Counter(phase for phase, *_ in plan).items())
    print(f"{args.env}: {common.count_parameters(model):,} parameters on {common.device_name(args.device)}; updates: {phases or 'none'}; "
          f"{args.batch_size // args.group_size} questions x {args.group_size}{' x 2' if args.variant == 'U' else ''} attempts a step")

    totals, seconds, done, judge_quality, cold_started = Counter(), Counter(), 0, {}, None
    # made when first asked for, by the agent after its cold start; after --resume, too, as it does not learn while the judge does
    judge_data = functools.cache(lambda: judge_examples(
        state, "train", seeds(300_000_000, args.judged + args.judge_steps * args.batch_size // args.group_size), "judged"))
    held_out = functools.cache(lambda: judge_examples(state, "test", range(10_000, 10_000 + min(400, args.judged)), "held out"))
    quality = lambda: {who: watch_judge(rrm, world, args, [e for e in held_out() if e["who"] == who])  # noqa: E731
                       for who in ("players", "agent")}
    if saved := run.resume():
        model.load_state_dict(saved["model"])
        if rrm:
            rrm[0].load_state_dict(saved["rrm"])
        totals, seconds, done = Counter(saved["totals"]), Counter(saved["seconds"]), saved["done"]
        before, before_episode, judge_quality = saved["before"], saved["before_episode"], saved["judge_quality"]
        cold_started = saved["cold_started"]
    else:
        before, before_episode = evaluations(False)

    bar = tqdm(plan[done:], initial=done, total=len(plan), desc="reagent", dynamic_ncols=True)
    for phase, step, steps, batch in bar:
        clock = common.Clock(seconds)
        if phase != "cold-start" and judging and annotated and not judge_quality:
            judge_quality["before"] = quality()
            clock.lap("watching")
        if phase.startswith("judge"):
            batch = [judge_data()[i] for i in batch]
        if (phase, step) == ("judge-sft", 1):
            totals.update(spent([e for e in judge_data() if e["who"] == "agent"]))
        clock.lap("trajectories")
        learner = rrm[0] if phase.startswith("judge") else model
        if step == 1 or state.optimizer is None:
            state.optimizer = torch.optim.AdamW(learner.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
            state.reference = copy.deepcopy(learner) if args.kl and phase not in SUPERVISED else None
            if step > 1:  # resumed within a phase
                state.optimizer.load_state_dict(saved["optimizer"])
                if state.reference:
                    state.reference.load_state_dict(saved["reference"])
        for group in state.optimizer.param_groups:
            group["lr"] = (args.sft_lr if phase in SUPERVISED else args.lr) * min(1, step / 5)
        metrics = PHASES[phase](state, batch, (phase, step))
        played = metrics.pop("played", [])
        totals.update({key: metrics.pop(key, 0) for key in ("tokens", "env_steps", "episodes")})
        totals["gradient_steps"] += 1 if phase in SUPERVISED else args.updates
        clock.lap(phase)
        if step == steps and phase.startswith("judge"):
            judge_quality[phase] = quality()
            common.save_model(run.dir / "rrm", *rrm)
        if step == steps and phase == "cold-start":
            cold_started, _ = evaluations(False)
        if phase == "learn" and step % args.eval_every == 0 and step < steps:
            n = max(1, args.eval_episodes // 5)
            numbers, _ = evaluate(state, "test", n)
            metrics |= {"eval_episodes": n} | {f"eval_{key}": value for key, value in numbers.items()}
            tqdm.write(f"step {step}: test success {numbers['success']:.3f} (se {numbers['se']:.3f}, n {n})")
        clock.lap("watching")
        done += 1
        run.log({"step": done, "phase": phase, "phase_step": step, **metrics, **totals}
                | {f"seconds_{name}": round(value, 2) for name, value in clock.laps.items()})
        run.write_rollouts([{"step": done, **e} for e in played])
        bar.set_postfix({"phase": phase} | {key: f"{metrics[key]:.2f}" for key in ("loss", "success") if key in metrics})
        if done % args.save_every == 0 or done == len(plan) or run.stopping:
            run.save({"model": model.state_dict(), "rrm": rrm and rrm[0].state_dict(), "optimizer": state.optimizer.state_dict(),
                      "reference": state.reference and state.reference.state_dict(), "done": done, "totals": dict(totals),
                      "seconds": dict(seconds), "before": before, "before_episode": before_episode, "judge_quality": judge_quality,
                      "cold_started": cold_started})
        if run.stopping:
            sys.exit(run.stopping)

    after, after_episode = evaluations(args.variant == "C")
    ends = {name: envs.mean_score(envs.make(args.env), player, args.eval_episodes, key="won") for name, player in
            (("random", envs.random_player), ("expert", envs.expert_player))}
    print(f"\nbefore\n{show(state, before_episode)}\n\nafter\n{show(state, after_episode)}\n")
    headline = lambda numbers: {"success": numbers["success"], "se": numbers["se"]}  # noqa: E731
    run.finish({"script": "reagent", "method": "reagent", "arm": args.variant, "env": args.env, "model": args.model, "seed": args.seed,
                "split": "test", "eval_episodes": args.eval_episodes, "before": headline(before["test"]), "after": headline(after["test"]),
                **{f"{when}_{split}": headline(found[split]) for split in splits[1:]
                   for when, found in (("before", before), ("after", after))},
                **{name: {"success": value, "se": se} for name, (value, se) in ends.items()},
                "watched": {"before": before, "cold_started": cold_started, "after": after}, "judge": judge_quality,
                "cold_start": len(correct), "train_episodes": totals["episodes"], "env_steps": totals["env_steps"],
                "generated_tokens": totals["tokens"], "gradient_steps": totals["gradient_steps"],
                "seconds": round(sum(seconds.values()), 1), "peak_memory_bytes": common.peak_memory_bytes(args.device),
                "device": common.device_name(args.device), "git_commit": common.git_commit()}, model, chat)
    print(f"{'':17}{'success':>9}{'se':>8}   (n {args.eval_episodes})")
    for split in splits:
        for when, found in ("before", before), ("cold", cold_started), ("after", after):
            if found:
                print(f"{f'{when} {split}':17}{found[split]['success']:9.3f}{found[split]['se']:8.3f}")
    for name, (value, se) in ends.items():
        print(f"{name:17}{value:9.3f}{se:8.3f}")
    print(f"whole episodes: {run.dir / 'rollouts.jsonl'}")


if __name__ == "__main__":
    main()
