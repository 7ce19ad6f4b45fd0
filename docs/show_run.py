"""A run as one page to read: summary, curves, and episodes with every part's words.

    python docs/show_run.py runs/nlac-repair-s0                      # writes show.html there
    python docs/show_run.py runs/a runs/b -o docs/episodes.html      # several runs, with a switch

The page needs no network and stays below SIZE bytes: of a long run it holds episodes of the first
step, of the last and of some evenly between, and says how many there were. It reads any run of the
scripts and of the rivals in docs/, one that goes on or broke off as well. Without JavaScript all
episodes stand one below the other. The layout is show_run.html.

A record of rollouts.jsonl may have any fields. What somebody said is known by its shape: a list of
[who, text], of {"role": ..., "content": ...}, a "history" of turn and reply, or a long text. All
else is a fact and stands below the words, by its name.
"""

import argparse
import base64
import hashlib
import html
import json
import math
import re
import sys
import time
from pathlib import Path

SIZE = 1_450_000  # bytes of a page
STEPS, PER_STEP = 9, 16  # steps shown, of all and of those where the most parts speak; episodes each
LONGEST, MOST = 6000, 120  # characters of a text, texts of an episode
POINTS = 120  # of a curve
MODEL = "act", "assistant", "agent", "text"  # names of the policy: each reply of it is a turn
WORLD = "world", "user", "system", "observation"
WORDS = "text", "reply", "think", "critique"  # fields that hold words, however short
HEADING = "step", "evaluation", "stage", "split", "seed", "attempt", "won"
MATTER = (  # metrics that are looked at first, in this order
    "reward|return", "loss|l[12]", "kl", r"cut_\w+", "groups_(flat|without_spread)", "auc|trust",
    "entropy", "invalid", r"right_if_\w+|second_success|judge_auc")  # fmt: skip
COUNTS = {
    "eval_episodes": "test episodes", "train_episodes": "training episodes",
    "env_steps": "environment steps", "generated_tokens": "tokens sampled",
    "gradient_steps": "gradient steps"}  # fmt: skip
# no character, without a width, or a mark that turns the direction of what follows
ODD = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def refuse(message):
    """One line on stderr, exit status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------- what a run left


def read_json(path) -> dict:
    """{} where there is none, or a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def part(value, key) -> dict:
    """value[key] if that is a dict, else {}."""
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def records(path):
    """(offset, record) of each line that can be read: the last may be half-written."""
    if not path.is_file():
        return
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                yield offset, record
            offset += len(line)


def is_number(value) -> bool:
    """Whether it is a finite one."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def moment(record) -> tuple:
    """(step, order within it, name) of when an episode was played."""
    step, when = record.get("step"), record.get("evaluation")
    step = step if is_number(step) else 0
    order = {"before": -1, "after": 1}.get(str(when), 0)
    return step, order, str(when) if order else f"step {step}"


def spread(items, count) -> list:
    """`count` of them: the first, the last and evenly between."""
    if len(items) <= count:
        return items
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def choose(path) -> tuple[dict, int]:
    """{moment: offsets of episodes to show, best first}, and how many episodes there are.

    Where more parts speak than elsewhere, as critics do that are asked for few episodes, is better.
    """
    found, count = {}, 0
    for offset, record in records(path):
        silent = -len({name for name, _, said in pieces(record) if said})
        found.setdefault(moment(record), []).append((silent, offset))
        count += 1
    richest = min((silent for rows in found.values() for silent, _ in rows), default=0)
    moments = sorted(found)
    rich = [when for when in moments if min(found[when])[0] == richest]
    ends = [when for when in moments if when[1]]
    kept = {*spread(moments, STEPS), *spread(rich, STEPS), *ends}
    return {when: [offset for _, offset in sorted(found[when])[:PER_STEP]] for when in sorted(kept)}, count


def pieces(value, name="", listed=False):
    """(name, text, whether somebody said it) of all that a record holds, in its order."""
    if isinstance(value, dict):
        who = value.get("role", value.get("who"))
        if isinstance(who, str) and isinstance(value.get("content"), str):
            yield who, value["content"], True
            value = {k: v for k, v in value.items() if k not in ("role", "who", "content")}
        for key, item in value.items():
            yield from pieces(item, f"{'' if listed else name} {key}".strip(), listed)
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for item in value:
            if isinstance(item, list) and len(item) == 2 and all(isinstance(x, str) for x in item):
                yield *item, True
            else:
                yield from pieces(item, name, True)
    elif isinstance(value, list) and name == "history":
        for number, item in enumerate(value):
            yield ("world", "act")[number % 2], fact(item), True
    else:
        long = isinstance(value, str) and (len(value) > 80 or "\n" in value)
        spoken = long or isinstance(value, str) and (listed or name.split()[-1:] in ([w] for w in WORDS))
        yield name, fact(value), spoken


def fact(value) -> str:
    """A value as a reader sees it: numbers of four digits, no braces."""
    if isinstance(value, list):
        return ", ".join(map(fact, value))
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "none"}[value]
    if not is_number(value):
        return str(value)
    digits = ",.0f" if abs(value) >= 1e4 else ".4g"
    return format(value, "," if isinstance(value, int) else digits).replace("-", "\u2212")


def outcome(record) -> str:
    """Of an episode, or of one of ACT's choices."""
    if isinstance(record.get("won"), bool):
        return "won" if record["won"] else "lost"
    if isinstance(record.get("row"), str):
        return "right" if record["row"] == "right" else "wrong"
    return "no outcome"


