"""Says what this machine is and which backends can run on it, for reports of bugs: `python -m emc2_kernels`."""

from .machine import description

if __name__ == "__main__":
    print(description())
