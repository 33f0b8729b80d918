"""Export the trained network to ONNX and to `torch.export`. Compare both with the network on the test images.

    make .venv/extras                      # installs what this needs
    .venv/bin/python studies/export.py     # reads S6.pt, writes build/S6.onnx and build/S6.pt2

Both take "images", (B, 1, 28, 28) float32 of any B, and return log-probabilities, (B, 10). Normalise each pixel first,
as (pixel / 255 - 0.1307) / 0.3081.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from s6.utils import Recipe, predict
from studies.common import ROOT, loaders, trained


def export(model, folder):
    """Write `S6.onnx` and `S6.pt2` into `folder`. Return `{path: function of a batch of images}`."""
    import onnxruntime

    folder.mkdir(exist_ok=True)
    pt2, onnx = folder / "S6.pt2", folder / "S6.onnx"
    # Two images, because with one the exporters fix the batch size to 1.
    program = torch.export.export(model, (torch.zeros(2, 1, 28, 28),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, pt2)
    torch.onnx.export(program, (), str(onnx), input_names=["images"], external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    loaded = torch.export.load(pt2).module()
    return {onnx: lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), pt2: loaded}


def main(images=None):
    model, (_, loader) = trained(), loaders(Recipe(), torch.device("cpu"), "60k/test", images)
    expected, _ = predict(model, "cpu", loader)
    for path, exported in export(model, ROOT / "build").items():
        with torch.no_grad():
            outputs = torch.cat([exported(images) for images, _ in loader])
        torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-4)
        print(
            f"{path.name}: {path.stat().st_size:,} bytes; its log-probabilities of {len(expected):,} images are within "
            f"{(outputs - expected).abs().max():.1e} of the network's"
        )


if __name__ == "__main__":
    main()
