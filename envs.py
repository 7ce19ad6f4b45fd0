"""Text worlds with Gymnasium's signature: text in, text out, no torch.

    python envs.py                          list the worlds with random and expert scores
    python envs.py play 20q [--split test] [--seed 3]
    python envs.py play twx:coin            a game of textworld-express, where that is installed

A world is a class below `World`; `WORLDS` names them, `make(name)` builds one. The contract, for every world:

- `reset(seed=, options={"split": ...})` -> (observation, info); (split, seed) fixes the episode, splits are disjoint;
- `step(text)` -> (observation, reward, terminated, truncated, info). Any string is legal: a bad one costs a turn, sets
  `info["valid"]` to False and is answered with what was wrong;
- `info` on every call: task, admissible, valid, won, score, tools. What is hidden is never in it;
- `expert()` is the best action now, computed only when asked for.
"""

import argparse
import ast
import atexit
import collections
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
import sys
import weakref

# --------------------------------------------------------------------------------------------------------------- ground

MAX_CHARACTERS = 4000  # longer actions are refused unread, so that a turn's time is bounded whatever a model writes


class World:
    """The part that all worlds share: turns, splits, seeds, what is returned. A world writes `begin` and `act`.

    Running out of turns is a rule of the game and stands in every observation, so it ends an episode as `terminated`;
    `truncated` is left to the caller (a full context, say).
    """

    name = ""  # as in WORLDS
    system = ""  # the system prompt, used verbatim
    task = ""  # what this episode is about, in one sentence
    max_turns = 20
    splits = ("train", "test")
    tools = None
    observation = None  # the latest one

    def begin(self, rng, split):
        """Sets up an episode from a private `random.Random`; returns the opening words."""
        raise NotImplementedError

    def act(self, text):
        """One turn. Sets `self.won` (or `self.over`) when it ends the game; returns (reply, valid)."""
        raise NotImplementedError

    def admissible(self):
        """Every action the world understands now, or None when they cannot be listed."""
        return None

    def expert(self):
        """The best action now. Looks at what the player could know, never at what is hidden."""
        raise NotImplementedError

    def score(self):
        """How well it went, in [0, 1]."""
        return float(self.won)

    def closing(self):
        """What ends every observation: the turns left, or how it ended. Must not reveal the hidden answer."""
        left = self.max_turns - self.turns
        if self.won:
            return f"You win after {count(self.turns, 'turn')}."
        if self.over or left == 0:
            return "The game is over and you did not win."
        return f"{count(left, 'turn')} left."

    def reset(self, *, seed=None, options=None):
        split = (options or {}).get("split", "train")
        if split not in self.splits:
            raise ValueError(f"world {self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        if seed is None:
            seed = random.SystemRandom().getrandbits(32)
        self.turns, self.won, self.over = 0, False, False
        # a string seed is hashed with SHA-512: the same episode in every process and on every machine
        opening = self.begin(random.Random(f"{self.name} {split} {int(seed)}"), split)
        self.observation = f"{opening} {self.closing()}"
        return self.observation, self.info(valid=True)

    def step(self, action):
        if self.observation is None:
            raise RuntimeError("call reset before step")
        if self.over:  # nothing moves any more
            return self.observation, 0.0, True, False, self.info(valid=False)
        before = self.score()
        self.turns += 1
        if len(action) > MAX_CHARACTERS:
            reply, valid = f"That was too long; use at most {MAX_CHARACTERS} characters.", False
        else:
            reply, valid = self.act(action)
        self.over = self.over or self.won or self.turns >= self.max_turns
        self.observation = f"{reply} {self.closing()}"
        return self.observation, self.score() - before, self.over, False, self.info(valid)

    def info(self, valid):
        return {
            "task": self.task,
            "admissible": self.admissible(),
            "valid": valid,
            "won": self.won,
            "score": self.score(),
            "tools": self.tools,
        }

    def close(self):
        pass


def count(n, noun):
    """count(1, "turn") -> "1 turn"; plain digits, so that a word-level tokenizer meets few forms."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def replay(env, seed, actions, split="train"):
    """Restores a state: a fresh episode, then `actions`. Returns what the last call would have as a step."""
    observation, info = env.reset(seed=seed, options={"split": split})
    last = observation, 0.0, False, False, info
    for action in actions:
        last = env.step(action)
    return last


# -------------------------------------------------------------------------------------------------------------- players
# A player is a function (env, info, rng) -> action, with its own random.Random.


def random_player(env, info, rng):
    """Any admissible action, uniformly."""
    return rng.choice(info["admissible"])


def expert_player(env, info, rng):
    """What the world's expert does."""
    return env.expert()


def linear_player(env, info, rng):
    """Twenty Questions only: guesses the things one by one, in random order, and never asks."""
    return env.guess(rng.choice(env.consistent()))


def run_episode(env, player, seed, split="train"):
    """One episode: score, won, turns, invalid (turns), and what was said."""
    rng = random.Random(f"player {env.name} {split} {seed}")
    observation, info = env.reset(seed=seed, options={"split": split})
    observations, actions, invalid, done = [observation], [], 0, False
    while not done:
        actions.append(player(env, info, rng))
        observation, _, terminated, truncated, info = env.step(actions[-1])
        observations.append(observation)
        invalid += not info["valid"]
        done = terminated or truncated
    return {
        "score": info["score"],
        "won": info["won"],
        "turns": len(actions),
        "invalid": invalid,
        "actions": actions,
        "observations": observations,
    }


def mean_score(env, player, episodes, split="test", key="score"):
    """(mean, standard error) over the seeds 0 .. episodes-1, of the score or, with key="won", of success."""
    scores = [float(run_episode(env, player, seed, split)[key]) for seed in range(episodes)]
    mean = sum(scores) / episodes
    variance = sum((score - mean) ** 2 for score in scores) / max(1, episodes - 1)
    return mean, math.sqrt(variance / episodes)


# --------------------------------------------------------------------------------------- twenty questions: what is true

# key: canonical question | other ways to ask it. [a|b] stands for either. All are compared after `plain`, which drops
# case, articles, "usually" and the like, and brings "can you ... it", "is it something that ..." to one form. What is
# near ("Is it big?") or opposite ("Is it natural?") may stand here too: the host says which question he answers.
PROPERTIES = {
    "alive": "Is it alive? | is it [living|a living thing|a living being|a living creature|an organism] | does it live",
    "animal": "Is it an animal? | is it [a creature|a beast|a living animal]",
    "plant": "Is it a plant or part of a plant? | is it [a plant|part of a plant|a fruit|a vegetable]"
    " | is it a fruit or vegetable | does it [grow on a plant|come from a plant|grow on a tree|grow on trees|grow in the ground]",
    "made": "Is it made by people? | is it [man made|manmade|human made|artificial|manufactured|built by people]"
    " | is it [a man made|an artificial|a manufactured] [thing|object] | do people [make|build|manufacture] it"
    " | is it [natural|a natural thing|found in nature]",
    "food": "Is it something people eat or drink? | is it [edible|food|a food|a drink|food or drink|eaten]"
    " | is it eaten by people | do people [eat|drink|eat and drink|consume] it | can it be [eaten|eaten or drunk]",
    "fly": "Can it fly? | is it a flying [thing|object|animal] | does it fly [in|through] the air | is it able to fly",
    "water": "Does it spend much time in water? | does it live in [water|the water|the sea|the ocean] | is it aquatic"
    " | is it [found|seen] in [water|the water|the sea|the ocean]",
    "legs": "Does it have legs? | does it have [a leg|feet] | does it [stand|walk] on legs",
    "fur": "Is it covered in fur or hair? | is it [furry|hairy|covered in fur|covered in hair] | does it have [fur|fur or hair]",
    "eggs": "Does it lay eggs? | does it lay an egg | is it an egg laying animal",
    "tail": "Does it have a tail?",
    "meat": "Does it eat other animals? | does it eat [animals|meat|insects]",
    "pet": "Is it a common pet? | is it [a pet|kept as a pet|a house pet] | do people [keep|have] it as a pet",
    "climb": "Can it climb trees? | does it climb [a tree|up trees] | is it a [good|tree] climber | can it climb",
    "big": "Is it bigger than a person? | is it [bigger|larger|taller|heavier] than [a person|a human being|me|people]"
    " | is it smaller than [a person|me] | is it [big|large]",
    "huge": "Is it bigger than a house? | is it [larger|taller] than a house | is it [huge|enormous|gigantic]",
    "small": "Does it fit in a shoebox? | does it fit [into|inside] a shoebox | does it fit in a shoe box"
    " | is it [smaller than|small enough for] a [shoebox|shoe box] | is it small"
    " | is it [bigger|larger] than a [shoebox|shoe box]",
    "tiny": "Is it smaller than an egg? | is it [bigger|larger] than an egg | is it tiny",
    "metal": "Is it mostly made of metal? | is it [metal|metallic|of metal|made from metal|made of steel|made of iron]",
    "wood": "Is it mostly made of wood? | is it [wood|wooden|of wood|made from wood]",
    "cloth": "Is it mostly made of cloth? | is it [cloth|fabric|textile|of cloth|made from cloth] | is it made [of|from] fabric",
    "wheels": "Does it have wheels? | does it have a wheel | is it on wheels | does it [roll|run|drive|move] on wheels",
    "electric": "Does it use electricity? | does it [need|run on|require|work with] [electricity|power]"
    " | is it [electric|electrical|electronic|powered by electricity] | is it an [electric|electronic|electrical] [device|thing|machine]",
    "wear": "Is it something people wear? | is it [worn|clothing|clothes|a piece of clothing|wearable]"
    " | is it an item of clothing | can it be worn | do people put it on",
    "carry": "Can it carry people? | does it transport [people|a person] | is it [a vehicle|a means of transport]"
    " | is it used for [transport|transportation] | do people [ride|ride on|ride in|travel in|drive] it",
    "kitchen": "Is it usually found in a kitchen? | is it [kept|used|seen] in a kitchen | is it in a kitchen"
    " | do people [find|keep|use] it in a kitchen",
    "sweet": "Does it taste sweet? | is it sweet | does it have a sweet taste",
    "music": "Can it make music? | does it play music | is it [a musical instrument|an instrument|used to make music]"
    " | do people [play|make] music [with|on] it",
    "round": "Is it round? | is it [circular|a circle|a sphere|spherical|ball shaped|round in shape]"
    " | is it shaped like a [ball|circle] | does it have a round shape",
    "read": "Is it used for reading or writing? | is it used [for reading|for writing|to read|to write]"
    " | is it used to read or write | do people [read|read or write with|write with] it",
    "toy": "Is it a toy? | is it [a plaything|a toy for children|a childrens toy] | do [people|children|kids] play with it",
    "hot": "Does it get very hot? | is it hot | does it become hot",
    "light": "Does it give light? | does it [give off|make|emit|produce] light | does it [shine|glow] | is it [a light"
    " source|a source of light]",
    "hold": "Is it used to hold other things? | is it [a container|used for storage|used for holding things]"
    " | is it used to [hold|store|carry|contain] things | do people [put|keep|store] things in it",
    "clean": "Is it used for cleaning or washing? | is it used [for cleaning|for washing|to clean|to wash]"
    " | is it used to clean or wash | do people [clean|wash|clean things|clean or wash] with it",
    "sharp": "Is it sharp? | is it [pointed|pointy|sharp or pointed] | does it have [a blade|a sharp point]",
    "green": "Is it usually green? | is its color green | is it [green in color|colored green]",
    "yellow": "Is it usually yellow? | is its color yellow | is it [yellow in color|colored yellow]",
    "liquid": "Is it a liquid? | is it [fluid|a fluid|something liquid] | does it flow",
}

# One line per thing: what is true of it, then after "?" what the host can't tell (borderline, or "it depends"); all
# else is false. A line "* ..." gives what is true of (or unclear for) every thing below it. "(...)" is how the thing
# is said when "a" or "an" before its name would be wrong; "=" starts other names that a guess may use.
THINGS = """
* alive animal
cat: legs fur tail meat pet climb = kitty
dog: legs fur tail meat pet = puppy
rabbit: legs fur tail food pet ? small = bunny, hare
mouse: legs fur tail climb small ? meat pet
horse: legs fur tail big carry ? food = pony
cow: legs fur tail food big = bull
pig: legs tail food meat ? big fur = hog
sheep: legs fur tail food = lamb
elephant: legs tail big carry
lion: legs fur tail meat big ? climb
giraffe: legs fur tail big
monkey: legs fur tail climb ? meat
whale: water tail meat big ? food huge
chicken: legs eggs tail food meat ? fly = hen
duck: legs eggs tail food meat fly water
eagle: legs eggs tail meat fly
parrot: legs eggs tail pet fly ? climb small green
penguin: legs eggs tail meat water
turtle: legs eggs tail pet water ? meat small green = tortoise
crocodile: legs eggs tail meat water big ? food green = alligator
frog: legs eggs meat water small green ? climb food pet tiny = toad
snake: eggs meat climb ? tail pet small green
goldfish: eggs tail pet water small ? meat
salmon: eggs tail food meat water
octopus: eggs food meat water ? legs
crab: legs eggs food meat water small
snail: eggs climb small tiny ? food
butterfly: legs eggs fly small ? tiny
spider: legs eggs meat climb small tiny ? fur pet

* alive plant
tree: wood big ? green huge
rose: ? small sharp = flower
grass (grass): green ? small tiny = lawn
cactus: green sharp ? small big

* plant food kitchen ? alive
apple: sweet round small ? green
banana: sweet yellow small
grape: sweet round small tiny ? green
strawberry: sweet small tiny
watermelon: sweet round green
lemon: yellow small ? round
carrot: small ? sweet
onion: round small
cucumber: green small
peanut: small tiny
pumpkin: round ? sweet

* food kitchen
egg: small ? alive round
milk (a glass of milk): liquid small ? sweet

* made food kitchen
coffee (a cup of coffee): liquid hot small
bread (a loaf of bread): small = loaf
cake: sweet ? round
pizza: round hot
cheese (a piece of cheese): yellow small
chocolate (a bar of chocolate): sweet small = chocolate bar
cookie: sweet round small ? tiny = biscuit

*
sun (the sun): round big huge hot light yellow
moon (the moon): round big huge ? light yellow
mountain: big huge = hill
sea (the sea): liquid big huge ? water = ocean
rain (rain): liquid ? big

* made wear
coat: cloth = jacket
sock: cloth small
shoe: small
ring: metal round small tiny
glasses (a pair of glasses): read small ? metal = eyeglasses, spectacles
helmet: ? round
crown: metal round ? small

* made kitchen
knife: metal sharp small
spoon: metal small
cup: hold small ? round = mug
plate: round ? hold = dish
pot: metal hold hot ? round = saucepan, cooking pot
refrigerator: electric hold ? metal big = fridge
toaster: electric hot ? metal

* made electric
lamp: light ? hot metal
flashlight: light small ? metal = torch
television: light music = tv, tv set, television set
phone: light music read small = telephone, mobile phone, cell phone, cellphone, smartphone
computer: light music read = pc
radio: music ? small
washing machine: clean ? metal hold = washer
vacuum cleaner: clean wheels ? hold = vacuum, hoover
elevator: carry metal big = lift
house: big ? wood = home

* made carry
car: wheels electric metal big ? light = automobile
train: wheels electric metal big huge ? hold light
bicycle: wheels metal ? big = bike
skateboard: wheels wood ? toy
airplane: fly wheels tail electric metal big huge ? light = plane, aeroplane
helicopter: fly tail electric metal big ? wheels light = chopper
rocket: fly hot light electric metal big huge = spaceship
boat: water big ? wood metal electric
ship: water electric metal big huge ? hold light

* made
candle: hot light small ? round
clock: round ? electric small
soap (a bar of soap): clean small = bar of soap
towel: cloth clean
broom: clean ? wood
bucket: hold ? metal clean round = pail
wallet: hold small ? cloth = purse
backpack: hold cloth ? wear = rucksack
chair: legs wood ? kitchen
table: legs wood hold ? big kitchen = desk
bed: legs big ? wood cloth
door: wood ? big
pillow: cloth = cushion
tent: cloth big
castle: big huge
teddy bear: toy cloth legs fur ? small tail = teddy
doll: toy legs ? small
kite: toy fly ? cloth tail
ball: toy round ? small
balloon: toy round fly
piano: music legs wood big
guitar: music wood ? electric
drum: music round ? wood
trumpet: music metal
book: read small
pencil: read wood small ? sharp
saw: metal sharp
needle: metal sharp small tiny
key: metal small tiny
coin: metal round small tiny
hammer: metal small
"""


def read_table(text):
    """The table above -> ({thing: {property: "yes" | "no" | "unclear"}}, {thing: phrase}, {thing: [other names]})."""
    facts, phrases, names = {}, {}, {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("*"):
            shared_true, _, shared_unclear = line[1:].partition("?")
            continue
        head, _, rest = line.partition(":")
        rest, _, others = rest.partition("=")
        true, _, unclear = rest.partition("?")
        thing, _, phrase = head.rstrip(")").partition(" (")
        true, unclear = f"{shared_true} {true}".split(), f"{shared_unclear} {unclear}".split()
        assert set(true + unclear) <= set(PROPERTIES) and len(set(true + unclear)) == len(true + unclear), line
        facts[thing] = {key: "yes" if key in true else "unclear" if key in unclear else "no" for key in PROPERTIES}
        phrases[thing] = phrase or ("an " if thing[0] in "aeiou" else "a ") + thing
        names[thing] = [name.strip() for name in others.split(",") if name.strip()]
    return facts, phrases, names


FACTS, PHRASES, OTHER_NAMES = read_table(THINGS)
QUESTIONS = {key: ways.partition("|")[0].strip() for key, ways in PROPERTIES.items()}


def statement(key, value):
    """What the answer says of a thing: statement("fly", "no") -> "cannot fly"."""
    verb, _, rest = QUESTIONS[key].rstrip("?").partition(" it ")
    if verb == "Is":
        return ("is " if value == "yes" else "is not ") + rest
    if verb == "Can":
        return ("can " if value == "yes" else "cannot ") + rest
    if value == "no":
        return "does not " + rest
    verb, _, rest = rest.partition(" ")
    return ("has" if verb == "have" else verb + "s") + " " + rest


# --------------------------------------------------------------------------------- twenty questions: what is understood

FILLERS = set(
    "a an the some any usually mostly mainly normally often generally typically commonly really actually ever perhaps"
    " maybe also very just".split()
)
SAME_WORD = dict.fromkeys("you we i me one someone somebody human humans man person persons".split(), "people")
SAME_WORD |= dict.fromkeys("can could do did would will may might must".split(), "does")
SAME_WORD |= dict.fromkeys("was are were".split(), "is") | {"colour": "color", "coloured": "colored"}

PEOPLE = "(?:you|we|one|i|people|humans|someone|a person)"
SOMETHING = "^is it (?:something|anything|a thing|an object|one)"
REWRITES = [  # in this order, on lower-case words joined by single spaces
    (r"\b(it|that) s\b", r"\1 is"),
    (r"\b(?:kind|type|sort|form|piece|pair) of\b", ""),
    # what may stand before a question or a guess, and after it
    (r"\b(?:the|this|that|your)(?: secret| hidden)? (?:thing|object|item|answer|word)\b", "it"),
    (
        r"^(?:(?:q\d*|question|turn|number|action|answer|final answer|\d+|ok|okay|well|so|then|now|hmm|and|please"
        r"|let me ask|tell me|if|my (?:next |first |last )?question is|do you think|would you say|is it true|that) )+",
        "",
    ),
    (r" (?:please|then|or not|right|though|by any chance)$", ""),
    (r"^i (?:would |will )?(?:guess|think|say|believe|bet)(?: that)? ", ""),
    (r"^(?:my )?(?:final |next |first )?guess(?: is)?(?: that)? ", ""),
    # the order of words
    (r"^(is|are|does|do|can|could|has) (?:this|that|they|he|she)\b", r"\1 it"),
    (r"^it (is|can|could|may|might|must|has|does)\b", r"\1 it"),
    (r"^has it (?:got )?", "does it have "),
    (r"^is it (?:able to|capable of)\b", "does it"),
    # "is it something (that) you can eat" -> "does you can eat it"; "is it something that flies" -> "does it fly"
    (rf"{SOMETHING} (?:that |which )?({PEOPLE} .*)", r"does \1 it"),
    (rf"{SOMETHING} (?:that|which) is ", "is it "),
    (rf"{SOMETHING} (?:that|which) (?:can|does|will) ", "does it "),
    (rf"{SOMETHING} (?:that|which) has ", "does it have "),
    (rf"{SOMETHING} (?:that|which) (\w+)ies\b", r"does it \1y"),
    (rf"{SOMETHING} (?:that|which) (\w+)s\b", r"does it \1"),
]
REWRITES = [(re.compile(pattern), new) for pattern, new in REWRITES]


@functools.lru_cache(maxsize=4096)
def plain(text):
    """One form for the many ways to say the same: "Q3: Could you eat it, please?" -> "does people eat it"."""
    text = " ".join(re.findall(r"[a-z0-9]+", text.lower()))
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = " ".join(SAME_WORD.get(word, word) for word in text.split() if word not in FILLERS)
    return text.replace("people does ", "people ")  # "does people does eat it"


def expand(ways):
    """ "is it [big|large] | is it huge" -> every single way."""
    for way in ways.split(" | "):
        parts = [part.strip("[]").split("|") for part in re.findall(r"\[[^]]*\]|[^\[]+", way)]
        yield from map("".join, itertools.product(*parts))


# plain words -> ("ask", property) or ("guess", thing)
UNDERSTOOD = {plain(way): ("ask", key) for key, ways in PROPERTIES.items() for way in expand(ways)}
UNDERSTOOD |= {plain(f"is it {name}"): ("guess", thing) for thing in FACTS for name in [thing, PHRASES[thing], *OTHER_NAMES[thing]]}


def understand(text):
    """What a player's words mean: ("ask", property), ("guess", thing), ("several", None) or (None, None).

    The whole text is tried first, then its sentences (those with a question mark, if any): a player may think aloud
    before asking, but asks one thing a turn.
    """
    sentences = re.split(r"(?<=[.?!\n])", text)
    questions = [sentence for sentence in sentences if "?" in sentence]
    for parts in [text], questions or sentences:
        moves = set()
        for form in map(plain, parts):
            # "cat" alone is a guess; "could it be a cat" comes here as "does it be cat"
            forms = form, f"is it {form}", form.replace("does it be ", "is it ")
            moves.add(next((UNDERSTOOD[form] for form in forms if form in UNDERSTOOD), None))
        moves.discard(None)
        if moves:
            return moves.pop() if len(moves) == 1 else ("several", None)
    return None, None


# ------------------------------------------------------------------------------------------- twenty questions: the game


class TwentyQuestions(World):
    """The host has one everyday thing in mind; the player asks yes/no questions and guesses. 1 for the thing, else 0.

    This is the small world: 24 things, 12 properties, and 8 turns, in which the best-split expert always wins;
    `TwentyQuestionsFull` has the whole table. What `train` hides `test` never hides, and the tally counts both, as the
    player cannot know the split.
    """

    name = "20q"
    max_turns = 8
    things = (
        "cat", "cow", "lion", "duck", "eagle", "goldfish", "butterfly", "spider", "tree", "apple", "carrot", "pizza",
        "cheese", "coat", "sock", "ring", "knife", "lamp", "car", "chair", "piano", "key", "coin", "drum",
    )  # fmt: skip
    properties = (
        "animal", "made", "food", "legs", "eggs", "fly", "big", "small", "metal", "round", "kitchen", "wear",
    )  # fmt: skip
    task = "Find the hidden thing with yes/no questions and guesses."

    def __init__(self, things=None, properties=None, max_turns=None, tally=True):
        """Subsets of the table, the number of turns, and whether the host says how many things are still possible."""
        self.things = tuple(self.things if things is None else things)
        self.properties = tuple(self.properties if properties is None else properties)
        self.max_turns = self.max_turns if max_turns is None else max_turns
        self.tally = tally
        for kind, chosen, known in ("thing", self.things, FACTS), ("property", self.properties, QUESTIONS):
            unknown = [name for name in chosen if name not in known]
            if unknown:
                raise ValueError(f"no such {kind} in the table: {unknown[0]!r}")
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"a {kind} is listed twice")
        if len(self.things) < 2 or not self.properties:
            raise ValueError("Twenty Questions needs at least 2 things and 1 property")
        if not isinstance(self.max_turns, int) or self.max_turns < 1:
            raise ValueError(f"max_turns must be a positive whole number, not {self.max_turns!r}")
        # a quarter of the things is kept for test; a hash puts them in an order that has nothing to do with the table's
        mixed = sorted(self.things, key=lambda thing: hashlib.sha256(thing.encode()).digest())
        held_out = max(1, len(mixed) // 4)
        self.hidden_in = {"test": sorted(mixed[:held_out]), "train": sorted(mixed[held_out:])}
        # the list never changes during a game: what is offered says nothing about the answer
        self.moves = [QUESTIONS[key] for key in self.properties] + [self.guess(thing) for thing in self.things]
        self.system = (
            f"You are playing Twenty Questions. I am thinking of one of {len(self.things)} everyday things, and you"
            f" have {count(self.max_turns, 'turn')} to find out which. Each turn, ask one yes/no question about it, such as"
            f' "{QUESTIONS[self.properties[0]]}", or guess it, such as "{self.guess(self.things[0])}". You win when you'
            " guess it. Reply with one short question and nothing else."
        )

    def guess(self, thing):
        return f"Is it {PHRASES[thing]}?"

    def admissible(self):
        return list(self.moves)

    # -- the host

    def begin(self, rng, split):
        self.hidden = rng.choice(self.hidden_in[split])
        self.possible = list(self.things)
        return f"I am thinking of one of {len(self.things)} things."

    def closing(self):
        if self.won or not self.tally:
            return super().closing()
        possible = len(self.possible)
        return f"{count(possible, 'thing')} {'is' if possible == 1 else 'are'} still possible. {super().closing()}"

    def act(self, text):
        kind, what = understand(text)
        if kind == "ask" and what in self.properties:
            value = FACTS[self.hidden][what]
            # "I can't tell" rules out what can be told, so that the tally is exactly what the dialogue allows
            self.possible = [thing for thing in self.possible if FACTS[thing][what] == value]
            reply = {"yes": "Yes.", "no": "No.", "unclear": "I can't tell."}[value]
            question = QUESTIONS[what]
            return (reply if plain(text) == plain(question) else f"{reply} (You asked: {question})"), True
        if kind == "guess" and what in self.things:
            if what == self.hidden:
                self.won, self.possible = True, [what]
                return f"Yes, it is {PHRASES[what]}!", True
            self.possible = [thing for thing in self.possible if thing != what]
            return f"No, it is not {PHRASES[what]}.", True
        if kind == "ask":
            return "I don't answer that question in this game.", False
        if kind == "guess":
            return f"{PHRASES[what].capitalize()} is not one of my {len(self.things)} things.", False
        if kind == "several":
            return "Please ask one question at a time.", False
        if not text.strip():
            return "You did not say anything.", False
        return "I don't understand that question.", False

    # -- what a player can work out

    def consistent(self):
        """The things that the dialogue so far allows. For simulators; never part of a prompt."""
        return list(self.possible)

    def resample(self, rng):
        """Puts any consistent thing in the hidden one's place, uniformly: the dialogue would have been the same."""
        self.hidden = rng.choice(self.possible)

    def best_move(self, possible, turns_left):
        """("ask", property) with the most even split, or ("guess", thing) for the last turn or two candidates."""
        if turns_left > 1 and len(possible) > 2:
            splits = {key: self.split(possible, key) for key in self.properties}
            # the expected number of candidates left is the sum of squares / n; ties go to the first property
            key = min(splits, key=lambda key: sum(len(part) ** 2 for part in splits[key].values()))
            if len(splits[key]) > 1:
                return "ask", key
        return "guess", possible[0]

    def split(self, possible, key):
        parts = {}
        for thing in possible:
            parts.setdefault(FACTS[thing][key], []).append(thing)
        return parts

    def expert(self):
        kind, what = self.best_move(self.possible, self.max_turns - self.turns)
        return QUESTIONS[what] if kind == "ask" else self.guess(what)

    def facts(self):
        """What is true in this world, as sentences: "A cat is alive." "A cat cannot fly." For a corpus of facts."""
        sentences = []
        for thing, key in itertools.product(self.things, self.properties):
            value, subject = FACTS[thing][key], PHRASES[thing]
            if value == "unclear":
                sentences.append(f"I can't tell whether {subject} {statement(key, 'yes')}.")
            else:
                sentences.append(f"{subject[0].upper()}{subject[1:]} {statement(key, value)}.")
        return sentences


class TwentyQuestionsFull(TwentyQuestions):
    """The whole table, 20 turns."""

    name = "20q-full"
    max_turns = 20
    things = tuple(FACTS)
    properties = tuple(QUESTIONS)


def expert_success(env, split=None):
    """The best-split expert's exact chance to win, by walking its decision tree: no sampling.

    Over all things of the world, or over those that `split` can hide. It is the optimum where it is 1.
    """
    counted = set(env.things if split is None else env.hidden_in[split])

    def wins(possible, turns_left):
        if not turns_left or not counted.intersection(possible):
            return 0
        kind, what = env.best_move(possible, turns_left)
        if kind == "ask":
            return sum(wins(part, turns_left - 1) for part in env.split(possible, what).values())
        return (what in counted) + wins([thing for thing in possible if thing != what], turns_left - 1)

    return wins(list(env.things), env.max_turns) / len(counted)


# --------------------------------------------------------------------------------------------------------- repair shop


class RepairShop(World):
    """Diagnose, then repair: a test that fits the symptom shows the fault, and each fault has one repair.

    The smallest world in which acting early costs the episode: the first repair is the last. Whoever guesses from the symptom alone
    is right one time in three, whoever tests first is always right, a random player wins one episode in six. No rule of it stands in
    the prompt: a large model has common sense, a tiny one must find out. Customers and devices meet in `test` in combinations that
    `train` never shows.
    """

    name = "repair"
    max_turns = 5
    customers = "Ada Ben Cleo Dina Emil Fay Gus Hana Ivan Jane Kai Lena".split()
    colours = "red blue green black white yellow".split()
    devices = "radio kettle clock toaster drill mixer fan heater".split()
    # symptom: the test that tells, then what it may find, and the repair of that
    faults = {
        "does not start": ("check the power", {
            "The battery is empty.": "charge the battery", "The cable is broken.": "solder the cable",
            "The fuse is burnt.": "swap the fuse"}),
        "is too loud": ("open the case", {
            "The gears are dusty.": "clean the gears", "A screw is loose.": "tighten the screw",
            "The belt is worn.": "renew the belt"}),
    }
    tests = tuple(test for test, _ in faults.values())
    repairs = tuple(repair for _, findings in faults.values() for repair in findings.values())
    task = "Repair the device."
    system = (
        "You run a repair shop. Every device that comes in has one fault.\n"
        "Find the fault with a test, then repair it. The first repair is the last one: if it is wrong, the customer is lost.\n"
        f"The tests: {', '.join(tests)}.\nThe repairs: {', '.join(repairs)}."
    )

    def __init__(self, max_turns=None):
        if max_turns is not None:
            if max_turns < 1:
                raise ValueError(f"max_turns must be at least 1, not {max_turns}")
            self.max_turns = max_turns

    def admissible(self):
        return [*self.tests, *self.repairs]

    def begin(self, rng, split):
        while True:  # a fifth of the combinations is kept for the test split
            customer, colour, device = rng.choice(self.customers), rng.choice(self.colours), rng.choice(self.devices)
            held_out = hashlib.sha256(f"{customer} {colour} {device}".encode()).digest()[0] % 5 == 0
            if held_out == (split == "test"):
                break
        self.symptom = rng.choice(list(self.faults))
        self.found = False
        self.resample(rng)
        return f"{customer} brings a {colour} {device} that {self.symptom}."

    def resample(self, rng):
        """Puts another fault that fits the dialogue in place, for simulators that must not know the real one."""
        if not self.found:
            self.finding = rng.choice(list(self.faults[self.symptom][1]))

    def act(self, text):
        action = text.strip().rstrip(".").lower()
        test, findings = self.faults[self.symptom]
        if action == test:
            self.found = True
            return self.finding, True
        if action in self.tests:
            return "Nothing unusual.", True
        if action in self.repairs:
            self.over, self.won = True, action == findings[self.finding]
            return ("It works again." if self.won else "It is still broken."), True
        return "That is neither a test nor a repair of this shop.", False

    def expert(self):
        test, findings = self.faults[self.symptom]
        return findings[self.finding] if self.found else test


# ----------------------------------------------------------------------------------------------------------- household

# what belongs where, by kind; things start only where they belong
ROOMS = {
    "kitchen": {
        "countertop": "food dish tool", "diningtable": "food dish tool", "cabinet": "dish tool", "drawer": "tool", "shelf": "dish",
        "sinkbasin": "dish tool", "garbagecan": "food", "fridge": "food dish", "microwave": "food dish"},
    "bathroom": {
        "countertop": "wash bottle", "cabinet": "wash bottle", "drawer": "wash", "shelf": "wash bottle", "sinkbasin": "wash",
        "bathtub": "wash bottle", "toilet": "bottle", "garbagecan": "bottle"},
    "bedroom": {
        "bed": "paper large", "desk": "paper small large lamp", "dresser": "small large lamp", "drawer": "paper small",
        "sidetable": "paper small lamp", "shelf": "paper large", "safe": "small", "garbagecan": "paper"},
    "living room": {
        "sofa": "paper large", "armchair": "paper small", "coffeetable": "paper small large", "sidetable": "paper small lamp",
        "tvstand": "small large lamp", "cabinet": "large", "drawer": "paper small", "safe": "small", "garbagecan": "paper"},
}  # fmt: skip
KINDS = {
    "food": "apple potato tomato egg", "dish": "mug cup plate bowl", "tool": "fork spoon spatula ladle",
    "wash": "brush sponge towel soapbar", "bottle": "soapbottle spraybottle candle toiletroll", "paper": "book newspaper pencil pen",
    "small": "watch creditcard keychain cellphone", "large": "laptop pillow box statue", "lamp": "desklamp"}  # fmt: skip
KIND = {thing: kind for kind, things in KINDS.items() for thing in things.split()}
MANY = "countertop cabinet drawer shelf sidetable".split()  # a room may have several of these
CLOSED = "cabinet drawer fridge microwave safe".split()  # must be opened first
HOLLOW = [*CLOSED, "sinkbasin", "garbagecan", "bathtub"]  # things are in these, and on all others
LAMP = "desklamp 1"
TASKS = ("place", "clean", "heat", "cool", "light", "two")
# verb: where, what it makes of a thing, for which kinds
TREATMENTS = {"clean": ("sinkbasin", "clean", "food dish tool wash"), "heat": ("microwave", "hot", "food dish"),
              "cool": ("fridge", "cool", "food dish")}  # fmt: skip


def word(name):
    """word("mug 1") -> "mug"."""
    return name.split()[0]


def numbered(words):
    """numbered(["mug", "cup", "mug"]) -> ["cup 1", "mug 1", "mug 2"]."""
    return [f"{name} {i + 1}" for name in sorted(set(words)) for i in range(words.count(name))]


def with_article(name):
    """with_article("apple 1") -> "an apple 1"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def listed(names):
    """listed(["apple 1", "cup 1", "mug 1"]) -> "an apple 1, a cup 1 and a mug 1"."""
    *first, last = map(with_article, names) if names else ["nothing"]
    return f"{', '.join(first)} and {last}" if first else last


@functools.lru_cache(maxsize=None)
def belongs(thing, place, room):
    """Whether a thing of this name may be found at a place of this name."""
    return KIND[word(thing)] in ROOMS[room][word(place)].split()


def share(text, parts):
    """A number below `parts` that depends on nothing but the text."""
    return hashlib.sha256(text.encode()).digest()[0] % parts


@functools.lru_cache
def household_episodes(rooms, receptacles, copies, tasks):
    """{(split, task): [(room, layout, object, target), ...]}: what an episode can be about, each at most once, in one split.

    A layout is a room with its receptacles; each room has a pool of up to 96, fixed by its name and the sizes, and every fourth of it
    is kept for ood. So is a quarter of the pairings of an object with a target: ood has the layouts *and* pairings that were kept,
    train and test have the others, and what mixes the two is not played. Train and test share layouts and pairings, but no combination.
    """
    episodes = {(split, task): [] for split in Household.splits for task in tasks}
    for room in rooms:
        rng, supply, layouts = random.Random(f"layouts of the {room}"), [], {}
        for place in ROOMS[room]:
            supply += [place] * (copies if place in MANY else 1)
        for _ in range(400):
            layouts[tuple(numbered(rng.sample(supply, min(rng.randint(*receptacles), len(supply)))))] = None
        targets = [*ROOMS[room], "desklamp"]
        pairings = [pair for pair in itertools.product(KIND, targets) if pair[1] == "desklamp" or belongs(*pair, room)]
        kept = {pair for pair in pairings if share(" ".join(pair), 4) == 0}
        for i, layout in enumerate(list(layouts)[:96]):
            present = {word(place) for place in layout}
            lit = any(belongs("desklamp", place, room) for place in present)
            for thing, target in pairings:
                if ((thing, target) in kept) != (i % 4 == 0) or thing == "desklamp":
                    continue
                if target not in present and not (target == "desklamp" and lit):
                    continue
                if not any(belongs(thing, place, room) for place in present - {target}):  # it starts elsewhere
                    continue
                for task in dict.fromkeys(tasks):
                    appliance, _, kinds = TREATMENTS.get(task, (None, None, KIND[thing]))
                    if (task == "light") != (target == "desklamp") or KIND[thing] not in kinds.split():
                        continue
                    if appliance is None or appliance in present - {target}:
                        held_out = share(f"{task} {thing} {target} {room} {layout}", 5) == 0
                        split = "ood" if i % 4 == 0 else "test" if held_out else "train"
                        episodes[split, task].append((room, layout, thing, target))
    return episodes


class Household(World):
    """A chore in a room, with ALFWorld's verbs: find a thing, perhaps clean, heat or cool it, and bring it to its place or to a lamp.

    Where things are is hidden until a place has been seen inside. `test` plays chores that `train` lacks in the same rooms; `ood` has
    sets of receptacles and pairings of object and target that neither has (see `household_episodes`), all in words that train covers.
    This is the small world; `HouseholdFull` is the full one. What makes the size stands here and can be given to the constructor.
    """

    name = "household"
    splits = ("train", "test", "ood")
    max_turns = 12
    rooms = ("kitchen", "bedroom")
    receptacles = (2, 3)  # fewest, most
    copies = 1  # most of a name, where a room may have several
    objects = (1, 2)  # fewest, most; a lamp comes on top where there is a place for it
    tasks = ("place", "place", "light", "clean", "heat", "cool")  # drawn evenly; one listed twice comes twice as often
    offered = ("go", "open", "take", "put", "clean", "heat", "cool", "use")  # verbs in `admissible`; all are understood
    task = "Do a household chore."
    system = (
        "You are in a room of a house and have one task. Each turn, reply with one action and nothing else. The actions, with O an"
        " object such as mug 1 and R a receptacle such as cabinet 2:\n"
        "go to R, open R, close R, take O from R, put O in/on R, clean O with R, heat O with R, cool O with R, use desklamp 1,"
        " examine R, examine O, look, inventory.\n"
        "You reach only what is where you are, you carry one object at a time, and what is closed must be opened. To clean, heat or cool"
        " an object, hold it at a sinkbasin, a microwave or a fridge; to examine it with the desklamp, hold it where the lamp is and use"
        " the lamp."
    )

    def __init__(self, rooms=None, receptacles=None, copies=None, objects=None, tasks=None, offered=None, max_turns=None):
        given = {"rooms": rooms, "receptacles": receptacles, "copies": copies, "objects": objects, "tasks": tasks,
                 "offered": offered, "max_turns": max_turns}  # fmt: skip
        for name, value in given.items():
            if value is not None:
                setattr(self, name, tuple(value) if isinstance(value, (list, tuple)) else value)
        verbs = HouseholdFull.offered
        for what, chosen, known in ("room", self.rooms, ROOMS), ("task", self.tasks, TASKS), ("verb", self.offered, verbs):
            unknown = [name for name in chosen if name not in known]
            if unknown or not chosen:
                raise ValueError(f"no such {what} in the household: {unknown[0]!r}" if unknown else f"household needs a {what}")
        for name, low, high in ("receptacles", *self.receptacles), ("objects", *self.objects):
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be (fewest, most), at least 1, not {(low, high)}")
        if self.copies < 1 or self.max_turns < 1:
            raise ValueError(f"copies and max_turns must be at least 1, not {self.copies} and {self.max_turns}")
        for (split, task), choices in self.episodes().items():
            if not choices:
                raise ValueError(f"these rooms and sizes leave nothing to do for task {task!r} in split {split}")

    def episodes(self):
        return household_episodes(self.rooms, self.receptacles, self.copies, self.tasks)

    # -- the room

    def begin(self, rng, split):
        self.goal = rng.choice(self.tasks)
        self.room, self.places, self.wanted, self.target = rng.choice(self.episodes()[split, self.goal])
        words = [self.wanted] * (2 if self.goal == "two" else 1)
        others = [thing for thing in KIND if thing not in (self.wanted, "desklamp") and self.homes(thing)]
        words += rng.sample(others, min(len(others), max(0, rng.randint(*self.objects) - len(words))))
        things = numbered(words + ["desklamp"] * bool(self.homes("desklamp")))
        self.at = {thing: rng.choice(self.homes(thing)) for thing in things}  # a place, or "hand"
        self.here, self.seen, self.states = None, [], []  # seen: the places whose inside is known; states: ("mug 1", "hot")
        self.closed = [place for place in self.places if word(place) in CLOSED]
        state = TREATMENTS[self.goal][1] + " " if self.goal in TREATMENTS else ""
        where = f"{'in' if self.target in HOLLOW else 'on'} {self.target}"
        plural = self.wanted + ("es" if self.wanted[-1] in "oxsh" else "s")
        self.task = {"two": f"put two {plural} {where}.", "light": f"examine the {self.wanted} with the desklamp."}.get(
            self.goal, f"put {with_article(state + self.wanted)} {where}."
        )
        return f"{self.describe_room()} Your task is to: {self.task}"

    def homes(self, thing):
        """The places of this room where a thing of this name may start: what is asked for is not yet where it should go."""
        done = self.target if word(thing) == self.wanted else None
        return [place for place in self.places if belongs(thing, place, self.room) and word(place) != done]

    def resample(self, rng):
        """Puts what was never seen elsewhere, uniformly: the dialogue would have been the same. For simulators."""
        for thing, place in self.at.items():
            if place != "hand" and place not in self.seen:
                self.at[thing] = rng.choice([home for home in self.homes(thing) if home not in self.seen])

    def held(self):
        return next((thing for thing, place in self.at.items() if place == "hand"), None)

    def inside(self, place):
        return [thing for thing, where in self.at.items() if where == place]

    def describe_room(self):
        return f"You are in a {self.room} and see {listed(self.places)}."

    def describe(self, place):
        if place in self.closed:
            return f"The {place} is closed."
        return f"{'In' if word(place) in HOLLOW else 'On'} the {place}, you see {listed(self.inside(place))}."

    def possible(self):
        """What can be done now: action -> (verb, object, place)."""
        here, held = self.here, self.held()
        actions = {"look": ("look", None, here), "inventory": ("inventory", held, here)}
        for place in self.places:
            actions[f"go to {place}"] = "go", None, place
        if held:
            actions[f"examine {held}"] = "examine", held, here
        if here is None:
            return actions
        actions[f"examine {here}"] = "look", None, here
        if word(here) in CLOSED:
            verb = "open" if here in self.closed else "close"
            actions[f"{verb} {here}"] = verb, None, here
        if held:
            for verb, (appliance, _, kinds) in TREATMENTS.items():
                if word(here) == appliance and KIND[word(held)] in kinds.split():
                    actions[f"{verb} {held} with {here}"] = verb, held, here
            if here not in self.closed:
                actions[f"put {held} in/on {here}"] = "put", held, here
        elif here not in self.closed:
            for thing, place in self.at.items():
                if place == here and thing != LAMP:
                    actions[f"take {thing} from {here}"] = "take", thing, here
        if self.at.get(LAMP) == here:
            actions[f"use {LAMP}"] = "use", LAMP, here
        return actions

    def admissible(self):
        """What can be done now, in alphabetical order; going nowhere is left out."""
        offered = {action: meaning for action, meaning in self.possible().items() if meaning[0] in self.offered}
        offered.pop(f"go to {self.here}", None)
        return sorted(offered)

    def act(self, text):
        words = [w for w in text.lower().strip("> \t\r\n.").split() if w not in ("a", "an", "the")]
        action = re.sub(r"^(?:put|move) (.+) (?:in/on|in|on|to|into|onto) (.+)$", r"put \1 in/on \2", " ".join(words))
        verb, thing, place = self.possible().get(action, (None, None, None))
        if verb is None:
            return "Nothing happens.", False
        if verb == "go":
            self.here = place
        elif verb in ("open", "close"):
            (self.closed.remove if verb == "open" else self.closed.append)(place)
        elif verb in ("take", "put"):
            self.at[thing] = "hand" if verb == "take" else place
        elif verb in TREATMENTS:  # what gets hot is no longer cool, and stays clean
            kept = [(name, state) for name, state in self.states if name != thing or (state == "clean") != (verb == "clean")]
            self.states = [*kept, (thing, TREATMENTS[verb][1])]
        if place and place not in self.closed and place not in self.seen:
            self.seen.append(place)
        if self.goal == "light":
            self.won = verb == "use" and word(self.held() or "no thing") == self.wanted
        else:
            self.won = sum(self.finished(thing) for thing in self.at) == (2 if self.goal == "two" else 1)
        return self.reply(verb, thing, place), True

    def reply(self, verb, thing, place):
        """What is said to an action that was done, in one sentence."""
        if verb in ("go", "look"):
            return self.describe(place) if place else self.describe_room()
        if verb == "open":
            return f"You open the {place} and see {listed(self.inside(place))}."
        if verb == "inventory":
            return f"You are carrying {listed([thing] if thing else [])}."
        if verb == "examine":
            states = [state for name, state in self.states if name == thing]
            return f"This is {with_article(' '.join([*states, thing]))}."
        return {
            "close": f"You close the {place}.",
            "take": f"You pick up the {thing} from the {place}.",
            "put": f"You put the {thing} in/on the {place}.",
            "use": f"You turn on the {thing}.",
        }.get(verb) or f"You {verb} the {thing} using the {place}."

    # -- what the chore needs

    def ready(self, thing):
        """Whether it is what is asked for, in the state asked for, wherever it is."""
        return word(thing) == self.wanted and (self.goal not in TREATMENTS or (thing, TREATMENTS[self.goal][1]) in self.states)

    def finished(self, thing):
        return self.ready(thing) and word(self.at[thing]) == self.target

    def expert(self):
        """Looks for the thing where it belongs, open places first, until it is seen; then the shortest way to do the chore."""
        held = self.held()
        known = {thing: place for thing, place in self.at.items() if place in self.seen}
        if held and word(held) != self.wanted:  # out of the hand
            return self.reach([self.here], f"put {held} in/on {{}}")
        if held and self.goal == "light":
            return self.reach([known[LAMP]], f"use {LAMP}") if LAMP in known else self.search("desklamp")
        if held:
            verb, place = (None, self.target) if self.ready(held) else (self.goal, TREATMENTS[self.goal][0])
            return self.reach(self.named(place), f"{verb} {held} with {{}}" if verb else f"put {held} in/on {{}}")
        candidates = [thing for thing in known if word(thing) == self.wanted and not self.finished(thing)]
        if not candidates:
            return self.search(self.wanted)
        thing = min(candidates, key=lambda thing: known[thing] != self.here)
        return self.reach([known[thing]], f"take {thing} from {{}}")

    def named(self, name):
        return [place for place in self.places if word(place) == name]

    def reach(self, places, action):
        """The next step to doing `action` at one of `places` ("{}"): go there, open it unless it is for heating and the like, do it."""
        place = min(places, key=lambda place: (place != self.here, place in self.closed))
        if place != self.here:
            return f"go to {place}"
        return f"open {place}" if place in self.closed and word(action) not in TREATMENTS else action.format(place)

    def search(self, thing):
        """The next step to seeing one more place, first where the thing may be, then what is near, then what is open."""
        homes, unseen = self.homes(thing), [place for place in self.places if place not in self.seen]
        unseen = unseen or self.places  # all is seen only after the end
        return self.reach([min(unseen, key=lambda place: (place not in homes, place != self.here, place in self.closed))], "look")


class HouseholdFull(Household):
    """All rooms, several receptacles of a kind, 30 turns."""

    name = "household-full"
    max_turns = 30
    rooms = tuple(ROOMS)
    receptacles = (6, 10)
    copies = 3
    objects = (4, 8)
    tasks = TASKS
    offered = (*Household.offered, "close", "examine", "look", "inventory")


# ---------------------------------------------------------------------------------------------------- textworld-express


class Java:
    """The one Java process behind all `twx:` worlds of this Python process. A game is an object in it, some milliseconds to make.

    It ends with the last `close()`, and with Python however that ends, SIGKILL included: it reads the pipe that Python holds.
    """

    running = None

    @classmethod
    def get(cls):
        if cls.running is None or cls.running.pid != os.getpid() or cls.running.process.poll() is not None:
            cls.running = cls()  # the first, or a forked child, which must not use its parent's sockets, or Java has died
        return cls.running

    def __init__(self):
        """ValueError, in one line, if Java is missing or does not start."""
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
        from py4j.protocol import Py4JError
        from textworld_express.constants import BASEPATH, JAR_PATH

        self.pid = os.getpid()
        if shutil.which("java") is None:
            raise ValueError("textworld-express needs Java, and there is no java on the PATH (apt install default-jre-headless, say)")
        try:
            # a process group of its own: Ctrl-C is for Python, which may want to finish its step
            port, token, self.process = launch_gateway(
                classpath=JAR_PATH, cwd=BASEPATH, die_on_exit=True, create_new_process_group=True, enable_auth=True, return_proc=True,
                javaopts=["-Xmx1g", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"])  # fmt: skip
        except (OSError, ValueError, Py4JError) as error:
            raise ValueError(f"textworld-express needs Java, and java did not start: {error}") from error
        # without memory management: what is made is kept for reuse, and no finalizer talks to Java at a time of its own choosing
        parameters = GatewayParameters(port=port, auth_token=token, auto_convert=True, enable_memory_management=False)
        self.gateway = JavaGateway(gateway_parameters=parameters)
        self.free, self.seeds, self.owners, self.worlds = {}, {}, {}, weakref.WeakSet()
        atexit.register(self.stop)

    def take(self, game, parameters):
        """A player's end of `game`, to be put back into `self.free`. ValueError for what the game does not know."""
        free = self.free.setdefault((game, parameters), [])
        if free:
            return free.pop()
        interface = self.gateway.jvm.textworldexpress.runtime.PythonInterface()
        if message := interface.load(game, parameters):
            raise ValueError(f"twx:{game}: {' '.join(message.removeprefix('ERROR: ').split())}")
        for split in "train", "dev", "test":
            if (game, split) not in self.seeds:
                self.seeds[game, split] = list(getattr(interface, f"getSeeds{split.capitalize()}")())
        return interface

    def stop(self):
        if self.pid == os.getpid():
            atexit.unregister(self.stop)
            self.gateway.close()
            self.process.kill()  # it has nothing to save
            self.process.wait()


class TextWorldExpress(World):
    """`twx:GAME`: the games of textworld-express (Jansen and Cote, 2022), if `pip install textworld-express` and Java are there.

    `twx:coin,numLocations=3,includeDoors=0` sets parameters of the game, `max_turns` among them. Splits are its folds; seeds beyond
    a fold (1000 games) begin again at its first game. What it understands is exactly the list of admissible actions, so that
    nothing else is sent to Java; capitals, spaces and a final period do not matter.
    """

    max_turns = 50
    splits = ("train", "dev", "test")
    commands = {  # what can be said, beyond "look around" and "inventory"
        "cookingworld": "read cookbook, move north, open door to west, open fridge, examine counter, take carrot, put carrot in fridge,"
        " chop carrot, slice carrot, dice carrot, cook carrot in stove (it fries; the oven roasts, the barbeque grills), prepare meal,"
        " eat meal",
        "coin": "move north, open door to west, close door to west, take coin",
        "twc": "move north, take brown sneakers, open shoe cabinet, close shoe cabinet, put brown sneakers in shoe cabinet",
        "mapreader": "task, read map, move north, take coin, put coin in box",
        "arithmetic": "take math problem, read math problem, take 12 apples, put 12 apples in box",
        "sorting": "take 12ml of water, put 12ml of water in box",
        "peckingorder": "read instructions book, take apple",
    }
    walkers = {"coin": "CoinGoldAgent", "twc": "TWCGoldAgent"}  # gold paths that differ each time they are asked for
    opposite = {"open": "close", "close": "open", "north": "south", "south": "north", "east": "west", "west": "east"}

    def __init__(self, name, max_turns=None):
        """`name` is twx:GAME or twx:GAME,PARAMETER=NUMBER,...; ValueError, in one line, if it cannot be played."""
        if not importlib.util.find_spec("textworld_express"):
            raise ValueError(f"{name!r} is played with another package: pip install textworld-express (it needs Java as well)")
        from textworld_express.constants import GAME_NAMES

        self.name, (self.game, *settings) = name, name.removeprefix("twx:").split(",")
        if self.game not in GAME_NAMES:
            raise ValueError(f"unknown game {name!r}; textworld-express has: {', '.join(f'twx:{game}' for game in GAME_NAMES)}")
        for setting in settings:
            if not re.fullmatch(r"\w+=[0-9]{1,6}", setting):  # Java would take silence for an answer
                raise ValueError(f"{name!r}: a parameter is written as numLocations=3, not {setting!r}")
        turns = [int(setting.split("=")[1]) for setting in settings if setting.startswith("max_turns=")]
        self.max_turns = max_turns if max_turns is not None else (turns or [self.max_turns])[-1]
        if not isinstance(self.max_turns, int) or self.max_turns < 1:
            raise ValueError(f"max_turns must be a positive whole number, not {self.max_turns!r}")
        self.parameters = ",".join(setting for setting in settings if not setting.startswith("max_turns="))
        says = "the command that Simon says, word for word"
        if self.game != "simonsays":
            says = f"a command such as: look around, inventory, {self.commands.get(self.game, 'move north, take coin, put coin in box')}"
        self.system = f"You are playing a text game, {self.game}. It tells you your task and what you see.\nEach turn, reply with {says}."
        self.java = self.interface = self.release = None
        self.connect()

    def connect(self):
        """Takes part in the shared Java process. Its interface goes back there with `close()` or when nothing refers to this world."""
        java = Java.get()
        java.worlds.add(self)
        if self.java is not java or self.interface is None:
            self.java, self.interface = java, java.take(self.game, self.parameters)
            self.release = weakref.finalize(self, java.free[self.game, self.parameters].append, self.interface)
            self.release.atexit = False

    def close(self):
        """The last one to close ends Java. A closed world may be reset again."""
        if self.interface is not None:
            self.release()
            self.interface = self.observation = None
            self.java.worlds.discard(self)
            if not self.java.worlds:
                self.java.stop()

    def reset(self, *, seed=None, options=None):
        self.seed = random.SystemRandom().getrandbits(32) if seed is None else int(seed)
        return super().reset(seed=self.seed, options=options)

    def begin(self, rng, split):
        self.connect()
        numbers = self.java.seeds[self.game, split]
        self.episode = numbers[self.seed % len(numbers)], split
        self.gold, self.played = None, []  # played: (action, what was possible, did it change the room)
        self.state = self.generate()
        self.task = readable(self.interface.getTaskDescription())
        return f"{self.task}\n{readable(self.state['observation'])}"

    def generate(self):
        self.java.owners[self.game, self.episode] = self.played
        return json.loads(self.interface.generateNewGameJSON(*self.episode, False), strict=False)

    def admissible(self):
        return sorted(set(self.state["validActions"]))

    def score(self):
        return min(max(float(self.state["score"]), 0.0), 1.0)  # it counts a lost game as -1

    def act(self, text):
        action = " ".join(text.lower().split()).rstrip(".")
        # names keep their capitals ("TV stand")
        action = next((known for known in self.state["validActions"] if known.lower() == action), None)
        if action is None:
            return "That is not possible here. (look around and inventory say what is.)" if self.state["look"] else "What?", False
        # a bug of 1.1.0: in sorting, all games of one seed share their objects, so that whoever made one last has them
        if self.game == "sorting" and self.java.owners[self.game, self.episode] is not self.played:
            self.generate()
            for done, *_ in self.played:
                self.interface.stepJSON(done)
        before, self.state = self.state, json.loads(self.interface.stepJSON(action), strict=False)
        self.played.append((action, before["validActions"], before["look"] != self.state["look"]))
        self.won, self.over = bool(self.state["tasksuccess"]), bool(self.state["taskfailure"])
        return readable(self.state["observation"]), True

    def gold_path(self):
        """Made by a second game. Where the package's walker draws from a clock's seed, it is called with one of this episode."""
        interface, jvm = self.java.take(self.game, self.parameters), self.java.gateway.jvm
        self.java.owners[self.game, self.episode] = None
        if self.game not in self.walkers:
            interface.generateNewGameJSON(*self.episode, True)
            path = list(interface.getGoldActionSequence())
        else:
            walker, rng, path = getattr(jvm.textworldexpress.goldagent, self.walkers[self.game]), jvm.scala.util.Random(self.episode[0]), []
            for _ in range(50):  # it may lose its way
                interface.generateNewGameJSON(*self.episode, False)
                found = walker(interface.game()).mkGoldPath(rng)
                if found.productElement(0):
                    path = list(found.productElement(1))
                    break
        self.java.free[self.game, self.parameters].append(interface)
        return path

    def expert(self):
        """The next action of the game's own gold path: that of a walker who looks around, so it wins, but not by the shortest way.

        Off the path it goes back to where it left (moves, doors, lids and what was put somewhere are undone), then on, without what
        was done early. RuntimeError when the path has nothing more to offer, or the game is over.
        """
        if self.gold is None:
            self.gold = self.gold_path()
        done, back = 0, []
        for action, possible, changed in [*self.played, ("", self.state["validActions"], False)]:
            while back and back[-1] not in possible:  # undone already, by another action
                back.pop()
            if not back:
                done = next((i for i in range(done, len(self.gold)) if self.gold[i] in possible), len(self.gold))
                if self.gold[done : done + 1] == [action]:
                    done += 1
                    continue
            verb, _, rest = action.partition(" ")
            if back and action == back[-1]:
                back.pop()
            elif changed and verb in ("open", "close"):
                back.append(f"{self.opposite[verb]} {rest}")
            elif changed and verb == "move":
                back.append(f"move {self.opposite[rest]}")
            elif changed and verb == "put":
                back.append(f"take {rest.rpartition(' in ')[0]}")
        plan = back[::-1] + self.gold[done:]
        if self.over or not plan:
            raise RuntimeError(f"{self.name}: the gold path says nothing more from here")
        return plan[0]


def readable(text):
    """Without the blanks at the ends of lines and the empty lines, and with a period at the end, as lists and recipes lack it."""
    text = "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
    return text if not text or text[-1] in ".!?" else f"{text}."


# --------------------------------------------------------------------------------------------- search: what is written

# Names have two words: a given name and a root for people ("Mira Velden"), a root and a word of its kind for all else ("Velden Marsh").
STARTS = "Vel Tor Bri Kas Lum Nor Pel Sar Dul Gan Hem Zol".split()  # a root is a start and an end: Velden, Velder, Torden
ENDS = "den der mar mer lin lan sten tan".split()
GIVEN = "Ada Oren Mira Sela Ivo Juno Karel Lida Nils Petra Rufus Tessa Anton Bela Cora Doro Enno Flora Gilda Hugo Irma Jorin".split()
ARTICLES = {  # kind: its words, what its pages are about
    "person": (None, "a writer|a sailor|a potter|a painter"),
    "town": ("Marsh Mill Ford Cross Hill Gate", "a town"),
    "river": ("Brook Water Run Beck", "a river"),
    "book": ("Letters Songs Tales Garden Mirror Winter", "a book"),
    "company": ("Works Bank Press Yard Lines Stores", "a company"),
    "instrument": ("Horn Harp Flute Bell Fiddle Pipe", "an instrument"),
}
Relation = collections.namedtuple("Relation", "subject object sentence question noun")  # noun: as a part of longer questions
RELATIONS = {
    "author": Relation("book", "person", '"{x}" was written by "{y}".', "Who wrote {x}?", "the author of {x}"),
    "birthplace": Relation("person", "town", '"{x}" was born in "{y}".', "In which town was {x} born?", "the birthplace of {x}"),
    "river": Relation("town", "river", '"{x}" lies on "{y}".', "On which river does {x} lie?", "the river through {x}"),
    "length": Relation("river", "km", '"{x}" flows for {y} km.', "How many km long is {x}?", None),
    "rival": Relation("person", "person", 'The rival of "{x}" was "{y}".', "Who was the rival of {x}?", "the rival of {x}"),
    "founder": Relation("company", "person", '"{x}" was started by "{y}".', "Who started {x}?", "the founder of {x}"),
    "seat": Relation("company", "town", '"{x}" has its seat in "{y}".', "In which town does {x} have its seat?", "the seat of {x}"),
    "inventor": Relation("instrument", "person", '"{x}" was devised by "{y}".', "Who devised {x}?", "the inventor of {x}"),
}
YEARS = {"founded": ("town", 1700), "born": ("person", 1750), "published": ("book", 1800), "opened": ("company", 1800),
         "finished": ("instrument", 1800)}  # a century and a half: a town, who is born there, what they make  # fmt: skip
RELATIONS |= {verb: Relation(kind, "year", f'"{{x}}" was {verb} in the year {{y}}.', f"In which year was {{x}} {verb}?", None)
              for verb, (kind, _) in YEARS.items()}  # fmt: skip
PAIRS = {  # questions about two numbers a and b
    ("difference", "year"): "How many years after {a} was {one} was {b} {other}?",
    ("difference", "km"): "How many km longer is {b} than {a}?",
    ("comparison", "year"): "Was {a} {one} before {b}?",
    ("comparison", "km"): "Is {b} longer than {a}?",
}


def pattern(template, **parts):
    """The regular expression that reads what `template.format` writes."""
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda field: f"(?P<{field[1]}>{parts.get(field[1], '.+')})", re.escape(template)))


