"""Natural Language Actor-Critic (Hong et al., arXiv 2512.04601): a critic that writes text, a policy that learns its own corrected actions.

One language model plays every part through its own prompt. Per step (Algorithm 1 of the paper):

 1. The policy pi acts for some episodes; every (s, a, s', done) goes to a replay buffer, as text.
 2. For sampled transitions the successor model M of the EMA weights foresees the future from s' (after a' ~ pi), and the language Bellman
    backup B_L merges the s' that was seen with that forecast into one description of the future from (s, a).
 3. L1: M learns to write that description. At the end of an episode there is nothing to foresee: the target says in words how it ended.
 4. For sampled states the policy proposes a, M writes k futures of (s, a), the evaluator E reads them and writes a critique Q_L(s, a),
    the refiner pi_r reads the critique and keeps the action or proposes another one; up to m rounds.
 5. L2: the policy learns to write the refined action at once. No policy gradient, no value head, no list of actions.
 6. The EMA weights follow.

Departures from the paper, and why:
 1. Backup, evaluator and refiner are served from the start weights (--frozen-parts True). Nobody trains them, so in shared weights they are
    forgotten; the paper reports that forgetting in all of its runs. --frozen-parts False is the paper's way.
 2. The refiner may answer "keep", which ends the rounds, and L2 is taken only there (--distil kept): on judged actions. With m = 1 that is
    the policy's own sample, filtered by the critic. The paper distils every refined action (--distil all), but the last proposal of the
    last round has never been judged, and a small model proposes at random.
 3. A quarter as many of the actions just played are imitated beside L1 and L2 (--anchor): a sampled KL to the policy of this step. M is
    trained far more than pi, and in shared weights that alone would make pi drift where it has no lesson. For the same reason the start
    policy acts while only M learns (--critic-warmup).
 4. The target of a terminal transition is composed from the observation and the outcome, not written by B_L: it grounds M.
 5. A target that cannot be read (see `parse_future`) is left out of L1, and counted.
 6. The policy answers with an action; --react True lets it think first, as the paper does, but a changed action is taught without thought.
 7. The critic's futures come from theta_bar, and so does a' in the targets: averaged weights are steadier than those of the moment.
 8. The buffer is sampled more evenly over turns than it fills (`sampling_weights`); version 1 of the paper ranked it by loss, version 2
    has a plain one.
 9. A forecast has two lines, the next observation and the end with its distance, and a critique one: what a small model can learn to write
    and a log can read. The paper's are free text; for a large model, loosen SUCCESSOR, BACKUP and EVALUATOR and their parsers.
10. B_L and E, which read and do not imagine, decode greedily (--reader-temperature).
11. Defaults are k = 4 and m = 2 (paper: 1 and 1), for a model of 0.1 million parameters.
12. The targets and lessons of a step are made once, before its gradient steps, and each of these takes L1, L2 and the anchor together.
The paper's prompts, learning rate, EMA rate and buffer size are not public; those below are ours.

    python nlac.py                            # repair shop, tiny model: see README for minutes and numbers
    python nlac.py --env 20q                  # twenty questions, the small table
    python nlac.py --ablation frozen-critic --out-dir runs/frozen # a floor: M never learns; blind-critic: futures of other transitions
    python nlac.py --model Qwen/Qwen2.5-1.5B-Instruct --device cuda --lr 1e-6 --max-new-tokens 256 --out-dir runs/qwen
    python nlac.py --quick --out-dir runs/quick # the whole path in under a minute
"""

