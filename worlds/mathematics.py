r"""`math:PATH_OR_ID`: mathematical problems from elsewhere, one try each, judged by math-verify.

    --env math:openai/gsm8k:main               a hub id, and a configuration where it has some
    --env math:HuggingFaceH4/MATH-500
    --env math:problems.jsonl                  or .json, .parquet, .csv, or a directory

Needs `pip install math-verify` (Apache-2.0; 0.9.0 was tried). What `datasets.load_dataset` loads is
read by its columns, in any case of letters: `problem` or `question`; `answer`, of which what
follows #### counts (GSM8K), or the last \boxed of `solution` (MATH). Rows without an answer are
left out, with a warning. train and test are the data's own, `validation` where there is no test,
without what both have; data in one piece are split by a hash of the problem, a fifth is test.
Licences are those of the data. The expert says the answer, `thought` is the data's solution.

math-verify compares what both expressions are, as 1/2 and 0.5, in a process of its own, as some
expressions would take for ever (see _judge.py). Empty text is no answer; any other text is judged.
"""

import functools
import hashlib
import importlib.util
import re
import warnings
from collections import namedtuple
from pathlib import Path

import envs

HINT = "needs math-verify: pip install math-verify"
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

Problem = namedtuple("Problem", "text answer solution")


# ------------------------------------------------------------------------------------- the data


def last_boxed(text) -> str | None:
    r"""What stands in the last \boxed{} or \fbox{} of a solution, or behind "\boxed "."""
    found = list(re.finditer(r"\\(?:boxed|fbox)\s*(\{)?", text))
    if not found:
        return None
    inside = text[found[-1].end():]
    if not found[-1][1]:
        return re.split(r"[\s$]", inside.lstrip(), maxsplit=1)[0] or None
    depth = 1
    for place, letter in enumerate(inside):
        escaped = inside[place - 1:place] == "\\"
        depth += 0 if escaped else (letter == "{") - (letter == "}")
        if not depth:
            return inside[:place].strip() or None
    return None  # the braces do not close


def problem_of(row) -> Problem | None:
    """A row of data; None where its problem or its answer is missing."""
    known = {key.lower(): str(value) for key, value in row.items() if value is not None}
    text = (known.get("problem") or known.get("question") or "").strip()
    solution = known.get("solution", "")
    answer = known.get("answer", "")
    if "####" in answer:
        steps, _, answer = answer.rpartition("####")
        solution = solution or re.sub(r"<<[^>]*>>", "", steps)  # a calculator's notes
    answer = answer.strip() or last_boxed(solution)
    return Problem(text, answer, solution.strip()) if text and answer else None


def load_tables(path, configuration):
    """{split: rows} as `datasets` has them; a path that exists is a local one."""
    import datasets  # takes a second

    place, shown = Path(path).expanduser(), datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if place.suffix in LOADERS:
            return datasets.load_dataset(LOADERS[place.suffix], data_files=str(place))
        return datasets.load_dataset(str(place) if place.exists() else path, configuration or None)
    except Exception as error:  # hub, file system and each format have their own
        told = f"{type(error).__name__}: {str(error)[:300]}"
        raise ValueError(f"{path} cannot be read: {told}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


@functools.lru_cache(maxsize=4)
def problems(source) -> dict:
    """{"train": [Problem], "test": [Problem]}, disjoint. ValueError where one would be empty."""
    path, _, configuration = source.partition(":")
    found = {}
    for name, rows in load_tables(path, configuration).items():
        read = [problem_of(row) for row in rows]
        found[name] = [problem for problem in read if problem]
        if len(found[name]) < len(read):
            left = len(read) - len(found[name])
            warnings.warn(f"math:{source}, {name}: {left} of {len(read)} rows have no problem"
                          " or no answer and are left out", stacklevel=2)  # fmt: skip
    test = found.get("test") or found.get("validation") or []
    if found.get("train") and test:
        asked = {problem.text for problem in test}
        train = [problem for problem in found["train"] if problem.text not in asked]
    else:
        everything = [problem for some in found.values() for problem in some]
        train = [problem for problem in everything if not held_out(problem)]
        test = [problem for problem in everything if held_out(problem)]
    for name, some in ("train", train), ("test", test):
        if not some:
            known = ", ".join(f"{len(rows)} in {key}" for key, rows in found.items())
            raise ValueError(f"no problem is left for {name}; there are {known or 'none'}, with the"
                             " columns problem or question, and answer or solution")  # fmt: skip
    return {"train": train, "test": test}


def held_out(problem):
    """Whether a problem of data in one piece is one of test: a fifth of them."""
    return hashlib.sha256(problem.text.encode()).digest()[0] % 5 == 0


# ---------------------------------------------------------------------------------------- the world


def verdict_function():
    """What the judge's process does: tell whether a text gives the answer."""
    import logging

    import math_verify

    logging.disable()  # it would warn that nothing limits its time: the process does

    def verdict(answer, text):
        gold = math_verify.parse(rf"\boxed{{{answer}}}", parsing_timeout=None)
        said = math_verify.parse(text, parsing_timeout=None)
        return bool(math_verify.verify(gold, said, timeout_seconds=None))

    return verdict


JUDGE = envs.load(envs.FOLDER / "_judge.py", "worlds._judge").Judge("mathematics")


class Mathematics(envs.World):
    """A problem of the data, one try."""

    max_turns = 1
    system = r"Solve the mathematical problem and give its answer in \boxed{}. You have one try."

    def __init__(self, source):
        self.name, self.source = f"math:{source}", source
        problems(source)  # refuses what cannot be played

    def begin(self, rng, split):
        self.problem = rng.choice(problems(self.source)[split])
        self.task = self.problem.text
        JUDGE.hold(self)
        return self.task

    def closing(self):
        """Nothing behind a problem."""
        return super().closing() if self.turns else ""

    def read(self, reply):
        """All that follows the last "Action:", or all of the reply: the answer is searched for."""
        return envs.settled(lambda text: envs.after_marker(text).strip(), reply)

    def act(self, text):
        self.over = True
        if not text:
            return "You did not say anything.", False
        self.won = bool(JUDGE.ask(self.problem.answer, text))
        return ("That is right." if self.won else "That is not right."), True

    def expert(self):
        return rf"\boxed{{{self.problem.answer}}}"

    def thought(self, action):
        """The data's own solution, before the right answer alone."""
        return self.problem.solution if action == self.expert() else ""

    def close(self):
        JUDGE.release(self)


def make(argument="", **settings):
    """A world of the problems at a path or a hub id. ValueError where there are none."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(HINT)
    if not argument:
        raise ValueError("name the problems: math:FILE.jsonl, math:ID or math:ID:CONFIGURATION")
    return Mathematics(argument, **settings)
