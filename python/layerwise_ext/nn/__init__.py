"""Layers, local heads and stages."""

from __future__ import annotations

from layerwise_ext.nn.chain import FusedChain, Residual
from layerwise_ext.nn.conv import AcceleratedDownsample2d, ConvBNReLU2d, revert_sync_batchnorm
from layerwise_ext.nn.heads import HeadOutput, LocalHead, PooledLinearHead
from layerwise_ext.nn.moments import PooledMoments
from layerwise_ext.nn.stage import LocalStage, StageOutput

__all__ = [
    "AcceleratedDownsample2d",
    "ConvBNReLU2d",
    "FusedChain",
    "HeadOutput",
    "LocalHead",
    "LocalStage",
    "PooledLinearHead",
    "PooledMoments",
    "Residual",
    "StageOutput",
    "revert_sync_batchnorm",
]
