"""Counts the error rows of the work that is in progress, by assignment, so that the counts of a lost replica can be
taken back."""

from pipeline.core.types import WorkKey


class LiveErrors:
    """The numbers of error rows so far of assignments that replicas hold, and of ranges that are done."""

    def __init__(self) -> None:
        self.total = 0
        """The sum of all numbers."""
        self._of_unit: dict[str, dict[WorkKey, int]] = {}  # by unit id; only numbers above 0

    def set(self, key: WorkKey, errors: int) -> None:
        """Record the number of error rows so far of one assignment, in place of the last number."""
        of_unit = self._of_unit.get(key[0], {})
        self.total += errors - of_unit.pop(key, 0)
        if errors:
            of_unit[key] = errors
            self._of_unit[key[0]] = of_unit
        elif not of_unit:
            self._of_unit.pop(key[0], None)

    def forget(self, unit_id: str) -> None:
        """Forget the numbers of all assignments of a unit."""
        self.total -= sum(self._of_unit.pop(unit_id, {}).values())
