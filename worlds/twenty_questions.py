"""Twenty Questions: the player asks yes/no questions and guesses. Also the first example of a world
of one's own: to add another, write a file worlds/NAME.py that has, as this one does,

- a class below `envs.World` with `begin` and `act` (and `admissible`, `expert`, `score`, `read`,
  where it can do better than World does), and
- a function `make(argument="", **settings)` that builds the world. `--env NAME` calls it with "",
  `--env NAME:ARGUMENT` with what stands after the colon. It raises ValueError, in one line, for an
  argument that it does not know or for a package that is not installed.

Nothing has to be registered: `envs.make` looks into this folder. Import what is heavy in `make` or
in the class, not at the top.

    --env twenty_questions          (or 20q)       24 things, 12 properties, 8 turns
    --env twenty_questions:full     (or 20q-full)  the whole table, 20 turns
    --env twenty_questions:listed                  6 of the 24 things, named at first, 4 turns

The reply is read leniently (`understand`): a person or a model may say "Q3: could you eat it?".
"""

import functools
import hashlib
import itertools
import re

from envs import World, after_marker, count, settled

# ------------------------------------------------------------------------------------- what is true

# key: canonical question | other ways to ask it. [a|b] stands for either. All are compared after
# `plain`, which drops case, articles, "usually" and the like, and brings "can you ... it", "is it
# something that ..." to one form. What is near ("Is it big?") or opposite ("Is it natural?") may
# stand here too: the host says which question he answers.
PROPERTIES = {
    "alive": "Is it alive?"
    " | is it [living|a living thing|a living being|a living creature|an organism] | does it live",
    "animal": "Is it an animal? | is it [a creature|a beast|a living animal]",
    "plant": "Is it a plant or part of a plant?"
    " | is it [a plant|part of a plant|a fruit|a vegetable]"
    " | is it a fruit or vegetable"
    " | does it [grow on a plant|come from a plant|grow on a tree|grow on trees"
    "|grow in the ground]",
    "made": "Is it made by people?"
    " | is it [man made|manmade|human made|artificial|manufactured|built by people]"
    " | is it [a man made|an artificial|a manufactured] [thing|object]"
    " | do people [make|build|manufacture] it"
    " | is it [natural|a natural thing|found in nature]",
    "food": "Is it something people eat or drink?"
    " | is it [edible|food|a food|a drink|food or drink|eaten]"
    " | is it eaten by people | do people [eat|drink|eat and drink|consume] it"
    " | can it be [eaten|eaten or drunk]",
    "fly": "Can it fly? | is it a flying [thing|object|animal]"
    " | does it fly [in|through] the air | is it able to fly",
    "water": "Does it spend much time in water?"
    " | does it live in [water|the water|the sea|the ocean] | is it aquatic"
    " | is it [found|seen] in [water|the water|the sea|the ocean]",
    "legs": "Does it have legs? | does it have [a leg|feet] | does it [stand|walk] on legs",
    "fur": "Is it covered in fur or hair? | is it [furry|hairy|covered in fur|covered in hair]"
    " | does it have [fur|fur or hair]",
    "eggs": "Does it lay eggs? | does it lay an egg | is it an egg laying animal",
    "tail": "Does it have a tail?",
    "meat": "Does it eat other animals? | does it eat [animals|meat|insects]",
    "pet": "Is it a common pet? | is it [a pet|kept as a pet|a house pet]"
    " | do people [keep|have] it as a pet",
    "climb": "Can it climb trees? | does it climb [a tree|up trees]"
    " | is it a [good|tree] climber | can it climb",
    "big": "Is it bigger than a person?"
    " | is it [bigger|larger|taller|heavier] than [a person|a human being|me|people]"
    " | is it smaller than [a person|me] | is it [big|large]",
    "huge": "Is it bigger than a house? | is it [larger|taller] than a house"
    " | is it [huge|enormous|gigantic]",
    "small": "Does it fit in a shoebox? | does it fit [into|inside] a shoebox"
    " | does it fit in a shoe box"
    " | is it [smaller than|small enough for] a [shoebox|shoe box] | is it small"
    " | is it [bigger|larger] than a [shoebox|shoe box]",
    "tiny": "Is it smaller than an egg? | is it [bigger|larger] than an egg | is it tiny",
    "metal": "Is it mostly made of metal?"
    " | is it [metal|metallic|of metal|made from metal|made of steel|made of iron]",
    "wood": "Is it mostly made of wood? | is it [wood|wooden|of wood|made from wood]",
    "cloth": "Is it mostly made of cloth?"
    " | is it [cloth|fabric|textile|of cloth|made from cloth] | is it made [of|from] fabric",
    "wheels": "Does it have wheels? | does it have a wheel | is it on wheels"
    " | does it [roll|run|drive|move] on wheels",
    "electric": "Does it use electricity?"
    " | does it [need|run on|require|work with] [electricity|power]"
    " | is it [electric|electrical|electronic|powered by electricity]"
    " | is it an [electric|electronic|electrical] [device|thing|machine]",
    "wear": "Is it something people wear?"
    " | is it [worn|clothing|clothes|a piece of clothing|wearable]"
    " | is it an item of clothing | can it be worn | do people put it on",
    "carry": "Can it carry people? | does it transport [people|a person]"
    " | is it [a vehicle|a means of transport]"
    " | is it used for [transport|transportation]"
    " | do people [ride|ride on|ride in|travel in|drive] it",
    "kitchen": "Is it usually found in a kitchen? | is it [kept|used|seen] in a kitchen"
    " | is it in a kitchen"
    " | do people [find|keep|use] it in a kitchen",
    "sweet": "Does it taste sweet? | is it sweet | does it have a sweet taste",
    "music": "Can it make music? | does it play music"
    " | is it [a musical instrument|an instrument|used to make music]"
    " | do people [play|make] music [with|on] it",
    "round": "Is it round?"
    " | is it [circular|a circle|a sphere|spherical|ball shaped|round in shape]"
    " | is it shaped like a [ball|circle] | does it have a round shape",
    "read": "Is it used for reading or writing?"
    " | is it used [for reading|for writing|to read|to write]"
    " | is it used to read or write | do people [read|read or write with|write with] it",
    "toy": "Is it a toy? | is it [a plaything|a toy for children|a childrens toy]"
    " | do [people|children|kids] play with it",
    "hot": "Does it get very hot? | is it hot | does it become hot",
    "light": "Does it give light? | does it [give off|make|emit|produce] light"
    " | does it [shine|glow] | is it [a light"
    " source|a source of light]",
    "hold": "Is it used to hold other things?"
    " | is it [a container|used for storage|used for holding things]"
    " | is it used to [hold|store|carry|contain] things | do people [put|keep|store] things in it",
    "clean": "Is it used for cleaning or washing?"
    " | is it used [for cleaning|for washing|to clean|to wash]"
    " | is it used to clean or wash | do people [clean|wash|clean things|clean or wash] with it",
    "sharp": "Is it sharp? | is it [pointed|pointy|sharp or pointed]"
    " | does it have [a blade|a sharp point]",
    "green": "Is it usually green? | is its color green | is it [green in color|colored green]",
    "yellow": "Is it usually yellow? | is its color yellow"
    " | is it [yellow in color|colored yellow]",
    "liquid": "Is it a liquid? | is it [fluid|a fluid|something liquid] | does it flow",
}

