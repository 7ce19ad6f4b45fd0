"""The ground, reading replies, and all worlds: splits, secrecy, experts, bad input, commands."""

import copy
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
from envs import World, bare, make, replay, run_episode
from worlds import twenty_questions as tq
from worlds.twenty_questions import (
    FACTS,
    OTHER_NAMES,
    PHRASES,
    PROPERTIES,
    QUESTIONS,
    expert_success,
    linear_player,
    plain,
    understand,
)

ROOT = Path(__file__).parent.parent
checker = envs.load(envs.FOLDER / "_check.py", "worlds._check")
NAMES = [*envs.WORLDS, *envs.ALIASES]


@pytest.fixture(params=["20q", "20q-full"])
def env(request):
    return make(request.param)


def well_formed(step):
    observation, reward, terminated, truncated, info = step
    assert isinstance(observation, str) and observation.isascii() and len(observation) < 300
    assert isinstance(reward, float) and isinstance(terminated, bool) and truncated is False
    assert not list(checker.problems_of(observation, info))


def random_actions(env, rng, n):
    """A dialogue of valid questions, wrong guesses, nonsense and repeats."""
    nonsense = ["", "hello there", "Is it alive? Is it a cat?", "Is it not alive?", "x" * 2000]
    return [rng.choice(nonsense) if rng.random() < 0.15 else rng.choice(env.moves) for _ in range(n)]


# ---------------------------------------------------------------------------------------------------------------- facts


def test_sizes():
    full, small = make("20q-full"), make("20q")
    assert len(full.things) == len(FACTS) >= 100 and len(full.properties) == len(QUESTIONS) >= 24
    assert full.max_turns == 20
    assert (len(small.things), len(small.properties), small.max_turns) == (24, 12, 8)


def test_every_two_things_differ_in_a_decided_property(env):
    for one, other in itertools.combinations(env.things, 2):
        assert any({FACTS[one][key], FACTS[other][key]} == {"yes", "no"} for key in env.properties), (one, other)


def test_unclear_is_used_sparingly():
    values = [value for row in FACTS.values() for value in row.values()]
    assert set(values) == {"yes", "no", "unclear"}
    assert values.count("unclear") < 0.03 * len(values)


IMPLIED = """
animal: alive yes, plant no, made no. made: alive no, eggs no. huge: big yes. big: small no.
tiny: small yes. eggs: animal yes. meat: animal yes. pet: animal yes. wheels: made yes.
electric: made yes. wear: made yes. toy: made yes. sweet: food yes. green: yellow no.
"""


def test_facts_that_follow_from_others():
    for key, facts in re.findall(r"(\w+): ([^.]+)\.", IMPLIED):
        for implied, value in map(str.split, facts.split(", ")):
            for thing, row in FACTS.items():
                assert row[key] != "yes" or row[implied] == value, (thing, key, implied)


# checked by hand, one by one; written apart from the table on purpose
CHECKED = """
cat: pet yes, eggs no, fly no, fur yes, made no     dog: pet yes, climb no, wheels no
whale: big yes, eggs no, water yes, legs no         penguin: fly no, eggs yes, water yes
eagle: fly yes, eggs yes, meat yes, pet no          snake: legs no, eggs yes, tail unclear
spider: legs yes, tiny yes, meat yes                goldfish: pet yes, water yes, food no
elephant: big yes, carry yes, meat no               chicken: food yes, eggs yes, fly unclear
tree: plant yes, wood yes, animal no                cactus: sharp yes, green yes
apple: food yes, sweet yes, alive unclear           banana: yellow yes, round no
lemon: sweet no, yellow yes                         watermelon: small no, green yes
peanut: tiny yes, round no                          pizza: hot yes, made yes, round yes
milk: liquid yes, made no                           coffee: hot yes, liquid yes, plant no
bread: sweet no, kitchen yes                        sun: hot yes, light yes, made no, huge yes
moon: hot no, round yes                             sea: liquid yes, food no
ring: wear yes, tiny yes, metal yes                 sock: cloth yes, wear yes
spoon: sharp no, metal yes                          knife: sharp yes, kitchen yes
refrigerator: electric yes, hold yes                lamp: light yes, kitchen no
phone: read yes, small yes                          piano: music yes, wood yes, legs yes
train: huge yes, wheels yes                         bicycle: electric no, wheels yes, carry yes
airplane: fly yes, carry yes, alive no              helicopter: huge no, fly yes
boat: water yes, huge no                            kite: toy yes, fly yes
candle: light yes, electric no                      book: read yes, metal no
needle: sharp yes, tiny yes                         key: round no, metal yes
bed: legs yes, big yes                              tent: cloth yes, big yes
"""


def checked_facts():
    for thing, facts in re.findall(r"([a-z]+): ((?:[a-z]+ (?:yes|no|unclear)(?:, )?)+)", CHECKED):
        for fact in facts.split(", "):
            yield thing, *fact.split()


def test_facts_checked_by_hand():
    facts = list(checked_facts())
    assert len(facts) >= 60
    assert [(thing, key, FACTS[thing][key]) for thing, key, _ in facts] == facts


def test_facts_as_sentences():
    env = make("20q-full")
    facts = env.facts()
    assert len(facts) == len(set(facts)) == len(env.things) * len(env.properties)
    for sentence in [
        "A cat is alive.",
        "A cat cannot fly.",
        "A cat has legs.",
        "An apple does not have legs.",
        "The sun gives light.",
        "A spider lays eggs.",
        "A glass of milk is something people eat or drink.",
        "A pair of glasses is something people wear.",
        "I can't tell whether a chicken can fly.",
    ]:
        assert sentence in facts
    assert len(make("20q").facts()) == 24 * 12


# --------------------------------------------------------------------------------------------------------------- parser


def test_no_two_meanings_for_one_phrase():
    meanings = {}
    ways = [(way, ("ask", key)) for key, text in PROPERTIES.items() for way in tq.expand(text)]
    ways += [(f"is it {name}", ("guess", thing)) for thing in FACTS for name in [thing, PHRASES[thing], *OTHER_NAMES[thing]]]
    for way, meaning in ways:
        assert meanings.setdefault(plain(way), meaning) == meaning, way
        assert understand(way) == meaning, way
    assert meanings == tq.UNDERSTOOD


def test_canonical_moves_are_understood_in_any_dress():
    env = make("20q-full")
    expected = [("ask", key) for key in env.properties] + [("guess", thing) for thing in env.things]
    for move, meaning in zip(env.moves, expected):
        words = move.rstrip("?")
        dresses = [move, words, move.upper(), words.lower(), f"  {move}\n", f"Q: {move}"]
        dresses += [f"Q3: {words}", f"12. {move}", f"**{move}**", f"Question 4: {move}"]
        dresses += [f"Well, {words}, please?"]
        for text in [*dresses, f"Let me think.\n{move}", f"It moves. So: {move}"]:
            assert understand(text) == meaning, text


@pytest.mark.parametrize("key, text", [pair for key, texts in {
    "alive": ["Is it alive?", "Is it a living thing?", "does it live", "Is it something that is alive?", "Is the thing alive"],
    "animal": ["is it some kind of animal", "Is this an animal?", "It is an animal?", "Do you think it is an animal?"],
    "made": ["Is it man-made?", "Is it made by humans?", "Do humans make it?", "Is it artificial?", "Is it natural?"],
    "food": ["Can you eat it?", "Is it edible?", "Do people eat it?", "Is it something you can eat?", "Can it be eaten?"],
    "fly": ["Does it fly?", "Is it able to fly?", "Can it fly", "Is it something that flies?", "Could it fly"],
    "wheels": ["Has it got wheels?", "Does it have any wheels?", "Is it something that has wheels?", "has it wheels"],
    "big": ["Is it larger than a human?", "is it bigger than me", "Is it usually bigger than a person?", "Is it big?"],
    "small": ["Would it fit in a shoebox?", "Is it smaller than a shoebox?", "Is it bigger than a shoebox?", "does it fit into a shoebox"],
    "metal": ["Is it made of metal?", "Is it metal?", "Is it mainly made of metal", "Is it metallic?"],
    "electric": ["Does it need electricity?", "Is it electronic?", "Is it an electrical device?"],
    "wear": ["Can you wear it?", "Do people wear it?", "Is it clothing?", "Is it something that you wear?"],
    "carry": ["Can you ride it?", "Is it a vehicle?"],
    "music": ["Is it a musical instrument?", "Can you play music on it?"],
    "green": ["Is its colour green?", "is it green", "Is it normally green?"],
}.items() for pair in [(key, text) for text in texts]])
def test_synonyms(key, text):
    assert understand(text) == ("ask", key)


@pytest.mark.parametrize("text, thing", [
    ("Is it a cat?", "cat"), ("guess: cat", "cat"), ("I guess it is the cat", "cat"), ("cat", "cat"), ("CAT!", "cat"),
    ("It's a cat.", "cat"), ("My guess is that it's a cat.", "cat"), ("Could it be a cat?", "cat"), ("The answer is a cat", "cat"),
    ("final answer: cat", "cat"), ("I think it is a kitty", "cat"), ("Is it an elephant?", "elephant"), ("can it be a lion", "lion"),
    ("Is it the sun?", "sun"), ("a plane?", "airplane"), ("Is it a pair of glasses?", "glasses"), ("is it milk", "milk"),
    ("Is your thing a washing machine?", "washing machine"), ("Is the secret object a TV?", "television"),
    ("guess hoover", "vacuum cleaner"),
])
def test_guesses(text, thing):
    assert understand(text) == ("guess", thing)


@pytest.mark.parametrize("text", [
    "", " \n\t", "Is it not alive?", "Is it a cat or a dog?", "Is it alive and can it fly?", "Is it a dragon?", "What is it?", "Is it",
    "it", "is", "the", "?", "....", "Yes.", "\x00\x1b[31m", "\ud800", "<think>", "guess", "guess:", "Does it have?",
    "3", "q", "people", "a thing",
])
def test_not_understood(text):
    assert understand(text) == (None, None)


def test_one_question_a_turn():
    assert understand("Is it alive? Can it fly?") == ("several", None)
    assert understand("Is it a cat?\nIs it a dog?") == ("several", None)
    assert understand("Is it alive? Is it a living thing?") == ("ask", "alive")  # the same one twice
    assert understand("I know that it is an animal. Can it fly?") == ("ask", "fly")


# ----------------------------------------------------------------------------------------------------------------- host


def test_a_dialogue_word_for_word():
    env = make("20q-full")
    env.reset(seed=0)
    env.hidden = "chicken"
    n = len(FACTS)

    def say(text):
        return env.step(text)[0]

    assert env.observation == f"I am thinking of one of {n} things. {n} things are still possible. 20 turns left."
    animals = sum(row["animal"] == "yes" for row in FACTS.values())
    assert say("Is it an animal?") == f"Yes. {animals} things are still possible. 19 turns left."
    assert say("Is this a beast") == f"Yes. (You asked: Is it an animal?) {animals} things are still possible. 18 turns left."
    assert say("is it a Common pet") == "No. 19 things are still possible. 17 turns left."
    assert say("Can it fly?") == "I can't tell. 1 thing is still possible. 16 turns left."
    assert say("duck") == "No, it is not a duck. 1 thing is still possible. 15 turns left."
    assert say("What?") == "I don't understand that question. 1 thing is still possible. 14 turns left."
    assert say("") == "You did not say anything. 1 thing is still possible. 13 turns left."
    assert say("x" * 4001) == "That was too long; use at most 4000 characters. 1 thing is still possible. 12 turns left."
    observation, reward, terminated, truncated, info = env.step("Is it a hen?")
    assert observation == "Yes, it is a chicken! You win after 9 turns."
    assert (reward, terminated, truncated, info["won"], info["score"]) == (1.0, True, False, True, 1.0)


