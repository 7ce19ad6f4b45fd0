"""Agentic Critical Training (Liu et al., arXiv 2603.08706): judge two actions, imitate, reinforce.

A demonstration says what to do, never why. ACT asks: here is a state of it, and two actions, the
expert's and one of your own; which is better? The model reasons freely, only the choice is paid.

 1. pairs: at each state s_i of the demonstrations the start policy proposes actions; each that is
    not the expert's makes a pair with it: (s_i, a_i+, a_i-).
 2. act: GRPO on the choice. Both actions are shown in random order; R = R_acc + R_adm + R_fmt is
    1 for the expert's, 0.1 for another one that is possible, 0 for an impossible one, and -0.5
    without <action> tags.
 3. il: imitation of the expert's replies. 4. rl: GRPO on the policy itself.

--pipeline names the stages; each starts from the model of the one before and passes --epochs times
over its data, unless --steps says otherwise. Version 2 of the paper has act,il and act,il,rl, with
the controls il; il,il; il,rl; il,rl,rl; act; and in place of act: sft-choice, dpo, no-reasoning.
Version 1 has act,il and act,rl beside il and rl.

Departures from the paper, and why:
 1. The policy acts in one growing dialogue, so that every token is encoded once; a state is that
    dialogue up to its last observation, without a list of possible actions (lists would pile up;
    --show-actions has them all the same). A question about two actions has the list, once.
 2. One instruction for the policy everywhere: thought, as much as it likes, then <action> tags.
    Imitation teaches the bare action. So no-reasoning asks for an answer at once below an
    instruction that allows thought, and a thought is not punished.
 3. GRPO (arXiv 2402.03300) takes one gradient step per batch: the ratio is 1, nothing is clipped.
 4. A candidate without tags, or proposed twice for a state, or too long for the question to fit
    the context, makes no pair; a state too long for the context is left out, and counted.
 5. A choice may be named by its number ("Action 1") where the paper wants the action.
 6. A reply that the limit cut off before its tags is left out of its group: advantage 0, and the
    others are compared among themselves. -0.5 would punish thinking for our limit; a plain 0
    would pay, beside a -0.5, for never coming to an end. `cut_choice`, `cut_action`: how many.
 7. --rl episodes is ours: whole episodes of the world, as many updates as its states would need.
The reward table is version 1's, as third parties report it. The prompts and the settings of GRPO
are not public; those below are ours. Early Experience (arXiv 2510.08558), a baseline of the paper,
is docs/early_experience.py.

    python act.py                                        # the tiny model on household: see README
    python act.py --pipeline il,il --out-dir runs/il,il  # a control with equal epochs
    python act.py --model smollm2 --pipeline il --num-demos 20 --shots 0 --held-out 0
    python act.py --model Qwen/Qwen3-4B --env household-full --device cuda
    python act.py --pairs runs/act-household-s0/pairs.jsonl --model tiny:32x2 --out-dir runs/small
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
    """The command line. "(paper)": version 2's value; "(not in the paper)": it leaves that open."""

    # shared by all scripts
    model: str = common.flag("tiny", "tiny, tiny:WIDTHxLAYERS, smollm2, a .gguf file, a local directory or a hub id")
    env: str = common.flag("household", "a world: a name, NAME:ARGUMENT, or path/to/file.py:Class")
    seed: int = common.flag(0, "of everything sampled, the demonstrations too; the tiny model is built with seed 0")
    steps: int | None = common.flag(None, "updates per stage; default: as many as --epochs need")
    lr: float = common.flag(1e-6, "AdamW, of the GRPO stages, constant after 5 steps (not in the paper)")
    batch_size: int = common.flag(64, "replies per update of a GRPO stage: questions x --group-size (not in the paper)")
    micro_batch_size: int = common.flag(1, "sequences per backward pass; changes memory and speed, not the gradient")
    rollout_batch_size: int = common.flag(64, "episodes or replies sampled side by side; changes memory and speed alone")
    max_new_tokens: int = common.flag(512, "of one reply of the policy (not in the paper)")
    max_context: int | None = common.flag(None, "tokens of a prompt with its reply; default: what the model can read")
    temperature: float = common.flag(1.0, "of the candidates, while training, and of the log-probs (not in the paper)")
    eval_temperature: float = common.flag(0.4, "in evaluation (not in the paper)")
    eval_episodes: int = common.flag(140, "per split, after every stage (paper: 140, and 134 of the other split)")
    eval_every: int = common.flag(20, "updates between evaluations on a fifth of the episodes of `test`")
    eval_only: bool = common.flag(False, "evaluate --model and stop; writes nothing")
    save_every: int = common.flag(20, "updates between checkpoints")
    out_dir: str = common.flag("", "default: runs/act-ENV-sSEED")
    resume: bool = common.flag(False, "continue the run in --out-dir")
    device: str = common.flag(common.default_device(), "cpu, cuda, cuda:1, mps")
    dtype: str = common.flag("auto", "auto (float32 weights; bfloat16 compute on a GPU), float32, bfloat16")
    thinking: bool = common.flag(False, "let a thinking model think natively before each reply")
    shots: int = common.flag(0, "worked examples before the first turn of every part, by a random player on train")
    prefill: bool = common.flag(False, "begin every reply with its marked word, such as Action: (no room to reason before it)")
    show_actions: bool = common.flag(False, "list what is possible now in every observation (one more departure)")
    quick: bool = common.flag(False, "a small run through every line, to see that it works; overrides the sizes")
    # group-relative policy optimisation
    group_size: int = common.flag(8, "replies to one question (not in the paper)")
    kl: float = common.flag(
        0.1, "weight of the KL to the policy at the start of the stage; 0: none (not in the paper)")
    # ACT
    pipeline: str = common.flag(
        "act,il", "stages in their order, of act, il, rl, sft-choice, dpo, no-reasoning (paper)")
    epochs: int = common.flag(3, "passes of every stage over its data (paper)")
    candidates: int = common.flag(
        1, "actions that the start policy proposes per state (paper; version 1: several)")
    num_demos: int = common.flag(
        200, "episodes of the world's expert (paper: about 10 thousand pairs)")
    demos: str = common.flag("", "demonstrations from a JSON lines file in place of the expert's")
    pairs: str = common.flag("", "pairs from a JSON lines file, of another run or model")
    choice_tokens: int = common.flag(
        1024, "of one reply to which of two actions is better (not in the paper)")
    sft_lr: float = common.flag(1e-5, "AdamW, of il, sft-choice and dpo (not in the paper)")
    sft_batch_size: int = common.flag(16, "episodes per update of il (not in the paper)")
    pair_batch_size: int = common.flag(
        16, "pairs per update of sft-choice and dpo (not in the paper)")
    rl: str = common.flag(
        "states", "on single states of demonstrations (version 1), or on episodes",
        choices=["states", "episodes"])
    dpo_beta: float = common.flag(0.1, "of the stage dpo (not in the paper)")
    held_out: int = common.flag(
        200, "expert states of `test` for next action and choice: bounds what they take")
    examples: int = common.flag(8000, "rounds of warm-up examples that make a tiny model")


