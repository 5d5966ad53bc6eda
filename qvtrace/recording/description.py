"""What the manifest says of a recording, from before its first call to its end."""

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime

from torch import nn

from qvtrace.manifest import (
    KEYED_DIGESTS,
    PROMPTS,
    GivenInputs,
    InputsInfo,
    Manifest,
    ModuleEntry,
    Skipped,
    StepEntry,
    VariantInfo,
)
from qvtrace.recording.identity import (
    Questions,
    describe_environment,
    describe_model,
    is_training,
    version,
)
from qvtrace.recording.module_entries import plain_entry
from qvtrace.recording.module_tree import NamedModule
from qvtrace.recording.options import RecordOptions
from qvtrace.redaction import error_line
from qvtrace.trees import Json


class Description:
    """The manifest of one recording without its calls and tensors, which the writer knows."""

    def __init__(
        self, model: nn.Module, options: RecordOptions, modules: Iterable[NamedModule]
    ) -> None:
        self._privacy = options.privacy
        self._questions = Questions()
        beginning = _beginning(model, options, modules, self._questions)
        self.manifest = self._scrubbed(beginning)  # as far as it is known

    def add_given(self, given: GivenInputs) -> None:
        """A generation begins with these inputs."""
        self.notes_text(given.inputs, given.kwargs)
        inputs = replace(self.manifest.inputs, given=given)
        self.manifest = replace(self.manifest, inputs=inputs)

    def add_step(self, step: StepEntry) -> None:
        """A step has ended."""
        self.manifest = replace(self.manifest, steps=(*self.manifest.steps, step))

    def notes_text(self, *trees: Json) -> bool:
        """Whether text is given away here first; the manifest then says that it is."""
        contains = self.manifest.contains
        if self._privacy is not None:
            return False
        if PROMPTS in contains or not any(map(_holds_text, trees)):
            return False
        self.manifest = replace(self.manifest, contains=(*contains, PROMPTS))
        return True

    def ending(
        self, error: BaseException | None, modules: tuple[ModuleEntry, ...], skipped: Skipped
    ) -> Manifest:
        """The manifest of a recording that ends, early where there is an `error`."""
        warnings = (*self._questions.warnings, *skipped.warnings)
        return self._scrubbed(
            replace(
                self.manifest,
                complete=error is None,
                error=None if error is None else error_line(error),
                modules=modules,
                skipped=replace(skipped, warnings=warnings),
            )
        )

    def _scrubbed(self, manifest: Manifest) -> Manifest:
        return manifest if self._privacy is None else self._privacy.scrubbed(manifest)


def _beginning(
    model: nn.Module,
    options: RecordOptions,
    modules: Iterable[NamedModule],
    questions: Questions,
) -> Manifest:
    variant = options.variant or VariantInfo()
    info = options.model or describe_model(model, questions, weights=variant.name == "fp")
    training = questions.ask("training mode", lambda: is_training(model)) is True
    environment = describe_environment(model, questions)
    return Manifest(
        qvtrace=version(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        complete=False,
        error=None,
        recorded_by=options.recorded_by,
        model=replace(info, training=training),
        variant=variant,
        inputs=InputsInfo(source=options.source or {"kind": "given by the caller"}),
        contains=_contents(options),
        environment={**environment, **options.environment},
        settings=_settings(options),
        modules=tuple(map(plain_entry, modules)),
        calls=(),
        tensors=(),
        skipped=Skipped(),
        weights=() if options.weights else None,
    )


def _settings(options: RecordOptions) -> Json:
    """What was asked of the recorder."""
    return {
        "include": list(options.include),
        "exclude": list(options.exclude),
        "inputs": options.inputs,
        "kwargs": options.kwargs,
        "caches": options.caches,
        "weights": options.weights,
        **options.share.to_json(),
        **({} if options.privacy is None else options.privacy.to_json()),
        **options.settings,
    }


def _contents(options: RecordOptions) -> tuple[str, ...]:
    """What the file gives away."""
    share, is_open = options.share, options.privacy is None
    contents = [
        "inputs" if is_open else KEYED_DIGESTS,
        "statistics" if share.statistics_only else "elements",
    ]
    if share.tokens is not None:
        contents.append("statistics")
    if is_open and options.source.get("prompt") is not None:
        contents.append(PROMPTS)
    if is_open and options.model is not None and options.model.name is not None:
        contents.append("paths")
    if options.weights:
        contents.append("weights")
    return tuple(contents)


def _holds_text(tree: Json) -> bool:
    """Whether a text that says something is in what a model was given: it may be a prompt."""
    if "items" in tree:
        return any(_holds_text(child) for _, child in tree["items"])
    return tree.get("class") == "str" and bool(str(tree.get("value")).strip())
