"""Networks built from stages."""

from __future__ import annotations

from layerwise_ext.models.build import HEADS
from layerwise_ext.models.resnet import RESNET_CONFIGS, resnet
from layerwise_ext.models.split import split
from layerwise_ext.models.staged import StagedModel
from layerwise_ext.models.summary import Summary, summary
from layerwise_ext.models.vgg import VGG_CONFIGS, cnn, vgg

__all__ = [
    "HEADS",
    "RESNET_CONFIGS",
    "VGG_CONFIGS",
    "StagedModel",
    "Summary",
    "cnn",
    "resnet",
    "split",
    "summary",
    "vgg",
]
