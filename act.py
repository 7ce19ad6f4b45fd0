"""Agentic Critical Training (Liu et al., arXiv 2603.08706): learn which of two actions is better, then imitate, then reinforce.

A demonstration says what to do, never why. ACT asks: here is a state of it, and two actions, the expert's and one of your own; which is
better? The model reasons freely and only the right choice is paid.

 1. pairs: at each state of the demonstrations the start policy proposes actions; those that are not the expert's each make a pair with it.
 2. act: GRPO on the choice. Both actions are shown in random order; reward 1 for the expert's, 0.1 for another one that is possible,
    0 for an impossible one, -0.5 without <action> tags.
 3. il: imitation of the expert's actions, the loss on those alone. 4. rl: GRPO on the policy itself.

--pipeline names the stages, each starts from the model of the one before. Version 1 of the paper has act,il and act,rl, beside il and rl;
version 2 has act,il and act,il,rl, with the controls il; il,il; il,rl; il,rl,rl; act; and in place of act: sft-choice, dpo, no-reasoning.
A stage passes --epochs times over its data, unless --steps says otherwise.

Departures from the paper, and why:
 1. The policy acts in one growing dialogue, so that every token is encoded once; a state is that dialogue up to its last observation, and
    no list of possible actions stands in it (lists would pile up). A question about two actions has the list, once.
 2. One instruction for the policy everywhere: <action> tags, thought optional. Imitation teaches the bare action. So no-reasoning asks for
    an answer at once below an instruction that allows thought, and a thought is not punished.
 3. GRPO (arXiv 2402.03300) takes one gradient step per batch: the ratio is 1, and nothing can be clipped.
 4. --candidates is 2: version 1 took several, version 2 one. A candidate without tags, or proposed twice for a state, or too long for the
    question to fit the context, makes no pair.
 5. --rl episodes is ours: whole episodes of the world, as many updates as its states would have needed.
Early Experience (arXiv 2510.08558), a baseline of the paper, is docs/early_experience.py. The reward table is version 1's, as third parties
report it. A thinking model's native thoughts are off.
The paper's prompts and its GRPO settings are not public; those below are ours.

    python act.py                                        # pairs, ACT, imitation on household with the tiny model: see README
    python act.py --pipeline il,il --out-dir runs/il,il  # a control with equal epochs; every run wants a directory of its own
    python act.py --pipeline act,il,rl --rl episodes --out-dir runs/episodes # reinforcement on whole episodes, not on expert states
    python act.py --pairs runs/act-household-s0/pairs.jsonl --model tiny:32x2 --out-dir runs/small # another model's pairs
    python act.py --model Qwen/Qwen3-4B --env household-full --device cuda --lr 1e-6 --max-new-tokens 512
    python act.py --quick --out-dir runs/quick           # the whole path in under a minute
"""

import copy
import dataclasses
import json
import random
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

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
    seed: int = common.flag(0, "of everything sampled, the demonstrations too; the tiny model is built with seed 0")
    steps: int | None = common.flag(None, "updates per stage; default: as many as --epochs need")
    lr: float = common.flag(3e-4, "AdamW, of all stages, constant after 5 steps (not in the paper; a pretrained model wants about 1e-6)")
    batch_size: int = common.flag(64, "replies per update of a GRPO stage: questions x --group-size (not in the paper)")
    micro_batch_size: int = common.flag(16, "sequences per backward pass; changes memory and speed, not the gradient")
    max_new_tokens: int = common.flag(48, "of one reply (not in the paper)")
    temperature: float = common.flag(1.0, "of the candidates, while training, and of the log-probs (not in the paper)")
    eval_temperature: float = common.flag(0.4, "in evaluation (not in the paper)")
    eval_episodes: int = common.flag(500, "per split, after every stage; the expert's states of a fifth of them are held out")
    eval_every: int = common.flag(20, "updates between evaluations on a fifth of the episodes of `test`")
    eval_only: bool = common.flag(False, "evaluate --model and stop; writes nothing")
    save_every: int = common.flag(20, "updates between checkpoints")
    out_dir: str = common.flag("", "default: runs/act-ENV-sSEED")
    resume: bool = common.flag(False, "continue the run in --out-dir")
    device: str = common.flag("cpu", "cpu, cuda, cuda:1, mps")
    dtype: str = common.flag("auto", "auto (float32 weights; bfloat16 compute on a GPU), float32, bfloat16")
    quick: bool = common.flag(False, "a small run through every line, to see that it works; overrides the sizes")
    # group-relative policy optimisation
    group_size: int = common.flag(8, "replies to one question (not in the paper)")
    kl: float = common.flag(0.1, "weight of the KL to the policy at the start of the stage; 0 switches it off (not in the paper)")
    # ACT
    pipeline: str = common.flag("act,il", "stages in their order, of: act, il, rl, sft-choice, dpo, no-reasoning")
    sft_batch_size: int = common.flag(16, "examples per update of a supervised stage (not in the paper)")
    epochs: int = common.flag(3, "passes of every stage over its data (paper: 3 in version 2)")
    num_demos: int = common.flag(40, "episodes of the world's expert (paper: about 10 thousand pairs)")
    demos: str = common.flag("", "demonstrations from a JSON lines file in place of the expert's")
    candidates: int = common.flag(2, "actions that the start policy proposes per state (paper: 1 in version 2, several in version 1)")
    pairs: str = common.flag("", "pairs from a JSON lines file, of another run or model")
    rl: str = common.flag("states", "on single states of demonstrations (paper, version 1), or on episodes", choices=["states", "episodes"])
    dpo_beta: float = common.flag(0.1, "of the stage dpo (not in the paper)")
    examples: int = common.flag(8000, "rounds of warm-up examples that make a tiny model")


