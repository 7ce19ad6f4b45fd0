"""docs/show_run.py: any run as one page, whatever a model wrote; in headless Chromium where there is one.

That the runs of all scripts render, with all their words, is in test_contract.py.
"""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from conftest import ROOT
from helpers import refused_process

sys.path.insert(0, str(ROOT / "docs"))

import show_run  # noqa: E402

ARGS = {"script": "nlac", "args": {"model": "tiny", "env": "repair", "seed": 3}, "parameters": 1234}
SUMMARY = {
    "script": "nlac", "arm": "none", "eval_episodes": 500, "env_steps": 12345,
    "random": {"success": 0.168, "se": 0.017}, "expert": {"success": 1.0, "se": 0.0},
    "watched": {"before": {"test": {"success": 0.25, "se": None}, "ood": {"success": 0.125, "se": 0.01}},
                "after": {"test": {"success": 0.75, "se": 0.02}}, "cold_started": None}}  # fmt: skip
METRICS = [{"step": step, "success": step / 4, "loss": loss, "cut_act": 0.0, "rows": {"right": loss}, "auc": None}
           for step, loss in ((1, 0.0), (2, 4.0), (3, 1.0))]  # fmt: skip
WICKED = ["</script><script>document.title='run'</script>",
          "<!-- ", "<![CDATA[", "&lt;b&gt; &amp;amp;", '"\'><img src=x onerror=alert(1)>',
          "</p></article></section><!--RUNS-->",
          "a\u2028b\u2029c", "half \ud800 a pair", "nul \0 bell \x07", "right \u202e left", "SCRIPT-HASH"]


def episode(step=1, won=True, **more):
    said = [["world", "A box is here."], ["act", "Think.\nAction: open"], ["world", "It is open."]]
    return {"step": step, "split": "train", "seed": step, "said": said, "valid": [True], "won": won, **more}


def written(path, episodes=(), metrics=METRICS, args=ARGS, summary=SUMMARY):
    """A directory as a run leaves it."""
    path.mkdir(parents=True)
    for name, value in ("args", args), ("summary", summary):
        if value is not None:
            (path / f"{name}.json").write_text(json.dumps(value))
    for name, rows in ("metrics", metrics), ("rollouts", episodes):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(*given, cwd=None):
    return subprocess.run([sys.executable, ROOT / "docs" / "show_run.py", *map(str, given)], capture_output=True, text=True, cwd=cwd)


