"""``python -m parasolver_cli``, which is what torchrun can start."""

from parasolver_cli.entry import main

if __name__ == "__main__":
    main()
