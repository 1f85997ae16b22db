"""The model of the untried configs."""

import itertools

import numpy as np

from portattn.tuner.model import coordinates, distances, most_promising


def test_fields_lie_between_0_and_1_and_unordered_values_are_all_alike():
    found = coordinates([(0, 0), (2, 1), (4, 2)], [True, False])
    assert distances(found, found).tolist() == [[0, 1.5, 2], [1.5, 0, 1.5], [2, 1.5, 0]]


def test_the_largest_promise_lies_where_a_smooth_surface_falls():
    points = list(itertools.product(range(9), range(9), range(2)))
    places = coordinates(points, [True, True, False])
    apart = distances(places, places)
    times = [1000 * (1 + 0.1 * abs(x - 6) + 0.1 * abs(y - 2) + 0.3 * z) for x, y, z in points]
    known = [points.index(one) for one in itertools.product((0, 4, 8), (0, 4, 8), (0, 1))]
    for _ in range(6):
        untried = [index for index in range(len(points)) if index not in known]
        between, across = apart[np.ix_(known, known)], apart[np.ix_(known, untried)]
        chosen = most_promising(between, [times[one] for one in known], across)
        known.append(untried[chosen])
    assert points.index((6, 2, 0)) in known


def test_equal_times_and_many_measurements_are_no_obstacle():
    places = coordinates([(x, x % 7) for x in range(400)], [True, True])
    apart = distances(places, places)
    assert 0 <= most_promising(apart[:300, :300], [5.0] * 300, apart[:300, 300:]) < 100
    assert most_promising(apart[:2, :2], [1.0, 2.0], apart[:2, 2:3]) == 0
