"""Results as a page for a browser, or as Markdown for a model card."""

from tiltmeter.report.markdown import render_markdown
from tiltmeter.report.page import write_page

__all__ = ["render_markdown", "write_page"]