# --------------------------------------------------------------------------- prompts and parsers
# The wording is ours. A world's own system prompt, which states the game, comes first.
# No example stands between the tags: small models copy it.

POLICY = "Think as long as you need. Then write your next action between <action> and </action>."
PROPOSED = "Two actions are proposed."
CHOOSE = ("Which of the two is better now? Think as long as you need. Then write the better one, "
          "word for word, between <action> and </action>.")
CHOOSE_NOW = ("Which of the two is better now? Write it at once, word for word, between <action> "
              "and </action>, without a word before.")
TAG = "<action>"  # what --prefill forces
LABEL = re.compile(r"\A\W{0,9}(?:(?:action|option)\W{0,9})?[12]\W{0,9}[:.)\-]", re.I)
NUMBERED = re.compile(r"\b(?:action|option|choice|number)\W{0,3}([12]|one|two)\b", re.I)
ORDINAL = re.compile(
    r"\A\W{0,9}(?:the )?([12]|first|second)(?: (?:action|option|one))?\W{0,9}\Z", re.I)
PAIR_OF_TAGS = re.compile(r"<action\s*>((?:(?!</?action\s*>).)*)</action\s*>", re.DOTALL | re.I)


def tagged(action):
    """How the policy writes an action."""
    return f"<action>{action}</action>"


def parse_action(reply):
    """What stands in the last pair of tags of what is said aloud, or None."""
    found = PAIR_OF_TAGS.findall(common.aloud(reply))
    return found[-1].strip() if found else None


def normal(action):
    """Equal for actions that mean the same: case, spaces, markdown, quotes, a final period and the
    layout of a tool call do not matter."""
    call = re.sub(r"</?tool_call>", " ", action.lower()).strip()
    if call.startswith("{"):
        try:
            return json.dumps(json.loads(call), sort_keys=True).lower()
        except (ValueError, RecursionError):
            pass  # no tool call: text like any other
    return " ".join(action.lower().split()).strip(" .*_`\"'")


def parse_choice(reply, one, two):
    """Which action a reply chooses, one of two or another: by its words or by its number ("Action
    1", "option 2", "1"); None without tags."""
    said = parse_action(reply)
    if said is None or normal(said) in (normal(one), normal(two)):
        return said
    words = LABEL.sub("", said)
    if normal(words) in (normal(one), normal(two)):  # "Action 1: open the case"
        return words.strip()
    named = NUMBERED.findall(said) or ORDINAL.findall(said)
    numbers = {word.lower() in ("2", "two", "second") for word in named}
    return (one, two)[numbers.pop()] if len(numbers) == 1 else said


@dataclass
class Prompts:
    """What all prompts of a run begin with."""

    system: str  # the world's
    acts: list  # worked examples of the policy, as messages
    choices: dict  # of the choice, by its instruction


def dialogue(prompts, messages):
    """The policy's view of a state. `messages`: user and assistant by turns; assistant: the bare
    actions."""
    said = [{**m, "content": tagged(m["content"])} if m["role"] == "assistant" else m
            for m in messages]
    system = {"role": "system", "content": f"{prompts.system}\n{POLICY}"}
    return [system, *prompts.acts, *said]


def in_order(pair, expert_second):
    """The two actions of a pair as they are shown."""
    both = pair["expert"], pair["candidate"]
    return both[::-1] if expert_second else both


def question(prompts, pair, expert_second, instruction=CHOOSE):
    """Which of two actions? One list of what is possible, below the last observation."""
    system, *said = dialogue(dataclasses.replace(prompts, acts=[]), pair["messages"])
    said = [{**m, "content": envs.bare(m["content"])} if m["role"] == "user" else m for m in said]
    one, two = in_order(pair, expert_second)
    lines = [said[-1]["content"]]
    if pair["admissible"]:
        lines += ["Possible actions:", *pair["admissible"]]
    lines += [PROPOSED, f"Action 1: {one}", f"Action 2: {two}", instruction]
    said[-1] = {**said[-1], "content": "\n".join(lines)}
    return [system, *prompts.choices[instruction], *said]


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


def worked_choices(args, instruction):
    """--shots questions with their answers, from random play on train: the better action is the one
    that could be done at all (both were tried), first and second by turns."""
    world, messages = envs.make(args.env), []
    prompts = Prompts("", [], {instruction: []})

    def random_action(seed):
        observation, info = world.reset(seed=seed, options={"split": "train"})
        return observation, info, envs.random_player(world, info, random.Random(seed))

    def is_valid(seed, action):
        world.reset(seed=seed, options={"split": "train"})
        return world.step(action)[-1]["valid"]

    for n in range(args.shots):
        seed = 10**6 + n
        observation, info, good = random_action(seed)
        others = (random_action(2 * 10**6 + 20 * n + i)[-1] for i in range(20))
        bad = next((other for other in others if not is_valid(seed, other)), "sing a song")
        pair = {"messages": [{"role": "user", "content": observation}], "expert": good,
                "candidate": bad, "admissible": info["admissible"]}
        first, second = (2, 1) if n % 2 else (1, 2)
        reason = (f"Action {first} can be done now, and action {second} cannot, "
                  f"so action {first} is better. ")
        if instruction == CHOOSE_NOW or args.prefill:
            reason = ""
        messages.append(question(prompts, pair, n % 2 == 1, instruction)[-1])
        messages.append({"role": "assistant", "content": reason + tagged(good), "shot": True})
    world.close()
    return messages


def make_prompts(world, args):
    """The world's system prompt, and --shots worked examples for each part."""
    choices = {which: worked_choices(args, which) for which in (CHOOSE, CHOOSE_NOW)}
    return Prompts(world.system, worked_examples(args, tagged), choices)


def choice_reward(action, example, complete=True):
    """R_acc + R_adm + R_fmt of the paper's version 1 for an action (None: no tags): (reward, its
    row of the table). `complete`: whether the reply came to its end."""
    if action is None:
        return (-0.5, "untagged") if complete else (0.0, "cut")
    if normal(action) == normal(example["expert"]):
        return 1.0, "right"
    # without a list, the candidate has to count as possible
    possible = example["admissible"] or [example.get("candidate", "")]
    if normal(action) and normal(action) in map(normal, possible):
        return 0.1, "possible"
    return 0.0, "impossible"


# --------------------------------------------------------------------- demonstrations and pairs

STATE = {"env": str, "split": str, "seed": int, "turn": int, "messages": list,
         "admissible": (list, type(None)), "expert": str}


