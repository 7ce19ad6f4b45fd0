"""Players' scores in worlds, behind the tables of docs/worlds.md.

    python docs/world_scores.py                    our own worlds, into docs/worlds.json (minutes)
    python docs/world_scores.py rg:NAME ...        these alone; what is known of others stays
    python docs/world_scores.py sciworld:find-plant --player expert --episodes 20 \\
        >> docs/other_worlds.jsonl                 one player's line, of a world that is slow

Per world, split and player: mean score, share won, their standard errors; turns and the longest
episode; the share of turns that the world did not understand; seconds, of a processor (this process
and those it started) and of the clock, with the load of the machine at the end. Episodes are the
seeds 0 .. n-1 of the split. Players are random, expert and those that the file of a world has.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import envs

OWN = [*envs.WORLDS, *envs.ALIASES, "twenty_questions:listed"]
SEARCHERS = "guess", "hasty", "sloppy"


def cpu_seconds():
    """Of this process and of its children that have ended."""
    of = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(sum(resource.getrusage(which)[:2]) for which in of)


def measure(name, split, player, episodes, **options):
    """What `player`, a name, does in a world."""
    start, busy = time.monotonic(), cpu_seconds()
    env = envs.make(name, **options)
    own = sys.modules[type(env).__module__]
    play = getattr(own, f"{player}_player", None) or getattr(envs, f"{player}_player", None)
    if play is None:
        raise ValueError(f"{name} has no player {player}")
    played = [envs.run_episode(env, play, seed, split) for seed in range(episodes)]
    env.close()
    record = {"world": name, "split": split, "player": player, "episodes": episodes}
    for key in "score", "won":
        mean, se = envs.mean_and_error([float(episode[key]) for episode in played])
        record |= {key: round(mean, 4), f"{key}_se": round(se, 4)}
    turns = [episode["turns"] for episode in played]
    return record | {
        "turns": round(sum(turns) / len(turns), 2),
        "longest": max(turns),
        "invalid": round(sum(episode["invalid"] for episode in played) / sum(turns), 4),
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(cpu_seconds() - busy, 1),
        "load": round(os.getloadavg()[0], 1)}


def all_players(name, episodes):
    """Records of a world: every player in `test` and `ood`."""
    env, records = envs.make(name), []
    players = ["random"]
    players += ["expert"] * (type(env).expert is not envs.World.expert)
    players += SEARCHERS * isinstance(env, envs.Search)
    for split in "test", "ood":
        for player in players if split in env.splits else ():
            records.append(measure(name, split, player, episodes))
    # twenty questions can say exactly how often its expert wins, where nothing else is drawn
    exactly = getattr(sys.modules[type(env).__module__], "expert_success", None)
    if exactly and name in envs.ALIASES:
        records.append({"world": name, "split": "all things", "player": "expert",
                        "won": exactly(env), "exact": True})
    env.close()
    if name == "household":
        every = measure(name, "test", "random", episodes, offered=envs.HouseholdFull.offered)
        records.append(every | {"world": f"{name}, all verbs offered"})
    return records


def main():
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("worlds", nargs="*", default=OWN)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--player", help="this one alone, printed and not kept")
    parser.add_argument("--split", default="test", help="of --player")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("worlds.json"))
    try:
        write_scores(parser.parse_args())
    except ValueError as error:  # no such world or player
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def write_scores(args):
    """Prints the line of --player, or keeps and prints all players' records."""
    if args.player:
        for name in args.worlds:
            found = measure(name, args.split, args.player, args.episodes)
            print(json.dumps(found), flush=True)
        return
    records = [record for name in args.worlds for record in all_players(name, args.episodes)]
    measured = {record["world"] for record in records}
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    records = [record for record in known if record["world"] not in measured] + records
    text = ",\n".join(json.dumps(record) for record in records)
    args.out.write_text(f"[\n{text}\n]\n", encoding="utf-8")
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