# ------------------------------------------------------------------------------------------------------ prompts and parsers
# The wording is ours. A world's own system prompt comes first.

POLICY = "Think as long as you need, then write your next action as <action>the action</action>."
CHOOSE = "Two actions are proposed. Think about which one is better now, then write that one as <action>the action</action>."
CHOOSE_NOW = "Two actions are proposed. Write the better one at once, without a word of thought, as <action>the action</action>."
READ = "Repeat the task, and what the last action brought."  # in the warm-up of a tiny model only


def tagged(action):
    """How the policy writes an action."""
    return f"<action>{action}</action>"


def parse_action(reply):
    """The action in the last pair of tags, or None."""
    found = re.findall(r"<action>([^<>]*)</action>", reply)
    return found[-1].strip() if found else None


def normal(action):
    """Equal for actions that mean the same: small letters, single spaces, no final period."""
    return " ".join(action.lower().split()).rstrip(". ")


def dialogue(world, messages):
    """The policy's view of a state. `messages`: user and assistant by turns, ending with an observation; assistant: the bare actions."""
    said = [{**m, "content": tagged(m["content"])} if m["role"] == "assistant" else m for m in messages]
    return [{"role": "system", "content": f"{world.system}\n{POLICY}"}, *said]


def question(world, example, order, instruction=CHOOSE):
    """Which of two actions? `order` False: the expert's is Action 1."""
    one, two = (example["candidate"], example["expert"]) if order else (example["expert"], example["candidate"])
    *before, last = dialogue(world, example["messages"])
    possible = f"Possible now: {', '.join(example['admissible'])}.\n" if example["admissible"] else ""
    return [*before, {**last, "content": f"{last['content']}\n{possible}{instruction}\nAction 1: {one}\nAction 2: {two}"}]


def choice_reward(reply, example):
    """The reward table of the paper's version 1: (reward, its row)."""
    action = parse_action(reply)
    if action is None:
        return -0.5, "untagged"
    if normal(action) == normal(example["expert"]):
        return 1.0, "right"
    possible = example["admissible"] or [example.get("candidate", "")]  # without a list the candidate has to count as possible
    return (0.1, "possible") if normal(action) and normal(action) in map(normal, possible) else (0.0, "impossible")


# ---------------------------------------------------------------------------------------------------- demonstrations and pairs

STATE = {"env": str, "split": str, "seed": int, "turn": int, "messages": list, "admissible": (list, type(None)), "expert": str}


def demonstrations(args, split, seeds):
    """The states of the expert's episodes, one dict each: `messages` up to now, what is `admissible`, and what the `expert` does."""
    states, world = [], envs.make(args.env)
    for seed in seeds:
        observation, info = world.reset(seed=seed, options={"split": split})
        messages, over = [{"role": "user", "content": observation}], False
        while not over:
            action = world.expert()
            states.append({"env": args.env, "split": split, "seed": seed, "turn": len(messages) // 2, "messages": list(messages),
                           "admissible": info["admissible"], "expert": action})
            observation, _, terminated, truncated, info = world.step(action)
            messages += [{"role": "assistant", "content": action}, {"role": "user", "content": observation}]
            over = terminated or truncated
    world.close()
    return states


