"""That the notebooks need nothing that Colab lacks, and where their badges lead."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

NOTEBOOKS = [ROOT / "notebooks" / name for name in ("S6.ipynb", "ablation.ipynb")]
MODULES = [ROOT / "s6" / name for name in ("model.py", "utils.py")]


def requirements(path):
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return {requirement.name: requirement for requirement in map(Requirement, filter(None, lines))}


COLAB = {
    name: str(requirement.specifier).removeprefix("==")
    for name, requirement in requirements(ROOT / "tests" / "colab-constraints.txt").items()
}


def sources(path):
    if path.suffix == ".py":
        return [path.read_text()]
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS + MODULES, ids=lambda path: path.name)
def test_everything_imported_is_in_colab(path):
    imported = set()
    for node in (node for source in sources(path) for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    there = {*sys.stdlib_module_names, *COLAB, "google", "model", "utils"}
    assert imported and not imported - there


def test_colab_s_versions_satisfy_the_requirements():
    """Those it lacks come after the five that the notebook needs, and would replace none of them."""
    for name, requirement in requirements(ROOT / "requirements.txt").items():
        assert COLAB[name] in requirement.specifier if name in COLAB else name in ("nbconvert", "nbval", "pytest")
    assert set(COLAB) >= {"torch", "torchvision", "torchsummary", "matplotlib", "tqdm"}


# --------------------------------------------------------------------------------------------------------- the badge


def addresses(folder):
    """The repositories, owner/name, to which badges lead and from which notebooks fetch."""
    text = "".join(
        (folder / name).read_text() for name in ("README.md", "notebooks/S6.ipynb", "notebooks/ablation.ipynb")
    )
    badges = re.findall(r"colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/notebooks/(\w+)\.ipynb", text)
    fetched = re.findall(r'REPOSITORY = \\"https://github\.com/([^"\\]+)\\"', text)
    assert [name for _, name in badges] == ["S6", "S6", "ablation"] and len(fetched) == 2
    return {address for address, _ in badges} | set(fetched)


def test_all_badges_and_both_notebooks_have_one_address():
    assert len(addresses(ROOT)) == 1


@pytest.fixture
def project(tmp_path):
    for name in ("Makefile", "README.md", "notebooks/S6.ipynb", "notebooks/ablation.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def badge(folder, *arguments):
    done = subprocess.run(["make", "-s", "badge", *arguments], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_make_badge_sets_the_address_and_nothing_else(project):
    before = addresses(project).pop()
    assert badge(project, "REPO=some-one/S6.project") == (
        0,
        "README.md and notebooks now lead to some-one/S6.project\n",
    )
    assert addresses(project) == {"some-one/S6.project"}
    files = sorted(str(path.relative_to(project)) for path in project.rglob("*") if path.is_file())
    assert files == ["Makefile", "README.md", "notebooks/S6.ipynb", "notebooks/ablation.ipynb"]
    assert badge(project, "REPO=some-one/S6.project.git")[0] == 0  # as git has it
    assert addresses(project) == {"some-one/S6.project"}
    credit = f"https://github.com/{before}/tree/main/S6/part2"
    assert (credit in (project / "README.md").read_text()) == (credit in (ROOT / "README.md").read_text())
    badge(project, f"REPO={before}")
    for name in files:
        assert (project / name).read_bytes() == (ROOT / name).read_bytes(), "there and back again"


@pytest.mark.parametrize("repo", ["", "name", "https://github.com/owner/name", "a/b/c", "owner/na me", "a/b|c", "a&/b"])
def test_make_badge_refuses_what_is_no_repository(repo, project):
    code, said = badge(project, f"REPO={repo}")
    assert code and said.startswith(
        "The address is owner/name, as in github.com/owner/name: make badge REPO=owner/name"
    )
    assert (project / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()


def test_make_test_colab_says_when_the_python_is_missing(project):
    done = subprocess.run(
        ["make", "-s", "test-colab", "PYTHON313=/nowhere/python3.13"], cwd=project, capture_output=True, text=True
    )
    assert done.returncode
    assert done.stdout.startswith(
        "Python 3.13 is not to be had as /nowhere/python3.13. Name another: make test-colab PYTHON313="
    )
    assert not Path(project, ".venv-colab").exists()
