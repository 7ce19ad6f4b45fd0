"""Natural Language Actor-Critic (Hong et al., arXiv 2512.04601): the critic writes text.

One language model plays every part, each through a prompt of its own. With s the episode so far,
a an action, d a description of the future, theta_bar the EMA of the weights theta, a step is
(Algorithm 1 of the paper):

    act       a ~ pi(. | s), a thought and an action; (s, a, s', done) goes to a buffer, as text (1)
    backup    B_L(s, a, s', d'), d' ~ M_bar(. | s', a'), a' ~ pi_bar(. | s'), without gradient   (2)
    L1        -log M(B_L | s, a): KL(B_L M_bar || M) up to a constant                            (3)
    critique  Q_L(s, a) = E(s, a, d^(1..k)), d ~ M_bar(. | s, a)                                 (4)
    refine    a^r ~ pi_r(. | s, a^1, Q_L(s, a^1), ..., a^m, Q_L(s, a^m)), without gradient       (5)
    L2        -log pi(a^r | s): no policy gradient, no value head, no list of actions            (6)
    average   theta_bar <- ema theta_bar + (1 - ema) theta                                       (7)

The paper's prompts, learning rate, EMA rate, buffer and batch sizes are not public: ours.
Departures from the paper, and why:
 1. The target of a terminal transition is composed from what was seen and the outcome, not written
    by B_L: it grounds M.
 2. The refiner may say keep in place of the same action; L2 then teaches what the policy said.
 3. The critic's futures come from theta_bar, and so does a' in (2): averaged weights are steadier.
 4. Targets and lessons of a step are made once, before its gradient steps; each of these takes L1
    and L2 together.
 5. A forecast ends in a marked end and a critique in a marked verdict: logs read them.
A tiny model needs more (TINY, each a flag): B_L, E and pi_r from the start weights, as what nobody
trains is forgotten (the paper reports that forgetting); L2 on approved actions alone, as it
proposes at random, and L1 on targets that tell an end; imitation of what it just played, as M is
trained far more than pi; L1 alone at first; late turns oversampled; k = 4, m = 2.

    python nlac.py                            # repair shop, tiny model: see README for numbers
    python nlac.py --ablation frozen-critic --out-dir runs/frozen   # a floor: M never learns
    python nlac.py --model smollm2 --shots 2 --prefill True --show-actions True --quick True
    python nlac.py --model Qwen/Qwen2.5-1.5B-Instruct --env 20q     # the paper's algorithm, a day
"""

import copy
import dataclasses
import functools
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass

import torch
from tqdm import tqdm

import common
import envs


@dataclass
class Args:
    """The paper's setting; "not in the paper" marks what it leaves open. TINY: a tiny model's."""

    # shared by all scripts
    model: str = common.flag("tiny", "tiny, tiny:WIDTHxLAYERS, smollm2, a .gguf file, a local directory or a hub id")
    env: str = common.flag("repair", "a world: a name, NAME:ARGUMENT, or path/to/file.py:Class")
    seed: int = common.flag(0, "of everything sampled; the tiny model is built with seed 0")
    steps: int = common.flag(400, "steps of the loop above, 8 gradient steps each (paper: 30,720 gradient steps)")
    lr: float = common.flag(1e-6, "AdamW, constant after 10 steps (not in the paper)")
    batch_size: int = common.flag(32, "transitions per gradient step (not in the paper)")
    micro_batch_size: int = common.flag(1, "sequences per backward pass; changes memory and speed, not the gradient")
    rollout_batch_size: int = common.flag(64, "episodes or replies sampled side by side; changes memory and speed alone")
    max_new_tokens: int = common.flag(512, "of one reply of the policy or the refiner (not in the paper)")
    max_context: int | None = common.flag(None, "tokens of a prompt with its reply; default: what the model can read")
    temperature: float = common.flag(0.7, "of policy, successor and refiner, and of their likelihoods (not in the paper)")
    eval_temperature: float = common.flag(0.7, "of the policy in evaluation (not in the paper)")
    eval_episodes: int = common.flag(100, "test episodes, first and last; a fifth of them in between (paper: 500)")
    eval_every: int = common.flag(25, "steps between evaluations")
    eval_only: bool = common.flag(False, "evaluate --model and stop; writes nothing")
    save_every: int = common.flag(25, "steps between checkpoints")
    out_dir: str = common.flag("", "default: runs/nlac-ENV-sSEED")
    resume: bool = common.flag(False, "continue the run in --out-dir")
    device: str = common.flag(common.default_device(), "cpu, cuda, cuda:1, mps")
    dtype: str = common.flag("auto", "auto (float32 weights; bfloat16 compute on a GPU), float32, bfloat16")
    thinking: bool = common.flag(False, "let a thinking model think natively before each reply")
    shots: int = common.flag(0, "worked examples before the first turn of every part, by a random player on train")
    prefill: bool = common.flag(False, "begin every reply with its marked word, such as Action: (no room to reason before it)")
    show_actions: bool = common.flag(False, "list what is possible now in every observation (one more departure)")
    quick: bool = common.flag(False, "a small run through every line, to see that it works; overrides the sizes")
    # NLAC
    k: int = common.flag(1, "futures per critique (paper)")
    m: int = common.flag(1, "rounds of refinement (paper)")
    forecast_tokens: int = common.flag(256, "of one reply of M or B_L (not in the paper)")
    critique_tokens: int = common.flag(256, "of one reply of E (not in the paper)")
    reader_temperature: float = common.flag(0.7, "of B_L and E (not in the paper)")
    ema: float = common.flag(0.99, "share of theta_bar that a gradient step keeps; 0: no average (not in the paper)")
    buffer_size: int = common.flag(20_000, "transitions in the replay buffer (not in the paper)")
    episodes_per_step: int = common.flag(32, "episodes collected per step (not in the paper)")
    updates_per_episode: float = common.flag(0.25, "gradient steps per collected episode (not in the paper)")
    actor_states: int = common.flag(256, "states refined per step (not in the paper)")
    actor_weight: float = common.flag(1.0, "of L2; L1 has weight 1 (not in the paper)")
    distil: str = common.flag("all", "L2 teaches all refinements (paper), or kept: approved actions alone", choices=["all", "kept"])
    frozen_parts: bool = common.flag(False, "B_L, E and pi_r from the start weights; False: all share theta (paper)")
    anchor: float = common.flag(0.0, "weight of imitating the actions just played; 0: none (paper)")
    critic_warmup: int = common.flag(0, "first steps with L1 alone, the start policy acting; 0: none (paper)")
    even_turns: bool = common.flag(False, "sample the buffer evenly over turns; False: a plain buffer (paper)")
    ablation: str = common.flag("none", "no bootstrap; futures of other states; M as it started",
                                choices=["none", "mc-backup", "blind-critic", "frozen-critic"])
    examples: int = common.flag(4000, "rounds of warm-up examples that make a tiny model")


