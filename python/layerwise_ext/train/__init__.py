"""Trainers: all stages at once on their own losses, one stage after another, or jointly."""

from __future__ import annotations

from layerwise_ext.train.callbacks import Callback, CSVLogger, TensorBoardLogger
from layerwise_ext.train.common import Trainer
from layerwise_ext.train.early_stopping import EarlyStopping
from layerwise_ext.train.greedy import GreedyTrainer
from layerwise_ext.train.joint import JointTrainer
from layerwise_ext.train.local import LocalTrainer
from layerwise_ext.train.metrics import Record, StepResult

__all__ = [
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "GreedyTrainer",
    "JointTrainer",
    "LocalTrainer",
    "Record",
    "StepResult",
    "TensorBoardLogger",
    "Trainer",
]
