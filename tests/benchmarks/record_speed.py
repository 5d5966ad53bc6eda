"""Recording against a bare forward that also writes as many bytes to a file, in one run.

    python tests/benchmarks/record_speed.py [--pairs 15]

Prints the median ratio over interleaved pairs, the memory that recording takes above a bare forward
(each in a fresh process, Linux only), and the size of the archive against the distinct bytes.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers

import qvtrace

TOKENS = 512
MEBIBYTE = 1 << 20


def build() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=12,
        hidden_size=768,
        intermediate_size=2048,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation("sdpa")
    return model, torch.randint(3, 32000, (1, TOKENS))


@torch.no_grad()
def forward(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=False)


def recorded(model: torch.nn.Module, ids: torch.Tensor, file: Path) -> qvtrace.RecordingReport:
    with qvtrace.record(model, file, overwrite=True) as recording:
        forward(model, ids)
    assert recording.report is not None
    return recording.report


def write(file: Path, block: bytes, size: int) -> None:
    with file.open("wb", buffering=0) as output:
        for _ in range(0, size, len(block)):
            output.write(block)


def clear(folder: Path) -> None:
    """Both sides write new files: neither pays for letting go of an old one."""
    for file in folder.iterdir():
        file.unlink()


def seconds(work, *arguments) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def compare_times(folder: Path, pairs: int) -> None:
    model, ids = build()
    report = recorded(model, ids, folder / "warm.st")
    forward(model, ids)
    print(
        f"places {report.place_bytes / 1e6:.0f} MB, distinct {report.distinct_bytes / 1e6:.0f} MB, "
        f"archive / distinct {report.size / report.distinct_bytes:.4f}"
    )
    block = bytes(MEBIBYTE)
    ratios, bare = [], []
    for _ in range(pairs):
        clear(folder)
        baseline = seconds(forward, model, ids)
        bare.append(baseline)
        baseline += seconds(write, folder / "plain.bin", block, report.distinct_bytes)
        clear(folder)
        ratios.append(seconds(recorded, model, ids, folder / "record.st") / baseline)
    ratios.sort()
    print(
        f"record / (forward + write): median {statistics.median(ratios):.3f}, "
        f"quartiles {ratios[len(ratios) // 4]:.3f} to {ratios[-len(ratios) // 4]:.3f} "
        f"over {pairs} pairs; bare forward {statistics.median(bare):.3f} s"
    )


def peak_memory(folder: Path, forwards: int, record: bool, queue) -> None:
    model, ids = build()
    forward(model, ids)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of the model's making
    if record:
        with qvtrace.record(model, folder / "memory.st", overwrite=True):
            for _ in range(forwards):
                forward(model, ids + 1)
    else:
        for _ in range(forwards):
            forward(model, ids + 1)
    status = Path("/proc/self/status").read_text()
    queue.put(int(status.split("VmHWM:")[1].split()[0]) * 1024)


def compare_memory(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    largest = TOKENS * 32000 * 4 / MEBIBYTE
    for forwards in (1, 6):
        peaks = []
        for record in (False, True):
            queue = context.Queue()
            process = context.Process(target=peak_memory, args=(folder, forwards, record, queue))
            process.start()
            peaks.append(queue.get())
            process.join()
        print(
            f"{forwards} forwards: peak memory above a bare run "
            f"{(peaks[1] - peaks[0]) / MEBIBYTE:.0f} MiB (largest tensor {largest:.0f} MiB)"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=15)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as folder:
        compare_times(Path(folder), pairs)
        compare_memory(Path(folder))


if __name__ == "__main__":
    main()
