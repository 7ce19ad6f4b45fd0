"""A run as one page to read: summary, curves, and episodes with every part's words.

    python docs/show_run.py runs/nlac-repair-s0                      # writes show.html there
    python docs/show_run.py runs/a runs/b -o docs/episodes.html      # several runs, with a switch

The page needs no network and stays below SIZE bytes: of a long run it holds episodes of the first
step, of the last and of some evenly between, and says how many there were. It reads any run of the
scripts and of the rivals in docs/, one that goes on or broke off as well. Without JavaScript all
episodes stand one below the other. The layout is show_run.html.

A record of rollouts.jsonl may have any fields. What somebody said is known by its shape: a list of
[who, text], of {"role": ..., "content": ...}, or a long text. All else is a fact and stands below
the words, by its name.
"""

import argparse
import base64
import hashlib
import html
import json
import re
import sys
import time
from pathlib import Path

SIZE = 1_450_000  # bytes of a page
STEPS = 9  # shown, of all and of those where the most parts speak
PER_STEP, FEW = 16, 144  # episodes of a step; of a run, where its steps are few
LONGEST, MOST = 6000, 120  # characters of a text, texts of an episode
POINTS = 200  # of a curve
MODEL = "act", "assistant", "agent", "text"  # names of the policy: each reply of it is a turn
WORLD = "world", "user", "system", "observation"
WORDS = "text", "reply", "think", "critique"  # fields that hold words, however short
HEADING = "step", "evaluation", "stage", "split", "seed", "attempt", "won"
MATTER = (  # metrics that are looked at first, in this order
    r"reward|return loss|l[12] kl cut_\w+ groups_(flat|without_spread) auc|trust entropy invalid "
    r"right_if_\w+|second_success|judge_auc"
).split()
COST = (  # of summary.json and args.json
    "eval_episodes train_episodes env_steps generated_tokens gradient_steps seconds parameters "
    "device"
).split()
LEGEND = {
    "line": "while training",
    "dot": "evaluated, with the standard error",
    "bound": "a random player, the expert",
}
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
    """Whether it is one that can be drawn."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and -1e300 < value < 1e300


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

    Best are those in which the most parts speak: critics may be asked for few episodes.
    """
    found, count = {}, 0
    for offset, record in records(path):
        speaking = {name for name, _, said in pieces(record) if said}
        found.setdefault(moment(record), []).append((-len(speaking), offset))
        count += 1
    best = min((min(rows)[0] for rows in found.values()), default=0)
    moments = sorted(found)
    rich = [when for when in moments if min(found[when])[0] == best]
    ends = [when for when in moments if when[1]]
    steps = [when for when in moments if not when[1]]
    kept = sorted({*ends, *spread(steps, STEPS), *spread(rich, STEPS)})
    most = max(PER_STEP, FEW // max(1, len(kept)))
    return {when: [at for _, at in sorted(found[when])[:most]] for when in kept}, count


def pieces(value, name="", listed=False):
    """(name, text, whether somebody said it) of all that a record holds, in its order."""
    if isinstance(value, dict):
        who = value.get("role", value.get("who"))
        if isinstance(who, str) and isinstance(value.get("content"), str):
            yield who, value["content"], True
            value = {k: v for k, v in value.items() if k not in ("role", "who", "content")}
        for key, item in value.items():
            yield from pieces(item, key if listed else f"{name} {key}".strip(), listed)
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for item in value:
            if isinstance(item, list) and list(map(type, item)) == [str, str]:
                yield *item, True
            else:
                yield from pieces(item, name, True)
    else:
        said = isinstance(value, str) and (
            listed or name.split(" ")[-1] in WORDS or len(value) > 80 or "\n" in value
        )
        yield name, fact(value), said


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
    chosen = record.get("outcome")
    if isinstance(chosen, str):
        return "right" if chosen == "right" else "wrong"
    return "no outcome"


# --------------------------------------------------------------------------------------------- HTML


def safe(text) -> str:
    """Any text as HTML; odd characters are spelt out."""
    return html.escape(ODD.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text)))


