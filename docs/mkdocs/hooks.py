"""What mkdocs calls while it builds the site."""

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]\n]+)\]\(\.\./([^)\s#]+)\)")
_MARKS = re.compile(r"<!--.*?-->\n?", re.DOTALL)
_WIDE = ("settings.md",)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Name files of the repository, which are no pages, in place of links that work beside them only.

    Marks of the tests (`<!-- not run: ... -->`) go, too; one wide table leaves no room for contents.
    """
    if page.file.src_uri in _WIDE:
        page.meta["hide"] = ["toc"]
        return _OUTSIDE.sub(r"`\1`", markdown)
    return _OUTSIDE.sub(r"`\2`", _MARKS.sub("", markdown))
