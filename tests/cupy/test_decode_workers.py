"""How many blocks the decode kernel launches."""

import pytest

from portattn.backends.cupy.decode import even_workers


@pytest.mark.parametrize(
    ("num_rows", "most", "expected"),
    [
        (128, 132, 128),  # a row for each block
        (1024, 132, 128),  # eight rows for each
        (8, 132, 128),  # sixteen blocks for each row
        (40, 132, 120),
        (132, 132, 132),
        (131, 132, 131),
        (50, 132, 132),  # no even count within a tenth
        (7, 1, 1),
        (1, 5, 5),
    ],
)
def test_shares_end_with_rows_where_a_tenth_of_the_blocks_suffices(
    num_rows: int, most: int, expected: int
) -> None:
    assert even_workers(num_rows, most) == expected
