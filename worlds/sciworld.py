"""ScienceWorld (Wang et al., 2022): 30 kinds of primary-school science tasks in a simulated house.

    --env sciworld                  any task
    --env sciworld:find-plant       one task; `python envs.py play sciworld:help` names all 30

The simulator is upstream's (the package scienceworld, Apache-2, which runs on Java); this file
talks to it through py4j. All worlds of a process share one Java process of bounded memory, which
ends with the last `close`, with this process, or when this process is killed.

- Splits are upstream's variations of a task: train, dev, test. All are simplified ("easy"):
  doors and containers are open, one may teleport, pots water themselves.
- The score is upstream's, graded; 1 is won. Focusing on a wrong thing ends the episode, as
  upstream has it, where it scores -100; the score here is then 0.
- Input that may mean several things is answered with a numbered menu; the next action may be one
  of its numbers. Any other action leaves the menu.
- "reset task", which undoes what was focused on, is not offered and not understood.
- `admissible()` has upstream try every action on every object, several times the cost of a step.
  `info` has the list only where it is shown (`show_actions`); a player may ask for it.
- `expert()` follows upstream's gold path, which takes seconds to make; it is made in a simulation
  of its own when the expert is first asked. It does not find back from another player's actions.
"""

import json
import shutil

from envs import World

PACKAGE = "scienceworld==1.2.3"
# hashCode=2: the order in which sets are told depends on identity hashes, which else are random
JAVA_OPTIONS = ["-Xmx1g", "-XX:+UnlockExperimentalVMOptions", "-XX:hashCode=2"]
NOT_UNDERSTOOD = "No known action matches that input."
MENU = "Ambiguous request"


class Java:
    """The Java process that all worlds share; it runs while a world uses it."""

    users = 0
    gateway = None

    def acquire(self):
        """A simulator of one's own in it. ValueError without scienceworld or Java."""
        try:
            from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
            from scienceworld.constants import BASEPATH, JAR_PATH
        except ImportError:
            raise ValueError(f"needs scienceworld: pip install {PACKAGE}") from None
        if not shutil.which("java"):
            raise ValueError("needs Java: apt-get install default-jre-headless")
        if self.gateway is None:
            # die_on_exit: Java ends when its standard input does, so a kill of this process ends it
            port, process = launch_gateway(classpath=JAR_PATH, cwd=BASEPATH, die_on_exit=True,
                                           javaopts=JAVA_OPTIONS, return_proc=True)  # fmt: skip
            parameters = GatewayParameters(port=port, auto_field=True)
            self.gateway = JavaGateway(gateway_parameters=parameters, java_process=process)
        self.users += 1
        return self.gateway.jvm.scienceworld.runtime.pythonapi.PythonInterface()

    def release(self, simulator):
        """Gives a simulator back; the last one ends Java."""
        self.gateway.detach(simulator)  # 10 MB, which Java else keeps until Python's collector comes
        self.users -= 1
        if self.users == 0:
            process = self.gateway.java_process
            self.gateway.shutdown()
            self.gateway = None
            process.stdin.close()
            process.wait()


JAVA = Java()


def task_names():
    """The 30 tasks, in upstream's order."""
    from scienceworld.constants import ID2TASK

    return list(ID2TASK.values())


