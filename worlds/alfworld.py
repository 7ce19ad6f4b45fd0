"""ALFWorld (Shridhar et al., 2021): chores in the rooms of ALFRED, as text.

    --env alfworld              any chore
    --env alfworld:TASK_TYPE    one of the six: pick_and_place_simple, look_at_obj_in_light,
                                pick_clean_then_place_in_recep, pick_heat_then_place_in_recep,
                                pick_cool_then_place_in_recep, pick_two_obj_and_place

The games are files below the folder that ALFWORLD_DATA names, as `alfworld-download` lays them
(json_2.1.1/train, valid_seen, valid_unseen); the engine is upstream's, the package alfworld (MIT)
with textworld and the planner fast-downward, which pip builds from source.

- Splits: train, test (valid_seen: rooms that train has), ood (valid_unseen: other rooms).
- As upstream does, games with movable receptacles or slicing are left out, and unsolvable ones.
- Admissible actions are the game's. "put X in Y" and "put X in/on Y", the words of older versions,
  are understood as "move X to Y".
- `expert()` is upstream's handcoded one, which sees what the game knows about the player's hands.
  It does not always succeed; here it is told "put" where it said "move", without which it thinks
  its hands full after the first of two things. `success_by_type` counts by the kind of chore.
"""

import copy
import functools
import importlib.util
import json
import os
import random
import re
from pathlib import Path

from envs import World, run_episode

PACKAGES = "alfworld==0.4.2 (builds fast-downward; first: apt-get install cmake g++ make)"
FOLDERS = {"train": "train", "test": "valid_seen", "ood": "valid_unseen"}
TYPES = (
    "pick_and_place_simple", "look_at_obj_in_light", "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep", "pick_cool_then_place_in_recep", "pick_two_obj_and_place",
)  # fmt: skip
LEFT_OUT = re.compile("movable|Sliced")
BANNER = "-= Welcome to TextWorld, ALFRED! =-"


@functools.cache
def mend_textworld():
    """Makes textworld parse every rule once, and tell things in an order that is always the same.

    Else it parses the rules of the grammar anew whenever it says something, and lists what it finds
    in the order of sets of strings, which differs from process to process.
    """
    from textworld.envs.pddl import textgen

    parse, query = functools.cache(textgen._parse_and_convert), textgen.query

    def parse_once(text, **options):
        return copy.deepcopy(parse(text, rule_name=options["rule_name"]))  # they are written to

    def query_in_order(expression, context):
        return sorted(query(expression, context), key=mapped)

    def mapped(context):
        return sorted((place.name, thing.name) for place, thing in context["mapping"].items())

    textgen._parse_and_convert, textgen.query = parse_once, query_in_order
    rule = textgen.Rule
    rule.parse_conjunctive_query = staticmethod(functools.cache(rule.parse_conjunctive_query))


