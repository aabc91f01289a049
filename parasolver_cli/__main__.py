"""``python -m parasolver_cli``, which is what torchrun can start."""

from parasolver_cli.main import app

if __name__ == "__main__":
    app()
