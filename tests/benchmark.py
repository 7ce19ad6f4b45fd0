"""Speed and memory, as ratios within one run: python tests/benchmark.py [--out FILE] [PART FLAGS...]

Without a part, all of CPU below, one process after the other: a quarter of an hour. `bash docs/gpu.sh`
runs the parts at sizes that mean something on a card. A part prints a line of JSON per measurement, as
medians of --rounds.

- episodes: dialogues that keep their cache, as all rollouts here do, against `model.generate` on the
  whole dialogue at each turn; greedy, so that both say the same.
- turns: the same for games of 2 to 32 turns of a tiny model.
- grpo: a step of act.py's choice (sampling, log-probs of a reference, update), --arm ours or trl,
  which is TRL's GRPOTrainer on the same prompts, group, lengths and micro-batch.
- outside: the share of nlac.py's steps outside of the model's forward and backward passes.
- step: a gradient step on random ids of which a quarter count, at one of ARMS.
- decode: tokens a second after a prompt, and what the memory's bandwidth would allow if only weights
  were read.
- head: forward and backward with logits of the positions that count, or of all in float32.

Shapes have random weights; --model takes what a script takes. Peak memory is the card's, or what the
process held beyond its imports.
"""

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, f"{sys.path[0]}/docs")
import memory
import torch
import transformers

import act
import common
import envs
import nlac

CPU = [
    "episodes --model smollm2 --rows 4 --turns 8 --new 16 --rounds 2",
    "turns",
    "grpo --model smollm2 --arm ours --rows 4 --new 32 --rounds 2",
    "grpo --model smollm2 --arm trl --rows 4 --new 32 --rounds 2",
    "outside",
    "head --shape words --rows 2 --length 512 --arm all",
    "head --shape words --rows 2 --length 512 --arm counted",
    *(f"step --shape words --rows 2 --length 512 --arm {arm}" for arm in (
        "full", "checkpointed", "lora", "lora-checkpointed", "mixed-lora-checkpointed")),
    "decode --model smollm2 --rows 1 4 16 --new 16",
]
SHAPES = {  # width, feed-forward width, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 1000),
    "words": (256, 768, 8, 4, 2, 150_000),
    "0.5B": (896, 4864, 24, 14, 2, 151_936),  # this and the others: Qwen2.5's
    "1.5B": (1536, 8960, 28, 12, 2, 151_936),
    "7B": (3584, 18_944, 28, 28, 4, 152_064),
}
ARMS = {  # what a step trains, and how
    "full": {},
    "checkpointed": {"checkpointing": True},
    "lora": {"rank": 16},
    "lora-checkpointed": {"rank": 16, "checkpointing": True},
    "mixed-lora-checkpointed": {"rank": 16, "checkpointing": True, "mixed": True},
}
PEAK_FLOPS = {  # dense bfloat16, as NVIDIA's data sheets have it; of others `TFLOPS` is what there is
    "NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12, "NVIDIA A10": 125e12,
    "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12,
}


# ------------------------------------------------------------------------------------------- tools


def on_card(args):
    return torch.device(args.device).type == "cuda"


def now(args) -> float:
    """Seconds, after all that the card was asked to do."""
    if on_card(args):
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(args, function, *given) -> float:
    """The median seconds of --rounds calls, after one on a card that warms up."""
    seconds = []
    for _ in range(args.rounds + on_card(args)):
        start = now(args)
        function(*given)
        seconds.append(now(args) - start)
    return statistics.median(seconds[on_card(args):])


def held(args, most=False) -> int:
    """Bytes: on the card, or of this process; now, or the most so far."""
    if on_card(args):
        return torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return common.peak_memory_bytes(args.device) if most else 0
    return 1024 * int(status.read_text().split("VmHWM:" if most else "VmRSS:")[1].split()[0])


def forget_peak(args):
    """The most memory of a card counts anew; that of a process cannot."""
    if on_card(args):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def bandwidth(args) -> float:
    """Bytes a second of a large copy, read and written, far beyond what caches hold."""
    source = torch.ones(2**28 if on_card(args) else 2**26, device=args.device)
    target = torch.empty_like(source)

    def copy():
        for _ in range(10):
            target.copy_(source)

    copy()
    return 10 * 2 * source.nbytes / timed(args, copy)


