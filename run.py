"""Run gradsift from a checkout: the same as the installed command `gradsift`."""

from gradsift.cli import main

if __name__ == "__main__":
    main()
