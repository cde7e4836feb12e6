"""Says what this machine is and which backends can run on it, for reports of bugs: `python -m emc2_kernels`."""

import sys

from .machine import description

if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a path may have letters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    print(description())
