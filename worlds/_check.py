"""Does a world keep the contract of envs.py? What `python envs.py check NAME` looks at.

Every rule is a function of (name, episodes) that yields sentences: what is wrong, and what to do.
What a rule cannot tell from outside it leaves alone.
"""

import contextlib
import itertools
import os
import random
import re
import subprocess
import sys
import threading
import traceback
from pathlib import Path

from envs import FOLDER, bare, expert_player, in_words, make, random_player, run_episode

INFO_KEYS = {"task", "action", "admissible", "valid", "won", "score", "tools"}
ODD_TEXTS = (
    "", " ", "\n\n", "?", "0", "sing a song", "Action:", "**", "```\n```", "<action></action>",
    "<tool_call>{", "[[[", "%s%n", "\\", '{"name": "open", "arguments": {}}', "\x00\x07\x1b",
    "\r\n\t", "caf\u00e9 \u2615 \U0001f600", "\ud800", "9**9**9**9",
    "go " * 1300, "a" * 100_000, "Action: " * 5000,
)  # fmt: skip


def check(name, episodes=30):
    """What all rules say about a world; empty where nothing is wrong."""
    found, raised = [], set()
    for rule in RULES:
        try:
            found += rule(name, episodes)
        except Exception as error:  # whatever a stranger's world may raise
            told = in_words(error, kind=True)
            if told not in raised:  # by an earlier rule
                raised.add(told)
                found.append(f"{rule.__name__.replace('_', ' ')}: {told}{place_of(error)}")
    return list(dict.fromkeys(found))


