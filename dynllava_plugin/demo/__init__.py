"""The demo: `python -m dynllava_plugin.demo`, or `make demo`."""
