"""The ceiling of nlac.py: true futures instead of a learned successor model, and critiques by rule.

 1. Act as nlac.py does.
 2. A future of (s, a): a copy of the world is brought to s, *whatever is hidden is drawn anew
    among all that fits the dialogue*, a is taken and the current policy plays on. So a future
    holds nothing that the player could not know, and k of them show the chances.
 3. The critique is composed in code from the outcomes (--verdicts model: nlac's evaluator reads
    them instead).
 4. nlac's refiner reads the critique (--refiner rule: what is good or great again, else what the
    critique hints at, else any untried action, drawn in code).
 5. L2 as in nlac.py. There is no L1.

Rules stand here and nowhere else: this measures what a perfect critic would be worth, and with the
two switches which learned part costs how much of it. Steps in copies of the world are no
environment steps; they are reported apart, as simulation_steps. It cannot be resumed.

    python docs/ceiling.py                      # true futures, rule verdicts, nlac's refiner
    python docs/ceiling.py --refiner rule       # the upper end of the ladder
    python docs/ceiling.py --verdicts model     # all of nlac but M
"""

import random
import re
from dataclasses import dataclass

import _loop
import torch

import common
import envs
import nlac

TINY = dict(critic_gate=0.0)  # there is no critic to wait for
FUTURE = re.compile(r"^Future \d+: Next: (.+?)(?: Then: (.+?)[.])? "
                    r"End: (?:failure.*|success in (\d+) turns?)[.]$", re.M)


@dataclass
class Args(_loop.Args):
    verdicts: str = common.flag("rule", "who critiques: a rule over the outcomes, or the model",
                                choices=["rule", "model"])
    refiner: str = common.flag("model", "who refines: the model, or a rule",
                               choices=["model", "rule"])


def restored(args, t, rng):
    """A world in the state of transition `t`, what is hidden drawn anew among all that fits it."""
    world = envs.make(args.env, show_actions=args.show_actions)
    envs.replay(world, t.seed, [common.aloud(reply) for reply in t.state[1::2]], "train")
    world.resample(rng)
    return world


class Parts(_loop.PlayedParts):
    """Steps 2 to 4."""

    def __init__(self, model, chat, world, args):
        super().__init__(model, chat, world, args)
        self.actions = world.reset(seed=0)[1]["admissible"]

    def play(self, rows, stream):
        """nlac.rollout from given worlds. Randomness is of the row, never of the episode's seed."""
        episodes, size = [], self.args.rollout_batch_size
        for i in range(0, len(rows), size):
            episodes += self.side_by_side(rows[i:i + size], stream, i)
        for (t, _), episode in zip(rows, episodes):
            self.extra["simulation_steps"] += len(episode.actions) - len(t.state) // 2
            self.extra["tokens"] += episode.tokens
        return episodes

    @torch.no_grad()
    def side_by_side(self, rows, stream, first):
        """The part of `play` that shares a cache; its rows count from `first`."""
        worlds, episodes = [], []
        for i, (t, action) in enumerate(rows, first):
            rng = random.Random(common.row_seed(self.args.seed, *stream, "hidden", i))
            worlds.append(restored(self.args, t, rng))
            episode = nlac.Episode("train", t.seed)
            for turn, text in enumerate(t.state):
                episode.said.append([("world", "act")[turn % 2], text])
            episode.actions = [nlac.action_of(worlds[-1], reply) for reply in t.state[1::2]]
            nlac.take_turn(worlds[-1], episode, nlac.written(action))
            episodes.append(episode)
        streams = [(*stream, i) for i in range(first, first + len(rows))]
        nlac.play_on(self.model, self.chat, self.args, worlds, episodes, streams,
                     self.args.temperature)
        for world in worlds:
            world.close()
        return episodes

    def ask(self, part, messages, stream, samples=1, averaged=False):
        """nlac.Parts.ask, with the rules in the place of the parts that they replace."""
        contents = [message[-1]["content"] if message else "" for message in messages]
        if part == "evaluator" and self.args.verdicts == "rule":
            return [content and self.rule_critique(content) for content in contents]
        if part == "refiner" and self.args.refiner == "rule":
            said = []
            for i, content in enumerate(contents):
                rng = random.Random(common.row_seed(self.args.seed, *stream, part, i))
                said.append(content and self.rule_refiner(content, rng))
            return said
        return super().ask(part, messages, stream, samples, averaged)

    def rule_critique(self, content):
        """What the tiny model's corpus teaches an evaluator to say of the futures in a prompt."""
        futures = []
        for seen, then, turns in FUTURE.findall(content):
            futures.append(nlac.Future(seen, then, int(turns) if turns else None))
        return nlac.critique_text(futures)

    def rule_refiner(self, content, rng):
        """What it teaches a refiner to answer to the tries in a prompt."""
        tried = re.findall(r"^Try \d+: (.+)$", content, re.M)
        if (nlac.rank(content) or 0) >= nlac.VERDICTS.index("good"):  # of the last try
            return nlac.written(tried[-1])
        critique = content.rpartition("Critique: ")[2]
        hint = re.findall(r"One goes on with: (.+?)[.] Verdict", critique)
        untried = [a for a in self.actions if envs.one_line(a) not in tried]
        drawn = rng.choice(untried or self.actions)
        return nlac.written(next((a for a in untried if a in hint), drawn))


class Ceiling(_loop.PlayingLearner):
    """All of it."""

    Parts = Parts

    @classmethod
    def check(cls, args):
        world = envs.make(args.env)
        common.check(hasattr(world, "resample"),
                     f"--env {args.env} cannot draw anew what is hidden")
        common.check(args.refiner == "model" or world.reset(seed=0)[1]["admissible"],
                     f"--refiner rule needs a list of actions; {args.env} has none")


if __name__ == "__main__":
    _loop.main("ceiling", Args, Ceiling, TINY)
