"""Makes the prompts of rows from their columns. A row without a usable prompt gets a reason, not an exception."""

from collections.abc import Iterator

import pyarrow as pa

from pipeline.prompts.renderer import Renderer
from pipeline.prompts.setup import PromptSetup
from pipeline.prompts.values import CellError, Outcome, Prompt, flaw_of, read_cells, text_column


class PromptMaker:
    """Makes the prompts of a job's rows, as its setup says. Only one thread may use it."""

    def __init__(self, setup: PromptSetup) -> None:
        """Raise ValueError if the template of the setup is wrong."""
        self._renderer = None if setup.template is None and setup.chat is None else Renderer(setup)
        self._columns = setup.columns

    def make(self, table: pa.Table) -> Iterator[Outcome]:
        """Yield (prompt, None) or (None, reason) for each row of a table that has the columns of the setup.

        Raises InputError if the process that renders templates does not start or is ended by too many rows.
        """
        return self._renderer.make(table) if self._renderer else self._read(table)

    def close(self) -> None:
        """End the process that renders templates, if there is one."""
        if self._renderer is not None:
            self._renderer.close()

    def _read(self, table: pa.Table) -> Iterator[Outcome]:
        (column,) = self._columns
        for cell in read_cells(text_column(table[column])):
            if isinstance(cell, CellError):
                yield None, f"column '{column}' {cell.reason}"
            elif cell is None:
                yield None, "prompt is null"
            elif flaw := flaw_of(cell):
                yield None, flaw
            else:
                yield Prompt(cell), None
