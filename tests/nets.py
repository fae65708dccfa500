"""Small networks for tests of capture, quantization and export."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Convolutions with batch norms, an in-place ReLU, a residual sum, pooling and a classifier."""

    def __init__(self, classes: int = 4, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        x = F.max_pool2d(x, 2)
        return self.fc(self.drop(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))


class Branches(nn.Module):
    """A depthwise convolution, ReLU6, a concatenation and a float island (SiLU)."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.left = nn.Conv2d(8, 8, 1)
        self.right = nn.Conv2d(8, 4, 1)
        self.head = nn.Conv2d(12, 8, 1)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.depthwise(F.relu6(self.stem(x))))
        x = F.silu(self.head(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], dim=1)))
        return self.fc(x.mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers on 3-D inputs with a layer norm and GELU, as in a transformer's MLP."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.fc(x.mean(1))


class Picky(nn.Module):
    """Chooses its path by the data: cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.fc(x)
        return -self.fc(x)


def trained_like(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms statistics and scales such as training leaves."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in ((module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2.0)):
                value.copy_(torch.rand(value.shape, generator=generator) * (high - low) + low)
            with torch.no_grad():
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
    return model.eval()


def residual(seed: int = 0) -> nn.Module:
    """A seeded ``Residual`` in eval mode."""
    torch.manual_seed(seed)
    return trained_like(Residual(), seed)


def branches(seed: int = 0) -> nn.Module:
    """A seeded ``Branches`` in eval mode."""
    torch.manual_seed(seed)
    return Branches().eval()


def tokens(seed: int = 0) -> nn.Module:
    """A seeded ``Tokens`` in eval mode, for inputs (N, 12, 4, 4)."""
    torch.manual_seed(seed)
    return Tokens().eval()


def images(n: int = 8, size: int = 16, channels: int = 3, seed: int = 1) -> Tensor:
    """Seeded inputs that differ in contrast and colour, as photographs do."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, channels, size, size, generator=generator)
    contrast, colour = torch.rand(n, 1, 1, 1, generator=generator), torch.randn(n, channels, 1, 1, generator=generator)
    return noise * (0.2 + contrast) + colour
