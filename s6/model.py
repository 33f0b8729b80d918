"""The network: nine convolutions, 10,474 parameters, no linear layer."""

import torch.nn as nn
import torch.nn.functional as F


class ConvBlock(nn.Sequential):
    """Apply convolution, BatchNorm, activation, dropout. Maps become smaller by kernel_size - 1.

    A map is one of the images that a convolution makes. A layer with 8 channels makes 8 maps.
    BatchNorm shifts and scales each map, so that over a batch its pixels have mean 0 and standard
    deviation 1. Then it applies a learned factor and offset. It comes before the activation, as in
    Ioffe and Szegedy, 2015.
    The block is a Sequential, because torchsummary lists only the layers inside of one.
    """

    def __init__(self, in_channels, out_channels, kernel_size, dropout=0.0, activation=F.silu):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size)
        self.norm = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation

    def forward(self, x):
        return self.dropout(self.activation(self.norm(self.conv(x))))

    def extra_repr(self):  # print(model) shows this
        return f"activation={getattr(self.activation, '__name__', self.activation)}"


class Net(nn.Module):
    """Classify digits: return (B, 10) log-probabilities of normalised images, (B, 1, 28, 28).

    The convolutions and the number of parameters are the course's. There, ReLU comes before
    BatchNorm, and another ReLU follows the last convolution. The biases of the blocks do nothing,
    because BatchNorm subtracts the mean. We keep them, because the course's network has them.

    Args:
        dropout: probability that a value becomes zero in training. With 0, dropout does nothing.
        activation: function or module. SiLU, x * sigmoid(x), is a smooth ReLU (Hendrycks and
            Gimpel, 2016).
        width: factor for the number of channels of each block. Each has at least one channel.

    Raises ValueError for images of another shape.
    """

    def __init__(self, dropout=0.0, activation=F.silu, width=1.0):
        super().__init__()

        def block(in_channels, out_channels, kernel_size=3):
            return ConvBlock(in_channels, out_channels, kernel_size, dropout, activation)

        c8, c12, c16 = (max(1, int(width * channels)) for channels in (8, 12, 16))

        # The comments give the size of the maps and the receptive field: each pixel of a map "sees"
        # this many pixels of the image, in width and in height. A 3 x 3 kernel adds 2. The pooling
        # adds 1. After it, a 3 x 3 kernel adds 4: neighbours are then 2 image pixels apart.
        self.layers = nn.Sequential(
            block(1, c8),  # 26 x 26, sees 3
            block(c8, c12),  # 24 x 24, sees 5
            block(c12, c16),  # 22 x 22, sees 7
            nn.MaxPool2d(2),  # 11 x 11, sees 8: a fourth of the pixels, so less work
            block(c16, c8, kernel_size=1),  # 11 x 11, sees 8: half the channels
            block(c8, c12),  # 9 x 9, sees 12
            block(c12, c16),  # 7 x 7, sees 16
            block(c16, c16),  # 5 x 5, sees 20
            block(c16, c16),  # 3 x 3, sees 24
            nn.Conv2d(c16, 10, 1),  # 3 x 3, sees 24: each of nine places gets ten scores
            # If you add a block, the map is smaller. ceil_mode then takes the mean of all of it.
            nn.AvgPool2d(3, ceil_mode=True),  # 1 x 1, sees 28: the mean of the nine places
        )

    def forward(self, images):
        if images.ndim != 4 or images.shape[1:] != (1, 28, 28):
            raise ValueError(f"Net needs images of shape (B, 1, 28, 28), got {tuple(images.shape)}")
        scores = self.layers(images)
        if scores.shape[2:].numel() > 1:  # if a block was removed
            raise ValueError("AvgPool2d leaves several places: give it the size of the last map")
        return F.log_softmax(scores.flatten(1), dim=1)
