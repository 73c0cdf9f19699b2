"""Lists all scenarios: one fault each, in the variants that matter."""

import functools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.sabotage import SICKNESSES
from tests.chaos.scenarios import damage, folders, sickness, stops, stores
from tests.chaos.scenarios.record import Record
from tests.chaos.scenarios.trial import GaveUp, Place, Trial


@dataclass(frozen=True, slots=True)
class Scenario:
    """One fault in one variant."""

    fault: str
    """The line of the table that counts it."""
    variant: str
    """The name that tells it from the other variants of the same fault, or ""."""
    play: Callable[[Trial], Record]
    short: bool = True
    """Whether it is part of the short suite. Otherwise another variant of the fault stands for it there."""
    ray: bool = False
    """Whether it needs a Ray cluster. Other scenarios run one replica in the process of the driver."""
    s3: bool = False
    """Whether it needs an S3 server behind a proxy. The output of other scenarios is a local folder."""
    rows: int = 240
    long_rows: int | None = None
    """The number of rows if the scenario is long, or None for `rows`."""
    files: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of the input files (Prompts.parquet)."""
    turn_s: float | None = None
    """The seconds of a turn of the engine, or None for the usual ones."""

    @property
    def name(self) -> str:
        """Return the name of fault and variant."""
        return f"{self.fault}, {self.variant}" if self.variant else self.fault

    def run(self, place: Place) -> Record:
        """Play the scenario and return its record. What it writes is removed, unless a promise was broken."""
        began = time.monotonic()
        rows = self.long_rows if place.long and self.long_rows else self.rows
        trial = Trial.of(place, self.fault, rows, self.files, options=self.options)
        trial.turn_s = self.turn_s or trial.turn_s
        try:
            record = self.play(trial)
        except GaveUp as error:
            trial.promise(False, str(error))
            record = trial.record
        finally:
            trial.close()
        record.said = [f"{self.name}, seed {place.seed}: {text}" for text in record.said]
        record.seconds = time.monotonic() - began
        if record.good:
            shutil.rmtree(place.folder)
        return record


def _sickness() -> Iterator[Scenario]:
    for how in SICKNESSES:
        play = functools.partial(sickness.sick_environment, how=how)
        yield Scenario("sick environment", how, play, short=how == "disk", rows=168)
    play = functools.partial(sickness.sick_environment, how="kill")
    yield Scenario("sick environment", "kill, on Ray", play, short=False, ray=True, rows=168)
    yield Scenario("sick environment", "midway", functools.partial(sickness.sick_midway, how="runtime"))
    for how in ("exit", "runtime"):
        play = functools.partial(sickness.sick_slot, how=how)
        yield Scenario("sick slot", how, play, short=how == "exit", ray=True, rows=400, long_rows=1_600, turn_s=0.12)


def _stops() -> Iterator[Scenario]:
    for name in ("manifest.json", "_SUCCESS"):
        play = functools.partial(stops.zombie_at_completion, before=name)
        yield Scenario("zombie driver at completion", f"before {name}", play)
    yield Scenario("SIGSTOP of the driver", "continued", stops.stopped_driver)
    yield Scenario("SIGSTOP of the driver", "replaced", stops.replaced_driver)
    yield Scenario("SIGSTOP of a replica", "continued", stops.stopped_replica, ray=True, rows=400)
    yield Scenario("SIGSTOP of a replica", "dropped", stops.dropped_replica, ray=True, rows=400)


def _damage() -> Iterator[Scenario]:
    for kind in damage.KINDS:
        once, extended = kind in ("truncated", "flipped", "emptied"), kind in ("zeroed", "removed")
        yield Scenario("plan damaged", kind, functools.partial(damage.damaged_plan, kind=kind), short=once)
        play = functools.partial(damage.damaged_plan_extended, kind=kind)
        yield Scenario("plan damaged", f"{kind}, extended", play, short=extended)
        play = functools.partial(damage.damaged_segment, kind=kind)
        yield Scenario("segment damaged", kind, play, short=extended)
        for state, complete in (("midway", False), ("complete", True)):
            play = functools.partial(damage.damaged_part, kind=kind, complete=complete)
            short = complete == (kind == "truncated") and once
            yield Scenario("part damaged", f"{kind}, {state}", play, short=short)


def _folders() -> Iterator[Scenario]:
    yield Scenario("disk full and freed", "during the run", folders.disk_full)
    yield Scenario("disk full and freed", "between runs", folders.disk_full_at_start)
    for how in ("removed", "renamed", "emptied"):
        play = functools.partial(folders.lost_folder, how=how)
        yield Scenario("output folder lost", how, play, rows=800)
    yield Scenario("no hard links", "killed", folders.no_hard_links)
    yield Scenario("no hard links", "two writers", folders.two_fill)


def _stores() -> Iterator[Scenario]:
    for compression in ("none", "snappy"):
        options = stores.CHECKED | {"compression": compression}
        short = compression == "none"
        yield Scenario(
            "input flips", compression, stores.input_flips, short, s3=True, rows=600, files=30, options=options
        )
    yield Scenario("403 for 20 s", "local", stores.refused, s3=True, rows=600)
    yield Scenario("403 for 20 s", "on Ray", stores.refused, short=False, s3=True, ray=True, rows=1_200)


SCENARIOS = (*_sickness(), *_stops(), *_damage(), *_folders(), *_stores())
