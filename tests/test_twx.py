"""The worlds of textworld-express: its absence, and with the package the contract, the shared Java process and its end."""

import importlib.util
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
from envs import make, run_episode

ROOT = Path(__file__).parent.parent
GAMES = "cookingworld coin twc mapreader arithmetic sorting simonsays peckingorder".split()
needs_package = pytest.mark.skipif(
    not importlib.util.find_spec("textworld_express") or not shutil.which("java"), reason="needs textworld-express and Java"
)


@pytest.fixture(scope="module", autouse=True)
def no_java_afterwards():
    yield
    if envs.Java.running:
        envs.Java.running.stop()


# -------------------------------------------------------------------------------------------------------------- without it


def test_a_missing_package_is_one_line_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(envs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install textworld-express .*Java") as error:
        make("twx:coin")
    assert "\n" not in str(error.value)


@needs_package
def test_missing_java_is_one_line(monkeypatch):
    monkeypatch.setattr(envs.Java, "running", None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="needs Java, and there is no java") as error:
        make("twx:coin")
    assert "\n" not in str(error.value)


@needs_package
def test_a_broken_java_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setattr(envs.Java, "running", None)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ValueError, match="java did not start") as error:
        make("twx:coin")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------- contract


@needs_package
@pytest.mark.parametrize("name, words", [
    ("twx:chess", "unknown game 'twx:chess'; textworld-express has: .*twx:coin"), ("twx:", "unknown game"),
    ("twx:coin,x", "written as numLocations=3"), ("twx:coin,numLocations=-1", "written as"), ("twx:coin,foo=3", "foo"),
    ("twx:coin,numLocations=99", "less than or equal to 11"), ("twx:coin,max_turns=0", "max_turns"),
])  # fmt: skip
def test_impossible_names(name, words):
    with pytest.raises(ValueError, match=words) as error:
        make(name)
    assert "\n" not in str(error.value)


@needs_package
@pytest.mark.parametrize("game", GAMES)
def test_contract_determinism_and_expert(game):
    env, other = make(f"twx:{game}"), make(f"twx:{game}")
    assert game in env.system and env.splits == ("train", "dev", "test")
    seen = {}
    for split in env.splits:
        for seed in 0, 7, 10**12 + 1:
            expert = run_episode(env, envs.expert_player, seed, split)
            assert expert["invalid"] == 0 and (expert["won"] or game == "cookingworld" and expert["turns"] == 50)
            assert run_episode(other, envs.expert_player, seed, split) == expert
            one = run_episode(env, envs.random_player, seed, split)
            assert run_episode(other, envs.random_player, seed, split) == one and 0 <= one["score"] <= 1
        assert env.reset(seed=3, options={"split": split}) == env.reset(seed=1003, options={"split": split})  # a fold has 1000 games
        seen[split] = {env.reset(seed=seed, options={"split": split}) and env.episode for seed in range(1000)}
    assert all(len(numbers) == 1000 for numbers in seen.values()) and len(set().union(*seen.values())) == 3000
    with pytest.raises(ValueError, match="has no split 'ood'"):
        env.reset(options={"split": "ood"})
    observation, info = env.reset(seed=1)
    assert set(info) == {"task", "admissible", "valid", "won", "score", "tools"} and info["task"] in observation
    assert observation.endswith("50 turns left.") and not info["won"] and info["score"] == 0.0
    env.close()
    with pytest.raises(RuntimeError, match="reset"):
        env.step("look around")
    assert env.reset(seed=1) == (observation, info)


@needs_package
def test_settings_stand_in_the_name():
    env = make("twx:coin,numLocations=2,includeDoors=0,max_turns=4")
    assert env.max_turns == 4 and make("twx:coin", max_turns=7).max_turns == 7 and make("twx:coin").max_turns == 50
    assert all(run_episode(env, envs.expert_player, seed)["won"] for seed in range(20))
    assert not any("open" in action for seed in range(20) for action in env.reset(seed=seed)[1]["admissible"])


