"""Makes Parquet footers by hand, for files that promise what no writer would."""

import struct


def footer_file(columns: int = 1, groups: tuple[int, ...] = (), rows: int | None = None, depth: int = 0) -> bytes:
    """Return a file that is only a footer. It has int32 columns `c0`, `c1` … (the first inside `depth` structs), row
    groups with these numbers of rows but without data, and `rows` rows in all (None means the sum of the groups)."""
    nested = [_element(b"s", children=1, optional=True)] * depth
    leaves = [_element(f"c{i}".encode(), kind=1, optional=True) for i in range(columns)]
    schema = [_element(b"schema", children=columns), *nested, *leaves]
    made = [_fields((1, _list([])), (2, _int(0, 6)), (3, _int(count, 6))) for count in groups]
    total = sum(groups) if rows is None else rows
    footer = _fields((1, _int(2, 5)), (2, _list(schema)), (3, _int(total, 6)), (4, _list(made)))
    return b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"


Field = tuple[int, bytes]
"""A field of Thrift's compact protocol: its type and its content."""


def _varint(number: int) -> bytes:
    made = bytearray()
    while number >= 0x80:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*made, number])


def _int(number: int, kind: int) -> Field:
    return kind, _varint((number << 1) ^ (number >> 63))


def _list(structs: list[bytes]) -> Field:
    head = bytes([len(structs) << 4 | 12]) if len(structs) < 15 else b"\xfc" + _varint(len(structs))
    return 9, head + b"".join(structs)


def _fields(*fields: tuple[int, Field]) -> bytes:
    made, last = b"", 0
    for number, (kind, content) in fields:
        made += bytes([(number - last) << 4 | kind]) + content
        last = number
    return made + b"\0"


def _element(name: bytes, *, kind: int | None = None, children: int | None = None, optional: bool = False) -> bytes:
    fields = [(1, _int(kind, 5))] if kind is not None else []
    if optional:
        fields.append((3, _int(1, 5)))
    fields.append((4, (8, _varint(len(name)) + name)))
    if children is not None:
        fields.append((5, _int(children, 5)))
    return _fields(*fields)
