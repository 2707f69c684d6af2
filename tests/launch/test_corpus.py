"""Text comes out of an ontology file and an encyclopedia dump as a reader would see it."""

import bz2

import orjson

from launch.quickstart.corpus import article_text, json_lines, phenotype_documents, wikipedia_documents

OBO = r"""format-version: 1.2
def: "The header has none."

[Term]
id: HP:0001250
name: Seizure
alt_id: HP:0001275
def: "An \"abnormal\" discharge\nof the brain." [PMID:1]
comment: Not part of it.

[Term]
id: HP:0000002
name: Nothing said

[Term]
id: HP:0000003
name: Gone
def: "Obsolete." []
is_obsolete: true

[Typedef]
id: part_of
def: "A relation." []
"""


def test_defined_terms_become_documents() -> None:
    assert list(phenotype_documents(OBO.encode())) == [
        {"id": "HP:0001250", "text": 'Seizure: An "abnormal" discharge of the brain.'}
    ]


def test_definition_of_a_relation_is_not_taken_for_a_term() -> None:
    assert all("relation" not in document["text"] for document in phenotype_documents(OBO.encode()))


def test_markup_becomes_running_text() -> None:
    markup = (
        "{{Infobox|name=x}}'''Albedo''' is [[Reflection (physics)|reflected]] light.<ref>Smith</ref>\n"
        "[[File:a.png|thumb|A picture]]\n== Terms ==\nIt has ''no'' unit &ndash; a ratio.\n"
        "{| class=wikitable\n| cell\n|}\n[[Category:Light]]\n== References ==\n* A book\n=== Notes ===\nnote\n"
    )
    assert article_text(markup) == "Albedo is reflected light.\n\nTerms\nIt has no unit – a ratio."


def test_unbalanced_italics_do_not_hide_a_section() -> None:
    assert article_text("Text ''open.\n\n== Bibliography ==\n* A book\n") == "Text open."


def page(title: str, text: str, *, namespace: int = 0, redirect: bool = False) -> str:
    pointer = '<redirect title="Other" />' if redirect else ""
    return (
        f"<page><title>{title}</title><ns>{namespace}</ns><id>7</id>{pointer}"
        f"<revision><text>{text}</text></revision></page>"
    )


def test_articles_are_kept_and_everything_else_is_not() -> None:
    body = "A long sentence about light. " * 50
    pages = [page("Light", body), page("Short", "Too short."), page("Talk:Light", body, namespace=1)]
    pages.append(page("Old name", body, redirect=True))
    dump = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'
    documents = list(wikipedia_documents(bz2.compress(dump.encode())))
    assert [document["text"].split("\n\n")[0] for document in documents] == ["Light"]


def test_json_lines_read_back() -> None:
    documents = [{"id": "1", "text": "line\nbreak"}, {"id": "2", "text": "ß"}]
    lines = json_lines(iter(documents)).splitlines()
    assert [orjson.loads(line) for line in lines] == documents
