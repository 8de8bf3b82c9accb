"""What decides the numbers of a run beside its settings: installed versions and the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("dynllava-plugin", "torch", "transformers", "lmms-eval", "ms-vlmeval", "nltk")


def versions() -> dict[str, str]:
    """Return the installed versions of Python and of each package that decides the numbers, by name."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def host() -> dict[str, Any]:
    """Return what this machine is: system, processor, cores, memory [GiB], accelerator, torch's threads."""
    import torch

    facts: dict[str, Any] = {
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts["processor"] = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, StopIteration, ValueError):
        facts["processor"] = platform.processor() or "unknown"
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name(0)
    facts["threads"] = torch.get_num_threads()
    return facts


def free_bytes(device: Any) -> int:
    """Return how many bytes could be allocated now on a `torch.device`; 2**62 where the system doesn't say."""
    import torch

    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return 1 << 62
