"""Writes the demo's prompts: `python jobs/demo_prompts.py [OUT.parquet]`.

The prompts are questions that builtin:tiny was not trained on. Each has its right answer, so that the demo's output can
be marked with SQL. The seed is fixed, so every call writes the same prompts.
"""

import sys
from pathlib import Path
from typing import Any

# Add the project's root: `python jobs/demo_prompts.py` puts only the folder of this file on the path.
sys.path.insert(0, str(Path(__file__).parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from model.builtin.corpus import held_out_examples
from model.checkpoint.reader import BUILTIN

ROWS = 600
ROWS_PER_GROUP = 100
SEED = 20


def make_prompts(rows: int = ROWS, seed: int = SEED) -> pa.Table:
    """Return a table with the columns id, task, prompt and answer, in which all prompts are different."""
    tokenizer = Tokenizer.from_file(str(BUILTIN["tiny"] / "tokenizer.json"))
    distinct = {example.prompt: example for example in held_out_examples(tokenizer, seed, 2 * rows)}
    examples = list(distinct.values())[:rows]
    return pa.table(
        {
            "id": [f"{example.task}-{number:04d}" for number, example in enumerate(examples)],
            "task": [example.task for example in examples],
            "prompt": [example.prompt for example in examples],
            "answer": [example.answer for example in examples],
        }
    )


def main() -> None:
    """Write the prompts to the file named on the command line; the default is demo_prompts.parquet beside this file."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".parquet")
    table = make_prompts()
    pq.write_table(table, out, row_group_size=ROWS_PER_GROUP, compression="zstd")
    prompts: list[Any] = table["prompt"].to_pylist()
    lengths = sorted(len(prompt) for prompt in prompts)
    print(f"{out}: {len(lengths)} prompts of {lengths[0]} to {lengths[-1]} characters")


if __name__ == "__main__":
    main()
