"""A chat page and a server with OpenAI's interface: `python -m serve`. Nothing imports this room."""
