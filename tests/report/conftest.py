"""A run that `dwakd train` has written."""

import pytest

from tests.report.builders import trained_run


@pytest.fixture(scope="session")
def trained(workspace, tmp_path_factory):
    """Return the folder of a finished run, which no test may change."""
    return trained_run(workspace, tmp_path_factory.mktemp("report") / "run")
