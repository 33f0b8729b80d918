import matplotlib.pyplot as plt
import torch

from s6.utils import plot_curves, plot_digits, plot_mistakes

LABELS = torch.tensor([3, 5, 9, 4, 9])
PREDICTED = torch.tensor([3, 6, 4, 4, 4])
CONFIDENCE = torch.tensor([0.99, 0.60, 0.95, 0.8, 0.7])
ONE_HOT = torch.eye(10)[PREDICTED]
OUTPUTS = (ONE_HOT * CONFIDENCE[:, None] + (1 - ONE_HOT) * (1 - CONFIDENCE[:, None]) / 9).log()
IMAGES = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 28, 28)


def test_curves_show_both_sets_the_goal_and_the_last_value_and_can_be_saved(tmp_path):
    plot_curves([0.5, 0.1], [90.0, 98.0], [0.3, 0.02], [95.0, 99.55])
    left, right = plt.gcf().axes
    drawn = [list(line.get_ydata()) for axes in (left, right) for line in axes.lines]
    assert drawn == [[0.5, 0.1], [0.3, 0.02], [90.0, 98.0], [95.0, 99.55], [99.4, 99.4]]
    assert [t.get_text() for t in right.get_legend().get_texts()][1] == "test, last 99.55 %"
    assert right.get_ylim()[0] <= 95
    plt.savefig(tmp_path / "curves.png")
    assert (plt.imread(tmp_path / "curves.png")[..., :3] != 1).mean() > 0.02, "not an empty figure"
    plot_curves([], [], [], [])  # interrupted in its first epoch
    plt.gcf().canvas.draw()


def test_mistakes_are_the_wrong_ones_the_most_confident_first():
    scores = OUTPUTS + torch.arange(5.0)[:, None]
    plot_mistakes(IMAGES, scores, LABELS)
    drawn = [axes for axes in plt.gcf().axes if axes.images]
    assert [axes.get_title() for axes in drawn] == ["9, read 4\n95%", "9, read 4\n70%", "5, read 6\n60%"]
    assert [axes.images[0].get_array().max() for axes in drawn] == [2, 4, 1]


def test_a_perfect_network_has_no_mistakes_to_draw():
    assert plot_mistakes(IMAGES, OUTPUTS, PREDICTED) is plot_digits(IMAGES) is None  # Jupyter shows the figure once
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
