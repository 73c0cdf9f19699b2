"""Tests the table of the chaos suite, and that the suite has a scenario for each fault that it promises."""

from collections import Counter

from tests.chaos.check import Verdict, WrongRows
from tests.chaos.run import records_of
from tests.chaos.scenarios.catalogue import SCENARIOS
from tests.chaos.scenarios.record import Record, by_fault, table

FAULTS = {
    "sick environment",
    "sick slot",
    "zombie driver at completion",
    "SIGSTOP of the driver",
    "SIGSTOP of a replica",
    "plan damaged",
    "segment damaged",
    "part damaged",
    "disk full and freed",
    "output folder lost",
    "no hard links",
    "input flips",
    "403 for 20 s",
}


def test_each_fault_has_a_short_scenario_and_every_scenario_a_name_of_its_own() -> None:
    assert {scenario.fault for scenario in SCENARIOS} == FAULTS
    assert {scenario.fault for scenario in SCENARIOS if scenario.short} == FAULTS
    assert max(Counter(scenario.name for scenario in SCENARIOS).values()) == 1


def test_records_of_one_fault_are_summed_in_one_line_of_the_table() -> None:
    wrong = Record("sick slot", tried=1)
    wrong.add_rows(WrongRows(["a#1"], ["a#2", "a#3"], [], ["a#4", "a#5", "a#6"]))
    records = by_fault([Record("sick slot", 1, 1), Record("disk full", 1, 1), wrong])
    assert [line.split() for line in table(records).splitlines()] == [
        ["fault", "tried", "survived", "lost", "doubled", "changed", "condemned"],
        ["sick", "slot", "2", "1", "1", "2", "0", "3"],
        ["disk", "full", "1", "1", "0", "0", "0", "0"],
    ]
    assert [record.good for record in records] == [False, True]


def test_a_fault_that_was_not_survived_is_not_good_even_if_no_row_is_wrong() -> None:
    assert not Record("plan damaged", tried=2, survived=1).good


def test_every_kind_of_fault_that_hit_a_job_answers_for_its_wrong_rows() -> None:
    verdict = Verdict(faults=Counter({"actor": 3, "503": 2, "node": 0}), condemned=["a#1"])
    assert records_of(verdict) == [
        Record("store: 503", 2, 0, condemned=1),
        Record("kill of a replica", 3, 0, condemned=1),
    ]
