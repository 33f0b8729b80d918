import copy
import io
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, random_images
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from s6.model import Net
from s6.utils import MEAN, STD, Loader, Recipe, fit, predict, test, train
from studies.common import course_loader


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


# ------------------------------------------------------------------------------------------------------------ measured


def by_hand(outputs, labels):
    """Mean negative log-likelihood and accuracy in percent, image by image."""
    pairs = list(zip(outputs.tolist(), labels.tolist(), strict=True))
    right = sum(output.index(max(output)) == label for output, label in pairs)
    return sum(-output[label] for output, label in pairs) / len(pairs), 100 * right / len(pairs)


# The cross entropy of log-probabilities is their negative log-likelihood.
every_loss = pytest.mark.parametrize("criterion", [F.nll_loss, nn.CrossEntropyLoss()])


@every_loss
def test_train_reports_the_mean_over_images_not_over_batches(criterion, batches):
    model = seeded()
    oracle = copy.deepcopy(model).train()
    losses, accuracies = train(model, "cpu", batches, sgd(model, lr=0), criterion)
    outputs = [oracle(images) for images, _ in batches]  # at rate 0 each batch meets the same weights
    loss, accuracy = by_hand(torch.cat(outputs), batches.labels)
    assert losses == pytest.approx([loss], rel=1e-5) and accuracies == pytest.approx([accuracy])


@every_loss
def test_test_reports_the_mean_over_images_in_their_order_whatever_the_batch_size(criterion, batches):
    model = Net(dropout=0.5)  # in training mode: `test` has to turn the dropout off, and to leave the weights alone
    train(model, "cpu", batches, sgd(model), F.nll_loss)
    before = copy.deepcopy(model)
    expected = before.eval()((batches.images / 255 - MEAN) / STD)
    loss, accuracy = by_hand(expected, batches.labels)
    for batch_size in (1, 69, 1000):
        loader = Loader(batches.images, batches.labels, batch_size)
        losses, accuracies = test(model, "cpu", loader, criterion)
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


# ------------------------------------------------------------------------------------------------------------- trained


def test_a_batch_can_be_overfitted(mnist):
    loader, model = Loader(mnist[0][:32], mnist[1][:32], 32), seeded()
    optimizer = sgd(model, lr=0.1)
    for _ in range(60):
        losses, accuracies = train(model, "cpu", loader, optimizer, F.nll_loss)
    assert losses[-1] < 0.05 and accuracies[-1] == 100


def test_the_course_s_own_notebook_runs(mnist, monkeypatch):
    """Its calls, with flat modules and its image-by-image loader, for our network and for one of its own."""
    monkeypatch.syspath_prepend(ROOT / "s6")
    from model import Net
    from utils import test, train

    del sys.modules["model"], sys.modules["utils"]  # names that another test may use; monkeypatch would put them back
    device, criterion = torch.device("cpu"), F.nll_loss
    train_loader = test_loader = course_loader(300, 50)
    for model in (Net(), nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.LogSoftmax(1))):
        train_losses, train_acc, test_losses, test_acc = [], [], [], []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(2):
            train_losses, train_acc = train(model, device, train_loader, optimizer, criterion, train_losses, train_acc)
            test_losses, test_acc = test(model, device, test_loader, criterion, test_losses, test_acc)
        assert len(train_acc) == len(test_losses) == len(test_acc) == 2 and train_losses[1] < train_losses[0]


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}])
def test_a_recipe_without_epochs_or_images_is_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        Recipe(**wrong)


def test_recipe_decays_the_convolutions_weights_only():
    model = Net()
    optimizer = Recipe().optimizer(model)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 10_474


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


def test_the_moving_average_is_the_recurrence_and_the_schedule_is_stepped_once_a_batch(batches):
    model = seeded()
    parts, expected = prepared(Recipe(average=0.3), model, 30), copy.deepcopy(model.state_dict())
    for n, batch in enumerate([*batches, *batches]):
        train(model, "cpu", [batch], **parts)
        decay, now = min(0.3, (1 + n) / (10 + n)), model.state_dict()
        for name in now:
            if now[name].is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * now[name]
    torch.testing.assert_close(parts["averaged"].module.state_dict(), expected, rtol=1e-5, atol=1e-6)
    train(model, "cpu", batches, **parts)
    assert parts["scheduler"].last_epoch == parts["averaged"].n_averaged == 15


