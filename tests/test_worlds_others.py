"""Worlds that others wrote. Each part is skipped where its extra is not installed."""

import importlib.util
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import envs

ROOT = Path(__file__).parent.parent
ODD_TEXTS = ["", " \n", "hello there", "x" * 5000, "\x00\x1b[31m", "\ud800 \u00e9", "0", "{", "Action:", '{"name": 3}',
             "<tool_call>", "<tool_call>[]</tool_call>", "\u202e" * 40, "%s {} ' \" \\"]  # fmt: skip
INFO_KEYS = {"task", "action", "admissible", "valid", "won", "score", "tools"}


def needs(package, program=None):
    """A mark: skip where the package, or the program, is not there."""
    there = importlib.util.find_spec(package) and (program is None or shutil.which(program))
    return pytest.mark.skipif(not there, reason=f"needs {package} {program or ''}")


def say(env, texts, seed, split):
    """What is seen in an episode in which `texts` are said, for comparison."""
    seen = [env.reset(seed=seed, options={"split": split})]
    for text in texts:
        seen.append(env.step(text))
    return seen


def well_formed(step):
    observation, reward, terminated, truncated, info = step
    assert isinstance(observation, str) and observation
    assert isinstance(reward, float) and isinstance(terminated, bool) and truncated is False
    assert set(info) == INFO_KEYS and 0.0 <= info["score"] <= 1.0
    assert isinstance(info["valid"], bool) and isinstance(info["won"], bool)


def odd_texts_are_legal(env, split="train"):
    env.reset(seed=0, options={"split": split})
    for text in ODD_TEXTS:
        step = env.step(text)
        well_formed(step)
        assert not step[4]["won"]
        if step[2]:
            env.reset(seed=0, options={"split": split})


def running(words):
    """The processes whose command line has `words`: {id: command}."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended
            continue
        if words in command and state != "Z":
            found[int(folder.name)] = command
    return found


def children(words, parent):
    """Of these, those that `parent` started."""
    found = set()
    for number in running(words):
        try:
            found.add((int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1]), number))
        except OSError:
            continue
    return {number for above, number in found if above == parent}


def gone(numbers, seconds=60):
    """Waits until these processes have ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(Path(f"/proc/{number}").exists() for number in numbers):
            return True
        time.sleep(0.1)
    return False


# ------------------------------------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize("name, package, hint", [
    ("sciworld", "scienceworld", "pip install scienceworld"),
])  # fmt: skip
def test_a_missing_extra_is_said_in_one_line(name, package, hint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        envs.main(["play", name])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and hint in said


@needs("scienceworld")
def test_without_java_sciworld_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="apt-get install default-jre-headless"):
        envs.make("sciworld")


# ----------------------------------------------------------------------------------------------------------------- sciworld

sciworld = needs("scienceworld", "java")
JAVA = "scienceworld.jar"


@pytest.fixture
def science():
    made = []

    def make(name="sciworld:find-non-living-thing", **settings):
        made.append(envs.make(name, **settings))
        return made[-1]

    yield make
    for env in made:
        env.close()
    assert not children(JAVA, os.getpid())  # nothing is left


@sciworld
def test_sciworld_odd_texts_are_legal(science):
    odd_texts_are_legal(science())


@sciworld
def test_sciworld_is_the_same_in_another_java_process(science):
    rng = random.Random(0)
    env = science("sciworld:power-component")
    env.reset(seed=3)
    actions = ["look around", "open door", "teleport to hallway", "look in hallway", "inventory"]
    for place in "workshop", "kitchen":  # and some that change things
        env.step(f"teleport to {place}")
        listed = [action for action in env.admissible() if not action.startswith("focus")]
        actions += [f"teleport to {place}", *rng.sample(listed, 8)]
    first = say(env, actions, 3, "train")
    env.close()
    assert not children(JAVA, os.getpid())
    science("sciworld:find-animal").reset(seed=1)  # another world in between, in the same process
    assert say(science("sciworld:power-component"), actions, 3, "train") == first


