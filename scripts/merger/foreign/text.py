"""Foreign text on its way to a terminal, a log, a one-line message or a model card.

What others chose (names of tensors and meshes, messages of servers and libraries) may hold control characters that
move a cursor, newlines that make a second line of ours, or marks that turn the direction of reading around.
"""
import re

MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~>-])")


def printable(text: str, limit: int = 0) -> str:
    r"""Return `text` on one line, with an escape for each character that is not a plain printable one.

    Args:
        limit: characters to cut it to; 0 for none.

    >>> printable("a\x1b[2J\nmerge: done\u202e")
    'a\\x1b[2J\\nmerge: done\\u202e'
    """
    if limit and len(text) > limit:
        text = text[:limit - 1] + "…"
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a folder's name that is no UTF-8: printed as it came
        return character
    return character.encode("unicode_escape").decode()


def markdown(text: str) -> str:
    r"""Return `text` as it reads in a Markdown page, where HTML and Markdown of its own mean nothing.

    >>> markdown("<b>|x|</b>")
    '&lt;b&gt;\\|x\\|&lt;/b&gt;'
    """
    plain = MARKDOWN.sub(r"\\\1", printable(text).replace("&", "&amp;").replace("<", "\0").replace(">", "\1"))
    return plain.replace("\0", "&lt;").replace("\1", "&gt;")
