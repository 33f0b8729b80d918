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
    batch_size: int = 250  # divides 60,000 and 50,000, so every batch is full
    lr: float = 0.2  # the highest learning rate of the one-cycle schedule (Smith and Topin, 2018)
    warmup: float = 0.2  # share of the steps in which the rate rises. Then it falls to zero
    momentum: float = 0.9  # of SGD, in Nesterov's form
    weight_decay: float = 5e-4  # on convolution kernels only, not on biases and BatchNorm
    average: float = 0.998  # decay of the moving average of the weights, per step
    degrees: float = 7.0  # augmentation: rotate by up to this many degrees, either way
    translate: float = 1.0  # augmentation: shift by up to this many pixels along each axis
    scale: float = 0.1  # augmentation: zoom by a factor from 1 - scale to 1 + scale
    shear: float = 5.0  # augmentation: slant by up to this many degrees, either way
    upright: bool = True  # first make all digits upright: see the function `upright`

    def __post_init__(self):
        if min(self.epochs, self.batch_size) < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {self}")

    def augment(self, images, draws):
        """Return the images distorted. `draws`, (B, 5) uniform in [-1, 1], says how much."""
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
        """Return the one-cycle schedule: a line up, then a line to zero. Step it once a batch."""
        steps = self.epochs * steps_per_epoch
        knots = [-1, self.warmup * steps, steps]  # from -1, so that the first rate is not zero
        return LambdaLR(optimizer, lambda step: float(np.interp(step, knots, [0, 1, 0])))

    def averaged(self, model):
        """Return the moving average of the model's weights. Update it once a batch."""
        return MovingAverage(model, self.average)


