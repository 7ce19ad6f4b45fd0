"""Natural Language Actor-Critic (Hong et al., arXiv 2512.04601): the critic writes text.

One language model plays every part, each through a prompt of its own. With s the episode so far,
a an action, d a description of the future, theta_bar the EMA of the weights theta, a step is:

    act       a ~ pi(. | s), a thought and an action; (s, a, r, s', done) is kept as text        (1)
    backup    B_L(s, a, s', a', d') with d' ~ M(. | s', a'), a' ~ pi(. | s'), all by theta_bar   (2)
    L1        -log M(B_L | s, a): KL(B_L M_bar || M) up to a constant, no gradient through (2)   (3)
    critique  Q_L(s, a) = E(s, a, d^(1..k)) with d ~ M(. | s, a)                                 (4)
    refine    a^r ~ pi_r(. | s, a^1, Q_L(s, a^1), ..., a^m, Q_L(s, a^m)), no gradient            (5)
    L2        -log pi(a^r | s): no policy gradient, no value head, no list of actions            (6)
    average   theta_bar <- ema theta_bar + (1 - ema) theta, after each gradient step             (7)

The paper's prompts, learning rate, EMA rate, buffer and batch sizes are not public: ours.
Departures from the paper, and why:
 1. The target of a terminal transition is composed of the first sentence seen after it and of the
    outcome, not written by B_L: it grounds M. A full context or a time limit ends without success.
 2. M, B_L, E and pi_r read actions without the thoughts before them, as thoughts would fill their
    prompts; pi_r sees the futures too, and B_L sees a', which d' is about. L2 teaches the thought
    of a^r and its action in the form that the policy writes, nothing behind that, and no action
    that a limit cut. A native thought (--thinking) stays before them, though it may speak of the
    critique; L1 leaves B_L's out, as M would learn to think of what it has not seen.
 3. a' in (2) comes from pi_bar, not from the current policy: averaged weights are steadier.
 4. Targets and lessons of a step are made once, before its gradient steps; each of these takes L1
    and L2 together.
 5. A forecast ends in a marked end, with the turns to it, and a critique in a marked verdict: logs
    read them. So "sooner is better" is counted in turns where the paper discounts in words alone.
    B_L's form has no place for a score below success: M hears of it in the last turn alone.
 6. L1 and L2 are means over target tokens, at the temperature of sampling; L2 weighs less where few
    states have a lesson. Targets that are empty or have no room are dropped; that they do not speak
    of what only their writer saw is asked for in the prompts, not checked. M learns nothing of an
    action that is empty, and a state has no lesson where a^1 is, or the last a^r, or where a^1 has
    no critique; tries without one are not shown to pi_r.
What a tiny model needs besides is the last group of flags, off here, on in TINY: --distil best,
where refinement is a comparison of judged tries, and a lesson only where they differ clearly; parts
that nobody trains from the start weights, as they are forgotten (the paper reports forgetting); L1
alone until M tells actions of one turn apart (the start weights act meanwhile); imitation of what
was just played; late turns oversampled. Their code stands below main.

    python nlac.py                            # repair shop, tiny: .16 -> 1.00, 5 minutes
    python nlac.py --ablation frozen-critic --out-dir runs/frozen   # a floor: M never learns
    python nlac.py --model smollm2 --shots 2 --prefill --show-actions --quick
    python nlac.py --model Qwen/Qwen2.5-1.5B-Instruct --env 20q     # the paper's algorithm, a day
"""

import functools
import random
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

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
    env: str = flag("repair", "a world: a name, NAME:ARGUMENT, or path/to/file.py:Class")
    seed: int = flag(0, "of everything sampled; the tiny model is built with seed 0")
    steps: int = flag(400, "passes of the loop, --updates each (paper: 30,720 gradient steps)")
    lr: float = flag(1e-6, "AdamW, constant after 10 steps (not in the paper)")
    batch_size: int = flag(32, "transitions per gradient step (not in the paper)")
    micro_batch_size: int = flag(1, "sequences per backward pass; changes memory and speed, not the gradient")
    rollout_batch_size: int = flag(64, "episodes or replies sampled side by side; changes memory and speed alone")
    max_new_tokens: int = flag(512, "of one reply of the policy or the refiner (not in the paper)")
    max_context: int | None = flag(None, "tokens of a prompt with its reply; default: what the model can read")
    temperature: float = flag(0.7, "of pi, M and pi_r, and of their likelihoods (not in the paper)")
    eval_temperature: float = flag(0.7, "of the policy in evaluation (not in the paper)")
    eval_episodes: int = flag(100, "per split, first and last; in between a fifth (paper: 500)")
    eval_every: int = flag(25, "steps between evaluations")
    eval_only: bool = flag(False, "evaluate --model and stop; writes nothing")
    save_every: int = flag(25, "steps between checkpoints")
    out_dir: str = flag("", "default: runs/nlac-ENV-sSEED")
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
    # NLAC
    k: int = flag(1, "futures per critique (paper)")
    m: int = flag(1, "rounds of refinement (paper)")
    forecast_tokens: int = flag(256, "of one reply of M or B_L (not in the paper)")
    critique_tokens: int = flag(256, "of one critique, or comparison of tries (not in the paper)")
    reader_temperature: float = flag(0.7, "of B_L, E and comparisons (not in the paper)")
    ema: float = flag(0.99, "share of theta_bar that a gradient step keeps (not in the paper)")
    buffer_size: int = flag(20_000, "transitions in the replay buffer (not in the paper)")
    episodes_per_step: int = flag(32, "episodes collected per step (not in the paper)")
    updates: int = flag(8, "gradient steps per step, each on its share (not in the paper)")
    actor_states: int = flag(256, "states refined per step (not in the paper)")
    actor_weight: float = flag(1.0, "of L2; L1 has weight 1 (not in the paper)")
    ablation: str = flag(
        "none", "not in the paper. mc-backup: no bootstrap; blind-critic: futures of other states;"
        " frozen-critic: M as it started; label-only: pi_r reads verdicts alone",
        choices=["none", "mc-backup", "blind-critic", "frozen-critic", "label-only"])
    # departures that can be switched on
    distil: str = flag("all", "L2 teaches every refinement (paper), or the best of judged tries",
                       choices=["all", "best"])
    margin: int = flag(1, "best: by how many steps of bad...great the chosen try must beat the worst other one (not in the paper)")
    frozen_parts: bool = flag(False, "B_L, E, pi_r by the start weights; False: by theta, B_L by theta_bar (paper)")
    anchor: float = flag(0.0, "weight of imitating the actions just played; 0: none (paper)")
    critic_gate: float = flag(0.0, "AUC of M (see auc) from which on L2 teaches; 0: from the start (paper)")
    even_turns: bool = flag(False, "late turns sampled more often; False: a plain buffer (paper)")
    # a tiny model
    examples: int = flag(3000, "rounds of warm-up examples that make a tiny model")


# ------------------------------------------------------------------------------------------ prompts
# The paper's are not public; the wording is ours. A world states the game, a part the form of its
# reply. What stands behind End:, Verdict: and Best: is read; Action: is what is done.

