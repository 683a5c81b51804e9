"""Networks built from stages."""

from __future__ import annotations

from layerwise_ext.models.staged import StagedModel
from layerwise_ext.models.vgg import VGG_CONFIGS, VGG_HEADS, vgg

__all__ = ["VGG_CONFIGS", "VGG_HEADS", "StagedModel", "vgg"]
