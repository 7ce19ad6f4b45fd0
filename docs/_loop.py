"""The loop around the rivals under docs/: what they share with nlac.py, so that each file holds only what is its own.

Same base model, prompts, worlds, evaluation and files in --out-dir as nlac.py. What differs: a rival can stop at another run's number of
environment steps (--match), and it cannot be resumed (there is no checkpoint/; these runs take minutes).
"""

import copy
import dataclasses
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import envs  # noqa: E402
import nlac  # noqa: E402

QUICK = dict(steps=4, critic_warmup=1, episodes_per_step=8, updates_per_episode=0.125, batch_size=16, micro_batch_size=8, actor_states=8,
             eval_episodes=20, eval_every=2, examples=800)


@dataclass
class Args(nlac.Args):
    match: str = common.flag("", "directory of a finished run: stop after as many environment steps as it took, whatever --steps says")


class Learner:
    """A rival. `learn` takes the gradient steps of one step of the loop; `extra` counts what it spends besides the acting."""

    Parts = nlac.Parts

    def __init__(self, model, chat, world, args):
        self.model, self.chat, self.world, self.args = model, chat, world, args
        self.target = copy.deepcopy(model)  # theta_bar
        self.start = copy.deepcopy(model)
        self.parts = self.Parts(model, self.target, self.start, chat, world, args)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.buffer, self.extra = [], Counter()  # extra: env_steps, simulation_steps, tokens, gradient_steps

    @classmethod
    def check(cls, args):
        """Refuses what is impossible for this rival, before anything is loaded."""

    def act(self, step, seeds):
        actor = self.start if step <= self.args.critic_warmup else self.model
        return nlac.rollout(actor, self.chat, self.args, "train", seeds, temperature=self.args.temperature, stream=("act", step))

    def learn(self, step, episodes, rng, clock):
        """Learns from the episodes just played, and from `self.buffer`, which holds their transitions by now. Returns metrics."""
        raise NotImplementedError

    # what NLAC's relatives do as nlac.main does

    def updates(self):
        return round(self.args.episodes_per_step * self.args.updates_per_episode)

    def successor_lessons(self, step, rng):
        """(prompt ids, target ids) of L1, and how many targets could not be read."""
        batch = rng.choices(self.buffer, nlac.sampling_weights(self.buffer), k=self.args.batch_size * self.updates())
        targets = nlac.bellman_targets(self.parts, batch, ("bellman", step))
        prompts = [self.chat.prompt(nlac.successor_messages(self.world, t["history"], nlac.parse_action(t["reply"]))) for t in batch]
        lessons = [(prompt, self.chat.reply(text)) for prompt, text in zip(prompts, targets) if text]
        return lessons, targets.count(None)

    def policy_lesson(self, history, reply):
        return self.chat.dialogue(nlac.policy_messages(self.world, history, self.args)), self.chat.reply(reply)

    def refined_lessons(self, states, refined):
        return [self.policy_lesson(t["history"], r["reply"]) for t, r in zip(states, refined)
                if r["kept"] or self.args.distil == "all" and nlac.parse_action(r["reply"])]

    def anchor_lessons(self, episodes, rng):
        """Some of the actions just played, to hold the policy where it has no lesson while M learns in the same weights."""
        fresh = [t for e in episodes for t in nlac.transitions(e)]
        played = rng.sample(fresh, min(self.args.batch_size // 4 * self.updates(), len(fresh))) if self.args.anchor else []
        return [self.policy_lesson(t["history"], t["reply"]) for t in played]

    def update(self, step, critic, actor, anchor=()):
        """L1 + weight * L2 + the anchor, then the EMA: the update of nlac.main. Returns the losses."""
        args, losses, updates = self.args, Counter(l1=0.0, l2=0.0), self.updates()
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 10)
        for u in range(updates):
            l1, l2, l3 = critic[u::updates], actor[u::updates], anchor[u::updates]
            if l1:
                losses["l1"] += nlac.likelihood_loss(self.model, self.chat, l1, 1.0, args.micro_batch_size, args.temperature) / updates
            if l2:  # states without a lesson count in the mean
                weight = args.actor_weight * len(l2) * updates / args.actor_states
                losses["l2"] += nlac.likelihood_loss(self.model, self.chat, l2, weight, args.micro_batch_size, args.temperature) / updates
            if l3:
                losses["anchor"] += nlac.likelihood_loss(self.model, self.chat, l3, args.anchor, args.micro_batch_size,
                                                         args.temperature) / updates
            if l1 or l2 or l3:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            common.ema_update(self.target, self.model, args.ema)
        self.extra["gradient_steps"] += updates
        return dict(losses)


class PlayedParts(nlac.Parts):
    """Parts in which futures are played instead of foreseen: no successor model. A rival writes `play`."""

    def __init__(self, model, *rest):
        super().__init__(model, *rest)
        self.model, self.live, self.extra = model, [], Counter()

    def refine(self, states, stream):
        """nlac.refine on transitions. It remembers which are asked about: behind one dialogue there can be different hidden answers."""
        self.live = list(states)
        return nlac.refine(self, [t["history"] for t in states], stream)

    def __call__(self, part, messages, stream, samples=1):
        if part == "successor":
            actions = [m[-1]["content"].rpartition("\n> ")[2] for m in messages]
            if messages != [nlac.successor_messages(self.world, t["history"], a) for t, a in zip(self.live, actions)]:
                raise RuntimeError("nlac.refine asks for the futures of other states than expected")
            rows = [(t, a) for t, a in zip(self.live, actions) for _ in range(samples)]
            return [self.describe(t, e) for (t, _), e in zip(rows, self.play(rows, (*stream, "play")))]
        texts = self.answer(part, messages, stream, samples)
        if part == "refiner":  # nlac.refine goes on with the states whose action was not kept
            self.live = [t for t, text in zip(self.live, texts) if nlac.parse_action(text).rstrip(".").lower() != "keep"]
        return texts

    def answer(self, part, messages, stream, samples):
        return super().__call__(part, messages, stream, samples)

    def play(self, rows, stream):
        """An episode for each (transition, action): its dialogue, the action, and how the current policy went on."""
        raise NotImplementedError

    @staticmethod
    def describe(t, episode):
        """What was played after the dialogue of `t`, in the words of a future."""
        turns = (len(episode["history"]) - len(t["history"])) // 2  # the action counted
        return nlac.future_text(episode["history"][len(t["history"]) + 1], turns if episode["won"] else None)


def refinement_metrics(refined):
    verdicts = [nlac.parse_verdict(t["critique"]) for r in refined for t in r["tries"]]
    return {"kept": common.mean(r["kept"] for r in refined),
            "changed": common.mean(nlac.parse_action(r["reply"]) != r["tries"][0]["action"] for r in refined),
            "verdicts": {name: verdicts.count(i) for i, name in enumerate(nlac.VERDICTS)},
            "sentiment": common.mean((v or 0) / 4 for v in verdicts)}


def steps_of(directory):
    """The environment steps of a finished run."""
    try:
        return json.loads(Path(directory, "summary.json").read_text(encoding="utf-8"))["env_steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        common.refuse(f"--match {directory}: no finished run there ({type(error).__name__})")


def main(method, arguments, make_learner, quick=None):
    """Runs `make_learner` (a Learner class) with the settings `arguments` (a dataclass); `quick`: more settings of --quick."""
    args = common.parse_args(arguments)
    if args.quick:
        args = dataclasses.replace(args, **QUICK | (quick or {}))
    world = nlac.check_args(args)
    common.check(not args.resume and not args.eval_only, "the rivals under docs/ know neither --resume nor --eval-only")
    common.check(args.ablation == "none", "--ablation belongs to nlac.py")
    make_learner.check(args)
    limit = steps_of(args.match) if args.match else None
    run = common.Run(method, args, args.out_dir or f"runs/{method}-{args.env}-s{args.seed}")
    model, chat = nlac.load(world, args)
    first = chat.prompt(nlac.policy_messages(world, [world.reset(seed=0)[0]], args))
    context = model.config.max_position_embeddings
    common.check(len(first) + args.max_new_tokens <= context,
                 f"the first prompt has {len(first)} tokens; with --max-new-tokens it exceeds the model's {context}")
    run.start({"parameters": common.count_parameters(model)})
    print(f"{method} on {args.env}: {common.count_parameters(model):,} parameters on {common.device_name(args.device)}; a step plays "
          f"{args.episodes_per_step} episodes; stops after {f'{limit} environment steps' if limit else f'{args.steps} steps'}")
    torch.manual_seed(args.seed)  # for parameters that a rival adds
    learner = make_learner(model, chat, world, args)
    success, se, played = nlac.evaluate(model, chat, args, "test", args.eval_episodes)
    before, before_episode = {"success": success, "se": se}, played[0]
    print(f"before: success {success:.3f} (se {se:.3f}, n {args.eval_episodes})")

    totals, seconds, step, last = Counter(env_steps=0, tokens=0, gradient_steps=0, episodes=0), Counter(), 0, False
    bar = tqdm(total=limit or args.steps, desc=method, unit=" environment steps" if limit else " steps", dynamic_ncols=True)
    while not last:
        step += 1
        clock = common.Clock(seconds)
        for counter in (learner.parts.tokens, learner.parts.asked, learner.parts.parsed):
            counter.clear()
        seeds = range((step - 1) * args.episodes_per_step, step * args.episodes_per_step)
        episodes = learner.act(step, [args.seed * 1_000_000_007 + i for i in seeds])  # the episodes that nlac.py plays
        fresh = [t for e in episodes for t in nlac.transitions(e)]
        learner.buffer = (learner.buffer + fresh)[-args.buffer_size:]
        clock.lap("rollout")

        metrics = {"step": step, "success": common.mean(e["won"] for e in episodes), "return": common.mean(e["reward"] for e in episodes),
                   "entropy": -sum(e["logprob"] for e in episodes) / max(1, sum(e["tokens"] for e in episodes)),
                   "turns": common.mean(len(e["valid"]) for e in episodes), "valid": common.mean(v for e in episodes for v in e["valid"]),
                   "truncated": sum(e["truncated"] for e in episodes)}
        metrics |= learner.learn(step, episodes, random.Random(f"{args.seed} {step}"), clock)
        spent = Counter(episodes=len(episodes), env_steps=len(fresh), tokens=sum(e["tokens"] for e in episodes))
        for counter in (spent, learner.extra, {"tokens": sum(learner.parts.tokens.values())}):
            totals.update(counter)
        learner.extra.clear()
        last = totals["env_steps"] >= limit if limit else step == args.steps
        if last or step % args.eval_every == 0:
            n = args.eval_episodes if last else max(1, args.eval_episodes // 5)
            success, se, played = nlac.evaluate(model, chat, args, "test", n)
            metrics |= {"eval_success": success, "eval_se": se, "eval_episodes": n}
            tqdm.write(f"step {step}: test success {success:.3f} (se {se:.3f}, n {n}), {totals['env_steps']} environment steps")
        clock.lap("watching")
        metrics |= {f"parse_{part}": learner.parts.parsed[part] / n for part, n in learner.parts.asked.items()}
        run.log(metrics | dict(totals) | {f"seconds_{name}": round(value, 2) for name, value in clock.laps.items()})
        run.write_rollouts([{"step": step, **e} for e in episodes] + ([{"step": step, "evaluation": True, **played[0]}] if last else []))
        bar.update((totals["env_steps"] if limit else step) - bar.n)
        bar.set_postfix(success=f"{metrics['success']:.2f}")
        if run.stopping:
            sys.exit(run.stopping)
    bar.close()

    after = {"success": success, "se": se}
    ends = {name: envs.mean_score(envs.make(args.env), player, args.eval_episodes, key="won") for name, player in
            (("random", envs.random_player), ("expert", envs.expert_player))}
    for name, episode in ("before", before_episode), ("after", played[0]):
        print(f"\n{name}\n" + "".join(c if c.isprintable() or c == "\n" else " " for c in nlac.transcript(episode["history"])))
    extra = {key: totals[key] for key in ("simulation_steps",) if key in totals}
    run.finish({"script": f"docs/{Path(sys.argv[0]).name}", "method": method, "arm": "none", "env": args.env, "model": args.model,
                "seed": args.seed, "split": "test", "eval_episodes": args.eval_episodes, "before": before, "after": after,
                **{name: {"success": score, "se": se} for name, (score, se) in ends.items()},
                "train_episodes": totals["episodes"], "env_steps": totals["env_steps"], "generated_tokens": totals["tokens"],
                "gradient_steps": totals["gradient_steps"], "seconds": round(sum(seconds.values()), 1),
                "peak_memory_bytes": common.peak_memory_bytes(args.device), "device": common.device_name(args.device),
                "git_commit": common.git_commit(), **extra}, model, chat)
    print(f"\n{'':10}{'success':>9}{'se':>8}   (n {args.eval_episodes})")
    for name, (value, se) in {"before": before.values(), "after": after.values(), **ends}.items():
        print(f"{name:10}{value:9.3f}{se:8.3f}")
    print(f"whole episodes: {run.dir / 'rollouts.jsonl'}")
