import copy
from dataclasses import dataclass, replace
from unittest.mock import Mock, call

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

from conftest import ROOT
from s6.model import Net
from s6.utils import MEAN, STD, Loader, Recipe, fit, predict, test, train


def seeded():
    torch.manual_seed(0)
    return Net()


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def prepared(recipe, model, steps_per_epoch):
    """What `train` needs of a recipe, by the names of its arguments."""
    optimizer = recipe.optimizer(model)
    scheduler = recipe.scheduler(optimizer, steps_per_epoch)
    return {"optimizer": optimizer, "scheduler": scheduler, "averaged": recipe.averaged(model), "criterion": F.nll_loss}


def by_hand(outputs, labels):
    """Mean negative log-likelihood and accuracy in percent, image by image."""
    pairs = list(zip(outputs.tolist(), labels.tolist(), strict=True))
    right = sum(output.index(max(output)) == label for output, label in pairs)
    return sum(-output[label] for output, label in pairs) / len(pairs), 100 * right / len(pairs)


def test_train_reports_the_mean_over_images_not_over_batches(batches):
    model = seeded()
    oracle = copy.deepcopy(model).train()
    losses, accuracies = train(model, "cpu", batches, sgd(model, lr=0), F.nll_loss)
    outputs = [oracle(images) for images, _ in batches]  # at rate 0 each batch meets the same weights
    loss, accuracy = by_hand(torch.cat(outputs), batches.labels)
    assert losses == pytest.approx([loss], rel=1e-5) and accuracies == pytest.approx([accuracy])


def test_test_reports_the_mean_over_images_in_their_order_whatever_the_batch_size(batches):
    model = Net(dropout=0.5)  # in training mode: `test` has to turn the dropout off, and to leave the weights alone
    train(model, "cpu", batches, sgd(model), F.nll_loss)
    before = copy.deepcopy(model)
    expected = before.eval()((batches.images / 255 - MEAN) / STD)
    loss, accuracy = by_hand(expected, batches.labels)
    for batch_size in (1, 69, 1000):
        loader = Loader(batches.images, batches.labels, batch_size)
        losses, accuracies = test(model, "cpu", loader, F.nll_loss)
        assert losses == pytest.approx([loss], rel=1e-4) and accuracies == pytest.approx([accuracy])
        torch.testing.assert_close(model.train().state_dict(), before.state_dict(), rtol=0, atol=0)
        outputs, labels = predict(model, "cpu", loader)
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(labels, batches.labels)


def test_exactly_the_goal_is_not_more_than_the_goal():
    """As float32, 9,940 of 10,000 would be 99.4000018 %."""
    answers = torch.eye(10)[torch.zeros(10_000, dtype=torch.long)]
    labels = (torch.arange(10_000) >= 9_940).long()
    _, accuracies = test(nn.Identity(), "cpu", [(answers, labels)], F.cross_entropy)
    assert accuracies == [99.4]


def test_a_loss_that_is_not_finite_is_an_error_and_the_histories_stay(batches):
    model, histories = Net(), ([1.0], [2.0])
    broken = [(images * float("nan"), labels) for images, labels in batches]
    with pytest.raises(FloatingPointError, match="training loss is nan"):
        train(model, "cpu", broken, sgd(model), F.nll_loss, *histories)
    assert histories == ([1.0], [2.0])


def test_the_course_s_own_notebook_runs(mnist):
    """Its calls, with its image-by-image loader, for our network and for one of its own."""
    device, criterion = torch.device("cpu"), F.nll_loss
    transform = transforms.Compose([transforms.RandomRotation(15), transforms.ToTensor()])
    train_loader = test_loader = DataLoader(Subset(MNIST(ROOT / "data", transform=transform), range(300)), 50)
    for model in (Net(), nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.LogSoftmax(1))):
        train_losses, train_acc, test_losses, test_acc = [], [], [], []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(2):
            train_losses, train_acc = train(model, device, train_loader, optimizer, criterion, train_losses, train_acc)
            test_losses, test_acc = test(model, device, test_loader, criterion, test_losses, test_acc)
        assert len(train_acc) == len(test_losses) == len(test_acc) == 2 and train_losses[1] < train_losses[0]


