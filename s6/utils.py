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
    average: float = 0.998  # decay per step of the moving average of the weights at the end; `prepare` starts lower
    degrees: float = 10.0  # augmentation: rotation, to either side
    translate: float = 1.0  # augmentation: shift along each axis, in pixels of 28; the digits come centred
    scale: float = 0.1  # augmentation: zoom, from 1 - scale to 1 + scale
    shear: float = 10.0  # augmentation: slant, in degrees to either side

    def augment(self, images, draws):
        """`affine` at this recipe's strengths: `draws` are (B, 5), each from -1 to 1, five for an image."""
        turn, shift, zoom, slant = draws[:, 0], draws[:, 1:3], draws[:, 3], draws[:, 4]
        return affine(images, turn * self.degrees, shift * self.translate, 1 + zoom * self.scale, slant * self.shear)

    def prepare(self, model, steps_per_epoch):
        """Return `(optimizer, scheduler, averaged)` for `model`, already on its device.

        `scheduler` is stepped once a batch; after `epochs * steps_per_epoch` steps the rate is zero. `averaged` holds
        the exponential moving average of the weights and BatchNorm statistics; evaluate that one.
        """
        total = self.epochs * steps_per_epoch
        climb = min(max(1, round(self.warmup * total)), total - 1)

        def moving_average(averages, weights, steps):
            # The decay climbs, min(decay, (1 + n) / (10 + n)), like TensorFlow's ExponentialMovingAverage: it spans a
            # ninth of all steps so far, at 0.998 the last 500. One that is constant remembers the untrained weights.
            share = (9 / (10 + steps)).clamp(min=1 - self.average)  # a tensor: reading it would wait for the device
            for average, weight in zip(averages, weights, strict=True):
                if average.is_floating_point():
                    average.lerp_(weight, share)
                else:
                    average.copy_(weight)  # BatchNorm's count of batches

        decayed, others = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others}]
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: max(0, min((step + 1) / (climb + 1), (total - step) / (total - climb)))
        )
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

    The files lie where torchvision puts them, in `root/MNIST/raw`. It looks only at whether they are there; here each
    is compared with its digest, too. One missing or damaged: all are downloaded; RuntimeError where that fails.
    """
    raw = Path(root).expanduser() / "MNIST" / "raw"

    def intact(name):
        return (raw / name).is_file() and hashlib.sha256((raw / name).read_bytes()).hexdigest() == MNIST_SHA256[name]

    if not all(map(intact, MNIST_SHA256)):
        from torchvision.datasets import MNIST  # takes a second to import, and is needed here only

        try:
            for name in MNIST_SHA256:
                if not intact(name):
                    (raw / name).unlink(missing_ok=True)
            MNIST(raw.parent.parent, download=True)
            if not all(map(intact, MNIST_SHA256)):
                raise ValueError("what came is not MNIST")
        except Exception as error:  # of many kinds: no network, no mirror, a folder that cannot be written
            raise RuntimeError(
                "MNIST could not be downloaded. In a checkout `make data` tries another source; or put the four files "
                f"{', '.join(MNIST_SHA256)}, decompressed, into {raw}"
            ) from error
    name = "train" if train else "t10k"
    # The digests have vouched for the headers: 16 bytes before the pixels, 8 before the labels.
    images = np.fromfile(raw / f"{name}-images-idx3-ubyte", np.uint8, offset=16)
    labels = np.fromfile(raw / f"{name}-labels-idx1-ubyte", np.uint8, offset=8)
    return torch.from_numpy(images).view(-1, 1, 28, 28), torch.from_numpy(labels).long()


def affine(images, degrees, translate, scale, shear):
    """Rotate, shift, zoom and slant each image by its own amount, in one bilinear resampling.

    The (B, 1, H, H) float images are slanted by `shear` degrees, (B,), where positive to the left, zoomed by `scale`,
    (B,), rotated counter-clockwise about the centre by `degrees`, (B,), then shifted right and down by `translate`
    pixels, (B, 2). What comes from outside is 0: call this before normalising, while 0 is the background.
    """
    cos, sin, tan = degrees.deg2rad().cos(), degrees.deg2rad().sin(), shear.deg2rad().tan()
    # grid_sample asks where each output pixel comes from, so this is the inverse map.
    inverse = torch.stack([cos - tan * sin, -sin - tan * cos, sin, cos], 1).view(-1, 2, 2) / scale.view(-1, 1, 1)
    shift = inverse @ translate.unsqueeze(2) * (-2 / images.shape[-1])  # a side is 2 units long
    grid = F.affine_grid(torch.cat([inverse, shift], 2), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class Loader:
    """Iterate over images that lie on the device as bytes: normalised (B, 1, 28, 28) float32 and (B,) int64 labels.

    Args:
        images: (N, 1, 28, 28) uint8. labels: (N,) int64, on the same device. The last batch holds what is left.
        seed: with it each pass has an order of its own, drawn from (seed, `epoch`); without it the order stays.
            `epoch` is the number of the pass, from 1; set it to go on with a training.
        augment: function `(images, draws) -> images` of a batch from 0 to 255 and (B, 5) from -1 to 1; needs a seed.
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
    """Return `(train_loader, test_loader)` over `load_mnist`'s images, on `device` (55 MB); only the first augments."""
    train_set, test_set = ([part.to(device) for part in load_mnist(root, train)] for train in (True, False))
    return Loader(*train_set, recipe.batch_size, recipe.seed, recipe.augment), Loader(*test_set, recipe.batch_size)


