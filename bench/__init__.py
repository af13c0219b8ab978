"""Measures speed and memory of this project beside the reference libraries; a tool that nothing else imports."""
