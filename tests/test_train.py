import copy
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from s6.model import Net
from s6.utils import (
    MEAN,
    STD,
    CPUParallel,
    Recipe,
    TensorLoader,
    describe,
    mnist_loaders,
    predict,
    set_seed,
    test,
    train,
)
from studies.speed import course_loader


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------------------- figures


def test_train_reports_the_mean_over_images_not_over_batches(batches):
    set_seed(0)
    model = Net()
    oracle = copy.deepcopy(model).train()
    losses, accuracies = train(model, "cpu", batches, sgd(model, lr=0), F.nll_loss)
    loss = correct = 0
    for images, labels in batches:  # at rate 0 each batch meets the same weights; BatchNorm uses the batch
        output = oracle(images)
        loss += sum(-output[i, label].item() for i, label in enumerate(labels))
        correct += sum(output[i].argmax().item() == label for i, label in enumerate(labels.tolist()))
    assert losses == pytest.approx([loss / 70], rel=1e-5)
    assert accuracies == pytest.approx([100 * correct / 70])


def test_test_reports_the_mean_over_images_whatever_the_batch_size(batches):
    set_seed(0)
    model = Net()
    train(model, "cpu", batches, sgd(model), F.nll_loss)
    output = model.eval()(torch.cat([images for images, _ in batches]))
    loss = F.nll_loss(output, batches.labels).item()
    accuracy = 100 * sum(a == b for a, b in zip(output.argmax(1).tolist(), batches.labels.tolist(), strict=True)) / 70
    for batch_size in (1, 16, 69, 70, 1000):
        loader = TensorLoader(batches.images, batches.labels, batch_size)
        losses, accuracies = test(model, "cpu", loader, F.nll_loss)
        assert losses == pytest.approx([loss], rel=1e-4) and accuracies == pytest.approx([accuracy])


def test_exactly_the_goal_is_not_more_than_the_goal():
    """As float32, 9,940 of 10,000 would be 99.4000018 %."""
    answers = torch.eye(10)[torch.zeros(10_000, dtype=torch.long)]
    labels = (torch.arange(10_000) >= 9_940).long()
    _, accuracies = test(nn.Identity(), "cpu", [(answers.log(), labels)], lambda output, labels: output[:, 0].mean())
    assert accuracies == [99.4]


def test_test_leaves_the_model_alone(batches):
    model = Net(dropout=0.5).train()
    before = state(model)
    first = test(model, "cpu", batches, F.nll_loss)
    assert same(state(model), before)
    assert test(model, "cpu", batches, F.nll_loss) == first, "no dropout while testing"


def test_histories_are_appended_to_and_returned(batches):
    model = Net()
    losses, accuracies = [7.0], [8.0]
    assert train(model, "cpu", batches, sgd(model), F.nll_loss, losses, accuracies) == (losses, accuracies)
    assert test(model, "cpu", batches, F.nll_loss, losses, accuracies)[0] is losses
    assert len(losses) == len(accuracies) == 3 and losses[0] == 7 and accuracies[0] == 8
    assert len(train(model, "cpu", batches, sgd(model), F.nll_loss)[0]) == 1, "no list is shared between calls"


@pytest.mark.parametrize("criterion", [F.nll_loss, F.cross_entropy, nn.NLLLoss(), nn.CrossEntropyLoss()])
def test_each_criterion_gives_the_same_figures(criterion, batches):
    """The cross entropy of log-probabilities is their negative log-likelihood."""
    set_seed(0)
    model = Net()
    losses, _ = train(model, "cpu", batches, sgd(model), criterion)
    losses, _ = test(model, "cpu", batches, criterion, losses)
    set_seed(0)
    model = Net()
    expected, _ = train(model, "cpu", batches, sgd(model), F.nll_loss)
    assert losses == pytest.approx(test(model, "cpu", batches, F.nll_loss, expected)[0], rel=1e-4)


def test_any_iterable_of_batches_serves(batches):
    images = torch.cat([images for images, _ in batches])
    plain = DataLoader(TensorDataset(images, batches.labels), batch_size=16)
    results = []
    for loader in (batches, plain, list(plain), (batch for batch in list(plain))):
        set_seed(0)
        model = Net()
        train(model, "cpu", loader, sgd(model), F.nll_loss)
        results.append(test(model, "cpu", plain, F.nll_loss))
    assert results[1:] == results[:1] * 3


def test_a_batch_can_be_overfitted(mnist):
    images, labels = next(iter(mnist_loaders(ROOT / "data", 64, "cpu")[0]))
    set_seed(0)
    model = Net()
    optimizer = sgd(model, lr=0.1)
    for _ in range(60):
        losses, accuracies = train(model, "cpu", [(images, labels)], optimizer, F.nll_loss, disable=True)
    assert losses[-1] < 0.05 and accuracies[-1] == 100