def test_words_outside_of_the_small_world():
    env = make("20q")
    env.reset(seed=0)
    for text, start in [
        ("Is it a frog?", "A frog is not one of my 24 things."),
        ("Is it alive?", "I don't answer that question in this game."),
    ]:
        observation, _, _, _, info = env.step(text)
        assert observation.startswith(start) and not info["valid"] and "24 things are still possible" in observation


def test_tally_against_brute_force(env):
    rng = random.Random(1)
    for seed in range(30):
        env.reset(seed=seed, options={"split": rng.choice(env.splits)})
        allowed = list(env.things)
        for action in random_actions(env, rng, env.max_turns):
            observation, _, over, _, info = env.step(action)
            kind, what = understand(action[: envs.MAX_CHARACTERS]) if len(action) <= envs.MAX_CHARACTERS else (None, None)
            if kind == "ask" and info["valid"]:
                answer = {"Yes": "yes", "No.": "no", "I c": "unclear"}[observation[:3].replace("Yes.", "Yes")]
                allowed = [thing for thing in allowed if FACTS[thing][what] == answer]
            elif kind == "guess" and info["valid"] and not info["won"]:
                allowed = [thing for thing in allowed if thing != what]
            if info["won"]:
                break
            assert env.consistent() == allowed and env.hidden in allowed
            said = int(re.search(r"(\d+) things? (?:is|are) still possible", observation)[1])
            assert said == len(allowed)


def test_turns_left_are_counted_down_and_the_tally_can_be_off():
    env = make("20q", tally=False)
    observation, info = env.reset(seed=1)
    assert observation == "I am thinking of one of 24 things. 8 turns left."
    left = [re.search(r"(\d+) turns? left", env.step("what?")[0]) for _ in range(7)]
    assert [int(match[1]) for match in left] == [7, 6, 5, 4, 3, 2, 1]
    observation, reward, terminated, truncated, info = env.step("what?")
    assert observation == "I don't understand that question. The game is over and you did not win."
    assert (reward, terminated, truncated, info["valid"], info["won"], info["score"]) == (0.0, True, False, False, False, 0.0)


def test_step_before_reset_is_refused():
    with pytest.raises(RuntimeError, match="reset"):
        make("20q").step("Is it a cat?")


# ------------------------------------------------------------------------------------------------------ seeds and splits


def test_splits_are_disjoint_and_every_thing_is_somewhere(env):
    train, test = set(env.hidden_in["train"]), set(env.hidden_in["test"])
    assert not train & test and train | test == set(env.things)
    assert 0.2 <= len(test) / len(env.things) <= 0.3
    for split, things in ("train", train), ("test", test):
        seen = set()
        for seed in range(1500):
            env.reset(seed=seed, options={"split": split})
            seen.add(env.hidden)
        assert seen == things


def test_unknown_names_are_refused_clearly():
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, test"):
        make("20q").reset(seed=1, options={"split": "dev"})
    with pytest.raises(ValueError, match="unknown world 'chess'; there are: repair, household"):
        make("chess")


def test_settings_are_used():
    env = make("20q", things=["cat", "dog", "car"], properties=["made", "climb"], max_turns=3)
    observation, info = env.reset(seed=0)
    assert observation == "I am thinking of one of 3 things. 3 things are still possible. 3 turns left."
    assert info["admissible"] == ["Is it made by people?", "Can it climb trees?", "Is it a cat?", "Is it a dog?", "Is it a car?"]
    assert "one of 3 everyday things" in env.system and "3 turns" in env.system
    assert make("20q").max_turns == 8  # the class is untouched


def test_reset_without_a_seed_draws_one():
    env = make("20q")
    hidden = {env.reset(seed=None, options=None) and env.hidden for _ in range(100)}
    assert len(hidden) > 5


# --------------------------------------------------------------------------------------------------------------- secrecy


def test_swapping_the_hidden_thing_changes_nothing_the_player_sees(env):
    """Prompts are made of observations and info: both must be the same for every thing that the dialogue allows."""
    rng = random.Random(4)
    swapped = 0
    for seed in range(40):
        actions = random_actions(env, rng, rng.randrange(1, env.max_turns + 1))
        first = env.reset(seed=seed)
        seen = [first] + [env.step(action) for action in actions]
        if env.won:
            continue
        experts, possible = env.expert(), env.consistent()
        for thing in possible:
            assert env.reset(seed=seed) == first
            env.hidden = thing
            assert [first] + [env.step(action) for action in actions] == seen
            assert env.expert() == experts and env.consistent() == possible
            swapped += 1
    assert swapped > 100


def test_resample_draws_from_what_is_consistent(env):
    rng = random.Random(5)
    env.reset(seed=1)
    for action in env.moves[:2]:
        env.step(action)
    possible, before = env.consistent(), (env.observation, env.turns, env.info(True))
    drawn = []
    for _ in range(200 * len(possible)):
        env.resample(rng)
        drawn.append(env.hidden)
    assert all(130 < drawn.count(thing) < 270 for thing in possible) and set(drawn) == set(possible)
    assert (env.observation, env.turns, env.info(True)) == before and env.consistent() == possible
    env.possible.clear()  # what consistent() returned is a copy
    assert possible


def test_a_lost_game_does_not_reveal_the_answer(env):
    rng = random.Random(6)
    for split in env.splits:
        for seed in range(60):
            env.reset(seed=seed, options={"split": split})
            over = False
            while not over:
                move = rng.choice(env.moves)
                if move == env.guess(env.hidden):
                    continue
                observation, _, over, _, info = env.step(move)
                for name in [env.hidden, PHRASES[env.hidden], *OTHER_NAMES[env.hidden]]:
                    assert not re.search(rf"\b{name}\b", observation.replace("a cup of coffee", "").replace("person", ""))
            assert observation.endswith("The game is over and you did not win.")
            assert env.hidden not in str({**info, "admissible": None})


def test_prompts_and_offers_do_not_depend_on_the_episode(env):
    system, offers = env.system, env.reset(seed=0)[1]["admissible"]
    for seed in range(20):
        info = env.reset(seed=seed)[1]
        assert (info["admissible"], info["task"], env.system) == (offers, env.task, system)
        assert env.step(env.moves[seed % 7])[4]["admissible"] == offers
    offers.clear()
    assert env.admissible()  # a copy each time
    assert str(len(env.things)) in system and QUESTIONS[env.properties[0]] in system


# --------------------------------------------------------------------------------------------------------------- players


def test_the_things_in_question_are_named_and_test_asks_about_other_sets():
    env, sets, hidden = make("twenty_questions:listed"), {"train": set(), "test": set()}, {"train": set(), "test": set()}
    for split, seed in itertools.product(sets, range(3000)):
        opening = env.reset(seed=seed, options={"split": split})[0]
        named = [thing for thing in env.things if re.search(rf" {tq.PHRASES[thing]}(, | or |[.] )", opening)]
        assert sorted(named) == sorted(env.possible) and len(named) == 6 and env.hidden in named
        sets[split].add(frozenset(named))
        hidden[split].add(env.hidden)
    assert min(map(len, sets.values())) > 1000 and not sets["train"] & sets["test"]
    assert hidden["train"] == hidden["test"] == set(env.things)
    assert "of one of the things that I name at first, and you have 4 turns" in env.system
    assert envs.mean_score(env, envs.expert_player, 300)[0] > 0.98 and envs.mean_score(env, envs.random_player, 300)[0] < 0.15
    with pytest.raises(ValueError, match="named"):
        make("twenty_questions:listed", things=["cat", "coat"])


@pytest.mark.parametrize("name, turns", [("20q", t) for t in range(1, 9)] + [("20q-full", t) for t in (1, 4, 6, 7, 8, 20)])
def test_exact_expert_success_equals_simulation_over_all_things(name, turns):
    env = make(name, max_turns=turns)
    won = {}
    for thing in env.things:
        env.reset(seed=0)
        env.hidden = thing
        over = False
        while not over:
            _, _, over, _, info = env.step(env.expert())
            assert info["valid"]
        won[thing] = info["won"]
    assert expert_success(env) == pytest.approx(sum(won.values()) / len(won))
    for split, things in env.hidden_in.items():
        assert expert_success(env, split) == pytest.approx(sum(won[thing] for thing in things) / len(things))


def test_expert_wins_both_worlds():
    assert expert_success(make("20q")) == expert_success(make("20q-full")) == 1.0
    # each question has at most 3 answers, each turn at most one guess: 1 turn names 1 thing
    assert expert_success(make("20q", max_turns=1)) == pytest.approx(1 / 24)


def test_expert_by_hand():
    env = make("20q", things=["cat", "eagle", "car", "sock"], properties=["animal", "wheels", "eggs"], max_turns=3)
    env.reset(seed=0)
    env.hidden = "car"
    assert env.expert() == "Is it an animal?"  # 2:2, the others 1:3
    env.step(env.expert())
    assert env.expert() == "Is it a car?"  # two are left: a guess wins now or leaves one
    assert expert_success(env) == 1.0
    assert expert_success(make("20q", things=env.things, properties=env.properties, max_turns=2)) == 0.5


def test_players_stay_within_what_is_admissible(env):
    for player in envs.random_player, linear_player, envs.expert_player:
        result = run_episode(env, player, seed=3, split="test")
        assert set(result["actions"]) <= set(env.moves) and result["invalid"] == 0
        assert result["turns"] == len(result["actions"]) == len(result["observations"]) - 1 <= env.max_turns
        assert result["score"] == float(result["won"])
        assert run_episode(env, player, seed=3, split="test") == result  # its randomness is its own
    assert len(set(run_episode(env, envs.random_player, seed=0)["actions"])) > 1


def test_linear_search_wins_as_often_as_it_may(env):
    mean, error = envs.mean_score(env, linear_player, 600, "train")
    assert abs(mean - env.max_turns / len(env.things)) < 4 * error
    actions = run_episode(env, linear_player, seed=0)["actions"]
    assert len(set(actions)) == len(actions)


def test_mean_score_and_its_standard_error():
    env = make("20q")
    mean, error = envs.mean_score(env, envs.random_player, 50)
    scores = [run_episode(env, envs.random_player, seed, "test")["score"] for seed in range(50)]
    assert mean == sum(scores) / 50 and error == pytest.approx((mean * (1 - mean) / 49) ** 0.5)


# ----------------------------------------------------------------------------------------------------------- repair shop


def shop_at(seed, split="train", actions=()):
    shop = make("repair")
    seen = [shop.reset(seed=seed, options={"split": split})] + [shop.step(action) for action in actions]
    return shop, seen


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_expert_repairs_everything_in_two_turns(split):
    results = [run_episode(make("repair"), envs.expert_player, seed, split) for seed in range(500)]
    assert all(result["won"] and result["turns"] == 2 and result["invalid"] == 0 for result in results)
    assert envs.mean_score(make("repair"), envs.expert_player, 500, split) == (1.0, 0.0)
    mean, error = envs.mean_score(make("repair"), envs.random_player, 2000, split)
    assert mean < 0.2 and error < 0.01


