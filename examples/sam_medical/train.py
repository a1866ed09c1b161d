"""`sam-medical train`, from a checkout.

The options are in `sam_medical/options/`, the run in `sam_medical/training/run.py`, its loop in `trainer.py` there.
"""

from sam_medical.cli.train import main

if __name__ == "__main__":
    main()
