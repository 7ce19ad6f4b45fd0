"""Text worlds with Gymnasium's signature: text in, text out, no torch.

    python envs.py                          list the worlds with random and expert scores
    python envs.py play 20q [--split test] [--seed 3]
    python envs.py check path/to/file.py:Class     does a world keep the contract below?

`make` builds a world from its name, which is one of

- `WORLDS`, the classes of this file, or `ALIASES`, short names of others;
- `path/to/file.py:Class`, a class of your own, or one with Gymnasium's signature (`Adapted`);
- `NAME` or `NAME:ARGUMENT`, the file worlds/NAME.py beside this one, whose function
  `make(argument="", **settings)` builds the world. worlds/twenty_questions.py is an example.

A world is a class below `World` with `begin` and `act`. The contract, for every world:

- `reset(seed=, options={"split": ...})` -> (observation, info); (split, seed) fixes the episode,
  splits are disjoint;
- `step(reply)` -> (observation, reward, terminated, truncated, info). Any string is legal. The
  action in it is what `read(reply)` finds; a bad one costs a turn, sets `info["valid"]` to False
  and is answered with what was wrong;
- `info` on every call: task, action (what was read, "" after reset), admissible, valid, won, score,
  tools. What is hidden is never in it;
- `expert()` is the best action now, computed only when asked for.

What scripts use besides, of a world that has it:

- `thought(action)`, what may be thought before it, and `players`, weaker ones: reagent.py;
- `flaws()`, a list of `Flaw`, `heeding(advice)`, the actions that follow it, and `gold`, the right
  answer, for metrics alone: reagent.py;
- `snapshot()`, `restore(snapshot)` and `possibilities()`, see `RandomPlay`: --dose of act.py and
  self_guide.py, which also counts a `wrong_object`;
- `facts()`, true sentences: the tiny model of nlac.py; `resample(rng)`, which draws anew what is
  still hidden: docs/ceiling.py.

Thoughts (`<think>`) are for the caller to remove; a world meets what was said aloud.
"""

import argparse
import ast
import collections
import contextlib
import copy
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import operator
import os
import random
import re
import sys
import time
import traceback
from pathlib import Path

# ------------------------------------------------------------------------------------------- ground

# longer actions are refused, so that a turn's time is bounded; the prose around one may be longer
MAX_CHARACTERS = 4000
LISTING = "\nPossible actions:\n"  # before the list that `show_actions` puts into observations