def demonstrations(args, split, seeds):
    """The states of the expert's episodes, one dict each: `messages` up to now, what is
    `admissible`, and what the `expert` does."""
    states, world = [], envs.make(args.env, show_actions=args.show_actions)
    for seed in seeds:
        observation, info = world.reset(seed=seed, options={"split": split})
        messages, over = [{"role": "user", "content": observation}], False
        while not over:
            action = world.expert()
            states.append({
                "env": args.env, "split": split, "seed": seed, "turn": len(messages) // 2,
                "messages": list(messages), "admissible": info["admissible"], "expert": action})
            observation, _, terminated, truncated, info = world.step(action)
            messages.append({"role": "assistant", "content": action})
            messages.append({"role": "user", "content": observation})
            over = terminated or truncated
    world.close()
    return states


def held_out_states(args):
    """The first --held-out states of the expert's episodes on `test`."""
    states, seed = [], 0
    while len(states) < args.held_out:
        states += demonstrations(args, "test", [seed])
        seed += 1
    return states[:args.held_out]


def lessons(states):
    """The states of demonstrations as dialogues, one per episode, to be imitated in one pass: as
    many of the expert's replies as there are states. A reply in between that belongs to no state of
    the list is marked as a worked example, which has no loss."""
    episodes = {}
    for state in sorted(states, key=lambda state: len(state["messages"])):
        said = [{**m, "shot": True} if m["role"] == "assistant" else m for m in state["messages"]]
        said.append({"role": "assistant", "content": state["expert"]})
        found = episodes.setdefault((state["split"], state["seed"]), [])
        for lesson in found:
            plain = [{"role": m["role"], "content": m["content"]} for m in lesson]
            if plain == state["messages"][:len(plain)]:
                lesson += said[len(plain):]
                break
        else:
            found.append(said)
    return [lesson for found in episodes.values() for lesson in found]


def only_last(messages):
    """A dialogue of which the last reply alone is to be imitated."""
    *before, last = messages
    return [*({**m, "shot": True} if m["role"] == "assistant" else m for m in before), last]


