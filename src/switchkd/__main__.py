"""`python -m switchkd`, and so `accelerate launch -m switchkd` and `torchrun -m switchkd`."""

from switchkd.cli.main import main

if __name__ == "__main__":
    main()