POLICY = "Think first, in a sentence or two. Then write Action: and, behind it, your next action."
SUCCESSOR = """You foresee how an episode goes on. Read it so far, and the player's next action.
Reply in this form, and add nothing:
Next: what the player sees right after that action, in one sentence.
Then: what the player is likely to do after that and what comes of it, briefly.
End: failure, or success and the number of turns to it."""
BACKUP = """You make a forecast start one turn earlier. Read the episode so far, the player's next
action, what was seen after it, what the player does then, and a forecast of what follows.
Write a forecast of the next action, in the words of somebody who has seen nothing after it.
Reply in this form, and add nothing:
Next: what was seen after it, in one sentence.
Then: what the player does after that and what comes of it, the more briefly the further ahead.
End: failure, or success and the number of turns to it, one more than in the forecast that you read;
failure if there are not so many turns left."""
EVALUATOR = """You judge a player's next action by the futures it may lead to. Success is better
than failure, and sooner is better than later. Read the episode so far, the action, and the futures.
Begin with Futures: and say what they show: how many succeed, how soon, and what decides it.
Say whether the action is the best there is now, and why; if it is not, what would be better.
Finish with Verdict: and one word: bad, weak, fair, good or great."""
REFINER = """You improve a player's next action. Read the episode so far, and what was tried as the
next action, with the futures it may lead to and a critique.
First say in a sentence or two what the next action should achieve, and why. Speak as the player,
who knows the episode alone: no word of tries, futures or critiques.
Then write Action: and, behind it, a better action than those that were tried; the same again only
if none is better."""
CHOOSER = """You choose a player's next action. Read the episode so far, and what was tried as the
next action, with the futures it may lead to and a critique. Success is better than failure, and
sooner is better than later.
Say in a sentence or two which try is the best, and why. Finish with Best: and its number."""
VERDICTS = "bad weak fair good great".split()  # the order of sentiments of the paper's theory


class Form(NamedTuple):
    """How a part replies."""

    word: str  # --prefill begins a reply with it
    mark: str  # what is read stands after "mark:"
    limit: str  # the name of its limit in Args
    temperature: str  # the same


PARTS = {
    "policy": Form("Action:", "Action", "max_new_tokens", "temperature"),
    "successor": Form("Next:", "End", "forecast_tokens", "temperature"),
    "backup": Form("Next:", "End", "forecast_tokens", "reader_temperature"),
    "evaluator": Form("Futures:", "Verdict", "critique_tokens", "reader_temperature"),
    "refiner": Form("Action:", "Action", "max_new_tokens", "temperature"),
    "chooser": Form("Best:", "Best", "critique_tokens", "reader_temperature")}


def policy_messages(world, state):
    """pi(. | s): its dialogue only grows. A state is [observation, reply, ..., observation]."""
    messages = [{"role": "system", "content": f"{world.system}\n{POLICY}"}]
    for turn, text in enumerate(state):
        messages.append({"role": ("user", "assistant")[turn % 2], "content": text})
    return messages


def part_messages(prompt, world, state, *lines):
    """What asks any part but the policy: a call of its own, over a transcript and further `lines`.

    None where one of these came back empty: nothing comes of nothing.
    """
    if not all(lines):
        return None
    rules = f"This is what the player of a game is told:\n<game>\n{world.system}\n</game>"
    user = "\n".join(["<episode>", *transcript(world, state), "</episode>", *lines])
    return [{"role": "system", "content": f"{rules}\n{prompt}"}, {"role": "user", "content": user}]


def transcript(world, state):
    """Lines of an episode: without thoughts, and without lists of possible actions but the last."""
    lines = []
    for seen, reply in zip(state[::2], state[1::2]):
        lines += [envs.bare(seen), f"> {envs.one_line(action_of(world, reply))}"]
    return [*lines, state[-1]]


def successor_messages(world, state, action):
    """M(. | s, a)"""
    return part_messages(SUCCESSOR, world, state, next_action(action))


def backup_messages(world, t, action, forecast):
    """B_L(s, a, s', a', d'): `action` is a', `forecast` d'."""
    return part_messages(BACKUP, world, t.state, next_action(t.action),
                         f"Seen after it: {envs.bare(t.result)}",
                         f"Then the player does: {envs.one_line(action)}",
                         forecast and f"Forecast from there: {squeezed(forecast)}")


def evaluator_messages(world, state, action, futures):
    """E(s, a, d^(1..k))"""
    return part_messages(EVALUATOR, world, state, next_action(action),
                         *numbered("Future", futures) or [None])


def refiner_messages(world, state, tries, prompt=REFINER):
    """pi_r(. | s, a^1, Q_L(s, a^1), ...); prompt: CHOOSER, to compare the tries."""
    lines = []
    for number, one in enumerate(tries, 1):
        lines.append(f"Try {number}: {envs.one_line(one.action)}")
        lines += numbered("Future", one.futures)
        lines.append(one.critique and f"Critique: {squeezed(one.critique)}")
    return part_messages(prompt, world, state, *lines or [None])


def next_action(action):
    """An action as the parts that judge it read it."""
    return action and f"Next action: {envs.one_line(action)}"


# ------------------------------------------------------------------------------------------ rollout


@dataclass
class Episode:
    """One trajectory, in words."""

    split: str
    seed: int
    said: list = field(default_factory=list)  # [who, text]: world and act, by turns
    actions: list[str] = field(default_factory=list)  # as the world read them
    valid: list[bool] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)  # turns in whose action the limit fell
    won: bool = False
    score: float = 0.0
    over: bool = False
    truncated: bool = False  # the context was full
    tokens: int = 0  # sampled
    logprob: float = 0.0  # of all of them, in decoding

    def texts(self):
        """Observation, reply, observation, ..."""
        return [text for _, text in self.said]


@dataclass
class Transition:
    """(s, a, r, s', done), as text: r is `score` in the last one of an episode, else nothing."""

    seed: int
    state: list[str]  # s: observation, reply, observation, ..., observation
    reply: str  # a with its thought
    action: str  # a as the world read it
    result: str  # the observation that makes s' of s and a
    done: bool
    score: float  # of the whole episode, at its end
    turns: int | None  # from here to success; for logs and --ablation mc-backup, as `then`
    then: str  # the action after this one
    cut: bool  # the limit fell in a

    @property
    def next_state(self):
        """s'"""
        return [*self.state, self.reply, self.result]


def groups(items, size):
    """Consecutive items, `size` in each."""
    return [items[start:start + size] for start in range(0, len(items), size)]


def rollout(model, chat, args, split, seeds, *, temperature, stream) -> list[Episode]:
    """Plays an episode per seed, --rollout-batch-size at once.

    `stream` names the randomness: a row's replies depend on (--seed, stream, row, turn) alone.
    """
    played = []
    for some in groups(list(enumerate(seeds)), args.rollout_batch_size):
        worlds = [envs.make(args.env, show_actions=args.show_actions) for _ in some]
        episodes = [begin(world, split, seed) for world, (_, seed) in zip(worlds, some)]
        streams = [(*stream, row) for row, _ in some]
        play_on(model, chat, args, worlds, episodes, streams, temperature)
        played += episodes
        for world in worlds:
            world.close()
    return played


def begin(world, split, seed) -> Episode:
    """An episode before its first turn."""
    observation, _ = world.reset(seed=seed, options={"split": split})
    return Episode(split, seed, said=[["world", observation]])


