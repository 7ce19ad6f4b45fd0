"""Self-Distillation, the paper's ablation without M: the refiner reads what the policy really got.

 1. Act as nlac.py does.
 2. For sampled states the policy proposes an action. From there it plays on, k times (paper: 4), in
    the world as it is.
 3. Those episodes, told as futures, go to the evaluator; its critique goes to the refiner; up to m
    rounds, as in nlac.py.
 4. L2: the policy learns the refined action. There is no L1.

To read these numbers:
 1. What is played in step 2 counts as environment steps, from the proposed action on. That the
    world can be put back into a state is free: in the method's favour.
 2. What is hidden stays as it was in that episode, as it would be for anyone who restores a state.
    So a lucky guess looks right k times of k; docs/ceiling.py is the one that draws it anew.
It cannot be resumed.

    python docs/self_distillation.py
    python docs/self_distillation.py --match runs/nlac-s0 --out-dir runs/self-distillation-s0
"""

from dataclasses import dataclass

import _loop

import common
import envs
import nlac

TINY = dict(critic_gate=0.0)  # there is no critic to wait for


@dataclass
class Args(_loop.Args):
    k: int = common.flag(4, "rollouts per critique (paper)")


class Parts(_loop.PlayedParts):
    """Step 2."""

    def play(self, rows, stream):
        args, worlds, episodes = self.args, [], []
        for t, action in rows:
            worlds.append(envs.make(args.env, show_actions=args.show_actions))
            episodes.append(nlac.begin(worlds[-1], "train", t.seed))
            for reply in [*t.state[1::2], nlac.written(action)]:
                nlac.take_turn(worlds[-1], episodes[-1], reply)
        streams = [(*stream, row) for row in range(len(rows))]
        for i in range(0, len(rows), args.rollout_batch_size):
            some = slice(i, i + args.rollout_batch_size)
            nlac.play_on(self.model, self.chat, args, worlds[some], episodes[some], streams[some],
                         args.temperature)
        for (t, _), world, episode in zip(rows, worlds, episodes):
            world.close()
            self.extra["env_steps"] += len(episode.actions) - len(t.state) // 2
            self.extra["tokens"] += episode.tokens
        return episodes


class SelfDistillation(_loop.PlayingLearner):
    Parts = Parts


if __name__ == "__main__":
    _loop.main("self-distillation", Args, SelfDistillation, TINY)
