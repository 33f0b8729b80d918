"""The network: 10,474 parameters, nine convolutions and no linear layer."""

import torch.nn as nn
import torch.nn.functional as F


class ConvBlock(nn.Sequential):
    """Convolution, batch normalisation, SiLU, dropout: (B, in, H, W) to (B, out, H - k + 1, W - k + 1).

    The activation comes after the normalisation, as in Ioffe and Szegedy, "Batch Normalization", 2015. SiLU, x times
    sigmoid(x), is a ReLU without the corner (Hendrycks and Gimpel, 2016). It is a function and not a module, and the
    block a Sequential, so that torchsummary, which lists every module but Sequentials, prints the very table of the
    course's network.
    """

    def __init__(self, in_channels, out_channels, kernel_size, dropout):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size),
            nn.BatchNorm2d(out_channels),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        conv, norm, dropout = self
        return dropout(F.silu(norm(conv(x))))


class Net(nn.Module):
    """Classify 28 x 28 digits: (B, 1, 28, 28) normalised images to (B, 10) log-probabilities.

    The layers are those of the course's network, to the parameter. There the activation is a ReLU, ahead of the
    normalisation, and one more on the class scores. Here the biases ahead of a BatchNorm have no effect; they are kept
    for the count.

    Args:
        dropout: probability of zeroing an activation after each block; beside the augmentation none is needed.
    """

    def __init__(self, dropout=0.0):
        super().__init__()
        # Beside each layer: the resolution after it, and the receptive field (how many input pixels, across, one
        # output sees). A 3 x 3 layer adds 2 to the field before the pooling and, at half the resolution, 4 after it.
        self.layers = nn.Sequential(
            ConvBlock(1, 8, 3, dropout),  # 26 x 26, sees 3
            ConvBlock(8, 12, 3, dropout),  # 24 x 24, sees 5
            ConvBlock(12, 16, 3, dropout),  # 22 x 22, sees 7
            nn.MaxPool2d(2),  # 11 x 11, sees 8: a quarter of the work from here on
            ConvBlock(16, 8, 1, dropout),  # 11 x 11, sees 8: half the channels, for 136 parameters
            ConvBlock(8, 12, 3, dropout),  # 9 x 9, sees 12
            ConvBlock(12, 16, 3, dropout),  # 7 x 7, sees 16
            ConvBlock(16, 16, 3, dropout),  # 5 x 5, sees 20
            ConvBlock(16, 16, 3, dropout),  # 3 x 3, sees 24
            nn.Conv2d(16, 10, 1),  # 3 x 3, sees 24: a score for each class at each of nine places
            nn.AvgPool2d(3),  # 1 x 1, sees 28, the whole image: the mean of the nine scores
        )

    def forward(self, images):
        """Return (B, 10) log-probabilities; raise ValueError unless `images` is (B, 1, 28, 28)."""
        if images.ndim != 4 or images.shape[1:] != (1, 28, 28):
            raise ValueError(f"Net expects images of shape (B, 1, 28, 28), got {tuple(images.shape)}")
        scores = self.layers(images).flatten(1).float()  # bfloat16, where autocast, keeps about three digits
        return F.log_softmax(scores, dim=1)