class World:
    """The part that all worlds share: turns, splits, seeds, what is returned.

    A world writes `begin` and `act`. Running out of turns is a rule of the game and stands in every
    observation, so it ends an episode as `terminated`; `truncated` is left to the caller (a full
    context, say).
    """

    name = ""  # as in WORLDS
    system = ""  # the system prompt, used verbatim
    task = ""  # what this episode is about, in one sentence
    max_turns = 20
    splits = ("train", "test")
    tools = None
    show_actions = False  # whether observations end in the list of what can be done (see `make`)
    players = ()  # weaker ones than the expert, for whoever wants trajectories of many kinds
    observation = None  # the latest one
    action = ""  # what was read in the latest reply

    def configure(self, **given):
        """Replaces attributes of the class; None leaves one as it is, a list becomes a tuple."""
        for name, value in given.items():
            if value is not None:
                setattr(self, name, tuple(value) if isinstance(value, list) else value)

    def begin(self, rng, split):
        """Sets up an episode from a private `random.Random`; returns the opening words."""
        raise NotImplementedError

    def read(self, reply):
        """The action in a reply: the first line after the last "Action:", without markdown.

        Every text is legal, and reading what was read changes nothing.
        """
        return settled(first_line, reply)

    def canonical(self, action):
        """The one spelling of all actions, as `read` gives them, that mean the same here.

        By default without case and a final period, but for tool calls: JSON with its keys in order.
        """
        body = re.sub(r"</?tool_call>", " ", action).strip()
        if self.tools and body.startswith("{"):
            try:
                call = json.dumps(json.loads(body), sort_keys=True)
                return f"<tool_call>\n{call}\n</tool_call>"
            except (ValueError, RecursionError):
                pass  # only looks like a tool call
        return " ".join(action.lower().split()).rstrip(".")

    def act(self, text):
        """One turn with an action as `read` gives it; returns (reply, valid).

        Sets `self.won` (or `self.over`) when it ends the game.
        """
        raise NotImplementedError

    def admissible(self):
        """Every action the world understands now, or None when they cannot be listed."""
        return None

    def expert(self):
        """The best action now. Looks at what the player could know, never at what is hidden."""
        raise NotImplementedError

    def thought(self, action):
        """What may be thought before `action`; nothing, in most worlds.

        It follows from what a player could know. Where it does not, it stands before the right
        action alone, so that no other player gives it away.
        """
        return ""

    def score(self):
        """How well it went, in [0, 1]."""
        return float(self.won)

    def closing(self):
        """What ends every observation: the turns left, or how it ended.

        Must not reveal the hidden answer.
        """
        left = self.max_turns - self.turns
        if self.won:
            return f"You win after {count(self.turns, 'turn')}."
        if self.over or left == 0:
            return "The game is over and you did not win."
        return f"{count(left, 'turn')} left."

    def reset(self, *, seed=None, options=None):
        unknown = {*(options or {})} - {"split"}
        if unknown:
            raise ValueError(f"unknown options {sorted(unknown)}; there is split")
        split = (options or {}).get("split", "train")
        if split not in self.splits:
            raise ValueError(
                f"world {self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        if seed is None:
            seed = random.SystemRandom().getrandbits(32)
        self.turns, self.won, self.over, self.action = 0, False, False, ""
        # a string is hashed with SHA-512: the same episode in every process, on every machine
        opening = self.begin(random.Random(f"{self.name} {split} {int(seed)}"), split)
        self.observation = self.observe(opening)
        return self.observation, self.info(valid=True)

    def step(self, text):
        if self.observation is None:
            raise RuntimeError("call reset before step")
        if self.over:  # nothing moves any more
            return self.observation, 0.0, True, False, self.info(valid=False)
        before = self.score()
        self.turns += 1
        self.action = self.read(text)
        if len(self.action) > MAX_CHARACTERS:
            reply, valid = f"That was too long; use at most {MAX_CHARACTERS} characters.", False
        else:
            answer = self.act(self.action)
            if not isinstance(answer, tuple) or len(answer) != 2:
                raise TypeError(f"act returns {type(answer).__name__}, not (text, valid)")
            reply, valid = answer
        self.over = self.over or self.won or self.turns >= self.max_turns
        self.observation = self.observe(reply)
        return self.observation, self.score() - before, self.over, False, self.info(valid)

    def observe(self, words):
        """An observation: the words, how the game stands, and what can be done if that is shown."""
        if not isinstance(words, str):
            kind = type(words).__name__
            raise TypeError(f"begin or act gives {kind} for an observation, not text")
        between = "" if words.endswith("\n") else " "
        text = (words + between + self.closing()).rstrip()
        if self.show_actions and not self.over and (actions := self.admissible()):
            text += LISTING + "\n".join(map(one_line, actions))
        # half a character fits no tokenizer and no file
        return text.encode(errors="replace").decode()

    def info(self, valid):
        return {
            "task": self.task,
            "action": self.action,
            "admissible": self.admissible(),
            "valid": valid,
            "won": self.won,
            "score": self.score(),
            "tools": self.tools,
        }

    def close(self):
        pass


def count(n, noun):
    """count(1, "turn") -> "1 turn"; in digits, so that a word-level tokenizer meets few forms."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def one_line(action):
    """An action as a list shows it. Said back, it means the same."""
    return " ".join(action.splitlines())


def bare(observation):
    """An observation without the list of possible actions at its end."""
    return observation.rpartition(LISTING)[0] if LISTING in observation else observation


def replay(env, seed, actions, split="train"):
    """Restores a state: a fresh episode, then `actions`.

    Returns what the last call would have as a step.
    """
    observation, info = env.reset(seed=seed, options={"split": split})
    last = observation, 0.0, False, False, info
    for action in actions:
        last = env.step(action)
    return last


# ---------------------------------------------------------------------------- the action in a reply

# "Action:" with markdown around it, anywhere; where there is none, a line "Action" counts
MARKER = re.compile(r"(?<![^\W_])action[ \t*_`]*[:\uff1a][*_`]*", re.IGNORECASE)
HEADING = re.compile(r"^[ \t>#*_`-]*action[ \t\r*_`]*$", re.IGNORECASE | re.MULTILINE)

TAGS = re.compile(r"</?action\s{0,9}>", re.IGNORECASE)  # as act.py's policy writes an action
FENCE = re.compile(r"(?:`{3,}|~{3,}) *\w*|-{3,}")  # a line that opens or closes code, or is a rule
# an asterisk between two blanks or two letters may mean something ("2 * 3"); others are emphasis
ASTERISKS = re.compile(r"(?<=\s)\*+(?=\s)|(?<=\w)\*+(?=\w)|(\*+)")
BULLETS = re.compile(r"(?:>\s*|#{1,6}\s+|[-+\u2022]\s+|\d{1,3}[.)]\s+)+(?=\S)")
QUOTES = '""', "''", "\u201c\u201d", "\u2018\u2019"
QUOTED = re.compile("|".join(f"{a}([^{a}{b}]*){b}[.]?" for a, b in QUOTES))


def after_marker(reply):
    """What stands after the last "Action:" of a reply; all of it where there is none."""
    for marker in MARKER, HEADING:
        ends = [found.end() for found in marker.finditer(reply)]
        if ends:
            return reply[ends[-1] :]
    return reply


def without_markdown(line):
    """A line as it was meant: no emphasis, no bullets before it, no quotes around it."""
    line = line.strip()
    if len(line) > MAX_CHARACTERS:  # will be refused: no work for it
        return line
    if FENCE.fullmatch(line):
        return ""
    line = TAGS.sub("", line)
    line = ASTERISKS.sub(lambda found: "" if found[1] else found[0], line.replace("`", "")).strip()
    if found := BULLETS.match(line):
        line = line[found.end() :]
    if found := QUOTED.fullmatch(line):
        line = found[found.lastindex].strip()
    if line.count('"') == 1:  # the other one stood before the marker
        line = line.strip('"').strip()
    return line


def first_line(reply):
    """The first line after the last "Action:" in which something is left without its markdown."""
    for line in after_marker(reply).splitlines():
        if action := without_markdown(line):
            return action
    return ""


def settled(read, text):
    """Reads, and reads what was read, until that changes nothing. `read` must only leave out."""
    while (found := read(text)) != text:
        text = found
    return text


# ------------------------------------------------------------------------------------------ players
# A player is a function (env, info, rng) -> action, with its own random.Random.


def random_player(env, info, rng):
    """Any admissible action, uniformly; says nothing in a world that lists none."""
    return rng.choice(info["admissible"] or env.admissible() or [""])


def expert_player(env, info, rng):
    """What the world's expert does."""
    return env.expert()


def run_episode(env, player, seed, split="train"):
    """One episode: score, won, turns, invalid (turns), and what was said."""
    rng = random.Random(f"player {env.name} {split} {seed}")
    observation, info = env.reset(seed=seed, options={"split": split})
    observations, actions, invalid, done = [observation], [], 0, False
    while not done:
        actions.append(player(env, info, rng))
        observation, _, terminated, truncated, info = env.step(actions[-1])
        observations.append(observation)
        invalid += not info["valid"]
        done = terminated or truncated
    return {
        "score": info["score"],
        "won": info["won"],
        "turns": len(actions),
        "invalid": invalid,
        "actions": actions,
        "observations": observations,
    }


def mean_score(env, player, episodes, split="test", key="score"):
    """(mean, standard error) of the score over seeds from 0 on; with key="won" of success."""
    played = [run_episode(env, player, seed, split) for seed in range(episodes)]
    return mean_and_error([float(episode[key]) for episode in played])


def mean_and_error(scores):
    """(mean, standard error) of some numbers."""
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / max(1, len(scores) - 1)
    return mean, math.sqrt(variance / len(scores))


def ends(name, episodes) -> dict:
    """What bounds a result table on test: player -> (success, se).

    A world without an expert has no upper end.
    """
    found = {}
    for end, player in ("random", random_player), ("expert", expert_player):
        env = make(name)
        with contextlib.suppress(NotImplementedError):
            found[end] = mean_score(env, player, episodes, key="won")
        env.close()
    return found


# ------------------------------------------------------------------------ what random play achieves


def by_verb(actions):
    """Lists of the actions that share their first word.

    Who draws one of these first also practises rare kinds of action.
    """
    verbs = {}
    for action in actions:
        verbs.setdefault(action.partition(" ")[0], []).append(action)
    return list(verbs.values())


class RandomPlay:
    """The chance that a random player, who draws the verb first, wins an episode: exact.

    By recursion over turns, in worlds with `snapshot`, `restore` and `possibilities` (see
    Household). A `state` is a snapshot. What was never seen is averaged over, so that nothing
    hidden decides a chance.
    """

    def __init__(self, world):
        self.world = copy.deepcopy(world)  # the caller's stays where it is
        self.moves, self.known = {}, {}

    def chance(self, state, turns) -> float:
        """To win from a state within so many turns."""
        if not turns:
            return 0.0
        if (state, turns) not in self.known:
            total = 0.0
            for probability, won, after in self.moves_from(state):
                total += probability * (1.0 if won else self.chance(after, turns - 1))
            self.known[state, turns] = total
        return self.known[state, turns]

    def moves_from(self, state) -> list[tuple]:
        """(probability, won, next state) of each action."""
        if state not in self.moves:
            self.world.restore(state)
            verbs = by_verb(self.world.admissible())
            self.moves[state] = []
            for actions in verbs:
                for action in actions:
                    probability = 1 / len(verbs) / len(actions)
                    self.moves[state].append((probability, *self.result(state, action)))
        return self.moves[state]

    def result(self, state, action) -> tuple:
        """(won, next state)"""
        self.world.restore(state)
        self.world.act(action)
        return self.world.won, self.world.snapshot()

    def expected(self, world, turns) -> float:
        """`chance` of a game as its player knows it."""
        chances = [self.chance(state, turns) for state in world.possibilities()]
        return sum(chances) / len(chances)

    def expected_after(self, world, action, turns) -> float:
        """The same once an action is done, which itself takes none of the turns."""
        chances = []
        for state in world.possibilities():
            won, after = self.result(state, action)
            chances.append(1.0 if won else self.chance(after, turns))
        return sum(chances) / len(chances)


def moved(before, after) -> int:
    """Whether a chance grew (1) or fell (-1): its logarithm, softened near 0, by more than 0.15."""
    change = math.log((after + 0.003) / (before + 0.003))
    return (change > 0.15) - (change < -0.15)


# -------------------------------------------------------------------------------------- repair shop


class RepairShop(World):
    """Diagnose, then repair: the test that fits the symptom shows the fault, which has one repair.

    The smallest world in which acting early costs the episode: the first repair is the last.
    Whoever guesses from the symptom alone is right one time in three, whoever tests first is always
    right, a random player wins one episode in six. No rule of it stands in the prompt: a large
    model has common sense, a tiny one must find out. Customers and devices meet in `test` in
    combinations that `train` never shows.
    """

    name = "repair"
    max_turns = 5
    customers = "Ada Ben Cleo Dina Emil Fay Gus Hana Ivan Jane Kai Lena".split()
    colours = "red blue green black white yellow".split()
    devices = "radio kettle clock toaster drill mixer fan heater".split()
    # symptom: the test that tells, then what it may find, and the repair of that
    faults = {
        "does not start": ("check the power", {
            "The battery is empty.": "charge the battery",
            "The cable is broken.": "solder the cable",
            "The fuse is burnt.": "swap the fuse"}),
        "is too loud": ("open the case", {
            "The gears are dusty.": "clean the gears", "A screw is loose.": "tighten the screw",
            "The belt is worn.": "renew the belt"}),
    }
    tests = tuple(test for test, _ in faults.values())
    repairs = tuple(repair for _, findings in faults.values() for repair in findings.values())
    task = "Repair the device."
    system = (
        "You run a repair shop. Every device that comes in has one fault.\n"
        "Find the fault with a test, then repair it. The first repair is the last one: if it is "
        "wrong, the customer is lost.\n"
        f"The tests: {', '.join(tests)}.\nThe repairs: {', '.join(repairs)}."
    )

    def __init__(self, max_turns=None):
        self.configure(max_turns=max_turns)
        if self.max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, not {max_turns}")

    def admissible(self):
        return [*self.tests, *self.repairs]

    def begin(self, rng, split):
        while True:  # a fifth of the combinations is kept for the test split
            customer = rng.choice(self.customers)
            colour = rng.choice(self.colours)
            device = rng.choice(self.devices)
            held_out = hashlib.sha256(f"{customer} {colour} {device}".encode()).digest()[0] % 5 == 0
            if held_out == (split == "test"):
                break
        self.symptom = rng.choice(list(self.faults))
        self.found = False
        self.resample(rng)
        return f"{customer} brings a {colour} {device} that {self.symptom}."

    def resample(self, rng):
        """Draws the fault again, of those that fit the dialogue: for simulators, not to know it."""
        if not self.found:
            self.finding = rng.choice(list(self.faults[self.symptom][1]))

    def act(self, text):
        action = text.strip().rstrip(".").lower()
        test, findings = self.faults[self.symptom]
        if action == test:
            self.found = True
            return self.finding, True
        if action in self.tests:
            return "Nothing unusual.", True
        if action in self.repairs:
            self.over = True
            self.won = action == findings[self.finding]
            return ("It works again." if self.won else "It is still broken."), True
        return "That is neither a test nor a repair of this shop.", False

    def expert(self):
        test, findings = self.faults[self.symptom]
        return findings[self.finding] if self.found else test


# ---------------------------------------------------------------------------------------- household

# what belongs where, by kind; things start only where they belong
ROOMS = {
    "kitchen": {
        "countertop": "food dish tool", "diningtable": "food dish tool", "cabinet": "dish tool",
        "drawer": "tool", "shelf": "dish", "sinkbasin": "dish tool", "garbagecan": "food",
        "fridge": "food dish", "microwave": "food dish"},
    "bathroom": {
        "countertop": "wash bottle", "cabinet": "wash bottle", "drawer": "wash",
        "shelf": "wash bottle", "sinkbasin": "wash", "bathtub": "wash bottle", "toilet": "bottle",
        "garbagecan": "bottle"},
    "bedroom": {
        "bed": "paper large", "desk": "paper small large lamp", "dresser": "small large lamp",
        "drawer": "paper small", "sidetable": "paper small lamp", "shelf": "paper large",
        "safe": "small", "garbagecan": "paper"},
    "living room": {
        "sofa": "paper large", "armchair": "paper small", "coffeetable": "paper small large",
        "sidetable": "paper small lamp", "tvstand": "small large lamp", "cabinet": "large",
        "drawer": "paper small", "safe": "small", "garbagecan": "paper"},
}
KINDS = {
    "food": "apple potato tomato egg",
    "dish": "mug cup plate bowl",
    "tool": "fork spoon spatula ladle",
    "wash": "brush sponge towel soapbar",
    "bottle": "soapbottle spraybottle candle toiletroll",
    "paper": "book newspaper pencil pen",
    "small": "watch creditcard keychain cellphone",
    "large": "laptop pillow box statue",
    "lamp": "desklamp"}
KIND = {thing: kind for kind, things in KINDS.items() for thing in things.split()}
MANY = "countertop cabinet drawer shelf sidetable".split()  # a room may have several of these
CLOSED = "cabinet drawer fridge microwave safe".split()  # must be opened first
HOLLOW = [*CLOSED, "sinkbasin", "garbagecan", "bathtub"]  # things are in these, and on all others
LAMP = "desklamp 1"
TASKS = ("place", "clean", "heat", "cool", "light", "two")
# verb: where, what it makes of a thing, for which kinds
TREATMENTS = {"clean": ("sinkbasin", "clean", "food dish tool wash"),
              "heat": ("microwave", "hot", "food dish"),
              "cool": ("fridge", "cool", "food dish")}


def word(name):
    """word("mug 1") -> "mug"."""
    return name.split()[0]


def numbered(words):
    """numbered(["mug", "cup", "mug"]) -> ["cup 1", "mug 1", "mug 2"]."""
    return [f"{name} {i + 1}" for name in sorted(set(words)) for i in range(words.count(name))]


def with_article(name):
    """with_article("apple 1") -> "an apple 1"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def listed(names):
    """listed(["apple 1", "cup 1", "mug 1"]) -> "an apple 1, a cup 1 and a mug 1"."""
    *first, last = map(with_article, names) if names else ["nothing"]
    return f"{', '.join(first)} and {last}" if first else last


@functools.lru_cache(maxsize=None)
def belongs(thing, place, room):
    """Whether a thing of this name may be found at a place of this name."""
    return KIND[word(thing)] in ROOMS[room][word(place)].split()


def share(text, parts):
    """A number below `parts` that depends on nothing but the text."""
    return hashlib.sha256(text.encode()).digest()[0] % parts


def household_layouts(room, receptacles, copies):
    """Up to 96 layouts, tuples of receptacles, fixed by the room's name and the sizes."""
    rng = random.Random(f"layouts of the {room}")
    supply, layouts = [], {}
    for place in ROOMS[room]:
        supply += [place] * (copies if place in MANY else 1)
    for _ in range(400):
        number = min(rng.randint(*receptacles), len(supply))
        layouts[tuple(numbered(rng.sample(supply, number)))] = None
    return list(layouts)[:96]


@functools.lru_cache
def household_episodes(rooms, receptacles, copies, tasks):
    """{(split, task): [(room, layout, object, target), ...]}: what episodes are about, each once.

    Every fourth layout of a room is kept for ood. So is a quarter of the pairings of an object with
    a target: ood has the layouts *and* pairings that were kept, train and test have the others, and
    what mixes the two is not played. Train and test share layouts and pairings, but no combination.
    """
    episodes = {(split, task): [] for split in Household.splits for task in tasks}
    for room in rooms:
        targets = [*ROOMS[room], "desklamp"]
        pairings = [pair for pair in itertools.product(KIND, targets) if pair[1] == "desklamp"
                    or belongs(*pair, room)]
        kept = {pair for pair in pairings if share(" ".join(pair), 4) == 0}
        for i, layout in enumerate(household_layouts(room, receptacles, copies)):
            present = {word(place) for place in layout}
            lit = any(belongs("desklamp", place, room) for place in present)
            for thing, target in pairings:
                if ((thing, target) in kept) != (i % 4 == 0) or thing == "desklamp":
                    continue
                if target not in present and not (target == "desklamp" and lit):
                    continue
                if not any(belongs(thing, place, room) for place in present - {target}):
                    continue  # it must start elsewhere
                for task in dict.fromkeys(tasks):
                    appliance, _, kinds = TREATMENTS.get(task, (None, None, KIND[thing]))
                    light = target == "desklamp"
                    if (task == "light") != light or KIND[thing] not in kinds.split():
                        continue
                    if appliance is None or appliance in present - {target}:
                        held_out = share(f"{task} {thing} {target} {room} {layout}", 5) == 0
                        split = "ood" if i % 4 == 0 else "test" if held_out else "train"
                        episodes[split, task].append((room, layout, thing, target))
    return episodes


class Household(World):
    """A chore in a room, with ALFWorld's verbs: find a thing, treat it, bring it where it belongs.

    Where things are is hidden until a place has been seen inside. `test` plays chores that `train`
    lacks in the same rooms; `ood` has sets of receptacles and pairings of object and target that
    neither has (see `household_episodes`), all in words that train covers. This is the small world;
    `HouseholdFull` is the full one, by other values of the attributes below.
    """

    name = "household"
    splits = ("train", "test", "ood")
    max_turns = 12
    rooms = ("kitchen", "bedroom")
    receptacles = (2, 3)  # fewest, most
    copies = 1  # most of a name, where a room may have several
    objects = (1, 2)  # fewest, most; a lamp comes on top where there is a place for it
    # drawn evenly; one listed twice comes twice as often
    tasks = ("place", "place", "light", "clean", "heat", "cool")
    # verbs in `admissible`; all are understood
    offered = ("go", "open", "take", "put", "clean", "heat", "cool", "use")
    task = "Do a household chore."
    system = (
        "You are in a room of a house and have one task. Each turn takes one action. The actions, "
        "with O an object such as mug 1 and R a receptacle such as cabinet 2:\n"
        "go to R, open R, close R, take O from R, put O in/on R, clean O with R, heat O with R, "
        "cool O with R, use desklamp 1, examine R, examine O, look, inventory.\n"
        "You reach only what is where you are, you carry one object at a time, and what is closed "
        "must be opened. To clean, heat or cool an object, hold it at a sinkbasin, a microwave or "
        "a fridge; to examine it with the desklamp, hold it where the lamp is and use the lamp."
    )

    def __init__(self, rooms=None, receptacles=None, objects=None, tasks=None, offered=None,
                 max_turns=None):
        self.configure(rooms=rooms, receptacles=receptacles, objects=objects, tasks=tasks,
                       offered=offered, max_turns=max_turns)
        verbs = HouseholdFull.offered
        for what, chosen, known in (("room", self.rooms, ROOMS), ("task", self.tasks, TASKS),
                                    ("verb", self.offered, verbs)):
            if not chosen:
                raise ValueError(f"household needs a {what}")
            if unknown := [name for name in chosen if name not in known]:
                raise ValueError(f"no such {what} in the household: {unknown[0]!r}")
        for name, low, high in ("receptacles", *self.receptacles), ("objects", *self.objects):
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be (fewest, most), at least 1, not {(low, high)}")
        if self.max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, not {self.max_turns}")
        for (split, task), choices in self.episodes().items():
            if not choices:
                raise ValueError(
                    f"these rooms and sizes leave nothing to do for task {task!r} in split {split}")

    def episodes(self):
        return household_episodes(self.rooms, self.receptacles, self.copies, self.tasks)

    # -- the room

    def begin(self, rng, split):
        self.goal = rng.choice(self.tasks)
        self.room, self.places, self.wanted, self.target = rng.choice(
            self.episodes()[split, self.goal])
        words = [self.wanted] * (2 if self.goal == "two" else 1)
        others = [thing for thing in KIND if thing not in (self.wanted, "desklamp")
                  and self.homes(thing)]
        more = max(0, rng.randint(*self.objects) - len(words))
        words += rng.sample(others, min(len(others), more))
        things = numbered(words + ["desklamp"] * bool(self.homes("desklamp")))
        self.at = {thing: rng.choice(self.homes(thing)) for thing in things}  # a place, or "hand"
        self.here = None  # the place where the player is
        self.seen = []  # the places whose inside is known
        self.states = []  # ("mug 1", "hot"), ...
        self.wrong_object = False  # whether a thing was taken that the chore does not ask for
        self.closed = [place for place in self.places if word(place) in CLOSED]
        state = TREATMENTS[self.goal][1] + " " if self.goal in TREATMENTS else ""
        where = f"{'in' if self.target in HOLLOW else 'on'} {self.target}"
        plural = self.wanted + ("es" if self.wanted[-1] in "oxsh" else "s")
        self.task = f"put {with_article(state + self.wanted)} {where}."
        if self.goal == "two":
            self.task = f"put two {plural} {where}."
        if self.goal == "light":
            self.task = f"examine the {self.wanted} with the desklamp."
        return f"{self.describe_room()} Your task is to: {self.task}"

    def homes(self, thing):
        """Where a thing of this name may start: what is asked for is not yet where it should go."""
        done = self.target if word(thing) == self.wanted else None
        return [place for place in self.places if belongs(thing, place, self.room)
                and word(place) != done]

    def resample(self, rng):
        """Puts what was never seen elsewhere, uniformly: the dialogue would have been the same.

        For simulators.
        """
        for thing, place in self.at.items():
            if place != "hand" and place not in self.seen:
                self.at[thing] = rng.choice([home for home in self.homes(thing)
                                             if home not in self.seen])

    # -- for simulators: optional methods of a world, nothing of them stands in a prompt

    def snapshot(self):
        """What decides how the game goes on, turns apart: hashable."""
        closed = tuple(sorted(self.closed))
        states = tuple(sorted(self.states))
        return self.here, tuple(self.at.items()), closed, states

    def restore(self, snapshot):
        """Back to a `snapshot` of this episode; turns, and what was seen, stay."""
        self.here, at, closed, states = snapshot
        self.at, self.closed, self.states = dict(at), list(closed), list(states)
        self.won = False

    def possibilities(self):
        """Every `snapshot` that fits what was seen, all as likely: the rest is at any home."""
        unseen = [thing for thing, place in self.at.items() if place != "hand"
                  and place not in self.seen]
        homes = [[home for home in self.homes(thing) if home not in self.seen] for thing in unseen]
        here, at, closed, states = self.snapshot()
        return [(here, tuple((dict(at) | dict(zip(unseen, places))).items()), closed, states)
                for places in itertools.product(*homes)]

    def held(self):
        return next((thing for thing, place in self.at.items() if place == "hand"), None)

    def inside(self, place):
        return [thing for thing, where in self.at.items() if where == place]

    def describe_room(self):
        return f"You are in a {self.room} and see {listed(self.places)}."

    def describe(self, place):
        if place in self.closed:
            return f"The {place} is closed."
        preposition = "In" if word(place) in HOLLOW else "On"
        return f"{preposition} the {place}, you see {listed(self.inside(place))}."

    def possible(self):
        """What can be done now: action -> (verb, object, place)."""
        here, held = self.here, self.held()
        actions = {"look": ("look", None, here), "inventory": ("inventory", held, here)}
        for place in self.places:
            actions[f"go to {place}"] = "go", None, place
        if held:
            actions[f"examine {held}"] = "examine", held, here
        if here is None:
            return actions
        actions[f"examine {here}"] = "look", None, here
        if word(here) in CLOSED:
            verb = "open" if here in self.closed else "close"
            actions[f"{verb} {here}"] = verb, None, here
        if held:
            for verb, (appliance, _, kinds) in TREATMENTS.items():
                if word(here) == appliance and KIND[word(held)] in kinds.split():
                    actions[f"{verb} {held} with {here}"] = verb, held, here
            if here not in self.closed:
                actions[f"put {held} in/on {here}"] = "put", held, here
        elif here not in self.closed:
            for thing, place in self.at.items():
                if place == here and thing != LAMP:
                    actions[f"take {thing} from {here}"] = "take", thing, here
        if self.at.get(LAMP) == here:
            actions[f"use {LAMP}"] = "use", LAMP, here
        return actions

    def admissible(self):
        """What can be done now, in alphabetical order; going nowhere is left out."""
        offered = {action: meaning for action, meaning in self.possible().items()
                   if meaning[0] in self.offered}
        offered.pop(f"go to {self.here}", None)
        return sorted(offered)

    def canonical(self, action):
        """Without articles; put and move, in and on are one."""
        lower = action.lower().strip("> \t\r\n.")
        words = [w for w in lower.split() if w not in ("a", "an", "the")]
        return re.sub(r"^(?:put|move) (.+) (?:in/on|on/in|in|on|to|into|onto) (.+)$",
                      r"put \1 in/on \2", " ".join(words))

    def act(self, text):
        known = self.possible()
        verb, thing, place = known.get(self.canonical(text), (None, None, None))
        if verb is None:
            return "Nothing happens.", False
        if verb == "go":
            self.here = place
        elif verb in ("open", "close"):
            (self.closed.remove if verb == "open" else self.closed.append)(place)
        elif verb in ("take", "put"):
            self.at[thing] = "hand" if verb == "take" else place
            self.wrong_object |= verb == "take" and word(thing) != self.wanted
        elif verb in TREATMENTS:  # what gets hot is no longer cool, and stays clean
            kept = [(name, state) for name, state in self.states if name != thing
                    or (state == "clean") != (verb == "clean")]
            self.states = [*kept, (thing, TREATMENTS[verb][1])]
        if place and place not in self.closed and place not in self.seen:
            self.seen.append(place)
        if self.goal == "light":
            self.won = verb == "use" and word(self.held() or "no thing") == self.wanted
        else:
            wanted = 2 if self.goal == "two" else 1
            self.won = sum(self.finished(thing) for thing in self.at) == wanted
        return self.reply(verb, thing, place), True

    def reply(self, verb, thing, place):
        """What is said to an action that was done, in one sentence."""
        if verb in ("go", "look"):
            return self.describe(place) if place else self.describe_room()
        if verb == "open":
            return f"You open the {place} and see {listed(self.inside(place))}."
        if verb == "inventory":
            return f"You are carrying {listed([thing] if thing else [])}."
        if verb == "examine":
            states = [state for name, state in self.states if name == thing]
            return f"This is {with_article(' '.join([*states, thing]))}."
        return {
            "close": f"You close the {place}.",
            "take": f"You pick up the {thing} from the {place}.",
            "put": f"You put the {thing} in/on the {place}.",
            "use": f"You turn on the {thing}.",
        }.get(verb) or f"You {verb} the {thing} using the {place}."

    # -- what the chore needs

    def ready(self, thing):
        """Whether it is what is asked for, in the state asked for, wherever it is."""
        treated = self.goal not in TREATMENTS or (thing, TREATMENTS[self.goal][1]) in self.states
        return word(thing) == self.wanted and treated

    def finished(self, thing):
        return self.ready(thing) and word(self.at[thing]) == self.target

    def expert(self):
        """Looks for the thing where it belongs, what is open first; then the shortest way."""
        held = self.held()
        known = {thing: place for thing, place in self.at.items() if place in self.seen}
        if held and word(held) != self.wanted:  # out of the hand
            return self.reach([self.here], f"put {held} in/on {{}}")
        if held and self.goal == "light":
            if LAMP not in known:
                return self.search("desklamp")
            return self.reach([known[LAMP]], f"use {LAMP}")
        if held:
            if self.ready(held):
                return self.reach(self.named(self.target), f"put {held} in/on {{}}")
            appliance, *_ = TREATMENTS[self.goal]
            return self.reach(self.named(appliance), f"{self.goal} {held} with {{}}")
        candidates = [thing for thing in known if word(thing) == self.wanted
                      and not self.finished(thing)]
        if not candidates:
            return self.search(self.wanted)
        thing = min(candidates, key=lambda thing: known[thing] != self.here)
        return self.reach([known[thing]], f"take {thing} from {{}}")

    def named(self, name):
        return [place for place in self.places if word(place) == name]

    def reach(self, places, action):
        """The next step to doing `action` ("{}": where) at one of `places`: go, open it, do it.

        To heat and the like, an appliance need not be open.
        """
        place = min(places, key=lambda place: (place != self.here, place in self.closed))
        if place != self.here:
            return f"go to {place}"
        if place in self.closed and word(action) not in TREATMENTS:
            return f"open {place}"
        return action.format(place)

    def search(self, thing):
        """The next step to seeing one more place: where the thing may be, near, open."""
        homes = self.homes(thing)
        unseen = [place for place in self.places if place not in self.seen]
        unseen = unseen or self.places  # all is seen only after the end

        def order(place):
            return place not in homes, place != self.here, place in self.closed

        return self.reach([min(unseen, key=order)], "look")


class HouseholdFull(Household):
    """All rooms, several receptacles of a kind, 30 turns."""

    name = "household-full"
    max_turns = 30
    rooms = tuple(ROOMS)
    receptacles = (6, 10)
    copies = 3
    objects = (4, 8)
    tasks = TASKS
    offered = (*Household.offered, "close", "examine", "look", "inventory")


# -------------------------------------------------------------------------- search: what is written

# Names have two words: a given name and a root for people ("Mira Velden"), a root and a word of its
# kind for all else ("Velden Marsh"). A root is a start and an end: Velden, Velder, Torden.
STARTS = "Vel Tor Bri Kas Lum Nor Pel Sar Dul Gan Hem Zol".split()
ENDS = "den der mar mer lin lan sten tan".split()
GIVEN = ("Ada Oren Mira Sela Ivo Juno Karel Lida Nils Petra Rufus Tessa Anton Bela Cora Doro Enno "
         "Flora Gilda Hugo Irma Jorin").split()
ARTICLES = {  # kind: its words, what its pages are about
    "person": (None, "a writer|a sailor|a potter|a painter"),
    "town": ("Marsh Mill Ford Cross Hill Gate", "a town"),
    "river": ("Brook Water Run Beck", "a river"),
    "book": ("Letters Songs Tales Garden Mirror Winter", "a book"),
    "company": ("Works Bank Press Yard Lines Stores", "a company"),
    "instrument": ("Horn Harp Flute Bell Fiddle Pipe", "an instrument"),
}
# `noun`: as a part of longer questions
Relation = collections.namedtuple("Relation", "subject object sentence question noun")
RELATIONS = {
    "author": Relation("book", "person", '"{x}" was written by "{y}".', "Who wrote {x}?",
                       "the author of {x}"),
    "birthplace": Relation("person", "town", '"{x}" was born in "{y}".',
                           "In which town was {x} born?", "the birthplace of {x}"),
    "river": Relation("town", "river", '"{x}" lies on "{y}".', "On which river does {x} lie?",
                      "the river through {x}"),
    "length": Relation("river", "km", '"{x}" flows for {y} km.', "How many km long is {x}?", None),
    "rival": Relation("person", "person", 'The rival of "{x}" was "{y}".',
                      "Who was the rival of {x}?", "the rival of {x}"),
    "founder": Relation("company", "person", '"{x}" was started by "{y}".', "Who started {x}?",
                        "the founder of {x}"),
    "seat": Relation("company", "town", '"{x}" has its seat in "{y}".',
                     "In which town does {x} have its seat?", "the seat of {x}"),
    "inventor": Relation("instrument", "person", '"{x}" was devised by "{y}".', "Who devised {x}?",
                         "the inventor of {x}"),
}
YEARS = {  # and from which on, a century and a half: a town, who is born there, what they make
    "founded": ("town", 1700),
    "born": ("person", 1750),
    "published": ("book", 1800),
    "opened": ("company", 1800),
    "finished": ("instrument", 1800),
}
RELATIONS |= {
    verb: Relation(kind, "year", f'"{{x}}" was {verb} in the year {{y}}.',
                   f"In which year was {{x}} {verb}?", None)
    for verb, (kind, _) in YEARS.items()
}
PAIRS = {  # questions about two numbers a and b
    ("difference", "year"): "How many years after {a} was {one} was {b} {other}?",
    ("difference", "km"): "How many km longer is {b} than {a}?",
    ("comparison", "year"): "Was {a} {one} before {b}?",
    ("comparison", "km"): "Is {b} longer than {a}?",
}


def pattern(template, **parts):
    """The regular expression that reads what `template.format` writes."""
    return re.compile(re.sub(r"\\{(\w+)\\}",
                             lambda field: f"(?P<{field[1]}>{parts.get(field[1], '.+')})",
                             re.escape(template)))


NAME = r"[A-Z]\w+ [A-Z]\w+"
SENTENCE_PATTERNS = {key: pattern(relation.sentence, x=NAME, y=rf"{NAME}|\d+")
                     for key, relation in RELATIONS.items()}
QUESTION_PATTERNS = {key: pattern(relation.question) for key, relation in RELATIONS.items()}
PAIR_PATTERNS = {key: pattern(template, one=r"\w+", other=r"\w+")
                 for key, template in PAIRS.items()}


def write_question(form, chains):
    """chains: one or two of (name, (relation, ...)).

    ("chain", [("Velden Letters", ("author", "born"))]) -> "In which year was ..."
    """
    phrases = []
    for name, relations in chains:
        phrase = f'"{name}"'
        for key in relations[:-1]:
            phrase = RELATIONS[key].noun.format(x=phrase)
        phrases.append(phrase)
    keys = [relations[-1] for _, relations in chains]
    if form == "chain":
        return RELATIONS[keys[0]].question.format(x=phrases[0])
    template = PAIRS[form, RELATIONS[keys[0]].object]
    return template.format(a=phrases[0], b=phrases[1], one=keys[0], other=keys[1])


@functools.lru_cache(maxsize=4096)
def read_question(question):
    """The plan that a question spells out: (form, chains), the inverse of `write_question`."""

    def chain(phrase, last):
        relations = [last]
        while True:
            for key, relation in RELATIONS.items():
                prefix = relation.noun and relation.noun.partition("{")[0]
                if prefix and phrase.startswith(prefix):
                    phrase, relations = phrase.removeprefix(prefix), [key, *relations]
                    break
            else:
                return phrase.strip('"'), tuple(relations)

    for (form, _), shape in PAIR_PATTERNS.items():
        if match := shape.fullmatch(question):
            found = {"one": "length", **match.groupdict()}
            return form, (chain(found["a"], found["one"]),
                          chain(found["b"], found.get("other", found["one"])))
    for key, shape in QUESTION_PATTERNS.items():
        if match := shape.fullmatch(question):
            return "chain", (chain(match["x"], key),)
    raise ValueError("not a question of this world")


def conclude(form, values):
    """What the values at the ends of the chains answer, and the calculation it takes, or None."""
    if form == "chain":
        return values[0], None
    a, b = map(int, values)
    return ("yes" if a < b else "no", None) if form == "comparison" else (str(b - a), f"{b} - {a}")


@functools.lru_cache(maxsize=None)
def search_names(kind, split, parts):
    """All names of a kind in a split: a sixth each in test and ood, of words that train has."""
    starts, ends, given = parts
    roots = [start + end for start in STARTS[:starts] for end in ENDS[:ends]]
    words = ARTICLES[kind][0]
    rows = (roots, words.split()) if words else (GIVEN[:given], roots)
    every = map(" ".join, itertools.product(*rows))
    return [name for name in every if {0: "test", 1: "ood"}.get(share(name, 6), "train") == split]


# facts: {name: {relation: value}}, what some page says; where: {(name, relation): title};
# pages: {title: (about, text)}; index: {word: titles}
Encyclopedia = collections.namedtuple("Encyclopedia", "facts where pages index")


def draw_names(rng, kinds, split, parts, namesakes):
    """{kind: names}. Without `namesakes` no root and no given name comes twice; Hill may."""
    if namesakes:
        return {kind: rng.sample(search_names(kind, split, parts), n) for kind, n in kinds}
    names, used = {}, set()
    for kind, n in kinds:
        every = search_names(kind, split, parts)
        common = set((ARTICLES[kind][0] or "").split())
        names[kind] = []
        for name in rng.sample(every, len(every)):
            if len(names[kind]) == n:
                break
            own = set(name.split()) - common
            if not own & used:
                names[kind].append(name)
                used |= own
        if len(names[kind]) < n:
            raise ValueError(
                f"there are not enough words for {n} names of the kind {kind!r} in split {split}")
    return names


@functools.lru_cache(maxsize=256)
def encyclopedia(split, number, kinds, relations, parts, namesakes, step):
    """An invented encyclopedia; `step`: years are multiples of it.

    An eighth of the facts stands nowhere and an eighth on a page of its own, "Notes on NAME": there
    the plain page is a dead end.
    """
    rng = random.Random(f"encyclopedia {split} {number}")
    names = draw_names(rng, kinds, split, parts, namesakes)
    book = Encyclopedia({}, {}, {}, {})
    for kind, name in ((its, name) for its in names for name in names[its]):
        about = rng.choice(ARTICLES[kind][1].split("|"))
        texts = {name: [f'"{name}" is {about}.'],
                 f"Notes on {name}": [f'These are notes on "{name}".']}
        book.facts[name] = {}
        for key in relations:
            unit = RELATIONS[key].object
            if RELATIONS[key].subject != kind or unit not in (*names, "km", "year"):
                continue
            if unit in names:
                value = rng.choice([other for other in names[unit] if other != name])
            else:
                value = str(rng.randrange(20, 300, 10) if unit == "km"
                            else YEARS[key][1] + rng.randrange(0, 50, step))
            place = rng.choice([None, f"Notes on {name}", *[name] * 6])
            if place:
                texts[place].append(RELATIONS[key].sentence.format(x=name, y=value))
                book.facts[name][key], book.where[name, key] = value, place
        for title, sentences in texts.items():
            if title == name or len(sentences) > 1:
                book.pages[title] = (about if title == name else "notes", " ".join(sentences))
                for word in sorted(set(plain_words(f"{title} {book.pages[title][0]}")) - {"on"}):
                    book.index.setdefault(word, []).append(title)
    return book


# ------------------------------------------------------------------------ search: calls and rewards

TOOLS = {  # name: its only argument, what it is, what the tool does
    "search": ("query", "the name to look for",
               "Lists the titles of pages that share words with the query."),
    "open": ("title", "a title from the results of a search",
             "Shows a page that a search has listed."),
    "calculate": ("expression", "an expression such as 1875 - 1820",
                  "Calculates with + - * / // % ** and parentheses."),
    "answer": ("answer", "a name, a number, yes or no",
               "Gives the final answer to the question and ends the game."),
}


def tool_call(name, argument):
    """The text of a call, as the chat templates of the Qwen family write it."""
    call = json.dumps({"name": name, "arguments": {TOOLS[name][0]: argument}})
    return f"<tool_call>\n{call}\n</tool_call>"


def json_objects(text):
    """The outermost {...} of a text, in order, by their braces alone: in one pass."""
    starts, spans, quoted = [], [], False
    for token in re.finditer(r'\\.|["{}\n]', text, re.DOTALL):
        mark = token[0]
        if mark == '"':
            quoted = bool(starts) and not quoted  # quotes in prose do not matter
        elif mark == "\n":
            quoted = False  # no string of JSON has one: a quote was left open
        elif mark == "{" and not quoted:
            starts.append(token.start())
        elif mark == "}" and not quoted and starts:
            start = starts.pop()
            while spans and spans[-1][0] > start:
                spans.pop()
            spans.append((start, token.end()))
    return [text[start:end] for start, end in spans]


def is_call(text):
    """Whether the text is a JSON object with a name."""
    try:
        return '"name"' in text and "name" in json.loads(text)
    except (ValueError, RecursionError):
        return False


def last_call(reply):
    """The text of the last tool call of a reply, its JSON between tags as `tool_call` writes it.

    A call may stand between <tool_call> and </tool_call> (or the end of the reply) or be a bare
    JSON object with a name, which stays bare. The reply, stripped, where there is no call.
    """
    tagged = re.split("<tool_call>", reply, flags=re.IGNORECASE)[1:]
    for part in reversed(tagged):
        body = re.split("</tool_call>", part, maxsplit=1, flags=re.IGNORECASE)[0]
        if "{" in body:  # around the braces may stand a code fence or words
            body = body[body.index("{") :].rstrip()
            return f"<tool_call>\n{body[: body.rfind('}') + 1] or body}\n</tool_call>"
    bare_calls = (text for text in reversed(json_objects(reply)) if is_call(text))
    return next(bare_calls, reply.strip())


@functools.lru_cache(maxsize=4096)
def read_call(text):
    """The last call in a text -> (tool, argument, None), or (None, None, what is wrong)."""
    body = last_call(text)
    if "{" not in body:
        return None, None, (
            'That is not a tool call. Write {"name": TOOL, "arguments": {...}} between <tool_call>'
            " and </tool_call>."
        )
    try:
        call = json.JSONDecoder().raw_decode(body, body.index("{"))[0]
        arguments = call.get("arguments")
        if isinstance(arguments, str):  # some models quote them
            arguments = json.loads(arguments)
    except (ValueError, RecursionError):
        return None, None, "The JSON of this tool call is broken."
    name = call.get("name")
    if not isinstance(name, str) or name not in TOOLS:
        return None, None, f"There is no such tool. The tools are {', '.join(TOOLS)}."
    argument = arguments.get(TOOLS[name][0]) if isinstance(arguments, dict) else None
    if isinstance(argument, (int, float)) and not isinstance(argument, bool):
        argument = str(argument)
    if not isinstance(argument, str) or not argument.strip():
        return None, None, f"The tool {name} needs the argument {TOOLS[name][0]}, a text."
    return name, argument.strip(), None


OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.UAdd: operator.pos, ast.USub: operator.neg,
}


