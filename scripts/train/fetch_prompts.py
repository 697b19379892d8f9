"""The same as `fme prompts`, which see."""

import sys

from flow_grpo.commands.main import main

if __name__ == "__main__":
    raise SystemExit(main(["prompts", *sys.argv[1:]]))
