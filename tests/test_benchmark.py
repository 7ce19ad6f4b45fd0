"""docs/memory.py against what was measured and what can be counted here; the kit for a card, in small."""

import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(ROOT / "docs"))
sys.path.insert(0, str(ROOT / "tests"))
import benchmark
import memory

import common

torch.set_num_threads(1)
SIZES = (192, 640, 6, 6, 2, 3000)
SHAPE = memory.Shape(*SIZES)
TOKENS = 501  # a size that no weight has
HOW = [dict(rank=rank, checkpointing=checkpointing) for rank in (0, 4) for checkpointing in (False, True)]


@pytest.fixture
def model(monkeypatch, request):
    monkeypatch.setitem(benchmark.SHAPES, "here", SIZES)
    return benchmark.random_model(SimpleNamespace(shape="here", device="cpu"), mixed=True, **request.param)


def batch():
    return benchmark.batch(SimpleNamespace(length=TOKENS), 1, 4)


def test_peaks_of_a_card():
    """What an H200 took, when AdamW's step was not fused and the head held 16.4 bytes."""
    found = 0
    for line in (ROOT / "docs" / "gpu_h200.jsonl").read_text().splitlines():
        record = json.loads(line)
        shape = memory.SHAPES.get("Qwen2.5-" + record["shape"])
        if record["part"] == "train":
            tokens = record["rows"] * record["length"]
            expected = memory.training(shape, tokens, tokens / 4, step=20, head=16.4)
        elif record.get("positions") == "sampled":  # 4 x 2,048 tokens, an eighth of them; no moments
            expected = memory.training(shape, 8192, 1024, head=16.4) - 8 * shape.parameters
        else:
            continue
        found += 1
        assert record["peak_GB"] * 1e9 == pytest.approx(expected, rel=0.02), record
    assert found == 5


@pytest.mark.parametrize("model", HOW, indirect=True)
def test_what_layers_keep(model, request):
    how = request.node.callspec.params["model"]
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    sizes = {weight.numel() * 2 for weight in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.nbytes() not in sizes:  # nor a copy of one
            found[storage.data_ptr()] = storage
        return tensor

    ids, mask = batch()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs = common.token_logprobs(model, ids, mask)
    kept = sum(storage.nbytes() for storage in found.values())
    kept -= 4 * int(mask.sum()) * SHAPE.vocabulary  # of the head
    del logprobs
    layer = memory.kept(SHAPE, how["rank"])
    if how["checkpointing"]:
        layer = (2 if how["rank"] else 4) * SHAPE.width
    last = (4 if how["rank"] else 8) * SHAPE.width  # the norm behind the layers
    assert kept / TOKENS == pytest.approx(SHAPE.layers * layer + last, rel=0.03)


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that operations returned and that live, and the most at any time."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.most = max(self.most, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("model", HOW, indirect=True)
def test_the_peak_of_whole_steps(model, request):
    """All allocations of two steps, the second with moments."""
    how = request.node.callspec.params["model"]
    assert common.count_parameters(model) == pytest.approx(
        SHAPE.parameters + (SHAPE.adapters(4) if how["rank"] else 0), rel=0.01)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids, mask = batch()
    with Allocations() as seen:
        for weight in model.parameters():
            weight.view(-1)  # is there from the start
        for _ in range(2):
            benchmark.learn(model, optimizer, ids, mask)
    expected = memory.training(SHAPE, TOKENS, int(mask.sum()), **how)
    assert seen.most == pytest.approx(expected, rel=0.06)


def test_the_table_is_of_this_function():
    table = subprocess.run([sys.executable, ROOT / "docs" / "memory.py"], capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "memory.md").read_text() == table.stdout


def test_a_step_of_act():
    settings = SimpleNamespace(arm="ours", model="", shape="tiny", device="cpu", rows=[4], new=4, micro=1, rounds=1)
    [found] = benchmark.grpo(settings)
    assert found["group"] == 4 and found["length"] > 100 and found["seconds"] > 0


def kit(out, environment, *seconds):
    """What `bash docs/gpu.sh OUT dry` leaves: its process, and the records of its benchmark."""
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(["bash", ROOT / "docs" / "gpu.sh", out, "dry", *seconds], env=environment | {"PATH": path},
                          capture_output=True, text=True)  # fmt: skip
    return done, [json.loads(line) for line in (out / "benchmark.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_kit_walks_through_in_small(tmp_path, environment):
    """`environment` has a cache of its own: the runs build their tiny models."""
    done, records = kit(tmp_path / "out", environment)
    assert done.returncode == 0, done.stderr
    assert {record["part"] for record in records} == {"step", "decode", "grpo", "episodes", "head"}
    for record in records:
        skipped = "skipped" in record and "trl" in record["flags"]
        assert skipped or record["peak_GB"] > 0 and "failed" not in record, record


def test_the_kit_ends_when_its_time_is_over(tmp_path, environment):
    done, records = kit(tmp_path / "out", environment, "16")
    assert done.returncode == 0, done.stderr
    assert "step" in {record["part"] for record in records if "seconds" in record}
    assert {record["part"] for record in records if "skipped" in record} >= {"decode", "head", "episodes"}
    assert "nlac: no time left" in done.stdout
    again = subprocess.run(["bash", ROOT / "docs" / "gpu.sh", tmp_path / "out", "dry"], capture_output=True, text=True)
    assert again.returncode == 2 and "is not empty" in again.stderr  # nobody's runs are deleted


def test_a_part_may_fail_alone(tmp_path, capsys):
    lines = ["step --shape tiny --arm nothing", "step --shape tiny --length 32 --rounds 1 --arm full"]
    benchmark.run_all(lines, tmp_path / "out.jsonl", 100)
    failed, measured = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert failed["failed"].startswith("KeyError") and measured["seconds"] > 0 and measured["TFLOPS"] > 0
    assert "nothing" in capsys.readouterr().out


def test_floating_point_operations_by_hand():
    """One layer's product is 2 operations a weight and token, forward and twice backward; adapters spare a third."""
    args = SimpleNamespace(shape="tiny", arm="full")
    ids, mask = torch.zeros(2, 8), torch.zeros(2, 8)
    mask[:, -2:] = 1
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    attention = 2 * 2 * 64 * sum(range(1, 9)) * 2 * 2  # layers, products, width, pairs, rows, 2 a pair
    expected = 3 * (2 * linear * 16 + 2 * 64_000 * 4 + attention)
    assert benchmark.flops(args, ids, mask) == pytest.approx(expected, rel=0.05)
    args.arm = "lora"
    assert benchmark.flops(args, ids, mask) < expected * 0.75
