"""The ceiling of nlac.py: true futures instead of a learned successor model, and verdicts by rule.

 1. Act as nlac.py does.
 2. A future of (s, a): a copy of the world is brought to s, *whatever is hidden is drawn anew among all that fits the dialogue*, a is
    taken and the current policy plays on. So a future holds nothing that the player could not know, and k of them show the chances.
 3. The critique is composed in code from the outcomes (--verdicts model: nlac's evaluator reads them instead).
 4. nlac's refiner reads the critique (--refiner rule: keep if good or great, else any untried action, drawn in code).
 5. L2 as in nlac.py. There is no L1.

Rules stand here and nowhere else: this measures what a perfect critic would be worth, and with the two switches which learned part costs
how much of it. Steps in copies of the world are no environment steps; they are reported apart, as simulation_steps. It cannot be resumed.

    python docs/ceiling.py                                          # true futures, rule verdicts, nlac's refiner
    python docs/ceiling.py --refiner rule                           # the upper end of the ladder
    python docs/ceiling.py --verdicts model                         # all of nlac but M
"""

import random
import re
from dataclasses import dataclass

import _loop
import torch

import common
import envs
import nlac


@dataclass
class Args(_loop.Args):
    critic_warmup: int = common.flag(0, "first steps, without learning (there is no critic to wait for)")
    verdicts: str = common.flag("rule", "who critiques: a rule over the outcomes, or the model as in nlac", choices=["rule", "model"])
    refiner: str = common.flag("model", "who refines: the model as in nlac, or a rule", choices=["model", "rule"])


def restored(env, t, rng):
    """A world in the state of transition `t`, with what is hidden drawn anew among all that fits the dialogue."""
    world = envs.make(env)
    envs.replay(world, t["seed"], [nlac.parse_action(reply) for reply in t["history"][1::2]], "train")
    world.resample(rng)
    return world


class Parts(_loop.PlayedParts):
    def __init__(self, model, target, start, chat, world, args):
        super().__init__(model, target, start, chat, world, args)
        self.actions = world.reset(seed=0)[1]["admissible"]

    @torch.no_grad()
    def play(self, rows, stream):
        """nlac.rollout, but from given worlds. The randomness knows the row, never the episode's seed."""
        args, worlds, episodes = self.args, [], []
        for i, (t, action) in enumerate(rows):
            worlds.append(restored(args.env, t, random.Random(common.row_seed(args.seed, *stream, "hidden", i))))
            episodes.append({"history": list(t["history"]), "valid": [], "reward": 0.0, "won": False, "score": 0.0, "over": False})
            nlac.take_turn(worlds[-1], episodes[-1], action)
        context = self.model.config.max_position_embeddings - args.max_new_tokens
        dialogues = common.Dialogues(self.model, self.chat, [
            self.chat.dialogue(nlac.policy_messages(w, e["history"], args)) for w, e in zip(worlds, episodes)])
        while live := [i for i, e in enumerate(episodes) if not e["over"] and len(dialogues.ids[i]) <= context]:
            replies = dialogues.reply(live, max_new_tokens=args.max_new_tokens, temperature=args.temperature, seeds=[
                common.row_seed(args.seed, *stream, i, len(episodes[i]["history"])) for i in live])
            for i, reply in zip(live, replies):
                nlac.take_turn(worlds[i], episodes[i], reply)
            dialogues.extend(live, [episodes[i]["history"][-1] for i in live])
        self.extra["simulation_steps"] += sum(len(e["valid"]) for e in episodes)
        self.extra["tokens"] += sum(map(sum, dialogues.mask))
        return episodes

    def answer(self, part, messages, stream, samples):
        contents = [m[-1]["content"] for m in messages]
        if part == "evaluator" and self.args.verdicts == "rule":
            ends = [re.findall(r"^End: (?:failure|success in (\d+) turns?)\.$", c, re.MULTILINE) for c in contents]
            return [nlac.critique_text([int(n) if n else None for n in e]) for e in ends]
        if part == "refiner" and self.args.refiner == "rule":
            return [self.rule_refiner(c, random.Random(common.row_seed(self.args.seed, *stream, part, i))) for i, c in enumerate(contents)]
        return super().answer(part, messages, stream, samples)

    def rule_refiner(self, content, rng):
        if (nlac.parse_verdict(content.rpartition("\nTry: ")[2]) or 0) >= nlac.APPROVED:
            return "keep"
        untried = [a for a in self.actions if f"\nTry: {a}. " not in content]
        return rng.choice(untried or self.actions)


class Ceiling(_loop.Learner):
    Parts = Parts

    @classmethod
    def check(cls, args):
        world = envs.make(args.env)
        common.check(hasattr(world, "resample"), f"--env {args.env} cannot draw anew what is hidden")
        common.check(args.refiner == "model" or world.reset(seed=0)[1]["admissible"],
                     f"--refiner rule needs a list of actions; {args.env} has none")

    def learn(self, step, episodes, rng, clock):
        states, refined = [], []
        if step > self.args.critic_warmup:
            states = rng.choices(self.buffer, nlac.sampling_weights(self.buffer), k=self.args.actor_states)
            refined = self.parts.refine(states, ("refine", step))
        self.extra.update(self.parts.extra)
        self.parts.extra.clear()
        clock.lap("refinement")
        losses = self.update(step, [], self.refined_lessons(states, refined))
        clock.lap("update")
        return losses | (_loop.refinement_metrics(refined) if refined else {})


if __name__ == "__main__":
    _loop.main("ceiling", Args, Ceiling, {"critic_warmup": 0})
