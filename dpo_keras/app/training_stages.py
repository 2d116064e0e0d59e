"""The stages of a run that train: warm-up, the model with its reference, preference training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dpo_keras.app.config import Config
from dpo_keras.app.config_rules import build_loss, keys_for_arguments
from dpo_keras.app.config_sections import REFERENCES, Optimization, Training
from dpo_keras.app.console import Progress
from dpo_keras.app.keras_backend import chosen_backend
from dpo_keras.app.models import load_reference, save_policy
from dpo_keras.app.run_clock import TRAINING, WARM_UP
from dpo_keras.app.run_devices import Devices
from dpo_keras.app.run_directory import RunDirectory
from dpo_keras.cluster import StopRequest, Watchdog
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from dpo_keras.batching import TokenizedPairs
    from dpo_keras.losses import DPOLoss
    from dpo_keras.training import DPOModel, Layout


@dataclass
class Context:
    """What every stage of a run needs."""

    config: Config
    run: RunDirectory
    resume: bool
    progress: Progress
    devices: Devices
    stop: StopRequest
    watchdog: Watchdog | None  # of a cluster's run
    first_steps: dict[str, int] = field(default_factory=dict)  # of a trial, by the stage's title
    loss: DPOLoss = field(init=False)
    layout: Layout = field(init=False)  # from `settle_layout`, once the models are loaded

    def __post_init__(self) -> None:
        """Make the objective, and check that replicas can share batches evenly."""
        for warning in self.config.warnings():
            self.progress.note(f"warning: {warning}")
        self.loss = build_loss(self.config.loss)
        replicas = self.devices.num_replicas_in_sync
        for name in ("training", "evaluation", "warmup"):
            section = getattr(self.config, name)
            if section is not None and section.batch_size % replicas:
                rule = f"must be a multiple of the {replicas} replicas that share it"
                raise InputError(InputProblem(f"{name}.batch_size", rule, section.batch_size))

    def settle_layout(
        self, policy: keras.Model, reference: keras.Model | str, images: bool = False
    ) -> None:
        """Decide between packed rows and buckets."""
        begun, now = self.run.read("data.json"), self.devices.num_replicas_in_sync
        before = (begun or {}).get("replicas", now)
        replicas = now if before % now else before
        layout = layout_of(self.config, policy, reference, self.progress, replicas, images)
        if layout.packed and before % now:
            key = "mesh" if chosen_backend() == "jax" else "strategy"
            rule = f"makes {now} replicas, and this run packs its rows for {before}"
            hint = f"Go on with a divisor of {before}, or start a new run with output=DIRECTORY."
            raise InputError(InputProblem(f"training.{key}", rule, hint=hint))
        # A run that began before pairs shared trees goes on in its own order.
        self.layout = replace(layout, share_prompts=begun is None or "trees" in begun)

    def fit_options(self, title: str) -> dict[str, JSON]:
        """Return the options of `dpo_keras.training` that the warm-up and training share."""
        return {
            "first_step": self.first_steps.get(title, 0),
            "seed": self.config.seed,
            "batching": self.layout,
            "checkpoint_every": self.config.training.checkpoint_every,
            "log_every": self.config.training.log_every,
            "resume": self.resume,
            "save": self.run.writes,
            "stop": self.stop,
            "watchdog": self.watchdog,
            "progress": self._show_step,
            "note": self.progress.note,
        }

    def _show_step(self, report: dict[str, JSON]) -> None:
        figures = {name: value for name, value in report.items() if name not in ("step", "steps")}
        self.progress.advance(report["step"], report.get("steps"), **figures)


def layout_of(
    config: Config,
    policy: keras.Model,
    reference: keras.Model | str,
    progress: Progress,
    replicas: int = 1,
    images: bool = False,
) -> Layout:
    """Decide how batches are laid out; a `reference` that is only a kind's name has no say."""
    from dpo_keras.training import choose_layout

    settings = config.training
    with keys_for_arguments():
        return choose_layout(
            [policy] if isinstance(reference, str) else [policy, reference],
            settings.batching,
            # The default asks for nothing, so packed rows do not refuse it.
            buckets=None if settings.buckets == Training().buckets else settings.buckets,
            row_length=settings.row_length,
            replicas=replicas,
            images=images,
            note=progress.note,
        )