def play_on(model, chat, args, worlds, episodes, streams, temperature):
    """(1) The policy plays until all episodes are over, in dialogues that share a cache."""
    prompts = []
    for world, episode in zip(worlds, episodes):
        messages = policy_messages(world, episode.texts())
        prompts.append(chat.dialogue(with_shots("policy", messages, args)))
    dialogues = common.Dialogues(model, chat, prompts)
    word = PARTS["policy"].word if args.prefill else ""
    room = model.max_context - args.max_new_tokens - len(chat.encode(word))
    while True:
        for ids, episode in zip(dialogues.ids, episodes):
            if not episode.over:  # a full context ends an episode; no turn is ever dropped
                episode.truncated = episode.over = len(ids) > room
        live = [i for i, episode in enumerate(episodes) if not episode.over]
        if not live:
            break
        seeds = [common.row_seed(args.seed, *streams[i], len(episodes[i].said)) for i in live]
        replies = dialogues.reply(live, max_new_tokens=args.max_new_tokens, temperature=temperature,
                                  seeds=seeds, prefill=word)
        for i, reply, complete in zip(live, replies.texts, replies.complete):
            take_turn(worlds[i], episodes[i], reply, complete)
        dialogues.extend(live, [worlds[i].observation for i in live])
    for i, episode in enumerate(episodes):
        _, sampled, episode.logprob = dialogues.sampled(i)
        episode.tokens = sum(sampled)


def take_turn(world, episode, reply, complete=True):
    """One step of the world, written down in `episode`; `complete`: no limit cut the reply."""
    observation, _, terminated, truncated, info = world.step(common.aloud(reply))
    if not complete and not is_whole(world, reply):
        episode.cut.append(len(episode.actions))
    episode.said += [["act", reply], ["world", observation]]
    episode.actions.append(info["action"])
    episode.valid.append(info["valid"])
    episode.won, episode.score = info["won"], info["score"]
    episode.over = terminated or truncated


def transitions(episode) -> list[Transition]:
    """What the buffer keeps of an episode."""
    texts, count, found = episode.texts(), len(episode.actions), []
    for turn, (action, then) in enumerate(zip(episode.actions, [*episode.actions[1:], ""])):
        *state, reply, result = texts[:2 * turn + 3]
        turns = count - turn if episode.won else None
        found.append(Transition(episode.seed, state, reply, action, result, turn + 1 == count,
                                episode.score, turns, then, turn in episode.cut))
    return found


def sample(buffer, args, rng, count) -> list[Transition]:
    """The replay draw, uniform; with --even-turns late turns more often than they were played."""
    weights = even_weights(buffer) if args.even_turns else None
    return rng.choices(buffer, weights, k=count) if buffer else []  # empty: no prompt had room


# -------------------------------------------------------------------------------------------- parts


class Parts:
    """The parts of the one language model: which weights answer, and in `counts` how well."""

    def __init__(self, model, chat, world, args):
        """Copies of the weights are made where a setting needs them."""
        self.model, self.chat, self.world, self.args = model, chat, world, args  # model: theta
        self.average = common.copy_of(model) if args.ema else model  # theta_bar
        frozen = args.frozen_parts or args.critic_gate or args.ablation == "frozen-critic"
        self.start = common.frozen_copy(model) if frozen else None
        self.counts = defaultdict(Counter)  # part -> asked, parse, cut, lost, overlong, tokens
        self.forgotten = set()  # parts that a warning has named

    def weights(self, part, averaged=False):
        """Which weights answer; `averaged`: pi_bar and M_bar, in (2). B_L is averaged always."""
        if part == "successor" and self.args.ablation == "frozen-critic":
            return self.start
        if self.args.frozen_parts and part not in ("policy", "successor"):
            return self.start
        return self.average if averaged or part == "backup" else self.model

    def ask(self, part, asked, stream, samples=1, averaged=False) -> list[str]:
        """`samples` replies of a part to each of `asked` (messages), those of one side by side.

        Native thoughts stay where a reply is an action, as L2 teaches them, else they go.
        Empty: the reply to None, to a prompt beyond the context, and one that is lost: its limit
        cut it, and it is a backup, a d' of (2) without an end, or an action that had not ended.
        """
        args, counts, form = self.args, self.counts[part], PARTS[part]
        model = self.weights(part, averaged)
        word = form.word if args.prefill else ""
        limit = getattr(args, form.limit)
        prompts, rows = [], []
        for i, messages in enumerate(asked):
            if messages:
                prompt = self.chat.dialogue(with_shots(part, messages, args), word)
                fits = len(prompt) + limit <= model.max_context
                counts.update(asked=samples, overlong=0 if fits else samples)
                if fits:
                    prompts.append(prompt)
                    rows += range(i * samples, (i + 1) * samples)
        replies = common.generate(
            model, self.chat, prompts, max_new_tokens=limit, samples=samples,
            temperature=getattr(args, form.temperature),
            seeds=[common.row_seed(args.seed, *stream, part, row) for row in rows],
            rows=args.rollout_batch_size)
        texts = [""] * (len(asked) * samples)
        acts = form.mark == "Action"
        for row, ids, text, complete in zip(rows, replies.ids, replies.texts, replies.complete):
            aloud = common.aloud(word + text)
            readable = is_readable(self.world, form.mark, aloud)
            whole = complete or (is_whole(self.world, aloud) if acts else
                                 part != "backup" and (readable or not averaged))
            if whole:
                texts[row] = (word + text).strip() if acts else aloud
            counts.update(tokens=len(ids), parse=readable, cut=not complete, lost=not whole)
        return texts

    def foresee(self, states, actions, stream, samples=1, averaged=False) -> list[str]:
        """d ~ M(. | s, a), `samples` of each."""
        asked = [successor_messages(self.world, *row) for row in zip(states, actions)]
        return self.ask("successor", asked, stream, samples, averaged)


# ------------------------------------------------------------------------------ the critic: M and E


def successor_targets(parts, batch, stream) -> list[str]:
    """(2) B_L M_bar(. | s, a) of each transition; "" where no text came of it."""
    world = parts.world
    if parts.args.ablation == "mc-backup":  # what did happen, by the policy of that time
        return [in_hindsight(t) for t in batch]
    live = [t for t in batch if not t.done]
    next_states = [t.next_state for t in live]  # s'
    asked = [policy_messages(world, state) for state in next_states]
    replies = parts.ask("policy", asked, stream, averaged=True)
    actions = [action_of(world, reply) for reply in replies]  # a'
    forecasts = parts.foresee(next_states, actions, stream, averaged=True)  # d'
    asked = [backup_messages(world, *row) for row in zip(live, actions, forecasts)]
    backups = iter(parts.ask("backup", asked, stream))  # of those that go on, in their order
    return [in_hindsight(t) if t.done else next(backups) for t in batch]


def successor_lessons(parts, batch, stream):
    """(3) What M shall learn to foresee -> pairs for `nll`; a target that is empty is dropped."""
    if parts.args.ablation == "frozen-critic":
        return []
    asked = [successor_messages(parts.world, t.state, t.action) for t in batch]
    return lessons(parts, "successor", asked, successor_targets(parts, batch, stream))


@dataclass
class Try:
    """An action that was proposed, and what the critic says of it."""

    reply: str  # with its thoughts
    action: str
    futures: list[str] = field(default_factory=list)
    critique: str = ""


