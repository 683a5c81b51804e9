"""Stage-local and joint training of convolutional networks, with fused convolution + batch norm + activation + moments.

    import layerwise_ext as lw

    stage = lw.nn.LocalStage(lw.nn.ConvBNReLU2d(3, 64, 3, padding=1), lw.nn.PooledLinearHead(64, 10))
    features, loss, logits = stage(images, target)
    loss.backward()

See :mod:`layerwise_ext.nn` (layers), :mod:`layerwise_ext.functional` (operators), :mod:`layerwise_ext.models`,
:mod:`layerwise_ext.init`, :mod:`layerwise_ext.probe`, :mod:`layerwise_ext.train` (trainers) and
:mod:`layerwise_ext.data`.
"""

from __future__ import annotations

__version__ = "0.1.0"

from layerwise_ext import _flops as _flops
from layerwise_ext import autotune, checkpoint, data, functional, init, models, nn, probe, train
from layerwise_ext._ops import cache_limit, cached_bytes, empty_cache, set_cache_limit
from layerwise_ext.fuse import FuseReport, fuse_, unfuse_

__all__ = [
    "FuseReport",
    "__version__",
    "autotune",
    "cache_limit",
    "cached_bytes",
    "checkpoint",
    "data",
    "empty_cache",
    "functional",
    "fuse_",
    "init",
    "models",
    "nn",
    "probe",
    "set_cache_limit",
    "train",
    "unfuse_",
]
