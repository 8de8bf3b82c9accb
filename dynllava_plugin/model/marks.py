"""How what the vision side decides travels with the image features."""

# `generate` encodes images before the first forward call and repeats the result for each beam, so that a decision made in the
# vision tower has to be in the features: channels behind them, 1 where the token stays, and its score.
EXTRA = 2
