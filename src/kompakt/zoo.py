"""Small reference networks of the compression literature, as ``kompakt.zoo:resnet20`` and so on."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut that has no parameters (option A of He et al. 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.pad = ((channels - channels_in) // 2, (channels - channels_in + 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×C×H×W to N×channels×H/stride×W/stride."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Take every ``stride``-th pixel and add channels of zeros on both sides."""
        if self.stride == 1 and self.pad == (0, 0):
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.pad))


class CifarResNet(nn.Module):
    """CIFAR ResNet-(6n+2) (He, Zhang, Ren, Sun 2016, arXiv 1512.03385, §4.2).

    Args:
        blocks: n, the blocks of each of the three stages; 3 for ResNet-20.
        num_classes: number of outputs.
        width: channels of the first stage; the next two have twice and four times as many.
    """

    def __init__(self, blocks: int, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map N×3×32×32 to N×num_classes."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.linear(torch.flatten(x, 1))


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """One stage: the first block changes the size, the others keep it."""
    first = BasicBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def resnet20(num_classes: int = 10, width: int = 16) -> CifarResNet:
    """Build the CIFAR ResNet-20 (0.27 M parameters at width 16)."""
    return CifarResNet(3, num_classes, width)


def resnet32(num_classes: int = 10, width: int = 16) -> CifarResNet:
    """Build the CIFAR ResNet-32 (0.46 M parameters at width 16)."""
    return CifarResNet(5, num_classes, width)


def resnet56(num_classes: int = 10, width: int = 16) -> CifarResNet:
    """Build the CIFAR ResNet-56 (0.85 M parameters at width 16)."""
    return CifarResNet(9, num_classes, width)


class LeNet300(nn.Module):
    """LeNet-300-100 (LeCun et al. 1998): three linear maps on 28×28 grey images."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×1×28×28 to N×num_classes."""
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc3(F.relu(self.fc2(x)))


class LeNet5(nn.Module):
    """LeNet-5 as Caffe has it and Deep Compression uses it (Han, Mao, Dally 2016, arXiv 1510.00149)."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×1×28×28 to N×num_classes; as in Caffe, only the first linear map has a ReLU."""
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


def lenet300(num_classes: int = 10) -> LeNet300:
    """Build LeNet-300-100 (0.27 M parameters)."""
    return LeNet300(num_classes)


def lenet5(num_classes: int = 10) -> LeNet5:
    """Build LeNet-5 (0.43 M parameters)."""
    return LeNet5(num_classes)