def critique(parts, states, tries, stream):
    """(4) Q_L(s, a) = E(s, a, d^(1..k)): writes the futures and the critique of a try per state."""
    args = parts.args
    actions = [one.action for one in tries]
    futures = groups(parts.foresee(states, actions, stream, args.k), args.k)
    if args.ablation == "blind-critic":
        futures = of_others(futures)
    asked = [evaluator_messages(parts.world, *row) for row in zip(states, actions, futures)]
    for one, some, text in zip(tries, futures, parts.ask("evaluator", asked, stream)):
        one.futures, one.critique = some, text
        if args.ablation == "label-only":
            one.futures, one.critique = [], text and label(text)


# --------------------------------------------------------------------------- the actor: pi and pi_r


def refine(parts, states, stream, replies=None) -> list[list[Try]]:
    """(5) The tries of each state: a^1 of the policy, then what pi_r makes of it in m rounds.

    The last try is a^r; with --distil best it is judged as well. `replies`: start from these.
    """
    world, rounds = parts.world, parts.args.m
    if replies is None:
        asked = [policy_messages(world, state) for state in states]
        replies = parts.ask("policy", asked, stream)
    tries = [[Try(reply, action_of(world, reply))] for reply in replies]
    for number in range(rounds):
        critique(parts, states, [some[-1] for some in tries], (*stream, number))
        judged = [[one for one in some if one.critique] for some in tries]
        asked = [refiner_messages(world, *row) for row in zip(states, judged)]
        for some, reply in zip(tries, parts.ask("refiner", asked, (*stream, number))):
            some.append(Try(reply, action_of(world, reply)))
    if parts.args.distil == "best":
        critique(parts, states, [some[-1] for some in tries], (*stream, rounds))
    return tries


def policy_lessons(parts, states, tries, stream):
    """(6) What the policy shall learn to say at once -> pairs for `nll`."""
    replies = [some[-1].reply for some in tries]
    if parts.args.distil == "best":
        replies = best_replies(parts, states, tries, stream)
    asked = [policy_messages(parts.world, state) for state in states]
    return lessons(parts, "policy", asked, [in_form(parts.world, reply) for reply in replies])


# --------------------------------------------------------------------------------------------- loss


def lessons(parts, part, asked, texts) -> list:
    """[(prompt ids, target ids)] that teach a part to say `texts`, but for what --prefill forces.

    Left out: where nothing is asked or said, and what is more than the model can read.
    """
    chat, args, pairs = parts.chat, parts.args, []
    word = PARTS[part].word if args.prefill else ""
    for messages, text in zip(asked, texts):
        if messages and text:
            prompt = chat.dialogue(with_shots(part, messages, args), word)
            target = chat.reply(text.removeprefix(word))
            if len(prompt) + len(target) <= parts.model.max_context:
                pairs.append((prompt, target))
    return pairs


def nll(parts, pairs, weight) -> float:
    """(3), (6) -log p(target | prompt), the mean over target tokens; backward of weight times it.

    At the temperature of sampling: at any other one, learning from own samples would sharpen (or
    flatten) step by step. The mean spans all of `pairs` [(prompt ids, target ids)], so that the
    gradient does not depend on the micro-batch.
    """
    total, tokens = 0.0, sum(len(target) for _, target in pairs)
    pairs = sorted(pairs, key=lambda pair: len(pair[0]))  # neighbours need little padding
    for batch in groups(pairs, parts.args.micro_batch_size):
        prompts, targets = zip(*batch)
        logprobs, _ = common.target_logprobs(parts.model, parts.chat, prompts, targets,
                                             parts.args.temperature)
        loss = -logprobs.sum() / tokens  # of [B, T - 1], 0 beside the targets
        (weight * loss).backward()
        total += loss.item()
    return total


def update(parts, optimizer, l1_pairs, l2_pairs, anchor_pairs) -> dict:
    """--updates gradient steps on L1 + weight L2 + the anchor, and (7) after each -> metrics.

    Each takes its share of the lessons, [(prompt ids, target ids)]; a loss is the mean over the
    gradient steps that had any, and missing where none had.
    """
    args, found = parts.args, Counter()
    taught = len(l2_pairs) / args.actor_states  # L2 is not to grow louder as lessons get rarer
    weights = {"l1": 1.0, "l2": args.actor_weight * taught, "anchor": args.anchor}
    every = {"l1": l1_pairs, "l2": l2_pairs, "anchor": anchor_pairs}
    for u in range(args.updates):
        share = {name: pairs[u::args.updates] for name, pairs in every.items()}
        loss = 0.0
        for name, pairs in share.items():
            if pairs:
                value = nll(parts, pairs, weights[name])  # backward
                had_any = min(args.updates, len(every[name]))  # of the gradient steps
                found[name] += value / had_any
                loss += value  # only to see that it is finite
        norm = common.gradient_step(parts.model, optimizer, loss, share)
        found["grad_norm"] += norm / args.updates
        common.ema_update(parts.average, parts.model, args.ema)  # (7)
    return dict(found)


# --------------------------------------------------------------------------------------------- main


def act(parts, step, learns) -> list[Episode]:
    """(1) The episodes of a step; while --critic-gate is closed, by the start weights."""
    args, actor = parts.args, parts.model if learns else parts.start
    first = args.seed * common.SEEDS_APART + (step - 1) * args.episodes_per_step
    return rollout(actor, parts.chat, args, "train", range(first, first + args.episodes_per_step),
                   temperature=args.temperature, stream=("act", step))


def main():
    """Algorithm 1."""
    args = common.parse_args(Args, TINY, quick=QUICK)
    world = check_args(args)
    run = common.Run("nlac", args)
    model, chat = load(world, args)
    if args.eval_only:
        return evaluate(model, chat, args, world.splits, args.eval_episodes)
    parts = Parts(model, chat, world, args)
    run.start(model=model)

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0,
        fused=True)  # no copies of the weights in the step
    trained = {"model": model, "average": parts.average, "optimizer": optimizer}
    progress = run.resume(**trained) or {
        "step": 0, "buffer": [], "foretold": [], "learns": not args.critic_gate,
        "before": measure(parts, "before")}
    buffer = [Transition(**t) for t in progress["buffer"]]
    for step in run.steps(progress["step"], args.steps):
        rng = random.Random(f"{args.seed} {step}")
        parts.counts.clear()
        played = act(parts, step, progress["learns"])  # (1)
        fresh = [t for episode in played for t in transitions(episode)]
        buffer = (buffer + fresh)[-args.buffer_size:]
        run.lap("rollout")
        metrics = follow_critic(parts, progress, fresh, ("foretell", step), rng)
        run.lap("gate")

        batch = sample(buffer, args, rng, args.batch_size * args.updates)
        l1_pairs = successor_lessons(parts, batch, ("backup", step))  # (2)
        run.lap("backup")
        count = args.actor_states * progress["learns"]
        states = [t.state for t in sample(buffer, args, rng, count)]
        tries = refine(parts, states, ("refine", step))  # (4), (5)
        l2_pairs = policy_lessons(parts, states, tries, ("choose", step))
        run.lap("refinement")
        anchor_pairs = anchor_lessons(parts, fresh, rng)  # none in the paper
        common.set_rate(optimizer, args.lr * min(1, step / 10))
        metrics |= update(parts, optimizer, l1_pairs, l2_pairs, anchor_pairs)  # (3), (6), (7)
        run.lap("update")

        metrics |= watch_lessons(parts, batch, l1_pairs, l2_pairs, tries)
        end_step(run, parts, played, metrics)
        progress |= {"step": step, "buffer": [vars(t) for t in buffer]}
        run.save_if_due(progress, **trained)

    finish(run, parts, progress)