# ------------------------------------------------------------------------------------------ prompts
# The paper's are not public; the wording is ours. A world states the game, a part the form of its
# reply. What stands behind Next:, End: and Verdict: is read for logs; Action: is what is done.

POLICY = ("First think in a sentence or two. Then write Action: and your next action, on a line of "
          "its own.")
TOLD = "This is what the player of a game is told:"  # before the system prompt, for all other parts
SUCCESSOR = """You foresee how an episode goes on. Read the episode so far, and the next action.
Begin with Next: and what the action brings about at once, in one sentence.
Go on in a few sentences: what is likely to follow, and why.
Finish with End: and how the episode ends: failure, or success in so many turns, this one
counted."""
BACKUP = """You make a forecast start one turn earlier. Read the episode so far, the next action,
what was seen after it, and a forecast of what follows from there. Write a forecast of the action,
as if nothing after it had been seen yet.
Begin with Next: and what was seen after the action, in one sentence.
Go on in a few sentences, the more briefly the further ahead: what is likely to follow, and why.
Finish with End: and the end that is foreseen, one turn further away: failure, or success in so many
turns; failure if the turns left do not suffice."""
EVALUATOR = """You judge an action by the futures it may lead to. Success is better than failure,
and sooner is better than later. Read the episode so far, the next action, and what may follow from it.
Begin with Futures: and say in a few sentences what they show: how many succeed, how soon, and why.
Say whether the action is the best there is now, and what would be better.
Finish with Verdict: and one word: bad, weak, fair, good or great."""
REFINER = """You improve an action. Read the episode so far, and the next actions that were tried,
with a critique of each.
First say in a sentence or two what the next action should achieve, and why. Speak as the player,
who has seen the episode alone: no word of tries or critiques.
Then write Action: and an action, on a line of its own: keep if the last try was judged good or
great, else a better action that was not tried."""
VERDICTS = ["bad", "weak", "fair", "good", "great"]  # the order of sentiments of the paper's theory
FORCED = {"policy": "Action:", "successor": "Next:", "backup": "Next:", "evaluator": "Futures:",
          "refiner": "Action:"}  # what --prefill puts into a part's mouth


def policy_messages(world, history):
    """The policy's growing dialogue; `history` is [observation, reply, ..., observation]."""
    messages = [{"role": "system", "content": f"{world.system}\n{POLICY}"}]
    for i, text in enumerate(history):
        messages.append({"role": ("user", "assistant")[i % 2], "content": text})
    return messages


def part_messages(part, world, history, *lines):
    """Every part but the policy is a call of its own, over a transcript."""
    user = "\n".join([transcript(world, history), *lines])
    return [{"role": "system", "content": f"{TOLD}\n{world.system}\n\n{part}"},
            {"role": "user", "content": user}]


def successor_messages(world, history, action):
    """M(. | s, a)"""
    return part_messages(SUCCESSOR, world, history, next_action(action))


def backup_messages(world, history, action, result, forecast):
    """B_L: s, a, the s' that was seen, and the forecast that starts there."""
    return part_messages(BACKUP, world, history, next_action(action),
                         f"Seen after it: {envs.bare(result)}", f"Forecast from there: {forecast}")


def evaluator_messages(world, history, action, futures):
    """E(s, a, d^(1..k))"""
    told = [f"Future {i}: {future}" for i, future in enumerate(futures, 1)]
    return part_messages(EVALUATOR, world, history, next_action(action), *told)


def refiner_messages(world, history, tries):
    """pi_r(. | s, a^1, Q_L(s, a^1), ...)"""
    told = [f"Try: {envs.one_line(t['action'])}\nCritique: {t['critique']}" for t in tries]
    return part_messages(REFINER, world, history, *told)


def next_action(action):
    """An action as the parts that judge it read it."""
    return f"Next action: {envs.one_line(action)}"


def transcript(world, history):
    """An episode in words: thoughts are left out, and lists of possible actions but the last."""
    observations = [*map(envs.bare, history[:-1:2]), history[-1]]
    lines = observations[:1]
    for reply, observation in zip(history[1::2], observations[1:]):
        lines += [f"> {envs.one_line(action_of(world, reply))}", observation]
    return "\n".join(lines)


def written(action):
    """An action as the policy writes it, without a thought before it."""
    return f"Action:\n{action}" if "\n" in action else f"Action: {action}"


# ---------------------------------------------------------------------------------- reading replies


def action_of(world, reply):
    """What the world reads in a reply, native thoughts left out."""
    return world.read(common.aloud(reply))


LAST_TRY = r"it|this|that|same|as|going|the (?:same|last|first|current|one|try|tried|action)"
KEEP = rf"(?i)\W*keep(?:\W*|\s*[^\w\s].*|\s+(?:{LAST_TRY})\b.*)"
NUMBERS = "none one two three four five six seven eight nine ten".split()
TURNS = rf"(?ai)\b(\d{{1,4}}|{'|'.join(NUMBERS[1:])})[- ](?:\w+ )?turns?\b"
NOT = r"(?:no|not|never|without|un\w+ to)\b(?: \w+)?"
LOST = rf"(?i)\b(?:fail|unsuccess|los[est]|{NOT} (?:succe|win))\w*"
WON = r"(?i)\b(?:succe|wins?\b|won\b|solved\b)"


def keeps(reply):
    """Whether a refiner approves of the last try: Action: keep."""
    said = common.marked(reply, "Action") or reply.strip().partition("\n")[0]
    return re.fullmatch(KEEP, said) is not None


def parse_future(text):
    """The end of a forecast, for logs -> (next observation, turns), or None if it tells no end.

    Turns until success: None is failure, 0 a success without a date.
    """
    end = common.marked(text, "End") or ""
    lost, won = re.search(LOST, end), re.search(WON, re.sub(LOST, "", end))
    if bool(lost) == bool(won):
        return None
    found = re.search(TURNS, end)
    word = found[1].lower() if found else "0"
    turns = NUMBERS.index(word) if word in NUMBERS else int(word)
    return common.marked(text, "Next") or "", turns if won else None


def parse_verdict(critique):
    """The rank of a critique's verdict, 0 (bad) to 4 (great), or None if it has none; for logs."""
    return common.chosen(critique, "Verdict", VERDICTS)


def future_text(observation, turns):
    """A forecast: `observation` comes next, and success takes `turns` turns (None: failure)."""
    end = "failure" if turns is None else f"success in {envs.count(turns, 'turn')}"
    return f"Next: {first_sentence(observation)}\nEnd: {end}."


def first_sentence(observation):
    """What a forecast repeats of an observation: not the turns left, the tally, the list."""
    text = " ".join(envs.bare(observation).split())
    return re.split(r"(?<=[.?!]) ", text, maxsplit=1)[0]


