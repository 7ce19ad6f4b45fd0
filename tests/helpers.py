"""What the tests of several scripts share and that is no fixture."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# ------------------------------------------------------------------------------------------------------- what runs leave

SUMMARY = """script method arm env model seed split eval_episodes before after random expert train_episodes env_steps generated_tokens
    gradient_steps seconds peak_memory_bytes device git_commit""".split()


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def trained_on(run):
    """The episodes of rollouts.jsonl that a run trained on: those shown from before and after apart."""
    return [row for row in lines(Path(run) / "rollouts.jsonl") if "evaluation" not in row]


def everything_under(path):
    return {p.relative_to(path): p.read_bytes() if p.is_file() else None for p in Path(path).rglob("*")}


def without_seconds(record):
    return {key: value for key, value in record.items() if not key.startswith("seconds")}


def same_run(one, other, *, steps=None, apart=(), data=(), weights=("model",)):
    """Equal metrics, episodes, other `data`, summaries and `weights`; timings apart, and the keys `apart` of the summary.

    With `steps`: equal metrics and episodes of these steps.
    """
    for name in "metrics.jsonl", "rollouts.jsonl", *data:
        a, b = ([without_seconds(row) for row in lines(path / name) if not steps or row["step"] in steps] for path in (one, other))
        assert a == b and a, name
    if not steps:
        a, b = (json.loads((path / "summary.json").read_text()) for path in (one, other))
        machine = {"seconds": 0, "peak_memory_bytes": 0, "git_commit": ""} | dict.fromkeys(apart)  # somebody may commit while the tests run
        assert a | machine == b | machine
        for name in weights:
            assert (one / name / "model.safetensors").read_bytes() == (other / name / "model.safetensors").read_bytes(), name


def refused(result, *words):
    """The result of a run is one line of error, in these words."""
    assert result.status == 2 and not result.stdout, (result.status, result.stdout, result.stderr)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and len(result.stderr) < 1000, result.stderr
    for word in words:
        assert word in result.stderr, (word, result.stderr)


def refused_process(result, *words):
    """The same of a `subprocess.run` of any program."""
    refused(SimpleNamespace(status=result.returncode, stdout=result.stdout, stderr=result.stderr), *words)


# ------------------------------------------------------------------------------------------ faults: code for `run_script`

LOG = """
log = common.Run.log
def fatal(run, *given):
    log(run, *given)
    if len((run.dir / "metrics.jsonl").read_text().splitlines()) == {step}:
        os.kill(os.getpid(), signal.{name})
common.Run.log = fatal
"""
CHECKPOINT = """
import io, torch
save, seen = torch.save, []
def fatal(saved, file):
    seen.append(saved)
    if len(seen) == {count}:
        whole = io.BytesIO()
        save(saved, whole)
        file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(saved, file)
torch.save = fatal
"""


# --------------------------------------------------------------------------------------------------- a model from elsewhere

TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def save_llama(path, *, text, template=TEMPLATE, context=4096, width=32):
    """A random-weight Llama with a byte-level BPE tokenizer, trained on `text`, and headers as in Llama 3."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    bpe.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    ))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[0], eos_token=special[4], chat_template=template, clean_up_tokenization_spaces=False
    )
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, bos_token_id=0, eos_token_id=[1, 4], tie_word_embeddings=False,
    )).save_pretrained(path)  # fmt: skip
    tokenizer.save_pretrained(path)
    return path


# ------------------------------------------------------------------------------------------------- losses and rates by hand

PAD = SimpleNamespace(pad=0)  # all that the losses need of a chat
WORDS = 5


class Bigram(torch.nn.Module):
    """p(next | last) = softmax of a row: losses and gradients can be worked out by hand."""

    device, max_context = torch.device("cpu"), 100

    def __init__(self, table):
        super().__init__()
        self.head = torch.nn.Identity()  # only the rows that count come here
        self.table = torch.nn.Parameter(torch.tensor(table, dtype=torch.float32))

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.head(self.table[input_ids]))


def random_table(rng):
    return [[rng.gauss(0, 1) for _ in range(WORDS)] for _ in range(WORDS)]


def random_episodes(rng, count):
    episodes = []
    for _ in range(count):
        length = rng.randrange(2, 9)
        mask = [0, *(rng.randrange(2) for _ in range(length - 2)), 1]
        episodes.append({"ids": [rng.randrange(WORDS) for _ in range(length)], "mask": mask, "logprob": 0.0})
    return episodes


def rates_differ(a, b):
    """|difference of two shares| in standard errors."""
    assert min(len(a), len(b)) > 15
    p = (sum(a) + sum(b)) / (len(a) + len(b))
    return abs(sum(a) / len(a) - sum(b) / len(b)) / math.sqrt(max(p * (1 - p), 1e-9) * (1 / len(a) + 1 / len(b)))
