"""Trainers: all stages at once on their own losses, also in several processes, one stage after another, or jointly."""

from __future__ import annotations

from layerwise_ext.train.common import Record, StepResult, Trainer
from layerwise_ext.train.decoupled import DecoupledTrainer
from layerwise_ext.train.greedy import GreedyTrainer
from layerwise_ext.train.joint import JointTrainer
from layerwise_ext.train.local import LocalTrainer
from layerwise_ext.train.replay import ReplayBuffer

__all__ = [
    "DecoupledTrainer",
    "GreedyTrainer",
    "JointTrainer",
    "LocalTrainer",
    "Record",
    "ReplayBuffer",
    "StepResult",
    "Trainer",
]
