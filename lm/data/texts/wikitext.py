"""Wikitext to plain text: what a reader of the article sees, without references, boxes and tables.

Headings stay as ``== Heading ==``, list items keep their ``*`` and formulas their TeX. Templates are not expanded, but
for a few that only wrap words or a quantity, so some sentences miss a word; empty brackets left that way are removed.
"""

from __future__ import annotations

import html
import re

_COMMENT = re.compile(r"<!--.*?-->", re.S)
_VERBATIM = re.compile(r"<(math|nowiki|source|syntaxhighlight)\b[^<>]*>(.*?)</\1\s*>", re.S | re.I)
_REF = re.compile(r"<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref\s*>", re.S | re.I)
_BLOCK = re.compile(r"<(gallery|timeline|imagemap|score|hiero)\b[^>]*>.*?</\1\s*>", re.S | re.I)
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.S)
_URL = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\]]*\s*([^\]]*)\]")
_LINK = re.compile(r"\[\[((?:[^\[\]]|\[[^\[\]]*\])*?)\]\]")  # innermost: its text may hold [single] brackets
_NOT_TEXT = re.compile(r"\s*(?:(?:File|Image|Category|Media)\s*:|[a-z]{2,3}(?:-[a-z-]+)?:)", re.I)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_LINE_BREAK = re.compile(r"<br\s*/?>", re.I)
_SWITCH = re.compile(r"__[A-Z]+__")
_GAP = re.compile(r"\(\s*[,;:]*\s*\)|(?<=\()\s*[,;]\s*|\s*[,;]\s*(?=\))|[ \t]+(?=[,.;:)](?:\s|$))")
_HEADING = re.compile(r"^(=+)\s*(.*?)\s*\1\s*$")
_MARKS_ONLY = re.compile(r"[*#:;|!\s]+|\{\|.*|\|[}-].*")
_STASH = re.compile("\ue000(\\d+)\ue001")
_NESTING = 12  # templates and links nest a few levels deep; each pass resolves the innermost level


def _template(match: re.Match[str]) -> str:
    name, *args = (part.strip() for part in _LINK.sub(_link, match[1]).split("|"))  # links hold bars of their own
    name, args = name.lower(), [a for a in args if "=" not in a]
    if name in ("convert", "cvt"):
        return " ".join(args[:2])
    if name in ("nowrap", "transl", "lang") or name.startswith("lang-"):
        return args[-1] if args else ""
    return " " if name in ("nbsp", "spaces") else ""


def _link(match: re.Match[str]) -> str:
    return "" if _NOT_TEXT.match(match[1]) else match[1].split("|")[-1].strip()


def _drop_empty_sections(lines: list[str]) -> list[str]:
    """Removes headings that nothing follows before the next heading of the same or a higher level."""
    out: list[str] = []
    next_level = 1  # level of the heading that comes next, 0 = text or a deeper section does; 1 at the end
    for line in reversed(lines):
        heading = _HEADING.match(line)
        if heading is None:
            next_level = 0 if line else next_level
            out.append(line)
        elif next_level == 0 or next_level > len(heading[1]):
            out.append(f"{heading[1]} {heading[2]} {heading[1]}")
            next_level = len(heading[1])
    return out[::-1]


def plain(wikitext: str) -> str:
    """The article's text; paragraphs are separated by one blank line, the last line ends in a newline."""
    verbatim: list[str] = []

    def stash(match: re.Match[str]) -> str:
        verbatim.append(match[2].strip())
        return f"\ue000{len(verbatim) - 1}\ue001"

    text = _VERBATIM.sub(stash, _COMMENT.sub("", wikitext))  # their braces and brackets are not markup
    text = _BLOCK.sub("", _REF.sub("", text))
    for pattern, replacement in ((_TEMPLATE, _template), (_TABLE, ""), (_URL, r"\1"), (_LINK, _link)):
        for _ in range(_NESTING):
            text, n = pattern.subn(replacement, text)  # type: ignore[arg-type]
            if not n:
                break
    text = text.replace("'''", "").replace("''", "")
    text = _SWITCH.sub("", _TAG.sub("", _LINE_BREAK.sub("\n", text)))
    text = html.unescape(text).replace("\u00a0", " ")
    text = re.sub(r"[ \t]{2,}", " ", _GAP.sub("", text))
    text = _STASH.sub(lambda m: verbatim[int(m[1])], text)
    lines = [line.strip() for line in text.split("\n")]
    lines = _drop_empty_sections([line for line in lines if not _MARKS_ONLY.fullmatch(line)])
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