def random_model(args, rank=0, checkpointing=False, mixed=False):
    """A Qwen2 of --shape with random weights; on a card it computes in bfloat16, as `common.load` has it."""
    width, hidden, layers, heads, pairs, vocabulary = SHAPES[args.shape]
    config = transformers.Qwen2Config(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=pairs, vocab_size=vocabulary,
        tie_word_embeddings=args.shape != "7B", max_position_embeddings=32_768)
    mixed = mixed or on_card(args)
    torch.set_default_dtype(torch.bfloat16 if mixed and rank else torch.float32)
    with torch.device(args.device):
        model = transformers.Qwen2ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.compute_dtype = torch.bfloat16 if mixed else None
    model.max_context = 32_768
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if rank:
        common.add_adapters(model, rank)
    return model


def model_and_chat(args):
    """--model, or a random one of --shape with a tokenizer made for the prompts of `choices`."""
    if args.model:
        return common.load(args.model, device=args.device)
    texts = [message["content"] for messages in choices(pairs_of(8)) for message in messages]
    tokenizer = common.tiny_tokenizer({*texts, "system\n", "user\n", "assistant\n"})
    return random_model(args), common.Chat(tokenizer)


# ------------------------------------------------------------------------------------------- parts


def turns(args):
    """Twenty Questions of a tiny model."""
    settings = dataclasses.replace(nlac.Args(), **nlac.TINY | {"env": "20q", "examples": 400})
    model, chat = nlac.load(envs.make("20q"), settings)
    for count in 2, 8, 20, 32:
        yield {"turns": count, **compared(args, model, chat, 64, count, 16)}


def episodes(args):
    """Dialogues of a model of any size."""
    model, chat = model_and_chat(args)
    for rows in args.rows:
        yield {"turns": args.turns, **compared(args, model, chat, rows, args.turns, args.new)}


def compared(args, model, chat, rows, turns, new):
    """Twenty Questions, played with a kept cache and with `model.generate`."""
    chat.eos[1:] = []
    tokens = {}

    def play(loop):
        worlds = [envs.make("20q", max_turns=turns + 1) for _ in range(rows)]  # nobody loses
        histories = [[{"role": "system", "content": f"{world.system}\n{nlac.POLICY}"},
                      {"role": "user", "content": world.reset(seed=seed)[0]}]
                     for seed, world in enumerate(worlds)]
        tokens[loop] = loop(model, chat, worlds, histories, turns, new)

    ours, theirs = timed(args, play, cached), timed(args, play, generated)
    return {"rows": rows, "sampled": tokens[cached] / rows, "seconds": ours,
            "model_generate_seconds": theirs,  # the ratio is of a token's: rounding may part them
            "ratio": theirs / tokens[generated] / (ours / tokens[cached])}


def cached(model, chat, worlds, histories, turns, new):
    """As rollouts here do; returns the number of sampled tokens."""
    rows = list(range(len(worlds)))
    dialogues = common.Dialogues(model, chat, [chat.dialogue(said) for said in histories])
    for turn in range(turns):
        replies = dialogues.reply(rows, max_new_tokens=new, temperature=0, seeds=rows)
        seen = [world.step(text)[0] for world, text in zip(worlds, replies.texts)]
        if turn < turns - 1:
            dialogues.extend(rows, seen)
    return sum(map(sum, dialogues.mask))


@torch.no_grad()
def generated(model, chat, worlds, histories, turns, new):
    """As most people write it: each turn the template, the tokenizer, one padded batch."""
    count, chat.tokenizer.padding_side = 0, "left"
    for _ in range(turns):
        texts = [chat.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
                 for said in histories]
        inputs = chat.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with common.compute(model):
            output = model.generate(
                input_ids=inputs["input_ids"].to(model.device), max_new_tokens=new,
                attention_mask=inputs["attention_mask"].to(model.device),
                eos_token_id=chat.eos, pad_token_id=chat.pad, do_sample=False)
        output = output[:, inputs["input_ids"].shape[1]:].tolist()
        for world, said, row in zip(worlds, histories, output):
            end = next((i + 1 for i, token in enumerate(row) if token in chat.eos), len(row))
            count += end
            reply = chat.decode(row[:end])
            said += [{"role": "assistant", "content": reply},
                     {"role": "user", "content": world.step(reply)[0]}]
    return count


