"""The commands, a module per command. `sam-medical COMMAND` and `python -m sam_medical COMMAND` call their `main`."""