def tag(name, inside="", kind="", **attributes) -> str:
    """An element of class `kind`. `inside` is HTML, attributes are text, `_` in a name is `-`."""
    if kind:
        attributes["class"] = kind
    told = "".join(
        f' {key.replace("_", "-")}="{safe(value)}"' for key, value in attributes.items()
    )
    return f"<{name}{told}>{inside}</{name}>"


def facts(found) -> str:
    """A list of names and values."""
    rows = []
    for name, value in found.items():
        row = tag("dt", safe(name)) + tag("dd", safe(cut(value)))
        rows.append(tag("div", row, "long" * (len(value) > 40)))
    return tag("dl", "".join(rows))


def cut(text) -> str:
    """Of a text that is too long the two ends."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def episode_html(record, key, colours) -> str:
    """An article. `colours`: {part: number}, of all parts so far; grows."""
    said, rest, speaking, turn = [], {}, {}, 0
    valid = record.get("valid")
    valid = iter(valid if isinstance(valid, list) else ())
    for name, text, spoken in pieces(record):
        if not spoken:
            rest[name] = f"{rest[name]}, {text}" if name in rest else text
            continue
        kind, who = "world", safe(name)
        if name in MODEL:
            turn += 1
            kind = "model" + " long" * (len(text) > 120 or "\n" in text)
            who = f"{turn} {who}" + tag("em", "not valid") * (next(valid, True) is False)
        elif name not in WORLD:
            kind = f"part c{colours.setdefault(name, len(colours)) % 6}"
        speaking[name] = True
        said.append(tag("div", tag("b", who) + tag("p", safe(cut(text))), f"say {kind}"))
    if len(said) > MOST:
        said[MOST:] = [tag("p", f"{len(said) - MOST:,} more texts are left out.", "quiet")]
    when, how = moment(record)[-1], outcome(record)
    told = [f"{name} {rest[name]}" for name in HEADING[2:-1] if name in rest]
    told = " \u00b7 ".join([when, *told, f"{turn} turn" + "s" * (turn != 1)])
    heading = tag("h3", tag("span", how, "badge") + safe(cut(told)))
    more = {name: text for name, text in rest.items() if name not in (*HEADING, "valid")}
    return tag(
        "article",
        heading + "".join(said) + facts(more),
        id=key,
        tabindex=-1,
        data_outcome=how,
        data_when=when,
        data_turns=turn,
        data_parts="\n".join(speaking),
    )


def episodes_html(path, key, room) -> str:
    """The episodes that fit into `room` bytes: the best of each step, then the next of each."""
    chosen, count = choose(path)
    if not count:
        return tag("h2", "Episodes") + tag("p", "There are none in this directory.")
    articles, colours = {}, {}
    longest = max(map(len, chosen.values()))
    rounds = [(place, when) for place in range(longest) for when in chosen]
    with open(path, "rb") as file:
        for place, when in rounds:
            for offset in chosen[when][place : place + 1]:
                file.seek(offset)
                record = json.loads(file.readline())
                text = episode_html(record, f"{key}-{offset}", colours)
                if len(text.encode()) < room:
                    room -= len(text.encode())
                    articles[when, place] = text
    told = f"{len(articles):,} of {count:,}: of the first step, the last, and evenly between."
    told = told if len(articles) < count else f"All {count:,}."
    read = tag("div", "".join(articles[at] for at in sorted(articles)))
    return tag("h2", "Episodes") + tag("p", told, "quiet") + tag("div", read, "browse")


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


def path_of(points, kind, first, last, low, high) -> str:
    """A line through points (step, value), in a drawing of 300 x 100; a dot where there is one."""
    across, up = 300 / (max(last - first, 1)), 100 / ((high - low) or 1)
    points = spread(points, POINTS)
    places = [f"{(x - first) * across:.1f} {100 - (y - low) * up:.1f}" for x, y in points]
    return f'<path class="{kind}" d="M{"L".join(places)}{"h0" * (len(places) == 1)}"/>'


def figure(name, final, drawn, labels, kind="") -> str:
    """A drawing with its name, its last value, and labels {percent from the top: text}."""
    told = f"{name}, {final}; axis from {' to '.join(reversed(labels.values()))}"
    plot = tag(
        "svg",
        drawn,
        viewBox="0 0 300 100",
        preserveAspectRatio="none",
        role="img",
        aria_label=told,
    )
    for top, text in labels.items():
        plot += tag("span", text, style=f"top:{top}%")
    caption = tag("figcaption", safe(name) + tag("b", final))
    return tag("figure", caption + tag("div", plot, f"plot {kind}"))


def rounded(value) -> str:
    """Two digits, for an axis."""
    return fact(float(f"{value:.2g}"))


def small_chart(name, points, first, last) -> str:
    """One metric over the steps; its axis begins at 0 where that is near."""
    low, high = (end(value for _, value in points) for end in (min, max))
    low = 0.0 if -high / 100 <= low < high / 2 else low
    line = path_of(points, "line", first, last, low, high)
    return figure(name, fact(points[-1][1]), line, {0: rounded(high), 100: rounded(low)})


def success_chart(found, rows, summary, last) -> str:
    """Success in training, in evaluations with their standard errors, and of who bounds it."""
    errors = dict(found.get("eval_se", ()))
    dots = [(step, value, errors.get(step)) for step, value in found.get("eval_success", ())]
    ends = {row.get("stage"): row.get("step") for row in rows} | {"before": 0, "after": last}
    lines = [([(0, y), (last, y)], "gridline") for y in (0, 0.5, 1)]
    for name, splits in scores(summary).items():
        value, error = splits.get("test", (None, None))
        if is_number(value) and name in ("random", "expert"):
            lines.append(([(0, value), (last, value)], "bound"))
        elif is_number(value) and is_number(ends.get(name)):
            dots.append((ends[name], value, error))
    lines.append((found.get("success"), "line"))
    for step, value, error in dots:
        error = error if is_number(error) else 0
        lines.append(
            ([(step, max(0, value - error)), (step, min(1, value + error))], "whisker")
        )
        lines.append(([(step, value)], "dot"))
    drawn = [path_of(points, kind, 0, last, 0, 1) for points, kind in lines if points]
    kinds = {kind for points, kind in lines if points}
    if not kinds & {"line", "dot"}:
        return ""
    legend = "".join(
        tag("span", told, kind) for kind, told in LEGEND.items() if kind in kinds
    )
    axis = {0: "1", 50: "0.5", 100: "0"}
    chart = figure("success", f"steps 0 to {fact(last)}", "".join(drawn), axis, "large")
    return chart + tag("div", legend, "legend")


def curves_html(rows, summary) -> str:
    """Small multiples: what matters first, the rest folded, what never moves in a line."""
    found = series(rows)
    steps = [step for step, _ in found.pop("step", [(0, 0)])]
    drawn = success_chart(found, rows, summary, max(steps))
    charts, still = {}, []
    for name, points in found.items():
        if re.fullmatch("success|eval_(success|se|n)|(stage|phase)_step", name):
            continue
        if len({value for _, value in points}) > 1:
            charts[name] = small_chart(name, points, min(steps), max(steps))
        else:
            still.append(f"{name} {fact(points[0][1])}")
    first = [name for pattern in MATTER for name in charts if re.fullmatch(pattern, name)]
    drawn += tag("div", "".join(charts.pop(name) for name in first), "grid")
    rest = tag("div", "".join(charts.values()), "grid")
    if still:
        rest += tag("p", safe(f"Never moved: {', '.join(still)}."), "quiet")
    drawn += tag("details", tag("summary", "All other metrics") + rest)
    return tag("h2", "Curves") + drawn if found else ""


# ------------------------------------------------------------------------------------------ summary


def scores(summary) -> dict:
    """{row: {split: (success, its standard error)}}: before, stages, after, and who bounds them."""
    rows = {"random": {"test": summary.get("random")}}
    rows |= part(summary, "stages") or part(summary, "watched")
    rows |= {"expert": {"test": summary.get("expert")}}
    found = {}
    for name in rows:
        for split, told in part(rows, name).items():
            if isinstance(told, dict) and is_number(told.get("success")):
                found.setdefault(name, {})[split] = told["success"], told.get("se")
    return found


def score_table(summary) -> str:
    """Success of each row in each split, with a bar."""
    rows = scores(summary)
    splits = list(dict.fromkeys(split for told in rows.values() for split in told))
    lines = [tag("td") + "".join(tag("th", safe(split), scope="col") for split in splits)]
    for name, told in rows.items():
        line = tag("th", safe(name.replace("_", " ")), scope="row")
        for split in splits:
            cell = ""
            if split in told:
                value, error = told[split]
                cell = tag("span", "", "bar", style=f"--share:{value:.3f}") + f"{value:.3f}"
                cell += (
                    tag("span", f"\u00b1 {error:.3f}", "error") if is_number(error) else ""
                )
            line += tag("td", cell)
        lines.append(line)
    return tag("table", "".join(tag("tr", line) for line in lines), "scores") if rows else ""


def summary_html(directory, rows) -> str:
    """What run this is, what came out, what it cost, and, folded, its settings."""
    about, summary = (read_json(directory / f"{name}.json") for name in ("args", "summary"))
    args = part(about, "args")
    told = (
        args.get("model"),
        args.get("env"),
        summary.get("arm"),
        f"seed {args.get('seed', '?')}",
    )
    told = " \u00b7 ".join(str(word) for word in told if word not in (None, "none"))
    top = tag("h1", safe(about.get("script", directory.name))) + tag("p", safe(told), "told")
    if not summary:
        written = max(path.stat().st_mtime for path in directory.iterdir())
        clock = time.strftime("%Y-%m-%d %H:%M", time.localtime(written))
        step = rows[-1].get("step") if rows else 0
        top += tag("p", safe(f"Not finished: at step {step}, last written {clock}."), "open")
    known = about | summary
    cost = facts({key.replace("_", " "): fact(known[key]) for key in COST if key in known})
    more = {}
    for name, value in (known | args).items():
        if not isinstance(value, dict):
            more[name] = fact(value)
    more = tag("details", tag("summary", "Settings and origin") + facts(more))
    return tag("header", top + score_table(summary) + cost + more)


def page(directories) -> str:
    """The whole page."""
    layout = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", layout, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    layout = layout.replace("SCRIPT-HASH", digest)  # no other script may run
    heads = []
    for directory in directories:
        rows = [row for _, row in records(directory / "metrics.jsonl")]
        curves = curves_html(rows, read_json(directory / "summary.json"))
        heads.append(summary_html(directory, rows) + curves)
    room = (SIZE - len("".join([layout, *heads]).encode())) // len(directories) - 2000
    links, runs = [], []
    for number, (directory, head) in enumerate(zip(directories, heads)):
        key = f"run{number}"
        links.append(tag("a", safe(directory.resolve().name), href=f"#{key}"))
        episodes = episodes_html(directory / "rollouts.jsonl", key, room)
        runs.append(tag("section", head + episodes, "run", id=key))
    switch = tag("nav", "".join(links)) if len(links) > 1 else ""
    before, _, after = layout.partition("<!--RUNS-->")
    return before + switch + "".join(runs) + after


def main():
    """Checks the command line, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="what a run left")
    parser.add_argument("-o", metavar="FILE", help="default, of one run: RUN_DIR/show.html")
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
