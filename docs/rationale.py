"""The rationale test of ACT's paper: does the choice of two actions hang on the thought before it?

Of a finished run of act.py, on its held-out states, both orders of each pair, greedily:
free: the model thinks and chooses; removed: it must choose at once; wrong: it chooses behind a
thought of its own about another state. (--prefill of the run plays no part.)

    python docs/rationale.py runs/act-household-s0      # of the first stage; writes rationale.json
    python docs/rationale.py runs/act-household-s0 --stage 2-il
"""

import argparse
import dataclasses
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import act  # noqa: E402
import common  # noqa: E402


def accuracy(model, chat, args, prompts, thoughts, pairs, orders):
    """How often the expert's action is chosen, when each reply has to begin with a thought (None:
    with nothing). Returns (share, replies)."""
    starts = ["" if thought is None else f"{thought}{act.TAG}" for thought in thoughts]
    ids = [prompt + (chat.encode(start) if start else [])
           for prompt, start in zip(prompts, starts)]
    said = act.answer(model, chat, args, ids, ("rationale",), args.choice_tokens, temperature=0)
    texts, right = [], []
    for e, start, pair, order in zip(said, starts, pairs, orders):
        e = {**e, "text": start + e["text"]}
        texts.append(e["text"])
        right.append(act.paid_choice(e, pair, order)[1] == "right")
    return common.mean(right), texts


def settings_of(run):
    """The Args of a run of act.py."""
    common.check((run / "args.json").is_file(), f"{run}: no run of act.py there")
    try:
        args = act.Args(**json.loads((run / "args.json").read_text(encoding="utf-8"))["args"])
    except (ValueError, KeyError, TypeError) as error:
        common.refuse(f"{run / 'args.json'}: not the settings of a run of act.py "
                      f"({type(error).__name__}: {error})")
    return dataclasses.replace(
        args, demos="", pairs="", eval_only=False, resume=False, prefill=False)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--stage", default="", help="a directory in RUN; default: the first")
    given = parser.parse_args()
    args = settings_of(given.run)
    world, stages, *_ = act.check_args(args)
    stage = given.stage or f"1-{stages[0]}"
    common.check((given.run / stage / "config.json").is_file(),
                 f"{given.run / stage}: no model there")

    start, chat = act.load(world, args)  # who proposed the other actions
    prompts = act.make_prompts(world, args)
    held_out = act.that_fit(start, chat, args, prompts, act.held_out_states(args))
    one_each = dataclasses.replace(args, candidates=1)
    pairs, _ = act.make_pairs(start, chat, one_each, prompts, held_out, ("held out", "pairs"))
    common.check(len(pairs) > 1, f"{given.run}: fewer than two held-out pairs")
    model, chat = act.load(world, dataclasses.replace(args, model=str(given.run / stage)))
    states, orders = len(pairs), [False] * len(pairs) + [True] * len(pairs)
    pairs = pairs * 2
    ids = [chat.dialogue(act.question(prompts, pair, order)) for pair, order in zip(pairs, orders)]

    free, texts = accuracy(model, chat, args, ids, [None] * len(pairs), pairs, orders)
    thoughts = [re.split(r"<action\s*>", text, flags=re.I)[0] for text in texts]
    shift = random.Random(0).randrange(1, states)
    others = [i // states * states + (i + shift) % states for i in range(len(pairs))]
    wrong = [thoughts[i] for i in others]  # of another state, in the same order
    found = {"stage": stage, "choices": len(pairs), "free": free,
             "thought": common.mean(bool(thought.strip()) for thought in thoughts),
             "removed": accuracy(model, chat, args, ids, [""] * len(pairs), pairs, orders)[0],
             "wrong": accuracy(model, chat, args, ids, wrong, pairs, orders)[0]}
    (given.run / "rationale.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