def pairs_of(count) -> list:
    """Pairs of act.py, the expert's action and another, at the first turn."""
    world, pairs = envs.make("household"), []
    for seed in range(count):
        observation, info = world.reset(seed=seed, options={"split": "train"})
        expert = world.expert()
        other = next(action for action in info["admissible"] if action != expert)
        pairs.append({"messages": [act.user(observation)], "expert": expert, "candidate": other,
                      "admissible": info["admissible"], "expert_second": seed % 2 == 1})
    return pairs


def choices(pairs) -> list:
    """The questions about them."""
    world = envs.make("household")
    return [act.question(world, act.Args(), pair) for pair in pairs]


def paid(text):
    """A reward that needs no skill."""
    return float(len(text) % 2)


def grpo(args):
    """Groups of up to 8 replies, all of --new tokens: nobody may end a reply."""
    group = min(8, args.rows[0])
    pairs = pairs_of(args.rows[0] // group)
    prompts = choices(pairs)
    model, chat = model_and_chat(args)
    length = max(len(chat.dialogue(messages)) for messages in prompts) + args.new
    with tempfile.TemporaryDirectory() as directory:
        if args.arm == "trl":
            path = model.config._name_or_path
            if not path:  # TRL reads model and reference from files
                path = f"{directory}/model"
                common.save_model(path, model, chat)
            del model  # or its memory would count as TRL's
            gc.collect()
            seconds = grpo_trl(args, path, chat, prompts, group, directory)
        else:
            seconds = grpo_ours(args, model, chat, pairs, group)
    yield {"rows": args.rows[0], "group": group, "micro_batch": args.micro, "length": length,
           "new": args.new, "seconds": seconds}


def grpo_ours(args, model, chat, pairs, group):
    settings = act.Args(micro_batch_size=args.micro, group_size=group, device=args.device,
                        choice_tokens=args.new)
    state = act.Job(settings, envs.make("household"), chat, model)
    reference = common.frozen_copy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    chat.eos[:] = [2**31]  # no token
    steps = []

    def step():
        steps.append(0)
        replies = act.ask(state, pairs, (len(steps),), group)
        for reply in replies:
            reply.reward, reply.outcome = paid(reply.text), "right"
        act.set_advantages(replies, group)
        clip = settings.clip, settings.clip
        act.update(model, reference, chat, settings, optimizer, replies, clip)

    return timed(args, step)


def grpo_trl(args, path, chat, prompts, group, directory):
    """TRL's plain path: no vLLM, no Liger, the KL as ours."""
    import datasets
    import trl  # pip install trl==1.16.*

    steps = args.rounds + on_card(args)
    ends = [0.0]

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *given, **named):
            ends.append(now(args))

        def on_step_end(self, *given, **named):
            ends[-1] = now(args) - ends[-1]

    rows = len(prompts) * group
    settings = trl.GRPOConfig(
        output_dir=f"{directory}/run", per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=rows // args.micro, num_generations=group, beta=0.1,
        max_completion_length=args.new, generation_kwargs={"min_new_tokens": args.new},
        learning_rate=1e-6, max_steps=steps, save_strategy="no", report_to="none",
        gradient_checkpointing=False, use_cpu=not on_card(args), bf16=on_card(args),
        model_init_kwargs={"dtype": "float32"}, disable_tqdm=True)
    trainer = trl.GRPOTrainer(
        model=path, args=settings, processing_class=chat.tokenizer, callbacks=[Watch()],
        reward_funcs=lambda completions, **more: [paid(c[0]["content"]) for c in completions],
        train_dataset=datasets.Dataset.from_list([{"prompt": messages} for messages in prompts] * steps))
    trainer.train()
    return statistics.median(ends[-args.rounds:])