class Page(HTMLParser):
    """What a browser finds: all text, the articles with their attributes and texts, counts of tags."""

    def __init__(self, *directories):
        super().__init__()
        self.source = show_run.page(list(directories))
        self.articles, self.counts, self.comments, self.words, self.inside = [], {}, [], [], []
        self.feed(self.source)
        self.close()
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        attributes = dict(attributes)
        assert not any(name.startswith("on") for name in attributes)
        if tag == "article":
            self.articles.append({"attributes": attributes, "said": [], "text": ""})
        if tag in ("b", "p") and "article" in self.inside:
            self.articles[-1]["said"].append("")
        if tag not in ("meta", "input", "path"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag != "path":
            assert self.inside.pop() == tag, self.source[:200]

    def handle_comment(self, text):
        self.comments.append(text)

    def handle_data(self, text):
        if {"script", "style"} & {*self.inside}:
            return
        self.words.append(text)
        if "article" in self.inside:
            self.articles[-1]["text"] += text
            if {"b", "p"} & {*self.inside}:
                self.articles[-1]["said"][-1] += text


def spelt(text):
    """As the page spells it."""
    return show_run.ODD.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


# ------------------------------------------------------------------------------------------------------ words and shapes


def test_what_a_model_writes_stays_text(tmp_path):
    said = [pair for text in WICKED for pair in (["act", text], [text, "what a part of that name says"])]
    args = {"script": WICKED[0], "args": {"model": WICKED[1], "env": WICKED[4], "seed": 0}}
    metrics = [{"step": step, WICKED[4]: step, WICKED[0]: 1} for step in (1, 2)]
    record = {"step": 1, "said": said, "won": False, WICKED[4]: WICKED[0], "evaluation": WICKED[5]}
    page = Page(written(tmp_path / "<img src=x>", [record], metrics, args, None), written(tmp_path / "b", [record]))
    page.source.encode("utf-8")  # no lone surrogate is left
    assert page.counts["script"] == 1 and "img" not in page.counts and not page.comments and len(page.articles) == 2
    assert page.articles[0]["said"][1::2] == [spelt(text) for pair in said for text in pair[1:]]
    names = [name.removesuffix("not valid") for name in page.articles[0]["said"][::2]]
    assert [re.sub(r"^\d+ ", "", name) for name in names] == [spelt(name) for name, _ in said]
    assert not show_run.ODD.search(page.source) and not page.inside
    assert WICKED[4] in page.text and "<img src=x>" in page.text


def test_the_shapes_of_an_episode(tmp_path):
    records = [
        {"said": [["world", "w"], ["act", "a"], ["rate", "r"]]},
        {"messages": [{"role": "user", "content": "w"}, {"role": "assistant", "content": "a", "tokens": 5}]},
        {"turns": [{"reply": "a", "judge": {"verdict": "v"}}, {"reply": "b"}], "judgement": {"think": "t", "score": 0.25}},
        {"text": "a", "about": {"expert": "go"}, "outcome": "right"},
        {"note": "long " * 20, "short": "s"},
    ]
    page = Page(written(tmp_path / "run", records))
    found = [article["said"] for article in sorted(page.articles, key=lambda a: int(a["attributes"]["id"].split("-")[1]))]
    assert found == [
        ["world", "w", "1 act", "a", "rate", "r"], ["user", "w", "1 assistant", "a"],
        ["reply", "a", "verdict", "v", "reply", "b", "judgement think", "t"], ["1 text", "a"], ["note", "long " * 20]]  # fmt: skip
    for name, value in ("judgement score", "0.25"), ("about expert", "go"), ("short", "s"), ("tokens", "5"):
        assert f"{name}{value}" in page.text
    outcomes = [article["attributes"]["data-outcome"] for article in page.articles]
    assert outcomes.count("right") == 1 and outcomes.count("no outcome") == 4


def test_turns_that_were_not_valid_are_marked(tmp_path):
    said = [["world", "w"], ["act", "a"], ["world", "w"], ["act", "b"], ["world", "w"], ["act", "c"]]
    article = Page(written(tmp_path / "run", [episode(said=said, valid=[True, False], won=False)])).articles[0]
    assert article["said"][2::4] == ["1 act", "2 actnot valid", "3 act"]
    assert article["attributes"]["data-turns"] == "3" and article["attributes"]["data-outcome"] == "lost"
    assert "step 1 · split train · seed 1 · 3 turns" in article["text"]


def test_numbers():
    values = [True, None, 12345, -3, 0.123456, 123456.7, -1e-9, 10**400, float("nan"), [0.5, "a"]]
    expected = ["yes", "none", "12,345", "−3", "0.1235", "123,457", "−1e−09", str(10**400), "nan", "0.5, a"]
    assert [show_run.fact(value) for value in values] == expected


# ---------------------------------------------------------------------------------------------------- summary and curves


def test_summary(tmp_path):
    page = Page(written(tmp_path / "run"))
    assert "nlactiny · repair · seed 3" in page.text and "Not finished" not in page.text
    assert "env steps12,345" in page.text and "parameters1,234" in page.text
    rows = re.findall("<tr>(.*?)</tr>", page.source)
    assert [re.sub("<[^>]*>", " ", row).split() for row in rows] == [
        ["test", "ood"], ["random", "0.168", "±", "0.017"], ["before", "0.250", "0.125", "±", "0.010"],
        ["after", "0.750", "±", "0.020"], ["expert", "1.000", "±", "0.000"]]  # fmt: skip
    assert re.findall(r"--share:([\d.]+)", page.source) == ["0.168", "0.250", "0.125", "0.750", "1.000"]


def test_curves(tmp_path):
    page = Page(written(tmp_path / "run"))
    figures = {text.split("<")[0]: text for text in page.source.split("<figcaption>")[1:]}
    assert list(figures) == ["success", "loss", "rows right"]
    assert 'd="M0.0 100.0L150.0 0.0L300.0 75.0"' in figures["loss"] and "Never moved: cut_act 0." in page.text
    assert page.source.index(">loss<") < page.source.index("All other metrics") < page.source.index(">rows right<")
    success = re.findall('class="(line|dot|bound|whisker)" d="M(.*?)"', figures["success"])
    assert ("line", "100.0 75.0L200.0 50.0L300.0 25.0") in success
    assert ("dot", "0.0 75.0h0") in success and ("dot", "300.0 25.0h0") in success  # before and after
    assert ("whisker", "300.0 27.0L300.0 23.0") in success and ("bound", "0.0 83.2L300.0 83.2") in success


def test_a_long_curve_keeps_its_ends():
    points = show_run.spread([(step, step) for step in range(10_001)], show_run.POINTS)
    assert len(points) == show_run.POINTS and points[0] == (0, 0) and points[-1] == (10_000, 10_000)
    gaps = [b - a for (a, _), (b, _) in zip(points, points[1:])]
    assert max(gaps) - min(gaps) <= 1


# ----------------------------------------------------------------------------------------------- what is there, how much


@pytest.mark.parametrize("cut", [1, 60, 150, 500])
def test_a_run_that_goes_on(tmp_path, cut):
    run = written(tmp_path / "run", [episode(step) for step in (1, 2, 3)], summary=None)
    for name in "rollouts", "metrics":
        data = (run / f"{name}.jsonl").read_bytes()
        (run / f"{name}.jsonl").write_bytes(data[:cut])
    whole = (run / "rollouts.jsonl").read_bytes().count(b"\n")
    page = Page(run)
    assert len(page.articles) == whole and "Not finished: at step" in page.text
    assert command(run).returncode == 0 and (run / "show.html").stat().st_size


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"args": 3}', '{"watched": {"after": 1}, "random": [], "expert": {"success": "x"}}'])
def test_damaged_files_and_missing_ones(tmp_path, damage):
    run = written(tmp_path / "run", [episode()])
    for name in "args.json", "summary.json":
        (run / name).write_text(damage)
    with open(run / "rollouts.jsonl", "ab") as file:
        file.write(b'\xff\n[1]\nnull\n{"step": "x", "said": 3, "valid": 1}\n{"said": [["act"], ["act", null], 5], "step": null}\n')
    assert len(Page(run).articles) == 3
    for name in "rollouts.jsonl", "metrics.jsonl":
        (run / name).unlink()
    assert "There are none" in Page(run).text