import copy
import dataclasses
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
    """The command line. "not in the paper" marks what the paper leaves open."""

    # shared by all scripts
    model: str = common.flag("tiny", "tiny, tiny:WIDTHxLAYERS, a local directory or a hub id")
    env: str = common.flag("repair", "a world of envs.py")
    seed: int = common.flag(0, "of everything sampled; the tiny model is built with seed 0")
    steps: int = common.flag(150, "steps of the loop above (not in the paper: it counts 30,720 gradient steps)")
    lr: float = common.flag(1e-3, "AdamW, constant after 10 steps (not in the paper; a pretrained model wants about 1e-6)")
    batch_size: int = common.flag(64, "transitions per gradient step (not in the paper)")
    micro_batch_size: int = common.flag(16, "sequences per backward pass; changes memory and speed, not the gradient")
    max_new_tokens: int = common.flag(40, "of one reply of any part")
    temperature: float = common.flag(0.7, "of policy, successor and refiner while training, and of their likelihoods (not in the paper)")
    eval_temperature: float = common.flag(0.7, "of the policy in evaluation (not in the paper)")
    eval_episodes: int = common.flag(500, "test episodes of the first and the last evaluation; a fifth of them in between")
    eval_every: int = common.flag(25, "steps between evaluations")
    eval_only: bool = common.flag(False, "evaluate --model and stop; writes nothing")
    save_every: int = common.flag(25, "steps between checkpoints")
    out_dir: str = common.flag("", "default: runs/nlac-ENV-sSEED")
    resume: bool = common.flag(False, "continue the run in --out-dir")
    device: str = common.flag("cpu", "cpu, cuda, cuda:1, mps")
    dtype: str = common.flag("auto", "auto (float32 weights; bfloat16 compute on a GPU), float32, bfloat16")
    quick: bool = common.flag(False, "a small run through every line, to see that it works; overrides the sizes")
    # NLAC
    k: int = common.flag(4, "futures per critique (paper: 1)")
    m: int = common.flag(2, "rounds of refinement (paper: 1)")
    ema: float = common.flag(0.95, "share of the old weights kept in theta_bar per gradient step; 0 switches EMA off (not in the paper)")
    buffer_size: int = common.flag(20_000, "transitions in the replay buffer (not in the paper)")
    episodes_per_step: int = common.flag(64, "episodes collected per step (not in the paper)")
    updates_per_episode: float = common.flag(0.125, "gradient steps per collected episode (not in the paper)")
    actor_states: int = common.flag(64, "states refined per step (not in the paper)")
    actor_weight: float = common.flag(1.0, "of L2; L1 has weight 1 (not in the paper)")
    anchor: float = common.flag(0.3, "weight of imitating the actions just played: departure 3; 0 switches it off (not in the paper)")
    critic_warmup: int = common.flag(50, "first steps, with L1 only (not in the paper)")
    reader_temperature: float = common.flag(0.0, "of B_L and E, which read and do not imagine (not in the paper)")
    frozen_parts: bool = common.flag(True, "B_L, E and pi_r from the start weights: departure 1")
    distil: str = common.flag("kept", "kept: approved actions only, departure 2; all: the paper's", choices=["kept", "all"])
    react: bool = common.flag(False, "thought before action (paper: yes): departure 6")
    ablation: str = common.flag("none", "no bootstrap; futures of other states; M as it started",
                                choices=["none", "mc-backup", "blind-critic", "frozen-critic"])
    examples: int = common.flag(4000, "rounds of warm-up examples that make a tiny model")


# ------------------------------------------------------------------------------------------------------ prompts and parsers
# The paper's prompts are not public. The wording below is ours; a world adds its own system prompt in front.

POLICY = "Reply with your next action and nothing else."
POLICY_REACT = "Think in a sentence or two. Then write Action: and your next action on a line of its own."
SUCCESSOR = """You foresee how an episode goes on. Read it, and the action that comes next.
Reply with two lines. Next: what the action brings about, in one sentence.
End: failure, or success in so many turns, this one counted."""
BACKUP = """You merge what was seen with what is foreseen from there.
Read the episode, the action, its result, and the forecast that starts after it.
Reply with a forecast that starts before the action, in two lines. Next: the result that was seen, in one sentence.
End: the end that is foreseen, one turn further away; failure if the turns left do not suffice."""
EVALUATOR = """You judge an action by the futures it may lead to. Success is better than failure, and sooner is better than later.
Reply in one line: how many of the futures succeed, then Verdict: bad, weak, fair, good or great."""
REFINER = """You improve an action. Read the episode, and the tries with their critiques.
Reply with keep if the last try was judged good or great; else with an action that was not tried. Nothing else."""
READER = "You read. Repeat the first observation, the last observation and the action, a line each."  # warm-up of a tiny model only
VERDICTS = ["bad", "weak", "fair", "good", "great"]  # the total order of sentiments that the paper's theory asks for
APPROVED = VERDICTS.index("good")  # what REFINER says, for the warm-up of a tiny model


def parse_action(reply):
    """The action in a reply of the policy or the refiner: its first line, after `Action:` if that is there."""
    return (reply.rsplit("Action:", 1)[-1].strip().splitlines() or [""])[0].strip()


def parse_future(text):
    """A description of the future -> (next observation, turns until success or None), or None if it cannot be read."""
    found = re.fullmatch(r"Next: ([^\n]+)\nEnd: (?:failure|success in (\d{1,4}) turns?)\.?", text.strip())
    return found and (found[1].strip(), int(found[2]) if found[2] else None)


def parse_verdict(critique):
    """The rank of a critique's verdict, 0 (bad) to 4 (great), or None if it has none."""
    found = re.search(r"Verdict: (\w+)", critique)
    return VERDICTS.index(found[1].lower()) if found and found[1].lower() in VERDICTS else None


def future_text(observation, turns):
    """What M is to write when `observation` comes next and success takes `turns` turns (None: failure)."""
    end = "failure" if turns is None else f"success in {envs.count(turns, 'turn')}"
    return f"Next: {' '.join(first_sentence(observation).split())}\nEnd: {end}."


def first_sentence(text):
    """What a forecast repeats of an observation: not the turns left or the tally."""
    return re.split(r"(?<=[.?!])\s", text.strip(), maxsplit=1)[0]


def transcript(history):
    """`history` is [observation, reply, observation, ..., observation]; thoughts are left out."""
    turns = [f"> {parse_action(reply)}\n{observation}" for reply, observation in zip(history[1::2], history[2::2])]
    return "\n".join([history[0], *turns])


