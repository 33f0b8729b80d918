"""Everything around the network: recipe, data, training loop, checkpoints and plots."""

import hashlib
import itertools
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
    """Every hyperparameter of the training. `Recipe(epochs=5)` changes one and keeps the others.

    To change more, override a method in a subclass.
    """

    seed: int = 1  # sets the first weights, the order of the images and their augmentation
    epochs: int = 20  # the assignment allows no more
    batch_size: int = 250  # divides 60,000 and 50,000, so every batch is full
    lr: float = 0.2  # learning rate at the peak of the one-cycle schedule (Smith and Topin, 2018)
    warmup: float = 0.2  # share of the steps in which the rate rises; then it falls to zero
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 5e-4  # on the convolution kernels only, not on biases and BatchNorm
    average: float = 0.998  # decay per step of the moving average of the weights
    degrees: float = 7.0  # augmentation: rotate by up to this many degrees, either way
    translate: float = 1.0  # augmentation: shift by up to this many pixels along each axis
    scale: float = 0.1  # augmentation: zoom by a factor from 1 - scale to 1 + scale
    shear: float = 5.0  # augmentation: slant by up to this many degrees, either way
    upright: bool = True  # make every digit upright first: see the function of this name

    def __post_init__(self):
        if min(self.epochs, self.batch_size) < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {self}")

    def augment(self, images, draws):
        """Distort each image by amounts of its own: `draws` is (B, 5), uniform in [-1, 1]."""
        turn, shift, zoom, slant = draws[:, 0], draws[:, 1:3], draws[:, 3], draws[:, 4]
        return affine(
            images,
            degrees=turn * self.degrees,
            translate=shift * self.translate,
            scale=1 + zoom * self.scale,
            shear=slant * self.shear,
        )

    def optimizer(self, model):
        """Return the optimizer: SGD with Nesterov's momentum."""
        kernels = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]  # biases and BatchNorm
        groups = [{"params": kernels, "weight_decay": self.weight_decay}, {"params": others}]
        nesterov = self.momentum > 0  # torch accepts no Nesterov without momentum
        return torch.optim.SGD(groups, self.lr, self.momentum, nesterov=nesterov, fused=True)

    def scheduler(self, optimizer, steps_per_epoch):
        """Return the schedule, to step once a batch: one straight line up, another to zero."""
        steps = self.epochs * steps_per_epoch
        knots = [-1, self.warmup * steps, steps]  # from -1, so that the first rate is not zero
        return LambdaLR(optimizer, lambda step: float(np.interp(step, knots, [0, 1, 0])))

    def averaged(self, model):
        """Return the moving average of the model's weights, to update once a batch."""
        return MovingAverage(model, self.average)


