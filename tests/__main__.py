"""Everything that must pass before a change is kept: lint, format, types, tests.

python -m tests [arguments for pytest]
"""

import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

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
    with tempfile.TemporaryDirectory() as cache:
        # Both workers and the programs that tests start compile many of the same programs.
        shared = {"JAX_COMPILATION_CACHE_DIR": cache}
        shared |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        for check in CHECKS:
            print("+", shlex.join(check), flush=True)
            command = [sys.executable, "-m", *check]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | shared, check=False)
            if done.returncode:
                raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
