"""Early Experience by self-reflection (arXiv 2510.08558), a baseline of ACT's paper: try actions, say what they led to, imitate with that.

 1. At each state of the demonstrations the start policy proposes actions, as in act.py. They and the expert's are carried out, by replay.
 2. The model is shown what each of them led to, and writes why the expert's is best: its own words, neither filtered for truth nor taught.
 3. Imitation of those words and the expert's action, mixed with the plain demonstrations.

To read these numbers:
 1. --epochs are passes over the demonstrations and the reflections, so that a pass takes more updates than one of `il`.
 2. A tiny model is told beforehand what a reflection looks like (what two random actions led to), so it is another base than act.py's.
 3. The expert's action is named in the prompt of step 2 alone, on the demonstrations' own states.
It cannot be resumed.

    python docs/early_experience.py
    python docs/early_experience.py --candidates 4 --seed 1 --out-dir docs/results/act-early-experience-s1
"""

import dataclasses
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import act  # noqa: E402
import common  # noqa: E402
import envs  # noqa: E402

REFLECT = "This is what actions would lead to now. Say why the last one is the best, then write it as <action>the action</action>."


def outcomes(world, state, actions):
    """What each action leads to in a state, by replay of its episode: observations, in the order of `actions`. A replay takes as many
    environment steps as the state is turns old, and one."""
    said = [m["content"] for m in state["messages"]]
    found = []
    for action in actions:
        observation, _ = world.reset(seed=state["seed"], options={"split": state["split"]})
        for earlier in said[1::2]:
            observation = world.step(earlier)[0]
        common.check(observation == said[-1], f"seed {state['seed']}, turn {state['turn']}: the world does not repeat itself")
        found.append(world.step(action)[0])
    return found


def reflection(world, state, actions, results):
    """The prompt of step 2; the last action is the one to be praised."""
    *before, last = act.dialogue(world, state["messages"])
    told = "\n".join(f"{action}: {act.event(result)}" for action, result in zip(actions, results))
    return [*before, {**last, "content": f"{last['content']}\n{REFLECT}\n{told}"}]


