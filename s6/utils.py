"""Everything around the network: recipe, data, training loop, checkpoints and plots."""

import hashlib
import math
import socket
import sys
import warnings
import zipfile
from dataclasses import dataclass
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
    """All hyperparameters of a training. `Recipe(epochs=5)` changes one of them.

    To change more than a number, override a method in a subclass.
    """

    seed: int = 1  # of the first weights, of the order of the images and of their augmentation
    epochs: int = 20  # the assignment allows no more
    batch_size: int = 250  # divides 60,000, so every batch is full
    lr: float = 0.2  # the highest learning rate of the one-cycle schedule (Smith and Topin, 2018)
    warmup: float = 0.2  # share of the steps in which the rate rises. Then it falls to zero
    momentum: float = 0.9  # of SGD, in Nesterov's form
    weight_decay: float = 5e-4  # on convolution kernels only, not on biases and BatchNorm
    average: float = 0.998  # share of the old moving average that each step keeps
    degrees: float = 7.0  # augmentation: rotate by up to this many degrees, either way
    translate: float = 1.0  # augmentation: shift by up to this many pixels along each axis
    scale: float = 0.1  # augmentation: zoom by a factor from 1 - scale to 1 + scale
    shear: float = 5.0  # augmentation: slant by up to this many degrees, either way
    upright: bool = True  # first make all digits upright: see the function `upright`

    def __post_init__(self):
        if min(self.epochs, self.batch_size) < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {self}")

    def augment(self, images, draws):
        """Return distorted images. Random `draws`, (B, 5), from -1 to 1, say how much."""
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
        knots = [-1, self.warmup * steps, steps]  # from -1, so that the first rate is not zero
        return LambdaLR(optimizer, lambda step: float(np.interp(step, knots, [0, 1, 0])))

    def averaged(self, model):
        """Return the moving average of the model's weights."""
        return MovingAverage(model, self.average)


