"""What papers after LLaVA changed in the model: tiles, connectors, token budgets, tuning methods; the model and
everything above it may call it."""
