"""Fixtures to run the script under test, once per test file: test_nlac.py tests nlac.py, test_contract.py all of them in turn.

They read from the test file: SMALL (the flags of a small run), WORLD and ARGS (of `tiny`), save_llama, and PREPARE where there is one.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.register_assert_rewrite("helpers")  # or its asserts would not say what they compared
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script(request):
    """The name of the script under test."""
    return request.module.__name__.removeprefix("test_")


@pytest.fixture(scope="module")
def small(request):
    """The flags of a small run."""
    return request.module.SMALL


@pytest.fixture(scope="module")
def prepare(request):
    """Code that the process which runs the script executes first."""
    return getattr(request.module, "PREPARE", "")


# ------------------------------------------------------------------------------------------------------- models to run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One cache of tiny models for all tests of a file."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny(request, script, home):
    """(model, chat) as load(WORLD, ARGS) of the script makes them: shared, so do not train it; copy it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        return sys.modules[script].load(request.module.WORLD, request.module.ARGS)


@pytest.fixture(scope="module")
def llama(request, tmp_path_factory):
    """The path of a model from elsewhere."""
    return request.module.save_llama(tmp_path_factory.mktemp("llama") / "model")


# -------------------------------------------------------------------------------------------------------- ways to run it


@pytest.fixture(scope="module")
def environment(home):
    return os.environ | {"XDG_CACHE_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                         "PYTHONPATH": str(ROOT)}  # fmt: skip


@pytest.fixture(scope="module")
def run_as_user(environment, script):
    """run_as_user("--flags ...", cwd) -> status, stdout, stderr of `python nlac.py --flags ...`."""

    def run(flags, cwd, timeout=None):
        command = [sys.executable, ROOT / f"{script}.py", *flags.split()]
        result = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout)
        return SimpleNamespace(status=result.returncode, stdout=result.stdout, stderr=result.stderr)

    return run


# Importing torch takes seconds: one process does it and forks a child per run. `prepare` is code that it executes before the first one,
# `fault` is code that the child executes first.
SERVER = """
import importlib, json, os, signal, sys
import torch, transformers
torch.set_num_threads(1)
import common
transformers.LlamaForCausalLM, transformers.Qwen3ForCausalLM, transformers.AutoTokenizer, transformers.DynamicCache
optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
optimizer.zero_grad(), optimizer.step()  # what a run would import late
script, prepare = sys.argv[1:]
module = importlib.import_module(script)
exec(prepare)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        try:
            for number, name in (1, "stdout"), (2, "stderr"):
                os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.chdir(job["cwd"])
            sys.argv = [f"{script}.py", *job["argv"]]
            exec(job["fault"], {"common": common, "script": module, script: module, "os": os, "signal": signal})
            module.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run_script(script, prepare, environment, tmp_path_factory):
    """run_script("--flags ...", cwd) -> the same as of `run_as_user`, from a fork of one process: faster."""
    streams = tmp_path_factory.mktemp("streams")
    command = [sys.executable, "-c", SERVER, script, prepare]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(flags, cwd, fault=""):
        job = {"argv": flags.split(), "cwd": str(cwd), "fault": fault, "stdout": str(streams / "out"), "stderr": str(streams / "err")}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return SimpleNamespace(status=status, stdout=(streams / "out").read_text(), stderr=(streams / "err").read_text())

    yield run
    server.stdin.close()
    assert server.wait(timeout=60) == 0


@pytest.fixture
def run_here(monkeypatch, script, environment, tmp_path):
    """run_here("--flags ...") runs main() in this process and in tmp_path, so that functions of the script can be watched."""
    monkeypatch.setenv("XDG_CACHE_HOME", environment["XDG_CACHE_HOME"])
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(flags):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
        sys.modules[script].main()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(small, run_script, tmp_path_factory):
    """A small run that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole")
    result = run_script(f"{small} --out-dir run", path)
    assert result.status == 0, result.stderr
    return path / "run"