def test_shop_splits_share_no_combination_but_every_part():
    seen = {}
    for split in "train", "test":
        opening = [shop_at(seed, split)[1][0][0] for seed in range(6000)]
        seen[split] = {tuple(re.fullmatch(r"(\w+) brings a (\w+) (\w+) that (.+?)\. 5 turns left\.", text).groups()) for text in opening}
    kept = {split: {row[:3] for row in rows} for split, rows in seen.items()}
    shop = make("repair")
    total = len(shop.customers) * len(shop.colours) * len(shop.devices)
    assert not kept["train"] & kept["test"] and len(kept["train"] | kept["test"]) == total == 576
    assert 0.12 < len(kept["test"]) / total < 0.28
    for i in range(4):  # no word, and no symptom, is new in test
        assert {row[i] for row in seen["train"]} == {row[i] for row in seen["test"]}


def test_a_repair_word_for_word():
    shop = make("repair")
    shop.reset(seed=0)
    shop.symptom, shop.finding = "is too loud", "A screw is loose."
    assert shop.expert() == "open the case"
    assert shop.step("check the power")[0] == "Nothing unusual. 4 turns left."
    assert shop.step("kick it")[0] == "That is neither a test nor a repair of this shop. 3 turns left."
    assert shop.step(" Open the Case. ")[0] == "A screw is loose. 2 turns left."
    assert shop.expert() == "tighten the screw"
    observation, reward, terminated, truncated, info = shop.step("tighten the screw")
    assert observation == "It works again. You win after 4 turns."
    assert (reward, terminated, truncated, info["won"], info["score"]) == (1.0, True, False, True, 1.0)
    assert shop.step("tighten the screw") == (observation, 0.0, True, False, {**info, "valid": False})
    shop.reset(seed=0)
    shop.symptom, shop.finding = "is too loud", "A screw is loose."
    observation, reward, terminated, _, info = shop.step("clean the gears")  # the first repair is the last
    assert (observation, reward, terminated, info["won"]) == ("It is still broken. The game is over and you did not win.", 0.0, True, False)


def test_shop_resample_keeps_the_dialogue():
    rng = random.Random(8)
    for seed in range(60):
        actions = [rng.choice(make("repair").tests) for _ in range(rng.randrange(4))]
        shop, seen = shop_at(seed, actions=actions)
        before, expert = (shop.observation, shop.turns, shop.symptom, shop.info(True)), shop.expert()
        drawn = set()
        for _ in range(20):
            shop.resample(rng)
            drawn.add(shop.finding)
            assert (shop.observation, shop.turns, shop.symptom, shop.info(True)) == before and shop.expert() == expert
            other, _ = shop_at(seed)
            other.finding = shop.finding
            assert [seen[0]] + [other.step(action) for action in actions] == seen  # it could have been this one all along
        assert len(drawn) == (1 if shop.found else 3)


def test_all_faults_of_a_symptom_are_as_likely():
    counts = {}
    for seed in range(2000):
        shop, _ = shop_at(seed, "test")
        counts[shop.finding] = counts.get(shop.finding, 0) + 1
    assert len(counts) == 6 and all(260 < n < 410 for n in counts.values())


def test_a_lost_repair_does_not_reveal_the_fault():
    for seed in range(100):
        shop, _ = shop_at(seed)
        right = shop.faults[shop.symptom][1][shop.finding]
        for wrong in [action for action in shop.repairs if action != right]:
            shop, seen = shop_at(seed, actions=[wrong])
            assert seen[-1][0] == "It is still broken. The game is over and you did not win." and not seen[-1][4]["won"]
            assert shop.finding not in str(seen) and right not in str({**seen[-1][4], "admissible": None})
        offers = [shop_at(s)[1][0][1]["admissible"] for s in range(3)]
        assert offers[0] == offers[1] == offers[2]  # says nothing about the episode


# ------------------------------------------------------------------------------------------------------------- household

HOUSEHOLDS = ["household", "household-full"]


def at_home(goal, split="train", name="household", seed=0):
    home = make(name, tasks=[goal])
    home.reset(seed=seed, options={"split": split})
    return home


def household_random_actions(home, rng, n):
    """Mostly what can be done, all verbs; now and then a form of it, or what cannot be done."""
    for _ in range(n):
        action = rng.choice(sorted(home.possible()))
        yield action if rng.random() < 0.9 else rng.choice([action.upper(), f"> {action}.", f"{action} 7", "eat apple 1", ""])


def household_walk(home, seed, split, rng, n):
    seen, actions = [home.reset(seed=seed, options={"split": split})], []
    for action in household_random_actions(home, rng, n):
        actions.append(action)
        seen.append(home.step(action))
        if home.over:
            break
    return seen, actions


@pytest.mark.parametrize("name", HOUSEHOLDS)
@pytest.mark.parametrize("goal", envs.TASKS)
def test_household_expert_always_wins(name, goal):
    home = make(name, tasks=[goal])
    for split in home.splits:
        for seed in range(500):
            result = run_episode(home, envs.expert_player, seed, split)
            assert result["won"] and result["invalid"] == 0 and home.goal == goal, (split, seed)


@pytest.mark.parametrize("name", HOUSEHOLDS)
def test_household_expert_wins_from_where_a_random_player_got_to(name):
    home, rng = make(name, tasks=envs.TASKS, max_turns=80), random.Random(10)
    for seed in range(150):
        household_walk(home, seed, rng.choice(home.splits), rng, rng.randrange(30))
        home.expert()  # also after the end
        while not home.over:
            assert home.step(home.expert())[4]["valid"]
        assert home.won


@pytest.mark.parametrize("goal", envs.TASKS)
def test_household_expert_plan_is_shortest_once_all_is_seen(goal):
    def state(home):
        return home.here, tuple(home.closed), tuple(home.at.items()), tuple(sorted(home.states))

    def shortest(home):
        level, known = [home], {state(home)}
        for turns in itertools.count(1):
            level, old = [], level
            for here, action in [(before, action) for before in old for action in before.admissible()]:
                there = copy.copy(here)
                there.closed, there.at, there.seen = list(here.closed), dict(here.at), list(here.seen)
                there.step(action)
                if there.won:
                    return turns
                if state(there) not in known:
                    known.add(state(there))
                    level.append(there)

    home = make("household", tasks=[goal], max_turns=99, objects=(1, 2))
    for seed in range(4):
        home.reset(seed=seed, options={"split": "test"})
        home.seen = list(home.places)
        turns = shortest(home)
        while not home.over:
            home.step(home.expert())
        assert home.won and home.turns == turns


@pytest.mark.parametrize("name", HOUSEHOLDS)
def test_household_splits(name):
    home = make(name, tasks=envs.TASKS)
    episodes, drawn = home.episodes(), {split: set() for split in home.splits}
    every = {split: {(task, *row) for task in home.tasks for row in episodes[split, task]} for split in home.splits}
    for split in home.splits:
        for seed in range(400):
            _, info = home.reset(seed=seed, options={"split": split})
            drawn[split].add((home.goal, home.room, home.places, home.wanted, home.target))
            words = {envs.word(place) for place in home.places}
            assert home.goal == "light" or home.target in words
            assert home.receptacles[0] <= len(home.places) <= home.receptacles[1]
            assert not any(home.finished(thing) for thing in home.at) and all(envs.belongs(t, p, home.room) for t, p in home.at.items())
            assert home.task.replace("with the", "").split()[-1].strip(".") == home.target and info["task"] == home.task
        assert drawn[split] <= every[split] and {row[0] for row in drawn[split]} == set(envs.TASKS)
    assert not every["train"] & every["test"]
    known = every["train"] | every["test"]
    assert not {row[1:3] for row in known} & {row[1:3] for row in every["ood"]}  # layouts
    assert not {row[3:] for row in known} & {row[3:] for row in every["ood"]}  # pairings
    for split in "test", "ood":  # every word in train, and test in rooms that train has
        assert {row[3] for row in every[split]} <= {row[3] for row in every["train"]}
        assert {row[4] for row in every[split]} <= {row[4] for row in every["train"]}
        places = [{place for row in every[part] for place in row[2]} for part in (split, "train")]
        assert places[0] <= places[1]
    assert {row[1:3] for row in every["test"]} <= {row[1:3] for row in every["train"]}
    assert len(every["test"]) > 0.15 * len(known)


@pytest.mark.parametrize("name", HOUSEHOLDS)
def test_household_says_little_and_accepts_what_it_offers(name):
    rng = random.Random(11)
    for seed in range(60):
        home, split = make(name, tasks=envs.TASKS), rng.choice(["train", "test", "ood"])
        seen, actions = household_walk(home, seed, split, rng, 12)
        for step in seen[1:]:
            well_formed(step)
        if home.over:
            continue
        offered = home.admissible()
        assert offered == sorted(set(offered)) and set(offered) <= set(home.possible()) and home.expert() in offered
        for action in home.possible():
            other = make(name, tasks=envs.TASKS)
            assert replay(other, seed, actions, split) == seen[-1]
            step = other.step(action)
            assert step[4]["valid"] and len(re.findall(r"[.!?](?: |$)", step[0])) == 2  # one sentence, then the turns left
            assert step[1] == float(other.won) == step[4]["score"]


@pytest.mark.parametrize("name", HOUSEHOLDS)
def test_household_resample_keeps_the_dialogue(name):
    rng, moved = random.Random(12), 0
    for seed in range(40):
        home, split = make(name, tasks=envs.TASKS), rng.choice(["train", "test", "ood"])
        seen, actions = household_walk(home, seed, split, rng, rng.randrange(10))
        if home.over:
            continue
        known = {thing: place for thing, place in home.at.items() if place in home.seen or place == "hand"}
        before, expert = (home.observation, home.turns, home.info(True)), home.expert()
        start = make(name, tasks=envs.TASKS)
        start.reset(seed=seed, options={"split": split})
        for _ in range(5):
            old = dict(home.at)
            home.resample(rng)
            moved += home.at != old
            assert known.items() <= home.at.items() and (home.observation, home.turns, home.info(True)) == before
            assert home.expert() == expert and not any(home.finished(t) for t in home.at if t not in known)
            other = make(name, tasks=envs.TASKS)
            other.reset(seed=seed, options={"split": split})
            other.at = {thing: start.at[thing] if thing in known else place for thing, place in home.at.items()}
            assert [seen[0]] + [other.step(action) for action in actions] == seen  # it could have been so all along
    assert moved > 20


def kitchen(goal="heat", wanted="mug", target="cabinet", at=None):
    """A kitchen by hand: a mug in the fridge, an apple on the countertop."""
    home = at_home("heat")
    home.goal, home.room, home.wanted, home.target, home.max_turns = goal, "kitchen", wanted, target, 50
    home.places = ("cabinet 1", "countertop 1", "fridge 1", "microwave 1", "sinkbasin 1")
    home.closed, home.seen, home.states, home.here = ["cabinet 1", "fridge 1", "microwave 1"], [], [], None
    home.at = at or {"apple 1": "countertop 1", "mug 1": "fridge 1"}
    return home


def say(home, text):
    """The reply without the turns left; "!" in front when it was not valid."""
    observation, _, _, _, info = home.step(text)
    return "!" * (not info["valid"]) + re.sub(r" \d+ turns? left\.$", "", observation)


