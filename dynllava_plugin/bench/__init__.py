"""What sparsification saves on this machine: time, memory and the theoretical limit, with random weights."""
