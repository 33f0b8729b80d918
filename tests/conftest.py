import os
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported: no bars among the tests' output

import matplotlib.font_manager  # noqa: F401  on a new machine this builds a cache, and says so on stderr: not in a cell
import pytest
import torch

from s6.utils import Loader, load_mnist, test

test.__test__ = False  # a function of the product, whatever its name
torch.set_num_threads(1)  # for batches as small as the tests', a second thread costs more than it gives
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def mnist():
    """The training set, from the folder that the notebook uses too: downloaded once, by whichever comes first."""
    return load_mnist(ROOT / "data")


@pytest.fixture
def batches():
    """A loader of 70 random images in batches of 16, the last one of 6, in an order that stays."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (70, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return Loader(images, torch.randint(10, (70,), generator=generator), batch_size=16)
