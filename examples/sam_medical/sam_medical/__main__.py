from sam_medical.cli.main import main

if __name__ == "__main__":
    main()
