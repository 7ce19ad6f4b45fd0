"""The players' scores behind README's tables of worlds: python docs/world_scores.py writes docs/worlds.json (a minute or two).

Per world, split and player: mean score, share won, their standard errors, n. Episodes are the seeds 0 .. n-1 of the split.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import envs  # noqa: E402

EPISODES = 1000
SEARCHERS = {"guess": envs.guess_player, "hasty": envs.hasty_player, "sloppy": envs.sloppy_player}


def measure(env, player, split, episodes):
    """Mean and standard error of the score and of success."""
    out = {"episodes": episodes}
    for key in "score", "won":
        mean, se = envs.mean_score(env, player, episodes, split, key)
        out |= {key: round(mean, 4), f"{key}_se": round(se, 4)}
    return out


def main():
    """One record per world, split and player."""
    records = []
    for name in [*envs.WORLDS, *envs.ALIASES]:
        env = envs.make(name)
        players = {"random": envs.random_player, "expert": envs.expert_player}
        if isinstance(env, envs.Search):
            players |= SEARCHERS
        for split in [split for split in ("test", "ood") if split in env.splits]:
            for player, function in players.items():
                record = {"world": name, "split": split, "player": player}
                records.append(record | measure(env, function, split, EPISODES))
        # twenty questions can say exactly how often its expert wins
        if exactly := getattr(sys.modules[type(env).__module__], "expert_success", None):
            records.append({"world": name, "split": "all things", "player": "expert", "won": exactly(env), "exact": True})
    everything = envs.make("household", offered=envs.HouseholdFull.offered)
    records.append({"world": "household, all verbs offered", "split": "test", "player": "random",
                    **measure(everything, envs.random_player, "test", EPISODES)})
    path = Path(__file__).with_name("worlds.json")
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
