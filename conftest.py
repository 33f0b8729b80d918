import base64
import fcntl
import json
import os
import re
from pathlib import Path

# The user's own settings of matplotlib and IPython change outputs of the notebooks.
os.environ |= {"MATPLOTLIBRC": os.devnull, "IPYTHONDIR": str(Path(__file__).parent / "build" / "ipython")}
os.environ.pop("MPLBACKEND", None)
os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported: no bars among the tests' output

import matplotlib.pyplot as plt  # on a new machine this builds a cache, and says so on stderr: not in a cell
import nbformat
import pytest
import torch
import torch.nn.functional as F

from s6 import utils
from s6.model import Net
from s6.utils import Loader, load_mnist, test

test.__test__ = False  # a function of the product, whatever its name
torch.set_num_threads(1)  # for batches as small as the tests', a second thread costs more than it gives
ROOT = Path(__file__).parent
NAMES = ("S6", "experiment", "ablation")
NOTEBOOKS = {name: nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4) for name in NAMES}
CODE = {name: [cell for cell in NOTEBOOKS[name].cells if cell.cell_type == "code"] for name in NAMES}


def pytest_sessionstart(session):
    if session.config.option.nbval:  # S6.ipynb writes S6.pt and reads it again. A second run in this folder waits
        (ROOT / "build").mkdir(exist_ok=True)
        session.lock = open(ROOT / "build" / "lock", "w", encoding="utf-8")
        fcntl.flock(session.lock, fcntl.LOCK_EX)


def pytest_collectstart(collector):
    if collector.path.suffix == ".ipynb":
        collector.skip_compare += ("stderr",)  # a library may warn, such as torch about an old driver


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def run_training_cell(names):
    """Run the cell of S6.ipynb that trains, over `names` and those of utils.py; what it leaves is in `names`, too."""
    [cell] = [cell for cell in CODE["S6"] if "\nfor epoch in range(" in cell.source]
    names |= vars(utils) | {"torch": torch, "device": torch.device("cpu"), "Net": Net, "F": F} | names
    exec(cell.source, names)


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="session")
def mnist():
    """The training set, from the folder that the notebook uses too: downloaded once, by whichever comes first."""
    return load_mnist(ROOT / "data")


def random_images(count):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return images, torch.randint(10, (count,), generator=generator)


@pytest.fixture
def batches():
    """A loader of 70 random images in batches of 16, the last one of 6, in an order that stays."""
    return Loader(*random_images(70), batch_size=16)


def network_in(text):
    """The network in weights.js. Its BatchNorms have no effect, because they are in the convolutions."""
    constants = {name: json.loads(value) for name, value in re.findall("const ([A-Z]+) = (.*);\n", text)}
    weights = torch.frombuffer(bytearray(base64.b64decode(constants["WEIGHTS"])), dtype=torch.float32)
    assert (constants["ACTIVATION"], len(constants)) == ("silu", 3)
    net = Net()
    convolutions = [module for module in net.modules() if isinstance(module, torch.nn.Conv2d)]
    shapes = [list(conv.weight.shape)[:3] for conv in convolutions]
    assert constants["LAYERS"] == [*shapes[:3], 2, *shapes[3:]]
    parts = [part for conv in convolutions for part in conv.parameters()]
    assert len(weights) == sum(part.numel() for part in parts)
    torch.nn.utils.vector_to_parameters(weights, parts)
    for norm in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.running_var.fill_(1 - norm.eps)
    return net.eval()


@pytest.fixture(scope="session")
def network():
    """The trained network of the drawing page. Its BatchNorms are folded into the convolutions."""
    return network_in((ROOT / "docs" / "weights.js").read_text(encoding="utf-8"))