# ---------------------------------------------------------------------------------- worked examples


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


@functools.lru_cache(maxsize=8)
def shots_of_all(env, count, show_actions, prefill, k):
    """{part: --shots worked examples, as messages}: random play on train, and what came of it.

    By turns from an episode that was won and one that was lost, where a random player does win.
    """
    args = Args(env=env, shots=count, show_actions=show_actions)
    found = {part: [] for part in FORCED} | {"policy": worked_examples(args, written)}
    world, seen = envs.make(env, show_actions=show_actions), []
    played = []
    for i in range(8 + 8 * count):
        episode, _ = random_episode(world, 10**6 + i, random.Random(i))
        played.append(transitions(episode))
    played = [steps for steps in played if len(steps) > 1] or played
    played.sort(key=len)
    for i in range(count):
        wanted = [steps for steps in played if steps[-1]["won"] == (i % 2 == 0)] or played
        turn = -2 if wanted[0][-1]["won"] else 0  # the end of one that was won, the start of others
        ahead = [steps[turn:] for steps in wanted if len(steps) > 1] or wanted
        new = [steps for steps in ahead if steps[0]["result"] not in seen] or ahead
        seen.append(new[0][0]["result"])
        for part, (messages, reply) in example_of_each(world, new[0], k, random.Random(i)).items():
            if prefill:  # as a reply that must begin with its marked word
                reply = reply[reply.index(FORCED[part]):]
            found[part] += [messages[-1], {"role": "assistant", "content": reply, "shot": True}]
    world.close()
    return found


def example_of_each(world, ahead, k, rng):
    """{part: (messages, reply)} about a turn of a random player, from the transitions from there on."""
    history, action = ahead[0]["history"], action_of(world, ahead[0]["reply"])
    forecast = story(world, ahead)
    later = story(world, ahead[1:]) if ahead[1:] else "Next: nothing, it is over.\nEnd: failure."
    t = ahead[-1] if ahead[-1]["won"] else ahead[0]  # the turn that is judged
    tried = action_of(world, t["reply"])
    before = [action_of(world, reply) for reply in t["history"][1::2]]
    others = [a for a in envs.replay(world, t["seed"], before)[-1]["admissible"] if a != tried]
    futures, ends = [], []
    for _ in range(k):  # where the game goes on, it goes on at random
        episode, _ = random_episode(world, t["seed"], rng, [*before, tried])
        following = transitions(episode)[len(before):]
        futures.append(story(world, following))
        ends.append(following[0]["turns"])
    critique = critique_in_words(ends, first_sentence(following[-1]["result"]))
    if parse_verdict(critique) >= APPROVED or not others:
        refinement = f"This is the step that is missing now.\n{written('keep')}"
    else:
        refinement = f"It takes something new to get ahead here.\n{written(rng.choice(others))}"
    tries = [{"action": tried, "critique": critique}]
    return {
        "successor": (successor_messages(world, history, action), forecast),
        "backup": (backup_messages(world, history, action, ahead[0]["result"], later), forecast),
        "evaluator": (evaluator_messages(world, t["history"], tried, futures), critique),
        "refiner": (refiner_messages(world, t["history"], tries), refinement)}


def story(world, steps):
    """What came of the first of these turns of one episode, as a forecast tells it."""
    begin, end = future_text(steps[0]["result"], steps[0]["turns"]).split("\n")
    if len(steps) == 1:
        return f"{begin}\n{end}"
    actions = [envs.one_line(action_of(world, t["reply"])) for t in steps[1:4]]
    more = ", and so on" * (len(steps) > 4)
    return (f"{begin}\nThe player goes on with: {', then '.join(actions)}{more}."
            f" That leads to this: {first_sentence(steps[-1]['result'])}\n{end}")


def critique_in_words(ends, seen):
    """How to read k endings, the last of which showed `seen`, with reasons and a verdict."""
    won = sum(n is not None for n in ends)
    told = f"{won} of {len(ends)} succeed" if len(ends) > 1 else "success" if won else "failure"
    if rank_of(ends) >= APPROVED:
        reason = "The goal is reached soon, so hardly any action is better."
    elif won:
        reason = "Too much is left to chance, so an action that settles more would be better."
    else:
        reason = f"In the end this is seen: {seen} So another action would be better."
    return f"Futures: {told}. {reason} Verdict: {VERDICTS[rank_of(ends)]}."


def rank_of(ends):
    """How good endings are (turns until success, or None), as an index of VERDICTS."""
    worth = sum(0.98 ** (n - 1) for n in ends if n is not None) / len(ends)
    return sum(worth > x for x in (0.1, 0.35, 0.6, 0.85))


def random_episode(world, seed, rng, actions=()):
    """An episode on train by a random player, after `actions` -> (episode, what was possible)."""
    observation, info = world.reset(seed=seed, options={"split": "train"})
    episode, possible = new_episode("train", seed, observation), []
    while not episode["over"]:
        turn = len(possible)
        possible.append(info["admissible"])
        action = actions[turn] if turn < len(actions) else envs.random_player(world, info, rng)
        info = take_turn(world, episode, written(action))
    return episode, possible


# ----------------------------------------------------------------------------------- calls of parts


def with_shots(part, messages, args):
    """The messages of a call, --shots worked examples behind the system prompt."""
    if not args.shots:
        return messages
    examples = shots_of_all(args.env, args.shots, args.show_actions, args.prefill, args.k)
    return [messages[0], *examples[part], *messages[1:]]


def lesson(chat, part, messages, text, args):
    """(prompt ids, target ids) that teach a part to say `text`, but for what --prefill forces."""
    word = FORCED[part] if args.prefill and text.startswith(FORCED[part]) else ""
    prompt = chat.dialogue(with_shots(part, messages, args), word)
    if chat.opened and not text.startswith(chat.opened):  # a thought that the template opens: empty
        text = f"{chat.opened}</think>\n\n{text}"
    return prompt, chat.reply(text.removeprefix(word).removeprefix(chat.opened))


def limit(part, args):
    """Tokens of one reply."""
    if part in ("successor", "backup"):
        return args.forecast_tokens
    return args.critique_tokens if part == "evaluator" else args.max_new_tokens


LIMITS = {
    "policy": "--max-new-tokens", "policy_bar": "--max-new-tokens", "refiner": "--max-new-tokens",
    "successor": "--forecast-tokens", "successor_bar": "--forecast-tokens",
    "backup": "--forecast-tokens", "evaluator": "--critique-tokens"}


