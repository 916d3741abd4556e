"""The files around the program stay true to it: the lock, the workflow, the hooks, the citation."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from pre_commit.clientlib import load_config

REPOSITORY = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12")


def requirements_of(name: str) -> list[Requirement]:
    """The requirements in a file, comments and included files left out."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in (REPOSITORY / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", sorted(path.name for path in REPOSITORY.glob("requirements*.txt")))
def test_the_lock_has_one_allowed_version_of_every_requirement(name: str, python: str) -> None:
    machine = {"python_version": python, "python_full_version": f"{python}.7", "sys_platform": "linux", "platform_system": "Linux"}
    locked: dict[str, str] = {}
    for pin in requirements_of("requirements.lock"):
        [version] = pin.specifier
        assert version.operator == "=="
        if pin.marker is None or pin.marker.evaluate(machine):
            assert canonicalize_name(pin.name) not in locked, pin.name
            locked[canonicalize_name(pin.name)] = version.version
    for wanted in requirements_of(name):
        assert locked[canonicalize_name(wanted.name)] in wanted.specifier, wanted


def test_the_lock_names_no_place_to_download_from() -> None:
    assert not re.search(r"://|--(extra-)?index-url|--find-links| @ ", (REPOSITORY / "requirements.lock").read_text())


def test_the_workflow_tests_every_supported_python_with_locked_versions() -> None:
    workflow: dict[str, Any] = yaml.safe_load((REPOSITORY / ".github/workflows/test.yml").read_text())
    job = workflow["jobs"]["test"]
    supported = SpecifierSet(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"])
    assert set(job["strategy"]["matrix"]["python"]) == {f"3.{n}" for n in range(30) if f"3.{n}" in supported} == set(PYTHONS)
    [setup] = [step for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert setup["with"]["python-version"] == "${{ matrix.python }}"
    [test] = [step for step in job["steps"] if "run" in step]
    assert test["run"] == "scripts/test.sh"
    assert test["env"] == {"PYTHON": "python", "PIP_CONSTRAINT": "requirements.lock"}


def test_the_hooks_are_the_quick_checks_of_the_test_script() -> None:
    config = load_config(str(REPOSITORY / ".pre-commit-config.yaml"))
    hooks = [hook["entry"] for repository in config["repos"] for hook in repository["hooks"]]
    checks = (REPOSITORY / "scripts/test.sh").read_text().splitlines()
    assert hooks == checks[checks.index("ruff format --check .") : checks.index("lint-imports") + 1]


def test_the_citation_names_whom_the_licence_names() -> None:
    citation: dict[str, Any] = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    licence = (REPOSITORY / "LICENSE").read_text()
    assert licence.startswith(f"{citation['license']} License")
    assert [author["name"] for author in citation["authors"]] == re.findall(r"Copyright \(c\) \d+ (.*)", licence)
    assert [paper["identifiers"][0]["value"] for paper in citation["references"]] == ["arXiv:2510.04871"]
