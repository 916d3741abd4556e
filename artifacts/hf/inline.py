"""Makes a self-contained file: replaces a file's imports from this project by the imported
definitions.

Knows Python's syntax and nothing of models. Names must be unique across the modules; a definition
in the file itself overrides one with the same name elsewhere.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


class _Source:
    """A module's file, split into its top-level definitions and imports."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.body = ast.parse(self.text).body
        self.definitions = {name: node for node in self.body for name in _names(node)}
        self.imports: dict[str, tuple[str, str]] = {}
        """For each imported name: the module, and the name there ("" for the module itself)."""
        for node in self.body:
            if isinstance(node, ast.Import):
                self.imports |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                self.imports |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}

    def segment(self, node: ast.stmt) -> str:
        """The text of a definition, with its decorators, comments above and docstring below."""
        lines = self.text.splitlines()
        first = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))])
        while first > 1 and lines[first - 2].startswith("#"):
            first -= 1
        following = self.body[self.body.index(node) + 1 : self.body.index(node) + 2]
        is_told = bool(following) and isinstance(following[0], ast.Expr)
        return "\n".join(lines[first - 1 : (following[0] if is_told else node).end_lineno])


def _names(node: ast.stmt) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [item.id for target in targets for item in ast.walk(target) if isinstance(item, ast.Name)]


def _used(node: ast.AST) -> Iterator[str]:
    return (item.id for item in ast.walk(node) if isinstance(item, ast.Name))


class Inliner:
    """Collects the project's definitions that a file needs, and their imports from other packages."""

    def __init__(self, path: Path) -> None:
        self.file = _Source(path)
        self.sources: dict[str, _Source] = {}
        self.taken: dict[str, set[str]] = {}
        """The definitions to inline, by module, each module after those that it needs."""
        self.external: set[tuple[str, str, str]] = set()
        """External imports: name, module, name there."""
        for node in self.file.body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                for name in _used(node):
                    self._need(self.file, "", name)

    def _need(self, source: _Source, module: str, name: str) -> None:
        """Inline the definition of `name` in a module, and everything that it uses."""
        if name in self.file.definitions:
            return
        if name in source.imports:
            origin, original = source.imports[name]
            path = _ROOT.joinpath(*origin.split("."))
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if not path.is_file():
                self.external.add((name, origin, original))
                return
            if origin not in self.sources:
                self.sources[origin] = _Source(path)
            self._take(self.sources[origin], origin, original)
        elif name in source.definitions:
            self._take(source, module, name)

    def _take(self, source: _Source, module: str, name: str) -> None:
        if name in self.file.definitions or name in self.taken.get(module, ()):
            return
        if name not in source.definitions:
            self._need(source, module, name)  # a package re-exports it
            return
        if any(name in names for names in self.taken.values()):
            raise ValueError(f"two modules define {name}: one file can't hold both")
        self.taken.setdefault(module, set()).add(name)
        for used in _used(source.definitions[name]):
            self._need(source, module, used)
        # After the definitions that it needs.
        self.taken[module] = self.taken.pop(module)

    def import_lines(self) -> str:
        """Import lines: the standard library, a blank line, the others."""
        modules = [(name, module) for name, module, original in self.external if not original]
        lines = {f"import {module}" + (f" as {name}" if name != module else "") for name, module in modules}
        for module in {module for _, module, original in self.external if original}:
            names = sorted(original for _, origin, original in self.external if origin == module and original)
            lines.add(f"from {module} import {', '.join(names)}")
        groups: tuple[list[str], list[str]] = ([], [])
        for line in sorted(lines, key=lambda line: (line.startswith("from"), line)):
            groups[line.split()[1].partition(".")[0] not in sys.stdlib_module_names].append(line)
        return "\n\n".join(map("\n".join, groups))

    def definitions(self) -> Iterator[str]:
        """The text of the inlined definitions, each after those that it needs, then of the file."""
        for module, names in self.taken.items():
            source = self.sources[module]
            nodes = [node for node in source.body if names & set(_names(node))]
            yield f"# From {source.path.relative_to(_ROOT)}.\n\n\n" + "\n\n\n".join(map(source.segment, nodes))
        begin = next(node for node in self.file.body if _names(node))
        first = min([begin.lineno, *(item.lineno for item in getattr(begin, "decorator_list", []))])
        yield "# The model of transformers.\n\n\n" + "\n".join(self.file.text.splitlines()[first - 1 :])
