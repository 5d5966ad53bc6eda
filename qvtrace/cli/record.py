"""`qvtrace record`: one variant of one model, run once under the hook."""

import shlex
from pathlib import Path
from typing import Annotated

from qvtrace.cli.flags import ElementFlags, Force, ModulePatterns, Traceback
from qvtrace.cli.model_flags import ModelFlags, Variant
from qvtrace.cli.options import MODEL, OUTPUT, STORED, file_option, flag, option, with_flags
from qvtrace.cli.recording import TRACES, Job, run_job
from qvtrace.cli.recording_flags import ShareFlags, StorageFlags, WatchFlags
from qvtrace.cli.terminal import print_next
from qvtrace.errors import UsageError


@with_flags
def record(
    *,
    variant: Annotated[Variant, option(MODEL, "Which variant runs.")] = Variant.FP,
    model: ModelFlags,
    patterns: ModulePatterns,
    storage: StorageFlags,
    share: ShareFlags,
    watch: WatchFlags,
    elements: ElementFlags,
    dry_run: Annotated[
        bool,
        flag(STORED, "Run the forward, store nothing, say how much it would be.", "--dry-run"),
    ] = False,
    output: Annotated[
        Path | None,
        file_option(
            OUTPUT,
            "The archive. (default: traces/VARIANT.st)",
            "--output",
            "-o",
        ),
    ] = None,
    force: Force = False,
    traceback: Traceback = False,
) -> None:
    """Record every call of every module of a model in an archive.

    Without any option it records the float variant of a small embedded Qwen3-VL.
    """
    file = output or TRACES / f"{variant}.st"
    if elements.values and not watch.print_calls:
        raise UsageError("--values: says of which modules --print shows elements; add --print")
    job = Job(
        model,
        variant,
        patterns,
        storage,
        share,
        file,
        overwrite=force,
        dry_run=dry_run,
        watch=watch,
        elements=elements,
    )
    quantizer = run_job(job).variant.quantizer
    if not dry_run:
        print_next(next_command(file, variant, model, quantizer, private=storage.private))


def next_command(
    file: Path,
    variant: Variant,
    model: ModelFlags,
    quantizer: str | None,
    *,
    private: bool = False,
) -> str:
    """What to type after a recording: compare it, or first record what it can be compared with.

    The float original of a quantized checkpoint is another model, which is not known here. What is
    `private` has to be given again, and is not repeated here.
    """
    reference = model.like if model.like is not None else _reference_of(file, variant)
    if reference is not None:
        sides = (reference, str(file)) if variant is Variant.QUANT else (str(file), reference)
        return _command("diff", *sides, "--sort-by", "peir")
    other = "fp" if variant is Variant.QUANT else "quant"
    again = []
    if model.model is not None and (private or ":" in model.model):
        # no archive's word imports a function
        again += ["--model", model.model]
    if quantizer is not None and quantizer.startswith("checkpoint:"):
        again += ["--model", "ORIGINAL"]
    if model.trust_remote_code:
        again.append("--trust-remote-code")
    if not private:
        return _command("record", "--variant", other, "--like", str(file), *again)
    for name in ("prompt", "image", "inputs"):
        again += [f"--{name}", name.upper()] if getattr(model, name) else []
    return _command("record", "--private", "--variant", other, *again)


def _reference_of(file: Path, variant: Variant) -> str | None:
    """A recording of the float variant beside `file`, or where it is by default."""
    if variant is Variant.FP:
        return None
    likely = (file.with_name("fp.st"), TRACES / "fp.st")
    return next((str(path) for path in likely if path != file and path.exists()), None)


def _command(*words: str) -> str:
    return shlex.join(["qvtrace", *words])
