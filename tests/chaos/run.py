"""Runs the long chaos suite: `python -m tests.chaos.run --rows 100000 --seeds 3`, which is what `make chaos` does.

For each seed, one job runs while faults hit it at times that the seed determines; the rows are the same for all seeds.
Writes tests/chaos/out/chaos.json, in which `rows` are those of one seed and `recover_s` holds medians. The exit code is
1 if a row was lost, duplicated or changed, if `verify` found something, or if too many rows were repeated.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from pipeline.storage.storage import Storage
from tests.chaos.check import Verdict, judge
from tests.chaos.harness import Schedule, Torment, world
from tests.chaos.rows import expected, make_prompts, upload
from tests.end_to_end.s3.server import BUCKET

OUT = Path(__file__).parent / "out"
MOST_REPEATED = 0.05
"""The share of rows from which on too many were finished more than once."""
FILES = 10
SMALL_SHARE = 0.08
"""The share of the rows that are in small files, which are 4,000 files for 100,000 rows."""


def run(
    rows: int, seeds: Iterable[int], schedule: Schedule, folder: Path, files: int = FILES, small: int | None = None
) -> Verdict:
    """Run one job with faults for each seed, and return the sum of the verdicts. Logs stay in the folder.

    `files`: the number of large files. `small`: the number of rows in small files; None: SMALL_SHARE of them.
    """
    prompts = make_prompts(rows, files, seed=0, small=int(SMALL_SHARE * rows) if small is None else small)
    rows_expected = expected(prompts)
    total = Verdict()
    inputs = f"s3://{BUCKET}/in"
    with world(folder) as its:
        upload(Storage(inputs), prompts)
        for seed in seeds:
            verdict = judge(Torment(its, schedule, inputs, seed).run(), rows_expected)
            total += verdict
            show(f"seed {seed}", verdict)
    return total


def show(name: str, verdict: Verdict) -> None:
    """Print a few lines about a verdict, and at most five of its wrong rows of each kind."""
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(verdict.faults.items()))
    print(f"{name}: {verdict.rows:,} rows, {verdict.runs} runs of the job, {verdict.seconds:.0f} s")
    print(f"  faults    {faults}")
    print(f"  wrong     {len(verdict.lost)} lost, {len(verdict.duplicated)} duplicated, {len(verdict.changed)} changed")
    extra = verdict.forwards / verdict.needed - 1
    print(f"  repeated  {verdict.repeated_share:.2%} of rows; {extra:.2%} of forwards, unfinished rows included")
    print(f"  recover_s {verdict.medians()} (medians of { {k: len(v) for k, v in verdict.recover_s.items()} })")
    print(f"  verify    {'found something' if verdict.findings else 'found nothing wrong'}", flush=True)
    wrong = [*verdict.lost[:5], *verdict.duplicated[:5], *verdict.changed[:5]]
    for text in [*verdict.exits, *wrong, *verdict.findings]:
        print(f"  ! {text}", flush=True)


def as_json(verdict: Verdict, seeds: int) -> dict[str, object]:
    """Return the figures in the form of tests/chaos/out/chaos.json."""
    return {
        "seeds": seeds,
        "rows": verdict.rows // seeds,
        "faults": dict(sorted(verdict.faults.items())),
        "lost": len(verdict.lost),
        "duplicated": len(verdict.duplicated),
        "changed": len(verdict.changed),
        "repeated_share": round(verdict.repeated_share, 4),
        "recover_s": verdict.medians(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a new folder in which all logs stay")
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    with tempfile.TemporaryDirectory(prefix="twotower-chaos-") as folder:
        total = run(arguments.rows, seeds, Schedule(), arguments.keep or Path(folder))
    show("all", total)
    OUT.mkdir(exist_ok=True)
    (OUT / "chaos.json").write_text(json.dumps(as_json(total, arguments.seeds), indent=2) + "\n")
    return int(not total.right or total.repeated_share >= MOST_REPEATED)


if __name__ == "__main__":
    sys.exit(main())
