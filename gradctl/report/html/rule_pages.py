"""The rule pages as HTML, to be folded into a report."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markupsafe import Markup

from gradctl.rules.catalogue import codes, page, title

# The title of a page is that of its fold, and its sections stand below the heading of all rules.
# An address in the text, not that of a link.
_ADDRESS = re.compile(r"""(?<!["=])https?://[^\s<>"]+[^\s<>".,;:)]""")
_SECTION = {"h2": "h3", "h3": "h4"}


def rule_page(code: str) -> tuple[str, Markup] | None:
    """Return the title of a rule and its page as HTML without the title; None for a code without a page."""
    if code not in codes():
        return None
    text = page(code).partition("\n")[2]
    parser = MarkdownIt("commonmark", {"html": False, "linkify": False}).enable("table")
    tokens = parser.parse(text)
    for token in tokens:
        token.tag = _SECTION.get(token.tag, token.tag)
        if token.type == "fence":
            token.attrSet("tabindex", "0")
    html = parser.renderer.render(tokens, parser.options, {})
    return title(code), Markup(_ADDRESS.sub(r'<a href="\g<0>">\g<0></a>', html))
