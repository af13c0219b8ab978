"""What papers after LLaVA changed in the model: how an image is tiled (later: connectors, token budgets, tuning
methods); the model and everything above it may call it."""
