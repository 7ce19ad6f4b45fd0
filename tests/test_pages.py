"""A page per method (docs/METHOD.md) says what its script does: functions, equations, flags and metrics have the same names."""

import dataclasses
import operator
import re
from pathlib import Path

import pytest

import act
import envs
import nlac
import reagent
import self_guide

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {script.__name__: script for script in (nlac, reagent, act, self_guide)}


def page_of(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def algorithm(name):
    """{equation: the functions that implement it}, from the table of a page's algorithm."""
    table = page_of(name).split("## The algorithm")[1].split("\n## ")[0]
    rows = re.findall(r"^\| \((\d)\) \|.*\| ([^|]*) \|$", table, re.M)
    return {int(number): re.findall(r"`([\w.]+)`", functions) for number, functions in rows}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_function_named_beside_an_equation_exists(name):
    table = algorithm(name)
    assert all(table.values()) and len(table) >= 6
    for functions in table.values():
        for function in functions:
            assert operator.attrgetter(function)(SCRIPTS[name]), f"docs/{name}.md names {function}, {name}.py does not have it"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_equation_of_a_script_is_on_its_page_and_named_where_it_stands(name):
    text = Path(SCRIPTS[name].__file__).read_text(encoding="utf-8")
    head, _, body = text.partition('"""\n\nimport')
    stated = {int(number) for number in re.findall(r" \((\d)\)$", head, re.M)}
    table = algorithm(name)
    assert stated == set(table), "the equations of the script's docstring are those of the page"
    for number in stated:
        cited = re.search(rf"(#|\"\"\").*\({number}\)", body)
        assert cited, f"equation ({number}) is not named where it stands in {name}.py"


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_on_a_page_exist(name):
    fields = {field.name for script in SCRIPTS.values() for field in dataclasses.fields(script.Args)}  # controls are other scripts'
    others = {"--help"}  # and those of the programs in docs/ that a page speaks of
    for path in (ROOT / "docs").glob("*.py"):
        others |= set(re.findall(r"--[a-z][\w-]+", path.read_text(encoding="utf-8")))
    for flag in re.findall(r"`[^`\n]*?(--[a-z][a-z0-9-]*)", page_of(name)):
        assert flag[2:].replace("-", "_") in fields or flag in others, f"docs/{name}.md speaks of {flag}"


def test_the_worlds_of_the_pages_exist():
    for name in SCRIPTS:
        for world in re.findall(r"--env ([\w:-]+)", page_of(name)):
            assert envs.make(world)


def test_readme_knows_how_long_the_scripts_are():
    rows = re.findall(r"^\| \[`(\w+)\.py`\].*?\| .*? \| ([\d,]+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert {name for name, _ in rows} == set(SCRIPTS)
    for name, told in rows:
        count = len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines())
        assert abs(count - int(told.replace(",", ""))) <= 100, f"README: {name}.py has {count} lines, not about {told}"
