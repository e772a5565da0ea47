"""What mkdocs calls while it builds the site."""

import re
from typing import Any

_OUTSIDE = re.compile(r"\[[^\]\n]+\]\(\.\./([^)\s#]+)\)")
_MARKS = re.compile(r"<!--.*?-->\n?", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name files of the repository, which are no pages, in place of links that work beside them only.

    Marks of the tests (`<!-- not run: ... -->`) go, too.
    """
    return _OUTSIDE.sub(r"`\1`", _MARKS.sub("", markdown))