# --------------------------------------------------------------------------------------------- HTML


def safe(text) -> str:
    """Any text as HTML; odd characters are spelt out."""
    return html.escape(ODD.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text)))


def tag(name, inside="", kind="", **attributes) -> str:
    """An element of class `kind`. `inside` is HTML, the attributes are text, `_` in a name is `-`."""
    if kind:
        attributes["class"] = kind
    told = "".join(f' {key.replace("_", "-")}="{safe(value)}"' for key, value in attributes.items())
    return f"<{name}{told}>{inside}</{name}>"


def facts(pairs) -> str:
    """A list of names and values."""
    rows = (tag("div", tag("dt", safe(name)) + tag("dd", safe(cut(value)))) for name, value in pairs)
    return tag("dl", "".join(rows))


def cut(text) -> str:
    """Of a text that is too long the two ends."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def episode_html(record, key, colours) -> str:
    """An article. `colours`: {part: number}, of all parts so far; grows."""
    said, rest, speaking = [], {}, {}
    valid = record.get("valid")
    valid = iter(valid if isinstance(valid, list) else ())
    turn = 0
    for name, text, spoken in pieces(record):
        if not spoken:
            rest[name] = text
            continue
        kind, note = "world", ""
        if name in MODEL:
            turn += 1
            kind, note = "model", tag("em", "not valid") * (next(valid, True) is False)
        elif name not in WORLD:
            kind = f"part c{colours.setdefault(name, len(colours)) % 6}"
        speaking[name] = True
        who = tag("b", safe(f"{turn} {name}" if name in MODEL else name) + note)
        said.append(tag("div", who + tag("p", safe(cut(text))), f"say {kind}"))
    if len(said) > MOST:
        said[MOST:] = [tag("p", f"{len(said) - MOST:,} more texts are left out.", "quiet")]
    when, how = moment(record)[-1], outcome(record)
    told = [when, *(f"{name} {rest[name]}" for name in HEADING[2:-1] if name in rest)]
    told.append(f"{turn} turn" + "s" * (turn != 1))
    heading = tag("h3", tag("span", how, "badge") + safe(" \u00b7 ".join(map(cut, told))))
    more = facts((name, text) for name, text in rest.items() if name not in HEADING)
    return tag("article", heading + "".join(said) + more, id=key, tabindex=-1, data_outcome=how,
               data_when=when, data_turns=turn, data_parts="\n".join(speaking))  # fmt: skip


def episodes_html(path, key, room) -> str:
    """The episodes that fit into `room` bytes: the best of each step, then the next of each."""
    chosen, count = choose(path)
    if not count:
        return tag("h2", "Episodes") + tag("p", "There are none in this directory.")
    articles, colours = {}, {}
    with open(path, "rb") as file:
        for place in range(PER_STEP):
            for when, offsets in chosen.items():
                if place < len(offsets):
                    file.seek(offsets[place])
                    text = episode_html(json.loads(file.readline()), f"{key}-{offsets[place]}", colours)
                    room -= len(text.encode())
                    if room > 0:
                        articles[when, offsets[place]] = text
    left = count - len(articles)
    told = f"{len(articles):,} of {count:,}: of the first step, the last, and evenly between."
    told = told if left else f"All {count:,}."
    arrows = [tag("button", arrow, type="button", aria_label=name)
              for arrow, name in (("\u2190", "the one before"), ("\u2192", "the next"))]  # fmt: skip
    pager = tag("div", tag("output").join(arrows), "pager")
    read = tag("div", pager + "".join(articles[at] for at in sorted(articles)))
    return tag("h2", "Episodes") + tag("p", told, "quiet") + tag("div", tag("aside") + read, "browse")


# ------------------------------------------------------------------------------------------- curves


def series(rows) -> dict:
    """{metric: [(step, number)]} of the lines of metrics.jsonl; of a dict, each value by itself."""
    found = {}
    for number, row in enumerate(rows, 1):
        step = row["step"] if is_number(row.get("step")) else number
        for key, value in row.items():
            values = value if isinstance(value, dict) else {"": value}
            for name, value in values.items():
                if is_number(value):
                    found.setdefault(f"{key} {name}".strip(), []).append((step, float(value)))
    return found


def average(points) -> tuple:
    """The middle of some points."""
    return tuple(sum(values) / len(points) for values in zip(*points))


def path_of(points, kind, first, last, low, high) -> str:
    """A line through points (step, value), in a drawing of 300 x 100; a dot where there is one."""
    across, up = 300 / (max(last - first, 1)), 100 / ((high - low) or 1)
    size = math.ceil(len(points) / POINTS)
    points = [average(points[i : i + size]) for i in range(0, len(points), size)]
    places = [f"{(x - first) * across:.1f} {100 - (y - low) * up:.1f}" for x, y in points]
    return f'<path class="{kind}" d="M{"L".join(places)}{"h0" * (len(places) == 1)}"/>'


def figure(name, final, drawn, labels, kind="") -> str:
    """A drawing with its name, its last value, and labels {percent from the top: text}."""
    told = f"{name}, {final}; axis from {' to '.join(reversed(labels.values()))}"
    drawn = tag("svg", drawn, viewBox="0 0 300 100", preserveAspectRatio="none", role="img", aria_label=told)
    drawn += "".join(tag("span", text, style=f"top:{top}%") for top, text in labels.items())
    return tag("figure", tag("figcaption", safe(name) + tag("b", final)) + tag("div", drawn, f"plot {kind}"))


def rounded(value) -> str:
    """Two digits, for an axis."""
    return fact(float(f"{value:.2g}"))


def small_chart(name, points, first, last) -> str:
    """One metric over the steps; its axis begins at 0 where that is near."""
    low, high = (end(value for _, value in points) for end in (min, max))
    low = 0.0 if 0 <= low < high / 2 else low
    line = path_of(points, "line", first, last, low, high)
    return figure(name, fact(points[-1][1]), line, {0: rounded(high), 100: rounded(low)})


def success_chart(found, rows, summary, last) -> str:
    """Success in training, in evaluations with their standard errors, and of who bounds it."""
    drawn, legend = [], []

    def draw(points, kind, told=""):
        drawn.append(path_of(points, kind, 0, last, 0, 1))
        if told and tag("span", told, kind) not in legend:
            legend.append(tag("span", told, kind))

    for y in 0, 0.5, 1:
        draw([(0, y), (last, y)], "gridline")
    for player in "random", "expert":
        value = part(summary, player).get("success")
        if is_number(value):
            draw([(0, value), (last, value)], "bound", f"{player} {value:.3f}")
    if "success" in found:
        draw(found["success"], "line", "while training")
    errors = dict(found.get("eval_se", ()))
    dots = [(step, value, errors.get(step)) for step, value in found.get("eval_success", ())]
    ends = {row.get("stage"): row.get("step") for row in rows} | {"before": 0, "after": last}
    for name, splits in scores(summary).items():
        if "test" in splits and is_number(ends.get(name)):
            dots.append((ends[name], *splits["test"]))
    for step, value, error in dots:
        error = error if is_number(error) else 0
        draw([(step, max(0, value - error)), (step, min(1, value + error))], "whisker")
        draw([(step, value)], "dot", "evaluated, with the standard error")
    if not dots and "success" not in found:
        return ""
    chart = figure("success", f"steps 0 to {fact(last)}", "".join(drawn), {0: "1", 50: "0.5", 100: "0"}, "large")
    return chart + tag("div", "".join(legend), "legend")


def curves_html(rows, summary) -> str:
    """Small multiples: what matters first, the rest folded, what never moves in a line."""
    found = series(rows)
    steps = [step for step, _ in found.pop("step", [(0, 0)])]
    drawn = success_chart(found, rows, summary, max(steps))
    shown = "success|eval_(success|se|n)|(stage|phase)_step"
    found = {name: points for name, points in found.items() if not re.fullmatch(shown, name)}
    still = [f"{name} {fact(points[0][1])}" for name, points in found.items() if len({y for _, y in points}) == 1]
    charts = {name: small_chart(name, points, min(steps), max(steps)) for name, points in found.items()
              if len({y for _, y in points}) > 1}  # fmt: skip
    matter = [charts.pop(name) for pattern in MATTER for name in [*charts] if re.fullmatch(pattern, name)]
    more = tag("div", "".join(charts.values()), "grid")
    more += tag("p", safe(f"Never moved: {', '.join(still)}."), "quiet") if still else ""
    if found:
        drawn += tag("div", "".join(matter), "grid") + tag("details", tag("summary", "All other metrics") + more)
    return drawn and tag("h2", "Curves") + drawn


# ------------------------------------------------------------------------------------------ summary


def scores(summary) -> dict:
    """{row: {split: (success, its standard error)}}: before, the stages, after; the players that bound it."""
    watched = part(summary, "stages") or part(summary, "watched")
    rows = {"random": {"test": summary.get("random")}, **watched, "expert": {"test": summary.get("expert")}}
    found = {}
    for name, splits in rows.items():
        for split, told in (splits or {}).items():
            if isinstance(told, dict) and is_number(told.get("success")):
                found.setdefault(name, {})[split] = told["success"], told.get("se")
    return found


def score_table(summary) -> str:
    """Success of each row in each split, with a bar."""
    rows = scores(summary)
    splits = list(dict.fromkeys(split for told in rows.values() for split in told))
    lines = [tag("tr", tag("td") + "".join(tag("th", safe(split), scope="col") for split in splits))]
    for name, told in rows.items():
        line = tag("th", safe(name.replace("_", " ")), scope="row")
        for split in splits:
            value, error = told.get(split, (None, None))
            bar = tag("span", "", "bar", style=f"--share:{value or 0:.3f}") + f"{value or 0:.3f}"
            bar += tag("span", f"\u00b1 {error:.3f}", "error") if is_number(error) else ""
            line += tag("td", bar if is_number(value) else "")
        lines.append(tag("tr", line, "after" * (name == list(rows)[-2:][0])))
    return tag("table", tag("thead", lines[0]) + tag("tbody", "".join(lines[1:])), "scores") if rows else ""


def summary_html(directory, rows) -> str:
    """What run this is, what came out, what it cost, and, folded, its settings."""
    about, summary = (read_json(directory / f"{name}.json") for name in ("args", "summary"))
    args = part(about, "args")
    told = [args.get("model"), args.get("env"), summary.get("arm"), f"seed {args.get('seed')}"]
    told = " \u00b7 ".join(str(word) for word in told if word not in (None, "", "none"))
    top = tag("h1", safe(about.get("script", directory.name))) + tag("p", safe(told), "told")
    if not summary:
        written = max(path.stat().st_mtime for path in directory.iterdir())
        clock = time.strftime("%Y-%m-%d %H:%M", time.localtime(written))
        step = rows[-1].get("step") if rows else 0
        top += tag("p", safe(f"Not finished: at step {step}, last written {clock}."), "open")
    top += score_table(summary)
    pairs = [(told, fact(summary[key])) for key, told in COUNTS.items() if key in summary]
    if is_number(summary.get("seconds")):
        pairs.append(("minutes", f"{summary['seconds'] / 60:,.1f}"))
    if is_number(summary.get("peak_memory_bytes")):
        pairs.append(("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"))
    for key in "parameters", "device", "git_commit":
        if about.get(key):
            pairs.append((key.replace("git_", ""), fact(about[key])))
    top += facts(pairs)
    if args:
        settings = facts((key, fact(value)) for key, value in args.items())
        top += tag("details", tag("summary", "Settings") + settings)
    return tag("header", top)


def page(directories) -> str:
    """The whole page."""
    layout = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    before, _, after = layout.partition("<!--RUNS-->")
    heads = []
    for directory in directories:
        rows = [row for _, row in records(directory / "metrics.jsonl")]
        curves = curves_html(rows, read_json(directory / "summary.json"))
        heads.append(summary_html(directory, rows) + curves)
    room = (SIZE - len("".join([layout, *heads]).encode())) // len(directories) - 2000
    switch = runs = ""
    for number, (directory, head) in enumerate(zip(directories, heads)):
        key, name = f"run{number}", directory.resolve().name
        switch += tag("a", safe(name), href=f"#{key}")
        episodes = episodes_html(directory / "rollouts.jsonl", key, room)
        runs += tag("section", head + episodes, "run", id=key)
    script = re.search("<script>(.*?)</script>", after, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    before = before.replace("SCRIPT-HASH", digest)  # no other script may run
    before = before.replace("TITLE", safe(", ".join(path.resolve().name for path in directories)))
    return before + tag("nav", switch) * (len(directories) > 1) + runs + after


def main():
    """Checks the command line, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="what a run left")
    parser.add_argument("-o", metavar="FILE", help="the page; default, of one run: RUN_DIR/show.html")
    args = parser.parse_args()
    directories = [Path(name) for name in args.runs]
    for directory in directories:
        if not any((directory / f"{name}.json").is_file() for name in ("args", "summary")):
            refuse(f"{directory} is not the directory of a run: there is no args.json")
    if not args.o and len(directories) > 1:
        refuse("several runs in one page need -o FILE")
    output = Path(args.o or directories[0] / "show.html")
    if output.suffix != ".html":
        refuse(f"-o {output}: the name of a page ends in .html")
    try:
        output.write_text(page(directories), encoding="utf-8")
    except OSError as error:
        refuse(f"{error.filename}: {error.strerror}")
    print(output)


if __name__ == "__main__":
    main()
