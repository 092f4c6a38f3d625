"""Conditions over columns, as recipes write them: parsed, checked, and turned into SQL. Nothing is evaluated as Python.

    source == "photos" and short_side >= 512 and not (text_area > 0.2 or faces == 0)

Columns, numbers, strings and True or False; == != < <= > >= in, not in; and, or, not, parentheses. A comparison with a value
that is missing is false.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

from model.names import closest
from tasks.curation.decisions.engines import quoted
from tasks.curation.scorers.base import SCALARS

# Column -> its SQL (DuckDB and Spark).
NUMBERS = {
    **{name: name for name in ("width", "height", "num_bytes", "bytes_per_pixel", "entropy_bits")},
    **{name: name for name in ("single_color_fraction", "border_fraction", *SCALARS)},
    "short_side": "least(width, height)",
    "long_side": "greatest(width, height)",
    "aspect_ratio": "(CAST(width AS DOUBLE) / height)",
    "pixels": "(CAST(width AS DOUBLE) * height)",
    "min_words": "coalesce(array_min(words), 0)",  # of the captions, also of those that are too long to be kept
    "max_words": "coalesce(array_max(words), 0)",
}
TEXTS = {name: name for name in ("source", "format", "mode", "ext", "tier")}
BOOLEANS = {"synthetic": "synthetic"}
COLUMNS = {**NUMBERS, **TEXTS, **BOOLEANS}
_COMPARISONS = {ast.Eq: "=", ast.NotEq: "<>", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
MAX_LENGTH = 2000


class Condition:
    """A parsed condition.

    Args:
        text: as the user wrote it.
        key: of the recipe, for messages.
        tier: SQL of the tier, which is no column of scores.

    Raises:
        ValueError: not a condition of this language; names the part, and what would be valid.
    """

    def __init__(self, text: str, key: str = "condition", tier: str = "tier") -> None:
        self.text, self.key, self._tier = text, key, tier
        if len(text) > MAX_LENGTH:
            raise self._error(f"has {len(text)} characters; at most {MAX_LENGTH} are allowed")
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error)
            raise self._error(f"is not a condition ({reason}); write for example short_side >= 512") from None
        self._names: dict[str, None] = {}
        try:
            self.sql = self._boolean(tree.body)
        except RecursionError:
            raise self._error("is nested too deeply") from None
        self.columns = tuple(self._names)

    def _error(self, what: str) -> ValueError:
        shown = self.text if len(self.text) < 120 else self.text[:117] + "..."
        return ValueError(f"{self.key}={shown!r} {what}")

    def _boolean(self, node: ast.expr) -> str:
        if isinstance(node, ast.BoolOp):
            word = " AND " if isinstance(node.op, ast.And) else " OR "
            return f"({word.join(self._boolean(value) for value in node.values)})"
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return f"(NOT {self._boolean(node.operand)})"
        if isinstance(node, ast.Name):
            name = self._column(node)
            if name not in BOOLEANS:
                raise self._error(f"takes {name} for a condition; compare it, such as {name} >= 1")
            return f"COALESCE({BOOLEANS[name]}, FALSE)"
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = zip(sides, node.ops, sides[1:], strict=False)
            return f"({' AND '.join(self._compare(*pair) for pair in pairs)})"
        raise self._error(f"has {ast.unparse(node)!r}, which is neither a comparison nor and, or, not")

    def _compare(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> str:
        if isinstance(operator, (ast.In, ast.NotIn)):
            if not isinstance(left, ast.Name) or not isinstance(right, (ast.List, ast.Tuple)) or not right.elts:
                raise self._error(f"must compare a column with a list, such as {ast.unparse(left)} in ['a', 'b']")
            name = self._column(left)
            listed = ", ".join(self._value(item, _kind(name)) for item in right.elts)
            sql = f"COALESCE({self._sql(name)} IN ({listed}){self._present(name)}, FALSE)"
            return sql if isinstance(operator, ast.In) else f"(NOT {sql})"
        if type(operator) not in _COMPARISONS:
            raise self._error("may compare with == != < <= > >= in, not in")
        names = [self._column(side) for side in (left, right) if isinstance(side, ast.Name)]
        kinds = {_kind(name) for name in names}
        if len(names) == 0 or len(kinds) > 1:
            raise self._error(
                f"compares {ast.unparse(left)} with {ast.unparse(right)}; a column and a value, or two columns of a kind, "
                "can be compared"
            )
        (kind,) = kinds
        if kind != "number" and not isinstance(operator, (ast.Eq, ast.NotEq)):
            raise self._error(f"orders {names[0]}, which can only be compared by == and !=")
        shown = [self._sql(s.id) if isinstance(s, ast.Name) else self._value(s, kind) for s in (left, right)]
        present = "".join(self._present(name) for name in names)
        return f"COALESCE({shown[0]} {_COMPARISONS[type(operator)]} {shown[1]}{present}, FALSE)"

    def _sql(self, name: str) -> str:
        return self._tier if name == "tier" else COLUMNS[name]

    def _present(self, name: str) -> str:
        """In SQL, NaN is the largest number; here it is a missing one."""
        return f" AND NOT isnan(CAST({COLUMNS[name]} AS DOUBLE))" if name in NUMBERS else ""

    def _column(self, node: ast.Name) -> str:
        if node.id not in COLUMNS:
            near = closest(node.id, COLUMNS)
            hint = f"did you mean {near!r}? " if near else ""
            raise self._error(f"names the column {node.id!r}, which there is not; {hint}Columns: {', '.join(COLUMNS)}")
        self._names[node.id] = None
        return node.id

    def _value(self, node: ast.expr, kind: str) -> str:
        sign = ""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            node, sign = node.operand, "-"
        value = node.value if isinstance(node, ast.Constant) else None
        if kind == "number" and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
            return f"{sign}{value!r}"
        if kind == "text" and isinstance(value, str) and not sign and value.isprintable():
            return quoted(value)
        if kind == "boolean" and isinstance(value, bool) and not sign:
            return str(value).upper()
        raise self._error(f"has {ast.unparse(node)!r} where a {kind} is needed")


def _kind(name: str) -> str:
    return "number" if name in NUMBERS else "text" if name in TEXTS else "boolean"


def case_sql(conditions: Sequence[tuple[str, Condition]], otherwise: str) -> str:
    """SQL of the name of the first condition that holds, else `otherwise`. Names must need no quoting."""
    whens = "".join(f" WHEN {condition.sql} THEN '{name}'" for name, condition in conditions)
    return f"CASE{whens} ELSE '{otherwise}' END" if whens else f"'{otherwise}'"