def place_of(error):
    """The last line of a stranger's file on the way to an error, in words; "" without one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = {"envs.py", "_check.py"}
    theirs = [frame for frame in frames if Path(frame.filename).name not in own]
    if not theirs:
        return ""
    where = f"{Path(theirs[-1].filename).name}, line {theirs[-1].lineno}"
    return f" ({where}); a world never raises"


def openings(env, episodes):
    """Resets to every split and some seeds -> (split, seed, observation, info)."""
    for split in env.splits:
        for seed in range(episodes):
            yield split, seed, *env.reset(seed=seed, options={"split": split})


def transcript(env, split, seed, player=random_player):
    """All that an episode shows, as text; the same choices whatever the split and seed."""
    rng = random.Random(0)
    observation, info = env.reset(seed=seed, options={"split": split})
    shown, over = [observation, repr(info)], False
    while not over and len(shown) < 2000:
        text = player(env, info, rng)
        observation, reward, terminated, truncated, info = env.step(text)
        over = terminated or truncated
        shown += [ascii(text)[:200], observation, repr((reward, over, info))]
    return "\n".join(shown)


def has_expert(env):
    """Whether a world, in an episode, can say what is best."""
    try:
        env.expert()
    except NotImplementedError:
        return False
    return True


def what_it_says_of_itself(name, episodes):
    env = make(name)
    for attribute, kind in ("name", str), ("system", str), ("max_turns", int), ("splits", tuple):
        if not isinstance(getattr(env, attribute, None), kind) or not getattr(env, attribute):
            found = f"{attribute} is {getattr(env, attribute, None)!r}"
            yield f"{found}: set a {kind.__name__} that is not empty"
    if not {"train", "test"} <= {*env.splits}:
        yield f"splits are {env.splits!r}: there must be train and test"
    with contextlib.suppress(ValueError):
        env.reset(seed=0, options={"split": "no such split"})
        yield "a split that does not exist is accepted: raise ValueError (World.reset does)"
    env.close()


def problems_of(observation, info):
    """What is wrong with what a world returned."""
    if not isinstance(observation, str) or not observation:
        yield f"an observation is {observation!r:.80}: return text that is not empty"
    if set(info) != INFO_KEYS:
        lacks = sorted(INFO_KEYS - set(info))
        extra = sorted(set(info) - INFO_KEYS)
        yield (
            f"info lacks {lacks} and has {extra} too many:"
            " leave it to World.info; what is hidden is never in it"
        )
        return
    kinds = {"task": str, "action": str, "valid": bool, "won": bool, "score": float}
    for key, kind in kinds.items():
        if not isinstance(info[key], kind):
            yield f"info[{key!r}] is {info[key]!r:.80}: it must be a {kind.__name__}"
    if isinstance(info["score"], float) and not 0 <= info["score"] <= 1:
        yield f"a score is {info['score']}: it must be in [0, 1]"
    offered = info["admissible"]
    if offered is not None and not (
        isinstance(offered, list) and all(isinstance(a, str) for a in offered)
    ):
        yield "admissible is neither None nor a list of texts"


def what_is_returned(name, episodes):
    env = make(name)
    for *_, observation, info in openings(env, episodes):
        yield from problems_of(observation, info)
        if info["action"]:
            yield "info['action'] is not empty after reset"
        observation, reward, terminated, truncated, info = env.step(
            random_player(env, info, random.Random(0))
        )
        yield from problems_of(observation, info)
        if not isinstance(reward, float) or not (
            isinstance(terminated, bool) and isinstance(truncated, bool)
        ):
            found = f"step returns {reward!r}, {terminated!r}, {truncated!r}"
            yield f"{found}: a float and two bools are wanted"
    env.close()


def split_and_seed_fix_the_episode(name, episodes):
    fresh, used, state = make(name), make(name), random.getstate()
    for split, seed in itertools.product(fresh.splits, range(min(3, episodes))):
        transcript(used, split, seed + 99)  # something else in between
        if transcript(fresh, split, seed) != transcript(used, split, seed):
            yield (
                f"seed {seed} of {split} is not the same twice: draw from the rng"
                " that begin is given"
                " and from nothing else, and let begin set all that act changes"
            )
            break
    if random.getstate() != state:
        yield (
            "it draws from the random numbers that all share: draw from the rng that begin is given"
        )
    used.close()
    # the order of a set of texts differs from process to process
    code = (
        "import sys, envs; env = envs.make(sys.argv[1])\n"
        "transcript = envs.load(envs.FOLDER / '_check.py', 'worlds._check').transcript\n"
        "print(ascii(transcript(env, 'test', 0))); env.close()"
    )
    seen = set()
    for hash_seed in "1", "2":
        result = subprocess.run(
            [sys.executable, "-c", code, name], capture_output=True, text=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(FOLDER.parent)},
        )  # fmt: skip
        seen.add(result.stdout.splitlines()[-1] if result.stdout else result.stderr[-300:])
    if seen != {ascii(transcript(fresh, "test", 0))}:
        yield "another process plays seed 0 otherwise: sort what comes out of a set or from hash()"
    fresh.close()


def splits_are_disjoint(name, episodes):
    env, shown = make(name), {}
    for split, seed, _, info in openings(env, episodes):
        if info["admissible"] is None and not has_expert(env):
            continue  # nobody knows what to say, so episodes that differ may look alike
        player = expert_player if has_expert(env) else random_player
        shown.setdefault(split, set()).add(transcript(env, split, seed, player))
    for one, other in itertools.combinations(shown, 2):
        if both := len(shown[one] & shown[other]):
            yield (
                f"{one} and {other} share {both} of {len(shown[other])} episodes: keep some"
                " things or"
                " combinations for each (RepairShop.begin does it with a hash)"
            )
    env.close()


def any_text_is_legal(name, episodes):
    env = make(name)
    for text in ODD_TEXTS:
        shown = f"{text!a:.40}"
        if not isinstance(action := env.read(text), str) or env.read(action) != action:
            found = f"read({shown}) is no text, or changes when it is read again"
            yield f"{found}: wrap read in settled"
        _, info = env.reset(seed=0, options={"split": "test"})
        observation, _, terminated, truncated, info = env.step(text)
        yield from problems_of(observation, info)
        if info["valid"] and not action:
            found = f"{shown} is valid though nothing was said"
            yield f"{found}: answer what was wrong, and valid=False"
        turns = 1
        while not (terminated or truncated) and turns <= env.max_turns:
            observation, _, terminated, truncated, info = env.step(text)
            turns += 1
        if not (terminated or truncated) or turns > env.max_turns:
            yield f"saying {shown} goes on beyond max_turns: every text costs a turn"
            continue
        if env.step(text)[:4] != (observation, 0.0, True, False) and terminated:
            yield "after the end a step changes something: leave step to World"
    env.close()


def what_is_offered_is_valid(name, episodes):
    env = make(name)
    for split in env.splits:
        for seed in range(min(episodes, 10)):
            played = run_episode(env, random_player, seed, split)
            if env.info(True)["admissible"] is not None and played["invalid"]:
                yield f"seed {seed} of {split}: what is admissible is not valid when it is said"
    env.close()


def the_expert_wins(name, episodes):
    env = make(name)
    for split, seed, *_ in openings(env, episodes):
        if not has_expert(env):
            break
        rewards, over, won, valid = 0.0, False, False, True
        while not over:
            observation, reward, terminated, truncated, info = env.step(env.expert())
            yield from problems_of(observation, info)
            rewards, over, won = rewards + reward, terminated or truncated, info["won"]
            valid = valid and info["valid"]
        if not won or not valid:
            told = "does not win" if valid else "says what is not valid"
            found = f"the expert {told} in {split}, seed {seed}"
            yield f"{found}: mend it, or have none (NotImplementedError)"
            break
        if abs(rewards - info["score"]) > 1e-6:
            found = f"rewards add up to {rewards}, the score is {info['score']}"
            yield f"{found}: leave rewards to World.step"
            break
    env.close()


def says(text, words):
    """Whether a text has these words in it, as words."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def what_nonsense_learns(env, split, seed):
    """All that is said to a player who does nothing of use, lists of actions apart."""
    observation, info = env.reset(seed=seed, options={"split": split})
    shown, over = [info["task"], info["action"]], False
    while not over and len(shown) < 2000:
        observation, _, terminated, truncated, info = env.step("sing a song")
        shown += [bare(observation), info["task"]]
        over = terminated or truncated
    return "\n".join(shown)


