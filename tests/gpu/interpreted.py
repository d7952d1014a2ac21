"""Tests that need Triton's interpreter in a process of their own: it must be asked for before triton is imported.

The tests marked ``interpreted`` run in one child pytest; its reports are handed to this session as they stand, so every
test passes, fails and prints on its own.
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
_KEY = pytest.StashKey[dict[str, list[Any]]]()


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
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if HERE or item.get_closest_marker("interpreted") is None:
        return None
    if _KEY not in item.session.stash:
        item.session.stash[_KEY] = _run_child(item.session)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in item.session.stash[_KEY].get(item.nodeid) or [_missing(item)]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run_child(session: pytest.Session) -> dict[str, list[Any]]:
    nodes = [item.nodeid for item in session.items if item.get_closest_marker("interpreted")]
    found: dict[str, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "reports")
        path.touch()
        env = {**os.environ, "TRITON_INTERPRET": "1", _REPORTS: str(path)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *nodes]
        child = subprocess.run(command, cwd=session.config.rootpath, env=env, capture_output=True, text=True)
        found[""] = [child.stdout[-4000:] + child.stderr[-4000:]]
        for line in path.read_text(encoding="utf-8").splitlines():
            report = session.config.hook.pytest_report_from_serializable(config=session.config, data=json.loads(line))
            found.setdefault(report.nodeid, []).append(report)
    return found


def _missing(item: pytest.Item) -> Any:
    output = item.session.stash[_KEY][""][0]
    return pytest.TestReport(
        item.nodeid, item.location, {}, "failed", f"the interpreting process did not report it:\n{output}", "call"
    )
