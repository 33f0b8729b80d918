"""Everything around the network. At a first reading, skip __post_init__, load_mnist, affine."""

import hashlib
import math
import socket
import sys
from dataclasses import dataclass, fields
from inspect import getmembers
from multiprocessing.pool import ThreadPool
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torchvision.datasets import MNIST
from tqdm import tqdm

# ------------------------------------------------------------------------------------------ recipe


@dataclass(frozen=True)
class Recipe:
    """All settings of a training. `Recipe(epochs=5)` changes one of them.

    To change more than a number, write a subclass with a method of its own, such as
    `def augment(self, images, draws): return images` for no augmentation.
    """

    seed: int = 1  # fixes the first weights, the order of the images and their augmentation
    epochs: int = 20  # the assignment allows no more
    batch_size: int = 250  # divides 60,000, so every batch is full
    lr: float = 0.2  # the highest learning rate of the one-cycle schedule (Smith and Topin, 2018)
    warmup: float = 0.2  # in this share of the steps the rate rises. Then the rate falls to zero
    momentum: float = 0.9  # each step also repeats this share of the step before it
    weight_decay: float = 5e-4  # each step moves kernels towards 0 by this share, times the rate
    average: float = 9.0  # the moving average covers about the last 1/9 of all steps so far
    degrees: float = 10.0  # augmentation: rotate by up to this many degrees, either way
    translate: float = 1.0  # augmentation: shift by up to this many pixels along each axis
    scale: float = 0.1  # augmentation: zoom by a factor from 1 - scale to 1 + scale
    shear: float = 10.0  # augmentation: slant by up to this many degrees, either way

    def __post_init__(self):
        # Python ignores `lr = 0.1` in the body of a subclass, unless that is a dataclass, too.
        cls, defaults = type(self).__name__, {f.name: f.default for f in fields(self)}
        for name, value in getmembers(type(self), lambda member: isinstance(member, (int, float))):
            if name[0] != "_" and defaults.get(name) != value:
                raise TypeError(
                    f"`{name} = {value}` in class {cls} sets nothing: write {cls}({name}={value}). "
                    f"Or write `{name}: float = {value}`, and @dataclass(frozen=True) above {cls}"
                )

    def augment(self, images, draws):
        """Return distorted images. `draws` are (B, 5) random numbers from -1 to 1."""
        degrees, translate = self.degrees * draws[:, 0], self.translate * draws[:, 1:3]
        scale, shear = 1 + self.scale * draws[:, 3], self.shear * draws[:, 4]
        return affine(images, degrees, translate, scale, shear)

    def optimizer(self, model):
        """Return the optimizer, SGD with Nesterov's momentum."""
        kernels = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]  # biases and BatchNorm
        groups = [{"params": kernels, "weight_decay": self.weight_decay}, {"params": others}]
        nesterov = self.momentum > 0  # torch accepts no Nesterov without momentum
        return torch.optim.SGD(groups, self.lr, self.momentum, nesterov=nesterov, fused=True)

    def scheduler(self, optimizer, steps_per_epoch):
        """Return the one-cycle schedule. Its rate rises linearly, then falls linearly to zero."""
        steps = self.epochs * steps_per_epoch
        # LambdaLR multiplies `lr` by a factor from 0 to 1. With 0 at step 0, the first step would
        # change nothing. So the factor is 0 at step -1, before the training.
        knots = [-1, self.warmup * steps, steps]
        return LambdaLR(optimizer, lambda step: float(np.interp(step, knots, [0, 1, 0])))

    def averaged(self, model):
        """Return the moving average of the model's weights."""
        return MovingAverage(model, self.average)


