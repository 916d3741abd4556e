"""The documentation's site: its reference has every setting, and links between files of the repository lead to its pages."""

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from mkdocs.structure.files import Files
from pydantic import BaseModel

from config.schema import PretrainInstructConfig, PretrainPuzzleConfig
from scripts.docs_site import on_page_markdown, reference


def keys_of(section: type[BaseModel], prefix: str = "") -> set[str]:
    keys = set()
    for name, field in section.model_fields.items():
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        keys |= keys_of(cast(Any, field.annotation), f"{prefix}{name}.") if is_section else {prefix + name}
    return keys


def test_the_reference_has_every_key_with_its_default_and_what_it_does() -> None:
    _, conversations, puzzles = re.split("^## ", reference(), flags=re.MULTILINE)
    for kind, part in ((PretrainInstructConfig, conversations), (PretrainPuzzleConfig, puzzles)):
        rows = [re.split(r"(?<!\\)\| ", line) for line in part.splitlines() if line.startswith("| `")]
        assert {row[1].strip(" `") for row in rows} == keys_of(kind)
        assert all(cell.strip() for row in rows for cell in row[1:])
    [row] = [line for line in conversations.splitlines() if line.startswith("| `arch.rope_theta`")]
    assert row == "| `arch.rope_theta` | number > 0 | `10000.0` | Base of the rotary frequencies. | fixed |"
    assert "| `dataset.test_ratio` | number ≥ 0 < 1 |" in conversations


@pytest.mark.parametrize(
    ("page", "link", "on_the_site"),
    [
        ("index.md", "[a](docs/data.md#packing)", "[a](data.md#packing)"),
        ("index.md", "![a](docs/sudoku_act_steps.png)", "![a](sudoku_act_steps.png)"),
        ("index.md", "[a](config/schema)", "[a](reference.md)"),
        ("index.md", "[the licence](LICENSE)", "the licence"),
        ("data.md", "[a](../README.md#commands)", "[a](index.md#commands)"),
        ("tokenizers.md", "[a](../docs/data.md)", "[a](data.md)"),
        (
            "data.md",
            "[a](export.md), [b](#packing), [c](https://x.org/a#b)",
            "[a](export.md), [b](#packing), [c](https://x.org/a#b)",
        ),
        ("data.md", "[a](nowhere.md)", "[a](nowhere.md)"),
    ],
)
def test_links_lead_to_pages(page: str, link: str, on_the_site: str) -> None:
    shown: Any = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert on_page_markdown(link, shown, cast(Any, None), Files([])) == on_the_site
