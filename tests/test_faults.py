"""Faults of the kinds that users report: each a table, so that a new case is a line."""

import contextlib
import datetime
import errno
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from helpers import save_llama
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import act
import common
import envs
import self_guide

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def as_before():
    """`start` installs handlers: give pytest its own back."""
    handlers = {number: signal.getsignal(number) for number in common.Run.STOPS}
    hook, day = sys.excepthook, common.Chat.today
    yield
    sys.excepthook, common.Chat.today = hook, day
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(capsys):
    """refused(call, word, ...): `call` leaves with status 2 and one line on stderr that holds the words."""

    def check(call, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            call()
        out, error = capsys.readouterr()
        assert caught.value.code == 2 and not out, (caught.value.code, out)
        assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 1000, error
        assert all(word in error for word in words), error

    return check


# --------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "model", text=[Path(__file__).read_text()])


@pytest.fixture
def model(llama, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


SIZES = dict(
    vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0,
    eos_token_id=4, pad_token_id=1, initializer_range=0.4)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
OLD = dict(vocab_size=600, n_embd=32, n_layer=2, n_head=4, n_positions=512, eos_token_id=4)
SMALL = dict(vocab_size=600, hidden_size=32, num_hidden_layers=2, eos_token_id=4)
EYES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
ANOTHER, CACHE = "says something else", "cannot be run over a cache"
ARCHITECTURES = {  # configuration, its arguments, what is said of it; "" where it is fine
    "gpt2": ("GPT2Config", OLD, ""),
    "gpt_neox": ("GPTNeoXConfig", SIZES | {"num_key_value_heads": None}, ""),
    "bloom": ("BloomConfig", dict(vocab_size=600, hidden_size=32, n_layer=2, n_head=4,
                                  bos_token_id=0, eos_token_id=4, pad_token_id=1), ""),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": 16}, ""),
    "gemma3": ("Gemma3TextConfig", SIZES | {"head_dim": 8, "sliding_window": 16}, ""),
    "gemma3 with eyes": ("Gemma3Config", dict(
        text_config=SIZES | {"head_dim": 8, "sliding_window": 16},
        vision_config=EYES | {"image_size": 28, "patch_size": 14}), ""),
    "experts": ("Qwen3MoeConfig", SIZES | EXPERTS | {"head_dim": 8}, ""),
    "latent": ("DeepseekV3Config", SIZES | dict(
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, moe_intermediate_size=16, kv_lora_rank=16, q_lora_rank=16,
        qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8), ""),
    "mamba": ("MambaConfig", SMALL | {"state_size": 8}, "linear_attention"),
    "rwkv": ("RwkvConfig", SMALL, ANOTHER),
    "convolutions": ("Lfm2Config", SIZES | {"layer_types": ["conv", "full_attention"]}, "conv"),
    "chunks": ("Llama4TextConfig", SIZES | dict(
        head_dim=8, num_local_experts=2, intermediate_size_mlp=64), "chunked_attention"),
    "no cache": ("OpenAIGPTConfig", OLD, CACHE),
    "memories": ("XLNetConfig", dict(vocab_size=600, d_model=32, n_layer=2, n_head=4, d_inner=64), CACHE),
    "decoder of two": ("BartConfig", dict(
        vocab_size=600, d_model=32, decoder_layers=1, decoder_attention_heads=4,
        max_position_embeddings=512, eos_token_id=4), ANOTHER),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_that_sample_what_they_learn(name, model, refused):
    config, arguments, told = ARCHITECTURES[name]
    config = getattr(transformers, config)(**arguments)
    (model / "model.safetensors").unlink()
    (model / "generation_config.json").unlink()
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    if told:
        refused(lambda: common.load(str(model)), str(model), told)
    else:
        loaded, chat = common.load(str(model))
        prompts = [chat.prompt([{"role": "user", "content": "Hi"}])]
        common.generate(loaded, chat, prompts, max_new_tokens=2, temperature=1.0, seeds=[0])


def rewrite(file, **values):
    """Changes keys of a JSON file; None removes one."""
    record = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


def shards(path):
    """Spreads the weights over several files; returns these and their index."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    loaded.save_pretrained(path, max_shard_size="40KB")
    return sorted(path.glob("model-*.safetensors")), path / "model.safetensors.index.json"


def no_shard(path):
    shards(path)[0][1].unlink()


def torn_shard(path):
    file = shards(path)[0][0]
    file.write_bytes(file.read_bytes()[:-100])


def no_index(path):
    shards(path)[1].unlink()


def forgetful_index(path):
    file = shards(path)[1]
    index = json.loads(file.read_text())
    del index["weight_map"]["lm_head.weight"]
    file.write_text(json.dumps(index))


def pointer(path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (path / "model.safetensors").write_text(text)


def pickled(path):
    (path / "model.safetensors").unlink()
    torch.save({"model": transformers.LlamaConfig()}, path / "pytorch_model.bin")


def adapter_alone(path):
    for file in path.iterdir():
        file.unlink()
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')


def nothing_but(name):
    def remove(path):
        for file in path.iterdir():
            if file.name != name:
                file.unlink()

    return remove


def weights(change):
    """Each (name, tensor) becomes `change(name, tensor)`."""

    def rewritten(path):
        kept = load_file(path / "model.safetensors").items()
        changed = dict(change(*item) for item in kept)
        save_file(changed, path / "model.safetensors", metadata={"format": "pt"})

    return rewritten


def settings(file="config.json", **values):
    return lambda path: rewrite(path / file, **values)


def content(file, text):
    return lambda path: (path / file).write_text(text)


LOOP = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}"
)
ASSISTANT = "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
BEGUN = LOOP.replace("{{ m.content }}", "{% if m.role == 'assistant' %}BEGUN{% endif %}{{ m.content }}") + ASSISTANT
CHANNEL = "<|channel|>final<|message|>"
DAMAGED = {
    "weights of a module": (weights(lambda name, tensor: (f"module.{name}", tensor)),
                            "no weights for lm_head.weight, model.embed_tokens.weight, model.layers.0"),
    "a short weight": (weights(lambda name, tensor: (name, tensor[1:] if name == "model.norm.weight" else tensor)),
                       "model.norm.weight: they would be random"),
    "weights that are not finite": (weights(lambda name, tensor: (name, tensor / 0 if "norm" in name else tensor)),
                                    "nothing finite (log-probs differ by nan)"),
    "an adapter beside weights": (content("adapter_config.json", '{"base_model_name_or_path": "x"}'), "merge_and_unload"),
    "a template that raises": (content("chat_template.jinja", "{{ raise_exception('no') }}"), "the chat template"),
    "a torn template": (content("chat_template.jinja", "{% if %}"), "the chat template"),
    "a template of nothing": (content("chat_template.jinja", "always the same"), "the chat template"),
    "no template by default": (lambda path: named_templates(path, ["tool_use"]), "chat template"),
    "a reply begun by a channel": (content("chat_template.jinja", BEGUN.replace("BEGUN", CHANNEL)), CHANNEL),
    "no shard": (no_shard, "cannot be loaded"),
    "torn shard": (torn_shard, "cannot be loaded"),
    "no index": (no_index, "cannot be loaded"),
    "forgetful index": (forgetful_index, "lm_head.weight: they would be random"),
    "a pointer to weights": (pointer, "cannot be loaded"),
    "a pickle": (pickled, "cannot be loaded"),
    "fewer layers": (settings(num_hidden_layers=1), "no place for: model.layers.1"),
    "more layers": (settings(num_hidden_layers=3), "no weights for model.layers.2"),
    "an adapter alone": (adapter_alone, "merge_and_unload"),
    "a configuration alone": (nothing_but("config.json"), "cannot be loaded"),
    "weights alone": (nothing_but("model.safetensors"), "config.json is missing"),
    "quantised": (settings(quantization_config={"quant_method": "own"}), "is quantised"),
    "no configuration": (content("config.json", "null"), "cannot be loaded"),
    "a type of its own": (settings(model_type="own"), "cannot be loaded"),
    "encoder and decoder": (settings(model_type="t5"), "cannot be loaded"),
    "an end of words": (settings("generation_config.json", eos_token_id="</s>"), "</s>"),
    "an end below 0": (settings("generation_config.json", eos_token_id=-1), "number -1"),
    "an end beyond": (settings("generation_config.json", eos_token_id=9999), "number 9999"),
    "no list of ends": (content("generation_config.json", "[]"), "cannot be loaded"),
    "no tokens": (content("tokenizer.json", "[]"), "cannot be loaded"),
    "no generation prompt": (content("chat_template.jinja", LOOP), "before a reply"),
    "contents in pieces": (
        content("chat_template.jinja", LOOP.replace("m.content", "m.content[0].text") + ASSISTANT),
        "the chat template"),
    "tools": (content("chat_template.jinja", "{{ tools | length }}" + LOOP + ASSISTANT), "template"),
    "a long loop": (content("chat_template.jinja", "{% for i in range(10**12) %}{% endfor %}"), "template"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_models_that_are_refused(name, model, refused):
    damage, told = DAMAGED[name]
    damage(model)
    refused(lambda: common.load(str(model)), told)


def as_pickle(path):
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")


def named_templates(path, names=("default", "tool_use")):
    template = (path / "chat_template.jinja").read_text()
    (path / "chat_template.jinja").unlink()
    named = [{"name": name, "template": template} for name in names]
    rewrite(path / "tokenizer_config.json", chat_template=named)


SOUND = {
    "shards": shards,
    "half precision": weights(lambda name, tensor: (name, tensor.half())),
    "a reply begun by an empty thought": content("chat_template.jinja", BEGUN.replace("BEGUN", "<think></think>\n")),
    "a pickle of weights": as_pickle,
    "no limit": settings(max_position_embeddings=None),
    "a limit below 0": settings(max_position_embeddings=-1),
    "named templates": named_templates,
    "a filling token beyond the embeddings": settings("tokenizer_config.json", pad_token="<pad>"),
    "odd habits": content("generation_config.json", json.dumps(
        {"do_sample": True, "temperature": 0.1, "top_k": 1, "max_length": 3, "eos_token_id": 4})),
    "no habits": content("generation_config.json", "{"),
    "no roles for the system": content("chat_template.jinja", (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + LOOP + ASSISTANT)),
    "no words of the system": content("chat_template.jinja", (
        LOOP.replace("in messages", "in messages if m.role != 'system'") + ASSISTANT)),
    "words of its own": content("chat_template.jinja", "{% if messages[0].role != 'system' %}I am.{% endif %}" + LOOP + ASSISTANT),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_models_that_are_odd_and_fine(name, model):
    SOUND[name](model)
    loaded, chat = common.load(str(model))
    asked = [{"role": "system", "content": "zqs"}, {"role": "user", "content": "zqu"}]
    words = chat.tokenizer.decode(chat.prompt(asked))
    assert words.index("zqs") < words.index("zqu")
    assert loaded.dtype == torch.float32 and 0 <= chat.pad < 600 and chat.eos[0] == 4


@pytest.mark.parametrize("call", [
    "strftime_now('%d %B %Y')",
    "date_string | default(strftime_now(\"%d %B %Y\"))",
    "strftime_now(form)",
    "strftime_now('%d ' ~ '%B %Y') if strftime_now is defined else ''",
])  # fmt: skip
def test_the_clock_of_a_template_is_the_run_s(call, model):
    common.Chat.today = datetime.datetime(2024, 2, 29)
    (model / "chat_template.jinja").write_text("{% set form = '%d %B %Y' %}{{ " + call + " }}" + LOOP + ASSISTANT)
    for rename in (lambda path: None), named_templates:
        rename(model)
        chat = common.load(str(model))[1]
        prompt = chat.prompt([{"role": "user", "content": "Hi"}])
        assert chat.tokenizer.decode(prompt).startswith("29 February 2024<|")


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "a b/c", " ", "smollm2:2", "C:\\model", "a\nb", "0" * 300])
def test_a_hub_that_cannot_be_reached_is_not_asked_again_and_again(name, refused, monkeypatch):
    asked = []

    def nowhere(*address, **how):
        asked.append(address)
        raise socket.gaierror("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    refused(lambda: common.load(name), "--model", "cannot be loaded")
    assert len(asked) <= 2  # not five times for each file, for minutes


def test_a_hub_that_answers_is_asked_for_the_files(monkeypatch):
    answer = huggingface_hub.errors.RepositoryNotFoundError
    for error, reached in (None, True), (answer, True), (OSError, False), (TimeoutError, False):

        def ask(name, timeout, error=error):
            if error:
                raise error.__new__(error)

        monkeypatch.setattr(huggingface_hub, "model_info", ask)
        assert common._hub_answers("a/b") == reached


# ----------------------------------------------------------------------------------------- runs


@dataclass
class Args:
    env: str = "toy"
    seed: int = 0
    steps: int = 4
    save_every: int = 1
    out_dir: str = ""
    resume: bool = False
    device: str = "cpu"


def started(path, **changes):
    run = common.Run("toy", Args(**changes), path)
    run.start()
    return run


def saved(path, **changes):
    """A run with a checkpoint, ended."""
    run = started(path, **changes)
    run.log({"loss": 1.0})
    run.save({"parts": {"model": {"weight": torch.arange(1000.0)}}, "progress": {}})
    run.release()
    return run


def change(path, edit):
    """`edit(state)` of a checkpoint."""
    state = torch.load(path)
    edit(state)
    torch.save(state, path)


def flip(path):
    """Changes bytes of a tensor: torch.load would not notice."""
    data = path.read_bytes()
    at = data.index(torch.arange(500.0, 510.0).numpy().tobytes())
    path.write_bytes(data[:at] + b"\1" * 40 + data[at + 40:])


CHECKPOINTS = {
    "torn": (lambda path: path.write_bytes(path.read_bytes()[:-50]), "damaged"),
    "changed bytes": (flip, "damaged"),
    "a list": (lambda path: torch.save([], path), "damaged"),
    "a directory": (lambda path: [path.unlink(), path.mkdir()], "damaged"),
    "of another seed": (lambda path: change(path, lambda s: s["args"].update(seed=1)), "another run"),
    "of another script": (lambda path: change(path, lambda s: s.update(script="act")), "another run"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_that_are_refused(name, tmp_path, refused):
    run = saved(tmp_path / "run")
    damage, told = CHECKPOINTS[name]
    damage(run.checkpoint)
    before = (run.dir / "metrics.jsonl").read_text()
    refused(lambda: common.Run("toy", Args(resume=True), run.dir), told, "state.pt")
    assert (run.dir / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"script": "toy", "args": []}', '{"script": "toy", "args": {}, "files": [1]}',
                                  '{"script": "toy", "args": {}, "date": "now"}'])  # fmt: skip
def test_records_of_a_run_that_are_refused(text, tmp_path, refused):
    run = saved(tmp_path / "run")
    (run.dir / "args.json").write_text(text)
    refused(lambda: common.Run("toy", Args(resume=True), run.dir), "args.json", "damaged")


def test_a_complete_run_without_its_checkpoint_keeps_its_logs(tmp_path, refused):
    run = saved(tmp_path / "run")
    shutil.rmtree(run.checkpoint.parent)
    common.Run("toy", Args(resume=True), run.dir).release()  # stopped before the first one
    (run.dir / "summary.json").write_text("{}")
    refused(lambda: common.Run("toy", Args(resume=True), run.dir), "complete", "state.pt")


@dataclass
class Demonstrated(Args):
    demos: str = ""


@pytest.mark.parametrize("name", ["demos", "~/demos.jsonl", "a:b", "./a[1]*", "real/"])
def test_files_are_known_by_their_content(name, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    file = tmp_path / "real" / "part" if name == "real/" else Path(name).expanduser()
    file.write_text("{}")
    (tmp_path / "toy").mkdir()  # the world's name
    run = common.Run("toy", Demonstrated(demos=name), tmp_path / "run")
    run.start()
    run.release()
    assert list(json.loads((run.dir / "args.json").read_text())["files"]) == ["demos"]
    file.write_text("[]")
    refused(lambda: common.Run("toy", Demonstrated(demos=name, resume=True), run.dir), "--demos", "changed")


def test_a_run_may_go_on_for_longer_from_an_older_checkpoint(tmp_path):
    run = saved(tmp_path / "run")
    common.Run("toy", Args(resume=True, steps=9), run.dir).start()


@pytest.mark.parametrize("where", [".", "link", "deep/../there", "~/there", "-x", os.fsdecode(b"a\xff")])
def test_directories_that_a_run_can_use(where, tmp_path, monkeypatch):
    """An empty one is kept: it may be a mount, or where the user stands."""
    (tmp_path / "home").mkdir()
    (tmp_path / "deep").mkdir()
    (tmp_path / "real").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "real" if where == "." else tmp_path)
    if where == "link":
        Path("link").symlink_to("real")
    run = common.Run("toy", Args(out_dir=where))
    run.start()
    place = {".": "real", "link": "real", "deep/../there": "there", "~/there": "home/there"}.get(where, where)
    assert (tmp_path / place / "args.json").is_file() and not Path("~").exists()
    run.write_rollouts([{"step": 1}])
    assert Path("." if where == "." else os.path.expanduser(where), "rollouts.jsonl").is_file()
    run.release()
    assert common.Run("toy", Args(out_dir=where, resume=True)).resume() is None


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def unable(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(common.fcntl, "flock", unable)
    started(tmp_path / "run").release()
    with common.locked(tmp_path / "cache" / "lock"):
        assert (tmp_path / "cache" / "lock").exists()


class Full:
    """A part of a run whose state is too large for the disk."""

    def __reduce__(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_what_was_there_and_is_one_line(tmp_path, capsys):
    run = saved(tmp_path / "run")
    before = run.checkpoint.read_bytes()
    try:
        run.save({"parts": Full()})
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "No space left" in told and "--resume" in told
    assert run.checkpoint.read_bytes() == before and not list(run.dir.rglob("*.tmp"))


def test_a_model_that_cannot_be_saved_leaves_the_old_one(tmp_path):
    class Unable(torch.nn.Module):
        def save_pretrained(self, path, state_dict=None):
            (path / "half").write_text("")
            raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("")
    with contextlib.suppress(OSError):
        common.save_model(tmp_path / "model", Unable(), None)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


@pytest.mark.parametrize("number", sorted(common.Run.STOPS))
def test_signals_stop_a_run_after_its_step(number, tmp_path):
    signal.signal(number, signal.SIG_DFL)  # also where the tests run below nohup
    run = started(tmp_path / "run")
    for _ in run.steps(0, 1):
        signal.raise_signal(number)
        assert run.stopping == 128 + number
        assert all(signal.getsignal(n) == signal.SIG_DFL for n in run.STOPS)  # the second one kills
        break


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_between_steps_stops_at_once(when, tmp_path, capsys):
    """In an evaluation before the first step or after the last one, which --resume makes again."""
    run = started(tmp_path / "run")
    if when == "after":
        assert list(run.steps(0, 2)) == [1, 2]
    with pytest.raises(SystemExit) as left:
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 143 and "--resume goes on" in capsys.readouterr().err


def test_a_full_card_is_told_in_one_line(tmp_path, capsys):
    started(tmp_path / "run")
    error = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
    sys.excepthook(type(error), error, None)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("error: out of memory: lower --rollout-batch-size")


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    run = started(tmp_path / "run")
    signal.raise_signal(signal.SIGHUP)
    assert not run.stopping


def test_nobody_listens(monkeypatch):
    """`| head -1`, a terminal that is gone, a full disk: what is said is lost, nothing else."""
    reading, writing = os.pipe()
    os.close(reading)
    for name in "stdout", "stderr":
        monkeypatch.setattr(sys, name, os.fdopen(os.dup(writing), "w", encoding="ascii"))
    for _ in range(2):
        common.parse_args(Args, argv=[])
        print("\u2615", flush=True)
        print("once more", file=sys.stderr, flush=True)
        assert sys.stdout.encoding == "ascii"
    for stream in sys.stdout, sys.stderr:
        with contextlib.suppress(OSError):
            stream.stream.close()
    os.close(writing)


@pytest.mark.parametrize("line", [b"\xff", b'{"a": "\\ud800"}', b"[" * 10**5, b"9" * 5000,
                                  b"{} {}", b"{", b'"a\tb"', b"\0"])  # fmt: skip
def test_lines_that_are_refused(line, tmp_path, refused):
    (tmp_path / "data.jsonl").write_bytes(b"{}\n\n" + line)
    refused(lambda: common.read_jsonl(tmp_path / "data.jsonl", "--demos"), "--demos", "line 3")


# --------------------------------------------------------------------------------------- worlds

WORLD = '''
import envs

class Gate(envs.World):
    """Opens at the third knock."""
    name, max_turns, task, system = "gate", 4, "Open the gate.", "Say knock."
    def begin(self, rng, split):
        self.knocks = 0
        return "A gate."
    def admissible(self):
        return ["knock", "wait"]
    def act(self, text):
        self.knocks += 1
        self.won = self.knocks > 2
        return "It sounds.", True
    def expert(self):
        return "knock"
    def close(self):
        pass
'''
BUGS = {  # a line of the world, what stands in its place, what is said
    "no import": ("import envs", "import nothing_of_that_name", "cannot be imported"),
    "leaves": ("import envs", "import envs, sys; sys.exit(3)", "cannot be imported"),
    "no world": ("(envs.World)", "", "Gate"),
    "begin": ('return "A gate."', "return 1 / 0", "begin, line ?: ZeroDivisionError"),
    "no opening": ('return "A gate."', "return None", "NoneType"),
    "third turn": ("self.knocks += 1", "self.knocks += 1 / (self.knocks < 2)", "act, line ?: ZeroDivisionError"),
    "no answer": ('return "It sounds.", True', "return None", "NoneType"),
    "too much": ('return "It sounds.", True', 'return "It sounds.", 0.0, True', "not (text, valid)"),
    "ends all": ("self.knocks += 1", "raise SystemExit(0)", "act, line ?: SystemExit"),
    "no list": ('return ["knock", "wait"]', 'raise KeyError("x")', "admissible, line ?: KeyError"),
    "numbers": ('return ["knock", "wait"]', "return [1, 2]", "int"),
    "expert": ('return "knock"', 'return {}["x"]', "expert, line ?: KeyError"),
    "silent expert": ('return "knock"', "return None", "NoneType"),
    "reading": ("def close(self):\n        pass", "def read(self, reply):\n        return reply[99]", "read, line ?: IndexError"),
    "score": ("def close(self):\n        pass", "def score(self):\n        return 5.0", "between 0 and 1"),
    "no score": ("def close(self):\n        pass", "def score(self):\n        return float('nan')", "between 0 and 1"),
    "one split": ("name, max_turns", "splits = ('train',)\n    name, max_turns", "no split 'test'"),
    "no task": ('"Open the gate."', "None", "strings"),
    "constructor": ("def close(self)", "def __init__(self, size)", "size"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_bugs_of_a_world_of_ones_own_show_at_once(name, tmp_path):
    old, new, told = BUGS[name]
    assert WORLD.count(old) == 1
    (tmp_path / "gate.py").write_text(WORLD.replace(old, new))
    with pytest.raises(ValueError) as caught:
        envs.make(f"{tmp_path}/gate.py:Gate")
    said = re.sub(r"line \d+:", "line ?:", str(caught.value))
    assert told in said and "gate.py" in said
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("new", [
    'return ""', 'return "a\\tb\\0c\\x1b[2J\\r\\nd"', 'return "half a character: \\ud83d"', 'return "word " * 10**5',
    'return "<|eot_id|><|start_header_id|>system"', 'return "\\u2615"',
])  # fmt: skip
def test_worlds_may_say_anything(new, tmp_path, llama):
    (tmp_path / "gate.py").write_text(WORLD.replace('return "A gate."', new).replace('"It sounds."', new.removeprefix("return ")))
    world = envs.make(f"{tmp_path}/gate.py:Gate", show_actions=True)
    observation, _ = world.reset(seed=0)
    assert observation.encode() and world.step("knock")[0].encode()
    chat = common.Chat(transformers.AutoTokenizer.from_pretrained(llama))
    prompt = chat.prompt([{"role": "user", "content": observation}])
    assert prompt.count(chat.eos[0]) == 1  # of the user's message


def test_a_world_without_an_expert_is_a_world(tmp_path):
    (tmp_path / "gate.py").write_text(WORLD.replace("def expert", "def friend").replace("class Gate", "class Open"))
    world = envs.make(f"{tmp_path}/gate.py:Open")
    assert world.observation is None  # the one that is returned has not been played


# -------------------------------------------------------------------------------------- parsers

PIECES = [
    "<", "<action>", "</action>", "<action>a</action>", "<action ", "Action:", "Action: \n", "**", "`", '"', "'", "\u201c", "- ", "> ",
    "1. ", "# ", "{", '{"a":', "[", '{"name": "search", "arguments": {', "<tool_call>", "<tool_call>{", "\\u", "\n", " ", "\t", " \n",
    "---", "```\n", "the first one ", "option 2:", "Action 1 is better ", "1", "(", "-", "1+", "9**", "Label:", "positive ", "<think>",
    "</think>", "put a in ", " in/on ", "is it ", ". ", "\x1c", "\u2028", "\u0130",
]  # fmt: skip
WORLDS = {name: envs.make(name) for name in ("repair", "household", "household-full", "search", "20q", "20q-full")}


@pytest.mark.parametrize("piece", PIECES)
def test_replies_of_one_piece_without_end(piece):
    """50,000 characters in steps that grow with their square would take minutes."""
    for start, end in ("", ""), ("Action: ", "x"), ("<action>", ""):
        reply = start + piece * (50_000 // len(piece)) + end
        assert self_guide.parse_rating(reply) in (None, -1, 0, 1)
        chosen = act.chosen_of_two(WORLDS["household"], reply, "look", "go to desk 1")
        for action in act.parse_action(reply), chosen:
            assert action is None or len(action) <= len(reply)


def test_any_reply_is_legal_in_every_world():
    for (name, world), piece in itertools.product(WORLDS.items(), PIECES):
        world.reset(seed=0)
        observation, reward, *_, info = world.step((piece * 3900)[:3900])
        assert observation.encode() and 0 <= info["score"] <= 1, (name, piece)
