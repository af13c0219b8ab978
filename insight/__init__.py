"""Looking into a model: where on the image each word of an answer comes from, and what is wrong with a run. The scripts
and the tools may call it."""