# One line per thing: what is true of it, then after "?" what the host can't tell (borderline, or
# "it depends"); all else is false. A line "* ..." gives what is true of (or unclear for) every
# thing below it. "(...)" is how the thing is said when "a" or "an" before its name would be wrong;
# "=" starts other names that a guess may use.
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
    """The table above -> (facts, phrases, names).

    facts: {thing: {property: "yes" | "no" | "unclear"}}; names: {thing: [other names]}.
    """
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
        stated = true + unclear
        assert set(stated) <= set(PROPERTIES) and len(set(stated)) == len(stated), line
        facts[thing] = dict.fromkeys(PROPERTIES, "no")
        facts[thing] |= dict.fromkeys(true, "yes") | dict.fromkeys(unclear, "unclear")
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


# ------------------------------------------------------------------------------- what is understood

FILLERS = set(
    "a an the some any usually mostly mainly normally often generally typically commonly really"
    " actually ever perhaps maybe also very just".split()
)
PERSONS = "you we i me one someone somebody human humans man person persons"
SAME_WORD = dict.fromkeys(PERSONS.split(), "people")
SAME_WORD |= dict.fromkeys("can could do did would will may might must".split(), "does")
SAME_WORD |= dict.fromkeys("was are were".split(), "is")
SAME_WORD |= {"colour": "color", "coloured": "colored"}

