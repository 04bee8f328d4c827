"""Texts of others on a terminal."""

import re

from rich import markup

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""What no text needs: a terminal obeys escape sequences, which rich lets pass, and no page may hold such characters."""


def escape(text: str) -> str:
    """The text as it is printed for what it says: its brackets style nothing, control characters are replaced."""
    return markup.escape(plain(text))


def plain(text: str) -> str:
    """Characters that control something show as a replacement character; line feeds and tabs stay."""
    return CONTROL.sub("\ufffd", text)