def steps_per_epoch(context: Context, settings: Optimization, pairs: TokenizedPairs) -> int:
    """Count the steps of an epoch of a section, `warmup` or `training`."""
    with keys_for_arguments():
        return context.layout.steps(pairs, settings.batch_size, context.config.seed)


def steps_in_all(context: Context, settings: Optimization, pairs: TokenizedPairs) -> int:
    """Count the steps of a section: `max_steps`, or its epochs."""
    return settings.max_steps or settings.epochs * steps_per_epoch(context, settings, pairs)


def check_steps(context: Context, pairs: TokenizedPairs) -> None:
    """Refuse step counts that do not divide, and pairs that no row holds, before any training."""
    settings = context.config.training
    per_epoch = steps_per_epoch(context, settings, pairs)
    steps, at_once = steps_in_all(context, settings, pairs), settings.steps_per_execution
    every = settings.evaluate_every or per_epoch
    if steps % at_once or every % at_once:
        rule = f"must divide the {steps} steps of the run and the {every} between evaluations"
        raise InputError(InputProblem("training.steps_per_execution", rule, at_once))
    left = steps % settings.gradient_accumulation
    if left:
        context.progress.note(
            f"warning: the last {left} of {steps} steps do not fill an update of "
            f"{settings.gradient_accumulation} (training.gradient_accumulation) and change nothing."
        )


def make_optimizer(
    context: Context, settings: Optimization, pairs: TokenizedPairs, accumulation: int = 1
) -> keras.optimizers.Optimizer:
    """Make the optimizer of a section; its schedule is as long as the training."""
    from dpo_keras import training

    steps = steps_in_all(context, settings, pairs)
    section = "warmup" if settings is context.config.warmup else "training"
    with keys_for_arguments(section=section):
        return training.make_optimizer(
            steps, gradient_accumulation=accumulation, **settings.optimizer_arguments()
        )


def warm_up_policy(context: Context, policy: keras.Model, pairs: TokenizedPairs) -> None:
    """Train the policy in place on the chosen responses, if the configuration has a warm-up."""
    settings, run = context.config.warmup, context.run
    if settings is None:
        return
    from dpo_keras.training import SupervisedModel, warm_up
    from dpo_keras.training.supervised_model import chosen_alone, worth_imitating

    context.progress.stage(WARM_UP)
    pairs = worth_imitating(pairs)
    laid_out = chosen_alone(pairs) if context.layout.packed else pairs
    with context.devices.scope():
        remat = context.config.training.remat
        auxiliary_loss = context.config.training.auxiliary_loss
        model = SupervisedModel(policy, not remat, remat, auxiliary_loss)
        model.compile(
            optimizer=make_optimizer(context, settings, laid_out),
            jit_compile=context.config.training.jit_compile,
        )
    warm_up(
        model,
        pairs,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        batch_size=settings.batch_size,
        checkpoints=run.checkpoints / "warmup",
        keep=1,
        log=run.path / "metrics.warmup.jsonl",
        **context.fit_options(WARM_UP),
    )


def choose_reference(context: Context, policy: keras.Model) -> keras.Model | str:
    """Return the reference that the configuration names: its kind, or a model of its own."""
    config = context.config
    if not context.loss.needs_reference:
        return "none"
    if config.reference in REFERENCES:
        return config.reference
    with context.devices.scope():
        return load_reference(config.reference, policy, config.model.dtype)


