"""The documents name what exists, and all of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import tomllib

from .building import ROOT, run

README = (ROOT / "README.md").read_text()
SOURCES = [
    ROOT / "setup.py",
    *(p for d in ("safelora_kernels", "python", "csrc", "examples", "benchmarks") for p in (ROOT / d).rglob("*")),
]


def variables_read() -> set[str]:
    """Every SAFELORA_ name that a source reads from the environment."""
    code = [path.read_text() for path in SOURCES if path.suffix in {".py", ".h", ".cpp"}]
    return {name for text in code for name in re.findall(r"""["'](SAFELORA_[A-Z_]+)["']""", text)}


def test_environment_table_is_complete_and_true() -> None:
    rows = re.findall(r"^\| (`SAFELORA_[^|]+) \|", (ROOT / "ENVIRONMENT.md").read_text(), re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert documented == variables_read()


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"\bmake ([a-z]+)\b", README + (ROOT / "CONTRIBUTING.md").read_text())))
)
def test_documented_make_commands_exist(command: str) -> None:
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_readme_leads_with_its_two_commands() -> None:
    assert re.findall(r"^make (\w+)", README, re.MULTILINE)[:2] == ["demo", "test"]


@pytest.mark.parametrize(
    "document", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name
)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_readme_example_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    small = example.replace("4096", "64")
    run(sys.executable, "-c", small, cwd=tmp_path, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"})


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'__version__ = "{version}"' in (ROOT / "safelora_kernels" / "__init__.py").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
