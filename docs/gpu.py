"""Speed and memory on whatever card there is, with random weights of published shapes: part of docs/gpu.sh.

    python docs/gpu.py decode --shape 0.5B     # tokens a second at batch 1, 16, 64, beside the bandwidth bound
    python docs/gpu.py train --shape 1.5B      # a gradient step: tokens a second, MFU, peak memory
    python docs/gpu.py head --shape 0.5B       # peak of a forward and backward with and without the sampled positions alone
    python docs/gpu.py episodes --model smollm2 # 8-turn dialogues against model.generate per turn

Each prints a line of JSON. --shape tiny is a dry run for machines without a card.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

SHAPES = {  # of the Qwen2.5 family: width, feed-forward width, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 1000),
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936),
    "7B": (3584, 18_944, 28, 28, 4, 152_064),
}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # dense bfloat16, by data sheet


def random_model(shape, device, dtype):
    """A Qwen2 of that shape with random weights; computes in bfloat16 on a GPU."""
    width, hidden, layers, heads, pairs, vocabulary = SHAPES[shape]
    config = transformers.Qwen2Config(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=pairs, vocab_size=vocabulary, tie_word_embeddings=shape != "7B",
        max_position_embeddings=32_768)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = transformers.Qwen2ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    on_card = torch.device(device).type == "cuda" and dtype == torch.float32
    model.compute_dtype = torch.bfloat16 if on_card else None
    model.max_context = 32_768
    return model


def synchronised(device) -> float:
    """Seconds, after all that the card was asked to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bandwidth(device) -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source = torch.empty(2**28 if torch.device(device).type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    start = synchronised(device)
    for _ in range(10):
        target.copy_(source)
    return 10 * 2 * source.numel() * 4 / (synchronised(device) - start)


def decode(args):
    """Sampling of 128 tokens after prompts of 256, all rows to the end."""
    model = random_model(args.shape, args.device, torch.bfloat16)
    chat = SimpleNamespace(eos=[-1], pad=0, opened="", decode=lambda ids: "")
    bytes_read = sum(p.numel() * p.element_size() for p in model.parameters())
    speed = bandwidth(args.device)
    for rows in (1, 16, 64):
        prompts = torch.randint(10, 900, (rows, 256)).tolist()
        new = 128 if args.shape != "tiny" else 4
        for _ in range(2):  # the first one warms up
            start = synchronised(args.device)
            common.generate(model, chat, prompts, max_new_tokens=new, temperature=1.0, seeds=range(rows))
            seconds = synchronised(args.device) - start
        ids = torch.tensor(prompts, device=args.device)
        start = synchronised(args.device)
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                           do_sample=True, pad_token_id=0)
        theirs = synchronised(args.device) - start
        yield {"rows": rows, "tokens_per_second": rows * new / seconds, "ms_per_step": 1000 * seconds / new,
               "model_generate_ms_per_step": 1000 * theirs / new,
               "bound_ms_per_step": 1000 * bytes_read / speed, "bandwidth_TB_s": speed / 1e12}


def train(args):
    """Gradient steps on sequences of 2,048 tokens of which a quarter were sampled; float32 weights and moments."""
    model = random_model(args.shape, args.device, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    length = 2048 if args.shape != "tiny" else 64
    for rows in (1, 4):
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(10, 900, (rows, length))
        mask = (torch.arange(length) % 4 == 0).long().expand(rows, -1)
        times = []
        for _ in range(4):
            start = synchronised(args.device)
            loss = -common.token_logprobs(model, ids, mask).sum() / mask.sum()
            loss.backward()
            common.gradient_step(model, optimizer, loss.item(), [])
            times.append(synchronised(args.device) - start)
        seconds = sorted(times[1:])[1]
        flops = 6 * common.count_parameters(model) * rows * length
        name = common.device_name(args.device)
        peak = next((value for card, value in PEAK_FLOPS.items() if card in name), None)
        yield {"rows": rows, "length": length, "seconds": seconds, "tokens_per_second": rows * length / seconds,
               "mfu": flops / seconds / peak if peak else None,
               "peak_GB": common.peak_memory_bytes(args.device) / 1e9}


def head(args):
    """Peak memory of forward and backward: logits of the sampled eighth, against logits of everything in float32."""
    model = random_model(args.shape, args.device, torch.float32)
    length = 2048 if args.shape != "tiny" else 64
    ids = torch.randint(10, 900, (4, length))
    mask = (torch.arange(length) % 8 == 0).long().expand(4, -1)

    def everything():
        with common.compute(model):
            logits = model(input_ids=ids.to(args.device), use_cache=False).logits.float()
        targets = ids[:, 1:].to(args.device)
        logprobs = torch.log_softmax(logits[:, :-1], -1).gather(-1, targets[..., None])[..., 0]
        return logprobs * mask[:, 1:].to(args.device)

    for name, logprobs in ("sampled", lambda: common.token_logprobs(model, ids, mask)), ("everything", everything):
        if args.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            start = synchronised(args.device)
            logprobs().sum().backward()
            seconds = synchronised(args.device) - start
            model.zero_grad()
        yield {"positions": name, "seconds": seconds, "peak_GB": common.peak_memory_bytes(args.device) / 1e9}


def episodes(args):
    """8-turn dialogues: the cache kept across turns, against model.generate on the whole dialogue each turn."""
    model, chat = common.load(args.model, device=args.device)
    rows, new, turns = (32 if args.device != "cpu" else 4), 32, 8
    opening = [{"role": "user", "content": "Let us count. " + "Say the next number, and why. " * 10}]
    answer = "Good, go on. " * 10
    for _ in range(2):
        start = synchronised(args.device)
        dialogues = common.Dialogues(model, chat, [chat.dialogue(opening)] * rows)
        for turn in range(turns):
            dialogues.reply(range(rows), max_new_tokens=new, temperature=1.0, seeds=range(turn, turn + rows))
            dialogues.extend(range(rows), [answer] * rows)
        ours = synchronised(args.device) - start
    start = synchronised(args.device)
    prompts = [chat.dialogue(opening) for _ in range(rows)]
    for _ in range(turns):
        ids = common.pad_rows(prompts, chat.pad, "left").to(args.device)
        mask = common.pad_rows([[1] * len(p) for p in prompts], 0, "left").to(args.device)
        with torch.no_grad(), common.compute(model):
            out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=True, top_k=0,
                                 pad_token_id=chat.pad)[:, ids.shape[1]:].tolist()
        for prompt, reply in zip(prompts, out):
            end = next((i for i, id in enumerate(reply) if id in chat.eos), len(reply))
            prompt += [*reply[:end], chat.eos[0], *chat.turn(answer)]
    theirs = synchronised(args.device) - start
    yield {"episodes": rows, "turns": turns, "seconds": ours, "model_generate_seconds": theirs, "ratio": theirs / ours}


def main():
    parser = argparse.ArgumentParser(description="Speed and memory on whatever card there is.")
    parser.add_argument("part", choices=["decode", "train", "head", "episodes"])
    parser.add_argument("--shape", choices=SHAPES, default="0.5B")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default=common.default_device())
    args = parser.parse_args()
    for found in globals()[args.part](args):
        what = {"part": args.part, "shape": args.model if args.part == "episodes" else args.shape}
        print(json.dumps(what | {key: round(v, 4) if isinstance(v, float) else v for key, v in found.items()}
                         | {"device": common.device_name(args.device), "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
