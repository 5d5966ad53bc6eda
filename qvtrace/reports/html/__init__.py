"""A comparison as one page that opens from disk and asks nothing of any network."""

from qvtrace.reports.html.page import comparison_page

__all__ = ["comparison_page"]
