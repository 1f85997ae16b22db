"""``portattn demo``: the whole of portattn on a real model and a real text."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from portattn.bench.demo_patterns import Pattern
    from portattn.bench.demo_text import LayerInput
    from portattn.tuner import KernelReport

SAMPLED_ROWS = 32
PICTURE_TOKENS = (
    4096  # of a picture's side; the structure of the masks shows, a window is an eighth of it
)
PARAGRAPHS = 24
LOG_WIDTH = 110  # where the output is no terminal


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How long and how far the demo goes.

    Attributes:
        output: folder for pictures and the ONNX file.
        tokens: length of the text.
        tune_seconds: for tuning, in all.
        peer_seconds: for each peer and mask.
    """

    output: Path
    tokens: int
    tune_seconds: float
    peer_seconds: float


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for the pictures and the ONNX file.")
    ] = Path("demo_output"),
    tokens: Annotated[
        int, typer.Option(min=1024, help="Length of the text, in tokens.")
    ] = 100_000,
    tune_seconds: Annotated[float, typer.Option(help="Seconds for tuning; 0 leaves it out.")] = 60,
    peer_seconds: Annotated[float, typer.Option(help="Seconds for each peer on each mask.")] = 10,
) -> None:
    """Run a real model over a real text: tune, attend, compare, export (about 4 minutes)."""
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    if not run(Settings(output, tokens, tune_seconds, peer_seconds), console):
        raise typer.Exit(1)


def run(settings: Settings, console: Console) -> bool:
    """The demo, step by step; whether the model's embeddings agree everywhere."""
    begin = time.perf_counter()
    settings.output.mkdir(parents=True, exist_ok=True)
    from portattn.bench.demo_patterns import patterns
    from portattn.bench.demo_text import layer_input

    chosen = patterns()
    _say(console, "The text: Python's own help topics, through layer 0 of all-MiniLM-L6-v2")
    inputs = layer_input(settings.tokens)
    _, heads, length, head_dim = inputs.query.shape
    console.print(
        f"{length:,} tokens, {heads} heads of {head_dim}, float32; full attention would score"
    )
    console.print(f"{heads * length**2:.1e} pairs. {len(chosen)} sparse masks:")
    _draw_masks(chosen, settings, console)
    if settings.tune_seconds > 0:
        _say(console, f"Tuning this machine for these masks ({settings.tune_seconds:.0f} s)")
        _tune(chosen, inputs, settings, console)
    _say(console, "Attention over the whole text, beside what one would use without portattn")
    found = {"patterns": _compare(chosen, inputs, settings, console)}
    _say(console, "Time against length")
    found["curves"] = _plot(chosen, inputs, settings, console)

    from portattn.cli.demo_model import run_model

    _say(console, "The whole model with portattn as its attention, then the same in ONNX Runtime")
    results = run_model(settings.output, PARAGRAPHS, console)
    found["model"] = [dataclasses.asdict(result) for result in results]
    seconds = time.perf_counter() - begin
    _write(settings, found, seconds)
    console.print(f"\nDone in {seconds:.0f} s. Pictures and figures are in {settings.output}/.")
    return all(result.agrees for result in results)


def _say(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


def _draw_masks(chosen: list[Pattern], settings: Settings, console: Console) -> None:
    side = min(PICTURE_TOKENS, settings.tokens)
    for pattern in chosen:
        path = settings.output / f"mask_{pattern.name}.png"
        pattern.mask.plot(path, side, side)
        console.print(f"  {pattern.name:<15} {pattern.mask}", soft_wrap=True, highlight=False)
        console.print(f"  {'':<15} drawn for the first {side:,} tokens in {path}", highlight=False)


def _tune(chosen: list[Pattern], inputs: LayerInput, settings: Settings, console: Console) -> None:
    from portattn import tuner
    from portattn.tuner import cases

    _, heads, length, head_dim = inputs.query.shape
    plain = cases.parse(f"b1 h{heads} s{length} d{head_dim} float32").problem
    problems = [
        tuner.Case(dataclasses.replace(plain, program=p.mask.program), p.mask) for p in chosen
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=settings.tune_seconds)

        def show(progress: tuner.Progress) -> None:
            name = chosen[progress.problem].name
            text = f"{name}: {progress.kernel} {progress.tried}/{progress.feasible}"
            bar.update(task, completed=progress.elapsed_s, description=text)

        report = tuner.tune(problems, budget_seconds=settings.tune_seconds, progress=show)
    for pattern, problem in zip(chosen, report.problems, strict=False):
        for kernel in problem.kernels:
            line = f"  {pattern.name:<15} {kernel.name}: tried {kernel.tried} of {kernel.feasible}"
            console.print(f"{line}; {_verdict(kernel)}", soft_wrap=True, highlight=False)
    console.print(
        f"  {report.device}; stored in {report.database}", soft_wrap=True, highlight=False
    )


def _verdict(kernel: KernelReport) -> str:
    if kernel.params is None:
        return f"none may run: {kernel.rejected[0][2] if kernel.rejected else 'nothing was tried'}"
    times = f"default {kernel.default_ns / 1e6:,.0f} ms, best {kernel.best_ns / 1e6:,.0f} ms"
    if kernel.kept_default:
        return f"{times} (the default stays)"
    return f"{times}, {kernel.gain:.2f}x: " + ", ".join(
        f"{k}={v}" for k, v in kernel.params.items()
    )


def _compare(
    chosen: list[Pattern], inputs: LayerInput, settings: Settings, console: Console
) -> list[dict[str, Any]]:
    from portattn import explain
    from portattn.bench import demo as measure
    from portattn.bench.demo_peers import sampled_rows
    from portattn.cli.demo_tables import pattern_table

    console.print(
        f"The peers run on as many query rows as {settings.peer_seconds:.0f} s allow, "
        "against all keys. Errors are against float64."
    )
    rows = sampled_rows(inputs.num_tokens, SAMPLED_ROWS)
    dense = measure.run_dense(inputs, rows, settings.peer_seconds)
    found = []
    for pattern in chosen:
        own, others = measure.run_pattern(inputs, pattern, rows, settings.peer_seconds)
        peers = [dense, *others]
        console.print(pattern_table(own, peers))
        found.append(dataclasses.asdict(own) | {"peers": [dataclasses.asdict(p) for p in peers]})
    why = explain(inputs.query, inputs.key, inputs.value, chosen[0].mask)
    console.print(f"What ran for {chosen[0].name}: {why.kernel}, {why.config}, from: {why.rung}")
    return found


def _plot(
    chosen: list[Pattern], inputs: LayerInput, settings: Settings, console: Console
) -> list[dict[str, Any]]:
    from portattn.bench import demo as measure

    path = settings.output / "time_against_length.png"
    curves = measure.time_against_length(inputs, chosen)
    measure.plot_curves(curves, path)
    console.print(f"drawn in {path}")
    return [dataclasses.asdict(curve) for curve in curves]


def _write(settings: Settings, found: dict[str, list[dict[str, Any]]], seconds: float) -> None:
    import torch

    import portattn
    from portattn.device import device_key

    head = {
        "benchmark": "demo",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_key("cpu").name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "portattn": portattn.__version__,
        "tokens": settings.tokens,
        "seconds": seconds,
    }
    text = json.dumps(head | found, indent=2)
    (settings.output / "demo.json").write_text(text + "\n")
