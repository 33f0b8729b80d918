"""The experiment: its verdicts, its bad inputs, and a failure that loses no other training."""

import re
import sys

import pandas as pd
import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager

from conftest import CODE, NOTEBOOKS, ROOT, text_of
from s6.model import Net
from s6.utils import Recipe

IMPORTS, _, _, RUN, JUDGE, VERDICTS = (cell.source for cell in CODE["experiment"])


@pytest.fixture(scope="module")
def names(mnist):
    """What the notebook defines before its trainings, with 200 images held out."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT / "notebooks")
        patch.setattr("sys.path", [*sys.path])
        for source in (IMPORTS, RUN, JUDGE):
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


def test_without_two_different_differences_there_is_no_interval(names):
    """The verdicts on others are in ablation.ipynb, and compared by nbval."""
    equal = pd.Series([99.41 - 99.4, 99.31 - 99.3])  # but for rounding
    assert names["verdict"](equal) == "+0.010 ± nan points, 2 pairs: cannot tell"


def test_a_planted_arm_is_worse(names):
    arms = {"ours": (Recipe(batch_size=50), Net), "low rate": (Recipe(batch_size=50, lr=0.001), Net)}
    accuracies = names["run"](arms, range(1, 4), 1, 2_000)
    assert names["verdict"](accuracies["low rate"] - accuracies["ours"]).endswith(": worse"), accuracies
    stored = r"^ReLU: .*: cannot tell\n.*\nrotation up to 60°: .*: worse$"
    assert re.search(stored, text_of(CODE["experiment"][-1]), re.MULTILINE)


def test_an_arm_that_fails_gets_no_verdict_and_the_others_go_on(names, capsys):
    class Late(Recipe):
        def augment(self, images, draws):
            assert self.seed < 3, "a mistake"
            return images

    arms = {"ours": (Recipe(), Net), "again": (Recipe(seed=7), Net), "late": (Late(), Net)}
    arms["diverges"] = Recipe(lr=1e30, batch_size=10), Net
    arms["wrong"] = Recipe(), lambda: Net(depth=2)
    shared = torch.nn.PReLU()
    arms["shared"] = Recipe(), lambda: Net(activation=shared)  # the second seed would go on with the first one's slope
    accuracies, text = verdicts(names, arms, range(1, 4), capsys)
    assert accuracies.notna().sum().tolist() == [3, 3, 0, 0, 0, 0] and accuracies["ours"].nunique() == 3
    assert "again: +0.000 ± nan points, 3 pairs: cannot tell\n" in text, "the same training again"
    assert "late failed with seed 3: AssertionError: a mistake\n" in text
    assert "diverges failed with seed 1: FloatingPointError: the training loss is nan" in text
    assert "wrong failed with seed 1: TypeError: Net.__init__()" in text and text.count("failed") == 4, "each once"
    assert "shared failed with seed 1: AssertionError: its function must make each part anew" in text
    assert "late: +nan ± nan points, 0 pairs: cannot tell\n" in text
    assert text.endswith("\nThese are short trainings. After long ones, another arm may be the best.\n")


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
    assert re.search(r"^arm: .*2 pairs", text, re.MULTILINE)


def test_the_lines_of_the_table_train_and_torchvision_draws_for_each_image(names, capsys):
    [table] = [cell.source for cell in NOTEBOOKS["experiment"].cells if "| change | line |" in cell.source]
    exec(re.search("```python\n(.*?)```", table, re.DOTALL)[1], names)
    lines = re.findall(r"^\| .* \| `(.*,)` \|$", table, re.MULTILINE)
    accuracies, text = verdicts(names, eval(f"{{{''.join(lines)}}}", names), [1], capsys)
    assert accuracies.shape == (1, 10) and accuracies.notna().all(axis=None), text
    same = names["digits"][:1].float().expand(8, 1, 28, 28)
    different = names["Torchvision"]().augment(same, None).unique(dim=0)
    assert len(different) > 4 and different.amax((1, 2, 3)).min() > 200


@pytest.mark.parametrize(
    ("seeds", "images", "message"),
    [
        (range(3), 60_000, "the last 10,000 of the 60,000 training images are held out"),
        ([1, 1.5, 2], 100, "a repeated seed repeats a training"),  # Loader takes seeds as integers
        ([1, 2, 3] * 3, 100, "a repeated seed repeats a training, and is no new pair"),
    ],
)
def test_a_budget_that_would_deceive_is_refused(names, seeds, images, message):
    with pytest.raises(AssertionError, match=message):
        names["run"]({"ours": (Recipe(), Net)}, seeds, 1, images)
