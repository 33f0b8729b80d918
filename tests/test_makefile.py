"""The Makefile's rules, with a stand-in for the Python of .venv."""

import os
import shutil
import subprocess

import pytest

from conftest import ROOT


@pytest.fixture
def make(tmp_path):
    """Run `make data` in a folder whose .venv has a shell script in place of Python; return exit code and output."""
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    script = tmp_path / ".venv" / "bin" / "python"
    script.parent.mkdir(parents=True)

    def run(python, *options):
        script.write_text(f"#!/bin/sh\n{python}\n", encoding="utf-8")
        script.chmod(0o755)
        (tmp_path / ".venv" / "installed").touch()
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
        done = subprocess.run(["make", "data", *options], cwd=tmp_path, env=env, capture_output=True, encoding="utf-8")
        return done.returncode, done.stdout + done.stderr

    return run


def test_an_environment_whose_python_is_gone_is_made_again(make):
    assert "venv --clear .venv" not in make("exit 0", "--dry-run")[1]
    assert "venv --clear .venv" in make("exit 127", "--dry-run")[1]


def test_damaged_files_are_removed_and_loaded_again(make, tmp_path):
    damaged = tmp_path / "data" / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    damaged.parent.mkdir(parents=True)
    damaged.touch()
    assert make(f'case "$2" in *load_mnist*) test ! -e "{damaged}" ;; esac') == (0, "")


def test_an_error_at_import_is_shown_as_what_it_is(make):
    code, said = make('test -z "$2" || { echo "ImportError: no torch" >&2; exit 1; }')
    assert code and "ImportError: no torch" in said and "mirrors" not in said


@pytest.mark.parametrize("name", ["JUPYTER_PATH", "MPLBACKEND", "PYTHONPATH"])
def test_settings_for_another_python_are_not_read(make, name, monkeypatch):
    monkeypatch.setenv(name, "/opt/other")
    monkeypatch.setenv("PIP_USER", "1")
    assert make(f'case "$2" in *load_mnist*) test -z "${name}" -a "$PIP_USER" = 0 ;; esac') == (0, "")