def policy_messages(world, history, args):
    """The policy alone plays in a growing dialogue."""
    system = f"{world.system}\n{POLICY_REACT if args.react else POLICY}"
    return [{"role": "system", "content": system}] + [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(history)]


def part_messages(part, world, history, *lines):
    """Every part but the policy is a call of its own, over a transcript."""
    return [{"role": "system", "content": f"{world.system}\n{part}"}, {"role": "user", "content": "\n".join([transcript(history), *lines])}]


def successor_messages(world, history, action):
    """M(. | s, a)"""
    return part_messages(SUCCESSOR, world, history, f"> {action}")


def backup_messages(world, history, action, result, forecast):
    """B_L: s, a, the s' that was seen, and the forecast that starts there."""
    return part_messages(BACKUP, world, history, f"> {action}", result, f"Forecast: {forecast}")


def evaluator_messages(world, history, action, futures):
    """E(s, a, d^(1..k))"""
    return part_messages(EVALUATOR, world, history, f"> {action}", *(f"Future: {future}" for future in futures))


def refiner_messages(world, history, tries):
    """pi_r(. | s, a^1, Q_L(s, a^1), ...)"""
    return part_messages(REFINER, world, history, *(f"Try: {t['action']}. {t['critique']}" for t in tries))


# ------------------------------------------------------------------------------------------------------------------ rollout


@torch.no_grad()
def rollout(model, chat, args, split, seeds, *, temperature, stream, prefixes=None, first=0):
    """Plays an episode per seed, all at once, and returns them as dicts.

    `stream` names the randomness: a row's replies depend on (--seed, stream, episode, turn) alone; episodes count from `first`.
    `prefixes`: replies to replay first, a list per episode, so that play goes on from a given state.
    """
    worlds = [envs.make(args.env) for _ in seeds]
    episodes = []
    for world, seed, prefix in zip(worlds, seeds, prefixes or [[]] * len(seeds)):
        observation, _ = world.reset(seed=seed, options={"split": split})
        episodes.append({"split": split, "seed": seed, "history": [observation], "valid": [], "reward": 0.0, "won": False, "score": 0.0,
                         "over": False, "truncated": False})
        for reply in prefix:
            take_turn(world, episodes[-1], reply)
    context = model.config.max_position_embeddings - args.max_new_tokens
    dialogues = common.Dialogues(model, chat, [chat.dialogue(policy_messages(w, e["history"], args)) for w, e in zip(worlds, episodes)])
    prompts = [len(ids) for ids in dialogues.ids]
    for i, e in enumerate(episodes):  # a full context ends the episode; old turns are never dropped
        e["truncated"] = not e["over"] and prompts[i] > context
    live = [i for i, e in enumerate(episodes) if not e["over"] and not e["truncated"]]
    while live:
        replies = dialogues.reply(live, max_new_tokens=args.max_new_tokens, temperature=temperature, seeds=[
            common.row_seed(args.seed, *stream, first + i, len(episodes[i]["history"])) for i in live])
        for i, reply in zip(live, replies):
            take_turn(worlds[i], episodes[i], reply)
        live = [i for i in live if not episodes[i]["over"]]
        dialogues.extend(live, [episodes[i]["history"][-1] for i in live])
        for i in live:
            episodes[i]["truncated"] = len(dialogues.ids[i]) > context
        live = [i for i in live if not episodes[i]["truncated"]]
    for world in worlds:
        world.close()
    for i, e in enumerate(episodes):
        e["tokens"], e["logprob"] = sum(dialogues.mask[i][prompts[i]:]), sum(dialogues.logprobs[i][prompts[i]:])
    return episodes


def take_turn(world, episode, reply):
    """One step of the world, written down in `episode`. Returns the world's info."""
    observation, reward, terminated, truncated, info = world.step(parse_action(reply))
    episode["history"] += [reply, observation]
    episode["valid"].append(info["valid"])
    episode["reward"] += reward
    episode.update(won=info["won"], score=info["score"], over=terminated or truncated)
    return info


def transitions(episode):
    """(s, a, s', done) as text. `turns`: from here to success, None for failure; read by --ablation mc-backup and by the logs alone."""
    history, n = episode["history"], len(episode["history"]) // 2
    return [{"seed": episode["seed"], "history": history[:2 * t + 1], "reply": history[2 * t + 1], "result": history[2 * t + 2],
             "done": t == n - 1 and episode["over"], "won": episode["won"] and t == n - 1,
             "turns": n - t if episode["won"] else None} for t in range(n)]


def sampling_weights(buffer):
    """Late turns are rare while most episodes are lost early, and they decide the others: departure 8."""
    turns = Counter(len(t["history"]) for t in buffer)
    return [turns[len(t["history"])] ** -0.5 for t in buffer]


# ------------------------------------------------------------------------------------------------------- critic and refiner