def test_fit_is_the_training_loop_and_the_same_seed_gives_the_same_weights(batches):
    class Gentle(Recipe):
        def optimizer(self, model):
            return torch.optim.AdamW(model.parameters(), lr=1e-3)

    recipe = Gentle(epochs=2)
    loader = Loader(batches.images, batches.labels, 16, 1, recipe.augment)
    with tqdm(total=4, disable=False, file=io.StringIO()) as bar:
        first, second = (fit(recipe, seeded(), "cpu", loader, bar=bar).state_dict() for _ in range(2))
        assert bar.n == 4
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    model = seeded()
    parts = prepared(recipe, model, len(loader))
    for loader.epoch in (1, 2):
        train(model, "cpu", loader, **parts)
    torch.testing.assert_close(parts["averaged"].state_dict(), first, rtol=0, atol=0)


class Counter(TorchDispatchMode):
    """Count the operations that compute something, not the views nor the marks of the profiler."""

    NOT = {"view", "detach", "t", "expand", "slice", "select", "split", "unsqueeze", "as_strided", "alias"}
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        self.count += not (name in self.NOT or name.startswith(("empty", "_record_function")))
        return function(*args, **(kwargs or {}))


def test_a_step_takes_at_most_ninety_operations():
    """Each of them is a kernel or more on a GPU, where launching them is what takes the time."""
    recipe, model = Recipe(), Net()
    loader = Loader(*random_images(2000), recipe.batch_size, recipe.seed, recipe.augment)
    parts = prepared(recipe, model, len(loader))
    train(model, "cpu", loader, **parts)
    with Counter() as counter:
        train(model, "cpu", loader, **parts)
    assert 70 < counter.count / len(loader) <= 90


# -------------------------------------------------------------------------------------------------------- an NVIDIA GPU

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def trained(device, loader, model):
    """Train for two epochs as the notebook does; return the loss of each, and all weights, on the CPU."""
    model = copy.deepcopy(model).to(device, memory_format=torch.channels_last)
    parts = prepared(Recipe(epochs=2, lr=0.02), model, 30)
    losses, _ = train(model, device, loader, **parts)
    train(model, device, loader, train_losses=losses, **parts)
    return losses, [t.cpu().float() for part in (model, parts["averaged"]) for t in part.state_dict().values()]


LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10), nn.LogSoftmax(1))


@needs_a_gpu
@pytest.mark.parametrize("sizes", [[20] * 25, [20] * 5 + [7] + [20] * 5 + [7, 7, 20]], ids=["50 steps", "sizes"])
@pytest.mark.parametrize("model", [seeded(), LINEAR], ids=["ours", "linear"])
def test_a_graph_trains_as_the_steps_one_by_one_and_as_a_cpu(sizes, model, monkeypatch, recwarn):
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)
    # Otherwise cuDNN adds in another order each time, and 50 steps make the difference large.
    monkeypatch.setattr("torch.backends.cudnn.deterministic", True)
    generator = torch.Generator().manual_seed(1)
    loader = [(torch.randn(n, 1, 28, 28, generator=generator), torch.arange(n) % 10) for n in sizes]
    cpu, graph = (trained(device, loader, model) for device in ("cpu", "cuda"))
    assert not recwarn.list, [str(warning.message) for warning in recwarn]
    monkeypatch.setattr("s6.utils.graphed", lambda step: step)
    eager = trained("cuda", loader, model)
    assert graph[0] == pytest.approx(eager[0], rel=1e-6) and graph[0] == pytest.approx(cpu[0], rel=1e-3)
    torch.testing.assert_close(graph[1], eager[1], rtol=1e-6, atol=1e-6)  # on an H200 they were equal


@needs_a_gpu
def test_a_graph_bears_dropout_and_a_loader_that_pins_memory():
    images, labels = random_images(400)
    dataset = torch.utils.data.TensorDataset(images / 255, labels)
    loader = torch.utils.data.DataLoader(dataset, 20, num_workers=2, pin_memory=True)
    losses, _ = trained("cuda", loader, Net(dropout=0.1))
    assert losses[1] < losses[0] < 4
