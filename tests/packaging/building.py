"""Commands, environments and copies of the checkout for the packaging tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JOBS = "2"
NOT_SOURCES = shutil.ignore_patterns(
    ".git",
    ".*venv*",
    ".*_cache",
    ".hypothesis",
    "__pycache__",
    "build",
    "dist",
    "*.egg-info",
    "*.so",
    "_build_info.json",
)


def run(
    *command: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None, fails: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command and insist on its outcome; the output is the message where it differs."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) is fails, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def tool(name: str) -> str:
    """A build tool from PATH or from beside the running interpreter."""
    path = os.pathsep.join([os.environ["PATH"], os.path.dirname(sys.executable)])
    found = shutil.which(name, path=path)
    assert found, f"{name} is a development requirement, but it is neither on PATH nor beside {sys.executable}"
    return found


def copy_checkout(destination: Path) -> Path:
    return shutil.copytree(ROOT, destination, ignore=NOT_SOURCES)


def pip(python: Path, *arguments: object, cwd: Path, env: Mapping[str, str] | None = None, fails: bool = False) -> str:
    """This environment's pip working on another interpreter, with nothing to download."""
    done = run(
        *[sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *arguments],
        *["--no-deps", "--no-index", "--no-build-isolation", "-v"],
        cwd=cwd,
        env={"PYTHONPATH": "", **(env or {})},
        fails=fails,
    )
    return done.stdout + done.stderr


def make_environment(folder: Path) -> Path:
    """A fresh environment that sees the running one's packages, though not its editable installs; its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").stdout.strip()
    Path(site, "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python
