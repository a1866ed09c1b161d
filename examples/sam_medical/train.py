"""`sam-medical train`, from a checkout."""

from sam_medical.cli.train import main

if __name__ == "__main__":
    main()
