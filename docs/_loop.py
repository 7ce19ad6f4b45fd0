"""The loop around nlac.py's rivals: ceiling.py, nlql.py, ppo.py and self_distillation.py.

Same base model, prompts, worlds, evaluation and files in --out-dir as nlac.py, so that each of them
holds only what is its own. What differs: a rival can stop at another run's number of environment
steps (--match), and it cannot be resumed (there is no checkpoint/; these runs take minutes).
"""

import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import envs
import nlac

QUICK = nlac.QUICK | dict(micro_batch_size=8)
UNTIL = "directory of a finished run: stop after as many environment steps, whatever --steps says"


@dataclass
class Args(nlac.Args):
    match: str = common.flag("", UNTIL)


class Learner:
    """A rival; `extra` counts what it spends besides acting."""

    Parts = nlac.Parts

    def __init__(self, model, chat, world, args):
        self.model, self.chat, self.world, self.args = model, chat, world, args
        self.parts = self.Parts(model, chat, world, args)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95),
                                           weight_decay=0.0, fused=True)
        self.learns = not args.critic_gate  # until then only M does, and the start policy acts
        self.foretold = []
        self.buffer = []
        self.extra = Counter()  # env_steps, simulation_steps, tokens, gradient_steps

    @classmethod
    def check(cls, args):
        """Refuses what is impossible for this rival, before anything is loaded."""

    def act(self, step, seeds):
        """The episodes of a step."""
        actor = self.model if self.learns else self.parts.start
        return nlac.rollout(actor, self.chat, self.args, "train", seeds,
                            temperature=self.args.temperature, stream=("act", step))

    def learn(self, step, episodes, rng, clock):
        """Takes the gradient steps of a step, on the episodes just played and on `self.buffer`,
        which holds their transitions by now. Returns metrics."""
        raise NotImplementedError

    def states(self, rng):
        """What is refined in this step."""
        count = self.args.actor_states * self.learns
        return nlac.sample(self.buffer, self.args, rng, count)

    def successor_lessons(self, step, rng):
        """nlac.successor_lessons on a sample of the buffer -> (pairs, targets dropped)."""
        batch = nlac.sample(self.buffer, self.args, rng, self.args.batch_size * self.args.updates)
        pairs = nlac.successor_lessons(self.parts, batch, ("backup", step))
        return pairs, len(batch) - len(pairs)

    def anchor_lessons(self, episodes, rng):
        """nlac.anchor_lessons of what was just played."""
        fresh = [t for e in episodes for t in nlac.transitions(e)]
        return nlac.anchor_lessons(self.parts, fresh, rng)

    def update(self, step, forecasts, lessons, played=()):
        """nlac.update; returns its metrics."""
        self.extra["gradient_steps"] += self.args.updates
        common.set_rate(self.optimizer, self.args.lr * min(1, step / 10))
        return nlac.update(self.parts, self.optimizer, forecasts, lessons, played)


