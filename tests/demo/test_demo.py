"""The demo's parts at a small size."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from portattn import attention
from portattn.bench import demo as measure
from portattn.bench import demo_measure, demo_patterns, demo_peers, demo_text
from portattn.cli import demo as command
from portattn.cli.demo_tables import pattern_table

TOKENS = 1200


@pytest.fixture(scope="module")
def inputs():
    return demo_text.layer_input(TOKENS)


@pytest.fixture(scope="module")
def rows():
    return demo_peers.sampled_rows(TOKENS, 32)


def test_layer_input_is_that_of_the_model():
    model, tokenizer = demo_text.load_model()
    text = "\n\n".join(demo_text.topics())
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:512]
    seen = {}
    layer = model.encoder.layer[0].attention.self
    layer.query.register_forward_hook(lambda *call: seen.update(query=call[2]))
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]))
    query = demo_text.layer_input(512).query
    torch.testing.assert_close(query.transpose(1, 2).flatten(2), seen["query"])


def test_text_is_long_enough_for_the_demo():
    _, tokenizer = demo_text.load_model()
    text = "\n\n".join(demo_text.topics())
    assert len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) >= 100_000


@pytest.mark.parametrize("pattern", demo_patterns.patterns(), ids=lambda p: p.name)
@pytest.mark.parametrize("offset", [0, 300])
def test_flex_predicate_says_what_the_mask_says(pattern, offset):
    keeps = pattern.flex(torch.tensor(offset), TOKENS)
    i, j = torch.arange(TOKENS - offset)[:, None], torch.arange(TOKENS)[None]
    expected = pattern.mask.to_dense(TOKENS - offset, TOKENS, q_offset=offset)
    assert torch.equal(torch.broadcast_to(keeps(0, 0, i, j), expected.shape), expected)


@pytest.mark.parametrize("pattern", demo_patterns.patterns(), ids=lambda p: p.name)
def test_exact_rows_against_the_reference(inputs, pattern, rows):
    exact = demo_measure.exact_rows(inputs, pattern.mask, rows)
    parts = [t.double() for t in (inputs.query, inputs.key, inputs.value)]
    output = attention(*parts, pattern.mask, backend="reference")
    assert exact.error(output) < 1e-12


def test_error_compares_the_rows_that_an_output_has(inputs, rows):
    exact = demo_measure.exact_rows(inputs, None, rows)
    whole = torch.zeros(1, 12, TOKENS, 32, dtype=torch.float64)
    whole[:, :, rows] = exact.output
    first = int(rows[10])
    part = whole[:, :, first : int(rows[20]) + 1].clone()
    assert exact.error(part, first) == 0
    part[0, 3, int(rows[15]) - first, 7] += 0.5
    assert exact.error(part, first) == pytest.approx(0.5)


@pytest.mark.parametrize("pattern", demo_patterns.patterns(), ids=lambda p: p.name)
def test_portattn_and_sdpa_on_one_pattern(inputs, pattern, rows):
    exact = demo_measure.exact_rows(inputs, pattern.mask, rows)
    own = measure.run_portattn(inputs, pattern, exact)
    peer = demo_peers.sdpa_masked(inputs, pattern, exact, seconds=0)
    assert own.rows == TOKENS
    assert own.error < 1e-5
    assert peer.error < 1e-5
    assert peer.rows_per_second > 0


def test_all_peers_in_one_table(inputs, rows):
    pattern = demo_patterns.patterns()[2]
    dense = measure.run_dense(inputs, rows, seconds=0)
    own, peers = measure.run_pattern(inputs, pattern, rows, seconds=0)
    assert [peer.peer for peer in (dense, *peers)] == [
        "SDPA, dense",
        "SDPA, mask",
        "FlexAttention",
    ]
    assert max(peer.error for peer in (dense, *peers)) < 1e-5
    shown = io.StringIO()
    Console(width=120, file=shown).print(pattern_table(own, [dense, *peers]))
    assert shown.getvalue().count("x faster") == 3


def test_chunks_are_spread_and_inside():
    starts = demo_peers.chunk_starts(100_000, demo_peers.FLEX_ROWS)
    assert sorted(starts) == list(range(0, 100_000 - demo_peers.FLEX_ROWS + 1, 2048))
    assert starts != sorted(starts)
    assert demo_peers.chunk_starts(1000, 1000) == [0]


def test_extra_bytes_sees_a_large_tensor():
    grown = demo_measure.extra_bytes(lambda: np.ones(64 << 17))  # 64 MiB
    assert 60 << 20 < grown < 80 << 20


def test_pictures_and_plot(inputs, tmp_path):
    settings = command.Settings(tmp_path, TOKENS, 0, 0)
    console = Console(quiet=True)
    command._draw_masks(demo_patterns.patterns(), settings, console)
    command._plot(demo_patterns.patterns()[:1], inputs, settings, console)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == [
        "mask_bigbird.png",
        "mask_longformer.png",
        "mask_sliding_window.png",
        "mask_strided.png",
        "time_against_length.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_figures_are_written(tmp_path):
    settings = command.Settings(tmp_path, TOKENS, 0, 0)
    command._write(settings, {"patterns": [{"pattern": "longformer", "seconds": 1.5}]}, 2.0)
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["benchmark"] == "demo"
    assert found["patterns"][0]["seconds"] == 1.5
    assert {"date", "device", "torch", "portattn", "tokens", "seconds"} <= set(found)