PEOPLE = "(?:you|we|one|i|people|humans|someone|a person)"
SOMETHING = "^is it (?:something|anything|a thing|an object|one)"
REWRITES = [  # in this order, on lower-case words joined by single spaces
    (r"\b(it|that) s\b", r"\1 is"),
    (r"\b(?:kind|type|sort|form|piece|pair) of\b", ""),
    # what may stand before a question or a guess, and after it
    (r"\b(?:the|this|that|your)(?: secret| hidden)? (?:thing|object|item|answer|word)\b", "it"),
    (
        r"^(?:(?:q\d*|question|turn|number|action|answer|final answer|\d+|ok|okay|well|so|then|now"
        r"|hmm|and|please|let me ask|tell me|if|my (?:next |first |last )?question is|do you think"
        r"|would you say|is it true|that) )+",
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
    # "is it something (that) you can eat" -> "does you can eat it"
    # "is it something that flies" -> "does it fly"
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
    """One form for the many ways to say the same.

    "Q3: Could you eat it, please?" -> "does people eat it".
    """
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
for thing in FACTS:
    for name in [thing, PHRASES[thing], *OTHER_NAMES[thing]]:
        UNDERSTOOD[plain(f"is it {name}")] = "guess", thing


def understand(text):
    """What words mean: ("ask", property), ("guess", thing), ("several", None) or (None, None).

    The whole text is tried first, then its sentences (those with a question mark, if any): a player
    may think aloud before asking, but asks one thing a turn.
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


# ----------------------------------------------------------------------------------------- the game


WRAPPING = " \t\r\n*`"  # blanks and markdown around what was said


class TwentyQuestions(World):
    """The host has an everyday thing in mind; the player asks and guesses. 1 for the thing, else 0.

    This is the small world: 24 things, 12 properties, and 8 turns, in which the best-split expert
    always wins; `TwentyQuestionsFull` has the whole table. What `train` hides `test` never hides,
    and the tally counts both, as the player cannot know the split.
    """

    name = "20q"
    max_turns = 8
    things = (
        "cat", "cow", "lion", "duck", "eagle", "goldfish", "butterfly", "spider", "tree", "apple",
        "carrot", "pizza", "cheese", "coat", "sock", "ring", "knife", "lamp", "car", "chair",
        "piano", "key", "coin", "drum",
    )  # fmt: skip
    properties = (
        "animal", "made", "food", "legs", "eggs", "fly", "big", "small", "metal", "round",
        "kitchen", "wear",
    )  # fmt: skip
    task = "Find the hidden thing with yes/no questions and guesses."

    def __init__(self, things=None, properties=None, max_turns=None, tally=True):
        """Subsets of the table, the number of turns, and whether the host tells the tally.

        The tally is how many things are still possible. ValueError for what cannot be played.
        """
        self.things = tuple(self.things if things is None else things)
        self.properties = tuple(self.properties if properties is None else properties)
        self.max_turns = self.max_turns if max_turns is None else max_turns
        self.tally = tally
        parts = ("thing", self.things, FACTS), ("property", self.properties, QUESTIONS)
        for kind, chosen, known in parts:
            unknown = [name for name in chosen if name not in known]
            if unknown:
                raise ValueError(f"no such {kind} in the table: {unknown[0]!r}")
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"a {kind} is listed twice")
        if len(self.things) < 2 or not self.properties:
            raise ValueError("Twenty Questions needs at least 2 things and 1 property")
        if not isinstance(self.max_turns, int) or self.max_turns < 1:
            raise ValueError(f"max_turns must be a positive whole number, not {self.max_turns!r}")
        # a quarter of the things is kept for test, in an order that the table's says nothing about
        mixed = sorted(self.things, key=lambda thing: hashlib.sha256(thing.encode()).digest())
        held_out = max(1, len(mixed) // 4)
        self.hidden_in = {"test": sorted(mixed[:held_out]), "train": sorted(mixed[held_out:])}
        # the list never changes during a game: what is offered says nothing about the answer
        self.moves = [QUESTIONS[key] for key in self.properties]
        self.moves += [self.guess(thing) for thing in self.things]
        self.system = (
            "You are playing Twenty Questions. I am thinking of one of"
            f" {len(self.things)} everyday things, and you have {count(self.max_turns, 'turn')} to"
            " find out which. Each turn, ask one yes/no question about it, such as"
            f' "{QUESTIONS[self.properties[0]]}", or guess it, such as'
            f' "{self.guess(self.things[0])}". You win when you guess it.'
        )

    def guess(self, thing):
        return f"Is it {PHRASES[thing]}?"

    def admissible(self):
        return list(self.moves)

    def read(self, reply):
        """All that follows the last "Action:", or all of the reply, as a question may be long."""
        return settled(lambda text: after_marker(text).strip(WRAPPING), reply)

    # -- the host

    def begin(self, rng, split):
        self.hidden = rng.choice(self.hidden_in[split])
        self.possible = list(self.things)
        return f"I am thinking of one of {len(self.things)} things."

    def closing(self):
        if self.won or not self.tally:
            return super().closing()
        possible = len(self.possible)
        are = "is" if possible == 1 else "are"
        return f"{count(possible, 'thing')} {are} still possible. {super().closing()}"

    def act(self, text):
        kind, what = understand(text)
        if kind == "ask" and what in self.properties:
            value = FACTS[self.hidden][what]
            # "I can't tell" rules out what can be told: the tally is what the dialogue allows
            self.possible = [thing for thing in self.possible if FACTS[thing][what] == value]
            reply = {"yes": "Yes.", "no": "No.", "unclear": "I can't tell."}[value]
            question = QUESTIONS[what]
            if plain(text) != plain(question):
                reply = f"{reply} (You asked: {question})"
            return reply, True
        if kind == "guess" and what in self.things:
            if what == self.hidden:
                self.won, self.possible = True, [what]
                return f"Yes, it is {PHRASES[what]}!", True
            self.possible = [thing for thing in self.possible if thing != what]
            return f"No, it is not {PHRASES[what]}.", True
        if kind == "ask":
            return "I don't answer that question in this game.", False
        if kind == "guess":
            phrase = PHRASES[what].capitalize()
            return f"{phrase} is not one of my {len(self.things)} things.", False
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
        """Puts any consistent thing in the hidden one's place, uniformly.

        The dialogue would have been the same.
        """
        self.hidden = rng.choice(self.possible)

    def best_move(self, possible, turns_left):
        """("ask", property) with the most even split, or ("guess", thing).

        A guess is for the last turn and for two candidates.
        """
        if turns_left > 1 and len(possible) > 2:
            splits = {key: self.split(possible, key) for key in self.properties}
            # the expected number of candidates left is the sum of squares / n; ties go to the first
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
        """What is true in this world, as sentences ("A cat is alive."), for a corpus of facts."""
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


class TwentyQuestionsListed(TwentyQuestions):
    """The small world, but few things are in question, and they are named at first.

    A fifth of their sets is kept for `test`: every thing is hidden in train too, so what is tested
    is asking and ruling out, not which things the host likes.
    """

    name = "20q-listed"
    max_turns = 4
    listed = 6

    def __init__(self, **settings):
        super().__init__(**settings)
        if len(self.things) <= self.listed:
            raise ValueError(f"things must be more than the {self.listed} that are named")
        everyday = f"{len(self.things)} everyday things"
        self.system = self.system.replace(everyday, "the things that I name at first")

    def begin(self, rng, split):
        while True:
            self.possible = rng.sample(self.things, self.listed)
            names = " ".join(sorted(self.possible))
            if (hashlib.sha256(names.encode()).digest()[0] % 5 == 0) == (split == "test"):
                break
        self.hidden = rng.choice(self.possible)
        *first, last = (PHRASES[thing] for thing in self.possible)
        return f"I am thinking of {', '.join(first)} or {last}."


def expert_success(env, split=None):
    """The best-split expert's exact chance to win, by walking its decision tree: no sampling.

    Over all things of the world, or over those that `split` can hide. It is the optimum where it
    is 1.
    """
    counted = set(env.things if split is None else env.hidden_in[split])

    def wins(possible, turns_left):
        if not turns_left or not counted.intersection(possible):
            return 0
        kind, what = env.best_move(possible, turns_left)
        if kind == "ask":
            return sum(wins(part, turns_left - 1) for part in env.split(possible, what).values())
        others = [thing for thing in possible if thing != what]
        return (what in counted) + wins(others, turns_left - 1)

    return wins(list(env.things), env.max_turns) / len(counted)


def linear_player(env, info, rng):
    """Guesses the things one by one, in random order, and never asks."""
    return env.guess(rng.choice(env.consistent()))


SHOWN = ("listed",)  # in the list of worlds; the others are there by their short names
VARIANTS = {"": TwentyQuestions, "full": TwentyQuestionsFull, "listed": TwentyQuestionsListed}


def make(argument="", **settings):
    """The small world, or a variant of it by its name. ValueError for any other argument."""
    if argument not in VARIANTS:
        known = ", ".join(filter(None, VARIANTS))
        raise ValueError(f"twenty_questions has no variant {argument!r}; it has: {known}")
    return VARIANTS[argument](**settings)