class Parts:
    """The parts of the one language model: which weights answer for which part, and how well they do."""

    PARSERS = {"successor": parse_future, "successor_bar": parse_future, "backup": parse_future, "evaluator": parse_verdict}

    def __init__(self, model, target, start, chat, world, args):
        """`model`: theta; `target`: theta_bar, the EMA; `start`: a frozen copy of the start weights."""
        self.chat, self.world, self.args = chat, world, args
        unchanging = start if args.frozen_parts else model
        self.weights = {"policy": model, "policy_bar": target, "successor": target, "successor_bar": target,
                        "backup": start if args.frozen_parts else target, "evaluator": unchanging, "refiner": unchanging}
        if args.ablation == "frozen-critic":
            self.weights |= {"successor": start, "successor_bar": start}
        self.tokens, self.asked, self.parsed = Counter(), Counter(), Counter()

    def temperature(self, part):
        return self.args.reader_temperature if part in ("backup", "evaluator") else self.args.temperature

    @torch.no_grad()
    def __call__(self, part, messages, stream, samples=1):
        """Replies (texts), `samples` per entry of `messages`, prompt-major. A prompt beyond the context gets an empty, counted reply."""
        model, args = self.weights[part], self.args
        encode = self.chat.dialogue if part.startswith("policy") else self.chat.prompt
        prompts = [encode(m) for m in messages]
        fits = [i for i, p in enumerate(prompts) if len(p) + args.max_new_tokens <= model.config.max_position_embeddings]
        texts = [""] * (len(prompts) * samples)
        if fits:
            rows = [i * samples + j for i in fits for j in range(samples)]
            replies = common.generate(
                model, self.chat, [prompts[i] for i in fits], max_new_tokens=args.max_new_tokens, temperature=self.temperature(part),
                samples=samples, seeds=[common.row_seed(args.seed, *stream, part, row) for row in rows])
            for row, text in zip(rows, replies.texts):
                texts[row] = text
            self.tokens[part] += sum(map(len, replies.ids))
        parse = self.PARSERS.get(part, lambda text: parse_action(text) or None)
        self.asked[part] += len(texts)
        self.parsed[part] += sum(parse(text) is not None for text in texts)
        return texts


def bellman_targets(parts, batch, stream):
    """B_L M_theta_bar(. | s, a) for each transition: the texts that L1 makes M write; None where one cannot be read."""
    world, args = parts.world, parts.args
    if args.ablation == "mc-backup":  # no bootstrap: what did happen, under the policy of that time
        return [future_text(t["result"], t["turns"]) for t in batch]
    targets = [future_text(t["result"], 1 if t["won"] else None) if t["done"] else None for t in batch]  # terminal: the reward, in words
    live = [i for i, t in enumerate(batch) if not t["done"]]
    nexts = [[*batch[i]["history"], batch[i]["reply"], batch[i]["result"]] for i in live]  # s'
    replies = parts("policy_bar", [policy_messages(world, s, args) for s in nexts], stream)  # a' ~ pi(. | s')
    forecasts = parts("successor_bar", [successor_messages(world, s, parse_action(a)) for s, a in zip(nexts, replies)], stream)  # d'
    merged = parts("backup", [backup_messages(world, batch[i]["history"], parse_action(batch[i]["reply"]), batch[i]["result"], forecast)
                              for i, forecast in zip(live, forecasts)], stream)
    for i, text in zip(live, merged):
        targets[i] = text.strip() if parse_future(text) else None
    return targets


def refine(parts, histories, stream, replies=None):
    """pi_r(. | s, a^1, Q_L(s, a^1), ..., a^m, Q_L(s, a^m)): critique and correct the policy's action, up to m rounds.

    Returns a dict per state: `tries` (action, futures and critique of each round), `reply` (what L2 makes the policy say) and `kept`
    (whether the refiner approved it). `replies`: judge these instead of asking the policy.
    """
    world, args = parts.world, parts.args
    replies = replies or parts("policy", [policy_messages(world, h, args) for h in histories], stream)  # a^1 ~ pi(. | s)
    refined = [{"tries": [], "reply": reply, "kept": False} for reply in replies]
    live = list(range(len(histories)))
    for r in range(args.m):
        if not live:
            break
        key = (*stream, r)
        actions = [parse_action(refined[i]["reply"]) for i in live]
        futures = parts("successor", [successor_messages(world, histories[i], a) for i, a in zip(live, actions)], key, args.k)
        futures = [futures[j * args.k:(j + 1) * args.k] for j in range(len(live))]  # d^(1..k) ~ M(. | s, a)
        if args.ablation == "blind-critic":  # futures of other states: a floor
            shift = random.Random(str(key)).randrange(1, max(2, len(futures)))
            futures = futures[shift:] + futures[:shift]
        critiques = parts("evaluator", [evaluator_messages(world, histories[i], a, f) for i, a, f in zip(live, actions, futures)], key)
        for i, action, future, critique in zip(live, actions, futures, critiques):
            refined[i]["tries"].append({"action": action, "futures": future, "critique": " ".join(critique.split())})
        for i, reply in zip(live, parts("refiner", [refiner_messages(world, histories[i], refined[i]["tries"]) for i in live], key)):
            keep = parse_action(reply).rstrip(".").lower() == "keep"
            refined[i]["kept"] = keep and parse_action(refined[i]["reply"]) != ""  # there is nothing to keep of an empty action
            if not keep:
                refined[i]["reply"] = ("Action: " if args.react else "") + parse_action(reply)
        live = [i for i in live if not refined[i]["kept"]]
    return refined