class Parts:
    """The parts of the one language model: which weights answer, and how well they do.

    PART_bar is the same part, asked while (2) makes a target: it always has the weights theta_bar.
    """

    def __init__(self, model, target, start, chat, world, args):
        """`model`: theta; `target`: theta_bar; `start`: the weights at the start, if needed."""
        self.model, self.chat, self.world, self.args = model, chat, world, args
        self.weights = {"policy": model, "policy_bar": target,
                        "successor": target, "successor_bar": target,
                        "backup": target, "evaluator": model, "refiner": model}
        if args.frozen_parts:
            self.weights |= {"backup": start, "evaluator": start, "refiner": start}
        if args.ablation == "frozen-critic":
            self.weights |= {"successor": start, "successor_bar": start}
        self.counts = Counter()  # (what, part) -> number, since the last `clear`

    def temperature(self, part):
        reads = part in ("backup", "evaluator")
        return self.args.reader_temperature if reads else self.args.temperature

    @torch.no_grad()
    def __call__(self, part, messages, stream, samples=1):
        """What a part says aloud, `samples` replies per entry of `messages`, prompt-major.

        A prompt beyond the context gets an empty reply. So does one that the limit cut off before
        its Action: what it would have done is not known.
        """
        model, args, name = self.weights[part], self.args, part.removesuffix("_bar")
        word, room = FORCED[name] if args.prefill else "", limit(name, args)
        prompts = [self.chat.dialogue(with_shots(name, m, args), word) for m in messages]
        fits = [i for i, prompt in enumerate(prompts) if len(prompt) + room <= model.max_context]
        rows = [i * samples + j for i in fits for j in range(samples)]
        texts = [""] * (len(prompts) * samples)
        self.counts["overlong", part] += len(prompts) - len(fits)
        if not rows:
            return texts
        replies = common.generate(
            model, self.chat, [prompts[i] for i in fits], max_new_tokens=room, samples=samples,
            temperature=self.temperature(part), rows=args.rollout_batch_size,
            seeds=[common.row_seed(args.seed, *stream, part, row) for row in rows])
        self.counts["tokens", part] += sum(map(len, replies.ids))
        for row, text, complete in zip(rows, replies.texts, replies.complete):
            text = common.aloud(word + text)
            self.note(part, text, complete)
            acts = FORCED[name] == "Action:"
            cut_before = acts and not complete and common.marked(text, "Action") is None
            texts[row] = "" if cut_before else text
        return texts

    def note(self, part, text, complete):
        """Counts a reply: whether its limit cut it, and whether what logs read in it is there."""
        if part in ("successor", "successor_bar", "backup"):
            readable = parse_future(text) is not None
        elif part == "evaluator":
            readable = parse_verdict(text) is not None
        else:
            readable = action_of(self.world, text) != ""
        self.counts["asked", part] += 1
        self.counts["cut", part] += not complete
        self.counts["parsed", part] += readable

    def note_episodes(self, episodes):
        """Counts what the policy said while it acted."""
        for episode in episodes:
            self.counts["tokens", "policy"] += episode["tokens"]
            for reply, complete in zip(episode["history"][1::2], episode["complete"]):
                self.note("policy", reply, complete)

    def metrics(self):
        """parse_PART and cut_PART, as shares of its replies; prompts beyond the context."""
        asked = {part: n for (what, part), n in self.counts.items() if what == "asked"}
        found = {f"parse_{part}": self.counts["parsed", part] / n for part, n in asked.items()}
        found |= {f"cut_{part}": self.counts["cut", part] / n for part, n in asked.items()}
        return found | {"overlong": self.total("overlong")}

    def total(self, what):
        return sum(n for (name, _), n in self.counts.items() if name == what)

    def foresee(self, states, actions, stream):
        """k futures d ~ M(. | s, a) of each action."""
        args = self.args
        asked = [successor_messages(self.world, t["history"], a) for t, a in zip(states, actions)]
        futures = self("successor", asked, stream, args.k)
        return [futures[i * args.k:(i + 1) * args.k] for i in range(len(states))]


# ------------------------------------------------------------------------------------------ rollout


def rollout(model, chat, args, split, seeds, *, temperature, stream, prefixes=None):
    """Plays an episode per seed, --rollout-batch-size at once; a dict each.

    `stream` names the randomness: a row's replies depend on (--seed, stream, row, turn) alone.
    `prefixes`: replies to replay first, a list per episode, so that play goes on from a state.
    """
    episodes, size = [], args.rollout_batch_size
    for i in range(0, len(seeds), size):
        streams = [(*stream, row) for row in range(i, min(i + size, len(seeds)))]
        before = prefixes[i:i + size] if prefixes else [[]] * len(streams)
        episodes += side_by_side(model, chat, args, split, seeds[i:i + size], streams, temperature,
                                 before)
    return episodes


@torch.no_grad()
def side_by_side(model, chat, args, split, seeds, streams, temperature, prefixes):
    """The `rollout` of episodes that share a cache, a stream for each."""
    worlds, episodes = [], []
    for seed, prefix in zip(seeds, prefixes):
        world = envs.make(args.env, show_actions=args.show_actions)
        observation, _ = world.reset(seed=seed, options={"split": split})
        episode = new_episode(split, seed, observation)
        for reply in prefix:
            take_turn(world, episode, reply)
        worlds.append(world)
        episodes.append(episode)
    play_on(model, chat, args, worlds, episodes, streams, temperature)
    for world in worlds:
        world.close()
    return episodes


def play_on(model, chat, args, worlds, episodes, streams, temperature):
    """The policy plays until all is over. A full context ends an episode; no turn is dropped."""
    prompts = []
    for world, episode in zip(worlds, episodes):
        messages = policy_messages(world, episode["history"])
        prompts.append(chat.dialogue(with_shots("policy", messages, args)))
    dialogues = common.Dialogues(model, chat, prompts)
    word = FORCED["policy"] if args.prefill else ""
    context = model.max_context - args.max_new_tokens - len(chat.encode(word))
    live = [i for i, e in enumerate(episodes) if not e["over"]]
    while True:
        for i in live:
            episodes[i]["truncated"] = len(dialogues.ids[i]) > context
        live = [i for i in live if not episodes[i]["truncated"]]
        if not live:
            break
        seeds = [common.row_seed(args.seed, *streams[i], len(episodes[i]["history"])) for i in live]
        replies = dialogues.reply(live, max_new_tokens=args.max_new_tokens, temperature=temperature,
                                  seeds=seeds, prefill=word)
        for i, reply, complete in zip(live, replies.texts, replies.complete):
            take_turn(worlds[i], episodes[i], reply, complete)
        live = [i for i in live if not episodes[i]["over"]]
        dialogues.extend(live, [episodes[i]["history"][-1] for i in live])
    for i, e in enumerate(episodes):
        _, mask, e["logprob"] = dialogues.sampled(i)
        e["tokens"] = sum(mask)


def new_episode(split, seed, observation):
    """An episode before its first turn; `take_turn` writes the turns into it."""
    return {"split": split, "seed": seed, "history": [observation], "valid": [], "complete": [],
            "reward": 0.0, "won": False, "score": 0.0, "over": False, "truncated": False}


