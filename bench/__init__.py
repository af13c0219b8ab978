"""Our speed and memory beside the reference libraries, paired in one run; a tool that nothing imports."""