def build_model(
    context: Context,
    policy: keras.Model,
    reference: keras.Model | str,
    pairs: TokenizedPairs,
    held_out: TokenizedPairs | None,
) -> tuple[DPOModel, TokenizedPairs, TokenizedPairs | None]:
    """Compile the model to train; return it with its pairs, now with cached log-probs if any."""
    from dpo_keras.training import DPOModel, RewardModel
    from dpo_keras.utils.backends import values_of_all_processes

    run, config, settings = context.run, context.config, context.config.training
    computed = reference == "cached" and pairs.reference is None
    if computed:
        pairs = with_reference(context, policy, pairs, "train")
        if held_out is not None:
            held_out = with_reference(context, policy, held_out, "held_out")
    with context.devices.scope():
        options = settings.model_dump(include={"remat", "auxiliary_loss"})
        if config.trains_reward:
            model: DPOModel = RewardModel(policy, **options)
        else:
            model = DPOModel(policy, reference, **options)
        if computed:
            # The cache was made of this very policy, so the first loss is known.
            model.reference.starts_as_policy = True
        model.compile(
            optimizer=make_optimizer(context, settings, pairs, settings.gradient_accumulation),
            loss=context.loss,
            jit_compile=settings.jit_compile,
            steps_per_execution=settings.steps_per_execution,
        )
    # No other place keeps a reference that began as a policy from scratch, after a warm-up, or
    # with quantized kernels.
    model_alone = config.model.path is None or config.model.quantization is not None
    only_here = model_alone or config.warmup is not None
    began_as_policy = context.loss.needs_reference and config.reference in REFERENCES
    if only_here and began_as_policy:
        with values_of_all_processes(policy.variables):
            if run.writes and not run.reference.exists():
                save_policy(policy, run.reference)
    context.progress.note(f"reference: {model.reference.mode}")
    return model, pairs, held_out


def with_reference(
    context: Context, policy: keras.Model, pairs: TokenizedPairs, name: str
) -> TokenizedPairs:
    """Compute the reference log-probs of the pairs of one side, "train" or "held_out"."""
    from dpo_keras.scoring import cache_reference
    from dpo_keras.utils.backends import process_count

    # Processes that share a mesh compute together: one of them must not read what others compute.
    kept = context.run.writes and process_count() == 1
    context.progress.stage(f"Reference log-probs of the pairs ({name})")
    return cache_reference(
        policy,
        pairs,
        context.run.path / "reference_cache" / f"{name}.npz" if kept else None,
        template=context.config.data.template,
        batch_size=context.config.evaluation.batch_size,
        batching=context.layout.batching,
        on_batch=context.progress.advance,
    )


def train_policy(
    context: Context, model: DPOModel, pairs: TokenizedPairs, held_out: TokenizedPairs | None
) -> int:
    """Run preference training, with evaluation, logs and checkpoints; return the steps taken."""
    import keras

    from dpo_keras.training import train_preferences
    from dpo_keras.training.experiment_loggers import experiment_loggers

    config, run, sync = context.config, context.run, context.config.training.sync_reference
    context.progress.stage(TRAINING)
    board = keras.callbacks.TensorBoard(run.path / "tensorboard", write_graph=False)
    with experiment_loggers(
        config.training.loggers if run.writes else [],
        run=config.name,
        settings=config.model_dump(mode="json"),
        every=config.training.log_every,
    ) as loggers:
        return train_preferences(
            model,
            pairs,
            epochs=config.training.epochs,
            max_steps=config.training.max_steps,
            batch_size=config.training.batch_size,
            held_out=held_out,
            evaluation_batch_size=config.evaluation.batch_size,
            every=config.training.evaluate_every,
            checkpoints=run.checkpoints / "training",
            keep=config.training.keep_checkpoints,
            log=run.path / "metrics.jsonl",
            callbacks=[board, *loggers] if run.writes else [],
            sync_reference=None if sync is None else (sync.every, sync.alpha),
            **context.fit_options(TRAINING),
        )


def leave_together(strategy: Any) -> None:
    """Wait until every worker has come to this line.

    A worker that leaves while the chief still writes would be taken for one that crashed.
    """
    import tensorflow as tf

    from dpo_keras.utils.backends import process_count

    if process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("the end of a run")

    @tf.function
    def count_workers() -> tf.Tensor:
        ones = strategy.run(lambda: tf.constant(1.0))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, ones, axis=None)

    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        count_workers()
