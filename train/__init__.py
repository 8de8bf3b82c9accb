"""The training recipe: arguments, data and a small Trainer subclass (`train/finetune.py` is the command)."""
