"""Export the trained network to ONNX and to `torch.export`. Compare both with the network on the test images.

    make .venv/extras                      # installs what this needs
    .venv/bin/python studies/export.py     # reads S6.pt, writes build/S6.onnx and build/S6.pt2

Both exports take "images", (B, 1, 28, 28) float32, and return log-probabilities, (B, 10). Normalise each pixel first,
as (pixel / 255 - 0.1307) / 0.3081.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from s6.utils import Recipe, mnist_loaders, predict
from studies.common import DATA, ROOT, trained

TOLERANCE = 1e-4  # of log-probabilities: exports may sum in another order


def export(model, folder):
    """Write `S6.onnx` and `S6.pt2` into `folder`. Return `{path: function of a batch of images}`."""
    import onnxruntime

    # Two images, because with one the exporters fix the batch size to 1.
    example = torch.zeros(2, 1, 28, 28)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    pt2, onnx = folder / "S6.pt2", folder / "S6.onnx"
    torch.export.save(program, pt2)
    names = {"input_names": ["images"], "output_names": ["log_probabilities"]}
    torch.onnx.export(program, (), str(onnx), **names, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    loaded = torch.export.load(pt2).module()
    return {onnx: lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), pt2: loaded}


def compare(model, exported, loader):
    """Return the largest difference of a log-probability, and how many labels differ."""
    expected, _ = predict(model, "cpu", loader)
    with torch.no_grad():
        outputs = torch.cat([exported(images) for images, _ in loader])
    return (outputs - expected).abs().max().item(), (outputs.argmax(1) != expected.argmax(1)).sum().item()


def main():
    model, folder = trained(), ROOT / "build"
    folder.mkdir(exist_ok=True)
    _, loader = mnist_loaders(Recipe(), "cpu", DATA)
    for path, exported in export(model, folder).items():
        difference, other = compare(model, exported, loader)
        print(
            f"{path.name}: {path.stat().st_size:,} bytes; {len(loader.labels):,} images, log-probabilities differ by "
            f"{difference:.1e} at most, {other} labels differ"
        )
        if other or not difference <= TOLERANCE:
            sys.exit("This export does not compute what the network computes.")


if __name__ == "__main__":
    main()