def warmup(world, args):
    """act.warmup, and the form of a reflection: what two random actions led to."""
    rng, examples = random.Random("reflection"), []
    for seed in range(args.examples):
        observation, info = world.reset(seed=seed, options={"split": "train"})
        messages = [{"role": "user", "content": observation}]
        for _ in range(rng.randrange(6)):
            action = rng.choice(info["admissible"])
            observation, _, terminated, truncated, after = world.step(action)
            if terminated or truncated:
                break
            messages += [{"role": "assistant", "content": action}, {"role": "user", "content": observation}]
            info = after
        state = {"messages": messages, "seed": seed, "split": "train", "turn": len(messages) // 2}
        actions = rng.choices(info["admissible"], k=2)
        results = outcomes(world, state, actions)
        thought = " ".join(f"{action}: {act.event(result)}" for action, result in zip(actions, results))
        examples.append([*reflection(world, state, actions, results),
                         {"role": "assistant", "content": f"{thought} {act.tagged(actions[-1])}"}])
    examples += act.warmup(world, args)
    random.Random("mixed").shuffle(examples)
    return examples


def reflect(model, chat, world, args, states):
    """Steps 1 and 2 -> (states with the policy's `reply`: own words and the expert's action; counts)."""
    pairs, counts = act.make_pairs(model, chat, world, args, states, ("pairs",))
    tried, asked = {}, []
    for pair in pairs:
        tried.setdefault((pair["seed"], pair["turn"]), []).append(pair["candidate"])
    asked = [state for state in states if (state["seed"], state["turn"]) in tried]
    prompts = []
    for state in asked:
        actions = [*tried[state["seed"], state["turn"]], state["expert"]]
        prompts.append(chat.dialogue(reflection(world, state, actions, outcomes(world, state, actions))))
        counts["env_steps"] = counts.get("env_steps", 0) + len(actions) * (state["turn"] + 1)
    longest = max(map(len, prompts), default=0)
    common.check(longest + args.max_new_tokens <= model.config.max_position_embeddings,
                 f"the longest prompt has {longest} tokens and --max-new-tokens is {args.max_new_tokens}: "
                 f"beyond the model's context of {model.config.max_position_embeddings}")
    said = act.answer(model, chat, args, prompts, ("reflect",))
    told = []
    for state, e in zip(asked, said):
        words = e["text"].split("<action>")[0].strip()
        counts["tokens"] += sum(e["mask"])
        if words and "<" not in words:  # nothing said, or tags in a muddle: no reflection
            told.append({**state, "reply": f"{words} {act.tagged(state['expert'])}"})
    return told, counts | {"reflections": len(told), "unreadable": len(asked) - len(told)}


def main():
    """act.main with one stage of another kind."""
    args = common.parse_args(act.Args)
    common.check(not args.resume and not args.eval_only, "the scripts under docs/ know neither --resume nor --eval-only")
    common.check(args.pipeline == act.Args.pipeline and not args.pairs, "--pipeline and --pairs belong to act.py")
    if args.quick:
        args = dataclasses.replace(args, steps=3, eval_episodes=16, num_demos=4, examples=400)
    args = dataclasses.replace(args, pipeline="il", pairs="")
    world, _, demos, _ = act.check_args(args)
    run = common.Run("early_experience", args, args.out_dir or f"runs/early_experience-{args.env.replace(':', '-')}-s{args.seed}")
    model, chat = act.load(world, args, lambda: warmup(world, args), [REFLECT])
    run.start({"parameters": common.count_parameters(model), "start": common.fingerprint(model)})
    seconds = Counter()
    demos = demos or act.demonstrations(args, "train", range(args.seed * 1_000_000_007, args.seed * 1_000_000_007 + args.num_demos))
    splits = [split for split in ("test", "ood") if split in world.splits]

    def evaluations():
        found = {split: act.evaluate(model, chat, args, split, args.eval_episodes) for split in splits}
        return {split: numbers for split, (numbers, _) in found.items()}, found["test"][1][0]

    before, _ = evaluations()
    clock = common.Clock(seconds)
    told, counts = reflect(model, chat, world, args, demos)
    common.write_jsonl(run.dir / "reflections.jsonl", told)
    lessons = [*told, *({**state, "reply": act.tagged(state["expert"])} for state in demos)]
    clock.lap("reflection")
    plan = act.schedule(args, "il", len(lessons), 0)
    print(f"{args.env}: {len(demos)} expert states, {counts}; {len(plan)} updates")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step, (batch, _) in enumerate(tqdm(plan, desc="early experience", dynamic_ncols=True), 1):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 5)
        metrics = act.imitation_step(model, chat, args, [
            (chat.dialogue(act.dialogue(world, lessons[i]["messages"])), chat.reply(lessons[i]["reply"])) for i in batch])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.log({"step": step, "stage": "1-early-experience", **metrics})
        if run.stopping:
            sys.exit(run.stopping)
    clock.lap("imitation")

    after, episode = evaluations()
    run.write_rollouts([act.record(episode)])
    print(f"\nafter\n{act.show(episode)}\n")
    ends = {name: envs.mean_score(envs.make(args.env), player, args.eval_episodes, key="won") for name, player in
            (("random", envs.random_player), ("expert", envs.expert_player))}
    score = lambda numbers: {"success": numbers["success"], "se": numbers["se"]}  # noqa: E731
    run.finish({"script": "docs/early_experience.py", "method": "act", "arm": "early-experience", "env": args.env, "model": args.model,
                "seed": args.seed, "split": "test", "eval_episodes": args.eval_episodes, "before": score(before["test"]),
                "after": score(after["test"]),
                **{f"{when}_{split}": score(found[split]) for split in splits[1:]
                   for when, found in (("before", before), ("after", after))},
                **{name: {"success": value, "se": se} for name, (value, se) in ends.items()},
                "expert_states": len(demos), "pair_counts": counts, "train_episodes": len({state["seed"] for state in demos}),
                "env_steps": counts.get("env_steps", 0), "generated_tokens": counts["tokens"], "gradient_steps": len(plan),
                "seconds": round(sum(seconds.values()), 1), "peak_memory_bytes": common.peak_memory_bytes(args.device),
                "device": common.device_name(args.device), "git_commit": common.git_commit()}, model, chat)
    for split in splits:
        print(f"{split}: {before[split]['success']:.3f} before, {after[split]['success']:.3f} after (n {args.eval_episodes})")


if __name__ == "__main__":
    main()
