"""What all trainers share: the loop over epochs and the step of an optimiser."""

from __future__ import annotations

import logging
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from layerwise_ext import _graphs
from layerwise_ext.nn import LocalStage
from layerwise_ext.nn.goodness import label_classes
from layerwise_ext.train import optimizers, precision, random_state
from layerwise_ext.train.callbacks import Callback, FunctionCallback
from layerwise_ext.train.early_stopping import EarlyStopping, Watch
from layerwise_ext.train.ema import AveragedStage
from layerwise_ext.train.evaluation import Batches, Evaluator
from layerwise_ext.train.metrics import Metrics, Record, StepResult, collapses, step_result, summary
from layerwise_ext.train.optimizers import OptimizerFactory, SchedulerFactory
from layerwise_ext.train.replicas import ReplicaGroup
from layerwise_ext.train.resumable import Resumable

logger = logging.getLogger(__name__)

# Seconds between two readings of the running loss for the progress bar; each one waits for the device.
_PROGRESS_INTERVAL = 2.0


class Trainer(Resumable, Evaluator):
    """Base class of the trainers; a subclass says which parameters share an optimiser and what a step is.

    The log warns of losses that are not finite, and once when a stage collapses: when its training accuracy falls below
    half of what its best one was above chance.

    Args:
        stages: a :class:`~layerwise_ext.models.StagedModel` or a list of :class:`~layerwise_ext.nn.LocalStage`; the
            last one's head is the network's output. They are trained in place.
        optimizer: makes an optimiser from a list of parameters, or a sequence of such functions; one for each group of
            parameters that are updated together: all of them in joint training, those of a stage otherwise.
        scheduler: makes a learning-rate scheduler from an optimiser, a sequence of such functions, one for each
            optimiser, or None; stepped once per epoch of that optimiser.
        device: where the stages are moved and the batches are sent; None: where the stages are.
        autocast_dtype: torch.bfloat16 or torch.float16 runs the forward passes under autocast; None: in the stages' own
            dtype. With float16 each loss is scaled by a :class:`torch.amp.GradScaler` of its own, which waits for the
            device once per step of an optimiser and skips those with gradients that are not finite.
        seed: of the trainer's own generator, which only shuffles cached data; None: torch's initial seed. Parameters
            and the global generator are left as they are.
        progress: show a progress bar.
        channels_last: keep parameters and batches in torch.channels_last.
        cuda_graph: run steps as a CUDA graph, for networks so small that launching kernels is what takes the time. The
            whole step, optimisers included (they are made ``capturable``), is captured at the fourth batch of one shape
            in a row, and again when a hyperparameter has changed; other batches, such as a last smaller one, run kernel
            by kernel. The stages must not wait for the device.
        accumulate: number of batches to an update. The loss of each counts with its share of their samples, so that
            losses that are means over samples have the gradient of one large batch; batch norm still normalises each
            batch by itself. What is left at the end of an epoch is an update, too. The inputs of the batches to an
            update are on the device together.
        clip_norm: the largest 2-norm of the gradients of one optimiser; larger ones are scaled to it before the update.
        ema_decay: keeps an exponential moving average of the weights of each stage, from its first update on, which
            :meth:`evaluate` and :meth:`predict` use, with the running statistics of training. Where the training of a
            stage ends, by early stopping or because the next one begins (greedy), the average becomes its weights.
            Takes the memory of another network.
        early_stopping: when to stop before the last epoch, each optimiser's stages for themselves. Needs a
            ``val_loader``.
        process_group: processes that train together, each on its part of every batch, with the mean of their gradients:
            all make the same trainer and call :meth:`fit`, which begins with the first one's parameters and buffers.
            Results are those of one process for losses that are means over samples, where batch norm is over all of
            them (:func:`~layerwise_ext.nn.convert_sync_batchnorm`); otherwise the first one's running statistics are
            kept. None: this process alone.

    Raises:
        TypeError: ``optimizer`` or ``scheduler`` is no function or sequence of functions; ``process_group`` is no
            process group.
        ValueError: an argument out of range; a sequence of another length than there are optimisers; (``cuda_graph``)
            stages that are not on a CUDA device, a batch norm with ``momentum=None``, ``accumulate`` above 1, float16
            (also with stages of their own ``cuda_graph``), several processes.

    Attributes:
        epoch: number of finished epochs, over all stages.
        history: one :data:`Record` per finished epoch.
    """

    def __init__(
        self,
        stages: Iterable[LocalStage],
        optimizer: OptimizerFactory | Sequence[OptimizerFactory] = optimizers.adam,
        *,
        scheduler: SchedulerFactory | Sequence[SchedulerFactory] | None = None,
        device: torch.device | str | None = None,
        autocast_dtype: torch.dtype | None = None,
        seed: int | None = None,
        progress: bool = True,
        channels_last: bool = True,
        cuda_graph: bool = False,
        accumulate: int = 1,
        clip_norm: float | None = None,
        ema_decay: float | None = None,
        early_stopping: EarlyStopping | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.stages = list(stages)
        self._check_stages()
        optimizers.check("optimizer", "an optimiser from a list of parameters", optimizer)
        if scheduler is not None:
            optimizers.check("scheduler", "a learning-rate scheduler from an optimiser", scheduler)
        if accumulate < 1:
            raise ValueError(f"accumulate is {accumulate}; allowed: 1 or more batches")
        if clip_norm is not None and not 0 < clip_norm < math.inf:
            raise ValueError(f"clip_norm is {clip_norm}; allowed: a positive number, None")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"ema_decay is {ema_decay}; allowed: above 0 and below 1, None")
        if cuda_graph and accumulate > 1:
            raise ValueError(f"cuda_graph=True needs accumulate=1, got {accumulate}: a graph is a whole update")
        self._replicas = ReplicaGroup(process_group)
        if cuda_graph and self._replicas.size > 1:
            raise ValueError(f"cuda_graph=True captures one process; process_group has {self._replicas.size}")
        if device is None:
            device = next(p.device for stage in self.stages for p in stage.parameters())
        self.device = torch.device(device)
        precision.check(autocast_dtype, cuda_graph or any(stage.cuda_graph for stage in self.stages))
        if cuda_graph:
            _graphs.check_device(self.device)
            _graphs.check_capturable(self.stages)
        self.autocast_dtype = autocast_dtype
        self.progress = progress and self._replicas.rank == 0
        self.channels_last = channels_last
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        for stage in self.stages:
            stage.to(self.device)
            if channels_last:
                stage.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._averages = [] if ema_decay is None else [AveragedStage(stage, ema_decay) for stage in self.stages]
        self.generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
        groups = [[p for p in group if p.requires_grad] for group in self._parameter_groups()]
        self.optimizers = optimizers.make("optimizer", optimizer, groups)
        self._scalers = [precision.grad_scaler(autocast_dtype, self.device) for _ in range(self._losses(len(groups)))]
        self._left_out: set[int] = set()  # optimisers whose last step had gradients that were not finite
        self._pending: tuple[int, Callable[[], None]] | None = None  # an optimiser that waits for other replicas
        parameters = [p for group in groups for p in group]
        self._may_wait = self._replicas.size > 1 and len(set(parameters)) == len(parameters)
        self._captured = _graphs.CapturedFunction(self._step, self._settings) if cuda_graph else None
        self._reset_capture()
        self.schedulers = [] if scheduler is None else optimizers.make("scheduler", scheduler, self.optimizers)
        if any(isinstance(s, ReduceLROnPlateau) for s in self.schedulers):
            raise ValueError("scheduler is ReduceLROnPlateau, which needs a metric; use one that is stepped per epoch")
        self.early_stopping = early_stopping
        self._watches = [] if early_stopping is None else [Watch(early_stopping) for _ in groups]
        self.epoch = 0
        self.history: list[Record] = []
        self._classes: list[int | None] = []
        self._saved_random_state: dict[str, Any] | None = None
        self._loader: Any = None

    def step(self, x: Tensor, target: Tensor, *, weight: float = 1.0, update: bool = True) -> StepResult:
        """One training step on a batch that is already on the device; waits for the device with float16 only.

        Args:
            x: a batch of images ``[N, C, H, W]`` (for :class:`GreedyTrainer`, of the current stage's inputs); with
                ``process_group``, whose processes all take the step, this one's part of it.
            target: ``[N]`` int64.
            weight: of the losses, where the gradients of several batches are added up.
            update: False leaves parameters as they are and adds the gradients to those of the next call.

        Raises:
            ValueError: ``weight`` or ``update`` with ``cuda_graph``.
        """
        self._left_out.clear()
        if self._captured is not None and (weight != 1.0 or not update):
            raise ValueError("cuda_graph=True needs weight=1 and update=True: a graph is a whole update")
        if self._captured is None:
            result = self._step(x, target, weight, update)
        else:
            result = StepResult(*(t.clone() for t in self._captured(x, target)))  # the graph overwrites its own
        self._finish_update()
        if update:
            for scaler in dict.fromkeys(map(self._scaler, self._active_groups())):
                scaler.update()
            self._update_averages()
        return result

    def _update_averages(self) -> None:
        for group in self._active_groups() if self._averages else ():
            for index in self._stages_of(group) if group not in self._left_out else ():
                self._averages[index].update_parameters(self.stages[index])

    @abstractmethod
    def _step(self, x: Tensor, target: Tensor, weight: float = 1.0, update: bool = True) -> StepResult:
        """What :meth:`step` does, kernel by kernel."""

    def _result(self, losses: list[Tensor], logits: list[Tensor | None], target: Tensor) -> StepResult:
        """Of the trained stages; remembers how many classes each one tells apart."""
        self._classes = [None if t is None else t.shape[1] for t in logits]
        return step_result(losses, logits, target)

    def _losses(self, groups: int) -> int:
        """How many losses there are, of which each has a backward pass of its own: one for each optimiser, or one."""
        return groups

    def _scaler(self, group: int) -> torch.amp.GradScaler:
        """Of the gradients of an optimiser."""
        return self._scalers[group if len(self._scalers) > 1 else 0]

    def _backward(self, loss: Tensor, weight: float, group: int = 0) -> None:
        self._scaler(group).scale(loss if weight == 1.0 else loss * weight).backward()

    def _update(self, group: int) -> None:
        """The step of one optimiser; with replicas, once their gradients are there: the next stage need not wait."""
        self._finish_update()
        parameters = [p for g in self.optimizers[group].param_groups for p in g["params"]]
        self._pending = group, self._replicas.average(parameters)
        if not self._may_wait:
            self._finish_update()

    def _finish_update(self) -> None:
        if self._pending is None:
            return
        group, wait = self._pending
        self._pending = None
        wait()
        optimizer, scaler = self.optimizers[group], self._scaler(group)
        if self.clip_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], self.clip_norm)
        if scaler.is_enabled():
            taken: list[bool] = []
            with optimizer.register_step_post_hook(lambda *_: taken.append(True)):
                scaler.step(optimizer)
            if not taken:
                self._left_out.add(group)
        else:
            optimizer.step()
        # Dropping the gradients at once keeps those of one optimiser only in memory.
        optimizer.zero_grad(set_to_none=True)

    def _settings(self) -> Any:
        """What is fixed in a captured step."""
        return _graphs.settings_of(self.stages), tuple(map(_graphs.settings_of_optimizer, self.optimizers))

    def _reset_capture(self) -> None:
        """To be called when the step is another one, or works on other memory, than before."""
        if self._captured is not None:
            self._captured.reset()
            for optimizer in self.optimizers:
                _graphs.make_capturable(optimizer)

    @abstractmethod
    def _parameter_groups(self) -> list[list[nn.Parameter]]:
        """The parameters of each optimiser."""

    def _trained(self) -> list[int]:
        """Indices of the stages that the results of :meth:`step` are about."""
        return self._reported()

    @property
    def ema_stages(self) -> list[LocalStage]:
        """The stages with averaged weights, which evaluation and prediction use; without ``ema_decay``, and before the
        first update of a stage, the stages themselves."""
        if not self._averages:
            return self.stages
        return [average.of(stage) for stage, average in zip(self.stages, self._averages, strict=True)]

    @abstractmethod
    def _stages_of(self, group: int) -> list[int]:
        """Indices of the stages that an optimiser trains, ascending; the last one's metrics are those of all."""

    def _active_groups(self) -> list[int]:
        """Indices of the optimisers that the current epoch uses."""
        return [group for group in range(len(self.optimizers)) if not self._has_stopped(group)]

    def _has_stopped(self, group: int) -> bool:
        return bool(self._watches) and self._watches[group].stopped

    def _set_training(self) -> None:
        """Put every stage into the mode in which :meth:`step` runs it."""
        for group in range(len(self.optimizers)):
            for index in self._stages_of(group):
                self.stages[index].train(not self._has_stopped(group))

    def _next_epoch(self, epochs: int) -> bool:
        """Whether there is another epoch to train."""
        return self.epoch < epochs and bool(self._active_groups())

    def _epoch_batches(self, loader: Batches) -> tuple[Batches, int | None]:
        """What the current epoch trains on, and the number of batches if it is known."""
        return self._replicas.share(loader), length(loader)

    def _count_epoch(self) -> None:
        self.epoch += 1

    def _check_stages(self) -> None:
        """Refuse stages that this trainer cannot train."""
        if not self.stages:
            raise ValueError("stages is empty; there is nothing to train")
        for index, stage in enumerate(self.stages):
            if not isinstance(stage, LocalStage):
                raise TypeError(f"stages[{index}] is {type(stage).__name__}; a LocalStage is needed")
        label_classes(self.stages)

    def fit(
        self,
        loader: Batches,
        epochs: int,
        val_loader: Batches | None = None,
        on_epoch_end: Callable[[Trainer, Record], None] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> list[Record]:
        """Train until ``epochs`` epochs are done in all, those before :meth:`load_state_dict` included.

        Args:
            loader: any iterable of ``(images, target)`` batches, iterated once per epoch. With ``process_group`` every
                process reads all of it and takes its part of each batch; the generators of torch and of the loader are
                those of the first process.
            epochs: the total; :class:`GreedyTrainer` counts it for each stage.
            val_loader: evaluated after each epoch; early stopping looks at it.
            on_epoch_end: called as ``on_epoch_end(trainer, record)`` with everything up to date, so that a checkpoint
                of :meth:`state_dict` written there continues with the next epoch; behind ``callbacks``.
            callbacks: called in this order at the start, behind each epoch, and at the end in the reverse order; they
                and ``on_epoch_end`` in the first process only.

        Returns:
            ``history``.

        Raises:
            ValueError: ``epochs`` below 1; early stopping without a ``val_loader``, or on the accuracy of a head
                without a classifier or of images without labels; (``process_group``) a batch with fewer samples than
                processes, or processes that are not at the same epoch.
            TypeError: something else than a :class:`Callback` among ``callbacks``.
            RuntimeError: the loader gave no batches; another process has ended, or its loader gave another number.
        """
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}; allowed: 1 or more, the total number")
        if self.early_stopping is not None and val_loader is None:
            raise ValueError(f"early_stopping looks at {self.early_stopping.metric}: val_loader must be given")
        for index, callback in enumerate(callbacks):
            if not isinstance(callback, Callback):
                raise TypeError(f"callbacks[{index}] is {type(callback).__name__}; a train.Callback is needed")
        if on_epoch_end is not None:
            callbacks = [*callbacks, FunctionCallback(on_epoch_end)]
        if self._replicas.rank > 0:
            callbacks = ()
        self._replicas.check_same("epoch", self.epoch)
        modules = [*self.stages, *self._averages]
        self._replicas.broadcast(t for m in modules for t in (*m.parameters(), *m.buffers()))
        self._loader = loader
        if self._logs and keeps_workers(loader):
            logger.warning(
                "the loader has persistent_workers=True, so it draws their seed once and not in each epoch: a run that "
                "is resumed has other random numbers than one without an interruption"
            )
        if self._saved_random_state is not None:
            random_state.restore(self._saved_random_state, loader, self.device)
            self._saved_random_state = None
        with ExitStack() as stack:
            for callback in callbacks:
                callback.on_fit_start(self)
                stack.callback(callback.on_fit_end, self)
            while self._next_epoch(epochs):
                self._fit_epoch(loader, val_loader, callbacks)
        return self.history

    def _fit_epoch(self, loader: Batches, val_loader: Batches | None, callbacks: Sequence[Callback]) -> None:
        record = self._train_epoch(loader)
        if val_loader is not None:
            scores = self._evaluate(val_loader, self._replicas)
            record["val_loss"], record["val_accuracy"] = scores["loss"], scores["accuracy"]
            if self.early_stopping is not None:
                self._stop_early(dict(zip(scores["stages"], record[self.early_stopping.metric], strict=True)))
        for group in self._active_groups() if self.schedulers else []:
            self.schedulers[group].step()
        self._count_epoch()
        self.history.append(record)
        if self._logs:
            self._log(record)
        for callback in callbacks:
            callback.on_epoch_end(self, record)

    @property
    def _logs(self) -> bool:
        """Whether this process writes the log: of those that train together the first one."""
        return self._replicas.rank == 0

    def _log(self, record: Record) -> None:
        """The last record of the history, and what is wrong with it."""
        logger.info("epoch %d: %s", record["epoch"], summary(record))
        for stage, loss in zip(record["stages"], record["train_loss"], strict=True):
            if not math.isfinite(loss):
                logger.warning("epoch %d: the loss of stage %d is %s", record["epoch"], stage, loss)
        self._warn_of_collapse(record)

    def _warn_of_collapse(self, record: Record) -> None:
        for stage, classes in zip(record["stages"], self._classes, strict=True):
            if classes is None:
                continue
            epochs = [each for each in self.history if stage in each["stages"]]
            accuracies = [each["train_accuracy"][each["stages"].index(stage)] for each in epochs]
            if collapses(accuracies, classes):
                logger.warning(
                    "epoch %d: stage %d has collapsed: its training accuracy is %.4f, it was %.4f",
                    record["epoch"],
                    stage,
                    accuracies[-1],
                    max(accuracies),
                )

    def _stop_early(self, values: dict[int, float]) -> None:
        """Judge the current epoch by the metric of each stage."""
        for group in self._active_groups():
            stages, watch = self._stages_of(group), self._watches[group]
            value = values[stages[-1]]
            if math.isnan(value) and watch.settings.metric == "val_accuracy":
                raise ValueError(
                    f"early_stopping: stages[{stages[-1]}] has no val_accuracy, as its head has no classifier or "
                    "val_loader has no labels; use metric='val_loss'"
                )
            kept: list[nn.Module] = [self.stages[index] for index in stages]
            kept += [self._averages[index] for index in stages if self._averages]
            watch.update(value, self.epoch + 1, kept)
            if watch.stopped:
                self._adopt_averages(stages)
                best = "" if watch.best is None else f"; best in epoch {watch.best_epoch}: {watch.best:.4f}"
                if self._logs:
                    logger.info("epoch %d: training of stages %s ends%s", self.epoch + 1, stages, best)

    def _adopt_averages(self, stages: list[int]) -> None:
        """Their training has ended: what is built on them sees what is evaluated."""
        for index in stages if self._averages else ():
            self._averages[index].into(self.stages[index])

    def _train_epoch(self, loader: Batches) -> Record:
        start = last_shown = time.perf_counter()
        self._set_training()
        self._pending = None
        for optimizer in self.optimizers:  # those of an interrupted epoch
            optimizer.zero_grad(set_to_none=True)
        self._replicas.share_random_state(loader, self.generator, self.device, self.epoch)
        batches, total = self._epoch_batches(loader)
        metrics = Metrics(len(self._trained()), self.device)
        with tqdm(
            total=total, desc=f"epoch {self.epoch + 1}", unit="batch", leave=False, disable=not self.progress
        ) as bar:
            for result, samples in self._steps(batches):
                metrics.update(result, samples)
                bar.update()
                now = time.perf_counter()
                if self.progress and now - last_shown > _PROGRESS_INTERVAL:
                    last_shown = now
                    bar.set_postfix(loss=f"{metrics.loss()[-1]:.4f}", accuracy=f"{metrics.accuracy()[-1]:.4f}")
        if metrics.samples == 0:
            raise RuntimeError("loader gave no batches; note that an iterator is used up after one epoch")
        metrics.add_up(self._replicas)
        self._replicas.broadcast(t for m in (*self.stages, *self._averages) for t in m.buffers())
        return {
            "epoch": self.epoch + 1,
            "stages": self._trained(),
            "train_loss": metrics.loss(),
            "train_accuracy": metrics.accuracy(),
            "seconds": time.perf_counter() - start,
        }

    def _steps(self, batches: Batches) -> Iterator[tuple[StepResult, int]]:
        """Trains on all batches; what comes of each, and its number of samples."""
        for group in self._replicas.updates(self._on_device(batches), self.accumulate):
            for i, ((images, target), weight) in enumerate(group):
                with self._replicas.own_randomness(self.device):
                    result = self.step(images, target, weight=weight, update=i == len(group) - 1)
                yield result, len(target)


def length(loader: Batches) -> int | None:
    """Number of batches, None where the loader does not say."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # an iterable without a length, or a DataLoader over one
        return None


def keeps_workers(loader: Any) -> bool:
    """Whether it, or a loader that it is around, is a DataLoader with persistent workers."""
    inner = getattr(loader, "loader", None)
    return bool(getattr(loader, "persistent_workers", False)) or (inner is not None and keeps_workers(inner))