NAME = r"[A-Z]\w+ [A-Z]\w+"
SENTENCE_PATTERNS = {key: pattern(relation.sentence, x=NAME, y=rf"{NAME}|\d+") for key, relation in RELATIONS.items()}
QUESTION_PATTERNS = {key: pattern(relation.question) for key, relation in RELATIONS.items()}
PAIR_PATTERNS = {key: pattern(template, one=r"\w+", other=r"\w+") for key, template in PAIRS.items()}


def write_question(form, chains):
    """chains: one or two of (name, (relation, ...)). ("chain", [("Velden Letters", ("author", "born"))]) -> "In which year was ..." """
    phrases = []
    for name, relations in chains:
        phrase = f'"{name}"'
        for key in relations[:-1]:
            phrase = RELATIONS[key].noun.format(x=phrase)
        phrases.append(phrase)
    keys = [relations[-1] for _, relations in chains]
    if form == "chain":
        return RELATIONS[keys[0]].question.format(x=phrases[0])
    return PAIRS[form, RELATIONS[keys[0]].object].format(a=phrases[0], b=phrases[1], one=keys[0], other=keys[1])


@functools.lru_cache(maxsize=4096)
def read_question(question):
    """The plan that a question spells out: (form, chains), the inverse of `write_question`."""

    def chain(phrase, last):
        relations = [last]
        while True:
            for key, relation in RELATIONS.items():
                prefix = relation.noun and relation.noun.partition("{")[0]
                if prefix and phrase.startswith(prefix):
                    phrase, relations = phrase.removeprefix(prefix), [key, *relations]
                    break
            else:
                return phrase.strip('"'), tuple(relations)

    for (form, _), shape in PAIR_PATTERNS.items():
        if match := shape.fullmatch(question):
            found = {"one": "length", **match.groupdict()}
            return form, (chain(found["a"], found["one"]), chain(found["b"], found.get("other", found["one"])))
    for key, shape in QUESTION_PATTERNS.items():
        if match := shape.fullmatch(question):
            return "chain", (chain(match["x"], key),)
    raise ValueError("not a question of this world")


