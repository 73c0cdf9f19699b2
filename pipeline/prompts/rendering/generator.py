"""Makes the code of templates, without evaluating any of their expressions, and collects the names that they read."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, find_undeclared, operators
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.utils import Cycler, Joiner, Namespace

if TYPE_CHECKING:
    from pipeline.prompts.rendering.sandbox import TemplateEnvironment

ROW = "row"
"""The name under which a template reaches columns by any name: {{ row["doc id"] }}."""
MAX_RANGE = 100_000
"""The most numbers of a `range` in a template."""


def bounded_range(*args: int) -> range:
    """Return range(*args). Raises OverflowError if it has more than MAX_RANGE numbers."""
    numbers = range(*args)
    if len(numbers) > MAX_RANGE:
        raise OverflowError(f"range has more than {MAX_RANGE} numbers")
    return numbers


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "range": bounded_range,
    "namespace": Namespace,
    "dict": dict,
    "cycler": Cycler,
    "joiner": Joiner,
}
"""The functions that a template can call, if the input has no column of that name."""
REFUSED_NAMES = {
    "loop": "`loop` exists only inside {% for %}",
    "lipsum": "`lipsum` is not available: it makes random text",
    "caller": "`caller` exists only inside a macro that {% call %} calls",
    "super": "`super` is not available: a template has no parent",
    "varargs": "`varargs` exists only inside a macro",
    "kwargs": "`kwargs` exists only inside a macro",
}
"""Names that jinja2 itself defines in some places, with the reason why a template cannot use them elsewhere."""


class Generator(CodeGenerator):
    """A code generator that evaluates no expression and collects the names that a template reads.

    jinja2's own generator would replace `{{ 'x' * 10 ** 10 }}` by its value.
    """

    environment: "TemplateEnvironment"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer = None
        self.free: set[str] = set()
        """The free names: those that the template reads and does not set."""
        self.assigned: set[str] = set()
        """The names that the template sets itself, perhaps only under a condition."""
        self.row_keys: set[str] = set()
        """The constant keys of `row`, if `row` is a free name."""
        self.whole_row = False
        """Whether the template uses `row` in another way than with a constant key."""

    def enter_frame(self, frame: Any) -> None:
        super().enter_frame(frame)
        # jinja2.meta finds undeclared variables in the same way, but it folds constants.
        self.free.update(name for action, name in frame.symbols.loads.values() if action == "resolve")

    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier, frame: Any) -> None:  # noqa: N802
        del frame
        self.fail("autoescape is not for prompts", node.lineno)

    def visit_Name(self, node: nodes.Name, frame: Any) -> None:  # noqa: N802
        self.whole_row |= _is_free_row(node, frame)
        super().visit_Name(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:  # noqa: N802
        key = node.arg.value if isinstance(node.arg, nodes.Const) else None
        before = self.whole_row
        if isinstance(node.arg, nodes.Slice):
            self._visit_slice(node.node, node.arg, frame)
            return
        super().visit_Getitem(node, frame)
        if _is_free_row(node.node, frame) and isinstance(key, str):
            self.whole_row = before
            self.row_keys.add(key)

    def _visit_slice(self, value: nodes.Expr, part: nodes.Slice, frame: Any) -> None:
        self.write("environment.cut(")
        self.visit(value, frame)
        for bound in (part.start, part.stop, part.step):
            self.write(", ")
            if bound is None:
                self.write("None")
            else:
                self.visit(bound, frame)
        self.write(")")

    def visit_Getattr(self, node: nodes.Getattr, frame: Any) -> None:  # noqa: N802
        before = self.whole_row
        super().visit_Getattr(node, frame)
        if _is_free_row(node.node, frame) and not hasattr(dict, node.attr):
            self.whole_row = before
            self.row_keys.add(node.attr)

    def _refuse(self, node: nodes.Node, frame: Any) -> None:
        del frame
        self.fail(f"{type(node).__name__.lower()} is not available: there are no other templates", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _refuse  # noqa: N815

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:  # noqa: N802
        if "self" in find_undeclared(node.body, ("self",)):  # jinja2 would print an object
            self.fail("`self` is not available; a column of this name is written row['self']", node.lineno)
        assigned: list[Any] = [*node.find_all(nodes.Assign), *node.find_all(nodes.AssignBlock)]
        self.assigned = {name.name for each in assigned for name in each.target.find_all(nodes.Name)}
        self.assigned |= {each.target.name for each in assigned if isinstance(each.target, nodes.Name)}
        self.assigned |= {macro.name for macro in node.find_all(nodes.Macro)}
        super().visit_Template(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:  # noqa: N802
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:  # noqa: N802
        if len(node.ops) == 1 and node.ops[0].op in ("in", "notin"):
            self.write("(not " if node.ops[0].op == "notin" else "(")
            self.write("environment.is_in(")
            self.visit(node.expr, frame)
            self.write(", ")
            self.visit(node.ops[0].expr, frame)
            self.write("))")
            return
        self.write("(")
        self._visit_spelled(node.expr, frame)
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Any) -> None:  # noqa: N802
        self.write(f" {operators[node.op]} ")
        self._visit_spelled(node.expr, frame)

    def _visit_spelled(self, node: nodes.Expr, frame: Any) -> None:
        """Write an expression whose marks become control tokens again, so that it can be compared with cells."""
        if not self.environment.marks:
            self.visit(node, frame)
            return
        self.write("environment.marks.spelled(")
        self.visit(node, frame)
        self.write(")")


def _is_free_row(node: nodes.Node, frame: Any) -> bool:
    if not isinstance(node, nodes.Name) or node.name != ROW or node.ctx != "load":
        return False
    load = frame.symbols.find_load(frame.symbols.ref(ROW))
    return load is not None and tuple(load) == ("resolve", ROW)


class GenerationBlock(Extension):
    """The tag {% generation %} of chat templates. It marks answers for training. Here it is only a scope: a variable
    that is set inside does not exist after it."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 defines it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the nodes inside the tag, in a scope of their own."""
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(inside).set_lineno(line)]
