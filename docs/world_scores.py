"""The players' scores behind the tables of worlds, in docs/worlds.json.

    python docs/world_scores.py                    our own worlds (a minute or two)
    python docs/world_scores.py rg:NAME ...        these alone; what is known of others stays

Per world, split and player: mean score, share won, their standard errors, n, and on this machine
steps a second. Episodes are the seeds 0 .. n-1 of the split.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import envs  # noqa: E402

EPISODES = 1000
OWN = [*envs.WORLDS, *envs.ALIASES, "twenty_questions:listed"]
SEARCHERS = {"guess": envs.guess_player, "hasty": envs.hasty_player, "sloppy": envs.sloppy_player}


def measure(env, player, split, episodes):
    """Mean and standard error of the score and of success, and how fast it was."""
    out, start = {"episodes": episodes}, time.perf_counter()
    played = [envs.run_episode(env, player, seed, split) for seed in range(episodes)]
    seconds = time.perf_counter() - start
    for key in "score", "won":
        mean, se = envs.mean_and_error([float(episode[key]) for episode in played])
        out |= {key: round(mean, 4), f"{key}_se": round(se, 4)}
    steps = sum(episode["turns"] for episode in played)
    return out | {"steps_per_second": round(steps / seconds)}


def main():
    """One record per world, split and player."""
    names, records = sys.argv[1:] or OWN, []
    for name in names:
        env = envs.make(name)
        players = {"random": envs.random_player}
        if type(env).expert is not envs.World.expert:
            players["expert"] = envs.expert_player
        if isinstance(env, envs.Search):
            players |= SEARCHERS
        for split in [split for split in ("test", "ood") if split in env.splits]:
            for player, function in players.items():
                record = {"world": name, "split": split, "player": player}
                records.append(record | measure(env, function, split, EPISODES))
        # twenty questions can say exactly how often its expert wins, where nothing else is drawn
        exactly = getattr(sys.modules[type(env).__module__], "expert_success", None)
        if exactly and name in envs.ALIASES:
            records.append({"world": name, "split": "all things", "player": "expert", "won": exactly(env), "exact": True})
        env.close()
    if "household" in names:
        everything = envs.make("household", offered=envs.HouseholdFull.offered)
        records.append({"world": "household, all verbs offered", "split": "test", "player": "random",
                        **measure(everything, envs.random_player, "test", EPISODES)})
    path = Path(__file__).with_name("worlds.json")
    measured = {record["world"] for record in records}
    known = json.loads(path.read_text(encoding="utf-8"))
    records = [record for record in known if record["world"] not in measured] + records
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