def test_a_household_dialogue_word_for_word():
    home = kitchen()
    nothing = "!Nothing happens."
    for text, reply in [
        ("look", "You are in a kitchen and see a cabinet 1, a countertop 1, a fridge 1, a microwave 1 and a sinkbasin 1."),
        ("inventory", "You are carrying nothing."),
        ("open fridge 1", nothing), ("take apple 1 from countertop 1", nothing), ("go to fridge 2", nothing),
        ("> GO TO the Fridge 1.", "The fridge 1 is closed."), ("take mug 1 from fridge 1", nothing), ("close fridge 1", nothing),
        ("examine fridge 1", "The fridge 1 is closed."), ("open fridge 1", "You open the fridge 1 and see a mug 1."),
        ("open fridge 1", nothing), ("cool mug 1 with fridge 1", nothing), ("examine mug 1", nothing), ("use desklamp 1", nothing),
        ("take the mug 1 from the fridge 1", "You pick up the mug 1 from the fridge 1."), ("take mug 1 from fridge 1", nothing),
        ("look", "In the fridge 1, you see nothing."), ("inventory", "You are carrying a mug 1."),
        ("cool mug 1 with fridge 1", "You cool the mug 1 using the fridge 1."), ("heat mug 1 with microwave 1", nothing),
        ("clean mug 1 with fridge 1", nothing), ("close fridge 1", "You close the fridge 1."), ("put mug 1 in/on fridge 1", nothing),
        ("go to microwave 1", "The microwave 1 is closed."), ("examine mug 1", "This is a cool mug 1."),
        ("heat mug 1 with microwave 1", "You heat the mug 1 using the microwave 1."), ("examine mug 1", "This is a hot mug 1."),
        ("go to countertop 1", "On the countertop 1, you see an apple 1."), ("take apple 1 from countertop 1", nothing),
        ("move mug 1 to countertop 1", "You put the mug 1 in/on the countertop 1."),
        ("go to countertop 1", "On the countertop 1, you see an apple 1 and a mug 1."), ("heat mug 1 with microwave 1", nothing),
        ("Take mug 1 from countertop 1", "You pick up the mug 1 from the countertop 1."),
        ("go to sinkbasin 1", "In the sinkbasin 1, you see nothing."),
        ("clean mug 1 with sinkbasin 1", "You clean the mug 1 using the sinkbasin 1."), ("examine mug 1", "This is a hot clean mug 1."),
        ("go to cabinet 1", "The cabinet 1 is closed."), ("put mug 1 in cabinet 1", nothing), ("dance\n", nothing), ("", nothing),
        ("open cabinet 1", "You open the cabinet 1 and see nothing."),
    ]:
        assert say(home, text) == reply, text
        assert not home.won and home.score() == 0
    observation, reward, terminated, _, info = home.step("Put mug 1 in cabinet 1")
    assert observation.startswith("You put the mug 1 in/on the cabinet 1. You win after ")
    assert (reward, terminated, info["won"], info["score"]) == (1.0, True, True, 1.0)


@pytest.mark.parametrize("form", ["put mug 1 in/on {}", "put mug 1 in {}", "put mug 1 on {}", "move mug 1 to {}", "PUT THE MUG 1 INTO {}."])
def test_household_ways_to_put(form):
    home = kitchen(at={"mug 1": "hand"})
    say(home, "go to countertop 1")
    assert say(home, form.format("countertop 1")) == "You put the mug 1 in/on the countertop 1."


def test_household_state_is_needed_and_pick_two_needs_two():
    home = kitchen("cool", at={"mug 1": "hand"})
    steps = ["go to cabinet 1", "open cabinet 1", "put mug 1 in/on cabinet 1"]
    assert [home.step(action)[1] for action in steps] == [0, 0, 0] and not home.won  # not cool
    assert home.expert() == "take mug 1 from cabinet 1"
    home = kitchen("two", at={"mug 1": "hand", "mug 2": "countertop 1"})
    assert [home.step(action)[1] for action in steps] == [0, 0, 0]
    steps = ["go to countertop 1", "take mug 2 from countertop 1", "go to cabinet 1", "put mug 2 in/on cabinet 1"]
    assert [home.step(action)[1] for action in steps] == [0, 0, 0, 1] and home.won


def test_household_light_needs_the_thing_in_hand_at_the_lamp():
    home = make("household", tasks=["light"])
    for seed in range(30):
        home.reset(seed=seed)
        thing, lamp = f"{home.wanted} 1", home.at["desklamp 1"]
        home.max_turns, home.at[thing] = 50, lamp
        assert say(home, "use desklamp 1") == "!Nothing happens."
        assert lamp in say(home, f"go to {lamp}") and say(home, f"take desklamp 1 from {lamp}") == "!Nothing happens."
        assert say(home, "use desklamp 1") == "You turn on the desklamp 1." and not home.won
        assert "use desklamp 1" in home.admissible() and say(home, f"take {thing} from {lamp}").startswith("You pick up")
        assert not home.won and home.step("use desklamp 1")[1] == 1.0


def test_household_offers_do_not_reveal_what_is_hidden():
    home = kitchen()
    gos = [f"go to {place}" for place in home.places]
    assert home.admissible() == gos
    say(home, "go to fridge 1")
    assert home.admissible() == [*(go for go in gos if "fridge" not in go), "open fridge 1"]
    assert say(home, "go to fridge 1") == "The fridge 1 is closed."  # understood, not offered
    full = make("household-full")
    assert {"look", "inventory"} <= set(full.reset(seed=0)[1]["admissible"])


# ---------------------------------------------------------------------------------------------------------------- search

SEARCHES = ["search", "search-full"]
call = envs.tool_call


def search_episode(name, player, seed, split="test", env=None):
    """The public record of an episode: (the world after it, [(action, observation, valid), ...])."""
    env, rng, steps = env or make(name), random.Random(f"{player.__name__} {split} {seed}"), []
    _, info = env.reset(seed=seed, options={"split": split})
    while not env.over:
        action = player(env, info, rng)
        observation, _, _, _, info = env.step(action)
        steps.append((action, observation, info["valid"]))
    return env, steps


@pytest.mark.parametrize("name", SEARCHES)
def test_search_expert_is_always_right_and_without_flaws(name):
    env, forms = make(name), set()
    for split in env.splits:
        for seed in range(300):
            _, steps = search_episode(name, envs.expert_player, seed, split, env)
            assert env.won and all(valid for *_, valid in steps), (split, seed)
            assert envs.search_evidence(env.task, steps) == {} and env.flaws() == []
            form, chains = envs.read_question(env.task)
            forms.add(form)
            assert sum(len(relations) for _, relations in chains) in env.hops[split]
            assert envs.write_question(form, chains) == env.task and len(env.task) < 200
    assert forms == set(env.forms)
    assert max(env.hops["test"]) == max(env.hops["train"]) < min(env.hops["ood"])


@pytest.mark.parametrize("name", SEARCHES)
def test_search_expert_wins_from_where_weak_players_got_to(name):
    env, rng = make(name, max_turns=60), random.Random(20)
    for seed in range(60):
        _, info = env.reset(seed=seed, options={"split": rng.choice(env.splits)})
        for _ in range(rng.randrange(12)):
            action = rng.choice([action for action in info["admissible"] if '"answer"' not in action])
            info = env.step(action if rng.random() < 0.8 else rng.choice([action[:30], action.upper(), "What?"]))[4]
        while not env.over:
            assert env.step(env.expert())[4]["valid"]
        assert env.won and env.turns < 40


@pytest.mark.parametrize("name", SEARCHES)
def test_search_splits_share_words_but_no_name(name):
    env, names, questions = make(name), {}, {}
    sorts = {word for words, _ in envs.ARTICLES.values() for word in (words or "").split()}
    for split in env.splits:
        books = [
            envs.encyclopedia(split, i, tuple(env.kinds.items()), env.relations, env.parts, env.namesakes, env.year_step)
            for i in range(min(100, env.encyclopedias[split]))
        ]
        assert {len(book.facts) for book in books} == {sum(env.kinds.values())}
        names[split] = {name for book in books for name in book.facts}
        questions[split] = {env.reset(seed=seed, options={"split": split})[1]["task"] for seed in range(200)}
        assert len(questions[split]) > 60
        gaps = []
        for book in books:
            for i in 0, 1:  # names that share a word are everywhere; in the small world only words such as Hill are shared
                shared = [other.split()[i] for other in book.facts]
                if env.namesakes:
                    assert sum(shared.count(other.split()[i]) > 1 for other in book.facts) > 0.5 * len(shared)
            if not env.namesakes:
                own = [word for other in book.facts for word in set(other.split()) - sorts]
                assert len(own) == len(set(own)) and max(map(shared.count, sorts)) > 1
            where = {key: place for key, place in book.where.items() if place != key[0]}
            assert all(place == f"Notes on {key[0]}" for key, place in where.items())
            asked = [relation.subject for key, relation in envs.RELATIONS.items() if key in env.relations]
            gaps.append((len(where), sum(env.kinds[kind] for kind in asked) - len(book.where)))
            facts = [(title, book.facts[title][key]) for title, key in book.where]
            assert len(facts) == sum(map(len, book.facts.values()))
            assert all(value in book.pages[place][1] for (_, value), place in zip(facts, book.where.values()))
        assert min(map(min, gaps)) >= 0 and all(sum(n) / len(n) > 2 for n in zip(*gaps))  # dead ends, and facts that stand nowhere
    assert 25 <= sum(env.kinds.values()) <= 60 if name == "search" else sum(env.kinds.values()) >= 300
    for one, other in itertools.combinations(env.splits, 2):
        assert not names[one] & names[other] and not questions[one] & questions[other]
    words = {split: [{name.split()[i] for name in names[split]} for i in (0, 1)] for split in names}
    for split in "test", "ood":
        assert words[split][0] <= words["train"][0] and words[split][1] <= words["train"][1]
        asked = [set(re.findall(r"\b[a-z]+\b", " ".join(questions[part]))) for part in (split, "train")]
        assert asked[0] <= asked[1]


@pytest.mark.parametrize("name", SEARCHES)
def test_search_offers_are_valid_and_come_from_what_was_said(name):
    rng = random.Random(21)
    env = make(name, max_turns=30)
    for seed in range(40):
        observation, info = env.reset(seed=seed, options={"split": rng.choice(env.splits)})
        said, actions = observation, []
        while not env.over:
            offered = info["admissible"]
            assert offered == sorted(set(offered)) and env.expert() in offered
            for action in offered:
                tool, argument, problem = envs.read_call(action)
                assert problem is None
                words = re.findall(r"\w+", argument) if tool != "answer" or not argument.isdigit() else []
                assert all(word in said + " yes no" for word in words), action
            actions.append(rng.choice([action for action in offered if '"answer"' not in action or rng.random() < 0.02] or offered))
            step = env.step(actions[-1])
            well_formed(step)
            observation, info = step[0], step[4]
            said += observation
            assert info["valid"]


