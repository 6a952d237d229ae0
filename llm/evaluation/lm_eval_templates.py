"""Templates of task files for lm-eval: expressions over a row, whose time and size stay in proportion to the row.

Jinja's sandbox keeps a template from reaching Python's internals, but not from looping for ever or filling the memory. So a
template may hold only what is listed here.
"""

from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

ALLOWED = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.Name,
    nodes.Const,
    nodes.List,
    nodes.Tuple,
    nodes.Dict,
    nodes.Pair,
    nodes.Getattr,
    nodes.Getitem,
    nodes.Slice,
    nodes.Call,
    nodes.Filter,
    nodes.If,
    nodes.CondExpr,
    nodes.For,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Add,
    nodes.Sub,
    nodes.Neg,
    nodes.Concat,
    nodes.Test,
)
FILTERS = {
    "trim",
    "lower",
    "upper",
    "title",
    "capitalize",
    "first",
    "last",
    "length",
    "count",
    "int",
    "float",
    "string",
    "list",
    "default",
    "d",
    "join",
    "replace",
    "sort",
    "unique",
    "reverse",
}
METHODS = {
    "strip",
    "lstrip",
    "rstrip",
    "lower",
    "upper",
    "title",
    "capitalize",
    "split",
    "index",
    "find",
    "startswith",
    "endswith",
    "get",
    "keys",
    "values",
    "items",
    "join",
    "replace",
}
MOST_JOINS = 2  # each may repeat its separator for every character


def bounded_template(text: str) -> str:
    """The template; ValueError if it holds anything else than what is listed above."""
    try:
        tree = ImmutableSandboxedEnvironment().parse(text)
    except (TemplateError, RecursionError, OverflowError) as error:
        raise ValueError(f"expected a Jinja template: {error}") from error
    joins = 0
    for node in tree.find_all(nodes.Node):
        name, arguments = _called(node)
        if not isinstance(node, ALLOWED) or (name is None and isinstance(node, nodes.Call)):
            raise ValueError(f"expected a template of plain expressions, if and one for, got {type(node).__name__}")
        if name is not None and name not in (FILTERS if isinstance(node, nodes.Filter) else METHODS):
            raise ValueError(f"expected a template of plain filters and methods, got {name!r}")
        if name == "replace" and not _shortens(arguments):
            raise ValueError("expected a replace(old, new) of two texts, the new one not longer, got another")
        if isinstance(node, nodes.Getattr | nodes.Name) and str(getattr(node, "attr", getattr(node, "name", ""))).startswith(
            "_"
        ):
            raise ValueError("expected a template of plain names, got one that begins with _")
        if isinstance(node, nodes.For) and any(node.find_all(nodes.For)):
            raise ValueError("expected a template with one for, got another inside of it")
        joins += name == "join"
    if joins > MOST_JOINS:
        raise ValueError(f"expected a template with at most {MOST_JOINS} join, got {joins}")
    return text


def _called(node: nodes.Node) -> tuple[str | None, list[Any]]:
    """The name of a filter or of a method that is called, and its arguments."""
    if isinstance(node, nodes.Filter):
        return node.name, node.args
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and not (node.dyn_args or node.dyn_kwargs):
        return node.node.attr, node.args
    return None, []


def _shortens(arguments: list[Any]) -> bool:
    texts = [one.value for one in arguments[:2] if isinstance(one, nodes.Const) and isinstance(one.value, str)]
    return len(texts) == 2 and 0 < len(texts[0]) >= len(texts[1])
