"""The conformance suite on the emulated kernel: cases that walk every branch of the device code.

All cases in all dtypes take a quarter of an hour here; on a GPU `portattn verify --backend cupy`
runs them.
"""

import pytest

from portattn.conformance import check

# (case, dtype): each dtype has few compiled variants, which take most of the time.
CASES = [
    ("causal_end", "float16"),
    ("causal_negative_offset", "float16"),
    ("cut_rows_causal", "float16"),
    ("gqa_7", "float16"),
    ("padded", "float16"),
    ("scale_0", "float16"),
    ("scale_negative", "float16"),
    ("sinks_passes", "float16"),
    ("longformer_dilated", "float16"),
    ("documents_end", "float16"),
    ("padding_empty", "float16"),
    ("empty_piece", "float16"),
    ("empty_all", "float16"),
    ("empty_window_one_pass", "float16"),
    ("segments_batch", "float16"),
    ("per_head_passes", "float16"),
    ("nan_value", "float16"),
    ("length_1", "bfloat16"),
    ("sinks_cut_rows", "bfloat16"),
    ("head_dim_odd", "bfloat16"),
    ("head_dim_256", "bfloat16"),
    ("value_wider", "bfloat16"),
    ("all_terms", "bfloat16"),
    ("dense_short", "float32"),
    ("strided_odd", "float32"),
    ("per_batch", "float32"),
    ("softcap_scale_negative", "float32"),
    ("bias_inf_row", "float32"),
]


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_case(emulated_kernels, case, dtype):
    # Odd cases run with everything reversed: over the list both orders see each dtype.
    kernel = emulated_kernels[CASES.index((case, dtype)) % 2]
    assert check(kernel, case, dtype).status == "pass"


def test_kv_lengths_are_refused_with_a_reason(emulated_kernels):
    refused = check(emulated_kernels[0], "kv_lengths", "float16")
    assert refused.status == "refused"
    assert "kv_lengths" in refused.detail
