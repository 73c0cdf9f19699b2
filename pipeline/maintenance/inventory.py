"""Lists the files of an output folder by kind, for `verify` and `clean`."""

import re
from dataclasses import dataclass, field

from pipeline.output.layout import DRIVERS, OWN, PROBE, RECORDS, SEGMENTS
from pipeline.storage.storage import FileInfo, Storage

UNIT = r"(?P<unit>[0-9a-f]{12}-[0-9]{10,})"
"""Pattern of a unit id: 12 hexadecimal digits for the input file of the first row, then that row's number."""


@dataclass(slots=True)
class Inventory:
    """The files of an output folder. Each file is in exactly one of these fields."""

    own: list[FileInfo] = field(default_factory=list)
    """The files named in layout.OWN."""
    parts: list[FileInfo] = field(default_factory=list)
    """All files that match `part-*.parquet`, because readers take them for parts."""
    records: dict[str, FileInfo] = field(default_factory=dict)
    """Commit records by unit id."""
    segments: dict[str, list[FileInfo]] = field(default_factory=dict)
    """Segments by unit id."""
    drivers: dict[int, FileInfo] = field(default_factory=dict)
    """Driver claims by driver number."""
    temporary: list[FileInfo] = field(default_factory=list)
    """Files that were being written when their writer died, or are being written now."""
    strange: list[FileInfo] = field(default_factory=list)
    """Files that this project did not write."""

    @property
    def part_units(self) -> set[str]:
        """Return the ids of the units that have a part, taken from the names of the parts. Empty files are no parts."""
        return {match["unit"] for part in self.parts if part.size and (match := _PART.fullmatch(part.name))}


_PART = re.compile(rf"part-{UNIT}\.parquet")
_RECORD = re.compile(rf"{RECORDS}/{UNIT}\.json")
_SEGMENT = re.compile(rf"{SEGMENTS}/{UNIT}/[^/]+\.parquet")
_DRIVER = re.compile(rf"{DRIVERS}/(?P<number>[0-9]+)\.json")
_TEMPORARY = re.compile(r"(?P<folder>.*/)?\.(?P<name>[^/]+)\.[0-9a-f]{32}\.tmp")


def list_inventory(storage: Storage) -> Inventory:
    """Return all files of an output folder by kind, told by their names. Raises StorageError if the storage fails."""
    inventory = Inventory()
    for file in storage.find():
        name = file.name
        if name in OWN:
            inventory.own.append(file)
        elif "/" not in name and name.startswith("part-") and name.endswith(".parquet"):
            inventory.parts.append(file)
        elif match := _RECORD.fullmatch(name):
            inventory.records[match["unit"]] = file
        elif match := _SEGMENT.fullmatch(name):
            inventory.segments.setdefault(match["unit"], []).append(file)
        elif match := _DRIVER.fullmatch(name):
            inventory.drivers[int(match["number"])] = file
        elif name == PROBE or ((match := _TEMPORARY.fullmatch(name)) and _is_own(match)):
            inventory.temporary.append(file)
        else:
            inventory.strange.append(file)
    return inventory


def _is_own(temporary: "re.Match[str]") -> bool:
    """Return whether a temporary file was to become a file of this project. `temporary`: a match of _TEMPORARY."""
    name = f"{temporary['folder'] or ''}{temporary['name']}"
    patterns = (_PART, _RECORD, _SEGMENT, _DRIVER)
    return name in (*OWN, PROBE) or any(pattern.fullmatch(name) for pattern in patterns)