# ------------------------------------------------------------------------------------------------------- the course


def test_the_course_s_own_notebook_runs(mnist, monkeypatch, capsys):
    """Its calls, with flat modules and its image-by-image loaders, on the first images; StepLR as torch has it now."""
    monkeypatch.syspath_prepend(ROOT / "s6")
    from model import Net
    from utils import test, train

    del sys.modules["model"], sys.modules["utils"]  # names that another test may use; monkeypatch would put them back
    torch.manual_seed(1)
    device = torch.device("cpu")
    loader = course_loader(700, 0, device)
    train_losses, train_acc, test_losses, test_acc = [], [], [], []
    model = Net().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=15, gamma=0.1)
    criterion = F.nll_loss
    for _ in range(2):
        train_losses, train_acc = train(model, device, loader, optimizer, criterion, train_losses, train_acc)
        test_losses, test_acc = test(model, device, loader, criterion, test_losses, test_acc)
        scheduler.step()
    assert len(train_losses) == len(train_acc) == len(test_losses) == len(test_acc) == 2
    assert train_losses[1] < train_losses[0] and 0 <= max(test_acc) <= 100
    assert "2/2" in capsys.readouterr().out, "the bar is on stdout, and stays unless told otherwise"


# ---------------------------------------------------------------------------------------------------------- recipe


def test_recipe_decays_the_convolutions_weights_only():
    model = Net()
    optimizer, _, _ = Recipe().prepare(model, 10)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 10_474


def test_the_schedule_is_stepped_once_a_batch_and_rises_and_falls(batches):
    model, recipe = Net(), Recipe(epochs=4)
    optimizer, scheduler, averaged = recipe.prepare(model, len(batches))
    rates = []
    for _ in range(recipe.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        train(model, "cpu", batches, optimizer, F.nll_loss, scheduler=scheduler, averaged=averaged)
    assert scheduler.last_epoch == 4 * len(batches)
    assert rates[0] < rates[1] > rates[2] > rates[3] > optimizer.param_groups[0]["lr"] == 0
    with pytest.raises(ValueError, match="schedule is over after its 4 epochs of 5 steps"):
        train(model, "cpu", batches, optimizer, F.nll_loss, scheduler=scheduler)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 2), (5, 1), (20, 480)])
