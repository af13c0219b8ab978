"""The embedded world of shapes and signs: its scenes, images, text and probes, and the speedrun that trains on it."""
