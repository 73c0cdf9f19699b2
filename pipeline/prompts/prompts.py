"""Makes the prompts of rows from their columns. A row without a usable prompt gets a reason, not an exception."""

from collections.abc import Iterator

import pyarrow as pa

from pipeline.prompts.renderer import Renderer
from pipeline.prompts.values import CellError, Prompt, judge, read_cells


class PromptMaker:
    """Makes the prompts of a job's rows, from the prompt column or from the template. Only one thread may use it."""

    def __init__(self, prompt_column: str | None, template: str | None) -> None:
        """Take the prompt column or the template; the other one is None. Raises ValueError if the template is wrong."""
        self._renderer = Renderer(template) if template is not None else None
        self._column = prompt_column or ""
        self.columns = self._renderer.columns if self._renderer else (self._column,)
        """The input columns that prompts are made of."""

    def make(self, table: pa.Table) -> Iterator[Prompt]:
        """Yield (prompt, None) or (None, reason) for each row of a table that has `columns`.

        Raises InputError if the process that renders templates does not start or is ended by too many rows.
        """
        return self._renderer.make(table) if self._renderer else self._read(table)

    def close(self) -> None:
        """End the process that renders templates, if there is one."""
        if self._renderer is not None:
            self._renderer.close()

    def _read(self, table: pa.Table) -> Iterator[Prompt]:
        for cell in read_cells(table[self._column]):
            bad = isinstance(cell, CellError)
            yield (None, f"column '{self._column}' {cell.reason}") if bad else judge(cell)
