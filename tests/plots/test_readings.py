import io
import itertools
import math

import pytest
from matplotlib.colors import to_rgba

from lightning_sym.plots.readings import layer_colours, layer_styles, log_spaced, summary


def history(steps=(1, 10, 20, 30, 40), layers=("net.0", "net.2", "net.4")):
    rows = []
    for step in steps:
        row = {"step": step, "collapse/score": 0.1, "alignment/mean": 0.4, "alignment/null": 0.1}
        for depth, layer in enumerate(layers):
            row[f"collapse/{layer}/effective_rank"] = 10.0 + depth - step / 100
            row[f"collapse/{layer}/distinct_units"] = 1.0
            row[f"collapse/{layer}/zero_units"] = 0.0
            row[f"alignment/{layer}/in/rga"] = 0.1 * depth + step / 1000
            row[f"alignment/{layer}/in/null"] = 0.05 * (1 + depth)
            row[f"alignment/{layer}/out/rga"] = 0.2
            row[f"alignment/{layer}/out/rga_exponent_r2"] = 0.9
            row[f"plasticity/{layer}/relative_update"] = 10.0 ** (-depth - 1)
            row[f"plasticity/{layer}/dormant_units"] = 0.1 * depth
        row["plasticity/dormant_units"] = 0.1
        rows.append(row)
    return rows


def panels(figure):
    return {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}


def test_neighbours_of_many_layers_differ_in_more_than_colour():
    names = [f"layer.{i}" for i in range(12)]
    styles = layer_styles(names)
    assert all(styles[a] != styles[b] for a, b in itertools.pairwise(names))
    assert set(layer_styles(names[:3]).values()) == {"-"}
    rows = [{"step": s, **{f"q/{name}/x": s + i for i, name in enumerate(names)}} for s in (1, 2, 3)]
    figure = summary(rows)
    drawn = {line.get_linestyle() for line in figure.axes[0].lines}
    assert drawn == {line.get_linestyle() for line in figure.legends[0].get_lines()} == {"-", "--"}


def test_one_panel_a_quantity_and_one_line_a_layer_with_the_values_read():
    figure = summary(history())
    found = panels(figure)
    assert list(found) == [
        "collapse: effective rank",
        "collapse: distinct units",
        "collapse: zero units",
        "collapse: score",
        "alignment: in/rga",
        "alignment: out/rga",
        "alignment: mean",
        "plasticity: relative update",
        "plasticity: dormant units",
    ]
    lines = found["collapse: effective rank"].get_lines()
    assert len(lines) == 3
    assert list(lines[1].get_xdata()) == [1, 10, 20, 30, 40]
    assert list(lines[1].get_ydata()) == [11.0 - s / 100 for s in (1, 10, 20, 30, 40)]
    colours = layer_colours(["net.0", "net.2", "net.4"])
    assert [to_rgba(line.get_color()) for line in lines] == list(colours.values())
    assert len({to_rgba(colour) for colour in colours.values()}) == 3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "net.0", "net.2", "net.4", "network", "chance",
    ]  # fmt: skip


def test_the_network_as_a_whole_is_black():
    found = panels(summary(history()))
    assert to_rgba(found["collapse: score"].get_lines()[0].get_color()) == to_rgba("black")
    units = found["plasticity: dormant units"].get_lines()
    assert [to_rgba(line.get_color()) == to_rgba("black") for line in units] == [False, False, False, True]


def test_chance_is_a_band_in_the_panels_of_its_side_only():
    found = panels(summary(history()))

    def band(name):
        return [c.get_paths()[0].get_extents() for c in found[name].collections]

    (inside,) = band("alignment: in/rga")
    assert (inside.ymin, inside.ymax) == pytest.approx((0.05, 0.15))
    (mean,) = band("alignment: mean")
    assert (mean.ymin, mean.ymax) == pytest.approx((0.1, 0.1))
    assert band("alignment: out/rga") == []
    assert band("collapse: effective rank") == []


