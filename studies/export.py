"""Export the trained network to ONNX and to `torch.export`, and compare both with it on the 10,000 test images.

    .venv/bin/python -m pip install --requirement studies/requirements.txt
    .venv/bin/python studies/export.py                 # checkpoints/S6.pt to build/S6.onnx and build/S6.pt2

Both take "images", normalised float32 of shape (B, 1, 28, 28) with any B, as `Net` does, and give log-probabilities,
(B, 10). A normalised pixel is (pixel / 255 - 0.1307) / 0.3081.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from s6.model import Net
from s6.utils import load_averaged, mnist_loaders, predict

TOLERANCE = 1e-4  # of a log-probability: the order of the additions may differ, the arithmetic may not


def export(model, folder):
    """Write `S6.onnx` and `S6.pt2` into `folder`; return `{path: function}` with what runs them, on batches of images.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
    """
    import onnxruntime

    # Two images, not one: of one, the exporters would take the size of the batch for a constant.
    example = torch.zeros(2, 1, 28, 28)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    pt2, onnx = folder / "S6.pt2", folder / "S6.onnx"
    torch.export.save(program, pt2)
    torch.onnx.export(
        program, (), str(onnx), input_names=["images"], output_names=["log_probabilities"],
        external_data=False, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    loaded = torch.export.load(pt2).module()
    return {
        onnx: lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]),
        pt2: loaded,
    }


def compare(model, exported, loader):
    """Return `(difference, other)` over all images: the largest of a log-probability, and how many labels differ."""
    expected, _ = predict(model, "cpu", loader)
    with torch.no_grad():
        outputs = torch.cat([exported(images) for images, _ in loader])
    return (outputs - expected).abs().max().item(), (outputs.argmax(1) != expected.argmax(1)).sum().item()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=ROOT / "checkpoints" / "S6.pt", help="of a finished training")
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="to write into")
    parser.add_argument("--data", default=ROOT / "data", help="folder of the images")
    options = parser.parse_args(arguments)
    try:
        model = load_averaged(Net(), options.checkpoint)
    except (OSError, ValueError) as error:
        sys.exit(f"{error}. Train first: make run")
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        runners = export(model, options.folder)
    except ImportError as error:
        sys.exit(f"{error}: .venv/bin/python -m pip install --requirement studies/requirements.txt")
    _, loader = mnist_loaders(options.data, device="cpu")
    failed = False
    for path, runner in runners.items():
        difference, other = compare(model, runner, loader)
        failed |= bool(other) or not difference <= TOLERANCE
        print(
            f"{path.name}: {path.stat().st_size:,} bytes; {len(loader.labels):,} images, log-probabilities differ by "
            f"{difference:.1e} at most, {other} labels differ"
        )
    if failed:
        sys.exit("An export does not compute what the network computes.")


if __name__ == "__main__":
    main()