def take_turn(world, episode, reply, complete=True):
    """One step of the world, written down in `episode`. Returns the world's info."""
    observation, reward, terminated, truncated, info = world.step(common.aloud(reply))
    episode["history"] += [reply, observation]
    episode["valid"].append(info["valid"])
    episode["complete"].append(complete)
    episode["reward"] += reward
    episode.update(won=info["won"], score=info["score"], over=terminated or truncated)
    return info


def transitions(episode):
    """(s, a, s', done) as text.

    `turns`: from here to success, None for failure; read by logs and --ablation mc-backup alone.
    """
    history, found = episode["history"], []
    count = len(history) // 2
    for t in range(count):
        last = t == count - 1
        found.append({
            "seed": episode["seed"], "history": history[:2 * t + 1], "reply": history[2 * t + 1],
            "result": history[2 * t + 2], "complete": episode["complete"][t],
            "done": last and episode["over"], "won": last and episode["won"],
            "turns": count - t if episode["won"] else None})
    return found


def sample(buffer, args, rng, count):
    """Transitions of the buffer, uniformly, or with --even-turns late ones more often than that.

    They are rare while most episodes are lost early, and they decide the others.
    """
    turns = Counter(len(t["history"]) for t in buffer)
    weights = [turns[len(t["history"])] ** -0.5 for t in buffer] if args.even_turns else None
    return rng.choices(buffer, weights, k=count) if buffer else []  # empty: no prompt had room


# ------------------------------------------------------------------------------- critic and refiner


def bellman_targets(parts, batch, stream):
    """(2) B_L M_bar(. | s, a) for each transition; empty where no text came of it."""
    world, args = parts.world, parts.args
    if args.ablation == "mc-backup":  # no bootstrap: what did happen, under the policy of that time
        return [future_text(t["result"], t["turns"]) for t in batch]
    # terminal: the reward in words; the others are replaced
    targets = [future_text(t["result"], 1 if t["won"] else None) for t in batch]
    live = [i for i, t in enumerate(batch) if not t["done"]]
    nexts = [[*batch[i]["history"], batch[i]["reply"], batch[i]["result"]] for i in live]  # s'
    replies = parts("policy_bar", [policy_messages(world, s) for s in nexts], stream)  # a'
    asked = [successor_messages(world, s, action_of(world, a)) for s, a in zip(nexts, replies)]
    asked_backup = []
    for i, forecast in zip(live, parts("successor_bar", asked, stream)):  # d'
        t = batch[i]
        action = action_of(world, t["reply"])
        messages = backup_messages(world, t["history"], action, t["result"], forecast)
        asked_backup.append(messages)
    for i, text in zip(live, parts("backup", asked_backup, stream)):
        targets[i] = text
    return targets


def successor_lessons(parts, batch, stream):
    """(3) What M shall learn to foresee -> (pairs for `likelihood_loss`, targets dropped)."""
    if parts.args.ablation == "frozen-critic":
        return [], 0
    pairs, args = [], parts.args
    for t, text in zip(batch, bellman_targets(parts, batch, stream)):
        messages = successor_messages(parts.world, t["history"], action_of(parts.world, t["reply"]))
        # a tiny model's slips would grow: where approval decides, M learns to tell ends alone
        if text and (args.distil == "all" or parse_future(text)):
            pairs.append(lesson(parts.chat, "successor", messages, text, args))
    pairs = fitting(parts.model, pairs)
    return pairs, len(batch) - len(pairs)


def fitting(model, pairs):
    """Those that the model can read whole."""
    return [pair for pair in pairs if sum(map(len, pair)) <= model.max_context]


def critique(parts, states, actions, stream):
    """(4) Q_L(s, a) = E(s, a, d^(1..k)) -> (futures, critiques): k and one per state."""
    futures = parts.foresee(states, actions, stream)
    if parts.args.ablation == "blind-critic":  # futures of other states: a floor
        shift = random.Random(str(stream)).randrange(1, max(2, len(futures)))
        futures = futures[shift:] + futures[:shift]
    asked = [evaluator_messages(parts.world, t["history"], action, future)
             for t, action, future in zip(states, actions, futures)]
    return futures, [" ".join(text.split()) for text in parts("evaluator", asked, stream)]


def refine(parts, states, stream, replies=None):
    """(5) Critique and correct the policy's action, up to m rounds.

    A dict per state: `tries` (action, futures and critique of each round), `reply` (what L2 makes
    the policy say, empty if there is nothing to teach) and `kept` (whether the refiner approved
    it). `replies`: judge these instead of asking the policy.
    """
    world = parts.world
    if replies is None:  # a^1
        replies = parts("policy", [policy_messages(world, t["history"]) for t in states], stream)
    refined = [{"tries": [], "reply": common.aloud(reply), "kept": False} for reply in replies]
    live = list(range(len(states)))
    for r in range(parts.args.m):
        if not live:
            break
        asked, key = [states[i] for i in live], (*stream, r)
        actions = [action_of(world, refined[i]["reply"]) for i in live]
        for i, action, futures, text in zip(live, actions, *critique(parts, asked, actions, key)):
            refined[i]["tries"].append({"action": action, "futures": futures, "critique": text})
        tries = [refined[i]["tries"] for i in live]
        messages = [refiner_messages(world, t["history"], some) for t, some in zip(asked, tries)]
        for i, reply in zip(live, parts("refiner", messages, key)):
            take_refinement(world, refined[i], reply)
        live = [i for i in live if refined[i]["reply"] and not refined[i]["kept"]]
    return refined


def take_refinement(world, refined, reply):
    """Keep approves of the last try; anything else is the next one, even the same again."""
    if keeps(reply):
        refined["kept"] = refined["tries"][-1]["action"] != ""  # or there is nothing to keep
    else:
        refined["reply"] = reply if action_of(world, reply) else ""


def policy_lessons(parts, states, refined):
    """(6) What the policy shall learn to say at once -> pairs for `likelihood_loss`."""
    pairs = []
    for t, r in zip(states, refined):
        if teaches(parts.args, r):
            messages = policy_messages(parts.world, t["history"])
            pairs.append(lesson(parts.chat, "policy", messages, r["reply"], parts.args))
    return fitting(parts.model, pairs)


def teaches(args, refinement):
    """All that says something does; with --distil kept, what the refiner approved of."""
    return bool(refinement["reply"]) and (refinement["kept"] or args.distil == "all")


