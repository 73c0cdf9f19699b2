"""Tests that `judge` of the chaos suite finds lost, duplicated and changed rows, and counts correctly."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.chaos.check import judge
from tests.chaos.harness import History, Killed
from tests.chaos.logs import Life
from tests.chaos.rows import COLUMNS, Prompts, expected

pytestmark = pytest.mark.slow

ROWS = 4


@pytest.fixture
def history(tmp_path: Path) -> History:
    (tmp_path / "logs").mkdir()
    (tmp_path / "out").mkdir()
    return History(str(tmp_path / "out"), tmp_path / "logs")


def publish(history: History, *rows: tuple[int, tuple[object, ...]]) -> None:
    numbers = [number for number, _ in rows]
    columns: dict[str, list[object]] = {"source_file": ["a"] * len(rows), "source_row": [*numbers]}
    columns["id"] = [f"a#{number}" for number in numbers]
    columns |= {name: [row[index] for _, row in rows] for index, name in enumerate(COLUMNS)}
    number = len(list(Path(history.output).iterdir()))
    pq.write_table(pa.table(columns), Path(history.output) / f"part-{number}.parquet")


def test_lost_doubled_and_changed_rows_are_found(history: History) -> None:
    rows = expected([Prompts("a", [f"prompt {number}".encode() for number in range(ROWS)])])
    publish(history, (0, rows["a#0"]), (1, rows["a#2"]))
    publish(history, (0, rows["a#0"]), (3, rows["a#3"]))
    verdict = judge(history, rows)
    assert verdict.lost == ["a#2"]
    assert verdict.duplicated == ["a#0"]
    assert [text.partition(":")[0] for text in verdict.changed] == ["a#1"]
    assert verdict.findings  # `verify` fails, because this is not a complete output folder
    assert not verdict.right


def test_rows_with_the_id_of_another_row_are_found(history: History) -> None:
    """The completions are right, so only the ids tell that rows of two files have changed places."""
    rows = expected([Prompts("a", [b"prompt 0", b"prompt 1"])])
    publish(history, (0, rows["a#0"]), (1, rows["a#1"]))
    [part] = Path(history.output).iterdir()
    table = pq.read_table(part)
    pq.write_table(table.set_column(0, "source_file", [["a", "b"]]), part)
    verdict = judge(history, rows)
    assert verdict.lost == ["a#1"]
    assert [text.partition(":")[0] for text in verdict.changed] == ["b#1 with id a#1"]


def test_repeated_rows_and_recoveries_are_counted(history: History) -> None:
    rows = expected([Prompts("a", [b"prompt"] * ROWS)])
    for name, text in {
        "1_r0_7": "100.0 node\n101.0 3 a#0 a#1\n102.0 2\n",
        "1_r0.2_8": "103.0 node\n104.5 3 a#1 a#2\ncrash\n",
        "2_r0_9": "110.0 node\n112.0 2 a#2 a#3\n113.0 2 a#",
    }.items():
        (history.logs / name).write_text(text)
    life = Life(1, "r0", 1, 7)
    history.killed = [Killed("actor", 102.5, [life], 1), Killed("driver", 105.0, [], 1), Killed("node", 112.5, [], 2)]
    verdict = judge(history, rows)
    assert (verdict.repeated, verdict.repeated_share) == (2, 0.5)
    assert verdict.forwards == 3 + 2 + 3 + 2
    assert verdict.faults == {"actor": 1, "driver": 1, "node": 1, "crash": 1}
    assert verdict.recover_s == {"actor": [2.0], "driver": [7.0], "node": []}