def conclude(form, values):
    """What the values at the ends of the chains answer, and the calculation for it, if it takes one."""
    if form == "chain":
        return values[0], None
    a, b = map(int, values)
    return ("yes" if a < b else "no", None) if form == "comparison" else (str(b - a), f"{b} - {a}")


@functools.lru_cache(maxsize=None)
def search_names(kind, split, parts):
    """All names of a kind in a split: a sixth each for test and ood, made of words that train has in other combinations."""
    starts, ends, given = parts
    roots, (words, _) = [start + end for start in STARTS[:starts] for end in ENDS[:ends]], ARTICLES[kind]
    pairs = itertools.product(roots, words.split()) if words else itertools.product(GIVEN[:given], roots)
    every = map(" ".join, pairs)
    return [name for name in every if {0: "test", 1: "ood"}.get(share(name, 6), "train") == split]


# facts: {name: {relation: value}}, what some page says; where: {(name, relation): title}; pages: {title: (about, text)}
Encyclopedia = collections.namedtuple("Encyclopedia", "facts where pages index")


def draw_names(rng, kinds, split, parts, namesakes):
    """{kind: names}. Without `namesakes` no root and no given name comes twice; words such as Hill may."""
    if namesakes:
        return {kind: rng.sample(search_names(kind, split, parts), n) for kind, n in kinds}
    names, used = {}, set()
    for kind, n in kinds:
        every, common = search_names(kind, split, parts), set((ARTICLES[kind][0] or "").split())
        names[kind] = []
        for name in rng.sample(every, len(every)):
            if len(names[kind]) == n:
                break
            own = set(name.split()) - common
            if not own & used:
                names[kind].append(name)
                used |= own
        if len(names[kind]) < n:
            raise ValueError(f"there are not enough words for {n} names of the kind {kind!r} in split {split}")
    return names


