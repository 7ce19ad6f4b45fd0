"""What fits a card: peak memory of training, computed: python docs/memory.py > docs/memory.md

The factors were counted: what autograd keeps for a backward pass (on a CPU, where autocast keeps the
same dtypes), the peak of a head, and whole steps on an H200 (docs/gpu_h200.jsonl).
tests/test_benchmark.py compares the function with both.
"""

from dataclasses import dataclass


@dataclass
class Shape:
    """A Llama-like model. `pairs`: key-value heads; `tied`: the head is the embeddings again."""

    width: int
    hidden: int  # of the feed-forward part
    layers: int
    heads: int
    pairs: int
    vocabulary: int
    tied: bool = True

    @property
    def pair_width(self):
        return self.pairs * self.width // self.heads

    @property
    def embeddings(self):
        return self.vocabulary * self.width

    @property
    def linear(self):
        """Weights of linear layers, the head apart."""
        attention = 2 * self.width**2 + 2 * self.width * self.pair_width
        return self.layers * (attention + 3 * self.width * self.hidden)

    @property
    def parameters(self):
        return self.linear + self.embeddings * (1 if self.tied else 2)

    def adapters(self, rank):
        """Weights of A and B of all linear layers but the head."""
        attention = 2 * 2 * self.width + 2 * (self.width + self.pair_width)
        return self.layers * rank * (attention + 3 * (self.width + self.hidden))


SHAPES = {  # by their config.json
    "Qwen2.5-0.5B": Shape(896, 4864, 24, 14, 2, 151_936),
    "Qwen2.5-1.5B": Shape(1536, 8960, 28, 12, 2, 151_936),
    "Qwen2.5-3B": Shape(2048, 11_008, 36, 16, 2, 151_936),
    "Qwen2.5-7B": Shape(3584, 18_944, 28, 28, 4, 152_064, tied=False),
    "Qwen2.5-14B": Shape(5120, 13_824, 48, 40, 8, 152_064, tied=False),
}
HEAD = 12  # bytes per token that counts and word of the vocabulary
STEP = 16  # bytes per weight while AdamW steps: weight, gradient, two moments


def kept(shape, rank) -> int:
    """Bytes that a layer keeps of a token for the backward pass."""
    # with adapters the inputs of frozen layers are not kept, and what runs between layers is bfloat16
    width = 16 if rank else 30
    return 8 * shape.hidden + width * shape.width + 4 * shape.pair_width


def training(shape, tokens, counted, rank=0, checkpointing=False, step=STEP, head=HEAD) -> float:
    """Peak bytes of a gradient step; `tokens` of a micro-batch, and how many of them count.

    Where all weights learn, a float32 weight has two moments (12 bytes) and, while a backward pass
    needs it, its bfloat16 copy (2); gradients grow as what was kept is freed.
    """
    layer = kept(shape, rank)
    between = (2 if rank else 4) * shape.width  # what a checkpoint keeps
    activations = shape.layers * (between if checkpointing else layer) * tokens
    activations += max(head * shape.vocabulary * counted, layer * tokens * checkpointing)
    if rank:
        return 2 * shape.parameters + 18 * shape.adapters(rank) + activations
    last = (between + layer) * tokens if checkpointing else 0  # the first layer's, last
    return max(14 * shape.parameters + activations, step * shape.parameters + last)


def sampling(shape, rows, length, rank=0) -> float:
    """Peak bytes while `rows` dialogues of `length` tokens are sampled.

    Cache, logits, weights and moments.
    """
    cache = 2 * 2 * shape.layers * shape.pair_width * rows * length * 9 / 8  # with room to grow
    cache *= 3 / 2  # when half of the rows have ended, those that go on are copied
    weights = 2 * shape.parameters + 14 * shape.adapters(rank) if rank else 14 * shape.parameters
    reading = 8192 * (6 * shape.hidden + 10 * shape.width)  # so many tokens at once, layer by layer
    return weights + cache + max(18 * shape.vocabulary * rows, reading)


