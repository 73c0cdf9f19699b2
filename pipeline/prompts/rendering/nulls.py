"""Defines the values that stand for null cells in templates. Only the process that renders templates uses them.

They are subclasses of jinja2's Undefined, so that its filter `default` replaces them. Tests such as `is none` get None
instead of them (pipeline.prompts.rendering.sandbox).
"""

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, NoReturn

from jinja2 import Undefined

from pipeline.prompts.setup import Nulls


class NullError(ValueError):
    """A template prints or computes with a null. The message names the column and the place in it."""


class Null(Undefined):
    """A null cell, or a null inside a cell. It is false, equal to none and empty in a `for`; anything else that is done
    with it raises NullError. Its items and attributes are nulls too.

    Names of its own would hide those items from templates: {{ doc.text }} of a doc that is null is a null. So they
    begin with an underscore.
    """

    __slots__ = ("_name", "_place")

    def __init__(self, column: str, inside: str = "") -> None:
        """Take the name of the column, and the path inside its cell, such as `.title` or `[3]`."""
        self._name = ""  # of the attribute, if this is an attribute of a null
        self._place = f"column '{column}' is null" if not inside else f"column '{column}' has a null at {inside}"
        super().__init__(hint=self._place, exc=NullError)  # type: ignore[arg-type]

    _advice = "give it a default in the template, or set input.nulls: empty"

    def _fail(self, *_: Any, **__: Any) -> NoReturn:
        """Raise NullError."""
        raise NullError(f"{self._place}: {self._advice}")

    def _text(self) -> str:
        """Raise NullError, as a null has no text."""
        self._fail()

    def __getattr__(self, name: str) -> Any:
        if name[:2] == "__":
            raise AttributeError(name)
        item = copy(self)
        item._name = name
        return item

    def __getitem__(self, key: Any) -> Any:
        return self

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, Null)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(None)

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __repr__(self) -> str:  # inside a printed list
        return "null"

    def __call__(self, *_: Any, **__: Any) -> Any:
        return () if self._name in ("items", "keys", "values") else self._fail()  # these stand in a `for`

    __str__ = __format__ = __len__ = __contains__ = __int__ = __float__ = __index__ = _fail
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _fail
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __pos__ = __neg__ = _fail
    __lt__ = __le__ = __gt__ = __ge__ = _fail


def text_of(null: Null) -> str:
    """Return the text that counts instead of a null. Raises NullError if nulls have none."""
    return null._text()


def _as_empty(name: str) -> Callable[..., Any]:
    """Return a method that does what the method of this name of an empty text does."""
    method = getattr(str, name)
    return lambda _, *values: method("", *("" if isinstance(value, Null) else value for value in values))


class EmptyNull(Null):
    """A null that counts as an empty text wherever a text is wanted (`input.nulls: empty`)."""

    __slots__ = ()
    _advice = "give it a default in the template: an empty text is not enough here"

    def _text(self) -> str:
        """Return an empty text."""
        return ""

    def __call__(self, *values: Any, **named: Any) -> Any:
        """Call the method of an empty text, if there is one of this name."""
        if hasattr(str, self._name):
            return getattr("", self._name)(*("" if isinstance(value, Null) else value for value in values), **named)
        return super().__call__()

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) or other == ""

    __hash__ = Null.__hash__

    __str__, __len__, __format__, __contains__ = map(_as_empty, ("__str__", "__len__", "__format__", "__contains__"))
    __add__, __mul__, __rmul__, __mod__ = map(_as_empty, ("__add__", "__mul__", "__rmul__", "__mod__"))
    __lt__, __le__, __gt__, __ge__ = map(_as_empty, ("__lt__", "__le__", "__gt__", "__ge__"))

    def __radd__(self, other: Any) -> Any:
        return other + ""


NULLS: dict[Nulls, type[Null]] = {"error": Null, "empty": EmptyNull}
"""The class of nulls for each value of input.nulls."""
