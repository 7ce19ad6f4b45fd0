"""`rg:NAME`: a procedural set of reasoning-gym; one question, one answer, scored by the set itself.

    --env rg:family_relationships
    --env rg:chain_sum:max_terms=3,max_digits=2       with settings of the set

Needs `pip install reasoning-gym` (Apache-2.0; 0.1.25 was tried). A question's hash says whether it
is of train or of test, a fifth of them is; (split, seed) fixes which one is asked. A set that has
few answers lists them as what can be said, so there a random player guesses. The expert says the
set's own answer; sets without one have no expert. All of an answer counts, or if that is not right,
its first line without markdown. The score is upstream's, as it is: some sets pay .01 for any text,
many a part for an answer with the right one in it, `game_of_life_halting` takes whatever is not
"True" for "False", and `word_ladder` draws from a set, so that its questions differ from process to
process. Scorers may evaluate what a model wrote, so they run in a process of their own (_judge.py).
"""

import ast
import base64
import difflib
import functools
import hashlib
import importlib.util
import json
import pickle
import random

import envs

HINT = "needs reasoning-gym: pip install reasoning-gym"
FEW = 20  # answers that are listed
DRAWS = 100  # questions that are looked at to tell whether a set has few answers
TRIED = 1000  # questions that are drawn to find one of the right split
SHOWN = ("family_relationships",)  # in the list of worlds


@functools.lru_cache(maxsize=16)
def dataset(name, settings):
    """A set with settings, as JSON. Most sets generate any index, whatever their size."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(settings))


def entry(name, settings, index):
    """A question of a set, as the set has it."""
    import numpy
    import reasoning_gym

    # some draw from the random numbers that all share, or seed them: they are theirs for a moment
    states = random.getstate(), numpy.random.get_state()
    random.seed(index)
    try:
        return dataset(name, settings)[index]
    except IndexError:  # some generate all of their size at once
        return reasoning_gym.create_dataset(name, seed=index, size=1, **json.loads(settings))[0]
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def verdict_function():
    """What the judge's process does: score an answer to a question."""
    import reasoning_gym  # noqa: F401  not within the time of the first question

    def verdict(name, settings, written, answer):
        asked = pickle.loads(base64.b64decode(written))
        score = dataset(name, settings).score_answer(answer, asked)
        return min(1.0, max(0.0, float(score)))

    return verdict


JUDGE = envs.load(envs.FOLDER / "_judge.py", "worlds._judge").Judge("rg")


@functools.lru_cache(maxsize=16)
def answers(name, settings):
    """(the answers that a set has, or None if they are many; whether it knows them)."""
    found, known = set(), True
    for index in range(DRAWS):
        drawn = entry(name, settings, index)
        if index < 5:
            known = known and dataset(name, settings).score_answer(drawn["answer"], drawn) == 1
        found.add(str(drawn["answer"]))
        if len(found) > FEW:
            break
    few = known and len(found) <= FEW and not any("\n" in answer for answer in found)
    return sorted(found) if few else None, known


class Puzzle(envs.World):
    """A question of the set `name`, one try."""

    max_turns = 1
    system = "Answer the question. You have one try."

    def __init__(self, name, settings):
        self.name = f"rg:{name}"
        self.source = name, json.dumps(settings, sort_keys=True)
        self.possible, _ = answers(*self.source)

    def begin(self, rng, split):
        for _ in range(TRIED):
            self.entry = entry(*self.source, rng.randrange(2**31))
            mixed = hashlib.sha256(self.entry["question"].encode()).digest()[0]
            if (mixed % 5 == 0) == (split == "test"):
                break
        else:
            raise ValueError(f"{self.name} has too few questions: none of {split} in {TRIED}")
        self.task, self.earned = self.entry["question"], 0.0
        JUDGE.hold(self)
        return self.task

    def closing(self):
        """Nothing behind a question: it may end in a grid of numbers."""
        return super().closing() if self.turns else ""

    def read(self, reply):
        """All that follows the last "Action:", or all of the reply: an answer may have lines."""
        return envs.settled(lambda text: envs.after_marker(text).strip(), reply)

    def admissible(self):
        return self.possible and list(self.possible)

    def act(self, text):
        self.over = True
        if not text:
            return "You did not say anything.", False
        # pickled: JSON would make lists of tuples, and texts of numbers that are keys
        written = base64.b64encode(pickle.dumps(self.entry)).decode()
        # as it was said, or else its first line without markdown: an answer may be either
        for said in dict.fromkeys([text, super().read(text)]):
            if self.earned < 1 and said:
                self.earned = max(self.earned, JUDGE.ask(*self.source, written, said) or 0.0)
        self.won = self.earned == 1
        return ("That is right." if self.won else "That is not right."), True

    def score(self):
        return self.earned

    def close(self):
        JUDGE.release(self)


class Solved(Puzzle):
    """A set that knows its answers."""

    def expert(self):
        return self.entry["answer"]


def make(argument="", **settings):
    """A world of the set NAME, or NAME:KEY=VALUE,... with settings. ValueError for any other."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(HINT)
    from reasoning_gym.factory import DATASETS

    name, _, written = argument.partition(":")
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 5, 0) if name else sorted(DATASETS)[:5]
        raise ValueError(f"reasoning-gym has {len(DATASETS)} sets and none is named {name!r};"
                         f" some are: {', '.join(near)}")  # fmt: skip
    for part in filter(None, written.split(",")):
        key, _, value = part.partition("=")
        try:
            settings[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key.strip()] = value
    _, known = answers(name, json.dumps(settings, sort_keys=True))
    return (Solved if known else Puzzle)(name, settings)