def test_the_rate_reaches_its_peak_once_and_is_never_zero_while_it_trains(epochs, steps):
    optimizer, scheduler, _ = Recipe(epochs=epochs).prepare(Net(), steps)
    rates = []
    for _ in range(epochs * steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(rates) == Recipe.lr and rates.count(Recipe.lr) == 1 and min(rates) > 0
    assert optimizer.param_groups[0]["lr"] == 0


def test_a_recipe_without_a_step_is_refused():
    with pytest.raises(ValueError, match="nothing to train: 20 epochs of 0 steps"):
        Recipe().prepare(Net(), 0)


def test_the_moving_average_is_the_recurrence(batches):
    set_seed(0)
    model = Net()
    optimizer, scheduler, averaged = Recipe(average=0.6).prepare(model, 30)
    expected = None
    for n, batch in enumerate([*batches, *batches]):
        train(model, "cpu", [batch], optimizer, F.nll_loss, scheduler=scheduler, averaged=averaged)
        decay = min(0.6, (1 + n) / (10 + n))
        now = state(model)
        if n == 0:
            expected = now
        for name in now:
            floats = now[name].is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * now[name] if floats else now[name]
    for name, value in averaged.module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parallel", [False, True])
def test_two_seeded_runs_are_equal_bit_for_bit(parallel, mnist):
    def run(seed):
        set_seed(seed)
        loader, _ = mnist_loaders(ROOT / "data", 100, "cpu", seed, holdout=59_000)
        model = Net(dropout=0 if parallel else 0.1)
        optimizer, scheduler, averaged = Recipe().prepare(model, len(loader))
        fast = CPUParallel(model) if parallel else model
        history = train(fast, "cpu", loader, optimizer, F.nll_loss, scheduler=scheduler, averaged=averaged)
        return history, state(averaged)

    (history, weights), (again, weights_again), (other, _) = run(1), run(1), run(2)
    assert history == again and same(weights, weights_again)
    assert history != other


def test_set_seed_deterministic_is_switched_on_and_off_again(batches, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that what is set here is taken back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    model = Net()
    try:
        set_seed(1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        loader = TensorLoader(batches.images, batches.labels, 16, torch.Generator(), Recipe().augment)
        train(model, "cpu", loader, sgd(model), F.nll_loss)  # torch raises where a kernel is not deterministic
    finally:
        set_seed(1)
    assert not torch.are_deterministic_algorithms_enabled()


# ------------------------------------------------------------------------------------------------------------ speed


def test_the_host_reads_from_the_device_far_less_than_once_a_step(batches, monkeypatch):
    """Each reading waits for all that a GPU still has to do."""
    images, labels = next(iter(batches))
    readings = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, name=name, **kwargs):
            if self.is_floating_point():  # not the labels, which lie on the host here and are checked there
                readings.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    model = Net()
    optimizer, scheduler, averaged = Recipe().prepare(model, 200)
    many = [(images[:2], labels[:2])] * 50
    train(model, "cpu", many, optimizer, F.nll_loss, scheduler=scheduler, averaged=averaged, mininterval=3600)
    assert readings == ["tolist"]


def shards_alone(model, images, labels):
    """Outputs and gradients of two halves, one after the other, each with BatchNorm statistics of its own."""
    replicas = model.train(), weights_shared(model)
    outputs = torch.cat([replica(half) for replica, half in zip(replicas, images.chunk(2), strict=True)])
    return outputs, torch.autograd.grad(F.nll_loss(outputs, labels), list(model.parameters()))


def weights_shared(model):
    copied = copy.deepcopy(model)
    for (name, _), weight in zip(list(copied.named_parameters()), model.parameters(), strict=True):
        owner, _, leaf = name.rpartition(".")
        setattr(copied.get_submodule(owner), leaf, weight)
    return copied


@pytest.mark.parametrize("count", [16, 7])
def test_shards_in_threads_give_what_shards_one_after_the_other_give(count, batches):
    images, labels = next(iter(batches))
    images, labels = images[:count].double(), labels[:count]
    set_seed(0)
    model = Net().double()  # in float32 another layout rounds otherwise, and a ReLU near zero turns over
    expected, gradients = shards_alone(copy.deepcopy(model), images, labels)
    parallel = CPUParallel(model, dtype=torch.float32)
    output = parallel.train()(images)
    F.nll_loss(output, labels).backward()
    torch.testing.assert_close(output, expected)
    for weight, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-7)


def test_shards_in_bfloat16_are_autocast_s(batches):
    images, _ = next(iter(batches))
    set_seed(0)
    model = Net().to(memory_format=torch.channels_last)
    copies = [copy.deepcopy(model).train() for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([alone(half) for alone, half in zip(copies, images.chunk(2), strict=True)])
    output = CPUParallel(model, dtype=torch.bfloat16).train()(images)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected)
    exact = CPUParallel(model, dtype=torch.float32).train()(images)
    assert 0 < (output - exact).abs().max() < 0.1


def test_each_shard_and_the_rest_have_one_thread():
    code = (
        "import torch; from s6.model import Net; from s6.utils import CPUParallel; torch.set_num_threads(2); "
        "shards = CPUParallel(Net()).pool.map(lambda _: torch.get_num_threads(), range(4)); "
        "print(list(shards), torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[1, 1, 1, 1] 1\n", "")


@pytest.mark.parametrize(
    ("capabilities", "said"),
    [
        ({"cpu_name": "Some CPU", "avx512_bf16": True, "amx_bf16": False}, "Some CPU, 3 CPUs, bfloat16"),
        ({"cpu_name": "Some CPU", "avx512_bf16": False}, "Some CPU, 3 CPUs, float32"),
        ({"bf16": True}, "riscv, 3 CPUs, bfloat16"),
        ({}, "riscv, 3 CPUs, float32"),
    ],
)
def test_the_type_is_what_the_processor_can(capabilities, said, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr("platform.machine", lambda: "riscv")
    assert describe("cpu") == describe(torch.device("cpu")) == said
    assert str(CPUParallel(Net()).dtype) == f"torch.{said.split()[-1]}"


@pytest.mark.parametrize(("libc", "calls"), [("glibc", [(-3, 2**25), (-1, 2**31 - 1)]), ("musl", []), ("", [])])
def test_freed_memory_is_kept_where_glibc_is(libc, calls, monkeypatch):
    made = []
    monkeypatch.setattr("platform.libc_ver", lambda: (libc, "2.36"))
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(mallopt=lambda *call: made.append(call)))
    CPUParallel(Net())
    assert made == calls


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps, lambda parallel: Recipe().prepare(parallel, 10)])
def test_copying_shards_says_what_to_copy(copied):
    with pytest.raises(TypeError, match="do so with the model that it was made of"):
        copied(CPUParallel(Net()))


@pytest.mark.parametrize("shards", [0, -1])
def test_no_shards_are_refused(shards):
    with pytest.raises(ValueError, match="must be greater than 0"):
        CPUParallel(Net(), shards)


def test_shards_are_for_the_cpu():
    with pytest.raises(ValueError, match="takes a model on the CPU"):
        CPUParallel(Net().to("meta"))


