"""The options of the commands: dataclasses whose fields are flags and keys of a YAML file."""
