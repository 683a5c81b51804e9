"""Layers, local heads and stages."""

from __future__ import annotations

from layerwise_ext.nn.auxiliary import ConvHead, MLPSRHead
from layerwise_ext.nn.chain import FusedChain, Residual
from layerwise_ext.nn.contrastive import ContrastiveHead
from layerwise_ext.nn.conv import AcceleratedDownsample2d, ConvBNReLU2d, revert_sync_batchnorm
from layerwise_ext.nn.goodness import GoodnessHead, label_goodness, write_labels
from layerwise_ext.nn.heads import (
    ClassifierHead,
    FunctionHead,
    HeadOutput,
    LocalHead,
    ModuleHead,
    PooledLinearHead,
)
from layerwise_ext.nn.infopro import InfoProHead, ReconstructionHead, infopro_weights
from layerwise_ext.nn.moments import PooledMoments
from layerwise_ext.nn.similarity import PredSimHead, SimilarityHead
from layerwise_ext.nn.stage import LocalStage, StageOutput

__all__ = [
    "AcceleratedDownsample2d",
    "ClassifierHead",
    "ContrastiveHead",
    "ConvBNReLU2d",
    "ConvHead",
    "FunctionHead",
    "FusedChain",
    "GoodnessHead",
    "HeadOutput",
    "InfoProHead",
    "LocalHead",
    "LocalStage",
    "MLPSRHead",
    "ModuleHead",
    "PooledLinearHead",
    "PooledMoments",
    "PredSimHead",
    "ReconstructionHead",
    "Residual",
    "SimilarityHead",
    "StageOutput",
    "infopro_weights",
    "label_goodness",
    "revert_sync_batchnorm",
    "write_labels",
]
