"""The inputs on which a quantizer measures ranges: from a file, or the recorded sample itself."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvtrace.digests import digest_bytes
from qvtrace.errors import ModelError
from qvtrace.models.inputs import calibration_inputs
from qvtrace.models.loading import Loaded
from qvtrace.models.origins import Origin, relative
from qvtrace.models.request import HINT, ModelRequest, PreparedModel, Sample, map_tensors
from qvtrace.trees import Json


@dataclass
class Calibration:
    """Runs a model on calibration inputs, and says of a quantizer whether it asked for that."""

    prepared: PreparedModel  # with the sample that is recorded
    samples: tuple[Sample, ...]
    file: str | None = None
    used: bool = False

    def __call__(self, model: nn.Module) -> None:
        """A forward on each sample; raises `ModelError` when the model does."""
        self.used = True
        prepared = replace(self.prepared, model=model)
        if self.file is not None:
            prepared.hint = HINT
        for sample in self.samples:
            try:
                run_once(prepared, sample)
            except ModelError as error:
                if self.file is None:
                    raise
                raise ModelError(f"--calibration {self.file}: {error}") from error.__cause__

    @property
    def settings(self) -> Json:
        """What the manifest says of it: where the inputs came from, their number and digest."""
        test = sum(map(self._is_recorded, self.samples))
        settings: Json = {"samples": len(self.samples), "of_the_test_input": test}
        if self.file is None:
            return {"source": "sample", **settings}
        digest = digest_bytes(Path(self.file).read_bytes())
        return {"source": "file", "file": relative(self.file), "digest": digest, **settings}

    def _is_recorded(self, sample: Sample) -> bool:
        given = sample.args, dict(sample.kwargs)
        recorded = recorded_samples(self.prepared)
        return any(_equal(given, (one.args, dict(one.kwargs))) for one in recorded)


def make_calibration(
    origin: Origin, loaded: Loaded, request: ModelRequest, prepared: PreparedModel
) -> Calibration:
    """The inputs of `--calibration`, by default the samples that are recorded.

    Raises `UsageError` for a file that does not fit the model.
    """
    if request.calibration is None:
        return Calibration(prepared, recorded_samples(prepared))
    samples = calibration_inputs(request.calibration, origin, loaded.model, request)
    return Calibration(prepared, samples, request.calibration)


def recorded_samples(prepared: PreparedModel) -> tuple[Sample, ...]:
    """All that a prepared model runs on."""
    return Sample(prepared.args, prepared.kwargs, {}), *prepared.more


def run_once(prepared: PreparedModel, sample: Sample) -> None:
    """One forward on copies of a sample, so that a model cannot change what is run later."""
    args, kwargs = map_tensors((sample.args, dict(sample.kwargs)), Tensor.clone)
    with torch.compiler.set_stance("force_eager"):
        replace(prepared, args=args, kwargs=kwargs, more=()).run()


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)
