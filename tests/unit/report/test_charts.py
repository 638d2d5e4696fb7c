import json
import math
import re
from html import unescape
from xml.etree import ElementTree

import pytest

from megatron_rl.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, line_chart, stacked_bars
from megatron_rl.report.scales import Series


def parsed(figure: str) -> ElementTree.Element:
    """The figure as a tree; malformed markup fails here."""
    return ElementTree.fromstring(figure.replace(" hidden>", ' hidden="">'))


def of_class(figure: str, name: str) -> list[ElementTree.Element]:
    return [element for element in parsed(figure).iter() if name in element.get("class", "").split()]


def coordinates(path: str) -> list[list[tuple[float, float]]]:
    """The points of each stretch of an M...L... path."""
    return [
        [tuple(map(float, point.split())) for point in stretch.rstrip("z").split("L")]
        for stretch in path.split("M")[1:]
    ]


def hover_points(figure: str) -> dict:
    return json.loads(unescape(re.search('data-points="([^"]*)"', figure).group(1)))


def test_a_line_goes_through_its_points():
    figure = line_chart("Loss", [0, 5, 10], [Series("", [0.0, 1.0, 0.5])])
    (line,) = of_class(figure, "line")
    bottom, middle = HEIGHT - BOTTOM, LEFT + (WIDTH - LEFT - RIGHT) / 2
    # The axis is 0 to 1: the least number at the bottom, the greatest at the top.
    assert coordinates(line.get("d")) == [[(LEFT, bottom), (middle, TOP), (WIDTH - RIGHT, (bottom + TOP) / 2)]]
    assert len(of_class(figure, "dot")) == 3


def test_a_line_breaks_at_a_non_finite_number_and_marks_it_but_not_at_a_missing_one():
    figure = line_chart("Loss", [1, 2, 3, 4, 5], [Series("", [1.0, math.nan, 2.0, None, 3.0])])
    (line,) = of_class(figure, "line")
    assert [len(stretch) for stretch in coordinates(line.get("d"))] == [1, 2]
    (mark,) = of_class(figure, "broken")
    # Step 2 is a fourth of the way; the cross is 6 wide.
    assert mark.get("d").startswith(f"M{LEFT + (WIDTH - LEFT - RIGHT) / 4 - 3:.1f} ")
    assert hover_points(figure)["series"][0]["values"] == [1.0, "not finite", 2.0, None, 3.0]


def test_one_non_finite_step_of_thousands_is_still_marked():
    values = [1.0] * 3000
    values[1500] = math.inf
    assert len(of_class(line_chart("Loss", list(range(3000)), [Series("", values)]), "broken")) == 1


def test_a_band_goes_up_one_side_and_back_the_other():
    figure = line_chart("Reward", [0, 1], [Series("", [1.0, 1.0], low=[0.0, 0.0], high=[2.0, 1.5])])
    ((left_up, right_up, right_down, left_down),) = coordinates(of_class(figure, "band")[0].get("d"))
    assert (left_up[0], left_down[0], right_up[0], right_down[0]) == (LEFT, LEFT, WIDTH - RIGHT, WIDTH - RIGHT)
    assert left_up[1] == TOP
    assert left_down[1] == right_down[1] == HEIGHT - BOTTOM
    # 1.5 on an axis from 0 to 2 is three fourths up.
    assert right_up[1] == HEIGHT - BOTTOM - 0.75 * (HEIGHT - TOP - BOTTOM)


def test_a_long_run_is_drawn_with_few_points_that_name_their_steps():
    values = [float(step % 10) for step in range(1, 2001)]
    figure = line_chart("Loss", list(range(1, 2001)), [Series("", values)])
    points = hover_points(figure)
    assert len(points["x"]) == 160
    # 2,000 / 160 = 12.5: the first bucket has twelve steps, the last thirteen.
    assert (points["steps"][0], points["steps"][-1]) == ("1\u201312", "1988\u20132000")
    labels = [element.text for element in of_class(figure, "tick")]
    assert labels[-4:] == ["500", "1,000", "1,500", "2,000"]


@pytest.mark.parametrize("steps", [[0], [1], [7, 8], [0, 1_000_000]])
def test_any_number_of_steps_is_drawn_inside_the_plot(steps):
    series = [Series("a", [1.0 + index for index in range(len(steps))])]
    for figure in (line_chart("Loss", steps, series), stacked_bars("Time", steps, series)):
        for element in of_class(figure, "tick") + of_class(figure, "dot"):
            assert 0 <= float(element.get("x", element.get("cx"))) <= WIDTH
        assert len({element.text for element in of_class(figure, "tick")}) >= 2


def test_stacked_bars_stand_on_each_other_and_say_their_shares():
    parts = [
        Series("generate", [6.0, 6.0], color=0),
        Series("train", [2.0, 2.0], color=4),
        Series("idle", [0.0, None], color=5),
    ]
    figure = stacked_bars("Time", [1, 2], parts, unit_name="seconds")
    # 12 of 16 seconds, 4 of 16.
    assert [key.text for key in of_class(figure, "key")] == ["generate 75%", "train 25%", "idle 0%"]
    tops = {}
    for bar in of_class(figure, "bar"):
        tops[bar.get("class")] = [
            (float(y), float(v)) for y, v in re.findall(r"M\S+ (\S+?)h\S+?V(\S+?)h", bar.get("d"))
        ]
    plot = HEIGHT - TOP - BOTTOM
    bottom, six, eight = HEIGHT - BOTTOM, HEIGHT - BOTTOM - 6 / 8 * plot, TOP
    assert tops["bar c0"] == [(bottom, six)] * 2
    assert tops["bar c5"] == []
    assert tops["bar c4"] == [(six, eight)] * 2


def test_texts_are_escaped():
    evil = '<script>alert(1)</script> & "quotes"'
    figure = line_chart(evil, [1], [Series(evil, [1.0]), Series("b", [2.0])], unit_name=evil)
    assert "<script" not in figure
    assert parsed(figure).find("figcaption/h3").text.strip() == evil
    assert hover_points(figure)["series"][0]["label"] == evil
