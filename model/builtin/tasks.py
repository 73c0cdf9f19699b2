"""Makes the examples that builtin:tiny is trained on, each a prompt with its one right answer, from a seed.

The module does not import torch. The tasks are like those of users of batch generation: records from sentences, dates,
units, product texts, letters, sorted lists, sums step by step, counts, series. An answer follows from its prompt alone,
so quality is the share of exact matches. The tasks differ in how many tokens can be predicted in parallel: all of a
record, but only a few digits of a series.

A prompt is held out for evaluation if a hash of its question falls into the first of HELD_OUT_PARTS parts, whatever
precedes the question. So no question is used for both training and evaluation.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Ana Ben Carla David Elena Felix Greta Hugo Irene Jonas Karin Luis Maria Nils Olga Paul Rosa Simon Tina Viktor"
)
CITIES = _words(
    "Oslo Bern Rome Paris Lima Cairo Delhi Tokyo Quito Milan"
    " Porto Vienna Madrid Berlin Dublin Prague Athens Lisbon Sofia Riga"
)
JOBS = _words("baker nurse pilot teacher lawyer farmer painter singer dentist gardener writer engineer")
ITEMS = _words("lamp chair table mirror clock basket blanket vase shelf bench carpet kettle")
COLOURS = _words("red blue green white black yellow grey brown")
MATERIALS = _words("oak steel glass wool cotton bamboo marble copper")
ROOMS = _words("kitchen bedroom garden office bathroom hallway")
WORDS = _words(
    "apple bird cloud door eagle fish garlic house island juice"
    " king lemon mouse night ocean plum queen river stone tree"
)
MONTHS = _words("January February March April May June July August September October November December")
UNITS = (
    ("km", "m", 1000),
    ("kg", "g", 1000),
    ("m", "cm", 100),
    ("cm", "mm", 10),
    ("l", "ml", 1000),
    ("t", "kg", 1000),
)

HELD_OUT_PARTS = 16
SHOTS = (0, 0, 0, 0, 0, 0, 1, 2)  # numbers of solved examples before a question, all equally likely
SERIES_DIGITS = (20, 60)
PROMPT_END = "\nAnswer:"

Question = tuple[str, str]
"""A question and its answer. The answer begins with a space, because it follows PROMPT_END."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its answer."""

    task: str
    prompt: str
    """Solved examples of the same task, if any, then the question. It ends with PROMPT_END."""
    answer: str
    """The text that must be generated, without the end of text that follows it."""


def _record(rng: random.Random) -> Question:
    name, city, job, age = rng.choice(NAMES), rng.choice(CITIES), rng.choice(JOBS), rng.randint(18, 89)
    sentence = rng.choice(
        (
            f"{name} is {age} years old, lives in {city} and works as a {job}.",
            f"{name}, a {job} of {age}, comes from {city}.",
            f"The {job} from {city} is called {name} and is {age}.",
        )
    )
    ask = rng.choice(("Turn into JSON:", "Extract the record:"))
    return f"{ask} {sentence}", f' {{"name": "{name}", "age": {age}, "job": "{job}", "city": "{city}"}}'


def _date(rng: random.Random) -> Question:
    year, month, day = rng.randint(1900, 2099), rng.randint(1, 12), rng.randint(1, 28)
    answer = (
        f" It is {day:02} {MONTHS[month - 1]} {year}, in America {month:02}/{day:02}/{year},"
        f" in Germany {day:02}.{month:02}.{year}."
    )
    return f"{rng.choice(('Write out the date', 'Convert the date'))} {year}-{month:02}-{day:02}", answer


def _unit(rng: random.Random) -> Question:
    (large, small, factor), count = rng.choice(UNITS), rng.randint(10, 99)
    answer = f" One {large} is {factor} {small}, so {count} {large} are {count * factor} {small} in all."
    return f"{rng.choice(('Convert', 'Change'))} {count} {large} to {small}", answer


def _facts(rng: random.Random, **facts: object) -> str:
    """Return the facts as text, such as "price 12, item lamp", in random order."""
    given = [f"{name} {value}" for name, value in facts.items()]
    rng.shuffle(given)
    return ", ".join(given)


def _product(rng: random.Random) -> Question:
    item, colour, material, room = (rng.choice(words) for words in (ITEMS, COLOURS, MATERIALS, ROOMS))
    price, weeks, style = rng.randint(10, 99), rng.randint(2, 9), rng.choice(("plain", "lively", "formal"))
    text = {
        "plain": f"This {colour} {item} is made of {material}. It is for the {room}."
        f" It costs {price} euros and arrives in {weeks} weeks.",
        "lively": f"Look at this {item}! Bright {colour}, real {material}, perfect for your {room}."
        f" Only {price} euros, and it is yours in {weeks} weeks!",
        "formal": f"We present a {item} of {material} in {colour}, designed for the {room}."
        f" The price is {price} euros. Delivery takes {weeks} weeks.",
    }[style]
    facts = _facts(rng, item=item, colour=colour, material=material, room=room, price=price, weeks=weeks)
    return f"Write a {style} product text: {facts}", f" {text}"