# ------------------------------------------------------------------------------------------------------------ loop


def _checked(labels, outputs):
    """Return `labels`; ValueError for one without a class. Looks on the host only: it would have to wait for a GPU."""
    if labels.device.type == "cpu" and not 0 <= labels.min() <= labels.max() < outputs.shape[1]:
        raise ValueError(f"labels must lie in 0..{outputs.shape[1] - 1}, got {labels.min()} to {labels.max()}")
    return labels


def train(
    model, device, train_loader, optimizer, criterion, train_losses=None, train_acc=None, *,
    scheduler=None, averaged=None,
):  # fmt: skip
    """Train for one pass over the loader, and append the mean loss and the accuracy in percent to the histories.

    Both are of augmented images, as the weights move: worse than the final weights would give. A CPU with instructions
    for it multiplies in bfloat16 (autocast).

    Args:
        train_loader: any iterable of (images, labels) batches.
        criterion: mean loss of a batch from `(outputs, labels)`: `F.nll_loss`, `nn.CrossEntropyLoss()`, ...
        train_losses, train_acc: lists to append to, which are returned; new ones where None.
        scheduler, averaged: of `Recipe.prepare`, stepped and updated once a batch.

    Raises ValueError for an empty loader and for a label without a class (seen on the host only), FloatingPointError
    for a loss that is not finite.
    """
    train_losses = [] if train_losses is None else train_losses
    train_acc = [] if train_acc is None else train_acc
    model.train()
    dtype = cpu_dtype() if torch.device(device).type == "cpu" else torch.float32
    sums, seen = torch.zeros(2, device=device), 0  # loss, correct: read by the host as rarely as the bar is drawn

    def means():
        loss, correct = (sums / seen).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss}: lower the learning rate or look at the data")
        return loss, 100 * correct

    bar = {"desc": f"epoch {len(train_losses) + 1}", "unit": "batch", "leave": False, "mininterval": 0.5}
    with tqdm(train_loader, file=sys.stdout, **bar) as progress:  # stderr would be a red box in Jupyter
        for images, labels in train_loader:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                outputs = model(images.to(device)).float()  # Net's are; sums of bfloat16 count 511 as 512
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
            if progress.update():  # not over the bar itself, for this tells when it was due to be redrawn
                lr = optimizer.param_groups[0]["lr"]
                progress.set_postfix_str("loss {:.4f}, accuracy {:.2f} %, lr {:.4f}".format(*means(), lr), False)
    if not seen:
        raise ValueError("the training loader is empty")
    loss, accuracy = means()
    train_losses.append(loss)
    train_acc.append(accuracy)
    return train_losses, train_acc


def predict(model, device, loader):
    """Return `(outputs, labels)` of all images, (N, 10) and (N,), on `device`, in the loader's order."""
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
    """Evaluate on the whole loader, and append mean loss and accuracy in percent to the histories, as in `train`."""
    test_losses = [] if test_losses is None else test_losses
    test_acc = [] if test_acc is None else test_acc
    outputs, labels = predict(model, device, test_loader)
    test_losses.append(criterion(outputs, labels).item())
    # Counted, then divided: a mean of float32 makes 9,940 of 10,000 more than 99.4 %.
    test_acc.append(100 * (outputs.argmax(1) == labels).sum().item() / len(labels))
    return test_losses, test_acc


