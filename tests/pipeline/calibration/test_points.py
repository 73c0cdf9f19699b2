"""Tests of the points of a grid and of their order."""

from pipeline.calibration.points import AR, Point, Setting, order_points

OWN = Point(Setting("diffusion", 0.85, 16), 8)
THRESHOLDS, STEPS, ROWS = (0.7, 0.8, 0.9, 0.95, 0.99), (4, 8, 16), (1, 16, 256)


def test_every_point_of_the_grid_and_the_own_one_is_there_once() -> None:
    points = order_points(THRESHOLDS, STEPS, ROWS, OWN)
    assert len(points) == len(set(points)) == (1 + 1 + 5 * 3) * 4  # AR, own setting, grid; at each limit and its own
    assert len({point.name for point in points}) == len(points)


def test_ar_and_the_own_setting_come_first() -> None:
    points = order_points(THRESHOLDS, STEPS, ROWS, OWN)
    assert points[:4] == (Point(AR, 256), Point(OWN.setting, 256), Point(AR, 8), OWN)


def test_a_setting_is_measured_at_the_largest_row_limit_before_others() -> None:
    seen: set[Setting] = set()
    for point in order_points(THRESHOLDS, STEPS, ROWS, OWN):
        assert point.max_rows == 256 or point.setting in seen
        seen.add(point.setting)


def test_what_is_measured_first_spans_the_grid() -> None:
    points = order_points(THRESHOLDS, STEPS, (16,), Point(AR, 16))
    diffusion = [(point.setting.threshold, point.setting.steps) for point in points if point.setting != AR]
    assert diffusion[:3] == [(0.99, 16), (0.99, 4), (0.7, 16)]
    assert {threshold for threshold, _ in diffusion[:6]} == {0.7, 0.9, 0.99}
    assert diffusion[-1] in [(0.95, 8), (0.8, 8)]


def test_one_value_of_each_is_a_grid_too() -> None:
    points = order_points((0.8,), (16,), (4, 4), Point(AR, 4))
    assert points == (Point(AR, 4), Point(Setting("diffusion", 0.8, 16), 4))
