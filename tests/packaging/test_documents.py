"""The documents name what exists, and all of it; their examples run, word for word."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomllib

import safelora.cli

from . import world
from .building import ROOT
from .documented import LANGUAGES, PROGRAMS, Block, blocks, commands, documents

README, MAKEFILE = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()


def page(path: Path) -> str:
    return str(path.relative_to(ROOT))


PAGES = pytest.mark.parametrize("document", documents(), ids=page)
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


def kinds(document: Path, language: str) -> list[Block]:
    return [block for block in blocks(document) if block.language == language]


def runnable(document: Path) -> list[list[str]]:
    """The calls of `safelora` that a page shows and that can run in the world of small models."""
    if ROOT / "examples" in document.parents:
        return []  # they speak of the models of their stack
    given = [block for block in kinds(document, "shell") if not block.excuse]
    return [words for block in given for words in commands(block) if words[0] == "safelora"]


def accept(words: list[str]) -> bool:
    """Whether a command exists and has the options given; SystemExit where a parser of ours refuses it."""
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "safelora":
        safelora.cli._parser().parse_args(rest)
    elif program == "make":
        assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in rest if "=" not in target), words
    elif program in ("python", "python3"):
        if rest[0] == "-m":
            spec = importlib.util.find_spec(rest[1])
            assert spec is not None, f"{rest[1]} is no module"
            if rest[1] == "safelora":
                safelora.cli._parser().parse_args(rest[2:])
            elif rest[1].split(".")[0] == "safelora_kernels":
                options_exist(module_file(rest[1]), rest[2:])
        elif rest[0] != "-c":
            options_exist(ROOT / rest[0], rest[1:])
    return program in {"safelora", "make", "python", "python3", *PROGRAMS}


def module_file(name: str) -> Path:
    """Where a module of the kernels' package reads its arguments; a package is run by its __main__."""
    if name == "safelora_kernels":
        name = "safelora_kernels.doctor"
    path = ROOT.joinpath(*name.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def options_exist(script: Path, arguments: list[str]) -> None:
    assert script.exists(), f"{script} does not exist"
    source = script.read_text()
    for option in arguments:
        if option.startswith("--"):
            assert f'"{option.split("=")[0]}"' in source, f"{script.name} has no {option}"


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"\bmake ([a-z]+)\b", README + (ROOT / "CONTRIBUTING.md").read_text())))
)
def test_documented_make_commands_exist(command: str) -> None:
    assert re.search(rf"^{command}:", MAKEFILE, re.MULTILINE)


def test_readme_leads_with_its_two_commands() -> None:
    assert re.findall(r"^make (\w+)", README, re.MULTILINE)[:2] == ["demo", "test"]


@PAGES
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@PAGES
def test_commands_named_exist(document: Path) -> None:
    (commands,) = (action for action in safelora.cli._parser()._actions if action.choices)
    assert commands.choices is not None
    named = set(re.findall(r"`safelora ([a-z][a-z-]*)", document.read_text()))
    assert named <= set(commands.choices), named - set(commands.choices)


@PAGES
def test_tests_named_exist(document: Path) -> None:
    for path, names in re.findall(r"`(tests/[\w/]+\.py)`(?:: ((?:`\w+`(?:, )?)+))?", document.read_text()):
        source = (ROOT / path).read_text()
        for name in re.findall(r"\w+", names):
            assert f"def {name}(" in source, f"{document.name} names {name}, which {path} does not have"


@PAGES
def test_blocks_name_their_language(document: Path) -> None:
    unnamed = [block.line for block in blocks(document) if block.language not in LANGUAGES]
    assert not unnamed, f"{document.name}: the blocks at lines {unnamed} name none of {sorted(LANGUAGES)}"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    world.build(root)
    return root


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the documents' world, as the working directory."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SAFELORA_DEBUG", "0")
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "world"))
    return Path.cwd()


@pytest.mark.parametrize("document", [p for p in documents() if kinds(p, "python")], ids=page)
def test_python_examples_run(document: Path, here: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in kinds(document, "python"):
        # Lines of the document, so that a traceback shows where.
        code = compile("\n" * block.line + block.text, str(document), "exec")
        if not block.excuse:
            exec(code, names)


@pytest.mark.parametrize("document", [p for p in documents() if kinds(p, "shell")], ids=page)
def test_shell_examples_are_accepted(document: Path) -> None:
    for block in kinds(document, "shell"):
        for words in commands(block):
            known = accept(words)
            assert known, (
                f"{document.name}, block at line {block.line}: {' '.join(words)} starts with none of {PROGRAMS}"
            )


@pytest.mark.parametrize("document", [p for p in documents() if runnable(p)], ids=page)
def test_safelora_examples_run(document: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in runnable(document):
        status = safelora.cli.main(words[1:])
        assert status == 0, f"{' '.join(words)} returned {status}: {capsys.readouterr().err}"


def test_the_api_page_is_that_of_the_docstrings() -> None:
    spec = importlib.util.spec_from_file_location("generate_api", ROOT / "docs" / "generate_api.py")
    assert spec is not None and spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    current = generator.page()
    assert (ROOT / "docs" / "api.md").read_text() == current, "out of date: python docs/generate_api.py"
    for name in generator.MODULES:
        for public in importlib.import_module(name).__all__:
            assert public == "reference" or f"### `{public}`" in current


def test_an_unknown_option_is_found() -> None:
    for line in ("safelora project --no-such-option x", "make nothing", "python -m safelora_kernels --fast", "rm -r /"):
        (words,) = commands(Block("shell", line, 1, ""))
        with pytest.raises((AssertionError, SystemExit)):
            assert accept(words)


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'__version__ = "{version}"' in (ROOT / "safelora_kernels" / "__init__.py").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