@pytest.mark.parametrize("name", SEARCHES)
def test_search_hides_what_was_not_read(name):
    """With another answer on the page that was not read yet, all that was seen stays the same, and so does the expert's next call."""
    swapped = 0
    for split in "train", "ood":
        for seed in range(40):
            env, steps = search_episode(name, envs.expert_player, seed, split)
            subject, relations = envs.read_question(env.task)[1][-1]
            for key in relations[:-1]:
                subject = env.book.facts[subject][key]
            place, key = env.book.where[subject, relations[-1]], relations[-1]
            value = env.book.facts[subject][key]
            other = next(v[key] for v in env.book.facts.values() if v.get(key, value) != value and v[key] not in env.task)
            opened = next(i for i, (action, *_) in enumerate(steps) if action == call("open", place))
            both = []
            for swap in False, True:
                twin = make(name)
                both.append([twin.reset(seed=seed, options={"split": split})])
                if swap:
                    twin.book = copy.deepcopy(twin.book)  # the encyclopedia is shared
                    about, text = twin.book.pages[place]
                    shape = envs.RELATIONS[key].sentence
                    assert shape.format(x=subject, y=value) in text
                    text = text.replace(shape.format(x=subject, y=value), shape.format(x=subject, y=other))
                    twin.book.pages[place], twin.gold = (about, text), other
                both[-1] += [twin.step(action) for action, *_ in steps[:opened]]
                both[-1] += [twin.thought(""), twin.expert()]
                both[-1].append(twin.step(call("answer", "Nobody Else")))  # lost: nothing is revealed
            assert both[0] == both[1] and both[0][-1][0].endswith("That is your answer. The game is over and you did not win.")
            swapped += 1
    assert swapped == 80


def thinking_player(env, info, rng):
    return f"{env.thought('')}\n{env.expert()}"


@pytest.mark.parametrize("name", SEARCHES)
def test_search_thoughts_quote_what_was_read_and_leave_a_blank(name):
    blanks, quotes = set(), 0
    for split in "train", "ood":
        for seed in range(60):
            env, steps = search_episode(name, thinking_player, seed, split)
            other, plain = search_episode(name, envs.expert_player, seed, split)
            assert env.won and [action.partition("\n")[2] for action, *_ in steps] == [action for action, *_ in plain]
            for turn, (action, *_) in enumerate(steps):
                thought, read = action.partition("\n")[0], " ".join(observation for _, observation, _ in steps[:turn])
                whole = next((s for s in re.findall(r'(?:The rival|")[^.]*\.', read) if thought.startswith(s)), "")
                quotes += bool(whole)
                rest = thought.removeprefix(whole).strip()
                assert rest or envs.read_call(action)[0] in ("answer", "calculate")
                if rest:
                    [x] = re.findall(rf'"({envs.NAME})"', rest)
                    [key] = [key for key, r in envs.RELATIONS.items() if r.sentence.format(x=x, y="?") == rest]
                    assert x in env.task + read
                    blanks.add(key)
    assert blanks == set(env.relations) and quotes > 200


def quoted(text):
    """Names in quotation marks, as pages and results have them."""
    return re.sub(rf"(Notes on )?{envs.NAME}", r'"\g<0>"', text)


def test_a_search_dialogue_word_for_word():
    env = make("search")
    page = {"Mira Velden": ("a writer", "Mira Velden is a writer. Mira Velden was born in Torden Mill."), "Mira Velder": ("a potter", "x")}
    page |= {"Notes on Mira Velden": ("notes", "These are notes on Mira Velden. Mira Velden was born in the year 1760.")}
    page = {title: (about, quoted(text)) for title, (about, text) in page.items()}
    index = {"mira": list(page), "velden": [title for title in page if "Velden" in title], "writer": ["Mira Velden"]}
    env.reset(seed=0)
    env.book, env.task, env.gold = env.book._replace(pages=page, index=index), quoted("In which year was Mira Velden born?"), "1760"
    assert env.admissible() == [call("search", "Mira Velden")]
    no_tool = "There is no such tool. The tools are search, open, calculate, answer."
    for text, reply in [
        (call("open", "Mira Velden"), "!No search has listed a page with that title."),
        ('{"name": "search", "arguments": {"query": "MIRA, the writer"}}', "Results: Mira Velden (a writer); Mira Velder (a potter);"
         " Notes on Mira Velden (notes)."),
        (call("search", "gold"), "No page matches that."),
        (call("open", "mira velden."), "Mira Velden is a writer. Mira Velden was born in Torden Mill."),
        ("hello", '!That is not a tool call. Write {"name": TOOL, "arguments": {...}} between <tool_call> and </tool_call>.'),
        ('<tool_call>{"name": "search"</tool_call>', "!The JSON of this tool call is broken."),
        ('{"name": "look", "arguments": {}}', f"!{no_tool}"), ('{"name": ["a"]}', f"!{no_tool}"),
        ('{"name": "open", "arguments": {"query": "x"}}', "!The tool open needs the argument title, a text."),
        ('{"name": "open", "arguments": []}', "!The tool open needs the argument title, a text."),
    ]:
        env.turns = 0
        assert say(env, text) == (quoted(reply) if "Velden" in reply else reply), text
    tagged = call("open", "Notes on Mira Velden")
    env.turns, text = 0, f"Not {call('answer', '1')} but {tagged} now."  # the last call counts
    assert say(env, text) == quoted("These are notes on Mira Velden. Mira Velden was born in the year 1760.")
    assert say(env, '{"name": "calculate", "arguments": "{\\"expression\\": \\"1760 / 3\\"}"}') == "The result is 586.6666667."
    assert envs.tool_call("answer", "586.6666667") in env.admissible()
    observation, reward, over, _, info = env.step('{"name": "answer", "arguments": {"answer": 1760}}')
    assert (observation, reward, over, info["won"]) == ("That is your answer. You win after 3 turns.", 1.0, True, True)


@pytest.mark.parametrize("answer, gold, reward", [
    ("Velden Marsh", "Velden Marsh", 1), ("the velden  marsh.", "Velden Marsh", 1), ("Marsh Velden", "Velden Marsh", 1.0),
    ("Velden Mill", "Velden Marsh", 0.5), ("It is Velden Marsh", "Velden Marsh", 2 / 3), ("", "Velden Marsh", 0), ("?!", "Velden", 0),
    ("a b c d e f g h i j k Velden", "Velden Marsh", 0), ("Velden or Marsh of x", "Velden Marsh", 4 / 7),
    ("33", "33", 1), ("33.0", "33", 1), ("33 years", "33", 1), ("about 33, yes 33", "33", 1), ("32 or 33", "33", 0), ("-33", "33", 0),
    ("1,820", "1820", 1), ("1820", "1,820", 1), ("thirty", "33", 0), ("1820-1787", "33", 0), ("9" * 900, "33", 0), ("x33", "33", 0),
    ("Yes.", "yes", 1), ("Yes, it is", "yes", 1), ("no", "yes", 0), ("yes and no", "yes", 0), ("maybe", "no", 0), ("No", "no", 1),
    ("\ud800", "Velden", 0), ("", "", 1), ("the", "a", 1), ("velden", "VELDEN", 1),
])
def test_rule_reward(answer, gold, reward):
    assert envs.rule_reward(answer, gold) == pytest.approx(reward)


@pytest.mark.parametrize("expression, result", [
    ("1875 - 1820", "55"), ("2+3*4", "14"), ("(2+3)*4", "20"), ("-3 ** 2", "-9"), ("7 // 2", "3"), ("7 % 4", "3"), ("7 / 2", "3.5"),
    ("2 ** 0.5", "1.414213562"), ("1e3", "1000"), ("--4", "4"), ("+5", "5"), ("1 / 3", "0.3333333333"), ("0.1 + 0.2", "0.3"),
    ("2 ** -1", "0.5"), (" 8 ", "8"), ("-0.0", "0"), ("1e15", "1000000000000000"),
    ("-" * 190 + "1", "1"),
])
def test_calculate(expression, result):
    assert envs.calculate(expression) == (f"The result is {result}.", True)


@pytest.mark.parametrize("expression, words", [
    ("9**9**9", "too large"), ("(" * 10_000 + "1" + ")" * 10_000, "too long"), ("1e308*10", "too large"), ("1" * 100_000, "too long"),
    ("1/0", "zero"), ("1 % 0", "zero"), ("0 ** -1", "zero"), ("1e999", "too large"), ("9" * 190, "too large"), ("(-8) ** 0.5", "cannot be"),
    ("__import__('os')", "only numbers"), ("a.b", "only numbers"), ("'a' * 9", "only numbers"), ("1 if 1 else 2", "only numbers"),
    ("1_000", "only numbers"), ("0x10", "only numbers"), ("1j", "only numbers"), ("1 < 2", "only numbers"), ("~1", "only numbers"),
    ("1(2)", "cannot be"), ("(1)(2)", "cannot be"), ("e", "cannot be"), ("e.e", "cannot be"), ("e(1)", "cannot be"), ("1 +", "cannot be"),
    ("()", "cannot be"), ("", "only numbers"), ("007", "cannot be"), ("1 2", "cannot be"), ("*1", "cannot be"), ("((1)", "cannot be"),
    ("1e10 ** 64.0", "too large"), ("2 ** 65", "too large"), ("-" * 190, "cannot be"),
    ("1\n+1", "only numbers"), ("\u0663", "only numbers"),
])
def test_calculator_limits(expression, words):
    reply, valid = envs.calculate(expression)
    assert words in reply and not valid and len(reply) < 100


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text("0123456789+-*/%(). eE", max_size=60))
def test_any_expression(text):
    reply, valid = envs.calculate(text)
    assert reply.isascii() and len(reply) < 100 and valid == reply.startswith("The result is ")


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner))
ARGUMENTS = {argument: VALUES for argument, *_ in envs.TOOLS.values()}
TOOL_CALLS = st.fixed_dictionaries({}, optional={
    "name": st.sampled_from([*envs.TOOLS]) | VALUES,
    "arguments": VALUES | st.fixed_dictionaries({}, optional=ARGUMENTS)}).map(json.dumps)
LIBRARY = make("search")
LONG_CALLS = st.sampled_from(["{", '{"a":', "[", "<tool_call>", '{"name":[', "a b "]).map(
    lambda piece: (piece * 4000)[:4000])


@settings(max_examples=400, deadline=None)
@given(st.text() | TOOL_CALLS | TOOL_CALLS.map("<tool_call>\n{}\n</tool_call>".format) | LONG_CALLS)
def test_search_garbage_never_raises(text):
    LIBRARY.reset(seed=0)
    well_formed(LIBRARY.step(text))
    assert {flaw.name for flaw in LIBRARY.flaws()} <= {*envs.FLAWS}
    LIBRARY.expert()


def test_search_tools_are_schemas_and_the_prompt_is_constant():
    env = make("search")
    system = env.system
    for seed in range(5):
        _, info = env.reset(seed=seed)
        assert env.system == system == make("search-full").system and json.loads(json.dumps(info["tools"])) == info["tools"]
    assert [tool["function"]["name"] for tool in info["tools"]] == ["search", "open", "calculate", "answer"]
    for tool in info["tools"]:
        function, parameters = tool["function"], tool["function"]["parameters"]
        assert set(tool) == {"type", "function"} and tool["type"] == "function" and set(function) == {"name", "description", "parameters"}
        assert parameters["type"] == "object" and set(parameters["properties"]) == set(parameters["required"])
        assert all(set(what) == {"type", "description"} and what["type"] == "string" for what in parameters["properties"].values())
        assert function["name"] in system and function["description"] in system
        example = call(function["name"], "Mira Velden")
        assert envs.read_call(example) == (function["name"], "Mira Velden", None)
        assert set(json.loads(example.split("\n")[1])["arguments"]) == set(parameters["required"])
    assert call("search", "Mira Velden") in system


QUESTION = quoted("In which year was the author of Velden Letters born?")


def search_steps():
    """A flawless way to the answer of QUESTION, up to it: (action, observation, valid) of each turn."""
    texts = ("Results: Velden Letters (a book); Velden Marsh (a town). 7 turns left.",
             "Velden Letters is a book. Velden Letters was written by Mira Velden. 6 turns left.",
             "Results: Mira Velden (a writer). 5 turns left.",
             "Mira Velden is a writer. Mira Velden was born in the year 1760. 4 turns left.")
    calls = [call(tool, name) for name in ("Velden Letters", "Mira Velden") for tool in ("search", "open")]
    return [(action, quoted(text), True) for action, text in zip(calls, texts)]


