"""Makes a prompt from the columns of a row. A row without a prompt gets a reason instead; it raises no exception."""

from collections.abc import Iterator

import pyarrow as pa

from pipeline.prompts.renderer import Renderer
from pipeline.prompts.values import CellError, Prompt, judge, read_cells


class PromptMaker:
    """A maker of prompts for a job's rows, from one column or from a template over several columns.

    Only one thread may use it.
    """

    def __init__(self, prompt_column: str | None, template: str | None) -> None:
        """Take either a column or a template. Raises ValueError if the template is wrong."""
        self._renderer = Renderer(template) if template is not None else None
        self._column = prompt_column or ""
        self.columns = self._renderer.columns if self._renderer else (self._column,)

    def make(self, table: pa.Table) -> Iterator[Prompt]:
        """Yield (prompt, None) or (None, reason) for each row of a table that has `columns`.

        Raises InputError if templates cannot be rendered at all.
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
