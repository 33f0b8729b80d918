import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from s6.utils import plot_confusion, plot_curves, plot_digits, plot_mistakes


def log_probabilities(predicted, confidence):
    outputs = torch.full((len(predicted), 10), 0.0)
    for row, digit, p in zip(outputs, predicted, confidence, strict=True):
        row.fill_((1 - p) / 9)
        row[digit] = p
    return outputs.log()


LABELS = torch.tensor([3, 5, 9, 4, 9])
OUTPUTS = log_probabilities([3, 6, 4, 4, 4], [0.99, 0.60, 0.95, 0.8, 0.7])
IMAGES = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 28, 28)


def test_curves_show_both_sets_the_goal_and_the_last_value():
    fig = plot_curves([0.5, 0.1], [90.0, 98.0], [0.3, 0.02], [95.0, 99.55])
    left, right = fig.axes
    drawn = [line.get_ydata().tolist() if hasattr(line.get_ydata(), "tolist") else list(line.get_ydata())
             for axes in (left, right) for line in axes.lines]  # fmt: skip
    assert drawn == [[0.5, 0.1], [0.3, 0.02], [90.0, 98.0], [95.0, 99.55], [99.4, 99.4]]
    assert [t.get_text() for t in right.get_legend().get_texts()][1] == "test, last 99.55 %"
    assert right.get_ylim()[0] <= 95


def test_curves_of_an_interrupted_run_are_drawn_as_far_as_they_go():
    fig = plot_curves([0.5, 0.1], [90.0, 98.0], [0.3], [95.0])
    assert [len(line.get_xdata()) for line in fig.axes[0].lines] == [2, 1]
    fig = plot_curves([], [], [], [])  # in its first epoch
    fig.canvas.draw()
    assert not any(len(line.get_xdata()) for line in fig.axes[0].lines)


def test_mistakes_are_the_wrong_ones_the_most_confident_first():
    fig = plot_mistakes(IMAGES, OUTPUTS, LABELS)
    titles = [axes.get_title() for axes in fig.axes if axes.images]
    assert titles == ["9, read 4\n95%", "9, read 4\n70%", "5, read 6\n60%"]
    assert [axes.images[0].get_array().max() for axes in fig.axes if axes.images] == [2, 4, 1]
    assert sum(bool(axes.images) for axes in plot_mistakes(IMAGES, OUTPUTS, LABELS, limit=1).axes) == 1


def test_a_perfect_network_has_no_mistakes_to_draw():
    perfect = log_probabilities(LABELS.tolist(), [0.9] * 5)
    for fig in (plot_mistakes(IMAGES, perfect, LABELS), plot_confusion(perfect, LABELS)):
        fig.canvas.draw()


def test_confusion_counts_the_mistakes():
    axes = plot_confusion(OUTPUTS, LABELS).axes[0]
    assert {(t.get_position(), t.get_text()) for t in axes.texts} == {((4, 9), "2"), ((6, 5), "1")}
    assert axes.images[0].get_array().sum() == 3


def test_pictures_are_figures_that_pyplot_does_not_keep():
    figures = [plot_digits(IMAGES), plot_digits(IMAGES.byte(), "abcde", columns=3), plot_confusion(OUTPUTS, LABELS)]
    assert all(type(fig) is Figure for fig in figures) and not plt.get_fignums()
    assert [axes.get_title() for axes in figures[1].axes] == [*"abcde", ""]