@needs_package
@pytest.mark.parametrize("game", ["twc", "simonsays"])
def test_any_string_is_a_turn(game):
    rng = random.Random(1)
    env = make(f"twx:{game}", max_turns=1000)
    strings = ["", "\x00", "\ud800", "move north\nmove south", "e\ny\n", "x" * 10**6, "\\n", "\r", "!xro0\n", "\U0001f600", "%s", '"', "İ"]
    strings += ["".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(30))) for _ in range(200)]
    before = env.reset(seed=0)[1]
    for turn, text in enumerate(strings, 1):
        observation, reward, terminated, truncated, info = env.step(text)
        assert not info["valid"] and reward == 0 and not terminated and not truncated and env.turns == turn
        assert info["admissible"] == before["admissible"]
        assert observation.endswith(f"{1000 - turn} turns left.")
    action = env.admissible()[0]
    assert env.step(f"  {action.upper()}. ")[4]["valid"]


@needs_package
def test_a_lost_game_and_what_comes_after_it():
    env = make("twx:simonsays")
    _, info = env.reset(seed=0)
    wrong = next(action for action in info["admissible"] if action != env.expert())
    observation, reward, terminated, _, info = env.step(wrong)
    assert terminated and not info["won"] and info["score"] == reward == 0 and observation.endswith("you did not win.")
    assert env.step(wrong) == (observation, 0.0, True, False, {**info, "valid": False})
    with pytest.raises(RuntimeError, match="gold path"):
        env.expert()


@needs_package
@pytest.mark.parametrize("game", ["coin", "twc", "mapreader"])
def test_the_expert_finds_back_to_its_path(game):
    env, rng, won = make(f"twx:{game}", max_turns=300), random.Random(2), []
    for seed in range(20):
        _, info = env.reset(seed=seed)
        for _ in range(6):
            if not env.over:
                info = env.step(rng.choice(info["admissible"]))[4]
        while not env.over:
            info = env.step(env.expert())[4]
        won.append(info["won"])
    assert sum(won) >= 19


# ----------------------------------------------------------------------------------------------------- one Java, many games


def playing(env, seed):
    """A random episode, a step at a time; the seed fixes everything."""
    rng, (observation, info) = random.Random(seed), env.reset(seed=seed // 4)  # groups of four share an episode
    seen = [observation]
    while not env.over:
        observation, *_, info = env.step(rng.choice(info["admissible"]))
        seen.append((observation, info))
        yield seen
        if len(seen) % 3 == 0 and not env.over and info["score"] == 0:
            env.gold = None  # asking for a new path must not disturb anyone's game
            env.gold_path()


@needs_package
@pytest.mark.parametrize("game", GAMES)
def test_a_hundred_at_once_play_as_each_alone(game):
    alone = [[seen for seen in playing(make(f"twx:{game},max_turns=8"), seed)][-1] for seed in range(100)]
    games = {seed: playing(make(f"twx:{game},max_turns=8"), seed) for seed in range(100)}
    order, seen = random.Random(3), {}
    while games:
        seed = order.choice(list(games))
        last = next(games[seed], None)
        if last is None:
            del games[seed]
        else:
            seen[seed] = last
    assert [seen[seed] for seed in range(100)] == alone


START = """
import os, sys, time, envs
worlds = [envs.make("twx:coin") for _ in range(20)]
for world in worlds: world.reset(seed=0)
pids = {world.java.process.pid for world in worlds}
print(*pids, flush=True)
"""


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@needs_package
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ["close", "exit", "exception", "os._exit", signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(end):
    code = START + {
        "close": "for world in worlds: assert os.path.exists(f'/proc/{min(pids)}'); world.close()\n"
        "assert not os.path.exists(f'/proc/{min(pids)}')",
        "exit": "",
        "exception": "1 / 0",
        "os._exit": "os._exit(3)",
    }.get(end, "time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pids = process.stdout.readline().split()
    assert len(pids) == 1  # one for all worlds
    if isinstance(end, signal.Signals):
        process.send_signal(end)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == (-end if isinstance(end, signal.Signals) else {"exception": 1, "os._exit": 3}.get(end, 0))
    assert ("Traceback" in errors) == (end in ("exception", signal.SIGINT)), errors
    for _ in range(100):  # the end of a pipe takes a moment to be seen
        if not alive(pids[0]):
            return
        time.sleep(0.1)
    os.kill(int(pids[0]), signal.SIGKILL)
    raise AssertionError("Java is still there")


@needs_package
def test_a_person_plays_it():
    result = subprocess.run([sys.executable, "envs.py", "play", "twx:coin", "--seed", "0"], cwd=ROOT, input="?\nlook around\n",
                            capture_output=True, text=True, timeout=60)  # fmt: skip
    assert result.returncode == 0 and not result.stderr and "49 turns left." in result.stdout and "inventory" in result.stdout
