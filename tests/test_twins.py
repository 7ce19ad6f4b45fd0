"""Twins: what two of the scripts call by one name is one text, so that a diff shows the method."""

import ast
import dataclasses
import importlib
import itertools
from collections import Counter

import pytest
from conftest import ROOT

SCRIPTS = "self_guide", "nlac", "act", "reagent"

# Exceptions: a name, or "script.name" where one script's text differs and the others' do not.
DIFFERENT = {
    "Args": "the shared flags are compared below",
    "Episode": "what is written down of an episode",
    "written": "the form of a reply is the method's",
    "dialogue": "prompts are the method's",
    "transcript": "what another part may see of an episode",
    "worked_examples": "what the method's parts are shown",
    "demonstrations": "states of an expert, or whole attempts",
    "warmup": "what a tiny model is taught",
    "load": "the lines that are one token of a tiny model",
    "nlac.rollout": "what is played together",
    "side_by_side": "which parts speak in a turn",
    "take_turn": "what is written down of a turn",
    "nlac.update": "the loss",
    "reagent.record": "the flaws of an attempt",
    "self_guide.update": "DAPO's loss besides",
    "self_guide.token_weights": "DAPO's mean besides",
    "end_step": "which phases there are",
    "parts": "what a checkpoint keeps the weights of",
    "check_row": "the form of the data",
    "watch": "what is counted",
    "evaluate": "what is evaluated",
    "check_args": "the method's own flags",
    "main": "the loop of the method",
}
HELP_DIFFERS = {
    "prefill": "the marked word",
    "steps": "what a step is",
    "lr": "the paper's, if it tells; the warm-up",
    "batch_size": "of what",
    "max_new_tokens": "of what",
    "temperature": "the paper's, if it tells",
    "eval_temperature": "the paper's, if it tells",
    "eval_episodes": "when they are played",
    "eval_every": "act and reagent have stages",
    "save_every": "reagent has phases",
}
TYPE_DIFFERS = {"steps": "act's default follows from --epochs"}


def definitions(script) -> dict:
    """The source of each function and class of a script, its decorators included."""
    source = (ROOT / f"{script}.py").read_text()
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min(part.lineno for part in (node, *node.decorator_list))
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


TEXTS = {script: definitions(script) for script in SCRIPTS}
COUNT = Counter(itertools.chain(*TEXTS.values()))
SHARED = sorted(name for name in COUNT if COUNT[name] > 1)
OF_ONE_SCRIPT = [key.split(".") for key in DIFFERENT if "." in key]


def twins(name) -> list[str]:
    """The texts that should be the same."""
    if name in DIFFERENT:
        return []
    return [TEXTS[script][name] for script in SCRIPTS
            if name in TEXTS[script] and [script, name] not in OF_ONE_SCRIPT]  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_what_two_scripts_share_is_one_text(name):
    first, *others = twins(name) or [""]
    for other in others:
        assert other == first


@pytest.mark.parametrize("name", [key for key in DIFFERENT if "." not in key])
def test_names_that_may_differ_do(name):
    texts = [TEXTS[script][name] for script in SCRIPTS if name in TEXTS[script]]
    assert len(texts) > 1, f"{name} is in one script at most: take it off the list"
    assert len(set(texts)) > 1, f"{name} is the same everywhere: take it off the list"


@pytest.mark.parametrize("script, name", OF_ONE_SCRIPT)
def test_scripts_that_may_differ_do(script, name):
    assert name in TEXTS[script], f"{script} has no {name} any more: take it off the list"
    assert twins(name), f"no other script has {name}: take it off the list"
    assert TEXTS[script][name] not in twins(name), f"{name} is the same: take it off the list"


# ----------------------------------------------------------------------------------- shared flags


def shared_flags(script) -> list[str]:
    """The names below "shared by all scripts", up to the next comment of `Args`."""
    above, below = TEXTS[script]["Args"].split("    # shared by all scripts\n")
    flags = ast.parse("class Args:\n" + below.split("\n    # ")[0]).body[0].body
    return [flag.target.id for flag in flags]


def fields(script) -> dict:
    found = dataclasses.fields(importlib.import_module(script).Args)
    return {field.name: field for field in found}


def told(script, name) -> str:
    return fields(script)[name].metadata["help"].replace(script, "SCRIPT")


def test_shared_flags_come_first_and_in_one_order():
    orders = {script: shared_flags(script) for script in SCRIPTS}
    first = orders[SCRIPTS[0]]
    assert len(first) > 20 and first[0] == "model"
    for script in SCRIPTS:
        assert orders[script] == first == list(fields(script))[: len(first)], script


@pytest.mark.parametrize("name", shared_flags(SCRIPTS[0]))
def test_shared_flags_say_the_same(name):
    texts = {told(script, name) for script in SCRIPTS}
    assert (len(texts) > 1) == (name in HELP_DIFFERS), texts


def annotations(script) -> dict:
    """Not of the fields, whose types a parser changes."""
    return importlib.import_module(script).Args.__annotations__


def test_flags_of_one_name_are_of_one_type():
    every = {script: fields(script) for script in SCRIPTS}
    for name in {name for flags in every.values() for name in flags}:
        scripts = [script for script in SCRIPTS if name in every[script]]
        types = {str(annotations(script)[name]) for script in scripts}
        assert (len(types) > 1) == (name in TYPE_DIFFERS), (name, types)
    assert set(HELP_DIFFERS) | set(TYPE_DIFFERS) <= set(shared_flags(SCRIPTS[0]))