class MovingAverage(AveragedModel):
    """Moving average of a model's weights and BatchNorm statistics. It is a model, too.

    It is steadier than the weights: test it and keep it.
    """

    def __init__(self, model, decay):
        super().__init__(model)
        self.decay = decay

    def update_parameters(self, model):
        """Move a small step towards the weights of `model`. Call this once a batch."""
        # The first steps are larger: the average has to forget the untrained weights.
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

    Downloads MNIST on first use. Raises RuntimeError if that fails or if a file is damaged.
    """
    root = Path(root).expanduser()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # seconds, because a server may never answer
    try:
        mnist = MNIST(root, train, download=True)
        content = mnist.data.numpy().tobytes() + mnist.targets.numpy().tobytes()
        if hashlib.sha256(content).hexdigest() != SHA256[train]:
            raise ValueError("a file is damaged")  # torchvision does not notice
    except Exception as error:  # of many kinds: no network, half a file, a read-only folder
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
        images: (B, 1, H, H) float, not yet normalised: new pixels at the border are 0, like paper.
        degrees: (B,), counter-clockwise. translate: (B, 2), pixels to the right and down.
        scale: (B,), a factor. shear: (B,), degrees to the left.
    """
    cos, sin, tan = degrees.deg2rad().cos(), degrees.deg2rad().sin(), shear.deg2rad().tan()
    # For each output pixel, grid_sample needs its place in the input. So this is the inverse: undo
    # the rotation, [[cos, -sin], [sin, cos]], then the shear, [[1, -tan], [0, 1]], then the zoom.
    inverse = torch.stack([cos - tan * sin, -sin - tan * cos, sin, cos], 1).view(-1, 2, 2)
    inverse = inverse / scale.view(-1, 1, 1)
    shift = inverse @ translate.unsqueeze(2) * (-2 / images.shape[-1])  # a side is 2 units long
    grid = F.affine_grid(torch.cat([inverse, shift], 2), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def upright(images):
    """Return the digits, (N, 1, 28, 28) uint8, sheared until they no longer lean.

    Then the axis of inertia is vertical. The centre of mass stays where it is. LeCun et al., 1998,
    call this deslanting.
    """
    ink, places = images[:, 0].float(), torch.arange(28.0, device=images.device) - 13.5
    rows, columns = ink.sum(2), ink.sum(1)  # (N, 28) each
    mass = rows.sum(1, keepdim=True).clamp(min=1)  # an image without ink stays as it is
    centre = rows @ places.unsqueeze(1) / mass
    y, x = places - centre, places - columns @ places.unsqueeze(1) / mass
    slant = torch.einsum("nyx,ny,nx->n", ink, y, x) / (rows * y**2).sum(1).clamp(min=1)
    zero, one = torch.zeros_like(slant), torch.ones_like(slant)
    shift = torch.stack([slant * centre.squeeze(1), zero], 1)  # `affine` shears about the middle
    return affine(images.float(), zero, shift, one, -slant.atan().rad2deg()).round().byte()


class Loader:
    """Batches of normalised images. The images are uint8 and stay on the device.

    With a seed, the images are shuffled, and augmented by `augment(images, draws)` as in `Recipe`.
    Seed and epoch set what is random, so that a training can be repeated.
    """

    def __init__(self, images, labels, batch_size, seed=None, augment=None):
        if len(images) != len(labels) or batch_size < 1:
            raise ValueError(f"{len(images)} images, {len(labels)} labels, batches of {batch_size}")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.seed, self.augment = seed, augment
        self.epoch = 1  # the next pass over the images is this epoch

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
        # Augment 1,000 images at once. On a GPU, few large operations are faster than many small.
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
    """Train for one epoch. Append the mean loss and the accuracy in percent to the lists, and
    return the lists.

    Args:
        train_loader: any iterable of (images, labels).
        criterion: a function of (outputs, labels) that returns the mean loss of a batch. On an
            NVIDIA GPU, it and the network must not read values with `.item()`: see `graphed`.
        scheduler, averaged: from `Recipe`. They are stepped and updated once a batch.

    Raises FloatingPointError if the loss is not finite.
    """
    train_losses = [] if train_losses is None else train_losses
    train_acc = [] if train_acc is None else train_acc
    model.train()
    # Sums of loss and of correct answers. To read them makes a GPU wait, so they stay on it.
    sums, seen = torch.zeros(2, device=device), 0

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
    """Return a faster `step`, a function of tensors, for the current NVIDIA GPU.

    Python needs longer to launch the many small operations than the GPU to compute them. So they
    are recorded once, as a CUDA graph, and then launched together. The graph uses the same memory
    each time. The Python code of `step` does not run again.
    """
    graph, inputs = None, []  # `inputs` is the memory from which the graph reads

    def replay(*tensors):
        nonlocal graph, inputs
        if [t.shape for t in tensors] != [t.shape for t in inputs]:  # first call, or a new shape
            graph, inputs = None, [t.clone() for t in tensors]
            return step(*tensors)
        if graph is None:  # second call: record the operations
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
    """Return outputs, (N, 10), and labels, (N,), of all images of a loader, in its order."""
    model.eval()
    batches = [(model(images.to(device)), labels.to(device)) for images, labels in loader]
    outputs, labels = zip(*batches, strict=True)
    return torch.cat(outputs), torch.cat(labels)


def test(model, device, test_loader, criterion, test_losses=None, test_acc=None):
    """Evaluate. Append mean loss and accuracy in percent to the lists, and return the lists."""
    test_losses = [] if test_losses is None else test_losses
    test_acc = [] if test_acc is None else test_acc
    outputs, labels = predict(model, device, test_loader)
    test_losses.append(criterion(outputs, labels).item())
    # Count, then divide: as a float32 mean, 9,940 of 10,000 would be more than 99.4 %.
    test_acc.append(100 * (outputs.argmax(1) == labels).sum().item() / len(labels))
    return test_losses, test_acc


def fit(recipe, model, device, train_loader, criterion=F.nll_loss, bar=None):
    """Train `model` by the recipe, with a `Loader`. Return the moving average of its weights.

    `bar` may be a tqdm bar for several trainings. It advances by one after each epoch.
    """
    train_loader.epoch = 1  # so that the same seed gives the same training
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
    """Save `content` with torch.save, whole or not at all. If that fails, warn and return False."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial)
        partial.replace(path)
        return True
    except (OSError, RuntimeError) as error:  # torch's, if the folder is gone
        warnings.warn(f"{path} could not be written: {error}", stacklevel=2)
        return False


def save_checkpoint(path, recipe, histories, **parts):
    """Save a training after an epoch: its histories and the state of model, optimizer, ..."""
    values = [[float(value) for value in history] for history in histories]
    states = {name: part.state_dict() for name, part in parts.items()}
    save({"made by": f"{recipe} {parts['model']}", "histories": values, "states": states}, path)


def load_checkpoint(path, recipe, histories, **parts):
    """Load the training saved in `path`. Return how many epochs it has done, 0 without a file.

    A file that is damaged or belongs to another recipe or network is renamed to *.old.
    """
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not notice
            raise ValueError("it is damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["made by"] != f"{recipe} {parts['model']}":
            raise ValueError("it belongs to another recipe or network")
    except OSError:  # there is no file, or no folder: then `save_checkpoint` warns
        return 0
    except Exception as error:  # of many kinds: the file may contain anything
        path.replace(path.with_suffix(".old"))
        print(f"Training starts anew. {path} cannot be used: {error}. It is now called *.old")
        return 0
    for name, part in parts.items():
        part.load_state_dict(saved["states"][name])
    for history, values in zip(histories, saved["histories"], strict=True):
        history[:] = values
    print(f"Continuing after epoch {len(histories[0])}. To start anew, delete {path}")
    return len(histories[0])


# ------------------------------------------------------------------------------------------- plots
# Each function returns a Figure and closes it. Otherwise Jupyter would show it twice.


def plot_curves(train_losses, train_acc, test_losses, test_acc):
    """Draw loss and accuracy of each epoch, and the goal of 99.4 %."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    curves = ("train", train_losses, train_acc), ("test", test_losses, test_acc)
    for name, losses, accuracies in curves:
        epochs = range(1, len(losses) + 1)
        if epochs:  # there are none if the first was interrupted
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
    """Draw the images with wrong answers, the most confident first.

    `outputs`, (N, 10) log-probabilities, and `labels`, (N,), are in the order of the images.
    """
    confidence, predicted = outputs.exp().max(1)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:limit]
    titles = [f"{labels[i]}, read {predicted[i]}\n{confidence[i]:.0%}" for i in wrong]
    return plot_digits(images[wrong.to(images.device)], titles)