def outside(args, steps=6):
    """Runs nlac.main here, with timers around forward and backward."""
    settings = dataclasses.replace(nlac.Args(), **nlac.TINY)
    model, _ = nlac.load(envs.make("repair"), settings)
    inside, depth, started = [0.0], [0], []

    def watched(function):
        def wrapper(*given, **named):
            depth[0] += 1
            start = time.perf_counter()
            try:
                return function(*given, **named)
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
    type(model).forward, torch.Tensor.backward = watched(forward), watched(backward)
    common.Run, shares = Run, []
    try:
        for seed in range(3):
            with tempfile.TemporaryDirectory() as directory:
                flags = f"--seed {seed} --steps {steps} --critic-gate 0 --eval-episodes 100"
                sys.argv = ["nlac.py", *flags.split(), "--out-dir", f"{directory}/run"]
                nlac.main()
                shares.append(1 - inside[0] / (time.perf_counter() - started[-1]))
    finally:
        type(model).forward, torch.Tensor.backward = forward, backward
        common.Run = original
    yield {"steps": steps, "share": statistics.median(shares)}


def batch(args, rows, every):
    """Random ids [rows, --length], and a mask of one in `every`."""
    ids = torch.randint(10, 900, (rows, args.length))
    return ids, (torch.arange(args.length) % every == 0).long().expand(rows, -1)


def learn(model, optimizer, ids, mask):
    loss = -common.token_logprobs(model, ids, mask).sum() / mask.sum()
    loss.backward()
    common.gradient_step(model, optimizer, loss.item(), [])


def flops(args, ids, mask):
    """What a step has to compute, at least: a layer's products, causal attention, the head where it counts.

    Two for a weight and token forward, two for the gradient of what enters, two for the weight's own,
    which adapters spare. What checkpointing computes again does not count.
    """
    shape = memory.Shape(*SHAPES[args.shape])
    tokens, counted = ids.numel(), int(mask.sum())
    passes = 2 if ARMS[args.arm].get("rank") else 3
    attention = 3 * shape.layers * 2 * shape.width * ids.shape[1] * tokens  # half of all pairs
    return passes * 2 * (shape.linear * tokens + shape.embeddings * counted) + attention


def step(args):
    """Forward, backward and AdamW at one of ARMS, one micro-batch."""
    model = random_model(args, **ARMS[args.arm])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    for rows in args.rows:
        ids, mask = batch(args, rows, 4)
        forget_peak(args)
        learn(model, optimizer, ids, mask)  # the first one makes the moments
        seconds = timed(args, learn, model, optimizer, ids, mask)
        rate = flops(args, ids, mask) / seconds
        peak = PEAK_FLOPS.get(common.device_name(args.device))
        yield {"rows": rows, "length": args.length, "seconds": seconds,
               "tokens_per_second": ids.numel() / seconds,
               "parameters": common.count_parameters(model),
               "TFLOPS": rate / 1e12, "mfu": rate / peak if peak else None}


def head(args):
    """Forward and backward with logits where a token counts (--arm counted), or of all in float32."""
    model = random_model(args)
    ids, mask = batch(args, args.rows[0], 8)

    def everything():
        with common.compute(model):
            logits = model(input_ids=ids.to(args.device), use_cache=False).logits.float()
        targets = ids[:, 1:, None].to(args.device)
        logprobs = torch.log_softmax(logits[:, :-1], -1).gather(-1, targets)[..., 0]
        return logprobs * mask[:, 1:].to(args.device)

    def both_ways():
        logprobs = everything() if args.arm == "all" else common.token_logprobs(model, ids, mask)
        logprobs.sum().backward()
        model.zero_grad()

    yield {"rows": len(ids), "length": args.length, "seconds": timed(args, both_ways)}