def read_examples(path, keys):
    """A JSON lines file of states or pairs; the first line that is none is named, in
    `common.refuse`."""
    common.check(Path(path).is_file(), f"{path}: no such file")
    common.check(Path(path).stat().st_size, f"{path} is empty")
    rows = []
    for n, line in enumerate(text_lines(path), 1):
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is JSON, not text
            wrong = [key for key, kind in keys.items()
                     if key not in row or not isinstance(row[key], kind)]
            if not wrong and not all(isinstance(a, str) for a in row["admissible"] or ()):
                wrong = ["admissible"]
            said = [] if wrong else row["messages"]
            roles = [m["role"] for m in said if isinstance(m["content"], str)]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            common.refuse(f"{path}, line {n}: {type(error).__name__}: {error}")
        common.check(not wrong, f"{path}, line {n}: {wrong and wrong[0]!r} "
                                "is missing or of the wrong kind")
        by_turns = ["user", "assistant"] * (len(roles) // 2) + ["user"]
        common.check(len(roles) == len(said) and roles == by_turns,
                     f"{path}, line {n}: messages must be of user and assistant by turns, "
                     "and end with user")
        rows.append(row)
    return rows


def text_lines(path):
    """The lines of a file as Hugging Face datasets reads it: as text, for the JSON loader guesses
    types, takes words for dates and names no line."""
    import datasets  # takes a second, and most runs need none of it

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        try:
            return datasets.load_dataset("text", data_files=path, split="train", cache_dir=cache,
                                         encoding_errors="replace")["text"][:]
        except Exception as error:  # a pattern, an archive and the like have their own each
            reason = " ".join(str(error).split())[:200]
            common.refuse(f"{path} cannot be read: {type(error).__name__}: {reason}")


def that_fit(model, chat, args, prompts, examples):
    """Those states, or pairs, of which every prompt fits the context together with its reply."""

    prefill = TAG if args.prefill else ""

    def fits(example):
        act = chat.dialogue(dialogue(prompts, example["messages"]), prefill)
        target = chat.reply(tagged(example["expert"]))
        if len(act) + max(len(target), args.max_new_tokens) > model.max_context:
            return False
        if "candidate" not in example:
            return True
        choose = chat.dialogue(question(prompts, example, False), prefill)
        return len(choose) + max(len(target), args.choice_tokens) <= model.max_context

    return [example for example in examples if fits(example)]


def make_pairs(model, chat, args, prompts, states, stream):
    """The start policy's own proposals at the states, each beside the expert's action; equal ones
    are dropped. Returns (pairs, counts)."""
    states_ids = [chat.dialogue(dialogue(prompts, state["messages"])) for state in states]
    said = answer(model, chat, args, states_ids, stream, args.max_new_tokens, args.candidates)
    counts = Counter(proposed=len(said), tokens=sum(sum(e["mask"]) for e in said))
    pairs = []
    for i, state in enumerate(states):
        seen = {normal(state["expert"])}
        for e in said[i * args.candidates:(i + 1) * args.candidates]:
            action = parse_action(e["text"])
            pair = {**state, "candidate": action, "model": args.model}
            if not action:
                kind = "untagged" if e["complete"][0] else "cut"
            elif normal(action) == normal(state["expert"]):
                kind = "equal"
            elif normal(action) in seen:
                kind = "repeated"
            else:
                kind = "kept" if that_fit(model, chat, args, prompts, [pair]) else "too long"
            counts[kind] += 1
            if kind == "kept":
                seen.add(normal(action))
                pairs.append(pair)
    counts["cut_action"] = cut_share(said)
    return pairs, dict(counts)


# -------------------------------------------------------------------------------------- rollout


def rollout(model, chat, args, prompts, split, seeds, *, temperature, stream):
    """Plays an episode per seed, --rollout-batch-size at once. Returns dicts; `ids` and `mask` are
    for the loss.

    `stream` names the randomness: a row's depends on (--seed, stream, row, turn), nothing else.
    What does not fit the context is not played and scores 0.
    """
    episodes, size = [], args.rollout_batch_size
    for i in range(0, len(seeds), size):
        streams = [(*stream, row) for row in range(i, min(i + size, len(seeds)))]
        episodes += side_by_side(
            model, chat, args, prompts, split, seeds[i:i + size], streams, temperature)
    return episodes


@torch.no_grad()
def side_by_side(model, chat, args, prompts, split, seeds, streams, temperature):
    """The `rollout` of episodes that share a cache, a stream for each."""
    worlds, episodes = [], []
    for seed in seeds:
        worlds.append(envs.make(args.env, show_actions=args.show_actions))
        observation, _ = worlds[-1].reset(seed=seed, options={"split": split})
        episodes.append({
            "split": split, "seed": seed, "history": [observation], "valid": [], "complete": [],
            "reward": 0.0, "won": False, "score": 0.0, "over": False, "truncated": False})
    first = [[{"role": "user", "content": e["history"][0]}] for e in episodes]
    dialogues = common.Dialogues(model, chat, [chat.dialogue(dialogue(prompts, m)) for m in first])
    prefill = TAG if args.prefill else ""
    room = model.max_context - args.max_new_tokens - len(chat.encode(prefill))
    for i, e in enumerate(episodes):
        e["truncated"] = len(dialogues.ids[i]) > room
    live = list(range(len(episodes)))
    while live := [i for i in live if not episodes[i]["over"] and not episodes[i]["truncated"]]:
        replies = dialogues.reply(
            live, max_new_tokens=args.max_new_tokens, temperature=temperature, prefill=prefill,
            seeds=[common.row_seed(args.seed, *streams[i], len(episodes[i]["history"]))
                   for i in live])
        for i, reply, complete in zip(live, replies.texts, replies.complete):
            take_turn(worlds[i], episodes[i], reply, complete)
        live = [i for i in live if not episodes[i]["over"]]
        dialogues.extend(live, [episodes[i]["history"][-1] for i in live])
        for i in live:  # a full context ends the episode; old turns are never dropped
            episodes[i]["truncated"] = len(dialogues.ids[i]) > room
    for world in worlds:
        world.close()
    for i, e in enumerate(episodes):
        e["ids"], e["mask"], e["logprob"] = dialogues.sampled(i)
    return episodes


def take_turn(world, episode, reply, complete):
    """Steps the world by what a reply says between its tags, and writes the turn down."""
    observation, reward, terminated, truncated, info = world.step(parse_action(reply) or "")
    episode["history"] += [reply, observation]
    episode["valid"].append(info["valid"])
    episode["complete"].append(complete)
    episode["reward"] += reward
    episode.update(won=info["won"], score=info["score"], over=terminated or truncated)


def answer(model, chat, args, prompts, stream, limit, samples=1, temperature=None):
    """`samples` replies of at most `limit` tokens to each prompt (lists of ids), as episodes of one
    turn with `ids`, `mask`, `logprob`, `complete` and `text`."""
    prefill = TAG if args.prefill else ""
    if prefill:
        prompts = [prompt + chat.encode(prefill) for prompt in prompts]
    count = len(prompts) * samples
    replies = common.generate(
        model, chat, prompts, max_new_tokens=limit, samples=samples, rows=args.rollout_batch_size,
        temperature=args.temperature if temperature is None else temperature,
        seeds=[common.row_seed(args.seed, *stream, i) for i in range(count)])
    episodes = []
    for i, ids in enumerate(replies.ids):
        prompt = prompts[i // samples]
        episodes.append({
            "ids": prompt + ids, "mask": [0] * len(prompt) + [1] * len(ids),
            "logprob": sum(replies.logprobs[i]), "text": prefill + replies.texts[i],
            "complete": [replies.complete[i]]})
    return episodes


def cut_share(episodes):
    """The share of replies that the limit cut off."""
    return common.mean(not complete for e in episodes for complete in e["complete"])


# ----------------------------------------------------------------------------------- advantages


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


def advantages_of_read(paid, group_size):
    """`group_advantages` among those replies of each group that were not cut off; 0 for those that
    were. `paid`: (reward, row of the reward table) of each reply."""
    advantages = [0.0] * len(paid)
    for start in range(0, len(paid), group_size):
        read = [i for i in range(start, start + group_size) if paid[i][1] != "cut"]
        if read:
            found = group_advantages([paid[i][0] for i in read], len(read))
            for i, advantage in zip(read, found):
                advantages[i] = advantage
    return advantages


# ----------------------------------------------------------------------------------------- loss


def sampled_logprobs(model, chat, episodes, temperature):
    """log pi of the sampled tokens of some episodes, 0 at all others, and the mask that tells them apart: both [B, T - 1]."""
    ids = common.pad_rows([e["ids"] for e in episodes], chat.pad)  # [B, T]
    mask = common.pad_rows([e["mask"] for e in episodes], 0)  # [B, T]
    return common.token_logprobs(model, ids, mask, temperature), mask[:, 1:].to(model.device)


def micro_batches(episodes, rows, size):
    """The indices `rows` of episodes in batches of `size`; neighbours of one length need little padding."""
    rows = sorted(rows, key=lambda i: len(episodes[i]["ids"]))
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def token_weights(mask, count):
    """The mean over trajectories of the mean over their tokens, as weights [B, T - 1].

    `count`: trajectories of the whole gradient step, or the micro-batches would change the loss.
    """
    return mask / (count * mask.sum(1, keepdim=True).clamp(min=1))


def kl_estimate(logprobs, reference):
    """KL(pi || reference) per sampled token, the estimator of low variance: e^d - d - 1 with d = log reference - log pi."""
    d = reference - logprobs
    return d.exp() - d - 1


def grpo_step(state, episodes, advantages):
    """One gradient step on GRPO's objective (and the KL) over all sampled tokens, with metrics."""
    model, chat, args = state.model, state.chat, state.args
    total = max(1, sum(sum(e["mask"]) for e in episodes))
    metrics = Counter(loss=0.0, kl=0.0, entropy=0.0)
    for rows in micro_batches(episodes, range(len(episodes)), args.micro_batch_size):
        some = [episodes[i] for i in rows]
        logprobs, mask = sampled_logprobs(model, chat, some, args.temperature)  # [B, T - 1]
        scale = torch.tensor([advantages[i] for i in rows], device=logprobs.device)[:, None]
        loss = -scale * logprobs  # the gradient of -r A where r = 1: these weights have sampled
        if args.kl:
            with torch.no_grad():
                before, _ = sampled_logprobs(state.reference, chat, some, args.temperature)
            kl = kl_estimate(logprobs, before)
            loss = loss + args.kl * kl
            metrics["kl"] += (kl.detach() * mask).sum().item() / total
        weights = token_weights(mask, len(episodes))
        (loss * weights).sum().backward()
        metrics["loss"] += (loss.detach() * weights).sum().item()
        metrics["entropy"] -= logprobs.detach().sum().item() / total
    # of decoding to the training forward, per token
    gap = sum(e["logprob"] for e in episodes) / total + metrics["entropy"]
    batch = {"ids": [e["ids"] for e in episodes], "mask": [e["mask"] for e in episodes],
             "advantages": advantages}
    norm = common.gradient_step(model, state.optimizer, metrics["loss"], batch)
    return dict(metrics) | {"logprob_gap": gap, "grad_norm": norm}


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


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    """- log sigmoid(beta (log-ratio chosen - log-ratio rejected)), of log-probs of whole replies
    [B] (arXiv 2305.18290, eq. 7)."""
    margin = chosen - reference_chosen - rejected + reference_rejected
    return -torch.nn.functional.logsigmoid(beta * margin)


def dpo_step(state, triples):
    """One gradient step on the mean DPO loss over (prompt ids, chosen ids, rejected ids)."""
    args, loss, right = state.args, 0.0, 0.0

    def score(model, rows, which):  # log p of whole replies [B]
        prompts, targets = [row[0] for row in rows], [row[which] for row in rows]
        logprobs, _ = common.target_logprobs(model, state.chat, prompts, targets, args.temperature)
        return logprobs.sum(1)

    for i in range(0, len(triples), args.micro_batch_size):
        rows = triples[i:i + args.micro_batch_size]
        with torch.no_grad():
            before_chosen = score(state.reference, rows, 1)
            before_rejected = score(state.reference, rows, 2)
        chosen, rejected = score(state.model, rows, 1), score(state.model, rows, 2)
        losses = dpo_loss(chosen, rejected, before_chosen, before_rejected, args.dpo_beta)
        part = losses.sum() / len(triples)
        part.backward()
        loss += part.item()
        gained = chosen - before_chosen > rejected - before_rejected
        right += gained.float().sum().item() / len(triples)
    norm = common.gradient_step(state.model, state.optimizer, loss, triples)
    return {"loss": loss, "chosen_gained_more": right, "grad_norm": norm}


# --------------------------------------------------------------------------------------- stages
# A stage is a function (state, batch, order, stream) -> metrics that takes one gradient step.
# `batch`: whole demonstrations for il, states for rl, pairs for the others; `order`: a coin for
# each, whether the expert's action is shown second.


@dataclass
class State:
    """What the stages work on."""

    args: Args
    prompts: Prompts
    chat: common.Chat
    model: torch.nn.Module
    reference: torch.nn.Module | None = None  # the model as the stage began, where one is needed
    optimizer: torch.optim.Optimizer | None = None


def act_stage(state, batch, order, stream, instruction=CHOOSE):
    """Which of two actions is better? GRPO."""
    args, size = state.args, state.args.group_size
    asked = [question(state.prompts, pair, coin, instruction) for pair, coin in zip(batch, order)]
    asked = [state.chat.dialogue(messages) for messages in asked]
    episodes = answer(state.model, state.chat, args, asked, stream, args.choice_tokens, size)
    about = [{**pair, "expert_second": coin} for pair, coin in zip(batch, order)
             for _ in range(size)]
    paid = [paid_choice(e, pair, pair["expert_second"]) for e, pair in zip(episodes, about)]
    right = {"first": [], "second": []}
    for (_, row), pair in zip(paid, about):
        right["second" if pair["expert_second"] else "first"].append(row == "right")
    metrics = reinforce(state, episodes, paid, about, "choice")
    return metrics | {f"right_if_{place}": share(truths) for place, truths in right.items()}


def no_reasoning_stage(state, batch, order, stream):
    """ACT without a thought."""
    return act_stage(state, batch, order, stream, CHOOSE_NOW)


def paid_choice(episode, pair, expert_second):
    """(reward, row of the reward table) of an answer to a question about a pair."""
    action = parse_choice(episode["text"], *in_order(pair, expert_second))
    return choice_reward(action, pair, all(episode["complete"]))


def paid_action(episode, state):
    """(1 for the expert's action, row of the reward table) of the policy's reply to a state."""
    _, row = choice_reward(parse_action(episode["text"]), state, all(episode["complete"]))
    return float(row == "right"), row


def il_stage(state, batch, order, stream):
    """Imitation of whole demonstrations: the loss is on the expert's replies alone."""
    dialogues = [dialogue(state.prompts, lesson) for lesson in batch]
    return imitate(state.model, state.chat, state.args, state.optimizer, dialogues)


def rl_stage(state, batch, order, stream):
    """GRPO on the policy: at states of the demonstrations, paid for the expert's action; or on
    whole episodes, paid by the world."""
    args, size = state.args, state.args.group_size
    if args.rl == "states":
        asked = [state.chat.dialogue(dialogue(state.prompts, s["messages"])) for s in batch]
        episodes = answer(state.model, state.chat, args, asked, stream, args.max_new_tokens, size)
        about = [s for s in batch for _ in range(size)]
        paid = [paid_action(e, s) for e, s in zip(episodes, about)]
    else:
        seeds = [common.row_seed(args.seed, *stream, group) % 2**40 for group in range(len(batch))]
        seeds = [seed for seed in seeds for _ in range(size)]
        episodes = about = rollout(state.model, state.chat, args, state.prompts, "train", seeds,
                                   temperature=args.temperature, stream=stream)
        paid = [(e["reward"], "right" if e["won"] else "lost") for e in episodes]
    return reinforce(state, episodes, paid, about, "action")


def sft_choice_stage(state, batch, order, stream):
    """The right choice, imitated."""
    dialogues = []
    for pair, coin in zip(batch, order):
        reply = {"role": "assistant", "content": tagged(pair["expert"])}
        dialogues.append(only_last([*question(state.prompts, pair, coin), reply]))
    return imitate(state.model, state.chat, state.args, state.optimizer, dialogues)


def dpo_stage(state, batch, order, stream):
    """Direct preference for the expert's action over the candidate, as the policy's reply."""
    triples = []
    for pair in batch:
        prompt = state.chat.dialogue(dialogue(state.prompts, pair["messages"]))
        replies = (state.chat.reply(tagged(pair[which])) for which in ("expert", "candidate"))
        triples.append((prompt, *replies))
    return dpo_step(state, triples)


KEPT = "split", "seed", "turn", "history", "expert", "candidate", "expert_second"  # in rollouts


def reinforce(state, episodes, paid, asked, part):
    """The GRPO update of a stage, and what there is to log of it. `paid`: (reward, row of the
    reward table) per episode; `asked`: its pair, its state, or itself; `part`: who replied."""
    size, returns = state.args.group_size, [reward for reward, _ in paid]
    advantages = advantages_of_read(paid, size)
    metrics = grpo_step(state, episodes, advantages)
    rows = Counter(row for _, row in paid)
    said = []
    for what, e, (reward, row) in zip(asked, episodes, paid):
        known = {key: what[key] for key in KEPT if key in what}
        said.append({**known, "reply": e.get("text"), "paid": reward, "row": row})
    lengths = [sum(e["mask"]) for e in episodes]
    return metrics | {
        "reward": common.mean(returns), "rows": {row: n / len(paid) for row, n in rows.items()},
        "groups": len(returns) // size, "groups_without_spread": without_spread(advantages, size),
        f"cut_{part}": cut_share(episodes), "length": common.mean(lengths), "tokens": sum(lengths),
        "env_steps": sum(len(e.get("valid", ())) for e in episodes),
        "episodes": sum("valid" in e for e in episodes), "rollouts": said}


def share(truths):
    """How many hold, of those there are; nan (null in the files) where there are none, as 0 would
    read as "always wrong"."""
    return common.mean_se(truths)[0]


STAGES = {"act": act_stage, "il": il_stage, "rl": rl_stage, "sft-choice": sft_choice_stage,
          "dpo": dpo_stage, "no-reasoning": no_reasoning_stage}
PAIRED = "act", "sft-choice", "dpo", "no-reasoning"  # these need pairs
SUPERVISED = "il", "sft-choice", "dpo"
LIMITS = {"action": "--max-new-tokens", "choice": "--choice-tokens"}  # part: the flag of its limit


def schedule(args, stage, examples, index):
    """The batches of a stage: `--epochs` passes over the examples, each in an order of its own.
    [(indices, coins)] per update."""
    size = args.batch_size // args.group_size
    if stage in SUPERVISED:
        size = args.sft_batch_size if stage == "il" else args.pair_batch_size
    rng, batches = random.Random(f"{args.seed} {index} {stage}"), []
    while len(batches) < (args.steps or args.epochs * -(-examples // size)):
        order = rng.sample(range(examples), examples)
        batches += [order[i:i + size] for i in range(0, examples, size)]
    return [(batch, [rng.random() < 0.5 for _ in batch]) for batch in batches[:args.steps]]


def begin_stage(state, start):
    """A fresh optimizer; on the first step of a stage (`start`) the reference becomes the model as
    it is."""
    if start and state.reference is not None:
        state.reference.load_state_dict(state.model.state_dict())
    state.optimizer = torch.optim.AdamW(
        state.model.parameters(), lr=state.args.lr, betas=(0.9, 0.95), weight_decay=0.0)


# ----------------------------------------------------------------------- evaluation and records


def evaluate(model, chat, args, prompts, split, episodes):
    """The policy on fixed episodes of a split: nothing but its dialogue. Returns ({"success", "se",
    ...}, episodes)."""
    played = rollout(model, chat, args, prompts, split, range(episodes),
                     temperature=args.eval_temperature, stream=("evaluate",))
    success, se = common.mean_se([float(e["won"]) for e in played])
    return {"success": success, "se": se, "cut_action": cut_share(played),
            "turns": common.mean(len(e["valid"]) for e in played),
            "invalid": common.mean(not valid for e in played for valid in e["valid"])}, played


def held_out_accuracy(model, chat, args, prompts, states, pairs):
    """On states that no stage has seen: how often the policy does as the expert, and how often the
    right action is chosen, by position."""
    asked = [chat.dialogue(dialogue(prompts, s["messages"])) for s in states]
    said = answer(model, chat, args, asked, ("held out", "policy"), args.max_new_tokens,
                  temperature=args.eval_temperature)
    out = {"next_action": share([paid_action(e, s)[1] == "right" for e, s in zip(said, states)])}
    cut = []
    for place, coin in ("first", False), ("second", True):
        asked = [chat.dialogue(question(prompts, pair, coin)) for pair in pairs]
        said = answer(model, chat, args, asked, ("held out", place), args.choice_tokens,
                      temperature=args.eval_temperature)
        cut += said
        right = [paid_choice(e, pair, coin)[1] == "right" for e, pair in zip(said, pairs)]
        out[f"choice_{place}"] = share(right)
    choice = (out["choice_first"] + out["choice_second"]) / 2
    return out | {"choice": choice, "cut_choice": cut_share(cut)}


def record(episode):
    """An episode as rollouts.jsonl keeps it: words, not ids."""
    return {key: value for key, value in episode.items() if key not in ("ids", "mask")}


def show(episode):
    """An episode as a person reads it."""
    def line(text):
        return "".join(c if c.isprintable() else " " for c in text)[:140]

    shown = [line(episode["history"][0])]
    for reply, observation in zip(episode["history"][1::2], episode["history"][2::2]):
        shown += [f"> {line(reply)}", line(observation)]
    return "\n".join(shown)


# ------------------------------------------------------------------------ only for --model tiny

TINY = dict(
    lr=3e-4, sft_lr=3e-4, micro_batch_size=16, rollout_batch_size=256, max_new_tokens=48,
    choice_tokens=48, eval_episodes=500, device="cpu", num_demos=40, candidates=2, held_out=575,
    sft_batch_size=3)  # about as many updates per epoch as batches of 16 states would make
READ = "Repeat the task, and what the last action brought."


def warmup(world, args):
    """What a model made from nothing is taught before it learns by itself: the world's language,
    and the forms of its replies.

    Episodes come from a random player on the train split, unfiltered. The policy imitates it, half
    of the time after a thought that repeats the task and what happened last; asked to, it writes
    that alone. Asked for one of two actions, which are random ones, it picks either. No part sees
    an expert.
    """
    rng, examples = random.Random("warm-up"), []
    no_shots = Prompts(world.system, [], {CHOOSE: [], CHOOSE_NOW: []})
    for seed in range(args.examples):
        messages, possible, facts = random_play(world, rng, seed)
        # mostly early turns: more of them in the same time
        turns = [rng.randrange(rng.randint(1, len(possible))) for _ in range(4)]

        said = dialogue(no_shots, messages[:2 * turns[0] + 2])
        for turn, message in enumerate(said[2::2]):
            if rng.random() < 0.5:
                message["content"] = f"{facts[turn]} {message['content']}"
        examples.append(said)
        for turn, instruction in zip(turns[1:], (CHOOSE, CHOOSE_NOW)):
            one, two = two_of(possible[turn], rng)
            pair = {"messages": messages[:2 * turn + 1], "admissible": possible[turn],
                    "expert": one, "candidate": two}
            thought = f"{facts[turn]} " if instruction == CHOOSE else ""
            reply = thought + tagged(rng.choice([one, two]))
            examples.append([*question(no_shots, pair, False, instruction),
                             {"role": "assistant", "content": reply}])
        *before, last = dialogue(no_shots, messages[:2 * turns[3] + 1])
        examples.append([*before, {**last, "content": f"{last['content']}\n{READ}"},
                         {"role": "assistant", "content": facts[turns[3]]}])
    rng.shuffle(examples)
    return examples


def random_play(world, rng, seed):
    """An episode of a random player: its messages, and for each turn what was possible (a list),
    and the thought that the task and the observation allow."""
    observation, info = world.reset(seed=seed, options={"split": "train"})
    messages, possible, over = [{"role": "user", "content": observation}], [], False
    while not over:
        possible.append(info["admissible"] or [envs.random_player(world, info, rng)])
        action = possible[-1][0]
        if info["admissible"]:
            action = rng.choice(rng.choice(by_verb(info["admissible"])))
        observation, _, terminated, truncated, info = world.step(action)
        messages.append({"role": "assistant", "content": action})
        messages.append({"role": "user", "content": observation})
        over = terminated or truncated
    facts = [f"{world.task} {event(m['content'])}" for m in messages[::2]]
    return messages, possible, facts


def two_of(actions, rng):
    """Two different ones, where there are two."""
    return rng.sample(actions, 2) if len(actions) > 1 else actions * 2


def by_verb(actions):
    """Lists of actions that share their first word. Drawn first among these, rare kinds of action are practised too."""
    verbs = {}
    for action in actions:
        verbs.setdefault(action.partition(" ")[0], []).append(action)
    return list(verbs.values())


def event(observation):
    """What an observation says first."""
    return re.split(r"(?<=[.?!])\s", observation.strip(), maxsplit=1)[0]


# ----------------------------------------------------------------------------------------- main


def check_args(args):
    """Everything that can be refused before a model is loaded. Returns the world, the stages, and
    the files' states and pairs (or None)."""
    common.check_common(args)
    sizes = ("choice_tokens", "sft_batch_size", "pair_batch_size", "epochs", "num_demos",
             "candidates", "examples")
    for least, names in (1, sizes), (0, ("kl", "dpo_beta", "sft_lr", "held_out")):
        for name in names:
            value = getattr(args, name)
            common.check(value >= least,
                         f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    common.check(args.group_size > 1,
                 "--group-size must be at least 2: an advantage is a difference within a group")
    common.check(args.batch_size % args.group_size == 0,
                 f"--batch-size must be a multiple of --group-size, not {args.batch_size}")
    stages = [stage.strip() for stage in args.pipeline.split(",")]
    for stage in stages:
        common.check(stage in STAGES, f"--pipeline: unknown stage {stage!r}; "
                                      f"there are: {', '.join(STAGES)}")
    try:
        world = envs.make(args.env, show_actions=args.show_actions)
    except ValueError as error:
        common.refuse(error)
    common.check(not args.shots or world.reset(seed=0)[1]["admissible"],
                 f"--shots: a random player finds nothing to do in --env {args.env}")
    common.check(not args.pairs or set(stages) & set(PAIRED),
                 f"--pairs: no stage of --pipeline {args.pipeline} is about pairs")
    demos = read_examples(args.demos, STATE) if args.demos else None
    pairs = read_examples(args.pairs, STATE | {"candidate": str}) if args.pairs else None
    for path, rows in (args.demos, demos), (args.pairs, pairs):
        for n, row in enumerate(rows or (), 1):
            check_example(args, f"{path}, line {n}", row)
    common.check(args.eval_only or callable(getattr(world, "expert", None)),
                 f"--env {args.env} has no expert, whom the held-out states come from")
    return world, stages, demos, pairs


def check_example(args, where, row):
    """Refuses a state or pair of a file that is not for this run."""
    common.check(row["env"] == args.env,
                 f"{where}: about {row['env']!r}, not about --env {args.env}")
    common.check(row["split"] == "train",
                 f"{where}: of another split than train, on which nothing is learnt")
    last = row["messages"][-1]["content"]
    listed = envs.bare(last) != last
    common.check(not row["admissible"] or listed == args.show_actions,
                 f"{where}: {'with' if listed else 'without'} a list of actions, "
                 f"--show-actions is {args.show_actions}")


def load(world, args, corpus=None, more=()):
    """The model, and its chat; a tiny one is made from `corpus` (default: `warmup`), with `more`
    lines that are one token each."""
    if common.is_tiny(args.model) and args.device == "cpu":
        # small tensors: more threads only wait for each other
        torch.set_num_threads(min(2, torch.get_num_threads()))
    constants = [f"{world.system}\n{POLICY}", PROPOSED, CHOOSE, CHOOSE_NOW, READ, "<action>",
                 "</action>", *common.CHANGES_OF_SPEAKER, *more]
    return common.load(
        args.model, corpus=corpus or (lambda: warmup(world, args)), constants=constants,
        device=args.device, dtype=args.dtype, thinking=args.thinking, max_context=args.max_context)


def quick(args):
    """The small sizes of --quick."""
    sizes = dict(steps=3, batch_size=16, micro_batch_size=8, group_size=4, eval_episodes=16,
                 eval_every=2, save_every=2, num_demos=4, held_out=20, examples=400)
    if not common.is_tiny(args.model):
        sizes |= dict(steps=2, batch_size=4, micro_batch_size=1, group_size=2, eval_episodes=2,
                      num_demos=2, held_out=4, sft_batch_size=1, pair_batch_size=2)
    return dataclasses.replace(args, **sizes)


def check_room(chat, model, messages, room):
    """Refuses a first prompt that leaves no room for `room` more tokens."""
    length = len(chat.dialogue(messages))
    common.check(length + room <= model.max_context,
                 f"the first prompt has {length} tokens, replies may have {room}: "
                 f"beyond the context of {model.max_context}")


@dataclass
class Data:
    """What the stages learn from, and what they are measured on."""

    demos: list  # states
    pairs: list
    held_out: list  # states of `test`
    held_out_pairs: list
    counts: dict  # of the proposals that `pairs` come from
    too_long: int  # states and pairs that do not fit the context

    def of(self, stage):
        """The examples of a stage."""
        if stage in PAIRED:
            return self.pairs
        return lessons(self.demos) if stage == "il" else self.demos


def gather(model, chat, args, prompts, stages, demos, pairs):
    """Demonstrations and pairs, of files or fresh; the held-out ones are for evaluation alone."""
    first = args.seed * 1_000_000_007
    demos = demos or demonstrations(args, "train", range(first, first + args.num_demos))
    given = demos, pairs or [], held_out_states(args)
    demos, found, held_out = (that_fit(model, chat, args, prompts, rows) for rows in given)
    too_long = sum(map(len, given)) - len(demos) - len(found) - len(held_out)
    common.check(demos, f"no state of the demonstrations fits the context of {model.max_context} "
                        f"with --max-new-tokens {args.max_new_tokens}")
    one_each = dataclasses.replace(args, candidates=1)
    held_out_pairs, _ = make_pairs(model, chat, one_each, prompts, held_out, ("held out", "pairs"))
    counts = {}
    if pairs is None and set(stages) & set(PAIRED):
        # by the start weights, when the run is resumed as well
        found, counts = make_pairs(model, chat, args, prompts, demos, ("pairs",))
    for stage in stages:
        common.check(found or stage not in PAIRED,
                     f"stage {stage}: no pairs, as every candidate was the expert's action, "
                     f"untagged or too long ({counts})")
    return Data(demos, found, held_out, held_out_pairs, counts, too_long)


def main():
    """The pipeline."""
    args = common.parse_args(Args, TINY)
    if args.quick:
        args = quick(args)
    world, stages, demos, pairs = check_args(args)
    run = None
    if not args.eval_only:
        run = common.Run("act", args, common.run_directory("act", args))
    model, chat = load(world, args)
    prompts = make_prompts(world, args)
    observation, _ = world.reset(seed=0)
    first = dialogue(prompts, [{"role": "user", "content": observation}])
    check_room(chat, model, first, args.max_new_tokens)
    splits = [split for split in ("test", "ood") if split in world.splits]
    told = set()  # warnings

    def evaluations():
        """{split: numbers} and an episode of `test`."""
        found, episode = {}, None
        for split in splits:
            found[split], played = evaluate(model, chat, args, prompts, split, args.eval_episodes)
            episode = episode or record(played[0])
            tqdm.write(f"{split}: success {found[split]['success']:.3f} "
                       f"(se {found[split]['se']:.3f}, n {args.eval_episodes})")
            common.warn_cut(found[split], LIMITS, told)
        return found, episode

    if args.eval_only:
        return evaluations()

    seconds = Counter()
    clock = common.Clock(seconds)
    data = gather(model, chat, args, prompts, stages, demos, pairs)
    common.warn_cut(data.counts, LIMITS, told)
    clock.lap("pairs")
    run.start({"parameters": common.count_parameters(model), "start": common.fingerprint(model)})
    common.write_jsonl(run.dir / "demos.jsonl", data.demos)
    common.write_jsonl(run.dir / "pairs.jsonl", data.pairs)
    plan = []
    for index, stage in enumerate(stages):
        batches = schedule(args, stage, len(data.of(stage)), index)
        plan += [(index, stage, step, len(batches), *b) for step, b in enumerate(batches, 1)]
    print(f"{args.env}: {common.count_parameters(model):,} parameters on "
          f"{common.device_name(args.device)}; {len(data.demos)} expert states, "
          f"{len(data.pairs)} pairs {data.counts or ''}; {data.too_long} too long; "
          f"{' -> '.join(stages)}, {len(plan)} updates")

    state = State(args, prompts, chat, model)
    if args.kl and set(stages) - set(SUPERVISED) or "dpo" in stages:
        state.reference = copy.deepcopy(model)

    def measured(stage):
        """What is evaluated before the first stage and after each."""
        numbers, episode = evaluations()
        accuracy = held_out_accuracy(model, chat, args, prompts, data.held_out, data.held_out_pairs)
        common.warn_cut(accuracy, LIMITS, told)
        return {"stage": stage, **numbers, **accuracy}, episode

    done, after_episode, totals = 0, None, Counter(tokens=data.counts.get("tokens", 0))
    if saved := run.resume():
        common.check(saved["steps"] == args.steps,
                     f"--resume: --steps, which was {saved['steps']}, decides where a stage ends")
        model.load_state_dict(saved["model"])
        if state.reference is not None:
            state.reference.load_state_dict(saved["reference"])
        totals, done, found = Counter(saved["totals"]), saved["done"], saved["found"]
        before_episode, after_episode = saved["before_episode"], saved["after_episode"]
        seconds.update(saved["seconds"])
    else:
        numbers, before_episode = measured("before")
        found = [numbers]

    bar = tqdm(plan[done:], initial=done, total=len(plan), desc="act", dynamic_ncols=True)
    for index, stage, step, steps, batch, order in bar:
        clock = common.Clock(seconds)
        if step == 1 or state.optimizer is None:
            begin_stage(state, step == 1)
        if step > 1 and done == (saved or {}).get("done"):
            state.optimizer.load_state_dict(saved["optimizer"])
        for group in state.optimizer.param_groups:
            group["lr"] = (args.sft_lr if stage in SUPERVISED else args.lr) * min(1, step / 5)
        examples = data.of(stage)
        metrics = STAGES[stage](state, [examples[i] for i in batch], order, (index, step))
        totals["gradient_steps"] += 1
        for key in "tokens", "env_steps", "episodes":
            totals[key] += metrics.pop(key, 0)
        clock.lap(stage)
        name = f"{index + 1}-{stage}"
        run.write_rollouts([{"stage": name, "step": step, **said}
                            for said in metrics.pop("rollouts", ())])
        if step == steps:
            numbers, after_episode = measured(stage)
            found.append(numbers)
            common.save_model(run.dir / name, model, chat)
            run.write_rollouts([{"stage": name, **after_episode}])
        elif step % args.eval_every == 0:
            n = max(1, args.eval_episodes // 5)
            numbers, _ = evaluate(model, chat, args, prompts, "test", n)
            metrics |= {"eval_episodes": n} | {f"eval_{key}": v for key, v in numbers.items()}
            tqdm.write(f"{stage} {step}: test success {numbers['success']:.3f} "
                       f"(se {numbers['se']:.3f}, n {n})")
        common.warn_cut(metrics, LIMITS, told)
        clock.lap("watching")
        done += 1
        run.log({"step": done, "stage": name, "stage_step": step, **metrics, **totals}
                | {f"seconds_{phase}": round(value, 2) for phase, value in clock.laps.items()})
        bar.set_postfix({"stage": stage} | {
            key: f"{metrics[key]:.2f}" for key in ("loss", "reward") if key in metrics})
        if done % args.save_every == 0 or done == len(plan) or run.stopping:
            reference = state.reference.state_dict() if state.reference is not None else None
            run.save({"model": model.state_dict(), "reference": reference,
                      "optimizer": state.optimizer.state_dict(), "done": done, "steps": args.steps,
                      "totals": dict(totals), "seconds": dict(seconds), "found": found,
                      "before_episode": before_episode, "after_episode": after_episode})
        if run.stopping:
            sys.exit(run.stopping)

    ends = {}
    for name, player in ("random", envs.random_player), ("expert", envs.expert_player):
        mean, se = envs.mean_score(envs.make(args.env), player, args.eval_episodes, key="won")
        ends[name] = {"success": mean, "se": se}
    run.finish(summary_of(args, splits, found, ends, data, totals, seconds), model, chat)
    # Printing comes last: a terminal that fails costs nothing.
    print(f"\nbefore\n{show(before_episode)}\n\nafter\n{show(after_episode)}\n")
    print(table_of(args, splits, found, ends, len(data.held_out)))
    print(f"stages and pairs: {run.dir}")


def summary_of(args, splits, found, ends, data, totals, seconds):
    """summary.json. `found`: what was measured before the first stage and after each."""
    ends = dict(ends)
    for when, numbers in ("before", found[0]), ("after", found[-1]):
        for split in splits:
            name = when if split == "test" else f"{when}_{split}"
            ends[name] = {key: numbers[split][key] for key in ("success", "se")}
    demos = {(s["split"], s["seed"]) for s in data.demos}
    return {
        "script": "act", "method": "act", "arm": args.pipeline, "env": args.env,
        "model": args.model, "seed": args.seed, "split": "test",
        "eval_episodes": args.eval_episodes, **ends,
        "stages": found, "expert_states": len(data.demos), "held_out_states": len(data.held_out),
        "pairs": len(data.pairs), "pair_counts": data.counts, "too_long": data.too_long,
        "train_episodes": len(demos) + totals["episodes"], "env_steps": totals["env_steps"],
        "generated_tokens": totals["tokens"], "gradient_steps": totals["gradient_steps"],
        "seconds": round(sum(seconds.values()), 1),
        "peak_memory_bytes": common.peak_memory_bytes(args.device),
        "device": common.device_name(args.device), "git_commit": common.git_commit()}


def table_of(args, splits, found, ends, held_out):
    """The numbers of all stages as a person reads them."""
    head = "".join(f"{split:>9}{'se':>8}" for split in splits)
    lines = [f"{'':14}{head}{'next':>9}{'choice':>9}   (n {args.eval_episodes}; "
             f"next action and choice: {held_out} held-out states)"]
    for numbers in found:
        cells = [f"{numbers[split]['success']:9.3f}{numbers[split]['se']:8.3f}" for split in splits]
        accuracy = f"{numbers['next_action']:9.3f}{numbers['choice']:9.3f}"
        lines.append(f"{numbers['stage']:14}{''.join(cells)}{accuracy}")
    for name, numbers in ends.items():
        lines.append(f"{name:14}{numbers['success']:9.3f}{numbers['se']:8.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
