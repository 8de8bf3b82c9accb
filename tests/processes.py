"""Training commands in processes of their own, forked from one that has imported everything: a second each, not ten."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import train.finetune

torch.set_num_threads(1)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
TIMEOUT = 240


@dataclass
class Job:
    """A training command.

    Attributes
    ----------
    flags : list of str
    log : Path
        Where its output goes.
    environment : dict
    before : callable, optional
        Called in the process first, with `arguments`; a function of a module.
    """

    flags: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    before: Callable[..., None] | None = None
    arguments: tuple[Any, ...] = ()


@dataclass
class Done:
    """How a job ended: exit status (negative: the signal), and what it printed."""

    status: int
    output: str


def run(*jobs: Job) -> list[Done]:
    """Run jobs side by side; one that hangs is killed and fails the test."""
    processes = [CONTEXT.Process(target=_work, args=(job,)) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    outputs = [job.log.read_text(errors="replace") if job.log.exists() else "" for job in jobs]
    assert not hung, "a process hung:\n" + "\n".join(outputs)
    return [Done(process.exitcode or 0, output) for process, output in zip(processes, outputs, strict=True)]


def side_by_side(
    flags: list[str],
    log: Path,
    number: int,
    before: Callable[..., None] | None = None,
    **environment: str,
) -> list[Job]:
    """The jobs of one distributed run, as `torchrun` would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    return [
        Job(
            flags,
            log.with_name(f"{log.name}-{rank}"),
            {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            before,
        )
        for rank in range(number)
    ]


def _work(job: Job) -> None:
    output = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(job.environment)
    multiprocessing.set_start_method("fork", force=True)  # of its data-loading processes, as in a command
    if job.before:
        job.before(*job.arguments)
    sys.exit(train.finetune.main(job.flags))


def kill_at_event(folder: str, number: int, count_to: str) -> None:
    """SIGKILL this process at its `number`-th change in `folder`; the count so far is kept in `count_to`."""
    changes = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
    seen = 0

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in changes or not str(arguments[0]).startswith(folder + "/"):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        Path(count_to).write_text(str(seen))

    sys.addaudithook(listen)


def kill_behind(path: str) -> None:
    """SIGKILL this process once `path` is there and something else is opened for writing."""

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & os.O_WRONLY and os.path.exists(path):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(listen)


def kill_in_step(step: int, place: str) -> None:
    """SIGKILL this process in an optimiser step: as its "forward" or "backward" pass or the weights' "update" begins."""
    from train.trainer import DynamicLlavaTrainer

    owners = {"forward": (DynamicLlavaTrainer, "compute_loss"), "backward": (torch.Tensor, "backward")}
    owner, name = owners.get(place, (torch.optim.AdamW, "step"))
    method, began = getattr(owner, name), []
    start = DynamicLlavaTrainer.get_batch_samples

    def counted(self: Any, *args: Any) -> Any:
        began.append(self.state.global_step + 1)
        return start(self, *args)

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if began[-1:] == [step]:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *args, **kwargs)

    DynamicLlavaTrainer.get_batch_samples = counted  # type: ignore[method-assign]
    setattr(owner, name, killed)


def terminate_in_step(step: int) -> None:
    """SIGTERM to this process while it is in an optimiser step."""
    from train.trainer import DynamicLlavaTrainer

    compute_loss = DynamicLlavaTrainer.compute_loss

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(self, *args, **kwargs)

    DynamicLlavaTrainer.compute_loss = interrupted  # type: ignore[method-assign]


def terminate_group_in_step(step: int) -> None:
    """SIGTERM, from outside, to this process and all that it started, while it is in an optimiser step."""
    from train.trainer import DynamicLlavaTrainer

    os.setsid()
    compute_loss = DynamicLlavaTrainer.compute_loss

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            kill = f"import os; os.killpg({os.getpgrp()}, {int(signal.SIGTERM)})"
            subprocess.run([sys.executable, "-S", "-c", kill], start_new_session=True, check=True)
        return compute_loss(self, *args, **kwargs)

    DynamicLlavaTrainer.compute_loss = interrupted  # type: ignore[method-assign]


def fill_disk_at(step: int, limit: int | None = None) -> None:
    """The disk is full when this step's checkpoint is saved.

    Its optimizer.pt is written to /dev/full, or no file may grow beyond `limit` bytes.
    """
    from train.trainer import DynamicLlavaTrainer

    save = DynamicLlavaTrainer.save_model

    def full(self: Any, output_dir: str, **kwargs: Any) -> None:
        if output_dir.endswith(f"checkpoint-{step}"):
            os.makedirs(output_dir)
            if limit is None:
                os.symlink("/dev/full", os.path.join(output_dir, "optimizer.pt"))
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(self, output_dir, **kwargs)

    DynamicLlavaTrainer.save_model = full  # type: ignore[method-assign]


def allow_fsdp_on_cpu() -> None:
    """accelerate shards on accelerators only; PyTorch's FSDP2 itself works on the CPU over gloo."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    create = AcceleratorState.__init__

    def sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        create(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self.mixed_precision != "no":  # as on an accelerator
                fsdp_plugin.set_mixed_precision(self.mixed_precision)

    AcceleratorState.__init__ = sharded  # type: ignore[method-assign]


def allow_deepspeed_on_cpu() -> None:
    """accelerate starts DeepSpeed on accelerators only; DeepSpeed itself works on the CPU over gloo.

    Its own shared-memory collectives are left out: they would be compiled here first.
    """
    import deepspeed  # noqa: F401
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
