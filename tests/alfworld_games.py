"""Small ALFWorld games from the wheel's own rooms, grammar and goals; nothing is downloaded.

A room of ALFRED with some of its receptacles, and one or two things of each kind that the room has,
where such a thing may be.
"""

import json
import random
from pathlib import Path

import alfworld.gen
from alfworld.agents.utils.misc import add_task_to_grammar
from alfworld.gen import constants
from alfworld.gen.goal_library import gdict
from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

LAYOUTS = Path(alfworld.gen.__file__).parent / "layouts"
CHORES = {  # type: (rooms, what, where to, lamp)
    "pick_and_place_simple": ((301, 302), ["Book", "CD", "KeyChain"], ["Drawer", "Shelf"], ""),
    "look_at_obj_in_light": ((301, 302), ["Book", "CD", "Pen"], [""], "DeskLamp"),
    "pick_clean_then_place_in_recep": ((9,), ["Fork", "Plate", "Mug"], ["CounterTop", "DiningTable"], ""),
    "pick_heat_then_place_in_recep": ((9,), ["Potato", "Egg", "Cup"], ["CounterTop", "DiningTable"], ""),
    "pick_cool_then_place_in_recep": ((9,), ["Apple", "Tomato", "Bread"], ["CounterTop", "DiningTable"], ""),
    "pick_two_obj_and_place": ((9,), ["Fork", "Spoon", "Knife"], ["Drawer"], ""),
}
STATES = {"cleanable": "Cleanable", "heatable": "Heatable", "coolable": "Coolable", "toggleable": "Toggleable"}


def mangled(name):
    for mark, word in {"-": "_minus_", "|": "_bar_", "+": "_plus_", ".": "_dot_"}.items():
        name = name.replace(mark, word)
    return name


def write_game(folder, kind, seed, solvable=True):
    """Writes game.tw-pddl and traj_data.json of a chore into the folder, as upstream lays them."""
    rng = random.Random(f"{kind} {seed}")
    rooms, targets, places, lamp = CHORES[kind]
    room, target, place = rng.choice(rooms), rng.choice(targets), rng.choice(places)
    receptacles, things, facts = {}, {}, []
    ids = sorted(json.loads((LAYOUTS / f"FloorPlan{room}-openable.json").read_text()))
    rng.shuffle(ids)
    for name in ids:
        name = f"{name}|SinkBasin" if name.startswith("Sink|") else name
        sort = name.rpartition("|")[2] if name.endswith("SinkBasin") else name.partition("|")[0]
        if list(receptacles.values()).count(sort) < 2:
            receptacles[mangled(name)] = sort
    for sort in sorted(json.loads((LAYOUTS / f"FloorPlan{room}-objects.json").read_text())):
        homes = [name for name, home in receptacles.items() if sort in constants.VAL_RECEPTACLE_OBJECTS.get(home, ())]
        if sort == lamp:
            homes = [name for name, home in receptacles.items() if home == "Desk"]
        if sort == target:  # not where it is to go
            homes = [name for name in homes if receptacles[name] != place]
        if homes:
            for number in range(2 if sort == target else rng.randint(1, 2)):
                name = mangled(f"{sort}|+{number:02d}.00|+{rng.randrange(100):02d}.00")
                things[name] = sort
                facts.append(f"(inReceptacle {name} {rng.choice(homes)})")
    spots = {name: f"loc_bar_{number}" for number, name in enumerate(receptacles)}
    for name, sort in receptacles.items():
        facts += [f"(receptacleType {name} {sort}Type)", f"(receptacleAtLocation {name} {spots[name]})"]
        facts += [f"(openable {name})"] * (sort in constants.OPENABLE_CLASS_LIST)
    for name, sort in things.items():
        facts.append(f"(objectType {name} {sort}Type)")
        facts += [f"(pickupable {name})"] * (sort != lamp)
        facts += [f"({fact} {name})" for fact, can in STATES.items() if sort in constants.VAL_ACTION_OBJECTS[can]]
    for home in sorted(set(receptacles.values())):
        allowed = sorted(constants.VAL_RECEPTACLE_OBJECTS.get(home, ()))
        facts += [f"(canContain {home}Type {sort}Type)" for sort in allowed if sort in things.values()]
    facts += [f"(objectAtLocation {fact.split()[1]} {spots[fact.split()[2][:-1]]})" for fact in facts if fact.startswith("(inR")]
    kinds = sorted({f"{sort}Type - otype" for sort in things.values()}) + sorted({f"{sort}Type - rtype" for sort in receptacles.values()})
    kinds += [f"{sort}Type - rtype" for sort in ("SinkBasin", "Microwave", "Fridge") if sort not in receptacles.values()]
    objects = [f"{name} - object" for name in things] + [f"{name} - receptacle" for name in receptacles] + kinds
    objects += ["agent1 - agent", *(f"{spot} - location" for spot in [*spots.values(), "loc_bar_start"])]
    goal = gdict[kind]["pddl"].format(obj=target, recep=place, toggle=lamp, mrecep="").replace("#", "-")
    problem = ("(define (problem chore) (:domain alfred)\n(:objects\n" + "\n".join(objects)
               + ")\n(:init (= (total-cost) 0) (atLocation agent1 loc_bar_start)\n" + "\n".join(facts) + ")\n" + goal)  # fmt: skip
    trial = {"task_type": kind, "pddl_params": {"object_target": target, "parent_target": place, "toggle_target": lamp,
             "mrecep_target": "", "object_sliced": False}}  # fmt: skip
    random.seed(seed)  # upstream draws the words of the task from the module random
    grammar = add_task_to_grammar(Path(ALFRED_TWL2_PATH).read_text(), trial)
    folder = Path(folder)
    folder.mkdir(parents=True)
    game = {"pddl_domain": Path(ALFRED_PDDL_PATH).read_text(), "grammar": grammar, "pddl_problem": problem, "solvable": solvable}
    (folder / "game.tw-pddl").write_text(json.dumps(game))
    (folder / "traj_data.json").write_text(json.dumps(trial))


def write_games(data, each=2, splits=("train", "valid_seen", "valid_unseen")):
    """Games of all six types below `data`, other ones in each split, and some that are to be left out."""
    for shift, split in enumerate(splits):
        root = Path(data, "json_2.1.1", split)
        for kind in CHORES:
            for seed in range(each):
                write_game(root / f"{kind}-{seed}" / "trial", kind, shift * 1000 + seed)
        write_game(root / "pick_and_place_simple-unsolvable" / "trial", "pick_and_place_simple", 500 + shift, solvable=False)
        write_game(root / "pick_and_place_with_movable_recep-Pen" / "trial", "pick_and_place_simple", 600 + shift)
        write_game(root / "pick_cool_then_place_in_recep-AppleSliced" / "trial", "pick_cool_then_place_in_recep", 700 + shift)
