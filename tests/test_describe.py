"""`dwakd methods`: every option of every method is explained."""

import pytest

from dwakd.describe import _entries, allowed_values, method_page
from dwakd.losses import METHODS, method_class, method_options


@pytest.mark.parametrize("method", METHODS)
def test_every_option_has_a_meaning_and_allowed_values(method):
    """An option without a word about it is one that users set by guessing."""
    method_page(method)
    doc = method_class(method).__doc__ or ""
    meanings = _entries(doc.partition("Args:\n")[2].partition("\n\n")[0])
    for option in method_options(method):
        assert meanings.get(option), option
        assert not allowed_values(method, option).startswith("any"), option


def test_allowed_values_are_those_the_method_checks():
    """A second list of them would soon differ from what is accepted."""
    assert allowed_values("dskd", "kd_rate") == "between 0 and 1"
    assert allowed_values("dskd", "accuracy_mask") == "true, false"
    assert allowed_values("dskd", "student_divergence").startswith("forward_kl, reverse_kl, ")
