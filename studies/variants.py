"""The variants of our recipe that studies/accuracy.py trains.

A variant is an arm with a name, as in experiment.ipynb: a recipe, and a class or a `partial` that makes a network. A
lambda cannot be sent to another process. studies/README.md explains the splits `60k/test` and `50k/10k`.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision import transforms

from s6.model import ConvBlock, Net
from s6.utils import Recipe


class NoAugmentation(Recipe):
    def augment(self, images, draws):
        return images


class ConstantRate(Recipe):
    def scheduler(self, optimizer, steps_per_epoch):
        return LambdaLR(optimizer, lambda step: 1.0)


class NoAverage(Recipe):
    def averaged(self, model):
        return None


class CourseSteps(NoAverage):
    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), self.lr, self.momentum, fused=True)

    def scheduler(self, optimizer, steps_per_epoch):
        return LambdaLR(optimizer, lambda step: 1.0 if step < 15 * steps_per_epoch else 0.1)


COURSE_TRANSFORMS = [  # of PIL images
    transforms.RandomApply([transforms.CenterCrop(22)], p=0.1),
    transforms.Resize((28, 28)),
    transforms.RandomRotation((-15.0, 15.0), fill=0),
]


class Course(CourseSteps):
    def augment(self, images, draws):
        transform = transforms.Compose([transforms.ToPILImage(), *COURSE_TRANSFORMS, transforms.PILToTensor()])
        return torch.stack([transform(image) for image in images.byte().cpu()]).to(images)


# ---------------------------------------------------------------------------------------------------------- networks

BLOCKS = 0, 1, 2, 4, 5, 6, 7, 8  # places of the blocks in `Net.layers`


class CourseNet(Net):
    def __init__(self, dropout=0.0):
        super().__init__(dropout)
        for i in BLOCKS:
            block = self.layers[i]
            self.layers[i] = nn.Sequential(block.conv, nn.ReLU(), block.norm, block.dropout)
        self.layers.insert(10, nn.ReLU())  # on the scores


class NoBatchNorm(Net):
    def __init__(self):
        super().__init__()
        for i in BLOCKS:
            self.layers[i].norm = nn.Identity()
            nn.init.kaiming_normal_(self.layers[i].conv.weight)  # He et al., 2015. With torch's own, nothing is learned
            nn.init.zeros_(self.layers[i].conv.bias)


class NoTransition(Net):
    def __init__(self):
        super().__init__()
        self.layers[5] = ConvBlock(16, 12, 3)  # takes all 16 channels
        del self.layers[4]


class LinearLayer(Net):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*self.layers[:-2], nn.Flatten(), nn.Linear(16 * 3 * 3, 10))


class EarlyPooling(Net):
    def __init__(self):
        super().__init__()
        self.layers[2], self.layers[3] = self.layers[3], self.layers[2]
        self.layers[-1] = nn.AvgPool2d(2)


# ---------------------------------------------------------------------------------------------------------- variants

OURS = {"ours": (Recipe(), Net)}
RELU = partial(Net, activation=F.relu)
ABLATION = {  # "no moving average" needs no trainings: rows also have the accuracies without it
    "no augmentation": (NoAugmentation(), Net),
    "ReLU instead of SiLU": (Recipe(), RELU),
    "no BatchNorm, He's first weights, a quarter of the rate": (Recipe(lr=0.05), NoBatchNorm),
    "constant rate": (ConstantRate(), Net),
    "no 1×1 transition": (Recipe(), NoTransition),
    "linear layer instead of the global average": (Recipe(), LinearLayer),
    "pooling one block earlier": (Recipe(), EarlyPooling),
    "dropout 0.05": (Recipe(), partial(Net, dropout=0.05)),
}
COURSE, COURSE_NET = {"lr": 0.01, "batch_size": 512}, partial(CourseNet, dropout=0.005)
LADDER = {  # from the course's recipe to ours
    "the course's recipe": (Course(**COURSE), COURSE_NET),
    "affine augmentation": (CourseSteps(**COURSE), COURSE_NET),
    "no dropout": (CourseSteps(**COURSE), CourseNet),
    "BatchNorm before ReLU, no ReLU on the scores": (CourseSteps(**COURSE), RELU),
    "one-cycle up to 0.2, Nesterov, weight decay": (NoAverage(batch_size=512), RELU),
    "ReLU instead of SiLU": (Recipe(), RELU),
}
WIDTHS = {
    f"{width:g} of the channels": (Recipe(), partial(Net, width=width))
    for width in (0.375, 0.5, 0.625, 0.75, 0.875, 1.25, 1.375)
}
NEXT = {  # the course's next assignment: fewer than 8,000 parameters, at most 15 epochs
    f"{width:g} of the channels, 15 epochs": (Recipe(epochs=15), partial(Net, width=width)) for width in (0.75, 0.875)
}
STUDIES = {
    "report": ("60k/test", OURS),
    "ablation": ("60k/test", OURS | ABLATION),
    "ladder": ("60k/test", LADDER | OURS),
    "widths": ("60k/test", OURS | WIDTHS),
    "next": ("60k/test", NEXT),
    "choosing": ("50k/10k", OURS),
}


def changes(recipe, network):
    """Return how an arm differs from `(Recipe(), Net)`, as text."""
    network = partial(network)  # partial(partial(Net, width=2)) has func=Net and keywords={"width": 2}, too
    names = [part.__name__ for part in (type(recipe), network.func) if part not in (Recipe, Net)]
    numbers = {name: value for name, value in vars(recipe).items() if value != getattr(Recipe, name, None)}
    given = (numbers | network.keywords).items()
    return ", ".join(names + [f"{name}={getattr(value, '__name__', value)}" for name, value in given])