def floats(model):
    """Return the weights and the BatchNorm statistics of a model, without integer counters."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return [tensor for tensor in tensors if tensor.is_floating_point()]


class MovingAverage(AveragedModel):
    """Exponential moving average of weights and BatchNorm statistics, itself a model.

    It is steadier than the weights: test this, and keep this. The update of the base class needs
    about seventy operations and waits for the GPU. This one needs one, and does not wait.
    """

    def __init__(self, model, decay):
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model):
        """Move towards the weights of `model`: call it once a batch."""
        # At first, average over few steps, to forget the untrained weights: over a ninth of all
        # so far. Later, average over 1 / (1 - decay) steps.
        share = max(1 - self.decay, 9 / (10 + int(self.n_averaged)))
        torch._foreach_lerp_(floats(self.module), floats(model), share)
        self.n_averaged += 1


# -------------------------------------------------------------------------------------------- data

MEAN, STD = 0.1307, 0.3081  # of the training images, scaled to [0, 1]
SHA256 = {  # of images and labels together: of the training set (True) and of the test set (False)
    True: "d18cfd466eb143ac1097fde604dba9eec4116885869d04cc648b510949f9e88c",
    False: "a0863a96c44e5666edbb30c4071ee79ca0514c621e6349c5967fc78e7305c891",
}


def load_mnist(root="data", train=True):
    """Return the training set or the test set: (N, 1, 28, 28) uint8 images and (N,) int64 labels.

    Downloads MNIST on first use. Raises RuntimeError if that fails, or if a file is damaged:
    torchvision itself does not notice that.
    """
    root = Path(root).expanduser()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # seconds: a server may never answer
    try:
        mnist = MNIST(root, train, download=True)
        content = mnist.data.numpy().tobytes() + mnist.targets.numpy().tobytes()
        if hashlib.sha256(content).hexdigest() != SHA256[train]:
            raise ValueError("a file is damaged")
    except Exception as error:  # of many kinds: no network, half a file, a read-only folder
        raise RuntimeError(
            f"MNIST could not be loaded: {error}. Delete the folder {root / 'MNIST'} and try "
            "again. In a clone of the project, run `make data` instead."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return mnist.data.unsqueeze(1), mnist.targets


def affine(images, degrees, translate, scale, shear):
    """Rotate, shift, zoom and slant each image by amounts of its own, in one bilinear resampling.

    Args:
        images: (B, 1, H, H) float. Pixels from outside are 0, so call this before normalising,
            while 0 is the background.
        degrees: (B,), counter-clockwise. translate: (B, 2), pixels to the right and down.
        scale: (B,), factor. shear: (B,), degrees to the left.
    """
    cos, sin, tan = degrees.deg2rad().cos(), degrees.deg2rad().sin(), shear.deg2rad().tan()
    # grid_sample asks where each output pixel comes from. So this is the inverse map: first undo
    # the rotation, [[cos, -sin], [sin, cos]], then the shear, [[1, -tan], [0, 1]], then the zoom.
    inverse = torch.stack([cos - tan * sin, -sin - tan * cos, sin, cos], 1).view(-1, 2, 2)
    inverse = inverse / scale.view(-1, 1, 1)
    shift = inverse @ translate.unsqueeze(2) * (-2 / images.shape[-1])  # a side is 2 units long
    grid = F.affine_grid(torch.cat([inverse, shift], 2), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def upright(images):
    """Shear each digit until its axis of inertia is vertical: (N, 1, 28, 28) uint8, in and out.

    The centre of mass stays where it is. LeCun et al., 1998, call this deslanting.
    """
    ink, places = images[:, 0].float(), torch.arange(28.0, device=images.device)
    mass = ink.sum((1, 2)).clamp(min=1)  # an image without ink stays as it is
    centre = (ink.sum(2) * places).sum(1) / mass
    y = places - centre.view(-1, 1)
    x = places - ((ink.sum(1) * places).sum(1) / mass).view(-1, 1)
    covariance, variance = torch.einsum("nyx,ny,nx->n", ink, y, x), (ink.sum(2) * y**2).sum(1)
    slant = covariance / variance.clamp(min=1)
    zero, one = torch.zeros_like(slant), torch.ones_like(slant)
    shift = torch.stack([slant * (centre - 13.5), zero], 1)  # `affine` slants about the middle
    return affine(images.float(), zero, shift, one, -slant.atan().rad2deg()).round().byte()


class Loader:
    """Batches of normalised images, made from uint8 images that stay on the device.

    With a seed, each epoch has its own order and its own augmentation, set by seed and epoch.
    Without a seed, the order is that of the images.

    Args:
        images, labels: (N, 1, 28, 28) uint8 and (N,) int64, both on the same device.
        augment: function of float images in [0, 255] and draws, (B, 5) in [-1, 1]. Needs a seed.
    """

    def __init__(self, images, labels, batch_size, seed=None, augment=None):
        if len(images) != len(labels) or batch_size < 1:
            raise ValueError(f"{len(images)} images, {len(labels)} labels, batches of {batch_size}")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.seed, self.augment = seed, augment
        self.epoch = 1  # of the next pass; set it to continue a training

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
        # Augment 1,000 images at once: on a GPU a few large operations are faster than many small.
        batches_at_once = math.ceil(1000 / self.batch_size)
        for chunk in order.split(batches_at_once * self.batch_size):
            images = self.images[chunk].float()
            if self.augment is not None:
                images = self.augment(images, draws[chunk])
            batches = ((images - 255 * MEAN) / (255 * STD)).split(self.batch_size)
            yield from zip(batches, self.labels[chunk].split(self.batch_size), strict=True)


def make_loaders(recipe, device, train_set, test_set):
    """Return `(train_loader, test_loader)` of two sets, (images, labels) each, on `device`."""
    on_device = []
    for images, labels in (train_set, test_set):
        images, labels = images.to(device), labels.to(device)
        if recipe.upright:
            images = upright(images)
        on_device.append((images, labels))
    train_loader = Loader(*on_device[0], recipe.batch_size, recipe.seed, recipe.augment)
    return train_loader, Loader(*on_device[1], batch_size=1000)


def mnist_loaders(recipe, device, root="data"):
    """Return `(train_loader, test_loader)` of MNIST, on `device` (55 MB in all)."""
    return make_loaders(recipe, device, load_mnist(root), load_mnist(root, train=False))


# -------------------------------------------------------------------------------------------- loop


def train(
    model, device, train_loader, optimizer, criterion, train_losses=None, train_acc=None, *,
    scheduler=None, averaged=None, show_bar=True,
):  # fmt: skip
    """Train for one epoch; append mean loss and accuracy (percent) to the lists, and return them.

    Both are measured on augmented images while the weights still change. So they look worse than
    those of the test set.

    Args:
        train_loader: any iterable of (images, labels).
        criterion: function of (outputs, labels) that returns the mean loss of a batch.
        train_losses, train_acc: lists to append to; None starts new ones.
        scheduler, averaged: from `Recipe`; stepped and updated once a batch.
        show_bar: whether to show a progress bar.

    On an NVIDIA GPU, the Python code of network and criterion runs for the first two batches only:
    see `graphed`. It may not read a value from a tensor, with `.item()` or `if`.

    Raises FloatingPointError if the loss is not finite, and ValueError if the loader is empty.
    """
    train_losses = [] if train_losses is None else train_losses
    train_acc = [] if train_acc is None else train_acc
    model.train()
    sums, seen = torch.zeros(2, device=device), 0  # loss and correct answers, left on the device

    def gradients(images, labels):
        outputs = model(images)
        loss = criterion(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        correct = (outputs.argmax(1) == labels).sum()
        sums.add_(torch.stack([loss.detach() * len(labels), correct]))

    device = torch.device(device)
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
        if show_bar and step % 50 == 0:  # not more often: reading them makes a GPU wait
            loss, correct = (sums / seen).tolist()
            batches.set_postfix_str(f"loss {loss:.4f}, accuracy {100 * correct:.2f} %")
    if not seen:
        raise ValueError("the training loader is empty")
    loss, correct = sums.tolist()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the training loss is {loss}: try a lower learning rate")
    train_losses.append(loss / seen)
    train_acc.append(100 * correct / seen)
    return train_losses, train_acc


def graphed(step):
    """Return a faster `step`, a function of tensors, for the current NVIDIA GPU: as a CUDA graph.

    Python takes longer to launch many small operations than the GPU to compute them. A graph
    launches all at once. It repeats the operations of `step`, on the same memory; the Python code
    in `step` does not run again.
    """
    graph, inputs = None, []  # what was recorded, and the memory that it reads

    def replay(*tensors):
        nonlocal graph, inputs
        if [t.shape for t in tensors] != [t.shape for t in inputs]:  # first call, or a new shape
            graph, inputs = None, [t.clone() for t in tensors]
            return step(*tensors)
        if graph is None:  # second call: record, without computing
            graph = torch.cuda.CUDAGraph()
            # "thread_local" lets the thread of a DataLoader with pin_memory work meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step(*inputs)
        for memory, tensor in zip(inputs, tensors, strict=True):
            memory.copy_(tensor)
        graph.replay()

    return replay


@torch.no_grad()
def predict(model, device, loader):
    """Return `(outputs, labels)` of all images in the loader's order: (N, 10) and (N,)."""
    model.eval()
    batches = [(model(images.to(device)), labels.to(device)) for images, labels in loader]
    if not batches:
        raise ValueError("the test loader is empty")
    outputs, labels = zip(*batches, strict=True)
    return torch.cat(outputs), torch.cat(labels)


