"""Two processes of one gloo group, each of which records its part of a model."""

import multiprocessing
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from qvtrace.recording.recorder import record

RANKS = 2
_CONTEXT = multiprocessing.get_context("forkserver")


def run_ranks(function: Callable[[Path], None], folder: Path, *, seconds: float = 120) -> None:
    """Call a function in each process of a group; raises unless all of them end well."""
    processes = [
        _CONTEXT.Process(target=_run_rank, args=(function, folder, rank)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    if codes != [0] * RANKS:
        raise RuntimeError(f"{function.__name__} ended with {codes}")


def _run_rank(function: Callable[[Path], None], folder: Path, rank: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    function(folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def record_with_plan(folder: Path) -> None:
    """A tiny Llama under transformers' plan of tensor parallelism."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", tp_plan="auto", attn_implementation="eager"
    )
    inputs = torch.load(folder / "inputs.pt")
    with record(model.eval(), folder / "parallel.st", weights=True), torch.no_grad():
        model(**inputs, use_cache=False)


class TwoLayers(nn.Module):
    """The linear layers of a block, the first by columns and the second by rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, 12)
        self.act = nn.GELU()
        self.down = nn.Linear(12, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.down(self.act(self.up(hidden)))
        return result


def parallel_layers(*, use_local_output: bool) -> nn.Module:
    """`TwoLayers` spread over the group by torch itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    plan = {
        "up": ColwiseParallel(use_local_output=use_local_output),
        "down": RowwiseParallel(),
    }
    return parallelize_module(TwoLayers(), mesh, plan)


def record_distributed_tensors(folder: Path) -> None:
    """With activations that are distributed tensors, and with local parts of them."""
    for name, use_local_output in (("placed.st", False), ("local.st", True)):
        model = parallel_layers(use_local_output=use_local_output)
        with record(model, folder / name, weights=True), torch.no_grad():
            model(torch.linspace(-1, 1, 16).reshape(2, 8))


def record_while_the_other_waits(folder: Path) -> None:
    """Only one process records: a collective in a hook would wait for the other for ever."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = init_device_mesh("cpu", (RANKS,))
    part = torch.full((2, 3), float(torch.distributed.get_rank()))
    values = [
        DTensor.from_local(part, mesh, [how], run_check=False) for how in (Shard(0), Partial())
    ]
    if torch.distributed.get_rank() == 0:
        model = nn.Identity()
        model.weight = nn.Parameter(values[0])
        with record(model, folder / "alone.st", weights=True):
            for value in values:
                model(value)