def reference(shape, rank=0) -> float:
    """Bytes of a frozen copy, for the KL: linear layers in bfloat16, embeddings in float32."""
    head = 0 if shape.tied else 2 * shape.embeddings
    return 4 * shape.adapters(rank) if rank else 2 * shape.linear + 4 * shape.embeddings + head


def peak(shape, rank, checkpointing, rows=16, length=2048, share=0.25) -> float:
    """GB of a run with a KL, micro-batches of one sequence and `rows` dialogues at once."""
    step = training(shape, length, share * length, rank, checkpointing)
    return (max(step, sampling(shape, rows, length, rank)) + reference(shape, rank)) / 1e9


FLAGS = {  # in the order of what they cost in speed and in what can be learnt
    "": (0, False),
    "--gradient-checkpointing": (0, True),
    "--lora-rank 16": (16, False),
    "--lora-rank 16 --gradient-checkpointing": (16, True),
}
CARDS = 16, 24, 48, 80, 141  # GB
SPARE = 2  # GB: the driver, its libraries, and gaps between blocks
HEADER = """# What fits a card

Computed by `python docs/memory.py`, not measured: peak memory in GB of `act.py` or `self_guide.py` with
their KL, micro-batches of one sequence of 2,048 tokens of which a quarter were sampled,
`--rollout-batch-size 16` with dialogues of 2,048 tokens, on a GPU (bfloat16 computation; float32 weights,
or adapters over bfloat16 ones). Each `--micro-batch-size` more and longer dialogues add to it;
`nlac.py` keeps theta_bar beside: 4 bytes per weight, or per adapter weight. "Card" is the smallest of
16, 24, 48, 80 and 141 GB that holds the peak and 2 GB for the driver, its libraries and gaps.

| model | weights (billion) | flags | peak, GB, computed | card |
|---|---|---|---|---|"""


def main():
    """Prints the page."""
    print(HEADER)
    for name, shape in SHAPES.items():
        for flags, (rank, checkpointing) in FLAGS.items():
            needed = peak(shape, rank, checkpointing)
            card = next((f"{card} GB" for card in CARDS if needed + SPARE <= card), "none of these")
            shown = f"`{flags}`" if flags else "none"
            print(f"| {name} | {shape.parameters / 1e9:.2f} | {shown} | {needed:.1f} | {card} |")
    print(FOOTER)


FOOTER = """
How it is computed, in bytes:

- **All weights learn**: 4 for a weight, 8 for its moments, 2 for its bfloat16 copy while a backward pass
  needs it; in AdamW's step 4 + 4 (gradient) + 8. The larger of the two is the peak.
- **Adapters**: 2 for a weight of the base, once, whatever frozen copies a script makes; 18 for a weight of
  the adapters (4 and its copy of 2, gradient 4, moments 8).
- **What a layer keeps of a token**: 8 x feed-forward width + 30 (adapters: 16) x width + 4 x width of keys.
  With checkpointing 4 (adapters: 2) x width, and one layer in full at a time. Counted on a CPU under
  autocast.
- **The head**: 12 x vocabulary for each token that counts; the others never reach it.
- **The frozen copy of the KL**: 2 for a weight of a linear layer, 4 for one of the embeddings; of
  adapters 4 for each of theirs.
- **Sampling**: weights and moments, 2 x 2 x layers x width of keys for a token in the cache and an eighth
  of room, half of it again for the rows that go on when the others have ended; then 18 x vocabulary for a
  row, or what a layer needs of 8,192 tokens that enter the cache.

Against peaks measured on an H200 ([gpu_h200.jsonl](gpu_h200.jsonl), before AdamW was fused and the head took
12 bytes: 20 and 16.4 then) the function is within 2% in all five cases; against all allocations of whole
steps of a small shape on a CPU within 6%. Nothing with adapters or checkpointing was measured on a card yet:
`bash docs/gpu.sh OUT` does."""


if __name__ == "__main__":
    main()
