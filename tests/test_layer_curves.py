"""Curves of accuracy against the share of channels that is gone: as measured, and as drawn."""

from xml.etree import ElementTree

from kompakt.report.layer_curves import layer_curves_svg

SVG = "{http://www.w3.org/2000/svg}"


def test_every_layer_has_a_plot_and_lower_accuracy_lies_lower() -> None:
    curves = {f"layer{n}<a>": [(0.0, 90.0), (0.5, 80.0 - n), (0.75, 10.0)] for n in range(6)}
    root = ElementTree.fromstring(layer_curves_svg(curves, 90.0))
    names = [text.text for text in root.iter(f"{SVG}text") if text.get("font-weight")]
    assert names == list(curves)
    for line in root.iter(f"{SVG}polyline"):
        xs, ys = zip(*(map(float, pair.split(",")) for pair in str(line.get("points")).split()), strict=True)
        assert list(xs) == sorted(xs)
        assert list(ys) == sorted(ys)  # y grows downwards
        assert max(xs) < int(str(root.get("width")))
        assert max(ys) < int(str(root.get("height")))


def test_a_flat_curve_is_drawn() -> None:
    assert "polyline" in layer_curves_svg({"conv": [(0.0, 50.0), (0.5, 50.0)]}, 50.0)