def answered(text):
    return (call("answer", text), "That is your answer. Any words.", True)


def test_search_evidence():
    """Every flaw by itself, and what it quotes."""
    good = [search, book, person, born] = search_steps()
    nonsense = ("nonsense", "That is not.", False)
    difference = (call("calculate", "1760 - 1"), "The result is 1759. 1 turn left.", True)
    skipped = {"skipped lookup": "Mira Velden"}
    unanswered = {"no answer": ""}
    for steps, found in [
        ([], unanswered), (good, unanswered), ([*good, answered("1760")], {}), ([*good, answered("the year 1760")], {}),
        ([search, book, answered("1760")], skipped | {"unsupported guess": "1760"}),
        ([answered("x")], {"skipped lookup": "Velden Letters", "unsupported guess": "x"}),
        ([search, book, answered("Mira Velden")], skipped), ([*good, answered("1761")], {"unsupported guess": "1761"}),
        ([search, book, search, person, born, answered("1760")],
         {"repeated call": 'search "Velden Letters"', "wrong tool": 'search "Velden Letters"'}),
        ([search, search, book], {"repeated call": 'search "Velden Letters"'} | unanswered),
        ([search, nonsense, book], {"wrong tool": "nonsense"} | unanswered),
        ([*good, nonsense, nonsense, answered("1760")], {"wrong tool": "nonsense"}),  # no valid call was repeated
        ([search, book, (call("search", "velden letters"), search[1], True)],
         {"repeated call": 'search "Velden Letters"', "wrong tool": 'search "velden letters"'} | unanswered),
        ([*good, difference, answered("1759")], {"wrong conclusion": 'You answered "1759".'}),
        ([*good, answered("Mira Velden")], {"wrong conclusion": '"Velden Letters" was written by "Mira Velden".'}),
        ([search, book, (call("open", "Nowhere"), "No.", False)], {"wrong tool": 'open "Nowhere"'} | unanswered),
    ]:
        assert envs.search_evidence(QUESTION, steps) == found
    notes = (call("open", "Mira Velden"), quoted("Mira Velden is a writer. 4 turns left."), True)
    assert envs.search_evidence(QUESTION, [search, book, person, notes, answered("1760")]) == {
        "skipped lookup": "Notes on Mira Velden", "unsupported guess": "1760"}  # the page lacks it, the notes come next
    yes = 'Was "Mira Velden" born before "Mira Velder"?'
    other = (call("open", "Mira Velder"), quoted("Mira Velder is a potter. Mira Velder was born in the year 1770. 4 turns left."), True)
    assert envs.search_evidence(yes, [born, other, answered("yes")]) == {}
    assert envs.search_evidence(yes, [born, other, answered("no")]) == {"unsupported guess": "no"}  # against what was read
    with pytest.raises(ValueError, match="not a question"):
        envs.search_evidence("What is love?", [])


def test_weak_players_have_all_flaws():
    env, seen = make("search"), set()
    players = *env.players, envs.random_player
    for seed in range(100):
        search_episode("search", players[seed % 5], seed, env=env)
        seen.update(flaw.name for flaw in env.flaws())
        assert env.gold not in env.task
    assert seen == {*envs.FLAWS}


def test_search_flaws_are_sentences_with_their_evidence():
    env = make("search")
    env.reset(seed=0)
    [unanswered] = env.flaws()
    assert unanswered == ("no answer", 0.5, "There is no answer.", "Give an answer before the turns run out.")
    env.task, env.record = QUESTION, [*search_steps()[:2], search_steps()[0], answered("1{}60")]
    assert [tuple(flaw) for flaw in env.flaws()] == [
        ("skipped lookup", 0.4, 'The page "Mira Velden" was not read.', 'Read the page "Mira Velden" before you answer.'),
        ("unsupported guess", 0.4, 'The answer "1{}60" does not come from what was read.', "Answer with what you have read."),
        ("repeated call", 0.2, 'This call was made twice: search "Velden Letters".', 'Do not repeat: search "Velden Letters".'),
        ("wrong tool", 0.2, 'This call was of no use: search "Velden Letters".', 'Do without: search "Velden Letters".')]


def advice_of(env, seed, player):
    """The advice that a player's way deserves."""
    envs.run_episode(env, player, seed, "train")
    return [flaw.advice for flaw in env.flaws()]


@pytest.mark.parametrize("name", SEARCHES)
def test_no_advice_says_the_right_answer(name):
    """It may name a call that the player made: nothing else of it contains the answer."""
    env, named, told = make(name), 0, 0
    for seed in range(400):
        for advice in advice_of(env, seed, (envs.random_player, *env.players)[seed % 2 * (1 + seed % 4)]):
            if env.gold in ("yes", "no"):
                continue
            gold, made = " ".join(envs.plain_words(env.gold)), re.match(r"Do (?:not repeat|without): (.*)\.$", advice)
            words = f" {' '.join(envs.plain_words(advice))} "
            told += 1
            named += f" {gold} " in words
            assert f" {gold} " not in words or made[1] in map(envs.call_words, [action for action, *_ in env.record]), advice
    assert told > 300 and named < 0.02 * told


def test_heeding_by_hand():
    env = make("search")
    env.task, env.record, env.listed, env.seen, env.calculated = QUESTION, search_steps()[:2], ["Velden Letters", "Velden Marsh"], [], []

    def heeded(advice):
        return [envs.call_words(action) for action in env.heeding(advice)]

    every = ['open "Velden Letters"', 'open "Velden Marsh"', 'search "Velden Letters"']
    assert sorted(heeded("")) == every == sorted(heeded("Go on like this."))
    assert heeded('Read the page "Velden Marsh" before you answer.') == ['open "Velden Marsh"']  # it is listed
    env.seen = ["Mira Velden"]
    answer = 'answer "Mira Velden"'
    assert sorted(heeded("")) == [answer, *every[:2], 'search "Mira Velden"', every[2]]
    assert heeded('Read the page "Mira Velden" before you answer.') == ['search "Mira Velden"']  # it is not listed yet
    assert heeded('Read the page "Notes on Mira Velden" before you answer.') == ['search "Mira Velden"']
    assert answer not in heeded('Read the page "Nobody Here" before you answer.')  # whatever it is, it comes before the answer
    assert answer in heeded('Read the page "Velden Letters" before you answer.')  # that has been read
    assert 'search "Velden Letters"' not in heeded('Do not repeat: search "Velden Letters".')
    assert 'open "Velden Marsh"' in heeded('Do not repeat: open "Velden Marsh".')  # it was not made yet
    assert 'open "Velden Marsh"' not in heeded('Do without: open "Velden Marsh".')
    assert sorted(heeded(" ".join(f"Do without: {made}." for made in heeded("")))) == sorted(heeded(""))  # something must be done
    for noise in 'Read the page "', 'Do not repeat: ("[', "Do without: search", "\ud800":
        assert env.heeding(noise)


@pytest.mark.parametrize("name", SEARCHES)
def test_heeding_advice_makes_a_random_player_better(name):
    """Second attempts with the same random numbers, once deaf to the advice on the first. None needs the answer."""

    def play_again(seed, advice, heeded):
        rng, done = random.Random(seed), False
        _, info = env.reset(seed=seed, options={"split": "train"})
        while not done:
            calls = env.heeding(heeded)
            assert calls and set(calls) <= set(info["admissible"])
            _, _, done, _, info = env.step(rng.choice(calls))
        page = re.search(r'Read the page "([^"]+)"', advice)
        return info["won"], bool(page) and page[1] in envs.read_record(env.record).opened

    env, wins, reads = make(name), [], []
    for seed in range(600):
        advice = " ".join(advice_of(env, seed, envs.random_player))
        (won, read), (deaf_won, deaf_read) = (play_again(seed, advice, heeded) for heeded in (advice, ""))
        wins.append(won - deaf_won)
        reads += [read - deaf_read] if "Read the page" in advice else []
    assert len(reads) > 200 and sum(reads) / len(reads) > 0.2, sum(reads) / len(reads)
    assert name != "search" or sum(wins) / len(wins) > 0.04, sum(wins) / len(wins)


@pytest.mark.parametrize("name", SEARCHES)
def test_search_players_in_order_of_skill(name):
    env = make(name)
    players = [envs.guess_player, envs.hasty_player, envs.sloppy_player, envs.expert_player]
    for split in "test", "ood":
        scores = [envs.mean_score(env, player, 200, split)[0] for player in players]
        assert scores[0] < 0.35 and 0 <= scores[1] < scores[2] < scores[3] == 1.0
    assert envs.mean_score(env, envs.random_player, 200)[0] < 0.3


# ------------------------------------------------------------------------------------------------------------- any world


class Counter(World):
    """Say "up" three times in four turns; "stop" ends it. The score comes in steps."""

    name, max_turns, splits = "counter", 4, ("train", "test", "ood")

    def begin(self, rng, split):
        self.ups, self.start = 0, rng.random()
        return "Go."

    def act(self, text):
        self.ups += text == "up"
        self.won, self.over = self.ups == 3, text == "stop"
        return ("Up." if text == "up" else "What?"), text in ("up", "stop")

    def score(self):
        return self.ups / 3


def test_ground_for_other_worlds():
    env = Counter()
    assert env.reset(seed=1, options={"split": "ood"})[0] == "Go. 4 turns left."
    assert env.step("up")[:3] == ("Up. 3 turns left.", pytest.approx(1 / 3), False)
    env.step("up")
    observation, reward, terminated, truncated, info = env.step("up")
    assert (observation, terminated, truncated) == ("Up. You win after 3 turns.", True, False)
    assert reward == pytest.approx(1 / 3) and info["score"] == 1.0 and info["admissible"] is None
    env.reset(seed=1)
    assert env.step("stop")[0] == "What? The game is over and you did not win." and env.step("up")[1:3] == (0.0, True)
    starts = {(split, seed): env.reset(seed=seed, options={"split": split}) and env.start for split in env.splits for seed in (1, 2)}
    assert len(set(starts.values())) == 6
    env.close()