# --------------------------------------------------------------------------------------------------------------------- loss


def likelihood_loss(model, chat, pairs, weight, micro_batch_size, temperature=1.0):
    """Accumulates the gradient of weight * mean over all target tokens of -log p(target | prompt); returns the unweighted mean.

    L1 = KL(B_L M_theta_bar || M_theta) up to a constant, with a sampled target; L2 = -log pi_theta(a^r | s).
    `temperature` is the sampling temperature: at any other one, learning from own samples would sharpen (or flatten) step by step.
    The mean spans all of `pairs` [(prompt ids, target ids)], so the gradient does not depend on the micro-batch.
    """
    total, mean = sum(len(target) for _, target in pairs), 0.0
    pairs = sorted(pairs, key=lambda pair: len(pair[0]))  # neighbours of one length need little padding
    for i in range(0, len(pairs), micro_batch_size):
        logprobs, mask = common.target_logprobs(model, chat, *zip(*pairs[i:i + micro_batch_size]), temperature)  # [B, L]
        loss = -(logprobs * mask).sum() / total
        (weight * loss).backward()
        mean += loss.item()
    return mean


# ----------------------------------------------------------------------------------------------------- evaluation and records


AT_ONCE = 256  # episodes of an evaluation that share a cache: what bounds its memory


def evaluate(model, chat, args, split, episodes):
    """The plain policy on fixed test episodes: no critic, no refinement. Returns (success, standard error, episodes)."""
    played = []
    for i in range(0, episodes, AT_ONCE):
        played += rollout(model, chat, args, split, range(i, min(i + AT_ONCE, episodes)), temperature=args.eval_temperature,
                          stream=("evaluate",), first=i)
    return *common.mean_se([float(e["won"]) for e in played]), played


def calibration(parts, batch, stream):
    """Does what M foresees happen? One future per (s, a) that was just played, against what followed."""
    futures = [parse_future(f) for f in parts("successor", [
        successor_messages(parts.world, t["history"], parse_action(t["reply"])) for t in batch], stream)]
    read = [(f, t) for f, t in zip(futures, batch) if f]
    rate = lambda xs: sum(xs) / len(xs) if xs else None  # noqa: E731
    return {"predicted_success": rate([f[1] is not None for f, _ in read]),
            "won_if_predicted_success": rate([t["turns"] is not None for f, t in read if f[1] is not None]),
            "won_if_predicted_failure": rate([t["turns"] is not None for f, t in read if f[1] is None]),
            "next_observation_right": rate([f[0] == first_sentence(t["result"]) for f, t in read])}


def refinement_gain(parts, model, batch, refined, stream):
    """Replays states that teach a changed action: success after a^1 and after a^r, the current policy going on."""
    changed = [(t, r) for t, r in zip(batch, refined)
               if (r["kept"] or parts.args.distil == "all") and parse_action(r["reply"]) != r["tries"][0]["action"]]
    if not changed:
        return {"gain_states": 0}
    won = [[float(e["won"]) for e in rollout(
        model, parts.chat, parts.args, "train", [t["seed"] for t, _ in changed], temperature=parts.args.temperature,
        stream=(*stream, which), prefixes=[[*t["history"][1::2], pick(r)] for t, r in changed])]
        for which, pick in (("first", lambda r: r["tries"][0]["action"]), ("refined", lambda r: r["reply"]))]
    return {"gain_states": len(changed), "success_first": sum(won[0]) / len(changed), "success_refined": sum(won[1]) / len(changed)}


def with_thoughts(parts, episode, stream):
    """An episode with what the critic and the refiner say to each of its turns."""
    steps = transitions(episode)
    judged = refine(parts, [t["history"] for t in steps], stream, replies=[t["reply"] for t in steps])
    return episode | {"turns": [{"reply": t["reply"], "result": t["result"], **r} for t, r in zip(steps, judged)]}


def show(episode):
    """An episode as a person reads it."""
    line = lambda text: "".join(c if c.isprintable() else " " for c in text)[:100]  # noqa: E731
    lines = [line(episode["history"][0])]
    for played, turn in zip(episode["history"][1::2], episode["turns"]):
        lines.append(f"> {line(played)}")
        for t in turn["tries"]:
            lines += [f"    {line(t['action'])}?", *(f"      future: {line(future)}" for future in t["futures"][:2])]
            lines.append(f"      critique: {line(t['critique'])}")
        lines += [f"    refined: {line(turn['reply']) if turn['kept'] else '(nothing approved)'}", line(turn["result"])]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- warm-up of a tiny model


def critique_text(ends):
    """How to read k endings (turns until success, or None): how many succeed, and how soon."""
    worth = sum(0.98 ** (n - 1) for n in ends if n) / len(ends)
    verdict = VERDICTS[sum(worth > x for x in (0.1, 0.35, 0.6, 0.85))]
    return f"{sum(n is not None for n in ends)} of {len(ends)} futures succeed. Verdict: {verdict}."