@functools.lru_cache(maxsize=256)
def encyclopedia(split, number, kinds, relations, parts, namesakes=True, step=1):
    """An eighth of the facts stands nowhere and an eighth on a page of its own, "Notes on NAME": there the plain page is a dead end."""
    rng = random.Random(f"encyclopedia {split} {number}")
    names = draw_names(rng, kinds, split, parts, namesakes)
    book = Encyclopedia({}, {}, {}, {})
    for kind, name in ((its, name) for its in names for name in names[its]):
        about = rng.choice(ARTICLES[kind][1].split("|"))
        texts = {name: [f'"{name}" is {about}.'], f"Notes on {name}": [f'These are notes on "{name}".']}
        book.facts[name] = {}
        for key in relations:
            unit = RELATIONS[key].object
            if RELATIONS[key].subject != kind or unit not in (*names, "km", "year"):
                continue
            if unit in names:
                value = rng.choice([other for other in names[unit] if other != name])
            else:
                value = str(rng.randrange(20, 300, 10) if unit == "km" else YEARS[key][1] + rng.randrange(0, 50, step))
            place = rng.choice([None, f"Notes on {name}", *[name] * 6])
            if place:
                texts[place].append(RELATIONS[key].sentence.format(x=name, y=value))
                book.facts[name][key], book.where[name, key] = value, place
        for title, sentences in texts.items():
            if title == name or len(sentences) > 1:
                book.pages[title] = (about if title == name else "notes", " ".join(sentences))
                for word in sorted(set(plain_words(f"{title} {book.pages[title][0]}")) - {"on"}):
                    book.index.setdefault(word, []).append(title)
    return book


