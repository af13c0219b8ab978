"""The embedded world of shapes and signs: its images, its text, its probes, and the speedrun that trains on it;
scripts and tools may call it."""
