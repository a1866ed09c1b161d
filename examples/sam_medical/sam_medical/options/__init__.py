"""The options of the commands: dataclasses whose fields are command-line flags and YAML keys."""