# ------------------------------------------------------------------------------------------- search: calls and rewards

TOOLS = {  # name: its only argument, what it is, what the tool does
    "search": ("query", "the name to look for", "Lists the titles of pages that share words with the query."),
    "open": ("title", "a title from the results of a search", "Shows a page that a search has listed."),
    "calculate": ("expression", "an expression such as 1875 - 1820", "Calculates with + - * / // % ** and parentheses."),
    "answer": ("answer", "a name, a number, yes or no", "Gives the final answer to the question and ends the game."),
}


def tool_call(name, argument):
    """The text of a call, as the chat templates of the Qwen family write it."""
    call = json.dumps({"name": name, "arguments": {TOOLS[name][0]: argument}})
    return f"<tool_call>\n{call}\n</tool_call>"


@functools.lru_cache(maxsize=4096)
def read_call(text):
    """The first call in a text, or a JSON object without the tags -> (tool, argument, None), or (None, None, what is wrong)."""
    tagged = re.search(r"<tool_call>(.*?)(?:</tool_call>|$)", text, re.DOTALL)
    body = tagged[1] if tagged else text
    if "{" not in body:
        return None, None, 'That is not a tool call. Write {"name": TOOL, "arguments": {...}} between <tool_call> and </tool_call>.'
    try:
        call = json.JSONDecoder().raw_decode(body, body.index("{"))[0]
        arguments = call.get("arguments")
        if isinstance(arguments, str):  # some models quote them
            arguments = json.loads(arguments)
    except (ValueError, RecursionError):
        return None, None, "The JSON of this tool call is broken."
    name = call.get("name")
    if not isinstance(name, str) or name not in TOOLS:
        return None, None, f"There is no such tool. The tools are {', '.join(TOOLS)}."
    argument = arguments.get(TOOLS[name][0]) if isinstance(arguments, dict) else None
    if isinstance(argument, (int, float)) and not isinstance(argument, bool):
        argument = str(argument)
    if not isinstance(argument, str) or not argument.strip():
        return None, None, f"The tool {name} needs the argument {TOOLS[name][0]}, a text."
    return name, argument.strip(), None


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.UAdd: operator.pos,
             ast.USub: operator.neg}  # fmt: skip


