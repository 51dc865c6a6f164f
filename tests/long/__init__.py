"""Tests that take longer than the suite and are started by hand, see docs/reliability.md."""