class MovingAverage(AveragedModel):
    """Moving average of a model's weights, and of what its BatchNorm remembers.

    It is a model, too: `module` is the network with the averaged weights. While the rate is high,
    the weights jump around a good place. Their average lies in the middle. So test and save it.

    With average=9, step n moves the averaged weights by 9 / (10 + n) of the way to the new weights
    (Shamir and Zhang, 2013). The first step, n = 0, moves them by 9/10, to forget the untrained
    weights. Step 900 moves them by about 1/100. They are then nearly a mean over 100 steps.
    """

    def __init__(self, model, average):
        super().__init__(model)
        self.average = average

    @torch.no_grad()
    def update_parameters(self, model):
        """Move the average towards the weights of `model`. Call this after each step."""
        share = self.average / (self.average + 1 + int(self.n_averaged))
        # Each tensor once, also if several layers share it, as `state_dict` would not. Integers are
        # left out (BatchNorm counts batches).
        old, new = (
            [tensor for tensor in (*net.parameters(), *net.buffers()) if tensor.is_floating_point()]
            for net in (self.module, model)
        )
        torch._foreach_lerp_(old, new, share)  # old += share * (new - old)
        self.n_averaged += 1


# -------------------------------------------------------------------------------------------- data

MEAN, STD = 0.1307, 0.3081  # of the training images, scaled to [0, 1]
TIME_LIMIT = 600  # seconds, for `load_mnist`
SHA256 = {  # checksums for `load_mnist`, of the training set (True) and of the test set (False)
    True: "d18cfd466eb143ac1097fde604dba9eec4116885869d04cc648b510949f9e88c",
    False: "a0863a96c44e5666edbb30c4071ee79ca0514c621e6349c5967fc78e7305c891",
}


