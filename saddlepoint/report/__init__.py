"""A run made readable: `summary` computes every number once; the page, the Markdown and the JSON only show them."""

from saddlepoint.report.summary import summarize

__all__ = ["summarize"]
