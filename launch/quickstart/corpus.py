"""The two corpora as JSON lines: definitions of human phenotypes (the new domain) and encyclopedia articles (general).

One object a line: {"id": …, "text": …}.
"""

import bz2
import io
import re
from collections.abc import Iterator
from xml.etree import ElementTree

import mwparserfromhell
import orjson
from mwparserfromhell.nodes import Node, Tag, Template, Wikilink
from mwparserfromhell.wikicode import Wikicode

MIN_ARTICLE_CHARACTERS = 1000
DROPPED_TAGS = {"table", "ref", "gallery", "math", "timeline"}
DROPPED_SECTIONS = {"see also", "references", "notes", "footnotes", "further reading", "external links", "bibliography"}
# [[File:…]], [[Category:…]] and links to other languages ([[de:…]]) show pictures and lists, not text.
_NAMESPACE = re.compile(r"\s*[a-z-]{2,12}\s*:", re.IGNORECASE)
_BOLD_OR_ITALIC = re.compile(r"'{2,}")
_BLANK_LINES = re.compile(r"\n{3,}")
_MEDIAWIKI = "{http://www.mediawiki.org/xml/export-0.10/}"
_DEFINITION = re.compile(r'def: "((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")


def phenotype_documents(obo: bytes) -> Iterator[dict[str, str]]:
    """Every defined term of an OBO file as `name: definition`, obsolete terms left out."""
    for stanza in obo.decode().split("\n[Term]\n")[1:]:
        body = stanza.split("\n\n[", 1)[0]
        fields = dict(line.split(": ", 1) for line in reversed(body.splitlines()) if ": " in line)
        definition = _DEFINITION.search(body)
        if definition is None or fields.get("is_obsolete") == "true":
            continue
        text = _ESCAPE.sub(lambda match: " " if match[1] == "n" else match[1], definition[1])
        yield {"id": fields["id"], "text": f"{fields['name']}: {' '.join(text.split())}"}


def wikipedia_documents(dump: bytes) -> Iterator[dict[str, str]]:
    """Every article of a bz2 MediaWiki dump as plain text under its title; redirects and short pages left out."""
    for _, element in ElementTree.iterparse(io.BytesIO(bz2.decompress(dump))):
        if element.tag != f"{_MEDIAWIKI}page":
            continue
        is_article = element.findtext(f"{_MEDIAWIKI}ns") == "0" and element.find(f"{_MEDIAWIKI}redirect") is None
        markup = element.findtext(f"{_MEDIAWIKI}revision/{_MEDIAWIKI}text") or ""
        identity, title = element.findtext(f"{_MEDIAWIKI}id") or "", element.findtext(f"{_MEDIAWIKI}title") or ""
        element.clear()
        if is_article and len(text := article_text(markup)) >= MIN_ARTICLE_CHARACTERS:
            yield {"id": identity, "text": f"{title}\n\n{text}"}


def article_text(markup: str) -> str:
    """What a reader of the article sees as running text: no templates, tables, notes, pictures or lists of sources."""
    code = mwparserfromhell.parse(markup, skip_style_tags=True)  # one unbalanced '' would swallow headings
    for section in code.get_sections(levels=[2]):
        if section.get(0).title.strip_code().strip().lower() in DROPPED_SECTIONS:
            code.remove(section)
    _remove_apparatus(code)
    text = _BOLD_OR_ITALIC.sub("", code.strip_code())
    return _BLANK_LINES.sub("\n\n", "\n".join(line.strip() for line in text.splitlines())).strip()


def json_lines(documents: Iterator[dict[str, str]]) -> bytes:
    """The documents as JSON lines."""
    return b"".join(orjson.dumps(document) + b"\n" for document in documents)


def _remove_apparatus(code: Wikicode) -> None:
    for node in code.filter(recursive=False):
        if _is_apparatus(node):
            code.remove(node)


def _is_apparatus(node: Node) -> bool:
    if isinstance(node, Tag):
        return str(node.tag).strip().lower() in DROPPED_TAGS
    if isinstance(node, Wikilink):
        return _NAMESPACE.match(str(node.title)) is not None
    return isinstance(node, Template)
