"""Writes the demo's prompts: `python jobs/demo_prompts.py [OUT.parquet]`. Seeded, so that it always writes the same.

Several kinds of tasks, no prompt twice, from a few words to about 2,500 characters with a mean near 150: most are short
and a few are long, as in real corpora.
"""

import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 600
ROWS_PER_GROUP = 100
SEED = 20
MAX_CHARS = 2500

THINGS = (
    "a lighthouse", "the water cycle", "a bicycle gear", "photosynthesis", "a tide table", "bread dough", "a pendulum",
    "compound interest", "a suspension bridge", "honey bees", "an eclipse", "a violin string", "vaccines", "rust",
    "a glacier", "binary search", "the printing press", "a heat pump", "coral reefs", "a sundial", "volcanic soil",
    "a chess clock", "paper recycling", "the jet stream", "a compass", "fermentation", "a canal lock", "bird migration",
)  # fmt: skip
PEOPLE = ("Ada", "Bruno", "Chidi", "Divya", "Elena", "Farid", "Greta", "Hiro", "Ines", "Jonas", "Kavya", "Liam", "Mona")
PLACES = ("harbour", "library", "market", "workshop", "station", "orchard", "observatory", "bakery", "school", "museum")
ITEMS = ("apples", "tickets", "books", "lamps", "seeds", "bottles", "maps", "chairs", "coins", "postcards")
READERS = ("a ten-year-old", "a new colleague", "a sceptical engineer", "someone in a hurry", "a curious grandparent")
FORMS = ("one sentence", "three bullet points", "a short letter", "a dialogue of four lines", "a rhyming couplet")
FUNCTIONS = (
    ("the median of a list of numbers", "median", "values"),
    ("whether a word is a palindrome", "is_palindrome", "word"),
    ("how often each letter occurs", "count_letters", "text"),
    ("the longest common prefix of two words", "common_prefix", "first, second"),
    ("the days between two dates", "days_between", "start, end"),
    ("the prime factors of a number", "factors", "number"),
)
LANGUAGES = ("Python", "Rust", "Go", "C", "SQL")
RULES = ("", " without a loop", " in constant memory", " and never raises", ", with a comment that says why")
SENTENCES = (
    "The {place} opened late because {person} had mislaid the only key.",
    "By noon the {place} was so full that {person} had to count {item} outside.",
    "Nobody at the {place} could say who had ordered {number} {item}.",
    "{person} wrote down every number twice, once in ink and once in pencil.",
    "The talk was meant to be about {thing}, but the questions went elsewhere.",
    "A notice on the door of the {place} said that {item} would be cheaper on Friday.",
    "{person} and {other} disagreed about {thing}, politely at first and then less so.",
    "In the evening {other} swept the floor and found {number} {item} under a bench.",
)


def _words(rng: random.Random) -> dict[str, str]:
    person, other = rng.sample(PEOPLE, 2)
    return {
        "person": person,
        "other": other,
        "thing": rng.choice(THINGS),
        "place": rng.choice(PLACES),
        "item": rng.choice(ITEMS),
        "number": str(rng.randint(3, 96)),
        "second": str(rng.randint(2, 48)),
        "reader": rng.choice(READERS),
        "form": rng.choice(FORMS),
    }


def _passage(rng: random.Random, chars: int) -> str:
    """Sentences up to about that many characters."""
    text = rng.choice(SENTENCES).format(**_words(rng))
    while len(text) < chars:
        text += " " + rng.choice(SENTENCES).format(**_words(rng))
    return text


def _explain(rng: random.Random, _chars: int) -> str:
    forms = (
        "Explain {thing}.",
        "Explain {thing} to {reader} in {form}.",
        "What is {thing}?",
        "Why does {thing} matter?",
    )
    return rng.choice(forms).format(**_words(rng))


def _arithmetic(rng: random.Random, _chars: int) -> str:
    forms = (
        "{number} + {second} =",
        "{person} has {number} {item} and buys {second} more. How many {item} does {person} have now?",
        "A {place} sells {number} {item} a day. How many does it sell in {second} days? Show the steps.",
    )
    return rng.choice(forms).format(**_words(rng))


def _code(rng: random.Random, _chars: int) -> str:
    does, name, arguments = rng.choice(FUNCTIONS)
    language, rule = rng.choice(LANGUAGES), rng.choice(RULES)
    forms = (
        f"Write a {language} function that returns {does}{rule}.",
        f"Review this plan for a {language} function that returns {does}{rule}: what can go wrong?",
        f'def {name}({arguments}):\n    """Returns {does}."""\n',
        f"Write a test for {name}({arguments}), which returns {does}. Think of the empty case.",
    )
    return rng.choice(forms)


def _story(rng: random.Random, chars: int) -> str:
    return "Continue the story:\n\n" + _passage(rng, chars)


def _summary(rng: random.Random, chars: int) -> str:
    return f"Summarise the text for {rng.choice(READERS)} in {rng.choice(FORMS)}.\n\n" + _passage(rng, chars)


def _question(rng: random.Random, chars: int) -> str:
    words = _words(rng)
    return f"{_passage(rng, chars)}\n\nQuestion: what do we learn about the {words['place']}?\nAnswer:"


TOPICS = {
    "explain": (_explain, 30),
    "arithmetic": (_arithmetic, 20),
    "code": (_code, 20),
    "story": (_story, 12),
    "summary": (_summary, 9),
    "question": (_question, 9),
}


def make_prompts(rows: int = ROWS, seed: int = SEED) -> pa.Table:
    """A table of id, topic and prompt."""
    rng = random.Random(seed)
    weights = [weight for _, weight in TOPICS.values()]
    topics = rng.choices(list(TOPICS), weights, k=rows)
    prompts: dict[str, None] = {}
    for topic in topics:
        chars = min(MAX_CHARS - 300, int(rng.lognormvariate(5.2, 1.0)))
        prompt = TOPICS[topic][0](rng, chars)[:MAX_CHARS]
        while prompt in prompts:
            prompt = TOPICS[topic][0](rng, chars)[:MAX_CHARS]
        prompts[prompt] = None
    ids = [f"{topic}-{index:04d}" for index, topic in enumerate(topics)]
    return pa.table({"id": ids, "topic": topics, "prompt": list(prompts)})


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".parquet")
    table = make_prompts()
    pq.write_table(table, out, row_group_size=ROWS_PER_GROUP, compression="zstd")
    lengths = sorted(len(prompt) for prompt in table["prompt"].to_pylist())
    middle, mean = lengths[len(lengths) // 2], sum(lengths) / len(lengths)
    print(
        f"{out}: {len(lengths)} prompts of {lengths[0]} to {lengths[-1]} characters, median {middle}, mean {mean:.0f}"
    )


if __name__ == "__main__":
    main()