# ---------------------------------------------------------------------------------------------------- interruption

_texts = [path.read_bytes() for path in map(Path(__file__).with_name, ("model.py", "utils.py")) if path.is_file()]
CODE = hashlib.sha256(b"".join(_texts)).hexdigest()  # of the two modules, as they were imported


def resumable(path, recipe, histories, **parts):
    """Yield the epochs still to train, from 1 to `recipe.epochs`; a training cut short goes on where it stood.

    After each epoch the file `path` keeps the `histories`, lists with an entry an epoch, the `parts`, whatever has a
    `state_dict`, and torch's random states; at the end it is removed. On one CPU the training ends bit for bit as if
    never cut short. A file that is damaged, or of another recipe, network or version of the modules, becomes *.old.
    """
    path = Path(path).expanduser()
    old, partial = path.with_suffix(".old"), path.with_suffix(".partial")
    made_by = f"{recipe}, {parts.get('model')}, code {CODE}"

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
            why = "of another recipe, network or version of the modules"
            if saved["made by"] != made_by:
                raise ValueError
            restore(saved)
            print(f"Going on after epoch {len(histories[0])}, kept in {path}")
        except Exception:  # torch, pickle and zipfile raise many kinds over a file that is none of theirs
            restore(fresh)  # load_state_dict copies what fits before it raises
            path.replace(old)
            print(f"Training starts anew: the one in {path} is {why}. That file is now {old.name}")

    for epoch in range(len(histories[0]) + 1, recipe.epochs + 1):
        try:
            yield epoch
        finally:  # an exception closes a generator: nothing is left of an epoch that was trained but not tested
            done = min(map(len, histories))
            for history in histories:
                del history[done:]
        torch.save(state(), content := io.BytesIO())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content.getbuffer())
            partial.replace(path)  # whole or not at all
        except OSError as error:
            warnings.warn(f"the training goes on, but is not kept: {error}", stacklevel=1)
    if path.exists():
        path.unlink()


# ---------------------------------------------------------------------------------------------------------- pictures
# Each returns a matplotlib Figure, closed for pyplot: as the last line of a cell it is shown once.


def plot_curves(train_losses, train_acc, test_losses, test_acc):
    """Draw loss and accuracy of both sets against the epoch, near the goal of 99.4 %, with the last values written."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for label, losses, accuracies in (("train", train_losses, train_acc), ("test", test_losses, test_acc)):
        loss, accuracy = (f", last {losses[-1]:.4f}", f", last {accuracies[-1]:.2f} %") if accuracies else ("", "")
        left.plot(range(1, len(losses) + 1), losses, ".-", label=label + loss)
        right.plot(range(1, len(accuracies) + 1), accuracies, ".-", label=label + accuracy)
    right.axhline(99.4, color="gray", linestyle="--", label="goal, 99.4 %")
    left.set(xlabel="epoch", ylabel="loss (negative log-likelihood)", yscale="log", title="Loss")
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(min([97.4, *test_acc]), 100), title="Accuracy")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    plt.close(fig)
    return fig


def plot_digits(images, titles=None, columns=10):
    """Draw (N, 1, 28, 28) images, normalised or not, in a grid; `titles` are N strings."""
    rows = math.ceil(len(images) / columns) or 1  # without images an empty grid, not an error
    height = 1.45 if titles else 1.0
    fig, grid = plt.subplots(rows, columns, figsize=(columns, rows * height), layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, title in zip(grid.flat, images.cpu().numpy(), titles or [""] * len(images), strict=False):
        axes.imshow(image[0], cmap="gray")
        axes.set_title(title, fontsize=8)
    plt.close(fig)
    return fig


def plot_mistakes(images, outputs, labels, limit=30):
    """Draw the misread of (N, 1, 28, 28) images, the most confident first, under the true and the predicted label and
    its probability; `outputs`, (N, 10) log-probabilities, and `labels`, (N,), are in the images' order."""
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
