"""The network: nine convolutions, 10,474 parameters, no linear layer."""

import torch.nn as nn
import torch.nn.functional as F


class ConvBlock(nn.Sequential):
    """Convolution, BatchNorm, activation, dropout: (B, in, H, W) to (B, out, H - k + 1, W - k + 1).

    BatchNorm comes before the activation, as in Ioffe and Szegedy, 2015. torchsummary lists neither
    Sequentials nor functions. So its table for this network equals the course's.
    """

    def __init__(self, in_channels, out_channels, kernel_size, dropout, activation):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size),
            nn.BatchNorm2d(out_channels),
            nn.Dropout(dropout),
        )
        self.activation = activation

    def extra_repr(self):  # the printed form tells one network's checkpoint from another's
        return f"activation={getattr(self.activation, '__name__', self.activation)}"

    def forward(self, x):
        conv, norm, dropout, *_ = self  # an activation that is a module is the fourth
        return dropout(self.activation(norm(conv(x))))


class Net(nn.Module):
    """Classify 28 x 28 digits: (B, 1, 28, 28) normalised images to (B, 10) log-probabilities.

    The layers are the course's, with the same number of parameters. The course applies a ReLU
    before each BatchNorm, and another one to the class scores. Here BatchNorm cancels the bias of
    the convolution before it. The biases stay, so that the number of parameters is the course's.

    Args:
        dropout: probability of zeroing an activation. With augmentation none is needed.
        activation: function or module. SiLU is x * sigmoid(x), a ReLU without the corner (Hendrycks
            and Gimpel, 2016).
    """

    def __init__(self, dropout=0.0, activation=F.silu):
        super().__init__()

        def block(in_channels, out_channels, kernel_size=3):
            return ConvBlock(in_channels, out_channels, kernel_size, dropout, activation)

        # Beside each layer: the size of its maps, and its receptive field (how many input pixels,
        # across, one output sees). A 3 x 3 kernel adds 2 pixels before the pooling, 4 after it.
        self.layers = nn.Sequential(
            block(1, 8),  # 26 x 26, sees 3
            block(8, 12),  # 24 x 24, sees 5
            block(12, 16),  # 22 x 22, sees 7
            nn.MaxPool2d(2),  # 11 x 11, sees 8: a quarter of the work from here on
            block(16, 8, kernel_size=1),  # 11 x 11, sees 8: half the channels, for 136 parameters
            block(8, 12),  # 9 x 9, sees 12
            block(12, 16),  # 7 x 7, sees 16
            block(16, 16),  # 5 x 5, sees 20
            block(16, 16),  # 3 x 3, sees 24
            nn.Conv2d(16, 10, 1),  # 3 x 3, sees 24: a score for each class at each of nine places
            # ceil_mode: if a block is added, this is the mean of the places that are left.
            nn.AvgPool2d(3, ceil_mode=True),  # 1 x 1, sees 28, all: the mean of the nine scores
        )

    def forward(self, images):
        """Return (B, 10) log-probabilities; raise ValueError unless `images` is (B, 1, 28, 28)."""
        if images.ndim != 4 or images.shape[1:] != (1, 28, 28):
            raise ValueError(f"Net needs images of shape (B, 1, 28, 28), got {tuple(images.shape)}")
        scores = self.layers(images)
        if scores.shape[2:].numel() > 1:  # after a change of the blocks
            raise ValueError("AvgPool2d leaves more than one place: give it the last map's size")
        return F.log_softmax(scores.flatten(1), dim=1)
