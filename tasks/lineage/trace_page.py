"""The lineage of an artifact as one self-contained HTML page: a drawing, and a table with every digest."""

from __future__ import annotations

from typing import Any

from eval.html_page import Markup, page, table, text

BOX_W, BOX_H, GAP_X, GAP_Y = 190, 46, 60, 18  # px
STYLE = "body{max-width:none}rect{fill:#f4f6fa;stroke:#8a94a6}path{fill:none;stroke:#8a94a6}text{font-size:12px}"
COLUMNS = ("kind", "digest", "counts", "files", "parts", "made from", "made by", "at")


def trace_page(story: dict[str, Any]) -> str:
    """The page for the result of `tasks.trace.describe`."""
    nodes = {node["digest"]: node for node in story["nodes"]}
    records = story["records"]
    root = nodes[story["root"]]
    return page(
        f"Lineage of {root['kind']} {root['digest'][:12]}",
        f"<h1>Lineage of {text(root['kind'])} <code>{text(root['digest'])}</code></h1>"
        f"<p>{records['input']:,} records in the ledger, {records['kept']:,} kept, {records['used']:,} with latents. "
        "Every file and part was read and compared when this page was made.</p>"
        f"{_drawing(story['root'], nodes)}"
        f"{table(COLUMNS, map(_row, story['nodes']))}",
        STYLE,
    )


def _row(node: dict[str, Any]) -> tuple:
    counts = ", ".join(f"{value:,} {name}" for name, value in node["counts"].items())
    made_by = ", ".join(f"{name} {value}" for name, value in node["made_by"].items())
    parents = " ".join(f'<a href="#{text(digest)}">{text(digest[:12])}</a>' for digest in node["parents"])
    digest = text(node["digest"])
    return (
        node["kind"],
        Markup(f'<code id="{digest}">{digest}</code>'),
        counts,
        f"{node['files']:,} ({node['bytes']:,} bytes)",
        len(node["parts"]),
        Markup(parents),
        made_by,
        Markup(f"<code>{text(node['path'])}</code>"),
    )


def _drawing(root: str, nodes: dict[str, Any]) -> str:
    """Boxes in columns by their distance from the root, and lines to their parents. Directories of one kind in one column
    that have the same children are one box: a corpus may have thousands of parents."""
    depth = {root: 0}
    order = [root]
    for digest in order:  # grows: a node is placed after the last of its children
        for parent in nodes[digest]["parents"]:
            if depth.get(parent, -1) < depth[digest] + 1:
                depth[parent] = depth[digest] + 1
                order.append(parent)
    children: dict[str, set[str]] = {}
    for digest, node in nodes.items():
        for parent in node["parents"]:
            children.setdefault(parent, set()).add(digest)
    boxes: dict[tuple, list[str]] = {}
    for digest in dict.fromkeys(order):
        key = (depth[digest], nodes[digest]["kind"], tuple(sorted(children.get(digest, ()))))
        boxes.setdefault(key, []).append(digest)
    at: dict[str, tuple[int, int]] = {}
    filled: dict[int, int] = {}
    shapes, lines = [], []
    for (column, kind, _), members in boxes.items():
        x, y = column * (BOX_W + GAP_X) + 4, filled.get(column, 0) * (BOX_H + GAP_Y) + 4
        filled[column] = filled.get(column, 0) + 1
        at |= dict.fromkeys(members, (x, y))
        name = kind if len(members) == 1 else f"{len(members):,} {kind}"
        counts = ", ".join(f"{value:,} {what}" for what, value in nodes[members[0]]["counts"].items())
        below = members[0][:12] + (f"  {counts}" if counts and len(members) == 1 else "")
        shapes.append(
            f'<a href="#{text(members[0])}"><rect x={x} y={y} width={BOX_W} height={BOX_H} rx=6 />'
            f"<text x={x + 10} y={y + 19} font-weight=bold>{text(name)}</text>"
            f"<text x={x + 10} y={y + 36}>{text(below[:30])}</text></a>"
        )
    drawn = {(at[digest], at[parent]) for digest, node in nodes.items() for parent in node["parents"]}
    for (x, y), (to_x, to_y) in sorted(drawn):
        x, y, to_y = x + BOX_W, y + BOX_H // 2, to_y + BOX_H // 2
        middle = (x + to_x) // 2
        lines.append(f'<path d="M{x} {y}C{middle} {y} {middle} {to_y} {to_x} {to_y}" />')
    width = (max(filled) + 1) * (BOX_W + GAP_X)
    height = max(filled.values()) * (BOX_H + GAP_Y) + 8
    return f'<svg width="{width}" height="{height}" role=img aria-label=Lineage>{"".join(lines + shapes)}</svg>'