def warmup(world, args):
    """What a model made from nothing is taught before NLAC begins: to read, and the form of every part's reply.

    Episodes come from a random player on the train split, unfiltered. The policy learns to answer with any action. The successor
    learns its form from the futures of *other, random* transitions, so it knows nothing of what follows what. B_L learns to copy a
    result and to count one turn on; the evaluator to read outcomes, the refiner to keep an approved action or to name any untried one.
    No part sees an expert.
    """
    rng = random.Random("warm-up")
    steps = []
    for seed in range(max(50, args.examples // 4)):
        observation, info = world.reset(seed=seed, options={"split": "train"})
        episode, possible = {"seed": seed, "history": [observation], "valid": [], "reward": 0.0, "over": False}, []
        while not episode["over"]:
            possible.append(info["admissible"])
            info = take_turn(world, episode, rng.choice(possible[-1]))
        steps += [t | {"possible": actions} for t, actions in zip(transitions(episode), possible)]
    futures = [future_text(t["result"], t["turns"]) for t in steps]

    def random_end(turns, chance=0.6):
        return rng.randint(1, turns) if rng.random() < chance else None

    examples = []
    for _ in range(args.examples):
        step, other = rng.choice(steps), rng.choice(steps)
        history, action, actions = step["history"], step["reply"], step["possible"]
        left = world.max_turns - len(history) // 2  # turns, this one counted
        examples += [
            (policy_messages(world, history, args), ("Action: " if args.react else "") + rng.choice(actions)),
            (successor_messages(world, history, action), rng.choice(futures)),
            (part_messages(READER, world, history, f"> {action}"),
             "\n".join([first_sentence(history[0]), first_sentence(history[-1]), action])),
        ]
        if not step["done"]:
            n = random_end(left)
            examples.append((backup_messages(world, history, action, step["result"], future_text(other["result"], n)),
                             future_text(step["result"], n + 1 if n and n < left else None)))
        chance = rng.random()
        ends = [random_end(left, chance) for _ in range(args.k)]
        seen = [future_text(rng.choice(steps)["result"], n) for n in ends]
        examples.append((evaluator_messages(world, history, action, seen), critique_text(ends)))
        tried = rng.sample(actions, rng.randint(1, max(1, min(args.m, len(actions) - 1))))
        low = [[random_end(left, 0.2) for _ in range(args.k)] for _ in tried[1:]]  # earlier tries were not kept
        critiques = [c if parse_verdict(c) < APPROVED else critique_text([None] * args.k) for c in map(critique_text, low)]
        critiques.append(critique_text([random_end(left, chance) for _ in range(args.k)]))
        keep = parse_verdict(critiques[-1]) >= APPROVED
        examples.append((refiner_messages(world, history, [{"action": a, "critique": c} for a, c in zip(tried, critiques)]),
                         "keep" if keep else rng.choice([a for a in actions if a not in tried] or actions)))
    facts = world.facts() if hasattr(world, "facts") else []
    for fact in facts * (4 * args.examples // max(1, len(facts))):
        examples.append(([{"role": "user", "content": " ".join(fact.split()[:-1])}], fact))
    rng.shuffle(examples)
    return examples


# --------------------------------------------------------------------------------------------------------------------- main


def check_args(args):
    """Everything that can be refused before a model is loaded. Returns the world."""
    common.check_common(args)
    for name in "k", "m", "buffer_size", "episodes_per_step", "actor_states", "examples":
        common.check(getattr(args, name) >= 1, f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    common.check(0 <= args.ema < 1, f"--ema must be in [0, 1), not {args.ema}")
    common.check(args.actor_weight >= 0, f"--actor-weight must be at least 0, not {args.actor_weight}")
    common.check(args.anchor >= 0, f"--anchor must be at least 0, not {args.anchor}")
    common.check(args.reader_temperature >= 0, f"--reader-temperature must be at least 0, not {args.reader_temperature}")
    common.check(args.critic_warmup >= 0, f"--critic-warmup must be at least 0, not {args.critic_warmup}")
    updates = args.episodes_per_step * args.updates_per_episode
    common.check(round(updates) >= 1 and abs(updates - round(updates)) < 1e-6,
                 f"--episodes-per-step x --updates-per-episode must be a whole number of gradient steps, not {updates:g}")
    try:
        return envs.make(args.env)
    except ValueError as error:
        common.refuse(error)


def load(world, args):
    """The model that plays all parts, and its chat; a tiny one is made from `warmup`."""
    if args.model.startswith("tiny") and args.device == "cpu":
        torch.set_num_threads(min(2, torch.get_num_threads()))  # small tensors: more threads only wait for each other
    constants = [f"{world.system}\n{part}" for part in (POLICY, POLICY_REACT, SUCCESSOR, BACKUP, EVALUATOR, REFINER, READER)]
    model, chat = common.load(args.model, corpus=lambda: warmup(world, args), constants=constants, device=args.device, dtype=args.dtype)
    return model.eval(), chat  # no dropout anywhere


def main():
    """Algorithm 1."""
    args = common.parse_args(Args)
    if args.quick:
        args = dataclasses.replace(args, steps=4, critic_warmup=2, episodes_per_step=8, batch_size=16, actor_states=8, eval_episodes=20,
                                   eval_every=2, save_every=2, examples=800)
    world = check_args(args)
    updates = round(args.episodes_per_step * args.updates_per_episode)  # gradient steps per step
    run = None if args.eval_only else common.Run("nlac", args, args.out_dir or f"runs/nlac-{args.env.replace(':', '-')}-s{args.seed}")
    model, chat = load(world, args)
    first = chat.prompt(policy_messages(world, [world.reset(seed=0)[0]], args))
    common.check(len(first) + args.max_new_tokens <= model.config.max_position_embeddings,
                 f"the first prompt has {len(first)} tokens and --max-new-tokens is {args.max_new_tokens}: "
                 f"beyond the model's context of {model.config.max_position_embeddings}")
    if args.eval_only:
        success, se, _ = evaluate(model, chat, args, "test", args.eval_episodes)
        return print(f"{args.env} test: success {success:.3f} (se {se:.3f}, n {args.eval_episodes})")
    run.start({"parameters": common.count_parameters(model), "start": common.fingerprint(model)})
    print(f"{args.env}: {common.count_parameters(model):,} parameters on {common.device_name(args.device)}; a step plays "
          f"{args.episodes_per_step} episodes and takes {updates} gradient steps of {args.batch_size} transitions, "
          f"with {args.actor_states} states refined; the policy learns from step {args.critic_warmup + 1}")

    target = copy.deepcopy(model)  # theta_bar
    start = copy.deepcopy(model)
    parts, after, after_episode = Parts(model, target, start, chat, world, args), None, None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    buffer, totals, seconds, done = [], Counter(), Counter(), 0
    if state := run.resume():
        model.load_state_dict(state["model"])
        target.load_state_dict(state["target"])
        optimizer.load_state_dict(state["optimizer"])
        buffer, totals, seconds, done = state["buffer"], Counter(state["totals"]), Counter(state["seconds"]), state["step"]
        before, before_episode, after, after_episode = (state[key] for key in ("before", "before_episode", "after", "after_episode"))
    else:
        success, se, played = evaluate(model, chat, args, "test", args.eval_episodes)
        before, before_episode = {"success": success, "se": se}, with_thoughts(parts, played[0], ("before",))
        print(f"before: success {success:.3f} (se {se:.3f}, n {args.eval_episodes})")

    def checkpoint(step):
        run.save({"model": model.state_dict(), "target": target.state_dict(), "optimizer": optimizer.state_dict(), "buffer": buffer,
                  "step": step, "totals": dict(totals), "seconds": dict(seconds), "before": before, "before_episode": before_episode,
                  "after": after, "after_episode": after_episode})

    bar = tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps, desc="nlac", dynamic_ncols=True)
    for step in bar:
        clock = common.Clock(seconds)
        rng = random.Random(f"{args.seed} {step}")
        for counter in (parts.tokens, parts.asked, parts.parsed):
            counter.clear()

        # 1. act
        seeds = range((step - 1) * args.episodes_per_step, step * args.episodes_per_step)
        seeds = [args.seed * 1_000_000_007 + i for i in seeds]
        actor = start if step <= args.critic_warmup else model  # while only M learns, the start policy acts
        episodes = rollout(actor, chat, args, "train", seeds, temperature=args.temperature, stream=("act", step))
        fresh = [t for e in episodes for t in transitions(e)]
        buffer = (buffer + fresh)[-args.buffer_size:]
        clock.lap("rollout")

        # 2. what M shall learn to foresee
        weights = sampling_weights(buffer)
        batch = rng.choices(buffer, weights, k=args.batch_size * updates)
        targets = [None] * len(batch) if args.ablation == "frozen-critic" else bellman_targets(parts, batch, ("bellman", step))
        critic = [(chat.prompt(successor_messages(world, t["history"], parse_action(t["reply"]))), chat.reply(text))
                  for t, text in zip(batch, targets) if text]
        clock.lap("backup")

        # 4. what the policy shall learn to say
        states, refined, lessons = [], [], []
        if step > args.critic_warmup:
            states = rng.choices(buffer, weights, k=args.actor_states)
            refined = refine(parts, [t["history"] for t in states], ("refine", step))
            lessons = [(chat.dialogue(policy_messages(world, t["history"], args)), chat.reply(r["reply"]))
                       for t, r in zip(states, refined) if r["kept"] or args.distil == "all" and parse_action(r["reply"])]
        played = rng.sample(fresh, min(args.batch_size // 4 * updates, len(fresh))) if args.anchor else []
        anchor = [(chat.dialogue(policy_messages(world, t["history"], args)), chat.reply(t["reply"])) for t in played]
        clock.lap("refinement")

        # 3, 5, 6. L1 + weight * L2, then the EMA
        losses = Counter()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 10)
        for u in range(updates):
            l1, l2, l3 = critic[u::updates], lessons[u::updates], anchor[u::updates]
            if l1:
                losses["l1"] += likelihood_loss(model, chat, l1, 1.0, args.micro_batch_size, args.temperature) / updates
            if l2:  # states without a lesson count in the mean: few lessons, a small step
                weight = args.actor_weight * len(l2) * updates / args.actor_states
                losses["l2"] += likelihood_loss(model, chat, l2, weight, args.micro_batch_size, args.temperature) / updates
            if l3:
                losses["anchor"] += likelihood_loss(model, chat, l3, args.anchor, args.micro_batch_size, args.temperature) / updates
            if l1 or l2 or l3:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            common.ema_update(target, model, args.ema)
        clock.lap("update")

        metrics = {"step": step, "success": common.mean(e["won"] for e in episodes), "return": common.mean(e["reward"] for e in episodes),
                   "l1": losses["l1"], "l2": losses["l2"], "anchor": losses["anchor"], "lessons": len(lessons),
                   "entropy": -sum(e["logprob"] for e in episodes) / max(1, sum(e["tokens"] for e in episodes)),
                   "turns": common.mean(len(e["valid"]) for e in episodes), "valid": common.mean(v for e in episodes for v in e["valid"]),
                   "truncated": sum(e["truncated"] for e in episodes),
                   "targets_dropped": 0 if args.ablation == "frozen-critic" else targets.count(None)}
        metrics |= calibration(parts, rng.sample(fresh, min(32, len(fresh))), ("calibration", step))
        if refined:
            verdicts = [parse_verdict(t["critique"]) for r in refined for t in r["tries"]]
            metrics |= {"kept": common.mean(r["kept"] for r in refined),
                        "changed": common.mean(parse_action(r["reply"]) != r["tries"][0]["action"] for r in refined),
                        "verdicts": {name: verdicts.count(i) for i, name in enumerate(VERDICTS)},
                        "sentiment": common.mean((v or 0) / 4 for v in verdicts)}
        evaluating = step % args.eval_every == 0 or step == args.steps
        if evaluating:
            if refined:
                metrics |= refinement_gain(parts, model, states, refined, ("gain", step))
            n = args.eval_episodes if step == args.steps else max(1, args.eval_episodes // 5)
            success, se, played = evaluate(model, chat, args, "test", n)
            after, after_episode = {"success": success, "se": se}, with_thoughts(parts, played[0], ("after", step))
            metrics |= {"eval_success": success, "eval_se": se, "eval_episodes": n}
        clock.lap("watching")
        metrics |= {f"parse_{part}": parts.parsed[part] / asked for part, asked in parts.asked.items() if asked}
        totals["tokens"] += sum(parts.tokens.values()) + sum(e["tokens"] for e in episodes)
        totals["env_steps"] += len(fresh)
        totals["episodes"] += len(episodes)
        totals["gradient_steps"] += updates
        metrics |= dict(totals) | {f"seconds_{name}": round(value, 2) for name, value in clock.laps.items()}
        run.log(metrics)
        run.write_rollouts([{"step": step, **e} for e in episodes])
        if evaluating:
            run.write_rollouts([{"step": step, **after_episode}])
        bar.set_postfix(success=f"{metrics['success']:.2f}", l1=f"{losses['l1']:.3f}", l2=f"{losses['l2']:.3f}")
        if evaluating:
            tqdm.write(f"step {step}: test success {success:.3f} (se {se:.3f}, n {n}), {totals['env_steps']} environment steps")
        if step % args.save_every == 0 or step == args.steps or run.stopping:
            checkpoint(step)
        if run.stopping:
            sys.exit(run.stopping)

    ends = {name: envs.mean_score(envs.make(args.env), player, args.eval_episodes, key="won") for name, player in
            (("random", envs.random_player), ("expert", envs.expert_player))}
    print(f"\nbefore\n{show(before_episode)}\n\nafter\n{show(after_episode)}\n")
    run.finish({"script": "nlac", "method": "nlac", "arm": args.ablation, "env": args.env, "model": args.model, "seed": args.seed,
                "split": "test", "eval_episodes": args.eval_episodes, "before": before, "after": after,
                **{name: {"success": score, "se": se} for name, (score, se) in ends.items()},
                "train_episodes": totals["episodes"], "env_steps": totals["env_steps"], "generated_tokens": totals["tokens"],
                "gradient_steps": totals["gradient_steps"], "seconds": round(sum(seconds.values()), 1),
                "peak_memory_bytes": common.peak_memory_bytes(args.device), "device": common.device_name(args.device),
                "git_commit": common.git_commit()}, model, chat)
    print(f"{'':10}{'success':>9}{'se':>8}   (n {args.eval_episodes})")
    for name, (value, se) in {"before": before.values(), "after": after.values(), **ends}.items():
        print(f"{name:10}{value:9.3f}{se:8.3f}")
    print(f"whole episodes: {run.dir / 'rollouts.jsonl'}")


if __name__ == "__main__":
    main()
