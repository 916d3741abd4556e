"""An mkdocs hook: adds the site's pages from outside docs/, and rewrites links between files to
links between pages.

The README is the site's first page. The reference of settings is generated from config/schema/ and
the YAML files.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from config.compose import compose_as
from config.schema import PretrainInstructConfig, PretrainPuzzleConfig, TrainingConfig
from config.schema import on_resume as resume_mark  # mkdocs would take a function named on_... for an event

_REPOSITORY = Path(__file__).resolve().parents[1]
# Files outside docs/ that are pages of the site.
_PAGES = {
    "README.md": "index.md",
    "AGENTS.md": "rules.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tokenizers/README.md": "tokenizers.md",
    "config/schema": "reference.md",
}
_KINDS: dict[type[TrainingConfig], tuple[str, str]] = {
    PretrainInstructConfig: ("cfg_pretrain_instruct", "Conversations: pretrain_instruct.py"),
    PretrainPuzzleConfig: ("cfg_pretrain", "Puzzles: pretrain.py"),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that aren't in docs/."""
    for source, page in _PAGES.items():
        text = reference() if page == "reference.md" else (_REPOSITORY / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between files to links between pages, or to plain text if there is no page."""
    source = next((name for name, made in _PAGES.items() if made == page.file.src_uri), f"docs/{page.file.src_uri}")

    def on_the_site(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        path = os.path.normpath(Path(source).parent / target)
        name = _PAGES.get(path, path.removeprefix("docs/"))
        if name != path:
            return f"[{text}]({name}{anchor})"
        return text if (_REPOSITORY / path).exists() else link[0]

    return re.sub(r"\[([^\]]*)\]\(([^)#:]+)((?:#[^)]*)?)\)", on_the_site, markdown)


def reference() -> str:
    """The page of all settings: name, type, default, purpose, and what may change on resume."""
    lines = [
        "# Reference: settings",
        "A setting is given on the command line as `key=value`. "
        "The last column says what another value means to a run that is resumed: *fixed*, it is refused; "
        "*reported*, the run resumes and reports it; *free*, nothing.",
    ]
    for kind, (name, title) in _KINDS.items():
        lines += [f"## {title}", (kind.__doc__ or "").strip(), *_tables(kind, compose_as(kind, name, []))]
    return "\n\n".join(lines) + "\n"


def _tables(kind: type[TrainingConfig], defaults: TrainingConfig) -> Iterator[str]:
    """A table of the top-level keys, then a heading, a sentence and a table for each section."""
    schema = kind.model_json_schema()
    values = defaults.model_dump(mode="json")
    sections: list[tuple[str, dict[str, Any], Any]] = [("", schema, values)]
    for prefix, section, value in sections:
        rows = ["| key | type | default | what it does | resumed |", "|---|---|---|---|---|"]
        for key, field in section["properties"].items():
            inner = _resolved(field, schema)
            own = value.get(key) if isinstance(value, dict) else None
            if "properties" in inner:
                sections.append((f"{prefix}{key}.", inner, own))
                continue
            default = "" if value is None else f"`{json.dumps(own)}`"
            what = " ".join(field.get("description", "").split()).replace("|", "\\|").replace("<", "&lt;")
            mark = resume_mark(f"{prefix}{key}", kind).name.lower()
            rows.append(f"| `{prefix}{key}` | {_type(field, schema)} | {default} | {what} | {mark} |")
        if prefix:
            yield f"### {prefix[:-1]}"
            yield section["description"]
        yield "\n".join(rows)


def _resolved(field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schema["$defs"][field["$ref"].rpartition("/")[2]] if "$ref" in field else field
    return found


def _type(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """A JSON Schema type in words: its choices, or its type with its limits."""
    field = _resolved(field, schema)
    if "anyOf" in field:
        return " or ".join(_type(option, schema) for option in field["anyOf"])
    choices = field.get("enum", [field["const"]] if "const" in field else [])
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    kind = {"integer": "whole number", "string": "text", "array": "list", "object": "table"}.get(field["type"], field["type"])
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return " ".join([kind, *(f"{sign} {field[limit]}" for limit, sign in limits.items() if limit in field)])