def test(model, device, test_loader, criterion, test_losses=None, test_acc=None):
    """Evaluate; append mean loss and accuracy (percent) to the lists, and return them."""
    test_losses = [] if test_losses is None else test_losses
    test_acc = [] if test_acc is None else test_acc
    outputs, labels = predict(model, device, test_loader)
    test_losses.append(criterion(outputs, labels).item())
    # Count, then divide: as a float32 mean, 9,940 of 10,000 would be more than 99.4 %.
    test_acc.append(100 * (outputs.argmax(1) == labels).sum().item() / len(labels))
    return test_losses, test_acc


def fit(recipe, model, device, train_loader, criterion=F.nll_loss, bar=None):
    """Train `model` by the recipe with a `Loader`, and return the moving average of its weights.

    With `bar`, a tqdm bar, no other bar is shown; it advances once an epoch.
    """
    train_loader.epoch = 1  # the same seed sees the same images in the same order
    optimizer = recipe.optimizer(model)
    scheduler = recipe.scheduler(optimizer, len(train_loader))
    averaged = recipe.averaged(model)
    extras = {"scheduler": scheduler, "averaged": averaged, "show_bar": bar is None}
    losses, accuracies = [], []  # the bar counts them
    for _ in range(recipe.epochs):
        train(model, device, train_loader, optimizer, criterion, losses, accuracies, **extras)
        if bar is not None:
            bar.update()
    return averaged


