"""Why this Python cannot use a GPU; also a script, for a Makefile before anything is installed."""

from __future__ import annotations


def reason() -> str | None:
    """None, or why nothing can run on a GPU."""
    try:
        import torch
    except ImportError:
        return "this Python has no PyTorch"
    return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"


if __name__ == "__main__":
    print(reason() or "")
