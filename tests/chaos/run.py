"""Runs the long chaos suite: `python -m tests.chaos.run --rows 100000 --seeds 3`, which is what `make chaos` does.

For each seed, one job runs while faults hit it at times that the seed determines; the rows are the same for all seeds.
Then small jobs are hit by one fault each (tests.chaos.scenarios). A table counts for each fault how often it was tried
and survived, and the wrong rows of the jobs that it hit.

Writes tests/chaos/out/chaos.json, in which `rows` are those of one seed and `recover_s` holds medians. The exit code is
1 if a row was lost, doubled, changed or condemned wrongly, if `verify` found something, if submitting again did not
help or another promise was broken, or if too many rows were repeated.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from pipeline.storage.storage import Storage
from tests.chaos.check import Verdict, judge
from tests.chaos.harness import Schedule, Torment, World, world
from tests.chaos.rows import expected, make_prompts, upload
from tests.chaos.scenarios.catalogue import SCENARIOS
from tests.chaos.scenarios.record import Record, by_fault, table
from tests.chaos.scenarios.record import as_json as table_as_json
from tests.chaos.scenarios.trial import Place
from tests.end_to_end.s3.server import BUCKET

OUT = Path(__file__).parent / "out"
MOST_REPEATED = 0.05
"""The share of rows from which on too many were finished more than once."""
FILES = 10
SMALL_SHARE = 0.08
"""The share of the rows that are in small files, which are 4,000 files for 100,000 rows."""
NAMES = {
    "actor": "kill of a replica",
    "spot": "SIGTERM to a replica",
    "node": "kill of a node",
    "driver": "kill of the driver",
    "crash": "row that kills its process",
}
"""Kind of fault -> its name in the table. All other kinds are faults of the store (FAULTS of the proxy)."""


def run(
    rows: int, seeds: Iterable[int], schedule: Schedule, folder: Path, files: int = FILES, small: int | None = None
) -> Verdict:
    """Run one job with faults for each seed, and return the sum of the verdicts. Logs stay in the folder.

    `files`: the number of large files. `small`: the number of rows in small files; None: SMALL_SHARE of them.
    """
    with world(folder) as its:
        return sum(torment(its, rows, seeds, schedule, files, small), Verdict())


def torment(
    its: World, rows: int, seeds: Iterable[int], schedule: Schedule, files: int = FILES, small: int | None = None
) -> list[Verdict]:
    """Run one job with faults for each seed, and return the verdicts. The arguments are those of `run`."""
    prompts = make_prompts(rows, files, seed=0, small=int(SMALL_SHARE * rows) if small is None else small)
    rows_expected = expected(prompts)
    inputs = f"s3://{BUCKET}/in"
    upload(Storage(inputs), prompts)
    verdicts = []
    for seed in seeds:
        verdicts.append(judge(Torment(its, schedule, inputs, seed).run(), rows_expected))
        show(f"seed {seed}", verdicts[-1])
    return verdicts


def play(its: World, seeds: Iterable[int], only: str = "") -> list[Record]:
    """Play all scenarios whose names contain `only`, once for each seed, and return their records."""
    records = []
    for seed in seeds:
        for number, scenario in enumerate(SCENARIOS):
            if only not in scenario.name:
                continue
            address, proxy = its.cluster.address if scenario.ray else "", its.proxy if scenario.s3 else None
            bucket = f"s3://{BUCKET}/scenario-{seed}-{number}" if scenario.s3 else ""
            place = Place(its.folder / f"scenario-{seed}-{number}", seed, address, proxy, bucket, long=True)
            records.append(scenario.run(place))
            state = "survived" if records[-1].good else "NOT SURVIVED"
            print(f"{scenario.name}, seed {seed}: {state}, {records[-1].seconds:.0f} s", flush=True)
            for text in records[-1].said:
                print(f"  ! {text}", flush=True)
    return records


def records_of(verdict: Verdict) -> list[Record]:
    """Return a record for each kind of fault that hit one job. Each counts all wrong rows of the job, because any of
    the faults may be their cause."""
    wrong = (len(verdict.lost), len(verdict.duplicated), len(verdict.changed), len(verdict.condemned))
    return [
        Record(NAMES.get(kind, f"store: {kind}"), count, count if verdict.right else 0, *wrong)
        for kind, count in sorted(verdict.faults.items())
        if count
    ]


def show(name: str, verdict: Verdict) -> None:
    """Print a few lines about a verdict, and at most five of its wrong rows of each kind."""
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(verdict.faults.items()))
    print(f"{name}: {verdict.rows:,} rows, {verdict.runs} runs of the job, {verdict.seconds:.0f} s")
    print(f"  faults    {faults}")
    print(
        f"  wrong     {len(verdict.lost)} lost, {len(verdict.duplicated)} duplicated, {len(verdict.changed)} changed, "
        f"{len(verdict.condemned)} condemned"
    )
    extra = verdict.forwards / verdict.needed - 1
    print(f"  repeated  {verdict.repeated_share:.2%} of rows; {extra:.2%} of forwards, unfinished rows included")
    print(f"  recover_s {verdict.medians()} (medians of { {k: len(v) for k, v in verdict.recover_s.items()} })")
    print(f"  verify    {'found something' if verdict.findings else 'found nothing wrong'}", flush=True)
    wrong = [*verdict.lost[:5], *verdict.duplicated[:5], *verdict.changed[:5], *verdict.condemned[:5]]
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
        "condemned": len(verdict.condemned),
        "repeated_share": round(verdict.repeated_share, 4),
        "recover_s": verdict.medians(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=3, help="0: only the scenarios")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--scenario-seeds", type=int, default=2, help="the seeds of each scenario; 0: no scenarios")
    parser.add_argument("--only", default="", help="play only the scenarios whose names contain this text")
    parser.add_argument("--keep", type=Path, help="a new folder in which all logs stay")
    arguments = parser.parse_args()
    first = arguments.first_seed
    seeds, of_scenarios = (range(first, first + count) for count in (arguments.seeds, arguments.scenario_seeds))
    with tempfile.TemporaryDirectory(prefix="twotower-chaos-") as folder, world(arguments.keep or Path(folder)) as its:
        verdicts = torment(its, arguments.rows, seeds, Schedule()) if seeds else []
        records = play(its, of_scenarios, arguments.only)
    total = sum(verdicts, Verdict())
    records = by_fault([*(record for verdict in verdicts for record in records_of(verdict)), *records])
    if verdicts:
        show("all", total)
    print(table(records))
    OUT.mkdir(exist_ok=True)
    said = as_json(total, len(seeds)) if verdicts else {}
    said |= {"table": table_as_json(records), "broken": [text for record in records for text in record.said]}
    (OUT / "chaos.json").write_text(json.dumps(said, indent=2) + "\n")
    good = total.right and all(record.good for record in records)
    return int(not good or (bool(verdicts) and total.repeated_share >= MOST_REPEATED))


if __name__ == "__main__":
    sys.exit(main())