def decode(args):
    """Sampling after prompts of --length ids, all rows to the end, as rollouts do it."""
    model, chat = model_and_chat(args)
    chat.eos[:] = [2**31]
    read = sum(weight.numel() for weight in model.parameters()) * (2 if model.compute_dtype else 4)
    bound = read / bandwidth(args)
    forget_peak(args)

    def ours(prompts, new):
        count = len(prompts)
        common.generate(model, chat, prompts.tolist(), max_new_tokens=new, temperature=1.0,
                        seeds=range(count), rows=count)

    def theirs(prompts, new):
        prompts = prompts.to(args.device)
        with torch.no_grad(), common.compute(model):
            model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new,
                           min_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0)

    for rows in args.rows:
        prompts = torch.randint(10, 900, (rows, args.length))
        seconds, others = (  # per token; a prompt is encoded with the first one, which is left out
            (timed(args, loop, prompts, 1 + args.new) - timed(args, loop, prompts, 1)) / args.new
            for loop in (ours, theirs))
        yield {"rows": rows, "length": args.length, "new": args.new,
               "tokens_per_second": rows / seconds, "ms_per_step": 1000 * seconds,
               "model_generate_ms_per_step": 1000 * others, "bound_ms_per_step": 1000 * bound,
               "share_of_bound": bound / seconds}


# -------------------------------------------------------------------------------------------- main


PARTS = {part.__name__: part for part in (episodes, turns, grpo, outside, step, head, decode)}


def run_part(args):
    """Yields what a part measured; a mistake ends the part alone."""
    base = 0 if on_card(args) else held(args)
    for found in PARTS[args.part](args):
        found = {key: float(f"{value:.4g}") if isinstance(value, float) else value
                 for key, value in found.items()}
        yield {"part": args.part, "model": args.model or args.shape, "arm": args.arm, **found,
               "peak_GB": round((held(args, most=True) - base) / 1e9, 3),
               "device": common.device_name(args.device), "torch": torch.__version__}


def measure(line, seconds):
    """What a process of its own prints for the flags `line`; and why it ended, if not well."""
    command = [sys.executable, __file__, *line.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said, errors = process.communicate(timeout=seconds)
        reason = (errors.strip().splitlines() or ["no word"])[-1][:200]
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        reason = f"not done in {seconds:.0f} s"
    found = [json.loads(row) for row in said.splitlines() if row.startswith('{"part"')]
    if process.returncode:
        why = "skipped" if "No module named" in reason else "failed"
        found.append({"part": line.split()[0], "flags": line, why: reason})
    return found


def run_all(lines, out, budget):
    """One line after the other, in `budget` seconds; `out` is written anew after each."""
    records, end = [], time.time() + budget
    for line in lines:
        records += measure(line, end - time.time()) if time.time() < end else [
            {"part": line.split()[0], "flags": line, "skipped": "no time left"}]
        if out:
            common.write_jsonl(out, records)
    table(records)


def table(records):
    """For people: a line per measurement, then what two arms of a part have to do with each other."""
    for record in records:
        shown = [f"{key} {value}" for key, value in record.items()
                 if value not in (None, "") and key not in ("part", "device", "torch")]
        print(f"{record['part']:9}", ", ".join(shown))
    arms = {(record["part"], record.get("arm")): record for record in records if "seconds" in record}
    for part, one, other in ("grpo", "trl", "ours"), ("head", "all", "counted"):
        if (part, one) in arms and (part, other) in arms:
            first, second = arms[part, one], arms[part, other]
            print(f"{part}: {other} takes {second['seconds'] / first['seconds']:.2f} of the seconds of {one}, "
                  f"{second['peak_GB'] / first['peak_GB']:.2f} of its memory")


def main():
    parser = argparse.ArgumentParser(description="Speed and memory, as ratios within one run.")
    parser.add_argument("part", nargs="?", choices=[*PARTS, "lines"], help="default: all that suits a CPU")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--model", default="")
    parser.add_argument("--arm", default="")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--micro", type=int, default=1, help="rows of a micro-batch of grpo")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default=common.default_device())
    parser.add_argument("--budget", type=float, default=1e5, help="seconds for all lines")
    parser.add_argument("--out", default="", help="a JSON lines file")
    args = parser.parse_args()
    torch.set_num_threads(1 if not on_card(args) else torch.get_num_threads())
    if args.part in PARTS:
        for record in run_part(args):
            print(json.dumps(record), flush=True)
    else:
        run_all(sys.stdin.read().splitlines() if args.part else CPU, args.out, args.budget)


if __name__ == "__main__":
    main()
