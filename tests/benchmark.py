"""Speed and memory as ratios within one run, medians of a few rounds: python tests/benchmark.py [episodes|outside|memory].

- episodes: Twenty Questions with `common.Dialogues`, which keeps its cache, as all rollouts here do (`self_guide.py --guide off`, for one),
  against the loop that most people write: each turn the whole dialogue through the chat template and the tokenizer, then
  `model.generate`; the episodes as one batch padded on the left, and one by one. Games of 2 to 32 turns. Greedy, so that all three say
  the same words. Target: at least 3 times faster at the 20 turns of the game.
- outside: the share of a run's wall time outside the model's forward and backward. Target: below 20%.
- memory: the peak of a run with default settings (few steps) beyond the imports, with the making of the tiny model. Target: below 1 GiB.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import common
import envs
import nlac

ROOT = Path(nlac.__file__).parent
EPISODES, ALONE, TURNS, NEW_TOKENS = 64, 4, (2, 8, 20, 32), 16


def cached(model, chat, worlds, histories, turns):
    dialogues = common.Dialogues(model, chat, [chat.dialogue(messages) for messages in histories])
    rows, count = list(range(len(worlds))), 0
    for turn in range(turns):
        replies = dialogues.reply(rows, max_new_tokens=NEW_TOKENS, temperature=0, seeds=rows).texts
        observations = [world.step(reply)[0] for world, reply in zip(worlds, replies)]
        for messages, reply, observation in zip(histories, replies, observations):
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": observation}]
        if turn < turns - 1:
            dialogues.extend(rows, observations)
    for row in rows:
        count += sum(dialogues.mask[row])
    return count


@torch.no_grad()
def usual(model, chat, worlds, histories, turns):
    tokenizer, count = chat.tokenizer, 0
    tokenizer.padding_side = "left"
    for _ in range(turns):
        texts = [tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for messages in histories]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=chat.eos, pad_token_id=chat.pad)
        for world, messages, row in zip(worlds, histories, output[:, inputs["input_ids"].shape[1] :].tolist()):
            end = next((i + 1 for i, token in enumerate(row) if token in chat.eos), len(row))
            count += end
            reply = tokenizer.decode(row[:end], skip_special_tokens=True)
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": world.step(reply)[0]}]
    return count


def one_by_one(model, chat, worlds, histories, turns):
    return sum(usual(model, chat, [world], [messages], turns) for world, messages in zip(worlds, histories))


def play(loop, model, chat, episodes, turns):
    """(seconds per episode, tokens per episode, what was said)."""
    worlds = [envs.make("20q", max_turns=turns + 1) for _ in range(episodes)]  # nobody runs out of turns
    histories = [[{"role": "system", "content": f"{world.system}\n{nlac.POLICY}"}, {"role": "user", "content": world.reset(seed=seed)[0]}]
                 for seed, world in enumerate(worlds)]  # fmt: skip
    start = time.perf_counter()
    tokens = loop(model, chat, worlds, histories, turns)
    return (time.perf_counter() - start) / episodes, tokens / episodes, histories


def episodes(model_20q, rounds=3):
    model, chat = model_20q
    for turns in TURNS:
        loops = {"in one padded batch": (usual, EPISODES)} | ({"one by one": (one_by_one, ALONE)} if turns == 20 else {})
        ratios, ours = {name: [] for name in loops}, []
        for _ in range(rounds):
            seconds, tokens, said = play(cached, model, chat, EPISODES, turns)
            ours.append(seconds)
            for name, (loop, count) in loops.items():
                theirs, their_tokens, their_said = play(loop, model, chat, count, turns)
                same = sum(a == b for a, b in zip(said, their_said)) / count
                ratios[name].append(theirs / their_tokens / (seconds / tokens))  # per sampled token: one by one it is other episodes
                assert same > 0.8, (same, tokens, their_tokens)  # float noise may break a tie
        told = ", ".join(f"{statistics.median(values):.1f} times faster than model.generate {name}" for name, values in ratios.items())
        each = f"{tokens:.0f} sampled tokens and {1000 * statistics.median(ours):.0f} ms each"
        print(f"episodes: {EPISODES} of {turns} turns, {each}; {told}", flush=True)


def outside(cache, steps=6):
    """Runs nlac.main here, with timers around forward and backward."""
    args = dataclasses.replace(nlac.Args(), **nlac.TINY)
    model, _ = nlac.load(envs.make("repair"), args)
    inside, depth, started = [0.0], [0], []

    def timed(function):
        def wrapper(*args, **kwargs):
            depth[0] += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    inside[0] += time.perf_counter() - start

        return wrapper

    class Run(common.Run):
        def start(self, **what):  # the model is there: the run proper begins
            super().start(**what)
            inside[0] = 0.0
            started.append(time.perf_counter())

    forward, backward, original = type(model).forward, torch.Tensor.backward, common.Run
    type(model).forward, torch.Tensor.backward, common.Run = timed(forward), timed(backward), Run
    shares = []
    try:
        for seed in range(3):
            settings = f"--seed {seed} --steps {steps} --critic-gate 0 --eval-episodes 100 --out-dir {cache}/run-{seed}"
            sys.argv = ["nlac.py", *settings.split()]
            nlac.main()
            shares.append(1 - inside[0] / (time.perf_counter() - started[-1]))
    finally:
        type(model).forward, torch.Tensor.backward, common.Run = forward, backward, original
    print(f"outside: {100 * statistics.median(shares):.0f}% of the wall time of {steps} steps outside forward and backward (target 20%)")


MEMORY = """
import sys
import torch, common, nlac

def peak():  # getrusage would count the process that started this one
    try:
        status = open("/proc/self/status").read()
    except OSError:
        return common.peak_memory_bytes("cpu")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

before = peak()
sys.argv = ["nlac.py", "--steps", "3", "--critic-gate", "0", "--out-dir", sys.argv[1]]
nlac.main()
print("PEAK", peak() - before, before)
"""


def memory(rounds=1):
    peaks = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as fresh:  # no tiny model there yet: its making counts
            environment = os.environ | {"XDG_CACHE_HOME": fresh, "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", MEMORY, str(Path(fresh, "run"))]
            output = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
            ).stdout
        peaks.append([int(word) for word in output.split("PEAK")[1].split()])
    peak, imports = (statistics.median(values) for values in zip(*peaks))
    print(f"memory: {peak / 2**20:.0f} MiB beyond the {imports / 2**20:.0f} MiB of the imports (target 1024)")


def main():
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or ["episodes", "outside", "memory"]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        if "episodes" in wanted:
            args = dataclasses.replace(nlac.Args(), **nlac.TINY | {"env": "20q", "examples": 400})
            episodes(nlac.load(envs.make("20q"), args))
        if "outside" in wanted:
            outside(cache)
        if "memory" in wanted:
            memory()


if __name__ == "__main__":
    main()
