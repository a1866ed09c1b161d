"""`sam-medical predict`, from a checkout."""

from sam_medical.cli.predict import main

if __name__ == "__main__":
    main()
