"""What a run needs around the loop of train.py: flags, recipes, ranks, sharding, checkpoints, meters; the scripts
and the rooms beside it may call it."""
