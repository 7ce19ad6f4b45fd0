"""Early Experience by self-reflection (arXiv 2510.08558), a baseline of ACT's paper: try actions,
say what they led to, imitate with that.

 1. At each state of the demonstrations the start policy proposes actions, as in act.py. They and
    the expert's are carried out, by replay.
 2. The model is shown what each of them led to, and writes why the expert's is best: its own words,
    neither filtered for truth nor taught.
 3. Imitation of those words and the expert's action, mixed with the plain demonstrations.

To read these numbers:
 1. --epochs are passes over the demonstrations and the reflections, a state at a time and
    --pair-batch-size of them per update, so that a pass takes more updates than one of `il`.
 2. A tiny model is told beforehand what a reflection looks like (what two random actions led to),
    so it is another base than act.py's.
 3. The expert's action is named in the prompt of step 2 alone, on the demonstrations' own states.
 4. --shots are the policy's alone: a reflection has no worked examples, nor a forced beginning.
It cannot be resumed.

    python docs/early_experience.py
    python docs/early_experience.py --candidates 4 --seed 1 --out-dir runs/early_experience-s1
"""

import dataclasses
import random
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import act  # noqa: E402
import common  # noqa: E402
import envs  # noqa: E402

REFLECT = ("This is what actions would lead to now. Say in your own words why the last one is the "
           "best. Then write it, word for word, between <action> and </action>.")


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


def reflection(prompts, state, actions, results):
    """The prompt of step 2; the last action is the one to be praised."""
    no_shots = dataclasses.replace(prompts, acts=[])
    *before, last = act.dialogue(no_shots, state["messages"])
    lines = [last["content"], *map(told, actions, results), REFLECT]
    return [*before, {**last, "content": "\n".join(lines)}]