# ---------------------------------------- beside the paper, and at the end only for --model tiny
# words, in and out

LONGEST = 300  # characters that a forecast repeats of an observation, or of an action
ENDS = "failure", "fails", "no success", "success", "succeeds"


def numbered(word, texts):
    """Replies of one part as another reads them, a line each."""
    texts = filter(None, map(squeezed, texts))
    return [f"{word} {number}: {text}" for number, text in enumerate(texts, 1)]


def squeezed(text):
    """A reply in one line, each run of blanks as one.

    Not for actions: envs.one_line keeps their blanks, so that they mean the same when said again.
    """
    return " ".join(text.split())


def written(action):
    """An action as the policy writes it, without a thought before it."""
    return f"Action:\n{action}" if "\n" in action else f"Action: {action}"


def action_of(world, reply):
    """What the world reads in a reply, native thoughts left out."""
    return world.read(common.aloud(reply))


def in_form(world, reply):
    """A reply as the policy learns it: native thought, thought, Action:, its action, no more.

    "" where there is no action, where only the first line of several could be meant, or where
    another action would be read in this text.
    """
    spoken, start = common.aloud(reply), 0
    action = world.read(spoken)
    if not action:
        return ""
    marks = [*envs.MARKER.finditer(spoken)] or [*envs.HEADING.finditer(spoken)]
    if marks and world.read(spoken[marks[-1].start():]) == action:
        start = marks[-1].start()
    elif stands_out(world, spoken, action):  # a tool call; one line of it is found in any case
        start = max(0, spoken.rfind(action if action in spoken else action.split("\n")[0]))
    elif spoken.partition(action)[2].strip(" \n*_`.\"'"):
        return ""
    thought = re.sub(r"\s*```\w*\s*$", "", spoken[:start]).rstrip(" \n*_`#>-")  # nor a fence
    native, _, _ = reply.rpartition(spoken)  # "" too where it stands amid what is said
    text = native.lstrip() + f"{thought}\n{written(action)}".lstrip()
    return text if action_of(world, text) == action else ""


def stands_out(world, spoken, action) -> bool:
    """Whether an action is read in a place of its own, not as the first line there is."""
    return world.read(f"Thought:\n{spoken}") == action != ""


def is_whole(world, reply):
    """Whether the action of a reply that the limit cut had ended: its last line is not needed."""
    lines = common.aloud(reply).rpartition("\n")[0]
    return stands_out(world, lines, action_of(world, reply))


def in_hindsight(t):
    """What came of a transition (or a Future), as a forecast would tell it."""
    follows = f" Then: {shortened(envs.one_line(t.then))}." if t.then else ""
    return f"Next: {first_sentence(t.result)}{follows} End: {ending(t)}."


def ending(t):
    """The reward r in words, for the targets of (2)."""
    if t.turns is not None:
        return f"success in {envs.count(t.turns, 'turn')}"
    return f"failure, with a score of {t.score:.2f} of 1" if t.score else "failure"


def first_sentence(observation):
    """What a forecast repeats of an observation: not the turns left, the tally, the list."""
    return shortened(re.split(r"(?<=[.?!]) ", squeezed(envs.bare(observation)), maxsplit=1)[0])


def shortened(text):
    """So that a forecast which tells it has room for its end."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rstrip()} ..."


def rank(critique) -> int | None:
    """A critique's verdict, 0 (bad) to 4 (great); None where it has none."""
    return common.chosen(critique, "Verdict", VERDICTS)


def foresees_success(forecast) -> bool | None:
    """The end that a forecast tells, None where it tells none; for logs and the gate."""
    end = common.chosen(forecast, "End", ENDS)
    return None if end is None else end > 2


# ---------------------------------------------------------- what is refused, evaluated and logged

AT_LEAST = {
    "k": 1, "m": 1, "forecast_tokens": 1, "critique_tokens": 1, "buffer_size": 1, "margin": 1,
    "episodes_per_step": 1, "updates": 1, "actor_states": 1, "examples": 1, "ema": 0,
    "actor_weight": 0, "anchor": 0, "reader_temperature": 0, "critic_gate": 0}
LIMITS = {part: "--" + form.limit.replace("_", "-") for part, form in PARTS.items()}


def check_args(args) -> envs.World:
    """Everything that can be refused before a model is loaded."""
    common.check_common(args)
    common.check_at_least(args, AT_LEAST)
    common.check(args.ema < 1, f"--ema must be below 1, not {args.ema}")
    common.check(args.margin < len(VERDICTS),
                 f"--margin: verdicts are at most {len(VERDICTS) - 1} apart, not {args.margin}")
    common.check(args.critic_gate <= 1, f"--critic-gate must be at most 1, not {args.critic_gate}")
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


def evaluate(model, chat, args, splits, count):
    """`count` fixed episodes of each split -> ({split: metrics}, an episode of the last)."""
    found = {}
    for split in [split for split in ("test", "ood") if split in splits]:
        played = rollout(model, chat, args, split, range(count),
                         temperature=args.eval_temperature, stream=("evaluate",))
        _, se = common.mean_se(episode.won for episode in played)
        found[split] = watch(played) | {"se": se, "n": count}
        tqdm.write(common.result_line(split, found[split]))
    return found, played[0]


def measure(parts, when):
    """The whole evaluation -> ({split: metrics}, one episode with what all parts say to it)."""
    args, splits = parts.args, parts.world.splits
    found, episode = evaluate(parts.model, parts.chat, args, splits, args.eval_episodes)
    return found, annotated(parts, episode, (when,))


