"""Standalone HTML pages: the layout that all pages share, and `dwakd report`."""