class MovingAverage(AveragedModel):
    """Moving average of a model's weights and BatchNorm statistics. It is a model, too.

    The weights still jump around when the average is already good. So test and save the average.
    """

    def __init__(self, model, decay):
        super().__init__(model)
        self.decay = decay

    def update_parameters(self, model):
        """Move the average a little towards the weights of `model`. Call this once a batch."""
        # At first it moves faster, because it has to forget the untrained weights.
        share = max(1 - self.decay, 9 / (10 + int(self.n_averaged)))
        averages, weights = (
            [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
            for net in (self.module, model)
        )
        torch._foreach_lerp_(averages, weights, share)  # all at once: that is fast on a GPU
        self.n_averaged += 1


# -------------------------------------------------------------------------------------------- data

MEAN, STD = 0.1307, 0.3081  # of the training images, scaled to [0, 1]
SHA256 = {  # of images and labels of the training set (True) and of the test set (False)
    True: "d18cfd466eb143ac1097fde604dba9eec4116885869d04cc648b510949f9e88c",
    False: "a0863a96c44e5666edbb30c4071ee79ca0514c621e6349c5967fc78e7305c891",
}


def load_mnist(root="data", train=True):
    """Return MNIST's training or test set: (N, 1, 28, 28) uint8 images and (N,) int64 labels.

    Downloads MNIST on first use. Raises RuntimeError if the download fails or a file is damaged.
    """
    root = Path(root).expanduser()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # seconds. Some servers never answer
    try:
        mnist = MNIST(root, train, download=True)
        content = mnist.data.numpy().tobytes() + mnist.targets.numpy().tobytes()
        if hashlib.sha256(content).hexdigest() != SHA256[train]:
            raise ValueError("a file is damaged")  # torchvision does not notice
    except Exception as error:  # such as no network, half a file, a read-only folder
        raise RuntimeError(
            f"MNIST could not be loaded: {error}. Delete the folder {root / 'MNIST'} and try "
            "again. In a clone of the project, run `make data` instead."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return mnist.data.unsqueeze(1), mnist.targets


def affine(images, degrees, translate, scale, shear):
    """Return the images rotated, shifted, zoomed and sheared, each by its own amounts.

    Args:
        images: (B, 1, H, H) float, not yet normalised, because new pixels at the border are 0.
        degrees: (B,), rotation, counter-clockwise.
        translate: (B, 2), shift to the right and down in pixels.
        scale: (B,), zoom factor.
        shear: (B,), slant to the left in degrees.
    """
    cos, sin, tan = degrees.deg2rad().cos(), degrees.deg2rad().sin(), shear.deg2rad().tan()
    zero, one = torch.zeros_like(tan), torch.ones_like(tan)
    # grid_sample needs the inverse map: from where in the input does each output pixel come?
    undo_rotation = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    undo_shear = torch.stack([one, -tan, zero, one], 1).view(-1, 2, 2)
    inverse = undo_shear @ undo_rotation / scale.view(-1, 1, 1)
    shift = inverse @ translate.unsqueeze(2) * (-2 / images.shape[-1])  # its unit is half a side
    grid = F.affine_grid(torch.cat([inverse, shift], 2), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def upright(images):
    """Return the digits made upright: (N, 1, 28, 28) uint8, in and out.

    It shifts each row sideways until the digit no longer leans. The centre of mass stays in its
    place. LeCun et al., 1998, call this deslanting.
    """
    ink, x = images[:, 0].float(), torch.arange(28.0, device=images.device) - 13.5
    y = x.view(28, 1)  # x is the place of each column and y of each row, from the middle
    mass = ink.sum((1, 2)).clamp(min=1)  # not 0, even without ink

    def mean(values):
        return (ink * values).sum((1, 2)) / mass

    # Least squares: so many pixels does the ink move to the right from one row to the next.
    slant = (mean(x * y) - mean(x) * mean(y)) / (mean(y * y) - mean(y) ** 2).clamp(min=0.01)
    zero, one = torch.zeros_like(slant), torch.ones_like(slant)
    back = torch.stack([slant * mean(y), zero], 1)  # `affine` does not move the middle row
    return affine(images.float(), zero, back, one, -slant.atan().rad2deg()).round().byte()


class Loader:
    """Batches of normalised float images, made of uint8 images that stay on the device.

    With a seed, each epoch shuffles the images and distorts them by `augment(images, draws)`.
    Seed and epoch fix the random numbers. So a training can be repeated, on a CPU exactly.
    """

    def __init__(self, images, labels, batch_size, seed=None, augment=None):
        if len(images) != len(labels) or batch_size < 1:
            raise ValueError(f"{len(images)} images, {len(labels)} labels, batch_size {batch_size}")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.seed, self.augment = seed, augment
        self.epoch = 1  # number of the next epoch

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        count, device = len(self.labels), self.labels.device
        order, draws = torch.arange(count, device=device), None
        if self.seed is not None:
            generator = torch.Generator(device).manual_seed(1000 * int(self.seed) + self.epoch)
            order = torch.randperm(count, generator=generator, device=device)
            draws = torch.rand(count, 5, generator=generator, device=device) * 2 - 1
        self.epoch += 1
        # Augment 1,000 images at once. On a GPU, few large operations are faster.
        batches_at_once = math.ceil(1000 / self.batch_size)
        for chunk in order.split(batches_at_once * self.batch_size):
            images = self.images[chunk].float()
            if self.augment is not None:
                images = self.augment(images, draws[chunk])
            batches = ((images - 255 * MEAN) / (255 * STD)).split(self.batch_size)
            yield from zip(batches, self.labels[chunk].split(self.batch_size), strict=True)


def make_loaders(recipe, device, train_set, test_set):
    """Return `(train_loader, test_loader)` on `device`. A set is a pair of images and labels."""
    sets = [(images.to(device), labels.to(device)) for images, labels in (train_set, test_set)]
    if recipe.upright:
        sets = [(upright(images), labels) for images, labels in sets]
    train_loader = Loader(*sets[0], recipe.batch_size, recipe.seed, recipe.augment)
    return train_loader, Loader(*sets[1], batch_size=1000)


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

    On an NVIDIA GPU, model and criterion must not call `.item()`: see `graphed`.

    Raises FloatingPointError if the loss is not finite.
    """
    train_losses = [] if train_losses is None else train_losses
    train_acc = [] if train_acc is None else train_acc
    model.train()
    device = torch.device(device)
    # Of losses and correct answers. They stay on the device, because reading them makes it wait.
    sums, seen = torch.zeros(2, device=device), 0

    def gradients(images, labels):  # the first half of a step. It also adds to `sums`
        outputs = model(images)
        loss = criterion(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        correct = (outputs.argmax(1) == labels).sum()
        sums.add_(torch.stack([loss.detach() * len(labels), correct]))

    if device.type == "cuda" and device.index in (None, torch.cuda.current_device()):
        gradients = graphed(gradients)
    batches = train_loader
    if show_bar:  # on stdout: Jupyter shows stderr in red
        batches = tqdm(batches, f"epoch {len(train_losses) + 1}", leave=False, file=sys.stdout)
    for step, (images, labels) in enumerate(batches):
        gradients(images.to(device), labels.to(device))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if averaged is not None:
            averaged.update_parameters(model)
        seen += len(labels)
        if show_bar and step % 50 == 0:
            loss, correct = (sums / seen).tolist()
            batches.set_postfix_str(f"loss {loss:.4f}, accuracy {100 * correct:.2f} %")
    loss, correct = sums.tolist()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the training loss is {loss}: try a lower learning rate")
    train_losses.append(loss / seen)
    train_acc.append(100 * correct / seen)
    return train_losses, train_acc


def graphed(step):
    """Return a faster version of `step`, a function of tensors, for the current NVIDIA GPU.

    Python starts many small operations. Starting them takes longer than computing them. A CUDA
    graph starts them all at once. The first call of `step` runs as usual, the second records the
    graph, and the others only replay it: they do not run the Python code again.
    """
    graph, inputs = None, []  # the graph reads its inputs from this memory

    def replay(*tensors):
        nonlocal graph, inputs
        shapes = [tensor.shape for tensor in tensors]
        if shapes != [memory.shape for memory in inputs]:  # the first call, or a new shape
            graph, inputs = None, [t.clone() for t in tensors]
            return step(*tensors)
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            # "thread_local", because a DataLoader with pin_memory works in another thread.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step(*inputs)
        for memory, tensor in zip(inputs, tensors, strict=True):
            memory.copy_(tensor)
        graph.replay()

    return replay


@torch.no_grad()
def predict(model, device, loader):
    """Return the outputs, (N, 10), and the labels, (N,), in the order of the loader."""
    model.eval()
    batches = [(model(images.to(device)), labels.to(device)) for images, labels in loader]
    outputs, labels = zip(*batches, strict=True)
    return torch.cat(outputs), torch.cat(labels)


def test(model, device, test_loader, criterion, test_losses=None, test_acc=None):
    """Test the model. Append its loss and accuracy (percent) to the lists. Return the lists."""
    test_losses = [] if test_losses is None else test_losses
    test_acc = [] if test_acc is None else test_acc
    outputs, labels = predict(model, device, test_loader)
    test_losses.append(criterion(outputs, labels).item())
    # Count first, then divide. A float32 mean of 9,940 in 10,000 would be more than 99.4 %.
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
    extras = {"scheduler": scheduler, "averaged": averaged, "show_bar": bar is None}
    histories = [], []
    for _ in range(recipe.epochs):
        train(model, device, train_loader, optimizer, criterion, *histories, **extras)
        if bar is not None:
            bar.update()
    return averaged


# ------------------------------------------------------------------------------------- checkpoints


def save(content, path):
    """Save `content` with torch.save and return True. If this fails, warn and return False.

    A half-written file never replaces the old one.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial)
        partial.replace(path)
        return True
    except (OSError, RuntimeError) as error:  # torch raises the second
        warnings.warn(f"{path} could not be written: {error}", stacklevel=2)
        return False


def save_checkpoint(path, recipe, histories, **parts):
    """Save a training after an epoch: the histories, and the states of the parts."""
    values = [[float(value) for value in history] for history in histories]
    states = {name: part.state_dict() for name, part in parts.items()}
    save({"made by": f"{recipe} {parts['model']}", "histories": values, "states": states}, path)


def load_checkpoint(path, recipe, histories, **parts):
    """Load a saved training into histories and parts. Return the number of its epochs, or 0.

    If the file is damaged or belongs to another recipe or network, it is renamed.
    """
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not notice
            raise ValueError("it is damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["made by"] != f"{recipe} {parts['model']}":
            raise ValueError("it belongs to another recipe or network")
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (zipfile.BadZipFile, RuntimeError, KeyError, ValueError) as error:
        old = path.replace(path.with_suffix(".old"))
        print(f"Starting at epoch 1. {path} cannot be used: {error}. It is now {old}")
        return 0
    for name, part in parts.items():
        part.load_state_dict(saved["states"][name])
    for history, values in zip(histories, saved["histories"], strict=True):
        history[:] = values
    print(f"Continuing after epoch {len(histories[0])}. To start at epoch 1, delete {path}")
    return len(histories[0])


# ------------------------------------------------------------------------------------------- plots
# Each function closes its figure. Otherwise Jupyter would show it twice.


def plot_curves(train_losses, train_acc, test_losses, test_acc):
    """Return a figure of loss and accuracy after each epoch, with the goal of 99.4 %."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    curves = ("train", train_losses, train_acc), ("test", test_losses, test_acc)
    for name, losses, accuracies in curves:
        epochs = range(1, len(losses) + 1)
        if epochs:  # perhaps no epoch is complete yet
            left.plot(epochs, losses, ".-", label=f"{name}, last {losses[-1]:.4f}")
            right.plot(epochs, accuracies, ".-", label=f"{name}, last {accuracies[-1]:.2f} %")
    right.axhline(99.4, color="gray", linestyle="--", label="goal, 99.4 %")
    left.set(xlabel="epoch", ylabel="loss (negative log-likelihood)", yscale="log", title="Loss")
    limits = min([97.4, *test_acc]), 100
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=limits, title="Accuracy")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    plt.close(fig)
    return fig


def plot_digits(images, titles=None, columns=10):
    """Return a figure of (N, 1, 28, 28) images in a grid, each with a title."""
    rows = math.ceil(len(images) / columns) or 1  # an empty grid if there are no images
    size = (columns, rows * (1.45 if titles else 1.0))
    fig, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    titles = titles or [""] * len(images)
    for axes, image, title in zip(grid.flat, images.cpu().numpy(), titles, strict=False):
        axes.imshow(image[0], cmap="gray")
        axes.set_title(title, fontsize=8)
    plt.close(fig)
    return fig


def plot_mistakes(images, outputs, labels, limit=30):
    """Return a figure of the images with wrong answers, at most `limit`, most confident first.

    `outputs`, (N, 10) log-probabilities, and `labels`, (N,), are in the order of the images.
    """
    confidence, predicted = outputs.exp().max(1)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:limit]
    titles = [f"{labels[i]}, read {predicted[i]}\n{confidence[i]:.0%}" for i in wrong]
    return plot_digits(images[wrong.to(images.device)], titles)
