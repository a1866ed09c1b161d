"""`sam-medical made-up`, from a checkout."""

from sam_medical.cli.made_up import main

if __name__ == "__main__":
    main()
