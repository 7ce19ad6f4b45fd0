"""NLQL, the paper's ablation without a refiner: several actions of the policy are critiqued, and the one valued best is distilled.

 1. Act, and train the successor model M by L1, exactly as nlac.py does.
 2. For sampled states the policy proposes 4 actions; M writes k futures of each, the evaluator a critique of each.
 3. L2: the policy learns to write the action with the best verdict (the first of the best). Where all verdicts tie there is no lesson.
    The anchor and the start policy's acting while only M learns are nlac.py's, too.

--m only shapes the base model, which is nlac.py's; --distil is without effect. It cannot be resumed.

    python docs/nlql.py
    python docs/nlql.py --seed 1 --match docs/results/nlac-s1 --out-dir docs/results/nlql-s1
"""

from dataclasses import dataclass

import _loop

import common
import nlac


@dataclass
class Args(_loop.Args):
    candidates: int = common.flag(4, "actions per state (paper: 4)")


def best(verdicts):
    """The index of the highest verdict (None: unreadable, below all), or None when all tie."""
    ranks = [-1 if v is None else v for v in verdicts]
    return ranks.index(max(ranks)) if min(ranks) < max(ranks) else None


class NLQL(_loop.Learner):
    @classmethod
    def check(cls, args):
        common.check(args.candidates >= 2, f"--candidates must be at least 2, not {args.candidates}")

    def learn(self, step, episodes, rng, clock):
        args, parts, world, n = self.args, self.parts, self.world, self.args.candidates
        critic, dropped = self.successor_lessons(step, rng)
        clock.lap("backup")
        actor, metrics = [], {}
        if step > args.critic_warmup:
            states, stream = rng.choices(self.buffer, nlac.sampling_weights(self.buffer), k=args.actor_states), ("refine", step)
            replies = parts("policy", [nlac.policy_messages(world, t["history"], args) for t in states], stream, n)
            rows = [(t["history"], nlac.parse_action(reply)) for t, reply in zip([t for t in states for _ in range(n)], replies)]
            futures = parts("successor", [nlac.successor_messages(world, h, a) for h, a in rows], stream, args.k)
            critiques = parts("evaluator", [nlac.evaluator_messages(world, h, a, futures[i * args.k:(i + 1) * args.k])
                                            for i, (h, a) in enumerate(rows)], stream)
            verdicts = [nlac.parse_verdict(c) for c in critiques]
            chosen = [best(verdicts[i * n:(i + 1) * n]) for i in range(len(states))]
            actor = [self.policy_lesson(t["history"], replies[i * n + c]) for i, (t, c) in enumerate(zip(states, chosen))
                     if c is not None and rows[i * n + c][1]]
            metrics = {"ties": chosen.count(None) / len(states), "changed": common.mean(bool(c) for c in chosen),
                       "verdicts": {name: verdicts.count(i) for i, name in enumerate(nlac.VERDICTS)},
                       "sentiment": common.mean((v or 0) / 4 for v in verdicts)}
        clock.lap("refinement")
        metrics |= self.update(step, critic, actor, self.anchor_lessons(episodes, rng)) | {"targets_dropped": dropped}
        clock.lap("update")
        fresh = self.buffer[-sum(len(e["valid"]) for e in episodes):]
        return metrics | nlac.calibration(parts, rng.sample(fresh, min(32, len(fresh))), ("calibration", step))


if __name__ == "__main__":
    _loop.main("nlql", Args, NLQL)