def test_a_long_run_is_bounded(tmp_path):
    text = "A long story. " * 200
    episodes = [episode(step, won=step > 50, said=[["world", text], ["act", str(step)]]) for step in range(1, 101) for _ in range(40)]
    episodes[0]["said"][0][1] = "a" * 5_000_000
    episodes += [episode(100, evaluation="after"), episode(0, evaluation="before")]
    run = written(tmp_path / "run", episodes)
    page = Page(run)
    when = [article["attributes"]["data-when"] for article in page.articles]
    assert when[0] == "before" and when[-1] == "after" and f"{len(when)} of 4,002" in page.text
    steps = sorted({int(name.split()[1]) for name in when if " " in name})
    assert len(steps) >= 6 and max(b - a for a, b in zip(steps, steps[1:])) <= 30 and len(when) > 90
    assert "characters left out" in page.text
    for count in 1, 4:
        size = len(Page(*[run] * count).source.encode())
        assert 200_000 < size <= show_run.SIZE < 1_500_000


def test_of_few_steps_more_episodes_are_kept(tmp_path):
    for name, steps, kept, told in ("few", 2, 140, "All 140."), ("more", 30, 9 * 16, f"{9 * 16} of 2,100"):
        page = Page(written(tmp_path / name, [episode(step + 1) for step in range(steps) for _ in range(70)]))
        assert len(page.articles) == kept and told in page.text


def test_episodes_in_which_critics_speak_are_kept(tmp_path):
    judged = [["critique", "good"]]
    episodes = [episode(step, said=[["act", "a"]] + judged * (step % 25 == 13 and n == 29)) for step in range(1, 101) for n in range(30)]
    page = Page(written(tmp_path / "run", episodes))
    found = [article for article in page.articles if "critique" in article["attributes"]["data-parts"].split("\n")]
    assert [article["attributes"]["data-when"] for article in found] == [f"step {step}" for step in (13, 38, 63, 88)]


def test_several_runs(tmp_path):
    runs = [written(tmp_path / name, [episode()]) for name in ("one", "two")]
    page = Page(*runs)
    assert page.counts["section"] == 2 and 'href="#run1">two</a>' in page.source
    assert len({article["attributes"]["id"] for article in page.articles}) == 2
    result = command(*runs, "-o", tmp_path / "both.html")
    assert result.returncode == 0 and (tmp_path / "both.html").read_text(encoding="utf-8") == page.source
    assert result.stdout == f"{tmp_path / 'both.html'}\n"


def test_refusals(tmp_path):
    run, other = written(tmp_path / "run"), written(tmp_path / "other")
    for given, words in [
        ([], "required"), ([tmp_path / "nowhere"], "nowhere"), ([tmp_path], "not the directory of a run"), ([run / "args.json"], "args"),
        ([run, other], "-o FILE"), ([run, "-o", run / "rollouts.jsonl"], ".html"), ([run, "-o", tmp_path / "a" / "b.html"], "b.html"),
        ([run, "--fast"], "--fast"),
    ]:  # fmt: skip
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        refused_process(command(*given), words)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_nothing_comes_from_elsewhere():
    layout = (ROOT / "docs" / "show_run.html").read_text()
    assert not re.search(r"https?:|//\w|@import|url\(|src=|<link", layout) and "default-src 'none'" in layout
    imported = re.findall(r"^(?:import|from) (\w+)", (ROOT / "docs" / "show_run.py").read_text(), re.MULTILINE)
    assert set(imported) <= sys.stdlib_module_names


