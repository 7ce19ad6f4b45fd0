"""Early Experience by self-reflection (arXiv 2510.08558), a baseline of ACT's paper: try actions,
say what they led to, imitate with that.

 1. At each state of the demonstrations the start policy proposes actions, as in act.py. They and
    the expert's are carried out, by replay.
 2. The model is shown what each of them led to, and writes why the expert's is best: its own words,
    neither filtered for truth nor taught.
 3. Imitation of those words and the expert's action, mixed with the plain demonstrations.

To read these numbers:
 1. --epochs are passes over the demonstrations and the reflections, a state at a time and
    --pair-batch-size of them per step, so that a pass takes more steps than one of `il`.
 2. A tiny model is told beforehand what a reflection looks like (what two random actions led to),
    so it is another base than act.py's.
 3. The expert's action is named in the prompt of step 2 alone, on the demonstrations' own states.
 4. --shots are the policy's alone: a reflection has no worked examples, nor a forced beginning.
It is a stage of act.py, whose data, evaluation and files it has; it cannot be resumed.

    python docs/early_experience.py
    python docs/early_experience.py --candidates 4 --seed 1 --out-dir runs/early_experience-s1
"""

import dataclasses
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from act_controls import only_last

import act
import common
import envs

REFLECT = ("This is what actions would lead to now. Say in your own words why the last one is the "
           "best. Then write it, word for word, between <action> and </action>.")


@dataclass
class Args(act.Args):
    pair_batch_size: int = common.flag(16, "states per step (not in the paper)")
    pipeline: str = common.flag("early-experience", "fixed")


def outcomes(world, state, actions):
    """What each action leads to in a state, by replay of its episode: observations, in the order of
    `actions`. A replay takes as many environment steps as the state is turns old, and one."""
    said = [m["content"] for m in state["messages"]]
    found = []
    for action in actions:
        observation, _ = world.reset(seed=state["seed"], options={"split": state["split"]})
        for earlier in said[1::2]:
            observation = world.step(earlier)[0]
        common.check(observation == said[-1], f"seed {state['seed']}, turn {state['turn']}: "
                                              "the world does not repeat itself")
        found.append(world.step(action)[0])
    return found


def told(action, result):
    """An action and what it led to, in one line."""
    return f"{action}: {' '.join(envs.bare(result).split())}"


def reflection(world, args, state, actions, results):
    """The prompt of step 2; the last action is the one to be praised."""
    no_shots = dataclasses.replace(args, shots=0, prefill=False)
    *before, last = act.dialogue(world, no_shots, state["messages"])
    lines = [last["content"], *map(told, actions, results), REFLECT]
    return [*before, act.user("\n".join(lines))]


def warmup(world, args):
    """act.warmup, and the form of a reflection: what two random actions led to."""
    rng, examples = random.Random("reflection"), []
    for seed in range(args.examples):
        observation, info = world.reset(seed=seed, options={"split": "train"})
        messages = [act.user(observation)]
        for _ in range(rng.randrange(6)):
            action = rng.choice(info["admissible"])
            observation, _, terminated, truncated, after = world.step(action)
            if terminated or truncated:
                break
            messages.append(act.assistant(action))
            messages.append(act.user(observation))
            info = after
        state = {"messages": messages, "seed": seed, "split": "train", "turn": len(messages) // 2}
        actions = rng.choices(info["admissible"], k=2)
        results = outcomes(world, state, actions)
        thought = " ".join(map(told, actions, results))
        reply = f"{thought} {act.written(actions[-1])}"
        asked = reflection(world, args, state, actions, results)
        examples.append([*asked, act.assistant(reply)])
    examples += act.warmup(world, args)
    random.Random("mixed").shuffle(examples)
    return examples


def answer(job, prompts):
    """What the model says to each prompt: replies without a forced beginning, never trained on."""
    args, chat = job.args, job.chat
    said = common.generate(
        job.model, chat, [chat.dialogue(messages) for messages in prompts],
        max_new_tokens=args.choice_tokens, temperature=args.temperature,
        seeds=[common.row_seed(args.seed, "reflect", n) for n in range(len(prompts))],
        rows=args.rollout_batch_size)
    return [act.Reply(text, complete, ids, [1] * len(ids))
            for text, complete, ids in zip(said.texts, said.complete, said.ids)]


def words_of(reply):
    """What a reflection says before its action; "" for nothing, or if it was cut off before it."""
    words, *rest = re.split(r"</?action\s*>", common.aloud(reply.text), maxsplit=1, flags=re.I)
    return words.strip() if rest or reply.complete else ""


def reflect(job):
    """Steps 1 and 2 -> (states with the policy's `reply`, which is its own words and the expert's
    action; counts). A prompt that does not fit the context is left out, and counted."""
    args, tried, asked, prompts = job.args, {}, [], []
    counts = {"tokens": 0, "env_steps": 0, "reflections too long": 0}
    for pair in job.pairs:
        tried.setdefault((pair["seed"], pair["turn"]), []).append(pair["candidate"])
    for each in job.states:
        if (each["seed"], each["turn"]) not in tried:
            continue
        actions = [*tried[each["seed"], each["turn"]], each["expert"]]
        results = outcomes(job.world, each, actions)
        counts["env_steps"] += len(actions) * (each["turn"] + 1)
        prompt = reflection(job.world, args, each, actions, results)
        if len(job.chat.dialogue(prompt)) + args.choice_tokens > job.model.max_context:
            counts["reflections too long"] += 1
            continue
        asked.append(each)
        prompts.append(prompt)
    said = answer(job, prompts)
    found = []
    for each, reply in zip(asked, said):
        counts["tokens"] += sum(reply.mask)
        if words := words_of(reply):
            found.append({**each, "reply": f"{words} {act.written(each['expert'])}"})
    counts |= {"reflections": len(found), "unreadable": len(asked) - len(found),
               "cut_choice": common.mean(not reply.complete for reply in said)}
    return found, counts


def lesson(world, args, row):
    """A state's dialogue with its reply, which alone is imitated."""
    return only_last([*act.dialogue(world, args, row["messages"]), act.assistant(row["reply"])])


def early_experience(job):
    """The stage: reflections, and imitation of them among the plain demonstrations."""
    args, run = job.args, job.run
    reflections, counts = reflect(job)
    common.write_jsonl(run.dir / "reflections.jsonl", reflections)
    run.count(tokens=counts["tokens"], env_steps=counts["env_steps"])
    plain = [{**each, "reply": act.written(each["expert"])} for each in job.states]
    print(f"{len(plain)} expert states, {counts}")
    rows = [*reflections, *plain]
    for step, batch in act.stage_steps(job, rows, args.pair_batch_size, args.sft_lr):
        dialogues = [lesson(job.world, args, row) for row in batch]
        metrics = act.imitate(job.model, job.chat, args, job.optimizer, dialogues)
        act.end_step(job, step, metrics | {f"reflections_{name}": n for name, n in counts.items()})


def load(world, args):
    """act.load with another corpus."""
    return LOAD(world, args, lambda: warmup(world, args), [REFLECT])


LOAD = act.load


def main():
    """act.main with one stage of another kind."""
    args = common.parse_args(Args, act.TINY)
    common.check(not args.resume, "docs/early_experience.py does not know --resume")
    common.check(args.pipeline == Args.pipeline, "--pipeline belongs to act.py")
    act.Args, act.load = Args, load
    act.STAGES |= {Args.pipeline: early_experience}
    act.PAIRED |= {Args.pipeline}
    act.AT_LEAST |= {"pair_batch_size": 1}
    act.main()


if __name__ == "__main__":
    main()
