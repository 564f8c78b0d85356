"""The built-in task: attribute lists of places to eat and places to see, to be told in a sentence or two.

Everything is drawn from a seed, so that the task needs no file. Dev and test share no combination of a *pair*
with train: a fifth of the (kind, food) and of the (way, sight) pairs is held out of train, and every dev or test
list holds such a pair. Every value is said word for word in every text, so `slots` of the references is 100.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

# The two words of an inn's name, and of a place's.
ADJECTIVES, SIGNS, NATURES, GROUNDS = (
    line.split()
    for line in (
        "Golden White Black Old Red Little Silver Green Merry Royal",
        "Lion Swan Horse Bear Rose Ship Oak Crown Fox Bell Star Lamb",
        "Apple Stone Rose Silver Raven Summer Green Moon Winter Honey",
        "Hill Bay Wood Bridge Valley Lake Point Cross Meadow Water",
    )
)
EATING: dict[str, Sequence[str]] = {
    "kind": ("inn", "tavern", "tea room", "dining room", "farm house", "kitchen", "eating house"),
    "food": ("fish", "roast beef", "fruit", "fresh bread", "soup", "cakes", "cheese", "roast chicken", "eggs"),
    "where": ("by the river", "in the market", "near the church", "on the hill", "at the gate", "near the harbour"),
    "price": ("cheap", "dear", "fair", "high", "low"),
    "guests": ("children", "sailors", "families", "dogs", "strangers", "ladies", "soldiers"),
}
SEEING: dict[str, Sequence[str]] = {
    "kind": ("village", "town", "castle", "garden", "farm", "forest", "fishing village"),
    "sight": ("old church", "great tower", "stone bridge", "light-house", "rose garden", "water mill", "market"),
    "way": ("by boat", "on foot", "by train", "on horseback", "by carriage"),
    "season": ("spring", "summer", "autumn", "winter"),
    "stay": ("one day", "two days", "a week", "a night", "three hours"),
}
HELD_OUT = {"eating": ("kind", "food"), "seeing": ("way", "sight")}
SIZES = {"train": 1200, "dev": 64, "test": 96}  # attribute lists
REFERENCES = {"train": 1, "dev": 1, "test": 3}  # texts for each


def rows(split: str) -> list[dict[str, str]]:
    """The rows of 'train', 'dev' or 'test': `attributes` ("name: ...; kind: ...") and `text`.

    >>> rows("train")[0]["attributes"]
    'name: Stone Hill; kind: castle; sight: rose garden; way: on foot'
    """
    if split not in SIZES:
        raise ValueError(f"the built-in task has no split {split!r}; it has {', '.join(SIZES)}")
    rng = np.random.default_rng((2026, list(SIZES).index(split)))
    held = {kind: _held_out(kind) for kind in HELD_OUT}
    out, seen = [], set()
    while len(seen) < SIZES[split]:
        kind = str(rng.choice(list(HELD_OUT)))
        values = _draw(rng, kind)
        a, b = HELD_OUT[kind]
        pair = (values.get(a), values.get(b))
        if (pair in held[kind]) == (split == "train"):
            continue
        attributes = "; ".join(f"{name}: {value}" for name, value in values.items())
        if attributes in seen:
            continue
        seen.add(attributes)
        tell = {"eating": _eating, "seeing": _seeing}[kind]
        texts: set[str] = set()
        while len(texts) < REFERENCES[split]:
            texts.add(tell(rng, values))
        out += [{"attributes": attributes, "text": text} for text in sorted(texts)]
    return out


def slots(row: Mapping) -> list[str]:
    """The values of a row's attributes.

    >>> slots({"attributes": "name: Red Fox; food: soup"})
    ['Red Fox', 'soup']
    """
    return [field.partition(": ")[2] for field in row["attributes"].split("; ")]


def _held_out(kind: str) -> set[tuple[str, str]]:
    values = {"eating": EATING, "seeing": SEEING}[kind]
    pairs = list(itertools.product(*(values[name] for name in HELD_OUT[kind])))
    rng = np.random.default_rng(2026)
    return {pairs[i] for i in rng.permutation(len(pairs))[: len(pairs) // 5]}


def _draw(rng: np.random.Generator, kind: str) -> dict[str, str]:
    """A name, the kind, and two or three of the four other attributes, in a fixed order."""

    def pick(values: Sequence[str]) -> str:
        return str(rng.choice(values))

    if kind == "eating":
        name, values = f"{pick(ADJECTIVES)} {pick(SIGNS)}", EATING
    else:
        name, values = f"{pick(NATURES)} {pick(GROUNDS)}", SEEING
    others = [n for n in values if n != "kind"]
    chosen = sorted(rng.permutation(len(others))[: rng.integers(2, 4)])
    return {"name": name, **{n: pick(values[n]) for n in ("kind", *(others[i] for i in chosen))}}


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _eating(rng: np.random.Generator, v: Mapping[str, str]) -> str:
    """One sentence of name, kind, place and food, then one for each further attribute."""
    name, where = f"the {v['name']}", f" {v['where']}" if "where" in v else ""
    food = v.get("food")
    first = [f"{name} is {_a(v['kind'])}{where}", f"there is {_a(v['kind'])} called {name}{where}"]
    if where:
        first += [f"{v['where']} stands {name}, {_a(v['kind'])}"]
    served = [f" that serves {food}", f" where you can eat {food}", f" known for its {food}"] if food else [""]
    more = []
    if "price" in v:
        more.append([f"the prices are {v['price']}", f"you will find the prices {v['price']}"])
    if "guests" in v:
        more.append([f"{v['guests']} are welcome", f"it is a good place for {v['guests']}"])
    return _sentences(rng, [[a + b for a in first for b in served], *more])


def _seeing(rng: np.random.Generator, v: Mapping[str, str]) -> str:
    """One sentence of name, kind and sight, one of way and season, one of the stay."""
    name, sight = v["name"], v.get("sight")
    first = [f"{name} is {_a(v['kind'])}", f"there is {_a(v['kind'])} called {name}"]
    seen = [f" with {_a(sight)}", f" known for its {sight}", f" where you can see {_a(sight)}"] if sight else [""]
    more = []
    way, season = v.get("way"), v.get("season")
    if way and season:
        more.append([f"go there {way} in {season}", f"in {season} you can go there {way}"])
    elif way:
        more.append([f"go there {way}", f"you can go there {way}"])
    elif season:
        more.append([f"it is best in {season}", f"go there in {season}"])
    if "stay" in v:
        more.append([f"{v['stay']} will be enough", f"stay for {v['stay']}"])
    return _sentences(rng, [[a + b for a in first for b in seen], *more])


def _sentences(rng: np.random.Generator, choices: list[list[str]]) -> str:
    """One of each list; the first leads, the others follow in any order."""
    told = [str(rng.choice(c)) for c in choices]
    order = [0, *(1 + rng.permutation(len(told) - 1))]
    return " ".join(f"{told[i][0].upper()}{told[i][1:]}." for i in order)
