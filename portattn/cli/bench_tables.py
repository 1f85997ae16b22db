"""The tables of ``portattn bench``."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

_COLUMNS = {
    "time": {
        "TFLOP/s": ("tflops", "{:.4g}"),
        "of matmul": ("of_matmul", "{:.1%}"),
        "of roofline": ("of_roofline", "{:.1%}"),
        "of read": ("of_read", "{:.1%}"),
        "in passes": ("of_read_in_passes", "{:.1%}"),
        "of own dense": ("of_own_dense", "{:.2f}"),
        "new mask ms": ("new_mask_ms", "{:.3f}"),
        "planning ms": ("planning_ms", "{:.3f}"),
    },
    "bandwidth": {
        "TB/s": ("tbps", "{:.3g}"),
        "of read": ("of_read", "{:.1%}"),
        "of roofline": ("of_roofline", "{:.1%}"),
    },
    "host": {},
}


def row_table(row: dict[str, Any]) -> Group:
    """One row: a line for each contender, the fastest first, and why others did not run."""
    parts: list[Table | Text] = []
    if "error" in row:
        return Group(Text(f"{row['name']}: {row['error']}", "bold red"))
    found = row["contenders"]
    if found:
        parts.append(_table(row, found))
    else:
        parts.append(Text(row["name"], "bold"))
    for name, why in row["not_run"].items():
        parts.append(Text(f"  {name}: {why}", "yellow"))
    return Group(*parts)


def _table(row: dict[str, Any], found: dict[str, dict[str, Any]]) -> Table:
    metric = row["workload"]["metric"]
    key = "host_us" if metric == "host" else "median_ms"
    unit = "us" if metric == "host" else "ms"
    columns = {
        title: (field, form)
        for title, (field, form) in _COLUMNS[metric].items()
        if any(field in one for one in found.values())
    }
    bounds = row["roofline"]
    title = f"{row['name']}  [{row['seconds']:.1f} s]"
    if metric != "host":
        title += f"  roofline {bounds['least_ms']:.4g} ms ({bounds['bound']})"
    table = Table(title=Text(title, "bold"), title_justify="left", box=None, pad_edge=False)
    table.add_column("with", no_wrap=True)
    for heading in (unit, "p20", "p80", *columns, "of best peer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, one in sorted(found.items(), key=lambda item: item[1][key]):
        values = [f"{one[key]:.4g}", f"{one[f'p20_{unit}']:.4g}", f"{one[f'p80_{unit}']:.4g}"]
        values += [
            form.format(one[field]) if field in one else "" for field, form in columns.values()
        ]
        ratio = f"{one['of_best_peer']:.3f}" if "of_best_peer" in one else ""
        table.add_row(name, *values, ratio, style="bold" if one["is_own"] else "")
    return table


def summary_table(rows: list[dict[str, Any]]) -> Table:
    """All rows, a line each: every contender's median, and the best kernel of the best peer."""
    rows = [row for row in rows if row.get("contenders")]
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    title = "medians in ms (host: us); the last column above 1: portattn is faster than every peer"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    # Names are as long as eight numbers: they stand in a list of their own, by number.
    heads = [f"[{index}]" for index in range(1, len(names) + 1)]
    table.add_column(no_wrap=True)
    for _ in range(len(names) + 1):
        table.add_column(justify="right", no_wrap=True)
    table.add_row("", *heads, "ratio", style="bold")
    for row in rows:
        found = row["contenders"]
        key = "host_us" if row["workload"]["metric"] == "host" else "median_ms"
        cells = [f"{found[name][key]:.4g}" if name in found else "-" for name in names]
        best = found.get(row.get("best_own"), {})
        ratio = f"{best['of_best_peer']:.3f}" if "of_best_peer" in best else "-"
        table.add_row(row["name"], *cells, ratio)
    table.caption = ", ".join(f"[{index}] {name}" for index, name in enumerate(names, 1))
    table.caption_justify = "left"
    return table