def calculate(expression):
    """Arithmetic -> (reply, valid). Parsed, never executed; bounded in time and memory whatever the text."""
    if len(expression) > 200 or expression.count("(") > 20:
        return "That expression is too long.", False
    if not re.fullmatch(r"[-+*/%().\deE ]+", expression, re.ASCII):
        return "A calculation has only numbers, + - * / // % ** and parentheses.", False

    def value(node):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Pow) and abs(right) > 64:
                raise OverflowError
            result = OPERATORS[type(node.op)](left, right)
        elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            result = OPERATORS[type(node.op)](value(node.operand))
        else:
            result = getattr(node, "value", None)
        if type(result) not in (int, float):  # a call, a complex root
            raise SyntaxError
        if not abs(result) <= 1e15:
            raise OverflowError
        return result

    try:
        result = value(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        return "One cannot divide by zero.", False
    except OverflowError:
        return "The numbers are too large.", False
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "That expression cannot be calculated.", False
    return f"The result is {int(result) if result == int(result) else f'{result:.10g}'}.", True


def plain_words(text):
    """Lower case, without punctuation and articles: what answers and titles are compared by."""
    return [word for word in re.findall(r"\w+", text.casefold()) if word not in ("a", "an", "the")]


def numbers_in(text):
    """The numbers in a text, as floats; "1,820" is one."""
    return [float(number) for number in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))]