def test_shards_keep_the_statistics_of_the_first(batches):
    images, _ = next(iter(batches))
    model = Net()
    alone = copy.deepcopy(model).train()
    parallel = CPUParallel(model, dtype=torch.float32)
    parallel.train()(images)
    alone(images[:8])
    for buffer, expected in zip(model.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


def test_shards_have_no_weights_of_their_own(batches):
    model = Net()
    parallel = CPUParallel(model, shards=3)
    assert [id(p) for p in parallel.parameters()] == [id(p) for p in model.parameters()]
    assert [id(b) for b in parallel.buffers()] == [id(b) for b in model.buffers()]
    optimizer, scheduler, averaged = Recipe().prepare(model, 5)
    train(parallel, "cpu", batches, optimizer, F.nll_loss, scheduler=scheduler, averaged=averaged)
    assert all(replica.training for replica in parallel.replicas) and model.training
    assert test(parallel, "cpu", batches, F.nll_loss) == test(model, "cpu", batches, F.nll_loss)
    assert not any(replica.training for replica in parallel.replicas)


def test_a_batch_with_fewer_images_than_shards(batches):
    images, labels = next(iter(batches))
    parallel = CPUParallel(Net(), shards=4)
    for count in (1, 2, 5):
        output = parallel.train()(images[:count])
        assert output.shape == (count, 10) and output.dtype == torch.float32
        F.nll_loss(output, labels[:count]).backward()


def test_frozen_and_unused_weights_have_no_gradient_from_shards(batches):
    images, labels = next(iter(batches))
    model = Net()
    model.layers[0][0].requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    F.nll_loss(CPUParallel(model).train()(images), labels).backward()
    assert model.layers[0][0].weight.grad is None
    assert not model.unused.weight.grad.any()
    assert model.layers[1][0].weight.grad.any()


def test_an_error_in_a_shard_is_raised_as_it_is(batches):
    images, _ = next(iter(batches))
    with pytest.raises(ValueError, match=r"expects images of shape \(B, 1, 28, 28\)"):
        CPUParallel(Net()).train()(images[:, :, :27])


# ----------------------------------------------------------------------------------------------------------- errors


def test_a_loss_that_is_nan_stops_with_the_histories_as_they_were(batches):
    model, histories = Net(), ([1.0], [2.0])
    broken = [(images * float("nan"), labels) for images, labels in batches]
    with pytest.raises(FloatingPointError, match="training loss is nan"):
        train(model, "cpu", broken, sgd(model), F.nll_loss, *histories)
    with pytest.raises(FloatingPointError, match="test loss is nan"):
        test(model, "cpu", broken, F.nll_loss, *histories)
    assert histories == ([1.0], [2.0])


def test_a_rate_that_is_far_too_high_is_found_out(batches):
    set_seed(0)
    model = Net()
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        for _ in range(5):
            train(model, "cpu", batches, sgd(model, lr=1e18), F.nll_loss)


@pytest.mark.parametrize("loader", [[], (batch for batch in ())])
def test_an_empty_loader_is_refused(loader):
    model, histories = Net(), ([1.0], [2.0])
    before = state(model)
    with pytest.raises(ValueError, match="training loader is empty"):
        train(model, "cpu", loader, sgd(model), F.nll_loss, *histories)
    with pytest.raises(ValueError, match="test loader is empty"):
        test(model, "cpu", loader, F.nll_loss, *histories)
    assert histories == ([1.0], [2.0]) and same(state(model), before)


@pytest.mark.parametrize("label", [10, -1])
def test_a_label_out_of_range_is_named_before_it_can_break_a_gpu(label, batches):
    model, histories = Net(), ([1.0], [2.0])
    images, labels = next(iter(batches))
    labels = labels.clone()
    labels[3] = label
    for run in (
        lambda: train(model, "cpu", [(images, labels)], sgd(model), F.nll_loss, *histories),
        lambda: test(model, "cpu", [(images, labels)], F.nll_loss, *histories),
    ):
        with pytest.raises(ValueError, match=rf"labels must lie in 0\.\.9, got .*{label}"):
            run()
    assert histories == ([1.0], [2.0])


def test_a_misspelt_option_is_not_swallowed(batches):
    model = Net()
    with pytest.raises(KeyError, match="schedular"):
        train(model, "cpu", batches, sgd(model), F.nll_loss, schedular=None)


def test_predict_gives_every_image_in_order(batches):
    model = Net()
    outputs, labels = predict(model, "cpu", batches)
    assert torch.equal(labels, batches.labels)
    images = (batches.images / 255 - MEAN) / STD
    torch.testing.assert_close(outputs, model.eval()(images), rtol=1e-4, atol=1e-4)
