"""The policies of the arena: of runs, of model directories and presets, and SavedModels."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dpo_keras.app.candidate_generation import model_inputs
from dpo_keras.app.config_sections import Sampling
from dpo_keras.app.console import Progress, Silent
from dpo_keras.app.models import load_model
from dpo_keras.app.run_directory import open_run
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.arena import Prompt, Responder
from dpo_keras.utils import JSON

if TYPE_CHECKING:
    import keras

_SAVED_MODEL = "saved_model.pb"


class Decoding(NamedTuple):
    """How responses are sampled; None stands for what a run's configuration says."""

    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None


class PolicyResponder(Responder):
    """A policy in this process, whose texts are seen as they grow."""

    def __init__(
        self,
        name: str,
        policy: keras.Model,
        options: dict[str, JSON],  # max_new_tokens, temperature, top_p
        template: str | None = None,
        max_length: int | None = None,
    ):
        from dpo_keras.training.generation import Sampling as Chosen
        from dpo_keras.training.generation import checked_arguments

        super().__init__(
            {"policy": name, **options}, streams=True, varies=options["temperature"] > 0
        )
        self.policy, self.options = policy, options
        self.template, self.max_length = template, max_length
        self.encoder, limit = checked_arguments(
            policy,
            policy.preprocessor,
            options["max_new_tokens"],
            Chosen(options["temperature"], options["top_p"]),
            max_length,
        )
        self.room = None if limit is None else limit - options["max_new_tokens"]

    @property
    def reads_messages(self) -> bool:
        """Return whether a conversation can go on."""
        return self.template is not None

    def prepare(self, prompt: Prompt) -> JSON:
        """Tokenize a prompt as training does, and refuse one that would have to be cut."""
        from dpo_keras.training.generation import prompt_ids

        content = prompt if isinstance(prompt, str) else [turn.as_dict() for turn in prompt]
        inputs = model_inputs([{"prompt": content}], self.template, self.policy)
        ids = prompt_ids(self.encoder, list(inputs.prompts), None)[0]
        if self.room is not None and len(ids) > self.room:
            raise InputError(
                f"this has {len(ids):,} tokens, and a policy reads {self.room:,} at most; ask in "
                "fewer words, or begin a new conversation."
            )
        return ids

    def respond(
        self, prepared: Sequence[JSON], seeds: Sequence[int]
    ) -> Generator[tuple[int, str, bool], None, None]:
        """Answer prompts together."""
        from dpo_keras.training import stream_responses

        yield from stream_responses(
            self.policy, prepared, seeds=seeds, max_length=self.max_length, **self.options
        )


class SavedModelResponder(Responder):
    """The `generate` signature of an exported SavedModel, whose texts come as a whole."""

    reads_messages = False

    def __init__(self, path: Path, name: str):
        import keras_hub  # noqa: F401 (registers the ops of tensorflow_text)
        import tensorflow as tf

        settings = path / "assets.extra" / "dpo_keras.json"
        known = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
        setting = {key: known[key] for key in ("temperature", "top_p") if key in known}
        varies = known.get("temperature", 1.0) > 0
        super().__init__({"policy": name, **setting}, streams=False, varies=varies)
        self.template = known.get("template")
        self.model = tf.saved_model.load(str(path))
        if "generate" not in self.model.signatures:
            found = ", ".join(self.model.signatures) or "none"
            rule = f"must have the signature generate; {path} has {found}"
            raise InputError(InputProblem("RUN", rule, hint="Export it with that signature."))

    def prepare(self, prompt: Prompt) -> JSON:
        """Take text; a SavedModel reads nothing else."""
        if not isinstance(prompt, str):
            raise InputError("an exported policy reads no conversation; begin a new one.")
        return prompt

    def respond(
        self, prepared: Sequence[JSON], seeds: Sequence[int]
    ) -> Generator[tuple[int, str, bool], None, None]:
        """Answer prompts together; the model draws by seeds of its own."""
        import tensorflow as tf

        texts = self.model.signatures["generate"](prompt=tf.constant(list(prepared)))["text"]
        for number, text in enumerate(texts.numpy()):
            yield number, text.decode("utf-8", "replace"), True


def open_responders(
    paths: Sequence[str],
    decoding: Decoding = Decoding(),  # noqa: B008  # it cannot be changed
    template: str | None = None,
    progress: Progress | None = None,
) -> list[PolicyResponder | SavedModelResponder]:
    """Load the policies of the arena, and let each begin a response, so that all is compiled.

    Args:
        paths: directories of runs, what `load_model` takes, or SavedModels.
        decoding: how responses are sampled; a SavedModel keeps what it was exported with.
        template: the chat template of policies that come without a configuration.
        progress: hears what is loaded.

    Raises:
        InputError: a path names no policy, or is given twice.
    """
    progress = progress or Silent()
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        rule = "must name each policy once; one policy alone answers twice"
        raise InputError(InputProblem("RUN", rule, ", ".join(twice)))
    found = []
    for path in paths:
        progress.stage(f"Policy {path}")
        responder = _responder(path, decoding, template)
        first = responder.respond([responder.prepare("Hello")], [0])
        next(first)
        first.close()
        found.append(responder)
    return found


def _responder(
    path: str, decoding: Decoding, template: str | None
) -> PolicyResponder | SavedModelResponder:
    place = Path(path)
    exported = [place, *sorted(place.glob("[0-9]*"), key=_version, reverse=True)]
    for folder in exported:
        if (folder / _SAVED_MODEL).is_file():
            return SavedModelResponder(folder, path)
    usual, max_length, dtype, model = Sampling(), None, "float32", path
    if (place / "config.yaml").is_file():
        run = open_run(place)
        config = run.config()
        usual, max_length, dtype = config.evaluation, config.data.max_length, config.model.dtype
        template, model = config.data.template, str(run.policy)
    options = {
        name: getattr(usual, name) if value is None else value
        for name, value in decoding._asdict().items()
    }
    return PolicyResponder(path, load_model(model, dtype), options, template, max_length)


def _version(folder: Path) -> int:
    return int(folder.name) if folder.name.isdigit() else -1
