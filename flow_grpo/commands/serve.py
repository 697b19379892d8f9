"""Serve rewards over HTTP, for training that runs elsewhere.

fme serve pickscore clipscore=MODEL mine=FILE.py:THING              as `fme train --reward` takes them
fme train RECIPE --reward other=http://HOST:8000/score/pickscore    asks this server

Only this machine can reach it unless --host says otherwise. Whoever asks must have the same FME_REWARD_TOKEN in his
environment, where that variable is set here.
"""

from __future__ import annotations

import argparse
import logging
import os

from ml_collections import ConfigDict

from flow_grpo.commands.check import check_one_process, whole
from flow_grpo.errors import ConfigError
from flow_grpo.messages import say
from flow_grpo.places import check_packages
from flow_grpo.recipes.base import declare, get_config
from flow_grpo.rewards.checks import validate_rewards
from flow_grpo.rewards.chosen import known_rewards
from flow_grpo.rewards.own_files import read_option
from flow_grpo.rewards.registry import REWARDS

MIB = 2**20
GRACE = 10  # seconds in which requests are still answered once it is to stop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("rewards", nargs="+", metavar="NAME[=...]", help="what to serve; `fme ls rewards`")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=whole(0), default=8000, help="port (default: 8000; 0: any that is free)")
    parser.add_argument("--device", default="", help="as torch names it (default: cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the networks (default: fp32)")
    parser.add_argument("--max-body", type=whole(1), default=256, metavar="MIB", help="of a request (default: 256)")
    parser.add_argument("--max-batch", type=whole(1), default=64, metavar="N", help="images of a request (default: 64)")
    parser.add_argument("--max-queue", type=whole(1), default=64, metavar="N", help="requests at once (default: 64)")


def main(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it. Raises ConfigError before any model loads for bad input."""
    check_one_process("serve")
    check_packages("fme serve", ("fastapi", "uvicorn"), "serve")
    config = configuration(arguments)
    serve(config, arguments)
    return 0


def configuration(arguments: argparse.Namespace) -> ConfigDict:
    """A configuration whose rewards are those that are asked for, each with weight 1. ConfigError for bad ones."""
    config = get_config()
    config.reward_fn.update(dict.fromkeys(config.reward_fn, 0.0))
    config.reward_dtype = arguments.dtype
    for text in arguments.rewards:
        asked = read_option(text, REWARDS)
        if asked.place:
            declare(config, [f"reward_files.{asked.name}"])
            config.reward_files[asked.name] = asked.place
        elif asked.model:
            config.reward_model[asked.name] = asked.model
        config.reward_fn[asked.name] = 1.0
    validate_rewards(config)
    return config


def serve(config: ConfigDict, arguments: argparse.Namespace) -> None:
    """Load the rewards, and answer until a signal comes."""
    import torch  # once the input is known to be good
    import uvicorn

    from flow_grpo.rewards.building import build_reward
    from flow_grpo.rewards.server import Limits, reward_app
    from flow_grpo.rewards.wire import TOKEN_VARIABLE

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {arguments.device} cannot be used: {str(error).splitlines()[0]}") from None
    models = build_reward(config, device).models
    known = known_rewards(config)
    about = {name: {"meaning": known[name].meaning, "bounds": known[name].bounds} for name in models}
    limits = Limits(arguments.max_body * MIB, arguments.max_batch, arguments.max_queue)
    app = reward_app(models, about, limits, device, os.environ.get(TOKEN_VARIABLE, ""))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=arguments.host,
            port=arguments.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GRACE,
        )
    )
    logging.disable(logging.ERROR)  # of what uvicorn says besides
    try:
        socket = server.config.bind_socket()
    except SystemExit:  # uvicorn's word for an address that is taken
        raise ConfigError(f"--host {arguments.host} --port {arguments.port}: nothing can listen there.") from None
    finally:
        logging.disable(logging.NOTSET)
    host, port = socket.getsockname()[:2]
    for name in models:
        say(f"serving {name} on {device}: http://{host}:{port}/score/{name}")
    server.run(sockets=[socket])
