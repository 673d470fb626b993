"""``python -m verified.gpu``: say whether this machine has a usable NVIDIA GPU."""

import sys


def main() -> int:
    """Print the device and return 0, or print a sentence and return 1."""
    try:
        import torch
    except ImportError:
        print("no GPU can be used: torch is not installed")
        return 1
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (this torch is built for the CPU only)"
        print(f"no NVIDIA GPU was found by torch {torch.__version__}{built}")
        return 1
    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError as error:
        print(f"the GPU does not work: {str(error).splitlines()[0]}")
        return 1
    print(torch.cuda.get_device_name())
    return 0


if __name__ == "__main__":
    sys.exit(main())