def read_examples(path, keys):
    """A JSON lines file of states or pairs; the first line that is not one is named, in `common.refuse`."""
    import datasets  # takes a second, and most runs need none of it

    common.check(Path(path).is_file(), f"{path}: no such file")
    common.check(Path(path).stat().st_size, f"{path} is empty")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:  # as text: the JSON loader guesses types, takes words for dates and names no line
        try:
            lines = datasets.load_dataset("text", data_files=path, split="train", cache_dir=cache, encoding_errors="replace")["text"][:]
        except Exception as error:  # a pattern, an archive and the like in place of a plain name have their own exceptions each
            common.refuse(f"{path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    rows = []
    for n, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is valid JSON, but no text
            missing = [key for key, kind in keys.items() if key not in row or not isinstance(row[key], kind)]
            missing += ["admissible"] * (not missing and not all(isinstance(a, str) for a in row["admissible"] or ()))
            roles = not missing and [m["role"] for m in row["messages"] if isinstance(m["content"], str)]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            common.refuse(f"{path}, line {n}: {type(error).__name__}: {error}")
        common.check(not missing, f"{path}, line {n}: {missing and missing[0]!r} is missing or of the wrong kind")
        common.check(roles and len(roles) == len(row["messages"]) and roles == ["user", "assistant"] * (len(roles) // 2) + ["user"],
                     f"{path}, line {n}: messages must be of user and assistant by turns, and end with user")
        rows.append(row)
    return rows


def make_pairs(model, chat, world, args, states, stream):
    """The start policy's own proposals at the states, each beside the expert's action; equal ones are dropped. Returns (pairs, counts)."""
    replies = common.generate(
        model, chat, [chat.dialogue(dialogue(world, s["messages"])) for s in states], max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, samples=args.candidates, seeds=[common.row_seed(args.seed, *stream, i) for i in
                                                                      range(len(states) * args.candidates)])
    room = model.config.max_position_embeddings - args.max_new_tokens
    pairs, counts = [], Counter(proposed=len(replies.texts), tokens=sum(map(len, replies.ids)))
    for i, state in enumerate(states):
        seen = {normal(state["expert"])}
        for reply in replies.texts[i * args.candidates:(i + 1) * args.candidates]:
            action = parse_action(reply)
            kind = "untagged" if not action else "equal" if normal(action) == normal(state["expert"]) else "kept"
            if kind == "kept" and normal(action) in seen:
                kind = "repeated"
            if kind == "kept" and len(chat.dialogue(question(world, {**state, "candidate": action}, False))) > room:
                kind = "too long"
            counts[kind] += 1
            if kind == "kept":
                seen.add(normal(action))
                pairs.append({**state, "candidate": action, "model": args.model})
    return pairs, dict(counts)


# ------------------------------------------------------------------------------------------------------------------ rollout


@torch.no_grad()
def rollout(model, chat, args, split, seeds, *, temperature, stream, first=0):
    """Plays an episode per seed, all at once. Returns dicts; `ids` and `mask` are for the loss.

    `stream` names the randomness: a row's replies depend on (--seed, stream, row, turn) and on nothing else; rows count from `first`.
    """
    worlds, episodes = [envs.make(args.env) for _ in seeds], []
    for world, seed in zip(worlds, seeds):
        observation, _ = world.reset(seed=seed, options={"split": split})
        episodes.append({"split": split, "seed": seed, "history": [observation], "valid": [], "reward": 0.0, "won": False, "score": 0.0,
                         "over": False, "truncated": False})
    dialogues = common.Dialogues(model, chat, [
        chat.dialogue(dialogue(w, [{"role": "user", "content": e["history"][0]}])) for w, e in zip(worlds, episodes)])
    context = model.config.max_position_embeddings - args.max_new_tokens
    live = list(range(len(episodes)))
    while live := [i for i in live if not episodes[i]["over"] and not episodes[i]["truncated"]]:
        replies = dialogues.reply(live, max_new_tokens=args.max_new_tokens, temperature=temperature, seeds=[
            common.row_seed(args.seed, *stream, first + i, len(episodes[i]["history"])) for i in live])
        for i, reply in zip(live, replies):
            e = episodes[i]
            observation, reward, terminated, truncated, info = worlds[i].step(parse_action(reply) or "")
            e["history"] += [reply, observation]
            e["valid"].append(info["valid"])
            e["reward"] += reward
            e.update(won=info["won"], score=info["score"], over=terminated or truncated)
        live = [i for i in live if not episodes[i]["over"]]
        dialogues.extend(live, [episodes[i]["history"][-1] for i in live])
        for i in live:  # a full context ends the episode; old turns are never dropped
            episodes[i]["truncated"] = len(dialogues.ids[i]) > context
    for world in worlds:
        world.close()
    for i, e in enumerate(episodes):
        e["ids"], e["mask"], e["logprob"] = dialogues.sampled(i)
    return episodes


def answer(model, chat, args, prompts, stream, samples=1, temperature=None):
    """`samples` replies to each prompt, as single-turn episodes with `ids`, `mask`, `logprob` and `text`."""
    replies = common.generate(
        model, chat, prompts, max_new_tokens=args.max_new_tokens, temperature=args.temperature if temperature is None else temperature,
        samples=samples, seeds=[common.row_seed(args.seed, *stream, i) for i in range(len(prompts) * samples)])
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    return [{"ids": prompt + ids, "mask": [0] * len(prompt) + [1] * len(ids), "logprob": sum(logprobs), "text": text}
            for prompt, ids, logprobs, text in zip(prompts, replies.ids, replies.logprobs, replies.texts)]


# --------------------------------------------------------------------------------------------------------------- advantages


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


def micro_batches(episodes, size):
    """The indices of episodes in batches of `size`; neighbours of one length need little padding."""
    rows = sorted(range(len(episodes)), key=lambda i: len(episodes[i]["ids"]))
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def token_weights(mask, episodes):
    """The mean over trajectories of the mean over their tokens, as weights [B, T - 1]. `episodes`: of the whole step, not of [B, T]."""
    return mask / (episodes * mask.sum(1, keepdim=True).clamp(min=1))


def kl_estimate(logprobs, reference):
    """KL(pi || reference) per sampled token, the estimator of low variance: e^d - d - 1 with d = log reference - log pi."""
    d = reference - logprobs
    return d.exp() - d - 1


def grpo_step(model, reference, chat, args, episodes, advantages):
    """Accumulates the gradient of GRPO's objective (and the KL) over all sampled tokens. Returns metrics."""
    total = sum(sum(e["mask"]) for e in episodes)
    metrics = Counter(loss=0.0, kl=0.0, entropy=0.0)
    for rows in micro_batches(episodes, args.micro_batch_size):
        some = [episodes[i] for i in rows]
        logprobs, mask = sampled_logprobs(model, chat, some, args.temperature)  # [B, T - 1]
        scale = torch.tensor([advantages[i] for i in rows], device=logprobs.device)[:, None]
        loss = -scale * logprobs  # the gradient of -r A where r = 1: these weights have sampled, there is nothing to clip
        if args.kl:
            with torch.no_grad():
                before, _ = sampled_logprobs(reference, chat, some, args.temperature)
            kl = kl_estimate(logprobs, before)
            loss = loss + args.kl * kl
            metrics["kl"] += (kl.detach() * mask).sum().item() / total
        weights = token_weights(mask, len(episodes))
        (loss * weights).sum().backward()
        metrics["loss"] += (loss.detach() * weights).sum().item()
        metrics["entropy"] -= logprobs.detach().sum().item() / total
    gap = sum(e["logprob"] for e in episodes) / total + metrics["entropy"]  # of decoding to the training forward, per token
    return dict(metrics) | {"logprob_gap": gap}


def imitation_step(model, chat, args, pairs):
    """Accumulates the gradient of the mean over all target tokens of -log p(target | prompt), for (prompt ids, target ids)."""
    total, loss = sum(len(target) for _, target in pairs), 0.0
    pairs = sorted(pairs, key=lambda pair: len(pair[0]))
    for i in range(0, len(pairs), args.micro_batch_size):
        logprobs, mask = common.target_logprobs(model, chat, *zip(*pairs[i:i + args.micro_batch_size]), args.temperature)
        part = -(logprobs * mask).sum() / total
        part.backward()
        loss += part.item()
    return {"loss": loss}


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    """- log sigmoid(beta (log-ratio chosen - log-ratio rejected)), of log-probs of whole actions [B] (arXiv 2305.18290, eq. 7)."""
    return -torch.nn.functional.logsigmoid(beta * (chosen - reference_chosen - rejected + reference_rejected))


def dpo_step(model, reference, chat, args, triples):
    """Accumulates the gradient of the mean DPO loss over (prompt ids, chosen ids, rejected ids)."""
    loss, right = 0.0, 0.0

    def score(weights, rows, which):
        logprobs, mask = common.target_logprobs(weights, chat, [row[0] for row in rows], [row[which] for row in rows], args.temperature)
        return (logprobs * mask).sum(1)

    for i in range(0, len(triples), args.micro_batch_size):
        rows = triples[i:i + args.micro_batch_size]
        with torch.no_grad():
            before = score(reference, rows, 1), score(reference, rows, 2)
        now = score(model, rows, 1), score(model, rows, 2)
        part = dpo_loss(*now, *before, args.dpo_beta).sum() / len(triples)
        part.backward()
        loss += part.item()
        right += (now[0] - before[0] > now[1] - before[1]).float().sum().item() / len(triples)
    return {"loss": loss, "chosen_gained_more": right}


# ------------------------------------------------------------------------------------------------------------------- stages
# A stage is a function (model, reference, chat, world, args, batch, order, stream) -> metrics that accumulates the gradient of one update.
# `batch`: states for il and rl, pairs for the others; `order`: a coin per pair, whether the expert's action is shown second.


def reinforce(model, reference, chat, args, episodes, paid, asked):
    """The GRPO update of a stage, and what there is to log of it. `paid`: (reward, row of the reward table) per episode; `asked`: its pair,
    its state, or itself."""
    returns = [reward for reward, _ in paid]
    metrics = grpo_step(model, reference, chat, args, episodes, group_advantages(returns, args.group_size))
    rows = Counter(row for _, row in paid)
    return metrics | {
        "reward": common.mean(returns), "groups": len(returns) // args.group_size, "rows": {k: n / len(paid) for k, n in rows.items()},
        "groups_without_spread": without_spread(returns, args.group_size), "length": common.mean(sum(e["mask"]) for e in episodes),
        "tokens": sum(sum(e["mask"]) for e in episodes), "env_steps": sum(len(e.get("valid", ())) for e in episodes),
        "episodes": sum("valid" in e for e in episodes),
        "rollouts": [{key: value for key, value in {**what, "reply": e.get("text"), "paid": reward, "row": row}.items()
                      if key in ("split", "seed", "turn", "history", "expert", "candidate", "expert_second", "reply", "paid", "row")}
                     for what, e, (reward, row) in zip(asked, episodes, paid)]}


def share(truths):
    """How many hold, of those there are; nan (null in the files) where there are none, as 0 would read as "always wrong"."""
    return common.mean_se(truths)[0]


def act_stage(model, reference, chat, world, args, batch, order, stream, instruction=CHOOSE):
    """Which of two actions is better? GRPO."""
    prompts = [chat.dialogue(question(world, pair, coin, instruction)) for pair, coin in zip(batch, order)]
    episodes = answer(model, chat, args, prompts, stream, args.group_size)
    asked = [{**pair, "expert_second": coin} for pair, coin in zip(batch, order) for _ in range(args.group_size)]
    paid = [choice_reward(e["text"], pair) for e, pair in zip(episodes, asked)]
    return reinforce(model, reference, chat, args, episodes, paid, asked) | {
        "right_if_first": share(row == "right" for (_, row), pair in zip(paid, asked) if not pair["expert_second"]),
        "right_if_second": share(row == "right" for (_, row), pair in zip(paid, asked) if pair["expert_second"])}


def no_reasoning_stage(*arguments):
    """ACT without a thought."""
    return act_stage(*arguments, instruction=CHOOSE_NOW)


def il_stage(model, reference, chat, world, args, batch, order, stream):
    """Imitation: the loss is on the expert's action alone."""
    return imitation_step(model, chat, args, [
        (chat.dialogue(dialogue(world, s["messages"])), chat.reply(tagged(s["expert"]))) for s in batch])


def rl_stage(model, reference, chat, world, args, batch, order, stream):
    """GRPO on the policy: at states of the demonstrations, paid for the expert's action; or on whole episodes, paid by the world."""
    if args.rl == "states":
        episodes = answer(model, chat, args, [chat.dialogue(dialogue(world, s["messages"])) for s in batch], stream, args.group_size)
        asked = [state for state in batch for _ in range(args.group_size)]
        rows = [choice_reward(e["text"], state)[1] for e, state in zip(episodes, asked)]
        paid = [(float(row == "right"), row) for row in rows]
    else:
        seeds = [common.row_seed(args.seed, *stream, g) % 2**40 for g in range(len(batch)) for _ in range(args.group_size)]
        episodes = rollout(model, chat, args, "train", seeds, temperature=args.temperature, stream=stream)
        asked = episodes
        paid = [(e["reward"], "right" if e["won"] else "lost") for e in episodes]
    return reinforce(model, reference, chat, args, episodes, paid, asked)


def sft_choice_stage(model, reference, chat, world, args, batch, order, stream):
    """The right choice, imitated."""
    return imitation_step(model, chat, args, [
        (chat.dialogue(question(world, pair, coin)), chat.reply(tagged(pair["expert"]))) for pair, coin in zip(batch, order)])


def dpo_stage(model, reference, chat, world, args, batch, order, stream):
    """Direct preference for the expert's action over the candidate, as the policy's reply to the state."""
    return dpo_step(model, reference, chat, args, [
        (chat.dialogue(dialogue(world, pair["messages"])), chat.reply(tagged(pair["expert"])), chat.reply(tagged(pair["candidate"])))
        for pair in batch])


STAGES = {"act": act_stage, "il": il_stage, "rl": rl_stage, "sft-choice": sft_choice_stage, "dpo": dpo_stage,
          "no-reasoning": no_reasoning_stage}
PAIRED = "act", "sft-choice", "dpo", "no-reasoning"  # these need pairs
SUPERVISED = "il", "sft-choice", "dpo"


def schedule(args, stage, examples, index):
    """The batches of a stage: `--epochs` passes over the examples, each in an order of its own. [(indices, coins)] per update."""
    size = args.sft_batch_size if stage in SUPERVISED else args.batch_size // args.group_size
    rng, batches = random.Random(f"{args.seed} {index} {stage}"), []
    while len(batches) < (args.steps or args.epochs * -(-examples // size)):
        order = rng.sample(range(examples), examples)
        batches += [order[i:i + size] for i in range(0, examples, size)]
    return [(batch, [rng.random() < 0.5 for _ in batch]) for batch in batches[:args.steps]]


# ----------------------------------------------------------------------------------------------------- evaluation and records


AT_ONCE = 256  # episodes of an evaluation that share a cache: what bounds its memory


def evaluate(model, chat, args, split, episodes):
    """The policy on fixed episodes of a split: nothing but its dialogue. Returns ({"success", "se", ...}, episodes)."""
    played = []
    for i in range(0, episodes, AT_ONCE):
        played += rollout(model, chat, args, split, range(i, min(i + AT_ONCE, episodes)), temperature=args.eval_temperature,
                          stream=("evaluate",), first=i)
    return {"success": common.mean(e["won"] for e in played), "se": common.mean_se([float(e["won"]) for e in played])[1],
            "turns": common.mean(len(e["valid"]) for e in played),
            "invalid": common.mean(not v for e in played for v in e["valid"])}, played


def held_out_accuracy(model, chat, world, args, states, pairs):
    """On states that no stage has seen: how often the policy does as the expert, and how often the right action is chosen, by position."""
    said = answer(model, chat, args, [chat.dialogue(dialogue(world, s["messages"])) for s in states], ("held out", "policy"),
                  temperature=args.eval_temperature)
    out = {"next_action": common.mean(choice_reward(e["text"], s)[1] == "right" for e, s in zip(said, states))}
    for place, coin in ("first", False), ("second", True):
        chosen = answer(model, chat, args, [chat.dialogue(question(world, pair, coin)) for pair in pairs], ("held out", place),
                        temperature=args.eval_temperature)
        out[f"choice_{place}"] = share(choice_reward(e["text"], pair)[1] == "right" for e, pair in zip(chosen, pairs))
    return out | {"choice": (out["choice_first"] + out["choice_second"]) / 2}


def record(episode):
    """An episode as rollouts.jsonl keeps it: words, not ids."""
    return {key: value for key, value in episode.items() if key not in ("ids", "mask")}


def show(episode):
    """An episode as a person reads it."""
    line = lambda text: "".join(c if c.isprintable() else " " for c in text)[:140]  # noqa: E731
    turns = zip(episode["history"][1::2], episode["history"][2::2])
    return "\n".join([line(episode["history"][0]), *(f"> {line(reply)}\n{line(observation)}" for reply, observation in turns)])


# ------------------------------------------------------------------------------------------------- warm-up of a tiny model


def warmup(world, args):
    """What a model made from nothing is taught before it learns by itself: the world's language, and the forms of its replies.

    Episodes come from a random player on the train split, unfiltered. The policy imitates it, half of the time after a thought that
    repeats the task and what happened last; asked to, it writes that alone. Asked for one of two actions, which are random ones, it picks
    either. No part sees an expert.
    """
    rng, examples = random.Random("warm-up"), []
    for seed in range(args.examples):
        observation, info = world.reset(seed=seed, options={"split": "train"})
        messages, possible, over = [{"role": "user", "content": observation}], [], False
        while not over:
            possible.append(info["admissible"])
            action = rng.choice(rng.choice(by_verb(possible[-1])))
            observation, _, terminated, truncated, info = world.step(action)
            messages += [{"role": "assistant", "content": action}, {"role": "user", "content": observation}]
            over = terminated or truncated
        facts = [f"{world.task} {event(m['content'])}" for m in messages[::2]]
        turns = [rng.randrange(rng.randint(1, len(possible))) for _ in range(4)]  # mostly early: more of them in the same time

        said = dialogue(world, messages[:2 * turns[0] + 2])
        for turn, message in enumerate(said[2::2]):
            message["content"] = f"{facts[turn]} {message['content']}" if rng.random() < 0.5 else message["content"]
        examples.append(said)
        for turn, instruction in zip(turns[1:], (CHOOSE, CHOOSE_NOW)):
            one, two = rng.sample(possible[turn], 2) if len(possible[turn]) > 1 else possible[turn] * 2
            pair = {"messages": messages[:2 * turn + 1], "admissible": possible[turn], "expert": one, "candidate": two}
            thought = f"{facts[turn]} " if instruction == CHOOSE else ""
            examples.append([*question(world, pair, False, instruction),
                             {"role": "assistant", "content": thought + tagged(rng.choice([one, two]))}])
        *before, last = dialogue(world, messages[:2 * turns[3] + 1])
        examples.append([*before, {**last, "content": f"{last['content']}\n{READ}"}, {"role": "assistant", "content": facts[turns[3]]}])
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
    """Everything that can be refused before a model is loaded. Returns the world, the stages, and the files' states and pairs (or None)."""
    common.check_common(args)
    for name in "sft_batch_size", "epochs", "num_demos", "candidates", "examples":
        common.check(getattr(args, name) >= 1, f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in "kl", "dpo_beta":
        common.check(getattr(args, name) >= 0, f"--{name.replace('_', '-')} must be at least 0, not {getattr(args, name)}")
    common.check(args.group_size > 1, "--group-size must be at least 2: an advantage is a difference within a group")
    common.check(args.batch_size % args.group_size == 0, f"--batch-size must be a multiple of --group-size, not {args.batch_size}")
    stages = [stage.strip() for stage in args.pipeline.split(",")]
    unknown = [stage for stage in stages if stage not in STAGES]
    common.check(not unknown, f"--pipeline: unknown stage {unknown and unknown[0]!r}; there are: {', '.join(STAGES)}")
    try:
        world = envs.make(args.env)
    except ValueError as error:
        common.refuse(error)
    common.check(not args.pairs or set(stages) & set(PAIRED), f"--pairs: no stage of --pipeline {args.pipeline} is about pairs")
    demos = read_examples(args.demos, STATE) if args.demos else None
    pairs = read_examples(args.pairs, STATE | {"candidate": str}) if args.pairs else None
    for path, rows in (args.demos, demos), (args.pairs, pairs):
        n, other = next(((n, row["env"]) for n, row in enumerate(rows or (), 1) if row["env"] != args.env), (0, None))
        common.check(other is None, f"{path}, line {n}: about {other!r}, not about --env {args.env}")
        n = next((n for n, row in enumerate(rows or (), 1) if row["split"] != "train"), 0)
        common.check(not n, f"{path}, line {n}: of another split than train, on which nothing is learnt")
    common.check(args.eval_only or callable(getattr(world, "expert", None)),
                 f"--env {args.env} has no expert, whom the held-out states come from")
    return world, stages, demos, pairs


def load(world, args, corpus=None, more=()):
    """The model, and its chat; a tiny one is made from `corpus` (default: `warmup`), with `more` lines that are one token each."""
    if args.model.startswith("tiny") and args.device == "cpu":
        torch.set_num_threads(min(2, torch.get_num_threads()))  # small tensors: more threads only wait for each other
    constants = [f"{world.system}\n{POLICY}", CHOOSE, CHOOSE_NOW, READ, "<action>", "</action>", *common.CHANGES_OF_SPEAKER, *more]
    return common.load(args.model, corpus=corpus or (lambda: warmup(world, args)), constants=constants, device=args.device,
                       dtype=args.dtype)


def main():
    """The pipeline."""
    args = common.parse_args(Args)
    if args.quick:
        args = dataclasses.replace(args, steps=3, batch_size=16, micro_batch_size=8, group_size=4, eval_episodes=16, eval_every=2,
                                   save_every=2, num_demos=4, examples=400)
    world, stages, demos, pairs = check_args(args)
    run = None if args.eval_only else common.Run("act", args, args.out_dir or f"runs/act-{args.env.replace(':', '-')}-s{args.seed}")
    model, chat = load(world, args)
    first = chat.dialogue(dialogue(world, [{"role": "user", "content": world.reset(seed=0)[0]}]))
    common.check(len(first) + args.max_new_tokens <= model.config.max_position_embeddings,
                 f"the first prompt has {len(first)} tokens and --max-new-tokens is {args.max_new_tokens}: "
                 f"beyond the model's context of {model.config.max_position_embeddings}")
    splits = [split for split in ("test", "ood") if split in world.splits]

    def evaluations():
        """{split: numbers} and an episode of `test`."""
        found = {split: evaluate(model, chat, args, split, args.eval_episodes) for split in splits}
        for split, (numbers, _) in found.items():
            tqdm.write(f"{split}: success {numbers['success']:.3f} (se {numbers['se']:.3f}, n {args.eval_episodes})")
        return {split: numbers for split, (numbers, _) in found.items()}, record(found["test"][1][0])

    if args.eval_only:
        return evaluations()

    # demonstrations and pairs; the held-out ones are for evaluation alone
    seconds = Counter()
    clock = common.Clock(seconds)
    demos = demos or demonstrations(args, "train", range(args.seed * 1_000_000_007, args.seed * 1_000_000_007 + args.num_demos))
    held_out = demonstrations(args, "test", range(max(2, args.eval_episodes // 5)))
    longest = max(len(chat.dialogue(question(world, {"candidate": s["expert"], **s}, False))) for s in [*demos, *held_out, *(pairs or ())])
    common.check(longest + args.max_new_tokens <= model.config.max_position_embeddings,
                 f"the longest question has {longest} tokens and --max-new-tokens is {args.max_new_tokens}: "
                 f"beyond the model's context of {model.config.max_position_embeddings}")
    held_out_pairs, _ = make_pairs(model, chat, world, dataclasses.replace(args, candidates=1), held_out, ("held out", "pairs"))
    counts = {}
    if pairs is None and set(stages) & set(PAIRED):
        pairs, counts = make_pairs(model, chat, world, args, demos, ("pairs",))  # by the start weights, when resumed as well
    for stage in stages:
        common.check(pairs or stage not in PAIRED,
                     f"stage {stage}: no pairs, as every candidate was the expert's action, untagged or too long")
    clock.lap("pairs")
    run.start({"parameters": common.count_parameters(model), "start": common.fingerprint(model)})
    for name, rows in ("demos", demos), ("pairs", pairs):
        common.write_jsonl(run.dir / f"{name}.jsonl", rows or [])
    plan = []
    for index, stage in enumerate(stages):
        batches = schedule(args, stage, len(pairs if stage in PAIRED else demos), index)
        plan += [(index, stage, step, len(batches), *batch) for step, batch in enumerate(batches, 1)]
    print(f"{args.env}: {common.count_parameters(model):,} parameters on {common.device_name(args.device)}; {len(demos)} expert states, "
          f"{len(pairs or ())} pairs {counts or ''}; {' -> '.join(stages)}, {len(plan)} updates")

    reference, optimizer, done, after_episode = copy.deepcopy(model), None, 0, None
    totals = Counter(tokens=counts.get("tokens", 0))
    if state := run.resume():
        common.check(state["steps"] == args.steps, f"--resume: --steps, which was {state['steps']}, decides where each stage ends")
        model.load_state_dict(state["model"])
        reference.load_state_dict(state["reference"])
        totals, done, found = Counter(state["totals"]), state["done"], state["found"]
        seconds.update(state["seconds"])
        before_episode, after_episode = state["before_episode"], state["after_episode"]
    else:
        numbers, before_episode = evaluations()
        found = [{"stage": "before", **numbers, **held_out_accuracy(model, chat, world, args, held_out, held_out_pairs)}]

    bar = tqdm(plan[done:], initial=done, total=len(plan), desc="act", dynamic_ncols=True)
    for index, stage, step, steps, batch, order in bar:
        clock = common.Clock(seconds)
        if step == 1:
            reference.load_state_dict(model.state_dict())  # the policy at the start of the stage
        if step == 1 or optimizer is None:
            optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
        if step > 1 and done == (state or {}).get("done"):
            optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 5)
        examples = [(pairs if stage in PAIRED else demos)[i] for i in batch]
        metrics = STAGES[stage](model, reference, chat, world, args, examples, order, (index, step))
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        totals.update(tokens=metrics.pop("tokens", 0), env_steps=metrics.pop("env_steps", 0), episodes=metrics.pop("episodes", 0),
                      gradient_steps=1)
        clock.lap(stage)
        run.write_rollouts([{"stage": f"{index + 1}-{stage}", "step": step, **said} for said in metrics.pop("rollouts", ())])
        if step == steps:
            numbers, after_episode = evaluations()
            found.append({"stage": stage, **numbers, **held_out_accuracy(model, chat, world, args, held_out, held_out_pairs)})
            common.save_model(run.dir / f"{index + 1}-{stage}", model, chat)
            run.write_rollouts([{"stage": f"{index + 1}-{stage}", **after_episode}])
        elif step % args.eval_every == 0:
            n = max(1, args.eval_episodes // 5)
            numbers, _ = evaluate(model, chat, args, "test", n)
            metrics |= {"eval_episodes": n} | {f"eval_{key}": value for key, value in numbers.items()}
            tqdm.write(f"{stage} {step}: test success {numbers['success']:.3f} (se {numbers['se']:.3f}, n {n})")
        clock.lap("watching")
        done += 1
        run.log({"step": done, "stage": f"{index + 1}-{stage}", "stage_step": step, **metrics, **totals}
                | {f"seconds_{name}": round(value, 2) for name, value in clock.laps.items()})
        bar.set_postfix({"stage": stage} | {key: f"{metrics[key]:.2f}" for key in ("loss", "reward") if key in metrics})
        if done % args.save_every == 0 or done == len(plan) or run.stopping:
            run.save({"model": model.state_dict(), "reference": reference.state_dict(), "optimizer": optimizer.state_dict(), "done": done,
                      "steps": args.steps, "totals": dict(totals), "seconds": dict(seconds), "found": found,
                      "before_episode": before_episode, "after_episode": after_episode})
        if run.stopping:
            sys.exit(run.stopping)

    ends = {name: envs.mean_score(envs.make(args.env), player, args.eval_episodes, key="won") for name, player in
            (("random", envs.random_player), ("expert", envs.expert_player))}
    print(f"\nbefore\n{show(before_episode)}\n\nafter\n{show(after_episode)}\n")
    score = lambda numbers: {"success": numbers["success"], "se": numbers["se"]}  # noqa: E731
    before, after = found[0], found[-1]
    run.finish({"script": "act", "method": "act", "arm": args.pipeline, "env": args.env, "model": args.model, "seed": args.seed,
                "split": "test", "eval_episodes": args.eval_episodes, "before": score(before["test"]), "after": score(after["test"]),
                **{f"{when}_{split}": score(numbers[split]) for split in splits[1:]
                   for when, numbers in (("before", before), ("after", after))},
                **{name: {"success": value, "se": se} for name, (value, se) in ends.items()},
                "stages": found, "expert_states": len(demos), "pairs": len(pairs or ()), "pair_counts": counts,
                "train_episodes": len({(s["split"], s["seed"]) for s in demos}) + totals["episodes"],
                "env_steps": totals["env_steps"], "generated_tokens": totals["tokens"],
                "gradient_steps": totals["gradient_steps"], "seconds": round(sum(seconds.values()), 1),
                "peak_memory_bytes": common.peak_memory_bytes(args.device), "device": common.device_name(args.device),
                "git_commit": common.git_commit()}, model, chat)
    print(f"{'':14}" + "".join(f"{split:>9}{'se':>8}" for split in splits)
          + f"{'next':>9}{'choice':>9}   (n {args.eval_episodes}; next action and choice: {len(held_out)} held-out states)")
    for numbers in found:
        cells = "".join(f"{numbers[split]['success']:9.3f}{numbers[split]['se']:8.3f}" for split in splits)
        print(f"{numbers['stage']:14}{cells}{numbers['next_action']:9.3f}{numbers['choice']:9.3f}")
    for name, (value, se) in ends.items():
        print(f"{name:14}{value:9.3f}{se:8.3f}")
    print(f"stages and pairs: {run.dir}")


if __name__ == "__main__":
    main()
