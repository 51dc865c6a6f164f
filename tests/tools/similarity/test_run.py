"""The box plots of `dwakd similarity`."""

from dwakd.tools.similarity.run import box_plot


def test_box_plot():
    """Quartiles where the scale says they are."""
    assert box_plot((0.0, 0.2, 0.5, 0.7, 1.0), 1.0, 11) == "──▒▒▒█▒▒───"
