"""Worlds that others wrote: mathematics, reasoning-gym, Gymnasium's; the checker; all scripts in all of them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
from conftest import ROOT

import envs
from envs import make, run_episode

checker = envs.load(envs.FOLDER / "_check.py", "worlds._check")

# ------------------------------------------------------------------------------------------- mathematics

ONE_TWO = r"\begin{pmatrix}1\\2\end{pmatrix}"
# gold, what was said, whether it is right
PAIRS = [
    # numbers
    ("72", "72", True), ("72", "73", False), ("72", "72.0", True), ("-3", "-3", True),
    ("-3", "3", False), ("033", "33", True), ("33", "033", True), ("1,000", "1000", True),
    ("1000", r"\boxed{1,000}", True), ("72", "It is 72 dollars.", True), ("12", "twelve", False),
    ("72", r"The price is 6 times 12, $6 \cdot 12 = 72$.", True), ("12", "**Answer:** 12", True),
    ("12", "#### 12", True), ("5", r"\boxed{\$5}", True), (r"\$5", r"\boxed{5}", True),
    ("6", r"\boxed{6 \text{ cm}}", True), (r"90^\circ", r"\boxed{90}", True),
    (r"50\%", r"\boxed{50\%}", True), (r"50\%", r"\boxed{0.5}", True), ("2^{10}", r"\boxed{1024}", True),
    ("10!", r"\boxed{3628800}", True),
    # fractions and roots
    (r"\frac{1}{2}", r"The answer is \boxed{0.5}.", True), ("3/4", r"\boxed{\dfrac34}", True),
    (r"\frac{3}{4}", "3/4", True), (r"11\frac{1}{2}", r"\boxed{11.5}", True),
    (r"\frac{1}{3}", r"\boxed{0.333}", False), ("0.333", r"\boxed{\frac{1}{3}}", False),
    (r"\sqrt{2}", r"\boxed{2^{1/2}}", True), (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", True),
    (r"\pi", r"\boxed{3.14}", False),
    # expressions
    ("x^2+1", r"\boxed{1+x^2}", True), ("x^2+1", r"\boxed{x^2-1}", False), ("5", r"\boxed{x=5}", True),
    ("x=5", r"\boxed{5}", True), ("y=2x+3", r"\boxed{y = 2x + 3}", True),
    ("y=2x+3", r"\boxed{y = 3x + 2}", False), ("x<2", r"\boxed{2>x}", True),
    ("1+2i", r"\boxed{2i+1}", True),
    # pairs, sets, intervals, matrices
    ("(3,4)", r"\boxed{(3, 4)}", True), ("(3,4)", r"\boxed{(4,3)}", False), ("1,2", r"\boxed{2, 1}", True),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", True), (r"[0,\infty)", r"\boxed{[0,\infty)}", True),
    (r"[0,\infty)", r"\boxed{(0,\infty)}", False),
    (ONE_TWO, r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", True),
    (ONE_TWO, r"\boxed{\begin{pmatrix} 2 \\ 1 \end{pmatrix}}", False),
    # words
    (r"\text{Evelyn}", r"\boxed{Evelyn}", True), (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", True),
    (r"\text{Evelyn}", r"\boxed{Anna}", False), (r"\text{(A)}", r"\boxed{A}", True),
    # several answers: all boxes count, without a box the last number does
    ("72", r"\boxed{70} \boxed{71} \boxed{72}", False), ("72", r"First \boxed{73}, no: \boxed{72}", False),
    ("72", r"\boxed{72}. I repeat: \boxed{72}", True), ("72", "70 or 72", True), ("72", "72 or 70", False),
    # no answer
    ("12", "I do not know.", False), ("12", r"\boxed{}", False), ("12", r"\boxed{12", False),
    ("12", "{" * 3000, False), ("12", r"\frac{" * 1000, False), ("12", "\x00\ud800", False),
    ("12", "(" * 1500 + "1" + ")" * 1500, False),
]  # fmt: skip
HOSTILE = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{1000000000!}"]


@pytest.fixture
def mathematics():
    pytest.importorskip("math_verify")
    module = envs.module_of("math")
    yield module
    module.JUDGE.stop()


@pytest.fixture
def judge(mathematics):
    """One with little time."""
    found = envs.load(envs.FOLDER / "_judge.py", "worlds._judge").Judge("mathematics", seconds=1)
    yield found
    found.stop()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count, first=0):
    return [{"problem": f"What is {i} + {i}?", "answer": 2 * i} for i in range(first, first + count)]


def test_sixty_pairs(mathematics):
    assert len(PAIRS) >= 60
    wrong = [pair for pair in PAIRS if bool(mathematics.JUDGE.ask(*pair[:2])) != pair[2]]
    assert not wrong


def test_hostile_expressions_end_with_the_process_that_reads_them(judge):
    assert judge.ask("12", "12") is True
    for text in HOSTILE:
        first = judge.process.pid
        assert judge.ask("12", text) is None and judge.process is None
        assert not Path(f"/proc/{first}").exists()
        assert judge.ask("12", "12") is True


def test_verdicts_in_threads(judge):
    found = {}

    def ask(number):
        found[number] = judge.ask(str(number), "3")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: number == 3 for number in range(6)}


def test_a_judge_that_somebody_ended_starts_anew(judge):
    judge.ask("1", "1")
    os.kill(judge.process.pid, signal.SIGKILL)
    judge.process.wait()
    assert judge.ask("1", "1") is True


def test_a_fork_has_a_judge_of_its_own(judge):
    judge.ask("1", "1")
    first = judge.process.pid
    child = os.fork()
    if not child:
        os._exit(0 if judge.ask("2", "2") and judge.process.pid != first else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert judge.process.pid == first and judge.ask("1", "2") is False


def test_the_judge_does_not_outlive_its_parent(mathematics):
    code = (
        "import envs, sys, threading, time\n"
        "judge = envs.load(envs.FOLDER / '_judge.py', 'worlds._judge').Judge('mathematics', seconds=1)\n"
        "judge.ask('1', '1')\n"
        "threading.Thread(target=judge.ask, args=('1', sys.argv[1]), daemon=True).start()\n"
        "print(judge.process.pid, flush=True); time.sleep(1000)"
    )
    command = [sys.executable, "-c", code, HOSTILE[0]]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    judge = int(parent.stdout.readline())
    time.sleep(1)  # it thinks
    parent.kill()
    parent.communicate()
    for _ in range(300):
        if not Path(f"/proc/{judge}").exists() or "\nState:\tZ" in Path(f"/proc/{judge}/status").read_text():
            return
        time.sleep(0.1)
    os.kill(judge, signal.SIGKILL)
    pytest.fail("it goes on")


MATH = {"problem": "Half of one?", "solution": r"It is $\boxed{1}$, no, $\boxed{\frac{1}{2}}$.",
        "level": "Level 1", "type": "Prealgebra"}  # fmt: skip
GSM8K = {"question": "Natalia has 48, then half of it more. How many?",
         "answer": "She has 48/2 = <<48/2=24>>24 more.\n48+24 = <<48+24=72>>72\n#### 72"}  # fmt: skip
AIME = {"ID": "2024-I-1", "Problem": "What is 30 + 3?", "Solution": "Add.", "Answer": 33}


@pytest.mark.parametrize("row, answer, solution", [
    (MATH, r"\frac{1}{2}", MATH["solution"]), (AIME, "33", "Add."),
    (GSM8K, "72", "She has 48/2 = 24 more.\n48+24 = 72"),
    ({"problem": "x", "solution": r"so \fbox{7}"}, "7", r"so \fbox{7}"),
    ({"problem": "x", "solution": r"so $\boxed 5$."}, "5", r"so $\boxed 5$."),
    ({"problem": "x", "solution": r"\boxed{\{1, \}}"}, r"\{1, \}", r"\boxed{\{1, \}}"),
])  # fmt: skip
def test_schemas(mathematics, row, answer, solution):
    found = mathematics.problem_of(row)
    assert found.answer == answer and found.solution == solution
    assert found.text == row.get("problem") or row.get("question") or row["Problem"]


@pytest.mark.parametrize("row", [
    {}, {"problem": "x"}, {"problem": "", "answer": "1"}, {"problem": "x", "answer": None},
    {"problem": "x", "solution": "no box"}, {"problem": "x", "solution": r"\boxed{open"},
    {"question": "x", "answer": "steps ####"}, {"problem": "x", "solution": r"\boxed{}"},
])  # fmt: skip
def test_rows_without_an_answer(mathematics, row):
    assert mathematics.problem_of(row) is None


def test_a_solution_is_thought_before_its_answer_alone(mathematics, tmp_path):
    rows = [{"problem": f"What is {n} + 0?", "solution": f"Add: \\boxed{{{n}}}."} for n in range(40)]
    env = make(f"math:{write(tmp_path / 'solved.jsonl', rows)}")
    env.reset(seed=3)
    assert env.thought(env.expert()).startswith("Add: ")
    assert env.thought("") == env.thought(r"\boxed{99}") == ""


def test_a_problem_is_played(mathematics, tmp_path):
    path = write(tmp_path / "sums.jsonl", sums(40))
    env = make(f"math:{path}")
    for split in env.splits:
        assert run_episode(env, envs.expert_player, 1, split)["won"]
    observation, info = env.reset(seed=3)
    assert observation == info["task"] and info["admissible"] is None
    half = int(observation.split()[2])
    assert "Add" not in observation and env.thought(env.expert()) == ""
    after = env.step(f"I add.\n**Action:** it is \\boxed{{{2 * half}}}")
    assert after[:3] == ("That is right. You win after 1 turn.", 1.0, True) and after[4]["won"]
    env.reset(seed=3)
    assert env.step(f"Action: {2 * half + 1}")[0] == "That is not right. The game is over and you did not win."
    env.reset(seed=3)
    assert env.step("Action:")[4]["valid"] is False
    env.reset(seed=3)
    env.step(HOSTILE[0])
    assert not env.won
    env.close()
    assert mathematics.JUDGE.process is None


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "directory"])
def test_files(mathematics, tmp_path, kind):
    import datasets

    rows = datasets.Dataset.from_list(sums(40))
    if kind == "directory":
        path = tmp_path / "sums"
        path.mkdir()
        write(path / "train.jsonl", sums(30)), write(path / "test.jsonl", sums(20, first=20))
    else:
        path = tmp_path / f"sums.{kind}"
        writer = {"parquet": rows.to_parquet, "csv": rows.to_csv}.get(kind, rows.to_json)
        writer(path)
    found = mathematics.problems(str(path))
    train, test = ({problem.text for problem in found[split]} for split in ("train", "test"))
    assert train and test and not train & test and len(train | test) == 40
    assert kind != "directory" or (len(train), len(test)) == (20, 20)  # of 30, 10 are in test
    make(f"math:{path}").close()


def test_rows_that_are_left_out_are_counted(mathematics, tmp_path):
    path = write(tmp_path / "some.jsonl", [*sums(20), {"problem": "x", "answer": None}])
    with pytest.warns(UserWarning, match="1 of 21 rows"):
        mathematics.problems(str(path))


@pytest.mark.filterwarnings("ignore:math.*left out")
@pytest.mark.parametrize("text, words", [
    (None, "FileNotFoundError"), ("", "cannot be read"), ("{", "Error"), ('{"text": "x"}\n' * 9, "no problem is left"),
    ('{"problem": "x", "answer": "1"}\n', "no problem is left for"),
])  # fmt: skip
def test_what_is_no_data_is_one_line(mathematics, tmp_path, text, words):
    if text is not None:
        (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        make(f"math:{tmp_path}/bad.jsonl")
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_the_name_hides_no_module():
    assert not (ROOT / "worlds" / "math.py").exists() and "math" in envs.further_worlds()
    code = "import math; print(math.pi)"
    run = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'); {code}"]
    assert subprocess.run(run, cwd=ROOT / "worlds", capture_output=True, text=True).stdout == "3.141592653589793\n"


# ------------------------------------------------------------------------------------------- extras

NEEDED = {"math": "math_verify", "rg": "reasoning_gym"}


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_extra_is_a_hint(name, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in NEEDED.values() else find(name))
    with pytest.raises(ValueError, match=f"needs {NEEDED[name].replace('_', '-')}: pip install"):
        make(f"{name}:x")


def test_the_table_goes_on_where_something_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.py").write_text("import no_such_package")
    (tmp_path / "wanting.py").write_text("def make(argument=''):\n    raise ValueError('pip install x')\n")
    (tmp_path / "good.py").write_text(WORLD + "SHOWN = '', 'two'\ndef make(argument=''):\n    return Safe()\n")
    monkeypatch.setattr(envs, "FOLDER", tmp_path)
    monkeypatch.setattr(envs, "WORLDS", {})
    monkeypatch.setattr(envs, "ALIASES", {})
    envs.list_worlds(episodes=10)
    rows = capsys.readouterr().out.splitlines()[2:-1]
    assert [row.split()[0] for row in rows] == ["broken", "good", "good:two", "wanting"]
    assert "ModuleNotFoundError" in rows[0] and "pip install x" in rows[3]
    assert rows[1].split()[4:7] == ["1.000", "(0.000)", "10"]
    for name in "broken", "good", "wanting":
        sys.modules.pop(f"worlds.{name}", None)


# ------------------------------------------------------------------------------------- reasoning-gym

SETS = ["family_relationships", "chain_sum:max_terms=2,max_digits=1", "sudoku", "countdown", "acre",
        "number_sorting", "gsm_symbolic", "list_functions", "pool_matrix"]  # fmt: skip


@pytest.fixture
def rg():
    pytest.importorskip("reasoning_gym")
    module = envs.module_of("rg")
    yield module
    module.JUDGE.stop()


@pytest.mark.parametrize("name", SETS)
def test_sets(rg, name):
    env, questions, state = make(f"rg:{name}"), {}, random.getstate()
    numbers = numpy.random.get_state()[1].tolist()
    for split in env.splits:
        questions[split] = set()
        for seed in range(8):
            played = run_episode(env, envs.expert_player, seed, split)
            assert played["won"] and not played["invalid"]
            assert env.reset(seed=seed, options={"split": split})[0] == played["observations"][0]
            questions[split].add(played["observations"][0])
    assert not questions["train"] & questions["test"] and len(questions["train"]) > 4
    assert random.getstate() == state and numpy.random.get_state()[1].tolist() == numbers
    env.close()
    assert rg.JUDGE.process is None


def test_few_answers_are_listed(rg):
    env, rng = make("rg:family_relationships"), random.Random(0)
    _, info = env.reset(seed=0)
    assert {"mother", "father", "wife", "husband"} <= {*info["admissible"]} and len(info["admissible"]) <= rg.FEW
    assert make("rg:chain_sum").admissible() is None
    wrong = rng.choice([answer for answer in info["admissible"] if answer != env.expert()])
    assert env.step(f"Action: **{wrong}**\nI am sure.")[:3] == ("That is not right. The game is over and you did not win.", 0.0, True)
    env.close()


def test_scores_are_those_of_the_set(rg, monkeypatch):
    env = make("rg:countdown")
    env.reset(seed=0)
    assert env.step("no expression")[1] == 0.01  # as upstream has it
    rg.JUDGE.stop()
    monkeypatch.setattr(rg, "JUDGE", envs.load(envs.FOLDER / "_judge.py", "worlds._judge").Judge("rg", seconds=1))
    env.reset(seed=0)
    observation, reward, *_ = env.step("9**9**9**9")  # its scorer would compute that
    assert reward == 0 and "not right" in observation and rg.JUDGE.process is None
    env.close()


def test_an_answer_is_a_line_or_more(rg):
    lines, grid = make("rg:family_relationships"), make("rg:sudoku")
    for form in "{}", "**{}**", "Action: {}\nBecause of the wife.", "I think.\n**Action:** `{}`":
        lines.reset(seed=4)
        assert lines.step(form.format(lines.expert()))[4]["won"], form
    for form in "{}", "I think.\nAction:\n{}\n":
        grid.reset(seed=4)
        assert grid.step(form.format(grid.expert()))[4]["won"], form
    quoted = make("rg:codeio")
    quoted.reset(seed=0)
    quoted.entry = envs.module_of("rg").entry("codeio", "{}", 28)
    assert quoted.expert().startswith('"') and quoted.step(quoted.expert())[4]["won"]
    lines.close(), grid.close(), quoted.close()


def test_sets_without_an_answer_have_no_expert(rg):
    env = make("rg:propositional_logic")
    assert type(env).expert is envs.World.expert
    env.reset(seed=0)
    with pytest.raises(NotImplementedError):
        env.expert()
    env.step("Action: A")
    env.close()


@pytest.mark.parametrize("name, words", [
    ("rg", "none is named ''; some are: ab"), ("rg:chain_sun", "some are: chain_sum"),
    ("rg:chain_sum:colour=1", "TypeError"), ("rg:chain_sum:min_terms=0", "AssertionError"),
    ("rg:chain_sum:min_terms=two", "TypeError"), ("rg:composite", "AssertionError"),
    ("rg:chain_sum:min_digits", "TypeError|ValueError"),
])  # fmt: skip
def test_what_is_no_set_is_one_line(rg, name, words):
    with pytest.raises(ValueError, match=words) as error:
        make(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


# ---------------------------------------------------------------------------------------- Gymnasium

GYM = '''
{imports}
class Guess({base}):
    """A number from 1 to 7."""
    action_space = {space}
    system = "Guess the number."

    def reset(self, *, seed=None, options=None):
        {seeded}
        self.number = 2 * (seed // 2 % 3) + 1 + seed % 2  # odd in train, even in test
        return "A number from 1 to 7.", {{"task": "Guess it."}}

    def step(self, action):
        guess = {guess}
        won = guess == self.number
        return ("Yes." if won else "Higher." if guess < self.number else "Lower."), float(won), won, False, {{}}

class Told(Guess):
    max_turns = 3
    def expert(self):
        return self.number
    def step(self, action):
        observation, _, over, _, info = super().step(action)
        return observation, -1.0, over, not over and action == 1, {{"is_success": over, "admissible_commands": ["1", "2"]}}

class Picture(Guess):
    def reset(self, *, seed=None, options=None):
        return [0, 1], {{}}

class Nothing:
    pass
'''
MIMIC = dict(imports="", base="", seeded="", space="None", guess="int(action) if action.isdecimal() else 0")
REAL = MIMIC | dict(imports="import gymnasium", base="gymnasium.Env", seeded="super().reset(seed=seed)",
                    space="gymnasium.spaces.Text(40)")  # fmt: skip
NUMBERED = REAL | dict(space="gymnasium.spaces.Discrete(7, start=1)", guess="int(action)")


def guessing(tmp_path, filled, name="Guess"):
    if filled["imports"]:
        pytest.importorskip("gymnasium")
    (tmp_path / "guess.py").write_text(GYM.format(**filled))
    return f"{tmp_path}/guess.py:{name}"


def halving(env, info, rng):
    """Wins in 3 turns."""
    if not env.turns:
        env.bounds = [1, 7]
    elif "Higher" in env.observation:
        env.bounds[0] = env.said + 1
    else:
        env.bounds[1] = env.said - 1
    env.said = sum(env.bounds) // 2
    return f"Action: {env.said}"


@pytest.mark.parametrize("filled", [MIMIC, REAL, NUMBERED])
def test_an_environment_of_gymnasium_is_a_world(tmp_path, filled):
    name = guessing(tmp_path, filled)
    env = make(name)
    assert env.name == "Guess" and env.system == "Guess the number." and env.max_turns == 20
    played = run_episode(env, halving, 3, "test")
    assert played["won"] and played["score"] == 1 and played["turns"] <= 3 and not played["invalid"]
    assert played["observations"][0] == "A number from 1 to 7. 20 turns left."
    assert env.reset(seed=3, options={"split": "test"}) == env.reset(seed=3, options={"split": "test"})
    _, info = env.reset(seed=3, options={"split": "train"})
    assert info["task"] == "Guess it." and set(info) == checker.INFO_KEYS
    assert info["admissible"] == ([str(i) for i in range(1, 8)] if filled is NUMBERED else None)
    observation, *_, info = env.step("")
    assert observation == "You did not say anything. 19 turns left." and not info["valid"]
    info = env.step("sing a song")[4]
    assert info["valid"] is (filled is not NUMBERED)
    assert envs.check(name) == []
    env.close()


def test_what_an_environment_says_of_itself_is_used(tmp_path):
    env = make(guessing(tmp_path, NUMBERED, "Told"), show_actions=True)
    assert env.max_turns == 3 and type(env).expert is not envs.World.expert
    env.reset(seed=5)
    wrong = "2" if env.expert() != "2" else "3"
    assert env.step(wrong)[4]["admissible"] == ["1", "2"] and "Possible actions:" in env.observation
    step = env.step(env.expert())
    assert step[1:3] == (1.0, True) and step[4]["won"] and step[4]["score"] == 1  # its word, not its rewards
    env = make(guessing(tmp_path, NUMBERED, "Guess"))
    assert type(env).expert is envs.World.expert


def test_what_is_no_environment_of_text(tmp_path):
    name = guessing(tmp_path, MIMIC, "Picture")
    with pytest.raises(ValueError, match="Picture shows list, not text"):
        make(name)
    assert any("shows list, not text" in sentence for sentence in envs.check(name))
    with pytest.raises(ValueError, match="neither a World of envs.py nor has it reset and step"):
        make(guessing(tmp_path, MIMIC, "Nothing"))


# ----------------------------------------------------------------------------------------- the checker

WORLD = '''
import envs, os, random, subprocess, sys, threading, time

class Safe(envs.World):
    """Ask for the number of the safe, then say it."""
    name = "safe"
    system = "Open the safe: ask for its number, then say it."
    task = "Open the safe."
    max_turns = 4

    def begin(self, rng, split):
        self.number = str(2 * rng.randrange(100, 500) + (split == "test"))
        self.asked = False
        return "A safe."

    def admissible(self):
        return ["ask", self.number] if self.asked else ["ask"]

    def act(self, text):
        if text == "ask":
            self.asked = True
            return f"It is {self.number}.", True
        self.won = text == self.number
        return ("It opens." if self.won else "Nothing happens."), self.won

    def expert(self):
        return self.number if self.asked else "ask"
'''
# what is broken, what the checker says of it
BROKEN = {
    "the_clock": ("    def begin(self, rng, split):\n        return super().begin(random.Random(), split)", "not the same twice"),
    "a_memory": ("    seen = 0\n    def begin(self, rng, split):\n        self.seen += 1\n"
                 "        return super().begin(rng, split) + f' Visit {self.seen}.'", "not the same twice"),
    "shared_numbers": ("    def admissible(self):\n        random.random()\n        return super().admissible()",
                       "random numbers that all share"),
    "a_set": ("    def begin(self, rng, split):\n        return super().begin(rng, split) + ' '.join({'a', 'b', 'c', 'd', 'e', 'f'})",
              "another process plays"),
    "one_split": ("    def begin(self, rng, split):\n        super().begin(rng, split)\n        self.number = str(rng.randrange(3))\n"
                  "        return 'A safe.'", "train and test share"),
    "no_test": ("    splits = ('train',)", "there must be train and test"),
    "any_split": ("    def reset(self, *, seed=None, options=None):\n"
                  "        split = (options or {}).get('split')\n"
                  "        return super().reset(seed=seed, options={'split': split if split in self.splits else 'train'})",
                  "a split that does not exist is accepted"),
    "no_system": ("    system = ''", "system is ''"),
    "odd_text": ("    def act(self, text):\n        return super().act(str(int(text)) if text != 'ask' else text)", "ValueError"),
    "a_number": ("    def begin(self, rng, split):\n        super().begin(rng, split)\n        return 5", "gives int for an observation"),
    "no_pair": ("    def act(self, text):\n        return super().act(text)[0]", "act returns str, not (text, valid)"),
    "lenient": ("    def act(self, text):\n        return super().act(text)[0], True", "valid though nothing was said"),
    "unsettled": ("    def read(self, reply):\n        return reply[1:]", "changes when it is read again"),
    "endless": ("    def step(self, text):\n        self.turns = 0\n        return super().step(text)", "goes on beyond max_turns"),
    "restless": ("    def step(self, text):\n        self.over = False\n        observation, *rest = super().step(text)\n"
                 "        return f'{self.turns}: {observation}', *rest",
                 "after the end a step changes something"),
    "boastful": ("    def admissible(self):\n        return ['ask', 'kick it']", "what is admissible is not valid"),
    "bad_expert": ("    def expert(self):\n        return 'ask'", "the expert does not win"),
    "wild_expert": ("    def expert(self):\n        return 'hm' if not self.turns else super().expert() if self.asked else 'ask'",
                    "the expert says what is not valid"),
    "own_rewards": ("    def step(self, text):\n        observation, reward, *rest = super().step(text)\n"
                    "        return observation, reward - 0.1, *rest", "rewards add up to"),
    "info_key": ("    def info(self, valid):\n        return super().info(valid) | {'number': self.number}", "and has ['number'] too many"),
    "info_lacks": ("    def info(self, valid):\n        found = super().info(valid)\n        del found['tools']\n        return found",
                   "info lacks ['tools']"),
    "info_type": ("    def info(self, valid):\n        return super().info(valid) | {'won': int(self.won)}", "info['won'] is 0"),
    "score": ("    def score(self):\n        return 2.0 * self.won", "a score is 2.0"),
    "told_at_once": ("    def begin(self, rng, split):\n        return super().begin(rng, split) + f' On it: {self.number}.'",
                     "the first observation names the action that wins"),
    "told_in_the_task": ("    def begin(self, rng, split):\n        opening = super().begin(rng, split)\n"
                         "        self.task = f'Say {self.number}.'\n        return opening", "whoever says nonsense is told so"),
    "told_when_lost": ("    def closing(self):\n        return f'It was {self.number}.' if self.over else super().closing()",
                       "whoever says nonsense is told so"),
    "process": ("    def begin(self, rng, split):\n        subprocess.Popen(['sleep', '20'])\n        return super().begin(rng, split)",
                "leaves processes behind"),
    "thread": ("    def begin(self, rng, split):\n        threading.Thread(target=time.sleep, args=(3,), daemon=True).start()\n"
               "        return super().begin(rng, split)", "leaves a thread behind"),
    "closed_twice": ("    shut = False\n    def close(self):\n        assert not self.shut\n        self.shut = True",
                     "close leaves nothing: AssertionError"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_world_is_told_what_is_wrong(tmp_path, name):
    change, words = BROKEN[name]
    (tmp_path / "safe.py").write_text(f"{WORLD}\n\nclass Broken(Safe):\n{change}\n")
    found = envs.check(f"{tmp_path}/safe.py:Broken", episodes=8)
    assert any(words in sentence for sentence in found), found
    assert len(found) == 1 or name not in ("a_number", "no_pair")  # not what follows from it
    assert all("\n" not in sentence and len(sentence) < 400 for sentence in found)


def checked(*arguments):
    command = [sys.executable, ROOT / "envs.py", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_check_at_the_command_line(tmp_path):
    (tmp_path / "safe.py").write_text(f"{WORLD}\n\nclass Broken(Safe):\n{BROKEN['score'][0]}\n")
    good, bad = (checked(f"{tmp_path}/safe.py:{name}") for name in ("Safe", "Broken"))
    assert (good.returncode, good.stderr) == (0, "") and good.stdout.endswith("Safe keeps the contract.\n")
    assert (bad.returncode, bad.stderr) == (1, "") and "- a score is 2.0" in bad.stdout and "fault" in bad.stdout
    nothing = checked("nowhere.py:Safe")
    assert nothing.returncode == 2 and nothing.stderr.startswith("error: ") and nothing.stderr.count("\n") == 1


OURS = [*envs.WORLDS, *envs.ALIASES, "twenty_questions:listed"]


def test_other_worlds_keep_the_contract(rg, tmp_path):
    assert envs.check("rg:family_relationships") == []
    assert envs.check("rg:chain_sum") == []


def test_mathematics_keeps_the_contract(mathematics, tmp_path):
    assert envs.check(f"math:{write(tmp_path / 'sums.jsonl', sums(200))}", episodes=10) == []


# ------------------------------------------------------------------------------- all scripts in all worlds

SCRIPTS = "nlac", "self_guide", "act", "reagent"
EXTRAS = {"rg:family_relationships": "reasoning_gym", "math:sums.jsonl": "math_verify", "guess.py:Guess": "gymnasium"}
MATRIX = [*OURS, *EXTRAS]
# where nothing lists what can be said a tiny model says nothing, so there are no pairs to choose from
FLAGS = {("act", world): ["--pipeline", "il"] for world in ("math:sums.jsonl", "guess.py:Guess")}
FAST = {("nlac", "rg:family_relationships"), ("self_guide", "math:sums.jsonl"), ("act", "twenty_questions:listed")}


def cases():
    """One world a script, in which no other test runs it, is quick enough for every day."""
    for script in SCRIPTS:
        for world in MATRIX:
            marks = [] if (script, world) in FAST else [pytest.mark.slow]
            yield pytest.param(script, world, id=f"{script}-{world}", marks=marks)


@pytest.mark.parametrize("script, world", list(cases()))
def test_every_script_runs_in_every_world(script, world, tmp_path):
    if world in EXTRAS:
        pytest.importorskip(EXTRAS[world])
    write(tmp_path / "sums.jsonl", sums(60))
    guessing(tmp_path, MIMIC)
    short = "    max_turns = 3\n    def expert(self):\n        return self.number\n\nclass Told"
    text = (tmp_path / "guess.py").read_text().replace("class Told", short)
    (tmp_path / "guess.py").write_text(text)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, ROOT / f"{script}.py", "--quick", "--env", world, "--out-dir", "run"]
    command += FLAGS.get((script, world), [])
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["env"] == world and summary["expert"]["success"] == 1 and summary["gradient_steps"] > 0
    shutil.rmtree(tmp_path)
