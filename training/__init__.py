"""The parts of a training run around the loop of train.py: flags, recipes, ranks, sharding, checkpoints, meters. The
scripts, world/ and evaluation/ may call it."""
