"""The experiment: its verdicts, its bad inputs, and a failure that loses no other training."""

import re
import sys

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from IPython.core.inputtransformer2 import TransformerManager

from s6.model import Net
from s6.utils import Recipe

CELLS, ABLATION = (
    nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells for name in ("experiment", "ablation")
)
CODE = [cell.source for cell in CELLS if cell.cell_type == "code"]
ARMS, VERDICTS = (
    next(i for i, source in enumerate(CODE) if re.search(f"^{start}", source, re.MULTILINE))
    for start in ("arms = ", "accuracies, failures = ")
)


@pytest.fixture(scope="module")
def names(mnist):
    """What the notebook defines before its trainings, with 200 images held out."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT / "notebooks")
        patch.setattr("sys.path", [*sys.path])
        for source in CODE[:VERDICTS]:
            exec(TransformerManager().transform_cell(source), names)
    names["digits"], names["labels"] = names["digits"][:50_200], names["labels"][:50_200]
    return names


def verdicts(names, arms, seeds, capsys):
    """Run the cell that trains, for one epoch of 100 images. Return the accuracies, and what it prints."""
    names |= {"arms": arms, "seeds": seeds, "epochs": 1, "images": 100}
    exec(CODE[VERDICTS], names)
    names["plt"].close()
    return names["accuracies"], capsys.readouterr().out


def test_both_notebooks_judge_in_the_same_lines():
    [judge] = [source for source in CODE if "def verdict" in source]
    assert judge in [cell.source for cell in ABLATION]


@pytest.mark.parametrize(
    ("differences", "comparisons", "sentence"),
    [
        ([], 1, "cannot tell, because an interval needs at least two pairs, not 0"),
        ([0.3], 1, "cannot tell, because an interval needs at least two pairs, not 1"),
        ([99.41 - 99.4, 99.31 - 99.3], 1, "cannot tell, because all 2 differences are +0.01"),
        ([-0.1, -0.2, -0.3], 1, "-0.200 ± 0.248 points, 3 pairs: cannot tell"),
        ([-0.1, -0.11, -0.12], 1, "-0.110 ± 0.025 points, 3 pairs: worse"),
        ([0.1, 0.11, 0.12], 5, "+0.110 ± 0.057 points, 3 pairs: better"),  # at 99 %
    ],
)
def test_a_verdict_is_a_sentence_whatever_the_differences(names, differences, comparisons, sentence):
    assert names["verdict"](np.array(differences), comparisons) == sentence


def test_an_arm_that_fails_gets_no_verdict_and_the_others_go_on(names, capsys):
    class Late(Recipe):
        def augment(self, images, draws):
            assert self.seed < 3, "a mistake"
            return images

    arms = {"ours": (Recipe(), Net), "again": (Recipe(), Net), "late": (Late(), Net)}
    arms["diverges"] = Recipe(lr=1e30, batch_size=10), Net
    arms["wrong"] = Recipe(), lambda: Net(depth=2)
    accuracies, text = verdicts(names, arms, range(1, 4), capsys)
    assert accuracies.notna().sum().tolist() == [3, 3, 2, 0, 0]
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
    [table] = [cell.source for cell in CELLS if "| change | arm |" in cell.source]
    exec(re.search("```python\n(.*?)```", table, re.DOTALL)[1], names)
    more = {change: eval(arm, names) for change, arm in re.findall(r"^\| (.*) \| `(.*)` \|$", table, re.MULTILINE)}
    exec(CODE[ARMS], names)
    accuracies, text = verdicts(names, names["arms"] | more, [1], capsys)
    assert accuracies.shape == (1, 12) and accuracies.notna().all(axis=None), text


def test_images_that_are_held_out_cannot_be_trained_on(names):
    with pytest.raises(AssertionError, match="the last 10,000 of the 60,000 training images are held out"):
        names["run"]({"ours": (Recipe(), Net)}, range(3), 2, 60_000)


def test_trainings_of_a_pair_use_the_same_random_numbers(names):
    twice = {"ours": (Recipe(), Net), "again": (Recipe(seed=7), Net)}
    accuracies, _ = names["run"](twice, [1, 2], 1, 2000)
    assert (accuracies["ours"] == accuracies["again"]).all() and accuracies["ours"].nunique() == 2