def nothing_hidden_is_shown(name, episodes):
    """Where there is something to find out, the action that wins is not shown before that."""
    env, told = make(name), []
    for split, seed, opening, _ in openings(env, episodes):
        if not has_expert(env):
            break
        played = run_episode(env, expert_player, seed, split)
        last = played["actions"][-1]
        told.append(played["turns"] > 1 and says(bare(opening), last))
        learnt = what_nonsense_learns(env, split, seed)
        if says(learnt, last) and not says(bare(opening), last):
            yield (
                f"{split}, seed {seed}: {last!r:.80} wins, and whoever says nonsense is told so"
                " (in an observation, the task or the end of a lost game): say less"
            )
            break
    if told and all(told):
        found = "the first observation names the action that wins"
        yield f"{found}, which the expert takes turns to find: hide it"
    env.close()


def children():
    """Processes that this one has started, where the system tells."""
    lists = Path("/proc/self/task").glob("*/children")
    return {child for path in lists for child in path.read_text().split()}


def close_leaves_nothing(name, episodes):
    before, threads = children(), threading.active_count()
    env = make(name)
    env.reset(seed=0, options={"split": "test"})
    env.step("sing a song")
    env.close()
    env.close()  # twice is harmless
    if left := children() - before:
        found = f"close leaves processes behind ({', '.join(sorted(left))})"
        yield f"{found}: end them and wait for them"
    if threading.active_count() > threads:
        yield "close leaves a thread behind: join it"


RULES = (
    what_it_says_of_itself, what_is_returned, split_and_seed_fix_the_episode, splits_are_disjoint,
    any_text_is_legal, what_is_offered_is_valid, the_expert_wins, nothing_hidden_is_shown,
    close_leaves_nothing,
)  # fmt: skip
