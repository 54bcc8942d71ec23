"""Everything that must pass before a change is kept: lint, format, types, tests.

python -m tests [arguments for pytest]
"""

import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("pyright", "--pythonpath", sys.executable),
    # A file stays on one worker, so that its fixtures compile once.
    ("pytest", "-n", "2", "--dist", "loadfile", *sys.argv[1:]),
)


def main() -> None:
    """Run the checks in order and exit with the status of the first that fails."""
    for check in CHECKS:
        print("+", shlex.join(check), flush=True)
        status = subprocess.run([sys.executable, "-m", *check], cwd=ROOT, check=False).returncode
        if status:
            raise SystemExit(status)


if __name__ == "__main__":
    main()
