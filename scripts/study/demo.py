"""`fme demo`, by its first name.

python scripts/study/demo.py [--out logs/demo] [--seed 42] [--max_seconds 600]
"""

import sys

from flow_grpo.commands.main import main

if __name__ == "__main__":
    raise SystemExit(main(["demo", *sys.argv[1:]]))
