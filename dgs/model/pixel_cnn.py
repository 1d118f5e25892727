"""A small convolutional network from scratch, on pixels and what a blur leaves of them: what is told without a CLIP.

As `pixel_cnn` it is a method of the registry, and as `tiny_cnn` what the audit of the embedded benchmark asks whether
fakes leave traces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgs.model.classifier import OwnModel

if TYPE_CHECKING:
    import onnx

    from dgs.model.onnx_graph import Linear

CHANNELS = (12, 24, 32, 32)


def planes(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 6, H, W): the pixels, and what a 3x3 mean leaves of them.

    On pixels alone such a network stays at chance for its few epochs: content outweighs grain by far. Memory is laid
    out channels last: with so few of them, a CPU's convolutions take two thirds to three quarters of the time.
    """
    values = images.float()
    soft = F.avg_pool2d(F.pad(values, (1, 1, 1, 1), mode="reflect"), 3, 1)
    both = torch.cat([(values - 128) / 64, ((values - soft) / 8).clamp(-3, 3)], 1)
    return both.contiguous(memory_format=torch.channels_last)


class PixelCNN(OwnModel):
    """Four 3x3 convolutions with BatchNorm, the first at full size, then the mean, and a linear head: 20,000 numbers.

    Differs from the other methods: it knows nothing but the training images, sees no caption, and is trained in one
    stage. Its pixels are not normalised by any CLIP's constants.
    """

    kind = "pixel_cnn"
    rates = (2e-3, 5e-3, 1e-2)
    epochs = (6, 12)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for depth, (a, b) in enumerate(zip((6, *CHANNELS[:-1]), CHANNELS, strict=True)):
            stride = 2 if depth else 1
            layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(CHANNELS[-1], 1)

    @property
    def width(self) -> int:
        """As `Classifier.width`."""
        return CHANNELS[-1]

    def features(self, images: Tensor) -> Tensor:
        """As `Classifier.features`."""
        return cast(Tensor, self.body(planes(images)).mean((2, 3)))

    def decide(self, features: Tensor) -> Tensor:
        """As `Classifier.decide`."""
        return cast(Tensor, self.head(features).squeeze(1))

    def onnx(self, side: int, linear: Linear) -> onnx.ModelProto:
        """As `Classifier.onnx`."""
        from dgs.model.onnx_graph import Graph, float_linear, model_of, numbers, pixels_of

        graph = Graph()
        pixels = pixels_of(graph)
        padded = graph.op("Pad", pixels, np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64), mode="reflect")
        soft = graph.op("AveragePool", padded, kernel_shape=[3, 3])
        fine = graph.op("Div", graph.op("Sub", pixels, soft), np.array(8, np.float32))
        plain = graph.op("Div", graph.op("Sub", pixels, np.array(128, np.float32)), np.array(64, np.float32))
        ends = np.array(-3, np.float32), np.array(3, np.float32)
        x = graph.op("Concat", plain, graph.op("Clip", fine, *ends), axis=1)
        layers = list(self.body)
        for conv, norm in zip(layers[::3], layers[1::3], strict=True):
            assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None and norm.running_var is not None
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
            x = graph.op("Conv", x, numbers(weight), numbers(bias), strides=conv.stride, pads=[1, 1, 1, 1])
            x = graph.op("Relu", x)
        features = graph.op("ReduceMean", x, np.array([2, 3], np.int64), keepdims=0)
        logits = float_linear(graph, features, numbers(self.head.weight), numbers(self.head.bias), 0)
        return model_of(graph, logits, side)
