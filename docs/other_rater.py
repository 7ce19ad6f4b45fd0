"""Self-Guide with another rater: the two ends between which the one that learns stands.

 exact     the ceiling: each step's rating is right by construction. Its label is what the step did
to
           a random player's chance to win (self_guide.Prospects), its reason what would undo it.
 shuffled  the floor: the same ratings, each given to an episode of the next task.

What is rated is not sampled, so nothing trains it; it steers, and earns as --trust has it.
Evaluation, while the run goes and at its end, is with this rater, too: `before` and `after`
compare policies. (--frozen-rater of self_guide.py is the step between: the start policy rates.)

    python docs/other_rater.py --rating exact --dose 1 --examples 20000 --out-dir runs/exact
    python docs/other_rater.py --rating shuffled --dose 1 --examples 20000 --out-dir runs/shuffled

All flags of self_guide.py but --frozen-rater, in worlds that know their `possibilities`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import self_guide

SIDE_BY_SIDE, TAKE_TURN = self_guide.side_by_side, self_guide.take_turn


@dataclass
class Args(self_guide.Args):
    __doc__ = self_guide.Args.__doc__
    rating: str = common.flag("exact", "what ratings are", choices=["exact", "shuffled"])


class Rater:
    """Stands in for the dialogues in which a model rates: what it says is forced, mask 0."""

    def __init__(self, args):
        self.args = args
        self.rows, self.ratings = {}, {}  # an episode's row, a row's last rating
        self.prospects = {}  # of a task: its chances are the same in all episodes of it

    def take_turn(self, world, episode, reply):
        """A step of the world, and the rating of it."""
        row = self.rows.setdefault(id(episode), len(self.rows))  # first met in their order
        if episode.seed not in self.prospects:
            self.prospects[episode.seed] = self_guide.Prospects(world)
        prospects = self.prospects[episode.seed]
        prospects.before(world)
        TAKE_TURN(world, episode, reply)
        label = prospects.label(world, episode.valid[-1])
        self.ratings[row] = self_guide.rating_text(world, prospects, label)

    def reply(self, rows, *, prefill, **how):
        """A rating for each of `rows`, as common.Dialogues.reply returns one."""
        shift = self.args.group_size if self.args.rating == "shuffled" else 0
        texts = [self.ratings[(row + shift) % len(self.rows)] for row in rows]
        ids = [self.actors.chat.encode(text) for text in texts]
        for row, said in zip(rows, ids):
            self.actors._append(row, [*said, *self.actors.chat.eos[:1]], 0)
        return common.Replies(ids, [[0.0] * len(said) for said in ids], texts, [True] * len(ids))


def side_by_side(model, chat, args, split, seeds, first, *, guided, rater=None, **how):
    """self_guide.side_by_side, in which a Rater rates."""
    rater = Rater(args) if guided else None
    self_guide.take_turn = rater.take_turn if guided else TAKE_TURN
    return SIDE_BY_SIDE(model, chat, args, split, seeds, first, guided=guided, rater=rater, **how)


def read_by(actors, rater):
    """common.Dialogues.read_by, of a Rater."""
    rater.actors = actors
    return rater


def main():
    """self_guide.py with the rater of --rating."""
    self_guide.Args, self_guide.side_by_side, common.Dialogues.read_by = Args, side_by_side, read_by
    self_guide.main()


if __name__ == "__main__":
    main()