@pytest.mark.parametrize("annotations", [{}, {"lr": float, "learning_rate": float}])
@pytest.mark.parametrize("name", ["lr", "learning_rate"])
def test_a_number_that_python_would_ignore_is_an_error(name, annotations):
    own = type("Mine", (Recipe,), {name: 0.01, "__annotations__": annotations})
    for cls in (own, type("Heir", (own,), {})):
        with pytest.raises(TypeError, match=rf"`{name} = 0.01` in class {cls.__name__} sets nothing"):
            cls()


def test_a_step_is_nesterov_s_and_decays_the_convolutions_weights_only(batches):
    model, velocity = seeded().train(), {}
    optimizer = Recipe(lr=0.05).optimizer(model)
    kernels = {name for name, p in model.named_parameters() if p.ndim == 4}
    for images, labels in batches:
        before, expected = copy.deepcopy(model), {}
        F.nll_loss(before(images), labels).backward()
        for name, p in before.named_parameters():
            gradient = p.grad + 5e-4 * p.detach() * (name in kernels)
            velocity[name] = 0.9 * velocity.get(name, 0) + gradient
            expected[name] = p.detach() - 0.05 * (gradient + 0.9 * velocity[name])
        train(model, "cpu", [(images, labels)], optimizer, F.nll_loss)
        torch.testing.assert_close(dict(model.named_parameters()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 2), (5, 1), (20, 240)])
def test_the_rate_rises_to_its_peak_and_is_zero_only_after_the_last_step(epochs, steps):
    parts, rates = prepared(Recipe(epochs=epochs), Net(), steps), []
    for _ in range(epochs * steps + 2):
        rates.append(parts["optimizer"].param_groups[0]["lr"])
        parts["optimizer"].step()
        parts["scheduler"].step()
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert Recipe.lr / 2 < max(rates) <= Recipe.lr and min(rates[:-2]) > 0 and rates[-2:] == [0, 0]
    assert epochs * steps < 100 or peak == 0.2 * epochs * steps and max(rates) == Recipe.lr


def test_the_moving_average_is_the_mean_with_polynomial_weights_and_moves_once_a_batch(batches):
    """In closed form: for eta = 2, the weights after t steps count (t + 1) (t + 2) times. All blocks share a slope."""
    torch.manual_seed(0)
    model = Net(activation=nn.PReLU())
    parts, iterates = prepared(Recipe(average=3.0), model, 30), [copy.deepcopy(model.state_dict())]
    for step, batch in enumerate([*batches, *batches], 1):
        train(model, "cpu", [batch], **parts)
        iterates.append(copy.deepcopy(model.state_dict()))
        weights = torch.tensor([(t + 1.0) * (t + 2) for t in range(step + 1)])
        for name, average in parts["averaged"].module.state_dict().items():
            if average.is_floating_point():
                history = torch.stack([iterate[name] for iterate in iterates], -1)
                torch.testing.assert_close(average, history @ weights / weights.sum(), rtol=1e-4, atol=1e-6)
    train(model, "cpu", batches, **parts)
    assert parts["scheduler"].last_epoch == parts["averaged"].n_averaged == 15


def test_fit_is_the_training_loop_and_the_same_seed_gives_the_same_weights(batches):
    @dataclass(frozen=True)  # so that it may have another default, and settings of its own
    class Gentle(Recipe):
        lr: float = 0.01
        beta: float = 0.9

        def optimizer(self, model):
            return torch.optim.AdamW(model.parameters(), self.lr, (self.beta, 0.999))

    recipe = replace(Gentle(beta=0.8), epochs=2)
    assert (recipe.lr, recipe.beta, recipe.epochs, recipe.momentum) == (0.01, 0.8, 2, 0.9)
    loader = Loader(batches.images, batches.labels, 16, 1, recipe.augment)
    bar = Mock()
    first, second = (fit(recipe, seeded(), "cpu", loader, bar=bar).state_dict() for _ in range(2))
    assert bar.update.mock_calls == [call()] * 4
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    model = seeded()
    parts = prepared(recipe, model, len(loader))
    for loader.epoch in (1, 2):
        train(model, "cpu", loader, **parts)
    torch.testing.assert_close(parts["averaged"].state_dict(), first, rtol=0, atol=0)
