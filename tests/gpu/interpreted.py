"""Tests that need Triton's interpreter in a process of their own: it must be asked for before triton is imported.

The tests of a file that are marked ``interpreted`` run in one child pytest; each of them passes, fails or is skipped
here as it did there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

HERE = os.environ.get("TRITON_INTERPRET") == "1"
_REPORTS = "SAFELORA_INTERPRETED_REPORTS"
Child = tuple[str, dict[str, list[Any]]]  # what it printed, its reports by test
_KEY = pytest.StashKey[dict[Path, Child]]()


class Recorder:
    """Writes each report of the child to a file, one JSON object per line."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self.config, self.path = config, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(data) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: runs Triton kernels in the interpreter, in a child process")
    if HERE and _REPORTS in os.environ:
        config.pluginmanager.register(Recorder(config, os.environ[_REPORTS]))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if HERE or pyfuncitem.get_closest_marker("interpreted") is None:
        return None
    children = pyfuncitem.session.stash.setdefault(_KEY, {})
    if pyfuncitem.path not in children:
        children[pyfuncitem.path] = _run_child(pyfuncitem.session, pyfuncitem.path)
    output, reports = children[pyfuncitem.path]
    if pyfuncitem.nodeid not in reports:
        pytest.fail(f"the interpreting process did not report it:\n{output}", pytrace=False)
    for report in reports[pyfuncitem.nodeid]:
        if report.skipped:
            pytest.skip(str(report.longrepr[-1]))
        if report.failed:
            pytest.fail(report.longreprtext, pytrace=False)
    return True


def _run_child(session: pytest.Session, file: Path) -> Child:
    nodes = [item.nodeid for item in session.items if item.path == file and item.get_closest_marker("interpreted")]
    reports: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "reports")
        path.touch()
        env = {**os.environ, "TRITON_INTERPRET": "1", _REPORTS: str(path)}
        for name in [name for name in env if name.startswith("PYTEST_XDIST")]:
            del env[name]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *nodes]
        child = subprocess.run(command, cwd=session.config.rootpath, env=env, capture_output=True, text=True)
        for line in path.read_text(encoding="utf-8").splitlines():
            report = session.config.hook.pytest_report_from_serializable(config=session.config, data=json.loads(line))
            reports.setdefault(report.nodeid, []).append(report)
    return child.stdout[-4000:] + child.stderr[-4000:], reports