def rule_reward(answer, gold):
    """The rule reward of the Reagent paper: a number by value, yes or no by match, else 1 for the same words, else their F1 from 0.3 up."""
    said, right = plain_words(answer), plain_words(gold)
    if re.fullmatch(r"-?\d[\d,]*(?:\.\d+)?", gold.strip()):
        return float(set(numbers_in(answer)) == set(numbers_in(gold)))
    if right in (["yes"], ["no"]):
        return float({"yes", "no"}.intersection(said) == set(right))
    if said == right:
        return 1.0
    f1 = 2 * sum((collections.Counter(said) & collections.Counter(right)).values()) / (len(said) + len(right))
    return f1 if f1 >= 0.3 else 0.0


# ---------------------------------------------------------------------------------- search: what a dialogue has shown

Record = collections.namedtuple("Record", "calls listed opened facts results answer vain")


def read_record(steps):
    """From (action, observation, valid) of each turn: what was called, listed, opened, read, calculated and answered."""
    record = Record([], [], [], {}, {}, [], [])  # vain: searches for an open page that list nothing new
    for action, observation, valid in steps:
        tool, argument, _ = read_call(action[:MAX_CHARACTERS]) if valid else (None, None, None)
        if tool:
            record.calls.append((tool, argument.casefold()))
        if tool == "search":
            titles = re.findall(rf'"((?:Notes on )?{NAME})" \(', observation)
            if argument.casefold() in map(str.casefold, record.opened) and set(titles) <= set(record.listed):
                record.vain.append(argument)
            record.listed.extend(titles)
        elif tool == "open":
            notes, name = re.match(rf'(These are notes on )?"({NAME})"', observation).groups()
            record.opened.append(f"Notes on {name}" if notes else name)
            for key, shape in SENTENCE_PATTERNS.items():
                record.facts.update({(match["x"], key): match["y"] for match in shape.finditer(observation)})
        elif tool == "calculate":
            record.results[argument] = re.search(r"result is (\S+)\.", observation)[1]
        elif tool == "answer":
            record.answer.append(argument)
    return record


def follow(chains, facts):
    """Along the facts read: (the values at the ends, None), or (those so far, the (name, relation) that is not known yet)."""
    values = []
    for name, relations in chains:
        for key in relations:
            if (name, key) not in facts:
                return values, (name, key)
            name = facts[name, key]
        values.append(name)
    return values, None


def search_expert(question, steps):
    """The next call, from nothing but the question and the dialogue: the shortest plan that finds what the question needs."""
    form, chains = read_question(question)
    record = read_record(steps)
    values, missing = follow(chains, record.facts)
    if missing:
        for title in (missing[0], f"Notes on {missing[0]}"):
            if title in record.listed and title not in record.opened:
                return tool_call("open", title)
        return tool_call("search", missing[0])
    answer, expression = conclude(form, values)
    return tool_call("calculate", expression) if expression and expression not in record.results else tool_call("answer", answer)


def search_thought(question, steps):
    """What the expert thinks before that call, in the words of the pages: the fact found last, and what is missing, as a blank."""
    facts, found = read_record(steps).facts, []
    for name, relations in read_question(question)[1]:
        for key in relations:
            sentence = RELATIONS[key].sentence
            if (name, key) not in facts:
                return " ".join([*found[-1:], sentence.format(x=name, y="?")])
            found.append(sentence.format(x=name, y=facts[name, key]))
            name = facts[name, key]
    return found[-1]


FLAWS = ("skipped lookup", "repeated call", "unsupported guess", "wrong conclusion", "wrong tool", "lucky answer")


def search_flaws(question, steps, won=None):
    """What went wrong on the way, by name, from the public record: (action, observation, valid) of each turn; the outcome is optional.

    skipped lookup: answered before all facts were read that the question asks for; repeated call: the same one twice; unsupported guess:
    the answer was neither shown nor calculated, nor follows from what was read; wrong conclusion: all was read, and something else follows;
    wrong tool: a call that was not valid, or a search for an open page that lists nothing new; lucky answer: right, though unsupported or
    with a lookup skipped.
    """
    form, chains = read_question(question)
    record, flaws = read_record(steps), set()
    if len(set(record.calls)) < len(record.calls):
        flaws.add("repeated call")
    if record.vain or not all(valid for *_, valid in steps):
        flaws.add("wrong tool")
    if record.answer:
        answer, (values, missing) = record.answer[0], follow(chains, record.facts)
        shown = [*record.facts.values(), *record.results.values(), *record.listed]
        if not missing:
            shown.append(conclude(form, values)[0])
        if missing:
            flaws.add("skipped lookup")
        if not any(rule_reward(answer, value) == 1 for value in shown):
            flaws.add("unsupported guess")
        elif not missing and rule_reward(answer, conclude(form, values)[0]) < 1:
            flaws.add("wrong conclusion")
        if won and flaws & {"skipped lookup", "unsupported guess"}:
            flaws.add("lucky answer")
    return [name for name in FLAWS if name in flaws]


