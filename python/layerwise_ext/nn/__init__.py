"""Layers, local heads and stages."""

from __future__ import annotations

from layerwise_ext.nn.contrastive import ContrastiveHead
from layerwise_ext.nn.conv import ConvBNReLU2d
from layerwise_ext.nn.goodness import GoodnessHead
from layerwise_ext.nn.heads import ClassifierHead, FunctionHead, HeadOutput, LocalHead, PooledLinearHead
from layerwise_ext.nn.moments import PooledMoments
from layerwise_ext.nn.similarity import PredSimHead, SimilarityHead
from layerwise_ext.nn.stage import LocalStage, StageOutput

__all__ = [
    "ClassifierHead",
    "ContrastiveHead",
    "ConvBNReLU2d",
    "FunctionHead",
    "GoodnessHead",
    "HeadOutput",
    "LocalHead",
    "LocalStage",
    "PooledLinearHead",
    "PooledMoments",
    "PredSimHead",
    "SimilarityHead",
    "StageOutput",
]