# ------------------------------------------------------------------------------------- checkpoints


def save(content, path):
    """Write `content` with torch.save, whole or not at all. Warn if that fails; return success."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial)
        partial.replace(path)
        return True
    except (OSError, RuntimeError) as error:  # torch raises the second if the folder is gone
        warnings.warn(f"{path} could not be written: {error}", stacklevel=2)
        return False


def save_checkpoint(path, recipe, histories, **parts):
    """Keep a training after an epoch: its histories, and the state of model, optimizer, ..."""
    content = {
        "made by": f"{recipe} {parts['model']}",
        "histories": [[float(value) for value in history] for history in histories],
        "states": {name: part.state_dict() for name, part in parts.items()},
    }
    save(content, path)


def load_checkpoint(path, recipe, histories, **parts):
    """Continue the training kept in `path`; return how many of its epochs are done, 0 for none.

    A file that is damaged, or of another recipe or network, is renamed to *.old.
    """
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load takes changed bytes for numbers
            raise ValueError("it is damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["made by"] != f"{recipe} {parts['model']}":
            raise ValueError("it belongs to another recipe or network")
    except FileNotFoundError:
        return 0
    except OSError as error:
        warnings.warn(f"{path} could not be read: {error}", stacklevel=2)
        return 0
    except Exception as error:  # of many kinds: the file may be anything
        path.replace(path.with_suffix(".old"))
        print(f"Training starts anew. {path} cannot be continued: {error}. It is now *.old")
        return 0
    for name, part in parts.items():
        part.load_state_dict(saved["states"][name])
    for history, values in zip(histories, saved["histories"], strict=True):
        history[:] = values
    print(f"Continuing after epoch {len(histories[0])}. To start anew, delete {path}")
    return len(histories[0])


# ------------------------------------------------------------------------------------------- plots
# Each returns a matplotlib Figure and closes it, so that Jupyter shows it only once.


def plot_curves(train_losses, train_acc, test_losses, test_acc):
    """Draw loss and accuracy after each epoch, with the goal of 99.4 % and the last values."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    curves = ("train", train_losses, train_acc), ("test", test_losses, test_acc)
    for name, losses, accuracies in curves:
        if accuracies:  # one epoch at least
            epochs = range(1, len(losses) + 1)
            left.plot(epochs, losses, ".-", label=f"{name}, last {losses[-1]:.4f}")
            right.plot(epochs, accuracies, ".-", label=f"{name}, last {accuracies[-1]:.2f} %")
    right.axhline(99.4, color="gray", linestyle="--", label="goal, 99.4 %")
    left.set(xlabel="epoch", ylabel="loss (negative log-likelihood)", yscale="log", title="Loss")
    lowest = min([97.4, *test_acc])
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(lowest, 100), title="Accuracy")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    plt.close(fig)
    return fig


def plot_digits(images, titles=None, columns=10):
    """Draw (N, 1, 28, 28) images in a grid, each under its title."""
    rows = math.ceil(len(images) / columns) or 1  # without images, an empty grid
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
    """Draw misread images, the most confident first: true digit, predicted digit, probability.

    `outputs`, (N, 10) log-probabilities, and `labels`, (N,), are in the order of the images.
    """
    confidence, predicted = outputs.exp().max(1)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:limit]
    titles = [f"{labels[i]}, read {predicted[i]}\n{confidence[i]:.0%}" for i in wrong]
    return plot_digits(images[wrong.to(images.device)], titles)