class Search(World):
    """A question about an invented encyclopedia, answered with tool calls: search, open, calculate, answer. 1 for the right answer.

    A page tells little, so that a question takes one to three pages, each of which must be searched for by a name from the last. Many
    names look alike, and some pages lack what one opens them for: the fact then stands in the notes that the same search lists. Each
    split has encyclopedias of its own; no name of one is in another, though all are made of the words that train has, and `ood` asks
    for more hops. This is the small world; `SearchFull` is the full one. What makes the size can be given to the constructor.
    """

    name = "search"
    splits = ("train", "test", "ood")
    max_turns = 8
    kinds = {"person": 8, "town": 8, "river": 5, "book": 8}
    relations = ("author", "birthplace", "river", "born", "founded", "published")
    parts = (8, 5, 12)  # starts and ends of roots, given names
    namesakes = False  # whether names may share their root, so that a word alone does not tell them apart
    year_step = 5  # years are multiples of it
    forms = ("chain",)  # of questions with two hops or more
    hops = {"train": (1, 2), "test": (1, 2), "ood": (3,)}
    encyclopedias = {"train": 20000, "test": 200, "ood": 200}
    results = 3  # titles in an answer to a search
    tools = [
        {"type": "function", "function": {"name": name, "description": what, "parameters": {
            "type": "object", "properties": {argument: {"type": "string", "description": meaning}}, "required": [argument]}}}
        for name, (argument, meaning, what) in TOOLS.items()
    ]  # fmt: skip
    system = (
        "Answer the question from the pages of an encyclopedia. Each turn, think as long as you need, then make one tool call, such as\n"
        '<tool_call>\n{"name": "search", "arguments": {"query": "Mira Velden"}}\n</tool_call>\n'
        "The tools:\n" + "\n".join(f"{name}, with {argument} ({meaning}): {what}" for name, (argument, meaning, what) in TOOLS.items())
    )  # fmt: skip

    def __init__(self, kinds=None, relations=None, parts=None, forms=None, hops=None, encyclopedias=None, results=None, max_turns=None):
        given = {"kinds": kinds, "relations": relations, "parts": parts, "forms": forms, "hops": hops, "encyclopedias": encyclopedias,
                 "results": results, "max_turns": max_turns}  # fmt: skip
        for name, value in given.items():
            if value is not None:
                setattr(self, name, tuple(value) if isinstance(value, (list, tuple)) else value)
        forms = ("chain", "difference", "comparison")
        for what, chosen, known in ("kind", self.kinds, ARTICLES), ("relation", self.relations, RELATIONS), ("form", self.forms, forms):
            if unknown := [name for name in chosen if name not in known]:
                raise ValueError(f"search has no {what} {unknown[0]!r}")
        needed = 2 * max(hop for hops in self.hops.values() for hop in hops) + 2
        if self.max_turns < needed or self.results < 2:
            raise ValueError(f"search needs max_turns of at least {needed} and at least 2 results, not {self.max_turns} and {self.results}")
        for split in self.splits:
            self.begin(random.Random(0), split)  # sizes that leave nothing to ask are refused here

    def begin(self, rng, split):
        number = rng.randrange(self.encyclopedias[split])
        self.book = encyclopedia(split, number, tuple(self.kinds.items()), self.relations, self.parts, self.namesakes,
                                 self.year_step)
        self.reward, self.listed, self.seen, self.calculated = 0.0, [], [], []  # seen: values on pages opened
        self.record = []  # (action, reply, valid) of each turn
        hops = rng.choice(self.hops[split])
        form = rng.choice(self.forms) if hops > 1 else "chain"
        for _ in range(5000):
            if drawn := self.draw(rng, form, hops):
                self.task, self.gold = drawn
                return self.task
        raise ValueError(f"these sizes leave nothing to ask in split {split}")

    def draw(self, rng, form, hops):
        """(question, answer), or None where a random walk over the facts does not make a good one."""
        first = hops if form == "chain" else rng.randrange(1, hops)
        chains, values, visited = [], [], []
        turns = 2 * hops + 1 + (form == "difference")
        for length in [first] if form == "chain" else [first, hops - first]:
            start = value = rng.choice(list(self.book.facts))
            relations = []
            for _ in range(length):
                if not self.book.facts.get(value):
                    return None
                visited.append(value)
                relations.append(rng.choice(list(self.book.facts[value])))
                turns += self.book.where[value, relations[-1]] != value  # the notes, after a dead end
                value = self.book.facts[value][relations[-1]]
            chains.append((start, tuple(relations)))
            values.append(value)
        if len(set(visited + values)) < len(visited + values) or turns > self.max_turns:
            return None
        if form != "chain":
            one, other = chains[0][1][-1], chains[1][1][-1]
            unit = RELATIONS[one].object
            if (form, unit) not in PAIRS or unit != RELATIONS[other].object or (form == "comparison" and one != other):
                return None
            if form == "difference" and int(values[0]) > int(values[1]):
                chains, values = chains[::-1], values[::-1]
        return write_question(form, chains), conclude(form, values)[0]

    def score(self):
        return self.reward

    def admissible(self):
        """The calls that make sense after what was seen, in alphabetical order."""
        form, chains = read_question(self.task)
        names = [name for name, _ in chains] + [value for value in self.seen if not value.isdigit()]
        numbers = sorted({int(value) for value in self.seen if value.isdigit()})
        answers = ["yes", "no"] if form == "comparison" else self.seen + self.calculated
        calls = [("search", name) for name in names] + [("open", title) for title in self.listed] + [("answer", value) for value in answers]
        calls += [("calculate", f"{b} - {a}") for a, b in itertools.combinations(numbers, 2)]
        return sorted({tool_call(*call) for call in calls})

    def act(self, text):
        tool, argument, problem = read_call(text)
        reply, valid = (problem, False) if problem else getattr(self, f"call_{tool}")(argument)
        self.record.append((text, reply, valid))
        return reply, valid

    def call_search(self, query):
        shared = collections.Counter(title for word in set(plain_words(query)) for title in self.book.index.get(word, ()))
        titles = sorted(shared, key=lambda title: (-shared[title], len(title), title))[: self.results]
        self.listed += [title for title in titles if title not in self.listed]
        listing = "; ".join(f'"{title}" ({self.book.pages[title][0]})' for title in titles)
        return (f"Results: {listing}." if titles else "No page matches that."), True

    def call_open(self, title):
        title = next((known for known in self.listed if plain_words(known) == plain_words(title)), None)
        if title is None:
            return "No search has listed a page with that title.", False
        text = self.book.pages[title][1]
        self.seen += [match["y"] for shape in SENTENCE_PATTERNS.values() for match in shape.finditer(text) if match["y"] not in self.seen]
        return text, True

    def call_calculate(self, expression):
        reply, valid = calculate(expression)
        if valid:
            self.calculated.append(re.search(r"result is (\S+)\.", reply)[1])
        return reply, valid

    def call_answer(self, answer):
        self.over, self.reward = True, rule_reward(answer, self.gold)
        self.won = self.reward == 1
        return "That is your answer.", True

    def expert(self):
        return search_expert(self.task, self.record)


class SearchFull(Search):
    """Six kinds of pages, questions of one to four hops, yes or no among them, 12 turns."""

    name = "search-full"
    max_turns = 12
    kinds = {"person": 110, "town": 60, "river": 30, "book": 60, "company": 40, "instrument": 30}
    relations = tuple(RELATIONS)
    parts = (len(STARTS), len(ENDS), len(GIVEN))
    namesakes, year_step = True, 1
    forms = ("chain", "difference", "comparison")
    hops = {"train": (1, 2, 3), "test": (1, 2, 3), "ood": (4,)}
    encyclopedias = {"train": 16, "test": 4, "ood": 4}
    results = 4


def thinking_player(env, info, rng):
    """Search only: the expert, with a thought before every call."""
    return f"{search_thought(env.task, env.record)}\n{env.expert()}"


def guess_player(env, info, rng):
    """Search only: answers at once, with a value of the right kind from the encyclopedia, which it could not know: the floor."""
    form, chains = read_question(env.task)
    picks = [rng.choice([facts[relations[-1]] for facts in env.book.facts.values() if relations[-1] in facts]) for _, relations in chains]
    if form == "comparison":
        return tool_call("answer", rng.choice(["yes", "no"]))
    return tool_call("answer", picks[0] if form == "chain" else str(abs(int(picks[0]) - int(picks[1]))))


def hasty_player(env, info, rng):
    """Search only: the expert, but from the first value seen on it answers, with the last one, every other time."""
    return tool_call("answer", env.seen[-1]) if env.seen and rng.random() < 0.5 else env.expert()


def sloppy_player(env, info, rng):
    """Search only: the expert with flaws: one call in three is a repetition, a wrong tool, an early answer or a guess."""
    opened = read_record(env.record).opened
    flaw = rng.randrange(12)
    if flaw == 0 and env.record:
        return env.record[-1][0]
    if flaw == 1:
        return tool_call("search", rng.choice(opened)) if opened else tool_call("open", read_question(env.task)[1][0][0])
    if flaw == 2 and env.seen:
        return tool_call("answer", rng.choice(env.seen))
    return guess_player(env, info, rng) if flaw == 3 else env.expert()


def muddled_player(env, info, rng):
    """Search only: the expert, but the answer is anything that was read."""
    action = env.expert()
    return tool_call("answer", rng.choice(env.seen)) if read_call(action)[0] == "answer" and env.seen else action


# --------------------------------------------------------------------------------------------------------- command line

WORLDS = {"repair": RepairShop, "20q": TwentyQuestions, "20q-full": TwentyQuestionsFull, "household": Household,
          "household-full": HouseholdFull, "search": Search, "search-full": SearchFull}  # fmt: skip


def make(name, **settings):
    """A world by name; `settings` go to its constructor. `twx:GAME` is a game of textworld-express."""
    if name.startswith("twx:"):
        return TextWorldExpress(name, **settings)
    if name not in WORLDS:
        raise ValueError(f"unknown world {name!r}; there are: {', '.join(WORLDS)}, and twx:GAME with textworld-express")
    return WORLDS[name](**settings)


def list_worlds(episodes=200):
    """A line per world: the two ends of every result table, as mean and standard error over test episodes."""
    print(f"score over {episodes} test episodes: mean (standard error)")
    print(f"{'world':<16}{'turns':>6}{'random':>18}{'expert':>18}")
    for name in WORLDS:
        env = make(name)
        scores = ["%.3f (%.3f)" % mean_score(env, player, episodes) for player in (random_player, expert_player)]
        print(f"{name:<16}{env.max_turns:>6}{scores[0]:>18}{scores[1]:>18}")
    installed = "is installed" if importlib.util.find_spec("textworld_express") else "is not installed"
    print(f"textworld-express {installed}: its games are worlds named twx:GAME (twx:coin, say)")
    print("play one: python envs.py play 20q")


def play(env, split, seed, lines):
    """A person plays; `lines` is where the actions come from (standard input). Its end leaves the game."""
    observation, info = env.reset(seed=seed, options={"split": split})
    print(f"{env.system}\n(A line with ? alone lists what can be said; end of input ends the game.)\n\n{observation}")
    print("> ", end="", flush=True)
    for line in lines:
        if line.strip() == "?" and info["admissible"]:
            print("\n".join(info["admissible"]))
        else:
            observation, _, terminated, truncated, info = env.step(line)
            print(observation)
            if terminated or truncated:
                return
        print("> ", end="", flush=True)
    print("\nGoodbye.")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, exit status 2."""

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())}\n")


def main(argv=None):
    """The command line above."""
    parser = OneLineParser(description="Text worlds: list them, or play one.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command")
    player = commands.add_parser("play", help="play a world at the terminal", allow_abbrev=False)
    player.add_argument("world", help=", ".join([*WORLDS, "twx:GAME"]))
    player.add_argument("--split", default="train")
    player.add_argument("--seed", type=int, default=None, help="the episode (default: any)")
    args = parser.parse_args(argv)
    if args.command is None:
        return list_worlds()
    try:
        env = make(args.world)
        env.reset(options={"split": args.split})  # refuses an unknown split before anything is printed
    except ValueError as error:
        parser.error(str(error))
    sys.stdin.reconfigure(errors="replace")  # any bytes are a legal action
    try:
        play(env, args.split, args.seed, sys.stdin)
    except KeyboardInterrupt:
        print("\nGoodbye.")


if __name__ == "__main__":
    main()
