"""The rationale test of ACT's paper: does the choice of two actions hang on the thought before it?

Of a finished run of act.py, on its held-out states, both orders of each pair, greedily:
free: the model thinks and chooses, choice_first and choice_second by the place of the right action;
removed: it must choose at once; wrong: it chooses behind a thought of its own about another state;
next_action: how often it does as the expert. (--prefill of the run plays no part.)

    python docs/rationale.py runs/act-household-s0      # of the first stage; writes rationale.json
    python docs/rationale.py runs/act-household-s0 --stage model
"""

import argparse
import dataclasses
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import act
import common


def accuracy(job, prompts, thoughts, pairs):
    """How often the expert's action is chosen, when each reply has to begin with a thought (None:
    with nothing). Returns (share, replies)."""
    starts = ["" if thought is None else f"{thought}{act.TAG}" for thought in thoughts]
    ids = [job.chat.dialogue(prompt, start) for prompt, start in zip(prompts, starts)]
    said = common.generate(
        job.model, job.chat, ids, max_new_tokens=job.args.choice_tokens, temperature=0,
        seeds=range(len(ids)), rows=job.args.rollout_batch_size)
    replies = []
    for start, text, complete, pair in zip(starts, said.texts, said.complete, pairs):
        reply = act.Reply(start + text, complete, [], [])
        reply.outcome = act.outcome_of(job.world, reply, pair)
        replies.append(reply)
    return common.mean(reply.outcome == "right" for reply in replies), replies


def settings_of(run):
    """The Args of a run of act.py (or docs/act_controls.py), and its first stage's directory."""
    common.check((run / "args.json").is_file(), f"{run}: no run of act.py there")
    known = {field.name for field in dataclasses.fields(act.Args)}
    try:
        given = json.loads((run / "args.json").read_text(encoding="utf-8"))["args"]
        args = act.Args(**{name: given[name] for name in known})
    except (ValueError, KeyError, TypeError) as error:
        common.refuse(f"{run / 'args.json'}: not the settings of a run of act.py "
                      f"({type(error).__name__}: {error})")
    plain = dict(demos="", pairs="", pipeline="il", eval_only=False, resume=False, prefill=False)
    first, *others = args.pipeline.split(",")
    return dataclasses.replace(args, **plain), f"1-{first.strip()}" if others else "model"


def held_out_states(args, count):
    """The first states of the expert's episodes on `test`, which no stage has seen."""
    states, seed = [], 0
    while len(states) < count:
        states += act.states_of(act.demonstrations(args, "test", [seed]))
        seed += 1
    return states[:count]


def findings(job, states, pairs):
    """What the model of `job` does at these states and pairs."""
    both = pairs + [pair | {"expert_second": True} for pair in pairs]
    prompts = [act.question(job.world, job.args, pair) for pair in both]
    free, replies = accuracy(job, prompts, [None] * len(both), both)
    right = [reply.outcome == "right" for reply in replies]
    thoughts = [re.split(r"<action\s*>", reply.text, flags=re.I)[0] for reply in replies]
    removed, _ = accuracy(job, prompts, [""] * len(both), both)
    wrong, _ = accuracy(job, prompts, of_other_states(thoughts, len(pairs)), both)
    acted = act.ask(job, states, ("rationale",))
    return {
        "choices": len(both),
        "free": free,
        "choice_first": common.mean(right[:len(pairs)]),
        "choice_second": common.mean(right[len(pairs):]),
        "thought": common.mean(bool(thought.strip()) for thought in thoughts),
        "removed": removed,
        "wrong": wrong,
        "next_action": common.mean(reply.outcome == "right" for reply in acted)}


def of_other_states(thoughts, count):
    """Each thought moved to another state, within the same order of the two actions."""
    shift = random.Random(0).randrange(1, count)
    first, second = thoughts[:count], thoughts[count:]
    return first[shift:] + first[:shift] + second[shift:] + second[:shift]


def main():
    """The command line above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--stage", default="", help="a directory in RUN; default: the first's")
    parser.add_argument("--states", type=int, default=200, help="of the expert on `test`")
    given = parser.parse_args()
    args, first = settings_of(given.run)
    world, *_ = act.check_args(args)
    stage = given.run / (given.stage or first)
    common.check((stage / "config.json").is_file(), f"{stage}: no model there")

    model, chat = act.load(world, args)  # the start policy proposed the other actions
    job = act.Job(args, world, chat, model)
    args.candidates = 1
    states = act.that_fit(job, held_out_states(args, given.states))
    pairs = act.that_fit(job, act.pairs_of(world, act.propose(job, states)))
    common.check(len(pairs) > 1, f"{given.run}: fewer than two held-out pairs")
    job.model, _ = act.load(world, dataclasses.replace(args, model=str(stage)))
    args.temperature = 0.0
    found = {"stage": stage.name} | findings(job, states, pairs)
    (given.run / "rationale.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
