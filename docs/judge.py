"""What a judge of Reagent is worth: its scores against the program's, lucky answers, its words.

Of finished runs of reagent.py, on trajectories of the `test` split that no judge has seen: of
players, and of the run's agent after its training. A lucky answer is right although a page was
skipped or the value had not been read; an outcome reward cannot tell it from a sound one.

    python docs/judge.py runs/reagent-search-s0  # writes judge.json there, prints it and examples
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import envs
import reagent

LUCK = {"skipped lookup", "unsupported guess"}  # of an answer that is right


def state_of(run) -> reagent.State:
    """A finished run's agent after training, and its judge: trained, of --rrm, or --model."""
    common.check((run / "args.json").is_file(), f"{run}: no run of reagent.py there")
    try:
        args = reagent.Args(**json.loads((run / "args.json").read_text(encoding="utf-8"))["args"])
    except (ValueError, KeyError, TypeError) as error:
        why = f"not the settings of a run of reagent.py ({type(error).__name__}: {error})"
        common.refuse(f"{run / 'args.json'}: {why}")
    rrm = args.rrm
    common.check(args.variant != "none", f"{run}: it had no judge")
    if reagent.trains_judge(args):
        rrm = str(run / "rrm")
    for path, what in (rrm, "judge"), (str(run / "model"), "trained agent"):
        missing = path.startswith(str(run)) and not (Path(path) / "config.json").is_file()
        common.check(not missing, f"{run}: its {what} is missing ({Path(path).name}/)")
    args = dataclasses.replace(args, device=common.default_device(), rrm=rrm)
    world = envs.make(args.env, show_actions=args.show_actions)
    how = {key: getattr(args, key) for key in ("device", "dtype", "thinking", "max_context")}
    agent = common.load(str(run / "model"), **how)
    judge = common.load(rrm, option="--rrm", **how) if rrm else reagent.load(world, args)
    return reagent.State(args, world, None, reagent.Learner(*agent), reagent.Learner(*judge))


def judged_trajectories(state, count):
    """{"players": episodes, "agent": as many}, judged."""
    seeds = range(20_000, 20_000 + 2 * count)
    players, agent = reagent.mixed_episodes(state, "test", seeds, ("judge",))
    found = {"players": players, "agent": agent}
    for who, episodes in found.items():
        reagent.review(state, episodes, ("judge", who))
    return found


def reference_score(episode):
    """What the program says that a judge is trained by."""
    return reagent.annotate(episode.flaws)[2]


def fifths(episodes):
    """Per fifth of the judge's score: how many, and the means of score, reference and success."""
    rows = []
    for i in range(5):
        some = [episode for episode in episodes if min(int(5 * episode.judge_score), 4) == i]
        rows.append({"episodes": len(some),
                     "score": reagent.mean_or_none([e.judge_score for e in some]),
                     "reference": reagent.mean_or_none([reference_score(e) for e in some]),
                     "success": reagent.mean_or_none([e.won for e in some])})
    return rows


def is_lucky(episode):
    """Whether a right answer had no ground."""
    return episode.won and bool(LUCK & {flaw.name for flaw in episode.flaws})


def lucky(episodes):
    """The scores of right answers, sound and lucky ones; how often the judge tells them apart."""
    won = [episode for episode in episodes if episode.won]
    scored = [(episode.judge_score, not is_lucky(episode)) for episode in won]
    found = {"auc": reagent.auroc(scored)}
    for name, side in ("sound", False), ("lucky", True):
        scores = [episode.judge_score for episode in won if is_lucky(episode) == side]
        found[name] = {"episodes": len(scores), "score": reagent.mean_or_none(scores)}
    return found


def numbers_of(episodes):
    """What judge.json keeps."""
    readable = common.mean(bool(reagent.parse_judgement(e.said[-1][1])) for e in episodes)
    return {"episodes": len(episodes), "readable": readable, "fifths": fifths(episodes),
            **lucky(episodes)}


def show_examples(found):
    """Prints a trajectory of each kind, and what the judge says to it."""
    players = found["players"]
    for title, some in (
            ("sound", [e for e in players if e.won and not e.flaws]),
            ("lucky", [e for e in players if is_lucky(e)]),
            ("lost", [e for e in players if not e.won and e.flaws]),
            ("lost by the agent", [e for e in found["agent"] if not e.won])):
        for episode in some[:1]:
            scores = f"{episode.judge_score:.1f} (reference: {reference_score(episode):.1f})"
            print(f"\n{title}, {scores}\n{common.show(vars(episode), width=400)}")


def main():
    """The command line above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--episodes", type=int, default=500)
    given = parser.parse_args()
    for run in given.run:
        found = judged_trajectories(state_of(run), given.episodes)
        numbers = {who: numbers_of(episodes) for who, episodes in found.items()}
        (run / "judge.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        print(f"{run}: {json.dumps(numbers)}")
        show_examples(found)


if __name__ == "__main__":
    main()
