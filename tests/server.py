"""`dynllava serve` in a process of its own, for tests that talk to it over HTTP."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Server:
    """A server on a free port of 127.0.0.1, ready when constructed; `stop` is Ctrl-C."""

    def __init__(self, checkpoint: str, log: Path, *flags: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "dynllava_plugin.cli", "serve", checkpoint, "--port", "0", *flags]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        while not (found := re.search(r"http://\S+", self.text)):
            assert self.process.poll() is None, self.text
            time.sleep(0.1)
        self.url, self.name = found[0], checkpoint

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text()

    def client(self) -> Any:
        """An OpenAI client of it that tries once."""
        from openai import OpenAI

        return OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def resident(self) -> int:
        """Bytes of its memory."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> int:
        """Press Ctrl-C; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)