def test_keys_choose_panels():
    assert list(panels(summary(history(), keys="collapse/*rank"))) == ["collapse: effective rank"]
    chosen = panels(summary(history(), keys=["alignment/out/*", "plasticity/*"]))
    assert "alignment: out/rga exponent r2" in chosen  # a detail is drawn when asked for
    assert len(chosen) == 4
    with pytest.raises(ValueError, match=r"no finite reading among keys that match \['nothing/\*'\]"):
        summary(history(), keys="nothing/*")


def test_axes_follow_the_spacing_of_steps_and_the_spread_of_values():
    even = panels(summary(history()))
    assert {axis.get_xscale() for axis in even.values()} == {"linear"}
    spaced = panels(summary(history(steps=(1, 2, 4, 8, 16, 32, 64))))
    assert {axis.get_xscale() for axis in spaced.values()} == {"log"}
    assert even["plasticity: relative update"].get_yscale() == "log"
    assert even["collapse: effective rank"].get_yscale() == "linear"
    outlier = history(steps=range(1, 40))
    outlier[7]["collapse/net.0/effective_rank"] = 1e-9
    assert panels(summary(outlier))["collapse: effective rank"].get_yscale() == "linear"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([1, 3, 10, 32, 100], True),
        ([1, 50, 100, 150, 200, 250], False),
        ([1, 2, 3, 4, 5, 6], False),
        ([1, 10, 100], False),
        ([0, 0, 0], False),
        ([], False),
    ],
)
def test_log_spaced(steps, expected):
    assert log_spaced(steps) is expected


def test_constant_readings_are_not_blown_up():
    found = panels(summary(history()))
    low, high = found["collapse: distinct units"].get_ylim()
    assert low < 0.99 < 1.01 < high
    low, high = found["collapse: zero units"].get_ylim()
    assert low < -0.01 < 0.01 < high


def test_what_is_no_finite_number_is_left_out():
    rows = history()
    rows[1]["collapse/net.0/effective_rank"] = math.nan
    rows[2]["collapse/net.0/effective_rank"] = math.inf
    rows[3]["collapse/net.0/effective_rank"] = "text"
    line = panels(summary(rows))["collapse: effective rank"].get_lines()[0]
    assert list(line.get_xdata()) == [1, 40]
    with pytest.raises(ValueError, match="no finite reading"):
        summary([])
    with pytest.raises(ValueError, match="no finite reading"):
        summary([{"step": 1, "collapse/score": math.nan}])
    with pytest.raises(ValueError, match="columns must be at least 1"):
        summary(history(), columns=0)


def test_histories_of_several_monitors_are_drawn_together_in_any_order():
    rows = history()
    apart = [{k: v for k, v in row.items() if k == "step" or k.startswith("collapse")} for row in rows]
    apart += [{k: v for k, v in row.items() if not k.startswith("collapse")} for row in reversed(rows)]
    one, other = panels(summary(rows)), panels(summary(apart))
    assert list(one) == list(other)
    for name, axis in one.items():
        for a, b in zip(axis.get_lines(), other[name].get_lines(), strict=True):
            assert list(a.get_ydata()) == list(b.get_ydata())


@pytest.mark.parametrize("count", [1, 12, 40])
def test_it_draws_however_many_layers_with_a_legend_that_fits(count):
    layers = [f"backbone.stage{i // 3}.block{i % 3}.attention.out_proj" for i in range(count)]
    figure = summary(history(layers=layers))
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(texts) == min(count, 16) + 2
    assert max(map(len, texts)) <= 26
    figure.savefig(io.BytesIO(), dpi=40)
    box, whole = legend.get_window_extent(), figure.bbox
    assert box.x1 <= whole.x1 + 1
    assert box.y0 >= whole.y0 - 1
    assert not any(legend.get_window_extent().overlaps(a.get_window_extent()) for a in figure.axes)


def test_a_single_reading_can_be_seen():
    found = panels(summary(history(steps=(1,))))
    assert found["collapse: effective rank"].get_lines()[0].get_marker() == "."