@pytest.mark.parametrize("name, settings, words", [
    ("repair", {"max_turns": 0}, "max_turns"),
    ("household", {"rooms": ["attic"]}, "attic"), ("household", {"tasks": ["dance"]}, "dance"),
    ("household", {"tasks": []}, "needs a task"), ("household", {"offered": ["dance"]}, "dance"),
    ("household", {"max_turns": 0}, "max_turns"), ("household", {"objects": (0, 1)}, "objects"),
    ("household", {"receptacles": (5, 4)}, "receptacles"),
    ("household", {"rooms": ["bathroom"], "tasks": ["heat"]}, "'heat'"),
    ("search", {"kinds": {"castle": 3}}, "castle"), ("search", {"relations": ["likes"]}, "likes"),
    ("search", {"forms": ["song"]}, "song"), ("search", {"max_turns": 3}, "max_turns"),
    ("search", {"results": 1}, "results"),
    ("search", {"kinds": {"town": 5}, "hops": {"train": (2,), "test": (1,), "ood": (1,)}},
     "nothing to ask"),
    ("search", {"kinds": {"person": 16, "town": 12, "river": 800, "book": 14}}, "not enough words"),
    ("20q", {"things": ["cat", "unicorn"]}, "unicorn"), ("20q", {"things": ["cat"]}, "at least 2"),
    ("20q", {"things": ["cat", "cat"]}, "twice"), ("20q", {"properties": []}, "at least 2"),
    ("20q", {"properties": ["smelly"]}, "smelly"), ("20q", {"max_turns": 0}, "max_turns"),
    ("20q", {"max_turns": 2.5}, "max_turns"), ("20q", {"max_turns": float("nan")}, "max_turns"),
    *[(name, {"colour": "red"}, f"world '{name}': TypeError: .*colour") for name in NAMES],
])
def test_impossible_settings_are_refused(name, settings, words):
    with pytest.raises(ValueError, match=words):
        make(name, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_replay_restores_a_state_whatever_was_said(name):
    rng, valid = random.Random(7), 0
    for seed in range(150):
        env, split = make(name), rng.choice(make(name).splits)
        _, info = env.reset(seed=seed, options={"split": split})
        said, steps = [], []
        while len(said) < 10:
            text = random_string(rng)
            said.append(rng.choice(info["admissible"]) if rng.random() < 0.3 else text)
            steps.append(env.step(said[-1]))
            well_formed(steps[-1])
            info = steps[-1][4]
            valid += info["valid"]
            assert env.turns == len(said) or env.over  # every text is a turn
        cut = rng.randrange(1, 10)
        other = make(name)
        assert replay(other, seed, said[:cut], split) == steps[cut - 1]
        assert [other.step(text) for text in said[cut:]] == steps[cut:]
    assert 150 < valid < 1350
    assert replay(env, 3, []) == (env.reset(seed=3)[0], 0.0, False, False, env.info(True))


# ------------------------------------------------------------------------------------- what is read

# what chat models write -> the action in it, for worlds with one-line actions
LINES = [
    # as asked
    ("go to fridge 1", "go to fridge 1"),
    ("Action: go to fridge 1", "go to fridge 1"),
    ("  action:go to fridge 1  \n", "go to fridge 1"),
    ("ACTION: go to fridge 1", "go to fridge 1"),
    ("Action : go to fridge 1", "go to fridge 1"),
    ("Action\uff1a go to fridge 1", "go to fridge 1"),
    # reasons before it, several of them, the last one counts
    ("The mug may be cold already. I look.\nAction: go to fridge 1", "go to fridge 1"),
    ("It is closed, so I open it. Action: open fridge 1", "open fridge 1"),
    ("Action: look\nNo, better:\nAction: open fridge 1", "open fridge 1"),
    ("My last action was bad. This action: no. Next action: look", "look"),
    ("Possible actions: many.\nReaction: none.\nAction: look", "look"),
    # blank lines, explanations after it
    ("Action:\n\n\ngo to fridge 1", "go to fridge 1"),
    ("Action:\r\ngo to fridge 1\r\nBecause it is near.", "go to fridge 1"),
    ("Action: go to fridge 1\n\nThis lets me see what is inside.", "go to fridge 1"),
    ("go to fridge 1\nI hope that this helps!", "go to fridge 1"),
    # markdown around the marker
    ("**Action:** go to fridge 1", "go to fridge 1"),
    ("**Action**: go to fridge 1", "go to fridge 1"),
    ("**Action: go to fridge 1**", "go to fridge 1"),
    ("*Action:* **go to fridge 1**", "go to fridge 1"),
    ("_Action:_ go to fridge 1", "go to fridge 1"),
    ("__Action__: go to fridge 1", "go to fridge 1"),
    ("`Action: go to fridge 1`", "go to fridge 1"),
    ("`Action:` go to fridge 1", "go to fridge 1"),
    ('"Action: go to fridge 1"', "go to fridge 1"),
    ("### Action: go to fridge 1", "go to fridge 1"),
    ("### Thought\nIt is there.\n\n### Action\n\ngo to fridge 1", "go to fridge 1"),
    ("**Thought**\nIt is there.\n**Action**\n- go to fridge 1", "go to fridge 1"),
    ("- Thought: It is there.\n- Action: go to fridge 1", "go to fridge 1"),
    ("1. **Action:** go to fridge 1", "go to fridge 1"),
    # markdown around the action
    ("> go to fridge 1", "go to fridge 1"),
    ("Action: > go to fridge 1", "go to fridge 1"),
    ("Action:\n- **go to** `fridge 1`", "go to fridge 1"),
    ("Action:\n1. go to fridge 1\n2. open fridge 1", "go to fridge 1"),
    ("Action: \u2022 go to fridge 1", "go to fridge 1"),
    ('Action: "go to fridge 1".', "go to fridge 1"),
    ("Action: 'go to fridge 1'", "go to fridge 1"),
    ("Action: \u201cgo to fridge 1\u201d", "go to fridge 1"),
    ("Action:\n```\ngo to fridge 1\n```", "go to fridge 1"),
    ("Action:\n```text\n\ngo to fridge 1\n```\nDone.", "go to fridge 1"),
    ("```\nAction: go to fridge 1\n```", "go to fridge 1"),
    ("Action: ```go to fridge 1```", "go to fridge 1"),
    ("Action:\n---\ngo to fridge 1", "go to fridge 1"),
    # what is not markdown stays
    ("Action: put mug 1 in/on fridge 1", "put mug 1 in/on fridge 1"),
    ("Action: calculate 2 * 3 ** 4", "calculate 2 * 3 ** 4"),
    ("Action: -5", "-5"),
    ("Action: >", ">"),
    ("Action: 1.", "1."),
    ('Action: say "yes" or "no"', 'say "yes" or "no"'),
    # nothing in it, or nothing that a world understands
    ("", ""),
    (" \n\t", ""),
    ("Action:", ""),
    ("Action: go to fridge 1\nAction:", ""),  # cut off
    ("```\n```", ""),
    ("I wonder where the mug is.", "I wonder where the mug is."),
    ("I wonder.\ngo to fridge 1", "I wonder."),
    ("Action go to fridge 1", "Action go to fridge 1"),
    ("Action: go to fridge 1 (to look)", "go to fridge 1 (to look)"),
    ("<think>Perhaps.", "<think>Perhaps."),  # thoughts are the caller's
]
# the same for worlds whose action is all that is said
WHOLE = [
    ("Is it alive?", "Is it alive?"),
    ("**Is it alive?**\n", "Is it alive?"),
    ("Action: Is it alive?", "Is it alive?"),
    ("It moves, I think.\n**Action:** Is it alive?", "Is it alive?"),
    ("I know that it moves.\nIs it alive?", "I know that it moves.\nIs it alive?"),
    ("action:\n\nIt moves.\nIs it alive?", "It moves.\nIs it alive?"),
    ("### Action\n`Is it alive?`", "Is it alive?"),
    ("Action: Is it a dog?\nAction: Is it a cat?", "Is it a cat?"),
    ("", ""),
    ("Action:", ""),
]
OPEN, SEARCH = envs.tool_call("open", "Mira Velden"), envs.tool_call("search", "Mira Velden")
BARE = OPEN.split("\n")[1]
BRACES = '{"arguments": {"title": "}{"}, "name": "open"}'
# and for tools
CALLS = [
    (OPEN, OPEN),
    (OPEN.replace("\n", " "), OPEN),
    (OPEN.replace("\n", "").upper().replace(BARE.upper(), BARE), OPEN),
    (f"I open it.\n{OPEN}\nThat should help.", OPEN),
    (f"Action: {OPEN}", OPEN),
    (f"**Action:**\n\n```xml\n{OPEN}\n```", OPEN),
    (f"{SEARCH}\n{OPEN}", OPEN),
    (f"Not {SEARCH}, rather {OPEN}.", OPEN),
    (f"<tool_call>\n```json\n{BARE}\n```\n</tool_call>", OPEN),
    (f"<tool_call>\n{BARE}", OPEN),  # cut off, or ended by a stop string
    (f"<tool_call>\n{BARE}\nI wait.", OPEN),
    (f"{OPEN}\nI wrote it between <tool_call> and </tool_call>.", OPEN),
    (f'<tool_call>{SEARCH}</tool_call><tool_call>{{"name": "op',
     '<tool_call>\n{"name": "op\n</tool_call>'),
    (BARE, BARE),
    (f"  {BARE}\n", BARE),
    (f"Action: {BARE}", BARE),
    (f"```json\n{BARE}\n```", BARE),
    (f"A set {{x, and then:\n{BARE}", BARE),
    (f'{{"name": "search", "arguments": {{"query": "a"}}}} {BARE} {{"x": 1}}', BARE),
    (BRACES, BRACES),
    ('[{"name": "open", "arguments": {}}]', '{"name": "open", "arguments": {}}'),
    ("  I would search for it.\n", "I would search for it."),
    ("Action: search Mira Velden", "Action: search Mira Velden"),
    ('{"name": "open", "argu', '{"name": "open", "argu'),
    ("<tool_call></tool_call>", "<tool_call></tool_call>"),
    ("", ""),
]
TABLES = {"household": LINES, "repair": LINES, "20q": WHOLE, "search": CALLS}


@pytest.mark.parametrize("name, reply, action", [
    (name, *row) for name, rows in TABLES.items() for row in rows])
def test_the_action_in_a_reply(name, reply, action):
    env = make(name)
    assert env.read(reply) == env.read(action) == action
    _, info = env.reset(seed=0)
    assert info["action"] == ""
    one = env.step(reply)
    assert one[4]["action"] == action
    env.reset(seed=0)
    assert env.step(action) == one  # a world meets what was read and nothing else


WORDS = r"""Action: action * ** ` ``` ~~~ --- _ # > 1. " ' . go Act ion: <tool_call> </tool_call>
    </TOOL_CALL> { } \ , "name":1 {" {"name": - \" \u201d"""
PIECES = WORDS.split() + ["\n", "\r\n", "\x0b", "\u2028", " ", "- ", "> ", "1. ", "\ud800", "\x00"]
PIECES += ["\u201c", "\u201d", '"- ', "Action\n", "- Action", "```\n", BARE, OPEN, "Is it alive?"]
READERS = [make(name) for name in ("household", "20q", "search")]


@settings(max_examples=1500, deadline=None)
@given(st.text() | st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_reading_is_idempotent_and_legal_for_any_text(text):
    for env in READERS:
        action = env.read(text)
        assert env.read(action) == action
        assert len(action) <= len(text) + len("\n</tool_call>\n")
    assert "\n" not in READERS[0].read(text)
    assert envs.read_call(text) == envs.read_call(READERS[2].read(text))


def test_reading_takes_linear_time():
    """What is quadratic takes hours."""
    for env, unit, end in itertools.product(READERS, PIECES, ["", "x", "\n}"]):
        env.read((unit * 100_000)[:100_000] + end)


def test_the_prose_around_an_action_may_be_long():
    for name in NAMES:
        env = make(name)
        env.reset(seed=0)
        reply = f"{'Let me think. ' * 1000}\nAction: {env.expert()}"
        _, _, _, _, info = env.step(reply)
        assert info["valid"] and info["action"] == env.read(reply)
        observation, _, _, _, info = env.step(f"Action: {'go ' * 2000}")
        assert observation.startswith("That was too long; use at most 4000") and not info["valid"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["Action: {}", "{}", "I think.\n\n**Action:**\n{}\n"])
def test_the_expert_wins_in_every_form(name, form):
    def player(env, info, rng):
        return form.format(env.expert())

    env = make(name)
    for seed in range(10):
        result = run_episode(env, player, seed, "test")
        assert result["won"] and result["invalid"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_systems_leave_the_form_of_the_reply_open(name):
    assert not re.search(r"(?i)\breply|nothing else|think as|Action:", make(name).system)


# ------------------------------------------------------------------------------------ shown actions


@pytest.mark.parametrize("name", NAMES)
def test_shown_actions_are_understood_when_said_back(name):
    env, plain_env, rng = make(name, show_actions=True), make(name), random.Random(30)
    assert env.show_actions and not plain_env.show_actions
    for seed in range(5):
        split, said = rng.choice(env.splits), []
        observation, info = env.reset(seed=seed, options={"split": split})
        assert bare(observation) == plain_env.reset(seed=seed, options={"split": split})[0]
        while not env.over:
            told = bare(observation)
            shown = observation.removeprefix(told + envs.LISTING).split("\n")
            assert observation == told + envs.LISTING + "\n".join(shown)
            offered = info["admissible"]
            assert [env.read(line) for line in shown] == offered == list(map(env.read, offered))
            for line in rng.sample(shown, min(len(shown), 8)):
                twin = make(name)
                assert replay(twin, seed, [*said, line], split)[4]["valid"]
            said.append(rng.choice(shown))
            observation, *rest, info = env.step(said[-1])
            assert (bare(observation), *rest, info) == plain_env.step(said[-1])
        assert bare(observation) == observation and env.step("look")[0] == observation


def test_bare_leaves_other_texts_alone():
    assert bare("Nothing. 3 turns left.") == "Nothing. 3 turns left." and bare("") == ""


@pytest.mark.parametrize("name", [*NAMES, "twenty_questions:listed"])
def test_our_worlds_keep_the_contract(name):
    assert envs.check(name) == []  # what it finds in broken ones: test_worlds.py


# ---------------------------------------------------------------------------------- names of worlds

OWN = '''
from dataclasses import dataclass
import envs

@dataclass
class Note:
    text: str

class Door(envs.World):
    """Say "open"."""
    max_turns = 3

    def __init__(self, word="open"):
        self.word = word

    def begin(self, rng, split):
        return Note("A door.").text

    def act(self, text):
        self.won = text == self.word
        return "Yes." if self.won else "No.", self.won

    def expert(self):
        return self.word

class Unfinished:
    def __init__(self, key):
        pass
'''


def test_a_class_in_a_file(tmp_path):
    (tmp_path / "my.world.py").write_text(OWN)
    name = f"{tmp_path}/my.world.py:Door"
    env = make(name, show_actions=True)
    assert isinstance(env, World) and env.name == "Door" and type(env) is type(make(name))
    assert env.reset(seed=1) == ("A door. 3 turns left.", env.info(True))  # it lists nothing
    assert run_episode(env, envs.expert_player, 0)["won"]
    assert not run_episode(env, envs.random_player, 0)["won"]
    assert run_episode(make(name, word="knock"), envs.expert_player, 0)["actions"] == ["knock"]
    assert copy.deepcopy(env).reset(seed=2)[0] == "A door. 3 turns left."
    assert "my.world" not in sys.modules and "world" not in sys.modules
    result = command("play", name, "--seed", "1", stdin=b"push\n**open**\n")
    end = "> No. 2 turns left.\n> Yes. You win after 2 turns.\n"
    assert result.returncode == 0 and result.stdout.decode().endswith(end)


@pytest.mark.parametrize("text, name, words", [
    (OWN, "other.py:Door", "no file"), (OWN, "own.py:envs", "no such class"),
    (OWN, "own.py:Window", "no such class; the file has Note, Door, Unfinished"),
    (OWN, "own.py:Unfinished", "TypeError: .*missing 1 required"),
    (OWN, "own.py:", "no such class"), (OWN, "own.py", "unknown world"),
    ("", "own.py:Door", "no such class"), ("x = 1", "own.py:Door", "the file has none"),
    ("import no_such_package", "own.py:Door", "cannot be imported: ModuleNotFoundError: No module"),
    ("class Door(:\n", "own.py:Door", "SyntaxError: "),
    ("raise KeyError('a\\nb')", "own.py:Door", "KeyError: "),
    ("import sys\nsys.exit('bye')", "own.py:Door", "SystemExit: bye"),
    ("class Door:\n    def __init__(self): raise ValueError('two\\nlines')", "own.py:Door",
     "own.py:Door': two lines"),
])
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, text, name, words):
    (tmp_path / "own.py").write_text(text)
    for _ in range(2):  # a file that failed is not half there the second time
        with pytest.raises(ValueError, match=words) as error:
            make(f"{tmp_path}/{name}")
        assert "\n" not in str(error.value)


def test_files_of_worlds_and_aliases(tmp_path, monkeypatch):
    assert "twenty_questions" in envs.further_worlds()
    for alias, name in envs.ALIASES.items():
        env = make(alias)
        assert env.name == alias and type(make(name)) is type(env) and make(name).name == alias
        assert env.reset(seed=3) == make(name).reset(seed=3)
    assert type(make("20q")) is tq.TwentyQuestions  # what one imports is what is played
    assert make("twenty_questions:full", max_turns=7).max_turns == 7
    with pytest.raises(ValueError, match="no variant 'half'; it has: full"):
        make("twenty_questions:half")
    builder = "\ndef make(word='', **settings):\n    return Door(word or 'open', **settings)\n"
    (tmp_path / "door.py").write_text(OWN + builder)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "broken.py").write_text("import no_such_package")
    (tmp_path / "_private.py").write_text("")
    (tmp_path.parent / "outside.py").write_text("raise SystemExit")
    monkeypatch.setattr(envs, "FOLDER", tmp_path)
    assert envs.further_worlds() == ["broken", "door", "empty"]
    result = run_episode(make("door:knock: twice"), envs.expert_player, 0)
    assert result["actions"] == ["knock: twice"] and result["won"]
    make("door:x")
    unknown = ["_private", "", "../outside", "..", "door.py", "./door", f"{tmp_path}/door", "door/",
               "repair:x", ":", "DOOR", "\0"]
    wrong = {"empty": "no function make", "broken": "ModuleNotFoundError"}
    for name, words in (dict.fromkeys(unknown, "unknown") | wrong).items():
        with pytest.raises(ValueError, match=words) as error:
            make(name)
        assert "\n" not in str(error.value)
    monkeypatch.delitem(sys.modules, "worlds.door")
    monkeypatch.delitem(sys.modules, "worlds.empty")


def test_worlds_are_found_from_anywhere(tmp_path):
    code = "import envs; e = envs.make('20q'); e.reset(seed=1); print(e.expert())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    (tmp_path / "worlds.py").write_text("raise SystemExit('the wrong one')")
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout == "Is it made by people?\n" and not result.stderr


# ------------------------------------------------------------------------------------------------------------- bad input


def random_string(rng):
    kind = rng.randrange(8)
    if kind == 0:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(40))).decode("latin-1")
    if kind == 1:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(30)))  # lone surrogates among them
    if kind == 2:
        return "".join(rng.choice("\x00\x07\x1b\r\n\t\x7f ?.!") for _ in range(rng.randrange(30)))
    if kind == 3:
        return rng.choice(
            ["<think>", "</think", "<|im_start|>", "<action>Is it a cat?", "{", '{"action":', "```", "[[[", "%s%n", "\\"]
        ) * rng.randrange(4)
    if kind == 4:
        return rng.choice(["a", "?", "Is it a cat? ", "is it something that ", "q ", "\ud800", "\U0001f600"]) * rng.randrange(1500)
    move = rng.choice(make_moves)
    if kind == 5:
        cut = rng.randrange(len(move))
        return move[:cut] + chr(rng.randrange(0x3000)) + move[cut:]
    if kind == 6:
        return " ".join(rng.sample(move.split(), len(move.split())))
    return move


