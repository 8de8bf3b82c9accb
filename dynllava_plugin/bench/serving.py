"""`dynllava bench serve`: clients of `dynllava serve` over HTTP, full context against sparse, taking turns."""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from dynllava_plugin.bench.modes import policy_text
from dynllava_plugin.bench.pictures import QUESTION, pictures_in
from dynllava_plugin.bench.rows import Rows
from dynllava_plugin.bench.timing import place
from dynllava_plugin.errors import UserError, reason_in
from dynllava_plugin.images import open_image
from dynllava_plugin.model.checkpoints.sources import find_checkpoint
from dynllava_plugin.processes import start

Burst = tuple[list[float], float]  # seconds to the first text of each request, seconds of all


def run(args: argparse.Namespace) -> int:
    """Measure bursts of requests; return 130 where the user interrupts, with the rows so far kept."""
    device, _, here = place(args.device, args.dtype)
    common = {"phase": "serve", "shape": Path(args.pretrained).name, **here}
    find_checkpoint(args.pretrained, weights=False)
    urls = [_data_url(path) for path in (pictures_in(args.images) if args.images else [None])]
    rows = Rows.of(args, common)
    bodies = {mode: _body(args.pretrained, policy_text(mode), args.new_tokens) for mode in args.mode}

    measured = [(name, size) for size in args.batch_size for name in bodies]

    def work() -> None:
        wanted = [
            clients for clients in args.clients
            if not rows.has(
                {"mode": name, "path": _path(size), "batch": clients, "length": args.new_tokens} for name, size in measured
            )
        ]  # fmt: skip
        if not wanted:
            return
        flags = ["--device", str(device), "--dtype", common["dtype"], "--batch_size"]
        with ExitStack() as stack:
            servers = {
                size: stack.enter_context(serving(args.pretrained, [*flags, str(size)]))
                for size in args.batch_size
            }
            for name, size in measured:  # warm
                asyncio.run(burst(servers[size], bodies[name], urls, 1, 1))
            for clients in wanted:
                requests, found = max(clients, args.requests), {one: list[Burst]() for one in measured}
                for _ in range(args.repeats):
                    for name, size in measured:
                        burst_of = burst(servers[size], bodies[name], urls, clients, requests)
                        found[name, size].append(asyncio.run(burst_of))
                _add(rows, clients, args.new_tokens, requests, found)

    return rows.carry_out(work, args.output)


@contextmanager
def serving(checkpoint: str, flags: list[str]) -> Iterator[str]:
    """Run `dynllava serve` on a free port and yield its address; end it by Ctrl-C."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        command = [sys.executable, "-m", "dynllava_plugin.cli", "serve", checkpoint]
        command += ["--port", "0", "--policy", "full", *flags]
        process = start(command, log)
        try:
            while not (found := re.search(r"at (http://\S+)", _read(log))):
                if process.poll() is not None:
                    raise UserError(f"serve: ended with {process.returncode} ({reason_in(_read(log))})")
                time.sleep(0.1)
            yield found[1]
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(30)


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


async def burst(url: str, body: dict[str, Any], images: list[str], clients: int, requests: int) -> Burst:
    """Return each request's seconds to its first text, and the seconds of all, of `clients` that ask one after the other."""
    from openai import AsyncOpenAI

    left, firsts = iter(range(requests)), []

    async def ask(client: AsyncOpenAI) -> None:
        for number in left:
            content: Any = [
                {"type": "image_url", "image_url": {"url": images[number % len(images)]}},
                {"type": "text", "text": QUESTION},
            ]
            started, first = time.perf_counter(), None
            stream: Any = await client.chat.completions.create(
                **body, messages=[{"role": "user", "content": content}]
            )
            async for piece in stream:
                if first is None and piece.choices and piece.choices[0].delta.content:
                    first = time.perf_counter()
            firsts.append((first or time.perf_counter()) - started)

    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600) as client:
        started = time.perf_counter()
        await asyncio.gather(*(ask(client) for _ in range(clients)))
        return firsts, time.perf_counter() - started


def _body(checkpoint: str, policy: str, new_tokens: int) -> dict[str, Any]:
    # Settings without an end token: every answer has as many tokens.
    settings = json.dumps({"max_new_tokens": new_tokens, "do_sample": False})
    return {
        "model": checkpoint,
        "stream": True,
        "extra_body": {"policy": policy, "generation_config": settings},
    }


def _data_url(path: Path | None) -> str:
    from PIL import Image

    image = open_image(path) if path else Image.effect_noise((336, 336), 90).convert("RGB")
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _path(batch_size: int) -> str:
    return f"http, {batch_size} together"


def _add(
    rows: Rows, clients: int, length: int, requests: int, found: dict[tuple[str, int], list[Burst]]
) -> None:
    rates = {one: median(requests / seconds for _, seconds in bursts) for one, bursts in found.items()}
    firsts = {one: median(s for times, _ in bursts for s in times) for one, bursts in found.items()}
    for (name, size), bursts in found.items():
        rate, first = rates[name, size], firsts[name, size]
        rows.add(
            mode=name, path=_path(size), prompts="equal", batch=clients, length=length, requests_per_s=rate,
            first_token_s=first, speedup=rate / rates["full", size], requests=requests, repeats=len(bursts),
            first_token_speedup=firsts["full", size] / first,
        )  # fmt: skip
