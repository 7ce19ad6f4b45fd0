"""The rationale test of ACT's paper: does the choice between two actions hang on what was thought before it?

Of a finished run of act.py, on its held-out states, both orders of each pair, greedily:
free: the model thinks and chooses; removed: it must choose at once; wrong: it chooses behind a thought of its own about another state.

    python docs/rationale.py runs/act-household-s0             # the model behind the first stage; writes rationale.json there
    python docs/rationale.py runs/act-household-s0 --stage 2-il
"""

import argparse
import dataclasses
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import act  # noqa: E402
import common  # noqa: E402


def accuracy(model, chat, args, prompts, thoughts, pairs):
    """How often the expert's action is chosen, when each reply has to begin with a thought (None: with nothing)."""
    starts = [prompt + (chat.encode(f"{thought}<action>") if thought is not None else []) for prompt, thought in zip(prompts, thoughts)]
    said = act.answer(model, chat, args, starts, ("rationale",), temperature=0)
    texts = [e["text"] if thought is None else f"<action>{e['text']}" for e, thought in zip(said, thoughts)]
    right = [act.choice_reward(text, pair)[1] == "right" for text, pair in zip(texts, pairs)]
    return common.mean(right), texts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--stage", default="", help="a directory in RUN; default: of the first stage")
    given = parser.parse_args()
    common.check((given.run / "args.json").is_file(), f"{given.run}: no run of act.py there")
    try:
        args = act.Args(**json.loads((given.run / "args.json").read_text(encoding="utf-8"))["args"])
    except (ValueError, KeyError, TypeError) as error:
        common.refuse(f"{given.run / 'args.json'}: not the settings of a run of act.py ({type(error).__name__}: {error})")
    args = dataclasses.replace(args, demos="", pairs="", eval_only=False, resume=False)
    world, stages, *_ = act.check_args(args)
    stage = given.stage or f"1-{stages[0]}"
    common.check((given.run / stage / "config.json").is_file(), f"{given.run / stage}: no model there")

    start, chat = act.load(world, args)  # who proposed the other actions
    held_out = act.demonstrations(args, "test", range(max(2, args.eval_episodes // 5)))
    pairs, _ = act.make_pairs(start, chat, world, dataclasses.replace(args, candidates=1), held_out, ("held out", "pairs"))
    common.check(len(pairs) > 1, f"{given.run}: fewer than two held-out pairs")
    model, chat = common.load(str(given.run / stage), device=args.device, dtype=args.dtype)
    pairs, orders = pairs * 2, [False] * len(pairs) + [True] * len(pairs)
    prompts = [chat.dialogue(act.question(world, pair, order)) for pair, order in zip(pairs, orders)]

    free, texts = accuracy(model, chat, args, prompts, [None] * len(pairs), pairs)
    thoughts = [text.split("<action>")[0] for text in texts]
    states = len(pairs) // 2
    shift = random.Random(0).randrange(1, states)
    wrong = [thoughts[i // states * states + (i + shift) % states] for i in range(len(pairs))]  # of another state, in the same order
    found = {"stage": stage, "choices": len(pairs), "thought": common.mean(bool(thought.strip()) for thought in thoughts), "free": free,
             "removed": accuracy(model, chat, args, prompts, [""] * len(pairs), pairs)[0],
             "wrong": accuracy(model, chat, args, prompts, wrong, pairs)[0]}
    (given.run / "rationale.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
