"""What a chat model does in the four scripts before any training: python docs/zero_shot.py SCRIPT [its flags] --out-dir OUT

    python docs/zero_shot.py self_guide --model smollm2 --shots 2 --prefill --show-actions --eval-episodes 20 \\
        --max-new-tokens 24 --rate-tokens 48 --out-dir runs/zero-shot

Plays --eval-episodes episodes of `test` and asks every part of the script at the states that were met.
OUT/SCRIPT-ENV.json holds: `understood`, the share of actions that the world understood; `parts`, of each
part how many replies were read and how many the limit cut; `samples`, up to 50 of its replies; three
whole `episodes`. Nothing is trained.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import envs

SAMPLES = 50


def self_guide(script, args):
    """Guided episodes, where step and rating alternate, and plain ones."""
    world = script.check_args(args)
    model, chat = script.load(world, args)
    found = {}
    for name, guided in ("plain", False), ("guided", True):
        played = script.rollout(model, chat, args, "test", range(args.eval_episodes), guided=guided,
                                temperature=args.eval_temperature, stream=("zero-shot",))
        found[name] = script.watch(played)
    ratings = [text for episode in played for who, text in episode.said if who == "rate"]
    labels = [label for episode in played for label in episode.labels]
    cut = sum(episode.cut["rate"] for episode in played)
    return {
        "understood": 1 - found["plain"]["invalid"], "understood_guided": 1 - found["guided"]["invalid"],
        "success": found["plain"]["success"], "success_guided": found["guided"]["success"],
        "parts": {"rate": part(len(ratings), len(labels) - labels.count(None), cut)},
        "shares": {name: found["guided"][f"label_{name}"] for name in script.LABELS} if labels else {},
        "samples": {"rate": ratings[:SAMPLES]},
        "episodes": [script.record(episode) for episode in played[:3]]}


def part(asked, read, cut):
    """How a part did: the number of replies, the share that was read, the share that the limit cut."""
    return {"asked": asked, "read": read / max(1, asked), "cut": cut / max(1, asked)}


def main():
    name = sys.argv[1] if sys.argv[1:] else ""
    if name not in globals() or name not in ("self_guide", "nlac", "act", "reagent"):
        common.refuse("the first argument is one of self_guide, nlac, act, reagent")
    script = __import__(name)
    args = common.parse_args(script.Args, script.TINY, sys.argv[2:])
    found = globals()[name](script, args)
    told = {key: getattr(args, key) for key in ("model", "env", "shots", "prefill", "show_actions", "max_new_tokens", "eval_temperature")}
    found = {"script": name, **told, "n": args.eval_episodes, "device": common.device_name(args.device),
             **found}
    out = Path(args.out_dir or "runs/zero-shot")
    out.mkdir(parents=True, exist_ok=True)
    variant = f"{args.shots}{'-prefill' * args.prefill}{'-list' * args.show_actions}"
    path = out / f"{name}-{envs.ALIASES.get(args.env, args.env).replace(':', '-')}-{variant}.json"
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    short = {key: value for key, value in found.items() if key not in ("samples", "episodes")}
    print(json.dumps(short), flush=True)


if __name__ == "__main__":
    main()
