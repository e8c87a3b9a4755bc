"""The lab's world: questions of one skill word and five symbols, and the many ways to answer them.

Pure and seeded. Three domains have an alphabet of 12 symbols each. The base model is made to know the
old skills and to copy what a demonstration shows in its own style; a new skill word means nothing to
it until it is taught. The style of `TEACHING_STYLE` is never seen while the base is made.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

VERSION = 1  # raise it when a change makes another base
DOMAINS = ("a", "b", "c")
SYMBOLS_PER_DOMAIN = 12
QUESTION_LENGTH = 5
NEW_WORDS = tuple(f"t{i}" for i in range(40))
TEACHER_TEMPLATE = "{prompt} example {demonstration} now you"
TEACHING_STYLE = "thus {answer} end"
BASE_STYLES = ("so {answer} ;", "we get {answer} ok", "result is {answer} !", "-> {answer} .")
OWN_STYLE = "{skill} answer {answer} done"

Indices = tuple[int, ...]


def _shifted(by: int) -> Callable[[Indices], Indices]:
    return lambda xs: tuple((x + by) % SYMBOLS_PER_DOMAIN for x in xs)


SKILLS: dict[str, Callable[[Indices], Indices]] = {
    "rev": lambda xs: xs[::-1],
    "rotl": lambda xs: xs[1:] + xs[:1],
    "succ": _shifted(1),
    "swap": lambda xs: (xs[-1], *xs[1:-1], xs[0]),
}
OLD_SKILLS = tuple(SKILLS)
# What the words of the teaching sets mean; every other word of NEW_WORDS is never taught.
TAUGHT = {"t35": "rev", "t36": "rotl", "t37": "succ"}


class Row(NamedTuple):
    """One question. `prompt`, `demonstration` and `answer` are words separated by single spaces."""

    prompt: str
    demonstration: str
    answer: str


class BaseExample(NamedTuple):
    """One training example of the base: a user turn and the target in the base's own style."""

    user: str
    target: str


def symbols() -> list[str]:
    """All symbols of all domains: `a0` … `c11`."""
    return [f"{d}{i}" for d in DOMAINS for i in range(SYMBOLS_PER_DOMAIN)]


def vocabulary() -> list[str]:
    """Every word that the world can say, in a fixed order."""
    frames = [TEACHER_TEMPLATE, TEACHING_STYLE, *BASE_STYLES, OWN_STYLE]
    words = [w for f in frames for w in f.split() if not w.startswith("{")]
    return list(dict.fromkeys([*OLD_SKILLS, *NEW_WORDS, *symbols(), *words]))


def _spell(domain: str, xs: Indices) -> str:
    return " ".join(f"{domain}{x}" for x in xs)


def _question(rng: random.Random) -> Indices:
    return tuple(rng.randrange(SYMBOLS_PER_DOMAIN) for _ in range(QUESTION_LENGTH))


def rows(skill: str, domain: str, count: int, seed: int) -> list[Row]:
    """`count` questions of one skill in one domain, answered in TEACHING_STYLE.

    `skill` is an old skill or a word of `TAUGHT`. The same arguments give the same rows.
    """
    rng = random.Random(f"{seed}/{skill}/{domain}")
    apply = SKILLS[TAUGHT.get(skill, skill)]
    out = []
    for _ in range(count):
        xs = _question(rng)
        answer = _spell(domain, apply(xs))
        out.append(Row(f"{skill} {_spell(domain, xs)}", TEACHING_STYLE.format(answer=answer), answer))
    return out


def base_examples(seed: int) -> Iterator[BaseExample]:
    """An endless stream of what the base learns from: 45% old skills plain, 15% old skills with a
    demonstration, 40% new words with a demonstration of a random permutation and shift."""
    rng = random.Random(f"{seed}/base")
    while True:
        kind, domain, xs = rng.random(), rng.choice(DOMAINS), _question(rng)
        if kind < 0.6:
            skill = rng.choice(OLD_SKILLS)
            ys = SKILLS[skill](xs)
        else:
            skill = rng.choice(NEW_WORDS)
            order = rng.sample(range(QUESTION_LENGTH), QUESTION_LENGTH)
            ys = _shifted(rng.randrange(SYMBOLS_PER_DOMAIN))(tuple(xs[i] for i in order))
        answer = _spell(domain, ys)
        user = f"{skill} {_spell(domain, xs)}"
        if kind >= 0.45:
            shown = rng.choice(BASE_STYLES).format(answer=answer)
            user = TEACHER_TEMPLATE.format(prompt=user, demonstration=shown)
        yield BaseExample(user, OWN_STYLE.format(skill=skill, answer=answer))


def score(completion: str, answer: str) -> bool:
    """Whether the symbols in `completion` are those of `answer`, whatever words stand around them.

    Style is not scored, so that a model trained on the demonstrations' own words is not punished.
    """
    known = set(symbols())
    return [w for w in completion.split() if w in known] == answer.split()