def end_step(run, parts, played, metrics):
    """What a step leaves: its numbers, its episodes, and an evaluation where one is due."""
    args, records = parts.args, [vars(episode) for episode in played]
    metrics |= watch(played) | watch_parts(parts)
    warn_forgotten(parts)
    sampled = [episode.tokens for episode in played]
    sampled += [counts["tokens"] for counts in parts.counts.values()]
    run.count(episodes=len(played), env_steps=sum(len(episode.valid) for episode in played),
              gradient_steps=args.updates, tokens=sum(sampled))
    if run.step % args.eval_every == 0 and run.step < args.steps:
        found, episode = evaluate(
            parts.model, parts.chat, args, ["test"], max(1, args.eval_episodes // 5))
        metrics |= {f"eval_{name}": value for name, value in found["test"].items()}
        records.append(annotated(parts, episode, ("shown", run.step)))
    run.log(metrics, LIMITS)
    run.write_rollouts([{"step": run.step, **record} for record in records])


def finish(run, parts, progress):
    """The last evaluation, and what a run leaves."""
    args, (before, first) = parts.args, progress["before"]
    if not progress["learns"]:
        tqdm.write(f"warning: --critic-gate {args.critic_gate} never opened (see auc in "
                   "metrics.jsonl): L2 taught nothing to the policy", file=sys.stderr)
    after, last = measure(parts, "after")
    ends = envs.ends(args.env, args.eval_episodes)
    run.complete(parts.model, parts.chat, "nlac", args.ablation, before, after, ends, [first, last])


def is_readable(world, mark, reply) -> bool:
    """Whether what stands behind the mark of a part can be read; an action may be a tool call."""
    if mark == "Action":
        return stands_out(world, reply, action_of(world, reply))
    if mark == "Best":
        return re.search(r"\d", common.marked(reply, mark) or "") is not None
    return {"End": foresees_success, "Verdict": rank}[mark](reply) is not None


def watch(episodes) -> dict:
    """What was played; the entropy is an estimate, per sampled token."""
    valid = [ok for episode in episodes for ok in episode.valid]
    tokens = sum(episode.tokens for episode in episodes)

    def share(name):
        return common.mean(getattr(episode, name) for episode in episodes)

    return {"success": share("won"), "score": share("score"), "turns": len(valid) / len(episodes),
            "invalid": valid.count(False) / max(1, len(valid)), "truncated": share("truncated"),
            "entropy": -sum(episode.logprob for episode in episodes) / max(1, tokens)}


def watch_parts(parts) -> dict:
    """Tokens that each part sampled, and shares of its replies.

    parse_PART: can be read; cut_PART: met the limit; lost_PART: came to nothing by that;
    overlong_PART: no room to ask.
    """
    found = {}
    for part, counts in parts.counts.items():
        found[f"tokens_{part}"] = counts["tokens"]
        for what in ("parse", "cut", "lost", "overlong") if counts["asked"] else ():
            found[f"{what}_{part}"] = counts[what] / counts["asked"]
    return found


def watch_lessons(parts, batch, l1_pairs, l2_pairs, tries) -> dict:
    """How many lessons came of a step, and what the targets of M are like.

    targets_terminal: composed of an outcome; targets_overlong: longer than M may write.
    """
    args, found = parts.args, watch_refinement(tries) | {"lessons": len(l2_pairs)}
    if args.ablation == "frozen-critic":
        return found
    overlong = [len(target) > args.forecast_tokens for _, target in l1_pairs]
    return found | {"targets_dropped": len(batch) - len(l1_pairs),
                    "targets_terminal": common.mean(t.done for t in batch),
                    "targets_overlong": sum(overlong)}


def watch_refinement(tries) -> dict:
    """How far refinement changes the policy's action, and whether the critic likes that.

    changed: a^r is another action; better: it is judged better (None where none was judged);
    sentiment: the mean of all verdicts that can be read, 0 to 1.
    """
    if not tries:
        return {}
    ranks = [[rank(one.critique) for one in some] for some in tries]
    read = [value for some in ranks for value in some if value is not None]
    changed = [some[-1].action != some[0].action for some in tries if some[-1].action]
    better = [some[-1] > some[0] for some in ranks if None not in (some[0], some[-1])]
    return {name: common.mean(values) if values else None for name, values in (
        ("changed", changed), ("better", better), ("sentiment", [value / 4 for value in read]))}


def annotated(parts, episode, stream) -> dict:
    """An episode as rollouts.jsonl keeps it, with what critic and refiner say to each turn."""
    steps, said = transitions(episode), episode.said[:1]
    tries = refine(parts, [t.state for t in steps], stream, [t.reply for t in steps])
    for t, some in zip(steps, tries):
        for number, one in enumerate(some):
            said.append(["refined" if number else "act", one.reply])
            said += [["future", text] for text in one.futures[:2]]
            if one.critique:  # the last try may not have been judged
                said.append(["critique", one.critique])
        said.append(["world", t.result])
    return vars(episode) | {"said": said}


def warn_forgotten(parts):
    """Says once of a part that few of its replies can be read, or few of its prompts have room."""
    for part, counts in parts.counts.items():
        asked, overlong = counts["asked"], counts["overlong"]
        if overlong > asked / 2:
            told = (f"{overlong} of {asked} prompts of {part} have no room in the context: see "
                    f"--max-context, {LIMITS[part]}")
        elif counts["parse"] < (asked - overlong) / 2:
            told = (f"{counts['parse']} of {asked - overlong} replies of {part} can be read: see "
                    "--lr, --frozen-parts, --shots, --prefill")
        else:
            continue
        if part not in parts.forgotten:
            parts.forgotten.add(part)
            tqdm.write(f"warning: {told}", file=sys.stderr)


# --------------------------------------------------- ablations and departures, off by default

WINDOW = 256  # the latest transitions whose forecasts --critic-gate counts


def of_others(futures):
    """--ablation blind-critic: futures of other states, a floor; none of a state that is alone."""
    return futures[1:] + futures[:1] if len(futures) > 1 else [[]]


def label(critique) -> str:
    """--ablation label-only: the verdict of a critique, without its reasons."""
    verdict = rank(critique)
    return f"Verdict: {'none' if verdict is None else VERDICTS[verdict]}."


def best_replies(parts, states, tries, stream) -> list[str]:
    """--distil best: the reply of the try that pi_r names behind Best:; "" where that is no lesson.

    Tries with one critique are equal in the critic's eyes: the first is meant, so that the policy
    keeps its own action. The action must be --margin verdicts better than the worst other one; a
    try without a verdict that can be read is not compared. Where pi_r repeats the policy's action,
    as none is better, that is compared with a bad one.
    """
    asked = [refiner_messages(parts.world, *row, CHOOSER) for row in zip(states, tries)]
    found = []
    for some, named in zip(tries, parts.ask("chooser", asked, stream)):
        named = re.sub(r"\btry ", "", named, flags=re.IGNORECASE)  # "Best: Try 2, as try 1 fails."
        number = common.chosen(named, "Best", [str(i + 1) for i in range(len(some))])
        ranks = [rank(one.critique) for one in some]
        if number is None or None in ranks:
            found.append("")
            continue
        critiques = [one.critique for one in some]
        best = some[critiques.index(critiques[number])]
        same = [value for one, value in zip(some, ranks) if one.action == best.action]
        others = [value for one, value in zip(some, ranks) if one.action != best.action]
        lead = min(same) - min(others, default=VERDICTS.index("bad"))
        found.append(best.reply if lead >= parts.args.margin else "")
    return found


def anchor_lessons(parts, fresh, rng):
    """--anchor: some of what was just played, a sampled KL to the policy that played it."""
    count = parts.args.batch_size // 4 * parts.args.updates if parts.args.anchor else 0
    some = rng.sample(fresh, min(count, len(fresh)))
    asked = [policy_messages(parts.world, t.state) for t in some]
    replies = ["" if t.cut else in_form(parts.world, t.reply) for t in some]
    return lessons(parts, "policy", asked, replies)


def even_weights(buffer) -> list[float]:
    """--even-turns: weights of transitions, larger for late turns.

    These are rare while most episodes are lost early, and they decide the others.
    """
    turns = Counter(len(t.state) for t in buffer)
    return [turns[len(t.state)] ** -0.75 for t in buffer]


def follow_critic(parts, progress, fresh, stream, rng) -> dict:
    """How well M foretold what was just played -> metrics. May open --critic-gate, for good."""
    foretold = foretell(parts, progress["foretold"], fresh, stream, rng)
    metrics = watch_foretold(foretold)
    learns = progress["learns"] or opens(parts.args, foretold, metrics["auc"])
    progress |= {"foretold": foretold, "learns": learns}
    return metrics


def foretell(parts, foretold, fresh, stream, rng) -> list:
    """What M said of what was just played, before L1 sees it; the latest WINDOW.

    Of each transition [share of k forecasts that end in success, whether it came, turn].
    """
    k, foretold = parts.args.k, [*foretold]
    some = sample(fresh, parts.args, rng, 32)
    forecasts = parts.foresee([t.state for t in some], [t.action for t in some], stream, k)
    for t, texts in zip(some, groups(forecasts, k)):
        ends = [end for end in map(foresees_success, texts) if end is not None]
        if ends:
            foretold.append([common.mean(ends), t.turns is not None, len(t.state) // 2])
    return foretold[-WINDOW:]


def watch_foretold(foretold) -> dict:
    """M's calibration: its AUC, how much success it told, and how much there was."""
    if not foretold:
        return {"auc": None}
    shares, came, _ = zip(*foretold)
    told = {"foretold": common.mean(shares), "came": common.mean(came)}
    return {"auc": auc_by_turn(foretold)} | told


def opens(args, foretold, area) -> bool:
    """--critic-gate: whether L2 learns from now on, by the AUC `area` of a full window."""
    if args.critic_gate == 0 or args.ablation == "frozen-critic":  # that one will never learn more
        return True
    return len(foretold) == WINDOW and area is not None and area >= args.critic_gate


def auc_by_turn(foretold) -> float | None:
    """How often M told more success of an action that led there than of one that did not.

    Of two actions in the same turn: between turns the state alone would tell, as the later ones
    are nearer to the end, whatever is done in them.
    """
    wins = []
    for told, came, turn in foretold:
        for other_told, other_came, other_turn in foretold:
            if came and not other_came and turn == other_turn:
                wins.append((told > other_told) + (told == other_told) / 2)
    return common.mean(wins) if wins else None


# -------------------------------------------- a tiny model, and worked examples by the same means

TINY = dict(
    steps=150, lr=1e-3, batch_size=64, micro_batch_size=16, rollout_batch_size=256, device="cpu",
    max_new_tokens=64, forecast_tokens=64, critique_tokens=64, eval_episodes=500, k=4,
    reader_temperature=0.0, ema=0.95, episodes_per_step=64, actor_states=64,
    distil="best", margin=3, frozen_parts=True, anchor=0.3, critic_gate=0.7, even_turns=True)
QUICK = dict(
    steps=4, critic_gate=0.0, episodes_per_step=8, updates=1, batch_size=16, actor_states=8,
    eval_episodes=16, eval_every=2, save_every=2, examples=600)
READER = "You read. Repeat the first observation, the last observation and the action, a line each."
MARKS = ["<episode>\n", "\n</episode>\n", "Next action: ", "\nSeen after it: ", "\nCritique: ",
         "\nThen the player does: ", "\nForecast from there: ", "Action: ", "Next: ", " Then: ",
         " End: ", "Futures: ", ", at best in ", ". One goes on with: ", ". One fails: ",
         " Verdict: ", "Best: "]
MARKS += [f"\n{word} {number}: " for word in ("Future", "Try") for number in range(1, 9)]


def load(world, args):
    """The model that plays all parts, and its chat; a tiny one is made from `warmup`."""
    if common.is_tiny(args.model) and args.device == "cpu":
        torch.set_num_threads(min(2, torch.get_num_threads()))  # more only wait for each other
    prompts = SUCCESSOR, BACKUP, EVALUATOR, REFINER, CHOOSER, READER
    asked = [policy_messages(world, [""])]
    asked += [part_messages(prompt, world, [""]) for prompt in prompts]
    constants = [messages[0]["content"] for messages in asked] + MARKS
    model, chat = common.load(
        args.model, corpus=lambda: warmup(world, args), constants=constants, device=args.device,
        dtype=args.dtype, thinking=args.thinking, max_context=args.max_context,
        gradient_checkpointing=args.gradient_checkpointing, lora_rank=args.lora_rank)
    first = with_shots("policy", policy_messages(world, [world.reset(seed=0)[0]]), args)
    word = PARTS["policy"].word if args.prefill else ""
    check_room(args, chat, model, first, args.max_new_tokens + len(chat.encode(word)))
    return model, chat


@dataclass
class Future:
    """How an episode goes on, before it is told."""

    result: str
    then: str
    turns: int | None  # to success
    score: float = 0.0


def critique_text(futures, reason=""):
    """How to read futures: how many succeed, how soon, what one goes on with, or one fails by."""
    text = f"Futures: {tally(futures)}"
    lost = [future for future in futures if future.turns is None]
    if hint := hinted(futures):
        text += f". One goes on with: {envs.one_line(hint)}"
    elif lost:
        text += f". One fails: {first_sentence(lost[0].result).rstrip('.')}"
    return f"{text}.{reason} Verdict: {VERDICTS[worth(futures)]}."


def tally(futures):
    """How many futures succeed, and how soon."""
    turns = [future.turns for future in futures if future.turns is not None]
    text = f"{len(turns)} of {len(futures)} succeed"
    return f"{text}, at best in {envs.count(min(turns), 'turn')}" if turns else text


def hinted(futures):
    """What the player does next in the first future that succeeds and is not over at once."""
    return next((future.then for future in futures if future.turns and future.then), "")


def worth(futures):
    """The verdict on futures, as an index of VERDICTS: by how many of them succeed."""
    share = common.mean(future.turns is not None for future in futures)
    return sum(share > bound for bound in (0.1, 0.35, 0.6, 0.85))


def soonest(futures):
    """What is compared: more successes first, then the sooner one."""
    turns = [future.turns for future in futures if future.turns is not None]
    return len(turns), -min(turns, default=0)


def tried(action, futures):
    """A judged try, in words."""
    texts = [in_hindsight(future) for future in futures]
    return Try(written(action), action, texts, critique_text(futures))


def examples_of(world, args, t, possible, draw, rng, reasons=False) -> dict:
    """{part: (messages, reply)} about a transition of random play; `draw(action)`: k futures of it.

    The successor tells a future, B_L counts one turn on, the evaluator reads outcomes. The refiner
    repeats what was judged good, else takes the critique's hint, else does anything untried; asked
    to compare, it names the try with more successes, then the sooner one. A share of the critiques
    is shown as --ablation label-only shows them. `reasons`: say why, too, in words that are true.
    """
    label_only = args.ablation == "label-only" if reasons else rng.random() < 0.15
    thoughts = reasons and not args.prefill
    futures = draw(t.action)
    following = draw(t.action)[0]  # what B_L reads as d'
    action = rng.choice(possible)
    found = {
        "policy": (policy_messages(world, t.state), in_words(world, t, action, thoughts)),
        "successor": (successor_messages(world, t.state, t.action), in_hindsight(futures[0])),
        "backup": counted_on(world, t, following, rng.choice(possible))}
    actions = rng.sample(possible, min(args.m + 1, len(possible)))
    others = [draw(action) for action in actions]
    texts = [in_hindsight(future) for future in futures]
    reason = compared(futures, actions, others) if reasons else ""
    asked = evaluator_messages(world, t.state, t.action, texts)
    found["evaluator"] = asked, critique_text(futures, reason)

    tries = [tried(*row) for row in zip(actions, others)]
    if label_only:
        tries = [Try(one.reply, one.action, [], label(one.critique)) for one in tries]
    count = rng.randint(1, max(1, len(tries) - 1))  # tries that the refiner reads
    refined = better_than(actions[:count], others[count - 1], possible, rng, label_only)
    asked = refiner_messages(world, t.state, tries[:count])
    found["refiner"] = asked, in_words(world, t, refined, thoughts)
    if chosen := choice_text(others, label_only, thoughts):
        found["chooser"] = refiner_messages(world, t.state, tries, CHOOSER), chosen
    return found


def counted_on(world, t, following, then):
    """(messages, reply) of B_L, which counts the forecast `following` on by one turn."""
    left = world.max_turns - len(t.state) // 2  # turns, this one counted
    turns = following.turns + 1 if following.turns and following.turns < left else None
    messages = backup_messages(world, t, then, in_hindsight(following))
    return messages, in_hindsight(Future(t.result, then, turns))


def better_than(actions, futures, possible, rng, label_only):
    """What the refiner says to tries: the last one, judged good by its `futures`; else their hint,
    which a bare label lacks; else any action that is new.
    """
    untried = [action for action in possible if action not in actions] or possible
    hint = "" if label_only else hinted(futures)
    action = hint if hint in untried else rng.choice(untried)
    return actions[-1] if worth(futures) >= VERDICTS.index("good") else action


def choice_text(futures, label_only, thoughts):
    """What the chooser says to tries with these `futures`; "" where no single one is the best."""
    values = [worth(some) if label_only else soonest(some) for some in futures]
    best = values.index(max(values))
    if len(values) == 1 or values.count(values[best]) > 1:
        return ""
    if not thoughts:
        return f"Best: {best + 1}"
    seen = [VERDICTS[worth(some)] if label_only else tally(some) for some in futures]
    reason = "; ".join(f"Try {number}: {text}" for number, text in enumerate(seen, 1))
    return f"{reason}. So try {best + 1} is the best.\nBest: {best + 1}"


def in_words(world, t, action, thoughts):
    """An action as the policy writes it.

    With `thoughts`, after what a player who knows the episode alone can truly say.
    """
    if not thoughts:
        return written(action)
    done = [action_of(world, reply) for reply in t.state[1::2]]
    why = "did this before, and it may help now" if action in done else "have not done this yet"
    return f"Now I read: {first_sentence(t.state[-1])} I {why}.\n{written(action)}"


def compared(futures, actions, others):
    """What a critique says of an action beside `actions`, whose futures are `others`."""
    best = max(others, key=soonest)
    if soonest(best) <= soonest(futures):
        return " The action is as good as any, as none is known to succeed more often or sooner."
    better = envs.one_line(actions[others.index(best)])
    return f" Not the best: what succeeds more often or sooner is {better}."


def random_episode(world, seed, rng, actions=(), slips=0.0) -> list[tuple]:
    """A random player's episode on train, after `actions` -> [(transition, what was possible)].

    `slips`: how often it says the first word of one action with the rest of another. Where the
    world lists nothing, it says any word that it has just read.
    """
    episode, possible, given = begin(world, "train", seed), [], iter(actions)
    while not episode.over:
        seen = envs.bare(episode.said[-1][1]).split()
        possible.append(world.admissible() or seen or ["wait"])
        action = next(given, None)
        if action is None:
            action = rng.choice(possible[-1])
        if rng.random() < slips:
            action = " ".join([action.split(" ")[0], *rng.choice(possible[-1]).split(" ")[1:]])
        take_turn(world, episode, written(action))
    return list(zip(transitions(episode), possible))


def with_shots(part, messages, args):
    """The messages of a call, --shots worked examples behind the system prompt."""
    if not args.shots:
        return messages
    shots = worked_examples(args.env, args.shots, args.show_actions, args.k, args.m, args.prefill,
                            args.ablation)
    return [messages[0], *shots[part], *messages[1:]]


@functools.lru_cache(maxsize=8)
def worked_examples(env, count, show_actions, k, m, prefill, ablation):
    """{part: --shots worked examples, as messages}: random play on train, and what came of it.

    By turns the end of an episode that was won and the start of one
    that was lost, where a random player does win. Futures are played: where the game goes on, it
    goes on at random. B_L's are single turns of these episodes, with the next one as the forecast.
    """
    args = Args(env=env, shots=count, show_actions=show_actions, k=k, m=m, prefill=prefill,
                ablation=ablation)
    world, rng = envs.make(args.env, show_actions=args.show_actions), random.Random(0)
    found = {part: [] for part in PARTS}
    played = {True: [], False: []}  # by whether they were won
    for seed in range(10**6, 10**6 + 8 + 8 * args.shots):  # far from the seeds that are learnt from
        steps = random_episode(world, seed, rng)
        played[steps[0][0].turns is not None].append(steps)
    for i in range(20 * args.shots):
        won = i % 2 == 0
        some = played[won] or played[not won]
        steps = some[i // 2 % len(some)]
        turn = len(steps) - 1 if won else 0
        t, possible = steps[turn]
        before = [one.action for one, _ in steps[:turn]]

        def draw(action):
            futures = []
            for _ in range(args.k):
                new, _ = random_episode(world, t.seed, rng, [*before, action])[turn]  # noqa: B023
                futures.append(Future(new.result, new.then, new.turns))
            return futures

        examples = examples_of(world, args, t, possible, draw, rng, reasons=True)
        del examples["backup"]  # as drawn; one that was played is true
        longer = [episode for episode in some if len(episode) > 1]
        if longer:
            episode = longer[i // 2 % len(longer)]
            (before_last, _), (last, _) = episode[-2:] if turn else episode[:2]
            examples["backup"] = played_backup(world, before_last, last)
        for part, (messages, reply) in examples.items():
            if messages and len(found[part]) < 2 * args.shots:
                shot = {"role": "assistant", "content": reply, "shot": True}
                found[part] += [messages[-1], shot]
    world.close()
    return found


def played_backup(world, t, following):
    """(messages, reply) of B_L: a turn as it was played, the next one as the forecast."""
    merged, forecast = (in_hindsight(Future(one.result, one.then, one.turns))
                        for one in (t, following))
    return backup_messages(world, t, t.then, forecast), merged


def warmup(world, args):
    """What a model made from nothing is taught: to read, and the form of every part's reply.

    Episodes come from a random player on the train split, unfiltered. The policy learns to answer
    with any possible action. Some that were played are impossible, as a refusal that no warm-up
    ever showed would upset all parts at once. Futures are those of *other, random* transitions with
    random ends, so that no part knows what follows what. No part sees an expert.
    """
    rng, steps, examples = random.Random("warm-up"), [], []
    for seed in range(max(50, args.examples // 4)):
        steps += random_episode(world, seed, rng, slips=0.1)
    for _ in range(args.examples):
        t, possible = rng.choice(steps)
        left = world.max_turns - len(t.state) // 2
        chance = rng.random()

        def draw(action):
            return [random_future(rng, steps, left, chance) for _ in range(args.k)]  # noqa: B023

        read = part_messages(READER, world, t.state, next_action(t.action))
        seen = first_sentence(t.state[0]), first_sentence(t.state[-1])
        examples.append((read, "\n".join([*seen, envs.one_line(t.action)])))
        made = examples_of(world, args, t, possible, draw, rng).values()
        examples += [(messages, reply) for messages, reply in made if messages]
    facts = world.facts() if hasattr(world, "facts") else []
    for fact in facts * (4 * args.examples // max(1, len(facts))):
        examples.append(([{"role": "user", "content": " ".join(fact.split()[:-1])}], fact))
    rng.shuffle(examples)
    return examples


def random_future(rng, steps, left, chance):
    """What was seen in another transition, an action of yet another, and an end drawn at random."""
    turns = rng.randint(1, left) if rng.random() < chance else None
    goes_on = turns != 1 and (turns or rng.random() < 0.5)
    then = rng.choice(rng.choice(steps)[1]) if goes_on else ""
    return Future(rng.choice(steps)[0].result, then, turns)


if __name__ == "__main__":
    main()
