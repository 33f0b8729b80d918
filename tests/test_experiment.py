"""The experiment: its verdicts, its bad inputs, and a failure that loses no other training."""

import re
import sys

import numpy as np
import pytest
from conftest import CODE, NOTEBOOKS, ROOT
from IPython.core.inputtransformer2 import TransformerManager

from s6.model import Net
from s6.utils import Recipe

IMPORTS, ARMS, BUDGET, RUN, JUDGE, VERDICTS, *_ = (cell.source for cell in CODE["experiment"])


@pytest.fixture(scope="module")
def names(mnist):
    """What the notebook defines before its trainings, with 200 images held out."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT / "notebooks")
        patch.setattr("sys.path", [*sys.path])
        for source in (IMPORTS, ARMS, BUDGET, RUN, JUDGE):
            exec(TransformerManager().transform_cell(source), names)
    names["digits"], names["labels"] = names["digits"][:50_200], names["labels"][:50_200]
    return names


def verdicts(names, arms, seeds, capsys):
    """Run the cell that trains, for one epoch of 100 images. Return the accuracies, and what it prints."""
    names |= {"arms": arms, "seeds": seeds, "epochs": 1, "images": 100}
    exec(VERDICTS, names)
    return names["accuracies"], capsys.readouterr().out


def test_both_notebooks_judge_in_the_same_lines():
    assert JUDGE in [cell.source for cell in CODE["ablation"]]


def test_without_an_interval_the_verdict_says_why(names):
    """With one, the verdicts of ablation.ipynb are compared by nbval."""
    needed = "an interval needs at least two pairs, not"
    for differences, why in (
        ([], f"{needed} 0"),
        ([0.3], f"{needed} 1"),
        ([99.41 - 99.4, 99.31 - 99.3], "all 2 differences are +0.01"),
    ):
        assert names["verdict"](np.array(differences)) == f"cannot tell, because {why}"


def test_an_arm_that_fails_gets_no_verdict_and_the_others_go_on(names, capsys):
    class Late(Recipe):
        def augment(self, images, draws):
            assert self.seed < 3, "a mistake"
            return images

    arms = {"ours": (Recipe(), Net), "again": (Recipe(seed=7), Net), "late": (Late(), Net)}
    arms["diverges"] = Recipe(lr=1e30, batch_size=10), Net
    arms["wrong"] = Recipe(), lambda: Net(depth=2)
    accuracies, text = verdicts(names, arms, range(1, 4), capsys)
    assert accuracies.notna().sum().tolist() == [3, 3, 2, 0, 0] and accuracies["ours"].nunique() == 3
    short = " (of a short training; a long one may rank otherwise)\n"
    assert f"again: cannot tell, because all 3 differences are +0.00{short}" in text
    assert "late: no verdict. late failed with seed 3: AssertionError: a mistake\n" in text
    assert "diverges: no verdict. diverges failed with seed 1: FloatingPointError: the training loss is nan" in text
    assert "wrong: no verdict. wrong failed with seed 1: TypeError: Net.__init__() got an unexpected" in text
    _, text = verdicts(names, dict(reversed(arms.items())), [1], capsys)
    assert text.count("no verdict. wrong failed") == 5, "the first arm, too, and at once"


@pytest.mark.parametrize("arm", [(Recipe(), Net()), (Recipe, Net)], ids=["a network made once", "a class"])
def test_what_is_no_arm_is_said_before_any_training(names, arm, capsys):
    with pytest.raises(AssertionError, match=r"new: an arm is \(Recipe\(...\), Net\) or"):
        verdicts(names, {"ours": (Recipe(), Net), "new": arm}, [1], capsys)


def test_an_interrupted_experiment_keeps_what_is_complete(names, capsys):
    class Interrupted(Recipe):
        def augment(self, images, draws):
            if self.seed == 3:
                raise KeyboardInterrupt
            return images

    accuracies, text = verdicts(names, {"ours": (Recipe(), Net), "arm": (Interrupted(), Net)}, range(1, 6), capsys)
    assert accuracies.notna().sum().tolist() == [3, 2] and text.startswith("Interrupted")
    assert re.search(r"^arm: .*(2 pairs|2 differences)", text, re.MULTILINE)


def test_the_arms_in_the_table_train(names, capsys):
    [table] = [cell.source for cell in NOTEBOOKS["experiment"].cells if "| change | arm |" in cell.source]
    exec(re.search("```python\n(.*?)```", table, re.DOTALL)[1], names)
    more = {change: eval(arm, names) for change, arm in re.findall(r"^\| (.*) \| `(.*)` \|$", table, re.MULTILINE)}
    exec(ARMS, names)
    accuracies, text = verdicts(names, names["arms"] | more, [1], capsys)
    assert accuracies.shape == (1, 12) and accuracies.notna().all(axis=None), text


def test_images_that_are_held_out_cannot_be_trained_on(names):
    with pytest.raises(AssertionError, match="the last 10,000 of the 60,000 training images are held out"):
        names["run"]({"ours": (Recipe(), Net)}, range(3), 2, 60_000)