def calculate(expression):
    """Arithmetic -> (reply, valid).

    Parsed, never executed; bounded in time and memory whatever the text.
    """
    if len(expression) > 200 or expression.count("(") > 20:
        return "That expression is too long.", False
    if not re.fullmatch(r"[-+*/%().\deE ]+", expression, re.ASCII):
        return "A calculation has only numbers, + - * / // % ** and parentheses.", False

    def value(node):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Pow) and abs(right) > 64:
                raise OverflowError
            result = OPERATORS[type(node.op)](left, right)
        elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            result = OPERATORS[type(node.op)](value(node.operand))
        else:
            result = getattr(node, "value", None)
        if type(result) not in (int, float):  # a call, a complex root
            raise SyntaxError
        if not abs(result) <= 1e15:
            raise OverflowError
        return result

    try:
        result = value(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        return "One cannot divide by zero.", False
    except OverflowError:
        return "The numbers are too large.", False
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "That expression cannot be calculated.", False
    return f"The result is {int(result) if result == int(result) else f'{result:.10g}'}.", True


def plain_words(text):
    """Lower case, without punctuation and articles: what answers and titles are compared by."""
    return [word for word in re.findall(r"\w+", text.casefold()) if word not in ("a", "an", "the")]


def numbers_in(text):
    """The numbers in a text, as floats; "1,820" is one."""
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return list(map(float, re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", plain)))


def rule_reward(answer, gold):
    """The rule reward of the Reagent paper.

    A number by value, yes or no by match, else 1 for the same words, else their F1 from 0.3 up.
    """
    said, right = plain_words(answer), plain_words(gold)
    if re.fullmatch(r"-?\d[\d,]*(?:\.\d+)?", gold.strip()):
        return float(set(numbers_in(answer)) == set(numbers_in(gold)))
    if right in (["yes"], ["no"]):
        return float({"yes", "no"}.intersection(said) == set(right))
    if said == right:
        return 1.0
    shared = collections.Counter(said) & collections.Counter(right)
    f1 = 2 * sum(shared.values()) / (len(said) + len(right))
    return f1 if f1 >= 0.3 else 0.0


# ---------------------------------------------------------------- search: what a dialogue has shown

# of a dialogue: what was called, listed, opened, read, calculated and answered; vain: searches for
# an open page that list nothing new
Record = collections.namedtuple("Record", "calls listed opened facts results answer vain")


def read_record(steps):
    """The Record of `steps`: (action, observation, valid) of each turn."""
    record = Record([], [], [], {}, {}, [], [])
    for action, observation, valid in steps:
        tool, argument, _ = read_call(action) if valid else (None, None, None)
        if tool:
            record.calls.append((tool, argument.casefold()))
        if tool == "search":
            titles = re.findall(rf'"((?:Notes on )?{NAME})" \(', observation)
            known = argument.casefold() in map(str.casefold, record.opened)
            if known and set(titles) <= set(record.listed):
                record.vain.append(argument)
            record.listed.extend(titles)
        elif tool == "open":
            notes, name = re.match(rf'(These are notes on )?"({NAME})"', observation).groups()
            record.opened.append(f"Notes on {name}" if notes else name)
            for key, shape in SENTENCE_PATTERNS.items():
                record.facts.update({(match["x"], key): match["y"]
                                     for match in shape.finditer(observation)})
        elif tool == "calculate":
            record.results[argument] = re.search(r"result is (\S+)\.", observation)[1]
        elif tool == "answer":
            record.answer.append(argument)
    return record


def follow(chains, facts):
    """Along the facts that were read -> (values, missing).

    The values at the ends and None, or those so far and the (name, relation) not known yet.
    """
    values = []
    for name, relations in chains:
        for key in relations:
            if (name, key) not in facts:
                return values, (name, key)
            name = facts[name, key]
        values.append(name)
    return values, None


def search_expert(question, steps):
    """The next call of the shortest plan, from nothing but the question and the dialogue."""
    form, chains = read_question(question)
    record = read_record(steps)
    values, missing = follow(chains, record.facts)
    if missing:
        for title in (missing[0], f"Notes on {missing[0]}"):
            if title in record.listed and title not in record.opened:
                return tool_call("open", title)
        return tool_call("search", missing[0])
    answer, expression = conclude(form, values)
    if expression and expression not in record.results:
        return tool_call("calculate", expression)
    return tool_call("answer", answer)


def search_thought(question, steps):
    """What the expert thinks before that call, in the words of the pages.

    The fact found last, and what is missing, as a blank.
    """
    facts = read_record(steps).facts
    found = []
    for name, relations in read_question(question)[1]:
        for key in relations:
            sentence = RELATIONS[key].sentence
            if (name, key) not in facts:
                return " ".join([*found[-1:], sentence.format(x=name, y="?")])
            found.append(sentence.format(x=name, y=facts[name, key]))
            name = facts[name, key]
    return found[-1]


# of a process: a sentence about it, and one to the player
Flaw = collections.namedtuple("Flaw", "name cost found advice")
FLAWS = {  # name: what it costs, and the two sentences, with a gap for the evidence
    "skipped lookup": (0.4, 'The page "{}" was not read.', 'Read the page "{}" before you answer.'),
    "unsupported guess": (0.4, 'The answer "{}" does not come from what was read.',
                          "Answer with what you have read."),
    "wrong conclusion": (0.4, "{} Something else was asked.", "{} Something else was asked."),
    "repeated call": (0.2, "This call was made twice: {}.", "Do not repeat: {}."),
    "wrong tool": (0.2, "This call was of no use: {}.", "Do without: {}."),
    "no answer": (0.5, "There is no answer.", "Give an answer before the turns run out."),
}


def call_words(action):
    """A call as a sentence names it: open "Mira Velden"."""
    tool, argument, _ = read_call(action)
    return f'{tool} "{argument}"' if tool else one_line(action)[:60]


def search_evidence(question, steps) -> dict:
    """What went wrong on the way, {name of FLAWS: what shows it}, by the public record alone.

    skipped lookup: answered before all facts were read that the question asks for (the page that
    comes next); repeated call: the same one twice (the call); unsupported guess: the answer was
    neither shown nor calculated, nor follows from what was read (the answer); wrong conclusion: all
    was read, and something else follows (the sentence read); wrong tool: a call that was not valid,
    or a search for an open page that lists nothing new (the call); no answer: none that the world
    accepted.
    """
    form, chains = read_question(question)
    record = read_record(steps)
    found = {}
    made = [call_words(action) for action, _, valid in steps if valid]
    if repeated := [call for call in made
                    if [other.casefold() for other in made].count(call.casefold()) > 1]:
        found["repeated call"] = repeated[0]
    useless = [call_words(action) for action, _, valid in steps if not valid]
    useless += [f'search "{name}"' for name in record.vain]
    if useless:
        found["wrong tool"] = useless[0]
    if not record.answer:
        return found | {"no answer": ""}
    answer, (values, missing) = record.answer[0], follow(chains, record.facts)
    shown = [*record.facts.values(), *record.results.values(), *record.listed]
    if missing:
        notes = missing[0] in record.opened
        found["skipped lookup"] = f"Notes on {missing[0]}" if notes else missing[0]
    else:
        shown.append(conclude(form, values)[0])
    if not any(rule_reward(answer, value) == 1 for value in shown):
        found["unsupported guess"] = answer
    elif not missing and rule_reward(answer, conclude(form, values)[0]) < 1:
        # never a sentence about the right answer
        read = [(name, key) for (name, key), value in record.facts.items()
                if rule_reward(answer, value) == 1 and name != conclude(form, values)[0]]
        said = [RELATIONS[key].sentence.format(x=name, y=record.facts[name, key])
                for name, key in read]
        found["wrong conclusion"] = said[0] if said else f'You answered "{answer}".'
    return found


class Search(World):
    """A question about an invented encyclopedia, answered with the calls of TOOLS; right: 1.

    A page tells little, so that a question takes one to three pages, each of which must be searched
    for by a name from the last. Many names look alike, and some pages lack what one opens them for:
    the fact then stands in the notes that the same search lists. Each split has encyclopedias of
    its own; no name of one is in another, though all are made of the words that train has, and
    `ood` asks for more hops. This is the small world; `SearchFull` is the full one, by other values
    of the attributes below.
    """

    name = "search"
    splits = ("train", "test", "ood")
    max_turns = 8
    kinds = {"person": 8, "town": 8, "river": 5, "book": 8}
    relations = ("author", "birthplace", "river", "born", "founded", "published")
    parts = (8, 5, 12)  # starts and ends of roots, given names
    namesakes = False  # whether names may share a root, so that one word does not tell them apart
    year_step = 5  # years are multiples of it
    forms = ("chain",)  # of questions with two hops or more
    hops = {"train": (1, 2), "test": (1, 2), "ood": (3,)}
    encyclopedias = {"train": 20000, "test": 200, "ood": 200}
    results = 3  # titles in an answer to a search
    tools = [
        {"type": "function", "function": {"name": name, "description": what, "parameters": {
            "type": "object", "properties": {argument: {"type": "string", "description": meaning}},
            "required": [argument]}}}
        for name, (argument, meaning, what) in TOOLS.items()
    ]
    system = (
        "Answer the question from the pages of an encyclopedia."
        " Each turn takes one tool call, such as\n"
        '<tool_call>\n{"name": "search", "arguments": {"query": "Mira Velden"}}\n</tool_call>\n'
        "The tools:\n" + "\n".join(f"{name}, with {argument} ({meaning}): {what}"
                                   for name, (argument, meaning, what) in TOOLS.items())
    )

    def __init__(self, kinds=None, relations=None, forms=None, hops=None, results=None,
                 max_turns=None):
        self.configure(kinds=kinds, relations=relations, forms=forms, hops=hops, results=results,
                       max_turns=max_turns)
        forms = ("chain", "difference", "comparison")
        for what, chosen, known in (("kind", self.kinds, ARTICLES),
                                    ("relation", self.relations, RELATIONS),
                                    ("form", self.forms, forms)):
            if unknown := [name for name in chosen if name not in known]:
                raise ValueError(f"search has no {what} {unknown[0]!r}")
        needed = 2 * max(hop for hops in self.hops.values() for hop in hops) + 2
        if self.max_turns < needed or self.results < 2:
            raise ValueError(
                f"search needs max_turns of at least {needed} and at least 2 results, not "
                f"{self.max_turns} and {self.results}")
        for split in self.splits:
            self.begin(random.Random(0), split)  # sizes that leave nothing to ask are refused here

    def begin(self, rng, split):
        number = rng.randrange(self.encyclopedias[split])
        self.book = encyclopedia(split, number, tuple(self.kinds.items()), self.relations,
                                 self.parts, self.namesakes, self.year_step)
        self.reward = 0.0
        self.record = []  # (action, reply, valid) of each turn
        self.listed, self.seen, self.calculated = [], [], []  # titles; values on pages; results
        hops = rng.choice(self.hops[split])
        form = rng.choice(self.forms) if hops > 1 else "chain"
        for _ in range(5000):
            if drawn := self.draw(rng, form, hops):
                self.task, self.gold = drawn
                return self.task
        raise ValueError(f"these sizes leave nothing to ask in split {split}")

    def draw(self, rng, form, hops):
        """(question, answer), or None where a random walk over the facts makes no good one."""
        first = hops if form == "chain" else rng.randrange(1, hops)
        chains, values, visited = [], [], []
        turns = 2 * hops + 1 + (form == "difference")
        for length in [first] if form == "chain" else [first, hops - first]:
            start = value = rng.choice(list(self.book.facts))
            relations = []
            for _ in range(length):
                if not self.book.facts.get(value):
                    return None
                visited.append(value)
                relations.append(rng.choice(list(self.book.facts[value])))
                turns += self.book.where[value, relations[-1]] != value  # the notes, after the page
                value = self.book.facts[value][relations[-1]]
            chains.append((start, tuple(relations)))
            values.append(value)
        if len(set(visited + values)) < len(visited + values) or turns > self.max_turns:
            return None
        if form != "chain":
            one, other = chains[0][1][-1], chains[1][1][-1]
            unit = RELATIONS[one].object
            mixed = form == "comparison" and one != other
            if (form, unit) not in PAIRS or unit != RELATIONS[other].object or mixed:
                return None
            if form == "difference" and int(values[0]) > int(values[1]):
                chains, values = chains[::-1], values[::-1]
        return write_question(form, chains), conclude(form, values)[0]

    def score(self):
        return self.reward

    def admissible(self):
        """The calls that make sense after what was seen, in alphabetical order."""
        form, chains = read_question(self.task)
        names = [name for name, _ in chains] + [value for value in self.seen if not value.isdigit()]
        numbers = sorted({int(value) for value in self.seen if value.isdigit()})
        answers = ["yes", "no"] if form == "comparison" else self.seen + self.calculated
        calls = [("search", name) for name in names]
        calls += [("open", title) for title in self.listed]
        calls += [("answer", value) for value in answers]
        calls += [("calculate", f"{b} - {a}") for a, b in itertools.combinations(numbers, 2)]
        return sorted({tool_call(*call) for call in calls})

    def read(self, reply):
        """The last tool call of a reply, whole; the reply where there is none."""
        return last_call(reply)

    def canonical(self, action):
        """A call by its tool and argument."""
        tool, argument, problem = read_call(action)
        return super().canonical(action) if problem else tool_call(tool, argument)

    def act(self, text):
        tool, argument, problem = read_call(text)
        reply, valid = (problem, False) if problem else getattr(self, f"call_{tool}")(argument)
        self.record.append((text, reply, valid))
        return reply, valid

    def call_search(self, query):
        shared = collections.Counter(title for word in set(plain_words(query))
                                     for title in self.book.index.get(word, ()))
        best_first = sorted(shared, key=lambda title: (-shared[title], len(title), title))
        titles = best_first[:self.results]
        self.listed += [title for title in titles if title not in self.listed]
        listing = "; ".join(f'"{title}" ({self.book.pages[title][0]})' for title in titles)
        return (f"Results: {listing}." if titles else "No page matches that."), True

    def call_open(self, title):
        title = next((known for known in self.listed if plain_words(known) == plain_words(title)),
                     None)
        if title is None:
            return "No search has listed a page with that title.", False
        text = self.book.pages[title][1]
        self.seen += [match["y"] for shape in SENTENCE_PATTERNS.values()
                      for match in shape.finditer(text) if match["y"] not in self.seen]
        return text, True

    def call_calculate(self, expression):
        reply, valid = calculate(expression)
        if valid:
            self.calculated.append(re.search(r"result is (\S+)\.", reply)[1])
        return reply, valid

    def call_answer(self, answer):
        self.over = True
        self.reward = rule_reward(answer, self.gold)
        self.won = self.reward == 1
        return "That is your answer.", True

    def expert(self):
        return search_expert(self.task, self.record)

    def thought(self, action):
        """What the expert thinks before its next call, whatever the call is then."""
        return search_thought(self.task, self.record)

    def flaws(self):
        """[Flaw] of the way so far, from what the player could know.

        None says what the right answer is.
        """
        evidence = search_evidence(self.task, self.record)
        return [Flaw(name, cost, *(text.replace("{}", evidence[name]) for text in told))
                for name, (cost, *told) in FLAWS.items() if name in evidence]

    def heeding(self, advice):
        """The calls of `admissible` that follow the advice of `flaws`.

        First what it says to read, never what it says not to repeat.
        """
        made = [call_words(action) for action, *_ in self.record]
        again = [call for call in re.findall(r'Do not repeat: (\w+ "[^"]+")', advice)
                 if call in made]
        never = re.findall(r'Do without: (\w+ "[^"]+")', advice)
        calls = [call for call in self.admissible() if call_words(call) not in again + never]
        pages = [title for title in re.findall(r'Read the page "([^"]+)"', advice)
                 if title not in read_record(self.record).opened]
        ways = [f'open "{title}"' for title in pages]
        ways += [f'search "{title.removeprefix("Notes on ")}"' for title in pages]
        for way in ways:
            if way in map(call_words, calls) and way not in made:
                return [call for call in calls if call_words(call) == way]
        reading = [call for call in calls if pages and read_call(call)[0] != "answer"]
        return reading or calls or self.admissible()


class SearchFull(Search):
    """Six kinds of pages, questions of one to four hops, yes or no among them, 12 turns."""

    name = "search-full"
    max_turns = 12
    kinds = {"person": 110, "town": 60, "river": 30, "book": 60, "company": 40, "instrument": 30}
    relations = tuple(RELATIONS)
    parts = (len(STARTS), len(ENDS), len(GIVEN))
    namesakes, year_step = True, 1
    forms = ("chain", "difference", "comparison")
    hops = {"train": (1, 2, 3), "test": (1, 2, 3), "ood": (4,)}
    encyclopedias = {"train": 16, "test": 4, "ood": 4}
    results = 4


def guess_player(env, info, rng):
    """Search only: answers at once, with a value of the right kind that it cannot know: a floor."""
    form, chains = read_question(env.task)
    picks = [rng.choice([facts[relations[-1]] for facts in env.book.facts.values()
                         if relations[-1] in facts]) for _, relations in chains]
    if form == "comparison":
        return tool_call("answer", rng.choice(["yes", "no"]))
    return tool_call("answer", picks[0] if form == "chain"
                     else str(abs(int(picks[0]) - int(picks[1]))))


def hasty_player(env, info, rng):
    """Search only: the expert, but it answers the value seen last every other time."""
    return tool_call("answer", env.seen[-1]) if env.seen and rng.random() < 0.5 else env.expert()


def sloppy_player(env, info, rng):
    """Search only: the expert, but one call in three repeats, errs, answers early or guesses."""
    opened = read_record(env.record).opened
    flaw = rng.randrange(12)
    if flaw == 0 and env.record:
        return env.record[-1][0]
    if flaw == 1:
        if opened:
            return tool_call("search", rng.choice(opened))
        return tool_call("open", read_question(env.task)[1][0][0])
    if flaw == 2 and env.seen:
        return tool_call("answer", rng.choice(env.seen))
    return guess_player(env, info, rng) if flaw == 3 else env.expert()


def muddled_player(env, info, rng):
    """Search only: the expert, but the answer is anything that was read."""
    action = env.expert()
    if read_call(action)[0] == "answer" and env.seen:
        return tool_call("answer", rng.choice(env.seen))
    return action


Search.players = sloppy_player, hasty_player, muddled_player, guess_player


# ----------------------------------------------------------------------------------- worlds by name

WORLDS = {"repair": RepairShop, "household": Household, "household-full": HouseholdFull,
          "search": Search, "search-full": SearchFull}
ALIASES = {"20q": "twenty_questions", "20q-full": "twenty_questions:full"}
FOLDER = Path(__file__).resolve().parent / "worlds"
FILES = {"math": "mathematics"}  # worlds/math.py would hide a module from what runs in that folder


def make(name, *, show_actions=False, **settings):
    """A world by name, in one of the forms above; `settings` go to its constructor.

    With `show_actions` its observations end in the list of what can be done. ValueError, in one
    line, for a name that stands for nothing or a world that cannot be built.
    """
    stem, _, argument = ALIASES.get(name, name).partition(":")
    if name in WORLDS:
        build = WORLDS[name]
    elif ".py:" in name:
        build = class_in_file(name)
    elif stem in further_worlds():
        module = module_of(stem)
        if not callable(getattr(module, "make", None)):
            raise ValueError(f"worlds/{stem}.py has no function make")
        build = functools.partial(module.make, argument)
    else:
        known = ", ".join([*WORLDS, *ALIASES, *further_worlds(), "path/to/file.py:Class"])
        lacks = "of a file name the class as well; " if name.endswith(".py") else ""
        raise ValueError(f"unknown world {name!r}; {lacks}there are: {known}")
    try:
        world = build(**settings)
    except (Exception, SystemExit) as error:
        raise ValueError(f"world {name!r}: {in_words(error)}") from error
    if not isinstance(world, World):
        world = adapt(world, name)
    if ".py:" in name and build not in TRIED:
        TRIED.add(build)
        try:
            try_out(make(name, **settings))
        except ValueError as error:
            TRIED.discard(build)
            raise ValueError(f"world {name!r}: {error}") from error
    world.show_actions = show_actions
    return world


TRIED = set()  # classes of one's own that have been played once


def try_out(world):
    """Plays an episode of each split at random and by the expert: bugs show now, not after hours.

    ValueError with the place in the world's file, or with what breaks the contract.
    """
    for split, player in itertools.product(("train", "test"), (random_player, expert_player)):
        try:
            played = run_episode(world, player, 0, split)
        except (Exception, SystemExit) as error:
            if player is expert_player and type(error) is NotImplementedError:
                continue  # it has none
            file = sys.modules[type(getattr(world, "inner", world)).__module__].__file__
            own = [frame for frame in traceback.extract_tb(error.__traceback__)
                   if frame.filename == file]
            place = f"{own[-1].name}, line {own[-1].lineno}: " if own else ""
            raise ValueError(f"{place}{in_words(error, kind=True)}") from error
        said = [world.system, world.task, *played["observations"], *played["actions"]]
        if not all(isinstance(text, str) for text in said):
            raise ValueError("system, task, observations and actions must be strings")
        if not 0 <= played["score"] <= 1:
            raise ValueError(f"a score must be between 0 and 1, not {played['score']}")
    world.close()


def further_worlds():
    """The names of the worlds in worlds/, which are those of their files but for FILES."""
    named = {file: name for name, file in FILES.items()}
    files = [path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_")]
    return sorted(named.get(file, file) for file in files)


def module_of(name):
    """The module of one of `further_worlds`."""
    file = FILES.get(name, name)
    return load(FOLDER / f"{file}.py", f"worlds.{file}")


def class_in_file(name):
    """The class that path/to/file.py:Class names. ValueError, in one line, if there is none."""
    stem, _, class_name = name.rpartition(".py:")
    path = Path(f"{stem}.py").resolve()
    if not path.is_file():
        raise ValueError(f"world {name!r}: there is no file {path}")
    # a private name, so that the file cannot get in the way of another module
    module = load(path, f"_world_{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}")
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        own = [key for key, value in vars(module).items()
               if isinstance(value, type) and value.__module__ == module.__name__]
        raise ValueError(f"world {name!r}: no such class; the file has {', '.join(own) or 'none'}")
    if not getattr(found, "name", "known"):
        found.name = class_name  # seeds are drawn by it
    return found


def load(path, name):
    """The module in a file, executed once per process. ValueError, in one line, if that fails."""
    sys.modules.setdefault("envs", sys.modules[__name__])  # this file may run as a script
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise ValueError(f"{path} cannot be imported: {in_words(error, kind=True)}") from error
    return sys.modules[name]


def in_words(error, kind=False):
    """An error in one line, with its type unless it is a ValueError that says enough."""
    text = " ".join(str(error).split())
    enough = type(error) is ValueError and text and not kind
    return text if enough else f"{type(error).__name__}: {text}"


# ---------------------------------------------------------------------- worlds as others write them


class Adapted(World):
    """An environment with Gymnasium's signature, text in and text out, as a world.

    It needs `reset(seed=, options=)` and `step(action)`; nothing of Gymnasium is imported here.
    What it may say about itself is used: `system`, `task`, `tools`, `max_turns` (or its spec's
    limit), `expert()`; in `info` `won` or `is_success` or `success`, `task`, `valid`, and one of
    LISTS. An action is its text, or a number where the action space is `Discrete`. The score is the
    sum of rewards in [0, 1]; without a word on it, an episode is won with a score of 1. One that it
    truncates is over. Without a limit of its own it has that of World. Seeds of train are even, of
    test odd: whether episodes differ as well is up to the environment.
    """

    LISTS = ("admissible", "admissible_commands", "admissible_actions", "available_actions",
             "valid_actions")

    def __init__(self, inner, name):
        self.inner, self.name, self.told = inner, name, {}
        limit = getattr(getattr(inner, "spec", None), "max_episode_steps", None)
        self.max_turns = getattr(inner, "max_turns", None) or limit or World.max_turns
        told = "Act on what you are shown, one action a turn."
        self.system = getattr(inner, "system", "") or told
        self.tools = getattr(inner, "tools", None)

    def begin(self, rng, split):
        seed = 2 * rng.randrange(2**30) + (split == "test")
        observation, self.told = self.inner.reset(seed=seed, options={"split": split})
        self.earned = 0.0
        self.task = self.told.get("task") or getattr(self.inner, "task", "") or ""
        return self.text(observation)

    def text(self, observation):
        if not isinstance(observation, str):
            raise TypeError(f"{self.name} shows {type(observation).__name__}, not text")
        return observation

    def numbers(self):
        """What can be said where actions are numbered, else None."""
        space = getattr(self.inner, "action_space", None)
        if not hasattr(space, "n"):
            return None
        first = int(getattr(space, "start", 0))
        return [str(first + number) for number in range(int(space.n))]

    def admissible(self):
        for key in self.LISTS:
            if isinstance(self.told.get(key), (list, tuple)):
                return list(self.told[key])
        return self.numbers()

    def act(self, text):
        numbers = self.numbers()
        text = self.canonical(text) if numbers else text
        if not text:
            return "You did not say anything.", False
        if numbers and text not in numbers:
            return f"An action is a number from {numbers[0]} to {numbers[-1]}.", False
        observation, reward, ended, cut, self.told = self.inner.step(int(text) if numbers else text)
        self.earned += float(reward)
        self.over = bool(ended or cut)
        self.won = self.over and self.earned >= 1
        for key in "won", "is_success", "success":
            if key in self.told:
                self.won = bool(self.told[key])
                break
        return self.text(observation), bool(self.told.get("valid", True))

    def score(self):
        return 1.0 if self.won else min(1.0, max(0.0, self.earned))

    def close(self):
        if hasattr(self.inner, "close"):
            self.inner.close()


class AdaptedWithExpert(Adapted):
    """One that can say what is best."""

    def expert(self):
        return str(self.inner.expert())


def adapt(inner, name):
    """An object of another kind as a world. ValueError where it cannot be one."""
    if not (callable(getattr(inner, "reset", None)) and callable(getattr(inner, "step", None))):
        raise ValueError(f"world {name!r} is neither a World of envs.py nor has it reset and step")
    kind = AdaptedWithExpert if hasattr(inner, "expert") else Adapted
    return kind(inner, name.rpartition(":")[2])


# ------------------------------------------------------------------------------------- command line


def check(name, episodes=30):
    """What is wrong with a world, and what to do: a list of sentences, empty where nothing is."""
    if ".py:" in name:
        TRIED.add(class_in_file(name))  # to be told all that is wrong, not the first of it
    make(name).close()  # ValueError for what is no world
    return load(FOLDER / "_check.py", "worlds._check").check(name, episodes)


def listed_names():
    """The worlds of a table: those of this file, and of each other file what its `SHOWN` names."""
    names = [*WORLDS, *ALIASES]
    for stem in further_worlds():
        shown = [""]
        with contextlib.suppress(ValueError):  # the table says what is wrong with it
            shown = getattr(module_of(stem), "SHOWN", shown)
        found = [f"{stem}:{argument}" if argument else stem for argument in shown]
        names += [name for name in found if name not in ALIASES.values()]
    return names


def list_worlds(episodes=200, seconds=1.0):
    """A line per world: the two ends of every result table, over test episodes.

    As many of them as a player plays in `seconds`, at most `episodes`.
    """
    print(f"score over up to {episodes} test episodes: mean (standard error)")
    row = "{:<28}{:>6}{:>18}{:>18}{:>10}{:>10}"
    print(row.format("world", "turns", "random", "expert", "episodes", "steps/s"))
    for name in listed_names():
        try:
            env = make(name)
        except ValueError as error:
            print(f"{name:<28}  {error}")
            continue
        run_episode(env, random_player, 0, "test")  # what is slow once is not a speed
        cells, counts, speeds = [], [], []
        for player in random_player, expert_player:
            scores, turns, start = [], 0, time.perf_counter()
            try:
                while len(scores) < episodes and time.perf_counter() - start < seconds:
                    played = run_episode(env, player, len(scores), "test")
                    scores.append(played["score"])
                    turns += played["turns"]
            except NotImplementedError:
                cells.append("none")
                continue
            cells.append("%.3f (%.3f)" % mean_and_error(scores))
            counts.append(len(scores))
            speeds.append(turns / (time.perf_counter() - start))
        env.close()
        speed = f"{min(speeds):.0f}"
        print(row.format(name, env.max_turns, *cells, min(counts), speed), flush=True)
    print("a class of your own: path/to/file.py:Class; play one: python envs.py play 20q")


def play(env, split, seed, lines):
    """A person plays, whose actions are `lines` (standard input); their end leaves the game."""
    observation, info = env.reset(seed=seed, options={"split": split})
    print(
        f"{env.system}\n(A line with ? alone lists what can be said; end of input ends the game.)"
        f"\n\n{observation}")
    print("> ", end="", flush=True)
    for line in lines:
        if line.strip() == "?" and info["admissible"]:
            print("\n".join(map(one_line, info["admissible"])))
        else:
            observation, _, terminated, truncated, info = env.step(line)
            print(observation)
            if terminated or truncated:
                return
        print("> ", end="", flush=True)
    print("\nGoodbye.")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, exit status 2."""

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())}\n")


def main(argv=None):
    """The command line above."""
    parser = OneLineParser(description="Text worlds: list them, or play one.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command")
    player = commands.add_parser("play", help="play a world at the terminal", allow_abbrev=False)
    names = [*WORLDS, *ALIASES, *further_worlds(), "path/to/file.py:Class"]
    player.add_argument("world", help=", ".join(names))
    player.add_argument("--split", default="train")
    player.add_argument("--seed", type=int, default=None, help="the episode (default: any)")
    told = "does a world keep the contract?"
    checker = commands.add_parser("check", help=told, allow_abbrev=False)
    checker.add_argument("world", help="path/to/file.py:Class, or a name as above")
    args = parser.parse_args(argv)
    if args.command is None:
        return list_worlds()
    try:
        if args.command == "check":
            found = check(args.world)
            print("".join(f"- {sentence}\n" for sentence in found), end="")
            end = f": {count(len(found), 'fault')}." if found else " keeps the contract."
            print(args.world + end)
            return 1 if found else 0
        env = make(args.world)
        # refuses an unknown split before anything is printed
        env.reset(options={"split": args.split})
    except ValueError as error:
        parser.error(str(error))
    sys.stdin.reconfigure(errors="replace")  # any bytes are a legal action
    try:
        play(env, args.split, args.seed, sys.stdin)
    except KeyboardInterrupt:
        print("\nGoodbye.")


if __name__ == "__main__":
    sys.exit(main())