def _letter(rng: random.Random) -> Question:
    name, city, item, colour = (rng.choice(words) for words in (NAMES, CITIES, ITEMS, COLOURS))
    price, day, month, size = (
        rng.randint(10, 99),
        rng.randint(10, 28),
        rng.choice(MONTHS),
        rng.choice(("short", "long")),
    )
    opening = f" Dear {name},\n\nthank you for your order of a {colour} {item} for {price} euros."
    parcel = f" We will send it to {city} on {day} {month}."
    care = (
        f" If nobody in {city} can take the parcel, it will wait for you at the post office for two weeks."
        f" Please open it with care, so that the {item} is not damaged. Should you not like the {item} or its colour,"
        f" you may send it back to us within a month. We will return the {price} euros to you,"
        " and you do not have to tell us why."
        f" Keep this letter for two years, as it is your guarantee: if the {item} breaks, send us a picture"
        f" and the day of this letter, {day} {month}, and we will send you a new {item} in {colour}."
        f"\n\nWould you like to know more about our things? Then visit us in {city}."
        " Our shop is open from morning to evening, and there is always coffee for our guests."
    )
    closing = f"\n\nWe hope that you will enjoy the {item}.\n\nWith kind regards"
    facts = _facts(rng, name=name, city=city, item=item, colour=colour, price=price, day=day, month=month)
    return f"Write a {size} letter: {facts}", opening + parcel + (care if size == "long" else "") + closing


def _sort(rng: random.Random) -> Question:
    words = rng.sample(WORDS, rng.choice((3, 3, 4)))
    question = f"{rng.choice(('Sort', 'Put in order'))}: {', '.join(words)}"
    return question, f" In order: {', '.join(sorted(words))}. The first one is {min(words)}, the last one {max(words)}."


def _sum(rng: random.Random) -> Question:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    answer = (
        f" {a % 10} + {b % 10} = {ones:02}, write {ones % 10}, carry {carry}."
        f" {a // 10} + {b // 10} + {carry} = {tens:02}. The sum is {a + b:03}."
    )
    return rng.choice((f"Add {a} and {b} step by step", f"What is {a} + {b}?")), answer


def _count(rng: random.Random) -> Question:
    start, step = rng.randint(10, 50), rng.randint(2, 7)
    numbers = [start + i * step for i in range(8)]
    return f"Count from {start} in steps of {step}", f" {', '.join(map(str, numbers))}."


def _series(rng: random.Random) -> Question:
    """Return a series in which each digit follows from two earlier ones.

    If the nearer of the two is n digits back, n digits can be predicted at once.
    """
    near, far = rng.choice(((1, 4), (2, 3), (3, 4)))
    while True:
        digits = [rng.randint(1, 9) for _ in range(4)]
        given = " ".join(map(str, digits))
        while digits[-1] and len(digits) < SERIES_DIGITS[1]:
            digits.append((digits[-near] + digits[-far]) % 10)
        if not digits[-1] and len(digits) >= SERIES_DIGITS[0]:
            question = f"Continue {given} up to the first 0: add the digits {near} and {far} back, keep the last digit"
            return question, f" {' '.join(map(str, digits))}"


TASKS: Mapping[str, tuple[Callable[[random.Random], Question], float]] = MappingProxyType(
    {
        "record": (_record, 0.16),
        "date": (_date, 0.12),
        "unit": (_unit, 0.08),
        "product": (_product, 0.17),
        "letter": (_letter, 0.13),
        "sort": (_sort, 0.06),
        "sum": (_sum, 0.08),
        "count": (_count, 0.08),
        "series": (_series, 0.12),
    }
)
"""Task name -> the function that makes a question, and the task's share of the examples."""


def is_held_out(question: str) -> bool:
    """Return True if the question is kept for evaluation, as one in HELD_OUT_PARTS is; the text alone decides."""
    return hashlib.blake2b(question.encode(), digest_size=4).digest()[0] % HELD_OUT_PARTS == 0


def examples(seed: int, *, held_out: bool, shares: Mapping[str, float] | None = None) -> Iterator[Example]:
    """Yield examples without end, with tasks drawn by their shares; the same arguments give the same examples.

    A quarter of the prompts begin with one or two solved examples (few-shot). held_out: True for examples for
    evaluation, False for training. The solved examples before a question are training questions in both cases. shares:
    shares of some tasks that replace those in TASKS.
    """
    rng = random.Random(f"{seed}/{held_out}")
    weights = {name: share for name, (_, share) in TASKS.items()} | dict(shares or {})
    while True:
        task = rng.choices(list(weights), list(weights.values()))[0]
        solved = [_draw(task, rng, held_out=False) for _ in range(rng.choice(SHOTS))]
        shots = "".join(f"{question}{PROMPT_END}{answer}\n\n" for question, answer in solved)
        question, answer = _draw(task, rng, held_out=held_out)
        yield Example(task, f"{shots}{question}{PROMPT_END}", answer)


def _draw(task: str, rng: random.Random, *, held_out: bool) -> Question:
    """Make questions of the task until one is held out, or is not, as `held_out` says; return it with its answer."""
    make = TASKS[task][0]
    while True:
        question, answer = make(rng)
        if is_held_out(question) == held_out:
            return question, answer
