"""`sam-medical inspect`, from a checkout."""

from sam_medical.cli.inspect_data import main

if __name__ == "__main__":
    main()