def anchor_lessons(parts, fresh, rng):
    """Some of what was just played: a sampled KL to the policy of this step (--anchor)."""
    args = parts.args
    if not args.anchor:
        return []
    whole, pairs = [t for t in fresh if t["complete"]], []
    for t in rng.sample(whole, min(args.batch_size // 4 * updates_of(args), len(whole))):
        messages = policy_messages(parts.world, t["history"])
        pairs.append(lesson(parts.chat, "policy", messages, t["reply"], args))
    return fitting(parts.model, pairs)


# --------------------------------------------------------------------------------------------- loss


def likelihood_loss(model, chat, pairs, weight, micro_batch_size, temperature=1.0):
    """(3), (6) -log p(target | prompt), the mean over target tokens; backward of weight times it.

    `temperature` is that of sampling: at any other one, learning from own samples would sharpen
    (or flatten) step by step. The mean spans all of `pairs` [(prompt ids, target ids)], so that the
    gradient does not depend on the micro-batch.
    """
    total, mean = sum(len(target) for _, target in pairs), 0.0
    pairs = sorted(pairs, key=lambda pair: len(pair[0]))  # neighbours need little padding
    for i in range(0, len(pairs), micro_batch_size):
        prompts, targets = zip(*pairs[i:i + micro_batch_size])
        logprobs, _ = common.target_logprobs(model, chat, prompts, targets, temperature)
        loss = -logprobs.sum() / total  # of [B, T - 1], 0 beside the targets
        (weight * loss).backward()
        mean += loss.item()
    return mean


def updates_of(args):
    """Gradient steps per step of the loop."""
    return round(args.episodes_per_step * args.updates_per_episode)


def update(model, target, chat, args, optimizer, step, forecasts, lessons, played):
    """The gradient steps of a step, L1 + weight L2 + the anchor, and (7) after each -> metrics."""
    metrics, count = Counter(l1=0.0, l2=0.0, anchor=0.0, grad_norm=0.0), updates_of(args)
    for group in optimizer.param_groups:
        group["lr"] = args.lr * min(1, step / 10)
    for u in range(count):
        pairs = {"l1": forecasts[u::count], "l2": lessons[u::count], "anchor": played[u::count]}
        taught = len(pairs["l2"]) * count / args.actor_states  # states without a lesson count, too
        weights = {"l1": 1.0, "l2": args.actor_weight * taught, "anchor": args.anchor}
        loss = 0.0
        for name, some in pairs.items():
            if some:
                mean = likelihood_loss(model, chat, some, weights[name], args.micro_batch_size,
                                       args.temperature)
                metrics[name] += mean / count
                loss += weights[name] * mean
        if any(pairs.values()):
            metrics["grad_norm"] += common.gradient_step(model, optimizer, loss, pairs) / count
        common.ema_update(target, model, args.ema)
    return dict(metrics)


# --------------------------------------------------------------------------- evaluation and records


def evaluate(model, chat, args, split, count):
    """The plain policy on fixed episodes: no critic, no refinement -> (numbers, episodes)."""
    played = rollout(model, chat, args, split, range(count), temperature=args.eval_temperature,
                     stream=("evaluate",))
    success, se = common.mean_se([float(e["won"]) for e in played])
    return {"success": success, "se": se, "n": count}, played


def episode_metrics(episodes):
    """What was played; the entropy is an estimate, per sampled token."""
    valid = [v for e in episodes for v in e["valid"]]
    tokens, logprob = (sum(e[key] for e in episodes) for key in ("tokens", "logprob"))
    return {"success": common.mean(e["won"] for e in episodes),
            "return": common.mean(e["reward"] for e in episodes),
            "turns": common.mean(len(e["valid"]) for e in episodes), "valid": common.mean(valid),
            "truncated": sum(e["truncated"] for e in episodes),
            "entropy": -logprob / max(1, tokens)}


def refinement_metrics(world, refined):
    """How often the refiner approves, how often it changes the action, how the critic sees it."""
    verdicts = [parse_verdict(t["critique"]) for r in refined for t in r["tries"]]
    changed = [changes(world, r) for r in refined]
    return {"kept": common.mean(r["kept"] for r in refined), "changed": common.mean(changed),
            "verdicts": {name: verdicts.count(i) for i, name in enumerate(VERDICTS)},
            "sentiment": common.mean((v or 0) / 4 for v in verdicts)}


def changes(world, refinement):
    """Whether a refinement is another action than the first try."""
    return action_of(world, refinement["reply"]) != refinement["tries"][0]["action"]


def calibration(parts, batch, stream):
    """Does what M foresees happen? One future per (s, a) just played, against what followed."""
    asked = []
    for t in batch:
        action = action_of(parts.world, t["reply"])
        asked.append(successor_messages(parts.world, t["history"], action))
    observed, hopeful, hopeless = [], [], []
    for text, t in zip(parts("successor", asked, stream), batch):
        if (future := parse_future(text)) is None:
            continue
        told, turns = future
        observed.append(told == first_sentence(t["result"]))
        (hopeless if turns is None else hopeful).append(t["turns"] is not None)

    def share(values):
        return sum(values) / len(values) if values else None

    return {"predicted_success": share([True] * len(hopeful) + [False] * len(hopeless)),
            "won_if_predicted_success": share(hopeful), "won_if_predicted_failure": share(hopeless),
            "next_observation_right": share(observed)}


def refinement_gain(parts, states, refined, stream):
    """Replays states that teach another action: success after a^1 and a^r, the policy going on."""
    args, world = parts.args, parts.world
    pairs = [(t, r) for t, r in zip(states, refined) if teaches(args, r) and changes(world, r)]
    if not pairs:
        return {"gain_states": 0}

    def success_after(name, replies):
        prefixes = [[*t["history"][1::2], reply] for (t, _), reply in zip(pairs, replies)]
        seeds = [t["seed"] for t, _ in pairs]
        played = rollout(parts.model, parts.chat, args, "train", seeds, prefixes=prefixes,
                         temperature=args.temperature, stream=(*stream, name))
        return common.mean(e["won"] for e in played)

    first = success_after("first", [written(r["tries"][0]["action"]) for _, r in pairs])
    refined = success_after("refined", [r["reply"] for _, r in pairs])
    return {"gain_states": len(pairs), "success_first": first, "success_refined": refined}


def with_thoughts(parts, episode, stream):
    """An episode with what the critic and the refiner say to each of its turns."""
    steps = transitions(episode)
    judged = refine(parts, steps, stream, replies=[t["reply"] for t in steps])
    turns = [{"reply": t["reply"], "result": t["result"], **r} for t, r in zip(steps, judged)]
    return episode | {"turns": turns}


def said(episode):
    """Who says what in an episode `with_thoughts`, for `common.show`."""
    history = episode["history"]
    found = [("world", history[0])]
    for reply, turn in zip(history[1::2], episode["turns"]):
        found.append(("act", reply))
        for t in turn["tries"]:
            found.append(("try", t["action"]))
            found += [("future", future) for future in t["futures"][:2]]
            found.append(("critique", t["critique"]))
        found.append(("kept" if turn["kept"] else "refined", turn["reply"] or "(nothing)"))
        found.append(("world", turn["result"]))
    return found


# --------------------------------------------------------------------------------------------- main

AT_LEAST = {
    "k": 1, "m": 1, "forecast_tokens": 1, "critique_tokens": 1, "buffer_size": 1, "examples": 1,
    "episodes_per_step": 1, "actor_states": 1, "actor_weight": 0, "anchor": 0, "critic_warmup": 0,
    "reader_temperature": 0}


def check_args(args):
    """Everything that can be refused before a model is loaded. Returns the world."""
    common.check_common(args)
    common.check_at_least(args, AT_LEAST)
    common.check(0 <= args.ema < 1, f"--ema must be in [0, 1), not {args.ema}")
    updates = args.episodes_per_step * args.updates_per_episode
    common.check(round(updates) >= 1 and abs(updates - round(updates)) < 1e-6,
                 "--episodes-per-step x --updates-per-episode must be a whole number of gradient "
                 f"steps, not {updates:g}")
    try:
        world = envs.make(args.env, show_actions=args.show_actions)
    except ValueError as error:
        common.refuse(error)
    listed = world.reset(seed=0)[1]["admissible"]
    common.check(listed or not args.shots, f"--shots: nothing to play at random in {args.env}")
    return world


def check_room(chat, model, messages, room):
    """Refuses a first prompt that leaves no room for `room` more tokens."""
    length = len(chat.dialogue(messages))
    common.check(length + room <= model.max_context,
                 f"the first prompt has {length} tokens, replies may have {room}: "
                 f"beyond the context of {model.max_context}")


def check_model(model, chat, world, args):
    """What only the loaded model can tell."""
    first = policy_messages(world, [world.reset(seed=0)[0]])
    check_room(chat, model, with_shots("policy", first, args), args.max_new_tokens)
    common.check(not (args.prefill and chat.opened),
                 "--prefill: the chat template of this model opens a thought before each reply")


def start_weights(model, args):
    """A copy of the weights at the start, if anything asks for it: memory for a large model."""
    needed = args.frozen_parts or args.critic_warmup or args.ablation == "frozen-critic"
    return copy.deepcopy(model) if needed else None


def main():
    """Algorithm 1."""
    args = common.parse_args(Args, TINY)
    if args.quick:
        args = dataclasses.replace(args, **(QUICK if common.is_tiny(args.model) else QUICK_LARGE))
    world = check_args(args)
    run = None
    if not args.eval_only:
        run = common.Run("nlac", args, common.run_directory("nlac", args))
    model, chat = load(world, args)
    check_model(model, chat, world, args)
    if args.eval_only:
        numbers, _ = evaluate(model, chat, args, "test", args.eval_episodes)
        return print(f"{args.env} {common.result_line('test', numbers)}")
    run.start({"parameters": common.count_parameters(model), "start": common.fingerprint(model)})
    tqdm.write(
        f"{args.env}: {common.count_parameters(model):,} parameters on "
        f"{common.device_name(args.device)}; a step plays {args.episodes_per_step} episodes, takes "
        f"{updates_of(args)} gradient steps of {args.batch_size} transitions and refines "
        f"{args.actor_states} states; the policy learns from step {args.critic_warmup + 1}")
    target, start = copy.deepcopy(model), start_weights(model, args)  # target: theta_bar
    parts = Parts(model, target, start, chat, world, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0)
    state = run.resume()
    if state:
        model.load_state_dict(state["model"])
        target.load_state_dict(state["target"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        before, played = evaluate(model, chat, args, "test", args.eval_episodes)
        tqdm.write(f"before: {common.result_line('test', before)}")
        episode = with_thoughts(parts, played[0], ("before",))
        state = {"step": 0, "buffer": [], "totals": {}, "seconds": {}, "before": before,
                 "before_episode": episode, "after": None, "after_episode": None}
    buffer, seconds, told = state["buffer"], Counter(state["seconds"]), set()
    totals = Counter(state["totals"])

    bar = tqdm(range(state["step"] + 1, args.steps + 1), initial=state["step"], total=args.steps,
               desc="nlac", dynamic_ncols=True)
    for step in bar:
        clock, rng = common.Clock(seconds), random.Random(f"{args.seed} {step}")
        parts.counts.clear()
        actor = start if step <= args.critic_warmup else model  # M alone learns: pi stays as it is
        first = args.seed * 1_000_000_007 + (step - 1) * args.episodes_per_step
        episodes = rollout(actor, chat, args, "train", range(first, first + args.episodes_per_step),
                           temperature=args.temperature, stream=("act", step))  # (1)
        fresh = [t for e in episodes for t in transitions(e)]
        buffer = (buffer + fresh)[-args.buffer_size:]
        clock.lap("rollout")
        batch = sample(buffer, args, rng, args.batch_size * updates_of(args))
        forecasts, dropped = successor_lessons(parts, batch, ("bellman", step))  # (2)
        clock.lap("backup")
        states = sample(buffer, args, rng, args.actor_states if step > args.critic_warmup else 0)
        refined = refine(parts, states, ("refine", step))  # (4), (5)
        lessons = policy_lessons(parts, states, refined)
        clock.lap("refinement")
        losses = update(model, target, chat, args, optimizer, step, forecasts, lessons,
                        anchor_lessons(parts, fresh, rng))  # (3), (6), (7)
        clock.lap("update")

        metrics = {"step": step, **episode_metrics(episodes), **losses,
                   "lessons": len(lessons), "targets_dropped": dropped}
        some = rng.sample(fresh, min(32, len(fresh)))
        metrics |= calibration(parts, some, ("calibration", step))
        metrics |= refinement_metrics(world, refined) if refined else {}
        records = [{"step": step, **e} for e in episodes]
        if evaluating := step % args.eval_every == 0 or step == args.steps:
            metrics |= refinement_gain(parts, states, refined, ("gain", step)) if refined else {}
            n = args.eval_episodes if step == args.steps else max(1, args.eval_episodes // 5)
            after, played = evaluate(model, chat, args, "test", n)
            metrics |= {"eval_success": after["success"], "eval_se": after["se"],
                        "eval_episodes": n}
            episode = with_thoughts(parts, played[0], ("after", step))
            state |= {"after": after, "after_episode": episode}
            records.append({"step": step, **episode})
        clock.lap("watching")
        parts.note_episodes(episodes)
        totals.update(tokens=parts.total("tokens"), env_steps=len(fresh), episodes=len(episodes),
                      gradient_steps=updates_of(args))
        metrics |= parts.metrics() | dict(totals) | clock.seconds()
        common.warn_cut(metrics, LIMITS, told)
        run.log(metrics)
        run.write_rollouts(records)
        bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("success", "l1", "l2")})
        if evaluating:
            tqdm.write(f"step {step}: {common.result_line('test', after)}, "
                       f"{totals['env_steps']} environment steps")
        if step % args.save_every == 0 or step == args.steps or run.stopping:
            state |= {"step": step, "buffer": buffer, "totals": dict(totals),
                      "seconds": dict(seconds)}
            run.save(state | {"model": model.state_dict(), "target": target.state_dict(),
                              "optimizer": optimizer.state_dict()})
        if run.stopping:
            sys.exit(run.stopping)
    finish(run, args, state, totals, seconds, model, chat)


def finish(run, args, state, totals, seconds, model, chat):
    """Keeps the model and the summary first, then tells about them."""
    ends = envs.ends(args.env, args.eval_episodes)
    summary = common.summary("nlac", "nlac", args.ablation, args, {"test": state["before"]},
                             {"test": state["after"]}, ends, totals, seconds)
    run.finish(summary, model, chat)
    for name in "before", "after":
        episode = {"said": said(state[f"{name}_episode"])}
        print(f"\n{name}\n{common.show(episode)}")
    print()
    common.print_table(summary)
    print(f"whole episodes: {run.dir / 'rollouts.jsonl'}")


# ---------------------------------------------------------------------------- only for --model tiny
# What a model made from nothing is taught before NLAC begins, and the settings that suit it.

TINY = dict(
    steps=150, lr=1e-3, batch_size=64, micro_batch_size=16, rollout_batch_size=256, device="cpu",
    max_new_tokens=40, forecast_tokens=40, critique_tokens=40, eval_episodes=500, k=4, m=2,
    reader_temperature=0.0, ema=0.95, episodes_per_step=64, updates_per_episode=0.125,
    actor_states=64, distil="kept", frozen_parts=True, anchor=0.3, critic_warmup=50,
    even_turns=True)
QUICK = dict(
    steps=4, critic_warmup=2, episodes_per_step=8, updates_per_episode=0.125, batch_size=16,
    micro_batch_size=16, actor_states=8, eval_episodes=20, eval_every=2, save_every=2, examples=800)
QUICK_LARGE = dict(  # of any other model
    steps=2, critic_warmup=0, episodes_per_step=2, updates_per_episode=0.5, batch_size=4,
    micro_batch_size=1, actor_states=2, eval_episodes=2, eval_every=1, save_every=1)
APPROVED = VERDICTS.index("good")  # what REFINER says
MARKS = "Action: ", "Next: ", "\nEnd: ", "Futures: ", " Verdict: ", "\nNext action: "  # a token each
READER = "You read. Repeat the first observation, the last observation and the action, a line each."


def load(world, args):
    """The model that plays all parts, and its chat; a tiny one is made from `warmup`."""
    if common.is_tiny(args.model) and args.device == "cpu":
        torch.set_num_threads(min(2, torch.get_num_threads()))  # more only wait for each other
    parts = SUCCESSOR, BACKUP, EVALUATOR, REFINER, READER
    constants = [policy_messages(world, [""])[0]["content"],
                 *(part_messages(part, world, [""])[0]["content"] for part in parts), *MARKS]
    return common.load(args.model, corpus=lambda: warmup(world, args), constants=constants,
                       device=args.device, dtype=args.dtype, thinking=args.thinking,
                       max_context=args.max_context)


def critique_text(ends):
    """How to read k endings (turns until success, or None): how many succeed, and how soon."""
    won = sum(n is not None for n in ends)
    return f"Futures: {won} of {len(ends)} succeed. Verdict: {VERDICTS[rank_of(ends)]}."


def warmup(world, args):
    """What a model made from nothing is taught: to read, and the form of every part's reply.

    Episodes come from a random player on the train split, unfiltered. The policy learns to answer
    with any action. The successor learns its form from the futures of *other, random* transitions,
    so it knows nothing of what follows what. B_L learns to copy a result and to count one turn on;
    the evaluator to read outcomes, the refiner to keep an approved action or to name any untried
    one. No part sees an expert.
    """
    rng = random.Random("warm-up")
    steps = []
    for seed in range(max(50, args.examples // 4)):
        episode, possible = random_episode(world, seed, rng)
        steps += [t | {"possible": actions} for t, actions in zip(transitions(episode), possible)]
    futures = [future_text(t["result"], t["turns"]) for t in steps]
    examples = []
    for _ in range(args.examples):
        step = rng.choice(steps)
        action = action_of(world, step["reply"])
        first, last = first_sentence(step["history"][0]), first_sentence(step["history"][-1])
        examples += [
            (policy_messages(world, step["history"]), written(rng.choice(step["possible"]))),
            (successor_messages(world, step["history"], action), rng.choice(futures)),
            (part_messages(READER, world, step["history"], next_action(action)),
             "\n".join([first, last, envs.one_line(action)])),
            *judging_examples(world, args, step, rng.choices(steps, k=args.k), rng)]
    facts = world.facts() if hasattr(world, "facts") else []
    for fact in facts * (4 * args.examples // max(1, len(facts))):
        examples.append(([{"role": "user", "content": " ".join(fact.split()[:-1])}], fact))
    rng.shuffle(examples)
    return examples


def judging_examples(world, args, step, others, rng):
    """One each for B_L (unless the step ended the game), the evaluator and the refiner.

    `others`: k random transitions, whose results stand in made-up futures.
    """
    history, actions, examples = step["history"], step["possible"], []
    action = action_of(world, step["reply"])
    left = world.max_turns - len(history) // 2  # turns, this one counted

    def random_end(chance=0.6):
        return rng.randint(1, left) if rng.random() < chance else None

    def random_ends(chance):
        return [random_end(chance) for _ in range(args.k)]

    if not step["done"]:
        n = random_end()
        forecast = future_text(others[0]["result"], n)
        merged = future_text(step["result"], n + 1 if n and n < left else None)
        examples.append((backup_messages(world, history, action, step["result"], forecast), merged))
    chance = rng.random()
    ends = random_ends(chance)
    seen = [future_text(t["result"], n) for t, n in zip(others, ends)]
    examples.append((evaluator_messages(world, history, action, seen), critique_text(ends)))
    tried = rng.sample(actions, rng.randint(1, max(1, min(args.m, len(actions) - 1))))
    critiques = []
    for _ in tried[1:]:  # earlier tries were not kept
        ends = random_ends(0.2)
        critiques.append(critique_text(ends if rank_of(ends) < APPROVED else [None] * args.k))
    ends = random_ends(chance)
    critiques.append(critique_text(ends))
    untried = [a for a in actions if a not in tried] or actions
    tries = [{"action": a, "critique": text} for a, text in zip(tried, critiques)]
    reply = "keep" if rank_of(ends) >= APPROVED else rng.choice(untried)
    examples.append((refiner_messages(world, history, tries), written(reply)))
    return examples


if __name__ == "__main__":
    main()