def test_contrast():
    """Every colour of a text against both backgrounds, in light and dark: at least 4.5 (WCAG 2, AA)."""

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        channels = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), channels))

    layout = (ROOT / "docs" / "show_run.html").read_text()
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", text)) for text in layout.split("prefers-color-scheme: dark")[:2]]
    assert len(schemes[0]) == len(schemes[1]) == 14
    for scheme in schemes:
        for name in {*scheme} - {"page", "raised", "line"}:
            for behind in "page", "raised":
                light, dark = sorted((luminance(scheme[name]), luminance(scheme[behind])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, behind, scheme)


# ------------------------------------------------------------------------------------------------------------ a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRIVE = """
addEventListener("error", event => document.body.setAttribute("data-error", event.message));
const told = [], run = runs[0], next = () => new Promise(done => setTimeout(done, 50));
const tell = () => told.push([runs.findIndex(run => !run.section.hidden), run.place.textContent,
  run.articles.filter(article => !article.hidden).map(article => article.dataset.when + ", " + article.dataset.outcome)]);
const set = (name, value) => {
  const field = run.form.elements[name];
  if (field.type === "checkbox") field.checked = value; else field.value = value;
  field.dispatchEvent(new Event("input", {bubbles: true}));
  tell();
};
const press = async key => {
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  await next();
  tell();
};
(async () => {
  tell();
  await press("ArrowRight"); await press("ArrowRight"); await press("ArrowLeft");
  set("outcome", "lost"); await press("ArrowLeft"); set("all", true); set("turns", "2"); set("outcome", "");
  set("words", "BOX"); set("words", "nothing has this"); set("words", ""); set("parts", "critique"); set("when", "step 1");
  location.hash = run.articles[1].id; await next(); tell();
  location.hash = "run1"; await next(); tell();
  document.body.setAttribute("data-told", JSON.stringify(told));
})();
"""


@pytest.mark.skipif(not BROWSER, reason="there is no Chromium")
def test_in_a_browser(tmp_path):
    def said(turns, *more):
        return [["world", "A box."], *[["act", "a"]] * turns, *more]

    episodes = [episode(1, False, said=said(1, ["act", WICKED[0]])), episode(1, True, said=said(2)), episode(2, False, said=said(2)),
                episode(2, True, said=said(3, ["critique", "<!-- </article>"])), episode(3, True, said=[["act", "else"]])]  # fmt: skip
    shutil.copy(ROOT / "docs" / "show_run.py", tmp_path)
    layout = (ROOT / "docs" / "show_run.html").read_text()
    (tmp_path / "show_run.html").write_text(layout.replace("</script>", DRIVE + "</script>"))
    runs = [written(tmp_path / name, episodes) for name in ("one", "two")]
    subprocess.run([sys.executable, tmp_path / "show_run.py", *runs, "-o", tmp_path / "both.html"], check=True)
    flags = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --virtual-time-budget=5000 --dump-dom".split()
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "both.html").as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in found.stderr and "data-error" not in found.stdout.split("<script>")[0], found.stderr
    assert "<title>nlac: episodes</title>" in found.stdout  # the model's script did not run
    told = re.search('data-told="(.*?)"', found.stdout)[1].replace("&quot;", '"')
    lost, won = [[f"step {step}, {how}" for step in (1, 2)] for how in ("lost", "won")]
    assert json.loads(told) == [
        [0, "3 of 5", [won[1]]],  # that with the most parts
        [0, "4 of 5", [lost[1]]], [0, "5 of 5", ["step 3, won"]], [0, "4 of 5", [lost[1]]],
        [0, "2 of 2", [lost[1]]], [0, "1 of 2", [lost[0]]], [0, "1 of 2", lost],
        [0, "1 of 2", lost], [0, "1 of 3", [lost[0], won[0], lost[1]]],
        [0, "1 of 3", [lost[0], won[0], lost[1]]], [0, "none", []], [0, "1 of 3", [lost[0], won[0], lost[1]]],
        [0, "none", []], [0, "none", []],  # no episode of 2 turns has a critique
        [0, "2 of 5", [won[0]]],  # the address of an episode that the filter hid
        [1, "2 of 5", [won[0]]],
    ]  # fmt: skip
