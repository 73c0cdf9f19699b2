"""Does what the README and docs/ tell a newcomer to do."""

import re
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.timeout(900)  # whole commands, one after the other
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RUNNING = (ROOT / "docs/running.md").read_text()
PROMPTS = (ROOT / "docs/prompts.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()


def block(language: str, holding: str, page: str = README) -> str:
    """Return the page's one code block of a language that holds a text."""
    found = [b for b in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL) if holding in b]
    assert len(found) == 1, f"{len(found)} {language} blocks hold {holding!r}"
    return str(found[0])


def python(*arguments: str, folder: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_ones_own_file(tmp_path: Path) -> None:
    """Runs the job file, commands and query of "Your own file", and those of "Watching a job", with /data elsewhere."""
    texts = [f"A text of one's own, number {i}." for i in range(30)]
    pq.write_table(pa.table({"id": list(range(30)), "text": texts}), tmp_path / "prompts.parquet")
    (tmp_path / "mine.yaml").write_text(block("yaml", "prompt_column: text").replace("/data", str(tmp_path)))
    commands = re.findall(r"^twotower (\w+) (\S+)", block("sh", "twotower plan"), re.MULTILINE)
    assert [verb for verb, _ in commands] == ["plan", "preview", "run", "status", "show", "verify"]
    printed = {}
    for verb, argument in commands:
        place = str(tmp_path / "mine.yaml") if argument == "mine.yaml" else argument.replace("/data", str(tmp_path))
        printed[verb] = python("-m", "pipeline", verb, place)
    assert "1 file, 30 rows" in printed["plan"]
    assert "A text of one's own, number 4." in printed["preview"]
    assert "is complete: 30 rows: 30 ok, 0 errors" in printed["run"]
    assert "stats" in printed["show"]
    assert "30 of 30" in printed["status"]
    assert printed["verify"].startswith("verified: 30 rows")
    for verb, rest in re.findall(r"^twotower (\w+) (.+?) #", block("sh", "--watch", RUNNING), re.MULTILINE):
        printed[verb] = python("-m", "pipeline", verb, *rest.replace("/data", str(tmp_path)).split())
    assert "30 of 30" in printed["status"]
    assert (tmp_path / "completions/_job/report.html").stat().st_size > 10_000
    with duckdb.connect() as connection:
        rows = connection.sql(block("sql", "finish_reason").replace("/data", str(tmp_path))).fetchall()
    assert sum(count for _, count, _ in rows) == 30


@pytest.mark.slow
def test_the_engine_from_python() -> None:
    assert python("-c", block("python", "engine.generate")).strip().endswith("The sum is 085.")


def test_the_settings_it_names_exist(tmp_path: Path) -> None:
    """The lines about a template and the --set example load."""
    from pipeline.config.loader import load_job

    lines = block("yaml", "template:", RUNNING).partition("input:\n")[2]
    job = re.sub(r"input:\n(  .*\n)+", f"input:\n{lines}".replace("\\", r"\\"), block("yaml", "prompt_column: text"))
    (tmp_path / "job.yaml").write_text(job)
    setting = re.search(r"--set (\S+=\S+)`", README)
    assert setting is not None
    read = load_job(tmp_path / "job.yaml", [setting[1]])
    assert read.input.template is not None
    assert read.input.carry == ("reader",)


@pytest.mark.parametrize("inputs", re.findall(r"```yaml\n(input:\n.*?)```", PROMPTS, re.DOTALL))
def test_the_inputs_of_the_page_on_prompts_load(tmp_path: Path, inputs: str) -> None:
    from pipeline.config.loader import load_job

    (tmp_path / "job.yaml").write_text(f"{inputs}output: {{path: /out}}\nmodel: {{checkpoint: 'builtin:noise'}}\n")
    assert load_job(tmp_path / "job.yaml").input.prompt_column is None


@pytest.mark.parametrize("package", ["model", "pipeline", "workers"])
def test_the_map_is_complete(package: str) -> None:
    """Every folder of a package has its place in the package's table, and no other is named there."""
    [table] = re.findall(rf"^\| `{package}/`: .*?\n((?:\|.*\n)+)", ARCHITECTURE, re.MULTILINE)
    named = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines()))
    assert sorted(named) == sorted(folder.parent.name for folder in (ROOT / package).glob("*/__init__.py"))
