"""The configuration's page in the docs is what the schema says now."""

from pathlib import Path

from llamapro.config.page import reference_page
from llamapro.config.root import RunConfig

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
WRITE_AGAIN = "write it again: python -c 'import llamapro.config.page as p; print(p.reference_page(), end=\"\")'"


def test_the_committed_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference_page(), f"{PAGE}: {WRITE_AGAIN}"


def test_every_setting_is_on_the_page_with_its_meaning() -> None:
    page = reference_page()
    for name, section in RunConfig.model_fields.items():
        assert f"## {name}\n" in page
        assert section.annotation is not None
        for field, info in section.annotation.model_fields.items():
            assert info.description, f"{name}.{field} has no docstring"
            assert info.description in page