class PlayedParts(nlac.Parts):
    """Parts in which futures are played, not foreseen: there is no M. A rival writes `play`."""

    def __init__(self, *all_of_it):
        super().__init__(*all_of_it)
        self.extra = Counter()
        self.asked = []  # the transitions whose states are refined: `play` needs their seeds

    def foresee(self, states, actions, stream, samples=1, averaged=False):
        """`samples` episodes of each action, told as futures; of none where there is no action."""
        rows = [row for row in zip(self.asked, actions) for _ in range(samples)]
        some = [row for row in rows if row[1]]
        played = iter(self.play(some, (*stream, "play")))
        return [self.describe(t, next(played)) if action else "" for t, action in rows]

    def play(self, rows, stream):
        """An episode for each (transition, action): the state, the action, how it goes on."""
        raise NotImplementedError

    @staticmethod
    def describe(t, episode):
        """What was played after the state of `t`, in the words of a future."""
        following = nlac.transitions(episode)[len(t.state) // 2]
        return nlac.in_hindsight(following)


class PlayingLearner(Learner):
    """A rival that refines by played futures and learns L2 alone."""

    Parts = PlayedParts

    def learn(self, step, episodes, rng, clock):
        self.parts.asked = self.states(rng)
        states = [t.state for t in self.parts.asked]
        tries = nlac.refine(self.parts, states, ("refine", step))
        lessons = nlac.policy_lessons(self.parts, states, tries, ("choose", step))
        self.extra.update(self.parts.extra)
        self.parts.extra.clear()
        clock.lap("refinement")
        losses = self.update(step, [], lessons)
        clock.lap("update")
        return losses | nlac.watch_refinement(tries) | {"lessons": len(lessons)}


def steps_of(directory):
    """The environment steps of a finished run."""
    try:
        return json.loads(Path(directory, "summary.json").read_text(encoding="utf-8"))["env_steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        common.refuse(f"--match {directory}: no finished run there ({type(error).__name__})")


def main(method, arguments, make_learner, tiny=None, quick=None):
    """Runs `make_learner` (a Learner class) with the settings `arguments` (a dataclass).

    `tiny`: more defaults of a tiny model; `quick`: more settings of --quick.
    """
    args = common.parse_args(arguments, nlac.TINY | (tiny or {}), quick=QUICK | (quick or {}))
    world = nlac.check_args(args)
    common.check(not args.resume and not args.eval_only,
                 "the rivals under docs/ know neither --resume nor --eval-only")
    common.check(args.ablation == "none", "--ablation belongs to nlac.py")
    make_learner.check(args)
    limit = steps_of(args.match) if args.match else None
    run = common.Run(method, args, common.run_directory(method, args))
    model, chat = nlac.load(world, args)
    run.start({"parameters": common.count_parameters(model)})
    end = f"{limit} environment steps" if limit else f"{args.steps} steps"
    tqdm.write(f"{method} on {args.env}: {common.count_parameters(model):,} parameters on "
               f"{common.device_name(args.device)}; stops after {end}, a step plays "
               f"{args.episodes_per_step} episodes")
    torch.manual_seed(args.seed)  # for parameters that a rival adds
    learner = make_learner(model, chat, world, args)
    before, episode = nlac.evaluate(model, chat, args, ["test"], args.eval_episodes)
    shown = [("before", episode)]
    run.write_rollouts([{"step": 0, "evaluation": "before", **vars(episode)}])

    totals = Counter(env_steps=0, tokens=0, gradient_steps=0, episodes=0)
    seconds = Counter()
    step = 0
    last = False
    bar = tqdm(total=limit or args.steps, desc=method, dynamic_ncols=True,
               unit=" environment steps" if limit else " steps")
    run.in_step = True  # a signal waits for the end of a step
    while not last:
        step += 1
        clock = common.Clock(seconds)
        learner.parts.counts.clear()
        first = args.seed * 1_000_000_007 + (step - 1) * args.episodes_per_step  # as in nlac.py
        episodes = learner.act(step, range(first, first + args.episodes_per_step))
        fresh = [t for e in episodes for t in nlac.transitions(e)]
        learner.buffer = (learner.buffer + fresh)[-args.buffer_size:]
        clock.lap("rollout")
        metrics = {"step": step, **nlac.watch(episodes)}
        metrics |= learner.learn(step, episodes, random.Random(f"{args.seed} {step}"), clock)
        sampled = sum(episode.tokens for episode in episodes)
        sampled += sum(counts["tokens"] for counts in learner.parts.counts.values())
        totals.update(episodes=len(episodes), env_steps=len(fresh), tokens=sampled)
        totals.update(learner.extra)
        learner.extra.clear()
        last = totals["env_steps"] >= limit if limit else step == args.steps
        records = [{"step": step, **vars(e)} for e in episodes]
        if last or step % args.eval_every == 0:
            count = args.eval_episodes if last else max(1, args.eval_episodes // 5)
            after, episode = nlac.evaluate(model, chat, args, ["test"], count)
            metrics |= {f"eval_{name}": value for name, value in after["test"].items()}
            records += [{"step": step, "evaluation": "after", **vars(episode)}] * last
        clock.lap("watching")
        metrics |= nlac.watch_parts(learner.parts) | dict(totals) | clock.seconds()
        common.warn_cut(metrics, nlac.LIMITS)
        run.log(metrics)
        run.write_rollouts(records)
        bar.update((totals["env_steps"] if limit else step) - bar.n)
        bar.set_postfix(success=f"{metrics['success']:.2f}")
        if run.stopping:
            sys.exit(run.stopping)
    bar.close()
    run.in_step = False

    shown.append(("after", episode))
    ends = envs.ends(args.env, args.eval_episodes)
    summary = common.summary(f"docs/{Path(sys.argv[0]).name}", method, "none", args, before, after,
                             ends, totals, seconds)
    if "simulation_steps" in totals:
        summary["simulation_steps"] = totals["simulation_steps"]
    run.finish(summary, model, chat)
    for name, episode in shown:
        print(f"\n{name}\n{common.show(vars(episode))}")
    print()
    common.print_table(summary)
    print(run.closing())