def load_mnist(root="data", train=True):
    """Return MNIST's training or test set: (N, 1, 28, 28) uint8 images and (N,) int64 labels.

    Downloads MNIST on first use. Raises RuntimeError if a file is damaged, or if the download fails
    or takes more than ten minutes.
    """
    root = Path(root).expanduser()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # seconds. Some servers never answer
    try:
        root.mkdir(exist_ok=True)  # fails if Google Drive is not mounted. MNIST would make folders
        # A server may send so little at a time that no read takes 60 seconds. So there is a limit
        # for all of it. Its thread ends with the program.
        with ThreadPool(1) as pool:
            loading = pool.apply_async(MNIST, (root, train), {"download": True})
            loading.wait(TIME_LIMIT)
            if not loading.ready():
                raise TimeoutError(f"it took more than {TIME_LIMIT} seconds")
            mnist = loading.get()
        content = mnist.data.numpy().tobytes() + mnist.targets.numpy().tobytes()
        if hashlib.sha256(content).hexdigest() != SHA256[train]:
            raise ValueError("a file is damaged, or is not of MNIST")  # torchvision does not notice
    except Exception as error:  # such as no network, half a file, a read-only folder
        raise RuntimeError(
            f"MNIST could not be loaded: {error}. If a file is damaged, delete {root / 'MNIST'}. "
            "Then try again. In a clone of the project, run `make data` instead."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return mnist.data.unsqueeze(1), mnist.targets


def affine(images, degrees, translate, scale, shear):
    """Return the images sheared, zoomed, rotated and shifted, each by its own amounts.

    Args:
        images: (B, 1, H, H) float, not yet normalised, because new pixels at the border are 0.
        degrees: (B,), rotation, counter-clockwise.
        translate: (B, 2), shift to the right and down in pixels.
        scale: (B,), zoom factor.
        shear: (B,), slant to the left in degrees.
    """
    cos, sin, tan = degrees.deg2rad().cos(), degrees.deg2rad().sin(), shear.deg2rad().tan()
    zero, one = torch.zeros_like(tan), torch.ones_like(tan)
    # grid_sample asks where in the input each output pixel comes from. So everything is inverted.
    undo_rotation = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    undo_shear = torch.stack([one, -tan, zero, one], 1).view(-1, 2, 2)
    inverse = undo_shear @ undo_rotation / scale.view(-1, 1, 1)
    shift = inverse @ translate.unsqueeze(2) * (-2 / images.shape[-1])  # in halves of the width
    grid = F.affine_grid(torch.cat([inverse, shift], 2), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class Loader:
    """Batches of normalised float images, made of uint8 images that stay on the device.

    With a seed, each epoch shuffles the images and distorts them by `augment(images, draws)`.
    Seed and epoch fix the random numbers. So every device sees the same images, and on a CPU a
    training can be repeated exactly.
    """

    def __init__(self, images, labels, batch_size, seed=None, augment=None):
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.seed, self.augment = seed, augment
        self.epoch = 1  # number of the next epoch

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        count, device = len(self.labels), self.labels.device
        order = torch.arange(count, device=device)
        if self.seed is not None:  # drawn on the CPU: another device would draw other numbers
            generator = torch.Generator().manual_seed(1000 * int(self.seed) + self.epoch)
            order = torch.randperm(count, generator=generator).to(device)
            draws = (torch.rand(count, 5, generator=generator) * 2 - 1).to(device)
        self.epoch += 1
        # Prepare several batches at once, about 1,000 images. On a GPU, this is faster.
        chunk_size = math.ceil(1000 / self.batch_size) * self.batch_size
        for chunk in order.split(chunk_size):
            images, labels = self.images[chunk].float(), self.labels[chunk]
            if self.augment is not None:
                images = self.augment(images, draws[chunk])
            images = (images - 255 * MEAN) / (255 * STD)
            for start in range(0, len(labels), self.batch_size):
                batch = slice(start, start + self.batch_size)
                yield images[batch], labels[batch]


def make_loaders(recipe, device, train_set, test_set):
    """Return `(train_loader, test_loader)` on `device`. A set is a pair of images and labels.

    For images other than MNIST's, first set `MEAN` and `STD` in this file.
    """
    train_set, test_set = ([part.to(device) for part in both] for both in (train_set, test_set))
    train_loader = Loader(*train_set, recipe.batch_size, recipe.seed, recipe.augment)
    return train_loader, Loader(*test_set, batch_size=1000)


def mnist_loaders(recipe, device, root="data"):
    """Return `(train_loader, test_loader)` of MNIST on `device`. They take 55 MB there."""
    return make_loaders(recipe, device, load_mnist(root), load_mnist(root, train=False))


# -------------------------------------------------------------------------------------------- loop


def train(
    model, device, train_loader, optimizer, criterion, train_losses=None, train_acc=None, *,
    scheduler=None, averaged=None, show_bar=True,
):  # fmt: skip
    """Train for one epoch. Append its loss and accuracy (percent) to the lists. Return the lists.

    Args:
        train_loader: any iterable of (images, labels).
        criterion: a function of (outputs, labels) that returns the mean loss of a batch.
        scheduler, averaged: from `Recipe`. Each batch calls `step` and `update_parameters`.

    Raises FloatingPointError if the loss is not finite.
    """
    train_losses = [] if train_losses is None else train_losses
    train_acc = [] if train_acc is None else train_acc
    model.train()  # in this mode, BatchNorm measures each batch, and remembers
    # loss_sum and correct stay on the device. Reading them would make Python wait for a GPU.
    loss_sum, correct, seen = 0.0, 0, 0
    batches = train_loader
    if show_bar:  # on stdout: Jupyter shows stderr in red
        batches = tqdm(batches, f"epoch {len(train_losses) + 1}", leave=False, file=sys.stdout)
    for step, (images, labels) in enumerate(batches):
        images, labels = images.to(device), labels.to(device)
        outputs = model(images)
        loss = criterion(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if averaged is not None:
            averaged.update_parameters(model)
        loss_sum += loss.detach() * len(labels)
        correct += (outputs.argmax(1) == labels).sum()
        seen += len(labels)
        if show_bar and step % 50 == 0:
            means = f"loss {loss_sum / seen:.4f}, accuracy {100 * correct / seen:.2f} %"
            batches.set_postfix_str(means)
    mean_loss = float(loss_sum) / seen
    if not math.isfinite(mean_loss):
        raise FloatingPointError(f"the training loss is {mean_loss}: try a lower learning rate")
    train_losses.append(mean_loss)
    train_acc.append(100 * int(correct) / seen)
    return train_losses, train_acc


@torch.no_grad()
def predict(model, device, loader):
    """Return the outputs, (N, 10), and the labels, (N,), in the order of the loader."""
    model.eval()  # in this mode, BatchNorm uses what it remembers
    batches = [(model(images.to(device)), labels.to(device)) for images, labels in loader]
    outputs, labels = zip(*batches, strict=True)
    return torch.cat(outputs), torch.cat(labels)


def test(model, device, test_loader, criterion, test_losses=None, test_acc=None):
    """Test the model. Append its loss and accuracy (percent) to the lists. Return the lists."""
    test_losses = [] if test_losses is None else test_losses
    test_acc = [] if test_acc is None else test_acc
    outputs, labels = predict(model, device, test_loader)
    test_losses.append(criterion(outputs, labels).item())
    # Count, then divide. In float32, 9,940 of 10,000 would be rounded up, to more than 99.4 %.
    test_acc.append(100 * (outputs.argmax(1) == labels).sum().item() / len(labels))
    return test_losses, test_acc


def fit(recipe, model, device, train_loader, criterion=F.nll_loss, bar=None):
    """Train `model` with a `Loader`. Return the moving average of the model's weights.

    `bar` may be a tqdm bar for several trainings. It advances by one after each epoch.
    """
    train_loader.epoch = 1  # so that the same seed gives the same images
    optimizer = recipe.optimizer(model)
    scheduler = recipe.scheduler(optimizer, len(train_loader))
    averaged = recipe.averaged(model)
    losses, accuracies = [], []
    for _ in range(recipe.epochs):
        train(
            model, device, train_loader, optimizer, criterion, losses, accuracies,
            scheduler=scheduler, averaged=averaged, show_bar=bar is None,
        )  # fmt: skip
        if bar is not None:
            bar.update()
    return averaged


# ------------------------------------------------------------------------------------------- plots
# Jupyter shows the figures. To save one, call `plt.savefig(path)` after it, in the same cell.


def plot_curves(train_losses, train_acc, test_losses, test_acc):
    """Draw loss and accuracy after each epoch, with the goal of 99.4 %."""
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    curves = ("train", train_losses, train_acc), ("test", test_losses, test_acc)
    for name, losses, accuracies in curves:
        epochs = range(1, len(losses) + 1)
        if epochs:  # perhaps no epoch is complete yet
            left.plot(epochs, losses, ".-", label=f"{name}, last {losses[-1]:.4f}")
            right.plot(epochs, accuracies, ".-", label=f"{name}, last {accuracies[-1]:.2f} %")
    right.axhline(99.4, color="gray", linestyle="--", label="goal, 99.4 %")
    left.set(xlabel="epoch", ylabel="loss", yscale="log", title="Loss")
    limits = min([97.4, *test_acc]), 100
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=limits, title="Accuracy")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()


def plot_digits(images, titles=None, columns=10):
    """Draw (N, 1, 28, 28) images in a grid, with titles if there are any."""
    rows = math.ceil(len(images) / columns) or 1  # an empty grid if there are no images
    size = (columns, rows * (1.45 if titles else 1.0))
    _, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for i, axes in enumerate(grid.flat):
        axes.axis("off")
        if i < len(images):
            axes.imshow(images[i, 0].cpu().numpy(), cmap="gray")
            axes.set_title(titles[i] if titles else "", fontsize=8)


def plot_mistakes(images, outputs, labels, limit=30):
    """Draw the images with wrong answers, at most `limit`, the most confident first.

    `outputs`, (N, 10) log-probabilities or scores, and `labels`, (N,), are in the images' order.
    """
    # Softmax makes probabilities of scores. Of log-probabilities, it makes the same ones again.
    confidence, predicted = outputs.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:limit]
    titles = [f"{labels[i]}, read {predicted[i]}\n{confidence[i]:.0%}" for i in wrong]
    plot_digits(images[wrong.to(images.device)], titles)
