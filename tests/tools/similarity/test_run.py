"""The box plots of `dwakd similarity`."""

from dwakd.tools.similarity.run import box_plot


def test_box_plot():
    """The quartiles must be drawn at their place on the scale."""
    assert box_plot((0.0, 0.2, 0.5, 0.7, 1.0), 1.0, 11) == "──▒▒▒█▒▒───"
