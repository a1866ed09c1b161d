"""`sam-medical compare`, from a checkout."""

from sam_medical.cli.compare import main

if __name__ == "__main__":
    main()
