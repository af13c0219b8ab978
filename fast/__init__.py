"""What replaces plain layers for speed, same parameters and same numbers; only the scripts and the tools switch it
on."""
