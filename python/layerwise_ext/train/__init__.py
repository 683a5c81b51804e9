"""Trainers: all stages at once on their own losses, also in several processes, one stage after another, or jointly."""

from __future__ import annotations

from layerwise_ext.train.autoencoder import AutoencoderPretrainer
from layerwise_ext.train.callbacks import Callback, CSVLogger, TensorBoardLogger
from layerwise_ext.train.common import Trainer
from layerwise_ext.train.decoupled import DecoupledTrainer
from layerwise_ext.train.early_stopping import EarlyStopping
from layerwise_ext.train.forward_forward import LabelledPairs
from layerwise_ext.train.greedy import GreedyTrainer
from layerwise_ext.train.joint import JointTrainer
from layerwise_ext.train.local import LocalTrainer
from layerwise_ext.train.metrics import Record, StepResult
from layerwise_ext.train.replay import ReplayBuffer

__all__ = [
    "AutoencoderPretrainer",
    "CSVLogger",
    "Callback",
    "DecoupledTrainer",
    "EarlyStopping",
    "GreedyTrainer",
    "JointTrainer",
    "LabelledPairs",
    "LocalTrainer",
    "Record",
    "ReplayBuffer",
    "StepResult",
    "TensorBoardLogger",
    "Trainer",
]
