"""The demo's tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from portattn.bench.demo import PatternResult
    from portattn.bench.demo_peers import PeerResult


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"


def pattern_table(own: PatternResult, peers: list[PeerResult]) -> Table:
    """One mask: portattn and its peers, a line each."""
    table = Table(
        title=f"{own.pattern}, {own.density:.2%} of the pairs kept", title_justify="left"
    )
    table.add_column("with", no_wrap=True)
    for name in ("rows", "time s", "rows/s", "extra MiB", "max error", "portattn"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(
        "portattn",
        f"{own.rows:,}",
        f"{own.seconds:.2f}",
        f"{own.rows_per_second:,.0f}",
        _mib(own.extra_bytes),
        f"{own.error:.1e}",
        "",
        style="bold",
    )
    for peer in peers:
        table.add_row(
            peer.peer,
            f"{peer.rows:,}",
            f"{peer.seconds:.2f}",
            f"{peer.rows_per_second:,.0f}",
            _mib(peer.extra_bytes),
            f"{peer.error:.1e}",
            f"{own.rows_per_second / peer.rows_per_second:.1f}x faster",
        )
    table.caption = (
        f"portattn's first call, which plans the mask: {own.first_seconds:.2f} s. "
        f"FlexAttention compiled for {peers[-1].setup_seconds:.1f} s before its first rows."
    )
    table.caption_justify = "left"
    return table
