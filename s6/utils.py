"""Everything around the network: recipe, data, training loop, interrupted trainings and pictures."""

import copy
import hashlib
import io
import math
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------- recipe


@dataclass(frozen=True)
class Recipe:
    """How the network is trained: each hyperparameter, once. `Recipe(epochs=5)` changes one and keeps the rest."""

    seed: int = 1  # of the first weights, the order of the images and their augmentation
    epochs: int = 20  # the assignment's limit
    batch_size: int = 250  # divides 60,000 and 50,000: every step sees a full batch
    lr: float = 0.2  # peak of the one-cycle schedule (Smith and Topin, 2018)
    warmup: float = 0.2  # share of the steps in which the rate climbs to its peak, before it falls to zero
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 5e-4  # on the convolutions' weights only: biases and BatchNorm have nothing to shrink for
    average: float = 0.998  # decay per step of the moving average of the weights: it spans 500 steps, two epochs
    degrees: float = 10.0  # augmentation: rotation, to either side
    translate: float = 1.0  # augmentation: shift along each axis, in pixels of 28; the digits come centred
    scale: float = 0.1  # augmentation: zoom, from 1 - scale to 1 + scale
    shear: float = 10.0  # augmentation: slant, in degrees to either side

    def augment(self, images, draws):
        """`affine` at this recipe's strengths: `draws` are (B, 5), each from -1 to 1, five for an image."""
        degrees, x, y, scale, shear = draws.T
        shift = torch.stack([x, y], 1) * self.translate
        return affine(images, degrees * self.degrees, shift, 1 + scale * self.scale, shear * self.shear)

    def prepare(self, model, steps_per_epoch):
        """Return `(optimizer, scheduler, averaged)` for `model`, already on its device.

        `scheduler` is stepped once a batch, `epochs * steps_per_epoch` times in all; after that the rate is zero.
        `averaged` holds the exponential moving average of the weights and BatchNorm statistics; evaluate that one.
        """
        total = self.epochs * steps_per_epoch
        climb = min(max(1, round(self.warmup * total)), total - 1)

        def share_of_peak(step):
            return max(0, min((step + 1) / (climb + 1), (total - step) / (total - climb)))

        def moving_average(averages, weights, steps):
            # The decay climbs to its value, min(decay, (1 + n) / (10 + n)), like TensorFlow's ExponentialMovingAverage:
            # one that is constant from the start needs epochs to forget the untrained weights.
            share = (9 / (10 + steps)).clamp(min=1 - self.average)  # a tensor: reading it would wait for the device
            for average, weight in zip(averages, weights, strict=True):
                if average.is_floating_point():
                    average.lerp_(weight, share)
                else:
                    average.copy_(weight)  # BatchNorm's count of batches

        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others}]
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
        return optimizer, scheduler, AveragedModel(model, multi_avg_fn=moving_average, use_buffers=True)