make_moves = make("20q-full").moves + [call("search", "Mira Velden"), call("calculate", "1 + 1")] * 40


@pytest.mark.parametrize("piece", [
    "a", "Is it a cat? ", "is it something that ", "tell me if ", "\n", "q "])
def test_a_turn_takes_linear_time(piece):
    """As it says: what is quadratic takes hours."""
    env = make("20q-full")
    env.reset(seed=0)
    for size in 3_999, 1_000_000:
        well_formed(env.step((piece * size)[:size]))


# ---------------------------------------------------------------------------------------------------------- command line


def command(*arguments, stdin=b""):
    return subprocess.run([sys.executable, "envs.py", *arguments], cwd=ROOT, input=stdin, capture_output=True, timeout=300)


def test_listing():
    result = command()
    assert result.returncode == 0 and not result.stderr
    rows = {line.split()[0]: line for line in result.stdout.decode().splitlines() if line}
    for name in NAMES:
        means = [float(mean) for mean in re.findall(r"(\d\.\d+) \(\d\.\d+\)", rows[name])]
        assert len(means) == 2 and means[0] < 0.5 and means[1] == 1.0  # random, expert


def test_a_person_plays_and_wins():
    env = make("20q")
    env.reset(seed=3, options={"split": "test"})
    lines = f"is it an animal\n?\nnonsense\n{env.guess(env.hidden)}\nnot read\n"
    result = command("play", "20q", "--split", "test", "--seed", "3", stdin=lines.encode())
    output = result.stdout.decode()
    assert result.returncode == 0 and not result.stderr
    assert output.startswith(env.system) and "Is it a cat?\n" in output  # the list of moves
    assert "I don't understand that question." in output and output.rstrip().endswith("You win after 3 turns.")


@pytest.mark.parametrize("stdin", [b"", b"is it alive\n", b"\xff\xfe\x00\xed\xa0\x80\n"])
def test_the_end_of_input_ends_politely(stdin):
    result = command("play", "20q-full", stdin=stdin)
    assert result.returncode == 0 and not result.stderr and result.stdout.rstrip().endswith(b"Goodbye.")


@pytest.mark.parametrize("arguments, words", [
    (["play", "chess"], "unknown world 'chess'; there are: repair, household"),
    (["play", "no/such.py:Class"], "no file"),
    (["play", "20q", "--split", "dev"], "has no split 'dev'"),
    (["play", "20q", "--seed", "x"], "--seed"), (["play"], "world"), (["dance"], "dance"), (["play", "20q", "--sp", "test"], "--sp"),
    (["--what"], "--what"), (["play", ""], "unknown world ''"), (["play", "20q", "--split", "a\nb"], "has no split"),
])
def test_bad_arguments_are_one_line_and_status_2(arguments, words):
    result = command(*arguments)
    assert result.returncode == 2 and not result.stdout
    error = result.stderr.decode()
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_no_torch_and_no_other_module_of_the_project():
    code = (
        "import sys; before = set(sys.modules); import envs\n"
        "for name in [*envs.WORLDS, *envs.ALIASES]: envs.make(name)\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded, ours = set(result.stdout.split()), {"envs", "worlds"}
    assert ours & loaded == {"envs", "worlds"} and loaded - ours <= set(sys.stdlib_module_names)


def test_how_the_game_stands_follows_the_words_on_their_line_or_on_the_next():
    world = make("repair")
    world.reset(seed=1)
    assert world.observe("It hums.") == "It hums. 5 turns left."
    assert world.observe("It hums.\n\n") == "It hums.\n\n5 turns left."


def test_an_unknown_option_of_reset_is_refused():
    with pytest.raises(ValueError, match="unknown options \\['spilt'\\]; there is split"):
        make("repair").reset(seed=1, options={"spilt": "test"})
