"""One entry point per stage, named by its verb: `python -m jobs.<stage>` or `cascade <stage>`."""