def cpu_dtype():
    """Return bfloat16 where the processor has instructions for its products, else float32: emulated it is slow."""
    cpu = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(cpu.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")) else torch.float32


# ------------------------------------------------------------------------------------------------------------ data

MEAN, STD = 0.1307, 0.3081  # of the 60,000 training images, as fractions of white
MNIST_SHA256 = {  # of the decompressed files of LeCun, Cortes and Burges
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def load_mnist(root="data", train=True):
    """Return the training or the test set, `(images, labels)`: (N, 1, 28, 28) uint8 and (N,) int64.

    The files lie where torchvision puts them, in `root/MNIST/raw`. It looks only at whether a file is there; here each
    is compared with its digest as well. Missing and damaged ones are downloaded, by torchvision.

    Raises:
        RuntimeError: they could not be downloaded, or what came is not MNIST.
    """
    raw = Path(root).expanduser() / "MNIST" / "raw"

    def intact(name):
        return (raw / name).is_file() and hashlib.sha256((raw / name).read_bytes()).hexdigest() == MNIST_SHA256[name]

    if not all(map(intact, MNIST_SHA256)):
        from torchvision.datasets import MNIST  # takes a second to import, and is needed here only

        reason = None
        try:
            for name in MNIST_SHA256:
                if not intact(name):
                    (raw / name).unlink(missing_ok=True)
            MNIST(raw.parent.parent, download=True)
        except Exception as error:  # of many kinds: no network, no mirror, a folder that cannot be written
            reason = error
        if missing := [name for name in MNIST_SHA256 if not intact(name)]:
            raise RuntimeError(
                f"{', '.join(missing)} could not be downloaded. In a checkout `make data` tries another source; or put "
                f"the four files of MNIST, {', '.join(MNIST_SHA256)}, decompressed, into {raw}"
            ) from reason
    name = "train" if train else "t10k"
    # The digests have vouched for the headers: 16 bytes before the pixels, 8 before the labels.
    images = np.fromfile(raw / f"{name}-images-idx3-ubyte", np.uint8, offset=16)
    labels = np.fromfile(raw / f"{name}-labels-idx1-ubyte", np.uint8, offset=8)
    return torch.from_numpy(images).view(-1, 1, 28, 28), torch.from_numpy(labels).long()


def affine(images, degrees, translate, scale, shear):
    """Rotate, shift, zoom and slant each image by its own amount, in one bilinear resampling.

    Each image is slanted, zoomed, rotated about its centre, then shifted. What comes from outside is 0: call this
    before normalising, while 0 is the background.

    Args:
        images: (B, 1, H, H) float.
        degrees: (B,) rotation, counter-clockwise.
        translate: (B, 2) shift right and down, in pixels.
        scale: (B,) zoom, 1 keeps the size.
        shear: (B,) slant in degrees, upright strokes lean to the left where it is positive.
    """
    cos, sin, tan = degrees.deg2rad().cos(), degrees.deg2rad().sin(), shear.deg2rad().tan()
    # grid_sample asks where each output pixel comes from, so this is the inverse map.
    inverse = torch.stack([cos - tan * sin, -sin - tan * cos, sin, cos], 1).view(-1, 2, 2) / scale.view(-1, 1, 1)
    shift = inverse @ translate.unsqueeze(2) * (-2 / images.shape[-1])  # a side is 2 units long
    grid = F.affine_grid(torch.cat([inverse, shift], 2), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class Loader:
    """Iterate over images that lie on the device as bytes: normalised (B, 1, 28, 28) float32 and (B,) int64 labels.

    The last batch holds what is left. `len` is the number of batches.

    Args:
        images: (N, 1, 28, 28) uint8. labels: (N,) int64, on the same device.
        seed: with it each pass has an order of its own, drawn from (seed, `epoch`); without, that of `images`.
            `epoch` is the number of the pass, from 1; set it to go on with a training.
        augment: a function `(images, draws) -> images` of a float batch from 0, the background, to 255; `draws` are
            (B, 5), uniform between -1 and 1, from the same generator as the order.
    """

    def __init__(self, images, labels, batch_size, seed=None, augment=None):
        self.images, self.labels, self.batch_size, self.seed, self.augment = images, labels, batch_size, seed, augment
        self.epoch = 1  # the next pass

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        count, device = len(self.labels), self.labels.device
        order, draws = torch.arange(count, device=device), None
        if self.seed is not None:
            # All of a pass at its start: what is drawn depends on neither batch size nor augmentation.
            generator = torch.Generator(device).manual_seed(1000 * self.seed + self.epoch)
            order = torch.randperm(count, generator=generator, device=device)
            draws = torch.rand(count, 5, generator=generator, device=device) * 2 - 1
        self.epoch += 1
        for indices in order.split(self.batch_size):
            images = self.images[indices].float()
            if self.augment is not None:
                images = self.augment(images, draws[indices])
            yield (images - 255 * MEAN) / (255 * STD), self.labels[indices]


def mnist_loaders(recipe, device, root="data"):
    """Return `(train_loader, test_loader)`: MNIST, resident on `device` (55 MB), the first one shuffled and augmented.

    The images come from `root`, or are downloaded into it; see `load_mnist` for that and for the errors.
    """
    (images, labels), (test_images, test_labels) = load_mnist(root), load_mnist(root, train=False)
    train_loader = Loader(images.to(device), labels.to(device), recipe.batch_size, recipe.seed, recipe.augment)
    return train_loader, Loader(test_images.to(device), test_labels.to(device), recipe.batch_size)


# ------------------------------------------------------------------------------------------------------------ loop


def _checked(labels, outputs):
    """Return `labels`, looked at while they are on the host: on a GPU a wrong one would cost the whole process."""
    if labels.device.type == "cpu" and not 0 <= labels.min() <= labels.max() < outputs.shape[1]:
        raise ValueError(f"labels must lie in 0..{outputs.shape[1] - 1}, got {labels.min()} to {labels.max()}")
    return labels


def _finite(loss, name):
    if not math.isfinite(loss):
        raise FloatingPointError(f"the {name} loss is {loss}: lower the learning rate or look at the data")
    return loss


def train(
    model, device, train_loader, optimizer, criterion, train_losses=None, train_acc=None, *,
    scheduler=None, averaged=None,
):  # fmt: skip
    """Train for one pass over the loader, and append the mean loss and the accuracy in percent to the histories.

    Both are running figures of the augmented images, as the weights move: worse than the final weights would give.
    On a CPU with instructions for it, the products of the forward and backward pass are in bfloat16 (autocast).

    Args:
        train_loader: any iterable of (images, labels) batches.
        criterion: mean loss of a batch from `(outputs, labels)`: `F.nll_loss`, `nn.CrossEntropyLoss()`, ...
        train_losses, train_acc: lists to append to; new ones where None.
        scheduler: stepped once a batch.
        averaged: a `torch.optim.swa_utils.AveragedModel` of `model`, updated once a batch.

    Returns:
        The two lists.

    Raises:
        ValueError: the loader is empty, or a label has no class among the outputs (looked at on the host only).
        FloatingPointError: the loss is not finite. The histories keep what they had.
    """
    train_losses = [] if train_losses is None else train_losses
    train_acc = [] if train_acc is None else train_acc
    model.train()
    dtype = cpu_dtype() if torch.device(device).type == "cpu" else torch.float32
    sums, seen = torch.zeros(2, device=device), 0  # loss, correct: read by the host as rarely as the bar is drawn

    def means():
        loss, correct = (sums / seen).tolist()
        return _finite(loss, "training"), 100 * correct

    bar = {"desc": f"epoch {len(train_losses) + 1}", "unit": "batch", "leave": False, "mininterval": 0.5}
    with tqdm(train_loader, file=sys.stdout, **bar) as progress:  # stderr would be a red box in Jupyter
        for images, labels in train_loader:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                outputs = model(images.to(device)).float()  # bfloat16 counts 511 of 512 as 512
            labels = _checked(labels, outputs).to(device)
            loss = criterion(outputs, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if averaged is not None:
                averaged.update_parameters(model)
            sums += torch.stack([loss.detach() * len(labels), (outputs.argmax(1) == labels).sum()])
            seen += len(labels)
            if progress.update():  # true where the bar was due to be redrawn
                rate = optimizer.param_groups[0]["lr"]
                progress.set_postfix_str("loss {:.4f}, accuracy {:.2f} %, lr {:.4f}".format(*means(), rate))
    if not seen:
        raise ValueError("the training loader is empty")
    loss, accuracy = means()
    train_losses.append(loss)
    train_acc.append(accuracy)
    return train_losses, train_acc


def predict(model, device, loader):
    """Return `(outputs, labels)` of every image in the loader, in its order: (N, 10) and (N,), on `device`.

    Puts the model in evaluation mode, which leaves weights and BatchNorm statistics alone. Errors are as in `train`.
    """
    model.eval()
    outputs, targets = [], []
    with torch.no_grad():
        for images, labels in loader:
            outputs.append(model(images.to(device)))
            targets.append(_checked(labels, outputs[-1]).to(device))
    if not targets:
        raise ValueError("the test loader is empty")
    return torch.cat(outputs), torch.cat(targets)


def test(model, device, test_loader, criterion, test_losses=None, test_acc=None):
    """Evaluate on the whole loader, and append the mean loss and the accuracy in percent to the histories.

    The criterion sees all outputs at once, so its mean does not depend on the batch size. The criterion, the lists
    and the errors are as in `train`.
    """
    test_losses = [] if test_losses is None else test_losses
    test_acc = [] if test_acc is None else test_acc
    outputs, labels = predict(model, device, test_loader)
    test_losses.append(_finite(criterion(outputs, labels).item(), "test"))
    # Counted, then divided: a mean of float32 makes 9,940 of 10,000 more than 99.4 %.
    test_acc.append(100 * (outputs.argmax(1) == labels).sum().item() / len(labels))
    return test_losses, test_acc


test.__test__ = False  # for pytest: a function of the product, whatever its name

# ---------------------------------------------------------------------------------------------------- interruption

CODE = hashlib.sha256(  # of the modules as they were imported: changed ones do not take up what these have trained
    b"".join(p.read_bytes() for n in ("model.py", "utils.py") if (p := Path(__file__).with_name(n)).is_file())
).hexdigest()


def resumable(path, recipe, histories, **parts):
    """Yield the epochs still to train, from 1 to `recipe.epochs`; a training cut short goes on where it stood.

    `histories` and `parts` are kept in the file `path` after each epoch but the last, which removes it. On the same
    machine the training ends bit for bit as if it had never been cut short. A file of another recipe, network or
    version of the modules, or a damaged one, becomes *.old, and the training starts as if it had not been there.

    Args:
        histories: lists, each with one entry an epoch; an epoch cut short leaves none.
        parts: whatever has `state_dict` and `load_state_dict`: model, optimizer, loader, ... Torch's own generators of
            random numbers are kept with them.
    """
    path = Path(path).expanduser()
    old, partial = path.with_suffix(".old"), path.with_suffix(".partial")
    made_by = vars(recipe) | {"code": CODE}

    def state():
        rng = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        saved = {name: part.state_dict() for name, part in parts.items()}
        return {"made by": made_by, "histories": histories, "rng": rng, "parts": saved}

    def restore(saved):
        for name, part in parts.items():
            part.load_state_dict(saved["parts"][name])
        for history, values in zip(histories, saved["histories"], strict=True):
            history[:] = values
        torch.set_rng_state(saved["rng"][0])
        torch.cuda.set_rng_state_all(saved["rng"][1:])

    if path.exists():
        fresh, why = copy.deepcopy(state()), "damaged"
        try:
            if zipfile.ZipFile(path).testzip() is not None:  # torch.load itself takes changed bytes for numbers
                raise ValueError
            saved = torch.load(path, map_location="cpu", weights_only=True)
            why = "of another recipe or version of the modules"
            if saved["made by"] != made_by:
                raise ValueError
            why = "of another network"
            restore(saved)
            print(f"Going on after epoch {len(histories[0])}, kept in {path}")
        except Exception:  # torch, pickle and zipfile raise many kinds over a file that is none of theirs
            restore(fresh)  # load_state_dict copies what fits before it raises
            path.replace(old)
            print(f"Training starts anew: the one in {path} is {why}. That file is now {old.name}")

    for epoch in range(len(histories[0]) + 1, recipe.epochs + 1):
        try:
            yield epoch
        finally:  # cut short between training and testing, too
            done = min(map(len, histories))
            for history in histories:
                del history[done:]
        try:
            if epoch == recipe.epochs:
                path.unlink(missing_ok=True)
            else:
                torch.save(state(), content := io.BytesIO())
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(content.getbuffer())
                partial.replace(path)  # whole or not at all
        except OSError as error:
            warnings.warn(f"the training goes on, but is not kept: {error}", stacklevel=1)


# ---------------------------------------------------------------------------------------------------------- pictures
# Each returns a matplotlib Figure, closed for pyplot: as the last line of a cell it is shown once.


def plot_curves(train_losses, train_acc, test_losses, test_acc):
    """Draw loss and accuracy of both sets against the epoch, with 99.4 % as a line and the last values written.

    The accuracy axis shows what is near the goal; the first epochs of training may lie below it.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for label, losses, accuracies in (("train", train_losses, train_acc), ("test", test_losses, test_acc)):
        loss, accuracy = (f", last {losses[-1]:.4f}", f", last {accuracies[-1]:.2f} %") if accuracies else ("", "")
        left.plot(range(1, len(losses) + 1), losses, ".-", label=label + loss)
        right.plot(range(1, len(accuracies) + 1), accuracies, ".-", label=label + accuracy)
    right.axhline(99.4, color="gray", linestyle="--", label="goal, 99.4 %")
    left.set(xlabel="epoch", ylabel="loss (negative log-likelihood)", yscale="log", title="Loss")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(min([97.4, *test_acc]), 100), title="Accuracy")
    for axes, corner in ((left, "upper right"), (right, "lower right")):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(loc=corner)
    plt.close(fig)
    return fig


def plot_digits(images, titles=None, columns=10):
    """Draw (N, 1, 28, 28) images, normalised or not, in a grid; `titles` are N strings."""
    rows = math.ceil(len(images) / columns) or 1  # without images an empty grid, not an error
    height = 1.0 if titles is None else 1.45
    fig, grid = plt.subplots(rows, columns, figsize=(columns, rows * height), layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for i, (axes, image) in enumerate(zip(grid.flat, images.cpu().numpy(), strict=False)):
        axes.imshow(image[0], cmap="gray")
        if titles is not None:
            axes.set_title(titles[i], fontsize=8)
    plt.close(fig)
    return fig


def plot_mistakes(images, outputs, labels, limit=30):
    """Draw the misread images, the most confident first, under their true and predicted label and its probability.

    Args:
        images: (N, 1, 28, 28), in the order of `outputs`: (N, 10) log-probabilities, and `labels`: (N,).
    """
    confidence, predicted = outputs.exp().max(1)
    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)][:limit]
    titles = [f"{labels[i]}, read {predicted[i]}\n{confidence[i]:.0%}" for i in wrong]
    return plot_digits(images[wrong.to(images.device)], titles)


def plot_confusion(outputs, labels):
    """Draw how often each digit was read as each other one; the right answers, on the diagonal, are left blank."""
    counts = torch.bincount(labels * 10 + outputs.argmax(1), minlength=100).view(10, 10).cpu().numpy()
    np.fill_diagonal(counts, 0)
    fig, axes = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
    axes.imshow(counts, cmap="Blues")
    for true, predicted in zip(*counts.nonzero(), strict=True):
        n = counts[true, predicted]
        axes.text(predicted, true, n, ha="center", va="center", color="white" if n > counts.max() / 2 else "black")
    axes.set(xlabel="read as", ylabel="true digit", xticks=range(10), yticks=range(10), title="Mistakes")
    plt.close(fig)
    return fig