class Alfworld(World):
    """A chore of one of the types, in the games below `data`."""

    name = "alfworld"
    splits = tuple(FOLDERS)
    max_turns = 50
    system = (
        "You are in a room and have a chore to do. Each turn, say one action, in these words: go to"
        " PLACE, open PLACE, close PLACE, take THING from PLACE, move THING to PLACE, heat THING"
        " with microwave 1, cool THING with fridge 1, clean THING with sinkbasin 1, use LAMP,"
        " examine THING, look, inventory. You carry one thing at a time, and see and take only what"
        " is where you are."
    )

    def __init__(self, data, types=TYPES, max_turns=None):
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs import PddlEnv

        mend_textworld()
        self.types, self.max_turns = types, max_turns or self.max_turns
        self.games = {}
        for split, folder in FOLDERS.items():
            found = sorted(Path(data, "json_2.1.1", folder).rglob("game.tw-pddl"))
            self.games[split] = [path for path in found if not LEFT_OUT.search(str(path))]
        if not any(self.games.values()):
            raise ValueError(f"no games in {data}/json_2.1.1; alfworld-download fetches them")
        asked = textworld.EnvInfos(admissible_commands=True, won=True, facts=True)
        self.game = AlfredDemangler(PddlEnv(asked), shuffle=False)

    def choose(self, rng, split):
        """(a game that can be solved and is of the types asked for, its type)."""
        for path in rng.sample(self.games[split], len(self.games[split])):
            trial = json.loads(path.with_name("traj_data.json").read_text(encoding="utf-8"))
            game = json.loads(path.read_text(encoding="utf-8"))
            if trial["task_type"] in self.types and game.get("solvable"):
                return path, trial["task_type"]
        raise ValueError(f"alfworld has no solvable game of {', '.join(self.types)} in {split}")

    def begin(self, rng, split):
        self.path, self.kind = self.choose(rng, split)
        self.game.load(str(self.path))
        state = self.game.reset()
        self.states, self.said, self.planner = [state], [], None
        self.expert_rng = random.Random(rng.random())
        opening = state["feedback"].replace(BANNER, "").strip()
        self.task = opening.rpartition("Your task is to: ")[2]
        return f"{opening}\n\n"

    def admissible(self):
        return [] if self.over else list(self.states[-1]["admissible_commands"])

    def canonical(self, action):
        """Put is move, as in what is listed."""
        command = super().canonical(action)
        return re.sub(r"^put (.+) (?:in/on|in|on) (.+)$", r"move \1 to \2", command)

    def act(self, text):
        command = self.canonical(text)
        known = {" ".join(offered.split()): offered for offered in self.admissible()}
        valid = command in known
        state, _, _ = self.game.step(known.get(command, command))
        self.states.append(state)
        self.said.append(known.get(command, command))
        self.won = bool(state["won"])
        return f"{state['feedback'].strip()}\n\n", valid

    def expert(self):
        from alfworld.agents.expert import handcoded_expert

        # it draws from the module random, and must be told every turn
        handcoded_expert.random = self.expert_rng
        if self.planner is None:
            self.planner, self.advice = handcoded(self.path, self.states[0]), ["look"]
        for turn in range(len(self.advice), len(self.states)):
            state = self.states[turn]
            said = re.sub("^move ", "put ", self.said[turn - 1])  # else it thinks its hands full
            try:
                action = self.planner.act(state, 0, state["won"], said)
            except NameError:  # upstream's way to say that it has failed or run out of turns
                action = "look"
            offered = action in state["admissible_commands"]
            self.advice.append(action if offered else "look")
        return self.advice[-1]

    def close(self):
        self.game.close()


def handcoded(path, state):
    """Upstream's expert at the start of a game."""
    from alfworld.agents.expert import HandCodedTWAgent

    agent = HandCodedTWAgent(max_steps=200)
    agent.reset(str(path))
    agent.observe(state["feedback"])
    return agent


def success_by_type(env, player, episodes, split="test"):
    """{kind of chore: [won or not]} over the seeds 0 .. episodes-1."""
    found = {}
    for seed in range(episodes):
        won = run_episode(env, player, seed, split)["won"]
        found.setdefault(env.kind, []).append(won)
    return found


def make(argument="", **settings):
    """All chores or one type of them. ValueError for another argument, without games or extra."""
    if argument and argument not in TYPES:
        raise ValueError(f"no task type {argument!r}; there are: {', '.join(TYPES)}")
    if importlib.util.find_spec("alfworld") is None:
        raise ValueError(f"needs alfworld: pip install {PACKAGES}")
    if "ALFWORLD_DATA" not in os.environ:  # upstream would make a folder and set it, when imported
        raise ValueError("set ALFWORLD_DATA to the folder that alfworld-download fills with games")
    types = (argument,) if argument else TYPES
    try:
        return Alfworld(os.environ["ALFWORLD_DATA"], types, **settings)
    except ImportError:
        raise ValueError(f"needs alfworld: pip install {PACKAGES}") from None