class ScienceWorld(World):
    """One of the tasks, or any of them (None), in upstream's simulator."""

    name = "sciworld"
    splits = ("train", "dev", "test")
    max_turns = 100  # upstream's; the gold paths of some tasks are longer (see docs/worlds.md)
    system = (
        "You are in a house with a workshop, a kitchen, a greenhouse and other places, and have a"
        " task. Each turn, say one action, such as: look around, look in OBJECT, go to PLACE,"
        " teleport to PLACE, open OBJECT, pick up OBJECT, put down OBJECT, move OBJECT to OBJECT,"
        " pour OBJECT in OBJECT, mix OBJECT, use OBJECT on OBJECT, activate OBJECT, deactivate"
        " OBJECT, connect OBJECT to OBJECT, read OBJECT, eat OBJECT, wait, inventory, task,"
        " focus on OBJECT. Focus on what the task names, and on nothing else: a wrong focus ends"
        " the task."
    )

    def __init__(self, task=None, max_turns=None):
        self.game = JAVA.acquire()
        self.known = {}
        self.tasks = task_names() if task is None else [task]
        self.max_turns = max_turns or self.max_turns

    def begin(self, rng, split):
        kind = rng.choice(self.tasks)
        self.episode = kind, rng.choice(self.variations(kind, split))
        self.game.load(*self.episode, "easy", False)
        self.menu, self.progress, self.gold, self.done = False, 0.0, None, []
        self.task = " ".join(self.game.getTaskDescription().split())
        return f"{self.task}\n\n{self.game.freeActionLook().strip()}\n\n"

    def variations(self, kind, split):
        """Upstream's numbers of a task's variations in a split; no two splits share one."""
        if kind not in self.known:
            self.game.load(kind, 0, "easy", False)  # they can be asked of what is loaded only
            game = self.game
            told = game.getVariationsTrain, game.getVariationsDev, game.getVariationsTest
            self.known[kind] = {name: list(ask()) for name, ask in zip(self.splits, told)}
        return self.known[kind][split]

    def admissible(self):
        """Upstream's valid actions, but for those on things out of sight, in a closed cupboard say.

        Upstream lists these, too, and then does not understand them.
        """
        if self.over:
            return []
        listed = json.loads(self.game.getValidActionObjectCombinationsJSON())["validActions"]
        names = {action["obj_ids"][0]: action["action"].removeprefix("look at ")
                 for action in listed if action["action"].startswith("look at ")}  # fmt: skip
        carried = f"inventory {self.game.freeActionInventory()}"
        known = set(map(int, json.loads(self.game.getPossibleObjectReferentLUTJSON())))
        known |= {number for number, name in names.items()
                  if name.removesuffix(" in inventory") in carried}  # fmt: skip
        actions = []
        for action in listed:
            words = action["action"]
            in_sight = words.startswith("teleport to ") or known.issuperset(action["obj_ids"])
            if in_sight and words != "reset task":
                actions.append(words)
        return actions

    def info(self, valid):
        admissible = self.admissible() if self.show_actions else None
        return {"task": self.task, "action": self.action, "admissible": admissible, "valid": valid,
                "won": self.won, "score": self.score(), "tools": None}  # fmt: skip

    def act(self, text):
        self.done.append(text)
        text = " ".join(text.encode("ascii", "replace").decode().split())
        if "reset" in text.lower():
            return f"{NOT_UNDERSTOOD}\n\n", False
        if self.menu and not text.isdigit():
            self.game.step("")  # upstream would take the action for a bad answer to the menu
        reply = self.game.step(text).strip().replace("\treset task\n", "")
        self.menu = reply.startswith(MENU)
        progress = self.game.getScore()
        self.progress = max(0.0, progress)
        self.won = progress > 0.995  # upstream rounds to hundredths
        self.over = progress < 0 or self.game.getCompleted()
        valid = not reply.startswith((NOT_UNDERSTOOD, "Unknown action"))
        return f"{reply}\n\n", valid

    def score(self):
        return 1.0 if self.won else self.progress

    def expert(self):
        if self.gold is None:
            simulation = JAVA.acquire()
            simulation.load(*self.episode, "easy", True)
            self.gold = list(simulation.getGoldActionSequence())
            JAVA.release(simulation)
        followed = 0  # how much of the path was gone, whatever else was done
        for action in self.done:
            followed += self.gold[followed : followed + 1] == [action]
        return self.gold[followed] if followed < len(self.gold) else "look around"

    def close(self):
        if self.game is not None:
            JAVA.release(self.game)
            self.game = None


def make(argument="", **settings):
    """Any task, or the named one. ValueError for any other argument or without the extra."""
    world = ScienceWorld(argument or None, **settings)
    if argument and argument not in task_names():
        world.close()
        raise ValueError(f"no task {argument!r}; there are: {', '.join(task_names())}")
    return world
