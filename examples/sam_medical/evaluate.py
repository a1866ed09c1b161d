"""`sam-medical evaluate`, from a checkout."""

from sam_medical.cli.evaluate import main

if __name__ == "__main__":
    main()
