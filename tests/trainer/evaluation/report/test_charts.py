"""Charts say what they show, and leave out what says nothing."""

import re

from darht.trainer.evaluation.report import charts


def test_the_calibration_line_leaves_out_bins_of_few_images():
    drawn = charts.reliability([(0.1, 1.0, 1), (0.3, 0.2, 4), (0.5, 0.5, 5), (0.9, 0.95, 90)])
    line = re.search(r'<polyline class="line" points="([^"]*)"', drawn)
    assert line is not None and len(line[1].split()) == 2
    assert drawn.count("dot see") == 4


def test_classes_show_per_cent():
    row = {"class": "cat", "count": 5, "clean": 4, "robust": 1, "clean_interval95": [1, 2], "robust_interval95": [1, 2]}
    assert ">20 % (80 %)</text>" in charts.class_bars([row])


def test_a_class_without_images_says_so():
    row = {"class": "c<t", "count": 0, "clean": 0, "robust": 0, "clean_interval95": [0, 1], "robust_interval95": [0, 1]}
    drawn = charts.class_bars([row])
    assert ">no images</text>" in drawn and "<title>c&lt;t: no images</title>" in drawn and 'class="bar"' not in drawn


def test_a_comparison_has_an_axis_that_its_bars_stand_on():
    ticks = re.findall(r'<text x="([0-9.]+)"[^>]*>(\d+) %', charts.compared_axis())
    assert [name for _, name in ticks] == ["0", "20", "40", "60", "80", "100"]
    bars = charts.compared(80.0, 40.0, (30.0, 60.0))
    starts = {float(at) for at in re.findall(r'<rect[^>]* x="([0-9.]+)"', bars)}
    assert starts == {float(ticks[0][0])}
    clean, worst = (float(wide) for wide in re.findall(r'<rect[^>]* width="([0-9.]+)"', bars))
    assert abs(float(ticks[0][0]) + clean - float(ticks[4][0])) < 0.2
    assert abs(float(ticks[0][0]) + worst - float(ticks[2][0])) < 0.2