@sciworld
def test_sciworld_splits_are_upstreams_and_disjoint(science):
    env = science("sciworld")
    assert len(env.tasks) == 30
    for kind in "boil", "find-plant":
        parts = [set(env.variations(kind, split)) for split in env.splits]
        assert all(not one & other for one, other in itertools.combinations(parts, 2))
        assert len(set.union(*parts)) == {"boil": 30, "find-plant": 300}[kind]
    env = science()
    for split in env.splits:
        env.reset(seed=0, options={"split": split})
        assert env.episode[1] in env.variations(env.episode[0], split)


@sciworld
@pytest.mark.parametrize("task", ["find-non-living-thing", "lifespan-longest-lived"])
def test_sciworld_expert_wins(science, task):
    env = science(f"sciworld:{task}")
    for seed in range(2):
        found = envs.run_episode(env, envs.expert_player, seed, "test")
        assert found["won"] and found["score"] == 1.0 and found["invalid"] == 0


@sciworld
def test_sciworld_makes_the_gold_path_for_the_expert_only(science):
    env = science()
    env.reset(seed=0)
    env.step("look around")
    assert env.gold is None
    before = env.observation
    assert env.expert() in env.gold and env.observation == before
    first = env.expert()
    env.step("inventory")  # not on the path: the expert goes on where it was
    assert env.expert() == first


@sciworld
def test_sciworld_wrong_focus_ends_the_episode(science):
    env = science("sciworld:find-plant")
    env.reset(seed=1)
    env.step("teleport to kitchen")
    assert env.score() > 0
    observation, reward, over, _, info = env.step("focus on table")
    assert over and reward < 0 and info["score"] == 0 and not info["won"] and "did not win" in observation


@sciworld
def test_sciworld_asks_back_with_a_numbered_menu(science):
    env = science()
    observation = env.reset(seed=0)[0]
    env.step("teleport to hallway")
    observation, _, _, _, info = env.step("close door")
    assert observation.startswith("Ambiguous request") and "0:\tclose door" in observation and info["valid"]
    assert env.step("0")[0].startswith("The door is now closed")
    env.step("open door")
    assert env.step("look around")[0].startswith("This room is called the hallway")  # not a bad answer to the menu


@sciworld
@pytest.mark.parametrize("text", ["reset task", "Reset  Task", "Action: **reset task**", "reset the task"])
def test_sciworld_does_not_reset_the_task(science, text):
    env = science()
    env.reset(seed=0)
    assert "reset task" not in env.admissible()
    assert "reset" not in env.step("help")[0]
    observation, _, _, _, info = env.step(text)
    assert not info["valid"] and observation.startswith("No known action")


@sciworld
def test_sciworld_lists_actions_only_where_they_are_shown(science):
    assert science().reset(seed=0)[1]["admissible"] is None
    observation, info = science(show_actions=True).reset(seed=0)
    assert "look around" in info["admissible"] and envs.LISTING in observation
    env = science()
    assert envs.random_player(env, env.reset(seed=0)[1], random.Random(0)) in env.admissible()


@sciworld
def test_sciworld_refuses_an_unknown_task():
    with pytest.raises(ValueError, match="no task 'fly'; there are: boil, melt"):
        envs.make("sciworld:fly")
    assert not children(JAVA, os.getpid())


@sciworld
@pytest.mark.parametrize("end", ["raise RuntimeError", "sys.exit()", "os.kill(os.getpid(), 9)"])
def test_sciworld_leaves_no_process(end):
    code = f"import envs, os, sys\nenv = envs.make('sciworld')\nprint('ready', flush=True)\nsys.stdin.readline()\n{end}"
    player = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    assert player.stdout.readline() == "ready\n"
    java = children(JAVA, player.pid)
    assert len(java) == 1
    player.communicate("\n")
    assert gone(java)