def warmup(world, args):
    """act.warmup, and the form of a reflection: what two random actions led to."""
    rng, examples = random.Random("reflection"), []
    no_shots = act.Prompts(world.system, [], {})
    for seed in range(args.examples):
        observation, info = world.reset(seed=seed, options={"split": "train"})
        messages = [{"role": "user", "content": observation}]
        for _ in range(rng.randrange(6)):
            action = rng.choice(info["admissible"])
            observation, _, terminated, truncated, after = world.step(action)
            if terminated or truncated:
                break
            messages.append({"role": "assistant", "content": action})
            messages.append({"role": "user", "content": observation})
            info = after
        state = {"messages": messages, "seed": seed, "split": "train", "turn": len(messages) // 2}
        actions = rng.choices(info["admissible"], k=2)
        results = outcomes(world, state, actions)
        thought = " ".join(map(told, actions, results))
        reply = f"{thought} {act.tagged(actions[-1])}"
        asked = reflection(no_shots, state, actions, results)
        examples.append([*asked, {"role": "assistant", "content": reply}])
    examples += act.warmup(world, args)
    random.Random("mixed").shuffle(examples)
    return examples


def words_of(episode):
    """What a reflection says before its action; "" for nothing, or if it was cut off before it."""
    words, *rest = re.split(r"</?action\s*>", common.aloud(episode["text"]), maxsplit=1, flags=re.I)
    return words.strip() if rest or episode["complete"][0] else ""


def reflect(model, chat, world, args, prompts, states):
    """Steps 1 and 2 -> (states with the policy's `reply`, which is its own words and the expert's
    action; counts). A prompt that does not fit the context is left out, and counted."""
    pairs, counts = act.make_pairs(model, chat, args, prompts, states, ("pairs",))
    tried, asked, ids = {}, [], []
    for pair in pairs:
        tried.setdefault((pair["seed"], pair["turn"]), []).append(pair["candidate"])
    counts = Counter(counts, env_steps=0)
    for state in states:
        if (state["seed"], state["turn"]) not in tried:
            continue
        actions = [*tried[state["seed"], state["turn"]], state["expert"]]
        results = outcomes(world, state, actions)
        counts["env_steps"] += len(actions) * (state["turn"] + 1)
        prompt = chat.dialogue(reflection(prompts, state, actions, results))
        if len(prompt) + args.choice_tokens > model.max_context:
            counts["reflections too long"] += 1
            continue
        asked.append(state)
        ids.append(prompt)
    free = dataclasses.replace(args, prefill=False)
    said = act.answer(model, chat, free, ids, ("reflect",), args.choice_tokens)
    found = []
    for state, e in zip(asked, said):
        counts["tokens"] += sum(e["mask"])
        if words := words_of(e):
            found.append({**state, "reply": f"{words} {act.tagged(state['expert'])}"})
    counts.update({"reflections": len(found), "unreadable": len(asked) - len(found)})
    return found, dict(counts) | {"cut_choice": act.cut_share(said)}


def lesson(prompts, row):
    """A state's dialogue with its reply, which alone is imitated."""
    reply = {"role": "assistant", "content": row["reply"]}
    return act.only_last([*act.dialogue(prompts, row["messages"]), reply])


def main():
    """act.main with one stage of another kind."""
    args = common.parse_args(act.Args, act.TINY)
    common.check(not args.resume and not args.eval_only,
                 "the scripts under docs/ know neither --resume nor --eval-only")
    common.check(args.pipeline == act.Args.pipeline and not args.pairs,
                 "--pipeline and --pairs belong to act.py")
    if args.quick:
        args = act.quick(args)
    args = dataclasses.replace(args, pipeline="il", pairs="")
    world, _, demos, _ = act.check_args(args)
    run = common.Run("early_experience", args, common.run_directory("early_experience", args))
    model, chat = act.load(world, args, lambda: warmup(world, args), [REFLECT])
    prompts = act.make_prompts(world, args)
    run.start({"parameters": common.count_parameters(model), "start": common.fingerprint(model)})
    first = args.seed * 1_000_000_007
    demos = demos or act.demonstrations(args, "train", range(first, first + args.num_demos))
    demos = act.that_fit(model, chat, args, prompts, demos)
    common.check(demos, f"no state fits the context of {model.max_context}")
    splits = [split for split in ("test", "ood") if split in world.splits]
    warned = set()

    def evaluations():
        found, episode = {}, None
        for split in splits:
            found[split], played = act.evaluate(
                model, chat, args, prompts, split, args.eval_episodes)
            episode = episode or act.record(played[0])
            common.warn_cut(found[split], act.LIMITS, warned)
        return found, episode

    before, _ = evaluations()
    seconds = Counter()
    clock = common.Clock(seconds)
    reflections, counts = reflect(model, chat, world, args, prompts, demos)
    common.warn_cut(counts, act.LIMITS, warned)
    common.write_jsonl(run.dir / "reflections.jsonl", reflections)
    rows = [*reflections, *({**state, "reply": act.tagged(state["expert"])} for state in demos)]
    clock.lap("reflection")
    plan = act.schedule(args, "sft-choice", len(rows), 0)  # single states, as pairs are
    print(f"{args.env}: {len(demos)} expert states, {counts}; {len(plan)} updates")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.sft_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step, (batch, _) in enumerate(tqdm(plan, desc="early experience", dynamic_ncols=True), 1):
        for group in optimizer.param_groups:
            group["lr"] = args.sft_lr * min(1, step / 5)
        dialogues = [lesson(prompts, rows[i]) for i in batch]
        metrics = act.imitate(model, chat, args, optimizer, dialogues)
        run.log({"step": step, "stage": "1-early-experience", **metrics})
        if run.stopping:
            sys.exit(run.stopping)
    clock.lap("imitation")

    after, episode = evaluations()
    run.write_rollouts([episode])
    summary = summary_of(args, splits, before, after, demos, counts, len(plan), seconds)
    run.finish(summary, model, chat)
    print(f"\nafter\n{act.show(episode)}\n")
    for split in splits:
        numbers = [found[split]["success"] for found in (before, after)]
        print("{}: {:.3f} before, {:.3f} after (n {})".format(split, *numbers, args.eval_episodes))


def summary_of(args, splits, before, after, demos, counts, updates, seconds):
    """summary.json."""
    ends = {}
    for name, player in ("random", envs.random_player), ("expert", envs.expert_player):
        mean, se = envs.mean_score(envs.make(args.env), player, args.eval_episodes, key="won")
        ends[name] = {"success": mean, "se": se}
    for when, found in ("before", before), ("after", after):
        for split in splits:
            name = when if split == "test" else f"{when}_{split}"
            ends[name] = {key: found[split][key] for key in ("success", "se")}
    return {
        "script": "docs/early_experience.py", "method": "act", "arm": "early-experience",
        "env": args.env, "model": args.model, "seed": args.seed, "split": "test",
        "eval_episodes": args.eval_episodes, **ends, "expert_states": len(demos),
        "pair_counts": counts, "train_episodes": len({state["seed"] for state in demos}),
        "env_steps": counts["env_steps"], "generated_tokens": counts["tokens"],
        "gradient_steps": updates, "seconds": round(sum(seconds.values()), 1),
        "peak_memory_bytes": common.peak_memory_bytes(args.device),
        "device": common.device_name(args.device), "git_commit": common.git_commit()}


if __name__ == "__main__":
    main()
