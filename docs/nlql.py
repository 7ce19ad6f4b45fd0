"""NLQL, the paper's ablation without a refiner: the best of several judged actions is distilled.

 1. Act, and train the successor model M by L1, exactly as nlac.py does.
 2. For sampled states the policy proposes 4 actions; M writes k futures of each, the evaluator a
    critique of each.
 3. L2: the policy learns to write the action with the best verdict (the first of the best). Where
    all verdicts tie there is no lesson. The anchor and the start policy's acting while only M
    learns are nlac.py's, too.

--m only shapes the base model, which is nlac.py's; --distil is without effect. It cannot be
resumed.

    python docs/nlql.py
    python docs/nlql.py --seed 1 --match runs/nlac-s1 --out-dir runs/nlql-s1
"""

from dataclasses import dataclass

import _loop

import common
import nlac


@dataclass
class Args(_loop.Args):
    candidates: int = common.flag(4, "actions per state (paper)")


def best(verdicts):
    """The index of the highest verdict (None: unreadable, below all), or None when all tie."""
    ranks = [-1 if v is None else v for v in verdicts]
    return ranks.index(max(ranks)) if min(ranks) < max(ranks) else None


class NLQL(_loop.Learner):
    """What `learn` does is the docstring's."""

    @classmethod
    def check(cls, args):
        common.check(args.candidates >= 2,
                     f"--candidates must be at least 2, not {args.candidates}")

    def learn(self, step, episodes, rng, clock):
        fresh = self.buffer[-sum(len(e.valid) for e in episodes):]
        self.foretold = nlac.foretell(self.parts, self.foretold, fresh, ("foretell", step), rng)
        calibration = nlac.watch_foretold(self.foretold)
        self.learns = self.learns or nlac.opens(self.args, self.foretold, calibration["auc"])
        forecasts, dropped = self.successor_lessons(step, rng)
        clock.lap("backup")
        lessons, metrics = self.best_lessons([t.state for t in self.states(rng)], ("refine", step))
        clock.lap("refinement")
        metrics |= self.update(step, forecasts, lessons, self.anchor_lessons(episodes, rng))
        clock.lap("update")
        return metrics | calibration | {"targets_dropped": dropped}

    def best_lessons(self, states, stream):
        """Steps 2 and 3 -> (pairs for L2, metrics)."""
        if not states:
            return [], {}
        parts, n = self.parts, self.args.candidates
        asked = [nlac.policy_messages(self.world, state) for state in states]
        replies = parts.ask("policy", asked, stream, n)
        rows = [state for state in states for _ in range(n)]
        tries = [nlac.Try(reply, nlac.action_of(self.world, reply)) for reply in replies]
        nlac.critique(parts, rows, tries, stream)
        verdicts = [nlac.rank(t.critique) for t in tries]
        chosen, taught = [], []
        for i in range(len(states)):
            chosen.append(best(verdicts[i * n:(i + 1) * n]))
            tied = chosen[-1] is None
            taught.append("" if tied else nlac.in_form(self.world, replies[i * n + chosen[-1]]))
        return nlac.lessons(parts, "policy", asked, taught), {
            "ties": chosen.count(None) / len(states),
            "changed": common.mean(bool(c) for c in chosen),
            "verdicts": {name: verdicts.count(i) for i, name in enumerate(nlac.VERDICTS)},
            "sentiment": common.mean(v / 4 for v in verdicts if v is not None)}


if __name__ == "__main__":
    _loop.main("nlql", Args, NLQL)
