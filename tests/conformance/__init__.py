"""PEFT's own test-suite, run against `SVDScaleShiftConfig`: `make conformance`."""
