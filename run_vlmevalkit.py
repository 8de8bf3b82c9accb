"""Evaluate in VLMEvalKit: `python run_vlmevalkit.py --model dynllava --data RealWorldQA`; see `--help`."""

import dynllava_plugin.interrupts  # noqa: F401  before all that takes time

# isort: split
import sys

from dynllava_plugin.evaluation.vlmevalkit.command import main

if __name__ == "__main__":
    sys.exit(main())
