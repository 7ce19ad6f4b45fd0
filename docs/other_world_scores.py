"""A player's score in one world, as a line of JSON, for the worlds that others wrote:

    python docs/other_world_scores.py sciworld:find-plant test expert 20 >> docs/other_worlds.jsonl

The player is random, expert or, for a player of the world's own file, its name without "_player".
Episodes are the seeds 0 .. n-1. CPU seconds are those of this process and of those that it started.
"""

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import envs  # noqa: E402


def cpu_seconds():
    """Of this process and of its children that have ended."""
    of = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(sum(resource.getrusage(which)[:2]) for which in of)


def main(name, split, player, episodes):
    """One line: what `player` does in the world `name`."""
    env = envs.make(name)
    known = {"random": envs.random_player, "expert": envs.expert_player}
    module = importlib.import_module(type(env).__module__)
    play = known.get(player) or getattr(module, f"{player}_player")
    start, found = time.monotonic(), []
    for seed in range(int(episodes)):
        found.append(envs.run_episode(env, play, seed, split))
    seconds = time.monotonic() - start
    env.close()
    record = {"world": name, "split": split, "player": player, "episodes": len(found)}
    for key in "score", "won":
        values = [float(episode[key]) for episode in found]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
        record |= {key: round(mean, 4), f"{key}_se": round((variance / len(values)) ** 0.5, 4)}
    turns = [episode["turns"] for episode in found]
    record |= {
        "turns": round(sum(turns) / len(turns), 2),
        "longest": max(turns),
        "invalid": round(sum(episode["invalid"] for episode in found) / sum(turns), 4),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds(), 1),
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
